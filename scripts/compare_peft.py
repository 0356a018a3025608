#!/usr/bin/env python3
"""dylora against PEFT with the same numbers, side by side in one run.

    scripts/compare_peft [--device auto|cpu|cuda[:N]] [--preset s1|s2] [--batches 1,4] [--compile] ..

dylora is `dylora bench`, the opponents are in scripts/peft_opponent.py: both run whole steps on random tokens and
random weights of one of GPT-2's shapes. On a GPU each of them measures all rows in one process. On the CPU each row is
measured in processes of its own that alternate, dylora, PEFT, dylora, .., `--pairs` times; ratios are of pairs, with
their median, least and largest.

Memory is the peak of the allocator on a GPU; on the CPU the peak of the resident set less what was resident when the
base was loaded. `--start` also measures the time from the start of a process to the end of its first step, from a
folder that transformers wrote, which is in the page cache by then.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

PRESETS = {
    "s1": {"experts": 4, "rank": 8, "alpha": 16, "modules": ["attn.c_attn"]},
    "s2": {"experts": 8, "rank": 16, "alpha": 32, "modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]},
}
ROWS = ["one_pass", "single_lora", "two_passes", "n_passes", "eval"]
COMPILED = ["one_pass", "single_lora", "eval"]  # the rows that --compile measures compiled as well
OPPONENT = Path(__file__).with_name("peft_opponent.py")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--dylora", default="target/release/dylora", metavar="PATH")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", choices=PRESETS, default="s1")
    parser.add_argument("--size", choices=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], default="gpt2")
    parser.add_argument("--dtype", choices=["f32", "bf16"], help="default: bf16 on a GPU, f32 on the CPU")
    parser.add_argument("--batches", type=numbers, default=[8], metavar="N,..")
    parser.add_argument("--seq-len", type=int, default=1024, metavar="N")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N")
    parser.add_argument("--documents", type=float, metavar="MEDIAN", help="packed documents of this median length")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=ROWS, metavar="NAME,..", help=f"of {ROWS}")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE",
                        help="also under torch.compile; `blocks` compiles block by block, in a fraction of the time")
    parser.add_argument("--compile-batches", type=numbers, metavar="N,..", help="on a GPU; default: all batches")
    parser.add_argument("--compile-rows", type=lambda text: text.split(","), default=COMPILED, metavar="NAME,..")
    parser.add_argument("--padded-vocab", action="store_true", help="PEFT's vocabulary as a multiple of 64")
    parser.add_argument("--steps", type=int, default=10, metavar="N")
    parser.add_argument("--warmup", type=int, default=5, metavar="N")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="on the CPU")
    parser.add_argument("--start", action="store_true", help="also the time from start to the end of the first step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for `dylora bench` alone")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="every figure, a JSON object a line")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no rows: {', '.join(sorted(unknown))}")
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("f32" if args.device == "cpu" else "bf16")
    if args.padded_vocab and args.start:
        parser.error("--padded-vocab and --start: the shared folder has GPT-2's vocabulary")
    return args


class Results:
    """The rows measured so far, by who, row and batch."""

    def __init__(self, out):
        self.rows, self.file = {}, out and out.open("w")

    def add(self, who, lines, **more):
        for line in lines:
            line = {"who": who, **more, **line}
            if self.file:
                print(json.dumps(line), file=self.file, flush=True)
            if line["kind"] == "row":
                self.rows.setdefault((who, line["row"], line["micro_batch_size"]), []).append(line)
                said = line["error"] or f"{line['tokens_per_sec']:,.0f} tokens/s"
                print(f"{who} {line['row']} at batch {line['micro_batch_size']}: {said}", file=sys.stderr)

    def of(self, who, row, batch):
        return [line for line in self.rows.get((who, row, batch), []) if not line["error"]]

    def median(self, who, row, batch, key):
        values = [line[key] for line in self.of(who, row, batch) if line[key] is not None]
        return statistics.median(values) if values else None

    def ratios(self, a, b, key):
        """One for each pair of runs; `a` and `b` are (who, row, batch)."""
        others = {line.get("pair"): line[key] for line in self.of(*b)}
        pairs = [(line[key], others.get(line.get("pair"))) for line in self.of(*a)]
        return [x / y for x, y in pairs if x and y]


def lines_of(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        # a process that is killed, as for its memory, costs its remaining rows only
        message = done.stderr.strip().splitlines()[-1:] or ["no message"]
        print(f"`{command[0]}` exited with {done.returncode}: {message[0]}", file=sys.stderr)
        if done.returncode > 0:
            sys.exit(1)
    return lines


def run_dylora(args, rows, batches, base=None, steps=None, warmup=None):
    command = [args.dylora, "--quiet", "bench", "--json", "--device", args.device, "--preset", args.preset]
    command += ["--base", base] if base else ["--size", args.size]
    numbers = lambda values: ",".join(map(str, values))
    for flag, value in {
        "--dtype": args.dtype, "--seq-len": args.seq_len, "--dropout": args.dropout, "--accumulate": args.accumulate,
        "--batch": numbers(batches), "--rows": numbers(rows), "--documents": args.documents,
        "--steps": args.steps if steps is None else steps, "--warmup": args.warmup if warmup is None else warmup,
    }.items():
        command += [flag, str(value)] if value is not None else []
    for item in args.set:
        command += ["--set", item]
    return lines_of(command)


def run_peft(args, rows, batches, compiled=None, base=None, steps=None, warmup=None):
    setting = PRESETS[args.preset] | {
        "rows": rows, "batches": batches, "compile": compiled, "base": base, "device": args.device, "size": args.size,
        "dtype": args.dtype, "seq_len": args.seq_len, "dropout": args.dropout, "accumulate": args.accumulate,
        "documents": args.documents, "padded_vocab": args.padded_vocab, "seed": 0,
        "steps": args.steps if steps is None else steps, "warmup": args.warmup if warmup is None else warmup,
    }
    return lines_of([sys.executable, str(OPPONENT), json.dumps(setting)])


def measure(args, results):
    compiled = [row for row in args.rows if row in COMPILED and row in args.compile_rows] if args.compile else []
    if args.device != "cpu":
        results.add("dylora", run_dylora(args, args.rows, args.batches))
        results.add("peft", run_peft(args, args.rows, args.batches))
        if compiled:
            results.add("peft_compiled", run_peft(args, compiled, args.compile_batches or args.batches, args.compile))
        return
    for batch in args.batches:
        for row in args.rows:
            for pair in range(args.pairs):
                results.add("dylora", run_dylora(args, [row], [batch]), pair=pair)
                results.add("peft", run_peft(args, [row], [batch]), pair=pair)
                if row in compiled:
                    results.add("peft_compiled", run_peft(args, [row], [batch], args.compile), pair=pair)


def measure_start(args, results):
    """Seconds from the start of a process to the end of its first step: dylora's, PEFT's, in turn."""
    import torch
    from transformers import GPT2LMHeadModel

    sys.path.insert(0, str(OPPONENT.parent))
    from peft_opponent import shape

    secs = {"dylora": [], "peft": []}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT2LMHeadModel(shape({"size": args.size})).save_pretrained(folder)
        for pair in range(args.pairs):
            for who, run in [("dylora", run_dylora), ("peft", run_peft)]:
                start = time.time()
                lines = run(args, ["one_pass"], args.batches[:1], base=folder, steps=1, warmup=0)
                for line in lines:
                    if line["kind"] == "row" and not line["error"]:
                        secs[who].append(line["first_step_unix_secs"] - start)
                        if results.file:
                            start_line = {"who": who, "kind": "start", "pair": pair, "secs": secs[who][-1]}
                            print(json.dumps(start_line), file=results.file, flush=True)
    return secs


def table(args, results):
    """Figures of all rows, and how many times PEFT's tokens/s dylora has."""
    whos = ["dylora", "peft"] + (["peft_compiled"] if args.compile else [])
    memory = "extra_memory_bytes" if args.device == "cpu" else "peak_memory_bytes"
    header = ["row", "batch"]
    for who in whos:
        header += [f"{who} tokens/s", "ms", "GiB"]
    header += [f"dylora / {who}" for who in whos[1:]] + [f"GiB / {who}" for who in whos[1:]]
    rows = []
    for batch in args.batches:
        for row in args.rows:
            cells = [row, str(batch)]
            for who in whos:
                speed, ms, peak = (results.median(who, row, batch, k) for k in ["tokens_per_sec", "step_ms", memory])
                cells += [number(speed, ",.0f"), number(ms, ".2f"), number(peak and peak / 2**30, ".2f")]
            ours = ("dylora", row, batch)
            cells += [spread(results.ratios(ours, (who, row, batch), "tokens_per_sec")) for who in whos[1:]]
            cells += [spread(results.ratios(ours, (who, row, batch), memory)) for who in whos[1:]]
            rows.append(cells)
    print("| " + " | ".join(header) + " |")
    print("|---|" + "---:|" * (len(header) - 1))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def number(value, form):
    return "-" if value is None else format(value, form)


