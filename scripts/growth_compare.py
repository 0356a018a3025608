#!/usr/bin/env python3
"""Compares `dylora add-expert` with what else one would do to teach a model a new domain.

    scripts/growth_compare.py DYLORA [OUT] [--jobs 2] [--device cpu] [--minutes 30] [--seeds 3]
    scripts/growth_compare.py DYLORA OUT --base DIR --data DIR --device cuda [--set KEY=VALUE ..]
    scripts/growth_compare.py table [OUT]

By default, the demo learns arithmetic, code and data2text, and then verse. With --base and --data, a
real base learns math, code and data2text, and then shakespeare, from DIR/NAME.{train,validation}.jsonl
(benchmarks/growth/smollm2.toml). --set changes a key of the config for all methods. For each seed:

    add-expert    a mixture of three experts, then `add-expert` with its default settings
    replay        a single LoRA of the rank of all four experts together, trained on the first three
                  domains, then on all four with the same replay
    sequential    the same without replay
    joint         a mixture of four experts on all four domains at once, with the steps of both stages

Each result is a line of OUT/compare.jsonl (OUT is runs/growth by default). Finished runs are not made
again. `table` prints the means over the seeds as markdown.
"""
import argparse
import statistics
import time
import tomllib

import resumable
from resumable import ROOT, Dylora, Study, markdown

METHODS = {
    "add-expert": "`dylora add-expert`",
    "replay": "a single LoRA trained on, with the same replay",
    "sequential": "a single LoRA trained on, without replay",
    "joint": "all four domains at once, as a mixture",
}
# the rank of an expert; the four have this rank together in a single LoRA
RANK = 8
SINGLE = ["lora.num_experts=1", f"lora.rank={4 * RANK}", f"lora.alpha={8 * RANK}"]


class Demo:
    """Three domains of the demo, and verse."""

    config = ROOT / "benchmarks/growth/demo.toml"
    domains = {"arithmetic": 1.0, "code": 1.0, "data2text": 1.0, "verse": 1.0}
    steps, new_steps = 200, 200
    data, sets = "demo/data", []


class Real:
    """A real base, whose domains have the weights of configs/smollm2-135m.toml."""

    config = ROOT / "benchmarks/growth/smollm2.toml"
    domains = {"math": 6.0, "code": 3.0, "data2text": 2.0, "shakespeare": 7.0}
    steps, new_steps = 600, 200

    def __init__(self, base, data):
        self.data, self.sets = data, [f'base.source={{path="{base}"}}']


def files(study, name, split):
    return f"{study.data}/{name}.{split}.jsonl"


def domains(study, weights):
    """The override that sets the domains and their weights."""
    return resumable.domains(
        resumable.domain(name, files(study, name, "train"), files(study, name, "validation"), weight)
        for name, weight in weights.items()
    )


class Job:
    """One method with one seed."""

    def __init__(self, dylora, study, seed, dir):
        self.dylora, self.study, self.dir = dylora, study, dir
        self.sets = [*study.sets, f"run.seed={seed}"]
        *_, self.new = study.domains

    def train(self, name, weights, steps, sets):
        """Trains a run in the folder `name`, and returns the losses of its domains."""
        where = [f"run.dir={self.dir}/{name}", f"train.duration={{steps={steps}}}"]
        sets = [*self.sets, *where, domains(self.study, weights), *sets]
        self.dylora.json("train", "--config", self.study.config, sets=sets)
        return self.losses(name, weights)

    def losses(self, name, weights):
        """The losses of all domains, also of those that a run was not trained on."""
        data = []
        for domain in weights:
            data += ["--data", f"{domain}={files(self.study, domain, 'validation')}"]
        report = self.dylora.json("eval", "--checkpoint", self.dir / name, *data)
        return {domain["name"]: domain["loss"] for domain in report["domains"]}

    def trained(self, name):
        """The number of parameters that a run trains."""
        sets = [f"run.dir={self.dir}/unused"]
        report = self.dylora.json("train", "--config", self.dir / name / "config.toml", "--dry-run", sets=sets)
        return report["parameters"]["trained"]

    def first(self, sets):
        """The first stage, on all domains but the new one."""
        old = {name: weight for name, weight in self.study.domains.items() if name != self.new}
        return self.train("first", old, self.study.steps, sets)

    def result(self, name, before, after, steps):
        forgetting = [after[domain] - before[domain] for domain in before if domain != self.new]
        return {
            "before": before,
            "after": after,
            "worst_forgetting": max(forgetting, default=None),
            "trained": self.trained(name),
            "steps": steps,
        }


