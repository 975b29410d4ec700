#!/bin/bash
# slurm.sh start FOLDER | stop FOLDER: a Slurm of one node on this machine (munge, slurmctld, slurmd), as root; its state is kept in FOLDER.
# Debian packages: slurm-wlm munge. An /etc/slurm/slurm.conf that is not of this script is left alone, with exit code 3.
set -e
conf=/etc/slurm/slurm.conf dir=$2 mark="# one node, of the tests of latentrefine"
if [ "$1" = stop ]; then
  scontrol shutdown || true
  pkill -x slurmd || true
  rm -f $conf
  exit 0
fi
[ ! -e $conf ] || grep -qx "$mark" $conf || exit 3
mkdir -p "$dir/state" "$dir/spool" /etc/slurm /run/munge
host=$(hostname -s)
[ -f /etc/munge/munge.key ] || head -c 1024 /dev/urandom > /etc/munge/munge.key
chown munge /etc/munge/munge.key /run/munge && chmod 400 /etc/munge/munge.key
pgrep -x munged > /dev/null || runuser -u munge -- munged
cat > $conf <<C
$mark
ClusterName=local
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
NodeName=$host CPUs=$(nproc --all) RealMemory=$(($(grep MemTotal /proc/meminfo | tr -dc 0-9) / 1100)) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
C
slurmctld -c && slurmd -c
