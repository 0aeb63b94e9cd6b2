"""The dashboard in a real browser: signing in, the pages Chat and Server, and the files of votes.

With LLMBOT_SCREENSHOTS=DIR the pictures of the documentation are written there.
"""

import asyncio
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tiny_bots import GatedBackend, make_bot

from llmbot.app.dashboard_mount import beside_api, running_dashboard
from llmbot.app.dashboard_pages import Workplace
from llmbot.core.config import Config, DataConfig, ModelConfig, ServingConfig
from llmbot.core.data_formats import recognise
from llmbot.core.data_processor import prepare_data
from llmbot.core.data_reader import read_rows
from llmbot.core.model_manager import load_bot
from llmbot.core.preflight import preflight
from llmbot.serving.api_server import running_server
from llmbot.serving.backends import register_backend
from llmbot.serving.conversations import create
from llmbot.serving.sampling_params import Chunk, GenerationRequest

pytest.importorskip("panel", reason="the dashboard needs the extra 'dashboard'")
pytest.importorskip("playwright", reason="tests in a browser need playwright")
from playwright.sync_api import expect  # noqa: E402

expect.set_options(timeout=60_000)

if TYPE_CHECKING:
    from conftest import NetworkLog
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.server]
USER, ADMIN = "the-key-of-users", "the-key-of-admins"
Record = Callable[["BrowserContext"], "NetworkLog"]
PAIR = [{"role": "user", "content": "What is 12 + 30?"}]
ELEMENTS = """() => {
  const count = root => [...root.querySelectorAll("*")].reduce((n, e) => n + 1 + (e.shadowRoot ? count(e.shadowRoot) : 0), 0)
  return count(document)
}"""


@register_backend("scripted")
class ScriptedBackend(GatedBackend):
    "Says the words of `words` over and over, one each step while the gate is open."

    name = "scripted"
    words = ["word "]
    ending = "length"  # why its answers end

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        count = 0
        async for chunk in super().generate(request):
            ending = self.ending if chunk.finish_reason else None
            yield dataclasses.replace(chunk, text=self.words[count % len(self.words)], finish_reason=ending)
            count += 1
            await asyncio.sleep(0.005)  # the pace of a model, so that there is something to stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with two bots."
    root = tmp_path_factory.mktemp("dashboard")
    for seed, name in enumerate(("alice", "bob"), 1):
        make_bot(root / "bots", name, seed)
    return root


@pytest.fixture(scope="module")
def team(folder: Path) -> Iterator[str]:
    "The API with keys, and the dashboard beside it."
    models = [str(folder / "bots" / name) for name in ("alice", "bob")]
    serving = ServingConfig(models=models, port=0, temperature=0, max_new_tokens=8, token=USER, admin_token=ADMIN,
                            conversations_url=f"sqlite:///{folder}/team.db", rate_limit="500/hour")
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving), around=beside_api(folder)) as url:
        yield url


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[tuple[str, Workplace]]:
    "The dashboard alone, without keys, on a bot whose words are known."
    serving = ServingConfig(models=[str(folder / "bots" / "alice")], port=0, backend="scripted", max_new_tokens=6, admin_token=ADMIN,
                            conversations_url=f"sqlite:///{folder}/alone.db")
    GatedBackend.gate.set()
    with running_dashboard(Config(model=ModelConfig(device="cpu"), serving=serving), folder) as (url, place):
        yield url, place
        GatedBackend.gate.set()


@pytest.fixture
def another(browser: "Browser", network_log: Record) -> "Iterator[Callable[[], BrowserContext]]":
    "Browsers of their own for each test, whose requests may not leave this machine, and whose pages may not fail."
    opened: list[BrowserContext] = []
    faults: list[str] = []

    def new() -> "BrowserContext":
        opened.append(browser.new_context(viewport={"width": 1100, "height": 850}))
        opened[-1].set_default_timeout(60_000)
        opened[-1].on("weberror", lambda fault: faults.append(f"{fault.page.url if fault.page else ''}: {fault.error}"))
        network_log(opened[-1])
        return opened[-1]

    yield new
    for made in opened:
        made.close()
    assert faults == [], "a script of a page failed"


@pytest.fixture
def context(another: "Callable[[], BrowserContext]") -> "BrowserContext":
    "One of them."
    return another()


