"""What the machine can do at most: bytes read and products computed in a second."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np


def bandwidth(threads: int, size: int = 1 << 29) -> float:
    """Bytes that threads read in a second, together, from memory."""
    parts = np.array_split(np.ones(size // 8, np.uint64), threads)

    def read(part):
        return np.bitwise_or.reduce(part)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, parts))
        best = float("inf")
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(read, parts))
            best = min(best, time.perf_counter() - begin)
    return size / best


def products(size: int = 2048) -> float:
    """Floating-point operations in a second, of a float32 product of two squares."""
    x = jnp.ones((size, size))
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
