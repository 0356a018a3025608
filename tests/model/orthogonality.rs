//! The orthogonality losses, which keep experts apart, compared with their definition on the
//! updates `[o, i]` written out.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{LoraConfig, Orthogonality};
use dylora::model::RoutedModel;
use tch::{Kind, Tensor};

use super::accumulation::{config, cut, dataset, gradients as step};
use super::gradients::assert_slope;
use crate::common::{
    gradients, max_difference, new_model, plain_router, randomize, seed, tiny_base, tiny_config,
    tiny_lora, tiny_model,
};

const BOTH: [Orthogonality; 2] = [Orthogonality::A(0.1), Orthogonality::Ba(0.1)];

const MIXED_RANKS: &str = r#"
    num_experts = 3
    target_modules = ["attn.c_attn", "mlp.c_fc"]
    rank_pattern = { "h.1.mlp.c_fc" = 5 }
    experts = [{ rank = 2, alpha = 7.0 }, { rank = 7 }]
"#;

const MISSING_MODULES: &str = r#"
    num_experts = 3
    rank = 3
    experts = [
        { target_modules = ["attn.c_attn", "mlp.c_fc"] },
        { target_modules = ["mlp.c_fc", "mlp.c_proj"] },
        { target_modules = ["attn.c_attn", "mlp.c_fc"] },
    ]
"#;

const COMPONENTS: &str = r#"
    num_experts = 4
    rank = 3
    target_modules = ["attn.c_attn", "mlp.c_proj"]
    experts = [{ init = "pissa" }, {}, { init = "olora", rank = 2 }, { init = "pissa" }]
"#;

fn lora(text: &str) -> LoraConfig {
    toml::from_str(text).expect("it is a `[lora]`")
}

fn squared_norm(x: &Tensor) -> f64 {
    x.square().sum(Kind::Double).double_value(&[])
}

/// The squared cosine of two experts, each given as A, `[r, i]`, and its update, `[o, i]`.
fn squared_cosine(of: Orthogonality, e: &(Tensor, Tensor), f: &(Tensor, Tensor)) -> f64 {
    match of {
        Orthogonality::A(_) => {
            squared_norm(&e.0.matmul(&f.0.tr())) / (squared_norm(&e.0) * squared_norm(&f.0))
        }
        Orthogonality::Ba(_) => {
            let inner = (&e.1 * &f.1).sum(Kind::Double).double_value(&[]);
            inner * inner / (squared_norm(&e.1) * squared_norm(&f.1))
        }
    }
}

/// The loss by its definition, from the tensors of a checkpoint.
fn literal(model: &RoutedModel, of: Orthogonality) -> f64 {
    let tensors = model.tensors();
    let mut modules: BTreeMap<&str, Vec<(Tensor, Tensor)>> = BTreeMap::new();
    for (name, a) in tensors.iter().filter(|(name, _)| name.ends_with(".lora_a")) {
        let expert = name.strip_suffix(".lora_a").expect("it ends so");
        let (module, _) = expert.rsplit_once('.').expect("an expert is of a module");
        let tensor = |key: &str| tensors.get(&format!("{expert}.{key}"));
        let mut update = tensor("lora_b").expect("A has a B").matmul(a);
        if let (Some(a), Some(b)) = (tensor("initial_a"), tensor("initial_b")) {
            update = &update - b.matmul(a);
        }
        modules.entry(module).or_default().push((a.shallow_clone(), update));
    }
    modules.retain(|_, experts| experts.len() > 1);
    let of_module = |experts: &Vec<(Tensor, Tensor)>| {
        let mut cosines = vec![];
        for (i, f) in experts.iter().enumerate() {
            cosines.extend(experts[..i].iter().map(|e| squared_cosine(of, e, f)));
        }
        cosines.iter().sum::<f64>() / cosines.len() as f64
    };
    modules.values().map(of_module).sum::<f64>() / modules.len() as f64
}

fn value(model: &RoutedModel, of: Orthogonality) -> f64 {
    model.orthogonality(of).expect("a module has two experts").double_value(&[])
}

