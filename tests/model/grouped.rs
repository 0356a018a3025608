//! Computing experts only for the tokens that chose them gives the same results as computing all
//! experts at once.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{
    DropoutMasks, ExpertConfig, LoraConfig, LoraInit, ModulePath, RouterNoise, TargetModule,
};
use dylora::model::RoutedModel;
use dylora::model::experts::assignments::Assignments;
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::grouped::Products;
use dylora::model::experts::stack::LoraExperts;
use dylora::model::experts::weights::RoutingWeights;
use dylora::model::routing::router::{Router, RouterSpec, RoutingRule};
use tch::{Device, Kind, Tensor};

use crate::common::{
    DOUBLE, assert_close, gradients, max_difference, plain_router, seed, tiny_lora, tiny_model,
};

const PATH: ModulePath = ModulePath { layer: 0, module: TargetModule::AttnCAttn };

/// The tolerance of comparisons in f64.
const TOLERANCE: f64 = 1e-12;

/// Five experts. The first four target the module with ranks 4, 2, 7 and 4, and the second of them
/// has another scaling. The last does not target the module.
fn mixed(kind: Kind) -> Result<RoutedModel> {
    let rank = |rank| ExpertConfig { rank: Some(rank), ..ExpertConfig::default() };
    let second = ExpertConfig { alpha: Some(1.0), ..rank(2) };
    let lacking = ExpertConfig { target_modules: Some([TargetModule::MlpCFc].into()), ..rank(3) };
    let experts = vec![ExpertConfig::default(), second, rank(7), rank(4), lacking];
    tiny_model(&LoraConfig { num_experts: 5, experts, ..tiny_lora() }, &plain_router(), kind)
}

fn even(num_experts: i64, kind: Kind) -> Result<RoutedModel> {
    tiny_model(&LoraConfig { num_experts, ..tiny_lora() }, &plain_router(), kind)
}

fn experts(model: &RoutedModel) -> &LoraExperts {
    model.experts(PATH).expect("every module has some")
}

/// The ways to compute the experts of a module.
#[derive(Debug, Clone, Copy)]
enum Form {
    Fused,
    Grouped,
    By(Products),
}

/// The module's output, `[2, 7, o]`, for the input `x`.
fn output(
    model: &RoutedModel,
    x: &Tensor,
    g: &Tensor,
    selected: &Tensor,
    form: Form,
    dropout: LoraDropout,
) -> Tensor {
    let (experts, linear) = (experts(model), &model.base().blocks[0].linears[&PATH.module]);
    let y = linear.forward(x);
    let assignments = Assignments::new(selected, model.num_experts());
    match form {
        Form::Fused => {
            experts.add(y, x, linear, &RoutingWeights::PerToken(g.shallow_clone()), dropout)
        }
        Form::Grouped => experts.add_grouped(y, x, g, &assignments, dropout),
        Form::By(products) => experts.add_grouped_by(products, y, x, g, &assignments, dropout),
    }
}

/// An output, and the gradients of a random linear function of it by x, by g and by every trained
/// parameter.
struct Run {
    output: Tensor,
    x: Tensor,
    g: Tensor,
    parameters: BTreeMap<String, Tensor>,
}

fn run(
    model: &RoutedModel,
    x: &Tensor,
    g: &Tensor,
    selected: &Tensor,
    form: Form,
    dropout: LoraDropout,
) -> Run {
    let [x, g] = [x, g].map(|leaf| leaf.detach().set_requires_grad(true));
    tch::manual_seed(77);
    let output = output(model, &x, &g, selected, form, dropout);
    let direction = Tensor::randn(output.size(), (output.kind(), Device::Cpu));
    let loss = (&output * direction).sum(None);
    let grads = Tensor::run_backward(&[&loss], &[&x, &g], true, false);
    let [x, g] = <[Tensor; 2]>::try_from(grads).expect("one for each");
    Run { output: output.detach(), x, g, parameters: gradients(model, &loss) }
}

/// Chooses `k` random experts, but not `never`, for each of 2 x 7 tokens. Returns them,
/// `[2, 7, k]`, and random weights of either sign that are zero for all other experts, `[2, 7, e]`.
fn selection(num_experts: i64, k: i64, never: Option<i64>) -> (Tensor, Tensor) {
    let mut scores = Tensor::randn([2, 7, num_experts], DOUBLE);
    if let Some(never) = never {
        let _ = scores.narrow(2, never, 1).fill_(-1e9);
    }
    let (_, selected) = scores.topk(k, -1, true, false);
    let weights = Tensor::randn([2, 7, k], DOUBLE);
    scores = scores.zeros_like().scatter(-1, &selected, &weights);
    (selected, scores)
}

