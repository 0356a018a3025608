//! The router, which scores the experts for each token, and the rule that turns scores into
//! weights.
//!
//! ```text
//! h = x, or x / sqrt(mean_d x^2 + 1e-6) with `normalize_input`
//! h = relu(h W^T + c) for each hidden layer
//! router_logits = h R^T + c                                    [b, t, m]
//! routing_probs = softmax(router_logits / temperature)         in f32
//! routing_weights = routing_probs, or only those of the k best, which `renormalize`
//!                   divides by their sum
//! ```
//!
//! The k best experts have the largest routing_probs or, with a selection bias, the largest sums of
//! routing_probs and bias (arXiv:2408.15664, eq. 3). If layers route over their own experts, a
//! layer that lacks some of them takes the softmax over the scores of the others.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `w` width of a hidden layer, `e` expert,
//! `m` the layer's experts, `k` chosen experts.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::config::{
    Config, EvalRule, RouterConfig, RouterInit, RouterInput, RouterNoise, RouterScope,
    RoutingLevel, TargetModule,
};
use crate::ffi;
use crate::ffi::route::LinearRouter;
use crate::model::decoder::spec::DecoderSpec;

/// Added to the mean square of a router's input before the root is taken.
const NORM_EPS: f64 = 1e-6;

/// The settings of a mixture's routers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterSpec {
    /// What a router reads.
    pub input: RouterInput,
    /// Whether there is one router, or one for each layer or target module.
    pub scope: RouterScope,
    /// Whether each token is routed by itself or by the prompt of its document.
    pub level: RoutingLevel,
    /// Number of hidden layers before the layer that scores the experts.
    pub hidden_layers: i64,
    /// Width of the hidden layers.
    pub hidden_width: i64,
    /// Divides the scores before the softmax.
    pub temperature: f64,
    /// Whether a router's input is divided by its root mean square. Older files do not say it.
    #[serde(default)]
    pub normalize_input: bool,
    /// The initial weights of the layer that scores the experts, for new routers only.
    #[serde(skip)]
    pub init: RouterInit,
    /// Whether the routers are trained where they decide.
    #[serde(skip, default = "yes")]
    pub trainable: bool,
    /// How many experts a token keeps; `None` for all.
    pub top_k: Option<i64>,
    /// Whether the weights of the k best experts are divided by their sum.
    pub renormalize: bool,
    /// The routing rule in evaluation, if it is another.
    pub eval: Option<EvalRule>,
    /// Whether a bias takes part in choosing the k best experts.
    pub selection_bias: bool,
    /// Whether each layer routes over the experts that it has. Otherwise it routes over all
    /// experts, and those that it lacks add nothing.
    pub own_experts: bool,
}

fn yes() -> bool {
    true
}

impl From<&RouterConfig> for RouterSpec {
    /// The settings at the end of the temperature schedule and, with hybrid routing, once all
    /// experts are mature.
    fn from(config: &RouterConfig) -> Self {
        Self {
            input: config.input,
            scope: config.scope,
            level: config.level,
            hidden_layers: config.hidden_layers,
            hidden_width: config.hidden_width,
            temperature: config.temperature,
            normalize_input: config.normalize_input,
            init: config.init,
            trainable: config.trainable,
            top_k: config.top_k,
            renormalize: config.renormalize,
            eval: config.eval,
            selection_bias: config.balance_bias_rate > 0.0,
            own_experts: false,
        }
    }
}

impl Default for RouterSpec {
    /// One linear router for all layers, which reads the embeddings as they are.
    fn default() -> Self {
        Self {
            input: RouterInput::Embeddings,
            scope: RouterScope::Shared,
            normalize_input: false,
            ..Self::from(&RouterConfig::default())
        }
    }
}

impl RouterSpec {
    /// The settings of the routers of a run.
    pub fn of_config(config: &Config) -> Self {
        let own_experts = config.lora.experts_per_layer.is_some();
        Self { own_experts, ..Self::from(&config.router) }
    }

    /// Number of features that the router of `module` reads.
    pub(crate) fn input_width(&self, module: TargetModule, base: &DecoderSpec) -> i64 {
        match self.input {
            RouterInput::ModuleInput => base.linear_shape(module).0,
            _ => base.width,
        }
    }

    /// Number of parameters of one router over `num_experts` experts and `d` features.
    pub fn num_parameters(&self, num_experts: i64, d: i64) -> i64 {
        let (width, layers) = (self.hidden_width, self.hidden_layers);
        match layers {
            0 => num_experts * (d + 1),
            _ => width * (d + 1) + (layers - 1) * width * (width + 1) + num_experts * (width + 1),
        }
    }
}

