"""A bot behind another llmbot: the same answers, and what happens when the other fails."""

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
    GatedBackend.gate.clear()
    with running_server(config(bot, backend="gated")) as there, running_server(
        remote(bot, there, retries=0, first_token_timeout_s=0.2)
    ) as url:
        assert httpx.post(f"{url}/chat", json={"messages": QUESTION}, timeout=60).status_code == 504
        GatedBackend.gate.set()


def test_it_needs_a_url(bot: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine.urls"):
        create_backend("remote", bot, config(bot, backend="remote"))
