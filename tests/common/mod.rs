//! Helpers that several test files share: golden files, tiny models and comparisons.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use dylora::config::{
    LoraConfig, RouterConfig, RouterInput, RouterScope, RoutingChoice, TargetModules,
};
use dylora::dist::World;
use dylora::eval::routing::{RouterLosses, SiteExperts, SiteTotals, fetch};
use dylora::model::batch::Labelled;
use dylora::model::decoder::Decoder;
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::families;
use dylora::model::loss::LossSettings;
use dylora::model::routing::router::{RouterSpec, Routing};
use dylora::model::routing::totals::{RoutingTotals, add_totals};
use dylora::model::{ForwardMode, Inputs, RoutedModel, RoutingSource, Rows};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// f64 on the CPU.
pub const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

/// The inputs that a router can read.
pub const ROUTER_INPUTS: [RouterInput; 3] =
    [RouterInput::Embeddings, RouterInput::BaseHidden, RouterInput::LayerInput];

/// The scopes that routers can have.
pub const SCOPES: [RouterScope; 3] = [RouterScope::Shared, RouterScope::Layer, RouterScope::Module];

/// The path of a file in `tests/golden`.
pub fn golden_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The largest absolute difference of two tensors of the same shape; NaN if either holds a NaN.
pub fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if a.numel() == 0 {
        return 0.0;
    }
    (a.detach().to_kind(Kind::Double) - b.detach().to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[])
}

/// Checks that no elements of two tensors differ by more than `tolerance`.
#[track_caller]
pub fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    let difference = max_difference(a, b);
    assert!(difference <= tolerance, "{what}: {difference:e} is more than {tolerance:e}");
}

/// Checks that two sets of gradients have the same names, and that each gradient in `a` differs
/// from its counterpart in `b` by at most `tolerance` times the largest element of the latter. Also
/// checks that no parameter's gradient is zero for all experts. It may be zero for some: with top-k
/// routing, a few tokens need not choose every expert.
#[track_caller]
pub fn assert_same_gradients(
    a: &BTreeMap<String, Tensor>,
    b: &BTreeMap<String, Tensor>,
    tolerance: f64,
) {
    assert!(a.keys().eq(b.keys()), "{:?} are not {:?}", a.keys(), b.keys());
    let mut largest: BTreeMap<String, f64> = BTreeMap::new();
    for (name, a) in a {
        let scale = b[name].abs().max().double_value(&[]);
        assert_close(&format!("gradient of `{name}`"), a, &b[name], tolerance * scale);
        let parts = name.split('.').filter(|part| !part.starts_with("expert_"));
        let of_all = largest.entry(parts.collect::<Vec<_>>().join(".")).or_default();
        *of_all = of_all.max(scale);
    }
    for (name, scale) in largest {
        assert!(scale > 0.0, "the gradient of `{name}` is zero");
    }
}

static GENERATOR: Mutex<()> = Mutex::new(());

/// Seeds libtorch's default generator, which all threads share, and keeps other tests from using it
/// while the guard lives. It also sets libtorch to one thread: the tensors are so tiny that several
/// threads would wait for each other ten times as long as they compute.
pub fn seed(seed: i64) -> MutexGuard<'static, ()> {
    let guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::set_num_threads(1);
    tch::manual_seed(seed);
    guard
}

/// A GPT-2 of 2 layers, width 16 and 61 tokens.
pub fn tiny_config() -> DecoderSpec {
    gpt2_spec(2, 4, 16)
}

/// A GPT-2 of this shape, with 32 positions and 61 tokens.
pub fn gpt2_spec(n_layer: i64, n_head: i64, n_embd: i64) -> DecoderSpec {
    let json = json!({
        "model_type": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
        "n_positions": 32, "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0,
    });
    families::from_json(&json).expect("the shape is sound")
}

