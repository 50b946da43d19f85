"""Makes `mergekit.npz`: what mergekit 0.1.5 merges of small arrays drawn from seeds.

Run: `python tests/golden/make_mergekit.py`, with mergekit and torch installed.
"""

import pathlib

import numpy as np

SHAPES = (7,), (12, 10)
DRAWN = ("dare_linear", "dare_ties", "della", "della_linear")
# method -> how many deltas, knobs (a list: one for each)
CASES = {
    "linear": (3, {"weight": [0.7, 0.2, 0.4]}),
    "slerp": (2, {"t": 0.3}),
    "nuslerp": (2, {"weight": [0.7, 0.2]}),
    "multislerp": (3, {"weight": [0.7, 0.2, 0.4]}),
    "karcher": (3, {}),
    "task_arithmetic": (3, {"weight": [0.7, 0.2, 0.4], "lambda": 0.6}),
    "ties": (3, {"weight": [0.7, 0.2, 0.4], "density": [0.5, 0.3, 1.0]}),
    "breadcrumbs": (2, {"weight": [0.7, 0.2], "density": 0.6, "gamma": 0.1}),
    "breadcrumbs_ties": (2, {"weight": [0.7, 0.2], "density": 0.6, "gamma": 0.01}),
    "dare_linear": (2, {"weight": [0.7, 0.2], "density": 1.0}),
    "dare_ties": (2, {"weight": [0.7, 0.2], "density": 1.0}),
    "della": (2, {"weight": [0.7, 0.2], "density": 1.0}),
    "della_linear": (2, {"weight": [0.7, 0.2], "density": 1.0}),
    "sce": (3, {"select_topk": 0.4}),
    "ram": (3, {"epsilon": 0.2}),
    "ramplus_tl": (3, {"epsilon": 0.2, "r": 0.5, "alpha": 0.9}),
    "model_stock": (3, {}),
    "nearswap": (2, {"t": 0.05}),
    "arcee_fusion": (2, {}),
    "passthrough": (1, {"scale": [0.3]}),
}


def draw(shape, count, seed=0):
    """A base and models near it, float32."""
    rng = np.random.default_rng([seed, *shape, count])
    base, common = rng.standard_normal((2, *shape))
    own = rng.standard_normal((count, *shape))
    models = [base + 0.2 * (n + 1) * (common + x) for n, x in enumerate(own)]
    return base.astype(np.float32), [model.astype(np.float32) for model in models]


def main() -> None:
    """Writes the file beside this one."""
    import torch
    from mergekit.merge_methods.api import merge_tensors

    from collab_jax.merge.mergekit import METHODS
    from collab_jax.merge.mergekit_table import TABLE

    found = {}
    for name, (count, knobs) in CASES.items():
        for shape in SHAPES:
            base, models = draw(shape, count)
            tensors, index = [torch.tensor(x) for x in models], None
            if METHODS[name].base == "delta" and TABLE[name].base == "required":
                tensors, index = [torch.tensor(base), *tensors], 0
            elif TABLE[name].base == "required":
                index = 0
            first = len(tensors) - count
            parameters = {
                k: dict(enumerate(v, first)) if isinstance(v, list) else v
                for k, v in knobs.items()
            }
            merged = merge_tensors(
                tensors, name, parameters=parameters, base_index=index
            )
            key = f"{name} {'x'.join(map(str, shape))}"
            found[key] = merged.to(torch.float32).numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("mergekit.npz"), **found)


if __name__ == "__main__":
    main()
