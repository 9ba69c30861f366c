"""The tail rule (nbs/23_tail.ipynb) against first come, first served, on recorded lengths and arrivals. Each command writes
results/tail/….json: `simulated` every dataset at every load, by the event simulator; `frontier` what a larger tail would buy; `clocked`
every dataset in vLLM's own scheduler on a nominal clock; `harm` useless and reversed scores there; `speed` simulated requests a second.

    python studies/tail.py simulated --folder ../shared/data --engine results/arena/engine_cpu.json
"""
import json
import time
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from common import EngineFile, RESULTS, gaps_of, write

from pars_nb.advise import scores_with_tau
from pars_nb.backends import open_ranker
from pars_nb.calibrate import load_engine
from pars_nb.lane import Express
from pars_nb.latency import summarise
from pars_nb.policy import FCFS, PARS, Policy, SJF, Scale
from pars_nb.simulate import Requests, capacity, simulate
from pars_nb.tail import Tail

app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Option(help="folder with the recorded lengths and arrivals")]
# name → file, model, τ_b of the predictor
DATASETS = {"davinci": ("alpaca_davinci003", None, 0.62), "alpaca": ("castillo_alpaca", "Llama-3.1-8B-Instruct", 0.55),
            "sharegpt": ("castillo_sharegpt", "Llama-3.1-8B-Instruct", 0.5),
            "r1": ("reason_math500_gsm8k", "DeepSeek-R1-Distill-Llama-8B", 0.43)}
WHATS: list[Any] = ["burst", 0.7, 0.9, 1.0, 1.1, 1.3]
RANKED: list[Any] = ["burst", 0.9, 1.1]


@dataclass
class Learned:
    "A rule whose lane and work are learned on the way, as the scheduler does it: from requests that came `lag` before and have finished since."
    rule: Any
    output: np.ndarray
    express: Express
    lag: int = 150
    came: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.rule = replace(self.rule, express=self.express.quantile, **(dict(work=self.express.work) if isinstance(self.rule, Tail) else {}))

    def key(self, t):
        key = self.rule.key(t)
        self.came.append(self.rule.scale.of(self.rule.cost(t)))
        if (i := t.seq - self.lag) >= 0 and self.express.seen(self.came[i], float(self.output[i])):
            self.rule = replace(self.rule, express=self.express.quantile)
        return key


class LearnedTail(Learned):
    "The same for the tail rule."
    tail = property(lambda self: self.rule.tail)
    max_overtake_s = property(lambda self: self.rule.max_overtake_s)
    together_s = property(lambda self: self.rule.together_s)

    def claim(self, t):
        return self.rule.claim(t)

    def lane(self, t):
        return self.rule.lane(t)


def lengths_of(folder, name):
    "Recorded lengths of a dataset's model, and the predictor's τ_b."
    file, model, tau = DATASETS[name]
    d = pd.read_parquet(folder / f"{file}.parquet")
    return (d if model is None else d[d.model == model]).response_tokens.clip(lower=1).to_numpy(), tau


def arrivals(gaps, n, rng):
    "n arrivals with a trace's gaps, from any place in it, at rate 1; all at once without gaps."
    if gaps is None:
        return np.zeros(n)
    x = np.resize(np.roll(gaps, -int(rng.integers(len(gaps)))), n)
    return np.cumsum(x / x.mean())


def drawn(lengths, tau, n, seed, gaps=None, most=1024):
    "n requests: lengths, scores of this τ_b in tokens (the quantiles of the lengths), arrivals at once or with the trace's gaps at rate 1."
    rng = np.random.default_rng(seed)
    output = np.minimum(most, rng.choice(lengths, n))
    arrival = arrivals(gaps, n, rng)
    place = np.argsort(np.argsort(scores_with_tau(output, tau, seed))) / n
    return Requests(arrival, np.full(n, 30), output, np.quantile(np.minimum(most, lengths), place))


