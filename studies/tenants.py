"""Tenants (nbs/25_tenants.ipynb) and objectives (nbs/26_deadlines.ipynb) in vLLM's own scheduler on a nominal clock, recorded lengths and
arrivals. `clocked` writes results/tail/tenants.json: what a tenant that games or floods does to the others; `goodput` writes
results/tail/goodput.json: how many requests keep a promise; `together` writes results/tail/together.json: what counts as come together,
in the event simulator.

    python studies/tenants.py clocked --folder ../shared/data --engine results/arena/engine_cpu.json
    python studies/tenants.py goodput --folder ../shared/data --engine results/arena/engine_cpu.json
    python studies/tenants.py together --folder ../shared/data --engine results/arena/engine_cpu.json
"""
import json
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import typer
from common import EngineFile, write
from tail import DATASETS, Folder, LearnedTail, drawn, in_vllm, scene, show, summary_of

from pars_nb.card import RankerMeta
from pars_nb.lane import Express
from pars_nb.latency import summarise
from pars_nb.policy import FCFS, Policy, SJF, Scale
from pars_nb.simulate import Requests, simulate
from pars_nb.tail import Tail

app = typer.Typer(add_completion=False)
KEYS = ["mean_ntpot_ms", "mean_e2el_ms", "p99_e2el_ms"]


def tells(scheduler, whose):
    "Requests say whose they are."
    add = scheduler.add_request

    def told(request):
        request.sampling_params.extra_args["pars_tenant"] = str(whose[int(request.request_id)])
        add(request)

    scheduler.add_request = told


def served_by(e, r, whose, **pars):
    "The same scheduler on the same clock as in `tail`; the clients send their tenants too."
    return in_vllm(e, r, partial(tells, whose=whose), **pars)


def twisted(r, tenants, twist):
    "Tenant 0 says that all its requests are the shortest, or sends three short ones more with each."
    if twist == "games":
        return r._replace(score=np.where(tenants == 0, r.score.min(), r.score)), tenants
    if twist == "honest":
        return r, tenants
    more, short = np.repeat(np.flatnonzero(tenants == 0), 3), np.quantile(r.output, 0.1)
    rows = [np.r_[x, y] for x, y in ((r.arrival, r.arrival[more]), (r.prompt, r.prompt[more]), (r.output, np.full(len(more), int(short))),
                                     (r.score, np.full(len(more), np.quantile(r.score, 0.1))), (tenants, np.zeros(len(more), int)))]
    order = np.argsort(rows[0], kind="stable")
    *fields, tenants = (x[order] for x in rows)
    return Requests(*fields), tenants


def arriving(r, what, rate):
    "At a load; or all at once, after the first 400 have come at a load of 0.7 (`burst`) or not (`cold burst`)."
    if what == "cold burst":
        return r._replace(arrival=np.zeros(len(r.arrival)))
    if what == "burst":
        return r._replace(arrival=np.minimum(r.arrival, r.arrival[400]) / (0.7 * rate))
    return r._replace(arrival=r.arrival / (float(what) * rate))


QUEUES: dict[str, dict[str, Any]] = {"FCFS": dict(policy="fcfs"), "one account for all": dict(tenants=0), "an account a tenant": {}}


@app.command()
def clocked(folder: Folder, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", data: str = "davinci", requests: int = 1200,
            seeds: int = 5, whats: list[str] = ["1.1", "burst", "cold burst"], tenants: int = 4, max_tokens: int = 1024):  # noqa: B006
    "The others' latency: a gamer against its honest self in the same queue, a flood against first come, first served with the same flood."
    (e, gaps, lengths, tau, rate), rows = scene(folder, engine, trace, data, max_tokens), []
    for what in whats:
        for seed in range(seeds):
            r = arriving(drawn(lengths, tau, requests, seed, gaps, max_tokens), what, rate)
            who = np.random.default_rng(seed).integers(0, tenants, requests)
            for twist in ("honest", "games", "floods"):
                told, whose = twisted(r, who, twist)
                for queue, pars in QUEUES.items():
                    served = served_by(e, told, whose, **pars)
                    begin = r.arrival[-1] if "burst" in what else 0.0
                    others = [s for s, t in zip(served, whose, strict=True) if t != 0 and s.arrival >= begin]
                    rows.append(dict(what=what, seed=seed, twist=twist, queue=queue, **{k: summarise(others)[k] for k in KEYS}))
        d = pd.DataFrame(rows).set_index(["what", "seed", "twist", "queue"])
        print(summary(d).round(3).to_string(), flush=True)
    write("tail/tenants", requests=requests, seeds=seeds, tenants=tenants, data=data, tau=tau, max_tokens=max_tokens, engine=e.model_dump(),
          summary=json.loads(summary(d).reset_index().to_json(orient="records")), runs=rows)


