//! The router column of a new expert, which at first keeps the expert out of use on the old
//! domains.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::base::Base;
use dylora::config::{RouterInput, RouterScope};
use dylora::data::{BlockId, TokenDataset};
use dylora::growth::new_column::{bias_beside_one, initial_biases, largest_new_prob};
use dylora::growth::with_expert;
use dylora::mixture::Mixture;
use dylora::model::Inputs;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::{World, alone, data, open_base};

const INPUTS: [RouterInput; 3] =
    [RouterInput::Embeddings, RouterInput::BaseHidden, RouterInput::LayerInput];
const SCOPES: [RouterScope; 3] = [RouterScope::Shared, RouterScope::Layer, RouterScope::Module];

/// Routers of every input, scope and depth.
fn routers() -> Vec<RouterSpec> {
    let of = |input| {
        SCOPES.into_iter().flat_map(move |scope| {
            [0, 1].map(|hidden_layers| RouterSpec {
                input,
                scope,
                hidden_layers,
                hidden_width: 6,
                temperature: 1.7,
                ..RouterSpec::default()
            })
        })
    };
    INPUTS.into_iter().flat_map(of).collect()
}

/// A base, training data, and the specs of experts. The first one or two experts are old, the third
/// is new.
struct Old {
    base: Base,
    data: TokenDataset,
    specs: Vec<ExpertSpec>,
}

impl Old {
    fn new(world: &World) -> Result<Self> {
        let config = world.config("run", &[])?;
        let base = open_base(&config)?;
        let data = data(&config, &base)?.train;
        let specs = ExpertSpec::all(&config.lora, &base.spec)?;
        Ok(Self { base, data, specs })
    }

    /// A mixture of the first `count` experts with random tensors.
    fn mixture(&self, count: usize, router: &RouterSpec, kind: Kind) -> Result<Mixture> {
        let specs = self.specs[..count].to_vec();
        let empty = Mixture::new(specs.clone(), router.clone(), BTreeMap::new());
        let model = empty.put_on(&self.base.weights()?, Device::Cpu, kind)?;
        let tensors = model.tensors().into_iter();
        let random = tensors.map(|(name, t)| (name, t.randn_like() * 0.3)).collect();
        Ok(Mixture { is_whole: true, ..Mixture::new(specs, router.clone(), random) })
    }

    fn grown(&self, old: &Mixture, model: &RoutedModel) -> Result<Mixture> {
        let biases = initial_biases(model, &self.data, "down", 6)?;
        let bias = |prefix: &str| {
            biases.get(prefix).copied().unwrap_or(bias_beside_one(old.router.temperature))
        };
        with_expert(old, &self.base.weights()?, self.specs[2].clone(), &bias)
    }

    fn put_on(&self, mixture: &Mixture, kind: Kind) -> Result<RoutedModel> {
        mixture.put_on(&self.base.weights()?, Device::Cpu, kind)
    }

    /// Six blocks of the old domain `up`, at even distances.
    fn blocks(&self) -> Vec<BlockId> {
        let of_up = self.data.eval_order().into_iter().filter(|id| id.domain == 0);
        let blocks: Vec<BlockId> = of_up.collect();
        (0..6).map(|i| blocks[i * blocks.len() / 6]).collect()
    }

    /// The logits of the label tokens of these blocks, `[n, v]`.
    fn logits(&self, model: &RoutedModel) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let of = |block: BlockId| {
            let inputs = Inputs::of_batch(&self.data.batch(&[block]), false, Device::Cpu);
            let output = model.forward(&inputs, &RoutingSource::Router, ForwardMode::EVAL, None);
            let d = self.base.spec.width;
            model.logits(&output.hidden.view([-1, d]).index_select(0, &inputs.labelled))
        };
        Tensor::cat(&self.blocks().into_iter().map(of).collect::<Vec<_>>(), 0)
    }

    /// The largest probability of the last expert on the tokens of these blocks, with the softmax
    /// written out in f64.
    fn largest(&self, model: &RoutedModel) -> f64 {
        let _no_grad = tch::no_grad_guard();
        let mut largest = 0f64;
        for block in self.blocks() {
            let batch = self.data.batch(&[block]);
            let inputs = Inputs::of_batch(&batch, false, Device::Cpu);
            let ids = batch.document_ids.iter().zip(0i64..);
            let tokens: Vec<i64> = ids.filter(|(id, _)| **id >= 0).map(|(_, row)| row).collect();
            let tokens = Tensor::from_slice(&tokens);
            for routing in model.routing(&inputs, ForwardMode::EVAL) {
                let e = model.num_experts();
                let scores = routing.logits.view([-1, e]).index_select(0, &tokens);
                for scores in Vec::<Vec<f64>>::try_from(scores.to_kind(Kind::Double))
                    .expect("it has two dimensions")
                {
                    let temperature = model.router_spec().temperature;
                    let last = scores[e as usize - 1];
                    let sum: f64 = scores.iter().map(|s| ((s - last) / temperature).exp()).sum();
                    largest = largest.max(1.0 / sum);
                }
            }
        }
        largest
    }
}