/// The rule that turns scores into weights.
#[derive(Debug)]
pub struct RoutingRule {
    /// Divides the scores before the softmax, 0-dim.
    pub temperature: Tensor,
    /// How many experts a token keeps; `None` for all.
    pub top_k: Option<i64>,
    /// Whether the weights of the k best experts are divided by their sum.
    pub renormalize: bool,
    /// Noise that disturbs the router.
    pub noise: RouterNoise,
}

/// The layer or MLP that scores the experts.
#[derive(Debug)]
pub struct Router {
    /// Weight and bias `[w]` of each hidden layer. The first weight is `[w, d]`, the others
    /// `[w, w]`.
    pub hidden: Vec<(Tensor, Tensor)>,
    /// Weight of the layer that scores: `[e, d]`, or `[e, w]` after hidden layers.
    pub weight: Tensor,
    /// Bias of that layer, `[e]`.
    pub bias: Tensor,
    /// Added to routing_probs to choose the k best experts, not to weigh them, `[e]`; not trained.
    pub selection_bias: Option<Tensor>,
    /// Whether its input is divided by its root mean square.
    pub normalizes: bool,
}

/// How the tokens of a forward pass were routed at one site.
#[derive(Debug)]
pub struct Routing {
    /// The raw scores without noise, `[b, t, m]`.
    pub clean: Tensor,
    /// The raw scores, of a disturbed input if `router.noise` is `jitter`, `[b, t, m]`.
    pub logits: Tensor,
    /// Softmax over the experts that the site routes over, `[b, t, m]`.
    pub probs: Tensor,
    /// The weights that mix the experts, `[b, t, e]`.
    pub weights: Tensor,
    /// The k experts that each token chose, `[b, t, k]`; `None` if it uses all.
    pub selected: Option<Tensor>,
    /// The experts that the site routes over, `[m]`; `None` for all.
    pub present: Option<Tensor>,
}

/// The scores of a router and their softmax, as in [`Routing`].
struct Scored {
    clean: Tensor,
    logits: Tensor,
    probs: Tensor,
}

impl Router {
    /// A new router over `d` features. By default, the weights that score the experts have mean 0
    /// and standard deviation 0.02, so that routing starts near an even mixture but not alike for
    /// all tokens. Hidden layers are initialised as by He et al. (arXiv:1502.01852, eq. 10).
    pub fn new(spec: &RouterSpec, num_experts: i64, d: i64, kind: Kind) -> Self {
        let options = (kind, Device::Cpu);
        let mut width = d;
        let mut hidden = vec![];
        for _ in 0..spec.hidden_layers {
            let std = (2.0 / width as f64).sqrt();
            let weight = Tensor::randn([spec.hidden_width, width], options) * std;
            hidden.push((weight, Tensor::zeros([spec.hidden_width], options)));
            width = spec.hidden_width;
        }
        Self {
            hidden,
            weight: match spec.init {
                RouterInit::Normal => Tensor::randn([num_experts, width], options) * 0.02,
                RouterInit::Zero => Tensor::zeros([num_experts, width], options),
            },
            normalizes: spec.normalize_input,
            bias: Tensor::zeros([num_experts], options),
            selection_bias: spec.selection_bias.then(|| Tensor::zeros([num_experts], options)),
        }
    }

    /// The same router on `device`, with its parameters as leaves of the graph.
    pub(crate) fn into_leaf(self, device: Device) -> Self {
        let leaf = |x: Tensor| x.to_device(device).detach().copy().set_requires_grad(true);
        Self {
            hidden: self.hidden.into_iter().map(|(w, b)| (leaf(w), leaf(b))).collect(),
            weight: leaf(self.weight),
            bias: leaf(self.bias),
            selection_bias: self.selection_bias.map(|bias| bias.to_device(device)),
            normalizes: self.normalizes,
        }
    }

