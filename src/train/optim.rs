//! AdamW (arXiv:1711.05101, algorithm 2) over parameter groups. The moments are kept here, so that
//! a checkpoint can hold them.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use crate::config::{GroupConfig, OptimizerConfig};
use crate::ffi::{self, AdamW, AdamWUpdate};
use crate::model::cut::Cut;
use crate::model::{ParameterGroup, Trained, TrainedParameter};

/// The optimizer of a run.
#[derive(Debug)]
pub struct Optimizer {
    groups: Vec<Group>,
    betas: [f64; 2],
    eps: f64,
    /// Which gradients are clipped together, by their indices, and to which norm.
    clips: Vec<(Vec<usize>, Option<f64>)>,
    /// Number of updates so far.
    step: u64,
}

/// Parameters that share a learning rate and a weight decay, with their moments.
#[derive(Debug)]
struct Group {
    name: String,
    learning_rate: f64,
    weight_decay: f64,
    /// The number of warm-up steps, if the group has its own.
    warmup_steps: Option<u64>,
    /// Indices into the model's list of trained parameters.
    indices: Vec<usize>,
    names: Vec<String>,
    params: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
}

impl Optimizer {
    /// An optimizer of `parameters` whose moments are zero.
    pub fn new(config: &OptimizerConfig, parameters: &[TrainedParameter]) -> Self {
        let kinds = [
            (ParameterGroup::Adapters, "adapters", config.adapters),
            (ParameterGroup::Router, "router", config.router),
            (
                ParameterGroup::NewColumn,
                "new_column",
                GroupConfig { learning_rate: 1.0, ..config.router },
            ),
            (ParameterGroup::Base, "base", config.base),
            (ParameterGroup::BaseNoDecay, "base_no_decay", config.base),
        ];
        let mut rates: Vec<f64> = parameters.iter().map(|p| p.rate).collect();
        rates.sort_by(|a, b| b.total_cmp(a));
        rates.dedup();
        let by_rate = |kind| rates.iter().map(move |&rate| (rate, kind));
        let groups = kinds.into_iter().flat_map(by_rate);
        let groups = groups.filter_map(|(rate, (kind, name, settings))| {
            let belongs = |p: &TrainedParameter| p.group == kind && p.rate == rate;
            let members: Vec<_> =
                parameters.iter().enumerate().filter(|(_, p)| belongs(p)).collect();
            let params: Vec<_> = members.iter().map(|(_, p)| p.tensor.shallow_clone()).collect();
            let zeros = || -> Vec<_> { params.iter().map(|p| p.zeros_like().detach()).collect() };
            let (exp_avgs, exp_avg_sqs) = (zeros(), zeros());
            let decays = kind != ParameterGroup::BaseNoDecay;
            (!params.is_empty()).then_some(Group {
                name: match kind {
                    ParameterGroup::NewColumn => name.into(),
                    _ if rate == 1.0 => name.into(),
                    _ => format!("{name}_at_{rate}"),
                },
                learning_rate: settings.learning_rate * rate,
                weight_decay: if decays { settings.weight_decay } else { 0.0 },
                warmup_steps: settings.warmup_steps,
                indices: members.iter().map(|(index, _)| *index).collect(),
                names: members.iter().map(|(_, p)| p.name.clone()).collect(),
                exp_avgs,
                exp_avg_sqs,
                params,
            })
        });
        Self {
            groups: groups.collect(),
            betas: config.betas,
            eps: config.eps,
            clips: clips(config, parameters),
            step: 0,
        }
    }

    /// Clips `grads`, which holds one gradient for each trained parameter in the model's order: a
    /// group with a `max_grad_norm` of its own by itself, and all others together. Returns the norm
    /// of all of them before clipping, 0-dim.
    pub fn clip(&self, grads: &[Tensor]) -> Result<Tensor> {
        let norms = self.clips.iter().map(|(indices, max_norm)| {
            let part: Vec<Tensor> = indices.iter().map(|&i| grads[i].shallow_clone()).collect();
            ffi::clip_grad_norm(&part, *max_norm)
        });
        let norms = norms.collect::<Result<Vec<_>>>()?;
        match &norms[..] {
            [norm] => Ok(norm.shallow_clone()),
            norms => Ok(Tensor::stack(norms, 0).norm()),
        }
    }

    /// The numbers that [`Optimizer::update`] needs for the next update: its number, from 1, then
    /// each group's learning rate times `factor`, which gets the group's own number of warm-up
    /// steps.
    pub fn scalars(&self, factor: &dyn Fn(Option<u64>) -> f64) -> Vec<f64> {
        let rates =
            self.groups.iter().map(|group| group.learning_rate * factor(group.warmup_steps));
        [(self.step + 1) as f64].into_iter().chain(rates).collect()
    }

