//! The skills of a mixture's experts: an embedding of each domain, and a rule by which a new domain
//! counts as known.
//!
//! ```text
//! h(x)   = mean over label tokens of the base's last hidden state (normalised)        [d]
//! c      = the same mean over text that the base writes itself, or 0
//! cosine = <h - c, h' - c> / (|h - c| |h' - c|)
//! known    if the largest cosine to the library's skills, or their median, reaches a threshold
//! ```
//!
//! The base is frozen, so an embedding stays valid while the experts learn.
//!
//! The hidden states of language models share a large common part, which makes any two texts look
//! similar (Ethayarajh, arXiv:1909.00512: in the last layer of GPT-2, two random words have a
//! cosine of about 1). Subtracting the mean of the hidden states removes this part (Mu and
//! Viswanath, arXiv:1702.01417, section 2). The mean must not be taken over the skills that are
//! compared: with two skills, it would put them opposite to each other, however similar they are.
//! Here it is taken over text that the base writes ([`SkillCenter::OwnText`]).

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::data::{BlockId, IGNORED_LABEL, TokenDataset};
use crate::durable;
use crate::model::{ForwardMode, Inputs, RoutedModel, RoutingSource, Rows};

/// Number of texts that the base writes to find its center.
const OWN_TEXTS: usize = 16;
/// Number of tokens of each text.
const OWN_TOKENS: i64 = 64;

/// The embedding of a domain's text by the base.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// Mean hidden state, `[d]`.
    pub mean: Vec<f64>,
    /// Number of label tokens that the mean is taken over.
    pub label_tokens: u64,
}

/// A skill that an expert has learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skill {
    /// Its name, which is usually that of its domain.
    pub name: String,
    /// [`Embedding::mean`], `[d]`.
    pub embedding: Vec<f64>,
    /// Number of label tokens that the mean is taken over.
    pub label_tokens: u64,
    /// The expert that has learned it, if that is known.
    pub expert: Option<usize>,
}

/// The known skills of a mixture on one base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkillLibrary {
    /// What is subtracted from embeddings before their cosine is taken, `[d]`
    /// ([`SkillCenter::of`]).
    pub center: Vec<f64>,
    /// The skills, in the order in which they were learned.
    pub skills: Vec<Skill>,
}

/// What is subtracted from embeddings before their cosine is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkillCenter {
    /// The mean hidden state of 16 texts of 64 tokens that the base writes at temperature 1. They
    /// start with the token that begins a document, or else with the end-of-text token, and the
    /// random numbers are the same each time.
    #[default]
    OwnText,
    /// Nothing, which gives raw cosines.
    Origin,
}

/// The similarity of an embedding to a skill of the library.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Similarity {
    /// The skill's name.
    pub name: String,
    /// The expert that has learned it, if that is known.
    pub expert: Option<usize>,
    /// The cosine, from -1 to 1; 0 if an embedding equals the center.
    pub cosine: f64,
}

/// The rule by which an embedding counts as that of a known skill.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkillRule {
    /// The smallest cosine at which it is known.
    pub threshold: f64,
    /// Which of the cosines to the library's skills counts.
    pub by: SkillComparison,
}

/// By default an embedding is known if its largest cosine, with centered embeddings, is at least
/// 0.93. On the demo's base, a demo domain's validation text had a cosine of at least 0.999 with
/// its own training text and of at most 0.54 with another domain's (raw: 0.70). On seven datasets
/// unlike the text of that base, two of them of programs, these numbers were 0.956 and 0.92 (raw:
/// 0.978 and 0.95); with 4 blocks of 256 tokens they were 0.945 and 0.92 (raw: 0.937 and 0.94).
impl Default for SkillRule {
    fn default() -> Self {
        Self { threshold: 0.93, by: SkillComparison::Max }
    }
}

/// Which of the cosines to the library's skills is compared with the threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum SkillComparison {
    /// The largest cosine.
    #[default]
    Max,
    /// The median cosine; of an even number, the mean of the middle two. If the skills differ much
    /// from each other, the median is low even if one of them covers the new data well.
    Median,
}

