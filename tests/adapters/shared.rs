//! Mixtures with a part that is always on (`lora.shared_rank`), exported, read again and merged.

use anyhow::Result;
use dylora::config::{AdapterSource, LoraConfig, RouterConfig};
use dylora::durable::output::Output;
use dylora::export::card::Form;
use dylora::export::merge::{adapter_card, into_adapter, into_base};
use dylora::export::peft::{Layout, export, write_adapter};
use dylora::mixture::{Mixture, read_manifest};
use dylora::model::decoder::Decoder;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{RoutedModel, RoutingSource};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::export::{ROUTERS, sources, written_and_read};
use crate::common::{
    assert_close, family_specs, logits, max_difference, plain_router, randomize, router_of, seed,
    tiny_base, tiny_config, two_rows,
};
use crate::{find, lora, message, of_folder, provenance};

/// Experts of several kinds, and a part of rank 2 that has the options of `[lora]`.
const MIXED: &str = r#"
    num_experts = 3
    rank = 4
    alpha = 6.0
    shared_rank = 2
    target_modules = ["attn.c_attn", "mlp.c_fc"]
    rank_pattern = { "h.1.mlp.c_fc" = 5 }
    experts = [{}, { use_rslora = true, target_modules = ["mlp.c_proj"] }, { rank = 3 }]
"#;

const PLAIN: &str = "num_experts = 3\nrank = 4\nalpha = 6.0\nshared_rank = 3";
const SINGLE: &str = "num_experts = 1\nrank = 4\nalpha = 6.0\nshared_rank = 2\nuse_rslora = true";
const DORA: &str = "num_experts = 2\nrank = 4\nshared_rank = 1\nuse_dora = true";
const PISSA: &str = "num_experts = 2\nrank = 4\nshared_rank = 3\ninit = 'pissa'";

/// A mixture on `base` in `kind`, all of whose parameters are random.
pub(crate) fn model(
    base: &Decoder,
    lora: &LoraConfig,
    router: &RouterConfig,
    kind: Kind,
) -> Result<RoutedModel> {
    let mut specs = ExpertSpec::all(lora, &base.spec)?;
    specs.extend(ExpertSpec::of_shared(lora, &base.spec)?);
    let router = RouterSpec::from(router);
    let model = RoutedModel::with_experts(base, &specs, &router, Device::Cpu, kind);
    randomize(&model)?;
    Ok(model)
}

#[test]
fn an_export_with_it_gives_the_same_logits_to_the_bit() -> Result<()> {
    let _generator = seed(650);
    let base = tiny_base(tiny_config());
    let normalising = "input = 'layer_input'\nscope = 'layer'\nnormalize_input = true";
    let of_modules = "input = 'module_input'\nscope = 'module'\nnormalize_input = true";
    for text in [MIXED, PLAIN, SINGLE, DORA] {
        for router in ROUTERS.into_iter().chain([normalising, of_modules]) {
            let router = match text {
                DORA => RouterConfig { top_k: None, ..router_of(router)? },
                _ => router_of(router)?,
            };
            let model = model(&base, &lora(text), &router, Kind::Float)?;
            let read = written_and_read(&model, Kind::Float)?;
            assert_eq!(read.specs(), model.specs(), "{text}");
            assert!(read.specs().last().is_some_and(|spec| spec.shared), "{text}");
            assert_eq!(
                read.router_spec().normalize_input,
                router.normalize_input && text != SINGLE
            );
            for source in sources(&model).into_iter().chain([RoutingSource::Uniform]) {
                let [before, after] =
                    [&model, &read].map(|model| logits(model, &two_rows(), &source));
                assert!(before.equal(&after), "{source:?}, {router:?}, {text}");
            }
        }
    }
    Ok(())
}

/// The update of PiSSA experts is written as LoRA of twice the rank.
#[test]
fn an_exported_part_of_pissa_has_twice_the_rank_and_the_same_function() -> Result<()> {
    let _generator = seed(651);
    let base = tiny_base(tiny_config());
    let model = model(&base, &lora(PISSA), &plain_router(), Kind::Double)?;
    let exact = |model: &RoutedModel| logits(model, &two_rows(), &RoutingSource::Router);
    let read = written_and_read(&model, Kind::Double)?;
    let part = read.specs().last().expect("it has specs");
    assert!(part.shared && part.modules.values().all(|size| size.rank == 6));
    // adapters are f32
    assert_close("logits", &exact(&read), &exact(&model), 1e-4);
    Ok(())
}

