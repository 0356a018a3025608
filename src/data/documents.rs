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
//! A record with `messages` becomes a document too ([`chat`]). It gets neither start tokens nor an
//! end token, since the chat template writes them.
//!
//! The file is read once, in batches of 1 MiB per thread and at most 16 MiB. Besides the tokens,
//! only one batch is in memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context, Result, anyhow, bail};

use crate::chat_template::Conversation;
use crate::config::{FileFormat, OnBadRecord, RecordShape};

use super::chat::{self, ChatOptions, ChatTokens};
use super::parallel;
use super::record::{Content, Record, is_lack_of_keys};
use super::records::Records;
use super::source::{Lines, SourceFile};
use super::token_file::{Document, NO_DOMAIN, NO_EXPERT, TokenFile, Tokens};
use super::tokenize::{Place, Tokenizer};

/// Number of bytes that are read and encoded at once, for each thread.
const BATCH_BYTES_PER_THREAD: usize = 1 << 20;

/// Most text of a file without a place to cut, of which some tokenizers know none. Encoding such a
/// text takes about 150 times its size.
const MAX_UNCUT_BYTES: usize = 16 << 20;

/// The fault of a record without a label.
const NOTHING_TO_LEARN: &str = "has nothing to learn: its text or completion is empty or too short";

/// How a file is turned into tokens.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub tokenizer: &'a Tokenizer,
    /// The token that ends each document but a conversation, if there is one.
    pub eos_token_id: Option<u32>,
    pub chat: &'a ChatOptions,
    pub on_bad_record: OnBadRecord,
    pub num_threads: usize,
}

/// One contribution of a line to the document under construction.
enum Step {
    /// The next part of the document's text.
    Part(Part),
    /// The document is complete; its record is this one.
    End(Origin),
    /// A conversation, which is a whole document.
    Chat(Conversation, Origin),
    /// The record is malformed; the part of its document that was added before is removed.
    Bad,
}

/// A part of a document's text.
struct Part {
    text: String,
    place: Place,
    of_prompt: bool,
}

/// What a document's record says besides its text.
struct Origin {
    domain: Option<String>,
    expert: Option<i64>,
    /// The shape of the record; `None` for a plain text file.
    shape: Option<RecordShape>,
    /// Whether the record has nothing to learn. Its document then has no tokens.
    is_empty: bool,
}

/// What a step's text became.
enum Encoded {
    /// The step has no text.
    Nothing,
    Ids(Vec<u32>),
    Chat(Result<ChatTokens, String>),
}

impl Step {
    fn part(&self) -> Option<&Part> {
        match self {
            Self::Part(part) => Some(part),
            Self::End(_) | Self::Chat(..) | Self::Bad => None,
        }
    }
}

impl Reading<'_> {
    fn encode(&self, step: &Step) -> Result<Encoded> {
        Ok(match step {
            Step::Part(part) => Encoded::Ids(self.tokenizer.encode_at(&part.text, part.place)?),
            Step::Chat(conversation, _) => {
                let ChatOptions { template, base, turns } = self.chat;
                let template = template.as_ref().with_context(|| {
                    format!(
                        "the record has `messages`, but the base `{base}` has no chat template\n\
                         hint: name one by `base.chat_template = \"FILE.jinja\"`, which is \
                         `--chat-template` of `dylora eval`, or give the records a `prompt` and a \
                         `completion`"
                    )
                })?;
                template.check()?;
                Encoded::Chat(chat::encode(conversation, template, *turns, self.tokenizer))
            }
            Step::End(_) | Step::Bad => Encoded::Nothing,
        })
    }
}

