//! A batch as the model takes it: host rows, one tensor that holds all of their numbers, and views of it.
//!
//! ```text
//! Rows -> HostInputs (one flat tensor and its layout) --one transfer--> Inputs (views on the device)
//! ```
//!
//! What the host knows of a batch is its [`InputLayout`] alone: two batches of one layout run the same kernels,
//! and the numbers of the one can take the place of the other's in memory. Some sizes differ from batch to batch
//! ([`Extent`]); rounded up, they take a few values only. What fills them up counts in nothing.
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use super::gpt2::AttentionMask;
use super::routing_totals::Labelled;

/// The label of a position without loss.
const IGNORED: i64 = -100;
/// Of how many parts the largest number of labelled positions is made when it is rounded.
const LABEL_PARTS: usize = 8;
/// The smallest such part.
const MIN_LABEL_PART: usize = 64;
/// The smallest number of documents when it is rounded.
const MIN_DOCUMENTS: usize = 16;

/// Host rows of token ids, as the data room makes them; all slices are `[b t]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// `b`.
    pub num_rows: usize,
    /// `t`.
    pub seq_len: usize,
    /// Token ids; any valid id in padding.
    pub input_ids: &'a [i64],
    /// Targets, already shifted: what follows each position; -100 = no loss.
    pub labels: &'a [i64],
    /// Positions within each document.
    pub position_ids: &'a [i64],
    /// Which document of its row a position belongs to; -1 in padding, which may be anywhere.
    pub document_ids: &'a [i64],
    /// The expert that a position's record names, -1 for the base; none where no record decides.
    pub expert_ids: Option<&'a [i64]>,
    /// Which positions read their document's prompt, all of them in one without; none = all of all.
    pub prompt: Option<&'a [bool]>,
}

impl Rows<'_> {
    /// The runs of positions of one document, or of padding, in the flattened `[b t]`: where each ends.
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

    /// Whether a row is anything but one document, perhaps with padding behind it, which causality alone
    /// keeps out.
    fn is_packed(&self) -> bool {
        let single = |row: &[i64]| {
            row.iter().all(|&id| id <= 0) && row.windows(2).all(|pair| pair[0] >= pair[1])
        };
        !self.document_ids.chunks(self.seq_len).all(single)
    }
}

/// The sizes of a batch that the documents in it decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Labelled positions `n`.
    pub num_labelled: usize,
    /// Whether some of them may be fillers, which count in nothing.
    pub is_rounded: bool,
    /// Of the documents, if attention must stop between them.
    pub packed: Option<PackedExtent>,
}

/// Of packed documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PackedExtent {
    /// Documents, runs of padding among them.
    pub num_documents: usize,
    /// Positions of the longest.
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
    /// A batch's own.
    pub fn of(rows: &Rows<'_>) -> Self {
        Self {
            num_labelled: rows.num_labelled(),
            is_rounded: false,
            packed: rows.is_packed().then(|| PackedExtent::of(rows)),
        }
    }

    /// What holds each of several batches, rounded up: the labelled positions to eighths of the positions of
    /// the largest, but at least 64, the documents and the longest of them to powers of two.
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
            num_labelled: num_labelled.unwrap_or(0).max(1).next_multiple_of(part),
            is_rounded: true,
            packed: packed.reduce(larger).filter(|_| is_packed),
        }
    }
}

/// What lies where in a batch's flat tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InputLayout {
    num_rows: usize,
    seq_len: usize,
    extent: Extent,
    names_experts: bool,
    marks_prompts: bool,
}

/// A batch on the host: all of its numbers in one int64 tensor.
#[derive(Debug)]
pub struct HostInputs {
    /// `[..]`, in pinned memory if it will go to a GPU.
    pub flat: Tensor,
    /// What lies where in it.
    pub layout: InputLayout,
}

