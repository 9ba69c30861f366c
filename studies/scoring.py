"""What a score costs: the measurements behind nbs/74_scoring_speed.ipynb. Each command writes one JSON into results/scoring.

    python studies/scoring.py speed   --ranker runs/real/alpaca_davinci003 --data ../shared/data/alpaca_davinci003.parquet
"""
import asyncio
import json
import os
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
from common import CONTROL, Data, Ranker, ours, rotated, running, write

from pars_nb.backends import FILES, open_ranker, try_backend
from pars_nb.bench import BenchSettings
from pars_nb.engine import EngineSettings
from pars_nb.glance import signals
from pars_nb.latency import summarise
from pars_nb.loop import unseen
from pars_nb.order import tau_b
from pars_nb.ranker import load_ranker
from pars_nb.records import draw, read, split
from pars_nb.student import load_student
from pars_nb.together import assisted
from pars_nb.workload import make_workload

app = typer.Typer(add_completion=False)
Student = Annotated[Path, typer.Option(help="folder that `pars distill` wrote")]


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
OURS = "from pars_nb.cli import app; app()"


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
        else:
            raise RuntimeError(f"no score server answers on {url}")
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


def backend_rows(r, prompts, seconds, **facts):
    "One backend at batch 1 and 64: on Alpaca's prompts, and on texts of a fixed number of tokens."
    it, most = iter(range(10**9)), r.meta.max_length
    one = timed(lambda: r.score([prompts[next(it) % len(prompts)]]), seconds, 50)
    batch = timed(lambda: r.score(prompts[64 * (next(it) % 30):][:64]), seconds, 5)
    rows = [facts | dict(what="alpaca", batch=1, **one), facts | dict(what="alpaca", batch=64, prompts_per_s=64e3 / batch["p50_ms"], **batch)]
    for tokens, n in [(16, 1), (64, 1), (128, 1), (512, 1), (16, 64), (64, 64), (128, 64)]:
        r.meta.max_length = max(most, tokens)
        texts = ["count " * (tokens - 2)] * n
        rows.append(facts | dict(what=f"{tokens} tokens", tokens=tokens, batch=n, **timed(lambda: r.score(texts), seconds / 2, 3)))  # noqa: B023
        r.meta.max_length = most
    return rows