/// In f32, scores of size s have errors of a few times s 2^-24, and so has the logarithm of the
/// probability. Here s is below 100.
fn largest_allowed(kind: Kind) -> f64 {
    let rounding = if kind == Kind::Double { 1e-12 } else { 100.0 * 8.0 / f64::from(1 << 24) };
    1e-8 * (1.0 + rounding)
}

/// The largest probability is 1e-8 / (1 + 1e-8), so the bias is not lower than it has to be.
#[test]
fn a_new_expert_has_at_most_1e_8_of_any_old_token() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let old = Old::new(&world)?;
    tch::manual_seed(1);
    for (router, kind) in
        routers().into_iter().flat_map(|r| [(r.clone(), Kind::Double), (r, Kind::Float)])
    {
        for count in [1, 2] {
            let what = format!("{count} in {kind:?} by {router:?}");
            let mixture = old.mixture(count, &router, kind)?;
            let model = old.put_on(&mixture, kind)?;
            let grown = old.put_on(&old.grown(&mixture, &model)?, kind)?;
            // with one old expert, the router is created in the base's f32
            let precision = if count == 1 { Kind::Float } else { kind };
            let largest = old.largest(&grown);
            assert!(largest <= largest_allowed(precision), "{what}: {largest:e}");
            assert!(largest >= 0.999e-8, "{what}: {largest:e}");
            let found = largest_new_prob(&grown, &old.data, "down", 6);
            assert!((found / largest - 1.0).abs() < 1e-9, "{what}: {found:e} is not {largest:e}");
        }
    }
    Ok(())
}

/// The new expert's B is 0, and the weights of the old experts change by 1e-8 of their size. In
/// f32, the sums over experts are also rounded differently, which changes a logit by as much as the
/// rounding of f32 does anyway.
#[test]
fn a_new_expert_changes_no_old_tokens_logits() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let old = Old::new(&world)?;
    tch::manual_seed(2);
    for (router, kind) in
        routers().into_iter().flat_map(|r| [(r.clone(), Kind::Double), (r, Kind::Float)])
    {
        for (count, top_k, renormalize) in [
            (1, None, true),
            (2, None, true),
            (2, Some(1), true),
            (2, Some(1), false),
            (2, Some(2), true),
        ] {
            let router = RouterSpec { top_k, renormalize, ..router.clone() };
            let what = format!("{count} in {kind:?} by {router:?}");
            let mixture = old.mixture(count, &router, kind)?;
            let model = old.put_on(&mixture, kind)?;
            let grown = old.put_on(&old.grown(&mixture, &model)?, kind)?;
            let (before, after) = (old.logits(&model), old.logits(&grown));
            let largest = |x: Tensor| x.abs().max().double_value(&[]);
            let exact = old.logits(&old.put_on(&mixture, Kind::Double)?);
            let bound = 1e-6 + 4.0 * largest(&exact - &before);
            let difference = largest(after - before);
            assert!(difference <= bound, "{what}: {difference:e} is more than {bound:e}");
        }
    }
    Ok(())
}

/// The old selection biases are below zero here, so a bias of 0 for the new expert would be the
/// largest.
#[test]
fn a_new_expert_is_not_chosen_for_its_selection_bias() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let old = Old::new(&world)?;
    tch::manual_seed(3);
    for scope in SCOPES {
        let router = RouterSpec {
            scope,
            selection_bias: true,
            top_k: Some(2),
            renormalize: false,
            ..RouterSpec::default()
        };
        let mut mixture = old.mixture(2, &router, Kind::Double)?;
        for (name, tensor) in &mut mixture.tensors {
            if name.ends_with("selection_bias") {
                *tensor = Tensor::from_slice(&[-3.0, -2.0]);
            }
        }
        let model = old.put_on(&mixture, Kind::Double)?;
        let grown = old.grown(&mixture, &model)?;
        for (name, tensor) in
            grown.tensors.iter().filter(|(name, _)| name.ends_with("selection_bias"))
        {
            assert_eq!(Vec::<f64>::try_from(tensor)?, [-3.0, -2.0, -3.0], "{name}");
        }
        let grown = old.put_on(&grown, Kind::Double)?;
        let difference = (old.logits(&grown) - old.logits(&model)).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{scope:?}: {difference:e}");
    }
    Ok(())
}
