#!/usr/bin/env bash
# Trains a short mixture, exports it and loads the export in real PEFT (scripts/check_peft.py); also
# reads the run's TensorBoard files with TensorBoard (scripts/check_tensorboard.py).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/reference_env)
cargo build --quiet
dylora=target/debug/dylora
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
$dylora --quiet train --config configs/moe.toml --device cpu --set run.dir="$run/moe" \
  --set 'train.duration={steps=12}' --set train.eval_every_steps=6 --set router.top_k=2
$dylora --quiet export-adapters --checkpoint "$run/moe" --out "$run/export" --device cpu
"$python" scripts/check_peft.py "$dylora" "$run/moe" "$run/export" demo/base
"$python" scripts/check_tensorboard.py "$run/moe"
