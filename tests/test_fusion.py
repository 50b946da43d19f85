"""A task model and a prompted one, fused: twins, identities, beams, vocabularies."""

import jax
import jax.numpy as jnp
import marians
import naive_beam
import numpy as np
import pytest
import transferring as own
import vocabularies as voc
from transferring import KEY, TABLE, TABLES

from collab_jax import beam, decode
from collab_jax.combine import prefixed
from collab_jax.ensemble.fusion import fused, prompted
from collab_jax.models.marian import translator
from collab_jax.testing import check_lm
from collab_jax.translate import from_spellings

WEIGHTS = (0.0, 0.3, 1.0)
PROMPTS = [[3, 1, 5, 2], [6], [2, 2, 4]]  # of the language model
SOURCES = [[2], [6, 1, 1, 0, 5], [4, 0]]  # of a task model that is a prompted table
START = [[0]] * 3


def mean(weight, laws):
    """Log-probs of the weighted mean, in float64."""
    with np.errstate(divide="ignore"):
        total = weight * np.exp(laws[0]) + (1 - weight) * np.exp(laws[1])
        return np.log(total / total.sum())


def tables():
    """Both are tables: the first is told its source as a prompt."""

    def make(weight):
        return fused(prefixed(TABLE, 2), TABLE, 0.5 if weight is None else weight)

    task = TABLES[0], *decode.pad(SOURCES)

    def law(weight):
        def read(text, row):
            texts = [prompts[row] + text[1:] for prompts in (SOURCES, PROMPTS)]
            laws = zip(TABLES, texts, strict=False)
            return mean(weight, [own.log_softmax(own.logits(TABLE, *x)) for x in laws])

        return read

    return own.knobbed(make), prompted(task, TABLES[1], PROMPTS), law


def test_twin_target_draft_and_laws():
    lm, params, law = tables()
    cases = {str(w): ((jnp.array(w), params), law(w)) for w in WEIGHTS}
    own.check_methods(lm, cases, START, laws=("0.3",))


MADE = marians.config("apart")


def translating():
    """A Marian and a small Llama of one vocabulary."""
    lm, params = voc.small(MADE.vocab, 3)
    source = marians.sources(MADE)
    task = marians.params(MADE), *source
    prompts = [[4, 1, 7], [9], [3, 3, 8, 2, 6]]
    program = decode.compile(
        lambda w: beam.search(fused(translator(MADE), lm, w), 6, 3, eos=MADE.eos)
    )
    read = jax.jit(lm.extend)
    write = jax.jit(translator(MADE).extend)

    def last(run, model, params, text):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(text)] = text
        out, _ = run(params, model.init(params, 1, 16), padded)
        return own.log_softmax(np.asarray(out.logits)[0, len(text) - 1])

    def law(weight, row):
        tokens, length = source
        one = (task[0], tokens[row : row + 1], length[row : row + 1])

        def behind(text):
            first = last(write, translator(MADE), one, text)
            other = last(read, lm, params, prompts[row] + text[1:])
            return mean(weight, [first, other])

        return behind

    return program, prompted(task, params, prompts), law


def test_beams_of_a_translator_and_a_language_model():
    program, params, law = translating()
    start = decode.pad([[MADE.start]] * 3)
    texts = []
    for weight in WEIGHTS:
        found = program(weight, params, *start, KEY)
        texts.append(found.tokens.tolist())
        for row in range(3):
            ended = naive_beam.search(
                law(weight, row), [MADE.start], 3, 6, eos=MADE.eos
            )
            beams = found.info.beams
            mine = [
                tokens[:length]
                for tokens, length in zip(
                    beams.tokens[row].tolist(), beams.length[row].tolist(), strict=True
                )
            ]
            assert mine == [text for _, text in ended]
            scores = [score for score, _ in ended]
            np.testing.assert_allclose(beams.score[row], scores, rtol=2e-4)
    assert program._cache_size() == 1
    assert texts[0] != texts[2]  # the members disagree


