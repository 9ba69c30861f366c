"""A fleet of replicas with places, on the nominal clock: what a router brings past this machine. Called by studies/fleet.py.

A replica has `slots` places; a request holds one for its length (in token times; twice that on a slow replica), plus its prompt where the
replica has not seen the prompt's group lately. Those that wait are served by predicted length, shortest first, or first come first served.
"""
import heapq
from typing import NamedTuple

import numpy as np
from numba import njit

from pars_nb.route import CLASSES

ROUTERS = {"round-robin": 0, "power-of-two": 1, "fewest requests": 2, "least work": 3, "fewest before": 4}


class Fleet(NamedTuple):
    "What is simulated."
    replicas: int = 8
    slots: int = 16
    look_at: int = 16  # of more replicas than this, so many random ones are looked at
    slow: float = 0.0  # share of the replicas that take twice as long
    prompt: float = 0.0  # what an unseen prompt costs, in token times
    groups: int = 0  # requests of one group begin alike
    keep: int = 40  # a replica has a group's prompt for so many further requests
    fcfs: bool = False  # replicas that serve first come, first served


class Traffic(NamedTuple):
    "Arrays of shape (n,)."
    arrival: np.ndarray  # in token times
    length: np.ndarray  # tokens
    score: np.ndarray  # predicted tokens
    group: np.ndarray


def traffic(fleet, n, rho, seed=0, tail=1.2, noise=0.6, median=100.0, most=20_000.0):
    "Log-normal lengths and prediction errors, Poisson arrivals at the fraction ρ of what the fleet can do; ρ = ∞: a burst."
    rng = np.random.default_rng(seed)
    length = np.clip(np.round(median * np.exp(tail * rng.standard_normal(n))), 1, most)
    score = length * np.exp(noise * rng.standard_normal(n))
    speed = fleet.replicas * fleet.slots * (1 - fleet.slow / 2)
    gaps = rng.exponential(1, n) * length.mean() / (rho * speed)
    return Traffic(np.cumsum(gaps) if rho < np.inf else np.zeros(n), length, score, rng.integers(0, max(1, fleet.groups), n))


@njit(cache=True)
def _class(work, classes):
    k, w = 0, int(work)
    while w > 1:
        w >>= 1
        k += 1
    return min(k, classes - 1)


@njit(cache=True)
def _merge(left, right, key, a, b):
    "Skew heap, by key, then by arrival."
    top, last = -1, -1
    while a >= 0 and b >= 0:
        if key[b] < key[a] or (key[b] == key[a] and b < a):
            a, b = b, a
        if last < 0:
            top = a
        else:
            left[last] = a
        last, a = a, right[a]
        right[last] = left[last]
        left[last] = -1
    rest = a if a >= 0 else b
    if last < 0:
        return rest
    left[last] = rest
    return top


@njit(cache=True)
def drive(arrival, length, score, group, key, router, replicas, slots, look_at, slow, prompt, groups, keep, classes, before, seed):
    "When each request is done, and where it was served."
    np.random.seed(seed)
    n = arrival.size
    done, where, service = np.zeros(n), np.zeros(n, np.int64), np.zeros(n)
    left, right, root = np.full(n, -1), np.full(n, -1), np.full(replicas, -1)
    running, count, work = np.zeros(replicas, np.int64), np.zeros(replicas, np.int64), np.zeros(replicas)
    by_class, routed = np.zeros((replicas, classes), np.int64), np.zeros(replicas, np.int64)
    seen = np.full((replicas, max(1, groups)), -(10**9))
    last, looked = np.zeros(replicas, np.int64), np.arange(replicas)
    events = [(np.inf, -1)]
    typical = 0.0
    for i in range(n + 1):
        now = arrival[i] if i < n else np.inf
        while events[0][0] <= now and events[0][1] >= 0:
            t, j = heapq.heappop(events)
            r = where[j]
            done[j] = t
            running[r] -= 1
            count[r] -= 1
            work[r] -= score[j]
            by_class[r, _class(score[j], classes)] -= 1
            k = root[r]
            if k >= 0:
                root[r] = _merge(left, right, key, left[k], right[k])
                running[r] += 1
                heapq.heappush(events, (t + service[k], k))
        if i == n:
            break
        mine = _class(score[i], classes)
        m = min(look_at if router != 1 else 2, replicas)
        if m < replicas:
            for a in range(m):
                b = a + np.random.randint(replicas - a)
                looked[a], looked[b] = looked[b], looked[a]
        own = score[i] + prompt
        typical = 0.98 * typical + 0.02 * own if typical > 0 else own
        best, least, fewest, oldest = 0, np.inf, 0, 0
        for a in range(m):
            r = looked[a]
            saved = prompt if groups > 0 and routed[r] - seen[r, group[i]] < keep else 0.0
            if router == 3:
                cost = work[r] - saved
            elif router == 4:
                ahead = by_class[r, mine] / 2
                for k in range(mine):
                    ahead += by_class[r, k]
                cost = count[r] + before * ahead - saved / typical
            else:
                cost = float(count[r])
            if cost < least or (cost == least and (count[r] < fewest or (count[r] == fewest and last[r] < oldest))):
                best, least, fewest, oldest = r, cost, count[r], last[r]
        r = i % replicas if router == 0 else best
        cached = groups > 0 and routed[r] - seen[r, group[i]] < keep
        service[i] = (length[i] + (0.0 if cached else prompt)) * (2.0 if r < slow * replicas else 1.0)
        routed[r] += 1
        seen[r, group[i]] = routed[r]
        where[i], last[r] = r, i + 1
        count[r] += 1
        work[r] += score[i]
        by_class[r, mine] += 1
        if running[r] < slots:
            running[r] += 1
            heapq.heappush(events, (now + service[i], i))
        else:
            root[r] = _merge(left, right, key, root[r], i)
    return done, where


def play(fleet, w, router, seed=0, before=0.5):
    "When each request is done, and where it was served."
    key = np.arange(len(w.arrival), dtype=float) if fleet.fcfs else w.score
    return drive(w.arrival, w.length, w.score, w.group, key, ROUTERS[router], fleet.replicas, fleet.slots, fleet.look_at, fleet.slow,
                 fleet.prompt, fleet.groups, fleet.keep, CLASSES, before, seed)


def figures(w, done):
    "Mean and p99 of NTPOT (in token times) and E2EL."
    e2el = done - w.arrival
    ntpot = e2el / w.length
    return dict(mean_ntpot=float(ntpot.mean()), p99_ntpot=float(np.percentile(ntpot, 99)), mean_e2el=float(e2el.mean()),
                p99_e2el=float(np.percentile(e2el, 99)))


def same_as_router(n=3000, seed=0):
    "Do the loop's choices equal those of `pars_nb.route.Router`, which Ray calls? (choices that agree, requests)"
    from pars_nb.route import Ask, Router

    fleet = Fleet(replicas=5, slots=4)
    w = traffic(fleet, n, 1.0, seed)
    done, where = play(fleet, w, "fewest before", seed)
    router, names, over, agree = Router(prefill_token=0.0), [str(r) for r in range(fleet.replicas)], [], 0
    for i in range(n):
        while over and over[0][0] <= w.arrival[i]:
            _, j = heapq.heappop(over)
            router.books.completed(str(j), str(where[j]))
        agree += router.choose(Ask(str(i), int(w.score[i])), names, w.arrival[i])[0] == str(where[i])
        router.books.routed(str(i), str(where[i]), int(w.score[i]))
        heapq.heappush(over, (done[i], i))
    return agree, n
