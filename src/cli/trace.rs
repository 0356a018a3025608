//! `dylora trace`: how one text is routed, and the inside of its forward pass as tensors.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::open::{ModelArgs, OpenModel};
use super::{Shared, table, usage};
use crate::model::lora::RoutingWeights;
use crate::model::weights::write_tensors;
use crate::model::{ForwardMode, Inputs, Recorder, RoutedGpt2, RoutingSource};

/// Arguments of `dylora trace`.
#[derive(Debug, Args)]
pub struct TraceArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text.
    #[arg(long, required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<String>,
    /// Token ids instead, as `2,8,14`.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tokens: Vec<i64>,
    /// Also write `input_ids`, `logits`, `routing_weights` and `hidden_states.{layer}` here.
    #[arg(long, value_name = "FILE.safetensors")]
    out: Option<PathBuf>,
    /// What routes the tokens: router, uniform, expert:N or none.
    #[arg(long, default_value = "router", value_parser = parse_routing)]
    routing: RoutingSource,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Reads `router`, `uniform`, `expert:N` or `none`.
pub fn parse_routing(text: &str) -> Result<RoutingSource> {
    match text {
        "router" => Ok(RoutingSource::Router),
        "uniform" => Ok(RoutingSource::Uniform),
        "none" => Ok(RoutingSource::Base),
        _ => match text.strip_prefix("expert:").and_then(|expert| expert.parse().ok()) {
            Some(expert) => Ok(RoutingSource::Expert(expert)),
            None => bail!("must be `router`, `uniform`, `expert:N` or `none`"),
        },
    }
}

/// Checks that a routing source names an expert that the model has.
pub fn check_routing(source: RoutingSource, model: &RoutedGpt2) -> Result<()> {
    let count = model.num_experts();
    match source {
        RoutingSource::Expert(expert) if !(0..count).contains(&expert) => {
            Err(usage(anyhow!("there is no `expert:{expert}`, the model has {count} expert(s)")))
        }
        _ => Ok(()),
    }
}

/// Runs the command.
pub fn run(args: TraceArgs, shared: &Shared) -> Result<()> {
    let open = args.model.open(shared)?;
    check_routing(args.routing, &open.model)?;
    let tokens = tokens(&args, &open)?;
    let _no_grad = tch::no_grad_guard();
    let inputs = Inputs::document(&tokens, open.model.device());
    let mut recorder = Recorder::default();
    let (hidden, weights, _) =
        open.model.forward(&inputs, args.routing, ForwardMode::EVAL, Some(&mut recorder));
    let weights = weights_bte(&weights, &open.model, tokens.len() as i64);
    if let Some(file) = &args.out {
        let logits = open.model.logits(&hidden);
        let mut tensors = vec![
            ("input_ids".to_owned(), inputs.input_ids.shallow_clone()),
            ("logits".to_owned(), logits),
        ];
        tensors.extend(weights.iter().map(|w| ("routing_weights".to_owned(), w.shallow_clone())));
        for (layer, hidden) in recorder.hidden_states.iter().enumerate() {
            tensors.push((format!("hidden_states.{layer}"), hidden.shallow_clone()));
        }
        write_tensors(file, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)))
            .with_context(|| format!("cannot write `{}`", file.display()))?;
    }
    let rows = match &weights {
        Some(weights) => rows(&weights.squeeze_dim(0))?,
        None => vec![vec![]; tokens.len()],
    };
    print(&args, &open, &tokens, &rows, &recorder.routed_modules)
}

fn tokens(args: &TraceArgs, open: &OpenModel) -> Result<Vec<i64>> {
    let tokens: Vec<i64> = match &args.text {
        Some(text) => open.base.tokenizer()?.encode(text)?.into_iter().map(i64::from).collect(),
        None => args.tokens.clone(),
    };
    let (vocab, positions) = (open.base.config.vocab_size, open.base.config.n_positions);
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

/// The routing weights, `[1, t, e]`; none without experts.
fn weights_bte(weights: &RoutingWeights, model: &RoutedGpt2, t: i64) -> Option<Tensor> {
    match weights {
        RoutingWeights::Off => None,
        RoutingWeights::Ones => {
            Some(Tensor::ones([1, t, model.num_experts()], (Kind::Float, Device::Cpu)))
        }
        RoutingWeights::PerToken(weights) => Some(weights.shallow_clone()),
    }
}

fn rows(weights_te: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(Vec::try_from(weights_te.to_device(Device::Cpu).to_kind(Kind::Double))?)
}

fn print(
    args: &TraceArgs,
    open: &OpenModel,
    tokens: &[i64],
    rows: &[Vec<f64>],
    modules: &[String],
) -> Result<()> {
    let text_of = |id: i64| match &open.base.tokenizer {
        Some(tokenizer) => tokenizer.decode(&[id as u32]).unwrap_or_default(),
        None => String::new(),
    };
    let texts: Vec<String> = tokens.iter().map(|&id| text_of(id)).collect();
    let num_targets: usize = open.config.as_ref().map_or(0, |config| {
        let per_block = config.lora.target_modules.len();
        if open.model.num_experts() == 0 {
            0
        } else {
            per_block * open.base.config.n_layer as usize
        }
    });
    if args.json {
        let json = json!({
            "input_ids": tokens,
            "tokens": texts,
            "num_target_modules": num_targets,
            "routed_modules": modules,
            "routing_weights": rows,
            "out": args.out,
        });
        println!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    println!("{} of {num_targets} target modules received routing weights", modules.len());
    if !modules.is_empty() {
        println!("{}", modules.join(" "));
    }
    let num_experts = rows.first().map_or(0, Vec::len);
    let experts: Vec<String> = (0..num_experts).map(|e| format!("expert_{e}")).collect();
    let mut header = vec!["position", "id", "token"];
    header.extend(experts.iter().map(String::as_str));
    let lines =
        tokens.iter().zip(&texts).zip(rows).enumerate().map(|(t, ((id, text), weights))| {
            let mut line = vec![t.to_string(), id.to_string(), format!("{text:?}")];
            line.extend(weights.iter().map(|weight| format!("{weight:.4}")));
            line
        });
    println!("{}", table::table(&header, lines.collect()));
    if let Some(file) = &args.out {
        println!("wrote `{}`", file.display());
    }
    Ok(())
}
