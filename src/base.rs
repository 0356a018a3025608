//! The base of a run: its shape, weights and tokenizer, from a folder, from the Hub, or random.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use tch::Kind;

use crate::chat_template::{self, ChatTemplate};
use crate::config::{BaseConfig, BaseSource, LossOnTurns};
use crate::data::{ChatOptions, Tokenizer};
use crate::durable::output;
use crate::hub::{self, BaseFiles, DownloadProgress, HubSettings, SideFile};
use crate::model::decoder::Decoder;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::families::{self, load};

/// The tokens that may end the documents of a random base. The first that its tokenizer has is
/// taken.
const END_OF_TEXT: [&str; 4] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>"];

/// What tells a base from others, as far as it is known.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BaseIdentity {
    /// BLAKE3 of the parameters in f32, as they were read.
    pub hash: Option<String>,
    /// What `config.json` says: [`families::settings`].
    pub settings: Option<Value>,
    /// BLAKE3 of the tokenizer's file.
    pub tokenizer: Option<String>,
}

/// A base whose files and shape are known. Its weights are read on demand.
///
/// ```
/// use dylora::base::Base;
/// use dylora::config::{BaseConfig, BaseSource};
/// use dylora::hub::HubSettings;
///
/// # fn main() -> anyhow::Result<()> {
/// let config = BaseConfig {
///     source: BaseSource::Path("demo/base".into()),
///     tokenizer: None,
///     chat_template: None,
///     dtype: Default::default(),
/// };
/// let base = Base::open(&config, &HubSettings::offline("cache"), &())?;
/// assert_eq!(base.spec.width, 128);
/// let weights = base.weights()?;
/// assert_eq!(weights.spec.vocab_size, base.spec.vocab_size);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Base {
    /// The base's name in messages and exports: a folder, `repo@revision` or `random`.
    pub label: String,
    /// Where the base comes from.
    pub source: BaseSource,
    /// The base's shape.
    pub spec: DecoderSpec,
    /// The tokenizer, if `base.tokenizer` is set or a `tokenizer.json` lies beside the weights.
    pub tokenizer: Option<Tokenizer>,
    /// The file that the tokenizer was read from.
    pub tokenizer_file: Option<PathBuf>,
    /// Small files that go with the base wherever it goes, such as the chat template. There are
    /// none but a chat template of the config's if the config names another tokenizer than the one
    /// beside the weights.
    pub beside: Vec<SideFile>,
    /// The chat templates: the config's, or those beside the tokenizer.
    pub chat_template: Option<Arc<ChatTemplate>>,
    files: Option<BaseFiles>,
}

impl Base {
    /// Finds the base's files and reads its shape and tokenizer.
    ///
    /// # Errors
    /// Those of [`hub::find_base`] and [`families::read_spec`], a file that is not the one that
    /// dylora wrote, a random base without a tokenizer,
    /// and a tokenizer with more tokens than the base has embeddings.
    pub fn open(
        config: &BaseConfig,
        hub: &HubSettings,
        progress: &dyn DownloadProgress,
    ) -> Result<Self> {
        let files = match &config.source {
            BaseSource::Random(_) => None,
            source => Some(hub::find_base(source, hub, progress)?),
        };
        let own = files.as_ref().and_then(|files| files.tokenizer.clone());
        let tokenizer_file = config.tokenizer.clone().or(own);
        let beside = files.iter().flat_map(|files| files.beside.iter().map(|file| &file.path));
        let shape_file = files.iter().map(|files| &files.config);
        check_sums(shape_file.chain(&tokenizer_file).chain(beside))?;
        let tokenizer = tokenizer_file.as_deref().map(Tokenizer::load).transpose()?;
        let (chat_template, beside) = chat_template(config, files.as_ref())?;
        let shape = match (&config.source, &files) {
            (BaseSource::Random(shape), _) => {
                let tokenizer = tokenizer.as_ref().context("random weights need a tokenizer")?;
                let vocab_size = tokenizer.vocab_size() as i64;
                let eos = END_OF_TEXT.into_iter().find_map(|token| tokenizer.token_to_id(token));
                families::from_random(shape, vocab_size, eos)?
            }
            (_, Some(files)) => families::read_spec(&files.config)?,
            (_, None) => unreachable!("only random weights have no files"),
        };
        if let (Some(tokenizer), Some(file)) = (&tokenizer, &tokenizer_file)
            && tokenizer.vocab_size() as i64 > shape.vocab_size
        {
            bail!(
                "`{}` has {} tokens, but the base embeds {}\nhint: they do not belong together",
                file.display(),
                tokenizer.vocab_size(),
                shape.vocab_size
            );
        }
        let label = files.as_ref().map_or("random".into(), |files| files.label.clone());
        let source = config.source.clone();
        let spec = shape;
        Ok(Self { label, source, spec, tokenizer, tokenizer_file, beside, chat_template, files })
    }

