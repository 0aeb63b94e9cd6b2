"""The registry with real processes: registering at once, killed at any moment, and a bot that loads by its alias."""

import contextlib
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
from test_resources import driver
from tiny_bots import make_bot

from llmbot.app.cli import main
from llmbot.app.cli_bots import list_
from llmbot.app.dashboard_models import versions_html
from llmbot.core import registry
from llmbot.core.adapters import merge_bot
from llmbot.core.bot import Manifest, bot_digest, read_manifest, resolve_reference, verify_bot, write_manifest
from llmbot.core.bot_diff import diff_bots
from llmbot.core.bot_facts import bot_facts
from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.errors import BotError, MissingExtraError
from llmbot.core.evaluations import known_metrics
from llmbot.core.exchange import export_bot
from llmbot.core.lineage import lineage
from llmbot.core.model_manager import find_base, load_bot
from llmbot.core.registry import delete_version, gc, read_record, register, verify_registry
from llmbot.core.registry_aliases import alias_history, promote
from llmbot.core.registry_layout import Place, find_version, places_with_digest, read_aliases, version_places
from llmbot.monitoring.mlflow_models import pull_from_mlflow
from llmbot.serving.api_server import running_server
from llmbot.serving.decoding import ask
from llmbot.training.trainer import train


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


def command(arguments: list[str], capsys: pytest.CaptureFixture[str] | None = None) -> str:
    "A command that succeeds, in this process; what it printed."
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert not left.value.code
    return capsys.readouterr().out if capsys else ""


def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


REGISTER = """
import sys; from pathlib import Path
from llmbot.core.registry import register
print(register(sys.argv[1], root=Path(sys.argv[2])))
"""
TURN = """
import random, sys; from pathlib import Path
from llmbot.core.errors import BotError
from llmbot.core.exchange import export_bot
from llmbot.core.registry import delete_version, gc, register
from llmbot.core.registry_aliases import promote, rollback
from llmbot.core.registry_layout import version_places
bot, root, out, turn, chance = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), random.Random(int(sys.argv[4]))
print("ready", flush=True)
while True:
    name = ["register", "promote", "register", "promote", "rollback", "delete", "gc", "export"][turn % 8]
    turn += 1
    try:
        places = version_places(root, "mine")
        {
            "register": lambda: register(bot, root=root),
            "promote": lambda: promote(str(chance.choice(places)), root=root),
            "rollback": lambda: rollback("mine", root=root),
            "delete": lambda: delete_version(str(chance.choice(places)), root),
            "gc": lambda: gc(root),
            "export": lambda: export_bot(places[-1].directory, out, overwrite=True),
        }[name]()
    except BotError as refused:  # such as a version that the alias means, or a rollback from the first one
        if not any(why in str(refused) for why in ("needed by", "nothing to go back", "is deleted", "There is no")):
            raise
    print(name, flush=True)
"""


