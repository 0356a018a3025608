//! Whole steps as CUDA graphs, which launch thousands of kernels at once instead of one by one.
//!
//! ```text
//! steps 1, 2   run without a graph, but on its stream, so that handles and workspaces exist
//! step 3       captured, which runs nothing, and then replayed
//! steps 4, ..  copy their numbers to where the captured step reads them, and replay it
//! ```
//!
//! Later, the first step of another shape is captured and replayed at once. The updates are those
//! of a run without graphs, in the same order.
//!
//! A step's shape is everything that the host decides about it. Sizes are rounded up, so that few
//! shapes occur. All graphs share one pool of memory, so a copy of a step's results must be in the
//! queue before the next step.
//!
//! A replay draws new random numbers from the device's generator, as many as the step without a
//! graph. The generator's state is correct whenever no step is in the queue, so a checkpoint can
//! save it.
//!
//! In a world of several processes, a step has several parts, each with a graph of its own. What
//! the processes add up between two parts is not captured, since their steps have different shapes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use tch::{Device, Tensor};

use super::gradients::rewinds_generators;
use super::output::StepOutput;
use super::prepared::SeedingPhase;
use crate::config::{Config, Kernels, Method};
use crate::ffi;
use crate::ffi::cuda::{Graph, Mark};
use crate::model::RoutedModel;
use crate::model::batch::InputLayout;

/// Number of steps of a shape before the first capture.
const WARM_UP_STEPS: u32 = 2;
/// What is said if an earlier part of a step was captured and a later one cannot be.
const LATER_PART: &str = "the step cannot be captured as a CUDA graph\n\
                          hint: a smaller `train.micro_batch_size` needs less memory";
/// Largest number of shapes that are captured.
const MAX_GRAPHS: usize = 64;

/// Whether steps are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capture {
    /// Never.
    Off,
    /// Whenever a step can be captured.
    Graph,
    /// As with `Graph`, a step's numbers are copied into the same memory, but then the step is run
    /// anew. This works on any device and serves as a reference for tests.
    Rerun,
}

impl Capture {
    /// The choice for a device.
    pub fn of(device: Device) -> Self {
        if device.is_cuda() { Self::Graph } else { Self::Off }
    }
}

/// The shape of a step: everything that the host decides and that a captured graph fixes.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The layouts of the micro-batches.
    pub layouts: Vec<InputLayout>,
    /// How many experts a token keeps; `None` for all.
    pub top_k: Option<i64>,
    /// The seeding phase, if the step belongs to one.
    pub seeding: Option<SeedingPhase>,
}

/// Runs a part of a step whose numbers are in the tensors of the micro-batches and in the tensor of
/// scalars. The last part gives the step's results.
pub(super) type Run<'a> = dyn Fn(&[Tensor], &Tensor) -> Result<Option<StepOutput>> + 'a;

/// A part of a step.
pub(super) struct Part<'a> {
    /// What is captured.
    pub run: Box<Run<'a>>,
    /// What follows and is never captured.
    pub after: Box<dyn Fn() -> Result<()> + 'a>,
}

/// The parts of a step, in order.
#[derive(Default)]
pub(super) struct Parts<'a>(pub Vec<Part<'a>>);

impl<'a> Parts<'a> {
    /// Adds a part.
    pub fn push(
        &mut self,
        run: impl Fn(&[Tensor], &Tensor) -> Result<Option<StepOutput>> + 'a,
        after: impl Fn() -> Result<()> + 'a,
    ) {
        self.0.push(Part { run: Box::new(run), after: Box::new(after) });
    }

    /// Runs all parts without a graph.
    pub fn run(&self, flats: &[Tensor], scalars: &Tensor) -> Result<StepOutput> {
        self.each(|_, run| run(flats, scalars))
    }

