"""Every policy under one roof, simulated: the measurements behind nbs/73_arena.ipynb. Each command writes one JSON into results/arena.

    python studies/arena.py sweep --data ../shared/data/alpaca_davinci003.parquet --trace ../shared/data/trace_azure2023_conv.parquet \\
        --engine results/arena/engine_cpu.json
"""
import asyncio
import json
import math
import resource
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from common import RESULTS, Data, EngineFile, Learning, Trace, gaps_of, rotated, running, write
from numba import njit

from pars_nb.advise import scores_with_tau
from pars_nb.backends import open_ranker
from pars_nb.bench import variants
from pars_nb.calibrate import calibrate, faster, load_engine
from pars_nb.card import RankerMeta
from pars_nb.cost import Cost, Spread, Ticket, Tokens, by_score
from pars_nb.engine import EngineSettings, serving
from pars_nb.foresight import Predicted
from pars_nb.lane import Express, express_quantile
from pars_nb.latency import summarise
from pars_nb.loop import unseen
from pars_nb.policy import FCFS, HRRN, PARS, Policy, SJF, Scale, Threshold
from pars_nb.records import read
from pars_nb.room import Expected, expected
from pars_nb.simulate import EngineModel, Requests, Simulated, capacity, simulate
from pars_nb.tail import Tail
from pars_nb.workload import make_workload
from tail import LearnedTail

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Boost:
    "arrival − (1/γ)·log(1 / (1 − e^(−γ·size))): the best tail in heavy traffic where sizes are known (Yu & Scully 2024)."
    cost: Cost = by_score
    s_per_unit: float = 0.01
    gamma: float = 0.05

    def key(self, t: Ticket) -> float:
        c = self.cost(t)
        return t.arrival if c is None else t.arrival + math.log(-math.expm1(-self.gamma * max(1e-6, c * self.s_per_unit))) / self.gamma


def policies(scores, lengths, s_per_token, r, score):
    """Name → (policy, how the requests are told). Scores and lengths are quantile tables, as a checkpoint has them; where PARS' lane
    ends at first is what a checkpoint would say: by the work that the prompts hold which are scored as these."""
    tok, held = Tokens(scores, lengths, 0.1), RankerMeta()
    held.measure(score, r.output)
    def pars(share=0.1, span=60.0, cost=tok):
        express = Express(share, held.work_shares)
        return Learning(PARS(Scale(lengths), span, cost, express.quantile), r.output, express)
    by_tail = LearnedTail(Tail(Scale(lengths), 1.1, tok, together_s=0.05), r.output, Express(0.05, held.work_shares))
    return {
        "FCFS": (FCFS(), "ranker"), "prompt length": (SJF(), "prompt"), "predicted SJF (stock priority)": (SJF(tok), "ranker"),
        "HRRN": (HRRN(tok, s_per_token), "ranker"), "threshold 60 s (paper)": (Threshold(60.0, tok), "ranker"),
        "Boost": (Boost(tok, s_per_token), "ranker"), "PARS, lane 0.1": (pars(), "ranker"), "PARS, lane 0.3": (pars(0.3), "ranker"),
        "PARS, all, 15 s": (pars(1.0, 15.0), "ranker"), "PARS, all, 60 s": (pars(1.0), "ranker"),
        "PARS tail-aware": (pars(cost=Spread(tok, "tail")), "spread"), "PARS Gittins": (pars(cost=Spread(tok, "gittins")), "spread"),
        "PARS, tail 1.1 (the default)": (by_tail, "ranker"), "oracle SJF": (SJF(), "oracle")}


ASIDE = {"SRPT (true lengths; sets aside)": (0, "oracle"), "residual SJF (predicted; sets aside)": (0, "ranker"),
         "MLFQ (FastServe-like; sets aside)": (1, "oracle"), "Boost by served tokens (UniBoost-like; sets aside)": (2, "oracle")}


