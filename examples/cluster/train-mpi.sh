#!/bin/bash
# Train by processes of Open MPI, one for each of the eight GPUs of two hosts:
#
#   examples/cluster/train-mpi.sh --config=clothing --workdir=/mnt/runs/clothing
#
# Started on the first host, where process 0 will be. The workdir is on a file system that both see.
# Open MPI ends all processes where one is lost: the same command goes on from the last checkpoint.
set -euo pipefail

hosts=${HOSTS:-node-a:8,node-b:8}
# What a host sends through a proxy does not reach the other hosts.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
# Open MPI 4 says where process 0 is, Open MPI 5 does not.
exec mpirun --host "$hosts" -x PATH \
    cbam-jax train --distributed --coordinator="$(hostname):${PORT:-12345}" "$@"
