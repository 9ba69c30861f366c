"""What each part of a ranker brings: the measurements behind nbs/71_ranking.ipynb. Each command writes one JSON into results/ranking,
cell by cell, and goes on where it was stopped.

    python studies/ranking.py predictors --data ../shared/data --encoder MODEL_FOLDER
"""
import json
import math
import re
import shlex
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import TrainerCallback, get_linear_schedule_with_warmup

from pars_nb.bench import machine
from pars_nb.console import quiet_transformers
from pars_nb.order import bootstrap, noise_ceiling, pair_accuracy, tau_b
from pars_nb.pairs import log_noise, order_matrix, random_pairs
from pars_nb.records import draw, from_frame, read, split
from pars_nb.train import TrainConfig, fit, new_ranker, set_seed

app = typer.Typer(add_completion=False)
Data = Annotated[Path, typer.Option(help="folder of recorded lengths")]
Encoder = Annotated[str, typer.Option(help="folder or hub name")]
Shard = Annotated[str, typer.Option(help="k/n: do every n-th cell, starting with the k-th")]
OUT = Path(__file__).resolve().parent.parent / "results/ranking"
LLAMA = "Llama-3.1-8B-Instruct"
WORKLOADS = dict(  # file, target model, most prompts
    alpaca_davinci003=("alpaca_davinci003", None, 2000), castillo_alpaca=("castillo_alpaca", LLAMA, 2000),
    castillo_dolly=("castillo_dolly", LLAMA, 2000), castillo_sharegpt=("castillo_sharegpt", LLAMA, 2000),
    castillo_mbpp=("castillo_mbpp", LLAMA, 2000), mmlu_pro_cot=("mmlu_pro_cot", "Meta-Llama-3_1-8B-Instruct", 2000),
    reason=("reason_math500_gsm8k", "DeepSeek-R1-Distill-Llama-8B", 2000))
PARTS = (0.65, 0.05, 0.3)  # train, unused, test: a large test, for the small workloads' sake


@lru_cache
def load(data, name):
    file, target, most = WORKLOADS[name]
    return draw(read(data / f"{file}.parquet", target), most, 0)


class Cells:
    "Results by key, on disk as they come; `todo` leaves out what is there, and what another shard does."

    def __init__(self, name, shard="1/1", **facts):
        self.path, self.facts = OUT / f"{name}.json", facts
        OUT.mkdir(parents=True, exist_ok=True)
        k, self.n = map(int, shard.split("/"))
        self.k = k - 1
        self.part = OUT / f"{name}.{k}.jsonl"
        self.rows = [json.loads(o) for p in OUT.glob(f"{name}.*.jsonl") for o in p.read_text().splitlines()]

    def todo(self, keys):
        done = {json.dumps(r["key"]) for r in self.rows}
        return [k for i, k in enumerate(keys) if i % self.n == self.k and json.dumps(k) not in done]

    def add(self, key, **row):
        self.rows.append(dict(key=key, **row))
        with open(self.part, "a") as f:
            f.write(json.dumps(self.rows[-1]) + "\n")
        print({k: v for k, v in self.rows[-1].items() if not isinstance(v, list) or k == "key"}, flush=True)

    def write(self, keys):
        "The whole table, once every cell is there (whichever shard comes last)."
        rows = {json.dumps(r["key"]): r for p in OUT.glob(f"{self.path.stem}.*.jsonl") for r in map(json.loads, p.read_text().splitlines())}
        if all(json.dumps(k) in rows for k in keys):
            command = re.sub(r" --shard \S+", "", shlex.join(["python", "studies/ranking.py", *sys.argv[1:]]))
            self.path.write_text(json.dumps(dict(command=command, machine=machine(), **self.facts,
                                                 rows=[rows[json.dumps(k)] for k in keys]), indent=1) + "\n")


