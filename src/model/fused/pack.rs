//! What the fused operations need of a target module, and how the base's weights are packed for
//! them.
//!
//! Letters of shapes: `d` width, `i` in, `o` out, `e` expert, `R` sum of ranks (with those of the
//! initial components), `R'` the same rounded up to a multiple of [`COLUMNS`], `v` vocabulary.

use tch::{Kind, Tensor};

use crate::ffi::fused::RankColumns;
use crate::model::decoder::precision::wide;
use crate::model::experts::slots::RankRows;
use crate::model::experts::stack::LoraExperts;

/// The number of columns of a rank space is rounded up to a multiple of this, so that its rows take
/// a multiple of 16 bytes in any dtype.
pub const COLUMNS: i64 = 8;
/// The most columns of a rank space that the kernels accept. They keep a row of it in shared
/// memory.
const MAX_COLUMNS: i64 = 4096;
/// The number of rows of a padded head is a multiple of this.
const HEAD_ROWS: i64 = 64;

/// What the fused operations need of a target module.
#[derive(Debug)]
pub struct FusedModule {
    /// The module's rank space as the kernels see it.
    pub columns: RankColumns,
    /// `[W A^T; B^T 0]`, `[i + R', o + R']`; `None` without kernels.
    pub packed: Option<Tensor>,
}

impl FusedModule {
    /// Describes the experts of a module, not yet packed; `kind` is the dtype in which the model
    /// computes.
    pub fn new(experts: &LoraExperts, num_experts: usize, kind: Kind) -> Self {
        let device = experts.lora_a.device();
        let rank_rows = RankRows(&experts.slots);
        let filled = rounded_up(rank_rows.num_rows(), COLUMNS) as usize;
        let (mut expert_of, mut scaling) = (vec![0i32; filled], vec![0f32; filled]);
        let mut runs = vec![[0i32; 4]; num_experts];
        for slot in &experts.slots {
            let (first, second) = rank_rows.of(slot);
            let second = second.unwrap_or(0..0);
            runs[slot.expert] =
                [first.start, first.end, second.start, second.end].map(|at| at as i32);
            for column in first.chain(second) {
                expert_of[column as usize] = slot.expert as i32;
                scaling[column as usize] = slot.scaling as f32;
            }
        }
        let columns = RankColumns {
            expert_of: Tensor::from_slice(&expert_of).to_device(device),
            scaling: Tensor::from_slice(&scaling).to_device(device),
            runs: Tensor::from_slice(runs.as_flattened()).view([-1, 4]).to_device(device),
            rows: rank_rows.scalings(num_experts, (wide(kind), device)),
            single_scaling: experts.slots[0].scaling,
        };
        Self { columns, packed: None }
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        let RankColumns { expert_of, scaling, runs, rows, single_scaling } = &self.columns;
        let columns = RankColumns {
            expert_of: expert_of.shallow_clone(),
            scaling: scaling.shallow_clone(),
            runs: runs.shallow_clone(),
            rows: rows.shallow_clone(),
            single_scaling: *single_scaling,
        };
        Self { columns, packed: self.packed.as_ref().map(Tensor::shallow_clone) }
    }

    /// Number of columns of the rank space, `R'`.
    fn num_columns(&self) -> i64 {
        self.columns.expert_of.size()[0]
    }

    /// The module's row padding: extra columns behind each row of its input and of its output's
    /// gradient.
    pub fn row_padding(&self) -> i64 {
        self.packed.as_ref().map_or(0, |_| self.num_columns())
    }

    /// Whether the kernels accept a rank space of this size.
    pub fn fits(&self) -> bool {
        self.num_columns() <= MAX_COLUMNS
    }

    /// Copies the base's weight, `[i, o]`, into a packed matrix and returns the view of it there.
    pub fn pack(&mut self, weight: &Tensor) -> Tensor {
        let (i, o) = weight.size2().expect("a weight is [i, o]");
        let padding = self.num_columns();
        let packed = Tensor::zeros([i + padding, o + padding], (weight.kind(), weight.device()));
        let mut place = packed.narrow(0, 0, i).narrow(1, 0, o);
        place.copy_(weight);
        self.packed = Some(packed);
        place
    }
}

/// The head with rows of zeros behind it, up to a multiple of 64 rows, and the view of the head in
/// it; `None` if the head has a multiple of 64 rows already.
pub fn padded_head(head: &Tensor) -> Option<(Tensor, Tensor)> {
    let (v, d) = head.size2().expect("the head is [v, d]");
    let rows = rounded_up(v, HEAD_ROWS);
    if rows == v {
        return None;
    }
    let padded = Tensor::zeros([rows, d], (head.kind(), head.device()));
    let mut place = padded.narrow(0, 0, v);
    place.copy_(head);
    Some((padded, place))
}

fn rounded_up(n: i64, unit: i64) -> i64 {
    (n + unit - 1) / unit * unit
}
