"""Vocabularies and their matrices against mergekit's."""

import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from small_tokenizers import (
    first,
    fourth,
    pieces,
    second,
    third,
    unigrams,
    write_llama,
)

from collab_jax.io.rows import align
from collab_jax.io.tokenizer import load_tokenizer
from collab_jax.io.vocabulary import Given, Member, Wish, vocabulary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # mergekit still reads numpy.core
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from mergekit.tokenizer.build import build_tokenizer
    from mergekit.tokenizer.config import TokenEmbeddingConfig
    from mergekit.tokenizer.embed import PermutedVocabulary

THREE = [first, second, third]


def folders(path, tokenizers, rows=None):
    """Members a, b, ... and the names they have there."""
    found = []
    for i, tokenizer in enumerate(tokenizers):
        count = (rows or {}).get(i, len(tokenizer))
        folder = write_llama(path / "abcdefg"[i], tokenizer, seed=i, rows=count)
        found.append(Member(folder, Path(folder), count))
    return found


def theirs(members, base, source, tokens=None):
    """What mergekit builds, as (tokenizer, {name: {id: row}})."""
    refs = {m.name: ModelReference.model_validate(m.name) for m in members}
    source = refs.get(source, source)
    base = refs[base] if base else None
    info = build_tokenizer(base, list(refs.values()), source, False, tokens or [])
    return info, refs


def settings(token):
    manner = (token.lstrip, token.rstrip, token.single_word, token.normalized)
    return (*manner, token.special)


FAMILIES = {
    "two": lambda: [first(), second()],
    "three": lambda: [first(), second(), third()],
    "added": lambda: [first(), second(), fourth()],
    "unigram": unigrams,
    "wordpiece": pieces,
    "mixed": lambda: [first(), unigrams()[0]],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["union", "base", -1])
@pytest.mark.parametrize("base", [None, 0, -1])
@pytest.mark.filterwarnings("ignore")
def test_tokens(tmp_path, family, source, base):
    """The same tokens, the same rows of each, the same treatment of added tokens.

    Ids are the same too, but for the tokens of one model among themselves, which
    mergekit orders by chance.
    """
    members = folders(tmp_path, FAMILIES[family]())
    base = members[base].name if base is not None else None
    source = members[source].name if isinstance(source, int) else source
    info, refs = theirs(members, base, source)
    ours = vocabulary(members, base, Wish(source))
    tokens = info.tokenizer.get_vocab()
    assert ours.tokens.keys() == tokens.keys()
    assert sorted(ours.tokens.values()) == sorted(tokens.values())
    donor = next(m for m in members if m.name == ours.donor)
    own = {token: id for token, id in ours.tokens.items() if id < donor.rows}
    assert own == {token: id for token, id in tokens.items() if id < donor.rows}
    for member in members:
        rows = info.permutations[refs[member.name]]
        for token, id in tokens.items():
            mine = ours.rows.models[member.name][ours.tokens[token]]
            assert mine == rows[id], (member.name, token)
    block = blocks(ours.donor, members)
    assert list(map(block, ours.tokens)) == list(
        map(block, sorted(tokens, key=tokens.get))
    )
    if ours.tokenizer is not None:
        made = {t.content: t for t in ours.tokenizer.added_tokens_decoder.values()}
        want = {t.content: t for t in info.tokenizer.added_tokens_decoder.values()}
        assert made.keys() == want.keys()
        for content, token in want.items():
            assert settings(made[content]) == settings(token), content


def blocks(donor, members):
    """Of a token, the run within which the order is chance: by kind, then by model."""
    made = {m.name: load_tokenizer(m.folder) for m in members}
    own = made[donor].get_vocab()
    known = [tokenizer.get_vocab() for tokenizer in made.values()]
    added = [
        {t.content for t in tokenizer.added_tokens_decoder.values()}
        for tokenizer in made.values()
    ]

    def block(token):
        if token in own:
            return (0, own[token])
        if any(token in tokens for tokens in added):
            return (2, [token in tokens for tokens in added].index(True))
        return (1, [token in tokens for tokens in known].index(True))

    return block


def embed(info, refs, tensors, base, tokens, pad, axis=0):
    """mergekit's matrices."""
    task = PermutedVocabulary.model_construct(
        gather_tensors=None,
        tokenizer_task=None,
        tokens=ImmutableMap(tokens) if tokens else None,
        pad_to_multiple_of=pad,
        base_model=refs[base] if base else None,
        vocabulary_axis=axis,
    )
    given = {refs[name]: torch.from_numpy(x) for name, x in tensors.items()}
    out = task.execute(tokenizer_info=info, tensors=given)
    return {name: out[ref].numpy() for name, ref in refs.items()}


ENTRIES = {
    "none": {},
    "zero": {"d": Given(zero=True), "new": Given(zero=True)},
    "zero, forced": {
        "d": Given(zero=True, force=True),
        "a": Given(zero=True, force=True),
    },
    "model": {"d": Given("2"), "x": Given("0"), "a": Given("1")},
    "model, forced": {"d": Given("2", force=True), "a": Given("1", force=True)},
    "token": {"new": Given("1", token="hello"), "d": Given("1", token_id=9)},
    "token, forced": {
        "new": Given("1", token="hello", force=True),
        "a": Given("2", "q"),
    },
}


