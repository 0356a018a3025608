//! Keys and values of earlier positions, so that generation computes each position once.
//!
//! The cache has a row for each text. A step appends new positions to a range of its rows:
//!
//! ```text
//! row 0   k k k k k k + .       `+` a new position, `.` free
//! row 1   k k + . . . . .
//! ```
//!
//! Letters of shapes: `b` rows of a step, `t` new positions, `n` key-value head, `h` width of a
//! head, `l` positions that a step may attend to.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use super::spec::DecoderSpec;

/// The keys and values of all layers.
#[derive(Debug)]
pub(crate) struct KvCache {
    /// Keys and values of each layer, `[rows, n, capacity + 1, h]`. The last position of a row is
    /// scratch space, into which padding is written.
    layers: Vec<[Tensor; 2]>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for `num_rows` texts of at most `capacity` positions.
    pub fn new(
        spec: &DecoderSpec,
        num_rows: usize,
        capacity: usize,
        kind: Kind,
        device: Device,
    ) -> Self {
        let shape = [num_rows as i64, spec.num_kv_heads, capacity as i64 + 1, spec.head_dim];
        let zeros = || Tensor::zeros(shape, (kind, device));
        let layers = (0..spec.num_layers).map(|_| [zeros(), zeros()]).collect();
        Self { layers, capacity }
    }

    /// Makes room for `num_rows` texts of `capacity` positions. What the cache holds is kept; it
    /// never becomes smaller.
    pub fn reserve(&mut self, num_rows: usize, capacity: usize) {
        let capacity = capacity.max(self.capacity);
        for tensor in self.layers.iter_mut().flatten() {
            let (rows, n, _, h) = tensor.size4().expect("a cache is [rows, n, positions, h]");
            let shape = [rows.max(num_rows as i64), n, capacity as i64 + 1, h];
            if tensor.size() == shape {
                continue;
            }
            let larger = Tensor::zeros(shape, (tensor.kind(), tensor.device()));
            let kept = self.capacity as i64;
            let mut place = larger.narrow(0, 0, rows).narrow(2, 0, kept);
            place.copy_(&tensor.narrow(2, 0, kept));
            *tensor = larger;
        }
        self.capacity = capacity;
    }

    /// The memory that the cache takes, in bytes.
    pub fn bytes(&self) -> u64 {
        let bytes = |x: &Tensor| x.numel() as u64 * x.kind().elt_size_in_bytes() as u64;
        self.layers.iter().flatten().map(bytes).sum()
    }

    /// Number of positions that a row can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Copies the first `len` positions of row `from` to row `to`.
    pub fn copy_row(&mut self, from: usize, to: usize, len: usize) {
        for tensor in self.layers.iter().flatten() {
            let row = |row: usize| tensor.get(row as i64).narrow(1, 0, len as i64);
            row(to).copy_(&row(from));
        }
    }

    /// The part of the cache that a step of the rows from `first_row` on uses.
    ///
    /// - `positions`: the index of each new position in its text, `[b, t]`; any in padding
    /// - `places`: where its keys and values are written in its row: at its index in the text, or
    ///   at the capacity in padding, `[b, t]`
    /// - `extent`: the sizes of the step
    pub fn step(
        &self,
        first_row: usize,
        positions: &Tensor,
        places: &Tensor,
        extent: StepExtent,
    ) -> CachedStep {
        let (b, t) = positions.size2().expect("positions are [b, t]");
        let rows = |tensor: &Tensor| tensor.narrow(0, first_row as i64, b);
        CachedStep {
            layers: self.layers.iter().map(|layer| layer.each_ref().map(rows)).collect(),
            places: places.shallow_clone(),
            positions: positions.shallow_clone(),
            is_first: extent.is_first,
            attends_to_all: extent.is_first || (t == 1 && extent.is_even),
            length: extent.length as i64,
            mask: OnceCell::new(),
        }
    }
}

/// The sizes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct StepExtent {
    /// Whether the rows are empty before the step.
    pub is_first: bool,
    /// Whether all rows hold the same number of positions, and get as many new ones.
    pub is_even: bool,
    /// The largest number of positions that a row holds after the step.
    pub length: usize,
}

/// The part of a cache that one step uses.
#[derive(Debug)]
pub struct CachedStep {
    /// Keys and values of each layer, `[b, n, capacity + 1, h]`.
    layers: Vec<[Tensor; 2]>,
    /// Where new keys and values go in their rows, `[b, t]`.
    places: Tensor,
    /// The index of each new position in its text, `[b, t]`.
    positions: Tensor,
    is_first: bool,
    /// Whether each new position may attend to all positions of the cache.
    attends_to_all: bool,
    length: i64,
    /// What [`CachedStep::mask`] returns, once it was asked for.
    mask: OnceCell<Tensor>,
}

impl CachedStep {
    /// Whether there are no earlier positions, so that attention needs only the new ones.
    pub(crate) fn is_first(&self) -> bool {
        self.is_first
    }

    /// Appends new keys and values, `[b, n, t, h]` each, to a layer.
    pub fn write(&self, layer: usize, keys: &Tensor, values: &Tensor) {
        let index = self.places.unsqueeze(1).unsqueeze(-1).expand_as(keys);
        for (cached, new) in self.layers[layer].iter().zip([keys, values]) {
            let _ = cached.shallow_clone().scatter_(2, &index, new);
        }
    }

    /// The keys and values of a layer, `[b, n, l, h]` each.
    pub fn read(&self, layer: usize) -> [Tensor; 2] {
        self.layers[layer].each_ref().map(|x| x.narrow(2, 0, self.length))
    }

    /// True where a new position may attend to one of the cache, `[b, 1, t, l]`; `None` if each may
    /// attend to all of them. The mask is built at the first call.
    pub fn mask(&self) -> Option<&Tensor> {
        let mask = || {
            let keys = Tensor::arange(self.length, (Kind::Int64, self.positions.device()));
            keys.less_equal_tensor(&self.positions.unsqueeze(-1)).unsqueeze(1)
        };
        (!self.attends_to_all).then(|| self.mask.get_or_init(mask))
    }

    /// The index of each new position in its text, `[b, t]`.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// Where new keys and values go in their rows, `[b, t]`.
    pub fn places(&self) -> &Tensor {
        &self.places
    }

    /// The rows of a layer's keys and of its values, `[b, n, capacity + 1, h]` each.
    pub fn rows(&self, layer: usize) -> &[Tensor; 2] {
        &self.layers[layer]
    }

    /// The same in a layer with a window; `None` if the window reaches over all positions.
    pub(crate) fn window_mask(&self, window: i64) -> Option<Tensor> {
        if self.is_first || window >= self.length {
            return None;
        }
        let keys = Tensor::arange(self.length, (Kind::Int64, self.positions.device()));
        let positions = self.positions.unsqueeze(-1);
        let near = keys.greater_tensor(&(&positions - window));
        Some(near.logical_and(&keys.less_equal_tensor(&positions)).unsqueeze(1))
    }

    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let layers = self.layers.iter().map(|layer| layer.each_ref().map(Tensor::shallow_clone));
        Self {
            layers: layers.collect(),
            places: self.places.shallow_clone(),
            positions: self.positions.shallow_clone(),
            mask: self.mask.get().map_or_else(OnceCell::new, |mask| mask.shallow_clone().into()),
            ..*self
        }
    }
}
