"""The weights of a model's folder, whatever format they are in."""

from pathlib import Path

from collab_jax.io import pickled, safetensors
from collab_jax.io.layout import Checkpoint


def open_weights(folder: str | Path) -> Checkpoint:
    """The tensors of a folder: safetensors where they are there, else torch's .bin.

    Args:
      folder: in the layout of Hugging Face.

    Raises:
      FileNotFoundError: where there is no such folder, or it holds no weights.
      ValueError: for a folder that holds another format, and for a damaged file.

    >>> import tempfile
    >>> import numpy as np
    >>> folder = Path(tempfile.mkdtemp())
    >>> x = safetensors.Layout(np.dtype(np.int8), (2,))
    >>> safetensors.write(folder / "model.safetensors", {"x": x}, [np.int8([1, 2])])
    >>> open_weights(folder).read("x").tolist()
    [1, 2]
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist, or is no folder")
    for stem, reader in (
        ("model.safetensors", safetensors.open_folder),
        ("pytorch_model.bin", pickled.open_folder),
    ):
        if (folder / stem).exists() or (folder / f"{stem}.index.json").exists():
            return reader(folder)
    held = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in held:
        raise ValueError(
            f"{folder} holds a LoRA adapter and no model: name it with its base, as "
            "base+adapter"
        )
    if formats := [name for name in held if name.endswith(".gguf")]:
        raise ValueError(
            f"{folder} holds {formats[0]}: GGUF is mostly quantised, and a merge "
            "needs full weights; name the original model, or convert the file to "
            "safetensors first"
        )
    what = f"it holds {', '.join(held[:6])}" if held else "it is empty"
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin, nor an index "
        f"of shards; {what}{', ...' if len(held) > 6 else ''}"
    )
