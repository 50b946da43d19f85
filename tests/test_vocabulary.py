"""Vocabularies of merged models, and the rows of their matrices."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    bpe,
    first,
    fourth,
    pieces,
    second,
    third,
    unigrams,
)

from collab_jax.io.rows import Origin, Rows, align, check, unknown
from collab_jax.io.vocabulary import Given, Member, Wish, vocabulary


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three models a, b, c; b has three rows more than tokens."""
    out = []
    for name, make in zip("abc", (first, second, third), strict=True):
        tokenizer, folder = make(), tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folder)
        out.append(Member(name, folder, len(tokenizer) + 3 * (name == "b")))
    return out


def member(path, name, tokenizer, rows=None):
    folder = path / name
    tokenizer.save_pretrained(folder)
    return Member(name, folder, rows or len(tokenizer))


def naive(rows, tensors):
    """The rules of a missing row, one token at a time."""
    out = {}
    for name, x in tensors.items():
        made = []
        for id in range(rows.size):
            has = [m for m in tensors if rows.models[m][id] >= 0]
            origin = rows.origins.get(id)
            if rows.models[name][id] >= 0 and not (origin and origin.force):
                row = x[rows.models[name][id]]
            elif origin:
                zeros = np.zeros_like(x[0])
                row = (
                    zeros if origin.model is None else tensors[origin.model][origin.row]
                )
            elif rows.base in has:
                row = tensors[rows.base][rows.models[rows.base][id]]
            elif has:
                found = [tensors[m][rows.models[m][id]] for m in has]
                row = np.mean(np.stack(found).astype(np.float64), 0)
            else:
                row = np.zeros_like(x[0])
            made.append(np.asarray(row, np.float64))
        mean = np.mean(made, 0)
        made += [mean] * (rows.padded - rows.size)
        out[name] = np.stack(made)
    return out


@st.composite
def problems(draw):
    """Rows of one to four models over up to nine tokens, and random tensors."""
    size = draw(st.integers(1, 9))
    names = [f"m{i}" for i in range(draw(st.integers(1, 4)))]
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, tensors = {}, {}
    for name in names:
        count = int(random.integers(1, 12))
        own = random.permutation(max(count, size))[:size]
        rows[name] = np.where((own < count) & (random.random(size) < 0.7), own, -1)
        tensors[name] = random.standard_normal((count, 3)).astype(np.float32)
    origins = {}
    for id in range(size):
        if random.random() < 0.3:
            model = names[int(random.integers(len(names)))]
            model = None if random.random() < 0.4 else model
            row = 0 if model is None else int(random.integers(len(tensors[model])))
            origins[id] = Origin(model, row, bool(random.random() < 0.5))
    base = draw(st.sampled_from([None, *names]))
    padded = size + draw(st.integers(0, 3))
    return Rows(padded, rows, base, origins), tensors


