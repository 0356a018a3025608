//! The halves of validation sets: one to choose by, one to report.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use dylora::config::{DomainConfig, LossOn, Mixing, OnBadRecord, OnExhausted, Validation};
use dylora::data::{
    ChatOptions, DataOptions, HalvedDatasets, TokenDataset, Tokenizer, load_datasets, load_halves,
};

/// The words `w0` to `w299` and an end token.
fn tokenizer() -> Tokenizer {
    let words = (0..300).map(|i| (format!("w{i}"), i.into()));
    let vocab: serde_json::Map<_, serde_json::Value> =
        words.chain([("<|endoftext|>".to_owned(), 300.into())]).collect();
    let file = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "decoder": null, "truncation": null, "padding": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" },
    });
    Tokenizer::from_bytes(file.to_string().as_bytes()).expect("a valid tokenizer")
}

fn options(seed: u64) -> DataOptions {
    DataOptions {
        seq_len: 4,
        loss_on: LossOn::All,
        chat: ChatOptions::default(),
        on_bad_record: OnBadRecord::Fail,
        seed,
        eos_token_id: Some(300),
        mixing: Mixing::Interleaved,
        on_exhausted: OnExhausted::default(),
        cache_dir: None,
    }
}

/// Writes documents that each consist of one word, twice.
fn write(dir: &Path, name: &str, words: std::ops::Range<usize>) -> Result<String> {
    let lines: Vec<String> = words.map(|i| format!("{{\"text\": \"w{i}\"}}\n").repeat(2)).collect();
    fs_err::write(dir.join(name), lines.concat())?;
    Ok(dir.join(name).display().to_string())
}

fn domain(name: &str, train: String, validation: Validation) -> DomainConfig {
    DomainConfig {
        name: name.into(),
        train: vec![train],
        validation: Some(validation),
        ..DomainConfig::default()
    }
}

fn load(domains: &[DomainConfig], seed: u64) -> Result<HalvedDatasets> {
    load_halves(domains, &options(seed), &tokenizer(), &|_| ())
}

/// The words of a dataset, sorted.
fn words(dataset: &TokenDataset) -> Vec<i64> {
    let batch = dataset.batch(&dataset.eval_order());
    let inputs = batch.input_ids.iter().zip(&batch.document_ids);
    let mut words: Vec<i64> = inputs.filter(|(_, of)| **of >= 0).map(|(word, _)| *word).collect();
    words.sort_unstable();
    words
}

fn set(words: &[i64]) -> BTreeSet<i64> {
    words.iter().copied().collect()
}

#[test]
fn the_halves_are_disjoint_and_together_the_whole_validation_set() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let train = write(dir.path(), "train.jsonl", 0..120)?;
    let held = write(dir.path(), "held.jsonl", 100..220)?;
    for validation in [Validation::Files(vec![held]), Validation::Fraction(0.5)] {
        let domains = [domain("a", train.clone(), validation)];
        let whole = load_datasets(&domains, &options(3), &tokenizer(), &|_| ())?;
        let halves = load(&domains, 3)?;
        let (selection, report) = (words(&halves.selection), words(&halves.report));
        assert!(set(&selection).is_disjoint(&set(&report)));
        let mut both = [selection.clone(), report.clone()].concat();
        both.sort_unstable();
        assert_eq!(both, words(&whole.validation));
        let share = selection.len() as f64 / both.len() as f64;
        assert!((0.3..0.7).contains(&share), "{share}");
        // equal documents are on the same side
        for half in [&selection, &report] {
            assert!(half.chunks(2).all(|pair| pair[0] == pair[1]), "{half:?}");
        }
        // what is trained on does not depend on the halves, and none of it is in one
        assert_eq!(halves.train.fingerprint(), whole.train.fingerprint());
        assert!(set(&words(&halves.train)).is_disjoint(&set(&both)));
        let records = |of: &TokenDataset| of.domains[0].counts.records as usize;
        let counted = (records(&halves.selection), records(&halves.report));
        assert_eq!(counted, (selection.len(), report.len()));
    }
    Ok(())
}

#[test]
fn added_data_and_another_seed_move_no_document_to_the_other_half() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let train = write(dir.path(), "train.jsonl", 0..4)?;
    let (few, many) =
        (write(dir.path(), "few.jsonl", 100..150)?, write(dir.path(), "many.jsonl", 100..250)?);
    let halves = |file: &String, seed| {
        load(&[domain("a", train.clone(), Validation::Files(vec![file.clone()]))], seed)
    };
    let (small, large, reseeded) = (halves(&few, 0)?, halves(&many, 0)?, halves(&few, 9)?);
    assert!(set(&words(&small.selection)).is_subset(&set(&words(&large.selection))));
    assert!(set(&words(&small.report)).is_subset(&set(&words(&large.report))));
    assert_eq!(small.report.fingerprint(), reseeded.report.fingerprint());
    Ok(())
}

#[test]
fn a_domain_with_too_few_documents_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let train = write(dir.path(), "train.jsonl", 0..4)?;
    let one = write(dir.path(), "one.jsonl", 7..8)?;
    let many = write(dir.path(), "many.jsonl", 100..150)?;
    let domains = [
        domain("a", train.clone(), Validation::Files(vec![many])),
        domain("b", train, Validation::Files(vec![one])),
    ];
    let message = format!("{:#}", load(&domains, 0).expect_err("one document has no halves"));
    insta::assert_snapshot!(message, @r"
    the validation set of domain `b` has no two halves: its documents, 2, all fall into one
    hint: give it more documents
    ");
    Ok(())
}
