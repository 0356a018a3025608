#!/usr/bin/env python3
"""The router study: routing rules with and without balancing, and single LoRAs of equal size.

    scripts/router_study.py DYLORA explore|grid|scale|speed [--jobs 6] [--minutes 9]
    scripts/router_study.py - table explore|grid|scale|speed

Needs the same files as scripts/real_input.sh, and first trains the base if it does not exist. Runs
that are finished are not made again, so that a study can be made in parts. The results are written
to runs/router-study/PART.jsonl.
"""
import argparse
import json
import pathlib
import queue
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).parent.parent
BASE = HERE / "benchmarks/real-input/base.toml"
CONFIG = HERE / "benchmarks/router-study/router.toml"
OUT = pathlib.Path("runs/router-study")
DOMAINS = ["math", "code_alpaca", "data2text", "shakespeare"]

RULES = {
    "dense": [],
    "top-1": ["router.top_k=1"],
    "top-1-raw": ["router.top_k=1", "router.renormalize=false"],
    "top-2": ["router.top_k=2"],
    "hybrid": ["router.top_k=2", "router.hybrid.tokens=500000"],
}
BALANCES = {
    "none": [],
    "loss": ["router.load_balancing_coef=0.01"],
    "bias": ["router.balance_bias_rate=0.001"],
}


def single(rank):
    return ["lora.num_experts=1", f"lora.rank={rank}", f"lora.alpha={2 * rank}"]


def explore():
    """Runs to choose the learning rates and the router's input: two epochs, one seed."""
    runs = {}
    short = ["train.duration={ epochs = 2 }"]
    for rate in ["2e-3", "3e-3", "6e-3"]:
        adapters = [f"optimizer.adapters.learning_rate={rate}"]
        runs[f"single-r32-{rate}"] = short + single(32) + adapters
        runs[f"dense-embeddings-{rate}"] = short + adapters
    inputs = {
        "embeddings": [],
        "base_hidden": ["router.input=base_hidden"],
        "layer": ["router.input=layer_input", "router.scope=layer"],
        "module": ["router.input=layer_input", "router.scope=module"],
        "sequence": ["router.level=sequence", "router.input=base_hidden"],
        "mlp": ["router.input=base_hidden", "router.hidden_layers=1"],
    }
    for name, setting in inputs.items():
        for rule in ["dense", "top-2"]:
            runs[f"{rule}-{name}-3e-3"] = short + RULES[rule] + setting
    for rate in ["1e-3", "1e-2"]:
        router = [f"optimizer.router.learning_rate={rate}"]
        runs[f"top-2-base_hidden-router-{rate}"] = (
            short + RULES["top-2"] + inputs["base_hidden"] + router
        )
    return runs


def grid(extra):
    """The runs of the study itself, with three seeds."""
    runs = {}
    for seed in range(3):
        seeded = extra + [f"run.seed={seed}"]
        for experts in [4, 8]:
            for rule, setting in RULES.items():
                for balance in BALANCES:
                    if balance == "bias" and (experts == 4 or rule not in ["top-1-raw", "top-2"]):
                        continue
                    name = f"E{experts}-{rule}-{balance}-{seed}"
                    runs[name] = (
                        [f"lora.num_experts={experts}"] + setting + BALANCES[balance] + seeded
                    )
            rank = 8 * experts
            for rate in ["3e-3", "4e-3"] if experts == 4 else ["2e-3", "3e-3"]:
                runs[f"single-r{rank}-{rate}-{seed}"] = (
                    seeded + single(rank) + [f"optimizer.adapters.learning_rate={rate}"]
                )
    return runs


def scale(extra):
    """Runs of mixtures whose update is as large as the single LoRA's, with three seeds.

    Their alpha is E times as large, or E / k times with top-k.
    """
    layer = ["router.input=layer_input", "router.scope=layer"]
    runs = {}
    for seed in range(3):
        for experts, rates in [(4, ["2e-3", "3e-3", "4e-3"]), (8, ["2e-3", "3e-3"])]:
            dense = [f"lora.num_experts={experts}", f"lora.alpha={16 * experts}"]
            kinds = {f"single-r{8 * experts}": single(8 * experts), f"E{experts}-dense-layer": dense + layer}
            if experts == 4:
                top_2 = ["lora.alpha=32", *layer, "router.top_k=2", *BALANCES["loss"]]
                kinds["E4-uniform"] = dense + ["train.routing=uniform"]
                kinds["E4-dense-embeddings"] = dense
                kinds["E4-dense-module"] = dense + ["router.input=layer_input", "router.scope=module"]
                kinds["E4-top-2-layer"] = top_2
            for name, setting in kinds.items():
                for rate in rates if "single" in name or "dense-layer" in name else ["3e-3"]:
                    rated = [f"optimizer.adapters.learning_rate={rate}", f"run.seed={seed}"]
                    runs[f"{name}-{rate}-{seed}"] = extra + setting + rated
    return runs


