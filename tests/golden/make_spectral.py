"""Writes spectral.npz: what fusion_bench 0.2.33 makes of three small experts.

From the root of the checkout, with torch, and the wheel's files unpacked in FOLDER
(pip download --no-deps fusion_bench==0.2.33; unzip):
python tests/golden/make_spectral.py FOLDER
"""

import contextlib
import importlib.util
import io
import sys
import types
from pathlib import Path

import numpy as np
import torch

SHAPES = {"wide": (12, 20), "long": (20, 9), "bias": (7,)}
EXPERTS = 3


def deltas():
    """Three deltas with decaying spectra, which share a direction; a few are zero."""
    rng = np.random.default_rng(11)
    shared = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    found = []
    for n in range(EXPERTS):
        vector = {}
        for name, shape in SHAPES.items():
            x = rng.standard_normal(shape)
            if x.ndim == 2:
                u, s, vt = np.linalg.svd(x, full_matrices=False)
                x = (u * s * np.geomspace(1, 0.05, len(s))) @ vt
            x = 0.002 * (n + 1) * (x + 0.2 * shared[name])
            x.reshape(-1)[n::9] = 0
            vector[name] = x
        found.append(vector)
    found[0]["bias"][:3] = [0.25, -0.5, 0.0]  # exact, so that sums cancel
    found[1]["bias"][:3] = [-0.25, 0.25, 0.0]
    found[2]["bias"][:3] = [0.0, 0.25, 0.0]
    return found


class Anything(types.ModuleType):
    """A package of which nothing is needed but names."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        known = {
            "timeit_context": lambda *rest: contextlib.nullcontext(),
            "auto_register_config": lambda kind: kind,
            "state_dict_sum": summed,
        }
        generic = {"__class_getitem__": lambda cls, item: cls}
        return known.get(name, type(name, (), generic))


def summed(vectors):
    """The sum of task vectors."""
    return {name: sum(vector[name] for vector in vectors) for name in vectors[0]}


def silent(rows, **rest):
    """A progress bar that shows nothing."""
    return rows


silent.write = print


def source(folder, path):
    """A file of fusion_bench, without the packages that it asks for."""

    class Finder:
        """Finds them all."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            """Any module of fusion_bench, empty."""
            if name.split(".")[0] == "fusion_bench":
                return importlib.util.spec_from_loader(name, Finder, is_package=True)

        @staticmethod
        def create_module(spec):
            """Its stand-in."""
            return Anything(spec.name)

        @staticmethod
        def exec_module(module):
            """Nothing."""

    sys.meta_path.insert(0, Finder)
    spec = importlib.util.spec_from_file_location(
        path.replace("/", "_"), Path(folder) / "fusion_bench/method" / path
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.meta_path.remove(Finder)
    return module


def main(folder):
    """Runs them all."""
    vectors = [{k: torch.tensor(v) for k, v in d.items()} for d in deltas()]
    out = {f"delta/{n}/{k}": v.numpy() for n, d in enumerate(vectors)
           for k, v in d.items()}  # fmt: skip
    iso = source(folder, "isotropic_merging/iso_utils.py")
    tsv = source(folder, "task_singular_vector/utils/TSVM_utils.py")
    wudi = source(folder, "wudi/wudi.py")
    wudi.tqdm = silent
    merged = {
        "iso_c": iso.iso_c(vectors, "cpu"),
        "iso_cts": iso.iso_cts(vectors, 0.8, "cpu"),
        "iso_cts_half": iso.iso_cts(vectors, 0.5, "cpu"),
        "tsv_m": tsv.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu"),
        "wudi": wudi.wudi_merging(vectors, "cpu", 300),
    }
    for method, vector in merged.items():
        for k, v in vector.items():
            out[f"{method}/{k}"] = v.detach().numpy()
    emr = source(folder, "emr_merging/utils.py")
    unified, masks, scales = emr.emr_merge(vectors)
    for k in unified:
        out[f"emr/{k}"] = unified[k].numpy()
        out[f"emr_mask/{k}"] = torch.stack(masks[k]).numpy()
    out["emr_scales"] = scales.numpy()
    tall = source(folder, "tall_mask/utils.py")
    flat = torch.stack([torch.cat([v.reshape(-1) for v in d.values()])
                        for d in vectors])  # fmt: skip
    zero = torch.zeros_like(flat[0])
    out["tall"] = tall.generate_task_masks(
        flat, flat, zero, 0.3 * flat.sum(0), 0.4
    ).numpy()
    np.savez_compressed(Path(__file__).parent / "spectral.npz", **out)


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        main(sys.argv[1])
