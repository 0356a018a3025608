//! Removing, adding and merging experts: what stays the same, and by how much the rest changes.

#[path = "common/mod.rs"]
mod common;

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{
    LoraConfig, LoraInit, ModulePath, RouterConfig, RouterInput, RouterScope, RoutingChoice,
};
use dylora::growth::merge::{Merged, merged, most_similar, similarity};
use dylora::growth::stages::{Stage, without_gain};
use dylora::growth::{with_expert, without_expert};
use dylora::mixture::Mixture;
use dylora::model::decoder::Decoder;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::parameters::expert_name;
use dylora::model::routing::router::{RouterSpec, Routing};
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{
    DOUBLE, ROUTER_INPUTS, assert_close, logits, max_difference, new_model, plain_router,
    randomize, seed, tiny_base, tiny_config, two_rows,
};

/// Experts of several ranks, scalings and initialisations, whose target modules overlap.
const SEVERAL: &str = r#"
    num_experts = 3
    rank = 4
    alpha = 6.0
    target_modules = ["attn.c_attn", "mlp.c_fc"]
    rank_pattern = { "h.1.mlp.c_fc" = 5 }
    experts = [
        {},
        { use_rslora = true, rank = 2, target_modules = ["attn.c_attn", "mlp.c_proj"] },
        { init = "pissa", rank = 3 },
    ]
"#;

/// Three plain experts of rank 4; the second has another scaling than the others.
const PLAIN: &str = r#"
    num_experts = 3
    rank = 4
    alpha = 6.0
    target_modules = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    experts = [{}, { alpha = 2.0 }]
"#;

fn lora(text: &str) -> LoraConfig {
    toml::from_str(text).expect("the test's config is right")
}

fn router(input: RouterInput) -> RouterConfig {
    let scope = match input {
        RouterInput::LayerInput => RouterScope::Layer,
        _ => RouterScope::Shared,
    };
    RouterConfig { input, scope, temperature: 1.3, ..plain_router() }
}

/// A base and a whole mixture with random tensors.
fn random(text: &str, router: &RouterConfig) -> Result<(Decoder, Mixture)> {
    let base = tiny_base(tiny_config());
    let model = new_model(&base, &lora(text), router, Kind::Double);
    randomize(&model)?;
    let mixture = Mixture::new(model.specs().to_vec(), RouterSpec::from(router), model.tensors());
    Ok((base, Mixture { is_whole: true, ..mixture }))
}

fn put_on(mixture: &Mixture, base: &Decoder) -> Result<RoutedModel> {
    mixture.put_on(base, Device::Cpu, Kind::Double)
}

fn routed(model: &RoutedModel) -> (Tensor, Vec<Routing>) {
    let inputs = two_rows();
    (logits(model, &inputs, &RoutingSource::Router), model.routing(&inputs, ForwardMode::EVAL))
}

fn prefixes(input: RouterInput) -> Vec<String> {
    match input {
        RouterInput::LayerInput => (0..2).map(|layer| format!("h.{layer}.")).collect(),
        _ => vec![String::new()],
    }
}

/// An expert's update of a module as a matrix, `[o, i]`; zero if the expert does not target it.
fn dense(mixture: &Mixture, path: ModulePath, expert: usize) -> Tensor {
    let tensor = |key| &mixture.tensors[&format!("{path}.{}.{key}", expert_name(expert))];
    let spec = &mixture.specs[expert];
    let Some(scaling) = spec.scaling(path) else {
        let (i, o) = tiny_config().linear_shape(path.module);
        return Tensor::zeros([o, i], DOUBLE);
    };
    let mut product = tensor("lora_b").matmul(tensor("lora_a"));
    if spec.init == LoraInit::Pissa {
        product -= tensor("initial_b").matmul(tensor("initial_a"));
    }
    product * scaling
}

fn paths(mixture: &Mixture) -> Vec<ModulePath> {
    let mut paths: Vec<_> = mixture.specs.iter().flat_map(|s| s.modules.keys().copied()).collect();
    paths.sort();
    paths.dedup();
    paths
}

fn norm2(x: &Tensor) -> f64 {
    x.square().sum(Kind::Double).double_value(&[])
}

