//! The metrics of a run: one JSON object a line in `metrics.jsonl`.
//!
//! ```text
//! {"kind":"train","step":1,"epoch":0.01,"tokens_seen":8192,"loss":3.21,...}
//! {"kind":"window","step":50,"window_steps":50,"mix":{..},"routing":{..}}
//! {"kind":"validation","step":1,"tokens_seen":8192,"loss":3.18,...}
//! ```
//!
//! JSON has no NaN and no infinities: such a value is written as `null` and read as NaN. A value
//! that does not apply, as those of the routing in a run without a router, has no key.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::eval::RoutingReport;

/// A line of `metrics.jsonl`. The key `kind` names the variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Metrics {
    /// One step.
    Train(StepMetrics),
    /// A window of steps: how its tokens were routed, and the mix of domains so far.
    Window(WindowMetrics),
    /// One pass over the validation sets.
    Validation(ValidationMetrics),
}

/// One step, over all of its micro-batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step's number, from 1.
    pub step: u64,
    /// Passes over the training set so far, with a fraction for the present one.
    #[serde(deserialize_with = "number")]
    pub epoch: f64,
    /// Target tokens trained on so far, including this step's.
    pub tokens_seen: u64,
    /// Mean loss over the step's label tokens, nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// The same for each domain that has label tokens in the step, by the domain's name.
    #[serde(deserialize_with = "numbers")]
    pub domain_losses: BTreeMap<String, f64>,
    /// Load-balancing loss without its factor, 1 when even; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub load_balancing_loss: Option<f64>,
    /// Mean squared distance of the mean routing_probs from 1 / E, without its factor; absent
    /// without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub uniform_mse: Option<f64>,
    /// Mean squared logsumexp of the router's scores, without its factor; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub router_z_loss: Option<f64>,
    /// Mean entropy of the routing probabilities, nats; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub routing_entropy: Option<f64>,
    /// Domain supervision without its factor, nats, as a mean over the sites; absent without it.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub domain_supervision: Option<f64>,
    /// Share of the step's tokens whose most probable expert is one of their domain's, by the
    /// router's name; empty without domain supervision.
    #[serde(default, deserialize_with = "numbers", skip_serializing_if = "BTreeMap::is_empty")]
    pub domain_accuracy: BTreeMap<String, f64>,
    /// Orthogonality loss without its factor; absent unless `lora.orthogonality` is set.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub orthogonality: Option<f64>,
    /// Share of assignments per expert `[e]`, sums to 1; absent without a router.
    #[serde(default, deserialize_with = "some_list", skip_serializing_if = "Option::is_none")]
    pub expert_load: Option<Vec<f64>>,
    /// Number of experts that are mature after the step; absent unless `router.hybrid` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mature_experts: Option<u64>,
    /// Temperature of the step's softmax over the scores; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// L2 norm of all gradients together, before clipping.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// The step's learning rate for each parameter group, by the group's name.
    #[serde(deserialize_with = "numbers")]
    pub learning_rates: BTreeMap<String, f64>,
    /// Target tokens of the step.
    pub label_tokens: u64,
    /// Wall-clock time from the launch of the step to its results, or from the results of the step
    /// before if it was launched ahead of them.
    #[serde(deserialize_with = "number")]
    pub step_secs: f64,
    /// Wall-clock time for which the device had nothing to do before the step. It begins with the
    /// end of the previous step, or of an evaluation or checkpoint after that, and ends when the
    /// step is in the device's queue (without a graph: when its first kernel is). Gaps within the
    /// step do not count. The device itself measures it for a step that was launched ahead.
    #[serde(default, deserialize_with = "number")]
    pub host_secs: f64,
    /// Positions of the step, padding included, per second of wall-clock time.
    #[serde(deserialize_with = "number")]
    pub tokens_per_sec: f64,
    /// The most memory that has been in use so far: of libtorch's allocator on CUDA, of the process
    /// on the CPU.
    pub peak_memory_bytes: u64,
}

/// A window of at most `router.window_steps` steps. It also ends with the seeding phase and with
/// the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowMetrics {
    /// The last step of the window.
    pub step: u64,
    /// Number of steps in the window.
    pub window_steps: u64,
    /// Each domain's share of all blocks so far, by the domain's name.
    pub mix: BTreeMap<String, MixShare>,
    /// Mean routing weight of each expert on each domain's tokens, by the domain's name; empty
    /// without a router.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub domain_routing_weights: BTreeMap<String, Vec<f64>>,
    /// The same at each site, by the site's name and then the domain's: the mean weight of each of
    /// the experts that the site's report in `routing` lists; empty without a router.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub site_routing_weights: BTreeMap<String, BTreeMap<String, Vec<f64>>>,
    /// How the window's label tokens were routed, in all and at each site; absent without a router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingReport>,
    /// Messages that say how the routing has collapsed. Empty if it has not collapsed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub collapse: Vec<String>,
}

