"""The dashboard's pages for work, in a real browser: data, a run that outlives its page, runs, models, evaluations."""

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_bots import make_bot

from llmbot.app import dashboard_pages
from llmbot.app.dashboard_mount import running_dashboard
from llmbot.app.dashboard_pages import Desk, register_page
from llmbot.app.dashboard_views import heading_html, html_pane, toolkit
from llmbot.app.live_run import LiveRun
from llmbot.app.run_records import find_runs
from llmbot.core.bot import bot_digest, is_adapter, read_manifest
from llmbot.core.config import Config, ServingConfig
from llmbot.core.registry_layout import find_version, read_aliases, registry_directory

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = pytest.mark.browser
PAGES = ("data", "train", "runs", "models", "evaluation")
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 400, "height": 800}
WAIT = 90_000  # milliseconds, for every step in a page: beside it, the process for jobs imports, and a run of its own trains
Faults = Callable[[Any], list[str]]  # of a page
SCRIPT = "<img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A workspace: two tiny bots, held-out rows, and a finished run that learned faster than the one to come."
    folder = tmp_path_factory.mktemp("work")
    for name, seed in (("first", 1), ("second", 2)):
        make_bot(folder / "bots", name, seed=seed)
    (folder / "data").mkdir()
    rows = [{"prompt": f"What is {n}? {SCRIPT}", "completion": f"It is {n}."} for n in range(12)]
    (folder / "data" / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "bots" / "older.run"
    (run / "tracking").mkdir(parents=True)
    settings = {"method": "sft", "learning_rate": 0.25, "max_steps": 40, "output_dir": str(folder / "bots" / "older")}
    (run / "run.json").write_text(json.dumps({"config": {"training": settings}}))
    calls = [{"method": "log_metrics", "args": [{"train/loss": 6 / step}, step, 0.0], "step": step} for step in range(1, 41)]
    (run / "tracking" / "calls.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "The dashboard, for a user's key and an administrator's."
    chats = f"sqlite:///{tmp_path_factory.mktemp('chats')}/chats.db"
    with (
        pytest.MonkeyPatch.context() as patch,
        running_dashboard(Config(serving=ServingConfig(port=0, token="a-users-key", admin_token="an-admins-key", conversations_url=chats)),
                          folder) as (url, _),
    ):  # fmt: skip
        patch.setenv("LLMBOT_REGISTRY", str(folder / "registry"))
        yield url


@pytest.fixture
def visit(address: str, browser: "Browser", network_log: Callable[["BrowserContext"], Any]) -> "Iterator[Callable[..., Page]]":
    "Sign in and open a page; whatever it asks for is on this machine."
    contexts: list[BrowserContext] = []

    def open_page(name: str, key: str = "an-admins-key", size: dict[str, int] | None = None) -> "Page":
        context = browser.new_context(viewport=size or WIDE)
        context.set_default_timeout(WAIT)
        contexts.append(context)
        network_log(context)
        assert context.request.post(f"{address}/sign-in", form={"key": key}, max_redirects=0).status == 303
        page = context.new_page()
        show(page, address, name)
        return page

    yield open_page
    for context in contexts:
        context.close()


def show(page: "Page", address: str, name: str) -> None:
    "Open a page of the dashboard by its address."
    page.goto(f"{address}?page={name}")
    page.get_by_role("heading", level=1).first.wait_for()


def see(page: "Page", text: str) -> None:
    "Wait for a text."
    page.get_by_text(text).first.wait_for()


def choose(page: "Page", label: str, option: str) -> None:
    "Take an option of a list."
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("menuitem", name=option, exact=True).click()


def fill(page: "Page", values: dict[str, str]) -> None:
    "Type values into fields."
    for label, value in values.items():
        field = page.get_by_label(label, exact=True).first
        field.fill(value)
        field.press("Tab")


def look_over(page: "Page", name: str, faults: Faults) -> None:
    "A page with something on it has no serious fault of accessibility; for the docs it is also drawn, wide and as a telephone has it."
    page.mouse.move(600, 5)
    assert faults(page) == [], name
    if folder := os.environ.get("LLMBOT_SCREENSHOTS"):
        for ending, size in (("-narrow", NARROW), ("", WIDE)):
            page.set_viewport_size(size)
            page.get_by_role("button", name="Open drawer" if ending else "Close drawer").wait_for()
            page.wait_for_timeout(1000)
            page.screenshot(path=Path(folder, f"dashboard-{name}{ending}.png"))


def step_of(page: "Page") -> int:
    "The step up to which the loss is drawn."
    words = page.get_by_text("training:").first.inner_text()
    return int(words.rpartition("step ")[2].replace(",", ""))


def test_data_is_looked_at(visit: "Callable[..., Page]", folder: Path, tmp_path: Path, faults: Faults) -> None:
    "A file is uploaded; what is kept, what is lost and why is said; what it holds is shown, and not run."
    corpus = tmp_path / "smalltalk.yml"
    talk = "".join(f"- - Hello number {n}\n  - Hi {n} <img src=x onerror=alert(1)>\n" for n in range(40))
    corpus.write_text(f"categories:\n- greetings\nconversations:\n{talk}- - nobody answers\n")
    page = visit("data")
    see(page, "No data has been looked at")
    assert forkserver._forkserver._forkserver_alive_fd is not None  # type: ignore[attr-defined]  # what jobs import is on its way
    page.locator("input[type=file]").set_input_files(corpus)
    see(page, "smalltalk.yml is in the folder")
    assert (folder / "data" / "smalltalk.yml").read_text() == corpus.read_text()
    page.get_by_role("button", name="Look at it").click()
    see(page, "Lost, and why")
    facts = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert (facts["rows read"], facts["kept"], facts["lost"]) == ("41", "40", "1")
    learned = page.locator("pre mark").first.inner_text()
    assert "<img" in learned
    assert learned.startswith("Hi ")
    assert "Hello" not in "".join(page.locator("pre mark").all_inner_texts())
    assert page.locator("pre img").count() == 0
    look_over(page, "data", faults)
    fill(page, {"Or a path, or hf:NAME of a data set": "data/absent.jsonl"})
    page.get_by_role("button", name="Look at it").click()
    see(page, "absent.jsonl")
    assert page.get_by_role("alert").count() >= 1


def test_a_run_outlives_its_page(visit: "Callable[..., Page]", address: str, folder: Path, faults: Faults) -> None:
    "Mistakes stand beside their fields; a run is started, watched, left, found again, steered and stopped; runs are compared."
    page = visit("train")
    see(page, "No run is on")
    fill(page, {"training.learning_rate": "fast"})
    page.get_by_role("button", name="Start", exact=True).click()
    see(page, "expected a number > 0")
    page.get_by_label("Show all settings").check()
    page.get_by_label("training.logging_steps", exact=True).first.wait_for()
    fill(page, {"data.train": "data/held.jsonl", "model.preset": "qwen3-0.2m", "model.vocab_size": "300", "training.learning_rate": "0.001",
                "training.max_steps": "100000", "training.output_dir": "bots/newer", "data.max_seq_length": "64",
                "training.per_device_batch_size": "2", "training.logging_steps": "1", "monitoring.trackers": "",
                "data.cache_dir": str(folder / "cache")})  # fmt: skip
    page.get_by_role("button", name="Start", exact=True).click()
    see(page, "bots/newer: running")
    run = LiveRun(folder / "bots" / "newer.run")
    try:
        see(page, "training:")
        before = step_of(page)
        page.wait_for_function("""before => { const find = root => [...root.querySelectorAll('*')].some(e =>
            (e.tagName == 'LI' && e.innerText.startsWith('training:') && +e.innerText.split('step ').at(-1).replace(/,/g, '') > before)
            || (e.shadowRoot && find(e.shadowRoot))); return find(document) }""", arg=before)  # fmt: skip
        page.context.close()
        assert run.status().state == "running"
        again = visit("train")
        see(again, "bots/newer: running")
        assert step_of(again) > before
        again.get_by_role("button", name="Pause").click()
        see(again, "bots/newer: paused")
        look_over(again, "train", faults)
        again.get_by_role("button", name="Stop").click()
        see(again, "bots/newer: interrupted")
        status = run.wait(60)
    finally:
        if not run.status().over:
            run.stop(save=False)
    assert (run.run_dir / "checkpoints" / f"checkpoint-{status.step}").is_dir()
    show(again, address, "runs")
    see(again, "Settings that differ")
    rows = again.get_by_role("region", name="Settings that differ").locator("tr").all_inner_texts()
    assert [row.split("\t") for row in rows if row.startswith("training.learning_rate")] == [["training.learning_rate", "0.001", "0.25"]]
    curves = again.locator("li", has_text="at step").all_inner_texts()
    assert any(line.startswith("older: 6 at step 1, 0.15 at step 40") for line in curves)
    assert any(line.startswith("newer: ") for line in curves)
    look_over(again, "runs", faults)
    fill(again, {"Filter": "learning_rate=0.25"})
    again.get_by_text("newer:").first.wait_for(state="detached")
    assert {found.name for found in find_runs(folder)} == {"older", "newer"}


def test_models_move(visit: "Callable[..., Page]", folder: Path, faults: Faults) -> None:
    "Two versions are registered; one is promoted, then the other, and it is taken back; a gate refuses with its reason."
    page = visit("models")
    see(page, "The registry is empty")
    for name, number in (("first", 1), ("second", 2)):
        choose(page, "Bot of the folder", name)
        fill(page, {"Register under the name": "helper", "Note": f"the {name}"})
        page.get_by_role("button", name="Register", exact=True).click()
        see(page, f"helper@{number} is registered")
    for number in (1, 2):
        choose(page, "Version", f"helper@{number}")
        page.get_by_role("button", name="Promote").click()
        see(page, f"helper@production is helper@{number}.")
    assert read_aliases(registry_directory(), "helper")["aliases"] == {"production": 2}
    page.get_by_role("button", name="Roll back").click()
    see(page, "helper@production is helper@1 again.")
    assert read_aliases(registry_directory(), "helper")["aliases"] == {"production": 1}
    fill(page, {"Only if": "exact_match>=0.9"})
    page.get_by_role("button", name="Promote").click()
    see(page, "does not become production")
    assert read_aliases(registry_directory(), "helper")["aliases"] == {"production": 1}
    page.get_by_role("button", name="Verify").click()
    see(page, "helper@2 is intact")
    page.get_by_role("button", name="Write for hubs").click()
    see(page, "hub/helper-2 is ready for a hub")
    assert page.get_by_text(str(folder)).count() == 0  # nobody has to read where the server keeps its folder
    assert bot_digest(folder / "hub" / "helper-2") == bot_digest(find_version("helper@2").directory)
    look_over(page, "models", faults)


def test_votes_train_a_bot_that_is_promoted(visit: "Callable[..., Page]", address: str, folder: Path) -> None:
    "Two bots are opened and compared; the votes are the data of a DPO run; what comes of it is registered, promoted and asked."
    page = visit("chat")
    for name in ("first", "second"):
        fill(page, {"Open a bot": str(folder / "bots" / name)})
        page.get_by_role("button", name="Open", exact=True).click()
        see(page, f"{name} is open.")
    choose(page, "Bot", "first")
    choose(page, "Beside it", "second")
    page.get_by_role("button", name="System prompt and sampling").click()
    fill(page, {"Longest answer, in tokens": "4"})
    message = page.get_by_role("textbox", name="Message (Enter")
    for number in (1, 2):
        page.get_by_role("button", name="Send").and_(page.locator(":enabled")).wait_for()
        message.fill(f"What is {number}?")
        message.press("Enter")
        page.get_by_role("button", name="The left is better").click()
        see(page, "Your vote is kept for DPO.")
    votes = [json.loads(line) for line in (folder / "votes.jsonl").read_text().removesuffix("\n").split("\n")]  # answers may hold U+0085
    assert [row["prompt"][-1]["content"] for row in votes] == ["What is 1?", "What is 2?"]

    show(page, address, "train")
    choose(page, "Run", "A new run")
    choose(page, "Method", "dpo")
    page.get_by_label("method.beta", exact=True).first.wait_for()  # the fields of the method are there
    fill(page, {"model.base": "bots/first", "data.train": "votes.jsonl", "training.max_steps": "2", "training.output_dir": "bots/better",
                "data.validation_split": "0", "data.max_seq_length": "128"})  # fmt: skip
    page.get_by_role("button", name="Start", exact=True).click()
    see(page, "bots/better: ")
    run = LiveRun(folder / "bots" / "better.run")
    assert run.wait(120).state == "finished", run.status().message
    see(page, "bots/better: finished")
    margins = [entry["rewards/margins"] for entry in run.history() if "rewards/margins" in entry]
    see(page, f"{margins[-1]:.3g}")  # beside the loss
    manifest = read_manifest(folder / "bots" / "better")
    assert manifest is not None
    assert (manifest.method, is_adapter(folder / "bots" / "better")) == ("dpo", False)  # the form's "method.adapter" was off

    show(page, address, "models")
    choose(page, "Bot of the folder", "better")
    fill(page, {"Register under the name": "better", "Note": "two votes"})
    page.get_by_role("button", name="Register", exact=True).click()
    see(page, "better@1 is registered")
    choose(page, "Bot", "better")
    page.get_by_role("button", name="Promote").click()
    see(page, "better@production is better@1.")
    assert read_aliases(registry_directory(), "better")["aliases"] == {"production": 1}
    show(page, address, "chat")
    fill(page, {"Open a bot": "better@production"})
    page.get_by_role("button", name="Open", exact=True).click()
    see(page, "is open.")
    page.get_by_role("button", name="Send").and_(page.locator(":enabled")).wait_for()
    message.fill("And now?")
    message.press("Enter")
    see(page, "The answer is complete.")
    assert page.get_by_role("article", name="Bot").count() == 1


def test_bots_are_measured(visit: "Callable[..., Page]", folder: Path, faults: Faults) -> None:
    "Two bots on the same rows, with intervals; a second evaluation goes on when the page is left, is found, and is cancelled."
    page = visit("evaluation")
    see(page, "Nothing has been evaluated yet")
    page.get_by_label("Bots", exact=True).first.click()
    for name in ("first", "second"):
        page.get_by_role("menuitem", name=name, exact=True).click()
    page.mouse.click(5, 5)  # beside the menu, which closes it
    choose(page, "Metrics", "chrf")
    page.mouse.click(5, 5)
    page.get_by_role("button", name="Evaluate", exact=True).click()
    see(page, "Difference on the same rows")
    [kept] = (folder / "evaluations").glob("*.json")
    report = json.loads(kept.read_text())
    assert [one["rows"] for one in report["reports"]] == [12, 12]
    figures = page.get_by_role("region", name="Figures, with 95 % intervals").locator("tr").all_inner_texts()
    low, high = (report["reports"][0]["intervals"]["chrf"][end] for end in ("low", "high"))
    assert low < report["reports"][0]["metrics"]["chrf"] < high
    assert any(row.startswith("chrf") and f"[{low:.3g}, {high:.3g}]" in row for row in figures)
    for one, name in zip(report["reports"], ("first", "second"), strict=True):  # where cards and gates read
        manifest = read_manifest(folder / "bots" / name)
        assert manifest is not None
        assert manifest.metrics["held.jsonl[:200]/chrf"]["value"] == one["metrics"]["chrf"]
    look_over(page, "evaluation", faults)
    assert page.locator("td img").count() == 0
    rows = [{"prompt": f"{n}?", "completion": "words " * 40} for n in range(20_000)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fill(page, {"Or a path, or hf:NAME": "many.jsonl"})
    page.get_by_role("button", name="More", exact=True).click()
    fill(page, {"Rows at most": "20000"})
    page.get_by_role("button", name="Evaluate", exact=True).click()
    page.get_by_role("button", name="Cancel").wait_for()
    page.context.close()
    again = visit("evaluation")
    again.get_by_role("button", name="Cancel").click()
    see(again, "cancelled")
    assert list((folder / "evaluations").glob("*.json")) == [kept]


class Unready:
    "Keeps back the message in which the browser says that its page is ready."

    def __init__(self, page: "Page", pulled: Callable[[], None]) -> None:
        self._parts, self._pulled = list[str | bytes](), pulled
        self.kept = list[str | bytes]()
        page.route_web_socket("**/ws*", self._begin)

    def _begin(self, browser: Any) -> None:
        self.server = browser.connect_to_server()
        browser.on_message(self._sent)

        def received(message: str | bytes) -> None:
            browser.send(message)
            if "PULL-DOC-REPLY" in str(message)[:200]:
                self._pulled()

        self.server.on_message(received)

    def _sent(self, part: str | bytes) -> None:
        self._parts.append(part)
        if len(self._parts) == 3:  # header, metadata, content
            whole, self._parts = self._parts, []
            if "document_ready" in str(whole[2]):
                self.kept = whole
            else:
                self._send(whole)

    def _send(self, parts: list[str | bytes]) -> None:
        for part in parts:
            self.server.send(part)

    def release(self) -> None:
        self._send(self.kept)


def test_nothing_is_lost_before_a_page_is_ready(visit: "Callable[..., Page]", address: str) -> None:
    "The browser has the document and draws it, and has not said yet that it is ready: what is changed and chosen then is not lost."
    drawn, built, changed = threading.Event(), threading.Event(), threading.Event()

    @register_page("probe", "Probe", "dns", right="admin", order=900)
    def probe(desk: Desk) -> Any:
        panel, material = toolkit()
        field, rows = material.TextInput(label="Field", helper_text="fine"), panel.Column()
        built.set()

        async def change() -> None:
            while not drawn.is_set():
                await asyncio.sleep(0.005)
            field.param.update(error_state=True, helper_text="an error beside the field")
            rows.append(html_pane("a row more"))
            changed.set()

        panel.state.execute(change)
        press = material.Button(label="Press me", on_click=lambda event: rows.append(html_pane("it was pressed")))
        return panel.Column(html_pane(heading_html("Probe")), field, rows, press)

    try:
        page = visit("data")
        unready = Unready(page, drawn.set)
        page.goto(f"{address}?page=probe")
        page.get_by_role("button", name="Runs", exact=True).click()
        while not unready.kept:
            page.wait_for_timeout(20)  # lets Playwright hand on messages
        if built.is_set():
            changed.wait(60)
        unready.release()
        page.get_by_role("heading", level=1, name="Runs").wait_for()
        page.get_by_role("button", name="Probe", exact=True).click()
        page.get_by_role("button", name="Press me").click()  # the first thing that comes from a part that came later
        for text in ("an error beside the field", "a row more", "it was pressed"):
            see(page, text)
    finally:
        del dashboard_pages.PAGES["probe"]


def test_a_users_key_does_not_work(visit: "Callable[..., Page]", address: str) -> None:
    "Who may only use bots is not shown the pages for work, also not by their address."
    page = visit("chat", key="a-users-key")
    for name in ("train", "models"):
        show(page, address, name)
        assert page.get_by_role("button", name="Start", exact=True).count() == 0
        shown = page.get_by_role("heading", level=1).first.inner_text()
        assert shown.lower() not in PAGES, shown
    assert not {"Data", "Train", "Runs", "Models", "Evaluation"} & set(page.get_by_role("navigation").all_inner_texts())


def test_everybody_can_use_the_pages(visit: "Callable[..., Page]", address: str, faults: Faults) -> None:
    "No serious fault of accessibility, and nothing wider than a telephone, in light and in dark."
    page = visit("data", size=NARROW)
    for name in PAGES:
        show(page, address, name)
        shades = set()
        for _ in range(2):
            shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
            shades.add(shade)
            assert faults(page) == [], f"{name}, {shade}"
            assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"], name
            page.get_by_role("button", name="Toggle theme").click()
            page.wait_for_function("old => getComputedStyle(document.body).backgroundColor != old", arg=shade)
            page.mouse.move(200, 500)
            page.locator("[role=tooltip]").wait_for(state="detached")
        assert len(shades) == 2
