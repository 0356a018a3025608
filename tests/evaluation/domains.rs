//! Evaluation of datasets whose domains have experts: routing by domain, and the accuracy of
//! routers.

use anyhow::{Context, Result};
use dylora::config::{Config, LossOn, RouterConfig, RouterInput, RouterScope, RoutingChoice, load};
use dylora::data::{MemoryDocument, MemoryDomain, TokenDataset};
use dylora::eval::{EvalReport, EvalSettings, check_domains, domain_targets, evaluate};
use dylora::model::batch::DomainTargets;
use dylora::model::{ForwardMode, Inputs, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{ROUTER_INPUTS, SCOPES, seed, tiny_lora, tiny_model};

/// Three domains, whose documents have prompts.
fn dataset() -> TokenDataset {
    let document = |n: u32| MemoryDocument {
        tokens: (0..4 + n % 5).map(|i| (n * 7 + i * (n + 3)) % 61).collect(),
        prompt_len: 1 + n % 3,
        expert: None,
    };
    let domain = |(name, documents): (&str, std::ops::Range<u32>)| MemoryDomain {
        name: name.into(),
        weight: 1.0,
        documents: documents.map(document).collect(),
    };
    let domains = [("law", 0..9), ("code", 9..12), ("verse", 12..17)];
    TokenDataset::in_memory(12, LossOn::Completion, domains.map(domain).into())
}

/// A config whose domains have these experts; the key is left out for a domain with none.
fn config(experts: [&str; 3]) -> Result<Config> {
    let domains = ["law", "code", "verse"].iter().zip(experts).map(|(name, experts)| {
        let key = if experts.is_empty() { String::new() } else { format!(", expert = {experts}") };
        format!("{{ name = \"{name}\", train = [\"x\"]{key} }}")
    });
    let domains = domains.collect::<Vec<_>>().join(", ");
    let text = format!(
        "base = {{ source = {{ path = \"x\" }} }}\nlora = {{ num_experts = 3 }}\n\
         data = {{ seq_len = 12, domains = [{domains}] }}"
    );
    load::parse(&text, &[])
}

fn targets(experts: [&str; 3]) -> Result<DomainTargets> {
    let names = ["law", "code", "verse"];
    DomainTargets::of_config(&config(experts)?, names).context("some have experts")
}

fn report(
    model: &RoutedModel,
    source: &RoutingSource,
    domains: Option<DomainTargets>,
    batch_size: usize,
) -> Result<EvalReport> {
    let settings = EvalSettings { batch_size, domains, ..EvalSettings::default() };
    evaluate(model, &dataset(), source, settings, &|_, _| ())
}

fn losses(report: &EvalReport) -> Vec<f64> {
    report.domains.iter().map(|domain| domain.loss).collect()
}

#[test]
fn by_domain_each_domain_has_the_loss_of_its_experts() -> Result<()> {
    let _generator = seed(510);
    let model = tiny_model(&tiny_lora(), &RouterConfig::default(), Kind::Double)?;
    let shares = Tensor::from_slice(&[0.5, 0.0, 0.5]);
    let alone: Vec<Vec<f64>> = (0..3)
        .map(RoutingSource::Expert)
        .chain([RoutingSource::Given(shares)])
        .map(|source| Ok(losses(&report(&model, &source, None, 3)?)))
        .collect::<Result<_>>()?;
    for (experts, expected) in [
        (["1", "2", "0"], [alone[1][0], alone[2][1], alone[0][2]]),
        (["1", "1", "[0, 2]"], [alone[1][0], alone[1][1], alone[3][2]]),
    ] {
        for batch_size in [1, 3, 20] {
            let found =
                report(&model, &RoutingSource::Domain, Some(targets(experts)?), batch_size)?;
            for (a, b) in losses(&found).iter().zip(expected) {
                assert!((a - b).abs() < 1e-12, "{experts:?}: {a}, not {b}");
            }
            assert!(found.routing.is_none() && found.domain_accuracy.is_none());
        }
    }
    Ok(())
}

/// The means of each site for each of the domains, and over all, by the host: the loss, the
/// accuracy and the number of tokens.
fn by_host(model: &RoutedModel, targets: &DomainTargets) -> (Vec<Vec<[f64; 3]>>, Vec<[f64; 3]>) {
    let data = dataset();
    let num_sites = model.sites().len();
    let mut sums = vec![vec![[0.0; 3]; num_sites]; 3];
    for block in data.eval_order() {
        let batch = data.batch(&[block]);
        let experts = targets.of(block.domain as usize);
        let inputs = Inputs::of_batch(&batch, false, Device::Cpu);
        for (site, routing) in model.routing(&inputs, ForwardMode::EVAL).iter().enumerate() {
            let probs: Vec<f64> = Vec::try_from(routing.probs.reshape([-1])).expect("f64");
            let real = probs.chunks(3).zip(&batch.document_ids).filter(|(_, id)| **id >= 0);
            for (p, _) in real.filter(|_| !experts.is_empty()) {
                let own: f64 = experts.iter().map(|&e| p[e]).sum();
                let best = (0..3).max_by(|&a, &b| p[a].total_cmp(&p[b])).expect("three");
                let correct = f64::from(u8::from(experts.contains(&best)));
                let sum = &mut sums[block.domain as usize][site];
                *sum = [sum[0] - own.ln(), sum[1] + correct, sum[2] + 1.0];
            }
        }
    }
    let mean = |[loss, correct, tokens]: [f64; 3]| [loss / tokens, correct / tokens, tokens];
    let all = |site: usize| {
        let add = |a: [f64; 3], b: [f64; 3]| [a[0] + b[0], a[1] + b[1], a[2] + b[2]];
        mean(sums.iter().map(|sites| sites[site]).fold([0.0; 3], add))
    };
    let all = (0..num_sites).map(all).collect();
    (sums.iter().map(|sites| sites.iter().copied().map(mean).collect()).collect(), all)
}

#[track_caller]
fn assert_close(what: &str, found: Option<f64>, expected: f64) {
    let found = found.expect("it is known");
    assert!((found - expected).abs() < 1e-12, "{what}: {found}, not {expected}");
}

/// Prompts count and padding does not, by domain, in all and at each site.
#[test]
fn the_accuracy_and_the_loss_are_those_that_the_host_counts() -> Result<()> {
    let _generator = seed(511);
    for (input, scope) in ROUTER_INPUTS.into_iter().flat_map(|i| SCOPES.map(|scope| (i, scope))) {
        for experts in [["0", "1", "2"], ["[2, 0]", "1", "1"], ["1", "", "[0, 2]"]] {
            let what = format!("{input:?}, {scope:?}, {experts:?}");
            let router = RouterConfig { input, scope, ..RouterConfig::default() };
            let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
            let targets = targets(experts)?;
            let (by_domain, all) = by_host(&model, &targets);
            let mean = |sites: &[[f64; 3]], i: usize| {
                sites.iter().map(|site| site[i]).sum::<f64>() / sites.len() as f64
            };
            let found = report(&model, &RoutingSource::Router, Some(targets.clone()), 2)?;
            assert_close(&what, found.domain_supervision, mean(&all, 0));
            assert_close(&what, found.domain_accuracy, mean(&all, 1));
            let routing = found.routing.as_ref().context("there is a router")?;
            for (site, expected) in routing.sites.iter().zip(&all) {
                assert_close(&what, site.domain_supervision, expected[0]);
                assert_close(&what, site.domain_accuracy, expected[1]);
            }
            for (index, (domain, sites)) in found.domains.iter().zip(&by_domain).enumerate() {
                let routing = domain.routing.as_ref().context("there is a router")?;
                if targets.of(index).is_empty() {
                    assert_eq!(domain.domain_accuracy, None, "{what}");
                    assert!(routing.sites.iter().all(|site| site.domain_accuracy.is_none()));
                    continue;
                }
                assert_close(&what, domain.domain_supervision, mean(sites, 0));
                assert_close(&what, domain.domain_accuracy, mean(sites, 1));
                for (site, expected) in routing.sites.iter().zip(sites) {
                    assert_close(&what, site.domain_accuracy, expected[1]);
                }
            }
            assert_eq!(found.domain_accuracies().len(), 3 - usize::from(experts[1].is_empty()));
        }
    }
    Ok(())
}

/// The other results do not depend on whether domains have experts.
#[test]
fn without_experts_or_a_router_there_is_no_accuracy() -> Result<()> {
    let _generator = seed(512);
    let model = tiny_model(&tiny_lora(), &RouterConfig::default(), Kind::Double)?;
    let without = report(&model, &RoutingSource::Router, None, 2)?;
    let json = serde_json::to_string(&without)?;
    assert!(!json.contains("domain_accuracy") && !json.contains("domain_supervision"), "{json}");
    let with = report(&model, &RoutingSource::Router, Some(targets(["0", "1", "2"])?), 2)?;
    assert_eq!(losses(&with), losses(&without));
    let weights = |report: &EvalReport| report.routing.clone().map(|of| of.mean_routing_weights);
    assert_eq!(weights(&with), weights(&without));
    let fixed = report(&model, &RoutingSource::Uniform, Some(targets(["0", "1", "2"])?), 2)?;
    assert!(fixed.domain_accuracy.is_none() && fixed.domain_accuracies().is_empty());
    Ok(())
}

/// A layer that lacks a domain's experts cannot be right about it.
#[test]
fn layers_with_experts_of_their_own_have_no_accuracy() -> Result<()> {
    use dylora::model::experts::spec::ExpertSpec;
    use dylora::model::routing::router::RouterSpec;

    let _generator = seed(513);
    let lora = dylora::config::LoraConfig { experts_per_layer: Some(vec![2, 3]), ..tiny_lora() };
    let base = crate::common::tiny_base(crate::common::tiny_config());
    let router = RouterConfig {
        input: RouterInput::LayerInput,
        scope: RouterScope::Layer,
        ..RouterConfig::default()
    };
    let spec = RouterSpec { own_experts: true, ..RouterSpec::from(&router) };
    let specs = ExpertSpec::all(&lora, &base.spec)?;
    let model = RoutedModel::with_experts(&base, &specs, &spec, Device::Cpu, Kind::Double);
    let found = report(&model, &RoutingSource::Router, Some(targets(["0", "1", "2"])?), 2)?;
    assert!(found.routing.is_some() && found.domain_accuracy.is_none());
    Ok(())
}

#[test]
fn a_domain_without_an_expert_is_refused_by_name() -> Result<()> {
    let data = dataset();
    let by_domain = RoutingChoice::Domain;
    let some = targets(["1", "", "0"])?;
    let error = check_domains(&data, by_domain, Some(&some)).unwrap_err().to_string();
    let expected = "routing by `domain` needs an expert for each domain, `code` has none\n\
                    hint: name one by `data.domains[].expert` in the run's config; or route \
                    otherwise, as by `uniform`";
    assert_eq!(error, expected);
    let error = check_domains(&data, by_domain, None).unwrap_err().to_string();
    assert!(error.contains("`law` has none"), "{error}");
    check_domains(&data, by_domain, Some(&targets(["1", "1", "0"])?))?;
    for other in [RoutingChoice::Router, RoutingChoice::Record, RoutingChoice::Uniform] {
        check_domains(&data, other, None)?;
    }
    Ok(())
}

#[test]
fn a_config_of_another_number_of_experts_gives_domains_none() -> Result<()> {
    let _generator = seed(514);
    let model = tiny_model(&tiny_lora(), &RouterConfig::default(), Kind::Double)?;
    let mut config = config(["0", "1", "2"])?;
    assert_eq!(domain_targets(&config, &model, &dataset()), Some(targets(["0", "1", "2"])?));
    config.lora.num_experts = 4;
    assert_eq!(domain_targets(&config, &model, &dataset()), None);
    Ok(())
}
