//! A batch as the model takes it: host rows, and their tensors on the device.
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::gpt2::AttentionMask;

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

/// A batch on the device.
#[derive(Debug)]
pub struct Inputs {
    /// `[b, t]`.
    pub input_ids: Tensor,
    /// `[b, t]`.
    pub position_ids: Tensor,
    /// Where attention stops.
    pub mask: AttentionMask,
    /// Indices of the labelled positions in the flattened `[b t]`, `[n]`.
    pub labelled: Tensor,
    /// Their targets, `[n]`.
    pub labels: Tensor,
    /// The expert that a position's record names, -1 for the base, `[b, t]`.
    pub expert_ids: Option<Tensor>,
    /// What is looked for in the tokens themselves.
    pub(super) host: HostTokens,
}

/// A batch's tokens on the host.
#[derive(Debug)]
pub(super) struct HostTokens {
    /// `[b t]`.
    pub input_ids: Vec<i64>,
    /// `[b t]`.
    document_ids: Vec<i64>,
    prompt: Option<Vec<bool>>,
    seq_len: usize,
}

impl HostTokens {
    /// The documents' places in the flattened `[b t]`, without padding.
    pub fn documents(&self) -> impl Iterator<Item = Range<usize>> {
        let rows = self.document_ids.chunks(self.seq_len).enumerate();
        rows.flat_map(|(row, ids)| {
            let mut start = row * self.seq_len;
            ids.chunk_by(|a, b| a == b).filter_map(move |chunk| {
                let range = start..start + chunk.len();
                start = range.end;
                (chunk[0] >= 0).then_some(range)
            })
        })
    }
}

impl Inputs {
    /// Moves host rows to `device`.
    pub fn new(rows: Rows<'_>, device: Device) -> Self {
        let shape = [rows.num_rows as i64, rows.seq_len as i64];
        let labelled: Vec<i64> =
            (0..rows.labels.len()).filter(|&i| rows.labels[i] >= 0).map(|i| i as i64).collect();
        let labels: Vec<i64> = rows.labels.iter().copied().filter(|&label| label >= 0).collect();
        let to_device = |values: &[i64]| Tensor::from_slice(values).view(shape).to_device(device);
        // one document, perhaps with padding behind it, which causality alone keeps out
        let single = |row: &[i64]| {
            row.iter().all(|&id| id <= 0) && row.windows(2).all(|pair| pair[0] >= pair[1])
        };
        let mask = if rows.document_ids.chunks(rows.seq_len).all(single) {
            AttentionMask::Causal
        } else {
            let ids_bt = to_device(rows.document_ids);
            let same = ids_bt.unsqueeze(1).eq_tensor(&ids_bt.unsqueeze(2));
            AttentionMask::Documents(same.tril(0).unsqueeze(1))
        };
        Self {
            input_ids: to_device(rows.input_ids),
            position_ids: to_device(rows.position_ids),
            mask,
            labelled: Tensor::from_slice(&labelled).to_device(device),
            labels: Tensor::from_slice(&labels).to_device(device),
            expert_ids: rows.expert_ids.map(to_device),
            host: HostTokens {
                input_ids: rows.input_ids.to_vec(),
                document_ids: rows.document_ids.to_vec(),
                prompt: rows.prompt.map(<[bool]>::to_vec),
                seq_len: rows.seq_len,
            },
        }
    }

    /// What makes means over prompts, `[b, t, t]`: row t of a sequence has equal numbers at the positions
    /// up to t that read the prompt of t's document.
    pub(super) fn prompt_means(&self, kind: Kind) -> Tensor {
        let device = self.input_ids.device();
        let shape = self.input_ids.size();
        let ids_bt = Tensor::from_slice(&self.host.document_ids).view(&shape[..]).to_device(device);
        let same = ids_bt.unsqueeze(1).eq_tensor(&ids_bt.unsqueeze(2)).tril(0);
        let averaged = match &self.host.prompt {
            None => same,
            Some(prompt) => {
                let prompt = Tensor::from_slice(prompt).view(&shape[..]).to_device(device);
                same.logical_and(&prompt.unsqueeze(1))
            }
        };
        let averaged = averaged.to_kind(kind);
        let counts = averaged.sum_dim_intlist(-1, true, kind).clamp_min(1.0);
        averaged / counts
    }

    /// One unpacked document without labels, as `trace` shows it.
    pub fn document(tokens: &[i64], device: Device) -> Self {
        let positions: Vec<i64> = (0..tokens.len() as i64).collect();
        let rows = Rows {
            num_rows: 1,
            seq_len: tokens.len(),
            input_ids: tokens,
            labels: &vec![-100; tokens.len()],
            position_ids: &positions,
            document_ids: &vec![0; tokens.len()],
            expert_ids: None,
            prompt: None,
        };
        Self::new(rows, device)
    }
}
