"""The registry with real processes: registering at once, killed at any moment, and a bot that loads by its alias."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_bots import make_bot

from llmbot.core.bot import Manifest, bot_digest, read_manifest, resolve_reference, write_manifest
from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.errors import BotError
from llmbot.core.model_manager import find_base, load_bot
from llmbot.core.registry import delete_version, gc, read_record, register, verify_registry
from llmbot.core.registry_aliases import promote
from llmbot.core.registry_layout import find_version, read_aliases, version_places
from llmbot.serving.api_server import running_server


def fake_bot(folder: Path, content: str = "x", **facts: object) -> Path:
    "A directory that passes for a bot."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(content)
    write_manifest(folder, Manifest(folder.name, **facts))  # type: ignore[arg-type]
    return folder


def wait_until(true: Callable[[], bool], within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def expected_text(bot: Path, asked: dict[str, Any]) -> str:
    "What transformers' own `generate` says."
    loaded = load_bot(bot, device="cpu")
    ids = loaded.tokenizer(asked["prompt"], return_tensors="pt").input_ids
    made = loaded.model.generate(ids, do_sample=False, max_new_tokens=asked["max_tokens"], min_new_tokens=asked["max_tokens"])
    return str(loaded.chat.decode(made[0, ids.shape[1] :].tolist()))


def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


REGISTER = """
import sys; from pathlib import Path
from llmbot.core.registry import register
print(register(sys.argv[1], root=Path(sys.argv[2])))
"""
CHURN = """
import sys; from pathlib import Path
from llmbot.core.registry import register
from llmbot.core.registry_aliases import promote
print("ready", flush=True)
while True:
    promote(str(register(sys.argv[1], root=Path(sys.argv[2]))), root=Path(sys.argv[2]))
