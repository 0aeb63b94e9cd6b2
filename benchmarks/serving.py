"""Time to first token, time per token and throughput of llmbot's server beside its peers, on the same requests, in one run.

Requests of mixed lengths arrive at random (Poisson) or from a number of clients that each wait for their answer. Servers run
in processes of their own and are asked over loopback; the loops that one would write by hand run in a child process and take
the same requests as they arrive. All runners take turns (A B C A B C ...), and ratios are medians over the rounds.

    python benchmarks/serving.py [--preset qwen3-30m] [--runners torch,static,sequential] [--clients 32] [--requests 64]
                                 [--rate 0] [--rounds 3] [--threads 2] [--dtype float32]
    python benchmarks/serving.py --runners onnx,genai --clients 1 --precision int4       # needs llmbot[onnx]
    python benchmarks/serving.py --runners vllm,vllm-server --rounds 1                   # where vLLM is installed
    python benchmarks/serving.py --overhead      # what the API adds to each token
    python benchmarks/serving.py --overload      # how fast a full server says no
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SERVERS = ("torch", "onnx", "vllm", "vllm-server")
LOOPS = ("static", "sequential", "genai")
STAMPS = "LLMBOT_BENCHMARK_STAMPS"  # the file that `timed` writes


@dataclass
class Ask:
    "One request of the plan."

    at: float  # seconds after the start; clients that wait for their answers ignore it
    prompt: list[int]  # token ids
    max_tokens: int  # exactly so many are made: stop tokens do not stop


@dataclass
class Answered:
    "What became of it."

    status: int = 200
    began: float = 0.0  # when it was due; all times in seconds on one clock
    ended: float = 0.0
    said: str = ""  # the body of a refusal
    tokens: list[float] = field(default_factory=list)  # when each came


def make_plan(args: argparse.Namespace, vocabulary: int) -> list[Ask]:
    "Prompts of 16 to 128 tokens, a quarter of them with a common beginning, answers of 16 to 64, the same for every runner."
    rng = random.Random(args.seed)
    common = [rng.randrange(300, vocabulary) for _ in range(64)]
    plan, at = [], 0.0
    for _ in range(args.requests):
        prompt = [rng.randrange(300, vocabulary) for _ in range(rng.randint(16, args.prompt_tokens))]
        prompt = (common + prompt)[: args.prompt_tokens] if rng.random() < 0.25 else prompt
        plan.append(Ask(at, prompt, rng.randint(16, args.answer_tokens)))
        at += rng.expovariate(args.rate) if args.rate else 0.0
    return plan


# The client: HTTP/1.1 by hand, so that what is measured is the server and not a client library.


async def post(url: str, body: dict[str, Any], answered: Answered, limit_s: float) -> None:
    "Send one streamed completion and note when each token came."
    host, _, port = url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    async with asyncio.timeout(limit_s):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            answered.status = int((await reader.readline()).split()[1])
            chunked = False
            while (line := await reader.readline()) not in (b"\r\n", b""):
                chunked = chunked or line.lower().startswith(b"transfer-encoding: chunked")
            if answered.status == 200 and chunked:
                await read_events(reader, answered)
            else:
                answered.said = (await reader.read(500)).decode(errors="replace")
            answered.ended = time.perf_counter()
        finally:
            writer.close()


async def read_events(reader: asyncio.StreamReader, answered: Answered) -> None:
    "Read a chunked stream of events to its end."
    rest = b""
    while size := int(await reader.readline() or b"0", 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *events, rest = rest.split(b"\n\n")
        now = time.perf_counter()
        for event in events:
            if b'"error"' in event[:20]:
                answered.status, answered.said = 500, event.decode(errors="replace")[:300]
            elif event.startswith(b"data: {"):
                choices = json.loads(event[6:])["choices"]
                if choices and (choices[0].get("text") or choices[0].get("token_ids")):
                    answered.tokens.append(now)


async def drive(url: str, model: str, plan: Sequence[Ask], clients: int, limit_s: float) -> list[Answered]:
    "Send the plan: by its times, or, with `clients`, by so many that each wait for their answer."
    found = [Answered() for _ in plan]
    start = time.perf_counter()

    async def one(index: int) -> None:
        ask, answered = plan[index], found[index]
        answered.began = max(time.perf_counter(), start + (0 if clients else ask.at))
        body = {"model": model, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        await post(url, body, answered, limit_s)

    async def client(number: int) -> None:
        await asyncio.sleep(number * 0.05)  # they do not begin together
        for index in range(number, len(plan), clients):
            await one(index)

    async def on_time(index: int) -> None:
        await asyncio.sleep(max(start + plan[index].at - time.perf_counter(), 0))
        await one(index)

    await asyncio.gather(*((client(i) for i in range(clients)) if clients else (on_time(i) for i in range(len(plan)))))
    return found


# Servers


@contextlib.contextmanager
def server(runner: str, bot: Path, args: argparse.Namespace, more: dict[str, str] | None = None) -> Iterator[str]:
    "Start one in a process of its own; its URL once it answers."
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    if runner == "vllm-server":
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(bot), "--served-model-name", bot.name,
                   "--host", "127.0.0.1", "--port", str(port), "--dtype", args.dtype, "--max-model-len", str(args.context),
                   "--enforce-eager", "--max-num-seqs", "64"]
    else:
        engine = {"vllm": ["engine.enforce_eager=true", f"model.dtype={args.dtype}"], "onnx": []}.get(runner, [f"model.dtype={args.dtype}"])
        command = ["-m", "llmbot.app.cli", "serve", str(bot), "--port", str(port), f"serving.backend={runner}",
                   "serving.max_concurrent_requests=64", "serving.max_queue_size=1000",
                   "serving.log_level=warning", *engine, *args.settings]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", **(more or {})}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(port, process, args.start_s)
            yield f"http://127.0.0.1:{port}"
        except BaseException:
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float) -> None:
    "Until /health answers 200. Raises `RuntimeError` when the process ends or the time is over."
    import urllib.error
    import urllib.request

    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start within {seconds:g} s" if process.poll() is None else "the server ended")


# Loops that one would write by hand; they run in a child process, which prints what it found as JSON.


def loop_static(bot: Path, plan: Sequence[Ask], args: argparse.Namespace) -> list[Answered]:
    "`generate` on batches of what has arrived, at most `--clients` of them; a batch ends with its longest answer."
    return loop_generate(bot, plan, args, args.clients or 32)


def loop_sequential(bot: Path, plan: Sequence[Ask], args: argparse.Namespace) -> list[Answered]:
    "`generate`, one request after the other."
    return loop_generate(bot, plan, args, 1)


def loop_generate(bot: Path, plan: Sequence[Ask], args: argparse.Namespace, batch: int) -> list[Answered]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(bot, dtype=getattr(torch, args.dtype))
    model.generation_config.eos_token_id = None
    found = [Answered() for _ in plan]
    with torch.inference_mode():
        model.generate(torch.tensor([plan[0].prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        start = time.perf_counter()
        at = 0
        while at < len(plan):
            time.sleep(max(start + plan[at].at - time.perf_counter(), 0))
            now = time.perf_counter() - start
            rows = [i for i in range(at, min(at + batch, len(plan))) if plan[i].at <= now]
            at = rows[-1] + 1
            width = max(len(plan[i].prompt) for i in rows)
            ids = torch.tensor([[0] * (width - len(plan[i].prompt)) + plan[i].prompt for i in rows])
            mask = torch.tensor([[0] * (width - len(plan[i].prompt)) + [1] * len(plan[i].prompt) for i in rows])
            longest = max(plan[i].max_tokens for i in rows)
            model.generate(ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False, pad_token_id=0)
            ended = time.perf_counter()
            for i in rows:  # a whole answer comes at once
                found[i] = Answered(200, start + plan[i].at, ended, tokens=[ended] * plan[i].max_tokens)
    return found


def loop_genai(bot: Path, plan: Sequence[Ask], args: argparse.Namespace) -> list[Answered]:
    "onnxruntime-genai's own loop, one request after the other."
    import numpy as np
    import onnxruntime_genai as og

    model, found = og.Model(str(bot)), []
    start = time.perf_counter()
    for ask in plan:
        params = og.GeneratorParams(model)
        length = len(ask.prompt) + ask.max_tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        answered = Answered(200, max(start + ask.at, time.perf_counter()))
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ask.prompt, dtype=np.int32))
        for _ in range(ask.max_tokens):
            generator.generate_next_token()
            answered.tokens.append(time.perf_counter())
        answered.ended = answered.tokens[-1]
        found.append(answered)
    return found


# One runner, and the table


def percentile(values: Sequence[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)] if ranked else float("nan")


def summary(found: Sequence[Answered]) -> dict[str, float]:
    "Figures of one run; times in ms."
    done = [a for a in found if a.status == 200 and a.tokens]
    if not done:
        raise RuntimeError(f"nothing was answered: {found[0].status} {found[0].said}")
    span = max(a.ended for a in done) - min(a.began for a in done)
    first = [1000 * (a.tokens[0] - a.began) for a in done]
    each = [1000 * (a.tokens[-1] - a.tokens[0]) / (len(a.tokens) - 1) for a in done if len(a.tokens) > 1]
    figures = {"tokens/s": sum(len(a.tokens) for a in done) / span, "ttft p50": percentile(first, 0.5), "ttft p99": percentile(first, 0.99)}
    return {**figures, "tpot p50": percentile(each, 0.5), "tpot p99": percentile(each, 0.99), "failed": float(len(found) - len(done))}


def run(runner: str, bot: Path, plan: Sequence[Ask], args: argparse.Namespace) -> dict[str, float]:
    "One round of one runner."
    if runner in LOOPS:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", runner, str(bot)]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, input=json.dumps([asdict(a) for a in plan]), capture_output=True, text=True, env=env)
        if done.returncode:
            raise RuntimeError(f"{runner} failed:\n{done.stderr[-2000:]}")
        return summary([Answered(**a) for a in json.loads(done.stdout.splitlines()[-1])])
    with server(runner, bot, args) as url:
        warm = [Ask(0, plan[0].prompt, 8)] * 2
        asyncio.run(drive(url, bot.name, warm, 1, args.limit_s))
        return summary(asyncio.run(drive(url, bot.name, plan, args.clients, args.limit_s)))


def bots(args: argparse.Namespace, folder: Path, runners: Sequence[str]) -> tuple[Path, Path, int]:
    "A bot of random weights, its ONNX export where a runner needs one, and its number of tokens."
    from llmbot.core.bot import is_export
    from llmbot.core.config import ModelConfig
    from llmbot.core.model_manager import load_bot, new_model, save_bot, train_tokenizer

    if args.bot:
        bot = Path(args.bot)
    else:
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(3, 9))) for _ in range(args.vocabulary)]
        tokenizer = train_tokenizer([" ".join(rng.choices(words, k=200)) for _ in range(500)], args.vocabulary)
        config = ModelConfig(preset=args.preset, max_position_embeddings=args.context)
        bot = save_bot(folder / "bot", new_model(config, tokenizer).to(dtype=_dtype(args.dtype)), tokenizer)
    exported = bot if is_export(bot) else folder / "onnx"
    if {"onnx", "genai"} & set(runners) and exported != bot:
        subprocess.run([sys.executable, "-m", "llmbot.app.cli", "export", "onnx", str(bot), "--precision", args.precision, "--output",
                        str(exported), "--tolerance", "1e9", "--min-agreement", "0", "--max-perplexity-ratio", "1e9"], check=True)
    return bot, exported, len(load_bot(bot).tokenizer)


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def compare(args: argparse.Namespace, folder: Path) -> None:
    "All runners in turn, and a table."
    runners = args.runners.split(",")
    bot, exported, vocabulary = bots(args, folder, runners)
    plan = make_plan(args, vocabulary)
    arrivals = f"{args.clients} clients" if args.clients else f"Poisson arrivals, {args.rate:g}/s"
    tokens = sum(a.max_tokens for a in plan)
    print(f"{args.bot or args.preset}, {args.dtype}, {args.threads} threads: {len(plan)} requests, {tokens} tokens, {arrivals}", flush=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for _ in range(args.rounds):
        for name in runners:
            found[name].append(run(name, exported if name in ("onnx", "genai") else bot, plan, args))
            print(f"  {name:12}", *(f"{k} {v:8,.1f}" for k, v in found[name][-1].items()), flush=True)
    for name in runners[1:]:
        for figure in ("tokens/s", "ttft p50", "tpot p50"):
            ratios = [a[figure] / b[figure] for a, b in zip(found[runners[0]], found[name], strict=True) if b[figure]]
            if ratios:
                print(f"{runners[0]} / {name}: {figure} {statistics.median(ratios):.2f} (of {len(ratios)} rounds)")


def overhead(args: argparse.Namespace, folder: Path) -> None:
    """Milliseconds from the moment that a backend has a token until a client has read it: queues, JSON and HTTP, both ways of a socket;
    with an engine that only waits, and with the torch backend, which wants all processors. With the first also the processor's time."""
    import psutil

    bot, _, vocabulary = bots(args, folder, [])
    prompt = make_plan(args, vocabulary)[0].prompt
    plan = [Ask(0, prompt, args.context - len(prompt) - 1)] * args.rounds
    found = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for engine in ("waits", "torch"):
        stamps = folder / f"{engine}.jsonl"
        with server(f"serving:{engine}_timed", bot, args, {"PYTHONPATH": found, STAMPS: str(stamps)}) as url:
            [process] = psutil.Process().children()
            first = asyncio.run(drive(url, bot.name, plan[:1], 1, args.limit_s))  # builds what is built once
            before = process.cpu_times()
            read = asyncio.run(drive(url, bot.name, plan, 1, args.limit_s))
            after = process.cpu_times()
            if said := [answered.said for answered in first + read if answered.status != 200]:
                raise RuntimeError(f"not all was answered: {said[0]}")
        made = [json.loads(line) for line in stamps.read_text().splitlines()][1:]
        late = [1000 * (b - a) for had, got in zip(made, read, strict=True) for a, b in zip(had, got.tokens, strict=True)]
        used = 1000 * (after.user + after.system - before.user - before.system) / len(late)
        cost = f", for {used:.3f} ms of the processor" if engine == "waits" else ""
        print(f"{engine:6} {len(late)} tokens, each with the client {statistics.median(late):.3f} ms after the backend had it "
              f"(median; {percentile(late, 0.99):.3f} ms at the 99th percentile){cost}")


