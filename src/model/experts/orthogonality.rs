//! How far experts are from orthogonal: the mean of a squared cosine between two experts, from 0 to
//! 1, which [`Orthogonality`] defines. The mean is taken over a module's pairs of experts and then
//! over the target modules.
//!
//! It is computed from Gram matrices `[R, R]` of the stacked factors, so that no update `[i, o]` is
//! formed: `<D_e, D_f> = sum_rs (A A^T)_rs (B^T B)_rs` over the rows r of e and s of f.
//!
//! Letters of shapes: `e` experts of a module, `R` sum of their ranks.

use tch::Tensor;

use super::slots::{RankRows, Slot};
use super::stack::LoraExperts;
use crate::config::Orthogonality;

/// The mean squared cosine over `modules`, 0-dim and differentiable; `None` if no module has two
/// experts.
pub fn orthogonality<'a>(
    modules: impl Iterator<Item = &'a LoraExperts>,
    of: Orthogonality,
) -> Option<Tensor> {
    let cosines: Vec<Tensor> =
        modules.filter_map(|experts| experts.mean_squared_cosine(of)).collect();
    let count = cosines.len() as f64;
    (!cosines.is_empty()).then(|| cosines.into_iter().sum::<Tensor>() / count)
}

impl LoraExperts {
    /// The mean over the pairs of the module's experts, 0-dim; `None` if it has fewer than two
    /// experts.
    fn mean_squared_cosine(&self, of: Orthogonality) -> Option<Tensor> {
        let num_experts = self.slots.len() as i64;
        if num_experts < 2 {
            return None;
        }
        let options = (self.lora_a.kind(), self.lora_a.device());
        let (num, norms) = match of {
            Orthogonality::A(_) => {
                let members = self.members(self.lora_a.size()[0], false);
                let gram = self.lora_a.matmul(&self.lora_a.tr());
                let squares = members.matmul(&gram.square()).matmul(&members.tr());
                (squares, members.matmul(&gram.diagonal(0, 0, 1).unsqueeze(-1)))
            }
            Orthogonality::Ba(_) => {
                let (down, up) = self.factors();
                let members = self.members(down.size()[0], true);
                let gram = down.matmul(&down.tr()) * up.matmul(&up.tr());
                let inner = members.matmul(&gram).matmul(&members.tr());
                let norms = inner.diagonal(0, 0, 1).unsqueeze(-1);
                (inner.square(), norms)
            }
        };
        // an update of zero counts as orthogonal to every other
        let cosines = num / norms.matmul(&norms.tr()).clamp_min(1e-30);
        let pairs = Tensor::ones([num_experts, num_experts], options).triu(1);
        let count = (num_experts * (num_experts - 1) / 2) as f64;
        Some((cosines * pairs).sum(options.0) / count)
    }

    /// 1 where a row belongs to the expert, `[e, rows]`. The rows are those of the stacks and, with
    /// `with_initial`, the initial rows behind them.
    fn members(&self, rows: i64, with_initial: bool) -> Tensor {
        let options = (self.lora_a.kind(), self.lora_a.device());
        let line = |slot: &Slot| self.slots.iter().position(|s| s.expert == slot.expert);
        let members = RankRows(&self.slots).filled(
            self.slots.len() as i64,
            options,
            |slot| line(slot).map(|line| line as i64),
            |_| 1.0,
        );
        if with_initial { members } else { members.narrow(1, 0, rows) }
    }
}
