#!/usr/bin/env python3
"""Measures dylora and PEFT with the same settings side by side.

    scripts/compare_peft [--device auto|cpu|cuda[:N]] [--preset s1|s2] [--batches 1,4] [--compile]
                         [--strongest] ..

dylora is measured by `dylora bench`, and its opponents by scripts/peft_opponent.py. Both run whole
steps on random tokens, on a base of `--size` with random weights or on `--base`. On a GPU, each
opponent measures all rows in one process. dylora does so twice, before and after its opponents, so
that a drift of the machine becomes visible. On the CPU, each row is measured in processes of its
own, which alternate `--pairs` times: dylora, PEFT, dylora, .. A ratio is that of the medians of
such a pair; its median, least and largest value are printed. A second table shows the spread of
the steps themselves.

`--strongest` measures PEFT compiled in its fastest forms: without a mask tensor, with cuDNN's
attention only, with a padded vocabulary, and with steps that do not wait for their loss. If
liger_kernel is installed, its fused loss is measured too. Several experts are also computed by one
product, which PEFT itself does not do (`stacked`). Other forms are named by their switches
(see scripts/peft_opponent.py), as in `--strongest no_mask+cudnn,strongest+rank_weights`. Forms with
`liger_blocks` are not compiled. The first loss and gradient norm of a form must be those of eager
PEFT: to 1e-5 and 1e-4 in f32, and to 2e-3 and 2e-2 in bf16. Otherwise the exit code is 1.

Memory is the peak of the allocator on a GPU. On the CPU, it is the peak of the resident set minus
the resident set after the base was loaded. `--start` also measures the time from the start of a
process to the end of its first step. The base is then read from a folder that transformers wrote,
which is in the page cache.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PRESETS = {
    "s1": {"experts": 4, "rank": 8, "alpha": 16, "modules": "qkv"},
    "s2": {"experts": 8, "rank": 16, "alpha": 32, "modules": "all"},
}
SIZES = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b"]
ROWS = ["one_pass", "single_lora", "two_passes", "n_passes", "eval"]
COMPILED = ["one_pass", "single_lora", "eval"]  # the rows that --compile and --strongest measure
SWITCHES = ["no_mask", "cudnn", "padded_vocab", "padded_loss", "liger", "no_wait", "repeat_kv", "liger_blocks",
            "checkpointing", "rank_weights", "stacked"]
FORMS = {"strongest": ["no_mask", "cudnn", "padded_vocab", "no_wait"]}
FORMS["strongest_liger"] = [*FORMS["strongest"], "liger"]
# the largest differences of a compiled row from eager PEFT: of the first loss in nats, and of the
# gradient norm as a share of it
LOSS_TOLERANCE = {"f32": 1e-5, "bf16": 2e-3}
NORM_TOLERANCE = {"f32": 1e-4, "bf16": 2e-2}
OPPONENT = Path(__file__).with_name("peft_opponent.py")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--dylora", default="target/release/dylora", metavar="PATH")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", choices=PRESETS, default="s1")
    parser.add_argument("--base", metavar="DIR", help="weights of both sides, instead of random ones of --size")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--experts", type=int, metavar="N", help="as the next three: default: the preset's")
    parser.add_argument("--rank", type=int, metavar="N")
    parser.add_argument("--alpha", type=float, metavar="NUMBER")
    parser.add_argument("--modules", metavar="NAME,..|all")
    parser.add_argument("--dtype", choices=["f32", "bf16"], help="default: bf16 on a GPU, f32 on the CPU")
    parser.add_argument("--batches", type=numbers, default=[8], metavar="N,..")
    parser.add_argument("--seq-len", type=int, default=1024, metavar="N")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N")
    parser.add_argument("--documents", type=float, metavar="MEDIAN", help="packed documents of this median length")
    words = lambda text: text.split(",")
    parser.add_argument("--rows", type=words, default=ROWS, metavar="NAME,..", help=f"of {ROWS}")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE",
                        help="also under torch.compile; `blocks` compiles block by block, in a fraction of the time")
    parser.add_argument("--strongest", nargs="?", type=words, const=[], metavar="FORM,..",
                        help="also compiled in these forms; default: the strongest, the same with Liger, and the same with `stacked`")
    parser.add_argument("--compile-batches", type=numbers, metavar="N,..", help="on a GPU; default: all batches")
    parser.add_argument("--compile-rows", type=words, default=COMPILED, metavar="NAME,..")
    parser.add_argument("--padded-vocab", action="store_true",
                        help="`peft` and `peft_compiled` with padded_vocab+padded_loss")
    parser.add_argument("--no-eager", action="store_true", help="no eager PEFT")
    parser.add_argument("--steps", type=int, metavar="N", help="default: 40 on a GPU, 10 on the CPU")
    parser.add_argument("--warmup", type=int, metavar="N", help="default: 10 on a GPU, 5 on the CPU")
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
    on_cpu = args.device == "cpu"
    args.dtype = args.dtype or ("f32" if on_cpu else "bf16")
    args.steps = args.steps or (10 if on_cpu else 40)
    args.warmup = (5 if on_cpu else 10) if args.warmup is None else args.warmup
    if args.strongest == []:
        can_liger = not on_cpu and importlib.util.find_spec("liger_kernel")
        args.strongest = ["strongest", "strongest_liger"] if can_liger else ["strongest"]
        if mixture(args)["experts"] > 1:
            args.strongest.append("strongest+stacked")
    args.strongest = args.strongest or []
    if unknown := {switch for form in args.strongest for switch in switches(form)} - set(SWITCHES):
        parser.error(f"no forms or switches: {', '.join(sorted(unknown))}")
    if args.strongest and args.documents:
        parser.error("--strongest and --documents: without a mask documents see each other")
    if args.strongest and args.warmup < 1:
        parser.error("--strongest needs a step to warm up")
    return args


def switches(form):
    return [switch for part in form.split("+") for switch in FORMS.get(part, [part])]


def mixture(args):
    """The mixture of the preset, with what other arguments change in it."""
    changes = {key: value for key in ["experts", "rank", "alpha"] if (value := getattr(args, key)) is not None}
    if args.modules:
        changes["modules"] = "all" if args.modules == "all" else args.modules.split(",")
    return PRESETS[args.preset] | changes


class Results:
    """The rows measured so far, by program (`who`), row and batch, and the faults."""

    def __init__(self, out):
        self.rows, self.file, self.faults = {}, out and out.open("w"), []

    def write(self, line):
        if self.file:
            print(json.dumps(line), file=self.file, flush=True)

    def add(self, who, lines, **more):
        for line in lines:
            line = {"who": who, **more, **line}
            self.write(line)
            if line["kind"] == "failed":
                self.faults.append(f"{who}: {line['message']}")
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
        """The ratios of the pairs of runs of `a` and `b`, each given as (who, row, batch).

        A run of `b` without a number is compared with every run of `a`.
        """
        others = {line.get("pair"): line[key] for line in self.of(*b)}
        pairs = [(line[key], others.get(line.get("pair"), others.get(None))) for line in self.of(*a)]
        return [x / y for x, y in pairs if x and y]

    def steps(self, who, row, batch):
        """The sorted milliseconds of the steps of all runs, and whether these are all steps.

        If a run does not report each step, its least, median and largest time stand for them.
        """
        lines = self.of(who, row, batch)
        counted = all(line.get("counted_ms") for line in lines)
        ends = ["min_step_ms", "step_ms", "max_step_ms"]
        return sorted(ms for line in lines for ms in (line["counted_ms"] if counted else map(line.get, ends))), counted


def lines_of(command):
    """The JSON lines that a process printed. If it fails, the rows that it printed still count."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        message = f"`{command[0]}` exited with {done.returncode}: {last[0]}"
        print(message, file=sys.stderr)
        lines.append({"kind": "failed", "message": message})
    return lines


