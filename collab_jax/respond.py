"""Text in, text out: `Responder`, the value that collaboration over answers joins.

A responder is a function of (prompts, key) that returns one `Reply` a prompt, on the
host. `from_lm` lifts an LM, `from_decoder` any decoding strategy; an endpoint on the
network can be one too (`collab_jax.endpoint`).

Shapes: n prompts, B rows of a program, P its widest prompt.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax import decode, law, stop, warp
from collab_jax.decoder import Decoder, check_finite, compile, pad
from collab_jax.lm import LM, Params


@dataclass(frozen=True)
class Cost:
    """What replies cost; costs add up.

    >>> sum([Cost(1, 10, 4, 0.5), Cost(1, 20, 6, 0.5)], Cost())
    Cost(calls=2, prompt_tokens=30, generated_tokens=10, seconds=1.0)
    """

    calls: int = 0  # prompts that were answered by some model
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0  # of a batch, shared evenly by its prompts

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.generated_tokens + other.generated_tokens,
            self.seconds + other.seconds,
        )


class Reply(NamedTuple):
    """An answer."""

    text: str
    score: float  # log-prob of the generated tokens, nats; NaN where nobody knows
    cost: Cost
    info: Any = ()


# (n prompts, key: one, or [n] of them) -> n replies, in the order of the prompts; one
# key k means fold_in(k, i) for prompt i
Responder = Callable[[Sequence[str], jax.Array], list[Reply]]


class Codec(NamedTuple):
    """How texts become tokens and tokens become text."""

    encode: Callable[[Sequence[str]], list[list[int]]]  # at least one token a text
    decode: Callable[[Sequence[int]], str]
    eos: tuple[int, ...] = ()  # the tokens that end a text
    # the bytes of each token, where they are wanted: for stop strings
    spelling: Callable[[], Sequence[bytes]] | None = None


class Own(NamedTuple):
    """Members that read prompts of their own, see `collab_jax.combine.prefixed`."""

    encode: tuple[Callable[[Sequence[str]], list[list[int]]], ...]  # N
    # (params, N of (tokens [B, P], length [B])) -> what the decoder takes
    place: Callable[[Params, Sequence[tuple[jax.Array, jax.Array]]], Params]
    start: int = 0  # the token that the shared text begins with


class Generation(NamedTuple):
    """`Reply.info` of a model that ran here."""

    prompt_tokens: list[int]
    tokens: list[int]  # as generated: with the end token, and what a stop string cut
    finish: str  # what ended it: "eos", "stop" or "length"
    info: Any  # the decoder's own, of this row


class Batch(NamedTuple):
    """Prompts that one program answers together."""

    rows: tuple[int, ...]  # indices of the prompts, at most `size`
    size: int  # B
    width: int  # P


def bucket(tokens: int) -> int:
    """The width that a prompt is padded to: one of few, so that few programs compile.

    One more than 32, 64, 128 or a power of two or three quarters of one beyond: prefill
    consumes all but the last token, and wants whole chunks.

    Args:
      tokens: length of the prompt, at least 1.

    >>> [bucket(n) for n in (1, 33, 34, 130, 300, 400)]
    [33, 33, 65, 257, 385, 513]
    """
    need = max(tokens - 1, 32)
    power = 1 << (need - 1).bit_length()
    less = power * 3 // 4
    return 1 + (less if less >= need and less % 128 == 0 else power)


def batches(lengths: Sequence[int], batch_size: int) -> list[Batch]:
    """Puts prompts of like length together, the longest first.

    The longest first, because what does not fit the memory should fail at once.

    Args:
      lengths: `[n]`, tokens of each prompt.
      batch_size: most rows of a program; fewer where there are fewer prompts.

    Raises:
      ValueError: for batch_size < 1.

    >>> batches([3, 40, 5], batch_size=2)
    [Batch(rows=(1, 2), size=2, width=65), Batch(rows=(0,), size=2, width=33)]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}, at least 1 is expected")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size = min(batch_size, 1 << max(len(order) - 1, 0).bit_length())
    return [
        Batch(tuple(rows := order[at : at + size]), size, bucket(lengths[rows[0]]))
        for at in range(0, len(order), size)
    ]


