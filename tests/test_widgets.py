"""The widgets that talk against a live server, and their votes as data for DPO; no front end is needed."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from tiny_bots import make_bot

from llmbot.app.chat_source import open_source
from llmbot.app.chat_widget import ChatWidget
from llmbot.app.compare_widget import CompareWidget, close
from llmbot.app.data_preview import inspect_data
from llmbot.app.training_widget import TrainingWidget, look_at_data
from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.config_io import load_config
from llmbot.core.data_reader import read_rows
from llmbot.core.errors import ServingError
from llmbot.serving.api_server import running_server
from llmbot.serving.sampling_params import RequestError

pytest.importorskip("ipywidgets", reason="the widgets need the extra 'notebook'")
pytestmark = pytest.mark.server
KEY = "the-key-of-users"
HEADERS = {"Authorization": f"Bearer {KEY}"}
GREEDY = Config(serving=ServingConfig(temperature=0, max_new_tokens=8))
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with two bots."
    folder = tmp_path_factory.mktemp("widgets")
    for seed, name in enumerate(("alice", "bob"), 1):
        make_bot(folder, name, seed)
    return folder


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    "A server with both, which asks for a key."
    serving = ServingConfig(models=[str(home / "alice"), str(home / "bob")], port=0, token=KEY)
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving)) as found:
        yield found


def asked(url: str, model: str, *messages: dict[str, str]) -> dict[str, Any]:
    "What the API says, in one piece: the oracle."
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_chat_with_a_server(url: str, tmp_path: Path) -> None:
    "Two turns are what the API answers; likelihoods are the API's; Stop ends the work on the server."
    widget = ChatWidget(url, GREEDY, system=SYSTEM["content"], votes=tmp_path / "votes.jsonl", key=KEY)
    assert widget.source.name == "alice"
    widget.settings.likely.value = True
    talk = [SYSTEM]
    for question in ("What is 12 + 30?", "And then?"):
        widget.ask(question)
        widget.wait()
        talk.append(user(question))
        answer = asked(url, "alice", *talk)
        turn, choice = widget.tree.turns[widget.tree.tip], answer["choices"][0]
        assert turn.text == choice["message"]["content"]
        assert [(one["token"], one["logprob"]) for one in turn.logprobs] == [
            (one["token"], pytest.approx(one["logprob"], abs=1e-4)) for one in choice["logprobs"]["content"]]
        assert f"{answer['usage']['completion_tokens']} tokens" in turn.note
        talk.append({"role": "assistant", "content": turn.text})
    widget.settings.likely.value = False
    widget.settings.temperature.value, widget.settings.longest.value = 1.0, 1024
    before = httpx.get(f"{url}/stats", headers=HEADERS).json()["total"]["cancelled"]
    begun = monotonic()
    for _ in range(10):  # a sampled answer may end by itself before it is stopped
        widget.ask("Go on for long")
        while not widget.tree.turns[widget.tree.tip].text:
            assert monotonic() - begun < 60
            sleep(0.001)
        widget.halt.click()
        widget.wait()
        if widget.tree.turns[widget.tree.tip].note.endswith("stopped"):
            break
    else:
        pytest.fail("no answer was stopped")
    while httpx.get(f"{url}/stats", headers=HEADERS).json()["total"]["cancelled"] == before:
        assert monotonic() - begun < 60, "the server goes on"
    widget.close()


class Another(BaseHTTPRequestHandler):
    "A server that is none of ours."

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": "hello"}')


def test_what_a_server_refuses_is_said(url: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="key"):
        ChatWidget(url, key="a-wrong-key")
    with pytest.raises(ServingError, match="has no bot carol: it has alice, bob"):
        open_source(f"{url}#carol", key=KEY)
    with pytest.raises(ServingError, match="there is no /docs/v1/models"):
        open_source(f"{url}/docs", key=KEY)
    with HTTPServer(("127.0.0.1", 0), Another) as other:
        Thread(target=other.handle_request).start()
        with pytest.raises(ServingError, match="not as OpenAI's API does"):
            open_source(f"http://127.0.0.1:{other.server_port}")
    widget = ChatWidget(f"{url}#bob", GREEDY, votes=tmp_path / "votes.jsonl", key=KEY)
    widget.settings.longest.value = 1024
    widget.ask("word " * 5000)
    widget.wait()
    assert "context" in widget.said.value
    assert widget.tree.turns[widget.tree.tip].note == "failed"
    widget.close()


def test_votes_on_a_servers_bots_are_data_for_dpo(url: str, home: Path, tmp_path: Path) -> None:
    "Each column is the answer of the bot that it names; ten votes are ten pairs, which the preflight of a DPO recipe takes without loss."
    votes = tmp_path / "votes.jsonl"
    widget = CompareWidget(f"{url}#alice", f"{url}#bob", cfg=GREEDY, votes=votes, key=KEY, seed=1)
    for number in range(10):
        question = f"Once upon a time {number}"
        widget.ask(question)
        for thread in widget.threads:
            thread.join()
        said = {column.source.name: column.answer.text for column in widget.columns if column.source}
        assert said == {name: asked(url, name, user(question))["choices"][0]["message"]["content"] for name in ("alice", "bob")}
        next(column for column in widget.columns if column.source and column.source.name == "bob").best.click()
    close(widget)
    rows = [row.record for row in read_rows([str(votes)])]
    assert [row["prompt"] for row in rows] == [[user(f"Once upon a time {number}")] for number in range(10)]
    assert {(row["meta"]["chosen_bot"], row["meta"]["rejected_bot"]) for row in rows} == {("bob", "alice")}
    recipe = load_config(overrides=["training.method=dpo", f"model.base={home / 'alice'}", f"training.output_dir={tmp_path / 'better'}",
                                    f"data.train={votes}", "data.validation_split=0.2", f"data.cache_dir={tmp_path}"], env={})
    training = TrainingWidget(recipe)
    look_at_data(training)
    assert "The data was read." in training.said.value
    assert "Once upon a time" in training.report.value
    report = inspect_data(training.config)
    assert (report.data.kind, report.data.rows_read, report.data.rows_kept, report.errors) == ("preference", 10, 10, [])
    assert sum(split.documents for split in report.data.splits.values()) == 10
    training.view.clock.set()
