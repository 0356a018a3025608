#!/usr/bin/env python3
"""Compares the loss and the gradients of one training step with PEFT's in float64.

    [DEVICE=cuda] scripts/check_gradients.py FOLDER [--preset s1|s2] [--layers 12] [--width 768]
                                             [--seq-len 1024] ..

PEFT writes experts with random weights on a random GPT-2. `dylora train` takes one step from them,
with each value of `train.kernels`, in f32 and in bf16. Its gradients are computed from AdamW's
first moments, which are (1 - beta1) times the gradients after the first step. PEFT's gradients are
those of the opponent of scripts/compare_peft with the same weights and blocks, in f64, f32 and
bf16. (In bf16, the base is in bf16, and the experts and the router are in f32 and cast where they
are used.)

With `auto` in f32, the loss must agree with that in f64 to 1e-5, and each gradient to 1e-4 of its
norm. With `auto` in bf16, the gradients must be no farther from those in f64 than PEFT's in bf16,
in the geometric mean over tensors. Otherwise the script fails. Needs scripts/reference_env.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import geometric_mean

import torch
import torch.nn.functional as F
from clients import BASE, DEVICE, dylora, randomise
from compare_peft import PRESETS
from peft import LoraConfig, get_peft_model
from peft_bases import MODULES, load_base
from peft_opponent import WEIGHTS, Opponent
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

TEMPERATURE = 0.2
BETA1 = 0.9
CONFIG = """
[run]
dir = "{dir}"
[base]
source = {{ path = "{base}" }}
dtype = "{dtype}"
[data]
seq_len = {seq_len}
[[data.domains]]
name = "verse"
train = ["{data}"]
[train]
duration = {{ steps = 1 }}
micro_batch_size = {batch}
kernels = "{kernels}"
[optimizer]
betas = [{beta1}, 0.999]
adapters = {{ learning_rate = 1e-20 }}
router = {{ learning_rate = 1e-20 }}
[router]
input = "embeddings"
scope = "shared"
normalize_input = false
detach_input = false
temperature = {temperature}
[lora]
scale = "per_expert"
num_experts = {experts}
rank = {rank}
alpha = {alpha}
target_modules = {modules}
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="s2")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    return parser.parse_args()


