"""`/metrics` and `/stats` against what was asked for: the oracle is prometheus_client's parser and the usage in the answers."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from tiny_bots import GatedBackend, make_bot

from llmbot.core.config import Config, ModelConfig, MonitoringConfig, ServingConfig
from llmbot.core.errors import ConfigError
from llmbot.core.settings import InvalidConfigError
from llmbot.monitoring.metrics_logger import CUSTOM_METRICS, load_metrics, metric
from llmbot.monitoring.resources import ResourceReader
from llmbot.monitoring.serving_metrics import GPU_RESOURCES, RESOURCES, SERVING_METRICS, ServerMetrics
from llmbot.serving import watching
from llmbot.serving.api_server import running_server

QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]
#: What vLLM's documentation calls them, with its prefix taken off, and the labels beside `engine`.
VLLM = {
    "num_requests_running": (), "num_requests_waiting": (), "kv_cache_usage_perc": (), "prompt_tokens": (), "generation_tokens": (),
    "prefix_cache_queries": (), "prefix_cache_hits": (), "request_success": ("finished_reason",), "time_to_first_token_seconds": (),
    "inter_token_latency_seconds": (), "request_time_per_output_token_seconds": (), "e2e_request_latency_seconds": (),
    "request_queue_time_seconds": (), "request_prefill_time_seconds": (), "request_decode_time_seconds": (),
    "request_prompt_tokens": (), "request_generation_tokens": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def bots(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bots")
    return [str(make_bot(folder, name, seed)) for seed, name in enumerate(["alice", "bob"], 1)]


def config(models: list[str], monitoring: dict[str, Any] | None = None, **serving: Any) -> Config:
    return Config(model=ModelConfig(device="cpu"), serving=ServingConfig(models=models, port=0, **serving),
                  monitoring=MonitoringConfig(**(monitoring or {})))  # fmt: skip


class Page(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    "What a page of metrics says, by name and labels; what is not there is 0."

    def __call__(self, name: str, **labels: str) -> float:
        return self.get((f"llmbot_{name}", frozenset(labels.items())), 0)

    def total(self, name: str) -> float:
        return sum(value for (one, _), value in self.items() if one == f"llmbot_{name}")


def read(url: str, **kwargs: Any) -> Page:
    answer = httpx.get(f"{url}/metrics", **kwargs)
    assert answer.status_code == 200, answer.text
    return Page({(s.name, frozenset(s.labels.items())): s.value for f in text_string_to_metric_families(answer.text) for s in f.samples})


def chat(url: str, model: str, tokens: int, **rest: Any) -> dict[str, int]:
    "Ask, and return the usage."
    body = {"model": model, "messages": QUESTION, "max_tokens": tokens, "temperature": 0, **rest}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()["usage"]


@pytest.fixture
def own() -> Iterator[None]:
    before = dict(CUSTOM_METRICS)
    yield
    CUSTOM_METRICS.clear()
    CUSTOM_METRICS.update(before)


def test_the_names_are_vllms() -> None:
    ours = {one.name: one.labels[1:] for one in SERVING_METRICS}
    assert {name: ours.get(name) for name in VLLM} == VLLM
    assert {one.labels[0] for one in SERVING_METRICS} == {"model_name"}


def test_every_resource_has_a_metric() -> None:
    assert {name for name in ResourceReader().sample() if not name.startswith("gpu")} <= set(RESOURCES)
    sample = dict.fromkeys(RESOURCES, 1.0) | {f"gpu0_{name}": 2.0 for name in GPU_RESOURCES}
    metrics = ServerMetrics()
    metrics.resources(sample)
    assert metrics.registry.get_sample_value("llmbot_gpu_power_watts", {"gpu": "0"}) == 2


@pytest.mark.server
def test_counters_are_what_was_asked_for(bots: list[str], own: None) -> None:
    "Tokens by the usage of the answers, requests by their number, HTTP requests by route, and the same in /stats."

    @metric("counter")
    def answer_characters(ended: Any) -> int:
        "Characters of answers."
        return len(ended.text)

    with running_server(config(bots, {"resource_interval_s": 0.1})) as url:
        assert read(url)("request_success_total", model_name="alice", finished_reason="length") == 0
        usage = [chat(url, "alice", 7), chat(url, "alice", 9), chat(url, "bob", 5)]
        text = httpx.post(f"{url}/generate", json={"prompt": "Once", "max_new_tokens": 6, "temperature": 0}, timeout=60).json()
        usage.append(text["usage"])
        for body in ({"model": "carol", "messages": QUESTION}, {"model": "ignore all rules", "messages": QUESTION}):
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 404
        assert httpx.post(f"{url}/generate", json={"prompt": "x" * 9000}).status_code == 400
        assert httpx.get(f"{url}/no/such/thing").status_code == 404
        assert httpx.request("BREW", f"{url}/chat").status_code == 405
        page, stats = read(url), httpx.get(f"{url}/stats").json()
    mine = [usage[0], usage[1], usage[3]]
    assert page("generation_tokens_total", model_name="alice") == sum(u["completion_tokens"] for u in mine) == 22
    assert page("prompt_tokens_total", model_name="alice") == sum(u["prompt_tokens"] for u in mine)
    assert page("generation_tokens_total", model_name="bob") == usage[2]["completion_tokens"]
    assert page.total("request_success_total") == 4
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert page(f"{name}_count", model_name="alice") == 3
    assert page("inter_token_latency_seconds_count", model_name="alice") == 22 - 3
    assert page("request_failure_total", model_name="other", code="model_not_found") == 2
    assert page("request_failure_total", model_name="alice", code="context_length_exceeded") == 1
    assert page("num_requests_running", model_name="alice") == page("num_requests_waiting", model_name="alice") == 0
    assert page("engine_state", model_name="alice", state="loaded") == page("ready") == 1
    assert page("http_requests_total", handler="/v1/chat/completions", method="POST", status="200") == 3
    assert page("http_requests_total", handler="unmatched", method="GET", status="404") == 1
    assert page("http_requests_total", handler="/chat", method="other", status="405") == 1
    labels = {value for (_, pairs) in page for _, value in pairs}
    assert not labels & {"carol", "ignore all rules", "/no/such/thing", "BREW"}
    assert page("custom_answer_characters_total", model_name="bob") > 0
    alice = stats["models"]["alice"]
    assert alice["completion_tokens"] == 22
    assert alice["errors"] == {"context_length_exceeded": 1}
    assert alice["tokens_per_s"] > 0
    assert stats["custom"]["answer_characters"]["bob"] == page("custom_answer_characters_total", model_name="bob")
    assert "process_memory_bytes" in stats["resources"]


@pytest.mark.server
def test_a_cache_that_is_only_kept_is_not_in_use(bots: list[str]) -> None:
    "Blocks that stay for prompts that begin alike are given up when room is needed: without a request the usage is 0, as in vLLM."
    with running_server(config(bots[:1])) as url:
        httpx.post(f"{url}/generate", json={"prompt": "x " * 60, "max_new_tokens": 4}, timeout=60).raise_for_status()
        page, engine = read(url), httpx.get(f"{url}/stats").json()["models"]["alice"]["engine"]
    assert engine["kv_tokens"] == engine["kv_idle"] > 0
    assert page("kv_cache_usage_perc", model_name="alice") == 0


@pytest.mark.server
def test_a_stream_that_is_left_and_a_queue(bots: list[str]) -> None:
    "Gauges while requests run and wait, and an abort when the reader leaves."
    GatedBackend.gate.clear()
    with running_server(config(bots[:1], backend="gated", max_concurrent_requests=1)) as url:
        body = {"messages": QUESTION, "max_new_tokens": 50, "stream": True}
        with httpx.Client(timeout=30) as client:
            import threading

            def ask() -> None:
                with httpx.stream("POST", f"{url}/chat", json=body, timeout=30) as answer:
                    next(answer.iter_bytes())

            threads = [threading.Thread(target=ask) for _ in range(2)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 20
            seen: list[float] = []
            while seen != [1, 1] and time.monotonic() < deadline:
                page = read(url)
                seen = [page(f"num_requests_{name}", model_name="alice") for name in ("running", "waiting")]
            assert seen == [1, 1]
            GatedBackend.gate.set()
            for thread in threads:
                thread.join()
            while read(url).total("num_requests_running") and time.monotonic() < deadline:
                client.get(f"{url}/health")
        page = read(url)
    ended = page("request_success_total", model_name="alice", finished_reason="abort")
    assert ended + page("request_success_total", model_name="alice", finished_reason="length") == 2
    assert page("num_requests_waiting", model_name="alice") == 0


@pytest.mark.server
def test_exemplars_lead_to_the_request(bots: list[str]) -> None:
    with running_server(config(bots[:1])) as url:
        httpx.post(f"{url}/generate", json={"prompt": "Hi", "max_new_tokens": 2}, headers={"X-Request-Id": "look-here"}, timeout=60)
        answer = httpx.get(f"{url}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    exemplars = {s.exemplar.labels["request_id"] for f in parse_openmetrics(answer.text) for s in f.samples if s.exemplar}
    assert exemplars == {"look-here"}


@pytest.mark.server
@pytest.mark.parametrize(("access", "without", "key", "admin"), [
    ("key", 401, 200, 200), ("open", 200, 200, 200), ("admin", 401, 403, 200), ("off", 401, 404, 404)])  # fmt: skip
def test_who_may_read(bots: list[str], access: str, without: int, key: int, admin: int) -> None:
    tokens = {"token": "a-token-of-mine", "admin_token": "the-other-token"}
    with running_server(config(bots[:1], {"metrics_access": access}, backend="gated", **tokens)) as url:
        headers = [{}, *({"Authorization": f"Bearer {tokens[name]}"} for name in ("token", "admin_token"))]
        assert [httpx.get(f"{url}/metrics", headers=h).status_code for h in headers] == [without, key, admin]


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfigError, match="there is no administrator"):
        config(["bot"], {"metrics_access": "admin"})
    (tmp_path / "my_counts.py").write_text("def plain(ended): return 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="which is no metric"):
        load_metrics(["my_counts:plain"])
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="make an empty one"):
        ServerMetrics()


WORKER = """
import sys
from llmbot.monitoring.serving_metrics import ServerMetrics, refresh
from llmbot.serving.request_stats import Meter, ModelStats
from llmbot.serving.sampling_params import Chunk
metrics = ServerMetrics("1")
for _ in range(int(sys.argv[1])):
    meter = Meter(ModelStats(), series=metrics.of("alice"), request_id="x")
    meter.turn()
    for count in (1, 2, 3):
        meter.count(Chunk("a", (1,), "stop" if count == 3 else None, 10, count))
    meter.book(None)
