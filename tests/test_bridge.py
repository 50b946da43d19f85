"""Bridges of two tokenizers: what spells what, and what is refused."""

import itertools

import numpy as np
import pytest
from small_tokenizers import bpe, first, second
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from collab_jax.io import hub
from collab_jax.io.bridge import bridge, fewest
from collab_jax.io.tokenizer import load_tokenizer, token_bytes
from collab_jax.translate import spell

WORDS = ["<unk>", "<s>", "</s>", "<0x61>", "<0xC3>", "<0xA9>", "a", "▁", "▁a", "b"]


def pieces(words=WORDS, **names):
    """Like SentencePiece: spaces are blocks, bytes have tokens of their own."""
    made = Tokenizer(
        models.BPE(
            {w: i for i, w in enumerate(words)}, [("▁", "a")], byte_fallback=True
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens([w for w in words if w in ("<unk>", "<s>", "</s>")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def bytewise():
    words = ["Ġ", "a", "Ã", "©", "b", "Ã©", "Ġb", "Ġab"]
    return bpe(words, ["Ã ©", "Ġ b"], special=["<end>"], eos_token="<end>")


def words(found, names, others):
    """Spellings by name."""
    table, size = np.asarray(found.spelling), np.asarray(found.size)
    return {
        names[v]: [others[u] for u in table[v, : size[v]]] for v in range(len(names))
    }


def test_spaces_and_bytes_are_the_same_however_they_are_written():
    ours, theirs = bytewise(), pieces()
    names = ours.convert_ids_to_tokens(range(9))
    found = bridge(ours, theirs, fallback=0)
    assert words(found, names, WORDS) == {
        "Ġ": ["▁"],
        "a": ["a"],
        "Ã": ["<0xC3>"],
        "©": ["<0xA9>"],
        "b": ["b"],
        "Ã©": ["<0xC3>", "<0xA9>"],
        "Ġb": ["▁", "b"],
        "Ġab": ["▁a", "b"],
        "<end>": ["</s>"],
    }
    drawn = {WORDS[u]: names[v] for u, v in enumerate(found.pivot.tolist()) if v >= 0}
    assert drawn == {
        "</s>": "<end>", "<0xC3>": "Ã", "<0xA9>": "©", "a": "a", "▁": "Ġ", "b": "b"
    }  # fmt: skip


def test_a_byte_by_its_number_is_read_but_not_drawn():
    ours, theirs = pieces(), bytewise()
    found = bridge(ours, theirs, fallback=1)
    a, by_number = WORDS.index("a"), WORDS.index("<0x61>")
    assert spell(found, [by_number, a]) == [1, 1]
    assert found.pivot[1] == a
    assert found.pivot[8] == WORDS.index("</s>")
    assert spell(found, [WORDS.index("<unk>")]) == [1]


def test_texts_keep_their_bytes():
    ours, theirs = bytewise(), pieces()
    own, other = token_bytes(ours), token_bytes(theirs)
    found = bridge(ours, theirs)
    for text in itertools.product(range(8), repeat=3):
        read = b"".join(other[u] for u in spell(found, text))
        assert read == b"".join(own[v] for v in text)


def test_special_tokens_are_twins_by_wish_name_and_role():
    ours = pieces()
    extra = ["<|end|>", "<s>", "go"]
    theirs = bpe(["a", "<", "s", ">", "/", "b"], special=extra, eos_token="<|end|>")
    end, start, go = 6, 7, 8
    found = bridge(ours, theirs, fallback=0)
    assert spell(found, [1, 2]) == [start, end]
    found = bridge(ours, theirs, twins={"<s>": "go", "<unk>": "go"}, fallback=0)
    assert spell(found, [0, 1, 2]) == [go, go, end]
    assert found.pivot[go] == 0  # the first of the two
    assert found.pivot[start] == -1
    ours.eos_token = None
    found = bridge(ours, theirs, fallback=0)
    assert spell(found, [2]) == [1, 4, 2, 3]  # as text
    assert found.pivot[end] == -1


def test_rows_of_a_model_beyond_its_tokens():
    found = bridge(bytewise(), pieces(), vocab=12, member_vocab=16)
    assert found.size.shape == (12,)
    assert found.pivot.shape == (16,)
    assert not found.shared()[9:].any()
    less = bridge(bytewise(), pieces(), vocab=5, member_vocab=9, fallback=0)
    assert less.size.shape == (5,)
    assert spell(less, [4]) == [0]  # b is beyond the member's rows


def test_the_fewest_tokens_against_every_spelling():
    known = {b"a": 0, b"b": 1, b"ab": 2, b"bab": 3, b"aba": 4, b"bb": 5}

    def every(text):
        if not text:
            return [[]]
        return [
            [token, *rest]
            for piece, token in known.items()
            if text.startswith(piece)
            for rest in every(text[len(piece) :])
        ]

    for size in range(1, 7):
        for text in itertools.product([b"a", b"b", b"c"], repeat=size):
            whole = b"".join(text)
            found = fewest(whole, known, 3)
            options = every(whole)
            assert bool(found) == bool(options)
            if options:
                assert found in options
                assert len(found) == min(map(len, options))


def test_what_cannot_be_bridged_is_refused():
    with pytest.raises(ValueError, match=r"2 tokens cannot be spelled .* 'x', '<s>'"):
        bridge(first(), second())
    assert spell(bridge(first(), second(), fallback=3), [4, 2]) == [3, 1, 0]
    with pytest.raises(ValueError, match="pivot has no special token 'a'"):
        bridge(first(), second(), twins={"a": "b"}, fallback=0)
    with pytest.raises(ValueError, match="member has no special token 'z'"):
        bridge(first(), second(), twins={"<s>": "z"}, fallback=0)
    with pytest.raises(ValueError, match="no token of"):
        bridge(bpe(["a"]), bpe(["b"]), fallback=0)


@pytest.mark.real
def test_real_tokenizers():
    """English is spelled in few tokens, and keeps its bytes."""
    names = "smollm2-135m-instruct", "gemma-3-270m"
    made = [load_tokenizer(hub.fetch(name)) for name in names]
    text = "The café's naïve owner wrote:\n\n    if x == 12: return 'ok' # 東京\n" * 3
    for ours, theirs in (made, made[::-1]):
        found = bridge(ours, theirs, fallback=theirs.eos_token_id)
        ids = ours(text, add_special_tokens=False).input_ids
        read = spell(found, ids)
        content = token_bytes(theirs)
        assert b"".join(content[u] for u in read).decode() == text
        assert len(read) < 1.5 * len(ids)
        assert 40_000 < int(found.shared().sum()) < 50_000
