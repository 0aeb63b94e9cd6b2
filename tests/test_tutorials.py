"""Every tutorial runs from top to bottom in a fresh kernel, and reads like one."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = sorted((Path(__file__).parents[1] / "nbs" / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 40
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", f"{Path(os.sys.executable).parent}:{os.environ['PATH']}")  # type: ignore[attr-defined]
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert any(o.output_type in ("display_data", "execute_result") for o in outputs), "it ends with something to look at"


def test_there_are_tutorials() -> None:
    assert {p.stem for p in TUTORIALS} >= {
        "01_your_first_chatbot", "02_look_at_your_data", "03_fine_tune_and_read_the_curves", "04_lora_and_qlora",
        "05_preferences_with_dpo", "06_your_own_training_method"}
