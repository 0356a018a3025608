//! The documents of a dataset that ask for an answer, cut into what is given and what is to come.

use super::dataset::TokenDataset;
use super::token_file::{Document, NO_EXPERT, TokenFile};

/// A document that asks for an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// The tokens of the prompt, or of the conversation up to the assistant's last turn. Start
    /// tokens are among them.
    pub prompt: Vec<i64>,
    /// The tokens of the answer, with the token that ends it.
    pub reference: Vec<i64>,
    /// The expert that the record names, where -1 is the base alone; `None` if it names none.
    pub expert: Option<i64>,
}

impl TokenDataset {
    /// Whether some document is a conversation.
    pub fn has_conversations(&self) -> bool {
        self.domains.iter().any(|domain| {
            let blocks = (0..domain.blocks.num_blocks()).map(|block| domain.blocks.get(block));
            blocks.flatten().any(|piece| {
                let document = piece.document as usize;
                self.files[piece.file as usize].documents[document].num_spans > 0
            })
        })
    }

    /// The first documents of a domain, in the order of its files, that have a prompt or are
    /// conversations.
    pub fn answered(&self, domain: usize, limit: usize) -> Vec<Answered> {
        self.documents(domain)
            .filter_map(|(file, document)| answered(file, document))
            .take(limit)
            .collect()
    }

    /// The same of documents that may have no prompt, each of which is then cut in the middle, or
    /// after `most` tokens if that comes before.
    pub fn begun(&self, domain: usize, limit: usize, most: u32) -> Vec<Answered> {
        let begun = self.documents(domain).filter_map(|(file, document)| {
            let middle = (document.num_tokens / 2).min(most);
            let cut = || (middle > 0).then(|| parts(file, document, middle, document.num_tokens));
            answered(file, document).or_else(cut)
        });
        begun.take(limit).collect()
    }

    /// The documents of a domain, in the order of its files.
    pub(super) fn documents(&self, domain: usize) -> impl Iterator<Item = (&TokenFile, &Document)> {
        let blocks = &self.domains[domain].blocks;
        let pieces = (0..blocks.num_blocks()).flat_map(|block| blocks.get(block));
        let mut documents: Vec<(u32, u32)> =
            pieces.map(|piece| (piece.file, piece.document)).collect();
        documents.sort_unstable();
        documents.dedup();
        documents.into_iter().map(|(file, document)| {
            let file: &TokenFile = &self.files[file as usize];
            (file, &file.documents[document as usize])
        })
    }
}

fn answered(file: &TokenFile, document: &Document) -> Option<Answered> {
    // a conversation has its answer in the last of its spans
    let (start, end) = match file.learned(document).last() {
        Some(span) => (span.start, span.end),
        None => (document.prompt_len, document.num_tokens),
    };
    (start > 0).then(|| parts(file, document, start, end))
}

/// A document up to `start`, and from there to `end`.
fn parts(file: &TokenFile, document: &Document, start: u32, end: u32) -> Answered {
    let mut tokens = Vec::with_capacity(document.num_tokens as usize);
    file.tokens.read(document.start, document.num_tokens as usize, &mut tokens);
    let of = |range: std::ops::Range<u32>| {
        tokens[range.start as usize..range.end as usize].iter().map(|id| i64::from(*id)).collect()
    };
    let expert = (document.expert != NO_EXPERT).then_some(i64::from(document.expert));
    Answered { prompt: of(0..start), reference: of(start..end), expert }
}