    fn each(
        &self,
        mut part: impl FnMut(usize, &Run<'_>) -> Result<Option<StepOutput>>,
    ) -> Result<StepOutput> {
        let mut output = None;
        for (index, Part { run, after }) in self.0.iter().enumerate() {
            output = part(index, &**run)?;
            after()?;
        }
        Ok(output.expect("the last part gives the results"))
    }
}

/// The graphs of a run.
#[derive(Debug)]
pub(super) struct Graphs {
    /// What was chosen.
    chosen: Capture,
    /// The same, but off once a capture has failed.
    capture: Capture,
    device: Device,
    shapes: HashMap<Key, Shape>,
    /// The first graph owns the memory of all and the stream on which steps warm up.
    graphs: Vec<Graph>,
    num_recorded: usize,
    /// Time that the captures took.
    pub capture_time: Duration,
    /// Number of parts of steps that were launched as graphs, or in their place with
    /// [`Capture::Rerun`].
    pub num_replays: u64,
    /// Where the last step begins in a GPU's queue: in front of its first graph, or of its first
    /// kernel if it has no graph, where the caller has put it.
    pub begin: Option<Mark>,
    /// The last logged reason why steps are not captured.
    logged_reason: Option<&'static str>,
}

/// The steps of one shape.
#[derive(Debug)]
struct Shape {
    /// The tensors of the micro-batches that the captured step reads.
    flats: Vec<Tensor>,
    scalars: Tensor,
    num_steps: u32,
    /// The parts that are captured.
    recorded: Vec<Recorded>,
}

/// A captured part of a step.
#[derive(Debug)]
enum Recorded {
    /// The index of the graph, and the results that a replay leaves in its memory.
    Graph(usize, Option<StepOutput>),
    /// The part runs anew each time.
    Rerun,
}

impl Graphs {
    pub fn new(capture: Capture, device: Device) -> Self {
        Self {
            chosen: capture,
            capture,
            device,
            shapes: HashMap::new(),
            graphs: vec![],
            num_recorded: 0,
            capture_time: Duration::ZERO,
            num_replays: 0,
            begin: None,
            logged_reason: None,
        }
    }

    /// Whether steps can be captured under `model`'s present routing rule. If not, the reason is
    /// logged once.
    ///
    /// - `num_micro_batches`: those of a step
    pub(crate) fn can_capture(
        &mut self,
        model: &RoutedModel,
        config: &Config,
        num_micro_batches: usize,
    ) -> bool {
        if self.capture == Capture::Off {
            return false;
        }
        let reason = why_not(model, config, num_micro_batches);
        if let Some(reason) = reason {
            self.log_once(reason);
        }
        reason.is_none()
    }

    fn log_once(&mut self, reason: &'static str) {
        if self.logged_reason != Some(reason) {
            tracing::info!("steps run without a CUDA graph: {reason}");
            self.logged_reason = Some(reason);
        }
    }

    /// Runs a step of shape `key` whose numbers are `flats` and `scalars`.
    pub fn run(
        &mut self,
        key: Key,
        flats: Vec<Tensor>,
        scalars: Tensor,
        parts: &Parts<'_>,
    ) -> Result<StepOutput> {
        let is_full = self.shapes.len() >= MAX_GRAPHS && !self.shapes.contains_key(&key);
        if is_full {
            self.log_once("there are graphs of too many shapes already");
        }
        if self.capture == Capture::Off || is_full {
            return parts.run(&flats, &scalars);
        }
        let mut shape = match self.shapes.remove(&key) {
            Some(mut shape) => {
                shape.fill(&flats, &scalars);
                shape
            }
            None => Shape::new(&flats, &scalars),
        };
        shape.num_steps = shape.num_steps.saturating_add(1);
        // once there is a graph, a step that runs without one needs as much memory again
        let warms_up = shape.num_steps <= WARM_UP_STEPS && self.num_recorded == 0;
        let output = parts.each(|part, run| match warms_up {
            true => self.warm_up(&shape, run),
            false => self.run_part(&mut shape, part, run),
        });
        if self.capture == Capture::Off {
            self.shapes.clear();
        } else {
            self.shapes.insert(key, shape);
        }
        output
    }

