"""What the measuring scripts share: where results go, how a workload is told its scores, vLLM's scheduler without an engine."""
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from pars_nb.bench import CONTROL, machine
from pars_nb.engine import Engine, EngineSettings, engine
from pars_nb.lane import Express
from pars_nb.policy import PARS

__all__ = ["CONTROL", "RESULTS", "Data", "EngineFile", "Learning", "Ranker", "Trace", "gaps_of", "machine", "ours", "pace", "rotated",
           "running", "scheduler_of", "seconds", "write"]
RESULTS = Path(__file__).resolve().parent.parent / "results"
Ranker = Annotated[Path, typer.Option(help="folder of the ranker")]
Data = Annotated[Path, typer.Option(help="recorded lengths")]
Trace = Annotated[Path, typer.Option(help="recorded arrivals: its first column")]
EngineFile = Annotated[Path, typer.Option(help="JSON of `pars calibrate`")]


def write(name: str, **facts: Any) -> None:
    "results/NAME.json: the command, the machine, and what came out."
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", f"studies/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    path.write_text(json.dumps(dict(command=command, machine=machine(), **facts), indent=1) + "\n")


def gaps_of(trace: Path) -> list[float]:
    "Seconds between the arrivals of a recorded trace, whose first column is a time."
    return np.diff(np.sort(seconds(pd.read_parquet(trace).iloc[:, 0]).to_numpy())).tolist()


def seconds(column: pd.Series) -> pd.Series:
    "Arrival times as seconds, whatever they were recorded as."
    if pd.api.types.is_numeric_dtype(column):
        return column.astype(float)
    return (pd.to_datetime(column) - pd.to_datetime(column).min()).dt.total_seconds()


def pace(served: Sequence[Any]) -> float:
    "Requests a second until nine tenths are answered: what an engine serves that is never idle (the last ones run in a half-empty batch)."
    done = sorted(s.last for s in served)
    k = max(1, int(0.9 * len(done)))
    return k / (done[k - 1] - min(s.arrival for s in served))


def rotated(names: Sequence[str], by: int) -> list[str]:
    "The names in an order that rotates from seed to seed, so that a slow minute of the machine does not hit one queue alone."
    k = by % len(names)
    return [*names[k:], *names[:k]]


@contextmanager
def running(queues: dict[str, dict[str, Any]], settings: EngineSettings, logs: str) -> Iterator[dict[str, Engine]]:
    "An engine for each queue, all up and ready; their logs lie under results/LOGS… and go when all went well."
    paths = {k: RESULTS / f"{logs}-{i}.log" for i, k in enumerate(queues)}
    with ExitStack() as stack:
        engines = {k: stack.enter_context(engine(settings, v, paths[k])) for k, v in queues.items()}
        for e in engines.values():
            e.get()
        yield engines
    for path in paths.values():
        path.unlink()


def ours(**pars: Any) -> dict[str, Any]:
    "Engine arguments of our class with these settings."
    return dict(scheduler_cls="pars_nb.scheduler.PARSScheduler", additional_config=dict(pars=pars))


@dataclass
class Learning:
    "PARS whose lane is learned on the way, as the scheduler does it: from requests that came `lag` before and have finished since."
    pars: PARS
    output: np.ndarray
    express: Express = field(default_factory=Express)
    lag: int = 500
    came: list[float | None] = field(default_factory=list)

    def key(self, t: Any) -> float:
        cost = self.pars.cost(t)
        self.came.append(None if cost is None else self.pars.scale.of(cost))
        if (i := t.seq - self.lag) >= 0 and self.express.seen(self.came[i], float(self.output[i])):
            self.pars = replace(self.pars, express=self.express.quantile)
        return self.pars.key(t)


def scheduler_of(seqs: int = 64, tokens: int = 8192, block_size: int = 16, blocks: int = 20_000, scheduler_cls: str | None = None,
                 scheduling_policy: str = "fcfs", additional_config: dict[str, Any] | None = None, max_model_len: int | None = None) -> Any:
    "vLLM's scheduler, or ours (`scheduler_cls`), without an engine."
    import torch
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from pars_nb.scheduler import PARSScheduler
    from pars_nb.tiny import tiny_llm

    model = ModelConfig(model=str(tiny_llm()), dtype="float32")
    sched = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=max_model_len or model.max_model_len,
                            policy=scheduling_policy, is_encoder_decoder=False, async_scheduling=False)
    cache = CacheConfig(block_size=block_size, enable_prefix_caching=True)
    cfg = VllmConfig(model_config=model, scheduler_config=sched, cache_config=cache, parallel_config=ParallelConfig(),
                     additional_config=additional_config or {})
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    cache.num_gpu_blocks = blocks
    register_all_kvcache_specs(cfg)
    cls = PARSScheduler if scheduler_cls else Scheduler
    return cls(vllm_config=cfg, kv_cache_config=kv, block_size=block_size, log_stats=True, structured_output_manager=StructuredOutputManager(cfg))
