//! From data files to batches, through the public interface.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use dylora::checkpoint::Position;
use dylora::config::{
    Config, DomainConfig, LossOn, Mixing, OnBadRecord, OnExhausted, Validation, load as config_file,
};
use dylora::data::{
    Batch, ChatOptions, DataOptions, Datasets, DomainFiles, IGNORED_LABEL, LoadProgress,
    MemoryDocument, MemoryDomain, PADDING_DOCUMENT, RecordExperts, TokenDataset, Tokenizer,
    load_datasets, load_files,
};
use dylora::train::plan::{BlockStream, num_steps};
use proptest::prelude::*;

const EOS: u32 = 258;

/// A minimal byte-level BPE: the bytes in the order of their characters, the merges `a b` (256) and
/// `Ġ a` (257), and `<|endoftext|>` (258).
fn tokenizer() -> Tokenizer {
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let other = (0..256).filter(|byte| !printable(byte)).zip(256..).map(|(_, code)| code);
    let characters = (0..256).filter(printable).chain(other).filter_map(char::from_u32);
    let mut vocab: BTreeMap<String, u32> = characters.map(String::from).zip(0..).collect();
    vocab.insert("ab".into(), 256);
    vocab.insert("Ġa".into(), 257);
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    let eos = serde_json::json!({
        "id": EOS, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true
    });
    let file = serde_json::json!({
        "version": "1.0", "added_tokens": [eos], "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": null, "decoder": byte_level, "padding": null,
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0,
                       "direction": "Right"},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "byte_fallback": false, "vocab": vocab, "merges": ["a b", "Ġ a"]}
    });
    Tokenizer::from_bytes(file.to_string().as_bytes()).expect("a valid tokenizer")
}

fn options(seq_len: usize) -> DataOptions {
    DataOptions {
        seq_len,
        loss_on: LossOn::Completion,
        chat: ChatOptions::default(),
        on_bad_record: OnBadRecord::Fail,
        seed: 0,
        eos_token_id: Some(EOS),
        mixing: Mixing::default(),
        on_exhausted: OnExhausted::default(),
        cache_dir: None,
    }
}

/// A temporary folder of files.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (name, content) in files {
            fs_err::write(dir.path().join(name), content).expect("a temporary file");
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn eval(&self, patterns: &[&str], options: &DataOptions) -> Result<TokenDataset> {
        let files = patterns.iter().map(|pattern| self.path(pattern)).collect();
        let source = DomainFiles { name: Some("x".into()), files, ..DomainFiles::default() };
        load_files(&[source], options, &tokenizer(), &|_| ())
    }

    fn domain(&self, name: &str, train: &str, validation: Option<Validation>) -> DomainConfig {
        let train = vec![self.path(train)];
        DomainConfig { name: name.into(), train, validation, ..DomainConfig::default() }
    }

    fn validation(&self, pattern: &str) -> Option<Validation> {
        Some(Validation::Files(vec![self.path(pattern)]))
    }
}

fn load(domains: &[DomainConfig], options: &DataOptions) -> Result<Datasets> {
    load_datasets(domains, options, &tokenizer(), &|_| ())
}

fn message<T>(result: Result<T>) -> String {
    format!("{:#}", result.err().expect("an error"))
}

fn all_blocks(dataset: &TokenDataset) -> Batch {
    dataset.batch(&dataset.eval_order())
}

/// The pieces of documents in a batch, each as its `(input, label)` pairs. Also checks the
/// positions and document ids of each piece, and the padding.
fn pieces(batch: &Batch) -> Vec<Vec<(i64, i64)>> {
    let mut pieces = Vec::new();
    for row in 0..batch.num_rows {
        let mut last = None;
        for at in row * batch.seq_len..(row + 1) * batch.seq_len {
            let document = batch.document_ids[at];
            let pair = (batch.input_ids[at], batch.labels[at]);
            if document == PADDING_DOCUMENT {
                assert_eq!((pair, batch.position_ids[at]), ((0, IGNORED_LABEL), 0));
                assert_eq!((batch.expert_ids[at], batch.prompt[at]), (-1, false));
            } else if last == Some(document) {
                let piece: &mut Vec<_> = pieces.last_mut().expect("the piece has begun");
                assert_eq!(batch.position_ids[at], piece.len() as i64);
                piece.push(pair);
            } else {
                assert_eq!(document, last.map_or(0, |last| last + 1), "documents count up");
                assert_eq!(batch.position_ids[at], 0);
                pieces.push(vec![pair]);
            }
            last = Some(document);
        }
        assert_ne!(last, None);
    }
    pieces
}

/// The sorted texts of a dataset, each of whose documents fits into a block.
fn texts(dataset: &TokenDataset) -> Vec<String> {
    let tokenizer = tokenizer();
    let mut texts: Vec<String> = pieces(&all_blocks(dataset))
        .iter()
        .map(|piece| piece.iter().map(|(input, _)| *input as u32).collect::<Vec<_>>())
        .map(|ids| tokenizer.decode(&ids).expect("ids of the vocabulary"))
        .collect();
    texts.sort();
    texts
}

