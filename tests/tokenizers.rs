//! The kinds of tokenizers that bases bring: their ids, and the documents that these make.
//!
//! Reference: tokenizers 0.23.3, by `scripts/make_golden_tokenizers.py`.

use std::path::PathBuf;

use anyhow::Result;
use dylora::config::{LossOn, Mixing, OnBadRecord, OnExhausted};
use dylora::data::{ChatOptions, DataOptions, DomainFiles, TokenDataset, Tokenizer, load_files};
use serde::Deserialize;
use serde_json::json;

const KINDS: [&str; 5] = ["qwen", "llama3", "smollm", "llama2", "mistral"];

/// What `tokenizers` makes of some texts.
#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    ids_with_special_tokens: Vec<u32>,
    decoded: String,
}

fn golden_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers").join(name)
}

fn golden(kind: &str) -> Result<(Tokenizer, Vec<Case>)> {
    let tokenizer = Tokenizer::load(&golden_path(&format!("{kind}.tokenizer.json")))?;
    let encodings = fs_err::read(golden_path(&format!("{kind}.encodings.json")))?;
    Ok((tokenizer, serde_json::from_slice::<Golden>(&encodings)?.cases))
}

/// A token that no text of these tests spells, to end documents with.
fn end_token(tokenizer: &Tokenizer) -> u32 {
    let tokens = ["<|endoftext|>", "<|end_of_text|>", "<unk>"];
    tokens.iter().find_map(|token| tokenizer.token_to_id(token)).expect("it has one of these")
}

/// The documents of a file called `name` that contains `content`.
fn load(tokenizer: &Tokenizer, name: &str, content: &str, seq_len: usize) -> Result<TokenDataset> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join(name);
    fs_err::write(&file, content)?;
    let options = DataOptions {
        seq_len,
        loss_on: LossOn::Completion,
        chat: ChatOptions::default(),
        on_bad_record: OnBadRecord::Skip,
        seed: 0,
        eos_token_id: Some(end_token(tokenizer)),
        mixing: Mixing::default(),
        on_exhausted: OnExhausted::default(),
        cache_dir: None,
    };
    let files = vec![file.display().to_string()];
    let source = DomainFiles { name: None, files, ..DomainFiles::default() };
    load_files(&[source], &options, tokenizer, &|_| ())
}

/// A document that fits into one block.
struct Document {
    /// Its tokens without the end token.
    tokens: Vec<u32>,
    /// How many of them sequence-level routing counts as prompt.
    num_prompt: usize,
    /// The positions whose targets are learned.
    learned: Vec<usize>,
}

fn document(tokenizer: &Tokenizer, name: &str, content: &str) -> Result<Document> {
    let dataset = load(tokenizer, name, content, 1 << 20)?;
    assert_eq!(dataset.domains[0].counts.documents, 1);
    let batch = dataset.batch(&dataset.eval_order());
    let places = batch.document_ids.iter().take_while(|document| **document == 0).count();
    let learned = (0..places).filter(|at| batch.labels[*at] >= 0);
    Ok(Document {
        tokens: batch.input_ids[..places].iter().map(|id| *id as u32).collect(),
        num_prompt: batch.prompt.iter().filter(|prompt| **prompt).count(),
        learned: learned.collect(),
    })
}

fn text_document(tokenizer: &Tokenizer, text: &str) -> Result<Document> {
    document(tokenizer, "a.jsonl", &json!({"text": text}).to_string())
}

fn pair_document(tokenizer: &Tokenizer, prompt: &str, completion: &str) -> Result<Document> {
    let record = json!({"prompt": prompt, "completion": completion});
    document(tokenizer, "a.jsonl", &record.to_string())
}

#[test]
fn ids_and_texts_are_those_of_tokenizers() -> Result<()> {
    for kind in KINDS {
        let (tokenizer, cases) = golden(kind)?;
        assert!(cases.len() > 40);
        for case in cases {
            let ids = tokenizer.encode(&case.text)?;
            assert_eq!(ids, case.ids, "{kind}: {:?}", case.text);
            let with_start = [tokenizer.start_tokens(), &ids].concat();
            assert_eq!(with_start, case.ids_with_special_tokens, "{kind}: {:?}", case.text);
            assert_eq!(tokenizer.decode(&ids)?, case.decoded, "{kind}");
        }
    }
    Ok(())
}

