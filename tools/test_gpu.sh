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
for need in pytest nbclient fastcore; do
    "$PY" -c "import $need" 2>/dev/null || { echo "skipped: all cuda cells ($need is not installed: pip install 'pars_nb[dev]')"; exit 0; }
done
books="$(ls nbs/*_ranker.ipynb nbs/*_train.ipynb nbs/*_score.ipynb)"
if "$PY" -c 'import vllm' 2>/dev/null; then
    books="$books $(ls nbs/*_scheduler.ipynb nbs/*_bench.ipynb)"
else
    echo "skipped: the cuda cells of scheduler and bench (no vLLM for CUDA here)"
fi
exec "$PY" -m pytest -q --flags cuda -m cuda $books
