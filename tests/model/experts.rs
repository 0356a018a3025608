//! What experts add to the base, and what they do not change.

use anyhow::Result;
use dylora::config::{
    DropoutMasks, ExpertConfig, LoraConfig, LoraInit, ModulePath, RouterConfig, RoutingChoice,
    TargetModule,
};
use dylora::model::decoder::linear::{Layout, Linear};
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::init::InitialValues;
use dylora::model::experts::spec::{ExpertSpec, RankAlpha};
use dylora::model::experts::stack::LoraExperts;
use dylora::model::experts::weights::RoutingWeights;
use dylora::model::{ForwardMode, Recorder, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{
    DOUBLE, assert_close, gradients, logits, max_difference, mean_loss, new_model, plain_router,
    seed, tiny_base, tiny_config, tiny_lora, tiny_model, two_rows,
};

fn with_dropout(probability: f64, masks: DropoutMasks) -> ForwardMode {
    ForwardMode { dropout: LoraDropout { probability, masks }, ..ForwardMode::EVAL }
}

#[test]
fn fresh_experts_leave_the_bases_logits_unchanged() {
    let _generator = seed(1);
    let base = tiny_base(tiny_config());
    let inputs = two_rows();
    for kind in [Kind::Float, Kind::Double] {
        let plain = RoutedModel::plain(&base, Device::Cpu, kind, false);
        let expected = logits(&plain, &inputs, &RoutingSource::Base);
        for num_experts in [1, 3] {
            let lora = LoraConfig { num_experts, ..tiny_lora() };
            let router = plain_router();
            let model = new_model(&base, &lora, &router, kind);
            let fresh = logits(&model, &inputs, &RoutingSource::Router);
            assert_eq!(max_difference(&fresh, &expected), 0.0, "{num_experts} experts, {kind:?}");
        }
    }
}

#[test]
fn zero_routing_weights_leave_the_base() -> Result<()> {
    let _generator = seed(2);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let inputs = two_rows();
    let base = logits(&model, &inputs, &RoutingSource::Base);
    let zeros = RoutingSource::Given(Tensor::zeros([2, 7, 3], DOUBLE));
    for masks in [DropoutMasks::Shared, DropoutMasks::PerExpert] {
        let hidden = model.forward(&inputs, &zeros, with_dropout(0.0, masks), None).hidden;
        assert_eq!(max_difference(&model.logits(&hidden), &base), 0.0, "{masks:?}");
    }
    assert!(max_difference(&logits(&model, &inputs, &RoutingSource::Router), &base) > 0.1);
    Ok(())
}

/// Reference: `y + scaling * x A^T B^T` (LoRA, arXiv:2106.09685, eq. 3), written out.
#[test]
fn one_expert_is_plain_lora_to_the_bit() -> Result<()> {
    let _generator = seed(3);
    let lora = LoraConfig { num_experts: 1, ..tiny_lora() };
    let inputs = two_rows();
    for kind in [Kind::Float, Kind::Double] {
        let model = tiny_model(&lora, &plain_router(), kind)?;
        assert!(model.routers().is_empty());
        let (ids, positions) = (&inputs.input_ids, &inputs.position_ids);
        let mut x = model.base().embed(ids, positions, kind);
        let context = model.base().context(&inputs.mask, positions, kind);
        for (layer, block) in model.base().blocks.iter().enumerate() {
            x = block.forward(&x, &context, &mut |module, x| {
                let path = ModulePath { layer, module };
                let tensor = |key| model.expert_tensor(path, 0, key).expect("every module has one");
                let (a, b) = (tensor("lora_a"), tensor("lora_b"));
                block.linears[&module].forward(x) + x.matmul(&a.tr()).matmul(&b.tr()) * 6.0 / 4.0
            });
        }
        let expected = model.logits(&model.base().final_norm.forward(&x));
        let hidden = |masks| {
            model.forward(&inputs, &RoutingSource::Router, with_dropout(0.0, masks), None).hidden
        };
        for masks in [DropoutMasks::Shared, DropoutMasks::PerExpert] {
            assert_close(&format!("{masks:?}"), &model.logits(&hidden(masks)), &expected, 0.0);
        }
    }
    Ok(())
}

#[test]
fn a_one_hot_weight_is_that_expert_alone() -> Result<()> {
    let _generator = seed(4);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let alone = LoraConfig { num_experts: 1, ..tiny_lora() };
    let inputs = two_rows();
    for expert in 0..3 {
        let alone = new_model(model.base(), &alone, &plain_router(), Kind::Double);
        let own = format!(".expert_{expert}.");
        let tensors = model.tensors().into_iter().filter(|(name, _)| name.contains(&own));
        alone.load(&tensors.map(|(name, t)| (name.replace(&own, ".expert_0."), t)).collect())?;
        let expected = logits(&alone, &inputs, &RoutingSource::Router);
        let one_hot = logits(&model, &inputs, &RoutingSource::Expert(expert));
        assert_close(&format!("expert {expert}"), &one_hot, &expected, 1e-13);
    }
    Ok(())
}

#[test]
fn permuting_the_experts_with_their_weights_changes_nothing() -> Result<()> {
    let _generator = seed(14);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let router = plain_router();
    let permuted = new_model(model.base(), &tiny_lora(), &router, Kind::Double);
    let order = [2, 0, 1];
    for (name, tensor) in permuted.tensors() {
        let source = order.iter().enumerate().find_map(|(to, from)| {
            let to = format!(".expert_{to}.");
            name.contains(&to).then(|| name.replace(&to, &format!(".expert_{from}.")))
        });
        let mut tensor = tensor;
        if let Some(source) = source {
            tensor.copy_(&model.tensors()[&source]);
        }
    }
    let weights = Tensor::randn([2, 7, 3], DOUBLE);
    let index = Tensor::from_slice(&order.map(i64::from));
    let expected = logits(&model, &two_rows(), &RoutingSource::Given(weights.shallow_clone()));
    let mixed = RoutingSource::Given(weights.index_select(2, &index));
    assert_close("permuted", &logits(&permuted, &two_rows(), &mixed), &expected, 1e-12);
    // the order of the weights matters: in the original order they give another mixture
    let other = logits(&permuted, &two_rows(), &RoutingSource::Given(weights));
    assert!(max_difference(&other, &expected) > 0.1);
    Ok(())
}

/// Each row is routed to the expert that its record names, as by PEFT's `adapter_names`.
#[test]
fn a_records_expert_decides_its_own_tokens() -> Result<()> {
    let _generator = seed(15);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let mut inputs = two_rows();
    inputs.expert_ids = Some(Tensor::from_slice(&[2i64, -1]).view([2, 1]).expand([2, 7], false));
    let by_record = logits(&model, &inputs, &RoutingSource::Record);
    let rows = [RoutingSource::Expert(2), RoutingSource::Base].map(|s| logits(&model, &inputs, &s));
    for (row, expected) in rows.iter().enumerate() {
        let row = row as i64;
        assert_close("row", &by_record.get(row), &expected.get(row), 1e-12);
    }
    Ok(())
}

#[test]
fn switching_the_source_touches_neither_experts_nor_what_is_trained() -> Result<()> {
    let _generator = seed(18);
    let frozen = ExpertConfig { trainable: false, ..ExpertConfig::default() };
    let lora = LoraConfig { experts: vec![frozen], ..tiny_lora() };
    let model = tiny_model(&lora, &plain_router(), Kind::Double)?;
    let state = || {
        let trained = model.trained(RoutingChoice::Router, None);
        let leaves = trained.leaves.iter().map(Tensor::requires_grad).collect::<Vec<_>>();
        let names = trained.parameters.into_iter().map(|p| p.name).collect::<Vec<_>>();
        (leaves, names)
    };
    let copies = || model.tensors().into_iter().map(|(name, t)| (name, t.copy()));
    let (before, tensors) = (state(), copies().collect::<Vec<_>>());
    let mut inputs = two_rows();
    inputs.expert_ids = Some(Tensor::zeros([2, 7], (Kind::Int64, Device::Cpu)));
    let given = Tensor::randn([2, 7, 3], DOUBLE);
    use RoutingSource::{All, Base, Expert, Given, Record, Router, Uniform};
    for source in [Router, Uniform, All, Expert(0), Record, Base, Given(given)] {
        let _ = logits(&model, &inputs, &source);
        assert_eq!(state(), before, "{source:?}");
    }
    for ((name, tensor), (_, copy)) in tensors.iter().zip(copies()) {
        assert_eq!(max_difference(tensor, &copy), 0.0, "`{name}`");
    }
    assert!(before.1.iter().all(|name| !name.contains(".expert_0.")));
    Ok(())
}

#[test]
fn every_weight_one_is_the_sum_of_the_experts() -> Result<()> {
    let _generator = seed(16);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let ones = RoutingSource::Given(Tensor::ones([3], DOUBLE));
    let expected = logits(&model, &two_rows(), &ones);
    let all = logits(&model, &two_rows(), &RoutingSource::All);
    assert_close("all", &all, &expected, 1e-12);
    Ok(())
}

#[test]
fn an_expert_is_off_before_its_last_invocation() -> Result<()> {
    let _generator = seed(17);
    let invoked = ExpertConfig { alora_invocation_tokens: vec![18, 28], ..ExpertConfig::default() };
    let lora = LoraConfig { experts: vec![invoked], ..tiny_lora() };
    let model = tiny_model(&lora, &plain_router(), Kind::Double)?;
    // the tokens 18 28 begin at positions 1 and 3 of the second row; the first row lacks them
    let output = model.forward(&two_rows(), &RoutingSource::Uniform, ForwardMode::EVAL, None);
    let RoutingWeights::PerToken(weights) = &output.weights[0] else { panic!("they are masked") };
    let third = 1.0 / 3.0;
    let expected = [vec![0.0; 7], vec![0.0, 0.0, 0.0, third, third, third, third]].concat();
    let first = weights.select(2, 0).contiguous().view([-1]);
    assert_close("expert 0", &first, &Tensor::from_slice(&expected), 1e-15);
    let others = weights.narrow(2, 1, 2);
    assert_close("others", &others, &others.full_like(third), 1e-15);
    for source in [RoutingSource::Router, RoutingSource::All, RoutingSource::Expert(0)] {
        let logits = logits(&model, &two_rows(), &source);
        assert!(logits.isfinite().all().int64_value(&[]) == 1);
    }
    let none = logits(&model, &two_rows(), &RoutingSource::Base).get(0);
    let alone = logits(&model, &two_rows(), &RoutingSource::Expert(0)).get(0);
    assert_close("a row without invocation", &alone, &none, 1e-13);
    Ok(())
}

#[test]
fn uniform_routing_is_an_even_weight_on_each_expert() -> Result<()> {
    let _generator = seed(5);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let inputs = two_rows();
    let even = RoutingSource::Given(Tensor::full([2, 7, 3], 1.0 / 3.0, DOUBLE));
    let expected = logits(&model, &inputs, &even);
    assert_eq!(max_difference(&logits(&model, &inputs, &RoutingSource::Uniform), &expected), 0.0);
    Ok(())
}

#[test]
fn fused_experts_equal_looped_ones_in_values_and_gradients() -> Result<()> {
    let _generator = seed(6);
    let inputs = two_rows();
    for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::Double, 1e-12)] {
        for top_k in [None, Some(2)] {
            let router = RouterConfig { top_k, temperature: 0.7, ..plain_router() };
            let model = tiny_model(&tiny_lora(), &router, kind)?;
            let run = |masks| {
                let mode = with_dropout(0.0, masks);
                let (loss, _) = model.loss(&inputs, &RoutingSource::Router, mode, mean_loss(12));
                (loss.loss.detach(), gradients(&model, &loss.loss))
            };
            let (fused, fused_grads) = run(DropoutMasks::Shared);
            let (looped, looped_grads) = run(DropoutMasks::PerExpert);
            assert_close("loss", &fused, &looped, tolerance * looped.double_value(&[]));
            for (name, looped) in &looped_grads {
                // the tolerance is relative if a gradient has elements above 1, else absolute
                let scale = looped.abs().max().double_value(&[]);
                // an expert that none of these few tokens has chosen has no gradient
                assert!(scale > 0.0 || top_k.is_some(), "the gradient of `{name}` is zero");
                assert_close(name, &fused_grads[name], looped, tolerance * scale.max(1.0));
            }
        }
    }
    Ok(())
}

