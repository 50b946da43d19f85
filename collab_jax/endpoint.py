"""A model behind an OpenAI-compatible endpoint, as a `Responder`."""

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

import jax
import numpy as np

from collab_jax import law
from collab_jax.respond import Cost, Reply, Responder

# Worth another try: timeouts, conflicts, too many requests, and faults of the server
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


def from_endpoint(
    url: str,
    model: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    stops: Sequence[str] = (),
    chat: bool = True,
    system: str | None = None,
    api_key: str | None = None,
    logprobs: bool = False,
    options: dict[str, Any] | None = None,
    timeout: float = 60.0,
    retries: int = 4,
    backoff: float = 1.0,
    workers: int = 4,
    report: Callable[[int, Reply], None] | None = None,
) -> Responder:
    """A responder that asks a server, some prompts at a time.

    The i-th prompt is sent with a seed drawn from its key: a server that honours seeds
    gives the same answers again.

    Args:
      url: base of the interface, for example `http://localhost:8000/v1`.
      model: the name that the server knows.
      max_new_tokens: a reply has at most so many tokens.
      temperature: 0 is greedy.
      stops: a reply ends before the first of these strings.
      chat: ask `/chat/completions`; otherwise `/completions`, with the bare prompt.
      system: first message of a chat.
      api_key: sent as bearer token.
      logprobs: ask for the log-probs of the tokens, and sum them to the score.
      options: further fields of the request.
      timeout: seconds to wait for the server at each try.
      retries: how often a request that failed in passing is sent again.
      backoff: seconds before the first retry, doubled for each further one, unless the
        server says how long to wait.
      workers: most requests at a time.
      report: called with (index, reply) as soon as a reply is known.

    Returns:
      A responder; it raises ConnectionError when the retries are used up, and
      ValueError when the server refuses or does not speak the protocol.

    Raises:
      ValueError: for a url that is not http or https, a number out of range, or a
        system message without a chat.

    >>> ask = from_endpoint("http://localhost:8000/v1", "small", max_new_tokens=16)
    >>> callable(ask)
    True
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url {url!r}: expected http://... or https://...")
    if max_new_tokens < 1 or retries < 0 or workers < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}, retries = {retries}, workers = "
            f"{workers}, temperature = {temperature}: expected at least 1, 0, 1, 0"
        )
    if system and not chat:
        raise ValueError(f"system message {system!r}: only a chat has one")
    address = url.rstrip("/") + ("/chat/completions" if chat else "/completions")
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    first = [{"role": "system", "content": system}] if system else []

    def request(prompt: str, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        if chat:
            body["messages"] = [*first, {"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if stops:
            body["stop"] = list(stops)
        if logprobs:
            body["logprobs"] = True if chat else 1
        return {**body, **(options or {})}

    def ask(prompt: str, seed: int) -> Reply:
        start = time.perf_counter()
        data = json.dumps(request(prompt, seed)).encode()
        answer = _post(address, data, headers, timeout, retries, backoff)
        return _reply(answer, address, time.perf_counter() - start)

    def respond(prompts, key):
        keys = law.row_keys(key, len(prompts))
        # servers take seeds of 31 bits
        seeds = np.asarray(jax.vmap(jax.random.bits)(keys)) >> 1
        pool = ThreadPoolExecutor(workers)
        try:
            futures = [
                pool.submit(ask, prompt, int(seed))
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            replies = []
            for i, future in enumerate(futures):
                replies.append(future.result())
                if report is not None:
                    report(i, replies[i])
            return replies
        finally:
            # after an error, what has not been sent is not sent any more
            pool.shutdown(wait=True, cancel_futures=True)

    return respond


def _post(
    address: str,
    data: bytes,
    headers: dict[str, str],
    timeout: float,
    retries: int,
    backoff: float,
) -> Any:
    """The JSON that the server answers, after as many tries as are allowed."""
    for attempt in range(retries + 1):
        wait = backoff * 2**attempt
        request = urllib.request.Request(address, data, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                payload = response.read()
            break
        except urllib.error.HTTPError as error:
            with error:
                text = " ".join(error.read(2000).decode(errors="replace").split())
                after = error.headers.get("Retry-After", "")
            problem = f"{address} answered {error.code} {error.reason}: {text[:300]}"
            if error.code not in PASSING:
                raise ValueError(problem) from None
            wait = float(after) if after.isdigit() else wait
        except (OSError, HTTPException) as error:  # refused, timed out, cut off
            problem = f"{address}: {getattr(error, 'reason', error)!s}"
        if attempt < retries:
            time.sleep(wait)
    else:
        raise ConnectionError(f"{problem} (after {retries + 1} tries)")
    try:
        return json.loads(payload)
    except ValueError:
        found = payload[:80].decode(errors="replace")
        raise ValueError(f"{address}: expected JSON, found {found!r}") from None


def _reply(answer: Any, address: str, seconds: float) -> Reply:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError):
        found = json.dumps(answer)[:200]
        raise ValueError(
            f"{address}: expected a completion with choices, found {found}; is this "
            "the base address of an OpenAI-compatible interface?"
        ) from None
    usage = answer.get("usage") or {}
    cost = Cost(
        1, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), seconds
    )
    return Reply(text or "", _score(choice.get("logprobs")), cost, answer)


def _score(logprobs: dict[str, Any] | None) -> float:
    """Sum of the tokens' log-probs in either form of the protocol; NaN without them."""
    if not logprobs:
        return math.nan
    if logprobs.get("content") is not None:
        return math.fsum(token["logprob"] for token in logprobs["content"])
    if logprobs.get("token_logprobs") is not None:
        return math.fsum(x for x in logprobs["token_logprobs"] if x is not None)
    return math.nan