def scene(folder, engine, trace, data, max_tokens, n=2000):
    "Engine, gaps between arrivals, lengths, τ_b of the predictor, and the rate at which the engine serves n at once."
    e, (lengths, tau) = load_engine(engine), lengths_of(folder, data)
    return e, np.array(gaps_of(folder / trace)), lengths, tau, capacity(drawn(lengths, tau, n, 0, most=max_tokens), e)


def rules(r, tails, lanes):
    "Name → (policy, requests as it is told). What the lane and the work are at first is what a checkpoint says."
    table = np.quantile(r.score, np.linspace(0, 1, 201)).tolist()
    held = np.cumsum(r.output[np.argsort(r.score, kind="stable")]) / r.output.sum()
    work_shares = [0.0, *np.interp(np.linspace(0, 1, 201)[1:], np.arange(1, len(held) + 1) / len(held), held)]
    todo = {"FCFS": (FCFS(), r), "Oracle SJF": (SJF(), r._replace(score=r.output.astype(float))), "all go ahead": (SJF(), r),
            "lane 0.1, 60 s": (Learned(PARS(Scale(table), 60.0), r.output, Express(0.1, work_shares)), r)}
    for lane in lanes:
        for tail in tails:
            rule = LearnedTail(Tail(Scale(table), tail, together_s=0.05), r.output, Express(lane, work_shares))
            todo[f"tail {tail:g}, lane {lane:g}"] = (rule, r)
    return todo


def summary_of(rows):
    "Medians over seeds: the share of the gap between FCFS and the oracle that is closed, and ratios to FCFS."
    d = pd.DataFrame(rows).set_index(["data", "what", "seed", "queue"])
    base = {name: d.xs(name, level="queue") for name in ("FCFS", "Oracle SJF")}
    out = d.reset_index("queue").join(base["FCFS"].add_suffix("_fcfs")).join(base["Oracle SJF"].mean_ntpot_ms.rename("best"))
    out["gap_closed"] = (out.mean_ntpot_ms_fcfs - out.mean_ntpot_ms) / (out.mean_ntpot_ms_fcfs - out.best)
    for k in ("mean_ntpot_ms", "mean_e2el_ms", "p99_e2el_ms"):
        out[f"{k}_ratio"] = out[k] / out[f"{k}_fcfs"]
    columns = ["gap_closed", "mean_ntpot_ms_ratio", "mean_e2el_ms_ratio", "p99_e2el_ms_ratio"]
    return out.groupby(["data", "what", "queue"], sort=False)[columns].median().reset_index()


def show(summary):
    "One line a queue: the gap closed and p99 E2EL over FCFS, at each load."
    for data, part in summary.groupby("data", sort=False):
        print(data, list(part.what.unique()))
        for queue, rows in part.groupby("queue", sort=False):
            print(f"  {queue:22}", " | ".join(f"{g:5.2f} {p:4.2f}" for g, p in zip(rows.gap_closed, rows.p99_e2el_ms_ratio, strict=True)))


@app.command()
def simulated(folder: Folder, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", requests: int = 1500, burst: int = 2000,
              seeds: int = 5, tails: list[float] = [1.0, 1.1, 1.2], lanes: list[float] = [0.05], max_tokens: int = 32_768,  # noqa: B006
              name: str = "simulated"):
    "Every dataset at every load, each queue on the same requests."
    rows: list[dict[str, Any]] = []
    for data in DATASETS:
        e, gaps, lengths, tau, rate = scene(folder, engine, trace, data, max_tokens, burst)
        for what in WHATS:
            for seed in range(seeds):
                stream = None if what == "burst" else gaps
                r = drawn(lengths, tau, burst if what == "burst" else requests, seed, stream, max_tokens)
                r = r if what == "burst" else r._replace(arrival=r.arrival / (what * rate))
                for queue, (policy, told) in rules(r, tails, lanes).items():
                    rows.append(dict(data=data, what=what, seed=seed, queue=queue, **summarise(simulate(told, e, policy).served())))
        summary = summary_of(rows)
        show(summary[summary.data == data])
    write(f"tail/{name}", requests=requests, burst=burst, seeds=seeds, max_tokens=max_tokens, engine=e.model_dump(),
          taus={k: v[2] for k, v in DATASETS.items()}, summary=json.loads(summary.to_json(orient="records")))


