//! The positions of a batch that have a label, and the group of tokens that each belongs to.

use tch::{Kind, Tensor};

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
    /// A matrix `[g, n]`, f64, with 1 where a token belongs to a group and counts, and 0 elsewhere.
    /// Its product with a number for each token is the sum of the numbers in each group.
    pub(crate) fn by_group(&self) -> Tensor {
        let every_g = Tensor::arange(self.num_groups, (Kind::Int64, self.groups.device()));
        let belongs_gn = every_g.unsqueeze(-1).eq_tensor(self.groups).to_kind(Kind::Double);
        self.only_counted(belongs_gn, 1)
    }

    /// `x` with zeros for the tokens that do not count. Its dimension `dim` has the tokens.
    pub(crate) fn only_counted(&self, x: Tensor, dim: usize) -> Tensor {
        let Some(counted) = self.counted else { return x };
        let mut shape = vec![1; x.dim() - dim];
        shape[0] = -1;
        x * counted.view(&shape[..])
    }
}
