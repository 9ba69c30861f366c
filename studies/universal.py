"""The student that ships as `universal`: what it learns from, and what it is worth on workloads, models and prompts that it has not seen.
Each command writes one JSON into results/universal; `fit` writes the student into pars_nb/universal.

    python studies/encoders.py teach --data ../shared/data --base runs/minilm --lr 1e-4 --epochs 1 --max-length 64 --free --bf16 \\
        --folds 0+4,2+5,1+3
    python studies/universal.py leave-out --data ../shared/data
    python studies/universal.py fit --data ../shared/data
"""
import json
import random
import re
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from common import RESULTS, Data, write

from pars_nb.card import RankerMeta
from pars_nb.consensus import levels
from pars_nb.order import bootstrap, tau_b
from pars_nb.records import Record, draw, fingerprint, read, split, unit_hash
from pars_nb import glance
from pars_nb.glance import KINDS, SIGNALS, WORD, look
from pars_nb.student import Student, adapted, learn, load_student

app = typer.Typer(add_completion=False)
Taught = Annotated[Path, typer.Option(help="folder of the scores that `encoders.py teach` wrote")]
TAUGHT = Path("runs/taught")
HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "pars_nb/universal"
LLAMA = "Llama-3.1-8B-Instruct"
FREE = dict(  # sources whose lengths and prompts are under a free licence: licence of the lengths, of the prompts
    castillo_dolly=("Apache-2.0", "databricks-dolly-15k: CC BY-SA 3.0"),
    castillo_mbpp=("Apache-2.0", "MBPP: CC BY 4.0"),
    castillo_apps=("Apache-2.0", "APPS: MIT"),
    castillo_ds1000=("Apache-2.0", "DS-1000: CC BY-SA 4.0"),
    mmlu_pro_cot=("Apache-2.0", "MMLU-Pro: MIT"),
    zeroeval_crux=("Apache-2.0", "CRUXEval: MIT"),
    zeroeval_gsm=("Apache-2.0", "GSM8K: MIT"),
    arena_fastchat=("Apache-2.0", "FastChat arena_hard_1k: Apache-2.0"),
    arena_hard_v01=("Apache-2.0", "Arena-Hard: Apache-2.0"))
NOT_FREE = dict(
    alpaca_davinci003="lengths and prompts CC BY-NC 4.0", alpaca_eval="prompts CC BY-NC 4.0",
    alpaca_gpt4_subset="CC BY-NC 4.0", alpaca_vicuna7b="no licence stated; prompts CC BY-NC 4.0",
    castillo_alpaca="1,546 of 1,626 prompts stand in a CC BY-NC file", castillo_sharegpt="prompts of users, no licence",
    reason_math500_gsm8k="one of three sources of the lengths states no licence; prompts of MATH", gemma4_mmlu_pro_thinking="no licence stated",
    zeroeval_math_l5="MATH: MIT by its authors, but its problems are a publisher's, on whose complaint the set was withdrawn")
MOST = 3000  # prompts of one source that are learned from
PRIOR = 30.0  # how much more a request written for this project weighs than a prompt of a source of that size
PARTS = 16  # files of written requests, all kinds in each, so that a recipe with so many prompts of a source takes all of them
TEACHER = 0.7  # share of an encoder's word in what a student learns of text; of code and mathematics sizes and numbers say more
NO_TEACHER = ("languages", "contexts")  # files of written requests that encoders are not taught, and don't judge: they came later, or are not English
SIZED = [KINDS.index("code"), KINDS.index("maths")]
KEEP = 0.1  # share of the difference between the sources' means that is learned; the rest is left to the traffic's own means


@cache
def plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def one_name(model: str) -> str:
    "The name of a model without its maker, host and spelling, so that a model in two files is one."
    name = re.sub(r"@(hyperbolic|together|sambanova|dw|zp|pf)$", "", re.sub(r"[_.]", "-", model.lower()))
    return re.sub(r"-(inst|instruct|chat|it)\b.*$", "", re.sub(r"^llama(\d)", r"llama-\1", re.sub(r"^meta-", "", name)))


@lru_cache
def source(data: Path, name: str) -> pd.DataFrame:
    "A row per prompt and model: mean length, mean log length, number of runs."
    d = pd.read_parquet(data / f"{name}.parquet", columns=["prompt_id", "prompt", "model", "response_tokens"])
    d = d.assign(model=d.model.astype(str), log=np.log(d.response_tokens.clip(lower=1)))
    rows = d.groupby(["prompt_id", "model"], sort=False).agg(prompt=("prompt", "first"), log=("log", "mean"), length=("response_tokens", "mean"),
                                                             runs=("log", "size"))
    return rows.reset_index().assign(source=name, name=lambda x: x.model.map(one_name))


