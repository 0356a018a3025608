//! Several PEFT adapters as the experts of one model.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::DropoutMasks;
use dylora::model::RoutingSource;
use tch::{Kind, Tensor};

use crate::common::{assert_close, assert_same_gradients, gradients, mean_loss, seed};
use crate::{BOTH_WAYS, expected, inputs, logits_by, mixed, mode};

/// The experts, in the order of the golden file's routing weights.
const MIXED: [&str; 4] = ["plain", "rank_pattern", "dora", "rslora"];

#[test]
fn given_weights_mix_pefts_layers() -> Result<()> {
    let _generator = seed(110);
    let (model, expected) = (mixed(&MIXED)?, expected("mixtures")?);
    let inputs = inputs(&expected["input_ids"], None)?;
    for masks in BOTH_WAYS {
        let given = RoutingSource::Given(expected["routing_weights"].shallow_clone());
        for (name, source) in [("routed", given), ("uniform", RoutingSource::Uniform)] {
            let logits = logits_by(masks, &model, &inputs, &source);
            let what = format!("{name}, {masks:?}");
            assert_close(&what, &logits, &expected[&format!("{name}.logits")], 1e-10);
        }
    }
    Ok(())
}

#[test]
fn loss_and_gradients_of_a_mixture_are_torch_autograds() -> Result<()> {
    let _generator = seed(111);
    let (model, expected) = (mixed(&MIXED)?, expected("mixtures")?);
    let inputs = inputs(&expected["input_ids"], Some(&expected["labels"]))?;
    let settings = || mean_loss(inputs.labels.size()[0]);
    let strip = |name: &str| name.strip_prefix("routed.grad.").map(str::to_owned);
    let expected_grads: BTreeMap<String, Tensor> =
        expected.iter().filter_map(|(n, t)| Some((strip(n)?, t.shallow_clone()))).collect();
    for masks in BOTH_WAYS {
        let weights = expected["routing_weights"].copy().set_requires_grad(true);
        let given = RoutingSource::Given(weights.shallow_clone());
        let (loss, _) = model.loss(&inputs, &given, mode(masks, 0.0), settings());
        let loss = loss.loss;
        assert_close("loss", &loss, &expected["routed.loss"], 1e-10);
        let of_weights = Tensor::run_backward(&[&loss], &[&weights], true, false);
        let mut grads = gradients(&model, &loss);
        // the weights are given, so the router has no gradient
        grads.retain(|name, _| !name.starts_with("router."));
        grads.extend(of_weights.into_iter().map(|grad| ("routing_weights".to_owned(), grad)));
        assert_same_gradients(&grads, &expected_grads, 1e-9);
    }
    Ok(())
}

/// Reference: PEFT in training mode, in which each expert draws a mask of its own. Both start from
/// the same state of the generator.
#[test]
fn dropout_draws_pefts_masks() -> Result<()> {
    let _generator = seed(114);
    let expected = expected("dropout")?;
    let inputs = inputs(&expected["input_ids"], None)?;
    let check = |name: &str, experts: &[&str], source: RoutingSource, masks| -> Result<()> {
        let model = mixed(experts)?;
        tch::manual_seed(5);
        let hidden = model.forward(&inputs, &source, mode(masks, 0.3), None).hidden;
        let what = format!("{name}, {masks:?}");
        assert_close(&what, &model.logits(&hidden), &expected[&format!("{name}.logits")], 1e-10);
        Ok(())
    };
    for masks in BOTH_WAYS {
        // a single expert draws one mask in both ways
        check("plain", &["plain"], RoutingSource::Router, masks)?;
        check("dora", &["dora"], RoutingSource::Router, masks)?;
    }
    let given = RoutingSource::Given(expected["routing_weights"].shallow_clone());
    check("routed", &MIXED, given, DropoutMasks::PerExpert)?;
    let plain = ["plain", "rank_pattern", "rslora"];
    check("all", &plain, RoutingSource::All, DropoutMasks::PerExpert)
}

/// This leaves out the DoRA adapter: in PEFT, what it adds depends on the order of the active
/// adapters.
#[test]
fn all_experts_at_weight_one_are_pefts_active_adapters() -> Result<()> {
    let _generator = seed(112);
    let (model, expected) = (mixed(&["plain", "rank_pattern", "rslora"])?, expected("mixtures")?);
    let inputs = inputs(&expected["input_ids"], None)?;
    for masks in BOTH_WAYS {
        let logits = logits_by(masks, &model, &inputs, &RoutingSource::All);
        assert_close(&format!("{masks:?}"), &logits, &expected["all.logits"], 1e-10);
    }
    Ok(())
}

#[test]
fn the_experts_of_records_are_pefts_adapter_names() -> Result<()> {
    let _generator = seed(113);
    let (model, expected) = (mixed(&MIXED)?, expected("mixtures")?);
    let input_ids = &expected["rows.input_ids"];
    let mut inputs = inputs(input_ids, None)?;
    let experts = expected["rows.experts"].unsqueeze(-1).expand_as(input_ids).contiguous();
    assert_eq!(experts.kind(), Kind::Int64);
    inputs.expert_ids = Some(experts);
    for masks in BOTH_WAYS {
        let logits = logits_by(masks, &model, &inputs, &RoutingSource::Record);
        assert_close(&format!("{masks:?}"), &logits, &expected["rows.logits"], 1e-10);
    }
    Ok(())
}
