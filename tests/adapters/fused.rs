//! Applying all experts at once and applying them one after the other compute the same function.

use anyhow::Result;
use dylora::config::{DropoutMasks, LoraConfig, TargetModules};
use dylora::model::{RoutedModel, RoutingSource};
use tch::{Kind, Tensor};

use crate::common::{
    DOUBLE, assert_close, assert_same_gradients, gradients, mean_loss, new_model, plain_router,
    randomize, seed, tiny_base, tiny_config, tiny_model, two_rows,
};
use crate::{logits_by, lora, mode};

const MIXED_RANKS: &str = r#"
    num_experts = 3
    target_modules = ["attn.c_attn", "mlp.c_fc"]
    rank_pattern = { "h.1.mlp.c_fc" = 5 }
    experts = [{ rank = 2 }, { rank = 7, alpha = 3.5 }]
"#;

const MISSING_MODULES: &str = r#"
    num_experts = 3
    rank = 3
    experts = [
        { target_modules = ["attn.c_attn"] },
        { target_modules = ["mlp.c_fc", "mlp.c_proj"] },
        { target_modules = ["attn.c_attn", "mlp.c_proj"] },
    ]
"#;

const ALL_DORA: &str = r#"
    num_experts = 3
    rank = 3
    target_modules = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    use_dora = true
"#;

const SOME_DORA: &str = r#"
    num_experts = 3
    rank = 3
    target_modules = ["attn.c_attn", "mlp.c_proj"]
    experts = [{ use_dora = true }, {}, { use_dora = true, rank = 2 }]
"#;

const COMPONENTS: &str = r#"
    num_experts = 4
    rank = 3
    target_modules = ["attn.c_attn", "mlp.c_proj"]
    experts = [{ init = "pissa" }, {}, { init = "olora", rank = 2 }, { init = "gaussian" }]
"#;

const RSLORA: &str = r#"
    num_experts = 3
    rank = 3
    target_modules = ["attn.c_proj", "mlp.c_fc"]
    experts = [{ use_rslora = true }, { use_rslora = true, alpha = 2.0 }]
"#;

const EVERYTHING: &str = r#"
    num_experts = 6
    rank = 3
    target_modules = ["attn.c_attn", "mlp.c_proj"]
    rank_pattern = { "mlp.c_proj" = 2, "h.0.attn.c_attn" = 4 }
    alpha_pattern = { "h.1.attn.c_attn" = 1.5 }
    experts = [
        { init = "pissa", use_dora = true },
        { target_modules = ["mlp.c_fc"], use_rslora = true },
        { init = "olora", use_rslora = true, rank = 5 },
        { use_dora = true, use_rslora = true, target_modules = ["attn.c_attn", "attn.c_proj"] },
        { alora_invocation_tokens = [18, 28], init = "gaussian" },
    ]
"#;

const CASES: [(&str, &str); 7] = [
    ("mixed ranks", MIXED_RANKS),
    ("missing modules", MISSING_MODULES),
    ("DoRA", ALL_DORA),
    ("DoRA beside others", SOME_DORA),
    ("PiSSA and OLoRA", COMPONENTS),
    ("rsLoRA", RSLORA),
    ("everything", EVERYTHING),
];

/// Random routing weights of either sign for `num_experts` experts, `[2, 7, e]`.
fn random_weights(num_experts: i64) -> Tensor {
    Tensor::randn([2, 7, num_experts], DOUBLE)
}

#[test]
fn all_at_once_and_the_loop_give_the_same_logits() -> Result<()> {
    let _generator = seed(120);
    for (name, text) in CASES {
        let model = tiny_model(&lora(text), &plain_router(), Kind::Double)?;
        let given = RoutingSource::Given(random_weights(model.num_experts()));
        for source in [RoutingSource::Router, RoutingSource::All, RoutingSource::Expert(1), given] {
            let [fused, looped] = [DropoutMasks::Shared, DropoutMasks::PerExpert]
                .map(|masks| logits_by(masks, &model, &two_rows(), &source));
            let scale = looped.abs().max().double_value(&[]);
            assert_close(&format!("{name}, {source:?}"), &fused, &looped, 1e-12 * scale);
        }
    }
    Ok(())
}

#[test]
fn all_at_once_and_the_loop_give_the_same_gradients() -> Result<()> {
    let _generator = seed(121);
    for (_, text) in CASES {
        let model = tiny_model(&lora(text), &plain_router(), Kind::Double)?;
        let run = |masks| {
            let router = &RoutingSource::Router;
            let (loss, _) = model.loss(&two_rows(), router, mode(masks, 0.0), mean_loss(12));
            gradients(&model, &loss.loss)
        };
        assert_same_gradients(&run(DropoutMasks::Shared), &run(DropoutMasks::PerExpert), 1e-12);
    }
    Ok(())
}

#[test]
fn an_expert_that_has_all_the_weight_has_all_the_gradient() -> Result<()> {
    let _generator = seed(123);
    for (name, text) in CASES {
        let model = tiny_model(&lora(text), &plain_router(), Kind::Double)?;
        for expert in 0..model.num_experts() {
            let (mode, settings) = (mode(DropoutMasks::Shared, 0.0), mean_loss(12));
            let alone = RoutingSource::Expert(expert);
            let (loss, _) = model.loss(&two_rows(), &alone, mode, settings);
            for (parameter, grad) in gradients(&model, &loss.loss) {
                let is_of_expert = parameter.contains(&format!(".expert_{expert}."));
                let is_zero = grad.abs().max().double_value(&[]) == 0.0;
                assert_ne!(is_zero, is_of_expert, "`{parameter}`, expert {expert}, {name}");
            }
        }
    }
    Ok(())
}

/// A model with one expert, and a model with three copies of that expert, on the same base.
fn one_and_three_alike(lora: &LoraConfig) -> Result<(RoutedModel, RoutedModel)> {
    let base = tiny_base(tiny_config());
    let model = |num_experts| {
        let lora = LoraConfig { num_experts, ..lora.clone() };
        new_model(&base, &lora, &plain_router(), Kind::Double)
    };
    let (one, three) = (model(1), model(3));
    randomize(&one)?;
    for (name, tensor) in one.tensors() {
        let twins = (0..3).map(|expert| {
            let name = name.replace("expert_0", &format!("expert_{expert}"));
            (name, tensor.shallow_clone())
        });
        three.load_some(&twins.collect())?;
    }
    Ok((one, three))
}

#[test]
fn equal_experts_under_one_dropout_mask_equal_one_expert() -> Result<()> {
    let _generator = seed(122);
    let weights = random_weights(3).softmax(-1, Kind::Double);
    for use_dora in [false, true] {
        let lora = LoraConfig {
            rank: 3,
            target_modules: TargetModules::all(),
            use_dora,
            ..LoraConfig::default()
        };
        let (one, three) = one_and_three_alike(&lora)?;
        let hidden = |model: &RoutedModel, source| {
            tch::manual_seed(124);
            model.forward(&two_rows(), source, mode(DropoutMasks::Shared, 0.4), None).hidden
        };
        let given = RoutingSource::Given(weights.shallow_clone());
        let mixture = hidden(&three, &given);
        assert_close("mixture", &mixture, &hidden(&one, &RoutingSource::Router), 1e-12);
        let without = three.forward(&two_rows(), &given, mode(DropoutMasks::Shared, 0.0), None);
        assert!((without.hidden - mixture).abs().max().double_value(&[]) > 0.01);
    }
    Ok(())
}
