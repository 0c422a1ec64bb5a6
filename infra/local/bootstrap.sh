#!/bin/sh
# Finds (or installs) a Python to run bootstrap.py with, and hands over to it. Needs nothing but a POSIX shell.
# Usage: infra/local/bootstrap.sh [MODULE ARGS...]   e.g. infra/local/bootstrap.sh infra.local up
set -eu
cd "$(dirname "$0")/../.."

for python in python3 /usr/bin/python3; do
    if command -v "$python" >/dev/null 2>&1 && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
        exec "$python" -m infra.local.bootstrap "$@"
    fi
done

# A bare Debian has no Python at all; python3-venv brings it along.
install='apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends python3-venv'
if [ "$(id -u)" = 0 ]; then
    as_root='sh -c'
elif command -v sudo >/dev/null 2>&1; then
    as_root='sudo sh -c'
else
    echo "roundhouse: no Python here, and no sudo to install it: run 'apt-get install python3-venv' as root, then run this again" >&2
    exit 1
fi
echo "  no Python here: installing python3-venv"
mkdir -p .local/logs
if ! $as_root "$install" >.local/logs/python.log 2>&1; then
    echo "roundhouse: Python could not be installed: check the network, and run it again (all of it: .local/logs/python.log)" >&2
    exit 1
fi
exec /usr/bin/python3 -m infra.local.bootstrap "$@"