def speed(extra):
    """Short runs that measure speed, one after the other."""
    runs = {}
    short = extra + ["train.duration={ steps = 60 }", "train.eval_every_steps=1000"]
    for experts in [4, 8]:
        runs[f"single-r{8 * experts}"] = single(8 * experts) + short
        for rule, setting in RULES.items():
            for balance in ["none", "loss"]:
                runs[f"E{experts}-{rule}-{balance}"] = (
                    [f"lora.num_experts={experts}"] + setting + BALANCES[balance] + short
                )
    return runs


def train(dylora, name, settings, device):
    out = OUT / name
    command = [dylora, "-q", "train", "--config", CONFIG, "--device", device]
    for setting in settings + [f"run.dir={out}"]:
        command += ["--set", setting]
    subprocess.run(["rm", "-rf", out], check=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {"name": name, "error": done.stderr[-500:]}
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    steps = [line for line in lines if line["kind"] == "train"]
    speeds = [line["tokens_per_sec"] for line in steps[10:]]
    result = {"name": name, "settings": settings, "tokens_per_sec": statistics.median(speeds)}
    command = [dylora, "-q", "eval", "--checkpoint", out, "--json", "--batch-size", "64"]
    done = subprocess.run(command + ["--device", device], capture_output=True, text=True)
    if done.returncode != 0:
        return {"name": name, "error": done.stderr[-500:]}
    report = json.loads(done.stdout)
    result["loss"] = report["loss"]
    result["domains"] = {domain["name"]: domain["loss"] for domain in report["domains"]}
    if report["routing"]:
        for key in ["mean_routing_weights", "routing_entropy", "mutual_information", "dead_share"]:
            result[key] = report["routing"][key]
        result["domain_weights"] = {
            domain["name"]: domain["routing"]["mean_routing_weights"]
            for domain in report["domains"]
        }
    subprocess.run(["rm", "-rf", out], check=True)
    return result


def results(part):
    file = OUT / f"{part}.jsonl"
    return [json.loads(line) for line in open(file)] if file.exists() else []


def table(part):
    groups = {}
    for run in results(part):
        if "error" in run:
            print(run["name"], run["error"], file=sys.stderr)
            continue
        name = run["name"].rsplit("-", 1)[0] if part in ["grid", "scale"] else run["name"]
        groups.setdefault(name, []).append(run)
    head = ["run", "n", "mean loss", "±"] + DOMAINS
    print("| " + " | ".join(head + ["largest weight", "dead", "information", "tokens/s"]) + " |")
    print("|---|" + "--:|" * (len(head) + 3))
    for name, runs in groups.items():
        mean = lambda of: statistics.mean(of(run) for run in runs)
        losses = [run["loss"] for run in runs]
        spread = f"{statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        row = [name, str(len(runs)), f"{statistics.mean(losses):.3f}", spread]
        row += [f"{mean(lambda run: run['domains'][domain]):.3f}" for domain in DOMAINS]
        if "mutual_information" in runs[0]:
            row.append(f"{mean(lambda run: max(run['mean_routing_weights'])):.2f}")
            row.append(f"{100 * mean(lambda run: run['dead_share']):.0f} %")
            row.append(f"{mean(lambda run: run['mutual_information']):.3f}")
        else:
            row += ["", "", ""]
        row.append(f"{mean(lambda run: run['tokens_per_sec']):,.0f}")
        print("| " + " | ".join(row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dylora", metavar="DYLORA")
    parser.add_argument("part", choices=["explore", "grid", "scale", "speed", "table"])
    parser.add_argument("of", nargs="?")
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    if args.part == "table":
        return table(args.of)
    base = pathlib.Path("runs/real-input/base/model/config.json")
    if not base.exists():
        command = [args.dylora, "-q", "train", "--config", BASE, "--device", args.device.split(",")[0]]
        subprocess.run(command, check=True)
    parts = {"grid": grid, "scale": scale, "speed": speed}
    runs = explore() if args.part == "explore" else parts[args.part](args.set)
    OUT.mkdir(parents=True, exist_ok=True)
    done = {run["name"] for run in results(args.part) if "error" not in run}
    todo = {name: settings for name, settings in runs.items() if name not in done}
    # in the order of the seeds, and for each seed the single LoRAs first
    todo = dict(sorted(todo.items(), key=lambda run: (run[0][-1], not run[0].startswith("single"))))
    end = time.monotonic() + 60 * args.minutes
    jobs = 1 if args.part == "speed" else args.jobs

    devices = queue.SimpleQueue()
    for job in range(jobs):
        devices.put(args.device.split(",")[job % len(args.device.split(","))])

    def work(item):
        if time.monotonic() > end:
            return
        device = devices.get()
        result = train(args.dylora, *item, device)
        devices.put(device)
        with open(OUT / f"{args.part}.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, todo.items()))
    left = len(todo) - (len({run["name"] for run in results(args.part)}) - len(done))
    print(f"{args.part}: {len(runs)} runs, {max(left, 0)} left")
    table(args.part)


if __name__ == "__main__":
    main()
