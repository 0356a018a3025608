//! Model cards: the `README.md` of what is written, as the Hub shows it.
//!
//! ```text
//! ---
//! base_model, library_name, license, pipeline_tag, tags      YAML for the Hub, as JSON's strings
//! ---
//! what it is, its experts, its routing, scores and data by domain, how to load it, its licence
//! ```
//!
//! A card names no folder of the machine that wrote it.

use super::describe::{describe, describe_router};
use super::markdown::{code, code_in_table};
use super::training::Training;
use crate::base::Base;
use crate::config::RoutingChoice;
use crate::model::RoutedModel;
use crate::model::experts::spec::{ExpertSpec, part_name};
use crate::peft::adapter::Adapter;

/// The file of a model card.
pub(super) const CARD: &str = "README.md";
/// The words by which a model card says that dylora wrote it. The version follows them.
pub(super) const BY_DYLORA: &str = "by dylora ";

/// What a model comes from, in words for others.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Origin {
    /// The base's name, which is no path: [`Base::name`].
    pub base_label: String,
    /// The base's repository on the Hub, if it is known.
    pub base_repo: Option<String>,
    /// The base's licence as the Hub names it, if it is known.
    pub licence: Option<String>,
    /// The training; `None` if there is no checkpoint.
    pub training: Option<Training>,
}

impl Origin {
    /// A model on `base`.
    pub fn new(base: &Base, training: Option<Training>) -> Self {
        let (base_label, base_repo) = (base.name(), base.repo());
        Self { base_label, base_repo, licence: base.licence(), training }
    }
}

/// What an export says about its origin.
#[derive(Debug, Clone, PartialEq)]
pub struct Provenance {
    /// The name by which `from_pretrained` finds the base.
    pub base_name: String,
    /// The base's revision on the Hub.
    pub revision: Option<String>,
    /// BLAKE3 of the base's parameters in f32.
    pub base_hash: String,
    /// The dropout of the experts' inputs in training.
    pub dropout: f64,
    /// What decided the routing weights in training.
    pub routing: RoutingChoice,
    /// What a model card says of it.
    pub origin: Origin,
}

/// What a folder holds, as far as its card is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// PEFT adapters, joined by `dylora.json`.
    Dylora,
    /// An X-LoRA folder.
    Xlora,
    /// LoRA adapters for llama.cpp.
    GgufExperts,
    /// One PEFT adapter.
    PeftAdapter,
    /// One LoRA adapter for llama.cpp.
    GgufAdapter,
    /// A whole model for transformers.
    HuggingFace,
    /// A whole model for llama.cpp.
    GgufModel,
}

impl Form {
    fn library(self) -> &'static str {
        match self {
            Self::Dylora | Self::Xlora | Self::PeftAdapter => "peft",
            Self::HuggingFace => "transformers",
            Self::GgufExperts | Self::GgufAdapter | Self::GgufModel => "gguf",
        }
    }

    fn is_adapter(self) -> bool {
        !matches!(self, Self::HuggingFace | Self::GgufModel)
    }

    /// How programs load it: text and code.
    fn loads(self, base: &str, facts: LoadFacts) -> String {
        let python = |code: &str| format!("```python\n{code}\n```\n");
        let base_of = format!(
            "from transformers import AutoModelForCausalLM\n\nbase = \
             AutoModelForCausalLM.from_pretrained(\"{base}\")"
        );
        let peft = |folder: &str| {
            python(&format!(
                "from peft import PeftModel\n{base_of}\nmodel = \
                 PeftModel.from_pretrained(base, \"{folder}\")"
            ))
        };
        match self {
            Self::Dylora => facts.loads(base, &peft("FOLDER/expert_0")),
            Self::Xlora => format!(
                "Each folder in `adapters` is a PEFT adapter, and `xlora_config.json` joins them \
                 as X-LoRA does. One expert alone in PEFT:\n\n{}",
                peft("FOLDER/adapters/expert_0")
            ),
            Self::PeftAdapter => peft("FOLDER"),
            Self::GgufExperts => format!(
                "llama.cpp has no routing. It puts experts on the base, written by `dylora merge \
                 --base \"{base}\" --format gguf --out base`, with weights that are the same for \
                 every token:\n\n```sh\nllama-cli -m base/model.gguf --lora \
                 expert_0.gguf{}\n```\n",
                if facts.has_shared { " --lora shared.gguf" } else { "" }
            ),
            Self::GgufAdapter => {
                "```sh\nllama-cli -m BASE.gguf --lora adapter.gguf\n```\n".to_owned()
            }
            Self::GgufModel => "```sh\nllama-cli -m model.gguf\n```\n".to_owned(),
            Self::HuggingFace => python(
                "from transformers import AutoModelForCausalLM\n\nmodel = \
                 AutoModelForCausalLM.from_pretrained(\"FOLDER\")",
            ),
        }
    }
}

