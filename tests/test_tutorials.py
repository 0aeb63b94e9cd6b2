"""Every tutorial runs from top to bottom in a kernel of its own, and reads like one."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.provisioning import LocalProvisioner
from nbclient import NotebookClient

TUTORIALS = sorted((Path(__file__).parents[1] / "nbs" / "tutorials").glob("*.ipynb"))


def kernel(connection_file: str, cwd: str, environment: dict[str, str]) -> None:
    "IPython's kernel in this process, which was forked from one that has loaded the libraries."
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(["-f", connection_file, f"--IPKernelApp.parent_handle={os.getppid()}"])


class Forked:
    "A process of multiprocessing with the methods of one of `subprocess`."

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess) -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


async def fork_kernel(self: LocalProvisioner, cmd: list[str], *, cwd: str, env: dict[str, str], **more: Any) -> Any:
    "In place of a new interpreter, which takes ten seconds to load what it needs for a first training."
    [connection_file] = [argument for argument in cmd if argument.endswith(".json")]
    process = multiprocessing.get_context("forkserver").Process(target=kernel, args=(connection_file, cwd, env))
    process.start()
    self.process, self.pid, self.cwd = Forked(process), process.pid, cwd
    return self.connection_info


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
@pytest.mark.usefixtures("forking")
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 40
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr(LocalProvisioner, "launch_kernel", fork_kernel)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert any(o.output_type in ("display_data", "execute_result") for o in outputs), "it ends with something to look at"


def test_there_are_tutorials() -> None:
    assert {p.stem for p in TUTORIALS} >= {
        "01_your_first_chatbot", "02_look_at_your_data", "03_fine_tune_and_read_the_curves", "06_your_own_training_method"}
