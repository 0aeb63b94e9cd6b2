"""One bot on PyTorch and ONNX Runtime: the same prompts, the same tokens; and what is told where they part."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bots import make_bot

from llmbot.app.cli import main
from llmbot.core.adapters import attach_adapter, merge_bot
from llmbot.core.bot import Manifest
from llmbot.core.errors import BotError, ConfigError, DataError, MissingExtraError, ServingError
from llmbot.core.model_manager import load_bot, save_bot
from llmbot.core.training_config import LoraConfig
from llmbot.serving.onnx_export import Tolerance, export_onnx
from llmbot.serving.parity import check_parity, installed_backends, own_probes

ROWS = [{"messages": [{"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": str(2 * n)}]} for n in range(9)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A base, an adapter on it, the two merged, and exports of the base that lost something."
    home = tmp_path_factory.mktemp("bots")
    base = make_bot(home, "base", 5)
    bot = load_bot(base, device="cpu")
    model = attach_adapter(bot.model, LoraConfig(rank=4), seed=1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    save_bot(home / "adapter", model, bot.tokenizer, Manifest(name="adapter", parent=str(base)))
    merge_bot(home / "adapter", home / "merged", tolerance=1e-2)
    for precision in ("int4", "int8"):
        export_onnx(base, home / precision, precision, tolerance=Tolerance(float("inf"), 0, float("inf")))
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return home


@pytest.mark.parametrize(("name", "sides"), [
    ("base", ["onnx fp32"]), ("merged", ["onnx fp32"]), ("adapter", ["torch, adapter beside its base", "onnx fp32"]),
])  # fmt: skip
def test_base_merged_and_live_adapter_say_the_same(home: Path, name: str, sides: list[str]) -> None:
    report = check_parity(str(home / name), ["torch", "onnx"], data=str(home / "rows.jsonl"), prompts=5, device="cpu")
    assert report.passed
    assert [side.name for side in report.sides] == sides
    for side in report.sides:
        assert (side.prompts, side.equal) == (5, 5)
        assert side.tokens > 5
        assert side.largest_logprob_difference < 1e-3


def test_a_difference_is_told_with_what_both_sides_find_likely(home: Path) -> None:
    "The graph of four bits is not the bot; transformers, without a cache, is the oracle for the first side's figures."
    report = check_parity(str(home / "int4"), ["torch", "onnx"], prompts=4, device="cpu")
    [side] = report.sides
    assert side.name == "onnx int4"
    assert not report.passed
    assert side.equal < side.prompts
    bot = load_bot(home / "base", device="cpu", dtype="float32")
    prompts = {probe.text: probe.prompt_ids for probe in own_probes(bot.chat)}
    parted = [d for d in side.differences if d.expected_by and d.found_by]
    assert parted
    for d in parted:
        ids = list(prompts[d.prompt])
        expected, found = int(d.expected.split()[0]), int(d.found.split()[0])
        with torch.inference_mode():
            for _ in range(d.place):
                ids.append(int(bot.model(torch.tensor([ids])).logits[0, -1].argmax()))
            exact = bot.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert expected == int(exact.argmax()) != found
        assert d.expected_by is not None
        assert d.expected_by[0] == pytest.approx(float(exact[expected]), abs=1e-4)
        assert d.found_by is not None
        if d.found_by[0] is None:
            assert float(exact[found]) <= float(exact.topk(20).values[-1]) + 1e-4
        else:
            assert d.found_by[0] == pytest.approx(float(exact[found]), abs=1e-4)


def test_behind_a_near_tie_the_comparison_goes_on(home: Path) -> None:
    "All is a near tie where any log-probability may differ: then every token of the reference is compared."
    report = check_parity(str(home / "int8"), ["torch", "onnx"], prompts=4, max_new_tokens=24, tolerance=1e9, device="cpu")
    strict = check_parity(str(home / "int8"), ["torch", "onnx"], prompts=4, max_new_tokens=24, device="cpu")
    whole = check_parity(str(home / "base"), ["torch", "onnx"], prompts=4, max_new_tokens=24, device="cpu")
    [side] = report.sides
    found = [d for d in side.differences if d.what == "answer" and d.tie]
    assert side.tokens + len(found) == whole.sides[0].tokens
    assert len(found) > len(strict.sides[0].differences)


def test_another_template_is_a_difference_of_the_prompt(home: Path, tmp_path: Path) -> None:
    export_onnx(home / "base", tmp_path / "export", "fp32")
    template = tmp_path / "export" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    [side] = check_parity(str(tmp_path / "export"), ["torch", "onnx"], prompts=6, max_new_tokens=4, device="cpu").sides
    assert {d.what for d in side.differences} == {"prompt"}
    assert not side.passed


def test_what_cannot_be_compared_is_refused(home: Path, tmp_path: Path) -> None:
    base = str(home / "base")
    for backends in (["torch"], ["torch", "torch"], ["torch", "remote"]):
        with pytest.raises(ConfigError):
            check_parity(base, backends)
    if "vllm" not in installed_backends():
        with pytest.raises(MissingExtraError, match="vllm .*not installed"):
            check_parity(base, ["torch", "vllm"])
    with pytest.raises(ConfigError, match="fewer new"):
        check_parity(base, ["torch", "onnx"], max_new_tokens=10**6)
    (tmp_path / "none.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"none\.jsonl"):
        check_parity(base, ["torch", "onnx"], data=str(tmp_path / "none.jsonl"))
    with pytest.raises(BotError):
        check_parity(str(tmp_path / "nothing"), ["torch", "onnx"])


def test_the_command_ends_in_a_code_that_a_pipeline_sees(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["verify", *arguments, "--device", "cpu", "--max-new-tokens", "8"])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    code, out, _ = run(str(home / "base"), "--backends", "torch,onnx", "--data", str(home / "rows.jsonl"), "--prompts", "2", "--json")
    told: dict[str, Any] = json.loads(out)
    assert (code, told["passed"], told["left_out"], told["sides"][0]["equal"]) == (0, True, [], 2)
    code, out, _ = run(str(home / "int4"), "--backends", "torch,onnx")
    assert code == ServingError.exit_code
    assert "by onnx int4" in out
    assert "not the same" in out
    code, out, err = run(str(home / "base"), "--backends", "torch,nothing")
    assert (code, out) == (ConfigError.exit_code, "")
    assert "'nothing'" in err


def test_a_real_model(shared: Path) -> None:
    "stories260K, in words that it knows."
    data = str(shared / "data" / "text")
    report = check_parity(str(shared / "models" / "stories260K"), ["torch", "onnx"], data=data, prompts=3, device="cpu")
    assert report.passed
    assert report.sides[0].equal == 3
