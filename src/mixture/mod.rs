//! Experts and routers before they are put on a base. They are new, or come from PEFT adapters, an
//! export or a checkpoint.
//!
//! ```text
//! [lora], [[lora.experts]], [router]         \
//! export: dylora.json, expert_*, router       > Mixture { specs, router, tensors } -> RoutedModel
//! X-LoRA folder, PEFT adapter, checkpoint    /
//! ```
//!
//! The file `dylora.json` of an export, in format 3:
//!
//! ```text
//! { "format": 3, "dylora_version": "..", "base": { "name": "..", "blake3": ".." },
//!   "experts": ["expert_0", ..], "routing": "router",
//!   "router": null | { "file": "router.safetensors", "spec": { "input": "embeddings", .. } } }
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Tensor};

use crate::base::BaseIdentity;
use crate::config::{
    AdapterHub, AdapterSource, Config, Method, RouterInput, RouterScope, RoutingChoice,
};
use crate::durable::output;
use crate::hub::AdapterFiles;
use crate::model::decoder::Decoder;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::{ExpertSpec, num_routed, part_name};
use crate::model::routing::router::RouterSpec;
use crate::model::{Compute, RoutedModel};
use crate::peft::adapter::{self, Adapter};
use crate::peft::xlora::{self, Classifier};
use crate::tensor_file::{check_numbers, read_tensors};

/// The version of `dylora.json`'s format.
pub const FORMAT: u32 = 3;
/// The file that joins the parts of an export.
pub const MANIFEST: &str = "dylora.json";
/// The file of an export's routers, with the names of [`RoutedModel::router_tensors`].
pub const ROUTER: &str = "router.safetensors";
/// The file of an adapter's config. Each adapter has a folder of its own.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The file of an adapter's tensors.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Finds the files of an adapter in a folder or on the Hub.
pub type FindAdapter<'a> = dyn Fn(&AdapterSource) -> Result<AdapterFiles> + 'a;

/// Experts and routers before they are put on a base.
#[derive(Debug)]
pub struct Mixture {
    /// The experts' settings, with those of the part that is always on at the end.
    pub specs: Vec<ExpertSpec>,
    /// The routers' settings. A single expert has no router and ignores them.
    pub router: RouterSpec,
    /// Tensors of the model, with the names of [`RoutedModel::tensors`].
    pub tensors: BTreeMap<String, Tensor>,
    /// Whether `tensors` has every tensor of the model. If not, the missing ones are initialised as
    /// in a new model.
    pub is_whole: bool,
    /// What decided the routing weights in training.
    pub routing: RoutingChoice,
    /// What is known of the base that the experts belong to.
    pub base: BaseIdentity,
}

/// The contents of `dylora.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of the format, [`FORMAT`].
    pub format: u32,
    /// The version of dylora that wrote the file.
    pub dylora_version: String,
    /// The base that the experts belong to.
    pub base: ManifestBase,
    /// The experts' folders, in the order of the router's outputs.
    pub experts: Vec<String>,
    /// The folder of the part that is always on, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<String>,
    /// What decided the routing weights in training.
    pub routing: RoutingChoice,
    /// The routers; `None` for a single expert.
    pub router: Option<ManifestRouter>,
}

/// The base of an export.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestBase {
    /// The base's name for people: [`crate::base::Base::label`].
    pub name: String,
    /// BLAKE3 of the base's parameters in f32.
    pub blake3: String,
    /// What its `config.json` says: [`crate::model::families::settings`]. It is not known of older
    /// exports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Value>,
}

/// The routers of an export.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestRouter {
    /// The name of the routers' file.
    pub file: String,
    /// The routers' settings.
    pub spec: RouterSpec,
}

impl Mixture {
    /// A mixture with some of the tensors. The others are initialised as in a new model.
    pub fn new(
        specs: Vec<ExpertSpec>,
        router: RouterSpec,
        tensors: BTreeMap<String, Tensor>,
    ) -> Self {
        let routing = RoutingChoice::Router;
        Self { specs, router, tensors, is_whole: false, routing, base: BaseIdentity::default() }
    }

