//! `dylora generate`: continues prompts.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::open::{ModelArgs, OpenModel};
use super::progress::CountBar;
use super::results::Schema;
use super::sampling::SamplingArgs;
use super::{Shared, for_output, usage, write};
use crate::chat_template::Conversation;
use crate::generate::{
    Engine, EngineLimits, Event, Finish, GenerationDefaults, Request, TextStream, prompt,
};

/// Arguments of `dylora generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to continue. May be repeated. Without it and without `--prompts`, standard input is
    /// one prompt.
    #[arg(long, value_name = "TEXT", conflicts_with = "prompts", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// A file of prompts: each line is a JSON object with `prompt` or `messages`, as in training
    /// data. `-` is standard input.
    #[arg(long, value_name = "FILE.jsonl")]
    prompts: Option<PathBuf>,
    /// Answer prompts as messages of a user, by the base's chat template [default if there is a
    /// template, unless the run was trained without conversations].
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// A system message in front of each prompt; implies `--chat`.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", allow_hyphen_values = true)]
    system: Option<String>,
    /// Continue prompts as they are.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Most prompts that are continued at the same time. Texts do not depend on it in f32 on a CPU.
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch_size: usize,
    /// Print a JSON object for each prompt, in their order, each on a line of its own, with token
    /// ids, the logarithms of their probabilities in nats, and routing weights.
    #[arg(long)]
    json: bool,
}

/// A line of `--prompts`.
#[derive(Deserialize)]
struct PromptRecord {
    prompt: Option<String>,
    messages: Option<Value>,
    tools: Option<Value>,
}

/// What is to be continued, and where it comes from.
struct Prompt {
    content: Content,
    /// The place in messages, such as "line 3 of `prompts.jsonl`".
    place: String,
    ids: Vec<i64>,
}

/// What is to be continued.
enum Content {
    Text(String),
    Conversation(Conversation),
}

/// What was generated for a prompt.
struct Generated<'a> {
    stream: TextStream<'a>,
    /// The text that no later token changes.
    ready: String,
    events: Vec<Event>,
    finish: Option<Finish>,
}

/// Runs the command.
pub fn run(args: &GenerateArgs, shared: &Shared) -> Result<()> {
    let contents = args.contents(shared)?;
    let open = args.model.open(shared)?;
    let tokenizer = open.base.tokenizer()?;
    let is_message = args.answers_messages(&open);
    let prompts = contents.into_iter().map(|(content, place)| {
        let ids = args.ids(&content, &open, is_message).with_context(|| format!("in {place}"))?;
        Ok(Prompt { content, place, ids })
    });
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let talks = is_message
        || prompts.iter().any(|prompt| matches!(prompt.content, Content::Conversation(_)));
    let defaults = if talks { GenerationDefaults::of_chats } else { GenerationDefaults::of_base };
    let defaults = defaults(&open.base)?;
    let requests = requests(args, &open, &defaults, &prompts)?;
    // a text does not depend on which process makes it
    let pairs = shared.world.own_turns(prompts.into_iter().zip(requests).collect());
    let (prompts, requests): (Vec<Prompt>, Vec<Request>) = pairs.into_iter().unzip();
    let context = open.base.spec.max_positions as usize;
    let mut engine = Engine::new(&open.model, EngineLimits { max_texts: args.batch_size, context })
        .map_err(usage)?;
    for (request, prompt) in requests.into_iter().zip(&prompts) {
        engine.add(request).with_context(|| prompt.place.clone()).map_err(|error| {
            // a prompt of the command line is part of it
            if args.prompts.is_none() { usage(error) } else { error }
        })?;
    }
    let generated = |prompt: &Prompt| Generated {
        stream: TextStream::new(tokenizer, &prompt.ids, &args.sampling.stop),
        ready: String::new(),
        events: vec![],
        finish: None,
    };
    let generated: Vec<Generated<'_>> = prompts.iter().map(generated).collect();
    let show_bar = shared.show_progress && prompts.len() > 1;
    let bar = CountBar::new(show_bar, "generating", prompts.len() as u64);
    let mut printer = Printer {
        json: args.json,
        prints: shared.world.is_single(),
        prompts: &prompts,
        generated,
        printed: 0,
        written: 0,
    };
    while !engine.is_idle() {
        for event in engine.step() {
            if let Some(stopped) = printer.take(event)? {
                engine.cancel(stopped);
            }
        }
        if !printer.print()? {
            break;
        }
        bar.set(printer.printed as u64);
    }
    bar.finish();
    print_all(&printer, shared)
}

