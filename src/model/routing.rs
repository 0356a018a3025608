//! What decides the routing weights of a forward pass, whatever it is: one mechanism.
//!
//! ```text
//! source ------------------> weights [b, t, e] --x mask--> the experts of a layer or module
//!   router: embeddings, last hidden state of the base, or a layer's own input
//!   given | uniform | one expert | all at weight 1 | the record's expert | none
//! mask: 0 before the last invocation of an expert that has invocation tokens (aLoRA,
//!       arXiv:2504.12397), found as PEFT 0.21 does (`calculate_alora_offsets`), document by document
//! ```
//!
//! A router decides at one or more [`Site`]s: once for all layers, or for each layer, or for each target
//! module. Switching the source changes neither the experts nor what of them is trained. The mask is the
//! one part that looks ahead: where an expert's tokens come twice, the first time does not count.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `e` expert, `m` a layer's experts.

use std::fmt;

use tch::{Kind, Tensor};

use super::inputs::Inputs;
use super::lora::RoutingWeights;
use super::lora_grouped::Assignments;
use super::router::{Routing, RoutingRule};
use super::{RoutedGpt2, wide};
use crate::config::{RouterInput, RouterScope, RoutingChoice, RoutingLevel, TargetModule};

/// What decides the routing weights of a forward pass.
#[derive(Debug)]
pub enum RoutingSource {
    /// The learned router; with one expert, which has none, weight 1.
    Router,
    /// 1 / E for each expert.
    Uniform,
    /// 1 for each expert: PEFT's unweighted sum of several active adapters.
    All,
    /// 1 for this expert, 0 for the others.
    Expert(i64),
    /// 1 for the expert that [`Inputs::expert_ids`] names: PEFT's `adapter_names`.
    Record,
    /// As `Record` where an expert is named, elsewhere the learned router: how a new expert is seeded.
    RecordOrRouter,
    /// The base alone.
    Base,
    /// These weights, `[b, t, e]`, or `[e]` for every token; they need not sum to 1.
    Given(Tensor),
}

impl From<RoutingChoice> for RoutingSource {
    fn from(choice: RoutingChoice) -> Self {
        match choice {
            RoutingChoice::Router => Self::Router,
            RoutingChoice::Uniform => Self::Uniform,
            RoutingChoice::All => Self::All,
            RoutingChoice::Expert(expert) => Self::Expert(expert),
            RoutingChoice::Record => Self::Record,
            RoutingChoice::None => Self::Base,
        }
    }
}

/// A place where routing is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Which of [`RoutedGpt2::routers`] decides.
    pub router: usize,
    /// The layer it decides for; none = all.
    pub layer: Option<usize>,
    /// The module it decides for; none = all of the layer.
    pub module: Option<TargetModule>,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.layer, self.module) {
            (Some(layer), Some(module)) => write!(f, "h.{layer}.{}", module.name()),
            (Some(layer), None) => write!(f, "h.{layer}"),
            _ => f.write_str("all layers"),
        }
    }
}

/// The routing weights of a block: one for all of its modules, or one for each.
#[derive(Debug)]
pub(super) struct BlockWeights(Vec<(Option<TargetModule>, RoutingWeights)>);

impl BlockWeights {
    pub fn of(&self, module: TargetModule) -> &RoutingWeights {
        let weights = self.0.iter().find(|(of, _)| of.is_none_or(|of| of == module));
        weights.map_or(&RoutingWeights::Off, |(_, weights)| weights)
    }

    pub fn shallow_clone(&self) -> Self {
        Self(self.0.iter().map(|(module, g)| (*module, g.shallow_clone())).collect())
    }

    /// The same with tensors over flattened tokens, `[b t, e]`; modules that share weights share a tensor.
    pub fn flat(&self, num_tokens: i64) -> Self {
        let tensors = self.tensors();
        let flat = tensors.iter().map(|g| g.reshape([num_tokens, -1]).contiguous());
        self.with_tensors(&flat.collect::<Vec<_>>())
    }