@settings(max_examples=150, deadline=None)
@given(problems())
def test_rows_follow_the_rules(problem):
    """The vectorised rows are those of the rules, told token by token."""
    rows, tensors = problem
    want, have = naive(rows, tensors), align(rows, tensors)
    for name in tensors:
        assert have[name].dtype == np.float32
        np.testing.assert_allclose(have[name], want[name], rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(problems())
def test_another_axis(problem):
    """Tokens along the last axis give the same, transposed."""
    rows, tensors = problem
    turned = align(rows, {name: x.T for name, x in tensors.items()}, axis=1)
    for name, x in align(rows, tensors).items():
        np.testing.assert_array_equal(turned[name].T, x)


def test_blocks_do_not_matter(monkeypatch):
    """Means are taken in blocks of rows."""
    draw = np.random.default_rng(0)
    own = {"a": np.arange(50), "b": np.where(np.arange(50) % 3, -1, np.arange(50))}
    own["a"] = np.where(np.arange(50) % 5, own["a"], -1)
    rows = Rows(64, own, None, {})
    tensors = {n: draw.standard_normal((50, 4)).astype(np.float32) for n in "ab"}
    whole = align(rows, tensors)
    monkeypatch.setattr("collab_jax.io.rows._BLOCK", 48)
    for name, x in align(rows, tensors).items():
        np.testing.assert_array_equal(x, whole[name])


def test_means_are_taken_in_float32():
    """A sum in bfloat16 would round twice."""
    one = np.array([[1.0]], ml_dtypes.bfloat16)
    small = np.array([[2.0**-8]], ml_dtypes.bfloat16)
    own = {"a": [-1], "b": [0], "c": [0], "d": [0], "e": [0]}
    rows = Rows(1, {n: np.array(x) for n, x in own.items()}, None, {})
    tensors = {"a": one, "b": one, "c": small, "d": small, "e": small}
    have = align(rows, tensors)["a"]
    want = np.float32((1 + 3 * 2.0**-8) / 4).astype(ml_dtypes.bfloat16)
    assert have.dtype == ml_dtypes.bfloat16
    assert have[0, 0] == want
    twice = one + small + small + small  # the known wrong way
    assert (twice / ml_dtypes.bfloat16(4))[0, 0] != want


def test_what_fits_is_not_copied():
    rows = Rows(2, {"a": np.arange(2), "b": np.array([1, 0])}, None, {})
    x = np.eye(2, dtype=np.float32)
    out = align(rows, {"a": x, "b": x})
    assert out["a"] is x
    np.testing.assert_array_equal(out["b"], x[::-1])


@pytest.mark.parametrize(
    ("change", "shapes", "says"),
    [
        ({}, {"a": (2, 4), "b": (3, 4)}, "a has 2 rows for tokens, its tokenizer"),
        ({}, {"a": (3, 4), "b": (3, 5)}, "only the number of tokens may differ"),
        ({}, {"a": (3, 4), "z": (3, 4)}, "no tokenizer of z was read"),
        ({"origins": {1: Origin("b", 0, True)}}, {"a": (3, 4)}, "not merged here"),
        ({"origins": {1: Origin("a", 3, True)}}, {"a": (3, 4)}, "takes row 3 of a"),
    ],
)
def test_shapes_are_checked(change, shapes, says):
    rows = Rows(3, {"a": np.arange(3), "b": np.arange(3)}, None, {})
    with pytest.raises(ValueError, match=says):
        check(rows._replace(**change), shapes)


def test_union_starts_with_the_base(members):
    """The base keeps its ids; ordinary tokens come before added ones."""
    made = vocabulary(members, "b", Wish())
    own = ["b", "a", "c", "d", "cd", "ba", "hello", "<pad>", "</s>"]
    assert list(made.tokens) == [*own, "ab", "x", "q", "hey", "<s>"]
    assert made.donor == "b"
    assert made.special["eos_token_id"] == 8
    assert made.rows.models["a"].tolist()[:4] == [1, 0, 3, -1]
    added = {t.content: t for t in made.tokenizer.added_tokens_decoder.values()}
    assert added["<s>"].special
    assert not added["x"].special
    # the first model that adds a token says how
    assert any("'<s>' in another way" in note for note in made.notes)


def test_union_is_the_same_in_every_process(members):
    made = [list(vocabulary(members, None, Wish()).tokens) for _ in range(3)]
    assert made[0] == made[1] == made[2]


def test_ordinary_tokens_that_others_added(tmp_path):
    """They become added ones, and keep the base's ids."""
    two = [member(tmp_path, "a", fourth()), member(tmp_path, "b", second())]
    made = vocabulary(two, "a", Wish())
    added = {t.content: i for i, t in made.tokenizer.added_tokens_decoder.items()}
    assert added["hello"] == made.tokens["hello"] == 1
    assert "q" not in added


@pytest.mark.parametrize("family", [unigrams, pieces])
def test_other_kinds_of_tokenizers(tmp_path, family):
    one, two = family()
    both = [member(tmp_path, "a", one), member(tmp_path, "b", two)]
    made = vocabulary(both, None, Wish())
    assert made.tokens.keys() == one.get_vocab().keys() | two.get_vocab().keys()
    for name, tokenizer in (("a", one), ("b", two)):
        want = [tokenizer.get_vocab().get(token, -1) for token in made.tokens]
        assert made.rows.models[name].tolist() == want


@pytest.mark.parametrize("source", ["base", "c"])
def test_one_models_tokenizer(members, source):
    """Nothing is added, so that its files can be copied."""
    made = vocabulary(members, "b", Wish(source))
    donor = {"base": "b"}.get(source, source)
    assert made.donor == donor
    assert made.tokenizer is None
    own = made.rows.models[donor]
    assert own.tolist() == list(range(len(made.tokens)))


def test_the_first_model_stands_for_the_base(members):
    assert vocabulary(members, None, Wish("base")).donor == "a"


def test_padding(members):
    assert vocabulary(members, None, Wish("base", {}, 8)).rows.padded == 8
    assert vocabulary(members, None, Wish("base", {}, 7)).rows.padded == 7
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0, at least 1"):
        vocabulary(members, None, Wish("base", {}, 0))


def test_tokens_of_the_config(members):
    tokens = {
        "new": Given("b", token="hello"),
        "d": Given("b", token_id=11),  # a row without a token
        "x": Given("a", force=True),
        "zero": Given(zero=True),
    }
    made = vocabulary(members, "a", Wish("base", tokens))
    assert list(made.tokens)[-3:] == ["new", "d", "zero"]
    assert made.rows.origins == {
        made.tokens["new"]: Origin("b", 6, False),
        made.tokens["d"]: Origin("b", 11, False),
        made.tokens["x"]: Origin("a", 4, True),
        made.tokens["zero"]: Origin(None, -1, False),
    }
    assert made.tokenizer is not None


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Wish("z"), "tokenizer source z is none of the models"),
        (Wish(tokens={"x": Given("z")}), "a row of z, which is none of the models"),
        (Wish(tokens={"x": Given("b")}), "b has no token 'x'"),
        (Wish(tokens={"n": Given("b", "nil")}), "b has no token 'nil'"),
        (Wish(tokens={"n": Given("b", token_id=99)}), "is 99, b has 12 rows"),
        (Wish(tokens={"n": Given("b", token_id=-1)}), "is -1, b has 12 rows"),
        (Wish(tokens={"n": Given()}), "no model has this token"),
        (Wish(tokens={"a": Given(force=True)}), "force needs one"),
    ],
)
def test_wishes_that_cannot_be(members, wish, says):
    with pytest.raises(ValueError, match=says) as error:
        vocabulary(members, "a", wish)
    assert "\n" not in str(error.value)