    /// Number of routed experts: all but the part that is always on.
    pub fn num_experts(&self) -> usize {
        num_routed(&self.specs)
    }

    /// The mixture that a run starts from. Experts and router with a source are read from it; the
    /// others are new. With `method = "full"` there are no experts.
    ///
    /// # Errors
    /// Those of `find`, [`ExpertSpec::new`] and [`adapter::read`], and a source of the router that
    /// has another shape or rule than the config, by key.
    pub fn of_config(config: &Config, base: &DecoderSpec, find: &FindAdapter<'_>) -> Result<Self> {
        let lora = &config.lora;
        let (mut specs, mut tensors) = (vec![], BTreeMap::new());
        let num_experts = match config.method {
            Method::RoutedLora => lora.num_experts as usize,
            Method::Full => 0,
        };
        for expert in 0..num_experts {
            let own = lora.experts.get(expert);
            let Some(source) = own.and_then(|own| own.source.as_ref()) else {
                specs.push(ExpertSpec::of_config(config, expert, base)?);
                continue;
            };
            let read = || read_adapter(&find(source)?, base);
            let mut adapter = read().with_context(|| format!("`lora.experts[{expert}].source`"))?;
            adapter.spec.trainable = own.is_some_and(|own| own.trainable);
            add_adapter(adapter, &mut specs, &mut tensors);
        }
        if config.method == Method::RoutedLora {
            specs.extend(ExpertSpec::of_shared(lora, base)?);
        }
        let mixture = Self::new(specs, RouterSpec::of_config(config), tensors);
        match &config.router.source {
            None => Ok(mixture),
            Some(dir) => mixture.with_router(dir).context("`router.source`"),
        }
    }

    /// The mixture in a folder: an export by dylora, an X-LoRA folder or a single PEFT adapter.
    pub fn of_folder(dir: &Path, base: &DecoderSpec, find: &FindAdapter<'_>) -> Result<Self> {
        if dir.join(MANIFEST).is_file() {
            return Self::of_export(dir, base, find);
        }
        if dir.join(xlora::CONFIG).is_file() {
            return Self::of_xlora(dir, base, find);
        }
        if dir.is_dir() && !dir.join(ADAPTER_CONFIG).is_file() {
            bail!(
                "`{}` holds no adapters: there is neither `{MANIFEST}` nor `{}` nor \
                 `{ADAPTER_CONFIG}`",
                dir.display(),
                xlora::CONFIG
            );
        }
        Self::of_adapters(&[AdapterSource::Path(dir.to_owned())], base, find)
    }

    /// A mixture of PEFT adapters with a new router.
    pub fn of_adapters(
        sources: &[AdapterSource],
        base: &DecoderSpec,
        find: &FindAdapter<'_>,
    ) -> Result<Self> {
        let (mut specs, mut tensors) = (vec![], BTreeMap::new());
        for source in sources {
            let adapter = read_adapter(&find(source)?, base)?;
            add_adapter(adapter, &mut specs, &mut tensors);
        }
        let is_whole = specs.len() == 1;
        Ok(Self { is_whole, ..Self::new(specs, RouterSpec::default(), tensors) })
    }

    fn of_export(dir: &Path, base: &DecoderSpec, find: &FindAdapter<'_>) -> Result<Self> {
        let manifest = read_manifest(dir)?;
        let folder = |name: &String| AdapterSource::Path(dir.join(name));
        let sources: Vec<AdapterSource> = manifest.experts.iter().map(folder).collect();
        let mut mixture = Self::of_adapters(&sources, base, find)?;
        if let Some(name) = &manifest.shared {
            let mut adapter = read_adapter(&find(&folder(name))?, base)?;
            adapter.spec.shared = true;
            add_adapter(adapter, &mut mixture.specs, &mut mixture.tensors);
        }
        if let Some(router) = &manifest.router {
            mixture.router = router.spec.clone();
            mixture.tensors.extend(router_tensors(&dir.join(&router.file))?);
        } else if mixture.num_experts() > 1 {
            bail!("`{}` has several experts, but no router", dir.join(MANIFEST).display());
        }
        mixture.is_whole = true;
        mixture.routing = manifest.routing;
        let ManifestBase { blake3, settings, .. } = manifest.base;
        mixture.base = BaseIdentity { hash: Some(blake3), settings, tokenizer: None };
        Ok(mixture)
    }

