//! What holds for a mixture on GPT-2 holds on every family, with each kind of expert.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{
    Config, DropoutMasks, LoraConfig, RouterConfig, RouterInput, RouterScope, TargetModule, load,
};
use dylora::export::merge::into_base;
use dylora::model::decoder::Decoder;
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{ForwardMode, Inputs, RoutedModel, RoutingSource, Rows};
use tch::{Device, Kind, Tensor};

use super::gradients::assert_slope;
use crate::common::{
    DOUBLE, assert_close, family_specs, gradients, logits, max_difference, mean_loss, new_model,
    plain_router, randomize, router_of, rows, seed, tiny_base,
};

/// Three experts of every kind that `[lora]` knows.
pub(super) fn kinds() -> Vec<(&'static str, LoraConfig)> {
    let all = "num_experts = 3\nrank = 2\nalpha = 3.0\n";
    let own = [
        ("plain", ""),
        ("rslora", "use_rslora = true"),
        ("dora", "use_dora = true"),
        ("pissa", "init = 'pissa'"),
        ("olora", "init = 'olora'"),
        ("alora", "experts = [{ alora_invocation_tokens = [18, 28] }]"),
        ("layers", "experts_per_layer = [1, 3, 2]"),
        ("ranks", "experts = [{ rank = 4 }, { use_dora = true, alpha = 1.0 }, { init = 'pissa' }]"),
    ];
    let lora = |(name, own): (&'static str, &str)| {
        let text = format!("{all}{own}");
        (name, toml::from_str(&text).expect("the settings are sound"))
    };
    own.into_iter().map(lora).collect()
}

/// Calls `check` for each family and kind of expert, on a model whose parameters are all random.
fn for_each(
    kind: Kind,
    router: &RouterConfig,
    check: impl Fn(&str, &Decoder, &LoraConfig, &RoutedModel) -> Result<()>,
) -> Result<()> {
    for (family, spec) in family_specs() {
        let base = tiny_base(spec);
        for (name, lora) in kinds() {
            let model = new_model(&base, &lora, router, kind);
            randomize(&model)?;
            check(&format!("{family}, {name}"), &base, &lora, &model)?;
        }
    }
    Ok(())
}

const DOCUMENTS: [&[i64]; 4] =
    [&[3, 18, 28, 9, 15, 7, 1], &[26, 5, 35], &[27, 18, 28, 18, 28, 4], &[45, 9]];

/// The documents in two rows of ten positions.
fn packed() -> Inputs {
    let [a, b, c, d] = DOCUMENTS;
    let labels = |document: &[i64]| [&document[1..], &[-100]].concat();
    let positions = |document: &[i64]| (0..document.len() as i64).collect::<Vec<_>>();
    let rows = Rows {
        num_rows: 2,
        seq_len: 10,
        input_ids: &[a, b, c, d, &[0, 0]].concat(),
        labels: &[labels(a), labels(b), labels(c), labels(d), vec![-100; 2]].concat(),
        position_ids: &[positions(a), positions(b), positions(c), positions(d), vec![0; 2]]
            .concat(),
        document_ids: &[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, -1, -1],
        expert_ids: None,
        prompt: None,
    };
    Inputs::new(rows, Device::Cpu)
}

/// The loss of the packed documents, and its gradients.
fn pass(
    model: &RoutedModel,
    source: &RoutingSource,
    mode: ForwardMode,
) -> (Tensor, BTreeMap<String, Tensor>) {
    let (loss, _) = model.loss(&packed(), source, mode, mean_loss(14));
    (loss.loss.shallow_clone(), gradients(model, &loss.loss))
}

