//! Writes the cases of [`super::shapes`] with the loss and the gradients of a step to files, which
//! `scripts/check_mixtures.py` compares with PEFT:
//!
//! ```text
//! cases.json             "written": the number of cases; "left_out": the names of the others
//! NNN/base/              config.json and model.safetensors, as transformers reads them
//! NNN/case.json          name      the case's name
//!                        experts   the settings of each expert, as in `dylora.json`
//!                        router    the settings of the routers, as in `dylora.json`
//!                        source    "router", "uniform", "all", {"expert": e} or {"given": [..]}
//!                        documents the lengths of the documents in a row; null if it is one
//!                        base_products
//!                                  "exact" or "fp8"
//!                        label_smoothing
//!                                  the probability that is spread evenly over the vocabulary
//! NNN/step.safetensors   input_ids, position_ids, labels   [b, t]
//!                        mixture.NAME   the tensors of the experts and routers
//!                        loss           0-dim
//!                        grad.NAME      the gradient of each trained tensor, in its shape
//! ```
//!
//! The inputs are int64, and all other tensors are f64.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dylora::model::routing::router::RouterSpec;
use dylora::model::{Inputs, RoutingSource, families};
use dylora::tensor_file::write_tensors;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::quantised::quantised_cases;
use super::shapes::{Case, cases};
use crate::common::seed;

/// Writes the cases that PEFT can compute to the folder that `DYLORA_STEPS` names. PEFT draws other
/// random numbers, so the cases with dropout are left out.
#[test]
#[ignore = "writes files for scripts/check_mixtures.py"]
fn steps_are_written_for_peft() -> Result<()> {
    let folder = std::env::var_os("DYLORA_STEPS");
    let folder = PathBuf::from(folder.context("`DYLORA_STEPS` names no folder")?);
    let _generator = seed(900);
    let (left_out, written): (Vec<Case>, Vec<Case>) =
        cases(false).into_iter().chain(quantised_cases(false)).partition(|case| case.dropout > 0.0);
    for (at, case) in written.iter().enumerate() {
        write(case, &folder.join(format!("{at:03}"))).with_context(|| case.name.clone())?;
    }
    let left_out: Vec<&str> = left_out.iter().map(|case| case.name.as_str()).collect();
    let json = json!({"written": written.len(), "left_out": left_out});
    fs_err::write(folder.join("cases.json"), json.to_string())?;
    println!("{} steps are written", written.len());
    println!("{} steps with dropout are left out: {}", left_out.len(), left_out.join("; "));
    Ok(())
}

fn write(case: &Case, folder: &Path) -> Result<()> {
    let base = case.decoder();
    let model = case.model(&base, Device::Cpu, Kind::Double, None)?;
    let inputs = case.inputs(Device::Cpu);
    let (loss, grads) = case.step(&model, &inputs)?;

    let of_base = folder.join("base");
    fs_err::create_dir_all(&of_base)?;
    let config = families::to_json(&case.base, "float64");
    fs_err::write(of_base.join("config.json"), config.to_string())?;
    let parameters = base.named_parameters();
    let parameters = parameters.iter().map(|(name, tensor)| (name.as_str(), tensor));
    write_tensors(&of_base.join("model.safetensors"), parameters)?;

    let mut tensors = of_inputs(&inputs);
    let mixture = model.tensors().into_iter();
    tensors.extend(mixture.map(|(name, tensor)| (format!("mixture.{name}"), tensor)));
    tensors.push(("loss".into(), Tensor::from(loss)));
    tensors.extend(grads.into_iter().map(|(name, grad)| {
        let grad = if name.ends_with(".lora_b") { grad.tr() } else { grad };
        (format!("grad.{name}"), grad)
    }));
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    write_tensors(&folder.join("step.safetensors"), tensors)?;
    fs_err::write(folder.join("case.json"), settings(case)?.to_string())?;
    Ok(())
}

fn of_inputs(inputs: &Inputs) -> Vec<(String, Tensor)> {
    let ids = &inputs.input_ids;
    let labels = ids.full_like(-100).view([-1]).scatter(0, &inputs.labelled, &inputs.labels);
    let named = [
        ("input_ids", ids.shallow_clone()),
        ("position_ids", inputs.position_ids.shallow_clone()),
        ("labels", labels.view_as(ids)),
    ];
    named.map(|(name, tensor)| (name.to_owned(), tensor)).into()
}

fn settings(case: &Case) -> Result<Value> {
    let source = match &case.source {
        RoutingSource::Router => json!("router"),
        RoutingSource::Uniform => json!("uniform"),
        RoutingSource::All => json!("all"),
        RoutingSource::Expert(expert) => json!({"expert": expert}),
        RoutingSource::Given(weights) => json!({"given": Vec::<f64>::try_from(weights)?}),
        other => bail!("no words for the source {other:?}"),
    };
    Ok(json!({
        "name": case.name,
        "experts": case.specs()?,
        "router": RouterSpec::from(&case.router),
        "source": source,
        "documents": case.documents,
        "base_products": case.base_products,
        "label_smoothing": case.label_smoothing,
    }))
}
