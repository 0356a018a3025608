//! A `tokenizer.json` as the vocabulary of a GGUF file.
//!
//! llama.cpp has a tokenizer of its own. A file says of which kind it is, which tokens and merges
//! it has, and by which of some known rules a text is split before. A tokenizer that is none of
//! these is refused, because its texts would get other tokens.
//!
//! ```text
//! kind     pre          pre_tokenizer of tokenizer.json
//! gpt2     gpt-2        ByteLevel
//!          smollm       Digits, ByteLevel
//!          qwen2        Split by Qwen2's pattern, ByteLevel
//!          llama-bpe    Split by Llama 3's pattern, ByteLevel; whole words need no merges
//!          smaug-bpe    the same, but whole words need merges (SmolLM3)
//! llama                 SentencePiece: none or Metaspace, with byte_fallback ([`sentence_piece`])
//! ```

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value as Json;

use super::sentence_piece;
use crate::chat_template::ChatTemplate;
use crate::data::{SPLIT_PATTERNS, Tokenizer};
use crate::gguf::Value;
use crate::model::decoder::spec::DecoderSpec;

/// Kinds of tokens in a file (`llama_token_type`).
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Settings of a tokenizer that llama.cpp has no place for. They must be empty.
const ABSENT: [&str; 3] = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"];

fn is_empty(value: &Json) -> bool {
    value.is_null() || value == ""
}

/// A tokenizer as llama.cpp describes one.
#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    json: Json,
    kind: Kind,
}

/// The kind of a tokenizer.
#[derive(Debug)]
enum Kind {
    /// Byte-level BPE, with the name of the rule that splits texts.
    ByteLevel(&'static str),
    /// SentencePiece's BPE with bytes for unknown characters.
    SentencePiece {
        /// Whether a text begins with a space.
        has_prefix: bool,
    },
}

impl Vocabulary {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// A tokenizer that llama.cpp does not know.
    pub fn read(path: &Path) -> Result<Self> {
        let parse = || -> Result<Self> {
            let bytes = fs_err::read(path).context("cannot read the tokenizer")?;
            let (tokenizer, json) =
                (Tokenizer::from_bytes(&bytes)?, serde_json::from_slice(&bytes)?);
            let kind = kind(&json)?;
            Ok(Self { tokenizer, json, kind })
        };
        parse().with_context(|| format!("cannot write `{}` as GGUF", path.display()))
    }

    /// What a user should know of texts that llama.cpp tokenizes differently.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = vec![];
        if is_nfc(&self.json["normalizer"]) {
            notes.push(
                "the tokenizer composes accents (Unicode's NFC), which llama.cpp does not: a text \
                 with combining accents has other tokens there"
                    .to_owned(),
            );
        }
        if self.json["pre_tokenizer"]["type"] == "Metaspace" {
            notes.push(
                "the tokenizer puts a space in front of a text that begins with none, and \
                 llama.cpp in front of each text and behind each special token: a text that \
                 begins with a space or holds special tokens has other tokens there"
                    .to_owned(),
            );
        }
        notes
    }

    /// The metadata of a file.
    ///
    /// # Errors
    /// A token or a setting that llama.cpp cannot express.
    pub(super) fn metadata(
        &self,
        spec: &DecoderSpec,
        chat_template: Option<&ChatTemplate>,
    ) -> Result<Vec<(String, Value)>> {
        let model = &self.json["model"];
        let (tokens, types) = self.tokens(spec.vocab_size as usize)?;
        let mut all = vec![];
        let mut add = |key: &str, value| all.push((format!("tokenizer.{key}"), value));
        match self.kind {
            Kind::ByteLevel(pre) => {
                add("ggml.model", "gpt2".into());
                add("ggml.pre", pre.into());
                let merges = merges(model)?.into_iter().map(|(a, b)| format!("{a} {b}")).collect();
                add("ggml.merges", Value::Strings(merges));
            }
            Kind::SentencePiece { has_prefix } => {
                add("ggml.model", "llama".into());
                add("ggml.pre", "default".into());
                let is_piece = |id: usize| types[id] == NORMAL;
                let scores = sentence_piece::scores(&tokens, &merges(model)?, &is_piece)?;
                add("ggml.scores", Value::F32s(scores));
                add("ggml.add_space_prefix", Value::Bool(has_prefix));
            }
        }
        add("ggml.tokens", Value::Strings(tokens));
        add("ggml.token_type", Value::I32s(types));
        all.extend(self.special_ids(spec)?);
        let mut add = |key: &str, value| all.push((format!("tokenizer.{key}"), value));
        let templates = chat_template.map(ChatTemplate::texts).transpose()?.unwrap_or_default();
        let others = templates.keys().filter(|name| *name != "default").cloned();
        let others: Vec<String> = others.collect();
        if !others.is_empty() {
            add("chat_templates", Value::Strings(others));
        }
        for (name, text) in templates {
            match name.as_str() {
                "default" => add("chat_template", Value::String(text)),
                name => add(&format!("chat_template.{name}"), Value::String(text)),
            }
        }
        Ok(all)
    }