@njit(cache=True)
def _set_aside(arrival, prompt, output, size, kind, seqs, base, prefill, decode, quantum, gamma, s_per_token):
    n, now, nxt, done = len(arrival), 0.0, 0, 0
    got, start, first, last = np.zeros(n, np.int64), np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan)
    here, key, m = np.zeros(n, np.int64), np.zeros(n), 0
    while done < n:
        if m == 0:
            now = max(now, arrival[nxt])
        while nxt < n and arrival[nxt] <= now:
            here[m] = nxt
            m += 1
            nxt += 1
        for x in range(m):
            i = here[x]
            if kind == 0:
                key[x] = size[i] - got[i]
            elif kind == 1:
                key[x] = np.floor(np.log2(got[i] / quantum + 1)) * 1e9 + arrival[i]
            else:
                key[x] = arrival[i] + np.log(-np.expm1(-gamma * (got[i] + 1) * s_per_token)) / gamma
        order = np.argsort(key[:m])[:seqs] if m > seqs else np.arange(m)
        tokens, old = 0, 0
        for x in order:
            if got[here[x]] == 0:
                tokens += prompt[here[x]]
            else:
                old += 1
            if np.isnan(start[here[x]]):
                start[here[x]] = now
        now += base + prefill * tokens + decode * old
        for x in order:
            i = here[x]
            got[i] += 1
            if got[i] == 1:
                first[i] = now
            if got[i] == output[i]:
                last[i] = now
                done += 1
        k = 0
        for x in range(m):
            if got[here[x]] < output[here[x]]:
                here[k] = here[x]
                k += 1
        m = k
    return start, first, last


def set_aside(r, e, size, kind, s_per_token, quantum=16, gamma=0.05):
    """An engine that may set any running request aside at any step, at no cost (its KV stays, there is always room): the policies that
    need it. vLLM is no such engine. Token by token; `size` is what a policy knows of the lengths."""
    step = e.max_num_seqs, e.base_s, e.prefill_s, e.decode_s
    a = _set_aside(np.asarray(r.arrival, float), r.prompt, r.output, np.asarray(size, float), kind, *step, quantum, gamma, s_per_token)
    return Simulated(r, *a, 0, 0, int(r.output.sum()), 0)