def report(scores, test, boot=100):
    "τ_b on all pairs with its interval, and accuracy on pairs with gap ≥ 0.2."
    y, cut = np.array([r.mean for r in test]), np.array([r.censored for r in test])
    lo, hi = bootstrap(tau_b, scores, y, boot) if boot else (math.nan, math.nan)
    return dict(tau_b=tau_b(scores, y), lo=lo, hi=hi, pair_accuracy=pair_accuracy(scores, y, 0.2, cut), test_prompts=len(test))


def ridge(train, test):
    "TF-IDF 1–2-grams and a ridge on the log length: the floor for everything else."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    v = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    m = Ridge(alpha=1.0).fit(v.fit_transform([r.prompt for r in train]), np.log([r.mean for r in train]))
    return m.predict(v.transform([r.prompt for r in test]))


@torch.inference_mode()
def embeddings(encoder, records):
    "Mean of the frozen encoder's last layer, (n, d)."
    from transformers import AutoModel, AutoTokenizer

    tok, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder, use_safetensors=True).eval()
    out = []
    for i in range(0, len(records), 64):
        x = tok([r.prompt for r in records[i:i + 64]], padding=True, truncation=True, max_length=128, return_tensors="pt")
        h, m = model(**x).last_hidden_state, x["attention_mask"][..., None]
        out.append(((h * m).sum(1) / m.sum(1)).numpy())
    return np.concatenate(out)


def frozen_ridge(encoder, train, test):
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    a, b = embeddings(encoder, train), embeddings(encoder, test)
    s = StandardScaler().fit(a)
    return RidgeCV(alphas=np.logspace(1, 4, 10)).fit(s.transform(a), np.log([r.mean for r in train])).predict(s.transform(b))


def recipe(encoder, n, seed=0, passes=1600, **kw):
    "One budget for all: about `passes` prompts through the encoder, forth and back."
    epochs = min(4, max(1, round(passes / n, 1)))
    return TrainConfig(encoder=encoder, epochs=epochs, batch_size=16, lr=1e-4, max_length=64, bf16=True, keep_best=False, seed=seed, **kw)


def trained(cfg, train):
    "A ranker trained by `cfg`, and the seconds it took."
    set_seed(cfg.seed)
    r, start = new_ranker(train, cfg), time.perf_counter()
    with tempfile.TemporaryDirectory() as d:
        fit(r, train, train[:2], cfg, Path(d), quiet=True)
    return r, time.perf_counter() - start


@app.command()
def predictors(data: Data, encoder: Encoder, seeds: int = 3, shard: Shard = "1/1"):
    "Predictor × workload × seed, one encoder, one trainer, one budget."
    losses = ["margin", "logistic", "win", "pointwise", "listmle", "bucket"]
    names = [*losses, "margin, δ = 0", "tfidf ridge", "frozen encoder + ridge", "prompt length"]
    keys = [[w, p, s] for s in range(seeds) for w in WORKLOADS if w != "reason" for p in names]
    cells = Cells("predictors", shard, parts=PARTS, workloads=WORKLOADS)
    for w, p, s in (todo := cells.todo(keys)):
        records = load(data, w)
        train, _, test = split(records, PARTS, s)
        start = time.perf_counter()
        if p == "prompt length":
            scores = np.array([len(r.prompt) for r in test])
        elif p == "tfidf ridge":
            scores = ridge(train, test)
        elif p.startswith("frozen"):
            scores = frozen_ridge(encoder, train, test)
        else:
            cfg = recipe(encoder, len(train), s, loss=p.split(",")[0], **(dict(delta=0.0) if "δ" in p else {}))
            scores = trained(cfg, train)[0].score([r.prompt for r in test])
        cells.add([w, p, s], train_prompts=len(train), seconds=time.perf_counter() - start, noise_ceiling=noise_ceiling(test), **report(scores, test))
    cells.write(keys)
    print(f"{len(todo)} cells done")


