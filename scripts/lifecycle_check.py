#!/usr/bin/env python3
"""Checks the results of scripts/lifecycle: what is learned, what is kept, and the effect of replay.

    scripts/lifecycle_check.py FOLDER
"""
import json
import pathlib
import sys

# in nats
MAX_FORGETTING = 0.06
run = pathlib.Path(sys.argv[1])
faults = []


def check(fact, holds):
    print(("ok   " if holds else "FAIL ") + fact)
    if not holds:
        faults.append(fact)


def read(name):
    return json.load(open(run / f"{name}.json"))


for name, domain, expert in [("three", "data2text", 2), ("four", "verse", 3)]:
    added = read(name)
    before, after = (stage["losses"] for stage in added["stages"][-2:])
    check(f"expert_{expert} is added for {domain}", added["expert"] == expert)
    share = added["largest_new_prob"]
    check(f"at first, it has {share:.1e} <= 1e-6 of an earlier domain's token", share <= 1e-6)
    check(f"{domain}: {before[domain]:.3f} -> {after[domain]:.3f}", after[domain] < before[domain] - 1)
kept, lost = (read(name)["forgetting"] for name in ["eval", "eval-without"])
old = ["arithmetic", "code", "data2text"]
worst = {name: max(of[domain] for domain in old) for name, of in [("with", kept), ("without", lost)]}
check(
    f"with replay, no domain is forgotten by more than {worst['with']:.3f} <= {MAX_FORGETTING} nats",
    worst["with"] <= MAX_FORGETTING,
)
check(
    f"without replay, the worst is forgotten by {worst['without']:.3f} nats: more",
    worst["without"] > 2 * worst["with"],
)
known = (run / "known.txt").read_text()
check("training text of arithmetic under another name is a known skill", "is like `arithmetic`" in known)
check("and names the expert that covers it", "which expert_" in known)
forced = (run / "forced.txt").read_text()
check("with --force, the router cannot tell it from arithmetic", "cannot tell `sums`" in forced)
check("and no checkpoint is left", not (run / "forced/checkpoints").exists())
check("which eval says", "holds no checkpoint" in (run / "no-checkpoint.txt").read_text())
for name, count in [("merged", 3), ("removed", 3)]:
    report = read(name)
    gap = report["after"]["loss"] - report["before"]["loss"]
    weights = report["after"]["routing"]["mean_routing_weights"]
    check(f"{report['change']}: {count} experts, mean loss {gap:+.3f}", len(weights) == count)
removed = {d["name"]: d["loss"] for d in read("removed")["after"]["domains"]}
before = {d["name"]: d["loss"] for d in read("removed")["before"]["domains"]}
check("without verse's expert, verse is worse", removed["verse"] > before["verse"] + 0.5)
check("and arithmetic as it was", abs(removed["arithmetic"] - before["arithmetic"]) < 0.05)
sys.exit(f"{len(faults)} of the facts do not hold" if faults else 0)
