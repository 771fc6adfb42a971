#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes it, installs this commit on every worker, runs, deletes it.
# Needs gcloud with a project and an ssh key. Lose this terminal, and the run goes on: the same
# command with --resume finds it again, as it does a slice that was preempted.
#
# usage: bash launch/tpu_pod.sh --name N --zone Z --type v5litepod-256 --version v2-alpha-tpuv5-lite
#          --config configs/x.py --workdir gs://bucket/x [options] [-- --config.seed=1 ...]
#   --queued       asks for the slice as a queued resource and waits for it (default)
#   --on_demand    makes it at once, or fails
#   --spot         queued, and may be preempted
#   --resume       goes on with the run that a lost terminal left, and after a preemption or a crash
#                  runs again, until the training ends
#   --attempts n   with --resume, how often at most (default 20)
#   --keep         leaves the slice there at the end, to be paid for
#   --allow_dirty  takes the committed code although files were edited since
#   --dry_run      prints the gcloud commands and runs none
# Compiled programs are kept in <workdir>/compiled, where all workers and later attempts find them;
# JAX_COMPILATION_CACHE_DIR=gs://... in this terminal names another place, for several runs.
# Exit code: the training's, see README; 4: no slice.
set -euo pipefail

name='' zone='' type='' version='' config='' workdir='' how=queued
resume='' keep='' dirty='' dry='' attempts=20 overrides=()
usage() { sed -n '/^# usage/,/^# Exit/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while (($#)); do
  case "$1" in
    --name | --zone | --type | --version | --config | --workdir | --attempts)
      [ $# -ge 2 ] || usage
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --queued | --on_demand | --spot) how="${1#--}" ;;
    --resume) resume=1 ;;
    --keep) keep=1 ;;
    --allow_dirty) dirty=1 ;;
    --dry_run) dry=1 ;;
    --) shift; overrides=("$@"); break ;;
    *) echo "error: unknown argument $1" >&2; usage ;;
  esac
  shift
done
for given in name zone type version config workdir; do
  [ -n "${!given}" ] || { echo "error: --$given is missing" >&2; usage; }
done
POLL="${TPU_POD_POLL:-30}" # seconds between looks at the slice and at the run
DEPARTED=4
cd "$(dirname "$0")/.."
if [ -z "$dirty" ] && [ -n "$(git status --porcelain)" ]; then
  echo "error: files here differ from the last commit, which is what the workers would run." \
    "Commit them, or give --allow_dirty." >&2
  exit 2
fi
if [ -z "$dry" ]; then
  if ! command -v gcloud > /dev/null; then
    echo "error: gcloud is not installed: https://cloud.google.com/sdk/docs/install" >&2
    exit 2
  fi
  if [ -z "$(gcloud config get-value project 2> /dev/null)" ]; then
    echo "error: gcloud has no project: gcloud config set project <its id>" >&2
    exit 2
  fi
fi
scratch="$(mktemp -d)"
code="$scratch/supmim_jax.tar.gz"

# One command of gcloud. With --dry_run it is printed, quoted as a shell needs it, and not run.
tpus() {
  local command=(gcloud compute tpus "$@" --zone="$zone")
  if [ -n "$dry" ]; then
    { printf '%q ' "${command[@]}"; echo; } | sed "s/ $//; s|$scratch/||g" >&3
  else
    "${command[@]}"
  fi
}
exec 3>&1
on() { # on <worker> <command>
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2" --ssh-flag=-oServerAliveInterval=30 --quiet
}

create() {
  case "$how" in
    on_demand) tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ;;
    *)
      local more=()
      [ "$how" = queued ] || more=(--spot)
      tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
        --runtime-version="$version" "${more[@]}"
      ;;
  esac
}

state() { # of the slice: READY, or of its request while it waits; NONE if there is neither
  local found
  if ! found="$(tpus tpu-vm describe "$name" --format='value(state)' 2>/dev/null)"; then
    found="$(tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null)" ||
      found=NONE
  fi
  echo "${found:-NONE}"
}

remove() {
  [ "$how" = on_demand ] || tpus queued-resources delete "$name" --force --quiet || true
  [ "$how" != on_demand ] || tpus tpu-vm delete "$name" --quiet || true
}

wait_until_ready() {
  local now=''
  [ -z "$dry" ] || { tpus tpu-vm describe "$name" --format='value(state)'; return 0; }
  until [ "$now" = READY ]; do
    now="$(state)"
    case "$now" in
      READY) ;;
      NONE | FAILED | SUSPEND* | PREEMPTED | TERMINATED | DELETING)
        echo "No slice: its state is $now." >&2
        return 1
        ;;
      *) echo "The slice is $now." >&2; sleep "$POLL" ;;
    esac
  done
}

