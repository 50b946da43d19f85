"""Programs for accelerators are made on any machine: nothing in them is for CPUs alone.

What is lowered here was not run on a TPU or a GPU.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import model

from collab_jax import combine, decode, native, pool
from collab_jax.cooperate.efficient import exact, ngram
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.lm import language_model, piece, read_prompt
from collab_jax.models import attention, linear
from collab_jax.models.packed import pack
from collab_jax.models.product import multiplied
from collab_jax.models.transformer import transformer

CONFIG, PARAMS = model()
LM = language_model(transformer(CONFIG))
PAIR = combine.product([LM, LM], pool.mixture(0.5, 0.5))
PROGRAMS = {
    "greedy": (decode.greedy(LM, 8), PARAMS),
    "packed": (decode.greedy(LM, 8), pack(PARAMS, "int8")),
    "drafted ensemble": (
        speculate(on_lm(PAIR), ngram.ngram(3), 8, verifier=exact.greedy()),
        ((PARAMS, PARAMS), ()),
    ),
}


def lowered(name, platform):
    """A whole program, prompt and loop, for a platform that need not be here."""
    decoder, params = PROGRAMS[name]
    prompt, length = decode.pad([[1, 2, 3], [4, 5]])

    def run(params, prompt, length, key):
        state = decoder.init(params, prompt, length, key)
        return jax.lax.while_loop(
            lambda state: ~state.done.all(),
            lambda state: decoder.step(params, state),
            state,
        )

    traced = jax.jit(run).trace(params, prompt, length, jax.random.key(0))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_call_leaves_the_compiler(name, platform):
    text = lowered(name, platform)
    assert "stablehlo.while" in text
    assert "custom_call" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("tokens", [1, 64])
def test_a_buffer_of_two_blocks_is_read_without_a_loop(platform, blocks, tokens):
    """A turn of a loop costs a GPU a message to the host."""

    def step(params, tokens):
        state = LM.init(params, 1, blocks * attention.block_of(tokens.shape[1]))
        return LM.extend(params, state, tokens)[0].logits

    traced = jax.jit(step).trace(PARAMS, jnp.ones((1, tokens), jnp.int32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == (blocks > 2)


def test_on_a_cpu_packed_matrices_do():
    """The control."""
    found = "@collab_jax_attend_" in lowered("packed", "cpu")
    assert found == native.available()


ROWS = {
    "array": linear.project,
    "head": lambda x, kernel: linear.attend(x, kernel.T),
    "int8": lambda x, kernel: kernel.project(x),
}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize(("platform", "rows"), [("cuda", 2), ("tpu", 1), ("cpu", 1)])
def test_a_gpu_reads_one_row_as_two(form, platform, rows, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    x, kernel = jnp.arange(8.0).reshape(1, 1, 8), jnp.ones((8, 4))
    if form == "int8":
        kernel = pack({"kernel": kernel}, "int8")["kernel"]
    traced = jax.jit(ROWS[form]).trace(x, kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    (dot,) = re.findall(r"dot_general.*: \(tensor<([\dx]+)f32>", text)
    assert math.prod(map(int, dot.strip("x").split("x"))) == 8 * rows


def test_a_row_read_as_two_is_the_same(monkeypatch):
    """What a GPU is asked for, computed here."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *x, cuda, rocm, default: cuda(*x)
    )
    x = jax.random.normal(jax.random.key(0), (1, 1, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 4))
    both = multiplied(jnp.dot, x, kernel), jnp.dot(x, kernel)
    assert both[0].shape == both[1].shape
    np.testing.assert_allclose(*both, rtol=1e-6)


@pytest.mark.parametrize(("backend", "read"), [("cpu", 128), ("gpu", 512)])
def test_an_accelerator_reads_a_prompt_in_larger_pieces(backend, read, monkeypatch):
    """At 128 tokens a call, reading the weights is what it would wait for."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    widths = set()

    def extend(params, state, tokens):
        widths.add(tokens.shape)
        return LM.extend(params, state, tokens)

    watched = LM._replace(extend=extend)
    prompt, length = jnp.ones((2, 1025), jnp.int32), jnp.array([1025, 7])
    jax.eval_shape(lambda: read_prompt(watched, PARAMS, prompt, length, 8).length)
    assert widths == {(2, read // (2 if backend == "gpu" else 1))}
    sizes = [piece(None, rows) for rows in (1, 2, 3, 4, 5, 64)]
    assert sizes == ([128] * 6 if backend == "cpu" else [512, 256, 128, 128, 128, 128])
