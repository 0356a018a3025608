//! The rows of the bench: the config of each, and what one of its steps does.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::passes;
use crate::config::{BaseProducts, Config, DropoutMasks, RouterInput, RouterScope, RoutingChoice};
use crate::data::{Batch, BlockId, TokenDataset};
use crate::dist::World;
use crate::ffi;
use crate::model::decoder::Decoder;
use crate::model::experts::dropout::LoraDropout;
use crate::model::experts::spec::ExpertSpec;
use crate::model::loss::LossSettings;
use crate::model::routing::router::RouterSpec;
use crate::model::{Compute, ForwardMode, Inputs, RoutedModel, RoutingSource, Trained};
use crate::train::graph::Capture;
use crate::train::optim::{GradientSum, Optimizer};
use crate::train::prepared::{Prepared, StepCounts};
use crate::train::step::{StepInFlight, Stepper};

/// A way to compute the mixture, or something to compare it with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Row {
    /// The forward and backward pass of the base without experts, which is the least that training
    /// on a frozen base costs.
    ///
    /// Only the position embeddings, or zeros in their place where a base has none, need a
    /// gradient, so that the backward pass goes through every block, as it does with adapters.
    Base,
    /// One LoRA of rank r. The price of the mixture is what it costs more than this.
    SingleLora,
    /// One LoRA of rank E r, which has as many parameters as the mixture's experts.
    SingleLoraWide,
    /// The mixture in one pass with stacked experts, as in `dylora train`.
    OnePass,
    /// The mixture in one pass, one expert after the other (`lora.dropout_masks = "per_expert"`).
    OnePassLoop,
    /// The mixture after a pass of the base alone, whose last hidden state the router reads
    /// (`router.input = "base_hidden"`).
    TwoPasses,
    /// One pass for each expert, with blended logits.
    NPasses,
    /// The loss of the mixture in one pass, without gradients.
    Eval,
    /// Texts by the base. Each step adds a token to each of them. The prompts, which are computed
    /// before the first step, leave just enough positions of a block for all steps.
    GenerateBase,
    /// Texts by the mixture, in the same way.
    Generate,
}

impl Row {
    /// Whether the row generates texts. The others compute whole blocks.
    pub fn generates(self) -> bool {
        matches!(self, Self::Generate | Self::GenerateBase)
    }

    /// Whether the row's steps have a backward pass.
    fn trains(self) -> bool {
        self != Self::Eval && !self.generates()
    }

    /// Whether several processes can share the row: those whose steps are the trainer's.
    pub fn can_be_shared(self) -> bool {
        match self {
            Self::SingleLora
            | Self::SingleLoraWide
            | Self::OnePass
            | Self::OnePassLoop
            | Self::TwoPasses => true,
            Self::Base | Self::NPasses | Self::Eval | Self::GenerateBase | Self::Generate => false,
        }
    }

    /// The config of this row, made from the mixture's.
    ///
    /// # Errors
    /// N passes with more than one router, the loop with products in FP8, and a wide LoRA if single
    /// experts or modules have settings of their own.
    pub fn config(self, mixture: &Config) -> Result<Config> {
        let mut config = mixture.clone();
        let lora = &mut config.lora;
        match self {
            Self::Base | Self::GenerateBase => config.train.routing = RoutingChoice::None,
            Self::SingleLora => {
                lora.num_experts = 1;
                lora.experts.truncate(1);
            }
            Self::SingleLoraWide if !lora.experts.is_empty() || !lora.rank_pattern.is_empty() => {
                bail!("one LoRA of rank E r has no meaning where ranks differ")
            }
            Self::SingleLoraWide => {
                // the scaling stays alpha / rank
                lora.rank *= lora.num_experts;
                lora.alpha *= lora.num_experts as f64;
                lora.num_experts = 1;
            }
            Self::OnePassLoop if mixture.train.base_products == BaseProducts::Fp8 => {
                bail!("one expert after the other is not computed with products in FP8")
            }
            Self::OnePassLoop => lora.dropout_masks = DropoutMasks::PerExpert,
            Self::TwoPasses => config.router.input = RouterInput::BaseHidden,
            Self::NPasses if config.router.scope != RouterScope::Shared => {
                bail!("N passes need one router for all layers: `--routers shared`")
            }
            Self::OnePass | Self::NPasses | Self::Eval | Self::Generate => {}
        }
        Ok(config)
    }

