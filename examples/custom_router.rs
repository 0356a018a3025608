//! Routes a mixture by a rule of one's own, and compares its loss with that of the learned router.
//!
//! ```sh
//! cargo run --release --example train -- runs/library 100
//! cargo run --release --example custom_router -- runs/library
//! ```
//!
//! The rule reads the first token of each document: one that begins with `--`, which is a comment
//! of the code, gets the expert of code, and another the expert of arithmetic. A rule can be
//! anything that gives weights `[b, t, e]` for token ids `[b, t]`, such as a classifier or a table
//! of customers. To be of use in generation, the weights of a token must not depend on later
//! tokens.
//!
//! Letters of shapes: `b` batch, `t` position, `e` expert.

use anyhow::{Context, Result, bail, ensure};
use dylora::base::Base;
use dylora::checkpoint::{self, Preferred};
use dylora::data::{DataOptions, Tokenizer, load_datasets};
use dylora::hub::HubSettings;
use dylora::model::loss::LossSettings;
use dylora::model::{ForwardMode, Inputs, RoutingSource};
use tch::{Device, Kind, Tensor};

/// What makes the source of a batch.
type Source<'a> = dyn Fn(&Inputs) -> RoutingSource + 'a;

/// A rule of routing between two experts.
struct FirstTokenRouter {
    /// The first token of a document of code.
    comment: i64,
}

impl FirstTokenRouter {
    fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let ids = tokenizer.encode("-- ")?;
        Ok(Self { comment: i64::from(*ids.first().context("a text has tokens")?) })
    }

    /// The weights of the experts, `[b, t, e]`: 1 for one of them and 0 for the other.
    fn weights(&self, inputs: &Inputs) -> Tensor {
        // a row holds several documents, so each position looks up the first one of its document
        let places_bt = inputs.position_ids.ones_like().cumsum(1, Kind::Int64) - 1;
        let firsts_bt = places_bt - &inputs.position_ids;
        let is_code_bt = inputs.input_ids.gather(1, &firsts_bt, false).eq(self.comment);
        Tensor::stack(&[&is_code_bt.logical_not(), &is_code_bt], -1).to_kind(Kind::Float)
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run] = &arguments[..] else { bail!("usage: custom_router RUN") };
    let dir = checkpoint::find(run.as_ref(), Preferred::Best)?;
    let config = checkpoint::read_config(&dir)?;
    let base = Base::open(&config.base, &HubSettings::offline(""), &())?;
    let model = checkpoint::load_model(&dir, &config, &base, Device::Cpu)?;
    ensure!(model.num_experts() == 2, "the rule of this example knows two experts");
    let tokenizer = base.tokenizer()?;
    let options = DataOptions::new(&config.data, config.run.seed, base.spec.eos_token_id(), None);
    let data = load_datasets(&config.data.domains, &options, tokenizer, &|_| ())?.validation;

    let rule = FirstTokenRouter::new(tokenizer)?;
    let sources: [(&str, &Source<'_>); 3] = [
        ("router", &|_| RoutingSource::Router),
        ("uniform", &|_| RoutingSource::Uniform),
        ("first token", &|inputs| RoutingSource::Given(rule.weights(inputs))),
    ];
    let _no_grad = tch::no_grad_guard();
    for (name, source) in sources {
        let (mut sum, mut label_tokens) = (0.0, 0);
        for blocks in data.eval_order().chunks(8) {
            let batch = data.batch(blocks);
            let inputs = Inputs::of_batch(&batch, false, model.device());
            let settings = LossSettings {
                chunk_tokens: config.train.loss_chunk_tokens,
                label_smoothing: 0.0,
                scale: Tensor::from(1.0_f32),
                with_grad: false,
            };
            let (loss, _) = model.loss(&inputs, &source(&inputs), ForwardMode::EVAL, settings);
            sum += loss.token_losses.sum(Kind::Double).double_value(&[]);
            label_tokens += batch.label_tokens();
        }
        println!("{name}: {:.4} nats a token", sum / label_tokens as f64);
    }
    Ok(())
}