    /// The files that the base is read from. A random base has none but its tokenizer.
    pub fn input_files(&self) -> Vec<PathBuf> {
        let beside = self.beside.iter().map(|file| &file.path);
        let mut files: Vec<PathBuf> = self.tokenizer_file.iter().chain(beside).cloned().collect();
        if let Some(found) = &self.files {
            files.push(found.config.clone());
            files.extend(found.weights.iter().cloned());
        }
        files
    }

    /// BLAKE3 of the files that hold the shape and the weights. A random base has none.
    pub(crate) fn files_hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for file in self.files.iter().flat_map(|files| files.weights.iter().chain([&files.config]))
        {
            hasher.update_reader(fs_err::File::open(file)?)?;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Reads the weights, in the dtypes of their files, or draws those of a random base from
    /// libtorch's default generator, in f32. They are on the CPU.
    pub fn weights(&self) -> Result<Decoder> {
        match &self.files {
            None => Ok(Decoder::random(self.spec.clone())),
            Some(files) => check_sums(&files.weights)
                .and_then(|()| load::read(&self.spec, &files.weights, None))
                .with_context(|| format!("cannot load the base `{}`", self.label)),
        }
    }

    /// Reads the weights and checks that this is the expected base. What is not known of that is
    /// not checked. Another tokenizer leads to a warning.
    ///
    /// - `of`: the end of the sentence "the base is not the one that .."
    ///
    /// # Errors
    /// Those of [`Base::weights`], other settings, and weights with another hash.
    pub fn weights_of(&self, expected: &BaseIdentity, of: &str) -> Result<Decoder> {
        let own = families::settings(&self.spec);
        let known = expected.settings.as_ref().and_then(Value::as_object);
        let differing = known
            .into_iter()
            .flatten()
            .find(|(key, value)| own.get(key.as_str()).is_some_and(|own| own != *value));
        if let Some((key, value)) = differing {
            bail!(
                "the base `{}` is not the one that {of}: its `config.json` has `{key}` {}, not \
                 {value}",
                self.label,
                own[key]
            );
        }
        if let (Some(known), Some(own)) = (&expected.tokenizer, self.tokenizer_hash())
            && *known != own
        {
            tracing::warn!(
                "the tokenizer of the base `{}` is not the one that {of}, so that its tokens may \
                 mean something else",
                self.label
            );
        }
        let weights = self.weights()?;
        let Some(expected) = &expected.hash else { return Ok(weights) };
        let found = weights.hash_in(Kind::Float)?;
        if found != *expected {
            bail!(
                "the base `{}` is not the one that {of}: BLAKE3 of its weights `{}..`, not `{}..`\n\
                 hint: `--base DIR` names another base",
                self.label,
                &found[..12],
                &expected[..expected.len().min(12)]
            );
        }
        Ok(weights)
    }

    /// BLAKE3 of the tokenizer's file, if there is a tokenizer.
    pub fn tokenizer_hash(&self) -> Option<String> {
        Some(self.tokenizer.as_ref()?.hash().to_hex().to_string())
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// A base without a tokenizer.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            anyhow!("`{}` has no `tokenizer.json`\nhint: set `base.tokenizer`", self.label)
        })
    }

    /// The base's repository on the Hub: its source, or what its folder says. That is the
    /// `_name_or_path` of its `config.json`, or its place in the Hub's cache.
    pub fn repo(&self) -> Option<String> {
        if let BaseSource::Hub(source) = &self.source {
            return Some(source.repo.clone());
        }
        let config = &self.files.as_ref()?.config;
        let text = fs_err::read_to_string(config).ok()?;
        let json: Value = serde_json::from_str(&text).ok()?;
        let known = json["_name_or_path"].as_str().filter(|name| hub::is_repo(name));
        let cached = || {
            let mut parts = config.iter().filter_map(|part| part.to_str());
            let name = parts.find_map(|part| part.strip_prefix("models--"))?;
            Some(name.replace("--", "/")).filter(|name| hub::is_repo(name))
        };
        known.map(str::to_owned).or_else(cached)
    }

    /// The base's name for others, which is no path of this machine.
    pub fn name(&self) -> String {
        match &self.source {
            BaseSource::Path(_) => self.repo().unwrap_or_else(|| "a local model".into()),
            _ => self.label.clone(),
        }
    }

    /// The licence beside the base as the Hub names it: `other` if it is none of the common ones,
    /// and `None` if there is none.
    pub fn licence(&self) -> Option<String> {
        let file = self.beside.iter().find(|file| file.name.starts_with("LICENSE"))?;
        let text = fs_err::read_to_string(&file.path).ok()?;
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let known = [
            ("Apache License Version 2.0", "apache-2.0"),
            ("Permission is hereby granted, free of charge, to any person", "mit"),
        ];
        let found = known.into_iter().find(|(words_of, _)| words.contains(words_of));
        Some(found.map_or("other", |(_, name)| name).to_owned())
    }

    /// How this base turns records with `messages` into text.
    ///
    /// - `turns`: the turns of the assistant that are learned
    pub fn chat_options(&self, turns: LossOnTurns) -> ChatOptions {
        ChatOptions { template: self.chat_template.clone(), base: self.label.clone(), turns }
    }

    /// Checks that the base has enough positions for blocks of `seq_len` tokens.
    pub fn check_seq_len(&self, seq_len: usize) -> Result<()> {
        if seq_len as i64 > self.spec.max_positions {
            bail!(
                "`data.seq_len` must be at most the base's {} positions, got {seq_len}",
                self.spec.max_positions
            );
        }
        Ok(())
    }
}

