//! Experts and routers in words, for model cards.

use crate::config::{EvalRule, RouterInput, RouterScope, RoutingLevel};
use crate::model::experts::spec::ExpertSpec;
use crate::model::routing::router::RouterSpec;

/// An expert in one line: rank, alpha, target modules and options.
pub(super) fn describe(spec: &ExpertSpec) -> String {
    let range = |values: Vec<f64>| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        if low == high { low.to_string() } else { format!("{low} to {high}") }
    };
    let ranks = range(spec.modules.values().map(|size| size.rank as f64).collect());
    let alphas = range(spec.modules.values().map(|size| size.alpha).collect());
    let modules: Vec<String> =
        spec.target_modules().iter().map(|module| format!("`{}`", module.name())).collect();
    let mut text = format!("rank {ranks}, alpha {alphas}, target modules {}", modules.join(", "));
    for (is_so, what) in [(spec.use_rslora, ", rsLoRA"), (spec.use_dora, ", DoRA")] {
        text += if is_so { what } else { "" };
    }
    let tokens = &spec.alora_invocation_tokens;
    if !tokens.is_empty() {
        text += &format!(", active from the last occurrence of the tokens {tokens:?} on");
    }
    text
}

/// The routers of a mixture in words.
pub(super) fn describe_router(spec: &RouterSpec) -> String {
    let reads = match spec.input {
        RouterInput::Embeddings => {
            "the token embedding, plus the position embedding where the base has one"
        }
        RouterInput::BaseHidden => "the last hidden state of a pass of the base alone",
        RouterInput::LayerInput => "a block's input after its first normalisation",
        RouterInput::ModuleInput => "the module's own input",
    };
    let averaged = match spec.level {
        RoutingLevel::Token => "",
        RoutingLevel::Sequence => ", averaged over the document's prompt up to the token",
    };
    let scope = match spec.scope {
        RouterScope::Shared => "One router serves every layer.",
        RouterScope::Layer => "Each layer has its own router.",
        RouterScope::Module => "Each target module has its own router.",
    };
    let hidden = match spec.hidden_layers {
        0 => String::new(),
        n => format!(" behind {n} hidden layer(s) of width {} with ReLU", spec.hidden_width),
    };
    let chosen = match spec.top_k {
        None => String::new(),
        Some(k) => format!(
            "; the {k} largest{} are kept and {}",
            if spec.selection_bias { " after `selection_bias` is added" } else { "" },
            match (spec.renormalize, spec.selection_bias) {
                (true, false) => "divided by their sum",
                (true, true) => "divided, without it, by their sum",
                (false, _) => "not divided by their sum",
            }
        ),
    };
    let chosen = match spec.eval {
        None => chosen,
        Some(EvalRule::Dense) => chosen + "; in evaluation, all of them",
        Some(EvalRule::TopK(k)) => format!("{chosen}; in evaluation, the {k} largest"),
    };
    let normalized = match spec.normalize_input {
        true => ", divided by `sqrt(mean(x^2) + 1e-6)`",
        false => "",
    };
    let own = match spec.own_experts {
        true => " A layer's softmax is over the experts that it has.",
        false => "",
    };
    format!(
        "{scope} It gives each token `softmax((x weight^T + bias) / {})` over the \
         experts{hidden}, where `x` is {reads}{averaged}{normalized}{chosen}.{own}",
        spec.temperature
    )
}
