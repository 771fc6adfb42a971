# shellcheck shell=bash
# Sourced by the scripts that train: a program that was compiled once is found again at the next
# start, also after a preemption. usage: source launch/cache.sh
# JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=false does without.
# JAX tells entries apart by program, options, versions and device, so one directory serves many
# runs; it never deletes any. Of several processes only the first one writes: they should share it.

# Programs for CPUs may use all that this one can do: another kind of CPU gets a directory of its own.
cpu="$({ grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2> /dev/null || true; } | cksum)"
kept="${XDG_CACHE_HOME:-$HOME/.cache}/supmim_jax/compiled-${cpu%% *}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$kept}"
