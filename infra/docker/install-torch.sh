#!/bin/sh
# Installs torch into the environment whose pip is on PATH: install-torch.sh cpu|gpu REQUIREMENTS_FOLDER
#
# cpu: the CPU build where a configured index has one, asked for by its full version (plain `torch==X` would take the
#      default build although the CPU build lies at hand); without one the default build, as for gpu: about 3 GB.
# gpu: the default build, and the CUDA libraries that it loads at import.
set -eu

build=$1
requirements=$2

case $build in
cpu)
    cpu_only=$(mktemp)
    sed -E 's/^(torch==[0-9.]+)([[:space:]])/\1+cpu\2/' "$requirements/torch.txt" > "$cpu_only"
    if pip install --no-deps -r "$cpu_only"; then
        exec python -c 'import torch; assert not torch.version.cuda, torch.__version__'
    fi
    echo "no CPU build of torch was found (see above): taking the default build, about 3 GB; " \
        "name an index that has it by the build argument PIP_EXTRA_INDEX_URL" >&2
    ;;
gpu) ;;
*)
    echo "usage: install-torch.sh cpu|gpu REQUIREMENTS_FOLDER" >&2
    exit 64
    ;;
esac

pip install --no-deps -r "$requirements/torch.txt"
pip install --no-deps -r "$requirements/torch-cuda.txt"
exec python -c 'import torch; assert torch.version.cuda, torch.__version__'
