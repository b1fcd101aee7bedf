#!/bin/sh
# Refuse to run as root, whose files annoy everybody else, unless told otherwise; then hand over to medmamba.
set -eu
if [ "${1:-}" = "--allow-root" ]; then
  shift
elif [ "$(id -u)" = 0 ]; then
  echo "medmamba: running as root inside the container is refused: masks would belong to root." >&2
  echo "Run with -u \"\$(id -u):\$(id -g)\", or put --allow-root before the command." >&2
  exit 6
fi
umask 077
# shellcheck disable=SC3045  # dash has it
ulimit -c 0
exec medmamba "$@"
