"""Loggers: a progress display, and the sinks that transformers.Trainer already knows, by name."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping
from typing import Any

from distily import hookimpl
from distily.errors import DistilyError
from distily.loggers import Logger


class Progress(Logger):
    """Step, loss, tokens a second and the time left: a live bar on a terminal, plain lines elsewhere."""

    aliases = ("console",)

    def start(self, config: Mapping[str, Any], total_steps: int) -> None:
        self.total = total_steps
        self.began = time.perf_counter()
        self.first: int | None = None
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = RichProgress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("training", total=total_steps)
            self.bar.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "loss" in metrics:
            text = f"loss {metrics['loss']:.4f}"
            if "tokens_per_second" in metrics:
                text += f"  {metrics['tokens_per_second']:,.0f} tokens/s"
        elif any(name.startswith("eval_") for name in metrics):
            shown = {name: value for name, value in metrics.items() if "memory" not in name and "seconds" not in name}
            text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if name.startswith("eval_"))
        else:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        else:
            print(f"step {step}/{self.total}  {text}  {self._left(step)}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201

    def _left(self, step: int) -> str:
        """Time left, from the steps of this process alone: a resumed run did not do the earlier ones."""
        if self.first is None:
            self.first, self.began = step, time.perf_counter()
        done = step - self.first
        if done <= 0 or step >= self.total:
            return ""
        seconds = (time.perf_counter() - self.began) / done * (self.total - step)
        return f"{seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"

    def finish(self) -> None:
        if getattr(self, "bar", None) is not None:
            self.bar.stop()


class _Sink(Logger):
    """A sink of transformers.Trainer; its package must be installed."""

    package = ""

    def __init__(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise DistilyError(
                f"logger {self.report_to}: package {self.package!r} is not installed; allowed: after pip install it."
            )


def _sink(name: str, package: str, title: str) -> type[_Sink]:
    return type(title, (_Sink,), {"report_to": name, "package": package, "__doc__": f"{title}, by transformers' own callback."})


@hookimpl
def distily_loggers() -> dict[str, object]:
    sinks = {
        "tensorboard": ("tensorboard", "TensorBoard"),
        "wandb": ("wandb", "WeightsAndBiases"),
        "mlflow": ("mlflow", "MLflow"),
        "trackio": ("trackio", "Trackio"),
        "comet_ml": ("comet_ml", "Comet"),
        "clearml": ("clearml", "ClearML"),
        "neptune": ("neptune", "Neptune"),
        "swanlab": ("swanlab", "SwanLab"),
        "dvclive": ("dvclive", "DVCLive"),
    }
    return {"progress": Progress, **{name: _sink(name, *rest) for name, rest in sinks.items()}}
