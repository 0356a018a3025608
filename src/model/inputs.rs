//! A batch as the model takes it: host rows, and their tensors on the device.
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions.

use tch::{Device, Tensor};

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
    /// Which document of its row a position belongs to; -1 in padding.
    pub document_ids: &'a [i64],
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
}

impl Inputs {
    /// Moves host rows to `device`.
    pub fn new(rows: Rows<'_>, device: Device) -> Self {
        let shape = [rows.num_rows as i64, rows.seq_len as i64];
        let labelled: Vec<i64> =
            (0..rows.labels.len()).filter(|&i| rows.labels[i] >= 0).map(|i| i as i64).collect();
        let labels: Vec<i64> = rows.labels.iter().copied().filter(|&label| label >= 0).collect();
        let single =
            rows.document_ids.chunks(rows.seq_len).all(|row| row.iter().all(|&id| id <= 0));
        let mask = if single {
            // padding follows the document, so that causality alone keeps it out
            AttentionMask::Causal
        } else {
            let ids_bt = Tensor::from_slice(rows.document_ids).view(shape).to_device(device);
            let same = ids_bt.unsqueeze(1).eq_tensor(&ids_bt.unsqueeze(2));
            AttentionMask::Documents(same.tril(0).unsqueeze(1))
        };
        Self {
            input_ids: Tensor::from_slice(rows.input_ids).view(shape).to_device(device),
            position_ids: Tensor::from_slice(rows.position_ids).view(shape).to_device(device),
            mask,
            labelled: Tensor::from_slice(&labelled).to_device(device),
            labels: Tensor::from_slice(&labels).to_device(device),
        }
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
        };
        Self::new(rows, device)
    }
}
