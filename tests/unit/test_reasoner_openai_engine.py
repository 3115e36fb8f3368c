"""A teacher behind an HTTP endpoint: what is asked, what is kept, and what is said when it does not answer."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rgalign_ray import config
from rgalign_ray.errors import ConfigError, InfrastructureError
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Prompts, Proposal
from rgalign_ray.reasoner.openai_engine import OpenAIEngine

KEY = "sk-not-a-real-key"
PROMPTS = Prompts("Shoppers and what they ask.\n\n", ["order late", "paid twice"], "\nQuestion:")


class Server(ThreadingHTTPServer):
    """Answers every request by `answer`, and remembers what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.counts = True
        """Whether it says how many tokens an answer took."""
        self.statuses: list[int] = []
        """Of the next requests; 200 afterwards."""
        self.says: bytes | None = None
        """In place of an answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            server.asked.append(request | {"path": self.path})
            server.keys.append(self.headers["Authorization"])
            status = server.statuses.pop(0) if server.statuses else 200
        time.sleep(0.05)
        with server.lock:
            server.busy -= 1
        text = f"  A question, seed {request['seed']}?\nAnd more."
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, "text": text}
        usage = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}
        answer = {"id": "1", "object": "o", "created": 1, "model": "m", "choices": [choice]}
        answer |= {"usage": usage} if server.counts else {}
        if status != 200:
            answer = {"error": {"message": f"refused, with key {KEY}", "type": "t"}}
        body = server.says or json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    made = Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def engine(server: Server, folder: Path, **endpoint: Any) -> OpenAIEngine:
    teacher = config.Teacher(
        name="big",
        engine="openai",
        model="big-1",
        temperature=0.5,
        endpoint=config.Endpoint(base_url=server.url, key_variable="TEACHER_KEY", **endpoint),
    )
    return OpenAIEngine(teacher, config.Rollout(top_p=0.9, max_new_tokens=12), str(folder / "answers"))


@pytest.mark.parametrize("address", ["https://me:sk-1@host/v1", "https://host/v1?api-key=sk-1"])
def test_an_address_holds_no_key(address: str) -> None:
    with pytest.raises(ValueError, match="in the environment"):
        config.Endpoint(base_url=address)


def test_a_chat_is_asked_and_its_first_line_taken(server: Server, tmp_path: Path) -> None:
    found = engine(server, tmp_path).propose(PROMPTS, [[1, 2], [3, 4]])
    assert found == [[Proposal(f"A question, seed {seed}?", "stop") for seed in row] for row in ((1, 2), (3, 4))]
    asked = {request["seed"]: request for request in server.asked}
    assert asked[3]["path"] == "/v1/chat/completions"
    assert asked[3]["messages"] == [
        {"role": "system", "content": "Shoppers and what they ask."},
        {"role": "user", "content": "paid twice\nQuestion:"},
    ]
    assert {name: asked[3][name] for name in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "big-1", "temperature": 0.5, "top_p": 0.9, "max_tokens": 12
    }  # fmt: skip
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_completion_gets_the_prompt_as_it_stands(server: Server, tmp_path: Path) -> None:
    engine(server, tmp_path, api="completions").propose(PROMPTS, [[1], [2]])
    asked = {request["seed"]: request for request in server.asked}
    assert asked[1]["path"] == "/v1/completions"
    assert asked[1]["prompt"] == "Shoppers and what they ask.\n\norder late\nQuestion:"
    assert asked[1]["stop"] == ["\n"]


def test_a_rerun_asks_only_what_is_new_and_keeps_no_key(server: Server, tmp_path: Path) -> None:
    first = engine(server, tmp_path).propose(PROMPTS, [[1, 2], [3, 4]])
    again = engine(server, tmp_path).propose(PROMPTS, [[1, 2], [3, 5]])
    assert sorted(request["seed"] for request in server.asked) == [1, 2, 3, 4, 5]
    assert again[0] == first[0] and again[1][0] == first[1][0]
    assert len(list((tmp_path / "answers" / "big").iterdir())) == 5
    assert not [path for path in (tmp_path / "answers" / "big").iterdir() if KEY in path.read_text()]


def test_requests_in_flight_are_bounded(server: Server, tmp_path: Path) -> None:
    engine(server, tmp_path, concurrency=3).propose(PROMPTS, [list(range(8)), list(range(8, 16))])
    assert server.most_busy == 3


@pytest.mark.parametrize("status", [429, 503])
def test_load_and_failures_of_the_endpoint_are_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status]
    assert engine(server, tmp_path).propose(PROMPTS, [[1], [2]])[1] == [Proposal("A question, seed 2?", "stop")]
    assert len(server.asked) == 3


def test_what_it_has_by_the_end_of_its_budget_is_used(server: Server, tmp_path: Path) -> None:
    made = engine(server, tmp_path, max_tokens=100, concurrency=1)
    found = made.propose(PROMPTS, [[1, 2], [3, 4]])
    flat = [one for row in found for one in row]
    assert len(server.asked) == 3, "40 tokens each: the third passes 100"
    assert sum(one is not None for one in flat) == 3
    assert made.propose(PROMPTS, [[1, 2], [3, 4]]) == found, "what is known costs nothing"
    again = engine(server, tmp_path, max_tokens=100, concurrency=1)
    again.propose(PROMPTS, [[5, 6], [7, 8]])
    assert len(server.asked) == 3, "whoever goes on with a run has what is left of its budget"


def test_what_is_in_flight_when_the_budget_ends_is_paid_for_and_no_more(server: Server, tmp_path: Path) -> None:
    engine(server, tmp_path, max_tokens=100, concurrency=4).propose(PROMPTS, [list(range(8)), list(range(8, 16))])
    assert 3 <= len(server.asked) <= 3 + 3, "40 tokens each: the third passes 100, three others may be on their way"


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_an_endpoint_that_counts_no_tokens_has_a_budget_too(server: Server, tmp_path: Path, api: str) -> None:
    server.counts = False
    most = sum(len(text.encode()) for text in (PROMPTS.prefix, PROMPTS.texts[0], PROMPTS.suffix)) + 12
    for _ in range(2):
        made = engine(server, tmp_path, api=api, max_tokens=most // 2, concurrency=1)
        made.propose(PROMPTS, [[1, 2], [3, 4]])
        assert len(server.asked) == 1, "also by whoever goes on with the run"
        assert most // 2 < made.tokens <= most


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (401, ConfigError, r"teachers\.big: .* refuses the key in \$TEACHER_KEY"),
        (404, ConfigError, r"teachers\.big: .* refuses the request \(404"),
        (500, InfrastructureError, r"teachers\.big: .* did not answer after 1 retries \(InternalServerError\)"),
    ],
)
def test_a_refusal_says_who_refused_what_and_is_final_where_a_retry_would_not_help(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int, error: type[Exception], says: str
) -> None:
    server.statuses = [status] * 9
    caplog.set_level(logging.DEBUG)
    with pytest.raises(error, match=says) as raised:
        engine(server, tmp_path, retries=1, concurrency=1).propose(replace(PROMPTS, texts=["order late"]), [[1]])
    assert KEY not in str(raised.value) and KEY not in caplog.text
    assert len(server.asked) == (2 if status == 500 else 1)


@pytest.mark.parametrize("says", [b"<html></html>", b"{", b'{"error": "busy"}', b'{"choices": []}'])
def test_what_is_no_answer_is_refused_with_the_way_out(server: Server, tmp_path: Path, says: bytes) -> None:
    server.says = says
    with pytest.raises(
        ConfigError, match=r"teachers\.big: http.* gives no answer of OpenAI's protocol; .* ends in /v1"
    ):
        engine(server, tmp_path).propose(PROMPTS, [[1], [2]])


@pytest.mark.slow
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_real_server_answers(tmp_path: Path, api: str) -> None:
    """`transformers serve` with the packaged LLM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    model = models.resolve("smollm2")
    served = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", served)
        endpoint = config.Endpoint(
            base_url=f"http://127.0.0.1:{port}/v1", api=api, key_variable="NO_SUCH_KEY", deadline_s=120, concurrency=2
        )
        teacher = config.Teacher(name="served", engine="openai", model=model, endpoint=endpoint)
        made = OpenAIEngine(teacher, config.Rollout(max_new_tokens=16), str(tmp_path))
        found = made.propose(PROMPTS, [[1], [2]])
    finally:
        served.terminate()
        served.wait(30)
    assert all(one is not None and one.query and one.finish in ("stop", "length") for (one,) in found)
    assert made.tokens > 20


def wait_for(url: str, served: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert served.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} did not answer within {seconds} s")


def test_an_endpoint_that_is_not_there(tmp_path: Path) -> None:
    server = Server()
    server.server_close()
    with pytest.raises(InfrastructureError, match=r"APIConnectionError"):
        engine(server, tmp_path, retries=0).propose(PROMPTS, [[1], [2]])


def test_one_that_hangs_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_POST", lambda self: time.sleep(1.0))
    with pytest.raises(InfrastructureError, match=r"did not answer after 0 retries \(APITimeoutError\)"):
        engine(server, tmp_path, retries=0, deadline_s=0.2).propose(PROMPTS, [[1], [2]])