def enter(context: "BrowserContext", url: str, key: str = "", page: str = "chat") -> "Page":
    "Open a page of the dashboard, by its address, signed in where a key is given."
    if key:
        assert context.request.post(f"{url}/sign-in", form={"key": key}, max_redirects=0).status == 303
    shown = context.new_page()
    shown.goto(f"{url}?page={page}")
    shown.get_by_role("heading", name=page.partition("&")[0].title(), exact=True).wait_for()
    return shown


def message(page: "Page") -> "Locator":
    return page.get_by_role("textbox", name="Message (Enter")


def send(page: "Page", text: str) -> None:
    "Send a message with Enter, when the page is ready to take it."
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    message(page).fill(text)
    message(page).press("Enter")


def say(page: "Page", text: str, until: str = "The answer is complete.") -> None:
    "Send a message with Enter and wait for the end of its answer."
    send(page, text)
    page.get_by_role("article", name="You").filter(has_text=text).last.wait_for()
    page.get_by_text(until).wait_for()


def kept(url: str, key: str) -> list[dict[str, Any]]:
    "The conversations of a key as the API has them, the last changed first."
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as api:
        found = api.get("/conversations").json()["conversations"]
        return [api.get(f"/conversations/{one['id']}").json() for one in found]


def picture(page: "Page", name: str) -> None:
    "Keep a picture for the documentation, where one is asked for."
    if where := os.environ.get("LLMBOT_SCREENSHOTS"):
        page.wait_for_timeout(400)  # of the theme's change of colours, and of nothing that is tested
        page.screenshot(path=Path(where, f"{name}.png"), type="png")


# --- chat --------------------------------------------------------------------------------------------------------------

def test_a_key_is_asked_for(team: str, context: "BrowserContext") -> None:
    "Without a key there is no page and no websocket; with a wrong one neither; a right one stays in the cookie over a reload."
    url = f"{team}/ui"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"x-llmbot-key": "admin", "x-llmbot-admin": "1"}).status_code == 401
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "bokeh, x"}
    assert httpx.get(f"{url}/ws", headers=upgrade).status_code == 403
    assert httpx.get(f"{url}/ws", headers={**upgrade, "Authorization": f"Bearer {ADMIN}", "Origin": "http://evil.test"}).status_code == 403
    page = context.new_page()
    page.goto(url)
    page.get_by_label("Key").fill("a-wrong-key")
    page.get_by_role("button", name="Sign in").click()
    assert page.get_by_role("alert").inner_text() == "This key is wrong."
    page.get_by_label("Key").fill(USER)
    page.get_by_role("button", name="Sign in").click()
    message(page).wait_for()
    page.reload()
    message(page).wait_for()
    assert USER not in page.content()
    assert page.evaluate("document.cookie") == ""  # no script can read it
    other = context.new_page()  # another tab of the same visitor
    other.goto(url)
    message(other).wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Key").wait_for()
    expect(other.get_by_role("alert")).to_contain_text("The connection to the server is lost", timeout=60_000)
    other.get_by_role("button", name="Reload").click()
    other.get_by_label("Key").wait_for()


def test_chat(team: str, context: "BrowserContext") -> None:
    "Ask, answer again, edit and branch, reload, reopen, delete; the oracle is the API's own answer and its store."
    page = enter(context, f"{team}/ui", USER)
    say(page, "What is 12 + 30?")
    asked = httpx.post(f"{team}/chat", json={"messages": PAIR}, headers={"Authorization": f"Bearer {USER}"}, timeout=60).json()
    one, = kept(team, USER)
    assert one["messages"] == [*PAIR, asked["message"]]
    assert page.get_by_text("8 tokens · ").count() == 1
    old = page.get_by_role("article", name="Bot").last.element_handle()
    page.get_by_role("button", name="Answer again").click()
    old.wait_for_element_state("hidden")  # the status may say for less than a frame that the bot is answering
    page.get_by_text("The answer is complete.").wait_for()
    assert kept(team, USER)[0]["messages"] == one["messages"]  # temperature 0: the same answer, in the place of the old one
    say(page, "And then?")
    page.get_by_role("button", name="Edit and ask anew").last.click()
    expect(message(page)).to_have_value("And then?")
    say(page, "Why?")
    newest, oldest = kept(team, USER)
    assert [m["content"] for m in oldest["messages"]][::2] == ["What is 12 + 30?", "And then?"]
    assert [m["content"] for m in newest["messages"]][::2] == ["What is 12 + 30?", "Why?"]
    page.reload()
    page.get_by_label("Earlier conversations").click()
    page.get_by_role("menuitem").filter(has_text="What is 12").last.click()
    page.get_by_role("article", name="You").filter(has_text="And then?").wait_for()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("article").first.wait_for(state="detached")
    assert [c["id"] for c in kept(team, USER)] == [newest["id"]]


