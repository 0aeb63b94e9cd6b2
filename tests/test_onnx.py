"""Exports for ONNX Runtime and the backend that runs them; PyTorch in fp32 is the oracle."""

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_bots import make_bot
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from llmbot.core.adapters import attach_adapter
from llmbot.core.bot import Manifest, bot_digest, read_manifest, verify_bot
from llmbot.core.config import Config, ServingConfig
from llmbot.core.errors import BotError, ConfigError, ServingError
from llmbot.core.exports import find_parent
from llmbot.core.model_manager import LoadedBot, load_bot, save_bot
from llmbot.core.training_config import LoraConfig
from llmbot.serving.backends import LoadReporter, create_backend
from llmbot.serving.batcher import Task
from llmbot.serving.decoding import decode_steps
from llmbot.serving.engine_settings import OnnxSettings
from llmbot.serving.onnx_backend import OnnxBackend, OnnxRunner, load_onnx
from llmbot.serving.onnx_export import Tolerance, available_cores, export_onnx
from llmbot.serving.onnx_rows import Caches
from llmbot.serving.sampler import BatchSampler
from llmbot.serving.sampling_params import Chunk, Constraint, GenerationRequest, RequestError, SamplingParams

ANY = Tolerance(float("inf"), 0, float("inf"))
GREEDY: dict[str, Any] = {"temperature": 0, "top_p": 1}
GRAPHS: dict[bool, Caches] = {}  # read once


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a tiny Qwen3, its fp32 export, a Llama and a Gemma 3."
    place = tmp_path_factory.mktemp("bots")
    qwen = make_bot(place, "qwen", seed=5)
    export_onnx(qwen, place / "export", "fp32")
    tokenizer, shape = load_bot(qwen).tokenizer, {
        "vocab_size": 352, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    for name, config in (("llama", LlamaConfig(**shape)), ("gemma", Gemma3TextConfig(**shape))):
        torch.manual_seed(0)
        save_bot(place / name, AutoModelForCausalLM.from_config(config), tokenizer)
    return place


def backend_of(path: Path, **engine: Any) -> OnnxBackend:
    backend = create_backend("onnx", str(path), Config(serving=ServingConfig(backend="onnx"), engine=engine))
    assert isinstance(backend, OnnxBackend)
    return backend


def prompt(length: int, start: int = 20) -> tuple[int, ...]:
    return tuple(20 + (start + 7 * i) % 300 for i in range(length))


async def read(backend: OnnxBackend, ids: tuple[int, ...], **params: Any) -> list[Chunk]:
    async with aclosing(backend.generate(GenerationRequest(ids, SamplingParams(**params), str(ids)))) as stream:
        return [chunk async for chunk in stream]


def tokens(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


@functools.cache
def loaded_once(bot: Path) -> LoadedBot:
    return load_bot(bot, device="cpu", dtype="float32")


def by_torch(bot: Path, ids: tuple[int, ...], **params: Any) -> list[Chunk]:
    loaded = loaded_once(bot)
    return list(decode_steps(loaded.model, GenerationRequest(ids, SamplingParams(**params), "torch"), loaded.chat))


def same_as_torch(bot: Path, export: Path, lengths: tuple[int, ...], new: int = 24, **engine: Any) -> None:
    "Answers of several lengths, started one after another and running together, are PyTorch's alone."
    params = {**GREEDY, "ignore_eos": True}
    asked = [(prompt(n, n), new + 3 * i) for i, n in enumerate(lengths)]

    async def main() -> list[list[Chunk]]:
        backend = backend_of(export, **engine)
        await backend.start()
        running = []
        for ids, count in asked:
            running.append(asyncio.create_task(read(backend, ids, max_new_tokens=count, **params)))
            await asyncio.sleep(0)
        answers = await asyncio.gather(*running)
        assert backend.load().running == backend.load().kv_tokens == 0
        await backend.stop()
        return answers

    for (ids, count), found in zip(asked, asyncio.run(main()), strict=True):
        expected = by_torch(bot, ids, max_new_tokens=count, **params)
        assert tokens(found) == tokens(expected)
        assert "".join(c.text for c in found) == "".join(c.text for c in expected)


ALONE: dict[tuple[tuple[int, ...], int, int | None], list[int]] = {}  # answers given alone, kept: the same are asked for again and again
ASKED = st.tuples(
    st.integers(0, 2),  # which of three prompts
    st.integers(1, 40),  # its length
    st.sampled_from([None, None, None, 3]),  # seed; None: greedy
    st.integers(1, 30),  # tokens of the answer
    st.integers(0, 6),  # steps after the one before
    st.sampled_from([None, None, None, 2, 9]),  # steps after which it is cancelled
)


def alone(home: Path, ids: tuple[int, ...], length: int, seed: int | None) -> list[int]:
    "What PyTorch answers, whose loop draws by a seed as the sampler of every engine does."
    if (key := (ids, length, seed)) not in ALONE:
        params = GREEDY if seed is None else {"temperature": 1.1, "top_p": 1, "seed": seed}
        ALONE[key] = tokens(by_torch(home / "qwen", ids, max_new_tokens=length, ignore_eos=True, **params))
    return ALONE[key]


@pytest.mark.parametrize("batching", [True, False])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(ASKED, min_size=1, max_size=7), chunk=st.sampled_from([1, 7, 64]), room=st.integers(71, 300))
def test_every_answer_is_what_it_is_alone(
    home: Path, batching: bool, asked: list[tuple[int, int, int | None, int, int, int | None]], chunk: int, room: int
) -> None:
    "Answers join and leave: any arrival times, lengths, pieces of prompts, cancellations and amounts of memory."
    chat, size = loaded_once(home / "qwen").chat, loaded_once(home / "qwen").config.get_text_config().vocab_size
    if (caches := GRAPHS.get(batching)) is None:
        caches = GRAPHS[batching] = load_onnx(str(home / "export"), OnnxSettings(batching=batching), room)
    caches.capacity = room
    runner = OnnxRunner(caches, BatchSampler(size, "cpu"), chunk)
    due, clock = list[tuple[int, int | None, Task]](), 0
    for start, width, seed, length, wait, leave in asked:
        clock += wait
        shift = {} if seed is None else {"temperature": 1.1, "seed": seed}
        params = SamplingParams(**{**GREEDY, **shift, "max_new_tokens": length, "ignore_eos": True})
        due.append((clock, leave, Task(GenerationRequest(prompt(width, 30 * start), params, "r"), chat)))
    found: dict[Task, list[int]] = {task: [] for _, _, task in due}
    for now in range(10_000):
        runner.waiting.extend(task for arrival, _, task in due if arrival == now)
        for arrival, leave, task in due:
            task.cancelled |= leave is not None and now >= arrival + leave
        for task, result in runner.step():
            assert isinstance(result, Chunk), result
            found[task] += result.token_ids
        assert not any(task.cancelled for task in runner.running)
        assert len(caches) == len(runner.running)
        if now > clock and not runner.running and not runner.waiting:
            break
    for _, leave, task in due:
        expected = alone(home, task.request.prompt_ids, task.request.params.max_new_tokens, task.request.params.seed)
        assert found[task] == (expected if leave is None else expected[: len(found[task])])
    assert caches.held == len(caches) == 0


@pytest.mark.parametrize("batching", [True, False])
def test_greedy_answers_are_those_of_torch(home: Path, batching: bool) -> None:
    same_as_torch(home / "qwen", home / "export", (1, 5, 40, 100), prefill_chunk=16, batching=batching)


def test_caches_are_bounded_and_requests_wait_for_room(home: Path) -> None:
    same_as_torch(home / "qwen", home / "export", (9, 30, 4), kv_cache_tokens=70)

    async def main() -> None:
        backend = backend_of(home / "export", kv_cache_tokens=70)
        await backend.start()
        with pytest.raises(RequestError, match="kv_cache_tokens"):
            await read(backend, prompt(60), max_new_tokens=20)
        await backend.stop()

    asyncio.run(main())


def test_llama_and_a_merged_adapter(home: Path) -> None:
    export_onnx(home / "llama", home / "llama-export", "fp32")
    same_as_torch(home / "llama", home / "llama-export", (3, 21))
    loaded = load_bot(home / "qwen", device="cpu")
    model = attach_adapter(loaded.model, LoraConfig(rank=4), seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    parent = Manifest(name="adapter", parent=str(home / "qwen"), parent_digest=bot_digest(home / "qwen"))
    save_bot(home / "adapter", model, loaded.tokenizer, parent)
    export_onnx(home / "adapter", home / "adapter-export", "fp32")
    same_as_torch(home / "adapter", home / "adapter-export", (3, 21))
    made = read_manifest(home / "adapter-export")
    assert made is not None
    assert made.adapter["merged"] is True
    params = {**GREEDY, "max_new_tokens": 24, "ignore_eos": True}
    assert tokens(by_torch(home / "qwen", prompt(21), **params)) != tokens(by_torch(home / "adapter", prompt(21), **params))


def test_parameters_mean_what_they_mean_with_torch(home: Path) -> None:
    "Everything is drawn by the sampler of the torch backend, from logits that differ in the sixth digit."
    cases: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 3, "top_k": 40}, {**GREEDY, "presence_penalty": 1.5, "frequency_penalty": 1.0},
        {**GREEDY, "repetition_penalty": 1.3}, {**GREEDY, "logit_bias": ((30, 100.0),)}, {**GREEDY, "stop": ("a", "e", " ")},
        {"temperature": 1.0, "seed": 1, "constraint": Constraint("regex", "[0-9]{4}")},
    ]  # fmt: skip

    async def main() -> tuple[list[list[Chunk]], list[Chunk]]:
        backend = backend_of(home / "export", prefill_chunk=8)
        await backend.start()
        answers = await asyncio.gather(*(read(backend, prompt(20), max_new_tokens=20, **case) for case in cases))
        told = await read(backend, prompt(20), max_new_tokens=4, logprobs=3, prompt_logprobs=2, **GREEDY)
        await backend.stop()
        return answers, told

    answers, told = asyncio.run(main())
    for case, found in zip(cases, answers, strict=True):
        expected = by_torch(home / "qwen", prompt(20), max_new_tokens=20, **case)
        assert (tokens(found), found[-1].finish_reason) == (tokens(expected), expected[-1].finish_reason), case
    model = load_bot(home / "qwen", device="cpu").model
    ids = [*prompt(20), *tokens(told)]
    with torch.no_grad():
        exact = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    told_of = [*told[0].prompt_logprobs, *(one for chunk in told for one in chunk.logprobs)]
    assert told_of[0] is None
    assert len(told_of) == len(ids)
    for place, one in enumerate(told_of[1:], 1):
        assert one is not None
        assert one.token_id == ids[place]
        assert one.logprob == pytest.approx(float(exact[place - 1, ids[place]]), abs=1e-3)
        assert one.top[0][1] == pytest.approx(float(exact[place - 1].max()), abs=1e-3)


