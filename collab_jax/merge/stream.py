"""Merging from files to files: leaf by leaf, in bounded memory.

A few workers each take the next leaf, read it, run its program and write it, so that
reading, computing and writing overlap; leaves that are in work at the same time never
need more memory than the budget, which is that of the largest leaf. Results are the
same whatever the number of workers.
"""

import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax.merge import split
from collab_jax.merge.pieces import add
from collab_jax.merge.program import Leaf, programs
from collab_jax.merge.stack import Facts, Survey, Transform

BATCH = 64  # small leaves of one kind that are merged by one call
SMALL = 1 << 14  # entries

Arrays = tuple[np.ndarray | None, tuple[np.ndarray, ...]]  # base or None, N experts


class Job(NamedTuple):
    """One tensor of the result."""

    name: str  # canonical
    shape: tuple[int, ...]
    dtype: np.dtype  # of the result
    part: Transform | None  # None copies the first expert, converted
    weights: tuple[float, ...]  # N
    read: Callable[[], Arrays]  # the base and the experts, of equal shapes
    sources: tuple[str, ...]  # what the inputs are called in an error, base first
    working: int = 4  # bytes of a number while it is computed with


def cost(job: Job) -> int:
    """Bytes that a job needs while it runs: inputs, deltas and the result.

    >>> job = Job("a", (1000,), np.dtype("float32"), None, (1.0, 1.0), lambda: None, ())
    >>> cost(job)
    16000
    """
    count, size = len(job.weights), math.prod(job.shape)
    if job.part is None or (_in_pieces(job.part) and not job.part.hosted):
        # what is stored, and a few pieces in the working precision
        piece = min(size, split.SIZES[0]) * job.working * (2 * count + 4)
        return size * job.dtype.itemsize * (count + 2) + piece * (job.part is not None)
    return size * job.working * _tensors(job)


def limit(jobs: Sequence[Job]) -> int:
    """Bytes that a merge needs at most beside its programs: of its largest tensor.

    `max_leaf size * working * (N + 3)`, and for methods that see matrices 2 N + 6.

    >>> limit([])
    0
    """
    sizes = (math.prod(job.shape) * job.working * _tensors(job) for job in jobs)
    return max(sizes, default=0)


def _tensors(job: Job) -> int:
    """Arrays of a leaf's size that exist at the same time, in the working precision."""
    count = len(job.weights)
    simple = job.part is None or job.part.flat or job.part.hosted
    return count + 3 if simple else 2 * count + 6


def _in_phases(part: Transform) -> bool:
    """Whether the host adds sums over pieces, or takes steps of its own."""
    return _in_pieces(part) or (part.hosted and jax.default_backend() == "cpu")


def _in_pieces(part: Transform) -> bool:
    """Accelerators have the memory, and run few large programs better."""
    return part.flat and jax.default_backend() == "cpu"