#[test]
fn orthogonality_is_the_mean_squared_cosine_of_the_factors_or_the_updates() -> Result<()> {
    let _generator = seed(210);
    for text in [MIXED_RANKS, MISSING_MODULES, COMPONENTS] {
        let model = tiny_model(&lora(text), &plain_router(), Kind::Double)?;
        for of in BOTH {
            let (found, expected) = (value(&model, of), literal(&model, of));
            assert!((found - expected).abs() < 1e-13, "{of:?}: {found} is not {expected}, {text}");
            assert!(expected > 1e-6 && expected < 1.0, "{of:?}: {expected}, {text}");
        }
    }
    Ok(())
}

#[test]
fn orthogonality_has_the_slopes_of_finite_differences() -> Result<()> {
    let _generator = seed(211);
    for text in [MIXED_RANKS, MISSING_MODULES, COMPONENTS] {
        let model = tiny_model(&lora(text), &plain_router(), Kind::Double)?;
        for of in BOTH {
            let loss = model.orthogonality(of).expect("a module has two experts");
            let grads = gradients(&model, &loss);
            let tensors = model.tensors().into_iter();
            for (name, tensor) in tensors.filter(|(name, _)| name.contains("lora_")) {
                assert_slope(&format!("{name}, {of:?}"), &grads[&name], &tensor, || {
                    literal(&model, of)
                });
            }
        }
    }
    Ok(())
}

/// A model of two experts on one module of the first layer, with the given A, `[r, i]`, and B,
/// `[o, r]`.
fn two_experts(rank: i64, factors: [(Tensor, Tensor); 2]) -> Result<RoutedModel> {
    let text = format!(
        "num_experts = 2\nrank = {rank}\ntarget_modules = ['c_attn']\nexperts_per_layer = [2, 1]"
    );
    let model = tiny_model(&lora(&text), &plain_router(), Kind::Double)?;
    let named = factors.into_iter().enumerate().flat_map(|(e, (a, b))| {
        let name = format!("h.0.attn.c_attn.expert_{e}");
        [(format!("{name}.lora_a"), a), (format!("{name}.lora_b"), b)]
    });
    model.load_some(&named.collect())?;
    Ok(model)
}

#[test]
fn orthogonal_experts_cost_nothing_and_equal_ones_one() -> Result<()> {
    let _generator = seed(212);
    let unit = |size: i64, at: i64| Tensor::eye(size, crate::common::DOUBLE).narrow(0, at, 1);
    let (a, b) = (|at| unit(16, at), |at| unit(48, at).tr());
    let of = |e, f| -> Result<[f64; 2]> {
        let model = two_experts(1, [e, f])?;
        Ok(BOTH.map(|of| value(&model, of)))
    };
    assert_eq!(of((a(0), b(0)), (a(1), b(0)))?, [0.0, 0.0]);
    assert_eq!(of((a(0), b(0)), (a(0), b(1)))?, [1.0, 0.0]);
    assert_eq!(of((a(0), b(0)), (a(0), b(0)))?, [1.0, 1.0]);
    // neither the size nor the sign of an update matters
    assert_eq!(of((a(2), b(3) * 4.0), (a(2) * -8.0, b(3)))?, [1.0, 1.0]);
    // the rows of A are at 45 degrees
    let [in_a, in_ba] = of((a(0), b(0)), (a(0) + a(1), b(0)))?;
    assert!((in_a - 0.5).abs() < 1e-15 && (in_ba - 0.5).abs() < 1e-15, "{in_a}, {in_ba}");
    Ok(())
}

/// Equal updates have a squared cosine of 1. But each of the r orthonormal rows of A is orthogonal
/// to all others, so the loss on A is 1 / r.
#[test]
fn equal_experts_of_orthonormal_inputs_cost_one_over_their_rank_in_a() -> Result<()> {
    let _generator = seed(213);
    let a = Tensor::eye(16, crate::common::DOUBLE).narrow(0, 0, 4);
    let b = Tensor::randn([48, 4], crate::common::DOUBLE);
    let twice = || (a.shallow_clone(), b.shallow_clone());
    let model = two_experts(4, [twice(), twice()])?;
    let [in_a, in_ba] = BOTH.map(|of| value(&model, of));
    assert!((in_a - 0.25).abs() < 1e-15 && (in_ba - 1.0).abs() < 1e-14, "{in_a}, {in_ba}");
    Ok(())
}