def asked(folder, data, most):
    "Prompts of a dataset, with the tokens of each and the lengths of its recorded answers."
    file, model, _ = DATASETS[data]
    d = pd.read_parquet(folder / f"{file}.parquet")
    d = d if model is None else d[d.model == model]
    rows = d.groupby("prompt_id", sort=False).agg(prompt=("prompt", "first"), tokens=("prompt_tokens", "first"), lengths=("response_tokens", list))
    return rows.sample(min(most, len(rows)), random_state=0)


def of_prompts(rows, n, seed, gaps=None):
    "n requests, each a prompt and one of its answers; and which prompts."
    rng = np.random.default_rng(seed)
    which = rng.integers(len(rows), size=n)
    output = np.array([max(1, rng.choice(rows.lengths.iloc[i])) for i in which])
    return Requests(arrivals(gaps, n, rng), np.maximum(1, rows.tokens.to_numpy()[which]), output, output.astype(float)), which


@app.command()
def ranked(folder: Folder, engine: EngineFile, ranker: Annotated[list[str], typer.Option(help="folders of rankers, or `universal`")],
           trace: str = "trace_azure2023_conv.parquet", requests: int = 1500, burst: int = 2000, seeds: int = 5, most: int = 1000):
    "What rankers' orders are worth in waiting: recorded prompts with their own lengths, each ranker's scores under the default tail rule."
    e, gaps, rows = load_engine(engine), np.array(gaps_of(folder / trace)), []
    judges = {Path(name).name: open_ranker(name) for name in ranker}
    for data in ("davinci", "alpaca", "sharegpt"):
        prompts = asked(folder, data, most)
        scores = {name: np.asarray(judge.score(prompts.prompt.tolist()), float) for name, judge in judges.items()}
        rate = capacity(of_prompts(prompts, 2000, 0)[0], e)
        for what, seed in product(RANKED, range(seeds)):
            r, which = of_prompts(prompts, burst, seed) if what == "burst" else of_prompts(prompts, requests, seed, gaps)
            r = r if what == "burst" else r._replace(arrival=r.arrival / (what * rate))
            queues: dict[str, Any] = {"FCFS": (FCFS(), r), "Oracle SJF": (SJF(), r)}
            for name, score in scores.items():
                queues[name] = rules(r._replace(score=score[which]), [1.1], [0.05])["tail 1.1, lane 0.05"]
            for queue, (policy, told) in queues.items():
                rows.append(dict(data=data, what=what, seed=seed, queue=queue, **summarise(simulate(told, e, policy).served())))
    summary = summary_of(rows)
    show(summary)
    write("tail/ranked", prompts=most, requests=requests, burst=burst, seeds=seeds, summary=summary.to_dict("records"))


@app.command()
def frontier(folder: Folder, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", requests: int = 6000, seeds: int = 5,
             tails: list[float] = [1.0, 1.05, 1.1, 1.2], lanes: list[float] = [0.05, 0.1, 0.15], max_tokens: int = 32_768):  # noqa: B006
    "How much of the gap can be had for which tail: wider lanes and larger tails, in long streams, where no idle time helps."
    rows: list[dict[str, Any]] = []
    for data in DATASETS:
        e, gaps, lengths, tau, rate = scene(folder, engine, trace, data, max_tokens)
        for what, seed in product(WHATS[2:], range(seeds)):
            r = drawn(lengths, tau, requests, seed, gaps, max_tokens)
            r = r._replace(arrival=r.arrival / (what * rate))
            for queue, (policy, told) in rules(r, tails, lanes).items():
                rows.append(dict(data=data, what=what, seed=seed, queue=queue, **summarise(simulate(told, e, policy).served())))
        summary = summary_of(rows)
        show(summary[summary.data == data])
    write("tail/frontier", requests=requests, seeds=seeds, max_tokens=max_tokens, engine=e.model_dump(), taus={k: v[2] for k, v in DATASETS.items()},
          summary=json.loads(summary.to_json(orient="records")))


