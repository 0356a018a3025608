//! From text files to batches: source -> tokens -> documents of a domain -> blocks -> batches.
//!
//! 1. `source`, `format`: patterns are expanded into files, whose names and first bytes say what
//!    they hold. `records` reads records of any format, by `json`, `table` and `parquet`. `keys`
//!    and `record` turn their values, of any shape, into a text, a prompt and a completion, or a
//!    conversation, which may name its domain and its expert. `detect` and `kinds` say what was
//!    found.
//! 2. `tokenize`, `chat`, `documents`, `read`: records become documents. A document is a list of
//!    tokens with an end token and the length of its prompt; a conversation's says which tokens are
//!    learned instead. `cache` stores the documents of a file under a hash of the file's content.
//! 3. `select`: documents are assigned to domains. Some are held out for validation, and documents
//!    that are in a validation set are left out of training.
//! 4. `pack`: documents are cut into pieces of at most `seq_len` positions, which are packed into
//!    blocks. A block holds documents of one domain. The inputs and targets of a document of n
//!    tokens are `tokens[..n - 1]` and `tokens[1..]`. Positions start at 0 in each piece, and no
//!    piece attends to another. A block may hold documents of different experts: each position has
//!    the expert of its document.
//! 5. `order`, `dataset`: an epoch is an order of blocks that depends on the seed and the epoch. At
//!    any point of it, each domain has had about the share that `data.mixing` gives it. A batch has
//!    one block per row.
//!
//! `preview` and `visible` show data to people.
//!
//! All of this is deterministic: the same files and options give the same batches on any machine.

mod answers;
mod cache;
mod chat;
mod cut;
mod dataset;
mod detect;
mod documents;
mod format;
mod json;
mod keys;
mod kinds;
mod order;
mod pack;
mod pairs;
mod parallel;
mod parquet;
mod preview;
mod read;
mod record;
mod records;
mod select;
mod source;
mod table;
mod token_file;
mod tokenize;
mod visible;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

pub use self::answers::Answered;
pub use self::chat::ChatOptions;
pub use self::cut::SPLIT_PATTERNS;
pub use self::dataset::{
    Batch, Domain, IGNORED_LABEL, MemoryDocument, MemoryDomain, PADDING_DOCUMENT, RecordExperts,
    TokenDataset,
};
pub use self::detect::{Detected, detect};
pub use self::kinds::RecordKind;
pub use self::order::BlockId;
pub use self::preview::{Example, ExamplePart, Lengths};
pub use self::read::LoadProgress;
pub use self::tokenize::Tokenizer;
pub use self::visible::{count, visible};

use self::dataset::Selection;
use self::select::Selector;
use self::source::SourceFiles;
use self::token_file::TokenFile;
use crate::config::{
    DataConfig, DomainConfig, LossOn, Mixing, OnBadRecord, OnExhausted, RecordConfig, Validation,
};

/// The largest `seq_len`. It is as far as the context of any base reaches, and only keeps a typing
/// error from exhausting the memory.
const MAX_SEQ_LEN: usize = 1 << 20;

/// How files are turned into blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct DataOptions {
    /// Number of positions in a block, at least 1.
    pub seq_len: usize,
    /// Which targets the loss counts.
    pub loss_on: LossOn,
    /// How records with `messages` become text.
    pub chat: ChatOptions,
    /// What happens when a record is malformed.
    pub on_bad_record: OnBadRecord,
    /// The seed that chooses the documents held out by a `validation.fraction`.
    pub seed: u64,
    /// The token that ends each document but a conversation. With `None`, documents get no end
    /// token.
    pub eos_token_id: Option<u32>,
    /// What share of the training blocks each domain gets.
    pub mixing: Mixing,
    /// What happens when all blocks of a domain have been used before the epoch ends.
    pub on_exhausted: OnExhausted,
    /// The folder in which tokens are cached; with `None`, they are not cached. Any number of runs
    /// and processes can share the folder, and it can be deleted at any time.
    pub cache_dir: Option<PathBuf>,
}

impl DataOptions {
    /// The options of a config's `[data]`, without a chat template.
    pub fn new(
        config: &DataConfig,
        seed: u64,
        eos_token_id: Option<u32>,
        cache_dir: Option<PathBuf>,
    ) -> Self {
        let DataConfig { seq_len, loss_on, on_bad_record, mixing, on_exhausted, .. } = *config;
        Self {
            seq_len,
            loss_on,
            chat: ChatOptions { turns: config.loss_on_turns, ..ChatOptions::default() },
            on_bad_record,
            seed,
            eos_token_id,
            mixing,
            on_exhausted,
            cache_dir,
        }
    }

