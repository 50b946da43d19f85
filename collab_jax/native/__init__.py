"""Products with weight matrices on a CPU, in C++ through XLA's foreign functions."""

from collab_jax.native.build import library, status
from collab_jax.native.products import LANES, available, products
