"""The frozen bases of scripts/peft_opponent.py: GPT-2 and the Llama-like families.

The shapes are those of src/cli/bench_shapes.rs. Random weights are made on the device, in the dtype
of the base, so that 8 billion of them take 16 GB at any time. (RoPE's frequencies stay in f32, as in
models that transformers reads from files.)
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
LLAMA3 = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_LIKE = {
    "smollm2-135m": {
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
        "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": LLAMA3 | {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
        "rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": LLAMA3 | {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "rope_parameters": LLAMA3_ROPE | {"factor": 8.0}, "tie_word_embeddings": False,
    },
}
# the linear layers of each kind of block that get experts, by the words of a setting
MODULES = {
    "gpt2": {"qkv": ["attn.c_attn"], "all": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]},
    "llama": {
        "qkv": ["q_proj", "k_proj", "v_proj"],
        "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}
VOCAB_MULTIPLE = 64


def is_gpt2(base):
    return base.config.model_type == "gpt2"


def target_modules(base, modules):
    """The names of the modules that a setting gives as `qkv`, as `all` or by a list."""
    return MODULES["gpt2" if is_gpt2(base) else "llama"][modules] if isinstance(modules, str) else modules


def blocks_of(base):
    return base.base_model.h if is_gpt2(base) else base.base_model.layers


def load_base(setting, device):
    dtype = torch.bfloat16 if setting["dtype"] == "bf16" else torch.float32
    how = {"dtype": dtype, "attn_implementation": "sdpa"}
    if setting["base"]:
        model = AutoModelForCausalLM.from_pretrained(setting["base"], **how)
    else:
        torch.manual_seed(setting["seed"])
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape(setting), **how)
    for dropout in [m for m in model.modules() if isinstance(m, nn.Dropout)]:
        dropout.p = 0.0
    model.loss_type = "ForCausalLM"
    if "padded_vocab" in setting.get("form", []):
        pad_vocabulary(model)
    return model.to(device)


def pad_vocabulary(model):
    """Adds zero rows to the embedding and the head, if needed. The config keeps the true size."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if missing := -len(embedding.weight) % VOCAB_MULTIPLE:
        tied = head.weight is embedding.weight
        padded = lambda weight: nn.Parameter(F.pad(weight.data, (0, 0, 0, missing)))
        embedding.weight = padded(embedding.weight)
        head.weight = embedding.weight if tied else padded(head.weight)
        embedding.num_embeddings = head.out_features = len(head.weight)


def shape(setting):
    """The config of the base of a size. The setting's `config` replaces keys, for tests."""
    size, changes = setting["size"], setting.get("config", {})
    if size in LLAMA_LIKE:
        kind = Qwen3Config if size.startswith("qwen3") else LlamaConfig
        return kind(**LLAMA_LIKE[size] | {"use_cache": False} | changes)
    gpt2 = dict(zip(["n_layer", "n_head", "n_embd"], SHAPES[size], strict=True))
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**gpt2 | dropout | {"use_cache": False} | changes)