class Mixture(Opponent):
    """The opponent with a router that reads the embeddings of tokens and positions, as they are."""

    def weights(self, x):
        x = x + self.body.wpe(torch.arange(x.shape[1], device=x.device))
        return (self.router(x.to(self.router.weight.dtype)) / TEMPERATURE).softmax(-1)

    def loss(self, ids):
        if self.router.weight.dtype != torch.float64:
            return self(ids, ids, {"use_cache": False})
        # transformers' own loss would round the logits to f32
        WEIGHTS.now = self.weights(self.embed(ids))
        logits = self.base(ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def blocks(tokenizer, args):
    """Writes texts to FOLDER/data.jsonl, each of which fills a block together with the end token.

    Returns their tokens, [b, t].
    """
    lines = Path("demo/data/verse.train.jsonl").read_text().splitlines()
    ids = tokenizer.encode("\n".join(" ".join(map(str, json.loads(line).values())) for line in lines))
    texts, rows, at = [], [], 0
    while len(rows) < args.batch:
        text = tokenizer.decode(ids[at : at + args.seq_len - 1])
        row = tokenizer.encode(text)
        at += 7
        assert at + args.seq_len < len(ids), "the demo's text has too few tokens"
        if len(row) == args.seq_len - 1 and all(text != other for other in texts):
            texts.append(text)
            rows.append([*row, tokenizer.eos_token_id])
            at += args.seq_len // 2
    (args.folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return torch.tensor(rows)


def write_model(args, setting, eos_token_id):
    """Writes a base with the demo's tokenizer and experts, all with random weights."""
    config = GPT2Config(
        n_layer=args.layers, n_embd=args.width, n_head=args.heads, vocab_size=args.vocabulary,
        n_positions=args.seq_len, bos_token_id=eos_token_id, eos_token_id=eos_token_id,
    )
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config).bfloat16().float()  # every dtype can hold these numbers
    base.save_pretrained(args.folder / "base")
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:
        if (Path(BASE) / file).exists():
            (args.folder / "base" / file).write_bytes((Path(BASE) / file).read_bytes())
    for e in range(setting["experts"]):
        lora = LoraConfig(
            task_type="CAUSAL_LM", fan_in_fan_out=True, r=setting["rank"], lora_alpha=setting["alpha"],
            target_modules=setting["modules"],
        )
        model = get_peft_model(base, lora)
        randomise(model, 0.02)
        model.save_pretrained(args.folder / f"expert_{e}", save_embedding_layers=False)
        base = model.unload()


def step_of_dylora(args, setting, dtype, kernels):
    """The loss, the gradients by name and the model's tensors after a step."""
    run = args.folder / f"{dtype}-{kernels}"
    text = CONFIG.format(
        dir=run, base=args.folder / "base", dtype=dtype, kernels=kernels, seq_len=args.seq_len, batch=args.batch,
        data=args.folder / "data.jsonl", beta1=BETA1, temperature=TEMPERATURE, **setting,
    )
    for e in range(setting["experts"]):
        text += f'[[lora.experts]]\nsource = {{ path = "{args.folder / f"expert_{e}"}" }}\n'
    shutil.rmtree(run, ignore_errors=True)
    config = args.folder / f"{dtype}-{kernels}.toml"
    config.write_text(text)
    dylora("train", "--config", config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["kind"] == "train"]
    assert step["label_tokens"] == args.batch * (args.seq_len - 1), "not the blocks that PEFT gets"
    state = load_file(run / "checkpoints" / "last" / "optimizer.safetensors")
    grads = {k.removeprefix("exp_avg."): t / (1 - BETA1) for k, t in state.items() if k.startswith("exp_avg.")}
    return step["loss"], grads, load_file(run / "checkpoints" / "last" / "model.safetensors")


def step_of_peft(args, setting, dtype, router, ids):
    name = "bf16" if dtype == torch.bfloat16 else "f32"
    base = load_base({"base": args.folder / "base", "dtype": name}, DEVICE).to(dtype)
    mixture = Mixture("one_pass", base, setting | {"dropout": 0.0})
    parameters = dict(mixture.named_parameters())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loaded = {f"router.{key}": tensor for key, tensor in router.items()}
    for e, name in enumerate(mixture.names):
        for key, tensor in load_file(args.folder / f"expert_{e}" / "adapter_model.safetensors").items():
            loaded["peft." + key.replace(".weight", f".{name}.weight")] = tensor
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    assert set(trained) == set(loaded), set(trained) ^ set(loaded)
    for name, parameter in trained.items():
        parameter.data = loaded[name].to(DEVICE, wide)
    loss = mixture.loss(ids.to(DEVICE))
    loss.backward()
    grads = {}
    for name, parameter in trained.items():
        grad = parameter.grad.double().cpu()
        if name.startswith("router"):
            grads[name] = grad
            continue
        path, which, expert, _ = name.split("transformer.")[1].rsplit(".", 3)
        grads[f"{path}.{expert}.{which.lower()}"] = grad.T if which == "lora_B" else grad
    return loss.item(), grads


def distances(grads, exact):
    assert set(grads) == set(exact), set(grads) ^ set(exact)
    return {name: ((grads[name].double() - t).norm() / t.norm()).item() for name, t in exact.items()}


def main():
    args = arguments()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    setting = PRESETS[args.preset]
    setting = setting | {"modules": MODULES["gpt2"][setting["modules"]]}
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = blocks(tokenizer, args)
    write_model(args, setting, tokenizer.eos_token_id)
    ways = [(dtype, kernels) for dtype in ["f32", "bf16"] for kernels in ["auto", "reference"]]
    ours = {way: step_of_dylora(args, setting, *way) for way in ways}
    checkpoint = ours["f32", "auto"][2]
    router = {key: checkpoint[f"router.{key}"] for key in ["weight", "bias"]}
    exact_loss, exact = step_of_peft(args, setting, torch.float64, router, ids)
    rows = {f"dylora {' '.join(way)}": step[:2] for way, step in ours.items()}
    for dtype in [torch.float32, torch.bfloat16]:
        name = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        rows[f"PEFT {name}"] = step_of_peft(args, setting, dtype, router, ids)
    shape = f"{args.layers} layers of {args.width}, {args.batch} x {args.seq_len} tokens"
    print(f"{args.preset} on {DEVICE}, {shape}, {len(exact)} tensors")
    print(f"PEFT in f64: loss {exact_loss:.7f}\n")
    print("| | loss - f64's | gradients: geometric mean | largest | over PEFT's: geometric mean |")
    print("|---|--:|--:|--:|--:|")
    for name, (loss, grads) in rows.items():
        _, dtype, *kernels = name.split()
        found, theirs = distances(grads, exact), distances(rows[f"PEFT {dtype}"][1], exact)
        ratio, largest = geometric_mean(found[t] / theirs[t] for t in exact), max(found.values())
        print(f"| {name} | {loss - exact_loss:+.1e} | {geometric_mean(found.values()):.1e} | {largest:.1e} | {ratio:.3f} |")
        close = abs(loss - exact_loss) <= 1e-5 and largest <= 1e-4 if dtype == "f32" else ratio <= 1
        if kernels == ["auto"] and not close:
            sys.exit(f"{name} is too far from f64")


main()
