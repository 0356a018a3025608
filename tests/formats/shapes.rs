//! Records of every shape become the same texts and conversations as elsewhere.

use anyhow::Result;
use dylora::config::{OnBadRecord, RecordConfig, RecordShape, RecordTemplate};
use dylora::data::DataOptions;
use serde_json::json;

use crate::{Files, chat, fields, load, load_with, options, pairs, shape};

/// The published texts: `PROMPT_DICT` in `train.py` of tatsu-lab/stanford_alpaca.
const WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that \
    provides further context. Write a response that appropriately completes the request.\n\n\
    ### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:";
const WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that \
    appropriately completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:";

const ALPACA: &[u8] = br#"[
  {"instruction": "Add.", "input": "1 and 2", "output": "3"},
  {"instruction": "Say hi.", "input": "", "output": "Hi."}
]"#;

#[test]
fn alpaca_has_the_published_prompts() -> Result<()> {
    let files = Files::new(&[("a.json", ALPACA)]);
    let found = pairs(&load(&files.path("a.json"), &RecordConfig::default())?);
    assert_eq!(found, [[WITH_INPUT, "3"], [WITHOUT_INPUT, "Hi."]]);
    Ok(())
}

fn rendered(user: &str, assistant: &str) -> [String; 2] {
    let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
                  Hugging Face<|im_end|>\n";
    let prompt = format!("{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n");
    [prompt, format!("{assistant}<|im_end|>\n")]
}

#[test]
fn pairs_and_alpaca_become_turns_in_the_style_of_a_chat() -> Result<()> {
    let files = Files::new(&[
        ("a.json", ALPACA),
        ("b.csv", b"question,answer,text\nWhy?,\"So.\nThat's why.\",ignored\n"),
    ]);
    let found = pairs(&load(&files.path("a.json"), &chat())?);
    assert_eq!(found, [rendered("Add.\n\n1 and 2", "3"), rendered("Say hi.", "Hi.")]);
    let records =
        RecordConfig { style: chat().style, ..fields("prompt=question,completion=answer") };
    let found = pairs(&load(&files.path("b.csv"), &records)?);
    assert_eq!(found, [rendered("Why?", "So.\nThat's why.")]);
    Ok(())
}

#[test]
fn a_template_surrounds_the_fields() -> Result<()> {
    let files = Files::new(&[
        ("a.csv", b"question,answer\nWhy {so}?,Because.\nNo?,\n"),
        ("b.json", ALPACA),
        ("c.jsonl", b"{\"text\": \"a\"}"),
    ]);
    let template = |prompt: &str, completion: &str| RecordTemplate {
        prompt: Some(prompt.into()),
        completion: Some(completion.into()),
    };
    let questions = template("Question: {prompt}\n{{Answer}}:", " {completion}\n");
    let records =
        RecordConfig { template: questions.clone(), ..fields("prompt=question,completion=answer") };
    let fault = files.fault("a.csv", &records);
    assert!(fault.starts_with("`DIR/a.csv:3`: has a `question` but no `answer`"), "{fault}");
    let skip = DataOptions { on_bad_record: OnBadRecord::Skip, ..options() };
    let found = pairs(&load_with(&files.path("a.csv"), &records, &skip)?);
    assert_eq!(found, [["Question: Why {so}?\n{Answer}:", " Because.\n"]]);
    let as_chat = RecordConfig { style: chat().style, ..records };
    let found = pairs(&load_with(&files.path("a.csv"), &as_chat, &skip)?);
    assert_eq!(found, [rendered("Question: Why {so}?\n{Answer}:", " Because.\n")]);

    let with = |template| RecordConfig { template, ..RecordConfig::default() };
    let tasks = with(template("Do: {instruction} [{input}]", "{output}"));
    let found = pairs(&load(&files.path("b.json"), &tasks)?);
    assert_eq!(found, [["Do: Add. [1 and 2]", "3"], ["Do: Say hi. []", "Hi."]]);

    let fault = files.fault("b.json", &with(questions.clone()));
    let start = "`DIR/b.json:2`: `template.prompt` has no value for `{prompt}` in this record";
    assert!(fault.starts_with(start), "{fault}");
    let fault = files.fault("c.jsonl", &with(questions));
    assert!(fault.starts_with("`DIR/c.jsonl:1`: has `text`, which no `template` goes with"));
    for (template, what) in [
        (template("{quest}", "{completion}"), "`template.prompt` has no value for `{quest}`"),
        (template("{prompt}", "fixed"), "`template.completion` must have `{completion}` or"),
        (template("{prompt", "{output}"), "`template.prompt` has a single `{`; write `{{`"),
    ] {
        let fault = files.fault("a.csv", &with(template));
        assert!(fault.starts_with(what), "{fault}");
    }
    Ok(())
}

