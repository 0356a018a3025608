//! The domain supervision of routers. Its loss, its gradient and the accuracy are computed a second
//! time from the formula, token by token on the host:
//!
//! ```text
//! s_e = sum_d R_ed f_d + c_e              f: what the router reads, normalised
//! p = softmax(s / T),  q_e = p_e / p(D) for the experts e of the domain, and 0 for the others
//! loss = mean of -ln p(D) over the tokens of domains with experts, and over the sites
//! d loss / d R_ed = mean of (p_e - q_e) f_d / T,  d loss / d c_e = mean of (p_e - q_e) / T
//! ```

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use dylora::config::{
    Config, LossOn, Orthogonality, RouterConfig, RouterInput, RouterNoise, RouterScope,
    RoutingChoice, RoutingLevel, load,
};
use dylora::data::{Batch, MemoryDocument, MemoryDomain, TokenDataset};
use dylora::model::batch::DomainTargets;
use dylora::model::routing::supervision::SupervisionSums;
use dylora::model::routing::totals::RoutingTotals;
use dylora::model::{ForwardMode, Inputs, Recorder, RoutedModel, RoutingSource};
use dylora::train::gradients::gradients_of;
use dylora::train::graph::Capture;
use dylora::train::optim::Optimizer;
use dylora::train::prepared::Prepared;
use dylora::train::step::{self, StepGradients, Stepper};
use tch::{Device, Kind, Tensor};

use crate::common::{
    ROUTER_INPUTS, SCOPES, assert_close, max_difference, mean_loss, seed, tiny_lora, tiny_model,
};

/// The factor of the supervision in these tests.
const COEF: f64 = 0.7;
/// The seed of noise and dropout.
const NOISE: i64 = 11;

/// The keys that give the domains `a`, `b` and `c` their experts out of three: one each, groups of
/// experts, an expert for two domains, and a domain without experts.
const EXPERTS: [[&str; 3]; 4] = [
    ["expert = 0", "expert = 1", "expert = 2"],
    ["expert = [0, 2]", "expert = 1", "expert = [2, 1]"],
    ["expert = 2", "expert = 2", "expert = 0"],
    ["expert = 1", "", "expert = [0, 2]"],
];

/// A config with supervision as its only loss of the router.
pub(super) fn config(
    router: &RouterConfig,
    experts: &[&str; 3],
    overrides: &[&str],
) -> Result<Config> {
    let domains = ["a", "b", "c"].iter().zip(experts);
    let domains = domains.map(|(name, experts)| {
        let comma = if experts.is_empty() { "" } else { ", " };
        format!("{{ name = \"{name}\", train = [\"x\"]{comma}{experts} }}")
    });
    let domains = domains.collect::<Vec<_>>().join(", ");
    let text = format!(
        "base = {{ source = {{ path = \"x\" }} }}\nlora = {{ num_experts = 3 }}\n\
         data = {{ seq_len = 12, domains = [{domains}] }}"
    );
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    let mut config = load::parse(&text, &overrides)?;
    config.router = RouterConfig { domain_supervision: Some(COEF), ..router.clone() };
    Ok(config)
}

/// Three domains of documents with prompts, completions and, in their blocks, padding.
fn dataset(seq_len: usize, loss_on: LossOn) -> TokenDataset {
    let document = |n: u32| MemoryDocument {
        tokens: (0..3 + n % 6).map(|i| (n * 7 + i * (n + 3)) % 61).collect(),
        prompt_len: n % 3,
        expert: None,
    };
    let domain = |(name, documents): (&str, std::ops::Range<u32>)| MemoryDomain {
        name: name.into(),
        weight: 1.0,
        documents: documents.map(document).collect(),
    };
    let domains = [("a", 0..4), ("b", 4..7), ("c", 7..10)];
    TokenDataset::in_memory(seq_len, loss_on, domains.map(domain).into())
}