@lru_cache
def forbidden(data: Path) -> frozenset[str]:
    "Every prompt, in plain letters, that stands in a file of no free licence."
    return frozenset(plain(p) for f in NOT_FREE for p in source(data, f).drop_duplicates("prompt_id").prompt)


@lru_cache
def free(data: Path) -> pd.DataFrame:
    "What may be learned from."
    rows = pd.concat([source(data, f) for f in FREE])
    return rows[~rows.prompt.map(plain).isin(forbidden(data))]


def consensus(rows: pd.DataFrame) -> pd.DataFrame:
    "A row per prompt: what it adds to the log length of any model (log length = of the prompt + of the model)."
    (prompt, ids), (model, _) = pd.factorize(rows.prompt_id), pd.factorize(rows.name)
    level = levels(prompt, model, rows.log.to_numpy())
    of_prompt = pd.Series(np.bincount(prompt, rows.log - level[model]) / np.bincount(prompt), index=ids)
    out = rows.groupby("prompt_id", sort=False).agg(prompt=("prompt", "first"), source=("source", "first"), models=("name", "nunique"))
    return out.assign(log=of_prompt).reset_index()


def expected(each: int = 25, seed: int = 0) -> pd.DataFrame:
    "Requests from the table of frames, with the log length that it expects."
    words, rng, out = json.loads((HERE / "prior_words.json").read_text()), random.Random(seed), dict[str, float]()

    def draw(m: re.Match) -> str:
        choices = words[m[1]].split("|")
        return " ".join(rng.sample(choices, rng.choice((1, 1, 2, 3)))) if m[1] == "paragraph" else rng.choice(choices)

    for line in (HERE / "prior.tsv").read_text().splitlines():
        if line.startswith("#"):
            continue
        length, frame = line.split("\t")
        for _ in range(each):
            text = re.sub(r"\{([^{}]*)\}", lambda m: rng.choice(m[1].split("|")), frame.replace("\\n", "\n"))
            text = re.sub(r" {2,3}(?=\S)", " ", re.sub(r"<(\w+)>", draw, text)).strip()
            out.setdefault(text[:1].upper() + text[1:], float(np.log(float(length))))
    return pd.DataFrame(dict(prompt=list(out), log=list(out.values()), source="expected"))


def written(without: tuple[str, ...] = ()) -> pd.DataFrame:
    "Requests of all kinds, written for this project, each with the log length that one expects; `without` names files to leave out."
    files = [f for f in sorted((HERE / "written").glob("*.jsonl")) if f.stem not in without]
    lines = [json.loads(line) for f in files for line in f.read_text(encoding="utf-8").splitlines()]
    return pd.DataFrame(dict(prompt=[p for _, p in lines], log=np.log([n for n, _ in lines]), source="written"))


def lesson(data: Path, without: tuple[str, ...] = (), models: tuple[str, ...] = (), prior: float = PRIOR, seed: int = 0,
           prompts: pd.Series | None = None, teacher: dict[float, float] | None = None) -> pd.DataFrame:
    "Prompts, targets and weights: sources but `without`, models but `models`, a sample of `MOST` prompts a source, those written for this project."
    rows = free(data)
    rows = consensus(rows[~rows.source.isin(without) & ~rows.name.isin(models)])
    if prompts is not None:
        rows = rows[rows.prompt_id.isin(prompts)]
    rows = pd.concat([r.sample(min(MOST, len(r)), random_state=seed) for _, r in rows.groupby("source", sort=False)])
    table = expected(seed=seed)
    ours = pd.concat([table[[look(p).kind < 2 for p in table.prompt]], written()])  # frames of code and maths: there are real ones
    rows = pd.concat([rows, ours]) if prior else rows
    weight = rows.groupby("source").log.transform("size") ** -0.75
    weight = weight / weight.mean() * np.where(rows.source.isin(ours.source), prior, 1.0)
    rows = rows.assign(target=level(rows.source, rows.log), weight=weight)
    if teacher is None:
        return rows
    logs = as_logs(rows, teacher)
    share = np.where(logs.isna() | np.isin([look(p).kind for p in rows.prompt], SIZED), 0, TEACHER)
    return rows.assign(target=(1 - share) * rows.target + share * level(rows.source, logs).fillna(0))


