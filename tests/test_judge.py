"""Servers and judges over HTTP: a bot asked by its address, and judges with and without a liking for a place."""

import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from test_evaluate import CPU, TALKS, write
from tiny_bots import make_bot

from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.errors import BotError, ConfigError, DataError
from llmbot.evaluation.compare import compare_bots
from llmbot.evaluation.evaluate import evaluate_bot
from llmbot.evaluation.html_report import comparison_page
from llmbot.evaluation.judge import Pair, judge_pairs
from llmbot.evaluation.lm_eval import run_tasks
from llmbot.evaluation.measure import LIKELIHOOD
from llmbot.monitoring.bootstrap import sign_test
from llmbot.serving.api_server import running_server
from llmbot.serving.engine_settings import RemoteSettings
from llmbot.serving.sampling_params import RequestError
from llmbot.training.launch import free_port

KEY = "sk-a-key-of-a-judge-1234567890"
PAIRS = [Pair(f"Question {n}?", "", "x" * (5 + n), "y" * (5 + (n * 7) % 10)) for n in range(10)]


def answers_of(prompt: str) -> tuple[str, str]:
    "Both answers that a judge is shown."
    a = prompt.split("[Answer A]\n")[1].split("\n\n[Answer B]")[0]
    return a, prompt.split("[Answer B]\n")[1].split("\n\nGive your reasons")[0]


def longer(a: str, b: str) -> str:
    return "[[C]]" if len(a) == len(b) else "A is longer: [[A]]" if len(a) > len(b) else "B is longer: [[B]]"


@contextmanager
def judge(rule: Callable[[str, str], str], busy: int = 0) -> Iterator[tuple[str, list[str]]]:
    "A judge with a rule, behind OpenAI's API, that asks for a key and is full at first; its address, and what it was asked."
    app, asked, refusals = FastAPI(), list[str](), [0]

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "scripted"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, Any]:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            raise HTTPException(401, f"the key {request.headers.get('authorization')} is wrong")
        if refusals[0] < busy:
            refusals[0] += 1
            raise HTTPException(503, headers={"Retry-After": "0"})
        body = await request.json()
        if body["model"] not in ("scripted", "alias"):
            raise HTTPException(404, f"there is no model {body['model']}")
        if "[Answer A]" not in body["messages"][-1]["content"]:
            return {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}
        asked.append(body["messages"][-1]["content"])
        return {"choices": [{"message": {"content": rule(*answers_of(asked[-1]))}, "finish_reason": "stop"}]}

    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", asked
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBOT_REMOTE_API_KEY", KEY)


@pytest.fixture(scope="module")
def bots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("bots")
    return [make_bot(home, "one", seed=3), make_bot(home, "two", seed=4)]


def test_a_judge_without_a_liking(tmp_path: Path) -> None:
    "Its verdicts are those of its rule, row by row, and the test of wins is scipy's; verdicts that are kept are not asked for again."
    with judge(longer, busy=2) as (url, asked):
        found = judge_pairs(url, PAIRS, keep=tmp_path / "verdicts.jsonl")
        seen = len(asked)
        again = judge_pairs(url, PAIRS, keep=tmp_path / "verdicts.jsonl")
        assert (len(asked), again) == (seen, found)
        with pytest.raises(ConfigError, match="pairs: was"):
            judge_pairs(url, PAIRS[1:], keep=tmp_path / "verdicts.jsonl")
    expected = ["tie" if len(p.first) == len(p.second) else "win" if len(p.second) > len(p.first) else "loss" for p in PAIRS]
    assert found.outcomes == expected
    assert (found.judge, found.first_place, seen) == ("scripted", 0.5, 2 * len(PAIRS))
    wins, losses = expected.count("win"), expected.count("loss")
    assert wins * losses > 0
    assert found.score == pytest.approx((wins + expected.count("tie") / 2) / len(PAIRS))
    assert found.interval is not None
    assert found.interval.low <= found.score <= found.interval.high
    assert found.p_value == pytest.approx(scipy.stats.binomtest(wins, wins + losses).pvalue)


