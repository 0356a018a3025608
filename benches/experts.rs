//! Times several ways to compute the experts of one target module under top-k routing: a linear
//! layer of GPT-2 has E experts of rank r, of which each token uses k.
//!
//! ```text
//! cargo bench --bench experts -- --device cpu|cuda [--tokens N] [--json]
//! ```
//!
//! | column | what is timed |
//! |---|---|
//! | `base` | the frozen layer without experts |
//! | `fused` | all experts for every token, at once |
//! | `each` | only the chosen experts, by one pair of matrix products for each expert |
//! | `grouped` | only the chosen experts, by `at::_grouped_mm` |
//! | `sort` | sorting the assignments by expert, which a model does once for all modules |
//!
//! A run computes the forward pass and the gradients of x, A, B and the routing weights; for
//! `base`, the gradient of x only. A time is the median wall-clock time of samples, which the forms
//! take in turn. A sample is one run on the CPU and the mean of ten runs on CUDA. The table shows
//! `fused`, `base` and `sort` in milliseconds, and `base`, `each` and `grouped` relative to
//! `fused`. Its last columns, `d each` and `d grouped`, are the largest differences from `fused` in
//! the output or a gradient, relative to the largest element of that tensor. The dtype is f32 on
//! the CPU; on CUDA it is bf16, with A and B in f32.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use dylora::config::{LoraConfig, ModulePath, RoutingChoice, TargetModule};
use dylora::ffi;
use dylora::model::RoutedModel;
use dylora::model::decoder::Decoder;
use dylora::model::experts::assignments::Assignments;
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::grouped::Products;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::experts::weights::RoutingWeights;
use dylora::model::families;
use dylora::model::routing::router::RouterSpec;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const MODULES: [TargetModule; 2] = [TargetModule::AttnCAttn, TargetModule::MlpCProj];
const NUM_EXPERTS: [i64; 4] = [4, 8, 16, 64];
const RANKS: [i64; 4] = [8, 16, 64, 128];
const TOP_K: [i64; 2] = [1, 2];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Base,
    Fused,
    By(Products),
}

const FORMS: [(&str, Form); 4] = [
    ("base", Form::Base),
    ("fused", Form::Fused),
    ("each", Form::By(Products::Each)),
    ("grouped", Form::By(Products::Grouped)),
];

struct Options {
    device: Device,
    num_tokens: i64,
    json: bool,
}

fn main() -> Result<()> {
    let options = options()?;
    if !options.json {
        println!(
            "{} tokens on {:?}, {} threads",
            options.num_tokens,
            options.device,
            tch::get_num_threads()
        );
        println!(
            "{:<12} {:>3} {:>4} {:>2}  {:>9} {:>9}  {:>7} {:>7} {:>7}  {:>8}  {:>8} {:>8}",
            "module",
            "E",
            "r",
            "k",
            "fused, ms",
            "base, ms",
            "base",
            "each",
            "grouped",
            "sort, ms",
            "d each",
            "d grouped"
        );
    }
    for module in MODULES {
        for num_experts in NUM_EXPERTS {
            for rank in RANKS {
                for k in TOP_K {
                    let row = Case::new(module, num_experts, rank, k, &options).row()?;
                    print(&row, options.json);
                }
            }
        }
    }
    Ok(())
}

fn options() -> Result<Options> {
    let (mut device, mut num_tokens, mut json) = (None, None, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // cargo passes this flag to every bench
            "--bench" => {}
            "--json" => json = true,
            "--device" => device = Some(args.next().context("`--device` needs `cpu` or `cuda`")?),
            "--tokens" => {
                let value = args.next().context("`--tokens` needs a number")?;
                num_tokens = Some(value.parse().context("`--tokens` needs a number")?);
            }
            other => bail!("`{other}` is no option\nhint: `--device`, `--tokens`, `--json`"),
        }
    }
    // this must come before any other call of libtorch
    let cuda = ffi::load_cuda();
    let device = match device.as_deref() {
        Some("cpu") => Device::Cpu,
        Some("cuda") => cuda.map(|()| Device::Cuda(0)).map_err(|why| anyhow!("{why}"))?,
        _ => bail!("`--device cpu` or `--device cuda` is needed"),
    };
    let num_tokens = num_tokens.unwrap_or(if device.is_cuda() { 8 * 1024 } else { 512 });
    Ok(Options { device, num_tokens, json })
}

