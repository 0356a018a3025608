//! One step: forward passes, gradients, clipping, AdamW, and what is measured with them.
//!
//! [`Stepper::launch`] puts a step in the device's queue, and [`Stepper::wait`] waits for its
//! results, which take one transfer. In between, the host is free to prepare and launch the next
//! step. No step waits for the host. If a loss or gradient is not finite, the device skips the
//! update of that step and of all steps that have been launched after it, and `wait` returns an
//! error.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::balance::balance_biases;
use super::exchange::Exchange;
use super::gradients::{
    BegunGradients, Part, begin_gradients, gradients_of, takes_totals_ahead, totals_ahead,
};
pub use super::gradients::{StepGradients, gradients};
use super::graph::{Capture, Graphs, Key, Parts};
use super::optim::Optimizer;
use super::output::{Contents, ResultsInFlight, StepOutput};
use super::prepared::StepTensors;
pub use super::prepared::{Prepared, SeedingPhase};
use crate::config::Config;
use crate::data::Batch;
use crate::dist::World;
use crate::eval::routing::{self, SiteExperts, SiteSupervision, SiteTotals};
use crate::ffi::cuda::Mark;
use crate::model::routing::totals::RoutingTotals;
use crate::model::{RoutedModel, Trained};

/// The measurements of one step.
#[derive(Debug)]
pub struct StepResult {
    /// Mean loss over the step's label tokens, nats, without label smoothing.
    pub loss: f64,
    /// The same for each domain, in the dataset's order; `None` for a domain without label tokens
    /// in the step.
    pub domain_losses: Vec<Option<f64>>,
    /// Label tokens of the step.
    pub label_tokens: u64,
    /// L2 norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// The routing totals of each site.
    pub routing: Vec<SiteTotals>,
    /// As [`StepGradients::expert_losses`].
    pub expert_losses: Option<Vec<f64>>,
    /// The domain supervision at each site; empty without it.
    pub supervision: Vec<SiteSupervision>,
    /// As [`StepGradients::orthogonality`].
    pub orthogonality: Option<f64>,
    /// Whether a process of the world was asked to stop before the step.
    pub stops: bool,
}

/// Runs the steps of one model. It holds the optimizer and the graphs captured so far.
#[derive(Debug)]
pub struct Stepper {
    /// The optimizer of the trained parameters.
    pub optimizer: Optimizer,
    graphs: Graphs,
    world: Arc<World>,
    exchange: RefCell<Exchange>,
    /// Whether a step was not finite, 0-dim, bool, on the device. Updates are skipped while it is
    /// set.
    has_failed: Tensor,
    /// Whether the host knows that `has_failed` is set.
    knows_of_failure: bool,
}

/// A step in the device's queue.
#[derive(Debug)]
pub struct StepInFlight {
    results: ResultsInFlight,
    label_counts: Vec<u64>,
    supervised_tokens: u64,
    /// The number of the step's update, from 1.
    update_number: u64,
    is_replay: bool,
    /// Where the step begins and ends in the queue of a GPU.
    pub(super) marks: Option<Marks>,
    /// The time from which the device has had work. With a graph, it is taken once the whole step
    /// is in the queue; without one, before the first kernel is.
    pub busy_from: Instant,
}

/// Where a step begins and ends in the queue of a GPU.
#[derive(Debug)]
pub(super) struct Marks {
    pub begin: Mark,
    pub end: Mark,
}

impl StepInFlight {
    /// Whether the step was launched as CUDA graphs (or in their place, with
    /// [`Capture::Rerun`]), so that the device works while the host launches the next step.
    pub fn is_replay(&self) -> bool {
        self.is_replay
    }
}

impl Stepper {
    /// A stepper on `device`, in a world of one process.
    pub fn new(optimizer: Optimizer, capture: Capture, device: Device) -> Self {
        let world = Arc::new(World::single());
        Self {
            optimizer,
            graphs: Graphs::new(capture, device),
            exchange: RefCell::new(Exchange::new(Arc::clone(&world))),
            world,
            has_failed: Tensor::zeros([], (Kind::Bool, device)),
            knows_of_failure: false,
        }
    }

