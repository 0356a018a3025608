//! What the fused operations need of a block's products, and how the base's weights are packed for
//! them.
//!
//! A product consists of the linear layers that read the same input, its members.
//!
//! Letters of shapes: `d` width, `i` in, `o` out, `e` expert, `R` sum of a module's ranks (with
//! those of the initial components), `R'` the same rounded up to a multiple of [`COLUMNS`], or the
//! sum of these over a product, `v` vocabulary.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::config::TargetModule;
use crate::ffi::fused::{Packed, RankColumns};
use crate::ffi::quantised::QuantisedWeights;
use crate::model::decoder::block::Block;
use crate::model::decoder::precision::wide;
use crate::model::experts::slots::RankRows;
use crate::model::experts::stack::LoraExperts;

/// The number of columns of a rank space is rounded up to a multiple of this, so that its rows take
/// a multiple of 16 bytes in any dtype.
pub const COLUMNS: i64 = 8;
/// On a GPU, the sizes of a quantised weight must be multiples of this.
pub(crate) const QUANTISED_COLUMNS: i64 = 16;
/// The most columns of a product's rank space that the kernels accept. They keep a row of it in
/// shared memory.
const MAX_COLUMNS: i64 = 4096;
/// The number of rows of a padded head is a multiple of this.
const HEAD_ROWS: i64 = 64;

/// What the fused operations need of a module with experts.
#[derive(Debug)]
pub struct FusedModule {
    /// The module's rank space as the kernels see it.
    pub columns: RankColumns,
    /// The scaling where a column belongs to the expert, and otherwise 0; `[e, R]`.
    pub rows: Tensor,
    /// The scaling of the expert if there is only one.
    pub single_scaling: f64,
    /// The first of the module's columns in the product's rank space.
    pub first_rank: i64,
}

/// The columns of a rank space on the host.
#[derive(Debug, Clone, Default)]
struct HostColumns {
    expert_of: Vec<i32>,
    scaling: Vec<f32>,
    /// Runs `[first, second)` of each expert.
    runs: Vec<Vec<[i32; 2]>>,
}

impl HostColumns {
    fn of(experts: &LoraExperts, num_experts: usize) -> Self {
        let rank_rows = RankRows(&experts.slots);
        let filled = rounded_up(rank_rows.num_rows(), COLUMNS) as usize;
        let (expert_of, scaling) = (vec![0; filled], vec![0.0; filled]);
        let mut columns = Self { expert_of, scaling, runs: vec![vec![[0; 2]; 2]; num_experts] };
        for slot in &experts.slots {
            let (first, second) = rank_rows.of(slot);
            for (run, at) in [Some(first), second].into_iter().flatten().enumerate() {
                columns.runs[slot.expert][run] = [at.start as i32, at.end as i32];
                for column in at {
                    columns.expert_of[column as usize] = slot.expert as i32;
                    columns.scaling[column as usize] = slot.scaling as f32;
                }
            }
        }
        columns
    }

    /// Number of columns, `R'`.
    fn len(&self) -> i64 {
        self.expert_of.len() as i64
    }

    /// Puts the columns of another module behind these.
    fn append(&mut self, other: &Self) {
        let first = self.expert_of.len() as i32;
        self.expert_of.extend(&other.expert_of);
        self.scaling.extend(&other.scaling);
        self.runs.resize(other.runs.len(), vec![]);
        for (runs, others) in self.runs.iter_mut().zip(&other.runs) {
            runs.extend(others.iter().map(|run| run.map(|column| column + first)));
        }
    }

    fn to_device(&self, device: tch::Device) -> RankColumns {
        let flat: Vec<i32> = self.runs.iter().flatten().flatten().copied().collect();
        let experts = self.runs.len();
        let width = flat.len().checked_div(experts).unwrap_or(0);
        RankColumns {
            expert_of: Tensor::from_slice(&self.expert_of).to_device(device),
            scaling: Tensor::from_slice(&self.scaling).to_device(device),
            runs: Tensor::from_slice(&flat).view([experts as i64, width as i64]).to_device(device),
        }
    }
}

/// A product's weights and experts in one matrix.
#[derive(Debug)]
struct PackedProduct {
    /// `[W A^T; B^T 0]`, `[i + R', o + R']`.
    matrix: Tensor,
    /// The widths `o` of the members.
    widths: Vec<i64>,
    /// The biases of all members, `[o]`.
    bias: Option<Tensor>,
    /// The columns of all members' experts.
    columns: RankColumns,
}

/// What the fused operations need of a product.
#[derive(Debug)]
pub struct FusedProduct {
    /// Its members, in order.
    pub members: &'static [TargetModule],
    /// The members with experts.
    pub experts: BTreeMap<TargetModule, FusedModule>,
    /// The columns of all members' experts.
    columns: HostColumns,
    packed: Option<PackedProduct>,
    quantised: Option<QuantisedWeights>,
}

impl FusedProduct {
    /// Describes the experts of a product's members, not yet packed.
    ///
    /// - `kind`: the dtype in which the model computes
    pub fn new(
        members: &'static [TargetModule],
        experts: &BTreeMap<TargetModule, LoraExperts>,
        num_experts: usize,
        kind: Kind,
    ) -> Self {
        let mut columns = HostColumns::default();
        let mut modules = BTreeMap::new();
        for &module in members {
            let Some(experts) = experts.get(&module) else { continue };
            let device = experts.lora_a.device();
            let own = HostColumns::of(experts, num_experts);
            let fused = FusedModule {
                columns: own.to_device(device),
                rows: RankRows(&experts.slots).scalings(num_experts, (wide(kind), device)),
                single_scaling: experts.slots[0].scaling,
                first_rank: columns.len(),
            };
            columns.append(&own);
            modules.insert(module, fused);
        }
        Self { members, experts: modules, columns, packed: None, quantised: None }
    }

