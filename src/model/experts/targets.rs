//! Which linear layers of a base the names in a config match.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::config::{LoraConfig, ModulePath, ModulePattern, TargetModule};
use crate::model::decoder::spec::DecoderSpec;

/// What a name or pattern of a config matches in a base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TargetMatch {
    /// The config's key, such as `lora.target_modules`.
    pub key: String,
    /// The name or pattern as it is written.
    pub pattern: String,
    /// Full names of the matched modules in a block, in the order of a block.
    pub modules: Vec<&'static str>,
    /// Number of layers in which they are matched.
    pub num_layers: i64,
}

impl TargetMatch {
    /// What `pattern` matches, which is the modules `paths`.
    pub fn new<'a>(
        key: String,
        pattern: String,
        paths: impl IntoIterator<Item = &'a ModulePath>,
    ) -> Self {
        let (mut modules, mut layers) = (BTreeSet::new(), BTreeSet::new());
        for path in paths {
            modules.insert(path.module);
            layers.insert(path.layer);
        }
        let modules = modules.into_iter().map(TargetModule::name).collect();
        Self { key, pattern, modules, num_layers: layers.len() as i64 }
    }
}

/// What each name and pattern of a config matches: those of `[lora]`, and those of single experts.
pub fn matches(lora: &LoraConfig, base: &DecoderSpec) -> Vec<TargetMatch> {
    let mut found = vec![];
    let mut add = |key: String, pattern: ModulePattern| {
        found.push(TargetMatch::new(key, pattern.into(), &matched(pattern, base)));
    };
    let mut group = |prefix: &str, key: &str, patterns: Vec<ModulePattern>| {
        for pattern in patterns {
            add(format!("{prefix}.{key}"), pattern);
        }
    };
    let has_own = (0..lora.num_experts as usize).any(|e| is_new_without_targets(lora, e));
    if has_own {
        group("lora", "target_modules", lora.target_modules.0.clone());
    }
    group("lora", "rank_pattern", lora.rank_pattern.keys().copied().collect());
    group("lora", "alpha_pattern", lora.alpha_pattern.keys().copied().collect());
    for (index, expert) in lora.experts.iter().enumerate() {
        let prefix = format!("lora.experts[{index}]");
        let names = expert.target_modules.iter().flat_map(|names| names.0.iter().copied());
        group(&prefix, "target_modules", names.collect());
        let ranks = expert.rank_pattern.iter().flat_map(|patterns| patterns.keys().copied());
        group(&prefix, "rank_pattern", ranks.collect());
        let alphas = expert.alpha_pattern.iter().flat_map(|patterns| patterns.keys().copied());
        group(&prefix, "alpha_pattern", alphas.collect());
    }
    found
}

/// Whether an expert is new and has the target modules of `[lora]`.
fn is_new_without_targets(lora: &LoraConfig, expert: usize) -> bool {
    let own = lora.experts.get(expert);
    own.is_none_or(|own| own.source.is_none() && own.target_modules.is_none())
}

/// Checks that each name and pattern of an expert's settings matches a layer of the base.
///
/// - `lora`: the expert's settings, as [`LoraConfig::of_expert`] returns them
///
/// # Errors
/// A name or pattern that matches nothing.
pub(super) fn check(lora: &LoraConfig, base: &DecoderSpec) -> Result<()> {
    let targets = lora.target_modules.0.iter().copied();
    let patterns = lora.rank_pattern.keys().chain(lora.alpha_pattern.keys()).copied();
    for pattern in targets.chain(patterns) {
        if !matched(pattern, base).is_empty() {
            continue;
        }
        if let ModulePattern::One(path) = pattern
            && base.modules().contains(&path.module)
        {
            bail!("a pattern names `{path}`, but the base has {} layers", base.num_layers);
        }
        let known: Vec<String> =
            base.modules().iter().map(|module| format!("`{}`", module.name())).collect();
        bail!(
            "`{}` matches no linear layer of the base, a `{}`\nhint: its layers are {}; the last \
             part of a name is enough, and `all-linear` names them all",
            String::from(pattern),
            base.family.name(),
            known.join(", ")
        );
    }
    Ok(())
}

/// The modules that a pattern matches.
fn matched(pattern: ModulePattern, base: &DecoderSpec) -> Vec<ModulePath> {
    let paths = (0..base.num_layers as usize)
        .flat_map(|layer| base.modules().iter().map(move |&module| ModulePath { layer, module }));
    paths.filter(|&path| pattern.contains(path)).collect()
}