impl HostInputs {
    /// Lays out `rows`, for `device`.
    ///
    /// - `extent`: their own, or a larger one
    /// - `groups`: which group of tokens each row is of, `[b]`
    pub fn new(rows: Rows<'_>, extent: Extent, groups: &[u32], device: Device) -> Self {
        let layout = InputLayout {
            num_rows: rows.num_rows,
            seq_len: rows.seq_len,
            extent,
            names_experts: rows.expert_ids.is_some(),
            marks_prompts: rows.prompt.is_some(),
        };
        let mut flat = [rows.input_ids, rows.position_ids, rows.document_ids].concat();
        flat.extend(rows.expert_ids.unwrap_or_default());
        flat.extend(rows.prompt.unwrap_or_default().iter().map(|&reads| i64::from(reads)));
        let labelled: Vec<usize> =
            (0..rows.labels.len()).filter(|&i| rows.labels[i] >= 0).collect();
        let fillers = extent.num_labelled - labelled.len();
        let mut extend = |of: &dyn Fn(usize) -> i64, filler: &dyn Fn(usize) -> i64| {
            flat.extend(labelled.iter().map(|&i| of(i)));
            flat.extend((0..fillers).map(filler));
        };
        // different positions, since gradients of one position are added one after the other
        extend(&|i| i as i64, &|filler| (filler % rows.labels.len()) as i64);
        extend(&|i| rows.labels[i], &|_| IGNORED);
        extend(&|i| i64::from(groups[i / rows.seq_len]), &|_| 0);
        if let Some(packed) = extent.packed {
            let ends = rows.document_ends();
            let total = (rows.num_rows * rows.seq_len) as i64;
            let empty = packed.num_documents - ends.len();
            flat.push(0);
            flat.extend(ends);
            flat.extend(std::iter::repeat_n(total, empty));
        }
        let flat = Tensor::from_slice(&flat);
        let flat = if device.is_cuda() { flat.pin_memory(device) } else { flat };
        Self { flat, layout }
    }

    /// The numbers on `device`; the host does not wait for them to arrive.
    pub fn to_device(&self, device: Device) -> Tensor {
        self.flat.to_device_(device, Kind::Int64, true, false)
    }
}

impl InputLayout {
    /// The batch whose numbers are `flat`, as views of it.
    pub fn inputs(&self, flat: &Tensor) -> Inputs {
        let shape = [self.num_rows as i64, self.seq_len as i64];
        let mut at = 0;
        let mut next = |len: i64| {
            at += len;
            flat.narrow(0, at - len, len)
        };
        let positions = shape[0] * shape[1];
        let input_ids = next(positions).view(shape);
        let position_ids = next(positions).view(shape);
        let document_ids = next(positions).view(shape);
        let expert_ids = self.names_experts.then(|| next(positions).view(shape));
        let prompt = self.marks_prompts.then(|| next(positions).view(shape).ne(0));
        let n = self.extent.num_labelled as i64;
        let (labelled, labels, groups) = (next(n), next(n), next(n));
        let mask = match self.extent.packed {
            None => AttentionMask::Causal,
            Some(packed) => AttentionMask::Documents(Documents {
                ids: document_ids.shallow_clone(),
                mask: OnceCell::new(),
                cu_seqlens: next(packed.num_documents as i64 + 1).to_kind(Kind::Int),
                max_len: packed.longest as i64,
            }),
        };
        let counted = self.extent.is_rounded.then(|| labels.ge(0));
        Inputs {
            input_ids,
            position_ids,
            mask,
            labelled,
            labels,
            counted,
            groups,
            expert_ids,
            document_ids,
            prompt,
        }
    }
}

/// Where the documents of a batch begin and end.
#[derive(Debug)]
pub struct Documents {
    /// `[b, t]`.
    ids: Tensor,
    mask: OnceCell<Tensor>,
    /// Where each begins in the flattened `[b t]`, and where the last ends, int32, `[documents + 1]`. Each run
    /// of padding is a document of its own; those of no length at the end fill up.
    pub cu_seqlens: Tensor,
    /// At least the length of the longest.
    pub max_len: i64,
}

impl Documents {
    /// True where a position may attend to another: to those of its own document up to itself,
    /// `[b, 1, t, t]`. Made when it is first asked for.
    pub fn mask(&self) -> &Tensor {
        self.mask.get_or_init(|| same_document(&self.ids).unsqueeze(1))
    }

    /// Another handle to the same, with a mask that is made.
    pub fn shallow_clone(&self) -> Self {
        Self {
            ids: self.ids.shallow_clone(),
            mask: self.mask().shallow_clone().into(),
            cu_seqlens: self.cu_seqlens.shallow_clone(),
            max_len: self.max_len,
        }
    }
}

/// True where two positions `[t, t]` of a row are of one document and the second is not after the first.
fn same_document(ids_bt: &Tensor) -> Tensor {
    ids_bt.unsqueeze(1).eq_tensor(&ids_bt.unsqueeze(2)).tril(0)
}