/// Checks the files of a base that dylora wrote, such as a merged model, against their sums.
fn check_sums<'a>(files: impl IntoIterator<Item = &'a PathBuf>) -> Result<()> {
    files.into_iter().try_for_each(|file| output::check_sum(file))
}

/// A base's chat templates, and the small files that go with the base.
fn chat_template(
    config: &BaseConfig,
    files: Option<&BaseFiles>,
) -> Result<(Option<Arc<ChatTemplate>>, Vec<SideFile>)> {
    // a tokenizer's special tokens and templates lie beside it
    let (found, mut beside) = match (&config.tokenizer, files) {
        (None, Some(files)) => (files.beside.clone(), files.beside.clone()),
        (Some(tokenizer), _) => {
            let dir = tokenizer.parent().filter(|dir| !dir.as_os_str().is_empty());
            (hub::side_files(dir.unwrap_or(Path::new(".")))?, vec![])
        }
        (None, None) => (vec![], vec![]),
    };
    let template = match &config.chat_template {
        None => ChatTemplate::find(&found)?,
        Some(path) => {
            beside.retain(|file| !ChatTemplate::is_template(&file.name));
            beside.push(SideFile { name: chat_template::FILE.into(), path: path.clone() });
            Some(ChatTemplate::load(path, &found)?)
        }
    };
    Ok((template.map(Arc::new), beside))
}