/// The blocks of `dataset` in micro-batches of these sizes; the last one has those that are left.
fn cut(dataset: &TokenDataset, sizes: &[usize]) -> Vec<Batch> {
    let blocks = dataset.eval_order();
    let (mut rest, mut batches) = (&blocks[..], vec![]);
    for &size in sizes.iter().chain([&blocks.len()]) {
        let (batch, after) = rest.split_at(size.min(rest.len()));
        batches.extend((!batch.is_empty()).then(|| dataset.batch(batch)));
        rest = after;
    }
    batches
}

fn gradients(model: &RoutedModel, config: &Config, batches: &[Batch]) -> Result<StepGradients> {
    let trained = model.trained(RoutingChoice::Router, None);
    tch::manual_seed(NOISE);
    step::gradients(model, &trained, config, batches, None, 3)
}

/// What the supervision alone adds to the gradients, by the parameter's name.
fn added(
    model: &RoutedModel,
    config: &Config,
    batches: &[Batch],
) -> Result<BTreeMap<String, Tensor>> {
    let mut without = config.clone();
    without.router.domain_supervision = Some(0.0);
    let (with, without) =
        (gradients(model, config, batches)?, gradients(model, &without, batches)?);
    assert!(without.supervision.is_none());
    let names = model.trained(RoutingChoice::Router, None).parameters.into_iter().map(|p| p.name);
    let grads = with.grads.iter().zip(&without.grads).map(|(a, b)| a - b);
    Ok(names.zip(grads).collect())
}

/// Routers of every input and scope that can be had together. A router normalises its input, except
/// one that reads a module's, since the host gets that input from the router itself.
fn kinds() -> Vec<RouterConfig> {
    let all = ROUTER_INPUTS.into_iter().flat_map(|i| SCOPES.map(|scope| (i, scope)));
    let all = all.chain([(RouterInput::ModuleInput, RouterScope::Module)]);
    all.map(|(input, scope)| RouterConfig {
        input,
        scope,
        normalize_input: input != RouterInput::ModuleInput,
        detach_input: true,
        ..RouterConfig::default()
    })
    .collect()
}

/// The same with other rules, levels, temperatures and noise.
fn rules() -> Vec<RouterConfig> {
    let of_kind = |kind: RouterConfig| {
        [
            RouterConfig { temperature: 0.6, ..kind.clone() },
            RouterConfig { level: RoutingLevel::Sequence, temperature: 1.7, ..kind.clone() },
            RouterConfig { top_k: Some(1), renormalize: false, ..kind.clone() },
            RouterConfig { top_k: Some(2), noise: RouterNoise::Gaussian(0.8), ..kind.clone() },
            RouterConfig { noise: RouterNoise::Jitter(0.4), ..kind },
        ]
    };
    kinds().into_iter().flat_map(of_kind).collect()
}

/// What the router of each site reads before it normalises, `[batch][site]`, `[b, t, d]`.
fn features(model: &RoutedModel, router: &RouterConfig, batches: &[Batch]) -> Vec<Vec<Tensor>> {
    let _no_grad = tch::no_grad_guard();
    let mode = ForwardMode { noise: router.noise, ..ForwardMode::EVAL };
    if router.input == RouterInput::ModuleInput {
        return probed(model, mode, batches);
    }
    tch::manual_seed(NOISE);
    let of_batch = |batch: &Batch| {
        let inputs = Inputs::of_batch(batch, false, Device::Cpu);
        let base = model.base();
        let mut recorder = Recorder::default();
        model.forward(&inputs, &RoutingSource::Router, mode, Some(&mut recorder));
        let of_site = |layer: Option<usize>| match router.input {
            RouterInput::Embeddings => recorder.hidden_states[0].shallow_clone(),
            RouterInput::BaseHidden => {
                model.forward(&inputs, &RoutingSource::Base, ForwardMode::EVAL, None).hidden
            }
            _ => {
                let layer = layer.expect("it reads the input of a layer");
                base.blocks[layer].norm_1.forward(&recorder.hidden_states[layer])
            }
        };
        let features = model.sites().into_iter().map(|site| of_site(site.layer));
        let averages = router.level == RoutingLevel::Sequence;
        let means = |x: Tensor| if averages { prompt_means(&x, batch) } else { x };
        features.map(means).collect()
    };
    batches.iter().map(of_batch).collect()
}

