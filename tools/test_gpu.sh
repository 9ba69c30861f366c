#!/bin/sh
# The `#| cuda` cells, with whatever Python has a CUDA torch; what the machine lacks is skipped by name.
set -eu
cd "$(dirname "$0")/.."
PY=${PYTHON:-python3}
test -x .venv/bin/python && PY=.venv/bin/python
if ! "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no GPU here (no CUDA device that torch can use): the cuda cells were not run"
    exit 0
fi
books="nbs/03_ranker.ipynb nbs/04_train.ipynb nbs/06_score.ipynb"
if "$PY" -c 'import vllm' 2>/dev/null; then
    books="$books nbs/08_scheduler.ipynb nbs/10_bench.ipynb"
else
    echo "skipped: nbs/08_scheduler.ipynb, nbs/10_bench.ipynb (no vLLM for CUDA here)"
fi
exec "$PY" -m pytest -q --flags cuda -m cuda $books
