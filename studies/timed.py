"""Our scheduler with a watch: what our code adds to each step of a real engine, by wall time and by the thread's CPU time. Named as
`--scheduler-cls timed.TimedScheduler`; it writes to the file that PARS_TIMES names."""
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from pars_nb.scheduler import PARSScheduler


class Watch:
    "Time inside vLLM's own methods, and inside ours around them: wall and thread CPU, in nanoseconds."

    def __init__(self) -> None:
        self.inner, self.outer = [0, 0], [0, 0]

    def around(self, f: Callable[..., Any], inner: bool) -> Callable[..., Any]:
        depth = 0

        def timed(*args: Any, **kw: Any) -> Any:
            nonlocal depth
            if depth:
                return f(*args, **kw)
            depth, wall, cpu = 1, time.perf_counter_ns(), time.thread_time_ns()
            try:
                return f(*args, **kw)
            finally:
                depth, into = 0, self.inner if inner else self.outer
                into[1] += time.thread_time_ns() - cpu
                into[0] += time.perf_counter_ns() - wall

        return timed

    def take(self) -> tuple[int, int]:
        "What ours took beyond theirs since the last call."
        wall, cpu = (ours - theirs for ours, theirs in zip(self.outer, self.inner, strict=True))
        self.inner, self.outer = [0, 0], [0, 0]
        return wall, cpu


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
        self.added.append(self.watch.take())
        t = time.perf_counter_ns()
        self.steps.append(t - self.began)
        self.began = t
        if len(self.added) % 2000 == 0:
            report = self.foresight.report
            known = {k: report.get(k) for k in ("seen", "fits", "follows", "tau_b", "cpu_s", "pid")}
            path = Path(os.environ["PARS_TIMES"])
            path.with_suffix(".part").write_text(json.dumps(dict(added=self.added, steps=self.steps, learner=known)))
            path.with_suffix(".part").replace(path)
