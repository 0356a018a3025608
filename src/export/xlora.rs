//! Writing a mixture as an X-LoRA folder, if X-LoRA can express it.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde_json::Value;
use tch::Tensor;

use crate::config::{RouterInput, RoutingLevel};
use crate::model::RoutedModel;
use crate::peft::xlora::{ADAPTERS, XloraConfig, classifier_tensors};

/// The `xlora_config.json` and the classifier's tensors of a mixture.
///
/// # Errors
/// A mixture that X-LoRA cannot express. The error says why.
pub(crate) fn settings_and_classifier(
    model: &RoutedModel,
    base_name: &str,
    experts: &[String],
) -> Result<(Value, BTreeMap<String, Tensor>)> {
    let router = match model.routers() {
        [] => bail!("a single expert has no router, and is a PEFT adapter as it is"),
        [router] => router,
        routers => {
            bail!("X-LoRA has one classifier for all layers, this mixture {}", routers.len())
        }
    };
    let spec = model.router_spec();
    let input = spec.input;
    if input != RouterInput::BaseHidden {
        bail!(
            "X-LoRA's classifier reads the base's last hidden state, this router `{}`\nhint: train \
             with `router.input = \"base_hidden\"`",
            input.name()
        );
    }
    if let Some(k) = spec.top_k {
        bail!("X-LoRA's top-k is another rule; this router keeps {k} experts of a token");
    }
    let with = |what: &str, has: bool| match has {
        true => bail!("X-LoRA does not know {what}"),
        false => Ok(()),
    };
    with("hidden layers of a router that end in its width", spec.hidden_layers > 0)?;
    with("routing by the prompt", spec.level == RoutingLevel::Sequence)?;
    with("a router that normalises its input", spec.normalize_input)?;
    with("a part that is always on", model.specs().iter().any(|spec| spec.shared))?;
    with("layers with experts of their own", spec.own_experts)?;
    with("another rule in evaluation", spec.eval.is_some())?;
    with("DoRA", model.specs().iter().any(|spec| spec.use_dora))?;
    with("invocation tokens", model.specs().iter().any(|s| !s.alora_invocation_tokens.is_empty()))?;
    let adapters = experts.iter().map(|name| (name.clone(), format!("{ADAPTERS}/{name}")));
    let config = XloraConfig {
        hidden_size: model.base().spec.width,
        base_model_id: base_name.to_owned(),
        adapters: adapters.collect(),
        softmax_temperature: spec.temperature,
    };
    Ok((config.to_json(), classifier_tensors(&router.weight, &router.bias)))
}
