"""Writes tests/golden/peft/*: adapters saved by PEFT, and PEFT's results with them on `gpt2_tied`.

make_golden.py calls this module. All logits are float64. [b, t] is [2, 11] unless stated otherwise.

For each set of settings in ADAPTERS, and for `pissa` (a trained PiSSA adapter, converted to plain
LoRA by `save_pretrained`), it writes a folder `NAME` with `adapter_config.json` and
`adapter_model.safetensors`, and `NAME.expected.safetensors` with

    input_ids [b, t], logits [b, t, v]
    offsets_start [b], only for `alora`: the first position at which the adapter is active, or t

`mixtures.expected.safetensors` has the adapters MIXED as the experts 0, 1, .. of one base:

    input_ids, labels [b, t]; labels are already shifted, -100 means no loss
    routing_weights [b, t, e]
    routed.logits, routed.loss     y = W x + b + sum_e g_e (E_e(x) - W x - b), where E_e is PEFT's
                                   layer with adapter e alone
    routed.grad.routing_weights    [b, t, e]
    routed.grad.h.{layer}.{module}.expert_{e}.{lora_a [r, i], lora_b [o, r], magnitude [o]}
    uniform.logits                 the same with g_e = 1 / 4
    all.logits                     PEFT with the experts 0, 1 and 3 active at once (`set_adapter`
                                   with a list)
    rows.input_ids [4, t], rows.experts [4], rows.logits [4, t, v]: one expert for each row, -1 is
                                   the base alone

`dropout.expected.safetensors` has the same experts in training. An element is dropped with a
probability of 0.3. Each expert has a mask of its own, drawn from torch's CPU generator after
`manual_seed(DROPOUT_SEED)`.

    input_ids, routing_weights     as above
    plain.logits, dora.logits      PEFT with this adapter alone
    all.logits, routed.logits      as above

`xlora.expected.safetensors` has PEFT's X-LoRA over the adapters XLORA. The folder `xlora` has the
same classifier as the repository EricLBuehler/xlora saves it (`xlora_config.json`,
`xlora_classifier.safetensors`).

    input_ids [b, t], classifier.weight [e, d], classifier.bias [e], scalings [b, t, e],
    logits [b, t, v]

`init.expected.safetensors` has the results of PEFT's initialisations in float32 for the MODULES, at
rank 3 and alpha 6.

    {pissa,olora}.{module}.{lora_a [r, i], lora_b [o, r], residual [i, o]}; residual is the new
                                   weight of the base
    pissa.dora_magnitude.{module}  [o], with use_dora
    gaussian.std, default.bound    scalars of A under the other initialisations; the bound is for
                                   i = 16
"""

import json
import math
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import peft
import safetensors.torch
import torch
from golden import BASES, make_base, randn, save
from peft.tuners.lora import LoraLayer

LINEARS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
PATTERNS = {
    "rank_pattern": {"attn.c_proj": 2, "h.1.mlp.c_fc": 6},
    "alpha_pattern": {"mlp.c_fc": 3, "h.0.attn.c_attn": 10},
}
INVOCATION = [17, 42]
DROPOUT, DROPOUT_SEED = 0.3, 5
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["attn.c_attn"]},
    "all_linears": {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    "rslora": {"r": 3, "lora_alpha": 5, "target_modules": ["attn.c_attn", "mlp.c_proj"], "use_rslora": True},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **PATTERNS},
    "rslora_rank_pattern": {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "use_rslora": True, **PATTERNS},
    "regex": {"r": 3, "lora_alpha": 4, "target_modules": r".*\.h\.(1\.attn\.c_attn|0\.mlp\.c_fc)"},
    "layers": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["attn.c_attn", "mlp.c_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "h",
    },
    "dora": {"r": 4, "lora_alpha": 6, "target_modules": LINEARS, "use_dora": True},
    "dora_rslora_pattern": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": LINEARS,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"attn.c_proj": 2},
    },
    "alora": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["attn.c_attn", "mlp.c_fc"],
        "alora_invocation_tokens": INVOCATION,
    },
}
PISSA = {"r": 3, "lora_alpha": 6, "target_modules": LINEARS, "init_lora_weights": "pissa"}
MIXED = ["plain", "rank_pattern", "dora", "rslora"]
XLORA = ["plain", "all_linears", "rslora"]
MODULES = ["h.0.attn.c_attn", "h.1.mlp.c_proj"]