install() {
  git archive --format=tar.gz --output="$code" HEAD &&
    tpus tpu-vm scp "$code" "$name:supmim_jax.tar.gz" --worker=all --quiet && on all "$INSTALL"
}
# Ubuntu 22.04, which most TPU images are, has Python 3.10 unless asked.
# shellcheck disable=SC2016
INSTALL='set -e; rm -rf ~/supmim_jax; mkdir ~/supmim_jax; cd ~/supmim_jax
tar -xzf ~/supmim_jax.tar.gz
python() { command -v python3.12 || command -v python3.11; }
python > /dev/null || { sudo apt-get -qq update; sudo apt-get -qqy install python3.11-venv; }
PYTHON="$(python)" bash -ec "source launch/environment.sh tpu,fast"'

# The training, apart from the ssh that starts it; its exit code ends up in the file `exit`.
begin() {
  local training
  local cache="${JAX_COMPILATION_CACHE_DIR:-${workdir%/}/compiled}"
  printf -v training '%q ' env "JAX_COMPILATION_CACHE_DIR=$cache" python -m supmim_jax.train --distributed --config "$config" \
    --workdir "$workdir" "${overrides[@]}"
  local script="cd ~/supmim_jax; . .venv/bin/activate; $training; echo \$? > ~/exit"
  printf -v script '%q' "$script"
  on all "rm -f ~/exit; setsid nohup bash -c $script > ~/log 2>&1 < /dev/null &"
}

running() { on 0 'test -e ~/log && test ! -e ~/exit' >/dev/null 2>&1; }

# Follows the log of worker 0 to its end; returns the exit code of the run, 1 if it cannot be known.
follow() {
  local codes
  if [ -n "$dry" ]; then
    on 0 "$FOLLOW"
    on all 'cat ~/exit'
    return 0
  fi
  while :; do
    on 0 "$FOLLOW" || true # lost: by ssh, or with the slice
    [ "$(state)" = READY ] || { echo "The slice is gone." >&2; return 1; }
    ! running || { sleep "$POLL"; continue; }
    break
  done
  sleep "$((POLL / 3))" # all workers fail together, though not in the same second
  codes="$(on all 'cat ~/exit' 2>/dev/null)" || return 1
  worst "$codes"
}
# shellcheck disable=SC2016
FOLLOW='tail -n +1 -F ~/log & while test ! -e ~/exit; do sleep 2; done; sleep 1; kill $!'

worst() { # of the workers' codes: one that a person must look at, else one that failed, else 0
  local code found=0
  [ -n "$1" ] || return 1
  for code in $1; do
    case "$code" in
      2 | 3 | 130) return "$code" ;;
      0) ;;
      *) found=1 ;;
    esac
  done
  return "$found"
}

attempt() {
  local now=NONE
  [ -n "$dry" ] || now="$(state)"
  if [ "$now" = READY ] && [ -n "$resume" ] && running; then
    echo "The run is there; following it." >&2
    follow
    return
  fi
  if [ "$now" != READY ]; then
    [ "$now" = NONE ] || remove
    if ! create; then
      echo "error: gcloud made no slice, for the reason above. The types of a zone: gcloud compute" \
        "tpus accelerator-types list --zone=$zone; quota: the project's IAM page, Quotas." >&2
      ((i > 1)) || attempts=1 # there was none before: asking again would not help
      return "$DEPARTED"
    fi
    wait_until_ready || return "$DEPARTED"
  fi
  install && begin || return 1
  follow
}

# shellcheck disable=SC2317 # the trap calls it
finish() {
  rm -rf "$scratch"
  [ -n "$keep" ] || remove
}
trap finish EXIT
# Ctrl-C leaves the run alone: it is what one does to stop reading its log.
trap 'trap - EXIT; rm -rf "$scratch"; echo "The slice $name stays. --resume goes on with it." >&2
  exit 130' INT HUP TERM

for ((i = 1; ; i++)); do
  code_of_run=0
  attempt || code_of_run=$?
  case "$code_of_run" in 0 | 2 | 3 | 130) break ;; esac
  if [ -z "$resume" ] || ((i >= attempts)); then break; fi
  echo "Attempt $i ended with $code_of_run; trying again." >&2
  sleep "$POLL"
done
exit "$code_of_run"
