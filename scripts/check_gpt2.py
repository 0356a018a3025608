#!/usr/bin/env python3
"""Checks GPT-2 at its true size, 124M parameters.

    scripts/check_gpt2.py FOLDER

transformers writes a base of random weights, and PEFT writes adapters on all four target modules.
dylora's logits with them must agree with PEFT's to 1e-4 in f32. FOLDER takes about 1 GB. Needs
scripts/reference_env.
"""

import sys
from pathlib import Path

import torch
from clients import check_adapter, compare, dylora, load_base, summary
from transformers import GPT2Config, GPT2LMHeadModel

SETTINGS = {"r": 8, "lora_alpha": 16, "target_modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}
NUM_TOKENS = 48


@torch.no_grad()
def main():
    folder = Path(sys.argv[1]).resolve()
    torch.manual_seed(0)
    base = folder / "base"
    model = GPT2LMHeadModel(GPT2Config()).eval()
    model.save_pretrained(base)
    ids = torch.randint(model.config.vocab_size, (1, NUM_TOKENS))
    check_adapter("GPT-2 124M, LoRA", folder / "LoRA", base, ids, 0.02, **SETTINGS)
    theirs = check_adapter("GPT-2 124M, DoRA", folder / "DoRA", base, ids, 0.02, **SETTINGS, use_dora=True)
    merged = folder / "merged"
    dylora("merge", "--adapters", folder / "DoRA", "--base", base, "--out", merged, "--as", "base")
    compare("GPT-2 124M with DoRA, merged by dylora", load_base(merged)(ids).logits, theirs, model(ids).logits)
    summary()


main()