/// In PEFT's terms: with the scaling `alpha / r` that `[lora]` gives at its own rank.
#[test]
fn its_folder_is_a_peft_adapter_that_opens_alone() -> Result<()> {
    let _generator = seed(652);
    let base = tiny_base(tiny_config());
    let model = model(&base, &lora(PLAIN), &plain_router(), Kind::Float)?;
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    export(&Output::new(&out), &model, &provenance(), Layout::Dylora)?;
    let manifest = read_manifest(&out)?;
    assert_eq!(manifest.experts, ["expert_0", "expert_1", "expert_2"]);
    assert_eq!(manifest.shared.as_deref(), Some("shared"));
    let config = fs_err::read_to_string(out.join("shared/adapter_config.json"))?;
    let config: Value = serde_json::from_str(&config)?;
    assert_eq!((&config["peft_type"], &config["r"]), (&"LORA".into(), &3.into()));
    // 6 / 4 is 4.5 / 3
    assert_eq!(config["lora_alpha"].as_f64(), Some(4.5));
    let card = fs_err::read_to_string(out.join("shared/README.md"))?;
    assert!(card.contains("The part that is always on in a mixture on `gpt2_tied`"), "{card}");
    let card = fs_err::read_to_string(out.join("README.md"))?;
    assert!(card.contains("# A mixture of 3 LoRA experts"), "{card}");
    assert!(card.contains("- `shared`: rank 3, alpha 4.5"), "{card}");
    assert!(card.contains("`g` the routing weights, 1 for `shared`."), "{card}");
    let alone = of_folder(&out.join("shared"), &base.spec)?;
    assert!(!alone.specs[0].shared && alone.num_experts() == 1);
    let alone = alone.put_on(&base, Device::Cpu, Kind::Float)?;
    let off = RoutingSource::Given(Tensor::zeros([3], (Kind::Float, Device::Cpu)));
    let [alone, beside] = [(&alone, &RoutingSource::Router), (&model, &off)]
        .map(|(model, source)| logits(model, &two_rows(), source));
    assert_close("alone", &alone, &beside, 1e-5);
    // and as an expert of a mixture that is put together of adapters
    let folders = ["shared", "expert_1"].map(|name| AdapterSource::Path(out.join(name)));
    let mixture = Mixture::of_adapters(&folders, &base.spec, &find)?;
    assert_eq!(mixture.num_experts(), 2);
    Ok(())
}

#[test]
fn an_export_that_lacks_its_folder_is_refused() -> Result<()> {
    let _generator = seed(653);
    let base = tiny_base(tiny_config());
    let model = model(&base, &lora(PLAIN), &plain_router(), Kind::Float)?;
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    export(&Output::new(&out), &model, &provenance(), Layout::Dylora)?;
    fs_err::remove_dir_all(out.join("shared"))?;
    let refusal = of_folder(&out, &base.spec).expect_err("a part is missing");
    let refusal = message(&refusal, dir.path());
    assert!(refusal.contains("DIR/out/shared"), "{refusal}");
    Ok(())
}

#[test]
fn xlora_knows_neither_it_nor_routers_that_normalise() -> Result<()> {
    let _generator = seed(654);
    let base = tiny_base(tiny_config());
    let dir = tempfile::tempdir()?;
    let refusal = |text: &str, router: &str| -> Result<String> {
        let router = router_of(&format!("input = 'base_hidden'\n{router}"))?;
        let model = model(&base, &lora(text), &router, Kind::Float)?;
        let out = dir.path().join("out");
        let refusal = export(&Output::new(&out), &model, &provenance(), Layout::Xlora);
        assert!(!out.exists());
        Ok(message(&refusal.expect_err("X-LoRA cannot express it"), dir.path()))
    };
    insta::assert_snapshot!(refusal(PLAIN, "")?, @"X-LoRA does not know a part that is always on");
    insta::assert_snapshot!(
        refusal("num_experts = 2", "normalize_input = true")?,
        @"X-LoRA does not know a router that normalises its input"
    );
    insta::assert_snapshot!(
        refusal(SINGLE, "")?,
        @"a single expert has no router, and is a PEFT adapter as it is"
    );
    Ok(())
}

