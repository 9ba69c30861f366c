"""The house rules that a linter does not know: arrows point one way, light rooms stay light, cells stay small."""
import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 40  # lines of an exported cell
LIGHT = ("errors pairs order glance template card score chat cost policy lane tail waiting signals learner foresight trust meters "
         "tenants deadlines room hub latency workload tiny engine console loop tools cli").split()
HEAVY = "torch vllm pandas scipy sklearn pyarrow"


def rooms():
    "Module → (number of its notebook, its file), for what is exported."
    out = {}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if found := re.search(r"#\| ?default_exp (\w+)", text):
            out[found.group(1)] = int(path.name[:2]), ROOT / f"pars_nb/{found.group(1)}.py"
    return out


def imported(file):
    "The package's own modules that a module imports, at the top or inside a function."
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("pars_nb.")):
            yield (node.module or "").removeprefix("pars_nb.").split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("pars_nb."))


def upward(all_rooms):
    "Imports that go back up: a room may use only what stands before it. `moved` forwards old names and is no room."
    for name, (number, file) in all_rooms.items():
        for other in imported(file):
            if other != "moved" and name != "moved" and all_rooms[other][0] >= number:
                yield f"{name} ({number:02}) imports {other} ({all_rooms[other][0]:02})"


def heavy(name):
    "What a light room pulls in that the serving host may not have, or should not wait for."
    code = f"import sys, pars_nb.{name}; print(*sorted(set({HEAVY!r}.split()) & set(sys.modules)))"
    if found := subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip():
        yield f"pars_nb.{name} pulls in {found}"


def long_cells():
    "Exported cells over the bound."
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            lines = [o for o in "".join(cell["source"]).splitlines() if o.strip()]
            if lines and lines[0].startswith("#| export") and len(lines) > MOST:
                yield f"{path.name} cell {i}: {len(lines)} lines"


def main():
    all_rooms = rooms()
    for name in all_rooms:
        importlib.import_module(f"pars_nb.{name}")
    wrong = [*upward(all_rooms), *long_cells()]
    for name in [n for n in LIGHT if n in all_rooms]:
        wrong += heavy(name)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(all_rooms)} rooms: all import" + ("" if wrong else ", arrows point one way, light rooms are light"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