/// The means of `x` over the prompt of each position's document up to the position; 0 in padding.
fn prompt_means(x: &Tensor, batch: &Batch) -> Tensor {
    let t = batch.seq_len;
    let rows = (0..batch.num_rows).flat_map(|row| (0..t).map(move |at| (row, at)));
    let mean = |(row, at): (usize, usize)| {
        let document = batch.document_ids[row * t + at];
        let reads = |&u: &usize| batch.document_ids[row * t + u] == document;
        let prompt = (0..=at).filter(reads).filter(|u| batch.prompt[row * t + u]);
        let read: Vec<Tensor> = prompt.map(|u| x.get(row as i64).get(u as i64)).collect();
        match read.is_empty() {
            true => x.get(0).get(0).zeros_like(),
            false => Tensor::stack(&read, 0).mean_dim(&[0_i64][..], false, Kind::Double),
        }
    };
    Tensor::stack(&rows.map(mean).collect::<Vec<_>>(), 0).view_as(x)
}

/// What the routers of modules read. The scores of a router whose weight is a part of the unit
/// matrix are a part of its input, which depends only on what comes before the module.
fn probed(model: &RoutedModel, mode: ForwardMode, batches: &[Batch]) -> Vec<Vec<Tensor>> {
    let own = model.router_tensors();
    let own: BTreeMap<String, Tensor> = own.into_iter().map(|(n, t)| (n, t.copy())).collect();
    let mut found: Vec<Vec<Tensor>> = batches.iter().map(|_| vec![]).collect();
    for (site, name) in model.router_names().into_iter().enumerate() {
        let weight = &own[&format!("{name}.weight")];
        let (e, d) = weight.size2().expect("it is [e, d]");
        let mut parts: Vec<Vec<Tensor>> = batches.iter().map(|_| vec![]).collect();
        for start in (0..d).step_by(e as usize) {
            let unit = Tensor::eye(d, (Kind::Double, Device::Cpu));
            let len = e.min(d - start);
            let probe = Tensor::zeros([e, d], (Kind::Double, Device::Cpu));
            probe.narrow(0, 0, len).copy_(&unit.narrow(0, start, len));
            let bias = Tensor::zeros([e], (Kind::Double, Device::Cpu));
            let probe = [(format!("{name}.weight"), probe), (format!("{name}.bias"), bias)];
            model.load_some(&probe.into()).expect("it has these tensors");
            tch::manual_seed(NOISE);
            for (batch, parts) in batches.iter().zip(&mut parts) {
                let inputs = Inputs::of_batch(batch, false, Device::Cpu);
                let routing = model.routing(&inputs, mode);
                parts.push(routing[site].clean.narrow(-1, 0, len));
            }
        }
        model.load_some(&own).expect("they are its own");
        for (found, parts) in found.iter_mut().zip(parts) {
            found.push(Tensor::cat(&parts, -1));
        }
    }
    found
}

/// The results of the formula at one site.
#[derive(Debug, Clone, Default)]
struct OfSite {
    loss: f64,
    correct: f64,
    tokens: f64,
    /// The sums of the gradients of the losses, `[e][d]` and `[e]`.
    weight: Vec<Vec<f64>>,
    bias: Vec<f64>,
}

fn numbers(x: &Tensor) -> Vec<f64> {
    Vec::try_from(x.detach().reshape([-1])).expect("it is f64 on the CPU")
}