    /// A hash of the tokenizer and the end token.
    fn encoding(&self, tokenizer: &Tokenizer) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(tokenizer.hash().as_bytes());
        hasher.update(&self.eos_token_id.map_or(-1, i64::from).to_le_bytes());
        hasher.finalize()
    }
}

/// A run's training and validation data.
#[derive(Debug)]
pub struct Datasets {
    /// All domains, in the config's order.
    pub train: TokenDataset,
    /// The domains that have a `validation`, in the config's order. There may be none.
    pub validation: TokenDataset,
}

/// A run's training data and two halves of its validation data, so that choices can be made on one
/// half and the result be measured on the other.
#[derive(Debug)]
pub struct HalvedDatasets {
    /// As [`Datasets::train`]. No document of either half is in it.
    pub train: TokenDataset,
    /// The half to choose by, such as a learning rate.
    pub selection: TokenDataset,
    /// The half to report.
    pub report: TokenDataset,
}

impl HalvedDatasets {
    /// A hash over the [fingerprints](TokenDataset::fingerprint) of all three.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for dataset in [&self.train, &self.selection, &self.report] {
            hasher.update(dataset.fingerprint().as_bytes());
        }
        hasher.finalize().to_string()
    }
}

/// Files to evaluate on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DomainFiles {
    /// The domain that the documents belong to. With `None`, each document belongs to the domain
    /// that its record's `domain` field names; without that field, to a domain named like the file,
    /// without folder and suffixes.
    pub name: Option<String>,
    /// Paths or globs.
    pub files: Vec<String>,
    /// If given, only records with this value in their `domain` field are used.
    pub record_domain: Option<String>,
    /// What the files' records are.
    pub records: RecordConfig,
}

/// Loads the training and validation data of `domains`.
///
/// - `domains`: their data sets of the Hub have been fetched
/// - `progress`: called on this thread while files are read
///
/// # Errors
/// If a pattern matches no file; if a file does not hold what its name says; if a record is
/// malformed (the error names its file and line); if a domain has nothing to train or validate on;
/// or if a `validation.fraction` leaves one side empty.
pub fn load_datasets(
    domains: &[DomainConfig],
    options: &DataOptions,
    tokenizer: &Tokenizer,
    progress: &dyn Fn(LoadProgress),
) -> Result<Datasets> {
    let (selected, packer) = select_documents(domains, options, tokenizer, progress)?;
    let Selected { train, validation } = selected;
    Ok(Datasets {
        train: packer.pack_training(train)?,
        validation: packer.pack(validation, "validate on")?,
    })
}

/// Loads the training data of `domains` and their validation data in two halves. Which half a
/// document is in depends only on its text, so that added data moves no document to the other.
///
/// # Errors
/// As for [`load_datasets`], and if all documents of a domain fall into the same half.
pub fn load_halves(
    domains: &[DomainConfig],
    options: &DataOptions,
    tokenizer: &Tokenizer,
    progress: &dyn Fn(LoadProgress),
) -> Result<HalvedDatasets> {
    let (selected, packer) = select_documents(domains, options, tokenizer, progress)?;
    let Selected { train, validation } = selected;
    let (mut selection, mut report) = (Vec::new(), Vec::new());
    for domain in validation {
        let [first, second] = packer.selector().halve(domain)?;
        selection.push(first);
        report.push(second);
    }
    Ok(HalvedDatasets {
        train: packer.pack_training(train)?,
        selection: packer.pack(selection, "select on")?,
        report: packer.pack(report, "report on")?,
    })
}

/// The documents of all domains before they are packed.
struct Selected {
    train: Vec<Selection>,
    validation: Vec<Selection>,
}

