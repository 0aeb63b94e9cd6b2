"""A plan against what is there: real parameter counts, PyTorch's operation counter, and the measured memory of real runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import chats, on, recipe, sums, talk, train
from tiny_bots import make_bot
from torch.utils.flop_counter import FlopCounterMode

from llmbot.core.architectures import PRESETS, qwen3_config, supports_bf16
from llmbot.core.config import Config, ModelConfig
from llmbot.core.config_io import load_config
from llmbot.core.errors import BotError, ConfigError, DataError
from llmbot.core.model_manager import load_bot
from llmbot.core.parameters import adapter_parameters, count, meta_model, operations
from llmbot.core.peak_memory import with_adapter
from llmbot.core.training_config import LoraConfig
from llmbot.training.plan import plan


def small(preset: str, vocab_size: int = 512) -> Any:
    return qwen3_config(ModelConfig(preset=preset), vocab_size)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_model(preset: str) -> None:
    from transformers import AutoModelForCausalLM

    config = small(preset, 1024)
    counted = count(meta_model(config), Config(), adapter=False)
    if counted.total < 50e6:  # the real thing where it is cheap, and transformers' own count on the meta device where it is not
        assert counted.total == AutoModelForCausalLM.from_config(config).num_parameters()
    assert counted.total == counted.trained == meta_model(config).num_parameters()


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=8),
        LoraConfig(rank=4, target_modules=["q_proj", "v_proj"]),
        LoraConfig(rank=4, use_dora=True),
        LoraConfig(rank=4, target_modules=["down_proj"], modules_to_save=["embed_tokens"]),
    ],
)
def test_adapter_has_the_parameters_that_peft_makes(lora: LoraConfig) -> None:
    formula = adapter_parameters(meta_model(small("qwen3-1m")), lora)
    trained, _ = with_adapter(meta_model(small("qwen3-1m")), lora).get_nb_trainable_parameters()
    assert formula == trained


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("length", [32, 256])
def test_operations_are_those_that_pytorch_counts(adapter: bool, length: int) -> None:
    "Forward and backward of a real model, attention included."
    from transformers import AutoModelForCausalLM

    config = small("qwen3-1m", 1024)
    counted = count(meta_model(config), Config(), adapter)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = with_adapter(model, LoraConfig()) if adapter else model
    ids = torch.randint(0, 500, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert operations(config, counted, length).total * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.05)


# The memory of real runs. The estimate has no constant that was fitted to any run, on a CPU not even an overhead, so every case is a test.
WIDE, LONG = {"model.base": "wide"}, {"model.base": "long"}  # two bases, without a preset
CASES: dict[str, dict[str, Any]] = {
    "weights": {"model.hidden_size": 512, "model.num_hidden_layers": 6, "training.per_device_batch_size": 1, "data.max_seq_length": 48},
    "batch": {"model.hidden_size": 192, "model.num_hidden_layers": 4, "training.per_device_batch_size": 8, "data.max_seq_length": 192},
    "loss": {"model.hidden_size": 64, "model.num_hidden_layers": 2, "training.per_device_batch_size": 12, "data.max_seq_length": 256},
    "loss in chunks": {"model.hidden_size": 64, "model.num_hidden_layers": 8, "training.per_device_batch_size": 12,
                       "data.max_seq_length": 256, "training.fused_loss": "chunked"},
    "sgd": {"model.hidden_size": 512, "model.num_hidden_layers": 6, "training.per_device_batch_size": 2, "data.max_seq_length": 32,
            "training.optimizer": "sgd"},
    "checkpointing": {"model.hidden_size": 192, "model.num_hidden_layers": 6, "training.per_device_batch_size": 8,
                      "data.max_seq_length": 192, "training.gradient_checkpointing": True},
    "accumulation": {"model.hidden_size": 384, "model.num_hidden_layers": 5, "training.per_device_batch_size": 2,
                     "data.max_seq_length": 128, "training.gradient_accumulation_steps": 2},
    "documents": {"model.hidden_size": 128, "model.num_hidden_layers": 4, "training.per_device_batch_size": 4,
                  "data.max_seq_length": 384, "data.train": "documents.jsonl"},
    "whole rows": {"model.hidden_size": 64, "model.num_hidden_layers": 16, "training.per_device_batch_size": 4, "data.max_seq_length": 768,
                   "data.train": "long.jsonl", "data.on_overlong": "truncate_right", "training.packing": False},
    "bf16": {"model.hidden_size": 256, "model.num_hidden_layers": 6, "training.per_device_batch_size": 8, "data.max_seq_length": 160,
             "training.precision": "bf16"},
    "lora": WIDE | {"training.method": "lora", "training.per_device_batch_size": 4, "data.max_seq_length": 96},
    "qlora": WIDE | {"training.method": "lora", "training.per_device_batch_size": 2, "data.max_seq_length": 96,
                     "model.quantization": "nf4"},
    "qlora in 8 bits": WIDE | {"training.method": "lora", "training.per_device_batch_size": 2, "data.max_seq_length": 96,
                               "model.quantization": "int8", "training.gradient_checkpointing": True},
    "qlora in 8 bits of torchao": WIDE | {"training.method": "lora", "training.per_device_batch_size": 2, "data.max_seq_length": 96,
                                          "model.quantization": "torchao_int8"},
    "dpo": LONG | {"training.method": "dpo", "training.per_device_batch_size": 4},
    "dpo with a frozen reference": LONG | {"training.method": "dpo", "training.per_device_batch_size": 4, "method.reference": "frozen"},
    "dpo of an adapter": LONG | {"training.method": "dpo", "training.per_device_batch_size": 4, "method.adapter": True,
                                 "method.reference": "adapter_off"},
    "kto": LONG | {"training.method": "kto", "training.per_device_batch_size": 4},
    "grpo": LONG | {"training.method": "grpo", "training.per_device_batch_size": 4, "method.num_generations": 4,
                    "method.max_new_tokens": 64, "method.beta": 0.04, "method.reward": "llmbot.monitoring.rewards:exact_answer"},
}  # fmt: skip

CHILD = """
import ctypes, gc, json, random, sys
from pathlib import Path
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from llmbot.core.architectures import qwen3_config, train_tokenizer
from llmbot.core.chat import attach_chat_template
from llmbot.core.config import ModelConfig
from llmbot.core.config_io import load_config
from llmbot.core.model_manager import save_bot
from llmbot.training.methods import get_method
from llmbot.training.plan import look_at
from llmbot.training.trainer import open_run, prepare_run