def tied_base():
    model, input_ids = make_base(0, BASES["gpt2_tied"])
    model.name_or_path = "gpt2_tied"
    return model, input_ids


def with_lora(base, settings):
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)
    return peft.get_peft_model(base, config).eval()


def lora_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def lora_layers(model):
    """The layers with adapters, under dylora's names."""
    layers = {path.split("transformer.")[-1]: layer for path, layer in model.named_modules()}
    return {path: layer for path, layer in layers.items() if isinstance(layer, LoraLayer)}


def save_adapter(folder, model, **kwargs):
    """PEFT's own `save_pretrained`, without the model card and in a fixed order."""
    model.save_pretrained(folder, save_embedding_layers=False, **kwargs)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):  # PEFT turns it into a set, in random order
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    path = folder / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(path)
    path.unlink()  # safetensors has made it readable only by its owner
    save(folder, "adapter_model", weights)


def load(folder, *names):
    """A new base in float64 with adapters from their folders, the first of which is active."""
    base, input_ids = tied_base()
    model = peft.PeftModel.from_pretrained(base, str(folder / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / name), adapter_name=name)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    return model.eval(), input_ids


@torch.no_grad()
def expect(folder, name, input_ids=None):
    """Writes the results with the saved adapter, and returns its logits."""
    model, default = load(folder, name)
    input_ids = default if input_ids is None else input_ids
    tensors = {"input_ids": input_ids, "logits": model(input_ids).logits}
    if name == "alora":
        offsets = peft.tuners.lora.variants.calculate_alora_offsets(model.peft_config, name, input_ids)
        torch.testing.assert_close(model(input_ids, alora_offsets=offsets).logits, tensors["logits"], rtol=0, atol=0)
        tensors["offsets_start"] = input_ids.shape[1] - torch.tensor([offset or 0 for offset in offsets])
    save(folder, f"{name}.expected", tensors)
    return tensors["logits"]


def adapter_case(folder, seed, name, settings):
    generator = torch.Generator().manual_seed(seed)
    model = with_lora(tied_base()[0].float(), settings)
    for key, parameter in lora_parameters(model).items():
        values = randn(generator, *parameter.shape, std=0.3)
        parameter.data.copy_(1.1 + values.abs() if "magnitude" in key else values)
    save_adapter(folder / name, model)
    input_ids = None
    # row 0 has the invocation tokens twice, row 1 has them only one by one and in reverse order
    if name == "alora":
        input_ids = torch.randint(17, (2, 11), generator=generator)
        input_ids[0, 2:4] = input_ids[0, 6:8] = torch.tensor(INVOCATION)
        input_ids[1, [1, 4, 5, 10]] = torch.tensor([42, 42, 17, 17])
    expect(folder, name, input_ids)


