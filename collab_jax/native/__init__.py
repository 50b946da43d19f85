"""Products with weight matrices and attention on a CPU, in C++ through XLA."""

from collab_jax.native.attention import LARGEST, attend
from collab_jax.native.build import library, status
from collab_jax.native.products import LANES, available, products