/// A tiny base of each family with the settings that only it has.
pub fn family_specs() -> Vec<(&'static str, DecoderSpec)> {
    let own = [
        ("gpt2", json!({"n_layer": 3, "n_head": 4, "n_embd": 16, "n_positions": 32})),
        (
            "llama",
            json!({
                "attention_bias": true, "mlp_bias": true, "num_key_value_heads": 1,
                "rope_scaling": {
                    "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16
                },
            }),
        ),
        ("qwen2", json!({"use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1})),
        ("qwen3", json!({"head_dim": 6, "tie_word_embeddings": true})),
        (
            "smollm3",
            json!({
                "no_rope_layer_interval": 2, "use_sliding_window": true, "sliding_window": 2,
            }),
        ),
        ("mistral", json!({"sliding_window": 4, "head_dim": 8})),
    ];
    let spec = |(family, own): (&'static str, serde_json::Value)| {
        let mut config = json!({
            "model_type": family, "hidden_size": 16, "intermediate_size": 20,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 32, "vocab_size": 61, "rope_theta": 20.0,
            "eos_token_id": 0, "bos_token_id": 0,
        });
        let own = own.as_object().expect("it is an object").clone();
        config.as_object_mut().expect("it is an object").extend(own);
        (family, families::from_json(&config).expect("the shape is sound"))
    };
    own.into_iter().map(spec).collect()
}

/// A base of the shape `config` whose parameters are all random, biases and LayerNorms included.
pub fn tiny_base(config: DecoderSpec) -> Decoder {
    let tensors = config.parameter_shapes().into_iter().map(|(name, shape)| {
        // the weight of a normalisation is the only vector that is a weight
        let mean = if shape.len() == 1 && name.ends_with("weight") { 1.0 } else { 0.0 };
        (name, Tensor::randn(&shape, DOUBLE) * 0.3 + mean)
    });
    let tensors = tensors.collect();
    Decoder::new(config, tensors)
}

/// Three experts of scaling 1.5 on every linear layer.
pub fn tiny_lora() -> LoraConfig {
    LoraConfig {
        num_experts: 3,
        rank: 4,
        alpha: 6.0,
        target_modules: TargetModules::all(),
        ..LoraConfig::default()
    }
}

/// The router that golden files, listed numbers and most identities are about: one for all layers.
/// It reads the embeddings as they are, passes its gradient on to its input and is not supervised.
pub fn plain_router() -> RouterConfig {
    RouterConfig {
        input: RouterInput::Embeddings,
        scope: RouterScope::Shared,
        normalize_input: false,
        detach_input: false,
        domain_supervision: Some(0.0),
        ..RouterConfig::default()
    }
}

/// [`plain_router`] with the keys of `text`, a section `[router]`, in place of its own.
pub fn router_of(text: &str) -> Result<RouterConfig> {
    let mut table = toml::Table::try_from(plain_router())?;
    table.extend(toml::from_str::<toml::Table>(text)?);
    Ok(table.try_into()?)
}

/// Overrides that give a config the plain settings that listed numbers belong to:
/// [`plain_router`], each expert's own alpha, a constant learning rate and no clipping.
const PLAIN: [&str; 10] = [
    "router.input=embeddings",
    "router.scope=shared",
    "router.normalize_input=false",
    "router.detach_input=false",
    "router.domain_supervision=0.0",
    "lora.scale=per_expert",
    "schedule={kind='constant', warmup_steps=0, min_ratio=0.0}",
    "optimizer.max_grad_norm=0.0",
    "optimizer.adapters.learning_rate=1e-3",
    "optimizer.router.learning_rate=1e-3",
];

/// The plain settings and then `set`, as overrides.
pub fn plain_and(set: &[&str]) -> Vec<String> {
    PLAIN.iter().chain(set).map(|item| (*item).to_owned()).collect()
}

/// [`tiny_base`] with experts and routers, all of whose parameters are random.
pub fn tiny_model(lora: &LoraConfig, router: &RouterConfig, kind: Kind) -> Result<RoutedModel> {
    let base = tiny_base(tiny_config());
    let model = new_model(&base, lora, router, kind);
    randomize(&model)?;
    Ok(model)
}

/// A base with new experts and routers.
pub fn new_model(
    base: &Decoder,
    lora: &LoraConfig,
    router: &RouterConfig,
    kind: Kind,
) -> RoutedModel {
    let specs = ExpertSpec::all(lora, &base.spec).expect("the config fits the base");
    RoutedModel::with_experts(base, &specs, &RouterSpec::from(router), Device::Cpu, kind)
}

/// Overwrites the parameters of the experts and routers, except the initial A and B, with random
/// values. Magnitudes stay above zero.
pub fn randomize(model: &RoutedModel) -> Result<()> {
    let tensors = model.tensors().into_iter().filter(|(name, _)| !name.contains("initial"));
    let random = tensors.map(|(name, tensor)| {
        let noise = Tensor::randn(tensor.size(), DOUBLE);
        let values = if name.ends_with("magnitude") { noise.abs() + 0.5 } else { noise * 0.3 };
        (name, values)
    });
    model.load_some(&random.collect())
}

/// Rows that are one document each, with a label at every position except the last.
pub fn rows(rows: &[&[i64]]) -> Inputs {
    let labels: Vec<i64> = rows.iter().flat_map(|row| [&row[1..], &[-100]].concat()).collect();
    labelled_rows(rows, &labels)
}

/// Rows that are one document each, with the given labels.
pub fn labelled_rows(rows: &[&[i64]], labels: &[i64]) -> Inputs {
    let seq_len = rows[0].len();
    let positions: Vec<i64> = rows.iter().flat_map(|row| 0..row.len() as i64).collect();
    let rows = Rows {
        num_rows: rows.len(),
        seq_len,
        input_ids: &rows.concat(),
        labels,
        position_ids: &positions,
        document_ids: &vec![0; rows.len() * seq_len],
        expert_ids: None,
        prompt: None,
    };
    Inputs::new(rows, Device::Cpu)
}

/// Two rows of seven tokens.
pub fn two_rows() -> Inputs {
    rows(&[&[3, 14, 15, 9, 26, 5, 35], &[27, 18, 28, 18, 28, 45, 9]])
}

/// Settings for the mean loss over `num_labels` labels with gradients, in chunks of 5 tokens.
pub fn mean_loss(num_labels: i64) -> LossSettings {
    LossSettings {
        chunk_tokens: 5,
        label_smoothing: 0.0,
        scale: (1.0 / num_labels as f64).into(),
        with_grad: true,
    }
}

/// The logits `[b, t, v]` of a forward pass for evaluation.
pub fn logits(model: &RoutedModel, inputs: &Inputs, source: &RoutingSource) -> Tensor {
    model.logits(&model.forward(inputs, source, ForwardMode::EVAL, None).hidden)
}

/// Splits the tensors `h.{layer}.{module}.lora_{a,b}`, `[e, ..]`, of golden files into the tensors
/// of single experts. Other tensors stay as they are.
pub fn unstack(tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let mut unstacked = BTreeMap::new();
    for (name, tensor) in tensors {
        match name.rsplit_once('.') {
            Some((module, key)) if key.starts_with("lora_") => {
                for expert in 0..tensor.size()[0] {
                    let name = format!("{module}.expert_{expert}.{key}");
                    unstacked.insert(name, tensor.get(expert));
                }
            }
            _ => {
                unstacked.insert(name.clone(), tensor.shallow_clone());
            }
        }
    }
    unstacked
}

/// The gradients of `loss` by every trained parameter, under the parameter's name and in its layout
/// in checkpoints. They are zero where `loss` does not depend on the parameter.
pub fn gradients(model: &RoutedModel, loss: &Tensor) -> BTreeMap<String, Tensor> {
    let trained = model.trained(RoutingChoice::Router, None);
    let leaf_grads = Tensor::run_backward(&[loss], &trained.leaves, false, false);
    let leaf_grads = leaf_grads.into_iter().zip(&trained.leaves);
    let leaf_grads: Vec<Tensor> = leaf_grads
        .map(|(grad, leaf)| if grad.defined() { grad } else { leaf.detach().zeros_like() })
        .collect();
    let names = trained.parameters.iter().map(|parameter| parameter.name.clone());
    names
        .zip(trained.split(&leaf_grads))
        .map(|(name, grad)| {
            let grad = match name.rsplit_once('.') {
                Some((_, "lora_b")) => grad.tr(),
                Some((_, "magnitude")) => grad.squeeze_dim(0),
                _ => grad,
            };
            (name, grad.contiguous())
        })
        .collect()
}

/// Adds a batch's totals at each site to `totals`. All tokens are of one domain.
///
/// - `rows`: indices of the batch's label tokens among its flattened tokens
pub fn add_of_one_domain(totals: &mut Vec<RoutingTotals>, routing: &[Routing], rows: &Tensor) {
    let groups = rows.zeros_like();
    add_totals(totals, routing, Labelled { rows, groups: &groups, num_groups: 1, counted: None });
}

/// The totals on the host, of sites that route over all of their experts.
pub fn on_the_host(totals: &[RoutingTotals]) -> Vec<SiteTotals> {
    let site = |(index, totals): (usize, &RoutingTotals)| SiteExperts {
        site: format!("place {index}"),
        experts: (0..totals.num_experts() as usize).collect(),
    };
    let num_groups = totals.first().map_or(0, |of| of.tokens().numel());
    fetch(totals.iter().enumerate().map(site).collect(), totals, num_groups, &World::single())
        .expect("they are f64 on the CPU")
}

/// The routers' losses over the tokens that `totals` counts.
pub fn losses_of(totals: &[RoutingTotals]) -> RouterLosses {
    RouterLosses::new(&on_the_host(totals)).expect("there is a router")
}
