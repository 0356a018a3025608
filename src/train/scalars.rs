//! A run's metrics as scalars for TensorBoard, each under a tag.
//!
//! Values are converted to f32; NaN and infinities stay as they are.
//!
//! | TensorBoard tag | value |
//! |---|---|
//! | `train/loss`, `train/loss/<domain>` | `loss`, `domain_losses` |
//! | `train/grad_norm` | `grad_norm` |
//! | `train/learning_rate/<group>` | `learning_rates` |
//! | `train/tokens_per_sec` | `tokens_per_sec` |
//! | `train/peak_memory_gib` | `peak_memory_bytes / 2^30` |
//! | `train/orthogonality` | `orthogonality` |
//! | `router/load_balancing_loss`, `/uniform_mse` | the losses of the same name |
//! | `router/z_loss` | `router_z_loss` |
//! | `router/temperature`, `router/mature_experts` | `temperature`, `mature_experts` |
//! | `router/entropy`, `router/load/expert_<e>` | a step's `routing_entropy` and `expert_load` |
//! | `router/window/dead_share`, `/mutual_information` | the same of a window's `routing` |
//! | `router/window/<site>/largest_share` | largest mean routing weight of an expert at the site |
//! | `router/window/<site>/entropy` | `routing_entropy` of the site |
//! | `router/window/<site>/dead_share`, `/mutual_information` | the same of the site |
//! | `data/mix/<domain>` | the domain's realised share of the blocks so far |
//! | `validation/loss`, `validation/loss/<domain>` | `loss`, `domain_losses` |
//! | `validation/token_loss` | `token_loss` |
//! | `validation/router/entropy` | `routing_entropy` on the validation sets |
//! | `validation/router/load/expert_<e>` | `expert_load` on the validation sets |
//! | `validation/router/mutual_information` | `mutual_information` on the validation sets |

use std::collections::BTreeMap;

use super::metrics::{Metrics, StepMetrics, ValidationMetrics, WindowMetrics};

const BYTES_PER_GIB: f64 = (1_u64 << 30) as f64;

impl Metrics {
    /// The tags and values that are listed at the top of this file.
    pub(super) fn scalars(&self) -> Vec<(String, f32)> {
        match self {
            Self::Train(metrics) => metrics.scalars(),
            Self::Window(metrics) => metrics.scalars(),
            Self::Validation(metrics) => metrics.scalars(),
        }
    }
}

impl StepMetrics {
    fn scalars(&self) -> Vec<(String, f32)> {
        let mut scalars = vec![
            scalar("train/loss", self.loss),
            scalar("train/grad_norm", self.grad_norm),
            scalar("train/tokens_per_sec", self.tokens_per_sec),
            scalar("train/peak_memory_gib", self.peak_memory_bytes as f64 / BYTES_PER_GIB),
        ];
        scalars.extend(named("train/loss", &self.domain_losses));
        scalars.extend(named("train/learning_rate", &self.learning_rates));
        let others = [
            ("router/load_balancing_loss", self.load_balancing_loss),
            ("router/uniform_mse", self.uniform_mse),
            ("router/z_loss", self.router_z_loss),
            ("router/temperature", self.temperature),
            ("router/mature_experts", self.mature_experts.map(|count| count as f64)),
            ("train/orthogonality", self.orthogonality),
        ];
        scalars.extend(others.into_iter().filter_map(|(tag, v)| Some(scalar(tag, v?))));
        scalars.extend(routing("router", self.routing_entropy, self.expert_load.as_deref()));
        scalars
    }
}

impl WindowMetrics {
    fn scalars(&self) -> Vec<(String, f32)> {
        let realised = self.mix.iter().map(|(name, share)| (name.clone(), share.realised));
        let mut scalars: Vec<_> = named("data/mix", &realised.collect()).collect();
        let Some(routing) = &self.routing else { return scalars };
        scalars.extend([
            scalar("router/window/dead_share", routing.dead_share),
            scalar("router/window/mutual_information", routing.mutual_information.unwrap_or(0.0)),
        ]);
        for site in &routing.sites {
            let name = site.site.replace(' ', "_");
            let values = [
                ("largest_share", site.largest().1),
                ("entropy", site.routing_entropy),
                ("dead_share", site.dead_share()),
                ("mutual_information", site.mutual_information.unwrap_or(0.0)),
            ];
            let tag = |(key, value)| scalar(&format!("router/window/{name}/{key}"), value);
            scalars.extend(values.map(tag));
        }
        scalars
    }
}

impl ValidationMetrics {
    fn scalars(&self) -> Vec<(String, f32)> {
        let mut scalars = vec![
            scalar("validation/loss", self.loss),
            scalar("validation/token_loss", self.token_loss),
        ];
        scalars.extend(named("validation/loss", &self.domain_losses));
        let load = self.expert_load.as_deref();
        scalars.extend(routing("validation/router", self.routing_entropy, load));
        let information = self.mutual_information;
        scalars.extend(information.map(|v| scalar("validation/router/mutual_information", v)));
        scalars
    }
}

fn scalar(tag: &str, value: f64) -> (String, f32) {
    (tag.to_owned(), value as f32)
}

fn named(prefix: &str, values: &BTreeMap<String, f64>) -> impl Iterator<Item = (String, f32)> {
    values.iter().map(move |(name, &value)| (format!("{prefix}/{name}"), value as f32))
}

fn routing(
    prefix: &str,
    entropy: Option<f64>,
    load: Option<&[f64]>,
) -> impl Iterator<Item = (String, f32)> {
    let entropy = entropy.map(|value| (format!("{prefix}/entropy"), value as f32));
    let load = load.unwrap_or_default().iter().enumerate();
    entropy
        .into_iter()
        .chain(load.map(move |(e, &share)| (format!("{prefix}/load/expert_{e}"), share as f32)))
}

#[cfg(test)]
mod tests {
    use super::super::metrics::samples::{train, validation};

    #[test]
    fn tags_name_domains_groups_and_experts() {
        let mut tags: Vec<_> = train(1).scalars().into_iter().map(|(tag, _)| tag).collect();
        tags.extend(validation(2).scalars().into_iter().map(|(tag, _)| tag));
        tags.sort();
        let expected = [
            "router/entropy",
            "router/load/expert_0",
            "router/load/expert_1",
            "router/load/expert_2",
            "router/load_balancing_loss",
            "router/temperature",
            "router/uniform_mse",
            "router/z_loss",
            "train/grad_norm",
            "train/learning_rate/adapters",
            "train/learning_rate/router",
            "train/loss",
            "train/loss/law",
            "train/loss/medicine",
            "train/peak_memory_gib",
            "train/tokens_per_sec",
            "validation/loss",
            "validation/loss/law",
            "validation/loss/medicine",
            "validation/token_loss",
        ];
        assert_eq!(tags, expected);
        assert!(train(1).scalars().contains(&("train/peak_memory_gib".into(), 1.5)));
    }
}