/// A domain's share of the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MixShare {
    /// The share that `data.mixing` asks for.
    pub asked: f64,
    /// The share of the blocks so far.
    pub realised: f64,
}

/// One pass over the validation sets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidationMetrics {
    /// Number of steps done before the pass.
    pub step: u64,
    /// Target tokens trained on before the pass.
    pub tokens_seen: u64,
    /// Mean of the domains' losses, each of which counts the same, nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Mean loss over the label tokens of all domains, nats.
    #[serde(deserialize_with = "number")]
    pub token_loss: f64,
    /// Mean loss over a domain's label tokens, nats, by the domain's name.
    #[serde(deserialize_with = "numbers")]
    pub domain_losses: BTreeMap<String, f64>,
    /// Mean entropy of the routing probabilities, nats; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub routing_entropy: Option<f64>,
    /// Share of assignments per expert `[e]`, sums to 1; absent without a router.
    #[serde(default, deserialize_with = "some_list", skip_serializing_if = "Option::is_none")]
    pub expert_load: Option<Vec<f64>>,
    /// Mutual information of expert and domain, nats; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub mutual_information: Option<f64>,
    /// Domain supervision, nats, as a mean over the tokens of domains that have experts and over
    /// the sites; absent if there are none or no router decides.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub domain_supervision: Option<f64>,
    /// Share of the same tokens whose most probable expert is one of their domain's, by the
    /// router's name; empty likewise.
    #[serde(default, deserialize_with = "numbers", skip_serializing_if = "BTreeMap::is_empty")]
    pub domain_accuracy: BTreeMap<String, f64>,
    /// The same by the domain's name, as a mean over the sites; empty likewise.
    #[serde(default, deserialize_with = "numbers", skip_serializing_if = "BTreeMap::is_empty")]
    pub accuracy_by_domain: BTreeMap<String, f64>,
    /// Mean routing weight of each expert on each domain's label tokens, as a mean over the sites,
    /// by the domain's name; empty without a router.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub domain_routing_weights: BTreeMap<String, Vec<f64>>,
    /// Wall-clock time of the pass.
    #[serde(deserialize_with = "number")]
    pub eval_secs: f64,
}

/// Reads a number, or `null` as NaN.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn numbers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let values = BTreeMap::<String, Option<f64>>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

fn some_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer).map(Some)
}

fn some_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<f64>>, D::Error> {
    let values = Vec::<Option<f64>>::deserialize(deserializer)?;
    Ok(Some(values.into_iter().map(|value| value.unwrap_or(f64::NAN)).collect()))
}

impl Metrics {
    /// The number of steps done.
    pub fn step(&self) -> u64 {
        match self {
            Self::Train(metrics) => metrics.step,
            Self::Window(metrics) => metrics.step,
            Self::Validation(metrics) => metrics.step,
        }
    }
}

/// Metrics for the tests of this folder.
#[cfg(test)]
pub(super) mod samples {
    use super::*;
    use crate::eval::SiteReport;

    pub fn train(step: u64) -> Metrics {
        let loss = 4.0 - 0.1 * step as f64;
        Metrics::Train(StepMetrics {
            step,
            epoch: 0.25 * step as f64,
            tokens_seen: 900 * step,
            loss,
            domain_losses: [("law".into(), loss - 0.5), ("medicine".into(), loss + 0.5)].into(),
            load_balancing_loss: Some(1.0625),
            uniform_mse: Some(0.01),
            router_z_loss: Some(1.5),
            domain_supervision: None,
            domain_accuracy: BTreeMap::new(),
            orthogonality: None,
            mature_experts: None,
            temperature: Some(1.0),
            routing_entropy: Some(0.5),
            expert_load: Some(vec![0.25, 0.75, 0.0]),
            grad_norm: 0.7,
            learning_rates: [("adapters".into(), 1e-3), ("router".into(), 5e-4)].into(),
            label_tokens: 900,
            step_secs: 0.5,
            host_secs: 0.25,
            tokens_per_sec: 2048.0,
            peak_memory_bytes: 3 << 29,
        })
    }

