//! `dylora chat`: a conversation in the terminal.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use super::chat_lines::Lines;
use super::chat_text::{columns, may_colour};
use super::open::{ModelArgs, OpenModel};
use super::sampling::SamplingArgs;
use super::{Shared, Stderr, describe, for_output, own_cache, usage, write};
use crate::chat_template::ChatTemplate;
use crate::data::Tokenizer;
use crate::generate::{
    Engine, EngineLimits, Event, Finish, GenerationDefaults, Request, Route, RouteChoice,
    TextStream, prompt,
};
use crate::report::palette::{coloured, largest};

/// What `/help` shows.
const HELP: &str = "\
/system [TEXT]    set the system message, or remove it, and begin a new conversation
/set KEY VALUE    change an option: temperature, top_k, top_p, min_p, repetition_penalty,
                  max_new_tokens, seed
/routing ROUTING  router, uniform, all, expert:N, domain:NAME or none, the base alone
/reset            begin a new conversation
/save FILE        write the conversation to a new file, as a record of training data
/help             show this
/exit             end, as Ctrl-D does
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer. //TEXT says /TEXT.";

/// Arguments of `dylora chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The system message.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Show the answer of the base beside that of the model. The conversation goes on with the
    /// latter.
    #[arg(long, conflicts_with = "show_routing")]
    compare: bool,
    /// Colour each token by the expert that had the largest weight where the token was predicted.
    #[arg(long)]
    show_routing: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub fn run(args: ChatArgs, shared: &Shared) -> Result<()> {
    let open = args.model.open(shared)?;
    let num_experts = open.model.num_experts();
    if num_experts == 0 && (args.compare || args.show_routing) {
        let flag = if args.compare { "--compare" } else { "--show-routing" };
        return Err(usage(anyhow!("`{flag}` needs experts, and a bare base has none")));
    }
    let defaults = GenerationDefaults::of_chats(&open.base)?;
    args.sampling.sampling(&defaults)?;
    args.sampling.max_new_tokens(&defaults)?;
    let (choice, route) = args.sampling.route(&open)?;
    let mut lines = Lines::open(own_cache().join("chat-history"))?;
    let stop_answer = Arc::new(AtomicBool::new(false));
    if lines.is_terminal() {
        signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&stop_answer))?;
    }
    let mut session = Session {
        template: prompt::template_of(&open.base)?,
        tokenizer: open.base.tokenizer()?,
        open: &open,
        defaults,
        sampling: args.sampling,
        choice,
        route,
        system: args.system,
        messages: vec![],
        num_answers: 0,
        compare: args.compare,
        colours: args.show_routing && may_colour(),
        show_routing: args.show_routing,
        stop_answer,
    };
    if lines.is_terminal() && !write(&session.welcome())? {
        return Ok(());
    }
    while let Some(line) = lines.next()? {
        match session.take(&line) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            // an error ends no conversation
            Err(error) => writeln!(Stderr, "error: {}", describe(&error))?,
        }
    }
    Ok(())
}

struct Session<'a> {
    open: &'a OpenModel,
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    defaults: GenerationDefaults,
    sampling: SamplingArgs,
    choice: RouteChoice,
    route: Route,
    system: Option<String>,
    /// The conversation, without the system message.
    messages: Vec<Map<String, Value>>,
    /// Number of answers so far. Each has random numbers of its own.
    num_answers: u64,
    compare: bool,
    show_routing: bool,
    /// Whether answers are coloured by expert.
    colours: bool,
    /// Set by Ctrl-C.
    stop_answer: Arc<AtomicBool>,
}

/// An answer, as far as it has come.
struct Answer<'a> {
    stream: TextStream<'a>,
    text: String,
    finish: Option<Finish>,
    num_tokens: usize,
    /// Number of tokens for which each expert had the largest weight.
    by_expert: Vec<usize>,
}