def test_a_form_is_compiled_beside_the_worker(home: Path) -> None:
    "An expression that cannot be compiled is refused while the worker's thread does something else."

    async def main() -> None:
        backend, free = backend_of(home / "export"), threading.Event()
        await backend.start()
        assert backend._worker is not None
        busy = asyncio.create_task(backend._worker.call(free.wait))
        try:
            with pytest.raises(RequestError, match="unclosed"):
                await asyncio.wait_for(read(backend, prompt(3), constraint=Constraint("regex", "[a")), 30)
        finally:
            free.set()
        await busy
        await backend.stop()

    asyncio.run(main())


def test_closing_a_stream_frees_its_place_within_one_step(home: Path) -> None:
    async def main() -> None:
        backend = backend_of(home / "export")
        await backend.start()
        runner = backend._runner
        assert runner is not None
        assert isinstance(backend, LoadReporter)
        stream = backend.generate(GenerationRequest(prompt(5), SamplingParams(max_new_tokens=900, ignore_eos=True), "left"))
        await anext(stream)
        assert backend.load().running == 1
        assert backend.load().kv_tokens == 905
        [task] = runner.running
        await stream.aclose()
        at_close = len(task.ids)
        await read(backend, prompt(5), max_new_tokens=30, **GREEDY)
        assert len(task.ids) <= at_close + 1
        assert not len(runner.caches)
        assert backend.load().kv_tokens == 0
        await backend.stop()

    asyncio.run(main())


