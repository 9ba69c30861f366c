"""Collects the notebooks: one pytest item for each cell that asserts.

A notebook's cells run in order in a Jupyter kernel of its own, as "Run all" would run them. An item runs every cell up to and
including its own that has not run yet; the last item that runs also runs what follows it. Cells flagged `slow`, `cuda` or
`notest` are left out unless `--flags` names the flag.
"""
import ast
import os
import re
from contextlib import ExitStack

import nbformat
import pytest
from kernels import Forks
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

FLAGS = ("slow", "cuda", "notest")
os.environ.setdefault("IN_TEST", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two notebooks side by side with two spinning threads each take ten times as long


def pytest_addoption(parser):
    parser.addoption("--flags", default="", help="run cells with these flags too: slow, cuda, notest")


def pytest_collect_file(parent, file_path):
    if file_path.suffix == ".ipynb":
        return Notebook.from_parent(parent, path=file_path)


def asserts(source):
    "Does this cell assert: an `assert`, or a call of `test_…`?"
    try:
        tree = ast.parse("\n".join(o for o in source.splitlines() if not o.lstrip().startswith(("%", "!"))))
    except SyntaxError:
        return False
    names = (getattr(n.func, "id", "") for n in ast.walk(tree) if isinstance(n, ast.Call))
    return any(isinstance(n, ast.Assert) for n in ast.walk(tree)) or any(n.startswith("test_") for n in names)


def flags_of(source):
    "The flags among a cell's directives: the `#|` lines that it begins with."
    head = re.match(r"(?:#\|.*\n?)*", source).group()
    return {f for f in FLAGS if re.search(rf"^#\|\s*{f}\b", head, re.MULTILINE)}


class Notebook(pytest.File):
    "The code cells of a notebook and the kernel they run in."

    def collect(self):
        self.book = nbformat.read(self.path, as_version=4)
        self.cells = [(i, c) for i, c in enumerate(self.book.cells) if c.cell_type == "code" and c.source.strip()]
        self.client, self.done, self.broken, self.held = None, 0, None, ExitStack()
        items = [k for k, (_, c) in enumerate(self.cells) if asserts(c.source)]
        wanted = set(self.config.getoption("--flags").split())
        self.skip = {k for k, (_, c) in enumerate(self.cells) if flags_of(c.source) - wanted}
        last = max((k for k in items if k not in self.skip), default=None)  # it closes the kernel
        for k in items:
            item = Cell.from_parent(self, name=f"cell {k + 1}", index=k, stop=k + 1 if k != last else len(self.cells))
            for flag in flags_of(self.cells[k][1].source):
                item.add_marker(flag)
            yield item

    def run_until(self, stop):
        "Run what has not run yet, up to the cell at `stop`."
        if self.client is None:
            self.client = NotebookClient(self.book, timeout=None, kernel_name="python3", kernel_manager_class=Forks,
                                         resources=dict(metadata=dict(path=str(self.path.parent))))
            self.held.enter_context(self.client.setup_kernel())
        if self.broken:
            pytest.fail(f"an earlier cell of {self.path.name} failed ({self.broken})", pytrace=False)
        for k in range(self.done, stop):
            self.done = k + 1
            if k not in self.skip:
                self.run(k)
        if stop == len(self.cells):
            self.held.close()

    def run(self, k):
        place, cell = self.cells[k]
        try:
            self.client.execute_cell(cell, place)
        except (CellExecutionError, DeadKernelError) as e:
            self.broken = f"cell {k + 1}: {getattr(e, 'ename', type(e).__name__)}"
            self.held.close()
            raise CellError(re.sub(r"\x1b\[[0-9;]*m", "", str(e))) from e


class CellError(Exception):
    "A cell raised; its text is the cell and the traceback."


class Cell(pytest.Item):
    "One asserting cell."

    def __init__(self, *, index, stop, **kw):
        super().__init__(**kw)
        self.index, self.stop = index, stop

    def runtest(self):
        if self.index in self.parent.skip:
            pytest.skip("flagged " + ", ".join(m.name for m in self.iter_markers() if m.name in FLAGS))
        self.parent.run_until(self.stop)

    def repr_failure(self, excinfo, style=None):
        if excinfo.errisinstance(CellError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, f"{self.path.name} {self.name}"


def pytest_sessionfinish(session):
    "Kernels of notebooks that were stopped half-way (`-x`, Ctrl-C)."
    for book in {item.parent for item in session.items if isinstance(item, Cell)}:
        book.held.close()
