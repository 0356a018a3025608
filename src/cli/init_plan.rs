//! What `dylora init` writes: values that suit a base and the size of its data, with comments that
//! say why. The values are those of `configs/`, whose learning rates were measured.

use std::path::{Component, Path, PathBuf};

use super::table::count;
use crate::config::{BaseSource, Dtype, FieldNames};

/// The blocks of a step, up to a number of training blocks.
const BATCHES: [(u64, usize); 3] = [(160, 4), (2_000, 8), (20_000, 16)];
/// The blocks of a step for more training blocks.
const LARGEST_BATCH: usize = 32;
/// The passes over the data, and the least number of steps, in which a mixture learns enough.
const EPOCHS: u64 = 3;
const LEAST_STEPS: u64 = 100;
/// From this number of training blocks on, one pass is enough.
const MANY_BLOCKS: u64 = 200_000;
/// The learning rates of experts and router, up to a number of parameters of the base: those of
/// `moe.toml`, `smollm2-135m.toml`, and `llama-3.2-1b.toml` and `qwen3-0.6b.toml`.
const RATES: [(i64, [f64; 2]); 3] =
    [(20_000_000, [5e-3, 5e-3]), (250_000_000, [1.5e-3, 1e-3]), (2_000_000_000, [5e-4, 5e-4])];
/// The rates of larger bases, for which none were measured.
const LARGE_RATES: [f64; 2] = [2e-4, 2e-4];
/// Numbers of steps between evaluations, and how many evaluations a run has at least.
const EVALUATIONS: [u64; 10] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
const NUM_EVALUATIONS: u64 = 5;
/// Most steps upwards that a relative path has.
const MAX_UP: usize = 4;

/// The values of a config.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The base; a folder is absolute.
    pub base: BaseSource,
    /// Number of the base's parameters.
    pub parameters: i64,
    pub dtype: Dtype,
    pub seq_len: usize,
    /// The share of the documents that a block holds whole.
    pub whole_share: f64,
    pub domains: Vec<PlanDomain>,
    pub run_dir: String,
    pub schedule: Schedule,
    pub gradient_checkpointing: bool,
}

/// A domain and its data.
#[derive(Debug, Clone)]
pub struct PlanDomain {
    pub name: String,
    /// Absolute paths or globs of its training files.
    pub train: Vec<PathBuf>,
    /// The names of the records' keys, unless they are the usual ones.
    pub fields: FieldNames,
    pub validation: PlanValidation,
    /// Number of records in its training files, which may be an estimate.
    pub records: u64,
}

/// What is held out.
#[derive(Debug, Clone, PartialEq)]
pub enum PlanValidation {
    /// Files of their own, absolute.
    Files(Vec<PathBuf>),
    /// A share of the training files.
    Fraction(f64),
}

/// How long to train, and in which steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Number of training blocks.
    pub blocks: u64,
    /// Passes over the data; `None` if there is too little of it, so that `steps` decides.
    pub epochs: Option<u64>,
    pub steps: u64,
    pub micro_batch_size: usize,
    pub grad_accum_steps: usize,
    pub eval_every_steps: u64,
}

impl Schedule {
    /// The schedule for a number of training blocks.
    pub fn new(blocks: u64) -> Self {
        let fits = |(most, _): &&(u64, usize)| blocks <= *most;
        let batch = BATCHES.iter().find(fits).map_or(LARGEST_BATCH, |(_, batch)| *batch);
        let epochs = if blocks >= MANY_BLOCKS { 1 } else { EPOCHS };
        let by_epochs = (epochs * blocks).div_ceil(batch as u64);
        let steps = by_epochs.max(LEAST_STEPS);
        let is_due = |every: &&u64| **every * NUM_EVALUATIONS <= steps;
        Self {
            blocks,
            epochs: (by_epochs >= LEAST_STEPS).then_some(epochs),
            steps,
            micro_batch_size: batch,
            grad_accum_steps: 1,
            eval_every_steps: *EVALUATIONS.iter().rev().find(is_due).unwrap_or(&1),
        }
    }

