"""A real browser, headless: drags the sliders of 79_what_if in JupyterLab, and takes the pictures of the docs site in docs/.

Needs `chromium` on the path (`apt install chromium`) and the extras lab and browser. Not part of `make test`.
"""
import io
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SITE, SHOTS = ROOT / "_docs/site", ROOT / "docs"
PAGES = dict(start="index.html", request="nbs/69_one_request.html", what_if="nbs/79_what_if.html", api="api/tail.html")
WIDTHS = dict(phone=(390, 844), desktop=(1280, 800))
MOST = 150_000  # bytes of a picture


@contextmanager
def lab(folder):
    "JupyterLab on a folder, without a password, for this machine alone; gives its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [f"--port={port}", "--no-browser", "--ip=127.0.0.1", "--IdentityProvider.token=", "--allow-root", f"--ServerApp.root_dir={folder}",
             "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = open(Path(folder) / "lab.log", "w")
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *flags], stdout=log, stderr=log, env=os.environ | dict(JUPYTER_PLATFORM_DIRS="1"))
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api").close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise RuntimeError(f"JupyterLab does not answer: {Path(folder) / 'lab.log'}")
        yield address
    finally:
        process.terminate()
        process.wait(20)


def drag(page, slider, presses=6):
    "Seconds from each step of a slider to the new picture, as the browser sees them."
    slider.scroll_into_view_if_needed()
    slider.focus()
    seconds = []
    for _ in range(presses):
        before, start = page.locator(".widget-image").first.get_attribute("src"), time.perf_counter()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("src => document.querySelector('.widget-image').src !== src", arg=before, timeout=30_000)
        seconds.append(time.perf_counter() - start)
    return seconds


def what_if(browser):
    "Run the notebook in JupyterLab and drag each slider."
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "nbs/79_what_if.ipynb", folder)
        with lab(folder) as address:
            page = browser.new_page(viewport=dict(width=1280, height=1000))
            page.goto(f"{address}/lab/tree/79_what_if.ipynb?reset")
            page.wait_for_selector(".jp-Notebook", timeout=120_000)
            page.wait_for_timeout(3000)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).first.click()
            page.wait_for_selector(".widget-image", timeout=300_000, state="attached")
            page.wait_for_function("!document.querySelector('.jp-Notebook').innerText.includes('[*]')", timeout=300_000)
            assert not page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count(), "a cell failed"
            names, sliders = ["load", "tau", "tail", "lane", "replicas"], page.locator(".widget-slider [role=slider], .widget-slider .noUi-handle")
            seen = {name: drag(page, sliders.nth(k), 3 if name == "replicas" else 6) for k, name in enumerate(names)}
            page.screenshot(path=folder + "/lab.png")
            keep(Image.open(folder + "/lab.png"), SHOTS / "what_if_lab.png")
            return seen


def keep(picture, path):
    "An 8-bit PNG under the bound."
    for scale in (1, 0.8, 0.6, 0.4):
        out = io.BytesIO()
        small = picture.convert("RGB").resize([round(scale * side) for side in picture.size], Image.LANCZOS)
        small.quantize(64).save(out, "PNG", optimize=True)
        if out.tell() < MOST:
            break
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(out.getvalue())


def shots(browser):
    "The pages of the site at two widths; a page must not be wider than the screen."
    for width, (w, h) in WIDTHS.items():
        page = browser.new_page(viewport=dict(width=w, height=h))
        for name, address in PAGES.items():
            page.goto(f"file://{SITE / address}")
            page.wait_for_load_state("load")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= w, f"{address} is {wide} pixels wide on a screen of {w}"
            keep(Image.open(io.BytesIO(page.screenshot())), SHOTS / f"{name}_{width}.png")
        page.close()


def main():
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        if "lab" not in sys.argv:
            shots(browser)
            print(f"{len(PAGES) * len(WIDTHS)} pictures in docs/")
        if "site" not in sys.argv:
            for name, seconds in what_if(browser).items():
                print(f"{name:9} median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s over {len(seconds)} steps")
        browser.close()


if __name__ == "__main__":
    main()
