//! Whether a run that is resumed is still the same run: its config and its data.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::checkpoint::TrainState;
use crate::config::{self, Config, OnCollapse};
use crate::data::Datasets;

/// Gives the domains of `config` the experts that `saved`, an earlier state of the same run, gave
/// them, unless `config` names some itself.
pub(super) fn take_experts(config: &mut Config, saved: &Config) {
    if config.data.domains.iter().any(|domain| domain.expert.is_some()) {
        return;
    }
    for (domain, saved) in config.data.domains.iter_mut().zip(&saved.data.domains) {
        domain.expert.clone_from(&saved.expert);
    }
}

/// Checks that `config` continues the run of `saved`. Settings may differ if they only decide when
/// to stop, what to write, on which device and with which kernels to compute, or how a collapse of
/// the routing is detected and handled.
pub(super) fn check_same_run(config: &Config, saved: &Config) -> Result<()> {
    let comparable = |config: &Config| {
        let mut config = config.clone();
        config.run.dir = PathBuf::new();
        config.run.device = config::DeviceChoice::Auto;
        config.run.tensorboard = true;
        config.train.duration = saved.train.duration;
        take_experts(&mut config, saved);
        config.train.eval_every_steps = None;
        config.train.checkpoint_every_steps = None;
        config.train.keep_last = 1;
        config.train.kernels = config::Kernels::Auto;
        config.train.early_stopping = None;
        config.router.on_collapse = OnCollapse::Warn;
        config.router.collapse_share = 1.0;
        config.router.dead_share = 1.0;
        config::load::to_toml(&config)
    };
    let (new, old) = (comparable(config), comparable(saved));
    if new == old {
        return Ok(());
    }
    let differing: Vec<String> = new
        .lines()
        .zip(old.lines())
        .filter(|(new, old)| new != old)
        .map(|(new, old)| format!("now `{new}`, was `{old}`"))
        .collect();
    bail!(
        "the config differs from the run that is resumed: {}\nhint: a resumed run may change its \
         duration, its device and kernels, how often it evaluates and saves and when it stops, \
         nothing else",
        differing.first().map_or("it has other keys", String::as_str)
    );
}

/// Checks that the data of a resumed run is that of its checkpoint in `dir`. What an older
/// checkpoint does not know is not checked.
pub(super) fn check_data(data: &Datasets, saved: &TrainState, dir: &Path) -> Result<()> {
    let validation = data.validation.content_fingerprint();
    let known = saved.validation_fingerprint.as_ref();
    let changed = match () {
        () if saved.data_fingerprint != data.train.fingerprint() => "training",
        () if known.is_some_and(|known| *known != validation) => "validation",
        () => return Ok(()),
    };
    bail!(
        "the {changed} data has changed since the checkpoint `{}`\nhint: a resumed run needs the \
         same files, tokenizer, chat template and `[data]`",
        dir.display()
    );
}
