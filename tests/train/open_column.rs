//! The router column of a new expert is opened for the tokens of its domain.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{RouterInput, RouterScope};
use dylora::data::{BlockId, TokenDataset};
use dylora::growth::open_column::{open, share};
use dylora::growth::with_expert;
use dylora::mixture::Mixture;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{ForwardMode, Inputs, RoutedModel};
use tch::{Device, Kind, Tensor};

use crate::growth::third_domain;
use crate::{World, alone, data, open_base};

/// The new domain's index.
const NEW: usize = 2;

/// Routers of every input and scope, some with top-k and a hidden layer.
fn routers() -> Vec<RouterSpec> {
    use RouterInput::{BaseHidden, Embeddings, LayerInput, ModuleInput};
    use RouterScope::{Layer, Module, Shared};
    let of = |input, scope, hidden_layers, top_k| RouterSpec {
        input,
        scope,
        hidden_layers,
        hidden_width: 32,
        top_k,
        temperature: 1.7,
        ..RouterSpec::default()
    };
    let mut all = vec![of(ModuleInput, Module, 0, None), of(ModuleInput, Module, 0, Some(2))];
    for input in [Embeddings, BaseHidden, LayerInput] {
        for (scope, hidden_layers, top_k) in
            [(Shared, 0, None), (Layer, 0, Some(2)), (Layer, 1, None), (Module, 0, None)]
        {
            all.push(of(input, scope, hidden_layers, top_k));
        }
    }
    all
}

/// Two random experts and a third whose column is closed, on data of three domains.
struct Grown {
    model: RoutedModel,
    data: TokenDataset,
}

impl Grown {
    fn new(world: &World, router: &RouterSpec) -> Result<Self> {
        let mut config = world.config("run", &[])?;
        config.data.domains.push(third_domain(world)?);
        let base = open_base(&config)?;
        let (weights, kind) = (base.weights()?, Kind::Double);
        let specs = ExpertSpec::all(&config.lora, &base.spec)?;
        let empty = Mixture::new(specs[..2].to_vec(), router.clone(), BTreeMap::new());
        let old = empty.put_on(&weights, Device::Cpu, kind)?.tensors().into_iter();
        let old = old.map(|(name, tensor)| (name, tensor.randn_like() * 0.3)).collect();
        let old = Mixture::new(specs[..2].to_vec(), router.clone(), old);
        let old = Mixture { is_whole: true, ..old };
        let grown = with_expert(&old, &weights, specs[2].clone(), &|_| -40.0)?;
        let model = grown.put_on(&weights, Device::Cpu, kind)?;
        Ok(Self { model, data: data(&config, &base)?.train })
    }

    /// The mean weight of the new expert on all tokens of a domain, over tokens and sites.
    fn mean_weight(&self, domain: u32) -> f64 {
        let _no_grad = tch::no_grad_guard();
        let mut weights = vec![];
        let blocks = self.data.eval_order().into_iter().filter(|block| block.domain == domain);
        for block in blocks {
            let batch = self.data.batch(&[block]);
            let real: Vec<bool> = batch.document_ids.iter().map(|id| *id >= 0).collect();
            let real = Tensor::from_slice(&real).view([1, -1]);
            let inputs = Inputs::of_batch(&batch, false, Device::Cpu);
            for routing in self.model.routing(&inputs, ForwardMode::EVAL) {
                weights.push(routing.weights.select(-1, 2).masked_select(&real));
            }
        }
        Tensor::cat(&weights, 0).mean(Kind::Double).double_value(&[])
    }
}

fn copies(model: &RoutedModel) -> BTreeMap<String, Tensor> {
    model.tensors().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect()
}

#[test]
fn an_opened_column_has_its_own_domain_and_little_of_the_others() -> Result<()> {
    let _alone = alone();
    tch::manual_seed(21);
    let world = World::new()?;
    for router in routers() {
        let grown = Grown::new(&world, &router)?;
        let what = format!("{router:?}");
        assert!(grown.mean_weight(NEW as u32) < 1e-9, "{what}");
        let before = copies(&grown.model);
        open(&grown.model, &grown.data, NEW)?;
        // the new rows of the routers are set, and nothing else
        for (name, after) in copies(&grown.model) {
            let before = &before[&name];
            let is_row = name.ends_with("router.weight") || name.ends_with("router.bias");
            let same = match is_row {
                true => after.narrow(0, 0, 2).equal(&before.narrow(0, 0, 2)),
                false => after.equal(before),
            };
            assert!(same, "{what}: `{name}` has changed");
            assert!(!is_row || !after.equal(before), "{what}: `{name}` is as before");
        }
        let shares = [0, 1, 2].map(|domain| grown.mean_weight(domain));
        assert!(shares[NEW] > 0.4, "{what}: {shares:?}");
        // At the minimum of the loss, one router on the inputs of all layers has 1.9 times as much
        // of the new domain, since random experts blur what it reads; the others have more.
        assert!(shares[NEW] > 1.8 * shares[0].max(shares[1]), "{what}: {shares:?}");
    }
    Ok(())
}

#[test]
fn the_share_of_the_new_expert_is_its_mean_weight() -> Result<()> {
    let _alone = alone();
    tch::manual_seed(22);
    let world = World::new()?;
    for router in routers().into_iter().take(4) {
        let grown = Grown::new(&world, &router)?;
        for opened in [false, true] {
            if opened {
                open(&grown.model, &grown.data, NEW)?;
            }
            let blocks = |domain: u32| {
                let of = |block: &BlockId| block.domain == domain;
                grown.data.eval_order().into_iter().filter(of).count()
            };
            for domain in 0..3 {
                assert!(blocks(domain) <= 32, "all blocks are read");
                let found = share(&grown.model, &grown.data, domain as usize);
                let expected = grown.mean_weight(domain);
                assert!((found - expected).abs() < 1e-9, "{router:?}: {found}, {expected}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_column_is_not_opened_without_tokens_of_earlier_domains() -> Result<()> {
    let _alone = alone();
    tch::manual_seed(23);
    let world = World::new()?;
    let mut grown = Grown::new(&world, &RouterSpec::default())?;
    grown.data.domains.truncate(1);
    let error = open(&grown.model, &grown.data, 0).unwrap_err().to_string();
    assert_eq!(error, "a domain has no tokens by which the new router column could be fitted");
    Ok(())
}
