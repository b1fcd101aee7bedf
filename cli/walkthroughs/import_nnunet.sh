#!/usr/bin/env bash
# Use a model that nnU-Net trained. Usage: import_nnunet.sh RESULTS IMAGES FOLDER
# RESULTS is nnU-Net's folder Trainer__plans__configuration; IMAGES holds CASE_0000.nii.gz files.
set -euo pipefail
results=$1 images=$2 folder=$3

medmamba convert import-nnunet "$results" -o "$folder/model"
medmamba verify "$folder/model"                                   # computes here what it computed when it was imported?
medmamba predict -i "$images" -o "$folder/masks" -m "$folder/model"
