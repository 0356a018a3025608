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
//! On a GPU, starting a kernel takes longer than computing the totals of one site. The sites are
//! therefore stacked, and the totals of all of them are computed at once.
//!
//! Letters of shapes: `b` batch, `t` position, `n` label tokens, `s` site, `e` expert, `m` the
//! layer's experts, `g` groups of tokens (domains).

use tch::{Kind, Tensor};

use super::router::{Routing, of_present};
use crate::model::batch::Labelled;

/// Adds a batch's totals to those of each site. `totals` is empty before the first batch.
pub fn add_totals(totals: &mut Vec<RoutingTotals>, routing: &[Routing], labelled: Labelled<'_>) {
    let _no_grad = tch::no_grad_guard();
    let new = RoutingTotals::of_sites(routing, labelled);
    if totals.is_empty() || new.is_empty() {
        totals.extend(new);
        return;
    }
    let all = |totals: &[RoutingTotals]| {
        Tensor::cat(&totals.iter().map(RoutingTotals::flat).collect::<Vec<_>>(), 0)
    };
    *totals = views_of(&(all(totals) + all(&new)), totals);
}

/// Totals with the sizes of those in `like`, as views of `flat`, which holds the numbers of one
/// site after another.
pub(crate) fn views_of(flat: &Tensor, like: &[RoutingTotals]) -> Vec<RoutingTotals> {
    let mut at = 0;
    let of = |totals: &RoutingTotals| {
        let len = totals.flat_len();
        at += len;
        totals.with_flat(&flat.narrow(0, at - len, len))
    };
    like.iter().map(of).collect()
}

/// The most numbers of a stack of sites. It bounds the memory for their totals and losses.
const MOST_STACKED: i64 = 1 << 22;

/// Divides the sites into runs that can be stacked, since they route over the same number of
/// experts.
///
/// - `num_tokens`: the number of rows of each site
pub(crate) fn alike(routing: &[Routing], num_tokens: i64) -> Vec<&[Routing]> {
    let alike = |a: &Routing, b: &Routing| {
        a.present.is_none() && b.present.is_none() && a.selected.is_some() == b.selected.is_some()
    };
    let runs = routing.chunk_by(alike).flat_map(|run| {
        let numbers = (run[0].weights.size()[2] * num_tokens).max(1);
        run.chunks((MOST_STACKED / numbers).max(1) as usize)
    });
    runs.collect()
}

/// The rows at the positions `at`, `[n]`, of one tensor of each site, `[b, t, m]`: `[s, n, m]`.
pub(crate) fn stacked_rows<'r>(
    sites: &'r [Routing],
    of: impl Fn(&'r Routing) -> &'r Tensor,
    at: &Tensor,
) -> Tensor {
    let flat: Vec<Tensor> = sites.iter().map(|site| flat_tokens(of(site))).collect();
    Tensor::stack(&flat, 0).index_select(1, at)
}

/// Sums over the label tokens at one site, or at several that route over as many experts each. The
/// totals of several batches can be added.
#[derive(Debug)]
pub struct RoutingTotals {
    /// All sums of a site in one row, `[k]`, or of several sites, `[s, k]`; f64. A row has, in this
    /// order:
    ///
    /// - `g` numbers: how many label tokens each group has
    /// - `m` numbers: the sums of routing_probs
    /// - `g m` numbers: the sums of routing_weights in each group
    /// - `g m` numbers: how many assignments each group has; with dense routing, its sums of
    ///   routing_probs
    /// - `g` numbers: the sum of the entropies of routing_probs in each group, nats
    /// - one number: the sum of the squared logsumexp of router_logits
    flat: Tensor,
    /// Number of groups `g`.
    num_groups: i64,
    /// Number of experts `m`.
    num_experts: i64,
    /// How many experts of each token `assignments` counts.
    assignments_per_token: i64,
    /// Whether every token uses every expert.
    dense: bool,
}

impl RoutingTotals {
    /// The totals of a batch's label tokens at one site.
    pub fn new(routing: &Routing, labelled: Labelled<'_>) -> Self {
        let mut of_site = Self::of_sites(std::slice::from_ref(routing), labelled);
        of_site.pop().expect("one site has one entry")
    }

