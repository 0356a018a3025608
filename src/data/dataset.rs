//! The blocks of all domains, and batches made of them.

use std::sync::Arc;

use super::kinds::{self, RecordKind};
use super::order::{BlockId, Mix};
use super::pack::{self, Blocks, DomainCounts, Piece};
use super::token_file::{BASE_EXPERT, Document, NO_DOMAIN, NO_EXPERT, TokenFile, Tokens};
use crate::config::{LossOn, Mixing, OnExhausted};

/// The label of a position without loss, as in PyTorch and transformers.
pub const IGNORED_LABEL: i64 = -100;

/// The document id of padding positions.
pub const PADDING_DOCUMENT: i64 = -1;

/// Documents packed into blocks, by domain.
#[derive(Debug)]
pub struct TokenDataset {
    /// Number of positions in a block.
    pub seq_len: usize,
    /// The domains. [`BlockId::domain`] is an index into this list.
    pub domains: Vec<Domain>,
    /// What share of an epoch's blocks each domain gets.
    pub mixing: Mixing,
    /// What happens when all blocks of a domain have been used before the epoch ends.
    pub on_exhausted: OnExhausted,
    pub(super) loss_on: LossOn,
    pub(super) files: Vec<Arc<TokenFile>>,
    encoding: blake3::Hash,
}

/// One kind of text. A block holds documents of one domain only.
#[derive(Debug)]
pub struct Domain {
    /// Its name in tables and metrics.
    pub name: String,
    /// How often an epoch passes over the domain, or a factor of its share, depending on `mixing`.
    pub weight: f64,
    /// What its files contain.
    pub counts: DomainCounts,
    /// What kinds of records its files hold, of any domain. A part that was held out of other data
    /// has none.
    pub kinds: Vec<RecordKind>,
    record_experts: RecordExperts,
    pub(super) blocks: Blocks,
    fingerprint: blake3::Hash,
}

/// Which experts the records of a set of documents name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordExperts {
    /// Number of documents whose record names no expert; those of plain text files are among them.
    pub documents_without: u64,
    /// The largest expert index that a record names, where `__base__` counts as -1; `None` if no
    /// record names an expert.
    pub largest: Option<i64>,
}

impl RecordExperts {
    fn add(&mut self, document: &Document) {
        match document.expert {
            NO_EXPERT => self.documents_without += 1,
            expert => self.largest = self.largest.max(Some(expert.into())),
        }
    }
}

/// The documents of a domain before they are packed.
#[derive(Debug, Default)]
pub(super) struct Selection {
    pub name: String,
    pub weight: f64,
    pub documents: Vec<DocumentRef>,
    pub counts: DomainCounts,
    pub kinds: Vec<RecordKind>,
}

impl Selection {
    /// Adds the documents and counts of `other`.
    pub fn append(&mut self, other: Self) {
        self.documents.extend(other.documents);
        kinds::add(&mut self.kinds, &other.kinds);
        self.counts.records += other.counts.records;
        self.counts.skipped_empty += other.counts.skipped_empty;
        self.counts.skipped_bad += other.counts.skipped_bad;
        self.counts.skipped_other_domain += other.counts.skipped_other_domain;
    }
}

/// Identifies a document by its file in the dataset and its index in that file.
#[derive(Debug, Clone, Copy)]
pub(super) struct DocumentRef {
    pub file: u32,
    pub document: u32,
}

impl DocumentRef {
    pub fn of(self, files: &[Arc<TokenFile>]) -> &Document {
        &files[self.file as usize].documents[self.document as usize]
    }
}

/// The input of a forward pass: rows of equal length, one after another.
///
/// Padding follows a row's documents. It has input 0, position 0, label [`IGNORED_LABEL`], document
/// [`PADDING_DOCUMENT`] and expert -1, and does not count as a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Number of rows `b`; each row is one block.
    pub num_rows: usize,
    /// Number of positions `t` in a row.
    pub seq_len: usize,
    /// The tokens that the model reads, `[b, t]`.
    pub input_ids: Vec<i64>,
    /// The token that each position must predict, `[b, t]`. This is the document's next token:
    /// labels are already shifted. The last token of a document is only a target and never an
    /// input.
    pub labels: Vec<i64>,
    /// Each position's index in its piece of a document, from 0, `[b, t]`.
    pub position_ids: Vec<i64>,
    /// The index of the position's piece in its row, `[b, t]`. Positions attend only to positions
    /// with the same id.
    pub document_ids: Vec<i64>,
    /// The expert that the position's record names, from 0, `[b, t]`. It is -1 if the record names
    /// `__base__` or no expert; [`TokenDataset::record_experts`] says whether there are records
    /// that name none.
    pub expert_ids: Vec<i64>,
    /// The positions that sequence-level routing averages over, `[b, t]`: those that read a token
    /// of their document's prompt, whether or not its target is learned. All positions of a piece
    /// count if it has no such position: a piece of a `text`, or one that begins after the prompt.
    pub prompt: Vec<bool>,
    /// The domain of each row, `[b]`, as an index into [`TokenDataset::domains`].
    pub domains: Vec<u32>,
}

