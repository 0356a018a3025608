//! `[lora]`: the settings of all experts, and of single ones.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::AdapterSource;
use super::paths::ModulePattern;
use super::targets::TargetModules;

/// `[lora]`: the low-rank update that each expert adds to a target module.
///
/// The entries of `[[lora.experts]]` change the settings of single experts: the first entry is for
/// expert 0, the second for expert 1, and so on. An expert without an entry has the settings of
/// `[lora]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Number of experts `E`. With 1 there is no router, and the result is plain LoRA.
    pub num_experts: i64,
    /// Rank `r` of each expert, which then has `r * (in + out)` parameters in each target module.
    pub rank: i64,
    /// Numerator of the scaling `alpha / rank` (arXiv:2106.09685, section 4.1). What it means in a
    /// mixture is set by `scale`.
    pub alpha: f64,
    /// Whether `alpha` is that of the mixture or of each expert alone.
    pub scale: LoraScale,
    /// Rank of a part that is always on beside the routed experts, with weight 1 for each token and
    /// the same scaling as they have without `scale`. It has the target modules and the options of
    /// `[lora]` and is saved as an adapter of its own, `shared`. 0 means none.
    pub shared_rank: i64,
    /// How the ranks of the experts are set.
    pub capacity: Capacity,
    /// The linear layers that get experts, by their full names or the last parts of these, as in
    /// PEFT: `["q_proj", "v_proj"]`, or `"all-linear"` for all of them. A layer of one block is
    /// named as `layers.0.self_attn.q_proj`. Each name must match a layer of the base; `dylora
    /// train --dry-run` lists what each one matches.
    pub target_modules: TargetModules,
    /// Whether the scaling is `alpha / sqrt(rank)` instead (rsLoRA, arXiv:2312.03732, theorem 3.2).
    pub use_rslora: bool,
    /// Whether each expert also trains a magnitude for each output (DoRA, arXiv:2402.09353, eq. 5).
    pub use_dora: bool,
    /// How A and B are initialised.
    pub init: LoraInit,
    /// Probability of dropping an element of an expert's input in training.
    pub dropout: f64,
    /// Whether the experts of a target module share one dropout mask.
    pub dropout_masks: DropoutMasks,
    /// Ranks of single modules, for example `{ down_proj = 4, "layers.0.self_attn.q_proj" = 16 }`
    /// or, for GPT-2, `{ "mlp.c_fc" = 4, "h.0.attn.c_attn" = 16 }`. A pattern for a module in one
    /// layer overrides a pattern for that module in all layers.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<ModulePattern, i64>,
    /// Alphas of single modules, in the same form as `rank_pattern`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<ModulePattern, f64>,
    /// How many experts each layer has. Layer `i` has the first `experts_per_layer[i]` experts and
    /// routes over these alone (MoLA, arXiv:2402.08562). Without it, every layer has all experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_per_layer: Option<Vec<i64>>,
    /// A loss that pushes the experts apart. Without it, there is no such loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orthogonality: Option<Orthogonality>,
    /// `[[lora.experts]]`: settings of single experts, and adapters that experts start from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertConfig>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            num_experts: 4,
            rank: 8,
            alpha: 16.0,
            scale: LoraScale::Mixture,
            shared_rank: 0,
            capacity: Capacity::Even,
            target_modules: TargetModules::all(),
            use_rslora: false,
            use_dora: false,
            init: LoraInit::Default,
            dropout: 0.0,
            dropout_masks: DropoutMasks::Shared,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            experts_per_layer: None,
            orthogonality: None,
            experts: vec![],
        }
    }
}

impl LoraConfig {
    /// The settings of one expert: its own where it has any, and otherwise those of `[lora]`. The
    /// fields `num_experts` and `experts` do not change.
    #[must_use]
    pub fn of_expert(&self, expert: usize) -> Self {
        let mut lora = self.clone();
        let Some(own) = self.experts.get(expert) else { return lora };
        fn replace<T: Clone>(value: &mut T, own: &Option<T>) {
            if let Some(own) = own {
                *value = own.clone();
            }
        }
        replace(&mut lora.rank, &own.rank);
        replace(&mut lora.alpha, &own.alpha);
        replace(&mut lora.target_modules, &own.target_modules);
        replace(&mut lora.use_rslora, &own.use_rslora);
        replace(&mut lora.use_dora, &own.use_dora);
        replace(&mut lora.init, &own.init);
        replace(&mut lora.rank_pattern, &own.rank_pattern);
        replace(&mut lora.alpha_pattern, &own.alpha_pattern);
        lora
    }
}

