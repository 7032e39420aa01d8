"""Evaluator ``lm_eval``: tasks of EleutherAI's lm-evaluation-harness on the model in memory.

lm_eval:tasks=[arc_easy,piqa@piqa_validation.parquet,my_task.yaml],shots=0,limit=100
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from distily.errors import DistilyError, nearest, wrong
from distily.evaluation import EvaluationContext, Evaluator
from distily.hookspecs import hookimpl
from distily.schema import Between

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""The suffix of a data file and the ``datasets`` builder that reads it."""

BOOTSTRAP_DRAWS = 1000
"""For standard errors without a closed form; lm-eval's 100,000 draws take minutes of CPU."""


@dataclass(frozen=True)
class TaskSource:
    """One entry of ``tasks``, taken apart."""

    entry: str
    name: str
    rows: Path | None = None
    examples: Path | None = None
    is_yaml: bool = False

    @classmethod
    def parse(cls, entry: str) -> TaskSource:
        """``name``, ``name@rows``, ``name@rows@examples`` or the path of a ``.yaml`` file."""
        if entry.endswith((".yaml", ".yml")):
            return cls(entry, str(_absolute(entry)), is_yaml=True)
        name, at, files = entry.partition("@")
        if not at:
            return cls(entry, name)
        # A path may have an "@" in it: what exists as a whole is one file.
        if "@" not in files or _absolute(files).is_file():
            return cls(entry, name, _absolute(files))
        rows, _, examples = files.partition("@")
        return cls(entry, name, _absolute(rows), _absolute(examples))

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.rows, self.examples) if path is not None]

    def mistakes(self) -> list[str]:
        """What is wrong with this entry as far as the file system can tell, one line each."""
        where = f"lm_eval: task {self.entry!r}"
        needed = [Path(self.name)] if self.is_yaml else self.files
        missing = [f"{where}: no file {str(path)!r}." for path in needed if not path.is_file()]
        if missing:
            return missing
        builders = {_builder(path) for path in self.files}
        if None in builders:
            return [f"{where}: a data file ends in {', '.join(BUILDERS)} (or with .gz behind)."]
        if len(builders) > 1:
            return [f"{where}: the rows and the examples must be files of one format."]
        return []


class LMEval(Evaluator):
    """Scores of lm-eval tasks: ``<task>_<metric>`` and mostly also ``<task>_<metric>_stderr``.

    ``tasks``: each entry is
      - a name that lm-eval knows (task, group or tag): data from the hub, offline from its cache;
      - ``name@file``: that task on the rows of a local parquet, jsonl, json or csv file, offline;
      - ``name@file@examples``: the same with the few-shot examples from a second file;
      - the path of a task's own ``.yaml`` file, in lm-eval's format.

    ``shots``: number of few-shot examples in place of each task's own; as in lm-eval, a task that
    fixes 0 keeps 0. With ``name@file`` they are other rows of the same file. ``limit``: only the
    first rows of each task. ``seed``: picks the examples. ``batch_size``: the run's if not given.

    Construction checks options and files; ``prepare`` checks task names and loads the data.
    """

    during_training = False

    def __init__(
        self,
        *,
        tasks: list[str],
        shots: Annotated[int, Between(0)] | None = None,
        limit: Annotated[int, Between(1)] | None = None,
        seed: Annotated[int, Between(0)] = 1234,
        batch_size: Annotated[int, Between(1)] | None = None,
    ) -> None:
        self.sources = [TaskSource.parse(entry) for entry in tasks]
        mistakes = [line for source in self.sources for line in source.mistakes()]
        if not tasks:
            mistakes.append(wrong("lm_eval: tasks", tasks, "a list of at least one task"))
        if mistakes:
            raise DistilyError("\n".join(mistakes))
        self.shots, self.limit, self.seed, self.batch_size = shots, limit, seed, batch_size
        self._loaded: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Look up the task names and load the data, once; ``DistilyError`` for what is wrong."""
        if self._loaded is None:
            with _quiet(), _random_state_kept(self.seed):
                self._loaded = _load(self.sources)

    def evaluate(self, model: PreTrainedModel, context: EvaluationContext) -> dict[str, float]:
        self.prepare()
        assert self._loaded is not None
        batch_size = self.batch_size or context.batch_size
        with _quiet(), _random_state_kept(self.seed, model.device), _left_as_it_is(model):
            _set_shots(self._loaded["tasks"], self.shots, self.seed)
            # How lm-eval refuses a request, such as more shots than rows; the rest keeps its trace.
            with _as_distily_error("lm_eval", AssertionError, ValueError):
                results = _run(model, context.tokenizer, self._loaded, batch_size, self.limit)
        return _flat(results)


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _builder(path: Path) -> str | None:
    return BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


@functools.lru_cache(maxsize=1)
def _task_manager() -> Any:
    """lm-eval's index of tasks; cached, since it reads some 14,000 YAML files."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped,unused-ignore]

    return TaskManager()


def _load(sources: list[TaskSource]) -> dict[str, Any]:
    """The tasks and groups of all sources, with data, as ``lm_eval.evaluate`` takes them."""
    manager = _task_manager()
    mistakes = [line for source in sources for line in _mistakes(source, manager.task_index)]
    if mistakes:
        raise DistilyError("\n".join(mistakes))
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    # `datasets` always writes a cache: that of local files goes where it is removed again.
    with tempfile.TemporaryDirectory(prefix="distily-lm-eval-") as cache:
        for source in sources:
            where = f"lm_eval: task {source.entry!r} could not be loaded"
            with _as_distily_error(where, Exception):
                loaded = manager.load([_specification(source, manager.task_index, cache)])
            for twice in sorted(tasks.keys() & loaded["tasks"].keys()):
                raise DistilyError(f"lm_eval: {twice!r} is in tasks twice: {source.entry!r}.")
            tasks.update(loaded["tasks"])
            if source.rows is None:
                groups.update(loaded["groups"])
    return {"tasks": tasks, "groups": groups}