def test_a_failure_and_a_stop_reach_their_readers(home: Path) -> None:
    async def main() -> None:
        backend = backend_of(home / "export")
        with pytest.raises(ServingError, match="not started"):
            await read(backend, prompt(5), max_new_tokens=3)
        await backend.start()
        assert backend._runner is not None
        long = asyncio.create_task(read(backend, prompt(5), max_new_tokens=900, ignore_eos=True))
        bad = asyncio.create_task(read(backend, prompt(6), max_new_tokens=900, ignore_eos=True))
        while len(backend._runner.caches) < 2:
            await asyncio.sleep(0)
        victim = next(task for task in backend._runner.running if task.prompt == 6)
        victim.ids.append(10**6)  # the graph has no such row in its embedding
        with pytest.raises(ServingError, match="could not go on"):
            await bad
        for wrong, params in (((5, 400), {}), ((), {}), (prompt(9), {"max_new_tokens": 10**6})):
            with pytest.raises(RequestError):
                await read(backend, wrong, **params)
        with pytest.raises(ServingError, match="no adapters"):
            await anext(backend.generate(GenerationRequest(prompt(3), SamplingParams(), "a", adapter="style")))
        assert not long.done()
        await backend.stop()
        with pytest.raises(ServingError, match="stopped"):
            await long

    asyncio.run(main())