@app.command()
def speed(ranker: Ranker, student: Student, data: Data, seconds: float = 2.0):
    "Each backend by length, batch and threads; and side by side with the release's recipe."
    prompts, rows, facts = [r.prompt for r in draw(unseen(data, None, ranker), 2000, 0)], [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name in ("torch", *FILES, "student"):
            r = open_ranker(student if name == "student" else ranker, name, threads)
            rows += backend_rows(r, prompts, seconds, backend=name, threads=threads)
            print(rows[-9:][:2], flush=True)
    for name, code, args in (("release recipe", RECIPE, [str(ranker), "PORT"]),
                             *((f"score-server {b}", OURS, ["score-server", "--ranker", str(student if b == "student" else ranker), "--backend",
                                                            "torch" if b == "student" else b, "--port", "PORT", "--cache", "0"])
                               for b in ("torch", "onnx-int8", "openvino-int8", "student"))):
        with served(code, *args) as url:
            facts.append(dict(server=name, single=http_single(url, prompts), many=[http_many(url, prompts[:400], c) for c in (1, 8, 64)]))
            print(facts[-1], flush=True)
    agree = [try_backend(ranker, b, seconds=0.1) for b in ("torch", *FILES)]
    write("scoring/speed", prompts=len(prompts), rows=rows, servers=facts, agreement={a["backend"]: a["tau_b"] for a in agree})


@app.command()
def quantization(ranker: Ranker):
    "Ways to make the graph 8-bit that `pars export` does not take: τ_b to PyTorch and milliseconds, beside those it takes."
    import tempfile

    import nncf
    import openvino
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from pars_nb.backends import FastRanker, onnx_run, openvino_run

    source, r, rows = ranker / "fast" / FILES["onnx"], load_ranker(ranker), []
    probes = json.loads((ranker / "fast/probes.json").read_text())
    with tempfile.TemporaryDirectory() as d:
        for name, per_channel in (("onnx dynamic, per tensor", False), ("onnx dynamic, per channel", True)):
            quantize_dynamic(source, f"{d}/q.onnx", weight_type=QuantType.QInt8, per_channel=per_channel)
            rows.append((name, onnx_run(Path(f"{d}/q.onnx"), 1)))
        ids = [np.array([i]) for i in r.encode(probes["prompts"])]
        more = [dict(signals=s[None]) for s in signals(probes["prompts"])] if r.meta.signals else [{}] * len(ids)
        data = nncf.Dataset([dict(input_ids=i, attention_mask=np.ones_like(i)) | m for i, m in zip(ids, more, strict=True)])
        model = nncf.quantize(openvino.convert_model(source), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(ids))
        symmetric = nncf.compress_weights(openvino.convert_model(source), mode=nncf.CompressWeightsMode.INT8_SYM)
        for name, graph in (("openvino static, NNCF", model), ("openvino, weights without a zero point", symmetric)):
            openvino.save_model(graph, f"{d}/{len(rows)}.xml")
            rows.append((name, openvino_run(Path(f"{d}/{len(rows)}.xml"), 1)))
        rows += [(name, open_ranker(ranker, name).run) for name in ("onnx", "onnx-int8", "openvino", "openvino-int8")]
        out = []
        for name, run in rows:
            f = assisted(FastRanker(run, r.tokenizer, r.meta, name), ranker)  # the probes' scores are of both, where a student is beside it
            it, agreement = iter(range(10**9)), tau_b(f.score(probes["prompts"]), probes["scores"])
            t = timed(lambda: f.score([probes["prompts"][next(it) % len(probes["prompts"])]]), 2.0, 200)  # noqa: B023
            out.append(dict(backend=name, tau_b=agreement, taken=name in FILES, **t))
            print(out[-1], flush=True)
    write("scoring/quantization", rows=out)


@app.command("engine")
def engine_cost(ranker: Ranker, student: Student, data: Data, target: str | None = None, requests: int = 300, seeds: int = 5, max_tokens: int = 1024):
    "Token throughput with and without scoring, in FCFS order either way (max_overtake_s 0), at ρ = 0.9 and in a burst."
    records, settings = unseen(data, target, ranker), EngineSettings()
    queues = {CONTROL: ours(policy="fcfs")}
    for b in ("torch", "onnx-int8", "openvino-int8"):
        queues[b] = ours(ranker=str(ranker), backend=b, max_overtake_s=0)
    queues["student"] = ours(ranker=str(student), max_overtake_s=0)
    rows = []
    rates: list[float] = []
    with running(queues, settings, "scoring/engine") as engines:
        for e in engines.values():
            e.run(make_workload(records, 64, seed=999, max_tokens=max_tokens))
        for what in ("burst", "rho 0.9"):
            for seed in range(seeds):
                rate = float("inf") if what == "burst" else 0.9 * float(np.median(rates))
                w = make_workload(records, requests, rate, seed, max_tokens)
                for name in rotated(list(engines), seed):
                    s = summarise(engines[name].run(w))
                    rates += [s["request_throughput"]] if (name, what) == (CONTROL, "burst") else []
                    rows.append(dict(queue=name, workload=what, seed=seed, **{k: s[k] for k in ("output_throughput", "duration", "mean_tpot_ms",
                                                                                               "mean_ntpot_ms")}))
                    print(rows[-1], flush=True)
    write("scoring/engine", requests=requests, seeds=seeds, rows=rows,
          settings=settings.model_dump(exclude={"model"}), bench=BenchSettings().model_dump())


@app.command("student")
def student_quality(ranker: Ranker, student: Student, data: Data, target: str | None = None):
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
    write("scoring/student", train_prompts=len(fit), teacher_prompts=len([r for r in fit if r.prompt_id in small]), test_prompts=len(test), tau_b=tau,
          share=tau["student"] / tau["teacher"], us_single=1e3 * one["p50_ms"], us_single_p99=1e3 * one["p99_ms"],
          us_batch_64=1e3 * batch["p50_ms"] / 64, cores=os.cpu_count())


@app.command("long")
def long_prompts(encoder: Annotated[Path, typer.Option()], data: Annotated[Path, typer.Option()], target: str = "Llama-3.1-8B-Instruct",
                 folds: int = 5):
    """Which part of a long prompt to read: τ_b on prompts over 512 tokens, by a ridge on the frozen encoder's mean embedding
    (out of fold, so that every prompt is tested; a fine-tuned encoder per part and fold would take hours here)."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold
    from transformers import AutoModel, AutoTokenizer

    from pars_nb.order import bootstrap

    tok, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder, use_safetensors=True).eval()
    backend = tok.backend_tokenizer
    backend.no_truncation()
    parts = {"head 128": (127, 1), "head 96 + tail 32": (96, 32), "head 64 + tail 64": (64, 64), "tail 128": (1, 127), "head 512": (511, 1),
             "head 256 + tail 256": (256, 256)}
    rows = []
    for name in ("castillo_apps", "castillo_ds1000", "castillo_sharegpt"):
        records = read(data / f"{name}.parquet", target)
        y, ids = np.array([r.mean for r in records]), [e.ids for e in backend.encode_batch([r.prompt for r in records])]
        n = np.array([len(i) for i in ids])
        for part, (head, tail) in parts.items():
            cut = [i if len(i) <= head + tail else i[:head] + i[-tail:] for i in ids]
            x = np.stack([embed(model, c) for c in cut])
            x = np.c_[(x - x.mean(0)) / (x.std(0) + 1e-6), np.log(n)]
            score = np.zeros(len(y))
            for a, b in KFold(folds, shuffle=True, random_state=0).split(x):
                score[b] = Ridge(alpha=300.0).fit(x[a], np.log(y[a])).predict(x[b])
            over = n > 512
            lo, hi = bootstrap(tau_b, score[over], y[over])
            rows.append(dict(data=name, part=part, prompts=len(y), over_512=int(over.sum()), tau_b=tau_b(score, y),
                             tau_b_over_512=tau_b(score[over], y[over]), lo=lo, hi=hi))
            print(rows[-1], flush=True)
    write("scoring/long", target=target, folds=folds, rows=rows)


@torch.inference_mode()
def embed(model, ids):
    "The mean of the last layer's vectors."
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].float().mean(0).numpy()


@app.command("cap")
def max_tokens_effect(ranker: Ranker, data: Data, target: str | None = None, seed: int = 0):
    "What `max_tokens` adds: real held-out prompts and lengths, each request given a limit by lot (made up: the data record none)."
    from pars_nb.card import Cap

    r, rng = load_ranker(ranker), np.random.default_rng(seed)
    records = split(read(data, target), seed=r.meta.seed)[2]
    score, y = r.score([o.prompt for o in records]), np.array([o.mean for o in records])
    cap, rows = Cap(r.meta.score_quantiles, r.meta.length_quantiles), []
    for share in (0.0, 0.25, 0.5, 1.0):
        limit = np.where(rng.random(len(y)) < share, rng.choice([16, 64, 256], len(y)), 10**6)
        real = np.minimum(y, limit)
        capped = np.array([cap(float(s), int(m)) for s, m in zip(score, limit, strict=True)])
        rows.append(dict(share_with_limit=share, tau_b_prompt_only=tau_b(score, real), tau_b_with_max_tokens=tau_b(capped, real)))
    write("scoring/cap", prompts=len(y), limits=[16, 64, 256], rows=rows)


if __name__ == "__main__":
    app()
