//! The routing of one forward pass, decided layer by layer.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `e` expert.

use tch::{Kind, Tensor};

use super::router::{Routing, RoutingRule};
use super::routers::Routers;
use super::site::{BlockWeights, Site};
use super::source::{RoutingSource, RowSources, invocation_mask, named_experts, one_hot};
use crate::config::{RouterInput, RoutingLevel, TargetModule};
use crate::model::batch::Inputs;
use crate::model::batch::prompt_means::PromptMeans;
use crate::model::experts::assignments::Assignments;
use crate::model::experts::spec::{ExpertSpec, num_routed};
use crate::model::experts::weights::RoutingWeights;

/// Whether some module that a site decides for may skip the experts that a token did not choose.
/// The second argument is the number of experts that each token chooses.
pub(crate) type SkipRule<'a> = dyn Fn(Site, i64) -> bool + 'a;

/// The parts of a model that take part in routing.
#[derive(Clone, Copy)]
pub(crate) struct RoutedParts<'a> {
    /// The routers.
    pub routers: &'a Routers,
    /// The experts' settings.
    pub specs: &'a [ExpertSpec],
    /// The dtype of routing weights.
    pub kind: Kind,
    /// Whether the routers' gradient stops at their input.
    pub detaches: bool,
    /// Whether to keep what the routers' scores are linear in.
    pub keeps_features: bool,
    /// Whether kernels may compute the routers.
    pub fuses: bool,
    /// Whether the modules of a site may skip experts.
    pub may_skip: &'a SkipRule<'a>,
}

/// The routing of one forward pass, decided layer by layer.
pub(crate) struct RoutingPass<'a> {
    routers: &'a Routers,
    may_skip: &'a SkipRule<'a>,
    detaches: bool,
    keeps_features: bool,
    fuses: bool,
    /// Whether there is a part that is always on.
    has_shared: bool,
    decided_by: DecidedBy,
    /// 1 where an expert is active, `[b, t, e]`; `None` if every expert always is.
    mask: Option<Tensor>,
    /// The weights used: one entry for all layers, or one for each site so far.
    pub used: Vec<RoutingWeights>,
    /// What the routers did at each site so far; empty if no router decides.
    pub routing: Vec<Routing>,
    /// The input of the layer that scores the experts at each site, if it is kept.
    pub features: Vec<Tensor>,
}

enum DecidedBy {
    /// Weights that are the same in every layer.
    Fixed(RoutingWeights),
    /// The routers decide.
    Routers {
        rule: RoutingRule,
        /// What the routers read, `[b, t, d]`; `None` if they read each layer's or module's own
        /// input.
        features: Option<Tensor>,
        /// Takes means over prompts; `None` if each token is routed by itself.
        averaging: Option<PromptMeans>,
        /// The expert that each position's record names, `[b, t]`. It overrides the router, except
        /// where it is -1.
        named: Option<Tensor>,
        /// The rows that the router does not decide.
        others: Option<OtherRows>,
    },
}

/// Rows of a batch that no router decides.
struct OtherRows {
    /// True for the rows that the router decides, `[b, 1, 1]`.
    by_router: Tensor,
    /// The weights of the others, with that of the part that is always on, `[b, t, s]`.
    fixed: Tensor,
}

impl<'a> RoutingPass<'a> {
    /// The routing of a batch by `source`.
    ///
    /// - `x`: the batch's embeddings, `[b, t, d]`
    /// - `base_hidden`: computes the base's last hidden state, `[b, t, d]`
    pub fn new(
        model: RoutedParts<'a>,
        inputs: &Inputs,
        x: &Tensor,
        source: &RoutingSource,
        rule: RoutingRule,
        base_hidden: &dyn Fn() -> Tensor,
    ) -> Self {
        let RoutedParts { routers, specs, kind, detaches, keeps_features, fuses, may_skip } = model;
        let num_routed = num_routed(specs);
        let mut has_shared = num_routed < specs.len();
        let specs = &specs[..num_routed];
        let mask = match source {
            RoutingSource::Base => None,
            _ => invocation_mask(specs, inputs, kind),
        };
        let others = OtherRows::new(source, inputs, mask.as_ref(), has_shared, kind);
        let asks_router = match source {
            RoutingSource::Router | RoutingSource::RecordOrRouter => !routers.is_empty(),
            _ => !routers.is_empty() && others.is_some(),
        };
        let e = num_routed as i64;
        let decided_by = match source {
            source if asks_router => {
                let (features, averaging) = router_inputs(routers, inputs, x, kind, base_hidden);
                let named = match source {
                    RoutingSource::RecordOrRouter => Some(named_experts(inputs)),
                    _ => None,
                };
                DecidedBy::Routers { rule, features, averaging, named, others }
            }
            source => {
                let weights = source.fixed_weights(inputs, e, kind, x.device());
                let ones = |count| {
                    let (b, t) = inputs.input_ids.size2().expect("token ids are [b, t]");
                    Tensor::ones([b, t, count], (kind, x.device()))
                };
                DecidedBy::Fixed(match (source, weights) {
                    // these rows say the weight of the part that is always on
                    (RoutingSource::Rows(_), weights) => {
                        let shared = i64::from(std::mem::take(&mut has_shared));
                        let mask = mask.as_ref().map(|mask| with_ones(mask, shared));
                        masked(weights, mask.as_ref())
                    }
                    // the part that is always on has a scaling of its own
                    (_, RoutingWeights::Ones) if has_shared => {
                        masked(RoutingWeights::PerToken(ones(e)), mask.as_ref())
                    }
                    (_, weights) => masked(weights, mask.as_ref()),
                })
            }
        };
        Self {
            routers,
            may_skip,
            detaches,
            keeps_features,
            fuses,
            has_shared,
            decided_by,
            mask,
            used: vec![],
            routing: vec![],
            features: vec![],
        }
    }

