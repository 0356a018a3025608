//! `dylora serve`: OpenAI's HTTP interface.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;

use super::open::{ModelArgs, OpenModel};
use super::signals::Interrupt;
use super::{Shared, print_result, table, usage, variable};
use crate::generate::GenerationDefaults;
use crate::serve::{Keys, Limits, ServedModel, Server};

/// The environment variable with the key that clients must show.
const API_KEY: &str = "DYLORA_API_KEY";
/// The longest context that is reserved without being asked for.
const USUAL_CONTEXT: usize = 2048;

/// Arguments of `dylora serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The mixture's name in requests. Its experts are `NAME:expert-0` or `NAME:DOMAIN`, and its
    /// base is `NAME:base` [default: the name of the run's folder, of the folder of the adapters or
    /// of the base].
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// The address to listen on: an IP address or a host name.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// The port to listen on. 0 takes a free one, which is printed.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// A file with the keys that clients must show, one a line. Without it, the environment
    /// variable `DYLORA_API_KEY` may hold a key.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Answer everyone who can reach the server, without a key.
    #[arg(long, conflicts_with = "api_key_file")]
    no_auth: bool,
    /// Most texts that are generated at a time.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_texts)]
    max_batch: usize,
    /// Most texts that wait for their turn. Further requests are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_waiting)]
    max_queue: usize,
    /// Most positions of a text, prompt included. The memory for them is taken at the start
    /// [default: the base's number of positions, but at most 2048].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// The largest body of a request, in bytes.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_body_bytes)]
    max_body_bytes: usize,
    /// Longest time from a request to the end of its texts, in seconds.
    #[arg(long, value_name = "SECS", default_value_t = Limits::default().request_time.as_secs())]
    request_timeout: u64,
    /// Longest time that running texts have after SIGTERM or SIGINT, in seconds.
    #[arg(long, value_name = "SECS", default_value_t = Limits::default().drain_time.as_secs())]
    drain_timeout: u64,
}

/// Runs the command.
pub fn run(args: ServeArgs, shared: &Shared) -> Result<()> {
    let keys = args.keys()?;
    let address = args.address(&keys)?;
    let mut limits = args.limits()?;
    let mut open = args.model.open(shared)?;
    let positions = open.base.spec.max_positions as usize;
    limits.context = args.context.unwrap_or(positions.min(USUAL_CONTEXT));
    let served = served(&args, &mut open)?;
    let interrupt = Interrupt::listen()?;
    let server = Server::bind(address, keys, limits)?;
    let engine = server.engine(&open.model).map_err(usage)?;
    let (texts, context) = (limits.max_texts, limits.context);
    let bytes = engine.cache_bytes();
    tracing::info!(
        "the cache takes {bytes} bytes ({}) for {texts} text(s) of {context} positions",
        table::bytes(bytes as i64)
    );
    tracing::info!("models: {}", served.names().join(", "));
    print_result(&format!("http://{}", server.address()?))?;
    server.run(engine, served, interrupt.flag())
}

impl ServeArgs {
    /// The keys of clients.
    fn keys(&self) -> Result<Keys> {
        if self.no_auth {
            return Ok(Keys::OPEN);
        }
        let Some(file) = &self.api_key_file else {
            return Ok(Keys::new(variable(API_KEY).as_deref().map(str::trim)));
        };
        let text = fs_err::read_to_string(file).context("cannot read the keys")?;
        let keys = Keys::new(text.lines().map(str::trim).filter(|line| !line.is_empty()));
        if keys.is_open() {
            return Err(usage(anyhow!("`{}` holds no key", file.display())));
        }
        Ok(keys)
    }

    /// The address to listen on.
    fn address(&self, keys: &Keys) -> Result<SocketAddr> {
        let host = self.host.as_str();
        let found = (host, self.port).to_socket_addrs();
        let found = found.with_context(|| format!("`--host {host}` is no address"));
        let address = found.map_err(usage)?.next();
        let address = address.ok_or_else(|| usage(anyhow!("`--host {host}` has no address")))?;
        if keys.is_open() && !self.no_auth && !address.ip().is_loopback() {
            return Err(usage(anyhow!(
                "others can reach `{host}`, but there is no key\n\
                 hint: `--api-key-file FILE` or `{API_KEY}`, or `--no-auth` to answer everyone"
            )));
        }
        Ok(address)
    }

    /// The limits. The context is set when the base is known.
    fn limits(&self) -> Result<Limits> {
        for (name, value) in [
            ("--max-batch", self.max_batch),
            ("--context", self.context.unwrap_or(1)),
            ("--max-body-bytes", self.max_body_bytes),
            ("--request-timeout", self.request_timeout as usize),
        ] {
            if value == 0 {
                return Err(usage(anyhow!("`{name}` must be at least 1, got 0")));
            }
        }
        const MOST: usize = 1 << 20;
        for (name, value) in [("--max-batch", self.max_batch), ("--max-queue", self.max_queue)] {
            if value > MOST {
                return Err(usage(anyhow!("`{name}` must be at most {MOST}, got {value}")));
            }
        }
        // a century, so that it can be added to a time
        let secs = |secs: u64| Duration::from_secs(secs.min(100 * 365 * 86400));
        Ok(Limits {
            max_texts: self.max_batch,
            max_waiting: self.max_queue,
            max_body_bytes: self.max_body_bytes,
            request_time: secs(self.request_timeout),
            drain_time: secs(self.drain_timeout),
            ..Limits::default()
        })
    }
}

/// What clients are told of the model.
fn served(args: &ServeArgs, open: &mut OpenModel) -> Result<ServedModel> {
    let name = match &args.model_name {
        Some(name) if name.is_empty() => {
            return Err(usage(anyhow!("`--model-name` must not be empty")));
        }
        Some(name) => name.clone(),
        None => default_name(&args.model, open),
    };
    let trained = open.routing(None)?;
    let defaults = GenerationDefaults::of_base(&open.base)?;
    // gives the error of a base without a tokenizer
    open.base.tokenizer()?;
    let tokenizer = open.base.tokenizer.take().expect("there is one");
    Ok(ServedModel {
        name,
        tokenizer: Arc::new(tokenizer),
        template: open.base.chat_template.clone(),
        defaults,
        config: open.config.clone(),
        trained,
        num_experts: open.model.num_experts(),
        vocab_size: open.base.spec.vocab_size,
    })
}

/// The last part of the name of the run, the adapters or the base.
fn default_name(args: &ModelArgs, open: &OpenModel) -> String {
    let run = args.checkpoint.as_ref().and_then(|dir| {
        let dir = std::path::absolute(dir).ok()?;
        let is_step = dir.parent().is_some_and(|parent| parent.ends_with("checkpoints"));
        let run = if is_step { dir.parent()?.parent()?.to_owned() } else { dir };
        Some(run.display().to_string())
    });
    let name = run.or_else(|| args.adapters.clone()).unwrap_or_else(|| open.base.label.clone());
    let name = name.split('@').next().unwrap_or_default();
    let last = Path::new(name).file_name().map(|name| name.to_string_lossy().into_owned());
    last.unwrap_or_else(|| "dylora".to_owned())
}
