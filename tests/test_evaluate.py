"""The evaluator against sums written out, on the exact table LM."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import evaluate
from collab_jax.evaluate import Choice, Question, Result
from collab_jax.models import table
from collab_jax.respond import Codec, from_lm

KEY = jax.random.key(0)
# token 0 starts an empty text; "ab" and " b" are tokens beside the letters
PIECES = ["<s>", "ab", " b", "a", "b", "c", " ", "\u00e9"]


def tokenize(text):
    ids = []
    while text:
        piece = next(p for p in PIECES if text.startswith(p))
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids or [0]


CODEC = Codec(
    lambda texts: [tokenize(text) for text in texts],
    lambda ids: "".join(PIECES[i] for i in ids),
)
LM = table.language_model(order=2)
PARAMS = table.init(jax.random.key(1), vocab=8, order=2, scale=2.0)
LAW = np.asarray(jax.nn.log_softmax(PARAMS), np.float64)


def likelihood(ids, shared):
    """log p(ids[shared:] | ids[:shared]), one look-up a token."""
    total = 0.0
    for t in range(shared, len(ids)):
        last = ids[t - 1] if t else 8
        before = ids[t - 2] if t > 1 else 8
        total += LAW[last + 9 * before, ids[t]]
    return total


def tasks():
    random = np.random.default_rng(0)
    words = ["".join(w) for n in (1, 2, 3) for w in itertools.product("abc", repeat=n)]
    return [
        Choice(
            " ".join(random.choice(words, random.integers(1, 30))),
            tuple(random.choice(words, random.integers(2, 5), replace=False)),
            int(random.integers(2)),
        )
        for _ in range(9)
    ]


def test_likelihoods_are_sums_over_the_choice():
    judge = evaluate.by_likelihood(LM, CODEC, batch_size=4)
    found = judge(PARAMS, tasks())
    for task, result in zip(tasks(), found, strict=True):
        prompt = tokenize(task.prompt)
        expected, counts = [], []
        for choice in task.choices:
            ids = tokenize(f"{task.prompt} {choice}")
            assert ids[: len(prompt)] == prompt
            expected.append(likelihood(ids, len(prompt)))
            counts.append(len(ids) - len(prompt))
        # " b..." begins with a token of its own, " a..." with the blank alone
        np.testing.assert_allclose(result.detail["logprob"], expected, rtol=1e-5)
        assert result.detail["tokens"] == counts
        sizes = [len(choice) for choice in task.choices]
        best = {
            "sum": np.argmax(expected),
            "token": np.argmax(np.array(expected) / counts),
            "byte": np.argmax(np.array(expected) / sizes),
        }
        assert result.correct == {
            rule: pick == task.answer for rule, pick in best.items()
        }
        json.dumps(result.detail)


def test_a_record_does_not_depend_on_its_batch():
    judge = evaluate.by_likelihood(LM, CODEC, batch_size=4)
    together = judge(PARAMS, tasks())
    for task, result in zip(tasks(), together, strict=True):
        alone = judge(PARAMS, [task])[0]
        np.testing.assert_allclose(
            alone.detail["logprob"], result.detail["logprob"], rtol=1e-6
        )


def test_merged_tokens_are_scored_alike_for_all_choices():
    # "ca" + "b" is c, ab: the choice eats the last token of the prompt
    task = Choice("ca", ("b", "c"), 0)
    judge = evaluate.by_likelihood(LM, CODEC, between="")
    result = judge(PARAMS, [task])[0]
    expected = [likelihood([5, 1], 1), likelihood([5, 3, 5], 1)]
    np.testing.assert_allclose(result.detail["logprob"], expected, rtol=1e-5)
    assert result.detail["tokens"] == [1, 2]
    # the control: dropping as many tokens as the prompt has leaves nothing of "b"
    assert likelihood([5, 1], 2) == 0


def test_an_empty_prompt_starts_from_the_start_token():
    result = evaluate.by_likelihood(LM, CODEC)(PARAMS, [Choice("", ("a", "bc"), 0)])[0]
    expected = [likelihood([0, 3], 1), likelihood([0, 4, 5], 1)]
    np.testing.assert_allclose(result.detail["logprob"], expected, rtol=1e-5)
    # and so does a prompt whose only token merges with the choice
    judge = evaluate.by_likelihood(LM, CODEC, between="")
    result = judge(PARAMS, [Choice("a", ("b", "c"), 0)])[0]
    expected = [likelihood([0, 1], 1), likelihood([0, 3, 5], 1)]
    np.testing.assert_allclose(result.detail["logprob"], expected, rtol=1e-5)


def test_bytes_are_counted_in_utf8():
    result = evaluate.by_likelihood(LM, CODEC)(
        PARAMS, [Choice("a", ("b", "\u00e9"), 0)]
    )
    assert result[0].detail["bytes"] == [1, 2]


def test_other_parameters_do_not_retrace():
    traces = []

    def extend(params, state, tokens):
        traces.append(tokens.shape)
        return LM.extend(params, state, tokens)

    judge = evaluate.by_likelihood(LM._replace(extend=extend), CODEC)
    judge(PARAMS, tasks())
    first = len(traces)
    judge(PARAMS + 1, tasks()[::-1])
    assert len(traces) == first


def test_results_are_reported_once_each():
    seen = {}
    judge = evaluate.by_likelihood(LM, CODEC, batch_size=4)
    found = judge(PARAMS, tasks(), lambda i, result: seen.setdefault(i, result))
    assert [seen[i] for i in range(9)] == found


def test_capacity_and_nan_are_refused():
    judge = evaluate.by_likelihood(LM, CODEC, capacity=4)
    with pytest.raises(ValueError, match="record 1 has 7 tokens"):
        judge(PARAMS, [Choice("a", ("a", "b"), 0), Choice("ccccc", ("a", "b"), 0)])
    with pytest.raises(FloatingPointError, match="record 0"):
        judge(PARAMS * jnp.nan, [Choice("a", ("a", "b"), 0)])


def test_generation_is_graded_by_every_measure():
    follow = {3: 4, 4: 5, 5: 0}  # a, b, c, then the start token, which ends
    params = jnp.stack(
        [20.0 * (jnp.arange(8) == follow.get(last, 0)) for last in range(9)]
    )
    codec = CODEC._replace(eos=(0,))
    ask = from_lm(table.language_model(order=1), params, codec, max_new_tokens=4)
    results = evaluate.by_generation(
        ask, [Question("a", ("x", "bc")), Question("b", ("bc",))], KEY
    )
    assert results[0].correct["exact"]
    assert not any(results[1].correct.values())
    found = evaluate.accuracies(results)["exact"]
    assert found.estimate == 0.5
    assert found.low < 0.5 < found.high
    with pytest.raises(ValueError, match="records"):
        evaluate.compare(results, results[:1], "exact")


def test_comparison_of_two_systems():
    def made(pattern):
        return [Result({"exact": c == "1"}, {}) for c in pattern]

    difference = evaluate.compare(made("1111111100"), made("0000001100"), "exact")
    assert difference.accuracy.estimate == pytest.approx(0.6)
    assert difference.mcnemar == 2 / 2**6
    assert difference.bootstrap < 0.05
    same = evaluate.compare(made("10"), made("10"), "exact")
    assert (same.mcnemar, same.bootstrap) == (1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', '"choices" must be two'),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', '"choices" must be two'),
        ('{"prompt": "a", "choices": "bc", "answer": 0}', '"choices" must be two'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "from 0 to 1; found 2"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "d"}', "found 'd'"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "found True"),
        (
            '{"prompt": 1, "choices": ["b", "c"], "answer": 0}',
            '"prompt" must be a text',
        ),
        ('{"prompt": "a", "choices": ["b", "c"]}', 'no key "answer"'),
        ('{"choices": ["b", "c"], "answer": 0}', 'no key "prompt" or "question"'),
    ],
)
def test_bad_choices_are_named(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text('\n{"prompt": "a", "choices": ["b", "c"], "answer": "c"}\n' + line)
    with pytest.raises(ValueError, match=r"task\.jsonl, line 3: ") as error:
        evaluate.read_choices(path)
    assert message in str(error.value)


def test_questions_are_read(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"question": "a", "answer": [4, "four"]}\n')
    assert evaluate.read_questions(path) == [Question("a", ("4", "four"))]
    path.write_text('{"question": "a", "answer": null}\n')
    with pytest.raises(ValueError, match='line 1: "answer" must be a text'):
        evaluate.read_questions(path)