def stream(
    jobs: Sequence[Job],
    write: Callable[[str, np.ndarray], None],
    key: jax.Array | None = None,
    *,
    workers: int = 3,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Merges tensor after tensor.

    Args:
      jobs: the tensors of the result, in the order in which they are best read.
      write: takes the name and the merged tensor, in any order, from any thread.
      key: one typed key for random parts; None is `jax.random.key(0)`.
      workers: threads. Each reads, waits for its program, and writes.
      advance: called after every tensor and pass.

    Raises:
      ValueError: for an input that is not finite, naming tensor and model, and for
        such a result; what a reader raises. Nothing goes on after the first error.

    >>> from collab_jax.merge.stack import chain
    >>> half, found = np.float32([0.5]), {}
    >>> job = Job("a", (1,), half.dtype, chain(), (2.0, 4.0),
    ...           lambda: (None, (half, half)), ("x", "y"))
    >>> stream([job], found.__setitem__)
    >>> found["a"].tolist()
    [3.0]
    """
    key = jax.random.key(0) if key is None else key
    budget = Budget(limit(jobs))

    def leaf(job: Job, base, experts) -> Leaf:
        return Leaf(job.name, base, experts, job.weights, key)

    def put(job: Job, merged: Any) -> None:
        merged = np.asarray(merged, job.dtype)
        _check(
            f"tensor {job.name} of the result", merged, "finite inputs have gone "
            f"beyond {job.dtype.name}; are weights or factors too large?"
        )  # fmt: skip
        write(job.name, merged)

    def run(job: Job, facts: Facts) -> None:
        with budget.take(cost(job)):
            base, experts = job.read()
            check_finite(job, base, experts)
            if job.part is None:
                put(job, experts[0])
            else:
                narrow = jax.dtypes.canonicalize_dtype(job.dtype)
                run, whole = programs(job.part), leaf(job, base, experts)
                if _in_phases(job.part):
                    entire = not job.part.flat
                    merged = split.run(
                        run, None, whole, facts, narrow, entire, sizes[job.part]
                    )
                else:
                    merged = np.asarray(run.merge(whole, facts, narrow))
                del base, experts, whole
                put(job, merged)
        advance()

    def run_together(group: list[Job], facts: Facts) -> None:
        first = group[0]
        assert first.part is not None
        with budget.take(sum(cost(job) for job in group)):
            leaves = []
            for job in group:
                base, experts = job.read()
                check_finite(job, base, experts)
                leaves.append(leaf(job, base, experts))
            leaves += leaves[-1:] * (BATCH - len(leaves))  # one program for all sizes
            narrow = jax.dtypes.canonicalize_dtype(first.dtype)
            merged = np.asarray(programs(first.part).batch(leaves, facts, narrow))
            for job, row in zip(group, merged, strict=False):
                put(job, row)
                advance()

    groups = _together(jobs)
    sizes = _sizes(jobs, groups)
    facts = _facts(jobs, leaf, budget, workers, advance, sizes)
    tasks: list[Callable[[], None]] = []
    for group in groups:
        known = facts.get(group[0].part, ())
        if len(group) > 1:
            tasks.append(functools.partial(run_together, group, known))
        else:
            tasks.append(functools.partial(run, group[0], known))
    for _ in _in_order(tasks, workers):
        pass


def _together(jobs: Sequence[Job]) -> list[list[Job]]:
    """Small leaves of one kind in groups, so that a program serves many of them.

    A model of many experts has tens of thousands of tensors. Groups are worth a program
    of their own from a few dozen leaves on.
    """
    kinds: dict[Hashable, list[Job]] = {}
    alone: list[Job] = []
    for job in jobs:
        small = 0 < math.prod(job.shape) <= SMALL
        small = small and job.part is not None
        kind = programs(job.part).kind(job.name, job.shape) if small else None
        if kind is None:
            alone.append(job)
        else:
            full = job.part, kind, job.dtype, len(job.sources)
            kinds.setdefault(full, []).append(job)
    groups = [[job] for job in alone]
    for same in kinds.values():
        if len(same) < BATCH:
            groups += [[job] for job in same]
        else:
            groups += [same[i : i + BATCH] for i in range(0, len(same), BATCH)]
    place = {id(job): i for i, job in enumerate(jobs)}
    return sorted(groups, key=lambda group: place[id(group[0])])


def _sizes(
    jobs: Sequence[Job], groups: Sequence[Sequence[Job]]
) -> dict[Transform | None, tuple[int, ...]]:
    """For each transform, the sizes of pieces that serve its leaves best."""
    counts: dict[Transform | None, list[int]] = {}
    for job in jobs:
        own = counts.setdefault(job.part, [])
        own += [math.prod(job.shape)] * len(_surveys(job))
    for group in groups:
        if len(group) == 1:
            counts[group[0].part].append(math.prod(group[0].shape))
    return {part: split.sizes(own) for part, own in counts.items()}


def passes(jobs: Iterable[Job]) -> int:
    """How many times tensors are read, over all of them: what `advance` counts.

    >>> passes([])
    0
    """
    return sum(1 + len(_surveys(job)) for job in jobs)


def _surveys(job: Job) -> list[int]:
    entries = job.part.survey if job.part is not None else ()
    return [i for i, entry in enumerate(entries) if isinstance(entry, Survey)]


def _facts(
    jobs, leaf, budget, workers, advance, sizes
) -> dict[Transform | None, Facts]:
    """What the surveys of every transform gave."""
    facts: dict[Transform | None, Facts] = {}
    groups: dict[Transform, list[Job]] = {}
    for job in jobs:
        if job.part is not None:
            groups.setdefault(job.part, []).append(job)
    for part, group in groups.items():
        known: Facts = ()
        ordered = sorted(group, key=lambda job: job.name)
        for i, entry in enumerate(part.survey):
            if not isinstance(entry, Survey):
                known = (*known, entry)
                continue

            def ask(job, i=i, known=known, part=part):
                with budget.take(cost(job)):
                    base, experts = job.read()
                    run, whole = programs(part), leaf(job, base, experts)
                    if _in_phases(part):
                        found = split.run(
                            run, i, whole, known, whole=not part.flat, sizes=sizes[part]
                        )
                    else:
                        found = jax.tree.map(np.asarray, run.ask(i, whole, known))
                advance()
                return found

            total = None
            tasks = (functools.partial(ask, job) for job in ordered)
            for answer in _in_order(tasks, workers):
                total = add(total, answer)
            size = sum(entry.size(job.name, job.shape) for job in ordered)
            known = (*known, entry.settle(total, known, size))
        facts[part] = known
    return facts


def check_finite(job: Job, base: Any, experts: Sequence[Any]) -> None:
    """Refuses inputs with NaN or an infinity, before anything is made of them.

    Raises:
      ValueError: naming the tensor, the model and the place.

    >>> one = np.float32([1])
    >>> job = Job("a", (1,), one.dtype, None, (1.0,), lambda: (None, (one,)), ("x",))
    >>> check_finite(job, None, (one / 0.5,))
    """
    inputs = experts if base is None else (base, *experts)
    for source, array in zip(job.sources, inputs, strict=True):
        _check(
            f"tensor {job.name} of {source}", array, "finite parameters are expected; "
            "did the training diverge, is the file damaged?"
        )  # fmt: skip


def _check(what: str, array: np.ndarray, cure: str) -> None:
    if array.dtype.kind in "iub" or _finite(array):
        return
    bad = np.argwhere(~np.isfinite(array))
    at = tuple(int(i) for i in bad[0])
    raise ValueError(
        f"{what} holds {len(bad)} numbers that are not finite, the first {array[at]} "
        f"at {list(at)}: {cure}"
    )


def _finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite: the largest bit pattern of either sign tells.

    Two maxima of integers, without a temporary array: at the speed of the memory.
    """
    if not array.size:
        return True
    if array.dtype.itemsize == 1 or not array.flags.c_contiguous:
        return bool(np.isfinite(array).all())
    infinity = int(np.array(np.inf, array.dtype).view(f"u{array.dtype.itemsize}"))
    sign = 1 << (8 * array.dtype.itemsize - 1)
    flat = array.reshape(-1)
    return bool(
        flat.view(f"i{array.dtype.itemsize}").max() < infinity
        and flat.view(f"u{array.dtype.itemsize}").max() < (sign | infinity)
    )


class Budget:
    """A number of bytes that threads share; a job larger than all of it runs alone."""

    def __init__(self, size: int):
        """A budget of `size` bytes."""
        self.size, self.used, self.changed = size, 0, threading.Condition()

    def take(self, count: int):
        """Waits until `count` bytes are free; a context manager that gives them back.

        >>> with Budget(10).take(4) as budget:
        ...     budget.used
        4
        """
        return _Taken(self, count)


class _Taken:
    def __init__(self, budget: Budget, count: int):
        self.budget, self.count = budget, count

    def __enter__(self) -> Budget:
        own = self.budget
        with own.changed:
            own.changed.wait_for(
                lambda: not own.used or own.used + self.count <= own.size
            )
            own.used += self.count
        return own

    def __exit__(self, *_) -> None:
        with self.budget.changed:
            self.budget.used -= self.count
            self.budget.changed.notify_all()


def _in_order(tasks: Iterable[Callable[[], Any]], workers: int) -> Iterator[Any]:
    """What tasks return, in order; threads run a few ahead. An error ends them all."""
    pool = ThreadPoolExecutor(workers, "merge")
    ahead: deque[Future] = deque()
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]

    def call(task: Callable[[], Any]) -> Any:
        with jax.enable_x64(wide):  # it is a thread's own
            return task()

    try:
        for task in tasks:
            ahead.append(pool.submit(call, task))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