impl Session<'_> {
    /// What a user sees first.
    fn welcome(&self) -> String {
        let what = match self.open.model.num_experts() {
            0 => "the base".to_owned(),
            count => format!("{count} expert(s), routed by `{}`", self.choice),
        };
        let mut text = format!("{}, {what}. /help lists the commands.\n", self.open.base.label);
        if self.colours {
            let names = self.open.expert_names();
            let names = names.iter().enumerate().map(|(e, name)| coloured(name, e));
            text += &format!("{}\n", names.collect::<Vec<_>>().join("  "));
        }
        text
    }

    /// Carries out a line. Returns whether the session goes on.
    fn take(&mut self, line: &str) -> Result<bool> {
        let line = line.trim();
        if line.is_empty() {
            return Ok(true);
        }
        match line.strip_prefix('/') {
            Some(command) if !command.starts_with('/') => self.command(command),
            message => self.answer(message.unwrap_or(line)),
        }
    }

    fn command(&mut self, command: &str) -> Result<bool> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "exit" | "quit" => return Ok(false),
            "help" => return write(&format!("{HELP}\n")),
            "reset" => self.messages.clear(),
            "system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_owned());
                self.messages.clear();
            }
            "set" => {
                let (key, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                self.sampling.set(key, value.trim(), &self.defaults)?;
            }
            "routing" => {
                let choice: RouteChoice = rest.parse().context("`/routing`")?;
                let config = self.open.config.as_ref();
                self.route = choice.route(self.open.model.num_experts(), config)?;
                self.choice = choice;
            }
            "save" => self.save(rest)?,
            _ => bail!("there is no command `/{name}`\nhint: `/help` lists them"),
        }
        Ok(true)
    }

    /// All messages, the system message first.
    fn conversation(&self) -> Vec<Map<String, Value>> {
        let system = self.system.iter().map(|text| prompt::message("system", text));
        system.chain(self.messages.iter().cloned()).collect()
    }

    fn save(&self, file: &str) -> Result<()> {
        if file.is_empty() {
            bail!("`/save` needs the name of a file");
        }
        if self.messages.is_empty() {
            bail!("there is no conversation to save yet");
        }
        let text = format!("{}\n", json!({ "messages": self.conversation() }));
        let mut new = fs_err::OpenOptions::new();
        let mut file = new.write(true).create_new(true).open(Path::new(file))?;
        file.write_all(text.as_bytes())?;
        Ok(())
    }

    /// Answers a message. Returns whether anybody reads the answer.
    fn answer(&mut self, message: &str) -> Result<bool> {
        self.messages.push(prompt::message("user", message));
        let answer = self.generate().inspect_err(|_| {
            self.messages.pop();
        })?;
        let Some(text) = answer else { return Ok(false) };
        self.messages.push(prompt::message("assistant", &text));
        self.num_answers += 1;
        Ok(true)
    }

    /// Generates and shows the answer to the last message, and returns it; `None` if nobody reads
    /// it.
    fn generate(&self) -> Result<Option<String>> {
        let conversation = prompt::of_messages(self.conversation());
        let ids = prompt::chat_ids(self.tokenizer, self.template, &conversation)?;
        let model = &self.open.model;
        let context = self.open.base.spec.max_positions as usize;
        let mut engine = Engine::new(model, EngineLimits { max_texts: 2, context })?;
        let base = Route::Fixed(vec![0.0; model.num_experts() as usize]);
        let routes =
            if self.compare { vec![base, self.route.clone()] } else { vec![self.route.clone()] };
        for route in routes {
            engine
                .add(self.request(&ids, route)?)
                .map_err(|error| anyhow!("{error}\nhint: `/reset` begins a new conversation"))?;
        }
        let new = || Answer {
            stream: TextStream::new(self.tokenizer, &ids, &self.sampling.stop),
            text: String::new(),
            finish: None,
            num_tokens: 0,
            by_expert: vec![0; model.num_experts() as usize],
        };
        let mut answers = vec![new(), new()];
        answers.truncate(engine.num_texts().1);
        self.stop_answer.store(false, Ordering::Relaxed);
        while !engine.is_idle() && !self.stop_answer.load(Ordering::Relaxed) {
            for event in engine.step() {
                let number = event.text;
                let answer = &mut answers[number as usize - 1];
                let piece = answer.take(&event)?;
                if answer.stream.has_stopped() {
                    engine.cancel(number);
                }
                if !self.compare && !write(&self.shown(&piece, &event))? {
                    return Ok(None);
                }
            }
        }
        self.end(&mut answers).map(Some)
    }

    fn request(&self, ids: &[i64], route: Route) -> Result<Request> {
        Ok(Request {
            key: self.num_answers,
            prompt: ids.to_vec(),
            max_new_tokens: self.sampling.max_new_tokens(&self.defaults)?,
            sampling: self.sampling.sampling(&self.defaults)?,
            route,
            end_tokens: self.defaults.end_tokens.clone().into(),
            num_alternatives: 0,
            wants_weights: self.show_routing,
        })
    }

    /// A piece of the answer as it is shown.
    fn shown(&self, piece: &str, event: &Event) -> String {
        let piece = for_output(piece);
        match self.colours {
            true => coloured(&piece, largest(&event.token.weights)),
            false => piece.into_owned(),
        }
    }

    /// Shows the end of the answers, and returns the one that the conversation goes on with.
    fn end(&self, answers: &mut [Answer<'_>]) -> Result<String> {
        for answer in answers.iter_mut() {
            let rest = answer.stream.finish()?.to_owned();
            answer.text += &rest;
            if !self.compare {
                write(&format!("{}\n", for_output(&rest)))?;
            }
        }
        if let [base, model] = &*answers {
            let names = ["base", "model"];
            write(&format!(
                "{}\n",
                columns(names, [&for_output(&base.text), &for_output(&model.text)])
            ))?;
        }
        let answer = answers.last().expect("there is one answer at least");
        if self.show_routing {
            write(&format!("{}\n", self.routing_line(answer)))?;
        }
        if answer.finish == Some(Finish::Length) {
            let count = answer.num_tokens;
            tracing::warn!("the answer ends after {count} tokens: `/set max_new_tokens N`");
        }
        Ok(answer.text.clone())
    }

    /// How many tokens each expert was the first for.
    fn routing_line(&self, answer: &Answer<'_>) -> String {
        let names = self.open.expert_names();
        let of = |(expert, name): (usize, &String)| {
            let text = format!("{name}: {}", answer.by_expert[expert]);
            if self.colours { coloured(&text, expert) } else { text }
        };
        format!("[tokens: {}]", names.iter().enumerate().map(of).collect::<Vec<_>>().join("  "))
    }
}

impl Answer<'_> {
    /// Takes a token and returns the piece of text that is complete with it.
    fn take(&mut self, event: &Event) -> Result<String> {
        self.num_tokens += 1;
        if !event.token.weights.is_empty() {
            self.by_expert[largest(&event.token.weights)] += 1;
        }
        let (piece, finish) = self.stream.take(event)?;
        self.text += &piece;
        self.finish = finish;
        Ok(piece)
    }
}