def test_processes_that_register_at_once_get_different_versions(tmp_path: Path) -> None:
    bot, root = fake_bot(tmp_path / "mine"), tmp_path / "registry"
    running = [start(REGISTER, bot, root) for _ in range(4)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    assert sorted(out.strip() for out, _ in said) == ["mine@1", "mine@2", "mine@3", "mine@4"]
    assert verify_registry(root) == {}
    assert len({read_record(place).digest for place in version_places(root, "mine")}) == 1


@pytest.mark.parametrize("look", ["register", "verify"])
def test_a_version_that_goes_meanwhile_is_no_damage(look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Another process deletes a version after it was listed and before its record is read, unless the registry is locked."
    bot, root = fake_bot(tmp_path / "mine"), tmp_path / "registry"
    for _ in range(3):
        register(bot, root=root)
    read, tries = registry.read_record, list[str]()

    def read_late(place: Place) -> registry.Record:
        if place.number == 2 and not tries:
            tries.append(str(place))
            with contextlib.suppress(BotError):
                delete_version("mine@2", root, timeout_s=0)
        return read(place)

    monkeypatch.setattr(registry, "read_record", read_late)
    assert (str(register(bot, root=root)) if look == "register" else verify_registry(root)) == ("mine@4" if look == "register" else {})
    assert tries == ["mine@2"]


LOOKS: dict[str, Callable[[Path, Path], object]] = {
    "alias": lambda bot, root: find_version("mine@production", root),
    "verify": lambda bot, root: verify_registry(root) or "sound",
    "lineage": lambda bot, root: lineage(bot, root).children,
    "digest": lambda bot, root: places_with_digest(bot_digest(bot), root),
    "history": lambda bot, root: alias_history("mine", root),
    "list": lambda bot, root: list_("mine", as_json=True),
    "dashboard": lambda bot, root: versions_html("mine", root),
}


@pytest.mark.parametrize("look", LOOKS)
def test_who_reads_takes_no_harm_from_who_writes(look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    "Between any two looks at the disk, another process registers a version, moves the alias to it, and deletes the one before."
    bot, root = fake_bot(tmp_path / "mine"), tmp_path / "registry"
    monkeypatch.setenv("LLMBOT_REGISTRY", str(root))
    promote(str(register(bot, root=root)), root=root)
    read, exists = Path.read_text, Path.is_file
    calls, turn = list[str](), list[int]()

    def writes(path: Path) -> None:
        calls.append(path.name)
        if len(calls) != turn[0] or root not in path.parents:
            return
        place = register(bot, root=root)
        promote(str(place), root=root)
        delete_version(f"mine@{place.number - 1}", root)

    def late(path: Path, *args: Any, **kwargs: Any) -> str:
        writes(path)
        return read(path, *args, **kwargs)

    def later(path: Path) -> bool:
        found = exists(path)
        writes(path)
        return found

    for moment in range(1, 60):
        calls.clear()
        turn[:] = [moment]
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", late)
            patch.setattr(Path, "is_file", later)
            found = LOOKS[look](bot, root)
        said = capsys.readouterr()
        assert look != "verify" or found == "sound", (moment, calls, found)
        assert "damaged\": []" in said.out or look != "list", (moment, said.out)
        if len(calls) < moment:
            return
    raise AssertionError("there were more moments than were tried")


def test_killed_at_any_moment_the_registry_stays_valid(tmp_path: Path) -> None:
    "Whatever the moment: every version is whole, aliases mean one, histories are chains, and a folder that was written is whole or absent."
    bot, root, out, chance = fake_bot(tmp_path / "mine", "y" * 100_000), tmp_path / "registry", tmp_path / "hub", random.Random(1)
    register(bot, root=root)
    registered, exported, tried = 1, False, set[str]()
    for turn in range(12):
        process = start(TURN, bot, root, out, turn)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        tried.add(process.stdout.readline().strip())
        time.sleep(chance.uniform(0, 0.25))  # the random moment
        os.kill(process.pid, signal.SIGKILL)
        assert process.communicate()[1] == ""
        assert verify_registry(root) == {}
        state, numbers = read_aliases(root, "mine"), [place.number for place in version_places(root, "mine")]
        assert state["aliases"].get("production") in [None, *numbers]
        for alias in ("production", "latest"):
            moves = [move for move in alias_history("mine", root) if move["alias"] == alias]
            assert [move["from"] for move in moves[1:]] == [move["to"] for move in moves[:-1]]
            assert not moves or moves[-1]["to"] == (state["aliases"].get(alias) if alias == "production" else numbers[-1])
        exported = exported or out.exists()
        assert not exported or verify_bot(out) == []
        newest = register(bot, root=root)
        assert newest.number > max(numbers)
        assert newest.number > registered
        registered = newest.number
    assert tried == {"register", "promote", "rollback", "delete", "gc", "export"}
    gc(root)
    assert not [path for path in root.rglob("*") if path.name.startswith((".partial-", ".trash-")) or path.suffix == ".tmp"]
    assert verify_registry(root) == {}


RECORD = """
import os, signal, sys
from llmbot.core.bot import bot_digest
from llmbot.core.evaluations import record_evaluation
figure = {"value": 0.5, "digest": bot_digest(sys.argv[1])}

def deadly(name, calls):
    "Have this process killed in a call of the system's: the first, the second, ..."
    real = getattr(os, name)
    def call(*arguments, **named):
        calls[0] -= 1
        if calls[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    setattr(os, name, call)

for name, lived in (("fsync", 0), ("fsync", 1), ("replace", 0), ("fsync", 2), ("replace", 1), ("fsync", 3), ("fsync", 9)):
    if not (child := os.fork()):
        deadly(name, [lived])
        record_evaluation(sys.argv[1], {f"{name}/{lived}": figure})
        os._exit(0)
    print(name, lived, os.waitpid(child, 0)[1], flush=True)
    input()
"""


def test_killed_while_figures_are_recorded_a_bot_is_whole(tmp_path: Path) -> None:
    "In every call that writes through or renames: the bot verifies, registers and exports as itself, and its card is written again later."
    bot, root = fake_bot(tmp_path / "mine"), tmp_path / "registry"
    digest, ends = bot_digest(bot), list[int]()
    child = subprocess.Popen([sys.executable, "-c", RECORD, str(bot)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    for line in child.stdout:
        name, lived, end = line.split()
        ends.append(int(end))
        assert (verify_bot(bot), bot_digest(bot)) == ([], digest)
        manifest = read_manifest(bot)
        assert manifest is not None
        recorded = {"fsync": int(lived) > 1, "replace": int(lived) > 0}[name]
        assert (f"{name}/{lived}" in manifest.metrics) == recorded
        copies = [register(bot, root=root).directory, tmp_path / f"hub-{len(ends)}"]
        export_bot(bot, copies[1])
        for copy in copies:
            assert {path.name for path in copy.iterdir()} == {"config.json", "model.safetensors", "llmbot.json", "README.md"}
        child.stdin.write("\n")
        child.stdin.flush()
    assert child.wait() == 0
    assert ends == [signal.SIGKILL] * 6 + [0]
    assert (bot / "README.md").read_text() == bot_facts(bot).card()
    assert len(list(bot.iterdir())) == 4
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


def test_a_chain_from_data_to_a_merged_bot_is_drawn_compared_and_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Real stages: the lineage is what was trained, the export loads in plain transformers with the same logits, and comes back the same."
    import torch
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("LLMBOT_REGISTRY", str(tmp_path / "registry"))
    driver(monkeypatch, watts=250_000)  # of the first of two GPUs; the second does not tell
    text, chats = tmp_path / "text.txt", tmp_path / "chats.jsonl"
    text.write_text("\n\n".join(f"{a} plus {b} is {a + b}." for a in range(10) for b in range(10)))
    rows = [{"messages": [{"role": "user", "content": f"{a}+1?"}, {"role": "assistant", "content": str(a + 1)}]} for a in range(40)]
    chats.write_text("\n".join(map(json.dumps, rows)))

    def stage(name: str, method: str, data: Path, base: str | None, **lora: Any) -> str:
        model = {"base": base} if base else {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
        training = {"method": method, "output_dir": str(tmp_path / name), "max_steps": 2, "warmup_steps": 0, "learning_rate": 0.01,
                    "per_device_batch_size": 4, "license": "mit"}
        train(Config(model={**model, "device": "cpu"}, training=training, data={"train": [str(data)]}, lora=lora))  # type: ignore[arg-type]
        return str(register(tmp_path / name))

    base = stage("base", "scratch", text, None)
    tuned = stage("tuned", "sft", chats, base)
    skill = stage("skill", "lora", chats, tuned, rank=2)
    merge_bot(skill, tmp_path / "whole")
    whole = str(register(tmp_path / "whole"))
    tree = lineage(whole)
    assert [(node.kind, node.role, node.made, node.label) for node in tree.root.walk()] == [
        ("version", "", "lora, merged", whole), ("version", "adapter", "lora", skill), ("version", "base", "sft", tuned),
        ("version", "base", "scratch", base), ("data", "data", "", "text.txt"), ("data", "data", "", "chats.jsonl"),
        ("data", "data", "", "chats.jsonl")]  # fmt: skip
    prints = [read_manifest(find_version(ref).directory) for ref in (base, tuned, skill)]
    assert [node.digest for node in tree.root.walk() if node.kind == "data"] == [m.data[0]["fingerprint"] for m in prints if m]
    assert lineage(skill).children == (whole,)
    with pytest.raises(BotError, match=f"needed by {whole}"):
        delete_version(skill)
    energy = read_manifest(find_version(tuned).directory).energy  # type: ignore[union-attr]
    assert (energy["gpus"], energy["kwh"]) == (1, pytest.approx(250 * energy["seconds"] / 3.6e6))
    assert "kWh, the power of 1 GPU" in bot_facts(tuned).card()
    diff = diff_bots(base, tuned)
    assert diff.config["training.method"] == ["scratch", "sft"]
    assert diff.relation == f"{tuned} was made from {base}"
    weights = sum(path.stat().st_size for path in (tmp_path / "tuned").rglob("*") if path.is_file())
    assert diff.size["bytes"][1] == weights

    done = export_bot(whole, tmp_path / "hub")
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.license == "mit"
    model, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hub"), load_bot(whole, device="cpu")
    ids = AutoTokenizer.from_pretrained(tmp_path / "hub")("1 plus 1 is", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, ours.model(ids).logits)
    again = register(tmp_path / "hub", "whole")
    assert (str(again), read_record(again).digest, done.digest) == ("whole@2", done.digest, bot_digest(tmp_path / "whole"))


def test_a_gate_reads_what_evaluate_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "An evaluation through the real command; then promotions that it allows, and those that it does not, with the reason."
    monkeypatch.setenv("LLMBOT_REGISTRY", str(tmp_path / "registry"))
    place = register(make_bot(tmp_path / "made", "helper"))
    data = tmp_path / "held-out.jsonl"
    row = {"messages": [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "42"}]}
    data.write_text("\n".join([json.dumps(row)] * 3))
    with pytest.raises(BotError, match="no metric 'exact_match'"):
        promote("helper@1", require=["exact_match<=1"])
    command(["evaluate", "helper@1", "--data", str(data), "--metrics", "exact_match", "--json"])
    [(name, figure)] = [(key, value) for key, value in known_metrics(place.directory).items() if key.endswith("exact_match")]
    assert figure["digest"] == bot_digest(place.directory)
    done = promote("helper@1", require=["exact_match<=1", f"{name}.high<=1"])
    assert [decision.value for decision in done.decisions] == [figure["value"], figure["interval"][1]]
    assert "3 rows of held-out.jsonl" in done.decisions[0].reason
    assert "compared is the figure itself" in done.decisions[0].reason
    assert alias_history("helper")[-1]["gates"] == [str(decision) for decision in done.decisions]
    with pytest.raises(BotError, match=r"exact_match>1.*compared is the figure itself"):
        promote("helper@1", "canary", ["exact_match>1"])
    assert "canary" not in read_aliases(place.root, "helper")["aliases"]


def test_mlflow_keeps_a_bot_and_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    "Through the commands, in a SQLite store on disk; MLflow's own client sees what was pushed and runs it. Without MLflow: the extra."
    import mlflow
    from mlflow import MlflowClient

    monkeypatch.setenv("LLMBOT_REGISTRY", str(tmp_path / "registry"))
    bot, store = make_bot(tmp_path, "mine"), f"sqlite:///{tmp_path}/mlflow.db"
    register(bot)
    pushed = json.loads(command(["models", "export", "mine@1", "mlflow:helper", "--uri", store, "--json"], capsys))
    assert pushed == {"bot": "mine@1", "pushed": "mlflow:helper/1"}
    version = MlflowClient(store).get_model_version("helper", "1")
    assert (version.tags["llmbot.digest"], version.status) == (bot_digest(bot), "READY")
    with pytest.raises(SystemExit):
        main(["models", "register", "mlflow:helper/1", "--uri", store, "--json"])
    shown = capsys.readouterr()
    back = json.loads(shown.out)
    assert "%|" not in shown.err  # no bar where nobody watches it grow
    assert (back["version"], back["digest"], back["source"]) == ("helper@1", bot_digest(bot), f"mlflow:helper/1 of {store}")
    mlflow.set_tracking_uri(store)
    questions = ["What is 12 + 30?", "Once upon a time"]
    assert mlflow.pyfunc.load_model("models:/helper/1").predict(questions) == [ask(bot, question) for question in questions]
    said = command(["models", "--help"], capsys)
    assert "pull one from MLflow's registry" in " ".join(said.replace("│", " ").split())
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtraError, match=r"llmbot\[mlflow\]"):
        pull_from_mlflow("helper", uri=store)


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
    (["export", "mine@1", "mine"], "exists already"),
    (["export", "mine@1", "mlflow:mine"], "Which MLflow?"),
    (["list", "nowhere"], "There is no bot 'nowhere'"),
])
def test_bad_input_ends_in_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                           arguments: list[str], said: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMBOT_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = register(fake_bot(tmp_path / "mine"))
    if arguments[0] == "verify":
        (place.directory / "config.json").chmod(0o644)
        (place.directory / "config.json").write_text("[]")
    with pytest.raises(SystemExit) as left:
        main(["models", *arguments])
    out, err = capsys.readouterr()
    assert (left.value.code in (2, 4), said in err, err.count("error:"), "Traceback" in err, out) == (True, True, 1, False, ""), (out, err)


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
