"""The vLLM backend against plain transformers, and through our API; `make test-vllm` runs it where vLLM is installed."""

import asyncio
import dataclasses
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import aclosing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from tiny_bots import make_bot

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # not to one core, where other tests run too
pytest.importorskip("vllm", reason="vLLM is not installed here; 'make test-vllm' builds an environment that has it")

from llmbot.core.adapters import attach_adapter, merge_bot
from llmbot.core.bot import Manifest
from llmbot.core.config import Config, LoraConfig, ModelConfig, ServingConfig
from llmbot.core.errors import BotError, ConfigError, MissingExtraError, ServingError
from llmbot.core.model_manager import LoadedBot, load_bot, save_bot
from llmbot.serving.api_server import running_server
from llmbot.serving.backends import EngineDeadError, register_backend
from llmbot.serving.parity import check_parity
from llmbot.serving.sampling_params import Chunk, Constraint, GenerationRequest, RequestError, SamplingParams
from llmbot.serving.vllm_backend import VllmBackend

pytestmark = pytest.mark.server
ENGINE = {"enforce_eager": True, "kv_cache_gb": 0.25, "block_size": 32, "max_num_seqs": 8}
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]
PROMPTS = ["Grüße, 世界!", "What is 12 + 30? It is", "Once", "Once upon a time there was a bot. " * 8]


