//! Totals of the routing of some tokens, and the losses that follow from them.
//!
//! Let `p` be a token's routing_probs over the `m` experts of its layer, `f` the expert load, and
//! `P` the mean of `p` over the label tokens. Then
//!
//! ```text
//! load_balancing_loss   m sum_e f_e P_e                 Switch, arXiv:2101.03961, eqs. 4-6
//! uniform_mse           mean_e (P_e - 1/m)^2            0 when even, (m - 1) / m^2 when collapsed
//! router_z_loss         mean_t logsumexp(logits_t)^2    ST-MoE, arXiv:2202.08906, eq. 5
//! routing_entropy       mean_t -sum_e p_e ln p_e        nats, at most ln m
//! ```
//!
//! With top-k routing, `f_e` is the share of the n k assignments that went to expert e. With dense
//! routing, every token uses every expert, and this share would be 1/m whatever the router does.
//! There the load is the share of routing_probs, `f = P`, and the load-balancing loss is 1 + CV^2
//! of the importance (arXiv:1701.06538, eq. 7).
//!
//! The load-balancing loss is 1 when routing is even. When routing has collapsed to one expert, the
//! loss is m with dense routing and m / k with top-k routing.
//!
//! Each value is taken at each site and then averaged over the sites. A router that several layers
//! apply to their own inputs counts once for each layer.
//!
//! Letters of shapes: `b` batch, `t` position, `n` label tokens, `e` expert, `m` the layer's
//! experts, `g` groups of tokens (domains).

use tch::{Kind, Tensor};

use super::router::Routing;
use crate::model::batch::Labelled;

/// Adds a batch's totals to those of each site. `totals` is empty before the first batch.
pub fn add_totals(totals: &mut Vec<RoutingTotals>, routing: &[Routing], labelled: Labelled<'_>) {
    for (site, routing) in routing.iter().enumerate() {
        let new = RoutingTotals::new(routing, labelled);
        match totals.get_mut(site) {
            Some(sum) => sum.add(&new),
            None => totals.push(new),
        }
    }
}

/// Sums over the label tokens at one site. The totals of several batches can be added.
#[derive(Debug)]
pub struct RoutingTotals {
    /// Number of label tokens by group, `[g]`, f64.
    pub tokens: Tensor,
    /// Sum of routing_probs, `[m]`, f64.
    pub probs: Tensor,
    /// Sum of routing_weights by group, `[g, m]`, f64.
    pub weights: Tensor,
    /// Number of assignments by group, `[g, m]`, f64; with dense routing, the sum of routing_probs.
    pub assignments: Tensor,
    /// Sum of the entropy of routing_probs by group, `[g]`, f64, nats.
    pub entropy: Tensor,
    /// Sum of the squared logsumexp of router_logits, 0-dim, f64.
    pub squared_lse: Tensor,
    /// How many experts of each token `assignments` counts.
    assignments_per_token: i64,
    /// Whether every token uses every expert.
    dense: bool,
}

impl RoutingTotals {
    /// The totals of a batch's label tokens.
    pub fn new(routing: &Routing, labelled: Labelled<'_>) -> Self {
        let _no_grad = tch::no_grad_guard();
        let of_rows = |x: &Tensor| rows(x, labelled.rows).to_kind(Kind::Double);
        let counted = |x: Tensor| labelled.only_counted(x);
        let own = |x_ne: Tensor| match &routing.present {
            Some(experts) => x_ne.index_select(1, experts),
            None => x_ne,
        };
        let options = (Kind::Double, labelled.rows.device());
        let by_group = |x: &Tensor| {
            let mut shape = x.size();
            shape[0] = labelled.num_groups;
            Tensor::zeros(shape, options).index_add(0, labelled.groups, x)
        };
        let probs_nm = counted(of_rows(&routing.probs));
        let n = labelled.rows.size()[0];
        let weights = by_group(&own(counted(of_rows(&routing.weights))));
        let (assignments, assignments_per_token) = match &routing.selected {
            None => (by_group(&probs_nm), 1),
            Some(selected) => {
                let e = *routing.weights.size().last().expect("routing_weights are [b, t, e]");
                let selected_nk = rows(selected, labelled.rows);
                let k = selected_nk.size()[1];
                let every_e = Tensor::arange(e, (Kind::Int64, options.1));
                let chosen_nke = selected_nk.unsqueeze(-1).eq_tensor(&every_e);
                let counts_ne = chosen_nke.sum_dim_intlist(1, false, Kind::Double);
                (by_group(&own(counted(counts_ne))), k)
            }
        };
        Self {
            tokens: by_group(&counted(Tensor::ones([n], options))),
            probs: probs_nm.sum_dim_intlist(0, false, Kind::Double),
            weights,
            assignments,
            entropy: by_group(&entropies(&probs_nm)),
            squared_lse: counted(of_rows(&routing.logits).logsumexp(-1, false).square())
                .sum(Kind::Double),
            assignments_per_token,
            dense: routing.selected.is_none(),
        }
    }

