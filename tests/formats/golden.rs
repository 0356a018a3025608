//! Reference: Python's `csv` and `json`, and pyarrow, by `scripts/make_golden_data.py`.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{FileFormat, RecordConfig, RecordShape};
use dylora::data::detect;
use serde::Deserialize;
use serde_json::Value;

use crate::{golden, load, options, pairs};

#[derive(Deserialize)]
struct Expected {
    files: BTreeMap<String, usize>,
    contents: Vec<Value>,
}

impl Expected {
    fn read() -> Self {
        let text = fs_err::read_to_string(golden("data/expected.json")).expect("it exists");
        serde_json::from_str(&text).expect("it is valid")
    }

    fn of(&self, name: &str) -> &Value {
        &self.contents[self.files[name]]
    }
}

#[test]
fn every_format_holds_what_other_programs_read_from_it() -> Result<()> {
    let expected = Expected::read();
    let names = expected.files.keys().filter(|name| name.contains("pairs") || name.contains("one"));
    let names: Vec<&String> = names.collect();
    assert_eq!(names.len(), 8);
    for name in names {
        let wanted: Vec<[String; 2]> = serde_json::from_value(expected.of(name).clone())?;
        let dataset = load(&golden("data").join(name), &RecordConfig::default())?;
        assert_eq!(pairs(&dataset), wanted, "{name}");
    }
    Ok(())
}

/// `quoted.csv` has a byte order mark, empty rows and values, mixed line ends and no last one.
#[test]
fn csv_is_read_as_by_python() -> Result<()> {
    let wanted: Vec<[String; 2]> =
        serde_json::from_value(Expected::read().of("quoted.csv").clone())?;
    let path = golden("data/quoted.csv");
    // an empty value counts as absent, so that its record has no prompt
    let error = format!("{:#}", load(&path, &RecordConfig::default()).expect_err("a bad record"));
    assert!(error.contains("quoted.csv:7`: has a `completion` but no `prompt`"), "{error}");
    let skip =
        dylora::data::DataOptions { on_bad_record: dylora::config::OnBadRecord::Skip, ..options() };
    let dataset = crate::load_with(&path, &RecordConfig::default(), &skip)?;
    let wanted: Vec<_> = wanted.into_iter().filter(|[prompt, _]| !prompt.is_empty()).collect();
    assert_eq!((pairs(&dataset), dataset.domains[0].counts.skipped_bad), (wanted, 1));
    Ok(())
}

#[test]
fn lists_of_structs_become_conversations() -> Result<()> {
    let expected = Expected::read();
    let options = options();
    let template = options.chat.template.expect("there is one");
    for name in ["messages", "conversations"] {
        let file = format!("{name}.parquet");
        let dataset = load(&golden("data").join(&file), &RecordConfig::default())?;
        let found = pairs(&dataset);
        assert_eq!(found.len(), 2);
        for ([prompt, answer], messages) in found.iter().zip(expected.of(&file).as_array().unwrap())
        {
            let message = |message: &Value| {
                let role = match message["from"].as_str() {
                    Some("human") => "user",
                    Some(_) => "assistant",
                    None => message["role"].as_str().expect("it has one"),
                };
                let content = message["value"].as_str().or(message["content"].as_str());
                let json = serde_json::json!({"role": role, "content": content});
                json.as_object().cloned().expect("an object")
            };
            let messages = messages.as_array().unwrap().iter().map(message).collect();
            let chat = dylora::chat_template::Conversation { messages, ..Default::default() };
            let text = template.render(&chat, false)?.text;
            assert_eq!(format!("{prompt}{answer}"), text);
        }
    }
    Ok(())
}

#[test]
fn a_file_is_detected_by_its_name_and_content() -> Result<()> {
    use FileFormat::{Csv, Json, Parquet, Tsv};
    use RecordShape::{Messages, PromptCompletion, Sharegpt};
    for (name, format, shape, num_records) in [
        ("pairs.csv", Csv, PromptCompletion, 48),
        ("pairs.tsv", Tsv, PromptCompletion, 48),
        ("pairs.json", Json, PromptCompletion, 48),
        ("pairs.snappy.parquet", Parquet, PromptCompletion, 48),
        ("messages.parquet", Parquet, Messages, 2),
        ("conversations.parquet", Parquet, Sharegpt, 2),
    ] {
        let found = detect(&golden("data").join(name), &RecordConfig::default())?;
        assert_eq!((found.format, found.shape), (format, Some(shape)), "{name}");
        assert_eq!((found.num_records, found.is_exact), (num_records, true), "{name}");
    }
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/data/code.train.jsonl");
    let found = detect(demo.as_ref(), &RecordConfig::default())?;
    let exact = fs_err::read_to_string(demo)?.lines().count() as f64;
    assert!((found.num_records as f64 / exact - 1.0).abs() < 0.1, "{found:?}, exactly {exact}");
    Ok(())
}
