"""The resource monitor against the kernel's own figures, the real NVML binding with a driver that answers, and its cost."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from llmbot.core.config import Config, MonitoringConfig
from llmbot.core.settings import InvalidConfigError
from llmbot.monitoring.resources import SHARE, GPUs, ResourceMonitor, ResourceReader, sample

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the oracle is Linux's /proc")


def proc(path: str, key: str) -> int:
    "A figure of a file in /proc, such as `VmRSS: 12 kB`, in bytes."
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@LINUX
def test_memory_is_the_kernels() -> None:
    ballast = bytearray(os.urandom(1000) * 80_000)
    seen, status = sample(0.01), proc("/proc/self/status", "VmRSS")
    assert seen["process_memory_bytes"] == pytest.approx(status, rel=0.02)
    assert seen["process_memory_bytes"] > len(ballast)
    assert seen["memory_total_bytes"] == proc("/proc/meminfo", "MemTotal")
    used = proc("/proc/meminfo", "MemTotal") - proc("/proc/meminfo", "MemAvailable")
    assert seen["memory_used_bytes"] == pytest.approx(used, rel=0.2)


@LINUX
def test_busy_time_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    "Two readings, and the columns of /proc/stat between them."
    import llmbot.monitoring.resources as module

    def busy() -> tuple[int, int]:
        user, nice, system, idle, iowait, *rest = (int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        spent = user + nice + system + sum(rest[:3])  # irq, softirq, steal; guests are in user and nice
        return spent, spent + idle + iowait

    clock = iter([0.0, 10.0])
    rates = module.Rates(lambda: next(clock))
    monkeypatch.setattr(module, "Rates", lambda: rates)
    before, reader = busy(), ResourceReader()
    deadline = time.process_time() + 0.3
    while time.process_time() < deadline:
        pass
    seen, after = reader.sample(), busy()
    ticks = os.sysconf("SC_CLK_TCK") * 10 * (os.cpu_count() or 1)
    assert seen["cpu_percent"] == pytest.approx(100 * (after[0] - before[0]) / ticks, abs=100 * 4 / ticks)
    assert seen["process_cpu_percent"] >= 100 * 0.28 / 10


def test_disk_is_the_file_systems(tmp_path: Path) -> None:
    seen, stat = sample(0.0, str(tmp_path)), os.statvfs(tmp_path)
    assert seen["disk_free_bytes"] == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.05)


def driver(monkeypatch: pytest.MonkeyPatch, watts: Any = 123_456) -> None:
    "A driver behind the real binding: names that the binding lacks cannot be set."
    unsupported = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def power(handle: int) -> int:
        if handle == 1:
            raise unsupported
        return watts

    answers: dict[str, Any] = {
        "nvmlInit": lambda: None, "nvmlDeviceGetCount": lambda: 2, "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetUtilizationRates": lambda h: SimpleNamespace(gpu=40 + h, memory=9),
        "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(used=2e9, total=8e9, free=6e9),
        "nvmlDeviceGetPowerUsage": power, "nvmlDeviceGetTemperature": lambda h, kind: {pynvml.NVML_TEMPERATURE_GPU: 55}[kind],
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    "Two cards, of which the second does not tell its power."
    driver(monkeypatch)
    seen = {name: value for name, value in ResourceReader().sample().items() if name.startswith("gpu")}
    both = {"memory_used_bytes": 2e9, "memory_total_bytes": 8e9, "temperature_celsius": 55.0}
    assert seen == {"gpu0_utilization_percent": 40.0, "gpu1_utilization_percent": 41.0, "gpu0_power_watts": 123.456,
                    **{f"gpu{i}_{name}": value for i in (0, 1) for name, value in both.items()}}  # fmt: skip


def test_without_a_driver_nothing_is_made_up() -> None:
    "The real binding on a machine without a card says why; on one with cards it reads them."
    gpus = GPUs()
    assert bool(gpus.handles) != bool(gpus.absent)
    assert len({name.partition("_")[0] for name in gpus.sample()}) == len(gpus.handles)


def test_it_costs_less_than_half_a_percent_of_a_core() -> None:
    "At the interval of the configuration; in processor time, so that others on the machine do not count."
    interval, reader = Config().monitoring.resource_interval_s, ResourceReader()
    assert interval is not None
    reader.sample()
    began = time.thread_time()
    for _ in range(50):
        reader.sample()
    assert (time.thread_time() - began) / 50 < SHARE * interval


def test_an_expensive_reading_is_taken_less_often() -> None:
    "A reading of 20 ms of processor time is followed by a pause of 4 seconds, whatever the interval is."

    class Expensive(ResourceReader):
        def sample(self) -> dict[str, float]:
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
            return {}

    with ResourceMonitor(0.001, reader=Expensive()) as monitor:
        pass
    assert monitor.samples >= 1
    assert monitor.pause_s >= 0.02 / SHARE
    assert monitor.spent_s >= 0.02 * monitor.samples


def test_settings() -> None:
    assert MonitoringConfig(resource_interval_s=None).resource_interval_s is None
    with pytest.raises(InvalidConfigError, match="resource_interval_s"):
        MonitoringConfig(resource_interval_s=0)