/// Every update is zero at the start, whatever the initial A and B are. Updates of zero count as
/// orthogonal to all others and have no gradient.
#[test]
fn updates_of_zero_cost_nothing_and_have_no_gradient() -> Result<()> {
    let _generator = seed(214);
    for kind in [Kind::Float, Kind::Double] {
        for text in [MIXED_RANKS, COMPONENTS] {
            let model = new_model(&tiny_base(tiny_config()), &lora(text), &plain_router(), kind);
            let loss = model.orthogonality(Orthogonality::Ba(1.0)).expect("there are several");
            assert_eq!(loss.double_value(&[]), 0.0);
            for (name, grad) in gradients(&model, &loss) {
                assert_eq!(max_difference(&grad, &grad.zeros_like()), 0.0, "`{name}`, {kind:?}");
            }
            // A is not zero at the start, so the loss on A is not zero either
            assert!(value(&model, Orthogonality::A(1.0)) > 1e-4);
        }
    }
    Ok(())
}

#[test]
fn there_is_no_orthogonality_without_two_experts_on_a_module() -> Result<()> {
    let _generator = seed(215);
    let single = LoraConfig { num_experts: 1, ..tiny_lora() };
    let apart = "num_experts = 2\ntarget_modules = ['c_attn']\n\
                 experts = [{ target_modules = ['mlp.c_fc'] }, {}]";
    for lora in [single, lora(apart)] {
        let model = tiny_model(&lora, &plain_router(), Kind::Double)?;
        assert!(BOTH.iter().all(|&of| model.orthogonality(of).is_none()));
    }
    Ok(())
}

/// The loss of frozen experts is still reported. The router, which is trained, has the same
/// gradients as without the loss.
#[test]
fn the_orthogonality_of_frozen_experts_changes_no_gradient() -> Result<()> {
    let _generator = seed(217);
    let text = "num_experts = 2\nexperts = [{ trainable = false }, { trainable = false }]";
    let with = config(&plain_router(), &[])?;
    let mut without = with.clone();
    without.lora.orthogonality = None;
    let model = tiny_model(&lora(text), &with.router, Kind::Double)?;
    let batches = cut(&dataset(16), &[1], false);
    let [with, without] = [with, without].map(|config| step(&model, &config, &batches));
    let (with, without) = (with?, without?);
    let reported = with.orthogonality.expect("it counts").double_value(&[]);
    assert!((reported - literal(&model, Orthogonality::Ba(1.0))).abs() < 1e-13);
    for (a, b) in with.grads.iter().zip(&without.grads) {
        assert_eq!(max_difference(a, b), 0.0);
    }
    Ok(())
}

/// PiSSA experts all start with the same singular vectors, so the loss on A is large at first. From
/// random values, a step against the gradient lowers the loss.
#[test]
fn pissa_experts_start_alike_and_a_step_against_the_loss_lowers_it() -> Result<()> {
    let _generator = seed(216);
    let text = "num_experts = 3\nrank = 3\ninit = 'pissa'\ntarget_modules = ['mlp.c_fc']";
    let model = new_model(&tiny_base(tiny_config()), &lora(text), &plain_router(), Kind::Double);
    // the rows of A are orthogonal and have squared norms s; the loss is sum s^2 / (sum s)^2
    let alike = value(&model, Orthogonality::A(1.0));
    assert!(alike > 1.0 / 3.0 - 1e-12, "{alike}");
    randomize(&model)?;
    for of in BOTH {
        let before = value(&model, of);
        let grads = gradients(&model, &model.orthogonality(of).expect("there are several"));
        let tensors = model.tensors();
        tch::no_grad(|| {
            for (name, grad) in &grads {
                let _ = tensors[name].shallow_clone().g_sub_(&(grad * 0.01));
            }
        });
        assert!(value(&model, of) < before, "{of:?}");
    }
    Ok(())
}