def test_wrong_bots_and_settings_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(BotError, match="llmbot export onnx"):
        backend_of(home / "qwen")
    with pytest.raises(ConfigError, match="engine.provider"):
        create_backend("onnx", str(home / "export"), Config(model={"dtype": "bfloat16"}))  # type: ignore[arg-type]
    with pytest.raises(BotError, match="serving.backend=onnx"):
        asyncio.run(create_backend("torch", str(home / "export")).start())
    with pytest.raises(BotError, match="Gemma 3"):
        export_onnx(home / "gemma", tmp_path / "gemma", "fp32")
    with pytest.raises(BotError, match="an export already"):
        export_onnx(home / "export", tmp_path / "twice", "fp32")
    for precision, provider, why in (("bf16", "cpu", "does not load"), ("fp16", "cpu", "second token"), ("int3", "cpu", "int4")):
        with pytest.raises(ConfigError, match=why):
            export_onnx(home / "qwen", tmp_path / "no", precision, provider=provider)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BotError, match="optimum-onnx"):
        load_bot(tmp_path)


def test_the_manifest_says_what_was_measured(home: Path) -> None:
    exact, export = read_manifest(home / "export"), home / "int8"
    assert exact is not None
    assert exact.metrics["export_logit_difference"] < 1e-3
    assert exact.metrics["export_greedy_agreement"] == 1
    report = export_onnx(home / "qwen", export, "int8", tolerance=ANY, rows=[list(prompt(40))], about="one row", threads=2)
    made = read_manifest(export)
    assert made is not None
    assert made.method == "onnx-export"
    assert made.model["precision"] == "int8"
    assert verify_bot(export) == []
    assert made.metrics["export_logit_difference"] == report.logit_difference > 1e-2
    assert made.metrics["export_rows"] == "one row"
    assert made.metrics["export_positions"] == 40
    assert "onnxruntime-genai" in made.versions
    assert made.parent_digest == bot_digest(home / "qwen")
    logits = load_bot(home / "qwen", device="cpu").model(torch.tensor([prompt(40)])).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(prompt(40)[1:]))
    assert report.perplexity_pytorch == pytest.approx(float(loss.detach().exp()), rel=1e-4)
    for path, threads in ((export, 2), (home / "export", available_cores())):
        options = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
        assert options["intra_op_num_threads"] == threads
    assert Path(find_parent(export).location) == (home / "qwen").resolve()


@pytest.mark.parametrize("allowed", [Tolerance(0, 0, 99), Tolerance(99, 1.01, 99), Tolerance(99, 0, 0.5)])
def test_an_export_beyond_its_tolerance_is_not_published(home: Path, tmp_path: Path, allowed: Tolerance) -> None:
    with pytest.raises(BotError, match="Nothing was written"):
        export_onnx(home / "qwen", tmp_path / "export", "fp32", tolerance=allowed, rows=[list(prompt(12))])
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_export(home: Path, tmp_path: Path) -> None:
    "SIGKILL while the comparison runs, when all files of the export are there."
    script = (
        "import sys, time\nfrom llmbot.serving import onnx_export as m\n"
        "m.compare = lambda *_: (print('comparing', flush=True), time.sleep(60))\n"
        "m.export_onnx(sys.argv[1], sys.argv[2], 'fp32', rows=[[20, 21, 22]])\n"
    )
    command = [sys.executable, "-c", script, str(home / "qwen"), str(tmp_path / "export")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "comparing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "export").exists()
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    export_onnx(home / "qwen", tmp_path / "export", "fp32", rows=[list(prompt(12))])
    assert verify_bot(tmp_path / "export") == []


def test_a_real_model_by_the_command_line(shared: Path, tmp_path: Path) -> None:
    "stories260K: heads of 8, so its rotary embeddings stand outside the attention operator."
    source, data = shared / "models" / "stories260K", tmp_path / "rows.txt"
    data.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\n" * 30)

    def run(precision: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = ["llmbot", "export", "onnx", str(source), "--precision", precision, "-o", str(tmp_path / precision), *more]
        return subprocess.run([sys.executable, "-m", "llmbot.app.cli", *command[1:]], capture_output=True, text=True, timeout=300)

    done = run("fp32", "--json", "--data", str(data))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["logit_difference"] < 1e-3
    assert report["greedy_agreement"] == 1
    assert report["positions"] >= 512  # a row that fills the context
    assert "rows.txt" in report["rows"]
    refused = run("int4", "--tolerance", "0.001")
    assert refused.returncode == BotError.exit_code
    assert "--tolerance" in refused.stderr
    assert not (tmp_path / "int4").exists()
    small = export_onnx(source, tmp_path / "int8", "int8")
    assert 0.01 < small.logit_difference < 3
    assert small.perplexity_onnx < 1.05 * small.perplexity_pytorch

    async def tell() -> str:
        backend = backend_of(tmp_path / "fp32")
        await backend.start()
        chunks = await read(backend, (1,), max_new_tokens=60, **GREEDY)
        await backend.stop()
        return "".join(chunk.text for chunk in chunks)

    assert asyncio.run(tell()).strip().startswith("Once upon a time, there was a little girl named Lily. She loved to play")
