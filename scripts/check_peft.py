#!/usr/bin/env python3
"""Checks dylora's exports in PEFT.

    scripts/check_peft.py FOLDER                  trains, exports and checks the mixtures RUNS on
                                                  the demo base
    scripts/check_peft.py CHECKPOINT EXPORT BASE  checks an existing export of a checkpoint

PEFT must load every expert without a warning. In f32, these logits must agree to 1e-4:

    PEFT with one expert                             `dylora trace --routing expert:N`
    PEFT with all experts active                     `dylora trace --routing all`
    PEFT's layers, mixed by router.safetensors as    `dylora trace`
    dylora.json describes
    dylora with the export                           dylora with the checkpoint

The runs FOLDER/NAME and the exports FOLDER/NAME.export are kept for the other checks. Needs
scripts/reference_env.
"""

import json
import sys
from pathlib import Path

import torch
from clients import BASE, INVOCATION, TEXTS, compare, dylora, load_adapters, load_base, routed, summary, trace

COMMON = """
[run]
dir = "{dir}"
[base]
source = {{ path = "demo/base" }}
[data]
seq_len = 64
[[data.domains]]
name = "arithmetic"
train = ["demo/data/arithmetic.validation.jsonl"]
validation = {{ fraction = 0.1 }}
[[data.domains]]
name = "verse"
train = ["demo/data/verse.validation.jsonl"]
validation = {{ fraction = 0.1 }}
[train]
duration = {{ steps = 12 }}
micro_batch_size = 4
eval_every_steps = 6
[optimizer]
adapters = {{ learning_rate = 1e-2 }}
router = {{ learning_rate = 1e-2 }}
[lora]
target_modules = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
rank = 4
alpha = 6
"""
# the rest of each config, which continues `[lora]`
RUNS = {
    "single": "num_experts = 1",
    "top_k": """num_experts = 3
[router]
window_steps = 4
temperature = 0.7
top_k = 2
load_balancing_coef = 0.05""",
    # ranks, alphas, modules and scaling differ from expert to expert
    "patterns": """num_experts = 3
use_rslora = true
rank_pattern = { "mlp.c_fc" = 2, "h.1.attn.c_attn" = 6 }
alpha_pattern = { "attn.c_proj" = 3, "h.0.mlp.c_proj" = 9.5 }
[[lora.experts]]
[[lora.experts]]
rank = 2
target_modules = ["attn.c_attn"]
rank_pattern = {}
alpha_pattern = {}
[[lora.experts]]
use_rslora = false
alpha = 5
target_modules = ["mlp.c_fc", "attn.c_proj"]
rank_pattern = { "h.2.mlp.c_fc" = 1 }
alpha_pattern = {}
[router]
input = "layer_input"
scope = "layer"
top_k = 2""",
    "dora": """num_experts = 3
use_dora = true
[[lora.experts]]
[[lora.experts]]
use_rslora = true
rank_pattern = { "mlp.c_fc" = 2, "h.1.attn.c_attn" = 6 }
[[lora.experts]]
use_dora = false
[router]
input = "base_hidden"
temperature = 2.0
top_k = 2""",
    # PiSSA and OLoRA experts are exported as plain LoRA of twice the rank
    "pissa": """num_experts = 3
init = "pissa"
[[lora.experts]]
use_rslora = true
rank_pattern = { "attn.c_attn" = 3 }
[[lora.experts]]
init = "olora"
[router]
input = "base_hidden"
temperature = 1.5""",
    "alora": f"""num_experts = 3
[[lora.experts]]
alora_invocation_tokens = {INVOCATION}
[[lora.experts]]
[[lora.experts]]
target_modules = ["attn.c_attn"]
alora_invocation_tokens = {INVOCATION}
[router]
input = "layer_input" """,
    "modules": """num_experts = 3
[router]
scope = "module"
hidden_layers = 2
hidden_width = 24
top_k = 2
renormalize = false
balance_bias_rate = 0.05""",
    "sequence": """num_experts = 3
[router]
input = "layer_input"
scope = "layer"
level = "sequence"
temperature = 0.2""",
    # each layer routes over experts of its own
    "own_experts": """num_experts = 3
experts_per_layer = [1, 3, 2, 3]
[router]
input = "base_hidden"
temperature = 0.5
top_k = 2""",
    # trained as PEFT trains several active adapters, so the router is not trained
    "all": "num_experts = 2",
}
OPTIONS = {"all": ["--set", "train.routing=all"]}


