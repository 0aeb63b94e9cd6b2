"""The continuous batcher: every answer is what it would be alone, whatever runs beside it."""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_bots import make_bot

from llmbot.core.bot import Manifest, bot_digest
from llmbot.core.config import Config, ModelConfig
from llmbot.core.errors import ServingError
from llmbot.core.model_manager import LoadedBot, load_bot, save_bot
from llmbot.serving.adapter_switch import AdapterSwitch
from llmbot.serving.backends import EngineDeadError, create_backend
from llmbot.serving.batcher import Batcher, Task
from llmbot.serving.decoding import decode_steps, new_sampler
from llmbot.serving.kv_blocks import BLOCK, SharedBlocks, blocks_for
from llmbot.serving.packed_weights import PackedLinear, packable
from llmbot.serving.paged_cache import PagedCache, cache_shape
from llmbot.serving.sampling_params import Chunk, Constraint, GenerationRequest, RequestError, SamplingParams
from llmbot.serving.torch_backend import TorchBackend

ANSWERS: dict[tuple[tuple[int, ...], int, int | None], list[int]] = {}  # given alone, kept: the same are asked for again and again


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> LoadedBot:
    return load_bot(make_bot(tmp_path_factory.mktemp("bots"), "tiny", seed=5), device="cpu")


def alone(bot: LoadedBot, ids: tuple[int, ...], length: int, seed: int | None) -> list[int]:
    "What transformers' `generate` answers; for a seed, what the one-at-a-time loop answers."
    key = ids, length, seed
    if key not in ANSWERS and seed is None:
        prompt = torch.tensor([ids])
        out = bot.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False)
        ANSWERS[key] = out[0, len(ids) :].tolist()
    elif key not in ANSWERS:
        request = GenerationRequest(ids, SamplingParams(temperature=1.1, seed=seed, max_new_tokens=length), "r")
        ANSWERS[key] = [i for chunk in decode_steps(bot.model, request, bot.chat) for i in chunk.token_ids]
    return ANSWERS[key]


Asked = tuple[int, int, int, int | None, int, int | None]
asked = st.tuples(
    st.integers(0, 2),  # which of three beginnings
    st.integers(1, 40),  # how much of it
    st.integers(0, 9),  # what comes after it
    st.sampled_from([None, None, 3]),  # seed; None: greedy
    st.integers(0, 6),  # steps after the one before
    st.sampled_from([None, None, None, 2, 9]),  # steps after which it is cancelled
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(asked, min_size=1, max_size=7), st.sampled_from([1, 3, 16, 64]), st.integers(5, 14), *[st.booleans()] * 2, st.data())
def test_every_answer_is_what_it_is_alone(
    bot: LoadedBot, requests: Sequence[Asked], chunk: int, blocks: int, keep: bool, rounded: bool, data: st.DataObject
) -> None:
    "Any arrival times, lengths, shared beginnings, pieces of prompts, cancellations and amounts of memory; rows filled up or not."
    switch, vocab = AdapterSwitch(bot), len(bot.tokenizer)
    batcher = Batcher(SharedBlocks(blocks, keep), PagedCache(cache_shape(bot.model), blocks), new_sampler(bot.model, bot.chat), switch)
    batcher.prefill_chunk = chunk
    batcher.compiled = bot.model if rounded else None  # what stands for the model then gets the same rows, not compiled
    due: list[tuple[int, int | None, Task]] = []
    clock = 0
    for start, width, end, seed, wait, leave in requests:
        clock += wait
        ids = tuple((7 * start + 11 * i) % (vocab - 20) + 10 for i in range(width)) + (end + 10,)
        temperature, length = (0.0 if seed is None else 1.1), data.draw(st.integers(1, 30))
        params = SamplingParams(temperature=temperature, top_p=1 if seed is None else 0.95, seed=seed, max_new_tokens=length)
        due.append((clock, leave, Task(GenerationRequest(ids, params, "r"), bot.chat)))
    tokens: dict[Task, list[int]] = {task: [] for _, _, task in due}
    began: list[Task] = []
    for now in range(10_000):
        batcher.waiting.extend(task for arrival, _, task in due if arrival == now)
        for arrival, leave, task in due:
            task.cancelled |= leave is not None and now >= arrival + leave
        for task, result in batcher.step():
            assert isinstance(result, Chunk), result
            began += [task] * (result.completion_tokens == 1)
            tokens[task] += result.token_ids
        assert not any(task.cancelled for task in batcher.running)
        assert batcher.load().kv_tokens <= blocks * BLOCK
        if now > clock and not batcher.running and not batcher.waiting:
            break
    for _, leave, task in due:
        expected = alone(bot, task.request.prompt_ids, task.request.params.max_new_tokens, task.request.params.seed)
        assert tokens[task] == (expected if leave is None else expected[: len(tokens[task])])
    assert batcher.pool.available == blocks  # nothing is lost


