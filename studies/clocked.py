"""vLLM's own scheduler on a nominal clock: every step takes what a calibrated engine model says, so no noise of a machine is in it, and
a load near 1 can be measured. All of vLLM's scheduling and all of ours is real, the scorer thread too; the model is left out (its tokens
do not matter where lengths are forced). Each command writes results/serving/clocked-….json:
`loads` every queue at every load, `beside` the simulator against vLLM's scheduler, `harm` wrong scores.

    python studies/clocked.py loads --ranker runs/real/alpaca_davinci003_student --data ../shared/data/alpaca_davinci003.parquet \\
        --trace ../shared/data/trace_azure2023_conv.parquet --engine results/arena/engine_cpu.json
"""
import json
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import typer
from common import CONTROL, Data, EngineFile, Learning, Ranker, Trace, gaps_of, ours, pace, scheduler_of, write
from tail import Hears, Nominal

import pars_nb.scheduler
from pars_nb.backends import open_ranker
from pars_nb.bench import table, variants
from pars_nb.calibrate import load_engine
from pars_nb.console import quiet_transformers
from pars_nb.cost import Tokens
from pars_nb.engine import render
from pars_nb.lane import Express
from pars_nb.latency import Served, summarise
from pars_nb.loop import unseen
from pars_nb.order import tau_b
from pars_nb.policy import FCFS, PARS, Policy, SJF, Scale
from pars_nb.scheduler import Scores
from pars_nb.simulate import Requests, simulate
from pars_nb.workload import make_workload


def request(i, ids, n, arrival, score, told, hasher):
    "What the engine's front end would hand over; a score goes as `pars_score` or as the priority."
    from vllm import SamplingParams
    from vllm.v1.request import Request

    p = SamplingParams(max_tokens=n, ignore_eos=True, extra_args={"pars_score": score} if told == "score" else None)
    p.update_from_generation_config({}, 3)
    rank = round(1000 * score) if told == "priority" else 0
    return Request(str(i), ids, p, None, arrival_time=arrival, priority=rank, block_hasher=hasher)


def play(s, w, ids, m, told, hasher):
    "Step the scheduler through a workload. A prompt asked about in one step has its score in the next: a step is long beside a score."
    from vllm.v1.outputs import ModelRunnerOutput

    now, i, n, first, last = 0.0, 0, len(ids), {}, {}
    while len(last) < n:
        if not s.requests:
            now = max(now, w.arrivals[i])
        while i < n and w.arrivals[i] <= now:
            s.add_request(request(i, ids[i], w.lengths[i], w.arrivals[i], w.scores[i], told, hasher))
            i += 1
        out = s.schedule()
        while (thread := getattr(s, "scores", Scores()).thread) and thread.done.qsize() < len(s.asked):
            time.sleep(1e-5)
        got = [(s.requests[k], c) for k, c in out.num_scheduled_tokens.items()]
        prefill = sum(c for r, c in got if r.num_computed_tokens - c < r.num_prompt_tokens)
        decode = sum(r.num_computed_tokens - c >= r.num_prompt_tokens for r, c in got)
        now += m.step_s(prefill, decode, sum(r.num_computed_tokens - c for r, c in got))
        whole = [r.num_computed_tokens >= r.num_tokens for r, _ in got]
        names = [r.request_id for r, _ in got]
        tokens = [[7] if x else [] for x in whole]
        s.update_from_output(out, ModelRunnerOutput(req_ids=names, req_id_to_index={k: j for j, k in enumerate(names)}, sampled_token_ids=tokens))
        for (r, _), x in zip(got, whole, strict=True):
            if x:
                first.setdefault(int(r.request_id), now)
            if r.request_id not in s.requests:
                last[int(r.request_id)] = now
    return [Served(arrival=w.arrivals[j], first=first[j], last=last[j], output_tokens=w.lengths[j], prompt_tokens=len(ids[j])) for j in range(n)]