    /// The totals of a batch's label tokens at each site.
    pub fn of_sites(routing: &[Routing], labelled: Labelled<'_>) -> Vec<Self> {
        let _no_grad = tch::no_grad_guard();
        let runs = alike(routing, labelled.rows.size()[0]).into_iter();
        let of_run = |sites: &[Routing]| {
            let stacked = Self::stacked(sites, labelled);
            let site = |at| stacked.with_flat(&stacked.flat.select(0, at as i64));
            (0..sites.len()).map(site).collect::<Vec<_>>()
        };
        runs.flat_map(of_run).collect()
    }

    /// The totals of sites that are [`alike`].
    fn stacked(sites: &[Routing], labelled: Labelled<'_>) -> Self {
        let s = sites.len() as i64;
        let first = &sites[0];
        let own = |x_sne: Tensor| of_present(x_sne, 2, first.present.as_ref());
        let wide = |x: Tensor| x.to_kind(Kind::Double);
        let probs_snm = wide(stacked_rows(sites, |site| &site.probs, labelled.rows));
        let weights_sne = wide(stacked_rows(sites, |site| &site.weights, labelled.rows));
        let logits_snm = wide(stacked_rows(sites, |site| &site.logits, labelled.rows));
        let (e, m) = (weights_sne.size()[2], probs_snm.size()[2]);
        let (counts_sne, assignments_per_token) = match &first.selected {
            None => (None, 1),
            Some(_) => {
                fn selected(site: &Routing) -> &Tensor {
                    site.selected.as_ref().expect("all choose")
                }
                let selected_snk = stacked_rows(sites, selected, labelled.rows);
                let every_e = Tensor::arange(e, (Kind::Int64, labelled.rows.device()));
                let chosen_snke = selected_snk.unsqueeze(-1).eq_tensor(&every_e);
                let counts_sne = chosen_snke.sum_dim_intlist(2, false, Kind::Double);
                (Some(counts_sne), selected_snk.size()[2])
            }
        };
        let entropies_sn1 = entropies(&probs_snm).unsqueeze(-1);
        let squares_sn1 = logits_snm.logsumexp(-1, true).square();
        let mut columns = vec![entropies_sn1, squares_sn1, probs_snm, own(weights_sne)];
        columns.extend(counts_sne.map(own));
        // one product makes all sums, and always in the same order
        let groups_gn = labelled.by_group();
        let groups_sgn = groups_gn.unsqueeze(0).expand([s, -1, -1], false);
        let sums_sgk = groups_sgn.bmm(&Tensor::cat(&columns, -1));
        let part = |start, len| sums_sgk.narrow(-1, start, len);
        let of_all_groups = |x: Tensor| x.sum_dim_intlist(1, false, Kind::Double);
        let tokens_g = groups_gn.sum_dim_intlist(1, false, Kind::Double);
        let (probs_sgm, last) = (part(2, m), sums_sgk.size()[2] - m);
        let parts = [
            tokens_g.expand([s, -1], false),
            of_all_groups(probs_sgm.shallow_clone()),
            part(2 + m, m).reshape([s, -1]),
            if first.selected.is_some() { part(last, m) } else { probs_sgm }.reshape([s, -1]),
            part(0, 1).squeeze_dim(-1),
            of_all_groups(part(1, 1)),
        ];
        Self {
            flat: Tensor::cat(&parts, 1),
            num_groups: labelled.num_groups,
            num_experts: m,
            assignments_per_token,
            dense: first.selected.is_none(),
        }
    }

    /// The totals of several sites that route over as many experts each, as one.
    pub(crate) fn of_all(sites: &[&Self]) -> Self {
        let flat: Vec<&Tensor> = sites.iter().map(|site| &site.flat).collect();
        sites[0].with_flat(&Tensor::stack(&flat, 0))
    }

