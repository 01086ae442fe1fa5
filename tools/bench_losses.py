"""Measure the losses against those of other libraries: time, memory, growth.

A ratio is our time over the other's, in interleaved runs forward and backward: less is better.
Without options all rows are measured, which takes some minutes.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.bench_rows import ROWS, Race, Size, loss_rows
from common.benchmark import compare
from common.config import parse
from common.errors import UsageError, usage_errors
from common.report import plot_ratios

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
        pairs: Runs of each side.
        threads: Threads of the CPU.
        device: cpu or cuda; by default a GPU where there is one.
        output: Folder for results.json, results.md and ratios.png.
    """

    rows: list[str] | None = None
    loss: str | None = None
    shape: list[PositiveInt] | None = None
    pairs: PositiveInt = 15
    threads: PositiveInt = 2
    device: str = "auto"
    output: str | None = None


@usage_errors(UsageError, SpecError)
def main() -> None:
    """Run the tool."""
    config = parse(BenchmarkConfig, __doc__)
    unknown = [name for name in config.rows or [] if name not in ROWS]
    if unknown:
        raise UsageError(f"there are no rows {unknown[0]!r}; there are {', '.join(ROWS)}")
    if config.loss is not None and config.rows is not None:
        raise UsageError("--loss stands in for the rows: give one of --loss and --rows")
    if config.shape is not None and config.loss is None:
        raise UsageError("--shape is that of --loss, which is missing")
    if config.pairs < 3:
        raise UsageError("--pairs must be at least 3: quartiles need them")
    torch.set_num_threads(config.threads)
    device = _device(config.device)
    machine = _machine(device, config.threads)
    print(machine)

    results = []
    sources = (
        [loss_rows(config.loss, config.shape)]
        if config.loss is not None
        else [ROWS[name] for name in config.rows or ROWS]
    )
    for source in sources:
        for entry in source(device):
            result = _measure(entry, config.pairs, device)
            results.append(result)
            print(_line(result), flush=True)
    missed = [result for result in results if result["met"] is False]
    if missed:
        print(f"{len(missed)} of {len(results)} are not what they should be")
    if config.output is not None:
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine, "pairs": config.pairs, "results": results}
        (output / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (output / "results.md").write_text(_markdown(results), encoding="utf-8")
        plot_ratios([result for result in results if "mid" in result], output / "ratios.png")
        print(f"results: {output}")


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


def _measure(entry: Race | Size, pairs: int, device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {"work": entry.work, "against": entry.against, "limit": entry.limit}
    if isinstance(entry, Size):
        result["value"] = value = entry.value
    else:
        result |= asdict(compare(entry.ours, entry.peer, pairs, device))
        value = result["mid"]
    return result | {"met": None if entry.limit is None else value <= entry.limit}


def _numbers(result: dict[str, Any]) -> list[str]:
    """Milliseconds, ratio, quartiles and how many times as fast, as far as they are known."""
    if "mid" not in result:
        return ["", "", f"{result['value']:.3g}", "", ""]
    return [
        f"{result['ours']:.1f}",
        f"{result['peer']:.1f}",
        f"{result['mid']:.3f}",
        f"{result['low']:.3f} to {result['high']:.3f}",
        f"{1 / result['mid']:.1f}x",
    ]


def _wanted(result: dict[str, Any]) -> str:
    if result["limit"] is None:
        return ""
    return f"<= {result['limit']:.3g} {'yes' if result['met'] else 'NO'}"


def _line(result: dict[str, Any]) -> str:
    ours, peer, value, spread, faster = _numbers(result)
    told = f"{value} ({spread}), {faster} as fast; {ours} and {peer} ms" if ours else value
    against = f" / {result['against']}" if result["against"] else ""
    return f"{result['work']}{against}: {told}  {_wanted(result)}".rstrip()


def _markdown(results: list[dict[str, Any]]) -> str:
    head = ["work", "against", "ms", "its ms", "ratio", "quartiles", "as fast", "wanted, met"]
    rows = [head, ["---"] * len(head)]
    rows += [[r["work"], r["against"], *_numbers(r), _wanted(r)] for r in results]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
