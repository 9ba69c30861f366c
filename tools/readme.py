"""README.md from nbs/index.ipynb: nbdev's processing (directives, hidden cells), then nbconvert's markdown.

nbdev-readme does the same through Quarto, which is more than one page needs.
"""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor

root = Path(__file__).resolve().parent.parent
nb = NBProcessor(root / "nbs/index.ipynb", rm_directives=True).nb
cells = [c for c in nb.cells if "hide" not in (c.get("directives_") or {})]


def node(c):
    "A cell as it stands in the README; of one with `#| echo: false` only what it shows, in Markdown."
    if c.cell_type == "markdown":
        return nbformat.v4.new_markdown_cell(c.source)
    if "echo:" in (c.get("directives_") or {}):
        return nbformat.v4.new_markdown_cell("".join(t for o in c.outputs for t in o.get("data", {}).get("text/markdown", "")))
    return nbformat.v4.new_code_cell(c.source, outputs=[nbformat.from_dict(dict(o)) for o in c.get("outputs", [])])


nodes = [node(c) for c in cells]
text, _ = MarkdownExporter().from_notebook_node(nbformat.v4.new_notebook(cells=nodes))
text = text.replace("](../", "](")  # links are relative to the project's root, not to nbs/
text = re.sub(r"\]\((\d\d_\w+\.ipynb)\)", r"](nbs/\1)", text)
text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
(root / "README.md").write_text("<!-- made from nbs/index.ipynb by `make docs-readme`: edit that -->\n\n" + text)
