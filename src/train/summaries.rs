//! What TensorBoard shows of a run beside scalars.
//!
//! | TensorBoard tag | what it is |
//! |---|---|
//! | `config` | a text: the resolved config in TOML |
//! | `validation/router_by_domain` | an image: each expert's mean routing weight on each domain |
//! | `validation/router_by_domain/<domain>` | an image: the same at each of several sites |
//! | `validation/router/weight/expert_<e>` | a histogram of the expert's routing weights |
//!
//! A histogram is over the label tokens of the validation sets and the sites that have the expert.

use anyhow::Result;

use super::heat_image::HeatImage;
use super::tensorboard::{HistogramProto, Value};
use crate::config::{self, Config};
use crate::eval::{DomainReport, EvalReport, NUM_BUCKETS, RoutingReport, WeightHistogram};

/// The tag of the heat maps.
const BY_DOMAIN: &str = "validation/router_by_domain";

/// The config as Markdown.
pub fn config(config: &Config) -> Value {
    Value::text("config", format!("```toml\n{}\n```", config::load::to_toml(config).trim_end()))
}

/// The heat maps and histograms of an evaluation; empty without a router.
pub fn evaluation(report: &EvalReport) -> Result<Vec<Value>> {
    let domains: Vec<(&DomainReport, &RoutingReport)> = report
        .domains
        .iter()
        .filter_map(|domain| Some((domain, domain.routing.as_ref()?)))
        .collect();
    let Some((_, first)) = domains.first() else { return Ok(vec![]) };
    let columns = first.mean_routing_weights.len();
    let image = |tag: String, map: &HeatImage| -> Result<Value> {
        let (size, png) = map.png()?;
        Ok(Value::image(tag, size, png))
    };
    let all = |weights: &[f64]| weights.iter().copied().map(Some).collect();
    let rows = domains
        .iter()
        .map(|(domain, routing)| (domain.name.clone(), all(&routing.mean_routing_weights)));
    let map = HeatImage { columns, rows: rows.collect() };
    let mut values = vec![image(BY_DOMAIN.to_owned(), &map)?];
    for (domain, routing) in domains.iter().filter(|(_, routing)| routing.sites.len() > 1) {
        let map = HeatImage { columns, rows: sites(routing, columns) };
        values.push(image(format!("{BY_DOMAIN}/{}", domain.name), &map)?);
    }
    for (expert, histogram) in report.weight_histograms.iter().enumerate() {
        if let Some(histogram) = histogram {
            let tag = format!("validation/router/weight/expert_{expert}");
            values.push(Value::histogram(tag, proto(histogram)));
        }
    }
    Ok(values)
}

/// A row for each site, in which an expert that the site lacks is `None`.
fn sites(routing: &RoutingReport, num_experts: usize) -> Vec<(String, Vec<Option<f64>>)> {
    let of = |site: &crate::eval::SiteReport| {
        let mut cells = vec![None; num_experts];
        for (&expert, &weight) in site.experts.iter().zip(&site.mean_routing_weights) {
            cells[expert] = Some(weight);
        }
        (site.site.clone(), cells)
    };
    routing.sites.iter().map(of).collect()
}

/// A histogram without the empty buckets at its ends.
fn proto(histogram: &WeightHistogram) -> HistogramProto {
    let WeightHistogram { range: [min, max], sum, sum_squares, counts } = histogram;
    let is_filled = |&count: &f64| count > 0.0;
    let first = counts.iter().position(is_filled).unwrap_or(0);
    let last = counts.iter().rposition(is_filled).unwrap_or(0);
    let width = 1.0 / NUM_BUCKETS as f64;
    HistogramProto {
        min: *min,
        max: *max,
        num: counts.iter().sum(),
        sum: *sum,
        sum_squares: *sum_squares,
        bucket_limit: (first..=last).map(|bucket| (bucket + 1) as f64 * width).collect(),
        bucket: counts[first..=last].to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_begins_and_ends_with_a_filled_bucket() {
        let mut counts = vec![0.0; NUM_BUCKETS as usize];
        (counts[3], counts[5]) = (2.0, 1.0);
        let histogram = WeightHistogram { range: [0.1, 0.19], sum: 0.4, sum_squares: 0.06, counts };
        let proto = proto(&histogram);
        assert_eq!(proto.bucket, [2.0, 0.0, 1.0]);
        assert_eq!(proto.bucket_limit, [4.0 / 30.0, 5.0 / 30.0, 6.0 / 30.0]);
        assert_eq!((proto.min, proto.max, proto.num), (0.1, 0.19, 3.0));
    }
}
