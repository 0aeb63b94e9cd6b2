"""Keys, limits, administration and health over a real socket."""

import json
import logging
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tiny_bots import GatedBackend, make_bot

from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.config_io import load_config, save_config, to_dict
from llmbot.core.errors import ConfigError
from llmbot.serving.admin_api import visible_config
from llmbot.serving.api_server import create_app, running_server

pytestmark = pytest.mark.server
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]
USER, ADMIN = {"Authorization": "Bearer the-key-of-users"}, {"Authorization": "Bearer the-key-of-admins"}


@pytest.fixture(scope="module")
def bots(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bots")
    return [str(make_bot(folder, name, seed)) for seed, name in enumerate(["alice", "bob"], 1)]


def config(bots: list[str], **serving: Any) -> Config:
    return Config(model=ModelConfig(device="cpu"), serving=ServingConfig(models=bots, port=0, backend="gated", **serving))


@pytest.fixture(scope="module")
def guarded(bots: list[str]) -> Iterator[str]:
    GatedBackend.gate.set()
    with running_server(config(bots, token="the-key-of-users", admin_token="the-key-of-admins", max_new_tokens=3)) as url:
        yield url


def test_limit_of_a_key(bots: list[str]) -> None:
    "The official client is refused with its own exception, and finds the headers that it knows."
    cfg = config(bots, token="the-key-of-users", admin_token="the-key-of-admins", rate_limit="2/hour")
    with running_server(cfg) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="the-key-of-users", max_retries=0)
        left = [client.models.with_raw_response.list().headers["x-ratelimit-remaining-requests"] for _ in range(2)]
        assert left == ["1", "0"]
        with pytest.raises(openai.RateLimitError) as caught:
            client.models.list()
        assert caught.value.code == "rate_limit_exceeded"
        assert 3500 < int(caught.value.response.headers["retry-after"]) <= 3600
        assert caught.value.response.headers["x-request-id"]
        told = [caught.value.response.headers[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining", "reset")]
        assert told == ["2", "0", f"{caught.value.response.headers['retry-after']}s"]
        assert httpx.get(f"{url}/models", headers=ADMIN).headers["x-ratelimit-remaining-requests"] == "1"  # a key of its own
        assert [httpx.get(f"{url}/health").status_code for _ in range(4)] == [200] * 4


def test_a_counter_that_cannot_be_had_is_refused_at_start(bots: list[str]) -> None:
    with pytest.raises(ConfigError, match="cannot be counted in 'floppy'"):
        create_app(config(bots, rate_limit="2/hour", rate_limit_storage="floppy://x"))


def test_health_needs_no_key(guarded: str) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert httpx.get(guarded + path).json() == {"status": "ok"}
    assert httpx.get(f"{guarded}/health/ready/").status_code == 401  # only these paths, letter by letter


def test_administration(guarded: str) -> None:
    with httpx.Client(base_url=guarded) as http:
        assert http.get("/admin/config").status_code == 401
        asked = http.get("/admin/config", headers=USER)
        assert (asked.status_code, asked.json()["error"]["code"]) == (403, "not_an_admin")
        shown = http.get("/admin/config", headers=ADMIN).text
        assert '"top_p"' in shown
        assert "the-key-of" not in shown
        changed = http.patch("/admin/config", headers=ADMIN, json={"serving.max_new_tokens": 2})
        assert changed.json()["config"]["serving"]["max_new_tokens"] == 2
        answer = http.post("/chat", headers=USER, json={"messages": QUESTION}).json()
        assert answer["usage"]["completion_tokens"] == 2
        refused = http.patch("/admin/config", headers=ADMIN, json={"serving.port": 1, "serving.top_p": 7, "training.sneed": 3})
        message = refused.json()["error"]["message"]
        assert refused.status_code == 400
        assert all(key in message for key in ("serving.port", "serving.top_p", "training.sneed"))
        loaded = [http.post(f"/admin/models/bob/{what}", headers=ADMIN).json()["loaded"] for what in ("load", "unload")]
        assert loaded == [True, False]
        assert http.post("/admin/models/bob/unload", headers=USER).status_code == 403


def test_administration_is_off_unless_enabled(bots: list[str]) -> None:
    with running_server(config(bots)) as url:
        answer = httpx.post(f"{url}/admin/models/bob/load")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_disabled")
        assert "LLMBOT_SERVING__ADMIN_TOKEN" in answer.json()["error"]["message"]


def test_browsers_of_named_origins(bots: list[str]) -> None:
    with running_server(config(bots, cors_origins=["https://chat.example.org"])) as url:
        for method in ("GET", "POST", "PATCH", "DELETE"):
            asks = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization,x-stainless-lang"}
            allowed = httpx.options(f"{url}/admin/config", headers={"Origin": "https://chat.example.org", **asks})
            assert allowed.status_code == 200
            assert method in allowed.headers["access-control-allow-methods"]
            assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
            refused = httpx.options(f"{url}/chat", headers={"Origin": "https://evil.example", **asks})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "cors_refused")
            assert "access-control-allow-origin" not in refused.headers
        form = httpx.post(f"{url}/chat", content=b'{"messages": []}', headers={"Content-Type": "text/plain", "Origin": "https://evil.example"})
        assert form.status_code == 415  # all that a page may send without asking first


def raw(url: str, data: bytes) -> bytes:
    "The first line of the answer to these bytes."
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=20) as connection:
        connection.sendall(data)
        return connection.makefile("rb").readline()


