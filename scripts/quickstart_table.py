#!/usr/bin/env python3
"""Prints the losses of a base and a mixture side by side.

    scripts/quickstart_table.py BASE.json MIXTURE.json    (both from `dylora eval --json`)

The exit code is 1 unless the mixture is better on every domain.
"""
import json
import sys

base, mixture = (json.load(open(path)) for path in sys.argv[1:])
base_losses = {domain["name"]: domain["loss"] for domain in base["domains"]}
experts = len(mixture["routing"]["mean_routing_weights"])
print(f"\n{'domain':<12}{'base loss':>11}{'mixture':>10}{'change':>9}   mean routing weight of each expert")
worse = []
for domain in mixture["domains"]:
    name, loss = domain["name"], domain["loss"]
    weights = "  ".join(f"{w:.2f}" for w in domain["routing"]["mean_routing_weights"])
    print(f"{name:<12}{base_losses[name]:>11.3f}{loss:>10.3f}{loss - base_losses[name]:>+9.3f}   {weights}")
    if loss >= base_losses[name]:
        worse.append(name)
if worse:
    sys.exit(f"the mixture is not better than its base on {', '.join(worse)}")
print(f"the mixture of {experts} experts is better than its base on all {len(base_losses)} domains")