class Clock:
    "An engine model, and what all plays share."

    def __init__(self, engine, trace):
        from transformers import AutoTokenizer
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        from pars_nb.tiny import tiny_llm

        init_none_hash(sha256)
        self.m, self.tok = load_engine(engine), AutoTokenizer.from_pretrained(tiny_llm())
        self.hasher = get_request_block_hasher(self.m.block_size, sha256)
        self.gaps = gaps_of(trace)

    def run(self, w, variant, told=""):
        "A fresh scheduler plays the workload."
        clock = Nominal(self.m)
        with patch.object(pars_nb.scheduler, "time", clock):
            s = scheduler_of(self.m.max_num_seqs, self.m.max_num_batched_tokens, self.m.block_size, **variant)
            Hears(s, clock)
            served = play(s, w, self.ids(w), clock, told or variant.get("scheduling_policy", ""), self.hasher)
            s.shutdown()
        return served

    def ids(self, w):
        return [render(self.tok, p) for p in w.prompts]


app = typer.Typer(add_completion=False)


@app.command()
def loads(ranker: Ranker, data: Data, trace: Trace, engine: EngineFile, target: str | None = None, name: str = "", requests: int = 1500,
          burst: int = 2000, seeds: int = 5, rho: list[float] = [0.3, 0.7, 0.9, 1.0, 1.1, 1.3], max_tokens: int = 1024):  # noqa: B006
    "Every queue at every load; and the simulator beside vLLM's scheduler, for FCFS and the oracle."
    c, records, facts, rows = Clock(engine, trace), unseen(data, target, ranker), open_ranker(ranker, "torch"), []
    rates: list[float] = []
    queues = variants(str(ranker), priority=True) | {"PARS, all go ahead": variants(str(ranker), tail=1e9, max_overtake_s=1e9)["PARS"]}
    simulated: dict[str, Policy] = {CONTROL: FCFS(), "Oracle SJF": SJF()}
    whats: list[Any] = ["burst", *rho]
    for what in whats:
        for seed in range(seeds):
            if what == "burst":
                w = make_workload(records, burst, seed=seed, max_tokens=max_tokens)
            else:
                w = make_workload(records, requests, what * float(np.median(rates)), 1000 + seed, max_tokens, f"azure ρ={what:g}", c.gaps)
            scores, true = facts.score(w.prompts).tolist(), [float(x) for x in w.lengths]
            for q, v in queues.items():
                oracle = q == "Oracle SJF"
                served = c.run(w.model_copy(update=dict(scores=true if oracle else scores)), v, "score" if oracle else "")
                rates += [pace(served)] if (q, what) == (CONTROL, "burst") else []
                rows.append(dict(queue=q, workload=w.name, seed=seed, tau_b=tau_b(np.array(scores), np.array(true)), **summarise(served)))
                print(f"{w.name:12} seed {seed} {q:34} NTPOT {rows[-1]['mean_ntpot_ms']:8.2f} ms  p99 E2EL {rows[-1]['p99_e2el_ms']:8.0f} ms",
                      flush=True)
            r = Requests(np.array(w.arrivals), np.array([x.prompt_tokens for x in served]), np.array(w.lengths), np.array(true))
            for q, p in simulated.items():
                rows.append(dict(queue=f"{q}, simulated", workload=w.name, seed=seed, **summarise(simulate(r, c.m, p).served())))
        write(f"serving/clocked-{name or data.stem}", requests=requests, burst=burst, engine=c.m.model_dump(), ranker=facts.meta.metrics,
              summary=json.loads(table(pd.DataFrame(rows)).to_json(orient="records")), runs=rows)


