#!/usr/bin/env python3
"""Compares steps of many mixtures with PEFT's in float64: the loss, and every gradient.

    scripts/check_mixtures.py FOLDER

FOLDER has what the test `steps_are_written_for_peft` writes (tests/kernels/written.rs describes the
files). Each step is computed again on transformers' model of the base:

- The experts are adapters of PEFT, and `mix` of golden.py multiplies their updates by each token's
  routing weights. The part that is always on is an adapter whose weight is always 1.
- The routers are those of docs/concepts/routing.md, written in PyTorch.
- An aLoRA expert adds its update from its last invocation on, which PEFT's own code finds.
- The base gives up the components from which PiSSA starts, by PEFT's own initialisation. All experts
  start from the same components and their weights sum to 1, so removing these components once from
  the base equals what dylora subtracts from each expert.
- transformers keeps packed documents apart by their positions.
- Where the base's products are in FP8, its linear layers quantise the rows of inputs, of gradients and of
  their weights to PyTorch's float8_e4m3fn.

The loss is the mean cross entropy of the labelled tokens, with label smoothing, plus a tenth of the
routers' z-loss. The z-loss is the squared logsumexp of a router's scores, averaged over tokens and
over the places where a router decides.

The losses must agree to 1e-10, and each gradient to 1e-9 of its norm. Otherwise the script fails. It
also fails if a step is missing, or if it does not notice an alpha that is wrong by a thousandth.

The norm of a gradient counts as at least a millionth of that of all gradients together. Some gradients
are zero in exact arithmetic, such as those of queries and keys in a row of one token, and their
computed values are the rounding of larger numbers.

Needs scripts/reference_env.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from golden import float64_for_float32, lora_layers, mix, route, without_float32
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.variants import calculate_alora_offsets
from safetensors.torch import load_file
from transformers.masking_utils import find_packed_sequence_indices
from transformers.pytorch_utils import Conv1D

LOSS_BOUND = 1e-10
GRADIENT_BOUND = 1e-9
# the least norm of a gradient, as a part of the norm of all gradients
LEAST_NORM = 1e-6
NORM_EPS = 1e-6  # of a router that normalises its input
# settings that the routers of all steps share, and their values
SIMPLE_ROUTER = {
    "level": "token", "hidden_layers": 0, "renormalize": True, "eval": None, "selection_bias": False,
    "own_experts": False,
}  # fmt: skip


@dataclass
class Step:
    """A step as dylora computed it."""

    base: Path
    settings: dict
    inputs: dict[str, torch.Tensor]
    # the tensors of the experts and routers
    mixture: dict[str, torch.Tensor]
    loss: torch.Tensor
    grads: dict[str, torch.Tensor]

    @property
    def adapters(self):
        """The settings of each expert by the name of its adapter."""
        experts = self.settings["experts"]
        return {"shared" if spec.get("shared") else f"expert_{e}": spec for e, spec in enumerate(experts)}

    @property
    def num_routed(self):
        return len(self.adapters) - ("shared" in self.adapters)


def read_step(folder):
    tensors = load_file(folder / "step.safetensors")
    mixture, grads = ({k[len(p) :]: t for k, t in tensors.items() if k.startswith(p)} for p in ["mixture.", "grad."])
    settings = json.loads((folder / "case.json").read_text())
    router = settings["router"]
    assert all(router[key] == value for key, value in SIMPLE_ROUTER.items()), router
    assert router["input"] in ["embeddings", "base_hidden", "layer_input"], router
    inputs = {key: tensors[key] for key in ["input_ids", "position_ids", "labels"]}
    return Step(folder / "base", settings, inputs, mixture, tensors["loss"], grads)


def load_base(step):
    """The base in float64. It must see the documents that the step has."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        step.base, dtype=torch.float64, attn_implementation="eager"
    )
    input_ids, position_ids = step.inputs["input_ids"], step.inputs["position_ids"]
    found = find_packed_sequence_indices(position_ids)
    found = torch.zeros_like(input_ids) if found is None else found
    lengths = step.settings["documents"] or [input_ids.shape[1]]
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert torch.equal(found, documents.expand_as(found)), f"other documents than {lengths}: {position_ids}"
    return without_float32(base.eval())


def add_adapters(step, base, alpha_factor):
    """The base with the experts as adapters. Those that are trained require gradients."""
    starts = {spec["init"] for spec in step.adapters.values()}
    sizes = {json.dumps(spec["modules"]) for spec in step.adapters.values()}
    if starts == {"pissa"}:
        assert step.settings["source"] == "router" and len(sizes) == 1, "the experts' weights must sum to 1"
    else:
        assert starts == {"default"}, starts
    model = None
    for name, spec in step.adapters.items():
        (size,) = {tuple(size.items()) for size in spec["modules"].values()}
        assert not spec["use_dora"]
        config = LoraConfig(
            task_type="CAUSAL_LM", target_modules=list(spec["modules"]), r=dict(size)["rank"],
            lora_alpha=dict(size)["alpha"] * alpha_factor, use_rslora=spec["use_rslora"],
            fan_in_fan_out=base.config.model_type == "gpt2",
            alora_invocation_tokens=spec["alora_invocation_tokens"] or None,
            # PEFT takes the components out of the base for each adapter that starts from them
            init_lora_weights="pissa" if starts == {"pissa"} and model is None else True,
        )  # fmt: skip
        with float64_for_float32():  # PEFT factorises in float32
            if model is None:
                model = get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    return model.double().eval()


