"""What a server sends by OTLP, taken by a real HTTP receiver; the SDK's own exporter in memory and the conventions are the oracles."""

import dataclasses
import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import opentelemetry.semconv._incubating.attributes.gen_ai_attributes as gen_ai
import opentelemetry.semconv._incubating.metrics.gen_ai_metrics as gen_ai_metrics
import pytest
import test_errors_and_logs  # noqa: F401  registers the backend that fails
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes
from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION
from tiny_bots import make_bot

from llmbot.core.config import Config, ModelConfig, MonitoringConfig, ServingConfig
from llmbot.core.errors import MissingExtraError
from llmbot.core.settings import InvalidConfigError
from llmbot.monitoring.telemetry import HISTOGRAMS, SPAN_NAMES, Telemetry
from llmbot.serving import api_server
from llmbot.serving.api_server import running_server

SECRET, TRACE, PARENT = "a planted question", "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MESSAGES = [{"role": "user", "content": SECRET}]
BY_STATUS = ("http.request.method", "http.route", "url.scheme", "http.response.status_code")


class Collector(ThreadingHTTPServer):
    "Takes OTLP over HTTP and keeps what it was sent."

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.url, self.headers = f"http://127.0.0.1:{self.server_port}", list[Any]()

    @property
    def spans(self) -> list[Span]:
        return [span for sent in self.traces for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans]


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        kept, kind = {"/v1/traces": (self.server.traces, ExportTraceServiceRequest),
                      "/v1/metrics": (self.server.metrics, ExportMetricsServiceRequest)}[self.path]  # fmt: skip
        kept.append(kind.FromString(body))  # type: ignore[attr-defined]
        self.server.headers.append(self.headers)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()


def plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return [plain(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def plainly(attributes: Any) -> dict[str, Any]:
    pairs: list[KeyValue] = list(attributes)
    return {pair.key: plain(pair.value) for pair in pairs}


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bot(tmp_path_factory.mktemp("bots"), "alice"))


def config(bot: str, monitoring: dict[str, Any], **serving: Any) -> Config:
    return Config(model=ModelConfig(device="cpu"), serving=ServingConfig(models=[bot], port=0, **serving),
                  monitoring=MonitoringConfig(opentelemetry=True, resource_interval_s=None, **monitoring))  # fmt: skip


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    "What the SDK itself says was recorded, by the servers that the test starts."
    exporter, create = InMemorySpanExporter(), api_server.create_app

    def noticed(cfg: Any) -> Any:
        app = create(cfg)
        app.state.server.watch.telemetry.spans.add_span_processor(SimpleSpanProcessor(exporter))
        return app

    monkeypatch.setattr(api_server, "create_app", noticed)
    return exporter


def test_the_names_are_the_conventions() -> None:
    known = {getattr(module, name) for module in (gen_ai, http_attributes, url_attributes, error_attributes)
             for name in dir(module) if name.isupper()}  # fmt: skip
    assert {name for name in SPAN_NAMES if not name.startswith("llmbot.")} <= known
    known = {getattr(gen_ai_metrics, name) for name in dir(gen_ai_metrics) if name.isupper()} | {HTTP_SERVER_REQUEST_DURATION}
    assert HISTOGRAMS.keys() <= known


@pytest.mark.server
def test_spans_and_metrics_reach_a_collector(bot: str, memory: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    "A streamed answer in the client's trace, a refusal, two answers to one request; and no text of theirs."
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic%20abc")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-of-the-test")
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with running_server(config(bot, {})) as url:
            body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "seed": 7, "stop": ["a planted stop"]}
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
            answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}},
                                headers=headers, timeout=60)  # fmt: skip
            events = [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-2]]
            [usage] = [event["usage"] for event in events if event.get("usage")]
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 9000}).status_code == 400
            assert httpx.post(f"{url}/v1/completions", json={"prompt": SECRET, "max_tokens": 2, "n": 2}, timeout=60).status_code == 200
            assert httpx.get(f"{url}/metrics").status_code == httpx.get(f"{url}/health").status_code == 200
    spans, own = collector.spans, memory.get_finished_spans()
    assert {(s.span_id.hex(), s.name, s.start_time_unix_nano, s.end_time_unix_nano) for s in spans} == {
        (f"{s.context.span_id:016x}", s.name, s.start_time, s.end_time) for s in own}  # fmt: skip
    for one in own:
        [sent] = [s for s in spans if s.span_id.hex() == f"{one.context.span_id:016x}"]
        assert plainly(sent.attributes) == {name: list(v) if isinstance(v, tuple) else v for name, v in one.attributes.items()}
        assert plainly(sent.attributes).keys() <= SPAN_NAMES.keys()
    request, answered = sorted((s for s in spans if s.trace_id.hex() == TRACE), key=lambda s: s.start_time_unix_nano)
    assert (request.name, request.kind, request.parent_span_id.hex()) == ("POST /v1/chat/completions", Span.SPAN_KIND_SERVER, PARENT)
    assert (answered.name, answered.kind, answered.parent_span_id) == ("chat alice", Span.SPAN_KIND_INTERNAL, request.span_id)
    assert request.start_time_unix_nano <= answered.start_time_unix_nano < answered.end_time_unix_nano <= request.end_time_unix_nano
    facts = plainly(answered.attributes)
    assert (facts["gen_ai.usage.input_tokens"], facts["gen_ai.usage.output_tokens"]) == (usage["prompt_tokens"], 5)
    assert (facts["gen_ai.request.max_tokens"], facts["gen_ai.request.temperature"], facts["gen_ai.request.seed"]) == (5, 0, 7)
    assert (facts["gen_ai.response.id"], facts["gen_ai.response.finish_reasons"]) == ("mine", ["length"])
    assert plainly(request.attributes) == dict(zip(BY_STATUS, ("POST", "/v1/chat/completions", "http", 200), strict=True))
    refused = [s for s in spans if plainly(s.attributes).get("error.type")]
    assert [(s.name, plainly(s.attributes)["error.type"], s.status.code) for s in refused] == [
        ("text_completion alice", "context_length_exceeded", 2)]  # fmt: skip
    assert len([s for s in spans if s.name == "text_completion alice" and s.parent_span_id]) == 3
    assert not any("metrics" in s.name or "health" in s.name for s in spans)
    [resource] = {(r["service.name"], r["service.version"]) for sent in collector.traces
                  for r in [plainly(sent.resource_spans[0].resource.attributes)]}  # fmt: skip
    assert resource[0] == "chat-of-the-test"
    assert all(headers["authorization"] == "Basic abc" for headers in collector.headers)
    check_metrics(collector.metrics[-1], usage)
    everything = b"".join(sent.SerializeToString() for sent in (*collector.traces, *collector.metrics))
    assert not any(text in everything for text in (b"planted", b"xxxx"))