    /// The ids of special tokens, and where they are put.
    fn special_ids(&self, spec: &DecoderSpec) -> Result<Vec<(String, Value)>> {
        let bos = match self.tokenizer.start_tokens() {
            [] => None,
            [bos] => Some(*bos),
            several => {
                bail!("llama.cpp begins a text with one token, but this tokenizer with {several:?}")
            }
        };
        let unknown = self.json["model"]["unk_token"].as_str();
        let unknown = unknown.and_then(|token| self.tokenizer.token_to_id(token));
        // llama.cpp stops at a token of each of these kinds
        let ends = spec.eos_token_ids.iter().map(|id| Some(*id));
        let ends: Vec<Option<u32>> = ends.chain([None; 4]).collect();
        if let Some(id) = ends[3] {
            bail!("llama.cpp ends texts at 3 tokens at most, but `eos_token_id` names {id} too");
        }
        let ids = [
            ("bos_token_id", bos.or(spec.bos_token_id)),
            ("eos_token_id", ends[0]),
            ("eot_token_id", ends[1]),
            ("eom_token_id", ends[2]),
            ("unknown_token_id", unknown),
        ];
        let ids = ids.into_iter().filter_map(|(key, id)| Some((key, Value::U32(id?))));
        let flags = [("add_bos_token", bos.is_some()), ("add_eos_token", false)];
        let flags = flags.into_iter().map(|(key, flag)| (key, Value::Bool(flag)));
        Ok(flags.chain(ids).map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect())
    }

    /// Each token's text and kind. Rows of the base without a token get a name of their own.
    fn tokens(&self, count: usize) -> Result<(Vec<String>, Vec<i32>)> {
        let mut tokens: Vec<String> = (0..count).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED; count];
        let mut set = |id: usize, text: &str, kind: i32| {
            let place = tokens.get_mut(id).zip(types.get_mut(id));
            let (token, known) = place.with_context(|| {
                format!("token `{text}` has the id {id}, but the base has {count} tokens")
            })?;
            (*token, *known) = (text.to_owned(), kind);
            Ok::<(), anyhow::Error>(())
        };
        let model = &self.json["model"];
        let unknown = model["unk_token"].as_str();
        let vocab = model["vocab"].as_object().context("`model.vocab` must be an object")?;
        for (text, id) in vocab {
            let id = id.as_u64().with_context(|| format!("the id of `{text}` must be a number"))?;
            let is_byte = matches!(self.kind, Kind::SentencePiece { .. }) && is_byte(text);
            let kind = match () {
                () if Some(text.as_str()) == unknown => UNKNOWN,
                () if is_byte => BYTE,
                () => NORMAL,
            };
            set(id as usize, text, kind)?;
        }
        for token in self.json["added_tokens"].as_array().into_iter().flatten() {
            let (id, text) = (token["id"].as_u64(), token["content"].as_str());
            let (id, text) = id.zip(text).context("an added token needs `id` and `content`")?;
            if let Some(key) =
                ["lstrip", "rstrip", "single_word"].into_iter().find(|key| token[*key] == true)
            {
                bail!("llama.cpp cannot follow `{key}` of the added token `{text}`");
            }
            let kind = match () {
                () if Some(text) == unknown => UNKNOWN,
                () if token["special"] == true => CONTROL,
                () => USER_DEFINED,
            };
            set(id as usize, text, kind)?;
        }
        Ok((tokens, types))
    }
}

/// Whether a token is SentencePiece's for a byte, such as `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

fn merges(model: &Json) -> Result<Vec<(&str, &str)>> {
    let merges = model["merges"].as_array().context("`model.merges` must be a list")?;
    merges
        .iter()
        .map(|merge| {
            let pair = match merge {
                Json::String(text) => text.split_once(' '),
                Json::Array(pair) => match &pair[..] {
                    [Json::String(a), Json::String(b)] => Some((a.as_str(), b.as_str())),
                    _ => None,
                },
                _ => None,
            };
            pair.with_context(|| format!("`model.merges` has {merge}, which is no pair"))
        })
        .collect()
}

