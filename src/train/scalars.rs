//! A run's metrics as scalars for TensorBoard, each under a tag.
//!
//! Values are converted to f32; NaN and infinities stay as they are. `<site>` is a site's name, and
//! `<router>` that of a router without its `.router`; the number of the layer has two digits, so
//! that tags sort by layer. Both are `all_layers` where one router decides for all layers.
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
//! | `router/domain_supervision` | `domain_supervision` of a step |
//! | `router/domain_accuracy` | mean of a step's `domain_accuracy` over the routers |
//! | `router/<router>/domain_accuracy` | that of the router |
//! | `router/window/dead_share`, `/mutual_information` | the same of a window's `routing` |
//! | `router/<site>/expert_<e>/mean_weight`, `/load` | of a window's `routing`, at the site |
//! | `router/<site>/largest_share` | largest mean routing weight of an expert at the site |
//! | `router/<site>/entropy` | `routing_entropy` of the site |
//! | `router/<site>/dead_share`, `/mutual_information` | the same of the site |
//! | `router_by_domain/<site>/<domain>/expert_<e>` | a window's `site_routing_weights` |
//! | `router_by_domain/all/<domain>/expert_<e>` | a window's `domain_routing_weights` |
//! | `data/mix/<domain>` | the domain's realised share of the blocks so far |
//! | `validation/loss`, `validation/loss/<domain>` | `loss`, `domain_losses` |
//! | `validation/token_loss` | `token_loss` |
//! | `validation/router/..` | as the tag `router/..` of a step, on the validation sets |
//! | `validation/router/mutual_information` | `mutual_information` on the validation sets |
//! | `validation/router/domain_accuracy/<domain>` | `accuracy_by_domain` |
//! | `validation/router_by_domain/all/<domain>/expert_<e>` | `domain_routing_weights` |

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
            ("router/domain_supervision", self.domain_supervision),
            ("train/orthogonality", self.orthogonality),
        ];
        scalars.extend(others.into_iter().filter_map(|(tag, v)| Some(scalar(tag, v?))));
        scalars.extend(routing("router", self.routing_entropy, self.expert_load.as_deref()));
        scalars.extend(accuracies("router", &self.domain_accuracy));
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
        scalars.extend(by_domain("router_by_domain/all", 0.., &self.domain_routing_weights));
        for site in &routing.sites {
            let name = in_tags(&site.site);
            let values = [
                ("largest_share", site.largest().1),
                ("entropy", site.routing_entropy),
                ("dead_share", site.dead_share()),
                ("mutual_information", site.mutual_information.unwrap_or(0.0)),
            ];
            let tag = |(key, value)| scalar(&format!("router/{name}/{key}"), value);
            scalars.extend(values.map(tag));
            let means = site.mean_routing_weights.iter().zip(&site.expert_load);
            for (expert, (&weight, &load)) in site.experts.iter().zip(means) {
                let tag = |key| format!("router/{name}/expert_{expert}/{key}");
                scalars.extend([scalar(&tag("mean_weight"), weight), scalar(&tag("load"), load)]);
            }
            if let Some(weights) = self.site_routing_weights.get(&site.site) {
                let prefix = format!("router_by_domain/{name}");
                scalars.extend(by_domain(&prefix, site.experts.iter().copied(), weights));
            }
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
        let others = [
            ("validation/router/mutual_information", self.mutual_information),
            ("validation/router/domain_supervision", self.domain_supervision),
        ];
        scalars.extend(others.into_iter().filter_map(|(tag, v)| Some(scalar(tag, v?))));
        scalars.extend(accuracies("validation/router", &self.domain_accuracy));
        scalars.extend(named("validation/router/domain_accuracy", &self.accuracy_by_domain));
        let weights = &self.domain_routing_weights;
        scalars.extend(by_domain("validation/router_by_domain/all", 0.., weights));
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

/// The accuracy of each router, and the mean over the routers.
fn accuracies(prefix: &str, by_router: &BTreeMap<String, f64>) -> Vec<(String, f32)> {
    let mean = by_router.values().sum::<f64>() / by_router.len() as f64;
    let all = (!by_router.is_empty()).then(|| scalar(&format!("{prefix}/domain_accuracy"), mean));
    let of_router = |(name, &value): (&String, &f64)| {
        let router = name.strip_suffix(".router").unwrap_or("all layers");
        scalar(&format!("{prefix}/{}/domain_accuracy", in_tags(router)), value)
    };
    all.into_iter().chain(by_router.iter().map(of_router)).collect()
}

/// The mean weight of each of `experts` on each domain.
fn by_domain(
    prefix: &str,
    experts: impl Iterator<Item = usize> + Clone,
    weights: &BTreeMap<String, Vec<f64>>,
) -> Vec<(String, f32)> {
    let of_domain = |(domain, weights): (&String, &Vec<f64>)| -> Vec<(String, f32)> {
        let tag = |expert| format!("{prefix}/{domain}/expert_{expert}");
        experts.clone().zip(weights).map(|(e, &weight)| scalar(&tag(e), weight)).collect()
    };
    weights.iter().flat_map(of_domain).collect()
}

/// A site's name as a part of tags: `h.3.attn.c_attn` is `h.03.attn.c_attn`, and `all layers` is
/// `all_layers`.
pub(super) fn in_tags(site: &str) -> String {
    let part = |part: &str| match part.parse::<u32>() {
        Ok(layer) => format!("{layer:02}"),
        Err(_) => part.replace(' ', "_"),
    };
    site.split('.').map(part).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::super::metrics::Metrics;
    use super::super::metrics::samples::{train, validation, window};

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

    #[test]
    fn a_window_has_a_scalar_for_each_router_domain_and_expert() {
        let mut tags: Vec<_> = window(1).scalars().into_iter().map(|(tag, _)| tag).collect();
        let of = |prefix: &str, tags: &[String]| -> Vec<String> {
            let rest = tags.iter().filter_map(|tag| tag.strip_prefix(prefix));
            rest.map(str::to_owned).collect()
        };
        tags.sort();
        let figures = ["dead_share", "entropy"];
        let of_expert = ["expert_0/load", "expert_0/mean_weight"];
        let last = ["expert_2/load", "expert_2/mean_weight"];
        let others = ["largest_share", "mutual_information"];
        let expected = [figures, of_expert, last, others].concat();
        assert_eq!(of("router/h.11/", &tags), expected);
        let of_law = ["all/law/expert_0", "all/law/expert_1", "all/law/expert_2"];
        assert_eq!(of("router_by_domain/", &tags)[..3], of_law);
        let of_medicine = ["expert_0", "expert_1", "expert_2"];
        assert_eq!(of("router_by_domain/h.00/medicine/", &tags), of_medicine);
        assert_eq!(of("router_by_domain/h.11/law/", &tags), ["expert_0", "expert_2"]);
        assert_eq!(tags.len(), 2 + 2 + 6 + (4 + 6 + 6) + (4 + 4 + 4));

        let scalars = window(1).scalars();
        for scalar in [
            ("router_by_domain/h.00/law/expert_0", 1.0),
            ("router_by_domain/h.00/law/expert_2", 0.0),
            ("router_by_domain/all/medicine/expert_2", 0.75),
            ("router/h.00/expert_1/mean_weight", 0.0),
            ("router/h.11/expert_2/load", 0.5),
        ] {
            assert!(scalars.contains(&(scalar.0.to_owned(), scalar.1)), "{scalar:?}: {scalars:?}");
        }
    }

    #[test]
    fn the_accuracy_has_a_scalar_for_each_router_and_their_mean() {
        let Metrics::Train(mut step) = train(1) else { unreachable!() };
        step.domain_supervision = Some(0.25);
        step.domain_accuracy =
            [("h.3.attn.c_attn.router".into(), 0.5), ("layers.11.router".into(), 1.0)].into();
        let scalars = Metrics::Train(step.clone()).scalars();
        for (tag, value) in [
            ("router/domain_supervision", 0.25),
            ("router/domain_accuracy", 0.75),
            ("router/h.03.attn.c_attn/domain_accuracy", 0.5),
            ("router/layers.11/domain_accuracy", 1.0),
        ] {
            assert!(scalars.contains(&(tag.to_owned(), value)), "{tag}: {scalars:?}");
        }
        let Metrics::Validation(mut pass) = validation(2) else { unreachable!() };
        pass.domain_accuracy = [("router".into(), 0.5)].into();
        pass.accuracy_by_domain = [("law".into(), 0.25)].into();
        let scalars = Metrics::Validation(pass).scalars();
        for (tag, value) in [
            ("validation/router/domain_accuracy", 0.5),
            ("validation/router/all_layers/domain_accuracy", 0.5),
            ("validation/router/domain_accuracy/law", 0.25),
        ] {
            assert!(scalars.contains(&(tag.to_owned(), value)), "{tag}: {scalars:?}");
        }
    }
}
