#!/usr/bin/env bash
# Runs the tests, in two processes. usage: bash tests/run.sh [pytest arguments]
# EXTRAS=test,parity also installs what the parity tests compare with (they skip without it).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh "${EXTRAS:-test}"

ruff check .
ruff format --check .
# By name: files with few but long tests would otherwise come last, and leave a core idle.
exec python -m pytest -rs --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
