//! Exports in dylora's layout, written and read again.

use std::path::Path;

use anyhow::Result;
use dylora::config::{Family, LoraInit, ModulePath, RoutingChoice};
use dylora::durable::output::{MARKER, Output};
use dylora::export::peft::{Layout, Provenance, export};
use dylora::mixture::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, ROUTER};
use dylora::model::experts::spec::{ExpertSpec, RankAlpha};
use dylora::model::routing::router::RouterSpec;
use dylora::model::{RoutedModel, RoutingSource};
use dylora::peft::adapter::{self, config_json};
use dylora::tensor_file::write_tensors;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::common::{
    assert_close, logits, plain_router, router_of, seed, tiny_config, tiny_model, two_rows,
};
use crate::{lora, message, of_folder, provenance, three_layers, zeros};

/// Writes `model` to a folder and reads it again on the same base, in `kind`.
pub(super) fn written_and_read(model: &RoutedModel, kind: Kind) -> Result<RoutedModel> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    export(&Output::new(&out), model, &provenance(), Layout::Dylora)?;
    of_folder(&out, &model.base().spec)?.put_on(model.base(), Device::Cpu, kind)
}

/// Routing by the router and by each expert alone.
pub(super) fn sources(model: &RoutedModel) -> Vec<RoutingSource> {
    let experts = (0..model.num_experts()).map(RoutingSource::Expert);
    std::iter::once(RoutingSource::Router).chain(experts).collect()
}

const PLAIN: &str = "num_experts = 3\nrank = 4";

const DORA: &str = "use_dora = true\ntarget_modules = ['attn.c_proj', 'mlp.c_fc']";