def check_metrics(sent: ExportMetricsServiceRequest, usage: dict[str, int]) -> None:
    "One streamed answer of five tokens, two of two, one refusal."
    metrics = {m.name: m for resource in sent.resource_metrics for scope in resource.scope_metrics for m in scope.metrics}
    assert metrics.keys() == HISTOGRAMS.keys()
    assert all((metrics[name].unit, tuple(metrics[name].histogram.data_points[0].explicit_bounds)) == (unit, bounds)
               for name, (unit, bounds, _) in HISTOGRAMS.items())  # fmt: skip

    def points(name: str) -> list[tuple[dict[str, Any], int, float]]:
        return [(plainly(point.attributes), point.count, point.sum) for point in metrics[name].histogram.data_points]

    tokens = {(labels["gen_ai.operation.name"], labels["gen_ai.token.type"]): (count, total)
              for labels, count, total in points("gen_ai.client.token.usage")}  # fmt: skip
    assert tokens["chat", "output"] == (1, 5)
    assert tokens["chat", "input"] == (1, usage["prompt_tokens"])
    assert tokens["text_completion", "output"] == (2, 4)
    lasted = {(labels["gen_ai.operation.name"], labels.get("error.type")): count
              for labels, count, _ in points("gen_ai.server.request.duration")}  # fmt: skip
    assert lasted == {("chat", None): 1, ("text_completion", None): 2, ("text_completion", "context_length_exceeded"): 1}
    routes = {(labels["http.route"], labels["http.response.status_code"]): count
              for labels, count, _ in points("http.server.request.duration")}  # fmt: skip
    assert routes == {("/v1/chat/completions", 200): 1, ("/v1/completions", 400): 1, ("/v1/completions", 200): 1}


