#!/usr/bin/env bash
# Rehearses the ImageNet configs on 256 chips of each kind: a row per step that was compiled, and a
# JSON file beside it. Needs the extra [tpu] and hours: half a minute to three per row, 48 rows.
# usage: bash launch/rehearse_all.sh <directory for the JSON> [config ...]
set -euo pipefail
[ $# -ge 1 ] || { sed -n '/^# usage/s/^# //p' "$0" >&2; exit 2; }
out="$(realpath -m "$1")"
shift
cd "$(dirname "$0")/.."
configs=("$@")
[ $# -gt 0 ] || configs=(configs/{supervised,supmim}_*_imagenet*.py configs/{mae,finetune}_*_imagenet1k*.py)
mkdir -p "$out"
failed=0
for config in "${configs[@]}"; do
  tokens=()
  case "$config" in *supmim_*) tokens=(--config.tokens.cache=any) ;; esac # read by no rehearsal
  for slice in "v5e:16x16 16" "v4:4x8x8 8" "v5p:4x8x8 8" "v6e:16x16 16"; do
    read -r topology fsdp <<< "$slice"
    name="$(basename "$config" .py)-${topology%%:*}"
    python -m supmim_jax.rehearse --row --config "$config" --topology "$topology" \
      --config.mesh.fsdp="$fsdp" "${tokens[@]}" --json "$out/$name.json" || failed=1
  done
done
exit "$failed"
