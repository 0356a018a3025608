//! A step of generation: new tokens of texts whose earlier positions lie in a cache.
//!
//! Letters of shapes: `b` rows of the step, `t` new positions, `e` routed expert.

use tch::{Device, Kind, Tensor};

use super::inputs::{Inputs, StepState};
use super::prompt_means::{RunningMeans, RunningStep};
use crate::ffi;
use crate::model::decoder::context::AttentionMask;
use crate::model::decoder::kv_cache::{KvCache, StepExtent};

/// The new tokens of a text.
#[derive(Debug, Clone, Copy)]
pub struct StepRow<'a> {
    /// Number of positions that the cache holds of the text.
    pub past: usize,
    /// The tokens behind them; at least one.
    pub tokens: &'a [i64],
    /// Number of positions of the text's prompt.
    pub prompt_len: usize,
    /// The position from which each expert is active, as `active_from` in
    /// [`crate::model::routing::source`] finds it. Empty if every expert always is.
    pub active_from: &'a [i64],
}

/// The caches of texts that are being generated. Each has a row for each text.
#[derive(Debug)]
pub struct GenerationCache {
    /// The keys and values of the model.
    pub(in crate::model) model: KvCache,
    /// Those of the base alone, if a router reads the base's last hidden state.
    pub(in crate::model) base: Option<KvCache>,
    /// The sums over prompts, if routers read their means.
    pub(in crate::model) means: Option<RunningMeans>,
    pub(in crate::model) num_rows: usize,
}

impl GenerationCache {
    /// Makes room for `num_rows` texts of `capacity` positions. What the cache holds is kept.
    pub fn reserve(&mut self, num_rows: usize, capacity: usize) {
        self.num_rows = self.num_rows.max(num_rows);
        for cache in [Some(&mut self.model), self.base.as_mut()].into_iter().flatten() {
            cache.reserve(num_rows, capacity);
        }
        if let Some(means) = &self.means {
            means.reserve(num_rows);
        }
    }

    /// Copies the first `len` positions of row `from` to row `to`.
    pub fn copy_row(&mut self, from: usize, to: usize, len: usize) {
        for cache in [Some(&mut self.model), self.base.as_mut()].into_iter().flatten() {
            cache.copy_row(from, to, len);
        }
        if let Some(means) = &self.means {
            means.copy_row(from, to);
        }
    }

    /// The memory that keys and values take, in bytes.
    pub fn bytes(&self) -> u64 {
        [Some(&self.model), self.base.as_ref()].into_iter().flatten().map(KvCache::bytes).sum()
    }

    /// Number of positions that each text can have.
    pub fn capacity(&self) -> usize {
        self.model.capacity()
    }

    /// Number of rows and of positions of a row for which there is room.
    pub fn room(&self) -> (usize, usize) {
        (self.num_rows, self.capacity())
    }

    /// The inputs of a step that appends tokens to the rows from `first_row` on. Shorter rows are
    /// padded behind their tokens. Either all rows are empty before the step, or none is.
    pub fn inputs(&self, first_row: usize, rows: &[StepRow<'_>], device: Device) -> Inputs {
        self.inputs_of(StepLayout::new(first_row, rows), &self.numbers(rows, device))
    }

    /// The inputs of a step with this layout whose numbers are `flat`, as
    /// [`GenerationCache::numbers`] returns them. They are views of it.
    pub fn inputs_of(&self, layout: StepLayout, flat: &Tensor) -> Inputs {
        let StepLayout { first_row, num_rows, num_new, num_active, extent } = layout;
        let shape = [num_rows as i64, num_new as i64];
        let mut at = 0;
        let mut next = |len: i64| {
            at += len;
            flat.narrow(0, at - len, len)
        };
        let [ids, positions, places, documents, counts, prompt] =
            std::array::from_fn(|_| next(shape[0] * shape[1]).view(shape));
        let num_active = num_active as i64;
        let active_from =
            (num_active > 0).then(|| next(shape[0] * num_active).view([shape[0], num_active]));
        let step = |cache: &KvCache| {
            AttentionMask::Cached(cache.step(first_row, &positions, &places, extent))
        };
        let means = self.means.as_ref().map(|means| RunningStep {
            means: means.clone(),
            num_rows: self.num_rows,
            first_row,
            is_first: extent.is_first,
            prompt,
            counts,
        });
        let state = StepState { base: self.base.as_ref().map(step), active_from, means };
        Inputs::of_step(ids, positions.shallow_clone(), documents, step(&self.model), state)
    }

    /// The numbers of a step on the device, in the order in which [`GenerationCache::inputs_of`]
    /// takes them, int64.
    pub fn numbers(&self, rows: &[StepRow<'_>], device: Device) -> Tensor {
        let t = num_new(rows);
        let mut numbers = vec![];
        let mut add = |of: &dyn Fn(usize, usize) -> i64, padding: i64| {
            for (index, row) in rows.iter().enumerate() {
                let own = (0..row.tokens.len()).map(|i| of(index, i));
                let behind = std::iter::repeat_n(padding, t - row.tokens.len());
                numbers.extend(own.chain(behind));
            }
        };
        let position = |index: usize, i: usize| rows[index].past + i;
        let reads_prompt = |index: usize, i: usize| position(index, i) < rows[index].prompt_len;
        add(&|index, i| rows[index].tokens[i], 0);
        add(&|index, i| position(index, i) as i64, 0);
        add(&|index, i| position(index, i) as i64, self.capacity() as i64);
        add(&|_, _| 0, -1);
        add(&|index, i| (position(index, i) + 1).min(rows[index].prompt_len) as i64, 1);
        add(&|index, i| i64::from(reads_prompt(index, i)), 0);
        numbers.extend(rows.iter().flat_map(|row| row.active_from));
        let flat = ffi::staged(Tensor::from_slice(&numbers), device);
        flat.to_device_(device, Kind::Int64, true, false)
    }
}

/// Everything that the host decides about a step, but for its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepLayout {
    first_row: usize,
    num_rows: usize,
    num_new: usize,
    /// Number of experts for which the rows say from where on they are active.
    num_active: usize,
    extent: StepExtent,
}

impl StepLayout {
    /// The layout of a step that appends tokens to the rows from `first_row` on.
    pub fn new(first_row: usize, rows: &[StepRow<'_>]) -> Self {
        let (past, t) = (rows.first().map_or(0, |row| row.past), num_new(rows));
        let extent = StepExtent {
            is_first: past == 0,
            is_even: rows.iter().all(|row| row.past == past && row.tokens.len() == t),
            length: rows.iter().map(|row| row.past + row.tokens.len()).max().unwrap_or(0),
        };
        let num_active = rows.first().map_or(0, |row| row.active_from.len());
        Self { first_row, num_rows: rows.len(), num_new: t, num_active, extent }
    }

    /// The number of rows.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// The largest number of positions that a row may hold after the step.
    pub fn length(&self) -> usize {
        self.extent.length
    }

    /// A layout for later steps of `num_rows` rows, with one new token each, as long as no row
    /// holds more than `length` positions after the step. Rows may be empty before it.
    pub fn repeated(num_rows: usize, num_active: usize, length: usize) -> Self {
        let extent = StepExtent { is_first: false, is_even: false, length };
        Self { first_row: 0, num_rows, num_new: 1, num_active, extent }
    }
}

/// Number of new positions of the longest row.
fn num_new(rows: &[StepRow<'_>]) -> usize {
    rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0)
}