class Watched(VllmBackend):
    "The backend itself, which the tests can reach while the API runs it."

    live: "list[tuple[Watched, asyncio.AbstractEventLoop]]" = []

    async def start(self) -> None:
        await super().start()
        self.live.append((self, asyncio.get_running_loop()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A base of random weights, two adapters on it, and the first of them merged into it."
    folder = tmp_path_factory.mktemp("bots")
    base = make_bot(folder, "base", 5, head_dim=32)
    for seed, name in enumerate(["terse", "formal", "served"], 1):
        bot = load_bot(base, device="cpu")
        model = attach_adapter(bot.model, LoraConfig(rank=4), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for weight_name, weight in model.named_parameters():
            if "lora_B" in weight_name:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.3
        save_bot(folder / name, model, bot.tokenizer, Manifest(name=name, parent=str(base)))
    merge_bot(folder / "terse", folder / "merged", tolerance=1e-2)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    "One engine for nearly all tests: the base, with room for adapters, behind the API."
    register_backend("vllm")(Watched)
    serving = ServingConfig(models=[str(folder / "base")], adapters=[str(folder / "served")], backend="vllm", port=0, request_timeout_s=300)
    try:
        with running_server(Config(model=ModelConfig(device="cpu", dtype="float32"), serving=serving, engine=ENGINE), grace_s=5) as url:
            yield url
    finally:
        Watched.live.clear()
        register_backend("vllm")(VllmBackend)


@pytest.fixture
def backend(url: str) -> Watched:
    return Watched.live[0][0]


def run(work: Coroutine[Any, Any, Any], seconds: float = 240) -> Any:
    "Do something in the event loop of the running engine."
    return asyncio.run_coroutine_threadsafe(work, Watched.live[0][1]).result(seconds)


def asked(bot: Any, prompt: str, adapter: str | None = None, **params: Any) -> GenerationRequest:
    given = SamplingParams(**{"temperature": 0, "max_new_tokens": 24, **params})
    return GenerationRequest(tuple(bot.chat.tokenizer(prompt).input_ids), given, f"{prompt[:8]}-{adapter}", True, adapter)


async def read(backend: VllmBackend, request: GenerationRequest) -> list[Chunk]:
    async with aclosing(backend.generate(request)) as stream:
        return [chunk async for chunk in stream]


def tokens(chunks: Sequence[Chunk]) -> list[int]:
    return [i for chunk in chunks for i in chunk.token_ids]


def text(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def greedy(bot: LoadedBot, prompt: Sequence[int], count: int) -> list[int]:
    "The oracle: transformers, one whole forward pass for each token, without a cache."
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(bot.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in bot.chat.stop_token_ids:
                break
    return ids[len(prompt) :]


def test_base_and_live_adapters_give_the_tokens_of_transformers(folder: Path, backend: Watched) -> None:
    "All at once, of all lengths, with and without adapter: each answer is what it is alone."

    async def main() -> list[list[Chunk]]:
        for name in ("terse", "formal"):
            await backend.load_adapter(name, str(folder / name))
        return await asyncio.gather(*(read(backend, request) for request in requests))

    cases = [(prompt, name) for name in (None, "terse", "formal") for prompt in PROMPTS]
    requests = [asked(backend, prompt, name) for prompt, name in cases]
    found = run(main())
    bots = {name: load_bot(folder / (name or "base"), device="cpu") for name in (None, "terse", "formal")}
    expected = [greedy(bots[name], request.prompt_ids, 24) for (_, name), request in zip(cases, requests, strict=True)]
    assert [tokens(chunks) for chunks in found] == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)  # the adapters do something
    for chunks, answer in zip(found, expected, strict=True):
        assert chunks[-1].finish_reason == ("stop" if answer[-1] in backend.chat.stop_token_ids else "length")
        assert chunks[-1].completion_tokens == len(answer)

    async def unload() -> None:
        for name in ("terse", "formal"):
            await backend.unload_adapter(name)

    run(unload())
    with pytest.raises(RequestError, match="no adapter 'terse'"):
        run(read(backend, asked(backend, "Once", "terse")))
    with pytest.raises(ServingError, match="no adapter 'terse'"):
        run(backend.unload_adapter("terse"))


def test_an_adapter_is_kept_until_its_last_request_has_ended(folder: Path, backend: Watched) -> None:
    async def main() -> tuple[list[Chunk], bool]:
        await backend.load_adapter("formal", str(folder / "formal"))
        with pytest.raises(ServingError, match="already"):
            await backend.load_adapter("formal", str(folder / "terse"))
        stream = backend.generate(asked(backend, "Once", "formal", max_new_tokens=60))
        first = await anext(stream)
        unloading = asyncio.create_task(backend.unload_adapter("formal"))
        rest = [chunk async for chunk in stream]
        early = unloading.done()
        await unloading
        return [first, *rest], early

    chunks, early = run(main())
    bot = load_bot(folder / "formal", device="cpu")
    assert tokens(chunks) == greedy(bot, asked(bot, "Once").prompt_ids, 60)
    assert not early


def test_what_is_no_adapter_of_this_base_is_refused(folder: Path, backend: Watched, tmp_path: Path) -> None:
    with pytest.raises(BotError, match="whole bot"):
        run(backend.load_adapter("x", str(folder / "merged")))
    other = make_bot(tmp_path, "other", 9, head_dim=32)
    bot = load_bot(other, device="cpu")
    save_bot(tmp_path / "stray", attach_adapter(bot.model, LoraConfig(rank=4)), bot.tokenizer, Manifest(name="stray", parent=str(other)))
    with pytest.raises(BotError, match="adapter of .*other"):
        run(backend.load_adapter("x", str(tmp_path / "stray")))


def test_cancelling_frees_the_engine(backend: Watched) -> None:
    "The engine can clear its cache only when no request holds a block of it."

    async def main() -> None:
        stream = backend.generate(asked(backend, "Once", ignore_eos=True, max_new_tokens=900))
        await anext(stream)
        reader = asyncio.create_task(read(backend, asked(backend, "What", ignore_eos=True, max_new_tokens=900)))
        while backend.load().running < 2:
            await asyncio.sleep(0.002)
        assert not await backend._engine.reset_prefix_cache()
        await stream.aclose()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert backend.load().running == backend.load().waiting == backend.load().kv_tokens == 0
        for _ in range(500):  # the engine hears of it in its next step
            if await backend._engine.reset_prefix_cache():
                return
        raise AssertionError("the engine still holds blocks")

    run(main())


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_stop_strings_end_an_answer_wherever_token_borders_lie(backend: Watched, prompt: str) -> None:
    whole = text(run(read(backend, asked(backend, prompt, ignore_eos=True))))
    for at in range(2, len(whole) - 3, 3):
        stop = whole[at : at + 3]
        if "\ufffd" in stop:
            continue
        chunks = run(read(backend, asked(backend, prompt, ignore_eos=True, stop=(stop,))))
        assert (text(chunks), chunks[-1].finish_reason) == (whole[: whole.find(stop)], "stop")


def test_text_is_that_of_all_tokens(backend: Watched) -> None:
    for seed in range(4):
        request = asked(backend, "Grüße", temperature=1.5, top_p=1.0, seed=seed, max_new_tokens=80)
        ids = tokens(chunks := run(read(backend, request)))
        context = list(request.prompt_ids[-16:])
        assert text(chunks) == backend.chat.decode(context + ids)[len(backend.chat.decode(context)) :]


def test_a_seed_gives_the_same_answer_whatever_else_runs(backend: Watched) -> None:
    async def main() -> list[list[Chunk]]:
        request = asked(backend, "Once", temperature=1.2, seed=11)
        others = [asked(backend, "What " * k, temperature=1.2, seed=k) for k in range(1, 4)]
        alone = await read(backend, request)
        together = await asyncio.gather(*(read(backend, r) for r in [*others, request]))
        minus = [await read(backend, asked(backend, "Once", temperature=1.2, seed=-1)) for _ in range(2)]
        free = [await read(backend, asked(backend, "Once", temperature=1.2)) for _ in range(2)]
        return [alone, together[-1], *minus, *free]

    alone, together, minus, again, free, other = map(tokens, run(main()))
    assert alone == together
    assert minus == again != alone
    assert free != other


def test_logprobs_are_those_of_the_model(folder: Path, backend: Watched) -> None:
    "Before temperature and penalties, for the answer and for the prompt; a closed formula is the oracle."
    request = asked(backend, PROMPTS[1], temperature=0.5, frequency_penalty=1.0, seed=3, logprobs=4, prompt_logprobs=2)
    chunks = run(read(backend, request))
    ids = [*request.prompt_ids, *tokens(chunks)]
    with torch.inference_mode():
        model = load_bot(folder / "base", device="cpu").model
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [*chunks[0].prompt_logprobs, *(entry for chunk in chunks for entry in chunk.logprobs)]
    assert found[0] is None
    assert len(found) == len(ids)
    for at, entry in enumerate(found[1:], 1):
        assert entry is not None
        assert entry.token_id == ids[at]
        assert entry.logprob == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-4)
        values = expected[at - 1].topk(4 if at >= len(request.prompt_ids) else 2).values
        assert [p for _, p in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert all(float(expected[at - 1, i]) == pytest.approx(p, abs=1e-4) for i, p in entry.top)
    nothing = run(read(backend, asked(backend, "Once", logprobs=0)))
    assert all(entry.top == () for chunk in nothing for entry in chunk.logprobs)


def test_prompts_are_read_while_adapters_answer(folder: Path, backend: Watched) -> None:
    "Requests of several adapters, some of which ask how likely the prompt is, all at once; transformers is the oracle."
    cases = [(prompt, name, reads) for prompt in PROMPTS[:3] for name in (None, "terse", "formal") for reads in (None, 1)]
    requests = [asked(backend, prompt, name, prompt_logprobs=reads, max_new_tokens=6) for prompt, name, reads in cases]

    async def main() -> list[list[Chunk]]:
        for name in ("terse", "formal"):
            await backend.load_adapter(name, str(folder / name))
        found = await asyncio.gather(*(read(backend, dataclasses.replace(r, request_id=f"r{i}")) for i, r in enumerate(requests)))
        for name in ("terse", "formal"):
            await backend.unload_adapter(name)
        return found

    bots = {name: load_bot(folder / (name or "base"), device="cpu") for name in (None, "terse", "formal")}
    for (_, name, reads), request, chunks in zip(cases, requests, run(main()), strict=True):
        assert tokens(chunks) == greedy(bots[name], request.prompt_ids, 6)
        ids, told = torch.tensor(request.prompt_ids), [entry.logprob for entry in chunks[0].prompt_logprobs if entry]
        with torch.inference_mode():
            scores = bots[name].model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = scores.gather(1, ids[1:, None])[:, 0].tolist() if reads else []
        assert told == pytest.approx(expected, abs=1e-4)


def test_a_shared_beginning_is_computed_once(backend: Watched) -> None:
    prompt = "There was a bot. " * 12
    first = run(read(backend, asked(backend, prompt)))
    again = run(read(backend, asked(backend, prompt + "Once")))
    assert first[-1].cached_tokens == 0
    assert again[-1].cached_tokens >= 32
    assert again[-1].cached_tokens % 32 == 0


def test_penalties_and_bias_change_the_scores(backend: Watched) -> None:
    plain = tokens(run(read(backend, asked(backend, "Once", ignore_eos=True))))
    banned = tokens(run(read(backend, asked(backend, "Once", ignore_eos=True, logit_bias=((plain[0], -100.0),)))))
    forced = tokens(run(read(backend, asked(backend, "Once", ignore_eos=True, logit_bias=((7, 100.0),)))))
    assert plain[0] not in banned
    assert set(forced) == {7}
    for name, value in [("repetition_penalty", 50.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0)]:
        answer = tokens(run(read(backend, asked(backend, "Once", ignore_eos=True, logit_bias=((7, 3.0), (8, 3.0)), **{name: value}))))
        bare = tokens(run(read(backend, asked(backend, "Once", ignore_eos=True, logit_bias=((7, 3.0), (8, 3.0))))))
        assert len(set(answer)) > len(set(bare)), name
    narrow = [tokens(run(read(backend, asked(backend, "Once", temperature=2.0, **{name: value})))) for name, value in
              [("top_k", 1), ("top_p", 1e-6), ("min_p", 1.0)]]  # fmt: skip
    best = tokens(run(read(backend, asked(backend, "Once"))))
    assert narrow == [best] * 3


def test_a_schema_is_kept(backend: Watched) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
              "required": ["sum", "ok"], "additionalProperties": False}  # fmt: skip
    for seed in range(3):
        form = Constraint("json_schema", json.dumps(schema))
        chunks = run(read(backend, asked(backend, "What", temperature=1.0, seed=seed, max_new_tokens=120, constraint=form)))
        answer = json.loads(text(chunks))
        assert chunks[-1].finish_reason == "stop"
        assert set(answer) == {"sum", "ok"}
        assert 0 <= answer["sum"] <= 99
        assert answer["ok"] in (True, False)
    chunks = run(read(backend, asked(backend, "What", temperature=1.0, seed=1, constraint=Constraint("regex", "(ab|cd){2}"))))
    assert re.fullmatch("(ab|cd){2}", text(chunks))
    with pytest.raises(RequestError):
        run(read(backend, asked(backend, "What", constraint=Constraint("regex", "(a"))))


def test_a_bot_that_must_call_calls(url: str) -> None:
    "Random weights, and calls that follow their schemas; whole and streamed they are the same."
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    schemas: dict[str, Any] = {"add": {"a": {"enum": [1, 22]}}, "now": {}}
    tools: list[Any] = [{"type": "function", "function": {"name": name, "strict": True, "parameters": {
        "type": "object", "properties": given, "required": [*given], "additionalProperties": False}}} for name, given in schemas.items()]
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        for seed in range(3):
            ask: dict[str, Any] = {"model": "base", "messages": QUESTION, "tools": tools, "tool_choice": choice, "seed": seed,
                                   "temperature": 1.5, "max_tokens": 300, "parallel_tool_calls": False}  # fmt: skip
            answer = client.chat.completions.create(**ask).choices[0]
            assert answer.finish_reason == "tool_calls"
            [call] = answer.message.tool_calls or []
            given = json.loads(call.function.arguments)
            assert given == {} if call.function.name == "now" else given in ({"a": 1}, {"a": 22})
            assert choice == "required" or call.function.name == "add"
            deltas = [d for c in client.chat.completions.create(**ask, stream=True) for d in c.choices[0].delta.tool_calls or []]
            assert "".join(d.function.arguments or "" for d in deltas) == call.function.arguments


def test_requests_that_cannot_be_are_refused_and_leave_the_engine_alone(backend: Watched) -> None:
    with pytest.raises(RequestError):
        run(read(backend, GenerationRequest((10**6,), SamplingParams(temperature=0), "no such token")))
    prompt = tuple(range(10, 20)) * (backend.context_length // 10 + 1)
    full = GenerationRequest(prompt[: backend.context_length - 3], SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True), "full")
    assert len(tokens(run(read(backend, full)))) == 3
    with pytest.raises(RequestError, match="at most 2 new tokens"):
        run(read(backend, GenerationRequest(prompt[: backend.context_length - 2], full.params, "too long")))
    assert tokens(run(read(backend, asked(backend, "Once"))))


def test_the_openai_client_streams_what_it_gets_whole(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    given: dict[str, Any] = {"model": "base", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**given)
    stream = client.chat.completions.create(**given, stream=True)
    pieces = [choice.delta.content or "" for event in stream for choice in event.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 5


# What needs an engine of its own


@pytest.fixture(scope="module")
def forked(url: str) -> Iterator[None]:
    """Engines and their workers are forked from one process that has loaded vLLM, which takes each of them ten seconds.

    That of `url` starts as any does, and has set the environment of those that come after it.
    """
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        context.set_forkserver_preload(["preloaded_vllm"])
        multiprocessing.forkserver.ensure_running()
        patch.setattr("vllm.v1.engine.utils.get_mp_context", lambda: context)
        yield


def settings(models: str = "", **engine: Any) -> Config:
    serving = ServingConfig(models=[models] if models else [], backend="vllm")
    return Config(model=ModelConfig(device="cpu", dtype="float32"), serving=serving, engine={**ENGINE, **engine})


@pytest.mark.usefixtures("forked")
def test_the_merged_bot_gives_the_same_and_a_dead_engine_an_error(folder: Path) -> None:
    "Parity of merged weights; then the engine's process is killed while two requests run, and every reader gets an error."

    async def main() -> None:
        backend = VllmBackend(str(folder / "merged"), settings())
        before = {p.pid for p in psutil.Process().children(recursive=True)}
        await backend.start()
        bot = load_bot(folder / "merged", device="cpu")
        for prompt in PROMPTS:
            assert tokens(await read(backend, request := asked(backend, prompt))) == greedy(bot, request.prompt_ids, 24)
        with pytest.raises(ServingError, match="enable_lora"):
            await backend.load_adapter("terse", str(folder / "terse"))
        long = [asked(backend, prompt, ignore_eos=True, max_new_tokens=900) for prompt in PROMPTS[:2]]
        readers = [asyncio.create_task(read(backend, request)) for request in long]
        while backend.load().running < 2:
            await asyncio.sleep(0.002)
        new = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        for process in new:
            if "multiprocessing.spawn" in " ".join(process.cmdline()) or "EngineCore" in process.name():
                os.kill(process.pid, signal.SIGKILL)
        for result in await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), 60):
            assert isinstance(result, EngineDeadError)
        with pytest.raises(EngineDeadError):
            await read(backend, long[0])
        await backend.stop()

    asyncio.run(main())


@pytest.mark.parametrize(("engine", "message"), [
    ({"max_model_len": 10**6}, "did not start with base.*max_model_len"),
    ({"args": {"max_model_length": 5}}, "no such engine argument. Did you mean 'max_model_len'"),
    ({"args": {"tokenizer": "x"}}, "decided by the bot"),
    ({"args": {"kv_cache_dtype": "decimal"}}, "did not start with base.*cache_dtype"),
])  # fmt: skip
def test_a_start_that_fails_says_why_in_one_error(folder: Path, engine: dict[str, Any], message: str) -> None:
    with pytest.raises((ServingError, ConfigError), match=message):
        asyncio.run(VllmBackend(str(folder / "base"), settings(**engine)).start())


def test_what_vllm_logs_is_not_in_what_a_command_prints(folder: Path) -> None:
    command = [sys.executable, "-m", "llmbot.app.cli", "serve", str(folder / "base"), "--json", "--port", "0", "serving.backend=vllm",
               "model.dtype=float32", *(f"engine.{name}={json.dumps(value)}" for name, value in ENGINE.items())]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(300, server.kill)
    watchdog.start()
    assert server.stdout is not None
    first = server.stdout.readline()
    server.terminate()
    rest, logged = server.communicate(timeout=60)
    watchdog.cancel()
    assert "WARNING" in logged
    assert list(json.loads(first)) == ["url", "models"]
    assert not rest


def test_a_head_that_the_cpu_kernels_lack_is_refused_before_the_start(tmp_path: Path) -> None:
    bot = make_bot(tmp_path, "narrow", 1, head_dim=16)
    with pytest.raises(ServingError, match="width 16"):
        asyncio.run(VllmBackend(str(bot), settings()).start())


@pytest.mark.parametrize(("saved", "error", "message"), [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ServingError, "saved in nf4, and the vLLM that is installed reads no weights"),
    pytest.param({"quant_method": "torchao", "quant_type": {}}, MissingExtraError, r"llmbot\[torchao\]",
                 marks=pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed beside vLLM")),
])  # fmt: skip
def test_saved_formats_that_vllm_does_not_read_here_are_refused_before_the_start(
    tmp_path: Path, saved: dict[str, Any], error: type[Exception], message: str
) -> None:
    bot = make_bot(tmp_path, "packed", 1, head_dim=32)
    config = json.loads((bot / "config.json").read_text())
    (bot / "config.json").write_text(json.dumps(config | {"quantization_config": saved}))
    with pytest.raises(error, match=message):
        asyncio.run(VllmBackend(str(bot), settings()).start())


@pytest.mark.parametrize("name", ["base", "merged", "terse"])
@pytest.mark.usefixtures("forked")
def test_three_engines_say_the_same(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "As `llmbot verify` compares them: a base, an adapter merged into it, and the adapter beside its base."
    from vllm.v1.engine.async_llm import AsyncLLM

    ended: list[weakref.ref[AsyncLLM]] = []
    end = AsyncLLM.shutdown

    def noted(engine: AsyncLLM, timeout: float | None = None) -> None:
        ended.append(weakref.ref(engine))
        end(engine, timeout)

    monkeypatch.setattr(AsyncLLM, "shutdown", noted)
    report = check_parity(str(folder / name), ["torch", "onnx", "vllm"], prompts=6, max_new_tokens=24, device="cpu")
    assert ended
    assert [engine() for engine in ended] == [None] * len(ended)  # one that is left ends with the process, and with a traceback
    assert report.passed
    assert [side.name for side in report.sides] == ["torch, adapter beside its base"] * (name == "terse") + ["onnx fp32", "vllm"]
    for side in report.sides:
        assert side.equal + len({d.prompt for d in side.differences}) == side.prompts == 6
        assert side.tokens > 24
        assert side.largest_logprob_difference < 1e-3
