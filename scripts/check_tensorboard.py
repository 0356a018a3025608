#!/usr/bin/env python3
"""Checks that TensorBoard shows exactly what a run wrote to metrics.jsonl.

    python scripts/check_tensorboard.py RUN_DIR

Reads RUN_DIR/tensorboard with TensorBoard's own EventAccumulator and compares every scalar with
RUN_DIR/metrics.jsonl: the tags, the steps and the values in float32 must be the same. A `null` in
the metrics stands for NaN or an infinity. If a run resumed, the steps that it made again must not
appear twice. The text must be RUN_DIR/config.toml, the shades of each heat map must be those of the
router x domain table, and the histograms of routing weights must agree with it. Needs the Python
package `tensorboard` (checked with 2.21.0).
"""

import json
import math
import struct
import sys
import zlib
from pathlib import Path

from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, IMAGES, SCALARS, EventAccumulator

HEAT_MAP = "validation/router_by_domain"
HISTOGRAM = "validation/router/weight/expert_"
# src/train/heat_image.rs: the shades of 0 and 1, a character's and a cell's width, a row's height
COLD, HOT = (0xFF, 0xFF, 0xFF), (0x5B, 0xAF, 0xE3)
GLYPH, CELL, ROW, MOST_NAME, FEW_ROWS = 8, 6, 2, 28, 24


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
    for domain, weights in line.get("domain_routing_weights", {}).items():
        for expert, weight in enumerate(weights):
            yield f"validation/router_by_domain/all/{domain}/expert_{expert}", weight


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


def read_tensorboard(events):
    """{tag: [(step, value)]} as TensorBoard reads it, without its sampling."""
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()[SCALARS]
    }


def read_tables(path):
    """{step: {domain: weights}}: the router x domain table of each evaluation."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    named = ((line["step"], line.get("domain_routing_weights")) for line in lines if line["kind"] == "validation")
    return {step: table for step, table in named if table}


def pixels_of(png):
    """The width of a PNG file in RGB, and its pixels row by row."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n"), "it is no PNG file"
    at, data, width, height = 8, b"", 0, 0
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        body = png[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert (depth, colour) == (8, 2), "it is not in RGB"
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    data, stride, rows, above = zlib.decompress(data), 3 * width, [], bytes(3 * width)
    for y in range(height):
        kind, row = data[y * (stride + 1)], bytearray(data[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for x in range(stride):
            left, corner = (row[x - 3], above[x - 3]) if x >= 3 else (0, 0)
            row[x] = (row[x] + [0, left, above[x], (left + above[x]) // 2, paeth(left, above[x], corner)][kind]) & 255
        rows.append(row)
        above = row
    return width, rows


def paeth(left, above, corner):
    """The predictor of a PNG's filter 4."""
    guess = left + above - corner
    return min((left, above, corner), key=lambda byte: abs(guess - byte))


def heat_map_faults(image, table):
    """Compares the shade of each cell of a heat map with the router x domain table."""
    width, rows = pixels_of(image.encoded_image_string)
    if (width, len(rows)) != (image.width, image.height):
        yield f"the heat map is {width} x {len(rows)}, not {image.width} x {image.height}"
    scale = GLYPH * (2 if len(table) <= FEW_ROWS else 1)
    left = max(len("expert"), *(min(len(name), MOST_NAME) for name in table)) + 1
    for name, weights in table.items():
        # the rows are in the order of the config, the metrics in that of the names
        expected = [[round(a + (b - a) * weight) for a, b in zip(COLD, HOT)] for weight in weights]
        shades = [
            [list(rows[scale * ROW * (row + 1)][3 * x : 3 * x + 3]) for x in cells(scale, left, len(weights))]
            for row in range(len(table))
        ]
        if not any(all(abs(a - b) <= 1 for p, q in zip(shown, expected) for a, b in zip(p, q)) for shown in shades):
            yield f"step {image.step}: no row of the heat map has the weights {weights} of `{name}`"


def cells(scale, left, count):
    """Where the cells of a row begin."""
    return [scale * (left + CELL * column) for column in range(count)]


def histogram_faults(by_expert, step, table):
    """Compares the histograms of an evaluation with the router x domain table."""
    total = 0.0
    for expert, histogram in by_expert.items():
        total += histogram.sum / histogram.num
        means = [weights[expert] for weights in table.values()]
        limits, mean = histogram.bucket_limit, histogram.sum / histogram.num
        if abs(sum(histogram.bucket) - histogram.num) > 1e-6 or list(limits) != sorted(limits):
            yield f"step {step}: the buckets of expert {expert} are wrong"
        if not min(means) - 1e-6 <= mean <= max(means) + 1e-6:
            yield f"step {step}: the mean weight of expert {expert} is {mean}, by domain it is {means}"
        if not histogram.min <= limits[0] or not histogram.max <= max(limits[-1], histogram.max):
            yield f"step {step}: the ends of expert {expert}'s histogram are wrong"
    if abs(total - 1) > 1e-5:
        yield f"step {step}: the mean weights of the experts add up to {total}"


def other_faults(events, run_dir):
    """Checks the text, the heat maps and the histograms."""
    config = (run_dir / "config.toml").read_text(encoding="utf-8").strip()
    text = events.Tensors("config")[-1].tensor_proto.string_val[0].decode()
    if text != f"```toml\n{config}\n```":
        yield "the text `config` is not the run's config.toml"
    if not plugin_util.markdown_to_safe_html(text).startswith("<pre><code>"):
        yield "TensorBoard does not show `config` as code"
    tables = read_tables(run_dir / "metrics.jsonl")
    if not tables:
        return
    images = {image.step: image for image in events.Images(HEAT_MAP)}
    if images.keys() != tables.keys():
        yield f"there are heat maps of the steps {list(images)}, and evaluations of {list(tables)}"
    tags = [tag for tag in events.Tags()[HISTOGRAMS] if tag.startswith(HISTOGRAM)]
    for step, table in tables.items():
        yield from heat_map_faults(images[step], table)
        by_expert = {
            int(tag.removeprefix(HISTOGRAM)): event.histogram_value
            for tag in tags
            for event in events.Histograms(tag)
            if event.step == step
        }
        yield from histogram_faults(by_expert, step, table)


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
    sizes = {kind: 0 for kind in (SCALARS, IMAGES, HISTOGRAMS)}
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=sizes).Reload()
    shown = read_tensorboard(events)

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
    faults += other_faults(events, run_dir)
    if not num_values:
        faults.append("there is nothing to compare")
    if faults:
        sys.exit("\n".join(["TensorBoard differs from the metrics:", *sorted(faults)]))
    pictures = sum(len(events.Images(tag)) for tag in events.Tags()[IMAGES])
    print(f"TensorBoard agrees with the metrics: {len(expected)} tags, {num_values} values, {pictures} heat maps")


if __name__ == "__main__":
    main()