#[test]
fn the_experts_of_a_layer_share_one_dropout_mask_unless_each_has_its_own() {
    let _generator = seed(7);
    let options = (Kind::Double, Device::Cpu);
    let (a, b) = (Tensor::randn([4, 16], options), Tensor::randn([8, 4], options));
    let weight = Tensor::randn([16, 8], options);
    let linear =
        Linear::new(weight.shallow_clone(), Layout::InOut, Some(Tensor::zeros([8], options)));
    let path = ModulePath { layer: 0, module: TargetModule::AttnCAttn };
    let experts = |count: usize| {
        let spec = ExpertSpec {
            modules: [(path, RankAlpha { rank: 4, alpha: 6.0 })].into(),
            use_rslora: false,
            use_dora: false,
            init: LoraInit::Default,
            trainable: true,
            alora_invocation_tokens: vec![],
            shared: false,
        };
        let specs = vec![spec; count];
        let new =
            LoraExperts::new(path, &specs, &weight, &linear, Kind::Double, InitialValues::Fresh);
        let experts = new.expect("they target the module");
        for mut part in experts.tensors() {
            part.tensor.copy_(if part.key == "lora_a" { &a } else { &b });
        }
        experts
    };
    let (one, twins) = (experts(1), experts(2));
    let (x, y) = (Tensor::randn([2, 7, 16], options), Tensor::zeros([2, 7, 8], options));
    let halves = RoutingWeights::PerToken(Tensor::full([2, 7, 2], 0.5, options));
    let difference = |masks| {
        let dropout = LoraDropout { probability: 0.5, masks };
        tch::manual_seed(8);
        let alone = one.add(y.shallow_clone(), &x, &linear, &RoutingWeights::Ones, dropout);
        tch::manual_seed(8);
        max_difference(&twins.add(y.shallow_clone(), &x, &linear, &halves, dropout), &alone)
    };
    assert!(difference(DropoutMasks::Shared) < 1e-13);
    assert!(difference(DropoutMasks::PerExpert) > 0.1);
}

