//! Decides which documents belong to a domain and which of them are held out.
//!
//! A document is held out if `BLAKE3(seed, content)`, scaled to [0, 1), is below the fraction. This
//! depends only on the seed and the document's text. Equal documents are therefore always on the
//! same side, and adding data moves no document to the other side. The halves of a validation set
//! are drawn in the same way, with a text instead of the seed.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use anyhow::{Result, bail};

use super::dataset::{DocumentRef, Domain, Selection};
use super::kinds;
use super::pack;
use super::pack::DomainCounts;
use super::token_file::{Document, TokenFile};
use crate::config::LossOn;

/// Chooses documents from files.
pub(super) struct Selector<'a> {
    pub files: &'a [Arc<TokenFile>],
    pub loss_on: LossOn,
}

impl Selector<'_> {
    /// Selects the documents of the files `indices` for the domain `name`. With `record_domain`,
    /// only the documents whose record names that domain are selected.
    pub fn select(
        &self,
        name: &str,
        weight: f64,
        indices: &[usize],
        record_domain: Option<&str>,
    ) -> Selection {
        let mut selection = Selection { name: name.into(), weight, ..Selection::default() };
        for index in indices {
            let file = &self.files[*index];
            kinds::add(&mut selection.kinds, &file.kinds);
            selection.counts.skipped_bad += file.num_bad;
            selection.counts.records += file.num_bad;
            for (reference, document) in self.documents(*index) {
                if record_domain.is_none() || record_domain == file.record_domain(document) {
                    self.add(&mut selection, reference, document);
                } else {
                    selection.counts.records += 1;
                    selection.counts.skipped_other_domain += 1;
                }
            }
        }
        selection
    }

    /// Adds each document of the file `index` to the domain that its record names, or to
    /// `default_domain` if it names none. A domain that is not yet in `selections` is appended. The
    /// file's malformed records and its kinds are counted in the domain of its first document.
    ///
    /// - `record_domain`: if given, only the documents whose record names this domain are added
    pub fn group(
        &self,
        selections: &mut Vec<Selection>,
        index: usize,
        default_domain: &str,
        record_domain: Option<&str>,
    ) {
        let file = &self.files[index];
        let mut first = None;
        let mut known: HashMap<u32, usize> = HashMap::new();
        for (reference, document) in self.documents(index) {
            let name = file.record_domain(document);
            if record_domain.is_some() && record_domain != name {
                continue;
            }
            let name = name.unwrap_or(default_domain);
            let at = *known
                .entry(document.record_domain)
                .or_insert_with(|| position_of(selections, name));
            first.get_or_insert(at);
            self.add(&mut selections[at], reference, document);
        }
        let first = first.unwrap_or_else(|| position_of(selections, default_domain));
        kinds::add(&mut selections[first].kinds, &file.kinds);
        selections[first].counts.records += file.num_bad;
        selections[first].counts.skipped_bad += file.num_bad;
    }

    fn documents(&self, file: usize) -> impl Iterator<Item = (DocumentRef, &Document)> {
        (0..)
            .zip(&self.files[file].documents)
            .map(move |(document, of)| (DocumentRef { file: file as u32, document }, of))
    }

    fn add(&self, selection: &mut Selection, reference: DocumentRef, document: &Document) {
        selection.counts.records += 1;
        let file = &self.files[reference.file as usize];
        if pack::learned(file, document, self.loss_on).next().is_some() {
            selection.documents.push(reference);
        } else {
            selection.counts.skipped_empty += 1;
        }
    }

    /// Moves the share `fraction` of the documents to a validation set of the same name.
    ///
    /// # Errors
    /// If no document is held out, or all documents are.
    pub fn hold_out(&self, train: &mut Selection, fraction: f64, seed: u64) -> Result<Selection> {
        let num_documents = train.documents.len();
        let held_out = train
            .documents
            .extract_if(.., |reference| is_held_out(reference.of(self.files), fraction, seed))
            .collect::<Vec<_>>();
        let how_many = match held_out.len() {
            0 => "none",
            count if count == num_documents => "all",
            count => {
                train.counts.records -= count as u64;
                let counts = DomainCounts { records: count as u64, ..DomainCounts::default() };
                let (name, weight) = (train.name.clone(), train.weight);
                return Ok(Selection { name, weight, documents: held_out, counts, kinds: vec![] });
            }
        };
        bail!(
            "`validation.fraction` {fraction} of domain `{}` holds out {how_many} of its \
             {num_documents} documents\nhint: choose another fraction, or name `validation.files`",
            train.name
        );
    }

    /// Divides a validation set into two halves of the same name.
    ///
    /// # Errors
    /// If one of them is empty.
    pub fn halve(&self, whole: Selection) -> Result<[Selection; 2]> {
        let Selection { name, weight, documents, .. } = whole;
        let num_documents = documents.len();
        let (first, second): (Vec<_>, Vec<_>) =
            documents.into_iter().partition(|reference| is_first_half(reference.of(self.files)));
        if first.is_empty() || second.is_empty() {
            bail!(
                "the validation set of domain `{name}` has no two halves: its documents, \
                 {num_documents}, all fall into one\nhint: give it more documents"
            );
        }
        let half = |documents: Vec<DocumentRef>| {
            let records = documents.len() as u64;
            let counts = DomainCounts { records, ..DomainCounts::default() };
            Selection { name: name.clone(), weight, documents, counts, kinds: vec![] }
        };
        Ok([half(first), half(second)])
    }

    /// Removes the documents that are also in `validation` from `train`.
    pub fn leave_out(&self, train: &mut [Selection], validation: &[Selection]) {
        let held_out: HashSet<[u8; 16]> = validation
            .iter()
            .flat_map(|selection| &selection.documents)
            .map(|reference| reference.of(self.files).content)
            .collect();
        for selection in train {
            let before = selection.documents.len();
            selection
                .documents
                .retain(|reference| !held_out.contains(&reference.of(self.files).content));
            selection.counts.skipped_held_out += (before - selection.documents.len()) as u64;
        }
    }
}

