#!/usr/bin/env python3
"""Prints the losses of a base, a single LoRA and a mixture side by side.

    scripts/quickstart_table.py BASE.json SINGLE.json MIXTURE.json    (all from `dylora eval --json`)

The exit code is 1 unless the mixture is better than the base on every domain and better than the
single LoRA in the mean of the domains, and its experts tell the domains apart: each domain gives its
own expert at least 0.6 of the routing weight.
"""
import json
import sys

base, single, mixture = (json.load(open(path)) for path in sys.argv[1:])
losses = [{d["name"]: d["loss"] for d in report["domains"]} for report in (base, single, mixture)]
header = f"{'domain':<12}{'base':>8}{'single LoRA':>13}{'mixture':>9}"
print(f"\n{header}   mean routing weight of each expert")
faults, owners = [], []
for domain in mixture["domains"]:
    name = domain["name"]
    weights = domain["routing"]["mean_routing_weights"]
    largest = max(weights)
    owners.append(weights.index(largest))
    numbers = [of[name] for of in losses]
    shown = "  ".join(f"{weight:.2f}" for weight in weights)
    print(f"{name:<12}{numbers[0]:>8.3f}{numbers[1]:>13.3f}{numbers[2]:>9.3f}   {shown}")
    if numbers[2] >= numbers[0]:
        faults.append(f"the mixture is not better than its base on {name}")
    if largest < 0.6:
        faults.append(f"no expert has 0.6 of the weight on {name}")
means = [report["loss"] for report in (base, single, mixture)]
print(f"{'mean':<12}{means[0]:>8.3f}{means[1]:>13.3f}{means[2]:>9.3f}")
information = mixture["routing"]["mutual_information"]
print(f"expert and domain share {information:.2f} nats (mutual information)")
if len(set(owners)) < len(owners):
    faults.append("two domains have the same expert")
if means[2] >= means[1]:
    faults.append("the mixture is not better than a single LoRA of equal size")
if faults:
    sys.exit("; ".join(faults))
print(f"the mixture is {means[1] - means[2]:.3f} nats below a single LoRA of equal size")
