//! Trains a mixture of two experts on two domains of the demo, and prints its losses.
//!
//! ```sh
//! cargo run --release --example train -- runs/library 100
//! ```
//!
//! The arguments are the folder of the run and its number of steps. Run the example in the
//! repository's root, where the demo is. `dylora eval --checkpoint runs/library` and the other
//! examples read what it trained.

use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use dylora::base::Base;
use dylora::config::load;
use dylora::data::{DataOptions, load_datasets};
use dylora::hub::{self, HubSettings};
use dylora::mixture::Mixture;
use dylora::train::{Event, Trainer};
use tch::Device;

/// What a config file would say. A key that is left out has its default.
const CONFIG: &str = r#"
base.source = { path = "demo/base" }
data.seq_len = 256
lora = { num_experts = 2, rank = 8, alpha = 16.0 }
router.level = "sequence"
train = { duration = { steps = 100 }, micro_batch_size = 4, eval_every_steps = 25 }
optimizer.adapters = { learning_rate = 5e-3 }

[[data.domains]]
name = "arithmetic"
train = ["demo/data/arithmetic.train.jsonl"]
validation = { files = ["demo/data/arithmetic.validation.jsonl"] }

[[data.domains]]
name = "code"
train = ["demo/data/code.train.jsonl"]
validation = { files = ["demo/data/code.validation.jsonl"] }
"#;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, steps] = &arguments[..] else { bail!("usage: train FOLDER STEPS") };
    // values on the command line, as `dylora train --set` takes them
    let overrides = [format!("run.dir={dir:?}"), format!("train.duration.steps={steps}")];
    let config = load::resolve(CONFIG, &overrides)?;

    // the base and the adapters that a config names may be on the Hub; here they are not
    let hub = HubSettings::offline("");
    let base = Base::open(&config.base, &hub, &())?;
    let eos = base.spec.eos_token_id();
    let options = DataOptions::new(&config.data, config.run.seed, eos, None);
    let data = load_datasets(&config.data.domains, &options, base.tokenizer()?, &|_| ())?;
    let find = |source: &_| hub::find_adapter(source, &hub, &());
    let mixture = Mixture::of_config(&config, &base.spec, &find)?;

    let mut trainer = Trainer::new(config, &base, &mixture, data, Device::Cpu)?;
    // set from a signal handler or another thread, it ends the run after a step
    let interrupt = AtomicBool::new(false);
    let summary = trainer.run(&interrupt, &mut |event| match event {
        Event::Step(step) => println!("step {}: loss {:.4}", step.step, step.loss),
        Event::Validation(result) => println!("validation: {:.4?}", result.domain_losses),
        _ => {}
    });
    let summary = summary.context("the training failed")?;
    println!("{} after {} steps", summary.ending.name(), summary.state.step);
    println!("checkpoint: {}", summary.checkpoint.display());
    Ok(())
}
