//! How the parts of a step become the whole in a world of several processes.
//!
//! ```text
//! totals      the routers' totals, if losses depend on them: one f64 row              sum
//! upper       the gradients above the cut, one after another, in their own dtype      sum
//! lower       the other gradients                                                     sum
//! numbers     loss sums, statistics and requests to stop: one f64 row                 sum
//! ```
//!
//! The upper gradients are added up while the lower ones are computed, if there are enough of both.
//! The lower ones and the numbers are added up in one operation, on a GPU in one launch. No
//! operation is captured. The buffers stay in the same memory from step to step, so that captured
//! graphs may write and read them.

use std::sync::Arc;

use anyhow::Result;
use tch::{Kind, Tensor};

use super::gradients::StepGradients;
use crate::dist::{Sum, World};
use crate::model::routing::totals::{RoutingTotals, views_of};
use crate::model::{Trained, TrainedParameter};

/// The buffers through which the parts of a step are added up.
#[derive(Debug)]
pub(super) struct Exchange {
    world: Arc<World>,
    totals: Option<Tensor>,
    /// `None` if no gradient is above the cut.
    upper: Option<Tensor>,
    lower: Option<Tensor>,
    numbers: Option<Tensor>,
    /// The sum over the upper gradients, once it has begun.
    sum_of_upper: Option<Sum>,
}

impl Exchange {
    pub fn new(world: Arc<World>) -> Self {
        Self { world, totals: None, upper: None, lower: None, numbers: None, sum_of_upper: None }
    }

    /// Puts this process's routing totals into their buffer. Returns views of it, in which the
    /// world's totals will stand.
    pub fn put_totals(&mut self, totals: &[RoutingTotals]) -> Vec<RoutingTotals> {
        let flat: Vec<Tensor> = totals.iter().map(RoutingTotals::flat).collect();
        fill(&mut self.totals, &flat);
        views_of(&of(&self.totals), totals)
    }

    /// Adds up the totals of all processes.
    pub fn add_totals(&self) -> Result<()> {
        self.world.all_reduce(&[of(&self.totals)])
    }

    /// Puts this process's gradients above the cut into their buffer.
    pub fn put_upper(&mut self, grads: &[Tensor]) {
        let _no_grad = tch::no_grad_guard();
        fill(&mut self.upper, &rows(grads));
    }

    /// Begins to add up the upper gradients of all processes.
    pub fn begin_upper(&mut self) -> Result<()> {
        self.sum_of_upper = Some(self.world.begin_all_reduce(&[of(&self.upper)])?);
        Ok(())
    }

    /// Puts the rest of this process's gradients, and its sums, into their buffers. Returns views
    /// of all buffers, in which the world's will stand.
    ///
    /// - `cut`: as in [`Part::cut`](super::gradients::Part::cut)
    pub fn put(
        &mut self,
        trained: &Trained,
        cut: Option<usize>,
        part: StepGradients,
    ) -> StepGradients {
        let _no_grad = tch::no_grad_guard();
        let pairs = || trained.parameters.iter().zip(&part.grads);
        let is_lower = |(parameter, _): &(&TrainedParameter, _)| !parameter.is_above(cut);
        fill(&mut self.lower, &rows(pairs().filter(is_lower).map(|(_, grad)| grad)));
        fill(&mut self.numbers, &numbers(&part));
        let (lower, numbers) = (of(&self.lower), of(&self.numbers));
        let mut of_lower = Views { of: &lower, at: 0 };
        let mut of_upper = Views { of: self.upper.as_ref().unwrap_or(&lower), at: 0 };
        let grads = pairs().map(|(parameter, grad)| match parameter.is_above(cut) {
            true => of_upper.next(grad),
            false => of_lower.next(grad),
        });
        let grads = grads.collect();
        let mut views = Views { of: &numbers, at: 0 };
        StepGradients {
            grads,
            stops: views.next(&part.stops),
            domain_sums: views.next(&part.domain_sums),
            orthogonality: part.orthogonality.as_ref().map(|x| views.next(x)),
            expert_losses: part.expert_losses.as_ref().map(|x| views.next(x)),
            supervision: part.supervision.as_ref().map(|x| views.next(x)),
            routing: match part.has_whole_routing {
                true => part.routing,
                false => views_of(&views.rest(), &part.routing),
            },
            has_whole_routing: true,
        }
    }

    /// Adds up the other gradients and the numbers of all processes. After that, the sums stand in
    /// all buffers.
    pub fn add(&mut self) -> Result<()> {
        self.world.all_reduce(&[of(&self.lower), of(&self.numbers)])?;
        match self.sum_of_upper.take() {
            Some(sum) => self.world.finish(sum),
            None => Ok(()),
        }
    }
}

/// Each gradient as a row.
fn rows<'t>(grads: impl IntoIterator<Item = &'t Tensor>) -> Vec<Tensor> {
    grads.into_iter().map(|grad| grad.reshape([-1])).collect()
}

/// Views of consecutive parts of a buffer.
struct Views<'a> {
    of: &'a Tensor,
    at: i64,
}

impl Views<'_> {
    /// The next part, in the shape of `like`.
    fn next(&mut self, like: &Tensor) -> Tensor {
        let len = like.numel() as i64;
        self.at += len;
        self.of.narrow(0, self.at - len, len).view_(like.size())
    }

    /// All that follows.
    fn rest(&self) -> Tensor {
        self.of.slice(0, self.at, None, 1)
    }
}

/// The sums of a part, in the order in which [`Exchange::put`] reads them.
fn numbers(part: &StepGradients) -> Vec<Tensor> {
    let mut numbers = vec![&part.stops, &part.domain_sums];
    numbers.extend(&part.orthogonality);
    numbers.extend(&part.expert_losses);
    numbers.extend(&part.supervision);
    let flat = |x: &Tensor| x.detach().to_kind(Kind::Double).reshape([-1]);
    let mut numbers: Vec<Tensor> = numbers.into_iter().map(flat).collect();
    if !part.has_whole_routing {
        numbers.extend(part.routing.iter().map(RoutingTotals::flat));
    }
    numbers
}

/// Puts tensors of one dimension into a buffer, one after another. The first call makes the buffer.
fn fill(buffer: &mut Option<Tensor>, parts: &[Tensor]) {
    let len: usize = parts.iter().map(Tensor::numel).sum();
    match buffer.as_ref().filter(|buffer| buffer.numel() == len) {
        Some(buffer) => {
            let _ = Tensor::cat_out(buffer, parts, 0);
        }
        None => *buffer = Some(Tensor::cat(parts, 0)),
    }
}

fn of(buffer: &Option<Tensor>) -> Tensor {
    buffer.as_ref().expect("the parts are in the buffer").shallow_clone()
}
