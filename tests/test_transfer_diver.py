"""DIVER against its naive twin, and what it becomes at the ends of its knobs."""

import functools

import jax.numpy as jnp
import naive_spans
import numpy as np
import pytest
import transferring as own
from transferring import KEY, TABLE, TABLES, log_softmax, logits

from collab_jax import decode
from collab_jax.combine import prefixed
from collab_jax.cooperate.transfer.diver import diver, diverging

START = [[0]] * 3
PROMPTS = [[3, 1, 5, 2], [6], [2, 2, 4]]
# what each text is about, behind a separator, of unequal lengths
SOURCES = [[6, 1, 2], [6, 4, 4, 3], [6, 5]]
NEW, EOS, SIZE = 9, (6,), 4


def sources():
    tokens, length = decode.pad(SOURCES)
    return tokens[:, None], length[:, None]


@functools.cache
def decoder(kind, farthest=False, lanes=3, size=SIZE):
    lm, _ = own.kinds()[kind]

    def make(knobs):
        ratio, strength = knobs
        return diver(
            prefixed(lm, 2),
            lm,
            4,
            NEW,
            ratio=ratio,
            spans=lanes,
            size=size,
            farthest=farthest,
            strength=strength,
            eos=EOS,
            chunk=2,
        )

    return decode.compile(make)


def found(kind, ratio, strength, *rest):
    _, (base, judge, *_) = own.kinds()[kind]
    params = (base, *decode.pad(PROMPTS)), (judge, *sources())
    knobs = jnp.array([ratio, strength])
    return decoder(kind, *rest)(knobs, params, *decode.pad(START), KEY)


def twin(kind, row, ratio, strength, farthest=False):
    lm, (base, judge, *_) = own.kinds()[kind]

    def say(new):
        separator, *asked = SOURCES[row]
        total, read = 0.0, [0, *new, separator]
        for token in asked:
            total += log_softmax(logits(lm, judge, read))[token]
            read.append(token)
        return strength * total

    def behind(text):
        return logits(lm, base, PROMPTS[row] + text)

    rest = {"farthest": farthest, "eos": EOS}
    return naive_spans.diver(behind, say, [], ratio, 3, SIZE, NEW, **rest)


@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("kind", ["table", "model"])
def test_is_its_twin(kind, farthest):
    texts = []
    for ratio, strength in ((0.4, 1.0), (0.25, 0.5), (0.4, 0.0)):
        result = found(kind, ratio, strength, farthest)
        for row in range(3):
            text = result.tokens[row, 1 : result.length[row]].tolist()
            texts.append(text)
            assert text == twin(kind, row, ratio, strength, farthest), (ratio, row)
    assert texts[:3] != texts[-3:], "the source makes a difference"
    assert decoder(kind, farthest)._cache_size() == 1


def test_both_variants_differ():
    texts = [found("table", 0.25, 0.5, farthest).tokens for farthest in (False, True)]
    assert (texts[0] != texts[1]).any()


def test_without_divergence_it_is_greedy():
    _, (base, *_) = own.kinds()["table"]
    params = base, *decode.pad(PROMPTS)
    greedy = decode.greedy(prefixed(TABLE, 2), NEW, eos=EOS)
    plain = decode.run(greedy, params, *decode.pad(START), KEY)
    for result in (found("table", 1.0, 1.0), found("table", 0.4, 1.0, False, 1)):
        assert own.same_text(result, plain)
        np.testing.assert_allclose(result.scores, plain.scores, rtol=1e-5)
    # spans of one token without a source: the likeliest of the likely
    single = found("table", 0.4, 0.0, False, 3, 1)
    assert own.same_text(single, plain)


def test_a_mistake_is_seen():
    """The source behind what was written before the span: equal for all spans."""
    with_source = found("table", 0.25, 1.0)
    without = found("table", 0.25, 0.0)
    assert not own.same_text(with_source, without)


def test_refuses():
    with pytest.raises(ValueError, match="alpha = 2"):
        diverging(2)
    params = (TABLES[0], *decode.pad(PROMPTS)), (TABLES[1], *sources())
    with pytest.raises(ValueError, match="9 spans over a vocabulary of 7"):
        decode.run(
            diver(prefixed(TABLE), TABLE, 4, 4, spans=9),
            params,
            *decode.pad(START),
            KEY,
        )