impl OfSite {
    /// Adds one token with the features `f` whose domain has `experts`.
    fn add(&mut self, scores: &[f64], f: &[f64], temperature: f64, experts: &[usize]) {
        let all: f64 = scores.iter().map(|s| (s / temperature).exp()).sum();
        let p: Vec<f64> = scores.iter().map(|s| (s / temperature).exp() / all).collect();
        let own: f64 = experts.iter().map(|&e| p[e]).sum();
        self.loss -= own.ln();
        self.tokens += 1.0;
        let best = (0..p.len()).max_by(|&a, &b| p[a].total_cmp(&p[b])).expect("there are some");
        self.correct += f64::from(u8::from(experts.contains(&best)));
        self.weight.resize(p.len(), vec![0.0; f.len()]);
        self.bias.resize(p.len(), 0.0);
        for (e, p_e) in p.iter().enumerate() {
            let q_e = if experts.contains(&e) { p_e / own } else { 0.0 };
            let by_score = (p_e - q_e) / temperature;
            self.bias[e] += by_score;
            self.weight[e].iter_mut().zip(f).for_each(|(sum, f_d)| *sum += by_score * f_d);
        }
    }
}

/// The results of the formula at each site.
fn by_formula(
    model: &RoutedModel,
    router: &RouterConfig,
    config: &Config,
    batches: &[Batch],
) -> Vec<OfSite> {
    let targets = DomainTargets::of_config(config, ["a", "b", "c"]).expect("they have experts");
    let features = features(model, router, batches);
    let of_site = |(index, site): (usize, dylora::model::Site)| {
        let own = &model.routers()[site.router];
        let (weight, bias) = (numbers(&own.weight), numbers(&own.bias));
        let mut result = OfSite::default();
        for (batch, features) in batches.iter().zip(&features) {
            let d = *features[index].size().last().expect("it is [b, t, d]") as usize;
            for (at, raw) in numbers(&features[index]).chunks(d).enumerate() {
                let experts = targets.of(batch.domains[at / batch.seq_len] as usize);
                if batch.document_ids[at] < 0 || experts.is_empty() {
                    continue;
                }
                let mean_square = raw.iter().map(|x| x * x).sum::<f64>() / d as f64;
                let scale = if router.normalize_input { (mean_square + 1e-6).sqrt() } else { 1.0 };
                let f: Vec<f64> = raw.iter().map(|x| x / scale).collect();
                let rows = weight.chunks(d).zip(&bias);
                let dot = |row: &[f64]| row.iter().zip(&f).map(|(w, x)| w * x).sum::<f64>();
                let scores: Vec<f64> = rows.map(|(row, c)| dot(row) + c).collect();
                result.add(&scores, &f, router.temperature, experts);
            }
        }
        result
    };
    model.sites().into_iter().enumerate().map(of_site).collect()
}

/// The gradient of the mean loss times [`COEF`] that the formula gives each router's weight and
/// bias, by their names.
fn expected_gradients(model: &RoutedModel, sites: &[OfSite]) -> BTreeMap<String, Tensor> {
    let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
    let names = model.router_names();
    for (site, of_site) in model.sites().into_iter().zip(sites) {
        let factor = COEF / of_site.tokens / sites.len() as f64;
        let name = &names[site.router];
        let weight = of_site.weight.iter().map(|row| Tensor::from_slice(row));
        let weight = Tensor::stack(&weight.collect::<Vec<_>>(), 0) * factor;
        let bias = Tensor::from_slice(&of_site.bias) * factor;
        for (key, new) in [("weight", weight), ("bias", bias)] {
            let name = format!("{name}.{key}");
            let sum = match sums.remove(&name) {
                Some(sum) => sum + new,
                None => new,
            };
            sums.insert(name, sum);
        }
    }
    sums
}