#[test]
fn without_an_expert_the_softmax_lacks_its_logit() -> Result<()> {
    let _generator = seed(300);
    for input in ROUTER_INPUTS {
        let (base, mixture) = random(SEVERAL, &router(input))?;
        for expert in 0..3 {
            let (smaller, _) = routed(&put_on(&without_expert(&mixture, expert)?, &base)?);
            let model = put_on(&mixture, &base)?;
            let (whole, routing) = routed(&model);
            assert!(max_difference(&smaller, &whole) > 1e-3);
            if input != RouterInput::LayerInput {
                let mask = 1.0 - Tensor::from(expert as i64).one_hot(3).to_kind(Kind::Double);
                let masked: Tensor = &routing[0].weights * mask;
                let given = &masked / masked.sum_dim_intlist(-1, true, Kind::Double);
                let expected = logits(&model, &two_rows(), &RoutingSource::Given(given));
                assert_close(&format!("{input:?}, {expert}"), &smaller, &expected, 1e-12);
            }
            for prefix in prefixes(input) {
                let bias = &model.tensors()[&format!("{prefix}router.bias")];
                let _ = bias.get(expert as i64).fill_(-1e9);
            }
            let (expected, _) = routed(&model);
            assert_close(&format!("{input:?}, {expert}, bias"), &smaller, &expected, 1e-12);
        }
    }
    Ok(())
}

#[test]
fn the_experts_behind_a_removed_one_move_up_as_they_are() -> Result<()> {
    let _generator = seed(301);
    let (_, mut mixture) = random(SEVERAL, &router(RouterInput::LayerInput))?;
    mixture.routing = RoutingChoice::Expert(2);
    mixture.router.top_k = Some(3);
    mixture.tensors.insert("h.0.router.selection_bias".into(), Tensor::from_slice(&[1., 2., 3.]));
    let hidden = Tensor::randn([3, 16], DOUBLE);
    mixture.tensors.insert("h.0.router.hidden.0.weight".into(), hidden.shallow_clone());
    let smaller = without_expert(&mixture, 1)?;
    assert_eq!(smaller.specs, [mixture.specs[0].clone(), mixture.specs[2].clone()]);
    assert_eq!((smaller.routing, smaller.router.top_k), (RoutingChoice::Expert(1), Some(2)));
    assert!(smaller.is_whole);
    for (name, tensor) in &mixture.tensors {
        let kept = match name {
            _ if name.contains("expert_1") => continue,
            _ if name.contains("hidden") => &smaller.tensors[name],
            _ if name.contains("router") => {
                let rows = tensor.index_select(0, &Tensor::from_slice(&[0_i64, 2]));
                assert_eq!(smaller.tensors[name], rows, "{name}");
                continue;
            }
            _ => &smaller.tensors[&name.replace("expert_2", "expert_1")],
        };
        assert_eq!(kept, tensor, "{name}");
    }
    let removed = mixture.tensors.keys().filter(|name| name.contains("expert_1")).count();
    assert_eq!(smaller.tensors.len(), mixture.tensors.len() - removed);
    Ok(())
}

#[test]
fn a_single_remaining_expert_has_no_router() -> Result<()> {
    let _generator = seed(302);
    for input in ROUTER_INPUTS {
        let (base, mixture) = random(SEVERAL, &router(input))?;
        let two = without_expert(&mixture, 0)?;
        let one = without_expert(&two, 0)?;
        assert!(!one.tensors.keys().any(|name| name.contains("router")));
        let expected = logits(&put_on(&mixture, &base)?, &two_rows(), &RoutingSource::Expert(2));
        let (logits, routing) = routed(&put_on(&one, &base)?);
        assert_close("the last expert", &logits, &expected, 1e-12);
        assert!(routing.is_empty());
        let error = without_expert(&one, 0).unwrap_err().to_string();
        assert_eq!(error, "the only expert cannot be removed");
    }
    Ok(())
}

#[test]
fn an_expert_that_is_needed_or_absent_is_not_removed() -> Result<()> {
    let _generator = seed(303);
    let (_, mut mixture) = random(SEVERAL, &plain_router())?;
    mixture.routing = RoutingChoice::Expert(1);
    let error = |expert| without_expert(&mixture, expert).unwrap_err().to_string();
    assert_eq!(error(3), "there is no expert 3, the mixture has 3 from 0");
    assert_eq!(error(1), "`routing` is by expert 1 alone");
    Ok(())
}

