#!/usr/bin/env python3
"""Checks every command on tiny bases of the Llama-like families.

    scripts/check_families.py FOLDER

transformers writes a base of random weights for each of FAMILIES, with the settings that set its
family apart, and the demo's tokenizer. On each base, these must agree in f32 to 1e-4:

    a base alone in transformers                      `dylora trace`
    a trained mixture's experts and router in PEFT    `dylora trace`, `dylora eval`
    texts of the base and an expert in transformers   `dylora generate`
    and PEFT, and of the mixture of PEFT's layers
    adapters that PEFT wrote                          `dylora trace`
    merged mixtures in transformers and PEFT          the mixture with these weights
    the config of a merged base                       the base's own

On some of the bases it also checks DoRA experts with short names of modules, X-LoRA, a run that is
resumed, `add-expert`, `remove-expert` and `bench`. It trains a random Llama with `method = "full"`,
and it checks what is refused. FOLDER takes 25 MB. Needs scripts/reference_env.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from clients import BASE, LLAMA3, TEXTS, TRAIN, check_adapter, check_base, check_export, check_merge, check_xlora
from clients import compare, documents, dylora, expect, load_base, load_experts, routed, summary, token_ids
from clients import token_losses, trace, train, write_texts
from generation import check_generate
from safetensors.torch import load_file

MODULES = [
    *[f"self_attn.{name}" for name in ["q_proj", "k_proj", "v_proj", "o_proj"]],
    *[f"mlp.{name}" for name in ["gate_proj", "up_proj", "down_proj"]],
]
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
# the settings of each family besides SIZES; the texts are longer than the windows
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "eos_token_id": [0, 5]},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
        "vocab_size": 2080,  # rows without a token
    },
    "qwen3": {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
}
# settings of a base that the family's own settings must tell apart
PLAIN = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "smollm3": {"no_rope_layer_interval": 4, "use_sliding_window": False},
    "mistral": {"sliding_window": None},
}
# how a base is saved, if not as one file in f32
SAVED = {"smollm3": {"dtype": torch.bfloat16}, "qwen3": {"max_shard_size": "300KB"}}
END_TOKENS = {"mistral": "</s>"}  # if not the demo's
# keys of a config that a merged base need not keep
IDLE_KEYS = {"_name_or_path", "dtype", "transformers_version"}
MIXTURE = """num_experts = 3
target_modules = "all-linear"
[router]
input = "layer_input"
scope = "layer"
top_k = 2
"""
DORA = """num_experts = 3
target_modules = ["q_proj", "v_proj", "self_attn.o_proj", "down_proj"]
use_dora = true
use_rslora = true
rank_pattern = { q_proj = 2, down_proj = 5, "layers.1.mlp.down_proj" = 3 }
[[lora.experts]]
[[lora.experts]]
target_modules = "all-linear"
rank_pattern = {}
[[lora.experts]]
use_dora = false
[router]
scope = "module"
temperature = 0.5
"""
# what the names and patterns of DORA match, and in how many layers
DORA_MATCHES = {
    ("lora.target_modules", "q_proj"): (["self_attn.q_proj"], 3),
    ("lora.target_modules", "v_proj"): (["self_attn.v_proj"], 3),
    ("lora.target_modules", "self_attn.o_proj"): (["self_attn.o_proj"], 3),
    ("lora.target_modules", "down_proj"): (["mlp.down_proj"], 3),
    ("lora.rank_pattern", "q_proj"): (["self_attn.q_proj"], 3),
    ("lora.rank_pattern", "down_proj"): (["mlp.down_proj"], 3),
    ("lora.rank_pattern", "layers.1.mlp.down_proj"): (["mlp.down_proj"], 1),
    ("lora.experts[1].target_modules", "all-linear"): (MODULES, 3),
}
XLORA = """num_experts = 3
[router]
input = "base_hidden"
scope = "shared"
normalize_input = false
temperature = 1.5
"""
# what a full training changes in clients.TRAIN
RANDOM = "{ family = 'llama', n_layer = 2, n_head = 4, n_kv_head = 2, n_embd = 32, n_positions = 128 }"
FULL = [
    f"base.source={{ random = {RANDOM} }}",
    "base.tokenizer=demo/base/tokenizer.json",
    "train.duration={ steps = 4 }",
]
ADAPTERS = {
    "DoRA, rsLoRA, short names": {
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "down_proj": 4},
        "alpha_pattern": {"up_proj": 3},
        "use_dora": True,
        "use_rslora": True,
    },
    "all-linear": {"target_modules": "all-linear"},
}


def make_base(folder, family):
    """Writes a base of random weights."""
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # transformers starts norms at 1 and biases at 0
        parameter.data += (0.2 if parameter.dim() == 1 else 0.15) * torch.randn_like(parameter)
    saved = SAVED.get(family, {})
    model = model.to(saved.get("dtype", torch.float32))
    model.save_pretrained(folder, max_shard_size=saved.get("max_shard_size", "1GB"))
    for file in ["tokenizer.json", "tokenizer_config.json"]:
        text = (Path(BASE) / file).read_text()
        (folder / file).write_text(text.replace("<|endoftext|>", END_TOKENS.get(family, "<|endoftext|>")))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def check_settings(name, base, plain):
    """Checks that `plain` settings would change the logits, so that equal logits show something."""
    config = transformers.AutoConfig.from_pretrained(base)
    settings = {key: value for key, value in config.to_dict().items() if key not in ["layer_types", "no_rope_layers"]}
    config = type(config).from_dict(settings | plain)
    other = transformers.AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32).eval()
    ids = token_ids(base, TEXTS[0])
    moved = (other(ids).logits - load_base(base)(ids).logits).abs().max().item()
    expect(f"{name}: the settings move the logits by {moved:.2f}", moved > 0.1)


def check_loss(name, model, base, *arguments):
    """Checks `dylora eval` on TEXTS, which share a block."""
    texts = write_texts(base.with_name("texts.jsonl"))
    report = json.loads(dylora("eval", *arguments, "--data", texts, "--seq-len", 128, "--json"))
    losses = torch.cat([token_losses(model(ids), ids) for ids in documents(base)])
    compare(f"{name}: the loss by eval", torch.tensor(report["loss"]), losses.mean())
    expect(f"{name}: on {losses.numel()} tokens", report["domains"][0]["label_tokens"] == losses.numel(), report)


def check_config(name, merged, base):
    """Checks that transformers reads the same settings from a merged base as from the base."""
    ours, theirs = [transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (merged, base)]
    keys = (ours.keys() | theirs.keys()) - IDLE_KEYS
    differing = {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}
    expect(f"{name}: the merged base has {len(keys)} equal settings", not differing, differing)
    # older versions of transformers read these keys alone
    config = json.loads((merged / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    old = {**(config["rope_scaling"] or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
    expect(f"{name}: the merged base has its RoPE in the old spelling too", old == rope, (old, rope))


def check_family(family, folder):
    """Checks a mixture on the family's base, its merges, and adapters of PEFT."""
    base, merged = folder / family, folder / f"{family}.merged"
    make_base(base, family)
    check_base(family, base)
    check_settings(family, base, PLAIN[family])
    run, export = train(folder, f"{family}.run", MIXTURE, base)
    check_export(family, run, export, base)
    model, _ = load_experts(base, export)
    check_loss(family, lambda ids: routed(model, export, ids)[0], base, "--checkpoint", run)
    check_generate(family, base, run, export)
    check_merge(family, folder / "merged", run, export, "0.7,-0.4,1.1", "adapter", base)
    check_merge(family, merged, run, export, "0.5,0.3,0.2", "base", base)
    check_config(family, merged, base)
    for name, settings in ADAPTERS.items():
        adapter = folder / f"{family}.adapter"
        check_adapter(f"{family}, {name}", adapter, base, token_ids(base, TEXTS[0]), **settings)