    /// Whether the routers read each layer's or module's own input.
    pub(crate) fn reads_layers(&self) -> bool {
        matches!(&self.decided_by, DecidedBy::Routers { features: None, .. })
    }

    /// Whether the routers read each target module's own input, so that [`RoutingPass::module`]
    /// decides.
    pub(crate) fn reads_modules(&self) -> bool {
        self.reads_layers() && self.routers.spec().input == RouterInput::ModuleInput
    }

    /// The weights of a layer. `layer_input` computes the layer's own input, after its first
    /// normalisation.
    pub fn block(&mut self, layer: usize, layer_input: &dyn Fn() -> Tensor) -> BlockWeights {
        let (features, averaging) = match &self.decided_by {
            DecidedBy::Routers { features, averaging, .. } => (features, averaging),
            DecidedBy::Fixed(weights) => {
                if self.used.is_empty() {
                    self.used.push(weights.shallow_clone());
                }
                return BlockWeights::of_all(with_shared(weights.shallow_clone(), self.has_shared));
            }
        };
        let sites: Vec<Site> = self.routers.sites_of(layer);
        if let ([Site { layer: None, .. }], [shared]) = (&sites[..], &self.used[..]) {
            return BlockWeights::of_all(self.completed(shared.shallow_clone()));
        }
        let features = match features {
            Some(features) => features.shallow_clone(),
            None => averaged(&layer_input(), averaging.as_ref()),
        };
        let decide = |site: Site| (site.module, self.decide(site, &features));
        BlockWeights::new(sites.into_iter().map(decide).collect())
    }

    /// The weights of a target module whose router reads its own input, `x`, `[b, t, i]`. The
    /// modules are asked for in the order of a forward pass.
    pub fn module(&mut self, layer: usize, module: TargetModule, x: &Tensor) -> RoutingWeights {
        let DecidedBy::Routers { averaging, .. } = &self.decided_by else {
            unreachable!("the caller asked `reads_modules`")
        };
        let features = averaged(x, averaging.as_ref());
        let mut sites = self.routers.sites_of(layer).into_iter();
        let site = sites.find(|site| site.module == Some(module));
        self.decide(site.expect("a module with experts has a router"), &features)
    }

    /// The weights that the router of a site gives, by the features `[b, t, _]`.
    fn decide(&mut self, site: Site, features: &Tensor) -> RoutingWeights {
        let DecidedBy::Routers { rule, named, others, .. } = &self.decided_by else {
            unreachable!("the caller saw that routers decide")
        };
        let router = &self.routers.all()[site.router];
        let features = if self.detaches { features.detach() } else { features.shallow_clone() };
        if self.keeps_features {
            self.features.push(router.features(&features));
        }
        let present = self.routers.present_at(site);
        let mut routing = match self.fuses {
            true => router.fused_forward(&features, rule, present),
            false => router.forward(&features, rule, present),
        };
        if let Some(named) = named {
            let by_name = one_hot(named, router.num_experts(), routing.weights.kind());
            let is_named = named.ge(0).unsqueeze(-1);
            routing.weights = by_name.where_self(&is_named, &routing.weights);
        }
        if let Some(mask) = &self.mask {
            routing.weights = &routing.weights * mask;
        }
        let weights = routing.weights.shallow_clone();
        self.used.push(RoutingWeights::PerToken(weights.shallow_clone()));
        let has_others = named.is_some() || others.is_some();
        let chosen = match &routing.selected {
            Some(selected) if !has_others && (self.may_skip)(site, selected.size()[2]) => {
                let (experts, num_experts) =
                    chosen_with_shared(selected, router.num_experts(), self.has_shared);
                let assignments = Assignments::new(&experts, num_experts);
                RoutingWeights::Chosen(weights, assignments)
            }
            _ => RoutingWeights::PerToken(weights),
        };
        self.routing.push(routing);
        self.completed(chosen)
    }

