//! `dylora data`: looks at data before they are trained on.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::open::{base_source, open_base};
use super::record_args::RecordArgs;
use super::results::Schema;
use super::start::{check_base, load_data};
use super::{Shared, print_result, table, usage, variable, write};
use crate::base::Base;
use crate::config::{
    self, BaseConfig, Config, DataConfig, DomainConfig, Dtype, RecordShape, Validation,
};
use crate::data::{Datasets, Example, RecordKind, TokenDataset, visible};

/// Most characters of a part of an example that are shown; the middle of a longer one is left out.
const MAX_PART_CHARS: usize = 1200;

/// Arguments of `dylora data`.
#[derive(Debug, Args)]
pub struct DataCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show how many records there are and of which kind, some of them with the learned tokens
    /// marked, their lengths, and which are there twice or both in training and in validation.
    Preview(PreviewArgs),
}

/// Arguments of `dylora data preview`.
#[derive(Debug, Args)]
pub struct PreviewArgs {
    /// The config of a run. Instead of it, `--base` and `--data` name a base and files.
    #[arg(long, value_name = "FILE", required_unless_present = "base")]
    config: Option<PathBuf>,
    /// Override a key of the config, for example `data.seq_len=512`. The option can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    set: Vec<String>,
    /// The base, whose tokenizer and chat template are used: a folder, or a Hub id,
    /// `NAME[@REVISION]`.
    #[arg(long, value_name = "DIR", conflicts_with = "config", requires = "data")]
    base: Option<String>,
    /// Training data, as a file or glob with or without the name of its domain. Without a name, it
    /// is that of the file. The option can be repeated.
    #[arg(long, value_name = "[DOMAIN=]FILE", requires = "base")]
    data: Vec<String>,
    /// Validation data, in the same way. Without it, a tenth of the training documents of a domain
    /// are held out.
    #[arg(long, value_name = "[DOMAIN=]FILE", requires = "base")]
    validation: Vec<String>,
    /// The length of a block, in tokens [default: the base's number of positions, but at most
    /// 1024].
    #[arg(long, value_name = "N", requires = "base")]
    seq_len: Option<usize>,
    #[command(flatten)]
    records: RecordArgs,
    /// Number of examples of each domain.
    #[arg(long, value_name = "N", default_value_t = 3)]
    examples: usize,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: DataCommand, shared: &Shared) -> Result<()> {
    let Action::Preview(args) = args.action;
    let (config, base) = args.open(shared)?;
    check_base(&config, &base).map_err(usage)?;
    let data = load_data(&config, &base, shared)?;
    let tokenizer = base.tokenizer()?;
    let domains = 0..data.train.domains.len();
    let examples = domains.map(|domain| data.train.examples(domain, args.examples, tokenizer));
    let examples = examples.collect::<Result<Vec<_>>>()?;
    match args.json {
        true => print_result(&serde_json::to_string_pretty(&as_json(&data, &examples))?),
        false => write(&as_text(&data, &examples)).map(|_| ()),
    }
}

impl PreviewArgs {
    /// The config and its base.
    fn open(&self, shared: &Shared) -> Result<(Config, Base)> {
        let Some(source) = &self.base else {
            let file = self.config.as_ref().context("clap requires one of the two")?;
            if self.records.is_given() {
                let hint = "hint: the domains of the config say what their records are";
                return Err(usage(anyhow!(
                    "`--fields`, `--shape`, `--style`, `--data-format` and the templates go with \
                     `--data`, not with `--config`\n{hint}"
                )));
            }
            let config = config::load::load(file, &self.set).map_err(usage)?;
            let base = open_base(&config.base, shared)?;
            return Ok((config, base));
        };
        let (source, dtype) = (base_source(source)?, Dtype::default());
        let config = BaseConfig { source, tokenizer: None, chat_template: None, dtype };
        let base = open_base(&config, shared)?;
        let longest = (base.spec.max_positions as usize).min(1024);
        let data = DataConfig {
            seq_len: self.seq_len.unwrap_or(longest),
            domains: self.domains().map_err(usage)?,
            ..DataConfig::default()
        };
        Ok((Config::new(config, data), base))
    }

    /// The domains of `--data`, with the files of `--validation`.
    fn domains(&self) -> Result<Vec<DomainConfig>> {
        let mut domains: Vec<DomainConfig> = vec![];
        for argument in &self.data {
            let (name, file) = named(argument)?;
            match domains.iter_mut().find(|domain| domain.name == name) {
                Some(domain) => domain.train.push(file),
                None => {
                    let validation = Some(Validation::Fraction(0.1));
                    let of_records = self.records.domain();
                    domains.push(DomainConfig {
                        name,
                        train: vec![file],
                        validation,
                        ..of_records
                    });
                }
            }
        }
        for argument in &self.validation {
            let (name, file) = named(argument)?;
            let Some(domain) = domains.iter_mut().find(|domain| domain.name == name) else {
                bail!(
                    "`--validation {argument}` is of domain `{name}`, which `--data` does not name"
                );
            };
            match &mut domain.validation {
                Some(Validation::Files(files)) => files.push(file),
                validation => *validation = Some(Validation::Files(vec![file])),
            }
        }
        Ok(domains)
    }
}

