//! Records with `messages` on their way to batches.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use dylora::config::LossOnTurns::{All, Last};
use dylora::config::{LossOn, LossOnTurns, Mixing, OnBadRecord, OnExhausted};
use dylora::data::{
    Batch, ChatOptions, DataOptions, DomainFiles, IGNORED_LABEL, TokenDataset, Tokenizer,
    load_files,
};
use serde_json::{Value, json};

use crate::{BaseFolder, conversation, golden_dir};

fn tokenizer(name: &str) -> Tokenizer {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tokenizers");
    let path = format!("{dir}/{name}.tokenizer.json");
    Tokenizer::load(Path::new(&path)).expect("it is valid")
}

/// The options of a base with a golden template.
fn options(template: &str, seq_len: usize) -> DataOptions {
    let text = fs_err::read_to_string(golden_dir().join(format!("{template}.jinja")));
    let config = r#"{"bos_token": "<|begin_of_text|>"}"#;
    let files = [
        ("chat_template.jinja", text.expect("it exists")),
        ("tokenizer_config.json", config.to_owned()),
    ];
    let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
    let template = BaseFolder::new(&files).template().expect("it is valid");
    DataOptions {
        seq_len,
        loss_on: LossOn::Completion,
        chat: ChatOptions { template: Some(Arc::new(template)), base: "tiny".into(), turns: All },
        on_bad_record: OnBadRecord::Fail,
        seed: 0,
        eos_token_id: Some(1),
        mixing: Mixing::default(),
        on_exhausted: OnExhausted::default(),
        cache_dir: None,
    }
}

/// A `.jsonl` file of records.
struct Records(BaseFolder);

impl Records {
    fn new(records: &[Value]) -> Self {
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        Self(BaseFolder::new(&[("a.jsonl", &lines)]))
    }

    fn load(&self, options: &DataOptions, tokenizer: &Tokenizer) -> Result<TokenDataset> {
        let files = vec![self.0.path("a.jsonl").display().to_string()];
        let source = DomainFiles { name: Some("x".into()), files, ..DomainFiles::default() };
        load_files(&[source], options, tokenizer, &|_| ())
    }
}

fn batch(dataset: &TokenDataset) -> Batch {
    dataset.batch(&dataset.eval_order())
}

/// The runs of learned targets, each as text.
fn learned(batch: &Batch, tokenizer: &Tokenizer) -> Result<Vec<String>> {
    let mut runs: Vec<Vec<u32>> = vec![vec![]];
    for label in &batch.labels {
        match *label {
            IGNORED_LABEL => runs.push(vec![]),
            label => runs.last_mut().expect("there is one").push(label as u32),
        }
    }
    runs.iter().filter(|run| !run.is_empty()).map(|run| tokenizer.decode(run)).collect()
}

fn two_turns() -> Value {
    json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Everyone?"}, {"role": "assistant", "content": "All beings."},
        {"role": "user", "content": "Free?"}, {"role": "assistant", "content": "Yes, free."}
    ]})
}

#[test]
fn the_assistants_turns_are_learned() -> Result<()> {
    let qwen = tokenizer("qwen");
    let records = Records::new(&[two_turns()]);
    let turns = ["All beings.<|im_end|>\n", "Yes, free.<|im_end|>\n"];
    for template in ["smollm2", "qwen2.5", "chatml_marked"] {
        let mut options = options(template, 512);
        let dataset = records.load(&options, &qwen)?;
        assert_eq!(learned(&batch(&dataset), &qwen)?, turns, "{template}");
        options.chat.turns = Last;
        let last = records.load(&options, &qwen)?;
        assert_eq!(learned(&batch(&last), &qwen)?, turns[1..], "{template}");
        assert_ne!(last.fingerprint(), dataset.fingerprint());
        assert_eq!(batch(&last).input_ids, batch(&dataset).input_ids);
        options.loss_on = LossOn::All;
        let all = batch(&records.load(&options, &qwen)?);
        assert_eq!(all.label_tokens() as usize, all.labels.iter().filter(|l| **l >= 0).count());
        assert_eq!(all.label_tokens(), 1 + all.position_ids.iter().max().copied().unwrap() as u64);
    }
    Ok(())
}

