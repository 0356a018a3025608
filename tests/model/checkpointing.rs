//! Gradient checkpointing changes only memory and time, not the results.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{
    DropoutMasks, ExpertConfig, LoraConfig, LoraInit, RouterConfig, RouterInput, RouterNoise,
    RouterScope,
};
use dylora::ffi;
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{
    ROUTER_INPUTS, SCOPES, assert_close, assert_same_gradients, gradients, max_difference,
    mean_loss, plain_router, randomize, seed, tiny_base, tiny_config, tiny_lora, tiny_model,
    two_rows,
};

/// The results of a forward and a backward pass from a fixed state of the generator, and the state
/// after them.
struct Pass {
    loss: Tensor,
    gradients: BTreeMap<String, Tensor>,
    generator: Tensor,
}

fn pass(model: &RoutedModel, mode: ForwardMode) -> Result<Pass> {
    tch::manual_seed(20);
    let (loss, _) = model.loss(&two_rows(), &RoutingSource::Router, mode, mean_loss(12));
    let gradients = gradients(model, &loss.loss);
    Ok(Pass { loss: loss.loss.detach(), gradients, generator: ffi::rng_state(Device::Cpu)? })
}

fn checkpointing_changes_nothing(model: &RoutedModel, dropout: LoraDropout) -> Result<Pass> {
    checkpointing_keeps(model, ForwardMode { dropout, ..ForwardMode::EVAL })
}

fn checkpointing_keeps(model: &RoutedModel, mode: ForwardMode) -> Result<Pass> {
    let plain = pass(model, mode)?;
    let checkpointed = pass(model, ForwardMode { gradient_checkpointing: true, ..mode })?;
    assert_close("loss", &checkpointed.loss, &plain.loss, 0.0);
    assert_same_gradients(&checkpointed.gradients, &plain.gradients, 1e-12);
    assert!(checkpointed.generator.equal(&plain.generator), "the generator is elsewhere");
    Ok(plain)
}