"""


def test_processes_that_register_at_once_get_different_versions(tmp_path: Path) -> None:
    bot, root = fake_bot(tmp_path / "mine"), tmp_path / "registry"
    running = [start(REGISTER, bot, root) for _ in range(4)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    assert sorted(out.strip() for out, _ in said) == ["mine@1", "mine@2", "mine@3", "mine@4"]
    assert verify_registry(root) == {}
    assert len({read_record(place).digest for place in version_places(root, "mine")}) == 1


def test_killed_at_any_moment_the_registry_stays_valid(tmp_path: Path) -> None:
    "Whatever the moment: every version is whole, the alias means one, its history agrees, and the next one registers."
    bot, root, chance = fake_bot(tmp_path / "mine", "y" * 100_000), tmp_path / "registry", random.Random(1)
    for _ in range(12):
        process = start(CHURN, bot, root)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        time.sleep(chance.uniform(0, 0.25))  # the random moment
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert verify_registry(root) == {}
        state, numbers = read_aliases(root, "mine"), [place.number for place in version_places(root, "mine")]
        assert state["aliases"].get("production") in [None, *numbers]
        assert [move["from"] for move in state["history"][1:]] == [move["to"] for move in state["history"][:-1]]
        newest = register(bot, root=root)
        assert newest.number > max(numbers, default=0)
    gc(root)
    assert not [path for path in root.rglob("*") if path.name.startswith((".partial-", ".trash-")) or path.suffix == ".tmp"]
    assert verify_registry(root) == {}


def test_the_lock_has_a_timeout(tmp_path: Path) -> None:
    import filelock

    bot, root = fake_bot(tmp_path / "mine"), tmp_path / "registry"
    register(bot, root=root)
    with filelock.FileLock(root / ".lock"), pytest.raises(BotError, match="locked by another process for 0.1 seconds"):
        register(bot, root=root, timeout_s=0.1)


def test_a_child_keeps_its_parent(tmp_path: Path) -> None:
    root, base = tmp_path / "registry", fake_bot(tmp_path / "base")
    register(base, root=root)
    child = fake_bot(tmp_path / "child", "z", parent="base", parent_digest=bot_digest(base))
    register(child, root=root)
    with pytest.raises(BotError, match=r"needed by child@1, which was made from it"):
        delete_version("base@1", root)
    delete_version("child@1", root)
    delete_version("base@1", root)


def test_an_adapter_is_registered_after_its_base_and_finds_it_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "registry"
    monkeypatch.setenv("LLMBOT_REGISTRY", str(root))
    base, adapter = fake_bot(tmp_path / "base"), tmp_path / "skill"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("a")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "../gone"}))
    write_manifest(adapter, Manifest("skill", parent="gone", parent_digest=bot_digest(base)))
    with pytest.raises(BotError, match="Register its base first"):
        register(adapter)
    place = register(base)
    assert Path(find_base(register(adapter).directory).location) == place.directory.resolve()


def test_a_bot_loads_by_its_alias_and_the_files_are_what_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBOT_REGISTRY", str(tmp_path / "registry"))
    bots = [make_bot(tmp_path / str(seed), "tiny", seed=seed) for seed in (1, 2)]
    for bot in bots:
        register(bot)
    promote("tiny@1")
    found = resolve_reference("tiny@production")
    assert (found.name, found.version) == ("tiny@production", "tiny@1")
    assert bot_digest(found.location) == bot_digest(bots[0])
    assert read_manifest(found.location) == read_manifest(bots[0])
    assert load_bot("tiny@production").model.num_parameters() > 0
    assert find_version("tiny").number == 2


@pytest.mark.parametrize(("arguments", "said"), [
    (["register", "nowhere"], "No bot at 'nowhere'"),
    (["promote", "nowhere@1"], "There is no bot 'nowhere'"),
    (["promote", "mine@1", "--alias", "7"], "mistaken for a version"),
    (["promote", "mine@1", "--require", "loss~1"], "is not a gate"),
    (["promote", "mine@1", "--require", "bleu>1"], "has no metrics"),
    (["rollback", "mine"], "There is no 'mine@production'"),
    (["delete", "mine"], "is not one version"),
    (["verify"], "content changed"),
    (["verify", "mine@1"], "content changed"),
    (["diff", "mine", "nowhere"], "No bot at 'nowhere'"),
    (["card", "hf:a/b"], "is on the hub"),
    (["list", "nowhere"], "There is no bot 'nowhere'"),
])
def test_bad_input_ends_in_one_clear_error(tmp_path: Path, arguments: list[str], said: str) -> None:
    root = tmp_path / "registry"
    place = register(fake_bot(tmp_path / "mine"), root=root)
    if arguments[0] == "verify":
        (place.directory / "config.json").chmod(0o644)
        (place.directory / "config.json").write_text("[]")
    done = subprocess.run([sys.executable, "-m", "llmbot.app.cli", "models", *arguments], capture_output=True, text=True,
                          env=os.environ | {"LLMBOT_REGISTRY": str(root)}, cwd=tmp_path)
    assert done.returncode in (2, 4), done
    assert said in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.server
def test_an_alias_moves_under_load_without_a_failed_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "What is asked before the swap is answered by the old version, what is asked after it by the new one."
    monkeypatch.setenv("LLMBOT_REGISTRY", str(tmp_path / "registry"))
    for seed in (1, 2):
        register(make_bot(tmp_path / str(seed), "helper", seed=seed))
    promote("helper@1")
    asked = {"model": "helper@production", "prompt": "What is 12 + 30?", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    expected = [expected_text(find_version(f"helper@{number}").directory, asked) for number in (1, 2)]
    assert expected[0] != expected[1]
    serving = ServingConfig(models=["helper@production"], port=0, admin_token="key-of-admins", token="key-of-users")
    said: list[tuple[int, str]] = []
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving)) as url:

        def ask(client: httpx.Client) -> None:
            answer = client.post("/v1/completions", json=asked)
            said.append((answer.status_code, answer.json()["choices"][0]["text"] if answer.is_success else answer.text))

        def ask_on() -> None:
            with httpx.Client(base_url=url, headers={"Authorization": "Bearer key-of-users"}, timeout=60) as client:
                while not stop.is_set():
                    ask(client)

        stop, threads = threading.Event(), [threading.Thread(target=ask_on) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(said) > 8)
        promote("helper@2")
        admin = httpx.Client(base_url=url, headers={"Authorization": "Bearer key-of-admins"}, timeout=60)
        assert admin.post("/admin/models/helper@production/unload").is_success  # loaded again, it is the version that it was
        again = len(said)
        wait_until(lambda: len(said) > again + 8)
        before = len(said)
        moved = admin.post("/admin/models", json={"reference": "helper@production", "replace": True})
        after = len(said)
        wait_until(lambda: len(said) > after + 8)
        stop.set()
        for thread in threads:
            thread.join()
    assert moved.status_code == 200, moved.text
    assert {status for status, _ in said} == {200}, said
    texts = [text for _, text in said]
    assert set(texts[:before]) == {expected[0]}
    assert set(texts) == set(expected)
    assert texts[-1] == expected[1]
