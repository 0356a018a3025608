//! Routers that read the input of their target module (`router.input = "module_input"`), compared
//! with the formula on inputs that are captured in a forward pass by hand.

use anyhow::Result;
use dylora::config::{
    Config, Kernels, LoraConfig, RouterConfig, RouterInput, RouterScope, RoutingLevel,
    TargetModule, load,
};
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{Compute, ForwardMode, RoutedModel, RoutingSource};
use dylora::train::plan::ParameterCounts;
use tch::{Device, Kind, Tensor};

use super::by_hand::{Place, logits_by_hand, routed};
use crate::common::{
    ROUTER_INPUTS, SCOPES, assert_close, family_specs, gradients, logits, max_difference,
    mean_loss, plain_router, randomize, seed, tiny_base, tiny_lora, two_rows,
};

fn router(normalize_input: bool, top_k: Option<i64>) -> RouterConfig {
    RouterConfig {
        input: RouterInput::ModuleInput,
        scope: RouterScope::Module,
        normalize_input,
        top_k,
        temperature: 0.7,
        ..plain_router()
    }
}

fn model(
    base: &DecoderSpec,
    lora: &LoraConfig,
    router: &RouterConfig,
    kernels: Kernels,
) -> Result<RoutedModel> {
    let base = tiny_base(base.clone());
    let specs = ExpertSpec::all(lora, &base.spec)?;
    let compute = Compute { kind: Kind::Double, kernels };
    let router = RouterSpec::from(router);
    let model = RoutedModel::with_experts(&base, &specs, &router, Device::Cpu, compute);
    randomize(&model)?;
    Ok(model)
}

