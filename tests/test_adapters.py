"""Adapters against independent witnesses: PEFT's own loading, the formula of the paper, and a base that must stay as it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import recipes
import torch
from peft.tuners.lora.torchao import TorchaoLoraLinear
from recipes import on, train, write
from safetensors.torch import load_file
from tiny_bots import CORPUS, make_bot
from transformers import AutoModelForCausalLM

from llmbot.core.adapters import attach_adapter, linear_layers, load_adapters, merge_bot
from llmbot.core.bot import bot_digest, read_manifest, verify_bot
from llmbot.core.config import ModelConfig
from llmbot.core.errors import BotError, ConfigError, TrainingError
from llmbot.core.model_manager import commit_of, load_bot, new_model, save_bot, train_tokenizer
from llmbot.core.training_config import LoraConfig
from llmbot.evaluation.evaluate import evaluate_bot
from llmbot.serving.decoding import ask
from llmbot.training.trainer import TrainingResult, run_directory

CHATS = recipes.chats(4, (1,))


def recipe(home: Path, base: Path, name: str, **changes: Any) -> Any:
    settings = {
        "training.method": "lora", "training.output_dir": home / name, "training.max_steps": 4, "training.learning_rate": 0.02,
        "lora.rank": 4, "data.validation_split": 0.2,
    }  # fmt: skip
    return recipes.recipe(home, CHATS, **(on(base) | settings | changes))


def tune(home: Path, base: Path, name: str, **changes: Any) -> TrainingResult:
    return train(recipe(home, base, name, **changes))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


IDS = torch.tensor([[5, 40, 260, 7, 99, 301, 12, 3]])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    return make_bot(home, "base")


@pytest.fixture(scope="module")
def skill(home: Path, base: Path) -> Path:
    return tune(home, base, "skill").bot


def by_hand(base: Path, adapter: Path, scale: float) -> Any:
    "The paper's formula: each weight plus `scale * B @ A`, from the two files."
    model = AutoModelForCausalLM.from_pretrained(base)
    update = load_file(adapter / "adapter_model.safetensors")
    for name, module in model.named_modules():
        if f"base_model.model.{name}.lora_A.weight" in update:
            low, high = (update[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
            module.weight.data += scale * high @ low
    return model


def test_peft_itself_loads_the_bot(base: Path, skill: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = logits(load_bot(skill, device="cpu").model, IDS)
    theirs = logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(skill)), IDS)
    assert torch.equal(ours, theirs)
    assert (ours - logits(AutoModelForCausalLM.from_pretrained(base), IDS)).abs().max() > 0.1, "the adapter does something"
    monkeypatch.chdir(skill)  # the base's place is written relative to the adapter
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained("."), IDS), ours)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 4**0.5)])
def test_scale_and_size_are_those_of_the_papers(home: Path, base: Path, rslora: bool, scale: float) -> None:
    bot = tune(home, base, f"scaled-{rslora}", **{"lora.alpha": 6, "lora.use_rslora": rslora}).bot
    assert torch.allclose(logits(load_bot(bot, device="cpu").model, IDS), logits(by_hand(base, bot, scale), IDS), atol=1e-4)
    model = load_bot(base, device="cpu").model
    shapes = [model.get_submodule(name) for name in linear_layers(model)]
    facts = read_manifest(bot).adapter  # type: ignore[union-attr]
    assert facts["trainable_parameters"] == sum(4 * (layer.in_features + layer.out_features) for layer in shapes)
    assert facts["trainable_parameters"] == sum(t.numel() for t in load_file(bot / "adapter_model.safetensors").values())
    assert facts["scale"] == pytest.approx(scale)


def test_chosen_layers_only(home: Path, base: Path) -> None:
    bot = tune(home, base, "queries", **{"lora.target_modules": "[q_proj]"}).bot
    assert all("q_proj" in name for name in load_file(bot / "adapter_model.safetensors"))


def test_only_the_adapter_moves(home: Path, base: Path, tmp_path: Path) -> None:
    before, digest = load_file(base / "model.safetensors"), bot_digest(base)
    cfg = recipe(home, base, "unused", **{"training.output_dir": tmp_path / "bot"})
    run, trainer = recipes.built(cfg, tmp_path)
    start = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in run.model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items() if name in after)
    assert all("lora_" in name for name in start)
    moved = [name for name, p in run.model.named_parameters() if name in start and not torch.equal(p, start[name])]
    assert len(moved) == len(start)
    assert bot_digest(base) == digest


def test_merged_bot_is_the_sum(home: Path, base: Path) -> None:
    bot = tune(home, base, "merged", **{"lora.merge": True}).bot
    assert not (bot / "adapter_config.json").exists()
    assert verify_bot(bot) == []
    weights, expected = load_file(bot / "model.safetensors"), by_hand(base, run_directory(bot) / "adapter", 2.0).state_dict()
    assert all(torch.allclose(weight, expected[name], atol=1e-6) for name, weight in weights.items())
    facts = read_manifest(bot).adapter  # type: ignore[union-attr]
    rows = facts["merge_positions"]
    assert facts["merged"]
    assert facts["merge_difference"] < 1e-3 < 0.1 < facts["merge_effect"]
    assert rows > 20
    assert "held-out" in facts["merge_compared_on"]
    assert read_manifest(bot).parent_digest == bot_digest(base)


def test_a_merge_that_is_wrong_is_not_written(home: Path, base: Path, skill: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    honest = Linear.get_delta_weight
    with monkeypatch.context() as broken:
        broken.setattr(Linear, "get_delta_weight", lambda self, name: 1.05 * honest(self, name))
        with pytest.raises(BotError, match="not the adapter on its base.*Nothing was written"):
            merge_bot(skill, tmp_path / "whole")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(BotError, match="The adapter is whole, in") as refused:
            tune(home, base, "spoilt", **{"lora.merge": True})
    kept = run_directory(home / "spoilt") / "adapter"
    assert str(kept) in str(refused.value)
    assert not (home / "spoilt").exists()
    assert merge_bot(kept, home / "spoilt").difference < 1e-3  # the training was not lost
    with pytest.raises(BotError, match="accepted"):
        merge_bot(skill, tmp_path / "whole", tolerance=1e-12)
    with pytest.raises(BotError, match="whole model already"):
        merge_bot(base, tmp_path / "whole")


def test_another_base_is_refused(base: Path, skill: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(skill, tmp_path / "skill")
    manifest = json.loads((tmp_path / "skill" / "llmbot.json").read_text())
    manifest["parent"] = "base"  # the recipe named a path that is no more
    (tmp_path / "skill" / "llmbot.json").write_text(json.dumps(manifest))
    assert torch.equal(logits(load_bot(tmp_path / "skill", device="cpu").model, IDS), logits(load_bot(skill, device="cpu").model, IDS))
    settings = json.loads((tmp_path / "base" / "generation_config.json").read_text()) | {"top_k": 3}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(BotError) as refused:
        load_bot(tmp_path / "skill").model  # noqa: B018
    assert bot_digest(base) in str(refused.value)
    assert bot_digest(tmp_path / "base") in str(refused.value)
    assert "train the adapter anew" in str(refused.value)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(BotError, match="nothing is there"):
        load_bot(tmp_path / "skill").config  # noqa: B018


def in_the_cache(cache: Path, bot: Path, commit: str) -> None:
    "Put a model into a cache of the hub as `huggingface_hub` lays it out, as the newest version of someone/tiny."
    home = cache / "models--someone--tiny"
    (snapshot := home / "snapshots" / commit).mkdir(parents=True)
    for path in bot.iterdir():
        if path.name not in ("llmbot.json", "README.md"):
            blob = home / "blobs" / f"{path.name}-{commit}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)


def test_a_base_of_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "From the cache alone: trained, loaded and merged on the commit that it was trained on, though the model has moved on since."
    from huggingface_hub import constants, scan_cache_dir

    first, second = "1" * 40, "2" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    in_the_cache(tmp_path / "hub", base, first)
    [cached] = scan_cache_dir(tmp_path / "hub").repos
    assert (cached.repo_id, [r.commit_hash for r in cached.revisions]) == ("someone/tiny", [first])
    bot = tune(tmp_path, "hf:someone/tiny", "skill", **{"training.save_steps": 2}).bot  # type: ignore[arg-type]
    local = tune(tmp_path, base, "local").bot
    facts = read_manifest(bot).adapter  # type: ignore[union-attr]
    assert facts["base_revision"] == first
    stored = json.loads((bot / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("someone/tiny", first)
    expected = logits(load_bot(local, device="cpu").model, IDS)
    assert torch.equal(logits(load_bot(bot, device="cpu").model, IDS), expected)
    in_the_cache(tmp_path / "hub", make_bot(tmp_path, "moved", seed=9), second)
    assert commit_of(load_bot("hf:someone/tiny", device="cpu")) == second
    assert torch.equal(logits(load_bot(bot, device="cpu").model, IDS), expected)
    assert merge_bot(bot, tmp_path / "whole").difference < 1e-3
    assert torch.allclose(logits(load_bot(tmp_path / "whole", device="cpu").model, IDS), expected, atol=1e-3)
    shutil.rmtree(bot)
    with pytest.raises(TrainingError, match=f"its digest was {first} then, and is {second} now"):
        train(recipe(tmp_path, "hf:someone/tiny", "skill", **{"training.save_steps": 2}), resume=True)  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "hub" / "models--someone--tiny" / "snapshots" / first)
    tune(tmp_path, "hf:someone/tiny", "newer")  # type: ignore[arg-type]


def test_a_damaged_adapter_is_refused(home: Path, skill: Path) -> None:
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(skill, home / "damaged"))
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(BotError, match="lacks 1 tensors"):
        load_bot(copy, device="cpu").model  # noqa: B018
    (copy / "adapter_model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(BotError, match="Cannot load the adapter"):
        load_bot(copy, device="cpu").model  # noqa: B018
    (copy / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model_name_or_path": "../base"}')
    with pytest.raises(BotError, match="IA3"):
        load_bot(copy, device="cpu").model  # noqa: B018


def test_several_adapters_share_one_base(home: Path, base: Path, skill: Path) -> None:
    other = tune(home, base, "other", **{"training.seed": 7, "lora.rank": 2}).bot
    model, bots = load_adapters([skill, other], device="cpu")
    assert list(bots) == ["skill", "other"]
    for name in ("other", "skill", "other"):
        model.set_adapter(name)
        assert torch.equal(logits(model, IDS), logits(load_bot(home / name, device="cpu").model, IDS))
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(load_bot(base, device="cpu").model, IDS))
    with pytest.raises(BotError, match="no adapter"):
        load_adapters([skill, base])
    with pytest.raises(BotError, match="one name"):
        load_adapters([skill, skill])
    stranger = tune(home, make_bot(home, "second", seed=2), "stranger").bot
    with pytest.raises(BotError, match="load them apart"):
        load_adapters([skill, stranger])


def test_dora_trains_loads_and_merges(home: Path, base: Path, tmp_path: Path) -> None:
    bot = tune(home, base, "dora", **{"lora.use_dora": True}).bot
    assert any("magnitude" in name for name in load_file(bot / "adapter_model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(bot))
    assert torch.equal(logits(load_bot(bot, device="cpu").model, IDS), logits(theirs, IDS))
    assert merge_bot(bot, tmp_path / "whole").difference < 1e-3
    assert torch.allclose(logits(load_bot(tmp_path / "whole", device="cpu").model, IDS), logits(theirs, IDS), atol=1e-3)


@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_tied_embeddings_stay_tied(home: Path, base: Path, named: str) -> None:
    "Embedding and head are one matrix in this base; whichever is to be trained whole, both are, as one."
    result = tune(home, base, f"tied-{named}", **{"lora.modules_to_save": f"[{named}]", "lora.merge": True})
    weights, old = load_file(result.bot / "model.safetensors"), load_file(base / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert not torch.equal(weights["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    adapter = load_bot(run_directory(result.bot) / "adapter", device="cpu").model
    assert torch.equal(adapter.get_input_embeddings().weight, adapter.get_output_embeddings().weight)
    assert torch.allclose(logits(load_bot(result.bot, device="cpu").model, IDS), logits(adapter, IDS), atol=1e-3)


def test_new_tokens_are_learned_with_the_adapter(home: Path, tmp_path: Path) -> None:
    "A base without a chat template gets tokens for one; their embeddings are rows of the adapter."
    tokenizer = train_tokenizer(CORPUS * 20, vocab_size=320)  # a multiple of 64: the embedding has no spare rows
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    bare = save_bot(home / "bare", new_model(ModelConfig(preset="qwen3-0.2m"), tokenizer), tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the two tokens of ChatML get other names
        text = (bare / name).read_text().replace("<|im_start|>", "<|unused_1|>").replace("<|im_end|>", "<|unused_2|>")
        (bare / name).write_text(text)
    result = tune(home, bare, "grown")
    loaded = load_bot(result.bot, device="cpu")
    assert len(loaded.tokenizer) > 320
    assert loaded.config.vocab_size == len(loaded.tokenizer) == loaded.model.config.vocab_size
    stored = load_file(result.bot / "adapter_model.safetensors")
    [rows] = [t for n, t in stored.items() if "trainable_tokens" in n]
    assert rows.shape == (len(loaded.tokenizer) - 320, 64) == (read_manifest(result.bot).adapter["added_tokens"], 64)  # type: ignore[union-attr]
    assert sum(t.numel() for t in stored.values()) == read_manifest(result.bot).adapter["trainable_parameters"]  # type: ignore[union-attr]
    measured = evaluate_bot(result.bot, home / "rows.jsonl", ["loss"]).metrics["loss"]
    further = tune(home, result.bot, "grown-further", **{"training.max_steps": 1})
    assert further.metrics["validation_loss_before"] == pytest.approx(result.metrics["validation_loss"], abs=1e-4)
    assert merge_bot(result.bot, tmp_path / "whole").difference < 1e-3
    assert evaluate_bot(tmp_path / "whole", home / "rows.jsonl", ["loss"]).metrics["loss"] == pytest.approx(measured, abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "sft"])
def test_an_adapter_bot_can_be_a_base(home: Path, skill: Path, method: str) -> None:
    "It is merged in memory, so the child starts where the adapter ended."
    changes = {"training.method": method, "training.max_steps": 1}
    result = tune(home, skill, f"child-{method}", **changes | ({"lora.rank": 16} if method == "sft" else {}))
    assert result.metrics["validation_loss_before"] == pytest.approx(read_manifest(skill).metrics["validation_loss"], abs=1e-4)  # type: ignore[union-attr]
    assert read_manifest(result.bot).parent_digest == bot_digest(skill)  # type: ignore[union-attr]
    measured = evaluate_bot(result.bot, home / "rows.jsonl", ["loss"]).metrics["loss"]
    assert 0 < measured < 20


def test_resumed_adapter_is_bit_equal(home: Path, base: Path) -> None:
    "From a checkpoint in the middle: dropout, order and optimizer go on as if nothing had happened."
    changes = {"training.max_steps": 6, "training.save_steps": 3, "lora.dropout": 0.2}
    result = tune(home, base, "resumed", **changes)
    expected = load_file(result.bot / "adapter_model.safetensors")
    shutil.rmtree(result.bot)
    shutil.rmtree(result.run_dir / "checkpoints" / "checkpoint-6")
    resumed = train(recipe(home, base, "resumed", **changes), resume=True)
    found = load_file(resumed.bot / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_resume_refuses_another_base(home: Path, tmp_path: Path) -> None:
    changed = make_bot(tmp_path, "base")
    result = tune(home, changed, "based", **{"training.save_steps": 2})
    shutil.rmtree(result.bot)
    (changed / "generation_config.json").write_text("{}")
    with pytest.raises(TrainingError, match="not what it was when the run"):
        train(recipe(home, changed, "based", **{"training.save_steps": 2}), resume=True)


def test_gradient_checkpointing_reaches_the_adapter(home: Path, base: Path, skill: Path) -> None:
    bot = tune(home, base, "recomputed", **{"training.gradient_checkpointing": True}).bot
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (skill, bot))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_the_random_half_depends_on_the_seed_alone(base: Path) -> None:
    found = []
    for noise, seed in ((0, 42), (3, 42), (0, 7)):
        torch.rand(noise)
        model = attach_adapter(load_bot(base, device="cpu").model, LoraConfig(rank=2), seed=seed)
        found.append(next(p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.target_modules": "[q_proj, query]"}, "names 'query'.*Its linear layers are down_proj"),
        ({"lora.modules_to_save": "[head]"}, "names 'head'"),
        ({"model.base": "null", "model.preset": "qwen3-0.2m"}, "model.base is unset"),
    ],
)
def test_what_cannot_be_adapted_is_refused(home: Path, base: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tune(home, base, "never", **changes)
    assert not (home / "never").exists()
    assert not run_directory(home / "never").exists()


def test_it_is_served_and_evaluated_like_any_bot(home: Path, base: Path, skill: Path, tmp_path: Path) -> None:
    merge_bot(skill, tmp_path / "whole")
    assert ask(skill, "red fish?") == ask(tmp_path / "whole", "red fish?")
    reports = [evaluate_bot(bot, home / "rows.jsonl", ["exact_match", "loss"]) for bot in (skill, tmp_path / "whole")]
    assert reports[0].metrics["loss"] == pytest.approx(reports[1].metrics["loss"], abs=1e-4)
    assert [row.answer for row in reports[0].examples] == [row.answer for row in reports[1].examples]


def numbers(layer: Any) -> torch.Tensor:
    "What a quantized layer keeps."
    return getattr(layer.weight, "qdata", layer.weight.data).clone()


class TestQuantized:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("bitsandbytes", reason="the extra 'quantization' is not installed")

    @pytest.mark.parametrize("bits", ["nf4", "int8", "torchao_int8"])
    def test_backward_touches_the_adapter_alone(self, home: Path, base: Path, tmp_path: Path, bits: str) -> None:
        module = pytest.importorskip("torchao" if bits == "torchao_int8" else "bitsandbytes", reason="its extra is not installed")
        kind = TorchaoLoraLinear if bits == "torchao_int8" else module.nn.Linear4bit if bits == "nf4" else module.nn.Linear8bitLt
        cfg = recipe(home, base, "unused", **{"training.output_dir": tmp_path / "bot", "model.quantization": bits})
        run, trainer = recipes.built(cfg, tmp_path)
        layers = {n: m for n, m in run.model.named_modules() if isinstance(m, kind)}
        assert len(layers) == 21, "seven in each of three blocks"
        trainer.heldout_metrics(run.data.validation)  # an evaluation must not change the base either
        before = {name: numbers(layer) for name, layer in layers.items()}
        first = trainer.heldout_metrics(run.data.validation)["loss"]
        trainer.train()
        assert all(torch.equal(numbers(layer), before[name]) for name, layer in layers.items())
        assert all(p.grad is None for n, p in run.model.named_parameters() if "lora_" not in n)
        assert trainer.heldout_metrics(run.data.validation)["loss"] < first

    def test_merge_is_judged_on_the_full_base(self, home: Path, base: Path) -> None:
        bot = tune(home, base, "qlora", **{"model.quantization": "nf4", "lora.merge": True}).bot
        facts = read_manifest(bot).adapter  # type: ignore[union-attr]
        assert facts["trained_on"] == "the base in nf4"
        assert facts["merge_difference"] < 1e-3 < 1e-2 < facts["merge_difference_from_quantized"]
        expected = by_hand(base, run_directory(bot) / "adapter", 2.0)
        assert torch.allclose(logits(load_bot(bot, device="cpu").model, IDS), logits(expected, IDS), atol=1e-3)

    def test_a_served_bot_can_be_quantized(self, base: Path, skill: Path) -> None:
        full, small = (load_bot(skill, device="cpu", quantization=q).model for q in ("none", "nf4"))
        assert 1e-3 < (logits(full, IDS) - logits(small, IDS)).abs().max() < logits(full, IDS).abs().max()

    def test_an_adapter_as_a_quantized_base_is_refused(self, home: Path, skill: Path) -> None:
        with pytest.raises(BotError, match="llmbot models merge"):
            tune(home, skill, "never", **{"model.quantization": "nf4"})


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
sys.meta_path.insert(0, Blocked())
from llmbot.app.cli import main
main()
"""


def test_without_bitsandbytes_the_extra_is_named(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", CHATS)
    command = ["train", f"model.base={base}", "model.quantization=nf4", "training.method=lora", f"data.train={data}",
               f"training.output_dir={tmp_path / 'bot'}", f"data.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", BLOCK, *command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "pip install 'llmbot[quantization]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bot").exists()


def test_merge_on_the_command_line(home: Path, skill: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from llmbot.app.cli_bots import app

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["merge", str(skill), "--output", str(tmp_path / "whole"), *arguments])

    told = json.loads(run("--data", str(home / "rows.jsonl"), "--json").stdout)
    assert told["difference"] < 1e-3 < told["effect"]
    assert "20 rows of" in told["rows"]
    refused = run().exception
    assert isinstance(refused, BotError)
    assert "exists already" in str(refused)
    shown = run("--overwrite")
    assert shown.exit_code == 0
    assert "verified on" in shown.stdout
