//! What a person wants to know about a dataset before it is trained on: how long its documents are,
//! whether some are equal, and how some of them look.

use std::collections::HashSet;

use anyhow::Result;
use serde::Serialize;

use super::dataset::TokenDataset;
use super::pack;
use super::token_file::{Document, TokenFile};
use super::tokenize::Tokenizer;

/// The lengths of a domain's documents, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Lengths {
    /// The shortest document.
    pub min: u32,
    /// Half of the documents are at most as long.
    pub median: u32,
    /// 95 % of the documents are at most as long.
    pub p95: u32,
    /// The longest document.
    pub max: u32,
    /// Number of documents that are split, because they do not fit into a block.
    pub num_split: u64,
}

/// A document as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Example {
    /// Number of its tokens.
    pub num_tokens: usize,
    /// Number of tokens that are learned.
    pub num_labels: usize,
    /// Its text in parts, which are learned and not learned in turn.
    pub parts: Vec<ExamplePart>,
}

/// A part of a document's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExamplePart {
    /// The text, with special tokens as the tokenizer writes them.
    pub text: String,
    /// Whether its tokens are learned.
    pub is_learned: bool,
}

impl TokenDataset {
    /// The lengths of a domain's documents; `None` if it has none.
    pub fn lengths(&self, domain: usize) -> Option<Lengths> {
        let documents = self.documents(domain);
        let mut lengths: Vec<u32> = documents.map(|(_, document)| document.num_tokens).collect();
        lengths.sort_unstable();
        // the nearest rank
        let quantile = |percent: usize| lengths[(lengths.len() * percent).div_ceil(100) - 1];
        let is_split = |tokens: &&u32| **tokens as usize > self.seq_len + 1;
        (!lengths.is_empty()).then(|| Lengths {
            min: lengths[0],
            median: quantile(50),
            p95: quantile(95),
            max: quantile(100),
            num_split: lengths.iter().filter(is_split).count() as u64,
        })
    }

    /// Number of a domain's documents whose text an earlier document of the domain has.
    pub fn num_duplicates(&self, domain: usize) -> u64 {
        let mut seen = HashSet::new();
        let documents = self.documents(domain);
        documents.filter(|(_, document)| !seen.insert(document.content)).count() as u64
    }

    /// Number of a domain's documents whose text a document of another domain has.
    pub fn num_shared(&self, domain: usize) -> u64 {
        let others = (0..self.domains.len()).filter(|other| *other != domain);
        let others: HashSet<[u8; 16]> = others
            .flat_map(|other| self.documents(other).map(|(_, document)| document.content))
            .collect();
        let documents = self.documents(domain);
        documents.filter(|(_, document)| others.contains(&document.content)).count() as u64
    }

    /// The first documents of a domain, in the order of its files.
    ///
    /// # Errors
    /// Tokens that `tokenizer` does not know.
    pub fn examples(
        &self,
        domain: usize,
        limit: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<Example>> {
        let documents = self.documents(domain).take(limit);
        documents.map(|(file, document)| self.example(file, document, tokenizer)).collect()
    }

    fn example(
        &self,
        file: &TokenFile,
        document: &Document,
        tokenizer: &Tokenizer,
    ) -> Result<Example> {
        let num_tokens = document.num_tokens as usize;
        let mut tokens = Vec::with_capacity(num_tokens);
        file.tokens.read(document.start, num_tokens, &mut tokens);
        let mut is_learned = vec![false; num_tokens];
        for range in pack::learned(file, document, self.loss_on) {
            // the target of a position is the token behind it
            is_learned[range.start as usize + 1..range.end as usize + 1].fill(true);
        }
        let num_labels = is_learned.iter().filter(|is_learned| **is_learned).count();
        let mut parts = Vec::new();
        let (mut start, mut before) = (0, String::new());
        for run in is_learned.chunk_by(|a, b| a == b) {
            let end = start + run.len();
            // a token may have another text at the start of a text
            let whole = tokenizer.decode(&tokens[..end])?;
            let text = match whole.strip_prefix(&before) {
                Some(text) => text.to_owned(),
                // a character's bytes are on both sides
                None => tokenizer.decode(&tokens[start..end])?,
            };
            parts.push(ExamplePart { text, is_learned: run[0] });
            (start, before) = (end, whole);
        }
        Ok(Example { num_tokens, num_labels, parts })
    }
}
