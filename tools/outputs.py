"""What a reader on a code host sees: every notebook has outputs, and none holds what changes from run to run.

`--strip` (part of `make notebooks`) first takes out widgets' views, warnings on stderr, the addresses of objects and the folders of paths.
Notebooks without outputs and cells over their bound are listed; they fail the check only with `--strict`.
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURE = 60_000  # bytes
TEST, EXPORT = 12, 40  # lines of a cell
WITHOUT = {"99_moved"}  # nothing to see: names that have moved
FORBIDDEN = {
    "a path": r"(?<![\w.:/])/(?:work|tmp|home|root|usr|opt|var|mnt)/\w|site-packages",
    "an address": r"\b0x[0-9a-f]{6,}|\b\d{1,3}(?:\.\d{1,3}){3}\b|localhost:(?!80)\d|https?://(?!arxiv\.org|localhost:80|.{0,3}…)\w",
    "a traceback": r"Traceback \(most recent call last\)",
}
WIDGET = "application/vnd.jupyter.widget-view+json"


def books():
    "Name → notebook."
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "nbs").glob("*.ipynb"))}


def outputs(book):
    "Cell number and output, one after another."
    for i, cell in enumerate(book["cells"]):
        yield from ((i, o) for o in cell.get("outputs", []))


def text_of(output):
    "All that an output says, pictures left out."
    said = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if not k.startswith("image/") and k != WIDGET)]
    return "\n".join("".join(part) if isinstance(part, list) else str(part) for part in said)


def wrong_outputs(name, book):
    "What an output must not hold."
    for i, output in outputs(book):
        for what, pattern in FORBIDDEN.items():
            if output.get("output_type") == "error" or re.search(pattern, text_of(output)):
                yield f"{name} cell {i}: its output holds {'an error' if output.get('output_type') == 'error' else what}"
        picture = output.get("data", {}).get("image/png", "")
        if len(base64.b64decode("".join(picture))) > FIGURE:
            yield f"{name} cell {i}: a figure over {FIGURE:,} bytes; run `python tools/figures.py`"
        if WIDGET in output.get("data", {}) or output.get("name") == "stderr":
            yield f"{name} cell {i}: a widget's view or a warning is kept; run `python tools/outputs.py --strip`"


def silent(name, book):
    "A notebook with code and without outputs."
    if name not in WITHOUT and not any(True for _ in outputs(book)):
        yield f"{name} has no outputs: run `make notebooks`"


def long_cells(name, book):
    "Cells over the bound; imports alone may be longer."
    for i, cell in enumerate(book["cells"]):
        lines = [o for o in "".join(cell["source"]).splitlines() if o.strip()]
        bound = EXPORT if lines and lines[0].startswith("#| export") else TEST
        code = [o for o in lines if not re.match(r"(from|import) |#\|", o)]
        if cell["cell_type"] == "code" and len(lines) > bound and len(code) > 2:
            yield f"{name} cell {i}: {len(lines)} lines, {bound} at most"


LOG = re.compile(r"^(?:\x1b\[\d+m)*(?:\((?:\w+ )?(?:pid=|raylet)|\(\S+ pid=\d+\)|(?:INFO|WARNING|ERROR) \d\d-\d\d |\[W\d+).*\n?", re.MULTILINE)


def plain(text):
    "The same text without an engine's log and the addresses of objects and hosts, and with paths that end where the machine begins."
    text = re.sub(r"(?:https?://)?\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?", "…", LOG.sub("", text))
    text = re.sub(r" at 0x[0-9a-f]{6,}", "", text)
    text = re.sub(r"(?<![\w.:/])/(?:work|tmp|home|root)/(?:[^/\s'\":,)]+/)*", "…/", text)
    return re.sub(r"\btmp[a-z0-9_]{8}\b", "tmp", text)


def strip(path):
    "Take out what changes from run to run."
    text = path.read_text(encoding="utf-8")
    book = json.loads(text)
    for cell in book["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
        for said in (part for o in cell.get("outputs", []) for part in (o, o.get("data", {}))):
            for key in {"text", "text/plain", "text/html", "text/markdown"} & said.keys():
                said[key] = [plain(t) for t in said[key]] if isinstance(said[key], list) else plain(said[key])
    new = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if new != text:
        path.write_text(new, encoding="utf-8")


def main():
    if "--strip" in sys.argv:
        for path in (ROOT / "nbs").glob("*.ipynb"):
            strip(path)
    shelf = books()
    wrong = [line for name, book in shelf.items() for line in wrong_outputs(name, book)]
    open_work = [line for check in (silent, long_cells) for name, book in shelf.items() for line in check(name, book)]
    print(*wrong, *open_work, sep="\n", end="\n" if wrong or open_work else "")
    figures = sum(any("image/png" in o.get("data", {}) for _, o in outputs(book)) for book in shelf.values())
    print(f"{len(shelf)} notebooks: {len(wrong)} outputs to mend, {len(open_work)} without outputs or over their bound; {figures} hold a figure")
    sys.exit(bool(wrong or open_work and "--strict" in sys.argv))


if __name__ == "__main__":
    main()
