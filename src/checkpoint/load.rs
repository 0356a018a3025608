//! The mixture of a checkpoint, and its model on the base that it was trained on.

use std::path::Path;

use anyhow::{Context, Result};
use tch::Device;

use super::format::{TrainState, read_experts, read_model, read_state};
use crate::base::Base;
use crate::config::{Config, Method};
use crate::mixture::Mixture;
use crate::model::decoder::Decoder;
use crate::model::{Compute, RoutedModel};

/// The model that a config trains: a mixture on a base, or with `method = "full"` the base alone.
/// Tensors that the mixture lacks are drawn with the seed `run.seed`.
///
/// # Errors
/// Fails if a tensor of the mixture does not fit, and names it.
pub fn build_model(
    config: &Config,
    base: &Decoder,
    mixture: &Mixture,
    device: Device,
) -> Result<RoutedModel> {
    let compute = Compute::of_config(config);
    match config.method {
        Method::Full => Ok(RoutedModel::plain(base, device, compute, true)),
        Method::RoutedLora => {
            tch::manual_seed(config.run.seed as i64);
            mixture.put_on(base, device, compute)
        }
    }
}

/// The model of a checkpoint: its experts and routers on the base, or the trained base.
///
/// # Errors
/// Fails if the checkpoint was trained on another base.
pub fn load_model(dir: &Path, config: &Config, base: &Base, device: Device) -> Result<RoutedModel> {
    let state = read_state(dir)?;
    let weights = checkpoint_base(base, &state)?;
    let mixture = load_mixture(dir, config, &state)?;
    let in_dir = || format!("cannot load checkpoint `{}`", dir.display());
    let model = build_model(config, &weights, &mixture, device).with_context(in_dir)?;
    if config.method == Method::Full {
        model.load(&mixture.tensors).with_context(in_dir)?;
    }
    Ok(model)
}

/// The weights of the base that a checkpoint was trained on.
///
/// # Errors
/// Fails if `base` is another base.
pub fn checkpoint_base(base: &Base, state: &TrainState) -> Result<Decoder> {
    base.weights_of(&state.base_identity(), "the checkpoint was trained on")
}

/// The experts and routers of a checkpoint, with the routing rule that held after its last step.
pub fn load_mixture(dir: &Path, config: &Config, state: &TrainState) -> Result<Mixture> {
    let router = state.routing.rule(&config.router, state.step.max(1)).router_spec(config);
    let specs = read_experts(dir)?;
    let mixture = Mixture::new(specs, router, read_model(dir)?);
    let routing = config.train.routing;
    Ok(Mixture { is_whole: true, routing, base: state.base_identity(), ..mixture })
}
