"""Contrasts inside one model, of layers and of experts: twins, laws, mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transferring as own
from naive_transfer import twin
from transferring import check_methods, last, read

from collab_jax import combine, law, pool
from collab_jax.cooperate.efficient.distill import jensen_shannon
from collab_jax.cooperate.transfer import layers, routing
from collab_jax.lm import language_model
from collab_jax.models import moe
from collab_jax.models.config import from_hf, to_hf
from collab_jax.models.transformer import ACTIVATIONS, transformer

POOLS = {"dola": layers.dola(0.05), "sled": layers.sled(1.0, 3)}
EXPERTS = from_hf(
    {
        "model_type": "mixtral",
        "intermediate_size": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        **own.SIZES,
    }
)
DEEP = from_hf(
    {
        "model_type": "llama",
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        **own.SIZES,
    }
)
TAPS = ("hidden.0", "hidden.1")
BACKBONE = transformer(DEEP, TAPS)
PARAMS = own.weights(0, DEEP)
DEEP_MODEL = language_model(BACKBONE)


def by_head(params, text):
    """What the head says of the last hidden states and of the taps', from NumPy."""
    out = read(DEEP_MODEL, params, text)
    head = np.asarray(params["head"]["kernel"], np.float64)
    states = [out.features.hidden, *(out.features.taps[tap] for tap in TAPS)]
    return [last(state, text) @ head for state in states]


def test_layers_decode_as_their_twins():
    params = PARAMS
    lm = own.knobbed(
        lambda index: layers.layered(BACKBONE, TAPS, own.one_of(POOLS, index))
    )
    cases = {
        name: (
            (jnp.array(n), params),
            lambda text, row, name=name: twin(name, 1.0, by_head(params, text)),
        )
        for n, name in enumerate(POOLS)
    }
    check_methods(lm, cases, laws=tuple(POOLS), atol=5e-4, tolerance=1e-4)


def shared_layer(members):
    """The mistake: one premature layer for the whole batch."""
    final, early = members[0], jnp.stack(members[1:])
    apart = jensen_shannon()(law.log_probs(final)[None], law.log_probs(early))
    return pool.linear(1, -1)([final, early[apart.mean((1, 2)).argmax()]])


@pytest.mark.parametrize("mistaken", [False, True])
def test_a_row_has_a_premature_layer_of_its_own(mistaken):
    drawn = jax.random.normal(jax.random.key(0), (5, 8, 1, 9))
    right = layers.most_distant(pool.linear(1, -1))
    form = shared_layer if mistaken else right
    together = form(list(drawn))
    alone = [form(list(drawn[:, row : row + 1]))[0] for row in range(8)]
    gap = float(jnp.abs(together - jnp.stack(alone)).max())
    assert gap > 0.1 if mistaken else gap < 1e-6


def test_another_layer_is_another_law():
    """Every layer is the farthest one somewhere, and the nearest one is not it."""
    drawn = list(jax.random.normal(jax.random.key(0), (3, 4, 5, 9)))
    chosen = layers.most_distant(pool.linear(0, 1))(drawn)
    at = [np.isclose(chosen, law.log_probs(one)).all(-1) for one in drawn[1:]]
    assert at[0].any()
    assert at[1].any()
    assert (at[0] ^ at[1]).all()


def test_a_missing_tap_is_named():
    lm = layers.layered(BACKBONE, ["hidden.0", "hidden.2"], layers.dola())
    params = PARAMS
    with pytest.raises(ValueError, match=r"no taps \['hidden.2'\]"):
        lm.extend(params, lm.init(params, 1, 4), jnp.array([[1]]))
    with pytest.raises(ValueError, match="without taps"):
        layers.layered(BACKBONE, [], layers.dola())


def test_a_contrast_of_routings_decodes_as_its_twin():
    params = own.weights(7, EXPERTS)
    strong, weak = (
        language_model(transformer(c)) for c in (EXPERTS, routing.rank_k(EXPERTS, 2))
    )
    lm = routing.scmoe(EXPERTS, 2, 0.1, 0.5)

    def law_of(text, row):
        del row
        z = [own.logits(one, params, text) for one in (strong, weak)]
        laws = [own.log_softmax(one) for one in z]
        kept = np.exp(laws[0]) >= 0.1 * np.exp(laws[0]).max()
        scores = own.product_of_experts((1.5, -0.5), laws)
        return np.where(kept, scores, -np.inf)

    cases = {"scmoe": ((params, params), law_of)}
    check_methods(lm, cases, laws=("scmoe",), atol=5e-4, tolerance=1e-4)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mix", [moe.mix_dense, moe.mix_gathered])
def test_the_kth_expert_reads_alone(mix, k):
    rng = np.random.default_rng(0)
    x, logits = (rng.standard_normal((6, n)).astype(np.float32) for n in (5, 4))
    shapes = ((4, 5, 3), (4, 5, 3), (4, 3, 5))
    experts = moe.Experts(
        *(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    )
    weights, chosen = moe.route(jnp.asarray(logits), 1, True, skipped=k - 1)
    found = mix(jnp.asarray(x), experts, weights, chosen, ACTIVATIONS["silu"])
    for n, row in enumerate(x):
        e = np.argsort(-logits[n])[k - 1]
        gate, up = row @ experts.gate[e], row @ experts.up[e]
        expected = (gate / (1 + np.exp(-gate)) * up) @ experts.down[e]
        np.testing.assert_allclose(found[n], expected, rtol=1e-4, atol=1e-5)


def test_routing_identities():
    """Beta 0 is the model, and a rank of a model of one active expert is the model."""
    params, text = own.weights(7, EXPERTS), jnp.array([[1, 4, 2, 0]])

    def laws(lm, params):
        out, _ = lm.extend(params, lm.init(params, 1, 4), text)
        return np.asarray(jax.nn.softmax(out.logits))

    model = language_model(transformer(EXPERTS))
    plain = laws(model, params)
    found = laws(routing.scmoe(EXPERTS, 3, 0.0, 0.0), (params, params))
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-7)
    single = dataclasses.replace(EXPERTS, active=1)
    first = laws(language_model(transformer(single)), params)
    same = laws(routing.scmoe(single, 1, 0.0, 0.5), (params, params))
    np.testing.assert_allclose(same, first, rtol=1e-5, atol=1e-7)
    assert abs(first - plain).max() > 1e-3
    joined = combine.product([model] * 2, pool.contrast(0.0, 0.5))
    assert abs(laws(joined, (params, params)) - plain).max() < 1e-5


def test_routing_refuses():
    with pytest.raises(ValueError, match="without experts"):
        routing.rank_k(own.CONFIG, 1)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k = {k}: a rank from 1 to 4"):
            routing.rank_k(EXPERTS, k)
    with pytest.raises(ValueError, match=r"skipped = 1: config\.json has no word"):
        to_hf(routing.rank_k(EXPERTS, 2))
