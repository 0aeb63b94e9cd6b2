"Weights in 8 bits by torchao, against the same numbers made by hand: round(weight / step), a step for each row."

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
from recipes import on
from safetensors.torch import load_file
from tiny_bots import make_bot
from transformers import AutoModelForCausalLM

from llmbot.core.adapters import attach_adapter, linear_layers, merge_bot
from llmbot.core.bot import Manifest, bot_digest
from llmbot.core.config import Config
from llmbot.core.errors import BotError, ConfigError, MissingExtraError
from llmbot.core.model_manager import load_bot, save_bot
from llmbot.core.training_config import LoraConfig
from llmbot.serving.backends import create_backend
from llmbot.serving.bot_memory import weights_memory
from llmbot.serving.onnx_export import export_onnx
from llmbot.serving.sampling_params import GenerationRequest, SamplingParams
from llmbot.training.plan import plan
from llmbot.training.trainer import train

pytest.importorskip("torchao", reason="the extra 'torchao' is not installed")
IDS = torch.tensor([[5, 40, 260, 7, 99, 301, 12, 3]])
PROMPTS = [tuple(range(10 + k, 22 + 3 * k)) for k in range(6)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def steps(weight: torch.Tensor) -> torch.Tensor:  # (out, 1)
    "Whole numbers from -128 to 127 span twice the largest weight of a row."
    return weight.abs().amax(dim=1, keepdim=True) / 127.5


def by_hand(base: Path, adapter: Path | None = None) -> Any:
    "A plain model whose weights are rounded, and to which an adapter's update is then added."
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    update = load_file(adapter / "adapter_model.safetensors") if adapter else {}
    for name in linear_layers(model):
        weight = model.get_submodule(name).weight
        step = steps(weight.data)
        weight.data = (weight.data * (1 / step)).round().clamp(-128, 127) * step  # the largest of a row is a tie: half rounds to even
        if adapter:
            low, high = (update[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
            weight.data += 2 * high @ low
    return model


def kept_bytes(model: Any) -> int:
    "Numbers, scales and zero points of quantized layers, and the other weights."
    found = 0
    for weight in model.parameters():
        parts = (weight.qdata, weight.scale, weight.zero_point) if hasattr(weight, "qdata") else (weight,)
        found += sum(part.nbytes for part in parts)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torchao")


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    return make_bot(home, "base", seed=5)


@pytest.fixture(scope="module")
def adapter(home: Path, base: Path) -> Path:
    "One that says something else than its base."
    bot = load_bot(base, device="cpu")
    model = attach_adapter(bot.model, LoraConfig(rank=4))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return save_bot(home / "skill", model, bot.tokenizer, Manifest(name="skill", parent=str(base), parent_digest=bot_digest(base)))


@pytest.fixture(scope="module")
def saved(home: Path, base: Path) -> Path:
    "A bot that is kept in 8 bits on the disk too."
    bot = load_bot(base, device="cpu", quantization="torchao_int8")
    return save_bot(home / "saved", bot.model, bot.tokenizer)


def test_it_computes_with_the_rounded_weights(base: Path) -> None:
    found, expected = logits(load_bot(base, device="cpu", quantization="torchao_int8").model), logits(by_hand(base))
    full = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (found - expected).abs().max() < 1e-5 * full.abs().max() < 1e-3 * full.abs().max() < (found - full).abs().max()
    half, small = (logits(load_bot(base, device="cpu", dtype="bfloat16", quantization=q).model) for q in ("none", "torchao_int8"))
    assert (small - expected).abs().mean() < 3 * (half - full).abs().mean(), "more than bf16 alone rounds off"


def test_a_layer_is_off_by_half_a_step_of_each_weight_at_most(base: Path) -> None:
    full, small = (load_bot(base, device="cpu", quantization=q).model for q in ("none", "torchao_int8"))
    for name in linear_layers(full):
        weight = full.get_submodule(name).weight.data
        inputs = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            off = (small.get_submodule(name)(inputs) - full.get_submodule(name)(inputs)).abs()
        assert (off <= inputs.abs().sum(1, keepdim=True) * steps(weight).T / 2 + 1e-4).all()
        assert off.max() > 1e-4, "as if nothing had been rounded"


def test_the_batcher_answers_as_the_rounded_model_alone_with_and_without_an_adapter(base: Path, adapter: Path) -> None:
    models = {None: by_hand(base), "skill": by_hand(base, adapter)}
    expected = {}
    for name, model in models.items():
        for ids in PROMPTS:
            prompt = torch.tensor([ids])
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
            expected[name, ids] = out[0, len(ids) :].tolist()
    assert all(expected[None, ids] != expected["skill", ids] for ids in PROMPTS)

    async def main() -> list[list[int]]:
        backend: Any = create_backend("torch", str(base), Config(model={"device": "cpu", "quantization": "torchao_int8"}))  # type: ignore[arg-type]
        await backend.start()
        await backend.load_adapter("skill", str(adapter))

        async def ask(name: str | None, ids: tuple[int, ...]) -> list[int]:
            request = GenerationRequest(ids, SamplingParams(temperature=0, max_new_tokens=20), "r", adapter=name)
            async with aclosing(backend.generate(request)) as stream:
                return [i async for chunk in stream for i in chunk.token_ids]

        found = await asyncio.gather(*(ask(*key) for key in expected))
        await backend.unload_adapter("skill")
        found.append(await ask(None, PROMPTS[0]))
        await backend.stop()
        return found

    *found, after = asyncio.run(main())
    assert found == list(expected.values())
    assert after == expected[None, PROMPTS[0]]


def test_memory_is_the_estimate_and_five_bytes_a_row(base: Path, adapter: Path) -> None:
    "A scale in fp32 and a zero point."
    cfg = Config(model={"device": "cpu", "dtype": "float32", "quantization": "torchao_int8"})  # type: ignore[arg-type]
    bot = load_bot(base, device="cpu", dtype="float32", quantization="torchao_int8")
    rows = sum(bot.model.get_submodule(name).weight.shape[0] for name in linear_layers(bot.model))
    assert kept_bytes(bot.model) == weights_memory(str(base), cfg) + 5 * rows  # type: ignore[operator]
    with_adapter = load_bot(adapter, device="cpu", dtype="float32", quantization="torchao_int8").model
    assert kept_bytes(with_adapter) == weights_memory(str(adapter), cfg) + 5 * rows  # type: ignore[operator]


def test_an_adapter_of_the_full_base_stands_on_the_rounded_one(base: Path, adapter: Path) -> None:
    found = logits(load_bot(adapter, device="cpu", quantization="torchao_int8").model)
    expected = logits(by_hand(base, adapter))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_ddp_leaves_the_rounded_weights_alone(base: Path, tmp_path: Path) -> None:
    "It sends all others around, for which torchao's have no operation."
    model = attach_adapter(load_bot(base, device="cpu", quantization="torchao_int8").model, LoraConfig(rank=4))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(IDS, labels=IDS).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name}  # fmt: skip
    assert len(wrapped.parameters_to_ignore) == len(linear_layers(load_bot(base, device="cpu").model))


class TestSaved:
    def test_it_comes_back_as_it_was(self, base: Path, saved: Path) -> None:
        expected = logits(load_bot(base, device="cpu", quantization="torchao_int8").model)
        again = load_bot(saved, device="cpu", dtype="float32")
        assert torch.equal(logits(again.model), expected)
        assert torch.equal(logits(load_bot(saved, device="cpu", quantization="torchao_int8").model), expected)
        cfg = Config(model={"device": "cpu", "dtype": "float32"})  # type: ignore[arg-type]
        assert weights_memory(str(saved), cfg) == kept_bytes(again.model) < weights_memory(str(base), cfg)  # type: ignore[operator]

    def test_what_would_round_its_weights_anew_is_refused(self, home: Path, saved: Path) -> None:
        with pytest.raises(BotError, match=r"saved in torchao_int8, which cannot become nf4"):
            _ = load_bot(saved, device="cpu", quantization="nf4").model
        with pytest.raises(BotError, match="saved in torchao_int8, and the export rounds weights itself"):
            export_onnx(saved, home / "export", precision="int8")
        with pytest.raises(ConfigError, match="saved in torchao_int8, and quantized weights cannot be trained by 'sft'"):
            train(recipes.recipe(home, recipes.chats(4, (1,)), **on(saved)))
        with pytest.raises(ConfigError, match="saved in torchao_int8, and quantized weights cannot be trained by 'sft'"):
            plan(recipes.recipe(home, recipes.chats(4, (1,)), **on(saved)))
        assert not (home / "export").exists()

    def test_an_adapter_can_be_trained_on_it_and_not_be_merged(self, home: Path, base: Path, saved: Path) -> None:
        changes = {"training.method": "lora", "training.max_steps": 1, "training.output_dir": home / "beside"}
        cfg = recipes.recipe(home, recipes.chats(4, (1,)), **(on(saved) | changes))
        same = recipes.recipe(home, recipes.chats(4, (1,)), **(on(base) | changes | {"model.quantization": "torchao_int8"}))
        assert plan(cfg).devices[0].peak == plan(same).devices[0].peak
        skill = train(cfg).bot
        assert load_bot(skill).manifest.adapter["trained_on"] == "the base in torchao_int8"  # type: ignore[union-attr]
        with pytest.raises(BotError, match="saved in torchao_int8, and a merge would round its weights anew"):
            merge_bot(skill, home / "merged")


@pytest.mark.parametrize("bits", ["none", "torchao_int8"])
def test_without_the_package_the_extra_is_named(base: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, bits: str) -> None:
    "Asked for, and where the bot was saved so."
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtraError, match=r"^.torchao. is not installed.*pip install 'llmbot\[torchao\]'"):
        _ = load_bot(saved if bits == "none" else base, device="cpu", quantization=bits).model
