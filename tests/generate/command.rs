//! `dylora generate` as a user runs it.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

/// Runs the command on the demo's base, with `input` as standard input.
fn generate(arguments: &[&str], input: &str) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(["generate", "--base", "demo/base", "--device", "cpu"]).args(arguments);
    command.env("OMP_NUM_THREADS", "1");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("it has a standard input")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

fn text(arguments: &[&str], input: &str) -> Result<String> {
    let output = generate(arguments, input)?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    Ok(String::from_utf8(output.stdout)?)
}

fn objects(arguments: &[&str], input: &str) -> Result<Vec<Value>> {
    let printed = text(&[arguments, &["--json"]].concat(), input)?;
    printed.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Prompts of different length, as a file of prompts has them.
const PROMPTS: &str = r#"
{"prompt": "How much remains?\n[1] 7 hours"}

{"prompt": "SCENE."}
{"prompt": "fn count", "completion": "is not read"}
"#;

#[test]
fn prompts_come_from_options_a_file_or_standard_input_and_keep_their_order() -> Result<()> {
    let of = |prompt: &str| text(&["--prompt", prompt, "--max-tokens", "7"], "");
    let alone = [of("How much remains?\n[1] 7 hours")?, of("SCENE.")?, of("fn count")?];
    let few = ["--max-new-tokens", "7"];
    assert_eq!(text(&few, "SCENE.")?, alone[1]);
    let together = alone.join("\n");
    for batch_size in ["1", "2", "16"] {
        let more = ["--batch-size", batch_size, "--prompts", "-"];
        assert_eq!(text(&[&few[..], &more].concat(), PROMPTS)?, together);
    }
    let file = tempfile::NamedTempFile::new()?;
    fs_err::write(file.path(), PROMPTS)?;
    let name = file.path().to_str().context("the name is text")?;
    assert_eq!(text(&[&few[..], &["--prompts", name]].concat(), "")?, together);
    let all = ["--prompt", "SCENE.", "--prompt", "fn count"];
    assert_eq!(text(&[&few[..], &all].concat(), "")?, alone[1..].join("\n"));
    Ok(())
}

#[test]
fn json_has_ids_probabilities_weights_and_why_a_text_ends() -> Result<()> {
    let found = objects(&["--max-tokens", "6", "--prompts", "-"], PROMPTS)?;
    assert_eq!(found.len(), 3);
    for (object, prompt) in found.iter().zip(["How much", "SCENE.", "fn count"]) {
        assert!(object["prompt"].as_str().is_some_and(|text| text.starts_with(prompt)));
        assert_eq!(object["finish_reason"], "length");
        for key in ["ids", "log_probs", "routing_weights"] {
            assert_eq!(object[key].as_array().map(Vec::len), Some(6), "{key}");
        }
        let log_probs = object["log_probs"].as_array().context("a list")?;
        assert!(log_probs.iter().all(|x| x.as_f64().is_some_and(|x| x < 0.0)));
    }
    Ok(())
}

#[test]
fn a_stop_string_ends_a_text_and_is_not_in_it() -> Result<()> {
    let whole = text(&["--prompt", "SCENE.", "--max-tokens", "12"], "")?;
    let word = whole.split_whitespace().nth(2).context("there are words")?;
    let arguments = ["--prompt", "SCENE.", "--max-tokens", "12", "--stop", word];
    let stopped = objects(&arguments, "")?;
    let expected = whole.split_once(word).context("the word is in it")?.0;
    assert_eq!(stopped[0]["text"], expected);
    assert_eq!(stopped[0]["finish_reason"], "stop");
    assert_eq!(text(&arguments, "")?, format!("{expected}\n"));
    Ok(())
}

#[test]
fn samples_are_the_same_for_the_same_seed() -> Result<()> {
    let of = |seed: &str| {
        let settings = ["--temperature", "1.5", "--top-p", "0.95", "--seed", seed];
        text(&[&["--prompt", "SCENE.", "--max-tokens", "20"][..], &settings].concat(), "")
    };
    assert_eq!(of("3")?, of("3")?);
    assert_ne!(of("3")?, of("4")?);
    // a filter alone asks for samples
    assert_ne!(text(&["--prompt", "SCENE.", "--top-k", "40"], "")?, text(&[], "SCENE.")?);
    Ok(())
}

#[test]
fn faults_are_named_with_their_place() -> Result<()> {
    let long = "word ".repeat(400);
    let cases: [(&[&str], &str, i32, &str); 9] = [
        (&["--prompt", &long], "", 2, "tokens, but the context is 256 positions long"),
        (&["--prompts", "-"], "\n", 1, "standard input has no prompt"),
        (
            &["--prompts", "-"],
            "{\"text\": 1}",
            1,
            "in line 1 of standard input: a line must have either",
        ),
        (&["--prompts", "no.jsonl"], "", 1, "no.jsonl"),
        (&["--top-p", "1.5"], "a", 2, "`top_p` must be above 0 and at most 1, got 1.5"),
        (&["--max-tokens", "0"], "a", 2, "`--max-new-tokens` must be at least 1, got 0"),
        (&["--batch-size", "0"], "a", 2, "`--batch-size` must be at least 1, got 0"),
        (&["--routing", "expert:0"], "a", 2, "a base has no experts to route by `expert:0`"),
        (&["--routing", "best"], "a", 2, "must be `router`, `uniform`, `all`, `expert:N`,"),
    ];
    for (arguments, input, code, message) in cases {
        let output = generate(arguments, input)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.contains(message), "{stderr}");
        assert_eq!(output.status.code(), Some(code), "{stderr}");
    }
    Ok(())
}
