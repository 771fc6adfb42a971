#!/usr/bin/env bash
# Trains SupMIM and its supervised twin on the built-in data set, on this machine, and compares
# them on the test split. Run again, it continues where it stopped.
# usage: bash launch/local.sh [directory for the results, default runs/local]
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
out="$(realpath -m "${1:-$root/runs/local}")" # relative to where it was called
cd "$root"
source launch/environment.sh ""
source launch/cache.sh

mkdir -p "$out"
python -m supmim_jax.train --config configs/debug_supervised.py --workdir "$out/supervised"
python -m supmim_jax.train --config configs/debug.py --workdir "$out/supmim"
echo
python -m supmim_jax.probe --split test \
  --checkpoint "$out/supervised" --checkpoint "$out/supmim" | tee "$out/table.md"
echo
echo "Checkpoints, metrics.jsonl and results.json: $out/supervised, $out/supmim"