def train(folder, name):
    """Trains and exports a mixture, and returns its checkpoint and its export."""
    run, export = folder / name, folder / f"{name}.export"
    config = folder / f"{name}.toml"
    config.write_text(COMMON.format(dir=run) + RUNS[name])
    dylora("train", "--config", config, *OPTIONS.get(name, []))
    dylora("export-adapters", "--checkpoint", run, "--out", export)
    return run, export


def check_experts(name, run, folders, base_dir):
    base = load_base(base_dir)
    for expert, (adapter, folder) in enumerate(folders.items()):
        model = load_adapters(base_dir, **{adapter: folder})
        ours = trace("--checkpoint", run, "--text", TEXTS[0], "--routing", f"expert:{expert}")
        ids = ours["input_ids"]
        compare(f"{name}: {adapter} in PEFT", ours["logits"], model(ids).logits, base(ids).logits)


def check_mixture(name, run, export, model, base):
    """Checks the mixture that the export describes, computed from PEFT's layers."""
    for number, text in enumerate(TEXTS, 1):
        ours = trace("--checkpoint", run, "--text", text)
        ids = ours["input_ids"]
        theirs, weights = routed(model, export, ids)
        compare(f"{name}: mixture of PEFT's layers, text {number}", ours["logits"], theirs, base(ids).logits)
        found = torch.stack([ours["routing_weights" + site] for site in weights])
        weights = torch.stack(list(weights.values()))
        even = torch.full_like(found, 1 / found.shape[-1])
        compare(f"{name}: weights at {len(found)} site(s), text {number}", found, weights, even)


def check_all_active(name, run, model, base):
    """Checks PEFT's sum of several active adapters, which is correct if they are plain LoRA."""
    ours = trace("--checkpoint", run, "--text", TEXTS[0], "--routing", "all")
    ids = ours["input_ids"]
    model.base_model.set_adapter(list(model.peft_config))
    compare(f"{name}: all adapters active in PEFT", ours["logits"], model(ids).logits, base(ids).logits)


def check_export(name, run, export, base_dir):
    meta = json.loads((export / "dylora.json").read_text())
    folders = {adapter: export / adapter for adapter in meta["experts"]}
    check_experts(name, run, folders, base_dir)
    if meta["router"] is not None:
        model, base = load_adapters(base_dir, **folders), load_base(base_dir)
        if meta["routing"] == "router":
            check_mixture(name, run, export, model, base)
        if not any(config.use_dora or config.alora_invocation_tokens for config in model.peft_config.values()):
            check_all_active(name, run, model, base)
    # an export holds its routing, but `dylora trace` needs it for a checkpoint
    routing = ["--routing", "all"] if meta["routing"] == "all" else []
    ours = trace("--adapters", export, "--base", base_dir, "--text", TEXTS[0])
    again = trace("--checkpoint", run, "--text", TEXTS[0], *routing)
    compare(f"{name}: the export in dylora", ours["logits"], again["logits"])


@torch.no_grad()
def main():
    if len(sys.argv) == 4:
        run, export, base_dir = sys.argv[1:]
        check_export(Path(run).name, run, Path(export), base_dir)
    else:
        for name in RUNS:
            check_export(name, *train(Path(sys.argv[1]).resolve(), name), BASE)
    summary()


main()
