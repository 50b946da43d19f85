"""Writes pickled_*.bin: files of torch.save, for tests that run without torch.

From the root of the checkout: python tests/golden/make_pickled.py
"""

from pathlib import Path

import torch

HERE = Path(__file__).parent


def tensors():
    """Types, views and shared storages; the test knows the numbers."""
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "whole": whole,
        "transposed": whole.T,
        "part": whole[1:3, ::2],
        "tail": whole[3],
        "spread": torch.tensor([7.0]).expand(3, 2),
        "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([[1.0, -0.5], [3.0, 256.0]], dtype=torch.bfloat16),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "long": torch.tensor([-1, 2**40]),
        "byte": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 5),
    }


if __name__ == "__main__":
    made = tensors()
    torch.save(made, HERE / "pickled_zip.bin")
    torch.save(made, HERE / "pickled_old.bin", _use_new_zipfile_serialization=False)
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).reshape(2, 3))
        layer.bias.copy_(torch.tensor([8.0, 9.0]))
    run = {"epoch": 3, "state_dict": layer.state_dict(), "rate": 0.1}
    torch.save(run, HERE / "pickled_run.bin")
    # float8 and uint16 have no typed storage: torch names their type beside it
    small = {
        "eight": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
        "word": torch.tensor([1, 65535], dtype=torch.uint16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(small, HERE / "pickled_named.bin")