class Nominal:
    "The clock of a play: it goes on with each step, and jumps to the next arrival where the engine is idle."

    def __init__(self, engine):
        self.engine, self.now = engine, 0.0

    def time(self):
        return self.now

    def step_s(self, *step):
        took = self.engine.step_s(*step)
        self.now += took
        return took


class Hears:
    "The clock hears of arrivals through the scheduler."

    def __init__(self, scheduler, clock):
        add = scheduler.add_request

        def heard(request):
            clock.now = max(clock.now, request.arrival_time)
            add(request)

        scheduler.add_request = heard


@cache
def hasher_of(block_size):
    "What vLLM's front end gives a request, to find its blocks in the prefix cache."
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(block_size, sha256)


def in_vllm(e, r, prepare=lambda scheduler: None, stock=False, **pars):
    "vLLM's own scheduler (`stock`), or ours, plays the requests on the nominal clock; the clients send the scores. `prepare` sees it beforehand."
    from types import SimpleNamespace
    from unittest.mock import patch

    import pars_nb.scheduler as module
    from clocked import play
    from common import ours, scheduler_of

    clock, cls = Nominal(e), {} if stock else ours(**dict(client_scores=True, learn=False) | pars)
    with patch.object(module, "time", clock):
        s = scheduler_of(e.max_num_seqs, e.max_num_batched_tokens, e.block_size, **cls, max_model_len=int((r.prompt + r.output).max()) + 1)
        Hears(s, clock)
        prepare(s)
        w = SimpleNamespace(arrivals=r.arrival.tolist(), lengths=r.output.tolist(), scores=r.score.tolist())
        ids = [[3 + (i >> 8 * k) % 256 for k in range(int(n))] for i, n in enumerate(r.prompt)]
        served = play(s, w, ids, clock, "" if stock else "score", hasher_of(e.block_size))
        s.shutdown()
    return served


def vllm_queues(r):
    "Name → the requests as they are told, and the settings."
    oracle = r._replace(score=r.output.astype(float))
    return {"stock FCFS": (r, dict(stock=True)), "FCFS": (r, dict(policy="fcfs")), "Oracle SJF": (oracle, dict(policy="sjf")),
            "all go ahead": (r, dict(policy="sjf")), "lane 0.1, 60 s": (r, dict(tail=0.0, lane=0.1, max_overtake_s=60.0)), "PARS": (r, {})}


@app.command()
def clocked(folder: Folder, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", requests: int = 1500, burst: int = 2000,
            seeds: int = 5, datas: Annotated[str, typer.Option(help="by commas; all where empty")] = "", max_tokens: int = 32_768):
    "Every dataset in vLLM's own scheduler, at every load. It goes on where it was stopped."
    path, kept = RESULTS / "tail/clocked.json", ("mean_ntpot_ms", "mean_e2el_ms", "p99_e2el_ms")
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    done = {(r["data"], r["what"], r["seed"]) for r in rows}
    for data in datas.split(",") if datas else DATASETS:
        e, gaps, lengths, tau, rate = scene(folder, engine, trace, data, max_tokens, burst)
        for what, seed in product(WHATS, range(seeds)):
            if (data, what, seed) in done:
                continue
            r = drawn(lengths, tau, burst if what == "burst" else requests, seed, None if what == "burst" else gaps, max_tokens)
            r = r if what == "burst" else r._replace(arrival=r.arrival / (what * rate))
            for queue, (told, settings) in vllm_queues(r).items():
                found = summarise(in_vllm(e, told, **settings))
                rows.append(dict(data=data, what=what, seed=seed, queue=queue, **{k: found[k] for k in kept}))
            summary = summary_of(rows)
            write("tail/clocked", requests=requests, burst=burst, max_tokens=max_tokens, taus={k: v[2] for k, v in DATASETS.items()},
                  engine=e.model_dump(), summary=json.loads(summary.to_json(orient="records")), rows=rows)
        show(summary[summary.data == data])


