"""Lengths learned while serving, on recorded lengths: how soon is the order right, and how soon again after a change? Each stream is one
JSON in results/learning. Requests finish in the order they came; each is predicted by every candidate before its length is shown.

    python studies/learning.py streams --data ../shared/data --tokenizer MODEL_FOLDER
    python studies/learning.py parts --data ../shared/data --tokenizer MODEL_FOLDER
    python studies/learning.py clocked --data ../shared/data --tokenizer MODEL_FOLDER --engine results/arena/engine_cpu.json
    python studies/learning.py cold --data ../shared/data --tokenizer MODEL_FOLDER --engine results/arena/engine_cpu.json
    python studies/learning.py prior --data ../shared/data --tokenizer MODEL_FOLDER
    python studies/learning.py known --data ../shared/data --tokenizer MODEL_FOLDER
    python studies/learning.py live --minutes 30
    python studies/learning.py cost --data ../shared/data --tokenizer MODEL_FOLDER
"""
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from common import EngineFile, gaps_of, ours, scheduler_of, write
from scipy.stats import norm
from tokenizers import Tokenizer

from pars_nb import learner as learner_module
from pars_nb.calibrate import load_engine
from pars_nb.latency import summarise
from pars_nb.learner import Core, Learner, Row, columns, fit, ridge, schema, scores
from pars_nb.order import tau_b
from pars_nb.signals import Marks, Reader, Signals

app = typer.Typer(add_completion=False)
Data = Annotated[Path, typer.Option(help="folder of recorded lengths")]
Words = Annotated[Path, typer.Option(help="folder with a tokenizer.json")]
LLAMA, QWEN, GEMMA = "Llama-3.1-8B-Instruct", "Qwen2.5-32B-Instruct", "gemma-3-4b-it"
APPS = ("alpaca", "apps", "dolly", "ds1000", "mbpp", "sharegpt")
COLD_START = dict(alpaca_davinci003=None, alpaca_vicuna7b=None, castillo_alpaca=LLAMA, castillo_sharegpt=LLAMA)  # `universal` has not learned these
KEPT = ("mean_ntpot_ms", "mean_e2el_ms", "p99_e2el_ms", "mean_ttft_ms")
SYSTEM = dict(  # the system prompt of each application; `` for what comes without an application
    plain="You are a helpful assistant.",
    alpaca="You follow instructions. Be precise, and keep to the format that is asked for.",
    apps="You write programs for competitions. Read the task, then give one complete program in Python that reads from standard input.",
    dolly="You answer questions of colleagues. Where a text is given, use nothing but that text.",
    ds1000="You help data scientists with numpy, pandas and their kin. Complete the code where it breaks off.",
    mbpp="You write small functions in Python. The function must pass the tests that are shown.",
    sharegpt="You are a friendly companion for long talks about anything at all.")


@dataclass
class Traffic:
    "Prompts in the order they come, the application each belongs to, and their lengths in tokens."
    prompts: list[list[int]]
    apps: list[str]
    lengths: np.ndarray

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.prompts + other.prompts, self.apps + other.apps, np.concatenate([self.lengths, other.lengths]))

    def pick(self, index: Sequence[int]) -> "Traffic":
        return Traffic([self.prompts[i] for i in index], [self.apps[i] for i in index], self.lengths[list(index)])


