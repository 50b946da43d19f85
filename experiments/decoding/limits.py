"""What the machine can do at most: bytes read and products computed in a second."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np


def bandwidth(threads: int, size: int = 1 << 29) -> float:
    """Bytes that threads read in a second, together, from memory.

    Each reads in two places at once, which gives more than one.
    """
    halves = np.ones((threads, 2, size // (16 * threads)), np.uint64)
    block = 1 << 15

    def read(pair):
        near = np.empty(block, np.uint64)  # stays in the cache
        for at in range(0, pair.shape[1] - block + 1, block):
            np.bitwise_or(pair[0, at : at + block], pair[1, at : at + block], out=near)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, halves))
        best = float("inf")
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(read, halves))
            best = min(best, time.perf_counter() - begin)
    return halves.nbytes / best


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
