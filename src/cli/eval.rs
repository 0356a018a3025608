//! `dylora eval`: measures the loss, perplexity and routing of a model on each domain.

use anyhow::{Result, anyhow, bail};
use clap::Args;
use serde_json::json;

use super::eval_answers::{self, AnswerArgs, Answers};
use super::open::{ModelArgs, OpenModel, device_name, with_fetched};
use super::progress::{CountBar, LoadBar};
use super::record_args::RecordArgs;
use super::results::Schema;
use super::{Shared, print_result, table, token_cache, usage};
use crate::checkpoint;
use crate::config::{
    Config, DomainConfig, EvalRule, LossOn, LossOnTurns, Mixing, OnBadRecord, OnExhausted,
    RoutingChoice,
};
use crate::data::{DataOptions, DomainFiles, TokenDataset, load_datasets, load_files};
use crate::eval::experts::{ExpertReport, expert_reports};
use crate::eval::{EvalReport, EvalSettings, evaluate};
use crate::growth::stages::{Stage, forgetting};
use crate::model::{RoutedModel, RoutingSource};

/// Sequences in one forward pass, unless `--batch-size` says another number.
pub const BATCH_SIZE: usize = 8;

/// The arguments that name the data.
#[derive(Debug, Default, Args)]
pub struct DataArgs {
    /// Data to score, as a file with or without its domain. Without a domain, records are grouped
    /// by their `domain` field, or by file if they have none. The option can be repeated [default:
    /// the validation data of the checkpoint's config].
    #[arg(long, value_name = "[DOMAIN=]FILE")]
    data: Vec<String>,
    #[command(flatten)]
    records: RecordArgs,
    /// The longest window, in tokens [default: the config's `data.seq_len`, or the base's number of
    /// positions, but at most 1024].
    #[arg(long, value_name = "N")]
    seq_len: Option<usize>,
    /// Score completions only, or every token [default: the config's `data.loss_on`, or
    /// `completion`].
    #[arg(long)]
    loss_on: Option<LossOn>,
    /// In records with `messages`, score every turn of the assistant, or the last one [default: the
    /// config's `data.loss_on_turns`, or `all`].
    #[arg(long)]
    loss_on_turns: Option<LossOnTurns>,
}

/// Arguments of `dylora eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    data: DataArgs,
    /// Number of sequences in one forward pass.
    #[arg(long, value_name = "N", default_value_t = BATCH_SIZE)]
    batch_size: usize,
    /// What decides the routing weights: `router`, `uniform`, `all`, `expert:N`, `record` (each
    /// record's `expert` field), `domain` (the expert of each domain by the run's config) or `none`
    /// [default: what decided them in training, or `router` if that is unknown].
    #[arg(long, value_name = "ROUTING")]
    routing: Option<RoutingChoice>,
    #[command(flatten)]
    answers: AnswerArgs,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: EvalArgs, shared: &Shared) -> Result<()> {
    if args.batch_size == 0 {
        return Err(usage(anyhow!("`--batch-size` must be at least 1, got 0")));
    }
    let samples = args.answers.check(&args.model)?;
    let open = args.model.open(shared)?;
    let routing = open.routing(args.routing)?;
    let dataset = args.data.load(&open, shared)?;
    open.check_data(&dataset, routing)?;
    let (report, by_training) = losses(&open, &dataset, routing, args.batch_size, shared)?;
    let spec = open.model.router_spec();
    let batch_size = args.batch_size;
    let answers = args.answers.answers(&open, &dataset, routing, batch_size, samples, shared)?;
    let results = Results {
        answers,
        report,
        by_training,
        experts: expert_reports(&open.model)?,
        stages: match &open.checkpoint {
            Some(dir) => checkpoint::read_state(dir)?.stages,
            None => vec![],
        },
    };
    warn_of_unmoved(&results.experts);
    match args.json {
        true => print_json(&results, &open, routing)?,
        false => print(&results, spec.top_k)?,
    }
    check_loss(&results.report)
}