class Source:
    "Recorded lengths as traffic, each prompt once, one of its runs."

    def __init__(self, data: Path, tokenizer: Path) -> None:
        self.text: dict[tuple[int, ...], str] = {}  # of the prompts drawn so far
        self.data, self.tok = data, Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.tok.no_truncation()
        self.tok.no_padding()
        user, end, begin = (self.encode(t) for t in ("[CLS] user : ", "[SEP] [CLS] assistant : ", "[CLS] system : "))
        self.marks, self.begin = Marks(user=tuple(user), end=tuple(end)), begin
        self.system = {k: self.encode(v + " [SEP] ") for k, v in SYSTEM.items()}

    def encode(self, text: str) -> list[int]:
        return self.tok.encode(text, add_special_tokens=False).ids

    def one(self, file: str, model: str | None = None, most: int = 7000, seed: int = 0, app: str = "plain") -> Traffic:
        rng, rows = np.random.default_rng(seed), pd.read_parquet(self.data / f"{file}.parquet")
        prompts = list((rows if model is None else rows[rows.model == model]).groupby("prompt", sort=False).response_tokens)
        chosen = [prompts[i] for i in rng.permutation(len(prompts))[:most]]
        ids = [e.ids for e in self.tok.encode_batch([prompt for prompt, _ in chosen], add_special_tokens=False)]
        self.text |= {tuple(i): prompt for i, (prompt, _) in zip(ids, chosen, strict=True)}
        return Traffic(ids, [app] * len(ids), np.array([n.iloc[int(rng.integers(len(n)))] for _, n in chosen], dtype=float))

    def mixed(self, model: str, most: int, seed: int, weights: Sequence[float] = (1, 1, 1, 1, 1, 1), part: slice = slice(None)) -> Traffic:
        "All of castillo's workloads, shuffled; `weights` make some of them rarer."
        rng, out = np.random.default_rng(seed), Traffic([], [], np.zeros(0))
        for name, w in zip(APPS, weights, strict=True):
            one = self.one(f"castillo_{name}", model, 7000, seed, name)
            rows = list(range(len(one.lengths)))[part]
            out += one.pick(rows[: round(w * len(rows))])
        return out.pick([int(i) for i in rng.permutation(len(out.lengths))[:most]])

    def whole(self, t: Traffic) -> list[list[int]]:
        "The prompts as a chat template puts them."
        heads = {a: [*self.begin, *self.system[a], *self.marks.user] for a in set(t.apps)}
        return [[*heads[a], *p, *self.marks.end] for p, a in zip(t.prompts, t.apps, strict=True)]

    def signals(self, t: Traffic, reader: Reader | None = None) -> list[Signals]:
        return [*map(reader or Reader(self.marks), self.whole(t))]


def told(lengths: np.ndarray, apps: Sequence[str], rho: float, seed: int, within: bool) -> np.ndarray:
    "Scores of a ranker whose normal scores correlate so with those of the lengths; `within`: it knows nothing of the applications' means."
    rng, log = np.random.default_rng(seed + 1000), np.log(lengths)
    if within:
        means = {a: log[[b == a for b in apps]].mean() for a in dict.fromkeys(apps)}
        log = log - np.array([means[a] for a in apps])
    z = norm.ppf((np.argsort(np.argsort(log + 1e-9 * rng.normal(size=len(log)))) + 0.5) / len(log))
    return rho * z + np.sqrt(1 - rho**2) * rng.normal(size=len(log))


