"""The files of deploy/monitoring with the real Prometheus: two live servers are scraped, and the one that fails sets off the alerts."""

import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import pytest
import test_errors_and_logs  # noqa: F401  registers the backend that fails
import yaml
from test_resources import driver
from tiny_bots import make_bot

from llmbot.core.config import Config, ModelConfig, MonitoringConfig, ServingConfig
from llmbot.monitoring.metrics_logger import CUSTOM_METRICS, metric
from llmbot.serving.api_server import running_server
from llmbot.training.launch import free_port

pytestmark = pytest.mark.server
FILES = Path(__file__).parents[1] / "deploy" / "monitoring"
RULES = yaml.safe_load((FILES / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((FILES / "dashboard.json").read_text())
TOKEN, REQUEST_ID = "a-key-of-the-second-server", "lead-me-here"
T = TypeVar("T")


def program(name: str) -> str:
    "Where a program of Prometheus is."
    if found := shutil.which(name):
        return found
    assert os.environ.get("CI") != "true", f"CI must have '{name}' (the Debian package prometheus)"
    pytest.skip(f"'{name}' is not installed (the Debian package prometheus)")


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([program("promtool"), *map(str, arguments)], cwd=FILES, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def soon(look: Callable[[], T], seconds: float = 60) -> T:
    "What `look` finds, once it finds something."
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"{look} found nothing in {seconds} seconds"
        time.sleep(0.1)
    return found


@dataclass
class Watched:
    "A server that is well and one that fails, both asked all the time, and the Prometheus that watches them."

    prometheus: str
    well: str
    ill: str
    page: str  # a page of the first's metrics
    stop_ill: Callable[[], None]
    stop_load: Callable[[], None]
    usage: list[dict[str, int]] = field(default_factory=list)  # of the first's answers

    def ask(self, expression: str) -> list[dict[str, Any]]:
        "The series of an instant query."
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}, timeout=30).json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    def firing(self) -> set[tuple[str, str]]:  # alert and instance
        return {(one["metric"]["alertname"], one["metric"]["instance"]) for one in self.ask('ALERTS{alertstate="firing"}')}


def place(url: str) -> str:
    return urlsplit(url).netloc


def write_config(folder: Path, well: str, ill: str) -> Path:
    "The shipped configuration and rules with two servers, and seconds in place of minutes; the key is given as README.md says."
    config = yaml.safe_load((FILES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "400ms", "evaluation_interval": "400ms"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [place(well)]}]
    block = re.search(r"```yaml\n(.*?)```", (FILES / "README.md").read_text(), re.S)
    assert block
    (job,) = yaml.safe_load(block[1])["scrape_configs"]
    (folder / job["authorization"]["credentials_file"]).write_text(TOKEN)
    job["static_configs"] = [{"targets": [place(ill)], "labels": {"job": job["job_name"]}}]
    config["scrape_configs"].append({**job, "job_name": "with a key"})
    rules = (FILES / "alerts.yml").read_text()
    (folder / "alerts.yml").write_text(re.sub(r"for: \w+", "for: 0s", rules).replace("[5m]", "[5s]"))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", folder / "prometheus.yml")
    return folder / "prometheus.yml"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, port, prometheus = tmp_path_factory.mktemp("watched"), free_port(), program("prometheus")
    bot, before, ended = str(make_bot(folder, "alice")), dict(CUSTOM_METRICS), threading.Event()

    @metric("counter")
    def answer_words(ended: Any) -> int:
        "Words of answers."
        return len(ended.text.split())

    def serve(**serving: Any) -> Any:
        return running_server(Config(model=ModelConfig(device="cpu"), monitoring=MonitoringConfig(resource_interval_s=0.1),
                                     serving=ServingConfig(models=[bot], port=0, **serving)))  # fmt: skip

    def load() -> None:
        body = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 8, "temperature": 0}
        while not ended.wait(0.05):
            answer = httpx.post(f"{seen.well}/v1/chat/completions", json=body, headers={"X-Request-Id": REQUEST_ID}, timeout=60)
            seen.usage.append(answer.raise_for_status().json()["usage"])
            if failing_is_up.is_set():
                headers = {"Authorization": f"Bearer {TOKEN}"}
                assert httpx.post(f"{seen.ill}/v1/chat/completions", json=body, headers=headers, timeout=60).status_code == 500

    def stop_load() -> None:
        ended.set()
        asking.join()

    def stop_ill() -> None:
        failing_is_up.clear()
        stop_load()
        failing.close()

    with ExitStack() as stack, ExitStack() as failing, pytest.MonkeyPatch.context() as patch:
        stack.callback(lambda: (CUSTOM_METRICS.clear(), CUSTOM_METRICS.update(before)))
        driver(patch)  # two GPUs
        well = stack.enter_context(serve())
        ill = failing.enter_context(serve(backend="failing", token=TOKEN))
        config = write_config(folder, well, ill)
        command = [prometheus, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn",
                   f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"]  # fmt: skip
        process = subprocess.Popen(command, cwd=folder)
        stack.callback(lambda: (process.terminate(), process.wait(30)))
        seen = Watched(f"http://127.0.0.1:{port}", well, ill, httpx.get(f"{well}/metrics").text, stop_ill, stop_load)
        failing_is_up, asking = threading.Event(), threading.Thread(target=load)
        failing_is_up.set()
        asking.start()
        stack.callback(stop_load)
        soon(lambda: _is_ready(seen.prometheus, process))
        yield seen


def _is_ready(url: str, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, "Prometheus ended"
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def expressions() -> dict[str, str]:
    "All queries of the dashboard and its variables, by panel; the variables have the values that Grafana puts in."
    found = {f"{panel['title']} {target['refId']}": target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])}
    assert len(found) > 40
    values = {"$__rate_interval": "5s", "$instance": ".*", "$model_name": ".*"}
    return {name: re.sub(r"\$\w+", lambda m: values[m[0]], expression) for name, expression in found.items()}


