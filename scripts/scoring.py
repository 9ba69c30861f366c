"""What a score costs: the measurements behind nbs/24_scoring_speed.ipynb. Each command writes one JSON into results/scoring.

    python scripts/scoring.py speed   --ranker runs/real/alpaca_davinci003 --data ../shared/data/alpaca_davinci003.parquet
"""
import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import torch
import typer

from pars_nb.backends import FILES, load_backend, try_backend
from pars_nb.bench import CONTROL, BenchSettings, EngineSettings, engine, machine, make_workload
from pars_nb.cli import draw, unseen
from pars_nb.data import read, split
from pars_nb.metrics import summarise, tau_b
from pars_nb.ranker import load_ranker
from pars_nb.student import load_student

app = typer.Typer(add_completion=False)
Ranker = Annotated[Path, typer.Option(help="folder of the ranker, exported with `pars export`")]
Data = Annotated[Path, typer.Option(help="recorded lengths")]
OUT = Path(__file__).resolve().parent.parent / "results/scoring"


def write(name, **facts):
    "One JSON per command: the command, the machine, and what came out."
    OUT.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/scoring.py", *sys.argv[1:]])
    (OUT / f"{name}.json").write_text(json.dumps(dict(command=command, machine=machine(), **facts), indent=1) + "\n")


def timed(f, seconds=2.0, least=20):
    "Milliseconds of repeated calls: p50, p99, n."
    f(), f()
    t, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(t) < least:
        start = time.perf_counter()
        f()
        t.append(1e3 * (time.perf_counter() - start))
    return dict(p50_ms=float(np.median(t)), p99_ms=float(np.percentile(t, 99)), n=len(t))


# The recipe of the paper's release: PyTorch eager, every prompt padded to 128 tokens, one HTTP call per prompt.
RECIPE = """
import sys, torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from pars_nb.ranker import load_ranker
r, app = load_ranker(sys.argv[1]), FastAPI()
tok, model = r.tokenizer, r.model.eval()
class P(BaseModel): prompt: str
@app.post('/score')
def score(p: P):
    with torch.no_grad():
        x = tok(p.prompt, padding='max_length', truncation=True, max_length=128, return_tensors='pt')
        return {'score': model(**x).logits[0, 0].item()}
uvicorn.run(app, host='127.0.0.1', port=int(sys.argv[2]), log_level='error')
"""
OURS = "from pars_nb.cli_scoring import app; app()"


@contextmanager
def served(code, *args):
    "A score server in a process of its own; gives its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    p = subprocess.Popen([sys.executable, "-c", code, *(a.replace("PORT", port) for a in args)])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(480):
            try:
                httpx.post(f"{url}/score", json=dict(prompt="hello")).raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.25)
        yield url
    finally:
        p.terminate()
        p.wait(20)


def http_single(url, prompts, seconds=3.0):
    "One caller, one prompt a call, on a kept connection."
    with httpx.Client(base_url=url) as c:
        it = iter(range(10**9))
        return timed(lambda: c.post("/score", json=dict(prompt=prompts[next(it) % len(prompts)])).raise_for_status(), seconds, 50)


def http_many(url, prompts, callers):
    "`callers` at once, one prompt a call: prompts a second, and each call's time."
    async def go():
        todo, times = list(prompts), []
        async def caller(c):
            while todo:
                p, start = todo.pop(), time.perf_counter()
                (await c.post("/score", json=dict(prompt=p))).raise_for_status()
                times.append(1e3 * (time.perf_counter() - start))
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=callers), timeout=120) as c:
            start = time.perf_counter()
            await asyncio.gather(*(caller(c) for _ in range(callers)))
            return dict(callers=callers, prompts_per_s=len(times) / (time.perf_counter() - start), p50_ms=float(np.median(times)),
                        p99_ms=float(np.percentile(times, 99)))
    return asyncio.run(go())


