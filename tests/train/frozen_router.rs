//! A router that is not trained (`router.trainable = false`).

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::checkpoint::read_model;
use dylora::config::{Config, load};
use dylora::train::plan::ParameterCounts;
use tch::Tensor;

use super::routing::steps;
use super::{World, alone, mixture, open_base, train};

const FROZEN: [&str; 3] =
    ["router.trainable=false", "router.load_balancing_coef=0", "router.domain_supervision=0"];

/// The tensors of a run's checkpoint at a step, by whether they are a router's.
fn tensors(config: &Config, step: u64) -> Result<(BTreeMap<String, Tensor>, Vec<Tensor>)> {
    let dir = config.run.dir.join(format!("checkpoints/step-{step:08}"));
    let (routers, experts): (BTreeMap<_, _>, BTreeMap<_, _>) =
        read_model(&dir)?.into_iter().partition(|(name, _)| name.contains("router."));
    Ok((routers, experts.into_values().collect()))
}

#[test]
fn a_router_that_is_not_trained_keeps_its_weights_while_the_experts_learn() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let config = world.config("run", &[&FROZEN[..], &["train.keep_last=9"]].concat())?;
    let (losses, summary) = train(&config, None)?;
    let ((routers, experts), (later_routers, later_experts)) =
        (tensors(&config, 4)?, tensors(&config, 12)?);
    assert!(!routers.is_empty() && routers == later_routers);
    assert!(experts.iter().zip(&later_experts).all(|(a, b)| a != b));
    assert!(routers.iter().any(|(name, of)| name.ends_with(".weight") && *of != of.zeros_like()));
    let rates = &steps(&config)?[0].learning_rates;
    assert_eq!(rates.keys().collect::<Vec<_>>(), ["adapters"]);
    // the routers are among what is frozen, and a resumed run goes on as if it had not stopped
    let longer = world.config("run", &[&FROZEN[..], &["train.duration={steps=14}"]].concat())?;
    let (_, resumed) = train(&longer, Some(&summary.checkpoint))?;
    assert_eq!(resumed.frozen_hash, summary.frozen_hash);
    // the first loss is that of a run that trains its router: both begin with the same weights
    let trained = world.config("trained", &FROZEN[1..])?;
    let (other_losses, other) = train(&trained, None)?;
    assert_eq!(losses[0], other_losses[0]);
    assert!(losses[11] != other_losses[11] && summary.frozen_hash != other.frozen_hash);
    Ok(())
}

#[test]
fn the_parameters_of_a_frozen_router_are_counted_but_not_as_trained() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let counts = |overrides: &[&str]| -> Result<ParameterCounts> {
        let config = world.config("run", overrides)?;
        let base = open_base(&config)?;
        Ok(ParameterCounts::new(&config, &mixture(&config, &base)?.specs, &base.spec))
    };
    let (trained, frozen) = (counts(&[])?, counts(&FROZEN)?);
    assert!(frozen.router > 0 && frozen.router == trained.router);
    assert_eq!(frozen.trained, trained.trained - trained.router);
    Ok(())
}

#[test]
fn a_frozen_router_is_refused_where_it_makes_no_sense() -> Result<()> {
    let world = World::new()?;
    for (overrides, said) in [
        (&["lora.num_experts=1"][..], "must be true where there is no router"),
        (&["train.routing=uniform"], "must be true where the router does not decide"),
        (&["router.z_loss_coef=0.1"], "`router.z_loss_coef` must be 0 with `router.trainable"),
        (&["router.domain_supervision=0.1"], "must be 0 where the router is not trained"),
        (&["router.init=zero"], "gives each expert the same weight for ever"),
        (
            &["lora.experts=[{trainable=false},{trainable=false},{trainable=false}]"],
            "`train.routing` must reach an expert that is trainable",
        ),
    ] {
        let fault = world.config("run", &[&FROZEN[..], overrides].concat()).expect_err(said);
        assert!(fault.to_string().contains(said), "{fault}");
    }
    // without the key, domain supervision is on by default only where it can be
    let mut config = world.config("run", &FROZEN)?;
    config.router.domain_supervision = None;
    let config = load::resolve(&load::to_toml(&config), &[])?;
    assert_eq!(config.router.domain_supervision, Some(0.0));
    Ok(())
}