def spread(values, form=".2f"):
    """The median, and from where to where."""
    if not values:
        return "-"
    text = format(statistics.median(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def conclusions(args, results):
    """What the table comes to: best batches, the mixture's price, N passes."""
    best = {}
    for who in ["dylora", "peft", "peft_compiled"]:
        speeds = [(results.median(who, "one_pass", b, "tokens_per_sec"), b) for b in args.batches]
        speeds = [(speed, batch) for speed, batch in speeds if speed]
        if speeds:
            best[who] = max(speeds)
            print(f"best one_pass of {who}: {best[who][0]:,.0f} tokens/s at batch {best[who][1]}")
    for who in ["peft", "peft_compiled"]:
        if {"dylora", who} <= set(best):
            print(f"dylora / {who}, each at its best batch: {best['dylora'][0] / best[who][0]:.2f}")
    for batch in args.batches:
        for who in ["dylora", "peft", "peft_compiled"]:
            cost = results.ratios((who, "one_pass", batch), (who, "single_lora", batch), "step_ms")
            if cost:
                print(f"a step of the mixture over one of a single LoRA, {who}, batch {batch}: {spread(cost, '.3f')}")
        for who in ["dylora", "peft"]:
            gain = results.ratios(("dylora", "one_pass", batch), (who, "n_passes", batch), "tokens_per_sec")
            if gain:
                print(f"one_pass of dylora over n_passes of {who}, batch {batch}: {spread(gain)}")


def main():
    args = arguments()
    packages = ", ".join(f"{name} {version(name)}" for name in ["torch", "transformers", "peft"])
    words = {key: value for key, value in vars(args).items() if key not in ["out", "dylora"]}
    header = {"kind": "setting", **words, **PRESETS[args.preset], "cpus": os.cpu_count(), "packages": packages}
    results = Results(args.out)
    if results.file:
        print(json.dumps(header), file=results.file, flush=True)
    measure(args, results)
    starts = measure_start(args, results) if args.start else None
    documents = f"packed documents of median {args.documents:g}" if args.documents else "one document a block"
    print(
        f"{args.preset} {PRESETS[args.preset]}\n{args.size} in {args.dtype} on {args.device}, {args.seq_len} tokens a "
        f"block, {documents}, {args.accumulate} forward(s) a step, dropout {args.dropout}; {packages}\n"
    )
    table(args, results)
    peak = "resident set over that with the base alone" if args.device == "cpu" else "allocator"
    print(f"\nGiB: peak of the {peak}; ratios of several pairs: median (least to most)\n")
    conclusions(args, results)
    if starts:
        for who, secs in starts.items():
            print(f"from the start of {who} to the end of its first step: {spread(secs)} s")


if __name__ == "__main__":
    main()
