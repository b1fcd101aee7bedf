#!/usr/bin/env bash
# DICOM studies of an archive: listed, segmented, looked at, and handed back. Usage: clinic.sh STUDIES FOLDER MODEL
# STUDIES holds a folder or zip archive per case. Needs the extra dicom. Run it again to go on.
set -euo pipefail
studies=$1 folder=$2 model=$3
mkdir -p "$folder"

medmamba index "$studies" -o "$folder/cases.jsonl" -m "$model"         # reads names alone, so it is quick
status=0
medmamba predict -i "$folder/cases.jsonl" --root "$studies" -o "$folder/masks" -m "$model" --metrics "$folder/medmamba.prom" || status=$?
case $status in 0 | 4) ;; *) exit "$status" ;; esac                    # 4: some series cannot be trusted; each record says why
medmamba status "$folder/masks"
medmamba report "$folder/masks" -i "$studies"                          # one page to look at, with a table to sort
medmamba verify "$folder/masks" -i "$folder/cases.jsonl" --root "$studies"
for object in "$folder"/masks/*.seg.dcm; do
  echo "to the archive: $object"                                       # such as: dcmsend -aec ARCHIVE host 104 "$object"
done