/// A batch on the device.
#[derive(Debug)]
pub struct Inputs {
    /// `[b, t]`.
    pub input_ids: Tensor,
    /// `[b, t]`.
    pub position_ids: Tensor,
    /// Where attention stops.
    pub mask: AttentionMask,
    /// Indices of the labelled positions in the flattened `[b t]`, `[n]`; any in fillers.
    pub labelled: Tensor,
    /// Their targets, `[n]`; -100 in fillers.
    pub labels: Tensor,
    /// Which of them are no fillers, `[n]`; none = all.
    pub counted: Option<Tensor>,
    /// The group of tokens that each is of, as its domain, `[n]`.
    pub groups: Tensor,
    /// The expert that a position's record names, -1 for the base, `[b, t]`.
    pub expert_ids: Option<Tensor>,
    /// Which document of its row a position belongs to; -1 in padding, `[b, t]`.
    pub(super) document_ids: Tensor,
    /// Which positions read a prompt, `[b, t]`.
    prompt: Option<Tensor>,
}

impl Inputs {
    /// Moves host rows to `device`, all of one group of tokens.
    pub fn new(rows: Rows<'_>, device: Device) -> Self {
        let groups = vec![0; rows.num_rows];
        Self::of(&HostInputs::new(rows, Extent::of(&rows), &groups, device), device)
    }

    /// Moves a batch to `device`.
    pub fn of(host: &HostInputs, device: Device) -> Self {
        host.layout.inputs(&host.to_device(device))
    }

    /// The labelled positions, in `num_groups` groups.
    pub fn label_rows(&self, num_groups: i64) -> Labelled<'_> {
        Labelled {
            rows: &self.labelled,
            groups: &self.groups,
            num_groups,
            counted: self.counted.as_ref(),
        }
    }

    /// What makes means over prompts, `[b, t, t]`: row t of a sequence has equal numbers at the positions
    /// up to t that read the prompt of t's document.
    pub(super) fn prompt_means(&self, kind: Kind) -> Tensor {
        let same = same_document(&self.document_ids);
        let averaged = match &self.prompt {
            None => same,
            Some(prompt) => same.logical_and(&prompt.unsqueeze(1)),
        };
        let averaged = averaged.to_kind(kind);
        let counts = averaged.sum_dim_intlist(-1, true, kind).clamp_min(1.0);
        averaged / counts
    }

    /// 1 from the last occurrence of `wanted`, which is not empty, in its document on, and in padding; 0
    /// elsewhere, `[b, t]`.
    pub(super) fn active_from_last(&self, wanted: &[i64], kind: Kind) -> Tensor {
        let options = (Kind::Int64, self.input_ids.device());
        let (b, t) = self.input_ids.size2().expect("token ids are [b, t]");
        let padding = self.document_ids.lt(0);
        let num_starts = t + 1 - wanted.len() as i64;
        if num_starts < 1 {
            return padding.to_kind(kind);
        }
        let ids = |offset: i64| self.document_ids.narrow(1, offset, num_starts);
        let mut starts = ids(0).eq_tensor(&ids(t - num_starts));
        for (offset, &token) in (0..).zip(wanted) {
            let found = self.input_ids.narrow(1, offset, num_starts).eq(token);
            starts = starts.logical_and(&found);
        }
        // from 1, so that 0 is none
        let places_t = Tensor::arange(t, options) + 1;
        let starts_bt = Tensor::cat(
            &[starts.to_kind(options.0), Tensor::zeros([b, t - num_starts], options)],
            1,
        );
        let same_btt = self.document_ids.unsqueeze(1).eq_tensor(&self.document_ids.unsqueeze(2));
        let last_bt = (same_btt * (starts_bt * &places_t).unsqueeze(1)).amax(-1, false);
        let is_active = last_bt.ge(1).logical_and(&places_t.ge_tensor(&last_bt));
        is_active.logical_or(&padding).to_kind(kind)
    }

    /// One unpacked document without labels, as `trace` shows it.
    pub fn document(tokens: &[i64], device: Device) -> Self {
        let positions: Vec<i64> = (0..tokens.len() as i64).collect();
        let rows = Rows {
            num_rows: 1,
            seq_len: tokens.len(),
            input_ids: tokens,
            labels: &vec![IGNORED; tokens.len()],
            position_ids: &positions,
            document_ids: &vec![0; tokens.len()],
            expert_ids: None,
            prompt: None,
        };
        Self::new(rows, device)
    }
}
