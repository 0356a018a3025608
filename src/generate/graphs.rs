//! Steps of generation as CUDA graphs, which launch the kernels of a step at once.
//!
//! A step that gives each text one new token is captured when its layout first occurs: it runs once
//! without a graph, so that handles and workspaces exist, and is then captured and replayed. To run
//! it twice is harmless, since it writes the same keys and values. Later steps copy their numbers
//! to where the captured step reads them, and replay it. If all texts get their most probable
//! tokens, the captured step itself writes the numbers of the next one, which can then begin before
//! the host has read the tokens.
//!
//! The number of rows is rounded up, so that few layouts occur. The rows behind the texts compute
//! something that nobody reads, in rows of the cache that no text uses.

use std::collections::HashMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::next::StepOutput;
use crate::ffi;
use crate::ffi::cuda::Graph;
use crate::model::batch::{GenerationCache, StepLayout, StepRow};
use crate::model::{NextStep, RoutedModel, RoutingSource, RowSources};

/// Largest number of graphs at a time. All are dropped when there would be more.
const MAX_GRAPHS: usize = 64;

/// What decides which graph a step replays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    layout: StepLayout,
    source: SourceKind,
}

/// What of a source the host decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum SourceKind {
    Base,
    Router,
    Rows { some_by_router: bool },
}

impl SourceKind {
    fn of(source: &RoutingSource) -> Option<Self> {
        match source {
            RoutingSource::Base => Some(Self::Base),
            RoutingSource::Router => Some(Self::Router),
            RoutingSource::Rows(rows) => {
                Some(Self::Rows { some_by_router: rows.by_router.is_some() })
            }
            _ => None,
        }
    }
}

/// A captured step.
#[derive(Debug)]
struct Captured {
    graph: Graph,
    /// The numbers that it reads.
    flat: Tensor,
    /// The source whose tensors it reads.
    source: RoutingSource,
    /// What a replay leaves in the graph's memory.
    output: StepOutput,
}

/// The graphs of an engine.
#[derive(Debug)]
pub(super) struct StepGraphs {
    is_on: bool,
    /// The room of the cache whose tensors the graphs read.
    room: (usize, usize),
    captured: HashMap<Key, Captured>,
    /// The step that ran last.
    last: Option<Key>,
}

impl StepGraphs {
    /// An empty set of graphs. Steps are captured only on a CUDA device, and only for a model whose
    /// steps are alike ([`RoutedModel::steps_alike`]).
    pub fn new(model: &RoutedModel) -> Self {
        let is_on = model.device().is_cuda() && model.steps_alike();
        Self { is_on, room: (0, 0), captured: HashMap::new(), last: None }
    }

    /// Runs a step of `rows`, each of which has one new token, by a graph; `None` if no graph can.
    ///
    /// - `longest`: largest number of positions of a row after the step
    /// - `source`: the routing of a number of rows
    pub fn step(
        &mut self,
        model: &RoutedModel,
        cache: &GenerationCache,
        rows: &[StepRow<'_>],
        longest: usize,
        source: &dyn Fn(usize) -> RoutingSource,
    ) -> Option<StepOutput> {
        if !self.is_on {
            return None;
        }
        let room = cache.room();
        if self.room != room {
            // the graphs read tensors that are no longer the cache's
            self.captured.clear();
            self.last = None;
            self.room = room;
        }
        let num_active = rows.first().map_or(0, |row| row.active_from.len());
        let num_rows = rounded_up(rows.len()).min(room.0);
        let length = model.step_length(longest, room.1);
        let new_source = source(num_rows);
        let kind = SourceKind::of(&new_source)?;
        let key = Key { layout: StepLayout::repeated(num_rows, num_active, length), source: kind };
        let nowhere = vec![0; num_active];
        let filler = StepRow { past: 0, tokens: &[0], prompt_len: 0, active_from: &nowhere };
        let mut padded = rows.to_vec();
        padded.resize(num_rows, filler);
        let flat = cache.numbers(&padded, model.device());
        if !self.captured.contains_key(&key) {
            if self.captured.len() >= MAX_GRAPHS {
                self.captured.clear();
            }
            match self.capture(model, cache, key.layout, &flat, source(num_rows)) {
                Ok(captured) => {
                    self.captured.insert(key, captured);
                }
                Err(error) => {
                    tracing::warn!("generation runs without CUDA graphs: {error:#}");
                    self.is_on = false;
                    self.captured.clear();
                    return None;
                }
            }
        }
        self.captured.get_mut(&key)?.fill(&flat, &new_source);
        self.last = Some(key);
        self.replay(rows.len())
    }

    /// Runs the step that follows the last one, in which each of the first `num_rows` rows gets its
    /// most probable token. The last one must have computed these.
    /// Nothing happens if the last graph is too short for it.
    ///
    /// - `longest`: largest number of positions of a row after the step
    pub fn again(
        &mut self,
        cache: &GenerationCache,
        num_rows: usize,
        longest: usize,
    ) -> Option<StepOutput> {
        let fits = self.room == cache.room() && longest <= self.last?.layout.length();
        if fits { self.replay(num_rows) } else { None }
    }

    fn replay(&self, num_rows: usize) -> Option<StepOutput> {
        let captured = self.captured.get(&self.last?)?;
        captured.graph.replay().unwrap_or_else(|error| panic!("{error:#}"));
        Some(captured.output.first(num_rows))
    }

    fn capture(
        &self,
        model: &RoutedModel,
        cache: &GenerationCache,
        layout: StepLayout,
        flat: &Tensor,
        source: RoutingSource,
    ) -> Result<Captured> {
        let Device::Cuda(device) = model.device() else { unreachable!("graphs are CUDA's") };
        let graph = Graph::new(device)?;
        let flat = flat.copy();
        // outside the graph's memory, since it is read while the next step runs
        let b = layout.num_rows() as i64;
        let choices = Tensor::zeros([2, 2, b], (Kind::Double, model.device()));
        // a panic becomes an error, so that the capture is ended in any case
        let run = || {
            ffi::caught(|| {
                let inputs = cache.inputs_of(layout, &flat);
                let next = NextStep { inputs: &inputs, choices: &choices };
                Ok(StepOutput::repeatable(model, next, &source))
            })
        };
        graph.warm_up(run)?;
        let memory_of = self.captured.values().next().map(|captured| &captured.graph);
        let output = graph.capture(memory_of, run)?;
        Ok(Captured { graph, flat, source, output })
    }
}

impl Captured {
    /// Copies a step's numbers and sources to where the captured step reads them.
    fn fill(&mut self, flat: &Tensor, source: &RoutingSource) {
        self.flat.copy_(flat);
        if let (RoutingSource::Rows(to), RoutingSource::Rows(from)) = (&mut self.source, source) {
            let RowSources { fixed, by_router } = to;
            fixed.copy_(&from.fixed);
            if let (Some(to), Some(from)) = (by_router, &from.by_router) {
                to.copy_(from);
            }
        }
    }
}

/// A number of rows that is at least `n`: 1, 2, 4, 8 or another multiple of 8.
fn rounded_up(n: usize) -> usize {
    match n {
        0..=8 => n.next_power_of_two(),
        _ => n.next_multiple_of(8),
    }
}
