//! A byte-level BPE tokenizer of GPT-2's kind, trained on the demo's own texts.

use std::collections::HashSet;

use anyhow::{Result, anyhow};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::byte_level::ByteLevel as ByteLevelProcessor;
use tokenizers::{AddedToken, TokenizerBuilder};

/// The token that ends each document; its id is 0.
const END_OF_TEXT: &str = "<|endoftext|>";

/// The `tokenizer.json` of a BPE with `vocab_size` tokens: the end-of-text token, the 256 bytes and
/// the merges, the most frequent in `texts` first. Of two equally frequent pairs, the one with the
/// smaller ids is merged first, so that equal texts give equal files.
pub fn train_tokenizer(texts: &[String], vocab_size: usize) -> Result<String> {
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(alphabet)
        .build();
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = TokenizerBuilder::<BPE, NFC, _, _, _>::default()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(ByteLevelProcessor::default().trim_offsets(false)))
        .with_decoder(Some(ByteLevelDecoder::default()))
        .build()
        .map_err(|error| anyhow!("cannot build the tokenizer: {error}"))?;
    tokenizer
        .train(&mut trainer, texts.iter())
        .map_err(|error| anyhow!("cannot train the tokenizer: {error}"))?;
    tokenizer.to_string(true).map_err(|error| anyhow!("cannot write the tokenizer: {error}"))
}
