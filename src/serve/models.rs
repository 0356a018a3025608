//! The names under which a mixture is offered: as a whole, each expert, and the base.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::error::ApiError;
use crate::chat_template::ChatTemplate;
use crate::config::{Config, DomainExperts, RoutingChoice};
use crate::data::Tokenizer;
use crate::generate::{GenerationDefaults, Route, RouteChoice};

/// What stands between the name of the mixture and that of a part.
const SEPARATOR: char = ':';
/// The base's name as a part.
const BASE: &str = "base";
/// The name of an expert as a part, in front of its number.
const EXPERT: &str = "expert-";

/// What a server knows of its model.
#[derive(Debug)]
pub struct ServedModel {
    /// The mixture's name.
    pub name: String,
    /// The base's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The base's chat template, if it has one.
    pub template: Option<Arc<ChatTemplate>>,
    /// What the base's files say about generation.
    pub defaults: GenerationDefaults,
    /// The run's config, if the model comes from a run. It gives the experts of domains.
    pub config: Option<Config>,
    /// What decided the routing weights in training.
    pub trained: RoutingChoice,
    /// Number of routed experts.
    pub num_experts: i64,
    /// Number of tokens that the base has.
    pub vocab_size: i64,
}

/// A model as a request names it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// The mixture, or a base without experts.
    Whole,
    /// An expert, the experts of a domain, or the base.
    Routed(RouteChoice),
}

impl ServedModel {
    /// The name of each expert: that of the domain which alone has it, or else its number.
    pub(crate) fn expert_names(&self) -> Vec<String> {
        let name = |expert: i64| {
            let mut own = self.domains().filter(|(_, experts)| experts.experts() == [expert]);
            match (own.next(), own.next()) {
                (Some((name, _)), None) => name.to_owned(),
                _ => format!("{EXPERT}{expert}"),
            }
        };
        (0..self.num_experts).map(name).collect()
    }

    /// The domains that have experts of their own, and whose names can be told from others.
    fn domains(&self) -> impl Iterator<Item = (&str, &DomainExperts)> {
        let domains = self.config.iter().flat_map(|config| &config.data.domains);
        let found =
            domains.filter_map(|domain| Some((domain.name.as_str(), domain.expert.as_ref()?)));
        found.filter(|(name, _)| *name != BASE && !name.starts_with(EXPERT))
    }

    /// The names of all models.
    pub fn names(&self) -> Vec<String> {
        let mut names = vec![self.name.clone()];
        if self.num_experts > 0 {
            let mut parts = self.expert_names();
            let others = self.domains().map(|(name, _)| name.to_owned());
            parts.extend(others.filter(|name| !parts.contains(name)).collect::<Vec<_>>());
            parts.push(BASE.to_owned());
            names.extend(parts.iter().map(|part| format!("{}{SEPARATOR}{part}", self.name)));
        }
        names
    }

    fn find(&self, model: &str) -> Option<Part> {
        if model == self.name {
            return Some(Part::Whole);
        }
        if self.num_experts == 0 {
            return None;
        }
        let part = model.strip_prefix(&self.name)?.strip_prefix(SEPARATOR)?;
        let number = part.strip_prefix(EXPERT).and_then(|number| number.parse().ok());
        let choice = match number {
            _ if part == BASE => RouteChoice::None,
            Some(expert) if (0..self.num_experts).contains(&expert) => RouteChoice::Expert(expert),
            Some(_) => return None,
            None => {
                let (name, _) = self.domains().find(|(name, _)| *name == part)?;
                RouteChoice::Domain(name.to_owned())
            }
        };
        Some(Part::Routed(choice))
    }

    fn find_or_refuse(&self, model: &str) -> Result<Part, ApiError> {
        self.find(model).ok_or_else(|| {
            let names: Vec<String> = self.names().iter().map(|name| format!("`{name}`")).collect();
            let message = format!("there is no model `{model}`, only {}", names.join(", "));
            let error = ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message);
            ApiError { param: Some("model".into()), ..error }
        })
    }

    /// What decides the routing weights of a text.
    ///
    /// - `model`: the name of the model in the request
    /// - `routing`: the request's own choice
    ///
    /// # Errors
    /// An unknown model or routing, a routing for a part of the mixture, and none for a mixture
    /// that was trained with what a text does not have.
    pub fn route(&self, model: &str, routing: Option<&str>) -> Result<Route, ApiError> {
        let fault =
            |error: anyhow::Error| ApiError::field("routing", format!("`routing`: {error}"));
        let choice = match (self.find_or_refuse(model)?, routing) {
            (Part::Whole, Some(routing)) => routing.parse().map_err(fault)?,
            (Part::Whole, None) if self.num_experts == 0 => RouteChoice::None,
            (Part::Whole, None) => RouteChoice::of_training(self.trained).map_err(|_| {
                let names = "`expert:N`, `domain:NAME`, `router`, `uniform` or `none`";
                let message = format!(
                    "the mixture was trained with the experts of each record or its domain, and a \
                     text has none: `routing` must be {names}"
                );
                ApiError::field("routing", message)
            })?,
            (Part::Routed(choice), None) => choice,
            (Part::Routed(_), Some(_)) => {
                let name = &self.name;
                let message = format!(
                    "the model `{model}` has a routing of its own: leave out `routing`, or name \
                     the model `{name}`"
                );
                return Err(ApiError::field("routing", message));
            }
        };
        choice.route(self.num_experts, self.config.as_ref()).map_err(fault)
    }

    /// All models, as `GET /v1/models` lists them.
    pub fn list(&self, started: SystemTime, context: usize) -> Value {
        let entries = self.names();
        let entries: Vec<Value> =
            entries.iter().map(|name| entry(name, started, context)).collect();
        json!({"object": "list", "data": entries})
    }

    /// One model, as `GET /v1/models/NAME` describes it.
    ///
    /// # Errors
    /// An unknown model.
    pub fn describe(
        &self,
        model: &str,
        started: SystemTime,
        context: usize,
    ) -> Result<Value, ApiError> {
        self.find_or_refuse(model)?;
        Ok(entry(model, started, context))
    }
}

fn entry(name: &str, started: SystemTime, context: usize) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": unix_seconds(started),
        "owned_by": "dylora",
        "max_model_len": context,
    })
}

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