const PATTERNS: &str = "
    num_experts = 5
    target_modules = [\"attn.c_attn\", \"mlp.c_proj\", \"mlp.c_fc\"]
    rank_pattern = { \"mlp.c_fc\" = 3, \"h.1.attn.c_attn\" = 6 }
    alpha_pattern = { \"h.0.mlp.c_proj\" = 0.3 }
    experts = [
        {},
        { use_rslora = true, trainable = false },
        { use_dora = true, target_modules = [\"attn.c_proj\"], rank_pattern = {}, \
          alpha_pattern = {} },
        { use_dora = true, use_rslora = true, rank = 2, alpha = 2.5 },
        { alora_invocation_tokens = [18, 28], trainable = false },
    ]
";

const SINGLE: &str = "num_experts = 1\nuse_rslora = true\nalpha = 3.0";

pub(super) const ROUTERS: [&str; 9] = [
    "input = 'embeddings'\ntemperature = 0.7",
    "input = 'base_hidden'\ntop_k = 2",
    "input = 'layer_input'",
    "input = 'layer_input'\nscope = 'layer'\ntop_k = 2\ntemperature = 1.3",
    "scope = 'module'\nlevel = 'sequence'",
    "input = 'layer_input'\nscope = 'module'\nhidden_layers = 2\nhidden_width = 5",
    "hidden_layers = 1\ntop_k = 1\nbalance_bias_rate = 0.1",
    "top_k = 2\neval = 'dense'",
    "top_k = 2\nrenormalize = false",
];

#[test]
fn an_export_gives_the_same_logits_to_the_bit() -> Result<()> {
    let _generator = seed(160);
    for text in [PLAIN, DORA, PATTERNS, SINGLE] {
        for router in ROUTERS {
            let router = router_of(router)?;
            let model = tiny_model(&lora(text), &router, Kind::Float)?;
            let read = written_and_read(&model, Kind::Float)?;
            for source in sources(&model) {
                let [before, after] =
                    [&model, &read].map(|model| logits(model, &two_rows(), &source));
                assert!(before.equal(&after), "{source:?}, {router:?}, {text}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_export_has_the_same_experts_all_of_them_trainable() -> Result<()> {
    let _generator = seed(161);
    let model = tiny_model(&lora(PATTERNS), &plain_router(), Kind::Float)?;
    assert!(model.specs().iter().any(|spec| !spec.trainable));
    let read = written_and_read(&model, Kind::Float)?;
    let trainable = |spec: &ExpertSpec| ExpertSpec { trainable: true, ..spec.clone() };
    assert_eq!(read.specs(), model.specs().iter().map(trainable).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn an_export_says_what_decided_the_weights_in_training() -> Result<()> {
    let _generator = seed(165);
    let model = tiny_model(&lora(PLAIN), &plain_router(), Kind::Float)?;
    for routing in [RoutingChoice::Router, RoutingChoice::Uniform, RoutingChoice::Record] {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("out");
        let provenance = Provenance { routing, ..provenance() };
        export(&Output::new(&out), &model, &provenance, Layout::Dylora)?;
        assert_eq!(of_folder(&out, &tiny_config())?.routing, routing);
    }
    Ok(())
}

#[test]
fn an_export_of_a_subset_of_layers_names_them() -> Result<()> {
    let _generator = seed(162);
    let size = |rank| RankAlpha { rank, alpha: 5.0 };
    let path = crate::path;
    let of = |modules: &[(&str, i64)]| ExpertSpec {
        modules: modules.iter().map(|(module, rank)| (path(module), size(*rank))).collect(),
        use_rslora: false,
        use_dora: false,
        init: LoraInit::Default,
        trainable: true,
        alora_invocation_tokens: vec![],
        shared: false,
    };
    let specs = [of(&[("h.1.attn.c_attn", 3)]), of(&[("h.0.mlp.c_fc", 2), ("h.1.mlp.c_proj", 4)])];
    let base = crate::common::tiny_base(tiny_config());
    let router = plain_router();
    let model = RoutedModel::with_experts(
        &base,
        &specs,
        &RouterSpec::from(&router),
        Device::Cpu,
        Kind::Float,
    );
    crate::common::randomize(&model)?;
    let read = written_and_read(&model, Kind::Float)?;
    assert_eq!(read.specs(), specs);
    for source in sources(&model) {
        let [before, after] = [&model, &read].map(|model| logits(model, &two_rows(), &source));
        assert!(before.equal(&after), "{source:?}");
    }
    Ok(())
}

#[test]
fn an_export_keeps_layers_that_route_over_experts_of_their_own() -> Result<()> {
    let _generator = seed(166);
    let base = crate::common::tiny_base(tiny_config());
    for router in ROUTERS {
        let lora = lora("num_experts = 3\nrank = 4\nexperts_per_layer = [1, 3]");
        let specs = ExpertSpec::all(&lora, &base.spec)?;
        let spec = RouterSpec { own_experts: true, ..RouterSpec::from(&router_of(router)?) };
        let model = RoutedModel::with_experts(&base, &specs, &spec, Device::Cpu, Kind::Float);
        crate::common::randomize(&model)?;
        let read = written_and_read(&model, Kind::Float)?;
        assert_eq!((read.specs(), read.router_spec()), (&specs[..], &spec));
        let experts = |model: &RoutedModel| -> Vec<Vec<usize>> {
            model.sites().into_iter().map(|site| model.experts_at(site)).collect()
        };
        assert_eq!(experts(&read), experts(&model));
        assert!(experts(&read).contains(&vec![0]), "{router}");
        for source in sources(&model) {
            let [before, after] = [&model, &read].map(|model| logits(model, &two_rows(), &source));
            assert!(before.equal(&after), "{source:?}, {router}");
        }
    }
    Ok(())
}

#[test]
fn an_export_whose_router_is_spoiled_is_refused() -> Result<()> {
    let _generator = seed(164);
    let model = tiny_model(&lora(PLAIN), &plain_router(), Kind::Float)?;
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    export(&Output::new(&out), &model, &provenance(), Layout::Dylora)?;
    // without the sums, by which any change would be noticed
    fs_err::remove_file(out.join(MARKER))?;
    let said = |weight: Tensor, bias: Tensor| -> Result<String> {
        write_tensors(&out.join(ROUTER), [("router.weight", &weight), ("router.bias", &bias)])?;
        let read = of_folder(&out, &tiny_config())
            .and_then(|mixture| mixture.put_on(model.base(), Device::Cpu, Kind::Float));
        Ok(message(&read.expect_err("the router is spoiled"), dir.path()))
    };
    let [router] = model.routers() else { panic!("one router for all layers") };
    let (weight, bias) = (|| router.weight.detach(), || router.bias.detach());
    insta::assert_snapshot!(
        said(weight() / 0.0, bias())?,
        @"in `DIR/out/router.safetensors`: tensor `router.weight` holds numbers that are not finite"
    );
    insta::assert_snapshot!(
        said(weight(), bias().to_kind(Kind::Int64))?,
        @"in `DIR/out/router.safetensors`: tensor `router.bias` has dtype `Int64`; use f32, f16 or \
          bf16"
    );
    insta::assert_snapshot!(
        said(weight().narrow(0, 0, 2), bias())?,
        @"tensor `router.weight` must be [3, 16], got [2, 16]"
    );
    fs_err::remove_file(out.join(ROUTER))?;
    let refusal = of_folder(&out, &tiny_config()).expect_err("there is no router");
    insta::assert_snapshot!(
        message(&refusal, dir.path()),
        @"cannot read the router: failed to open file `DIR/out/router.safetensors`: No such file \
          or directory (os error 2)"
    );
    Ok(())
}

/// The export is in f32. The model before and after the export computes in f64.
#[test]
fn pissa_and_olora_are_exported_as_plain_lora_of_twice_the_rank() -> Result<()> {
    let _generator = seed(163);
    let text = r#"
        num_experts = 4
        rank = 3
        target_modules = ["attn.c_attn", "mlp.c_proj"]
        rank_pattern = { "mlp.c_proj" = 2 }
        experts = [
            { init = "pissa" },
            { init = "olora", use_rslora = true, alpha = 2.5 },
            { init = "pissa", use_rslora = true, use_dora = true },
        ]
    "#;
    for router in ROUTERS {
        let router = router_of(router)?;
        let model = tiny_model(&lora(text), &router, Kind::Float)?;
        let read = written_and_read(&model, Kind::Double)?;
        let (specs, tensors, base) = (model.specs(), model.tensors(), model.base());
        let cpu = Device::Cpu;
        let model = RoutedModel::from_tensors(
            base,
            specs,
            &RouterSpec::from(&router),
            &tensors,
            cpu,
            Kind::Double,
        )?;
        for (expert, (before, after)) in model.specs().iter().zip(read.specs()).enumerate() {
            let factor = if before.init == LoraInit::Default { 1 } else { 2 };
            for (path, size) in &before.modules {
                assert_eq!(after.modules[path].rank, size.rank * factor, "expert {expert}, {path}");
                let (before, after) = (before.scaling(*path), after.scaling(*path));
                let difference = before.expect("it is there") - after.expect("it is there");
                assert!(difference.abs() < 1e-14);
            }
            assert_eq!(after.init, LoraInit::Default);
        }
        for source in sources(&model) {
            let [before, after] = [&model, &read].map(|model| logits(model, &two_rows(), &source));
            assert_close(&format!("{source:?}"), &after, &before, 1e-10);
        }
    }
    Ok(())
}

fn any_spec() -> impl Strategy<Value = ExpertSpec> {
    let module = prop::sample::select(Family::Gpt2.modules());
    let path = (0..3_usize, module).prop_map(|(layer, module)| ModulePath { layer, module });
    let alpha = prop_oneof![
        (1..5_i64).prop_map(|alpha| alpha as f64),
        (1..9_i64).prop_map(|alpha| alpha as f64 / 2.0),
        1e-3..1e3_f64,
    ];
    let size = (1..4_i64, alpha).prop_map(|(rank, alpha)| RankAlpha { rank, alpha });
    let modules = prop::collection::btree_map(path, size, 1..=12);
    let tokens = prop::collection::vec(0..61_i64, 0..3);
    (modules, any::<bool>(), any::<bool>(), tokens).prop_map(
        |(modules, use_rslora, use_dora, alora_invocation_tokens)| ExpertSpec {
            modules,
            use_rslora,
            use_dora,
            init: LoraInit::Default,
            trainable: true,
            alora_invocation_tokens,
            shared: false,
        },
    )
}

/// The spec after an adapter with it was written to `dir` and read again.
fn read_again(dir: &Path, spec: ExpertSpec) -> Result<ExpertSpec> {
    let (base, adapter) = (three_layers(), zeros(spec, &three_layers()));
    let (config, weights) = (dir.join(ADAPTER_CONFIG), dir.join(ADAPTER_WEIGHTS));
    let json = config_json(&adapter.spec, &base, "base", None, 0.0);
    fs_err::write(&config, json.to_string())?;
    let tensors = adapter.peft_tensors(&base);
    write_tensors(&weights, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
    Ok(adapter::read(&config, &weights, &base)?.spec)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_config_of_an_adapter_gives_back_its_spec(spec in any_spec()) {
        let dir = tempfile::tempdir()?;
        let read = read_again(dir.path(), spec.clone());
        prop_assert_eq!(read.map_err(|error| TestCaseError::fail(format!("{error:#}")))?, spec);
    }
}

#[test]
fn the_cards_describe_the_adapters_as_they_are_written() -> Result<()> {
    let _generator = seed(129);
    let experts = "num_experts = 2\nrank = 4\ntarget_modules = ['c_attn']\n\
                   experts = [{ init = 'pissa' }, \
                   { alora_invocation_tokens = [18, 28] }]";
    let model = tiny_model(&lora(experts), &plain_router(), Kind::Float)?;
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    export(&Output::new(&out), &model, &provenance(), Layout::Dylora)?;
    let card = fs_err::read_to_string(out.join("README.md"))?;
    let shapes: Vec<&str> = card.lines().filter(|line| line.starts_with("- `expert_")).collect();
    insta::assert_snapshot!(shapes.join("\n"), @"
    - `expert_0`: rank 8, alpha 32, target modules `attn.c_attn`
    - `expert_1`: rank 4, alpha 16, target modules `attn.c_attn`, active from the last occurrence \
    of the tokens [18, 28] on
    ");
    Ok(())
}