#[test]
fn a_tokenizers_own_truncation_and_special_tokens_do_not_apply() -> Result<()> {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.vocab_size(), 259);
    assert_eq!(tokenizer.token_to_id("<|endoftext|>"), Some(EOS));
    let text = "abc ab ü\r\n";
    let ids = tokenizer.encode(text)?;
    assert_eq!(ids.len(), 9);
    assert_eq!(tokenizer.decode(&ids)?, text);
    assert_eq!(tokenizer.encode("ab<|endoftext|>")?, [256, EOS]);
    Ok(())
}

#[test]
fn prompt_and_completion_are_encoded_apart_and_only_the_latter_is_learned() -> Result<()> {
    let files = Files::new(&[("a.jsonl", br#"{"prompt": "xa", "completion": "ba"}"#)]);
    let [a, b, x] = [b'a', b'b', b'x'].map(|byte| i64::from(byte) - 33);
    let eos = i64::from(EOS);
    let batch = all_blocks(&files.eval(&["a.jsonl"], &options(6))?);
    assert_eq!(batch.input_ids, [x, a, b, a, 0, 0]);
    let ignored = IGNORED_LABEL;
    assert_eq!(batch.labels, [ignored, b, a, eos, ignored, ignored]);
    assert_eq!(batch.position_ids, [0, 1, 2, 3, 0, 0]);
    assert_eq!(batch.document_ids, [0, 0, 0, 0, -1, -1]);
    assert_eq!((batch.num_rows, batch.label_tokens()), (1, 3));

    let all = DataOptions { loss_on: LossOn::All, eos_token_id: None, ..options(6) };
    let batch = all_blocks(&files.eval(&["a.jsonl"], &all)?);
    assert_eq!(batch.input_ids, [x, a, b, 0, 0, 0]);
    assert_eq!(batch.labels, [a, b, a, ignored, ignored, ignored]);
    Ok(())
}

#[test]
fn long_documents_are_split_and_pieces_without_a_target_are_dropped() -> Result<()> {
    let files = Files::new(&[("a.jsonl", br#"{"prompt": "12345678", "completion": "90"}"#)]);
    let dataset = files.eval(&["a.jsonl"], &options(4))?;
    let id = |byte: u8| i64::from(byte) - 33;
    let batch = all_blocks(&dataset);
    let expected = [
        vec![(id(b'5'), -100), (id(b'6'), -100), (id(b'7'), -100), (id(b'8'), id(b'9'))],
        vec![(id(b'9'), id(b'0')), (id(b'0'), i64::from(EOS))],
    ];
    assert_eq!(pieces(&batch), expected);
    let counts = dataset.domains[0].counts;
    assert_eq!((counts.documents, counts.split_documents, counts.blocks), (1, 1, 2));
    assert_eq!((counts.tokens, counts.label_tokens, counts.positions), (11, 3, 6));
    assert_eq!(counts.padding_share(4), 0.25);
    Ok(())
}

/// The characters at the prompt positions of each piece, and those at its other positions.
fn prompts(batch: &Batch) -> Vec<(String, String)> {
    let mut prompts: Vec<(String, String)> = Vec::new();
    for (at, document) in batch.document_ids.iter().enumerate() {
        if *document == PADDING_DOCUMENT {
            assert!(!batch.prompt[at]);
            continue;
        }
        if batch.position_ids[at] == 0 {
            prompts.push(Default::default());
        }
        let (prompt, rest) = prompts.last_mut().expect("a piece begins at position 0");
        let side = if batch.prompt[at] { prompt } else { rest };
        side.push(char::from(batch.input_ids[at] as u8 + 33));
    }
    prompts
}

#[test]
fn prompt_positions_are_the_records_prompt_or_the_whole_piece() -> Result<()> {
    let records = r#"{"prompt": "xyz", "completion": "12"}
{"text": "text"}
{"prompt": "", "completion": "empty"}
{"prompt": "long+prompt", "completion": "34567890"}
"#;
    let files = Files::new(&[("a.jsonl", records.as_bytes()), ("b.txt", b"plain")]);
    let found = |loss_on, eos_token_id| -> Result<Vec<(String, String)>> {
        let options = DataOptions { loss_on, eos_token_id, ..options(8) };
        let mut found = prompts(&all_blocks(&files.eval(&["*"], &options)?));
        found.sort();
        Ok(found)
    };
    let owned = |expected: &[(&str, &str)]| -> Vec<(String, String)> {
        expected.iter().map(|(prompt, rest)| ((*prompt).into(), (*rest).into())).collect()
    };
    // the long record is split into `long+pro`, which has no target, `mpt34567` and `890`
    let mut expected = vec![
        ("890", ""),
        ("empty", ""),
        ("mpt", "34567"),
        ("plain", ""),
        ("text", ""),
        ("xyz", "12"),
    ];
    assert_eq!(found(LossOn::Completion, Some(EOS))?, owned(&expected));
    // with a loss on all tokens, the prompt positions stay the same and no piece is dropped
    expected.insert(2, ("long+pro", ""));
    assert_eq!(found(LossOn::All, Some(EOS))?, owned(&expected));
    // without an end token, the last token of a document is not an input
    let expected =
        [("89", ""), ("empt", ""), ("mpt", "34567"), ("plai", ""), ("tex", ""), ("xyz", "1")];
    assert_eq!(found(LossOn::Completion, None)?, owned(&expected));
    Ok(())
}

#[test]
fn packing_suffixes_line_ends_and_byte_order_marks_change_nothing() -> Result<()> {
    let plain = "{\"text\": \"one\"}\n\n{\"text\": \"two\"}\n";
    let gz = |content: &str| -> Result<Vec<u8>> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content.as_bytes())?;
        Ok(encoder.finish()?)
    };
    // a gzip file may consist of several compressed parts, one after another
    let (first, second) = plain.split_at(20);
    let files = Files::new(&[
        ("a.jsonl", plain.as_bytes()),
        ("crlf.jsonl", plain.replace('\n', "\r\n").as_bytes()),
        ("open.jsonl", plain.trim_end().as_bytes()),
        ("bom.NDJSON", format!("\u{feff}{plain}").as_bytes()),
        ("a.jsonl.gz", &[gz(first)?, gz(second)?].concat()),
        ("a.jsonl.zst", &zstd::encode_all(plain.as_bytes(), 3)?),
        ("one.txt", b"one"),
        ("two.txt.zst", &zstd::encode_all("\u{feff}two".as_bytes(), 3)?),
    ]);
    let fingerprint = files.eval(&["a.jsonl"], &options(8))?.fingerprint();
    for name in ["crlf.jsonl", "open.jsonl", "bom.NDJSON", "a.jsonl.gz", "a.jsonl.zst"] {
        assert_eq!(files.eval(&[name], &options(8))?.fingerprint(), fingerprint, "{name}");
    }
    assert_eq!(files.eval(&["*.txt*"], &options(8))?.fingerprint(), fingerprint);
    Ok(())
}

#[test]
fn plain_texts_keep_their_lines_as_they_are() -> Result<()> {
    let files = Files::new(&[("a.txt", b"a\r\nb \n\n"), ("empty.txt", b"")]);
    let error = message(files.eval(&["*.txt"], &options(16)));
    assert!(error.contains("empty.txt:0`: has nothing to learn"), "{error}");
    let skip = DataOptions { on_bad_record: OnBadRecord::Skip, ..options(16) };
    let dataset = files.eval(&["*.txt"], &skip)?;
    assert_eq!(texts(&dataset), ["a\r\nb \n\n"]);
    assert_eq!(
        (dataset.domains[0].counts.records, dataset.domains[0].counts.skipped_empty),
        (2, 1)
    );
    Ok(())
}

#[test]
fn long_texts_have_the_tokens_that_they_have_in_one_piece() -> Result<()> {
    let lines = ["ab ab  \n", "  ab\r\n", "\n", "it's ab 12 \u{a0}\n\n \n", "<|endoftext|>\n"];
    let text: String = (0..60_000_usize).map(|i| lines[i * i % 31 % lines.len()]).collect();
    let record = serde_json::json!({"text": text}).to_string();
    let files = Files::new(&[("a.txt", text.as_bytes()), ("a.jsonl", record.as_bytes())]);
    let whole = tokenizer().encode(&text)?;
    for name in ["a.txt", "a.jsonl"] {
        let dataset = files.eval(&[name], &options(1 << 20))?;
        let batch = dataset.batch(&dataset.eval_order());
        assert_eq!(dataset.domains[0].counts.tokens as usize, whole.len() + 1);
        let pieces = pieces(&batch).concat();
        let tokens: Vec<u32> = pieces.iter().map(|(input, _)| *input as u32).collect();
        assert!(tokens == whole, "the tokens of {name}");
    }
    Ok(())
}

#[test]
fn faults_name_their_file_and_line_or_are_skipped_and_counted() -> Result<()> {
    let content = b"{\"text\": \"good\"}\n\n{\"text\": 1}\n{\"text\": \"\xff\"}\n{\"text\"\n";
    let files = Files::new(&[("a.jsonl", content), ("b.txt", b"ok\nno: \xff\n")]);
    let error = message(files.eval(&["a.jsonl"], &options(8)));
    let start =
        format!("`{}:3`: `text` must be a string, got a number\nhint:", files.path("a.jsonl"));
    assert!(error.starts_with(&start), "{error}");
    let error = message(files.eval(&["b.txt"], &options(8)));
    assert!(error.contains("b.txt:2`: invalid UTF-8 at byte 5"), "{error}");

    let cache_dir = Some(PathBuf::from(files.path("cache")));
    let skip = DataOptions { on_bad_record: OnBadRecord::Skip, cache_dir, ..options(8) };
    for _ in 0..2 {
        let dataset = files.eval(&["a.jsonl", "b.txt"], &skip)?;
        let counts = dataset.domains[0].counts;
        assert_eq!((counts.records, counts.documents, counts.skipped_bad), (5, 1, 4));
        assert_eq!(texts(&dataset), ["good"]);
    }
    // a record that was skipped and cached is still an error with `OnBadRecord::Fail`
    let fail = DataOptions { on_bad_record: OnBadRecord::Fail, ..skip };
    assert!(message(files.eval(&["a.jsonl"], &fail)).contains("a.jsonl:3"));
    Ok(())
}

#[test]
fn broken_archives_are_named() {
    let packed = zstd::encode_all(&b"{\"text\": \"a\"}\n"[..], 3).expect("packs");
    let files = Files::new(&[("a.jsonl.zst", &packed[..packed.len() - 3]), ("b.txt.gz", b"no")]);
    for name in ["a.jsonl.zst", "b.txt.gz"] {
        let error = message(files.eval(&[name], &options(8)));
        assert!(
            error.contains(&format!("cannot read `{}` after line", files.path(name))),
            "{error}"
        );
    }
}

#[test]
fn a_second_load_comes_from_the_cache_and_damage_is_healed() -> Result<()> {
    let many: String = (0..500).map(|i| format!("{{\"text\": \"text {i}\"}}\n")).collect();
    let files = Files::new(&[("a.jsonl", many.as_bytes()), ("b.txt", b"some more")]);
    let cache_dir = PathBuf::from(files.path("deep/cache"));
    let options = DataOptions { cache_dir: Some(cache_dir.clone()), ..options(32) };
    let load = |options: &DataOptions| -> Result<(usize, String, Batch)> {
        let names = ["a.jsonl", "b.txt"].map(|name| files.path(name)).to_vec();
        let source = DomainFiles { files: names, ..DomainFiles::default() };
        let last = Cell::new(LoadProgress::default());
        let dataset = load_files(&[source], options, &tokenizer(), &|now| last.set(now))?;
        let now = last.get();
        assert_eq!((now.num_files, now.files_done, now.bytes_done), (2, 2, now.num_bytes));
        Ok((now.files_cached, dataset.fingerprint(), all_blocks(&dataset)))
    };
    let (cached, fingerprint, batch) = load(&options)?;
    assert_eq!(cached, 0);
    assert_eq!(load(&options)?, (2, fingerprint.clone(), batch.clone()));
    // the cache does not depend on `seq_len` and `loss_on`, but on the end token
    assert_eq!(load(&DataOptions { seq_len: 9, loss_on: LossOn::All, ..options.clone() })?.0, 2);
    assert_eq!(load(&DataOptions { eos_token_id: None, ..options.clone() })?.0, 0);

    let damage = |path: &Path| -> Result<()> {
        let content = fs_err::read(path)?;
        Ok(fs_err::write(path, &content[..content.len() - 1])?)
    };
    for entry in fs_err::read_dir(&cache_dir)? {
        damage(&entry?.path())?;
    }
    assert_eq!(load(&options)?, (0, fingerprint.clone(), batch.clone()));
    assert_eq!(load(&options)?, (2, fingerprint.clone(), batch.clone()));
    fs_err::write(files.path("b.txt"), "something else")?;
    assert_eq!(load(&options)?.0, 1);
    Ok(())
}

#[test]
fn a_cache_that_cannot_be_written_does_not_matter() -> Result<()> {
    let files = Files::new(&[("a.txt", b"text"), ("file", b"")]);
    let cache_dir = Some(PathBuf::from(files.path("file/cache")));
    assert_eq!(texts(&files.eval(&["a.txt"], &DataOptions { cache_dir, ..options(8) })?), ["text"]);
    Ok(())
}

#[test]
fn many_small_files_keep_their_order_and_the_first_fault_is_shown() -> Result<()> {
    let names: Vec<String> = (0..60).map(|i| format!("{i:02}.txt")).collect();
    let content: Vec<_> = names.iter().map(|name| (name.as_str(), name.as_bytes())).collect();
    let files = Files::new(&content);
    let dataset = files.eval(&["*.txt"], &options(7))?;
    let ids = pieces(&all_blocks(&dataset));
    let first = ids.iter().map(|piece| (piece[0].0, piece[1].0)).collect::<Vec<_>>();
    assert!(first.is_sorted() && first.len() == 60);
    for bad in ["20.txt", "21.txt", "50.txt"] {
        fs_err::write(files.path(bad), b"\xff")?;
    }
    assert!(message(files.eval(&["*.txt"], &options(7))).contains("20.txt:1"));
    Ok(())
}

/// `count` different records, each of them twice.
fn doubled(count: usize) -> String {
    (0..2 * count).map(|i| format!("{{\"text\": \"t{}\"}}\n", i / 2)).collect()
}

#[test]
fn a_fraction_holds_out_by_content() -> Result<()> {
    let files = Files::new(&[("a.jsonl", doubled(200).as_bytes()), ("one.txt", b"one")]);
    let domain = files.domain("a", "a.jsonl", Some(Validation::Fraction(0.25)));
    let sets = load(std::slice::from_ref(&domain), &options(8))?;
    let (train, held_out) = (texts(&sets.train), texts(&sets.validation));
    assert!((60..140).contains(&held_out.len()), "{}", held_out.len());
    assert_eq!(train.len() + held_out.len(), 400);
    assert!(held_out.chunks(2).all(|pair| pair[0] == pair[1] && !train.contains(&pair[0])));
    let records = |set: &TokenDataset| set.domains[0].counts.records as usize;
    assert_eq!((records(&sets.train), records(&sets.validation)), (train.len(), held_out.len()));
    let again = load(std::slice::from_ref(&domain), &options(8))?;
    assert_eq!(again.validation.fingerprint(), sets.validation.fingerprint());
    let other = load(&[domain], &DataOptions { seed: 1, ..options(8) })?;
    assert_ne!(other.validation.fingerprint(), sets.validation.fingerprint());

    for (fraction, what) in [(1e-9, "none of its 1 documents"), (0.999_999, "all of its 1 doc")] {
        let domain = files.domain("b", "one.txt", Some(Validation::Fraction(fraction)));
        let error = message(load(&[domain], &options(8)));
        assert!(error.contains("of domain `b` holds out") && error.contains(what), "{error}");
    }
    Ok(())
}

#[test]
fn what_is_validated_on_is_in_no_domains_training_set() -> Result<()> {
    let files = Files::new(&[
        ("a.jsonl", br#"{"text": "one"}"#),
        (
            "b.jsonl",
            b"{\"text\": \"two\"}\n{\"text\": \"six\"}\n\
              {\"prompt\": \"o\", \"completion\": \"ne\"}",
        ),
        ("held.jsonl", b"{\"text\": \"one\"}\n{\"text\": \"two\"}"),
    ]);
    let a = files.domain("a", "a.jsonl", None);
    let b = files.domain("b", "b.jsonl", files.validation("held.jsonl"));
    let sets = load(std::slice::from_ref(&b), &options(8))?;
    assert_eq!(texts(&sets.train), ["six"]);
    assert_eq!(sets.train.domains[0].counts.skipped_held_out, 2);
    assert_eq!(sets.validation.domains[0].counts.documents, 2);
    let error = message(load(&[a.clone(), b], &options(8)));
    let expected = "domain `a` has nothing to train on: of 1 records, 1 are in a validation set";
    assert_eq!(error, expected);
    let sets = load(&[a], &options(8))?;
    assert_eq!((sets.validation.domains.len(), sets.validation.num_blocks()), (0, 0));
    Ok(())
}

#[test]
fn records_go_to_the_domains_that_they_name() -> Result<()> {
    let mixed = b"{\"text\": \"1\", \"domain\": \"p\"}\n{\"text\": \"2\", \"domain\": \"q\"}\n\
                  {\"text\": \"3\"}";
    let files = Files::new(&[("mixed.eval.jsonl", mixed), ("p.txt", b"4")]);
    let mut p = files.domain("first", "mixed.*", None);
    p.record_domain = Some("p".into());
    let sets = load(
        &[p.clone(), DomainConfig { name: "all".into(), ..files.domain("", "*", None) }],
        &options(8),
    )?;
    assert_eq!(sets.train.domains[0].counts.documents, 1);
    assert_eq!(sets.train.domains[0].counts.skipped_other_domain, 2);
    assert_eq!(sets.train.domains[1].counts.documents, 4);
    p.record_domain = Some("r".into());
    let error = message(load(&[p], &options(8)));
    assert!(error.contains("3 have another `domain`"), "{error}");
    assert!(error.contains("hint: their records name `p`, `q`"), "{error}");

    let unnamed = DomainFiles { files: vec![files.path("*")], ..DomainFiles::default() };
    let named = DomainFiles {
        name: Some("q".into()),
        files: vec![files.path("p.txt")],
        ..DomainFiles::default()
    };
    let dataset = load_files(&[unnamed, named], &options(8), &tokenizer(), &|_| ())?;
    let counts: Vec<_> =
        dataset.domains.iter().map(|d| (d.name.as_str(), d.counts.documents, d.weight)).collect();
    assert_eq!(counts, [("p", 2, 1.0), ("q", 2, 1.0), ("mixed.eval", 1, 1.0)]);
    let batch = all_blocks(&dataset);
    assert_eq!(batch.domains.len(), batch.num_rows);
    Ok(())
}

/// Records with and without an expert; a `seq_len` of 8 splits the last one.
const EXPERTS: &str = r#"{"text": "uu"}
{"text": "vvv", "expert": null}
{"text": "ww", "expert": "expert_3"}
{"text": "xxx", "expert": "__base__"}
{"prompt": "yyyyyy", "completion": "zzzzzz", "expert": 0}
"#;

/// For each letter, the experts at its positions.
fn experts_of_letters(batch: &Batch) -> BTreeMap<char, Vec<i64>> {
    let mut experts: BTreeMap<char, Vec<i64>> = BTreeMap::new();
    for (at, document) in batch.document_ids.iter().enumerate() {
        if *document != PADDING_DOCUMENT {
            let letter = char::from(batch.input_ids[at] as u8 + 33);
            experts.entry(letter).or_default().push(batch.expert_ids[at]);
        }
    }
    experts
}

#[test]
fn each_position_has_the_expert_of_its_record() -> Result<()> {
    let files = Files::new(&[("a.jsonl", EXPERTS.as_bytes())]);
    let options = DataOptions { cache_dir: Some(PathBuf::from(files.path("cache"))), ..options(8) };
    let expected = [
        ('u', vec![-1; 2]),
        ('v', vec![-1; 3]),
        ('w', vec![3; 2]),
        ('x', vec![-1; 3]),
        ('y', vec![0; 6]),
        ('z', vec![0; 6]),
    ];
    // the second load comes from the cache
    for _ in 0..2 {
        let dataset = files.eval(&["a.jsonl"], &options)?;
        let batch = all_blocks(&dataset);
        assert_eq!(pieces(&batch).len(), 6);
        assert_eq!(experts_of_letters(&batch), BTreeMap::from(expected.clone()));
        let rows = batch.expert_ids.chunks(8);
        assert!(rows.clone().any(|row| row.contains(&3) && row.contains(&-1)), "a mixed row");
        let expected = RecordExperts { documents_without: 2, largest: Some(3) };
        assert_eq!(dataset.record_experts(), expected);
    }
    Ok(())
}

#[test]
fn only_documents_in_blocks_count_for_the_experts_of_the_records() -> Result<()> {
    let empty = r#"{"text": "", "expert": 9}
{"text": ""}"#;
    let only_base = r#"{"text": "a", "expert": "__base__"}"#;
    let files = Files::new(&[
        ("a.jsonl", EXPERTS.as_bytes()),
        ("empty.jsonl", format!("{empty}\n{only_base}").as_bytes()),
        ("b.txt", b"text"),
    ]);
    let skip = DataOptions { on_bad_record: OnBadRecord::Skip, ..options(8) };
    let experts = |pattern: &str| anyhow::Ok(files.eval(&[pattern], &skip)?.record_experts());
    let counts = |documents_without, largest| RecordExperts { documents_without, largest };
    assert_eq!(experts("empty.jsonl")?, counts(0, Some(-1)));
    assert_eq!(experts("b.txt")?, counts(1, None));
    // the counts are over all domains of a side, the training set or the validation set
    let domains = [
        files.domain("a", "a.jsonl", files.validation("empty.jsonl")),
        files.domain("b", "b.txt", None),
    ];
    let sets = load(&domains, &skip)?;
    assert_eq!(sets.train.record_experts(), counts(3, Some(3)));
    assert_eq!(sets.validation.record_experts(), counts(0, Some(-1)));
    Ok(())
}

/// Checkpoints store the fingerprint, so the literal must not change for data without experts.
#[test]
fn the_fingerprint_changes_with_an_expert_and_not_without_any() {
    let fingerprint = |experts: [Option<i64>; 3]| {
        let documents = experts.into_iter().enumerate();
        let documents =
            documents.map(|(i, expert)| MemoryDocument { expert, ..document(i, 5, 0.4) }).collect();
        let domain = MemoryDomain { name: "x".into(), weight: 1.0, documents };
        TokenDataset::in_memory(8, LossOn::Completion, vec![domain]).fingerprint()
    };
    assert_eq!(
        fingerprint([None; 3]),
        "1e41d3e85fd74f31f77d46bca6fb2ea755e368a68d4567757390fd57df7197bd"
    );
    let different = [
        [None; 3],
        [Some(0), None, None],
        [None, Some(0), None],
        [None, Some(1), None],
        [Some(-1), None, None],
        [Some(-1); 3],
    ];
    let fingerprints: BTreeSet<String> = different.into_iter().map(fingerprint).collect();
    assert_eq!(fingerprints.len(), different.len());
}

/// A document of `len` tokens, none of which another document has.
fn document(index: usize, len: u32, prompt_share: f64) -> MemoryDocument {
    let tokens = (0..len).map(|token| index as u32 * 1_000 + token).collect();
    MemoryDocument { tokens, prompt_len: (f64::from(len) * prompt_share) as u32, expert: None }
}

/// A dataset of domains with the given numbers of blocks and weights.
fn dataset_of(domains: impl IntoIterator<Item = (usize, f64)>) -> TokenDataset {
    let domains = domains.into_iter().enumerate().map(|(i, (num_blocks, weight))| MemoryDomain {
        name: i.to_string(),
        weight,
        documents: (0..num_blocks).map(|d| document(i * 100 + d, 5, 0.0)).collect(),
    });
    TokenDataset::in_memory(4, LossOn::All, domains.collect())
}

/// [`dataset_of`] with a mixing of the domains.
fn mixed(
    domains: impl IntoIterator<Item = (usize, f64)>,
    mixing: Mixing,
    on_exhausted: OnExhausted,
) -> TokenDataset {
    let mut dataset = dataset_of(domains);
    (dataset.mixing, dataset.on_exhausted) = (mixing, on_exhausted);
    dataset
}

/// A config with the given keys in `[train]`.
fn config(train: &str) -> Config {
    let text = format!(
        "[base]\nsource.path = \"base\"\n[train]\n{train}\n[data]\nseq_len = 4\ndomains = []"
    );
    config_file::parse(&text, &[]).expect("a valid config")
}

#[test]
fn a_dataset_is_mixed_as_asked() {
    let domains = [(90, 1.0), (10, 1.0)];
    let dataset = dataset_of(domains);
    assert_eq!((dataset.mixing, dataset.mix()), (Mixing::Proportional, vec![0.9, 0.1]));
    let of_second = |mixing, on_exhausted| {
        let dataset = mixed(domains, mixing, on_exhausted);
        let order = dataset.epoch_order(1, 0);
        assert_eq!((order.len(), dataset.epoch_blocks(0)), (100, 100));
        (dataset.mix()[1], order.iter().filter(|id| id.domain == 1).count())
    };
    assert_eq!(of_second(Mixing::Proportional, OnExhausted::Repeat), (0.1, 10));
    assert_eq!(of_second(Mixing::Temperature(2.0), OnExhausted::Repeat), (0.25, 25));
    assert_eq!(of_second(Mixing::Weights, OnExhausted::Repeat), (0.5, 50));
    assert_eq!(of_second(Mixing::Interleaved, OnExhausted::Repeat), (0.5, 50));
    assert_eq!(of_second(Mixing::Interleaved, OnExhausted::End), (0.5, 10));
}

#[test]
fn a_domain_of_weight_0_is_evaluated_only() {
    use OnExhausted::{End, Repeat};
    for mixing in [Mixing::Proportional, Mixing::Temperature(2.0), Mixing::Weights] {
        for on_exhausted in [Repeat, End] {
            let what = format!("{mixing:?}, {on_exhausted:?}");
            let dataset = mixed([(30, 1.0), (20, 0.0), (10, 2.0)], mixing, on_exhausted);
            let without = mixed([(30, 1.0), (10, 2.0)], mixing, on_exhausted).mix();
            let mix = dataset.mix();
            assert_eq!((mix[1], [mix[0], mix[2]]), (0.0, [without[0], without[1]]), "{what}");
            for epoch in 0..4 {
                let order = dataset.epoch_order(3, epoch);
                assert_eq!(order.len() as u64, dataset.epoch_blocks(epoch), "{what}");
                let of = |domain| order.iter().filter(|id| id.domain == domain).count();
                assert_eq!(of(1), 0, "{what}");
                match on_exhausted {
                    End => assert_eq!((of(0), of(2)), (30, 10), "{what}"),
                    Repeat => assert!(of(0) > 0 && of(2) > 0, "{what}"),
                }
            }
            let evaluated = dataset.eval_order().into_iter().filter(|id| id.domain == 1);
            assert_eq!(evaluated.count(), 20);
        }
    }
}

#[test]
fn a_domain_must_have_a_weight_and_interleaving_requires_a_weight_of_1() {
    let fault = |data: &str| {
        let text = format!("[base]\nsource.path = \"base\"\n[data]\nseq_len = 4\n{data}");
        let domain = "[[data.domains]]\nname = \"d\"\ntrain = [\"f\"]\nweight = 0\n";
        let config = config_file::parse(&format!("{text}\n{domain}"), &[]).expect("valid TOML");
        message(config_file::validate(&config))
    };
    assert_eq!(fault(""), "`data.domains` must have one whose `weight` is above 0");
    let interleaved = fault("mixing = \"interleaved\"");
    assert!(interleaved.contains("`data.domains[0].weight` must be 1 with"), "{interleaved}");
}

/// A change of the mixing changes the order of the blocks, so a run must not resume after it.
#[test]
fn the_fingerprint_changes_with_the_mixing() {
    let fingerprint = |num_domains: usize, mixing, on_exhausted| {
        let domains = (0..num_domains).map(|_| (3, 1.0));
        mixed(domains, mixing, on_exhausted).fingerprint()
    };
    for num_domains in [1, 2] {
        let mut fingerprints = BTreeSet::new();
        for on_exhausted in [OnExhausted::Repeat, OnExhausted::End] {
            for mixing in [
                Mixing::Proportional,
                Mixing::Temperature(1.0),
                Mixing::Temperature(2.0),
                Mixing::Weights,
                Mixing::Interleaved,
            ] {
                fingerprints.insert(fingerprint(num_domains, mixing, on_exhausted));
            }
        }
        assert_eq!(fingerprints.len(), 10);
    }
}

#[test]
fn a_config_mixes_the_training_set_alone() -> Result<()> {
    let files = Files::new(&[("a.txt", b"text"), ("b.txt", b"held out")]);
    let domain = files.domain("a", "a.txt", files.validation("b.txt"));
    let mut config = config("");
    config.data.mixing = Mixing::Weights;
    config.data.on_exhausted = OnExhausted::End;
    let sets = load(&[domain], &DataOptions::new(&config.data, 0, Some(EOS), None))?;
    let of = |set: &TokenDataset| (set.mixing, set.on_exhausted);
    assert_eq!(of(&sets.train), (Mixing::Weights, OnExhausted::End));
    assert_eq!(of(&sets.validation), (Mixing::Proportional, OnExhausted::Repeat));
    Ok(())
}

#[test]
fn mixings_are_read_written_and_checked() {
    let domain = |weight| {
        format!("[[data.domains]]\nname = \"d{weight}\"\ntrain = [\"f\"]\nweight = {weight}\n")
    };
    let parsed = |data: &str| {
        let text = format!(
            "[base]\nsource.path = \"base\"\n[data]\nseq_len = 4\n{data}\n{}{}",
            domain(1),
            domain(2)
        );
        config_file::parse(&text, &[]).expect("a valid config")
    };
    let fault = |data: &str| message(config_file::validate(&parsed(data)));
    for (data, mixing) in [
        ("", Mixing::Proportional),
        ("mixing = \"proportional\"", Mixing::Proportional),
        ("mixing = { temperature = 2 }", Mixing::Temperature(2.0)),
        ("mixing = \"weights\"", Mixing::Weights),
    ] {
        let config = parsed(data);
        assert_eq!(config.data.mixing, mixing);
        config_file::validate(&config).expect("no fault");
        let again = config_file::parse(&config_file::to_toml(&config), &[]);
        assert_eq!(again.expect("what was written"), config);
    }
    assert_eq!(parsed("on_exhausted = \"end\"").data.on_exhausted, OnExhausted::End);
    for temperature in ["0", "-1.5", "inf", "nan"] {
        let fault = fault(&format!("mixing = {{ temperature = {temperature} }}"));
        assert!(fault.starts_with("`data.mixing.temperature` must be a number above 0"), "{fault}");
    }
    assert_eq!(
        fault("mixing = \"interleaved\""),
        "`data.domains[1].weight` must be 1 with `data.mixing = \"interleaved\"`, got 2"
    );
}

proptest! {
    #[test]
    fn every_target_is_in_exactly_one_block(
        lens in prop::collection::vec((0..60_u32, 0.0..=1.0_f64), 0..60),
        seq_len in 1..40_usize,
        only_completions in any::<bool>(),
    ) {
        let documents: Vec<_> =
            lens.iter().enumerate().map(|(i, (len, share))| document(i, *len, *share)).collect();
        let loss_on = if only_completions { LossOn::Completion } else { LossOn::All };
        let domain = MemoryDomain { name: "x".into(), weight: 1.0, documents: documents.clone() };
        let dataset = TokenDataset::in_memory(seq_len, loss_on, vec![domain]);
        let batch = all_blocks(&dataset);
        prop_assert_eq!(batch.labels.len(), dataset.num_blocks() * seq_len);

        let mut found: Vec<(i64, i64)> = Vec::new();
        for piece in pieces(&batch) {
            prop_assert!(piece.len() <= seq_len);
            prop_assert!(piece.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1));
            let learned = piece.iter().filter(|(_, label)| *label != IGNORED_LABEL);
            prop_assert!(learned.clone().count() > 0, "a piece that teaches nothing");
            found.extend(learned);
        }
        let mut expected = Vec::new();
        for document in &documents {
            let first = if only_completions { document.prompt_len.max(1) } else { 1 };
            let targets = document.tokens.iter().skip(first as usize);
            expected.extend(targets.map(|target| (i64::from(*target) - 1, i64::from(*target))));
        }
        found.sort();
        prop_assert_eq!(&found, &expected);

        let counts = dataset.domains[0].counts;
        let by_block: u64 = dataset.eval_order().iter().map(|id| dataset.label_tokens(*id)).sum();
        prop_assert_eq!((counts.label_tokens, by_block), (found.len() as u64, found.len() as u64));
        prop_assert_eq!(counts.documents + counts.skipped_empty, lens.len() as u64);
        let filled = batch.document_ids.iter().filter(|id| **id != PADDING_DOCUMENT).count();
        prop_assert_eq!(counts.positions, filled as u64);
        // in a piece with prompt tokens these alone are marked; in any other, all positions are
        let prompt_tokens: BTreeSet<i64> = documents
            .iter()
            .flat_map(|document| &document.tokens[..document.prompt_len as usize])
            .map(|token| i64::from(*token))
            .collect();
        let reads_prompt = |at: usize| prompt_tokens.contains(&batch.input_ids[at]);
        for row in 0..batch.num_rows {
            let row = row * seq_len..(row + 1) * seq_len;
            for at in row.clone().filter(|at| batch.document_ids[*at] != PADDING_DOCUMENT) {
                let of_piece = |other: &usize| batch.document_ids[*other] == batch.document_ids[at];
                let any = row.clone().filter(of_piece).any(reads_prompt);
                prop_assert_eq!(batch.prompt[at], reads_prompt(at) || !any);
            }
        }
        // the documents of two blocks would never fit into one
        let rows = batch.document_ids.chunks(seq_len);
        let mut filled: Vec<_> =
            rows.map(|row| row.iter().filter(|id| **id != PADDING_DOCUMENT).count()).collect();
        filled.sort();
        prop_assert!(filled.windows(2).all(|pair| pair[0] + pair[1] > seq_len));
    }

    #[test]
    fn an_epoch_mixes_whole_domains(sizes in prop::collection::vec(1..30_usize, 1..4)) {
        let weights = (1..).map(f64::from);
        let dataset = dataset_of(weights.zip(sizes).map(|(weight, size)| (size, weight)));
        let mut order = dataset.epoch_order(1, 2);
        prop_assert_eq!(order.len() as u64, dataset.epoch_blocks(2));
        prop_assert_eq!(&order, &dataset.epoch_order(1, 2));
        order.sort();
        let expected = dataset.eval_order();
        let copies = expected.iter().flat_map(|id| vec![*id; 1 + id.domain as usize]);
        prop_assert_eq!(order, copies.collect::<Vec<_>>());
    }

    #[test]
    fn a_stream_resumed_anywhere_gives_the_same_rest(
        domains in prop::collection::vec((1..12_usize, 0.1..3.0_f64), 1..4),
        mixing in prop_oneof![
            Just(Mixing::Proportional),
            (0.5..5.0_f64).prop_map(Mixing::Temperature),
            Just(Mixing::Weights),
            Just(Mixing::Interleaved),
        ],
        on_exhausted in prop_oneof![Just(OnExhausted::Repeat), Just(OnExhausted::End)],
        takes in prop::collection::vec(0..7_usize, 1..8),
    ) {
        let dataset = mixed(domains, mixing, on_exhausted);
        let config = config("duration = { epochs = 3 }");
        let total: u64 = (0..3).map(|epoch| dataset.epoch_blocks(epoch)).sum();
        let mut unbroken = BlockStream::new(&dataset, &config, Position::default());
        let all = unbroken.take(&dataset, 10_000);
        prop_assert_eq!(all.len() as u64, total);
        prop_assert_eq!(num_steps(&config, &dataset).unwrap(), total.div_ceil(8));
        let mut stream = BlockStream::new(&dataset, &config, Position::default());
        let mut done = 0;
        for count in takes {
            done += stream.take(&dataset, count).len();
            let mut resumed = BlockStream::new(&dataset, &config, stream.position());
            prop_assert_eq!(&resumed.take(&dataset, 10_000)[..], &all[done..]);
        }
    }
}
