#!/usr/bin/env bash
# A real Slurm on this machine: one controller and as many node daemons as you like, each a "node" of 8 CPUs and
# 8 "GPUs" (files without a device behind them). Nothing of the machine's own Slurm is touched: ports, keys and logs are FOLDER's.
#
#   tests/slurm/cluster.sh install                  Debian's packages, as root; does nothing where they are
#   tests/slurm/cluster.sh start FOLDER [NODES]     2 nodes by default; then  export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/cluster.sh stop FOLDER
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

install() {
    command -v slurmctld slurmd munged sbatch >/dev/null && return
    # Debian starts the services of what it installs; this machine's own are not wanted.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge
}

free_ports() { # COUNT ports that nobody listens on, all different
    "${PYTHON:-python3}" - "$1" <<'PY'
import socket, sys
probes = [socket.socket() for _ in range(int(sys.argv[1]))]
for probe in probes:
    probe.bind(("127.0.0.1", 0))
print(*(probe.getsockname()[1] for probe in probes))
PY
}

configure() {
    local folder=$1 nodes=$2 host ports
    host=$(hostname)
    read -r -a ports <<<"$(free_ports $((nodes + 1)))"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=sandbox
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its old credential has expired, which takes two minutes by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
# No systemd and no cgroups here.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
# The nodes claim more than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=15
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
PartitionName=main Nodes=ALL Default=YES MaxTime=7-00:00:00 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=7-00:00:00 PriorityTier=10 PreemptMode=OFF
CONF
    for index in $(seq "$nodes"); do
        echo "NodeName=n$index NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$index]} CPUs=8 RealMemory=8000 Gres=gpu:8"
    done >>"$folder/slurm.conf"
    touch "$folder"/gpu{0..7} # Slurm counts files, of whatever kind
    echo "Name=gpu File=$folder/gpu[0-7]" >"$folder/gres.conf"
}

start() {
    local folder nodes=${2:-2}
    mkdir -p "$1" && folder=$(cd "$1" && pwd)
    mkdir -p "$folder/state"
    chmod 700 "$folder"
    configure "$folder" "$nodes"
    head -c 1024 /dev/urandom >"$folder/munge.key" && chmod 600 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld
    for index in $(seq "$nodes"); do slurmd -N "n$index"; done
    for _ in $(seq 300); do
        [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null)" = "$nodes" ] && return
        sleep 0.1
    done
    echo "the nodes are not idle after 30 s; see $folder/*.log" >&2
    sinfo -R >&2
    return 1
}

stop() { # jobs first, then the daemons, each by its own pid file; whatever is left after 20 s is killed
    local folder=$1 file pids
    export SLURM_CONF=$folder/slurm.conf
    timeout 10 scancel --user="$(id -un)" || true
    for _ in $(seq 50); do [ -z "$(timeout 5 squeue -h -t R,CG,S 2>/dev/null)" ] && break; sleep 0.2; done
    for file in "$folder"/slurmd.*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
        [ -s "$file" ] && pids="${pids:-} $(cat "$file")"
    done
    kill ${pids:-} 2>/dev/null || true
    for _ in $(seq 200); do kill -0 ${pids:-} 2>/dev/null || return 0; sleep 0.1; done
    kill -9 ${pids:-} 2>/dev/null || true
}

case "${1:-}" in
install | start | stop) "$@" ;;
*) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
