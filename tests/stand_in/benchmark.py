"""benchmarks.gpu on the stand-in for a GPU, with the flags that it is given.

LD_PRELOAD=device.so python tests/stand_in/benchmark.py FLAGS...
"""

import sys

from stand_in.gpu import install
from stand_in.tensors import StandIn

from benchmarks import gpu, gpu_profile


def no_profiler(activities) -> None:
    """This torch's own writes pages about each operation on a GPU."""
    raise RuntimeError("no profiler here")


if __name__ == "__main__":
    install()
    gpu.matmul_ceiling = lambda _device: 1e12  # a product as large as a GPU wants takes minutes
    gpu_profile.profile = no_profiler
    sys.modules["sentence_transformers"] = None  # nor is it ours to try
    with StandIn():
        sys.exit(gpu.main(sys.argv[1:]))
