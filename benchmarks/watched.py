"""A server under load, as the real Prometheus sees it, beside what its clients measure themselves.

    python benchmarks/watched.py BOT [--clients 8] [--seconds 60] [--tokens 64]

Needs Prometheus (the Debian package `prometheus`). It reads the shipped configuration and alerts of `deploy/monitoring`, with the
server's address put in and a scrape each second. Clients ask one after the other and read their streams. Prints one JSON object.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from llmbot.training.launch import free_port

FILES = Path(__file__).parents[1] / "deploy" / "monitoring"
PROMPTS = ("Once upon a time", "There was a little dog", "Lily and Tom went to the park. They", "The cat wanted")


def ask(url: str, tokens: int, until: float, seen: list[dict[str, float]], number: int) -> None:
    "One client: ask, read the stream, ask again."
    with httpx.Client(timeout=120) as client:
        while (began := time.monotonic()) < until:
            body = {"prompt": PROMPTS[(number + len(seen)) % len(PROMPTS)], "max_tokens": tokens, "temperature": 0.8, "stream": True}
            times = []
            with client.stream("POST", f"{url}/v1/completions", json={**body, "ignore_eos": True}) as answer:
                answer.raise_for_status()
                times = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
            seen.append({"first": times[0] - began, "last": times[-1] - began})


def query(prometheus: str, expression: str, at: float) -> float:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression, "time": at}, timeout=30).json()
    return round(float(answer["data"]["result"][0]["value"][1]), 4)


def figures(prometheus: str, seconds: float, at: float) -> dict[str, float]:
    "What the dashboard would show of the whole load."
    window = f"[{int(seconds)}s]"

    def quantile(share: float, name: str) -> str:
        return f"histogram_quantile({share}, sum by (le) (rate(llmbot_{name}_seconds_bucket{window})))"

    asked = {
        "requests_per_s": f"sum(rate(llmbot_request_success_total{window}))",
        "tokens_per_s": f"sum(rate(llmbot_generation_tokens_total{window}))",
        "ttft_p50_s": quantile(0.5, "time_to_first_token"), "ttft_p99_s": quantile(0.99, "time_to_first_token"),
        "token_p50_s": quantile(0.5, "inter_token_latency"), "token_p99_s": quantile(0.99, "inter_token_latency"),
        "latency_p50_s": quantile(0.5, "e2e_request_latency"), "latency_p99_s": quantile(0.99, "e2e_request_latency"),
        "queue_p50_s": quantile(0.5, "request_queue_time"), "running_max": f"max_over_time(llmbot_num_requests_running{window})",
        "kv_cache_max": f"max_over_time(llmbot_kv_cache_usage_perc{window})", "process_memory_mb": "llmbot_process_memory_bytes / 1e6",
        "process_cpu_percent": f"avg_over_time(llmbot_process_cpu_percent{window})",
        "prefix_cache_hits": f"sum(rate(llmbot_prefix_cache_hits_total{window})) / sum(rate(llmbot_prefix_cache_queries_total{window}))",
        "scrape_seconds": f"avg_over_time(scrape_duration_seconds{window})", "series": "scrape_samples_scraped",
        "alerts_firing": 'count(ALERTS{alertstate="firing"}) or vector(0)',
    }  # fmt: skip
    return {name: query(prometheus, expression, at) for name, expression in asked.items()}


def start_prometheus(folder: Path, url: str) -> tuple[str, "subprocess.Popen[bytes]"]:
    "The shipped files, with this server and a scrape each second."
    config = yaml.safe_load((FILES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(FILES / "alerts.yml", folder)
    port, program = free_port(), shutil.which("prometheus")
    if program is None:
        sys.exit("Prometheus is not installed: apt-get install prometheus")
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    return f"http://127.0.0.1:{port}", subprocess.Popen(command)


def load(url: str, clients: int, tokens: int, seconds: float) -> dict[str, Any]:
    "Ask for so long; what the clients measured."
    seen: list[list[dict[str, float]]] = [[] for _ in range(clients)]
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=ask, args=(url, tokens, until, mine, number)) for number, mine in enumerate(seen)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, last = ([one[name] for mine in seen for one in mine] for name in ("first", "last"))
    return {"requests": len(first), "tokens": len(first) * tokens, "ttft_p50_s": round(statistics.median(first), 4),
            "latency_p50_s": round(statistics.median(last), 4),
            "latency_p99_s": round(statistics.quantiles(last, n=100)[98], 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bot")
    for name, default in (("clients", 8), ("seconds", 60), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    command = [sys.executable, "-m", "llmbot.app.cli", "serve", args.bot, "--port", "0", "--json", "serving.log_level=warning",
               "monitoring.resource_interval_s=1"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        prometheus, watcher = start_prometheus(Path(folder), url)
        try:
            while not _up(prometheus):
                assert watcher.poll() is None, "Prometheus ended"
                time.sleep(0.2)
            load(url, args.clients, args.tokens, 2)  # so that every series is there before the load that counts
            time.sleep(2)
            began = time.time()
            clients = load(url, args.clients, args.tokens, args.seconds)
            time.sleep(2)
            ended = time.time()
            seen = figures(prometheus, ended - began, ended)
        finally:
            for process in (watcher, server):
                process.terminate()
                process.wait(60)
    print(json.dumps({"seconds": round(ended - began, 1), "clients": clients, "prometheus": seen}, indent=1))


def _up(prometheus: str) -> bool:
    try:
        return query(prometheus, 'sum(up{job="llmbot"})', time.time()) == 1
    except (httpx.TransportError, IndexError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    main()
