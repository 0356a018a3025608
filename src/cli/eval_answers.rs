//! `dylora eval --generate`: answers beside their references.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use fancy_regex::Regex;
use serde_json::json;

use super::open::{ModelArgs, OpenModel};
use super::progress::CountBar;
use super::{Shared, table, usage};
use crate::config::RoutingChoice;
use crate::data::{Answered, TokenDataset};
use crate::durable::output::Output;
use crate::generate::answers::{AnswerReport, AnswerSettings, Question, Sample, answer, reports};
use crate::generate::{GenerationDefaults, Route, RouteChoice};

/// Number of samples of each domain that are printed.
const NUM_PRINTED: usize = 2;

/// The arguments that ask for answers.
#[derive(Debug, Args)]
pub struct AnswerArgs {
    /// Also answer the first N documents of each domain that have a prompt or are conversations,
    /// greedily, and count how many answers equal their references.
    #[arg(long, value_name = "N")]
    generate: Option<usize>,
    /// Most tokens of an answer.
    #[arg(long, visible_alias = "max-tokens", value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// A regular expression that finds the final answer in a text. Its last match counts, by its
    /// first group. The accuracy is over the documents in whose reference it matches. The default
    /// is that of GSM8K.
    #[arg(long, value_name = "REGEX", default_value = r"####\s*(.*)")]
    answer_pattern: String,
    /// Write the answers to this file, as lines of JSON.
    #[arg(long, value_name = "FILE.jsonl", requires = "generate")]
    samples: Option<PathBuf>,
    /// Replace the file of `--samples` if it exists.
    #[arg(long, requires = "samples")]
    overwrite: bool,
}

/// The answers of an evaluation.
#[derive(Debug)]
pub struct Answers {
    /// How many are right, by domain.
    pub reports: Vec<AnswerReport>,
    /// All of them.
    pub samples: Vec<Sample>,
}

impl AnswerArgs {
    /// Checks what can be checked before the model is open, and returns the output of `--samples`.
    pub fn check(&self, model: &ModelArgs) -> Result<Option<Output>> {
        self.pattern()?;
        if self.generate == Some(0) {
            return Err(usage(anyhow!("`--generate` must be at least 1, got 0")));
        }
        if self.max_new_tokens == 0 {
            return Err(usage(anyhow!("`--max-new-tokens` must be at least 1, got 0")));
        }
        let output = self.samples.as_ref().map(|file| model.output(file, self.overwrite));
        let output = output.transpose()?;
        output.as_ref().map_or(Ok(()), Output::check_file)?;
        Ok(output)
    }

    fn pattern(&self) -> Result<Regex> {
        Regex::new(&self.answer_pattern)
            .map_err(|error| usage(anyhow!("`--answer-pattern` is no regular expression: {error}")))
    }

    /// The answers, if they are asked for. They are written to the output, if there is one.
    ///
    /// # Errors
    /// Data in which no document asks for an answer.
    pub fn answers(
        &self,
        open: &OpenModel,
        dataset: &TokenDataset,
        routing: RoutingChoice,
        batch_size: usize,
        output: Option<Output>,
        shared: &Shared,
    ) -> Result<Option<Answers>> {
        let Some(limit) = self.generate else { return Ok(None) };
        let questions = questions(open, dataset, routing, limit)?;
        let count = questions.len() as u64;
        if count == 0 {
            bail!(
                "`--generate` finds nothing to answer: no document has a prompt or is a \
                 conversation"
            );
        }
        let settings = AnswerSettings {
            max_new_tokens: self.max_new_tokens,
            batch_size,
            end_tokens: GenerationDefaults::of_chats(&open.base)?.end_tokens.into(),
            pattern: &self.pattern()?,
        };
        let own = shared.world.own_turns(questions);
        let bar = CountBar::new(shared.show_progress, "answering", own.len() as u64);
        let progress = |done| bar.set(done);
        let own = answer(&open.model, open.base.tokenizer()?, own, &settings, &progress);
        bar.finish();
        let samples: Vec<Sample> = shared.world.join_turns(own?)?.into_iter().flatten().collect();
        if (samples.len() as u64) < count {
            let skipped = count - samples.len() as u64;
            tracing::warn!("{skipped} document(s) have prompts that leave no room for an answer");
        }
        if let (true, Some(output)) = (shared.is_first(), output.map(|early| open.output(early))) {
            write_samples(&output, &samples)?;
        }
        let names: Vec<&str> = dataset.domains.iter().map(|domain| domain.name.as_str()).collect();
        Ok(Some(Answers { reports: reports(&samples, &names), samples }))
    }
}

/// The first documents of each domain that ask for an answer.
fn questions(
    open: &OpenModel,
    dataset: &TokenDataset,
    routing: RoutingChoice,
    limit: usize,
) -> Result<Vec<Question>> {
    let mut questions = vec![];
    for (index, domain) in dataset.domains.iter().enumerate() {
        for document in dataset.answered(index, limit) {
            let route = route(open, routing, &domain.name, &document)?;
            questions.push(Question { domain: domain.name.clone(), document, route });
        }
    }
    Ok(questions)
}

/// The routing of a document.
pub fn route(
    open: &OpenModel,
    routing: RoutingChoice,
    domain: &str,
    document: &Answered,
) -> Result<Route> {
    let choice = match routing {
        RoutingChoice::Domain => RouteChoice::Domain(domain.to_owned()),
        RoutingChoice::Record => match document.expert {
            Some(expert) if expert >= 0 => RouteChoice::Expert(expert),
            _ => RouteChoice::None,
        },
        routing => RouteChoice::of_training(routing)?,
    };
    choice.route(open.model.num_experts(), open.config.as_ref())
}

fn write_samples(output: &Output, samples: &[Sample]) -> Result<()> {
    let write = |path: &std::path::Path| {
        let mut file = std::io::BufWriter::new(fs_err::File::create(path)?);
        for sample in samples {
            writeln!(file, "{}", json!(sample))?;
        }
        Ok(file.flush()?)
    };
    output.write_file(write).with_context(|| format!("cannot write `{}`", output.path.display()))
}

/// The answers as text: how many are right, and some of them.
pub fn as_text(answers: &Answers) -> String {
    let percent = |share: Option<f64>| {
        share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
    };
    let row = |report: &AnswerReport| {
        vec![
            report.domain.clone(),
            report.num_answers.to_string(),
            percent(report.exact_match),
            report.num_final.to_string(),
            percent(report.accuracy),
        ]
    };
    let header = ["domain", "answers", "exact match", "with a final answer", "accuracy"];
    let rows = answers.reports.iter().map(row).collect();
    let mut text =
        format!("answers, compared with their references\n{}", table::table(&header, rows));
    for report in &answers.reports {
        let own = answers.samples.iter().filter(|sample| sample.domain == report.domain);
        for sample in own.take(NUM_PRINTED) {
            let Sample { domain, prompt, reference, text: answer, .. } = sample;
            text += &format!(
                "\n\n[{domain}] {}\nreference: {}\nanswer:    {}",
                prompt.trim(),
                reference.trim(),
                answer.trim()
            );
        }
    }
    text
}