    /// Adds another batch's totals.
    pub fn add(&mut self, other: &Self) {
        self.tokens = &self.tokens + &other.tokens;
        self.probs = &self.probs + &other.probs;
        self.weights = &self.weights + &other.weights;
        self.assignments = &self.assignments + &other.assignments;
        self.entropy = &self.entropy + &other.entropy;
        self.squared_lse = &self.squared_lse + &other.squared_lse;
    }

    /// All sums in one row, for a single transfer to the host: tokens `[g]`, probs `[m]`, weights
    /// `[g m]`, assignments `[g m]`, entropy `[g]`, squared_lse.
    pub fn flat(&self) -> Tensor {
        let flat = |x: &Tensor| x.reshape([-1]);
        let parts = [&self.tokens, &self.probs, &self.weights, &self.assignments, &self.entropy];
        let parts = parts.into_iter().chain([&self.squared_lse]).map(flat);
        Tensor::cat(&parts.collect::<Vec<_>>(), 0)
    }

    /// Length of [`flat`](Self::flat).
    pub fn flat_len(&self) -> i64 {
        let parts = [&self.tokens, &self.probs, &self.weights, &self.assignments, &self.entropy];
        parts.into_iter().chain([&self.squared_lse]).map(|x| x.numel() as i64).sum()
    }

    /// Totals of the same shape whose [`flat`](Self::flat) is `flat`, as views of it.
    #[must_use]
    pub fn with_flat(&self, flat: &Tensor) -> Self {
        let mut at = 0;
        let mut view = |like: &Tensor| {
            let part = flat.narrow(0, at, like.numel() as i64).view_(like.size());
            at += like.numel() as i64;
            part
        };
        Self {
            tokens: view(&self.tokens),
            probs: view(&self.probs),
            weights: view(&self.weights),
            assignments: view(&self.assignments),
            entropy: view(&self.entropy),
            squared_lse: view(&self.squared_lse),
            assignments_per_token: self.assignments_per_token,
            dense: self.dense,
        }
    }

    /// Number of experts `m`.
    pub fn num_experts(&self) -> i64 {
        self.probs.size()[0]
    }

    /// Number of label tokens, 0-dim, f64.
    pub fn num_tokens(&self) -> Tensor {
        self.tokens.sum(Kind::Double)
    }

    /// `value / num_tokens`, 0-dim.
    fn per_token(&self, value: f64) -> Tensor {
        let num_tokens = self.num_tokens();
        num_tokens.full_like(value) / num_tokens
    }

    /// Whether every token uses every expert.
    pub(crate) fn is_dense(&self) -> bool {
        self.dense
    }

    /// The expert load `f`: each expert's share of the assignments, `[m]`.
    pub fn expert_load(&self) -> Tensor {
        let sums = self.assignments.sum_dim_intlist(0, false, Kind::Double);
        sums / (self.num_tokens() * self.assignments_per_token as f64)
    }

    /// The mean of routing_probs, `P`, `[m]`.
    fn mean_probs(&self) -> Tensor {
        &self.probs / self.num_tokens()
    }

    /// `d load_balancing_loss / d probs`, which is the same for each token, `[m]`. The loss depends
    /// on a token's probs through `P` and, with dense routing, also through `f = P`. The product of
    /// this gradient with a batch's probs has the gradient of the loss over all batches of the
    /// totals.
    pub fn balance_gradient(&self) -> Tensor {
        let factor = if self.dense { 2.0 } else { 1.0 };
        self.expert_load() * self.per_token(factor * self.num_experts() as f64)
    }

    /// `d uniform_mse / d probs`, which is the same for each token, `[m]`.
    pub(crate) fn uniform_gradient(&self) -> Tensor {
        let m = self.num_experts() as f64;
        (self.mean_probs() - 1.0 / m) * self.per_token(2.0 / m)
    }
}

/// The rows of `x`, `[b, t, m]`, at the positions `at`, `[n]`, of the flattened `[b t]`: `[n, m]`.
pub fn rows(x: &Tensor, at: &Tensor) -> Tensor {
    let width = *x.size().last().expect("routing tensors are [b, t, _]");
    x.view([-1, width]).index_select(0, at)
}

/// The entropy of each row of `probs_nm`, `[n, m]`, in nats: `[n]`.
pub(crate) fn entropies(probs_nm: &Tensor) -> Tensor {
    // makes 0 ln 0 equal 0, with a finite gradient
    let tiny = if probs_nm.kind() == Kind::Double { f64::MIN_POSITIVE } else { 1e-37 };
    -(probs_nm * probs_nm.clamp_min(tiny).log()).sum_dim_intlist(-1, false, probs_nm.kind())
}
