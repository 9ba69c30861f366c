#!/bin/sh
# What must hold before any test: notebooks and modules say the same, and the modules are sound by themselves.
set -eu
snapshot() { cat pars_nb/*.py nbs/*.ipynb README.md | sha256sum; }
before=$(snapshot)
nbdev-export
nbdev-clean
python tools/readme.py
if [ "$before" != "$(snapshot)" ]; then
    echo "nbdev-export, nbdev-clean or docs-readme changed something: commit what they made"
    git --no-pager diff --stat || true
    exit 1
fi
ruff check -q
mypy
python tools/results.py --check
python tools/house.py
python tools/outputs.py --strict