def test_what_no_client_sends(guarded: str) -> None:
    assert httpx.get(f"{guarded}/models?{'x' * 9000}", headers=USER).status_code == 414
    assert httpx.get(f"{guarded}/models", headers={**USER, **{f"X-{i}": "1" for i in range(100)}}).status_code == 431
    assert httpx.put(f"{guarded}/admin/config", headers=USER).headers["allow"] == "GET, PATCH"
    assert b" 400 " in raw(guarded, b"GET /models HTTP/1.1\r\n" + b"X: " + b"y" * 200_000)
    assert b" 400 " in raw(guarded, b"GET /models HTTP/1.1\r\n\r\n")  # no Host
    assert b" 400 " in raw(guarded, b"\0\1\2\3\r\n\r\n")
    both = b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"
    assert b" 400 " in raw(guarded, both)


def test_every_line_of_a_request_has_its_id(guarded: str, caplog: pytest.LogCaptureFixture) -> None:
    def lines_of(name: str) -> list[str]:
        return [record.getMessage() for record in caplog.records if name in record.getMessage()]

    with caplog.at_level(logging.INFO, logger="llmbot.serving"):
        httpx.post(f"{guarded}/chat?secret=1", headers={**USER, "X-Request-Id": "job-9"}, json={"messages": QUESTION})
        limit = time.monotonic() + 20
        while len(lines_of("job-9")) < 2:  # it is written when the answer has been sent
            assert time.monotonic() < limit, "it was never written"
            time.sleep(0.005)
    lines = lines_of("job-9")
    answered, access = (line.split()[:4] for line in lines)
    assert answered[0] == "job-9"
    assert answered[2] == "length,"
    assert access == ["job-9", "POST", "/chat", "200"]


def test_the_document_says_what_every_route_answers(bots: list[str]) -> None:
    document = create_app(config(bots)).openapi()
    for path, methods in document["paths"].items():
        for method, said in methods.items():
            assert {"4XX", "5XX"} <= set(said["responses"]), (path, method)
            done = [answer for status, answer in said["responses"].items() if status.startswith("2")]
            assert done, (path, method)
            if not path.startswith("/v1"):
                assert all(kind["schema"] for answer in done for kind in answer.get("content", {}).values()), (path, method)


