"""A model as the commands want it: what it is first, its parameters when asked for."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from collab_jax.commands.options import MATRICES

if TYPE_CHECKING:
    from collab_jax.commands.plan import Plan
    from collab_jax.io.load import Model
    from collab_jax.models.config import Config
    from collab_jax.respond import Codec
    from collab_jax.translate import Bridge


class Opened(NamedTuple):
    """A source that was found and understood; its parameters are not read yet."""

    path: Path
    config: "Config"
    codec: "Codec"
    dtype: Any  # None: as stored
    load: Callable[[], "Model"]
    matrices: str = "plain"

    def fingerprint(self) -> str:
        """Changes when the files of the model change."""
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        facts = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for file in files
            if file.is_file()
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def same_tokens(self, other: "Opened") -> bool:
        """Whether a token means the same to both models."""
        if self.config.vocab != other.config.vocab:
            return False
        assert self.codec.spelling is not None
        assert other.codec.spelling is not None
        return self.codec.spelling() == other.codec.spelling()

    def bridge_from(self, pivot: "Opened") -> "Bridge":
        """How this model spells the tokens of another, which the text is in.

        Raises:
          ValueError: for tokenizers without a common token.
        """
        from collab_jax.io.bridge import bridge
        from collab_jax.io.tokenizer import load_tokenizer

        own = load_tokenizer(self.path)
        unknown = own.unk_token_id
        return bridge(
            load_tokenizer(pivot.path),
            own,
            vocab=pivot.config.vocab,
            member_vocab=self.config.vocab,
            # what cannot be spelled is misread; it only makes a worse draft or member
            fallback=0 if unknown is None else unknown,
        )

    def plan(self, rows: int, capacity: int, wide: int, read: int) -> "Plan":
        """What a run of so many rows and slots needs of the memory."""
        from collab_jax.commands.plan import plan

        bytes_each = 4 if self.dtype is None else self.dtype.itemsize
        return plan(
            self.config,
            MATRICES.get(self.matrices) or bytes_each,
            bytes_each,
            rows=rows,
            capacity=capacity,
            wide=wide,
            read=read,
        )


def keep_programs() -> None:
    """Keeps compiled programs on disk, so that a second command finds them.

    >>> import jax
    >>> before = jax.config.jax_compilation_cache_dir
    >>> keep_programs()
    >>> bool(jax.config.jax_compilation_cache_dir)
    True
    >>> jax.config.update("jax_compilation_cache_dir", before)
    """
    # transformers would warn that torch is missing, which nothing here needs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import jax

    from collab_jax.io import hub

    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(hub.cache() / "programs"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # a command has many small programs, which together take seconds to compile
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def open_source(
    source: str,
    dtype: str,
    chat: bool = False,
    system: str | None = None,
    matrices: str = "plain",
) -> Opened:
    """Finds a model, downloading it where needed, and reads all but its parameters.

    >>> import tempfile
    >>> import jax
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> folder = tempfile.mkdtemp()
    >>> files = tokenizer.save_pretrained(folder)
    >>> raw = {"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> size = Path(folder, "config.json").write_text(json.dumps(raw))
    >>> before = jax.config.jax_compilation_cache_dir
    >>> opened = open_source(folder, "float32")
    >>> opened.config.width, opened.codec.encode(["b"])
    (4, [[1]])
    >>> jax.config.update("jax_compilation_cache_dir", before)
    """
    keep_programs()
    import numpy as np
    from ml_dtypes import bfloat16

    from collab_jax.io import hub
    from collab_jax.io.codec import codec
    from collab_jax.io.load import load, read_config
    from collab_jax.io.tokenizer import load_tokenizer

    types = {"float32": np.float32, "bfloat16": bfloat16, "float16": np.float16}
    kind = np.dtype(types[dtype]) if dtype in types else None
    path = hub.fetch(source)
    config = read_config(path)
    return Opened(
        path,
        config,
        codec(load_tokenizer(path), config.eos, chat=chat, system=system),
        kind,
        lambda: load(path, kind, matrices=None if matrices == "plain" else matrices),
        matrices,
    )


def check_lengths(tokens: Sequence[Sequence[int]], config: "Config", new: int) -> None:
    """Refuses texts that are longer than what the model was made for.

    Raises:
      ValueError: naming the text.

    >>> from types import SimpleNamespace
    >>> check_lengths([[1, 2], [3]], SimpleNamespace(context=8), new=6)
    >>> check_lengths([[1, 2], [3]], SimpleNamespace(context=8), new=7)
    Traceback (most recent call last):
    ValueError: text 1 has 2 tokens, and with 7 new ones exceeds the model's 8...
    """
    for i, ids in enumerate(tokens, 1):
        if len(ids) + new > config.context:
            raise ValueError(
                f"text {i} has {len(ids)} tokens, and with {new} new ones exceeds the "
                f"model's {config.context} positions: shorten it"
            )