/// Reads all documents of `source`.
///
/// - `bytes_read`: grows by the number of bytes read from disk
/// - `on_progress`: called after each batch
pub(super) fn read_documents(
    source: &SourceFile,
    bytes_read: Arc<AtomicU64>,
    reading: Reading,
    on_progress: &dyn Fn(),
) -> Result<TokenFile> {
    let reader = match source.format {
        FileFormat::Text => Reader::Text(Lines::new(source.open(bytes_read)?)),
        _ => Reader::Records(Box::new(Records::open(source, bytes_read)?)),
    };
    let mut steps = Steps {
        source,
        reader,
        number: 0,
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
        let encode = |(_, step): &(u64, Step)| reading.encode(step);
        let encoded = parallel::map(&steps.batch, reading.num_threads, encode);
        for ((number, step), encoded) in std::mem::take(&mut steps.batch).into_iter().zip(encoded) {
            let place = || format!("in `{}`", source.place(number));
            let encoded = encoded.with_context(place)?;
            if let Encoded::Chat(Err(fault)) = &encoded {
                steps.count_bad(number, fault)?;
            }
            let document = builder.apply(step, encoded).with_context(place)?;
            let fails = reading.on_bad_record == OnBadRecord::Fail;
            if fails && document.is_some_and(|document| !TokenFile::has_label(&document)) {
                steps.count_bad(number, NOTHING_TO_LEARN)?;
            }
        }
        on_progress();
        if is_last {
            break;
        }
    }
    builder.file.num_bad = steps.num_bad;
    Ok(builder.finish())
}

/// Reads the steps of a file, each with the number of its line or row.
struct Steps<'a> {
    source: &'a SourceFile,
    reader: Reader<'a>,
    /// The number of the line or row that was read last.
    number: u64,
    reading: Reading<'a>,
    /// The text of a plain text file that was read but is not yet part of a step.
    text: String,
    /// Whether the document under construction has some text in this or an earlier batch.
    has_text: bool,
    num_bad: u64,
    batch: Vec<(u64, Step)>,
}

/// What a file is read as.
enum Reader<'a> {
    Text(Lines),
    Records(Box<Records<'a>>),
}