#[test]
fn dropout_reaches_experts_in_training_only_and_the_base_never() -> Result<()> {
    let _generator = seed(9);
    let lora = LoraConfig { dropout: 0.5, ..tiny_lora() };
    let model = tiny_model(&lora, &plain_router(), Kind::Double)?;
    let inputs = two_rows();
    let run = |source, mode| model.forward(&inputs, source, mode, None).hidden;
    let evaluated = run(&RoutingSource::Router, ForwardMode::EVAL);
    assert_eq!(max_difference(&run(&RoutingSource::Router, ForwardMode::EVAL), &evaluated), 0.0);
    let training = with_dropout(0.5, DropoutMasks::Shared);
    assert!(max_difference(&run(&RoutingSource::Router, training), &evaluated) > 0.01);
    let base = run(&RoutingSource::Base, ForwardMode::EVAL);
    assert_eq!(max_difference(&run(&RoutingSource::Base, training), &base), 0.0);
    Ok(())
}

#[test]
fn only_experts_and_router_are_trained() -> Result<()> {
    let _generator = seed(10);
    let lora = LoraConfig { target_modules: [TargetModule::AttnCProj].into(), ..tiny_lora() };
    let model = tiny_model(&lora, &plain_router(), Kind::Float)?;
    let trained = model.trained(RoutingChoice::Router, None).parameters.into_iter();
    let names: Vec<_> = trained.map(|p| p.name).collect();
    let experts = ["expert_0", "expert_1", "expert_2"];
    let of = |layer: i64, key: &str| {
        experts.map(|expert| format!("h.{layer}.attn.c_proj.{expert}.{key}")).to_vec()
    };
    let router = ["router.weight", "router.bias"].map(String::from).to_vec();
    let expected = [of(0, "lora_a"), of(0, "lora_b"), of(1, "lora_a"), of(1, "lora_b"), router];
    assert_eq!(names, expected.concat());
    assert!(model.base().named_parameters().iter().all(|(_, tensor)| !tensor.requires_grad()));
    Ok(())
}