@app.command()
def harm(folder: Folder, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", data: str = "davinci", requests: int = 2000,
         seeds: int = 3, tail: float = 1.1, lane: float = 0.05, whats: list[str] = ["0.9", "1.1"], max_tokens: int = 1024):  # noqa: B006
    """Useless scores, a predictor's reversed and the true lengths reversed, in vLLM's own scheduler, with the guard and without: those that
    come in the second half."""
    (e, gaps, lengths, tau, rate), rows = scene(folder, engine, trace, data, max_tokens, requests), []
    for what in whats:
        for kind in ("useless", "reversed", "truth reversed"):
            for seed in range(seeds):
                r = drawn(lengths, tau, requests, seed, gaps, max_tokens)
                wrong = {"useless": np.random.default_rng(seed).random(requests), "reversed": -r.score, "truth reversed": -r.output.astype(float)}
                r = r._replace(arrival=r.arrival / (float(what) * rate), score=wrong[kind])
                queues: dict[str, dict[str, Any]] = {"FCFS": dict(policy="fcfs"), "guard": dict(tail=tail, lane=lane),
                                                     "no guard": dict(min_tau=0.0, tail=tail, lane=lane),
                                                     "no guard, all go ahead": dict(min_tau=0.0, policy="sjf")}
                for queue, settings in queues.items():
                    late = sorted(in_vllm(e, r, **settings), key=lambda o: o.arrival)[requests // 2:]
                    rows.append(dict(scores=kind, what=what, seed=seed, queue=queue, **summarise(late)))
    d = pd.DataFrame(rows).set_index(["scores", "what", "seed", "queue"])
    ratio = (d / d.xs("FCFS", level="queue"))[["mean_ntpot_ms", "mean_e2el_ms", "p99_e2el_ms"]].groupby(["scores", "what", "queue"], sort=False)
    print(ratio.median().round(3).to_string())
    write("tail/harm", requests=requests, seeds=seeds, tail=tail, data=data, engine=e.model_dump(),
          median=json.loads(ratio.median().reset_index().to_json(orient="records")),
          worst=json.loads(ratio.max().reset_index().to_json(orient="records")))


@app.command()
def speed(folder: Folder, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", n: int = 10**6, load: float = 0.9,
          repeats: int = 3):
    "Simulated requests a second on one core, keys included: PARS and the tail rule in the same run, by turns."
    e, gaps, rows = load_engine(engine), np.array(gaps_of(folder / trace)), []
    lengths, tau = lengths_of(folder, "davinci")
    r = drawn(lengths, tau, n, 0, gaps)
    r = r._replace(arrival=r.arrival / (load * capacity(drawn(lengths, tau, 2000, 0), e)))
    scale = np.quantile(r.score, np.linspace(0, 1, 201)).tolist()
    policies: dict[str, Policy] = {"FCFS": FCFS(), "PARS": PARS(Scale(scale, window=0), 60.0, express=0.4),
                                    "tail": Tail(Scale(scale, window=0), 1.1, express=0.4)}
    few = r._replace(**{k: getattr(r, k)[:1000] for k in ("arrival", "prompt", "output", "score")})
    for policy in policies.values():
        simulate(few, e, policy)  # compiled
    for repeat in range(repeats):
        for name, policy in policies.items():
            start = time.process_time()
            s = simulate(r, e, policy)
            took = time.process_time() - start
            rows.append(dict(policy=name, repeat=repeat, seconds=took, per_s=n / took, events_per_request=s.events / n))
            print(rows[-1], flush=True)
    write("tail/speed", n=n, load=load, engine=e.model_dump(), rows=rows)


if __name__ == "__main__":
    app()
