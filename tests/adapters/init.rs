//! The initial values of experts.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{LoraConfig, LoraInit, RoutingChoice, TargetModule, TargetModules};
use dylora::model::decoder::Decoder;
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::experts::spec::{ExpertSpec, RankAlpha};
use dylora::model::routing::router::RouterSpec;
use dylora::model::{RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{
    DOUBLE, assert_close, gpt2_spec, logits, new_model, plain_router, seed, tiny_base, tiny_config,
    two_rows,
};
use crate::{BOTH_WAYS, expected, logits_by, path, tied_base};

/// The modules of `init.expected.safetensors`.
const MODULES: [&str; 2] = ["h.0.attn.c_attn", "h.1.mlp.c_proj"];

const INITS: [LoraInit; 4] =
    [LoraInit::Default, LoraInit::Gaussian, LoraInit::Pissa, LoraInit::Olora];

/// One expert on `base` with the settings of the reference: rank 3, alpha 6.
fn one_expert(base: &Decoder, init: LoraInit, use_dora: bool) -> RoutedModel {
    let size = RankAlpha { rank: 3, alpha: 6.0 };
    let spec = ExpertSpec {
        modules: MODULES.map(|module| (path(module), size)).into(),
        use_rslora: false,
        use_dora,
        init,
        trainable: true,
        alora_invocation_tokens: vec![],
        shared: false,
    };
    RoutedModel::with_experts(base, &[spec], &RouterSpec::default(), Device::Cpu, Kind::Float)
}

/// `base`'s weight of a module, `[i, o]`.
fn weight(base: &Decoder, module: &str) -> Tensor {
    let path = path(module);
    base.blocks[path.layer].linears[&path.module].weight()
}

/// The factors 1 or -1 that give each row of `a` the sign of that row in `like`. The sign of a
/// singular vector is arbitrary, and a change of it in A also changes it in B.
fn signs(a: &Tensor, like: &Tensor) -> Tensor {
    (a * like).sum_dim_intlist(-1, true, Kind::Float).sign()
}

#[test]
fn pissa_and_olora_start_as_in_peft() -> Result<()> {
    let _generator = seed(140);
    let (base, expected) = (tied_base(Kind::Float)?, expected("init")?);
    for (init, name) in [(LoraInit::Pissa, "pissa"), (LoraInit::Olora, "olora")] {
        let model = one_expert(&base, init, false);
        for module in MODULES {
            let golden = |key: &str| expected[&format!("{name}.{module}.{key}")].shallow_clone();
            let own = |key: &str| model.expert_tensor(path(module), 0, key).expect("it is there");
            let (a, b) = (own("lora_a"), own("lora_b"));
            let what = |part: &str| format!("{part} of {module}, {name}");
            let update = b.matmul(&a) * 2.0;
            let golden_update = golden("lora_b").matmul(&golden("lora_a")) * 2.0;
            assert_close(&what("update"), &update, &golden_update, 1e-5);
            let residual = weight(&base, module) - update.tr();
            assert_close(&what("residual"), &residual, &golden("residual"), 1e-5);
            let signs = signs(&a, &golden("lora_a"));
            assert_close(&what("A"), &(&a * &signs), &golden("lora_a"), 1e-5);
            assert_close(&what("B"), &(&b * signs.tr()), &golden("lora_b"), 1e-5);
            assert!(own("initial_a").equal(&a) && own("initial_b").equal(&b));
        }
    }
    Ok(())
}

#[test]
fn magnitudes_start_as_the_norms_of_the_bases_weight() -> Result<()> {
    let _generator = seed(141);
    let (base, expected) = (tied_base(Kind::Float)?, expected("init")?);
    for init in INITS {
        let model = one_expert(&base, init, true);
        for module in MODULES {
            let magnitude = model.expert_tensor(path(module), 0, "magnitude").expect("it is DoRA");
            let norm = weight(&base, module).square().sum_dim_intlist(0, false, None).sqrt();
            assert_close(&format!("{module}, {init:?}"), &magnitude, &norm, 1e-6);
            let golden = &expected[&format!("pissa.dora_magnitude.{module}")];
            assert_close(&format!("{module}, {init:?}"), &magnitude, golden, 1e-5);
        }
    }
    Ok(())
}

/// The A of each module of a wider base at rank 64 (that of the last layer), and whether every B is
/// zero.
fn down_projections(init: LoraInit) -> (BTreeMap<TargetModule, Tensor>, bool) {
    let config = DecoderSpec { inner_width: 256, ..gpt2_spec(2, 4, 128) };
    let target_modules = TargetModules::all();
    let lora = LoraConfig { num_experts: 1, rank: 64, target_modules, init, ..Default::default() };
    let model = new_model(&tiny_base(config), &lora, &plain_router(), Kind::Float);
    let tensor = |path, key| model.expert_tensor(path, 0, key).expect("it targets every module");
    let a = model.modules().map(|(path, _)| (path.module, tensor(path, "lora_a"))).collect();
    let zero = model
        .modules()
        .all(|(path, _)| tensor(path, "lora_b").count_nonzero(None).int64_value(&[]) == 0);
    (a, zero)
}

fn std(x: &Tensor) -> f64 {
    x.to_kind(Kind::Double).square().mean(None).sqrt().double_value(&[])
}

#[test]
fn gaussian_has_standard_deviation_one_over_the_rank() -> Result<()> {
    let _generator = seed(142);
    assert_eq!(expected("init")?["gaussian.std"].double_value(&[]), 1.0 / 3.0);
    let (a, b_is_zero) = down_projections(LoraInit::Gaussian);
    assert!(b_is_zero);
    for (module, a) in a {
        let ratio = std(&a) * 64.0;
        assert!((ratio - 1.0).abs() < 0.03, "{module:?}: {ratio}");
        let largest = a.abs().max().double_value(&[]) * 64.0;
        assert!((3.0..7.0).contains(&largest), "{module:?}: {largest} standard deviations");
    }
    Ok(())
}

#[test]
fn default_is_uniform_up_to_one_over_the_root_of_the_inputs() -> Result<()> {
    let _generator = seed(143);
    // the reference's bound is for the 16 inputs of `gpt2_tied`
    assert!((expected("init")?["default.bound"].double_value(&[]) - 0.25).abs() < 1e-15);
    let (a, b_is_zero) = down_projections(LoraInit::Default);
    assert!(b_is_zero);
    for (module, a) in a {
        let bound = 1.0 / (a.size()[1] as f64).sqrt();
        let ratio = std(&a) / (bound / 3f64.sqrt());
        assert!((ratio - 1.0).abs() < 0.03, "{module:?}: {ratio}");
        let largest = a.abs().max().double_value(&[]) / bound;
        assert!((0.99..=1.0 + 1e-7).contains(&largest), "{module:?}: {largest} of the bound");
    }
    Ok(())
}

/// Named cases: three experts of each initialisation, with and without DoRA and rsLoRA, and at last
/// one expert of each of these kinds.
fn starts() -> Result<Vec<(String, Vec<ExpertSpec>)>> {
    let mut cases: Vec<(String, Vec<ExpertSpec>)> = vec![];
    for init in INITS {
        for (use_dora, use_rslora) in [(false, false), (false, true), (true, false), (true, true)] {
            let target_modules = TargetModules::all();
            let lora = LoraConfig {
                num_experts: 3,
                rank: 3,
                target_modules,
                init,
                use_dora,
                use_rslora,
                ..Default::default()
            };
            let name = format!("{init:?}, DoRA {use_dora}, rsLoRA {use_rslora}");
            cases.push((name, ExpertSpec::all(&lora, &tiny_config())?));
        }
    }
    let one_of_each = cases.iter().map(|(_, specs)| specs[0].clone()).collect();
    cases.push(("one of each".into(), one_of_each));
    Ok(cases)
}

/// Every kind of source of routing weights that does not need a record's expert, for [`two_rows`].
fn sources(num_experts: i64) -> Vec<(&'static str, RoutingSource)> {
    let one_hot = Tensor::from(num_experts - 1).one_hot(num_experts).to_kind(Kind::Double);
    let random = Tensor::randn([2, 7, num_experts], DOUBLE);
    vec![
        ("router", RoutingSource::Router),
        ("uniform", RoutingSource::Uniform),
        ("all", RoutingSource::All),
        ("one-hot", RoutingSource::Given(one_hot)),
        ("random", RoutingSource::Given(random)),
    ]
}

#[test]
fn under_every_init_the_first_forward_pass_equals_the_bases() -> Result<()> {
    let _generator = seed(144);
    let base = tiny_base(tiny_config());
    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
        let plain = RoutedModel::plain(&base, Device::Cpu, kind, false);
        let expected = logits(&plain, &two_rows(), &RoutingSource::Base);
        // PiSSA and OLoRA experts add and subtract the same product, which cancels up to rounding.
        // The scalings are up to 9 and there are up to 16 experts, so the tolerance is relative to
        // the logits.
        let tolerance = tolerance * expected.abs().max().double_value(&[]).max(1.0);
        for (name, specs) in starts()? {
            let router = plain_router();
            let model = RoutedModel::with_experts(
                &base,
                &specs,
                &RouterSpec::from(&router),
                Device::Cpu,
                kind,
            );
            for (source_name, source) in sources(specs.len() as i64) {
                for masks in BOTH_WAYS {
                    let logits = logits_by(masks, &model, &two_rows(), &source);
                    let what = format!("{name}, {source_name}, {masks:?}, {kind:?}");
                    assert_close(&what, &logits, &expected, tolerance);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn initial_values_are_not_trained_and_survive_saving_to_the_bit() -> Result<()> {
    let _generator = seed(145);
    let base = tiny_base(tiny_config());
    for (name, specs) in starts()? {
        let router = plain_router();
        let model = RoutedModel::with_experts(
            &base,
            &specs,
            &RouterSpec::from(&router),
            Device::Cpu,
            Kind::Float,
        );
        let trained = model.trained(RoutingChoice::Router, None);
        assert!(trained.parameters.iter().all(|parameter| !parameter.name.contains("initial")));
        let saved = model.tensors();
        let initial = saved.keys().filter(|name| name.contains("initial")).count();
        let of_base = |spec: &&ExpertSpec| matches!(spec.init, LoraInit::Pissa | LoraInit::Olora);
        assert_eq!(initial, specs.iter().filter(of_base).count() * 8 * 2, "{name}");
        assert_eq!(trained.parameters.len(), saved.len() - initial, "{name}");
        crate::common::randomize(&model)?;
        let copies: BTreeMap<_, _> =
            model.tensors().into_iter().map(|(n, t)| (n, t.copy())).collect();
        let cpu = Device::Cpu;
        let read = RoutedModel::from_tensors(
            &base,
            &specs,
            &RouterSpec::from(&router),
            &copies,
            cpu,
            Kind::Float,
        )?;
        for (tensor_name, tensor) in read.tensors() {
            assert!(tensor.equal(&copies[&tensor_name]), "`{tensor_name}`, {name}");
            if tensor_name.contains("initial") {
                assert!(tensor.count_nonzero(None::<i64>).int64_value(&[]) > 0);
            }
        }
    }
    Ok(())
}