def add_expert(job):
    before = job.first(["lora.num_experts=3", f"lora.rank={RANK}"])
    study = job.study
    job.dylora.json(
        "add-expert", "--checkpoint", job.dir / "first", "--out", job.dir / "last", "--steps", study.new_steps,
        "--data", files(study, job.new, "train"), "--validation", files(study, job.new, "validation"),
    )
    with open(job.dir / "last/config.toml", "rb") as file:
        weights = {of["name"]: of.get("weight", 1.0) for of in tomllib.load(file)["data"]["domains"]}
    after = job.losses("last", study.domains)
    return {**job.result("last", before, after, [study.steps, study.new_steps]), "weights": weights}


def trained_on(job, weights):
    """A single LoRA, trained on with domains of these weights."""
    before = job.first(SINGLE)
    line = [job.dylora.binary, "-q", "export-adapters", "--checkpoint", job.dir / "first"]
    job.dylora.call([*map(str, line), "--out", str(job.dir / "export")])
    sets = [
        f'lora.experts=[{{source={{path="{job.dir}/export/expert_0"}}}}]',
        "lora.num_experts=1",
        "data.mixing=weights",
        "data.on_exhausted=repeat",
    ]
    after = job.train("last", weights, job.study.new_steps, sets)
    return job.result("last", before, after, [job.study.steps, job.study.new_steps])


def joint(job):
    steps = job.study.steps + job.study.new_steps
    sets = ["lora.num_experts=4", f"lora.rank={RANK}"]
    after = job.train("last", job.study.domains, steps, sets)
    return job.result("last", {}, after, [steps])


def show(result):
    after = ", ".join(f"{name} {loss:.3f}" for name, loss in result["after"].items())
    forgetting = result["worst_forgetting"]
    return f"{result['name']:15} {after}" + (f", forgetting {forgetting:+.3f}" if forgetting else "")


def table(results):
    rows = []
    for method, text in METHODS.items():
        of = [result for result in results.values() if result["method"] == method]
        if not of:
            continue
        *old, new = of[0]["after"]
        mean = lambda values: f"{statistics.mean(values):.3f}" + (
            f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        )
        forgetting = [result["worst_forgetting"] for result in of]
        rows.append([
            text,
            str(len(of)),
            mean([result["after"][new] for result in of]),
            mean([statistics.mean(result["after"][name] for name in old) for result in of]),
            "" if None in forgetting else mean(forgetting),
            f"{of[0]['trained']:,}",
            " + ".join(map(str, of[0]["steps"])),
        ])
    new = next(iter(results.values()), {"after": {"the new domain": 0.0}})["after"]
    head = ["", "seeds", f"loss of {list(new)[-1]}", "mean loss of the earlier domains", "worst forgetting"]
    print(markdown([*head, "trained parameters", "steps"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    resumable.add_options(parser, "runs/growth")
    args = parser.parse_args()
    if (args.base is None) != (args.data is None):
        parser.error("--base and --data go together")
    results = Study(f"{args.out}/compare.jsonl")
    if args.dylora == "table":
        return table(results.results())
    dylora = Dylora(args.dylora, args.device)
    study = Real(args.base, args.data) if args.base else Demo()
    study.sets = [*study.sets, *args.set]

    def work(name, job, dir):
        method, seed = job
        of = Job(dylora, study, seed, dir)
        if method == "add-expert":
            result = add_expert(of)
        elif method == "joint":
            result = joint(of)
        else:
            weights = results.results()[f"add-expert-{seed}"]["weights"]
            if method == "sequential":
                weights = {domain: float(domain == of.new) for domain in weights}
            result = trained_on(of, weights)
        return {"method": method, "seed": seed, **result}

    end = time.monotonic() + 60 * args.minutes
    minutes = lambda: (end - time.monotonic()) / 60
    seeds = range(args.seeds)
    # the single LoRA has the same replay as `add-expert`, which therefore comes first
    jobs = {f"add-expert-{seed}": ("add-expert", seed) for seed in seeds}
    results.run(jobs, work, args.jobs, minutes(), show)
    seeds = [seed for seed in seeds if f"add-expert-{seed}" in results.results()]
    others = [method for method in METHODS if method != "add-expert"]
    jobs = {f"{method}-{seed}": (method, seed) for seed in seeds for method in others}
    results.run(jobs, work, args.jobs, minutes(), show)
    print(f"{args.seeds * len(METHODS) - len(results.results())} of {args.seeds * len(METHODS)} runs left")


if __name__ == "__main__":
    main()
