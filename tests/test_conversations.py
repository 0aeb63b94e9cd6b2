"""Conversations that the server keeps, over a real socket and in a real database.

That is SQLite, or the server that `LLMBOT_TEST_DATABASE` names by its SQLAlchemy URL, such as postgresql+psycopg://NAME@127.0.0.1/postgres:
each test has a database of its own there, which it leaves behind.
"""

import hashlib
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from tiny_bots import GatedBackend, make_bot

from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.errors import ConfigError
from llmbot.serving.api_server import running_server

pytestmark = pytest.mark.server
USER, ADMIN = {"Authorization": "Bearer the-key-of-users"}, {"Authorization": "Bearer the-key-of-admins"}


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bot(tmp_path_factory.mktemp("bots"), "alice"))


def database(folder: Path) -> str:
    "The URL of the database that belongs to a folder."
    if (server := os.environ.get("LLMBOT_TEST_DATABASE")) is None:
        return f"sqlite:///{folder / 'chats.db'}"
    name, url = "test_" + hashlib.sha256(str(folder).encode()).hexdigest()[:16], sa.make_url(server)
    with sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool).connect() as connection:
        if not connection.scalar(sa.text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name}):
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
    return url.set(database=name).render_as_string(hide_password=False)


def config(bot: str, folder: Path, **serving: Any) -> Config:
    given = {"conversations_url": database(folder), "temperature": 0, "max_new_tokens": 6, **serving}
    return Config(model=ModelConfig(device="cpu"), serving=ServingConfig(models=[bot], port=0, **given))


@pytest.fixture
def url(bot: str, tmp_path: Path) -> Iterator[str]:
    with running_server(config(bot, tmp_path)) as url:
        yield url


