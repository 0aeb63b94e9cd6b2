"""The command line as a user meets it: real processes, real bots, one message for every mistake."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import ENV, LLMBOT
from tiny_bots import make_bot

from llmbot.app.cli import app, main
from llmbot.core.bot import PICKLE_SUFFIXES

Run = Callable[..., tuple[int, str, str]]  # arguments -> exit code, standard output, standard error
CHATS = [("hello", "hi there"), ("who are you?", "a small bot"), ("bye", "see you"), ("what is red?", "a colour")]
RECIPE = """\
model: {preset: qwen3-0.2m, vocab_size: 300, max_position_embeddings: 128, device: cpu}
training: {method: sft, output_dir: bots/tiny, max_steps: 60, learning_rate: 3e-3, packing: false, per_device_batch_size: 4}
data: {train: chats.jsonl, validation_split: 0.25, max_seq_length: 64, cache_dir: cache}
"""


def shell(*arguments: str, cwd: Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    "Run `llmbot` in a process of its own; standard input is empty unless it is given."
    options = {"input": "", "timeout": 300, "env": ENV} | kwargs
    return subprocess.run([LLMBOT, *arguments], cwd=cwd, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def one_message(stderr: str, *words: str) -> None:
    "Standard error has one error, which says these words, and no traceback."
    assert stderr.count("error: ") == 1, stderr
    assert "Traceback" not in stderr
    assert "fault in llmbot" not in stderr
    for word in words:
        assert word in stderr, stderr


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A directory with data, a recipe and a bot that was trained with them by the command line."
    home = tmp_path_factory.mktemp("home")
    (home / "recipe.yaml").write_text(RECIPE)
    with (home / "chats.jsonl").open("w") as file:
        for question, answer in CHATS:
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat, "length": str(len(question))}) + "\n")
    done = shell("train", "recipe.yaml", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # nothing but JSON on standard output
    assert result["bot"] == "bots/tiny"
    assert result["steps"] == 60
    assert result["metrics"]["train_loss"] < 1
    return home


@pytest.fixture
def inside(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    "Run the command line in this process, which has the libraries loaded already."
    monkeypatch.chdir(home)
    for name in [n for n in os.environ if n.startswith("LLMBOT_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as info:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(info.value.code or 0), out, err

    return run


# --- help, version, completion -----------------------------------------------------------------------------------------

def commands() -> list[list[str]]:
    "Every command there is, by way of the groups."
    found: list[list[str]] = [[c.name or c.callback.__name__] for c in app.registered_commands if c.callback]
    for group in app.registered_groups:
        inner = group.typer_instance
        assert inner is not None
        above = [inner.info.name] if isinstance(inner.info.name, str) else []  # commands of a nameless group stand at the top
        found += [[*above, c.name or c.callback.__name__] for c in inner.registered_commands if c.callback]
    return found


def test_the_commands_are_there() -> None:
    assert {" ".join(c) for c in commands()} == {
        "quickstart", "train", "evaluate", "compare", "lm-eval", "chat", "serve", "data inspect", "models list", "models show",
        "models diff", "models card", "models verify", "models presets", "models merge", "models register", "models promote",
        "models rollback", "models alias", "models export", "models delete", "models gc", "plan", "lr-find", "data show-batch",
        "config show", "config validate", "config schema", "config init", "export onnx", "tracking sync", "verify", "dashboard"}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself(command: list[str], inside: Run) -> None:
    code, out, err = inside(*command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: llmbot " + " ".join(command) in out
    helps = re.findall(r"^│ +--?[\w-]+.*$", out, re.M)
    assert helps


def test_version_and_no_arguments(tmp_path: Path) -> None:
    import llmbot

    assert shell("--version", cwd=tmp_path).stdout == f"llmbot {llmbot.__version__}\n"
    assert "quickstart" in shell("--help", cwd=tmp_path).stdout


def test_names_of_bots_complete(home: Path) -> None:
    env = ENV | {"_LLMBOT_COMPLETE": "complete_bash", "COMP_WORDS": "llmbot chat ti", "COMP_CWORD": "2"}
    assert shell(cwd=home, env=env).stdout.split() == ["tiny"]


# --- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], int, list[str]]] = {
    "unknown setting": (["train", "recipe.yaml", "training.optimiser=sgd"], 2, ["training.optimizer"]),
    "value out of range": (["train", "recipe.yaml", "training.max_steps=0"], 2, ["training.max_steps", "'0'", "> 0"]),
    "missing recipe": (["train", "absent.yaml"], 2, ["absent.yaml", "no such file"]),
    "empty recipe": (["train", "empty"], 2, ["empty is empty"]),
    "recipe in another encoding": (["train", "latin1.yaml"], 2, ["latin1.yaml:2", "UTF-8"]),
    "data as a recipe": (["config", "validate", "chats.jsonl"], 2, ["chats.jsonl"]),
    "no data": (["train", "model.preset=qwen3-0.2m"], 2, ["data.train"]),
    "no base": (["train", "data.train=chats.jsonl"], 2, ["model.base"]),
    "unknown method": (["train", "recipe.yaml", "training.method=sfd", "training.output_dir=new"], 2, ["sfd", "sft"]),
    "missing data": (["train", "recipe.yaml", "data.train=absent.jsonl", "training.output_dir=new"], 3, ["absent.jsonl"]),
    "empty data": (["train", "recipe.yaml", "data.train=empty", "data.format=messages", "training.output_dir=new"], 3, ["empty"]),
    "half a line": (["train", "recipe.yaml", "data.train=half.jsonl", "data.on_bad_row=raise", "training.output_dir=new"], 3,
                    ["half.jsonl", "line 2"]),
    "data in another encoding": (["data", "inspect", "recipe.yaml", "data.train=latin1.jsonl"], 3, ["latin1.jsonl", "UTF-8"]),
    "nothing learned": (["data", "inspect", "recipe.yaml", "data.train=questions.jsonl"], 3, ["answer"]),
    "bot is there": (["train", "recipe.yaml"], 4, ["bots/tiny", "overwrite"]),
    "output is a file": (["train", "recipe.yaml", "training.output_dir=chats.jsonl"], 4, ["chats.jsonl", "file"]),
    "output below a file": (["train", "recipe.yaml", "training.output_dir=chats.jsonl/bot"], 4, ["chats.jsonl"]),
    "nothing to resume": (["train", "recipe.yaml", "training.output_dir=new", "--resume"], 5, ["new.run"]),
    "missing bot": (["chat", "tony", "-p", "hello"], 4, ["tony", "tiny"]),
    "not a model": (["chat", "cache", "-p", "hello"], 4, ["cache"]),
    "pickle": (["chat", "pickle", "-p", "hello"], 4, ["pickle"]),
    "damaged weights": (["chat", "damaged", "-p", "hello"], 4, ["damaged"]),
    "template with a syntax error": (["chat", "template", "-p", "hello"], 4, ["template"]),
    "empty message": (["chat", "tiny", "-p", " "], 3, ["no message"]),
    "message too long": (["chat", "tiny", "-p", "word " * 500], 6, ["128"]),
    "unknown backend": (["chat", "tiny", "-p", "hello", "serving.backend=torsh"], 6, ["torsh", "torch"]),
    "missing device": (["chat", "tiny", "-p", "hello", "model.device=cuda:99"], 2, ["cuda:99"]),
    "nothing to evaluate on": (["evaluate", "tiny"], 3, ["--data"]),
    "unknown metric": (["evaluate", "tiny", "--data", "chats.jsonl", "--metrics", "exact_mach"], 2, ["exact_mach", "exact_match"]),
    "report into a directory that is not there": (
        ["evaluate", "tiny", "--data", "chats.jsonl", "-o", "absent/report.json"], 1, ["absent/report.json"]),
    "nothing to compare on": (["compare", "tiny", "tiny"], 3, ["--data"]),
    "a metric without an interval": (["compare", "tiny", "tiny", "--data", "chats.jsonl", "--metrics", "distinct1"], 2, ["distinct1"]),
    "a judge of no answers": (["compare", "tiny", "tiny", "--data", "chats.jsonl", "--metrics", "loss", "--judge", "tiny"], 2, ["judge"]),
    "a server's model of no server": (["evaluate", "tiny", "--data", "chats.jsonl", "--model", "big"], 2, ["--model", "address"]),
    "no lm_eval": (["lm-eval", "tiny", ".", "--lm-eval-command", "absent-lm-eval"], 7, ["absent-lm-eval", "LLMBOT_LM_EVAL"]),
    "a window beyond the context": (["evaluate", "tiny", "--data", "chats.jsonl", "--window", "99999"], 2, ["99999", "context"]),
    "nothing to serve": (["serve"], 2, ["serving.models"]),
    "open to all without a token": (["serve", "tiny", "--host", "0.0.0.0"], 2, ["serving.token", "LLMBOT_SERVING__TOKEN"]),
    "short token": (["serve", "tiny", "--token", "hunter2"], 2, ["serving.token"]),
    "bot to serve is missing": (["serve", "tony"], 4, ["tony"]),
    "unknown recipe": (["config", "init", "stf"], 2, ["stf", "sft"]),
    "file is there": (["config", "init", "sft", "-o", "recipe.yaml"], 2, ["recipe.yaml", "--force"]),
    "nothing to verify": (["models", "verify", "damaged"], 4, ["llmbot.json"]),
    "no quickstart to resume": (["quickstart", "--resume"], 5, ["--resume"]),
    "a quickstart in a full directory": (["quickstart", "--dir", "bots"], 5, ["bots", "not empty"]),
    "no such directory": (["models", "list", "--dir", "absent"], 4, ["absent"]),
}


@pytest.fixture(scope="session")
def broken(home: Path) -> Path:
    "Everything that one can get wrong, beside the good bot."
    (home / "empty").touch()
    (home / "latin1.yaml").write_bytes("training:\n  output_dir: münchen\n".encode("latin-1"))
    (home / "latin1.jsonl").write_bytes('{"prompt": "münchen", "completion": "ja"}\n'.encode("latin-1"))
    rows = (home / "chats.jsonl").read_text().splitlines()
    (home / "half.jsonl").write_text(f"{rows[0]}\n{rows[1][:30]}\n{rows[2]}\n")
    (home / "questions.jsonl").write_text('{"messages": [{"role": "user", "content": "why?"}]}\n')
    good = home / "bots" / "tiny"
    for name in ("damaged", "template", "pickle"):
        (home / name).mkdir()
        for file in good.iterdir():
            if file.name != "llmbot.json":
                (home / name / file.name).write_bytes(file.read_bytes())
    (home / "damaged" / "model.safetensors").write_bytes(b"\x00" * 100)
    (home / "template" / "chat_template.jinja").write_text("{% for message in messages %}")
    (home / "pickle" / "model.safetensors").rename(home / "pickle" / f"pytorch_model{PICKLE_SUFFIXES[0]}")
    return home


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_message(name: str, broken: Path, inside: Run) -> None:
    arguments, expected, words = MISTAKES[name]
    before = {str(p) for p in broken.rglob("*")}
    code, out, err = inside(*arguments)
    assert (code, out) == (expected, ""), err
    one_message(err, *words)
    assert "hunter2" not in err
    new = {p for p in {str(p) for p in broken.rglob("*")} - before if "/cache/" not in p and not p.endswith("new.run")}
    assert not [p for p in new if "new.run" not in p], "nothing half-written"


def test_a_mistake_in_a_process_of_its_own(home: Path) -> None:
    done = shell("train", "recipe.yaml", "training.optimiser=sgd", cwd=home)
    assert (done.returncode, done.stdout) == (2, "")
    one_message(done.stderr, "training.optimizer")
    done = shell("--debug", "train", "absent.yaml", cwd=home)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "absent.yaml: no such file" in done.stderr


def test_a_port_in_use(home: Path, inside: Run) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, out, err = inside("serve", "tiny", "--port", str(taken.getsockname()[1]))
    assert (code, out) == (6, "")
    one_message(err, "port")


def test_a_full_disk(home: Path) -> None:
    "A limit on the size of a file stops a write in the middle, as a full disk does."
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = shell("train", "recipe.yaml", "training.output_dir=full/bot", "training.max_steps=2", cwd=home, preexec_fn=limit)
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert "larger than the disk or a limit allows" in done.stderr
    assert not (home / "full" / "bot").exists()
    assert not [p for p in (home / "full").iterdir() if p.name.endswith(".partial")]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a place where nobody may write, as Linux has")
def test_a_read_only_place(inside: Run) -> None:
    train, init = ["train", "recipe.yaml", "training.output_dir=/sys/bot"], ["config", "init", "-o", "/sys/a.yaml"]
    for arguments, expected in ((train, 4), (init, 2)):
        code, out, err = inside(*arguments)
        assert (code, out) == (expected, "")
        one_message(err, "/sys")
        assert re.search("permission denied|read-only", err, re.I)


def test_a_reader_that_leaves_is_no_error(home: Path) -> None:
    done = subprocess.run(f"{LLMBOT} config schema | head -n 1", shell=True, capture_output=True, text=True, env=ENV, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


# --- one bot, all commands ---------------------------------------------------------------------------------------------

def test_a_bot_learned_its_answers(home: Path, inside: Run) -> None:
    code, out, _ = inside("data", "inspect", "recipe.yaml", "--json")
    report = json.loads(out)
    assert (code, report["errors"], report["data"]["rows_kept"]) == (0, [], 4)
    learned = [s["where"] for s in report["data"]["samples"]]
    answers = {}
    for n, (question, answer) in enumerate(CHATS, 1):
        if any(w.endswith(f"line {n}") for w in learned):
            code, out, err = inside("chat", "tiny", "-p", question, "--temperature", "0")
            assert (code, err) == (0, "")
            answers[out.removesuffix("\n")] = answer
    assert len(answers) == 3
    assert all(said == answer for said, answer in answers.items())


def test_a_pipe(home: Path, inside: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = shell("chat", "bots/tiny", "--temperature", "0", cwd=home, input="bye\n")
    assert (done.returncode, done.stderr) == (0, "")

    def pipe(content: bytes, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return inside("chat", "bots/tiny", *arguments)

    code, out, _ = pipe(b"bye\n", "--temperature", "0", "--json")
    answer = json.loads(out)
    assert (code, answer["answer"] + "\n") == (0, done.stdout)
    asked = json.loads(inside("chat", "bots/tiny", "--temperature", "0", "--json", "-p", "bye")[1])
    assert asked | {"seconds": 0} == answer | {"seconds": 0}  # the line end of the pipe is not part of the message
    for content, words in ((b"", "standard input is empty"), (b"\xff", "not UTF-8")):
        code, out, err = pipe(content)
        assert (code, out) == (3, "")
        one_message(err, words)


def test_raw_text_is_continued(inside: Run) -> None:
    from llmbot.core.model_manager import load_bot

    code, out, _ = inside("chat", "tiny", "--raw", "-p", "hello", "--temperature", "0", "--max-new-tokens", "4")
    bot = load_bot("bots/tiny", device="cpu")
    ids = bot.tokenizer("hello", return_tensors="pt").input_ids
    tokens = bot.model.generate(ids, do_sample=False, max_new_tokens=4, eos_token_id=bot.chat.stop_token_ids)[0, ids.shape[1]:].tolist()
    assert (code, out) == (0, bot.chat.decode(tokens) + "\n")


def test_evaluate(home: Path, inside: Run) -> None:
    code, out, _ = inside("evaluate", "tiny", "--data", "chats.jsonl", "--group-by", "length", "--json", "-o", "report.json")
    report = json.loads(out)
    assert code == 0
    assert report["rows"] == 4
    assert report["metrics"]["exact_match"] >= 0.75
    assert {g["name"] for g in report["groups"]} == {"5", "12", "3"}
    assert json.loads((home / "report.json").read_text())["metrics"] == pytest.approx(report["metrics"])
    code, out, _ = inside("evaluate", "tiny", "--data", "chats.jsonl", "--metrics", "exact_match", "--max-rows", "2")
    assert code == 0
    assert "exact_match" in out
    assert "perplexity" not in out


def test_compare(inside: Run, home: Path) -> None:
    asked = ("compare", "tiny", "other/untrained", "--data", "chats.jsonl", "--metrics", "exact_match,bleu")
    make_bot(home / "other", "untrained", seed=5)
    code, out, _ = inside(*asked, "--json", "-o", "compared.json")
    found = json.loads(out)
    names = ("tiny", "other/untrained")
    one, two = (json.loads(inside("evaluate", name, "--data", "chats.jsonl", "--json")[1])["metrics"] for name in names)
    difference = found["differences"]["exact_match"]
    assert (code, difference["first"], difference["second"]) == (0, one["exact_match"], two["exact_match"])
    assert found["wins"] - found["losses"] == round(4 * (two["exact_match"] - one["exact_match"]))
    assert difference["interval"]["low"] <= two["exact_match"] - one["exact_match"] <= difference["interval"]["high"]
    assert json.loads((home / "compared.json").read_text()) == found
    code, out, _ = inside(*asked)
    assert (code, "untrained over tiny" in out, "nrefs:1" in out) == (0, True, True)


def test_models(home: Path, inside: Run) -> None:
    code, out, _ = inside("models", "list", "--json")
    assert [(b["name"], b["method"]) for b in json.loads(out)["bots"] if b["path"] == "bots/tiny"] == [("tiny", "sft")]
    shown = json.loads(inside("models", "show", "tiny", "--json")[1])
    assert shown["config"]["training"]["learning_rate"] == 3e-3
    assert json.loads(inside("models", "verify", "tiny", "--json")[1]) == {"checked": "bot bots/tiny", "intact": True, "faults": []}
    assert "qwen3-0.2m" in json.loads(inside("models", "presets", "--json")[1])


def test_config(inside: Run) -> None:
    code, out, err = inside("config", "show", "recipe.yaml", "serving.token=correct-horse-battery", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["training"]["learning_rate"] == 3e-3
    assert "correct-horse" not in out
    code, out, _ = inside("config", "validate", "recipe.yaml", "training.sed=1", "training.seed=x", "--json")
    assert code == 2
    assert [f["key"] for f in json.loads(out)["faults"]] == ["training.sed", "training.seed"]
    for method in ("scratch", "sft"):
        code, out, _ = inside("config", "init", method, "--full")
        Path(f"{method}.yaml").write_text(out)
        assert inside("config", "validate", f"{method}.yaml", "--for", "train")[0] == 0


@pytest.mark.server
def test_serve(home: Path, inside: Run) -> None:
    with subprocess.Popen([LLMBOT, "serve", "tiny", "--port", "0", "--json", "--token", "correct-horse", "serving.temperature=0"],
                          cwd=home, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            assert ready["models"] == ["tiny"]
            body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
            headers = {"Authorization": "Bearer correct-horse", "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(ready["url"] + "/chat", body, headers)) as reply:
                said = json.load(reply)["text"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends in peace, and then by the signal itself
            assert server.stderr is not None
            assert "Application shutdown complete" in server.stderr.read()
        finally:
            server.kill()
    assert inside("chat", "tiny", "-p", "hello", "--temperature", "0")[1] == said + "\n"


# --- Ctrl-C ------------------------------------------------------------------------------------------------------------

def test_ctrl_c_stops_training_and_resume_goes_on(home: Path, inside: Run) -> None:
    arguments = ["train", "recipe.yaml", "training.output_dir=bots/long", "training.max_steps=100000", "training.save_steps=20",
                 "training.logging_steps=1"]
    with subprocess.Popen([LLMBOT, *arguments], cwd=home, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        assert run.stderr is not None
        seen = b""
        while not list((home / "bots" / "long.run" / "checkpoints").glob("checkpoint-*")):
            line = run.stderr.readline()
            assert line, seen.decode()
            seen += line
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read().decode()
        assert run.wait(120) == 130, rest
    assert "--resume" in rest
    assert "Traceback" not in rest
    assert not (home / "bots" / "long").exists()
    steps = max(int(p.name.split("-")[1]) for p in (home / "bots" / "long.run" / "checkpoints").glob("checkpoint-*"))
    arguments[3] = f"training.max_steps={steps + 5}"
    code, out, err = inside(*arguments, "--resume", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == steps + 5


@pytest.fixture(scope="session")
def babbler(home: Path) -> Path:
    "A bot that never ends an answer: to it, all tokens but the special ones are equally likely."
    import torch

    from llmbot.core.config import ModelConfig
    from llmbot.core.model_manager import new_model, save_bot, train_tokenizer

    tokenizer = train_tokenizer(["some text to begin with"], 280)
    model = new_model(ModelConfig(preset="qwen3-0.2m", max_position_embeddings=8192), tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        tokens = model.get_input_embeddings().weight  # the head's as well
        tokens.fill_(1)
        tokens[tokenizer.all_special_ids] = -1
    return save_bot(home / "babbler", model, tokenizer)


def test_a_conversation_in_a_terminal(home: Path, inside: Run) -> None:
    pexpect = pytest.importorskip("pexpect")
    term = pexpect.spawn(LLMBOT, ["chat", "tiny", "--temperature", "0"], cwd=str(home), env=ENV | {"TERM": "dumb"}, timeout=120,
                         encoding="utf-8", echo=False)
    term.expect("> ")
    term.sendline("hello")
    term.expect("> ")
    first = term.before.strip()
    assert first == inside("chat", "tiny", "-p", "hello", "--temperature", "0")[1].strip()
    term.sendline("/save talk.jsonl")
    term.expect("2 messages")
    assert json.loads((home / "talk.jsonl").read_text())["messages"][1]["content"] == first
    term.sendline("/quit")
    term.expect(pexpect.EOF)
    term.close()
    assert term.exitstatus == 0


def test_ctrl_c_stops_an_answer_and_not_the_conversation(home: Path, babbler: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    term = pexpect.spawn(LLMBOT, ["chat", str(babbler), "--max-new-tokens", "4000", "--seed", "1"], cwd=str(home),
                         env=ENV | {"TERM": "dumb"}, timeout=120, encoding="utf-8", echo=False,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored where the tests run in the background
    term.expect("> ")
    for _ in range(2):
        term.sendline("go")
        term.expect("[a-z].{200}")  # somebody has read a little
        term.sendintr()
        term.expect(r"\(stopped\)")
        term.expect("> ")
    time.sleep(1)  # Python overlooks a Ctrl-C between readline's prompt and its wait for a key
    term.sendintr()
    term.expect("/quit leaves")
    term.expect("> ")
    term.sendeof()
    term.expect(pexpect.EOF)
    term.close()
    assert term.exitstatus == 0