/// Reads the files of `domains` and decides which documents are for training and which for
/// validation.
fn select_documents<'a>(
    domains: &[DomainConfig],
    options: &'a DataOptions,
    tokenizer: &Tokenizer,
    progress: &dyn Fn(LoadProgress),
) -> Result<(Selected, Packer<'a>)> {
    check(options)?;
    let mut sources = SourceFiles::default();
    let mut listed = Vec::new();
    for domain in domains {
        if domain.hub.is_some() || matches!(domain.validation, Some(Validation::Hub(_))) {
            bail!("the data set of domain `{}` was not fetched from the Hub", domain.name);
        }
        let records = domain.records();
        let mut add = |patterns: &[String]| {
            let added = sources.add(patterns, &records);
            added.with_context(|| format!("in domain `{}`", domain.name))
        };
        let validation = match &domain.validation {
            Some(Validation::Files(patterns)) => add(patterns)?,
            _ => Vec::new(),
        };
        listed.push((add(&domain.train)?, validation));
    }
    let files = read::read_files(&sources.files, options, tokenizer, progress)?;
    let selector = Selector { files: &files, loss_on: options.loss_on };
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (domain, (train_files, validation_files)) in domains.iter().zip(&listed) {
        let select = |files: &[usize]| {
            selector.select(&domain.name, domain.weight, files, domain.record_domain.as_deref())
        };
        let mut selection = select(train_files);
        match domain.validation {
            None | Some(Validation::Hub(_)) => {}
            Some(Validation::Files(_)) => validation.push(select(validation_files)),
            Some(Validation::Fraction(fraction)) => {
                validation.push(selector.hold_out(&mut selection, fraction, options.seed)?);
            }
        }
        train.push(selection);
    }
    selector.leave_out(&mut train, &validation);
    let encoding = options.encoding(tokenizer);
    Ok((Selected { train, validation }, Packer { files, options, encoding }))
}

/// Packs documents into blocks.
struct Packer<'a> {
    files: Vec<Arc<TokenFile>>,
    options: &'a DataOptions,
    encoding: blake3::Hash,
}

impl Packer<'_> {
    fn selector(&self) -> Selector<'_> {
        Selector { files: &self.files, loss_on: self.options.loss_on }
    }

    /// Packs the documents of domains, each of which must have some.
    ///
    /// - `purpose`: the end of the message "domain `math` has nothing to .."
    fn pack(&self, selections: Vec<Selection>, purpose: &str) -> Result<TokenDataset> {
        let DataOptions { seq_len, loss_on, .. } = *self.options;
        let files = self.files.clone();
        let dataset = TokenDataset::new(selections, files, seq_len, loss_on, self.encoding);
        let mut domains = dataset.domains.iter();
        domains.try_for_each(|domain| select::check_not_empty(domain, purpose, &self.files))?;
        for Domain { name, kinds, .. } in dataset.domains.iter().filter(|d| !d.kinds.is_empty()) {
            tracing::info!("`{name}`: {} to {purpose}", kinds::listed(kinds));
        }
        Ok(dataset)
    }

    fn pack_training(&self, selections: Vec<Selection>) -> Result<TokenDataset> {
        let mut train = self.pack(selections, "train on")?;
        (train.mixing, train.on_exhausted) = (self.options.mixing, self.options.on_exhausted);
        Ok(train)
    }
}

/// Loads files to evaluate on. All of their documents are used, and every domain has weight 1.
///
/// # Errors
/// As for [`load_datasets`].
pub fn load_files(
    sources: &[DomainFiles],
    options: &DataOptions,
    tokenizer: &Tokenizer,
    progress: &dyn Fn(LoadProgress),
) -> Result<TokenDataset> {
    check(options)?;
    let mut source_files = SourceFiles::default();
    let listed = sources.iter().map(|source| source_files.add(&source.files, &source.records));
    let listed = listed.collect::<Result<Vec<_>>>()?;
    let files = read::read_files(&source_files.files, options, tokenizer, progress)?;
    let selector = Selector { files: &files, loss_on: options.loss_on };
    let mut selections = Vec::new();
    for (source, indices) in sources.iter().zip(listed) {
        let record_domain = source.record_domain.as_deref();
        if let Some(name) = &source.name {
            let at = select::position_of(&mut selections, name);
            selections[at].append(selector.select(name, 1.0, &indices, record_domain));
            continue;
        }
        for index in indices {
            let stem = source_files.files[index].stem();
            selector.group(&mut selections, index, &stem, record_domain);
        }
    }
    let encoding = options.encoding(tokenizer);
    let packer = Packer { files: files.clone(), options, encoding };
    packer.pack(selections, "evaluate on")
}

fn check(options: &DataOptions) -> Result<()> {
    if !(1..=MAX_SEQ_LEN).contains(&options.seq_len) {
        bail!("`data.seq_len` must be from 1 to {MAX_SEQ_LEN}, got {}", options.seq_len);
    }
    Ok(())
}
