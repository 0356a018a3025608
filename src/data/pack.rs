//! Packs documents into blocks of `seq_len` positions.
//!
//! A document of n tokens has n - 1 positions: position `p` reads token `p`, and its target is
//! token `p + 1`. A document with at most `seq_len` positions becomes one piece. A longer one is
//! cut into consecutive pieces of `seq_len` positions and a last one that may be shorter, so that
//! each target is in exactly one piece. Pieces without a learned target are dropped: they would
//! cost time and train nothing. What is learned is what follows the prompt or, in a conversation,
//! the spans of the assistant's turns.
//!
//! The pieces are packed best fit, longest first (Ding et al., "Fewer Truncations Improve Language
//! Modeling", arXiv:2404.10830): each goes into the block in which it leaves the fewest free
//! positions, or into a new block if it fits into none. Pieces of equal length keep the order of
//! their documents. Among blocks with equally many free positions, the one that was filled last is
//! taken. The result therefore depends only on the pieces and their order.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::token_file::{Document, TokenFile};
use crate::config::LossOn;

/// What a domain's files contain. Each record is counted in `documents` or in one of `skipped_*`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainCounts {
    /// Records read; a plain text file counts as one.
    pub records: u64,
    /// Documents that have a learned target.
    pub documents: u64,
    /// Tokens of these documents, end tokens included.
    pub tokens: u64,
    /// Learned targets.
    pub label_tokens: u64,
    /// Positions in the blocks that are not padding.
    pub positions: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// Documents that are split because they have more than `seq_len` positions.
    pub split_documents: u64,
    /// Records left out because they have fewer than two tokens or no learned target.
    pub skipped_empty: u64,
    /// Records left out because they are malformed.
    pub skipped_bad: u64,
    /// Records left out because their `domain` field is not the domain's `record_domain`.
    pub skipped_other_domain: u64,
    /// Records left out of training because their text is in a validation set.
    pub skipped_held_out: u64,
}

impl DomainCounts {
    /// The share of the blocks' positions that is padding; 0 if there are no blocks.
    pub fn padding_share(&self, seq_len: usize) -> f64 {
        let total = self.blocks * seq_len as u64;
        if total == 0 { 0.0 } else { 1.0 - self.positions as f64 / total as f64 }
    }
}

/// A part of a document, at most `seq_len` positions long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Index of the document's file in the dataset.
    pub file: u32,
    /// Index of the document in its file.
    pub document: u32,
    /// Number of positions, one less than the number of tokens that the piece reads.
    pub len: u32,
    /// Number of learned targets.
    pub num_labels: u32,
    /// Number of positions that read a token of the prompt; they are the first ones.
    pub prompt_len: u32,
    /// The document's [`Document::expert`].
    pub expert: i32,
    /// Index of the piece's first token in its file.
    pub start: u64,
}

impl Piece {
    /// The positions of the piece whose targets are learned.
    ///
    /// - `file`: the document's file
    pub fn learned(self, file: &TokenFile, loss_on: LossOn) -> impl Iterator<Item = Range<u32>> {
        let document = &file.documents[self.document as usize];
        let at = (self.start - document.start) as u32;
        learned(file, document, loss_on).filter_map(move |range| within(range, at, self.len))
    }

    /// The number of positions that sequence-level routing averages over: those that read the
    /// prompt, which come first, or all positions if none reads it.
    pub fn num_prompt(&self) -> u32 {
        if self.prompt_len > 0 { self.prompt_len } else { self.len }
    }
}

/// The part of `range` that lies in the `len` positions from `at` on, counted from there.
fn within(range: Range<u32>, at: u32, len: u32) -> Option<Range<u32>> {
    let part = range.start.max(at)..range.end.min(at + len);
    (!part.is_empty()).then(|| part.start - at..part.end - at)
}

/// The positions of `document` whose targets are learned, in ascending order.
pub(super) fn learned(
    file: &TokenFile,
    document: &Document,
    loss_on: LossOn,
) -> impl Iterator<Item = Range<u32>> {
    let len = document.num_tokens.saturating_sub(1);
    let (from, spans) = match (loss_on, file.learned(document)) {
        (LossOn::All, _) => (0, [].as_slice()),
        (LossOn::Completion, []) => (document.prompt_len.saturating_sub(1), [].as_slice()),
        // only the spans are learned
        (LossOn::Completion, spans) => (len, spans),
    };
    // the target of a position is the token behind it
    let of_spans = spans.iter().map(|span| span.start.saturating_sub(1)..span.end - 1);
    std::iter::once(from..len).chain(of_spans).filter(|range| !range.is_empty())
}

