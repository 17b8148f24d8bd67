#!/usr/bin/env bash
# The kernels interpreted and compiled with the oldest Triton that is supported, in a virtual environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${OLDEST_VENV:-.venv-triton-3.6}
# Triton 3.6.0's interpreter needs numpy < 2.4.
requirements=(torch==2.13.0 triton==3.6.0 numpy==2.3.5 pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0
  hypothesis==6.170.15 expecttest==0.3.0 rich==15.0.0 safetensors==0.8.0)
if [ ! -e "$venv/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "${requirements[@]}"
  touch "$venv/.ready"
fi
export PYTHONPATH=. OMP_NUM_THREADS=1
"$venv/bin/python" -m pytest -n "${WORKERS:-2}" tests/kernels tests/ops tests/triton_interpreter \
  tests/gluon_interpreter -m "not slow"
PYTRANSFORMER_TEST_COMPILE=1 "$venv/bin/python" -m pytest tests/compile
