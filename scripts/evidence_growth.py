#!/usr/bin/env python3
"""Adds three skills one after the other, by `dylora add-expert` and by what else one would do.

    scripts/evidence_growth.py DYLORA OUT --base DIR --data DIR [--jobs 4] [--rates METHOD=RATE,RATE ..]
    scripts/evidence_growth.py table OUT

A base learns math and code, then data2text, then shakespeare, then wiki:

    add-expert    a mixture of two experts, then `add-expert` three times with its default settings
    replay        a single LoRA of the rank of all five experts together, trained on three times with the
                  replay that `add-expert` chose
    sequential    the same without replay
    joint         a mixture of five experts on all domains at once, with the steps of all stages, and with
                  as many blocks of each domain as `add-expert` has had in all stages

Each method has two learning rates on seed 0, and the better one by the mean of the domains' final losses on
the other seeds. Each result is a line of OUT/growth.jsonl. Finished runs are not made again. The seconds of
a stage are those of its command, so they are honest only if --jobs is at most the number of GPUs. `table`
prints the means over the seeds as markdown.
"""
import argparse
import statistics
import time
import tomllib

from evidence_runs import WEIGHTS, Clock, Runs, experts, parse
from resumable import ROOT, Study, add_options, markdown

CONFIG = ROOT / "benchmarks/growth/smollm2.toml"
FIRST = {domain: WEIGHTS[domain] for domain in ["math", "code"]}
ADDED = ["data2text", "shakespeare", "wiki"]
DOMAINS = [*FIRST, *ADDED]
# the rank of an expert; the five have this rank together in a single LoRA
RANK = 8
SINGLE = ["lora.num_experts=1", f"lora.rank={len(DOMAINS) * RANK}", f"lora.alpha={2 * len(DOMAINS) * RANK}"]
METHODS = {
    "add-expert": "`dylora add-expert`, three times",
    "replay": "a single LoRA trained on, with the same replay",
    "sequential": "a single LoRA trained on, without replay",
    "joint": "all five domains at once, as a mixture",
}
RATES = {
    "add-expert": ["1e-3", "2e-3"],
    "replay": ["5e-4", "1e-3"],
    "sequential": ["5e-4", "1e-3"],
    "joint": ["1e-3", "2e-3"],
}


class Growth:
    """The jobs: a method, a rate and a seed."""

    def __init__(self, runs, args, study):
        self.runs, self.study = runs, study
        self.steps, self.new_steps = args.steps, args.new_steps

    def work(self, _name, job, dir):
        method, rate, seed = job
        rate_set = f"optimizer.adapters.learning_rate={rate}"
        if method == "add-expert":
            stages = self.add_experts(dir, seed, rate_set)
        elif method == "joint":
            stages = [self.joint(dir, seed, rate_set)]
        else:
            stages = self.train_on(method, dir, seed, rate_set)
        return {"method": method, "rate": rate, "seed": seed, "stages": stages}

    def train(self, name, dir, seed, weights, steps, sets):
        """Trains a stage in the folder `name`."""
        last, secs = self.runs.train(dir / name, seed, steps, [self.runs.domains(weights), *sets])
        return stage(name, last["domain_losses"], weights, steps, secs)

    def add_experts(self, dir, seed, rate):
        sets = [rate, f"lora.num_experts={len(FIRST)}", f"lora.rank={RANK}"]
        stages = [self.train("first", dir, seed, FIRST, self.steps, sets)]
        for domain in ADDED:
            began = time.monotonic()
            report = self.runs.dylora.json(
                "add-expert", "--checkpoint", dir / stages[-1]["stage"], "--out", dir / domain,
                "--domain", domain, "--steps", self.new_steps,
                "--data", self.runs.file(domain, "train"), "--validation", self.runs.file(domain, "validation"),
            )
            secs = round(time.monotonic() - began, 1)
            weights = weights_of(dir / domain)
            stages.append(stage(domain, report["stages"][-1]["losses"], weights, self.new_steps, secs))
            stages[-1]["largest_cosine"] = max((known["cosine"] for known in report["similar"]), default=None)
        return stages

    def train_on(self, method, dir, seed, rate):
        """A single LoRA that is trained on for each new domain, with replay or on the new domain alone."""
        stages = [self.train("first", dir, seed, FIRST, self.steps, [rate, *SINGLE])]
        for number, domain in enumerate(ADDED, 1):
            before = stages[-1]["stage"]
            adapter = self.runs.export(dir / before, dir / f"export-{before}")
            if method == "replay":
                weights = self.grown()[number]["weights"]
            else:
                weights = {name: float(name == domain) for name in [*stages[-1]["losses"], domain]}
            sets = [rate, *experts([adapter], trainable=True), "data.on_exhausted=repeat"]
            stages.append(self.train(domain, dir, seed, weights, self.new_steps, sets))
        return stages

    def joint(self, dir, seed, rate):
        sets = [rate, f"lora.num_experts={len(DOMAINS)}", f"lora.rank={RANK}"]
        steps = self.steps + len(ADDED) * self.new_steps
        return self.train("joint", dir, seed, all_blocks(self.grown()), steps, sets)

    def grown(self):
        """The stages of `add-expert`. Their replay depends on the base and the data alone."""
        return next(result["stages"] for result in self.study.results().values() if result["method"] == "add-expert")


def stage(name, losses, weights, steps, secs):
    return {"stage": name, "losses": losses, "weights": weights, "steps": steps, "secs": secs}