/// The domain and the file of a `[DOMAIN=]FILE`.
fn named(argument: &str) -> Result<(String, String)> {
    if let Some((name, file)) = argument.split_once('=').filter(|(name, _)| !name.contains('/')) {
        return Ok((name.to_owned(), file.to_owned()));
    }
    let name = Path::new(argument).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = name.split('.').next().unwrap_or_default();
    if name.is_empty() || name.contains(['*', '?', '[']) {
        bail!("`{argument}` gives its domain no name\nhint: write `NAME={argument}`");
    }
    Ok((name.to_owned(), argument.to_owned()))
}

fn as_json(data: &Datasets, examples: &[Vec<Example>]) -> Value {
    let part = |dataset: &TokenDataset, domain: usize| {
        let of = &dataset.domains[domain];
        json!({
            "kinds": of.kinds,
            "counts": of.counts,
            "lengths": dataset.lengths(domain),
            "duplicates": dataset.num_duplicates(domain),
            "in_other_domains": dataset.num_shared(domain),
        })
    };
    let domain = |index: usize| {
        let of = &data.train.domains[index];
        let validation = data.validation.domains.iter().position(|other| other.name == of.name);
        json!({
            "name": of.name,
            "train": part(&data.train, index),
            "validation": validation.map(|index| part(&data.validation, index)),
            "leaks": of.counts.skipped_held_out,
            "examples": examples[index],
        })
    };
    let domains: Vec<Value> = (0..data.train.domains.len()).map(domain).collect();
    Schema::DataPreview.mark(json!({ "seq_len": data.train.seq_len, "domains": domains }))
}

fn as_text(data: &Datasets, examples: &[Vec<Example>]) -> String {
    let is_coloured = std::io::stdout().is_terminal()
        && variable("NO_COLOR").is_none()
        && variable("TERM").is_none_or(|term| term != "dumb");
    let mut text = String::new();
    let (mut lengths, mut faults) = (vec![], vec![]);
    for (split, dataset) in [("training", &data.train), ("validation", &data.validation)] {
        for (index, domain) in dataset.domains.iter().enumerate() {
            for kind in &domain.kinds {
                text += &format!("{}: {kind}, {split}\n", visible(&domain.name));
            }
            let name = || vec![domain.name.clone(), split.to_owned()];
            let counts = &domain.counts;
            let of = dataset.lengths(index);
            let of = of.map(|of| [of.min, of.median, of.p95, of.max].map(table::count));
            let numbers = [counts.documents, counts.split_documents].map(table::count);
            lengths.push([name(), numbers.into(), of.unwrap_or_default().into()].concat());
            let skipped = counts.skipped_bad + counts.skipped_empty + counts.skipped_other_domain;
            let numbers =
                [dataset.num_duplicates(index), dataset.num_shared(index), counts.skipped_held_out];
            let numbers = numbers.into_iter().chain([skipped]).map(table::count);
            faults.push(name().into_iter().chain(numbers).collect());
        }
    }
    let seq_len = table::count(data.train.seq_len as u64);
    let header = ["domain", "part", "documents", "split", "min", "median", "p95", "max"];
    text += &format!(
        "\nlengths in tokens; a document longer than a block of {seq_len} is split\n{}\n",
        table::table(&header, lengths)
    );
    let header = ["domain", "part", "duplicates", "in other domains", "leaks", "skipped"];
    text += &format!(
        "\nleaks are validation documents in the training data, where they are left out\n{}\n",
        table::table(&header, faults)
    );
    for (domain, examples) in data.train.domains.iter().zip(examples) {
        let is_pair = |kind: &RecordKind| kind.shape == Some(RecordShape::PromptCompletion);
        if domain.kinds.iter().any(is_pair) && examples.iter().any(is_glued) {
            text += &format!(
                "\n{}: a completion follows its prompt without a space or a line break; if they \
                 lack one, set `template = {{ completion = \" {{completion}}\" }}` or `style = \
                 \"chat\"`\n",
                visible(&domain.name)
            );
        }
        for (number, example) in (1..).zip(examples) {
            text += &format!(
                "\n{}, document {number}: {} tokens, {} of them learned\n{}\n",
                visible(&domain.name),
                table::count(example.num_tokens as u64),
                table::count(example.num_labels as u64),
                marked(example, is_coloured)
            );
        }
    }
    text
}

/// Whether two words meet at the border between what is read and what is learned.
fn is_glued(example: &Example) -> bool {
    let [prompt, completion] = &example.parts[..] else { return false };
    let (last, first) = (prompt.text.chars().next_back(), completion.text.chars().next());
    let is_word = |c: char| c.is_alphanumeric();
    !prompt.is_learned && last.is_some_and(|c| !c.is_whitespace()) && first.is_some_and(is_word)
}

/// The text of an example with what is learned in green, or in brackets.
fn marked(example: &Example, is_coloured: bool) -> String {
    let (begin, end) = if is_coloured { ("\x1b[32m", "\x1b[0m") } else { ("⟦", "⟧") };
    let part = |text: &str| visible(&shortened(text));
    let parts = example.parts.iter().map(|of| match of.is_learned {
        true => format!("{begin}{}{end}", part(&of.text)),
        false => part(&of.text),
    });
    parts.collect()
}

/// A text without its middle, if it is long.
fn shortened(text: &str) -> String {
    let num_chars = text.chars().count();
    if num_chars <= MAX_PART_CHARS {
        return text.to_owned();
    }
    let half = MAX_PART_CHARS / 2;
    let start: String = text.chars().take(half).collect();
    let end: String = text.chars().skip(num_chars - half).collect();
    format!("{start} [.. {} characters ..] {end}", table::count((num_chars - 2 * half) as u64))
}