def their_entry(given):
    source = {"kind": "zero"}
    if not given.zero:
        source = given.model
        if given.token or given.token_id is not None:
            source = {"kind": "model_token", "model": given.model}
            source |= {"token": given.token} if given.token else {}
            source |= {} if given.token_id is None else {"token_id": given.token_id}
    value = {"source": source, "force": given.force}
    return TokenEmbeddingConfig.model_validate(value)


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("base", [None, 0, 2])
@pytest.mark.parametrize(("pad", "dtype"), [(None, np.float32), (8, np.float64)])
@pytest.mark.filterwarnings("ignore")
def test_rows(tmp_path, entries, base, pad, dtype):
    """Every row of every matrix, bit by bit; padding to the last digits."""
    count = {1: 12}
    members = folders(tmp_path, [build() for build in THREE], count)
    tokens = {
        token: given._replace(model=given.model and members[int(given.model)].name)
        for token, given in ENTRIES[entries].items()
    }
    base = members[base].name if base is not None else None
    info, refs = theirs(members, base, "union", list(tokens))
    ours = vocabulary(members, base, Wish("union", tokens, pad))
    draw = np.random.default_rng(0)
    tensors = {m.name: draw.standard_normal((m.rows, 5)).astype(dtype) for m in members}
    want = embed(
        info, refs, tensors, base, {t: their_entry(g) for t, g in tokens.items()}, pad
    )
    have = align(ours.rows, tensors)
    there = info.tokenizer.get_vocab()
    ids = [there[token] for token in ours.tokens]
    size = len(ids)
    for name in tensors:
        assert have[name].shape == want[name].shape
        assert have[name].dtype == want[name].dtype
        np.testing.assert_array_equal(have[name][:size], want[name][ids])
        np.testing.assert_allclose(have[name][size:], want[name][size:], rtol=1e-12)


def merged(path, config):
    """The tensors that mergekit merges, and its tokenizer's tokens."""
    options = MergeOptions(quiet=True, random_seed=0, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(path), options)
    return load_file(path / "model.safetensors"), load_tokenizer(path).get_vocab()


WHOLE = {
    "union": {"source": "union"},
    "base": {"source": "base"},
    "padded": {"source": "union", "pad_to_multiple_of": 16},
    "zero": {
        "source": "union",
        "tokens": {"d": {"source": {"kind": "zero"}, "force": True}},
    },
    "token": {
        "source": "union",
        "tokens": {
            "new": {"source": {"kind": "model_token", "model": "b", "token": "hello"}}
        },
    },
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.filterwarnings("ignore")
def test_whole_merge(tmp_path, monkeypatch, case):
    """Task arithmetic of two llamas with different tokenizers, embedding and head."""
    monkeypatch.chdir(tmp_path)
    members = [
        Member(name, Path(write_llama(name, make(), seed)), len(make()))
        for seed, (name, make) in enumerate([("a", first), ("b", second)])
    ]
    wanted = WHOLE[case]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": "a",
        "models": [{"model": "b", "parameters": {"weight": 0.25}}],
        "dtype": "float32",
        "tokenizer": wanted,
    }
    config = yaml.safe_load(yaml.safe_dump(config))
    want, there = merged(tmp_path / "out", config)
    entries = {
        "zero": {"d": Given(zero=True, force=True)},
        "token": {"new": Given("b", "hello")},
    }.get(case, {})
    wish = Wish(wanted["source"], entries, wanted.get("pad_to_multiple_of"))
    ours = vocabulary(members, "a", wish)
    ids = [there[token] for token in ours.tokens]
    size = len(ids)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        inputs = {
            m.name: load_file(m.folder / "model.safetensors")[name] for m in members
        }
        same = align(ours.rows, inputs)
        have = same["a"] + np.float32(0.25) * (same["b"] - same["a"])
        assert have.shape == want[name].shape
        near = {"rtol": 1e-6, "atol": 1e-6}
        np.testing.assert_allclose(have[:size], want[name][ids], **near)
        np.testing.assert_allclose(have[size:], want[name][size:], **near)


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_means(tmp_path):
    """mergekit adds in bfloat16 where it takes a mean; ours is the float32 mean.

    Both stay within the rounding of their own way: two models' mean has one sum.
    """
    members = folders(tmp_path, [first(), second(), third()])
    info, refs = theirs(members, None, "union")
    ours = vocabulary(members, None, Wish("union"))
    draw = np.random.default_rng(0)
    tensors = {
        m.name: draw.standard_normal((m.rows, 64)).astype(ml_dtypes.bfloat16)
        for m in members
    }
    task = PermutedVocabulary.model_construct(
        gather_tensors=None,
        tokenizer_task=None,
        tokens=None,
        pad_to_multiple_of=None,
        base_model=None,
        vocabulary_axis=0,
    )
    given = {
        refs[name]: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        for name, x in tensors.items()
    }
    out = task.execute(tokenizer_info=info, tensors=given)
    have = align(ours.rows, tensors)
    ids = [info.tokenizer.get_vocab()[token] for token in ours.tokens]
    for name, ref in refs.items():
        want = out[ref].float().numpy()[ids]
        mine = have[name].astype(np.float32)
        bound = 2.0**-8 * np.maximum(abs(want), 2.0**-8)
        differ = abs(mine - want) > bound
        assert differ.mean() < 0.01
        assert (mine == want).mean() > 0.9
