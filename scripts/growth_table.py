#!/usr/bin/env python3
"""The growth table: whether `dylora add-expert` brings a new skill, whatever the mixture was.

    scripts/growth_table.py DYLORA [OUT] [--jobs 2] [--device cpu] [--minutes 30]
    scripts/growth_table.py table [OUT]

Each cell trains three experts on three domains of the demo (benchmarks/growth/demo.toml, 200 steps)
with other routers, and then adds verse with the default settings of `add-expert` (200 steps). The gain
of verse is the base's loss less the final one, as a share of what a single LoRA gains that is trained
on verse alone with the same steps, data, rank and rate.

Each result is a line of OUT/cells.jsonl (OUT is runs/growth by default). Finished cells are not run
again, so that the table can be made in parts. `table` prints it as markdown.
"""
import argparse
import itertools
import random
import sys

from resumable import ROOT, Dylora, Failed, Study, markdown

CONFIG = ROOT / "benchmarks/growth/demo.toml"
NEW = "verse"
SCOPES = ["shared", "layer", "module"]
ROUTERS = [
    *itertools.product(["embeddings", "base_hidden", "layer_input"], SCOPES),
    ("module_input", "module"),
]
RULES = {"dense": [], "top-2": ["router.top_k=2"]}
SUPERVISION = {"supervised": "0.1", "unsupervised": "0.0"}
RATES = ["1e-4", "1e-3", "5e-3", "2e-2"]
# what must hold in each cell
MIN_GAIN = 0.9
MAX_FORGETTING = 0.06


def cells():
    """The settings of each cell, in an order by which any beginning is a sample of all."""
    found = {}
    for (source, scope), rule, supervision, rate in itertools.product(ROUTERS, RULES, SUPERVISION, RATES):
        found[f"{source}-{scope}-{rule}-{supervision}-{rate}"] = [
            f"router.input={source}",
            f"router.scope={scope}",
            *RULES[rule],
            f"router.domain_supervision={SUPERVISION[supervision]}",
            f"optimizer.router.learning_rate={rate}",
        ]
    names = sorted(found)
    random.Random(0).shuffle(names)
    return {name: found[name] for name in names}


def files(split):
    return f"demo/data/{NEW}.{split}.jsonl"


def single(dylora, dir):
    """The losses of the new domain by the base, and by a single LoRA trained on it alone."""
    domain = f'{{name="{NEW}", train=["{files("train")}"], validation={{files=["{files("validation")}"]}}}}'
    sets = [f"run.dir={dir}", f"data.domains=[{domain}]", "lora.num_experts=1"]
    dylora.json("train", "--config", CONFIG, sets=sets)
    loss = lambda *more: dylora.json("eval", "--checkpoint", dir, *more)["loss"]
    return {"base": loss("--routing", "none"), "single": loss()}


def cell(dylora, settings, dir, reference):
    """Trains a mixture, adds the new domain, and compares the result with the single LoRA."""
    dylora.json("train", "--config", CONFIG, sets=[f"run.dir={dir}/three", *settings])
    result = {"settings": settings}
    files_of = ["--data", files("train"), "--validation", files("validation")]
    try:
        added = dylora.json("add-expert", "--checkpoint", dir / "three", *files_of, "--out", dir / "four")
    except Failed as error:
        if error.code != 1:
            raise
        return {**result, "ending": str(error).splitlines()[0]}
    before, after = (stage["losses"] for stage in added["stages"][-2:])
    forgetting = {name: after[name] - before[name] for name in before if name != NEW}
    gain = (reference["base"] - after[NEW]) / (reference["base"] - reference["single"])
    worst = max(forgetting.values())
    return {
        **result,
        "ending": added["ending"],
        "gain": gain,
        "worst_forgetting": worst,
        "holds": gain >= MIN_GAIN and worst <= MAX_FORGETTING,
        "base": reference["base"],
        "single": reference["single"],
        "before": before,
        "after": after,
    }


def show(result):
    if "gain" not in result:
        return f"{result['name']:55} {result['ending']}"
    mark = "" if result["holds"] else "  <-- does not hold"
    return (
        f"{result['name']:55} {NEW} {result['after'][NEW]:.3f}, gain {result['gain']:.3f}, "
        f"forgetting {result['worst_forgetting']:+.3f}{mark}"
    )


def table(results):
    """The cells as markdown: a row for each mixture, a column for each rate of the router."""
    rows = []
    for (source, scope), rule, supervision in itertools.product(ROUTERS, RULES, SUPERVISION):
        row = [f"{source}, {scope}, {rule}, {supervision}"]
        for rate in RATES:
            result = results.get(f"{source}-{scope}-{rule}-{supervision}-{rate}")
            if result is None:
                row.append("")
            elif "gain" not in result:
                row.append("refused")
            else:
                text = f"{result['gain']:.2f}, {result['worst_forgetting']:+.3f}"
                row.append(text if result["holds"] else f"**{text}**")
        if any(row[1:]):
            rows.append(row)
    found = [result for result in results.values() if result["name"] in cells()]
    print(markdown(["router", *(f"rate {rate}" for rate in RATES)], rows))
    grown = [result for result in found if "gain" in result]
    print(f"\n{len(found)} of {len(cells())} cells; {sum(result['holds'] for result in grown)} hold")
    if grown:
        gains = sorted(result["gain"] for result in grown)
        worst = max(result["worst_forgetting"] for result in grown)
        print(f"gain from {gains[0]:.3f} to {gains[-1]:.3f}, median {gains[len(gains) // 2]:.3f}")
        print(f"an earlier domain loses at most {worst:+.3f} nats")
    if "single" in results:
        losses = results["single"]
        print(f"{NEW}: {losses['base']:.3f} by the base, {losses['single']:.3f} by the single LoRA")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dylora", metavar="DYLORA|table")
    parser.add_argument("out", nargs="?", default="runs/growth", metavar="OUT")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=30, help="no cell begins after this time")
    parser.add_argument("--only", default="", help="only cells whose name has this part")
    args = parser.parse_args()
    study = Study(f"{args.out}/cells.jsonl")
    if args.dylora == "table":
        return table(study.results())
    dylora = Dylora(args.dylora, args.device)
    study.run({"single": None}, lambda _, __, dir: single(dylora, dir), 1, 60, lambda result: str(result))
    reference = study.results().get("single")
    if reference is None:
        sys.exit("the single LoRA, with which each cell is compared, could not be trained")
    work = lambda _, settings, dir: cell(dylora, settings, dir, reference)
    todo = {name: settings for name, settings in cells().items() if args.only in name}
    left = study.run(todo, work, args.jobs, args.minutes, show)
    print(f"{left} of {len(todo)} cells left")


if __name__ == "__main__":
    main()