/// Embeds a domain with the base of `model`, without the experts: the mean of the hidden states at
/// which the loss is taken. Those that read the token that begins a document are left out, since
/// they are the same in every document, and far from the others.
///
/// - `max_blocks`: the largest number of blocks to read, at even distances over the domain
///
/// # Errors
/// Fails if the domain has no label tokens or if hidden states are not finite.
pub fn embed(
    model: &RoutedModel,
    dataset: &TokenDataset,
    domain: usize,
    batch_size: usize,
    max_blocks: Option<usize>,
) -> Result<Embedding> {
    let _no_grad = tch::no_grad_guard();
    let (d, bos) = (model.base().spec.width, model.base().spec.bos_token_id);
    let mut sum = Tensor::zeros([d], (Kind::Double, model.device()));
    let mut label_tokens = 0;
    for chunk in spread_blocks(dataset, domain, max_blocks).chunks(batch_size) {
        let batch = dataset.batch(chunk);
        let inputs = Inputs::of_batch(&batch, false, model.device());
        let is_bos = inputs.input_ids.eq(bos.map_or(-1, i64::from));
        let begins = is_bos.logical_and(&inputs.position_ids.eq(0)).view([-1]);
        let begins_n = begins.index_select(0, &inputs.labelled);
        let rows = inputs.labelled.masked_select(&begins_n.logical_not());
        let hidden_nd = hidden(model, &inputs).view([-1, d]).index_select(0, &rows);
        sum += hidden_nd.sum_dim_intlist(0, false, Kind::Double);
        label_tokens += rows.size()[0] as u64;
    }
    let name = &dataset.domains[domain].name;
    if label_tokens == 0 {
        bail!("`{name}` has no label token to embed");
    }
    let mean: Vec<f64> = Vec::try_from(sum / label_tokens as f64)?;
    if mean.iter().any(|x| !x.is_finite()) {
        bail!("the base's hidden states of `{name}` are not finite");
    }
    Ok(Embedding { mean, label_tokens })
}

/// All blocks of a domain, or the middle block of each of `max_blocks` equal stretches.
pub(super) fn spread_blocks(
    dataset: &TokenDataset,
    domain: usize,
    max_blocks: Option<usize>,
) -> Vec<BlockId> {
    let num_blocks = dataset.domains[domain].num_blocks();
    let count = max_blocks.map_or(num_blocks, |max| max.min(num_blocks));
    let block = |i: usize| (2 * i + 1) * num_blocks / (2 * count);
    let id = |i| BlockId { domain: domain as u32, block: block(i) as u32 };
    (0..count).map(id).collect()
}

/// The base's last hidden states, `[b, t, d]`.
fn hidden(model: &RoutedModel, inputs: &Inputs) -> Tensor {
    model.forward(inputs, &RoutingSource::Base, ForwardMode::EVAL, None).hidden
}

impl SkillCenter {
    /// The center of a model's base, `[d]`.
    ///
    /// # Errors
    /// Fails if hidden states are not finite.
    pub fn of(self, model: &RoutedModel) -> Result<Vec<f64>> {
        let config = &model.base().spec;
        match self {
            Self::Origin => Ok(vec![0.0; config.width as usize]),
            Self::OwnText => own_text(model),
        }
    }
}

