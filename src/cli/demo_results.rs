//! The results of the demo: the losses of the base, a single LoRA and a mixture side by side, and
//! whether they are what the demo is meant to show.

use serde::Serialize;

use super::table;
use crate::eval::{DomainReport, EvalReport};

/// The least routing weight that a domain gives its own expert.
const OWN_WEIGHT: f64 = 0.6;

/// The losses of the three models.
#[derive(Debug, Serialize)]
pub struct Results {
    /// By domain, in the order of the config.
    pub domains: Vec<DomainResult>,
    /// The mean of the domains' losses, nats.
    pub mean: Losses,
    /// Mutual information of expert and domain in the mixture, nats.
    pub mutual_information: f64,
}

/// The results of one domain.
#[derive(Debug, Serialize)]
pub struct DomainResult {
    pub name: String,
    pub losses: Losses,
    /// Each expert's mean routing weight in the mixture.
    pub mean_routing_weights: Vec<f64>,
}

/// A loss of each model, nats.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Losses {
    pub base: f64,
    pub single_lora: f64,
    pub mixture: f64,
}

impl Results {
    /// The results of three evaluations on the same domains.
    pub fn new(base: &EvalReport, single: &EvalReport, mixture: &EvalReport) -> Self {
        let of = |(domain, base, single): (&DomainReport, f64, f64)| DomainResult {
            name: domain.name.clone(),
            losses: Losses { base, single_lora: single, mixture: domain.loss },
            mean_routing_weights: match &domain.routing {
                Some(routing) => routing.mean_routing_weights.clone(),
                None => vec![],
            },
        };
        let loss_in = |report: &EvalReport, name: &str| report.domain_losses().get(name).copied();
        let domains = mixture.domains.iter().map(|domain| {
            let [base, single] =
                [base, single].map(|report| loss_in(report, &domain.name).unwrap_or(f64::NAN));
            of((domain, base, single))
        });
        let routing = mixture.routing.as_ref();
        Self {
            domains: domains.collect(),
            mean: Losses { base: base.loss, single_lora: single.loss, mixture: mixture.loss },
            mutual_information: routing.and_then(|r| r.mutual_information).unwrap_or(0.0),
        }
    }

    /// What of the demo's promises does not hold; empty if all do.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = vec![];
        let mut owners = vec![];
        for DomainResult { name, losses, mean_routing_weights } in &self.domains {
            let by_weight = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
            let largest = mean_routing_weights.iter().enumerate().max_by(by_weight);
            if !is_below(losses.mixture, losses.base) {
                faults.push(format!("the mixture is not better than its base on {name}"));
            }
            match largest {
                Some((expert, &weight)) if weight >= OWN_WEIGHT => owners.push(expert),
                _ => faults.push(format!("no expert has {OWN_WEIGHT} of the weight on {name}")),
            }
        }
        let count = owners.len();
        owners.sort_unstable();
        owners.dedup();
        if owners.len() < count {
            faults.push("two domains have the same expert".into());
        }
        if !is_below(self.mean.mixture, self.mean.single_lora) {
            faults.push("the mixture is not better than a single LoRA of equal size".into());
        }
        faults
    }

    /// The results for people.
    pub fn text(&self) -> String {
        let row = |name: &str, losses: Losses, weights: &[f64]| {
            let numbers = [losses.base, losses.single_lora, losses.mixture];
            let weights: Vec<_> = weights.iter().map(|weight| format!("{weight:.2}")).collect();
            let mut row = vec![name.to_owned()];
            row.extend(numbers.map(|loss| format!("{loss:.3}")));
            row.push(weights.join(" "));
            row
        };
        let domains = self.domains.iter();
        let mut rows: Vec<_> =
            domains.map(|d| row(&d.name, d.losses, &d.mean_routing_weights)).collect();
        rows.push(row("mean", self.mean, &[]));
        let header = ["domain", "base", "single LoRA", "mixture", "weight of each expert"];
        let Losses { single_lora, mixture, .. } = self.mean;
        let difference = single_lora - mixture;
        let word = if difference >= 0.0 { "below" } else { "above" };
        format!(
            "Losses in nats a token, on validation data, and the mixture's routing weights:\n\n\
             {}\n\n\
             Expert and domain share {:.2} nats (mutual information). The mixture is\n\
             {:.3} nats {word} a single LoRA of equal size.",
            table::table(&header, rows),
            self.mutual_information,
            difference.abs(),
        )
    }
}

/// Whether a loss is below another. NaN is not.
fn is_below(loss: f64, other: f64) -> bool {
    loss < other
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(mixture: [f64; 2], weights: [[f64; 2]; 2]) -> Results {
        let of = |(i, name): (usize, &str)| DomainResult {
            name: name.into(),
            losses: Losses { base: 2.0, single_lora: 1.0, mixture: mixture[i] },
            mean_routing_weights: weights[i].to_vec(),
        };
        Results {
            domains: ["law", "verse"].into_iter().enumerate().map(of).collect(),
            mean: Losses {
                base: 2.0,
                single_lora: 1.0,
                mixture: mixture.iter().sum::<f64>() / 2.0,
            },
            mutual_information: 0.5,
        }
    }

    #[test]
    fn the_demos_promises_are_checked() {
        let apart = [[0.9, 0.1], [0.2, 0.8]];
        assert!(results([0.9, 0.95], apart).faults().is_empty());
        for (mixture, weights, expected) in [
            ([2.0, 0.9], apart, "the mixture is not better than its base on law"),
            ([f64::NAN, 0.9], apart, "the mixture is not better than its base on law"),
            ([1.0, 1.0], apart, "the mixture is not better than a single LoRA of equal size"),
            ([0.9, 0.9], [[0.5, 0.5], [0.1, 0.9]], "no expert has 0.6 of the weight on law"),
            ([0.9, 0.9], [[0.9, 0.1], [0.9, 0.1]], "two domains have the same expert"),
        ] {
            let faults = results(mixture, weights).faults();
            assert!(faults.contains(&expected.to_owned()), "{faults:?}");
        }
    }

    #[test]
    fn the_table_fits_80_columns() {
        let text = results([0.9, 0.95], [[0.9, 0.1], [0.2, 0.8]]).text();
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        insta::assert_snapshot!(text, @r"
        Losses in nats a token, on validation data, and the mixture's routing weights:

        | domain |  base | single LoRA | mixture | weight of each expert |
        |--------|-------|-------------|---------|-----------------------|
        | law    | 2.000 |       1.000 |   0.900 |             0.90 0.10 |
        | verse  | 2.000 |       1.000 |   0.950 |             0.20 0.80 |
        | mean   | 2.000 |       1.000 |   0.925 |                       |

        Expert and domain share 0.50 nats (mutual information). The mixture is
        0.075 nats below a single LoRA of equal size.
        ");
    }
}