#[test]
fn every_target_module_receives_the_routing_weights() -> Result<()> {
    let _generator = seed(11);
    let target_modules = [TargetModule::MlpCProj, TargetModule::AttnCAttn].into();
    let lora = LoraConfig { target_modules, ..tiny_lora() };
    let model = tiny_model(&lora, &plain_router(), Kind::Float)?;
    let routed = |source| {
        let mut recorder = Recorder::default();
        let _ = model.forward(&two_rows(), source, ForwardMode::EVAL, Some(&mut recorder));
        recorder.updates.iter().map(|update| update.path.to_string()).collect::<Vec<_>>()
    };
    let all = ["h.0.attn.c_attn", "h.0.mlp.c_proj", "h.1.attn.c_attn", "h.1.mlp.c_proj"];
    assert_eq!(routed(&RoutingSource::Router), all);
    assert_eq!(routed(&RoutingSource::Uniform), all);
    assert!(routed(&RoutingSource::Base).is_empty());
    Ok(())
}

#[test]
fn experts_and_their_gradients_stay_in_f32_beside_a_bf16_base() -> Result<()> {
    let _generator = seed(12);
    let run = |kind| -> Result<_> {
        tch::manual_seed(12);
        let model = tiny_model(&tiny_lora(), &plain_router(), kind)?;
        let mode = ForwardMode::EVAL;
        let (loss, routing) = model.loss(&two_rows(), &RoutingSource::Router, mode, mean_loss(12));
        assert_eq!(routing[0].probs.kind(), Kind::Float);
        assert_eq!(loss.loss.kind(), Kind::Float);
        Ok((loss.loss.double_value(&[]), gradients(&model, &loss.loss)))
    };
    let (exact, exact_grads) = run(Kind::Float)?;
    let (rough, rough_grads) = run(Kind::BFloat16)?;
    assert!((exact - rough).abs() < 0.02 * exact, "{rough} is far from {exact}");
    assert!(rough_grads.values().all(|grad| grad.kind() == Kind::Float));
    // bf16 has 8 significant bits, so gradients have about the same direction but differ
    for (name, exact) in exact_grads {
        let rough = &rough_grads[&name];
        let norms = (exact.norm() * rough.norm()).double_value(&[]);
        let cosine = (exact * rough).sum(Kind::Float).double_value(&[]) / norms;
        assert!(cosine > 0.95, "`{name}`: cosine {cosine}");
    }
    Ok(())
}