    /// Makes one update. The host reads no number from the device.
    ///
    /// - `scalars`: the numbers of [`Optimizer::scalars`], f64, `[1 + groups]`, on the parameters'
    ///   device
    /// - `is_skipped`: true to leave the parameters and moments as they are, 0-dim
    pub fn update(&self, grads: &[Tensor], scalars: &Tensor, is_skipped: &Tensor) -> Result<()> {
        // libtorch reads the learning rate as f32 on CUDA and as f64 on the CPU
        let kind = if scalars.device().is_cuda() { Kind::Float } else { Kind::Double };
        let number = scalars.get(0).to_kind(Kind::Float);
        let found_inf = is_skipped.to_kind(Kind::Float);
        for (i, group) in (1..).zip(&self.groups) {
            let update = AdamWUpdate {
                number: number.shallow_clone(),
                lr: scalars.get(i).to_kind(kind),
                found_inf: found_inf.shallow_clone(),
            };
            let settings =
                AdamW { betas: self.betas, weight_decay: group.weight_decay, eps: self.eps };
            let grads: Vec<_> = group.indices.iter().map(|&i| grads[i].shallow_clone()).collect();
            let (m, v) = (&group.exp_avgs, &group.exp_avg_sqs);
            ffi::adamw(&group.params, &grads, m, v, &update, settings)?;
        }
        Ok(())
    }

    /// Records that an update was made.
    pub fn count_update(&mut self) {
        self.step += 1;
    }

    /// Records that update `number`, from 1, and those after it were not made after all.
    pub(super) fn take_back_update(&mut self, number: u64) {
        self.step = self.step.min(number - 1);
    }

    /// Number of updates so far, those in the device's queue included.
    pub fn num_updates(&self) -> u64 {
        self.step
    }

    /// Each group's learning rate in the update whose numbers are `scalars`, by the group's name.
    pub fn learning_rates(&self, scalars: &[f64]) -> BTreeMap<String, f64> {
        let rates = scalars[1..].iter().copied();
        self.groups.iter().map(|group| group.name.clone()).zip(rates).collect()
    }

    /// The moments, named `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for group in &self.groups {
            for (i, name) in group.names.iter().enumerate() {
                state.insert(format!("exp_avg.{name}"), group.exp_avgs[i].shallow_clone());
                state.insert(format!("exp_avg_sq.{name}"), group.exp_avg_sqs[i].shallow_clone());
            }
        }
        state
    }

    /// Restores what [`Optimizer::state`] returned after `step` updates.
    ///
    /// # Errors
    /// Fails if a tensor is missing or has another shape.
    pub(crate) fn load_state(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        for (name, target) in self.state() {
            match state.get(&name) {
                Some(source) if source.size() == target.size() => {
                    tch::no_grad(|| target.shallow_clone().copy_(source));
                }
                Some(source) => {
                    bail!("tensor `{name}` must be {:?}, got {:?}", target.size(), source.size())
                }
                None => bail!("tensor `{name}` is missing"),
            }
        }
        self.step = step;
        Ok(())
    }
}

/// Which parameters' gradients are clipped together, by their indices, and to which norm.
fn clips(
    config: &OptimizerConfig,
    parameters: &[TrainedParameter],
) -> Vec<(Vec<usize>, Option<f64>)> {
    let own = |group| match group {
        ParameterGroup::Adapters => config.adapters.max_grad_norm,
        ParameterGroup::Router | ParameterGroup::NewColumn => config.router.max_grad_norm,
        ParameterGroup::Base | ParameterGroup::BaseNoDecay => config.base.max_grad_norm,
    };
    let section = |group| match group {
        ParameterGroup::BaseNoDecay => ParameterGroup::Base,
        ParameterGroup::NewColumn => ParameterGroup::Router,
        group => group,
    };
    let mut parts: BTreeMap<Option<ParameterGroup>, (Vec<usize>, f64)> = BTreeMap::new();
    for (index, parameter) in parameters.iter().enumerate() {
        let norm = own(parameter.group);
        let key = norm.map(|_| section(parameter.group));
        let part = parts.entry(key).or_insert((vec![], norm.unwrap_or(config.max_grad_norm)));
        part.0.push(index);
    }
    parts.into_values().map(|(indices, norm)| (indices, (norm > 0.0).then_some(norm))).collect()
}

