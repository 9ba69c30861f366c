"""vLLM's own scheduler on a nominal clock: every step takes what a calibrated engine model says, so no noise of a machine is in it, and
a load near 1 can be measured. All of vLLM's scheduling and all of ours is real, the scorer thread too; the model is left out (its tokens
do not matter where lengths are forced). Writes results/serving/clocked.json.

    python scripts/clocked.py --ranker runs/real/alpaca_davinci003_student --data ../shared/data/alpaca_davinci003.parquet \\
        --trace ../shared/data/trace_azure2023_conv.parquet --engine results/arena/engine_cpu.json
"""
import json
import time

import numpy as np
import pandas as pd
import typer
from serving import CONTROL, Data, Ranker, Trace, pace, scheduler_of, seconds, write

from pars_nb.backends import load_backend
from pars_nb.bench import make_workload, render, table, variants
from pars_nb.calibrate import load_engine
from pars_nb.cli import quiet_transformers, unseen
from pars_nb.metrics import Served, summarise, tau_b
from pars_nb.policy import FCFS, SJF
from pars_nb.simulate import Requests, simulate


def request(i, ids, n, arrival, score, told, hasher):
    "What the engine's front end would hand over; a score goes as `pars_score` or as the priority."
    from vllm import SamplingParams
    from vllm.v1.request import Request

    p = SamplingParams(max_tokens=n, ignore_eos=True, extra_args={"pars_score": score} if told == "score" else None)
    p.update_from_generation_config({}, 3)
    rank = round(1000 * score) if told == "priority" else 0
    return Request(str(i), ids, p, None, arrival_time=arrival, priority=rank, block_hasher=hasher)


def play(s, w, ids, m, told, hasher):
    "Step the scheduler through a workload. A prompt asked about in one step has its score in the next: a step is long beside a score."
    from vllm.v1.outputs import ModelRunnerOutput

    now, i, n, first, last = 0.0, 0, len(ids), {}, {}
    while len(last) < n:
        if not s.requests: now = max(now, w.arrivals[i])
        while i < n and w.arrivals[i] <= now:
            s.add_request(request(i, ids[i], w.lengths[i], w.arrivals[i], w.scores[i], told, hasher))
            i += 1
        out = s.schedule()
        while getattr(s, "scorer", None) and s.scorer.done.qsize() < len(s.asked): time.sleep(1e-5)
        got = [(s.requests[k], c) for k, c in out.num_scheduled_tokens.items()]
        prefill = sum(c for r, c in got if r.num_computed_tokens - c < r.num_prompt_tokens)
        decode = sum(r.num_computed_tokens - c >= r.num_prompt_tokens for r, c in got)
        now += m.step_s(prefill, decode, sum(r.num_computed_tokens - c for r, c in got))
        whole = [r.num_computed_tokens >= r.num_tokens for r, _ in got]
        names = [r.request_id for r, _ in got]
        tokens = [[7] if x else [] for x in whole]
        s.update_from_output(out, ModelRunnerOutput(req_ids=names, req_id_to_index={k: j for j, k in enumerate(names)}, sampled_token_ids=tokens))
        for (r, _), x in zip(got, whole, strict=True):
            if x: first.setdefault(int(r.request_id), now)
            if r.request_id not in s.requests: last[int(r.request_id)] = now
    return [Served(arrival=w.arrivals[j], first=first[j], last=last[j], output_tokens=w.lengths[j], prompt_tokens=len(ids[j])) for j in range(n)]


def main(ranker: Ranker, data: Data, trace: Trace, engine: Data, target: str | None = None, requests: int = 2000, burst: int = 2000, seeds: int = 5,
         rho: list[float] = [0.3, 0.7, 0.9, 1.0, 1.1, 1.3], max_tokens: int = 1024):  # noqa: B006
    "Every queue at every load; and the simulator beside vLLM's scheduler, for FCFS and the oracle."
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    from pars_nb.tiny import tiny_llm
    from transformers import AutoTokenizer

    init_none_hash(sha256)
    m, records, facts = load_engine(engine), unseen(data, target, ranker), load_backend(ranker, "torch")
    tok, hasher, rows, rates = AutoTokenizer.from_pretrained(tiny_llm()), get_request_block_hasher(m.block_size, sha256), [], []
    gaps = np.diff(np.sort(pd.read_parquet(trace).iloc[:, 0].pipe(seconds).to_numpy()))
    queues = variants(str(ranker), priority=True) | {"PARS, all go ahead": variants(str(ranker), express_share=1.0)["PARS"]}
    simulated = {CONTROL: FCFS(), "Oracle SJF": SJF()}
    for what in ("burst", *rho):
        for seed in range(seeds):
            if what == "burst":
                w = make_workload(records, burst, seed=seed, max_tokens=max_tokens)
            else:
                w = make_workload(records, requests, what * float(np.median(rates)), 1000 + seed, max_tokens, f"azure ρ={what:g}", gaps)
            ids, scores, true = [render(tok, p) for p in w.prompts], facts.score(w.prompts).tolist(), [float(x) for x in w.lengths]
            for q, v in queues.items():
                told, told_what = ("score", true) if q == "Oracle SJF" else (v.get("scheduling_policy", ""), scores)
                s = scheduler_of(m.max_num_seqs, m.max_num_batched_tokens, m.block_size, **v)
                served = play(s, w.model_copy(update=dict(scores=told_what)), ids, m, told, hasher)
                s.shutdown()
                rates += [pace(served)] if (q, what) == (CONTROL, "burst") else []
                rows.append(dict(queue=q, workload=w.name, seed=seed, tau_b=tau_b(np.array(scores), np.array(w.lengths)), **summarise(served)))
                print(f"{w.name:12} seed {seed} {q:34} NTPOT {rows[-1]['mean_ntpot_ms']:8.2f} ms  p99 E2EL {rows[-1]['p99_e2el_ms']:8.0f} ms",
                      flush=True)
            r = Requests(np.array(w.arrivals), np.array([len(x) for x in ids]), np.array(w.lengths), np.array(true))
            rows += [dict(queue=f"{q}, simulated", workload=w.name, seed=seed, **summarise(simulate(r, m, p).served())) for q, p in simulated.items()]
        write("clocked", requests=requests, burst=burst, engine=m.model_dump(), ranker=facts.meta.metrics,
              summary=json.loads(table(pd.DataFrame(rows)).to_json(orient="records")), runs=rows)


if __name__ == "__main__":
    quiet_transformers()
    typer.run(main)
