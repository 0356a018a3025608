//! The router: a linear layer that scores the experts for each token, and what is told about it.
//!
//! ```text
//! router_logits = x R^T + c                                    [b, t, e]
//! routing_probs = softmax(router_logits / temperature)         in f32
//! routing_weights = routing_probs, or the k largest of them divided by their sum
//! ```
//!
//! The load-balancing loss is Switch Transformer's (arXiv:2101.03961, eqs. 4-6), `E sum_e f_e P_e`,
//! 1 when even, with `P` the mean routing_probs and `f` the expert load. With top-k routing, `f_e` is
//! the share of the n k assignments that went to expert e. Without it every expert is chosen for
//! every token, so that such an `f` would be 1/E whatever the router does; there the load is the
//! share of weight, `f = P`, and the loss is 1 + CV^2 of the importance (arXiv:1701.06538, eq. 7).
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions, `d` width, `e` expert, `k`
//! chosen experts.

use tch::{Device, Kind, Tensor};

use crate::config::RouterConfig;

/// The linear layer that scores experts.
#[derive(Debug)]
pub struct Router {
    /// `[e, d]`.
    pub weight: Tensor,
    /// `[e]`.
    pub bias: Tensor,
    /// Divides the scores.
    pub temperature: f64,
    /// How many experts a token keeps; none = all.
    pub top_k: Option<i64>,
}

/// How the tokens of a forward pass were routed.
#[derive(Debug)]
pub struct Routing {
    /// Softmax over all experts, `[b, t, e]`.
    pub probs: Tensor,
    /// What mixes the experts, `[b, t, e]`.
    pub weights: Tensor,
    /// The k chosen, `[b, t, k]`; none = all.
    pub selected: Option<Tensor>,
}

impl Router {
    /// A new router over `d` features: weights from N(0, 0.02), so that tokens start near an even
    /// mixture, but not all alike.
    pub fn new(config: &RouterConfig, num_experts: i64, d: i64, kind: Kind) -> Self {
        Self {
            weight: Tensor::randn([num_experts, d], (kind, Device::Cpu)) * 0.02,
            bias: Tensor::zeros([num_experts], (kind, Device::Cpu)),
            temperature: config.temperature,
            top_k: config.top_k,
        }
    }

    /// The same router on `device`, as leaves of the graph.
    pub(super) fn into_leaf(self, device: Device) -> Self {
        let leaf = |x: Tensor| x.to_device(device).detach().copy().set_requires_grad(true);
        Self { weight: leaf(self.weight), bias: leaf(self.bias), ..self }
    }

    /// Routes the tokens whose features are `x`, `[b, t, d]`, in the router's own dtype.
    pub fn forward(&self, x: &Tensor) -> Routing {
        let x = x.to_kind(self.weight.kind());
        let logits_bte = x.linear(&self.weight, Some(&self.bias)) / self.temperature;
        let probs = logits_bte.softmax(-1, self.weight.kind());
        match self.top_k {
            Some(k) if k < self.num_experts() => {
                let (top, selected) = probs.topk(k, -1, true, false);
                let top = &top / top.sum_dim_intlist(-1, true, None);
                let weights = probs.zeros_like().scatter(-1, &selected, &top);
                Routing { probs, weights, selected: Some(selected) }
            }
            _ => Routing { weights: probs.shallow_clone(), probs, selected: None },
        }
    }

    /// `E`.
    pub fn num_experts(&self) -> i64 {
        self.bias.size()[0]
    }
}

/// Adds a batch's totals to those of each router so far; `totals` is empty before the first batch.
pub fn add_totals(totals: &mut Vec<RoutingTotals>, routing: &[Routing], rows: &Tensor) {
    for (router, routing) in routing.iter().enumerate() {
        let new = RoutingTotals::new(routing, rows);
        match totals.get_mut(router) {
            Some(sum) => sum.add(&new),
            None => totals.push(new),
        }
    }
}

/// Sums over labelled tokens from which the load, the balance loss and the entropy follow; those of
/// several batches add up.
#[derive(Debug)]
pub struct RoutingTotals {
    /// Number of labelled tokens.
    pub num_tokens: i64,
    /// Sum of routing_probs, `[e]`, f64.
    pub probs: Tensor,
    /// Sum of routing_weights, `[e]`, f64.
    pub weights: Tensor,
    /// Assignments, `[e]`, f64; without top-k the sum of routing_probs.
    pub assignments: Tensor,
    /// Sum of the probs' entropy, 0-dim, f64, nats.
    pub entropy: Tensor,
    /// Experts per token that `assignments` counts.
    assignments_per_token: i64,
    /// Whether every expert is chosen for every token.
    dense: bool,
}

impl RoutingTotals {
    /// The totals of the tokens at `rows`, `[n]`, of the flattened `[b t]`.
    pub fn new(routing: &Routing, rows: &Tensor) -> Self {
        let _no_grad = tch::no_grad_guard();
        let e = *routing.probs.size().last().expect("routing_probs are [b, t, e]");
        let labelled = |x: &Tensor| {
            let width = *x.size().last().expect("routing tensors are [b, t, _]");
            x.detach().view([-1, width]).index_select(0, rows)
        };
        let probs_ne = labelled(&routing.probs).to_kind(Kind::Double);
        let sum = |x: &Tensor| x.sum_dim_intlist(0, false, Kind::Double);
        let probs = sum(&probs_ne);
        let (assignments, assignments_per_token) = match &routing.selected {
            None => (probs.shallow_clone(), 1),
            Some(selected) => {
                let selected_nk = labelled(selected);
                let k = selected_nk.size()[1];
                (selected_nk.view([-1]).one_hot(e).sum_dim_intlist(0, false, Kind::Double), k)
            }
        };
        let log = probs_ne.clamp_min(f64::MIN_POSITIVE).log();
        Self {
            num_tokens: rows.size()[0],
            entropy: -(&probs_ne * log).sum(Kind::Double),
            weights: sum(&labelled(&routing.weights)),
            probs,
            assignments,
            assignments_per_token,
            dense: routing.selected.is_none(),
        }
    }

    /// Adds another batch's totals.
    pub fn add(&mut self, other: &Self) {
        self.num_tokens += other.num_tokens;
        self.probs = &self.probs + &other.probs;
        self.weights = &self.weights + &other.weights;
        self.assignments = &self.assignments + &other.assignments;
        self.entropy = &self.entropy + &other.entropy;
    }

    /// Share of assignments per expert `f`, `[e]`.
    pub fn expert_load(&self) -> Tensor {
        &self.assignments / (self.num_tokens * self.assignments_per_token) as f64
    }

    /// The load-balancing loss, 0-dim.
    pub fn load_balancing_loss(&self) -> Tensor {
        let e = self.probs.size()[0] as f64;
        (self.expert_load() * &self.probs / self.num_tokens as f64).sum(Kind::Double) * e
    }

    /// `d load_balancing_loss / d probs`, the same for each token, `[e]`: the loss depends on a
    /// token's probs through `P` (and, without top-k, through `f = P`). Its product with a batch's
    /// probs has the gradient of the loss over all batches of the totals.
    pub fn balance_gradient(&self) -> Tensor {
        let e = self.probs.size()[0] as f64;
        let factor = if self.dense { 2.0 } else { 1.0 };
        self.expert_load() * (factor * e / self.num_tokens as f64)
    }

    /// Mean entropy of routing_probs, nats.
    pub fn routing_entropy(&self) -> f64 {
        self.entropy.double_value(&[]) / self.num_tokens as f64
    }
}
