"""Tiny random bases, adapters and routers on them, and the writing of golden files.

make_golden.py, make_golden_families.py and make_golden_adapters.py use this module, and
check_mixtures.py a part of it.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import peft
import safetensors.torch
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

BASES = {
    "gpt2_tied": {},
    "gpt2_untied_exact_gelu": {"activation_function": "gelu", "tie_word_embeddings": False},
    "gpt2_inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_head": 2},
    "gpt2_unscaled_attention": {"scale_attn_weights": False, "layer_norm_epsilon": 1e-3},
    "gpt2_narrow_inner": {"n_inner": 24, "vocab_size": 50},
}
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
NUM_EXPERTS = 3


def begin(default):
    """The folder to write to: the script's argument, or `default` in the repository. It is made if
    it is missing. From here on, the same input gives the same bits.
    """
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / default)
    folder.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    return folder


def randn(generator, *shape, std=1.0):
    """Random numbers in float64 that float32 can represent exactly."""
    return (torch.randn(*shape, generator=generator) * std).double()


@torch.no_grad()
def randomise(generator, model, dtype=torch.float32):
    """Gives every parameter random values that `dtype` can represent exactly.

    The weights of norms, which are the only vectors called `weight`, are random numbers around 1.
    """
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        values = randn(generator, *parameter.shape, std=0.3) + (1.0 if norm else 0.0)
        parameter.copy_(values.to(dtype))


@contextlib.contextmanager
def float64_for_float32():
    """Makes Python code that asks torch for float32 get float64."""
    with (
        mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


class NoFloat32(TorchDispatchMode):
    """Fails if an operation has a result in float32.

    It goes by the size of an element, since `torch.float32` is replaced while it is in use.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.element_size() == 4 and tensor.is_floating_point():
                raise TypeError(f"`{func}` has a result in float32")
        return result


def without_float32(model):
    """The same model, which now computes in float64 where transformers asks for float32.

    The forward pass of a model in float64 is then wholly in float64; if it is not, it fails.
    """
    decoder = model.base_model
    forward = decoder.forward
    if hasattr(decoder, "rotary_emb"):
        with float64_for_float32():
            decoder.rotary_emb = type(decoder.rotary_emb)(model.config)

    def exact_forward(*args, **kwargs):
        check = NoFloat32() if model.dtype == torch.float64 else contextlib.nullcontext()
        with float64_for_float32(), check:
            return forward(*args, **kwargs)

    decoder.forward = exact_forward
    return model


def make_base(seed, settings):
    """A GPT-2 in float64 whose parameters are all random, biases and LayerNorms included."""
    config = {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 32, "vocab_size": 61, **settings}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, attn_implementation="eager"))
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    randomise(generator, model)
    return model, torch.randint(config["vocab_size"], (2, 11), generator=generator)


@torch.no_grad()
def base_results(model, blocks, final_norm, input_ids):
    """The tensors of `NAME.expected.safetensors`: the input of each block, and the logits."""
    hidden = []
    modules = [*blocks, final_norm]
    hooks = [module.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for module in modules]
    tensors = {"input_ids": input_ids, "logits": model(input_ids).logits}
    for hook in hooks:
        hook.remove()
    return tensors | {f"hidden_states.{i}": tensor for i, tensor in enumerate(hidden)}


@dataclass
class Experts:
    """A base with adapters of PEFT, which are the experts, and a router over them."""

    model: peft.PeftModel
    lora: list[torch.nn.Parameter]
    router: dict[str, torch.Tensor]


def make_experts(generator, base, settings, **kwargs):
    """The base with random adapters, whose B is not zero, and a random router.

    `kwargs` are further settings of PEFT's LoraConfig.
    """
    lora = {"r": settings["rank"], "lora_alpha": settings["alpha"], **kwargs}
    lora = peft.LoraConfig(target_modules=settings["target_modules"], **lora)
    model = peft.get_peft_model(base, lora, adapter_name="expert_0")
    for e in range(1, NUM_EXPERTS):
        model.add_adapter(f"expert_{e}", lora)
    model = model.double().eval()
    trained = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    for parameter in trained:
        parameter.data.copy_(randn(generator, *parameter.shape, std=0.3).float())
    width = base.config.hidden_size
    router = {
        "router.weight": randn(generator, NUM_EXPERTS, width).float().double().requires_grad_(True),
        "router.bias": randn(generator, NUM_EXPERTS).float().double().requires_grad_(True),
    }
    return Experts(model, trained, router)


def lora_layers(model):
    """The layers of a PeftModel that have adapters, with names such as `h.0.attn.c_attn`."""
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield path.split("model.")[-1].removeprefix("transformer."), layer


