"""What all measurements share: interleaved timing, peak memory of a fresh process, a table, a JSON file."""

import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import timm
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("anomalib", "lightning", "openvino", "timm", "torch")


def interleaved(cases: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each case, timed in turns (A B C A B C ...) after a first turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if device != "cpu":
                torch.accelerator.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(make: Callable[..., Callable[[], object]], *arguments: object) -> int:
    """Bytes that a case takes beyond the imports, at most, in a fresh process.

    Args:
        make (Callable): Builds the case; a function of a module.
        *arguments (object): Its arguments.

    Returns:
        int: Peak of the resident memory while the case runs twice, with what it was built of.
    """
    # Large blocks of memory go back to the system at once, rather than when malloc thinks fit.
    settled = patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    with settled, multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (torch.get_num_threads(), make, *arguments))


def _peak_memory(threads: int, make: Callable[..., Callable[[], object]], *arguments: object) -> int:
    torch.set_num_threads(threads)
    torch.nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 32, 32))  # libraries allocate on first use
    before = psutil.Process().memory_info().rss
    case = make(*arguments)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    for _ in range(2):
        case()
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


@contextmanager
def random_weights() -> Iterator[None]:
    """Let timm make backbones with random weights, also for models that insist on pre-trained ones."""
    create = timm.create_model
    with patch("timm.create_model", lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False})):
        yield


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table in Markdown."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    print(f"\n{title}\n")
    for number, line in enumerate(cells):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def save(name: str, settings: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> None:
    """Write tables as ``results/NAME.json``, with what they were measured on."""
    machine = {
        "date": datetime.now(tz=timezone.utc).date().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, "settings": settings, **tables}, indent=1, default=str) + "\n")
    print(f"\n{path}")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()


def _text(value: Any) -> str:  # noqa: ANN401
    return f"{value:.2f}" if isinstance(value, float) else str(value)