def summary(d):
    "Medians over seeds of the ratio to what the others have without it."
    honest = d.xs("honest", level="twist")
    games = d.xs("games", level="twist") / honest
    floods = d.xs("floods", level="twist")
    floods = floods / floods.xs("FCFS", level="queue")
    alike = honest / honest.xs("FCFS", level="queue")
    told = pd.concat({"a games, over a honest": games, "a floods, over FCFS": floods, "all honest, over FCFS": alike}, names=["twist"])
    return told.groupby(["what", "twist", "queue"], sort=False)[KEYS].median()


PROMISES = {"TTFT": dict(slo_ttft_s=0.2), "E2EL": dict(slo_e2el_s=1.0)}
ORDERS: dict[str, dict[str, Any] | None] = {"FCFS": dict(policy="fcfs"), "SJF": dict(policy="sjf"), "PARS": {}, "PARS, told the objective": None}


@app.command()
def goodput(folder: Folder, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", data: str = "davinci", requests: int = 1200,
            seeds: int = 2, whats: list[str] = ["0.9", "1.1"], max_tokens: int = 1024):  # noqa: B006
    "The share of requests that keep a promise, by order."
    (e, gaps, lengths, tau, rate), rows = scene(folder, engine, trace, data, max_tokens), []
    for what in whats:
        for seed in range(seeds):
            r = drawn(lengths, tau, requests, seed, gaps, max_tokens)
            r = r._replace(arrival=r.arrival / (float(what) * rate))
            plain = {k: served_by(e, r, np.zeros(requests, int), **v) for k, v in ORDERS.items() if v is not None}
            for promise, slo in PROMISES.items():
                for order in ORDERS:
                    served = plain.get(order) or served_by(e, r, np.zeros(requests, int), **slo)
                    s = summarise(served, **slo)
                    rows.append(dict(what=what, seed=seed, promise=promise, order=order, met=s["request_goodput"] / s["request_throughput"],
                                     request_goodput=s["request_goodput"], **{k: s[k] for k in KEYS}))
        d = pd.DataFrame(rows).groupby(["promise", "what", "order"], sort=False)[["met", "request_goodput", *KEYS]].median()
        print(d.round(3).to_string(), flush=True)
    write("tail/goodput", requests=requests, seeds=seeds, promises=PROMISES, data=data, tau=tau, max_tokens=max_tokens, engine=e.model_dump(),
          summary=json.loads(d.reset_index().to_json(orient="records")))


@app.command()
def together(folder: Folder, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", requests: int = 1500, seeds: int = 3,
             rho: list[float] = [0.7, 0.9, 1.1], tail: float = 1.1, lane: float = 0.05, max_tokens: int = 1024):  # noqa: B006
    "A twentieth of a second, and (tail − 1) × the p99 of the service time: the gap closed and p99 E2EL."
    rows: list[dict[str, Any]] = []
    for data in DATASETS:
        e, gaps, lengths, tau, rate = scene(folder, engine, trace, data, max_tokens)
        for what in rho:
            for seed in range(seeds):
                r = drawn(lengths, tau, requests, seed, gaps, max_tokens)
                r = r._replace(arrival=r.arrival / (what * rate))
                fcfs, held = simulate(r, e), RankerMeta()
                held.measure(r.score, r.output)
                service = float(np.percentile(fcfs.last - fcfs.start, 99))
                table = np.quantile(r.score, np.linspace(0, 1, 201)).tolist()
                todo: dict[str, tuple[Policy, Requests]] = {"FCFS": (FCFS(), r), "Oracle SJF": (SJF(), r._replace(score=r.output.astype(float)))}
                for name, s in (("none", 0.0), ("0.05 s", 0.05), ("learned", max(0.05, (tail - 1) * service))):
                    rule = LearnedTail(Tail(Scale(table), tail, together_s=s), r.output, Express(lane, held.work_shares))
                    todo[name] = rule, r
                rows += [dict(data=data, what=what, seed=seed, queue=q, **summarise(simulate(told, e, p).served())) for q, (p, told) in todo.items()]
    d = summary_of(rows)
    show(d)
    write("tail/together", requests=requests, seeds=seeds, tail=tail, lane=lane, engine=e.model_dump(),
          summary=json.loads(d.to_json(orient="records")))


if __name__ == "__main__":
    app()