    /// The product's row padding: extra columns behind each row of its input and of its output's
    /// gradient.
    pub fn row_padding(&self) -> i64 {
        self.packed.as_ref().map_or(0, |_| self.columns.len())
    }

    /// What the kernels need, if the product is packed.
    pub fn packed(&self) -> Option<Packed<'_>> {
        let PackedProduct { matrix, bias, columns, .. } = self.packed.as_ref()?;
        Some(Packed { matrix, bias: bias.as_ref(), columns })
    }

    /// The quantised weights of all members, once there are some.
    pub fn quantised(&self) -> Option<&QuantisedWeights> {
        self.quantised.as_ref()
    }

    /// Quantises the members' weights. The weights themselves stay as they are.
    pub fn quantise(&mut self, block: &Block) -> Result<()> {
        let weights = self.members.iter().map(|module| block.linears[module].weight());
        let weight = Tensor::cat(&weights.collect::<Vec<_>>(), 1);
        self.quantised = Some(QuantisedWeights::new(&weight)?);
        Ok(())
    }

    /// Whether the product is one matrix multiplication as it is.
    pub(crate) fn is_one_product(&self) -> bool {
        self.packed.is_some() || (self.members.len() == 1 && self.experts.is_empty())
    }

    /// Copies the weights of the members into a packed matrix, and makes them views of it. Does
    /// nothing for a single weight `[i, o]` without experts, for an expert that the kernels do not
    /// know, or for more columns than they accept.
    pub fn pack(&mut self, block: &mut Block, experts: &BTreeMap<TargetModule, LoraExperts>) {
        let is_known = |module: &TargetModule| {
            experts.get(module).is_none_or(|experts| experts.dora.is_none())
        };
        let padding = self.columns.len();
        let is_plain = self.is_one_product()
            && block.linears[&self.members[0]].weight().stride().last() == Some(&1);
        if is_plain || padding > MAX_COLUMNS || !self.members.iter().all(is_known) {
            return;
        }
        let stored = block.linears[&self.members[0]].stored();
        let options = (stored.kind(), stored.device());
        let size = |module| block.linears[module].weight().size2().expect("a weight is [i, o]");
        let (i, _) = size(&self.members[0]);
        let widths: Vec<i64> = self.members.iter().map(|module| size(module).1).collect();
        let o = widths.iter().sum::<i64>();
        let matrix = Tensor::zeros([i + padding, o + padding], options);
        let mut first = 0;
        for (module, width) in self.members.iter().zip(&widths) {
            let linear = block.linears.get_mut(module).expect("a block has them all");
            let mut place = matrix.narrow(0, 0, i).narrow(1, first, *width);
            place.copy_(&linear.weight());
            linear.set_weight(place);
            first += width;
        }
        let biases = self.members.iter().map(|module| block.linears[module].bias.as_ref());
        let bias = biases.collect::<Option<Vec<_>>>().map(|biases| match biases[..] {
            [bias] => bias.shallow_clone(),
            _ => Tensor::cat(&biases, 0),
        });
        let columns = self.columns.to_device(options.1);
        self.packed = Some(PackedProduct { matrix, widths, bias, columns });
    }

    /// Where the experts of each member lie in the packed matrix: `A^T`, `[i, R']`, and `B^T`,
    /// `[R', o]`. Empty without a packed matrix.
    pub fn places(&self) -> Vec<(TargetModule, [Tensor; 2])> {
        let Some(PackedProduct { matrix, widths, .. }) = &self.packed else { return vec![] };
        let (rows, columns) = matrix.size2().expect("a packed matrix has two dimensions");
        let padding = self.columns.len();
        let of_member = |(at, module): (i64, TargetModule), width: i64| {
            let fused = self.experts.get(&module)?;
            let ranks = fused.columns.expert_of.size()[0];
            let down = matrix.narrow(0, 0, rows - padding);
            let down = down.narrow(1, columns - padding + fused.first_rank, ranks);
            let up = matrix.narrow(0, rows - padding + fused.first_rank, ranks);
            Some((module, [down, up.narrow(1, at, width)]))
        };
        let mut first = 0;
        let places = self.members.iter().zip(widths).filter_map(|(&module, &width)| {
            let place = of_member((first, module), width);
            first += width;
            place
        });
        places.collect()
    }

    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let columns = |columns: &RankColumns| RankColumns {
            expert_of: columns.expert_of.shallow_clone(),
            scaling: columns.scaling.shallow_clone(),
            runs: columns.runs.shallow_clone(),
        };
        let experts = self.experts.iter().map(|(&module, fused)| {
            let rows = fused.rows.shallow_clone();
            (module, FusedModule { columns: columns(&fused.columns), rows, ..*fused })
        });
        let packed = self.packed.as_ref().map(|packed| PackedProduct {
            matrix: packed.matrix.shallow_clone(),
            widths: packed.widths.clone(),
            bias: packed.bias.as_ref().map(Tensor::shallow_clone),
            columns: columns(&packed.columns),
        });
        let (members, columns) = (self.members, self.columns.clone());
        let quantised = self.quantised.as_ref().map(QuantisedWeights::shallow_clone);
        Self { members, experts: experts.collect(), columns, packed, quantised }
    }
}

/// The head with rows of zeros behind it, up to a multiple of 64 rows, and the view of the head in
/// it; `None` if the head has a multiple of 64 rows already.
pub(crate) fn padded_head(head: &Tensor) -> Option<(Tensor, Tensor)> {
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