/// Checks the loss, the accuracy and the gradients of one step against the formula.
fn check(router: &RouterConfig, experts: &[&str; 3]) -> Result<()> {
    let what = format!("{router:?}, {experts:?}");
    let config = config(router, experts, &[])?;
    let model = tiny_model(&tiny_lora(), router, Kind::Double)?;
    let batches = cut(&dataset(12, LossOn::Completion), &[1, 3]);
    let padding = batches.iter().flat_map(|batch| &batch.document_ids).filter(|id| **id < 0);
    assert!(padding.count() > 5 && batches.len() == 3, "there is padding to leave out");
    let sites = by_formula(&model, router, &config, &batches);
    let sums = gradients(&model, &config, &batches)?.supervision.context("it is supervised")?;
    assert_eq!(sums.size(), [sites.len() as i64, 2]);
    for (site, expected) in sites.iter().enumerate() {
        let [loss, correct] = [0, 1].map(|i| sums.double_value(&[site as i64, i]));
        assert!((loss - expected.loss).abs() < 1e-11, "{what}: {loss}, not {}", expected.loss);
        assert_eq!(correct, expected.correct, "{what}, site {site}");
    }
    let mut expected = expected_gradients(&model, &sites);
    for (name, found) in added(&model, &config, &batches)? {
        match expected.remove(&name) {
            Some(expected) => assert_close(&format!("{what}: `{name}`"), &found, &expected, 1e-12),
            // the gradient stops at the router's input
            None => assert_close(&format!("{what}: `{name}`"), &found, &found.zeros_like(), 1e-14),
        }
    }
    assert!(expected.is_empty(), "{what}: {:?} are not trained", expected.keys());
    Ok(())
}

#[test]
fn the_loss_and_its_gradient_are_those_of_the_formula_whatever_experts_domains_have() -> Result<()>
{
    let _generator = seed(410);
    for router in kinds() {
        EXPERTS.iter().try_for_each(|experts| check(&router, experts))?;
    }
    Ok(())
}

/// The scores are taken without noise and before top-k, and divided by the temperature.
#[test]
fn the_loss_and_its_gradient_are_those_of_the_formula_under_every_rule() -> Result<()> {
    let _generator = seed(411);
    for router in rules() {
        check(&router, &EXPERTS[1])?;
    }
    Ok(())
}

/// The sums over a batch at each site, `[s, 2]`.
fn by_site(
    model: &RoutedModel,
    batch: &Batch,
    targets: &DomainTargets,
    mode: ForwardMode,
) -> Tensor {
    let inputs = Inputs::of_domains(batch, false, Some(targets), Device::Cpu);
    tch::manual_seed(NOISE);
    let (_, routing) = model.loss(&inputs, &RoutingSource::Router, mode, mean_loss(1));
    let sums = SupervisionSums::new(&routing, model.temperature(), &inputs);
    sums.expect("domains have experts").by_site
}

#[test]
fn prompts_count_like_completions_and_padding_does_not_count() -> Result<()> {
    let _generator = seed(412);
    for router in kinds() {
        let config = config(&router, &EXPERTS[1], &[])?;
        let targets = DomainTargets::of_config(&config, ["a", "b", "c"]).context("experts")?;
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let batch = |loss_on| cut(&dataset(12, loss_on), &[]).remove(0);
        let sums = |batch: &Batch| by_site(&model, batch, &targets, ForwardMode::EVAL);
        let (some, all) = (batch(LossOn::Completion), batch(LossOn::All));
        assert!(some.label_tokens() < all.label_tokens() && some.input_ids == all.input_ids);
        let mut padded = some.clone();
        for (token, document) in padded.input_ids.iter_mut().zip(&some.document_ids) {
            *token = if *document < 0 { 57 } else { *token };
        }
        assert_ne!(padded.input_ids, some.input_ids);
        let expected = sums(&some);
        for other in [&all, &padded] {
            assert_close(&format!("{router:?}"), &sums(other), &expected, 1e-12);
        }
    }
    Ok(())
}

/// One row of a batch as a batch of its own.
fn row_of(batch: &Batch, row: usize) -> Batch {
    let range = row * batch.seq_len..(row + 1) * batch.seq_len;
    let of = |all: &[i64]| all[range.clone()].to_vec();
    Batch {
        num_rows: 1,
        seq_len: batch.seq_len,
        input_ids: of(&batch.input_ids),
        labels: of(&batch.labels),
        position_ids: of(&batch.position_ids),
        document_ids: of(&batch.document_ids),
        expert_ids: of(&batch.expert_ids),
        prompt: batch.prompt[range.clone()].to_vec(),
        domains: vec![batch.domains[row]],
    }
}

