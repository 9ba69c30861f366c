#!/bin/sh
# What must hold before any test: notebooks and modules say the same, and the modules are sound by themselves.
set -eu
snapshot() { cat pars_nb/*.py nbs/*.ipynb README.md | sha256sum; }
before=$(snapshot)
nbdev-export
nbdev-clean
python scripts/readme.py
if [ "$before" != "$(snapshot)" ]; then
    echo "nbdev-export, nbdev-clean or docs-readme changed something: commit what they made"
    git --no-pager diff --stat || true
    exit 1
fi
ruff check -q
mypy
python - <<'PY'
import importlib, pathlib, subprocess, sys

for f in sorted(pathlib.Path("pars_nb").glob("[a-z]*.py")):
    importlib.import_module(f"pars_nb.{f.stem}")
code = "import sys, pars_nb.policy; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "pars_nb.policy pulls in torch or vllm"
lazy = "import sys, pars_nb.cli; sys.exit('vllm' in sys.modules)"
assert subprocess.run([sys.executable, "-c", lazy]).returncode == 0, "pars_nb.cli pulls in vllm"
print("modules: all import; policy needs neither torch nor vllm")
PY
