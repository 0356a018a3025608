#!/usr/bin/env python3
"""Loads an export in PEFT and compares its logits with dylora's.

    scripts/check_peft.py DYLORA CHECKPOINT EXPORT BASE [TEXT..]

For each expert: real PEFT loads the folder with no warning, and its logits equal those of
`dylora trace --routing expert:N` to 1e-4 (f32). Then the mixture: PEFT's LoRA modules are weighted,
token by token, with router.safetensors as dylora.json describes it, and compared with `dylora trace`.
Needs torch, transformers, peft, safetensors (scripts/reference_env).
"""
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
TEXTS = ["The answer is 12 + 7 = 19.", "fn main", "Once upon a time there was a fox."]


class Collect(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def trace(dylora, checkpoint, text, routing, folder):
    out = Path(folder) / f"{routing.replace(':', '_')}.safetensors"
    command = [dylora, "trace", "--checkpoint", checkpoint, "--text", text, "--routing", routing]
    subprocess.run(command + ["--out", out, "--device", "cpu", "--dtype", "f32"], check=True, stdout=subprocess.DEVNULL)
    return load_file(out)


def load_without_warnings(base_dir, export, name):
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    base.eval()
    collect = Collect()
    logging.getLogger().addHandler(collect)
    for library in ("transformers", "peft"):
        logging.getLogger(library).addHandler(collect)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(export / name), adapter_name=name).eval()
    problems = [str(w.message) for w in caught] + collect.messages
    if problems:
        sys.exit(f"{name}: PEFT warned: {problems}")
    return model


def difference(name, ours, theirs):
    found = (ours - theirs).abs().max().item()
    print(f"{name}: largest difference of a logit {found:.1e}")
    if not found <= TOLERANCE:
        sys.exit(f"{name}: {found:.1e} is more than {TOLERANCE:.0e}")
    return found


def routed_logits(model, experts, export, meta, ids):
    """The mixture from PEFT's modules and router.safetensors alone."""
    router = load_file(export / "router.safetensors")
    gpt2 = model.base_model.model.transformer
    x = gpt2.wte(ids) + gpt2.wpe(torch.arange(ids.shape[1]))
    logits = (x @ router["weight"].T + router["bias"]) / meta["router"]["temperature"]
    g = logits.softmax(-1)
    k = meta["router"]["top_k"]
    if k is not None and k < len(experts):
        top = g.topk(k, -1)
        g = torch.zeros_like(g).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))

    def hook(module, args, _output):
        (x,) = args
        y = module.base_layer(x)
        for e, name in enumerate(experts):
            update = module.lora_B[name](module.lora_A[name](x)) * module.scaling[name]
            y = y + g[..., e : e + 1] * update
        return y

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, LoraLayer)]
    result = model(ids).logits
    for handle in handles:
        handle.remove()
    return result


@torch.no_grad()
def main():
    dylora, checkpoint, export, base_dir, *texts = sys.argv[1:]
    export = Path(export)
    meta = json.loads((export / "dylora.json").read_text())
    experts = meta["experts"]
    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for expert, name in enumerate(experts):
            model = load_without_warnings(base_dir, export, name)
            for text in texts or TEXTS:
                ours = trace(dylora, checkpoint, text, f"expert:{expert}", folder)
                theirs = model(ours["input_ids"]).logits
                largest = max(largest, difference(f"{name} on {text!r}", ours["logits"], theirs))
        for name in experts[:-1]:
            model.load_adapter(str(export / name), adapter_name=name)
        if meta["router"] is not None:
            for text in texts or TEXTS:
                ours = trace(dylora, checkpoint, text, "router", folder)
                theirs = routed_logits(model, experts, export, meta, ours["input_ids"])
                largest = max(largest, difference(f"mixture on {text!r}", ours["logits"], theirs))
    print(f"{len(experts)} experts and the mixture agree with PEFT: largest difference {largest:.1e}")


main()
