"""Two replicas of the embedded LLM behind Ray's OpenAI ingress, four routers: the measurements behind nbs/57_fleet.ipynb. Each command
writes one JSON into results/fleet.

    python studies/fleet.py demo
"""
import asyncio
import json
import os
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pars_nb.bench import machine
from pars_nb.fleet import ROUTERS, FleetSettings, down, fleet_config, up
from pars_nb.latency import Served, summarise
from pars_nb.order import tau_b
from pars_nb.workload import Workload

app = typer.Typer(add_completion=False)
OUT = Path(__file__).resolve().parent.parent / "results/fleet"
SHOWN = ["mean_ntpot_ms", "p99_ntpot_ms", "mean_e2el_ms", "p99_e2el_ms"]
# the embedded LLM's own words: two beginnings that many requests share
BEGINNINGS = ["i am writing a book for children and i need some help . " * 4, "listen well and do only what i say . " * 6]


@app.callback()
def studies():
    "One command a measurement."


def write(name, **facts):
    "One JSON per command: the command, the machine, and what came out."
    OUT.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", f"studies/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    (OUT / f"{name}.json").write_text(json.dumps(dict(command=command, machine=machine(), **facts), indent=1) + "\n")


def heavy_tailed(n, seed, most, noise, rate=None):
    "Lengths with log n uniform up to `most`, and scores: the length times a log-normal error. A burst, or Poisson arrivals at `rate`."
    rng = random.Random(seed)
    lengths = [max(1, int(most ** rng.random())) for _ in range(n)]
    scores = [k * np.exp(rng.gauss(0, noise)) for k in lengths]
    at = np.cumsum([rng.expovariate(rate) for _ in range(n)]).tolist() if rate else [0.0] * n
    prompts = [f"{rng.choice(BEGINNINGS)}count to {k} ." for k in lengths]
    return Workload(name="stream" if rate else "burst", seed=seed, arrivals=at, prompts=prompts, lengths=lengths, scores=scores)


async def play(url, w):
    "Send the requests at their times, and wait for all: what the client saw."
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        start = time.perf_counter() + 0.2

        async def one(i):
            due = start + w.arrivals[i]
            await asyncio.sleep(due - time.perf_counter())
            body = dict(model="tiny", prompt=w.prompts[i], max_tokens=w.lengths[i], ignore_eos=True, temperature=0,
                        vllm_xargs=dict(pars_score=w.scores[i]))
            answer = (await client.post("/completions", json=body)).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == w.lengths[i]
            now = time.perf_counter()
            return Served(arrival=due, first=now, last=now, output_tokens=w.lengths[i])

        return await asyncio.gather(*(one(i) for i in range(len(w.arrivals))))


def settings(router, port, seqs):
    "Two replicas on this machine. float32: on some processors bfloat16 ends in an illegal instruction."
    told = dict(imbalanced_threshold=10) if router == "prefix-aware" else {}
    return FleetSettings(kind="cpu", name="tiny", router=router, router_settings=told, client_scores=True, port=port,
                         engine=dict(dtype="float32", max_num_seqs=seqs, max_model_len=2048, max_num_batched_tokens=2048))


@app.command()
def demo(requests: int = 160, seeds: int = 3, most: int = 400, noise: float = 0.5, rho: float = 0.8, seqs: int = 8, port: int = 8017,
         routers: Annotated[list[str], typer.Option()] = list(ROUTERS)):  # noqa: B006
    "A burst and a stream through four routers, and which share of the work each replica got."
    import ray

    began, rows, pace = time.time(), [], None
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=8, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for router in routers:
        url = up(fleet_config(settings(router, port, seqs)))
        print(f"{time.time() - began:5.0f} s  {router}", flush=True)
        asyncio.run(play(url, heavy_tailed(24, 999, most, noise)))  # warm-up
        for rate in (None, rho):
            for seed in range(seeds):
                w = heavy_tailed(requests, seed, most, noise, rate and rate * pace)
                served = asyncio.run(play(url, w))
                s = summarise(served)
                if rate is None and router == routers[0]:
                    pace = max(pace or 0.0, s["request_throughput"])
                tau = tau_b(np.array(w.scores), np.array(w.lengths))
                rows.append(dict(router=router, workload=w.name, seed=seed, tau_b=tau, duration=s["duration"], **{k: s[k] for k in SHOWN}))
                print(f"{time.time() - began:5.0f} s  {w.name:6} seed {seed}", *(f"{k} {s[k]:7.1f}" for k in SHOWN), flush=True)
    down()
    write("demo", requests=requests, most=most, noise=noise, rho=rho, pace=pace, max_num_seqs=seqs, seconds=time.time() - began, runs=rows)


if __name__ == "__main__":
    app()
