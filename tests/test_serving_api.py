"""The API over a real socket, asked by OpenAI's own client, by httpx and by raw bytes."""

import asyncio
import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bots import GatedBackend, make_bot

from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.config_io import LiveConfig
from llmbot.core.errors import BotError, ServingError
from llmbot.core.model_manager import load_bot
from llmbot.serving.api_server import create_app, running_server
from llmbot.serving.prompts import encode_prompt

pytestmark = pytest.mark.server
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def bots(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bots")
    return [str(make_bot(folder, name, seed)) for seed, name in enumerate(["alice", "bob"], 1)]


def config(models: list[str], **serving: Any) -> Config:
    return Config(model=ModelConfig(device="cpu"), serving=ServingConfig(models=models, port=0, **serving))


@pytest.fixture(scope="module")
def url(bots: list[str]) -> Iterator[str]:
    with running_server(config(bots, max_new_tokens=24, max_body_bytes=50_000)) as url:
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    "Wait for something that another thread does."
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.005)


def events(body: str) -> list[Any]:
    "The JSON of server-sent events; the stream must end as it should."
    parts = body.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


# OpenAI's own client


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["alice", "bob"]
    assert client.models.retrieve("bob").owned_by == "llmbot"
    with pytest.raises(openai.NotFoundError, match="no model 'carol'"):
        client.models.retrieve("carol")


@pytest.mark.parametrize("model", ["alice", "bob"])
def test_chat_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "messages": QUESTION, "temperature": 0.9, "seed": 7, "max_tokens": 20}
    whole = client.chat.completions.create(**ask)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    assert whole.choices[0].finish_reason == "length"
    pieces = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert pieces[-1].choices == []
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.model_copy(update={"prompt_tokens_details": None}) == whole.usage.model_copy(
        update={"prompt_tokens_details": None})  # the second time the prompt may have been computed already
    without = list(client.chat.completions.create(**ask, stream=True))
    assert all(p.usage is None for p in without)


def test_chat_is_the_bots_own_answer(client: openai.OpenAI, bots: list[str]) -> None:
    "The oracle is transformers' `generate` on the ids that the chat template gives."
    import torch

    bot = load_bot(bots[0], device="cpu")
    ids = torch.tensor([bot.chat.prompt_ids(QUESTION)])
    out = bot.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    answer = client.chat.completions.create(model="alice", messages=QUESTION, temperature=0, max_completion_tokens=24)
    assert answer.choices[0].message.content == bot.tokenizer.decode(out, skip_special_tokens=True)


def test_text_completion(client: openai.OpenAI, bots: list[str]) -> None:
    bot = load_bot(bots[0])
    ids = bot.tokenizer("Once upon").input_ids
    for prompt in ("Once upon", ["Once upon"], ids):
        answer = client.completions.create(model="alice", prompt=prompt, temperature=0, max_tokens=12)
        pieces = list(client.completions.create(model="alice", prompt=prompt, temperature=0, max_tokens=12, stream=True))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)
        assert "".join(p.choices[0].text for p in pieces) == answer.choices[0].text != ""


