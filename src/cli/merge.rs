//! `dylora merge`: merges the experts, with fixed weights, into the base or into one adapter. If
//! the mixture's own weights differ from token to token, it first measures what fixing them costs
//! in loss. A base without experts is written as it is, for llama.cpp's adapters to be put on.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::eval::DataArgs;
use super::export_adapters::files;
use super::open::{ModelArgs, OpenModel};
use super::progress::CountBar;
use super::results::Schema;
use super::{Shared, print_result, table, usage};
use crate::config::{RoutingChoice, SaveDtype};
use crate::data::TokenDataset;
use crate::durable::output::Output;
use crate::eval::{EvalReport, EvalSettings, evaluate};
use crate::export::card::Form;
use crate::export::gguf::{self, Vocabulary, WholeModel};
use crate::export::merge::{self, MergeInto};
use crate::export::peft::write_adapter;
use crate::export::{self, hugging_face};
use crate::model::RoutingSource;
use crate::model::parameters::expert_name;

/// Arguments of `dylora merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The weights of the experts, the same for every token: `expert:N`, `uniform`, `all` (1 each),
    /// `mean` (the router's mean weights on the data) or a list such as `0.5,0.3,0.2`. The option
    /// is required if the mixture's own weights differ from token to token, because no merge is
    /// exact then.
    #[arg(long, value_name = "WEIGHTS", value_parser = parse_weights, allow_hyphen_values = true)]
    weights: Option<Weights>,
    /// Merge into the base, or into one adapter. The adapter's rank is the sum of the experts'
    /// ranks.
    #[arg(long = "as", value_name = "FORM", default_value = "base")]
    form: MergeInto,
    /// The format of what is written: a folder that transformers or PEFT loads
    /// (`hugging-face`), or a file that llama.cpp loads (`gguf`), in which a base has its
    /// tokenizer with it.
    #[arg(long, default_value = "hugging-face")]
    format: MergeFormat,
    #[command(flatten)]
    data: DataArgs,
    /// The dtype of the merged base, or of a GGUF adapter [default: `f32`]. A merged PEFT adapter
    /// is always in `f32`.
    #[arg(long, value_name = "DTYPE")]
    save_dtype: Option<SaveDtype>,
    /// The folder to create.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace the folder if it exists. It must be one that dylora wrote, with nothing else in it.
    #[arg(long)]
    overwrite: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl MergeArgs {
    /// Whether a whole model is written as GGUF, which may be a base without experts.
    fn is_base_as_gguf(&self) -> bool {
        self.format == MergeFormat::Gguf && self.form == MergeInto::Base
    }
}

/// The value of `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MergeFormat {
    /// A folder of transformers or PEFT.
    HuggingFace,
    /// A file of llama.cpp.
    Gguf,
}

/// The value of `--weights`.
#[derive(Debug, Clone, PartialEq)]
enum Weights {
    /// `uniform`, `all` or `expert:N`.
    Fixed(RoutingChoice),
    /// The router's mean weights on the data.
    Mean,
    /// One weight for each expert.
    List(Vec<f64>),
}

fn parse_weights(text: &str) -> Result<Weights> {
    if text == "mean" {
        return Ok(Weights::Mean);
    }
    use RoutingChoice::{All, Expert, Uniform};
    if let Ok(choice @ (Uniform | All | Expert(_))) = text.parse() {
        return Ok(Weights::Fixed(choice));
    }
    let list: Option<Vec<f64>> = text.split(',').map(|item| item.trim().parse().ok()).collect();
    match list {
        Some(list) if list.iter().all(|weight| weight.is_finite()) => Ok(Weights::List(list)),
        _ => bail!("must be `expert:N`, `uniform`, `all`, `mean` or numbers, as `0.5,0.3,0.2`"),
    }
}

/// The evaluations before and after the weights are fixed, on the same data.
struct Cost {
    routed: EvalReport,
    fixed: EvalReport,
}