    /// The mixture in an X-LoRA folder: its adapters and its classifier.
    fn of_xlora(dir: &Path, base: &DecoderSpec, find: &FindAdapter<'_>) -> Result<Self> {
        let adapters = xlora::read_adapters(dir, base.width)?;
        let source = |(name, path): (String, String)| {
            let candidates =
                [dir.join(xlora::ADAPTERS).join(&name), dir.join(&name), dir.join(&path)];
            match candidates.into_iter().find(|folder| folder.join(ADAPTER_CONFIG).is_file()) {
                Some(folder) => AdapterSource::Path(folder),
                None => AdapterSource::Hub(AdapterHub {
                    repo: path,
                    revision: "main".into(),
                    subfolder: String::new(),
                }),
            }
        };
        let sources: Vec<AdapterSource> = adapters.into_iter().map(source).collect();
        let mut mixture = Self::of_adapters(&sources, base, find)?;
        let (router, tensors) = xlora_router(dir)?;
        let (outputs, count) = (tensors["router.weight"].size()[0], mixture.specs.len());
        if outputs != count as i64 {
            let file = dir.join(xlora::CLASSIFIER);
            bail!("`{}` scores {outputs} adapters, the config names {count}", file.display());
        }
        // a single expert needs no router: the softmax of one score is 1
        if count > 1 {
            mixture.router = router;
            mixture.tensors.extend(tensors);
        }
        mixture.is_whole = true;
        Ok(mixture)
    }

    /// The mixture with the router of an export or X-LoRA folder. That router's settings and number
    /// of experts must be those of the mixture.
    fn with_router(mut self, dir: &Path) -> Result<Self> {
        let (router, tensors) = if dir.join(MANIFEST).is_file() {
            match read_manifest(dir)?.router {
                Some(router) => (router.spec, router_tensors(&dir.join(&router.file))?),
                None => bail!("`{}` has a single expert and no router", dir.display()),
            }
        } else if dir.join(xlora::CONFIG).is_file() {
            xlora_router(dir)?
        } else {
            bail!("`{}` has neither `{MANIFEST}` nor `{}`", dir.display(), xlora::CONFIG);
        };
        let (here, there) = (serde_json::to_value(&self.router)?, serde_json::to_value(&router)?);
        for (key, here) in here.as_object().expect("a spec is an object") {
            if *here != there[key] {
                let (dir, there) = (dir.display(), &there[key]);
                bail!("the router of `{dir}` has `{key}` {there}, the config {here}");
            }
        }
        let count = self.num_experts() as i64;
        let fits = |name: &str, tensor: &Tensor| {
            name.contains(".hidden.") || tensor.size().first() == Some(&count)
        };
        if let Some((_, tensor)) = tensors.iter().find(|(name, tensor)| !fits(name, tensor)) {
            let found = tensor.size().first().copied().unwrap_or(0);
            bail!(
                "the router of `{}` scores {found} experts, the config has {count}",
                dir.display()
            );
        }
        self.tensors.extend(tensors);
        Ok(self)
    }

    /// Puts the mixture on a base. Tensors that the mixture lacks are drawn from libtorch's default
    /// CPU generator.
    ///
    /// # Errors
    /// A tensor that does not fit the model, by name.
    pub fn put_on(
        &self,
        base: &Decoder,
        device: Device,
        compute: impl Into<Compute>,
    ) -> Result<RoutedModel> {
        let (specs, router, compute) = (&self.specs, &self.router, compute.into());
        if self.is_whole {
            return RoutedModel::from_tensors(base, specs, router, &self.tensors, device, compute);
        }
        let model = RoutedModel::with_experts(base, specs, router, device, compute);
        model.load_some(&self.tensors)?;
        Ok(model)
    }
}

fn read_adapter(files: &AdapterFiles, base: &DecoderSpec) -> Result<Adapter> {
    adapter::read(&files.config, &files.weights, base)
        .with_context(|| format!("cannot import `{}`", files.label))
}