torch.set_num_threads(1)
cases, libc = json.load(sys.stdin), ctypes.CDLL(None)

def status(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return 1024 * int(line.split()[1])

def settle():
    gc.collect(); libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

def measure(settings):
    cfg = load_config(None, [f"{k}={v}" for k, v in settings.items()], env={})
    outlook, directory, method = look_at(cfg), open_run(cfg, False), get_method(cfg.training.method)
    settle()
    before = status("VmRSS:")
    trainer = method.build(prepare_run(cfg, method, directory, False, Console(quiet=True)))
    settle()  # what reading the weights and scoring a reference took for a moment is over
    trainer.train()
    return status("VmHWM:") - before, outlook.memory(cfg.training.precision).total

draw = random.Random(0)
words = ["".join(draw.choices("abcdefghijklmnopqrst", k=7)) for _ in range(3000)]
def said(n): return " ".join(draw.choices(words, k=n))
def write(name, rows): Path(name).write_text("".join(json.dumps(row) + "\\n" for row in rows))
Path("text.txt").write_text(" ".join(words * 12))
write("documents.jsonl", ({"text": " ".join(words[i:i + 9])} for i in range(600)))
write("chats.jsonl", ({"messages": [{"role": "user", "content": said(8)}, {"role": "assistant", "content": said(12)}]} for _ in range(40)))
write("dpo.jsonl", ({"prompt": said(12), "chosen": said(12 + i % 3), "rejected": said(10 + i % 3)} for i in range(12)))
write("kto.jsonl", ({"prompt": said(12), "completion": said(12 + i % 3), "label": i % 2 == 0} for i in range(12)))
write("grpo.jsonl", ({"prompt": said(14), "answer": "1"} for _ in range(12)))
write("long.jsonl", ({"text": said(500)} for _ in range(12)))
tokenizer = train_tokenizer([Path("text.txt").read_text()], 2500)
attach_chat_template(tokenizer)
for name, vocabulary, size in (("tiny", 2560, (64, 2)), ("wide", 2560, (512, 5)), ("long", 9000, (128, 4))):
    config = qwen3_config(ModelConfig(hidden_size=size[0], num_hidden_layers=size[1], num_attention_heads=8), vocabulary)
    save_bot(name, AutoModelForCausalLM.from_config(config), tokenizer)
found = {}
for name, settings in cases.items():
    found[name] = measure(settings)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    "Measured and planned bytes of each case. One child runs them all: growth of its resident memory, freed blocks given back at once."
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process can be reset on Linux only")
    tmp = tmp_path_factory.mktemp("memory")
    common = {"training.max_steps": 2, "training.precision": "fp32", "training.warmup_steps": 0, "data.validation_split": 0,
              "data.cache_dir": "cache", "monitoring.trackers": "[]"}  # fmt: skip
    new = {"training.method": "scratch", "data.train": "text.txt", "model.vocab_size": 2500, "model.num_attention_heads": 8}
    warm = new | {"model.preset": "qwen3-0.2m", "training.per_device_batch_size": 1, "data.max_seq_length": 32}
    cases = {"warm-up": warm, "warm-up in bf16": warm | {"training.precision": "bf16"}}
    firsts = {"warm-up of " + name: CASES[name] | {"model.base": "tiny"} for name in ("qlora", "kto", "grpo")}
    for name, case in (firsts | CASES).items():  # a library's own memory is not that of a step
        rows = {"lora": "chats", "dpo": "dpo", "kto": "kto", "grpo": "grpo"}.get(case.get("training.method", ""))
        cases[name] = {"data.train": f"{rows}.jsonl"} | case if rows else new | case
    cases = {name: common | case | {"training.output_dir": str(tmp / name)} for name, case in cases.items()}
    glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(cases), capture_output=True, text=True, cwd=tmp,
                          env={**os.environ, **glibc, "PYTHONPATH": str(Path(__file__).parents[1])}, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_peak_memory_is_the_measured_one_within_a_fifth(memory: dict[str, tuple[float, float]], case: str) -> None:
    if case == "bf16" and not supports_bf16("cpu"):
        pytest.skip("this CPU has no bf16: its products make copies in fp32")
    measured, planned = memory[case]
    print(f"{case}: measured {measured / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB, {planned / measured:.2f}")
    assert measured > 50e6, "the case is too small to tell anything"
    assert planned == pytest.approx(measured, rel=0.2)


ROWS = [talk(f"{i}?", "yes " * (i % 7 + 1)) for i in range(60)]


@pytest.mark.parametrize("packing", [True, False])
def test_steps_and_tokens_are_those_of_the_run(tmp_path: Path, packing: bool) -> None:
    cfg = recipe(tmp_path, ROWS, **{"training.packing": packing, "training.num_train_epochs": 2, "training.gradient_accumulation_steps": 2,
                                    "training.per_device_batch_size": 4})  # fmt: skip
    planned = plan(cfg)
    result = train(cfg)
    assert planned.batches.steps == result.steps
    assert planned.batches.tokens == pytest.approx(result.tokens_per_second * result.seconds, rel=0.1)
    assert planned.parameters.total == planned.parameters.trained
    assert [e.device.name for e in planned.devices][1:3] == ["T4", "L4"]


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_steps_of_methods_that_learn_from_answers(tmp_path: Path, method: str) -> None:
    "Pairs, labelled answers and prompts with answers of many lengths, in an epoch that does not end with a whole batch."
    base = train(recipe(tmp_path / "base", chats(), **{"training.max_steps": 1})).bot
    pairs = sums(5, 3)
    rows = {"dpo": pairs, "kto": [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(pairs)],
            "grpo": [{"prompt": r["prompt"], "answer": r["chosen"]} for r in pairs]}[method]  # fmt: skip
    own = {"method.reward": "llmbot.monitoring.rewards:exact_answer", "method.num_generations": 2, "method.max_new_tokens": 4,
           "method.num_iterations": 2}  # fmt: skip
    cfg = recipe(tmp_path, rows, **on(base), **{"training.method": method, "training.per_device_batch_size": 4,
                 "data.validation_split": 0, "training.num_train_epochs": 2}, **(own if method == "grpo" else {}))  # fmt: skip
    planned = plan(cfg)
    result = train(cfg)
    assert planned.batches.steps == result.steps
    shown = "answers, as many" if method == "grpo" else "The pass of the reference"
    assert any(shown in note for note in planned.notes)
    assert planned.operations.again > 0


def test_attention_of_a_gpu_is_planned_here(tmp_path: Path) -> None:
    "flash_attention_2, whose package is not needed for that: packed rows take no masks, as they do with PyTorch's own attention."
    recipes = [recipe(tmp_path, ROWS, **{"model.attn_implementation": a, "model.device": "auto"}) for a in ("flash_attention_2", "sdpa")]
    plans = [plan(cfg, device="H100") for cfg in recipes]
    assert plans[0].batches == plans[1].batches
    assert plans[0].batches.masked
    assert plans[0].memory.activations < plans[1].memory.activations


def test_a_stream_is_planned_from_its_steps(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, ROWS, **{"data.streaming": True, "training.max_steps": 7, "training.per_device_batch_size": 4})
    found = plan(cfg).batches
    assert (found.rows, found.steps, found.tokens) == (None, 7, 7 * 4 * 64)


def test_what_does_not_fit_gets_changes_that_do(tmp_path: Path) -> None:
    "A batch that is far too large for a small GPU; each change is judged by its own trace."
    cfg = recipe(tmp_path, ROWS, **{"model.preset": "qwen3-0.6b", "data.max_seq_length": 2048, "training.max_steps": 10,
                 "data.streaming": True, "training.per_device_batch_size": 32, "model.max_position_embeddings": 2048,
                 "training.precision": "auto"})  # fmt: skip
    found = plan(cfg, device="L4")
    assert found.chosen.device.name == "L4"
    assert not found.chosen.fits
    assert found.chosen.change
    assert found.chosen.change.peak <= 24e9 < found.chosen.peak
    settings = [c.settings for c in found.changes]
    assert ("training.per_device_batch_size=1", "training.gradient_accumulation_steps=32") in settings
    assert ("training.gradient_checkpointing=true",) in settings
    changed = load_config(None, [*found.chosen.change.settings], env={})  # they can be written as they are
    assert changed.training.per_device_batch_size * changed.training.gradient_accumulation_steps == 32
    assert found.to_dict()["chosen"]["fits"] is False
    assert math.isfinite(found.flops)


@pytest.mark.parametrize(
    ("changes", "device", "error", "message"),
    [
        ({}, "H1000", ConfigError, "Did you mean H100"),
        ({"data.train": "[]"}, None, ConfigError, "data.train is empty"),
        ({"data.train": "nowhere.jsonl"}, None, DataError, "nowhere.jsonl"),
        ({"training.fused_loss": "liger"}, None, ConfigError, r"run on CUDA, and this run is on cpu.*device H100"),
        ({"training.precision": "fp16", "model.device": "auto"}, None, ConfigError, r"CPUs do not train in.*device H100"),
        ({"training.method": "dpo", "training.fused_loss": "chunked"}, "H100", ConfigError, r"dpo has a loss of its own: use 'auto'\.$"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do some of it")
def test_mistakes(tmp_path: Path, changes: dict[str, object], device: str | None, error: type[Exception], message: str) -> None:
    rows = sums() if changes.get("training.method") == "dpo" else ROWS
    with pytest.raises(error, match=message):
        plan(recipe(tmp_path, rows, **changes), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can train it")
@pytest.mark.parametrize(("setting", "reason"), [
    ("training.fused_loss=liger", "run on CUDA"), ("training.precision=fp16", "CPUs do not train")])
def test_what_this_machine_cannot_train_is_planned_for_another(tmp_path: Path, setting: str, reason: str) -> None:
    "The named GPU has its figures, and the machine at hand has none, but a reason."
    name, value = setting.split("=")
    found = plan(recipe(tmp_path, ROWS, **{name: value, "model.device": "auto"}), device="L4")
    assert found.chosen.device.name == "L4"
    assert found.chosen.fits
    assert not any(e.device.measured for e in found.devices)
    assert any("This machine cannot train it" in note and reason in note for note in found.notes)


def test_a_base_in_a_format_of_another_library(tmp_path: Path) -> None:
    "Refused by the plan, the training and whoever loads it, with a way out."
    base = make_bot(tmp_path, "packed")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (base / "config.json").write_text(json.dumps(config))
    cfg = recipe(tmp_path, sums(), **(on(base) | {"training.method": "lora"}))
    for run in (plan, train):
        with pytest.raises(ConfigError, match=r"packed cannot be trained on\. Its weights are saved in gptq.*model\.quantization=nf4"):
            run(cfg)
    with pytest.raises(BotError, match=r"(?s)Cannot load the weights of .*packed: .*serving\.backend=vllm"):  # the library is not there
        _ = load_bot(base, device="cpu").model
