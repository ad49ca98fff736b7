#!/usr/bin/env bash
# A one-node SLURM cluster on this machine while a command runs:  bash tests/cluster/slurm.sh COMMAND [ARGUMENT ...]
# Debian or Ubuntu, as root, without systemd: installs slurm-wlm and munge where missing, configures everything in a
# temporary folder, waits until the node is idle, runs COMMAND with SLURM_CONF and FLATBIT_SLURM=1 set, and ends its own
# daemons. Exit code of COMMAND; 0 with a message where the packages cannot be installed.
set -euo pipefail

skip() {
    echo "SLURM tests skipped: $1" >&2
    exit 0
}

install() {
    command -v apt-get >/dev/null || skip "slurm-wlm and munge are not installed, and there is no apt-get"
    local log options=(-o DPkg::Lock::Timeout=120)
    log=$(mktemp)
    # Debian starts services at installation where it can: this cluster starts its own
    if ! (export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 &&
        apt-get "${options[@]}" update && apt-get "${options[@]}" install -y --no-install-recommends slurm-wlm munge) \
        >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        skip "apt-get cannot install slurm-wlm and munge"
    fi
    rm -f "$log"
}

configure() {
    local host port
    host=$(hostname -s)
    port=$((20000 + $$ % 5000 * 2)) # two clusters on one machine are no trouble
    mkdir -p state spool
    head -c 1024 /dev/urandom >munge.key
    chmod 600 munge.key
    cat >slurm.conf <<END
ClusterName=flatbit
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
StateSaveLocation=$PWD/state
SlurmdSpoolDir=$PWD/spool
SlurmctldPidFile=$PWD/slurmctld.pid
SlurmdPidFile=$PWD/slurmd.pid
SlurmctldLogFile=$PWD/slurmctld.log
SlurmdLogFile=$PWD/slurmd.log
# a requeued job starts when its old credential has expired: two minutes without this
AuthInfo=socket=$PWD/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
GresTypes=gpu,shard
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=2000 Gres=gpu:1,shard:2
PartitionName=batch Nodes=$host Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=$host PriorityTier=2
END
    echo "Name=gpu File=/dev/null
Name=shard Count=2" >gres.conf
}

start() {
    munged --foreground --key-file="$PWD/munge.key" --socket="$PWD/munge.socket" --pid-file="$PWD/munged.pid" \
        --log-file="$PWD/munged.log" --seed-file="$PWD/munged.seed" 2>munged.log &
    daemons=($!)
    for _ in $(seq 40); do [ -S munge.socket ] && break || sleep 0.25; done
    slurmctld -D >/dev/null 2>&1 &
    daemons+=($!)
    slurmd -D >/dev/null 2>&1 &
    daemons+=($!)
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --format=%T 2>/dev/null | sort -u)" = idle ] && return
        sleep 0.5
    done
    tail -n 20 ./*.log >&2
    return 1
}

stop() {
    scancel --user=root
    for _ in $(seq 120); do [ -n "$(squeue --noheader)" ] && sleep 0.25 || break; done # no process of a job survives
    kill -KILL "${daemons[@]}"
    wait "${daemons[@]}" 2>/dev/null
    rm -rf "$cluster"
}

[ "$(id -u)" = 0 ] || skip "installing and starting SLURM takes root"
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null || install
cluster=$(mktemp -d)
chmod 755 "$cluster"
here=$PWD
cd "$cluster"
export SLURM_CONF=$cluster/slurm.conf FLATBIT_SLURM=1
configure
trap 'set +e; stop' EXIT
start
cd "$here"
"$@"
