"""What ``torch.compile`` would run on a GPU, found without one.

The losses are traced on the CPU. Their graphs are then moved to CUDA as tensors without memory, and
inductor writes its Triton code for an H100 whose properties are given here. Nothing is launched.

That takes the internals of torch 2.14, and stand-ins for parts of torch and of Triton, which both
remember what those said: so this is a program, to be run apart. ``python tests/inductor.py`` prints
as JSON, of each loss, the kernels of value and gradient, and the bytes that they read and write for
a byte of the logits.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.scheduler
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.node import map_aggregate, map_arg

from detseg_losses import build_loss

CUDA = torch.device("cuda:0")
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    warp_size=32,
    gcnArchName="",
    is_integrated=False,
    is_multi_gpu_board=False,
    uuid="",
)


def losses() -> Iterator[tuple[str, Callable[..., Tensor], Tensor, Tensor]]:
    """Names, losses, logits and targets."""
    focal = build_loss("focal(reduction='sum')")
    yield "focal", focal, torch.randn(8192, 91), torch.randint(-2, 91, (8192,))
    binary = build_loss("bce + dice", "segmentation")
    yield "bce + dice", binary, torch.randn(4, 1, 128, 128), torch.rand(4, 1, 128, 128).round()
    several = build_loss("ce + dice", "segmentation")
    yield "ce + dice", several, torch.randn(4, 21, 128, 128), torch.randint(21, (4, 128, 128))


def figures(loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> tuple[int, float]:
    """Kernels, and bytes for a byte of the logits, of a loss and its gradient."""
    kernels, moved = 0, 0

    def compile_graph(graph: GraphModule, _: object, **options: Any) -> Callable[..., Any]:
        nonlocal kernels, moved
        code, size = written(graph, is_backward=options.get("is_backward", False))
        kernels += code.count(".run(") + code.count("extern_kernels.")
        moved += size
        return make_boxed_func(graph.forward)

    def backend(graph: GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=compile_graph)

    x.requires_grad_()
    torch.compile(loss, backend=backend, fullgraph=True, dynamic=False)(x, y).backward()
    return kernels, moved / x.nbytes


def written(graph: GraphModule, is_backward: bool) -> tuple[str, int]:
    """Inductor's code for a graph, from its function ``call`` on, and the bytes that move."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    graph, inputs = on_cuda(graph, fake)
    with ExitStack() as stack:
        for patch in stand_ins():
            stack.enter_context(patch)
        for context in (V.set_fake_mode(fake), V.set_debug_handler(DebugContext()), fake):
            stack.enter_context(context)
        compile_fx.view_to_reshape(graph)
        compile_fx.record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code = lowering.codegen()[0].value
            return code[code.index("def call(") :], lowering.count_bytes()[0]


def on_cuda(graph: GraphModule, fake: FakeTensorMode) -> tuple[GraphModule, list[Any]]:
    """A graph that was traced on the CPU on CUDA instead, and its inputs, without memory."""

    def moved(argument: Any) -> Any:
        return CUDA if argument == torch.device("cpu") else argument

    def empty(tensor: Tensor, device: torch.device) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    def value(argument: Any) -> Any:
        return map_arg(argument, lambda node: node.meta["val"])

    nodes, inputs = copy.deepcopy(graph.graph), []
    with fake:
        for node in nodes.nodes:
            node.args, node.kwargs = (map_aggregate(a, moved) for a in (node.args, node.kwargs))
            node.meta.pop("tensor_meta", None)
            if node.op == "placeholder":
                found = node.meta["val"]
                found = empty(found, CUDA) if isinstance(found, Tensor) else found
                inputs.append(found)
            elif node.op == "get_attr":
                constant = getattr(graph, node.target)
                found = empty(constant, CUDA if constant.dim() else constant.device)
            elif node.op == "call_function":
                found = node.target(*value(node.args), **value(node.kwargs))
            else:
                continue
            node.meta["val"] = found
    return GraphModule(graph, nodes), inputs


def stand_ins() -> Iterator[Any]:
    """For whatever asks a driver about the device."""
    import triton
    from triton.backends.compiler import GPUTarget

    def always(result: object) -> Callable[..., Any]:
        return lambda *_, **__: result

    def of_class(result: object) -> Any:
        return staticmethod(always(result))

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "is_bf16_supported": True,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, always(answer))
    yield mock.patch.object(torch._inductor.scheduler, "has_triton", always(True))
    for name in ("current_device", "device_count", "get_device_properties"):
        yield mock.patch.object(CudaInterface, name, of_class(answers[name]))
    for name in ("current_device", "get_device_properties"):
        yield mock.patch.object(CudaInterface.Worker, name, of_class(answers[name]))
    limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
    driver = SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=always(limits)),
        get_current_target=always(GPUTarget("cuda", 90, 32)),
        get_current_device=always(0),
        get_device_interface=always(torch.cuda),
    )
    yield mock.patch.object(triton.runtime.driver, "_active", driver)


def main() -> None:
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    json.dump({name: figures(*each) for name, *each in losses()}, sys.stdout)


if __name__ == "__main__":
    main()