def noting(chunks: Any) -> Any:
    "The same chunks; when each piece of text was there is written down."

    async def noted() -> Any:
        had = []
        async for chunk in chunks:
            had += [time.perf_counter()] if chunk.text else []
            if chunk.finish_reason:
                with Path(os.environ[STAMPS]).open("a") as file:
                    print(json.dumps(had), file=file)
            yield chunk

    return noted()


def torch_timed(bot_ref: str, cfg: Any) -> Any:
    "A factory for `serving.backend`: the torch backend."
    from llmbot.serving.torch_backend import TorchBackend

    class Timed(TorchBackend):
        def generate(self, request: Any) -> Any:
            return noting(super().generate(request))

    return Timed(bot_ref, cfg)


def waits_timed(bot_ref: str, cfg: Any) -> Any:
    "A factory for `serving.backend`: a thread has a token each millisecond, as an engine on a device of its own would."
    import threading

    from llmbot.serving.batch_worker import Mailbox
    from llmbot.serving.sampling_params import Chunk
    from llmbot.serving.torch_backend import TorchBackend

    class Waits(TorchBackend):
        def generate(self, request: Any) -> Any:
            return noting(self._words(request))

        async def _words(self, request: Any) -> Any:
            box, most, prompt = Mailbox(), request.params.max_new_tokens, len(request.prompt_ids)

            def engine() -> None:
                for at in range(1, most + 1):
                    time.sleep(0.001)
                    Mailbox.send([(box, Chunk(" word", (300,), "length" if at == most else None, prompt, at))])

            threading.Thread(target=engine, daemon=True).start()
            for _ in range(most):
                yield await box.get()

    return Waits(bot_ref, cfg)