    /// Whether steps were to be captured when the run began; alike in all processes of a world.
    pub(super) fn may_capture(&self) -> bool {
        self.graphs.may_capture()
    }

    /// Chooses whether steps are captured, before the first one.
    pub(super) fn set_capture(&mut self, capture: Capture) {
        self.graphs = Graphs::new(capture, self.has_failed.device());
    }

    /// Makes all later steps those of a world, of which each process computes its part.
    pub fn enter(&mut self, world: &Arc<World>) {
        self.world = Arc::clone(world);
        self.exchange = RefCell::new(Exchange::new(Arc::clone(world)));
    }

    /// Time that captures of CUDA graphs have taken so far.
    pub fn capture_time(&self) -> Duration {
        self.graphs.capture_time
    }

    /// Lays out a step's data. This may be done while the previous step is in the queue.
    pub fn prepare(
        &mut self,
        model: &RoutedModel,
        config: &Config,
        batches: &[Batch],
        seeding: Option<SeedingPhase>,
        num_domains: usize,
    ) -> Prepared {
        let num_micro_batches = self.num_micro_batches(config, batches.len());
        let is_rounded = self.graphs.can_capture(model, config, num_micro_batches);
        Prepared::new(model, config, batches, seeding, num_domains, is_rounded)
    }

    /// The number of micro-batches in a step, as far as it matters: 1 or more.
    ///
    /// - `own`: those of this process
    fn num_micro_batches(&self, config: &Config, own: usize) -> usize {
        own.max(config.train.grad_accum_steps) * self.world.size()
    }

    /// Puts a step in the device's queue.
    ///
    /// - `update`: the numbers of [`Optimizer::scalars`]
    pub fn launch(
        &mut self,
        model: &RoutedModel,
        trained: &Trained,
        config: &Config,
        step: &Prepared,
        update: &[f64],
    ) -> Result<StepInFlight> {
        let mut busy_from = Instant::now();
        self.graphs.begin = self.graphs.mark()?;
        let num_replays = self.graphs.num_replays;
        let scalars = step.scalars(update);
        let num_micro_batches = self.num_micro_batches(config, step.num_micro_batches());
        if std::mem::take(&mut self.knows_of_failure) {
            let _ = self.has_failed.zero_();
        }
        let Self { optimizer, graphs, world, exchange, has_failed, .. } = self;
        let machine = StepMachine { model, trained, optimizer, has_failed, config, step };
        let parts = match world.is_single() {
            true => machine.whole(),
            false => machine.in_parts(world, exchange),
        };
        // if a hybrid rule has become sparse since the data was rounded, the step cannot be
        // captured
        let output = if step.is_rounded && graphs.can_capture(model, config, num_micro_batches) {
            let top_k = model.router_spec().top_k;
            let key = Key { layouts: step.layouts(), top_k, seeding: step.seeding };
            graphs.run(key, step.flats(), scalars, &parts)?
        } else {
            parts.run(&step.flats(), &scalars)?
        };
        drop(parts);
        let is_replay = self.graphs.num_replays > num_replays;
        if is_replay {
            busy_from = Instant::now();
        }
        let results = output.fetch()?;
        let marks = self.graphs.begin.take().zip(self.graphs.mark()?);
        self.optimizer.count_update();
        Ok(StepInFlight {
            results,
            label_counts: step.label_counts.clone(),
            supervised_tokens: step.supervised_tokens,
            update_number: self.optimizer.num_updates(),
            is_replay,
            marks: marks.map(|(begin, end)| Marks { begin, end }),
            busy_from,
        })
    }