@pytest.fixture
def gated(bot: str, tmp_path: Path) -> Iterator[str]:
    GatedBackend.gate.clear()
    with running_server(config(bot, tmp_path, backend="gated", max_new_tokens=3)) as url:
        yield url
        GatedBackend.gate.set()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.005)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def begin(url: str, **body: Any) -> str:
    answer = httpx.post(f"{url}/conversations", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def stored(url: str, id: str) -> list[dict[str, Any]]:
    return list(httpx.get(f"{url}/conversations/{id}").json()["messages"])


def test_kept_is_as_sent_each_time(url: str) -> None:
    "The oracle is the stateless call with the whole conversation."
    id, sent = begin(url, messages=[{"role": "system", "content": "Be brief."}]), [{"role": "system", "content": "Be brief."}]
    for i, text in enumerate(["What is 12 + 30?", "And 世界 \0 then?", "Once upon a time"]):
        body = {"conversation_id": id, "messages": [user(text)], "stream": i == 1}
        answer = httpx.post(f"{url}/chat", json=body, timeout=60)
        sent.append(user(text))
        expected = httpx.post(f"{url}/chat", json={"messages": sent}, timeout=60).json()
        if i == 1:
            frames = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
            assert "".join(f["text"] for f in frames) == expected["text"]
            assert (frames[-1]["conversation_id"], frames[-1]["dropped_messages"]) == (id, 0)
        else:
            assert answer.json()["text"] == expected["text"]
            assert answer.json()["usage"] == expected["usage"]
            assert answer.json()["conversation_id"] == id
        sent.append(expected["message"])
        assert stored(url, id) == sent


def test_it_survives_a_restart_and_is_another_keys_business(bot: str, tmp_path: Path) -> None:
    cfg = config(bot, tmp_path, token="the-key-of-users", admin_token="the-key-of-admins")
    with running_server(cfg) as url:
        id = httpx.post(f"{url}/conversations", json={"messages": [user("Hi")]}, headers=USER).json()["id"]
    with running_server(cfg) as url, httpx.Client(base_url=url, headers=ADMIN) as other:
        assert other.get(f"/conversations/{id}").status_code == 404
        assert other.delete(f"/conversations/{id}").status_code == 404
        refused = other.post("/chat", json={"conversation_id": id, "messages": [user("?")]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "conversation_not_found")
        assert other.get("/conversations").json() == {"conversations": [], "has_more": False}
        mine = httpx.get(f"{url}/conversations/{id}", headers=USER).json()
        assert mine["messages"] == [user("Hi")]


def test_pages(url: str) -> None:
    ids = [begin(url) for _ in range(5)]
    with httpx.Client(base_url=url) as http:
        seen, after = [], ""
        while True:
            page = http.get(f"/conversations?limit=2{after}").json()
            seen += [c["id"] for c in page["conversations"]]
            if not page["has_more"]:
                break
            after = f"&after={seen[-1]}"
        assert seen == ids[::-1]
        for query in ("limit=0", "limit=101", "limit=x", f"after={'x' * 65}"):
            assert http.get(f"/conversations?{query}").status_code == 400
        assert http.get("/conversations?after=%00").status_code == 404
        assert http.delete(f"/conversations/{ids[0]}").json() == {"id": ids[0], "deleted": True}
        assert http.delete(f"/conversations/{ids[0]}").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_stored_of_a_turn_that_does_not_end(gated: str, stream: bool) -> None:
    "A client that leaves, and a turn that is refused, leave no trace; the next turn is as if they had never been."
    id = begin(gated)
    body = {"conversation_id": id, "messages": [user("Hi")], "stream": stream}
    with pytest.raises(httpx.TimeoutException), httpx.stream("POST", f"{gated}/chat", json=body, timeout=0.3) as answer:
        answer.read()
    until(lambda: httpx.get(f"{gated}/stats").json()["running"] == 0)
    refused = httpx.post(f"{gated}/chat", json=body | {"messages": [{"role": "robot", "content": "?"}]})
    assert refused.status_code == 400
    too_long = httpx.post(f"{gated}/chat", json=body | {"messages": [user("word " * 3000)]})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert stored(gated, id) == []
    GatedBackend.gate.set()
    until(lambda: httpx.post(f"{gated}/chat", json=body).status_code == 200)
    assert stored(gated, id) == [user("Hi"), {"role": "assistant", "content": "word word word "}]


def test_a_second_turn_at_the_same_time_is_refused(gated: str) -> None:
    id, answers = begin(gated), []
    body = {"conversation_id": id, "messages": [user("first")]}
    first = threading.Thread(target=lambda: answers.append(httpx.post(f"{gated}/chat", json=body, timeout=60)))
    first.start()
    until(lambda: httpx.get(f"{gated}/stats").json()["running"] == 1)
    for stream in (False, True):
        second = httpx.post(f"{gated}/chat", json=body | {"messages": [user("second")], "stream": stream})
        assert (second.status_code, second.json()["error"]["code"]) == (409, "conversation_busy")
    assert httpx.delete(f"{gated}/conversations/{id}").status_code == 409
    GatedBackend.gate.set()
    first.join()
    assert answers[0].status_code == 200
    assert [m["content"] for m in stored(gated, id)] == ["first", "word word word "]


def test_two_servers_on_one_database_do_not_mix_turns(bot: str, tmp_path: Path) -> None:
    GatedBackend.gate.clear()
    cfg = config(bot, tmp_path, backend="gated", max_new_tokens=2)
    with running_server(cfg) as one, running_server(cfg) as two:
        id, answers = begin(one), []
        bodies = {url: {"conversation_id": id, "messages": [user(url)]} for url in (one, two)}

        def ask(url: str) -> None:
            answers.append(httpx.post(f"{url}/chat", json=bodies[url], timeout=60))

        threads = [threading.Thread(target=ask, args=[url]) for url in bodies]
        for thread in threads:
            thread.start()
        until(lambda: all(httpx.get(f"{url}/stats").json()["running"] == 1 for url in (one, two)))
        GatedBackend.gate.set()
        for thread in threads:
            thread.join()
        assert sorted(a.status_code for a in answers) == [200, 409]
        assert len(stored(one, id)) == 2


def test_a_long_history_is_refused_or_cut_when_asked(url: str) -> None:
    "What is cut is left out of the prompt and stays in the conversation."
    turns = [m for i in range(60) for m in (user(f"question {i} " + "word " * 20), {"role": "assistant", "content": f"answer {i}"})]
    id = begin(url, messages=[{"role": "system", "content": "Be brief."}, *turns])
    body = {"conversation_id": id, "messages": [user("And now?")]}
    refused = httpx.post(f"{url}/chat", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    cut = httpx.post(f"{url}/chat", json=body | {"truncate": "oldest"}, timeout=60).json()
    dropped = cut["dropped_messages"]
    assert 0 < dropped < len(turns)
    assert dropped % 2 == 0
    kept = [{"role": "system", "content": "Be brief."}, *turns[dropped:], user("And now?")]
    assert httpx.post(f"{url}/chat", json={"messages": kept}, timeout=60).json()["text"] == cut["text"]
    one_more = [{"role": "system", "content": "Be brief."}, *turns[dropped - 2 :], user("And now?")]
    refused = httpx.post(f"{url}/chat", json={"messages": one_more, "max_new_tokens": 6})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert len(stored(url, id)) == 1 + len(turns) + 2


def test_retention(bot: str, tmp_path: Path) -> None:
    with running_server(config(bot, tmp_path)) as url:
        id = begin(url)
    with running_server(config(bot, tmp_path, conversation_days=1e-9)) as url:
        assert httpx.get(f"{url}/conversations/{id}").status_code == 404
    with running_server(config(bot, tmp_path, conversation_days=None)) as url:
        assert httpx.get(f"{url}/conversations/{id}").status_code == 404  # it was deleted, not hidden


def test_the_users_directory_is_touched_at_first_use_only(bot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / "home" / name))
    with running_server(config(bot, tmp_path, conversations_url=None)) as url:
        httpx.post(f"{url}/chat", json={"messages": [user("Hi")]}, timeout=60)
        assert not (tmp_path / "home").exists()
        begin(url)
        assert (tmp_path / "home" / "llmbot" / "conversations.db").exists()


def test_a_database_that_somebody_else_holds_stops_nothing_else(bot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path))
    holder = sqlite3.connect(tmp_path / "conversations.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    server = running_server(config(bot, tmp_path, conversations_url=None))
    with server as url, ThreadPoolExecutor() as threads, httpx.Client(base_url=url, timeout=2) as client:
        begun = threads.submit(begin, url)
        for _ in range(100):  # the request is on its way, or waits, all the while
            assert client.get("/health/live").status_code == 200
        assert not begun.done()
        holder.execute("ROLLBACK")
        assert stored(url, begun.result()) == []
    holder.close()


def test_a_database_that_cannot_be_had_is_refused_at_start(bot: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be kept"), running_server(config(bot, tmp_path, conversations_url="sqlite:////no/such/a.db")):
        pass


def test_a_driver_that_is_missing_is_named_with_its_extra(bot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    wanted = config(bot, tmp_path, conversations_url="postgresql+psycopg://ann:s3cret@db/chats")
    with pytest.raises(ConfigError, match=r"llmbot\[postgres\]") as refused, running_server(wanted):
        pass
    assert "s3cret" not in str(refused.value)
