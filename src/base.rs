//! The base as a run needs it: weights, shape, tokenizer and end-of-text token, from a folder, the
//! Hub or a random start.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use tch::Kind;

use crate::config::{BaseConfig, BaseSource};
use crate::data::Tokenizer;
use crate::hub::{self, BaseFiles, DownloadProgress, HubSettings};
use crate::model::decoder::Decoder;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::families::{gpt2, load};

/// GPT-2's end-of-text token, by which a random base's documents end.
const END_OF_TEXT: &str = "<|endoftext|>";

/// A base whose files are found and whose shape is known; its weights are read on demand.
#[derive(Debug)]
pub struct Base {
    /// How it is named to people and in exports: a folder, `repo@revision` or `random`.
    pub label: String,
    /// Where it comes from.
    pub source: BaseSource,
    /// Its shape.
    pub spec: DecoderSpec,
    /// The tokenizer, if there is a `tokenizer.json`.
    pub tokenizer: Option<Tokenizer>,
    /// Where the tokenizer was read from.
    pub tokenizer_file: Option<PathBuf>,
    files: Option<BaseFiles>,
}

impl Base {
    /// Finds the base's files, reads its shape and its tokenizer.
    ///
    /// # Errors
    /// What [`hub::find_base`] and [`DecoderSpec::read`] say, and a tokenizer with more tokens than the
    /// base has embeddings.
    pub fn open(
        config: &BaseConfig,
        hub: &HubSettings,
        progress: &dyn DownloadProgress,
    ) -> Result<Self> {
        let files = match &config.source {
            BaseSource::Random(_) => None,
            source => Some(hub::find_base(source, hub, progress)?),
        };
        let beside = files.as_ref().and_then(|files| files.tokenizer.clone());
        let tokenizer_file = config.tokenizer.clone().or(beside);
        let tokenizer = tokenizer_file.as_deref().map(Tokenizer::load).transpose()?;
        let shape = match (&config.source, &files) {
            (BaseSource::Random(shape), _) => {
                let tokenizer = tokenizer.as_ref().context("random weights need a tokenizer")?;
                let vocab_size = tokenizer.vocab_size() as i64;
                DecoderSpec::from_random(shape, vocab_size, tokenizer.token_to_id(END_OF_TEXT))
            }
            (_, Some(files)) => gpt2::read_spec(&files.config)?,
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
        Ok(Self { label, source, spec: shape, tokenizer, tokenizer_file, files })
    }

    /// The files that it is read from; none of a random base but its tokenizer.
    pub fn input_files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.tokenizer_file.iter().cloned().collect();
        if let Some(found) = &self.files {
            files.push(found.config.clone());
            files.extend(found.weights.iter().cloned());
        }
        files
    }

    /// Reads the weights, or draws them from libtorch's default generator; f32 on the CPU.
    pub fn weights(&self) -> Result<Decoder> {
        match &self.files {
            None => Ok(Decoder::random(self.spec.clone())),
            Some(files) => load::read(&self.spec, &files.weights, Kind::Float)
                .with_context(|| format!("cannot load the base `{}`", self.label)),
        }
    }

    /// Reads the weights, which must be those that `expected`, if it is known, is the BLAKE3 of in f32; `of`
    /// ends "that ..".
    pub fn weights_of(&self, expected: Option<&str>, of: &str) -> Result<Decoder> {
        let weights = self.weights()?;
        let Some(expected) = expected else { return Ok(weights) };
        let found = weights.hash()?;
        if found != expected {
            bail!(
                "the base `{}` is not the one that {of}: BLAKE3 `{}..`, not `{}..`",
                self.label,
                &found[..12],
                &expected[..expected.len().min(12)]
            );
        }
        Ok(weights)
    }

    /// The tokenizer, which most work needs.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            anyhow!("`{}` has no `tokenizer.json`\nhint: set `base.tokenizer`", self.label)
        })
    }

    /// Checks that the base has positions for blocks of `seq_len`.
    pub fn check_seq_len(&self, seq_len: usize) -> Result<()> {
        if seq_len as i64 > self.spec.n_positions {
            bail!(
                "`data.seq_len` must be at most the base's {} positions, got {seq_len}",
                self.spec.n_positions
            );
        }
        Ok(())
    }
}