    /// The same steps, of micro-batches of half the size; `None` if they have one block already.
    pub fn halved(self) -> Option<Self> {
        let (micro_batch_size, grad_accum_steps) =
            (self.micro_batch_size / 2, self.grad_accum_steps * 2);
        (micro_batch_size > 0).then_some(Self { micro_batch_size, grad_accum_steps, ..self })
    }

    fn batch(self) -> usize {
        self.micro_batch_size * self.grad_accum_steps
    }
}

/// The share of the documents to hold out of `records`: a tenth, but at least five records of few
/// ones and about a thousand of many ones.
pub fn validation_fraction(records: u64) -> f64 {
    let records = records.max(1) as f64;
    let share = (1000.0 / records).min(0.1).max(5.0 / records).clamp(0.01, 0.3);
    (share * 100.0).round() / 100.0
}

impl Plan {
    /// The learning rates of the experts and the router.
    fn rates(&self) -> [f64; 2] {
        let fits = |(most, _): &&(i64, [f64; 2])| self.parameters <= *most;
        RATES.iter().find(fits).map_or(LARGE_RATES, |(_, rates)| *rates)
    }

    /// The config in TOML, with paths relative to `folder`, or absolute ones if there is none.
    ///
    /// - `file`: what the commands in its comments call the file
    pub fn text(&self, file: &str, folder: Option<&Path>) -> String {
        let parts = [
            self.heading(file),
            self.run_and_base(folder),
            self.data(folder),
            self.lora(),
            self.train(),
            self.optimizer(),
        ];
        parts.join("\n")
    }

    fn heading(&self, file: &str) -> String {
        let what = match self.domains.len() {
            1 => "A single LoRA on one domain".to_owned(),
            count => format!("A mixture of {count} LoRA experts, one for each domain"),
        };
        let run_dir = &self.run_dir;
        format!(
            "# {what}, written by `dylora init`.\n\
             #\n\
             #     dylora train --config {file} --dry-run\n\
             #     dylora train --config {file}\n\
             #     dylora eval --checkpoint {run_dir}\n\
             #\n\
             # Paths of the base and the data begin at the folder of this file, and `run.dir`\n\
             # where a command is started. Every other key has a default.\n"
        )
    }

    fn run_and_base(&self, folder: Option<&Path>) -> String {
        let source = match &self.base {
            BaseSource::Path(path) => format!("{{ path = {} }}", quoted(&shown(path, folder))),
            BaseSource::Hub(hub) if hub.revision == "main" => {
                format!("{{ hub = {{ repo = {} }} }}", quoted(&hub.repo))
            }
            BaseSource::Hub(hub) => {
                let (repo, revision) = (quoted(&hub.repo), quoted(&hub.revision));
                format!("{{ hub = {{ repo = {repo}, revision = {revision} }} }}")
            }
            BaseSource::Random(_) => unreachable!("`dylora init` names no random base"),
        };
        let dtype = match self.dtype {
            Dtype::Bf16 => "dtype = \"bf16\"  # half the memory of \"f32\", which a CPU needs",
            Dtype::F32 => "dtype = \"f32\"  # on a GPU, \"bf16\"",
        };
        format!(
            "[run]\ndir = {}  # checkpoints and metrics\nseed = 0\n\n\
             [base]  # {} parameters\nsource = {source}\n{dtype}\n",
            quoted(&self.run_dir),
            count(self.parameters.unsigned_abs()),
        )
    }

    fn data(&self, folder: Option<&Path>) -> String {
        let whole = match self.whole_share {
            1.0 => "holds each document whole".to_owned(),
            share => {
                format!(
                    "holds {} % of the documents whole; others are split",
                    (share * 100.0) as u8
                )
            }
        };
        let mut text = format!("[data]\nseq_len = {}  # {whole}\n", self.seq_len);
        let list = |paths: &[PathBuf]| -> String {
            let paths: Vec<String> =
                paths.iter().map(|path| quoted(&shown(path, folder))).collect();
            paths.join(", ")
        };
        for domain in &self.domains {
            let validation = match &domain.validation {
                PlanValidation::Files(files) => format!("files = [{}]", list(files)),
                PlanValidation::Fraction(fraction) => format!("fraction = {fraction}"),
            };
            text += &format!(
                "\n[[data.domains]]\nname = {}  # {} records\ntrain = [{}]\n{}validation = {{ \
                 {validation} }}\n",
                quoted(&domain.name),
                count(domain.records),
                list(&domain.train),
                fields(&domain.fields),
            );
        }
        text
    }