def test_settings_come_from_the_address_and_go_into_one(team: str, context: "BrowserContext") -> None:
    page = enter(context, f"{team}/ui", ADMIN, "chat&model=bob&max_new_tokens=3&system=Be+brief.")
    say(page, "Hi there")
    talk = kept(team, ADMIN)[0]
    assert (talk["model"], talk["messages"][0]) == ("bob", {"role": "system", "content": "Be brief."})
    assert page.get_by_text("3 tokens").count() == 1
    page.get_by_role("button", name="Share these settings").click()
    page.get_by_role("button", name="Show the settings as they are now").click()
    address = page.get_by_label("Address of this page")
    address.wait_for()
    expect(address).to_have_value(f"{team}/ui?page=chat&model=bob&system=Be+brief.&max_new_tokens=3")
    expect(page.get_by_label("YAML")).to_have_value("model: bob\nsystem: Be brief.\nmax_new_tokens: 3\n")


def test_two_browsers_keep_separate_chats(team: str, another: "Callable[[], BrowserContext]", context: "BrowserContext") -> None:
    "At the same time, with different keys: neither sees the other's words, on the page or in the list."
    ann, bob = enter(context, f"{team}/ui", USER), enter(another(), f"{team}/ui", ADMIN)
    for page, word in ((ann, "apples"), (bob, "pears")):
        send(page, f"Tell me of {word}")
    for page, mine, theirs in ((ann, "apples", "pears"), (bob, "pears", "apples")):
        page.get_by_text("The answer is complete.").wait_for()
        assert page.get_by_text(f"Tell me of {mine}").count() >= 1
        assert page.get_by_text(f"Tell me of {theirs}").count() == 0
    for key, mine, theirs in ((USER, "apples", "pears"), (ADMIN, "pears", "apples")):
        words = json.dumps(kept(team, key))
        assert mine in words
        assert theirs not in words


def test_an_answer_streams_and_stops(alone: tuple[str, Workplace], context: "BrowserContext") -> None:
    "At least three partial texts are seen before the end; Esc ends the answer and keeps what was said."
    url, place = alone
    page = enter(context, url)
    page.get_by_role("button", name="System prompt and sampling").click()
    page.get_by_label("Longest answer").fill("900")
    page.get_by_label("Longest answer").press("Tab")
    GatedBackend.gate.clear()
    send(page, "Go on and on")
    page.get_by_text("The bot is answering.").wait_for()
    answer, seen = page.get_by_role("article", name="Bot").last, set[int]()
    while len(seen) < 4:
        GatedBackend.gate.set()
        time.sleep(0.02)
        GatedBackend.gate.clear()
        seen.add(answer.inner_text().count("word"))
    page.keyboard.press("Escape")
    page.get_by_text("The answer was stopped.").wait_for()
    GatedBackend.gate.set()
    said = answer.inner_text().count("word")
    assert max(seen) <= said < 900
    assert page.get_by_text("stopped").count() >= 1
    say(page, "And now?", until="cut off at its longest")
    store = place.conversations.store()
    page.get_by_label("Earlier conversations").wait_for()
    with store.begin() as connection:
        rows = connection.exec_driver_sql("SELECT message FROM llmbot_messages WHERE position = 1").all()
    messages = [json.loads(row[0]) for row in rows]
    assert [m["content"].count("word") for m in messages if m.get("stopped")] == [said]


def test_an_answer_outlives_its_reader(alone: tuple[str, Workplace], another: "Callable[[], BrowserContext]",
                                       context: "BrowserContext") -> None:  # fmt: skip
    "The browser is closed in the middle of an answer; it is written to its end, and found again."
    url, place = alone
    GatedBackend.gate.clear()
    reader = another()
    page = enter(reader, url)
    send(page, "Will you go on without me?")
    page.get_by_text("The bot is answering.").wait_for()
    reader.close()
    assert len(place.answers) == 1
    GatedBackend.gate.set()
    limit = time.monotonic() + 60
    while place.answers:
        assert time.monotonic() < limit, "the answer is still being written"
        time.sleep(0.02)
    page = enter(context, url)
    page.get_by_label("Earlier conversations").click()
    page.get_by_role("menuitem").filter(has_text="Will you go on without me?").click()
    answer = page.get_by_role("article", name="Bot")
    answer.wait_for()
    assert answer.inner_text().count("word") == 6
    assert answer.get_by_text("stopped").count() == 0


