//! The positions of a batch that have a label, and the group of tokens that each belongs to.

use tch::Tensor;

/// The label tokens of a batch and the group of each.
#[derive(Debug, Clone, Copy)]
pub struct Labelled<'a> {
    /// Their indices in the flattened `[b t]`, `[n]`.
    pub rows: &'a Tensor,
    /// Their groups as indices of domains, `[n]`.
    pub groups: &'a Tensor,
    /// Number of groups.
    pub num_groups: i64,
    /// Which of them are not fillers, `[n]`; `None` if all count.
    pub counted: Option<&'a Tensor>,
}

impl Labelled<'_> {
    /// `x`, `[n]` or `[n, _]`, with zeros for the tokens that do not count.
    pub(crate) fn only_counted(&self, x: Tensor) -> Tensor {
        let Some(counted) = self.counted else { return x };
        let counted = if x.dim() > 1 { counted.unsqueeze(-1) } else { counted.shallow_clone() };
        x * counted
    }
}
