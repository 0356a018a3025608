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

make_golden_adapters.py, which this script calls, writes the folder `peft`. make_golden_families.py
writes the folder `families` and is run by itself.

Weights are stored in float32 and used in float64, without loss. The metadata of each file contains
the versions of `torch`, `transformers` and `peft`, and the settings that the numbers depend on.
"""

import make_golden_adapters
import torch
from golden import (
    BASES,
    NUM_EXPERTS,
    base_results,
    begin,
    loss_and_gradients,
    make_base,
    make_experts,
    next_tokens,
    routed_results,
    save,
    save_json,
    save_shards,
    unrouted_results,
)
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
        save_shards(folder, name, weights)
    else:
        save(folder, name, weights)
    keep = {"model_type", "n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size"}
    keep |= {"layer_norm_epsilon", "activation_function", "tie_word_embeddings", "scale_attn_weights"}
    keep |= {"scale_attn_by_inverse_layer_idx", "eos_token_id"}
    config = {key: value for key, value in model.config.to_dict().items() if key in keep}
    save_json(folder, f"{name}.config", config)


def base_case(folder, seed, name, settings):
    model, input_ids = make_base(seed, settings)
    save_base(folder, name, model)
    transformer = model.transformer
    save(folder, f"{name}.expected", base_results(model, transformer.h, transformer.ln_f, input_ids))


def routed_case(experts, input_ids, labels, temperature, top_k):
    """The results with the router, which reads the sum of the token and position embeddings."""
    transformer = experts.model.base_model.model.transformer
    positions = torch.arange(input_ids.shape[1])
    embeddings = transformer.wte(input_ids) + transformer.wpe(positions)
    scores, case = routed_results(experts, embeddings, input_ids, temperature, top_k)
    case |= loss_and_gradients(experts, case["logits"], labels)
    case |= loss_and_gradients(experts, case["logits"], labels, "smoothed_", LABEL_SMOOTHING)
    if top_k:
        scores = scores.detach().flatten(0, 1)
        loss = load_balancing_loss_func((scores,), NUM_EXPERTS, top_k, attention_mask=(labels >= 0).long())
        case["load_balancing_loss"] = loss / top_k  # Mixtral's load sums to k, ours to 1
    return case


def experts_case(folder, seed, name, settings):
    base, input_ids = make_base(0, BASES["gpt2_tied"])
    generator = torch.Generator().manual_seed(seed)
    experts = make_experts(generator, base, settings, fan_in_fan_out=True)
    labels = next_tokens(input_ids)
    tensors = {"input_ids": input_ids, "labels": labels}
    tensors |= unrouted_results(generator, experts, input_ids)
    for prefix, top_k in [("dense", None), ("top_2", 2)]:
        case = routed_case(experts, input_ids, labels, settings["temperature"], top_k)
        tensors |= {f"{prefix}.{key}": tensor for key, tensor in case.items()}
    save(folder, name, tensors, **settings, label_smoothing=LABEL_SMOOTHING)


def main():
    folder = begin("tests/golden")
    for seed, (name, settings) in enumerate(BASES.items()):
        base_case(folder, seed, name, settings)
    for seed, (name, settings) in enumerate(EXPERTS.items(), 100):
        experts_case(folder, seed, name, settings)
    make_golden_adapters.write(folder / "peft")


if __name__ == "__main__":
    main()