    /// Waits for a step and takes its results. Steps are waited for in the order in which they were
    /// launched.
    ///
    /// # Errors
    /// Fails with [`NotFinite`] if a loss or gradient is NaN or infinite. The parameters, the
    /// optimizer and the selection biases are then as before the step. Steps that were launched
    /// between this one and this call have changed nothing either; waiting for them fails as well,
    /// and must be done before another step is launched, which then makes its update. Fails too if
    /// another process of the world has failed.
    pub fn wait(&mut self, pending: StepInFlight) -> Result<StepResult> {
        let StepInFlight { results, label_counts, supervised_tokens, update_number, .. } = pending;
        let ResultsInFlight { numbers, parts } = results;
        let mut numbers = numbers.wait()?.into_iter();
        self.world.check()?;
        let mut take = |n: usize| -> Vec<f64> { numbers.by_ref().take(n).collect() };
        let (is_skipped, grad_norm, stops) = (take(1)[0] > 0.0, take(1)[0], take(1)[0]);
        let domain_sums = take(label_counts.len());
        let label_tokens: u64 = label_counts.iter().sum();
        let loss = domain_sums.iter().sum::<f64>() / label_tokens as f64;
        if is_skipped {
            self.optimizer.take_back_update(update_number);
            self.knows_of_failure = true;
            check_finite(loss, grad_norm)?;
            bail!("the step was launched behind one that was not finite");
        }
        let of_domain = |(sum, &count)| (count > 0).then(|| sum / count as f64);
        let orthogonality = parts.has_orthogonality.then(|| take(1)[0]);
        let expert_losses = (parts.expert_losses > 0).then(|| take(parts.expert_losses));
        let supervision = take(2 * parts.supervised_sites);
        Ok(StepResult {
            loss,
            domain_losses: domain_sums.into_iter().zip(&label_counts).map(of_domain).collect(),
            label_tokens,
            grad_norm,
            routing: routing::of_numbers(parts.sites, label_counts.len(), &mut numbers),
            expert_losses,
            supervision: SiteSupervision::of_sums(&supervision, supervised_tokens),
            orthogonality,
            stops: stops > 0.0,
        })
    }
}

/// What a step is computed with.
#[derive(Clone, Copy)]
struct StepMachine<'a> {
    model: &'a RoutedModel,
    trained: &'a Trained,
    optimizer: &'a Optimizer,
    /// Whether an earlier step was not finite, 0-dim, bool.
    has_failed: &'a Tensor,
    config: &'a Config,
    step: &'a Prepared,
}