    /// All sums in one row, `[k]`, for a single transfer to the host: the number of tokens by
    /// group, the sum of probs, the sums of weights and of assignments by group, the sum of
    /// entropies by group, and that of the squared logsumexp.
    pub fn flat(&self) -> Tensor {
        self.flat.shallow_clone()
    }

    /// Length of [`flat`](Self::flat).
    fn flat_len(&self) -> i64 {
        2 * self.num_groups + self.num_experts + 2 * self.num_groups * self.num_experts + 1
    }

    /// Totals of the same sizes whose [`flat`](Self::flat) is `flat`.
    fn with_flat(&self, flat: &Tensor) -> Self {
        Self { flat: flat.shallow_clone(), ..*self }
    }

    /// Number of label tokens by group, `[.., g]`, f64.
    pub fn tokens(&self) -> Tensor {
        self.flat.narrow(-1, 0, self.num_groups)
    }

    /// Sum of routing_probs, `[.., m]`, f64.
    fn probs(&self) -> Tensor {
        self.flat.narrow(-1, self.num_groups, self.num_experts)
    }

    /// The `part`-th of the sums by group and expert, `[.., g, m]`.
    fn by_group(&self, part: i64) -> Tensor {
        let (g, m) = (self.num_groups, self.num_experts);
        self.flat.narrow(-1, g + m + part * g * m, g * m).unflatten(-1, [g, m])
    }

    /// Sum of routing_weights by group, `[.., g, m]`, f64.
    pub fn weights(&self) -> Tensor {
        self.by_group(0)
    }

    /// Number of experts `m`.
    pub fn num_experts(&self) -> i64 {
        self.num_experts
    }

    /// Number of label tokens, `[.., 1]`, f64.
    pub fn num_tokens(&self) -> Tensor {
        self.tokens().sum_dim_intlist(-1, true, Kind::Double)
    }

    /// Whether every token uses every expert.
    pub(crate) fn is_dense(&self) -> bool {
        self.dense
    }

    /// The expert load `f`: each expert's share of the assignments, `[.., m]`.
    pub fn expert_load(&self) -> Tensor {
        let sums = self.by_group(1).sum_dim_intlist(-2, false, Kind::Double);
        sums / (self.num_tokens() * self.assignments_per_token as f64)
    }

    /// The mean of routing_probs, `P`, `[.., m]`.
    fn mean_probs(&self) -> Tensor {
        self.probs() / self.num_tokens()
    }

    /// `d load_balancing_loss / d probs`, which is the same for each token, `[.., m]`. The loss
    /// depends on a token's probs through `P` and, with dense routing, also through `f = P`. The
    /// product of this gradient with a batch's probs has the gradient of the loss over all batches
    /// of the totals.
    pub fn balance_gradient(&self) -> Tensor {
        let factor = if self.dense { 2.0 } else { 1.0 };
        self.expert_load() * (factor * self.num_experts as f64) / self.num_tokens()
    }

    /// `d uniform_mse / d probs`, which is the same for each token, `[.., m]`.
    pub(crate) fn uniform_gradient(&self) -> Tensor {
        let m = self.num_experts as f64;
        (self.mean_probs() - 1.0 / m) * (2.0 / m) / self.num_tokens()
    }
}

/// The rows of `x`, `[b, t, m]`, at the positions `at`, `[n]`, of the flattened `[b t]`: `[n, m]`.
pub fn rows(x: &Tensor, at: &Tensor) -> Tensor {
    flat_tokens(x).index_select(0, at)
}

/// `x`, `[b, t, m]`, as `[b t, m]`.
fn flat_tokens(x: &Tensor) -> Tensor {
    x.view([-1, *x.size().last().expect("routing tensors are [b, t, _]")])
}

/// The entropy of each row of `probs_nm`, `[.., n, m]`, in nats: `[.., n]`.
pub(crate) fn entropies(probs_nm: &Tensor) -> Tensor {
    // makes 0 ln 0 equal 0, with a finite gradient
    let tiny = if probs_nm.kind() == Kind::Double { f64::MIN_POSITIVE } else { 1e-37 };
    -(probs_nm * probs_nm.clamp_min(tiny).log()).sum_dim_intlist(-1, false, probs_nm.kind())
}
