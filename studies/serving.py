"""What the order brings in a real engine, and what the scheduler costs: the measurements behind nbs/72_serving.ipynb. Each command
writes one JSON into results/serving.

    python studies/serving.py load --ranker runs/real/alpaca_davinci003_student --data ../shared/data/alpaca_davinci003.parquet \\
        --trace ../shared/data/trace_azure2023_conv.parquet
"""
import gc
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import typer
from common import CONTROL, Data, Ranker, Trace, gaps_of, ours, pace, rotated, running, scheduler_of, write

from pars_nb.backends import open_ranker
from pars_nb.bench import table, variants
from pars_nb.console import quiet_transformers
from pars_nb.engine import EngineSettings
from pars_nb.latency import summarise
from pars_nb.loop import unseen
from pars_nb.order import tau_b
from pars_nb.workload import make_workload

app = typer.Typer(add_completion=False)


@app.command()
def load(ranker: Ranker, data: Data, trace: Trace, target: str | None = None, name: str = "", requests: int = 1000, burst: int = 2000,
         seeds: int = 5, rho: list[float] = [0.3, 0.7, 0.9, 1.1], max_tokens: int = 1024, scale: float = 1.0, max_num_seqs: int = 16,  # noqa: B006
         student: Path | None = None, null: bool = False, leave_out: list[str] = [],  # noqa: B006
         streams: bool = True):
    """The queues of `variants` and PARS twice more, with the scores sent by the clients and with everyone in the lane (and with a student's
    scores; and the control twice, to see the noise), less those left out. Recorded lengths (times `scale`), a burst and the trace's
    arrivals stretched to each ρ (`--no-streams`: only the burst); interleaved, in an order that rotates. ρ = 1 is the pace of the control
    in the burst (median over seeds)."""
    records, facts = unseen(data, target, ranker), open_ranker(ranker, "torch")
    if scale != 1.0:
        records = [r.model_copy(update=dict(lengths=tuple(max(1, round(scale * n)) for n in r.lengths))) for r in records]
    gaps, queues, settings = gaps_of(trace), variants(str(ranker), priority=True), EngineSettings(max_num_seqs=max_num_seqs)
    if student:  # the same queue, with the cheap ranker in it
        queues["PARS (student)"] = variants(str(student))["PARS"]
    queues["PARS, scores sent"] = variants(str(ranker), client_scores=True)["PARS"]
    queues["PARS, all go ahead"] = variants(str(ranker), tail=1e9, max_overtake_s=1e9)["PARS"]
    if null:
        queues["FCFS (our class), again"] = queues[CONTROL]
    queues, told = {k: v for k, v in queues.items() if k not in leave_out}, ("priority (stock), offline scores", "PARS, scores sent")
    known = dict(zip((r.prompt for r in records), facts.score([r.prompt for r in records]).tolist(), strict=True))
    name, rows = name or data.stem, []
    rates: list[float] = []
    def scored(w):
        return w.model_copy(update=dict(scores=[known[p] for p in w.prompts]))
    with running(queues, settings, f"serving/engine-{name}") as engines:
        for e in engines.values():
            e.run(scored(make_workload(records, 200, seed=999, max_tokens=max_tokens)))
        for what in ("burst", *(rho if streams else ())):
            for seed in range(seeds):
                if what == "burst":
                    w = make_workload(records, burst, seed=seed, max_tokens=max_tokens)
                else:
                    n = requests if what > 0.5 else requests // 2
                    w = make_workload(records, n, what * float(np.median(rates)), 1000 + seed, max_tokens, f"azure ρ={what:g}", gaps)
                w = scored(w)
                for q in rotated(list(engines), seed):
                    served = engines[q].run(w if q in told else w.model_copy(update=dict(scores=[])))
                    s = summarise(served)
                    rates += [pace(served)] if (q, what) == (CONTROL, "burst") else []
                    rows.append(dict(queue=q, workload=w.name, seed=seed, tau_b=tau_b(np.array(w.scores), np.array(w.lengths)), **s))
                    print(f"{w.name:12} seed {seed} {q:34} NTPOT {s['mean_ntpot_ms']:8.1f} ms  p99 E2EL {s['p99_e2el_ms']:8.0f} ms  "
                          f"{s['duration']:5.1f} s", flush=True)
                write(f"serving/load-{name}", requests=requests, burst=burst, scale=scale, max_tokens=max_tokens,
                      engine=settings.model_dump(exclude={"model"}), ranker=facts.meta.metrics,
                      summary=json.loads(table(pd.DataFrame(rows)).to_json(orient="records")), runs=rows)


