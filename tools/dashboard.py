"""Draws dashboards/grafana.json with a real Prometheus over a server that works: one that runs already, as during `pars bench --client vllm`,
or `pars serve` on the embedded LLM with a ranker that is trained here. Every question of the dashboard about the scheduler must have an
answer; some of them are drawn on Prometheus' own graph page by a headless browser. Needs Debian's `prometheus` and `chromium`.

    python tools/dashboard.py --out docs/dashboard.png
    python tools/dashboard.py --metrics 127.0.0.1:8000 --seconds 300 --out docs/dashboard.png
"""
import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from pars_nb.engine import free_port, local, running
from pars_nb.tiny import demo_prompts, tiny_llm

BOARD = Path(__file__).resolve().parent.parent / "dashboards/grafana.json"
DRAWN = ["Is there a queue?", "Is the order right?", "Time in the queue by predicted quartile, p50", "What the order did"]
WINDOW = "15s"  # in the place of Grafana's $__rate_interval


def questions():
    "Panel → its expressions; those about the score server are another process's."
    panels = json.loads(BOARD.read_text())["panels"]
    return {p["title"]: [t["expr"].replace("$__rate_interval", WINDOW) for t in p["targets"]] for p in panels if "pars_server" not in str(p)}


def small_ranker(folder):
    "Trained on a rule: the number in the prompt is the length. (How good it is does not matter here.)"
    from pars_nb.records import Record
    from pars_nb.train import TrainConfig, train

    recs = [Record(prompt_id=str(i), prompt=f"count to {i}", model="rule", lengths=(i,), capped=(False,)) for i in range(1, 300)]
    train(recs, folder, TrainConfig(encoder="tiny", epochs=6, batch_size=32), quiet=True)
    return folder


async def traffic(url, seconds, per_burst, seed=0):
    "A burst every ten seconds."
    from openai import AsyncOpenAI

    client, rng, prompts, tasks = AsyncOpenAI(base_url=url, api_key="-", timeout=300), random.Random(seed), demo_prompts(2000), []
    ask = client.chat.completions.create
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        asked = [dict(model=str(tiny_llm()), messages=[dict(role="user", content=rng.choice(prompts))], max_tokens=400) for _ in range(per_burst)]
        tasks += [asyncio.create_task(ask(**a)) for a in asked]
        await asyncio.sleep(10)
    await asyncio.gather(*tasks)
    return len(tasks)


def start_prometheus(target, folder):
    "Prometheus over one target, every second; the process and its address."
    port = free_port()
    (folder / "prometheus.yml").write_text(f"""global: {{scrape_interval: 1s}}
scrape_configs:
- job_name: vllm
  static_configs: [{{targets: ["{target}"]}}]
""")
    cmd = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    return subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), f"http://127.0.0.1:{port}"


def answers(prometheus, expr, seconds):
    "How many series and points an expression had over the last so many seconds."
    now = time.time()
    query = urllib.parse.urlencode(dict(query=expr, start=now - seconds, end=now, step=1))
    found = json.load(urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{query}"))["data"]["result"]
    return len(found), sum(v != "NaN" for series in found for _, v in series["values"])


def screenshot(prometheus, exprs, seconds, out):
    "Prometheus' own graph page, drawn by a headless browser, as an 8-bit PNG."
    from PIL import Image

    asked = {f"g{i}.{k}": v for i, e in enumerate(exprs) for k, v in dict(expr=e, tab=0, range_input=f"{seconds}s").items()}
    url = f"{prometheus}/classic/graph?{urllib.parse.urlencode(asked)}"
    subprocess.run(["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1000,{750 * len(exprs)}",
                    "--virtual-time-budget=20000", f"--screenshot={out}", url], check=True, capture_output=True, timeout=120)
    Image.open(out).convert("RGB").resize((640, 480 * len(exprs))).quantize(128).save(out, optimize=True)


def watch(target, work, out, wait):
    "Scrape a server while `wait` goes on, then ask every question and draw some."
    process, prometheus = start_prometheus(target, work)
    try:
        start = time.monotonic()
        wait()
        took = round(time.monotonic() - start)
        found = {title: [answers(prometheus, e, took) for e in exprs] for title, exprs in questions().items()}
        screenshot(prometheus, [questions()[t][0] for t in DRAWN], took, out)
    finally:
        process.terminate()
        process.wait(20)
    for title, each in found.items():
        print(f"{title}: " + ", ".join(f"{series} series, {points} points" for series, points in each))
    print(f"{took} s; {out}: {out.stat().st_size:,} bytes")
    return [title for title, each in found.items() if not any(points for _, points in each)]


def serve_and_watch(a, work):
    "The same over a server of its own."
    port = free_port()
    cmd = [sys.executable, "-c", "from pars_nb.cli import app; app()", "serve", str(tiny_llm()), "--ranker", str(small_ranker(work / "ranker")),
           "--max-num-seqs", "8", "--max-model-len", "2048", *local(port)]
    with running(cmd, port, log=work / "server.log") as url:
        return watch(f"127.0.0.1:{port}", work, a.out, lambda: asyncio.run(traffic(url, a.seconds, a.per_burst)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/dashboard.png"))
    parser.add_argument("--metrics", help="HOST:PORT of a server that runs")
    parser.add_argument("--seconds", type=int, default=90)
    parser.add_argument("--per-burst", type=int, default=60)
    a, work = parser.parse_args(), Path(tempfile.mkdtemp())
    a.out.parent.mkdir(parents=True, exist_ok=True)
    silent = watch(a.metrics, work, a.out, lambda: time.sleep(a.seconds)) if a.metrics else serve_and_watch(a, work)
    sys.exit(f"no answer to {silent}" if silent else 0)


if __name__ == "__main__":
    main()