impl Batch {
    /// Number of positions with loss.
    pub fn label_tokens(&self) -> u64 {
        self.labels.iter().filter(|label| **label != IGNORED_LABEL).count() as u64
    }
}

/// A tokenized document for [`TokenDataset::in_memory`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryDocument {
    /// Its tokens, including the end token if it has one.
    pub tokens: Vec<u32>,
    /// How many of the tokens belong to the prompt, which comes first.
    pub prompt_len: u32,
    /// The expert that the document is for, from 0, or -1 for the base alone; `None` if it names
    /// none.
    pub expert: Option<i64>,
}

/// A domain of documents in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryDomain {
    /// Its name.
    pub name: String,
    /// How often an epoch passes over the domain, or a factor of its share.
    pub weight: f64,
    /// Its documents.
    pub documents: Vec<MemoryDocument>,
}

impl TokenDataset {
    /// Packs the selected documents of `files`, with the default mixing.
    ///
    /// - `encoding`: a hash of what turned the text into tokens
    pub(super) fn new(
        selections: Vec<Selection>,
        files: Vec<Arc<TokenFile>>,
        seq_len: usize,
        loss_on: LossOn,
        encoding: blake3::Hash,
    ) -> Self {
        let pack = |selection| Domain::new(selection, &files, seq_len, loss_on);
        let domains = selections.into_iter().map(pack).collect();
        let (mixing, on_exhausted) = (Mixing::default(), OnExhausted::default());
        Self { seq_len, domains, mixing, on_exhausted, loss_on, files, encoding }
    }

    /// A dataset of documents in memory, for tests, benchmarks and generated data. It has the
    /// default mixing until `mixing` is set.
    ///
    /// # Panics
    /// If `seq_len` is 0, if a prompt is longer than its document, or if an expert is below -1 or
    /// does not fit into an `i32`.
    pub fn in_memory(seq_len: usize, loss_on: LossOn, domains: Vec<MemoryDomain>) -> Self {
        assert!(seq_len > 0, "a block has at least one position");
        let mut files = Vec::new();
        let mut selections = Vec::new();
        for (file, domain) in (0..).zip(domains) {
            let num_documents = domain.documents.len() as u32;
            let documents = (0..num_documents).map(|document| DocumentRef { file, document });
            selections.push(Selection {
                name: domain.name,
                weight: domain.weight,
                documents: documents.collect(),
                counts: DomainCounts { records: num_documents.into(), ..DomainCounts::default() },
                kinds: vec![],
            });
            files.push(Arc::new(memory_file(&domain.documents)));
        }
        Self::new(selections, files, seq_len, loss_on, blake3::hash(b"in memory"))
    }

    /// Which experts the records of all packed documents name.
    pub fn record_experts(&self) -> RecordExperts {
        let experts = self.domains.iter().map(|domain| domain.record_experts);
        experts.fold(RecordExperts::default(), |sum, of| RecordExperts {
            documents_without: sum.documents_without + of.documents_without,
            largest: sum.largest.max(of.largest),
        })
    }

    /// Number of blocks in all domains.
    pub fn num_blocks(&self) -> usize {
        self.domains.iter().map(|domain| domain.blocks.num_blocks()).sum()
    }

    /// The share of the training blocks that `mixing` gives each domain; the shares sum to 1. A
    /// domain without blocks has share 0.
    pub fn mix(&self) -> Vec<f64> {
        self.epoch_mix().shares()
    }