def backend_of(path: Path, **engine: Any) -> TorchBackend:
    backend = create_backend("torch", str(path), Config(model=ModelConfig(device="cpu"), engine=engine))
    assert isinstance(backend, TorchBackend)
    return backend


async def read(backend: TorchBackend, ids: tuple[int, ...], adapter: str | None = None, **params: Any) -> list[Chunk]:
    request = GenerationRequest(ids, SamplingParams(**{"temperature": 0, "max_new_tokens": 20, **params}), "r", adapter=adapter)
    async with aclosing(backend.generate(request)) as stream:
        return [chunk async for chunk in stream]


def ids_of(chunks: Sequence[Chunk]) -> list[int]:
    return [i for chunk in chunks for i in chunk.token_ids]


def make_adapter(base: Path, folder: Path, seed: int, **more: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    bot = load_bot(base, device="cpu")
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **more)
    model = get_peft_model(bot.model, config)
    for name, weight in model.named_parameters():
        if "magnitude" in name:  # a DoRA begins as the LoRA that it has inside
            weight.data *= 1.5
    return save_bot(folder, model, bot.tokenizer, Manifest(name=folder.name, parent=str(base), parent_digest=bot_digest(base)))


def test_adapters_side_by_side_answer_as_each_does_alone(bot: LoadedBot, tmp_path: Path) -> None:
    "One base, two adapters, the same long prompt: nothing of one is found under another, and unloading waits."
    assert bot.path is not None
    places = {name: make_adapter(bot.path, tmp_path / name, seed) for seed, name in enumerate("ab")}
    ids = tuple(range(10, 60))
    request = GenerationRequest(ids, SamplingParams(temperature=0, max_new_tokens=20), "r")
    expected: dict[str | None, list[int]] = {None: alone(bot, ids, 20, None)}
    for name, place in places.items():
        own = load_bot(place, device="cpu")
        expected[name] = ids_of(list(decode_steps(own.model, request, own.chat)))
    assert len({tuple(e) for e in expected.values()}) == 3
    path = bot.path

    async def main() -> None:
        backend = backend_of(path)
        await backend.start()
        for name, place in places.items():
            await backend.load_adapter(name, str(place))
        order = [None, "a", "b", "a", None, "b"]
        both = await asyncio.gather(*(read(backend, ids, name) for name in order))
        assert [ids_of(chunks) for chunks in both] == [expected[name] for name in order]
        assert [chunks[0].cached_tokens for chunks in both] == [0, 0, 0, 48, 48, 48]
        vector, other = await backend.embed(ids), await backend.embed(ids, "a")
        hidden = bot.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert vector == pytest.approx(hidden.tolist(), abs=1e-4)
        assert vector != pytest.approx(other, abs=1e-4)

        running = backend.generate(GenerationRequest(ids, request.params, "r", adapter="a"))
        first = await anext(running)
        leaving = asyncio.create_task(backend.unload_adapter("a"))
        rest = [chunk async for chunk in running]
        assert ids_of([first, *rest]) == expected["a"]
        await leaving
        with pytest.raises(Exception, match="no adapter 'a'"):
            await read(backend, ids, "a")
        assert ids_of(await read(backend, ids, "b")) == expected["b"]
        await backend.stop()

    asyncio.run(main())


def test_what_can_never_fit_is_refused_and_what_fits_alone_waits(bot: LoadedBot) -> None:
    assert bot.path is not None
    path, ids = bot.path, tuple(range(10, 40))

    async def main() -> None:
        backend = backend_of(path, kv_cache_tokens=64, prefix_cache=False, prefill_chunk=7)
        await backend.start()
        with pytest.raises(RequestError, match="79 tokens of the KV cache, in 5 blocks of 16, and it has 4") as caught:
            await read(backend, ids, max_new_tokens=50)
        assert caught.value.code == "kv_cache_exceeded"
        answers = await asyncio.gather(*(read(backend, ids[k:]) for k in range(6)))
        assert [ids_of(a) for a in answers] == [alone(bot, ids[k:], 20, None) for k in range(6)]
        load = backend.load()
        assert (load.running, load.waiting, load.kv_tokens, load.kv_capacity) == (0, 0, 0, 64)
        await backend.stop()

    asyncio.run(main())


