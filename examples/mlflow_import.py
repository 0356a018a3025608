#!/usr/bin/env python3
"""Imports a run's metrics into MLflow.

    pip install mlflow
    python examples/mlflow_import.py RUN_DIR [--experiment NAME] [--uri URI]
    mlflow ui --backend-store-uri sqlite:///mlflow.db

Reads RUN_DIR/metrics.jsonl, in which each line is a step, a window or an evaluation. A number
becomes the metric `<kind>/<key>`, such as `train/loss` or `validation/domain_losses/code`, at the
line's step; the keys of the config become parameters, and config.toml an artifact. A `null`, which
stands for NaN, is left out. Windows are left out except for the shares of the domains: the heat
maps of the routers are in the HTML report, which is logged too if RUN_DIR/report.html is there. A
second import makes a second MLflow run. Tried with mlflow 3.17.2.
"""

import argparse
import json
import sys
import time
import tomllib
from pathlib import Path

import mlflow
from mlflow.entities import Metric, Param

BATCH = 1000  # MLflow's limits for one call
PARAMS = 100


def numbers(prefix, value):
    """(name, number) for each number in nested tables and lists, whose items are numbered."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(f"{prefix}/{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(f"{prefix}/{index}", item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield prefix, float(value)


def metrics_of(line, now):
    """The metrics of a line of metrics.jsonl."""
    kind, step = line.pop("kind"), line.pop("step")
    if kind == "window":
        line = {"mix": line["mix"]}
    return [Metric(allowed(name), number, now, step) for name, number in numbers(kind, line)]


def allowed(name):
    """A name without the characters that MLflow does not take."""
    return "".join(char if char.isalnum() or char in "_-./ " else "_" for char in name)


def params_of(prefix, value):
    """(dotted key, text) for each key of the config."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from params_of(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield allowed(prefix), json.dumps(value)[:500]


def main():
    """Imports the run that the command line names."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--experiment", default="dylora", metavar="NAME")
    parser.add_argument("--uri", default="sqlite:///mlflow.db", help="tracking URI [%(default)s]")
    args = parser.parse_args()
    path = args.run_dir / "metrics.jsonl"
    if not path.exists():
        sys.exit(f"mlflow_import: `{path}` does not exist")
    now, metrics = int(1000 * time.time()), []
    for text in path.read_text(encoding="utf-8").splitlines():
        metrics += metrics_of(json.loads(text), now)
    config = args.run_dir / "config.toml"
    table = tomllib.loads(config.read_text(encoding="utf-8"))
    params = [Param(*pair) for pair in params_of("", table)]
    mlflow.set_tracking_uri(args.uri)
    mlflow.set_experiment(args.experiment)
    with mlflow.start_run(run_name=args.run_dir.resolve().name) as run:
        client = mlflow.MlflowClient()
        for start in range(0, len(params), PARAMS):
            client.log_batch(run.info.run_id, params=params[start : start + PARAMS])
        for start in range(0, len(metrics), BATCH):
            client.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])
        mlflow.log_artifact(str(config))
        if (args.run_dir / "report.html").exists():
            mlflow.log_artifact(str(args.run_dir / "report.html"))
    print(f"imported {len(metrics)} numbers and {len(params)} parameters as {run.info.run_id}")


if __name__ == "__main__":
    main()
