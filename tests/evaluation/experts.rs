//! How far experts have moved, compared with the full matrices.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{LoraConfig, ModulePath, RouterConfig};
use dylora::eval::experts::{ExpertReport, expert_reports};
use dylora::model::RoutedModel;
use dylora::model::decoder::Decoder;
use dylora::model::experts::spec::{ExpertSpec, part_name};
use dylora::model::routing::router::RouterSpec;
use tch::{Device, Kind, Tensor};

use crate::common::{family_specs, randomize, seed, tiny_base, tiny_config};

/// Experts of several ranks, scalings, starts and target modules, with DoRA and without, and a part
/// that is always on.
const KINDS: &str = r#"
    num_experts = 6
    rank = 4
    alpha = 6.0
    shared_rank = 3
    target_modules = ["attn.c_attn", "mlp.c_fc"]
    rank_pattern = { "h.1.mlp.c_fc" = 5 }
    experts = [
        {},
        { use_rslora = true, rank = 2, target_modules = ["attn.c_attn", "mlp.c_proj"] },
        { init = "pissa", rank = 3 },
        { init = "olora", alpha = 1.5 },
        { use_dora = true, init = "gaussian" },
        { use_dora = true, init = "pissa" },
    ]
"#;

fn specs(lora: &LoraConfig, base: &Decoder) -> Result<Vec<ExpertSpec>> {
    let mut specs = ExpertSpec::all(lora, &base.spec)?;
    specs.extend(ExpertSpec::of_shared(lora, &base.spec)?);
    Ok(specs)
}

fn new_model(base: &Decoder, text: &str, kind: Kind) -> Result<RoutedModel> {
    let specs = specs(&toml::from_str(text)?, base)?;
    let router = RouterSpec::from(&RouterConfig::default());
    Ok(RoutedModel::with_experts(base, &specs, &router, Device::Cpu, kind))
}

/// What the expert adds to the base's weight when it has weight 1, `[i, o]`, as a full matrix.
fn dense(model: &RoutedModel, path: ModulePath, expert: usize) -> Tensor {
    let name = part_name(model.specs(), expert);
    let tensors: BTreeMap<String, Tensor> = model.tensors();
    let tensor =
        |key: &str| Some(tensors.get(&format!("{path}.{name}.{key}"))?.to_kind(Kind::Double));
    let product = |a: Tensor, b: Tensor| a.tr().matmul(&b.tr());
    let mut delta = product(tensor("lora_a").expect("A"), tensor("lora_b").expect("B"));
    if let (Some(a), Some(b)) = (tensor("initial_a"), tensor("initial_b")) {
        delta -= product(a, b);
    }
    let delta = delta * model.specs()[expert].scaling(path).expect("it targets the module");
    let Some(magnitude) = tensor("magnitude") else { return delta };
    let weight = model.base().blocks[path.layer].linears[&path.module].weight();
    let weight = weight.to_kind(Kind::Double);
    let updated = &weight + delta;
    let norm = updated.square().sum_dim_intlist(0, false, Kind::Double).sqrt();
    updated * (magnitude / norm) - weight
}

fn norm2(x: &Tensor) -> f64 {
    x.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[])
}

fn expected(model: &RoutedModel, expert: usize) -> ExpertReport {
    let paths = || model.specs()[expert].modules.keys().copied();
    let moved: f64 = paths().map(|path| norm2(&dense(model, path, expert))).sum();
    let weight = |path: ModulePath| model.base().blocks[path.layer].linears[&path.module].weight();
    let base: f64 = paths().map(|path| norm2(&weight(path))).sum();
    ExpertReport {
        name: part_name(model.specs(), expert),
        update_norm: moved.sqrt(),
        relative_norm: (moved / base).sqrt(),
    }
}

#[track_caller]
fn assert_as_expected(model: &RoutedModel) -> Result<()> {
    let found = expert_reports(model)?;
    assert_eq!(found.len(), model.specs().len());
    for (expert, found) in found.iter().enumerate() {
        let expected = expected(model, expert);
        assert_eq!(found.name, expected.name);
        for (a, b) in [
            (found.update_norm, expected.update_norm),
            (found.relative_norm, expected.relative_norm),
        ] {
            assert!(a > 0.0 && (a - b).abs() < 1e-12 * b, "{}: {a}, not {b}", found.name);
        }
    }
    Ok(())
}