/// Runs the command.
pub fn run(args: MergeArgs, shared: &Shared) -> Result<()> {
    let is_peft = args.form == MergeInto::Adapter && args.format == MergeFormat::HuggingFace;
    if is_peft && args.save_dtype.is_some() {
        return Err(usage(anyhow!(
            "`--save-dtype` is for `--as base` or `--format gguf`: a PEFT adapter is always f32"
        )));
    }
    // the output is checked before anything is measured
    let early = args.model.output(&args.out, args.overwrite)?;
    early.check_folder(export::is_unmarked_output)?;
    let open = args.model.open(shared)?;
    if open.model.num_experts() == 0 && args.is_base_as_gguf() {
        let vocabulary = vocabulary(&args, &open)?;
        write(&args, &open, &open.output(early), vocabulary.as_ref(), &[])?;
        return print(&args, &open, &[], None);
    }
    if open.model.num_experts() == 0 {
        return Err(usage(anyhow!("name `--checkpoint` or `--adapters`: a base has no experts")));
    }
    let routing = open.routing(None)?;
    let differs_by_token = match routing {
        RoutingChoice::Router => !open.model.routers().is_empty(),
        RoutingChoice::Record | RoutingChoice::Domain => true,
        _ => false,
    };
    let dataset = match differs_by_token {
        true => Some(data_to_measure(&args, &open, routing, shared)?),
        false => None,
    };
    let vocabulary = vocabulary(&args, &open)?;
    // the weights are checked before anything is measured; `mean` is known only after that
    let given = match args.weights {
        Some(Weights::Mean) => vec![1.0; open.model.num_experts() as usize],
        _ => weights(&args, &open, routing, None).map_err(usage)?,
    };
    merge::check(&open.model, &given, args.form)?;
    let routed = dataset.as_ref().map(|data| measure(&open, data, &routing.into(), shared));
    let routed = routed.transpose()?;
    let weights = weights(&args, &open, routing, routed.as_ref()).map_err(usage)?;
    let cost = match (dataset, routed) {
        (Some(data), Some(routed)) => {
            let fixed = measure(&open, &data, &fixed_source(&weights), shared)?;
            let cost = Cost { routed, fixed };
            // printed before anything is written, so that it is seen even if that fails
            if !args.json {
                print_result(&cost_table(&cost))?;
            }
            Some(cost)
        }
        _ => None,
    };
    write(&args, &open, &open.output(early), vocabulary.as_ref(), &weights)?;
    print(&args, &open, &weights, cost.as_ref())
}

/// The vocabulary of the model that is written as GGUF. What GGUF cannot express is refused before
/// anything is measured.
fn vocabulary(args: &MergeArgs, open: &OpenModel) -> Result<Option<Vocabulary>> {
    if args.format != MergeFormat::Gguf {
        return Ok(None);
    }
    gguf::check_base(&open.model.base().spec)?;
    if args.form == MergeInto::Adapter {
        return Ok(None);
    }
    open.base.tokenizer()?;
    let file = open.base.tokenizer_file.as_deref().expect("a tokenizer comes from a file");
    let vocabulary = Vocabulary::read(file)?;
    for note in vocabulary.notes() {
        tracing::warn!("{note}");
    }
    Ok(Some(vocabulary))
}

/// Writes the merged model.
fn write(
    args: &MergeArgs,
    open: &OpenModel,
    out: &Output,
    vocabulary: Option<&Vocabulary>,
    weights: &[f64],
) -> Result<()> {
    let dtype = args.save_dtype.unwrap_or(SaveDtype::F32);
    if args.form == MergeInto::Adapter {
        return write_merged_adapter(args.format, out, open, weights, dtype);
    }
    let merged = match weights {
        [] => open.base.weights()?,
        weights => merge::into_base(&open.model, &open.base.weights()?, weights)?,
    };
    let provenance = open.provenance()?;
    let Some(vocabulary) = vocabulary else {
        let tokenizer = open.base.tokenizer_file.as_deref();
        let card = merge::base_card(&open.model, &provenance, weights, Form::HuggingFace);
        return hugging_face::export(out, &merged, dtype, tokenizer, &open.base.beside, &card);
    };
    let whole = WholeModel {
        base: &merged,
        name: &provenance.origin.base_label,
        vocabulary,
        chat_template: open.base.chat_template.as_deref(),
        beside: &open.base.beside,
    };
    let card = merge::base_card(&open.model, &provenance, weights, Form::GgufModel);
    gguf::export_model(out, &whole, dtype, &card)
}

/// The data on which the routed mixture is compared with the static one.
///
/// # Errors
/// No `--weights`, and data that is missing or does not suit the routing.
fn data_to_measure(
    args: &MergeArgs,
    open: &OpenModel,
    routing: RoutingChoice,
    shared: &Shared,
) -> Result<TokenDataset> {
    if args.weights.is_none() {
        return Err(usage(anyhow!(
            "routing by `{routing}` weights the experts token by token, so that no merge equals \
             the mixture\nhint: choose weights to fix: `--weights mean`, `uniform`, `expert:N` or \
             a list"
        )));
    }
    let dataset = args.data.load(open, shared).map_err(|error| match args.data.is_empty() {
        true => usage(error.context(
            "before the mixture is merged, what fixing its weights costs is measured on data",
        )),
        false => error,
    })?;
    open.check_data(&dataset, routing)?;
    Ok(dataset)
}