def test_echoed_prompts_are_not_encoded_where_streams_run(url: str, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []

    def noted(*args: Any) -> tuple[tuple[int, ...], bool]:
        where.append(threading.current_thread().name)
        return encode_prompt(*args)

    monkeypatch.setattr("llmbot.serving.openai_api.encode_prompt", noted)
    answer = client.completions.create(model="alice", prompt=["Once", "upon"], echo=True, max_tokens=1)
    assert [choice.text.startswith(prompt) for choice, prompt in zip(answer.choices, ("Once", "upon"), strict=True)] == [True, True]
    assert where == []  # text is echoed as it came
    client.completions.create(model="alice", prompt=["Once", "upon"], echo=True, logprobs=0, max_tokens=1)
    assert len(where) == 2
    assert "llmbot-api" not in where


def test_many_at_once(url: str, client: openai.OpenAI) -> None:
    "Streams that run together are what they are alone, also when sampled."
    seeds = range(6)

    def ask(seed: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Hello " * (seed + 1)}]
        return {"model": "alice", "messages": messages, "temperature": 1.2, "seed": seed, "max_tokens": 15 + seed}

    async def stream(asynchronous: openai.AsyncOpenAI, seed: int) -> str:
        pieces = await asynchronous.chat.completions.create(**ask(seed), stream=True)
        return "".join([p.choices[0].delta.content or "" async for p in pieces])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asynchronous:
            return await asyncio.gather(*(stream(asynchronous, seed) for seed in seeds))

    alone = [client.chat.completions.create(**ask(seed)).choices[0].message.content for seed in seeds]
    assert asyncio.run(together()) == alone
    assert len(set(alone)) == len(alone)


def test_stop_strings(client: openai.OpenAI) -> None:
    full = client.chat.completions.create(model="alice", messages=QUESTION, temperature=0, max_tokens=24).choices[0].message.content
    assert full is not None
    for stop in (full[5:8], full[11:12], full[3:15]):
        ask: dict[str, Any] = {"model": "alice", "messages": QUESTION, "temperature": 0, "max_tokens": 24, "stop": ["\0never", stop]}
        answer = client.chat.completions.create(**ask)
        assert answer.choices[0].message.content == full[: full.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        pieces = client.chat.completions.create(**ask, stream=True)
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == full[: full.index(stop)]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n": 9}, "n"),
        ({"n": 10**9}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, None),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"extra_body": {"best_of": 2}}, "best_of"),
        ({"tools": [{"type": "function", "function": {"name": "f()"}}]}, "tools.0.function.name"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"logit_bias": {"١": 1}}, "logit_bias.١"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
        ({"extra_body": {"min_q": 0.1}}, "min_q"),
        ({"extra_body": {"body": 1}}, "body"),
        ({"max_tokens": 4000}, "max_tokens"),  # within the server's limit, beyond the bot's context
        ({"max_tokens": 5000}, "max_tokens"),  # beyond the server's limit
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"messages": [{"role": "robot", "content": "?"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ],
)
def test_refusals(client: openai.OpenAI, given: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "alice", "messages": QUESTION, **given})
    body = caught.value.body
    assert isinstance(body, dict)
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    if param is not None:
        assert body["param"] == param


def test_neutral_values_pass(client: openai.OpenAI) -> None:
    neutral: dict[str, Any] = {
        "n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [],
        "response_format": {"type": "text"}, "store": False, "user": "someone", "stop": None,
    }  # fmt: skip
    assert client.chat.completions.create(model="alice", messages=QUESTION, max_tokens=2, **neutral).choices


