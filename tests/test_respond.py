"""Lifting an LM to a responder: batches, buckets, keys, stops, costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import decode, pool, respond, warp
from collab_jax.combine import prefixed, product
from collab_jax.decoder import pad, run
from collab_jax.models import table
from collab_jax.respond import Codec, Cost, Own, Reply, from_decoder, from_lm

KEY = jax.random.key(3)
ALPHABET = "abcdefgh."
LETTERS = Codec(
    lambda texts: [[ALPHABET.index(letter) for letter in text] for text in texts],
    lambda ids: "".join(ALPHABET[i] for i in ids),
    eos=(8,),
    spelling=lambda: [letter.encode() for letter in ALPHABET],
)
LM = table.language_model(order=2)
PARAMS = table.init(jax.random.key(0), vocab=9, order=2, scale=2.0)
WARPS = (warp.temperature(0.9),)


def texts(count, seed=0, longest=90):
    random = np.random.default_rng(seed)
    return [
        "".join(random.choice(list(ALPHABET[:8]), random.integers(1, longest)))
        for _ in range(count)
    ]


def test_a_reply_depends_neither_on_batch_nor_order():
    prompts = texts(11)
    ask = from_lm(LM, PARAMS, LETTERS, max_new_tokens=12, warps=WARPS, batch_size=4)
    replies = ask(prompts, KEY)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(len(prompts)))
    order = [7, 2, 10, 0]
    again = ask([prompts[i] for i in order], keys[jnp.array(order)])
    assert [reply.text for reply in again] == [replies[i].text for i in order]
    alone = [ask([prompts[i]], keys[i : i + 1])[0] for i in range(3)]
    assert [reply.info.tokens for reply in alone] == [
        reply.info.tokens for reply in replies[:3]
    ]
    # the control: with keys by row of the batch, the replies would be others
    wrong = ask([prompts[i] for i in order], KEY)
    assert [reply.text for reply in wrong] != [replies[i].text for i in order]


def test_replies_are_those_of_the_decoder():
    prompts = texts(5, longest=20)
    decoder = decode.greedy(LM, 6, eos=LETTERS.eos)
    replies = from_decoder(decoder, PARAMS, LETTERS, batch_size=2)(prompts, KEY)
    result = run(decoder, PARAMS, *pad(LETTERS.encode(prompts)), KEY)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        new = result.tokens[row, len(prompt) : result.length[row]].tolist()
        assert reply.info.tokens == new
        assert reply.text == LETTERS.decode(new).removesuffix(".")
        assert reply.info.finish == ("eos" if new[-1] == 8 else "length")
        assert reply.score == pytest.approx(float(result.scores[row]), abs=1e-5)
        assert reply.info.prompt_tokens == LETTERS.encode([prompt])[0]


def test_members_read_prompts_of_their_own():
    prompts = texts(5, longest=60)
    lm = product([prefixed(LM)] * 2, pool.mixture(0.3, 0.7))

    def shouted(some):
        return LETTERS.encode([text[::-1] + "abc" for text in some])

    def place(params, given):
        return tuple((params, *own) for own in given)

    decoder = decode.greedy(lm, 6, eos=LETTERS.eos)
    own = Own((LETTERS.encode, shouted), place, start=3)
    ask = from_decoder(decoder, PARAMS, LETTERS, batch_size=2, own=own)
    for prompt, reply in zip(prompts, ask(prompts, KEY), strict=True):
        # the oracle: the same laws, read anew at every token
        mine, theirs = LETTERS.encode([prompt])[0], shouted([prompt])[0]
        new: list[int] = []
        while len(new) < 6 and new[-1:] != [8]:
            law = 0.0
            for weight, tokens in ((0.3, mine), (0.7, theirs)):
                row = jnp.array([tokens + new])
                out, _ = LM.extend(PARAMS, LM.init(PARAMS, 1, row.size), row)
                law += weight * jax.nn.softmax(out.logits[0, -1])
            new.append(int(law.argmax()))
        assert reply.info.tokens == new
        assert reply.info.prompt_tokens == mine
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        ask(["a", ""], KEY)
    # the control: members that read the same give other texts
    same = own._replace(encode=(LETTERS.encode,) * 2)
    ask_same = from_decoder(decoder, PARAMS, LETTERS, batch_size=2, own=same)
    texts_of = [reply.text for reply in ask(prompts, KEY)]
    assert [reply.text for reply in ask_same(prompts, KEY)] != texts_of


def test_one_program_for_each_width():
    traces = []
    plain = decode.greedy(LM, 3)

    def step(params, state):
        traces.append(state.tokens.shape)
        return plain.step(params, state)

    ask = from_decoder(plain._replace(step=step), PARAMS, LETTERS, batch_size=4)
    ask(texts(4, seed=1, longest=30), KEY)
    first = len(traces)
    assert len(set(traces)) == 1
    ask(texts(4, seed=2, longest=30), jax.random.key(9))
    ask(texts(11, seed=3, longest=30), KEY)  # the last batch has 3 prompts
    assert len(traces) == first
    ask([*texts(5, seed=4, longest=30), "a" * 50], KEY)
    assert set(traces) == {(4, 33 + 3), (4, 65 + 3)}


def test_batches_hold_every_prompt_once():
    lengths = [5, 300, 17, 17, 1, 64, 90, 1500, 2]
    plan = respond.batches(lengths, batch_size=4)
    assert sorted(i for batch in plan for i in batch.rows) == list(range(9))
    assert all(
        len(batch.rows) <= batch.size == 4
        and max(lengths[i] for i in batch.rows) <= batch.width
        for batch in plan
    )
    assert respond.batches([], 4) == []
    with pytest.raises(ValueError, match="batch_size = 0"):
        respond.batches([1], 0)


def test_buckets_are_few_and_not_wasteful():
    widths = [respond.bucket(n) for n in range(1, 8193)]
    assert all(width >= n for n, width in enumerate(widths, 1))
    assert all(width <= 2 * n - 1 for n, width in enumerate(widths, 1) if n > 32)
    assert len(set(widths)) <= 16


def test_stop_strings_and_end_tokens():
    after = jnp.arange(10)[:, None] + 1  # a, b, c, ... and after h the end token
    params = jnp.where(jnp.arange(9) == after, 20.0, -20.0)
    lm = table.language_model(order=1)
    ask = from_lm(lm, params, LETTERS, max_new_tokens=12)
    reply = ask(["a"], KEY)[0]
    assert (reply.text, reply.info.finish) == ("bcdefgh", "eos")
    assert reply.info.tokens[-1] == 8
    ask = from_lm(lm, params, LETTERS, max_new_tokens=12, stops=["gh", "de", "ef"])
    reply = ask(["a"], KEY)[0]
    assert (reply.text, reply.info.finish) == ("bc", "stop")
    assert reply.info.tokens == [1, 2, 3, 4]  # it ended there, not at twelve tokens
    assert ask(["h"], KEY)[0].text == ""
    ask = from_lm(lm, params, LETTERS, max_new_tokens=3)
    reply = ask(["a"], KEY)[0]
    assert (reply.text, reply.info.finish) == ("bcd", "length")


def test_sampling_follows_the_law():
    ask = from_lm(LM, PARAMS, LETTERS, max_new_tokens=1, warps=(), batch_size=1024)
    replies = ask(["ab"] * 1024, KEY)
    found = np.bincount([reply.info.tokens[0] for reply in replies], minlength=9)
    scores = np.asarray(jax.nn.log_softmax(PARAMS[1]))  # after "ab": 1 + 10 * 0
    assert np.abs(found / 1024 - np.exp(scores)).max() < 4 * 0.5 / 32
    assert replies[0].score == pytest.approx(scores[replies[0].info.tokens[0]])


def test_costs_add_up_to_the_time_and_tokens():
    replies = from_lm(LM, PARAMS, LETTERS, max_new_tokens=5)(["abc", "d"], KEY)
    total = sum((reply.cost for reply in replies), Cost())
    assert (total.calls, total.prompt_tokens) == (2, 4)
    assert total.generated_tokens == sum(len(reply.info.tokens) for reply in replies)
    assert total.seconds > 0


def test_replies_are_reported_as_they_come():
    seen = []
    ask = from_lm(
        LM,
        PARAMS,
        LETTERS,
        max_new_tokens=2,
        batch_size=2,
        report=lambda i, reply: seen.append((i, reply.text)),
    )
    replies = ask(texts(5), KEY)
    assert sorted(seen) == list(enumerate(reply.text for reply in replies))


def test_bad_prompts_are_refused_before_any_work():
    seen = []
    ask = from_lm(
        LM, PARAMS, LETTERS, max_new_tokens=4, capacity=10, report=seen.append
    )
    with pytest.raises(ValueError, match=r"prompt 1 has 7 tokens, at most 6 fit"):
        ask(["abc", "abcabca"], KEY)
    with pytest.raises(ValueError, match=r"prompt 0 has no tokens"):
        ask(["", "a"], KEY)
    assert not seen
    assert ask([], KEY) == []
    with pytest.raises(ValueError, match="at most 9 are expected"):
        from_lm(LM, PARAMS, LETTERS, max_new_tokens=10, capacity=10)
    with pytest.raises(ValueError, match="bytes of every token"):
        from_lm(LM, PARAMS, LETTERS._replace(spelling=None), stops=["x"])


def test_maps_compose():
    def parrot(prompts, key):
        return [Reply(prompt, 0.0, Cost(1)) for prompt in prompts]

    ask = respond.map_replies(str.upper, respond.map_prompts("<{}>".format, parrot))
    assert ask(["a"], KEY)[0].text == "<A>"
