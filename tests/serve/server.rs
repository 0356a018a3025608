//! A server in this process, with a mixture of random experts on the demo base, and the texts that
//! it should send.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Result, anyhow};
use dylora::base::Base;
use dylora::config::{BaseConfig, BaseSource, Config, Dtype, RoutingChoice, load};
use dylora::generate::{
    Engine, EngineLimits, GenerationDefaults, NewToken, Request, Route, Sampling, TextStream,
    prompt,
};
use dylora::hub::HubSettings;
use dylora::model::RoutedModel;
use dylora::serve::{Keys, Limits, ServedModel, Server};
use tch::Kind;

use crate::client::Client;
use crate::common::{new_model, plain_router, randomize, seed, tiny_lora};

/// The name of the mixture.
pub const NAME: &str = "mix";

/// A template of chats.
const TEMPLATE: &str = "{% for message in messages %}{% if message.role == 'robot' %}\
    {{ raise_exception('there are no robots') }}{% endif %}{{ message.role }}: \
    {{ message.content }}\n{% endfor %}{{ mood }}{% if add_generation_prompt %}assistant:{% endif %}";

/// Two domains have an expert of their own; the third expert has none.
const CONFIG: &str = r#"
base.source.path = "demo/base"
data.seq_len = 64
lora.num_experts = 3
data.domains = [
  { name = "code", train = ["code.jsonl"], expert = 1 },
  { name = "verse", train = ["verse.jsonl"], expert = 0 },
]
"#;

/// How a test's server differs from others.
pub struct Settings {
    pub name: String,
    pub limits: Limits,
    pub keys: Keys,
    pub has_template: bool,
    pub trained: RoutingChoice,
    /// The tokens that end a text; `None` for those of the base.
    pub end_tokens: Option<Vec<i64>>,
}

impl Default for Settings {
    fn default() -> Self {
        let limits = Limits { max_texts: 8, context: 64, ..Limits::default() };
        let trained = RoutingChoice::Router;
        Self {
            name: NAME.into(),
            limits,
            keys: Keys::OPEN,
            has_template: true,
            trained,
            end_tokens: None,
        }
    }
}

/// A server that runs until it is dropped.
pub struct TestServer {
    pub client: Client,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl TestServer {
    pub fn start(settings: Settings) -> Result<Self> {
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::bind(local, settings.keys.clone(), settings.limits)?;
        let client = Client::new(server.address()?);
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = thread::spawn(move || {
            let (mut base, model) = mixture(settings.has_template)?;
            let engine = server.engine(&model)?;
            let served = served(&mut base, &settings)?;
            server.run(engine, served, &flag)
        });
        let server = Self { client, stop, thread: Some(thread) };
        // the connection waits until the server runs
        server.client.get("/health")?;
        Ok(server)
    }

    /// Asks the server to end, as a signal does.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for the end.
    pub fn join(mut self) -> Result<()> {
        self.stop();
        let thread = self.thread.take().expect("it is joined once");
        thread.join().map_err(|_| anyhow!("the server panicked"))?
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !thread::panicking() {
                ended.expect("the server does not panic").expect("the server does not fail");
            }
        }
    }
}

fn config() -> Result<Config> {
    load::parse(CONFIG, &[])
}

fn served(base: &mut Base, settings: &Settings) -> Result<ServedModel> {
    let mut defaults = GenerationDefaults::of_base(base)?;
    if let Some(end_tokens) = &settings.end_tokens {
        defaults.end_tokens.clone_from(end_tokens);
    }
    Ok(ServedModel {
        name: settings.name.clone(),
        tokenizer: Arc::new(base.tokenizer.take().expect("the demo has a tokenizer")),
        template: base.chat_template.clone(),
        defaults,
        config: Some(config()?),
        trained: settings.trained,
        num_experts: 3,
        vocab_size: base.spec.vocab_size,
    })
}

/// The demo base and a mixture of three random experts on it, always the same.
pub fn mixture(has_template: bool) -> Result<(Base, RoutedModel)> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("chat.jinja");
    fs_err::write(&file, TEMPLATE)?;
    let config = BaseConfig {
        source: BaseSource::Path(PathBuf::from("demo/base")),
        tokenizer: None,
        chat_template: has_template.then_some(file),
        dtype: Dtype::F32,
    };
    let hub = HubSettings::new("http://127.0.0.1:1", folder.path());
    let base = Base::open(&config, &hub, &())?;
    let _guard = seed(7);
    let weights = base.weights()?;
    let model = new_model(&weights, &tiny_lora(), &plain_router(), Kind::Float);
    randomize(&model)?;
    Ok((base, model))
}

/// What a text should be.
pub struct Expected {
    pub text: String,
    pub tokens: Vec<NewToken>,
}

/// The engine's own texts, one after the other.
pub struct Reference {
    base: Base,
    model: RoutedModel,
}

impl Reference {
    pub fn new() -> Result<Self> {
        let (base, model) = mixture(false)?;
        Ok(Self { base, model })
    }

    pub fn prompt_ids(&self, text: &str) -> Result<Vec<i64>> {
        prompt::text_ids(self.base.tokenizer()?, text)
    }

    /// The text of `num` tokens behind a prompt.
    pub fn text(
        &self,
        prompt: &[i64],
        num: usize,
        key: u64,
        sampling: Sampling,
        route: Route,
    ) -> Result<Expected> {
        let limits = EngineLimits { max_texts: 1, context: 64 };
        let mut engine = Engine::new(&self.model, limits)?;
        engine.add(Request {
            key,
            prompt: prompt.to_vec(),
            max_new_tokens: num,
            sampling,
            route,
            end_tokens: GenerationDefaults::of_base(&self.base)?.end_tokens.into(),
            num_alternatives: 3,
            wants_weights: true,
        })?;
        let mut stream = TextStream::new(self.base.tokenizer()?, prompt, vec![]);
        let mut tokens = vec![];
        while !engine.is_idle() {
            for event in engine.step() {
                stream.push(event.token.id)?;
                tokens.push(event.token);
            }
        }
        stream.finish()?;
        Ok(Expected { text: stream.text().to_owned(), tokens })
    }

    /// The most probable continuation by the router.
    pub fn greedy(&self, prompt: &str, num: usize) -> Result<Expected> {
        let ids = self.prompt_ids(prompt)?;
        self.text(&ids, num, 0, Sampling::GREEDY, Route::Router)
    }

    /// The text of single tokens.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        self.base.tokenizer()?.decode(&ids)
    }
}