def test_context_length(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="alice", messages=[{"role": "user", "content": "word " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    for most in (0, 1):  # the limit of the answer is not what is wrong
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="alice", prompt=[5] * 10_000, max_tokens=most, echo=True)
        assert (caught.value.param, "max_tokens" in caught.value.message) == ("prompt", False)


# The project's own endpoints


def test_own_endpoints(url: str) -> None:
    with httpx.Client(base_url=url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert [(m["name"], m["default"]) for m in http.get("/models").json()["models"]] == [("alice", True), ("bob", False)]
        before = http.get("/stats").json()["models"]["alice"]
        for path, body in (("/generate", {"prompt": "Once"}), ("/chat", {"messages": QUESTION})):
            body |= {"temperature": 0, "max_new_tokens": 9}
            whole = http.post(path, json=body).json()
            pieces = events(http.post(path, json=body | {"stream": True}).text)
            assert "".join(p["text"] for p in pieces) == whole["text"]
            assert (pieces[-1]["finish_reason"], pieces[-1]["usage"]) == (whole["finish_reason"], whole["usage"])
            assert [p for p in pieces[:-1] if "finish_reason" in p] == []
        assert whole["message"] == {"role": "assistant", "content": whole["text"]}
        after = http.get("/stats").json()["models"]["alice"]
    assert after["completed"] - before["completed"] == 4
    assert after["completion_tokens"] - before["completion_tokens"] == 36
    assert set(after["ttft_s"]) == {"p50", "p90", "p99"}


def test_characters_are_never_split(url: str) -> None:
    "Every event is complete UTF-8 and JSON, and the pieces are the whole; the bot talks much broken Unicode."
    body = {"messages": QUESTION, "max_new_tokens": 200, "temperature": 1.5, "top_p": 1, "seed": 3}
    whole = httpx.post(f"{url}/chat", json=body, timeout=60).json()["text"]
    with httpx.stream("POST", f"{url}/chat", json=body | {"stream": True}, timeout=60) as answer:
        raw = b"".join(answer.iter_raw())
    assert "".join(piece["text"] for piece in events(raw.decode("ascii"))) == whole
    assert any(ord(c) > 127 for c in whole)


def test_request_ids(url: str) -> None:
    assert httpx.get(f"{url}/health", headers={"X-Request-Id": "job-7"}).headers["x-request-id"] == "job-7"
    made = httpx.get(f"{url}/health", headers={"X-Request-Id": "forged\tline"}).headers["x-request-id"]
    assert len(made) == 32
    answer = httpx.post(f"{url}/generate", json={"prompt": "a", "max_new_tokens": 1}, headers={"X-Request-Id": "job-8"}, timeout=60)
    assert answer.json()["id"] == "job-8"


# Bad input

BAD_BODIES: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"null", 400),
    (b"[]", 400),
    (b'"text"', 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b'{"messages": NaN}', 400),
    (b'{"messages": [], "messages": []}', 400),
    (b'{"messages": []}', 400),
    (b'{"messages": [[]]}', 400),
    (b'{"messages": [{}]}', 400),
    (b'{"messages": [{"role": "user"}]}', 400),
    (b'{"messages": [{"role": "user", "content": 5}]}', 400),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e400}', 400),
    (b'{"messages": [{"role": "user", "content": "Hi"}], "seed": ' + b"9" * 5000 + b"}", 400),
    (b'{"messages": [{"role": "user", "content": "Hi"}], "stream": "yes"}', 400),
    (b"[" * 40_000, 400),
    (b"[" * 200 + b"]" * 200, 400),
    (b'{"a":' * 9_000 + b"1" + b"}" * 9_000, 413),
    (b'{"messages": "' + b"x" * 60_000 + b'"}', 413),
]


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions"])
def test_bad_bodies(url: str, path: str) -> None:
    for body, status in BAD_BODIES:
        answer = httpx.post(url + path, content=body, headers={"Content-Type": "application/json"}, timeout=20)
        assert answer.status_code == status, (body[:60], answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.post(url + path, data={"messages": "x"}).status_code == 415
    zipped = gzip.compress(b'{"messages": [{"role": "user", "content": "Hi"}]}')
    answer = httpx.post(url + path, content=zipped, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"})
    assert (answer.status_code, "Content-Encoding: gzip" in answer.json()["error"]["message"]) == (415, True)
    assert httpx.get(url + path).json()["error"]["message"] == "GET is not allowed here"
    assert httpx.get(f"{url}/v2/nothing").status_code == 404


def test_null_bytes_and_control_characters_are_text(url: str) -> None:
    message = {"role": "user", "content": "a\0b\x1b[2J<|im_end|>\ufffe"}
    answer = httpx.post(f"{url}/chat", json={"messages": [message], "max_new_tokens": 2}, timeout=60)
    assert answer.status_code == 200


def test_body_without_declared_length(url: str) -> None:
    "A chunked body is counted while it comes."

    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 1000

    try:
        answer = httpx.post(f"{url}/chat", content=endless(), headers={"Content-Type": "application/json"}, timeout=20)
        assert answer.status_code == 413
    except httpx.WriteError:
        pass  # the server has answered and closed while the client was still sending


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PATHS = ["/chat", "/generate", "/v1/chat/completions", "/v1/completions"]
KEYS = ["model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "tools", "stream_options", "user"]


@pytest.fixture(scope="module")
def gated_app(bots: list[str]) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    GatedBackend.gate.set()
    app = create_app(config(bots, backend="gated", max_new_tokens=2))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5), st.sampled_from(PATHS))
def test_no_body_makes_a_5xx(gated_app: Any, body: dict[str, Any], path: str) -> None:
    if "prompt" not in body and "messages" not in body:
        body = {"messages": QUESTION, **body}
    answer = gated_app.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_prompt_ids_are_those_of_training(gated_app: Any, bots: list[str]) -> None:
    "What the backend is asked is the beginning of what training would see, up to the first supervised token."
    talk = [{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": "It is 42. 😀"}]
    for path in ("/chat", "/v1/chat/completions"):
        GatedBackend.seen.clear()
        assert gated_app.post(path, json={"messages": talk[:-1]}).status_code == 200
        trained = load_bot(bots[0]).chat.render(talk)
        [asked] = GatedBackend.seen
        assert list(asked.prompt_ids) == trained.input_ids[: len(asked.prompt_ids)]
        assert trained.assistant_mask.index(1) == len(asked.prompt_ids)


def test_defaults_come_from_the_configuration(bots: list[str]) -> None:
    from fastapi.testclient import TestClient

    GatedBackend.gate.set()
    live = LiveConfig(config(bots, backend="gated", max_new_tokens=3, temperature=0.3, top_p=0.8))
    with TestClient(create_app(live), base_url="http://127.0.0.1") as client:
        GatedBackend.seen.clear()
        client.post("/chat", json={"messages": QUESTION})
        client.post("/chat", json={"messages": QUESTION, "temperature": 0, "max_new_tokens": 1, "stop": "x"})
        live.update({"serving.temperature": 1.5, "serving.max_new_tokens_limit": 4})
        client.post("/chat", json={"messages": QUESTION})
        refused = client.post("/chat", json={"messages": QUESTION, "max_new_tokens": 5})
    shown = [(r.params.max_new_tokens, r.params.temperature, r.params.top_p, r.params.stop) for r in GatedBackend.seen]
    assert shown == [(3, 0.3, 0.8, ()), (1, 0.0, 0.8, ("x",)), (3, 1.5, 0.8, ())]
    assert refused.json()["error"]["message"] == "max_new_tokens is 5; this server allows 4"


# Keys, origins, addresses


def test_token(bots: list[str]) -> None:
    with running_server(config(bots, backend="gated", token="a-long-enough-secret", cors_origins=["https://chat.example.org"])) as url:
        good, bad = (openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("a-long-enough-secret", "guess"))
        assert good.models.list().data
        with pytest.raises(openai.AuthenticationError) as caught:
            bad.models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{url}/health").status_code == 200
        for path in ("/stats", "/models", "/openapi.json", "/v1/models", "/nothing"):
            assert httpx.get(url + path).status_code == 401
        assert httpx.get(f"{url}/health/").status_code != 200
        large = httpx.post(f"{url}/chat", content=b"x" * 2_000_000)  # the key is asked for before the body is read
        assert large.status_code == 401

        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, allowed in (("https://chat.example.org", True), ("https://evil.example", False)):
            answer = httpx.options(f"{url}/chat", headers={"Origin": origin, **asks})
            assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
        page = httpx.get(f"{url}/models", headers={"Origin": "https://chat.example.org"})
        assert (page.status_code, page.headers["access-control-allow-origin"]) == (401, "https://chat.example.org")


def test_a_page_of_another_name_is_not_served(url: str) -> None:
    answer = httpx.get(f"{url}/models", headers={"Host": "rebound.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_host")


def test_port_in_use(bots: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cfg = Config(serving=ServingConfig(models=bots, port=taken.getsockname()[1]))
        with pytest.raises(ServingError, match="cannot listen on 127.0.0.1"), running_server(cfg):
            pass


def test_a_broken_bot_is_refused_at_start(tmp_path: Path) -> None:
    make_bot(tmp_path, "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(BotError, match="Cannot load"), running_server(config([str(tmp_path / "broken")])):
        pass
    with pytest.raises(BotError, match="No bot at"), running_server(config([str(tmp_path / "absent")])):
        pass


# Load, deadlines, clients that leave


@pytest.fixture
def gated(bots: list[str]) -> Iterator[str]:
    GatedBackend.gate.clear()
    GatedBackend.ended.clear()
    limits = {"max_concurrent_requests": 1, "max_queue_size": 1, "max_new_tokens": 50, "request_timeout_s": 60}
    with running_server(config(bots[:1], backend="gated", **limits)) as url:
        yield url
        GatedBackend.gate.set()


def now(url: str) -> tuple[int, int]:
    stats = httpx.get(f"{url}/stats").json()
    return stats["running"], stats["waiting"]


def in_thread(work: Callable[[], httpx.Response], answers: list[httpx.Response]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    return thread


def test_full_queue(gated: str) -> None:
    def ask() -> httpx.Response:
        return httpx.post(f"{gated}/chat", json={"messages": QUESTION}, timeout=60)

    answers: list[httpx.Response] = []
    threads = [in_thread(ask, answers)]
    until(lambda: now(gated) == (1, 0))
    threads.append(in_thread(ask, answers))
    until(lambda: now(gated) == (1, 1))
    for stream in (False, True):
        refused = httpx.post(f"{gated}/chat", json={"messages": QUESTION, "stream": stream})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "queue_full"
    client = openai.OpenAI(base_url=f"{gated}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="alice", messages=QUESTION, stream=True)
    assert caught.value.status_code == 503
    GatedBackend.gate.set()
    for thread in threads:
        thread.join()
    assert [a.json()["text"] for a in answers] == ["word " * 50] * 2
    assert now(gated) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["running", "waiting", "streaming"])
def test_a_client_that_leaves_frees_its_place(gated: str, stream: bool, place: str) -> None:
    first = socket.create_connection(gated_address(gated)) if place == "waiting" else None
    if first:
        send(first, stream=False)
        until(lambda: now(gated) == (1, 0))
    leaver = socket.create_connection(gated_address(gated))
    send(leaver, stream)
    until(lambda: now(gated) == ((1, 1) if first else (1, 0)))
    if place == "streaming" and stream:
        GatedBackend.gate.set()
        assert leaver.recv(100)
        GatedBackend.gate.clear()
    leaver.close()
    until(lambda: now(gated) == ((1, 0) if first else (0, 0)))
    if first:
        first.close()
    until(lambda: now(gated) == (0, 0))
    until(lambda: len(GatedBackend.ended) == 1)  # the one that was running; the one that waited never began
    if place != "streaming":
        assert httpx.get(f"{gated}/stats").json()["models"]["alice"]["cancelled"] == (2 if first else 1)


def gated_address(url: str) -> tuple[str, int]:
    return "127.0.0.1", httpx.URL(url).port or 0


def send(connection: socket.socket, stream: bool) -> None:
    body = json.dumps({"messages": QUESTION, "stream": stream, "max_new_tokens": 900}).encode()
    head = f"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def test_deadline(bots: list[str]) -> None:
    GatedBackend.gate.clear()
    with running_server(config(bots[:1], backend="gated", request_timeout_s=0.2)) as url:
        for stream in (False, True):
            answer = httpx.post(f"{url}/chat", json={"messages": QUESTION, "stream": stream}, timeout=60)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        GatedBackend.gate.set()
        with httpx.stream("POST", f"{url}/chat", json={"messages": QUESTION, "stream": True, "max_new_tokens": 900}, timeout=60) as late:
            lines = late.iter_lines()
            next(lines)
            GatedBackend.gate.clear()
            rest = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert rest[-1]["error"]["code"] == "timeout"  # the status was sent long ago, so it is an event
        assert now(url) == (0, 0)
    GatedBackend.gate.set()


@pytest.mark.parametrize(("path", "count"), [("/generate", 1), ("/v1/completions", 1), ("/v1/completions", 8)])
def test_a_client_that_does_not_read_has_its_places_no_longer_than_others(bots: list[str], path: str, count: int) -> None:
    "Its answers stand still because a write blocks, so that no wait for a token sees the deadline."
    body = {"prompt": "Once", "stream": True} | ({"n": count} if count > 1 else {})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # the buffers of the socket are full

    async def main() -> None:
        app = create_app(config(bots[:1], backend="gated", max_new_tokens=900, request_timeout_s=0.5, ping_s=0.1))
        bodies = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            return bodies.pop() if bodies else await asyncio.Event().wait()

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope | {"client": ("127.0.0.1", 1), "scheme": "http"}, receive, send), 20)

    GatedBackend.gate.set()
    GatedBackend.ended.clear()
    asyncio.run(main())
    assert len(GatedBackend.ended) == count


def test_a_server_that_stops_says_so_while_running_answers_end(bots: list[str]) -> None:
    GatedBackend.gate.set()
    block = running_server(config(bots[:1], backend="gated"), grace_s=60)
    url = block.__enter__()
    ask = {"json": {"messages": QUESTION, "stream": True, "max_new_tokens": 900}, "timeout": 60}
    with httpx.stream("POST", f"{url}/chat", **ask) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        GatedBackend.gate.clear()
        ending = threading.Thread(target=block.__exit__, args=(None, None, None))
        ending.start()
        until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        refused = httpx.post(f"{url}/chat", json={"messages": QUESTION})
        assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (503, "stopping", "60")
        GatedBackend.gate.set()
        body = "\n".join([first, *lines])
    assert body.count("word ") == 900
    assert body.rstrip().endswith("data: [DONE]")
    ending.join()


def test_an_answer_that_outlives_the_end_of_the_server_is_told(bots: list[str]) -> None:
    GatedBackend.gate.set()
    ask = {"json": {"messages": QUESTION, "stream": True, "max_new_tokens": 900}, "timeout": 60}
    with contextlib.ExitStack() as left_open:
        with running_server(config(bots[:1], backend="gated"), grace_s=0.2) as url:
            lines = left_open.enter_context(httpx.stream("POST", f"{url}/chat", **ask)).iter_lines()
            assert "word" in next(lines)
            GatedBackend.gate.clear()
        rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "stopping"
        assert rest[-1] == "data: [DONE]"
    GatedBackend.gate.set()


SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
import tiny_bots
from llmbot.core.config import Config, ServingConfig
from llmbot.serving.api_server import serve
tiny_bots.GatedBackend.gate.set()
serving = ServingConfig(models=[sys.argv[2]], backend="gated", port=0, max_new_tokens=200)
serve(Config(serving=serving), on_ready=lambda url: print(url, flush=True))
print("stopped", flush=True)
"""


def test_a_server_that_says_that_it_is_ready_can_be_stopped_in_order(bots: list[str]) -> None:
    "The signal comes at the very moment: what it runs, such as an engine in a process of its own, must not stay behind."
    hasty = SERVE.replace("print(url, flush=True)", "os.kill(os.getpid(), signal.SIGTERM)").replace("import sys", "import os, signal, sys")
    done = subprocess.run([sys.executable, "-c", hasty, str(Path(__file__).parent), bots[0]], capture_output=True, text=True, timeout=120)
    assert "Application shutdown complete" in done.stderr, done.stderr
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_signals_let_running_answers_end(bots: list[str], sign: signal.Signals) -> None:
    slow = SERVE.replace("tiny_bots.GatedBackend.gate.set()", "").replace("import tiny_bots", SLOW_GATE)
    code = [sys.executable, "-c", slow, str(Path(__file__).parent), bots[0]]
    with subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            with httpx.stream("POST", f"{url}/chat", json={"messages": QUESTION, "stream": True}, timeout=60) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                process.send_signal(sign)
                body = "\n".join([first, *lines])
            assert body.count("word ") == 200
            assert body.rstrip().endswith("data: [DONE]")
            process.wait(30)
            errors = process.stderr.read() if process.stderr else ""
            assert "Traceback" not in errors, errors
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
        finally:
            process.kill()


SLOW_GATE = """
import threading, time
import tiny_bots
def tick():
    while True:
        tiny_bots.GatedBackend.gate.set(); time.sleep(0.01)
        tiny_bots.GatedBackend.gate.clear(); time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
"""


# A model that others trained


def test_stories260k_continues_as_transformers_does(shared: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with running_server(config([str(path)], max_new_tokens_limit=511)) as url:
        for prompt, count in (("", 400), ("Lily and Tom went to the", 300), ("The café in 東京", 60)):
            ids = torch.tensor([tokenizer(prompt).input_ids])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)[0]
            expected = tokenizer.decode(out, skip_special_tokens=True)[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :]
            body = {"prompt": prompt, "temperature": 0, "max_new_tokens": count}
            whole = httpx.post(f"{url}/generate", json=body, timeout=60).json()
            assert whole["text"] == expected
            assert whole["usage"]["completion_tokens"] == len(out) - ids.shape[1]
            streamed = events(httpx.post(f"{url}/generate", json=body | {"stream": True}, timeout=60).text)
            assert "".join(piece["text"] for piece in streamed) == expected
        assert expected  # the last prompt has bytes beyond the vocabulary
        started = httpx.post(f"{url}/generate", json={"prompt": "", "temperature": 0, "max_new_tokens": 40}, timeout=60).json()["text"]
        assert started.startswith("Once upon a time, there was a little girl named Lily.")
