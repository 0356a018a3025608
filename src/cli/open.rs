//! Opening the model that a command works on: a checkpoint's, adapters on a base, or a bare base.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use tch::{Device, Kind};

use super::progress::DownloadBar;
use super::{Shared, device, hub_settings, usage};
use crate::base::Base;
use crate::checkpoint::{self, Preferred, TrainState};
use crate::config::{
    AdapterHub, AdapterSource, BaseConfig, BaseSource, Config, DeviceChoice, DomainConfig, Dtype,
    HubDataset, HubSource, RoutingChoice, Validation, expert_names,
};
use crate::data::{TokenDataset, visible};
use crate::durable::{folder, output::Output};
use crate::eval::{check_domains, check_records, domain_targets};
use crate::export::peft::{Origin, Provenance};
use crate::export::training::Training;
use crate::hub::{self, AdapterFiles};
use crate::mixture::Mixture;
use crate::model::batch::DomainTargets;
use crate::model::{RoutedModel, kind_of};

/// The arguments that name a model: a checkpoint, adapters on a base, or a bare base.
#[derive(Debug, Default, Args)]
pub struct ModelArgs {
    /// A checkpoint's folder (`RUN/checkpoints/step-*`) or a run's folder. For a run, the best
    /// checkpoint is used, or the last one if there is no best. Instead of a checkpoint,
    /// `--adapters DIR --base DIR` opens adapters on a base, and `--base DIR` alone a bare base.
    #[arg(long, value_name = "DIR", required_unless_present = "base")]
    pub checkpoint: Option<PathBuf>,
    /// Adapters to put on `--base`: the folder of an export by dylora, of an X-LoRA model or of a
    /// PEFT adapter, or the Hub id of a PEFT adapter, `NAME[@REVISION]`.
    #[arg(long, value_name = "DIR", conflicts_with = "checkpoint", requires = "base")]
    pub adapters: Option<String>,
    /// The base: a folder, or a Hub id, `NAME[@REVISION]`. With `--checkpoint`, it overrides the
    /// config's `base.source`, for example because the base has moved.
    #[arg(long, value_name = "DIR")]
    pub base: Option<String>,
    /// The `tokenizer.json` to use [default: the one that the config names, or the base's].
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// A Jinja file with the chat template to use [default: the one that the config names, or the
    /// base's].
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// The dtype that the base computes in [default: the config's, or `f32`].
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// The device to compute on: `auto`, `cpu` or `cuda[:N]` [default: the config's, or `auto`].
    #[arg(long)]
    pub device: Option<DeviceChoice>,
}

/// A model that is ready to run.
pub struct OpenModel {
    /// The base with its tokenizer.
    pub base: Base,
    /// The run's config; `None` without a checkpoint.
    pub config: Option<Config>,
    /// The checkpoint's folder; `None` without a checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The model.
    pub model: RoutedModel,
    /// What decided the routing weights in training.
    routing: RoutingChoice,
    /// BLAKE3 of the base's parameters in f32, if the checkpoint or export says it.
    base_hash: Option<String>,
    /// Whether the model was trained on conversations, if that is known.
    pub learned_chats: Option<bool>,
    /// The files of the adapters.
    adapter_files: Vec<PathBuf>,
}

impl ModelArgs {
    /// The output of a command that opens this model. Its inputs are those that are known before
    /// the model is open.
    pub fn output(&self, path: &Path, overwrite: bool) -> Result<Output> {
        let mut inputs: Vec<PathBuf> =
            self.tokenizer.iter().chain(&self.chat_template).cloned().collect();
        // the base's files, not its folder, because the output may be a new folder in there
        let entries = self.base.as_ref().and_then(|base| fs_err::read_dir(base).ok());
        let entries = entries.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        inputs.extend(entries.filter(|path| path.is_file()));
        inputs.extend(self.adapters.iter().flat_map(|dir| with_files(Path::new(dir))));
        if let Some(dir) = &self.checkpoint {
            inputs
                .extend(["config.toml", "metrics.jsonl", "checkpoints"].map(|name| dir.join(name)));
            let found = checkpoint::find(dir, Preferred::Best).ok();
            inputs.extend(found.iter().flat_map(|dir| with_files(dir)));
        }
        let working_folder = std::env::current_dir()?;
        Ok(Output { path: path.to_owned(), overwrite, inputs, working_folder })
    }