/// The new expert has a probability near zero. It must not be chosen before the old experts, even
/// if their selection biases are negative.
#[test]
fn an_added_expert_takes_no_place_among_the_k_best() -> Result<()> {
    let _generator = seed(312);
    let router = RouterConfig { top_k: Some(2), balance_bias_rate: 0.1, ..plain_router() };
    let (base, mut mixture) = random(PLAIN, &router)?;
    mixture.tensors.insert("router.selection_bias".into(), Tensor::from_slice(&[-0.4, -0.2, 0.0]));
    let (before, routing_before) = routed(&put_on(&mixture, &base)?);
    let larger = with_expert(&mixture, &base, mixture.specs[0].clone(), &|_| -40.0)?;
    let (after, routing) = routed(&put_on(&larger, &base)?);
    assert_close("logits", &after, &before, 1e-6);
    assert_close("weights", &routing[0].weights.narrow(-1, 0, 3), &routing_before[0].weights, 1e-6);
    Ok(())
}

#[test]
fn an_expert_added_with_a_low_bias_changes_nothing() -> Result<()> {
    let _generator = seed(304);
    for input in ROUTER_INPUTS {
        let (base, mixture) = random(SEVERAL, &router(input))?;
        let (before, routing_before) = routed(&put_on(&mixture, &base)?);
        let spec = mixture.specs[0].clone();
        let larger = with_expert(&mixture, &base, spec, &|_| -40.0)?;
        assert!(!larger.is_whole);
        let model = put_on(&larger, &base)?;
        let (after, routing) = routed(&model);
        assert_close(&format!("{input:?}"), &after, &before, 1e-6);
        for (routing, before) in routing.iter().zip(&routing_before) {
            assert_close("probs", &routing.probs.narrow(-1, 0, 3), &before.probs, 1e-6);
        }
        let own = model.tensors();
        let mut fresh = own.iter().filter(|(name, _)| name.contains("expert_3"));
        assert_eq!(fresh.clone().count(), 2 * larger.specs[3].modules.len());
        assert!(fresh.all(|(name, tensor)| (norm2(tensor) == 0.0) == name.ends_with("lora_b")));
        for (name, tensor) in mixture.tensors.iter().filter(|(name, _)| name.contains("expert_")) {
            assert_eq!(&own[name], tensor, "{name}");
        }
    }
    Ok(())
}

/// With a bias of T ln(3), the new expert has 3 times the old one's weight for every token.
#[test]
fn adding_to_a_single_expert_adds_a_router() -> Result<()> {
    let _generator = seed(305);
    for input in ROUTER_INPUTS {
        let (base, mixture) = random(SEVERAL, &router(input))?;
        let one = without_expert(&without_expert(&mixture, 0)?, 1)?;
        let spec = ExpertSpec { init: LoraInit::Pissa, ..mixture.specs[0].clone() };
        let seen = std::cell::RefCell::new(vec![]);
        let bias = |prefix: &str| {
            seen.borrow_mut().push(prefix.to_owned());
            1.3 * 3_f64.ln()
        };
        let two = with_expert(&one, &base, spec, &bias)?;
        assert_eq!(*seen.borrow(), prefixes(input));
        let model = put_on(&two, &base)?;
        let (after, routing) = routed(&model);
        let shares = Tensor::from_slice(&[0.25, 0.75]);
        for routing in &routing {
            assert_close("probs", &routing.probs, &shares.expand_as(&routing.probs), 1e-12);
        }
        let old = put_on(&one, &base)?;
        let given = RoutingSource::Given(Tensor::from_slice(&[0.25]));
        assert_close("logits", &after, &logits(&old, &two_rows(), &given), 1e-10);
    }
    Ok(())
}

#[test]
fn an_expert_is_not_added_to_a_router_that_is_yet_to_be_drawn() -> Result<()> {
    let _generator = seed(306);
    let (base, mut mixture) = random(SEVERAL, &plain_router())?;
    mixture.tensors.retain(|name, _| !name.contains("router"));
    let spec = mixture.specs[0].clone();
    let error = with_expert(&mixture, &base, spec, &|_| 0.0).unwrap_err().to_string();
    assert_eq!(error, "the mixture of 3 experts has no router yet");
    Ok(())
}

