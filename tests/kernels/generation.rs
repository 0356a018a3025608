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
use dylora::model::decoder::spec::{DecoderSpec, Windows};
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

fn new(name: &str, base: DecoderSpec, lora: LoraConfig, router: RouterConfig) -> Mixture {
    Mixture { name: name.into(), base, lora, router }
}

fn mixtures() -> Vec<Mixture> {
    let all = Family::Gpt2.modules();
    let of_shape = |heads, size| shape(heads, size, 53, 200);
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
        new("head 36", of_shape(2, 36), lora(2, 4, all), plain_router()),
        new(
            "windows",
            DecoderSpec {
                windows: Some(Windows { size: 20, layers: vec![true, false] }),
                ..plain()
            },
            lora(2, 4, all),
            plain_router(),
        ),
        new("DoRA", plain(), LoraConfig { use_dora: true, ..lora(2, 4, all) }, plain_router()),
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
    // the kernel in front of a layer's first product is the router's
    let of_ranks = lora(8, 40, all);
    mixtures.push(new("layer router, many ranks", plain(), of_ranks, layer_router()));
    let router = RouterConfig { top_k: Some(2), ..plain_router() };
    mixtures.push(new("top 2", plain(), lora(6, 4, all), router));
    // the first layer has no router
    let of_last = serde_json::json!(["h.1.mlp.c_fc", "h.1.mlp.c_proj"]);
    let of_last = serde_json::from_value(of_last).expect("these are target modules");
    let of_last = LoraConfig { target_modules: of_last, ..lora(2, 4, all) };
    let router = RouterConfig { scope: RouterScope::Module, ..plain_router() };
    mixtures.push(new("experts in the last layer", plain(), of_last, router));
    mixtures.extend(on_llama_like_bases());
    mixtures
}

/// For each Llama-like family, a mixture on a small base, and others on bases whose shapes the
/// kernels know.
fn on_llama_like_bases() -> Vec<Mixture> {
    let mut mixtures = vec![];
    let llama = family_specs().into_iter().filter(|(name, _)| *name != "gpt2");
    for (name, base) in llama {
        let of_ranks = |num_experts, rank| LoraConfig {
            num_experts,
            rank,
            shared_rank: if rank == 20 { 6 } else { 0 },
            ..LoraConfig::default()
        };
        let small = DecoderSpec { max_positions: 200, ..base };
        mixtures.push(new(name, small.clone(), of_ranks(2, 4), plain_router()));
        // shapes that kernels know
        let fitting = |head_dim, num_heads, num_kv_heads| DecoderSpec {
            head_dim,
            num_heads,
            num_kv_heads,
            width: 48,
            inner_width: 80,
            ..small.clone()
        };
        let named = |what: &str| format!("{name}, {what}");
        mixtures.push(new(&named("head 32"), fitting(32, 4, 2), of_ranks(2, 4), plain_router()));
        mixtures.push(new(&named("head 64"), fitting(64, 3, 1), of_ranks(3, 20), layer_router()));
        if name == "llama" {
            // the modules of a product have different routing weights
            let router = RouterConfig { scope: RouterScope::Module, ..plain_router() };
            let base = fitting(32, 4, 2);
            mixtures.push(new("routers of modules", base, of_ranks(2, 4), router));
        }
    }
    mixtures
}

/// A router in each layer, which reads the layer's input.
fn layer_router() -> RouterConfig {
    RouterConfig { scope: RouterScope::Layer, input: RouterInput::LayerInput, ..plain_router() }
}

