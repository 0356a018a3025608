//! `dylora generate`: continues prompts.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::open::{ModelArgs, OpenModel};
use super::progress::CountBar;
use super::sampling::SamplingArgs;
use super::{Shared, usage};
use crate::generate::{
    Engine, EngineLimits, Event, Finish, GenerationDefaults, Request, Route, TextStream, prompt_ids,
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
    /// A file of prompts: each line is a JSON object with `prompt`, as in training data. `-` is
    /// standard input.
    #[arg(long, value_name = "FILE.jsonl")]
    prompts: Option<PathBuf>,
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
    prompt: String,
}

/// A prompt and where it comes from.
struct Prompt {
    text: String,
    /// The place in messages, such as "line 3 of `prompts.jsonl`".
    place: String,
    ids: Vec<i64>,
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
pub fn run(args: GenerateArgs, shared: &Shared) -> Result<()> {
    let texts = args.texts()?;
    let open = args.model.open(shared)?;
    let tokenizer = open.base.tokenizer()?;
    let prompts = texts.into_iter().map(|(text, place)| {
        let ids = prompt_ids(tokenizer, &text).with_context(|| format!("in {place}"))?;
        Ok(Prompt { text, place, ids })
    });
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let defaults = GenerationDefaults::of_base(&open.base)?;
    let requests = requests(&args, &open, &defaults, &prompts)?;
    let context = open.base.spec.max_positions as usize;
    let mut engine = Engine::new(&open.model, EngineLimits { max_texts: args.batch_size, context })
        .map_err(usage)?;
    for (request, prompt) in requests.into_iter().zip(&prompts) {
        engine.add(request).with_context(|| prompt.place.clone()).map_err(|error| {
            // a prompt of the command line is part of it
            if args.prompts.is_none() { usage(error) } else { error }
        })?;
    }
    let generated: Vec<Generated<'_>> = prompts
        .iter()
        .map(|prompt| Generated {
            stream: TextStream::new(tokenizer, &prompt.ids, &args.sampling.stop),
            ready: String::new(),
            events: vec![],
            finish: None,
        })
        .collect();
    let show_bar = shared.show_progress && prompts.len() > 1;
    let bar = CountBar::new(show_bar, "generating", prompts.len() as u64);
    let mut printer =
        Printer { json: args.json, prompts: &prompts, generated, printed: 0, written: 0 };
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
    Ok(())
}

impl GenerateArgs {
    /// The prompts and where each comes from.
    fn texts(&self) -> Result<Vec<(String, String)>> {
        if self.batch_size == 0 {
            return Err(usage(anyhow!("`--batch-size` must be at least 1, got 0")));
        }
        let Some(file) = &self.prompts else {
            if !self.prompt.is_empty() {
                let place = |text: &String| (text.clone(), "`--prompt`".to_owned());
                return Ok(self.prompt.iter().map(place).collect());
            }
            if std::io::stdin().is_terminal() {
                return Err(usage(anyhow!(
                    "there is no prompt\nhint: `--prompt TEXT`, `--prompts FILE.jsonl`, or a text on \
                     standard input"
                )));
            }
            return Ok(vec![(standard_input()?, "standard input".to_owned())]);
        };
        let is_stdin = file.as_os_str() == "-";
        let name = if is_stdin { "standard input".into() } else { format!("`{}`", file.display()) };
        let text = if is_stdin { standard_input()? } else { fs_err::read_to_string(file)? };
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let prompts = lines.map(|(index, line)| {
            let place = format!("line {} of {name}", index + 1);
            let record: PromptRecord = serde_json::from_str(line).map_err(|error| {
                anyhow!("{place} must be a JSON object with `prompt`, a string: {error}")
            })?;
            Ok((record.prompt, place))
        });
        let prompts = prompts.collect::<Result<Vec<_>>>()?;
        if prompts.is_empty() {
            bail!("{name} has no prompt");
        }
        Ok(prompts)
    }
}

fn standard_input() -> Result<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
    Ok(text)
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
    let what = match &route {
        Route::Router if open.model.num_experts() == 1 => "the single expert".to_owned(),
        Route::Router => "the router".to_owned(),
        Route::Fixed(_) => format!("`{choice}`"),
    };
    tracing::debug!("{} prompt(s), routed by {what}, {sampling:?}", prompts.len());
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
        generated.finish = event.finish;
        // an end token has no text
        if event.finish != Some(Finish::Stop) {
            generated.ready += generated.stream.push(event.token.id)?;
        }
        let stops = generated.stream.has_stopped();
        if stops {
            generated.finish = Some(Finish::Stop);
        }
        if generated.finish.is_some() {
            generated.ready += generated.stream.finish()?;
        }
        generated.events.push(event);
        Ok(stops.then_some(number))
    }

    /// Prints what can be printed. Returns whether anybody still reads it.
    fn print(&mut self) -> Result<bool> {
        while let Some(generated) = self.generated.get(self.printed) {
            if self.json {
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
                if !write(&format!("{}{end}", &generated.ready[self.written..]))? {
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

    fn json_of(&self, index: usize, finish: Finish) -> Value {
        let (prompt, generated) = (&self.prompts[index], &self.generated[index]);
        let tokens = || generated.events.iter().map(|event| &event.token);
        json!({
            "prompt": prompt.text,
            "text": generated.ready,
            "finish_reason": finish.name(),
            "prompt_ids": prompt.ids,
            "ids": tokens().map(|token| token.id).collect::<Vec<_>>(),
            "log_probs": tokens().map(|token| token.log_prob).collect::<Vec<_>>(),
            "routing_weights": tokens().map(|token| &token.weights).collect::<Vec<_>>(),
        })
    }
}

/// Writes to standard output at once. Returns whether anybody reads it: the reader may have closed
/// the pipe.
fn write(text: &str) -> Result<bool> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow!("cannot write to standard output: {error}")),
    }
}
