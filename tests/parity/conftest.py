"""Torch on one thread: its threads wait by spinning, beside those of XLA."""

import importlib.util

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)
