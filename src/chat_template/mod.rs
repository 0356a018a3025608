//! Chat templates: a base's own Jinja templates turn conversations into text.
//!
//! [`ChatTemplate`] finds the templates of a base as transformers does (`source`), renders them in
//! the same environment (`environment`), and says what of the text the assistant wrote: by the
//! template's `{% generation %}` blocks (`generation`), or by rendering the beginnings of the
//! conversation (`turns`).
//!
//! A rendered text contains all special tokens, also the one at its start. It is therefore encoded
//! without those that the tokenizer's post-processor adds.

mod environment;
mod generation;
mod json;
mod source;
mod syntax;
mod turns;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Error, Result, anyhow, bail};
use jiff::civil::{DateTime, date};
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value as Jinja};
use serde_json::{Map, Value};

use self::environment::{Refusal, strftime_now};
pub use self::source::TEMPLATE as FILE;
use self::source::{DEFAULT, File, MORE_TEMPLATES, Source, Template};
pub use self::turns::AssistantTurns;
use crate::hub::SideFile;

/// The template that transformers takes if the conversation has tools.
const WITH_TOOLS: &str = "tool_use";

/// What a template turns into text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// The messages. Each has a `role` and, as a rule, a `content`; templates know more keys, such
    /// as `tool_calls`.
    pub messages: Vec<Map<String, Value>>,
    /// The tools that the assistant may call, as JSON schemas.
    pub tools: Option<Vec<Value>>,
    /// Further variables of the template, such as `enable_thinking`. They override special tokens.
    pub variables: Map<String, Value>,
    /// What time it is for the template's `strftime_now`. Without it, it is 26 July 2024, 0:00, the
    /// date that Llama 3's templates have where there is no clock, so that the text does not depend
    /// on when it is rendered.
    pub now: Option<DateTime>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// What stands in the template's `{% generation %}` blocks, as ranges of bytes of the text, in
    /// ascending order. A template without such blocks has none.
    pub generated: Vec<Range<usize>>,
}

/// The chat templates of a base. They are parsed when they are first needed, so that a template
/// that cannot be parsed disturbs only who uses it.
pub struct ChatTemplate {
    source: Source,
    hash: blake3::Hash,
    parsed: OnceLock<Result<Parsed, String>>,
}

/// The parsed templates and what they share.
struct Parsed {
    environment: Environment<'static>,
    templates: BTreeMap<String, Template>,
    /// Whether the template of a name has `{% generation %}` blocks.
    marks: BTreeMap<String, bool>,
    special_tokens: BTreeMap<String, String>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("hash", &self.hash).finish_non_exhaustive()
    }
}

impl PartialEq for ChatTemplate {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

impl ChatTemplate {
    /// Finds the templates among the `files` beside a base's tokenizer; `None` if there are none.
    ///
    /// # Errors
    /// A file that cannot be read. Faults in its content are reported by [`Self::check`].
    pub fn find(files: &[SideFile]) -> Result<Option<Self>> {
        let source = Source::read(files)?;
        Ok(source.has_template().then(|| Self::new(source)))
    }

    /// Reads the template in a file. Its special tokens are those of the `files` beside a base's
    /// tokenizer.
    ///
    /// # Errors
    /// A file that cannot be read, and those of [`Self::check`].
    pub fn load(path: &Path, files: &[SideFile]) -> Result<Self> {
        let mut source = Source::read(files)?;
        let file = File::read(path).context("cannot read the chat template")?;
        source.jinja = BTreeMap::from([(DEFAULT.to_owned(), file)]);
        let template = Self::new(source);
        template.check()?;
        Ok(template)
    }

    fn new(source: Source) -> Self {
        let mut hasher = blake3::Hasher::new();
        let files = source.jinja.iter().map(|(name, file)| (name.as_str(), file));
        let configs = [&source.tokenizer_config, &source.special_tokens];
        for (name, file) in files.chain(configs.into_iter().flatten().map(|file| ("", file))) {
            for bytes in [name.as_bytes(), &file.bytes] {
                hasher.update(&(bytes.len() as u64).to_le_bytes());
                hasher.update(bytes);
            }
        }
        Self { source, hash: hasher.finalize(), parsed: OnceLock::new() }
    }

    /// Whether a file beside a base's weights is a chat template.
    pub(crate) fn is_template(name: &str) -> bool {
        name == FILE || name.starts_with(MORE_TEMPLATES)
    }

    /// The texts of the templates by their names. The usual one is `default`.
    ///
    /// # Errors
    /// A fault in `tokenizer_config.json`.
    pub fn texts(&self) -> Result<BTreeMap<String, String>> {
        let templates = self.source.templates()?.into_iter();
        Ok(templates.map(|(name, template)| (name, template.text)).collect())
    }

    /// A hash of the files that templates and special tokens are read from.
    pub fn hash(&self) -> blake3::Hash {
        self.hash
    }

    /// Parses the templates.
    ///
    /// # Errors
    /// A template that cannot be parsed (the error names its file and line), and a fault in
    /// `tokenizer_config.json`.
    pub fn check(&self) -> Result<()> {
        self.parsed().map(|_| ())
    }