    /// The experts of this row.
    ///
    /// - `config`: the result of [`Row::config`]
    pub fn experts(self, config: &Config, base: &Decoder) -> Result<Vec<ExpertSpec>> {
        match self {
            Self::Base | Self::GenerateBase => Ok(vec![]),
            _ => {
                let num_experts = config.lora.num_experts as usize;
                let routed = (0..num_experts).map(|e| ExpertSpec::of_config(config, e, &base.spec));
                let shared = ExpertSpec::of_shared(&config.lora, &base.spec)?;
                routed.chain(shared.map(Ok)).collect()
            }
        }
    }
}

/// A row's model, ready for its first step.
pub(super) struct Subject {
    row: Row,
    config: Config,
    model: RoutedModel,
    trained: Trained,
    stepper: Stepper,
    /// The next step, in a row that takes the trainer's steps.
    next: Option<NextStep>,
}

/// A step that is ahead of the one whose results are waited for.
enum NextStep {
    /// Its data is laid out.
    Prepared(Prepared),
    /// It is in the device's queue.
    InFlight(StepInFlight),
}

/// The blocks of a step.
#[derive(Debug)]
pub(super) struct StepBlocks {
    /// Those of all processes.
    pub whole: Vec<BlockId>,
    /// Which of them are this process's; all of them in a row that is not shared.
    pub own: Range<usize>,
}

impl StepBlocks {
    fn own(&self) -> &[BlockId] {
        &self.whole[self.own.clone()]
    }
}

impl Subject {
    /// Builds the row's model on a base that is on `device` in the config's dtype. New experts and
    /// routers are drawn with `run.seed`.
    pub fn new(row: Row, config: Config, base: &Decoder, device: Device) -> Result<Self> {
        tch::manual_seed(config.run.seed as i64);
        let specs = row.experts(&config, base)?;
        let router = RouterSpec::of_config(&config);
        let compute = Compute::of_config(&config);
        let mut model = RoutedModel::with_experts(base, &specs, &router, device, compute);
        if row.trains() && config.train.base_products == BaseProducts::Fp8 {
            model.quantise_base()?;
        }
        let trained = match row {
            Row::Base => {
                // what the backward pass reaches last, and small
                let leaf = model.positions_or_zeros(config.data.seq_len).set_requires_grad(true);
                Trained { leaves: vec![leaf], parameters: vec![] }
            }
            _ => model.trained(config.train.routing, None),
        };
        let optimizer = Optimizer::new(&config.optimizer, &trained.parameters);
        let stepper = Stepper::new(optimizer, Capture::of(device), device);
        Ok(Self { row, config, model, trained, stepper, next: None })
    }

    /// Makes the steps a part of those of a world.
    pub fn enter(&mut self, world: &Arc<World>) {
        self.stepper.enter(world);
    }

    /// The row's model.
    pub fn model(&self) -> &RoutedModel {
        &self.model
    }

    /// How long it has taken so far to capture steps as CUDA graphs.
    pub fn capture_time(&self) -> Duration {
        self.stepper.capture_time()
    }

    /// Runs a step on the blocks `now`, and returns the mean loss of their label tokens before the
    /// update, in nats. `next` are the blocks of the next step, which some rows already prepare or
    /// launch while this one runs.
    pub fn step(
        &mut self,
        dataset: &TokenDataset,
        now: &StepBlocks,
        next: Option<&StepBlocks>,
    ) -> Result<f64> {
        let loss = match self.row {
            Row::Base => self.backward_of_base(dataset, now.own()),
            Row::NPasses => self.train_in_passes(dataset, now.own()),
            Row::Eval => self.evaluate(dataset, now.own()),
            _ => return self.train(dataset, now, next),
        };
        ffi::synchronize(self.model.device())?;
        loss
    }

    /// A step as `dylora train` takes it: while the device works, the next one is prepared, and
    /// launched as well if steps are replayed as CUDA graphs.
    fn train(
        &mut self,
        dataset: &TokenDataset,
        now: &StepBlocks,
        next: Option<&StepBlocks>,
    ) -> Result<f64> {
        let pending = match self.next.take() {
            Some(NextStep::InFlight(pending)) => pending,
            Some(NextStep::Prepared(step)) => self.launch(&step)?,
            None => {
                let step = self.prepare(dataset, now);
                self.launch(&step)?
            }
        };
        if let Some(next) = next {
            let step = self.prepare(dataset, next);
            self.next = Some(match pending.is_replay() {
                true => NextStep::InFlight(self.launch(&step)?),
                false => NextStep::Prepared(step),
            });
        }
        Ok(self.stepper.wait(pending)?.loss)
    }

