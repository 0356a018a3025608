//! Reports on routing: mutual information, dead experts, the largest share and collapse.

use dylora::config::RouterConfig;
use dylora::eval::RoutingReport;
use dylora::eval::routing::{self, RouterLosses, SiteTotals};
use proptest::prelude::*;

/// A site at which the tokens of domain g gave expert e the total weight `weights[g][e]`. A domain
/// has as many tokens as its weights sum to.
fn site<const E: usize>(name: &str, weights: &[[f64; E]]) -> SiteTotals {
    let tokens: Vec<f64> = weights.iter().map(|row| row.iter().sum()).collect();
    let probs = (0..E).map(|e| weights.iter().map(|row| row[e]).sum()).collect();
    let weights: Vec<Vec<f64>> = weights.iter().map(|row| row.to_vec()).collect();
    SiteTotals {
        site: name.into(),
        experts: (0..E).collect(),
        entropy: tokens.iter().map(|n| n * 0.5).collect(),
        tokens,
        probs,
        assignments: weights.clone(),
        weights,
        squared_lse: 0.0,
    }
}

fn information<const E: usize>(weights: &[[f64; E]]) -> f64 {
    site("x", weights).mutual_information()
}

#[test]
fn mutual_information_is_zero_if_every_domain_is_routed_alike() {
    assert_eq!(information(&[[1.0, 3.0], [1.0, 3.0]]), 0.0);
    // the sizes of the domains do not matter
    assert!(information(&[[1.0, 3.0], [10.0, 30.0], [0.5, 1.5]]) < 1e-15);
    // it is also zero with one domain or one expert
    assert_eq!(information(&[[2.0, 5.0, 1.0]]), 0.0);
    assert_eq!(information(&[[2.0], [5.0]]), 0.0);
}

#[test]
fn mutual_information_is_ln_d_with_an_expert_for_each_of_d_equal_domains() {
    assert!((information(&[[4.0, 0.0], [0.0, 4.0]]) - 2f64.ln()).abs() < 1e-15);
    let three = [[0.0, 7.0, 0.0], [7.0, 0.0, 0.0], [0.0, 0.0, 7.0]];
    assert!((information(&three) - 3f64.ln()).abs() < 1e-15);
    // with unequal domains it is their entropy
    let entropy = -(0.25 * 0.25f64.ln() + 0.75 * 0.75f64.ln());
    assert!((information(&[[1.0, 0.0], [0.0, 3.0]]) - entropy).abs() < 1e-15);
    // two experts for one domain give no more information than one
    assert!((information(&[[2.0, 2.0, 0.0], [0.0, 0.0, 4.0]]) - 2f64.ln()).abs() < 1e-15);
}

/// The joint distribution 3/8, 1/8; 1/8, 3/8 has even marginals and gives
/// `2 (3/8) ln(3/2) + 2 (1/8) ln(1/2)`.
#[test]
fn the_mutual_information_of_a_two_by_two_table_is_that_by_hand() {
    let by_hand = 0.75 * 1.5f64.ln() - 0.25 * 2f64.ln();
    assert!((information(&[[3.0, 1.0], [1.0, 3.0]]) - by_hand).abs() < 1e-15);
    // 1/2, 1/4; 0, 1/4 has the marginals 3/4, 1/4 and 1/2, 1/2
    let uneven = 0.5 * (4.0 / 3.0f64).ln() + 0.25 * (2.0 / 3.0f64).ln() + 0.25 * 2f64.ln();
    assert!((information(&[[2.0, 1.0], [0.0, 1.0]]) - uneven).abs() < 1e-15);
}

proptest! {
    /// It is `H(domain) + H(expert) - H(both)`, and within its bounds.
    #[test]
    fn mutual_information_is_the_sum_of_entropies_less_the_joint_one(
        weights in prop::collection::vec([0.01..9.0f64, 0.01..9.0, 0.0..9.0, 0.0..2.0], 1..4),
    ) {
        let total: f64 = weights.iter().flatten().sum();
        let entropy = |sums: &[f64]| -> f64 {
            let shares = sums.iter().map(|sum| sum / total).filter(|share| *share > 0.0);
            -shares.map(|share| share * share.ln()).sum::<f64>()
        };
        let domains: Vec<f64> = weights.iter().map(|row| row.iter().sum()).collect();
        let experts: Vec<f64> = (0..4).map(|e| weights.iter().map(|row| row[e]).sum()).collect();
        let both: Vec<f64> = weights.iter().flatten().copied().collect();
        let found = information(&weights);
        let expected = entropy(&domains) + entropy(&experts) - entropy(&both);
        prop_assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
        let most = entropy(&domains).min(4f64.ln()) + 1e-12;
        prop_assert!((0.0..=most).contains(&found), "{found} is not within 0 and {most}");
    }
}

fn report(totals: &[SiteTotals], domain: Option<usize>, dead_share: f64) -> RoutingReport {
    RoutingReport::new(totals, domain, dead_share).expect("there is a site with tokens")
}

