#!/usr/bin/env bash
# Hold DICOM outputs against programs of others. For root on Debian 12; nothing leaves the machine.
#
#   cli/dicom/check.sh SERIES... [--model MODEL] [--label SERIES MASK NAMES]
#
# Each SERIES (folder or archive) is predicted with MODEL (by default one that a tiny demo trains). --label names a series with a mask of its
# own, and a JSON map name -> value: it goes through `convert seg-to-dicom` and `convert seg-to-rtstruct`. Every object is then
#   - validated by dciodvfy (dicom3tools),
#   - decoded by dcmqi's segimage2itkimage (contours: filled by plastimatch), and compared with the NIfTI mask voxel by voxel in physical space,
#   - sent by C-STORE (dcmtk) to an Orthanc on the loopback, and fetched back.
# Exit code 0 only if all of it holds. PYTHON names the Python that has medmamba (default .venv/bin/python).
set -euo pipefail

series=() model="" labelled="" mask="" names=""
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=$(realpath "$2"); shift 2 ;;
    --label) labelled=$(realpath "$2") mask=$(realpath "$3") names=$(realpath "$4"); shift 4 ;;
    -*) echo "check.sh: $1: unknown" >&2; exit 2 ;;
    *) series+=("$(realpath "$1")"); shift ;;
  esac
done
cd "$(dirname "$0")/../.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
medmamba=("$python" -m medmamba)
scratch=$(mktemp -d)
orthanc=""
cleanup() {
  if [ -n "$orthanc" ]; then kill "$orthanc" 2>/dev/null || true; wait "$orthanc" 2>/dev/null || true; fi
  rm -rf "$scratch"
}
trap cleanup EXIT
say() { printf '\n== %s\n' "$*"; }

missing=()
for tool in dciodvfy:dicom3tools dcmsend:dcmtk Orthanc:orthanc; do
  command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi
"$python" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install -q dcmqi 2>/dev/null
decode=$scratch/tools/bin/segimage2itkimage
say "programs"
dpkg-query -W -f '   ${Package} ${Version}\n' dicom3tools dcmtk orthanc
"$scratch/tools/bin/pip" freeze | sed -n 's/^dcmqi==/   dcmqi /p'

if [ -z "$model" ] && [ ${#series[@]} -gt 0 ]; then
  say "a model by medmamba demo --tiny"
  "${medmamba[@]}" demo --tiny -o "$scratch/demo" >/dev/null 2>&1
  model=$(echo "$scratch"/demo/*/runs/*/*/fold_*/model)
fi
out=$scratch/out
mkdir -p "$out"
for one in ${series[@]+"${series[@]}"}; do
  say "predict $(basename "$one")"
  "${medmamba[@]}" predict -i "$one" -o "$out" -m "$model" 2>&1 | sed 's/^/   /' | grep -v "^   predicting"
done
if [ -n "$labelled" ]; then
  say "convert seg-to-dicom $(basename "$mask")"
  "${medmamba[@]}" convert seg-to-dicom "$mask" "$labelled" --labels "$names" -o "$out/label.seg.dcm" |
    sed "s|^.*/|   |"
  say "convert seg-to-rtstruct $(basename "$mask")"
  "${medmamba[@]}" convert seg-to-rtstruct "$mask" "$labelled" --labels "$names" -o "$out/label.rtstruct.dcm" |
    sed "s|^.*/|   |"
  cp "$mask" "$out/label.nii.gz"
fi

validate() {
  dciodvfy "$1" >"$scratch/verdict.txt" 2>&1 || true
  sed 's/^/   /' "$scratch/verdict.txt"
  if grep -q '^Error' "$scratch/verdict.txt"; then echo "   NOT VALID"; exit 1; fi
  echo "   0 errors"
}

for file in "$out"/*.seg.dcm; do
  name=$(basename "$file" .seg.dcm)
  say "$name: dciodvfy"
  validate "$file"
  say "$name: dcmqi"
  mkdir "$scratch/$name"
  "$decode" --inputDICOM "$file" --outputDirectory "$scratch/$name" --outputType nii >"$scratch/dcmqi.txt" 2>&1 ||
    { cat "$scratch/dcmqi.txt"; exit 1; }
  "$python" cli/dicom/check.py same "$file" "$out/$name.nii.gz" "$scratch/$name"
done

contours=$out/label.rtstruct.dcm
if [ -n "$labelled" ]; then
  say "label, contours: dciodvfy"
  validate "$contours"
  say "label, contours: plastimatch"
  "$python" -c 'from plastimatch import plastimatch; plastimatch()' convert --input "$contours" --fixed "$out/label.nii.gz" \
    --output-prefix "$scratch/filled" --prefix-format nrrd >"$scratch/plastimatch.txt" 2>&1 ||
    { cat "$scratch/plastimatch.txt"; exit 1; }
  "$python" cli/dicom/check.py filled "$out/label.nii.gz" "$names" "$scratch/filled"
fi

say "Orthanc"
read -r dicom_port http_port < <("$python" cli/dicom/check.py ports)
cat >"$scratch/orthanc.json" <<JSON
{"Name": "CHECK", "StorageDirectory": "$scratch/store", "IndexDirectory": "$scratch/store", "Plugins": [],
 "DicomAet": "CHECK", "DicomPort": $dicom_port, "DicomCheckCalledAet": true, "HttpPort": $http_port,
 "HttpServerEnabled": true, "RemoteAccessAllowed": false, "AuthenticationEnabled": false}
JSON
mkdir -p "$scratch/store"
Orthanc "$scratch/orthanc.json" >"$scratch/orthanc.log" 2>&1 &
orthanc=$!
for _ in $(seq 60); do
  if "$python" cli/dicom/check.py alive "$http_port"; then break; fi
  sleep 0.5
done
for file in "$out"/*.dcm; do
  dcmsend -aec CHECK 127.0.0.1 "$dicom_port" "$file" 2>&1 | sed 's/^/   /'
  "$python" cli/dicom/check.py stored "$file" "$http_port"
done
say "all of it holds"
