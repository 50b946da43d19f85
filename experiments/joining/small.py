"""A smaller model of the same vocabulary, made of some layers of a larger one."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from joining.data import prompts
from joining.member import Member, shortened
from merging.experts import Expert, Recipe, train

from collab_jax.io import canonical
from collab_jax.lm import LM, Backbone, language_model
from collab_jax.models import transformer
from collab_jax.packing import Batch, pack

LENGTH = 112  # tokens of a row


class Small(NamedTuple):
    """A small model."""

    config: Any
    backbone: Backbone
    params: Any
    name: str  # what it was made of
    notes: dict[str, Any]  # what healing saw

    @property
    def lm(self) -> LM:
        """The model."""
        return language_model(self.backbone)


class Healing(NamedTuple):
    """Which layers are kept, and how the rest is made up for."""

    first: int
    last: int
    steps: int = 60  # 0 for the layers as they are
    batch: int = 4  # rows of a step
    rate: float = 5e-4


def healed(member: Member, how: Healing, folder: Path, data: Path | None) -> Small:
    """The first and last layers, trained on the prompts of Spec-Bench.

    The mathematical ones are test questions of GSM8K, here without their answers; see
    `unseen` for rows that hold none of them.

    Args:
      member: the model.
      how: see `Healing`.
      folder: trained models are kept here, and found.
      data: the folder of data, or None.
    """
    count = member.config.layers
    layers = [*range(how.first), *range(count - how.last, count)]
    config, params = shortened(member.config, member.params, layers)
    backbone = transformer.transformer(config)
    name = f"{member.name}, layers {how.first} + {how.last}"
    small = Small(config, backbone, params, name, {})
    if not how.steps:
        return small
    said = [text for group in prompts(data).values() for text in group]
    ids = [[member.start, *member.encode(text)][:400] for text in said]
    recipe = Recipe(how.steps, how.batch, how.rate, name)
    params, expert = tuned(folder, "healed", small, pack(ids, LENGTH), recipe)
    # what is tuned further is found by this name, so it says which healing it was
    name = f"{name}, healed {how.steps} ({expert.path.stem[-8:]})"
    return small._replace(params=params, name=name, notes=notes(expert))


def unseen(member: Member, rows: Batch, data: Path | None) -> Batch:
    """Rows that hold no prompt on which a small model was healed.

    Args:
      member: the model whose tokens they are.
      rows: of tokens.
      data: the folder of data, or None.
    """

    def letters(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    read = [letters(text) for group in prompts(data).values() for text in group]
    texts = [letters(member.decode(row)) for row in rows.tokens.tolist()]
    kept = [not any(text in row for text in read) for row in texts]
    return Batch(*(leaf[np.array(kept)] for leaf in rows))


def tuned(
    folder: Path,
    name: str,
    model: Member | Small,
    data: Batch,
    recipe: Recipe,
    seed: int = 0,
) -> tuple[Any, Expert]:
    """Parameters after training, from the folder where they are there.

    Args:
      folder: trained models are kept here.
      name: of what is trained on.
      model: where training starts.
      data: rows.
      recipe: how.
      seed: of the order of the rows.
    """
    print(f"{name}, seed {seed}: {recipe.model}", file=sys.stderr)
    base = canonical.to_checkpoint(model.config, model.params)
    expert = train(folder, name, model.backbone, model.config, base, data, recipe, seed)
    assert expert is not None  # it is trained where it is not there
    return canonical.from_checkpoint(model.config, expert.read()), expert


def notes(expert: Expert) -> dict[str, Any]:
    """What training saw."""
    few = max(1, len(expert.history) // 10)
    ends = expert.history[:few], expert.history[-few:]
    first, last = (round(float(np.mean(part)), 3) for part in ends)
    return {"seconds": expert.seconds, "first": first, "last": last}
