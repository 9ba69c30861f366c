"""Lengths learned while serving, on recorded lengths: how soon is the order right, and how soon again after a change? Each stream is one
JSON in results/learning. Requests finish in the order they came; each is predicted by every candidate before its length is shown.

    python studies/learning.py streams --data ../shared/data --tokenizer MODEL_FOLDER
    python studies/learning.py parts --data ../shared/data --tokenizer MODEL_FOLDER
    python studies/learning.py cost --data ../shared/data --tokenizer MODEL_FOLDER
"""
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import write
from scipy.stats import norm
from tokenizers import Tokenizer

from pars_nb import learner as learner_module
from pars_nb.learner import Core, Learner, Row, columns, fit, scores
from pars_nb.order import tau_b
from pars_nb.records import read
from pars_nb.signals import Marks, Reader, Signals

app = typer.Typer(add_completion=False)
Data = Annotated[Path, typer.Option(help="folder of recorded lengths")]
Words = Annotated[Path, typer.Option(help="folder with a tokenizer.json")]
LLAMA, QWEN, GEMMA = "Llama-3.1-8B-Instruct", "Qwen2.5-32B-Instruct", "gemma-3-4b-it"
APPS = ("alpaca", "apps", "dolly", "ds1000", "mbpp", "sharegpt")
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
        self.data, self.tok = data, Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.tok.no_truncation()
        self.tok.no_padding()
        user, end, begin = (self.encode(t) for t in ("[CLS] user : ", "[SEP] [CLS] assistant : ", "[CLS] system : "))
        self.marks, self.begin = Marks(user=tuple(user), end=tuple(end)), begin
        self.system = {k: self.encode(v + " [SEP] ") for k, v in SYSTEM.items()}

    def encode(self, text: str) -> list[int]:
        return self.tok.encode(text, add_special_tokens=False).ids

    def one(self, file: str, model: str | None = None, most: int = 7000, seed: int = 0, app: str = "plain") -> Traffic:
        rng, records = np.random.default_rng(seed), read(self.data / f"{file}.parquet", model)
        chosen = [records[i] for i in rng.permutation(len(records))[:most]]
        ids = [e.ids for e in self.tok.encode_batch([r.prompt for r in chosen], add_special_tokens=False)]
        return Traffic(ids, [app] * len(ids), np.array([r.lengths[int(rng.integers(len(r.lengths)))] for r in chosen], dtype=float))

    def mixed(self, model: str, most: int, seed: int, weights: Sequence[float] = (1, 1, 1, 1, 1, 1), part: slice = slice(None)) -> Traffic:
        "All of castillo's workloads, shuffled; `weights` make some of them rarer."
        rng, out = np.random.default_rng(seed), Traffic([], [], np.zeros(0))
        for name, w in zip(APPS, weights, strict=True):
            one = self.one(f"castillo_{name}", model, 7000, seed, name)
            rows = list(range(len(one.lengths)))[part]
            out += one.pick(rows[: round(w * len(rows))])
        return out.pick([int(i) for i in rng.permutation(len(out.lengths))[:most]])

    def signals(self, t: Traffic, reader: Reader | None = None) -> list[Signals]:
        reader = reader or Reader(self.marks)
        heads = {a: [*self.begin, *self.system[a], *self.marks.user] for a in set(t.apps)}
        return [reader([*heads[a], *p, *self.marks.end]) for p, a in zip(t.prompts, t.apps, strict=True)]


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


PARTS: dict[str, dict[str, Any]] = {  # what is changed in pars_nb.learner
    "as it is": {}, "log length as the target": dict(normal_scores=standardised), "no applications": dict(APP=1e-6), "no tags": dict(TAG=1e-6),
    "no prompt length": dict(LENGTH=1e-6), "none of the three": dict(APP=1e-6, TAG=1e-6, LENGTH=1e-6), "weak applications": dict(APP=0.25),
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
    many = [_clock(lambda: scores(model, columns(read_[:256], [None] * 256))) / min(256, len(read_)) for _ in range(20)]
    away = Learner("x", share=0.02)
    seen = [_clock(partial(away.seen, s, 5)) for s in read_]
    polled = [_clock(away.poll) for _ in read_]
    away.close()
    times |= dict(predict_many_each=dict(p50=round(float(np.median(many)), 2)), seen=_spread(seen), poll=_spread(polled))
    print(times)
    write("learning/cost", tokens=tokens, prompts=len(prompts), microseconds=times, process=at_rate(signals, t.lengths))


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


def _clock(f: Callable[[], Any]) -> float:  # microseconds
    start = time.perf_counter_ns()
    f()
    return (time.perf_counter_ns() - start) / 1e3


def _spread(x: Sequence[float]) -> dict[str, float]:
    p50, p99, top = np.percentile(x, [50, 99, 99.9])
    return dict(p50=round(float(p50), 2), p99=round(float(p99), 2), p999=round(float(top), 2))


def _timed(f: Callable[[Any], Any], items: Sequence[Any], rounds: int = 5) -> dict[str, float]:
    return _spread([_clock(partial(f, x)) for _ in range(rounds) for x in items])


if __name__ == "__main__":
    app()
