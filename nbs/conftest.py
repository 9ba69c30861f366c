"""Collects the notebooks: one pytest item for each cell that asserts.

A notebook's cells run in order in one shell, as in Jupyter. An item runs every cell up to and including its own that
has not run yet; the last item of a notebook also runs what follows it. Cells flagged `slow`, `cuda` or `notest` are left
out unless `--flags` names the flag.
"""
import ast
import os
import traceback
from pathlib import Path

import pytest
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.test import nb_test_cells

FLAGS = ("slow", "cuda", "notest")
os.environ.setdefault("IN_TEST", "1")
os.environ.setdefault("MPLBACKEND", "agg")


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


class Notebook(pytest.File):
    "The cells of a notebook and the shell they run in."

    def collect(self):
        self.shell, self.todo = None, nb_test_cells(self.path, (), ())
        flags = [{f for f in FLAGS if f in (c.directives_ or {})} for c in self.todo]
        items = [i for i, c in enumerate(self.todo) if asserts(c.source)]
        wanted = set(self.config.getoption("--flags").split())
        self.skip = {i for i, f in enumerate(flags) if f - wanted}
        for i in items:
            stop = i + 1 if i != items[-1] else len(self.todo)
            item = Cell.from_parent(self, name=f"cell {i + 1}", index=i, stop=stop)
            for flag in flags[i]:
                item.add_marker(flag)
            yield item

    def run_until(self, stop):
        if self.shell is None:
            self.shell, self.done, self.broken = CaptureShell(self.path), 0, None
            self.shell.run_cell(f"import os; os.chdir({str(Path(self.path).parent)!r})")
        if self.broken:
            pytest.fail(f"an earlier cell of {self.path.name} failed ({self.broken})", pytrace=False)
        for i in range(self.done, stop):
            self.done = i + 1
            if i not in self.skip:
                self._run(i)

    def _run(self, i):
        result = self.shell.run_cell(self.todo[i].source)
        if error := result.error_before_exec or result.error_in_exec:
            self.broken = f"cell {i + 1}: {type(error).__name__}"
            raise CellError(self.todo[i].source + "\n\n" + "".join(traceback.format_exception(error))) from error


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
        return self.path, None, f"{Path(self.path).name} {self.name}"


def pytest_configure(config):
    get_config(config.rootpath)  # a clear error now where pyproject.toml is not found