/// Prints the texts of all processes in the order of their prompts, in the first process. One that
/// is alone has printed them already.
fn print_all(printer: &Printer<'_>, shared: &Shared) -> Result<()> {
    if shared.world.is_single() {
        return Ok(());
    }
    let own = (0..printer.prompts.len()).map(|index| printer.whole(index)).collect();
    let texts = shared.world.join_turns(own)?;
    if !shared.is_first() {
        return Ok(());
    }
    let between = if printer.json { "\n" } else { "\n\n" };
    write(&format!("{}\n", for_output(&texts.join(between)))).map(|_| ())
}

impl GenerateArgs {
    /// Whether a text is a message of a user. Otherwise it is continued as it is.
    fn answers_messages(&self, open: &OpenModel) -> bool {
        if self.raw || self.chat || self.system.is_some() {
            return !self.raw;
        }
        let has_template = open.base.chat_template.is_some();
        if has_template && open.learned_chats == Some(false) {
            tracing::info!(
                "prompts are continued as they are, since the run was trained without \
                 conversations; `--chat` answers them by the chat template"
            );
        }
        has_template && open.learned_chats != Some(false)
    }

    /// The tokens of a prompt.
    fn ids(&self, content: &Content, open: &OpenModel, is_message: bool) -> Result<Vec<i64>> {
        let tokenizer = open.base.tokenizer()?;
        let of_text = |text: &str| {
            let system = self.system.iter().map(|text| prompt::message("system", text));
            prompt::of_messages(system.chain([prompt::message("user", text)]).collect())
        };
        let chat_ids = |conversation: &Conversation| {
            prompt::chat_ids(tokenizer, prompt::template_of(&open.base)?, conversation)
        };
        match content {
            Content::Conversation(conversation) => chat_ids(conversation),
            Content::Text(text) if is_message => chat_ids(&of_text(text)),
            Content::Text(text) => prompt::text_ids(tokenizer, text),
        }
    }

    /// What is to be continued, and where each comes from.
    fn contents(&self, shared: &Shared) -> Result<Vec<(Content, String)>> {
        if self.batch_size == 0 {
            return Err(usage(anyhow!("`--batch-size` must be at least 1, got 0")));
        }
        let Some(file) = &self.prompts else {
            if !self.prompt.is_empty() {
                let place = |text: &String| (Content::Text(text.clone()), "`--prompt`".to_owned());
                return Ok(self.prompt.iter().map(place).collect());
            }
            if shared.is_first() && std::io::stdin().is_terminal() {
                return Err(usage(anyhow!(
                    "there is no prompt\nhint: `--prompt TEXT`, `--prompts FILE.jsonl` or standard \
                     input"
                )));
            }
            return Ok(vec![(Content::Text(standard_input(shared)?), "standard input".to_owned())]);
        };
        let is_stdin = file.as_os_str() == "-";
        let name = if is_stdin { "standard input".into() } else { format!("`{}`", file.display()) };
        let text = match is_stdin {
            true => standard_input(shared)?,
            false => fs_err::read_to_string(file)?,
        };
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let prompts = lines.map(|(index, line)| {
            let place = format!("line {} of {name}", index + 1);
            let content = content(line).with_context(|| format!("in {place}"))?;
            Ok((content, place))
        });
        let prompts = prompts.collect::<Result<Vec<_>>>()?;
        if prompts.is_empty() {
            bail!("{name} has no prompt");
        }
        Ok(prompts)
    }
}

/// What a line of `--prompts` is.
fn content(line: &str) -> Result<Content> {
    let record: PromptRecord = serde_json::from_str(line).map_err(|error| {
        anyhow!("a line must be a JSON object with `prompt`, a string, or `messages`: {error}")
    })?;
    match (record.prompt, record.messages) {
        (Some(text), None) => Ok(Content::Text(text)),
        (None, Some(messages)) => {
            Ok(Content::Conversation(prompt::conversation(&messages, record.tools.as_ref())?))
        }
        _ => bail!("a line must have either `prompt` or `messages`"),
    }
}