def from_decoder(
    decoder: Decoder,
    params: Params,
    codec: Codec,
    *,
    stops: Sequence[str] = (),
    batch_size: int = 8,
    longest_prompt: int | None = None,
    report: Callable[[int, Reply], None] | None = None,
    own: Own | None = None,
) -> Responder:
    """Lifts a decoding strategy to a responder.

    Prompts of like length share a batch. Each keeps the key of its index, so that a
    reply depends on its prompt and key, not on its batch or on the order.

    Args:
      decoder: any strategy; it is compiled once for each width of prompts.
      params: parameters of its LM.
      codec: how texts become tokens.
      stops: a text is cut before the first of these strings.
      batch_size: most rows of a program.
      longest_prompt: most tokens of a prompt that the model can continue.
      report: called with (index, reply) as soon as a reply is known.
      own: how the members read a prompt, each in its own template or tokens; None where
        all read the same.

    Raises:
      ValueError: by the responder, before it starts, for a prompt without tokens or one
        that is too long.

    >>> import jax.numpy as jnp
    >>> from collab_jax.models import table
    >>> letters = Codec(lambda texts: [[ord(c) - 97 for c in t] for t in texts],
    ...                 lambda ids: "".join(chr(97 + i) for i in ids))
    >>> decoder = decode.greedy(table.language_model(order=1), max_new_tokens=3)
    >>> ask = from_decoder(decoder, jnp.eye(5, 4), letters)
    >>> [reply.text for reply in ask(["a", "cb"], jax.random.key(0))]
    ['aaa', 'bbb']
    """
    program = compile(lambda _: decoder)

    def respond(prompts, key):
        texts = read(codec, own, list(prompts))
        for tokens in texts:
            _check(tokens, longest_prompt)
        keys = law.row_keys(key, len(prompts))
        replies: dict[int, Reply] = {}
        longest = [max(map(len, tokens)) for tokens in zip(*texts, strict=True)]
        for batch in batches(longest, batch_size):
            # a row without a prompt repeats the first: it ends when that one ends
            rows = [*batch.rows, *batch.rows[:1] * (batch.size - len(batch.rows))]
            start = time.perf_counter()
            chosen = [[tokens[i] for i in rows] for tokens in texts]
            fed = feed(own, params, chosen, batch.width)
            result = program(None, *fed, keys[np.array(rows)])
            _await(result.scores)
            check_finite(result, params)
            result = jax.tree.map(np.asarray, result)
            seconds = (time.perf_counter() - start) / len(batch.rows)
            for row, i in enumerate(batch.rows):
                replies[i] = _reply(result, row, texts[0][i], codec, stops, seconds)
                if report is not None:
                    report(i, replies[i])
        return [replies[i] for i in range(len(prompts))]

    return respond


def read(
    codec: Codec, own: Own | None, prompts: Sequence[str]
) -> list[list[list[int]]]:
    """The tokens of each prompt for every member, or once where all read the same.

    Args:
      codec: how texts become tokens.
      own: see `from_decoder`.
      prompts: the texts.

    >>> letters = Codec(lambda texts: [[ord(c) - 97 for c in t] for t in texts], str)
    >>> read(letters, None, ["ab", "c"])
    [[[0, 1], [2]]]
    """
    encoders = (codec.encode,) if own is None else own.encode
    return [encode(prompts) for encode in encoders]


def feed(
    own: Own | None, params: Params, texts: Sequence[Sequence[list[int]]], width: int
) -> tuple[Params, jax.Array, jax.Array]:
    """What a decoder takes for a batch: parameters, prompt and its length.

    Args:
      own: see `from_decoder`.
      params: of the decoder's LM, without prompts.
      texts: of `read`, of the rows of the batch.
      width: that prompts are padded to.

    >>> _, prompt, length = feed(None, (), [[[1, 2], [3]]], 3)
    >>> prompt.tolist(), length.tolist()
    ([[1, 2, 0], [3, 0, 0]], [2, 1])
    """
    prompts = [pad(rows, width) for rows in texts]
    if own is None:
        return params, *prompts[0]
    return own.place(params, prompts), *pad([[own.start]] * len(texts[0]), 1)