#[test]
fn checkpointing_keeps_the_gradients_of_experts_and_router() -> Result<()> {
    let _generator = seed(21);
    for top_k in [None, Some(2)] {
        let router = RouterConfig { top_k, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        checkpointing_changes_nothing(&model, LoraDropout::NONE)?;
    }
    Ok(())
}

#[test]
fn checkpointing_keeps_the_gradients_of_a_single_expert() -> Result<()> {
    let _generator = seed(22);
    let lora = LoraConfig { num_experts: 1, ..tiny_lora() };
    let model = tiny_model(&lora, &plain_router(), Kind::Double)?;
    checkpointing_changes_nothing(&model, LoraDropout::NONE)?;
    Ok(())
}

/// The experts have magnitudes and initial components, and one is frozen. Checked for every scope
/// and input of the routers.
#[test]
fn checkpointing_keeps_the_gradients_of_every_kind_of_expert() -> Result<()> {
    let _generator = seed(26);
    let expert = |init, use_dora, trainable| ExpertConfig {
        init: Some(init),
        use_dora: Some(use_dora),
        trainable,
        ..ExpertConfig::default()
    };
    let experts = vec![
        expert(LoraInit::Pissa, true, true),
        expert(LoraInit::Default, false, false),
        expert(LoraInit::Olora, false, true),
    ];
    let lora = LoraConfig { experts, ..tiny_lora() };
    for (scope, input) in SCOPES.into_iter().flat_map(|s| ROUTER_INPUTS.map(|input| (s, input))) {
        let router = RouterConfig { input, scope, ..plain_router() };
        let model = tiny_model(&lora, &router, Kind::Double)?;
        for probability in [0.0, 0.3] {
            let masks = DropoutMasks::Shared;
            checkpointing_changes_nothing(&model, LoraDropout { probability, masks })?;
        }
    }
    Ok(())
}

/// The first layer has no experts, as after the import of adapters with `layers_to_transform`. The
/// shared router only has an effect in the other layers.
#[test]
fn checkpointing_keeps_the_gradients_where_a_layer_has_no_experts() -> Result<()> {
    let _generator = seed(27);
    let base = tiny_base(tiny_config());
    let mut specs = ExpertSpec::all(&tiny_lora(), &base.spec)?;
    for spec in &mut specs {
        spec.modules.retain(|path, _| path.layer == 1);
    }
    for input in [RouterInput::Embeddings, RouterInput::BaseHidden] {
        let router = RouterConfig { input, ..plain_router() };
        let model = RoutedModel::with_experts(
            &base,
            &specs,
            &RouterSpec::from(&router),
            Device::Cpu,
            Kind::Double,
        );
        randomize(&model)?;
        checkpointing_changes_nothing(&model, LoraDropout::NONE)?;
    }
    Ok(())
}

/// The first layer has a router but no experts, so this router has no gradient.
#[test]
fn checkpointing_leaves_a_router_without_experts_alone() -> Result<()> {
    let _generator = seed(28);
    let base = tiny_base(tiny_config());
    let mut specs = ExpertSpec::all(&tiny_lora(), &base.spec)?;
    for spec in &mut specs {
        spec.modules.retain(|path, _| path.layer == 1);
    }
    let router = RouterConfig {
        input: RouterInput::LayerInput,
        scope: RouterScope::Layer,
        ..plain_router()
    };
    let model = RoutedModel::with_experts(
        &base,
        &specs,
        &RouterSpec::from(&router),
        Device::Cpu,
        Kind::Double,
    );
    randomize(&model)?;
    let plain = pass(&model, ForwardMode::EVAL)?;
    let checkpointed =
        pass(&model, ForwardMode { gradient_checkpointing: true, ..ForwardMode::EVAL })?;
    for (name, gradient) in &plain.gradients {
        assert_close(name, &checkpointed.gradients[name], gradient, 1e-12);
        let is_zero = gradient.abs().max().double_value(&[]) == 0.0;
        assert_eq!(is_zero, name.starts_with("h.0.router."), "{name}");
    }
    Ok(())
}

#[test]
fn the_second_run_draws_the_dropout_masks_of_the_first() -> Result<()> {
    let _generator = seed(23);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let without = pass(&model, ForwardMode::EVAL)?;
    for masks in [DropoutMasks::Shared, DropoutMasks::PerExpert] {
        let dropped =
            checkpointing_changes_nothing(&model, LoraDropout { probability: 0.3, masks })?;
        assert!(max_difference(&dropped.loss, &without.loss) > 1e-3, "{masks:?} drops nothing");
    }
    Ok(())
}

/// Routers run only once, so their noise is drawn once. The second run of a block must still draw
/// the same dropout masks as the first, although noise was drawn before and after them.
#[test]
fn checkpointing_keeps_the_noise_of_routers_and_the_masks_beside_it() -> Result<()> {
    let _generator = seed(29);
    let noises = [RouterNoise::Gaussian(0.5), RouterNoise::Jitter(0.3)];
    let masks = [DropoutMasks::Shared, DropoutMasks::PerExpert];
    for (scope, input) in SCOPES.into_iter().flat_map(|s| ROUTER_INPUTS.map(|input| (s, input))) {
        let router = RouterConfig { input, scope, hidden_layers: 1, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let quiet = pass(&model, ForwardMode::EVAL)?;
        for (noise, masks) in noises.into_iter().zip(masks) {
            for probability in [0.0, 0.3] {
                let dropout = LoraDropout { probability, masks };
                let mode = ForwardMode { dropout, noise, ..ForwardMode::EVAL };
                let noisy = checkpointing_keeps(&model, mode)?;
                let moved = max_difference(&noisy.loss, &quiet.loss);
                assert!(moved > 1e-4, "{scope:?}, {input:?}, {noise:?}: the loss moves by {moved}");
            }
        }
    }
    Ok(())
}

#[test]
fn checkpointing_keeps_the_gradients_of_a_trained_base() -> Result<()> {
    let _generator = seed(24);
    for tied_head in [true, false] {
        let mut config = tiny_config();
        config.tied_head = tied_head;
        let model = RoutedModel::plain(&tiny_base(config), Device::Cpu, Kind::Double, true);
        checkpointing_changes_nothing(&model, LoraDropout::NONE)?;
    }
    Ok(())
}

#[test]
fn a_panic_within_a_checkpointed_segment_is_an_error() {
    let _generator = seed(25);
    let segment: ffi::Segment = Box::new(|_| panic!("as a test wants it"));
    let x = Tensor::zeros([2], (Kind::Float, Device::Cpu));
    assert!(ffi::checkpoint(segment, &[x], &[]).is_err());
}
