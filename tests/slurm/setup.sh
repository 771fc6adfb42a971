#!/usr/bin/env bash
# Makes a Slurm cluster of this one machine, for tests: installs Debian's packages, starts munged,
# slurmctld and slurmd by hand, as a container has no systemd. Needs root. Run again, it restarts.
# usage: bash tests/slurm/setup.sh [stop]
set -euo pipefail
state=/tmp/supmim_jax_slurm
stop() {
  local name
  for name in slurmd slurmctld munged; do
    [ ! -e "$state/$name.pid" ] || kill "$(cat "$state/$name.pid")" 2>/dev/null || true
  done
  sleep 1
  rm -rf "$state"
}
[ "$(id -u)" = 0 ] || { echo "error: needs root, to install and to start daemons." >&2; exit 2; }
stop
[ "${1:-}" != stop ] || exit 0

if ! command -v slurmctld slurmd munged >/dev/null; then
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends slurm-wlm munge
fi
mkdir -p "$state"/{ctl,d} /run/munge /etc/slurm
chown munge:munge /run/munge
if [ ! -S /run/munge/munge.socket.2 ]; then # else it is another's, to be left alone
  su -s /bin/bash munge -c /usr/sbin/munged
  cp /run/munge/munged.pid "$state/"
fi

host="$(hostname -s)"
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=supmim_jax_test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$state/ctl
SlurmdSpoolDir=$state/d
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE
CONF
slurmctld -c
slurmd -c
for _ in $(seq 30); do
  ! sinfo --noheader --format=%T 2>/dev/null | grep -q idle || { sinfo; exit 0; }
  sleep 1
done
tail -n 20 "$state"/*.log >&2
echo "error: the node did not become idle within 30 s." >&2
exit 1