#[test]
fn similarity_is_the_cosine_of_the_dense_updates() -> Result<()> {
    let _generator = seed(307);
    let (base, mixture) = random(SEVERAL, &plain_router())?;
    let found = similarity(&put_on(&mixture, &base)?)?;
    let product = |e, f| -> f64 {
        let paths = paths(&mixture).into_iter();
        let products = paths.map(|p| dense(&mixture, p, e) * dense(&mixture, p, f));
        products.map(|product| product.sum(Kind::Double).double_value(&[])).sum()
    };
    for (e, row) in found.iter().enumerate() {
        for (f, &cosine) in row.iter().enumerate() {
            let expected = product(e, f) / (product(e, e) * product(f, f)).sqrt();
            assert!((cosine - expected).abs() < 1e-12, "{e}, {f}: {cosine}, not {expected}");
        }
        assert!((row[e] - 1.0).abs() < 1e-12);
    }
    Ok(())
}

#[test]
fn a_scaled_or_negated_expert_is_as_similar_as_it_should_be() -> Result<()> {
    let _generator = seed(308);
    let (base, mixture) = random(PLAIN, &plain_router())?;
    for (factor, cosine) in [(3.0, 1.0), (-0.5, -1.0), (0.0, 0.0)] {
        let mut mixture = without_expert(&mixture, 2)?;
        for path in paths(&mixture) {
            let name = |expert, key| format!("{path}.{}.{key}", expert_name(expert));
            let copied = |key| mixture.tensors[&name(0, key)].copy();
            let (a, b) = (copied("lora_a"), copied("lora_b") * factor);
            mixture.tensors.extend([(name(1, "lora_a"), a), (name(1, "lora_b"), b)]);
        }
        let found = similarity(&put_on(&mixture, &base)?)?;
        assert!((found[0][1] - cosine).abs() < 1e-12, "{factor}: {found:?}");
        assert_eq!(found[0][1], found[1][0]);
    }
    Ok(())
}

#[test]
fn new_experts_have_similarity_0_under_every_init() -> Result<()> {
    let _generator = seed(314);
    for init in ["default", "pissa", "olora"] {
        let lora = lora(&format!("num_experts = 2\ninit = \"{init}\""));
        let base = tiny_base(tiny_config());
        let model = new_model(&base, &lora, &plain_router(), Kind::Double);
        assert_eq!(similarity(&model)?, [[0.0; 2]; 2], "{init}");
    }
    Ok(())
}

#[test]
fn the_most_similar_experts_are_the_largest_entry_beside_the_diagonal() {
    let similarity = [vec![1.0, 0.2, -0.9], vec![0.2, 1.0, 0.5], vec![-0.9, 0.5, 1.0]];
    assert_eq!(most_similar(&similarity), Some((1, 2, 0.5)));
    assert_eq!(most_similar(&similarity[..1]), None);
    let even = vec![vec![0.0; 3]; 3];
    assert_eq!(most_similar(&even), Some((0, 1, 0.0)));
}

/// The sum of experts 0 and 2 has rank 4, and every token divides its weight between them in the
/// same shares.
#[test]
fn a_merge_that_fits_the_rank_and_has_even_shares_is_exact() -> Result<()> {
    let _generator = seed(309);
    for input in ROUTER_INPUTS {
        let router = router(input);
        let (base, mixture) = random(PLAIN, &router)?;
        for path in paths(&mixture) {
            let b = |expert| &mixture.tensors[&format!("{path}.{}.lora_b", expert_name(expert))];
            let _ = b(0).narrow(1, 0, 2).zero_();
            let _ = b(2).narrow(1, 2, 2).zero_();
        }
        let mut weights = [0.0; 2];
        for prefix in prefixes(input) {
            let weight = &mixture.tensors[&format!("{prefix}router.weight")];
            weight.get(2).copy_(&weight.get(0));
            let bias = &mixture.tensors[&format!("{prefix}router.bias")];
            bias.get(2).copy_(&(bias.get(0) + 0.7));
            let share = 1.0 / (1.0 + (-0.7_f64 / router.temperature).exp());
            weights = [1.0 - share, share];
        }
        let (before, routing_before) = routed(&put_on(&mixture, &base)?);
        let Merged { mixture: two, relative_error } = merged(&mixture, 0, 2, weights)?;
        assert!(relative_error < 1e-12, "{relative_error:e}");
        assert_eq!(two.specs[0], mixture.specs[0]);
        let (after, routing) = routed(&put_on(&two, &base)?);
        assert_close(&format!("{input:?}"), &after, &before, 1e-10);
        for (routing, before) in routing.iter().zip(&routing_before) {
            let of = |expert| before.weights.select(-1, expert);
            let expected = Tensor::stack(&[of(0) + of(2), of(1)], -1);
            assert_close("weights", &routing.weights, &expected, 1e-12);
        }
    }
    Ok(())
}

