#!/usr/bin/env bash
# Build an image and predict inside it, hardened, without a Docker engine. For root on Debian 12.
#
#   docker/check.sh MODEL IMAGES [--target cpu|cuda] [--base IMAGE] [--find-links FOLDER]
#
# MODEL is a model folder, IMAGES a folder of NIfTI files for it. Without --base the base image is made by debootstrap.
# --find-links names a folder of wheels that pip prefers, a CPU build of torch for instance. The image is built by
# buildah and its command run by bubblewrap: read-only root, no network, no capability, an unknown uid.
set -euo pipefail

model=$(realpath "$1") images=$(realpath "$2")
shift 2
target=cpu base="" links=""
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
for tool in buildah debootstrap bwrap:bubblewrap; do
  command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -qq
  apt-get install -y -qq "${missing[@]}" >/dev/null
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
timed buildah bud -q "${options[@]}" -t "localhost/medmamba:$target" . >"$scratch/build.log" 2>&1 ||
  { tail -n 40 "$scratch/build.log"; exit 1; }
container=$(buildah from "localhost/medmamba:$target")
root=$(buildah mount "$container")
echo "   $(du -sm "$root" | cut -f1) MiB unpacked, $(tar -C "$root" -cf - . | gzip -1 | wc -c | awk '{printf "%.0f", $1 / 2^20}') MiB packed"
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
# The image's own environment and entry point, read-only, without network, capabilities or a known user.
inside() {
  bwrap --ro-bind "$root" / --dev /dev --proc /proc --tmpfs /tmp --chmod 1777 /tmp \
    --ro-bind "$images" /in --ro-bind "$model" /model --bind "$scratch/out" /out \
    --unshare-net --unshare-pid --unshare-ipc --unshare-uts --die-with-parent --new-session --clearenv \
    --setenv PATH /opt/medmamba/bin:/usr/bin:/bin --setenv MEDMAMBA_CACHE_DIR /tmp/medmamba --setenv HOME / \
    --setenv PYTHONDONTWRITEBYTECODE 1 \
    --cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID --cap-add CAP_SETPCAP \
    setpriv --reuid "$uid" --regid "$uid" --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs \
    /usr/bin/tini -s -- /usr/local/bin/medmamba-entrypoint "$@"
}

say "as root: refused"
if uid=0 inside --version; then echo "   root was accepted" >&2; exit 1; fi

say "medmamba doctor"
inside doctor

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
