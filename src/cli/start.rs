//! What a run starts from: its config, base, data, and experts or checkpoint.

use std::path::PathBuf;

use anyhow::Result;
use tch::Device;

use super::memory::check_run_fits;
use super::open::{open_base, open_mixture, with_fetched};
use super::progress::LoadBar;
use super::{Shared, token_cache, usage};
use crate::base::Base;
use crate::checkpoint;
use crate::config::{BaseProducts, Config, Method};
use crate::data::{DataOptions, Datasets, HalvedDatasets, load_datasets, load_halves};
use crate::growth::assign::settle_experts;
use crate::mixture::Mixture;
use crate::model::check_quantisable;
use crate::model::experts::spec::ExpertSpec;
use crate::train::Trainer;

/// A run that is ready to be trained.
pub struct ReadyRun {
    /// The run's config, in which the domains of a new run have their experts.
    pub config: Config,
    /// The device to train on.
    pub device: Device,
    /// The base.
    pub base: Base,
    /// The data.
    pub data: Datasets,
    /// The experts' settings.
    pub specs: Vec<ExpertSpec>,
    start: Start,
}

/// What the weights of experts and routers start from.
enum Start {
    /// A new run starts from these experts and this router.
    New(Box<Mixture>),
    /// A resumed run starts from the checkpoint in this folder.
    Resume(PathBuf),
}

impl ReadyRun {
    /// Opens what a run of `config` needs.
    ///
    /// - `resume_from`: the folder of the checkpoint of a run that is resumed
    /// - `load`: loads the run's data
    pub fn open(
        mut config: Config,
        resume_from: Option<PathBuf>,
        shared: &Shared,
        load: impl FnOnce(&Config, &Base) -> Result<Datasets>,
    ) -> Result<Self> {
        let device = shared.device(config.run.device)?;
        tracing::debug!("opening the base");
        let base = open_base(&config.base, shared)?;
        check_base(&config, &base).map_err(usage)?;
        // adapters are found before the data is read, which may take long
        let mut start = match resume_from {
            Some(dir) => Start::Resume(dir),
            None => Start::New(Box::new(open_mixture(&config, &base, shared)?)),
        };
        let mut specs = match &start {
            Start::New(mixture) => mixture.specs.clone(),
            Start::Resume(dir) => checkpoint::read_experts(dir)?,
        };
        if config.train.base_products == BaseProducts::Fp8 {
            check_quantisable(&base.spec, &specs, device).map_err(usage)?;
        }
        check_run_fits(&config, &specs, &base, device)?;
        tracing::debug!("reading the data");
        let data = shared.in_turn(|| load(&config, &base))?;
        tracing::debug!("building the model");
        if let Start::New(mixture) = &mut start {
            settle_experts(&mut config, &mut mixture.specs, &data.train, &base, device)?;
            specs.clone_from(&mixture.specs);
        }
        Ok(Self { config, device, base, data, specs, start })
    }

    /// The trainer of the run, and the base.
    pub fn trainer(self, shared: &Shared) -> Result<(Trainer, Base)> {
        let Self { config, device, base, data, start, .. } = self;
        let mut trainer = match &start {
            Start::New(mixture) => Trainer::new(config, &base, mixture, data, device)?,
            Start::Resume(dir) => Trainer::resume(config, &base, data, device, dir)?,
        };
        trainer.enter(&shared.world)?;
        Ok((trainer, base))
    }
}

/// Checks a config against its base: the length of blocks, and the experts, except those that are
/// read from adapters.
pub fn check_base(config: &Config, base: &Base) -> Result<()> {
    base.check_seq_len(config.data.seq_len)?;
    let lora = &config.lora;
    let has_source = |expert: usize| lora.experts.get(expert).is_some_and(|e| e.source.is_some());
    let is_new = |expert: &usize| config.method == Method::RoutedLora && !has_source(*expert);
    for expert in (0..lora.num_experts as usize).filter(is_new) {
        ExpertSpec::new(lora, expert, &base.spec)?;
    }
    Ok(())
}

/// Loads the data of a config with a progress bar.
pub fn load_data(config: &Config, base: &Base, shared: &Shared) -> Result<Datasets> {
    let options = data_options(config, base, config.run.seed);
    let domains = with_fetched(&config.data.domains, shared)?;
    let bar = LoadBar::new(shared.show_progress);
    let progress = |progress| bar.update(&progress);
    load_datasets(&domains, &options, base.tokenizer()?, &progress)
}

/// Loads the data of a config, with two halves of its validation data.
///
/// - `split_seed`: chooses the documents held out by a `validation.fraction`
pub fn load_halved_data(
    config: &Config,
    base: &Base,
    split_seed: u64,
    shared: &Shared,
) -> Result<HalvedDatasets> {
    let options = data_options(config, base, split_seed);
    let domains = with_fetched(&config.data.domains, shared)?;
    let bar = LoadBar::new(shared.show_progress);
    let progress = |progress| bar.update(&progress);
    load_halves(&domains, &options, base.tokenizer()?, &progress)
}

fn data_options(config: &Config, base: &Base, seed: u64) -> DataOptions {
    let eos = base.spec.eos_token_id();
    if eos.is_none() {
        tracing::warn!(
            "nothing ends a document: `{}` names no `eos_token_id` within its vocabulary of {}, so \
             that a model does not learn where to stop",
            base.label,
            base.spec.vocab_size
        );
    }
    let chat = base.chat_options(config.data.loss_on_turns);
    DataOptions { chat, ..DataOptions::new(&config.data, seed, eos, Some(token_cache())) }
}
