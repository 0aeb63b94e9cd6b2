"""The widgets in a real JupyterLab, driven by a real browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import nbformat
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "nbs" / "tutorials" / "12_the_dashboard_and_the_widgets.ipynb"
READY = """() => { const s = window.jupyterapp?.shell.currentWidget?.sessionContext
                   return !!s && s.isReady && s.session?.kernel?.connectionStatus === 'connected' && s.session.kernel.status === 'idle' }"""


def until(what: Callable[[], Any], seconds: float = 120) -> Any:
    "Look until it is so."
    begun = monotonic()
    while not (found := what()):
        assert monotonic() - begun < seconds, "it did not come about"
        sleep(0.05)
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "JupyterLab on loopback with the tutorial, without its last part, which starts another server."
    home = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "subprocess.Popen" not in cell.source]
    nbformat.write(notebook, home / "tutorial.ipynb")
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    quiet = settings.parent / "apputils-extension"
    quiet.mkdir()
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", f"--LabApp.user_settings_dir={home / 'settings'}",
               f"--ServerApp.root_dir={home}", "--allow-root", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"), "PYTHONPATH": str(ROOT),
                        "IPYTHONDIR": str(home / "ipython")}
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url, server))
        yield url
    finally:
        server.terminate()
        server.wait(30)


def answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    assert server.poll() is None, "JupyterLab ended"
    try:
        with urllib.request.urlopen(f"{url}/api/status", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def open_tutorial(page: "Page", url: str) -> None:
    page.goto(f"{url}/lab/tree/tutorial.ipynb")
    page.wait_for_function(READY, timeout=120_000)


def picture(page: "Page", name: str) -> None:
    "Keep a screenshot where the docs want them: LLMBOT_SCREENSHOTS names the folder."
    if folder := os.environ.get("LLMBOT_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def points(page: "Page") -> int:
    "Points of the loss curve of the training widget."
    curve = page.locator("svg[aria-label^='loss'] polyline").first
    return len(re.findall(r",", curve.get_attribute("points") or "")) if curve.count() else 0


MORE = b'{"prompt": "Who are you?", "completion": "A bot."}\n{"prompt": "Who is there?", "completion": "A bot."}\n'


def rows_read(page: "Page") -> int:
    "As the report on the data says."
    words = page.get_by_text(re.compile(r"[\d,]+ rows read, ")).first.inner_text()
    return int(words.partition(" ")[0].replace(",", ""))


def test_the_tutorial_by_hand(browser: "Browser", lab: str, network_log: Callable[[Any], Any]) -> None:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    network_log(context)
    page = context.new_page()
    open_tutorial(page, lab)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.get_by_text("Everything above is live.", exact=True).wait_for(timeout=240_000, state="attached")
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator("mark").first.inner_text()  # the preflight, with the learned part marked

    before = rows_read(page)
    with page.expect_file_chooser() as chooser:
        page.locator("button.widget-upload").click()
    chooser.value.set_files({"name": "more.jsonl", "mimeType": "", "buffer": MORE})
    page.get_by_text("Kept: data/more.jsonl.").wait_for(timeout=60_000)
    page.get_by_role("button", name="Look", exact=True).click()  # at what was there, and what was uploaded
    until(lambda: rows_read(page) == before + 2)

    page.get_by_role("button", name="Start", exact=True).first.click()  # a run from the widget
    until(lambda: points(page) > 2)
    seen = points(page)
    until(lambda: points(page) > seen)  # the curve grows

    box = page.get_by_placeholder("Message, sent with Enter").first
    page.locator(".jupyter-widgets").filter(has=box).get_by_text("Settings").first.click()
    handle = page.get_by_role("slider").first  # temperature, while the run trains
    handle.focus()
    before = page.locator(".widget-readout").first.inner_text()
    handle.press("ArrowRight")
    until(lambda: page.locator(".widget-readout").first.inner_text() != before)

    page.get_by_role("slider").nth(2).scroll_into_view_if_needed()
    picture(page, "widget-chat")  # the tutorial's question, and what the bot has learned to answer

    for slider in (0, 1):  # temperature and top p: as daring as can be, for a long answer
        page.get_by_role("slider").nth(slider).press("End")
    page.evaluate("""() => { window.partial = []; new MutationObserver(() => {
        const said = [...document.querySelectorAll('.llmbot-user, .llmbot-answer')]  // in the chat; those of the comparison come later
        const last = said[said.findLastIndex(e => e.classList.contains('llmbot-user')) + 1]?.cloneNode(true)
        last?.querySelector('small')?.remove()
        const text = last?.textContent.trim()
        if (text && text !== window.partial.at(-1)) window.partial.push(text)
    }).observe(document.body, {subtree: true, childList: true, characterData: true}) }""")
    for _ in range(5):  # a bot this small may end at once
        page.evaluate("() => { window.partial = [] }")
        box.fill("Which sound does a cow make? <script>window.hacked = 1</script>")
        users = page.locator(".llmbot-user").count()
        box.press("Enter")
        page.locator(".llmbot-user").nth(users).wait_for(timeout=60_000)
        page.get_by_role("button", name="Send", exact=True).and_(page.locator(":enabled")).wait_for(timeout=60_000)
        if len(page.evaluate("() => window.partial")) > 3:  # the whole, and three partial texts before it
            break
    assert len(page.evaluate("() => window.partial")) > 3
    assert page.evaluate("() => window.hacked") is None
    assert page.locator(".llmbot-user").last.inner_text().endswith("</script>")

    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.reload()
    page.wait_for_function(READY, timeout=120_000)
    until(lambda: points(page) > seen)  # the page that was loaded again shows the run as it is now
    again = points(page)
    until(lambda: points(page) > again)
    page.evaluate("""() => document.querySelector("svg[aria-label^='loss']").scrollIntoView()""")  # at once: each step draws it anew
    picture(page, "widget-training")
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.get_by_text(re.compile(r"Stopped after step \d+ .* is saved")).first.wait_for(timeout=60_000)
    context.close()


def test_chromium_is_where_it_should_be() -> None:
    "On CI a missing browser is a failure; elsewhere the test above skips, and says so."
    assert shutil.which("chromium") or os.environ.get("CI") != "true"