def test_a_liking_for_a_place_decides_nothing() -> None:
    with judge(lambda a, b: "[[A]]") as (url, _):
        found = judge_pairs(url, PAIRS)
    assert (found.count("disagreement"), found.first_place, found.score, found.p_value) == (len(PAIRS), 1.0, 0.5, 1.0)
    with judge(lambda a, b: "I like " + a) as (url, _):
        found = judge_pairs(url, PAIRS[:2])
    assert (found.count("unreadable"), found.score, found.first_place) == (2, None, None)
    assert "I like" in found.lines()[-1]


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-another-key-that-is-wrong-00")
    with judge(longer) as (url, _), pytest.raises(RequestError, match="401") as failure:
        judge_pairs(url, PAIRS[:1], RemoteSettings(api_key_env="MY_KEY"))
    assert "sk-another" not in str(failure.value)
    with pytest.raises(RequestError, match="cannot be reached"):
        judge_pairs("http://127.0.0.1:9", PAIRS[:1], RemoteSettings(retries=0))


def test_two_bots_before_a_judge(bots: list[Path], tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", TALKS)
    with judge(longer) as (url, asked):
        found = compare_bots(*bots, data, ["token_f1"], model=CPU, max_new_tokens=8, judge=f"{url}/v1#scripted", resamples=50)
    assert found.judged is not None
    assert len(asked) == 2 * sum(outcome != "same" for outcome in found.judged.outcomes)
    for row in found.examples:
        one, two = len(row.first), len(row.second)
        assert row.judged == ("tie" if one == two else "win" if two > one else "loss")
    assert "judged by scripted, in both orders" in comparison_page(found)
    with judge(lambda a, b: "[[B]]") as (url, _):
        biased = compare_bots(*bots, data, ["token_f1"], model=CPU, max_new_tokens=8, judge=url, resamples=50)
    assert biased.judged is not None
    assert (biased.judged.score, biased.judged.first_place) == (0.5, 0.0)


def test_a_judge_on_this_machine(bots: list[Path], tmp_path: Path) -> None:
    "A bot of random weights says nothing that could be read, and that is told; half a pair is never shown."
    found = judge_pairs(bots[0], PAIRS[:2], model=CPU, max_new_tokens=6)
    assert (found.count("unreadable"), len(found.examples)) == (2, 3)
    with pytest.raises(DataError, match=r"pair 2 with its verdict needs"):
        judge_pairs(bots[0], [PAIRS[0], Pair("?", "", "a " * 3000, "b")], model=CPU, max_new_tokens=6)


def test_a_server_by_its_address(bots: list[Path], tmp_path: Path) -> None:
    "What is measured through a server is what is measured of its bot: answers by messages, and the likelihood token by token."
    data = write(tmp_path / "rows.jsonl", TALKS)
    texts = write(tmp_path / "texts.jsonl", [{"text": "Once upon a time there were 😀 bots. " * n} for n in (1, 5)])
    serving = ServingConfig(models=[str(bot) for bot in bots], port=0, token=SecretStr(KEY))
    metrics = ["exact_match", "token_f1", "chrf"]
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving)) as url:
        there = evaluate_bot(url, data, metrics, engine={"model": "two"}, max_new_tokens=9, examples=20, record=True)
        compared = compare_bots(f"{url}#one", f"{url}#two", data, ["chrf"], max_new_tokens=9, resamples=10)
        with pytest.raises(ConfigError, match=r"has 2 models: one, two. Name one"):
            evaluate_bot(url, data, metrics)
        with pytest.raises(ConfigError, match="needs the model's probabilities"):
            evaluate_bot(url, data, ["perplexity"])
        with pytest.raises(ConfigError, match="holds a user"):
            evaluate_bot(url.replace("//", f"//me:{KEY}@"), data, metrics)
        likely = evaluate_bot(f"{url}#two", [data, texts], list(LIKELIHOOD), tokenizer=bots[0], window=20, stride=9)
        apart = compare_bots(f"{url}#one", bots[1], data, ["bits_per_byte"], tokenizer=bots[0], model=CPU, resamples=50)
        other = make_bot(tmp_path, "other-words", words=["zebra quokka 0123456789"])
        with pytest.raises(ConfigError, match="into other tokens than the tokenizer of other-words"):
            evaluate_bot(f"{url}#two", data, ["perplexity"], tokenizer=other)
    alone = evaluate_bot(bots[1], [data, texts], list(LIKELIHOOD), model=CPU, window=20, stride=9)
    assert likely.metrics == pytest.approx(alone.metrics, rel=1e-5)
    for name, there_is in likely.intervals.items():
        assert (there_is.low, there_is.high) == pytest.approx((alone.intervals[name].low, alone.intervals[name].high), rel=1e-5)
    assert (likely.rows, likely.fingerprint) == (alone.rows, alone.fingerprint)
    ours, theirs = (found.differences["bits_per_byte"] for found in (
        compare_bots(bots[0], bots[1], data, ["bits_per_byte"], model=CPU, resamples=50), apart))  # fmt: skip
    assert (theirs.first, theirs.second, theirs.value) == pytest.approx((ours.first, ours.second, ours.value), rel=1e-4)
    assert (theirs.interval.low, theirs.interval.high) == pytest.approx((ours.interval.low, ours.interval.high), rel=1e-3)
    here = evaluate_bot(bots[1], data, metrics, model=CPU, max_new_tokens=9, examples=20)
    assert there.metrics == here.metrics
    assert [e.answer for e in there.examples] == [e.answer for e in here.examples]
    assert there.fingerprint == here.fingerprint
    assert (there.digest, there.settings["model"], there.settings["prompt"]) == (None, "two", "messages")
    assert "a server or a hub model keeps none" in there.notes[-1]
    assert KEY not in str(there.to_dict())
    assert compared.differences["chrf"].second == pytest.approx(here.metrics["chrf"])
    assert (compared.first, compared.second) == ("one", "two")


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_that_of_scipy(wins: int, losses: int) -> None:
    expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_who_is_missing_is_found_before_anybody_is_asked(bots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The second bot, the judge as a bot and as a server, a file of another run: no answer is computed for any of them."
    rows = str(tmp_path / "rows.jsonl")
    Path(rows).write_text(json.dumps({"prompt": "What is 1 + 1?", "completion": "2"}))

    def never(*args: Any) -> Any:
        raise AssertionError("a bot was asked")

    monkeypatch.setattr("llmbot.evaluation.asking.answers_in_batches", never)
    ask: dict[str, Any] = {"metrics": ["token_f1"], "model": ModelConfig(device="cpu")}
    gone = f"http://127.0.0.1:{free_port()}/v1#judge"
    with pytest.raises(BotError, match="No bot at"):
        compare_bots(bots[0], tmp_path / "absent", rows, **ask)
    with pytest.raises(BotError, match="No bot at"):
        compare_bots(bots[0], bots[1], rows, judge=tmp_path / "absent", **ask)
    with pytest.raises(RequestError, match="cannot be reached"):
        compare_bots(bots[0], bots[1], rows, judge=gone, judge_settings={"retries": 0}, **ask)
    with judge(longer) as (url, asked):
        with pytest.raises(ConfigError, match=r"has no model 'nobody'\. It has scripted"):
            compare_bots(bots[0], bots[1], rows, judge=f"{url}#nobody", **ask)
        assert not asked
        compare_bots(f"{url}#alias", f"{url}#alias", rows, judge=f"{url}#alias", **{**ask, "model": None})
    (tmp_path / "kept.second.jsonl").write_text('{"key": {"bot": "another"}}\n')
    with pytest.raises(ConfigError, match="answers of another run"):
        compare_bots(bots[0], bots[1], rows, keep=tmp_path / "kept.jsonl", **ask)
    with pytest.raises(AssertionError, match="was asked"):
        compare_bots(bots[0], bots[1], rows, **ask)


def test_a_chat_format_that_is_not_the_bots(bots: list[Path], tmp_path: Path) -> None:
    "It is refused and not ignored: by evaluate, by compare, for the judge, and for tasks of lm_eval."
    rows = str(tmp_path / "rows.jsonl")
    Path(rows).write_text(json.dumps({"prompt": "What is 1 + 1?", "completion": "2"}))
    other = shutil.copytree(bots[0], tmp_path / "other")
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    own, chatml = (ModelConfig(device="cpu", chat_template=name) for name in ("own", "chatml"))
    assert evaluate_bot(bots[0], rows, ["token_f1"], model=chatml, max_new_tokens=4).rows == 1
    assert evaluate_bot(bots[0], rows, ["token_f1"], model=own, max_new_tokens=4).rows == 1
    for work in (lambda: evaluate_bot(other, rows, ["token_f1"], model=chatml),
                 lambda: compare_bots(bots[0], other, rows, ["token_f1"], model=chatml),
                 lambda: compare_bots(bots[0], bots[1], rows, ["token_f1"], model=chatml, judge=other),
                 lambda: run_tasks(other, tmp_path, ["x"], model=chatml, command=sys.executable)):  # fmt: skip
        with pytest.raises(ConfigError, match="chat_template is 'chatml', and .*other has another one"):
            work()
