//! The settings of an expert: rank and alpha on each target module, and options.
//!
//! An expert is one PEFT adapter. Its spec says what `adapter_config.json` says, resolved to
//! modules.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::targets::{self, TargetMatch};
use crate::config::{Config, LoraConfig, LoraInit, ModulePath, ModulePattern, TargetModule};
use crate::model::decoder::spec::DecoderSpec;

/// An expert's settings, resolved to the modules of a base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertSpec {
    /// Rank and alpha of each target module.
    pub modules: BTreeMap<ModulePath, RankAlpha>,
    /// Scale by `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// Whether it has a magnitude for each output (DoRA).
    pub use_dora: bool,
    /// Where A and B start. With PiSSA and OLoRA, the update is the change of `s B A` since the
    /// start.
    pub init: LoraInit,
    /// Whether it is trained.
    pub trainable: bool,
    /// The expert is active from the last occurrence of these tokens on; always, if there are none.
    pub alora_invocation_tokens: Vec<i64>,
    /// Whether it is the part that is always on (`lora.shared_rank`), which the router does not
    /// score. A mixture has at most one, behind its routed experts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

/// Number of routed experts among `specs`: all but the part that is always on.
pub fn num_routed(specs: &[ExpertSpec]) -> usize {
    specs.iter().filter(|spec| !spec.shared).count()
}

/// The name of an expert of `specs` in files: `expert_0`, or `shared` for the part that is always
/// on. PEFT misreads a name of digits only.
pub fn part_name(specs: &[ExpertSpec], index: usize) -> String {
    match specs.get(index) {
        Some(spec) if spec.shared => SHARED.into(),
        _ => expert_name(index),
    }
}

/// The name of the part that is always on in files.
pub(crate) const SHARED: &str = "shared";

/// A routed expert's name in files, such as `expert_0`.
pub fn expert_name(expert: usize) -> String {
    format!("expert_{expert}")
}

/// Size and scale of an expert on one module.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankAlpha {
    /// Rank `r`.
    pub rank: i64,
    /// Numerator of the scaling.
    pub alpha: f64,
}

impl ExpertSpec {
    /// The spec of expert `expert` in a config, for a base.
    ///
    /// # Errors
    /// If a target or a pattern matches no layer of the base, `experts_per_layer` has another
    /// number of layers than the base, an invocation token is not in its vocabulary, or PiSSA or
    /// OLoRA has a rank above that of the weight.
    pub fn new(lora: &LoraConfig, expert: usize, base: &DecoderSpec) -> Result<Self> {
        Self::resolve(lora, expert, base).with_context(|| format!("expert {expert} of `lora`"))
    }

    fn resolve(lora: &LoraConfig, expert: usize, base: &DecoderSpec) -> Result<Self> {
        let own = lora.experts.get(expert).cloned().unwrap_or_default();
        let lora = lora.of_expert(expert);
        targets::check(&lora, base)?;
        let vocab = base.vocab_size;
        if let Some(token) = own.alora_invocation_tokens.iter().find(|token| **token >= vocab) {
            bail!(
                "`alora_invocation_tokens` has {token}, which is not in the base's vocabulary of \
                 {vocab}"
            );
        }
        let layers = lora.experts_per_layer.as_ref();
        if let Some(layers) = layers.filter(|layers| layers.len() as i64 != base.num_layers) {
            let (found, num_layers) = (layers.len(), base.num_layers);
            bail!("`experts_per_layer` names {found} layers, the base has {num_layers}");
        }
        let mut modules = BTreeMap::new();
        for layer in 0..base.num_layers as usize {
            if layers.is_some_and(|layers| expert as i64 >= layers[layer]) {
                continue;
            }
            let paths = base.modules().iter().map(|&module| ModulePath { layer, module });
            for path in paths.filter(|&path| lora.target_modules.contain(path)) {
                let rank = ModulePattern::find(&lora.rank_pattern, path).unwrap_or(lora.rank);
                let alpha = ModulePattern::find(&lora.alpha_pattern, path).unwrap_or(lora.alpha);
                modules.insert(path, RankAlpha { rank, alpha });
            }
        }
        let spec = Self {
            modules,
            use_rslora: lora.use_rslora,
            use_dora: lora.use_dora,
            init: lora.init,
            trainable: own.trainable,
            alora_invocation_tokens: own.alora_invocation_tokens,
            shared: false,
        };
        spec.check_ranks(base)?;
        Ok(spec)
    }

