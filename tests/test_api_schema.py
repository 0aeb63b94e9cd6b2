"""Every answer of the API as its OpenAPI document says, whatever is sent: schemathesis, all phases, null bytes and negative values."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bots import make_bot

from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.serving.api_server import running_server

TOKEN = "a-token-for-the-schema"


@pytest.mark.parametrize("seed", [1])
def test_every_answer_is_as_the_document_says(seed: int, tmp_path: Path) -> None:
    bot = make_bot(tmp_path, "tiny")
    serving = {"models": [str(bot)], "port": 0, "token": TOKEN, "admin_token": f"{TOKEN}-admin", "max_new_tokens": 2,
               "max_new_tokens_limit": 8, "conversations_url": f"sqlite:///{tmp_path}/conversations.db"}
    with running_server(Config(model=ModelConfig(device="cpu"), serving=ServingConfig(**serving))) as url:  # type: ignore[arg-type]
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", "all",
                   "--header", f"Authorization: Bearer {TOKEN}", "--request-timeout", "20", "--max-response-time", "10",
                   "--seed", str(seed), "--max-examples", "25", "--continue-on-failure", "--no-color",
                   # a prompt beyond the context, or a pair of settings that contradict each other, is refused: no schema can say that
                   "--exclude-checks", "positive_data_acceptance"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
