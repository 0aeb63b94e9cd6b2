"""A server under clients that come and go: nothing that it holds may grow.

Fifteen seconds here; `LLMBOT_SOAK_S=300 pytest tests/test_soak.py` takes the five minutes that a release should see.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tiny_bots import make_bot

SECONDS = float(os.environ.get("LLMBOT_SOAK_S", "15"))


def held(pid: int) -> dict[str, float]:
    "Private memory in MB, threads and open files of a process."
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    memory = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024
    return {"memory": memory, "threads": int(status["Threads"]), "files": len(os.listdir(f"/proc/{pid}/fd"))}


async def visit(port: int, rng: random.Random, seen: dict[str, int]) -> None:
    "One request, streamed or whole; half of the clients leave before its end, at any moment."
    chat = rng.random() < 0.5
    asked: dict[str, Any] = {"max_tokens": rng.choice([1, 8, 40]), "stream": rng.random() < 0.7, "temperature": rng.choice([0, 1])}
    asked |= {"messages": [{"role": "user", "content": "Hi " * rng.randint(1, 9)}]} if chat else {"prompt": "Once " * rng.randint(1, 9)}
    body = json.dumps(asked).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        cut = rng.random() < 0.1
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + (body[: len(body) // 2] if cut else body))
        await writer.drain()
        leave_after = rng.choice([None, None, None, 0.0, 0.005, 0.02, 0.1]) if not cut else 0.01
        try:
            async with asyncio.timeout(leave_after if leave_after is not None else 60):
                answer = await reader.read()
                status = int(answer.split(b" ", 2)[1])
                seen[str(status)] = seen.get(str(status), 0) + 1
        except TimeoutError:
            assert leave_after is not None, "no answer within a minute"
            seen["left"] = seen.get("left", 0) + 1
    finally:
        writer.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_nothing_grows(tmp_path: Path) -> None:
    bot = make_bot(tmp_path, "tiny")
    command = [sys.executable, "-m", "llmbot.app.cli", "serve", str(bot), "--port", "0", "--json", "model.device=cpu",
               "serving.log_level=warning", "serving.max_queue_size=16", f"serving.conversations_url=sqlite:///{tmp_path}/talks.db"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        port, seen = int(url.rpartition(":")[2]), {}  # type: ignore[var-annotated]

        async def visitors(seconds: float) -> None:
            until = time.monotonic() + seconds

            async def visitor(number: int) -> None:
                rng = random.Random(number)
                while time.monotonic() < until:
                    await visit(port, rng, seen)

            await asyncio.gather(*(visitor(n) for n in range(12)))

        asyncio.run(visitors(SECONDS / 3))  # caches fill, threads start
        settle(url)
        before = held(server.pid)
        asyncio.run(visitors(2 * SECONDS / 3))
        stats = settle(url)
        after = held(server.pid)
    finally:
        server.terminate()
        server.wait(30)
    assert set(seen) <= {"200", "503", "left"}, seen
    assert min(seen["200"], seen["left"]) > 10, seen
    assert stats["running"] == stats["waiting"] == 0
    assert after["threads"] <= before["threads"] + 8, (before, after)  # asyncio's pool fills up to its bound, and stays there
    assert after["files"] <= before["files"] + 1, (before, after)
    assert after["memory"] - before["memory"] < 8 + 0.02 * before["memory"], (before, after, seen)


def settle(url: str) -> dict[str, Any]:
    "The server's counters once nothing runs; those after ten seconds where something still does."
    until = time.monotonic() + 10
    while True:
        with urllib.request.urlopen(f"{url}/stats", timeout=10) as answer:
            stats: dict[str, Any] = json.load(answer)
        if not stats["running"] and not stats["waiting"] or time.monotonic() > until:
            return stats