/// A layer, its experts and the tokens that they are applied to.
struct Case {
    model: RoutedModel,
    path: ModulePath,
    device: Device,
    rank: i64,
    x: Tensor,
    g: Tensor,
    selected: Tensor,
    assignments: Assignments,
    /// The gradient of the loss by the layer's output.
    dy: Tensor,
    /// The experts' A and B.
    leaves: Vec<Tensor>,
}

impl Case {
    fn new(module: TargetModule, num_experts: i64, rank: i64, k: i64, options: &Options) -> Self {
        tch::manual_seed(0);
        let device = options.device;
        let kind = if device.is_cuda() { Kind::BFloat16 } else { Kind::Float };
        let path = ModulePath { layer: 0, module };
        let model = model(module, num_experts, rank, device, kind);
        let linear = &model.base().blocks[0].linears[&module];
        let (i, o) = linear.weight().size2().expect("it is [i, o]");
        let n = options.num_tokens;
        let randn = |width, kind| Tensor::randn([1, n, width], (kind, device));
        let probs = randn(num_experts, Kind::Float).softmax(-1, Kind::Float);
        let (top, selected) = probs.topk(k, -1, true, false);
        let top = &top / top.sum_dim_intlist(-1, true, None);
        let g = probs.zeros_like().scatter(-1, &selected, &top).set_requires_grad(true);
        Self {
            assignments: Assignments::new(&selected, num_experts),
            x: randn(i, kind).set_requires_grad(true),
            dy: randn(o, kind),
            leaves: model.trained(RoutingChoice::Uniform, None).leaves,
            model,
            path,
            device,
            rank,
            g,
            selected,
        }
    }

    /// The gradients of x, g, A and B, in this order, and then the output. The base has only the
    /// gradient of x.
    fn run(&self, form: Form) -> Vec<Tensor> {
        let experts = self.model.experts(self.path).expect("they target the module");
        let linear = &self.model.base().blocks[0].linears[&self.path.module];
        let (x, g, none) = (&self.x, &self.g, LoraDropout::NONE);
        let y = linear.forward(x);
        let y = match form {
            Form::Base => y,
            Form::Fused => {
                experts.add(y, x, linear, &RoutingWeights::PerToken(g.shallow_clone()), none)
            }
            Form::By(products) => {
                experts.add_grouped_by(products, y, x, g, &self.assignments, none)
            }
        };
        let loss = y.view([-1]).dot(&self.dy.view([-1]));
        let mut wanted = vec![x.shallow_clone()];
        if form != Form::Base {
            wanted.push(g.shallow_clone());
            wanted.extend(self.leaves.iter().map(Tensor::shallow_clone));
        }
        let mut results = Tensor::run_backward(&[loss], &wanted, false, false);
        results.push(y.detach());
        results
    }

    /// The largest difference from the fused form in any result, relative to the result's largest
    /// element.
    fn difference(&self, form: Form) -> f64 {
        let (fused, other) = (self.run(Form::Fused), self.run(form));
        let differences = fused.iter().zip(&other).enumerate().map(|(at, (fused, other))| {
            let select = |x: &Tensor| {
                let x = x.to_kind(Kind::Double);
                // the fused form also has gradients of the routing weights of experts not chosen
                if at == 1 { x.gather(-1, &self.selected, false) } else { x }
            };
            let (fused, other) = (select(fused), select(other));
            let scale = fused.abs().max().double_value(&[]);
            (fused - other).abs().max().double_value(&[]) / scale
        });
        differences.fold(0.0, |a, b| if a > b { a } else { b })
    }

