//! The blocks of all domains, and batches of them.

use std::sync::Arc;

use super::order::{BlockId, Mix};
use super::pack::{self, Blocks, DomainCounts, Piece};
use super::token_file::{BASE_EXPERT, Document, NO_DOMAIN, NO_EXPERT, TokenFile, Tokens};
use crate::config::{LossOn, Mixing, OnExhausted};

/// The label of a position without loss.
pub const IGNORED_LABEL: i64 = -100;

/// The document id of padding.
pub const PADDING_DOCUMENT: i64 = -1;

/// Packed blocks of documents, by domain.
#[derive(Debug)]
pub struct TokenDataset {
    /// Positions of a block.
    pub seq_len: usize,
    /// The domains; a [`BlockId`] counts in this order.
    pub domains: Vec<Domain>,
    /// What share of an epoch's blocks each domain gets.
    pub mixing: Mixing,
    /// What happens when a domain is through before the others.
    pub on_exhausted: OnExhausted,
    files: Vec<Arc<TokenFile>>,
    encoding: blake3::Hash,
}

/// One kind of text. A block holds documents of one domain only.
#[derive(Debug)]
pub struct Domain {
    /// Its name in tables and metrics.
    pub name: String,
    /// How often an epoch passes over it, or a factor of its share, as the dataset's `mixing` says.
    pub weight: f64,
    /// What its files hold.
    pub counts: DomainCounts,
    record_experts: RecordExperts,
    blocks: Blocks,
    fingerprint: blake3::Hash,
}

/// Which experts the records of some documents name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordExperts {
    /// Documents whose record names none; those of plain text files are among them.
    pub documents_without: u64,
    /// The largest index that a record names, where `__base__` counts as -1; `None` if none names
    /// one.
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

/// A domain's documents before they are packed.
#[derive(Debug, Default)]
pub(super) struct Selection {
    pub name: String,
    pub weight: f64,
    pub documents: Vec<DocumentRef>,
    pub counts: DomainCounts,
}

impl Selection {
    /// Adds the documents of `other`, which is counted likewise.
    pub fn append(&mut self, other: Self) {
        self.documents.extend(other.documents);
        self.counts.records += other.counts.records;
        self.counts.skipped_empty += other.counts.skipped_empty;
        self.counts.skipped_bad += other.counts.skipped_bad;
        self.counts.skipped_other_domain += other.counts.skipped_other_domain;
    }
}

/// A document by its file in the dataset and its index in the file.
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

/// Rows of equal length for the model, row by row. Padding has input 0, position 0, label
/// [`IGNORED_LABEL`], document [`PADDING_DOCUMENT`] and expert -1 and is no prompt; it follows a
/// row's documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Rows `b`, one block each.
    pub num_rows: usize,
    /// Positions `t` of a row.
    pub seq_len: usize,
    /// Tokens that are read, `[b, t]`.
    pub input_ids: Vec<i64>,
    /// What each position is to predict, `[b, t]`: the document's next token, so they are not to be
    /// shifted again. The last token of a document is a target only, never an input.
    pub labels: Vec<i64>,
    /// Positions within the piece of a document, from 0, `[b, t]`.
    pub position_ids: Vec<i64>,
    /// Index of the piece within its row, `[b, t]`: attention stays within equal ids.
    pub document_ids: Vec<i64>,
    /// The expert that the position's record names, from 0, `[b, t]`; -1 for `__base__` and where
    /// the record names none ([`TokenDataset::record_experts`] says whether there are such).
    pub expert_ids: Vec<i64>,
    /// What sequence-level routing averages over, `[b, t]`: the positions that read a token of their
    /// document's prompt, learned or not; in a piece without any (of a `text`, or one that begins
    /// after the prompt) all of its positions.
    pub prompt: Vec<bool>,
    /// The domain of each row, `[b]`, as an index in [`TokenDataset::domains`].
    pub domains: Vec<u32>,
}

impl Batch {
    /// Positions with loss.
    pub fn label_tokens(&self) -> u64 {
        self.labels.iter().filter(|label| **label != IGNORED_LABEL).count() as u64
    }
}

/// A document that is already tokenized, for [`TokenDataset::in_memory`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryDocument {
    /// Its tokens, with the end token if it is to have one.
    pub tokens: Vec<u32>,
    /// How many of them are a prompt.
    pub prompt_len: u32,
    /// The expert that is for it, from 0, or -1 for the base alone; `None` = it names none.
    pub expert: Option<i64>,
}

/// A domain of such documents.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryDomain {
    /// Its name.
    pub name: String,
    /// How often an epoch passes over it, or a factor of its share.
    pub weight: f64,
    /// Its documents.
    pub documents: Vec<MemoryDocument>,
}