/// What the code that loads a mixture depends on.
#[derive(Debug, Clone, Copy, Default)]
struct LoadFacts {
    /// Whether there is a part that is always on.
    has_shared: bool,
    /// What decided the weights in training, if a text alone does not say that.
    untold: Option<RoutingChoice>,
}

impl LoadFacts {
    fn new(has_shared: bool, routing: RoutingChoice) -> Self {
        let is_untold = matches!(routing, RoutingChoice::Record | RoutingChoice::Domain);
        Self { has_shared, untold: is_untold.then_some(routing) }
    }

    /// How transformers, PEFT and dylora load an export.
    ///
    /// - `expert`: the code for one expert
    fn loads(self, base: &str, expert: &str) -> String {
        let (note, python, option) = match self.untold {
            None => (String::new(), "", ""),
            Some(routing) => (
                format!(
                    " A text alone does not say its {routing}, by which the experts were trained: \
                     the routing names one of them."
                ),
                ", routing=\"expert:0\"",
                " --routing expert:0",
            ),
        };
        format!(
            "All of it in transformers and PEFT, with the program `dylora_peft.py` of this \
             folder.{note}\n\n```python\nfrom dylora_peft import load_mixture\n\nmodel = \
             load_mixture(\"FOLDER\", \"{base}\"{python})\n```\n\nOne expert alone in \
             PEFT:\n\n{expert}\nAll of it in dylora:\n\n```sh\ndylora generate --base \"{base}\" \
             --adapters FOLDER{option} --prompt \"..\"\n```\n"
        )
    }
}

/// The front matter of a card.
fn head(origin: &Origin, form: Form) -> String {
    // a string of JSON is one of YAML, too
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let mut lines = vec![];
    if let Some(repo) = &origin.base_repo {
        lines.push(format!("base_model: {}", text(repo)));
        let relation = if form.is_adapter() { "adapter" } else { "finetune" };
        lines.push(format!("base_model_relation: {relation}"));
    }
    lines.push(format!("library_name: {}", form.library()));
    lines.extend(origin.licence.as_ref().map(|licence| format!("license: {}", text(licence))));
    lines.push("pipeline_tag: text-generation".into());
    lines.push("tags:\n- lora\n- dylora".into());
    if form.library() == "gguf" {
        lines.push("- gguf".into());
    }
    format!("---\n{}\n---\n\n", lines.join("\n"))
}

/// The base's name as a card shows it.
fn label(origin: &Origin) -> String {
    match origin.base_label.contains(' ') {
        true => origin.base_label.clone(),
        false => code(&origin.base_label),
    }
}

/// The sections that every card ends with: the data and scores, and those of [`usage`].
fn tail(origin: &Origin, form: Form) -> String {
    scores(origin) + &usage(origin, form, LoadFacts::default())
}

/// How to load it, and its licence.
fn usage(origin: &Origin, form: Form, facts: LoadFacts) -> String {
    let base = origin.base_repo.as_deref().unwrap_or("BASE");
    let licence = match &origin.licence {
        Some(licence) => format!("The base's licence is `{licence}`."),
        None => "The base's licence is not known here. It applies to what is made from it.".into(),
    };
    format!("## How to load it\n\n{}\n## Licence\n\n{licence}\n", form.loads(base, facts))
}

