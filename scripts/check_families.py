#!/usr/bin/env python3
"""Checks every command on tiny bases of the Llama-like families.

    scripts/check_families.py FOLDER

transformers writes a base of random weights for each of FAMILIES, with the settings that set its
family apart, and the demo's tokenizer. On each base, these must agree in f32 to 1e-4:

    a base alone in transformers                      `dylora trace`
    a trained mixture's experts and router in PEFT    `dylora trace`, `dylora eval`
    adapters that PEFT wrote                          `dylora trace`
    merged mixtures in transformers and PEFT          the mixture with these weights
    the config of a merged base                       the base's own

On some of the bases it also checks DoRA experts with short names of modules, X-LoRA, a run that is
resumed, `add-expert`, `remove-expert` and `bench`. It trains a random Llama with `method = "full"`,
and it checks what is refused. FOLDER takes 30 MB. Needs scripts/reference_env.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from clients import BASE, TEXTS, TRAIN, check_adapter, check_base, check_export, check_merge, check_xlora, compare
from clients import documents, dylora, expect, load_base, load_experts, routed, summary, token_ids, token_losses
from clients import trace, train, write_texts
from safetensors.torch import load_file

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# the settings of each family besides SIZES; the texts are longer than the windows
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "eos_token_id": [0, 5]},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
        "vocab_size": 2080,  # rows without a token
    },
    "qwen3": {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
}
# settings of a base that the family's own settings must tell apart
PLAIN = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "smollm3": {"no_rope_layer_interval": 4, "use_sliding_window": False},
    "mistral": {"sliding_window": None},
}
# how a base is saved, if not as one file in f32
SAVED = {"smollm3": {"dtype": torch.bfloat16}, "qwen3": {"max_shard_size": "300KB"}}
END_TOKENS = {"mistral": "</s>"}  # if not the demo's
IDLE_KEYS = {"_name_or_path", "dtype", "transformers_version"}
MIXTURE = """num_experts = 3
target_modules = "all-linear"
[router]
input = "layer_input"
scope = "layer"
top_k = 2
"""
DORA = """num_experts = 3
target_modules = ["q_proj", "v_proj", "self_attn.o_proj", "down_proj"]
use_dora = true
use_rslora = true
rank_pattern = { q_proj = 2, down_proj = 5, "layers.1.mlp.down_proj" = 3 }
[[lora.experts]]
[[lora.experts]]
target_modules = "all-linear"
rank_pattern = {}
[[lora.experts]]
use_dora = false
[router]
scope = "module"
temperature = 0.5
"""
XLORA = """num_experts = 3
[router]
input = "base_hidden"
temperature = 1.5
"""
ADAPTERS = {
    "DoRA, rsLoRA, short names": {
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "down_proj": 4},
        "alpha_pattern": {"up_proj": 3},
        "use_dora": True,
        "use_rslora": True,
    },
    "all-linear": {"target_modules": "all-linear"},
}




def make_base(folder, family):
    """Writes a base of random weights."""
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # in a new model, norms are 1 and biases are 0
        parameter.data += (0.2 if parameter.dim() == 1 else 0.15) * torch.randn_like(parameter)
    saved = SAVED.get(family, {})
    model.to(saved.get("dtype", torch.float32)).save_pretrained(folder, max_shard_size=saved.get("max_shard_size", "1GB"))
    for file in ["tokenizer.json", "tokenizer_config.json"]:
        text = (Path(BASE) / file).read_text()
        (folder / file).write_text(text.replace("<|endoftext|>", END_TOKENS.get(family, "<|endoftext|>")))


def check_settings(name, base, plain):
    """Checks that `plain` settings would change the logits, so that equal logits show something."""
    config = transformers.AutoConfig.from_pretrained(base)
    config = type(config).from_dict(config.to_dict() | {"layer_types": None, "no_rope_layers": None} | plain)
    other = transformers.AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32).eval()
    ids = token_ids(base, TEXTS[0])
    moved = (other(ids).logits - load_base(base)(ids).logits).abs().max().item()
    expect(f"{name}: the settings move the logits by {moved:.2f}", moved > 0.1)


def check_loss(name, model, base, *arguments):
    """Checks `dylora eval` on TEXTS, which share a block."""
    texts = write_texts(base.with_name("texts.jsonl"))
    report = json.loads(dylora("eval", *arguments, "--data", texts, "--seq-len", 128, "--json"))
    losses = torch.cat([token_losses(model(ids), ids) for ids in documents(base)])
    compare(f"{name}: the loss by eval", torch.tensor(report["loss"]), losses.mean())
    expect(f"{name}: on {losses.numel()} tokens", report["domains"][0]["label_tokens"] == losses.numel(), report)


def check_config(name, merged, base):
    """Checks that transformers reads the same settings from a merged base as from the base."""
    ours, theirs = [transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (merged, base)]
    keys = (ours.keys() | theirs.keys()) - IDLE_KEYS
    differing = {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}
    expect(f"{name}: the merged base has {len(keys)} equal settings", not differing, differing)


@torch.no_grad()
def main():
    folder = Path(sys.argv[1]).resolve()
    torch.manual_seed(0)
    for family in FAMILIES:
        base = folder / family
        make_base(base, family)
        check_base(family, base)
        check_settings(family, base, PLAIN[family])
        run, export = train(folder, f"{family}.run", MIXTURE, base)
        check_export(family, run, export, base)
        model, _ = load_experts(base, export)
        check_loss(family, lambda ids: routed(model, export, ids)[0], base, "--checkpoint", run)
        ids = token_ids(base, TEXTS[0])
        for name, settings in ADAPTERS.items():
            check_adapter(f"{family}, {name}", folder / f"{family}.adapter", base, ids, **settings)
        merged = folder / f"{family}.merged"
        check_merge(family, folder / "merged", run, export, "0.7,-0.4,1.1", "adapter", base)
        check_merge(family, merged, run, export, "0.5,0.3,0.2", "base", base)
        check_config(family, merged, base)
    summary()


main()
