"""Measure the losses against those of other libraries: time, memory, growth.

A ratio is our time over the other's, in interleaved runs forward and backward: less is better.
"Plain" is the loss as a user would write it in a few lines of PyTorch, "compiled" the same under
torch.compile. Kernels and traffic are what a GPU would run: counted, not timed. Without options
all rows are measured, which takes some minutes.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.bench_rows import ROWS, Race, Size, loss_rows
from common.bench_sizes import measure_sizes
from common.bench_tables import check_markers, line, markdown, summary, write_between
from common.benchmark import Load, Step, Work, can_compile, compare, counted
from common.config import parse
from common.errors import UsageError, usage_errors
from common.report import plot_ratios, plot_sizes

import torch
from jsonargparse.typing import PositiveInt

from detseg_losses import SpecError


@dataclass
class BenchmarkConfig:
    """Benchmark.

    Args:
        rows: Which rows to measure; by default all of them.
        loss: Instead of the rows, a loss string, such as "dice" or "ce + lovasz".
        shape: With loss: the shape of the logits, (B, C, *) of masks and (*, K) of heads; of boxes
            and offsets the first number alone counts.
        rounds: How often each side is timed, in turns: more often where it is short, less where it
            takes seconds.
        threads: Threads of the CPU.
        device: cpu or cuda; by default a GPU where there is one.
        sizes: Instead of the rows, measure four losses on 1e2 to 1e8 elements and draw this
            picture, .svg or .png.
        output: Folder for results.json, and of the rows ratios.png.
        write: Text file, such as BENCHMARKS.md, between whose two markers all tables go.
    """

    rows: list[str] | None = None
    loss: str | None = None
    shape: list[PositiveInt] | None = None
    rounds: PositiveInt = 15
    threads: PositiveInt = 2
    device: str = "auto"
    sizes: str | None = None
    output: str | None = None
    write: str | None = None


@usage_errors(UsageError, SpecError)
def main() -> None:
    """Run the tool."""
    config = parse(BenchmarkConfig, __doc__)
    _check(config)
    torch.set_num_threads(config.threads)
    device = _device(config.device)
    machine = _machine(device, config.threads)
    print(machine, flush=True)
    load = Load()
    if not can_compile(device):
        print("there is no C++ compiler: nothing is compiled")
    if config.sizes is not None:
        sizes = measure_sizes(config.rounds, device)
        machine += _told(load)
        plot_sizes(sizes, machine, Path(config.sizes))
        print(f"picture: {config.sizes}")
        _keep(config, machine, sizes)
        return
    results = []
    sources = (
        [loss_rows(config.loss, config.shape)]
        if config.loss is not None
        else [ROWS[name] for name in config.rows or ROWS]
    )
    for source in sources:
        for entry in source(device):
            result = _measure(entry, config.rounds, device)
            results.append(result)
            print(line(result), flush=True)
    machine += _told(load)
    print(f"{summary(results)}{machine}")
    _keep(config, machine, results)
    if config.output is not None:
        races = [result for result in results if "ratios" in result]
        plot_ratios(races, Path(config.output, "ratios.png"))
    if config.write is not None:
        write_between(Path(config.write), f"{machine}.\n\n{markdown(results)}")


def _keep(config: BenchmarkConfig, machine: str, results: list[dict[str, Any]]) -> None:
    """Write results.json, where it is wanted."""
    if config.output is None:
        return
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "rounds": config.rounds, "results": results}
    (output / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"results: {output}")


def _check(config: BenchmarkConfig) -> None:
    unknown = [name for name in config.rows or [] if name not in ROWS]
    if unknown:
        raise UsageError(f"there are no rows {unknown[0]!r}; there are {', '.join(ROWS)}")
    if config.loss is not None and config.rows is not None:
        raise UsageError("--loss stands in for the rows: give one of --loss and --rows")
    if config.shape is not None and config.loss is None:
        raise UsageError("--shape is that of --loss, which is missing")
    if config.rounds < 3:
        raise UsageError("--rounds must be at least 3: quartiles need them")
    if config.sizes is not None and (config.rows or config.loss or config.write):
        raise UsageError("--sizes has losses of its own: leave out --rows, --loss and --write")
    if config.sizes is not None and Path(config.sizes).suffix not in (".svg", ".png"):
        raise UsageError(f"--sizes {config.sizes} must end in .svg or .png")
    if config.sizes is not None and not Path(config.sizes).parent.is_dir():
        raise UsageError(f"--sizes {config.sizes} is in a folder that does not exist")
    if config.write is not None and (config.rows or config.loss):
        raise UsageError("--write takes all rows: leave out --rows and --loss")
    if config.write is not None:
        check_markers(Path(config.write))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"--device {name} is not there; take cpu or, on a machine with one, cuda")
    return torch.device(name)


def _machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        capability = torch.backends.cpu.get_cpu_capability()
        name = names[0] if names else platform.machine()
        processor = f"{name} ({capability}), {threads} threads"
    return f"torch {torch.__version__}, {processor}"


def _told(load: Load) -> str:
    """How much the machine had to do beside."""
    share = load.of_others()
    return "" if share is None else f"; other processes took {share:.0%} of the processors"


def _measure(entry: Race | Size, rounds: int, device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {"work": entry.work, "against": entry.against}
    if isinstance(entry, Size):
        met = None if entry.limit is None else entry.value <= entry.limit
        return result | {"value": entry.value, "limit": entry.limit, "met": met}
    works: dict[str, Work] = {"ours": entry.ours, "peer": entry.peer}
    result["kernels"] = {}
    if entry.plain is not None and isinstance(entry.ours, Step):
        works["plain"] = Step(entry.plain, entry.ours.inputs)
        for name, step in works.items():
            if isinstance(step, Step):
                # Ours works in blocks on the CPU.
                result["kernels"][name] = counted(step, anywhere=name != "ours")
        if can_compile(device):
            torch.compiler.reset()  # else sizes would be taken for variable ones
            compiled = torch.compile(entry.plain, fullgraph=True)
            works["compiled"] = Step(compiled, entry.ours.inputs)
    result["times"], ratios = compare(works, rounds, device)
    result["ratios"] = {}
    for name, ratio in ratios.items():
        limit = entry.limits.get(name)
        met = None if limit is None else ratio.mid <= limit
        result["ratios"][name] = asdict(ratio) | {"limit": limit, "met": met}
    return result


if __name__ == "__main__":
    main()