def check_dora(family, folder):
    """Checks DoRA experts that dylora trained."""
    name, base = f"{family}, DoRA", folder / family
    run, export = train(folder, f"{family}.dora", DORA, base)
    check_export(name, run, export, base)
    check_merge(name, folder / f"{family}.dora.merged", run, export, "0.5,0.3,0.2", "base", base)


def check_resume(family, folder):
    """Checks that a run, resumed in the middle, ends with the same numbers."""
    run, copy = folder / f"{family}.run", folder / f"{family}.resumed"
    shutil.copytree(run, copy, symlinks=True)
    middle, end = sorted((copy / "checkpoints").glob("step-*"))
    shutil.rmtree(end)
    dylora("train", "--resume", middle)
    unbroken, resumed = [load_file(run / "checkpoints" / end.name / "model.safetensors") for run in (run, copy)]
    same = all(torch.equal(tensor, resumed[key]) for key, tensor in unbroken.items())
    expect(f"{family}: resumed from {middle.name}, it ends in the same {len(unbroken)} tensors", same)


def check_growth(family, folder):
    """Adds an expert to a mixture and removes one, and checks the new runs."""
    run, grown, smaller = [folder / f"{family}.{name}" for name in ("run", "grown", "smaller")]
    base = folder / family
    domain = ["--data", "demo/data/code.validation.jsonl", "--domain", "code", "--steps", 30]
    # at the run's own rates, the new expert would learn nothing, which is an error
    rates = [f"--set=optimizer.{group}.learning_rate=5e-2" for group in ("router", "adapters")]
    dylora("add-expert", "--checkpoint", run, "--out", grown, *domain, *rates)
    dylora("remove-expert", "--checkpoint", grown, "--out", smaller, "--expert", 0)
    for changed, num_experts in [(grown, 4), (smaller, 3)]:
        export = folder / f"{changed.name}.export"
        dylora("export-adapters", "--checkpoint", changed, "--out", export)
        model, experts = load_experts(base, export)
        expect(f"{changed.name}: {num_experts} experts", len(experts) == num_experts, experts)
        check_loss(changed.name, lambda ids: routed(model, export, ids)[0], base, "--checkpoint", changed)


