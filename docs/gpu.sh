#!/usr/bin/env bash
# What wants a CUDA GPU: the tables of `lightning-ntk benchmark`, one after the other.
#
#   docs/gpu.sh gather        where there is a network: what a machine with torch and Lightning alone lacks,
#                             into build/wheels
#   docs/gpu.sh [TABLE ...]   on the machine with the GPU: takes build/wheels if they are there, and measures tables
#                             (default: kernel steps memory shots batch data resnet12), each into $OUT/TABLE
#
# PYTHON: python3, or .venv/bin/python, which needs no wheels. OUT: runs/benchmark-cuda. DEVICE=cpu and SETTINGS=--quick
# try it without a GPU; SETTINGS may hold more of what `lightning-ntk benchmark --help` lists.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/benchmark-cuda}
WHEELS=build/wheels

if [ "${1:-}" = gather ]; then
  mkdir -p "$WHEELS"
  # Pure Python, for any version of it. learn2learn is compiled where it runs, with the Cython that is there.
  "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$WHEELS" \
    hydra-core==1.3.* "omegaconf<2.4" antlr4-python3-runtime==4.9.3 gym==0.26.2 gym-notices platformdirs
  "$PYTHON" -m pip download --quiet --no-deps --no-binary learn2learn --dest "$WHEELS" learn2learn==0.2.0
  ls "$WHEELS"
  exit
fi

if [ -d "$WHEELS" ] && ! "$PYTHON" -c "import learn2learn, hydra" 2>/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  # Not by pip, whose older versions do not pass on that the Cython files are to be compiled anew.
  tar -xzf "$WHEELS"/learn2learn-*.tar.gz -C "$site"
  (cd "$site"/learn2learn-*/ && "$PYTHON" setup.py --quiet build_ext --inplace >build.log 2>&1) ||
    { tail -n 20 "$site"/learn2learn-*/build.log >&2; exit 1; }
  mv "$site"/learn2learn-*/learn2learn "$site"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

[ $# -gt 0 ] || set -- kernel steps memory shots batch data resnet12
for table in "$@"; do
  "$PYTHON" -m lightning_ntk.cli benchmark device="${DEVICE:-cuda}" tables="$table" out="$OUT/$table" ${SETTINGS:-}
done
