//! The routing of one forward pass, decided layer by layer.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `e` expert.

use tch::{Kind, Tensor};

use super::router::{Routing, RoutingRule};
use super::routers::Routers;
use super::site::{BlockWeights, Site};
use super::source::{RoutingSource, invocation_mask, named_experts, one_hot};
use crate::config::{RouterInput, RoutingLevel, TargetModule};
use crate::model::batch::Inputs;
use crate::model::experts::assignments::Assignments;
use crate::model::experts::spec::{ExpertSpec, num_routed};
use crate::model::experts::weights::RoutingWeights;

/// Whether some module that a site decides for may skip the experts that a token did not choose.
/// The second argument is the number of experts that each token chooses.
pub type SkipRule<'a> = dyn Fn(Site, i64) -> bool + 'a;

/// The parts of a model that take part in routing.
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "a borrow for one call, with a function in it")]
pub struct RoutedParts<'a> {
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
    /// Whether the modules of a site may skip experts.
    pub may_skip: &'a SkipRule<'a>,
}

/// The routing of one forward pass, decided layer by layer.
#[expect(
    missing_debug_implementations,
    reason = "it lives for one forward pass, with a function in it"
)]
pub struct RoutingPass<'a> {
    routers: &'a Routers,
    may_skip: &'a SkipRule<'a>,
    detaches: bool,
    keeps_features: bool,
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
        /// Matrix that takes means over prompts, `[b, t, t]`; `None` if each token is routed by
        /// itself.
        averaging: Option<Tensor>,
        /// The expert that each position's record names, `[b, t]`. It overrides the router, except
        /// where it is -1.
        named: Option<Tensor>,
    },
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
        let RoutedParts { routers, specs, kind, detaches, keeps_features, may_skip } = model;
        let num_routed = num_routed(specs);
        let has_shared = num_routed < specs.len();
        let specs = &specs[..num_routed];
        let mask = match source {
            RoutingSource::Base => None,
            _ => invocation_mask(specs, inputs, kind),
        };
        let decided_by = match source {
            RoutingSource::Router | RoutingSource::RecordOrRouter if !routers.is_empty() => {
                let spec = routers.spec();
                let features = match spec.input {
                    RouterInput::Embeddings => Some(x.shallow_clone()),
                    RouterInput::BaseHidden => Some(tch::no_grad(base_hidden)),
                    RouterInput::LayerInput | RouterInput::ModuleInput => None,
                };
                let averaging =
                    (spec.level == RoutingLevel::Sequence).then(|| inputs.prompt_means(kind));
                let features = features.map(|x| averaged(&x, averaging.as_ref()));
                let named = match source {
                    RoutingSource::RecordOrRouter => Some(named_experts(inputs)),
                    _ => None,
                };
                DecidedBy::Routers { rule, features, averaging, named }
            }
            source => {
                let e = specs.len() as i64;
                let weights = source.fixed_weights(inputs, e, kind, x.device());
                // the part that is always on has a scaling of its own
                let weights = match weights {
                    RoutingWeights::Ones if has_shared => {
                        let (b, t) = inputs.input_ids.size2().expect("token ids are [b, t]");
                        RoutingWeights::PerToken(Tensor::ones([b, t, e], (kind, x.device())))
                    }
                    weights => weights,
                };
                DecidedBy::Fixed(masked(weights, mask.as_ref()))
            }
        };
        let (used, routing, features) = (vec![], vec![], vec![]);
        Self {
            routers,
            may_skip,
            detaches,
            keeps_features,
            has_shared,
            decided_by,
            mask,
            used,
            routing,
            features,
        }
    }

    /// Whether the routers read each layer's or module's own input.
    pub fn reads_layers(&self) -> bool {
        matches!(&self.decided_by, DecidedBy::Routers { features: None, .. })
    }

    /// Whether the routers read each target module's own input, so that [`RoutingPass::module`]
    /// decides.
    pub fn reads_modules(&self) -> bool {
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
            let weights = with_shared(shared.shallow_clone(), self.has_shared);
            return BlockWeights::of_all(weights);
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
        let DecidedBy::Routers { rule, named, .. } = &self.decided_by else {
            unreachable!("the caller saw that routers decide")
        };
        let router = &self.routers.all()[site.router];
        let features = if self.detaches { features.detach() } else { features.shallow_clone() };
        if self.keeps_features {
            self.features.push(router.features(&features));
        }
        let mut routing = router.forward(&features, rule, self.routers.present_at(site));
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
        let chosen = match (&routing.selected, named) {
            (Some(selected), None) if (self.may_skip)(site, selected.size()[2]) => {
                let (experts, num_experts) =
                    chosen_with_shared(selected, router.num_experts(), self.has_shared);
                let assignments = Assignments::new(&experts, num_experts);
                RoutingWeights::Chosen(weights, assignments)
            }
            _ => RoutingWeights::PerToken(weights),
        };
        self.routing.push(routing);
        with_shared(chosen, self.has_shared)
    }
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

/// `features`, `[b, t, d]`, or their means by the matrix `averaging`, `[b, t, t]`.
fn averaged(features: &Tensor, averaging: Option<&Tensor>) -> Tensor {
    match averaging {
        None => features.shallow_clone(),
        Some(means) => means.matmul(&features.to_kind(means.kind())),
    }
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
