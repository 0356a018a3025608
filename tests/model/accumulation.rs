//! A step's gradients do not depend on how its documents are packed, ordered and cut into
//! micro-batches, the load-balancing loss included.

use anyhow::Result;
use dylora::config::{Config, LossOn, RouterConfig, RouterInput, RoutingChoice, load};
use dylora::data::{Batch, MemoryDocument, MemoryDomain, TokenDataset};
use dylora::eval;
use dylora::model::lora::LoraDropout;
use dylora::model::router::add_totals;
use dylora::model::{ForwardMode, RoutedGpt2, RoutingSource};
use dylora::train::step::{self, StepGradients};
use tch::{Device, Kind, Tensor};

use crate::common::{
    ROUTER_INPUTS, assert_close, max_difference, mean_loss, seed, tiny_lora, tiny_model,
};

fn config(router: &RouterConfig, overrides: &[&str]) -> Result<Config> {
    let text = "base = { source = { path = \"x\" } }\n[data]\nseq_len = 16\n\
                domains = [{ name = \"x\", train = [\"x\"] }]";
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    let mut config = load::parse(text, &overrides)?;
    config.router = RouterConfig { load_balancing_coef: 0.7, ..router.clone() };
    Ok(config)
}

/// Nine documents of 2 to 10 tokens in blocks of `seq_len`.
fn dataset(seq_len: usize) -> TokenDataset {
    let document = |n: u32| MemoryDocument {
        tokens: (0..2 + n).map(|i| (n * 7 + i * (n + 3)) % 61).collect(),
        prompt_len: n / 3,
        expert: None,
    };
    let documents = (0..9).map(document).collect();
    let domain = MemoryDomain { name: "all".into(), weight: 1.0, documents };
    TokenDataset::in_memory(seq_len, LossOn::Completion, vec![domain])
}

/// The blocks of `dataset` in micro-batches of these sizes, the rest in a last one.
fn cut(dataset: &TokenDataset, sizes: &[usize], reversed: bool) -> Vec<Batch> {
    let mut blocks = dataset.eval_order();
    if reversed {
        blocks.reverse();
    }
    let mut batches = vec![];
    let mut rest = &blocks[..];
    for &size in sizes {
        let (batch, after) = rest.split_at(size.min(rest.len()));
        batches.push(dataset.batch(batch));
        rest = after;
    }
    batches.extend((!rest.is_empty()).then(|| dataset.batch(rest)));
    batches.retain(|batch| batch.num_rows > 0);
    batches
}

fn gradients(model: &RoutedGpt2, config: &Config, batches: &[Batch]) -> Result<StepGradients> {
    step::gradients(model, &model.trained(RoutingChoice::Router), config, batches, 1)
}

#[test]
fn any_packing_order_and_accumulation_gives_the_same_gradients() -> Result<()> {
    let _generator = seed(70);
    for (input, top_k) in
        ROUTER_INPUTS.into_iter().flat_map(|input| [(input, None), (input, Some(2))])
    {
        let router = RouterConfig { input, top_k, ..RouterConfig::default() };
        let config = config(&router, &[])?;
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let whole = gradients(&model, &config, &cut(&dataset(16), &[], false))?;
        let balance = |of: &StepGradients| of.routing[0].load_balancing_loss();
        for (seq_len, sizes, reversed) in [
            (16, vec![1, 2], false),
            (16, vec![1; 9], true),
            (10, vec![3, 1], true),
            (24, vec![1], false),
            (31, vec![], true),
        ] {
            let what = format!("{input:?}, {top_k:?}, blocks of {seq_len}, {sizes:?}, {reversed}");
            let cut = gradients(&model, &config, &cut(&dataset(seq_len), &sizes, reversed))?;
            assert_close(&what, &cut.domain_sums, &whole.domain_sums, 1e-10);
            assert_close(&what, &balance(&cut), &balance(&whole), 1e-12);
            for (a, b) in cut.grads.iter().zip(&whole.grads) {
                let scale = b.abs().max().double_value(&[]).max(1e-3);
                assert_close(&what, a, b, 1e-9 * scale);
            }
        }
    }
    Ok(())
}

/// The balance loss counts: without it the router's gradient is another.
#[test]
fn the_load_balancing_loss_reaches_the_router() -> Result<()> {
    let _generator = seed(71);
    for input in ROUTER_INPUTS {
        let router = RouterConfig { input, ..RouterConfig::default() };
        let with = config(&router, &[])?;
        let mut without = with.clone();
        without.router.load_balancing_coef = 0.0;
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let batches = cut(&dataset(16), &[1, 1], false);
        let (with, without) =
            (gradients(&model, &with, &batches)?, gradients(&model, &without, &batches)?);
        let last = |of: &StepGradients| of.grads.last().map(Tensor::shallow_clone);
        let (with, without) = (last(&with).expect("a bias"), last(&without).expect("a bias"));
        assert!(max_difference(&with, &without) > 1e-4, "{input:?}");
    }
    Ok(())
}

/// A layer's own input depends on the dropout masks of the layers below: the totals that are taken ahead
/// are those of the masks that come.
#[test]
fn totals_taken_ahead_see_the_dropout_masks_that_come() -> Result<()> {
    let _generator = seed(72);
    let router = RouterConfig { input: RouterInput::LayerInput, ..RouterConfig::default() };
    let config = config(&router, &["lora.dropout=0.4"])?;
    let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
    let batches = cut(&dataset(16), &[1, 1], false);
    tch::manual_seed(7);
    let ahead = gradients(&model, &config, &batches)?.routing;
    tch::manual_seed(7);
    let dropout = LoraDropout { probability: 0.4, masks: config.lora.dropout_masks };
    let mode = ForwardMode { dropout, gradient_checkpointing: false };
    let mut totals = vec![];
    for batch in &batches {
        let inputs = eval::inputs(batch, &RoutingSource::Router, Device::Cpu);
        let (_, routing) = model.loss(&inputs, &RoutingSource::Router, mode, mean_loss(1));
        add_totals(&mut totals, &routing, &inputs.labelled);
    }
    assert_eq!(ahead.len(), 2);
    for (ahead, seen) in ahead.iter().zip(&totals) {
        assert_eq!(max_difference(&ahead.probs, &seen.probs), 0.0);
    }
    Ok(())
}
