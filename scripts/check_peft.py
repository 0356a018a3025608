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

Texts that are continued greedily must have the same tokens (scripts/generation.py).

The runs FOLDER/NAME and the exports FOLDER/NAME.export are kept for the other checks. Needs
scripts/reference_env.
"""

import sys
from pathlib import Path

import torch
from clients import BASE, INVOCATION, check_export, check_mixture, load_base, load_experts, load_tokenizer, summary
from clients import train
from generation import check_generate, check_program, generate

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
scope = "shared"
normalize_input = false
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
    # an adapter that is always on, beside routed ones that each read their module's own input
    "shared": """num_experts = 2
shared_rank = 3
[router]
input = "module_input"
scope = "module"
temperature = 0.5
[router.eval]
top_k = 1""",
    # trained as PEFT trains several active adapters, so the router is not trained
    "all": "num_experts = 2",
}
# routers whose inputs, scopes and levels the runs above do not have, with two plain experts
ROUTERS = {
    "embeddings": """input = "embeddings"
scope = "shared" """,
    "embeddings_module": """input = "embeddings"
scope = "module"
level = "sequence" """,
    "base_sequence": """input = "base_hidden"
scope = "layer"
level = "sequence" """,
    "base_module": """input = "base_hidden"
scope = "module" """,
    "shared_sequence": """input = "layer_input"
scope = "shared"
level = "sequence"
normalize_input = false""",
    "module_sequence": """input = "module_input"
scope = "module"
level = "sequence" """,
}
OPTIONS = {"all": ["--set", "train.routing=all"]}


@torch.no_grad()
def main():
    if len(sys.argv) == 4:
        run, export, base_dir = sys.argv[1:]
        check_export(Path(run).name, run, Path(export), base_dir)
    else:
        folder = Path(sys.argv[1]).resolve()
        for name, settings in RUNS.items():
            run, export = train(folder, name, settings, options=OPTIONS.get(name, []))
            check_export(name, run, export, BASE)
            check_generate(name, BASE, run, export)
        for name, settings in ROUTERS.items():
            run, export = train(folder, name, f"num_experts = 2\n[router]\ntemperature = 0.2\n{settings}")
            model, _ = load_experts(BASE, export)
            check_mixture(name, run, export, model, load_base(BASE))
            check_program(name, BASE, export, generate("--checkpoint", run), load_tokenizer(BASE))
    summary()


main()