@app.command()
def beside(ranker: Ranker, data: Data, trace: Trace, engine: EngineFile, target: str | None = None, requests: int = 600, seeds: int = 3,
           rho: list[float] = [0.5, 0.8, 1.0, 1.3], max_tokens: int = 1024):  # noqa: B006
    "The simulator beside vLLM's scheduler, on one clock: the same requests in both, for three orders at four loads."
    c, records, rk, rows = Clock(engine, trace), unseen(data, target, ranker), open_ranker(ranker, "torch"), []
    at, lengths = rk.meta.score_quantiles, rk.meta.length_quantiles
    queues = {k: v for k, v in variants(str(ranker)).items() if "stock" not in k}
    def pars(r):  # as the scheduler starts
        share = Express(0.1, rk.meta.work_shares)
        return Learning(PARS(Scale(lengths), 60.0, Tokens(at, lengths, 0.1), share.quantile), r.output, share, 150)
    orders: dict[str, Policy] = {CONTROL: FCFS(), "Oracle SJF": SJF()}
    for seed in range(seeds):
        w = make_workload(records, requests, seed=seed, max_tokens=max_tokens)
        rate = pace(c.run(w.model_copy(update=dict(scores=[0.0] * requests)), queues[CONTROL]))
        for load in rho:
            w = make_workload(records, requests, load * rate, seed, max_tokens, f"ρ={load:g}", c.gaps)
            true, scores = [float(x) for x in w.lengths], rk.score(w.prompts).astype(float)
            for q, v in queues.items():
                oracle = q == "Oracle SJF"
                served = c.run(w.model_copy(update=dict(scores=true if oracle else scores.tolist())), v, "score" if oracle else "")
                r = Requests(np.array(w.arrivals), np.array([x.prompt_tokens for x in served]), np.array(w.lengths),
                             np.array(true if oracle else scores))
                sim = summarise(simulate(r, c.m, orders.get(q) or pars(r)).served())
                rows.append(dict(queue=q, load=load, seed=seed, **{f"{k}_{side}": x[k] for side, x in (("real", summarise(served)), ("sim", sim))
                                 for k in ("mean_ntpot_ms", "mean_ttft_ms", "p99_e2el_ms", "duration")}))
                print({k: round(x, 2) if isinstance(x, float) else x for k, x in rows[-1].items()}, flush=True)
    write("serving/clocked-simulated", requests=requests, engine=c.m.model_dump(), rows=rows)


@app.command()
def harm(data: Data, trace: Trace, engine: EngineFile, target: str | None = None, requests: int = 2000, seeds: int = 5,
         rho: list[float] = [0.9, 1.1], max_tokens: int = 1024):  # noqa: B006
    "Useless and reversed scores, which the clients send: those who come in the second half, when the guard has had its requests to judge by."
    c, records, rows = Clock(engine, trace), unseen(data, target, None), []
    queues = {CONTROL: ours(policy="fcfs"), "PARS": ours(client_scores=True), "no guard": ours(client_scores=True, min_tau=0.0),
              "no guard, all go": ours(client_scores=True, min_tau=0.0, tail=1e9, max_overtake_s=1e9),
              "shadow": ours(client_scores=True, mode="shadow")}
    w = make_workload(records, requests, seed=0, max_tokens=max_tokens)
    rate = pace(c.run(w.model_copy(update=dict(scores=[0.0] * requests)), queues[CONTROL]))
    for load in rho:
        for kind in ("random", "reversed"):
            for seed in range(seeds):
                w = make_workload(records, requests, load * rate, seed, max_tokens, f"{kind} scores, ρ={load:g}", c.gaps)
                scores = np.random.default_rng(seed).random(requests) if kind == "random" else -np.array(w.lengths, float)
                for q, v in queues.items():
                    served = c.run(w.model_copy(update=dict(scores=scores.tolist())), v, "score")
                    late = summarise(sorted(served, key=lambda o: o.arrival)[requests // 2:])
                    rows.append(dict(queue=q, workload=w.name, seed=seed, **late))
                    print(f"{w.name:24} seed {seed} {q:18} mean E2EL {late['mean_e2el_ms']:8.0f} p99 {late['p99_e2el_ms']:8.0f} ms", flush=True)
    write("serving/clocked-harm", requests=requests, engine=c.m.model_dump(), summary=json.loads(table(pd.DataFrame(rows)).to_json(orient="records")),
          runs=rows)


if __name__ == "__main__":
    quiet_transformers()
    app()
