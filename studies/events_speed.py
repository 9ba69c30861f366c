"""The simulator's core before and after, side by side: equal to the last digit, and how fast? Writes results/arena/events_speed.json.

    python studies/events_speed.py --thousands 10

The package of the revision `--before` is taken from git into a temporary folder and imported under another name. Both play the same
workloads in turns; each ratio is of two neighbours in time. The seconds are the processor's, of the compiled core alone (`drive`) and of
all of `simulate`. Since 562b1aa a shared queue counts a request for the replica that takes it, so older revisions differ in the last
workload.
"""
import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from common import write

from pars_nb import simulate as after
from pars_nb.cost import Ticket, Tokens
from pars_nb.policy import FCFS, HRRN, PARS, Policy, SJF, Scale, Threshold
from pars_nb.simulate import EngineModel, Requests, capacity

ROOT = Path(__file__).resolve().parent.parent
ARRAYS, COUNTS = ("start", "first", "last"), ("preemptions", "most_blocks", "tokens", "events")


def load_before(revision: str, folder: str) -> ModuleType:
    "The module `simulate` of that revision."
    done = subprocess.run(["git", "archive", revision, "pars_nb"], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise typer.BadParameter(f"git has no revision {revision} here; fetch it or name another: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    (Path(folder) / "pars_nb").rename(Path(folder) / "pars_before")
    sys.path.insert(0, folder)
    module = importlib.import_module("pars_before.simulate")
    module.Ticket = Ticket  # type: ignore[attr-defined]  # the policies are today's in both, so the tickets must be
    return module


class Clocked:
    "A function that notes how many processor seconds its last call took."

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        begin = time.process_time()
        result = self.function(*args)
        self.seconds = time.process_time() - begin
        return result


@dataclass
class Workload:
    "What both cores play."
    name: str
    requests: Requests
    policy: type[Policy] | Any  # makes a fresh policy, because some remember
    engine: EngineModel
    replicas: int = 1
    routing: str = "round_robin"

    def play(self, module: ModuleType) -> tuple[Any, float, float]:  # what came out, seconds of the core, seconds of all
        whole = Clocked(module.simulate)
        result = whole(self.requests, module.EngineModel(**self.engine.model_dump()), self.policy(), self.replicas, self.routing)
        return result, module.drive.seconds, whole.seconds


def stream(n: int, seed: int, engine: EngineModel, load: float = 0.95, replicas: int = 1, classes: int = 0) -> Requests:
    "Log-normal lengths and Poisson arrivals at `load` of what the engines can do; scores with noise, a tenth missing."
    rng = np.random.default_rng(seed)
    prompt, output = rng.lognormal(5, 1, n).astype(np.int64) + 1, rng.lognormal(4.5, 1, n).astype(np.int64) + 1
    room = engine.blocks * engine.block_size
    prompt, output = np.minimum(prompt, room // 4), np.minimum(output, room // 4)
    score = np.where(rng.random(n) < 0.9, np.log(output) + rng.normal(0, 0.7, n), np.nan)
    requests = Requests(np.zeros(n), prompt, output, score, rng.integers(0, classes, n) if classes else None)
    rate = load * replicas * capacity(requests._replace(priority=None), engine)
    return requests._replace(arrival=np.cumsum(rng.exponential(1 / rate, n)))


def workloads(seed: int, thousands: int) -> Iterator[Workload]:
    "Every branch of the core: orders, classes, routings, prompts in pieces, memory that runs out."
    usual, tight = EngineModel(), EngineModel(blocks=500)
    pieces = EngineModel(max_num_batched_tokens=128)
    tokens = Tokens(np.linspace(1, 8, 101).tolist(), np.exp(np.linspace(1, 8, 101)).tolist())
    n = 1000 * thousands
    one, classes, eight = stream(n, seed, usual), stream(n, seed, usual, classes=3), stream(2 * n, seed, usual, replicas=8)

    def pars() -> PARS:
        return PARS(Scale(np.linspace(1, 8, 201).tolist(), window=0), 30.0)
    yield Workload("FCFS", one, FCFS, usual)
    yield Workload("PARS", one, pars, usual)
    yield Workload("SJF, overload 1.3", stream(n, seed, usual, 1.3), SJF, usual)
    yield Workload("Threshold 5 s", one, lambda: Threshold(5.0), usual)
    yield Workload("HRRN", one, lambda: HRRN(tokens, 0.02), usual)
    yield Workload("three priorities, SJF", classes, SJF, usual)
    yield Workload("prompts in pieces of 128, PARS", stream(n // 2, seed, pieces), pars, pieces)
    yield Workload("KV-tight (500 blocks), FCFS", stream(n // 2, seed, tight), FCFS, tight)
    yield Workload("KV-tight (500 blocks), PARS, priorities", stream(n // 2, seed, tight, classes=2), pars, tight)
    yield Workload("8 replicas in turn, PARS", eight, pars, usual, 8)
    yield Workload("8 replicas, fewest outstanding, FCFS", eight, FCFS, usual, 8, "least_outstanding")
    yield Workload("8 replicas, least work, HRRN", eight, lambda: HRRN(tokens, 0.02), usual, 8, "predicted_work")
    yield Workload("8 replicas, one shared queue, PARS", eight, pars, usual, 8, "shared")


def same(workload: Workload, old: Any, new: Any) -> None:
    "Raises AssertionError where the two differ in a single digit."
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name), err_msg=f"{workload.name}: {name}")
    for name in COUNTS:
        assert getattr(old, name) == getattr(new, name), f"{workload.name}: {name} {getattr(old, name)} → {getattr(new, name)}"


def compare(workload: Workload, modules: tuple[ModuleType, ModuleType], repeats: int) -> dict[str, Any]:
    "Old over new seconds (= speed of new over old), old and new in turns, the first one changing."
    old, new = (workload.play(module)[0] for module in modules)  # compiles, too
    same(workload, old, new)
    ratios = []
    for repeat in range(repeats):
        turn = modules if repeat % 2 == 0 else modules[::-1]
        seconds = dict(zip(turn, (workload.play(module)[1:] for module in turn), strict=True))
        ratios.append([b / a for b, a in zip(*(seconds[module] for module in modules), strict=True)])
    core, whole = np.array(ratios).T
    return dict(workload=workload.name, requests=len(new.first), events=new.events, preemptions=new.preemptions, core=core.tolist(),
                whole=whole.tolist())


def spread(ratios: Any) -> dict[str, float]:
    low, median, high = np.percentile(ratios, (10, 50, 90))
    return dict(median=float(median), p10=float(low), p90=float(high))


def main(
    before: Annotated[str, typer.Option(help="git revision of the old core")] = "562b1aa",
    repeats: Annotated[int, typer.Option(help="pairs of runs a workload and seed")] = 10,
    seeds: Annotated[int, typer.Option(help="how many")] = 2,
    thousands: Annotated[int, typer.Option(help="of requests in most workloads")] = 20,
    least: Annotated[float, typer.Option(help="fail where the core's median ratio is below this")] = 0.95,
) -> None:
    "Equal results, and the new core's speed over the old one's."
    with tempfile.TemporaryDirectory() as folder:
        modules = load_before(before, folder), after
        for module in modules:
            module.drive = Clocked(module.drive)  # type: ignore[attr-defined]
        rows = [compare(workload, modules, repeats) | dict(seed=seed) for seed in range(seeds) for workload in workloads(seed, thousands)]
    ratios = pd.DataFrame(rows)
    by_workload = ratios.groupby("workload", sort=False)[["core", "whole"]].sum()  # lists are joined
    table = {name: {part: spread(row[part]) for part in ("core", "whole")} for name, row in by_workload.iterrows()}
    for name, parts in table.items():
        print(f"{name:<42}" + "   ".join(f"{part} {v['median']:.3f} ({v['p10']:.3f} to {v['p90']:.3f})" for part, v in parts.items()))
    total = {part: spread(by_workload[part].sum()) for part in ("core", "whole")}
    print("all:", total)
    write("arena/events_speed", before=before, repeats=repeats, thousands=thousands, seeds=list(range(seeds)), equal=True,
          new_over_old=total, workloads=table, rows=ratios.drop(columns=["core", "whole"]).to_dict("records"))
    if total["core"]["median"] < least:
        raise SystemExit(f"the new core has {total['core']['median']:.3f} of the old one's speed, below {least}")


if __name__ == "__main__":
    typer.run(main)