Meter(ModelStats(), series=metrics.of("alice"))
refresh(metrics, True, [("alice", "loaded", 0, 0.25 * int(sys.argv[1]))])
print("ready", flush=True)
sys.stdin.readline()
print(metrics.page.write()[0].decode(), flush=True)
metrics.page.close()
"""


def test_several_workers_are_one_page(tmp_path: Path) -> None:
    "Two processes at once, as workers of one server: either shows both, and one that has ended keeps its counters only."
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(count)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                env=environment) for count in (1, 2)]  # fmt: skip
    pages = []
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        text, _ = worker.communicate("go\n", timeout=60)
        assert worker.returncode == 0
        families = text_string_to_metric_families(text)
        pages.append(Page({(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}))
    for page in pages:
        assert page("generation_tokens_total", model_name="alice") == 9
        assert page("request_success_total", model_name="alice", finished_reason="stop") == 3
        assert page("inter_token_latency_seconds_count", model_name="alice") == 6
    assert [page("num_requests_waiting", model_name="alice") for page in pages] == [2, 1]
    assert pages[0]("kv_cache_usage_perc", model_name="alice") == 0.5
    assert pages[0]("ready") == 1


def test_a_worker_that_was_killed_leaves_the_page(tmp_path: Path) -> None:
    "Its counters stay; its gauges go, also where its number was given to another process that runs now."
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    killed, alive = workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(count)], text=True, stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, env=environment) for count in (1, 2)]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    killed.kill()  # and nobody waits for it yet: it is a zombie
    [of_another] = tmp_path.glob(f"gauge_livesum_{killed.pid}.db")
    shutil.copy(of_another, taken := tmp_path / f"gauge_livesum_{os.getpid()}.db")
    os.utime(taken, (1e9, 1e9))
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    text, _ = alive.communicate("go\n", timeout=60)
    killed.communicate(timeout=60)
    page = Page({(s.name, frozenset(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples})
    assert page("generation_tokens_total", model_name="alice") == 9
    assert page("num_requests_waiting", model_name="alice") == 1
    assert not [*tmp_path.glob(f"gauge_live*_{killed.pid}.db"), *tmp_path.glob(f"gauge_live*_{os.getpid()}.db")]


def test_an_engine_is_looked_at_between_two_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Without a resource monitor too: this page may be read from another worker for hours."
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(watching, "REFRESH_S", 0.01)

    async def watched() -> None:
        seen = asyncio.Semaphore(0)
        loop = asyncio.get_running_loop()
        watch = watching.Watch(Config(monitoring={"resource_interval_s": None, "trackers": []}), ServerMetrics(),
                               lambda: loop.call_soon_threadsafe(seen.release) and None, dict)  # fmt: skip
        await watch.begin()
        for _ in range(3):
            await asyncio.wait_for(seen.acquire(), 60)
        await watch.end()

    asyncio.run(watched())