/// The losses and the routing of a model: by the rule of evaluation if it is another than that of
/// training, with the rule and the results of training beside it.
///
/// - `routing`: what decides the routing weights
pub fn losses(
    open: &OpenModel,
    dataset: &TokenDataset,
    routing: RoutingChoice,
    batch_size: usize,
    shared: &Shared,
) -> Result<(EvalReport, Option<(EvalRule, EvalReport)>)> {
    let dead_share = open.config.as_ref().map(|config| config.router.dead_share);
    let settings = EvalSettings {
        batch_size,
        dead_share: dead_share.unwrap_or(EvalSettings::default().dead_share),
        domains: open.domains(dataset),
        ..EvalSettings::default()
    };
    let source = RoutingSource::from(routing);
    let evaluate = |rule| {
        let bar = CountBar::new(shared.show_progress, "evaluating", dataset.num_blocks() as u64);
        let settings = EvalSettings { rule, ..settings.clone() };
        let report = evaluate(&open.model, dataset, &source, settings, &|done, _| bar.set(done));
        bar.finish();
        report
    };
    let eval_rule = open.model.router_spec().eval;
    let other_rule = eval_rule.filter(|_| routing == RoutingChoice::Router);
    let by_training = evaluate(None)?;
    Ok(match other_rule {
        None => (by_training, None),
        Some(rule) => (evaluate(Some(rule))?, Some((rule, by_training))),
    })
}

/// Checks that the results are numbers, after they were printed.
pub fn check_loss(report: &EvalReport) -> Result<()> {
    match report.loss.is_finite() {
        true => Ok(()),
        false => bail!(
            "the loss is {}, which is no result\nhint: the numbers of the model are too large for \
             `--dtype`, or it is damaged",
            report.loss
        ),
    }
}

/// What is printed about a model.
struct Results {
    /// By the rule of evaluation, if it is another than that of training.
    report: EvalReport,
    /// By the rule of training, and the rule of evaluation, if they differ.
    by_training: Option<(EvalRule, EvalReport)>,
    experts: Vec<ExpertReport>,
    stages: Vec<Stage>,
    answers: Option<Answers>,
}

fn print_json(results: &Results, open: &OpenModel, routing: RoutingChoice) -> Result<()> {
    let Results { report, by_training, experts, stages, answers } = results;
    let mut json = serde_json::to_value(report)?;
    json["experts"] = json!(experts);
    json["base"] = json!(open.base.label);
    json["routing_source"] = json!(routing);
    json["checkpoint"] = json!(open.checkpoint);
    json["device"] = json!(device_name(open.model.device()));
    if let Some((rule, by_training)) = by_training {
        json["rule"] = json!(rule);
        json["rule_gap"] = json!(report.loss - by_training.loss);
        json["by_training_rule"] = serde_json::to_value(by_training)?;
    }
    json["stages"] = json!(stages);
    json["forgetting"] = json!(forgetting(stages));
    if let Some(answers) = answers {
        json["answers"] = json!(answers.reports);
        json["samples"] = json!(answers.samples);
    }
    print_result(&Schema::Eval.text(json))
}

/// Prints the results.
///
/// - `top_k`: the rule of training
fn print(results: &Results, top_k: Option<i64>) -> Result<()> {
    let Results { report, by_training, experts, stages, answers } = results;
    let mut parts = vec![table::report(report)];
    if let Some((rule, by_training)) = by_training {
        let names = [table::rule(top_k), table::rule(rule.top_k())];
        parts.push(format!(
            "loss by the rule of training and by that of evaluation, `router.eval`\n{}",
            table::rules(&names, by_training, report)
        ));
    }
    if !experts.is_empty() {
        let moved = table::experts(experts);
        parts.push(format!("how far each expert has moved from its start\n{moved}"));
    }
    if stages.len() > 1 {
        let matrix = table::forgetting(stages);
        parts.push(format!("loss of each domain after each stage (forgetting matrix)\n{matrix}"));
    }
    parts.extend(answers.as_ref().map(eval_answers::as_text));
    print_result(&parts.join("\n\n"))
}

/// Warns of experts that are as they were at their start.
fn warn_of_unmoved(experts: &[ExpertReport]) {
    for expert in experts.iter().filter(|expert| expert.update_norm == 0.0) {
        tracing::warn!(
            "`{}` has not moved from its start: it changes no output of the base",
            expert.name
        );
    }
}

