"""Our scheduler with a watch: what our code adds to each step of a real engine, by wall time and by the thread's CPU time. Named as
`--scheduler-cls timed.TimedScheduler`; it writes to the file that PARS_TIMES names."""
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from pars_nb.scheduler import PARSScheduler


class Watch:
    "Time inside vLLM's own methods, and inside ours around them."

    def __init__(self) -> None:
        self.inner = self.outer = np.zeros(2, dtype=np.int64)

    def around(self, f: Callable[..., Any], inner: bool) -> Callable[..., Any]:
        depth = 0

        def timed(*args: Any, **kw: Any) -> Any:
            nonlocal depth
            if depth:
                return f(*args, **kw)
            depth, before = 1, now()
            try:
                return f(*args, **kw)
            finally:
                depth, took = 0, now() - before
                if inner:
                    self.inner = self.inner + took
                else:
                    self.outer = self.outer + took

        return timed


def now() -> np.ndarray:
    "Wall and thread CPU in nanoseconds."
    return np.array([time.perf_counter_ns(), time.thread_time_ns()])


class TimedScheduler(PARSScheduler):
    "PARS; per step: what its methods took beyond vLLM's own, and what the step took."

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.watch, self.added, self.began, self.steps = Watch(), [], time.perf_counter_ns(), []  # type: Watch, list[Any], int, list[int]
        for name in ("schedule", "add_request", "_free_request"):
            ours, theirs = getattr(PARSScheduler, name), getattr(AsyncScheduler, name)
            setattr(AsyncScheduler, name, self.watch.around(theirs, True))
            setattr(self, name, self.watch.around(ours.__get__(self), False))
        step = self.schedule

        def schedule(*a: Any, **k: Any) -> Any:
            out = step(*a, **k)
            if out.total_num_scheduled_tokens:
                self.note()
            return out

        self.schedule = schedule  # type: ignore[method-assign]

    def note(self) -> None:
        "A step is over; every two thousandth is written."
        self.added.append((self.watch.outer - self.watch.inner).tolist())
        self.watch.outer = self.watch.inner = np.zeros(2, dtype=np.int64)
        t = time.perf_counter_ns()
        self.steps.append(t - self.began)
        self.began = t
        if len(self.added) % 2000 == 0:
            report = self.foresight.report
            known = {k: report.get(k) for k in ("seen", "fits", "follows", "tau_b", "cpu_s", "pid")}
            path = Path(os.environ["PARS_TIMES"])
            path.with_suffix(".part").write_text(json.dumps(dict(added=self.added, steps=self.steps, learner=known)))
            path.with_suffix(".part").replace(path)
