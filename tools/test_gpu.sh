#!/bin/sh
# The `#| cuda` cells, with whatever Python has torch; what the machine lacks is named, and the rest runs. Needs neither network nor pytest.
set -eu
cd "$(dirname "$0")/.."
PY=${PYTHON:-python3}
test -x .venv/bin/python && PY=.venv/bin/python
exec "$PY" tools/cuda_cells.py "$@"