def level(of: pd.Series, logs: pd.Series) -> pd.Series:
    "Log lengths, the means of their sources brought together."
    mean = logs.groupby(of.to_numpy()).transform("mean")
    return logs - (1 - KEEP) * (mean - mean.groupby(of.to_numpy()).first().mean())


def as_logs(rows: pd.DataFrame, teacher: dict[float, float]) -> pd.Series:
    "What an encoder's scores say of the length, by those that it gave to the requests written for this project; NaN for `NO_TEACHER`."
    scores, ours = rows.prompt.map(unit_hash).map(teacher), (rows.source == "written").to_numpy()
    if scores[~ours].isna().any():
        raise typer.BadParameter(f"the teacher has no score for {scores[~ours].isna().sum()} prompts: teach it again, the sources have changed")
    known = ours & scores.notna().to_numpy()
    slope, start = np.polyfit(scores[known], rows.log[known], 1)
    return start + slope * scores


def pool(data: Path, seed: int) -> list[str]:
    "All prompts that a student may learn from with an encoder's word."
    return list(dict.fromkeys([*free(data).prompt, *expected(seed=seed).prompt, *written(NO_TEACHER).prompt]))


def taught(rows: pd.DataFrame, **kw: Any) -> Student:
    meta = RankerMeta(encoder="words", target_model="universal", loss="ridge", train_prompts=len(rows))
    return Student(learn(rows.prompt.tolist(), rows.target.to_numpy(), rows.weight.to_numpy(), **kw), None, meta)


# ---- what it is worth where it has not been

FOLDS = {  # workloads that are left out together
    "0": ("castillo_sharegpt", "castillo_mbpp"), "1": ("castillo_dolly", "castillo_apps"), "2": ("castillo_alpaca", "castillo_ds1000"),
    "3": ("mmlu_pro_cot", "alpaca_eval"), "4": ("zeroeval_crux", "arena_fastchat", "arena_hard_v01"),
    "5": ("zeroeval_gsm", "reason_math500_gsm8k", "zeroeval_math_l5")}
FOLD = {w: fold for fold, workloads in FOLDS.items() for w in workloads} | dict(alpaca_davinci003="2", alpaca_vicuna7b="2")
FIRST_GOALS = ("alpaca_davinci003", "castillo_alpaca", "castillo_dolly", "castillo_sharegpt", "castillo_mbpp", "castillo_apps", "castillo_ds1000",
               "zeroeval_crux", "zeroeval_gsm")


