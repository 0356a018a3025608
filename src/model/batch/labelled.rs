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
    /// `x` with zeros for the tokens that do not count. Its dimension `dim` has the tokens.
    pub(crate) fn only_counted(&self, x: Tensor, dim: usize) -> Tensor {
        let Some(counted) = self.counted else { return x };
        let mut shape = vec![1; x.dim() - dim];
        shape[0] = -1;
        x * counted.view(&shape[..])
    }
}
