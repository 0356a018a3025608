//! A file that is not what it seems is refused, with what was seen.

use std::io::Write;

use anyhow::Result;
use dylora::config::{FileFormat, RecordConfig};
use dylora::data::detect;

use crate::{Files, golden, load, pairs};

/// The error for a file of this name and content.
fn fault(name: &str, content: &[u8]) -> String {
    let files = Files::new(&[(name, content)]);
    let none = RecordConfig::default();
    let fault = files.fault(name, &none);
    let detected = detect(&files.path(name), &none);
    assert!(detected.is_err() || !matches!(name, "a.csv" | "a.json"), "{detected:?}");
    fault
}

#[test]
fn an_unknown_suffix_is_refused() {
    for (name, what) in [("a.xlsx", "has the unknown suffix `.xlsx`"), ("a", "has no suffix")] {
        let fault = fault(name, b"text");
        let start = format!("`DIR/{name}` {what}, so that it is not clear what it holds\nhint:");
        assert!(fault.starts_with(&start), "{fault}");
    }
    let files = Files::new(&[("a.rs", b"{}\nfn main() {}")]);
    let text = RecordConfig { format: Some(FileFormat::Text), ..RecordConfig::default() };
    assert_eq!(load(&files.path("a.rs"), &text).expect("a text").domains[0].counts.documents, 1);
}

#[test]
fn a_file_that_begins_like_another_is_refused() {
    let gzip = || {
        let mut packed = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        packed.write_all(b"{}").expect("it is memory");
        packed.finish().expect("it is memory")
    };
    let parquet = fs_err::read(golden("data/pairs.zstd.parquet")).expect("it exists");
    for (name, content, what) in [
        (
            "a.parquet",
            &b"prompt,completion\n"[..],
            "no Parquet file: it is text that begins with `prompt,completion`",
        ),
        ("a.parquet", b"", "no Parquet file: it is empty"),
        (
            "a.csv",
            &parquet,
            "not a table of values separated by commas: it is a Parquet file\nhint: call it \
             `.parquet`",
        ),
        ("a.txt", b"PK\x03\x04", "not plain text: it is a zip archive"),
        ("a.txt", b"some\0thing", "not plain text: it is binary data, with a byte 0 at byte 5"),
        ("a.txt", b"\xff\xfea\0", "not plain text: it is text in UTF-16\nhint: save it as UTF-8"),
        (
            "a.txt",
            b"{\"text\": \"a\"}\n",
            "not plain text: its first line is a JSON object\nhint: call it `.jsonl`",
        ),
        (
            "a.jsonl",
            &gzip(),
            "not JSON with one object per line: it is a gzip archive\nhint: call it `.gz`",
        ),
        (
            "a.jsonl",
            b" [\n{\"text\": \"a\"}]",
            "not JSON with one object per line: it is a JSON array",
        ),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "not JSON with one object per line: it is a pointer of Git LFS",
        ),
        (
            "a.json",
            b"{\n \"data\": []\n}",
            "holds neither an array of JSON objects nor one object per line",
        ),
        (
            "a.json",
            b"",
            "holds neither an array of JSON objects nor one object per line: it is empty",
        ),
    ] {
        let fault = fault(name, content);
        let start = [format!("`DIR/{name}` is {what}"), format!("`DIR/{name}` {what}")];
        assert!(start.iter().any(|start| fault.starts_with(start)), "{fault}");
    }
    // far behind the bytes that are looked at first
    let late = [&b"text\n".repeat(20_000)[..], b"\0"].concat();
    assert!(fault("a.txt", &late).contains("a.txt:20001` is not plain text: it has a byte 0"));
}

#[test]
fn a_table_without_the_columns_of_records_is_refused() {
    for (content, what) in [
        (
            &b"question,answer\na,b\n"[..],
            "has neither `text`, `prompt` and `completion`, `messages`, `conversations`, nor \
             `instruction` and `output`; its columns are `question`, `answer`\nhint: name the \
             columns",
        ),
        (b"prompt;completion\na;b\n", "has neither"),
        (b"prompt\tcompletion\na\tb\n", "has neither"),
        (b"It was, as I said, late.\n", "has neither"),
        (b"", "has neither"),
        (
            b"prompt,reply\na,b\n",
            "has a `prompt` but no `completion`; add it, or call the field `text`; its columns are \
             `prompt`, `reply`",
        ),
        (b"text,prompt,completion\na,b,c\n", "has `text` as well as `prompt` or `completion`"),
    ] {
        let fault = fault("a.csv", content);
        assert!(fault.starts_with(&format!("`DIR/a.csv` {what}")), "{fault}");
    }
    let fault = fault("a.csv", b"text,text\na,b\n");
    assert_eq!(fault, "cannot read `DIR/a.csv`: the row of columns names `text` twice");
}