    /// The blocks of an epoch (from 0) in training order. The order depends only on `seed`, on
    /// `epoch` and on what [`fingerprint`](Self::fingerprint) covers.
    ///
    /// Among the first n blocks of an epoch, a domain with share s of the [`mix`](Self::mix) has
    /// `n s` blocks, give or take at most `1 + s (D - 2)`, where D is the number of domains. With
    /// [`OnExhausted::End`], this holds until the first domain has no blocks left. Over the epochs,
    /// two blocks of a domain are used equally often, or one of them once more than the other.
    pub fn epoch_order(&self, seed: u64, epoch: u64) -> Vec<BlockId> {
        self.epoch_mix().order(seed, epoch)
    }

    /// The length of [`epoch_order`](Self::epoch_order). It can differ between epochs, since a
    /// domain's part of an epoch need not be a whole number of blocks.
    pub fn epoch_blocks(&self, epoch: u64) -> u64 {
        self.epoch_mix().places(epoch).iter().map(|places| places.end - places.start).sum()
    }

    fn epoch_mix(&self) -> Mix {
        let domains = self.domains.iter().map(|domain| (domain.blocks.num_blocks(), domain.weight));
        Mix { domains: domains.collect(), mixing: self.mixing, on_exhausted: self.on_exhausted }
    }

    /// Every block once, domain by domain.
    pub fn eval_order(&self) -> Vec<BlockId> {
        let domains = (0..).zip(&self.domains);
        domains
            .flat_map(|(domain, of)| {
                (0..of.blocks.num_blocks() as u32).map(move |block| BlockId { domain, block })
            })
            .collect()
    }

    /// Number of learned targets in a block.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn label_tokens(&self, id: BlockId) -> u64 {
        self.pieces(id).iter().map(|piece| u64::from(piece.num_labels)).sum()
    }

    /// A batch with the given blocks as rows.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn batch(&self, ids: &[BlockId]) -> Batch {
        let len = ids.len() * self.seq_len;
        let mut batch = Batch {
            num_rows: ids.len(),
            seq_len: self.seq_len,
            input_ids: vec![0; len],
            labels: vec![IGNORED_LABEL; len],
            position_ids: vec![0; len],
            document_ids: vec![PADDING_DOCUMENT; len],
            expert_ids: vec![BASE_EXPERT.into(); len],
            prompt: vec![false; len],
            domains: ids.iter().map(|id| id.domain).collect(),
        };
        let mut tokens = Vec::with_capacity(self.seq_len + 1);
        for (row, id) in ids.iter().enumerate() {
            let mut at = row * self.seq_len;
            for (piece_index, piece) in (0..).zip(self.pieces(*id)) {
                let len = piece.len as usize;
                tokens.clear();
                let file = &self.files[piece.file as usize];
                file.tokens.read(piece.start, len + 1, &mut tokens);
                let place = at..at + len;
                widen(&tokens[..len], &mut batch.input_ids[place.clone()]);
                for range in piece.learned(file, self.loss_on) {
                    let range = range.start as usize..range.end as usize;
                    let labels = &mut batch.labels[at + range.start..at + range.end];
                    widen(&tokens[range.start + 1..range.end + 1], labels);
                }
                let positions = batch.position_ids[place.clone()].iter_mut();
                (0..).zip(positions).for_each(|(position, at)| *at = position);
                batch.document_ids[place.clone()].fill(piece_index);
                batch.expert_ids[place].fill(piece.expert.max(BASE_EXPERT).into());
                let num_prompt = len.min(piece.num_prompt() as usize);
                batch.prompt[at..at + num_prompt].fill(true);
                at += len;
            }
        }
        batch
    }

    /// A hash over the tokenizer, the domains, the texts and experts of their documents, and the
    /// way these are cut and mixed. Datasets with equal fingerprints have the same blocks in the
    /// same order, wherever their files are.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.encoding.as_bytes());
        hasher.update(&(self.seq_len as u64).to_le_bytes());
        for domain in &self.domains {
            hasher.update(&(domain.name.len() as u64).to_le_bytes());
            hasher.update(domain.name.as_bytes());
            hasher.update(&domain.weight.to_le_bytes());
            hasher.update(domain.fingerprint.as_bytes());
        }
        let (tag, temperature) = match self.mixing {
            Mixing::Proportional => (0_u8, 0.0),
            Mixing::Temperature(temperature) => (1, temperature),
            Mixing::Weights => (2, 0.0),
            Mixing::Interleaved => (3, 0.0),
        };
        // with a single domain and the default mixing, the fingerprint stays as it was in
        // checkpoints made before there were mixings
        let is_default = (tag, self.on_exhausted) == (0, OnExhausted::Repeat);
        if self.domains.len() > 1 || !is_default {
            hasher.update(&[tag, self.on_exhausted as u8]);
            hasher.update(&temperature.to_le_bytes());
        }
        hasher.finalize().to_string()
    }

    /// A fingerprint of what is evaluated on: as [`Self::fingerprint`], but without the weights and
    /// the mixing, which only order the blocks of training.
    pub fn content_fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.encoding.as_bytes());
        hasher.update(&(self.seq_len as u64).to_le_bytes());
        for domain in &self.domains {
            hasher.update(&(domain.name.len() as u64).to_le_bytes());
            hasher.update(domain.name.as_bytes());
            hasher.update(domain.fingerprint.as_bytes());
        }
        hasher.finalize().to_string()
    }

    fn pieces(&self, id: BlockId) -> &[Piece] {
        self.domains[id.domain as usize].blocks.get(id.block as usize)
    }
}