def leaves_of(step, model):
    """The trained parameters under dylora's names, and the routers' parameters, with their values."""
    leaves = {}
    for path, layer in lora_layers(model):
        for name in layer.lora_A:
            for key, matrices in [("lora_a", layer.lora_A), ("lora_b", layer.lora_B)]:
                parameter, value = matrices[name].weight, step.mixture[f"{path}.{name}.{key}"]
                assert parameter.shape == value.shape and parameter.dtype == value.dtype
                parameter.data.copy_(value)
                parameter.requires_grad_(step.adapters[name]["trainable"])
                if parameter.requires_grad:
                    leaves[f"{path}.{name}.{key}"] = parameter
    routers = [key for key in step.mixture if key.startswith("router.") or ".router." in key]
    return leaves, {key: step.mixture[key].clone().requires_grad_(True) for key in routers}


class Routing:
    """The weights that each layer's adapters get in a forward pass, and the scores of the routers."""

    def __init__(self, step, model, routers):
        self.step, self.routers = step, routers
        self.logits, self.weights = [], {}
        self.mask = self.invocation_mask(model)
        self.modules = [name for name, _ in lora_layers(model)]
        self.is_fixed = step.settings["source"] != "router" or step.num_routed == 1

    def invocation_mask(self, model):
        """1 where an expert acts and 0 before its invocation, [b, t, e]."""
        input_ids = self.step.inputs["input_ids"]
        seq_len = input_ids.shape[1]
        mask = torch.ones(*input_ids.shape, self.step.num_routed, dtype=torch.float64)
        for e, (name, spec) in enumerate(self.step.adapters.items()):
            if spec["alora_invocation_tokens"]:
                assert not self.step.settings["documents"], "PEFT knows no documents"
                for row, offset in enumerate(calculate_alora_offsets(model.peft_config, name, input_ids)):
                    mask[row, : seq_len - (offset or 0), e] = 0.0
                assert 0.0 < mask[..., e].mean() < 1.0, f"{name} must act at some tokens alone"
        return mask

    def set_weights(self, modules, weights):
        weights = weights * self.mask
        if "shared" in self.step.adapters:
            weights = torch.cat([weights, torch.ones_like(weights[..., :1])], -1)
        self.weights |= {module: weights for module in modules}

    def fix(self):
        """Sets the weights that no router decides."""
        source, num_experts = self.step.settings["source"], self.step.num_routed
        if source == "uniform":
            weights = torch.full([num_experts], 1.0 / num_experts, dtype=torch.float64)
        elif source == "all" or source == "router":
            weights = torch.ones(num_experts, dtype=torch.float64)
        elif "expert" in source:
            weights = torch.eye(num_experts, dtype=torch.float64)[source["expert"]]
        else:
            weights = torch.tensor(source["given"], dtype=torch.float64)
        self.set_weights(self.modules, weights)

    def decide(self, name, modules, features):
        """Lets the router with a name decide for modules."""
        settings = self.step.settings["router"]
        if settings["normalize_input"]:
            features = features / (features.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
        router = {f"router.{key}": self.routers[f"{name}.{key}"] for key in ["weight", "bias"]}
        scores, _, weights = route(router, features, settings["temperature"], settings["top_k"])
        self.logits.append(scores * settings["temperature"])
        self.set_weights(modules, weights)

    def decide_for(self, layer, features):
        """Lets the routers of a layer, such as `h.0`, decide. They all read the same features."""
        scope = self.step.settings["router"]["scope"]
        modules = [module for module in self.modules if module.startswith(f"{layer}.")]
        if scope == "module":
            for module in modules:
                self.decide(f"{module}.router", [module], features)
        else:
            self.decide("router" if scope == "shared" else f"{layer}.router", modules, features)

    def z_loss(self):
        sites = [logits.logsumexp(-1).square().mean() for logits in self.logits]
        return sum(sites) / len(sites) if sites else 0.0


def blocks_of(base):
    """The blocks by names such as `h.0`."""
    name = "h" if base.config.model_type == "gpt2" else "layers"
    return {f"{name}.{i}": block for i, block in enumerate(getattr(base.base_model, name))}


def features_of(step, base):
    """What the routers read, if it is the same for all layers."""
    inputs = {key: step.inputs[key] for key in ["input_ids", "position_ids"]}
    kind = step.settings["router"]["input"]
    if kind == "base_hidden":
        with torch.no_grad():
            return base.base_model(**inputs, use_cache=False)[0]
    embeddings = base.get_input_embeddings()(inputs["input_ids"])
    if base.config.model_type == "gpt2":
        embeddings = embeddings + base.base_model.wpe(inputs["position_ids"])
    return embeddings if kind == "embeddings" else None


def prepare(routing, base, features):
    """Decides the weights, or lets the routers decide when a layer has its input."""
    blocks = blocks_of(base)
    if routing.is_fixed:
        routing.fix()
    elif features is None:
        for name, block in blocks.items():
            norm = block.ln_1 if hasattr(block, "ln_1") else block.input_layernorm
            norm.register_forward_hook(lambda _, args, output, name=name: routing.decide_for(name, output))
    elif routing.step.settings["router"]["scope"] == "shared":
        routing.decide("router", routing.modules, features)
    else:
        for name in blocks:
            routing.decide_for(name, features)


def quantised(x):
    """`x` after each of its rows was rounded to e4m3, with the row's largest number as 448."""
    largest = x.abs().amax(-1, keepdim=True)
    largest[largest == 0] = 448  # a row of zeros
    codes = (x * (448 / largest)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.to(x.dtype) * (largest / 448)


class QuantisedProduct(torch.autograd.Function):
    """x W for a frozen W, [i, o]."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return quantised(x) @ quantised(weight.T).T

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return quantised(grad) @ quantised(weight).T, None


def quantise(base):
    """Computes the linear layers of GPT-2's blocks in FP8."""
    for block in blocks_of(base).values():
        for layer in block.modules():
            if isinstance(layer, Conv1D):
                layer.forward = lambda x, layer=layer: QuantisedProduct.apply(x, layer.weight) + layer.bias


def step_of_peft(step, alpha_factor=1.0):
    """The loss and the gradients by name. A wrong factor of alpha must be seen."""
    base = load_base(step)
    features = features_of(step, base)
    model = add_adapters(step, base, alpha_factor)
    if step.settings["base_products"] == "fp8":
        quantise(base)
    experts, routers = leaves_of(step, model)
    routing = Routing(step, model, routers)
    prepare(routing, base, features)
    mix(model, lambda name: routing.weights[name])
    inputs = {key: step.inputs[key] for key in ["input_ids", "position_ids"]}
    logits = base(**inputs, use_cache=False).logits.flatten(0, 1)
    smoothing = step.settings["label_smoothing"]
    loss = F.cross_entropy(logits, step.inputs["labels"].flatten(), ignore_index=-100, label_smoothing=smoothing)
    loss = loss + routing.z_loss() / 10
    leaves = experts | routers
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), grads)]
    return loss.detach(), dict(zip(leaves, grads))


