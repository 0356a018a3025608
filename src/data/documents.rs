//! Reads a file of records into a [`TokenFile`], which holds the tokens of its documents.
//!
//! The tokens of a document are those of its text, or those of its prompt followed by those of its
//! completion; the end token follows. Prompt and completion are encoded separately, so that no
//! token crosses the border between them and the prompt's tokens do not depend on the completion.
//! The completion is encoded as a continuation, so that it begins just where the prompt ends.
//!
//! The tokenizer's start tokens stand in front of the document, unless its text spells them or it
//! has no text. They belong to the prompt if there is one. In front of a text, the first of them is
//! never a label, since nothing precedes it; any others are learned like the text.
//!
//! The file is read once, in batches of 1 MiB per thread and at most 16 MiB. Besides the tokens,
//! only one batch is in memory.

use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, bail};

use crate::config::OnBadRecord;

use super::record;
use super::source::{Format, Lines, SourceFile};
use super::token_file::{Document, NO_DOMAIN, NO_EXPERT, TokenFile, Tokens};
use super::tokenize::{Place, Tokenizer};

/// Number of bytes that are read and encoded at once, for each thread.
const BATCH_BYTES_PER_THREAD: usize = 1 << 20;

/// How a file is turned into tokens.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub tokenizer: &'a Tokenizer,
    /// The token that ends each document, if there is one.
    pub eos_token_id: Option<u32>,
    pub on_bad_record: OnBadRecord,
    pub num_threads: usize,
}

/// One contribution of a line to the document under construction.
enum Step {
    /// The next part of the document's text.
    Part(Part),
    /// The document is complete; its record has this `domain` and `expert`.
    End { domain: Option<String>, expert: Option<i64> },
    /// The record is malformed; the part of its document that was added before is removed.
    Bad,
}

/// A part of a document's text.
struct Part {
    text: String,
    place: Place,
    of_prompt: bool,
}

impl Step {
    fn part(&self) -> Option<&Part> {
        match self {
            Self::Part(part) => Some(part),
            Self::End { .. } | Self::Bad => None,
        }
    }
}

/// Reads all documents of `source`.
///
/// - `lines`: the lines of its decompressed content
/// - `on_progress`: called after each batch
pub(super) fn read_documents(
    source: &SourceFile,
    lines: Lines,
    reading: Reading,
    on_progress: &dyn Fn(),
) -> Result<TokenFile> {
    let mut steps = Steps {
        source,
        lines,
        reading,
        text: String::new(),
        has_text: false,
        num_bad: 0,
        batch: vec![],
    };
    let mut builder = Builder::new(reading);
    let batch_bytes = BATCH_BYTES_PER_THREAD * reading.num_threads.clamp(1, 16);
    loop {
        let is_last = !steps.fill(batch_bytes)?;
        let parts = steps.batch.iter().filter_map(|(_, step)| step.part());
        let texts: Vec<_> = parts.map(|part| (part.text.as_str(), part.place)).collect();
        let encoded = reading.tokenizer.encode_all(&texts, reading.num_threads);
        let encoded = encoded.map_err(|(index, error)| {
            let lines = steps.batch.iter().filter(|(_, step)| step.part().is_some());
            let line = lines.map(|(line, _)| *line).nth(index).unwrap_or_default();
            error.context(format!("in `{}:{line}`", source.path.display()))
        })?;
        let mut encoded = encoded.into_iter();
        for (line, step) in steps.batch.drain(..) {
            let ids =
                if step.part().is_some() { encoded.next().unwrap_or_default() } else { vec![] };
            let place = || format!("in `{}:{line}`", source.path.display());
            builder.apply(step, &ids).with_context(place)?;
        }
        on_progress();
        if is_last {
            break;
        }
    }
    builder.file.num_bad = steps.num_bad;
    Ok(builder.finish())
}

/// Reads the steps of a file, each with the number of its line.
struct Steps<'a> {
    source: &'a SourceFile,
    lines: Lines,
    reading: Reading<'a>,
    /// The text of a plain text file that was read but is not yet part of a step.
    text: String,
    /// Whether the document under construction has some text in this or an earlier batch.
    has_text: bool,
    num_bad: u64,
    batch: Vec<(u64, Step)>,
}

