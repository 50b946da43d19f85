"""The endpoint against a server of our own on this machine."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import pytest

from collab_jax.endpoint import from_endpoint
from collab_jax.respond import Cost

KEY = jax.random.key(0)


@pytest.fixture
def server(monkeypatch):
    """A server that answers the (code, object) of `server.answer(path, body)`."""
    # a proxy of the environment must not see requests to this machine
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                http.seen.append((self.path, body, dict(self.headers)))
            code, answer = http.answer(self.path, body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            del arguments

    lock = threading.Lock()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.seen, http.answer = [], chat
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


def chat(path, body):
    assert path == "/v1/chat/completions"
    text = body["messages"][-1]["content"]
    tokens = [{"logprob": -0.5}, {"logprob": -0.25}]
    return 200, {
        "choices": [
            {"message": {"content": text.upper()}, "logprobs": {"content": tokens}}
        ],
        "usage": {"prompt_tokens": len(text), "completion_tokens": 2},
    }


def test_chat(server):
    ask = from_endpoint(
        server.url + "/",
        "small",
        system="Shout.",
        stops=["\n"],
        api_key="secret",
        options={"top_p": 0.9},
        backoff=0,
    )
    known = {}
    ask_and_report = from_endpoint(server.url, "small", report=known.__setitem__)
    prompts = [f"prompt {i}" for i in range(9)]
    replies = ask(prompts, KEY)
    assert [reply.text for reply in replies] == [prompt.upper() for prompt in prompts]
    assert replies[0].score == -0.75
    cost = sum((reply.cost for reply in replies), Cost())
    assert (cost.calls, cost.prompt_tokens, cost.generated_tokens) == (9, 72, 18)
    assert cost.seconds > 0
    _, body, headers = server.seen[0]
    assert body["messages"][0] == {"role": "system", "content": "Shout."}
    assert body["stop"] == ["\n"]
    assert body["top_p"] == 0.9
    assert headers["Authorization"] == "Bearer secret"
    assert [reply.text for reply in ask_and_report(prompts, KEY)] == [
        known[i].text for i in range(9)
    ]


def test_seeds_follow_the_key(server):
    ask = from_endpoint(server.url, "small", workers=1)
    ask(["a", "b"], KEY)
    ask(["a", "b"], KEY)
    ask(["b"], jax.random.fold_in(KEY, 1)[None])
    seeds = [body["seed"] for _, body, _ in server.seen]
    assert seeds[:2] == seeds[2:4]
    assert seeds[4] == seeds[1] != seeds[0]
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_bare_completion_without_scores(server):
    def complete(path, body):
        assert path == "/v1/completions"
        return 200, {"choices": [{"text": body["prompt"] + "!"}]}

    server.answer = complete
    (reply,) = from_endpoint(server.url, "small", chat=False)(["hello"], KEY)
    assert reply.text == "hello!"
    assert math.isnan(reply.score)


def test_passing_faults_are_retried(server):
    codes = iter([429, 503, 200])

    def sometimes(path, body):
        code = next(codes)
        return (code, {"error": "busy"}) if code != 200 else chat(path, body)

    server.answer = sometimes
    (reply,) = from_endpoint(server.url, "small", backoff=0)(["a"], KEY)
    assert reply.text == "A"
    assert len(server.seen) == 3


def test_retries_come_to_an_end(server):
    server.answer = lambda path, body: (503, {"error": "down\nfor long"})
    ask = from_endpoint(server.url, "small", retries=2, backoff=0)
    with pytest.raises(ConnectionError, match=r"503 .*down.*after 3 tries") as error:
        ask(["a"], KEY)
    assert "\n" not in str(error.value)
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("code", "answer", "message"),
    [
        (401, {"error": "no such key"}, "401 .*no such key"),
        (200, {"models": []}, "expected a completion with choices"),
        (200, b"<html>", "expected JSON, found '<html>'"),
    ],
)
def test_refusals_are_not_retried(server, code, answer, message):
    server.answer = lambda path, body: (code, answer)
    with pytest.raises(ValueError, match=message):
        from_endpoint(server.url, "small", backoff=0)(["a"], KEY)
    assert len(server.seen) == 1


def test_slow_and_absent_servers(server):
    release = threading.Event()

    def slow(path, body):
        release.wait(10)
        return chat(path, body)

    server.answer = slow
    ask = from_endpoint(server.url, "small", timeout=0.05, retries=1, backoff=0)
    with pytest.raises(ConnectionError, match="timed out"):
        ask(["a"], KEY)
    release.set()
    absent = from_endpoint("http://127.0.0.1:9/v1", "small", retries=0)
    with pytest.raises(ConnectionError, match="efused"):
        absent(["a"], KEY)


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected http"):
        from_endpoint("localhost:8000", "small")
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        from_endpoint("http://localhost", "small", max_new_tokens=0)