/// The weights of `--weights`, or else those of the run, `[e]`.
///
/// - `routed`: the evaluation of the routed mixture, for `mean`
fn weights(
    args: &MergeArgs,
    open: &OpenModel,
    routing: RoutingChoice,
    routed: Option<&EvalReport>,
) -> Result<Vec<f64>> {
    let count = open.model.num_experts() as usize;
    // without `--weights`, the run's own weights are the same for every token
    let of_run = Weights::Fixed(if count == 1 { RoutingChoice::All } else { routing });
    Ok(match args.weights.as_ref().unwrap_or(&of_run) {
        Weights::List(list) if list.len() == count => list.clone(),
        Weights::List(list) => {
            bail!("`--weights` has {} numbers, the model {count} experts", list.len())
        }
        Weights::Mean => {
            let routing = routed.and_then(|report| report.routing.as_ref());
            let routing = routing.context("`--weights mean` needs a router")?;
            if open.model.router_spec().own_experts {
                return Err(usage(anyhow!(
                    "where layers have experts of their own (`lora.experts_per_layer`) there is no \
                     one mean: name the weights"
                )));
            }
            routing.mean_routing_weights.clone()
        }
        Weights::Fixed(RoutingChoice::Uniform) => vec![1.0 / count as f64; count],
        Weights::Fixed(RoutingChoice::All) => vec![1.0; count],
        Weights::Fixed(choice) => match open.routing(Some(*choice))? {
            RoutingChoice::Expert(expert) => {
                (0..count).map(|e| f64::from(u8::from(e as i64 == expert))).collect()
            }
            _ => unreachable!("neither the parser nor a static run lets another through"),
        },
    })
}

/// The routing source with the same weights for every token.
fn fixed_source(weights: &[f64]) -> RoutingSource {
    RoutingSource::Given(tch::Tensor::from_slice(weights))
}

fn measure(
    open: &OpenModel,
    dataset: &TokenDataset,
    source: &RoutingSource,
    shared: &Shared,
) -> Result<EvalReport> {
    let bar = CountBar::new(shared.show_progress, "measuring", dataset.num_blocks() as u64);
    let rule = open.model.router_spec().eval;
    let domains = open.domains(dataset);
    let settings = EvalSettings { rule, domains, ..EvalSettings::default() };
    let report = evaluate(&open.model, dataset, source, settings, &|done, _| bar.set(done));
    bar.finish();
    report
}

fn cost_table(cost: &Cost) -> String {
    let number = |x: f64| format!("{x:.4}");
    let row = |name: &str, routed: f64, fixed: f64| {
        vec![name.to_owned(), number(routed), number(fixed), format!("{:+.4}", fixed - routed)]
    };
    let domains = cost.routed.domains.iter().zip(&cost.fixed.domains);
    let mut rows: Vec<_> = domains.map(|(a, b)| row(&a.name, a.loss, b.loss)).collect();
    rows.push(row("all tokens", cost.routed.token_loss, cost.fixed.token_loss));
    rows.push(row("mean of domains", cost.routed.loss, cost.fixed.loss));
    table::table(&["loss (nats)", "routed", "static", "cost of fixing the weights"], rows)
}

fn write_merged_adapter(
    format: MergeFormat,
    out: &Output,
    open: &OpenModel,
    weights: &[f64],
    dtype: SaveDtype,
) -> Result<()> {
    let adapter = merge::into_adapter(&open.model, weights)?;
    let provenance = open.provenance()?;
    let base = &open.model.base().spec;
    let form = match format {
        MergeFormat::HuggingFace => Form::PeftAdapter,
        MergeFormat::Gguf => Form::GgufAdapter,
    };
    let card = merge::adapter_card(&open.model, &adapter, &provenance, weights, form);
    if format == MergeFormat::Gguf {
        return gguf::export_adapter(out, &adapter, base, &provenance, dtype, &card);
    }
    out.write_folder(export::is_unmarked_output, |dir| {
        write_adapter(dir, &adapter, base, &provenance, &card)
    })
    .with_context(|| format!("cannot write `{}`", out.path.display()))
}

fn print(args: &MergeArgs, open: &OpenModel, weights: &[f64], cost: Option<&Cost>) -> Result<()> {
    let files = files(&args.out)?;
    if args.json {
        let losses = |report: &EvalReport| -> Value {
            let domains = report.domains.iter();
            let domains: serde_json::Map<String, Value> =
                domains.map(|domain| (domain.name.clone(), json!(domain.loss))).collect();
            json!({ "loss": report.loss, "token_loss": report.token_loss, "domains": domains })
        };
        let cost = cost.map(|cost| {
            json!({
                "routed": losses(&cost.routed),
                "static": losses(&cost.fixed),
                "cost": cost.fixed.loss - cost.routed.loss,
                "token_cost": cost.fixed.token_loss - cost.routed.token_loss,
            })
        });
        let files: Vec<_> = files.iter().map(|(f, n)| json!({ "file": f, "bytes": n })).collect();
        let json = json!({
            "out": args.out,
            "weights": weights,
            "measured": cost,
            "files": files,
        });
        print_result(&Schema::Merge.text(json))?;
        return Ok(());
    }
    let names = (0..open.model.num_experts() as usize).map(expert_name);
    let weights: Vec<String> = names.zip(weights).map(|(n, w)| format!("{n} {w:.4}")).collect();
    match weights.is_empty() {
        true => print_result("there are no experts: the base is written as it is")?,
        false => print_result(&format!("merged with weights {}", weights.join(", ")))?,
    }
    let rows = files.iter().map(|(file, bytes)| vec![file.clone(), table::count(*bytes)]);
    print_result(&table::table(&["file", "bytes"], rows.collect()))?;
    print_result(&format!("each file was read back and compared; wrote `{}`", args.out.display()))?;
    Ok(())
}
