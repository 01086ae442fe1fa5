"""Memory on the CPU, which is dear when it is new.

The system hands it out page by page, each when it is first written to; for a large gradient that
takes longer than to compute it. So what a loss has used, the next one uses again.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

# glibc's malloc returns the memory of a freed block to the system at once. Once a chunk of nearly
# 32 MB (its limit) has been freed, it keeps that much for reuse.
torch.empty(31 << 20, dtype=torch.uint8)

LARGE = 1 << 24
"""Elements that are worth holding memory for: malloc gets and returns so large a chunk, beyond its
limit in every dtype, each time.
"""

spare: deque[mmap.mmap] = deque(maxlen=1)
"""The memory of the last large result, once nothing refers to it any more."""


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.empty_like`` for tensors that are on the CPU, as the callers know. A large one takes
    the memory that is spare, if its size is right: in training each step's gradient that of the
    step before. Its storage cannot be resized.
    """
    if tensor.numel() < LARGE or os.name != "posix":
        return torch.empty_like(tensor, dtype=dtype)
    size = tensor.numel() * dtype.itemsize
    memory = None
    with suppress(IndexError):  # another thread may be faster
        memory = spare.pop()
    if memory is None or len(memory) != size:
        try:
            memory = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
        except OSError:  # there is not so much: torch says that in the words that callers know
            return torch.empty_like(tensor, dtype=dtype)
    view = memoryview(memory)  # it lives as long as the result, and whatever shares its storage
    weakref.finalize(view, spare.append, memory).atexit = False
    strides = torch.empty_like(tensor, device="meta").stride()
    return torch.frombuffer(view, dtype=dtype).as_strided(tensor.shape, strides)
