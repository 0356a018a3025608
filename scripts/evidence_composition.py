#!/usr/bin/env python3
"""Puts together adapters that were trained apart, and measures what a router over them needs.

    scripts/evidence_composition.py DYLORA OUT --base DIR --data DIR [--adapters DIR] [--jobs 4]
    scripts/evidence_composition.py table OUT      (or benchmarks/evidence/composition)

One LoRA of rank 8 is trained for each of math, code, data2text and shakespeare, on its domain alone, for
the domain's share of the recipe's steps. The learning rate of each is the better one on seed 0. The
adapters then stay frozen. Their mixture is measured with fixed weights, and with routers that are trained
on 10, 100 or 1,000 records of each domain, with and without domain supervision, for as many steps each. These
records are among those that the adapters were trained on. The learning rate of a router is the better one
on seed 0, for each number of records. All losses are those of all validation records.

Each mixture is a line of OUT/composition.jsonl, and finished ones are not made again. The adapters and
their results lie in the folder of --adapters. If it is lost, the adapters are trained again. The rows of the
study of 2026-11-26 are in benchmarks/evidence/composition: composition.jsonl, and a copy of adapters.jsonl
without the adapters themselves. `table` prints the means over the seeds as markdown.
"""
import argparse
import pathlib
import random
import statistics

from evidence_runs import WEIGHTS, Clock, Runs, experts, parse
from resumable import ROOT, Study, add_options, markdown

CONFIG = ROOT / "benchmarks/recipe/equal-documents.toml"
DOMAINS = list(WEIGHTS)
ADAPTER_RATES = ["1e-3", "2e-3"]
ROUTER_RATES = ["1e-3", "5e-3"]
WARMUP_STEPS = 50
# uniform weights, concatenation, and each adapter alone
FIXED = ["uniform", "all", *[f"expert:{number}" for number in range(len(DOMAINS))]]


class Composition:
    """The jobs, which share the folder of the adapters."""

    def __init__(self, runs, args):
        self.runs, self.steps, self.router_steps = runs, args.steps, args.router_steps
        self.dir = pathlib.Path(args.adapters).resolve()
        self.adapters = Study(self.dir / "adapters.jsonl")

    def train_adapter(self, name, job, dir):
        """Trains one adapter and keeps its export in the folder of the adapters."""
        domain, rate, seed = job
        share = WEIGHTS[domain] / sum(WEIGHTS.values())
        steps = max(1, round(share * self.steps))
        last, _ = self.runs.train(dir / "run", seed, steps, [
            self.runs.domains({domain: 1.0}),
            "lora.num_experts=1",
            f"schedule.warmup_steps={max(1, round(share * WARMUP_STEPS))}",
            f"optimizer.adapters.learning_rate={rate}",
        ])
        out = self.dir / name
        if not (out / "expert_0/adapter_model.safetensors").exists():
            self.runs.export(dir / "run", out)
        return {"domain": domain, "rate": rate, "seed": seed, "steps": steps, "loss": last["domain_losses"][domain]}

    def best_adapter(self, domain, seed):
        """The result of the adapter with the rate that is better on seed 0, or `None`."""
        results = self.adapters.results()
        tried = [results.get(adapter_name(domain, rate, 0)) for rate in ADAPTER_RATES]
        if None in tried:
            return None
        rate = min(tried, key=lambda result: result["loss"])["rate"]
        return results.get(adapter_name(domain, rate, seed))

    def best_adapters(self, seed):
        """The best adapter of each domain, or `None` if one is not there."""
        best = [self.best_adapter(domain, seed) for domain in DOMAINS]
        return None if None in best else best

    def train_router(self, dir, seed, num_records, steps, sets):
        """Trains a router over the frozen adapters, and returns its last validation."""
        train = {domain: self.cut(domain, num_records, seed, dir) for domain in DOMAINS}
        adapters = [self.dir / best["name"] / "expert_0" for best in self.best_adapters(seed)]
        last, _ = self.runs.train(dir / "run", seed, steps, [
            self.runs.domains(WEIGHTS, train),
            *experts(adapters, trainable=False),
            f"schedule.warmup_steps={max(1, steps // 10)}",
            *sets,
        ])
        return last

    def cut(self, domain, num_records, seed, dir):
        """Writes so many training records of a domain. The fewer are among the more of the same seed."""
        with open(self.runs.file(domain, "train")) as file:
            lines = sorted(line.rstrip("\n") + "\n" for line in file)
        random.Random(f"{domain} {seed}").shuffle(lines)
        path = dir / f"{domain}.jsonl"
        path.write_text("".join(lines[:num_records]))
        return path

    def measure_fixed(self, _name, seed, dir):
        """The losses with fixed weights. The router that a mixture must have is not used."""
        self.train_router(dir, seed, 10, 1, ["router.domain_supervision=0"])
        losses = {}
        for routing in FIXED:
            report = self.runs.dylora.json("eval", "--checkpoint", dir / "run", "--routing", routing)
            losses[routing] = {domain["name"]: domain["loss"] for domain in report["domains"]}
        adapters = {best["domain"]: {"rate": best["rate"], "loss": best["loss"]} for best in self.best_adapters(seed)}
        return {"seed": seed, "fixed": losses, "adapters": adapters}

    def measure_router(self, _name, job, dir):
        num_records, supervised, rate, seed = job
        last = self.train_router(dir, seed, num_records, self.router_steps, [
            f"router.domain_supervision={0.1 if supervised else 0.0}",
            f"optimizer.router.learning_rate={rate}",
        ])
        weights = last["domain_routing_weights"]
        return {
            "records": num_records, "supervised": supervised, "rate": rate, "seed": seed, "steps": self.router_steps,
            "losses": last["domain_losses"], "routing_weights": weights,
            "own_weight": {domain: weights[domain][expert] for expert, domain in enumerate(DOMAINS)},
        }