/// The mean hidden state of text that the base writes. The first position is left out, as its token
/// is the same in every text.
fn own_text(model: &RoutedModel) -> Result<Vec<f64>> {
    let _no_grad = tch::no_grad_guard();
    let config = &model.base().spec;
    let first = i64::from(config.bos_token_id.or(config.eos_token_id()).unwrap_or(0));
    let mut rng = ChaCha8Rng::from_seed([0; 32]);
    let mut texts: Vec<Vec<i64>> = vec![vec![first]; OWN_TEXTS];
    let num_tokens = OWN_TOKENS.min(config.max_positions);
    for position in 0..num_tokens - 1 {
        let last_bd = hidden(model, &inputs_of(&texts, model)).select(1, position);
        let probs_bv = model.logits(&last_bd).softmax(-1, Kind::Double);
        // 53 random bits make a uniform number from 0 to below 1
        let uniform = || (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let draws: Vec<f64> = std::iter::repeat_with(uniform).take(OWN_TEXTS).collect();
        let draws_b1 = Tensor::from_slice(&draws).unsqueeze(-1).to_device(model.device());
        let below = probs_bv.cumsum(-1, Kind::Double).le_tensor(&draws_b1);
        let next = below.sum_dim_intlist(-1, false, Kind::Int64).clamp_max(config.vocab_size - 1);
        for (text, token) in texts.iter_mut().zip(Vec::<i64>::try_from(next)?) {
            text.push(token);
        }
    }
    let hidden = hidden(model, &inputs_of(&texts, model)).narrow(1, 1, num_tokens - 1);
    let center: Vec<f64> = Vec::try_from(hidden.mean_dim(&[0_i64, 1][..], false, Kind::Double))?;
    if center.iter().any(|x| !x.is_finite()) {
        bail!("the base's hidden states of its own text are not finite");
    }
    Ok(center)
}

/// Unlabelled texts of equal length as a batch.
fn inputs_of(texts: &[Vec<i64>], model: &RoutedModel) -> Inputs {
    let seq_len = texts[0].len();
    let positions: Vec<i64> = texts.iter().flat_map(|text| 0..text.len() as i64).collect();
    let rows = Rows {
        num_rows: texts.len(),
        seq_len,
        input_ids: &texts.concat(),
        labels: &vec![IGNORED_LABEL; positions.len()],
        position_ids: &positions,
        document_ids: &vec![0; positions.len()],
        expert_ids: None,
        prompt: None,
    };
    Inputs::new(rows, model.device())
}

impl SkillLibrary {
    /// A library with the center `center`, `[d]`, and without skills.
    pub fn new(center: Vec<f64>) -> Self {
        Self { center, skills: vec![] }
    }

    /// Reads a library for a base of width `d`. Numbers are read exactly as they were written.
    ///
    /// # Errors
    /// Fails if the file holds no library, or one of another width.
    pub fn read(file: &Path, d: i64) -> Result<Self> {
        let library = Self::read_any(file)?;
        let checked = library.check(d);
        checked.with_context(|| format!("cannot read the skills of `{}`", file.display()))?;
        Ok(library)
    }

    /// Reads a library for a base of any width.
    pub(crate) fn read_any(file: &Path) -> Result<Self> {
        let parse = || anyhow::Ok(serde_json::from_str(&fs_err::read_to_string(file)?)?);
        parse().with_context(|| format!("cannot read the skills of `{}`", file.display()))
    }

    fn check(&self, d: i64) -> Result<()> {
        let embeddings = self.skills.iter().map(|skill| &skill.embedding);
        let mut widths = embeddings.chain([&self.center]).map(|vector| vector.len() as i64);
        match widths.find(|&width| width != d) {
            Some(other) => bail!("has embeddings of width {other}, the base has {d}"),
            None => Ok(()),
        }
    }

    /// Writes the library as JSON and waits until the file is on disk.
    pub fn write(&self, file: &Path) -> Result<()> {
        durable::write(file, &serde_json::to_vec_pretty(self)?)
    }

    /// The similarity of an embedding to each skill, the most similar first.
    ///
    /// # Panics
    /// If the embedding has another width.
    pub fn compare(&self, embedding: &[f64]) -> Vec<Similarity> {
        let ranked = self.ranked(embedding).into_iter();
        let similarity = |(skill, cosine): (&Skill, f64)| Similarity {
            name: skill.name.clone(),
            expert: skill.expert,
            cosine,
        };
        ranked.map(similarity).collect()
    }

    /// The most similar skill, if the embedding counts as known by `rule`.
    ///
    /// # Panics
    /// If the embedding has another width.
    pub fn known(&self, embedding: &[f64], rule: SkillRule) -> Option<&Skill> {
        let ranked = self.ranked(embedding);
        let &(best, largest) = ranked.first()?;
        let cosine = match rule.by {
            SkillComparison::Max => largest,
            SkillComparison::Median => {
                let (lower, upper) = (ranked[ranked.len() / 2].1, ranked[(ranked.len() - 1) / 2].1);
                (lower + upper) / 2.0
            }
        };
        (cosine >= rule.threshold).then_some(best)
    }

    /// The cosine of every two skills, `[s][s]`.
    pub fn cosines(&self) -> Vec<Vec<f64>> {
        let row = |of: &Skill| {
            let others = self.skills.iter();
            others.map(|skill| cosine(&of.embedding, &skill.embedding, &self.center)).collect()
        };
        self.skills.iter().map(row).collect()
    }

    /// The skills with their cosines, the largest first. Equal cosines keep the order of learning.
    fn ranked(&self, embedding: &[f64]) -> Vec<(&Skill, f64)> {
        let cosine = |skill: &Skill| cosine(embedding, &skill.embedding, &self.center);
        let mut ranked: Vec<_> = self.skills.iter().map(|skill| (skill, cosine(skill))).collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        ranked
    }
}

/// The cosine of `x - center` and `y - center`; 0 if either is 0.
fn cosine(x: &[f64], y: &[f64], center: &[f64]) -> f64 {
    assert!(x.len() == center.len() && y.len() == center.len(), "embeddings are of one width");
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for ((x, y), c) in x.iter().zip(y).zip(center) {
        let (x, y) = (x - c, y - c);
        (xy, xx, yy) = (xy + x * y, xx + x * x, yy + y * y);
    }
    let norms = xx.sqrt() * yy.sqrt();
    if norms > 0.0 { xy / norms } else { 0.0 }
}