#[test]
fn norms_are_those_of_the_full_matrices_for_every_kind_of_expert() -> Result<()> {
    let _generator = seed(500);
    let model = new_model(&tiny_base(tiny_config()), KINDS, Kind::Double)?;
    randomize(&model)?;
    assert_as_expected(&model)?;
    let names: Vec<String> = expert_reports(&model)?.into_iter().map(|of| of.name).collect();
    assert_eq!(names[0], "expert_0");
    assert_eq!(names[5..], ["expert_5", "shared"]);
    Ok(())
}

#[test]
fn norms_are_those_of_the_full_matrices_in_every_family() -> Result<()> {
    let _generator = seed(501);
    for (family, spec) in family_specs() {
        let text = "num_experts = 2\nrank = 3\ntarget_modules = \"all-linear\"\n\
                    experts = [{}, { use_dora = true }]";
        let model = new_model(&tiny_base(spec), text, Kind::Double)?;
        randomize(&model)?;
        assert_as_expected(&model).map_err(|error| error.context(family))?;
    }
    Ok(())
}

/// For `B = 0` but in one column, `|s B A|` is `s |b| |a|`.
#[test]
fn the_norm_of_a_product_of_two_vectors_is_that_of_their_norms() -> Result<()> {
    let _generator = seed(502);
    let text = "num_experts = 2\nrank = 2\nalpha = 5.0\ntarget_modules = [\"attn.c_proj\"]";
    let base = tiny_base(tiny_config());
    let model = new_model(&base, text, Kind::Double)?;
    let name = "h.1.attn.c_proj.expert_1";
    let up = Tensor::zeros([16, 2], (Kind::Double, Device::Cpu));
    up.select(1, 0).get(3).copy_(&Tensor::from(2.0));
    let down = Tensor::ones([2, 16], (Kind::Double, Device::Cpu)) * 0.5;
    model.load_some(&[(format!("{name}.lora_a"), down), (format!("{name}.lora_b"), up)].into())?;
    let [first, second] = &expert_reports(&model)?[..] else { panic!("there are two") };
    assert_eq!((first.update_norm, first.relative_norm), (0.0, 0.0));
    let expected = 5.0 / 2.0 * 2.0 * (16.0 * 0.25f64).sqrt();
    assert!((second.update_norm - expected).abs() < 1e-12, "{second:?}");
    Ok(())
}

/// A magnitude is kept in f32. Its rounding is no movement.
#[test]
fn new_experts_have_not_moved_under_any_start() -> Result<()> {
    let _generator = seed(503);
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let model = new_model(&tiny_base(tiny_config()), KINDS, kind)?;
        for report in expert_reports(&model)? {
            assert_eq!(
                (report.update_norm, report.relative_norm),
                (0.0, 0.0),
                "{kind:?}, {report:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_dora_expert_moves_by_its_magnitude_alone() -> Result<()> {
    let _generator = seed(504);
    let text = "num_experts = 2\nrank = 2\ntarget_modules = [\"mlp.c_fc\"]\nuse_dora = true";
    let base = tiny_base(tiny_config());
    let model = new_model(&base, text, Kind::Double)?;
    let name = "h.0.mlp.c_fc.expert_0.magnitude";
    let doubled = &model.tensors()[name] * 2.0;
    model.load_some(&[(name.to_owned(), doubled)].into())?;
    let reports = expert_reports(&model)?;
    let weight = |layer: usize| {
        let (_, linear) = base.blocks[layer]
            .linears
            .iter()
            .find(|(m, _)| m.name() == "mlp.c_fc")
            .expect("GPT-2 has it");
        norm2(&linear.weight())
    };
    let expected = weight(0).sqrt();
    assert!((reports[0].update_norm - expected).abs() < 1e-12 * expected, "{reports:?}");
    let relative = (weight(0) / (weight(0) + weight(1))).sqrt();
    assert!((reports[0].relative_norm - relative).abs() < 1e-12, "{reports:?}");
    assert_eq!(reports[1].update_norm, 0.0);
    Ok(())
}

#[test]
fn a_base_has_no_experts_to_report() -> Result<()> {
    let _generator = seed(505);
    let model = RoutedModel::plain(&tiny_base(tiny_config()), Device::Cpu, Kind::Double, false);
    assert_eq!(expert_reports(&model)?, []);
    Ok(())
}
