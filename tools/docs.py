"""The docs site, `make docs`: every notebook as a page in reading order, an API reference, search; into _docs/site.

Pages are made from what is committed: nothing is run, and nothing of the package is imported.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "_docs/pages", ROOT / "_docs/site"
GROUPS = {"Start here": "69 79 70", "Learn lengths": "0", "Score prompts": "1", "Order the queue": "2", "Serve": "3", "Foresee": "4",
          "Engines and fleets": "5", "Commands": "6", "Studies": "7 8"}
CONFIG = dict(
    site_name="pars_nb", docs_dir="pages", site_dir="site", use_directory_urls=False, strict=True,
    theme=dict(name="material", font=False, features=["navigation.footer", "navigation.indexes", "navigation.top", "toc.follow"],
               palette=dict(primary="indigo")),
    extra_css=["site.css"], plugins=["search"],
    markdown_extensions=["tables", "md_in_html", "pymdownx.superfences", "pymdownx.highlight", dict(toc=dict(permalink=True))],
    not_in_nav="CHANGELOG.md\nCONTRIBUTING.md\nnbs/99_moved.md\n",
    validation=dict(links=dict(anchors="info", unrecognized_links="warn")),
)
CSS = """.md-typeset blockquote { font-size: 1.1em } .md-typeset img { background: white }
.md-typeset table:not([class]) th { min-width: 0 } .md-typeset .dataframe { display: block; overflow-x: auto; border: 0; font-size: .7rem }
.md-typeset .dataframe td, .md-typeset .dataframe th { padding: .2em .8em; text-align: right }
"""


def cells_of(book):
    "Cells as they are read: without directives, and without what is hidden."
    for cell in book.cells:
        if cell.cell_type == "markdown":
            yield cell
        elif not re.search(r"^#\| ?(hide|default_exp)\b", cell.source, re.MULTILINE):
            shown = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip()
            outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
            if shown or outputs:
                yield nbformat.v4.new_code_cell(shown, outputs=outputs)


def to_pages(text):
    "Links to notebooks lead to pages, links to folders of results to their list."
    text = re.sub(r"\]\(((?:\.\./)*(?:nbs/)?\w+)\.ipynb\)", r"](\1.md)", text)
    text = re.sub(r"\]\(((?:\w+\.ipynb)?)#([^)]*)\)", lambda m: f"]({m[1].replace('.ipynb', '.md')}#{m[2].lower()})", text)
    text = re.sub(r"\]\(\.\./results/\w+\)", "](../results/README.md)", text)
    return text.replace("](index.md)", "](../index.md)").replace("](../nbs/index.md)", "](../index.md)")


def page_of(path):
    "A notebook as Markdown, its figures beside it."
    book = nbformat.read(path, as_version=4)
    made = nbformat.v4.new_notebook(cells=list(cells_of(book)), metadata=dict(language_info=dict(name="python")))
    files = dict(unique_key=path.stem, output_files_dir=path.stem)
    text, resources = MarkdownExporter().from_notebook_node(made, resources=files)
    for name, data in resources["outputs"].items():
        (PAGES / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / "nbs" / name).write_bytes(data)
    text = re.sub(r"<style scoped>.*?</style>\s*", "", text, flags=re.DOTALL)
    (PAGES / "nbs" / f"{path.stem}.md").write_text(to_pages(text), encoding="utf-8")


def head_of(node, lines):
    "What stands before a definition's body, comments on parameters and all."
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    body = node.body[0].lineno - 1
    return "\n".join(lines[first - 1 : max(body, node.lineno)])


def fields_of(node, lines):
    "A class's own fields, with their comments."
    return [lines[i] for part in node.body if isinstance(part, ast.AnnAssign) for i in range(part.lineno - 1, part.end_lineno)]


def entry(node, lines, depth, prefix=""):
    "One definition of the reference: heading, what it says of itself, and how it is called."
    head = head_of(node, lines)
    inner = []
    if isinstance(node, ast.ClassDef):
        head = "\n".join([head, *fields_of(node, lines)])
        inner = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and (n.name == "__init__" or n.name[0] != "_")]
    width = min((len(o) - len(o.lstrip()) for o in head.splitlines() if o.strip()), default=0)
    code = "\n".join(o[width:] for o in head.splitlines())
    yield f"{'#' * depth} {prefix}{node.name}\n\n{ast.get_docstring(node) or ''}\n\n```python\n{code}\n```\n"
    for n in inner:
        yield from entry(n, lines, depth + 1, f"{node.name}.")


def reference(module, notebook):
    "The public names of a module, from its source alone."
    text = module.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
    parts = [f"# {module.stem}\n\n> {ast.get_docstring(tree) or ''}\n\nWritten and tested in [{notebook}](../nbs/{notebook}.md).\n"]
    for node in tree.body:
        if getattr(node, "name", None) in public:
            parts += entry(node, lines, 2)
    (PAGES / "api" / f"{module.stem}.md").write_text("\n".join(parts), encoding="utf-8")


def modules():
    "Module → the notebook that it comes from, in reading order."
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        if found := re.search(r"#\| ?default_exp (\w+)", path.read_text(encoding="utf-8")):
            yield ROOT / f"pars_nb/{found.group(1)}.py", path.stem


def navigation(books):
    "Notebooks by purpose, each group in reading order."
    first = [stem for number in GROUPS["Start here"].split() for stem in books if stem.startswith(number)]
    yield {"Start here": ["index.md", *(f"nbs/{stem}.md" for stem in first)]}
    for name, digit in list(GROUPS.items())[1:]:
        yield {name: [f"nbs/{stem}.md" for stem in books if stem.startswith(tuple(digit.split())) and stem not in first]}
    yield {"Results": ["results/README.md"]}
    yield {"API": [f"api/{module.stem}.md" for module, _ in modules()]}


def write_pages():
    "All pages, and what they link to."
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    for folder in ("nbs", "api"):
        (PAGES / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "results", PAGES / "results", ignore=shutil.ignore_patterns("*.log"))
    for folder in ("dashboards", "studies/written"):
        shutil.copytree(ROOT / folder, PAGES / folder)
    for source, name in (("README.md", "index.md"), ("CONTRIBUTING.md", "CONTRIBUTING.md"), ("CHANGELOG.md", "CHANGELOG.md")):
        (PAGES / name).write_text(to_pages((ROOT / source).read_text(encoding="utf-8")), encoding="utf-8")
    for path in (*PAGES.rglob("results/**/*.md"), *PAGES.rglob("studies/**/*.md")):
        path.write_text(to_pages(path.read_text(encoding="utf-8")), encoding="utf-8")
    books = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    for path in books:
        page_of(path)
    for module, notebook in modules():
        reference(module, notebook)
    (PAGES / "site.css").write_text(CSS, encoding="utf-8")
    nav = list(navigation([p.stem for p in books if p.stem != "99_moved"]))
    (ROOT / "_docs/mkdocs.yml").write_text(yaml.safe_dump(CONFIG | dict(nav=nav), sort_keys=False, allow_unicode=True), encoding="utf-8")


def main():
    start = time.perf_counter()
    write_pages()
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "-f", ROOT / "_docs/mkdocs.yml"], env=os.environ | dict(NO_MKDOCS_2_WARNING="1"))
    print(f"{len(list(SITE.rglob('*.html')))} pages in {time.perf_counter() - start:.0f} s: _docs/site/index.html")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
