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
nodes = [
    nbformat.v4.new_markdown_cell(c.source) if c.cell_type == "markdown"
    else nbformat.v4.new_code_cell(c.source, outputs=[nbformat.from_dict(dict(o)) for o in c.get("outputs", [])])
    for c in cells
]
text, _ = MarkdownExporter().from_notebook_node(nbformat.v4.new_notebook(cells=nodes))
text = text.replace("](../", "](")  # links are relative to the project's root, not to nbs/
text = re.sub(r"\]\((\d\d_\w+\.ipynb)\)", r"](nbs/\1)", text)
text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
(root / "README.md").write_text("<!-- made from nbs/index.ipynb by `make docs-readme`: edit that -->\n\n" + text)