impl Steps<'_> {
    /// Fills `batch` with about `num_bytes` of text; returns false at the end of the file.
    fn fill(&mut self, num_bytes: usize) -> Result<bool> {
        let mut line = Vec::new();
        let mut filled = 0;
        while filled < num_bytes {
            let more = self.lines.read(&mut line).with_context(|| {
                let path = self.source.path.display();
                format!("cannot read `{path}` after line {}", self.lines.number)
            })?;
            filled += line.len();
            match self.source.format {
                Format::JsonLines if !more => return Ok(false),
                Format::JsonLines => self.add_record(&line)?,
                Format::Text => {
                    if !self.add_text(&line, more)? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    fn push(&mut self, step: Step) {
        let has_text = |part: &Part| self.has_text || !part.text.is_empty();
        self.has_text = step.part().is_some_and(has_text);
        self.batch.push((self.lines.number, step));
    }

    fn push_part(&mut self, text: String, of_prompt: bool) {
        let place = if self.has_text { Place::Continuation } else { Place::Start };
        self.push(Step::Part(Part { text, place, of_prompt }));
    }

    fn add_record(&mut self, line: &[u8]) -> Result<()> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        match record::parse(line) {
            Err(fault) => self.add_bad(&fault),
            Ok(record) => {
                for prompt in self.reading.tokenizer.cut(record.prompt) {
                    self.push_part(prompt, true);
                }
                for completion in self.reading.tokenizer.cut(record.completion) {
                    self.push_part(completion, false);
                }
                self.push(Step::End { domain: record.domain, expert: record.expert });
                Ok(())
            }
        }
    }

    /// Adds a line of a plain text file, or its end if `more` is false. Returns false when the file
    /// is done.
    fn add_text(&mut self, line: &[u8], more: bool) -> Result<bool> {
        let from = self.text.len();
        match std::str::from_utf8(line) {
            Ok(line) => self.text.push_str(line),
            Err(error) => {
                self.add_bad(&format!("invalid UTF-8 at byte {}", error.valid_up_to() + 1))?;
                return Ok(false);
            }
        }
        let tokenizer = self.reading.tokenizer;
        if more && tokenizer.find_cut(&self.text, from).is_none() {
            return Ok(true);
        }
        let mut parts = tokenizer.cut(std::mem::take(&mut self.text));
        if more {
            self.text = parts.pop().unwrap_or_default();
        }
        for part in parts {
            self.push_part(part, false);
        }
        if !more {
            self.push(Step::End { domain: None, expert: None });
        }
        Ok(more)
    }

    fn add_bad(&mut self, fault: &str) -> Result<()> {
        let place = format!("{}:{}", self.source.path.display(), self.lines.number);
        if self.reading.on_bad_record == OnBadRecord::Fail {
            bail!(
                "`{place}`: {fault}\nhint: `data.on_bad_record = \"skip\"` leaves such records out"
            );
        }
        if self.num_bad == 0 {
            tracing::warn!("malformed records are left out, such as `{place}`: {fault}");
        }
        self.num_bad += 1;
        self.push(Step::Bad);
        Ok(())
    }
}

/// Builds documents from steps.
struct Builder<'a> {
    reading: Reading<'a>,
    file: TokenFile,
    tokens: Vec<u32>,
    /// The index in `tokens` at which the document under construction starts.
    start: usize,
    prompt_len: usize,
    content: blake3::Hasher,
    domains: HashMap<String, u32>,
}

impl<'a> Builder<'a> {
    fn new(reading: Reading<'a>) -> Self {
        Self {
            reading,
            file: TokenFile::default(),
            tokens: Vec::new(),
            start: 0,
            prompt_len: 0,
            content: blake3::Hasher::new(),
            domains: HashMap::new(),
        }
    }

    /// Applies a step whose text has the tokens `ids`.
    fn apply(&mut self, step: Step, ids: &[u32]) -> Result<()> {
        match step {
            Step::Part(part) => {
                if self.tokens.len() == self.start {
                    self.tokens.extend(self.reading.tokenizer.start_tokens_for(ids));
                }
                self.tokens.extend_from_slice(ids);
                if part.of_prompt {
                    self.prompt_len = self.tokens.len() - self.start;
                }
                self.content.update(part.text.as_bytes());
            }
            Step::Bad => {
                self.tokens.truncate(self.start);
                self.begin_document();
            }
            Step::End { domain, expert } => {
                self.tokens.extend(self.reading.eos_token_id);
                let document = self.document(domain, expert)?;
                self.file.documents.push(document);
                self.begin_document();
            }
        }
        Ok(())
    }

    fn begin_document(&mut self) {
        self.start = self.tokens.len();
        self.prompt_len = 0;
        self.content.reset();
    }

    /// The document that has just been completed.
    fn document(&mut self, domain: Option<String>, expert: Option<i64>) -> Result<Document> {
        let narrow = |count: usize| {
            u32::try_from(count)
                .map_err(|_| anyhow!("a document has {count} tokens, more than 2^32"))
        };
        let mut content = [0; 16];
        self.content.finalize_xof().fill(&mut content);
        Ok(Document {
            start: self.start as u64,
            num_tokens: narrow(self.tokens.len() - self.start)?,
            prompt_len: narrow(self.prompt_len)?,
            record_domain: domain.map_or(NO_DOMAIN, |name| self.domain_index(name)),
            expert: expert
                .map_or(NO_EXPERT, |index| index.try_into().expect("`record` has checked it")),
            content,
        })
    }

    fn domain_index(&mut self, name: String) -> u32 {
        let names = &mut self.file.record_domains;
        *self.domains.entry(name).or_insert_with_key(|name| {
            names.push(name.clone());
            (names.len() - 1) as u32
        })
    }

    fn finish(mut self) -> TokenFile {
        self.tokens.shrink_to_fit();
        self.file.tokens = Tokens::Memory(self.tokens);
        self.file
    }
}