def weights_of(run):
    """The weights of a run's domains, by its config."""
    with open(run / "config.toml", "rb") as file:
        return {of["name"]: of.get("weight", 1.0) for of in tomllib.load(file)["data"]["domains"]}


def all_blocks(stages):
    """The share of the blocks that each domain has had in all stages together."""
    blocks = dict.fromkeys(DOMAINS, 0.0)
    for of in stages:
        for domain, weight in of["weights"].items():
            blocks[domain] += of["steps"] * weight / sum(of["weights"].values())
    total = sum(blocks.values())
    return {domain: round(number / total, 4) for domain, number in blocks.items()}


def final(result):
    return result["stages"][-1]["losses"]


def forgetting(result):
    """By how much the loss of each domain has risen since it was learned. The last one cannot have."""
    stages = result["stages"]
    if len(stages) == 1:
        return {}
    first = {domain: stages[0]["losses"][domain] for domain in FIRST}
    learned = {**first, **{of["stage"]: of["losses"][of["stage"]] for of in stages[1:-1]}}
    return {domain: final(result)[domain] - loss for domain, loss in learned.items()}


def job_name(method, rate, seed):
    return f"{method}-{rate}-{seed}"


def best_rate(results, rates, method):
    """The rate with the lower mean of the final losses on seed 0, or `None` if not all were tried."""
    tried = [results.get(job_name(method, rate, 0)) for rate in rates[method]]
    return None if None in tried else min(tried, key=lambda result: statistics.mean(final(result).values()))["rate"]


def show(result):
    losses = ", ".join(f"{domain} {loss:.3f}" for domain, loss in final(result).items())
    worst = max(forgetting(result).values(), default=0.0)
    return f"{result['name']:18} {losses}, worst forgetting {worst:+.3f}"


def run(growth, rates, args):
    """Runs what is left, and says how many jobs have no result."""
    clock = Clock(args.minutes)
    study = growth.study
    first = lambda methods: {job_name(*job): job for m in methods for rate in rates[m] for job in [(m, rate, 0)]}
    go = lambda jobs: study.run(jobs, growth.work, args.jobs, clock.left(), show)
    # the replay and the joint training take the weights from `add-expert`, which therefore comes first
    left = go(first(["add-expert", "sequential"]))
    if any(result["method"] == "add-expert" for result in study.results().values()):
        left += go(first(["replay", "joint"]))
    best = {method: best_rate(study.results(), rates, method) for method in METHODS}
    jobs = [(method, best[method], seed) for method in METHODS if best[method] for seed in range(1, args.seeds)]
    left += go({job_name(*job): job for job in jobs})
    return f"{left} runs left, without those of methods whose rate is not known yet"


def added_secs(result, steps):
    """The seconds of the three additions. Joint training begins anew at each of them."""
    stages = result["stages"]
    if len(stages) > 1:
        return sum(of["secs"] for of in stages[1:])
    later = [steps[0] + number * steps[1] for number in range(1, len(ADDED) + 1)]
    return stages[0]["secs"] * sum(later) / later[-1]


def mean(values, digits=3):
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def of_method(results, rates, method):
    """The results of a method at its better rate, and at each rate as long as not both are there."""
    rate = best_rate(results, rates, method)
    return [result for result in results.values() if result["method"] == method and rate in [None, result["rate"]]]


def table(results, rates):
    grown = next((result["stages"] for result in results.values() if result["method"] == "add-expert"), None)
    if grown is None:
        return
    steps = [of["steps"] for of in grown[:2]]
    rows, stages = [], []
    for method, text in METHODS.items():
        of = of_method(results, rates, method)
        if not of:
            continue
        lost = [forgetting(result) for result in of]
        rows.append([
            text, of[0]["rate"], str(len(of)),
            *[f"{statistics.mean(final(result)[domain] for result in of):.3f}" for domain in DOMAINS],
            mean([statistics.mean(final(result).values()) for result in of]),
            mean([max(by.values()) for by in lost]) if lost[0] else "",
            f"{statistics.mean(added_secs(result, steps) for result in of):.0f}",
        ])
        for number, stage in enumerate(of[0]["stages"]):
            losses = [result["stages"][number]["losses"] for result in of]
            by_domain = [f"{statistics.mean(one[domain] for one in losses):.3f}" if domain in losses[0] else "" for domain in DOMAINS]
            secs = statistics.mean(result["stages"][number]["secs"] for result in of)
            stages.append([f"{method}, {stage['stage']}", *by_domain, str(stage["steps"]), f"{secs:.0f}"])
    print(markdown(["", "rate", "seeds", *DOMAINS, "mean", "worst forgetting", "seconds of the additions"], rows))
    print()
    print(markdown(["loss after each stage", *DOMAINS, "steps", "seconds"], stages))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, device="cuda", jobs=4)
    parser.add_argument("--steps", type=int, default=600, help="steps of the first stage")
    parser.add_argument("--new-steps", type=int, default=200, help="steps of each addition")
    parser.add_argument("--rates", action="append", default=[], metavar="METHOD=RATE,RATE")
    args, dylora = parse(parser)
    given = dict(item.split("=", 1) for item in args.rates)
    if unknown := given.keys() - METHODS.keys():
        parser.error(f"there is no method {', '.join(sorted(unknown))}")
    rates = {**RATES, **{method: text.split(",") for method, text in given.items()}}
    study = Study(f"{args.out}/growth.jsonl")
    if dylora is None:
        return table(study.results(), rates)
    print(run(Growth(Runs(dylora, CONFIG, args), args, study), rates, args))


if __name__ == "__main__":
    main()
