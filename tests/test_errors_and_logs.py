"""What a failing server says of itself: in /stats, in metrics, in a file, to Sentry's SDK and in a JSON log; and what it must not say."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_bots import GatedBackend, make_bot

from llmbot.core.config import Config, ModelConfig, MonitoringConfig, ServingConfig
from llmbot.serving.api_server import running_server
from llmbot.serving.backends import register_backend
from llmbot.serving.sampling_params import Chunk, GenerationRequest

pytestmark = pytest.mark.server
PROMPT, TOKEN, ADMIN = "a planted prompt", "planted-token-1", "planted-token-2"


@register_backend("failing")
class FailingBackend(GatedBackend):
    "Fails with the prompt and the token in its message."

    name = "failing"

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        text = self.chat.decode(list(request.prompt_ids))
        raise RuntimeError(f"cannot continue {text!r} for {TOKEN}")
        yield Chunk("")


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bot(tmp_path_factory.mktemp("bots"), "alice"))


def test_errors_are_grouped_and_redacted(bot: str, tmp_path: Path) -> None:
    path = tmp_path / "errors.jsonl"
    cfg = Config(model=ModelConfig(device="cpu"), monitoring=MonitoringConfig(error_log=str(path)),
                 serving=ServingConfig(models=[bot], port=0, backend="failing", token=TOKEN, admin_token=ADMIN))  # fmt: skip
    with running_server(cfg) as url, httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        for number in range(3):
            answer = client.post("/generate", json={"prompt": PROMPT}, headers={"X-Request-Id": f"mine-{number}"})
            assert answer.status_code == 500
        assert client.post("/generate", json={"prompt": 5}).status_code == 400  # the client's fault: no exception of the server's
        stats, page = client.get("/stats").json(), client.get("/metrics").text
    (group,) = stats["exceptions"]["groups"]
    assert (group["type"], group["count"], group["request_ids"]) == ("RuntimeError", 3, ["mine-0", "mine-1", "mine-2"])
    assert group["message"] == "cannot continue '…' for …"
    assert any("in generate: raise RuntimeError" in line for line in group["trace"])
    assert group["first_seen"] <= group["last_seen"]
    counted = [s for f in text_string_to_metric_families(page) for s in f.samples if s.name == "llmbot_exceptions_total"]
    assert [(s.labels, s.value) for s in counted] == [({"type": "RuntimeError", "fingerprint": group["fingerprint"]}, 3)]
    failed = [s for f in text_string_to_metric_families(page) for s in f.samples if s.name == "llmbot_request_failure_total"]
    assert [(s.labels["code"], s.value) for s in failed] == [("internal_error", 3)]
    (line,) = [json.loads(text) for text in path.read_text().splitlines()]
    assert (line["fingerprint"], line["count"], line["request_ids"]) == (group["fingerprint"], 1, ["mine-0"])
    for said in (json.dumps(stats), page, path.read_text()):
        assert not any(secret in said for secret in (PROMPT, TOKEN, ADMIN))


SERVER = """
import sys
import tiny_bots, test_errors_and_logs
from llmbot.app.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("prompts", [False, True])
def test_the_log_is_json(bot: str, tmp_path: Path, prompts: bool) -> None:
    "Every line of a server that started, answered and stopped; with its requests, whose they were, and no text unless asked for."
    environment = {**os.environ, "LLMBOT_SERVING__TOKEN": TOKEN, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", SERVER, "serve", bot, "--port", "0", "--json", "monitoring.log_format=json", "model.device=cpu",
               f"monitoring.log_prompts={prompts}", "serving.max_new_tokens=4"]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as stderr:
        server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-Id": "mine"}
        answer = httpx.post(f"{url}/generate", json={"prompt": PROMPT}, headers=headers, timeout=60).json()
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    mine: list[dict[str, Any]] = [line for line in lines if line.get("request_id") == "mine"]
    answered, access = mine
    usage = answer["usage"]
    assert (answered["model"], answered["completion_tokens"], answered["finish_reason"]) == ("alice", usage["completion_tokens"], "length")
    assert (access["status"], access["path"], access["key"], access["model"]) == (200, "/generate", "default", "alice")
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert TOKEN not in log.read_text()
    assert (answered.get("prompt"), answered.get("answer")) == ((PROMPT, answer["text"]) if prompts else (None, None))
    assert (PROMPT in log.read_text()) == prompts
