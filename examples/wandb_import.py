#!/usr/bin/env python3
"""Imports a run's TensorBoard files into Weights & Biases.

    pip install wandb tensorboard
    WANDB_MODE=offline python examples/wandb_import.py RUN_DIR [--project NAME]
    wandb sync wandb/offline-run-*

The import is that of W&B itself (`sync_tensorboard`), so scalars, heat maps and histograms arrive
under TensorBoard's tags, over `global_step`. By their names, it takes only files of this machine
that are newer than the W&B run, so it gets copies under such names; RUN_DIR stays as it is. Without
`WANDB_MODE=offline`, the run is uploaded at once. Tried with wandb 0.31.0 and tensorboard 2.21.0;
wandb 0.31 has no `wandb sync --sync-tensorboard` any more.
"""

import argparse
import shutil
import socket
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import wandb
from tensorboard.summary.writer import event_file_writer


def main() -> None:
    """Imports the run that the command line names."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--project", default="dylora", metavar="NAME")
    args = parser.parse_args()
    files = sorted((args.run_dir / "tensorboard").glob("events.out.tfevents.*"))
    if not files:
        sys.exit(f"wandb_import: `{args.run_dir}` holds no TensorBoard files")
    config = tomllib.loads((args.run_dir / "config.toml").read_text(encoding="utf-8"))
    name = args.run_dir.resolve().name
    with tempfile.TemporaryDirectory() as folder:
        run = wandb.init(project=args.project, name=name, config=config, sync_tensorboard=True)
        started = int(time.time()) + 1
        for index, file in enumerate(files):
            copy = f"events.out.tfevents.{started + index}.{socket.gethostname()}.1.{index}"
            shutil.copy(file, Path(folder) / copy)
        # W&B reads a folder from when a writer opens it, and all of it before the run ends
        event_file_writer.EventFileWriter(folder).close()
        run.finish()


if __name__ == "__main__":
    main()