#[test]
fn a_conversation_has_the_tokens_of_its_text_and_no_others() -> Result<()> {
    for (template, name) in [("llama3_style", "llama3"), ("qwen3", "qwen"), ("smollm2", "llama2")] {
        let tokenizer = tokenizer(name);
        let options = options(template, 1024);
        let batch = batch(&Records::new(&[two_turns()]).load(&options, &tokenizer)?);
        let chat = conversation(&two_turns());
        let template = options.chat.template.expect("it has one");
        let ids = tokenizer.encode(&template.render(&chat, false)?.text)?;
        let found: Vec<i64> = batch.input_ids[..ids.len() - 1].to_vec();
        assert_eq!(found, ids[..ids.len() - 1].iter().map(|id| i64::from(*id)).collect::<Vec<_>>());
        // neither a second start token nor an end token
        assert!(batch.document_ids[ids.len() - 1..].iter().all(|document| *document == -1));
        if name == "llama3" {
            let start = tokenizer.start_tokens();
            assert_eq!((start.len(), start[0]), (1, ids[0]));
            assert_ne!(ids[1], ids[0]);
        }
    }
    Ok(())
}

#[test]
fn the_prompt_is_what_stands_in_front_of_the_first_turn() -> Result<()> {
    let qwen = tokenizer("qwen");
    for (turns, loss_on) in [(All, LossOn::Completion), (Last, LossOn::All)] {
        let mut options = options("qwen2.5", 512);
        (options.chat.turns, options.loss_on) = (turns, loss_on);
        let batch = batch(&Records::new(&[two_turns()]).load(&options, &qwen)?);
        let prompt = batch.input_ids.iter().zip(&batch.prompt).filter(|(_, is_prompt)| **is_prompt);
        let prompt: Vec<u32> = prompt.map(|(id, _)| *id as u32).collect();
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nEveryone?\
                        <|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(qwen.decode(&prompt)?, expected);
    }
    Ok(())
}

#[test]
fn a_token_over_the_border_of_a_turn_is_only_read() -> Result<()> {
    let qwen = tokenizer("qwen");
    let template = BaseFolder::new(&[(
        "chat_template.jinja",
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}",
    )]);
    let mut options = options("smollm2", 512);
    options.chat.template = Some(Arc::new(template.template()?));
    let encoded = qwen.encode(" right to")?;
    let tokens: Vec<String> =
        encoded.iter().map(|id| qwen.decode(&[*id])).collect::<Result<_>>()?;
    assert_eq!(tokens, [" right", " to"]);
    for (question, answer, expected) in
        [(" ri", "ght to", " to"), ("", " right to", " to"), ("x", " right to", " right to")]
    {
        let record = json!({"messages": [
            {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        ]});
        let batch = batch(&Records::new(&[record]).load(&options, &qwen)?);
        assert_eq!(learned(&batch, &qwen)?, [expected], "{question}|{answer}");
    }
    Ok(())
}

#[test]
fn long_conversations_are_split_and_lose_no_label() -> Result<()> {
    let qwen = tokenizer("qwen");
    let whole = Records::new(&[two_turns()]).load(&options("qwen2.5", 512), &qwen)?;
    let num_labels = whole.domains[0].counts.label_tokens;
    assert_eq!(num_labels, batch(&whole).label_tokens());
    for seq_len in 1..40 {
        let dataset = Records::new(&[two_turns()]).load(&options("qwen2.5", seq_len), &qwen)?;
        let counts = dataset.domains[0].counts;
        assert_eq!((counts.documents, counts.split_documents), (1, 1));
        assert_eq!(counts.label_tokens, num_labels);
        assert_eq!(batch(&dataset).label_tokens(), num_labels, "{seq_len}");
        let sum = dataset.eval_order().iter().map(|id| dataset.label_tokens(*id)).sum::<u64>();
        assert_eq!(sum, num_labels);
        // pieces in which nothing is learned are dropped
        assert!(seq_len > 10 || counts.positions < whole.domains[0].counts.positions);
    }
    Ok(())
}

