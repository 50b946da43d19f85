"""Writes marian.npz: what torch transformers makes of the models of tests/marians.py.

From the root of the checkout: PYTHONPATH=.:tests python tests/golden/make_marian.py
"""

from pathlib import Path

import marians
import numpy as np
from parity.test_marian import logits, reference, search


def outputs(name):
    """Logits `[3, 8, V]`, and what greedy and beam search write."""
    made = marians.config(name)
    model = reference(made, marians.CASES[name])
    beams, scores = search(model, made, marians.BEAMS)
    found = {
        "logits": logits(model, made),
        "greedy": search(model, made, 1)[0],
        "beams": beams,
        "scores": scores,
    }
    return {f"{name} {key}": value for key, value in found.items()}


if __name__ == "__main__":
    stored = {}
    for name in marians.CASES:
        stored |= outputs(name)
    np.savez_compressed(Path(__file__).with_name("marian.npz"), **stored)
