"""A bot behind another llmbot: the same answers, and what happens when the other fails."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_bots import GatedBackend, make_bot

from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.errors import ConfigError
from llmbot.serving.api_server import running_server
from llmbot.serving.backends import create_backend

pytestmark = pytest.mark.server
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bot(tmp_path_factory.mktemp("bots"), "alice"))


def config(bot: str, engine: dict[str, Any] | None = None, **serving: Any) -> Config:
    settings = ServingConfig(models=[bot], port=0, max_new_tokens=24, **serving)
    return Config(model=ModelConfig(device="cpu"), serving=settings, engine=engine or {})


def remote(bot: str, *urls: str, **engine: Any) -> Config:
    return config(bot, {"urls": [f"{url}/v1" for url in urls], **engine}, backend="remote")


@pytest.fixture(scope="module")
def upstream(bot: str) -> Iterator[str]:
    with running_server(config(bot)) as url:
        yield url


@pytest.fixture(scope="module")
def nobody() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 7, "top_k": 20}, {"temperature": 0, "stop": "e"}])
def test_the_same_answers_as_there(bot: str, upstream: str, sampling: dict[str, Any]) -> None:
    with running_server(remote(bot, upstream)) as url:
        for path, body in (("/chat", {"messages": QUESTION}), ("/generate", {"prompt": "Once upon"})):
            there, here = (httpx.post(base + path, json=body | sampling, timeout=60).json() for base in (upstream, url))
            assert (here["text"], here["finish_reason"], here["usage"]) == (there["text"], there["finish_reason"], there["usage"])
            streams = [httpx.post(base + path, json=body | sampling | {"stream": True}, timeout=60).text for base in (upstream, url)]
            assert all(stream.endswith("data: [DONE]\n\n") for stream in streams)


def test_a_url_that_fails_is_left_for_another(bot: str, upstream: str, nobody: str) -> None:
    with running_server(remote(bot, nobody, upstream, retries=0)) as url:
        answers = [httpx.post(f"{url}/chat", json={"messages": QUESTION}, timeout=60).status_code for _ in range(4)]
    assert answers == [200] * 4


def test_a_dead_url_is_seen_and_one_that_comes_back_is_used(bot: str, upstream: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    later = f"http://127.0.0.1:{port}"
    with running_server(remote(bot, later, upstream, health_s=0.05)) as url:
        until(lambda: httpx.get(f"{url}/health/ready").json() == {"status": "ok", "reason": "1 of 2 remote servers are down"})
        health = httpx.get(f"{url}/stats").json()["models"]["alice"]["health"]
        assert health["parts"] == {f"{later}/v1": "cannot be reached: ConnectError", f"{upstream}/v1": "up"}
    with running_server(remote(bot, later, health_s=0.05, health_path="/health/ready", down_s=60)) as url:
        until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        assert "1 of 1 remote servers are down" in httpx.get(f"{url}/health/ready").json()["error"]["message"]
        there = config(bot)
        there.serving.port = port
        with running_server(there):
            until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
            assert httpx.get(f"{url}/stats").json()["models"]["alice"]["health"] == {
                "ready": True, "reason": "", "parts": {f"{later}/v1": "up"},
            }  # fmt: skip
            assert httpx.post(f"{url}/chat", json={"messages": QUESTION}, timeout=60).status_code == 200


def test_logprobs_are_those_of_there(bot: str, upstream: str) -> None:
    greedy = {"temperature": 0, "max_tokens": 16}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "Once upon", "logprobs": 3}), ("/v1/completions", {"prompt": "Once", "logprobs": 0}),
        ("/v1/chat/completions", {"messages": QUESTION, "logprobs": True, "top_logprobs": 2}),
        *(("/v1/completions", {"prompt": text, "logprobs": k, "echo": True} | more) for text, k, more in (
            ("Grüße, 世界! What is 12", 2, {}), ([7, 30, 1, 50], 0, {}), ("Once", 1, {"max_tokens": 0}))),
    ]  # fmt: skip
    with running_server(remote(bot, upstream)) as url:
        for path, body in asked:
            there, here = (httpx.post(base + path, json=greedy | body, timeout=60).json()["choices"][0] for base in (upstream, url))
            assert here == there
            assert here["logprobs"]
            pieces = [httpx.post(base + path, json=greedy | body | {"stream": True}, timeout=60).text for base in (upstream, url)]
            told = [[c["logprobs"] for e in piece.split("\n\n") if e.startswith("data: {") for c in json.loads(e[6:])["choices"]
                     if c.get("logprobs")] for piece in pieces]  # fmt: skip
            assert told[0] == told[1]
    with running_server(config(bot, backend="gated")) as there, running_server(remote(bot, there)) as url:
        refused = httpx.post(f"{url}/v1/completions", json=greedy | {"prompt": "Once", "logprobs": 1, "echo": True}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")


def test_embeddings_come_from_there(bot: str, upstream: str, nobody: str) -> None:
    with running_server(remote(bot, nobody, upstream)) as url:
        for given in ("Once upon a time", ["Grüße, 世界!", "a"], [30, 40, 50]):
            there, here = (httpx.post(f"{base}/v1/embeddings", json={"input": given}, timeout=60).json() for base in (upstream, url))
            assert here == there
            assert len(here["data"][0]["embedding"]) > 1
    with running_server(config(bot, backend="gated")) as there, running_server(remote(bot, there)) as url:
        refused = httpx.post(f"{url}/v1/embeddings", json={"input": "Once"}, timeout=60)
        assert refused.status_code == 400
        assert "has no embeddings" in refused.json()["error"]["message"]


def test_conversations_can_be_rendered_there(bot: str, upstream: str) -> None:
    "With nothing here of the model but its name."
    cfg = remote("hf:nobody/nothing", upstream, api="chat", model="alice")
    with running_server(cfg) as url:
        for path in ("/chat", "/v1/chat/completions"):
            for extra in ({"temperature": 0}, {"temperature": 0.8, "seed": 3, "stop": "e"}):
                there, here = (httpx.post(base + path, json={"messages": QUESTION, **extra}, timeout=60).json() for base in (upstream, url))
                assert (here.get("text"), here.get("choices")) == (there.get("text"), there.get("choices"))
                assert {k: here["usage"][k] for k in ("prompt_tokens", "completion_tokens")} == {
                    k: there["usage"][k] for k in ("prompt_tokens", "completion_tokens")
                }
        tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
        refused: list[tuple[str, dict[str, Any]]] = [
            ("/generate", {"prompt": "Once"}), ("/v1/completions", {"prompt": "Once"}), ("/v1/embeddings", {"input": "Once"}),
            ("/tokenize", {"prompt": "Once"}), ("/v1/chat/completions", {"messages": QUESTION, "tools": [tool]}),
            ("/v1/chat/completions", {"messages": QUESTION, "logprobs": True}), ("/chat", {"messages": []}),
        ]  # fmt: skip
        for path, body in refused:
            answer = httpx.post(url + path, json=body, timeout=60)
            assert answer.status_code == 400, (path, answer.text)


def test_nobody_there(bot: str, nobody: str) -> None:
    with running_server(remote(bot, nobody, retries=1)) as url:
        for stream in (False, True):
            answer = httpx.post(f"{url}/chat", json={"messages": QUESTION, "stream": stream}, timeout=60)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")


def test_a_client_that_leaves_is_told_there(bot: str) -> None:
    GatedBackend.gate.clear()
    with running_server(config(bot, backend="gated")) as there, running_server(remote(bot, there)) as url:

        def running() -> int:
            return int(httpx.get(f"{there}/stats").json()["running"])

        def leave() -> None:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{url}/chat", json={"messages": QUESTION, "temperature": 0.5}, timeout=httpx.Timeout(5, read=1))

        thread = threading.Thread(target=leave)
        thread.start()
        until(lambda: running() == 1)
        thread.join()
        until(lambda: running() == 0)
        GatedBackend.gate.set()


def test_a_limit_and_a_silent_server_are_passed_on(bot: str) -> None:
    with running_server(config(bot, backend="gated", rate_limit="1/hour")) as there:
        httpx.get(f"{there}/models")
        with running_server(remote(bot, there, retries=0)) as url:
            answer = httpx.post(f"{url}/chat", json={"messages": QUESTION}, timeout=60)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) > 3000
            assert httpx.get(f"{url}/health/ready").json() == {"status": "ok"}  # a limit of its key is no ill health
            embedded = httpx.post(f"{url}/v1/embeddings", json={"input": "Once"}, timeout=60)
            assert embedded.status_code == 429
            assert httpx.get(f"{url}/stats").json()["models"]["alice"]["health"]["parts"] == {f"{there}/v1": "up"}
    GatedBackend.gate.clear()
    with running_server(config(bot, backend="gated")) as there, running_server(
        remote(bot, there, retries=0, first_token_timeout_s=0.2)
    ) as url:
        assert httpx.post(f"{url}/chat", json={"messages": QUESTION}, timeout=60).status_code == 504
        GatedBackend.gate.set()


def test_it_needs_a_url(bot: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine.urls"):
        create_backend("remote", bot, config(bot, backend="remote"))