#[test]
fn only_llama_and_mistral_have_a_start_token() -> Result<()> {
    let starts = [None, Some("<|begin_of_text|>"), None, Some("<s>"), Some("<s>")];
    for (kind, start) in KINDS.into_iter().zip(starts) {
        let (tokenizer, _) = golden(kind)?;
        let expected: Vec<u32> =
            start.and_then(|token| tokenizer.token_to_id(token)).into_iter().collect();
        assert_eq!(tokenizer.start_tokens(), expected, "{kind}");
        assert_eq!(expected.len(), usize::from(start.is_some()));
    }
    Ok(())
}

#[test]
fn a_document_begins_with_the_start_tokens() -> Result<()> {
    for kind in KINDS {
        let (tokenizer, _) = golden(kind)?;
        let start = tokenizer.start_tokens();
        let text = "All human beings\nare born free";
        let plain = [start, &tokenizer.encode(text)?].concat();
        for (name, content) in
            [("a.txt", text.into()), ("a.jsonl", json!({"text": text}).to_string())]
        {
            let found = document(&tokenizer, name, &content)?;
            assert_eq!(found.tokens, plain, "{kind}");
            // the first token is no target, and a text is routed as a whole
            assert_eq!(found.learned, (0..plain.len()).collect::<Vec<_>>(), "{kind}");
            assert_eq!(found.num_prompt, plain.len(), "{kind}");
        }
        let found = pair_document(&tokenizer, "All human", " beings")?;
        let prompt = [start, &tokenizer.encode("All human")?].concat();
        assert_eq!(found.tokens[..prompt.len()], prompt, "{kind}");
        assert_eq!(found.num_prompt, prompt.len(), "{kind}");
        assert_eq!(found.learned[0], prompt.len() - 1, "{kind}");
    }
    Ok(())
}

#[test]
fn start_tokens_that_the_text_spells_are_not_doubled() -> Result<()> {
    for (kind, spelled) in [("llama3", "<|begin_of_text|>"), ("llama2", "<s>"), ("mistral", "<s>")]
    {
        let (tokenizer, _) = golden(kind)?;
        let text = format!("{spelled}Everyone has the right to life");
        let ids = tokenizer.encode(&text)?;
        assert_eq!(ids[..1], *tokenizer.start_tokens());
        assert_eq!(text_document(&tokenizer, &text)?.tokens, ids, "{kind}");
        let found = pair_document(&tokenizer, &text, "!")?;
        assert_eq!((&found.tokens[..ids.len()], found.num_prompt), (ids.as_slice(), ids.len()));
    }
    Ok(())
}

#[test]
fn a_split_document_has_its_start_tokens_once_and_an_empty_one_has_none() -> Result<()> {
    for kind in KINDS {
        let (tokenizer, _) = golden(kind)?;
        let text = "Everyone has the right to life, liberty and security of person. ".repeat(20);
        let ids = [tokenizer.start_tokens(), &tokenizer.encode(&text)?].concat();
        let records =
            [json!({"text": text}), json!({"text": ""}), json!({"prompt": "", "completion": ""})];
        let records: String = records.iter().map(|record| format!("{record}\n")).collect();
        let dataset = load(&tokenizer, "a.jsonl", &records, 16)?;
        let counts = dataset.domains[0].counts;
        assert_eq!((counts.documents, counts.split_documents, counts.skipped_empty), (1, 1, 2));
        assert_eq!((counts.tokens, counts.label_tokens), (ids.len() as u64 + 1, ids.len() as u64));
    }
    Ok(())
}

/// Prompts and completions. No prompt begins with a space, since Mistral's tokenizer takes it for
/// the prefix.
const PAIRS: [(&str, &str); 11] = [
    ("Everyone", " has the right"),
    ("Every", "one has"),
    ("The number is ", "12"),
    ("def add(", "numbers):\n    return"),
    ("Question:", "\n\nAnswer"),
    ("Question:\n", "Answer  "),
    ("two spaces  ", "  and two more"),
    ("Würde", "é 人人 😀"),
    ("ends within a character: ", "\u{301}"),
    ("", "a completion alone"),
    ("x", "\n"),
];