def mix(model, weights):
    """Makes each LoRA layer add its adapters' updates, multiplied by `weights`, [b, t, e].

    - `weights`: one tensor, or a function that returns that of the layer with a name; column e
      belongs to the adapter that was added as number e
    """
    names = list(model.peft_config)

    def new_forward(of_layer):
        def forward(layer, x):
            y, g = layer.base_layer(x), of_layer()
            for name in layer.lora_A:
                column, update = names.index(name), layer.lora_B[name](layer.lora_A[name](x))
                y = y + g[..., column : column + 1] * layer.scaling[name] * update
            return y

        return forward

    for name, layer in lora_layers(model):
        of_layer = (lambda name=name: weights(name)) if callable(weights) else (lambda: weights)
        layer.forward = new_forward(of_layer).__get__(layer)


def stacked(model, pick):
    """`pick` applied to each LoRA matrix, stacked over the adapters under dylora's names."""
    tensors = {}
    for name, layer in lora_layers(model):
        for key, matrices in [("lora_a", layer.lora_A), ("lora_b", layer.lora_B)]:
            tensors[f"{name}.{key}"] = torch.stack([pick(matrix.weight) for matrix in matrices.values()])
    return tensors


def next_tokens(input_ids):
    """The labels of `input_ids`: the next token, or -100 at the end and at the start of row 0."""
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:]
    labels[0, :3] = -100
    return labels


def unrouted_results(generator, experts, input_ids):
    """The experts themselves, and the logits of each one alone and of all with given weights."""
    model = experts.model
    weights = stacked(model, lambda weight: weight) | experts.router
    tensors = {key: tensor.float() for key, tensor in weights.items()}
    for e in range(NUM_EXPERTS):
        model.set_adapter(f"expert_{e}")
        tensors[f"logits.expert_{e}"] = model(input_ids).logits
    # with one-hot weights, `mix` gives PEFT's own result
    mix(model, torch.eye(NUM_EXPERTS).double()[1].expand(*input_ids.shape, -1))
    torch.testing.assert_close(model(input_ids).logits, tensors["logits.expert_1"], rtol=0, atol=1e-13)
    tensors["given.weights"] = randn(generator, *input_ids.shape, NUM_EXPERTS)
    mix(model, tensors["given.weights"])
    tensors["given.logits"] = model(input_ids).logits
    return tensors


def route(router, embeddings, temperature, top_k):
    """The router's scores divided by the temperature, its probs and its weights, all [b, t, e].

    - `embeddings`: what the router reads, [b, t, d]
    - `top_k`: how many of the experts get a weight; None means all
    """
    scores = (embeddings @ router["router.weight"].T + router["router.bias"]) / temperature
    probs = scores.softmax(-1)
    if top_k is None:
        return scores, probs, probs
    kept = torch.zeros_like(probs).scatter(-1, probs.topk(top_k, -1).indices, 1.0)
    return scores, probs, probs * kept / (probs * kept).sum(-1, keepdim=True)


def routed_results(experts, embeddings, input_ids, temperature, top_k):
    """The scores of `route`, and the probs, weights and logits that a golden file contains."""
    for parameter in experts.lora:  # set_adapter has frozen all adapters except the last
        parameter.requires_grad_(True)
    scores, probs, weights = route(experts.router, embeddings, temperature, top_k)
    mix(experts.model, weights)
    return scores, {"probs": probs, "weights": weights, "logits": experts.model(input_ids).logits}


def loss_and_gradients(experts, logits, labels, prefix="", label_smoothing=0.0):
    """The cross entropy, and its gradient with respect to each LoRA matrix and the router."""
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=label_smoothing
    )
    leaves = [*experts.lora, *experts.router.values()]
    grads = dict(zip(leaves, torch.autograd.grad(loss, leaves, retain_graph=True)))
    named = stacked(experts.model, grads.get) | {name: grads[leaf] for name, leaf in experts.router.items()}
    return {f"{prefix}loss": loss} | {f"{prefix}grad.{name}": grad for name, grad in named.items()}


def save(folder, name, tensors, **metadata):
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    data = safetensors.torch.save(tensors, {"format": "pt", **VERSIONS, **metadata})
    # safetensors writes metadata in random order; sorted, the same numbers give the same file
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    (folder / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def save_shards(folder, name, weights):
    """Writes two shards, and returns the `weight_map` of their index."""
    keys = sorted(weights)
    weight_map = {}
    for i, part in enumerate([keys[::2], keys[1::2]], 1):
        shard = f"{name}-{i:05}-of-00002"
        save(folder, shard, {key: weights[key] for key in part})
        weight_map |= {key: f"{shard}.safetensors" for key in part}
    return weight_map


def save_json(folder, name, value):
    (folder / f"{name}.json").write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