impl TokenDataset {
    /// Packs the selected documents of `files`; `encoding` stands for how they became tokens. The
    /// mixing is the default one.
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
        Self { seq_len, domains, mixing, on_exhausted, files, encoding }
    }

    /// A dataset of documents that are in memory, for tests, benchmarks and generated data. Its mixing
    /// is the default one until it is set.
    ///
    /// # Panics
    /// If `seq_len` is 0, a prompt is longer than its document, or an expert is below -1 or no `i32`.
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
            });
            files.push(Arc::new(memory_file(&domain.documents)));
        }
        Self::new(selections, files, seq_len, loss_on, blake3::hash(b"in memory"))
    }

    /// Which experts the records of the documents in the blocks name.
    pub fn record_experts(&self) -> RecordExperts {
        let experts = self.domains.iter().map(|domain| domain.record_experts);
        experts.fold(RecordExperts::default(), |sum, of| RecordExperts {
            documents_without: sum.documents_without + of.documents_without,
            largest: sum.largest.max(of.largest),
        })
    }

    /// Blocks of all domains.
    pub fn num_blocks(&self) -> usize {
        self.domains.iter().map(|domain| domain.blocks.num_blocks()).sum()
    }

    /// The share of the blocks that each domain is to have in training, by `mixing`; they sum to 1.
    /// A domain without blocks has 0.
    pub fn mix(&self) -> Vec<f64> {
        self.epoch_mix().shares()
    }

    /// The blocks of an epoch (from 0) in training order: a function of `seed` and `epoch`, and of
    /// what [`fingerprint`](Self::fingerprint) covers.
    ///
    /// In each prefix of n blocks, a domain with share s of the [`mix`](Self::mix) of D domains has
    /// n s blocks, give or take at most `1 + s (D - 2)`; with [`OnExhausted::End`] as long as no
    /// domain is through. Over the epochs, each block of a domain is used equally often.
    pub fn epoch_order(&self, seed: u64, epoch: u64) -> Vec<BlockId> {
        self.epoch_mix().order(seed, epoch)
    }

    /// The length of [`epoch_order`](Self::epoch_order), which shares make differ between epochs.
    pub fn epoch_blocks(&self, epoch: u64) -> u64 {
        self.epoch_mix().places(epoch).iter().map(|places| places.end - places.start).sum()
    }

    fn epoch_mix(&self) -> Mix {
        let domains = self.domains.iter().map(|domain| (domain.blocks.num_blocks(), domain.weight));
        Mix { domains: domains.collect(), mixing: self.mixing, on_exhausted: self.on_exhausted }
    }

    /// All blocks once, domain by domain.
    pub fn eval_order(&self) -> Vec<BlockId> {
        let domains = (0..).zip(&self.domains);
        domains
            .flat_map(|(domain, of)| {
                (0..of.blocks.num_blocks() as u32).map(move |block| BlockId { domain, block })
            })
            .collect()
    }

    /// Learned targets of a block.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn label_tokens(&self, id: BlockId) -> u64 {
        self.pieces(id).iter().map(Piece::label_tokens).sum()
    }

    /// The blocks as rows.
    ///
    /// # Errors
    /// A cache file cannot be read.
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
                let first_label = len.min(piece.first_label as usize);
                widen(&tokens[first_label + 1..], &mut batch.labels[at + first_label..at + len]);
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

    /// A hash over the tokenizer, the domains, their documents' texts and experts, how they are cut
    /// and how they are mixed: datasets with equal fingerprints have the same blocks in the same
    /// order, wherever their files are.
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
        // one domain by default keeps the order, and so the fingerprint, of before there was mixing
        let is_default = (tag, self.on_exhausted) == (0, OnExhausted::Repeat);
        if self.domains.len() > 1 || !is_default {
            hasher.update(&[tag, self.on_exhausted as u8]);
            hasher.update(&temperature.to_le_bytes());
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
        let Selection { name, weight, documents, mut counts } = selection;
        let seq_len = u32::try_from(seq_len).expect("checked where the options enter");
        let mut pieces = Vec::new();
        let mut record_experts = RecordExperts::default();
        let mut hasher = blake3::Hasher::new();
        let mut experts_hasher = blake3::Hasher::new();
        for reference in documents {
            let document = reference.of(files);
            pack::split(document, reference.file, loss_on, seq_len, &mut pieces, &mut counts);
            if pack::learned(document, loss_on).is_some() {
                record_experts.add(document);
            }
            experts_hasher.update(&document.expert.to_le_bytes());
            hasher.update(&document.content);
            hasher.update(&document.num_tokens.to_le_bytes());
            hasher.update(&document.prompt_len.to_le_bytes());
        }
        hasher.update(&[loss_on as u8]);
        // data without experts keeps the fingerprint that checkpoints already hold
        if record_experts.largest.is_some() {
            hasher.update(experts_hasher.finalize().as_bytes());
        }
        let blocks = pack::pack(pieces, seq_len);
        counts.blocks = blocks.num_blocks() as u64;
        Self { name, weight, counts, record_experts, blocks, fingerprint: hasher.finalize() }
    }

    /// Blocks of this domain.
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