@app.command("filter")
def filtering(data: Data, encoder: Encoder, seeds: int = 3, shard: Shard = "1/1"):
    "Kept fraction and τ_b against δ, and against the noise-aware filter."
    rules: dict[str, dict[str, Any]] = {**{f"δ = {d}": dict(loss="margin", delta=d) for d in (0.0, 0.1, 0.2, 0.3, 0.5)},
             **{f"confidence {c}": dict(loss="margin", delta=0.0, confidence=c) for c in (0.6, 0.7, 0.8, 0.9)}}
    keys = [[w, k, s] for s in range(seeds) for w in ("alpaca_davinci003", "castillo_alpaca", "castillo_sharegpt") for k in rules]
    cells = Cells("filter", shard, parts=PARTS)
    for w, k, s in cells.todo(keys):
        train, _, test = split(load(data, w), PARTS, s)
        n, cut, kw = np.array([r.mean for r in train]), np.array([r.censored for r in train]), rules[k]
        kept = order_matrix(n, cut, kw["delta"], log_noise(train), kw.get("confidence", 0.0)).sum() / (len(n) * (len(n) - 1) / 2)
        r, seconds = trained(recipe(encoder, len(train), s, **kw), train)
        cells.add([w, k, s], kept=float(kept), seconds=seconds, **report(r.score([o.prompt for o in test]), test, 0))
    cells.write(keys)


@app.command()
def targets(data: Data, encoder: Encoder, seeds: int = 3, shard: Shard = "1/1"):
    "One run, the median, the mean, or all runs to learn from; and the log-normal head with its calibration."
    kinds = {"first run": dict(loss="margin", target="first"), "median": dict(loss="margin", target="median"), "mean": dict(loss="margin"),
             "all runs (win)": dict(loss="win"),
             "log-normal": dict(loss="lognormal")}
    keys = [[w, k, s] for s in range(seeds) for w in ("castillo_alpaca", "castillo_dolly", "castillo_sharegpt") for k in kinds]
    cells = Cells("targets", shard, parts=PARTS)
    for w, k, s in cells.todo(keys):
        train, _, test = split(load(data, w), PARTS, s)
        r, seconds = trained(recipe(encoder, len(train), s, **kinds[k]), train)
        more = {}
        if k == "log-normal":  # where in its predicted distribution does each observed run fall?
            texts = [o.prompt for o in test]
            mid, spread = r.score(texts), r.spread(texts)
            z = [(math.log(x / 100) - m) / sd for o, m, sd in zip(test, mid, spread, strict=True) for x in o.lengths]
            u = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in z])
            more = dict(quantile=[q / 20 for q in range(1, 20)], observed=[float((u <= q / 20).mean()) for q in range(1, 20)],
                        spread_median=float(np.median(spread)))
        cells.add([w, k, s], seconds=seconds, **more, **report(r.score([o.prompt for o in test]), test, 0))
    cells.write(keys)


def averaged(data, leave_out=(), leave_model="", most=6000):
    """One record per prompt and source: e to the mean, over the source's models, of the log length made standard within each
    model. A source's name stands in for the model, so that only prompts of one source meet in a pair."""
    import pandas as pd

    out = []
    for path in sorted(data.glob("*.parquet")):
        if path.stem.startswith("trace") or path.stem in leave_out:
            continue
        d = pd.read_parquet(path, columns=["prompt_id", "prompt", "model", "response_tokens"])
        d = d[~d.model.astype(str).str.replace("_", ".").str.contains(leave_model.replace("_", "."))] if leave_model else d
        d = d.assign(model=d.model.astype(str), z=np.log(d.response_tokens.clip(lower=1)))
        d = d.groupby(["model", "prompt_id"], sort=False).agg(prompt=("prompt", "first"), z=("z", "mean")).reset_index()
        spread = d.groupby("model").z
        d = d.assign(z=(d.z - spread.transform("mean")) / (spread.transform("std") + 1e-6))
        d = d.groupby("prompt_id", sort=False).agg(prompt=("prompt", "first"), z=("z", "mean")).reset_index()
        frame = pd.DataFrame(dict(prompt_id=d.prompt_id, prompt=d.prompt, model=path.stem,
                                  response_tokens=(1000 * np.exp(d.z)).round().clip(lower=1)))
        out += draw(from_frame(frame, path.name), most, 0)
    return out


