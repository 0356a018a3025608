"""Functions that the checks against transformers and PEFT share.

They run dylora, load models without warnings, and compare tensors. The first check that fails stops
the script with exit code 1.
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
INVOCATION = [199, 59]  # "\n[" in the demo's tokens: twice in the first text, not in the second
DYLORA = os.environ.get("DYLORA", "target/debug/dylora")
DEVICE = os.environ.get("DEVICE", "cpu")
checks = []  # the difference of each check, 0 for checks without numbers
transformers.utils.logging.disable_progress_bar()


def dylora(command, *arguments, code=0):
    """Runs dylora, which must exit with `code`. Returns its stdout, or stderr if that is not 0."""
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
    """Stops if two tensors differ, or if `theirs` hardly differs from `without`.

    `without` is the same tensor without adapters or routing. If these hardly changed it, the
    comparison would show nothing.
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
    """Keeps the messages that are logged at the level of warnings or above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@contextmanager
def no_warnings(name):
    """Stops the script if Python, transformers or PEFT give a warning."""
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
    """A new base with adapters from their folders, the first of which is active."""
    (first, folder), *others = folders.items()
    model = load_base(base)
    with no_warnings(folder):
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for name, folder in others:
        with no_warnings(folder):
            model.load_adapter(str(folder), adapter_name=name)
    return model.eval()


def randomise(model, scale=0.05):
    """Adds random numbers to an adapter's parameters, since a new adapter has no effect."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += (10 if "magnitude" in name else 1) * scale * torch.rand_like(parameter)


def mixture_logits(model, experts, ids, weights):
    """The logits if each layer computes W x + b + sum_e g_e (E_e(x) - W x - b).

    E_e is PEFT's own layer with adapter e alone. `weights(layer, module)` is called when a block's
    module, such as "attn.c_attn", runs, and returns g, [b, t, e].
    """
    offsets = {name: calculate_alora_offsets(model.peft_config, name, ids) for name in experts}
    forwards = []

    def blend(number, module, layer, x):
        base = y = layer.base_layer(x)
        g = weights(number, module)
        for e, name in enumerate(experts):
            layer._active_adapter = [name]
            alone = type(layer).forward(layer, x, alora_offsets=offsets[name])
            y = y + g[..., e : e + 1] * (alone - base)
        return y

    gpt2 = model.base_model.model
    for number, block in enumerate(gpt2.transformer.h):
        for module, layer in block.named_modules():
            if isinstance(layer, LoraLayer):
                layer.forward = lambda x, at=(number, module, layer): blend(*at, x)
                forwards.append(layer)
    logits = gpt2(ids).logits
    for layer in forwards:
        del layer.forward
    model.set_adapter(experts[0])
    return logits


def active(model, experts, ids):
    """1 where an expert is active in PEFT, 0 before its invocation tokens, [b, t, e]."""
    mask = torch.ones(*ids.shape, len(experts))
    for e, name in enumerate(experts):
        if model.peft_config[name].alora_invocation_tokens:
            for row, offset in enumerate(calculate_alora_offsets(model.peft_config, name, ids)):
                mask[row, : ids.shape[1] - (offset or 0), e] = 0
    return mask


class Router:
    """A router from router.safetensors, computed as the `spec` in dylora.json says."""

    def __init__(self, spec, tensors, prefix):
        self.spec = spec
        self.tensors = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

    def weights(self, x, present):
        """The routing weights over the experts `present`, [b, t, e].

        The router reads `x`, [b, t, d].
        """
        spec, own = self.spec, self.tensors
        if spec["level"] == "sequence":  # without a prompt, the mean is over the tokens so far
            x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]
        for i in range(spec["hidden_layers"]):
            x = torch.relu(x @ own[f"hidden.{i}.weight"].T + own[f"hidden.{i}.bias"])
        scores = x @ own["weight"].T + own["bias"]
        probs = (scores[..., present] / spec["temperature"]).softmax(-1)
        if spec["top_k"] is not None and spec["top_k"] < len(present):
            chosen_by = probs + own["selection_bias"][present] if spec["selection_bias"] else probs
            chosen = chosen_by.topk(spec["top_k"], -1).indices
            top = probs.gather(-1, chosen)
            top = top / top.sum(-1, keepdim=True) if spec["renormalize"] else top
            probs = torch.zeros_like(probs).scatter(-1, chosen, top)
        g = torch.zeros_like(scores)
        g[..., present] = probs
        return g


def experts_of(block, experts):
    """The numbers of the experts that target a module of a block."""
    layers = [layer for layer in block.modules() if isinstance(layer, LoraLayer)]
    return [e for e, name in enumerate(experts) if any(name in layer.lora_A for layer in layers)]


def routed(model, export, ids):
    """The logits and the routing weights by site of the mixture that an export describes.

    It is computed from PEFT's layers and router.safetensors.
    """
    meta = json.loads((export / "dylora.json").read_text())
    spec, experts = meta["router"]["spec"], meta["experts"]
    tensors = load_file(export / meta["router"]["file"])
    gpt2 = model.base_model.model
    once = spec["scope"] == "shared" and spec["input"] != "layer_input" and not spec["own_experts"]
    if spec["input"] == "embeddings":
        features = gpt2.transformer.wte(ids) + gpt2.transformer.wpe(torch.arange(ids.shape[1]))
    elif spec["input"] == "base_hidden":
        with model.disable_adapter():
            features = model(ids, output_hidden_states=True).hidden_states[-1]
    read, handles, used = {}, [], {}
    if spec["input"] == "layer_input":
        for number, block in enumerate(gpt2.transformer.h):
            hook = lambda _module, _args, output, number=number: read.update({number: output})
            handles.append(block.ln_1.register_forward_hook(hook))

    def weights(number, module):
        layer = f"h.{number}"
        scope = {"shared": "", "layer": f"{layer}.", "module": f"{layer}.{module}."}[spec["scope"]]
        site = "" if once else f".{layer}.{module}" if spec["scope"] == "module" else f".{layer}"
        if site not in used:
            own = experts_of(gpt2.transformer.h[number], experts)
            present = own if spec["own_experts"] else list(range(len(experts)))
            x = read[number] if spec["input"] == "layer_input" else features
            used[site] = Router(spec, tensors, f"{scope}router.").weights(x, present)
        return used[site]

    logits = mixture_logits(model, experts, ids, weights)
    for handle in handles:
        handle.remove()
    mask = active(model, experts, ids)
    return logits, {site: g * mask for site, g in used.items()}