def test_the_files_are_what_they_should_be() -> None:
    promtool("check", "config", "prometheus.yml")
    assert f"{len(RULES)} rules" in promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")
    tested = (FILES / "alerts_test.yml").read_text()
    assert all(f'alertname="{rule["alert"]}"' in tested for rule in RULES)
    named = set(re.findall(r"`([\w.]+\.(?:json|yml))`", (FILES / "README.md").read_text()))
    assert named == {path.name for path in FILES.iterdir()} - {"README.md"}


def test_the_dashboard_can_be_laid_out() -> None:
    "Every panel has its own id and its own place in Grafana's 24 columns, and every variable that a query uses is there."
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    taken = [(p["x"] + x, p["y"] + y) for p in places for x in range(p["w"]) for y in range(p["h"])]
    assert len(taken) == len(set(taken))
    assert all(0 <= x < 24 for x, _ in taken)
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]} | {"__rate_interval", "__all"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) <= variables


def test_every_name_is_one_of_ours(watched: Watched) -> None:
    "What rules and dashboard ask for is on the page of a server that has answered nothing yet."
    kinds = dict(re.findall(r"^# TYPE (llmbot_\w+) (\w+)$", watched.page, re.M))
    ours = {f"{name}{end}" for name, kind in kinds.items() for end in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))}
    variables = [one["definition"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    asked = " ".join([*(rule["expr"] for rule in RULES), *expressions().values(), *variables])
    names = set(re.findall(r"\bllmbot_\w+", asked)) - {"llmbot_custom_"}
    assert len(names) > 30
    assert names <= ours


def test_both_servers_are_up(watched: Watched) -> None:
    soon(lambda: {one["metric"]["instance"] for one in watched.ask('up{job="llmbot"} == 1')} == {place(watched.well), place(watched.ill)})


def test_every_query_of_the_dashboard_finds_data(watched: Watched) -> None:
    missing = expressions()

    def none_is_missing() -> bool:
        for name, expression in list(missing.items()):
            if any(math.isfinite(float(one["value"][1])) for one in watched.ask(expression)):
                del missing[name]
        return not missing

    try:
        soon(none_is_missing)
    except AssertionError:
        pytest.fail(f"no data for {missing}")


def test_a_bucket_leads_to_a_request(watched: Watched) -> None:
    def ids() -> set[str]:
        query = {"query": "llmbot_time_to_first_token_seconds_bucket", "start": time.time() - 600, "end": time.time() + 60}
        found = httpx.get(f"{watched.prometheus}/api/v1/query_exemplars", params=query).json()["data"]
        return {exemplar["labels"]["request_id"] for one in found for exemplar in one["exemplars"]}

    assert REQUEST_ID in soon(ids)


def test_alerts_fire_for_the_server_that_fails(watched: Watched) -> None:
    wanted = {("LLMBotAnswersFail", place(watched.ill)), ("LLMBotNewException", place(watched.ill))}
    soon(lambda: wanted <= watched.firing())
    assert not any(alert == "LLMBotDown" for alert, _ in watched.firing())
    watched.stop_ill()
    soon(lambda: ("LLMBotDown", place(watched.ill)) in watched.firing())
    of_the_other = {alert for alert, instance in watched.firing() if instance == place(watched.well)}
    about_the_machine = {"LLMBotMemoryFull", "LLMBotDiskFull", "LLMBotGPUHot"}
    about_the_process = {"LLMBotNewException"}  # here both servers run in one, and share its log
    assert of_the_other <= about_the_machine | about_the_process


def test_prometheus_counts_what_the_answers_say(watched: Watched) -> None:
    "Tokens by the usage in the answers, once nothing is asked any more."
    watched.stop_load()
    here = f'instance="{place(watched.well)}"'
    for name, key in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
        total, query = str(sum(usage[key] for usage in watched.usage)), f"llmbot_{name}_tokens_total{{{here}}}"
        soon(lambda query=query, total=total: [one["value"][1] for one in watched.ask(query)] == [total])