    /// The tensors in it.
    pub fn tensors(&self) -> Vec<Tensor> {
        let tensors = self.0.iter().filter_map(|(_, weights)| match weights {
            RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _) => {
                Some(weights.shallow_clone())
            }
            RoutingWeights::Off | RoutingWeights::Ones => None,
        });
        tensors.collect()
    }

    /// The same with other tensors in the places of [`BlockWeights::tensors`].
    pub fn with_tensors(&self, tensors: &[Tensor]) -> Self {
        let mut tensors = tensors.iter();
        let replaced = self.0.iter().map(|(module, weights)| {
            let mut next = || {
                let tensor = tensors.next().expect("there are as many as there were");
                tensor.shallow_clone()
            };
            let weights = match weights {
                RoutingWeights::PerToken(_) => RoutingWeights::PerToken(next()),
                RoutingWeights::Chosen(_, assignments) => {
                    RoutingWeights::Chosen(next(), assignments.shallow_clone())
                }
                other => other.shallow_clone(),
            };
            (*module, weights)
        });
        Self(replaced.collect())
    }
}

/// The routing of one forward pass, decided as the layers come.
pub(super) struct RoutingPass<'a> {
    model: &'a RoutedGpt2,
    decided_by: DecidedBy,
    /// 1 where an expert is active.
    mask: Option<Tensor>,
    /// The weights used: one for all layers, or those of each site so far.
    pub used: Vec<RoutingWeights>,
    /// What the routers did.
    pub routing: Vec<Routing>,
}

enum DecidedBy {
    /// These weights, the same in every layer.
    Fixed(RoutingWeights),
    /// The routers.
    Routers {
        rule: RoutingRule,
        /// What they read, `[b, t, d]`; none where each layer has its own input.
        features: Option<Tensor>,
        /// Means over prompts, `[b, t, t]`.
        averaging: Option<Tensor>,
        /// Experts that decide in the router's place, -1 for none, `[b, t]`.
        named: Option<Tensor>,
    },
}

impl<'a> RoutingPass<'a> {
    /// The routing by `source` of a batch whose embeddings are `x`, `[b, t, d]`.
    pub fn new(
        model: &'a RoutedGpt2,
        inputs: &Inputs,
        x: &Tensor,
        source: &RoutingSource,
        rule: RoutingRule,
    ) -> Self {
        let mask = match source {
            RoutingSource::Base => None,
            _ => model.invocation_mask(inputs),
        };
        let decided_by = match source {
            RoutingSource::Router | RoutingSource::RecordOrRouter if !model.routers.is_empty() => {
                let spec = &model.router_spec;
                let features = match spec.input {
                    RouterInput::Embeddings => Some(x.shallow_clone()),
                    RouterInput::BaseHidden => Some(tch::no_grad(|| model.base_hidden(inputs, x))),
                    RouterInput::LayerInput => None,
                };
                let averaging = (spec.level == RoutingLevel::Sequence)
                    .then(|| inputs.prompt_means(wide(model.kind)));
                let features = features.map(|x| averaged(&x, averaging.as_ref()));
                let named = match source {
                    RoutingSource::RecordOrRouter => Some(named_experts(inputs)),
                    _ => None,
                };
                DecidedBy::Routers { rule, features, averaging, named }
            }
            source => {
                DecidedBy::Fixed(masked(model.fixed_weights(inputs, x, source), mask.as_ref()))
            }
        };
        Self { model, decided_by, mask, used: vec![], routing: vec![] }
    }

    /// Whether the routers' decisions need each layer's input.
    pub fn reads_layers(&self) -> bool {
        matches!(&self.decided_by, DecidedBy::Routers { features: None, .. })
    }

