//! Steps of generation by kernels and graphs, and by the reference.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use dylora::config::TargetModule::{AttnCAttn, MlpCFc, MlpCProj};
use dylora::config::{
    Family, Kernels, LoraConfig, RouterConfig, RouterInput, RouterScope, RoutingLevel,
};
use dylora::generate::{Engine, EngineLimits, Request, Route, Sampling};
use dylora::model::batch::StepRow;
use dylora::model::decoder::mlp::Activation;
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{Compute, ForwardMode, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{family_specs, plain_router, randomize, seed, tiny_base};
use crate::shapes::{device, lora, shape};

/// A mixture on a base.
struct Mixture {
    name: String,
    base: DecoderSpec,
    lora: LoraConfig,
    router: RouterConfig,
}

fn mixtures() -> Vec<Mixture> {
    let all = Family::Gpt2.modules();
    let new = |name: &str, base: DecoderSpec, lora: LoraConfig, router: RouterConfig| Mixture {
        name: name.into(),
        base,
        lora,
        router,
    };
    let of_shape = |heads, size| shape(heads, size, 53, 96);
    let plain = || of_shape(2, 32);
    let mut mixtures = vec![
        new("plain", plain(), lora(3, 4, all), plain_router()),
        new("one expert", plain(), lora(1, 4, all), plain_router()),
        new("attention", plain(), lora(4, 8, &[AttnCAttn]), plain_router()),
        new("feed-forward", plain(), lora(2, 3, &[MlpCFc, MlpCProj]), plain_router()),
        new("many ranks", plain(), lora(8, 40, all), plain_router()),
        new("head 64", of_shape(3, 64), lora(4, 8, all), plain_router()),
        new("head 128", of_shape(1, 128), lora(2, 8, all), plain_router()),
        new("head 16", of_shape(4, 16), lora(2, 8, all), plain_router()),
        new(
            "exact GELU",
            DecoderSpec { activation: Activation::Gelu, ..plain() },
            lora(2, 4, all),
            plain_router(),
        ),
        new(
            "shared part",
            plain(),
            LoraConfig { shared_rank: 5, ..lora(3, 4, all) },
            plain_router(),
        ),
    ];
    let inputs = [RouterInput::BaseHidden, RouterInput::LayerInput, RouterInput::ModuleInput];
    for input in inputs {
        let scope = match input {
            RouterInput::ModuleInput => RouterScope::Module,
            RouterInput::LayerInput => RouterScope::Layer,
            _ => RouterScope::Shared,
        };
        let level = RoutingLevel::Sequence;
        let router = RouterConfig { input, scope, level, ..plain_router() };
        mixtures.push(new(&format!("{input:?}"), plain(), lora(3, 4, all), router));
    }
    let router = RouterConfig { top_k: Some(2), ..plain_router() };
    mixtures.push(new("top 2", plain(), lora(6, 4, all), router));
    let llama = family_specs().into_iter().filter(|(name, _)| *name != "gpt2");
    mixtures.extend(llama.map(|(name, base)| {
        let lora = LoraConfig { num_experts: 2, rank: 4, ..LoraConfig::default() };
        let base = DecoderSpec { max_positions: 96, ..base };
        new(name, base, lora, plain_router())
    }));
    mixtures
}

impl Mixture {
    /// The mixture with random values, which are the same in every dtype.
    fn model(&self, kind: Kind, kernels: Kernels, device: Device) -> Result<RoutedModel> {
        tch::manual_seed(7);
        let base = tiny_base(self.base.clone());
        let mut specs = ExpertSpec::all(&self.lora, &self.base)?;
        specs.extend(ExpertSpec::of_shared(&self.lora, &self.base)?);
        let router = RouterSpec::from(&self.router);
        let compute = |kind, kernels| Compute { kind, kernels };
        let exact = compute(Kind::Double, Kernels::Reference);
        let values = RoutedModel::with_experts(&base, &specs, &router, Device::Cpu, exact);
        randomize(&values)?;
        let tensors: BTreeMap<String, Tensor> = values.tensors().into_iter().collect();
        let compute = compute(kind, kernels);
        RoutedModel::from_tensors(&base, &specs, &router, &tensors, device, compute)
    }
}

const PROMPTS: [&[i64]; 3] = [&[3, 14, 5, 9, 26], &[27, 45], &[1, 33, 19, 29, 40, 50, 51]];

/// The logits of some steps behind the prompts, `[steps, texts, v]`. Each step appends the same
/// token to all texts.
fn forced(model: &RoutedModel, source: &RoutingSource) -> Tensor {
    let cache = model.generation_cache(PROMPTS.len(), 96);
    model.prepare_steps();
    let mut texts: Vec<Vec<i64>> = PROMPTS.iter().map(|prompt| prompt.to_vec()).collect();
    let mut past = [0; PROMPTS.len()];
    let mut all = vec![];
    for step in 0..70 {
        let rows: Vec<StepRow<'_>> = texts
            .iter()
            .zip(past)
            .zip(PROMPTS)
            .map(|((text, past), prompt)| StepRow {
                past,
                tokens: &text[past..],
                prompt_len: prompt.len(),
                active_from: &[],
            })
            .collect();
        let inputs = cache.inputs(0, &rows, model.device());
        let hidden = model.forward(&inputs, source, ForwardMode::EVAL, None).hidden;
        past = std::array::from_fn(|row| texts[row].len());
        if step > 0 {
            all.push(model.next_tokens(&hidden.select(1, 0), None).0);
        }
        for text in &mut texts {
            text.push((7 * step + 11) % 53);
        }
    }
    Tensor::stack(&all, 0).to_device(Device::Cpu).to_kind(Kind::Double)
}

fn distance(x: &Tensor, y: &Tensor) -> f64 {
    ((x - y).norm() / y.norm()).double_value(&[])
}

#[test]
#[expect(clippy::print_stderr, reason = "the ratio is of interest when the test runs on a GPU")]
fn steps_by_kernels_equal_the_reference() -> Result<()> {
    let device = device()?;
    let _guard = seed(5);
    let _no_grad = tch::no_grad_guard();
    let (mut by_kernels, mut by_reference) = (0.0, 0.0);
    for mixture in mixtures() {
        let mut sources = vec![RoutingSource::Router, RoutingSource::Base];
        if mixture.lora.num_experts > 1 {
            sources.extend([RoutingSource::Expert(1), RoutingSource::Uniform]);
        }
        for source in sources {
            let logits = |kind, kernels, device| -> Result<Tensor> {
                Ok(forced(&mixture.model(kind, kernels, device)?, &source))
            };
            let what = format!("{}, {source:?}", mixture.name);
            let exact = logits(Kind::Double, Kernels::Reference, Device::Cpu)?;
            let found = distance(&logits(Kind::Float, Kernels::Auto, device)?, &exact);
            assert!(found < 2e-5, "{what}: {found:e} in f32");
            let kernels = distance(&logits(Kind::BFloat16, Kernels::Auto, device)?, &exact);
            let reference = distance(&logits(Kind::BFloat16, Kernels::Reference, device)?, &exact);
            assert!(kernels < 1.5 * reference + 1e-3, "{what}: {kernels:e}, not {reference:e}");
            by_kernels += kernels;
            by_reference += reference;
        }
    }
    let ratio = by_kernels / by_reference;
    eprintln!("bf16: {ratio:.3} of the reference's distance");
    assert!(ratio < 1.05, "{ratio} of the reference's distance in bf16");
    Ok(())
}

/// The tokens of texts that begin and end at different times, with different routing, and the
/// logarithms of their probabilities.
fn texts(model: &RoutedModel, wants_weights: bool) -> Result<Vec<(Vec<i64>, Vec<f64>)>> {
    let limits = EngineLimits { max_texts: 3, context: 96 };
    let mut engine = Engine::new(model, limits)?;
    let num_experts = model.num_experts() as usize;
    let mut numbers = vec![];
    for index in 0..7 {
        let mut weights = vec![0.0; num_experts];
        let route = match index % 3 {
            1 => {
                *weights.last_mut().expect("there are experts") = 1.0;
                Route::Fixed(weights)
            }
            2 if index == 5 => Route::Fixed(weights),
            _ => Route::Router,
        };
        numbers.push(engine.add(Request {
            key: index,
            prompt: PROMPTS[index as usize % 3].to_vec(),
            max_new_tokens: 5 + 9 * index as usize,
            sampling: Sampling::GREEDY,
            route,
            end_tokens: Arc::new([]),
            num_alternatives: 0,
            wants_weights,
        })?);
    }
    let mut texts = vec![(vec![], vec![]); numbers.len()];
    while !engine.is_idle() {
        for event in engine.step() {
            let text = numbers.iter().position(|number| *number == event.text).expect("added");
            texts[text].0.push(event.token.id);
            texts[text].1.push(event.token.log_prob);
        }
    }
    Ok(texts)
}

#[test]
fn texts_by_graphs_equal_the_reference() -> Result<()> {
    let device = device()?;
    let _guard = seed(6);
    for mixture in mixtures() {
        let model = mixture.model(Kind::Float, Kernels::Auto, device)?;
        let exact = mixture.model(Kind::Float, Kernels::Reference, Device::Cpu)?;
        let expected = texts(&exact, false)?;
        // without weights, a step begins before the tokens of the one in front of it are read
        for wants_weights in [true, false] {
            let found = texts(&model, wants_weights)?;
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let what = format!("{}, text {index}", mixture.name);
                assert_eq!(found.0, expected.0, "{what}");
                let pairs = found.1.iter().zip(&expected.1);
                let far = pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                assert!(far < 1e-4, "{what}: {far:e}");
            }
        }
    }
    Ok(())
}