#[test]
fn merging_two_equal_experts_changes_nothing() -> Result<()> {
    let _generator = seed(310);
    let (base, mut mixture) = random(SEVERAL, &router(RouterInput::Embeddings))?;
    mixture.specs[1] = mixture.specs[0].clone();
    mixture.tensors.retain(|name, _| !name.contains("expert_1"));
    let of_first = mixture.tensors.iter().filter(|(name, _)| name.contains("expert_0"));
    let copies: BTreeMap<String, Tensor> = of_first
        .map(|(name, tensor)| (name.replace("expert_0", "expert_1"), tensor.shallow_clone()))
        .collect();
    mixture.tensors.extend(copies);
    for key in ["router.weight", "router.bias"] {
        let tensor = &mixture.tensors[key];
        tensor.get(1).copy_(&tensor.get(0));
    }
    let (before, _) = routed(&put_on(&mixture, &base)?);
    let one = merged(&mixture, 0, 1, [0.5, 0.5])?;
    let (after, _) = routed(&put_on(&one.mixture, &base)?);
    assert_close("logits", &after, &before, 1e-10);
    assert!(one.relative_error < 1e-12);
    Ok(())
}

/// By Jensen's inequality, the odds of the merged expert against another expert are at most the
/// summed odds of the two.
#[test]
fn a_merged_expert_has_at_most_the_weight_of_both() -> Result<()> {
    let _generator = seed(311);
    let (base, mixture) = random(PLAIN, &router(RouterInput::Embeddings))?;
    let (_, before) = routed(&put_on(&mixture, &base)?);
    let of = |expert| before[0].probs.select(-1, expert);
    let share = (of(1) / (of(1) + of(2))).mean(Kind::Double).double_value(&[]);
    let two = merged(&mixture, 1, 2, [share, 1.0 - share])?.mixture;
    let (_, after) = routed(&put_on(&two, &base)?);
    let odds = after[0].probs.select(-1, 1) / after[0].probs.select(-1, 0);
    let both = (of(1) + of(2)) / of(0);
    let ratio: Tensor = odds / both;
    assert!(ratio.max().double_value(&[]) <= 1.0 + 1e-12);
    assert!(ratio.max().double_value(&[]) > 0.99, "{ratio}");
    Ok(())
}