fn kind(json: &Json) -> Result<Kind> {
    let model = &json["model"];
    match model["type"].as_str() {
        Some("BPE") => {}
        found => bail!("`model.type` must be `BPE`, got `{}`", found.unwrap_or("none")),
    }
    if let Some(key) = ABSENT.into_iter().find(|key| !is_empty(&model[*key])) {
        bail!("`model.{key}` is {}, which llama.cpp cannot follow", model[key]);
    }
    if model["byte_fallback"] == true {
        return sentence_piece_kind(json);
    }
    byte_level_kind(json)
}

fn byte_level_kind(json: &Json) -> Result<Kind> {
    let normalizer = &json["normalizer"];
    if !normalizer.is_null() && !is_nfc(normalizer) {
        bail!("`normalizer` is {normalizer}, which llama.cpp cannot follow");
    }
    let pre = &json["pre_tokenizer"];
    let unknown = || anyhow!("`pre_tokenizer` is {pre}, by which llama.cpp splits no text");
    let (last, first): (&Json, Vec<&Json>) = match pre["pretokenizers"].as_array() {
        None => (pre, vec![]),
        Some(all) => {
            let (last, first) = all.split_last().ok_or_else(unknown)?;
            (last, first.iter().collect())
        }
    };
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return Err(unknown());
    }
    let ignores_merges = json["model"]["ignore_merges"] == true;
    let has_pattern = last["use_regex"] != false;
    let splits = |rule: &Json, pattern: &str| {
        rule["type"] == "Split"
            && rule["pattern"]["Regex"] == pattern
            && rule["behavior"] == "Isolated"
            && rule["invert"] != true
    };
    let [qwen2, llama3] = SPLIT_PATTERNS;
    let name = match (&first[..], has_pattern) {
        ([], true) if !ignores_merges => "gpt-2",
        ([digits], true) if !ignores_merges => {
            let is_single = digits["type"] == "Digits" && digits["individual_digits"] == true;
            if is_single { "smollm" } else { return Err(unknown()) }
        }
        ([split], false) if splits(split, qwen2) && !ignores_merges => "qwen2",
        ([split], false) if splits(split, llama3) && ignores_merges => "llama-bpe",
        ([split], false) if splits(split, llama3) => "smaug-bpe",
        _ if ignores_merges => {
            bail!("`model.ignore_merges` is true, which llama.cpp knows of Llama 3's rule alone")
        }
        _ => return Err(unknown()),
    };
    Ok(Kind::ByteLevel(name))
}

fn sentence_piece_kind(json: &Json) -> Result<Kind> {
    let (normalizer, pre) = (&json["normalizer"], &json["pre_tokenizer"]);
    let rules: Vec<&Json> = match normalizer["normalizers"].as_array() {
        Some(rules) => rules.iter().collect(),
        None if normalizer.is_null() => vec![],
        None => vec![normalizer],
    };
    let prepends = |rule: &&Json| rule["type"] == "Prepend" && rule["prepend"] == "▁";
    let replaces = |rule: &&Json| {
        rule["type"] == "Replace" && rule["pattern"]["String"] == " " && rule["content"] == "▁"
    };
    if let Some(rule) = rules.iter().find(|rule| !prepends(rule) && !replaces(rule)) {
        bail!("`normalizer` has {rule}, which llama.cpp cannot follow");
    }
    let by_rules = rules.iter().any(prepends);
    let has_spaces = rules.iter().any(replaces);
    if pre.is_null() && has_spaces {
        return Ok(Kind::SentencePiece { has_prefix: by_rules });
    }
    let is_metaspace =
        pre["type"] == "Metaspace" && pre["replacement"] == "▁" && pre["split"] == false;
    match pre["prepend_scheme"].as_str() {
        Some("first" | "always") if is_metaspace && !by_rules => {
            Ok(Kind::SentencePiece { has_prefix: true })
        }
        Some("never") if is_metaspace => Ok(Kind::SentencePiece { has_prefix: by_rules }),
        _ => bail!("`pre_tokenizer` is {pre}, by which llama.cpp splits no text"),
    }
}

fn is_nfc(normalizer: &Json) -> bool {
    normalizer["type"] == "NFC"
}