def requests_from(records, gaps, n, seed, max_tokens=2048):
    "n requests with recorded lengths and arrivals, at rate 1 a second."
    w = make_workload(records, n, 1.0, seed, max_tokens, gaps=gaps)
    prompt = np.array([max(1, len(p) // 4) for p in w.prompts])
    return Requests(np.array(w.arrivals), prompt, np.array(w.lengths, dtype=np.int64))


def told(r, kind, score, spread):
    if kind == "prompt":
        return r._replace(score=r.prompt.astype(float))
    if kind == "oracle":
        return r._replace(score=r.output.astype(float))
    return r._replace(score=score, spread=spread if kind == "spread" else None)


def measure(s, tenants, slo=(2000.0, 100.0)):
    "Percentiles, goodput under TTFT ≤ 2 s and NTPOT ≤ 100 ms, Jain's index of the tenants' mean NTPOT, longest wait."
    d, out = s.latencies(), {}
    for c in d:
        out |= {f"{k}_{c}_ms": float(v) for k, v in zip(("mean", "p50", "p90", "p99", "max"), (d[c].mean(), *np.percentile(d[c], (50, 90, 99, 100))),
                                                        strict=True)}
    x = np.array([1 / d.ntpot[tenants == t].mean() for t in np.unique(tenants)])
    return out | dict(goodput=float(((d.ttft <= slo[0]) & (d.ntpot <= slo[1])).mean()), jain=float(x.sum() ** 2 / (len(x) * (x**2).sum())),
                      longest_wait_s=float((s.start - s.requests.arrival).max()))


def predictors(workload):
    "Kendall's τ_b of each predictor as `studies/ranking.py predictors` measured it on this workload; {} where it did not."
    path = RESULTS / "ranking/predictors.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    d = pd.DataFrame([dict(p=r["key"][1], tau=r["tau_b"]) for r in rows if r["key"][0] == workload], columns=["p", "tau"])
    return d.groupby("p", sort=False).tau.mean().to_dict()


@app.command()
def sweep(data: Data, trace: Trace, engine: EngineFile, target: str | None = None, n: int = 4000, seeds: int = 3, tau: float = 0.6):
    "Load, burst, noise, drift and a tenant that games the predictor: a row per policy, setting and seed."
    records, e, taus = read(data, target), load_engine(engine), predictors(data.stem)
    gaps = gaps_of(trace)
    rows, at = [], np.linspace(0, 1, 201)
    for seed in range(seeds):
        base = requests_from(records, gaps, n, seed)
        rate, rng = capacity(base, e), np.random.default_rng(seed)
        tenants = rng.integers(0, 4, n)
        worlds = [("load", rho, rho, tau, "") for rho in (0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3)]
        worlds += [("burst", b, 0.7, tau, "burst") for b in (100, 500, 2000)]
        worlds += [("noise", t, 1.0, t, "") for t in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0, -1.0)]
        worlds += [("drift", tau, 1.0, tau, "drift"), ("gaming", tau, 1.0, tau, "gaming")]
        worlds += [("predictor", k, 1.0, t, "") for k, t in taus.items()]
        for sweep_name, x, rho, t, twist in worlds:
            r = base._replace(arrival=base.arrival / (rho * rate))
            if twist == "burst":  # the middle b requests come at once
                a, m = r.arrival.copy(), n // 2
                a[m:m + x] = a[m]
                r = r._replace(arrival=np.sort(a))
            score = scores_with_tau(r.output, t, seed)
            spread = np.full(n, math.sqrt(max(0.05, 1 - math.sin(math.pi * abs(t) / 2) ** 2)) * np.log(r.output).std())
            spread *= np.where(rng.random(n) < 0.5, 0.7, 1.2)  # what a ranker would say of itself: surer of some
            table, clean = np.quantile(score, at).tolist(), score
            if twist == "drift":
                score = np.where(np.arange(n) < n // 2, score, rng.normal(size=n))
            if twist == "gaming":
                score = np.where(tenants == 0, score.min(), score)
            s_per_token = 1 / (rate * r.output.mean())
            todo = policies(table, np.quantile(r.output, at).tolist(), s_per_token, r, clean)
            done: Iterator[tuple[str, Simulated]] = ((name, simulate(told(r, kind, score, spread), e, p)) for name, (p, kind) in todo.items())
            aside = ASIDE if sweep_name in ("load", "burst") else {}  # nothing is predicted there
            sizes = dict(oracle=r.output, ranker=np.interp(score, table, np.quantile(r.output, at)))
            done = chain(done, ((name, set_aside(r, e, sizes[told_by], kind, s_per_token)) for name, (kind, told_by) in aside.items()))
            rows += [dict(sweep=sweep_name, x=x, seed=seed, policy=name, **measure(s, tenants)) for name, s in done]
        print(f"seed {seed}: {len(rows)} rows", flush=True)
    write("arena/sweep", n=n, tau=tau, engine=e.model_dump(), rows=rows)


def by_lane(r, share=0.1):
    "PARS with a lane that knows what it holds."
    scale = Scale(np.quantile(r.score, np.linspace(0, 1, 201)).tolist(), window=0)
    some = slice(0, 100_000)
    return PARS(scale, 60.0, express=express_quantile(zip(r.score[some].tolist(), r.output[some].tolist(), strict=True), share))


@app.command()
def speed(trace: Trace, engine: EngineFile, sizes: list[int] = [10**4, 10**5, 10**6, 10**7], load: float = 0.9):  # noqa: B006
    "Simulated requests a second on one core: the Azure conversation trace (repeated) at ρ = 0.9, keys included."
    e, d, rows = load_engine(engine), pd.read_parquet(trace).sort_values("timestamp_s"), []
    gaps = np.diff(d.timestamp_s.to_numpy(), prepend=d.timestamp_s.iloc[0])
    one = Requests(np.cumsum(gaps), np.clip(d.prompt_tokens.to_numpy(), 1, None).astype(np.int64), d.response_tokens.clip(lower=1).to_numpy(np.int64))
    rate = capacity(one, e)
    simulate(one, e)
    for n in sizes:
        k = np.resize(np.arange(len(d)), n)
        r = Requests(np.cumsum(gaps[k]) / gaps.mean() / (load * rate), one.prompt[k], one.output[k])
        r = r._replace(score=scores_with_tau(r.output, 0.6))
        for name, p in (("FCFS", FCFS()), ("PARS", by_lane(r))):
            start = time.perf_counter()
            s = simulate(r, e, p)
            took = time.perf_counter() - start
            rows.append(dict(policy=name, n=n, seconds=took, per_s=n / took, events_per_request=s.events / n))
            print(rows[-1], flush=True)
    write("arena/speed", load=load, engine=e.model_dump(), rows=rows)


@app.command()
def fleet(trace: Trace, engine: EngineFile, replicas: int = 1000, n: int = 10**7, load: float = 0.95):
    "1,000 replicas and ten million requests: per-replica order against one shared queue, and three routings."
    e, d, rows = load_engine(engine), pd.read_parquet(trace).sort_values("timestamp_s"), []
    rng = np.random.default_rng(0)
    k = rng.integers(0, len(d), n)
    r = Requests(np.zeros(n), np.clip(d.prompt_tokens.to_numpy(), 1, None).astype(np.int64)[k], d.response_tokens.clip(lower=1).to_numpy(np.int64)[k])
    rate = capacity(Requests(*(x[:20_000] for x in r[:3])), e) * replicas
    r = r._replace(arrival=np.cumsum(rng.exponential(1, n)) / (load * rate), score=scores_with_tau(r.output, 0.6))
    for routing in ("round_robin", "least_outstanding", "predicted_work", "shared"):
        for name, p in (("FCFS", FCFS()), ("PARS", by_lane(r))):
            start = time.perf_counter()
            s = simulate(r, e, p, replicas, routing)
            lat = s.latencies()
            rows.append(dict(routing=routing, policy=name, seconds=time.perf_counter() - start, mean_ntpot_ms=float(lat.ntpot.mean()),
                             mean_ttft_ms=float(lat.ttft.mean()), p99_e2el_ms=float(np.percentile(lat.e2el, 99)),
                             peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))
            print(rows[-1], flush=True)
    write("arena/fleet", replicas=replicas, n=n, load=load, engine=e.model_dump(), rows=rows)


GPU = EngineModel(name="made up: 256 slots, 8,192 tokens a step", max_num_seqs=256, max_num_batched_tokens=8192, base_s=0.008, prefill_s=2.5e-5,
                  decode_s=3e-5, kv_s=4e-8)
# name → trace, how many times as long the answers are, KV blocks, load
SHORT_OF_MEMORY = {"Azure code, 6,000, 1.2": ("code", 1, 6000, 1.2), "Azure code, 25,000, 1.2": ("code", 1, 25_000, 1.2),
                   "long conversations, 6,000, 1.0": ("conv", 5, 6000, 1.0), "long conversations, 25,000, 1.0": ("conv", 5, 25_000, 1.0),
                   "long conversations, 25,000, 1.2": ("conv", 5, 25_000, 1.2)}


def traced(folder, name, times, n, seed):
    "n requests of an Azure trace with its gaps, at rate 1; answers `times` as long as recorded."
    d, rng = pd.read_parquet(folder / f"trace_azure2023_{name}.parquet").sort_values("timestamp_s"), np.random.default_rng(seed)
    gaps, k = np.diff(d.timestamp_s.to_numpy(), prepend=d.timestamp_s.iloc[0]), rng.integers(0, len(d), n)
    x = np.resize(np.roll(gaps, -int(rng.integers(len(d)))), n)
    prompt, output = (d[c].clip(lower=1).to_numpy(np.int64)[k] for c in ("prompt_tokens", "response_tokens"))
    return Requests(np.cumsum(x / x.mean()), prompt, times * output)


def short_of_memory(folder, n, seeds):
    "Row, engine, seed and traffic at the row's load, row by row."
    for row, (trace, times, blocks, rho) in SHORT_OF_MEMORY.items():
        e = GPU.model_copy(update=dict(blocks=blocks))
        for seed in range(seeds):
            base = traced(folder, trace, times, n, seed)
            yield row, e, seed, base._replace(arrival=base.arrival / (rho * capacity(base, e)))


def at_scores(r, tau, seed):
    "Scores in tokens: right lengths (τ = 1), or with this τ_b in the quantiles of the lengths."
    if tau == 1:
        return r._replace(score=r.output.astype(float))
    place = np.argsort(np.argsort(scores_with_tau(r.output, tau, seed))) / len(r.output)
    return r._replace(score=np.quantile(r.output, place))


def room_of(r, tau, margin, price):
    "What the scheduler would expect of each: the real length where the score is it, else what was learned on the way."
    if tau == 1:
        return Expected(r.output.astype(float), np.zeros(len(r.output)), margin, price)
    scale = Scale()
    return expected([scale(x) for x in r.score.tolist()], r.output.tolist(), margin=margin)._replace(price=price)


@dataclass(frozen=True)
class Share:
    "Length in decode tokens, times how many slots' worth of the engine it takes meanwhile: of the cache, its prompt and half of its answer."
    prefill_token: float
    slot: float  # tokens of the KV cache per slot

    def __call__(self, t):
        return (t.score + self.prefill_token * t.prefill) * max(1.0, (t.prefill + t.score / 2) / self.slot)


def memory_policies(e):
    "Name → how the policy is made: each is made anew for each play, because some learn."
    costs = {"length": by_score, "length + 0.1 prompt": Predicted(0.1),
             "share": Share(e.prefill_s * e.max_num_seqs / step_of(e), e.blocks * e.block_size / e.max_num_seqs)}
    todo = {"FCFS": FCFS}
    for name, cost in costs.items():
        todo[f"SJF, {name}"] = partial(SJF, cost)
        todo[f"tail, {name}"] = partial(tail_on, cost)
    return todo


def step_of(e):
    "Seconds of a full step of decoding, with half of the cache read."
    return e.step_s(0, e.max_num_seqs, e.blocks * e.block_size // 2)


def tail_on(cost):
    "The default rule: its lane from costs as they come."
    return Tail(Scale(), 1.1, cost, 0.05, together_s=0.05)


@app.command()
def memory(folder: Annotated[Path, typer.Option(help="folder with the traces")], n: int = 5000, seeds: int = 5, margin: float = 1.0,
           price: float = 0.1, taus: list[float] = [1.0, 0.5], name: str = "memory"):  # noqa: B006
    "Where the KV cache is short: what a request costs, and room for what it will be. Medians over seeds, relative to FCFS without room."
    rows = []
    for row, e, seed, base in short_of_memory(folder, n, seeds):
        for tau in taus:
            r = at_scores(base, tau, seed)
            for policy, make in memory_policies(e).items():
                for room in (None, room_of(r, tau, margin, price)):
                    s = simulate(r, e, make(), room=room)
                    d = s.latencies()
                    rows.append(dict(row=row, seed=seed, tau=tau, policy=policy, room=room is not None, preemptions=s.preemptions,
                                     mean_ntpot_ms=d.ntpot.mean(), mean_ttft_ms=d.ttft.mean(), mean_e2el_ms=d.e2el.mean(),
                                     p99_e2el_ms=float(np.percentile(d.e2el, 99))))
        if seed == seeds - 1:
            show_memory(memory_table(rows), row)
    table = memory_table(rows)
    write(f"arena/{name}", n=n, seeds=seeds, margin=margin, price=price, engine=GPU.model_dump(exclude={"blocks"}),
          table=json.loads(table.to_json(orient="records")))


def memory_table(rows):
    "Medians over seeds: times relative to FCFS as vLLM has it, preemptions as they are."
    d, times = pd.DataFrame(rows), ["mean_ntpot_ms", "mean_ttft_ms", "mean_e2el_ms", "p99_e2el_ms"]
    stock = d[(d.policy == "FCFS") & ~d.room].set_index(["row", "seed", "tau"])
    at = pd.MultiIndex.from_frame(d[["row", "seed", "tau"]])
    d[[c.replace("_ms", "_ratio") for c in times]] = d[times].to_numpy() / stock.loc[at, times].to_numpy()
    return d.drop(columns=["seed", *times]).groupby(["row", "tau", "policy", "room"], sort=False).median().reset_index()


def show_memory(table, row):
    print(row)
    for x in table[table.row == row].itertuples():
        print(f"  τ {x.tau:g} {x.policy:26} {'room' if x.room else '    '} {x.mean_ntpot_ratio:5.2f} / {x.mean_ttft_ratio:5.2f} /"
              f" {x.mean_e2el_ratio:5.2f} / {x.p99_e2el_ratio:5.2f}, {x.preemptions:.0f}", flush=True)


@app.command()
def price(folder: Annotated[Path, typer.Option(help="folder with the traces")], n: int = 5000, seeds: int = 3,
          prices: list[float] = [0, 0.05, 0.1, 0.2, 0.36, 0.6, 1.0], taus: list[float] = [1.0, 0.5]):  # noqa: B006
    "Under the tail rule, does it matter what a prompt token costs (in decode tokens)? Where the KV cache is short; medians over seeds, over FCFS."
    rows = []
    for row, e, seed, base in short_of_memory(folder, n, seeds):
        stock = timed(simulate(base, e, FCFS()))
        for tau in taus:
            r = at_scores(base, tau, seed)
            rows += [dict(row=row, tau=tau, price=p) | {k: v / stock[k] for k, v in timed(simulate(r, e, tail_on(Predicted(p)))).items()}
                     for p in prices]
    table = pd.DataFrame(rows).groupby(["row", "tau", "price"], sort=False).median().round(3).reset_index()
    print(table.to_string())
    own = {row: round(e.prefill_s * e.max_num_seqs / step_of(e), 3) for row, (_, _, blocks, _) in SHORT_OF_MEMORY.items()
           for e in [GPU.model_copy(update=dict(blocks=blocks))]}
    write("arena/price", n=n, seeds=seeds, engine=GPU.model_dump(exclude={"blocks"}), engines_own_price=own,
          table=json.loads(table.to_json(orient="records")))


def timed(s):
    "Mean NTPOT and E2EL, and p99 E2EL, in milliseconds."
    d = s.latencies()
    return dict(mean_ntpot=d.ntpot.mean(), mean_e2el=d.e2el.mean(), p99_e2el=float(np.percentile(d.e2el, 99)))


def counting(n, seed):
    "Prompts that name a number, and answers that are about as long."
    rng = np.random.default_rng(seed)
    named = np.exp(rng.uniform(np.log(20), np.log(400), n)).astype(int)
    return [f"count to {x}" for x in named], np.maximum(5, named * rng.lognormal(0, 0.5, n)).astype(int).tolist()


async def burst_to(url, prompts, lengths):
    "All at once; seconds until each is answered."
    import httpx

    async with httpx.AsyncClient(timeout=600) as client:
        async def ask(prompt, n):
            begin = time.perf_counter()
            body = dict(model="tiny", prompt=prompt, max_tokens=n, ignore_eos=True)
            (await client.post(f"{url}/completions", json=body)).raise_for_status()
            return time.perf_counter() - begin
        return await asyncio.gather(*(ask(*x) for x in zip(prompts, lengths, strict=True)))


def preempted(url):
    "How many the server has preempted so far."
    lines = urllib.request.urlopen(url.replace("/v1", "/metrics")).read().decode().splitlines()
    return sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith("vllm:num_preemptions_total"))


@app.command()
def small_cache(requests: int = 120, bursts: int = 3, blocks: int = 40, seqs: int = 32):
    "A real engine with a small KV cache: FCFS in our class and the default, each with room and without; by turns, after a burst to learn from."
    queues = {"FCFS (our class)": dict(policy="fcfs"), "FCFS, room": dict(tail=0.0, lane=0.0), "PARS": {}, "PARS, no room": dict(room=None)}
    rows = []
    with ExitStack() as stack:
        urls = {k: stack.enter_context(serving(None, "--served-model-name", "tiny", "--max-num-seqs", str(seqs), "--max-model-len", "1536",
                "--num-gpu-blocks-override", str(blocks), "--no-enable-prefix-caching", "--scheduler-cls", "pars_nb.scheduler.PARSScheduler",
                "--additional-config", json.dumps(dict(pars=v)))) for k, v in queues.items()}
        for seed in range(bursts + 1):
            prompts, lengths = counting(requests, seed)
            for k in rotated(list(urls), seed):
                before = preempted(urls[k])
                took = np.array(asyncio.run(burst_to(urls[k], prompts, lengths)))
                rows.append(dict(queue=k, burst=seed, preemptions=preempted(urls[k]) - before, mean_ntpot_ms=float(1e3 * (took / lengths).mean()),
                                 mean_e2el_ms=float(1e3 * took.mean()), p99_e2el_ms=float(1e3 * np.percentile(took, 99))))
                print({a: round(b, 1) if isinstance(b, float) else b for a, b in rows[-1].items()}, flush=True)
    d = pd.DataFrame(rows)
    median = d[d.burst > 0].groupby("queue", sort=False).median().drop(columns="burst")
    write("arena/small_cache", requests=requests, blocks=blocks, max_num_seqs=seqs, median=json.loads(median.reset_index().to_json(orient="records")),
          rows=rows)


@app.command()
def calibration(ranker: Annotated[Path, typer.Option()], data: Data, trace: Trace, out: Path = RESULTS / "arena" / "engine_cpu.json",
                target: str | None = None, requests: int = 400, seeds: int = 3,
                rho: list[float] = [0.5, 0.8, 1.0, 1.3], max_num_seqs: int = 16, max_tokens: int = 1024):  # noqa: B006
    """Probe the real engine, then play the same requests in both: simulated over real, for three orders at four loads. A shared machine's
    speed drifts, so each seed begins with one more look at it (`faster`)."""
    records, rk = unseen(data, target, ranker), open_ranker(ranker, "torch")
    gaps = gaps_of(trace)
    settings, rows = EngineSettings(max_num_seqs=max_num_seqs), []
    queues = {k: v for k, v in variants(str(ranker)).items() if "stock" not in k}
    at, lengths = rk.meta.score_quantiles, rk.meta.length_quantiles
    orders: dict[str, Policy] = {"FCFS (our class)": FCFS(), "Oracle SJF": SJF()}
    def pars(r):  # as the scheduler starts
        share = Express(0.1, rk.meta.work_shares)
        return Learning(PARS(Scale(lengths), 60.0, Tokens(at, lengths, 0.1), share.quantile), r.output, share, 150)
    with running(queues, settings, "arena/engine") as engines:
        models, drift = {}, []
        for k, x in engines.items():  # each process has a speed of its own
            models[k] = calibrate(x.run, max_num_seqs, max_num_batched_tokens=settings.max_num_batched_tokens, blocks=100_000,
                                  name="the embedded LLM on two cores")
            print(k, models[k], flush=True)
        out.write_text(models["FCFS (our class)"].model_dump_json(indent=1) + "\n")
        for seed in range(seeds):
            for k, x in engines.items():
                models[k] = faster(models[k], x.run, 1)
            drift.append({k: m.busy for k, m in models.items()})
            print(drift[-1], flush=True)
            probe = make_workload(records, requests, seed=seed, max_tokens=max_tokens)
            base = Requests(np.zeros(requests), np.array([max(1, len(p.split())) for p in probe.prompts]), np.array(probe.lengths))
            rate = capacity(base, models["FCFS (our class)"])
            for load in rho:
                w = make_workload(records, requests, load * rate, seed, max_tokens, f"ρ={load:g}", gaps)
                for k, x in engines.items():
                    served = x.run(w)
                    real, m = summarise(served), models[k]
                    score = np.array(w.lengths, float) if k.startswith("Oracle") else rk.score(w.prompts).astype(float)
                    r = Requests(np.array(w.arrivals), np.array([s.prompt_tokens for s in served]), np.array(w.lengths), score)
                    sim = summarise([s.model_copy(update=dict(first=s.first + m.overhead_s, last=s.last + m.overhead_s))
                                     for s in simulate(r, m, orders.get(k) or pars(r)).served()])
                    rows.append(dict(queue=k, load=load, seed=seed, **{f"{key}_{side}": v[key] for side, v in (("real", real), ("sim", sim))
                                     for key in ("mean_ntpot_ms", "mean_ttft_ms", "p99_e2el_ms", "duration")}))
                    print({k2: round(v, 1) if isinstance(v, float) else v for k2, v in rows[-1].items()}, flush=True)
    write("arena/calibration", requests=requests, drift=drift, rows=rows, engines={k: m.model_dump() for k, m in models.items()})


if __name__ == "__main__":
    app()