    fn launch(&mut self, step: &Prepared) -> Result<StepInFlight> {
        let Self { config, model, trained, stepper, .. } = self;
        let update = stepper.optimizer.scalars(&|_| 1.0);
        stepper.launch(model, trained, config, step, &update)
    }

    fn prepare(&mut self, dataset: &TokenDataset, blocks: &StepBlocks) -> Prepared {
        let batches = self.batches(dataset, blocks.own());
        let Self { config, model, stepper, .. } = self;
        let counts = StepCounts::new(config, dataset, &blocks.whole);
        let step = stepper.prepare(model, config, &batches, None, dataset.domains.len());
        step.part_of(counts)
    }

    /// A step without an update, because there is nothing to train.
    fn backward_of_base(&self, dataset: &TokenDataset, blocks: &[BlockId]) -> Result<f64> {
        let batches = self.batches(dataset, blocks);
        let label_tokens = label_tokens(&batches);
        let mut grads = GradientSum::default();
        let mut sum = 0.0;
        for batch in &batches {
            let (loss, token_losses) = self.loss(batch, Some(1.0 / label_tokens));
            grads.add(&loss, &self.trained)?;
            sum += token_losses.sum(Kind::Double).double_value(&[]);
        }
        Ok(sum / label_tokens)
    }

    /// A step with N passes for each micro-batch. The update is as in [`Self::train`].
    fn train_in_passes(&mut self, dataset: &TokenDataset, blocks: &[BlockId]) -> Result<f64> {
        let batches = self.batches(dataset, blocks);
        let label_tokens = label_tokens(&batches);
        let mut grads = GradientSum::default();
        let mut sum = 0.0;
        for batch in &batches {
            let inputs = Inputs::of_batch(batch, false, self.model.device());
            let loss = passes::summed_loss(&self.model, &inputs, self.training_mode())?;
            grads.add(&(&loss / label_tokens), &self.trained)?;
            sum += loss.double_value(&[]);
        }
        let grads = grads.of_parameters(&self.trained);
        let optimizer = &mut self.stepper.optimizer;
        let norm = optimizer.clip(&grads)?;
        let scalars =
            Tensor::from_slice(&optimizer.scalars(&|_| 1.0)).to_device(self.model.device());
        optimizer.update(&grads, &scalars, &norm.isfinite().logical_not())?;
        optimizer.count_update();
        Ok(sum / label_tokens)
    }

    /// A step that computes the loss alone.
    fn evaluate(&self, dataset: &TokenDataset, blocks: &[BlockId]) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let batches = self.batches(dataset, blocks);
        let mut sum = 0.0;
        for batch in &batches {
            sum += self.loss(batch, None).1.sum(Kind::Double).double_value(&[]);
        }
        Ok(sum / label_tokens(&batches))
    }

    /// The summed loss of a batch times `scale`, and the loss of each label token. Without a scale
    /// there are no gradients.
    fn loss(&self, batch: &Batch, scale: Option<f64>) -> (Tensor, Tensor) {
        let source = RoutingSource::from(self.config.train.routing);
        let inputs = Inputs::of_batch(batch, source.reads_records(), self.model.device());
        let settings = LossSettings {
            chunk_tokens: self.config.train.loss_chunk_tokens,
            label_smoothing: 0.0,
            scale: Tensor::from(scale.unwrap_or(1.0)).to_device(self.model.device()),
            with_grad: scale.is_some(),
        };
        let mode = if scale.is_some() { self.training_mode() } else { ForwardMode::EVAL };
        let (loss, _) = self.model.loss(&inputs, &source, mode, settings);
        (loss.loss, loss.token_losses)
    }

    fn training_mode(&self) -> ForwardMode {
        let lora = &self.config.lora;
        let dropout = LoraDropout { probability: lora.dropout, masks: lora.dropout_masks };
        let detaches_routers = self.config.router.detach_input;
        let base_products = self.config.train.base_products;
        ForwardMode { dropout, detaches_routers, base_products, ..ForwardMode::EVAL }
    }

    fn batches(&self, dataset: &TokenDataset, blocks: &[BlockId]) -> Vec<Batch> {
        let micro_batches = blocks.chunks(self.config.train.micro_batch_size);
        micro_batches.map(|blocks| dataset.batch(blocks)).collect()
    }
}

fn label_tokens(batches: &[Batch]) -> f64 {
    batches.iter().map(Batch::label_tokens).sum::<u64>() as f64
}