/// Checks that two runs agree. The gradients of weights that were not selected may differ, but must
/// be zero in `grouped`.
#[track_caller]
fn assert_same(grouped: &Run, fused: &Run, selected: &Tensor, tolerance: f64) {
    assert_close("output", &grouped.output, &fused.output, tolerance * 10.0);
    assert_close("gradient of x", &grouped.x, &fused.x, tolerance * 10.0);
    let mask = fused.g.zeros_like().scatter_value(-1, selected, 1.0);
    assert_close("gradient of g", &grouped.g, &(&fused.g * mask), tolerance * 10.0);
    assert!(grouped.parameters.keys().eq(fused.parameters.keys()));
    for (name, fused) in &fused.parameters {
        let scale = fused.abs().max().double_value(&[]).max(1.0);
        assert_close(name, &grouped.parameters[name], fused, tolerance * scale);
    }
}

#[test]
fn chosen_experts_alone_equal_all_at_once_in_values_and_gradients() -> Result<()> {
    let _generator = seed(301);
    for model in [even(4, Kind::Double)?, mixed(Kind::Double)?] {
        let x = Tensor::randn([2, 7, 16], DOUBLE);
        for k in 1..=3 {
            for never in [None, Some(1)] {
                let (selected, g) = selection(model.num_experts(), k, never);
                let run = |form| run(&model, &x, &g, &selected, form, LoraDropout::NONE);
                let (grouped, fused) = (run(Form::Grouped), run(Form::Fused));
                assert_same(&grouped, &fused, &selected, TOLERANCE);
                let largest = |x: &Tensor| x.abs().max().double_value(&[]);
                assert!(largest(&grouped.x) > 0.1 && largest(&grouped.g) > 0.1);
                let of = |expert| format!("{PATH}.expert_{expert}.lora_a");
                assert!(largest(&grouped.parameters[&of(0)]) > 0.01);
                assert_eq!(largest(&grouped.parameters[&of(1)]) == 0.0, never.is_some());
            }
        }
    }
    Ok(())
}

/// An expert can be chosen and have weight 0, for example before its invocation tokens.
#[test]
fn a_chosen_expert_of_weight_zero_adds_nothing_but_has_a_gradient_for_its_weight() -> Result<()> {
    let _generator = seed(302);
    let model = mixed(Kind::Double)?;
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let (selected, g) = selection(5, 2, None);
    let _ = g.narrow(2, 2, 1).narrow(1, 0, 5).fill_(0.0);
    let run = |form| run(&model, &x, &g, &selected, form, LoraDropout::NONE);
    let grouped = run(Form::Grouped);
    assert_same(&grouped, &run(Form::Fused), &selected, TOLERANCE);
    let zero_but_chosen = selected.eq(2).any_dim(-1, false).narrow(1, 0, 5);
    assert!(zero_but_chosen.any().int64_value(&[]) == 1, "the seed is to choose it");
    let of_weight = grouped.g.select(2, 2).narrow(1, 0, 5).ne(0.0);
    assert!(of_weight.equal(&zero_but_chosen));
    Ok(())
}

#[test]
fn where_only_an_expert_without_the_module_is_chosen_nothing_is_added() -> Result<()> {
    let _generator = seed(303);
    let model = mixed(Kind::Double)?;
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let selected = Tensor::full([2, 7, 1], 4, (Kind::Int64, Device::Cpu));
    let g = Tensor::zeros([2, 7, 5], DOUBLE).scatter_value(-1, &selected, 1.0);
    let added = run(&model, &x, &g, &selected, Form::Grouped, LoraDropout::NONE);
    let base = model.base().blocks[0].linears[&PATH.module].forward(&x);
    assert_eq!(max_difference(&added.output, &base), 0.0);
    assert_eq!(added.g.abs().max().double_value(&[]), 0.0);
    Ok(())
}

