"""Marian against golden vectors of torch, by the laws, and in company."""

from pathlib import Path

import jax
import jax.numpy as jnp
import marians
import numpy as np
import pytest
import speculation as spec

from collab_jax import beam, combine, decode, pool, tree, warp
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.io.json_file import write_json
from collab_jax.io.marian import (
    Translator,
    _tokenizer,
    load_translator,
    save_translator,
    sources,
)
from collab_jax.io.marian_names import rules
from collab_jax.models import table
from collab_jax.models.marian import init, marian, translator
from collab_jax.models.marian_config import from_hf, to_hf
from collab_jax.testing import check_lm

GOLDEN = np.load(Path(__file__).parent / "golden" / "marian.npz")
KEY = jax.random.key(0)
MADE = marians.config("apart")
LM = translator(MADE)


def own(name):
    """The LM of a case and its parameters, with sources of unequal length."""
    made = marians.config(name)
    return translator(made), (marians.params(made), *marians.sources(made))


def starts(made):
    return decode.pad([[made.start]] * len(marians.LENGTHS))


@pytest.mark.parametrize("name", marians.CASES)
def test_golden_logits(name):
    made, (lm, params) = marians.config(name), own(name)
    text = marians.texts(made)

    @jax.jit
    def read(params):
        state = lm.init(params, *text.shape)
        return lm.extend(params, state, text)[0].logits

    want = GOLDEN[f"{name} logits"]
    assert abs(np.asarray(read(params)) - want).max() <= 1e-4 * want.std()
    # padding that is read changes them
    weights, tokens, length = params
    whole = read((weights, tokens, length * 0 + tokens.shape[1]))
    assert abs(np.asarray(whole)[1:] - want[1:]).max() > 1e-2 * want.std()
    assert bool((whole[0] == read(params)[0]).all())


def new_tokens(result):
    """New tokens, -1 behind their end."""
    at = np.arange(result.tokens.shape[1])
    kept = at < np.asarray(result.length)[:, None]
    return np.where(kept, result.tokens, -1)[:, 1:]


@pytest.mark.parametrize("name", marians.CASES)
def test_golden_searches(name):
    made, (lm, params) = marians.config(name), own(name)
    for kind, decoder in {
        "greedy": decode.greedy(lm, marians.NEW, eos=made.eos),
        "beams": beam.search(lm, marians.NEW, marians.BEAMS, eos=made.eos),
    }.items():
        result = decode.run(decoder, params, *starts(made), KEY)
        np.testing.assert_array_equal(new_tokens(result), GOLDEN[f"{name} {kind}"])
    scores = result.info.beams.score[:, 0]
    np.testing.assert_allclose(scores, GOLDEN[f"{name} scores"], rtol=1e-4)


@pytest.mark.parametrize("name", marians.CASES)
def test_rules_cover_the_tree_and_go_both_ways(name):
    made = marians.config(name)
    fresh = jax.eval_shape(lambda: init(KEY, made))
    assert tree.shapes(marians.params(made)) == tree.shapes(fresh)
    drawn = marians.tensors(made)
    for rule in rules(made):
        tensors = [drawn[name] for name in rule.names]
        for back, tensor in zip(rule.save(rule.load(tensors)), tensors, strict=True):
            np.testing.assert_array_equal(back, tensor)


def test_laws():
    check_lm(LM, own("apart")[1], MADE.vocab, tolerance=2e-5, jit=True)


def test_reading_without_memory_is_the_same():
    """The naive twin: source and text are read anew, without a cache."""
    params, text = own("apart")[1], marians.texts(MADE)
    backbone = marian(MADE)

    @jax.jit
    def read(params):
        out, _ = backbone.features(params, None, backbone.embed(params, text))
        return backbone.unembed(params, out.hidden)

    want = GOLDEN["apart logits"]
    assert abs(np.asarray(read(params)) - want).max() <= 1e-4 * want.std()


def test_the_source_is_read_once():
    """What the state keeps of it is enough, and moves with its row."""
    weights, tokens, length = own("apart")[1]
    state = LM.init((weights, tokens, length), 3, 8)
    text, rows = marians.texts(MADE), np.array([2, 0, 0])
    extend = jax.jit(LM.extend)
    elsewhere = (weights, jnp.zeros_like(tokens), length)  # not looked at again
    out, after = extend(elsewhere, LM.take(state, rows), text)
    want = extend((weights, tokens[rows], length[rows]), LM.take(state, rows), text)
    np.testing.assert_array_equal(out.logits, want[0].logits)
    alone = (weights, tokens[2:, : length[2]], length[2:])
    again, _ = extend(alone, LM.init(alone, 1, 8), text[:1])
    np.testing.assert_allclose(out.logits[0], again.logits[0], atol=2e-5)
    assert after.cache.length.tolist() == [8, 8, 8]


def test_any_first_token_is_the_start():
    params, text = own("apart")[1], marians.texts(MADE)
    extend = jax.jit(LM.extend)
    out, _ = extend(params, LM.init(params, 3, 8), text)
    for first in (0, 7):
        other = text.copy()
        other[:, 0] = first
        same, _ = extend(params, LM.init(params, 3, 8), other)
        np.testing.assert_array_equal(same.logits, out.logits)


