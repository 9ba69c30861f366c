"""Two replicas of the embedded LLM behind Ray's OpenAI ingress, four routers: the measurements behind nbs/76_fleet.ipynb. Each command
writes one JSON into results/fleet.

    python studies/fleet.py demo    # four routers, two replicas
    python studies/fleet.py plan    # past this machine, on the nominal clock
    python studies/fleet.py faults  # the fault tests of nbs/58_fleet
    python studies/fleet.py kills   # `pars collect --ray` against a real engine, killed twenty times
    python studies/fleet.py batch   # offline batches in a real engine: the order of the file, longest and shortest predicted first
    python studies/fleet.py train --data ../shared/data  # the same `train` alone and on two workers of Ray Train
"""
import asyncio
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import typer
from common import RESULTS, Data, rotated, write

from pars_nb.fleet import ROUTERS, FleetSettings, down, fleet_config, up
from pars_nb.latency import Served, summarise
from pars_nb.order import tau_b
from pars_nb.workload import Workload

app = typer.Typer(add_completion=False)
OUT = RESULTS / "fleet"
SHOWN = ["mean_ntpot_ms", "p99_ntpot_ms", "mean_e2el_ms", "p99_e2el_ms"]
# the embedded LLM's own words: two beginnings that many requests share
BEGINNINGS = ["i am writing a book for children and i need some help . " * 4, "listen well and do only what i say . " * 6]


@app.callback()
def studies():
    "One command a measurement."


def heavy_tailed(n, seed, most, noise, rate=None):
    "Lengths with log n uniform up to `most`, and scores: the length times a log-normal error. A burst, or Poisson arrivals at `rate`."
    rng = random.Random(seed)
    lengths = [max(1, int(most ** rng.random())) for _ in range(n)]
    scores = [k * np.exp(rng.gauss(0, noise)) for k in lengths]
    at = np.cumsum([rng.expovariate(rate) for _ in range(n)]).tolist() if rate else [0.0] * n
    prompts = [f"{rng.choice(BEGINNINGS)}count to {k} ." for k in lengths]
    return Workload(name="stream" if rate else "burst", seed=seed, arrivals=at, prompts=prompts, lengths=lengths, scores=scores)


async def play(url, w, router):
    "Send the requests at their times, and wait for all: what the client saw."
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        start = time.perf_counter() + 0.2

        async def one(i):
            due = start + w.arrivals[i]
            await asyncio.sleep(due - time.perf_counter())
            body = dict(model="tiny", prompt=w.prompts[i], max_tokens=w.lengths[i], ignore_eos=True, temperature=0,
                        vllm_xargs=dict(pars_score=w.scores[i], route_by=router.removesuffix(" again")))
            answer = (await client.post("completions", json=body)).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == w.lengths[i]
            now = time.perf_counter()
            return Served(arrival=due, first=now, last=now, output_tokens=w.lengths[i])

        return await asyncio.gather(*(one(i) for i in range(len(w.arrivals))))


def one_run(url, w, router):
    "The figures that are shown, and how fast it went. First a pause, in which the replicas report that they have nothing to do."
    time.sleep(1)
    s = summarise(asyncio.run(play(url, w, router)))
    tau = tau_b(np.array(w.scores), np.array(w.lengths))
    return dict(router=router, workload=w.name, seed=w.seed, tau_b=tau, duration=s["duration"], throughput=s["request_throughput"],
                **{k: s[k] for k in SHOWN})