def overload(args: argparse.Namespace, folder: Path) -> None:
    "Ten times as many requests as can be answered: which statuses come, and how fast a refusal is."
    bot, _, vocabulary = bots(args, folder, [])
    args.settings = ["serving.max_queue_size=8", "serving.max_concurrent_requests=8", *args.settings]
    with server("torch", bot, args) as url:
        args.rate = 0.0
        fair = asyncio.run(drive(url, bot.name, make_plan(args, vocabulary)[:32], 8, args.limit_s))
        capacity = 32 / (max(a.ended for a in fair) - min(a.began for a in fair))
        args.rate = 10 * capacity
        found = asyncio.run(drive(url, bot.name, make_plan(args, vocabulary), 0, args.limit_s))
    refused = [1000 * (a.ended - a.began) for a in found if a.status in (429, 503)]
    print(f"capacity {capacity:.1f}/s, offered {args.rate:.1f}/s: statuses {dict(Counter(a.status for a in found))}; "
          f"refused within p50 {percentile(refused, 0.5):.1f} ms, p99 {percentile(refused, 0.99):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3-30m", help="shape of a bot of random weights; qwen3-0.6b for the 0.6 B one")
    parser.add_argument("--bot", help="a bot to serve instead of one of random weights, or for onnx and genai an export")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--runners", default="torch,static,sequential", help=f"the first is compared with the others: {SERVERS + LOOPS}")
    parser.add_argument("--clients", type=int, default=32, help="clients that each wait for their answer; 0: Poisson arrivals")
    parser.add_argument("--rate", type=float, default=4.0, help="arrivals per second where there are no clients")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--precision", default="int4", choices=("fp32", "int8", "int4", "fp16"), help="of the ONNX export")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds that one request may take")
    parser.add_argument("--start-s", type=float, default=300.0, help="seconds that a server may take to start")
    parser.add_argument("--settings", nargs="*", default=[], help="more settings for llmbot's servers, such as engine.prefix_cache=false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--overload", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("LOOP", "BOT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rate = args.rate if not args.clients else 0.0
    if args.child:
        loops = {"static": loop_static, "sequential": loop_sequential, "genai": loop_genai}
        plan = [Ask(**a) for a in json.load(sys.stdin)]
        print(json.dumps([asdict(a) for a in loops[args.child[0]](Path(args.child[1]), plan, args)]))
        return
    with tempfile.TemporaryDirectory() as tmp:
        (overhead if args.overhead else overload if args.overload else compare)(args, Path(tmp))


if __name__ == "__main__":
    main()
