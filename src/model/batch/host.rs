//! A batch on the host: rows of token ids, and one tensor that holds all of their numbers.
//!
//! The host's decisions depend on nothing but a batch's [`InputLayout`]: batches of one layout run
//! the same kernels, and the numbers of one can replace those of another in memory. Some sizes
//! differ from batch to batch ([`Extent`]). Rounded up, they take only a few values. The fillers
//! that rounding adds do not count in any result.
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions.

use tch::{Device, Kind, Tensor};

use super::targets::DomainTargets;
use crate::data::{Batch, IGNORED_LABEL};
use crate::ffi;

/// Labelled positions are rounded up in units of the batch's positions divided by this.
const LABEL_PARTS: usize = 8;
/// The smallest such unit.
const MIN_LABEL_PART: usize = 64;
/// The smallest rounded number of documents.
const MIN_DOCUMENTS: usize = 16;

/// Rows of token ids on the host, as [`crate::data`] makes them. All slices are `[b t]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Number of rows `b`.
    pub num_rows: usize,
    /// Number of positions `t` in a row.
    pub seq_len: usize,
    /// Token ids; any valid id in padding.
    pub input_ids: &'a [i64],
    /// Targets, already shifted: the token that follows each position; -100 means no loss.
    pub labels: &'a [i64],
    /// Positions within each document.
    pub position_ids: &'a [i64],
    /// Index of each position's document in its row; -1 in padding, which may be anywhere.
    pub document_ids: &'a [i64],
    /// The expert that each position's record names, -1 for the base; `None` if no record decides.
    pub expert_ids: Option<&'a [i64]>,
    /// Which positions read their document's prompt. A document without a prompt counts as all
    /// prompt; `None` means every position.
    pub prompt: Option<&'a [bool]>,
}

impl<'a> Rows<'a> {
    /// The rows of a batch of data.
    ///
    /// - `by_record`: whether the experts that records name decide the routing
    pub fn of_batch(batch: &'a Batch, by_record: bool) -> Self {
        Self {
            num_rows: batch.num_rows,
            seq_len: batch.seq_len,
            input_ids: &batch.input_ids,
            labels: &batch.labels,
            position_ids: &batch.position_ids,
            document_ids: &batch.document_ids,
            expert_ids: by_record.then_some(&batch.expert_ids[..]),
            prompt: Some(&batch.prompt),
        }
    }

    /// Where each run of positions of one document, or of padding, ends in the flattened `[b t]`.
    fn document_ends(&self) -> Vec<i64> {
        let mut end = 0;
        let rows = self.document_ids.chunks(self.seq_len);
        let runs = rows.flat_map(|row| row.chunk_by(|a, b| a == b));
        runs.map(|run| {
            end += run.len() as i64;
            end
        })
        .collect()
    }

    fn num_labelled(&self) -> usize {
        self.labels.iter().filter(|&&label| label >= 0).count()
    }

    /// False if each row is one document, possibly with padding behind it, which causal attention
    /// alone keeps out.
    fn is_packed(&self) -> bool {
        let single = |row: &[i64]| {
            row.iter().all(|&id| id <= 0) && row.windows(2).all(|pair| pair[0] >= pair[1])
        };
        !self.document_ids.chunks(self.seq_len).all(single)
    }
}

/// The sizes of a batch that depend on its documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Number of labelled positions `n`.
    pub num_labelled: usize,
    /// Whether some of the labelled positions may be fillers, which do not count in any result.
    pub is_rounded: bool,
    /// The sizes of the documents, if attention must stay within them.
    pub packed: Option<PackedExtent>,
}

/// The sizes of packed documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PackedExtent {
    /// Number of documents; each run of padding counts as one.
    pub num_documents: usize,
    /// Number of positions of the longest document.
    pub longest: usize,
}

impl PackedExtent {
    fn of(rows: &Rows<'_>) -> Self {
        let ends = rows.document_ends();
        let starts = [0].into_iter().chain(ends.iter().copied());
        let lengths = ends.iter().zip(starts).map(|(end, start)| end - start);
        Self { num_documents: ends.len(), longest: lengths.max().unwrap_or(0) as usize }
    }
}

impl Extent {
    /// The exact sizes of a batch.
    pub fn of(rows: &Rows<'_>) -> Self {
        Self {
            num_labelled: rows.num_labelled(),
            is_rounded: false,
            packed: rows.is_packed().then(|| PackedExtent::of(rows)),
        }
    }