/// If all experts are computed at once, the weights of experts that were not chosen also have
/// gradients. The router's scatter drops these, so its own gradient is the same.
#[test]
fn a_router_gets_the_same_gradient_either_way() -> Result<()> {
    let _generator = seed(304);
    let model = mixed(Kind::Double)?;
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let direction = Tensor::randn([2, 7, 48], DOUBLE);
    for k in 1..=3 {
        let spec = RouterSpec::default();
        let (noise, renormalize) = (RouterNoise::None, true);
        let rule = RoutingRule { temperature: 0.7.into(), top_k: Some(k), renormalize, noise };
        let fresh = Router::new(&spec, 5, 16, Kind::Double);
        let weight = (fresh.weight * 20.0).set_requires_grad(true);
        let router = Router { weight, bias: fresh.bias.set_requires_grad(true), ..fresh };
        let run = |form| {
            let routing = router.forward(&x, &rule, None);
            let selected = routing.selected.expect("k is below E");
            let y = output(&model, &x, &routing.weights, &selected, form, LoraDropout::NONE);
            let loss = (y * &direction).sum(None);
            let wanted = [&router.weight, &router.bias, &routing.weights];
            (Tensor::run_backward(&[loss], &wanted, false, false), selected)
        };
        let ((grouped, selected), (fused, _)) = (run(Form::Grouped), run(Form::Fused));
        for (name, at) in [("weight", 0), ("bias", 1)] {
            assert_close(name, &grouped[at], &fused[at], TOLERANCE * 10.0);
            // with top-1 routing the only weight is 1 whatever the router does
            assert_eq!(fused[at].abs().max().double_value(&[]) > 1e-3, k > 1, "{name}, k = {k}");
        }
        let unchosen = |g: &Tensor| {
            let unchosen = g.scatter_value(-1, &selected, 0.0);
            unchosen.abs().max().double_value(&[])
        };
        assert_eq!(unchosen(&grouped[2]), 0.0);
        assert!(unchosen(&fused[2]) > 0.1);
    }
    Ok(())
}

#[test]
fn both_ways_drop_the_same_inputs() -> Result<()> {
    let _generator = seed(305);
    let model = mixed(Kind::Double)?;
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let (selected, g) = selection(5, 2, None);
    let run = |form, probability| {
        let dropout = LoraDropout { probability, masks: DropoutMasks::Shared };
        run(&model, &x, &g, &selected, form, dropout)
    };
    let grouped = run(Form::Grouped, 0.4);
    assert_same(&grouped, &run(Form::Fused, 0.4), &selected, TOLERANCE);
    assert!(max_difference(&grouped.output, &run(Form::Grouped, 0.0).output) > 0.1);
    Ok(())
}

/// On the CPU, `at::_grouped_mm` is a loop in libtorch. It stands in for the bf16 kernel on CUDA.
#[test]
fn one_kernel_for_all_experts_equals_one_product_for_each() -> Result<()> {
    let _generator = seed(306);
    let model = even(4, Kind::Float)?;
    let x = Tensor::randn([2, 7, 16], (Kind::Float, Device::Cpu));
    for k in 1..=3 {
        for never in [None, Some(0), Some(3)] {
            let (selected, g) = selection(4, k, never);
            let g = g.to_kind(Kind::Float);
            let run = |form| run(&model, &x, &g, &selected, form, LoraDropout::NONE);
            let fused = run(Form::Fused);
            for products in [Products::Each, Products::Grouped] {
                assert_same(&run(Form::By(products)), &fused, &selected, 1e-5);
            }
        }
    }
    Ok(())
}

#[test]
fn assignments_count_the_tokens_of_each_expert() {
    let selected = Tensor::from_slice(&[3i64, 0, 0, 3, 2, 0]).view([1, 3, 2]);
    assert_eq!(Assignments::new(&selected, 5).counts(), [3, 0, 1, 2, 0]);
}

#[test]
fn dora_and_pissa_experts_are_computed_all_at_once() -> Result<()> {
    let _generator = seed(307);
    let selected = Tensor::zeros([2, 512, 1], (Kind::Int64, Device::Cpu));
    let x = Tensor::zeros([2, 512, 16], DOUBLE);
    let plain = LoraConfig { num_experts: 64, rank: 32, ..tiny_lora() };
    let dora = LoraConfig { use_dora: true, ..plain.clone() };
    let pissa = LoraConfig { init: LoraInit::Pissa, rank: 8, ..plain.clone() };
    for (lora, expected) in [(plain, true), (dora, false), (pissa, false)] {
        let model = tiny_model(&lora, &plain_router(), Kind::Double)?;
        let assignments = Assignments::new(&selected, 64);
        assert_eq!(experts(&model).skips(&x, &assignments), expected, "{lora:?}");
    }
    Ok(())
}
