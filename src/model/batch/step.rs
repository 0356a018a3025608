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

    /// The inputs of a step that appends tokens to the rows from `first_row` on. Shorter rows are
    /// padded behind their tokens. Either all rows are empty before the step, or none is.
    pub fn inputs(&self, first_row: usize, rows: &[StepRow<'_>], device: Device) -> Inputs {
        let (b, t) = (rows.len(), rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0));
        let flat = ffi::staged(Tensor::from_slice(&self.numbers(rows, t)), device);
        let flat = flat.to_device_(device, Kind::Int64, true, false);
        let shape = [b as i64, t as i64];
        let mut at = 0;
        let mut next = |len: i64| {
            at += len;
            flat.narrow(0, at - len, len)
        };
        let [ids, positions, places, documents, counts, prompt] =
            std::array::from_fn(|_| next(shape[0] * shape[1]).view(shape));
        let num_experts = rows.first().map_or(0, |row| row.active_from.len() as i64);
        let active_from =
            (num_experts > 0).then(|| next(shape[0] * num_experts).view([shape[0], num_experts]));
        let past = rows.first().map_or(0, |row| row.past);
        let extent = StepExtent {
            is_first: past == 0,
            is_even: rows.iter().all(|row| row.past == past && row.tokens.len() == t),
            length: rows.iter().map(|row| row.past + row.tokens.len()).max().unwrap_or(0),
        };
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

    /// The numbers of a step, in the order in which [`GenerationCache::inputs`] takes them.
    fn numbers(&self, rows: &[StepRow<'_>], t: usize) -> Vec<i64> {
        let mut numbers = vec![];
        let mut add = |of: &dyn Fn(&StepRow<'_>, usize) -> i64, padding: i64| {
            for row in rows {
                let own = (0..row.tokens.len()).map(|i| of(row, i));
                numbers.extend(own.chain(std::iter::repeat_n(padding, t - row.tokens.len())));
            }
        };
        let reads_prompt = |row: &StepRow<'_>, i: usize| row.past + i < row.prompt_len;
        add(&|row, i| row.tokens[i], 0);
        add(&|row, i| (row.past + i) as i64, 0);
        add(&|row, i| (row.past + i) as i64, self.capacity() as i64);
        add(&|_, _| 0, -1);
        add(&|row, i| (row.past + i + 1).min(row.prompt_len) as i64, 1);
        add(&|row, i| i64::from(reads_prompt(row, i)), 0);
        numbers.extend(rows.iter().flat_map(|row| row.active_from));
        numbers
    }
}
