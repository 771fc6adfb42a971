# shellcheck shell=bash
# Sourced by the scripts that run here: a virtual environment with this package in it.
# usage: source launch/environment.sh [extras], from the repository's root.
# Creates .venv where no environment is active; installs when setup.py, constraints.txt or the
# extras have changed since the last time, and otherwise does nothing.

extras="${1:-}"
if [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" = base ]; then
  CONDA_PREFIX="" # conda activates base by itself; nothing is to be installed there
fi
python="${PYTHON:-python3}"
[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || python=python
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version 2>&1) is too old; supmim_jax needs Python 3.11 or newer." \
    "Name another with PYTHON=/path/to/python3.12 bash $0" >&2
  exit 2
fi
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  [ -e .venv/bin/activate ] || "$python" -m venv --clear .venv
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
prefix="${VIRTUAL_ENV:-$CONDA_PREFIX}"
stamp="$prefix/.supmim_jax-${extras//,/-}-$(cat setup.py constraints.txt | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  echo "Installing supmim_jax${extras:+[$extras]} into $prefix ..."
  python -m pip install --quiet --disable-pip-version-check \
    --editable ".${extras:+[$extras]}" --constraint constraints.txt
  touch "$stamp"
fi
