#!/usr/bin/env bash
# Thousands of cases, nobody watching. Usage: overnight.sh IMAGES FOLDER MODEL
# Run it again after a crash, a reboot or a full disk: it does what is missing and nothing else.
set -euo pipefail
images=$1 folder=$2 model=$3

medmamba doctor --quick
medmamba verify "$model"
status=0
medmamba predict -i "$images" -o "$folder/masks" -m "$model" || status=$?
case $status in
  0) echo "every case has a mask" ;;
  4) echo "some cases have none; each has a record with the reason" ;;
  *) exit "$status" ;;
esac
medmamba verify "$folder/masks"                                   # every mask is what its record says