def run_dylora(args, rows, batches, base=None, steps=None, warmup=None):
    command = [args.dylora, "--quiet", "bench", "--json", "--device", args.device, "--preset", args.preset]
    base = base or args.base
    command += ["--base", base] if base else ["--size", args.size]
    numbers = lambda values: ",".join(map(str, values))
    for flag, value in {
        "--experts": args.experts, "--rank": args.rank, "--alpha": args.alpha, "--modules": args.modules,
        "--dtype": args.dtype, "--seq-len": args.seq_len, "--dropout": args.dropout, "--accumulate": args.accumulate,
        "--batch": numbers(batches), "--rows": numbers(rows), "--documents": args.documents,
        "--steps": args.steps if steps is None else steps, "--warmup": args.warmup if warmup is None else warmup,
    }.items():
        command += [flag, str(value)] if value is not None else []
    for item in args.set:
        command += ["--set", item]
    return lines_of(command)


def run_peft(args, rows, batches, compiled=None, form=[], base=None, steps=None, warmup=None):
    setting = mixture(args) | {
        "rows": rows, "batches": batches, "compile": compiled, "form": form, "base": base or args.base,
        "device": args.device, "size": args.size, "dtype": args.dtype, "seq_len": args.seq_len,
        "dropout": args.dropout, "accumulate": args.accumulate, "documents": args.documents, "seed": 0,
        "steps": args.steps if steps is None else steps, "warmup": args.warmup if warmup is None else warmup,
    }
    return lines_of([sys.executable, str(OPPONENT), json.dumps(setting)])


