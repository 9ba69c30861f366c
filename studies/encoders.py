"""What an encoder learns of all recorded sources, where it has not been. `teach` needs a GPU or patience, and writes scores; the rest reads them.

    python studies/encoders.py teach --data ../shared/data --base runs/minilm --lr 1e-4 --folds 0,1,2,3,4,5,mixed,adapt
    python studies/encoders.py teach --data ../shared/data --base ENCODER_OF_12_LAYERS --lr 1e-4 --frozen 9 --epochs 2 --max-length 64 --bf16 \\
        --folds 0,1+2  # with --seeds 0 also mixed,adapt; with --max-length 128 fold 0, and with --seeds 0 fold 1+2
    python studies/encoders.py judge --data ../shared/data
"""
import json
import re
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from common import Data, write
from transformers import set_seed
from universal import (ADAPT, CASTILLO, FOLDS, FREE, NO_TEACHER, NOT_FREE, OUT, SEEN, TARGETS, TAUGHT, Taught, as_record, free, judged, left_out,
                       lesson_of, one_name, parts_of, plain, pool, source, taught, tested, third, ways, written)

from pars_nb.consensus import agreed
from pars_nb.frozen import Memory, frozen_below
from pars_nb.order import tau_b
from pars_nb.records import Record, draw, read, split, unit_hash
from pars_nb.student import load_student
from pars_nb.together import Beside, balance
from pars_nb.train import RankTrainer, TrainConfig, fit, new_ranker

app = typer.Typer(add_completion=False)
MOST_JUDGED = 400  # prompts of a file that what ships is judged on
GRID = (0.0, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 1.0)  # shares of the student beside an encoder
EVERYTHING = (*FREE, *(f for f in NOT_FREE if f not in ("alpaca_gpt4_subset", "gemma4_mmlu_pro_thinking")))  # for measuring only
BALANCED = 2000  # prompts of the training that say how an encoder's scores lie to a student's
ALPACA = 3000  # prompts of each of the two large files of one model


# ---- lessons: what a fold's encoder learns from, and which prompts it then scores

@dataclass(frozen=True)
class Lesson:
    "What an encoder learns from."
    most: int = 1000  # prompts of a source
    across: bool = False  # pairs across Castillo's workloads too, whose prompts the same models answered
    written: bool = True  # the requests written for this project too, with the lengths that one expects
    free: bool = False  # sources of free licence alone


def everything(data: Path, without: Sequence[str], models: Sequence[str], cfg: Lesson, seed: int, keep: float = 1.0) -> list[Record]:
    "What models agree on in every source but those left out and their prompts; `keep`: only prompts whose hash is below."
    left, groups = {plain(p) for f in without for p in source(data, f).prompt.unique()}, dict[str, list[Record]]()
    for name in (f for f in (FREE if cfg.free else EVERYTHING) if f not in without):
        rows = free(data)[free(data).source == name] if cfg.free else source(data, name)
        usable = {p for p in rows.prompt.unique() if plain(p) not in left and (keep >= 1 or unit_hash(plain(p)) < keep)}
        rows = rows[~rows.name.isin(models) & rows.prompt.isin(usable)]
        group = "castillo" if cfg.across and name in CASTILLO else name
        groups.setdefault(group, []).extend(as_record(*r) for r in zip(rows.prompt_id, rows.prompt, rows.log, rows.name, strict=True))
    most = {k: ALPACA if k.startswith("alpaca_") else cfg.most * (len(CASTILLO) if k == "castillo" else 1) for k in groups}
    found = [r for k, records in groups.items() if records for r in draw(agreed(records, k), most[k], seed)]
    return found + (expected_records() if cfg.written else [])


def expected_records() -> list[Record]:
    "The requests written for this project that an encoder is taught."
    return [as_record(f"written {i}", r.prompt, r.log, "written") for i, r in enumerate(written(NO_TEACHER).itertuples())]