/// Weights of three experts: one alone, none, even shares, and others.
const WEIGHTS: [[f64; 3]; 4] =
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0 / 3.0; 3], [0.5, -0.25, 1.5]];

fn given(weights: &[f64]) -> RoutingSource {
    RoutingSource::Given(Tensor::from_slice(weights))
}

#[test]
fn a_merged_base_is_the_static_mixture_with_it() -> Result<()> {
    let _generator = seed(655);
    let all = "num_experts = 3\nrank = 3\nalpha = 4.0\nshared_rank = 2";
    for (family, spec) in family_specs() {
        let base = tiny_base(spec).to(Device::Cpu, Kind::Float);
        for kind in ["", "use_dora = true", "init = 'pissa'", "use_rslora = true"] {
            let lora = lora(&format!("{all}\n{kind}"));
            let model = model(&base, &lora, &plain_router(), Kind::Float)?;
            for weights in WEIGHTS {
                let merged = into_base(&model, &base, &weights)?;
                let merged = RoutedModel::plain(&merged, Device::Cpu, Kind::Float, false);
                let found = logits(&merged, &two_rows(), &RoutingSource::Base);
                let expected = logits(&model, &two_rows(), &given(&weights));
                assert_close(&format!("{family}, {kind}, {weights:?}"), &found, &expected, 1e-4);
                let before = logits(&model, &two_rows(), &RoutingSource::Base);
                assert!(max_difference(&before, &expected) > 0.01, "{family}, {kind}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_merged_adapter_is_the_static_mixture_with_it() -> Result<()> {
    let _generator = seed(656);
    let base = tiny_base(tiny_config()).to(Device::Cpu, Kind::Float);
    for text in [MIXED, PLAIN, "num_experts = 3\nrank = 4\nshared_rank = 2\ninit = 'olora'"] {
        let model = model(&base, &lora(text), &plain_router(), Kind::Float)?;
        for weights in WEIGHTS {
            let adapter = into_adapter(&model, &weights)?;
            let dir = tempfile::tempdir()?;
            write_adapter(dir.path(), &adapter, &base.spec, &provenance(), "")?;
            let read = of_folder(dir.path(), &base.spec)?;
            let read = read.put_on(&base, Device::Cpu, Kind::Float)?;
            let merged = logits(&read, &two_rows(), &RoutingSource::Router);
            let mixture = logits(&model, &two_rows(), &given(&weights));
            // OLoRA's two products are rounded before one is taken from the other
            let tolerance = if text.contains("olora") { 1e-4 } else { 1e-5 };
            assert_close(&format!("{text}, {weights:?}"), &merged, &mixture, tolerance);
        }
    }
    Ok(())
}

/// The rank of what is merged is that of the experts with a weight, and its own.
#[test]
fn a_merged_adapter_names_it_and_has_its_rank() -> Result<()> {
    let _generator = seed(657);
    let base = tiny_base(tiny_config()).to(Device::Cpu, Kind::Float);
    let model = model(&base, &lora(PLAIN), &plain_router(), Kind::Float)?;
    let ranks = |weights: &[f64]| -> Result<Vec<i64>> {
        let adapter = into_adapter(&model, weights)?;
        Ok(adapter.spec.modules.values().map(|size| size.rank).collect())
    };
    assert_eq!(ranks(&[0.0, 0.5, 0.5])?, [4 + 4 + 3; 8]);
    assert_eq!(ranks(&[0.0; 3])?, [3; 8]);
    let weights = [0.5, 0.0, 0.25];
    let card = adapter_card(
        &model,
        &into_adapter(&model, &weights)?,
        &provenance(),
        &weights,
        Form::PeftAdapter,
    );
    let named =
        "weights for every token: `expert_0` 0.5, `expert_1` 0, `expert_2` 0.25, `shared` 1.";
    assert!(card.contains(named), "{card}");
    let refusal = into_adapter(&model, &[1.0; 4]).expect_err("it is no routed expert");
    assert_eq!(format!("{refusal:#}"), "there are 3 experts, but 4 weights");
    Ok(())
}
