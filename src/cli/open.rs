//! Opening what a command works on: a checkpoint's model, or a bare base.

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use tch::Device;

use super::progress::DownloadBar;
use super::{Shared, device, hub_settings, usage};
use crate::base::Base;
use crate::config::{BaseConfig, BaseSource, Config, DeviceChoice, Dtype, HubSource};
use crate::model::{RoutedGpt2, kind_of};
use crate::train::{self, checkpoint};

/// Which model: a checkpoint, or a bare base.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A run's folder (its best checkpoint, else its last) or one of its `checkpoints/step-*`.
    #[arg(long, value_name = "DIR", required_unless_present = "base")]
    pub checkpoint: Option<PathBuf>,
    /// A bare base: a folder, or a Hub id as `NAME[@REVISION]`. With `--checkpoint`: where the
    /// checkpoint's base is now.
    #[arg(long, value_name = "DIR")]
    pub base: Option<String>,
    /// A `tokenizer.json`, if it is not the one beside the base's weights.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// What the base computes in [default: the config's, or f32].
    #[arg(long, value_name = "f32|bf16", value_parser = parse_dtype)]
    pub dtype: Option<Dtype>,
    /// `auto`, `cpu` or `cuda[:N]`.
    #[arg(long)]
    pub device: Option<DeviceChoice>,
}

fn parse_dtype(text: &str) -> Result<Dtype> {
    match text {
        "f32" => Ok(Dtype::F32),
        "bf16" => Ok(Dtype::Bf16),
        _ => bail!("must be `f32` or `bf16`"),
    }
}

/// A model that is ready to run.
pub struct OpenModel {
    /// The base with its tokenizer.
    pub base: Base,
    /// The run's config; none for a bare base.
    pub config: Option<Config>,
    /// The checkpoint's folder; none for a bare base.
    pub checkpoint: Option<PathBuf>,
    /// The model.
    pub model: RoutedGpt2,
}

impl ModelArgs {
    /// Opens the model.
    pub fn open(&self, shared: &Shared) -> Result<OpenModel> {
        let source = self.base.as_deref().map(base_source).transpose()?;
        let Some(dir) = &self.checkpoint else {
            let source = source.ok_or_else(|| usage(anyhow!("name `--checkpoint` or `--base`")))?;
            let dtype = self.dtype.unwrap_or_default();
            let config = BaseConfig { source, tokenizer: self.tokenizer.clone(), dtype };
            let device = device(self.device.unwrap_or(DeviceChoice::Auto))?;
            let base = open_base(&config, shared)?;
            let model = RoutedGpt2::plain(&base.weights()?, device, kind_of(dtype), false);
            return Ok(OpenModel { base, config: None, checkpoint: None, model });
        };
        let dir = checkpoint::find(dir, checkpoint::Preferred::Best)?;
        let mut config = checkpoint::read_config(&dir)?;
        if let Some(source) = source {
            config.base.source = source;
        }
        if let Some(tokenizer) = &self.tokenizer {
            config.base.tokenizer = Some(tokenizer.clone());
        }
        config.base.dtype = self.dtype.unwrap_or(config.base.dtype);
        let device = device(self.device.unwrap_or(config.run.device))?;
        let base = open_base(&config.base, shared)?;
        let model = train::load_model(&dir, &config, &base, device)?;
        Ok(OpenModel { base, config: Some(config), checkpoint: Some(dir), model })
    }
}

/// Finds the base's files, with a bar for downloads.
pub fn open_base(config: &BaseConfig, shared: &Shared) -> Result<Base> {
    Base::open(config, &hub_settings(), &DownloadBar::new(shared.show_progress))
}

/// A folder if there is one, else a Hub id.
fn base_source(text: &str) -> Result<BaseSource> {
    let path = PathBuf::from(text);
    let looks_like_id = text.split('/').count() <= 2 && !text.starts_with(['.', '/', '~']);
    if path.exists() || !looks_like_id {
        return Ok(BaseSource::Path(std::path::absolute(path)?));
    }
    let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
    Ok(BaseSource::Hub(HubSource { repo: repo.into(), revision: revision.into() }))
}

/// The device's name for people.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".into(),
    }
}