def test_a_weight_of_0_or_1_is_one_member():
    """Beam for beam what each member finds alone, with its own prompt."""
    lm, params, _ = tables()
    start = decode.pad(START)
    task, told = params
    prompts = {0.0: (TABLES[1], PROMPTS), 1.0: (TABLES[0], SOURCES)}
    for weight, (trees, texts) in prompts.items():
        knobs = jnp.array(weight), (task, told)
        found = decode.run(beam.search(lm, 4, 3), knobs, *start, KEY)
        alone = decode.run(beam.search(TABLE, 4, 3), trees, *decode.pad(texts), KEY)
        beams = found.info.beams, alone.info.beams
        np.testing.assert_array_equal(beams[0].tokens, beams[1].tokens)
        np.testing.assert_allclose(beams[0].score, beams[1].score, rtol=1e-5)


# the text's tokens are the task model's: words and a start; the other has other words
WORDS = ["a", "b", "ab", "c", "<p>"]
OTHER = voc.WORDS[1]


def bridges():
    same = from_spellings([[v] for v in range(5)], 5)
    spellings = [voc.spelled(word, OTHER) for word in WORDS[:4]]
    made = from_spellings([*spellings, [4, 4]], len(OTHER), aliases=[4])
    home = [WORDS.index(w) if w in WORDS else -1 for w in OTHER]
    return same, made._replace(pivot=jnp.array(home, jnp.int32))


def test_two_vocabularies():
    first, second = voc.LMS
    task = voc.table.init(jax.random.key(5), 5, 2, scale=2.0)
    other, prompts = voc.PARAMS[1], [[3, 5], [0], [2, 4, 1]]
    lm = fused(first, second, 0.4, bridges=bridges(), start=4, ratio=3.0)
    params = prompted(task, other, prompts)

    def law(text, row):
        spelt = [u for v in text[1:] for u in voc.spelled(WORDS[v], OTHER)]
        z = voc.table_logits(other, 1, prompts[row] + spelt)
        theirs = np.zeros(5)
        for u, p in enumerate(voc.softmax(z)):
            if OTHER[u] in WORDS:
                theirs[WORDS.index(OTHER[u])] += p
        ours = own.log_softmax(voc.table_logits(task, 2, text))
        with np.errstate(divide="ignore"):
            return mean(0.4, [ours, np.log(theirs / theirs.sum())])

    start = decode.pad([[4]] * 3)
    found = decode.run(decode.greedy(lm, own.NEW), params, *start, KEY)
    own.check_twin(found, law, [[4]] * 3)
    check_lm(lm, params, 5, tolerance=1e-6, jit=True)
    # the prompts of the rows exchanged are another ensemble
    wrong = prompted(task, other, prompts[::-1])
    swapped = decode.run(decode.greedy(lm, own.NEW), wrong, *start, KEY)
    with pytest.raises(AssertionError):
        own.check_twin(swapped, law, [[4]] * 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fused(TABLE, TABLE, 1.2), "weight = 1.2"),
        (lambda: fused(TABLE, TABLE, 0.5, bridges=bridges()), "start = None"),
        (lambda: fused(TABLE, TABLE, 0.5, bridges=bridges(), start=5), "0 to 4"),
        (lambda: fused(TABLE, TABLE, 0.5, bridges=bridges()[:1]), "1 bridges for 2"),
        (lambda: prompted((), (), [[1], []]), r"prompts of \[1, 0\] tokens"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_weight_has_a_slope():
    lm, params, _ = tables()
    text = jnp.array([[0, 1, 2, 3, 4, 5]] * 3)

    def nats(weight):
        knobs = weight, params
        out, _ = lm.extend(knobs, lm.init(knobs, 3, 6), text)
        log_p = jax.nn.log_softmax(out.logits[:, :-1])
        return -jnp.take_along_axis(log_p, text[:, 1:, None], 2).mean()

    near = [float(jax.jit(nats)(w)) for w in (0.299, 0.301)]
    slope = float(jax.grad(nats)(0.3))
    assert slope == pytest.approx((near[1] - near[0]) / 0.002, rel=0.02)