@app.command()
def universal(data: Data, encoder: Encoder, out: Path = Path("runs/universal"), epochs: float = 2.0, leave_out: str = "",
              leave_model: str = "Llama-3.1-8B", threads: int = 2):
    """One ranker from everything but the prompts that the tests use (those of the 30 % test split of seed 0), the target model,
    and the sources in `leave_out`."""
    torch.set_num_threads(threads)
    records = averaged(data, set(filter(None, leave_out.split(","))), leave_model)
    train = split(records, PARTS, 0)[0]
    cfg = TrainConfig(encoder=encoder, loss="win", epochs=epochs, batch_size=64, lr=1e-4, bf16=True, keep_best=False)
    print(f"{len(train)} prompts of {len({r.model for r in train})} sources", flush=True)
    r, seconds = trained(cfg, train)
    r.meta.target_model, r.meta.metrics = "universal", dict(seconds=seconds, prompts=float(len(train)))
    r.save(out)


@app.command()
def adapt(data: Data, encoder: Encoder, universal: Path = Path("runs/universal"), name: str = "adapt", seeds: int = 3, shard: Shard = "1/1"):
    "Learning curves: the universal ranker adapted with N prompts of the target, against the encoder trained on the same N."
    from pars_nb.ranker import load_ranker

    keys = [[w, init, n, s] for w in ("castillo_alpaca", "castillo_dolly", "castillo_sharegpt", "alpaca_davinci003", "reason")
            for n in (0, 50, 200, 500, 2000) for init in ("universal", "scratch", "tfidf ridge") for s in range(seeds if n else 1)
            if (n or init == "universal") and not (n == 2000 and w != "alpaca_davinci003")]
    cells = Cells(name, shard, parts=PARTS, universal=load_ranker(universal).meta.metrics)
    for w, init, n, s in cells.todo(keys):
        file, target, _ = WORKLOADS[w]
        train, _, test = split(read(data / f"{file}.parquet", target), PARTS, 0)
        test, some = draw(test, 2000, 0), draw(train, n, s) if n else []
        if init == "tfidf ridge":
            scores, seconds = ridge(some, test), 0.0
        elif not n:
            scores, seconds = load_ranker(universal).score([r.prompt for r in test]), 0.0
        else:
            warm, cold = dict(init=str(universal), epochs=4 if n < 2000 else 3, lr=5e-5), dict(epochs=max(3, min(10, 2000 / n)), lr=1e-4)
            more = warm if init == "universal" else cold
            cfg = TrainConfig(encoder=encoder, loss="win", batch_size=32, bf16=True, keep_best=False, seed=s, **more)
            r, seconds = trained(cfg, some)
            scores = r.score([o.prompt for o in test])
        cells.add([w, init, n, s], used=len(some), seconds=seconds, **report(scores, test))
    cells.write(keys)


@app.command()
def matrices(data: Data, encoder: Encoder, shard: Shard = "1/1"):
    "Train on A, test on B: nine models on Castillo's Alpaca prompts, and the workloads of one model."
    import pandas as pd

    alpaca = data / "castillo_alpaca.parquet"
    models = sorted(pd.read_parquet(alpaca, columns=["model"]).model.unique())
    tests = {("model", m): read(alpaca, m) for m in models} | {("workload", w): load(data, w) for w in WORKLOADS}
    keys = [list(k) for k in tests]
    cells = Cells("matrices", shard, parts=PARTS)
    for kind, a in cells.todo(keys):
        train = split(tests[kind, a], PARTS, 0)[0]
        r, _ = trained(recipe(encoder, len(train), loss="win"), train)
        on = {b: split(t, PARTS, 0)[2] for (k, b), t in tests.items() if k == kind}
        cells.add([kind, a], tau_b={b: tau_b(r.score([o.prompt for o in t]), np.array([o.mean for o in t])) for b, t in on.items()})
    cells.write(keys)