    fn lora(&self) -> String {
        let (why, num_experts) = match self.domains.len() {
            1 => (
                "# One domain needs no router, so this is a single LoRA. A mixture is for several \
                 domains: name\n\
                 # them by `dylora init --data law=law.jsonl code=code.jsonl`, or add one later by \
                 `dylora\n\
                 # add-expert`.\n",
                "num_experts = 1".to_owned(),
            ),
            count => (
                "",
                format!(
                    "num_experts = {count}  # one for each domain; domains supervise the router"
                ),
            ),
        };
        let (rank, alpha) = if self.domains.len() == 1 { (16, 32) } else { (8, 16) };
        format!(
            "[lora]\n{why}{num_experts}\n\
             rank = {rank}  # twice as much learns more, and overfits sooner\n\
             alpha = {alpha}.0  # an expert's update is scaled by alpha / rank\n\
             target_modules = \"all-linear\"\n"
        )
    }

    fn train(&self) -> String {
        let Schedule { blocks, epochs, steps, eval_every_steps, .. } = self.schedule;
        let (micro, accum) = (self.schedule.micro_batch_size, self.schedule.grad_accum_steps);
        let batch = self.schedule.batch();
        let duration = match epochs {
            Some(epochs) => {
                format!(
                    "{{ epochs = {epochs} }}  # {} blocks: {} steps",
                    count(blocks),
                    count(steps)
                )
            }
            None => {
                let passes = steps * batch as u64 / blocks.max(1);
                format!(
                    "{{ steps = {steps} }}  # {} blocks, each about {passes} times",
                    count(blocks)
                )
            }
        };
        let mut text = format!(
            "[train]\nduration = {duration}\n\
             micro_batch_size = {micro}  # blocks in a forward pass\n\
             grad_accum_steps = {accum}  # {batch} blocks in a step\n\
             eval_every_steps = {eval_every_steps}  # the lowest validation loss is kept as \
             `best`\n"
        );
        if self.gradient_checkpointing {
            text += "gradient_checkpointing = true  # less memory, and steps take a third longer\n";
        }
        text
    }

    fn optimizer(&self) -> String {
        let [adapters, router] = self.rates().map(|rate| format!("{rate:e}"));
        let router = match self.domains.len() {
            1 => String::new(),
            _ => format!("router = {{ learning_rate = {router} }}\n"),
        };
        format!(
            "[optimizer]\nadapters = {{ learning_rate = {adapters} }}  # try half and twice as \
             much\n{router}"
        )
    }
}

/// A string of TOML.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A path as the config names it.
fn shown(path: &Path, folder: Option<&Path>) -> String {
    let relative = folder.and_then(|folder| relative(path, folder));
    relative.unwrap_or_else(|| path.to_owned()).display().to_string()
}

/// An absolute path relative to a folder; `None` if they have little in common.
fn relative(path: &Path, folder: &Path) -> Option<PathBuf> {
    let (path, folder): (Vec<Component>, Vec<Component>) =
        (path.components().collect(), folder.components().collect());
    let common = path.iter().zip(&folder).take_while(|(a, b)| a == b).count();
    let up = folder.len() - common;
    let has_much = common > 1 && up <= MAX_UP;
    let up = std::iter::repeat_n(Component::ParentDir, up);
    has_much.then(|| up.chain(path[common..].iter().copied()).collect())
}