#[test]
fn a_prompt_and_its_completion_decode_to_their_texts() -> Result<()> {
    for kind in KINDS {
        let (tokenizer, _) = golden(kind)?;
        let start = tokenizer.start_tokens();
        for (prompt, completion) in PAIRS {
            let found = pair_document(&tokenizer, prompt, completion)?;
            let tokens = found.tokens.strip_prefix(start).expect("they come first");
            let text = tokenizer.decode(tokens)?;
            assert_eq!(text, format!("{prompt}{completion}"), "{kind}");
            let prompt_ids = tokenizer.encode(prompt)?;
            assert!(tokens.starts_with(&prompt_ids), "{kind}: {prompt:?}");
        }
    }
    Ok(())
}

#[test]
fn a_completion_has_the_ids_that_it_has_behind_its_prompt_in_one_text() -> Result<()> {
    for kind in KINDS {
        let (tokenizer, _) = golden(kind)?;
        let mut num_equal = 0;
        for (prompt, completion) in PAIRS {
            let found = pair_document(&tokenizer, prompt, completion)?;
            let whole = tokenizer.encode(&format!("{prompt}{completion}"))?;
            // otherwise a token of the whole text crosses the border
            let prompt_ids = tokenizer.encode(prompt)?;
            if let Some(behind) = whole.strip_prefix(prompt_ids.as_slice())
                && tokenizer.decode(&prompt_ids)? == prompt
            {
                let at = tokenizer.start_tokens().len() + prompt_ids.len();
                assert_eq!(found.tokens[at..], *behind, "{kind}: {prompt:?}, {completion:?}");
                num_equal += 1;
            }
        }
        assert!(num_equal >= 6, "{kind}: {num_equal}");
    }
    Ok(())
}

#[test]
fn byte_level_tokenizers_encode_a_completion_as_they_encode_any_text() -> Result<()> {
    for kind in ["qwen", "llama3", "smollm"] {
        let (tokenizer, _) = golden(kind)?;
        for (prompt, completion) in PAIRS {
            let found = pair_document(&tokenizer, prompt, completion)?;
            let ids = [tokenizer.encode(prompt)?, tokenizer.encode(completion)?].concat();
            assert_eq!(found.tokens, [tokenizer.start_tokens(), &ids].concat(), "{kind}");
        }
    }
    Ok(())
}

/// Where a completion has several turns of a chat, its tokens are those that it has in the whole
/// chat.
#[test]
fn special_tokens_within_a_completion_change_nothing_behind_them() -> Result<()> {
    for (kind, start, end) in [
        ("llama2", "<s>", "</s>"),
        ("mistral", "<s>", "</s>"),
        ("llama3", "<|begin_of_text|>", "<|eot_id|>"),
    ] {
        let (tokenizer, _) = golden(kind)?;
        let prompt = format!("{start}[INST] It is [/INST]");
        let completion = format!(" right{end}{start}[INST] one [/INST] two{end}");
        let found = pair_document(&tokenizer, &prompt, &completion)?;
        assert_eq!(found.tokens, tokenizer.encode(&format!("{prompt}{completion}"))?, "{kind}");
    }
    Ok(())
}

#[test]
fn long_texts_have_the_ids_that_they_have_in_one_piece() -> Result<()> {
    let lines = [
        "Everyone has the right to life.\n",
        "def add(numbers):\r\n",
        "    total = 12 \n",
        "\n",
        " \t\n",
        "it's 2024\n",
        "人人生而自由。\n",
        "\u{301}a mark at the start\r",
        "--\n",
    ];
    let text: String = (0..12_000_usize).map(|i| lines[i * i % 31 % lines.len()]).collect();
    for kind in ["qwen", "llama3", "smollm"] {
        let (tokenizer, _) = golden(kind)?;
        let whole = [tokenizer.start_tokens(), &tokenizer.encode(&text)?].concat();
        assert!(text.len() > 3 << 16);
        assert!(document(&tokenizer, "a.txt", &text)?.tokens == whole, "{kind}");
        assert!(text_document(&tokenizer, &text)?.tokens == whole, "{kind}");
    }
    Ok(())
}