def test_a_dead_engine_tells_everybody(bot: LoadedBot, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bot.path is not None
    path = bot.path

    def broken(self: Batcher, pairs: object) -> None:
        raise MemoryError("no more")

    async def main() -> None:
        backend = backend_of(path)
        await backend.start()
        monkeypatch.setattr(Batcher, "_draw", broken)
        errors = await asyncio.gather(*(read(backend, (10, 11 + k)) for k in range(3)), return_exceptions=True)
        assert all(isinstance(error, EngineDeadError) for error in errors)
        with pytest.raises(EngineDeadError, match="no more"):
            await read(backend, (10, 11))
        await backend.stop()

    asyncio.run(main())


def test_one_at_a_time_gives_the_same_answers(bot: LoadedBot) -> None:
    assert bot.path is not None
    path = bot.path

    async def main() -> None:
        backend = backend_of(path, batching=False)
        assert not backend.capabilities().embeddings
        assert "prompt_logprobs" not in backend.capabilities().parameters
        await backend.start()
        answers = await asyncio.gather(*(read(backend, (10, 11 + k)) for k in range(3)))
        assert [ids_of(a) for a in answers] == [alone(bot, (10, 11 + k), 20, None) for k in range(3)]
        await backend.stop()

    asyncio.run(main())


@pytest.mark.parametrize("batching", [True, False])
def test_packed_weights_give_the_same_answers(tmp_path: Path, batching: bool) -> None:
    "A bot wide enough to be packed, alone, in a crowd and with an adapter, against transformers and PEFT with weights as they are."
    path = make_bot(tmp_path, "wide", seed=5, hidden_size=512, intermediate_size=512, num_hidden_layers=2)
    places: dict[str | None, Path] = {None: path, "lora": make_adapter(path, tmp_path / "lora", 3)}
    places["dora"] = make_adapter(path, tmp_path / "dora", 3, use_dora=True)
    prompts = [tuple((13 * k + i) % 300 + 10 for i in range(3 + 11 * k)) for k in range(5)]
    bots = {name: load_bot(place, device="cpu") for name, place in places.items()}
    requests = [GenerationRequest(ids, SamplingParams(temperature=0, max_new_tokens=20), "r") for ids in prompts]
    expected = {name: [ids_of(list(decode_steps(bot.model, request, bot.chat))) for request in requests] for name, bot in bots.items()}
    assert len({str(answers) for answers in expected.values()}) == 3
    out = bots[None].model.generate(torch.tensor([prompts[3]]), max_new_tokens=20, do_sample=False)
    assert out[0, len(prompts[3]) :].tolist() == expected[None][3]

    async def main() -> None:
        backend = backend_of(path, batching=batching)
        await backend.start()
        packed = [layer for layer in backend._bot.model.modules() if isinstance(layer, PackedLinear)]
        assert len(packed) == (2 * 7 + 1) * packable(torch.float32)
        names = [*places] if batching else [None]
        for name in filter(None, names):
            await backend.load_adapter(name, str(places[name]))
        answers = await asyncio.gather(*(read(backend, ids, name) for name in names for ids in prompts))
        assert [ids_of(a) for a in answers] == [ids for name in names for ids in expected[name]]
        for name in filter(None, names):
            await backend.unload_adapter(name)
        assert ids_of(await read(backend, prompts[0])) == expected[None][0]
        await backend.stop()
        alone = backend_of(places["dora"])
        await alone.start()
        assert ids_of(await read(alone, prompts[1])) == expected["dora"][1]
        await alone.stop()

    asyncio.run(main())


def test_a_real_model_tells_its_story_in_a_crowd(shared: Path) -> None:
    bot = load_bot(shared / "models" / "stories260K", device="cpu")
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = tuple(bot.tokenizer("").input_ids) or (bot.tokenizer.bos_token_id,)
    longer = tuple(bot.tokenizer(text).input_ids)

    async def main() -> None:
        backend = backend_of(shared / "models" / "stories260K")
        await backend.start()
        prompts = [ids, longer, longer[:9], longer + longer[1:7]]
        answers = await asyncio.gather(*(read(backend, p, max_new_tokens=60, stop=()) for p in prompts))
        for prompt, chunks in zip(prompts, answers, strict=True):
            assert ids_of(chunks) == alone(bot, prompt, 60, None)
        assert "".join(c.text for c in answers[0]).strip().startswith("Once upon a time, there was a little girl named Lily.")
        await backend.stop()

    asyncio.run(main())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_a_compiled_step_answers_as_the_model_does(bot: LoadedBot, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    "Captured whole, for all numbers of rows and all widths at once; on a GPU through inductor and CUDA graphs."
    assert bot.path is not None
    path, prompts, passes = bot.path, [tuple(range(10 + k, 12 + 5 * k)) for k in range(5)], []
    real = torch.compile

    def seen(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        passes.append(graph)
        return graph.forward

    if device == "cpu":  # inductor takes a minute, and what it makes of a graph is its own matter
        monkeypatch.setattr(torch, "compile", lambda model, backend, **kwargs: real(model, backend=seen, fullgraph=True, dynamic=True))

    async def main() -> None:
        backend = create_backend("torch", str(path), Config(model=ModelConfig(device=device), engine={"compile": True}))
        assert isinstance(backend, TorchBackend)
        await backend.start()
        made = len(passes)
        assert not backend.capabilities().adapters
        with pytest.raises(ServingError, match=r"engine\.compile=false to load adapters"):
            await backend.load_adapter("a", "nowhere")
        for some in (prompts, prompts[:1], prompts[:3]):
            answers = await asyncio.gather(*(read(backend, ids) for ids in some))
            assert [ids_of(a) for a in answers] == [alone(bot, ids, 20, None) for ids in some]
        await backend.stop()
        assert len(passes) == made == (2 if device == "cpu" else 0)  # for steps of 1 to 5 rows and of 2 to 4 blocks

    asyncio.run(main())


def test_a_step_that_computes_something_else_is_not_taken(bot: LoadedBot, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bot.path is not None

    def other(model: Any, **kwargs: Any) -> Any:
        return lambda **inputs: model(**{**inputs, "position_ids": inputs["position_ids"] + 3})

    monkeypatch.setattr(torch, "compile", other)
    backend = backend_of(bot.path, compile=True)
    with pytest.raises(ServingError, match="other tokens than the model itself"):
        asyncio.run(backend.start())


def test_blocks_are_counted_up() -> None:
    assert [blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_takes_the_threads_that_were_asked_for(bot: LoadedBot, threads: int) -> None:
    "Asked in the thread that steps."
    assert bot.path is not None
    path = bot.path

    async def main() -> None:
        before = torch.get_num_threads()
        backend = backend_of(path, threads=threads)
        await backend.start()
        assert backend._worker is not None
        assert backend._runner is not None
        assert backend._runner.switch.model.config._attn_implementation == "llmbot_shared_heads"  # type: ignore[attr-defined]
        assert await backend._worker.call(torch.get_num_threads) == threads
        await backend.stop()
        torch.set_num_threads(before)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("weights", "most"),
    [({"quantization": "nf4"}, 2**-10), ({"quantization": "int8"}, 2**-4), ({"dtype": "float16"}, 2**-8)],
    ids=["nf4", "int8", "float16"],
)
def test_fewer_bits_answer_in_a_batch_as_one_at_a_time(bot: LoadedBot, weights: dict[str, str], most: float) -> None:
    "Rounding hangs on the number of rows and may turn a near tie: no token that was drawn is far from the likeliest one."
    if "quantization" in weights:
        pytest.importorskip("bitsandbytes")
    assert bot.path is not None
    path, prompts = bot.path, [tuple(range(10 + k, 22 + 3 * k)) for k in range(6)]

    async def main() -> list[list[int]]:
        backend = create_backend("torch", str(path), Config(model={"device": "cpu", **weights}))  # type: ignore[arg-type]
        assert isinstance(backend, TorchBackend)
        await backend.start()
        assert isinstance(backend._runner, Batcher)
        found = await asyncio.gather(*(read(backend, ids, ignore_eos=True) for ids in prompts))
        await backend.stop()
        return [ids_of(chunks) for chunks in found]

    model = load_bot(path, device="cpu", **weights).model
    for prompt, answer in zip(prompts, asyncio.run(main()), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :].float()
        lost = logits.amax(dim=-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float(lost.max()) <= most * float(logits.abs().max())
        assert float((lost == 0).float().mean()) >= 0.6


def test_a_form_is_compiled_beside_the_worker(bot: LoadedBot) -> None:
    "An expression that cannot be compiled is refused while the worker's thread does something else."
    assert bot.path is not None
    path = bot.path

    async def main() -> None:
        backend, free = backend_of(path), threading.Event()
        await backend.start()
        assert backend._worker is not None
        busy = asyncio.create_task(backend._worker.call(free.wait))
        try:
            with pytest.raises(RequestError, match="unclosed"):
                await asyncio.wait_for(read(backend, (5, 6), constraint=Constraint("regex", "[a")), 30)
        finally:
            free.set()
        await busy
        text = "".join(chunk.text for chunk in await read(backend, (5, 6), temperature=0, constraint=Constraint("regex", "yes|no")))
        assert text in ("yes", "no")
        await backend.stop()

    asyncio.run(main())