def test_headers_that_dribble_are_cut_off_and_others_are_served(bots: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    "The clock runs from the first byte, however many follow, also of a second request on the same connection."
    monkeypatch.setattr("llmbot.serving.slow_headers.PatientlyBounded.headers_timeout_s", 0.4)
    with running_server(config(bots, max_new_tokens=2)) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        with socket.create_connection(address) as slow, socket.create_connection(address) as second:
            second.sendall(whole)
            said = b""
            while not said.endswith(b'"ok"}'):
                said += second.recv(10_000)
            for dribbler in (slow, second):
                dribbler.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
                began, sent = time.monotonic(), 0
                while not readable(dribbler, 0.02):
                    dribbler.sendall(b"a")
                    sent += 1
                    assert httpx.get(f"{url}/health").status_code == 200
                    assert time.monotonic() < began + 20, "it was never cut off"
                assert sent > 1
                said = dribbler.makefile("rb").read()  # to the end of the connection
                assert said.startswith(b"HTTP/1.1 408")
                assert b'"code": "timeout"' in said
                assert b"x-request-id" in said
        with httpx.Client(base_url=url) as client:
            assert [client.get("/health").status_code for _ in range(3)] == [200] * 3


def test_what_is_no_http_is_refused_in_openais_shape(guarded: str) -> None:
    with socket.create_connection(("127.0.0.1", int(guarded.rpartition(":")[2]))) as client:
        client.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
        head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"] == {
        "message": "Invalid HTTP request received.", "type": "invalid_request_error", "param": None, "code": "invalid_http"}


def readable(sock: socket.socket, seconds: float) -> bool:
    return bool(select.select([sock], [], [], seconds)[0])


def test_no_password_of_a_url_is_shown_or_stored(bots: list[str], tmp_path: Path) -> None:
    "Planted in every setting that is a URL: in the settings as printed, saved, listed by the command and by the API, and in messages."
    planted = "pl4nted-pa55word"
    urls = {"conversations_url": f"postgresql://ann:{planted}@db/chats", "rate_limit_storage": f"redis://:{planted}@db"}
    serving = ServingConfig(models=bots, backend="remote", admin_token="the-key-of-admins", rate_limit="9/hour", **urls)  # type: ignore[arg-type]
    cfg = Config(serving=serving, engine={"urls": [f"http://ann:{planted}@other:8001/v1", "http://plain:8001/v1"]})
    save_config(cfg, tmp_path / "saved.yaml")
    saved = (tmp_path / "saved.yaml").read_text()
    command = [sys.executable, "-m", "llmbot.app.cli", "config", "show"]
    given = [f"serving.conversations_url={urls['conversations_url']}"]
    shown = [subprocess.run([*command, *given, *more], capture_output=True, text=True, check=True)
             for more in ([], ["--json"], ["--changed"])]  # fmt: skip
    texts = [repr(cfg), str(cfg.serving), json.dumps(to_dict(cfg)), saved, *(done.stdout + done.stderr for done in shown)]
    texts.append(json.dumps(visible_config(cfg)))
    for wrong in ({"conversations_url": [urls["conversations_url"]]}, {"port": urls["conversations_url"]}):
        with pytest.raises(ConfigError) as refused:
            ServingConfig(**wrong)  # type: ignore[arg-type]
        texts.append(str(refused.value))
    with pytest.raises(ConfigError) as refused:
        create_app(config(bots, rate_limit="2/hour", rate_limit_storage=f"floppy://ann:{planted}@db"))
    texts.append(str(refused.value))
    assert [text for text in texts if planted in text] == []
    for key in ("SERVING__CONVERSATIONS_URL", "SERVING__RATE_LIMIT_STORAGE", "SERVING__ADMIN_TOKEN", "ENGINE__URLS"):
        assert f"give it as LLMBOT_{key}" in saved
    env = {"LLMBOT_SERVING__CONVERSATIONS_URL": urls["conversations_url"], "LLMBOT_SERVING__RATE_LIMIT_STORAGE": urls["rate_limit_storage"],
           "LLMBOT_SERVING__ADMIN_TOKEN": "the-key-of-admins", "LLMBOT_ENGINE__URLS": json.dumps(cfg.engine["urls"])}  # fmt: skip
    assert load_config(tmp_path / "saved.yaml", env=env) == cfg
    save_config(cfg, tmp_path / "whole.yaml", show_secrets=True)
    assert load_config(tmp_path / "whole.yaml", env={}) == cfg
    assert (tmp_path / "whole.yaml").stat().st_mode & 0o077 == 0