def adapter_name(domain, rate, seed):
    return f"{domain}-{rate}-{seed}"


def router_name(num_records, supervised, rate, seed):
    return f"{'supervised' if supervised else 'unsupervised'}-{num_records}-{rate}-{seed}"


def mean(losses):
    return statistics.mean(losses.values())


def best_rate(results, num_records, supervised):
    """The rate of a router that is better on seed 0, or `None` if not all were tried."""
    tried = [results.get(router_name(num_records, supervised, rate, 0)) for rate in ROUTER_RATES]
    return None if None in tried else min(tried, key=lambda result: mean(result["losses"]))["rate"]


def routers(results, args, seeds):
    """The jobs of routers: all rates on seed 0, and the better one on the other seeds."""
    jobs = {}
    for num_records in args.records:
        for supervised in [True, False]:
            best = best_rate(results, num_records, supervised)
            for seed in seeds:
                rates = ROUTER_RATES if seed == 0 else [best] if best else []
                for rate in rates:
                    job = (num_records, supervised, rate, seed)
                    jobs[router_name(*job)] = job
    return jobs


def show(result):
    if "fixed" in result:
        losses = [f"{routing} {mean(of):.4f}" for routing, of in result["fixed"].items()]
        return f"{result['name']:28} {', '.join(losses)}"
    own = mean(result["own_weight"])
    return f"{result['name']:28} {mean(result['losses']):.4f}, own weight {own:.3f}"


def show_adapter(result):
    return f"{result['name']:28} {result['loss']:.4f}"


def run(composition, args):
    """Runs what is left, and says how many jobs have no result."""
    clock = Clock(args.minutes)
    seeds = range(args.seeds)
    adapters = {adapter_name(domain, rate, 0): (domain, rate, 0) for domain in DOMAINS for rate in ADAPTER_RATES}
    composition.adapters.run(adapters, composition.train_adapter, args.jobs, clock.left(), show_adapter)
    zero = composition.best_adapters(0)
    if zero is None:
        return "not all adapters of seed 0 are there"
    jobs = [(best["domain"], best["rate"], seed) for best in zero for seed in seeds]
    adapters = {adapter_name(*job): job for job in jobs}
    composition.adapters.run(adapters, composition.train_adapter, args.jobs, clock.left(), show_adapter)
    seeds = [seed for seed in seeds if composition.best_adapters(seed)]

    study = Study(f"{args.out}/composition.jsonl")
    left = 0
    fixed = {f"fixed-{seed}": seed for seed in seeds}
    study.run(routers(study.results(), args, [0]), composition.measure_router, args.jobs, clock.left(), show)
    left += study.run(fixed, composition.measure_fixed, args.jobs, clock.left(), show)
    left += study.run(routers(study.results(), args, seeds), composition.measure_router, args.jobs, clock.left(), show)
    return f"{left} mixtures left"


def fixed_rows(results):
    """What is compared with the routers: a name, and the losses by domain for each seed."""
    fixed = [result["fixed"] for result in results.values() if "fixed" in result]
    if not fixed:
        return
    number = min(range(len(DOMAINS)), key=lambda n: statistics.mean(mean(of[f"expert:{n}"]) for of in fixed))
    yield "uniform weights", [of["uniform"] for of in fixed]
    yield "concatenation, each at weight 1", [of["all"] for of in fixed]
    yield f"the best single adapter ({DOMAINS[number]})", [of[f"expert:{number}"] for of in fixed]
    oracle = lambda of: {domain: of[f"expert:{n}"][domain] for n, domain in enumerate(DOMAINS)}
    yield "oracle: the domain's own adapter", [oracle(of) for of in fixed]


def row(name, losses, rest):
    """A row of the table, from the losses by domain for each seed."""
    means = [mean(of) for of in losses]
    spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
    by_domain = [f"{statistics.mean(of[domain] for of in losses):.3f}" for domain in DOMAINS]
    return [name, str(len(losses)), *by_domain, f"{statistics.mean(means):.4f}{spread}", *rest]


def table(results):
    rows = [row(name, losses, ["", ""]) for name, losses in fixed_rows(results)]
    kinds = sorted({(result["records"], result["supervised"]) for result in results.values() if "records" in result})
    for num_records, supervised in kinds:
        rate = best_rate(results, num_records, supervised)
        of = [result for result in results.values() if "records" in result
              and (result["records"], result["supervised"], result["rate"]) == (num_records, supervised, rate)]
        if of:
            text = f"router from {num_records:,} records a domain, {'supervised' if supervised else 'unsupervised'}"
            own = statistics.mean(mean(result["own_weight"]) for result in of)
            rows.append(row(text, [result["losses"] for result in of], [f"{own:.2f}", rate]))
    print(markdown(["", "seeds", *DOMAINS, "mean", "weight on the domain's own adapter", "router's rate"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, device="cuda", jobs=4)
    parser.add_argument("--adapters", default="runs/evidence-adapters", help="the folder of the adapters")
    parser.add_argument("--steps", type=int, default=600, help="steps of all four adapters together")
    parser.add_argument("--router-steps", type=int, default=100)
    parser.add_argument("--records", default="10,100,1000", help="numbers of records of each domain")
    args, dylora = parse(parser)
    args.records = [int(number) for number in args.records.split(",")]
    if dylora is None:
        return table(Study(f"{args.out}/composition.jsonl").results())
    print(run(Composition(Runs(dylora, CONFIG, args), args), args))


if __name__ == "__main__":
    main()
