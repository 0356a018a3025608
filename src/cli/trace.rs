//! `dylora trace`: shows how one text is routed and how much the experts change the output of each
//! target module, and saves tensors of the forward pass.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::chat_text::may_colour;
use super::open::{ModelArgs, OpenModel};
use super::results::Schema;
use super::strip::{mean_weights, pieces, strip};
use super::{Shared, print_result, table, usage, write};
use crate::config::RoutingChoice;
use crate::durable::output::Output;
use crate::model::experts::weights::RoutingWeights;
use crate::model::{
    ForwardMode, ForwardOutput, Inputs, ModuleUpdate, Recorder, RoutedModel, RoutingSource, Site,
};
use crate::tensor_file::write_tensors;

/// Arguments of `dylora trace`.
#[derive(Debug, Args)]
pub struct TraceArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to trace.
    #[arg(long, required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<String>,
    /// Token ids to trace instead of a text, as `2,8,14`.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Vec<i64>,
    /// Write `input_ids`, `logits`, `routing_weights` and `hidden_states.{layer}` to this file.
    /// If each layer or module has routing weights of its own, they are named
    /// `routing_weights.{layer}` or `routing_weights.{module}`, such as
    /// `routing_weights.layers.0` or `routing_weights.h.0.attn.c_attn`.
    #[arg(long, value_name = "FILE.safetensors")]
    out: Option<PathBuf>,
    /// Replace the file of `--out` if it exists.
    #[arg(long, requires = "out")]
    overwrite: bool,
    /// What decides the routing weights: `router`, `uniform`, `all`, `expert:N` or `none` [default:
    /// what decided them in training, or `router` if that is unknown].
    #[arg(long, value_name = "ROUTING")]
    routing: Option<RoutingChoice>,
    /// Print a table with a line for each token, for each router if there are several. Without this
    /// option, a terminal shows the text as a strip in which each token has the colour and the
    /// number of the expert with the largest weight, as a mean over the routers. Without colours,
    /// as with the environment variable `NO_COLOR`, the strip has the numbers alone. If standard
    /// output is not a terminal, the table is printed in any case.
    #[arg(long, conflicts_with = "json")]
    table: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: TraceArgs, shared: &Shared) -> Result<()> {
    let out = args.out.as_ref().map(|file| args.model.output(file, args.overwrite)).transpose()?;
    // checked first, because reading the model takes time
    out.as_ref().map_or(Ok(()), Output::check_file)?;
    let open = args.model.open(shared)?;
    let out = out.map(|early| open.output(early));
    out.as_ref().map_or(Ok(()), Output::check_file)?;
    let routing = open.routing(args.routing)?;
    check_routing(routing).map_err(usage)?;
    let tokens = tokens(&args, &open)?;
    let _no_grad = tch::no_grad_guard();
    let inputs = Inputs::document(&tokens, open.model.device());
    let mut recorder = Recorder::default();
    let source = RoutingSource::from(routing);
    let mode = ForwardMode { rule: open.model.router_spec().eval, ..ForwardMode::EVAL };
    let output = open.model.forward(&inputs, &source, mode, Some(&mut recorder));
    let weights = layer_weights(&output, &open.model, tokens.len() as i64);
    if let Some(out) = &out {
        let tensors = tensors(&open, routing, &inputs, &output, &weights, &recorder);
        let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        out.write_file(|file| write_tensors(file, named))
            .with_context(|| format!("cannot write `{}`", out.path.display()))?;
    }
    let text_of = |&id: &i64| match &open.base.tokenizer {
        Some(tokenizer) => tokenizer.decode(&[id as u32]).unwrap_or_default(),
        None => String::new(),
    };
    let traced = Traced {
        routing,
        tokens: &tokens,
        texts: tokens.iter().map(text_of).collect(),
        num_targets: open.model.modules().count(),
        updates: &recorder.updates,
        sites: open.model.sites().iter().map(Site::to_string).collect(),
        layers: weights.iter().map(rows).collect::<Result<_>>()?,
    };
    match args.json {
        true => print_json(&traced, args.out.as_deref())?,
        false => {
            print_result(&modules_text(&traced))?;
            match args.table || !std::io::stdout().is_terminal() {
                true => print_tables(&traced)?,
                false => print_strip(&traced, &open)?,
            }
            if let Some(file) = &args.out {
                print_result(&format!("wrote `{}`", file.display()))?;
            }
        }
    }
    Ok(())
}

/// The tensors of the forward pass, by their names in the file of `--out`.
fn tensors(
    open: &OpenModel,
    routing: RoutingChoice,
    inputs: &Inputs,
    output: &ForwardOutput,
    weights: &[Tensor],
    recorder: &Recorder,
) -> Vec<(String, Tensor)> {
    let mut tensors = vec![
        ("input_ids".to_owned(), inputs.input_ids.shallow_clone()),
        ("logits".to_owned(), open.model.logits(&output.hidden)),
    ];
    for (layer, tensor) in weights.iter().enumerate() {
        let name = match open.model.sites().get(layer) {
            Some(site) if site.layer.is_some() && routing == RoutingChoice::Router => {
                format!("routing_weights.{site}")
            }
            _ => "routing_weights".to_owned(),
        };
        tensors.push((name, tensor.shallow_clone()));
    }
    for (layer, hidden) in recorder.hidden_states.iter().enumerate() {
        tensors.push((format!("hidden_states.{layer}"), hidden.shallow_clone()));
    }
    tensors
}

/// Checks that a text alone can be routed by `routing`.
fn check_routing(routing: RoutingChoice) -> Result<()> {
    let lack = match routing {
        RoutingChoice::Record => "names no expert",
        RoutingChoice::Domain => "has no domain",
        _ => return Ok(()),
    };
    bail!(
        "a text {lack}, as routing by `{routing}` needs\nhint: name an expert with \
         `--routing expert:N`"
    );
}

