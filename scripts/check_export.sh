#!/usr/bin/env bash
# Checks dylora against the real programs with which it exchanges files:
#
#   scripts/check_peft.py         mixtures that dylora exported, in PEFT
#   scripts/check_import.py       adapters that PEFT wrote, and X-LoRA
#   scripts/check_merge.py        merged mixtures in transformers and PEFT
#   scripts/check_families.py     every command on bases of the Llama-like families
#   scripts/check_gpt2.py         GPT-2 at its true size
#   scripts/check_gradients.py    the gradients of a step, compared with PEFT's
#   scripts/check_tensorboard.py  a run's TensorBoard files in TensorBoard
#   scripts/check_docs.py         the Python of docs/tutorials/handover.md
#
# This takes 5 minutes on two cores, and 1 GB in the temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
# with two threads, models this small run slower, and many times slower if other processes use the
# cores as well
export OMP_NUM_THREADS=1
python=$(scripts/reference_env)
cargo build --quiet
folder=$(mktemp -d)
half=
end() {
  if [ -n "$half" ]; then
    kill -- "-$half" 2>/dev/null || true
    wait "$half" 2>/dev/null || true
  fi
  rm -rf "$folder"
}
trap end EXIT

# The two halves run side by side. In `exchanges`, later scripts read files that earlier ones wrote.
exchanges() {
  "$python" scripts/check_peft.py "$folder"
  "$python" scripts/check_tensorboard.py "$folder/top_k"
  "$python" scripts/check_import.py "$folder"
  "$python" scripts/check_merge.py "$folder"
}
bases() {
  "$python" scripts/check_families.py "$folder/families"
  "$python" scripts/check_gpt2.py "$folder/gpt2"
  "$python" scripts/check_gradients.py "$folder/gradients"
  PATH="$PWD/target/debug:$PATH" PYTHON="$python" scripts/check_docs.py docs/tutorials/handover.md
}
# in a process group of its own, so that `end` also ends what it runs
set -m
bases &
half=$!
set +m
exchanges
wait "$half" || {
  echo "check_export: the checks of bases failed" >&2
  exit 1
}
half=
