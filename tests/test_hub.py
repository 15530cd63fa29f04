"""A Hugging Face Hub that fails: the real commands end within seconds, and say what it answered."""

import contextlib
import threading
import time
from http.client import BadStatusLine
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import zygote
from conftest import TINY, command, environment

from mini_llm import tokenizer
from mini_llm.tokenizer import hub_problem


@contextlib.contextmanager
def hub(answer):
    """The environment of a hub on loopback: `answer(path)` is a status, or None for no answer at all."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if (status := answer(self.path)) is None:
                over.wait()
                return
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", no_proxy="127.0.0.1")
        over.set()
        server.shutdown()


@pytest.mark.parametrize("flags", [["--tokenizer-name", "gpt2"], ["--train-data", "someone/books"],
                                   ["--init-from", "gpt2"]], ids=lambda flags: flags[0])
@pytest.mark.parametrize("answer, said", [
    (lambda path: 503, "the hub answered 503"),
    (lambda path: 200 if path in ("", "/") else None, "the hub cannot be reached"),  # a proxy may answer for it
    (lambda path: None if path.endswith(("config.json", "README.md")) else 200, "the hub cannot be reached"),
], ids=["503", "hangs", "hangs at files"])
def test_a_hub_that_fails_is_given_up_within_seconds(tmp_path, answer, said, flags):
    with hub(answer) as there:
        run = zygote.run([*command("train.py"), *TINY, "--num-steps", 1, *flags], tmp_path,
                         environment(HF_HOME=str(tmp_path / "empty"), **there), timeout=20)
    assert run.returncode == 2 and run.stderr.startswith(f"error: {' '.join(flags)}: "), run.stderr
    assert said in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


@pytest.mark.parametrize("status, problem", [(200, ""), (401, ""), (404, ""), (407, "the hub answered 407"),
                                             (429, "the hub answered 429"), (500, "the hub answered 500"),
                                             (None, "the hub cannot be reached")])
def test_the_hub_serves_what_it_answers_for(monkeypatch, status, problem):
    asked = []
    with hub(lambda path: asked.append(path) or (status if path.startswith("/a") else 404)) as there:
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        assert hub_problem("first", "a name", seconds=1.0) == problem and time.monotonic() - began < 10
    assert asked == ["/first", "/a%20name"]


def test_a_hub_is_asked_where_it_is_and_not_for_long(monkeypatch):
    asked, fails, over, told = [], [], threading.Event(), "the hub cannot be reached"

    def urlopen(url, timeout):
        asked.append((url, timeout, threading.current_thread().daemon))
        if fails:
            raise fails.pop()
        over.wait(20)  # as a DNS lookup, which knows no timeout
        return SimpleNamespace(close=int)

    monkeypatch.setattr(tokenizer.urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.test/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_problem("a") == f"{told} (HF_HUB_OFFLINE is set)" and not asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    fails += [ValueError("unknown url type"), BadStatusLine("garbage"), TimeoutError()]
    while fails:
        assert hub_problem("a") == told  # and no thread has failed
    began = time.monotonic()
    assert hub_problem("a", seconds=0.1) == told and time.monotonic() - began < 10
    over.set()
    assert asked == [("https://mirror.test/a", 3.0, True)] * 3 + [("https://mirror.test/a", 0.1, True)]
