//! Files of every format and records of every shape, through the public interface.

mod config;
mod golden;
mod preview;
mod refusals;
mod shapes;

use std::path::{Path, PathBuf};

use anyhow::Result;
use dylora::config::{
    FieldNames, LossOn, Mixing, OnBadRecord, OnExhausted, RecordConfig, RecordShape, RecordStyle,
};
use dylora::data::{
    Answered, ChatOptions, DataOptions, DomainFiles, TokenDataset, Tokenizer, load_files,
};
use dylora::hub::SideFile;

const EOS: &str = "<|endoftext|>";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A byte-level tokenizer, which decodes to any text.
fn tokenizer() -> Tokenizer {
    Tokenizer::load(&golden("tokenizers/smollm.tokenizer.json")).expect("it is valid")
}

/// The options with the template of SmolLM2, under which `seq_len` cuts nothing.
fn options() -> DataOptions {
    let path = golden("chat/smollm2.jinja");
    let file = SideFile { name: "chat_template.jinja".into(), path };
    let template = dylora::chat_template::ChatTemplate::find(&[file]).expect("it can be read");
    DataOptions {
        seq_len: 1 << 16,
        loss_on: LossOn::Completion,
        chat: ChatOptions { template: template.map(Into::into), ..ChatOptions::default() },
        on_bad_record: OnBadRecord::Fail,
        seed: 0,
        eos_token_id: tokenizer().token_to_id(EOS),
        mixing: Mixing::default(),
        on_exhausted: OnExhausted::default(),
        cache_dir: None,
    }
}

/// A temporary folder of files.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (name, content) in files {
            fs_err::write(dir.path().join(name), content).expect("a temporary file");
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The message of the error for a file, with `DIR` in place of the folder.
    fn fault(&self, name: &str, records: &RecordConfig) -> String {
        let error = load(&self.path(name), records).expect_err("a faulty file");
        format!("{error:#}").replace(&format!("{}/", self.0.path().display()), "DIR/")
    }
}

fn load(path: &Path, records: &RecordConfig) -> Result<TokenDataset> {
    load_with(path, records, &options())
}

fn load_with(path: &Path, records: &RecordConfig, options: &DataOptions) -> Result<TokenDataset> {
    let source = DomainFiles {
        name: Some("x".into()),
        files: vec![path.display().to_string()],
        record_domain: None,
        records: records.clone(),
    };
    load_files(&[source], options, &tokenizer(), &|_| ())
}

/// The prompt and the completion of each document, without the end token.
fn pairs(dataset: &TokenDataset) -> Vec<[String; 2]> {
    let tokenizer = tokenizer();
    let decode = |ids: &[i64]| {
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        tokenizer.decode(&ids).expect("they are its own ids")
    };
    let pair = |Answered { prompt, reference, .. }: Answered| {
        let completion = decode(&reference);
        let completion = completion.strip_suffix(EOS).unwrap_or(&completion);
        [decode(&prompt), completion.to_owned()]
    };
    dataset.answered(0, usize::MAX).into_iter().map(pair).collect()
}

fn fields(text: &str) -> RecordConfig {
    let fields: FieldNames = text.parse().expect("names");
    RecordConfig { fields, ..RecordConfig::default() }
}

fn shape(shape: RecordShape) -> RecordConfig {
    RecordConfig { shape: Some(shape), ..RecordConfig::default() }
}

fn chat() -> RecordConfig {
    RecordConfig { style: RecordStyle::Chat, ..RecordConfig::default() }
}
