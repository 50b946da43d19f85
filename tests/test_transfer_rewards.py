"""Decoding towards rewards: naive twins, laws, speculation, identities, mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rewarding
import transferring as own
from rewarding import REWARDS, rescored
from transferring import KEY, MODEL, PROMPTS, TABLE, TABLES, VOCAB, check_methods

from collab_jax import combine, decode, pool, warp
from collab_jax.cooperate.transfer import reward
from collab_jax.models import table
from collab_jax.testing import check_lm

K = 3


def clip(x):
    return min(max(x, 0.0), 1.0)


def probability(y):
    return jax.nn.log_sigmoid(y[..., 0])


# name -> (from a knob and both LMs to an LM, the twin's score of a candidate)
METHODS = {
    "rad": (
        lambda w, *lms: reward.rad(*lms, w, K, width=2),
        lambda w, z, y: z + w * clip(y[0]),
    ),
    "rad away from the second": (
        lambda w, *lms: reward.rad(*lms, w, K, judge=reward.away(1), width=2),
        lambda w, z, y: z + w * (1 - clip(y[1])),
    ),
    "args": (
        lambda w, *lms: reward.args(*lms, w, K, width=2),
        lambda w, z, y: z + w * y[0],
    ),
    "controlled": (
        lambda w, *lms: reward.controlled(*lms, w, VOCAB, width=2),
        lambda w, z, y: z + w * y[0],
    ),
    "fudge": (
        lambda w, *lms: reward.controlled(*lms, w, K, judge=probability, width=2),
        lambda w, z, y: z - w * np.log1p(np.exp(-y[0])),
    ),
}
KNOBS = {"weak": 0.7, "strong": 6.0}


@pytest.mark.parametrize("kind", ["table", "model"])
def test_rad_decodes_as_its_twin(kind):
    """One token is read in place, and the four of a round in two pieces."""
    pair = lm, params, rewards, theirs = rewarding.pairs()[kind]
    form, score = METHODS["rad"]
    laws = ("strong",) if kind == "table" else ()

    def behind(w):
        return lambda text, row: rescored(pair, text, K, functools.partial(score, w))

    made = own.knobbed(lambda w: form(1.0 if w is None else w, lm, rewards))
    cases = {n: ((jnp.array(w), (params, theirs)), behind(w)) for n, w in KNOBS.items()}
    check_methods(made, cases, laws=laws, atol=1e-3, tolerance=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_equals_its_definition(name):
    pair = lm, params, rewards, theirs = rewarding.pairs()["table"]
    form, score = METHODS[name]
    program = jax.jit(lambda w: laws_of(form(w, lm, rewards), (params, theirs), TEXT))
    for w in KNOBS.values():
        found = program(w)
        count = VOCAB if name == "controlled" else K
        for t in range(len(TEXT)):
            expected = rescored(pair, TEXT[: t + 1], count, functools.partial(score, w))
            law = np.exp(own.log_softmax(expected))
            np.testing.assert_allclose(found[t], law, atol=1e-4)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _laws_of(lm, params, text):
    out, _ = lm.extend(params, lm.init(params, 1, len(text)), jnp.array([text]))
    return jax.nn.softmax(out.logits)[0]


def laws_of(lm, params, text):
    """The laws behind every token of a text, `[T, V]`."""
    return _laws_of(lm, params, tuple(text))


TEXT = [1, 3, 2, 5, 0, 4]


def test_identities():
    both = TABLES[:2]
    plain = laws_of(warp.warp(TABLE, warp.top_k(K)), TABLES[0], TEXT)
    whole = laws_of(TABLE, TABLES[0], TEXT)
    found = laws_of(reward.rad(TABLE, TABLE, 0.0, K), both, TEXT)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-7)
    found = laws_of(reward.rad(TABLE, TABLE, 0.0, VOCAB), both, TEXT)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-7)
    # a reward that is the same everywhere changes nothing
    flat = TABLES[0], jnp.ones_like(TABLES[1])
    found = laws_of(reward.rad(TABLE, TABLE, 50.0, K), flat, TEXT)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-7)
    # and one that outweighs the base chooses alone
    rad = reward.rad(TABLE, TABLE, 1e4, VOCAB, judge=reward.output())
    after = [TABLES[1][v + 8 * t, 0] for t in TEXT for v in range(VOCAB)]
    best = jnp.array(after).reshape(-1, VOCAB).argmax(-1)
    assert (laws_of(rad, both, TEXT).argmax(-1) == best).all()


def test_stochastic_args_has_a_temperature():
    pair, t = rewarding.pairs()["table"], 0.6
    lm = warp.warp(reward.args(TABLE, TABLE, 2.0, K), warp.temperature(t))
    found = laws_of(lm, TABLES[:2], TEXT)[-1]
    scores = rescored(pair, TEXT, K, lambda z, y: (z + 2.0 * y[0]) / t)
    np.testing.assert_allclose(found, np.exp(own.log_softmax(scores)), atol=1e-5)


def test_values_of_all_continuations_at_once():
    """A head with an output a token is a pool, and the same law."""
    after = 2 * jax.random.normal(jax.random.key(5), (VOCAB + 1, VOCAB))
    product = combine.product([TABLE, table.language_model(1)], pool.linear(1, 0.8))
    found = laws_of(product, (TABLES[0], after), TEXT)
    # the same numbers, told behind each continuation: by the last token and its before
    single = jnp.pad(after, ((0, 0), (0, 1))).reshape(-1, 1)
    single = jnp.pad(single, ((0, 0), (0, VOCAB - 1)))
    lm = reward.controlled(TABLE, TABLE, 0.8, VOCAB)
    expected = laws_of(lm, (TABLES[0], single), TEXT)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [1, 4, 6])
def test_the_width_changes_nothing(width):
    """In one tree, in pieces, and in pieces of which the last is not full."""
    both, lm = TABLES[:2], reward.rad(TABLE, TABLE, 5.0, K)
    wide = reward.rad(TABLE, TABLE, 5.0, K, width=width)
    assert (laws_of(wide, both, TEXT) == laws_of(lm, both, TEXT)).all()
    parents = jnp.array([[-1, 0, 0, 1, -1]])
    nodes = jnp.array([[2, 1, 6, 0, 3]])
    found, expected = (
        jax.jit(one.branch)(both, one.init(both, 1, 5), nodes, parents)[0].logits
        for one in (wide, lm)
    )
    assert (found == expected).all()


def test_one_cache_holds_the_text_once():
    """Beside the text there is room for the candidates, in as many rows as the base."""
    lm = reward.rad(MODEL, REWARDS, k=K, width=2)
    params = own.models()[0], rewarding.rewards_of()
    shapes = jax.eval_shape(lambda p: lm.init(p, 3, 20), params)
    batch, _, slots, _ = shapes.rewards.k[0].shape
    assert (batch, slots) == (3, 20 + 2 * K)
    assert shapes.inner.k[0].shape[2] == 20


def test_a_prefill_reads_no_candidates():
    """What nobody looks at is not in the compiled program: no trees, no copies."""
    lm = reward.rad(MODEL, REWARDS, k=K)
    params = own.models()[0], rewarding.rewards_of()
    tokens = jnp.zeros((1, 8), jnp.int32)

    def work(call):
        compiled = jax.jit(call).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    def alone(params):
        states = MODEL.init(params[0], 1, 16), REWARDS.init(params[1], 1, 16)
        pairs = zip((MODEL, REWARDS), params, states, strict=True)
        return [model.extend(p, state, tokens)[1] for model, p, state in pairs]

    def guided(params):
        return lm.extend(params, lm.init(params, 1, 16), tokens)

    unread = work(lambda p: guided(p)[1])
    assert unread < 1.3 * work(alone)
    assert work(guided) > 1.3 * unread


def test_a_batch_of_unequal_prompts_is_its_rows():
    lm, both = reward.rad(TABLE, TABLE, 4.0, K), TABLES[:2]
    decoder = decode.compile(lambda _: decode.sample(lm, 5, chunk=2))
    keys = jax.random.split(KEY, len(PROMPTS))
    together = decoder(None, both, *decode.pad(PROMPTS), keys)
    for row, prompt in enumerate(PROMPTS):
        tokens, length = decode.pad([prompt], multiple=5)
        alone = decoder(None, both, tokens, length, keys[row : row + 1])
        end = int(alone.length[0])
        assert alone.tokens[0, :end].tolist() == together.tokens[row, :end].tolist()


def test_strengths_in_one_trace_and_their_gradient():
    both, text = TABLES[:2], jnp.array([TEXT])

    def nats(beta):
        lm = reward.rad(TABLE, TABLE, beta, VOCAB, judge=reward.output())
        out, _ = lm.extend(both, lm.init(both, 1, len(TEXT)), text)
        log_p = jax.nn.log_softmax(out.logits[:, :-1])
        return -jnp.take_along_axis(log_p, text[:, 1:, None], 2).mean()

    sweep = jax.jit(jax.vmap(jax.value_and_grad(nats)))
    values, slopes = sweep(jnp.array([0.48, 0.5, 0.52]))
    np.testing.assert_allclose(slopes[1], (values[2] - values[0]) / 0.04, rtol=1e-2)


def test_forbidden_tokens_and_nan():
    # the places whose contexts are 5 and 3 alone, and one that is neither
    base = TABLES[0].at[:, 2].set(-jnp.inf).at[5 + 8 * VOCAB].set(-jnp.inf)
    base = base.at[3 + 8 * VOCAB, 1].set(jnp.nan)
    lm = reward.rad(TABLE, TABLE, 3.0, VOCAB)

    @jax.jit
    def laws(*both):
        text = jnp.array([[5], [3], [6]])
        return lm.extend(both, lm.init(both, 3, 1), text)[0].logits[:, 0]

    dead, broken, plain = laws(base, TABLES[1])
    assert (dead == -jnp.inf).all()
    assert jnp.isnan(broken).all()
    assert jnp.isneginf(plain).tolist() == [v == 2 for v in range(VOCAB)]
    assert jnp.isnan(laws(TABLES[0], TABLES[1].at[:, 0].set(jnp.nan))).any()

    @jax.jit
    @jax.grad
    def slope(z):
        halved = reward.rescored(TABLE, TABLE, lambda z, y: 0.5 * z, VOCAB)
        both = z, TABLES[1]
        out, _ = halved.extend(both, halved.init(both, 1, 1), jnp.array([[6]]))
        return jax.nn.softmax(out.logits)[0, 0, 0]

    assert jnp.isfinite(slope(TABLES[0].at[:, 2].set(-jnp.inf))).all()


# the mistakes that lie near, and what they change
def siblings_see_each_other(pair, text, k, score):
    """The candidates are read as one text after the other."""
    lm, params, rewards, theirs = pair
    law = own.log_softmax(own.logits(lm, params, text))
    found, read = np.full(len(law), -np.inf), [*text]
    for v in np.argsort(-law, kind="stable")[:k]:
        read.append(int(v))
        found[v] = score(law[v], rewarding.said(rewards, theirs, read))
    return found


def the_text_without_the_candidate(pair, text, k, score):
    lm, params, rewards, theirs = pair
    law = own.log_softmax(own.logits(lm, params, text))
    kept = np.argsort(-law, kind="stable")[:k]
    new = score(law, rewarding.said(rewards, theirs, text))
    return np.where(np.isin(np.arange(len(law)), kept), new, -np.inf)


@pytest.mark.parametrize(
    "wrong", [siblings_see_each_other, the_text_without_the_candidate]
)
def test_a_wrong_form_is_seen(wrong):
    pair = rewarding.pairs()["model"]

    def score(z, y):
        return 0.2 * z + 12.0 * y[0]  # so that every candidate has its share

    right, other = (
        np.exp(own.log_softmax(form(pair, TEXT, K, score)))
        for form in (rescored, wrong)
    )
    assert abs(right - other).max() > 1e-2


def test_the_model_of_rewards_obeys_the_laws():
    check_lm(REWARDS, rewarding.rewards_of(), VOCAB, tolerance=2e-5, jit=True)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: reward.rad(TABLE, TABLE, k=0), "k = 0"),
        (lambda: reward.rad(TABLE, TABLE, width=0), "0 tokens at a time"),
        (lambda: laws_of(reward.rad(TABLE, TABLE, k=8), TABLES[:2], TEXT), "k = 8"),
        (lambda: reward.rad(TABLE, TABLE).init(TABLES[0], 1, 2), "the pair"),
        (lambda: reward.hanging(TABLE, (-1, 1), 1), r"parents \[1\]"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