/// Adds the pieces of the document with index `index` in `file` to `pieces` and its numbers to
/// `counts`.
///
/// - `file_index`: the index of `file` in the dataset
pub(super) fn split(
    (file, file_index): (&TokenFile, u32),
    index: u32,
    loss_on: LossOn,
    seq_len: u32,
    pieces: &mut Vec<Piece>,
    counts: &mut DomainCounts,
) {
    let document = &file.documents[index as usize];
    let num_labels = |at: u32, len: u32| -> u32 {
        let ranges = learned(file, document, loss_on);
        ranges.filter_map(|range| within(range, at, len)).map(|range| range.len() as u32).sum()
    };
    let num_positions = document.num_tokens.saturating_sub(1);
    let label_tokens = num_labels(0, num_positions);
    if label_tokens == 0 {
        counts.skipped_empty += 1;
        return;
    }
    counts.documents += 1;
    counts.tokens += u64::from(document.num_tokens);
    counts.label_tokens += u64::from(label_tokens);
    counts.split_documents += u64::from(num_positions > seq_len);
    let mut at = 0;
    while at < num_positions {
        let len = seq_len.min(num_positions - at);
        let num_labels = num_labels(at, len);
        if num_labels > 0 {
            pieces.push(Piece {
                file: file_index,
                document: index,
                len,
                num_labels,
                prompt_len: document.prompt_len.saturating_sub(at).min(len),
                expert: document.expert,
                start: document.start + u64::from(at),
            });
            counts.positions += u64::from(len);
        }
        at += len;
    }
}

/// The blocks, each a list of pieces. The pieces of all blocks are stored one block after another.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    pieces: Vec<Piece>,
    /// The end of each block in `pieces`.
    ends: Vec<u32>,
}

impl Blocks {
    pub fn num_blocks(&self) -> usize {
        self.ends.len()
    }

    /// The pieces of block `index`.
    pub fn get(&self, index: usize) -> &[Piece] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        &self.pieces[start..self.ends[index] as usize]
    }
}

/// Packs `pieces`, each of which has 1 to `seq_len` positions.
pub(super) fn pack(mut pieces: Vec<Piece>, seq_len: u32) -> Blocks {
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.len));
    let mut rooms = Rooms::new(seq_len);
    let mut block_of = Vec::with_capacity(pieces.len());
    let mut num_pieces: Vec<u32> = Vec::new();
    for piece in &pieces {
        let (block, room) = rooms.take(piece.len).unwrap_or_else(|| {
            num_pieces.push(0);
            (num_pieces.len() as u32 - 1, seq_len)
        });
        num_pieces[block as usize] += 1;
        rooms.put(block, room - piece.len);
        block_of.push(block);
    }
    // a counting sort of the pieces by their block
    let mut ends = num_pieces;
    let mut total = 0;
    for end in &mut ends {
        total += std::mem::replace(end, total);
    }
    let mut sorted = pieces.clone();
    for (piece, block) in pieces.iter().zip(block_of) {
        let next = &mut ends[block as usize];
        sorted[*next as usize] = *piece;
        *next += 1;
    }
    Blocks { pieces: sorted, ends }
}

/// The blocks that are not full, by their room, which is their number of free positions.
struct Rooms {
    /// The blocks with each room: entry `n` lists those with exactly `n` free positions.
    blocks: Vec<Vec<u32>>,
    /// One bit for each entry of `blocks`, set if the entry is not empty.
    filled: Vec<u64>,
}

impl Rooms {
    fn new(seq_len: u32) -> Self {
        let count = seq_len as usize;
        Self { blocks: vec![Vec::new(); count], filled: vec![0; count.div_ceil(64)] }
    }

    /// Takes out the block with the least room that is at least `len`, and returns it with its
    /// room.
    fn take(&mut self, len: u32) -> Option<(u32, u32)> {
        let mut word = len as usize / 64;
        let mut bits = self.filled.get(word)? & (u64::MAX << (len % 64));
        while bits == 0 {
            word += 1;
            bits = *self.filled.get(word)?;
        }
        let room = word * 64 + bits.trailing_zeros() as usize;
        let block = self.blocks[room].pop().expect("its bit is set");
        if self.blocks[room].is_empty() {
            self.filled[word] &= !(1 << (room % 64));
        }
        Some((block, room as u32))
    }

    fn put(&mut self, block: u32, room: u32) {
        if room > 0 {
            self.blocks[room as usize].push(block);
            self.filled[room as usize / 64] |= 1 << (room % 64);
        }
    }
}
