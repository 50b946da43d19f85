"""What a run needs of the device's memory, told and checked before it begins."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    from collab_jax.models.config import Config


class Plan(NamedTuple):
    """Bytes that a run needs at the same time."""

    params: int
    cache: int
    logits: int
    work: int  # what the widest call holds beside its logits

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def plan(
    config: "Config",
    weight_bytes: int,
    bytes_each: int,
    *,
    rows: int,
    capacity: int,
    wide: int,
    read: int,
) -> Plan:
    """Counts the bytes of a run.

    Args:
      config: the model.
      weight_bytes: of a parameter.
      bytes_each: of an entry of the cache.
      rows: B.
      capacity: slots of a row of the cache.
      wide: tokens of a row in the widest call.
      read: tokens of a row whose logits exist at the same time.

    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> plan(config, 4, 4, rows=1, capacity=16, wide=8, read=1).cache
    2048
    """
    from collab_jax.io.names import rules

    count = sum(math.prod(shape) for rule in rules(config) for shape in rule.shapes)
    slot = 2 * config.layers * config.kv_heads * config.head_size
    # the logits, their log-probs, and what the choice of a token makes of them
    logits = 3 * rows * read * config.vocab * 4
    scores = 2 * config.heads * capacity * 4  # attention, before and after the softmax
    hidden = 4 * (config.width + 3 * config.inner)
    return Plan(
        count * weight_bytes,
        rows * capacity * slot * bytes_each,
        logits,
        rows * wide * (scores + hidden),
    )


def free_memory() -> tuple[int | None, str]:
    """Bytes that the default device has left, and its name.

    >>> free, name = free_memory()
    >>> free is None or free > 0
    True
    """
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), device.device_kind
    return _free_memory_of_host(), device.platform


def _free_memory_of_host() -> int | None:
    """What the machine and this process's control group have left."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError):
            return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        # file pages of the group can be reclaimed, as MemAvailable counts them
        stat = (group / "memory.stat").read_text().split()
        reclaimable = int(stat[stat.index("inactive_file") + 1])
        used = int((group / "memory.current").read_text())
        found.append(limit - used + reclaimable)
    except (OSError, ValueError):
        pass  # no control group, or one without a limit
    return min(found) if found else None


def size(count: float) -> str:
    """Bytes for people.

    >>> size(134_515_008 * 4), size(900)
    ('538 MB', '900 B')
    """
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def check(needs: Plan, quiet: bool = False) -> None:
    """Prints the plan to stderr, and refuses one that cannot fit.

    Raises:
      ValueError: when the device has less memory free than the run needs.

    >>> check(Plan(params=400, cache=64, logits=12, work=24), quiet=True)
    """
    free, device = free_memory()
    parts = ", ".join(
        f"{name} {size(count)}"
        for name, count in zip(needs._fields, needs, strict=True)
    )
    room = "an unknown amount" if free is None else size(free)
    if not quiet:
        click.echo(
            f"plan: {parts}; together {size(needs.total)} of {room} free ({device})",
            err=True,
        )
    if free is not None and needs.total > free:
        raise ValueError(
            f"the run needs {size(needs.total)} ({parts}), but only {room} are free on "
            f"{device}: choose a smaller batch size, fewer or shorter texts, or "
            "--dtype bfloat16"
        )