/// Mixtures on wide bases. Kernels divide their products of few texts among clusters of blocks.
fn wide_mixtures() -> Vec<Mixture> {
    let gpt2 = lora(3, 24, Family::Gpt2.modules());
    let mut mixtures = vec![new("wide", shape(32, 64, 53, 64), gpt2, plain_router())];
    let llama = family_specs().into_iter().find(|(name, _)| *name == "llama");
    let (_, base) = llama.expect("there is a Llama");
    let base = DecoderSpec {
        head_dim: 64,
        num_heads: 32,
        num_kv_heads: 8,
        width: 2048,
        inner_width: 4096,
        max_positions: 64,
        ..base
    };
    let experts = LoraConfig { num_experts: 3, rank: 12, ..LoraConfig::default() };
    mixtures.push(new("wide llama", base, experts, layer_router()));
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

/// A prompt of some tokens, which differs from text to text.
fn prompt(text: usize, len: usize) -> Vec<i64> {
    (0..len).map(|i| ((31 * i * i + 17 * text + 7 * i + 3) % 53) as i64).collect()
}

/// A prompt of each length.
fn prompts(lens: &[usize]) -> Vec<Vec<i64>> {
    lens.iter().enumerate().map(|(text, &len)| prompt(text, len)).collect()
}

/// Prompts, and the number of steps behind them.
struct Steps {
    prompts: Vec<Vec<i64>>,
    count: i64,
    context: usize,
}

impl Steps {
    fn few() -> Self {
        Self { prompts: prompts(&[5, 2, 7]), count: 70, context: 96 }
    }

    /// Steps of `count` texts.
    fn of_wide(count: usize) -> Self {
        let lens: Vec<usize> = (0..count).map(|text| 1 + 5 * text % 8).collect();
        Self { prompts: prompts(&lens), count: 4, context: 32 }
    }

    /// Texts of very different lengths, for which attention is split into parts.
    fn long() -> Self {
        Self { prompts: prompts(&[3, 700, 1000]), count: 6, context: 1024 }
    }

    fn many() -> Self {
        let prompts = (0..17).map(|text| prompt(text, 1 + 5 * text)).collect();
        Self { prompts, count: 20, context: 128 }
    }

    /// The logits of the steps, `[steps, texts, v]`. Each step appends the same token to all texts.
    fn logits(&self, model: &RoutedModel, source: &RoutingSource) -> Tensor {
        let cache = model.generation_cache(self.prompts.len(), self.context);
        model.prepare_steps();
        let mut texts = self.prompts.clone();
        let mut past = vec![0; texts.len()];
        let mut all = vec![];
        for step in 0..self.count {
            let rows: Vec<StepRow<'_>> = texts
                .iter()
                .zip(&past)
                .zip(&self.prompts)
                .map(|((text, &past), prompt)| StepRow {
                    past,
                    tokens: &text[past..],
                    prompt_len: prompt.len(),
                    active_from: &[],
                })
                .collect();
            let inputs = cache.inputs(0, &rows, model.device());
            let hidden = model.forward(&inputs, source, ForwardMode::EVAL, None).hidden;
            past = texts.iter().map(Vec::len).collect();
            if step > 0 {
                all.push(model.next_tokens(&hidden.select(1, 0), None).0);
            }
            for text in &mut texts {
                text.push((7 * step + 11) % 53);
            }
        }
        Tensor::stack(&all, 0).to_device(Device::Cpu).to_kind(Kind::Double)
    }
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
    let of_length = |max_positions| shape(2, 32, 53, max_positions);
    let of_all_layers = |name: &str, max_positions| {
        new(name, of_length(max_positions), lora(3, 4, Family::Gpt2.modules()), plain_router())
    };
    let mut cases: Vec<_> = mixtures().into_iter().map(|mixture| (mixture, Steps::few())).collect();
    cases.push((of_all_layers("long", 1024), Steps::long()));
    cases.push((of_all_layers("many", 128), Steps::many()));
    if device.is_cuda() {
        // without kernels, these would only take long
        for count in [1, 2, 3, 4, 8, 11, 16] {
            cases.extend(
                wide_mixtures().into_iter().map(|mixture| (mixture, Steps::of_wide(count))),
            );
        }
    }
    for (mixture, steps) in cases {
        let is_wide = mixture.base.width >= 2048;
        let mut sources = vec![RoutingSource::Router];
        if !is_wide {
            sources.push(RoutingSource::Base);
        }
        if mixture.lora.num_experts > 1 && !is_wide {
            sources.extend([RoutingSource::Expert(1), RoutingSource::Uniform]);
        }
        for source in sources {
            let logits = |kind, kernels, device| -> Result<Tensor> {
                Ok(steps.logits(&mixture.model(kind, kernels, device)?, &source))
            };
            let what = format!("{}, {source:?}", mixture.name);
            let exact = logits(Kind::Double, Kernels::Reference, Device::Cpu)?;
            let found = distance(&logits(Kind::Float, Kernels::Auto, device)?, &exact);
            if found >= 2e-5 {
                // some random bases amplify rounding errors
                let reference = logits(Kind::Float, Kernels::Reference, Device::Cpu)?;
                let reference = distance(&reference, &exact);
                assert!(found < 1.5 * reference, "{what}: {found:e} in f32, not {reference:e}");
            }
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

/// Texts that an engine generates.
#[derive(Clone)]
struct Load {
    num_texts: usize,
    max_texts: usize,
    wants_weights: bool,
    end_tokens: Arc<[i64]>,
    /// A text, and the number of tokens after which it is cancelled.
    cancelled: Option<(usize, usize)>,
}

/// The tokens of a text and the logarithms of their probabilities.
type Generated = (Vec<i64>, Vec<f64>);

impl Load {
    fn new(num_texts: usize, max_texts: usize) -> Self {
        let end_tokens = Arc::new([]);
        Self { num_texts, max_texts, wants_weights: false, end_tokens, cancelled: None }
    }

    /// Text `index` of a mixture. The longest has more than 128 positions. A third of the texts has
    /// routing weights of its own.
    fn request(&self, index: usize, num_experts: usize) -> Request {
        let mut weights = vec![0.0; num_experts];
        let route = match index % 3 {
            1 => {
                *weights.last_mut().expect("there are experts") = 1.0;
                Route::Fixed(weights)
            }
            2 if index == 5 => Route::Fixed(weights),
            _ => Route::Router,
        };
        Request {
            key: index as u64,
            prompt: prompt(index, 2 + index % 5),
            max_new_tokens: 5 + 22 * (index % 7),
            sampling: Sampling::GREEDY,
            route,
            end_tokens: self.end_tokens.clone(),
            num_alternatives: 0,
            wants_weights: self.wants_weights,
        }
    }

    /// Generates the texts. They begin and end at different times.
    fn run(&self, model: &RoutedModel) -> Result<Vec<Generated>> {
        let limits = EngineLimits { max_texts: self.max_texts, context: 200 };
        let mut engine = Engine::new(model, limits)?;
        let num_experts = model.num_experts() as usize;
        let add = |index| engine.add(self.request(index, num_experts));
        let numbers = (0..self.num_texts).map(add).collect::<Result<Vec<_>>>()?;
        let mut texts = vec![(vec![], vec![]); numbers.len()];
        while !engine.is_idle() {
            for event in engine.step() {
                let text = numbers.iter().position(|number| *number == event.text).expect("added");
                texts[text].0.push(event.token.id);
                texts[text].1.push(event.token.log_prob);
                if Some((text, texts[text].0.len())) == self.cancelled {
                    engine.cancel(event.text);
                }
            }
        }
        Ok(texts)
    }
}

/// How far a logarithm of a probability may lie from the reference in f32. Logits reach about 12
/// and may be off by 2e-5 of that, as in [`steps_by_kernels_equal_the_reference`]; so may the
/// logarithm of their sum.
const LOG_PROB_BOUND: f64 = 2.0 * 2e-5 * 12.0;

/// Compares the texts of a model with those of the reference.
fn compare(what: &str, found: &[Generated], expected: &[Generated]) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.0, expected.0, "{what}, text {index}");
        let pairs = found.1.iter().zip(&expected.1);
        let far = pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        assert!(far < LOG_PROB_BOUND, "{what}, text {index}: {far:e}");
    }
}

#[test]
fn texts_by_graphs_equal_the_reference() -> Result<()> {
    let device = device()?;
    let _guard = seed(6);
    for mixture in mixtures() {
        let model = mixture.model(Kind::Float, Kernels::Auto, device)?;
        let exact = mixture.model(Kind::Float, Kernels::Reference, Device::Cpu)?;
        let load = Load::new(7, 3);
        let expected = load.run(&exact)?;
        // without weights, a step begins before the tokens of the one in front of it are read
        for wants_weights in [true, false] {
            let load = Load { wants_weights, ..load.clone() };
            compare(&mixture.name, &load.run(&model)?, &expected);
        }
        // texts end while the next step is under way
        let end_tokens = [expected[6].0[70], expected[3].0[9]].into();
        let load = Load { end_tokens, cancelled: Some((2, 7)), ..load };
        compare(&format!("{}, ended", mixture.name), &load.run(&model)?, &load.run(&exact)?);
        if mixture.router.scope == RouterScope::Layer && mixture.lora.shared_rank == 0 {
            // all texts have the router's weights, and nothing lies between its kernel and the
            // first product
            let load = Load::new(4, 1);
            let name = format!("{}, one by one", mixture.name);
            compare(&name, &load.run(&model)?, &load.run(&exact)?);
        }
    }
    Ok(())
}

#[test]
fn many_texts_by_graphs_equal_the_reference() -> Result<()> {
    let device = device()?;
    let _guard = seed(8);
    for mixture in mixtures().into_iter().take(4) {
        let model = mixture.model(Kind::Float, Kernels::Auto, device)?;
        let exact = mixture.model(Kind::Float, Kernels::Reference, Device::Cpu)?;
        let load = Load::new(30, 17);
        compare(&mixture.name, &load.run(&model)?, &load.run(&exact)?);
    }
    Ok(())
}
