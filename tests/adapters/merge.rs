//! Merging mixtures whose routing weights are the same for every token.

use anyhow::Result;
use dylora::config::LoraConfig;
use dylora::export::merge::{into_adapter, into_base};
use dylora::export::peft::write_adapter;
use dylora::model::decoder::Decoder;
use dylora::model::{RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use crate::common::{
    assert_close, logits, max_difference, new_model, plain_router, randomize, seed, tiny_base,
    tiny_config, two_rows,
};
use crate::{lora, of_folder, provenance};

/// Plain, rsLoRA, PiSSA and OLoRA experts of several ranks on several modules, without DoRA.
const LOW_RANK: &str = r#"
    num_experts = 4
    rank = 3
    alpha = 4.0
    target_modules = ["attn.c_attn", "mlp.c_fc"]
    rank_pattern = { "h.1.mlp.c_fc" = 5 }
    experts = [
        {},
        { use_rslora = true, target_modules = ["attn.c_attn", "mlp.c_proj"] },
        { init = "pissa", rank = 2 },
        { init = "olora", target_modules = ["attn.c_proj"] },
    ]
"#;

/// Plain and DoRA experts, one of the latter with rsLoRA and one with PiSSA.
const WITH_DORA: &str = r#"
    num_experts = 4
    rank = 3
    alpha = 4.0
    target_modules = ["attn.c_attn", "mlp.c_fc"]
    experts = [
        {},
        { use_dora = true, use_rslora = true, target_modules = ["attn.c_attn", "mlp.c_proj"] },
        { init = "pissa", rank = 2, use_dora = true },
        { use_dora = true, target_modules = ["attn.c_proj", "mlp.c_fc"] },
    ]
"#;

/// An f32 base, and experts on it whose A and B are random and far from their initial values.
fn base_and_model(lora: &LoraConfig) -> Result<(Decoder, RoutedModel)> {
    let base = tiny_base(tiny_config()).to(Device::Cpu, Kind::Float);
    let model = new_model(&base, lora, &plain_router(), Kind::Float);
    randomize(&model)?;
    Ok((base, model))
}

/// Routing weights of four experts: one expert alone, another one alone, even shares, weight 1 for
/// all, and random shares.
fn weights() -> Vec<Vec<f64>> {
    let random = Vec::try_from(Tensor::randn([4], (Kind::Double, Device::Cpu)).softmax(-1, None));
    let random = random.expect("it is a vector");
    vec![vec![1., 0., 0., 0.], vec![0., 0., 1., 0.], vec![0.25; 4], vec![1.; 4], random]
}

fn given(weights: &[f64]) -> RoutingSource {
    RoutingSource::Given(Tensor::from_slice(weights))
}

#[test]
fn a_merged_base_is_the_mixture_under_given_weights() -> Result<()> {
    let _generator = seed(170);
    for text in [LOW_RANK, WITH_DORA] {
        let (base, model) = base_and_model(&lora(text))?;
        let before = logits(&model, &two_rows(), &RoutingSource::Base);
        for weights in weights() {
            let merged = into_base(&model, &base, &weights)?;
            let merged = RoutedModel::plain(&merged, Device::Cpu, Kind::Float, false);
            let merged = logits(&merged, &two_rows(), &RoutingSource::Base);
            let mixture = logits(&model, &two_rows(), &given(&weights));
            assert!(max_difference(&before, &mixture) > 0.1);
            let scale = mixture.abs().max().double_value(&[]);
            println!("base, {weights:?}: {:e} of {scale}", max_difference(&merged, &mixture));
            assert_close(&format!("{weights:?}"), &merged, &mixture, 1e-5);
        }
    }
    Ok(())
}

#[test]
fn a_merged_adapter_is_the_mixture_under_given_weights() -> Result<()> {
    let _generator = seed(171);
    let (base, model) = base_and_model(&lora(LOW_RANK))?;
    for weights in weights() {
        let adapter = into_adapter(&model, &weights)?;
        let dir = tempfile::tempdir()?;
        write_adapter(dir.path(), &adapter, &base.spec, &provenance(), "")?;
        let read = of_folder(dir.path(), &base.spec)?;
        let read = read.put_on(&base, Device::Cpu, Kind::Float)?;
        let merged = logits(&read, &two_rows(), &RoutingSource::Router);
        let mixture = logits(&model, &two_rows(), &given(&weights));
        let scale = mixture.abs().max().double_value(&[]);
        println!("adapter, {weights:?}: {:e} of {scale}", max_difference(&merged, &mixture));
        assert_close(&format!("{weights:?}"), &merged, &mixture, 1e-5);
    }
    Ok(())
}

/// PiSSA and OLoRA experts count twice, since their update without its initial value has twice the
/// rank.
#[test]
fn the_rank_of_a_merged_adapter_is_the_sum_of_the_experts() -> Result<()> {
    let _generator = seed(172);
    let (_, model) = base_and_model(&lora(LOW_RANK))?;
    let ranks = |weights: &[f64]| -> Result<Vec<String>> {
        let modules = into_adapter(&model, weights)?.spec.modules.into_iter();
        let line = |(path, size): (dylora::config::ModulePath, _)| format!("{path} {size:?}");
        Ok(modules.map(line).collect())
    };
    insta::assert_snapshot!(ranks(&[0.25; 4])?.join("\n"), @r"
    h.0.attn.c_attn RankAlpha { rank: 10, alpha: 10.0 }
    h.0.attn.c_proj RankAlpha { rank: 6, alpha: 6.0 }
    h.0.mlp.c_fc RankAlpha { rank: 7, alpha: 7.0 }
    h.0.mlp.c_proj RankAlpha { rank: 3, alpha: 3.0 }
    h.1.attn.c_attn RankAlpha { rank: 10, alpha: 10.0 }
    h.1.attn.c_proj RankAlpha { rank: 6, alpha: 6.0 }
    h.1.mlp.c_fc RankAlpha { rank: 15, alpha: 15.0 }
    h.1.mlp.c_proj RankAlpha { rank: 3, alpha: 3.0 }
    ");
    insta::assert_snapshot!(ranks(&[0., 1., 0., 0.])?.join("\n"), @r"
    h.0.attn.c_attn RankAlpha { rank: 3, alpha: 3.0 }
    h.0.mlp.c_proj RankAlpha { rank: 3, alpha: 3.0 }
    h.1.attn.c_attn RankAlpha { rank: 3, alpha: 3.0 }
    h.1.mlp.c_proj RankAlpha { rank: 3, alpha: 3.0 }
    ");
    Ok(())
}

#[test]
fn weight_zero_leaves_the_base_to_the_bit() -> Result<()> {
    let _generator = seed(173);
    let (base, model) = base_and_model(&lora(WITH_DORA))?;
    assert_eq!(into_base(&model, &base, &[0.0; 4])?.hash()?, base.hash()?);
    Ok(())
}

#[test]
fn what_has_no_merge_is_refused() -> Result<()> {
    let _generator = seed(174);
    let (base, model) = base_and_model(&lora(WITH_DORA))?;
    let adapter = |model: &RoutedModel, weights: &[f64]| {
        format!("{:#}", into_adapter(model, weights).expect_err("it has no merge"))
    };
    let both = |model: &RoutedModel, weights: &[f64]| {
        let refusal = into_base(model, &base, weights).expect_err("it has no merge");
        assert_eq!(format!("{refusal:#}"), adapter(model, weights));
        format!("{refusal:#}")
    };
    insta::assert_snapshot!(adapter(&model, &[0.25; 4]), @r"
    a DoRA expert scales the base's own weight, which no LoRA adapter can hold
    hint: merge into the base instead
    ");
    insta::assert_snapshot!(
        adapter(&model, &[0.0; 4]),
        @"with every weight 0, the adapter would be empty"
    );
    insta::assert_snapshot!(both(&model, &[0.5; 2]), @"there are 4 experts, but 2 weights");
    insta::assert_snapshot!(
        both(&model, &[0.5, f64::NAN, 0.5, 0.0]),
        @"weights must be finite numbers, got [0.5, NaN, 0.5, 0.0]"
    );
    insta::assert_snapshot!(
        both(&model, &[f64::INFINITY, 0.0, 0.0, 0.0]),
        @"weights must be finite numbers, got [inf, 0.0, 0.0, 0.0]"
    );
    let alora = lora("experts = [{ alora_invocation_tokens = [5] }]");
    let (_, alora) = base_and_model(&alora)?;
    insta::assert_snapshot!(
        both(&alora, &[0.25; 4]),
        @"an expert with invocation tokens is off before them, which no merged weight can be"
    );
    let plain = RoutedModel::plain(&base, Device::Cpu, Kind::Float, false);
    insta::assert_snapshot!(both(&plain, &[]), @"a base alone has nothing to merge");
    Ok(())
}

#[test]
fn experts_of_weight_zero_do_not_prevent_a_merge() -> Result<()> {
    let _generator = seed(175);
    let text =
        "num_experts = 3\nexperts = [{ use_dora = true }, { alora_invocation_tokens = [5] }]";
    let (base, model) = base_and_model(&lora(text))?;
    let weights = [0.0, 0.0, 1.0];
    let adapter = into_adapter(&model, &weights)?;
    assert!(adapter.spec.modules.keys().eq(model.specs()[2].modules.keys()));
    into_base(&model, &base, &weights)?;
    Ok(())
}
