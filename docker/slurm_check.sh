#!/bin/sh
# Run an array of shards through a real Slurm of one node, on loopback, and verify what comes out.
#   docker/slurm_check.sh MODEL IMAGES [SHARDS]
# As root on Debian: installs slurmctld, slurmd and munge where they are missing, and starts them with a configuration of its own in
# a temporary folder; all is ended and removed afterwards. MEDMAMBA names the program (default: medmamba on the PATH).
set -eu
if [ $# -lt 2 ]; then echo "usage: $0 MODEL IMAGES [SHARDS]" >&2; exit 2; fi
model=$(realpath "$1") images=$(realpath "$2") shards=${3:-4}
program=$(realpath "$(command -v "${MEDMAMBA:-medmamba}")")
here=$(dirname "$(realpath "$0")")

if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurmctld slurmd munge
fi

place=$(mktemp -d /tmp/medmamba-slurm.XXXXXX)
chmod 755 "$place"
stop() {
  for name in slurmd slurmctld munged; do
    if [ -s "$place/$name.pid" ]; then kill "$(cat "$place/$name.pid")" 2>/dev/null || true; fi
  done
  sleep 1
  rm -rf "$place"
}
trap stop EXIT

mkdir -m 700 "$place/munge"
mkdir -m 755 "$place/socket" "$place/state" "$place/spool"
dd if=/dev/urandom of="$place/munge/key" bs=1024 count=1 2>/dev/null
chmod 600 "$place/munge/key"
munged --force --key-file "$place/munge/key" --socket "$place/socket/munge" --pid-file "$place/munged.pid" \
  --log-file "$place/munge/log" --seed-file "$place/munge/seed"

host=$(hostname -s)
cat > "$place/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$place/socket/munge
CredType=cred/munge
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$place/slurm.conf"
slurmctld
slurmd
for _ in $(seq 60); do
  if [ "$(sinfo --noheader --format %t 2>/dev/null)" = idle ]; then break; fi
  sleep 1
done
sinfo

out=$place/masks
# The job of a cluster, less what a single small node cannot give.
job=$(PATH="$(dirname "$program"):$PATH" sbatch --parsable --array=0-$((shards - 1)) --cpus-per-task=1 --mem=0 \
  --output "$place/shard-%a.log" "$here/slurm.sbatch" "$images" "$out" "$model")
echo "submitted array $job of $shards shards"
while squeue --noheader --jobs "$job" 2>/dev/null | grep -q .; do sleep 1; done
for log in "$place"/shard-*.log; do echo "== $(basename "$log")"; tail -3 "$log"; done
"$program" status "$out"
"$program" verify "$out" --expect-shards "$shards" -i "$images"