#[test]
fn conversations_lie_beside_other_records() -> Result<()> {
    let qwen = tokenizer("qwen");
    let mut chat = two_turns();
    (chat["expert"], chat["domain"]) = (json!(1), json!("y"));
    let records = [json!({"text": "All"}), chat, json!({"prompt": "a ", "completion": "being"})];
    let dataset = Records::new(&records).load(&options("qwen2.5", 512), &qwen)?;
    let counts = dataset.domains[0].counts;
    assert_eq!((counts.records, counts.documents, counts.skipped_empty), (3, 3, 0));
    assert_eq!(dataset.record_experts().largest, Some(1));
    let mut found = learned(&batch(&dataset), &qwen)?;
    found.sort();
    let end = qwen.id_to_token(1).expect("it is a token");
    let turns = ["All beings.<|im_end|>\n", "Yes, free.<|im_end|>\n"];
    assert!(turns.iter().all(|turn| found.iter().any(|run| run.contains(turn))), "{found:?}");
    assert!(found.iter().any(|run| run.contains(&format!("being{end}"))), "{found:?}");
    Ok(())
}

#[test]
fn tools_and_variables_reach_the_template() -> Result<()> {
    let qwen = tokenizer("qwen");
    let mut record = json!({
        "messages": [
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "clock", "arguments": {"zone": 1}}}
            ]},
            {"role": "tool", "content": "noon"},
            {"role": "assistant", "content": "Noon."}
        ],
        "tools": [{"type": "function", "function": {"name": "clock"}}],
        "chat_template_kwargs": {"enable_thinking": false}
    });
    let read = |record: &Value| -> Result<(String, Vec<String>)> {
        let batch = batch(
            &Records::new(std::slice::from_ref(record)).load(&options("qwen3", 1024), &qwen)?,
        );
        let num_tokens = batch.document_ids.iter().filter(|document| **document == 0).count();
        let ids: Vec<u32> = batch.input_ids[..num_tokens].iter().map(|id| *id as u32).collect();
        Ok((qwen.decode(&ids)?, learned(&batch, &qwen)?))
    };
    let (text, turns) = read(&record)?;
    let tools = "<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"clock\"}}\n</tools>";
    assert!(text.contains(tools), "{text}");
    assert!(text.contains("<tool_response>\nnoon\n</tool_response>"), "{text}");
    let call = "<tool_call>\n{\"name\": \"clock\", \"arguments\": {\"zone\": 1}}\n</tool_call>";
    assert_eq!(turns, [format!("{call}<|im_end|>\n").as_str(), "Noon.<|im_end|>\n"]);
    // as some data sets have it, a list as a text of JSON
    record["tools"] = record["tools"].to_string().into();
    assert_eq!(read(&record)?, (text, turns));
    Ok(())
}

/// The error of loading a record from the second line of a file, without the file's folder.
fn fault(record: Value, options: &DataOptions) -> String {
    let records = Records::new(&[json!({"text": "All"}), record]);
    let error = records.load(options, &tokenizer("qwen")).expect_err("it is malformed");
    format!("{error:#}").replace(&records.0.path("").display().to_string(), "")
}