def test_the_engine_is_the_one_of_the_settings(folder: Path, tmp_path: Path, another: "Callable[[], BrowserContext]") -> None:
    "A bot on PyTorch and its export on ONNX Runtime say the same on the page Chat; an engine that a bot is not made for says which one is."
    pytest.importorskip("onnxruntime_genai", reason="exports need the extra 'onnx'")
    from llmbot.serving.onnx_export import export_onnx

    bot, export = folder / "bots" / "alice", tmp_path / "export"
    export_onnx(bot, export, "fp32")
    said: dict[str, str] = {}
    for backend, mine, other in (("torch", bot, export), ("onnx", export, bot)):
        serving = ServingConfig(port=0, temperature=0, max_new_tokens=8, backend=backend,
                                conversations_url=f"sqlite:///{tmp_path}/{backend}.db")
        with running_dashboard(Config(serving=serving), folder) as (url, place):
            page = enter(another(), url)
            page.get_by_text("No bot is open yet").wait_for()
            for found, told in ((other, "serving.backend=onnx" if backend == "torch" else "is no export"), (mine, "is open.")):
                page.get_by_label("Open a bot").fill(str(found))
                page.get_by_role("button", name="Open", exact=True).click()
                page.locator(".notice").filter(has_text=told).wait_for()
            say(page, "What is 12 + 30?")
            said[backend] = page.get_by_role("article", name="Bot").locator(".body").inner_text()
            assert place.server is not None
            assert place.server.stats()["total"]["completed"] == 1
    assert said["torch"] == said["onnx"]


def test_a_script_in_an_answer_is_text(alone: tuple[str, Workplace], context: "BrowserContext") -> None:
    attack = ["<script>window.pwned = 1</script> ", "<img src=x onerror='window.pwned = 1'> ", "![x](http://192.0.2.1/x.png) ",
              "[y](javascript:window.pwned=1) ", "**bold** ", "<iframe srcdoc='<script>parent.pwned = 1</script>'></iframe> "]
    page = enter(context, alone[0])
    ScriptedBackend.words = attack
    try:
        say(page, "Attack")
    finally:
        ScriptedBackend.words = ["word "]
    answer = page.get_by_role("article", name="Bot").last
    text = answer.inner_text()
    for part in ("<script>window.pwned = 1</script>", "<img src=x", "[image: x, http://192.0.2.1/x.png]", "<iframe srcdoc="):
        assert part in text
    assert answer.locator("strong").inner_text() == "bold"  # what is meant as Markdown is formatted
    assert answer.locator("script, img, iframe, a").count() == 0
    assert page.evaluate("window.pwned === undefined")


def test_what_a_browser_may_not_send_is_logged_in_short(alone: tuple[str, Workplace], context: "BrowserContext") -> None:
    "Values that no widget can have are refused; the log says so in a line each, without the values."
    lines, names = list[str](), ("bokeh.server.protocol_handler", "panel.reactive", "tornado.application")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.name} {logging.Formatter().format(record)}")  # type: ignore[method-assign]
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        page = enter(context, alone[0])
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        page.evaluate("""() => { for (const m of Bokeh.documents[0]._all_models.values())
            if ("value" in m && m.label !== undefined) try { m.value = "secret".repeat(50000) } catch {} }""")
        limit = time.monotonic() + 60
        while {line.partition(" ")[0] for line in lines} != set(names):
            assert time.monotonic() < limit, [line[:200] for line in lines]
            page.wait_for_timeout(50)
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
    assert max(map(len, lines)) < 10_000
    assert not [line for line in lines if "secretsecret" * 100 in line]
    context.close()