fn tokens(args: &TraceArgs, open: &OpenModel) -> Result<Vec<i64>> {
    let tokens: Vec<i64> = match &args.text {
        Some(text) => {
            let tokenizer = open.base.tokenizer()?;
            let ids = tokenizer.encode(text)?;
            let start = tokenizer.start_tokens_for(&ids).iter();
            start.chain(&ids).copied().map(i64::from).collect()
        }
        None => args.tokens.clone(),
    };
    let (vocab, positions) = (open.base.spec.vocab_size, open.base.spec.max_positions);
    if tokens.is_empty() {
        return Err(usage(anyhow!("the text has no token")));
    }
    if tokens.len() as i64 > positions {
        let found = tokens.len();
        return Err(usage(anyhow!("the base has {positions} positions, the text {found} tokens")));
    }
    match tokens.iter().find(|id| !(0..vocab).contains(*id)) {
        Some(id) => Err(usage(anyhow!("token `{id}` is not in the base's vocabulary of {vocab}"))),
        None => Ok(tokens),
    }
}

/// The routing weights that were used, `[1, t, e]`: one tensor for all layers, or one for each
/// site. There are none if the experts are off.
fn layer_weights(output: &ForwardOutput, model: &RoutedModel, t: i64) -> Vec<Tensor> {
    let weights = output.weights.iter().filter_map(|weights| match weights {
        RoutingWeights::Off => None,
        RoutingWeights::Ones => {
            Some(Tensor::ones([1, t, model.num_experts()], (Kind::Float, Device::Cpu)))
        }
        RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _) => {
            Some(weights.shallow_clone())
        }
    });
    weights.collect()
}

fn rows(weights_1te: &Tensor) -> Result<Vec<Vec<f64>>> {
    let weights_te = weights_1te.squeeze_dim(0);
    Ok(Vec::try_from(weights_te.to_device(Device::Cpu).to_kind(Kind::Double))?)
}

/// What is printed about a traced text.
struct Traced<'a> {
    routing: RoutingChoice,
    tokens: &'a [i64],
    texts: Vec<String>,
    num_targets: usize,
    updates: &'a [ModuleUpdate],
    /// The names of the sites.
    sites: Vec<String>,
    /// The routing weights, `[t][e]`: once for all layers, or once for each site.
    layers: Vec<Vec<Vec<f64>>>,
}

fn print_json(traced: &Traced<'_>, out: Option<&Path>) -> Result<()> {
    let module = |update: &ModuleUpdate| {
        json!({
            "module": update.path,
            "update_norm": update.update_norm,
            "output_norm": update.output_norm,
            "update_share": update.share(),
        })
    };
    let weights = match traced.layers.as_slice() {
        [shared] => json!(shared),
        layers => json!(layers),
    };
    let json = json!({
        "input_ids": traced.tokens,
        "tokens": traced.texts,
        "routing_source": traced.routing,
        "num_target_modules": traced.num_targets,
        "modules": traced.updates.iter().map(module).collect::<Vec<_>>(),
        "sites": traced.sites,
        "routing_weights": weights,
        "out": out,
    });
    print_result(&Schema::Trace.text(json))
}

/// How much the experts change the output of each target module.
fn modules_text(traced: &Traced<'_>) -> String {
    let (updates, routing) = (traced.updates, traced.routing);
    let mut text = format!(
        "routing by `{routing}`: {} of {} target modules got weights",
        updates.len(),
        traced.num_targets
    );
    if !updates.is_empty() {
        let lines = updates.iter().map(|update| {
            let numbers = [update.update_norm, update.output_norm].map(|norm| format!("{norm:.4}"));
            let share = format!("{:.2} %", 100.0 * update.share());
            [update.path.to_string()].into_iter().chain(numbers).chain([share]).collect()
        });
        let header = ["module", "norm of the update", "of the output", "share"];
        text += &format!("\n{}\n", table::table(&header, lines.collect()));
    }
    text
}

fn print_tables(traced: &Traced<'_>) -> Result<()> {
    for (site, rows) in traced.layers.iter().enumerate() {
        if traced.layers.len() > 1 {
            print_result(&traced.sites[site])?;
        }
        print_result(&weight_table(traced.tokens, &traced.texts, rows))?;
    }
    Ok(())
}

fn print_strip(traced: &Traced<'_>, open: &OpenModel) -> Result<()> {
    if traced.layers.is_empty() {
        return Ok(());
    }
    let texts = match &open.base.tokenizer {
        Some(tokenizer) => pieces(tokenizer, traced.tokens, &traced.texts)?,
        None => traced.texts.clone(),
    };
    let colours = may_colour();
    let weights = mean_weights(&traced.layers);
    let text = strip(&texts, &weights, &open.expert_names(), colours);
    // not `print_result`, which would show the colours' escapes as text
    write(&format!("{text}\n")).map(|_| ())
}

fn weight_table(tokens: &[i64], texts: &[String], rows: &[Vec<f64>]) -> String {
    let num_experts = rows.first().map_or(0, Vec::len);
    let experts: Vec<String> = (0..num_experts).map(|e| format!("expert_{e}")).collect();
    let mut header = vec!["position", "id", "token"];
    header.extend(experts.iter().map(String::as_str));
    let lines = tokens.iter().zip(texts).zip(rows).enumerate().map(|(t, ((id, text), weights))| {
        let mut line = vec![t.to_string(), id.to_string(), format!("{text:?}")];
        line.extend(weights.iter().map(|weight| format!("{weight:.4}")));
        line
    });
    table::table(&header, lines.collect())
}
