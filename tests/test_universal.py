"""Greedy decoding with a draft of any tokenizer, and text cut anew on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec
from small_tokenizers import bpe
from speculation import new_tokens
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from collab_jax import decode, lm
from collab_jax.cooperate.efficient.universal import universal
from collab_jax.io.retokenize import Retokenizer, retokenizer
from collab_jax.io.tokenizer import token_bytes
from collab_jax.models import table
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer

OURS = ["a", "b", "c", "ab", "Ġ", "Ġab", "Ã", "©", "Ã©", "bc"]
THEIRS = ["c", "b", "a", "Ġ", "ca", "Ġc", "©", "Ã"]
TARGET = bpe(
    OURS, ["a b", "Ġ ab", "Ã ©", "b c"], special=["<end>", "<go>"], eos_token="<end>"
)
DRAFT = bpe(THEIRS, ["c a", "Ġ c"], special=["<|end|>"], eos_token="<|end|>")
BOTH = retokenizer(TARGET, DRAFT)
END, GO, THEIR_END = 10, 11, 8


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_text_is_cut_as_each_tokenizer_cuts_it():
    text = "ab cab abc\u00e9"
    assert BOTH.to_draft(ids(TARGET, text)) == ids(DRAFT, text)
    for cut in range(len(text)):
        mine, new = ids(TARGET, text[:cut]), ids(DRAFT, text[cut:])
        found = BOTH.to_target(mine, new)
        assert mine + found in (ids(TARGET, text), mine + ids(TARGET, text[cut:]))


def test_a_word_is_cut_with_what_stands_before_it():
    """Alone, ab would be two tokens fewer of one space; c after b would be bc."""
    assert BOTH.to_target(ids(TARGET, "ab c"), ids(DRAFT, " ab")) == [5]
    mine = ids(TARGET, "a")
    assert BOTH.to_target(mine, ids(DRAFT, "b")) == [1]  # not ab: a stands
    assert retokenizer(TARGET, DRAFT, window=1).to_target([0, 5], [0]) == [2]


def test_special_tokens_go_along_and_end_a_draft():
    assert BOTH.to_draft([GO, 0, END, 3]) == [2, THEIR_END, 2, 1]
    assert BOTH.to_target([0], [2, THEIR_END, 2]) == [0, END]
    assert BOTH.to_draft([GO]) == [THEIR_END]  # something has to be read
    opened = retokenizer(TARGET, DRAFT, start=[3], twins={"<go>": "<|end|>"})
    assert opened.to_draft([GO]) == [3, THEIR_END]


def test_half_a_character_waits():
    first = OURS.index("Ã")
    assert BOTH.to_draft([0, first]) == [2]
    assert BOTH.to_target([0, first], [7, 6]) == []
    assert BOTH.to_target([0], [2, 7]) == [0]
    assert BOTH.to_target([0], [7, 6]) == [8]


def test_tokenizers_that_begin_with_a_space():
    made = Tokenizer(
        models.BPE(
            {w: i for i, w in enumerate(["▁", "a", "▁a", "b", "<0x63>", "<unk>"])},
            [("▁", "a")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    there, back = retokenizer(TARGET, theirs), retokenizer(theirs, DRAFT)
    assert there.to_draft(ids(TARGET, "ab c")) == [2, 3, 0, 4]
    assert back.to_target(ids(theirs, "b"), ids(DRAFT, "ab")) == [1, 3]
    assert back.to_target(ids(theirs, "b"), ids(DRAFT, " ab")) == [2, 3]


def test_a_draft_of_other_tokens_is_accepted():
    """Both say abcabc..., as ab c and as a b ca b ca."""
    big = jnp.zeros((13, 12))
    for one, two in ((3, 2), (2, 3)):  # ab -> c -> ab
        big = big.at[one, two].set(1.0)
    small = jnp.zeros((10, 9))
    for one, two in ((2, 1), (1, 4), (4, 1), (0, 2)):  # a -> b -> ca -> b, c -> a
        small = small.at[one, two].set(1.0)
    model = table.language_model(1)
    run = universal(model, model, BOTH, 4, 16)
    result = run((big, small), [[3], [3, 2, 3, 2]])
    for row in range(2):
        assert new_tokens(result, row) == ([2, 3] * 8 if row == 0 else [3, 2] * 8)
    assert (result.info.accepted >= 2 * result.info.calls).all()
    assert result.length.tolist() == [17, 20]
    # the control: the same numbers, not the same text
    by_number = Retokenizer(lambda text: [*text], lambda text, new: [*new])
    worse = universal(model, model, by_number, 4, 16)((big, small), [[3], [3, 2, 3, 2]])
    np.testing.assert_array_equal(worse.tokens, result.tokens)
    assert worse.info.accepted.sum() < 0.5 * result.info.accepted.sum()


def llama(vocab, seed):
    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    )
    params = init(jax.random.key(seed), config)
    params = jax.tree.map(lambda x: 5.0 * x if x.ndim > 1 else x, params)
    return lm.language_model(transformer(config)), params


@pytest.mark.parametrize("chunk", [3, 128])
def test_text_is_that_of_plain_greedy(chunk):
    """Ragged rows that end in the middle of a block; a draft that never sees a word."""
    (big, p), (small, q) = llama(12, 0), llama(9, 1)
    prompts = [[3, 2], ids(TARGET, "ab cab \u00e9ab"), [GO, 0], [1]]
    free = spec.draws(decode.greedy(big, 20), p, prompts)
    eos = [new_tokens(free, 0)[6]]
    expected = spec.draws(decode.greedy(big, 20, eos=eos), p, prompts)
    run = universal(big, small, BOTH, 3, 20, eos=eos, chunk=chunk)
    found = run((p, q), prompts)
    for row in range(len(prompts)):
        assert new_tokens(found, row) == new_tokens(expected, row)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    np.testing.assert_allclose(found.info.logprob, expected.info.logprob, atol=1e-4)
    assert found.length.tolist() == expected.length.tolist()
    assert (found.info.calls <= np.asarray(expected.info.calls)).all()


def test_a_perfect_draft_is_accepted_whole():
    """The draft is the target; its cache follows the text, and grows with it."""
    (big, p), whole = llama(12, 0), retokenizer(TARGET, TARGET)
    same = Retokenizer(lambda text: [*text], lambda text, new: [*new])
    prompts = [[3, 2], [1, 2, 0, 4]]
    expected = spec.draws(decode.greedy(big, 40), p, prompts)
    found = universal(big, big, same, 4, 40, chunk=2)((p, p), prompts)
    cut = universal(big, big, whole, 4, 40, chunk=2)((p, p), prompts)
    for row in range(2):
        assert new_tokens(found, row) == new_tokens(expected, row)
        assert new_tokens(cut, row) == new_tokens(expected, row)
    assert found.info.calls.tolist() == [8, 8]
    assert found.info.accepted.tolist() == found.info.drafted.tolist()


def test_bytes_are_those_of_the_text():
    table_ = token_bytes(TARGET)
    for text in ("ab c", "\u00e9\u00e9", "cab"):
        assert b"".join(table_[i] for i in ids(TARGET, text)).decode() == text


def test_bad_sizes_are_refused():
    model = table.language_model(1)
    with pytest.raises(ValueError, match="length = 0"):
        universal(model, model, BOTH, 0, 4)
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        universal(model, model, BOTH, 2, 0)
    with pytest.raises(ValueError, match="no special token"):
        retokenizer(TARGET, DRAFT, twins={"<nothing>": "<|end|>"})
    with pytest.raises(FloatingPointError, match="NaN"):
        universal(model, model, BOTH, 2, 4)(
            (jnp.full((13, 12), jnp.nan), jnp.zeros((10, 9))), [[1]]
        )