    fn parsed(&self) -> Result<&Parsed> {
        let parse = || Parsed::new(&self.source).map_err(|error| format!("{error:#}"));
        self.parsed.get_or_init(parse).as_ref().map_err(|fault| anyhow!("{fault}"))
    }

    /// Renders a conversation.
    ///
    /// - `add_generation_prompt`: whether the text ends with what begins the assistant's next turn
    ///
    /// # Errors
    /// Those of [`Self::check`], and a template that cannot render the conversation. The error
    /// names the template's file and line.
    pub fn render(
        &self,
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<Rendered> {
        let renderer = Renderer::new(self.parsed()?, conversation)?;
        renderer.render(&renderer.messages, add_generation_prompt)
    }
}

impl Parsed {
    fn new(source: &Source) -> Result<Self> {
        let mut environment = environment::environment();
        let templates = source.templates()?;
        let mut marks = BTreeMap::new();
        for (name, template) in &templates {
            // as Jinja reads a template
            let text = template.text.replace("\r\n", "\n").replace('\r', "\n");
            let text = syntax::with_known_escapes(&text);
            let rewritten = generation::rewrite(&text);
            marks.insert(name.clone(), rewritten.is_some());
            let text = rewritten.unwrap_or(text);
            let added = environment.add_template_owned(name.clone(), text);
            added.map_err(|error| {
                let place = template.place(error.line());
                anyhow!("{place} is not a chat template: {}", fault(&error))
            })?;
        }
        let special_tokens = source.special_tokens()?;
        Ok(Self { environment, templates, marks, special_tokens })
    }

    /// The name of the template for a conversation.
    fn choose(&self, conversation: &Conversation) -> Result<&str> {
        let with_tools = conversation.tools.as_ref().map(|_| WITH_TOOLS);
        let names = with_tools.into_iter().chain([DEFAULT]);
        if let Some(name) = names.into_iter().find(|name| self.templates.contains_key(*name)) {
            return Ok(name);
        }
        let names: Vec<_> = self.templates.keys().map(|name| format!("`{name}`")).collect();
        bail!("none of the chat templates {} is called `{DEFAULT}`", names.join(", "));
    }
}

/// What minijinja says about a fault, without the place, which it does not know.
fn fault(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Renders a conversation, or parts of it, with one template.
struct Renderer<'a> {
    template: minijinja::Template<'a, 'a>,
    source: &'a Template,
    has_marks: bool,
    /// The variables other than those that differ between the parts of a conversation.
    variables: BTreeMap<String, Jinja>,
    conversation: &'a Conversation,
    messages: Vec<Jinja>,
}

impl<'a> Renderer<'a> {
    fn new(parsed: &'a Parsed, conversation: &'a Conversation) -> Result<Self> {
        let name = parsed.choose(conversation)?;
        let template = parsed.environment.get_template(name).expect("its templates were added");
        let tokens = parsed.special_tokens.iter();
        let mut variables: BTreeMap<String, Jinja> =
            tokens.map(|(name, token)| (name.clone(), Jinja::from(token.as_str()))).collect();
        // transformers passes these two in any case
        variables.insert("documents".into(), Jinja::from(()));
        for (name, value) in &conversation.variables {
            variables.insert(name.clone(), Jinja::from(Serde(value)));
        }
        variables.insert("tools".into(), Jinja::from(Serde(&conversation.tools)));
        let now = conversation.now.unwrap_or_else(|| date(2024, 7, 26).at(0, 0, 0, 0));
        variables.insert("strftime_now".into(), strftime_now(now));
        let messages = conversation.messages.iter().map(|message| Jinja::from(Serde(message)));
        let messages = messages.collect();
        let (source, has_marks) = (&parsed.templates[name], parsed.marks[name]);
        Ok(Self { template, source, has_marks, variables, conversation, messages })
    }

    /// Renders some messages with the conversation's tools and variables.
    fn render(&self, messages: &[Jinja], add_generation_prompt: bool) -> Result<Rendered> {
        let mut context = self.variables.clone();
        context.insert("messages".into(), messages.iter().cloned().collect());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let context = Jinja::from_pairs(context);
        let text = self.template.render(context).map_err(|error| self.explain(&error))?;
        if !self.has_marks {
            return Ok(Rendered { text, generated: vec![] });
        }
        let cut = generation::cut_out(&text);
        let (text, generated) =
            cut.map_err(|fault| anyhow!("{}: {fault}", self.source.place(None)))?;
        Ok(Rendered { text, generated })
    }

    /// The error of a rendering, with its place in the template's file.
    fn explain(&self, error: &minijinja::Error) -> Error {
        let place = self.source.place(error.line());
        let refusal = std::error::Error::source(error).and_then(|source| source.downcast_ref());
        match refusal {
            Some(Refusal(message)) => {
                anyhow!("the chat template refuses the conversation: {message} ({place})")
            }
            None if error.kind() == ErrorKind::UndefinedError => {
                anyhow!(
                    "the chat template needs what the conversation lacks: {} ({place})",
                    fault(error)
                )
            }
            None => anyhow!(
                "the chat template cannot render the conversation: {} ({place})",
                fault(error)
            ),
        }
    }
}
