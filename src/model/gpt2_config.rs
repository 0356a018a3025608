//! GPT-2's `config.json` (transformers 5.17, `GPT2Config`): what is read from it, what is refused.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::config::RandomBase;

/// The shape of a base.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpt2Config {
    /// Blocks.
    pub n_layer: i64,
    /// Attention heads.
    pub n_head: i64,
    /// Width `d` of the hidden states.
    pub n_embd: i64,
    /// Width of the feed-forward layer, as a rule `4 d`.
    pub n_inner: i64,
    /// Longest sequence.
    pub n_positions: i64,
    /// Vocabulary `v`.
    pub vocab_size: i64,
    /// Added to the variance by each LayerNorm.
    pub layer_norm_epsilon: f64,
    /// Of the feed-forward layer.
    pub activation: Activation,
    /// Whether the head is the token embedding.
    pub tied_head: bool,
    /// Divide attention scores by the root of the head's width.
    pub scale_attn_weights: bool,
    /// Divide attention scores by the block's number, from 1.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// The token that ends a document, if it is in the vocabulary.
    pub eos_token_id: Option<u32>,
}

/// The feed-forward layer's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU by tanh (arXiv:1606.08415, section 2): `gelu_new`.
    GeluNew,
    /// Exact GELU, by erf.
    Gelu,
}