def test_a_long_conversation_stays_usable(alone: tuple[str, Workplace], context: "BrowserContext") -> None:
    "Of 2,000 messages the last are drawn, more on demand; the number of elements is bounded, and one can go on."
    url, place = alone
    said = [(role, text.format(i)) for i in range(1000) for role, text in (("user", "question {}"), ("assistant", "*answer* {}"))]
    create(place.conversations.store(), "local", None, [{"role": role, "content": text} for role, text in said])
    for i in range(100):  # later ones, as many as are offered at first
        create(place.conversations.store(), "local", None, [{"role": "user", "content": f"another {i}"}])
    page = enter(context, url)
    page.get_by_label("Earlier conversations").click()
    page.get_by_role("menuitem").filter(has_text="another 99").wait_for()
    assert page.get_by_role("menuitem").filter(has_text="question 0").count() == 0
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Older conversations").click()
    page.get_by_role("button", name="Older conversations").wait_for(state="detached")
    page.get_by_label("Earlier conversations").click()
    page.get_by_role("menuitem").filter(has_text="question 0").click()
    articles = page.get_by_role("article")
    page.get_by_text("answer 999").wait_for()
    assert articles.count() == 30
    few = page.evaluate(ELEMENTS)
    page.get_by_role("button", name="Show earlier messages (1970)").click()
    page.get_by_text("answer 970").wait_for()
    assert articles.count() == 60
    assert page.evaluate(ELEMENTS) < few + 30 * 20
    assert few < 3000
    say(page, "And a last one?")
    assert articles.count() == 30
    page.get_by_text("messages had no room in the prompt").wait_for()
    page.get_by_role("button", name="Delete").click()
    articles.first.wait_for(state="detached")


def test_votes_become_data_for_dpo(team: str, folder: Path, context: "BrowserContext") -> None:
    "Two bots side by side, blind; a vote; thumbs up and down. What is written is what the data reader and the DPO preflight take."
    page = enter(context, f"{team}/ui", USER)
    page.get_by_label("Beside it").click()
    page.get_by_role("menuitem", name="bob").click()
    page.get_by_label("Hide names").wait_for()
    for i in range(3):
        send(page, f"Once upon a time {i}")
        page.get_by_text("Which answer is better?").wait_for()
        pair = page.get_by_role("article", name="Bot").last
        assert [pair.get_by_text(f"Answer {x}").count() for x in "AB"] == [1, 1]
        assert pair.get_by_text("alice").count() + pair.get_by_text("bob").count() == 0
        page.get_by_role("button", name=f"The {'left' if i else 'right'} is better").click()
        page.get_by_text("Your vote is kept for DPO.").wait_for()
    assert page.get_by_text("The left was").count() == 1
    rows = [row.record for row in read_rows([str(folder / "votes.jsonl")])]
    assert {recognise(row) for row in rows} == {"preference"}
    assert [len(row["prompt"]) for row in rows] == [1, 3, 5]
    talk = kept(team, USER)[0]["messages"]
    assert [row["chosen"][0] for row in rows] == talk[1::2]  # the better answer stays in the conversation
    assert {(row["meta"]["chosen_bot"], row["meta"]["rejected_bot"]) for row in rows} <= {("alice", "bob"), ("bob", "alice")}
    chat = load_bot(folder / "bots" / "alice").chat
    data = DataConfig(train=[str(folder / "votes.jsonl")], validation_split=0, cache_dir=str(folder / "cache"))
    report = preflight(prepare_data(data, chat, kind="preference", max_seq_length=512, packing=False), chat)
    assert (report.data.rows_read, len(report.data.dropped), report.errors) == (3, 0, [])
    asked, other = (rows[-1]["meta"][f"{side}_bot"] for side in ("chosen", "rejected"))
    page.get_by_label("Bot", exact=True).first.click()
    page.get_by_role("menuitem", name=other).click()  # which is not the one whose answer is judged
    page.get_by_role("button", name="Good answer").last.click()
    page.get_by_text("Kept.").wait_for()
    page.get_by_role("button", name="Good answer", pressed=True).wait_for()
    rating, = [row.record for row in read_rows([str(folder / "ratings.jsonl")])]
    assert (recognise(rating), rating["label"], rating["messages"]) == ("preference", True, talk)
    assert rating["meta"]["settings"]["model"] == asked
    assert USER not in (folder / "votes.jsonl").read_text() + (folder / "ratings.jsonl").read_text()


def test_where_a_cut_answer_ends_is_not_learned(alone: tuple[str, Workplace], folder: Path, context: "BrowserContext") -> None:
    "A thumb on an answer that was as long as it may be says so in its row, and the conversation does not; nor is an end learned later."
    page = enter(context, alone[0])

    def rated(label: str, answers: int) -> list[dict[str, Any]]:
        buttons = page.get_by_role("button", name=label)
        expect(buttons).to_have_count(answers)
        buttons.last.click()
        expect(buttons.last).to_have_attribute("aria-pressed", "true")
        messages: list[dict[str, Any]] = json.loads((folder / "ratings.jsonl").read_text().splitlines()[-1])["messages"]
        return messages

    answer = {"role": "assistant", "content": "word " * 6}
    say(page, "How long is a cut answer?")
    assert rated("Good answer", 1)[-1] == {**answer, "stopped": True}
    ScriptedBackend.ending = "stop"
    try:
        say(page, "And one that ends?")
    finally:
        ScriptedBackend.ending = "length"
    assert rated("Good answer", 2)[1::2] == [answer, answer]
    page.reload()
    page.get_by_label("Earlier conversations").click()
    page.get_by_role("menuitem").filter(has_text="How long is a cut answer?").click()
    page.get_by_text("And one that ends?").wait_for()
    assert page.get_by_text("stopped early").count() == 0
    assert rated("Bad answer", 2)[-1] == {**answer, "stopped": True}


