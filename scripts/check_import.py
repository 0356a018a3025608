#!/usr/bin/env python3
"""Checks adapters that PEFT wrote in dylora, and X-LoRA in both directions.

    scripts/check_import.py FOLDER

The adapters are of several kinds, on the demo base. FOLDER holds the runs of scripts/check_peft.py.
All logits must agree to 1e-4 in f32. Needs scripts/reference_env.
"""

import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import peft
import torch
import transformers
from clients import BASE, INVOCATION, TEXTS, compare, dylora, expect, load_base, randomise, summary, trace
from safetensors.torch import load_file

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


def check_base():
    """Checks dylora's tokens, and the logits of the base alone."""
    tokenizer, base = transformers.AutoTokenizer.from_pretrained(BASE), load_base(BASE)
    for number, text in enumerate(TEXTS, 1):
        ours = trace("--base", BASE, "--text", text)
        same = ours["input_ids"][0].tolist() == tokenizer.encode(text)
        expect(f"transformers has the same tokens, text {number}", same)
        compare(f"base alone, text {number}", ours["logits"], base(ours["input_ids"]).logits)


def check_adapter(folder, name, settings):
    """Checks an adapter with random weights, saved by PEFT, in dylora."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, r=4, lora_alpha=6, **settings)
    model = peft.get_peft_model(load_base(BASE), config).eval()
    initial = {}
    if "init_lora_weights" in settings:
        initial = {"path_initial_model_for_weight_conversion": str(folder / "initial")}
        model.save_pretrained(folder / "initial", save_embedding_layers=False)
    randomise(model)
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(BASE).encode(TEXTS[0])])
    theirs = model(ids).logits
    # PEFT warns that PiSSA has changed the base
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        model.save_pretrained(folder / name, save_embedding_layers=False, **initial)
    ours = trace("--adapters", folder / name, "--base", BASE, "--text", TEXTS[0])
    compare(f"PEFT's adapter in dylora ({name})", ours["logits"], theirs, load_base(BASE)(ids).logits)


def load_xlora_expert(model, weights, **kwargs):
    """Loads an expert into X-LoRA, which expects the base's blocks in a module called `model`.

    This holds for Llama but not for GPT-2, so the names are corrected here.
    """
    weights = {key.replace("model.model.", "model."): tensor for key, tensor in weights.items()}
    return peft.set_peft_model_state_dict(model, weights, **kwargs)


def check_xlora(folder, run):
    """Checks the mixture exported as X-LoRA, in PEFT's XLoraModel and again in dylora."""
    export = folder / "xlora"
    dylora("export-adapters", "--checkpoint", run, "--format", "xlora", "--out", export)
    fields = json.loads((export / "xlora_config.json").read_text())
    # PEFT names the adapters by their numbers, but then activates them by their keys, so the keys
    # must be the numbers; others cause a KeyError
    fields["adapters"] = {str(i): str(export / path) for i, path in enumerate(fields["adapters"].values())}
    known = {key: value for key, value in fields.items() if key in peft.XLoraConfig.__dataclass_fields__}
    base = load_base(BASE)
    base.config.use_cache = False
    with mock.patch("peft.tuners.xlora.model.set_peft_model_state_dict", load_xlora_expert):
        model = peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", **known)).eval()
    classifier = model.base_model.internal_xlora_classifier.layers[-1]
    weights = load_file(export / "xlora_classifier.safetensors")
    classifier.load_state_dict({key.removeprefix("last."): tensor for key, tensor in weights.items()})
    for number, text in enumerate(TEXTS, 1):
        ours = trace("--checkpoint", run, "--text", text)
        ids = ours["input_ids"]
        logits = model(ids).logits
        scalings = model.base_model.internal_xlora_scalings
        compare(f"X-LoRA in PEFT, text {number}", ours["logits"], logits, load_base(BASE)(ids).logits)
        every = ours["routing_weights"].unsqueeze(2).expand_as(scalings)
        compare(f"X-LoRA's scalings of {scalings.shape[2]} layers, text {number}", every, scalings)
    again = trace("--adapters", export, "--base", BASE, "--text", text)
    compare("the X-LoRA folder in dylora", again["logits"], logits)


@torch.no_grad()
def main():
    folder = Path(sys.argv[1]).resolve()
    torch.manual_seed(0)
    check_base()
    for name, settings in ADAPTERS.items():
        check_adapter(folder, name, settings)
    check_xlora(folder, folder / "pissa")
    summary()


main()
