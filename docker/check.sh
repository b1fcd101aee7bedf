#!/usr/bin/env bash
# Build an image and predict inside it, hardened, without a Docker engine. For root on Debian 12.
#
#   docker/check.sh [MODEL IMAGES] [--target cpu|cuda] [--base IMAGE] [--find-links FOLDER]
#
# MODEL is a model folder, IMAGES a folder of NIfTI files for it; without them a tiny demo makes both. Without --base the base
# image is made by debootstrap. --find-links names a folder of wheels that pip prefers, a CPU build of torch for instance
# (default: PIP_FIND_LINKS where that is a folder). The image is built by buildah and its command run by bubblewrap:
# read-only root, no network, no capability, an unknown uid.
set -euo pipefail

model="" images=""
case ${1:-} in
  "" | --*) ;;
  *) model=$(realpath "$1") images=$(realpath "$2"); shift 2 ;;
esac
target=cpu base="" links=""
if [ -d "${PIP_FIND_LINKS:-}" ]; then links=$(realpath "$PIP_FIND_LINKS"); fi
while [ $# -gt 0 ]; do
  case $1 in
    --target) target=$2 ;;
    --base) base=$2 ;;
    --find-links) links=$(realpath "$2") ;;
    *) echo "check.sh: $1: unknown" >&2; exit 2 ;;
  esac
  shift 2
done
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
container=""
cleanup() {
  if [ -n "$container" ]; then buildah rm "$container" >/dev/null 2>&1 || true; fi
  rm -rf "$scratch"
}
trap cleanup EXIT
say() { printf '\n== %s\n' "$*"; }
timed() { local start=$SECONDS; "$@"; echo "   $((SECONDS - start)) s"; }

missing=()
tools=(buildah debootstrap bwrap:bubblewrap)
if [ -z "$model" ]; then tools+=(make g++ python3 pip3:python3-venv); fi
for tool in "${tools[@]}"; do
  command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -qq
  apt-get install -y -qq "${missing[@]}" >/dev/null
fi