/// Sums gradients over the forward passes of a step.
#[derive(Debug, Default)]
pub(crate) struct GradientSum(Vec<Option<Tensor>>);

impl GradientSum {
    /// Differentiates `loss` with respect to the leaves of `trained` and adds the result.
    pub fn add(&mut self, loss: &Tensor, trained: &Trained) -> Result<()> {
        self.add_above(loss, trained, Cut::default()).map(|_| ())
    }

    /// The same for a loss whose graph is cut: adds the gradients of the part above the cut.
    /// Returns the part below, for [`GradientSum::add_below`].
    pub fn add_above(&mut self, loss: &Tensor, trained: &Trained, cut: Cut) -> Result<PartBelow> {
        ensure!(loss.requires_grad(), "the loss depends on nothing that is trained");
        let one = loss.ones_like().detach();
        let inputs: Vec<Tensor> =
            trained.leaves.iter().chain(&cut.above).map(Tensor::shallow_clone).collect();
        let mut grads = ffi::differentiate(std::slice::from_ref(loss), &[one], &inputs)?;
        let of_cut = grads.split_off(trained.leaves.len());
        self.0.resize_with(trained.leaves.len(), || None);
        self.add_each((0..).zip(grads));
        let crossing = cut.below.into_iter().zip(of_cut);
        Ok(PartBelow(crossing.filter_map(|(tensor, grad)| Some((tensor, grad?))).collect()))
    }

    /// Differentiates the part of a graph below its cut with respect to some leaves of `trained`,
    /// by their indices, and adds the result.
    pub fn add_below(
        &mut self,
        part: PartBelow,
        trained: &Trained,
        leaves: &[usize],
    ) -> Result<()> {
        let (tensors, weights): (Vec<_>, Vec<_>) = part.0.into_iter().unzip();
        if tensors.is_empty() {
            return Ok(());
        }
        let inputs: Vec<_> = leaves.iter().map(|&i| trained.leaves[i].shallow_clone()).collect();
        let grads = ffi::differentiate(&tensors, &weights, &inputs)?;
        self.add_each(leaves.iter().copied().zip(grads));
        Ok(())
    }

    fn add_each(&mut self, grads: impl Iterator<Item = (usize, Option<Tensor>)>) {
        for (leaf, grad) in grads {
            let Some(grad) = grad else { continue };
            match &mut self.0[leaf] {
                Some(sum) => *sum += grad,
                // the fused optimizer needs the parameters' own layout
                none => *none = Some(grad.contiguous()),
            }
        }
    }

    /// The summed gradient of a parameter; zeros if no loss depends on it.
    pub fn of(&self, parameter: &TrainedParameter) -> Tensor {
        parameter.grad(&self.0)
    }

    /// The summed gradients, one for each parameter of `trained`.
    pub fn of_parameters(&self, trained: &Trained) -> Vec<Tensor> {
        trained.parameters.iter().map(|parameter| self.of(parameter)).collect()
    }
}

/// What is still to be differentiated below a cut: the tensors that cross it, each with the
/// gradient of the loss with respect to it.
#[derive(Debug, Default)]
pub(crate) struct PartBelow(Vec<(Tensor, Tensor)>);

/// The generator states of a process for a checkpoint: the CPU's, and the device's if it is not the
/// CPU. They are named `rng.cpu` and `rng.cuda`, and `rng.{dist_rank}.cpu` and so on after the
/// first process of a world.
pub fn rng_states(device: Device, dist_rank: usize) -> Result<BTreeMap<String, Tensor>> {
    let name = |kind| rng_name(kind, dist_rank);
    let mut states = BTreeMap::from([(name("cpu"), ffi::rng_state(Device::Cpu)?)]);
    if device != Device::Cpu {
        states.insert(name("cuda"), ffi::rng_state(device)?);
    }
    Ok(states)
}

fn rng_name(kind: &str, dist_rank: usize) -> String {
    match dist_rank {
        0 => format!("rng.{kind}"),
        _ => format!("rng.{dist_rank}.{kind}"),
    }
}

/// Restores what [`rng_states`] returned. If a run has moved from the CPU to a GPU, or to a larger
/// world, there is no state for some generators, which then keep their own.
pub fn load_rng_states(
    states: &BTreeMap<String, Tensor>,
    device: Device,
    dist_rank: usize,
) -> Result<()> {
    for (kind, device) in [("cpu", Device::Cpu), ("cuda", device)] {
        if let Some(state) = states.get(&rng_name(kind, dist_rank))
            && (kind == "cpu" || device != Device::Cpu)
        {
            ffi::set_rng_state(device, state)?;
        }
    }
    Ok(())
}