/// The data and the scores by domain.
fn scores(origin: &Origin) -> String {
    let Some(training) = origin.training.as_ref() else { return String::new() };
    let number = |loss: Option<f64>| match loss {
        Some(loss) => format!("{loss:.4} | {:.2}", loss.exp()),
        None => "not measured | ".into(),
    };
    let rows: String = training
        .domains
        .iter()
        .map(|domain| {
            let name = code_in_table(&domain.name);
            format!("| {name} | {} | {} |\n", domain.blocks, number(domain.loss))
        })
        .collect();
    let mean = match training.domains.len() {
        0 | 1 => String::new(),
        _ => format!("| mean | | {} |\n", number(training.loss)),
    };
    format!(
        "## Data and scores\n\nTrained for {} steps on {} target tokens, in blocks of {} tokens. \
         The losses are those on held-out data after the last of these steps, in nats a \
         token.\n\n| domain | blocks trained on | loss | perplexity \
         |\n|---|--:|--:|--:|\n{rows}{mean}\n",
        training.step, training.target_tokens, training.seq_len
    )
}

fn domain_line(origin: &Origin) -> String {
    let domains = origin.training.iter().flat_map(|training| &training.domains);
    let domains: Vec<String> = domains.map(|domain| code(&domain.name)).collect();
    match domains.is_empty() {
        true => String::new(),
        false => format!("- trained on: {}\n", domains.join(", ")),
    }
}

/// The domains of an expert in words: `, the expert of `law``; nothing if it has none.
fn own_domains(origin: &Origin, name: &str) -> String {
    let domains = origin.training.iter().flat_map(|training| &training.domains);
    let has = |expert: &i64| format!("expert_{expert}") == name;
    let own = domains.filter(|domain| domain.experts.iter().any(has));
    let own: Vec<String> = own.map(|domain| code(&domain.name)).collect();
    if own.is_empty() { String::new() } else { format!(", the expert of {}", own.join(", ")) }
}

/// The card of one expert of a mixture, in its own folder `name`.
///
/// - `has_shared`: whether the mixture has a part that is always on
pub(super) fn of_expert(
    spec: &ExpertSpec,
    num_experts: usize,
    has_shared: bool,
    name: &str,
    provenance: &Provenance,
) -> String {
    let label = label(&provenance.origin);
    let (is, note) = match (num_experts, provenance.routing) {
        _ if spec.shared => (
            format!("The part that is always on in a mixture on {label}"),
            "Each token gets this adapter at weight 1, beside the routed experts.\n\n".to_owned(),
        ),
        (1, _) => (format!("A LoRA adapter on {label}"), String::new()),
        (count, routing) => {
            let how = match routing {
                RoutingChoice::Router => "token by token with a router".to_owned(),
                routing => format!("by `{routing}`"),
            };
            let note = format!(
                "This adapter is one expert at weight 1. The mixture weights the experts {how}, so \
                 that one expert alone gives other outputs than the mixture.\n\n"
            );
            let own = own_domains(&provenance.origin, name);
            (format!("One of {count} LoRA experts of a mixture on {label}{own}"), note)
        }
    };
    // the scores of a mixture are not those of one expert
    let tail = match num_experts {
        1 if !spec.shared => tail(&provenance.origin, Form::PeftAdapter),
        _ => usage(&provenance.origin, Form::PeftAdapter, LoadFacts::default()),
    };
    let lacks = match has_shared && !spec.shared {
        true => {
            "It was trained beside `shared`, the part that is always on, and lacks it. `dylora \
             merge --weights expert:N --as adapter` joins the two into one adapter.\n\n"
        }
        false => "",
    };
    format!(
        "{head}# {name}\n\n{is}, {BY_DYLORA}{version}.\n\n- {shape}\n{domains}\n{note}{lacks}\
         {tail}",
        head = head(&provenance.origin, Form::PeftAdapter),
        version = env!("CARGO_PKG_VERSION"),
        shape = describe(spec),
        domains = domain_line(&provenance.origin),
    )
}