/// The line that names the keys of records, if they are not the usual ones.
fn fields(names: &FieldNames) -> String {
    let names = toml::Table::try_from(names).expect("names are texts");
    let names: Vec<String> = names.iter().map(|(key, name)| format!("{key} = {name}")).collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("fields = {{ {} }}  # the columns\n", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, HubSource};

    fn domain(name: &str, records: u64) -> PlanDomain {
        PlanDomain {
            name: name.into(),
            train: vec![format!("/here/data/{name}.jsonl").into()],
            fields: FieldNames::default(),
            validation: PlanValidation::Fraction(validation_fraction(records)),
            records,
        }
    }

    fn plan(domains: Vec<PlanDomain>, blocks: u64) -> Plan {
        Plan {
            base: BaseSource::Hub(HubSource {
                repo: "HuggingFaceTB/SmolLM2-135M-Instruct".into(),
                revision: "main".into(),
            }),
            parameters: 134_515_008,
            dtype: Dtype::F32,
            seq_len: 512,
            whole_share: 0.987,
            domains,
            run_dir: "runs/dylora".into(),
            schedule: Schedule::new(blocks),
            gradient_checkpointing: false,
        }
    }

    /// The text of a plan, which is checked to be a config.
    fn text(plan: &Plan) -> String {
        let text = plan.text("dylora.toml", Some(Path::new("/here")));
        config::load::resolve(&text, &[]).expect("it is a config");
        assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
        text
    }

    #[test]
    fn one_domain_gets_a_single_lora() {
        insta::assert_snapshot!("one_domain", text(&plan(vec![domain("law", 240)], 40)));
    }

    #[test]
    fn two_small_domains_get_a_mixture_for_a_number_of_steps() {
        let mut plan = plan(vec![domain("law", 30), domain("code", 30)], 12);
        plan.base = BaseSource::Path("/here/bases/tiny".into());
        plan.parameters = 1_088_256;
        insta::assert_snapshot!("two_domains", text(&plan));
    }

    #[test]
    fn four_large_domains_get_a_mixture_for_some_epochs() {
        let names = ["law", "code", "verse", "chats"];
        let mut plan = plan(names.map(|name| domain(name, 20_000)).to_vec(), 30_000);
        plan.parameters = 1_235_814_400;
        plan.dtype = Dtype::Bf16;
        plan.domains[3].train = vec!["/elsewhere/a.jsonl".into(), "/elsewhere/b/*.jsonl".into()];
        plan.domains[2].validation =
            PlanValidation::Files(vec!["/here/data/verse.validation.jsonl".into()]);
        plan.schedule = plan.schedule.halved().and_then(Schedule::halved).expect("32 blocks");
        plan.gradient_checkpointing = true;
        insta::assert_snapshot!("four_domains", text(&plan));
    }

    #[test]
    fn little_data_lasts_for_a_number_of_steps_and_much_data_for_one_epoch() {
        let tiny = Schedule::new(10);
        assert_eq!((tiny.epochs, tiny.steps, tiny.micro_batch_size), (None, 100, 4));
        assert_eq!(tiny.eval_every_steps, 20);
        let usual = Schedule::new(1_000);
        assert_eq!((usual.epochs, usual.steps, usual.micro_batch_size), (Some(3), 375, 8));
        let huge = Schedule::new(1_000_000);
        assert_eq!((huge.epochs, huge.steps, huge.eval_every_steps), (Some(1), 31_250, 1000));
        let mut halves = std::iter::successors(Some(usual), |schedule| schedule.halved());
        assert!(halves.all(|half| half.batch() == 8));
        assert_eq!(Schedule { micro_batch_size: 1, ..usual }.halved(), None);
    }

    #[test]
    fn enough_records_are_held_out_of_few_and_not_too_many_of_many() {
        let fractions = [3, 30, 100, 5_000, 50_000, 10_000_000].map(validation_fraction);
        assert_eq!(fractions, [0.3, 0.17, 0.1, 0.1, 0.02, 0.01]);
    }

    #[test]
    fn paths_are_relative_where_they_have_something_in_common() {
        let from = |path: &str, folder: &str| relative(Path::new(path), Path::new(folder));
        assert_eq!(from("/here/data/a.jsonl", "/here"), Some("data/a.jsonl".into()));
        assert_eq!(from("/here/data/a.jsonl", "/here/conf"), Some("../data/a.jsonl".into()));
        assert_eq!(from("/data/a.jsonl", "/here"), None);
        assert_eq!(from("/w/a.jsonl", "/w/1/2/3/4/5"), None);
    }
}
