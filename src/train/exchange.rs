//! How the parts of a step become the whole in a world of several processes.
//!
//! ```text
//! totals      the routers' totals, if losses depend on them: one f64 row    sum
//! gradients   all of them, one after another, in their own dtype            sum
//! numbers     loss sums, statistics and requests to stop: one f64 row       sum
//! ```
//!
//! Gradients and numbers are added up in one operation, on a GPU in one launch. Their buffers stay
//! in the same memory from step to step, so that captured graphs may write and read them, and the
//! operations run between the graphs.

use std::sync::Arc;

use anyhow::Result;
use tch::{Kind, Tensor};

use super::gradients::StepGradients;
use crate::dist::World;
use crate::model::routing::totals::{RoutingTotals, views_of};

/// The buffers through which the parts of a step are added up.
#[derive(Debug)]
pub(super) struct Exchange {
    world: Arc<World>,
    totals: Option<Tensor>,
    gradients: Option<Tensor>,
    numbers: Option<Tensor>,
}

impl Exchange {
    pub fn new(world: Arc<World>) -> Self {
        Self { world, totals: None, gradients: None, numbers: None }
    }

    /// Puts this process's routing totals into their buffer. Returns views of it, in which the
    /// world's totals will stand.
    pub fn put_totals(&mut self, totals: &[RoutingTotals]) -> Vec<RoutingTotals> {
        let flat: Vec<Tensor> = totals.iter().map(RoutingTotals::flat).collect();
        let buffer = fill(&mut self.totals, &flat);
        views_of(&buffer, totals)
    }

    /// Adds up the totals of all processes.
    pub fn add_totals(&self) -> Result<()> {
        self.world.all_reduce(&[of(&self.totals)])
    }

    /// Puts this process's gradients and sums into their buffers. Returns views of these, in which
    /// the world's will stand.
    pub fn put(&mut self, part: StepGradients) -> StepGradients {
        let _no_grad = tch::no_grad_guard();
        let flat: Vec<Tensor> = part.grads.iter().map(|grad| grad.reshape([-1])).collect();
        let gradients = fill(&mut self.gradients, &flat);
        let numbers = fill(&mut self.numbers, &numbers(&part));
        let mut views = Views { of: &gradients, at: 0 };
        let grads = part.grads.iter().map(|grad| views.next(grad)).collect();
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

    /// Adds up the gradients and numbers of all processes.
    pub fn add(&self) -> Result<()> {
        self.world.all_reduce(&[of(&self.gradients), of(&self.numbers)])
    }
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

/// Puts tensors of one dimension into a buffer, one after another, and returns the buffer. The
/// first call makes it.
fn fill(buffer: &mut Option<Tensor>, parts: &[Tensor]) -> Tensor {
    let len: usize = parts.iter().map(Tensor::numel).sum();
    match buffer.as_ref().filter(|buffer| buffer.numel() == len) {
        Some(buffer) => Tensor::cat_out(buffer, parts, 0),
        None => buffer.insert(Tensor::cat(parts, 0)).shallow_clone(),
    }
}

fn of(buffer: &Option<Tensor>) -> Tensor {
    buffer.as_ref().expect("the parts are in the buffer").shallow_clone()
}