    fn run_part(
        &mut self,
        shape: &mut Shape,
        part: usize,
        run: &Run<'_>,
    ) -> Result<Option<StepOutput>> {
        if self.capture == Capture::Off {
            // the first part could not be captured
            return run(&shape.flats, &shape.scalars);
        }
        if shape.recorded.len() == part {
            match self.record(shape, run) {
                Ok(recorded) => shape.recorded.push(recorded),
                // the earlier parts have run, and what they have left for this one is used up
                Err(error) if part > 0 => return Err(error.context(LATER_PART)),
                Err(error) => {
                    tracing::warn!(
                        "the step cannot be captured; steps run without a CUDA graph: {error:#}"
                    );
                    self.capture = Capture::Off;
                    // this also frees the graphs' memory
                    self.graphs.clear();
                    ffi::empty_cache(self.device)?;
                    return run(&shape.flats, &shape.scalars);
                }
            }
        }
        match &shape.recorded[part] {
            Recorded::Graph(graph, output) => {
                if part == 0 {
                    self.begin = self.mark()?;
                }
                self.graphs[*graph].replay()?;
                self.num_replays += 1;
                Ok(output.as_ref().map(StepOutput::shallow_clone))
            }
            Recorded::Rerun => {
                self.num_replays += 1;
                run(&shape.flats, &shape.scalars)
            }
        }
    }

    fn new_graph(&self) -> Result<Graph> {
        let Device::Cuda(device) = self.device else { unreachable!("graphs are CUDA's") };
        Graph::new(device)
    }

    /// Marks the present end of the queue, if the device has one.
    pub fn mark(&self) -> Result<Option<Mark>> {
        match self.device {
            Device::Cuda(device) => Ok(Some(Mark::new(device)?)),
            _ => Ok(None),
        }
    }

    /// Whether steps were to be captured when the run began.
    pub fn may_capture(&self) -> bool {
        self.chosen != Capture::Off
    }

    fn warm_up(&mut self, shape: &Shape, run: &Run<'_>) -> Result<Option<StepOutput>> {
        let run = || run(&shape.flats, &shape.scalars);
        if self.capture == Capture::Rerun {
            return run();
        }
        if self.graphs.is_empty() {
            match self.new_graph() {
                Ok(graph) => self.graphs.push(graph),
                Err(error) => {
                    tracing::warn!("steps run without a CUDA graph: {error:#}");
                    self.capture = Capture::Off;
                    return run();
                }
            }
        }
        self.graphs[0].warm_up(run)
    }

    fn record(&mut self, shape: &Shape, run: &Run<'_>) -> Result<Recorded> {
        if self.capture == Capture::Rerun {
            return Ok(Recorded::Rerun);
        }
        let started = Instant::now();
        // the graph has its own memory and cannot use what earlier steps left in the allocator
        ffi::empty_cache(self.device)?;
        let has_recorded = self.num_recorded > 0;
        let index = if has_recorded { self.graphs.len() } else { 0 };
        if has_recorded {
            self.graphs.push(self.new_graph()?);
        }
        let memory_of = has_recorded.then(|| &self.graphs[0]);
        // a panic becomes an error, so that the capture is ended in any case
        let run = || ffi::caught(|| run(&shape.flats, &shape.scalars));
        let output = self.graphs[index].capture(memory_of, run)?;
        self.num_recorded += 1;
        self.capture_time += started.elapsed();
        tracing::debug!("captured step shape {}", self.num_recorded);
        Ok(Recorded::Graph(index, output))
    }
}

impl Shape {
    fn new(flats: &[Tensor], scalars: &Tensor) -> Self {
        let flats = flats.iter().map(Tensor::copy).collect();
        Self { flats, scalars: scalars.copy(), num_steps: 0, recorded: vec![] }
    }

    /// Copies a step's numbers to where the captured step reads them.
    fn fill(&mut self, flats: &[Tensor], scalars: &Tensor) {
        for (to, from) in self.flats.iter_mut().zip(flats) {
            to.copy_(from);
        }
        self.scalars.copy_(scalars);
    }
}

/// Why steps cannot be captured; `None` if they can.
fn why_not(model: &RoutedModel, config: &Config, num_micro_batches: usize) -> Option<&'static str> {
    if config.train.kernels == Kernels::Reference {
        return Some("`train.kernels` is `reference`");
    }
    if config.method == Method::Full {
        return Some("the base itself is trained");
    }
    if rewinds_generators(config, num_micro_batches) {
        return Some("random numbers must come twice, for which the generator is set back");
    }
    if model.skips_experts() {
        return Some("experts that a token does not choose are skipped, which is faster here");
    }
    None
}
