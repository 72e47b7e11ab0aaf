"""What kernels in CUDA C++ need of the machine beside a driver: NVIDIA's compiler at run time."""

import importlib.util
from pathlib import Path

DRIVER = "libcuda.so.1"
WITHOUT_NVRTC = "there is no NVRTC, which comes with the package nvidia-cuda-nvrtc"


def find_nvrtc() -> Path | None:
    """The library among NVIDIA's packages."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [file for place in places for file in Path(place).glob("*/lib/libnvrtc.so.*")]
    return max(found, default=None)
