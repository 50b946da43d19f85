"""DeePEn: its naive twin, blocks against the whole, what the program holds, laws."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vocabularies as voc

from collab_jax.ensemble.vocabulary.relative import (
    Relative,
    common_tokens,
    deepen,
    deepen_lm,
    matrix,
    relative,
    represent,
)
from collab_jax.testing import check_lm

WEIGHTS, SCALE = (0.4, 0.6), 3.0
PARAMS = voc.tables(7)  # the members often disagree
PIVOT, MEMBER = len(voc.WORDS[0]), len(voc.WORDS[1])
BRIDGES = [voc.bridge(voc.WORDS[0], words) for words in voc.WORDS]
ANCHORS = common_tokens(BRIDGES)
TEXT = [voc.WORDS[0].index(w) for w in ("ab", "c", "a", "b", "ab")]
RNG = np.random.default_rng(0)
EMBEDDINGS = [RNG.normal(size=(len(words), 5)) for words in voc.WORDS]
SPACES = [
    relative(e, a, SCALE) for e, a in zip(EMBEDDINGS, ANCHORS.T, strict=True)
]  # fmt: skip


def naive_matrix(embedding, anchors, scale=SCALE, raw=False):
    rows = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    found = []
    for row in rows:
        near = np.array([row @ rows[a] for a in anchors])
        if not raw:
            near = near / np.linalg.norm(near)
        found.append(voc.softmax(scale * near))
    return np.array(found)


def naive(rows, steps=5, rate=1.0, raw_slope=False, **more):
    """Float64, one place after the other."""
    pairs = zip(EMBEDDINGS, ANCHORS.T, strict=True)
    maps = [naive_matrix(e, a, **more) for e, a in pairs]
    result = []
    for row in rows:
        laws = [voc.softmax(z) for z in row]
        wanted = sum(w * (p @ r) for w, p, r in zip(WEIGHTS, laws, maps, strict=True))
        z = np.log(laws[0])
        for _ in range(steps):
            now = voc.softmax(z) @ maps[0]
            gain = np.array([(m * wanted / now).sum() for m in maps[0]])
            z = z + (rate * gain if raw_slope else rate * np.log(gain))
        result.append(voc.softmax(z))
    return np.array(result)


def model(spaces=SPACES, lms=voc.LMS, **more):
    return deepen_lm(lms, BRIDGES, spaces, *WEIGHTS, ratio=3.0, **more)


@functools.cache
def readings():
    return voc.readings(TEXT, every=voc.WORDS[0], params=PARAMS)


def test_the_law_is_the_naive_one():
    found = voc.laws(model(), PARAMS, TEXT)
    np.testing.assert_allclose(found, naive(readings()), atol=2e-6)
    for mistake in (
        {"raw": True}, {"steps": 4}, {"rate": 0.5}, {"scale": 30.0}, {"raw_slope": True}
    ):  # fmt: skip
        assert abs(found - naive(readings(), **mistake)).max() > 1e-3, mistake


def test_the_law_of_transformers_is_the_naive_one():
    lms, params = zip(*voc.SMALL, strict=True)
    found = voc.laws(model(lms=lms), params, TEXT[:4])
    rows = voc.model_readings(TEXT[:4], every=voc.WORDS[0])
    np.testing.assert_allclose(found, naive(rows), atol=1e-5)


def adam(rows, steps, rate, decay):
    """Float64: the slope of KL(r || p R) / A in the logits, and AdamW by hand."""
    pairs = zip(EMBEDDINGS, ANCHORS.T, strict=True)
    maps = [naive_matrix(e, a) for e, a in pairs]
    result = []
    for row in rows:
        laws = [voc.softmax(z) for z in row]
        wanted = sum(w * (p @ r) for w, p, r in zip(WEIGHTS, laws, maps, strict=True))
        z, mean, square = np.log(laws[0]), np.zeros(PIVOT), np.zeros(PIVOT)
        for t in range(1, steps + 1):
            p = voc.softmax(z)
            inner = -(maps[0] @ (wanted / (p @ maps[0]))) / len(wanted)
            slope = p * (inner - (p * inner).sum())
            mean = 0.9 * mean + 0.1 * slope
            square = 0.999 * square + 0.001 * slope**2
            move = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
            z = z - rate(t - 1) * (move + decay * z)
        result.append(voc.softmax(z))
    return np.array(result)


def test_the_steps_of_the_authors_code():
    schedule = optax.cosine_decay_schedule(0.3, 5, 0.25)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    found = voc.laws(model(optimizer=optimizer), PARAMS, TEXT)
    expected = adam(readings(), 5, lambda t: float(schedule(t)), 0.01)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    assert abs(found - adam(readings(), 5, lambda t: 0.3, 0.01)).max() > 1e-3
    blocked = voc.laws(model(optimizer=optimizer, block=2), PARAMS, TEXT)
    np.testing.assert_allclose(blocked, found, atol=1e-6)
    first = jnp.array([0.0, -jnp.inf, 1.0, 2.0])
    law = deepen(SPACES, *WEIGHTS, optimizer=optimizer)([first, jnp.zeros(MEMBER)])
    assert jnp.isneginf(law).tolist() == [False, True, False, False]


def test_no_token_loses_more_than_the_share_of_the_others():
    """With rows that hardly overlap, where the slope itself is without bound."""
    sharp = [relative(e, a, 1e3) for e, a in zip(EMBEDDINGS, ANCHORS.T, strict=True)]
    z = jnp.array([0.0, -30.0, -60.0, -20.0]), jnp.zeros(MEMBER).at[0].set(50.0)
    first = np.asarray(jax.nn.log_softmax(z[0]), np.float64)
    for steps in (1, 2, 5):
        found = jax.nn.log_softmax(deepen(sharp, *WEIGHTS, steps=steps)(z))
        assert (found > first + steps * np.log(WEIGHTS[0]) - 1e-3).all()


@pytest.mark.parametrize("block", [1, 4, 7, 100])
def test_blocks_are_the_whole(block):
    whole = [matrix(space) for space in SPACES]
    pairs = zip(whole, EMBEDDINGS, ANCHORS.T, strict=True)
    for made, embedding, anchors in pairs:
        expected = naive_matrix(embedding, anchors)
        np.testing.assert_allclose(made, expected, atol=1e-6)
    z = [jnp.asarray(RNG.normal(size=(2, 3, u))) for u in (PIVOT, MEMBER)]
    dense = deepen(whole, *WEIGHTS)(z)
    blocked = deepen(SPACES, *WEIGHTS, block=block)(z)
    np.testing.assert_allclose(blocked, dense, atol=1e-5)
    probs = jax.nn.softmax(z[1])
    found = represent(probs, SPACES[1], block)
    np.testing.assert_allclose(found, probs @ whole[1], atol=1e-6)


def test_the_average_is_approached():
    """Every step brings the representation nearer to what it is to be."""
    row = readings()[0]
    maps = [naive_matrix(e, a) for e, a in zip(EMBEDDINGS, ANCHORS.T, strict=True)]
    laws = [voc.softmax(z) for z in row]
    wanted = sum(w * (p @ r) for w, p, r in zip(WEIGHTS, laws, maps, strict=True))
    far = []
    for steps in (0, 1, 2, 5, 20):
        z = deepen(SPACES, *WEIGHTS, steps=steps)([jnp.asarray(z) for z in row])
        now = np.asarray(jax.nn.softmax(z), np.float64) @ maps[0]
        far.append((wanted * np.log(wanted / now)).sum())
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.2 * far[0]


def test_a_model_with_itself_stays_as_it_is():
    lms, params = (voc.LMS[0],) * 2, (PARAMS[0],) * 2
    bridges = [voc.bridge(voc.WORDS[0], voc.WORDS[0])] * 2
    sharp = relative(EMBEDDINGS[0], ANCHORS[:, 0])  # with the default scale
    expected = voc.laws(lms[0], params[0], TEXT)
    for spaces in ([SPACES[0]] * 2, [sharp] * 2):
        both = deepen_lm(lms, bridges, spaces, *WEIGHTS)
        np.testing.assert_allclose(voc.laws(both, params, TEXT), expected, atol=1e-5)
    # with the representation of another model it does not
    mixed = deepen_lm(lms, bridges, [SPACES[0], matrix(SPACES[0])[::-1]], *WEIGHTS)
    assert abs(voc.laws(mixed, params, TEXT) - expected).max() > 0.01


def test_no_step_and_the_end_of_text_leave_the_first_member_alone():
    expected = voc.laws(voc.LMS[0], PARAMS[0], TEXT)
    none = voc.laws(model(steps=0), PARAMS, TEXT)
    np.testing.assert_allclose(none, expected, atol=1e-6)
    end = int(expected[1].argmax())
    found = voc.laws(model(end=end), PARAMS, TEXT)
    over = expected.argmax(-1) == end
    assert 0 < over.sum() < len(TEXT)
    np.testing.assert_allclose(found[over], expected[over], atol=1e-6)
    np.testing.assert_allclose(found[~over], naive(readings())[~over], atol=2e-6)


def test_laws():
    check_lm(model(), PARAMS, PIVOT, tolerance=1e-5, jit=True)


@pytest.mark.slow
def test_laws_of_transformers():
    lms, params = zip(*voc.SMALL, strict=True)
    check_lm(model(lms=lms, block=3), params, PIVOT, jit=True)


def test_greedy_text_is_the_same_under_speculation():
    prompts = [[0], [3, 1, 2, 0], [3, 3]]
    voc.check_speculates(model(), PARAMS, PIVOT, prompts=prompts)


def test_what_is_forbidden_and_what_is_no_number():
    law = deepen(SPACES, *WEIGHTS)
    first, second = jnp.array([0.0, -jnp.inf, 1.0, 2.0]), jnp.zeros(MEMBER)
    found = law([first, second])
    assert jnp.isneginf(found).tolist() == [False, True, False, False]
    assert bool(jnp.isfinite(found[2:]).all())
    absent = law([first, second.at[2].set(-jnp.inf)])
    assert bool(jnp.isfinite(absent[2:]).all())
    assert not np.allclose(absent[2:], found[2:])
    dead = law([jnp.full(PIVOT, -jnp.inf), second])
    assert bool(jnp.isneginf(dead).all())
    for z in ([first.at[0].set(jnp.nan), second], [first, second.at[0].set(jnp.nan)]):
        assert bool(jnp.isnan(law(z)).any())


def test_rate_and_weights_are_swept_and_differentiated_in_one_trace():
    traces = []
    z = [jnp.asarray(z, jnp.float32) for z in readings()[0]]

    @jax.jit
    def best(weight, rate, spaces):
        traces.append(None)
        law = deepen(spaces, weight, 1 - weight, rate=rate, block=4)
        return jax.nn.log_softmax(law(z))[1]

    values = [float(best(w, 0.7, SPACES)) for w in (0.2, 0.49, 0.51)]
    best(0.2, 0.1, SPACES)
    assert len(traces) == 1
    slope = float(jax.grad(best)(0.5, 0.7, SPACES))
    assert slope == pytest.approx((values[2] - values[1]) / 0.02, rel=0.02)


def test_the_program_of_a_large_pair_holds_no_large_array():
    """262k and 49k tokens, 30k anchors: R would be 31 GB. Nothing is computed."""
    sizes, width, anchors = (262_144, 49_152), 640, 30_000
    spaces = [
        Relative(
            jax.ShapeDtypeStruct((u, width), jnp.float32),
            jax.ShapeDtypeStruct((anchors, width), jnp.float32),
        )
        for u in sizes
    ]
    z = [jax.ShapeDtypeStruct((1, 1, u), jnp.float32) for u in sizes]
    program = jax.jit(lambda spaces, z: deepen(spaces)(z)).lower(spaces, z).as_text()
    held = [
        np.prod([int(n) for n in shape.split("x")[:-1]])
        for shape in re.findall(r"tensor<((?:\d+x)+f32)>", program)
    ]
    assert 4 * max(held) < 2**30
    whole = [jax.ShapeDtypeStruct((u, anchors), jnp.float32) for u in sizes]
    program = jax.jit(lambda spaces, z: deepen(spaces)(z)).lower(whole, z).as_text()
    assert f"tensor<{sizes[0]}x{anchors}xf32>" in program


def test_anchors_are_what_all_have():
    assert ANCHORS.tolist() == [[0, 1], [1, 0], [3, 2]]
    some = common_tokens(BRIDGES, count=2, seed=1)
    assert len(some) == 2
    assert all(row in ANCHORS.tolist() for row in some.tolist())
    assert (some == common_tokens(BRIDGES, count=2, seed=1)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: relative(np.eye(3), np.array([3])), "an embedding of 3 rows"),
        (lambda: deepen([SPACES[0], SPACES[1]._replace(anchors=jnp.ones((2, 5)))]),
         r"\[3, 2\] anchors"),
        (lambda: deepen(SPACES, steps=-1), "steps = -1"),
        (lambda: deepen(SPACES, block=0), "block = 0"),
        (lambda: deepen(SPACES, 0.5, -0.5), "weight of -0.5"),
        (lambda: deepen(SPACES)([jnp.zeros(4), jnp.zeros(5)]), r"\[4, 5\] tokens"),
        (lambda: deepen(SPACES, 1.0)([jnp.zeros(4), jnp.zeros(6)]), "1 weights"),
        (lambda: common_tokens(
            [voc.bridge(["ab", "b"], ["b", "ab"]), voc.bridge(["ab", "b"], ["a", "b"]),
             voc.bridge(["ab", "b"], ["ab", "b"])._replace(pivot=jnp.array([0, -1]))]),
         "no token is common"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
