"""Shared fixtures: real material when it lies beside the repository, and offline hub access always."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models on a busy machine: threads would wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LLMBOT_REGISTRY"] = tempfile.mkdtemp(prefix="registry-")  # never the one of the person who runs the tests
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder of real data and models; tests that use it skip, and say so, where it is absent."
    path = Path(os.environ.get("LLMBOT_SHARED", ROOT.parent / "shared"))
    if not (path / "models" / "stories260K" / "config.json").exists():
        pytest.skip(f"no real data at {path}: set LLMBOT_SHARED to run this test")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The longest file first, so that two workers end at about the same time."
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")