@app.command()
def harm(data: Data, target: str | None = None, requests: int = 1000, seeds: int = 5, max_tokens: int = 1024, max_num_seqs: int = 16):
    """Useless and reversed scores, which the clients send: bursts, ratios to FCFS. A burst of half the size comes first, by which the guard
    judges; and the same without a guard, without a guard and a lane, and in the shadow."""
    records, settings, rows = unseen(data, target, None), EngineSettings(max_num_seqs=max_num_seqs), []
    queues = {CONTROL: ours(policy="fcfs"), "PARS": ours(client_scores=True), "no guard": ours(client_scores=True, min_tau=0.0),
              "no guard, all go": ours(client_scores=True, min_tau=0.0, tail=1e9, max_overtake_s=1e9),
              "shadow": ours(client_scores=True, mode="shadow")}
    def burst(n, kind, seed):
        w, rng = make_workload(records, n, seed=seed, max_tokens=max_tokens, name=f"{kind} scores"), np.random.default_rng(seed)
        return w.model_copy(update=dict(scores=rng.random(n).tolist() if kind == "random" else [-float(n) for n in w.lengths]))
    with running(queues, settings, "serving/engine-harm") as engines:
        for kind in ("random", "reversed"):
            for e in engines.values():
                e.run(burst(requests // 2, kind, 999))
            for seed in range(seeds):
                for q in rotated(list(engines), seed):
                    s = summarise(engines[q].run(burst(requests, kind, seed)))
                    rows.append(dict(queue=q, workload=f"{kind} scores", seed=seed, **s))
                    print(f"{kind:9} seed {seed} {q:18} mean E2EL {s['mean_e2el_ms']:8.0f} p99 {s['p99_e2el_ms']:8.0f} ms", flush=True)
    write("serving/harm", requests=requests, summary=json.loads(table(pd.DataFrame(rows)).to_json(orient="records")), runs=rows)


KINDS = {"FCFS (stock)": {}, "priority (stock)": dict(scheduling_policy="priority"), CONTROL: ours(policy="fcfs"),
         "PARS": ours(client_scores=True), "PARS, no room": ours(client_scores=True, room=None)}


def step_cost(kind, waiting, steps, seed, tokens):
    """Microseconds a step (schedule and update), and a joining request, with so many waiting and 64 running. Answers have `tokens` tokens in
    the mean, so 64 / tokens requests end in a step, and as many join."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    init_none_hash(sha256)
    rng, s, hasher = np.random.default_rng(seed), scheduler_of(**KINDS[kind]), get_request_block_hasher(16, sha256)
    def request(i):
        x = rng.lognormal(4, 1)
        p = SamplingParams(max_tokens=int(rng.integers(1, 2 * tokens)), ignore_eos=True, extra_args={"pars_score": float(x)})
        p.update_from_generation_config({}, 2)
        return Request(f"{kind}-{i}", rng.integers(5, 200, 32).tolist(), p, None, arrival_time=time.time(), priority=int(x), block_hasher=hasher)
    pool = [request(i) for i in range(waiting + 100 * steps // tokens + 100)]
    for r in pool[:waiting]:
        s.add_request(r)
    gc.collect()
    gc.freeze()  # as vLLM's engine does when it has started
    step, join, fresh = [], [], iter(pool[waiting:])
    for _ in range(steps):
        start = time.perf_counter()
        out = s.schedule()
        mid = time.perf_counter()
        ids = list(out.num_scheduled_tokens)
        result = ModelRunnerOutput(req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=[[7]] * len(ids))
        a = time.perf_counter()
        s.update_from_output(out, result)
        end = time.perf_counter()
        step.append(1e6 * (mid - start + end - a))
        for r in [next(fresh) for _ in range(rng.poisson(64 / tokens))]:
            start = time.perf_counter()
            s.add_request(r)
            join.append(1e6 * (time.perf_counter() - start))
    return float(np.median(step[10:])), float(np.median(join))


@app.command("step")
def steps(steps: int = 200, seeds: int = 3):
    "The scheduler's own cost by queue length: ours against vLLM's FCFS and priority queues; long answers, and very short ones."
    rows = []
    for tokens, waiting, seed, kind in product((200, 8), (100, 10_000, 100_000), range(seeds), KINDS):
        step, join = step_cost(kind, waiting, steps, seed, tokens)
        rows.append(dict(queue=kind, tokens=tokens, waiting=waiting, seed=seed, step_us=step, join_us=join))
        print(rows[-1], flush=True)
    write("serving/step", rows=rows)


if __name__ == "__main__":
    quiet_transformers()
    app()