def test_sourceless_tokens_change_nothing(members):
    made = vocabulary(members, "a", Wish(tokens={"d": Given()}))
    assert made.rows.origins == {}
    assert made.tokens == vocabulary(members, "a", Wish()).tokens


def test_missing_and_damaged_tokenizers(members, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"z: .* holds no tokenizer"):
        vocabulary([*members, Member("z", tmp_path, 3)], None, Wish())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="z: its tokenizer cannot be read"):
        vocabulary([*members, Member("z", tmp_path, 3)], None, Wish())
    with pytest.raises(ValueError, match="base_model z is none of the models"):
        vocabulary(members, "z", Wish())


def test_more_tokens_than_rows(tmp_path):
    """A token beyond the rows of its model is one that the model lacks."""
    two = [member(tmp_path, "a", first(), 6), member(tmp_path, "b", second())]
    made = vocabulary(two, None, Wish())
    assert made.rows.models["a"][6] == -1
    assert made.rows.models["b"][6] == 8
    assert any("a has 6 rows for 7 tokens; '</s>' (6)" in note for note in made.notes)
    alone = vocabulary(two[:1], None, Wish("base"))
    assert unknown(alone.rows, ["a"]).tolist() == [6]
    assert any("get zeros: '</s>'" in note for note in alone.notes)
    x = np.ones((6, 2), np.float32)
    assert align(alone.rows, {"a": x})["a"][6].tolist() == [0, 0]


def test_tokens_that_only_a_stranger_has(members):
    """The source of the tokenizer need not be merged; what only it has is zero."""
    made = vocabulary(members, "a", Wish("c"))
    names = list(made.tokens)
    assert [names[i] for i in unknown(made.rows, ["a", "b"])] == ["q", "hey"]


def test_saved_union_encodes(members, tmp_path):
    from collab_jax.io.tokenizer import load_tokenizer

    made = vocabulary(members, "a", Wish())
    made.tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == made.tokens
    assert again("abhello</s>").input_ids == [
        made.tokens[t] for t in ("ab", "hello", "</s>")
    ]


def test_equal_tokenizers_are_read_once(members, tmp_path, monkeypatch):
    from collab_jax.io import vocabulary as module

    read = []
    load = module.load_tokenizer
    monkeypatch.setattr(
        module, "load_tokenizer", lambda folder: read.append(folder) or load(folder)
    )
    twin = member(tmp_path, "twin", first())
    made = vocabulary([*members, twin], None, Wish())
    assert len(read) == 3
    same = made.rows.models["twin"] == made.rows.models["a"]
    assert same.all()


@pytest.mark.parametrize("lazy", [True, False])
def test_mapped_and_device_arrays(tmp_path, lazy):
    """What a checkpoint gives is read-only and mapped; a tree holds jax arrays."""
    import jax.numpy as jnp

    from collab_jax.io import safetensors

    x = np.arange(8, dtype=np.float32).reshape(4, 2).astype(ml_dtypes.bfloat16)
    if lazy:
        path = tmp_path / "x.safetensors"
        safetensors.write(path, {"x": safetensors.Layout(x.dtype, x.shape)}, [x])
        read = safetensors.open_file(path).read("x")
    else:
        read = jnp.asarray(x)
    rows = Rows(3, {"a": np.array([3, -1]), "b": np.array([0, 1])}, None, {})
    out = align(rows, {"a": read, "b": read})
    assert out["a"].dtype == x.dtype
    assert out["a"].tolist() == [[6, 7], [2, 3], [4, 5]]
    assert out["b"].tolist() == [[0, 1], [2, 3], [1, 2]]


def test_a_hole_in_the_ids(tmp_path):
    """Ids without a token have rows, like padding."""
    tokenizer = bpe(["a", "b"])
    folder = tmp_path / "h"
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer.json")
    path.write_text(path.read_text().replace('"b": 1', '"b": 4'))
    made = vocabulary([Member("h", folder, 5)], None, Wish("base"))
    assert made.tokens == {"a": 0, "b": 4}
    assert made.rows.models["h"].tolist() == [0, -1, -1, -1, 4]


def test_a_wrong_rule_is_seen():
    """The mean where the base has the token is the likely mistake."""
    own = {"a": np.array([0]), "b": np.array([0]), "c": np.array([-1])}
    tensors = {n: np.full((1, 2), i + 1, np.float32) for i, n in enumerate("abc")}
    right, wrong = Rows(1, own, "a", {}), Rows(1, own, None, {})
    assert align(right, tensors)["c"].tolist() == [[1, 1]]
    assert align(wrong, tensors)["c"].tolist() == [[1.5, 1.5]]
    assert np.abs(naive(right, tensors)["c"] - align(wrong, tensors)["c"]).max() > 0.1