# --- server ------------------------------------------------------------------------------------------------------------

def test_server_page(team: str, context: "BrowserContext") -> None:
    "What it shows is what /stats says; only an administrator's key has actions, and the API refuses the others by itself."
    user, admin = ({"Authorization": f"Bearer {key}"} for key in (USER, ADMIN))
    httpx.post(f"{team}/chat", json={"messages": PAIR}, headers=user, timeout=60)
    page = enter(context, f"{team}/ui", USER, "server")
    page.get_by_role("table", name="Bots").wait_for()
    stats = httpx.get(f"{team}/stats", headers=user).json()
    facts = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert (facts["requests"], facts["complete"]) == (str(stats["total"]["requests"]), str(stats["total"]["completed"]))
    assert page.get_by_role("row").filter(has_text="whole answer").count() == 1
    assert page.get_by_role("row").filter(has_text="default").filter(has_text="500 per 1 hour").count() == 1
    assert page.get_by_text("Administration").count() + page.get_by_text("Requests that are not complete").count() == 0
    assert httpx.patch(f"{team}/admin/config", json={"serving.top_p": 0.5}, headers=user).status_code == 403
    page.get_by_role("button", name="Sign out").click()
    page = enter(context, f"{team}/ui", ADMIN, "server")
    page.get_by_role("heading", name="Administration").wait_for()
    page.get_by_label("Setting").click()
    page.get_by_role("menuitem", name="serving.top_p").click()
    for value, told in (("7", "serving.top_p"), ("0.5", "serving.top_p is 0.5 now.")):
        page.get_by_label("New value").fill(value)
        page.get_by_role("button", name="Change").click()
        page.locator(".notice").filter(has_text=told).last.wait_for()
    assert httpx.get(f"{team}/admin/config", headers=admin).json()["config"]["serving"]["top_p"] == 0.5
    page.get_by_label("Bot", exact=True).first.click()
    page.get_by_role("menuitem", name="bob").click()
    for name, state in (("Load", "loaded"), ("Unload", "unloaded")):
        page.get_by_role("button", name=name, exact=True).click()
        page.get_by_role("row").filter(has_text="bob").get_by_role("cell", name=state, exact=True).wait_for()
        assert httpx.get(f"{team}/stats", headers=user).json()["models"]["bob"]["state"] == state


def test_administration_begins_without_a_bot(folder: Path, context: "BrowserContext", tmp_path: Path) -> None:
    "With no bot open nothing is done to one that nobody chose; a bot that comes is offered on a page that was there before it."
    serving = ServingConfig(port=0, conversations_url=f"sqlite:///{tmp_path}/chats.db", admin_token=ADMIN, backend="scripted")
    with running_dashboard(Config(model=ModelConfig(device="cpu"), serving=serving), folder) as (url, place):
        page = enter(context, url, ADMIN, "server")
        page.get_by_text("No bot is open").wait_for()
        for name, told in (("Load", "no bot is open yet"), ("Unload", "no bot is open yet"), ("Serve no longer", "no bot is open yet"),
                           ("Serve", "name the bot or adapter to serve")):
            page.get_by_role("button", name=name, exact=True).click()
            page.get_by_role("alert").filter(has_text=told).last.wait_for()
            page.get_by_role("button", name="Close this message").click()
            page.get_by_role("alert").wait_for(state="detached")
        there = enter(context, url, page="chat")  # by somebody else
        for name in ("no-bot", "none-either", "nor-this"):  # refused at once; the button is there for the next
            there.get_by_label("Open a bot").fill(name)
            there.get_by_role("button", name="Open", exact=True).click()
            there.get_by_role("alert").filter(has_text=name).wait_for()
        there.get_by_label("Open a bot").fill(str(folder / "bots" / "bob"))
        there.get_by_role("button", name="Open", exact=True).click()
        there.get_by_text("bob is open.").wait_for()
        expect(page.get_by_label("Bot", exact=True)).to_have_text("bob")
        page.get_by_role("button", name="Load", exact=True).click()
        page.get_by_text("bob is loaded.").wait_for()
        assert place.models == ["bob"]


