"""Prints a pattern that matches the notebooks that start vLLM or Ray: `nbdev-test --skip-file-re "$(python tools/engines.py)"`.

pytest runs all of them, so nbdev-test need not start every engine again.
"""
import json
import re
from pathlib import Path

STARTS = re.compile(r"^\s*(?!def |class ).*(\bserving\(|\bLLM\(|with engine\(|run_bench\(|ray\.init\(|\bserver\(|run_order\()", re.MULTILINE)
LEFT_OUT = ("#| export", "#| slow", "#| cuda", "#| notest")


def starts_an_engine(path):
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    return any(STARTS.search(s) for s in cells if not s.startswith(LEFT_OUT))


if __name__ == "__main__":
    books = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb"))
    print("|".join(f"^{re.escape(p.name)}$" for p in books if starts_an_engine(p)))