/// What decides the routing weights of a mixture.
fn routing(model: &RoutedModel, provenance: &Provenance) -> String {
    match model.routers().first() {
        _ if provenance.routing != RoutingChoice::Router => {
            let routing = provenance.routing;
            format!("It was trained with weights by `{routing}`, and its router was not trained.")
        }
        None => "There is one expert and no router: plain LoRA.".to_owned(),
        Some(_) => {
            let factor =
                provenance.origin.training.as_ref().map_or(0.0, |training| training.supervision);
            let supervision = match factor > 0.0 {
                true => format!(
                    " The domains of the training data supervised it, with the factor {factor}."
                ),
                false => String::new(),
            };
            describe_router(model.router_spec()) + &supervision
        }
    }
}

/// The card of a mixture.
///
/// - `adapters`: the parts as they are written, because PiSSA and OLoRA become LoRA of twice the
///   rank
pub(super) fn of_mixture(
    model: &RoutedModel,
    adapters: &[Adapter],
    provenance: &Provenance,
    form: Form,
) -> String {
    let experts: String = adapters
        .iter()
        .enumerate()
        .map(|(part, adapter)| {
            let name = part_name(model.specs(), part);
            let note = if adapter.spec.shared { ", always on" } else { "" };
            let own = own_domains(&provenance.origin, &name);
            format!("- `{name}`{own}: {}{note}\n", describe(&adapter.spec))
        })
        .collect();
    let title = match model.num_experts() {
        1 => "A LoRA adapter".to_owned(),
        count => format!("A mixture of {count} LoRA experts"),
    };
    let has_shared = adapters.iter().any(|adapter| adapter.spec.shared);
    let note = match (form, model.num_experts()) {
        (Form::GgufExperts, 2..) => {
            "The scores below are those of the mixture with its routing, which these files do not \
             have.\n\n"
        }
        _ => "",
    };
    let usage = usage(&provenance.origin, form, LoadFacts::new(has_shared, provenance.routing));
    format!(
        "{head}# {title}\n\nBy dylora {version} on {label}.\n\n\
         {experts}{domains}\n## Routing\n\nThe output of a target module is \
         `W x + b + sum_e g_e (E_e(x) - W x - b)`, `E_e` being expert e alone and `g` the \
         routing weights{shared}. {routing}\n\n{note}{scores}{usage}",
        head = head(&provenance.origin, form),
        shared = if has_shared { ", 1 for `shared`" } else { "" },
        version = env!("CARGO_PKG_VERSION"),
        label = label(&provenance.origin),
        domains = domain_line(&provenance.origin),
        routing = routing(model, provenance),
        scores = scores(&provenance.origin),
    )
}

/// The card of a mixture that was merged with the same weights for every token: those of all parts
/// of `model`, `[e]`.
///
/// - `adapter`: what it was merged into, if that is no base
pub(super) fn of_merged(
    model: &RoutedModel,
    adapter: Option<&Adapter>,
    provenance: &Provenance,
    weights: &[f64],
    form: Form,
) -> String {
    let weights: Vec<String> = weights
        .iter()
        .enumerate()
        .map(|(part, weight)| format!("`{}` {weight}", part_name(model.specs(), part)))
        .collect();
    let into = if adapter.is_some() { "joined into one adapter" } else { "merged into the base" };
    let shape = adapter.map(|adapter| format!("- {}\n", describe(&adapter.spec)));
    format!(
        "{head}# A static mixture of LoRA experts\n\nThe experts of a mixture {BY_DYLORA}{version} \
         on {label}, {into} with the same weights for every token: {weights}.\n\n{shape}\
         {domains}\nThe scores below are those of the mixture before its weights were \
         fixed.\n\n{tail}",
        head = head(&provenance.origin, form),
        version = env!("CARGO_PKG_VERSION"),
        label = label(&provenance.origin),
        weights = weights.join(", "),
        shape = shape.unwrap_or_default(),
        domains = domain_line(&provenance.origin),
        tail = tail(&provenance.origin, form),
    )
}

/// The card of a whole model without experts: a base that was trained, or that is written as it is.
pub fn of_base(origin: &Origin, form: Form) -> String {
    let is = match origin.training {
        Some(_) => "All parameters were trained",
        None => "The base as it is, written",
    };
    let label = &origin.base_label;
    format!(
        "{head}# {label}\n\n{is} {BY_DYLORA}{version}.\n\n{tail}",
        head = head(origin, form),
        version = env!("CARGO_PKG_VERSION"),
        tail = tail(origin, form),
    )
}
