#!/bin/sh
# Rehearse `make gpu-day` without a GPU, with the packages of a machine that has one:  tools/rehearse_gpu_day.sh FOLDER
#
# Makes FOLDER/venv with exactly these packages, about 5 GB; never run in CI. Not among them: deepspeed, webdataset and
# pydantic. The interpreter of triton 3.6 fails with numpy 2.4 and later, so the rehearsal takes an older numpy; compiled
# kernels do not depend on it.
set -eu

folder=${1:?give a folder for the environment, about 5 GB}
python=$folder/venv/bin/python
test -x "$python" || "${PYTHON:-python3}" -m venv "$folder/venv"
"$python" -m pip install -q torch==2.11.0 triton==3.6.0 'numpy<2.4' einops pandas matplotlib psutil pytest hypothesis networkx \
    safetensors pyyaml
exec make gpu-day INSTALLED=1 REHEARSE=1 PYTHON="$(realpath "$folder")/venv/bin/python"
