"""Experts of one base, trained once and kept.

An expert is a file of float32 tensors with a checkpoint's names, under a name that
holds a hash of everything it depends on.
"""

import functools
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from measuring.atomic import write_json

from collab_jax import finetune
from collab_jax.io import canonical, safetensors
from collab_jax.io.layout import Layout
from collab_jax.packing import Batch

Tensors = dict[str, Any]  # name in a checkpoint -> tensor


class Recipe(NamedTuple):
    """How every expert is made."""

    steps: int
    batch: int  # rows of a step
    rate: float  # peak learning rate
    model: str  # what the base is


class Expert(NamedTuple):
    """A fine-tuned model on disk."""

    path: Path
    history: list[float]  # loss before each step
    seconds: float

    def read(self) -> Tensors:
        """Its tensors, in memory."""
        return read(self.path)


def train(
    cache: Path,
    name: str,
    backbone: Any,
    config: Any,
    base: Tensors,
    data: Batch,
    recipe: Recipe,
    seed: int,
    only_cached: bool = False,
    progress: bool = True,
) -> Expert | None:
    """Trains all parameters by AdamW with warm-up and cosine decay, or finds the file.

    Args:
      cache: the folder that experts are kept in.
      name: of the task.
      backbone: the model.
      config: of the model.
      base: its tensors.
      data: rows `[N, T]`.
      recipe: how.
      seed: of the order of the rows.
      only_cached: None is returned where training would be needed.
      progress: whether a bar is shown.
    """
    said = {"task": name, "seed": seed, **recipe._asdict(), "data": digest(data)}
    key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{name}-{seed}-{key}.safetensors"
    notes = path.with_suffix(".json")
    if not (path.exists() and notes.exists()):
        if only_cached:
            return None
        cache.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        params, history = finetune.fit(
            _tuner(backbone, recipe),
            canonical.from_checkpoint(config, base),
            data,
            batch_size=recipe.batch,
            epochs=1 + recipe.steps * recipe.batch // len(data.tokens),
            steps=recipe.steps,
            seed=seed,
            progress=progress,
        )
        seconds = time.perf_counter() - began
        tensors = canonical.to_checkpoint(config, params)
        del params
        _write(path, tensors)
        write_json(notes, {**said, "history": history, "seconds": round(seconds, 1)})
    found = json.loads(notes.read_text("utf-8"))
    return Expert(path, found["history"], found["seconds"])


@functools.cache
def _tuner(backbone: Any, recipe: Recipe) -> finetune.Finetuner:
    """One for all experts, so that its step is compiled once."""
    rate = optax.warmup_cosine_decay_schedule(
        0, recipe.rate, max(1, recipe.steps // 10), recipe.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))
    return finetune.finetuner(backbone, optimizer, chunk=64)


def read(path: Path) -> Tensors:
    """The tensors of one file, each in memory of its own."""
    file = safetensors.open_file(path)
    return {name: jax.numpy.asarray(file.read(name)) for name in file.layouts}


def _write(path: Path, tensors: Mapping[str, Any]) -> None:
    layouts = {
        name: Layout(np.dtype(leaf.dtype), tuple(leaf.shape))
        for name, leaf in tensors.items()
    }
    safetensors.write(path, layouts, (np.asarray(leaf) for leaf in tensors.values()))


def digest(data: Batch) -> str:
    """A name for these rows."""
    found = hashlib.sha256()
    for leaf in data:
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:16]
