"""The layers over several devices: `parallelize_module(layer, mesh["cp"], ContextParallel())`.

The engine is PyTorch's own, DeviceMesh, DTensor, FSDP2, DDP, torchrun; here is what these layers need besides.
"""

from optimized.parallel.styles import ContextParallel, ExpertParallel

__all__ = ["ContextParallel", "ExpertParallel"]