/// Checks that two losses with their gradients differ by at most `tolerance`.
#[track_caller]
fn assert_same_pass(
    what: &str,
    (found_loss, found): &(Tensor, BTreeMap<String, Tensor>),
    (loss, expected): &(Tensor, BTreeMap<String, Tensor>),
    tolerance: f64,
) {
    assert_close(what, found_loss, loss, tolerance);
    assert!(found.keys().eq(expected.keys()), "{what}");
    for (name, found) in found {
        assert_close(&format!("{what}, {name}"), found, &expected[name], tolerance);
    }
}

/// Rows that are longer than every window, and that hold the invocation tokens.
fn whole_rows() -> Inputs {
    rows(&[&[3, 14, 18, 28, 26, 5, 35, 7], &[27, 18, 28, 18, 28, 45, 9, 11]])
}

#[test]
fn without_routing_weights_a_mixture_is_its_base() -> Result<()> {
    let _generator = seed(300);
    for_each(Kind::Float, &plain_router(), |what, base, _, model| {
        let plain = RoutedModel::plain(base, Device::Cpu, Kind::Float, false);
        for inputs in [whole_rows(), packed()] {
            let expected = logits(&plain, &inputs, &RoutingSource::Base);
            let found = logits(model, &inputs, &RoutingSource::Base);
            assert_close(what, &found, &expected, 0.0);
            let e = model.num_experts();
            let (b, t) = inputs.input_ids.size2()?;
            let none = RoutingSource::Given(Tensor::zeros([b, t, e], DOUBLE));
            assert_close(what, &logits(model, &inputs, &none), &expected, 1e-5);
        }
        Ok(())
    })
}

#[test]
fn one_hot_weights_are_an_expert_alone() -> Result<()> {
    let _generator = seed(301);
    for_each(Kind::Double, &plain_router(), |what, _, _, model| {
        let inputs = whole_rows();
        let (b, t) = inputs.input_ids.size2()?;
        let base = logits(model, &inputs, &RoutingSource::Base);
        for expert in 0..model.num_experts() {
            let one_hot = Tensor::zeros([b, t, model.num_experts()], DOUBLE);
            let _ = one_hot.narrow(-1, expert, 1).fill_(1.0);
            let found = logits(model, &inputs, &RoutingSource::Given(one_hot));
            let alone = logits(model, &inputs, &RoutingSource::Expert(expert));
            // an expert that its tokens have not invoked yet is off under its own weight, too
            if !what.ends_with("alora") || expert > 0 {
                assert_close(what, &found, &alone, 1e-10);
            }
            assert!(max_difference(&alone, &base) > 1e-3, "{what}: expert {expert} does nothing");
        }
        Ok(())
    })
}

