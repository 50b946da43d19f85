"""LoRA: the base at its start, apply equals materialise, experts share a base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import combine, decode, pool, tree
from collab_jax.lm import language_model
from collab_jax.models import lora, transformer
from collab_jax.models.config import from_hf

CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
)
BACKBONE = transformer.transformer(CONFIG)
LM = language_model(BACKBONE)
PARAMS = transformer.init(jax.random.key(0), CONFIG)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 19)


def random_adapter(seed, rank=3, select=lora.LINEAR):
    """An adapter whose b is not zero."""
    adapter = lora.init(jax.random.key(seed), PARAMS, rank, select)
    key = jax.random.key(seed + 100)
    return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape) * 0.3, adapter)


def logits(lm, params):
    return lm.extend(params, lm.init(params, 2, 7), TOKENS)[0].logits


def test_a_new_adapter_changes_nothing():
    adapter = lora.init(jax.random.key(2), PARAMS, rank=3)
    assert len(jax.tree.leaves(adapter)) == 2 * 7 * CONFIG.layers
    with_it = logits(lora.adapted(LM, 2.0), (PARAMS, adapter))
    np.testing.assert_array_equal(with_it, logits(LM, PARAMS))


@pytest.mark.parametrize("select", [lora.LINEAR, lora.ATTENTION, "head/kernel"])
def test_apply_equals_materialise(select):
    adapter = random_adapter(3, select=select)
    applied = logits(lora.adapted(LM, 0.7), (PARAMS, adapter))
    whole = logits(LM, lora.materialise(PARAMS, adapter, 0.7))
    np.testing.assert_allclose(applied, whole, atol=1e-5 * float(whole.std()))
    assert abs(whole - logits(LM, PARAMS)).max() > 0.01  # it did change something


def test_the_scale_matters():
    adapter = random_adapter(3)
    applied = logits(lora.adapted(LM, 0.7), (PARAMS, adapter))
    wrong = logits(LM, lora.materialise(PARAMS, adapter, 0.6))
    assert abs(applied - wrong).max() > 1e-3


def test_two_adapters_add():
    one, two = random_adapter(3), random_adapter(4)
    applied = lora.apply(lora.apply(PARAMS, one, 0.5), two, 0.25)
    whole = lora.materialise(lora.materialise(PARAMS, one, 0.5), two, 0.25)
    np.testing.assert_allclose(logits(LM, applied), logits(LM, whole), atol=1e-4)


def test_an_adapter_touches_only_what_it_selects():
    adapter = random_adapter(3, select=lora.ATTENTION)
    whole = lora.materialise(PARAMS, adapter, 1.0)
    before, after = (
        dict(zip(tree.paths(t), jax.tree.leaves(t), strict=True))
        for t in (PARAMS, whole)
    )
    changed = {p for p in before if bool((before[p] != after[p]).any())}
    assert changed == set(tree.select(PARAMS, lora.ATTENTION))


def test_a_wider_selection_leaves_the_other_factors():
    narrow = lora.init(jax.random.key(5), PARAMS, 2, lora.ATTENTION)
    wide = lora.init(jax.random.key(5), PARAMS, 2, lora.LINEAR)
    for path, leaf in tree.select(narrow, ".*").items():
        np.testing.assert_array_equal(leaf, tree.select(wide, path)[path])


def test_gradients_reach_only_the_adapter():
    adapter = lora.init(jax.random.key(5), PARAMS, 2)

    def total(adapter):
        return logits(lora.adapted(LM, 1.0), (PARAMS, adapter)).var()

    for path, leaf in tree.select(jax.grad(total)(adapter), ".*").items():
        # b is zero, so a has no gradient yet
        assert (abs(leaf).max() > 0) == path.endswith("/b"), path


def test_experts_over_one_base_in_one_decode():
    adapters = [random_adapter(s) for s in (6, 7)]
    lm = lora.adapted(LM, 0.5)
    both = combine.stacked(lm, 2, pool.linear(0.4, 0.6), axes=(None, 0))
    got = logits(both, (PARAMS, tree.stack(adapters)))
    laws = [jax.nn.log_softmax(logits(lm, (PARAMS, a))) for a in adapters]
    want = jax.nn.log_softmax(0.4 * laws[0] + 0.6 * laws[1])
    np.testing.assert_allclose(jax.nn.log_softmax(got), want, atol=2e-5)


def test_tokens_of_experts_over_one_base_are_those_of_the_loop():
    """Greedy, sampled and speculative; an adapter in another place is seen."""
    adapters = [random_adapter(s) for s in (6, 7, 9)]
    lm, pooled = lora.adapted(LM, 0.5), pool.mixture(0.2, 0.5, 0.3)
    both = combine.stacked(lm, 3, pooled, axes=(None, 0))
    loop = combine.product([lm] * 3, pooled)
    own = PARAMS, tree.stack(adapters)
    each = tuple((PARAMS, adapter) for adapter in adapters)
    prompts = decode.pad([[1], [2, 3, 4, 5], [6, 7]])
    key = jax.random.key(3)
    for make in (decode.greedy, decode.sample):
        mine = decode.run(make(both, 8), own, *prompts, key)
        theirs = decode.run(make(loop, 8), each, *prompts, key)
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_allclose(mine.scores, theirs.scores, rtol=1e-4)
    turned = PARAMS, tree.stack(adapters[::-1])
    other = decode.run(decode.sample(both, 8), turned, *prompts, key)
    assert (other.tokens != mine.tokens).any()


def test_the_base_is_not_stacked():
    """No array of the program holds a kernel of the base once for every expert."""

    def program(lm, params):
        def read(params):
            return lm.extend(params, lm.init(params, 2, 7), TOKENS)[0].logits

        return str(jax.make_jaxpr(read)(params))

    adapters = tree.stack([random_adapter(s) for s in (6, 7, 9)])
    shared = combine.stacked(lora.adapted(LM, 0.5), 3, pool.mixture(), axes=(None, 0))
    copied = combine.stacked(LM, 3, pool.mixture())
    found = program(shared, (PARAMS, adapters))
    other = program(copied, tree.stack([PARAMS] * 3))
    for size_in, size_out in {
        leaf.shape for leaf in tree.select(PARAMS, lora.LINEAR).values()
    }:
        assert f"[3,{size_in},{size_out}]" not in found
        assert f"[3,{size_in},{size_out}]" in other


def test_all_six_verbs_run_on_the_adapted_parameters():
    adapter, lm = random_adapter(8), lora.adapted(LM, 0.5)
    parents = jnp.array([[-1, 0, 0], [-1, -1, 1]])

    def story(lm, params):
        _, state = lm.extend(params, lm.init(params, 2, 12), TOKENS)
        state = lm.take(lm.rewind(state, jnp.array([3, 1])), jnp.array([1, 0]))
        out, state = lm.branch(params, state, TOKENS[:, :3], parents)
        state = lm.prune(state, jnp.array([[0, 2], [1, 2]]), jnp.array([2, 1]))
        return out.logits, lm.extend(params, state, TOKENS[:, :1])[0].logits

    got = story(lm, (PARAMS, adapter))
    want = story(LM, lora.apply(PARAMS, adapter, 0.5))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("rank", "select", "message"),
    [
        (2, "nothing", "no leaf matches"),
        (13, lora.ATTENTION, "rank 13"),
        (0, lora.ATTENTION, "rank 0"),
        (2, ".*/scale", "is not a kernel"),
    ],
)
def test_bad_selections_are_refused(rank, select, message):
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), PARAMS, rank, select)


def test_experts_of_a_mixture_are_refused():
    params = {"layers_0": {"mlp": {"experts": {"up": jnp.zeros((3, 4, 5))}}}}
    with pytest.raises(ValueError, match="kernels of experts"):
        lora.init(jax.random.key(0), params, 2, ".*/up")


def test_an_adapter_of_another_model_is_refused():
    adapter = random_adapter(3)
    with pytest.raises(ValueError, match="layers_2, which the model has not"):
        lora.apply(PARAMS, {"layers_2": adapter["layers_1"]}, 1.0)
    q = {"kernel": {"a": jnp.zeros((5, 2)), "b": jnp.zeros((2, 16))}}
    with pytest.raises(ValueError, match="do not fit the kernel"):
        lora.apply(PARAMS, {"layers_0": {"attention": {"q": q}}}, 1.0)