impl Gpt2Config {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// Another architecture, an activation other than GELU, cross-attention, or a shape that
    /// contradicts itself, by key.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs_err::read_to_string(path).context("cannot read the base's config")?;
        let parse = || {
            let json: Value = serde_json::from_str(&text).context("is not valid JSON")?;
            Self::from_json(&json)
        };
        parse().with_context(|| format!("in `{}`", path.display()))
    }

    /// Reads the parsed `config.json`; absent keys have transformers' defaults.
    pub fn from_json(json: &Value) -> Result<Self> {
        let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or("absent");
        if model_type != "gpt2" {
            bail!(
                "`model_type` must be `gpt2`, got `{model_type}`\nhint: dylora trains GPT-2 only"
            );
        }
        if flag(json, "add_cross_attention", false)? {
            bail!("`add_cross_attention` must be false: a decoder alone is supported");
        }
        let n_embd = size(json, "n_embd", Some(768))?;
        let name = match json.get("activation_function") {
            None | Some(Value::Null) => "gelu_new",
            Some(name) => name.as_str().context("`activation_function` is not a string")?,
        };
        let activation = match name {
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluNew,
            "gelu" => Activation::Gelu,
            _ => bail!("`activation_function` must be `gelu_new` or `gelu`, got `{name}`"),
        };
        let epsilon = json.get("layer_norm_epsilon").map_or(Some(1e-5), Value::as_f64);
        let vocab_size = size(json, "vocab_size", Some(50257))?;
        let eos = json.get("eos_token_id").map_or(Some(50256), Value::as_i64);
        let config = Self {
            n_layer: size(json, "n_layer", Some(12))?,
            n_head: size(json, "n_head", Some(12))?,
            n_embd,
            n_inner: size(json, "n_inner", Some(4 * n_embd))?,
            n_positions: size(json, "n_positions", Some(1024))?,
            vocab_size,
            layer_norm_epsilon: epsilon.context("`layer_norm_epsilon` is not a number")?,
            activation,
            tied_head: flag(json, "tie_word_embeddings", true)?,
            scale_attn_weights: flag(json, "scale_attn_weights", true)?,
            scale_attn_by_inverse_layer_idx: flag(json, "scale_attn_by_inverse_layer_idx", false)?,
            eos_token_id: eos.filter(|id| (0..vocab_size).contains(id)).map(|id| id as u32),
        };
        if config.n_embd % config.n_head != 0 {
            let (d, h) = (config.n_embd, config.n_head);
            bail!("`n_embd` must be a multiple of `n_head` {h}, got {d}");
        }
        Ok(config)
    }

    /// The shape of a random base over a tokenizer's vocabulary.
    pub fn from_random(shape: &RandomBase, vocab_size: i64, eos_token_id: Option<u32>) -> Self {
        Self {
            n_layer: shape.n_layer,
            n_head: shape.n_head,
            n_embd: shape.n_embd,
            n_inner: 4 * shape.n_embd,
            n_positions: shape.n_positions,
            vocab_size,
            layer_norm_epsilon: 1e-5,
            activation: Activation::GeluNew,
            tied_head: true,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            eos_token_id,
        }
    }

    /// The `config.json` that transformers reads. `dtype`: `float32`, `bfloat16` or `float16`.
    pub fn to_json(&self, dtype: &str) -> Value {
        json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.n_embd,
            "n_inner": self.n_inner,
            "n_positions": self.n_positions,
            "vocab_size": self.vocab_size,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "activation_function": match self.activation {
                Activation::GeluNew => "gelu_new",
                Activation::Gelu => "gelu",
            },
            "tie_word_embeddings": self.tied_head,
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "bos_token_id": self.eos_token_id,
            "eos_token_id": self.eos_token_id,
            "torch_dtype": dtype,
        })
    }

    /// What attention scores of block `layer` (from 0) are multiplied with.
    pub fn attention_scale(&self, layer: i64) -> f64 {
        let mut scale = 1.0;
        if self.scale_attn_weights {
            scale /= ((self.n_embd / self.n_head) as f64).sqrt();
        }
        if self.scale_attn_by_inverse_layer_idx {
            scale /= (layer + 1) as f64;
        }
        scale
    }

    /// `(in, out)` of a linear layer of a block.
    pub fn linear_shape(&self, module: crate::config::TargetModule) -> (i64, i64) {
        use crate::config::TargetModule::*;
        match module {
            AttnCAttn => (self.n_embd, 3 * self.n_embd),
            AttnCProj => (self.n_embd, self.n_embd),
            MlpCFc => (self.n_embd, self.n_inner),
            MlpCProj => (self.n_inner, self.n_embd),
        }
    }

    /// Name and shape of every parameter.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let d = self.n_embd;
        let mut shapes = vec![
            ("transformer.wte.weight".to_owned(), vec![self.vocab_size, d]),
            ("transformer.wpe.weight".to_owned(), vec![self.n_positions, d]),
        ];
        for layer in 0..self.n_layer {
            let mut add = |module: &str, weight: Vec<i64>| {
                let bias = vec![*weight.last().expect("a weight has dimensions")];
                shapes.push((format!("transformer.h.{layer}.{module}.weight"), weight));
                shapes.push((format!("transformer.h.{layer}.{module}.bias"), bias));
            };
            add("ln_1", vec![d]);
            add("ln_2", vec![d]);
            for module in crate::config::TargetModule::ALL {
                let (i, o) = self.linear_shape(module);
                add(module.name(), vec![i, o]);
            }
        }
        shapes.push(("transformer.ln_f.weight".to_owned(), vec![d]));
        shapes.push(("transformer.ln_f.bias".to_owned(), vec![d]));
        if !self.tied_head {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, d]));
        }
        shapes
    }

    /// Parameters of the base; a tied head counts once.
    pub fn num_parameters(&self) -> i64 {
        self.parameter_shapes().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
    }
}

fn size(json: &Value, key: &str, default: Option<i64>) -> Result<i64> {
    let value = match json.get(key) {
        None | Some(Value::Null) => default,
        Some(value) => value.as_i64(),
    };
    match value {
        Some(value) if value >= 1 => Ok(value),
        _ => bail!("`{key}` must be a whole number of at least 1, got {}", json[key]),
    }
}

fn flag(json: &Value, key: &str, default: bool) -> Result<bool> {
    match json.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => bail!("`{key}` must be true or false, got {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The Hub's four GPT-2s; transformers 5.17 counts the same (`num_parameters`, tied head once).
    #[test]
    fn the_four_sizes_have_their_known_numbers_of_parameters() -> Result<()> {
        for (n_layer, n_head, n_embd, parameters) in [
            (12, 12, 768, 124_439_808),
            (24, 16, 1024, 354_823_168),
            (36, 20, 1280, 774_030_080),
            (48, 25, 1600, 1_557_611_200),
        ] {
            let json = json!({
                "model_type": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
            });
            let config = Gpt2Config::from_json(&json)?;
            assert_eq!(config.num_parameters(), parameters);
            assert_eq!(Gpt2Config::from_json(&config.to_json("float32"))?, config);
        }
        Ok(())
    }
}
