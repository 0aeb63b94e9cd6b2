"""What the process loads that forks engines of vLLM in `test_vllm.py`; an engine forks its worker."""

import gc
import multiprocessing

import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.v1.executor import multiproc_executor

multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
gc.collect()
gc.freeze()
