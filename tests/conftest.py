"""Shared fixtures: real material when it lies beside the repository, and offline hub access always."""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from llmbot.app.console import Later

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models on a busy machine: threads would wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LLMBOT_REGISTRY"] = tempfile.mkdtemp(prefix="registry-")  # never the one of the person who runs the tests
ROOT = Path(__file__).parents[1]
sys.meta_path.insert(0, Later())  # as commands start: without what is not used,
gc.set_threshold(10_000)  # and without looking for garbage among what is being imported


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder of real data and models; tests that use it skip, and say so, where it is absent."
    path = Path(os.environ.get("LLMBOT_SHARED", ROOT.parent / "shared"))
    if not (path / "models" / "stories260K" / "config.json").exists():
        pytest.skip(f"no real data at {path}: set LLMBOT_SHARED to run this test")
    return path


@pytest.fixture(scope="session")
def forking() -> None:
    "The process that forks others has everything loaded that one of them needs, so that they need not load it one by one."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded"])
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """The system's chromium; tests that use it skip, and say so, where there is none, and fail on CI, where there has to be one.

    For one module, since Playwright keeps an event loop running in the thread, in which `asyncio.run` of other tests would fail.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no chromium on the PATH: install it to run this test")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=quiet)
        yield started
        started.close()


class NetworkLog:
    "Every address that the pages of a browser context have asked for, websockets included."

    def __init__(self, context: "BrowserContext") -> None:
        self.urls: list[str] = []
        context.on("request", lambda request: self.urls.append(request.url))
        context.on("page", lambda page: page.on("websocket", lambda socket: self.urls.append(socket.url)))

    def foreign(self) -> list[str]:
        "Those that are not of this machine."
        return [url for url in self.urls if urlsplit(url).scheme not in ("data", "blob", "about") and not self._here(url)]

    @staticmethod
    def _here(url: str) -> bool:
        host = urlsplit(url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


@pytest.fixture
def network_log() -> "Iterator[Callable[[BrowserContext], NetworkLog]]":
    "Call it with a browser context to record its requests; at the end of the test none may have left this machine."
    logs: list[NetworkLog] = []

    def record(context: "BrowserContext") -> NetworkLog:
        logs.append(NetworkLog(context))
        return logs[-1]

    yield record
    for log in logs:
        assert log.urls, "the browser has asked for nothing"
        assert log.foreign() == []


STILL = """() => { const all = root => [...root.getAnimations(), ...[...root.querySelectorAll('*')].flatMap(e =>
    e.shadowRoot ? all(e.shadowRoot) : [])]; document.activeElement?.blur();
    return all(document).every(a => a.playState != 'running') }"""  # colours are on their way until then


@pytest.fixture(scope="session")
def faults() -> "Callable[[Page], list[str]]":
    "Call it with a page to have axe-core look for faults of accessibility that keep people out: serious and critical ones."
    from axe_playwright_python.sync_playwright import Axe

    def look(page: "Page") -> list[str]:
        page.wait_for_function(STILL, timeout=90_000)
        found = Axe().run(page).response["violations"]
        return [f"{v['id']}: {v['help']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
                for v in found if v["impact"] in ("serious", "critical") for node in v["nodes"]]

    return look


LONGEST = ["test_quickstart.py", "test_tutorials.py", "test_never_lost.py", "test_dashboard_work.py", "test_trackers.py",
           "test_distributed.py", "test_package.py", "test_live_runs.py", "test_jupyterlab.py", "test_dashboard_chat.py"]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The files that take longest first, so that two workers end at about the same time; see also the Makefile."
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end, so garbage need not be looked for in it.

    transformers makes a full collection before each training, which takes half a second of processor time in a process that has
    loaded all of this, and nothing after this call.
    """
    gc.collect()
    gc.freeze()
