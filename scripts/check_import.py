#!/usr/bin/env python3
"""Checks adapters that PEFT wrote in dylora, and X-LoRA in both directions.

    scripts/check_import.py FOLDER

The adapters are of several kinds, on the demo base. FOLDER holds the runs of scripts/check_peft.py.
All logits must agree to 1e-4 in f32. Needs scripts/reference_env.
"""

import sys
from pathlib import Path

import torch
from clients import BASE, INVOCATION, TEXTS, check_adapter, check_base, check_xlora, summary, token_ids

# the settings of the adapters; PEFT converts the PiSSA adapter to plain LoRA when it saves it
# (`path_initial_model_for_weight_conversion`)
ADAPTERS = {
    "regex, rsLoRA": {"target_modules": r".*\.h\.(1\.attn\.c_attn|[02]\.mlp\.c_(fc|proj))", "use_rslora": True},
    "all linear layers, patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"h.1.mlp.c_fc": 6, "attn.c_proj": 2},
        "alpha_pattern": {"mlp.c_fc": 3},
    },
    "DoRA, one layer": {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "layers_to_transform": [2]},
    "aLoRA": {"target_modules": ["c_attn", "c_fc"], "alora_invocation_tokens": INVOCATION},
    "PiSSA": {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"},
}


@torch.no_grad()
def main():
    folder = Path(sys.argv[1]).resolve()
    torch.manual_seed(0)
    check_base("the demo", BASE)
    ids = token_ids(BASE, TEXTS[0])
    for name, settings in ADAPTERS.items():
        check_adapter(name, folder / name, BASE, ids, **settings)
    check_xlora("the demo", folder / "xlora", folder / "pissa", BASE)
    summary()


main()