@pytest.mark.server
def test_a_trace_goes_on_to_the_server_behind(bot: str, memory: InMemorySpanExporter) -> None:
    "Two llmbot servers in a chain: the client's trace holds the spans of both, the second's request below the first's."
    with collecting() as collector:
        monitoring = {"otlp_endpoint": collector.url}
        with running_server(config(bot, monitoring)) as behind:
            before = dataclasses.replace(config(bot, monitoring, backend="remote"), engine={"urls": [f"{behind}/v1"]})
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            with running_server(before) as url:
                asked = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0}
                for path, body in (("chat/completions", {**asked, "stream": True}), ("embeddings", {"input": SECRET})):
                    answer = httpx.post(f"{url}/v1/{path}", json=body, headers=headers, timeout=60)
                    assert answer.status_code == 200, answer.text
                assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).status_code == 200
    ours = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    by_id = {span.span_id: span for span in ours}
    requests = [(s.name, by_id[s.parent_span_id].name if s.parent_span_id in by_id else s.parent_span_id.hex())
                for s in ours if s.kind == Span.SPAN_KIND_SERVER]  # fmt: skip
    assert sorted(requests) == sorted([
        ("POST /v1/chat/completions", PARENT), ("POST /v1/completions", "POST /v1/chat/completions"),
        ("POST /v1/embeddings", PARENT), ("POST /v1/embeddings", "POST /v1/embeddings")])  # fmt: skip
    assert sorted(s.name for s in ours if s.kind == Span.SPAN_KIND_INTERNAL) == [
        "chat alice", "embeddings alice", "embeddings alice", "text_completion alice"]  # fmt: skip
    others = {span.trace_id for span in collector.spans} - {bytes.fromhex(TRACE)}
    assert len(others) == 1  # that of the client without a trace, which the first server began, is in both as well
    assert len([s for s in collector.spans if s.trace_id in others]) == 4


@pytest.mark.server
def test_text_when_it_is_asked_for_and_failures(bot: str, memory: InMemorySpanExporter) -> None:
    "With `log_prompts` prompt and answer are there; a bug of the server makes both spans errors. Metrics may be left out."
    with collecting() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_METRICS_EXPORTER", "none")
        monitoring = {"otlp_endpoint": collector.url, "log_prompts": True}
        with running_server(config(bot, monitoring)) as url:
            text = httpx.post(f"{url}/chat", json={"messages": MESSAGES, "max_new_tokens": 3}, timeout=60).json()["message"]["content"]
        [answered] = [s for s in collector.spans if s.name == "chat alice"]
        with running_server(config(bot, monitoring, backend="failing")) as url:
            assert httpx.post(f"{url}/generate", json={"prompt": SECRET}).status_code == 500
    facts = plainly(answered.attributes)
    parts = [{"type": "text", "content": SECRET}]
    assert json.loads(facts["gen_ai.input.messages"]) == [{"role": "user", "parts": parts}]
    assert json.loads(facts["gen_ai.output.messages"])[0]["parts"][0]["content"] == text
    assert {**facts}.keys() <= SPAN_NAMES.keys()
    failed = [(s.name, plainly(s.attributes)["error.type"], s.status.code) for s in collector.spans if s.status.code]
    assert sorted(failed) == [("POST /generate", "500", 2), ("text_completion alice", "internal_error", 2)]
    assert not collector.metrics


@pytest.mark.server
def test_a_collector_that_is_away_changes_no_answer(bot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with collecting() as collector:
        address = collector.url
    with running_server(config(bot, {"otlp_endpoint": address})) as url:
        assert httpx.post(f"{url}/generate", json={"prompt": "Hi", "max_new_tokens": 2}, timeout=60).status_code == 200


def test_off_imports_nothing() -> None:
    code = "import sys, llmbot.serving.api_server; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfigError, match="nothing is sent there"):
        MonitoringConfig(otlp_endpoint="http://127.0.0.1:4318")
    for wrong in ("127.0.0.1:4318", "http://me:password@host:4318", "ftp://host"):
        with pytest.raises(InvalidConfigError, match="without a login"):
            MonitoringConfig(opentelemetry=True, otlp_endpoint=wrong)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(MissingExtraError, match=r"llmbot\[monitoring\]"):
        Telemetry("1")