/// GPT-2 has layers that are 16 and 64 wide, Qwen3 such that are 16, 24 and 20 wide.
#[test]
fn each_site_routes_by_the_softmax_of_its_router_on_the_modules_own_input() -> Result<()> {
    let _generator = seed(620);
    for (family, base) in family_specs() {
        for (normalize, top_k) in [(false, None), (true, None), (true, Some(2))] {
            let router = router(normalize, top_k);
            for kernels in [Kernels::Auto, Kernels::Reference] {
                let model = model(&base, &tiny_lora(), &router, kernels)?;
                let what = format!("{family}, {kernels:?}, {router:?}");
                let mut expected = vec![];
                let by_hand = logits_by_hand(&model, &two_rows(), &mut |place: &Place<'_>| {
                    let name = format!("{}.router", place.path);
                    let g = routed(&model, &router, &name, place.module_input);
                    expected.push((place.path, g.shallow_clone()));
                    g
                });
                let by = &RoutingSource::Router;
                let output = model.forward(&two_rows(), by, ForwardMode::EVAL, None);
                assert_eq!(output.routing.len(), expected.len(), "{what}");
                let sites = model.sites().into_iter().zip(&output.routing);
                for ((site, routing), (path, g)) in sites.zip(&expected) {
                    assert_eq!((site.layer, site.module), (Some(path.layer), Some(path.module)));
                    assert_close(&format!("{what}, {path}"), &routing.weights, g, 1e-11);
                }
                assert_close(&what, &model.logits(&output.hidden), &by_hand, 1e-10);
                // routing alone is what a whole forward pass does
                let alone = model.routing(&two_rows(), ForwardMode::EVAL);
                for (alone, routing) in alone.iter().zip(&output.routing) {
                    assert_close(&what, &alone.probs, &routing.probs, 0.0);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_router_is_as_wide_as_the_input_of_its_module() -> Result<()> {
    let _generator = seed(621);
    for (family, base) in family_specs() {
        for hidden_layers in [0, 2] {
            let hidden_width = 5;
            let router = RouterConfig { hidden_layers, hidden_width, ..router(true, None) };
            let model = model(&base, &tiny_lora(), &router, Kernels::Auto)?;
            let tensors = model.tensors();
            for (path, _) in model.modules() {
                let (i, _) = base.linear_shape(path.module);
                let of = |key: &str| tensors[&format!("{path}.router.{key}")].size();
                match hidden_layers {
                    0 => assert_eq!(of("weight"), [3, i], "{family}, {path}"),
                    _ => {
                        assert_eq!(of("hidden.0.weight"), [5, i], "{family}, {path}");
                        assert_eq!(of("hidden.1.weight"), [5, 5], "{family}, {path}");
                        assert_eq!(of("weight"), [3, 5], "{family}, {path}");
                    }
                }
                assert_eq!(of("bias"), [3], "{family}, {path}");
            }
        }
        let widths: std::collections::BTreeSet<i64> =
            base.modules().iter().map(|&module| base.linear_shape(module).0).collect();
        assert!(widths.len() > 1, "{family} has layers of several widths");
    }
    let (_, qwen3) = family_specs().remove(3);
    let widths = [TargetModule::QProj, TargetModule::OProj, TargetModule::DownProj];
    assert_eq!(widths.map(|module| qwen3.linear_shape(module).0), [16, 24, 20]);
    Ok(())
}

/// The means of `x`, `[b, t, d]`, over the positions up to each one.
fn means_so_far(x: &Tensor) -> Tensor {
    let t = x.size()[1];
    let counts = Tensor::arange_start(1, t + 1, (Kind::Double, Device::Cpu)).view([1, t, 1]);
    x.cumsum(1, Kind::Double) / counts
}

#[test]
fn by_prompt_a_router_reads_the_mean_of_its_modules_inputs_so_far() -> Result<()> {
    let _generator = seed(622);
    for (family, base) in family_specs() {
        // the rows are documents without a prompt, which count as all prompt
        let router = RouterConfig { level: RoutingLevel::Sequence, ..router(true, None) };
        let model = model(&base, &tiny_lora(), &router, Kernels::Auto)?;
        let expected = logits_by_hand(&model, &two_rows(), &mut |place: &Place<'_>| {
            let name = format!("{}.router", place.path);
            routed(&model, &router, &name, &means_so_far(place.module_input))
        });
        let found = logits(&model, &two_rows(), &RoutingSource::Router);
        assert_close(family, &found, &expected, 1e-10);
    }
    Ok(())
}

/// Without experts on some module, there is no router for it.
#[test]
fn only_target_modules_have_routers() -> Result<()> {
    let _generator = seed(623);
    let (_, base) = family_specs().remove(0);
    let lora: LoraConfig = toml::from_str(
        "num_experts = 3\nexperts = [{ target_modules = ['mlp.c_proj'] }, {}, {}]\n\
         target_modules = ['h.1.attn.c_attn', 'h.2.attn.c_attn']",
    )?;
    let router = router(true, None);
    let model = model(&base, &lora, &router, Kernels::Auto)?;
    let mut paths = vec![];
    let expected = logits_by_hand(&model, &two_rows(), &mut |place: &Place<'_>| {
        paths.push(format!("{}.router", place.path));
        routed(&model, &router, &format!("{}.router", place.path), place.module_input)
    });
    assert_eq!(paths, model.router_names());
    assert_eq!(
        paths,
        [
            "h.0.mlp.c_proj.router",
            "h.1.attn.c_attn.router",
            "h.1.mlp.c_proj.router",
            "h.2.attn.c_attn.router",
            "h.2.mlp.c_proj.router"
        ]
    );
    let found = logits(&model, &two_rows(), &RoutingSource::Router);
    assert_close("logits", &found, &expected, 1e-10);
    Ok(())
}

/// The numbers of a config's parameters, as planned, and those that the model has, in the order of
/// [`ParameterCounts`].
fn counted(config: &Config, base: &DecoderSpec) -> Result<([i64; 4], [i64; 4])> {
    let mut specs = (0..config.lora.num_experts as usize)
        .map(|expert| ExpertSpec::of_config(config, expert, base))
        .collect::<Result<Vec<_>>>()?;
    specs.extend(ExpertSpec::of_shared(&config.lora, base)?);
    let counts = ParameterCounts::new(config, &specs, base);
    let router = RouterSpec::of_config(config);
    let decoder = tiny_base(base.clone());
    let model = RoutedModel::with_experts(&decoder, &specs, &router, Device::Cpu, Kind::Float);
    let trained = model.trained(config.train.routing, None).parameters;
    let sum = |key: &str| -> i64 {
        let tensors = model.tensors().into_iter().filter(|(name, _)| name.contains(key));
        tensors.map(|(_, tensor)| tensor.numel() as i64).sum()
    };
    Ok((
        [counts.lora_a, counts.lora_b, counts.router, counts.trained],
        [
            sum(".lora_a"),
            sum(".lora_b"),
            sum("router."),
            trained.iter().map(|parameter| parameter.tensor.numel() as i64).sum(),
        ],
    ))
}

#[test]
fn planned_numbers_of_parameters_are_those_of_the_model() -> Result<()> {
    let _generator = seed(624);
    let inputs = ROUTER_INPUTS.into_iter().flat_map(|input| SCOPES.map(|scope| (input, scope)));
    let inputs = inputs.chain([(RouterInput::ModuleInput, RouterScope::Module)]);
    for ((input, scope), shared_rank) in inputs.flat_map(|i| [0, 3].map(|rank| (i, rank))) {
        for (family, base) in family_specs() {
            for more in [
                "",
                "router.hidden_layers=2",
                "lora.num_experts=1",
                "train.routing=expert:1",
                "train.routing=uniform",
                "lora.target_modules=['layers.1.self_attn.o_proj', 'mlp.down_proj', \
                 'h.1.attn.c_proj', 'mlp.c_proj']",
                "lora.experts=[{rank=5}, {target_modules='all-linear', trainable=false}]",
            ] {
                let more = match family {
                    "gpt2" => more.replace("'layers.1.self_attn.o_proj', 'mlp.down_proj', ", ""),
                    _ => more.replace(", 'h.1.attn.c_proj', 'mlp.c_proj'", ""),
                };
                let text = "base = { source = { path = \"x\" } }\n\
                            data = { seq_len = 12, domains = [{ name = \"x\", train = [\"x\"] }] }";
                let mut set = vec![format!("lora.shared_rank={shared_rank}"), "lora.rank=2".into()];
                set.extend((!more.is_empty()).then_some(more));
                let mut config = load::parse(text, &set)?;
                (config.router.input, config.router.scope) = (input, scope);
                let (planned, found) = counted(&config, &base)?;
                assert_eq!(planned, found, "{family}, {input:?}, {scope:?}, {set:?}");
            }
        }
    }
    Ok(())
}

/// The gradient of the router of a module reaches the experts before it, unless it is detached.
/// The experts that are not before a router have the same gradients in both cases.
#[test]
fn a_detached_routers_gradient_does_not_reach_the_experts_before_it() -> Result<()> {
    let _generator = seed(625);
    let (_, base) = family_specs().remove(0);
    for router in [
        router(true, None),
        RouterConfig { input: RouterInput::LayerInput, ..router(true, None) },
        RouterConfig {
            input: RouterInput::LayerInput,
            scope: RouterScope::Layer,
            ..router(false, Some(2))
        },
    ] {
        let model = model(&base, &tiny_lora(), &router, Kernels::Auto)?;
        let grads = |detaches_routers, of: &dyn Fn(&RoutedModel, ForwardMode) -> Tensor| {
            let mode = ForwardMode { detaches_routers, ..ForwardMode::EVAL };
            gradients(&model, &of(&model, mode))
        };
        // a function of the last router's scores alone
        let scores = |model: &RoutedModel, mode: ForwardMode| {
            let output = model.forward(&two_rows(), &RoutingSource::Router, mode, None);
            let last = output.routing.last().expect("there are routers");
            last.logits.square().sum(Kind::Double)
        };
        let last = model.router_names().pop().expect("there are routers");
        for (name, grad) in grads(true, &scores) {
            let moved = max_difference(&grad, &grad.zeros_like()) > 0.0;
            assert_eq!(moved, name.starts_with(&last), "{router:?}, {name}");
        }
        let through = grads(false, &scores);
        let reached = |name: &str| {
            let grad = &through[name];
            max_difference(grad, &grad.zeros_like()) > 1e-9
        };
        for name in ["h.0.attn.c_attn.expert_0.lora_a", "h.1.mlp.c_proj.expert_2.lora_b"] {
            assert!(reached(name), "{router:?}, {name}");
        }
        let layer_before = last.replace("h.2", "h.1");
        assert!(reached(&format!("{layer_before}.weight")), "{router:?}, {layer_before}");
        // the loss of the language model reaches experts by their own way as well
        let loss = |model: &RoutedModel, mode: ForwardMode| {
            model.loss(&two_rows(), &RoutingSource::Router, mode, mean_loss(12)).0.loss
        };
        let (detached, through) = (grads(true, &loss), grads(false, &loss));
        let differs = |name: &str| max_difference(&detached[name], &through[name]) > 1e-9;
        assert!(differs("h.0.attn.c_attn.expert_0.lora_b"), "{router:?}");
        // no router is behind the last module, and what a router itself learns stays
        assert!(!differs("h.2.mlp.c_proj.expert_0.lora_b"), "{router:?}");
        assert!(!differs(&format!("{last}.weight")), "{router:?}");
        assert!(detached.values().all(|grad| grad.isfinite().all().int64_value(&[]) == 1));
    }
    Ok(())
}
