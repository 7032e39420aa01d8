"""What a benchmark ran on (command, machine, driver, versions, commit) and what the GPU did meanwhile (clocks, power, temperature)."""

from __future__ import annotations

import datetime
import shlex
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distily.environment import commit, machine, versions

SMI = "nvidia-smi"
WATCHED = {"clocks.sm": "SM MHz", "clocks.mem": "memory MHz", "power.draw": "W", "temperature.gpu": "°C"}


def provenance(*packages: str) -> dict[str, Any]:
    """Command, day, machine, driver, commit and versions, also those of ``packages``."""
    found = versions()
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "driver": driver(),
        "commit": commit(),
        "versions": found,
    }


def sentence(facts: dict[str, Any]) -> str:
    """``provenance`` as Markdown."""
    described = facts["machine"]
    hardware = ", ".join(described.get("gpus", [])) or f"{described['cores']} CPU cores"
    return (
        f"Command: `{facts['command']}`, {facts['day']}. Machine: {hardware}, driver {facts['driver'] or 'none'}, "
        f"CUDA {described.get('cuda', 'none')}. Commit: {facts['commit']}.\n"
        f"Versions: {', '.join(f'{name} {value}' for name, value in facts['versions'].items())}."
    )


def driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    try:
        answer = subprocess.run(
            [SMI, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip()


class Clocks:
    """Twice a second while open: what ``nvidia-smi`` reads off the first GPU. Without one it holds nothing."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, list[float]]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clocks:
        query = [SMI, "--id=0", f"--query-gpu={','.join(WATCHED)}", "--format=csv,noheader,nounits", "--loop-ms=500"]
        try:
            self._process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                self.samples.append((time.monotonic(), [float(each) for each in line.split(",")]))
            except ValueError:  # "[N/A]" where the driver does not say
                continue

    def since(self, began: float) -> dict[str, list[float]]:
        """Lowest, median and highest of every quantity since ``time.monotonic()`` was ``began``; empty without samples."""
        rows = [values for when, values in self.samples if when >= began]
        columns = zip(*rows, strict=True)
        return {
            name: [min(column), statistics.median(column), max(column)]
            for name, column in zip(WATCHED.values(), columns, strict=False)
        }


def clocks_sentence(seen: dict[str, list[float]]) -> str:
    """``Clocks.since`` in words."""
    if not seen:
        return "Clocks: not seen."
    return (
        "Clocks, median (lowest–highest): "
        + ", ".join(f"{middle:g} ({low:g}–{high:g}) {name}" for name, (low, middle, high) in seen.items())
        + "."
    )
