//! Adapters that PEFT saved, put on a base.

use anyhow::Result;
use dylora::model::experts::weights::RoutingWeights;
use dylora::model::{ForwardMode, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{assert_close, logits, seed};
use crate::{TOLERANCES, expected, inputs, of_folder, peft_folder, tied_base};

/// The folders of single adapters in `tests/golden/peft`.
const ADAPTERS: [&str; 11] = [
    "plain",
    "all_linears",
    "rslora",
    "rank_pattern",
    "rslora_rank_pattern",
    "regex",
    "layers",
    "dora",
    "dora_rslora_pattern",
    "alora",
    "pissa",
];

#[test]
fn each_adapter_gives_pefts_logits() -> Result<()> {
    let _generator = seed(100);
    for (kind, tolerance) in TOLERANCES {
        let base = tied_base(kind)?;
        for name in ADAPTERS {
            let mixture = of_folder(&peft_folder(name), &base.spec)?;
            let model = mixture.put_on(&base, Device::Cpu, kind)?;
            let expected = expected(name)?;
            let inputs = inputs(&expected["input_ids"], None)?;
            let logits = logits(&model, &inputs, &RoutingSource::Router);
            let what = format!("logits of `{name}` in {kind:?}");
            assert_close(&what, &logits, &expected["logits"], tolerance);
        }
    }
    Ok(())
}

#[test]
fn an_alora_expert_has_weight_one_from_its_last_invocation_on_and_zero_before() -> Result<()> {
    let _generator = seed(101);
    let base = tied_base(Kind::Double)?;
    let mixture = of_folder(&peft_folder("alora"), &base.spec)?;
    let model = mixture.put_on(&base, Device::Cpu, Kind::Double)?;
    let expected = expected("alora")?;
    let inputs = inputs(&expected["input_ids"], None)?;
    let output = model.forward(&inputs, &RoutingSource::Router, ForwardMode::EVAL, None);
    let [RoutingWeights::PerToken(weights)] = &output.weights[..] else {
        panic!("the weights are not the same for every token")
    };
    let starts = Vec::<i64>::try_from(&expected["offsets_start"])?;
    assert_eq!(starts, [6, 11]);
    let positions = Tensor::arange(11, (Kind::Int64, Device::Cpu));
    let active = positions.ge_tensor(&expected["offsets_start"].unsqueeze(-1)).unsqueeze(-1);
    assert!(weights.equal(&active.to_kind(Kind::Double)));
    Ok(())
}