    /// Opens the model.
    pub fn open(&self, shared: &Shared) -> Result<OpenModel> {
        let source = self.base.as_deref().map(base_source).transpose()?;
        let Some(dir) = &self.checkpoint else {
            let source = source.ok_or_else(|| usage(anyhow!("name `--checkpoint` or `--base`")))?;
            let dtype = self.dtype.unwrap_or_default();
            let (tokenizer, chat_template) = (self.tokenizer.clone(), self.chat_template.clone());
            let config = BaseConfig { source, tokenizer, chat_template, dtype };
            let device = device(self.device.unwrap_or(DeviceChoice::Auto))?;
            let base = open_base(&config, shared)?;
            return self.open_on(base, device, kind_of(dtype), shared);
        };
        let dir = checkpoint::find(dir, Preferred::Best)?;
        let mut config = checkpoint::read_config(&dir)?;
        if let Some(source) = source {
            config.base.source = source;
        }
        if let Some(tokenizer) = &self.tokenizer {
            config.base.tokenizer = Some(tokenizer.clone());
        }
        if let Some(template) = &self.chat_template {
            config.base.chat_template = Some(template.clone());
        }
        config.base.dtype = self.dtype.unwrap_or(config.base.dtype);
        let device = device(self.device.unwrap_or(config.run.device))?;
        let base = open_base(&config.base, shared)?;
        let model = checkpoint::load_model(&dir, &config, &base, device)?;
        let TrainState { base_hash, learned_chats, .. } = checkpoint::read_state(&dir)?;
        let (routing, checkpoint) = (config.train.routing, Some(dir));
        let (config, adapter_files) = (Some(config), vec![]);
        Ok(OpenModel {
            base,
            config,
            checkpoint,
            model,
            routing,
            base_hash,
            learned_chats,
            adapter_files,
        })
    }

    /// Opens a base alone or with `--adapters`.
    fn open_on(
        &self,
        base: Base,
        device: Device,
        kind: Kind,
        shared: &Shared,
    ) -> Result<OpenModel> {
        let found = RefCell::new(vec![]);
        let find = |source: &AdapterSource| {
            let files = find_adapter(source, shared)?;
            found.borrow_mut().extend([files.config.clone(), files.weights.clone()]);
            Ok(files)
        };
        let mixture = match &self.adapters {
            None => None,
            Some(text) => Some(match adapter_source(text)? {
                AdapterSource::Path(dir) => Mixture::of_folder(&dir, &base.spec, &find)?,
                source @ AdapterSource::Hub(_) => {
                    Mixture::of_adapters(&[source], &base.spec, &find)?
                }
            }),
        };
        let identity = mixture.as_ref().map(|mixture| mixture.base.clone()).unwrap_or_default();
        let weights = base.weights_of(&identity, "the adapters belong to")?;
        let base_hash = identity.hash;
        let routing = mixture.as_ref().map_or(RoutingChoice::Router, |mixture| mixture.routing);
        let model = match mixture {
            None => RoutedModel::plain(&weights, device, kind, false),
            Some(mixture) => mixture.put_on(&weights, device, kind)?,
        };
        let (config, checkpoint, adapter_files) = (None, None, found.into_inner());
        Ok(OpenModel {
            base,
            config,
            checkpoint,
            model,
            routing,
            base_hash,
            learned_chats: None,
            adapter_files,
        })
    }
}

impl OpenModel {
    /// Adds the inputs that are known since the model is open.
    pub fn output(&self, mut early: Output) -> Output {
        early.inputs.extend(self.base.input_files());
        early.inputs.extend(self.checkpoint.iter().flat_map(|dir| with_files(dir)));
        early.inputs.extend(self.adapter_files.iter().cloned());
        early
    }

    /// What an export of the model says about its origin.
    pub fn provenance(&self) -> Result<Provenance> {
        let (base_name, revision) = match &self.base.source {
            BaseSource::Path(path) => {
                (self.base.repo().unwrap_or_else(|| path.display().to_string()), None)
            }
            BaseSource::Hub(hub) => (hub.repo.clone(), Some(hub.revision.clone())),
            BaseSource::Random(_) => ("random".into(), None),
        };
        let training = match (&self.config, &self.checkpoint) {
            (Some(config), Some(dir)) => {
                Some(Training::of_checkpoint(config, &checkpoint::read_state(dir)?, dir)?)
            }
            _ => None,
        };
        Ok(Provenance {
            base_name,
            revision,
            base_hash: match &self.base_hash {
                Some(hash) => hash.clone(),
                None => self.base.weights()?.hash_in(Kind::Float)?,
            },
            dropout: self.config.as_ref().map_or(0.0, |config| config.lora.dropout),
            routing: self.routing,
            origin: Origin::new(&self.base, training),
        })
    }

    /// The routing to use: `asked`, the value of `--routing`, or else the one of the training. A
    /// bare base has none.
    ///
    /// # Errors
    /// An expert that does not exist, a routing that needs experts on a bare base, and `domain`
    /// without a run's config.
    pub fn routing(&self, asked: Option<RoutingChoice>) -> Result<RoutingChoice> {
        let count = self.model.num_experts();
        let routing = match asked {
            None if count == 0 => RoutingChoice::None,
            asked => asked.unwrap_or(self.routing),
        };
        match routing {
            RoutingChoice::Router | RoutingChoice::None => Ok(routing),
            _ if count == 0 => Err(usage(anyhow!("a base has no experts to route by `{routing}`"))),
            RoutingChoice::Expert(expert) if !(0..count).contains(&expert) => {
                Err(usage(anyhow!("there is no `{routing}`, the model has {count} expert(s)")))
            }
            RoutingChoice::Domain if self.config.is_none() => Err(usage(anyhow!(
                "routing by `domain` needs a run's config, which says the expert of each domain\n\
                 hint: open the run by `--checkpoint`, or name another `--routing`"
            ))),
            _ => Ok(routing),
        }
    }

