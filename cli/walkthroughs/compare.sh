#!/usr/bin/env bash
# Do the Mamba layers help on your data? A network against its twins: without them, and with
# convolutions in their place. Usage: compare.sh DATASET FOLDER [TIME] [SEEDS] [RUNS_AT_ONCE]
# A claim needs three seeds. Run it again after an interruption: finished runs are kept.
set -euo pipefail
dataset=$1 folder=$2 time=${3:-10m} seeds=${4:-0,1,2} jobs=${5:-1}

medmamba plan "$dataset" -o "$folder/work" --network lightm_unet_s
medmamba compare "$folder/work" lightm_unet_s --twins --max-time "$time" --seeds "$seeds" \
  --jobs "$jobs" -o "$folder/comparison"                          # report.html and .md, cases.csv
