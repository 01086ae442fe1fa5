"""The results of the benchmark as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from common.errors import UsageError

OTHERS = {
    "peer": "the other library",
    "plain": "plain PyTorch",
    "compiled": "plain PyTorch, compiled",
}
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
BANDWIDTH = 2e12
"""Bytes that a large GPU moves in a second."""

Result = dict[str, Any]


def line(result: Result) -> str:
    """One result, as the tool prints it."""
    if "value" in result:
        return f"{result['work']} / {result['against']}: {_size(result)}".replace(" / :", ":")
    parts = [f"{result['against']} {_ratio(result, 'peer')}"]
    parts += [
        f"{name} {_ratio(result, name)}" for name in ("plain", "compiled") if _ratio(result, name)
    ]
    kernels = [f"{_count(result, name)}" for name in ("ours", "peer", "plain")]
    text = f"{result['work']}: {_number(result['times']['ours'])} ms; against {', '.join(parts)}"
    if any(kernels):
        text += f"; kernels / traffic {', '.join(each or '?' for each in kernels)}"
    return text.replace("**", "")


def summary(results: Sequence[Result]) -> str:
    """What is slower than the other, and what misses its limit."""
    lines = []
    for name, others in OTHERS.items():
        # A limit over 1 is of something that does less.
        pairs = [
            (race, race["ratios"][name])
            for race in results
            if name in race.get("ratios", {}) and (race["ratios"][name]["limit"] or 0) <= 1
        ]
        slower = [f"{race['work']} {ratio['mid']:.2f}" for race, ratio in pairs if ratio["mid"] > 1]
        if pairs:
            told = f" (with the ratio): {'; '.join(slower)}" if slower else ""
            lines.append(f"- Slower than {others} in {len(slower)} of {len(pairs)} rows{told}.\n")
    missed = [
        f"{result['work']} against {others if name != 'peer' else result['against']}"
        for result in results
        for name, others in OTHERS.items()
        if result.get("ratios", {}).get(name, result if name == "peer" else {}).get("met") is False
    ]
    told = f": {'; '.join(missed)}" if missed else ""
    lines.append(f"- Limits missed: {len(missed)}{told}.\n")
    return "".join(lines)


def markdown(results: Sequence[Result]) -> str:
    """Tables of the times, of what was counted, and of everything else."""
    races = [result for result in results if "ratios" in result]
    parts = [summary(results)]
    if races:
        head = "work", "against", "ms", "its ms", "ours / its", "quartiles", "/ plain", "/ compiled"
        rows = [
            [
                race["work"],
                race["against"],
                _number(race["times"]["ours"]),
                _number(race["times"]["peer"]),
                _ratio(race, "peer"),
                f"{race['ratios']['peer']['low']:.2f} to {race['ratios']['peer']['high']:.2f}",
                _ratio(race, "plain"),
                _ratio(race, "compiled"),
            ]
            for race in races
        ]
        parts.append("## Times\n\n" + _table(head, rows))
    counted = [race for race in races if race["kernels"]]
    if counted:
        head = ("work", "ours", "against", "its", "plain", "at least us", "its", "plain")
        rows = [
            [
                race["work"],
                _count(race, "ours"),
                race["against"],
                _count(race, "peer"),
                _count(race, "plain"),
                *(_at_least(race, name) for name in ("ours", "peer", "plain")),
            ]
            for race in counted
        ]
        parts.append("## Counted for a GPU\n\n" + _table(head, rows))
    sizes = [result for result in results if "value" in result]
    if sizes:
        rows = [
            [work, "; ".join(f"{each['against']} {_size(each)}".strip() for each in group)]
            for work, group in groupby(sizes, key=lambda each: each["work"])
        ]
        parts.append("## Memory and import\n\n" + _table(("what", "how much"), rows))
    return "\n".join(parts)


def check_markers(file: Path) -> None:
    """Refuse a file that results cannot be written into, before they are measured.

    Raises:
        UsageError: it cannot be read, or has no markers.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--write {file}: {error.strerror}") from error
    if END not in text.partition(BEGIN)[2]:
        raise UsageError(f"--write {file}: it lacks the lines {BEGIN} and {END}")


def write_between(file: Path, text: str) -> None:
    """Replace what stands between the two markers of a file."""
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _number(value: float) -> str:
    """Three digits, and those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _wanted(value: str, limit: float | None, bad: bool) -> str:
    text = value if limit is None else f"{value} (<= {limit:.3g})"
    return f"**{text}**" if bad else text


def _ratio(result: Result, other: str) -> str:
    """A ratio and its limit; bold where it is missed or we are slower."""
    ratio = result["ratios"].get(other)
    if ratio is None:
        return ""
    bad = ratio["met"] is False or (ratio["limit"] is None and ratio["mid"] > 1)
    return _wanted(_number(ratio["mid"]), ratio["limit"], bad)


def _size(result: Result) -> str:
    return _wanted(_number(result["value"]), result["limit"], result["met"] is False)


def _count(result: Result, name: str) -> str:
    count = result["kernels"].get(name)
    return "" if count is None else f"{count['kernels']} / {_number(count['traffic'])}x"


def _at_least(result: Result, name: str) -> str:
    count = result["kernels"].get(name)
    return "" if count is None else _number(count["bytes"] / BANDWIDTH * 1e6)