if [ -z "$model" ]; then
  say "a model and images by medmamba demo --tiny"
  make setup >"$scratch/setup.log" 2>&1 || { tail -n 40 "$scratch/setup.log"; exit 1; }
  .venv/bin/medmamba demo --tiny -o "$scratch/demo" >"$scratch/demo.log" 2>&1 || { tail -n 40 "$scratch/demo.log"; exit 1; }
  model=$(echo "$scratch"/demo/*/runs/*/*/fold_*/model) images=$(echo "$scratch"/demo/raw/*/imagesTs)
  chmod -R a+rX "$scratch/demo"
fi

if [ -z "$base" ]; then
  say "base image by debootstrap"
  make_base() {
    debootstrap --variant=minbase --include=ca-certificates bookworm "$scratch/base" >"$scratch/debootstrap.log"
    # As small as Debian's own slim image: no packages that are unpacked already, no manuals, no translations.
    rm -rf "$scratch/base"/var/cache/apt/* "$scratch/base"/usr/share/{doc,man,info,locale}/*
    # Certificates of this machine, for registries behind a proxy of the house.
    cp /etc/ssl/certs/ca-certificates.crt "$scratch/base/etc/ssl/certs/ca-certificates.crt"
    local from
    from=$(buildah from scratch)
    buildah add -q "$from" "$scratch/base" / >/dev/null
    buildah commit -q --rm "$from" localhost/medmamba-base:bookworm >/dev/null
    rm -rf "$scratch/base"
  }
  timed make_base
  base=localhost/medmamba-base:bookworm
fi

say "$target image by buildah"
options=(--isolation chroot --layers=false -f docker/Dockerfile --target "$target" --build-arg "BASE=$base"
  --build-arg "REVISION=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)")
if [ -n "$links" ]; then
  options+=(--volume "$links:$links:ro" --build-arg "PIP_FIND_LINKS=$links")
fi
begun=$SECONDS # not `timed`, in which a failure before || would be lost
buildah bud -q "${options[@]}" -t "localhost/medmamba:$target" . >"$scratch/build.log" 2>&1 ||
  { tail -n 40 "$scratch/build.log"; exit 1; }
echo "   $((SECONDS - begun)) s"
container=$(buildah from "localhost/medmamba:$target")
root=$(buildah mount "$container")
unpacked=$(du -sm "$root" | cut -f1)
echo "   $unpacked MiB unpacked, $(tar -C "$root" -cf - . | gzip -1 | wc -c | awk '{printf "%.0f", $1 / 2^20}') MiB packed"
if [ "$target" = cpu ] && [ $((unpacked * 1048576)) -gt 1500000000 ]; then
  echo "   that is over the 1500 MB an image without CUDA may have: was torch a build with CUDA? See --find-links" >&2
  exit 1
fi
buildah inspect --format '   entry point {{.OCIv1.Config.Entrypoint}}, user {{.OCIv1.Config.User}}' "$container"

say "what must not be inside"
unwanted=(g++ c++ pip3)
if [ "$target" = cpu ]; then unwanted+=(gcc cc); fi
for tool in "${unwanted[@]}"; do
  if [ -e "$root/usr/bin/$tool" ]; then echo "   $tool is in the image" >&2; exit 1; fi
done
[ -z "$(find "$root" -xdev -perm /6000 -type f)" ] || { echo "   setuid files are in the image" >&2; exit 1; }
echo "   no ${unwanted[*]}, no setuid file"

mkdir -m 0777 "$scratch/out"
chmod 0755 "$scratch"
uid=12345
# The image's own environment, read-only, without network, capabilities or a known user.
within() {
  bwrap --ro-bind "$root" / --dev /dev --proc /proc --tmpfs /tmp --chmod 1777 /tmp \
    --ro-bind "$images" /in --ro-bind "$model" /model --bind "$scratch/out" /out \
    --unshare-net --unshare-pid --unshare-ipc --unshare-uts --die-with-parent --new-session --clearenv \
    --setenv PATH /opt/medmamba/bin:/usr/bin:/bin --setenv MEDMAMBA_CACHE_DIR /tmp/medmamba --setenv HOME / \
    --setenv PYTHONDONTWRITEBYTECODE 1 \
    --cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID --cap-add CAP_SETPCAP \
    setpriv --reuid "$uid" --regid "$uid" --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs \
    "$@"
}
inside() { within /usr/bin/tini -s -- /usr/local/bin/medmamba-entrypoint "$@"; }

say "as root: refused"
if uid=0 inside --version; then echo "   root was accepted" >&2; exit 1; fi

say "medmamba doctor"
inside doctor

if [ "$target" = cuda ]; then
  say "compiling and loading a C library that knows Python, as Triton does at first use"
  # shellcheck disable=SC2016  # expanded inside
  within sh -euc 'mkdir -p "$MEDMAMBA_CACHE_DIR" && cd "$MEDMAMBA_CACHE_DIR"
    printf "#include <Python.h>\nint answer(void) { return 42; }\n" >answer.c
    gcc -shared -fPIC "-I$(python -c "import sysconfig; print(sysconfig.get_path(\"include\"))")" -o answer.so answer.c
    python -c "import ctypes; print(\"  \", ctypes.CDLL(\"./answer.so\").answer())"'
fi

say "medmamba predict, cold"
timed inside predict -i /in -o /out -m /model
echo "   again: nothing to do"
timed inside predict -i /in -o /out -m /model
inside verify /out

say "masks"
find "$scratch/out" -maxdepth 1 -name '*.nii.gz' -printf '   %f %s bytes, uid %U, mode %m\n' | sort
made=$(find "$scratch/out" -maxdepth 1 -name '*.nii.gz' | wc -l)
wanted=$(find "$images" -maxdepth 1 -name '*_0000.nii.gz' | wc -l)
[ "$made" = "$wanted" ] || { echo "   $wanted cases, $made masks" >&2; exit 1; }

say "passed"