def test_requests_are_seen_and_ended(alone: tuple[str, Workplace], team: str, another: "Callable[[], BrowserContext]",
                                     context: "BrowserContext") -> None:  # fmt: skip
    "An administrator sees a request while it runs, without its text, and ends it; whoever waits for it is told. Others cannot."
    url, _ = alone
    GatedBackend.gate.clear()
    asking = enter(another(), url)
    send(asking, "A secret of mine")
    asking.get_by_text("The bot is answering.").wait_for()
    page = enter(context, url, ADMIN, "server")
    row = page.locator("tr[data-id]")
    row.filter(has_text="running").wait_for()
    assert row.locator("td").all_inner_texts()[1:4] == ["alice", "local", "running"]
    assert page.get_by_text("secret").count() == 0
    row.get_by_role("button", name="Cancel").click()
    asking.get_by_text("cancelled").or_(asking.get_by_text("The answer was stopped.")).first.wait_for()
    row.wait_for(state="detached")
    GatedBackend.gate.set()
    user = {"Authorization": f"Bearer {USER}"}
    assert [httpx.request(how, f"{team}/admin/requests{id}", headers=user).status_code
            for how, id in (("GET", ""), ("DELETE", "/mine"))] == [403, 403]


FOCUSED = """() => { let now = document.activeElement; while (now?.shadowRoot?.activeElement) now = now.shadowRoot.activeElement
  return now.getAttribute("aria-label") ?? (now.innerText || now.id) }"""


def test_the_focus_is_not_lost(team: str, context: "BrowserContext") -> None:
    "With a keyboard alone: a message comes and goes, a table is drawn anew, a button is used up; whoever presses Tab goes on from there."
    def until(*names: str) -> None:
        page.wait_for_function(f"names => names.some(name => ({FOCUSED})().includes(name))", arg=names)

    page = enter(context, f"{team}/ui", ADMIN, "server")
    page.get_by_role("button", name="Change").focus()
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    until("Change")
    page.get_by_role("button", name="Close this message").focus()
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for(state="detached")
    page.wait_for_function("() => document.activeElement !== document.body")
    page.get_by_role("region", name="Bots").evaluate("table => { table.focus(); window.table = table }")
    page.wait_for_function("() => !window.table.isConnected")  # it is drawn anew every two seconds
    until("Bots")
    page = enter(context, f"{team}/ui", ADMIN)
    say(page, "Who am I?")
    page.get_by_role("button", name="Answer again").evaluate("button => { button.focus(); window.button = button }")
    page.keyboard.press("Enter")
    page.wait_for_function("() => !window.button.isConnected")  # it is not there while the bot answers
    until("Conversation", "Answer again")  # where it was; or the new one, when the bot is quicker than a look at the focus
    page.get_by_role("button", name="Answer again").wait_for()
    expect(page.get_by_role("button", name="Delete")).to_be_enabled()  # when the bot has answered
    page.get_by_role("button", name="Delete").focus()
    page.keyboard.press("Enter")
    page.get_by_role("article").first.wait_for(state="detached")
    until("message")


def test_nothing_is_left_of_a_visitor_who_has_gone(alone: tuple[str, Workplace], another: "Callable[[], BrowserContext]") -> None:
    "bokeh-fastapi alone keeps the connections of closed browsers; the door takes them off."
    gc = __import__("gc")
    from bokeh_fastapi import BokehFastAPI

    visit = another()
    enter(visit, alone[0])
    apps = [found for found in gc.get_objects() if isinstance(found, BokehFastAPI)]
    assert sum(len(app._clients) for app in apps) >= 1
    visit.close()
    limit = time.monotonic() + 20
    while sum(len(app._clients) for app in apps):
        assert time.monotonic() < limit, "a connection is left"
        time.sleep(0.02)