    fn row(&self) -> Result<Value> {
        let x_kind = self.x.kind();
        let [.., each, grouped] = FORMS.map(|(_, form)| self.difference(form));
        let (runs, budget) = if self.device.is_cuda() { (10, 0.3) } else { (1, 1.5) };
        let mut samples: [Vec<f64>; FORMS.len()] = Default::default();
        let mut sorts = vec![];
        let sample = |run: &dyn Fn()| -> Result<f64> {
            ffi::synchronize(self.device)?;
            let start = Instant::now();
            (0..runs).for_each(|_| run());
            ffi::synchronize(self.device)?;
            Ok(start.elapsed().as_secs_f64() * 1e3 / f64::from(runs))
        };
        let start = Instant::now();
        while samples[0].len() < 5 || start.elapsed() < Duration::from_secs_f64(budget) {
            for ((_, form), samples) in FORMS.iter().zip(&mut samples) {
                samples.push(sample(&|| drop(self.run(*form)))?);
            }
            let num_experts = self.model.num_experts();
            sorts.push(sample(&|| drop(Assignments::new(&self.selected, num_experts)))?);
        }
        let num_samples = sorts.len();
        let [base, fused, by_each, by_grouped] = samples.map(median);
        Ok(json!({
            "module": self.path.module,
            "num_experts": self.model.num_experts(),
            "rank": self.rank,
            "top_k": self.selected.size()[2],
            "num_tokens": self.x.size()[1],
            "kind": format!("{x_kind:?}"),
            "num_samples": num_samples,
            "fused_ms": fused,
            "base_ms": base,
            "each_ms": by_each,
            "grouped_ms": by_grouped,
            "sort_ms": median(sorts),
            "base_ratio": base / fused,
            "each_ratio": by_each / fused,
            "grouped_ratio": by_grouped / fused,
            "each_difference": each,
            "grouped_difference": grouped,
        }))
    }
}

/// A model of GPT-2's width with one block and a small vocabulary, and random experts on one
/// module.
fn model(
    module: TargetModule,
    num_experts: i64,
    rank: i64,
    device: Device,
    kind: Kind,
) -> RoutedModel {
    let config = families::from_json(&serde_json::json!({
        "model_type": "gpt2", "n_layer": 1, "n_positions": 8, "vocab_size": 64,
    }));
    let config = config.expect("the shape is sound");
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.02;
    let shapes = config.parameter_shapes().into_iter();
    let tensors = shapes.map(|(name, shape)| (name, random(&shape))).collect();
    let base = Decoder::new(config, tensors);
    let lora =
        LoraConfig { num_experts, rank, target_modules: [module].into(), ..LoraConfig::default() };
    let specs = ExpertSpec::all(&lora, &base.spec).expect("the config fits the base");
    let model = RoutedModel::with_experts(&base, &specs, &RouterSpec::default(), device, kind);
    let tensors = model.tensors().into_iter().map(|(name, tensor)| (name, random(&tensor.size())));
    model.load_some(&tensors.collect()).expect("the shapes are its own");
    model
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn print(row: &Value, as_json: bool) {
    if as_json {
        println!("{row}");
        return;
    }
    let number = |key: &str| row[key].as_f64().expect("it is a number");
    println!(
        "{:<12} {:>3} {:>4} {:>2}  {:>9.3} {:>9.3}  {:>7.2} {:>7.2} {:>7.2}  {:>8.3}  \
         {:>8.0e} {:>8.0e}",
        row["module"].as_str().expect("it is a string"),
        number("num_experts"),
        number("rank"),
        number("top_k"),
        number("fused_ms"),
        number("base_ms"),
        number("base_ratio"),
        number("each_ratio"),
        number("grouped_ratio"),
        number("sort_ms"),
        number("each_difference"),
        number("grouped_difference"),
    );
}
