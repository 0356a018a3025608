//! The gradients of a step do not depend on how its documents are packed, ordered and divided into
//! micro-batches. This holds with all losses together.

use anyhow::Result;
use dylora::config::{
    Config, LossOn, Orthogonality, RouterConfig, RouterNoise, RoutingChoice, RoutingLevel, load,
};
use dylora::data::{Batch, MemoryDocument, MemoryDomain, TokenDataset};
use dylora::ffi;
use dylora::model::Inputs;
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::routing::totals::RoutingTotals;
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use dylora::train::step::{self, StepGradients};
use tch::{Device, Kind, Tensor};

use crate::common::{
    ROUTER_INPUTS, SCOPES, add_of_one_domain, assert_close, max_difference, mean_loss, plain_and,
    plain_router, seed, tiny_lora, tiny_model,
};

/// A config in which every loss has a coefficient.
pub(super) fn config(router: &RouterConfig, overrides: &[&str]) -> Result<Config> {
    let text = "base = { source = { path = \"x\" } }\n[data]\nseq_len = 16\n\
                domains = [{ name = \"x\", train = [\"x\"] }]";
    let mut config = load::parse(text, &plain_and(overrides))?;
    config.router = RouterConfig {
        load_balancing_coef: 0.7,
        uniform_mse_coef: 3.0,
        z_loss_coef: 0.05,
        entropy_coef: -0.2,
        ..router.clone()
    };
    config.lora.orthogonality = Some(Orthogonality::Ba(0.4));
    Ok(config)
}

/// Nine documents of 2 to 10 tokens in blocks of `seq_len`.
pub(super) fn dataset(seq_len: usize) -> TokenDataset {
    let document = |n: u32| MemoryDocument {
        tokens: (0..2 + n).map(|i| (n * 7 + i * (n + 3)) % 61).collect(),
        prompt_len: n / 3,
        expert: None,
    };
    let documents = (0..9).map(document).collect();
    let domain = MemoryDomain { name: "all".into(), weight: 1.0, documents };
    TokenDataset::in_memory(seq_len, LossOn::Completion, vec![domain])
}