def fold_of(data: Path, fold: str, seed: int, cfg: Lesson) -> tuple[list[Record], list[str]]:
    "Records to learn from, and prompts to score."
    if fold == "all":
        return everything(data, (), (), cfg, seed), [p for f in NOT_FREE for _, prompts, _ in tested(data, f, (), MOST_JUDGED) for p in prompts]
    if fold == "mixed":
        prompts = [p for f in CASTILLO for p in source(data, f).prompt.unique() if unit_hash(plain(p)) >= SEEN]
        return everything(data, (), tuple(map(one_name, TARGETS)), cfg, seed, SEEN), prompts
    if fold != "adapt":
        return everything(data, left_out(fold), third(data, seed), cfg, seed), [p for f in left_out(fold) for p in source(data, f).prompt.unique()]
    tests, models = {plain(r.prompt) for _, test in targets(data).values() for r in test}, {one_name(m) for m in ADAPT.values() if m}
    return [r for r in everything(data, (), tuple(models), cfg, seed) if plain(r.prompt) not in tests], []


@lru_cache
def targets(data: Path) -> dict[str, tuple[list[Record], list[Record]]]:
    "Each target of the study of adaptation: records to adapt with, and to test on (as in results/ranking/adapt.json)."
    parts = {k: split(read(data / f"{k}.parquet", m), (0.65, 0.05, 0.3), 0) for k, m in ADAPT.items()}
    return {k: (train, draw(test, 2000, 0)) for k, (train, _, test) in parts.items()}


# ---- ways to teach

class Layerwise(RankTrainer):
    "Each layer learns at nine tenths of the rate of the one above it."

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        new, made = self.optimizer is None, super().create_optimizer(model)
        if not new:
            return made
        names, groups = {id(p): n for n, p in self.model.named_parameters()}, []
        top = 1 + max(depth(n) for n in names.values())
        for group in made.param_groups:
            of_depth: dict[int, list[Any]] = {}
            for p in group["params"]:
                of_depth.setdefault(depth(names[id(p)], top), []).append(p)
            groups += [dict(group, params=ps, lr=group["lr"] * 0.9 ** (top - d)) for d, ps in of_depth.items()]
        made.param_groups[:] = groups
        return made


def depth(name: str, top: int = 0) -> int:
    "Which layer a weight belongs to: 0 for embeddings, `top` for the head."
    layer = re.search(r"layer\.(\d+)\.", name)
    return int(layer[1]) + 1 if layer and "encoder.layer" in name else 0 if "embeddings" in name else top


class RDrop(RankTrainer):
    "Two passes with other units dropped must say the same (R-Drop, Liang et al. 2021)."

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **kw: Any) -> Any:
        (a, out), (b, again) = (super(RDrop, self).compute_loss(model, inputs, True, **kw) for _ in range(2))
        loss = (a + b) / 2 + (out.logits - again.logits).float().square().mean()
        return (loss, out) if return_outputs else loss


class Gentle(RDrop, Layerwise):
    "Both."


TRAINERS = dict(plain=RankTrainer, layerwise=Layerwise, rdrop=RDrop, gentle=Gentle)


@app.command()
def teach(data: Data, base: Annotated[str, typer.Option(help="encoder: a hub name or a local folder")] = "bert-base-uncased",
          folds: str = "0,1,2,3,4,5", seeds: str = "0,1,2", lr: float = 5e-5, epochs: float = 4, max_length: int = 128, signals: bool = True,
          loss: str = "win", trainer: str = "plain", frozen: int = 0, most: int = 1000, across: bool = False, written: bool = True,
          bf16: Annotated[bool, typer.Option(help="half of the bits: much faster on a GPU, and on a CPU that has AVX-512-BF16")] =
          torch.cuda.is_available(),
          only_free: Annotated[bool, typer.Option("--free", help="learn from sources of free licence alone, and score all of their prompts")] = False,
          out: Taught = TAUGHT) -> None:
    "Teach an encoder each fold, and write its scores of what was left out. What is there already is not done again."
    out.mkdir(parents=True, exist_ok=True)
    memory = Memory()  # of all trainings: they start from the same encoder
    for seed, fold in product(map(int, seeds.split(",")), folds.split(",")):
        recipe = dict(base=Path(base).name, lr=lr, epochs=epochs, max_length=max_length, signals=signals, loss=loss, trainer=trainer,
                      frozen=frozen, most=most, across=across, written=written,
                      free=only_free)
        path = out / ("-".join(str(v) for v in recipe.values()) + f"-{fold}-{seed}.parquet")
        if path.is_file():
            continue
        records, prompts = fold_of(data, fold, seed, Lesson(most, across, written, only_free))
        cfg = TrainConfig(encoder=base, loss=loss, epochs=epochs, signals=signals, max_length=max_length, keep_best=False, seed=seed, lr=lr,
                          bf16=bf16)
        set_seed(seed)
        ranker = new_ranker(records, cfg)
        seen = pool(data, seed) if only_free else [r.prompt for r in draw(records, BALANCED, seed)]
        with frozen_below(ranker.model, frozen, memory), tempfile.TemporaryDirectory() as checkpoints:
            # the last epoch is kept: no workload is there to choose one by
            fit(ranker, records, records[:64], cfg, Path(checkpoints), quiet=True, kind=TRAINERS[trainer])
            with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=bf16):
                rows = adapted_to(data, ranker, cfg) if fold == "adapt" else scored(ranker, prompts)
                rows = pd.concat([rows.assign(seen=False), scored(ranker, seen).assign(seen=True)])
        rows.assign(fold=fold, seed=seed, learned=len(records), recipe=json.dumps(recipe)).to_parquet(path)
        print(path.name, len(records), "prompts learned,", len(rows), "scores", flush=True)