def from_lm(
    lm: LM,
    params: Params,
    codec: Codec,
    *,
    max_new_tokens: int = 128,
    warps: Sequence[Any] | None = None,
    stops: Sequence[str] = (),
    batch_size: int = 8,
    capacity: int | None = None,
    chunk: int | None = None,
    report: Callable[[int, Reply], None] | None = None,
) -> Responder:
    """Lifts an LM to a responder: greedy, or sampling from its warped laws.

    Args:
      lm: any LM.
      params: its parameters.
      codec: how texts become tokens; a text ends with one of its end tokens.
      max_new_tokens: a reply has at most so many tokens.
      warps: None decodes greedily; otherwise tokens are drawn from the laws warped by
        these (see `collab_jax.warp`), from the LM's own where there are none.
      stops: a reply ends before the first of these strings.
      batch_size: most rows of a program.
      capacity: most tokens of prompt and reply together, the model's positions.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.
      report: called with (index, reply) as soon as a reply is known.

    Raises:
      ValueError: for max_new_tokens < 1 or beyond the capacity, stop strings without a
        spelling; by the responder, for a prompt without tokens or one that is too long.

    >>> import jax.numpy as jnp
    >>> from collab_jax.models import table
    >>> letters = Codec(lambda texts: [[ord(c) - 97 for c in t] for t in texts],
    ...                 lambda ids: "".join(chr(97 + i) for i in ids), eos=(0,))
    >>> ask = from_lm(table.language_model(order=1), 9 * jnp.eye(5, 4, 1), letters,
    ...               max_new_tokens=8)
    >>> [reply.text for reply in ask(["b", "d"], jax.random.key(0))]
    ['cd', '']
    """
    if capacity is not None and max_new_tokens >= capacity:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}, but the model has {capacity} "
            f"positions for prompt and reply: at most {capacity - 1} are expected"
        )
    automaton = None
    if stops:
        if codec.spelling is None:
            raise ValueError(
                f"stop strings {list(stops)} were given with a codec that has no "
                "spelling: it needs the bytes of every token"
            )
        automaton = stop.automaton(stops, codec.spelling())
    if warps is None:
        strategy = decode.greedy
    else:
        strategy, lm = decode.sample, warp.warp(lm, *warps) if warps else lm
    decoder = strategy(lm, max_new_tokens, eos=codec.eos, stop=automaton, chunk=chunk)
    return from_decoder(
        decoder,
        params,
        codec,
        stops=stops,
        batch_size=batch_size,
        longest_prompt=None if capacity is None else capacity - max_new_tokens,
        report=report,
    )


def map_prompts(f: Callable[[str], str], responder: Responder) -> Responder:
    """The responder that is asked `f(prompt)`: a template, an instruction, a summary.

    >>> parrot = lambda prompts, key: [Reply(p, 0.0, Cost(1)) for p in prompts]
    >>> map_prompts("Q: {} A:".format, parrot)(["1 + 1?"], jax.random.key(0))[0].text
    'Q: 1 + 1? A:'
    """
    return lambda prompts, key: responder([f(prompt) for prompt in prompts], key)


def map_replies(f: Callable[[str], str], responder: Responder) -> Responder:
    """The responder whose texts are `f(text)`: the first line, the last number.

    >>> parrot = lambda prompts, key: [Reply(p, 0.0, Cost(1)) for p in prompts]
    >>> map_replies(str.upper, parrot)(["yes"], jax.random.key(0))[0].text
    'YES'
    """
    return lambda prompts, key: [
        reply._replace(text=f(reply.text)) for reply in responder(prompts, key)
    ]


def _check(tokens: Sequence[Sequence[int]], longest: int | None) -> None:
    for i, ids in enumerate(tokens):
        if not ids:
            raise ValueError(
                f"prompt {i} has no tokens: at least one is expected, the "
                "start-of-text token where the text is empty"
            )
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens, at most {longest} fit beside the "
                "new tokens: shorten it, or ask for fewer new tokens"
            )


def _await(array: Any) -> None:
    """Waits in Python, where Ctrl-C is heard at once; a blocking read is deaf to it."""
    while not array.is_ready():
        time.sleep(0.002)


def _reply(result, row, prompt, codec, stops, seconds) -> Reply:
    """The reply of one row of a batch that is on the host."""
    begin, end = int(result.prompt_length[row]), int(result.length[row])
    tokens = result.tokens[row, begin:end].tolist()
    ended = bool(tokens) and tokens[-1] in codec.eos
    whole = codec.decode(tokens[:-1] if ended else tokens)
    text = stop.trim(whole, stops)
    finish = "eos" if ended else "stop" if text != whole else "length"
    info = jax.tree.map(lambda leaf: leaf[row], result.info)
    return Reply(
        text,
        float(result.scores[row]),
        Cost(1, len(prompt), len(tokens), seconds),
        Generation(list(prompt), tokens, finish, info),
    )
