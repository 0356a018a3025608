//! Makes the demo's data: four small domains, the general corpus for its base and a tokenizer.
//!
//! `cargo run --release --example make_demo_data -- --out demo --corpus FOLDER` writes
//!
//! | file                                       | content                                        |
//! |--------------------------------------------|------------------------------------------------|
//! | `OUT/data/DOMAIN.{train,validation}.jsonl` | the domains, for the experts                   |
//! | `OUT/base/tokenizer.json`                  | a byte-level BPE                               |
//! | `CORPUS/general.{train,validation}.jsonl`  | the corpus for the base, not in the repository |
//!
//! The same seed gives the same bytes. All texts are invented: they come from the grammars in
//! `grammars/`, and from code where numbers must be computed.

mod arithmetic;
mod code;
mod data2text;
mod general;
mod grammar;
mod record;
mod tokenizer;
mod verse;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use general::General;
use record::{Body, Record, distinct_records, write_jsonl};

/// Makes the data of the embedded demo.
#[derive(Debug, Parser)]
struct Args {
    /// Folder of the demo, which gets `data/` and `base/tokenizer.json`.
    #[arg(long)]
    out: PathBuf,
    /// Folder for the general corpus, which only training the base needs.
    #[arg(long)]
    corpus: PathBuf,
    /// Seed of all random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of training records of each domain.
    #[arg(long, default_value_t = 500)]
    num_train: usize,
    /// Number of validation records of each domain.
    #[arg(long, default_value_t = 80)]
    num_validation: usize,
    /// Number of documents of the general corpus; one in fifty is for validation.
    #[arg(long, default_value_t = 9000)]
    num_general: usize,
    /// Number of tokens in the vocabulary.
    #[arg(long, default_value_t = 2048)]
    vocab_size: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let data_dir = args.out.join("data");
    let base_dir = args.out.join("base");
    for dir in [&data_dir, &base_dir, &args.corpus] {
        fs_err::create_dir_all(dir)?;
    }

    let mut training = Vec::new();
    for domain in all_domains(&args)? {
        let (train, validation) = domain.split_at(args.num_train);
        for (split, records) in [("train", train), ("validation", validation)] {
            let path = data_dir.join(format!("{}.{split}.jsonl", records[0].domain));
            println!("{}: {} bytes", path.display(), write_jsonl(&path, records)?);
        }
        training.extend_from_slice(train);
    }

    let general = General::new(training.iter());
    let mut rng = stream(args.seed, "general");
    let corpus =
        distinct_records("general", args.num_general, &mut rng, |rng| general.generate(rng))?;
    let (validation, train) = corpus.split_at(args.num_general / 50);
    for (split, records) in [("train", train), ("validation", validation)] {
        let path = args.corpus.join(format!("general.{split}.jsonl"));
        println!("{}: {} bytes", path.display(), write_jsonl(&path, records)?);
    }

    let texts: Vec<String> =
        train.iter().chain(&training).map(|record| record.body.full_text()).collect();
    let path = base_dir.join("tokenizer.json");
    let json = tokenizer::train_tokenizer(&texts, args.vocab_size)?;
    fs_err::write(&path, &json)?;
    println!("{}: {} bytes", path.display(), json.len());
    Ok(())
}

/// The records of each domain.
fn all_domains(args: &Args) -> Result<[Vec<Record>; 4]> {
    let (problems, houses, scenes) =
        (arithmetic::grammar(), data2text::grammar(), verse::grammar());
    let records = |domain: &str, generate: &dyn Fn(&mut ChaCha8Rng) -> Body| {
        let mut rng = stream(args.seed, domain);
        distinct_records(domain, args.num_train + args.num_validation, &mut rng, generate)
    };
    Ok([
        records("arithmetic", &|rng| arithmetic::generate(&problems, rng))?,
        records("code", &code::generate)?,
        records("data2text", &|rng| data2text::generate(&houses, rng))?,
        records("verse", &|rng| verse::generate(&scenes, rng))?,
    ])
}

/// The random numbers of one part of the data. Each part has its own, so that a change of one part
/// does not change the others.
fn stream(seed: u64, part: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(part.bytes().fold(0, |hash, byte| hash * 31 + u64::from(byte)));
    rng
}