    /// The name of each expert, with those of its domains if a run's config says them, as people
    /// see it.
    pub fn expert_names(&self) -> Vec<String> {
        let domains = self.config.as_ref().map_or(&[][..], |config| &config.data.domains);
        let names = expert_names(domains, self.model.num_experts() as usize);
        names.iter().map(|name| visible(name)).collect()
    }

    /// The experts that the run's config gives the domains of `dataset`; `None` if it gives none or
    /// there is no run.
    pub fn domains(&self, dataset: &TokenDataset) -> Option<DomainTargets> {
        domain_targets(self.config.as_ref()?, &self.model, dataset)
    }

    /// Checks that `dataset` can be routed by `routing`.
    ///
    /// # Errors
    /// A document without an expert, for `record`, and a domain without one, for `domain`.
    pub fn check_data(&self, dataset: &TokenDataset, routing: RoutingChoice) -> Result<()> {
        check_records(dataset, routing, self.model.num_experts())?;
        check_domains(dataset, routing, self.domains(dataset).as_ref())
    }
}

/// A folder and all files below it: a file may be a link to one elsewhere, which is read as well.
fn with_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![dir.to_owned()];
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs_err::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
            let path = entry.path();
            match path.is_dir() && !path.is_symlink() {
                true => folders.push(path),
                false => found.push(path),
            }
        }
    }
    found
}

/// The experts and router that a run starts from, with a progress bar for downloads.
pub fn open_mixture(config: &Config, base: &Base, shared: &Shared) -> Result<Mixture> {
    Mixture::of_config(config, &base.spec, &|source| find_adapter(source, shared))
}

fn find_adapter(source: &AdapterSource, shared: &Shared) -> Result<AdapterFiles> {
    hub::find_adapter(source, &hub_settings(), &DownloadBar::new(shared.show_progress))
}

/// Parses the name of an adapter like that of a base.
fn adapter_source(text: &str) -> Result<AdapterSource> {
    Ok(match base_source(text)? {
        BaseSource::Hub(HubSource { repo, revision }) => {
            AdapterSource::Hub(AdapterHub { repo, revision, subfolder: String::new() })
        }
        BaseSource::Path(path) => AdapterSource::Path(path),
        BaseSource::Random(_) => unreachable!("no text names random weights"),
    })
}

/// Finds the base's files, with a progress bar for downloads.
pub fn open_base(config: &BaseConfig, shared: &Shared) -> Result<Base> {
    Base::open(config, &hub_settings(), &DownloadBar::new(shared.show_progress))
}

/// The domains with the files of their data sets of the Hub, which are fetched if the cache lacks
/// them.
pub fn with_fetched(domains: &[DomainConfig], shared: &Shared) -> Result<Vec<DomainConfig>> {
    let fetch = |dataset: &HubDataset, domain: &str| -> Result<Vec<String>> {
        let bar = DownloadBar::new(shared.show_progress);
        let found = hub::find_dataset(dataset, &hub_settings(), &bar);
        let found = found.with_context(|| format!("in domain `{domain}`"))?;
        let text = |path: PathBuf| path.into_os_string().into_string();
        let files = found.files.into_iter().map(text).collect::<Result<_, _>>();
        files.map_err(|path| anyhow!("`{}` is not valid UTF-8", path.display()))
    };
    let mut domains = domains.to_vec();
    for domain in &mut domains {
        if let Some(dataset) = domain.hub.take() {
            domain.train = fetch(&dataset, &domain.name)?;
        }
        if let Some(Validation::Hub(dataset)) = &domain.validation {
            domain.validation = Some(Validation::Files(fetch(dataset, &domain.name)?));
        }
    }
    Ok(domains)
}

/// Parses the name of a base. It is a folder if one exists or if it cannot be a Hub id.
pub fn base_source(text: &str) -> Result<BaseSource> {
    let path = PathBuf::from(text);
    folder::restore(&path)?;
    let looks_like_id = text.split('/').count() <= 2 && !text.starts_with(['.', '/', '~']);
    if path.exists() || !looks_like_id {
        return Ok(BaseSource::Path(std::path::absolute(path)?));
    }
    let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
    Ok(BaseSource::Hub(HubSource { repo: repo.into(), revision: revision.into() }))
}

/// The name of a device: `cpu` or `cuda:N`.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".into(),
    }
}