/// A merge loses the singular values of the dense sum beyond the rank (Eckart and Young).
#[test]
fn the_error_of_a_merge_is_the_discarded_singular_values() -> Result<()> {
    let _generator = seed(312);
    for (text, weights) in [(PLAIN, [0.4, 0.6]), (SEVERAL, [0.9, 0.1]), (SEVERAL, [0.0, 1.0])] {
        let (_, mixture) = random(text, &plain_router())?;
        for (a, b) in [(0, 1), (1, 2), (0, 2)] {
            let Merged { mixture: two, relative_error } = merged(&mixture, a, b, weights)?;
            let (mut lost2, mut all2) = (0.0, 0.0);
            for path in paths(&mixture) {
                let sum =
                    dense(&mixture, path, a) * weights[0] + dense(&mixture, path, b) * weights[1];
                let (_, s, _) = sum.svd(true, true);
                let ranks =
                    [a, b].map(|e| mixture.specs[e].modules.get(&path).map_or(0, |m| m.rank));
                let rank = ranks[0].max(ranks[1]);
                let discarded = norm2(&s.narrow(0, rank, s.size()[0] - rank));
                let found = norm2(&(&sum - dense(&two, path, a)));
                assert!((found - discarded).abs() < 1e-12 * norm2(&sum).max(1.0), "{path}");
                (lost2, all2) = (lost2 + discarded, all2 + norm2(&sum));
                if rank > 0 {
                    assert_eq!(two.specs[a].modules[&path].rank, rank);
                    let rows = &two.tensors[&format!("{path}.{}.lora_a", expert_name(a))];
                    let products = rows.matmul(&rows.tr());
                    assert_close("A", &products, &Tensor::eye(rank, DOUBLE), 1e-12);
                }
            }
            let expected = (lost2 / all2).sqrt();
            assert!((relative_error - expected).abs() < 1e-12, "{relative_error}, {expected}");
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_merged_is_named() -> Result<()> {
    let _generator = seed(313);
    let (base, mut mixture) = random(PLAIN, &plain_router())?;
    let error =
        |mixture: &Mixture, a, b, weights| merged(mixture, a, b, weights).unwrap_err().to_string();
    let half = [0.5, 0.5];
    insta::assert_snapshot!(
        error(&mixture, 1, 1, half),
        @"two experts are merged in order, got 1 and 1"
    );
    insta::assert_snapshot!(
        error(&mixture, 0, 3, half),
        @"there is no expert 3, the mixture has 3 from 0"
    );
    insta::assert_snapshot!(
        error(&mixture, 0, 1, [0.5, 0.6]),
        @"the shares of two experts must be at least 0 and sum to 1, got [0.5, 0.6]"
    );
    insta::assert_snapshot!(
        error(&mixture, 0, 1, [f64::NAN, 0.5]),
        @"the shares of two experts must be at least 0 and sum to 1, got [NaN, 0.5]"
    );
    mixture.specs[1].alora_invocation_tokens = vec![3];
    insta::assert_snapshot!(
        error(&mixture, 0, 1, half),
        @"expert 1 has invocation tokens and is off before them, which no other is"
    );
    mixture.specs[0].use_dora = true;
    insta::assert_snapshot!(
        error(&mixture, 0, 2, half),
        @"expert 0 is a DoRA expert: it scales the base's own weight, at full rank"
    );
    mixture.specs[0].use_dora = false;
    mixture.tensors.remove("h.1.mlp.c_fc.expert_2.lora_b");
    insta::assert_snapshot!(
        error(&mixture, 0, 2, half),
        @"tensor `h.1.mlp.c_fc.expert_2.lora_b` is missing"
    );
    let dora = lora("use_dora = true");
    let dora = new_model(&base, &dora, &plain_router(), Kind::Double);
    insta::assert_snapshot!(
        similarity(&dora).unwrap_err().to_string(),
        @"expert 0 is a DoRA expert: it scales the base's own weight, at full rank"
    );
    Ok(())
}

#[test]
fn a_new_domain_that_gains_nothing_is_reported() {
    let stage = |loss: f64| {
        let mut stage = Stage::new("add verse", vec!["verse".into()], 3);
        stage.step = 100;
        stage.losses.insert("verse".into(), loss);
        [stage]
    };
    assert_eq!(without_gain(&stage(2.19), "verse", 2.1935), None);
    assert_eq!(without_gain(&stage(2.1935), "code", 2.1935), None);
    assert!(without_gain(&stage(2.2), "verse", 2.1935).is_some());
    let message = without_gain(&stage(2.1934), "verse", 2.1935).expect("it gained too little");
    insta::assert_snapshot!(message, @"
    the new expert brings `verse` nothing: its loss is 2.1934 at step 100, and is 2.1935 by the \
    base alone
    hint: begin again with more `--steps` or a higher rate, such as `--set \
    optimizer.adapters.learning_rate=5e-3`
    ");
}

/// A mixture with a part that is always on behind its experts.
fn random_with_shared(text: &str, router: &RouterConfig) -> Result<(Decoder, Mixture)> {
    let base = tiny_base(tiny_config());
    let lora = LoraConfig { shared_rank: 3, ..lora(text) };
    let mut specs = ExpertSpec::all(&lora, &base.spec)?;
    specs.extend(ExpertSpec::of_shared(&lora, &base.spec)?);
    let spec = RouterSpec::from(router);
    let model = RoutedModel::with_experts(&base, &specs, &spec, Device::Cpu, Kind::Double);
    randomize(&model)?;
    let mixture = Mixture::new(specs, spec, model.tensors());
    assert_eq!((mixture.num_experts(), mixture.specs.len()), (3, 4));
    Ok((base, Mixture { is_whole: true, ..mixture }))
}

/// Checks that the part that is always on is the last one of `after` and the same as in `before`,
/// and that routers do not score it.
fn check_shared(before: &Mixture, after: &Mixture, num_experts: usize) {
    assert_eq!((after.num_experts(), after.specs.len()), (num_experts, num_experts + 1));
    assert_eq!(after.specs.last(), before.specs.last());
    assert!(after.specs[..num_experts].iter().all(|spec| !spec.shared));
    let own = |mixture: &Mixture| -> BTreeMap<String, Tensor> {
        let tensors = mixture.tensors.iter().filter(|(name, _)| name.contains(".shared."));
        tensors.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    };
    assert!(!own(before).is_empty());
    assert_eq!(own(after), own(before));
    for (name, tensor) in after.tensors.iter().filter(|(name, _)| name.contains("router.")) {
        assert_eq!(tensor.size()[0], num_experts as i64, "{name}");
    }
}

#[test]
fn experts_come_and_go_beside_a_part_that_is_always_on() -> Result<()> {
    let _generator = seed(320);
    for input in ROUTER_INPUTS {
        let (base, mixture) = random_with_shared(SEVERAL, &router(input))?;
        let whole = put_on(&mixture, &base)?;
        let alone = |model: &RoutedModel, expert| {
            logits(model, &two_rows(), &RoutingSource::Expert(expert))
        };
        let smaller = without_expert(&mixture, 1)?;
        check_shared(&mixture, &smaller, 2);
        let model = put_on(&smaller, &base)?;
        for (old, new) in [(0, 0), (2, 1)] {
            assert_close(&format!("{input:?}"), &alone(&model, new), &alone(&whole, old), 1e-12);
        }
        let larger = with_expert(&mixture, &base, mixture.specs[0].clone(), &|_| -40.0)?;
        check_shared(&mixture, &larger, 4);
        let model = put_on(&larger, &base)?;
        let (after, _) = routed(&model);
        let (before, _) = routed(&whole);
        assert_close(&format!("{input:?}: added"), &after, &before, 1e-6);
        // a fresh expert adds nothing to what is always on
        let off = RoutingSource::Given(Tensor::zeros([3], DOUBLE));
        assert_close("fresh", &alone(&model, 3), &logits(&whole, &two_rows(), &off), 1e-12);
        // removed again, it is the mixture of before
        let again =
            without_expert(&Mixture { tensors: model.tensors(), is_whole: true, ..larger }, 3)?;
        check_shared(&mixture, &again, 3);
        let (back, _) = routed(&put_on(&again, &base)?);
        assert_close(&format!("{input:?}: back"), &back, &before, 1e-12);
        // down to one and up again, which draws new routers
        let one = without_expert(&smaller, 0)?;
        check_shared(&mixture, &one, 1);
        assert!(!one.tensors.keys().any(|name| name.contains("router")));
        let (single, _) = routed(&put_on(&one, &base)?);
        assert_close("one", &single, &alone(&whole, 2), 1e-12);
        let two = with_expert(&one, &base, mixture.specs[0].clone(), &|_| -40.0)?;
        check_shared(&mixture, &two, 2);
        let (both, _) = routed(&put_on(&two, &base)?);
        assert_close("two", &both, &single, 1e-6);
    }
    Ok(())
}

#[test]
fn experts_are_merged_beside_a_part_that_is_always_on() -> Result<()> {
    let _generator = seed(321);
    let (base, mixture) = random_with_shared(PLAIN, &router(RouterInput::LayerInput))?;
    let model = put_on(&mixture, &base)?;
    assert_eq!(similarity(&model)?.len(), 3);
    let plain = Mixture {
        specs: mixture.specs[..3].to_vec(),
        tensors: mixture
            .tensors
            .iter()
            .filter(|(name, _)| !name.contains(".shared."))
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect(),
        router: mixture.router.clone(),
        base: mixture.base.clone(),
        ..mixture
    };
    let without = put_on(&plain, &base)?;
    assert_eq!(similarity(&model)?, similarity(&without)?);
    let Merged { mixture: found, relative_error } = merged(&mixture, 0, 2, [0.25, 0.75])?;
    let expected = merged(&plain, 0, 2, [0.25, 0.75])?;
    check_shared(&mixture, &found, 2);
    assert_eq!(relative_error, expected.relative_error);
    assert_eq!(found.specs[..2], expected.mixture.specs[..]);
    for (name, tensor) in &expected.mixture.tensors {
        assert_eq!(&found.tensors[name], tensor, "{name}");
    }
    let refused = merged(&mixture, 0, 3, [0.5, 0.5]).unwrap_err().to_string();
    assert_eq!(refused, "there is no expert 3, the mixture has 3 from 0");
    Ok(())
}
