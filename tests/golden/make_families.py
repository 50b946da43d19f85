"""Writes the logits of torch transformers for every small model of `families.CASES`.

Run from the root of the repository where torch is installed:

    PYTHONPATH=.:tests python tests/golden/make_families.py

Only tokens, lengths and logits are stored: configurations and weights are drawn again
from their names. One file, `tests/golden/families.npz`, below 1 MB.
"""

import json
import pathlib
import tempfile

import families
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from collab_jax.models.config import from_hf


def logits(raw, tokens, length):
    """Logits of every row at its first, middle and last token, `[B, 3, V]`."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "config.json").write_text(json.dumps(raw))
        tensors = families.tensors(from_hf(raw))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
        ).eval()
    with torch.no_grad():
        rows = [
            model(torch.tensor(row[None, :size], dtype=torch.long), use_cache=False)
            .logits[0, [0, size // 2, size - 1]]
            .numpy()
            for row, size in zip(tokens, length, strict=True)
        ]
    return np.stack(rows)


def main():
    """Draws every case and writes the file."""
    stored = {}
    for name, raw in families.CASES.items():
        tokens, length = families.batch(from_hf(raw))
        stored |= {"tokens": tokens, "length": length}
        stored[name] = logits(raw, tokens, length)
        print(name, stored[name].std())
    target = pathlib.Path(__file__).with_name("families.npz")
    np.savez_compressed(target, **stored)
    print(target, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