    /// A window of two routers, of which the second lacks an expert.
    pub fn window(step: u64) -> Metrics {
        let of_site = |site: &str, experts: &[usize], weights: &[f64]| SiteReport {
            site: site.into(),
            experts: experts.to_vec(),
            mean_routing_weights: weights.to_vec(),
            expert_load: weights.iter().rev().copied().collect(),
            routing_entropy: 0.5,
            mutual_information: Some(0.25),
            dead_experts: vec![],
            domain_supervision: None,
            domain_accuracy: None,
        };
        let weights = |a: &[f64], b: &[f64]| -> BTreeMap<String, Vec<f64>> {
            [("law".into(), a.to_vec()), ("medicine".into(), b.to_vec())].into()
        };
        let share = MixShare { asked: 0.5, realised: 0.5 };
        Metrics::Window(WindowMetrics {
            step,
            window_steps: 2,
            mix: [("law".into(), share), ("medicine".into(), share)].into(),
            domain_routing_weights: weights(&[0.75, 0.0, 0.25], &[0.25, 0.0, 0.75]),
            site_routing_weights: [
                ("h.0".into(), weights(&[1.0, 0.0, 0.0], &[0.0, 0.0, 1.0])),
                ("h.11".into(), weights(&[0.5, 0.5], &[0.5, 0.5])),
            ]
            .into(),
            routing: Some(RoutingReport {
                mean_routing_weights: vec![0.5, 0.0, 0.5],
                expert_load: vec![0.5, 0.0, 0.5],
                routing_entropy: 0.5,
                mutual_information: Some(0.25),
                dead_share: 0.0,
                sites: vec![
                    of_site("h.0", &[0, 1, 2], &[0.5, 0.0, 0.5]),
                    of_site("h.11", &[0, 2], &[0.5, 0.5]),
                ],
            }),
            collapse: vec![],
        })
    }

    pub fn validation(step: u64) -> Metrics {
        Metrics::Validation(ValidationMetrics {
            step,
            tokens_seen: 900 * step,
            loss: 3.5,
            token_loss: 3.25,
            domain_losses: [("law".into(), 3.0), ("medicine".into(), 4.0)].into(),
            routing_entropy: None,
            expert_load: None,
            mutual_information: None,
            domain_supervision: None,
            domain_accuracy: BTreeMap::new(),
            accuracy_by_domain: BTreeMap::new(),
            domain_routing_weights: BTreeMap::new(),
            eval_secs: 1.5,
        })
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::samples::{train, validation, window};
    use super::*;

    #[test]
    fn metrics_survive_a_round_trip() -> Result<()> {
        for metrics in [train(3), window(4), validation(4)] {
            let line = serde_json::to_string(&metrics)?;
            assert_eq!(serde_json::from_str::<Metrics>(&line)?, metrics);
        }
        Ok(())
    }

    #[test]
    fn a_line_is_tagged_by_kind_and_leaves_out_what_does_not_apply() -> Result<()> {
        assert_eq!(
            serde_json::to_string(&validation(2))?,
            r#"{"kind":"validation","step":2,"tokens_seen":1800,"loss":3.5,"token_loss":3.25,"#
                .to_owned()
                + r#""domain_losses":{"law":3.0,"medicine":4.0},"eval_secs":1.5}"#
        );
        assert!(serde_json::to_string(&train(1))?.starts_with(r#"{"kind":"train","step":1,"#));
        Ok(())
    }

    #[test]
    fn a_value_that_is_not_finite_becomes_null_and_is_read_as_nan() -> Result<()> {
        let Metrics::Train(mut metrics) = train(1) else { unreachable!() };
        metrics.loss = f64::NAN;
        metrics.grad_norm = f64::INFINITY;
        metrics.domain_losses.insert("law".into(), f64::NAN);
        metrics.routing_entropy = Some(f64::NAN);
        metrics.expert_load = Some(vec![f64::NAN, 1.0]);
        let line = serde_json::to_string(&Metrics::Train(metrics))?;
        assert!(line.contains(r#""loss":null,"domain_losses":{"law":null,"#), "{line}");

        let Metrics::Train(metrics) = serde_json::from_str(&line)? else { unreachable!() };
        assert!(metrics.loss.is_nan() && metrics.grad_norm.is_nan());
        assert!(metrics.domain_losses["law"].is_nan());
        assert!(metrics.routing_entropy.is_some_and(f64::is_nan));
        assert!(metrics.expert_load.is_some_and(|load| load[0].is_nan() && load[1] == 1.0));
        Ok(())
    }
}
