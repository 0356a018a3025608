#!/usr/bin/env python3
"""Writes tests/golden/families/*: the results of transformers and PEFT in float64 on tiny random bases.

    "$(scripts/reference_env)" scripts/make_golden_families.py [FOLDER]

The bases have the model_types llama, qwen2, qwen3, smollm3 and mistral. For each case in CASES, it
writes the files of a base as on the Hub (`NAME.config.json`, and `NAME.safetensors` or two shards with
`NAME.model.safetensors.index.json`), and

    NAME.expected.safetensors  input_ids [b, t]
                               hidden_states.i [b, t, d], the input of block i; the last one is the
                               input of the final norm
                               logits [b, t, v]
    NAME.experts.safetensors   as described in make_golden.py, without label smoothing and without
                               the load balancing loss; the router reads the token embeddings, and
                               modules have names such as `layers.0.self_attn.q_proj`

`rope.json` has transformers' own frequencies for the settings in ROPES. An entry has

    name
    config             the keys of a `config.json` that determine the frequencies
    head_dim           the number of elements of a head
    inv_freq           [head_dim / 2], in radians per position, as transformers computes them in float32
    attention_scaling  the factor of the cosines and sines

transformers computes norms, rotary tables and the softmax of attention in float32, whatever the
model's dtype. Here, its code gets `torch.float64` wherever it asks for `torch.float32`. The script
checks for each case that

- no operation of the forward pass has a result in float32;
- a model in float32 gives the same logits as without this replacement, and as the one in float64;
- the settings that the case is there for change the logits, and the keys that transformers ignores
  do not;
- the gradients agree with finite differences.

Weights are stored in float32 or bfloat16 and used in float64, without loss.
"""

import importlib
import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from golden import (
    base_results,
    begin,
    float64_for_float32,
    loss_and_gradients,
    make_experts,
    next_tokens,
    randn,
    randomise,
    routed_results,
    save,
    save_json,
    save_shards,
    stacked,
    unrouted_results,
    without_float32,
)

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 0,
}
NUM_TOKENS = 61  # ids in use; a vocabulary may have more rows
EXPERTS = {
    "target_modules": [
        *[f"self_attn.{name}" for name in ["q_proj", "k_proj", "v_proj", "o_proj"]],
        *[f"mlp.{name}" for name in ["gate_proj", "up_proj", "down_proj"]],
    ],
    "rank": 2,
    "alpha": 3,
    "temperature": 1.7,
}


