#!/usr/bin/env bash
# Tests, agreement with the CPU and timings on a GPU, in nine minutes at most and without network: gpu.sh [--smoke].
# Real data sets: --data_path FOLDER or SLIFMR_DATA. Another interpreter: PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