#[test]
fn a_report_has_each_sites_figures_and_their_means() {
    let totals = [
        site("h.0", &[[6.0, 2.0, 0.0], [0.0, 6.0, 2.0]]),
        site("h.1", &[[4.0, 4.0, 0.0], [4.0, 4.0, 0.0]]),
    ];
    let all = report(&totals, None, 0.1);
    assert_eq!(all.sites[0].mean_routing_weights, [6.0 / 16.0, 0.5, 2.0 / 16.0]);
    assert_eq!(all.sites[0].expert_load, [6.0 / 16.0, 0.5, 2.0 / 16.0]);
    assert_eq!(all.sites[0].largest(), (1, 0.5));
    assert_eq!(all.sites[1].mean_routing_weights, [0.5, 0.5, 0.0]);
    assert_eq!(all.mean_routing_weights, [7.0 / 16.0, 0.5, 1.0 / 16.0]);
    assert_eq!(all.expert_load, [7.0 / 16.0, 0.5, 1.0 / 16.0]);
    assert_eq!(all.routing_entropy, 0.5);
    let first = totals[0].mutual_information();
    assert!(first > 0.1);
    assert_eq!(all.sites[0].mutual_information, Some(first));
    assert_eq!(all.mutual_information, Some(first / 2.0));
    assert_eq!((&all.sites[0].dead_experts, &all.sites[1].dead_experts), (&vec![], &vec![2]));
    assert_eq!((all.sites[1].dead_share(), all.dead_share), (1.0 / 3.0, 1.0 / 6.0));
}

#[test]
fn a_domains_row_is_of_its_tokens_alone() {
    let totals = [site("all layers", &[[6.0, 2.0, 0.0], [0.0, 3.0, 1.0], [0.0; 3]])];
    let first = report(&totals, Some(0), 0.1);
    assert_eq!(first.mean_routing_weights, [0.75, 0.25, 0.0]);
    assert_eq!(first.expert_load, [0.75, 0.25, 0.0]);
    assert_eq!((first.routing_entropy, first.mutual_information), (0.5, None));
    assert_eq!(first.sites[0].dead_experts, [2]);
    assert_eq!(report(&totals, Some(1), 0.1).mean_routing_weights, [0.0, 0.75, 0.25]);
    assert_eq!(RoutingReport::new(&totals, Some(2), 0.1), None, "a domain without tokens");
    assert_eq!(RoutingReport::new(&[], None, 0.1), None, "no router");
}

/// A token's routing weights need not sum to 1, for example if its record names the base. The mean
/// weights are still divided by the number of tokens.
#[test]
fn weights_are_means_over_tokens_and_loads_over_assignments() {
    let mut totals = site("all layers", &[[6.0, 2.0]]);
    totals.weights = vec![vec![3.0, 1.0]];
    totals.assignments = vec![vec![12.0, 4.0]];
    let report = report(&[totals], None, 0.1);
    assert_eq!(report.mean_routing_weights, [3.0 / 8.0, 1.0 / 8.0]);
    assert_eq!(report.expert_load, [0.75, 0.25]);
}

#[test]
fn an_experts_figures_are_means_over_all_sites_and_sum_to_one() {
    let mut one = site("h.0", &[[8.0]]);
    one.experts = vec![0];
    let mut two = site("h.1", &[[2.0, 6.0]]);
    two.experts = vec![0, 2];
    let report = report(&[one, two], None, 0.1);
    assert_eq!(report.mean_routing_weights, [(1.0 + 0.25) / 2.0, 0.0, 0.75 / 2.0]);
    assert_eq!(report.expert_load.iter().sum::<f64>(), 1.0);
    assert_eq!(report.sites[1].largest(), (2, 0.75));
}

#[test]
fn totals_add_up() {
    let (a, b) = (site("x", &[[1.0, 2.0], [3.0, 4.0]]), site("x", &[[5.0, 6.0], [7.0, 8.0]]));
    let mut sums = vec![];
    routing::add(&mut sums, std::slice::from_ref(&a));
    assert_eq!(sums, std::slice::from_ref(&a));
    routing::add(&mut sums, &[b]);
    assert_eq!(sums, [site("x", &[[6.0, 8.0], [10.0, 12.0]])]);
    let losses = RouterLosses::new(&sums).expect("there is a site");
    let (p, q) = (16.0 / 36.0, 20.0 / 36.0);
    assert!((losses.load_balancing_loss - 2.0 * (p * p + q * q)).abs() < 1e-15);
    assert!((losses.uniform_mse - (p - 0.5f64).powi(2)).abs() < 1e-15);
    assert_eq!(losses.routing_entropy, 0.5);
    assert_eq!(RouterLosses::new(&[]), None);
}

#[test]
fn what_is_wrong_names_the_worst_site() {
    let totals = [
        site("h.0", &[[5.0, 3.0, 2.0]]),
        site("h.1", &[[0.2, 9.8, 0.0]]),
        site("h.2", &[[9.5, 0.3, 0.2]]),
        site("h.3", &[[10.0]]),
    ];
    let config = RouterConfig::default();
    let faults = report(&totals, None, config.dead_share).collapse(&config);
    insta::assert_snapshot!(faults.join("\n"), @"
    expert_1 takes 0.980 of the routing weight at `h.1`, more than 0.9 (2 of 4 sites)
    1 of 3 experts are dead at `h.1` (expert_2), with less than 0.05 of an even weight (1 of 4 \
    sites)
    ");
    assert!(report(&totals[..1], None, config.dead_share).collapse(&config).is_empty());
    // a site of a single expert has nothing to decide
    assert!(report(&totals[3..], None, config.dead_share).collapse(&config).is_empty());
    let strict = RouterConfig { collapse_share: 0.4, dead_share: 0.7, ..config };
    let faults = report(&totals[..1], None, strict.dead_share).collapse(&strict);
    insta::assert_snapshot!(faults.join("\n"), @"
    expert_0 takes 0.500 of the routing weight at `h.0`, more than 0.4 (1 of 1 sites)
    1 of 3 experts are dead at `h.0` (expert_2), with less than 0.7 of an even weight (1 of 1 \
    sites)
    ");
}