/// Divides the blocks of `dataset` into micro-batches of the given sizes; the last micro-batch has
/// the remaining blocks.
pub(super) fn cut(dataset: &TokenDataset, sizes: &[usize], reversed: bool) -> Vec<Batch> {
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

pub(super) fn gradients(
    model: &RoutedModel,
    config: &Config,
    batches: &[Batch],
) -> Result<StepGradients> {
    let trained = model.trained(RoutingChoice::Router, None);
    step::gradients(model, &trained, config, batches, None, 1)
}

/// Routers of every scope, input, level and rule.
pub(super) fn routers() -> Vec<RouterConfig> {
    let mut routers = vec![];
    for (input, scope) in ROUTER_INPUTS.into_iter().flat_map(|i| SCOPES.map(|scope| (i, scope))) {
        for level in [RoutingLevel::Token, RoutingLevel::Sequence] {
            for (top_k, renormalize) in [(None, true), (Some(2), true), (Some(1), false)] {
                routers.push(RouterConfig {
                    renormalize,
                    input,
                    scope,
                    level,
                    top_k,
                    ..plain_router()
                });
            }
        }
    }
    routers
}

#[test]
fn any_packing_order_and_accumulation_gives_the_same_gradients() -> Result<()> {
    let _generator = seed(70);
    for router in routers() {
        let config = config(&router, &[])?;
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let whole = gradients(&model, &config, &cut(&dataset(16), &[], false))?;
        let all = |of: &StepGradients| {
            let orthogonality = of.orthogonality.as_ref().expect("it counts").view([1]);
            let totals: Vec<_> = of.routing.iter().map(RoutingTotals::flat).collect();
            Tensor::cat(&[Tensor::cat(&totals, 0), orthogonality], 0)
        };
        for (seq_len, sizes, reversed) in [
            (16, vec![1, 2], false),
            (16, vec![1; 9], true),
            (10, vec![3, 1], true),
            (24, vec![1], false),
            (31, vec![], true),
        ] {
            let what = format!("{router:?}, blocks of {seq_len}, {sizes:?}, {reversed}");
            let cut = gradients(&model, &config, &cut(&dataset(seq_len), &sizes, reversed))?;
            assert_close(&what, &cut.domain_sums, &whole.domain_sums, 1e-10);
            assert_close(&what, &all(&cut), &all(&whole), 1e-10);
            for (a, b) in cut.grads.iter().zip(&whole.grads) {
                let scale = b.abs().max().double_value(&[]).max(1e-3);
                assert_close(&what, a, b, 1e-9 * scale);
            }
        }
    }
    Ok(())
}

/// Without any one of the losses, the routers' gradients are different.
#[test]
fn each_loss_of_the_routers_reaches_them() -> Result<()> {
    let _generator = seed(71);
    for (input, scope) in ROUTER_INPUTS.into_iter().flat_map(|i| SCOPES.map(|scope| (i, scope))) {
        let router = RouterConfig { input, scope, ..plain_router() };
        let with = config(&router, &[])?;
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let batches = cut(&dataset(16), &[1, 1], false);
        let last = |config: &Config| -> Result<Tensor> {
            Ok(gradients(&model, config, &batches)?.grads.pop().expect("a bias"))
        };
        let of_all = last(&with)?;
        let without: [fn(&mut RouterConfig); 4] = [
            |router| router.load_balancing_coef = 0.0,
            |router| router.uniform_mse_coef = 0.0,
            |router| router.z_loss_coef = 0.0,
            |router| router.entropy_coef = 0.0,
        ];
        for (loss, without) in without.into_iter().enumerate() {
            let mut config = with.clone();
            without(&mut config.router);
            let moved = max_difference(&of_all, &last(&config)?);
            assert!(moved > 1e-5, "{input:?}, {scope:?}, loss {loss}: {moved:e}");
        }
    }
    Ok(())
}

/// A step computes the routing totals of its micro-batches before their gradients. A layer's input
/// depends on the dropout masks of the layers below, and noise is drawn between the masks or before
/// all of them. The totals must be those of the masks and the noise that the forward passes with
/// gradients draw.
#[test]
fn totals_taken_ahead_see_the_masks_and_the_noise_that_come() -> Result<()> {
    let _generator = seed(72);
    let noises = [RouterNoise::None, RouterNoise::Gaussian(0.5), RouterNoise::Jitter(0.3)];
    let all = ROUTER_INPUTS.into_iter().flat_map(|i| SCOPES.map(|scope| (i, scope)));
    for ((input, scope), noise) in all.flat_map(|case| noises.map(|noise| (case, noise))) {
        let router = RouterConfig { input, scope, noise, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let batches = cut(&dataset(16), &[1, 1], false);
        for probability in [0.0, 0.4] {
            for gradient_checkpointing in [false, true] {
                let config = config(
                    &router,
                    &[
                        &format!("lora.dropout={probability:?}"),
                        &format!("train.gradient_checkpointing={gradient_checkpointing}"),
                    ],
                )?;
                tch::manual_seed(7);
                let ahead = gradients(&model, &config, &batches)?.routing;
                let after = ffi::rng_state(Device::Cpu)?;
                tch::manual_seed(7);
                let dropout = LoraDropout { probability, masks: config.lora.dropout_masks };
                let mode = ForwardMode { dropout, noise, ..ForwardMode::EVAL };
                let mut totals = vec![];
                for batch in &batches {
                    let inputs = Inputs::of_batch(batch, false, Device::Cpu);
                    let source = &RoutingSource::Router;
                    let (_, routing) = model.loss(&inputs, source, mode, mean_loss(1));
                    add_of_one_domain(&mut totals, &routing, &inputs.labelled);
                }
                let what = format!("{input:?}, {scope:?}, {noise:?}, dropout {probability}");
                assert_eq!(ahead.len(), model.sites().len());
                for (ahead, seen) in ahead.iter().zip(&totals) {
                    assert_close(&what, &ahead.flat(), &seen.flat(), 0.0);
                }
                assert!(
                    after.equal(&ffi::rng_state(Device::Cpu)?),
                    "{what}: the generator is elsewhere"
                );
            }
        }
    }
    Ok(())
}