def test_as_target_and_as_draft():
    params, best = own("apart")[1], warp.greedy()
    toy = table.language_model(1)
    tables = table.init(jax.random.key(1), MADE.vocab, 1)
    prompts = [[MADE.start]] * 3
    for roles in ((LM, toy), (toy, LM)):
        trees = [params if lm is LM else tables for lm in roles]
        target, draft = (warp.warp(lm, best) for lm in roles)
        rounds = speculate(on_lm(target), draft_lm(draft, 3), 8)
        found = spec.draws(rounds, tuple(trees), prompts)
        plain = spec.draws(decode.greedy(roles[0], 8), trees[0], prompts)
        for row in range(3):
            assert spec.new_tokens(found, row) == spec.new_tokens(plain, row)


def test_in_an_ensemble():
    """Two models on one text, stacked or not; a weight of 0 leaves the other."""
    one = marians.params(MADE)
    two = jax.tree.map(lambda x: x[..., ::-1], one)
    source = marians.sources(MADE)
    pooled = pool.mixture(0.4, 0.6)
    stack = combine.stacked(LM, 2, pooled, axes=(0, None, None))
    pair = combine.product([LM, LM], pooled)
    text = marians.texts(MADE)
    found = [
        jax.jit(lm.extend)(params, lm.init(params, 3, 8), text)[0].logits
        for lm, params in (
            (stack, (tree.stack([one, two]), *source)),
            (pair, ((one, *source), (two, *source))),
        )
    ]
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)


def test_saved_and_loaded(tmp_path):
    made = marians.config("shared")
    params = jax.tree.map(jnp.asarray, marians.params(made))
    model = Translator(params, translator(made), marian(made), None, made)
    folder = save_translator(model, tmp_path / "model")
    again = load_translator(folder)
    assert again.config == made
    assert again.tokenizer is None
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, again.params)
    assert jax.tree.all(same)
    half = load_translator(folder, dtype="bfloat16")
    assert half.params["logit_bias"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="is not empty"):
        save_translator(model, folder)
    wrong = model._replace(params=params | {"more": jnp.ones(1)})
    with pytest.raises(ValueError, match="leaves"):
        save_translator(wrong, tmp_path / "other")


@pytest.mark.parametrize("name", marians.CASES)
def test_a_written_config_is_read_again(name):
    made = marians.config(name)
    assert from_hf(to_hf(made)) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "'bart'"),
        ({"normalize_before": True}, "normalize_before = True"),
        ({"activation_function": "mish"}, "'mish'"),
        ({"d_model": None}, "lacks 'd_model'"),
        ({"decoder_vocab_size": 12}, "53 tokens of the source and 12"),
        ({"tie_word_embeddings": False}, "head of its own"),
        ({"decoder_attention_heads": 2}, "multiple of the 2 heads"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(marians.CASES["shared"] | changes)


def test_sources_that_do_not_fit_are_refused():
    weights, tokens, length = own("apart")[1]
    with pytest.raises(ValueError, match="3 source texts for a batch of 2"):
        LM.init((weights, tokens, length), 2, 4)
    long = np.zeros((1, 41), np.int32)
    with pytest.raises(ValueError, match="41 tokens exceeds the 40"):
        LM.init((weights, long, np.array([41])), 1, 4)


def test_texts_and_their_tokenizer(tmp_path):
    """MarianTokenizer cuts the source, ends it, and spells what is written."""
    spm = pytest.importorskip("sentencepiece")
    lines = [
        f"{a} {b} on the {c}" for a in "abc" for b in "xyz" for c in ("mat", "cat")
    ]
    for side in ("source", "target"):
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(tmp_path / side),
            vocab_size=24,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        (tmp_path / f"{side}.model").rename(tmp_path / f"{side}.spm")
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "source.spm"))
    known = [pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())]
    names = ["</s>", "<unk>", *known, "<pad>"]
    write_json(tmp_path / "vocab.json", {name: i for i, name in enumerate(names)})
    made = from_hf(
        marians.CASES["shared"]
        | {
            "vocab_size": len(names),
            "decoder_start_token_id": len(names) - 1,
            "pad_token_id": len(names) - 1,
        }
    )
    tokenizer = _tokenizer(tmp_path)
    model = Translator(init(KEY, made), translator(made), marian(made), tokenizer, made)
    again = load_translator(save_translator(model, tmp_path / "model"))
    text = "b x on the cat"
    _, tokens, length = given = sources(again.params, again.tokenizer, [text, "a"])
    assert tokens.shape[0] == 2
    assert tokens[0, length[0] - 1] == 0  # its end
    assert tokens[0, : length[0] - 1].tolist() == [
        names.index(piece) for piece in pieces.encode(text, out_type=str)
    ]
    decoder = decode.greedy(again.lm, 4, eos=made.eos)
    result = decode.run(decoder, given, *decode.pad([[made.start]] * 2), KEY)
    assert result.length.max() <= 5
    assert again.tokenizer.decode(tokens[0], skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="no tokenizer"):
        sources(again.params, None, [text])