#[test]
fn rows_of_a_domain_without_experts_count_nothing() -> Result<()> {
    let _generator = seed(413);
    for router in kinds() {
        let config = config(&router, &EXPERTS[3], &[])?;
        let targets = DomainTargets::of_config(&config, ["a", "b", "c"]).context("experts")?;
        assert!(targets.of(1).is_empty());
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let batch = cut(&dataset(12, LossOn::Completion), &[]).remove(0);
        for (row, &domain) in batch.domains.iter().enumerate() {
            let sums = by_site(&model, &row_of(&batch, row), &targets, ForwardMode::EVAL);
            let loss = sums.sum(Kind::Double).double_value(&[]);
            assert_eq!(loss == 0.0, domain == 1, "{router:?}, row {row}");
        }
    }
    Ok(())
}

/// The gradient of the supervision at layer 1 reaches the experts and the router of layer 0, if
/// nothing stops it.
#[test]
fn the_supervision_trains_the_routers_alone_if_their_input_is_detached() -> Result<()> {
    let _generator = seed(414);
    let layer = RouterConfig {
        input: RouterInput::LayerInput,
        scope: RouterScope::Layer,
        ..kinds()[0].clone()
    };
    let model = tiny_model(&tiny_lora(), &layer, Kind::Double)?;
    let batches = cut(&dataset(12, LossOn::Completion), &[2]);
    let moved = |detach_input| -> Result<BTreeMap<String, f64>> {
        let router = RouterConfig { detach_input, ..layer.clone() };
        let grads = added(&model, &config(&router, &EXPERTS[0], &[])?, &batches)?;
        Ok(grads.into_iter().map(|(n, g)| (n, max_difference(&g, &g.zeros_like()))).collect())
    };
    let (alone, through) = (moved(true)?, moved(false)?);
    assert!(alone.iter().all(|(name, &moved)| name.contains("router") == (moved > 1e-12)));
    let reached = |name: &str| name.contains("router") || name.starts_with("h.0.");
    assert!(through.iter().all(|(name, &moved)| reached(name) == (moved > 1e-12)), "{through:?}");
    assert!((alone["h.0.router.bias"] - through["h.0.router.bias"]).abs() > 1e-6);
    assert!((alone["h.1.router.bias"] - through["h.1.router.bias"]).abs() < 1e-12);
    Ok(())
}

/// A config in which every loss has a coefficient.
fn with_all_losses(router: &RouterConfig, overrides: &[&str]) -> Result<Config> {
    let mut config = config(router, &EXPERTS[3], overrides)?;
    config.router.load_balancing_coef = 0.7;
    config.router.uniform_mse_coef = 3.0;
    config.router.z_loss_coef = 0.05;
    config.router.entropy_coef = -0.2;
    config.lora.orthogonality = Some(Orthogonality::Ba(0.4));
    Ok(config)
}

/// All numbers of a step but its gradients.
fn sums(of: &StepGradients) -> Tensor {
    let totals: Vec<_> = of.routing.iter().map(RoutingTotals::flat).collect();
    let supervision = of.supervision.as_ref().expect("it is supervised").reshape([-1]);
    Tensor::cat(&[&of.domain_sums, &Tensor::cat(&totals, 0), &supervision], 0)
}

#[track_caller]
fn assert_same(what: &str, a: &StepGradients, b: &StepGradients) {
    assert_close(what, &sums(a), &sums(b), 1e-10);
    for (a, b) in a.grads.iter().zip(&b.grads) {
        let scale = b.abs().max().double_value(&[]).max(1e-3);
        assert_close(what, a, b, 1e-9 * scale);
    }
}

#[test]
fn a_step_does_not_depend_on_its_packing_or_its_micro_batches() -> Result<()> {
    let _generator = seed(415);
    let routers = kinds().into_iter().chain(rules());
    for router in routers.filter(|router| router.noise == RouterNoise::None) {
        for detach_input in [true, false] {
            let router = RouterConfig { detach_input, ..router.clone() };
            let config = with_all_losses(&router, &[])?;
            let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
            let step = |seq_len, sizes: &[usize]| {
                gradients(&model, &config, &cut(&dataset(seq_len, LossOn::Completion), sizes))
            };
            let whole = step(12, &[])?;
            for (seq_len, sizes) in [(12, vec![1, 2]), (12, vec![1; 9]), (17, vec![2]), (8, vec![])]
            {
                let what = format!("{router:?}, blocks of {seq_len}, {sizes:?}");
                assert_same(&what, &step(seq_len, &sizes)?, &whole);
            }
        }
    }
    Ok(())
}

