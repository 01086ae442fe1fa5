"""Memory on the CPU, which is dear when it is new.

The system hands it out page by page, each when it is first written to; for a large gradient that
takes longer than to compute it. So what a loss has used, the next one uses again, unless
``detseg_losses.memory.reuse(False)`` says otherwise.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 32 << 20
"""Bytes that are worth holding memory for: glibc's malloc gets so large a chunk from the system
each time, and returns it as soon as it is freed.
"""

spare: deque[mmap.mmap] = deque(maxlen=1)
"""The memory of the last large result, once nothing refers to it any more; of length 0 where
memory is not to be used again.
"""


def reuse(enabled: bool) -> None:
    """Switch whether large results on the CPU use the memory of the last one again.

    They do at first, which holds that memory between two steps of training. The switch is for the
    whole process.

    Args:
        enabled: False lets go of what is held, and leaves memory to torch from now on.

    Examples:
        >>> from detseg_losses import memory
        >>> memory.reuse(False)
        >>> memory.reuse(True)
    """
    global spare
    spare = deque(maxlen=int(enabled))


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.empty_like`` for tensors that are on the CPU, as the callers know.

    A large one takes the memory that is spare, if its size is right: in training each step's
    gradient that of the step before. Its storage cannot be resized.
    """
    size = tensor.numel() * dtype.itemsize
    if size < LARGE or not spare.maxlen or os.name != "posix":
        return torch.empty_like(tensor, dtype=dtype)
    memory = None
    with suppress(IndexError):  # another thread may be faster
        memory = spare.pop()
    if memory is None or len(memory) != size:
        try:
            memory = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
        except OSError:  # there is not so much: torch says that in the words that callers know
            return torch.empty_like(tensor, dtype=dtype)
        _keep_freed()
    view = memoryview(memory)  # it lives as long as the result, and whatever shares its storage
    weakref.finalize(view, spare.append, memory).atexit = False
    strides = torch.empty_like(tensor, device="meta").stride()
    return torch.frombuffer(view, dtype=dtype).as_strided(tensor.shape, strides)


def _keep_freed() -> None:
    """Let glibc's malloc keep up to 32 MB that are freed, such as the temporaries of a block.

    Else it returns them to the system each time. It keeps them once it has freed a chunk of nearly
    that size: in training one of the activations, and where a loss runs alone this one.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
