#!/usr/bin/env python3
"""Writes tests/golden/*: the results of transformers and PEFT in float64 on tiny random GPT-2s.

    "$(scripts/reference_env)" scripts/make_golden.py [FOLDER]

For each base in BASES, it writes the files of a base as on the Hub (`NAME.config.json`, and
`NAME.safetensors` or shards) and `NAME.expected.safetensors` with

    input_ids        [b, t]
    hidden_states.i  [b, t, d], the input of block i; the last one is the input of ln_f
    logits           [b, t, v]

For each set of experts in EXPERTS on the base `gpt2_tied`, it writes `NAME.safetensors` with

    input_ids, labels  [b, t]; labels are already shifted, -100 means no loss
    h.{layer}.{module}.lora_a [e, r, i], .lora_b [e, o, r]; router.weight [e, d], router.bias [e]
    logits.expert_i    PEFT with adapter i alone
    given.weights, given.logits              with given routing weights
    {dense,top_2}.probs, .weights, .logits   by the router, with all experts or the best two
    {dense,top_2}.loss, .smoothed_loss       cross entropy without and with label smoothing
    {dense,top_2}.grad.NAME                  gradient of .loss
    {dense,top_2}.smoothed_grad.NAME         gradient of .smoothed_loss
    top_2.load_balancing_loss                of transformers' Mixtral over the labelled positions,
                                             computed in float32

make_golden_adapters.py writes the folder `peft`.

Weights are stored in float32 and used in float64, without loss. The metadata of each file contains
the versions of `torch`, `transformers` and `peft`, and the settings that the numbers depend on.
"""

import json
import sys
from pathlib import Path

import make_golden_adapters
import peft
import torch
from golden import BASES, make_base, randn, save
from peft.tuners.lora import LoraLayer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

EXPERTS = {
    "experts_c_attn": {"target_modules": ["attn.c_attn"], "rank": 4, "alpha": 8, "temperature": 0.5},
    "experts_all_linears": {
        "target_modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        "rank": 2,
        "alpha": 3,
        "temperature": 1.7,
    },
}
NUM_EXPERTS = 3
LABEL_SMOOTHING = 0.1