    /// Sizes that hold each of several batches, rounded up:
    ///
    /// - the labelled positions to units of an eighth of the largest batch's positions, or of 64 if
    ///   that is more, but at most to all positions
    /// - the number of documents to a power of two, at least 16
    /// - the longest document to a power of two, at most a whole row
    pub fn rounded(batches: &[Rows<'_>]) -> Self {
        let positions = batches.iter().map(|rows| rows.num_rows * rows.seq_len).max().unwrap_or(0);
        let part = positions.div_ceil(LABEL_PARTS).max(MIN_LABEL_PART);
        let num_labelled = batches.iter().map(Rows::num_labelled).max();
        let is_packed = batches.iter().any(Rows::is_packed);
        let packed = batches.iter().map(|rows| {
            let PackedExtent { num_documents, longest } = PackedExtent::of(rows);
            PackedExtent {
                num_documents: num_documents.next_power_of_two().max(MIN_DOCUMENTS),
                longest: longest.next_power_of_two().min(rows.seq_len),
            }
        });
        let larger = |a: PackedExtent, b: PackedExtent| PackedExtent {
            num_documents: a.num_documents.max(b.num_documents),
            longest: a.longest.max(b.longest),
        };
        Self {
            num_labelled: num_labelled.unwrap_or(0).max(1).next_multiple_of(part).min(positions),
            is_rounded: true,
            packed: packed.reduce(larger).filter(|_| is_packed),
        }
    }
}

/// What lies where in a batch's flat tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InputLayout {
    pub(super) num_rows: usize,
    pub(super) seq_len: usize,
    pub(super) extent: Extent,
    pub(super) names_experts: bool,
    pub(super) marks_prompts: bool,
    /// Number of experts of which a row's domain has some; 0 if domains have no experts.
    pub(super) domain_experts: usize,
}

impl InputLayout {
    /// Whether the labelled positions are all positions, in their order. Those without a label are
    /// fillers.
    pub(super) fn labels_every_position(&self) -> bool {
        self.extent.is_rounded && self.extent.num_labelled == self.num_rows * self.seq_len
    }
}

/// A batch on the host: all of its numbers in one int64 tensor.
#[derive(Debug)]
pub struct HostInputs {
    /// The numbers, `[..]`, in pinned memory if they will go to a GPU.
    pub flat: Tensor,
    /// What lies where in it.
    pub layout: InputLayout,
}

impl HostInputs {
    /// Lays out `rows` for `device`.
    ///
    /// - `extent`: the sizes of the rows, or larger ones
    /// - `groups`: the group of tokens that each row belongs to, `[b]`; its domain, if `experts`
    ///   are given
    pub fn new(
        rows: Rows<'_>,
        extent: Extent,
        groups: &[u32],
        experts: Option<&DomainTargets>,
        device: Device,
    ) -> Self {
        let layout = InputLayout {
            num_rows: rows.num_rows,
            seq_len: rows.seq_len,
            extent,
            names_experts: rows.expert_ids.is_some(),
            marks_prompts: rows.prompt.is_some(),
            domain_experts: experts.map_or(0, |experts| experts.num_experts),
        };
        let mut flat = [rows.input_ids, rows.position_ids, rows.document_ids].concat();
        flat.extend(rows.expert_ids.unwrap_or_default());
        flat.extend(rows.prompt.unwrap_or_default().iter().map(|&reads| i64::from(reads)));
        flat.extend(
            experts.iter().flat_map(|experts| {
                groups.iter().flat_map(|&domain| experts.marks(domain as usize))
            }),
        );
        let is_every = layout.labels_every_position();
        let labelled: Vec<usize> =
            (0..rows.labels.len()).filter(|&i| is_every || rows.labels[i] >= 0).collect();
        let fillers = extent.num_labelled - labelled.len();
        let mut extend = |of: &dyn Fn(usize) -> i64, filler: &dyn Fn(usize) -> i64| {
            flat.extend(labelled.iter().map(|&i| of(i)));
            flat.extend((0..fillers).map(filler));
        };
        // fillers take different positions, since gradients of one position are added one after the
        // other
        extend(&|i| i as i64, &|filler| (filler % rows.labels.len()) as i64);
        extend(&|i| rows.labels[i], &|_| IGNORED_LABEL);
        extend(&|i| i64::from(groups[i / rows.seq_len]), &|_| 0);
        if let Some(packed) = extent.packed {
            let ends = rows.document_ends();
            let total = (rows.num_rows * rows.seq_len) as i64;
            let empty = packed.num_documents - ends.len();
            flat.push(0);
            flat.extend(ends);
            flat.extend(std::iter::repeat_n(total, empty));
        }
        Self { flat: ffi::staged(Tensor::from_slice(&flat), device), layout }
    }

    /// Copies the numbers to `device`. The host does not wait until they arrive.
    pub fn to_device(&self, device: Device) -> Tensor {
        self.flat.to_device_(device, Kind::Int64, true, false)
    }
}
