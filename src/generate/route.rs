//! What decides the routing of a generated text, as a user names it.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, anyhow, bail};

use super::request::Route;
use crate::config::{Config, DomainConfig, DomainExperts, RoutingChoice};

/// What decides the routing weights of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RouteChoice {
    /// The router.
    Router,
    /// Weight 1 / E for each expert.
    Uniform,
    /// Weight 1 for each expert.
    All,
    /// Weight 1 for this expert.
    Expert(i64),
    /// Weight 1 for the expert of this domain, or even shares of it for several.
    Domain(String),
    /// The base alone.
    None,
}

impl FromStr for RouteChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let domain = text.strip_prefix("domain:").filter(|name| !name.is_empty());
        if let Some(name) = domain {
            return Ok(Self::Domain(name.to_owned()));
        }
        // all choices of a run but those that need a record
        text.parse().and_then(Self::of_training).map_err(|_| {
            anyhow!(
                "must be `router`, `uniform`, `all`, `expert:N`, `domain:NAME` or `none`, got \
                 `{text}`"
            )
        })
    }
}

impl fmt::Display for RouteChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Router => f.write_str("router"),
            Self::Uniform => f.write_str("uniform"),
            Self::All => f.write_str("all"),
            Self::Expert(expert) => write!(f, "expert:{expert}"),
            Self::Domain(name) => write!(f, "domain:{name}"),
            Self::None => f.write_str("none"),
        }
    }
}

impl RouteChoice {
    /// The choice that goes with what decided the weights in training, `trained`.
    ///
    /// # Errors
    /// A training whose records or domains decided: a text alone says neither.
    pub fn of_training(trained: RoutingChoice) -> Result<Self> {
        Ok(match trained {
            RoutingChoice::Router => Self::Router,
            RoutingChoice::Uniform => Self::Uniform,
            RoutingChoice::All => Self::All,
            RoutingChoice::Expert(expert) => Self::Expert(expert),
            RoutingChoice::None => Self::None,
            RoutingChoice::Record => bail!(
                "the mixture was trained with the expert that each record names, and a text names \
                 none\nhint: `--routing expert:N`"
            ),
            RoutingChoice::Domain => bail!(
                "the mixture was trained with the experts of each record's domain, and a text has \
                 none\nhint: `--routing domain:NAME`"
            ),
        })
    }

    /// The route over `num_experts` experts.
    ///
    /// - `config`: that of the run, which says the experts of domains
    ///
    /// # Errors
    /// An expert or a domain that does not exist, and a choice that needs experts where there are
    /// none.
    pub fn route(&self, num_experts: i64, config: Option<&Config>) -> Result<Route> {
        let every = |weight: f64| Route::Fixed(vec![weight; num_experts as usize]);
        match self {
            Self::None => return Ok(every(0.0)),
            Self::Router if num_experts == 0 => return Ok(every(0.0)),
            Self::Router => return Ok(Route::Router),
            _ if num_experts == 0 => bail!("a base has no experts to route by `{self}`"),
            _ => {}
        }
        let of = |experts: &[i64]| {
            let share = 1.0 / experts.len() as f64;
            let weight = |expert: i64| if experts.contains(&expert) { share } else { 0.0 };
            Route::Fixed((0..num_experts).map(weight).collect())
        };
        match self {
            Self::Expert(expert) if !(0..num_experts).contains(expert) => {
                bail!("there is no `{self}`, the model has {num_experts} expert(s)")
            }
            Self::Expert(expert) => Ok(of(&[*expert])),
            Self::Uniform => Ok(every(1.0 / num_experts as f64)),
            Self::Domain(name) => Ok(of(experts_of(name, config)?.experts())),
            _ => Ok(every(1.0)),
        }
    }
}

/// The experts of a domain.
fn experts_of<'a>(name: &str, config: Option<&'a Config>) -> Result<&'a DomainExperts> {
    let Some(config) = config else {
        bail!("`domain:{name}` needs a run, whose config says the experts of its domains");
    };
    let domains = &config.data.domains;
    let list = |domains: &[&DomainConfig]| {
        let names = domains.iter().map(|domain| format!("`{}`", domain.name));
        names.collect::<Vec<_>>().join(", ")
    };
    let Some(domain) = domains.iter().find(|domain| domain.name == name) else {
        let all: Vec<&DomainConfig> = domains.iter().collect();
        bail!("the run has no domain `{name}`, only {}", list(&all));
    };
    match &domain.expert {
        Some(experts) => Ok(experts),
        None => bail!("the domain `{name}` has no expert of its own"),
    }
}