@dataclass
class Case:
    """A base, and what must hold for it."""

    # the `config.json`, apart from the keys of SIZES that it does not change
    config: dict
    # keys of SIZES that the `config.json` lacks, so that transformers uses its default
    absent: list[str] = field(default_factory=list)
    # changes to the config, each of which must change the logits
    effects: list[dict] = field(default_factory=list)
    # changes to the config that, all together, must leave the logits as they are
    ignored: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    sharded: bool = False
    use_rslora: bool = False


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CASES = {
    "llama": Case(
        {"model_type": "llama", "rope_theta": 100.0, "rope_scaling": None, "tie_word_embeddings": False},
        effects=[{"rope_theta": 10000.0}],
        ignored={"sliding_window": 4, "pretraining_tp": 2, "no_rope_layers": [0, 0]},
    ),
    "llama_biases": Case(
        {
            "model_type": "llama",
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "rope_theta": 500.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
        absent=["num_key_value_heads"],
        effects=[{"rope_scaling": None}],
    ),
    "llama_llama3": Case(
        {
            "model_type": "llama",
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "rope_theta": 100.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "tie_word_embeddings": True,
            "eos_token_id": [1, 8, 9],
        },
        effects=[{"rope_scaling": None}],
    ),
    "llama_yarn": Case(
        {
            "model_type": "llama",
            "head_dim": 8,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
        effects=[{"rope_parameters": DEFAULT_ROPE}],
    ),
    "llama_yarn_scaled": Case(
        {
            "model_type": "llama",
            "head_dim": 8,
            "max_position_embeddings": 1024,
            "rope_theta": 500.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "truncate": False,
            },
        },
        effects=[{"rope_scaling": None}],
    ),
    "llama_bf16": Case(
        {"model_type": "llama", "num_key_value_heads": 1, "rope_theta": 10000.0, "torch_dtype": "bfloat16"},
        dtype=torch.bfloat16,
    ),
    "llama_shards": Case(
        {"model_type": "llama", "num_key_value_heads": 4, "rope_parameters": DEFAULT_ROPE, "vocab_size": 64},
        sharded=True,
    ),
    "qwen2": Case(
        {
            "model_type": "qwen2",
            "tie_word_embeddings": True,
            "rope_theta": 1000000.0,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        absent=["rms_norm_eps"],
        effects=[{"use_sliding_window": False}, {"sliding_window": 5}, {"max_window_layers": 0}],
        ignored={"attention_bias": False, "mlp_bias": True},
    ),
    "qwen2_layer_types": Case(
        {
            "model_type": "qwen2",
            "head_dim": 6,
            "vocab_size": 64,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.3,
            },
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        effects=[{"layer_types": None}, {"layer_types": ["full_attention", "sliding_attention"]}],
        ignored={"max_window_layers": 0},
    ),
    "qwen3": Case(
        {
            "model_type": "qwen3",
            "head_dim": 8,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 2,
        },
        effects=[{"rope_theta": 10000.0}],
        use_rslora=True,
    ),
    "qwen3_biases": Case(
        {
            "model_type": "qwen3",
            "head_dim": 6,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "rope_parameters": DEFAULT_ROPE,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        effects=[{"use_sliding_window": False}, {"sliding_window": 5}, {"max_window_layers": 0}],
        ignored={"mlp_bias": True},
    ),
    "smollm3": Case(
        {
            "model_type": "smollm3",
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "pad_token_id": 0,
        },
        effects=[{"no_rope_layer_interval": 4}, {"use_sliding_window": False}, {"rope_theta": 10000.0}],
        ignored={"max_window_layers": 0},
    ),
    "smollm3_windows": Case(
        {
            "model_type": "smollm3",
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "tie_word_embeddings": False,
            "rope_theta": 5000.0,
            "no_rope_layers": [1, 0],
            "no_rope_layer_interval": 4,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": 0,
        },
        effects=[{"no_rope_layers": [1, 1]}, {"no_rope_layers": [0, 0]}, {"layer_types": None}],
        ignored={"no_rope_layer_interval": 1, "max_window_layers": 0},
    ),
    "mistral": Case(
        {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 5},
        effects=[{"sliding_window": None}, {"sliding_window": 4}],
        ignored={"use_sliding_window": False, "max_window_layers": 2, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral_nemo": Case(
        {
            "model_type": "mistral",
            "head_dim": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_window": None,
        },
        effects=[{"sliding_window": 5}, {"rope_parameters": DEFAULT_ROPE}],
    ),
}

HEAD_64 = {"model_type": "llama", "head_dim": 64}
HEAD_128 = {"model_type": "llama", "head_dim": 128}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES = {
    "default": HEAD_64,
    "default_smollm2": {**HEAD_64, "rope_theta": 100000.0},
    "default_smollm3": {"model_type": "smollm3", "hidden_size": 2048, "num_attention_heads": 16},
    "default_qwen3": {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
    "theta_beside_parameters": {**HEAD_64, "rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    "theta_in_parameters_and_beside": {**HEAD_64, "rope_theta": 500.0, "rope_parameters": DEFAULT_ROPE},
    "scaling_and_parameters": {
        **HEAD_64,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "type_and_rope_type": {**HEAD_64, "rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    "linear": {**HEAD_64, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear_parameters": {
        **HEAD_64,
        "rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 100000.0},
    },
    "llama_3_2_1b": {
        **HEAD_64,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "llama_3_1_8b": {
        **HEAD_128,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            **LLAMA3,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    },
    "llama3_without_original": {
        **HEAD_64,
        "max_position_embeddings": 4096,
        "rope_scaling": {**LLAMA3, "factor": 2.0},
    },
    "qwen2_yarn": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "yarn_parameters": {**HEAD_64, "rope_parameters": {**YARN, "rope_theta": 10000.0}},
    "yarn_without_original": {
        **HEAD_64,
        "max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    },
    "yarn_original_beside": {**HEAD_64, "original_max_position_embeddings": 2048, "rope_scaling": YARN},
    "yarn_factor_null": {**HEAD_64, "max_position_embeddings": 65536, "rope_scaling": {**YARN, "factor": None}},
    "yarn_factor_below_one": {**HEAD_64, "rope_scaling": {**YARN, "factor": 0.5}},
    "yarn_betas": {**HEAD_64, "rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2.5}},
    "yarn_betas_null": {**HEAD_64, "rope_scaling": {**YARN, "beta_fast": None, "beta_slow": 0}},
    "yarn_not_truncated": {**HEAD_64, "rope_scaling": {**YARN, "truncate": False}},
    "yarn_attention_factor": {**HEAD_64, "rope_scaling": {**YARN, "attention_factor": 1.25}},
    "yarn_mscale": {**HEAD_64, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}},
    "yarn_mscale_alone": {**HEAD_64, "rope_scaling": {**YARN, "mscale": 0.707}},
    "yarn_equal_bounds": {**HEAD_64, "rope_scaling": {**YARN, "original_max_position_embeddings": 5}},
    "yarn_crossed_bounds": {**HEAD_64, "rope_scaling": {**YARN, "original_max_position_embeddings": 2}},
}


def read_config(config):
    """The config as transformers reads it from a `config.json`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return transformers.AutoConfig.from_pretrained(folder)


def build(config, dtype=torch.float64, weights=None):
    """The model as transformers builds it, with its own use of float32."""
    config = read_config(config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.to(dtype).eval()
    if weights is not None:
        model.load_state_dict(weights)
    return model


def largest_difference(a, b):
    return (a.double() - b.double()).abs().max().item()


@torch.no_grad()
def check_base(name, case, config, weights, input_ids, logits):
    """Compares `logits`, in float64, with those of plain transformers and of changed configs."""
    own = build(config, torch.float32, weights)(input_ids).logits
    replaced = without_float32(build(config, torch.float32, weights))(input_ids).logits
    for what, other in [("in float32 with the replacement", replaced), ("in float64", logits)]:
        difference = largest_difference(own, other)
        assert difference < 2e-5, f"{name}: the logits {what} differ from transformers' own by {difference}"
    for change in case.effects:
        changed = without_float32(build(config | change, weights=weights))(input_ids).logits
        difference = largest_difference(changed, logits)
        assert difference > 1e-3, f"{name}: {change} changes the logits by {difference} only"
    changed = without_float32(build(config | case.ignored, weights=weights))(input_ids).logits
    assert torch.equal(changed, logits), f"{name}: {case.ignored} changes the logits"


def check_bands(name, model):
    """Checks that a llama3 or yarn case has frequencies that stay, shrink by `factor`, or lie between."""
    rope, rotary = model.config.rope_parameters, model.model.rotary_emb
    if rope["rope_type"] in ["llama3", "yarn"]:
        with float64_for_float32():
            plain, _ = rotary.compute_default_rope_parameters(model.config)
        shrunk = plain / rotary.inv_freq
        kept, divided = (torch.isclose(shrunk, torch.tensor(by).double()) for by in [1.0, rope["factor"]])
        assert kept.any() and divided.any() and not (kept | divided).all(), f"{name}: {shrunk}"


def save_base(folder, name, case, config, weights):
    weights = {key: tensor.to(case.dtype) for key, tensor in weights.items()}
    if read_config(config).tie_word_embeddings:
        del weights["lm_head.weight"]
    save_json(folder, f"{name}.config", config)
    if case.sharded:
        size = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": save_shards(folder, name, weights)}
        save_json(folder, f"{name}.model.safetensors.index", index)
    else:
        save(folder, name, weights)


def routed_case(experts, input_ids, labels, top_k):
    """The results with the router, which reads the token embeddings."""
    embeddings = experts.model.get_input_embeddings()(input_ids)
    _, case = routed_results(experts, embeddings, input_ids, EXPERTS["temperature"], top_k)
    return case | loss_and_gradients(experts, case["logits"], labels)


def check_gradients(generator, experts, input_ids, labels, top_k, case):
    """Compares the gradient with the change of the loss along a random direction."""
    leaves = [*experts.lora, *experts.router.values()]
    direction = {leaf: randn(generator, *leaf.shape) for leaf in leaves}
    named = stacked(experts.model, direction.get)
    named |= {name: direction[leaf] for name, leaf in experts.router.items()}
    slope = sum((part * case[f"grad.{name}"]).sum().item() for name, part in named.items())
    start = [leaf.detach().clone() for leaf in leaves]
    losses = []
    for step in [1e-6, -1e-6]:
        for leaf, value in zip(leaves, start):
            leaf.data.copy_(value + step * direction[leaf])
        losses.append(routed_case(experts, input_ids, labels, top_k)["loss"].item())
    for leaf, value in zip(leaves, start):
        leaf.data.copy_(value)
    measured = (losses[0] - losses[1]) / 2e-6
    assert math.isclose(measured, slope, rel_tol=1e-6), f"the loss has the slope {measured}, not {slope}"


def experts_results(seed, base, input_ids, use_rslora):
    generator = torch.Generator().manual_seed(seed)
    experts = make_experts(generator, base, EXPERTS, use_rslora=use_rslora)
    labels = next_tokens(input_ids)
    tensors = {"input_ids": input_ids, "labels": labels}
    tensors |= unrouted_results(generator, experts, input_ids)
    for prefix, top_k in [("dense", None), ("top_2", 2)]:
        case = routed_case(experts, input_ids, labels, top_k)
        check_gradients(generator, experts, input_ids, labels, top_k, case)
        tensors |= {f"{prefix}.{key}": tensor for key, tensor in case.items()}
    ranked = tensors["dense.probs"].sort(-1, descending=True).values
    assert (ranked[..., 1] - ranked[..., 2]).min() > 1e-4, "float32 may choose other experts"
    return tensors


def write_case(folder, seed, name, case):
    config = {key: value for key, value in SIZES.items() if key not in case.absent} | case.config
    generator = torch.Generator().manual_seed(seed)
    model = without_float32(build(config))
    randomise(generator, model, case.dtype)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    input_ids = torch.randint(NUM_TOKENS, (2, 11), generator=generator)
    expected = base_results(model, model.model.layers, model.model.norm, input_ids)
    check_bands(name, model)
    check_base(name, case, config, weights, input_ids, expected["logits"])
    save_base(folder, name, case, config, weights)
    save(folder, f"{name}.expected", expected)
    tensors = experts_results(seed + 100, model, input_ids, case.use_rslora)
    save(folder, f"{name}.experts", tensors, **EXPERTS, use_rslora=case.use_rslora)


def frequencies(config):
    """The frequencies and the factor of cosines and sines, by the model's own class."""
    name = config.model_type
    classes = vars(importlib.import_module(f"transformers.models.{name}.modeling_{name}"))
    rotary = next(value for key, value in classes.items() if key.endswith("RotaryEmbedding"))(config)
    return rotary.inv_freq, rotary.attention_scaling


def rope_entry(name, fragment):
    config = read_config(fragment)
    inv_freq, scaling = frequencies(config)
    with float64_for_float32():
        exact, _ = frequencies(config)
    assert inv_freq.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(inv_freq.double(), exact, rtol=5e-7, atol=0)
    entry = {"name": name, "config": fragment, "head_dim": 2 * len(inv_freq)}
    return entry | {"inv_freq": inv_freq.tolist(), "attention_scaling": scaling}


def main():
    folder = begin("tests/golden/families")
    transformers.logging.set_verbosity_error()
    for seed, (name, case) in enumerate(CASES.items(), 400):
        write_case(folder, seed, name, case)
    save_json(folder, "rope", [rope_entry(name, fragment) for name, fragment in ROPES.items()])


if __name__ == "__main__":
    main()
