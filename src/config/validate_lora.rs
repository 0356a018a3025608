//! Checks `[lora]`.

use std::collections::BTreeMap;

use super::faults::Faults;
use super::{
    Capacity, Config, ExpertConfig, LoraConfig, ModulePattern, TargetModule, TargetModules,
};

/// Checks `[lora]`.
pub(super) fn check_lora(config: &Config, faults: &mut Faults) {
    let lora = &config.lora;
    faults.at_least_one("lora.num_experts", lora.num_experts);
    faults.in_range(
        "lora.dropout",
        lora.dropout,
        (0.0..1.0).contains(&lora.dropout),
        "at least 0 and below 1",
    );
    if lora.shared_rank < 0 {
        let fault = format!("must be at least 0, got {}", lora.shared_rank);
        faults.add("lora.shared_rank", fault);
    }
    check_capacity(config, faults);
    let own_targets = lora.experts.iter().filter_map(|expert| expert.target_modules.as_ref());
    let all_targets: Vec<ModulePattern> =
        own_targets.chain([&lora.target_modules]).flat_map(|names| &names.0).copied().collect();
    let shape = Shape {
        rank: Some(lora.rank),
        alpha: Some(lora.alpha),
        target_modules: Some(&lora.target_modules),
        rank_pattern: Some(&lora.rank_pattern),
        alpha_pattern: Some(&lora.alpha_pattern),
    };
    check_shape("lora", &shape, &all_targets, faults);
    let (found, count) = (lora.experts.len(), lora.num_experts);
    if found as i64 > count.max(0) {
        let fault = format!("must have at most `lora.num_experts` {count} entries, got {found}");
        faults.add("lora.experts", fault);
    }
    for (i, expert) in lora.experts.iter().enumerate() {
        let key = format!("lora.experts[{i}]");
        if let Some(token) = expert.alora_invocation_tokens.iter().find(|token| **token < 0) {
            faults.add(
                &format!("{key}.alora_invocation_tokens"),
                format!("must be token ids of at least 0, got {token}"),
            );
        }
        if expert.source.is_none() {
            let shape = Shape {
                rank: expert.rank,
                alpha: expert.alpha,
                target_modules: expert.target_modules.as_ref(),
                rank_pattern: expert.rank_pattern.as_ref(),
                alpha_pattern: expert.alpha_pattern.as_ref(),
            };
            check_shape(&key, &shape, &lora.of_expert(i).target_modules.0, faults);
        } else {
            check_adapters_own(&key, expert, faults);
        }
    }
}

/// Checks that an expert with a `source` sets nothing that is the adapter's own.
fn check_adapters_own(key: &str, expert: &ExpertConfig, faults: &mut Faults) {
    let set = [
        ("rank", expert.rank.is_some()),
        ("alpha", expert.alpha.is_some()),
        ("target_modules", expert.target_modules.is_some()),
        ("use_rslora", expert.use_rslora.is_some()),
        ("use_dora", expert.use_dora.is_some()),
        ("init", expert.init.is_some()),
        ("rank_pattern", expert.rank_pattern.is_some()),
        ("alpha_pattern", expert.alpha_pattern.is_some()),
        ("alora_invocation_tokens", !expert.alora_invocation_tokens.is_empty()),
    ];
    for (field, _) in set.into_iter().filter(|(_, is_set)| *is_set) {
        faults.add(&format!("{key}.{field}"), "is the adapter's own with a `source`".into());
    }
}

/// Checks that the experts can get ranks by their domains' sizes.
fn check_capacity(config: &Config, faults: &mut Faults) {
    let lora = &config.lora;
    if lora.capacity == Capacity::Even {
        return;
    }
    let key = "lora.capacity";
    if !config.assigns_experts() {
        let fault = "`by_domain` needs experts that belong to domains: \
                     `router.domain_supervision`, `train.routing = \"domain\"` or \
                     `data.domains[].expert`";
        faults.add(key, fault.into());
    }
    if lora.experts_per_layer.is_some() {
        faults.add(key, "`by_domain` does not go with `lora.experts_per_layer`".into());
    }
    let sets_rank = |own: &ExpertConfig| {
        own.source.is_some() || own.rank.is_some() || own.rank_pattern.is_some()
    };
    let fault = |what: &str| format!("`by_domain` sets the ranks, and so does `{what}`");
    if lora.experts.iter().any(sets_rank) {
        faults.add(key, fault("lora.experts"));
    }
    if !lora.rank_pattern.is_empty() {
        faults.add(key, fault("lora.rank_pattern"));
    }
}

/// The settings of an expert's shape that `[lora]` or one entry of `[[lora.experts]]` contains.
struct Shape<'a> {
    rank: Option<i64>,
    alpha: Option<f64>,
    target_modules: Option<&'a TargetModules>,
    rank_pattern: Option<&'a BTreeMap<ModulePattern, i64>>,
    alpha_pattern: Option<&'a BTreeMap<ModulePattern, f64>>,
}

/// Checks a shape.
///
/// - `key`: the dotted path of the shape, for messages
/// - `targets`: the names of the modules that the shape's patterns may name
fn check_shape(key: &str, shape: &Shape<'_>, targets: &[ModulePattern], faults: &mut Faults) {
    let key = |field: &str| format!("{key}.{field}");
    if let Some(rank) = shape.rank {
        faults.at_least_one(&key("rank"), rank);
    }
    if let Some(alpha) = shape.alpha {
        faults.above_zero(&key("alpha"), alpha);
    }
    let entry = |field: &str, pattern: ModulePattern| {
        let name = String::from(pattern);
        key(&format!("{field}.\"{name}\""))
    };
    let check_target = |key: String, pattern: ModulePattern, faults: &mut Faults| {
        let is_target = |module: &TargetModule| targets.iter().any(|target| target.names(*module));
        if !TargetModule::ALL.into_iter().filter(is_target).any(|m| pattern.names(m)) {
            faults.add(&key, "names no target module".into());
        }
    };
    for (&pattern, &rank) in shape.rank_pattern.into_iter().flatten() {
        let key = entry("rank_pattern", pattern);
        faults.at_least_one(&key, rank);
        check_target(key, pattern, faults);
    }
    for (&pattern, &alpha) in shape.alpha_pattern.into_iter().flatten() {
        let key = entry("alpha_pattern", pattern);
        faults.above_zero(&key, alpha);
        check_target(key, pattern, faults);
    }
    let Some(TargetModules(modules)) = shape.target_modules else { return };
    if modules.is_empty() {
        faults.add(&key("target_modules"), "must name at least one module, got none".into());
    }
    for (i, module) in modules.iter().enumerate() {
        if modules[..i].contains(module) {
            faults.add(&key("target_modules"), format!("names `{}` twice", String::from(*module)));
        }
    }
}

/// Checks the number of experts in each layer.
pub(super) fn check_layers(lora: &LoraConfig, faults: &mut Faults) {
    if let Some(layers) = &lora.experts_per_layer {
        let key = "lora.experts_per_layer";
        for (layer, &count) in layers.iter().enumerate() {
            if !(1..=lora.num_experts).contains(&count) {
                let range = format!("from 1 to `lora.num_experts` {}", lora.num_experts);
                faults.add(&format!("{key}[{layer}]"), format!("must be {range}, got {count}"));
            }
        }
        if layers.iter().max().is_some_and(|&most| most < lora.num_experts) {
            faults.add(key, format!("leaves expert {} without a layer", lora.num_experts - 1));
        }
        if lora.experts.iter().any(|expert| expert.source.is_some()) {
            faults.add(key, "goes with new experts, not with those from a `source`".into());
        }
    }
}