#[test]
fn faults_name_the_file_and_the_line() {
    let options = options("llama3_style", 512);
    let chat = |messages: Value| json!({"messages": messages});
    let error = fault(chat(json!([{"role": "user", "content": "a"}])), &options);
    assert!(
        error.starts_with("`a.jsonl:2`: no message has the role `assistant`, only `user`\nhint: "),
        "{error}"
    );
    let roles = json!([{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let error = fault(chat(roles), &options);
    assert!(error.starts_with("`a.jsonl:2`: the chat template refuses the conversation: Unknown"));
    assert!(error.contains("chat_template.jinja:16`)"), "{error}");
    let error = fault(chat(json!([{"role": "user"}, {"role": "assistant"}])), &options);
    assert!(error.contains("in message") || error.contains("chat_template.jinja:"), "{error}");
}

#[test]
fn a_record_of_which_nothing_is_learned_is_malformed() -> Result<()> {
    let mut options = options("chatml_marked", 512);
    let text =
        "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}";
    let template = BaseFolder::new(&[("chat_template.jinja", text)]).template()?;
    options.chat.template = Some(Arc::new(template));
    let error = fault(two_turns(), &options);
    let expected = "`a.jsonl:2`: has nothing to learn: no token lies within the assistant's turns";
    assert!(error.starts_with(expected), "{error}");
    options.on_bad_record = OnBadRecord::Skip;
    let records = Records::new(&[json!({"text": "All"}), two_turns()]);
    let counts = records.load(&options, &tokenizer("qwen"))?.domains[0].counts;
    assert_eq!((counts.records, counts.documents, counts.skipped_bad), (2, 1, 1));
    Ok(())
}

#[test]
fn a_base_without_a_template_is_refused_by_name() {
    let mut options = options("qwen2.5", 512);
    options.chat.template = None;
    // another treatment of malformed records does not hide it
    options.on_bad_record = OnBadRecord::Skip;
    assert_eq!(
        fault(two_turns(), &options),
        "in `a.jsonl:2`: the record has `messages`, but the base `tiny` has no chat template\n\
         hint: name one by `base.chat_template = \"FILE.jinja\"`, which is `--chat-template` of \
         `dylora eval`, or give the records a `prompt` and a `completion`"
    );
    let template = BaseFolder::new(&[("chat_template.jinja", "{% if")]).template();
    options.chat.template = template.ok().map(Arc::new);
    let error = fault(two_turns(), &options);
    assert!(error.starts_with("in `a.jsonl:2`: `"), "{error}");
    assert!(error.contains("chat_template.jinja:1` is not a chat template: syntax"), "{error}");
}

#[test]
fn the_cache_knows_the_template_and_the_turns() -> Result<()> {
    let qwen = tokenizer("qwen");
    let folder = BaseFolder::new(&[]);
    let records = Records::new(&[two_turns()]);
    let load = |template: &str, turns: LossOnTurns, loss_on: LossOn| -> Result<(usize, Batch)> {
        let mut options = options(template, 512);
        (options.chat.turns, options.loss_on) = (turns, loss_on);
        options.cache_dir = Some(folder.path("cache"));
        let files = vec![records.0.path("a.jsonl").display().to_string()];
        let source = DomainFiles { name: Some("x".into()), files, ..DomainFiles::default() };
        let cached = Cell::new(0);
        let progress = |now: dylora::data::LoadProgress| cached.set(now.files_cached);
        let dataset = load_files(&[source], &options, &qwen, &progress)?;
        Ok((cached.get(), batch(&dataset)))
    };
    let (cached, first) = load("qwen2.5", All, LossOn::Completion)?;
    assert_eq!(cached, 0);
    assert_eq!(load("qwen2.5", All, LossOn::Completion)?, (1, first.clone()));
    let (cached, last) = load("qwen2.5", Last, LossOn::Completion)?;
    assert_eq!(cached, 0);
    assert_ne!(last.labels, first.labels);
    assert_eq!(load("qwen2.5", Last, LossOn::Completion)?, (1, last));
    assert_eq!(load("qwen2.5", All, LossOn::All)?.0, 1);
    assert_eq!(load("qwen3", All, LossOn::Completion)?.0, 0);
    assert_eq!(load("qwen2.5", All, LossOn::Completion)?, (1, first));
    Ok(())
}
