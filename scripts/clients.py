"""What the checks against transformers and PEFT share: to run dylora, to load without a warning, to compare.

A check stops the script with exit code 1 at the first disagreement.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import calculate_alora_offsets
from safetensors.torch import load_file

TOLERANCE = 1e-4
BASE = "demo/base"
TEXTS = [
    "How much remains?\n[1] 7 hours = 7 * 11 = 77 crowns\n[2] 77 - 7 = 70 crowns\nanswer: 70 crowns",
    "SCENE. The battlements at dawn. HELICAN is discovered, asleep beneath a tree.",
]
INVOCATION = [199, 59]  # "\n[" in the demo's tokens: twice in the first text, nowhere in the second
DYLORA = os.environ.get("DYLORA", "target/debug/dylora")
DEVICE = os.environ.get("DEVICE", "cpu")
checks = []  # the difference of each, 0 for those without numbers
transformers.utils.logging.disable_progress_bar()


def dylora(command, *arguments, code=0):
    """Runs dylora, which must exit with `code`; gives its results, or its messages if that is not 0."""
    line = [DYLORA, "--quiet", command, "--device", DEVICE, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != code:
        sys.exit(f"`{' '.join(line)}` exited with {done.returncode}, not {code}:\n{done.stdout}{done.stderr}")
    return done.stderr if code else done.stdout


def trace(*arguments):
    """The tensors of `dylora trace`, in f32."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.safetensors"
        dylora("trace", *arguments, "--dtype", "f32", "--out", file)
        return load_file(file)


def compare(name, ours, theirs, without=None):
    """Stops if two tensors differ, or if `theirs` is so near to `without` that the check would show nothing.

    `without` is what the tensor is without adapters or routing.
    """
    if ours.shape != theirs.shape:
        sys.exit(f"{name}: dylora's shape is {list(ours.shape)}, the client's {list(theirs.shape)}")
    found = (ours - theirs).abs().max().item()
    moved = None if without is None else (theirs - without).abs().max().item()
    print(f"{name}: {found:.1e}" + ("" if moved is None else f" (moved by {moved:.2f})"), flush=True)
    if not found <= TOLERANCE:
        sys.exit(f"{name}: the largest difference {found:.1e} is more than {TOLERANCE:.0e}")
    if moved is not None and not moved > 0.1:
        sys.exit(f"{name}: the adapters or routers hardly do anything, so this shows nothing")
    checks.append(found)


def expect(name, condition, text=""):
    """Stops if a condition does not hold."""
    if not condition:
        sys.exit(f"{name}: not so\n{text}")
    print(f"{name}: yes", flush=True)
    checks.append(0.0)


def summary():
    print(f"all {len(checks)} checks hold, the largest difference is {max(checks):.1e}")


class Collect(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@contextmanager
def no_warnings(name):
    """Stops if Python, transformers or PEFT warn."""
    collect = Collect()
    loggers = [logging.getLogger(library) for library in (None, "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(collect)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for logger in loggers:
        logger.removeHandler(collect)
    if problems := [str(w.message) for w in caught] + collect.messages:
        sys.exit(f"{name}: loading it warned: {problems}")


def load_base(folder):
    with no_warnings(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_adapters(base, **folders):
    """A new base with adapters out of their folders, the first one active."""
    (first, folder), *others = folders.items()
    model = load_base(base)
    with no_warnings(folder):
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for name, folder in others:
        with no_warnings(folder):
            model.load_adapter(str(folder), adapter_name=name)
    return model.eval()


def randomise(model, scale=0.05):
    """Moves an adapter from its start, where it does nothing."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += (10 if "magnitude" in name else 1) * scale * torch.rand_like(parameter)


def mixture_logits(model, experts, ids, weights):
    """W x + b + sum_e g_e (E_e(x) - W x - b) in each layer, E_e being PEFT's own layer with adapter e alone.

    `weights(layer)` gives g, [b, t, e], of a block when the block's LoRA layers are run.
    """
    offsets = {name: calculate_alora_offsets(model.peft_config, name, ids) for name in experts}
    forwards = []

    def blend(number, layer, x):
        base = y = layer.base_layer(x)
        g = weights(number)
        for e, name in enumerate(experts):
            layer._active_adapter = [name]
            alone = type(layer).forward(layer, x, alora_offsets=offsets[name])
            y = y + g[..., e : e + 1] * (alone - base)
        return y

    gpt2 = model.base_model.model
    for number, block in enumerate(gpt2.transformer.h):
        for layer in block.modules():
            if isinstance(layer, LoraLayer):
                layer.forward = lambda x, number=number, layer=layer: blend(number, layer, x)
                forwards.append(layer)
    logits = gpt2(ids).logits
    for layer in forwards:
        del layer.forward
    model.set_adapter(experts[0])
    return logits


def active(model, experts, ids):
    """1 where PEFT has an expert active, 0 before its invocation, [b, t, e]."""
    mask = torch.ones(*ids.shape, len(experts))
    for e, name in enumerate(experts):
        if model.peft_config[name].alora_invocation_tokens:
            for row, offset in enumerate(calculate_alora_offsets(model.peft_config, name, ids)):
                mask[row, : ids.shape[1] - (offset or 0), e] = 0
    return mask


def routed(model, export, ids):
    """The mixture that an export describes, of PEFT's layers and router.safetensors: logits, weights by layer."""
    meta = json.loads((export / "dylora.json").read_text())
    rule, experts = meta["router"], meta["experts"]
    router = load_file(export / rule["file"])
    gpt2 = model.base_model.model
    used = {}

    def route(x, prefix=""):
        g = ((x @ router[prefix + "weight"].T + router[prefix + "bias"]) / rule["temperature"]).softmax(-1)
        if rule["top_k"] is not None:
            top = g.topk(rule["top_k"], -1)
            g = torch.zeros_like(g).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
        used[prefix] = g

    handles = []
    if rule["input"] == "layer_input":
        for number, block in enumerate(gpt2.transformer.h):
            prefix = f"h.{number}."
            hook = lambda _module, _args, output, prefix=prefix: route(output, prefix)
            handles.append(block.ln_1.register_forward_hook(hook))
    elif rule["input"] == "base_hidden":
        with model.disable_adapter():
            route(model(ids, output_hidden_states=True).hidden_states[-1])
    else:
        route(gpt2.transformer.wte(ids) + gpt2.transformer.wpe(torch.arange(ids.shape[1])))
    logits = mixture_logits(model, experts, ids, lambda number: used.get(f"h.{number}.", used.get("")))
    for handle in handles:
        handle.remove()
    mask = active(model, experts, ids)
    return logits, [g * mask for g in used.values()]
