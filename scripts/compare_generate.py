#!/usr/bin/env python3
"""Measures how fast dylora generates beside transformers and PEFT.

    scripts/compare_generate [--size NAME | --base DIR] [--seq-len N] [--batches N,..] [--rounds N]
                             [--steps N] [--device cpu] [--dtype f32] [--experts N] [--compile]

Each step adds one token to each of a batch of texts, greedily, up to `--seq-len` positions. The rows
are the base, and a mixture of LoRA experts of rank 8 on the attention's input projections, whose
router reads the token embeddings. dylora's are those of `dylora bench`. The opponents:

    transformers   the base; its own cache, and a loop around `forward`, which is faster than
                   `generate`
    PEFT           the mixture; the forward of PEFT's layer is replaced by a routed loop over adapters

With --compile, the opponents use a static cache and torch.compile(mode="reduce-overhead"), which
replays CUDA graphs. The programs take turns, round by round, and the table has the median of all
steps and the ratio of the medians. A size has random weights. DYLORA names the binary.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from peft_bases import SHAPES
from peft_opponent import WEIGHTS, routed_forward

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
RANK, ALPHA = 8, 16
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ROWS = {"base": ("generate_base", "transformers"), "mixture": ("generate", "PEFT")}


def load(args):
    if args.base:
        model = AutoModelForCausalLM.from_pretrained(args.base, dtype=DTYPES[args.dtype], attn_implementation="sdpa")
    else:
        n_layer, n_head, n_embd = SHAPES[args.size]
        torch.manual_seed(0)
        config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    return model.to(device=args.device, dtype=DTYPES[args.dtype]).eval()


class Opponent:
    """The base in transformers, or a mixture of adapters in PEFT."""

    def __init__(self, row, args):
        self.args, self.row, base = args, row, load(args)
        self.embed, self.model = base.get_input_embeddings(), base
        if row == "mixture":
            names = [f"expert_{e}" for e in range(args.experts)]
            modules = ["c_attn"] if base.config.model_type == "gpt2" else ["q_proj", "v_proj"]
            lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=modules)
            lora.fan_in_fan_out = base.config.model_type == "gpt2"
            peft = get_peft_model(base, lora, adapter_name=names[0])
            for name in names[1:]:
                peft.add_adapter(name, lora)
            for layer in peft.modules():
                if isinstance(layer, peft_layer.Linear):
                    layer.forward = routed_forward.__get__(layer)
                    layer._active_adapter = names
            self.model = peft.base_model.model
            router = torch.randn(args.experts, self.embed.weight.shape[1], device=args.device)
            self.router = (0.02 * router).to(DTYPES[args.dtype])
        self.forward = torch.compile(self.run, mode="reduce-overhead") if args.compile else self.run

    def run(self, ids, cache, position):
        if self.row == "mixture":
            WEIGHTS.now = F.linear(self.embed(ids), self.router).float().softmax(-1)
        logits = self.model(input_ids=ids, past_key_values=cache, cache_position=position, use_cache=True).logits
        WEIGHTS.now = None
        return logits[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def times(self, batch):
        """The milliseconds of each step that counts."""
        args, num_new = self.args, self.args.steps + self.args.warmup
        ids = torch.randint(self.model.config.vocab_size, (batch, args.seq_len - num_new), device=args.device)
        cache = DynamicCache(config=self.model.config)
        if args.compile:
            cache = StaticCache(config=self.model.config, max_cache_len=args.seq_len)
        token = self.run(ids, cache, torch.arange(ids.shape[1], device=args.device))
        times = []
        for i in range(num_new):
            wait(args)
            start = time.perf_counter()
            position = torch.tensor([ids.shape[1] + i], device=args.device)
            token = self.forward(token, cache, position).clone()
            token.tolist()
            times.append(1e3 * (time.perf_counter() - start))
        return times[args.warmup :]


def wait(args):
    if args.device != "cpu":
        torch.cuda.synchronize()


def dylora(row, batch, args):
    """The median step of dylora in milliseconds."""
    line = [os.environ.get("DYLORA", "target/release/dylora"), "-q", "bench", "--json", "--device", args.device]
    line += ["--base", args.base] if args.base else ["--size", args.size]
    modules = "attn.c_attn" if not args.base or is_gpt2(args) else "q_proj,v_proj"
    settings = {"seq-len": args.seq_len, "batch": batch, "dtype": args.dtype, "experts": args.experts, "rank": RANK}
    settings |= {"alpha": ALPHA, "modules": modules, "steps": args.steps, "warmup": args.warmup, "rows": row}
    line += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    report = json.loads(done.stdout.splitlines()[1])
    if report["error"]:
        sys.exit(report["error"])
    return report["step_ms"]


def is_gpt2(args):
    with open(os.path.join(args.base, "config.json")) as file:
        return json.load(file)["model_type"] == "gpt2"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="gpt2", choices=SHAPES)
    parser.add_argument("--base")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batches", default="1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="f32", choices=DTYPES)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    what = args.base or f"{args.size} (random weights)"
    threads = torch.get_num_threads() if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{what} in {args.dtype} on {args.device} ({threads}), {args.seq_len} positions, {args.experts} experts")
    print("| row | texts | dylora, tokens/s | opponent, tokens/s | ratio | spread |\n|---|--:|--:|--:|--:|---|")
    for row, (own, name) in ROWS.items():
        opponent = Opponent(row, args)
        for batch in map(int, args.batches.split(",")):
            rounds = [(dylora(own, batch, args), statistics.median(opponent.times(batch))) for _ in range(args.rounds)]
            ours, theirs = (statistics.median(ms) for ms in zip(*rounds))
            ratios = sorted(theirs / ours for ours, theirs in rounds)
            print(
                f"| {row}, {name} | {batch} | {1e3 * batch / ours:,.0f} | {1e3 * batch / theirs:,.0f} "
                f"| {theirs / ours:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