def opponents(args):
    """The opponents: for each name its rows, its batches, and its compilation and form."""
    compiled = [row for row in args.rows if row in COMPILED and row in args.compile_rows]
    batches = args.compile_batches or args.batches
    padded = ["padded_vocab", "padded_loss"] if args.padded_vocab else []
    found = {} if args.no_eager else {"peft": (args.rows, args.batches, {"form": padded})}
    if args.compile:
        found["peft_compiled"] = (compiled, batches, {"compiled": args.compile, "form": padded})
    for form in args.strongest:
        how = {"compiled": args.compile or "default", "form": switches(form)}
        if "liger_blocks" in how["form"]:
            how["compiled"] = None
        found[f"peft_{form}"] = (compiled, batches, how)
    return found


def measure(args, results):
    if args.device != "cpu":
        results.add("dylora", run_dylora(args, args.rows, args.batches), pair=0)
        for who, (rows, batches, how) in opponents(args).items():
            results.add(who, run_peft(args, rows, batches, **how))
        results.add("dylora", run_dylora(args, args.rows, args.batches), pair=1)
        return
    for batch in args.batches:
        for row in args.rows:
            for pair in range(args.pairs):
                results.add("dylora", run_dylora(args, [row], [batch]), pair=pair)
                for who, (rows, _, how) in opponents(args).items():
                    if row in rows:
                        results.add(who, run_peft(args, [row], [batch], **how), pair=pair)


def measure_start(args, results):
    """Seconds from a process's start to the end of its first step, for dylora and PEFT in turn."""
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(OPPONENT.parent))
    from peft_bases import shape

    secs = {"dylora": [], "peft": []}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        if not args.base:
            AutoModelForCausalLM.from_config(shape({"size": args.size})).save_pretrained(folder)
        for pair in range(args.pairs):
            for who, run in [("dylora", run_dylora), ("peft", run_peft)]:
                start = time.time()
                lines = run(args, ["one_pass"], args.batches[:1], base=args.base or folder, steps=1, warmup=0)
                for line in lines:
                    if line["kind"] == "row" and not line["error"]:
                        secs[who].append(line["first_step_unix_secs"] - start)
                        results.write({"who": who, "kind": "start", "pair": pair, "secs": secs[who][-1]})
    return secs