def _mistakes(source: TaskSource, index: Mapping[str, Any]) -> list[str]:
    """What is wrong with an entry in the light of lm-eval's index (too many names to list)."""
    if source.is_yaml:
        return []
    if source.name not in index:
        close = nearest(source.name, index)
        guess = f"; did you mean {close!r}?" if close else "."
        return [
            f"lm_eval: task {source.name!r} is unknown{guess} Allowed: one of lm-eval's "
            f"{len(index):,} names ('lm-eval ls tasks' lists them), also as name@file, "
            "or the path of a task's .yaml file."
        ]
    kind, config = index[source.name].kind.name, index[source.name].cfg or {}
    replaceable = kind == "TASK" and not config.get("custom_dataset") and _split(config)
    if source.rows is not None and not replaceable:
        return [
            f"lm_eval: task {source.entry!r}: {source.name!r} is a group of tasks or loads its "
            "data by code of its own; name@file takes a single task that reads a data set."
        ]
    return []


def _split(config: Mapping[str, Any]) -> str | None:
    """The split that a task is evaluated on."""
    return config.get("test_split") or config.get("validation_split")


def _specification(source: TaskSource, index: Mapping[str, Any], cache: str) -> Any:
    """A source for ``TaskManager.load``: a name, a path, or the official task with other data."""
    if source.rows is None:
        return source.name
    config = index[source.name].cfg
    split = fewshot_split = _split(config)
    data_files = {split: str(source.rows)}
    if source.examples is not None:
        fewshot_split = "fewshot_examples"
        data_files[fewshot_split] = str(source.examples)
    elif (config.get("fewshot_config") or {}).get("samples"):
        fewshot_split = None  # the task brings its examples along
    local = {
        "task": source.name,
        "dataset_path": _builder(source.rows),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data_files, "cache_dir": cache, "keep_in_memory": True},
        # lm-eval keeps a row out of its own examples only if these two name the same split.
        "test_split": split,
        "fewshot_split": fewshot_split,
        "training_split": None,
        "validation_split": None,
    }
    # A member of a group is lm-eval's documented way to change settings of a registered task.
    return {"group": "local_files", "task": [local]}


def _set_shots(tasks: Mapping[str, Any], shots: int | None, seed: int) -> None:
    """The rules of ``lm_eval.simple_evaluate``; seeded anew, so that all evaluations are alike."""
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if shots is not None and own != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)


def _run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: dict[str, Any], batch_size: int, limit: int | None
) -> dict[str, dict[str, Any]]:
    """lm-eval's results by task.

    Not ``simple_evaluate``, which also asks the hub about the model and runs pip and git.
    """
    import lm_eval  # type: ignore[import-untyped,unused-ignore]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped,unused-ignore]

    # A copy, since HFLM gives the tokenizer a padding token.
    wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    results = lm_eval.evaluate(lm=wrapped, task_dict=loaded, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAP_DRAWS)
    return dict(results["results"])


def _flat(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``{task: {"acc_stderr,none": x}}`` as ``{"task_acc_stderr": x}``; other filters are named."""
    flat: dict[str, float] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            # Keys without a comma are no metrics (alias, ...); a standard error can be "N/A".
            if not comma or not isinstance(value, Real):
                continue
            ending = "_stderr" if metric.endswith("_stderr") else ""
            parts = [task, metric.removesuffix("_stderr")]
            if filter_name != "none":
                parts.append(filter_name.replace("-", "_"))
            flat["_".join(parts) + ending] = float(value)
    return flat


@contextlib.contextmanager
def _as_distily_error(where: str, *kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds as one line; the original stays as the cause."""
    try:
        yield
    except MemoryError:
        raise
    except kinds as error:
        # `datasets` only says that reading failed; why is in what it wrapped.
        reason = error.__cause__ or error
        text = " ".join(str(reason).split()) or "no reason given"
        raise DistilyError(f"{where}: {type(reason).__name__}: {text}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, prints or log lines below errors, and no worker processes."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    in_one_process = os.environ.get("DISABLE_MULTIPROC")
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # For its bootstrap lm-eval would fork the training process, threads and GPU context included.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        del os.environ["DISABLE_MULTIPROC"]
        if in_one_process is not None:
            os.environ["DISABLE_MULTIPROC"] = in_one_process


@contextlib.contextmanager
def _random_state_kept(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Python, numpy and torch seeded inside and put back after: training goes on unchanged."""
    import numpy
    import torch

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    gpus = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus):
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            # Not torch.manual_seed, which also seeds devices whose state is not saved here.
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def _left_as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """Keep HFLM from changing a model: it sets evaluation mode and ties the embeddings anew."""
    modes = {module: module.training for module in model.modules()}
    own = vars(model)
    shadowed = own.get("tie_weights")
    own["tie_weights"] = lambda: None
    try:
        yield
    finally:
        del own["tie_weights"]
        if shadowed is not None:
            own["tie_weights"] = shadowed
        for module, training in modes.items():
            module.training = training


@hookimpl
def distily_evaluators() -> dict[str, type[Evaluator]]:
    """The evaluator of this plugin."""
    return {"lm_eval": LMEval}
