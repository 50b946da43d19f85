"""The five laws, by the public check, for transformers and nests of them."""

import families
import jax
import jax.numpy as jnp
import pytest

from collab_jax import combine, pool, slots, tree, warp
from collab_jax.io import canonical
from collab_jax.lm import language_model
from collab_jax.models import lora, table
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import transformer
from collab_jax.testing import check_lm

VOCAB, BATCH = families.CASES["llama"]["vocab_size"], 3


def model(name, layers=2):
    changes = {"n_layer": layers} if name == "gpt2" else {"num_hidden_layers": layers}
    if "layer_types" in families.CASES[name]:
        changes["layer_types"] = families.CASES[name]["layer_types"][:layers]
    config = from_hf(families.CASES[name] | changes)
    drawn = families.tensors(config)
    params = jax.tree.map(jnp.asarray, canonical.load_tree(config, drawn.__getitem__))
    return language_model(transformer(config)), params


def three_deep():
    """A proxy-tuned ensemble of LoRA experts with prompts of their own, warped."""
    llama, base = model("llama")
    keys = jax.random.split(jax.random.key(0), 2)
    adapters = [lora.init(key, base, rank=2) for key in keys]
    adapters = [jax.tree.map(lambda x: x + 0.05, adapter) for adapter in adapters]
    experts = combine.stacked(
        lora.adapted(llama, 1.0), 2, pool.mixture(0.6, 0.4), axes=(None, 0)
    )
    gemma, gemma_params = model("gemma3")
    tokens = jax.random.randint(jax.random.key(1), (BATCH, 5), 0, VOCAB)
    own = gemma_params, tokens, jnp.array([5, 1, 3])
    toy = table.language_model(1)
    toy_params = table.init(jax.random.key(2), VOCAB, 1)
    lm = combine.product(
        [
            experts,
            combine.prefixed(gemma, chunk=2),
            warp.warp(toy, warp.temperature(2)),
        ],
        pool.linear(1, 0.7, -0.3),
    )
    lm = warp.warp(lm, warp.repetition_penalty(1.2), warp.temperature(0.8))
    return lm, ((base, tree.stack(adapters)), own, toy_params)


MODELS = {
    "llama": lambda: model("llama"),
    "gemma3": lambda: model("gemma3"),
    "gpt2": lambda: model("gpt2"),
    "mixtral_window": lambda: model("mixtral_window"),
    "three deep": three_deep,
}


@pytest.mark.parametrize("name", MODELS)
def test_laws(name):
    lm, params = MODELS[name]()
    check_lm(lm, params, VOCAB, batch=BATCH, jit=True)


def test_laws_without_jit():
    check_lm(*model("llama", layers=1), VOCAB, batch=2, jit=False)


def cache_one_slot_off():
    """Each new key lands one slot too far, and the first slot is never written."""
    lm, params = model("llama", layers=1)

    def extend(params, state, tokens):
        out, after = lm.extend(params, state, tokens)
        moved = tuple(jnp.roll(k, 1, axis=2) for k in after.k)
        return out, after._replace(k=moved)

    return lm._replace(extend=extend), params


def sees_its_sibling():
    lm, params = model("llama", layers=1)

    def branch(params, state, tokens, parents):
        chain = jnp.broadcast_to(jnp.arange(parents.shape[1]) - 1, parents.shape)
        return lm.branch(params, state, tokens, chain)

    return lm._replace(branch=branch), params


def forgets_one_member():
    (a, pa), (b, pb) = model("llama", layers=1), model("gpt2", layers=1)
    lm = combine.product([a, b], pool.mixture(0.5, 0.5))
    return lm._replace(rewind=lambda s, n: (a.rewind(s[0], n), s[1])), (pa, pb)


def compacts_the_wrong_nodes():
    lm, params = model("llama", layers=1)

    def prune(state, path, count):
        first = jnp.broadcast_to(jnp.arange(path.shape[1]), path.shape)
        return lm.prune(state, first, count)

    return lm._replace(prune=prune), params


def grows_past_what_it_reads():
    """Rows share the longest row's mask, as a cache with one cursor would."""
    lm, params = model("llama", layers=1)

    def extend(params, state, tokens):
        longest = jnp.broadcast_to(state.length.max(), state.length.shape)
        out, after = lm.extend(params, state._replace(length=longest), tokens)
        return out, after._replace(length=state.length + tokens.shape[1])

    return lm._replace(extend=extend), params


WRONG = {
    "chunk": cache_one_slot_off,
    "branch": sees_its_sibling,
    "rewind": forgets_one_member,
    r"branch \(prune\)": compacts_the_wrong_nodes,
    "rows": grows_past_what_it_reads,
}


@pytest.mark.parametrize("law", WRONG)
def test_wrong_models_fail(law):
    lm, params = WRONG[law]()
    with pytest.raises(AssertionError, match=f"law of {law}"):
        check_lm(lm, params, VOCAB, batch=BATCH, jit=True)


def test_a_one_token_write_is_a_write():
    """The path around XLA's fusion of single updates gives the same buffer."""
    buffer = jnp.arange(12.0).reshape(1, 2, 3, 2)
    value, length = jnp.full((1, 1, 2, 2), 7.0), jnp.array([1])
    written = slots.write(buffer, value, length, axis=2)
    assert (written == buffer.at[0, :, 1].set(7.0)).all()
    full = slots.write(buffer, value, jnp.array([3]), axis=2)
    assert (full == buffer).all()