class Curve:
    "τ_b on the test prompts after every so many encoder passes; the time it takes to look does not count."

    def __init__(self, ranker, test, every):
        self.r, self.every, self.points, self.last, self.looking, self.start = ranker, every, [], 0, 0.0, time.perf_counter()
        self.prompts, self.y = [o.prompt for o in test], np.array([o.mean for o in test])

    def __call__(self, passes):
        if passes - self.last < self.every:
            return
        now = time.perf_counter()
        self.last = passes
        self.points.append(dict(passes=passes, seconds=now - self.start - self.looking, tau_b=tau_b(self.r.score(self.prompts), self.y)))
        self.r.model.train()
        self.looking += time.perf_counter() - now
        print(self.points[-1], flush=True)


class Look(TrainerCallback):
    def __init__(self, curve, batch_size):
        self.curve, self.batch_size = curve, batch_size

    def on_step_end(self, args, state, control, **kw):
        self.curve(state.global_step * self.batch_size)


def train_on_random_pairs(r, train, seed, lr, epochs, batch_size, curve):
    "The paper's way through the data: ten random partners for each prompt, both sides encoded, all padded to 128."
    pairs, order = random_pairs(train, seed=seed), None
    ids = r.tokenizer([o.prompt for o in train], padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    steps, passes, rng = math.ceil(len(pairs) / batch_size), 0, np.random.default_rng(seed)
    opt = torch.optim.AdamW(r.model.parameters(), lr=lr, weight_decay=0.01)
    plan = get_linear_schedule_with_warmup(opt, int(0.1 * steps * epochs), int(steps * epochs))
    r.model.train()
    for step in range(int(steps * epochs)):
        order = rng.permutation(len(pairs)) if step % steps == 0 else order
        a, b = pairs[order[step % steps * batch_size:][:batch_size]].T
        with torch.autocast("cpu", torch.bfloat16):
            long, short = (r.model(**{k: v[i] for k, v in ids.items()}).logits[:, 0].float() for i in (a, b))
        torch.nn.functional.margin_ranking_loss(long, short, torch.ones(len(a)), margin=1.0).backward()
        opt.step()
        plan.step()
        opt.zero_grad()
        passes += 2 * len(a)
        curve(passes)


@app.command("recipe")
def training_speed(data: Data, encoder: Encoder, prompts: int = 1200, seeds: int = 2, threads: int = 2):
    "Encoder passes and seconds until the paper's recipe's validation τ_b is reached, in-batch all pairs against random pairs."
    torch.set_num_threads(threads)
    records, rows = draw(read(data / "alpaca_davinci003.parquet"), prompts, 0), []
    for seed in range(seeds):
        train, _, test = split(records, PARTS, seed)
        cfg = TrainConfig(encoder=encoder, loss="margin", epochs=6, batch_size=32, lr=1e-4, bf16=True, keep_best=False, seed=seed)
        set_seed(seed)
        ours = new_ranker(train, cfg)
        look = Curve(ours, test, every=400)
        with tempfile.TemporaryDirectory() as d:
            fit(ours, train, train[:2], cfg, Path(d), quiet=True, callbacks=[Look(look, cfg.batch_size)])
        rows.append(dict(seed=seed, how="all pairs of a batch", points=look.points))
        set_seed(seed)
        fresh = new_ranker(train, cfg)
        look = Curve(fresh, test, every=3000)
        train_on_random_pairs(fresh, train, seed, 2e-5, 1, 128, look)
        rows.append(dict(seed=seed, how="random pairs (paper)", points=look.points))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "recipe.json").write_text(json.dumps(dict(command=shlex.join(["python", "studies/ranking.py", *sys.argv[1:]]), machine=machine(),
                                                     prompts=prompts, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    quiet_transformers()
    app()
