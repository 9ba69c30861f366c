"""Runs notebooks top to bottom in a real Jupyter kernel, offline: what "Run all" does in JupyterLab.

    python tools/kernels.py nbs/05_pairs.ipynb …     # these; all that start no engine where none is named

Cells flagged `slow` are left out; `cuda` and `notest` cells run, because they must say in one line what they miss, and go on.
"""
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
STARTS = re.compile(r"^\s*(?!def |class ).*(\bserving\(|\bLLM\(|with engine\(|run_bench\(|ray\.init\(|\bserver\()", re.MULTILINE)


def starts_an_engine(path):
    "Does a cell of this notebook, other than an exported or a slow one, start vLLM or Ray?"
    cells = (c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    return any(STARTS.search(s) for s in cells if not s.startswith(("#| export", "#| slow", "#| cuda", "#| notest")))


def run(path):
    "The notebook's name and what went wrong in it, or an empty text."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and c.source.startswith("#| slow"))]
    try:
        NotebookClient(nb, timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=str(path.parent)))).execute()
    except CellExecutionError as e:
        return path.name, str(e)
    return path.name, ""


def main():
    os.environ |= dict(HF_HUB_OFFLINE="1", MPLBACKEND="agg", IN_TEST="1")
    paths = [Path(p).resolve() for p in sys.argv[1:]] or [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if not starts_an_engine(p)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, paths))
    failed = [(name, error) for name, error in done if error]
    for name, error in failed:
        print(f"{name} does not run in a kernel:\n{error[-3000:]}\n")
    print(f"{len(done) - len(failed)} of {len(done)} notebooks run in a Jupyter kernel from top to bottom")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