impl<'a> StepMachine<'a> {
    /// The whole step in one part.
    fn whole(self) -> Parts<'a> {
        let run = move |flats: &[Tensor], scalars: &Tensor| {
            let step = self.step.tensors(flats, scalars);
            let gradients = gradients_of(self.model, self.trained, self.config, &step)?;
            self.update(&step, gradients).map(Some)
        };
        let mut parts = Parts::default();
        parts.push(run, || Ok(()));
        parts
    }

    /// This process's part of the step: first the routers' totals, if losses depend on those of the
    /// whole step, then the gradients, then the update. In between, the world adds up.
    ///
    /// If there are many gradients, those of the upper layers come first, and are added up while
    /// those of the lower layers are computed.
    fn in_parts(self, world: &'a World, exchange: &'a RefCell<Exchange>) -> Parts<'a> {
        let Self { model, trained, config, step, .. } = self;
        let num_micro_batches = step.num_micro_batches().max(1) * world.size();
        let overlaps = trained.num_bytes() >= world.overlap_bytes();
        let (is_first, cut) = (world.is_first(), trained.cut_layer().filter(|_| overlaps));
        let totals = Rc::new(RefCell::new(None));
        let begun = Rc::new(RefCell::new(None));
        let whole = Rc::new(RefCell::new(None));
        let mut parts = Parts::default();
        if takes_totals_ahead(config, step.seeding, num_micro_batches) {
            let totals = Rc::clone(&totals);
            let run = move |flats: &[Tensor], scalars: &Tensor| {
                let own = totals_ahead(model, config, &step.tensors(flats, scalars))?;
                *totals.borrow_mut() = Some(exchange.borrow_mut().put_totals(&own));
                Ok(None)
            };
            parts.push(run, || exchange.borrow().add_totals());
        }
        let begin = move |flats: &[Tensor], scalars: &Tensor| {
            let part = Part { ahead: totals.borrow_mut().take(), is_first, cut };
            begin_gradients(model, trained, config, &step.tensors(flats, scalars), part)
        };
        let put = {
            let whole = Rc::clone(&whole);
            move |begun: BegunGradients| {
                let part = begun.finish(trained)?;
                *whole.borrow_mut() = Some(exchange.borrow_mut().put(trained, cut, part));
                Ok(None)
            }
        };
        let add = || exchange.borrow_mut().add();
        if cut.is_none() {
            parts.push(move |flats, scalars| put(begin(flats, scalars)?), add);
        } else {
            let upper = Rc::clone(&begun);
            let run = move |flats: &[Tensor], scalars: &Tensor| {
                let part = begin(flats, scalars)?;
                exchange.borrow_mut().put_upper(&part.upper(trained));
                *upper.borrow_mut() = Some(part);
                Ok(None)
            };
            parts.push(run, || exchange.borrow_mut().begin_upper());
            let lower = move |_: &[Tensor], _: &Tensor| {
                put(begun.borrow_mut().take().expect("the part before leaves it"))
            };
            parts.push(lower, add);
        }
        let run = move |flats: &[Tensor], scalars: &Tensor| {
            let whole = whole.borrow_mut().take().expect("the part before leaves them");
            self.update(&step.tensors(flats, scalars), whole).map(Some)
        };
        parts.push(run, || Ok(()));
        parts
    }

    /// Clips the gradients of a step and makes the update. The host reads none of its numbers and
    /// waits for nothing.
    fn update(self, step: &StepTensors, gradients: StepGradients) -> Result<StepOutput> {
        let Self { model, optimizer, has_failed, config, .. } = self;
        let StepGradients {
            grads,
            domain_sums,
            routing,
            expert_losses,
            supervision,
            orthogonality,
            stops,
            ..
        } = gradients;
        let grad_norm = optimizer.clip(&grads)?;
        let is_finite = domain_sums.sum(Kind::Double).isfinite().logical_and(&grad_norm.isfinite());
        let _ = has_failed.shallow_clone().logical_or_(&is_finite.logical_not());
        optimizer.update(&grads, &step.update, has_failed)?;
        if config.router.balance_bias_rate > 0.0 && step.seeding.is_none() {
            let old_rate = config.growth.as_ref().map(|growth| growth.old_columns_rate);
            let rate = config.router.balance_bias_rate;
            balance_biases(model, &routing, rate, old_rate, has_failed);
        }
        let parts = Contents {
            has_orthogonality: orthogonality.is_some(),
            expert_losses: expert_losses.as_ref().map_or(0, |losses| losses.size()[0] as usize),
            supervised_sites: supervision.as_ref().map_or(0, |sums| sums.size()[0] as usize),
            sites: if routing.is_empty() { vec![] } else { SiteExperts::of(model) },
        };
        let mut numbers = vec![has_failed.shallow_clone(), grad_norm, stops, domain_sums];
        numbers.extend(orthogonality);
        numbers.extend(expert_losses);
        numbers.extend(supervision);
        numbers.extend(routing.iter().map(RoutingTotals::flat));
        let flat = numbers.iter().map(|x| x.to_kind(Kind::Double).reshape([-1]));
        Ok(StepOutput { numbers: Tensor::cat(&flat.collect::<Vec<_>>(), 0), parts })
    }
}

/// A step whose loss or gradient is NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NotFinite {
    /// Mean loss over the step's label tokens, nats.
    pub loss: f64,
    /// L2 norm of all gradients together.
    pub grad_norm: f64,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { loss, grad_norm } = self;
        write!(
            f,
            "the loss is {loss} and the gradient norm {grad_norm}\nhint: try a smaller \
             `optimizer.*.learning_rate`, a `schedule.warmup_steps` or `optimizer.max_grad_norm`"
        )
    }
}

impl std::error::Error for NotFinite {}

fn check_finite(loss: f64, grad_norm: f64) -> Result<(), NotFinite> {
    match loss.is_finite() && grad_norm.is_finite() {
        true => Ok(()),
        false => Err(NotFinite { loss, grad_norm }),
    }
}
