#!/usr/bin/env python3
"""Checks that TensorBoard shows exactly what a run wrote to metrics.jsonl.

    python scripts/check_tensorboard.py RUN_DIR

Reads RUN_DIR/tensorboard with TensorBoard's own EventAccumulator and compares every scalar with
RUN_DIR/metrics.jsonl: the tags, the steps and the values in float32 must be the same. A `null` in
the metrics stands for NaN or an infinity. If a run resumed, the steps that it made again must not
appear twice. Needs the Python package `tensorboard` (checked with 2.21.0).
"""

import json
import math
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator


def scalars_of(line):
    """The tags and values in TensorBoard of a line of metrics.jsonl (src/train/scalars.rs)."""
    kind = line["kind"]
    if kind == "window":
        yield from window_scalars(line)
        return
    router = {"train": "router", "validation": "validation/router"}[kind]
    yield f"{kind}/loss", line["loss"]
    for domain, loss in line["domain_losses"].items():
        yield f"{kind}/loss/{domain}", loss
    if kind == "train":
        yield "train/grad_norm", line["grad_norm"]
        yield "train/tokens_per_sec", line["tokens_per_sec"]
        yield "train/peak_memory_gib", line["peak_memory_bytes"] / 2**30
        for group, learning_rate in line["learning_rates"].items():
            yield f"train/learning_rate/{group}", learning_rate
    else:
        yield "validation/token_loss", line["token_loss"]
    if "orthogonality" in line:
        yield "train/orthogonality", line["orthogonality"]
    names = {
        "load_balancing_loss": "load_balancing_loss",
        "uniform_mse": "uniform_mse",
        "router_z_loss": "z_loss",
        "routing_entropy": "entropy",
        "temperature": "temperature",
        "mature_experts": "mature_experts",
        "mutual_information": "mutual_information",
        "domain_supervision": "domain_supervision",
    }
    for key, name in names.items():
        if key in line:
            yield f"{router}/{name}", line[key]
    for expert, load in enumerate(line.get("expert_load", [])):
        yield f"{router}/load/expert_{expert}", load
    yield from accuracies(router, line.get("domain_accuracy", {}))
    for domain, accuracy in line.get("accuracy_by_domain", {}).items():
        yield f"{router}/domain_accuracy/{domain}", accuracy


def accuracies(prefix, by_router):
    """The accuracy of each router, and their mean, added up in the same order as there."""
    total = 0.0
    for router, accuracy in by_router.items():
        name = "all layers" if router == "router" else router.removesuffix(".router")
        yield f"{prefix}/{in_tags(name)}/domain_accuracy", accuracy
        total += accuracy
    if by_router:
        yield f"{prefix}/domain_accuracy", total / len(by_router)


def window_scalars(line):
    for domain, share in line["mix"].items():
        yield f"data/mix/{domain}", share["realised"]
    routing = line.get("routing")
    if routing is None:
        return
    yield "router/window/dead_share", routing["dead_share"]
    yield "router/window/mutual_information", routing["mutual_information"]
    for domain, weights in line.get("domain_routing_weights", {}).items():
        for expert, weight in enumerate(weights):
            yield f"router_by_domain/all/{domain}/expert_{expert}", weight
    for site in routing["sites"]:
        name = in_tags(site["site"])
        yield f"router/{name}/largest_share", max(site["mean_routing_weights"])
        yield f"router/{name}/entropy", site["routing_entropy"]
        yield f"router/{name}/dead_share", len(site["dead_experts"]) / len(site["experts"])
        yield f"router/{name}/mutual_information", site["mutual_information"]
        for at, expert in enumerate(site["experts"]):
            yield f"router/{name}/expert_{expert}/mean_weight", site["mean_routing_weights"][at]
            yield f"router/{name}/expert_{expert}/load", site["expert_load"][at]
        by_domain = line.get("site_routing_weights", {}).get(site["site"], {})
        for domain, weights in by_domain.items():
            for expert, weight in zip(site["experts"], weights):
                yield f"router_by_domain/{name}/{domain}/expert_{expert}", weight


def in_tags(site):
    """A site's name in tags, where the number of the layer has two digits."""
    parts = [part.zfill(2) if part.isdigit() else part for part in site.split(".")]
    return ".".join(parts).replace(" ", "_")


def read_metrics(path):
    """{tag: [(step, value)]} in the order of the file."""
    series = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        for tag, value in scalars_of(line):
            series.setdefault(tag, []).append((line["step"], value))
    return series


def read_tensorboard(path):
    """{tag: [(step, value)]} as TensorBoard reads it, without its sampling."""
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()[SCALARS]
    }


def as_float32(value):
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def agree(expected, shown):
    if expected is None:
        return not math.isfinite(shown)
    return as_float32(expected) == shown


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: check_tensorboard.py RUN_DIR")
    run_dir = Path(sys.argv[1])
    expected = read_metrics(run_dir / "metrics.jsonl")
    shown = read_tensorboard(run_dir / "tensorboard")

    faults = [f"`{tag}` is not in TensorBoard" for tag in expected if tag not in shown]
    faults += [f"`{tag}` is not in the metrics" for tag in shown if tag not in expected]
    num_values = 0
    for tag in expected.keys() & shown.keys():
        steps, shown_steps = ([step for step, _ in s[tag]] for s in (expected, shown))
        if steps != shown_steps:
            faults.append(f"`{tag}` has steps {steps}, TensorBoard has {shown_steps}")
            continue
        for (step, value), (_, shown_value) in zip(expected[tag], shown[tag]):
            num_values += 1
            if not agree(value, shown_value):
                faults.append(f"`{tag}` is {value} at step {step}, TensorBoard has {shown_value}")
    if not num_values:
        faults.append("there is nothing to compare")
    if faults:
        sys.exit("\n".join(["TensorBoard differs from the metrics:", *sorted(faults)]))
    print(f"TensorBoard agrees with the metrics: {len(expected)} tags, {num_values} values")


if __name__ == "__main__":
    main()
