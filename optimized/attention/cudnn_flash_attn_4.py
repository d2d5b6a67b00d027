"""Forward by cuDNN, backward by flash-attn 4: the faster of either on Hopper, at 1024 keys and head dimension 64.

They may be mixed, since a backward knows of its forward the result and the log-sum-exp alone, in the same form.
"""

from __future__ import annotations

from optimized.attention.flash_attn_4 import backward
from optimized.attention.torch_cudnn import forward, state

__all__ = ["backward", "forward", "state"]