/// Early in a run, magnitudes and PiSSA's matrices are close to their initial values. The update is
/// their small difference, which must survive the rounding to bf16.
#[test]
fn a_small_change_counts_beside_a_bf16_base() {
    let _generator = seed(14);
    let weight = Tensor::randn([16, 8], DOUBLE) * 0.3;
    let x = Tensor::randn([1, 6, 16], DOUBLE);
    let path = ModulePath { layer: 0, module: TargetModule::AttnCAttn };
    let update = |use_dora, init, kind: Kind, masks| {
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let spec = ExpertSpec {
            modules: [(path, RankAlpha { rank: 4, alpha: 6.0 })].into(),
            use_rslora: false,
            use_dora,
            init,
            trainable: true,
            alora_invocation_tokens: vec![],
            shared: false,
        };
        let bias = Tensor::zeros([8], (kind, Device::Cpu));
        let linear = Linear::new(weight.to_kind(kind), Layout::InOut, Some(bias));
        let new = LoraExperts::new(path, &[spec], &weight, &linear, wide, InitialValues::Fresh);
        let experts = new.expect("it targets the module");
        for part in experts.tensors().iter().filter(|part| !part.key.starts_with("initial")) {
            tch::no_grad(|| part.tensor.shallow_clone().copy_(&(&part.tensor * 1.002)));
        }
        let y = Tensor::zeros([1, 6, 8], (kind, Device::Cpu));
        let ones = Tensor::ones([1, 6, 1], (wide, Device::Cpu));
        // this dropout drops nothing, but DoRA then computes `x W` instead of taking it from `y`
        let dropout = LoraDropout { probability: 1e-9, masks };
        let weights = RoutingWeights::PerToken(ones);
        experts.add(y, &x.to_kind(kind), &linear, &weights, dropout)
    };
    for (use_dora, init) in [(true, LoraInit::Default), (false, LoraInit::Pissa)] {
        for masks in [DropoutMasks::Shared, DropoutMasks::PerExpert] {
            let exact = update(use_dora, init, Kind::Double, masks);
            let rough = update(use_dora, init, Kind::BFloat16, masks).to_kind(Kind::Double);
            let error = ((rough - &exact).norm() / exact.norm()).double_value(&[]);
            assert!(error < 0.02, "{init:?}, {masks:?}: {error}");
        }
    }
}