def scored(ranker: Any, prompts: Sequence[str]) -> pd.DataFrame:
    "Scores by the prompts' hashes: no text leaves the machine that scores."
    unique = list(dict.fromkeys(prompts))
    return pd.DataFrame(dict(prompt=[unit_hash(p) for p in unique], score=ranker.score(unique)))


def adapted_to(data: Path, ranker: Any, cfg: TrainConfig) -> pd.DataFrame:
    "Scores of each target's tests, as it is and after four epochs on so many of the target's lengths."
    out = []
    for (name, (train, test)), n, seed in product(targets(data).items(), (0, 20, 50, 200), range(3)):
        few = cfg.model_copy(update=dict(seed=seed, epochs=4, lr=5e-5, batch_size=min(32, max(2, n))))
        set_seed(seed)
        mine = deepcopy(ranker)
        if n:
            with tempfile.TemporaryDirectory() as checkpoints:
                fit(mine, draw(train, n, seed), train[:8], few, Path(checkpoints), quiet=True)
        out.append(scored(mine, [r.prompt for r in test]).assign(target=name, lengths=n, draw=seed))
    return pd.concat(out)


# ---- what came of it

class Known:
    "A ranker that scored everything before."

    def __init__(self, rows: pd.DataFrame) -> None:
        self.known = dict(zip(rows.prompt, rows.score, strict=True))

    def score(self, prompts: Sequence[str]) -> np.ndarray:
        return np.array([self.known[unit_hash(p)] for p in prompts])


def taught_in(folder: Path, folds: Sequence[str]) -> list[tuple[dict[str, Any], str, int, pd.DataFrame]]:
    "Recipe (and all that was left out), fold, seed and scores of each encoder."
    frames = [(str(f.fold.iloc[0]), f) for f in map(pd.read_parquet, sorted(folder.glob("*.parquet")))]
    return [(json.loads(f.recipe.iloc[0]) | dict(folds=fold), one, int(f.seed.iloc[0]), f)
            for fold, f in frames for one in fold.split("+") if one in folds]


class Once:
    "A ranker that scores each prompt once: many models answered the same ones."

    def __init__(self, ranker: Any) -> None:
        self.ranker, self.known = ranker, dict[str, float]()

    def score(self, prompts: list[str]) -> np.ndarray:
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if new:
            self.known |= dict(zip(new, self.ranker.score(new).tolist(), strict=True))
        return np.array([self.known[p] for p in prompts])


@lru_cache
def student_of(data: Path, folder: Path, fold: str, seed: int) -> Once:
    "The student that learned from as much as a fold's encoder did, as far as it is free."
    return Once(taught(lesson_of(data, folder, fold, seed)))


@lru_cache
def texts(data: Path) -> dict[float, str]:
    "Each prompt by its hash."
    return {unit_hash(p): p for p in [*written().prompt, *(p for f in EVERYTHING for p in source(data, f).prompt.unique())]}


def learned(data: Path, rows: pd.DataFrame) -> list[str]:
    "The prompts that an encoder learned from, those that are still there."
    return [texts(data)[k] for k in rows.prompt[rows.seen] if k in texts(data)]


