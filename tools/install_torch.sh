#!/bin/sh
# Install the torch that constraints.txt pins:  tools/install_torch.sh [PYTHON]
#
# On Linux a plain `pip install torch` takes a CUDA build of several GB. On a machine without an NVIDIA GPU that is
# wasted, so the CPU build is tried first, in the ways that need no address written here.
set -eu

python=${1:-python}
version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
[ -n "$version" ] || { echo "error: constraints.txt pins no torch==VERSION" >&2; exit 1; }

say() { echo "install_torch: $*" >&2; }
installed() {
    "$python" -c "from importlib.metadata import version; print(version('torch').split('+')[0])" 2>/dev/null || true
}
wants_cpu_build() { [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; }

if [ "$(installed)" = "$version" ]; then
    say "torch $version is there"
    exit 0
fi

if wants_cpu_build; then
    # A CPU wheel may lie where pip is told to look. Its local version, unlike a plain one, never matches a CUDA build.
    say "no NVIDIA GPU: looking for a CPU build with pip (an error from pip here only means that uv is tried next)"
    "$python" -m pip install -c constraints.txt "torch==$version+cpu" && exit 0

    # uv knows PyTorch's own index of CPU builds.
    say "pip finds no CPU build: trying uv"
    "$python" -m pip install uv &&
        "$python" -m uv pip install --python "$python" -c constraints.txt --torch-backend=cpu "torch==$version" && exit 0

    say "no CPU build found: installing torch $version as pip finds it, perhaps a CUDA build of several GB"
fi
exec "$python" -m pip install -c constraints.txt "torch==$version"