/// The index of the domain `name` in `selections`. The domain is appended if it is missing.
pub(super) fn position_of(selections: &mut Vec<Selection>, name: &str) -> usize {
    selections.iter().position(|selection| selection.name == name).unwrap_or_else(|| {
        selections.push(Selection { name: name.into(), weight: 1.0, ..Selection::default() });
        selections.len() - 1
    })
}

/// Is hashed in front of a document's content, so that this hash is used for nothing else.
const HALVES: &[u8] = b"dylora: halves of a validation set";

/// Whether a document of a validation set is in its first half.
fn is_first_half(document: &Document) -> bool {
    let mut hasher = blake3::Hasher::new();
    hasher.update(HALVES);
    hasher.update(&document.content);
    hasher.finalize().as_bytes()[0] & 1 == 0
}

fn is_held_out(document: &Document, fraction: f64, seed: u64) -> bool {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(&document.content);
    let mut draw = [0; 8];
    hasher.finalize_xof().fill(&mut draw);
    // the divisor is exactly 2^64
    (u64::from_le_bytes(draw) as f64) / 18_446_744_073_709_551_616.0 < fraction
}

/// Checks that a domain has blocks; the error says what became of its records.
///
/// - `files`: all files of the run; the hint lists the values of their `domain` fields
pub(super) fn check_not_empty(
    domain: &Domain,
    purpose: &str,
    files: &[Arc<TokenFile>],
) -> Result<()> {
    if domain.num_blocks() > 0 {
        return Ok(());
    }
    let counts = &domain.counts;
    let mut message = format!("domain `{}` has nothing to {purpose}", domain.name);
    message += &format!(": of {} records", counts.records);
    for (count, what) in [
        (counts.skipped_empty, "have nothing to learn"),
        (counts.skipped_bad, "are malformed"),
        (counts.skipped_other_domain, "have another `domain` than `record_domain`"),
        (counts.skipped_held_out, "are in a validation set"),
    ] {
        if count > 0 {
            message += &format!(", {count} {what}");
        }
    }
    if counts.skipped_other_domain > 0 {
        let names: BTreeSet<&String> = files.iter().flat_map(|file| &file.record_domains).collect();
        let names: Vec<_> = names.iter().take(20).map(|name| format!("`{name}`")).collect();
        let names = if names.is_empty() { "no `domain`".into() } else { names.join(", ") };
        message += &format!("\nhint: their records name {names}");
    }
    bail!("{message}");
}