fn add_adapter(
    adapter: Adapter,
    specs: &mut Vec<ExpertSpec>,
    tensors: &mut BTreeMap<String, Tensor>,
) {
    specs.push(adapter.spec);
    let name = part_name(specs, specs.len() - 1);
    for ((path, key), tensor) in adapter.tensors {
        tensors.insert(format!("{path}.{name}.{key}"), tensor);
    }
}

/// X-LoRA's classifier as a router: its settings, and its tensors with the names of
/// [`RoutedModel::tensors`].
fn xlora_router(dir: &Path) -> Result<(RouterSpec, BTreeMap<String, Tensor>)> {
    let Classifier { softmax_temperature, weight, bias } = xlora::read_classifier(dir)?;
    let router = RouterSpec {
        input: RouterInput::BaseHidden,
        temperature: softmax_temperature,
        ..RouterSpec::default()
    };
    let named = [("router.weight", weight), ("router.bias", bias)];
    Ok((router, named.map(|(name, tensor)| (name.to_owned(), tensor)).into()))
}

/// Reads `dylora.json` in the folder `dir`.
///
/// # Errors
/// Another format, an unknown key, or a value that is out of range.
pub fn read_manifest(dir: &Path) -> Result<Manifest> {
    /// The only key that is read before the format is known to be this version's.
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let path = dir.join(MANIFEST);
    output::check_sum(&path)?;
    let text = fs_err::read_to_string(&path)?;
    let parse = || {
        let Version { format } = serde_json::from_str(&text)?;
        if format != FORMAT {
            bail!("has format {format}, this version reads {FORMAT}");
        }
        let manifest: Manifest = serde_json::from_str(&text)?;
        check(&manifest)?;
        Ok(manifest)
    };
    parse().with_context(|| format!("`{}`", path.display()))
}

/// Checks what the types of a manifest do not ensure.
fn check(manifest: &Manifest) -> Result<()> {
    let count = manifest.experts.len() as i64;
    if count == 0 {
        bail!("`experts` names none");
    }
    let file = manifest.router.iter().map(|router| ("router.file", &router.file));
    let parts = manifest.experts.iter().map(|name| ("experts", name));
    let shared = manifest.shared.iter().map(|name| ("shared", name));
    for (key, name) in parts.chain(shared).chain(file) {
        // as `Path` reads it, a name is one normal component, and `a/.` is another text
        let is_name = Path::new(name).file_name().is_some_and(|last| last == name.as_str());
        if !is_name || name.contains(char::is_control) {
            bail!("`{key}` must name a file or folder beside it, got `{name}`");
        }
    }
    match manifest.routing {
        RoutingChoice::None => bail!("`routing` is `none`, by which no expert is trained"),
        RoutingChoice::Expert(expert) if !(0..count).contains(&expert) => {
            bail!("`routing` is `expert:{expert}`, but there are {count} experts from 0")
        }
        _ => {}
    }
    let Some(ManifestRouter { spec, .. }) = &manifest.router else { return Ok(()) };
    let RouterSpec { input, scope, temperature, top_k, .. } = *spec;
    if input == RouterInput::ModuleInput && scope != RouterScope::Module {
        bail!("`router.spec.scope` must be `module` with the input `module_input`");
    }
    if !(temperature.is_finite() && temperature > 0.0) {
        bail!("`router.spec.temperature` must be a number above 0, got {temperature}");
    }
    match top_k {
        Some(k) if !(1..=count).contains(&k) => {
            bail!("`router.spec.top_k` must be from 1 to the {count} experts, got {k}")
        }
        _ => Ok(()),
    }
}

/// Reads the routers' file of an export.
fn router_tensors(file: &Path) -> Result<BTreeMap<String, Tensor>> {
    output::check_sum(file)?;
    let tensors = read_tensors(file).context("cannot read the router")?;
    for (name, tensor) in &tensors {
        check_numbers(name, tensor).with_context(|| format!("in `{}`", file.display()))?;
    }
    Ok(tensors)
}
