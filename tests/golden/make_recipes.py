"""Writes recipes.npz: what fusion_bench 0.2.33 makes of small models.

From the root of the checkout, with the wheel unpacked in FOLDER (it is not installed:
its functions need torch alone, its package needs much more, which is replaced by empty
shells): python tests/golden/make_recipes.py FOLDER

Settings are those of the papers: TIES with `merge_func="mean"`, equal weights, and no
zero sums, so that its rule for them does not matter. Its trim keeps one entry more than
`int(K * d)`, so K is one entry less than the density. Model Stock averages angles.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
SHAPES = {"layers.0.w": (12, 8), "layers.1.w": (8, 5), "norm": (7,)}
COUNT, DENSITY = 3, 0.2


class Shell(types.ModuleType):
    """A module in which every name is a class that does nothing."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        new = lambda cls, *args, **options: args[0] if args else object()  # noqa: E731
        shell = type(name, (), {"__new__": new, "_config_mapping": {}})
        setattr(self, name, shell)
        return shell


class Shells(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fusion_bench", "omegaconf"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Shell(spec.name)

    def exec_module(self, module):
        pass


def load(folder, path):
    """One file of the package."""
    source = Path(folder) / "fusion_bench" / path
    spec = importlib.util.spec_from_file_location(source.stem, source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Model(torch.nn.Module):
    """Parameters by name; the names of the shapes have dots."""

    def __init__(self, arrays):
        super().__init__()
        for name, array in arrays.items():
            parameter = torch.nn.Parameter(torch.tensor(array))
            self.register_parameter(name.replace(".", "_"), parameter)


def main(folder):
    sys.meta_path.insert(0, Shells())
    ties = load(folder, "method/ties_merging/ties_merging_utils.py")
    magmax = load(folder, "method/magmax/magmax.py")
    stock = load(folder, "method/model_stock/model_stock.py")
    expo = load(folder, "method/linear/expo.py")

    rng = np.random.default_rng(0)
    base = {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
    experts = []
    for n in range(COUNT):
        common = np.random.default_rng(1)  # so that the angles are below 90 degrees
        experts.append(
            {
                k: base[k]
                + np.float32(0.1)
                * (
                    common.standard_normal(s) + (n + 1) * 0.5 * rng.standard_normal(s)
                ).astype(np.float32)
                for k, s in SHAPES.items()
            }
        )
    found = {"base": base} | {f"expert{n}": e for n, e in enumerate(experts)}

    start = {k: torch.tensor(v) for k, v in base.items()}
    states = [{k: torch.tensor(v) for k, v in e.items()} for e in experts]
    taus = [{k: state[k] - start[k] for k in start} for state in states]
    flat = torch.stack([ties.state_dict_to_vector(tau) for tau in taus])

    def plus(vector):
        like = {k: v.clone() for k, v in start.items()}
        delta = ties.vector_to_state_dict(vector, like)
        return {k: (start[k] + delta[k]).numpy() for k in start}

    found["task_arithmetic"] = plus(0.3 * flat.sum(0))
    size = flat.shape[1]
    share = (int(DENSITY * size) - 1 + 0.5) / size
    found["ties"] = plus(ties.ties_merging(flat, share, "mean"))
    merged = magmax.magmax_merge(Model(base), [Model(e) for e in experts], 0.5, False)
    found["magmax"] = named(merged)
    found["expo"] = named(expo.expo_merge(Model(base), Model(experts[0]), 0.3, False))
    pairs = [
        stock.compute_angle(states[i], states[j], start)
        for i in range(COUNT)
        for j in range(i + 1, COUNT)
    ]
    angle = {k: sum(pair[k] for pair in pairs) / len(pairs) for k in start}
    ratio = stock.compute_ratio(angle, k=COUNT)
    mean = {k: sum(state[k] for state in states) / COUNT for k in start}
    found["model_stock"] = {
        k: (mean[k] * ratio[k] + start[k] * (1 - ratio[k])).numpy() for k in start
    }
    ratio = stock.compute_ratio(stock.compute_angle(*states[:2], start))
    two = stock.merge_weights(*states[:2], start, ratio)
    found["model_stock_of_two"] = {k: v.numpy() for k, v in two.items()}
    flattened = {
        f"{m}/{k}": v for m, leaves in found.items() for k, v in leaves.items()
    }
    np.savez_compressed(HERE / "recipes.npz", **flattened)


def named(model):
    names = {k.replace(".", "_"): k for k in SHAPES}
    return {names[k]: v.detach().numpy() for k, v in model.named_parameters()}


if __name__ == "__main__":
    main(sys.argv[1])
