#!/usr/bin/env python3
"""Checks GPT-2 at its true size, 124M parameters.

    scripts/check_gpt2.py FOLDER

transformers writes a base of random weights, and PEFT writes adapters on all four target modules.
dylora's logits with them must agree with PEFT's to 1e-4 in f32. FOLDER takes about 1 GB. Needs
scripts/reference_env.
"""

import sys
from pathlib import Path

import peft
import torch
from clients import compare, dylora, load_base, randomise, summary, trace
from transformers import GPT2Config, GPT2LMHeadModel

MODULES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
NUM_TOKENS = 48


def check_adapter(folder, base, name, ids, logits, **settings):
    """Checks a random adapter in dylora, and returns PEFT's logits."""
    settings |= {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, "r": 8, "lora_alpha": 16, "target_modules": MODULES}
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(base, config).eval()
    randomise(model, 0.02)
    theirs = model(ids).logits
    model.save_pretrained(folder / name, save_embedding_layers=False)
    model.unload()
    tokens = ",".join(map(str, ids[0].tolist()))
    ours = trace("--adapters", folder / name, "--base", folder / "base", "--tokens", tokens)
    compare(f"GPT-2 124M with {name}", ours["logits"], theirs, logits)
    return theirs


@torch.no_grad()
def main():
    folder = Path(sys.argv[1]).resolve()
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config()).eval()
    base.save_pretrained(folder / "base")
    ids = torch.randint(base.config.vocab_size, (1, NUM_TOKENS))
    logits = base(ids).logits
    check_adapter(folder, base, "LoRA", ids, logits)
    theirs = check_adapter(folder, base, "DoRA", ids, logits, use_dora=True)
    merge = ["--adapters", folder / "DoRA", "--base", folder / "base", "--out", folder / "merged"]
    dylora("merge", *merge, "--as", "base")
    compare("GPT-2 124M with DoRA, merged by dylora", load_base(folder / "merged")(ids).logits, theirs, logits)
    summary()


main()
