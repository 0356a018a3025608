//! Which tokens chose which expert under top-k routing.
//!
//! Letters of shapes: `b` batch, `t` position, `n = b t`, `k` chosen experts, `m = n k`
//! assignments, `e` expert.

use tch::{Device, Kind, Tensor};

use crate::ffi::{self, Permutation};

/// Which tokens chose which expert, sorted by expert. This is computed once for a routing decision,
/// however many modules use it.
#[derive(Debug)]
pub struct Assignments {
    /// How many tokens chose each expert.
    pub(super) counts: Vec<i64>,
    /// Where each expert's run of assignments ends, `[e]`, int32.
    pub(super) ends: Tensor,
    /// True where no token chose the expert, `[e, 1, 1]`.
    pub(super) unchosen: Tensor,
    /// The token of each assignment, `[m]`, int64.
    tokens: Tensor,
    /// Index of each assignment's weight in the flattened routing weights `[n e]`, `[m]`, int64.
    pub(super) weights: Tensor,
    /// The assignments of each token, `[n, k]`, int64.
    pub(super) inverse: Tensor,
}

impl Assignments {
    /// Sorts the assignments by expert. Waits for the device once.
    ///
    /// - `selected`: the experts that each token chose, all different, `[b, t, k]`, int64
    pub fn new(selected: &Tensor, num_experts: i64) -> Self {
        let (b, t, k) = selected.size3().expect("selected experts are [b, t, k]");
        let (experts, order) = selected.detach().reshape([-1]).sort_stable(true, 0, false);
        let tokens = order.floor_divide_scalar(k);
        let options = (Kind::Int64, selected.device());
        let inverse = order.empty_like().scatter(0, &order, &Tensor::arange(b * t * k, options));
        let every = Tensor::arange(num_experts, options);
        let ends = every.searchsorted(&experts, true, true, "right", None::<Tensor>);
        let on_host = Vec::<i64>::try_from(ends.to_kind(Kind::Int64).to_device(Device::Cpu))
            .expect("it has one dimension");
        let starts = [0].into_iter().chain(on_host.iter().copied());
        let counts: Vec<i64> = on_host.iter().zip(starts).map(|(end, start)| end - start).collect();
        let unchosen: Vec<bool> = counts.iter().map(|&count| count == 0).collect();
        Self {
            unchosen: Tensor::from_slice(&unchosen).view([-1, 1, 1]).to_device(selected.device()),
            weights: &tokens * num_experts + experts,
            inverse: inverse.view([b * t, k]),
            counts,
            ends,
            tokens,
        }
    }

    /// How many tokens chose each expert.
    pub fn counts(&self) -> &[i64] {
        &self.counts
    }

    /// Another handle to the same assignments.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            counts: self.counts.clone(),
            ends: self.ends.shallow_clone(),
            unchosen: self.unchosen.shallow_clone(),
            tokens: self.tokens.shallow_clone(),
            weights: self.weights.shallow_clone(),
            inverse: self.inverse.shallow_clone(),
        }
    }

    /// Copies rows from tokens to their assignments, or sums them back.
    pub(super) fn permute(&self, rows: &Tensor, way: Permutation) -> Tensor {
        ffi::permute(rows, &self.tokens, &self.inverse, way).unwrap_or_else(|e| panic!("{e:#}"))
    }
}