def pissa_case(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    base, input_ids = tied_base()
    model = with_lora(base.float(), PISSA)
    with tempfile.TemporaryDirectory() as initial:
        initial = str(Path(initial) / "initial")
        model.save_pretrained(initial, save_embedding_layers=False)
        for parameter in lora_parameters(model).values():
            parameter.data += randn(generator, *parameter.shape, std=0.1).float()
        with torch.no_grad():
            trained = model(input_ids).logits
        save_adapter(folder / "pissa", model, path_initial_model_for_weight_conversion=initial)
    torch.testing.assert_close(expect(folder, "pissa").float(), trained, rtol=0, atol=1e-5)


def blend(model, names, weights):
    """Makes each LoRA layer add the updates of its adapters, multiplied by `weights`, [b, t, e].

    An adapter's update is the output of PEFT's layer with this adapter minus the base's output.
    """

    def forward(layer, x):
        base = layer.base_layer(x)
        y = base
        for e, name in enumerate(names):
            layer._active_adapter = [name]
            y = y + weights[..., e : e + 1] * (type(layer).forward(layer, x) - base)
        return y

    for layer in lora_layers(model).values():
        layer.forward = forward.__get__(layer)


def expert_parameters(model):
    """The adapters' parameters under dylora's names."""
    named = {}
    for path, layer in lora_layers(model).items():
        parts = {"lora_a": layer.lora_A, "lora_b": layer.lora_B, "magnitude": layer.lora_magnitude_vector}
        for part, modules in parts.items():
            for name, module in modules.items():
                named[f"{path}.expert_{MIXED.index(name)}.{part}"] = module.weight.requires_grad_(True)
    return named


def routed(model, input_ids, labels, weights):
    weights = weights.clone().requires_grad_(True)
    leaves = expert_parameters(model) | {"routing_weights": weights}
    blend(model, MIXED, weights)
    logits = model(input_ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    grads = {f"routed.grad.{name}": grad for name, grad in zip(leaves, grads)}
    return {"routed.logits": logits, "routed.loss": loss, **grads}


def mixtures_case(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    model, input_ids = load(folder, *MIXED)
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:]
    labels[0, :3] = -100
    weights = randn(generator, *input_ids.shape, len(MIXED)).softmax(-1)
    tensors = {"input_ids": input_ids, "labels": labels, "routing_weights": weights}
    with torch.no_grad():
        # without `dora`: PEFT's DoRA takes W x + b plus the updates of the adapters before it as
        # the base's output, so the result would depend on the order of the active adapters
        model.base_model.set_adapter([name for name in MIXED if name != "dora"])
        tensors["all.logits"] = model(input_ids).logits
        experts = [3, 1, -1, 0]  # PEFT does not accept DoRA here
        rows = torch.randint(61, (len(experts), input_ids.shape[1]), generator=generator)
        names = ["__base__" if e < 0 else MIXED[e] for e in experts]
        tensors["rows.input_ids"], tensors["rows.experts"] = rows, torch.tensor(experts)
        tensors["rows.logits"] = model(rows, adapter_names=names).logits
        for e, name in enumerate(MIXED):  # with one-hot weights, `blend` gives PEFT's own result
            blend(model, MIXED, torch.eye(len(MIXED)).double()[e].expand(*input_ids.shape, -1))
            alone = load(folder, name)[0](input_ids).logits
            torch.testing.assert_close(model(input_ids).logits, alone, rtol=0, atol=1e-12)
        blend(model, MIXED, torch.full_like(weights, 1 / len(MIXED)))
        tensors["uniform.logits"] = model(input_ids).logits
    tensors |= routed(model, input_ids, labels, weights)
    save(folder, "mixtures.expected", tensors, experts=MIXED)


@torch.no_grad()
def dropout_case(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    model, input_ids = load(folder, *MIXED)
    for layer in lora_layers(model).values():
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = torch.nn.Dropout(DROPOUT)
    model.train()

    def logits():
        torch.manual_seed(DROPOUT_SEED)
        return model(input_ids).logits

    weights = randn(generator, *input_ids.shape, len(MIXED)).softmax(-1)
    tensors = {"input_ids": input_ids, "routing_weights": weights}
    for name in ["plain", "dora"]:
        model.base_model.set_adapter(name)
        tensors[f"{name}.logits"] = logits()
    model.base_model.set_adapter([name for name in MIXED if name != "dora"])
    tensors["all.logits"] = logits()
    blend(model, MIXED, weights)
    tensors["routed.logits"] = logits()
    save(folder, "dropout.expected", tensors, experts=MIXED, probability=DROPOUT, seed=DROPOUT_SEED)


def save_xlora(folder, config, weight, bias):
    """Writes the classifier as EricLBuehler/xlora does: its fields, their order and its names."""
    fields = {
        "hidden_size": config.hidden_size,
        "base_model_id": "gpt2_tied",
        # in the order of the classifier's outputs
        "adapters": {name: f"../{name}" for name in XLORA},
        "enable_softmax": config.enable_softmax,
        "enable_softmax_topk": config.enable_softmax_topk,
        "layerwise_scalings": config.layerwise_scalings,
        "xlora_depth": config.xlora_depth,
        "xlora_size": config.xlora_size,
        "enable_relu_and_dropout": False,
        "use_bias": True,
        "xlora_dropout_p": config.xlora_dropout_p,
        "use_trainable_adapters": config.use_trainable_adapters,
        "softmax_temperature": config.softmax_temperature,
        "top_k_lora": config.top_k_lora,
        "scaling_pass_value": config.scaling_pass_value,
        "global_scaling_weight": config.global_scaling_weight,
    }
    folder.mkdir(exist_ok=True)
    (folder / "xlora_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save(folder, "xlora_classifier", {"last.weight": weight.float(), "last.bias": bias.float()})


def load_xlora_expert(model, weights, **kwargs):
    """Loads an expert into X-LoRA, which expects the base's blocks in a module called `model`.

    This holds for Llama but not for GPT-2, so the names are corrected here.
    """
    weights = {key.replace("model.model.", "model."): tensor for key, tensor in weights.items()}
    return peft.set_peft_model_state_dict(model, weights, **kwargs)


@torch.no_grad()
def xlora_case(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    base, input_ids = tied_base()
    base.config.use_cache = False
    # PEFT names the adapters by their numbers, but then activates them by their keys, so the keys
    # must be the numbers; others cause a KeyError
    adapters = {str(i): str(folder / name) for i, name in enumerate(XLORA)}
    settings = {"hidden_size": base.config.n_embd, "xlora_depth": 1, "softmax_temperature": 0.7}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **settings)
    with mock.patch("peft.tuners.xlora.model.set_peft_model_state_dict", load_xlora_expert):
        model = peft.get_peft_model(base, config).eval()
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    classifier = model.base_model.internal_xlora_classifier.layers[-1]
    for parameter in classifier.parameters():
        parameter.copy_(randn(generator, *parameter.shape))
    logits = model(input_ids).logits
    scalings = model.base_model.internal_xlora_scalings[:, :, 0]
    tensors = {"classifier.weight": classifier.weight.float(), "classifier.bias": classifier.bias.float()}
    tensors |= {"input_ids": input_ids, "scalings": scalings, "logits": logits}
    save(folder, "xlora.expected", tensors, experts=XLORA, **settings)
    save_xlora(folder / "xlora", config, classifier.weight, classifier.bias)


def initialised(model, target, **settings):
    """The layer `target` after PEFT's initialisation."""
    config = peft.LoraConfig(target_modules=[target], r=3, lora_alpha=6, **settings)
    return next(iter(lora_layers(peft.get_peft_model(model, config)).values()))


def init_parts(layer):
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return {"lora_a": lora_a, "lora_b": lora_b, "residual": layer.base_layer.weight}


def init_case(folder):
    tensors = {}
    for name in MODULES:
        pissa = {"init_lora_weights": "pissa", "fan_in_fan_out": True}
        parts = init_parts(initialised(tied_base()[0].float(), name, **pissa))
        tensors |= {f"pissa.{name}.{key}": tensor for key, tensor in parts.items()}
        layer = initialised(tied_base()[0].float(), name, use_dora=True, **pissa)
        tensors[f"pissa.dora_magnitude.{name}"] = layer.lora_magnitude_vector["default"].weight
        # PEFT's OLoRA ignores fan_in_fan_out: on a Conv1D, it makes A [r, o] and B [i, r]. This
        # takes a Linear with the same weight instead.
        weight = tied_base()[0].float().transformer.get_submodule(name).weight.detach()
        linear = torch.nn.Linear(*weight.shape)
        linear.weight.data = weight.T.contiguous()
        parts = init_parts(initialised(torch.nn.Sequential(linear), "0", init_lora_weights="olora"))
        parts["residual"] = parts["residual"].T
        tensors |= {f"olora.{name}.{key}": tensor for key, tensor in parts.items()}
    with mock.patch("torch.nn.init.normal_") as normal:
        initialised(tied_base()[0].float(), MODULES[0], init_lora_weights="gaussian", fan_in_fan_out=True)
    tensors["gaussian.std"] = torch.tensor(normal.call_args.kwargs["std"], dtype=torch.float64)
    # the bound of kaiming_uniform_ with a = sqrt(5)
    bound = torch.nn.init.calculate_gain("leaky_relu", math.sqrt(5)) * math.sqrt(3 / 16)
    tensors["default.bound"] = torch.tensor(bound, dtype=torch.float64)
    save(folder, "init.expected", tensors, r=3, lora_alpha=6)


def write(folder):
    folder.mkdir(exist_ok=True)
    warnings.filterwarnings("ignore", module="peft")
    for seed, (name, settings) in enumerate(ADAPTERS.items(), 200):
        adapter_case(folder, seed, name, settings)
    pissa_case(folder, 300)
    mixtures_case(folder, 301)
    xlora_case(folder, 302)
    dropout_case(folder, 303)
    init_case(folder)