def distances(step, peft):
    """The difference of the losses, and the largest distance of a gradient, with its name."""
    (loss, grads), largest = peft, (0.0, "none")
    assert set(grads) == set(step.grads), f"other gradients: {set(grads) ^ set(step.grads)}"
    norms = {name: grad.norm().item() for name, grad in grads.items()}
    least = LEAST_NORM * math.hypot(*norms.values())
    for name, grad in grads.items():
        distance = (step.grads[name] - grad).norm().item() / max(norms[name], least)
        largest = max(largest, (math.inf if math.isnan(distance) else distance, name))
    return abs(step.loss.item() - loss.item()), *largest


def main():
    folder = Path(sys.argv[1])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    faults, losses, gradients = [], [], []
    folders = [folder / f"{at:03}" for at in range(cases["written"])]
    if missing := [path.name for path in folders if not (path / "case.json").exists()]:
        sys.exit(f"steps are missing: {', '.join(missing)}")
    for path in folders:
        step = read_step(path)
        of_loss, of_gradient, name = distances(step, step_of_peft(step))
        line = f"{step.settings['name']}: loss {of_loss:.1e}, gradient {of_gradient:.1e} ({name})"
        print(line, flush=True)
        # with a NaN, the comparisons fail
        if not (of_loss <= LOSS_BOUND and of_gradient <= GRADIENT_BOUND):
            faults.append(line)
        losses.append(of_loss)
        gradients.append(of_gradient)
    seen_loss, seen_gradient, _ = distances(step, step_of_peft(step, 1.001))
    if seen_loss <= LOSS_BOUND or seen_gradient <= GRADIENT_BOUND:
        faults.append(f"a wrong alpha changes the loss by {seen_loss:.1e}, and gradients by {seen_gradient:.1e}")
    print(
        f"{len(losses)} steps compared with PEFT, {len(cases['left_out'])} with dropout left out; the largest "
        f"differences are {max(losses):.1e} of a loss and {max(gradients):.1e} of a gradient's norm"
    )
    if faults:
        sys.exit("\n".join(["too far from PEFT:", *faults]))


main()