impl Domain {
    fn new(
        selection: Selection,
        files: &[Arc<TokenFile>],
        seq_len: usize,
        loss_on: LossOn,
    ) -> Self {
        let Selection { name, weight, documents, mut counts, kinds } = selection;
        let seq_len = u32::try_from(seq_len).expect("checked where the options enter");
        let mut pieces = Vec::new();
        let mut record_experts = RecordExperts::default();
        let mut hasher = blake3::Hasher::new();
        let mut experts_hasher = blake3::Hasher::new();
        let mut spans_hasher = blake3::Hasher::new();
        for DocumentRef { file: file_index, document: index } in documents {
            let file = &files[file_index as usize];
            let document = &file.documents[index as usize];
            let of = (&**file, file_index);
            pack::split(of, index, loss_on, seq_len, &mut pieces, &mut counts);
            if pack::learned(file, document, loss_on).next().is_some() {
                record_experts.add(document);
            }
            for span in file.learned(document) {
                spans_hasher.update(&document.num_spans.to_le_bytes());
                spans_hasher.update(&span.start.to_le_bytes());
                spans_hasher.update(&span.end.to_le_bytes());
            }
            experts_hasher.update(&document.expert.to_le_bytes());
            hasher.update(&document.content);
            hasher.update(&document.num_tokens.to_le_bytes());
            hasher.update(&document.prompt_len.to_le_bytes());
        }
        hasher.update(&[loss_on as u8]);
        // data that names no experts keeps the fingerprint that existing checkpoints hold
        if record_experts.largest.is_some() {
            hasher.update(experts_hasher.finalize().as_bytes());
        }
        // and so does data without conversations
        if spans_hasher.count() > 0 {
            hasher.update(spans_hasher.finalize().as_bytes());
        }
        let blocks = pack::pack(pieces, seq_len);
        counts.blocks = blocks.num_blocks() as u64;
        let fingerprint = hasher.finalize();
        Self { name, weight, counts, kinds, record_experts, blocks, fingerprint }
    }

    /// Number of blocks in this domain.
    pub fn num_blocks(&self) -> usize {
        self.blocks.num_blocks()
    }
}

fn widen(tokens: &[u32], ids: &mut [i64]) {
    tokens.iter().zip(ids).for_each(|(&token, id)| *id = token.into());
}

fn memory_file(documents: &[MemoryDocument]) -> TokenFile {
    let mut file = TokenFile::default();
    let mut tokens: Vec<u32> = Vec::new();
    for document in documents {
        assert!(document.prompt_len as usize <= document.tokens.len(), "a prompt is a prefix");
        let bytes: Vec<u8> = document.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let mut content = [0; 16];
        content.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..16]);
        file.documents.push(Document {
            start: tokens.len() as u64,
            num_tokens: document.tokens.len() as u32,
            prompt_len: document.prompt_len,
            first_span: 0,
            num_spans: 0,
            record_domain: NO_DOMAIN,
            expert: document.expert.map_or(NO_EXPERT, memory_expert),
            content,
        });
        tokens.extend(&document.tokens);
    }
    file.tokens = Tokens::Memory(tokens);
    file
}

fn memory_expert(index: i64) -> i32 {
    let index = i32::try_from(index).expect("an expert's index fits into an i32");
    assert!(index >= BASE_EXPERT, "an expert is an index from 0, or -1");
    index
}
