"""The models that a configuration names, opened: where they lie, what they hold."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from collab_jax.io.delta import with_lora
from collab_jax.io.hub import fetch
from collab_jax.io.json_file import read_json
from collab_jax.io.layout import Checkpoint, missing
from collab_jax.io.weights import open_weights
from collab_jax.merge.plan.reference import Place, Reference
from collab_jax.merge.plan.targets import ModelFacts


class Source(NamedTuple):
    """A model whose tensors can be read."""

    folder: Path  # of config.json and the tokenizer
    checkpoint: Checkpoint  # with the adapter merged into it, if there is one
    config: dict[str, Any]  # config.json

    @property
    def facts(self) -> ModelFacts:
        """What a plan needs to know of it."""
        return ModelFacts(self.checkpoint.layouts, self.config)


def open_source(reference: Reference, root: Path = Path()) -> Source:
    """Finds a model, downloading it where needed, and reads its headers.

    Args:
      reference: of a configuration.
      root: relative paths begin here.

    Raises:
      FileNotFoundError: where there is no such model or adapter.
      ValueError: for damaged files, and for an adapter that does not fit.

    >>> open_source(Reference(Place("no/such-folder/here")))
    Traceback (most recent call last):
    FileNotFoundError: no/such-folder/here does not exist
    """
    folder = _folder(reference.model, root)
    checkpoint = open_weights(folder)
    if reference.lora is not None:
        checkpoint = with_lora(checkpoint, _folder(reference.lora, root))
    return open_folder(folder, checkpoint)


def open_folder(folder: Path, checkpoint: Checkpoint | None = None) -> Source:
    """A folder in the layout of Hugging Face as a source.

    Args:
      folder: with config.json.
      checkpoint: its tensors; None opens those of the folder.

    >>> import tempfile
    >>> import numpy as np
    >>> from collab_jax.io.safetensors import Layout, write_folder
    >>> folder, one = Path(tempfile.mkdtemp()), np.ones(1, np.float32)
    >>> size = (folder / "config.json").write_text('{"vocab_size": 1}')
    >>> write_folder(folder, {"x": Layout(one.dtype, (1,))}, [one], 10**9)
    >>> open_folder(folder).config
    {'vocab_size': 1}
    """
    config = read_json(folder / "config.json")
    opened = open_weights(folder) if checkpoint is None else checkpoint
    return Source(folder, opened, config)


def open_tokenizer(reference: Reference, root: Path = Path()) -> Source:
    """A model that is named for its tokens only; it needs no weights.

    Args:
      reference: of a configuration.
      root: relative paths begin here.

    Raises:
      FileNotFoundError: where there is no such model.
      ValueError: for a damaged config.json.

    >>> import tempfile
    >>> open_tokenizer(Reference(Place(tempfile.mkdtemp()))).config
    {}
    """
    folder = _folder(reference.model, root)
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    return Source(folder, Checkpoint({}, _nothing), config)


def _nothing(name: str) -> np.ndarray:
    raise missing(name, {})


def _folder(place: Place, root: Path) -> Path:
    local = Path(place.path).expanduser()
    local = local if local.is_absolute() else root / local
    if local.is_dir():
        return local
    return fetch(place.path, revision=place.revision)
