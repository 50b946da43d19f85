"""A checkpoint with a LoRA adapter of PEFT in it, tensor by tensor.

    W' = W + s B A,     s = alpha / R  or  alpha / sqrt(R)

No model is built and nothing is stored: a tensor that the adapter touches is computed
when it is read, as PEFT's merge_and_unload computes it. Shape letters: R rank, O and I
sizes out and in, V vocabulary, D width.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from collab_jax.io import pickled, safetensors
from collab_jax.io.layout import Checkpoint, missing
from collab_jax.io.peft_settings import FOREWORD, rank_of, read_settings, scale_of

# settings beyond plain LoRA that are heeded here
KNOWN = ("use_dora", "bias", "lora_bias", "modules_to_save", "rank_pattern")
KNOWN += ("alpha_pattern",)
FLOATS = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16))
FLOATS += (np.dtype(ml_dtypes.bfloat16),)
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.(?P<leaf>weight|bias))?"
)
_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}

Edit = Callable[[np.ndarray], np.ndarray]


class _Adapter(NamedTuple):
    """The tensors of an adapter, sorted."""

    folder: Path
    file: Checkpoint
    modules: dict[str, dict[str, str]]  # module -> kind of factor -> tensor
    values: dict[str, str]  # tensor of the base -> tensor that takes its place


def with_lora(base: Checkpoint, adapter_folder: str | Path) -> Checkpoint:
    """A checkpoint that reads as the base with an adapter merged into it.

    W + s B A, computed in float32 (float64 where W or the factors are) and rounded to
    the type of W. rslora, rank and alpha patterns, biases, modules_to_save, Conv1D,
    embeddings and DoRA are heeded; what would mean something else is refused by name.
    Where a head is tied to its embedding, an adapter of the embedding changes both.

    Args:
      base: the adapted model; not changed.
      adapter_folder: adapter_config.json, and adapter_model.safetensors or .bin.

    Raises:
      FileNotFoundError: where a file is missing.
      ValueError: for another kind of adapter, or one that does not fit the base.

    Source: arXiv 2106.09685 (LoRA), 2312.03732 (rslora), 2402.09353 (DoRA).

    >>> import json, tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    >>> _ = (folder / "adapter_config.json").write_text(json.dumps(settings))
    >>> stem, two = FOREWORD + "q.lora_", np.ones((2, 1), np.float32)
    >>> factors = {stem + "A.weight": two.T, stem + "B.weight": two}
    >>> from collab_jax.io.safetensors import Layout
    >>> layouts = {name: Layout(x.dtype, x.shape) for name, x in factors.items()}
    >>> path = folder / "adapter_model.safetensors"
    >>> safetensors.write(path, layouts, factors.values())
    >>> weight = np.eye(2, dtype=np.float32)
    >>> layouts = {"q.weight": Layout(weight.dtype, weight.shape)}
    >>> base = Checkpoint(layouts, lambda name: weight)
    >>> with_lora(base, folder).read("q.weight").tolist()
    [[3.0, 2.0], [2.0, 3.0]]
    """
    folder = Path(adapter_folder)
    settings = read_settings(folder / "adapter_config.json", KNOWN)
    adapter = _sorted(folder, _open(folder))
    edits: dict[str, list[Edit]] = {}
    # the base that an adapter brings along comes before what is added to it
    for name, source in adapter.values.items():
        target = _target(base, adapter, name)
        _fits(adapter, source, adapter.file.layouts[source].shape, base, target)
        edits.setdefault(target, []).append(_replace(adapter.file, source))
    pairs = {m: _pair(adapter, m, rank_of(settings, m)) for m in adapter.modules}
    flipped = _flipped(settings, base, adapter, pairs)
    for module, (pair, size) in pairs.items():
        scale, parts = scale_of(settings, module), adapter.modules[module]
        target = _target(base, adapter, f"{module}.weight")
        embedding = "lora_embedding_A" in parts
        square = size[0] == size[1]
        shape = base.layouts[target].shape
        flip = embedding or (flipped if square else shape == size[::-1])
        _fits(adapter, pair[1], size[::-1] if flip else size, base, target)
        magnitude = parts.get("lora_magnitude_vector")
        if bool(settings.get("use_dora")) != bool(magnitude):
            raise ValueError(
                f"{folder} says use_dora = {settings.get('use_dora', False)} and has "
                f"{'a' if magnitude else 'no'} lora_magnitude_vector for {module}"
            )
        edits.setdefault(target, []).append(
            _stretched(adapter.file, pair, scale, flip, magnitude)
            if magnitude
            else _added(adapter.file, pair, scale, flip, round_first=embedding)
        )
        if "lora_B.bias" in parts:
            bias = _target(base, adapter, f"{module}.bias")
            _fits(adapter, parts["lora_B.bias"], (size[0],), base, bias)
            shift = _shifted(adapter.file, parts["lora_B.bias"], scale)
            edits.setdefault(bias, []).append(shift)

    def read(name: str) -> np.ndarray:
        array = base.read(name)
        for edit in edits.get(name, ()):
            array = edit(array)
            array.flags.writeable = False
        return array

    return Checkpoint(dict(base.layouts), read)


def _open(folder: Path) -> Checkpoint:
    for name, reader in (
        ("adapter_model.safetensors", safetensors.open_file),
        ("adapter_model.bin", pickled.open_file),
    ):
        if (folder / name).exists():
            return reader(folder / name)
    raise FileNotFoundError(
        f"{folder} holds no adapter_model.safetensors and no adapter_model.bin"
    )


def _sorted(folder: Path, file: Checkpoint) -> _Adapter:
    modules: dict[str, dict[str, str]] = {}
    values: dict[str, str] = {}
    for name in file.layouts:
        own = name.removeprefix(FOREWORD)
        factor = _FACTOR.fullmatch(own)
        if file.layouts[name].dtype not in FLOATS:
            dtype = file.layouts[name].dtype.name
            raise ValueError(f"{folder} has {name} in {dtype}; a float is expected")
        if factor:
            kind = factor["kind"] + (".bias" if factor["leaf"] == "bias" else "")
            modules.setdefault(factor["module"], {})[kind] = name
        elif own == name or "lora_" in own or "token_adapter" in own:
            raise ValueError(
                f"{folder} has a tensor {name}, which is neither a factor of LoRA nor "
                f"a tensor of the model, {FOREWORD}..."
            )
        else:
            # PEFT wraps a layer that it adapts, and one that it trains as a whole
            own = own.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            values[own] = name
    if not modules and not values:
        raise ValueError(f"{folder} has an adapter without tensors; save it again")
    return _Adapter(folder, file, modules, values)


def _pair(
    adapter: _Adapter, module: str, rank: int
) -> tuple[tuple[str, str], tuple[int, int]]:
    """The names of A `[R, I]` and B `[O, R]`, and (O, I)."""
    parts, folder = adapter.modules[module], adapter.folder
    for first, second in _PAIRS.items():
        if first in parts and second in parts:
            pair = parts[first], parts[second]
            a, b = (adapter.file.layouts[name].shape for name in pair)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                raise ValueError(
                    f"{folder} has factors of {module} of shapes {list(a)} and "
                    f"{list(b)}; [R, I] and [O, R] are expected"
                )
            if a[0] != rank:
                raise ValueError(
                    f"{folder} has rank {a[0]} for {module}; adapter_config.json says "
                    f"{rank}"
                )
            return pair, (b[0], a[1])
    raise ValueError(f"{folder} has of {module} only {', '.join(sorted(parts))}")


def _target(base: Checkpoint, adapter: _Adapter, name: str) -> str:
    """The tensor of the base that PEFT calls by a name.

    A checkpoint may have been saved without its head's first word (gpt2: `h.0...` for
    `transformer.h.0...`), or an adapter trained on the model without its head.
    """
    if name in base.layouts:
        return name
    first, _, rest = name.partition(".")
    if rest and rest in base.layouts:
        return rest
    stems = sorted({known.partition(".")[0] for known in base.layouts})
    longer = [f"{s}.{name}" for s in stems if f"{s}.{name}" in base.layouts]
    if len(longer) == 1:
        return longer[0]
    if first in ("lm_head", "embed_out"):
        raise ValueError(
            f"{adapter.folder} adapts {name}, which the base has not: its head is tied "
            "to the embedding, and would no longer be; save the base with a head of "
            "its own (tie_word_embeddings: false) first"
        )
    closest = str(missing(name, base.layouts)).partition("; ")[2]
    raise ValueError(
        f"{adapter.folder} adapts {name}, which the base has not; {closest}"
    )


def _fits(
    adapter: _Adapter, name: str, shape: tuple[int, ...], base: Checkpoint, target: str
) -> None:
    have = base.layouts[target]
    if have.shape != shape:
        raise ValueError(
            f"{adapter.folder} has {name} for a tensor of shape {list(shape)}, and "
            f"{target} of the base has {list(have.shape)}: it belongs to another base"
        )
    if have.dtype not in FLOATS:
        raise ValueError(
            f"{target} of the base is {have.dtype.name}: an adapter is added to full "
            "weights; name the base that is not quantised"
        )


def _flipped(
    settings: dict[str, Any],
    base: Checkpoint,
    adapter: _Adapter,
    pairs: dict[str, tuple[tuple[str, str], tuple[int, int]]],
) -> bool:
    """Whether square weights are `[I, O]`, as those of gpt2's Conv1D are.

    PEFT asks the class of the module, whatever the setting. Where a weight is not
    square its shape shows it, and the others are taken to be like these.
    """
    seen = set()
    for module, (_, size) in pairs.items():
        if "lora_A" in adapter.modules[module] and size[0] != size[1]:
            target = _target(base, adapter, f"{module}.weight")
            seen.add(base.layouts[target].shape == size[::-1])
    return any(seen) if seen else bool(settings.get("fan_in_fan_out"))


def _wide(array: np.ndarray) -> np.ndarray:
    """In float32 at least."""
    return array.astype(np.promote_types(array.dtype, np.float32))


def _product(
    file: Checkpoint, pair: tuple[str, str], scale: float, flip: bool
) -> np.ndarray:
    """s B A `[O, I]`, or its transpose."""
    a, b = (_wide(file.read(name)) for name in pair)
    product = a.T @ b.T if flip else b @ a
    product *= product.dtype.type(scale)
    return product


def _replace(file: Checkpoint, name: str) -> Edit:
    return lambda weight: file.read(name).astype(weight.dtype, copy=False)


def _added(
    file: Checkpoint,
    pair: tuple[str, str],
    scale: float,
    flip: bool,
    round_first: bool,
) -> Edit:
    """W + s B A; PEFT rounds what it adds to an embedding beforehand."""

    def edit(weight: np.ndarray) -> np.ndarray:
        product = _product(file, pair, scale, flip)
        if round_first:
            product = _wide(product.astype(weight.dtype))
        return _sum(weight, product).astype(weight.dtype, copy=False)

    return edit


def _stretched(
    file: Checkpoint, pair: tuple[str, str], scale: float, flip: bool, magnitude: str
) -> Edit:
    """DoRA: m (W + s B A) / ||W + s B A||, the norm over the inputs of each output."""

    def edit(weight: np.ndarray) -> np.ndarray:
        total = _sum(weight, _product(file, pair, scale, flip))
        axis = 0 if flip else 1
        norm = np.linalg.norm(total, axis=axis)
        factor = _wide(file.read(magnitude)).reshape(-1) / norm
        total *= np.expand_dims(factor, axis).astype(total.dtype)
        return total.astype(weight.dtype, copy=False)

    return edit


def _shifted(file: Checkpoint, name: str, scale: float) -> Edit:
    def edit(bias: np.ndarray) -> np.ndarray:
        return _sum(bias, _wide(file.read(name)) * scale).astype(bias.dtype, copy=False)

    return edit


def _sum(weight: np.ndarray, product: np.ndarray) -> np.ndarray:
    """W + what is added, in the wider type, into the latter's memory where it can."""
    if np.promote_types(weight.dtype, product.dtype) != product.dtype:
        return weight + product
    return np.add(product, weight, out=product)
