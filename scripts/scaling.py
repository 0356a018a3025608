#!/usr/bin/env python3
"""Measures how training scales with the number of processes on this machine.

    scripts/scaling.py DYLORA OUT [--processes 1,2,4] [--shapes s1,s2,..] [--device cuda]
    scripts/scaling.py table OUT

For each shape, the script runs `dylora launch -n N -- bench` with one process and then with more, each of
which has a device of its own. --rounds repeats this. Each result is a line of OUT, a file of JSON lines.
`table` prints markdown, in which the tokens/s of N processes are given as a share of N times those of one
process:

    weak scaling     all processes have the same batch
    strong scaling   the one process has N times the batch of each of the N, so that the step is the same
    apart            as weak scaling, but the N processes run at the same time without knowing of each
                     other, and the slowest counts N times: what the devices lose by themselves

The medians of the rounds are compared. With --device cpu, the script checks itself on small shapes.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from resumable import ROOT, Dylora, markdown, num_gpus

GPT2 = ["--size", "gpt2", "--seq-len", "1024"]
SMOLLM2 = ["--size", "smollm2-135m", "--preset", "s2", "--seq-len", "1024"]
LLAMA_1B = ["--size", "llama-3.2-1b", "--preset", "s2", "--seq-len", "4096"]
LLAMA_8B = ["--size", "llama-3.1-8b", "--experts", "4", "--rank", "16", "--alpha", "32", "--modules", "all"]
# the arguments of `dylora bench`, its batches, and the numbers of steps to warm up and to count
SHAPES = {
    "s1": ([*GPT2, "--preset", "s1"], [16, 8, 4], 20, 100),
    "s2": ([*GPT2, "--preset", "s2"], [16, 8, 4], 20, 100),
    "smollm2-135m": (SMOLLM2, [16, 8, 4], 10, 40),
    "llama-3.2-1b": (LLAMA_1B, [2], 5, 15),
    "llama-3.1-8b": ([*LLAMA_8B, "--seq-len", "4096"], [2], 3, 6),
}
TINY = (["--size", "gpt2", "--preset", "s1", "--seq-len", "16"], [2, 1], 1, 3)


def measure(dylora, processes, shape, device):
    """The rows of `dylora bench` on a shape, one for each batch."""
    launch = ["launch", "-n", str(processes), "--"] if processes > 1 else []
    header, *rows = map(json.loads, dylora.call(command(dylora, launch, shape, device)).splitlines())
    assert header["processes"] == processes, header
    for row in rows:
        assert row["error"] is None, row
        yield {
            "shape": shape,
            "kind": "world",
            "processes": processes,
            "batch": row["micro_batch_size"],
            "seq_len": header["seq_len"],
            **{key: header[key] for key in ("device_model", "dtype", "dylora_version", "libtorch_version")},
            **{key: row[key] for key in ("tokens_per_sec", "step_ms", "min_step_ms", "max_step_ms")},
            **{key: row[key] for key in ("tokens_per_step", "peak_memory_bytes", "first_loss", "last_loss")},
        }


def measure_apart(dylora, processes, shape, device):
    """The same of processes that do not know of each other: the slowest counts for all."""
    line = command(dylora, [], shape, device)
    start = lambda gpu: subprocess.Popen(
        line, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**dylora.env, "CUDA_VISIBLE_DEVICES": str(gpu)}
    )
    started = [start(gpu) for gpu in range(processes)]
    outputs = [[json.loads(text) for text in process.communicate()[0].splitlines()] for process in started]
    for rows in zip(*(output[1:] for output in outputs)):
        speeds = [row["tokens_per_sec"] for row in rows]
        yield {
            "shape": shape,
            "kind": "apart",
            "processes": processes,
            "batch": rows[0]["micro_batch_size"],
            "tokens_per_sec": processes * min(speeds),
            "of_each": speeds,
        }


def command(dylora, launch, shape, device):
    """The command that measures a shape."""
    arguments, batches, warmup, steps = TINY if device == "cpu" else SHAPES[shape]
    bench = [
        "bench", *arguments, "--rows", "one_pass", "--batch", ",".join(map(str, batches)), "--warmup",
        str(warmup), "--steps", str(steps), "--device", device, "--json",
    ]
    return [dylora.binary, "-q", *launch, *bench]


def medians(rows):
    """The median tokens/s of the rounds and their range, by shape, kind, number of processes and batch."""
    speeds = {}
    for row in rows:
        speeds.setdefault((row["shape"], row["kind"], row["processes"], row["batch"]), []).append(row["tokens_per_sec"])
    return {key: (statistics.median(of), min(of), max(of)) for key, of in speeds.items()}


def efficiency(speeds, shape, kind, processes, batch, of_one):
    """Tokens/s in per cent of those of as many single processes with batch `of_one`."""
    every, one = speeds.get((shape, kind, processes, batch)), speeds.get((shape, "world", 1, of_one))
    return f"{100 * every[0] / (processes * one[0]):.1f} %" if every and one and processes > 1 else ""


def table(rows):
    speeds = medians(rows)
    lines = []
    for (shape, kind, processes, batch), (median, low, high) in speeds.items():
        if kind != "world":
            continue
        lines.append([
            shape,
            str(batch),
            str(processes),
            f"{median:,.0f}" + (f" ({low:,.0f} to {high:,.0f})" if high > low else ""),
            efficiency(speeds, shape, "world", processes, batch, batch),
            efficiency(speeds, shape, "apart", processes, batch, batch),
            efficiency(speeds, shape, "world", processes, batch, batch * processes),
        ])
    head = ["shape", "batch of a process", "processes", "tokens/s", "weak scaling", "apart", "strong scaling"]
    print(markdown(head, lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dylora", metavar="DYLORA|table")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--processes", help="worlds to measure; by default 1, 2, 4 .. up to the number of GPUs")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.dylora != "table":
        dylora = Dylora(args.dylora, args.device)
        if args.device == "cpu":
            dylora.env["OMP_NUM_THREADS"] = "1"
        count = num_gpus() if args.device != "cpu" else 2
        sizes = [2**k for k in range(count.bit_length()) if 2**k <= count]
        if args.processes:
            sizes = [int(size) for size in args.processes.split(",")]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for shape in args.shapes.split(","):
            for _ in range(args.rounds):
                for processes, how in [*((size, measure) for size in sizes), (max(sizes), measure_apart)]:
                    for row in how(dylora, processes, shape, args.device):
                        with open(args.out, "a") as file:
                            file.write(json.dumps(row) + "\n")
                        print(shape, row["kind"], processes, row["batch"], f"{row['tokens_per_sec']:,.0f}", file=sys.stderr)
    table(map(json.loads, args.out.read_text().splitlines()))


if __name__ == "__main__":
    main()
