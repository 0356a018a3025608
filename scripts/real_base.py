#!/usr/bin/env python3
"""Writes SmolLM2 as a Hugging Face folder in f32, from a quantised GGUF file.

    scripts/real_base.py FILE.gguf FOLDER

scripts/real_base runs this script with the packages of scripts/real-base-requirements.txt.

GGUF stores a tensor `[out, in]` as Hugging Face does, but the rows of `q_proj` and `k_proj` in
another order. RoPE turns pairs of a head's rows; the pair i is in rows 2 i and 2 i + 1 in GGUF, and
in rows i and i + head_dim / 2 in Hugging Face. The head of SmolLM2 is tied to the token embedding,
so the file has no tensor for it. What the file does not say about the model and the tokenizer is
taken from the published configs of SmolLM2-135M-Instruct.

Letters of shapes: `o` out, `i` in.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # of gguf.TokenType


def hugging_face_name(name):
    """`model.layers.0.self_attn.q_proj.weight` for `blk.0.attn_q.weight`."""
    *block, tensor, suffix = name.split(".")
    layer = [f"model.layers.{block[1]}"] if block else []
    return ".".join([*layer, TENSORS[tensor], suffix])


def in_hugging_face_order(weight_oi, num_heads):
    """The rows of `q_proj` or `k_proj` in Hugging Face's order."""
    pairs = weight_oi.reshape(num_heads, -1, 2, weight_oi.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight_oi.shape)


def weights(reader, fields):
    """The model's tensors in f32, by their names in Hugging Face."""
    num_heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if heads := num_heads.get(tensor.name.split(".")[-2]):
            weight = in_hugging_face_order(weight, heads)
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float32)
    return tensors


def special_ids(fields):
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: fields[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}


def config(fields):
    """config.json, whose keys are those of transformers' LlamaConfig."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        # the file holds the f32 that is nearest to 1e-5
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.041666666666666664,
        "torch_dtype": "float32",
        "use_cache": True,
        **special_ids(fields),
    }


def tokenizer(fields):
    """tokenizer.json: byte-level BPE that first splits numbers into digits."""
    tokens = fields["tokenizer.ggml.tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(fields):
    """tokenizer_config.json, with the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key.removesuffix("_id"): tokens[i] for key, i in special_ids(fields).items()},
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def main():
    reader, folder = GGUFReader(sys.argv[1]), Path(sys.argv[2])
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields["general.architecture"], fields["tokenizer.ggml.pre"]
    assert kind == ("llama", "smollm"), f"`{sys.argv[1]}` holds {kind}, not SmolLM2"
    folder.mkdir()
    save_file(weights(reader, fields), folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": config(fields),
        "generation_config.json": special_ids(fields),
        "tokenizer.json": tokenizer(fields),
        "tokenizer_config.json": tokenizer_config(fields),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


main()