def table(args, results):
    """Prints the figures of all rows, and the ratios of dylora's figures to its opponents'."""
    whos = ["dylora", *opponents(args)]
    memory = "extra_memory_bytes" if args.device == "cpu" else "peak_memory_bytes"
    header = ["row", "batch"]
    for who in whos:
        header += [f"{who} tokens/s", "ms", "GiB"]
    header += [f"dylora / {who}" for who in whos[1:]] + [f"GiB / {who}" for who in whos[1:]]
    rows = []
    for batch in args.batches:
        for row in args.rows:
            cells = [row, batch]
            for who in whos:
                speed, ms, peak = (results.median(who, row, batch, k) for k in ["tokens_per_sec", "step_ms", memory])
                cells += [number(speed, ",.0f"), number(ms, ".2f"), number(peak and peak / 2**30, ".2f")]
            ours = ("dylora", row, batch)
            cells += [spread(results.ratios(ours, (who, row, batch), "tokens_per_sec")) for who in whos[1:]]
            cells += [spread(results.ratios(ours, (who, row, batch), memory)) for who in whos[1:]]
            rows.append(cells)
    print_table(header, rows)


def print_table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|---|" + "---:|" * (len(header) - 1))
    for cells in rows:
        print("| " + " | ".join(map(str, cells)) + " |")


def steps_table(args, results):
    """Prints the spread of the steps' times, and that of dylora's speed over each opponent's."""
    rows = []
    for batch in args.batches:
        for row in args.rows:
            ours = results.steps("dylora", row, batch)
            for who in ["dylora", *opponents(args)]:
                ms, counted = results.steps(who, row, batch)
                if not ms:
                    continue
                inner = [f"{quantile(ms, q):.2f}" if counted else "-" for q in [0.1, 0.25, 0.75, 0.9]]
                median = results.median(who, row, batch, "step_ms")
                cells = [who, row, batch, len(ms) if counted else "-", f"{median:.2f}", f"{ms[0]:.2f}"]
                cells += [*inner, f"{ms[-1]:.2f}"]
                if who == "dylora" or not ours[0]:
                    rows.append([*cells, "-"])
                    continue
                (our_low, our_high), (low, high) = bounds(*ours), bounds(ms, counted)
                ratio = median / results.median("dylora", row, batch, "step_ms")
                rows.append([*cells, f"{ratio:.3f} ({low / our_high:.3f} to {high / our_low:.3f})"])
    print_table(["who", "row", "batch", "steps", "median ms", "min", "10 %", "25 %", "75 %", "90 %", "max",
                 "dylora / it"], rows)


def bounds(ms, counted):
    return (quantile(ms, 0.1), quantile(ms, 0.9)) if counted else (ms[0], ms[-1])


