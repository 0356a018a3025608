#!/usr/bin/env bash
# dylora against its real clients: mixtures exported to PEFT (scripts/check_peft.py), adapters that PEFT wrote and
# X-LoRA (scripts/check_import.py), merges in transformers and PEFT (scripts/check_merge.py), GPT-2 at its true size
# (scripts/check_gpt2.py), a step's gradients beside PEFT's (scripts/check_gradients.py), and a run's TensorBoard files
# in TensorBoard (scripts/check_tensorboard.py). Takes 2 minutes on two cores and 1 GB in the temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
# models this small run slower on two threads, and many times slower where others use the cores as well
export OMP_NUM_THREADS=1
python=$(scripts/reference_env)
cargo build --quiet
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" scripts/check_peft.py "$folder"
"$python" scripts/check_tensorboard.py "$folder/top_k"
"$python" scripts/check_import.py "$folder"
"$python" scripts/check_merge.py "$folder"
"$python" scripts/check_gpt2.py "$folder/gpt2"
"$python" scripts/check_gradients.py "$folder/gradients"