#[test]
fn a_faulty_row_names_its_line() {
    for (content, what) in [
        (&b"text,n\n\"a\nb\",1\nc\n"[..], "`DIR/a.csv:4`: has 1 values, but there are 2 columns"),
        (b"text,n\na,1,2\n", "`DIR/a.csv:2`: has 3 values, but there are 2 columns"),
        (b"text,n\n\"a\" b,1\n", "`DIR/a.csv:2`: has text behind the closing quote of its value 1"),
        (b"text,n\na\rb,1\n", "`DIR/a.csv:2`: has a carriage return outside of quotes"),
        (b"text,n\na,\xff\n", "`DIR/a.csv:2`: has invalid UTF-8 at byte 1 of a value"),
        (
            b"text\na\n\n\"b\nc\n",
            "cannot read `DIR/a.csv` after line 4: the row on line 4 has a quote that is never \
             closed",
        ),
    ] {
        let files = Files::new(&[("a.csv", content)]);
        let fault = files.fault("a.csv", &RecordConfig::default());
        assert!(fault.starts_with(what), "{fault}");
    }
}

#[test]
fn a_faulty_array_names_its_line() {
    for (content, what) in [
        (&br#"[{"text": "a"}, {"text": 1}]"#[..], "`DIR/a.json:1`: `text` must be a string"),
        (b"[\n{\"text\": \"a\"},\n{\"x\": \"]\"}\n]", "`DIR/a.json:3`: has neither"),
        (
            b"[\n{\"text\": \"a\"}\n{\"text\": \"b\"}]",
            "`DIR/a.json:2`: invalid JSON at column 1 of its line 2: trailing characters",
        ),
        (
            b"[{\"text\": \"a\"},\n]",
            "cannot read `DIR/a.json` after line 1: line 2 should have an element",
        ),
        (
            b"[{\"text\": \"a\"}",
            "cannot read `DIR/a.json` after line 1: line 1 should have the end of an element, but",
        ),
        (
            b"[{\"text\": \"a",
            "cannot read `DIR/a.json` after line 1: line 1 should have the end of an element, but \
             the file ends",
        ),
        (
            b"[{\"text\": \"a\"}] x",
            "cannot read `DIR/a.json` after line 1: line 1 should have the end of the file, but \
             `x`",
        ),
    ] {
        let files = Files::new(&[("a.json", content)]);
        let fault = files.fault("a.json", &RecordConfig::default());
        assert!(fault.starts_with(what), "{fault}");
    }
}

#[test]
fn a_record_without_end_does_not_fill_the_memory() {
    let long = vec![b'x'; 5 << 20];
    for (name, start, what) in [
        ("a.json", &b"[{\"text\": \""[..], "the element on line 1 is longer than 4 MiB"),
        ("a.csv", b"text\n\"", "line 2 is longer than 4 MiB"),
    ] {
        let files = Files::new(&[(name, &[start, &long].concat())]);
        let fault = files.fault(name, &RecordConfig::default());
        assert!(fault.contains(what), "{fault}");
    }
    let lines = [&b"text\n\""[..], &b"abc\n".repeat(2 << 20)].concat();
    let files = Files::new(&[("a.csv", &lines)]);
    let fault = files.fault("a.csv", &RecordConfig::default());
    assert!(fault.contains("the row on line 2 is longer than 4 MiB"), "{fault}");
}

/// A damaged Parquet file is an error, whichever byte is damaged, or is read as before.
#[test]
fn a_damaged_parquet_file_does_no_harm() -> Result<()> {
    for name in ["pairs.snappy.parquet", "messages.parquet"] {
        let whole = fs_err::read(golden("data").join(name))?;
        let files = Files::new(&[]);
        let path = files.path("a.parquet");
        let none = RecordConfig::default();
        for at in (4..whole.len()).step_by(13) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            fs_err::write(&path, &damaged)?;
            load(&path, &none).ok();
        }
        for len in [4, 11, whole.len() / 2, whole.len() - 1] {
            fs_err::write(&path, &whole[..len])?;
            load(&path, &none).expect_err("it is cut");
        }
        fs_err::write(&path, &whole)?;
        assert!(!pairs(&load(&path, &none)?).is_empty());
    }
    Ok(())
}
