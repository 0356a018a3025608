//! What `dylora data preview` shows.

use std::process::Command;

use anyhow::Result;
use dylora::config::{DomainConfig, RecordConfig, Validation};
use dylora::data::{Datasets, Lengths, load_datasets};
use serde_json::Value;

use crate::{EOS, Files, fields, golden, load, options, tokenizer};

/// Documents of these lengths in tokens, the end token included.
fn texts(lengths: &[usize]) -> String {
    let line = |(number, len): (usize, &usize)| {
        // a digit is one token
        let digits: String =
            (0..len - 1).map(|i| char::from(b'0' + ((i + number) % 10) as u8)).collect();
        format!("{{\"text\": \"{digits}\"}}\n")
    };
    lengths.iter().enumerate().map(line).collect()
}

#[test]
fn lengths_are_those_of_the_nearest_rank() -> Result<()> {
    let lengths: Vec<usize> = (2..=21).collect();
    let files = Files::new(&[("a.jsonl", texts(&lengths).as_bytes())]);
    let options = dylora::data::DataOptions { seq_len: 18, ..options() };
    let dataset = crate::load_with(&files.path("a.jsonl"), &RecordConfig::default(), &options)?;
    let wanted = Lengths { min: 2, median: 11, p95: 20, max: 21, num_split: 2 };
    assert_eq!(dataset.lengths(0), Some(wanted));
    assert_eq!(dataset.domains[0].counts.split_documents, 2);
    Ok(())
}

#[test]
fn examples_have_the_text_of_their_documents_with_the_learned_tokens() -> Result<()> {
    let lines = concat!(
        "{\"prompt\": \"naïve 人\", \"completion\": \" yes\"}\n",
        "{\"text\": \"all of it\"}\n",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"A?\"}, ",
        "{\"role\": \"assistant\", \"content\": \"B.\"}]}\n"
    );
    let files = Files::new(&[("a.jsonl", lines.as_bytes())]);
    let dataset = load(&files.path("a.jsonl"), &RecordConfig::default())?;
    let examples = dataset.examples(0, 9, &tokenizer())?;
    let parts = |example: usize| -> Vec<(&str, bool)> {
        let parts = examples[example].parts.iter();
        parts.map(|part| (part.text.as_str(), part.is_learned)).collect()
    };
    assert_eq!(parts(0), [("naïve 人", false), (&*format!(" yes{EOS}"), true)]);
    // the first token of a text has nothing in front that could predict it
    assert_eq!(
        parts(1).iter().map(|(text, _)| *text).collect::<String>(),
        format!("all of it{EOS}")
    );
    assert!(!parts(1)[0].1 && parts(1)[1].1 && parts(1).len() == 2);
    assert_eq!(parts(2).last(), Some(&("B.<|im_end|>\n", true)));
    for example in &examples {
        let learned = example.parts.iter().filter(|part| part.is_learned);
        let learned: String = learned.map(|part| part.text.as_str()).collect();
        assert_eq!(tokenizer().encode(&learned)?.len(), example.num_labels);
    }
    Ok(())
}

#[test]
fn duplicates_and_leaks_are_counted() -> Result<()> {
    let files = Files::new(&[
        ("a.csv", b"text\none\ntwo\none\none\nthree\n"),
        ("b.txt", b"two"),
        ("v.tsv", b"text\nthree\nfour\n"),
    ]);
    let path = |name: &str| files.path(name).display().to_string();
    let validation = Some(Validation::Files(vec![path("v.tsv")]));
    let domain = |name: &str, train: &str, validation| DomainConfig {
        name: name.into(),
        train: vec![path(train)],
        validation,
        ..DomainConfig::default()
    };
    let domains = [domain("a", "a.csv", validation), domain("b", "b.txt", None)];
    let Datasets { train, validation } =
        load_datasets(&domains, &options(), &tokenizer(), &|_| ())?;
    assert_eq!((train.num_duplicates(0), train.num_shared(0)), (2, 1));
    assert_eq!((train.num_duplicates(1), train.num_shared(1)), (0, 1));
    assert_eq!(train.domains[0].counts.skipped_held_out, 1);
    let kinds = |kinds: &[dylora::data::RecordKind]| {
        kinds.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&train.domains[0].kinds), ["5 records of `text` (csv)"]);
    assert_eq!(kinds(&train.domains[1].kinds), ["1 plain text"]);
    assert_eq!(kinds(&validation.domains[0].kinds), ["2 records of `text` (tsv)"]);
    Ok(())
}

#[test]
fn records_of_a_kind_are_counted_together_and_from_the_cache() -> Result<()> {
    let files = Files::new(&[]);
    let options = dylora::data::DataOptions { cache_dir: Some(files.path("cache")), ..options() };
    let path = golden("data/pairs.*.parquet");
    for _ in 0..2 {
        let dataset = crate::load_with(&path, &fields("completion=completion"), &options)?;
        let kinds: Vec<String> = dataset.domains[0].kinds.iter().map(ToString::to_string).collect();
        assert_eq!(kinds, ["192 records of `prompt`/`completion` (parquet)"]);
    }
    Ok(())
}

/// A data set in the Hub's cache, and a config that names it.
#[test]
fn the_command_shows_a_data_set_of_the_hub() -> Result<()> {
    let files = Files::new(&[]);
    let repo = files.path("hub/datasets--org--sums");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let folder = repo.join("snapshots").join(commit).join("main");
    fs_err::create_dir_all(&folder)?;
    fs_err::create_dir_all(repo.join("refs"))?;
    fs_err::write(repo.join("refs/main"), commit)?;
    let name = "train-00000-of-00001.parquet";
    fs_err::copy(golden("data/pairs.snappy.parquet"), folder.join(name))?;
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/base");
    let config = format!(
        "base.source = {{ path = \"{base}\" }}\ndata.seq_len = 64\n[[data.domains]]\n\
         name = \"sums\"\nhub = {{ dataset = \"org/sums\", config = \"main\" }}\n\
         validation = {{ fraction = 0.2 }}\n"
    );
    fs_err::write(files.path("a.toml"), config)?;
    let preview = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.args(["data", "preview", "--config"]).arg(files.path("a.toml")).args(options);
        command.env("HF_HUB_CACHE", files.path("hub")).env("HF_HUB_OFFLINE", "1");
        command.env("DYLORA_CACHE", files.path("cache"));
        let output = command.output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(output)
    };
    let json = preview(&["--json", "--examples", "1"])?;
    let json: Value = serde_json::from_slice(&json.stdout)?;
    let domain = &json["domains"][0];
    assert_eq!(domain["train"]["kinds"][0]["num_records"], 48);
    let records = |part: &str| domain[part]["counts"]["records"].as_u64().expect("a number");
    assert_eq!(records("train") + records("validation"), 48);
    assert_eq!(domain["leaks"], 0);
    assert_eq!(domain["examples"].as_array().map(Vec::len), Some(1));
    let output = preview(&["--set", "data.seq_len=32"])?;
    let text = String::from_utf8(output.stdout)?;
    let start = "sums: 48 records of `prompt`/`completion` (parquet), training\n";
    assert!(text.starts_with(start), "{text}");
    assert!(text.contains("sums: a completion follows its prompt without a space"), "{text}");
    // not a terminal, so that what is learned stands in brackets
    assert!(text.contains("What is 2 + 2?⟦4<|endoftext|>⟧\n"), "{text}");
    let stderr = String::from_utf8(output.stderr)?;
    assert!(stderr.contains("`sums`: 48 records of `prompt`/`completion` (parquet) to train on"));
    Ok(())
}