/// Standard input, which the first process reads for all.
fn standard_input(shared: &Shared) -> Result<String> {
    let mut text = String::new();
    if shared.is_first() {
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
    }
    let of_first = shared.world.exchange(text.as_bytes())?.swap_remove(0);
    Ok(String::from_utf8(of_first)?)
}

fn requests(
    args: &GenerateArgs,
    open: &OpenModel,
    defaults: &GenerationDefaults,
    prompts: &[Prompt],
) -> Result<Vec<Request>> {
    let sampling = args.sampling.sampling(defaults)?;
    let max_new_tokens = args.sampling.max_new_tokens(defaults)?;
    let (choice, route) = args.sampling.route(open)?;
    tracing::debug!("{} prompt(s), routed by `{choice}`, {sampling:?}", prompts.len());
    let end_tokens: std::sync::Arc<[i64]> = defaults.end_tokens.clone().into();
    let request = |(key, prompt): (usize, &Prompt)| Request {
        key: key as u64,
        prompt: prompt.ids.clone(),
        max_new_tokens,
        sampling,
        route: route.clone(),
        end_tokens: end_tokens.clone(),
        num_alternatives: 0,
        wants_weights: args.json,
    };
    Ok(prompts.iter().enumerate().map(request).collect())
}

/// Prints texts in the order of their prompts: the next one piece by piece, and those behind it
/// when it is their turn.
struct Printer<'a> {
    json: bool,
    /// Whether texts are printed as they come. Otherwise they are only collected.
    prints: bool,
    prompts: &'a [Prompt],
    generated: Vec<Generated<'a>>,
    /// Number of texts that were printed as a whole.
    printed: usize,
    /// Number of bytes of the next text that were printed.
    written: usize,
}

impl Printer<'_> {
    /// Takes a new token. Returns the number of its text if a stop string ends it.
    fn take(&mut self, event: Event) -> Result<Option<u64>> {
        let number = event.text;
        let generated = &mut self.generated[number as usize - 1];
        let (piece, finish) = generated.stream.take(&event)?;
        generated.ready += &piece;
        generated.finish = finish;
        generated.events.push(event);
        Ok(generated.stream.has_stopped().then_some(number))
    }

    /// Prints what can be printed. Returns whether anybody still reads it.
    fn print(&mut self) -> Result<bool> {
        while let Some(generated) = self.generated.get(self.printed) {
            if !self.prints {
                if generated.finish.is_none() {
                    return Ok(true);
                }
            } else if self.json {
                let Some(finish) = generated.finish else { return Ok(true) };
                if !write(&format!("{}\n", self.json_of(self.printed, finish)))? {
                    return Ok(false);
                }
            } else {
                let is_last = self.printed + 1 == self.prompts.len();
                let end = match generated.finish {
                    None => "",
                    Some(_) if is_last => "\n",
                    Some(_) => "\n\n",
                };
                let ready = for_output(&generated.ready[self.written..]);
                if !write(&format!("{ready}{end}"))? {
                    return Ok(false);
                }
                self.written = generated.ready.len();
                if generated.finish.is_none() {
                    return Ok(true);
                }
            }
            (self.printed, self.written) = (self.printed + 1, 0);
        }
        Ok(true)
    }

    /// The whole output for a prompt.
    fn whole(&self, index: usize) -> String {
        let generated = &self.generated[index];
        match generated.finish {
            Some(finish) if self.json => self.json_of(index, finish).to_string(),
            _ => generated.ready.clone(),
        }
    }

    fn json_of(&self, index: usize, finish: Finish) -> Value {
        let (prompt, generated) = (&self.prompts[index], &self.generated[index]);
        let tokens = || generated.events.iter().map(|event| &event.token);
        let (key, value) = match &prompt.content {
            Content::Text(text) => ("prompt", json!(text)),
            Content::Conversation(conversation) => ("messages", json!(conversation.messages)),
        };
        Schema::Generate.mark(json!({
            key: value,
            "text": generated.ready,
            "finish_reason": finish.name(),
            "prompt_ids": prompt.ids,
            "ids": tokens().map(|token| token.id).collect::<Vec<_>>(),
            "log_probs": tokens().map(|token| token.log_prob).collect::<Vec<_>>(),
            "routing_weights": tokens().map(|token| &token.weights).collect::<Vec<_>>(),
        }))
    }
}
