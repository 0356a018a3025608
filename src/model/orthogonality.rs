//! How far experts are from orthogonal: the mean over the target modules and their pairs of experts of a
//! squared cosine from 0 to 1, which [`Orthogonality`] defines.
//!
//! Both are taken from Gram matrices of the stacked factors, `[R, R]`; no update `[i, o]` is formed:
//! `<D_e, D_f> = sum_rs (A A^T)_rs (B^T B)_rs` over the rows r of e and s of f.
//!
//! Letters of shapes: `e` experts of a module, `R` sum of their ranks.

use tch::Tensor;

use super::RoutedGpt2;
use super::lora::LoraExperts;
use crate::config::Orthogonality;

impl RoutedGpt2 {
    /// The mean squared cosine, 0-dim, differentiable; none if no module has two experts.
    pub fn orthogonality(&self, of: Orthogonality) -> Option<Tensor> {
        let modules: Vec<Tensor> =
            self.modules().filter_map(|(_, experts)| experts.mean_squared_cosine(of)).collect();
        let count = modules.len() as f64;
        (!modules.is_empty()).then(|| modules.into_iter().sum::<Tensor>() / count)
    }
}

impl LoraExperts {
    /// The mean over the pairs of the module's experts, 0-dim.
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
        // an update of zero is orthogonal to all
        let cosines = num / norms.matmul(&norms.tr()).clamp_min(1e-30);
        let pairs = Tensor::ones([num_experts, num_experts], options).triu(1);
        let count = (num_experts * (num_experts - 1) / 2) as f64;
        Some((cosines * pairs).sum(options.0) / count)
    }

    /// 1 where a row of the stack is the expert's, and, if `with_initial`, of `initial` behind it,
    /// `[e, rows]`.
    fn members(&self, rows: i64, with_initial: bool) -> Tensor {
        let stack = self.lora_a.size()[0];
        let options = (self.lora_a.kind(), self.lora_a.device());
        let members = Tensor::zeros([self.slots.len() as i64, rows], options);
        for (row, slot) in (0..).zip(&self.slots) {
            let of_expert = members.get(row);
            let _ = of_expert.narrow(0, slot.start, slot.rank).fill_(1.0);
            if let (Some(start), true) = (slot.initial, with_initial) {
                let _ = of_expert.narrow(0, stack + start, slot.rank).fill_(1.0);
            }
        }
        members
    }
}