impl Steps<'_> {
    /// Fills `batch` with about `num_bytes` of text; returns false at the end of the file.
    fn fill(&mut self, num_bytes: usize) -> Result<bool> {
        let mut line = Vec::new();
        let mut filled = 0;
        while filled < num_bytes {
            match &mut self.reader {
                Reader::Text(lines) => {
                    let more = lines.read(&mut line).with_context(|| {
                        let path = self.source.path.display();
                        format!("cannot read `{path}` after line {}", lines.number)
                    })?;
                    (self.number, filled) = (lines.number, filled + line.len());
                    if !self.add_text(&line, more)? {
                        return Ok(false);
                    }
                }
                Reader::Records(records) => {
                    let Some(item) = records.read()? else { return Ok(false) };
                    (self.number, filled) = (item.number, filled + item.num_bytes);
                    match item.record {
                        Ok(record) => self.add_record(record),
                        Err(fault) => self.add_bad(&fault)?,
                    }
                }
            }
        }
        Ok(true)
    }

    fn push(&mut self, step: Step) {
        let has_text = |part: &Part| self.has_text || !part.text.is_empty();
        self.has_text = step.part().is_some_and(has_text);
        self.batch.push((self.number, step));
    }

    fn push_part(&mut self, text: String, of_prompt: bool) {
        let place = if self.has_text { Place::Continuation } else { Place::Start };
        self.push(Step::Part(Part { text, place, of_prompt }));
    }

    fn add_record(&mut self, record: Record) {
        let Record { content, domain, expert, shape } = record;
        let is_empty =
            matches!(&content, Content::Text { completion, .. } if completion.is_empty());
        let origin = Origin { domain, expert, shape: Some(shape), is_empty };
        match content {
            Content::Chat(conversation) => self.push(Step::Chat(conversation, origin)),
            Content::Text { prompt, completion } => {
                for prompt in self.reading.tokenizer.cut(prompt) {
                    self.push_part(prompt, true);
                }
                for completion in self.reading.tokenizer.cut(completion) {
                    self.push_part(completion, false);
                }
                self.push(Step::End(origin));
            }
        }
    }

    /// Adds a line of a plain text file, or its end if `more` is false. Returns false when the file
    /// is done.
    fn add_text(&mut self, line: &[u8], more: bool) -> Result<bool> {
        if line.contains(&0) {
            bail!(
                "`{}` is not plain text: it has a byte 0, as binary data have",
                self.source.place(self.number)
            );
        }
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
            if self.text.len() > MAX_UNCUT_BYTES {
                bail!(
                    "`{}` has {} MiB of text up to line {} that the tokenizer can only encode as a \
                     whole, which would take very much memory\nhint: split it into several files, \
                     or write records into a `.jsonl` file",
                    self.source.path.display(),
                    MAX_UNCUT_BYTES >> 20,
                    self.number
                );
            }
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
            self.push(Step::End(Origin {
                domain: None,
                expert: None,
                shape: None,
                is_empty: false,
            }));
        }
        Ok(more)
    }

    fn add_bad(&mut self, fault: &str) -> Result<()> {
        self.count_bad(self.number, fault)?;
        self.push(Step::Bad);
        Ok(())
    }

    /// Counts the malformed record of a line or row, or fails.
    fn count_bad(&mut self, number: u64, fault: &str) -> Result<()> {
        let place = self.source.place(number);
        if self.reading.on_bad_record == OnBadRecord::Fail {
            let fields = match is_lack_of_keys(fault) {
                true => {
                    "name its keys, as in `fields = { prompt = \"question\", completion = \
                         \"answer\" }`; "
                }
                false => "",
            };
            bail!(
                "`{place}`: {fault}\nhint: {fields}`data.on_bad_record = \"skip\"` leaves such \
                 records out"
            );
        }
        if self.num_bad == 0 {
            tracing::warn!("malformed records are left out, such as `{place}`: {fault}");
        }
        self.num_bad += 1;
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
    /// The index in `file.learned` at which the spans of the document start.
    first_span: usize,
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
            first_span: 0,
            content: blake3::Hasher::new(),
            domains: HashMap::new(),
        }
    }

    /// Applies a step, whose text is now `encoded`. Returns the document that it completes.
    fn apply(&mut self, step: Step, encoded: Encoded) -> Result<Option<Document>> {
        match (step, encoded) {
            (Step::Part(part), Encoded::Ids(ids)) => {
                if self.tokens.len() == self.start {
                    self.tokens.extend(self.reading.tokenizer.start_tokens_for(&ids));
                }
                self.tokens.extend_from_slice(&ids);
                if part.of_prompt {
                    self.prompt_len = self.tokens.len() - self.start;
                }
                self.content.update(part.text.as_bytes());
                Ok(None)
            }
            (Step::End(origin), _) => {
                if origin.is_empty {
                    self.tokens.truncate(self.start);
                    self.prompt_len = 0;
                } else {
                    self.tokens.extend(self.reading.eos_token_id);
                }
                self.end_document(origin).map(Some)
            }
            (Step::Chat(_, origin), Encoded::Chat(Ok(chat))) => {
                self.tokens.extend_from_slice(&chat.ids);
                self.prompt_len = chat.prompt_len;
                self.content.update(chat.text.as_bytes());
                self.file.learned.extend_from_slice(&chat.learned);
                self.end_document(origin).map(Some)
            }
            (Step::Bad | Step::Part(_) | Step::Chat(..), _) => {
                self.tokens.truncate(self.start);
                self.begin_document();
                Ok(None)
            }
        }
    }

    fn end_document(&mut self, origin: Origin) -> Result<Document> {
        if let Some(shape) = origin.shape {
            self.file.shapes[shape as usize] += 1;
        }
        let document = self.document(origin)?;
        self.file.documents.push(document);
        self.begin_document();
        Ok(document)
    }

    fn begin_document(&mut self) {
        self.start = self.tokens.len();
        self.first_span = self.file.learned.len();
        self.prompt_len = 0;
        self.content.reset();
    }

    /// The document that has just been completed.
    fn document(&mut self, Origin { domain, expert, .. }: Origin) -> Result<Document> {
        let num_spans = self.file.learned.len() - self.first_span;
        let narrow = |count: usize| {
            u32::try_from(count)
                .map_err(|_| anyhow!("a document or file has {count} tokens, more than 2^32"))
        };
        let mut content = [0; 16];
        self.content.finalize_xof().fill(&mut content);
        Ok(Document {
            start: self.start as u64,
            num_tokens: narrow(self.tokens.len() - self.start)?,
            prompt_len: narrow(self.prompt_len)?,
            first_span: narrow(self.first_span)?,
            num_spans: narrow(num_spans)?,
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
