//! The shapes of bases and the mixtures that `dylora bench` knows by name.

use anyhow::Result;
use clap::ValueEnum;
use serde_json::json;

use crate::config::{Family, LoraConfig, LoraScale, ModulePattern, TargetModule, TargetModules};
use crate::model::decoder::spec::DecoderSpec;
use crate::model::families;

/// The shapes of known bases.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Size {
    /// GPT-2 small: 12 layers of width 768, 124 million parameters.
    Gpt2,
    /// 24 layers of width 1024: 355 million parameters.
    Gpt2Medium,
    /// 36 layers of width 1280: 774 million parameters.
    Gpt2Large,
    /// 48 layers of width 1600: 1.6 billion parameters.
    Gpt2Xl,
    /// 30 layers of width 576: 135 million parameters.
    #[value(name = "smollm2-135m")]
    SmolLm2,
    /// 28 layers of width 1024: 596 million parameters.
    #[value(name = "qwen3-0.6b")]
    Qwen3,
    /// 16 layers of width 2048: 1.2 billion parameters.
    #[value(name = "llama-3.2-1b")]
    Llama3,
    /// 32 layers of width 4096: 8 billion parameters.
    #[value(name = "llama-3.1-8b")]
    Llama8,
}

impl Size {
    /// The shape of the base, as its `config.json` on the Hub has it.
    pub fn spec(self) -> DecoderSpec {
        let gpt2 = |n_layer, n_head, n_embd| {
            json!({
                "model_type": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
            })
        };
        // Llama 3.1 and 3.2, which have the same heads of attention and vocabulary
        let llama3 = |layers, width, inner, is_tied, factor| {
            json!({
                "model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": 32,
                "num_key_value_heads": 8, "hidden_size": width, "intermediate_size": inner,
                "vocab_size": 128_256, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
                "rope_theta": 500_000.0, "tie_word_embeddings": is_tied,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                },
            })
        };
        let json = match self {
            Self::Gpt2 => gpt2(12, 12, 768),
            Self::Gpt2Medium => gpt2(24, 16, 1024),
            Self::Gpt2Large => gpt2(36, 20, 1280),
            Self::Gpt2Xl => gpt2(48, 25, 1600),
            Self::SmolLm2 => json!({
                "model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536,
                "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
                "rope_theta": 100_000.0, "tie_word_embeddings": true,
            }),
            Self::Qwen3 => json!({
                "model_type": "qwen3", "num_hidden_layers": 28, "num_attention_heads": 16,
                "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 1024,
                "intermediate_size": 3072, "vocab_size": 151_936,
                "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": true,
            }),
            Self::Llama3 => llama3(16, 2048, 8192, true, 32.0),
            Self::Llama8 => llama3(32, 4096, 14336, false, 8.0),
        };
        families::from_json(&json).expect("the shapes are sound")
    }
}

/// The mixtures that are measured most.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Preset {
    /// 4 experts of rank 8 and alpha 16 on the layers of queries, keys and values.
    S1,
    /// 8 experts of rank 16 and alpha 32 on all linear layers.
    S2,
}

impl Preset {
    /// The experts of the mixture on a base of `family`. Alpha is that of each expert, as in PEFT.
    pub fn lora(self, family: Family) -> LoraConfig {
        let qkv: &[TargetModule] = match family {
            Family::Gpt2 => &family.modules()[..1],
            _ => &family.modules()[..3],
        };
        let (num_experts, rank, alpha, target_modules) = match self {
            Self::S1 => (4, 8, 16.0, qkv.into()),
            Self::S2 => (8, 16, 32.0, TargetModules::all()),
        };
        LoraConfig {
            num_experts,
            rank,
            alpha,
            scale: LoraScale::PerExpert,
            target_modules,
            ..LoraConfig::default()
        }
    }
}

/// The value of `--modules`.
pub(super) fn modules(text: &str) -> Result<TargetModules> {
    if text == "all" {
        return Ok(TargetModules::all());
    }
    text.split(',').map(ModulePattern::parse).collect::<Result<_>>().map(TargetModules)
}
