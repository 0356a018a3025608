//! `dylora eval --generate`: answers beside their references.

use std::process::{Command, Output};

use anyhow::{Context, Result};
use dylora::generate::answers::{AnswerReport, Sample, final_answer, reports};
use fancy_regex::Regex;
use serde_json::{Value, json};

#[test]
fn the_final_answer_is_the_last_match_without_commas_between_digits() -> Result<()> {
    let pattern = Regex::new(r"####\s*(.*)")?;
    let cases = [
        ("5 + 3 = 8\n#### 8", Some("8")),
        ("#### 1\n#### 12,345 \n", Some("12345")),
        ("#### $1,000,000.", Some("$1000000")),
        ("#### a, b", Some("a, b")),
        ("####", Some("")),
        ("8", None),
    ];
    for (text, expected) in cases {
        assert_eq!(final_answer(text, &pattern).as_deref(), expected, "{text:?}");
    }
    let whole = Regex::new(r"\d+ crowns")?;
    assert_eq!(final_answer("7 crowns, 70 crowns", &whole).as_deref(), Some("70 crowns"));
    Ok(())
}

#[test]
fn shares_are_over_the_answers_that_count() {
    let sample = |domain: &str, exact, correct| Sample {
        domain: domain.into(),
        prompt: String::new(),
        reference: String::new(),
        text: String::new(),
        finish_reason: "stop".into(),
        exact,
        correct,
    };
    let samples = [
        sample("math", true, Some(true)),
        sample("math", false, Some(true)),
        sample("math", false, Some(false)),
        sample("math", false, None),
        sample("verse", true, None),
    ];
    let report = |domain: &str, num_answers, exact_match, num_final, accuracy| AnswerReport {
        domain: domain.into(),
        num_answers,
        exact_match,
        num_final,
        accuracy,
    };
    let expected = [
        report("math", 4, Some(0.25), 3, Some(2.0 / 3.0)),
        report("verse", 1, Some(1.0), 0, None),
        report("code", 0, None, 0, None),
    ];
    assert_eq!(reports(&samples, &["math", "verse", "code"]), expected);
}

fn dylora(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(arguments).args(["--base", "demo/base", "--device", "cpu"]);
    Ok(command.env("OMP_NUM_THREADS", "1").output()?)
}

#[test]
fn answers_are_those_of_generate_and_stand_beside_their_references() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (file, samples) = (path("data.jsonl"), path("samples.jsonl"));
    let all = fs_err::read_to_string("demo/data/arithmetic.validation.jsonl")?;
    let records: Vec<Value> =
        all.lines().take(3).map(serde_json::from_str).collect::<Result<_, _>>()?;
    fs_err::write(&file, all.lines().take(3).collect::<Vec<_>>().join("\n"))?;
    let eval = ["eval", "--data", &file, "--seq-len", "256", "--generate", "2", "--json"];
    let more = ["--max-tokens", "20", "--samples", &samples, "--answer-pattern", "answer: (.*)"];
    let output = dylora(&[&eval[..], &more].concat())?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let found = report["samples"].as_array().context("a list")?;
    assert_eq!(found.len(), 2);
    let written = fs_err::read_to_string(&samples)?;
    let written: Vec<Value> =
        written.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(&written, found);
    let mut generate = vec!["generate", "--raw", "--max-tokens", "20", "--json"];
    let prompts: Vec<&str> = records[..2].iter().filter_map(|r| r["prompt"].as_str()).collect();
    generate.extend(prompts.iter().flat_map(|prompt| ["--prompt", prompt]));
    let texts = String::from_utf8(dylora(&generate)?.stdout)?;
    for ((sample, text), record) in found.iter().zip(texts.lines()).zip(&records) {
        let text: Value = serde_json::from_str(text)?;
        assert_eq!(sample["text"], text["text"]);
        assert_eq!(sample["finish_reason"], text["finish_reason"]);
        assert_eq!(sample["reference"], record["completion"]);
        assert_eq!(sample["prompt"], record["prompt"]);
        assert_eq!(sample["exact"], sample["text"] == sample["reference"]);
        assert!(sample["correct"].is_boolean(), "{sample}");
    }
    assert_eq!(report["answers"][0]["num_answers"], 2);
    assert_eq!(report["answers"][0]["num_final"], 2);
    // what is there stays
    let again = dylora(&[&eval[..], &more].concat())?;
    assert_eq!(again.status.code(), Some(1));
    Ok(())
}

#[test]
fn data_without_prompts_and_faulty_options_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("texts.jsonl").to_string_lossy().into_owned();
    fs_err::write(&file, json!({"text": "Some words without a prompt."}).to_string())?;
    let eval = ["eval", "--data", &file, "--seq-len", "64"];
    let cases: [(&[&str], i32, &str); 4] = [
        (&["--generate", "2"], 1, "no document has a prompt or is a conversation"),
        (&["--generate", "0"], 2, "`--generate` must be at least 1, got 0"),
        (&["--generate", "1", "--max-tokens", "0"], 2, "`--max-new-tokens` must be at least 1"),
        (&["--generate", "1", "--answer-pattern", "("], 2, "`--answer-pattern` is no regular"),
    ];
    for (arguments, code, message) in cases {
        let output = dylora(&[&eval[..], arguments].concat())?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.contains(message), "{stderr}");
        assert_eq!(output.status.code(), Some(code), "{stderr}");
    }
    Ok(())
}