class Both:
    "A ranker that scored before and a student beside it: weighed by the kind of a prompt, as in the package, or by one share of the student's."

    def __init__(self, ranker: Any, student: Any, seen: Sequence[str]) -> None:
        self.ranker, self.beside = ranker, Beside(student, balance(ranker, student, seen))

    def score(self, prompts: Sequence[str]) -> np.ndarray:
        return self.beside(prompts, self.ranker.score(prompts))

    def shared(self, share: float, prompts: list[str]) -> np.ndarray:
        own, words = self.ranker.score(prompts) / self.beside.at.own, self.beside.student.score(prompts) / self.beside.at.words
        return (1 - share) * own + share * words


@app.command()
def judge(data: Data, folder: Taught = TAUGHT) -> None:
    "Each workload by the encoders that were not taught it, by the median over models that they were not taught either; and beside a student."
    out = []
    for recipe, fold, seed, rows in taught_in(folder, tuple(FOLDS)):
        both = Both(Known(rows), student_of(data, folder, fold, seed), learned(data, rows))
        for name in FOLDS[fold]:
            tests = tested(data, name, third(data, seed))
            r = judged(Once(both), tests)
            by_share = [float(np.median([tau_b(both.shared(share, p), y) for _, p, y in tests])) for share in GRID]
            out.append(dict(workload=name, seed=seed, **recipe, **r, by_share=by_share))
            print(f"{recipe['base']} {seed} {name:20s} {r['tau_b']:.3f}, prompt length {r['prompt_length']:.3f}; by the student's share",
                  [round(o, 3) for o in by_share], flush=True)
    write("universal/encoders", shares=GRID, rows=out)


@app.command()
def mixed(data: Data, folder: Taught = TAUGHT, known: int = 20, draws: int = 3) -> None:
    "Castillo's workloads pooled: targets and prompts that were left out, so many lengths of each workload known."
    out = []
    for recipe, fold, seed, rows in taught_in(folder, ("mixed",)):
        both = Both(Known(rows), student_of(data, folder, fold, seed), learned(data, rows))
        for target, (name, judge) in product(TARGETS, dict(encoder=both.ranker, both=both).items()):
            parts = parts_of(data, target, judge)
            for k in range(draws):
                out.append(dict(target=target, ranker=name, seed=seed, draw=k, **recipe, prompts=sum(len(p) - known for p, *_ in parts),
                                tau_b=ways(parts, known, np.random.default_rng(k), None)))
            print(recipe["base"], seed, target, name, {w: round(t, 3) for w, t in out[-1]["tau_b"].items()}, flush=True)
    write("universal/mixed_encoder", known=known, workloads=CASTILLO, rows=out)


@app.command()
def adapt(data: Data, folder: Taught = TAUGHT) -> None:
    "τ_b with 0, 20, 50 and 200 lengths of each target."
    out = []
    for recipe, _, seed, rows in taught_in(folder, ("adapt",)):
        for (name, n, k), some in rows.groupby(["target", "lengths", "draw"], sort=False):
            test, ranker = targets(data)[name][1], Known(some)
            tau = tau_b(ranker.score([r.prompt for r in test]), np.array([r.mean for r in test]))
            out.append(dict(workload=name, lengths=int(n), draw=int(k), seed=seed, **recipe, tau_b=tau, prompts=len(test)))
    print(pd.DataFrame(out).groupby(["base", "lengths", "workload"]).tau_b.mean().unstack().round(3))
    write("universal/adapt_encoder", rows=out)


@app.command()
def folder(data: Data, ranker: Annotated[Path, typer.Option(help="what `pars train --recipe universal` wrote")], most: int = MOST_JUDGED) -> None:
    "A ranker of the sources that may be learned from, where it has not been: the others, by all their models; and the student that ships, beside it."
    from pars_nb.ranker import load_ranker
    from pars_nb.together import assisted

    alone, rows = load_ranker(ranker), []
    judges = dict(encoder=Once(alone), student=Once(load_student(OUT)), both=Once(assisted(alone, ranker)))
    for name in NOT_FREE:
        tests = tested(data, name, (), most)
        for of, judge in judges.items():
            rows.append(dict(workload=name, ranker=of, **judged(judge, tests)))
        print(name, {r["ranker"]: round(r["tau_b"], 3) for r in rows[-3:]}, "prompt length", round(rows[-1]["prompt_length"], 3), flush=True)
    write("universal/folder", card=alone.meta.model_dump(exclude={"templates", "score_quantiles", "length_quantiles"}), rows=rows)


if __name__ == "__main__":
    app()
