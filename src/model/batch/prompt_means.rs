//! The means over prompts that routers at `level = "sequence"` read.
//!
//! Letters of shapes: `b` batch, `t` position, `w` features.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tch::{Kind, Tensor};

/// Takes means of features over the prompts up to each position.
#[derive(Debug)]
pub enum PromptMeans {
    /// By a matrix, `[b, t, t]`, whose row t has equal numbers at the positions up to t that read
    /// the prompt of t's document, and zeros elsewhere.
    Whole(Tensor),
    /// By what is known of earlier positions, in this dtype. The cell counts the tensors of
    /// features in the forward pass so far.
    Running(RunningStep, Kind, Cell<usize>),
}

impl PromptMeans {
    /// The means of `x`, `[b, t, w]`.
    pub fn of(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Whole(means) => means.matmul(&x.to_kind(means.kind())),
            Self::Running(step, kind, next) => step.of(next.replace(next.get() + 1), x, *kind),
        }
    }
}

/// The sums of features over the prompts of texts that are being generated.
#[derive(Debug, Default, Clone)]
pub struct RunningMeans {
    /// For each tensor of features in a forward pass, in order, `[rows, w]`.
    sums: Rc<RefCell<Vec<Tensor>>>,
}

impl RunningMeans {
    /// Makes room for `num_rows` texts.
    pub fn reserve(&self, num_rows: usize) {
        for sums in self.sums.borrow_mut().iter_mut() {
            let missing = num_rows as i64 - sums.size()[0];
            if missing > 0 {
                let zeros = Tensor::zeros([missing, sums.size()[1]], (sums.kind(), sums.device()));
                *sums = Tensor::cat(&[&*sums, &zeros], 0);
            }
        }
    }

    /// Copies the sums of row `from` to row `to`.
    pub fn copy_row(&self, from: usize, to: usize) {
        for sums in self.sums.borrow().iter() {
            sums.get(to as i64).copy_(&sums.get(from as i64));
        }
    }
}

/// The means of one step of generation.
#[derive(Debug)]
pub struct RunningStep {
    /// The sums before the step.
    pub means: RunningMeans,
    /// Number of all rows.
    pub num_rows: usize,
    /// The first row of the step.
    pub first_row: usize,
    /// Whether the rows are empty before the step.
    pub is_first: bool,
    /// 1 at each new position that reads a prompt and 0 elsewhere, `[b, t]`.
    pub prompt: Tensor,
    /// Number of positions of the prompt up to each new position, `[b, t]`.
    pub counts: Tensor,
}

impl RunningStep {
    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            means: self.means.clone(),
            prompt: self.prompt.shallow_clone(),
            counts: self.counts.shallow_clone(),
            ..*self
        }
    }

    /// The means of the features `x`, `[b, t, w]`, which have this index in the forward pass.
    fn of(&self, index: usize, x: &Tensor, kind: Kind) -> Tensor {
        let x = x.to_kind(kind);
        let (b, _, w) = x.size3().expect("features are [b, t, w]");
        let column = |x: &Tensor| x.to_kind(kind).unsqueeze(-1);
        let mut sums = (&x * column(&self.prompt)).cumsum(1, kind);
        let mut all = self.means.sums.borrow_mut();
        if all.len() == index {
            all.push(Tensor::zeros([self.num_rows as i64, w], (kind, x.device())));
        }
        let mut so_far = all[index].narrow(0, self.first_row as i64, b);
        if !self.is_first {
            sums += so_far.unsqueeze(1);
        }
        so_far.copy_(&sums.select(1, -1));
        sums / column(&self.counts).clamp_min(1.0)
    }
}