#[test]
fn packed_documents_are_separate_ones() -> Result<()> {
    let _generator = seed(302);
    let router = RouterConfig { scope: RouterScope::Layer, top_k: Some(2), ..plain_router() };
    let router = RouterConfig { input: RouterInput::LayerInput, ..router };
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::Double, 1e-11)] {
        for_each(kind, &router, |what, _, _, model| {
            let by = &RoutingSource::Router;
            let loss = |inputs: &Inputs| model.loss(inputs, by, ForwardMode::EVAL, mean_loss(14)).0;
            let whole = loss(&packed());
            let separate = DOCUMENTS.map(|document| loss(&rows(&[document])));
            let losses: Vec<_> = separate.iter().map(|loss| &loss.token_losses).collect();
            let losses = Tensor::cat(&losses, 0);
            assert_close(what, &whole.token_losses, &losses, tolerance * 10.0);
            if kind == Kind::Double {
                let sum: Tensor = separate.iter().map(|loss| &loss.loss).sum();
                let expected = gradients(model, &sum);
                let found = gradients(model, &whole.loss);
                for (name, found) in &found {
                    assert_close(&format!("{what}, {name}"), found, &expected[name], tolerance);
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Each layer has a router of its own: the gradients of one for all layers are summed in another
/// order, which changes their last bit.
#[test]
fn checkpointed_blocks_are_the_same_to_the_bit() -> Result<()> {
    let _generator = seed(303);
    let router = RouterConfig { scope: RouterScope::Layer, ..plain_router() };
    let dropout = LoraDropout { probability: 0.3, masks: DropoutMasks::Shared };
    for_each(Kind::Float, &router, |what, _, _, model| {
        let [plain, checkpointed] = [false, true].map(|gradient_checkpointing| {
            tch::manual_seed(7);
            let mode = ForwardMode { dropout, gradient_checkpointing, ..ForwardMode::EVAL };
            pass(model, &RoutingSource::Router, mode)
        });
        assert_same_pass(what, &checkpointed, &plain, 0.0);
        Ok(())
    })
}

#[test]
fn experts_one_by_one_are_experts_at_once() -> Result<()> {
    let _generator = seed(304);
    for_each(Kind::Double, &plain_router(), |what, _, _, model| {
        let [together, one_by_one] = [DropoutMasks::Shared, DropoutMasks::PerExpert].map(|masks| {
            let dropout = LoraDropout { probability: 0.0, masks };
            pass(model, &RoutingSource::Router, ForwardMode { dropout, ..ForwardMode::EVAL })
        });
        assert_same_pass(what, &together, &one_by_one, 1e-11);
        Ok(())
    })
}

#[test]
fn merged_into_the_base_is_the_mixture_with_these_weights() -> Result<()> {
    let _generator = seed(305);
    let weights = [0.5, -0.25, 0.75];
    for_each(Kind::Float, &plain_router(), |what, base, _, model| {
        if what.ends_with("alora") {
            return Ok(());
        }
        let merged = into_base(model, base, &weights)?;
        let merged = RoutedModel::plain(&merged, Device::Cpu, Kind::Float, false);
        let inputs = whole_rows();
        let (b, t) = inputs.input_ids.size2()?;
        let given = Tensor::from_slice(&weights).expand([b, t, 3], false).contiguous();
        let expected = logits(model, &inputs, &RoutingSource::Given(given));
        let found = logits(&merged, &inputs, &RoutingSource::Base);
        assert_close(what, &found, &expected, 1e-4);
        Ok(())
    })
}

#[test]
fn a_mixture_survives_its_tensors() -> Result<()> {
    let _generator = seed(306);
    for (scope, prefix) in
        [(RouterScope::Layer, "layers.2.router"), (RouterScope::Shared, "router")]
    {
        let router = RouterConfig { scope, hidden_layers: 1, ..plain_router() };
        for_each(Kind::Double, &router, |what, base, lora, model| {
            let specs = ExpertSpec::all(lora, &base.spec)?;
            let (tensors, spec) = (model.tensors(), RouterSpec::from(&router));
            let has_prefix = |name: &String| {
                name.starts_with(prefix) || name.starts_with(&prefix.replace("layers", "h"))
            };
            assert!(tensors.keys().any(has_prefix), "{what}: {:?}", tensors.keys());
            let read = RoutedModel::from_tensors(
                base,
                &specs,
                &spec,
                &tensors,
                Device::Cpu,
                Kind::Double,
            )?;
            let [found, expected] =
                [&read, model].map(|model| logits(model, &packed(), &RoutingSource::Router));
            assert_close(what, &found, &expected, 0.0);
            Ok(())
        })?;
    }
    Ok(())
}

/// bf16 has 8 bits of mantissa, so a few layers lose some hundredths of logits of size 1.
#[test]
fn bf16_is_near_f32() -> Result<()> {
    let _generator = seed(307);
    for (family, spec, name, lora) in family_specs().into_iter().flat_map(|(family, spec)| {
        kinds().into_iter().map(move |(name, lora)| (family, spec.clone(), name, lora))
    }) {
        let base = tiny_base(spec).to(Device::Cpu, Kind::BFloat16);
        let found = new_model(&base, &lora, &plain_router(), Kind::BFloat16);
        randomize(&found)?;
        let tensors: BTreeMap<String, Tensor> = found.tensors();
        let specs = ExpertSpec::all(&lora, &base.spec)?;
        let router = RouterSpec::from(&plain_router());
        let exact =
            RoutedModel::from_tensors(&base, &specs, &router, &tensors, Device::Cpu, Kind::Float)?;
        let by = RoutingSource::Router;
        let [found, exact] = [&found, &exact].map(|model| logits(model, &packed(), &by));
        let error = (found.to_kind(Kind::Float) - &exact).square().mean(Kind::Float).sqrt();
        let size = exact.square().mean(Kind::Float).sqrt();
        let share = error.double_value(&[]) / size.double_value(&[]);
        assert!(share > 0.0 && share < 0.05, "{family}, {name}: {share}");
    }
    Ok(())
}

#[test]
fn a_trained_base_may_be_checkpointed() -> Result<()> {
    let _generator = seed(310);
    for (family, spec) in family_specs() {
        let model = RoutedModel::plain(&tiny_base(spec), Device::Cpu, Kind::Float, true);
        let [plain, checkpointed] = [false, true].map(|gradient_checkpointing| {
            let mode = ForwardMode { gradient_checkpointing, ..ForwardMode::EVAL };
            pass(&model, &RoutingSource::Base, mode)
        });
        assert_same_pass(family, &checkpointed, &plain, 0.0);
    }
    Ok(())
}

#[test]
fn a_trained_base_has_the_gradients_of_finite_differences() -> Result<()> {
    let _generator = seed(308);
    for (family, spec) in family_specs() {
        let base = tiny_base(spec);
        let model = RoutedModel::plain(&base, Device::Cpu, Kind::Double, true);
        let loss = || {
            let by = &RoutingSource::Base;
            model.loss(&packed(), by, ForwardMode::EVAL, mean_loss(14)).0.loss
        };
        let names: Vec<String> = model.tensors().into_keys().collect();
        assert_eq!(names.len(), base.spec.parameter_shapes().len(), "{family}");
        let found = gradients(&model, &loss());
        assert!(found.keys().all(|name| names.contains(name)), "{family}");
        for (name, gradient) in &found {
            let tensor = &model.tensors()[name];
            let f = || loss().double_value(&[]);
            assert_slope(&format!("{family}, {name}"), gradient, tensor, f);
        }
    }
    Ok(())
}

/// The settings next to the defaults: each place and input of the routers, dense and top-k.
#[test]
fn routers_have_the_slopes_of_finite_differences_on_every_family() -> Result<()> {
    let _generator = seed(309);
    for text in [
        "scope = 'shared'\ninput = 'base_hidden'",
        "scope = 'module'\ninput = 'layer_input'\ntop_k = 2",
        "scope = 'layer'\nlevel = 'sequence'",
    ] {
        let router = router_of(text)?;
        for (family, spec) in family_specs() {
            let base = tiny_base(spec);
            let model = new_model(&base, &kinds()[0].1, &router, Kind::Double);
            randomize(&model)?;
            let by = &RoutingSource::Router;
            let (loss, _) = model.loss(&packed(), by, ForwardMode::EVAL, mean_loss(14));
            let found = gradients(&model, &loss.loss);
            let tensors = model.tensors();
            for (name, gradient) in found.iter().filter(|(name, _)| name.contains("router")) {
                let f = || {
                    let (loss, _) = model.loss(&packed(), by, ForwardMode::EVAL, mean_loss(14));
                    loss.loss.double_value(&[])
                };
                assert!(gradient.abs().max().double_value(&[]) > 0.0, "{family}, {name}");
                assert_slope(&format!("{family}, {name}"), gradient, &tensors[name], f);
            }
        }
    }
    Ok(())
}

/// Names of PEFT and full names stand for the same modules, and a name that matches nothing is an
/// error that lists what there is.
#[test]
fn names_of_target_modules_match_as_in_peft() -> Result<()> {
    let bases: BTreeMap<_, _> = family_specs().into_iter().collect();
    let spec = |family: &str, text: &str| -> Result<ExpertSpec> {
        ExpertSpec::new(&toml::from_str(text)?, 0, &bases[family])
    };
    let names = |family: &str, text: &str| -> Result<Vec<&str>> {
        let modules = spec(family, text)?.target_modules();
        Ok(modules.into_iter().map(TargetModule::name).collect())
    };
    assert_eq!(
        names("qwen3", "target_modules = ['v_proj', 'self_attn.q_proj']")?,
        ["self_attn.q_proj", "self_attn.v_proj"]
    );
    assert_eq!(names("gpt2", "target_modules = ['c_proj']")?, ["attn.c_proj", "mlp.c_proj"]);
    for family in ["gpt2", "llama", "qwen2", "qwen3", "smollm3", "mistral"] {
        let all = bases[family].modules().len();
        assert_eq!(names(family, "")?.len(), all, "the default is all of them");
        assert_eq!(names(family, "target_modules = 'all-linear'")?.len(), all);
        assert_eq!(names(family, "target_modules = ['all-linear']")?.len(), all);
    }
    let one = spec("mistral", "target_modules = ['v_proj', 'model.layers.1.mlp.up_proj']")?;
    let paths: Vec<String> = one.modules.keys().map(ToString::to_string).collect();
    assert_eq!(
        paths,
        [
            "layers.0.self_attn.v_proj",
            "layers.1.self_attn.v_proj",
            "layers.1.mlp.up_proj",
            "layers.2.self_attn.v_proj"
        ]
    );
    let ranks = spec(
        "llama",
        "rank = 2\nrank_pattern = { all-linear = 3, q_proj = 4, 'self_attn.q_proj' = 5, \
         'model.layers.1.self_attn.q_proj' = 6 }",
    )?;
    let rank = |path: &str| -> Result<i64> { Ok(ranks.modules[&path.parse()?].rank) };
    assert_eq!(rank("layers.0.mlp.up_proj")?, 3);
    assert_eq!(rank("layers.0.self_attn.q_proj")?, 5);
    assert_eq!(rank("layers.1.self_attn.q_proj")?, 6);
    let error = |family, text| format!("{:#}", spec(family, text).expect_err("nothing matches"));
    insta::assert_snapshot!(
        error("llama", "target_modules = ['q_proj', 'c_attn']"),
        @"
    expert 0 of `lora`: `c_attn` matches no linear layer of the base, a `llama`
    hint: its layers are `self_attn.q_proj`, `self_attn.k_proj`, `self_attn.v_proj`, \
    `self_attn.o_proj`, `mlp.gate_proj`, `mlp.up_proj`, `mlp.down_proj`; the last part of a name \
    is enough, and `all-linear` names them all
    "
    );
    insta::assert_snapshot!(
        error("llama", "rank_pattern = { 'layers.3.self_attn.q_proj' = 4 }"),
        @"expert 0 of `lora`: a pattern names `layers.3.self_attn.q_proj`, but the base has 3 \
          layers"
    );
    Ok(())
}

/// A config is saved with the names as they were written.
#[test]
fn names_of_target_modules_survive_writing() -> Result<()> {
    let text = "[base]\nsource = { path = 'x' }\n[data]\nseq_len = 8\n[[data.domains]]\n\
                name = 'a'\ntrain = ['a.jsonl']\n[lora]\ntarget_modules = ['q_proj', \
                'mlp.up_proj']\nrank_pattern = { up_proj = 2, 'layers.0.mlp.up_proj' = 3 }\n";
    let config: Config = load::parse(text, &[])?;
    assert_eq!(load::parse(&load::to_toml(&config), &[])?, config);
    assert!(load::to_toml(&config).contains("target_modules = [\"q_proj\", \"mlp.up_proj\"]"));
    Ok(())
}