def quantile(ordered, q):
    """The quantile `q` of sorted numbers, interpolated between its two neighbours."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def losses_table(args, results):
    """Prints the first loss and gradient norm of PEFT's rows.

    It is a fault if those of a compiled row or of a form differ from those of eager PEFT.
    """
    rows = []
    for (who, row, batch), lines in results.rows.items():
        line = next((line for line in lines if not line["error"]), None)
        if who == "dylora" or line is None:
            continue
        cells = [who, row, batch, f"{line['first_loss']:.6f}", "-", number(line["first_grad_norm"], ".5f"), "-"]
        if (eager := line.get("eager_loss")) is not None:
            off = line["first_loss"] - eager
            within = abs(off) <= LOSS_TOLERANCE[args.dtype]
            cells[4] = f"{off:.1e}"
            if norm := line["eager_grad_norm"]:
                off = line["first_grad_norm"] / norm - 1
                within &= abs(off) <= NORM_TOLERANCE[args.dtype]
                cells[6] = f"{off:.1e}"
            if not within:
                results.faults.append(f"{who} {row} at batch {batch}: first loss or gradient norm is not eager PEFT's")
        rows.append([*cells, line["loss_vocab_size"], line["attention"], line["liger"] or "no",
                     number(line["graph_breaks"], "d")])
    print_table(["who", "row", "batch", "first loss", "less eager PEFT's", "gradient norm", "over eager PEFT's - 1",
                 "logits in the loss", "attention", "Liger", "graph breaks"], rows)


def number(value, form):
    return "-" if value is None else format(value, form)


def spread(values, form=".2f"):
    """The median of the values, and their range if there are several."""
    if not values:
        return "-"
    text = format(statistics.median(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def conclusions(args, results):
    """Prints the best batches, the strongest opponent and the cost of a mixture."""
    whos = opponents(args)
    best = {}
    for who in ["dylora", *whos]:
        speeds = [(results.median(who, "one_pass", b, "tokens_per_sec"), b) for b in args.batches]
        speeds = [(speed, batch) for speed, batch in speeds if speed]
        if speeds:
            best[who] = max(speeds)
            print(f"best one_pass of {who}: {best[who][0]:,.0f} tokens/s at batch {best[who][1]}")
    theirs = [who for who in whos if who in best]
    for who in theirs:
        if "dylora" in best:
            print(f"dylora / {who}, each at its best batch: {best['dylora'][0] / best[who][0]:.2f}")
    if "dylora" in best and len(theirs) > 1:
        who = max(theirs, key=best.get)
        print(f"the strongest of them: {who}, dylora / it {best['dylora'][0] / best[who][0]:.2f}")
    for batch in args.batches:
        for who in ["dylora", *whos]:
            cost = results.ratios((who, "one_pass", batch), (who, "single_lora", batch), "step_ms")
            if cost:
                print(f"a step of the mixture over one of a single LoRA, {who}, batch {batch}: {spread(cost, '.3f')}")
        for who in ["dylora", "peft"]:
            gain = results.ratios(("dylora", "one_pass", batch), (who, "n_passes", batch), "tokens_per_sec")
            if gain:
                print(f"one_pass of dylora over n_passes of {who}, batch {batch}: {spread(gain)}")


def installed(name):
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def main():
    args = arguments()
    packages = ", ".join(map(installed, ["torch", "transformers", "peft", "triton", "liger-kernel"]))
    words = {key: value for key, value in vars(args).items() if key not in ["out", "dylora"]}
    forms = {who: how["form"] for who, (_, _, how) in opponents(args).items()}
    results = Results(args.out)
    header = {"kind": "setting", **words, **mixture(args), "forms": forms}
    results.write({**header, "cpus": os.cpu_count(), "packages": packages})
    measure(args, results)
    starts = measure_start(args, results) if args.start else None
    documents = f"packed documents of median {args.documents:g}" if args.documents else "one document a block"
    print(
        f"{args.preset} {mixture(args)}\n{args.base or args.size} in {args.dtype} on {args.device}, "
        f"{args.seq_len} tokens a block, {documents}, {args.accumulate} forward(s) a step, dropout {args.dropout}, "
        f"{args.steps} steps after {args.warmup}; {packages}"
    )
    for who, form in forms.items():
        print(f"{who}: {'+'.join(form) or 'as it comes'}")
    print()
    table(args, results)
    peak = "resident set over that with the base alone" if args.device == "cpu" else "allocator"
    print(f"\nGiB: peak of the {peak}; ratios of several pairs: median (least to most)\n")
    steps_table(args, results)
    print(
        "\nsteps of all runs; dylora / it: of medians, from its fast steps over dylora's slow ones to its slow ones\n"
        "over dylora's fast ones: the 10 and 90 % of whoever reports each step, else the least and the largest\n"
    )
    losses_table(args, results)
    print()
    conclusions(args, results)
    if starts:
        for who, secs in starts.items():
            print(f"from the start of {who} to the end of its first step: {spread(secs)} s")
    if results.faults:
        sys.exit("\n".join(results.faults))


if __name__ == "__main__":
    main()