def follow(signals: Sequence[Signals], lengths: np.ndarray, given: np.ndarray | None, cuts: Sequence[int]) -> dict[str, Any]:
    "τ_b of every candidate, and of what is followed, in blocks between the cuts; when anything was followed first."
    core = Core(ranker=given is not None)
    guesses, followed = [], []
    for i, (s, n) in enumerate(zip(signals, lengths, strict=True)):
        row = Row(s, int(n), None if given is None else float(given[i]))
        guesses.append(core.guesses([row])[0])
        followed.append(core.follows)
        core.see([row])
    names, g = core.judge.names, np.array(guesses)
    lead = np.array([np.nan if f is None else g[i, names.index(f)] for i, f in enumerate(followed)])
    rows = {n: g[:, k] for k, n in enumerate(names)} | dict(followed=lead)
    blocks = {n: [_tau(x[a:b], lengths[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)] for n, x in rows.items() if np.isfinite(x).any()}
    return dict(blocks=blocks, first_followed=next((i for i, f in enumerate(followed) if f), None), forgot=core.forgot, fits=core.fits,
                follows={str(f): followed.count(f) for f in dict.fromkeys(followed)}, fit_cpu_s=round(core.cpu_s, 2))


def _tau(x: np.ndarray, y: np.ndarray) -> float | None:
    "None where nothing was predicted for some of them."
    return round(tau_b(x, y), 4) if len(x) > 1 and np.isfinite(x).all() else None


COLD = (0, 100, 200, 400, 800, 1600, 3200, 6400, 7000)
MIXED = (0, 100, 200, 400, 1000, 1600, 2400, 3300)
CHANGE = (0, 1000, 1500, 2000, 2150, 2300, 2450, 2600, 3000, 3500, 4000)


def all_streams(s: Source) -> dict[str, tuple[Callable[[int], Traffic], Sequence[int], tuple[float, bool] | None]]:
    "Name → (traffic of a seed, cuts, the simulated ranker's correlation and blindness)."
    before, after = (0.8, 0.2, 0.8, 0.4, 0.4, 1.0), (0.3, 1.0, 0.4, 1.0, 1.0, 0.2)

    def hostile(seed: int) -> Traffic:
        "From 1,500 on, a third comes from a tenant that writes what has short answers and gets long ones."
        t, rng = s.one("alpaca_davinci003", None, 4000, seed), np.random.default_rng(seed)
        short = np.argsort(t.lengths[:1000])[:200]
        for i in range(1500, 4000):
            if rng.random() < 1 / 3:
                t.prompts[i], t.lengths[i] = t.prompts[int(rng.choice(short))], float(rng.integers(300, 500))
        return t

    out: dict[str, Any] = dict(
        davinci003=(lambda k: s.one("alpaca_davinci003", None, 7000, k), COLD, None),
        vicuna=(lambda k: s.one("alpaca_vicuna7b", None, 7000, k), COLD, None),
        mmlu_pro_cot=(lambda k: s.one("mmlu_pro_cot", "Meta-Llama-3_1-8B-Instruct", 7000, k), COLD, None),
        drift_model=(lambda k: s.one("alpaca_davinci003", None, 2000, k) + s.one("alpaca_vicuna7b", None, 2000, k + 50), CHANGE, None),
        drift_traffic=(lambda k: s.one("alpaca_davinci003", None, 2000, k) + s.mixed(QWEN, 2000, k), CHANGE, None),
        drift_mix=(lambda k: s.mixed(QWEN, 1200, k, before, slice(0, None, 2)) + s.mixed(GEMMA, 1200, k, after, slice(1, None, 2)),
                   (0, 400, 800, 1200, 1350, 1500, 1650, 1800, 2400), None),
        hostile=(hostile, (0, 500, 1000, 1500, 1800, 2100, 2500, 3000, 4000), None))
    out |= {f"mixed_{n}": (lambda k, m=m: s.mixed(m, 3300, k), MIXED, None) for n, m in dict(llama=LLAMA, qwen=QWEN, gemma=GEMMA).items()}
    for rho in (0.3, 0.6, 0.8):
        out[f"stacked_davinci003_{rho}"] = (lambda k: s.one("alpaca_davinci003", None, 3200, k), COLD, (rho, False))
        out[f"stacked_mixed_{rho}"] = (lambda k: s.mixed(QWEN, 3300, k), MIXED, (rho, True))
    return out


def median(blocks: Sequence[dict[str, list[float | None]]]) -> dict[str, list[float | None]]:
    "Over seeds, block by block; None where a seed has none."
    out: dict[str, list[float | None]] = {}
    for name in blocks[0]:
        columns_ = list(zip(*(b.get(name, []) for b in blocks), strict=False))
        out[name] = [None if None in c else round(float(np.median([x for x in c if x is not None])), 4) for c in columns_]
    return out


@app.command()
def streams(data: Data, tokenizer: Words, seeds: int = 3, only: str = "") -> None:
    "Prequential τ_b over time, each stream several seeds."
    source = Source(data, tokenizer)
    for name, (make, cuts, ranker) in all_streams(source).items():
        if only and name not in only.split(","):
            continue
        runs = []
        for seed in range(seeds):
            t = make(seed)
            used = [c for c in cuts if c < len(t.lengths)] + [len(t.lengths)]
            given = None if ranker is None else told(t.lengths, t.apps, ranker[0], seed, ranker[1])
            runs.append(dict(seed=seed, cuts=used, **follow(source.signals(t), t.lengths, given, used)))
        med = median([r["blocks"] for r in runs])
        first = [r["first_followed"] for r in runs]
        print(name, runs[0]["cuts"], *(f"  {k}: {v}" for k, v in med.items()), f"  first followed {first}", sep="\n", flush=True)
        write(f"learning/{name}", ranker=ranker, cuts=runs[0]["cuts"], median=med, seeds=runs)


def standardised(x: np.ndarray, bound: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    "Log lengths, as a target in place of normal scores."
    log = np.log(np.maximum(1, x))
    return (log - log.mean()) / (log.std() + 1e-9), log.mean() + log.std() * np.linspace(-3.5, 3.5, 281)


def weighed(power: float, least: int) -> Callable[..., dict[str, Any]]:
    "Words by another power of their inverse document frequency, and from so many requests on."

    def changed(c: Any, base: Any) -> dict[str, Any]:
        n, seen = len(c.counts), np.bincount(c.words, minlength=learner_module.SLOTS)
        idf = np.where(seen >= least, (np.log((1 + n) / (1 + seen)) + 1) ** power, 0.0)
        return schema(c, base) | dict(idf=idf)

    return changed


PARTS: dict[str, dict[str, Any]] = {  # what is changed in pars_nb.learner
    "as it is": {}, "log length as the target": dict(normal_scores=standardised), "no applications": dict(APP=1e-6), "no tags": dict(TAG=1e-6),
    "no prompt length": dict(LENGTH=1e-6), "none of the three": dict(APP=1e-6, TAG=1e-6, LENGTH=1e-6), "weak applications": dict(APP=0.25),
    "half the shrinkage": dict(ridge=partial(ridge, alpha=0.5)), "twice the shrinkage": dict(ridge=partial(ridge, alpha=2.0)),
    "all words alike": dict(schema=weighed(0.0, 2)), "rare words more": dict(schema=weighed(1.0, 2)),
    "words of one request too": dict(schema=weighed(0.5, 1)), "words of three": dict(schema=weighed(0.5, 3)),
    "strong applications": dict(APP=1.0), "192 first and 64 last tokens": {}, "no marks of the chat template": {}}


@app.command()
def parts(data: Data, tokenizer: Words, seeds: int = 2) -> None:
    "τ_b on the next requests after a fit on 400, 1,000 and 2,400, each part of the fit changed alone."
    source, cuts, out = Source(data, tokenizer), (400, 1000, 2400, 3300), dict[str, dict[str, list[float]]]()
    readers = {"192 first and 64 last tokens": (source.marks, 192, 64), "no marks of the chat template": (Marks(), 96, 32)}
    kept = {k: getattr(learner_module, k) for p in PARTS.values() for k in p}
    for name in ("davinci003", "vicuna", "mmlu_pro_cot", "mixed_llama", "mixed_qwen", "mixed_gemma"):
        for seed in range(seeds):
            t = all_streams(source)[name][0](seed)
            for part, change in PARTS.items():
                for k, v in (kept | change).items():
                    setattr(learner_module, k, v)
                reader = Reader(*readers.get(part, (source.marks, 96, 32)))
                rows = [Row(s, int(n)) for s, n in zip(source.signals(t, reader), t.lengths, strict=True)][: cuts[-1]]
                taus = [tau_b(scores(fit(rows[:a]), columns([r.signals for r in rows[a:b]], [None] * (b - a))), t.lengths[a:b])
                        for a, b in zip(cuts, cuts[1:], strict=False)]
                out.setdefault(part, {}).setdefault(name, []).append(round(float(np.mean(taus)), 4))
    for k, v in kept.items():
        setattr(learner_module, k, v)
    table = {p: {n: round(float(np.mean(x)), 4) for n, x in v.items()} for p, v in out.items()}
    for p, v in table.items():
        print(f"{p:30}", v, f"mean {np.mean(list(v.values())):.4f}")
    write("learning/parts", cuts=cuts, seeds=seeds, mean_over_cuts=table, each=out)


@app.command()
def prior(data: Data, tokenizer: Words, seeds: int = 2, most: int = 1000) -> None:
    "The first requests with the package's universal ranker and without: streams of instructions that it was not trained on."
    from pars_nb.backends import open_ranker

    source, universal, out = Source(data, tokenizer), open_ranker("universal"), dict[str, Any]()
    cuts = (0, 60, 100, 200, 400, most)
    for file in ("alpaca_davinci003", "alpaca_vicuna7b", "alpaca_gpt4_subset"):
        runs: dict[str, list[Any]] = {"nothing": [], "universal": []}
        for seed in range(seeds):
            t = source.one(file, None, most, seed)
            given = universal.score([source.text[tuple(p)] for p in t.prompts]).astype(float)
            for name, g in (("nothing", None), ("universal", given)):
                runs[name].append(follow(source.signals(t), t.lengths, g, cuts))
        out[file] = {k: dict(median=median([r["blocks"] for r in v]), first_followed=[r["first_followed"] for r in v]) for k, v in runs.items()}
        print(file, json.dumps(out[file]), flush=True)
    write("learning/prior", cuts=cuts, seeds=seeds, streams=out)


@app.command()
def known(data: Data, tokenizer: Words, stream: str = "alpaca_davinci003", after: str = "100,1000,10000", shown: int = 300, seed: int = 0) -> None:
    "What a fit on the first requests says of the next ones, request by request: predicted and real tokens."
    source, cuts, out = Source(data, tokenizer), [int(a) for a in after.split(",")], []
    t = source.one(stream, None, cuts[-1] + shown, seed)
    rows = [Row(s, int(n)) for s, n in zip(source.signals(t), t.lengths, strict=True)]
    for cut in cuts:
        model, real = fit(rows[:cut]), t.lengths[cut : cut + shown]
        said = np.exp([model.log_length(model.score(r.signals)) for r in rows[cut : cut + shown]])
        out.append(dict(after=cut, tau_b=_tau(said, real), predicted=said.round(1).tolist(), real=real.astype(int).tolist()))
        print(cut, out[-1]["tau_b"])
    write("learning/known", stream=stream, seed=seed, shown=shown, rows=out)


@dataclass
class Play:
    "Traffic with a time of arrival and a trained ranker's score for each request."
    ids: list[list[int]]
    lengths: np.ndarray
    arrivals: np.ndarray
    scores: np.ndarray  # tokens

    def served(self, e: Any, scores_: np.ndarray, **pars: Any) -> list[Any]:
        "vLLM's own scheduler plays it on a nominal clock."
        from types import SimpleNamespace
        from unittest.mock import patch

        import pars_nb.scheduler as module
        from clocked import play
        from tail import Hears, Nominal, hasher_of

        clock = Nominal(e)
        with patch.object(module, "time", clock):
            s = scheduler_of(e.max_num_seqs, e.max_num_batched_tokens, e.block_size, **ours(**dict(learn_inline=True) | pars))
            Hears(s, clock)
            w = SimpleNamespace(arrivals=self.arrivals.tolist(), lengths=self.lengths.astype(int).tolist(), scores=scores_.tolist())
            served = play(s, w, self.ids, clock, "score", hasher_of(e.block_size))
            s.shutdown()
        return served


def trained(source: Source, others: Traffic, t: Traffic) -> np.ndarray:
    "What a linear ranker says that was trained on other prompts of the same kind: tokens."
    m = fit([Row(s, int(n)) for s, n in zip(source.signals(others), others.lengths, strict=True)])
    x = scores(m, columns(source.signals(t), [None] * len(t.lengths)))
    return np.exp(np.interp(x, np.linspace(-3.5, 3.5, 281), m.quantiles))


def paced(e: Any, parts: Sequence[Traffic], gaps: np.ndarray, rho: float, ids: list[list[int]], seed: int) -> np.ndarray:
    "Arrivals with the trace's gaps, at ρ of what the engine gives, in each part for itself."
    from pars_nb.simulate import Requests, capacity

    rng, start, at = np.random.default_rng(seed), 0, 0.0
    out = []
    for t in parts:
        n = len(t.lengths)
        k = rng.choice(n, min(n, 2000), replace=False)
        prompt = np.array([len(ids[start + i]) for i in k])
        rate = capacity(Requests(np.zeros(len(k)), prompt, t.lengths[k].astype(int), t.lengths[k]), e)
        x = np.resize(np.roll(gaps, -int(rng.integers(len(gaps)))), n)
        out.append(at + np.cumsum(x / x.mean()) / (rho * rate))
        start, at = start + n, float(out[-1][-1])
    return np.concatenate(out)


@app.command()
def clocked(data: Data, tokenizer: Words, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", only: str = "davinci003,vicuna,drift",
            requests: int = 6000, seeds: int = 1, rho: float = 1.1, block: int = 500, max_tokens: int = 1024) -> None:
    "A cold start at a load above what the engine gives, in vLLM's own scheduler: each queue over time, in blocks of requests as they came."
    source, e, gaps = Source(data, tokenizer), load_engine(engine), np.array(gaps_of(data / trace))
    half = requests // 2
    streams_: dict[str, Callable[[int], tuple[list[Traffic], list[Traffic]]]] = dict(  # what is served, and what the ranker was trained on
        davinci003=lambda k: _cut(source.one("alpaca_davinci003", None, requests + 12_000, k), requests),
        vicuna=lambda k: _cut(source.one("alpaca_vicuna7b", None, requests + 10_000, k), requests),
        drift=lambda k: ([source.one("alpaca_davinci003", None, half, k), source.mixed(QWEN, half, k)],
                         [source.one("alpaca_davinci003", None, half + 12_000, k).pick(range(half, half + 12_000))]))
    for name in only.split(","):
        rows: list[dict[str, Any]] = []
        over_time: list[dict[str, Any]] = []
        for seed in range(seeds):
            parts_, others = streams_[name](seed)
            t = parts_[0] if len(parts_) == 1 else parts_[0] + parts_[1]
            t = Traffic(t.prompts, t.apps, np.minimum(t.lengths, max_tokens))
            ids = source.whole(t)
            p = Play(ids, t.lengths, paced(e, parts_, gaps, rho, ids, seed), trained(source, others[0], t))
            queues: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
                "FCFS": (p.scores, dict(policy="fcfs")), "told nothing": (p.scores, {}),
                "ranker": (p.scores, dict(client_scores=True, learn=False)), "ranker and learner": (p.scores, dict(client_scores=True)),
                "oracle": (t.lengths, dict(client_scores=True, learn=False, min_tau=0.0)),
                "oracle SJF": (t.lengths, dict(client_scores=True, learn=False, policy="sjf"))}
            for queue, (told_, settings) in queues.items():
                served = p.served(e, told_, **settings)
                ntpot = np.array([(o.last - o.arrival) / o.output_tokens for o in served])
                e2el = np.array([o.last - o.arrival for o in served])
                over_time.append(dict(queue=queue, seed=seed, mean_ntpot_ms=_blocks(1e3 * ntpot, block), mean_e2el_ms=_blocks(1e3 * e2el, block)))
                rows.append(dict(queue=queue, seed=seed, **summarise(served)))
                print(name, seed, f"{queue:20}", {k: round(rows[-1][k], 1) for k in ("mean_ntpot_ms", "p99_e2el_ms")}, flush=True)
        write(f"learning/clocked_{name}", requests=requests, rho=rho, block=block, seeds=seeds, max_tokens=max_tokens, engine=e.model_dump(),
              ranker_tau=round(tau_b(p.scores, t.lengths), 4), runs=rows, over_time=over_time)


@app.command()
def cold(data: Data, tokenizer: Words, engine: EngineFile, trace: str = "trace_azure2023_conv.parquet", requests: int = 1500, seeds: int = 3,
         rho: float = 1.1, max_tokens: int = 1024) -> None:
    "The first requests of a server, as a burst and as a stream, in vLLM's own scheduler: told nothing, and with the ranker that ships."
    source, e, gaps, said = Source(data, tokenizer), load_engine(engine), np.array(gaps_of(data / trace)), universal()
    rows: list[dict[str, Any]] = []
    for file, model in COLD_START.items():
        for seed, burst in product(range(seeds), (True, False)):
            t = source.one(file, model, requests, seed)
            t = Traffic(t.prompts, t.apps, np.minimum(t.lengths, max_tokens))
            ids, guess = source.whole(t), said([source.text[tuple(p)] for p in t.prompts])
            p = Play(ids, t.lengths, np.zeros(len(ids)) if burst else paced(e, [t], gaps, rho, ids, seed), guess)
            queues: dict[str, tuple[np.ndarray, dict[str, Any]]] = dict(
                FCFS=(guess, dict(policy="fcfs")), nothing=(guess, {}), universal=(guess, dict(client_scores=True)),
                oracle=(t.lengths, dict(client_scores=True, learn=False, min_tau=0.0)))
            for queue, (told_, settings) in queues.items():
                found = {k: v for k, v in summarise(p.served(e, told_, **settings)).items() if k in KEPT}
                rows.append(dict(stream=file, arrivals="burst" if burst else rho, queue=queue, seed=seed, requests=len(ids), **found))
                print(file, seed, rows[-1]["arrivals"], f"{queue:10}", {k: round(found[k], 1) for k in ("mean_ntpot_ms", "p99_e2el_ms")}, flush=True)
    write("learning/cold", requests=requests, rho=rho, seeds=seeds, max_tokens=max_tokens, engine=e.model_dump(), rows=rows)


def universal() -> Callable[[list[str]], np.ndarray]:
    "Lengths in tokens by the ranker that ships."
    from pars_nb.backends import open_ranker
    from pars_nb.cost import Tokens

    ranker = open_ranker("universal")
    table = Tokens(ranker.meta.score_quantiles, ranker.meta.length_quantiles)
    return lambda prompts: np.array([table.answer(float(s)) for s in ranker.score(prompts)])


def _cut(t: Traffic, n: int) -> tuple[list[Traffic], list[Traffic]]:
    return [t.pick(range(n))], [t.pick(range(n, len(t.lengths)))]


def _blocks(x: np.ndarray, block: int) -> list[float]:
    return [round(float(x[a : a + block].mean()), 2) for a in range(0, len(x), block)]


@app.command()
def cost(data: Data, tokenizer: Words, tokens: int = 512, n: int = 400) -> None:
    "Microseconds in the engine's loop for prompts of so many tokens, and the learner's share of a core at twenty requests a second."
    source = Source(data, tokenizer)
    t = source.mixed(QWEN, 3300, 0)
    long = [p for p in t.prompts if len(p) >= tokens - 40][:n]
    prompts = [[*source.begin, *source.system["apps"], *source.marks.user, *p, *source.marks.end][:tokens] for p in long]
    prompts = [p[: -len(source.marks.end)] + list(source.marks.end) for p in prompts]
    reader, core = Reader(source.marks), Core()
    signals = source.signals(t)
    for s, length in zip(signals[:1000], t.lengths[:1000], strict=True):
        core.see([Row(s, int(length))])
    model, read_ = next(e.model for e in core.experts if e.name == "words"), [reader(p) for p in prompts]
    assert model is not None
    times = dict(read=_timed(reader, prompts), predict=_timed(model.score, read_))
    few = read_[:256]
    many = [_clock(lambda: scores(model, columns(few, [None] * len(few)))) for _ in range(40)]
    away = Learner("x", share=0.02)
    seen = [_clock(partial(away.seen, s, 5)) for s in read_]
    polled = [_clock(away.poll) for _ in read_]
    away.close()
    times |= dict(predict_many=_both(many), seen=_both(seen), poll=_both(polled))
    print(times)
    write("learning/cost", tokens=tokens, prompts=len(prompts), many=len(few), microseconds=times, process=at_rate(signals, t.lengths))


@app.command()
def live(minutes: float = 30.0, rate: float = 20.0, seqs: int = 8, seed: int = 0, name: str = "live") -> None:
    "A real engine behind HTTP with the embedded LLM, told nothing: what our code adds to its steps, and what the learner's process costs."
    import asyncio
    import os
    import tempfile

    from pars_nb.engine import serving

    times = Path(tempfile.mkdtemp()) / "times.json"
    os.environ |= dict(PARS_TIMES=str(times), PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
    flags = ("--scheduler-cls", "timed.TimedScheduler", "--max-num-seqs", str(seqs), "--max-model-len", "2048")
    with serving(None, *flags) as url:
        sent = asyncio.run(_talk(url, minutes, rate, seed))
        found = json.loads(times.read_text())
        learner_cpu = _cpu_of(found["learner"]["pid"])
    wall, cpu = np.array(found["added"]).T / 1e3
    steps = np.array(found["steps"]) / 1e3
    facts = dict(sent, steps=len(steps), step_us=_spread(steps.tolist()),
                 added_us=dict(wall=_spread(wall.tolist()), thread_cpu=_spread(cpu.tolist())),
                 added_share_at_p50=round(float(np.median(wall) / np.median(steps)), 4), learner=found["learner"],
                 learner_cpu_s=round(learner_cpu, 2), learner_share_of_a_core=round(learner_cpu / (60 * minutes), 4))
    print(json.dumps(facts, indent=1))
    write(f"learning/{name}", minutes=minutes, rate=rate, max_num_seqs=seqs, seed=seed, **facts)


async def _talk(url: str, minutes: float, rate: float, seed: int) -> dict[str, int]:
    "Poisson requests over HTTP until the time is over; how many were answered."
    import asyncio

    import httpx

    from pars_nb.tiny import demo_prompts

    rng, prompts, got, tasks = np.random.default_rng(seed), demo_prompts(2000, seed), dict(sent=0, answered=0), set[Any]()
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=256)) as client:
        model = (await client.get(f"{url}/models")).json()["data"][0]["id"]

        async def one(prompt: str) -> None:
            body = dict(model=model, messages=[dict(role="user", content=prompt)], max_tokens=512, temperature=0)
            r = await client.post(f"{url}/chat/completions", json=body)
            got["answered"] += r.status_code == 200

        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            await asyncio.sleep(float(rng.exponential(1 / rate)))
            got["sent"] += 1
            task = asyncio.ensure_future(one(prompts[int(rng.integers(len(prompts)))]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks, return_exceptions=True)
    return got


def _cpu_of(pid: int) -> float:
    "Seconds of CPU that a process has taken, its start and imports included (Linux)."
    import os

    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def at_rate(signals: Sequence[Signals], lengths: np.ndarray, rate: float = 20.0, seconds: float = 60.0) -> dict[str, float]:
    "CPU of the learner's process, requests handed over at a rate, its start and imports included and apart."
    before, learner = resource.getrusage(resource.RUSAGE_CHILDREN), Learner("x")
    for k in range(int(rate * seconds)):
        learner.seen(signals[k % len(signals)], int(lengths[k % len(lengths)]))
        learner.poll()
        time.sleep(1 / rate)
    report = learner.report
    learner.close()
    child = learner.child
    assert child is not None and child.process is not None
    child.process.wait(20)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return dict(rate=rate, seconds=seconds, cpu_s=round(cpu, 2), fit_cpu_s=report.get("cpu_s", 0.0), share_of_a_core=round(cpu / seconds, 4))


def _clock(f: Callable[[], Any]) -> tuple[float, float]:  # microseconds by the wall, and of the thread's CPU
    start, cpu = time.perf_counter_ns(), time.thread_time_ns()
    f()
    return (time.perf_counter_ns() - start) / 1e3, (time.thread_time_ns() - cpu) / 1e3


def _both(x: Sequence[tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {k: _spread(v) for k, v in zip(("wall", "thread_cpu"), zip(*x, strict=True), strict=True)}


def _spread(x: Sequence[float]) -> dict[str, float]:
    p50, p99, top = np.percentile(x, [50, 99, 99.9])
    return dict(p50=round(float(p50), 2), p99=round(float(p99), 2), p999=round(float(top), 2))


def _timed(f: Callable[[Any], Any], items: Sequence[Any], rounds: int = 5) -> dict[str, dict[str, float]]:
    return _both([_clock(partial(f, x)) for _ in range(rounds) for x in items])


if __name__ == "__main__":
    app()
