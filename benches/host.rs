//! Times the work of a training step on the host apart from the model: the batch and the metrics.
//!
//! ```text
//! cargo bench --bench host
//! ```
//!
//! The batch is 32 blocks of 1024 tokens from a token cache that is mapped into memory. Its
//! documents are either long, so that a block holds a single one, or short (some 100 words) and
//! packed. The metrics are those of 4 experts on 4 domains, with one site or with 48 (one for each
//! target module of 12 blocks). Each line shows the median and the largest wall-clock time of 100
//! runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use dylora::checkpoint::Position;
use dylora::checkpoint::routing_state::RoutingState;
use dylora::config::{LossOn, Mixing, OnBadRecord, OnExhausted, load};
use dylora::data::{
    ChatOptions, DataOptions, DomainFiles, MemoryDocument, MemoryDomain, TokenDataset, Tokenizer,
    load_files,
};
use dylora::eval::RoutingReport;
use dylora::eval::routing::{RouterLosses, SiteTotals};
use dylora::ffi;
use dylora::train::files::MetricsWriter;
use dylora::train::metrics::{Metrics, StepMetrics};
use dylora::train::plan::BlockStream;
use tch::Device;

const NUM_BLOCKS: usize = 32;
const SEQ_LEN: usize = 1024;
const NUM_EXPERTS: usize = 4;
const NUM_DOMAINS: usize = 4;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = load::parse(
        "[base]\nsource = { path = \"none\" }\n[data]\nseq_len = 1024\n[[data.domains]]\n\
         name = \"text\"\ntrain = [\"none\"]\n[train]\nduration = { steps = 1 }\n",
        &[],
    )?;
    println!("{:<52} {:>10} {:>10}", "", "median, us", "max, us");
    for (name, num_documents, num_words) in [("long", 100, 12_000), ("packed short", 12_000, 100)] {
        let dataset = dataset(folder.path(), num_documents, num_words)?;
        let mut stream = BlockStream::new(&dataset, &config, Position::default());
        row(&format!("32 x 1024 tokens of {name} documents"), || {
            let blocks = stream.take(&dataset, NUM_BLOCKS);
            black_box(dataset.batch(&blocks));
        });
    }
    let document = MemoryDocument { tokens: vec![0, 1], prompt_len: 0, expert: None };
    let documents = vec![document; 1_000_000];
    let domain = MemoryDomain { name: "text".into(), weight: 1.0, documents };
    let million = TokenDataset::in_memory(1, LossOn::All, vec![domain]);
    row("order of an epoch of 1,000,000 blocks", || drop(black_box(million.epoch_order(0, 1))));
    for (tensorboard, name) in [(false, "metrics.jsonl"), (true, "metrics.jsonl and TensorBoard")] {
        let mut writer = MetricsWriter::open(&folder.path().join(name), tensorboard, 0)?;
        row(&format!("a line of {name}"), || {
            writer.write(&Metrics::Train(metrics())).expect("the folder is writable");
        });
    }
    row("peak memory of the process", || {
        black_box(ffi::peak_memory_bytes(Device::Cpu).expect("/proc is there"));
    });
    for num_sites in [1, 48] {
        let totals = totals(num_sites);
        let mut state = RoutingState::default();
        row(&format!("note and report of {num_sites} router(s)"), || {
            state.note(&config.router, 1, &totals, None);
            black_box(RouterLosses::new(&totals));
            black_box(RoutingReport::new(&totals, None, config.router.dead_share));
        });
    }
    Ok(())
}

fn row(name: &str, mut run: impl FnMut()) {
    let mut times: Vec<Duration> = (0..110)
        .map(|_| {
            let started = Instant::now();
            run();
            started.elapsed()
        })
        .skip(10)
        .collect();
    times.sort_unstable();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{name:<52} {:>10.1} {:>10.1}",
        micros(times[times.len() / 2]),
        micros(times[times.len() - 1])
    );
}

/// A dataset of `num_documents` documents of `num_words` words, read back from its token cache.
fn dataset(folder: &Path, num_documents: usize, num_words: usize) -> Result<TokenDataset> {
    let file = folder.join(format!("{num_words}.jsonl"));
    let mut lines = String::new();
    for document in 0..num_documents {
        let words = (0..num_words).map(|word| format!("the{}", (document * 31 + word * 7) % 97));
        let text = words.collect::<Vec<_>>().join(" ");
        writeln!(lines, "{}", serde_json::json!({ "text": text }))?;
    }
    fs_err::write(&file, lines)?;
    let tokenizer = Tokenizer::load(Path::new("demo/base/tokenizer.json"))?;
    let options = DataOptions {
        seq_len: SEQ_LEN,
        loss_on: LossOn::All,
        chat: ChatOptions::default(),
        on_bad_record: OnBadRecord::Fail,
        seed: 0,
        eos_token_id: Some(0),
        mixing: Mixing::default(),
        on_exhausted: OnExhausted::default(),
        cache_dir: Some(folder.join("tokens")),
    };
    let files = vec![file.display().to_string()];
    let files = DomainFiles { name: Some("text".into()), files, ..DomainFiles::default() };
    load_files(&[files], &options, &tokenizer, &|_| ())
}

fn metrics() -> StepMetrics {
    let names = (0..NUM_DOMAINS).map(|domain| format!("domain {domain}"));
    StepMetrics {
        step: 1,
        epoch: 0.123_456_789,
        tokens_seen: 1 << 20,
        loss: 3.123_456_789,
        domain_losses: names.map(|name| (name, 3.987_654_321)).collect(),
        load_balancing_loss: Some(1.012_345_678),
        uniform_mse: Some(0.012_345_678),
        router_z_loss: Some(1.234_567_891),
        routing_entropy: Some(1.345_678_912),
        domain_supervision: None,
        domain_accuracy: BTreeMap::new(),
        orthogonality: None,
        expert_load: Some(vec![1.0 / NUM_EXPERTS as f64; NUM_EXPERTS]),
        mature_experts: None,
        temperature: Some(1.0),
        grad_norm: 0.789_123_456,
        learning_rates: [("adapters".into(), 1e-4), ("router".into(), 1e-3)].into(),
        label_tokens: 32_768,
        step_secs: 0.053_217_891,
        host_secs: 0.000_217_891,
        tokens_per_sec: 612_345.678_9,
        peak_memory_bytes: 9 << 30,
    }
}

fn totals(num_sites: usize) -> Vec<SiteTotals> {
    let site = |site: usize| SiteTotals {
        site: format!("h.{}.mlp.c_proj", site / 4),
        experts: (0..NUM_EXPERTS).collect(),
        tokens: vec![8192.0; NUM_DOMAINS],
        probs: vec![8192.0; NUM_EXPERTS],
        weights: vec![vec![2048.0; NUM_EXPERTS]; NUM_DOMAINS],
        assignments: vec![vec![2048.0; NUM_EXPERTS]; NUM_DOMAINS],
        entropy: vec![8192.0; NUM_DOMAINS],
        squared_lse: 32_768.0,
    };
    (0..num_sites).map(site).collect()
}