#[test]
fn fillers_change_nothing() -> Result<()> {
    let _generator = seed(416);
    for router in kinds() {
        let config = with_all_losses(&router, &[])?;
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let trained = model.trained(RoutingChoice::Router, None);
        let batches = cut(&dataset(12, LossOn::Completion), &[2]);
        let step = |is_rounded| -> Result<(u64, StepGradients)> {
            let step = Prepared::new(&model, &config, &batches, None, 3, is_rounded);
            let tensors = step.tensors(&step.flats(), &step.scalars(&[]));
            Ok((step.supervised_tokens, gradients_of(&model, &trained, &config, &tensors)?))
        };
        let ((tokens, own), (rounded_tokens, rounded)) = (step(false)?, step(true)?);
        assert_eq!(tokens, rounded_tokens);
        assert_same(&format!("{router:?}"), &rounded, &own);
    }
    Ok(())
}

/// Copies of all tensors that a step may change, by name.
fn everything(model: &RoutedModel, stepper: &Stepper) -> BTreeMap<String, Tensor> {
    let all = model.tensors().into_iter().chain(stepper.optimizer.state());
    all.map(|(name, tensor)| (name, tensor.copy())).collect()
}

/// Steps of two shapes in turn, whose rates, temperatures, masks and noise change.
fn run(
    router: &RouterConfig,
    config: &Config,
    capture: Capture,
) -> Result<(Vec<String>, BTreeMap<String, Tensor>)> {
    tch::manual_seed(420);
    let mut model = tiny_model(&tiny_lora(), router, Kind::Double)?;
    let trained = model.trained(RoutingChoice::Router, None);
    let optimizer = Optimizer::new(&config.optimizer, &trained.parameters);
    let mut stepper = Stepper::new(optimizer, capture, Device::Cpu);
    let blocks = cut(&dataset(12, LossOn::Completion), &[1, 1, 1, 1]);
    let shapes: [Vec<Batch>; 3] =
        [blocks[..2].to_vec(), blocks[2..4].to_vec(), vec![blocks[1].clone()]];
    tch::manual_seed(5);
    let mut results = vec![];
    for step in 0..9usize {
        model.set_rule(1.0 + step as f64 / 7.0, router.top_k);
        // the sizes are rounded with both settings, so that only `capture` differs
        let data = Prepared::new(&model, config, &shapes[step % 3], None, 3, true);
        let update = stepper.optimizer.scalars(&|_| 1.0 / (1.0 + step as f64));
        let pending = stepper.launch(&model, &trained, config, &data, &update)?;
        let result = stepper.wait(pending)?;
        assert_eq!(result.supervision.len(), model.sites().len());
        results.push(format!("{result:?}"));
    }
    let end = everything(&model, &stepper);
    Ok((results, end))
}

#[test]
fn captured_steps_are_plain_ones_to_the_bit() -> Result<()> {
    let _generator = seed(417);
    for router in kinds() {
        let noise = RouterNoise::Gaussian(0.1);
        let router = RouterConfig { top_k: Some(2), noise, ..router };
        let config = with_all_losses(&router, &["lora.dropout=0.2"])?;
        let (plain, end) = run(&router, &config, Capture::Off)?;
        let (captured, captured_end) = run(&router, &config, Capture::Rerun)?;
        assert_eq!(plain, captured, "{router:?}");
        for (name, tensor) in &end {
            assert!(tensor.equal(&captured_end[name]), "{router:?}: `{name}` differs");
        }
        let distinct: std::collections::BTreeSet<&String> = plain.iter().collect();
        assert_eq!(distinct.len(), 9, "the steps are to differ");
    }
    Ok(())
}