    /// The weights of a layer, whose own input after its first LayerNorm is `layer_input()`.
    pub fn block(&mut self, layer: usize, layer_input: &dyn Fn() -> Tensor) -> BlockWeights {
        let DecidedBy::Routers { rule, features, averaging, named } = &self.decided_by else {
            let DecidedBy::Fixed(weights) = &self.decided_by else { unreachable!() };
            if self.used.is_empty() {
                self.used.push(weights.shallow_clone());
            }
            return BlockWeights(vec![(None, weights.shallow_clone())]);
        };
        let sites: Vec<Site> = self.model.sites_of(layer);
        if let ([Site { layer: None, .. }], [shared]) = (&sites[..], &self.used[..]) {
            return BlockWeights(vec![(None, shared.shallow_clone())]);
        }
        let own = match features {
            Some(_) => None,
            None => Some(averaged(&layer_input(), averaging.as_ref())),
        };
        let features = features.as_ref().or(own.as_ref()).expect("one of both is there");
        let mut block = vec![];
        for site in sites {
            let router = &self.model.routers[site.router];
            let mut routing =
                router.forward(features, rule, self.model.present_experts(site.layer));
            if let Some(named) = named {
                let by_name = one_hot(named, router.num_experts(), routing.weights.kind());
                let is_named = named.ge(0).unsqueeze(-1);
                routing.weights = by_name.where_self(&is_named, &routing.weights);
            }
            if let Some(mask) = &self.mask {
                routing.weights = &routing.weights * mask;
            }
            let weights = routing.weights.shallow_clone();
            let weights = match (&routing.selected, named) {
                (Some(selected), None) if self.model.may_skip(site, selected.size()[2]) => {
                    let assignments = Assignments::new(selected, router.num_experts());
                    RoutingWeights::Chosen(weights, assignments)
                }
                _ => RoutingWeights::PerToken(weights),
            };
            self.used.push(weights.shallow_clone());
            self.routing.push(routing);
            block.push((site.module, weights));
        }
        BlockWeights(block)
    }
}

impl RoutedGpt2 {
    /// Where the routers decide, in the order of a forward pass.
    pub fn sites(&self) -> Vec<Site> {
        if self.routers.is_empty() {
            return vec![];
        }
        let mut sites: Vec<Site> = vec![];
        for layer in 0..self.blocks.len() {
            for site in self.sites_of(layer) {
                if !sites.contains(&site) {
                    sites.push(site);
                }
            }
        }
        sites
    }

    /// The sites that decide for a layer.
    fn sites_of(&self, layer: usize) -> Vec<Site> {
        let spec = &self.router_spec;
        let once = spec.input != RouterInput::LayerInput && !spec.own_experts;
        match spec.scope {
            RouterScope::Shared => {
                let of_layer = if once { None } else { Some(layer) };
                vec![Site { router: 0, layer: of_layer, module: None }]
            }
            RouterScope::Layer => vec![Site { router: layer, layer: Some(layer), module: None }],
            RouterScope::Module => {
                let before: usize = self.blocks[..layer].iter().map(|b| b.experts.len()).sum();
                let modules = self.blocks[layer].experts.keys().enumerate();
                let site = |(i, &module)| Site {
                    router: before + i,
                    layer: Some(layer),
                    module: Some(module),
                };
                modules.map(site).collect()
            }
        }
    }

    /// Whether some module that a site decides for may skip the experts that a token did not choose.
    fn may_skip(&self, site: Site, k: i64) -> bool {
        let e = self.num_experts();
        self.modules().any(|(path, experts)| {
            site.layer.is_none_or(|layer| layer == path.layer)
                && site.module.is_none_or(|module| module == path.module)
                && experts.may_skip(k, e, self.kind, self.device())
        })
    }

