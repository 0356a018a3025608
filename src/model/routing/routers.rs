//! All routers of a model, one or one for each layer or target module, and the sites at which they
//! decide.
//!
//! Letters of shapes: `m` a layer's experts.

use tch::{Device, Kind, Tensor};

use super::router::{Router, RouterSpec};
use super::site::Site;
use crate::config::{ModulePath, RouterInput, RouterScope, TargetModule};
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::ExpertSpec;

/// The routers of a model, which share their settings.
#[derive(Debug)]
pub struct Routers {
    /// One router for all layers, or one for each layer or target module. There are none with fewer
    /// than two experts.
    routers: Vec<Router>,
    spec: RouterSpec,
    /// The current temperature of the routing rule, 0-dim, f64, on the device.
    temperature: Tensor,
    /// The target modules of each layer that have experts, in the order of a block.
    modules: Vec<Vec<TargetModule>>,
    /// The name of the base's list of blocks, `h` or `layers`.
    block_list: &'static str,
    /// The experts that each layer has.
    experts: Vec<Vec<usize>>,
    /// The same as a tensor, `[m]`, for each layer that lacks some experts, and `None` for the
    /// other layers. Empty unless layers route over their own experts.
    present: Vec<Option<Tensor>>,
}

impl Routers {
    /// No routers, for a model without experts.
    pub fn none(device: Device) -> Self {
        Self {
            routers: vec![],
            spec: RouterSpec::default(),
            temperature: Tensor::ones([], (Kind::Double, device)),
            modules: vec![],
            block_list: "",
            experts: vec![],
            present: vec![],
        }
    }

    /// New routers for a base, initialised by libtorch's default CPU generator.
    ///
    /// - `specs`: the routed experts
    /// - `modules`: the target modules of each layer that have experts
    /// - `kind`: dtype of the parameters
    pub fn new(
        spec: &RouterSpec,
        specs: &[ExpertSpec],
        modules: Vec<Vec<TargetModule>>,
        base: &DecoderSpec,
        kind: Kind,
        device: Device,
    ) -> Self {
        let d = base.width;
        let widths: Vec<i64> = match spec.scope {
            _ if specs.len() < 2 => vec![],
            RouterScope::Shared => vec![d],
            RouterScope::Layer => vec![d; modules.len()],
            RouterScope::Module => {
                modules.iter().flatten().map(|&module| spec.input_width(module, base)).collect()
            }
        };
        let new = |d| Router::new(spec, specs.len() as i64, d, kind).into_leaf(device);
        let experts: Vec<Vec<usize>> =
            (0..modules.len()).map(|layer| experts_in(specs, layer)).collect();
        let present = |own: &Vec<usize>| {
            let lacks_some = !own.is_empty() && own.len() < specs.len();
            let experts: Vec<i64> = own.iter().map(|&expert| expert as i64).collect();
            lacks_some.then(|| Tensor::from_slice(&experts).to_device(device))
        };
        let temperature = Tensor::ones([], (Kind::Double, device)) * spec.temperature;
        let first = modules.iter().flatten().next();
        Self {
            block_list: first.map_or("", |module| module.block_list()),
            routers: widths.into_iter().map(new).collect(),
            spec: spec.clone(),
            temperature,
            present: match spec.own_experts {
                true => experts.iter().map(present).collect(),
                false => vec![],
            },
            modules,
            experts,
        }
    }

    /// The routers: one for all layers, or one for each layer or target module. There are none with
    /// fewer than two experts.
    pub fn all(&self) -> &[Router] {
        &self.routers
    }

    /// Whether there are no routers.
    pub fn is_empty(&self) -> bool {
        self.routers.is_empty()
    }

    /// The settings of the routers.
    pub fn spec(&self) -> &RouterSpec {
        &self.spec
    }

    /// The temperature that divides the scores, 0-dim, f64. It is the same tensor for the model's
    /// whole life.
    pub fn temperature(&self) -> &Tensor {
        &self.temperature
    }

    /// Sets the temperature, and how many experts a token keeps (`None` for all).
    pub fn set_rule(&mut self, temperature: f64, top_k: Option<i64>) {
        if temperature != self.spec.temperature {
            let _ = self.temperature.fill_(temperature);
        }
        self.spec.temperature = temperature;
        self.spec.top_k = top_k;
    }

    /// The prefix of each router's tensor names, such as `router` or `layers.0.router`.
    pub fn names(&self) -> Vec<String> {
        match self.spec.scope {
            _ if self.routers.is_empty() => vec![],
            RouterScope::Shared => vec!["router".into()],
            RouterScope::Layer => {
                let list = self.block_list;
                (0..self.routers.len()).map(|layer| format!("{list}.{layer}.router")).collect()
            }
            RouterScope::Module => {
                let paths = self.modules.iter().enumerate().flat_map(|(layer, modules)| {
                    modules.iter().map(move |&module| ModulePath { layer, module })
                });
                paths.map(|path| format!("{path}.router")).collect()
            }
        }
    }

    /// The sites, in the order of a forward pass.
    pub fn sites(&self) -> Vec<Site> {
        if self.routers.is_empty() {
            return vec![];
        }
        let mut sites: Vec<Site> = vec![];
        for layer in 0..self.modules.len() {
            for site in self.sites_of(layer) {
                if !sites.contains(&site) {
                    sites.push(site);
                }
            }
        }
        sites
    }

    /// The sites that decide for a layer.
    pub(crate) fn sites_of(&self, layer: usize) -> Vec<Site> {
        let spec = &self.spec;
        let reads_own = matches!(spec.input, RouterInput::LayerInput | RouterInput::ModuleInput);
        let once = !reads_own && !spec.own_experts;
        match spec.scope {
            RouterScope::Shared => {
                let of_layer = if once { None } else { Some(layer) };
                vec![self.site(0, of_layer, None)]
            }
            RouterScope::Layer => vec![self.site(layer, Some(layer), None)],
            RouterScope::Module => {
                let before: usize = self.modules[..layer].iter().map(Vec::len).sum();
                let modules = self.modules[layer].iter().enumerate();
                let site = |(i, &module)| self.site(before + i, Some(layer), Some(module));
                modules.map(site).collect()
            }
        }
    }

    fn site(&self, router: usize, layer: Option<usize>, module: Option<TargetModule>) -> Site {
        Site { router, layer, module, block_list: self.block_list }
    }

    /// The experts that a site routes over, `[m]`; `None` for all.
    pub(crate) fn present_at(&self, site: Site) -> Option<&Tensor> {
        self.present.get(site.layer?)?.as_ref()
    }

    /// The indices of the experts that a site routes over, out of `num_experts`.
    pub fn experts_at(&self, site: Site, num_experts: usize) -> Vec<usize> {
        match (self.present_at(site), site.layer) {
            (Some(_), Some(layer)) => self.experts[layer].clone(),
            _ => (0..num_experts).collect(),
        }
    }
}

/// The experts that target a module of a layer.
pub(crate) fn experts_in(specs: &[ExpertSpec], layer: usize) -> Vec<usize> {
    let has = |expert: &usize| specs[*expert].modules.keys().any(|path| path.layer == layer);
    (0..specs.len()).filter(has).collect()
}