def third(data: Path, seed: int) -> tuple[str, ...]:
    "The models that a seed leaves out: a third of all, drawn by name; of Castillo's the one that most results are about is among them."
    names = sorted(free(data).name.unique())
    out = set(random.Random(seed).sample(names, len(names) // 3))
    return tuple(sorted(out | {one_name(LLAMA)}))


def tested(data: Path, name: str, models: tuple[str, ...], most: int = 2000) -> list[tuple[str, list[str], np.ndarray]]:
    "For each of the models that were left out (any, where the file has none of them): prompts and mean lengths."
    rows = source(data, name)
    unseen = rows[rows.name.isin(models)]
    rows = unseen if len(unseen) else rows
    return [(str(m), r.prompt.tolist()[:most], r.length.to_numpy()[:most]) for m, r in rows.groupby("model", sort=True) if len(r) >= 50]


def knowable(data: Path, name: str, models: list[str]) -> float | None:
    "Median τ_b of the mean standardised log length that all other models gave to the same prompts: none where there are no three others."
    rows = source(data, name)
    spread = rows.groupby("model").log
    rows = rows.assign(z=(rows.log - spread.transform("mean")) / (spread.transform("std") + 1e-6))
    found = []
    for m in models:
        own, rest = rows[rows.model == m].set_index("prompt_id"), rows[rows.name != one_name(m)]
        if rest.name.nunique() >= 3:
            mean = rest.groupby("prompt_id").z.mean()
            both = own.index.intersection(mean.index)
            found.append(tau_b(mean[both].to_numpy(), own.length[both].to_numpy()))
    return float(np.median(found)) if found else None


def judged(student: Any, tests: list[tuple[str, list[str], np.ndarray]], boot: int = 100) -> dict[str, Any]:
    "τ_b by model, their median, the interval of the target that most results are about (or the first), and prompt length's median."
    tau = {m: tau_b(student.score(p), y) for m, p, y in tests}
    by_size = [tau_b(np.array([len(t) for t in p]), y) for _, p, y in tests]
    model, prompts, y = next((t for t in tests if one_name(t[0]) == one_name(LLAMA)), tests[0])
    low, high = bootstrap(tau_b, student.score(prompts), y, boot) if boot else (np.nan, np.nan)
    return dict(tau_b=float(np.median(list(tau.values()))), prompt_length=float(np.median(by_size)), models=len(tests), of=model,
                tau_b_of=tau[model], lo=low, hi=high, prompts=len(prompts))


def left_out(fold: str) -> tuple[str, ...]:
    "The workloads of a fold, or of several: `3+4`."
    return tuple(w for f in fold.split("+") for w in FOLDS[f])


@cache
def teacher_of(folder: Path, fold: str, seed: int) -> dict[float, float]:
    "Scores of an encoder that was taught free sources alone, without this fold (and perhaps others), by the hash of a prompt."
    found = [p for p in sorted(folder.glob(f"*-True-True-*-{seed}.parquet")) if fold in p.stem.split("-")[-2].split("+")]
    if not found:
        raise typer.BadParameter(f"no teacher for fold {fold}, seed {seed} in {folder}: python studies/encoders.py teach --free --folds {fold} ...")
    rows = pd.read_parquet(found[0])
    return dict(zip(rows.prompt[rows.seen], rows.score[rows.seen], strict=True))


def lesson_of(data: Path, folder: Path | None, fold: str, seed: int, prior: float = PRIOR) -> pd.DataFrame:
    "What a student may learn that has not seen a fold's workloads nor a third of the models; or, `mixed`, the targets and their tests' prompts."
    teacher = teacher_of(folder, fold, seed) if folder else None
    if fold in FOLDS:
        return lesson(data, tuple(f for f in FOLDS[fold] if f in FREE), third(data, seed), prior, seed, teacher=teacher)
    every = free(data)
    seen = every.prompt_id[every.prompt.map(lambda p: unit_hash(plain(p))) < SEEN]
    return lesson(data, models=tuple(map(one_name, TARGETS)), prompts=seen, seed=seed, teacher=teacher)


def by_workload(data: Path, folder: Path | None, names: tuple[str, ...], seed: int, boot: int = 100, without: tuple[str, ...] = (),
                prior: float = PRIOR) -> dict[str, dict]:
    "Each workload judged by a student that saw neither it nor a third of the models."
    models, students, out = third(data, seed), dict[str, Student](), {}
    for name in names:
        fold = FOLD[name]
        if fold not in students:
            students[fold] = taught(lesson_of(data, folder, fold, seed, prior), without=without)
        tests = tested(data, name, models)
        out[name] = judged(students[fold], tests, boot) | dict(others=knowable(data, name, [m for m, _, _ in tests]))
    return out


@app.command("leave-out")
def leave_out(data: Data, folder: Taught = TAUGHT, seeds: int = 3,
              only: Annotated[str, typer.Option(help="workloads, by commas; all where empty")] = "") -> None:
    "Every workload, left out with a third of the models. It goes on where it was stopped."
    path = RESULTS / "universal/leave_out.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    for seed in range(seeds):
        done = {r["workload"] for r in rows if r["seed"] == seed}
        names = tuple(w for w in FOLD if w not in done and (not only or w in only.split(",")))
        for name, r in by_workload(data, folder, names, seed).items():
            rows.append(dict(workload=name, seed=seed, **r))
            print(f"{seed} {name:20s} {r['tau_b']:.3f} ({r['models']} models), prompt length {r['prompt_length']:.3f}; "
                  f"{r['of']} {r['tau_b_of']:.3f} ({r['lo']:.3f} to {r['hi']:.3f})", flush=True)
        rows.sort(key=lambda r: (r["seed"], list(FOLD).index(r["workload"])))
        write("universal/leave_out", seeds=sorted({r["seed"] for r in rows}), most=MOST, prior=PRIOR, keep=KEEP, sources=list(FREE), rows=rows)


GROUPS = dict(  # signals that are left out together
    size=("size", "long", "tokens"), lines=("lines", "first line", "blank line", "bullets"), question=("questions", "asks"),
    punctuation=("quotes", "colon", "commas"), marks=("code marks", "formula marks"), numbers=("numbers",), asked=("asked", "asked at all"),
    opening=("why", "how", "what", "who", "yes or no"), all=SIGNALS)


@app.command()
def signals(data: Data, folder: Taught = TAUGHT, seeds: int = 1) -> None:
    "What each group of signals is worth: workloads judged without it; and without the written requests and the encoder."
    rows = []
    for seed in range(seeds):
        for name in ("nothing", *GROUPS, "written requests and the encoder"):
            if name.startswith("written"):  # a teacher has learned from them
                found = by_workload(data, None, FIRST_GOALS, seed, boot=0, prior=0.0)
            else:
                found = by_workload(data, folder, FIRST_GOALS, seed, boot=0, without=GROUPS.get(name, ()))
            taus: dict[str, float] = {k: r["tau_b"] for k, r in found.items()}
            rows.append(dict(without=name, seed=seed, tau_b=taus))
            print(name, {k: round(v, 3) for k, v in taus.items()}, flush=True)
    write("universal/signals", seeds=seeds, groups=GROUPS, rows=rows)


@app.command()
def sizes(data: Data) -> None:
    "What size, tokens and numbers say of the length on code, mathematics and choices; and tokens and numbers of what size leaves open."
    rows, recorded, told = [], FREE | NOT_FREE, KINDS[KINDS.index("code") :]
    for name, which in ({name: told for name in recorded} | {f"written, {kind}": (kind,) for kind in told}).items():
        prompts = consensus(source(data, name)) if name in recorded else written()
        kinds, signals = zip(*((KINDS[g.kind], g.signals) for g in map(look, prompts.prompt)), strict=True)
        of = np.isin(kinds, which)
        if of.sum() < 100 or (name in recorded and of.mean() < 0.5):
            continue
        x, y = pd.DataFrame(signals, columns=SIGNALS)[of], prompts.log.to_numpy()[of]
        beyond = {k: v - np.polyval(np.polyfit(x["size"], v, 2), x["size"]) for k, v in dict(length=y, tokens=x.tokens, numbers=x.numbers).items()}
        tau = {k: tau_b(x[k].to_numpy(), y) for k in ("size", "tokens", "numbers")}
        left = {f"{k} beyond size": tau_b(np.asarray(beyond[k]), np.asarray(beyond["length"])) for k in ("tokens", "numbers")}
        rows.append(dict(workload=name, prompts=int(of.sum()), **tau, **left))
    print(pd.DataFrame(rows).round(2).to_string())
    write("universal/sizes", rows=rows)


RUNS = re.compile(rb"[a-z\x80-\xff']+|[0-9]+|[^\sa-z0-9]")  # words, if a script without spaces were not told apart
SCRIPTS = {  # letters, and the share of a text from which on it is written so
    "Chinese, Japanese, Korean": (r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]", 0.2),
    "Cyrillic, Arabic, Indian": (r"[\u0400-\u06ff\u0900-\u0dff]", 0.2),
    "accents": (r"[à-öø-ÿąęłśżğış¿¡]", 0.015)}


def script_of(text: str) -> str:
    "Which of `SCRIPTS` a text is written in; empty where in none."
    return next((name for name, (letters, least) in SCRIPTS.items() if len(re.findall(letters, text)) >= max(2, least * len(text))), "")


@app.command()
def languages(data: Data, folds: int = 4) -> None:
    "τ_b on written requests in other scripts that a student has not seen, with their guessed lengths: by what a word is, and by what it learned."
    rows = written().assign(new=lambda w: ~w.prompt.isin(written(("languages",)).prompt), script=lambda w: w.prompt.map(script_of))
    ours, split_at, out = rows[(rows.script != "") & ~rows.new], np.random.default_rng(0), []
    fold = pd.Series(split_at.integers(0, folds, len(ours)), index=ours.index)
    for (what, pattern), new in product({"runs of letters": RUNS, "characters": WORD}.items(), (False, True)):
        glance.WORD = pattern
        scores = pd.Series(0.0, index=ours.index)
        for k in range(folds):
            learned = rows[(fold.reindex(rows.index) != k) & (new | ~rows.new)]
            student = Student(learn(learned.prompt.tolist(), learned.log.to_numpy(), np.ones(len(learned))), None, RankerMeta())
            scores[fold == k] = student.score(ours.prompt[fold == k].tolist())
        for script, of in {**ours.groupby("script").groups, "all": ours.index}.items():
            tau = tau_b(scores[of].to_numpy(), ours.log[of].to_numpy())
            out.append(dict(words=what, with_languages=new, script=script, requests=len(of), tau_b=tau))
    glance.WORD = WORD
    print(pd.DataFrame(out).pivot_table(index="script", columns=["words", "with_languages"], values="tau_b").round(3).to_string())
    recorded = free(data).drop_duplicates("prompt_id").prompt.map(script_of).replace("", "no other letters").value_counts().to_dict()
    write("universal/languages", folds=folds, recorded=recorded, rows=out)


ADAPT = dict(castillo_alpaca=LLAMA, castillo_dolly=LLAMA, castillo_sharegpt=LLAMA, alpaca_davinci003=None,
             reason_math500_gsm8k="DeepSeek-R1-Distill-Llama-8B")  # as in results/ranking/adapt.json, and split as there


@app.command()
def adapt(data: Data, folder: Taught = TAUGHT, seeds: int = 3) -> None:
    "τ_b with 0, 20, 50 and 200 lengths of the target, on the prompts that results/ranking/adapt.json was tested on."
    rows, students = [], dict[str, Student]()
    for name, target in ADAPT.items():
        train, _, test = split(read(data / f"{name}.parquet", target), (0.65, 0.05, 0.3), 0)
        test, fold = draw(test, 2000, 0), FOLD[name]
        if fold not in students:
            students[fold] = taught(lesson_of(data, folder, fold, 0))
        student = students[fold]
        prompts, y = [r.prompt for r in test], np.array([r.mean for r in test])
        for n in (0, 20, 50, 200):
            for seed in range(seeds if n else 1):
                some = draw(train, n, seed) if n else []
                s = adapted(student, [r.prompt for r in some], np.log([r.mean for r in some])) if n else student
                rows.append(dict(workload=name, lengths=n, seed=seed, tau_b=tau_b(s.score(prompts), y), prompts=len(y)))
                print(rows[-1], flush=True)
    write("universal/adapt", seeds=seeds, rows=rows)


CASTILLO = ("castillo_alpaca", "castillo_dolly", "castillo_sharegpt", "castillo_mbpp", "castillo_apps", "castillo_ds1000")
TARGETS = (LLAMA, "Mistral-7B-Instruct-v0.3", "Qwen2.5-32B-Instruct", "gemma-3-4b-it", "Mixtral-8x7B-Instruct-v0.1")


def shifted(scores: np.ndarray, logs: np.ndarray, known: np.ndarray, slope: bool) -> np.ndarray:
    "Scores of one workload moved (and stretched, shrunk towards 1) so that they fit the known lengths."
    s, y = scores[known], logs[known]
    about, prior = s - s.mean(), 10 * scores.var()
    b = max(0.1, (about @ y + prior) / (about @ about + prior)) if slope else 1.0
    return y.mean() + b * (scores - s.mean())


def one_slope(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    "Scores of each workload (with log lengths and which are known) moved by its own shift, and stretched by what all known lengths say."
    about, y = (np.concatenate([x[at] - x[at].mean() for x, at in rows])
                for rows in ([(s, at) for s, _, at in parts], [(y, at) for _, y, at in parts]))
    slope = max(0.1, (about @ y) / (about @ about))
    return [y[at].mean() + slope * (s - s[at].mean()) for s, y, at in parts]


Parts = list[tuple[list[str], np.ndarray, np.ndarray, np.ndarray]]  # of each workload: prompts, scores, log lengths, lengths


def parts_of(data: Path, target: str, ranker: Any) -> Parts:
    "A target's lengths for the prompts that were left out."
    out: Parts = []
    for name in CASTILLO:
        r = source(data, name)
        r = r[(r.model == target) & (r.prompt.map(lambda p: unit_hash(plain(p))) >= SEEN)]
        out.append((r.prompt.tolist(), ranker.score(r.prompt.tolist()).astype(float), r.log.to_numpy(), r.length.to_numpy()))
    return out


def ways(parts: Parts, known: int, rng: np.random.Generator, student: Student | None) -> dict[str, float]:
    "τ_b of all workloads together, so many lengths of each known, in several ways of using these; the known ones are not judged."
    orders = [rng.permutation(len(y)) for _, _, y, _ in parts]
    cut = [(prompts, s, y, order[:known]) for (prompts, s, y, _), order in zip(parts, orders, strict=True)]
    found = {"as it is": [s for _, s, _, _ in cut], "shift": [shifted(s, y, at, False) for _, s, y, at in cut],
             "shift and slope": [shifted(s, y, at, True) for _, s, y, at in cut], "shift and one slope": one_slope([c[1:] for c in cut]),
             "means alone": [np.full(len(s), y[at].mean()) for _, s, y, at in cut]}
    if student is not None:
        told = adapted(student, [p[i] for p, _, _, at in cut for i in at], np.concatenate([y[at] for _, _, y, at in cut]))
        new = [told.score(p).astype(float) for p, *_ in cut]
        found["adapted"], found["adapted, shift and slope"] = new, [shifted(s, c[2], c[3], True) for s, c in zip(new, cut, strict=True)]
    rest = [order[known:] for order in orders]
    truth = np.concatenate([length[at] for (*_, length), at in zip(parts, rest, strict=True)])
    return {k: tau_b(np.concatenate([s[at] for s, at in zip(v, rest, strict=True)]), truth) for k, v in found.items()}


SEEN = 0.7  # prompts whose hash is below are learned from


@app.command()
def mixed(data: Data, folder: Taught = TAUGHT, seeds: int = 3, known: int = 20) -> None:
    "Castillo's workloads pooled: targets and prompts that were left out, so many lengths of each workload known."
    rows, student = [], taught(lesson_of(data, folder, "mixed", 0))
    for target in TARGETS:
        parts = parts_of(data, target, student)
        for seed in range(seeds):
            rows.append(dict(target=target, seed=seed, prompts=sum(len(p) - known for p, *_ in parts),
                             tau_b=ways(parts, known, np.random.default_rng(seed), student)))
            print(rows[-1], flush=True)
    write("universal/mixed", seeds=seeds, known=known, workloads=CASTILLO, rows=rows)


@app.command()
def speed(data: Data, repeats: int = 20) -> None:
    "CPU microseconds of one thread for a prompt of about 128 words and marks, one at a time and in batches of 64: least and median of the repeats."
    import time

    student = load_student(OUT)
    rows = free(data).drop_duplicates("prompt_id")
    prompts = [p for p in rows.prompt if 118 <= len(WORD.findall(p.lower().encode())) <= 138][:256]
    out: dict[str, dict[str, float]] = {}
    for name, size in (("one at a time", 1), ("batches of 64", 64)):
        took = []
        for _ in range(repeats):
            start = time.thread_time()
            for i in range(0, len(prompts), size):
                student.score(prompts[i : i + size])
            took.append((time.thread_time() - start) / len(prompts) * 1e6)
        out[name] = dict(least=min(took), median=float(np.median(took)))
    print(out)
    write("universal/speed", repeats=repeats, prompts=len(prompts), characters=float(np.mean([len(p) for p in prompts])), us_a_prompt=out)


def as_record(prompt_id: str, prompt: str, log: float, model: str = "consensus") -> Record:
    return Record(prompt_id=prompt_id, prompt=prompt, model=model, lengths=(max(1, round(float(np.exp(log)))),), capped=(False,))


@app.command()
def fit(data: Data, ranker: Annotated[Path, typer.Option(help="an encoder of free sources, its teacher")] = Path("runs/universal_mpnet"),
        bf16: Annotated[bool, typer.Option(help="the encoder scores in half of the bits")] = False, seed: int = 0) -> None:
    "Write the student that ships: all sources of free licence, all models; its tables of quantiles come from a tenth that it was not taught."
    import torch

    from pars_nb.ranker import load_ranker

    prompts = pool(data, seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        teacher = dict(zip(map(unit_hash, prompts), load_ranker(ranker).score(prompts).tolist(), strict=True))
    rows = consensus(free(data))
    held = rows[[unit_hash(p, seed) < 0.1 for p in rows.prompt_id]]
    rest, lengths = rows.prompt_id[~rows.prompt_id.isin(held.prompt_id)], np.exp(held.log.to_numpy())
    alone, trial = (taught(lesson(data, prompts=rest, seed=seed, teacher=t)) for t in (None, teacher))
    everything = lesson(data, seed=seed, teacher=teacher)
    student = taught(everything)
    student.meta.measure(trial.score(held.prompt.tolist()), lengths)
    real = everything[~everything.source.isin(("expected", "written"))]
    student.meta.fingerprint = fingerprint([as_record(*r) for r in zip(real.prompt_id, real.prompt, real.log, strict=True)])
    student.meta.train_prompts, student.meta.token_source, student.meta.seed = len(real), "mixed", seed
    held_tau = tau_b(alone.score(held.prompt.tolist()), lengths)  # without the teacher, which has seen these prompts
    student.meta.metrics = dict(tau_b=round(held_tau, 4), prompts=float(len(held)))
    student.save(OUT)
    print({p.name: p.stat().st_size for p in OUT.iterdir()}, student.meta.metrics)


@app.command()
def sources(data: Data, out: Annotated[Path, typer.Option(help="folder for a file of lengths of each source")] = Path("runs/free")) -> None:
    "What may be learned from, a file for each source, for `pars train --recipe universal --data OUT`."
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in free(data).groupby("source", sort=False):
        lengths = np.exp(rows.log).round().clip(lower=1).astype(int)
        one_text = rows.groupby("prompt_id", sort=False).prompt.transform("first")  # of one the end is cut in two places
        rows[["prompt_id"]].assign(prompt=one_text, model=rows.name, response_tokens=lengths).to_parquet(out / f"{name}.parquet")
        print(name, rows.prompt_id.nunique(), "prompts,", rows.name.nunique(), "models")
    requests = written(NO_TEACHER)
    requests = requests.assign(prompt_id=requests.index.map("written {}".format), model="expected",
                               response_tokens=np.exp(requests.log).round().astype(int))
    for part in range(PARTS):
        requests[requests.index % PARTS == part].drop(columns=["log", "source"]).to_parquet(out / f"written_{part}.parquet")


CARD = """---
library_name: pars_nb
license: cc-by-sa-4.0
tags: [pars, vllm, llm-scheduling, learning-to-rank]
---
# universal: a first guess at how long an LLM will answer

A linear model over hashed words and {signals} signals of a request; a higher score means a longer answer. It comes with `pars_nb` as
`--ranker universal`, for the time before lengths of your own model and traffic are there. `pars eval --ranker universal` says on your own
lengths what it is worth; `pars_nb.student.adapted` corrects it with some tens of them; a ranker trained on them is better.

## What it learned from

{prompts:,} prompts of these sources, the mean log length over all models and runs, each model's own level taken out; {frames} kinds of
requests and {written:,} single ones, written for this project with the length that one expects (`studies/prior.tsv`, `studies/written`), {other}
of them in seventeen languages other than English; and the scores of an encoder that had learned the same sources and {taught:,} of the
requests. No prompt that stands in a file of no free licence was used. The
tables are sums of hashed words; no prompt can be read from them. Two sources are CC BY-SA, so these tables are offered as
CC BY-SA 4.0; the package's code is not affected.

| source | lengths | prompts |
|---|---|---|
{free}

Left out:

| source | why |
|---|---|
{not_free}

## What it is worth

Kendall's τ_b on workloads that were left out of training together with a third of all models, against prompt length: the median over the
models left out, and over {seeds} draws of them (least to greatest). `python studies/universal.py leave-out`. The students measured here had a
smaller teacher (MiniLM, one epoch) that had seen neither; the one that ships learned from mpnet.
The kinds of traffic and their weights were chosen while looking at these workloads, so expect a little less on yours.

| workload | universal | by draw | prompt length |
|---|---|---|---|
{table}

It is worth most on instructions and questions with choices, and something on chat of real users; on code and school mathematics (GSM8K) it is
prompt length or a little better; on arena prompts and hard mathematics it is worth little.
"""


@app.command()
def card() -> None:
    "The README of the student that ships, from what was measured."
    meta = load_student(OUT).meta
    rows = pd.DataFrame(json.loads((RESULTS / "universal/leave_out.json").read_text())["rows"])
    of = rows.groupby("workload", sort=False)
    table = of.agg(tau=("tau_b", "median"), low=("tau_b", "min"), high=("tau_b", "max"), size=("prompt_length", "median"))
    lines = [f"| {k} | {r.tau:.2f} | {r.low:.2f} to {r.high:.2f} | {r['size']:.2f} |" for k, r in table.iterrows()]
    frames = sum(not line.startswith("#") for line in (HERE / "prior.tsv").read_text().splitlines())
    (OUT / "README.md").write_text(CARD.format(
        signals=len(SIGNALS), prompts=meta.train_prompts, frames=frames, written=len(written()), taught=len(written(NO_TEACHER)),
        other=len(written()) - len(written(("languages",))), seeds=rows.seed.nunique(), table="\n".join(lines),
        free="\n".join(f"| {k} | {a} | {b} |" for k, (a, b) in FREE.items()), not_free="\n".join(f"| {k} | {v} |" for k, v in NOT_FREE.items())))


if __name__ == "__main__":
    app()