@app.command()
def speed(ranker: Ranker, data: Data, student: Path | None = None, seconds: float = 2.0):
    "Each backend by length, batch and threads; and side by side with the release's recipe."
    prompts = [r.prompt for r in draw(unseen(data, None, ranker), 2000, 0)]
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name in ("torch", *FILES, *(["student"] if student else [])):
            r = load_backend(student if name == "student" else ranker, name, threads)
            most, it = r.meta.max_length, iter(range(10**9))
            one = timed(lambda: r.score([prompts[next(it) % len(prompts)]]), seconds, 50)
            batch = timed(lambda: r.score(prompts[64 * (next(it) % 30):][:64]), seconds, 5)
            rows.append(dict(backend=name, threads=threads, what="alpaca", batch=1, **one))
            rows.append(dict(backend=name, threads=threads, what="alpaca", batch=64, prompts_per_s=64e3 / batch["p50_ms"], **batch))
            for tokens in (16, 64, 128, 512):
                r.meta.max_length = min(512, max(most, tokens))
                text = "count " * (tokens - 2)
                rows += [dict(backend=name, threads=threads, what=f"{tokens} tokens", tokens=tokens, batch=n,
                              **timed(lambda: r.score([text] * n), seconds / 2, 3)) for n in ((1, 64) if tokens <= 128 else (1,))]
            r.meta.max_length = most
            print(rows[-8:][:2], flush=True)
    facts = []
    if not student:
        write("speed", rows=rows)
        return
    for name, code, args in (("release recipe", RECIPE, [str(ranker), "PORT"]),
                             *((f"score-server {b}", OURS, ["score-server", "--ranker", str(student if b == "student" else ranker), "--backend",
                                                            "torch" if b == "student" else b, "--port", "PORT", "--cache", "0"])
                               for b in ("torch", "onnx-int8", "openvino-int8", "student"))):
        with served(code, *args) as url:
            facts.append(dict(server=name, single=http_single(url, prompts), many=[http_many(url, prompts[:1000], c) for c in (1, 8, 64)]))
            print(facts[-1], flush=True)
    agree = [try_backend(ranker, b, seconds=0.1) for b in ("torch", *FILES)]
    write("speed", prompts=len(prompts), rows=rows, servers=facts, agreement={a["backend"]: a["tau_b"] for a in agree})


@app.command("engine")
def engine_cost(ranker: Ranker, student: Path, data: Data, target: str | None = None, requests: int = 300, seeds: int = 5, max_tokens: int = 1024):
    "Token throughput with and without scoring, in FCFS order either way (max_overtake_s 0), at ρ = 0.9 and in a burst."
    records, settings = unseen(data, target, ranker), EngineSettings()
    def queue(**pars):
        return dict(scheduler_cls="pars_nb.scheduler.PARSScheduler", additional_config=dict(pars=pars))
    queues = {CONTROL: queue(policy="fcfs")}
    for b in ("torch", "onnx-int8", "openvino-int8"):
        queues[b] = queue(ranker=str(ranker), backend=b, max_overtake_s=0)
    queues["student"] = queue(ranker=str(student), max_overtake_s=0)
    from contextlib import ExitStack
    rows, rates = [], []
    with ExitStack() as stack:
        engines = {k: stack.enter_context(engine(settings, v, OUT / f"engine-{i}.log")) for i, (k, v) in enumerate(queues.items())}
        for e in engines.values():
            e.get()
        for e in engines.values():
            e.run(make_workload(records, 64, seed=999, max_tokens=max_tokens))
        names = list(engines)
        for what in ("burst", "rho 0.9"):
            for seed in range(seeds):
                rate = float("inf") if what == "burst" else 0.9 * float(np.median(rates))
                w = make_workload(records, requests, rate, seed, max_tokens)
                for name in names[seed % len(names):] + names[:seed % len(names)]:
                    s = summarise(engines[name].run(w))
                    rates += [s["request_throughput"]] if (name, what) == (CONTROL, "burst") else []
                    rows.append(dict(queue=name, workload=what, seed=seed, **{k: s[k] for k in ("output_throughput", "duration", "mean_tpot_ms",
                                                                                               "mean_ntpot_ms")}))
                    print(rows[-1], flush=True)
    for f in OUT.glob("engine-*.log"):
        f.unlink()
    write("engine", requests=requests, seeds=seeds, rows=rows, settings=settings.model_dump(exclude={"model"}), bench=BenchSettings().model_dump())


@app.command("student")
def student_quality(ranker: Ranker, student: Path, data: Data, target: str | None = None):
    "τ_b of teacher, student and a TF-IDF ridge on lengths, on the same held-out prompts; microseconds of the student."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    t, s, records = load_ranker(ranker), load_student(student), read(data, target)
    fit, _, test = split(records, seed=t.meta.seed)
    texts, truth = [r.prompt for r in test], np.array([r.mean for r in test])
    v = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    ridge = Ridge(alpha=1.0, solver="lsqr").fit(v.fit_transform([r.prompt for r in fit]), np.log([r.mean for r in fit]))
    small = set(r.prompt_id for r in draw(records, 8000, 0))
    tau = dict(teacher=tau_b(t.score(texts), truth), student=tau_b(s.score(texts), truth),
               tfidf_ridge=tau_b(ridge.predict(v.transform(texts)), truth))
    torch.set_num_threads(1)
    it = iter(range(10**9))
    one = timed(lambda: s.score([texts[next(it) % len(texts)]]), 3.0, 500)
    batch = timed(lambda: s.score(texts[64 * (next(it) % 40):][:64]), 3.0, 100)
    write("student", train_prompts=len(fit), teacher_prompts=len([r for r in fit if r.prompt_id in small]), test_prompts=len(test), tau_b=tau,
          share=tau["student"] / tau["teacher"], us_single=1e3 * one["p50_ms"], us_single_p99=1e3 * one["p99_ms"],
          us_batch_64=1e3 * batch["p50_ms"] / 64, cores=os.cpu_count())


if __name__ == "__main__":
    app()
