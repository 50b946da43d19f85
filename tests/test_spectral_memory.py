"""The memory of spectral merges, read off the programs that drivers run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import for_users

from collab_jax.merge import spectral
from collab_jax.merge.polar import product
from collab_jax.merge.program import Leaf, programs
from collab_jax.merge.stack import lift, total

METHODS = {
    "tsv_m": spectral.tsv_m(),
    "iso_c": spectral.iso_c(),
    "iso_cts": spectral.iso_cts(),
    "wudi": spectral.wudi(0.1),
}
SHAPES = {"square": (384, 384), "wide": (192, 512), "tall": (512, 192)}


def tensors(part, shape, count):
    """Bytes of a program's inputs, result and temporaries, in tensors of the leaf."""
    leaf, number = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, ()))
    run = programs(part).merge
    lowered = jax.jit(
        lambda *rest: run(Leaf("a", *rest), (), np.dtype("float32"))
    ).lower(leaf, (leaf,) * count, (number,) * count, jax.random.key(0))
    found = for_users(lowered).memory_analysis()
    every = (
        found.temp_size_in_bytes,
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
    )
    return sum(every) / (4 * np.prod(shape))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", SHAPES)
def test_at_most_twice_the_experts_and_six(method, form):
    for count in (2, 3):
        found = tensors(METHODS[method], SHAPES[form], count)
        assert count + 2 <= found <= 2 * count + 6, (count, found)


def test_all_experts_at_once_need_more():
    """The control: a program that is not told the order of its work."""

    def make(taus):
        grams, whole = [product(tau.T, tau) for tau in taus], total(taus)
        pairs = zip(taus, grams, strict=True)
        right = total(product(tau - whole, gram) for tau, gram in pairs)
        s, q = jnp.linalg.eigh(total(grams))
        return whole + product(product(right, q) / s, q.T)

    part = lift(spectral.on_matrices(make))
    assert tensors(part, SHAPES["square"], 3) > 12
