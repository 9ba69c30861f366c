"""Makes the figures in the notebooks small: 8-bit PNG, under 60 kB. `--check` only names those that are not."""
import base64
import io
import json
import sys
from pathlib import Path

from PIL import Image

MOST = 60_000  # bytes


def small(data):
    "The same picture as an 8-bit PNG, as large as it may be."
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    for scale, colours in ((1, 128), (1, 32), (0.7, 64), (0.5, 64), (0.5, 16), (0.35, 16)):
        size = [max(1, round(scale * side)) for side in picture.size]
        out = io.BytesIO()
        picture.resize(size, Image.LANCZOS).quantize(colours).save(out, "PNG", optimize=True)
        if out.tell() <= MOST:
            break
    return out.getvalue()


def shrink(path, check):
    "How many figures of a notebook are, or were, too large."
    book, found = json.loads(path.read_text(encoding="utf-8")), 0
    for data in (o.get("data", {}) for c in book["cells"] for o in c.get("outputs", [])):
        if "image/png" in data and len(png := base64.b64decode("".join(data["image/png"]))) > MOST:
            found += 1
            data["image/png"] = base64.b64encode(small(png)).decode()
    if found and not check:
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return found


def main():
    check = "--check" in sys.argv
    found = {p.name: n for p in sorted((Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb")) if (n := shrink(p, check))}
    print(f"figures over {MOST:,} bytes: {found}" if found else "all figures are small")
    sys.exit(bool(found) and check)


if __name__ == "__main__":
    main()
