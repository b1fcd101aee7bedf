#!/usr/bin/env bash
# From a raw dataset to scored masks, one command a step. Usage: quickstart.sh DATASET FOLDER [TIME]
set -euo pipefail
dataset=$1 folder=$2 time=${3:-20m}
work=$folder/work

medmamba plan "$dataset" -o "$work" --network lightm_unet_s
medmamba train "$work" --network lightm_unet_s --fold all --max-time "$time"
medmamba predict -i "$dataset/imagesTs" -o "$folder/masks" \
  -m "$work/runs/lightm_unet_s/3d_fullres/fold_all"
medmamba evaluate "$dataset/labelsTs" "$folder/masks"
