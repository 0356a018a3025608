//! The part that is always on (`lora.shared_rank`): a LoRA at weight 1 for each token, beside the
//! routed experts. It is compared with a mixture that is computed by hand, and with a mixture of
//! one expert more under given weights.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{
    DropoutMasks, Kernels, LoraConfig, LossOn, RouterConfig, RouterInput, RouterScope,
    RoutingChoice, RoutingLevel,
};
use dylora::data::{Batch, MemoryDocument, MemoryDomain, TokenDataset};
use dylora::model::batch::DomainTargets;
use dylora::model::decoder::Decoder;
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::experts::weights::RoutingWeights;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{Compute, ForwardMode, Inputs, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use super::by_hand::{Place, logits_by_hand, routed};
use super::families::kinds;
use super::supervision;
use crate::common::{
    DOUBLE, assert_close, family_specs, gpt2_spec, gradients, logits, max_difference, mean_loss,
    plain_router, randomize, seed, tiny_base, tiny_config, two_rows,
};

const KERNELS: [Kernels; 2] = [Kernels::Auto, Kernels::Reference];

fn specs(lora: &LoraConfig, base: &Decoder) -> Result<Vec<ExpertSpec>> {
    let mut specs = ExpertSpec::all(lora, &base.spec)?;
    specs.extend(ExpertSpec::of_shared(lora, &base.spec)?);
    Ok(specs)
}

/// A mixture in f64 whose parameters are all random.
fn model(
    base: &Decoder,
    lora: &LoraConfig,
    router: &RouterConfig,
    kernels: Kernels,
) -> Result<RoutedModel> {
    let compute = Compute { kind: Kind::Double, kernels };
    let (specs, router) = (specs(lora, base)?, RouterSpec::from(router));
    let model = RoutedModel::with_experts(base, &specs, &router, Device::Cpu, compute);
    randomize(&model)?;
    Ok(model)
}

/// `num_experts` experts of rank 4 and scaling 1.5, and a part of rank 2 that is always on.
fn lora(num_experts: i64) -> LoraConfig {
    LoraConfig { num_experts, rank: 4, alpha: 6.0, shared_rank: 2, ..LoraConfig::default() }
}

/// Packed documents of three domains, whose records name experts or none, as one batch.
fn batch() -> Batch {
    let document = |n: u32| MemoryDocument {
        tokens: (0..3 + n % 6).map(|i| (n * 7 + i * (n + 3)) % 61).collect(),
        prompt_len: n % 3,
        expert: (n % 4 < 3).then_some(i64::from(n % 4) as _),
    };
    let domain = |(name, documents): (&str, std::ops::Range<u32>)| MemoryDomain {
        name: name.into(),
        weight: 1.0,
        documents: documents.map(document).collect(),
    };
    let domains = [("a", 0..4), ("b", 4..7), ("c", 7..10)].map(domain);
    let dataset = TokenDataset::in_memory(12, LossOn::Completion, domains.into());
    dataset.batch(&dataset.eval_order())
}

/// The batch, and the experts of its domains out of three: `a` has 1, `b` has 0 and 2, `c` has 2.
fn inputs(batch: &Batch) -> Result<(Inputs, DomainTargets)> {
    let config = supervision::config(
        &plain_router(),
        &["expert = 1", "expert = [0, 2]", "expert = 2"],
        &[],
    )?;
    let targets = DomainTargets::of_config(&config, ["a", "b", "c"]).expect("they have experts");
    Ok((Inputs::of_domains(batch, true, Some(&targets), Device::Cpu), targets))
}

/// The weights of three experts by a source that no router decides, `[b, t, 3]`, position by
/// position.
fn fixed(batch: &Batch, targets: &DomainTargets, source: &RoutingSource) -> Tensor {
    let of = |at: usize| -> [f64; 3] {
        let share = |experts: &[usize]| {
            let share = 1.0 / experts.len().max(1) as f64;
            [0, 1, 2].map(|e| if experts.contains(&e) { share } else { 0.0 })
        };
        match source {
            RoutingSource::Uniform => share(&[0, 1, 2]),
            RoutingSource::All => [1.0; 3],
            RoutingSource::Expert(expert) => share(&[*expert as usize]),
            RoutingSource::Record => match batch.expert_ids[at] {
                -1 => share(&[]),
                expert => share(&[expert as usize]),
            },
            RoutingSource::Domain => share(targets.of(batch.domains[at / batch.seq_len] as usize)),
            other => unreachable!("{other:?} is not compared"),
        }
    };
    let numbers: Vec<f64> = (0..batch.input_ids.len()).flat_map(of).collect();
    Tensor::from_slice(&numbers).view([batch.num_rows as i64, batch.seq_len as i64, 3])
}

/// `g` with weight 1 behind it.
fn and_one(g: &Tensor) -> Tensor {
    Tensor::cat(&[g, &g.narrow(-1, 0, 1).ones_like()], -1)
}

#[test]
fn beside_fixed_weights_it_is_a_lora_at_weight_one_on_every_family() -> Result<()> {
    let _generator = seed(600);
    let batch = batch();
    let (inputs, targets) = inputs(&batch)?;
    for (family, spec) in family_specs() {
        let base = tiny_base(spec);
        for kernels in KERNELS {
            let model = model(&base, &lora(3), &plain_router(), kernels)?;
            for source in [
                RoutingSource::Uniform,
                RoutingSource::All,
                RoutingSource::Expert(1),
                RoutingSource::Record,
                RoutingSource::Domain,
            ] {
                let g = and_one(&fixed(&batch, &targets, &source));
                let expected = logits_by_hand(&model, &inputs, &mut |_| g.shallow_clone());
                let found = logits(&model, &inputs, &source);
                let what = format!("{family}, {kernels:?}, {source:?}");
                assert_close(&what, &found, &expected, 1e-10);
                let without = and_one(&fixed(&batch, &targets, &source))
                    .multiply_(&Tensor::from_slice(&[1.0, 1.0, 1.0, 0.0]));
                let without = logits_by_hand(&model, &inputs, &mut |_| without.shallow_clone());
                assert!(max_difference(&without, &expected) > 1e-3, "{what}: it does nothing");
            }
            // with weight 0 for all, it is off as well
            let plain = RoutedModel::plain(&base, Device::Cpu, Kind::Double, false);
            let off = logits(&model, &inputs, &RoutingSource::Base);
            assert_close(family, &off, &logits(&plain, &inputs, &RoutingSource::Base), 1e-10);
        }
    }
    Ok(())
}

/// A router of each input and scope.
fn routers() -> Vec<RouterConfig> {
    let router = |(input, scope)| RouterConfig {
        input,
        scope,
        temperature: 0.7,
        normalize_input: true,
        ..plain_router()
    };
    let all = [
        (RouterInput::Embeddings, RouterScope::Shared),
        (RouterInput::LayerInput, RouterScope::Layer),
        (RouterInput::LayerInput, RouterScope::Module),
        (RouterInput::ModuleInput, RouterScope::Module),
    ];
    all.map(router).into()
}

/// The routing weights at a place by the formula, with weight 1 behind them.
fn by_formula(model: &RoutedModel, router: &RouterConfig, place: &Place<'_>) -> Tensor {
    let list = place.path.module.block_list();
    let name = match router.scope {
        RouterScope::Shared => "router".to_owned(),
        RouterScope::Layer => format!("{list}.{}.router", place.path.layer),
        RouterScope::Module => format!("{}.router", place.path),
    };
    let x = match router.input {
        RouterInput::Embeddings => place.embeddings,
        RouterInput::LayerInput => place.layer_input,
        RouterInput::ModuleInput => place.module_input,
        RouterInput::BaseHidden => unreachable!("it is not among the routers"),
    };
    and_one(&routed(model, router, &name, x))
}

#[test]
fn beside_routed_experts_it_is_a_lora_at_weight_one_on_every_family() -> Result<()> {
    let _generator = seed(601);
    let batch = batch();
    let (inputs, _) = inputs(&batch)?;
    for (family, spec) in family_specs() {
        let base = tiny_base(spec);
        for (router, top_k) in routers().into_iter().flat_map(|r| [(r.clone(), None), (r, Some(2))])
        {
            let router = RouterConfig { top_k, ..router };
            for kernels in KERNELS {
                let model = model(&base, &lora(3), &router, kernels)?;
                let mut weights = |place: &Place<'_>| by_formula(&model, &router, place);
                let expected = logits_by_hand(&model, &inputs, &mut weights);
                let found = logits(&model, &inputs, &RoutingSource::Router);
                let what = format!("{family}, {kernels:?}, {router:?}");
                assert_close(&what, &found, &expected, 1e-10);
            }
        }
    }
    Ok(())
}

#[test]
fn routers_do_not_see_it() -> Result<()> {
    let _generator = seed(602);
    let base = tiny_base(tiny_config());
    for router in routers() {
        let model = model(&base, &lora(3), &router, Kernels::Auto)?;
        let output = model.forward(&two_rows(), &RoutingSource::Router, ForwardMode::EVAL, None);
        assert_eq!(output.routing.len(), model.sites().len());
        for (routing, used) in output.routing.iter().zip(&output.weights) {
            assert_eq!(routing.weights.size(), [2, 7, 3]);
            let RoutingWeights::PerToken(used) = used else { panic!("they differ by token") };
            assert_eq!(used.size(), [2, 7, 3]);
        }
        assert_eq!((model.num_experts(), model.specs().len()), (3, 4));
        assert!(model.router_tensors().values().all(|tensor| tensor.size()[0] == 3));
    }
    Ok(())
}

#[test]
fn a_single_expert_and_it_are_two_loras_at_weight_one() -> Result<()> {
    let _generator = seed(603);
    let batch = batch();
    let (inputs, _) = inputs(&batch)?;
    let g = Tensor::ones([batch.num_rows as i64, batch.seq_len as i64, 2], DOUBLE);
    for (family, spec) in family_specs() {
        let base = tiny_base(spec);
        for kernels in KERNELS {
            let model = model(&base, &lora(1), &plain_router(), kernels)?;
            assert!(model.routers().is_empty());
            let expected = logits_by_hand(&model, &inputs, &mut |_| g.shallow_clone());
            for source in [RoutingSource::Router, RoutingSource::All, RoutingSource::Uniform] {
                let found = logits(&model, &inputs, &source);
                assert_close(&format!("{family}, {kernels:?}"), &found, &expected, 1e-10);
            }
        }
    }
    Ok(())
}

/// The loss of a batch and its gradients.
fn pass(
    model: &RoutedModel,
    inputs: &Inputs,
    source: &RoutingSource,
    mode: ForwardMode,
) -> (Tensor, BTreeMap<String, Tensor>) {
    let loss = model.loss(inputs, source, mode, mean_loss(20)).0.loss;
    (loss.detach(), gradients(model, &loss))
}

/// It has the options of `[lora]`, so it is a DoRA or PiSSA part if the experts are. Rank 1 beside
/// experts of rank 2 leaves the stacks of a module uneven, rank 2 does not.
#[test]
fn its_loss_and_gradients_are_those_of_an_expert_more_under_given_weights() -> Result<()> {
    let _generator = seed(604);
    let batch = batch();
    let (inputs, _) = inputs(&batch)?;
    let shape = [batch.num_rows as i64, batch.seq_len as i64, 3];
    for (family, spec) in family_specs() {
        let base = tiny_base(spec);
        for ((name, lora), rank) in
            kinds().into_iter().flat_map(|kind| [(kind.clone(), 1), (kind, 2)])
        {
            let lora = LoraConfig { shared_rank: rank, ..lora };
            let mut one_more = specs(&lora, &base)?;
            assert!(one_more.last().is_some_and(|spec| spec.shared), "{name}");
            one_more.iter_mut().for_each(|spec| spec.shared = false);
            let g = Tensor::rand(shape, DOUBLE);
            for kernels in KERNELS {
                let what = format!("{family}, {name}, rank {rank}, {kernels:?}");
                let shared = model(&base, &lora, &plain_router(), kernels)?;
                let compute = Compute { kind: Kind::Double, kernels };
                let router = RouterSpec::default();
                let cpu = Device::Cpu;
                let other = RoutedModel::with_experts(&base, &one_more, &router, cpu, compute);
                let own = shared.tensors().into_iter();
                let own = own.filter(|(name, _)| !name.starts_with("router"));
                other.load_some(&own.map(|(n, t)| (as_expert(&n), t)).collect())?;
                let mode = ForwardMode::EVAL;
                let given = RoutingSource::Given(g.shallow_clone());
                let (loss, grads) = pass(&shared, &inputs, &given, mode);
                let given = RoutingSource::Given(and_one(&g));
                let (expected_loss, expected) = pass(&other, &inputs, &given, mode);
                assert_close(&what, &loss, &expected_loss, 1e-11);
                for (name, grad) in grads.iter().filter(|(name, _)| !name.starts_with("router")) {
                    let expected = &expected[&as_expert(name)];
                    assert_close(&format!("{what}, {name}"), grad, expected, 1e-11);
                }
                let moved = |(name, grad): (&String, &Tensor)| {
                    name.contains(".shared.lora_b")
                        && max_difference(grad, &grad.zeros_like()) > 1e-6
                };
                assert!(grads.iter().any(moved), "{what}: it is not trained");
            }
        }
    }
    Ok(())
}

/// The name of a tensor if the part were the fourth expert.
fn as_expert(name: &str) -> String {
    name.replace(".shared.", ".expert_3.")
}

/// Each token skips the experts that it did not choose, but never the part that is always on.
#[test]
fn it_is_computed_for_every_token_where_experts_are_skipped() -> Result<()> {
    let _generator = seed(605);
    let base = tiny_base(gpt2_spec(2, 4, 16));
    for (rank, shared_rank, top_k) in [(96, 96, 1), (96, 8, 1), (160, 3, 2)] {
        let lora = LoraConfig { num_experts: 6, rank, shared_rank, ..lora(6) };
        for router in routers() {
            let router = RouterConfig { top_k: Some(top_k), ..router };
            let what = format!("ranks {rank} and {shared_rank}, {router:?}");
            for kernels in KERNELS {
                let model = model(&base, &lora, &router, kernels)?;
                assert!(model.skips_experts(), "{what}");
                let mut weights = |place: &Place<'_>| by_formula(&model, &router, place);
                let expected = logits_by_hand(&model, &two_rows(), &mut weights);
                let found = logits(&model, &two_rows(), &RoutingSource::Router);
                assert_close(&what, &found, &expected, 1e-9);
                // one after the other, experts are not skipped
                let looped = LoraDropout { probability: 0.0, masks: DropoutMasks::PerExpert };
                let [skipping, whole] = [LoraDropout::NONE, looped].map(|dropout| {
                    let mode = ForwardMode { dropout, ..ForwardMode::EVAL };
                    pass(&model, &two_rows(), &RoutingSource::Router, mode)
                });
                assert_same(&what, &skipping, &whole, 1e-10);
            }
        }
    }
    Ok(())
}

#[track_caller]
fn assert_same(
    what: &str,
    (loss, grads): &(Tensor, BTreeMap<String, Tensor>),
    (expected_loss, expected): &(Tensor, BTreeMap<String, Tensor>),
    tolerance: f64,
) {
    assert_close(what, loss, expected_loss, tolerance);
    assert!(grads.keys().eq(expected.keys()), "{what}");
    for (name, grad) in grads {
        let scale = expected[name].abs().max().double_value(&[]).max(1.0);
        assert_close(&format!("{what}, {name}"), grad, &expected[name], tolerance * scale);
    }
}

/// The fused operations, the reference and gradient checkpointing give the same loss and gradients.
#[test]
fn every_way_to_compute_it_gives_the_same_gradients() -> Result<()> {
    let _generator = seed(606);
    let batch = batch();
    let (inputs, _) = inputs(&batch)?;
    for (family, spec) in family_specs() {
        let base = tiny_base(spec);
        for router in routers().into_iter().flat_map(|router| {
            let by_prompt = RouterConfig { level: RoutingLevel::Sequence, ..router.clone() };
            let top_k = RouterConfig { top_k: Some(2), ..router.clone() };
            [router, by_prompt, top_k]
        }) {
            let models = KERNELS.map(|kernels| model(&base, &lora(3), &router, kernels));
            let [fused, reference] = models;
            let (fused, reference) = (fused?, reference?);
            reference.load(&fused.tensors())?;
            let by = &RoutingSource::Router;
            let expected = pass(&reference, &inputs, by, ForwardMode::EVAL);
            let mut modes = vec![ForwardMode::EVAL];
            if router.input != RouterInput::ModuleInput {
                modes.push(ForwardMode { gradient_checkpointing: true, ..ForwardMode::EVAL });
            }
            for (model, mode) in [&fused, &reference]
                .into_iter()
                .flat_map(|m| modes.iter().map(move |&mode| (m, mode)))
            {
                let what = format!("{family}, {mode:?}, {router:?}");
                assert_same(&what, &pass(model, &inputs, by, mode), &expected, 1e-11);
            }
        }
    }
    Ok(())
}

#[test]
fn it_is_trained_with_whatever_decides_the_weights() -> Result<()> {
    let _generator = seed(607);
    let base = tiny_base(tiny_config());
    let model = model(&base, &lora(3), &plain_router(), Kernels::Auto)?;
    let parts = |routing| -> std::collections::BTreeSet<String> {
        let trained = model.trained(routing, None).parameters.into_iter();
        let part = |name: String| name.rsplit('.').nth(1).expect("it has parts").to_owned();
        trained.map(|parameter| part(parameter.name)).collect()
    };
    let all = ["expert_0", "expert_1", "expert_2", "shared"];
    for routing in
        [RoutingChoice::Uniform, RoutingChoice::All, RoutingChoice::Record, RoutingChoice::Domain]
    {
        assert!(parts(routing).iter().eq(all), "{routing}");
    }
    assert!(
        parts(RoutingChoice::Router).iter().eq(all
            .iter()
            .copied()
            .chain(["router"])
            .collect::<std::collections::BTreeSet<_>>())
    );
    assert!(parts(RoutingChoice::Expert(1)).iter().eq(["expert_1", "shared"]));
    assert!(parts(RoutingChoice::None).is_empty());
    Ok(())
}

#[test]
fn it_has_the_scaling_of_the_experts_on_each_module_with_its_own_rank() -> Result<()> {
    let base = tiny_config();
    let text = "rank = 4\nalpha = 6.0\nshared_rank = 3\nrank_pattern = { 'mlp.c_fc' = 2 }\n\
                alpha_pattern = { 'h.1.attn.c_attn' = 1.0 }\n\
                experts = [{ rank = 9, alpha = 1.0, target_modules = ['mlp.c_proj'] }]";
    for more in ["", "use_rslora = true", "experts_per_layer = [1, 4]"] {
        let lora: LoraConfig = toml::from_str(&format!("{more}\n{text}"))?;
        let shared = ExpertSpec::of_shared(&lora, &base)?.expect("it has a rank");
        // expert 3 is in layer 1 alone if the layers have experts of their own
        let expert = ExpertSpec::new(&LoraConfig { experts_per_layer: None, ..lora }, 3, &base)?;
        assert!(shared.modules.keys().eq(expert.modules.keys()), "{more}");
        for (&path, size) in &shared.modules {
            assert_eq!(size.rank, 3);
            let [found, expected] = [&shared, &expert].map(|spec| spec.scaling(path));
            let (found, expected) = (found.expect("it is there"), expected.expect("and there"));
            assert!((found - expected).abs() < 1e-14, "{more}, {path}: {found}, {expected}");
        }
        assert!(shared.shared && shared.trainable);
    }
    assert_eq!(ExpertSpec::of_shared(&LoraConfig::default(), &base)?, None);
    Ok(())
}