def test_dark_is_kept(team: str, context: "BrowserContext") -> None:
    "A page that was dark is dark again when it is loaded again, and light when that was chosen."
    page = enter(context, f"{team}/ui", ADMIN, "server")
    page.get_by_role("button", name="Toggle theme").click()
    page.wait_for_function("getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'")
    page.reload()
    page.get_by_role("heading", name="Server", exact=True).wait_for()
    page.wait_for_function("getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'")
    page.get_by_role("button", name="Toggle theme").click()
    page.wait_for_function("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
    page.reload()
    page.get_by_role("heading", name="Server", exact=True).wait_for()
    page.get_by_role("button", name="Close drawer").wait_for()
    assert page.evaluate("[localStorage.getItem('llmbot-dark'), getComputedStyle(document.body).backgroundColor]") == \
        ["false", "rgb(255, 255, 255)"]


def test_the_menu_fits_the_width(team: str, context: "BrowserContext") -> None:
    "It opens and closes where the width crosses the limit, and stays as the visitor has it between; a chosen page closes it if narrow."
    page = enter(context, f"{team}/ui", ADMIN, "server")
    page.get_by_role("button", name="Close drawer").click()
    page.set_viewport_size({"width": 900, "height": 800})
    page.get_by_role("button", name="Change").click()
    page.get_by_role("alert").wait_for()  # so that what the server says of the width would be here
    assert page.get_by_role("button", name="Close drawer").count() == 0
    for width, label in ((400, "Open drawer"), (700, "Close drawer"), (599, "Open drawer")):
        page.set_viewport_size({"width": width, "height": 800})
        page.get_by_role("button", name=label).wait_for()
    page.get_by_role("button", name="Open drawer").click()
    page.get_by_role("button", name="Chat").click()
    page.get_by_role("heading", name="Chat", exact=True).wait_for()
    page.get_by_role("button", name="Open drawer").wait_for()


# --- for everybody -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page_name", ["chat", "server"])
def test_accessible(team: str, context: "BrowserContext", faults: Callable[["Page"], list[str]], page_name: str) -> None:
    "axe-core finds no serious fault, in light and dark, on a desk and on a telephone; there nothing is wider than the screen."
    page = enter(context, f"{team}/ui", ADMIN, page_name)
    if page_name == "chat":
        say(page, "What is 12 + 30?")
        expect(page.get_by_role("button", name="Send")).to_be_enabled()  # its colour changes then
    else:
        page.get_by_role("table", name="Bots").wait_for()
    assert faults(page) == []
    picture(page, f"dashboard_{page_name}")
    page.set_viewport_size({"width": 400, "height": 800})
    page.get_by_role("button", name="Open drawer").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    picture(page, f"dashboard_{page_name}_narrow")
    page.get_by_role("button", name="Toggle theme").click()
    page.wait_for_function("getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'")
    page.mouse.move(200, 500)
    assert faults(page) == []
    picture(page, f"dashboard_{page_name}_narrow_dark")
    page.set_viewport_size({"width": 1100, "height": 850})
    page.get_by_role("button", name="Close drawer").wait_for()
    picture(page, f"dashboard_{page_name}_dark")


def test_sign_in_is_accessible(team: str, context: "BrowserContext", faults: Callable[["Page"], list[str]]) -> None:
    page = context.new_page()
    page.goto(f"{team}/ui")
    assert faults(page) == []


# --- without a browser -------------------------------------------------------------------------------------------------

def test_several_writers_of_votes(tmp_path: Path) -> None:
    "Every line of three processes is there, whole."
    code = ("import sys\nfrom llmbot.app.votes import append_vote\nfor i in range(40):\n"
            "    append_vote(sys.argv[1], [{'role': 'user', 'content': '?' * 3000}], f'{sys.argv[2]} {i}', 'no')")
    path = tmp_path / "votes.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "abc"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sorted(row["chosen"][0]["content"] for row in rows) == sorted(f"{name} {i}" for name in "abc" for i in range(40))


def test_serve_has_the_dashboard_when_asked(folder: Path) -> None:
    "`llmbot serve --ui` as a process: the pages and the API behind the same key, and a clean end."
    llmbot = str(Path(sys.executable).with_name("llmbot"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("LLMBOT_")} | {"LLMBOT_SERVING__TOKEN": USER}
    command = [llmbot, "serve", str(folder / "bots" / "alice"), "--port", "0", "--ui", "--workspace", str(folder), "--json"]
    served = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert served.stdout is not None
        url = json.loads(served.stdout.readline())["url"]
        key = {"Authorization": f"Bearer {USER}"}
        limit = time.monotonic() + 60
        while True:
            try:
                statuses = [httpx.get(f"{url}{path}", headers=h).status_code for path in ("/ui", "/stats") for h in ({}, key)]
                break
            except httpx.TransportError:
                assert time.monotonic() < limit
                time.sleep(0.05)
        assert statuses == [401, 200, 401, 200]
    finally:
        served.terminate()
        assert served.wait(timeout=60) in (0, -signal.SIGTERM)  # uvicorn ends in peace, and then by the signal itself