def save_base(folder, name, model):
    """Writes the base in one of the layouts that GPT-2s have on the Hub."""
    weights = {key: tensor.float() for key, tensor in model.state_dict().items()}
    # only `gpt2_unscaled_attention` stores its tied head
    if model.config.tie_word_embeddings and name != "gpt2_unscaled_attention":
        del weights["lm_head.weight"]
    if name == "gpt2_inverse_layer_idx":  # like OpenAI's file: without a prefix, with mask buffers
        weights = {key.removeprefix("transformer."): tensor for key, tensor in weights.items()}
        for layer in range(model.config.n_layer):
            weights[f"h.{layer}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
            weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if name == "gpt2_narrow_inner":  # shards
        keys = sorted(weights)
        for i, part in enumerate([keys[::2], keys[1::2]], 1):
            save(folder, f"{name}-{i:05}-of-00002", {key: weights[key] for key in part})
    else:
        save(folder, name, weights)
    keep = {"model_type", "n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size"}
    keep |= {"layer_norm_epsilon", "activation_function", "tie_word_embeddings", "scale_attn_weights"}
    keep |= {"scale_attn_by_inverse_layer_idx", "eos_token_id"}
    config = {key: value for key, value in model.config.to_dict().items() if key in keep}
    (folder / f"{name}.config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def base_case(folder, seed, name, settings):
    model, input_ids = make_base(seed, settings)
    hidden = []
    for module in [*model.transformer.h, model.transformer.ln_f]:
        module.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        logits = model(input_ids).logits
    save_base(folder, name, model)
    expected = {f"hidden_states.{i}": tensor for i, tensor in enumerate(hidden)}
    save(folder, f"{name}.expected", {"input_ids": input_ids, "logits": logits, **expected})


def route(model, router, input_ids, temperature, top_k):
    """The scores divided by the temperature, the probs and the weights of the router.

    The router reads the sum of the token and position embeddings.
    """
    positions = torch.arange(input_ids.shape[1])
    embeddings = model.transformer.wte(input_ids) + model.transformer.wpe(positions)
    logits = (embeddings @ router["router.weight"].T + router["router.bias"]) / temperature
    probs = logits.softmax(-1)
    if top_k is None:
        return logits, probs, probs
    kept = torch.zeros_like(probs).scatter(-1, probs.topk(top_k, -1).indices, 1.0)
    return logits, probs, probs * kept / (probs * kept).sum(-1, keepdim=True)


def mix(model, weights):
    """Makes each LoRA layer add its adapters' updates, multiplied by `weights`, [b, t, e]."""

    def forward(layer, x):
        y = layer.base_layer(x)
        for e, name in enumerate(layer.lora_A):
            y = y + weights[..., e : e + 1] * layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
        return y

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = forward.__get__(layer)


def stacked(model, pick):
    """`pick` applied to each LoRA matrix, stacked over the adapters under dylora's names."""
    tensors = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = path.split("transformer.")[-1]
            for key, matrices in [("lora_a", layer.lora_A), ("lora_b", layer.lora_B)]:
                tensors[f"{name}.{key}"] = torch.stack([pick(matrix.weight) for matrix in matrices.values()])
    return tensors


def make_experts(generator, model, settings):
    """The base with random adapters, whose B is not zero, and a random router."""
    lora = {"r": settings["rank"], "lora_alpha": settings["alpha"], "fan_in_fan_out": True}
    lora = peft.LoraConfig(target_modules=settings["target_modules"], **lora)
    model = peft.get_peft_model(model, lora, adapter_name="expert_0")
    for e in range(1, NUM_EXPERTS):
        model.add_adapter(f"expert_{e}", lora)
    model = model.double().eval()
    trained = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    for parameter in trained:
        parameter.data.copy_(randn(generator, *parameter.shape, std=0.3).float())
    router = {
        "router.weight": randn(generator, NUM_EXPERTS, model.config.n_embd).float().double().requires_grad_(True),
        "router.bias": randn(generator, NUM_EXPERTS).float().double().requires_grad_(True),
    }
    return model, trained, router


def routed_case(model, trained, router, input_ids, labels, temperature, top_k):
    scores, probs, weights = route(model.base_model.model, router, input_ids, temperature, top_k)
    mix(model, weights)
    for parameter in trained:  # set_adapter has frozen all adapters except the last
        parameter.requires_grad_(True)
    logits = model(input_ids).logits
    case = {"probs": probs, "weights": weights, "logits": logits}
    for prefix, smoothing in [("", 0.0), ("smoothed_", LABEL_SMOOTHING)]:
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=smoothing
        )
        leaves = [*trained, *router.values()]
        grads = dict(zip(leaves, torch.autograd.grad(loss, leaves, retain_graph=True)))
        case[f"{prefix}loss"] = loss
        named = stacked(model, grads.get) | {name: grads[leaf] for name, leaf in router.items()}
        case |= {f"{prefix}grad.{name}": grad for name, grad in named.items()}
    if top_k:
        scores = scores.detach().flatten(0, 1)
        loss = load_balancing_loss_func((scores,), NUM_EXPERTS, top_k, attention_mask=(labels >= 0).long())
        case["load_balancing_loss"] = loss / top_k  # Mixtral's load sums to k, ours to 1
    return case


def experts_case(folder, seed, name, settings):
    model, input_ids = make_base(0, BASES["gpt2_tied"])
    generator = torch.Generator().manual_seed(seed)
    model, trained, router = make_experts(generator, model, settings)
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:]
    labels[0, :3] = -100
    tensors = {"input_ids": input_ids, "labels": labels}
    tensors |= {key: tensor.float() for key, tensor in (stacked(model, lambda weight: weight) | router).items()}
    for e in range(NUM_EXPERTS):
        model.set_adapter(f"expert_{e}")
        tensors[f"logits.expert_{e}"] = model(input_ids).logits
    # with one-hot weights, `mix` gives PEFT's own result
    mix(model, torch.eye(NUM_EXPERTS).double()[1].expand(2, 11, -1))
    torch.testing.assert_close(model(input_ids).logits, tensors["logits.expert_1"], rtol=0, atol=1e-13)
    tensors["given.weights"] = randn(generator, *input_ids.shape, NUM_EXPERTS)
    mix(model, tensors["given.weights"])
    tensors["given.logits"] = model(input_ids).logits
    for prefix, top_k in [("dense", None), ("top_2", 2)]:
        case = routed_case(model, trained, router, input_ids, labels, settings["temperature"], top_k)
        tensors |= {f"{prefix}.{key}": tensor for key, tensor in case.items()}
    save(folder, name, tensors, **settings, label_smoothing=LABEL_SMOOTHING)


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "tests/golden")
    folder.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for seed, (name, settings) in enumerate(BASES.items()):
        base_case(folder, seed, name, settings)
    for seed, (name, settings) in enumerate(EXPERTS.items(), 100):
        experts_case(folder, seed, name, settings)
    make_golden_adapters.write(folder / "peft")


if __name__ == "__main__":
    main()