/// `[[lora.experts]]`: the settings of one expert. A key of `[lora]` that is left out here keeps
/// its value from `[lora]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExpertConfig {
    /// A PEFT adapter that the expert starts from. The expert's rank, alpha, target modules and
    /// options are then those of the adapter, and none of them may be set here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<AdapterSource>,
    /// Overrides `lora.rank`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<i64>,
    /// Overrides `lora.alpha`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Overrides `lora.target_modules`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<TargetModules>,
    /// Overrides `lora.use_rslora`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_rslora: Option<bool>,
    /// Overrides `lora.use_dora`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_dora: Option<bool>,
    /// Overrides `lora.init`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<LoraInit>,
    /// Whether the expert is trained. Its column of the router is trained in any case.
    pub trainable: bool,
    /// Token ids that invoke the expert. In each document, the expert is active from the start of
    /// their last occurrence (aLoRA, arXiv:2504.12397), and not at all if they do not occur.
    /// Without token ids, it is always active.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alora_invocation_tokens: Vec<i64>,
    /// Overrides `lora.rank_pattern`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_pattern: Option<BTreeMap<ModulePattern, i64>>,
    /// Overrides `lora.alpha_pattern`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_pattern: Option<BTreeMap<ModulePattern, f64>>,
}

impl Default for ExpertConfig {
    fn default() -> Self {
        Self {
            source: None,
            rank: None,
            alpha: None,
            target_modules: None,
            use_rslora: None,
            use_dora: None,
            init: None,
            trainable: true,
            alora_invocation_tokens: vec![],
            rank_pattern: None,
            alpha_pattern: None,
        }
    }
}

/// A loss that is 0 if the experts are orthogonal. In `orthogonality = { a = 0.1 }`, the number is
/// the factor of the loss. The loss is a squared cosine between two experts, averaged over the
/// pairs of experts of a target module and then over the target modules:
///
/// ```text
/// a    |A_e A_f^T|^2 / (|A_e|^2 |A_f|^2)
/// ba   <D_e, D_f>^2 / (|D_e|^2 |D_f|^2),   D = B A
/// ```
///
/// `a` compares the input spaces of the experts (O-LoRA, arXiv:2310.14152, eq. 6, squared and
/// scaled), and `ba` compares their updates. The part that is always on (`lora.shared_rank`) counts
/// as an expert here, so that the experts learn what it has not learned.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Orthogonality {
    /// The cosine is between the down-projections A.
    A(f64),
    /// The cosine is between the updates B A.
    Ba(f64),
}

impl Orthogonality {
    /// The factor of the loss.
    pub fn coef(self) -> f64 {
        match self {
            Self::A(coef) | Self::Ba(coef) => coef,
        }
    }
}

/// Whether `lora.alpha` is that of the mixture or of each expert alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraScale {
    /// `alpha` is that of the mixture, so that the size of its update does not depend on the number
    /// of experts or on the routing. The weights of a router sum to 1, which makes the update of
    /// each expert smaller. Therefore, each expert's alpha is multiplied by `E` with dense routing
    /// and by `k` with `router.top_k = k`. Under domain supervision, the factor is the number of
    /// experts of a domain, which share its weight, and so is 1 as a rule. It is 1 with a
    /// `train.routing` other than `router` and `uniform`, for an expert from a `source` and for one
    /// that `dylora add-expert` adds.
    #[default]
    Mixture,
    /// `alpha` is that of each expert at weight 1, as in PEFT.
    PerExpert,
}

/// How the ranks of the experts are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Capacity {
    /// Each expert has the rank `lora.rank`.
    #[default]
    Even,
    /// Experts of larger domains get larger ranks: the sum of all ranks, `lora.num_experts` times
    /// `lora.rank`, is divided in proportion to the training blocks of each expert's domains, with
    /// at least rank 1 for each expert. Alpha follows the rank, so that the scaling stays the same.
    /// It needs experts that belong to domains, as under domain supervision.
    ByDomain,
}

/// How A and B are initialised. In every case, the first forward pass gives the same result as the
/// base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraInit {
    /// A is uniform in `±1/sqrt(in)` and B is zero, which is PEFT's default.
    #[default]
    Default,
    /// A is drawn from `N(0, 1/r^2)` and B is zero.
    Gaussian,
    /// A and B hold the `r` largest singular components of the base's weight (PiSSA,
    /// arXiv:2404.02948, eqs. 2-4).
    Pissa,
    /// A and B hold the first `r` columns and rows of the QR factors of the base's weight (OLoRA,
    /// arXiv:2406.01775, algorithm 1).
    Olora,
}

/// Whether the experts of a target module share one dropout mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DropoutMasks {
    /// All experts share one mask, so that one pair of matrix products applies them all.
    #[default]
    Shared,
    /// Each expert has its own mask, as in PEFT. The experts are then computed one after another,
    /// which is slower.
    PerExpert,
}
