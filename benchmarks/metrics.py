"""What it costs to watch: of a token on its way to the client, and of a reading of the machine's resources.

    python benchmarks/metrics.py

Processor time of one thread, so that others on the machine do not count. Prints one JSON object.
"""

import json
import time
from collections.abc import Callable

from llmbot.core.config import Config
from llmbot.monitoring.resources import ResourceReader
from llmbot.monitoring.serving_metrics import ServerMetrics
from llmbot.serving.request_stats import Meter, ModelStats
from llmbot.serving.sampling_params import Chunk

TOKENS, READINGS = 50_000, 200


def spent(work: Callable[[], object]) -> float:  # seconds
    began = time.thread_time()
    work()
    return time.thread_time() - began


def count(meter: Meter, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        meter.count(chunk)


def main() -> None:
    chunks = [Chunk("a", (1,), None, 10, number) for number in range(1, TOKENS + 1)]
    plain = spent(lambda: count(Meter(ModelStats(), ModelStats()), chunks)) / TOKENS
    watched = spent(lambda: count(Meter(ModelStats(), ModelStats(), series=ServerMetrics().of("alice")), chunks)) / TOKENS
    reader = ResourceReader()
    reading = spent(lambda: [reader.sample() for _ in range(READINGS)]) / READINGS
    interval = Config().monitoring.resource_interval_s or 0.0
    print(json.dumps({
        "token_us": round(1e6 * watched, 2), "of_which_prometheus_us": round(1e6 * (watched - plain), 2),
        "reading_us": round(1e6 * reading), "monitor_percent_of_a_core": round(100 * reading / interval, 4), "interval_s": interval,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