    /// A router's weights with that of the part that is always on, and with the weights of the rows
    /// that no router decides.
    fn completed(&self, weights: RoutingWeights) -> RoutingWeights {
        let weights = with_shared(weights, self.has_shared);
        match (&self.decided_by, weights) {
            (
                DecidedBy::Routers { others: Some(others), .. },
                RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _),
            ) => {
                let weights = weights.where_self(&others.by_router, &others.fixed);
                RoutingWeights::PerToken(weights)
            }
            (_, weights) => weights,
        }
    }
}

impl OtherRows {
    /// The rows that the router does not decide; `None` if it decides none, or all.
    fn new(
        source: &RoutingSource,
        inputs: &Inputs,
        mask: Option<&Tensor>,
        has_shared: bool,
        kind: Kind,
    ) -> Option<Self> {
        let RoutingSource::Rows(RowSources { fixed, by_router: Some(by_router) }) = source else {
            return None;
        };
        let t = inputs.input_ids.size()[1];
        let fixed = fixed.to_kind(kind).unsqueeze(1).expand([-1, t, -1], false);
        let fixed = match mask {
            Some(mask) => fixed * with_ones(mask, i64::from(has_shared)),
            None => fixed,
        };
        Some(Self { by_router: by_router.view([-1, 1, 1]), fixed })
    }
}

/// `mask`, `[b, t, e]`, with `count` more columns of ones.
fn with_ones(mask: &Tensor, count: i64) -> Tensor {
    let (b, t, _) = mask.size3().expect("a mask is [b, t, e]");
    Tensor::cat(&[mask, &Tensor::ones([b, t, count], (mask.kind(), mask.device()))], -1)
}

/// The weights of the routed experts and, behind them, weight 1 for the part that is always on.
fn with_shared(weights: RoutingWeights, has_shared: bool) -> RoutingWeights {
    let extended = |weights: Tensor| {
        let one = weights.narrow(-1, 0, 1).ones_like();
        Tensor::cat(&[weights, one], -1)
    };
    match weights {
        weights if !has_shared => weights,
        RoutingWeights::PerToken(weights) => RoutingWeights::PerToken(extended(weights)),
        RoutingWeights::Chosen(weights, assignments) => {
            RoutingWeights::Chosen(extended(weights), assignments)
        }
        weights => weights,
    }
}

/// The experts that each token chose, `[b, t, k]`, with the part that is always on, and the number
/// of all experts.
fn chosen_with_shared(selected: &Tensor, num_routed: i64, has_shared: bool) -> (Tensor, i64) {
    if !has_shared {
        return (selected.shallow_clone(), num_routed);
    }
    let shared = selected.narrow(-1, 0, 1).full_like(num_routed);
    (Tensor::cat(&[selected, &shared], -1), num_routed + 1)
}

/// What the routers read, `[b, t, d]`, unless they read each layer's or module's own input, and
/// what takes its means over prompts, if they read means. The arguments are those of
/// [`RoutingPass::new`].
fn router_inputs(
    routers: &Routers,
    inputs: &Inputs,
    x: &Tensor,
    kind: Kind,
    base_hidden: &dyn Fn() -> Tensor,
) -> (Option<Tensor>, Option<PromptMeans>) {
    let spec = routers.spec();
    let averaging = (spec.level == RoutingLevel::Sequence).then(|| inputs.prompt_means(kind));
    let features = match spec.input {
        RouterInput::Embeddings => Some(x.shallow_clone()),
        RouterInput::BaseHidden => Some(tch::no_grad(base_hidden)),
        RouterInput::LayerInput | RouterInput::ModuleInput => None,
    };
    (features.map(|x| averaged(&x, averaging.as_ref())), averaging)
}

/// `features`, `[b, t, d]`, or their means over prompts.
fn averaged(features: &Tensor, averaging: Option<&PromptMeans>) -> Tensor {
    averaging.map_or_else(|| features.shallow_clone(), |means| means.of(features))
}

fn masked(weights: RoutingWeights, mask: Option<&Tensor>) -> RoutingWeights {
    match (weights, mask) {
        (weights, None) => weights,
        (RoutingWeights::Off, _) => RoutingWeights::Off,
        (RoutingWeights::Ones, Some(mask)) => RoutingWeights::PerToken(mask.shallow_clone()),
        (RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _), Some(mask)) => {
            RoutingWeights::PerToken(weights * mask)
        }
    }
}