def check_bench(family, folder):
    arguments = ["--base", folder / family, "--seq-len", 64, "--batch", 2, "--steps", 2, "--warmup", 1]
    lines = dylora("bench", *arguments, "--dtype", "f32", "--json").splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    expect(f"{family}: bench measures {len(rows)} rows", rows and all(row["tokens_per_sec"] > 0 for row in rows), lines)


def check_full(folder):
    """Trains all parameters of a random Llama, and checks the result in transformers."""
    run = folder / "full"
    config = folder / "full.toml"
    config.write_text('method = "full"\n' + TRAIN.format(dir=run, base=Path(BASE).resolve()))
    dylora("train", "--config", config, *(part for setting in FULL for part in ("--set", setting)))
    base = run / "model"
    check_base("full", base)
    model = load_base(base)
    for name, arguments in [("its folder", ["--base", base]), ("the run", ["--checkpoint", run])]:
        check_loss(f"full, {name}", lambda ids: model(ids).logits, base, *arguments)


def check_dry_run(family, folder):
    """Checks that a dry run lists what each name and pattern matches."""
    config = folder / "dry.toml"
    config.write_text(TRAIN.format(dir=folder / "dry", base=folder / family) + DORA)
    report = json.loads(dylora("train", "--config", config, "--dry-run", "--json"))
    found = {(t["key"], t["pattern"]): (t["modules"], t["num_layers"]) for t in report["targets"]}
    expect(f"{family}: --dry-run lists {len(found)} patterns", found == DORA_MATCHES, f"{found}\n{DORA_MATCHES}")
    printed = dylora("train", "--config", config, "--dry-run")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    missing = [key for key, (modules, n) in found.items() if [*key, ", ".join(modules), str(n)] not in rows]
    expect(f"{family}: --dry-run prints them as a table", not missing, f"{missing}\n{printed}")


def check_refusals(folder):
    """Checks the messages about what is not supported."""
    base = folder / "refused"
    shutil.copytree(folder / "llama", base)
    settings = json.loads((base / "config.json").read_text())

    def says(name, change, words):
        (base / "config.json").write_text(json.dumps(settings | change))
        message = dylora("trace", "--base", base, "--text", "a", code=1)
        expect(f"{name} is refused", all(word in message for word in words), message)

    supported = [f"`{family}`" for family in ["gpt2", *FAMILIES]]
    for family in ["gemma3_text", "phi3", "qwen3_5", "mixtral"]:
        says(family, {"model_type": family}, [f"`{family}`", *supported])
    dynamic = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    says("a dynamic rope_parameters", {"rope_parameters": dynamic}, ["`rope_parameters`", "`dynamic`"])
    legacy = {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    says("a dynamic rope_scaling", legacy, ["`rope_scaling`", "`dynamic`"])
    config = folder / "refused.toml"
    config.write_text(TRAIN.format(dir=folder / "never", base=folder / "llama") + 'target_modules = ["c_attn"]')
    message = dylora("train", "--config", config, code=2)
    expect("c_attn on a llama is refused", all(f"`{name}`" in message for name in ["c_attn", *MODULES]), message)


@torch.no_grad()
def main():
    folder = Path(sys.argv[1]).resolve()
    torch.manual_seed(0)
    for family in FAMILIES:
        check_family(family, folder)
    check_dora("smollm3", folder)
    run, _ = train(folder, "qwen2.xlora", XLORA, folder / "qwen2")
    check_xlora("qwen2", folder / "xlora", run, folder / "qwen2")
    check_resume("qwen3", folder)
    check_growth("qwen3", folder)
    check_bench("mistral", folder)
    check_full(folder)
    check_dry_run("mistral", folder)
    check_refusals(folder)
    summary()


main()