    /// The spec of expert `expert` in a run's config, whose `lora.scale` sets its alpha.
    ///
    /// # Errors
    /// As for [`ExpertSpec::new`].
    pub fn of_config(config: &Config, expert: usize, base: &DecoderSpec) -> Result<Self> {
        let mut spec = Self::new(&config.lora, expert, base)?;
        let factor = config.scale_factor(expert);
        spec.modules.values_mut().for_each(|size| size.alpha *= factor);
        Ok(spec)
    }

    /// The part of a config that is always on, if it has one: with rank `lora.shared_rank` and the
    /// scaling that `[lora]` gives on each module.
    ///
    /// # Errors
    /// As for [`ExpertSpec::new`].
    pub fn of_shared(lora: &LoraConfig, base: &DecoderSpec) -> Result<Option<Self>> {
        if lora.shared_rank == 0 {
            return Ok(None);
        }
        let lora = LoraConfig { experts: vec![], experts_per_layer: None, ..lora.clone() };
        let mut spec = Self { shared: true, ..Self::new(&lora, 0, base)? };
        spec.set_rank(&|_| lora.shared_rank);
        spec.check_ranks(base).context("`lora.shared_rank`")?;
        Ok(Some(spec))
    }

    /// Gives each module the rank that `rank` makes of its own, and an alpha with which the scaling
    /// stays the same.
    pub(crate) fn set_rank(&mut self, rank: &dyn Fn(i64) -> i64) {
        for size in self.modules.values_mut() {
            let new = rank(size.rank);
            let ratio = new as f64 / size.rank as f64;
            size.alpha *= if self.use_rslora { ratio.sqrt() } else { ratio };
            size.rank = new;
        }
    }

    /// The specs of all experts of a config in which no expert has a source.
    pub fn all(lora: &LoraConfig, base: &DecoderSpec) -> Result<Vec<Self>> {
        (0..lora.num_experts as usize).map(|expert| Self::new(lora, expert, base)).collect()
    }

    /// Checks that the base's weights have as many components as the expert starts from.
    ///
    /// # Errors
    /// PiSSA or OLoRA with a rank above that of a weight.
    pub(crate) fn check_ranks(&self, base: &DecoderSpec) -> Result<()> {
        if !self.starts_from_base() {
            return Ok(());
        }
        for (path, RankAlpha { rank, .. }) in &self.modules {
            let (i, o) = base.linear_shape(path.module);
            if *rank > i.min(o) {
                bail!(
                    "`init` takes components of the base's weight: `{path}` has {}, fewer than \
                     the rank {rank}",
                    i.min(o)
                );
            }
        }
        Ok(())
    }

    /// Whether A and B start from the base's weight, so that their initial product is subtracted.
    pub(crate) fn starts_from_base(&self) -> bool {
        matches!(self.init, LoraInit::Pissa | LoraInit::Olora)
    }

    /// The factor of `B A` on a module, if the expert targets it.
    pub fn scaling(&self, path: ModulePath) -> Option<f64> {
        let RankAlpha { rank, alpha } = self.modules.get(&path)?;
        let rank = *rank as f64;
        Some(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }

    /// The modules that the expert targets in some layer, in the order of a block.
    pub fn target_modules(&self) -> Vec<TargetModule> {
        let targets =
            |module: &TargetModule| self.modules.keys().any(|path| path.module == *module);
        TargetModule::ALL.into_iter().filter(targets).collect()
    }

    /// What the adapter of expert `index` targets, from which the expert starts.
    pub(crate) fn source_match(&self, index: usize) -> TargetMatch {
        let key = format!("lora.experts[{index}].source");
        TargetMatch::new(key, "the adapter's `target_modules`".into(), self.modules.keys())
    }

    /// Number of parameters of A, of B and of the magnitudes, for a base.
    pub fn num_parameters(&self, base: &DecoderSpec) -> (i64, i64, i64) {
        let mut sums = (0, 0, 0);
        for (path, RankAlpha { rank, .. }) in &self.modules {
            let (i, o) = base.linear_shape(path.module);
            sums.0 += rank * i;
            sums.1 += rank * o;
            sums.2 += if self.use_dora { o } else { 0 };
        }
        sums
    }
}
