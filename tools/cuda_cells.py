"""The `#| cuda` cells with what is there: torch is enough; no Jupyter, no pytest, no network. A notebook's cells run in a process of its own.
A package that is missing is named, and only what needs it is left out.

    python tools/cuda_cells.py                                  # says so and stops where there is no GPU
    python tools/cuda_cells.py --anyway --without vllm scipy    # a rehearsal: on any machine, as if these were not installed
"""
import argparse
import ast
import json
import os
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
BOOKS = dict(ranker="scores on the GPU", train="training on the GPU", score="the scorer's thread on the GPU",
             scheduler="the order in vLLM on the GPU", bench="FCFS against PARS in vLLM on the GPU")


def flags(source):
    "The directives that a cell begins with."
    return set(re.findall(r"^#\|\s*(\w+)", re.match(r"(?:#\|.*\n?)*", source).group(), re.MULTILINE))


def cells(path):
    "The code cells up to the last `#| cuda` one, without those that are left out of any test."
    sources = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    last = max(i for i, s in enumerate(sources) if "cuda" in flags(s))
    return [s for s in sources[: last + 1] if not flags(s) & {"slow", "notest", "eval"}]


def pieces(source):
    "What runs as one: each statement of a cell that begins with imports, else the whole cell."
    tree = ast.parse(source)
    if not tree.body or not isinstance(tree.body[0], ast.Import | ast.ImportFrom):
        return [tree]
    return [ast.Module([node], []) for node in tree.body]


def binds(piece):
    "The names that a piece would have set."
    names = {n.id for n in ast.walk(piece) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {n.name for n in piece.body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}


def hide(names):
    "As if these were not installed."
    sys.modules |= dict.fromkeys(names)  # None: neither an import nor `find_spec` finds it


def stand_in():
    "What the cells use of fastcore.test, where fastcore is missing."
    def test_eq(a, b):
        assert a == b or str(a) == str(b), f"{a} != {b}"

    def test_close(a, b, eps=1e-5):
        import numpy as np
        assert np.allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=eps), f"{a} is not close to {b}"

    def test_fail(f, exc=Exception, contains="", msg="", args=None, kwargs=None):
        try:
            f(*(args or []), **(kwargs or {}))
        except exc as e:
            assert contains in str(e), f"{e} does not say {contains!r}"
            return
        raise AssertionError("it did not fail")

    found = types.ModuleType("fastcore.test")
    vars(found).update(test_eq=test_eq, test_close=test_close, test_fail=test_fail)
    sys.modules |= {"fastcore": types.ModuleType("fastcore"), "fastcore.test": found}


def missing_in(error):
    "The package whose absence is behind an error, or None."
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        if said := re.match(r"(\S+) is not installed", str(error)):  # as this package says it
            return said.group(1)
        error = error.__cause__ or error.__context__
    return None


def run(name):
    "One notebook; 0 where its cuda cells ran, 77 where they had to be left out, 1 where one failed."
    path = next(NBS.glob(f"[0-9][0-9]_{name}.ipynb"))
    os.chdir(NBS)
    room, lacking, ran = dict(__name__="__main__"), set(), True
    for source in cells(path):
        here, ok = "cuda" in flags(source), True
        for piece in pieces(source):
            try:
                exec(compile(piece, path.name, "exec"), room)
            except Exception as e:
                what = missing_in(e)
                if what is None and (not lacking or here and not isinstance(e, NameError)):
                    raise  # else it follows from what is lacking
                lacking |= {what} if what else set()
                ok = False
                for name in binds(piece):  # what needs them is left out too, not run with older values
                    room.pop(name, None)
        ran &= ok or not here
    if lacking:
        print(f"{path.stem}: {', '.join(sorted(lacking))} missing" + ("; its cuda cells ran all the same" if ran else ""))
    return 0 if ran else 77


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anyway", action="store_true", help="run where there is no GPU, too")
    parser.add_argument("--without", nargs="*", default=[], help="as if these packages were not installed")
    parser.add_argument("--book", choices=BOOKS, help="this one, in this process")
    a = parser.parse_args()
    hide(set(a.without))
    if a.book:
        if "fastcore" in a.without or find_spec("fastcore") is None:
            stand_in()
        sys.exit(run(a.book))
    try:
        import torch
    except ImportError:
        sys.exit("torch is not installed: no cuda cell can run")
    if not torch.cuda.is_available() and not a.anyway:
        print("no GPU here (no CUDA device that torch can use): the cuda cells were not run")
        return
    env = os.environ | dict(HF_HUB_OFFLINE="1", MPLBACKEND="agg", IN_TEST="1",
                            PYTHONPATH=os.pathsep.join([str(NBS.parent), os.environ.get("PYTHONPATH", "")]))
    failed = 0
    for name, what in BOOKS.items():
        code = subprocess.run([sys.executable, __file__, "--book", name, *(["--without", *a.without] if a.without else [])], env=env).returncode
        print({0: "passed", 77: "left out"}.get(code, "FAILED") + f": {what}", flush=True)
        failed += code not in (0, 77)
    sys.exit(failed)


if __name__ == "__main__":
    main()
