"""Tiny random bases, and the writing of golden files.

make_golden.py and make_golden_adapters.py use this module.
"""

import json

import peft
import safetensors.torch
import torch
import transformers

BASES = {
    "gpt2_tied": {},
    "gpt2_untied_exact_gelu": {"activation_function": "gelu", "tie_word_embeddings": False},
    "gpt2_inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_head": 2},
    "gpt2_unscaled_attention": {"scale_attn_weights": False, "layer_norm_epsilon": 1e-3},
    "gpt2_narrow_inner": {"n_inner": 24, "vocab_size": 50},
}
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def randn(generator, *shape, std=1.0):
    """Random numbers in float64 that float32 can represent exactly."""
    return (torch.randn(*shape, generator=generator) * std).double()


def make_base(seed, settings):
    """A GPT-2 in float64 whose parameters are all random, biases and LayerNorms included."""
    config = {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 32, "vocab_size": 61, **settings}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, attn_implementation="eager"))
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ".ln_" in name and name.endswith("weight")
            parameter.copy_(randn(generator, *parameter.shape, std=0.3) + (1.0 if norm else 0.0))
            parameter.copy_(parameter.float().double())
    return model, torch.randint(config["vocab_size"], (2, 11), generator=generator)


def save(folder, name, tensors, **metadata):
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    data = safetensors.torch.save(tensors, {"format": "pt", **VERSIONS, **metadata})
    # safetensors writes metadata in random order; sorted, the same numbers give the same file
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    (folder / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