@app.command()
def demo(requests: int = 120, seeds: int = 3, most: int = 400, noise: float = 0.5, rho: float = 0.8, seqs: int = 8, port: int = 8017,
         control: bool = False):
    """Two replicas; a burst and a stream through each of four routers, which take turns on the same replicas (`pars_nb.switch`), and through
    Ray's default once more where a `--control` is asked for. ρ = 1 is the burst's pace under Ray's default router, seed by seed."""
    import ray

    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    began, rows, names = time.time(), [], [*ROUTERS, *(["power-of-two again"] if control else [])]
    os.environ |= dict(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_worker_niceness="0")  # Ray would give replicas what others leave
    quiet = dict(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.init(address="local", num_cpus=8, object_store_memory=200_000_000, **quiet)
    # float32: on some processors bfloat16 ends in an illegal instruction
    engine = dict(dtype="float32", max_num_seqs=seqs, max_model_len=2048, max_num_batched_tokens=2048)
    s = FleetSettings(kind="cpu", name="tiny", router="pars_nb.switch:SwitchRouter", client_scores=True, port=port, engine=engine)
    url = up(fleet_config(s))
    for router in ROUTERS:
        one_run(url, heavy_tailed(24, 999, most, noise), router)  # warm-up
    for seed in range(seeds):
        order = rotated(names, seed)
        rows += [show(began, one_run(url, heavy_tailed(requests, seed, most, noise), router)) for router in order]
        pace = next(r["throughput"] for r in rows if (r["seed"], r["router"], r["workload"]) == (seed, "power-of-two", "burst"))
        rows += [show(began, one_run(url, heavy_tailed(requests, 100 + seed, most, noise, rho * pace), router)) for router in order]
    down()
    for r in rows:
        r["seed"] %= 100
    table, seconds = ratios(rows), time.time() - began
    print(table.to_string())
    write("fleet/demo", requests=requests, most=most, noise=noise, rho=rho, max_num_seqs=seqs, seconds=seconds, runs=rows)
    table.round(3).to_csv(OUT / "demo.csv")
    figure(rows).savefig(OUT / "demo.png", dpi=100)


def show(began, row):
    "A line for whoever waits."
    shown = " ".join(f"{k} {row[k]:.0f}" for k in SHOWN)
    print(f"{time.time() - began:5.0f} s  {row['workload']:6} {row['seed']:3} {row['router']:15} {shown}", flush=True)
    return row


def ratios(rows):
    "Median over seeds, and the median of the ratios to Ray's default on the same requests."
    import pandas as pd

    runs = pd.DataFrame(rows).set_index(["workload", "seed", "router"])[SHOWN]
    to = runs.xs("power-of-two", level="router")
    ratio = runs / to.reindex(runs.index.droplevel("router")).to_numpy()
    keys = ["workload", "router"]
    return runs.groupby(level=keys, sort=False).median().join(ratio.groupby(level=keys, sort=False).median().add_suffix(" ratio"))


def figure(rows):
    "A dot is a seed: the ratio to Ray's default router on the same requests."
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns

    runs = pd.DataFrame(rows).set_index(["workload", "seed", "router"])[SHOWN]
    to = runs.xs("power-of-two", level="router")
    ratio = (runs / to.reindex(runs.index.droplevel("router")).to_numpy()).reset_index().melt(["workload", "seed", "router"])
    g = sns.catplot(ratio[ratio.router != "power-of-two"], x="value", y="variable", hue="router", col="workload", height=2.8, aspect=1.6)
    g.refline(x=1)
    g.set(xlabel="ratio to power-of-two", ylabel="")
    plt.close(g.figure)
    return g.figure


@app.command()
def plan(requests: int = 50_000, seeds: int = 5, large: bool = True):
    """Past this machine, on the nominal clock (`fleet_sim.py`): five routers, fleets of 2 to 1,000 replicas, loads, heavy tails, two
    speeds, prompts that begin alike, predictions that are worth nothing, replicas that serve first come, first served."""
    from fleet_sim import ROUTERS as rules
    from fleet_sim import Fleet, figures, same_as_router, traffic
    from fleet_sim import play as simulated

    agree, asked = same_as_router()
    assert agree == asked, "the loop is not the router"
    base = Fleet()
    cases: dict[str, tuple[Fleet, dict[str, Any]]] = {}
    for rho in (0.8, 0.95, 1.05, float("inf")):
        load = "burst" if rho == float("inf") else f"ρ {rho:g}"
        cases |= {f"{r} replicas, {load}": (base._replace(replicas=r), dict(rho=rho)) for r in (2, 8, 100)}
    hard = dict(rho=0.95)
    cases |= {"heavier tail": (base, hard | dict(tail=1.8)), "no error": (base, hard | dict(noise=0.0))}
    cases |= {"worthless scores": (base, hard | dict(noise=9.0)), "half the replicas slow": (base._replace(slow=0.5), hard)}
    cases |= {"replicas FCFS": (base._replace(fcfs=True), hard)}
    cases |= {"prompts begin alike": (base._replace(groups=40, prompt=50.0), dict(rho=0.75))}
    rows = []
    for name, (fleet, how) in cases.items():
        for seed in range(seeds):
            w = traffic(fleet, requests, seed=seed, **how)
            for r in rules:
                rows.append(dict(case=name, router=r, seed=seed, **figures(w, simulated(fleet, w, r, seed)[0])))
    facts = dict(requests=requests, same_choices=[agree, asked], runs=rows)
    if large:
        fleet, rows = Fleet(replicas=1000), []
        w = traffic(fleet, 10_000_000, 0.97, tail=1.8)
        for r in ("power-of-two", "fewest requests", "fewest before"):
            began = time.time()
            rows.append(dict(router=r, replicas=1000, requests=len(w.arrival), **figures(w, simulated(fleet, w, r)[0])))
            rows[-1]["seconds"] = time.time() - began
            print(rows[-1], flush=True)
        facts |= dict(large=rows)
    table = plan_table(facts["runs"])
    print(table.to_string())
    write("fleet/plan", **facts)
    table.round(3).to_csv(OUT / "plan.csv")


def collect_command(folder, url, runs):
    "The package's own command, on two workers of a Ray cluster that begins and ends with it."
    words = dict(workers=2, concurrency=4, base_url=url, model="tiny-llm", prompts=folder / "prompts.txt", runs=runs, out=folder / "lengths",
                 max_tokens=120)
    flags = [str(word) for k, v in words.items() for word in (f"--{k.replace('_', '-')}", v)]
    return [sys.executable, "-c", "from pars_nb.cli import app; app()", "collect", "--ray", *flags]


def workers_of(command):
    "The collectors among the processes below it."
    import psutil

    found = []
    if command.poll() is None:
        for p in psutil.Process(command.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just died
                found += [p.pid] * (p.cmdline() or [""])[0].startswith("ray::Worker")
    return found


def kill_at_random(start, done, times, rng):
    "A worker or the command is killed up to a second after an answer that came since the last kill. (who was killed, the command that runs)"
    killed, running = [], start()
    while len(killed) < times and running.poll() is None:
        had, victim = done(), rng.choice(["worker", "command"])
        while running.poll() is None and (done() == had or (victim == "worker" and not workers_of(running))):
            time.sleep(0.05)
        time.sleep(rng.random())
        if running.poll() is None and (pids := workers_of(running) if victim == "worker" else [running.pid]):
            os.kill(rng.choice(pids), signal.SIGKILL)
            killed.append(victim)
            if victim == "command":
                running.wait()
                running = start()
    return killed, running


@app.command()
def kills(times: int = 20, prompts: int = 1000, runs: int = 2, seed: int = 0):
    """`pars collect --ray` against a real engine; at random moments a worker or the command itself is killed by SIGKILL, then the same
    command runs to its end. The engine counts what it answered; each (prompt, run) must be recorded once."""
    import httpx

    from pars_nb.engine import serving
    from pars_nb.gather import rows_of, view

    folder, began = Path(tempfile.mkdtemp()), time.time()
    (folder / "prompts.txt").write_text("".join(f"count to {1 + i % 60} . {i}\n" for i in range(prompts)))
    with open(folder / "collect.log", "wb") as log, serving(None, "--served-model-name", "tiny-llm", log=folder / "engine.log") as url:
        def start():
            return subprocess.Popen(collect_command(folder, url, runs), stdout=subprocess.DEVNULL, stderr=log)

        killed, running = kill_at_random(start, lambda: view(folder / "lengths")["answers"], times, random.Random(seed))
        code = running.wait()
        text = httpx.get(url.removesuffix("/v1") + "/metrics").text
    answered = sum(map(float, re.findall(r'^vllm:request_success_total\{.*finished_reason="(?:stop|length)".*\} (\S+)', text, re.M)))
    found = Counter((r["prompt_id"], r["run"]) for r in rows_of(folder / "lengths/lengths.jsonl"))
    facts = dict(killed=Counter(killed), exit=code, expected=prompts * runs, recorded=len(found), most_often=max(found.values()),
                 answered_by_the_engine=int(answered), in_flight_at_once=2 * 4, seconds=time.time() - began)
    print(json.dumps(facts))
    assert (len(killed), len(found), set(found.values()), code) == (times, prompts * runs, {1}, 0)
    write("fleet/kills", seed=seed, **facts)


@app.command()
def faults():
    """Two machines (two Ray nodes on this one), a replica each; what is killed or drained under load costs requests and time. Runs the cells
    of nbs/58_fleet, the slow ones too, which assert that nothing is lost and all is well again, and keeps their outputs."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["RAY_worker_niceness"] = "0"  # Ray would give replicas what others leave
    notebook, began = Path(__file__).resolve().parent.parent / "nbs/58_fleet.ipynb", time.time()
    book = nbformat.read(notebook, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell("import json; print(json.dumps(costs))"))
    NotebookClient(book, timeout=None, kernel_name="python3", resources=dict(metadata=dict(path=str(notebook.parent)))).execute()
    costs = json.loads(book.cells.pop().outputs[0].text)
    nbformat.write(book, notebook)
    print(json.dumps(costs, indent=1))
    write("fleet/faults", requests=60, seconds=time.time() - began, costs=costs)


@app.command()
def batch(prompts: int = 96, seeds: int = 9, most: int = 1000, noise: float = 0.7, seqs: int = 16):
    """vLLM's offline engine gives a batch of heavy-tailed answers (log-uniform up to `most`), in four orders: engine steps and seconds until
    the last answer, and the share of the steps with under half of the places taken. Scores: the length times a log-normal error."""
    os.environ |= dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")  # steps are counted in this process
    from vllm import LLM, SamplingParams

    from pars_nb.engine import engine_dtype
    from pars_nb.offline import longest_first
    from pars_nb.tiny import tiny_llm

    llm = LLM(str(tiny_llm()), dtype=engine_dtype(), enforce_eager=True, max_num_seqs=seqs, max_model_len=2048, max_num_batched_tokens=2048)
    one_step, rows = llm.llm_engine.step, []
    widths: list[int] = []

    def step():
        widths.append(llm.llm_engine.get_num_unfinished_requests())
        return one_step()

    llm.llm_engine.step = step
    for seed in range(-1, seeds):  # the first one warms up
        w = heavy_tailed(prompts, seed, most, noise)
        longest = longest_first(w.scores)
        named = {"file": list(range(prompts)), "longest predicted first": longest, "shortest predicted first": longest[::-1],
                 "longest first": longest_first(w.lengths)}
        for name in rotated(list(named), seed + 1):
            order, start = named[name], time.perf_counter()
            widths.clear()
            params = [SamplingParams(temperature=0, max_tokens=w.lengths[i], ignore_eos=True, detokenize=False) for i in order]
            llm.generate([w.prompts[i] for i in order], params, use_tqdm=False)
            rows.append(dict(seed=seed, order=name, steps=len(widths), seconds=time.perf_counter() - start, tokens=sum(w.lengths),
                             tail=sum(k < seqs / 2 for k in widths) / len(widths), tau_b=tau_b(np.array(w.scores), np.array(w.lengths))))
            print(rows[-1], flush=True)
    rows = [r for r in rows if r["seed"] >= 0]
    write("fleet/batch", prompts=prompts, most=most, noise=noise, max_num_seqs=seqs, runs=rows)


def trained_on(workers, records, out, cfg):
    "The ranker that `pars_nb.train.train` leaves in `out` when Ray Train runs it on so many workers; the batch is shared among them."
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pars_nb.ranker import load_ranker

    mine = cfg.model_copy(update=dict(batch_size=cfg.batch_size // workers))

    def loop():
        from pars_nb.train import train

        train(records, out, mine, quiet=True)

    TorchTrainer(loop, torch_config=TorchConfig(backend="gloo"), scaling_config=ScalingConfig(num_workers=workers),
                 run_config=RunConfig(storage_path=str(out.parent))).fit()
    return load_ranker(out)


@app.command()
def train(data: Data, prompts: int = 3000, seeds: int = 3, workers: int = 2, epochs: float = 3.0):
    """The same `pars_nb.train.train` alone and on several workers of Ray Train: τ_b on the same test prompts with its bootstrap interval.
    Recorded lengths of Vicuna 7B on Alpaca's prompts, a tiny encoder from scratch."""
    import ray

    from pars_nb.records import draw, read
    from pars_nb.train import TrainConfig
    from pars_nb.train import train as alone

    records, rows = draw(read(data / "alpaca_vicuna7b.parquet"), prompts, 0), []
    ray.init(address="local", num_cpus=2 * workers, object_store_memory=200_000_000, include_dashboard=False, logging_level="ERROR")
    for seed in range(seeds):
        cfg = TrainConfig(encoder="tiny", epochs=epochs, seed=seed)
        for name in rotated(["alone", f"{workers} workers"], seed):
            out, began = Path(tempfile.mkdtemp()) / "ranker", time.time()
            ranker = alone(records, out, cfg, quiet=True) if name == "alone" else trained_on(workers, records, out, cfg)
            rows.append(dict(seed=seed, where=name, seconds=time.time() - began, **ranker.meta.metrics))
            print({k: rows[-1][k] for k in ("seed", "where", "seconds", "tau_b", "tau_b_lo", "tau_b_hi")}, flush=True)
    write("fleet/train", prompts=len(records), epochs=epochs, workers=workers, runs=rows)


def plan_table(rows):
    "Median over seeds of the ratios to power-of-two on the same requests."
    import pandas as pd

    runs = pd.DataFrame(rows).set_index(["case", "seed", "router"])
    to = runs.xs("power-of-two", level="router")
    ratio = runs / to.reindex(runs.index.droplevel("router")).to_numpy()
    return ratio.groupby(level=["case", "router"], sort=False).median().drop(index="power-of-two", level="router")


if __name__ == "__main__":
    app()