#[test]
fn sharegpt_has_the_roles_of_chat_templates() -> Result<()> {
    let turns = json!([{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]);
    let as_chat =
        json!([{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]);
    let lines = [
        json!({"conversations": turns}),
        json!({"conversations": as_chat}),
        json!({"system": "S", "conversations": turns.to_string()}),
    ];
    let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let files = Files::new(&[
        ("a.jsonl", lines.as_bytes()),
        ("b.jsonl", br#"{"conversations": [{"from": "bing", "value": "A?"}]}"#),
        ("c.jsonl", br#"{"conversations": [{"from": "gpt", "content": "A?"}, {"from": "gpt"}]}"#),
    ]);
    let found = pairs(&load(&files.path("a.jsonl"), &RecordConfig::default())?);
    let with_system = [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n\
                        <|im_start|>assistant\n"
            .to_owned(),
        "B.<|im_end|>\n".to_owned(),
    ];
    assert_eq!(found, [rendered("A?", "B."), rendered("A?", "B."), with_system]);
    let none = RecordConfig::default();
    let fault = files.fault("b.jsonl", &none);
    assert!(fault.starts_with("`DIR/b.jsonl:1`: message 1 is from `bing`; it must be one of"));
    assert!(files.fault("c.jsonl", &none).starts_with("`DIR/c.jsonl:1`: message 2 has no `value`"));
    Ok(())
}

#[test]
fn fields_rename_keys_and_decide_the_shape() -> Result<()> {
    let line = br#"{"question": "Q", "answer": "A", "text": "no", "prompt": "no", "who": "law"}"#;
    let files = Files::new(&[("a.jsonl", line)]);
    let none = RecordConfig::default();
    let fault = files.fault("a.jsonl", &none);
    assert!(fault.contains("has `text` as well as `prompt` or `completion`"), "{fault}");
    let records = fields("prompt=question,completion=answer,domain=who");
    let dataset = load(&files.path("a.jsonl"), &records)?;
    assert_eq!(pairs(&dataset), [["Q", "A"]]);
    let fault = files.fault("a.jsonl", &fields("prompt=question"));
    assert!(fault.contains("has a `question` but no `completion`"), "{fault}");
    let fault = files.fault("a.jsonl", &fields("prompt=quest,completion=ans"));
    let keys = "`question`, `answer`, `text`, `prompt`, `who`";
    let start =
        format!("`DIR/a.jsonl:1`: has no `quest`; its keys are {keys}\nhint: name its keys");
    assert!(fault.starts_with(&start), "{fault}");
    let fault = files.fault("a.jsonl", &fields("prompt=question,text=answer"));
    assert_eq!(fault, "`fields` must name keys of one shape, got `text` and `prompt`");
    Ok(())
}

/// As in HuggingFaceH4/ultrachat_200k and tatsu-lab/alpaca.
#[test]
fn a_shape_settles_what_a_record_is() -> Result<()> {
    let messages =
        json!([{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]);
    let line = json!({"prompt": "A?", "messages": messages}).to_string();
    let alpaca = b"instruction,input,output,text\nSay hi.,,Hi.,no\n";
    let files = Files::new(&[("a.jsonl", line.as_bytes()), ("b.csv", alpaca)]);
    let fault = files.fault("a.jsonl", &RecordConfig::default());
    assert!(
        fault.contains("or name the `shape` of the domain's records, as `messages`"),
        "{fault}"
    );
    let found = pairs(&load(&files.path("a.jsonl"), &shape(RecordShape::Messages))?);
    assert_eq!(found, [rendered("A?", "B.")]);
    let fault = files.fault("b.csv", &RecordConfig::default());
    assert!(fault.contains("has `text` as well as `instruction`/`output`"), "{fault}");
    let found = pairs(&load(&files.path("b.csv"), &shape(RecordShape::Alpaca))?);
    assert_eq!(found, [[WITHOUT_INPUT, "Hi."]]);
    Ok(())
}

#[test]
fn a_record_without_a_label_fails_or_is_counted() -> Result<()> {
    let lines = br#"{"prompt": "a", "completion": "b"}
{"prompt": "a", "completion": ""}"#;
    let files = Files::new(&[
        ("a.jsonl", lines),
        ("b.csv", b"instruction,output\na,b\na,\n"),
        ("c.jsonl", b"{\"text\": \"\"}"),
    ]);
    let none = RecordConfig::default();
    for (name, start) in [
        ("a.jsonl", "`DIR/a.jsonl:2`: has nothing to learn: its text or completion is empty"),
        ("b.csv", "`DIR/b.csv:3`: has an `instruction` but no `output`"),
        ("c.jsonl", "`DIR/c.jsonl:1`: has nothing to learn"),
    ] {
        let fault = files.fault(name, &none);
        assert!(fault.starts_with(start), "{fault}");
        assert!(fault.contains("`data.on_bad_record = \"skip\"` leaves such"), "{fault}");
    }
    let cache_dir = Some(files.path("cache"));
    let skip = DataOptions { on_bad_record: OnBadRecord::Skip, cache_dir, ..options() };
    for _ in 0..2 {
        let counts = load_with(&files.path("a.jsonl"), &none, &skip)?.domains[0].counts;
        assert_eq!((counts.records, counts.documents, counts.skipped_empty), (2, 1, 1));
    }
    let counts = load_with(&files.path("b.csv"), &none, &skip)?.domains[0].counts;
    assert_eq!((counts.records, counts.documents, counts.skipped_bad), (2, 1, 1));
    // what was skipped and cached is an error again
    let fail = DataOptions { on_bad_record: OnBadRecord::Fail, ..skip };
    load_with(&files.path("a.jsonl"), &none, &fail).expect_err("it has nothing to learn");
    Ok(())
}

#[test]
fn the_cache_tells_mappings_apart() -> Result<()> {
    let files = Files::new(&[("a.csv", b"prompt,completion,other\na,b,c\n")]);
    let options = DataOptions { cache_dir: Some(files.path("cache")), ..options() };
    for _ in 0..2 {
        for (records, wanted) in [
            (RecordConfig::default(), ["a", "b"].map(str::to_owned)),
            (fields("completion=other"), ["a", "c"].map(str::to_owned)),
            (chat(), rendered("a", "b")),
        ] {
            assert_eq!(pairs(&load_with(&files.path("a.csv"), &records, &options)?), [wanted]);
        }
    }
    assert_eq!(fs_err::read_dir(files.path("cache"))?.count(), 3);
    Ok(())
}