    /// The raw scores of all experts, `[b, t, e]`, in the router's own dtype, for tokens with the
    /// features `x`, `[b, t, d]`.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        self.scores(self.normalized(x))
    }

    /// The features `x`, `[.., d]`, in the router's dtype, divided by their root mean square if the
    /// router normalises its input.
    fn normalized(&self, x: &Tensor) -> Tensor {
        let x = x.to_kind(self.weight.kind());
        match self.normalizes {
            true => {
                let width = *x.size().last().expect("features have a width");
                x.rms_norm([width], None::<Tensor>, NORM_EPS)
            }
            false => x,
        }
    }

    /// The input of the layer that scores the experts, `[.., w]`, for the features `x`, `[.., d]`.
    pub fn features(&self, x: &Tensor) -> Tensor {
        self.hidden_features(self.normalized(x))
    }

    fn hidden_features(&self, mut h: Tensor) -> Tensor {
        for (weight, bias) in &self.hidden {
            h = h.linear(weight, Some(bias)).relu();
        }
        h
    }

    /// The scores of normalised features.
    fn scores(&self, h: Tensor) -> Tensor {
        self.hidden_features(h).linear(&self.weight, Some(&self.bias))
    }

    /// Routes tokens with the features `x`, `[b, t, d]`, over the experts `present`, `[m]`; `None`
    /// means all experts.
    pub fn forward(&self, x: &Tensor, rule: &RoutingRule, present: Option<&Tensor>) -> Routing {
        self.chosen(self.scored(x, rule, present), rule, present)
    }

    /// The same by a CUDA kernel, where one applies. Its gradient is written by hand.
    pub(crate) fn fused_forward(
        &self,
        x: &Tensor,
        rule: &RoutingRule,
        present: Option<&Tensor>,
    ) -> Routing {
        let is_plain = present.is_none() && rule.noise == RouterNoise::None;
        let scored = (is_plain && self.hidden.is_empty()).then(|| self.scored_by_kernel(x, rule));
        let scored = scored.flatten().unwrap_or_else(|| self.scored(x, rule, present));
        self.chosen(scored, rule, present)
    }

    /// The scores of the tokens with the features `x`, `[b, t, d]`, and their softmax. `None` if no
    /// kernel applies.
    fn scored_by_kernel(&self, x: &Tensor, rule: &RoutingRule) -> Option<Scored> {
        let (b, t, d) = x.size3().expect("features are [b, t, d]");
        let router = LinearRouter {
            weight: &self.weight,
            bias: &self.bias,
            temperature: &rule.temperature,
            norm_eps: self.normalizes.then_some(NORM_EPS),
        };
        let scored = ffi::route::route(&x.reshape([b * t, d]), router);
        let [logits, probs] = scored.unwrap_or_else(|error| panic!("{error:#}"))?;
        let of_tokens = |x: Tensor| x.view([b, t, self.num_experts()]);
        let logits = of_tokens(logits);
        Some(Scored { clean: logits.shallow_clone(), logits, probs: of_tokens(probs) })
    }

    /// The same by libtorch's operations, with noise, and for any router.
    fn scored(&self, x: &Tensor, rule: &RoutingRule, present: Option<&Tensor>) -> Scored {
        let own = |x: Tensor, dim: i64| of_present(x, dim, present);
        let x = self.normalized(x);
        let clean = own(self.scores(x.shallow_clone()), -1);
        let logits = match rule.noise {
            RouterNoise::Jitter(eps) => {
                let factors = tch::no_grad(|| x.rand_like() * (2.0 * eps) + (1.0 - eps));
                own(self.scores(x * factors), -1)
            }
            _ => clean.shallow_clone(),
        };
        let noisy = match rule.noise {
            RouterNoise::Gaussian(std) => &logits + logits.randn_like() * std,
            _ => logits.shallow_clone(),
        };
        let probs = (noisy / &rule.temperature).softmax(-1, self.weight.kind());
        Scored { clean, logits, probs }
    }

    /// Turns probabilities into weights.
    fn chosen(&self, scored: Scored, rule: &RoutingRule, present: Option<&Tensor>) -> Routing {
        let own = |x: Tensor, dim: i64| of_present(x, dim, present);
        let Scored { clean, logits, probs } = scored;
        let m = *probs.size().last().expect("routing_probs are [b, t, m]");
        let (weights, selected) = match rule.top_k {
            Some(k) if k < m => {
                let scores = match &self.selection_bias {
                    Some(bias) => probs.detach() + own(bias.shallow_clone(), 0),
                    None => probs.detach(),
                };
                let (_, selected) = scores.topk(k, -1, true, false);
                let top = probs.gather(-1, &selected, false);
                let top = match rule.renormalize {
                    true => &top / top.sum_dim_intlist(-1, true, None),
                    false => top,
                };
                (probs.zeros_like().scatter(-1, &selected, &top), Some(selected))
            }
            _ => (probs.shallow_clone(), None),
        };
        let Some(present) = present else {
            return Routing { clean, logits, probs, weights, selected, present: None };
        };
        let (b, t) = (probs.size()[0], probs.size()[1]);
        let zeros = Tensor::zeros([b, t, self.num_experts()], (probs.kind(), probs.device()));
        let weights = zeros.index_copy(-1, present, &weights);
        let selected = selected.map(|chosen| present.take(&chosen));
        let present = Some(present.shallow_clone());
        Routing { clean, logits, probs, weights, selected, present }
    }

    /// Number of experts `E`.
    pub fn num_experts(&self) -> i64 {
        self.bias.size()[0]
    }
}

/// `x` of the experts `present`, `[m]`, alone; `None` means all. Its dimension `dim` has the
/// experts.
pub(super) fn of_present(x: Tensor, dim: i64, present: Option<&Tensor>) -> Tensor {
    match present {
        Some(experts) => x.index_select(dim, experts),
        None => x,
    }
}