/// Evaluates a model on its run's validation data by the routing rule for evaluation. Without such
/// data, the result is `None`.
pub fn validate(
    model: &RoutedModel,
    dataset: &TokenDataset,
    config: &Config,
    shared: &Shared,
) -> Result<Option<EvalReport>> {
    if dataset.num_blocks() == 0 {
        return Ok(None);
    }
    let bar = CountBar::new(shared.show_progress, "evaluating", dataset.num_blocks() as u64);
    let settings = EvalSettings::of_run(config, model, dataset);
    let source = RoutingSource::from(config.train.routing);
    let report = evaluate(model, dataset, &source, settings, &|done, _| bar.set(done))?;
    bar.finish();
    Ok(Some(report))
}

impl DataArgs {
    /// The arguments `--data` for each of `data`, and `--seq-len`.
    pub fn of_files(data: Vec<String>, seq_len: usize) -> Self {
        Self { data, seq_len: Some(seq_len), ..Self::default() }
    }

    /// Whether no data is named.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Loads the data that is named, or else the validation data of the model's run.
    pub fn load(&self, open: &OpenModel, shared: &Shared) -> Result<TokenDataset> {
        let config = open.config.as_ref().map(|config| &config.data);
        let longest = (open.base.spec.max_positions as usize).min(1024);
        let seq_len = self.seq_len.or(config.map(|data| data.seq_len)).unwrap_or(longest);
        if seq_len < 2 {
            return Err(usage(anyhow!("`--seq-len` must be at least 2, got {seq_len}")));
        }
        open.base.check_seq_len(seq_len).map_err(usage)?;
        let tokenizer = open.base.tokenizer()?;
        let turns = self.loss_on_turns.or(config.map(|data| data.loss_on_turns));
        let options = DataOptions {
            seq_len,
            loss_on: self.loss_on.or(config.map(|data| data.loss_on)).unwrap_or_default(),
            chat: open.base.chat_options(turns.unwrap_or_default()),
            on_bad_record: config.map_or(OnBadRecord::Fail, |data| data.on_bad_record),
            seed: open.config.as_ref().map_or(0, |config| config.run.seed),
            eos_token_id: open.base.spec.eos_token_id(),
            mixing: Mixing::default(),
            on_exhausted: OnExhausted::default(),
            cache_dir: Some(token_cache()),
        };
        let bar = LoadBar::new(shared.show_progress);
        let progress = |progress| bar.update(&progress);
        if self.data.is_empty() {
            let Some(config) = config else {
                return Err(usage(anyhow!(
                    "there is no run whose data to take: name `--data [DOMAIN=]FILE`"
                )));
            };
            let domains = with_fetched(&config.domains, shared)?;
            let datasets = load_datasets(&domains, &options, tokenizer, &progress)?;
            if datasets.validation.num_blocks() == 0 {
                let hint = "hint: name some with `--data [DOMAIN=]FILE`";
                return Err(usage(anyhow!("the run's config has no validation data\n{hint}")));
            }
            return Ok(datasets.validation);
        }
        let domains = config.map_or(&[][..], |data| &data.domains);
        load_files(&self.domain_files(domains), &options, tokenizer, &progress)
    }

    /// The files of `--data`, grouped by domain. If no option says what their records are, the
    /// domain of that name among `domains` does.
    fn domain_files(&self, domains: &[DomainConfig]) -> Vec<DomainFiles> {
        let mut sources: Vec<DomainFiles> = vec![];
        for argument in &self.data {
            let (name, file) = match argument.split_once('=') {
                Some((name, file)) if !name.contains('/') => (Some(name.to_owned()), file),
                _ => (None, argument.as_str()),
            };
            match sources.iter_mut().find(|source| source.name == name) {
                Some(source) => source.files.push(file.to_owned()),
                None => {
                    let files = vec![file.to_owned()];
                    let known = domains.iter().find(|domain| name.as_ref() == Some(&domain.name));
                    let records = self.records.records(known);
                    sources.push(DomainFiles { name, files, record_domain: None, records });
                }
            }
        }
        sources
    }
}