    /// Whether some module may skip the experts that a token did not choose: how much is computed then
    /// depends on the numbers.
    pub fn skips_experts(&self) -> bool {
        let chooses = |site: &Site| {
            let m = self.present_at(*site).map_or(self.num_experts(), |experts| experts.size()[0]);
            self.router_spec.top_k.filter(|k| *k < m)
        };
        self.sites().into_iter().any(|site| chooses(&site).is_some_and(|k| self.may_skip(site, k)))
    }

    /// The experts that a layer routes over, `[m]`; none = all.
    fn present_experts(&self, layer: Option<usize>) -> Option<&Tensor> {
        self.present.get(layer?)?.as_ref()
    }

    /// The experts that a site routes over, `[m]`; none = all.
    pub fn present_at(&self, site: Site) -> Option<&Tensor> {
        self.present_experts(site.layer)
    }

    /// The experts that a site routes over.
    pub fn experts_at(&self, site: Site) -> Vec<usize> {
        match self.present_experts(site.layer) {
            None => (0..self.specs.len()).collect(),
            Some(_) => {
                let layer = site.layer.expect("only a layer lacks experts");
                self.experts_in(layer)
            }
        }
    }

    /// The experts that have a module in a layer.
    pub(super) fn experts_in(&self, layer: usize) -> Vec<usize> {
        let has = |expert: &usize| self.specs[*expert].modules.keys().any(|p| p.layer == layer);
        (0..self.specs.len()).filter(has).collect()
    }

    /// The weights that `source`, which is no router, decides on.
    fn fixed_weights(&self, inputs: &Inputs, x: &Tensor, source: &RoutingSource) -> RoutingWeights {
        let e = self.num_experts();
        if e == 0 {
            return RoutingWeights::Off;
        }
        let kind = wide(self.kind);
        let every = |weights_e: Tensor| {
            let (b, t) = inputs.input_ids.size2().expect("token ids are [b, t]");
            let weights = weights_e.to_kind(kind).to_device(x.device());
            RoutingWeights::PerToken(weights.expand([b, t, e], false).contiguous())
        };
        match source {
            RoutingSource::Base => RoutingWeights::Off,
            // with one expert, which has no router
            RoutingSource::Router | RoutingSource::RecordOrRouter | RoutingSource::All => {
                RoutingWeights::Ones
            }
            RoutingSource::Uniform => every(Tensor::full([e], 1.0 / e as f64, (kind, x.device()))),
            RoutingSource::Expert(expert) => {
                every(Tensor::arange(e, (Kind::Int64, x.device())).eq(*expert))
            }
            RoutingSource::Record => {
                RoutingWeights::PerToken(one_hot(&named_experts(inputs), e, kind))
            }
            RoutingSource::Given(weights) => every(weights.shallow_clone()),
        }
    }

    /// 1 where an expert is active, 0 before its invocation, `[b, t, e]`; none if every expert always
    /// is.
    pub(super) fn invocation_mask(&self, inputs: &Inputs) -> Option<Tensor> {
        if self.specs.iter().all(|spec| spec.alora_invocation_tokens.is_empty()) {
            return None;
        }
        let kind = wide(self.kind);
        let active = self.specs.iter().map(|spec| match &spec.alora_invocation_tokens[..] {
            [] => inputs.input_ids.ones_like().to_kind(kind),
            tokens => inputs.active_from_last(tokens, kind),
        });
        Some(Tensor::stack(&active.collect::<Vec<_>>(), -1))
    }
}

fn named_experts(inputs: &Inputs) -> Tensor {
    inputs.expert_ids.as_ref().expect("the caller saw that records name one").shallow_clone()
}

/// 1 where an expert is named, `[b, t, e]`; zeros for -1.
fn one_hot(ids_bt: &Tensor, e: i64, kind: Kind) -> Tensor {
    let experts = Tensor::arange(e, (Kind::Int64, ids_bt.device()));
    ids_bt.unsqueeze(-1).eq_tensor(&experts).to_kind(kind)
}

/// `features`, `[b, t, d]`, or their means by `averaging`, `[b, t, t]`.
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
