"""The conformance kit: what every kind of component promises, checked in seconds on a CPU, without downloads.

    def test_hellinger():
        check_objective(hellinger, reference=my_own_hellinger, temperature=2.0)

Every ``check_…(factory, **options)`` returns the names of the checks that passed. A check that fails raises ``AssertionError``
with one line: the component, the check, what was seen. Wrong options raise ``DistilyError``.
Inside, the checks of a kind are one generator, which yields the name of each check before it.

Letters: n rows, W their width (the vocabulary for logits), N supervised tokens, H hidden width, B batch, S sequence.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distily.conformance.combiners import combiners
from distily.conformance.features import layer_mappers, normalizers, projectors
from distily.conformance.objectives import Subject, contract, numbers, relations, require, through_the_driver
from distily.errors import DistilyError, RunError, unknown
from distily.evaluation import EvaluationContext, Evaluator, measure
from distily.hookspecs import KINDS, Factory
from distily.loggers import Logger
from distily.plugins import Offered, Plugins
from distily.quantization import Quantizer


def check_objective(factory: Factory, *, reference: Callable[..., Any] | None = None, **options: Any) -> list[str]:
    """Checks an objective. ``reference``: an independent implementation, called with the same float64 rows, inputs and options;
    it returns the rows' values, or a row set's mean. Without one, a wrong formula and swapped arguments go unnoticed.

    That an objective never waits for the device is checked on ``meta``, a device whose values nobody can read, and, where there
    is a GPU, there too. So an objective may have a solver of its own for the CPU, as long as other devices do not come to it.
    """
    return _check("objectives", factory, options, reference=reference)


def _checker(kind: str) -> Callable[..., list[str]]:
    def check(factory: Factory, **options: Any) -> list[str]:
        return _check(kind, factory, options)

    check.__doc__ = f"Checks a {KINDS[kind]} with these options."
    return check


check_layer_mapper, check_projector, check_normalizer = map(_checker, ("layer_mappers", "projectors", "normalizers"))
check_combiner = _checker("combiners")
check_quantizer, check_evaluator, check_logger = map(_checker, ("quantizers", "evaluators", "loggers"))


def check_package(plugins: Plugins, name: str) -> Iterator[str]:
    """Checks every component of an installed plugin with its default options, and yields a line for each.

    Raises ``DistilyError`` for an unknown plugin and ``RunError``, one line for each failure, at the end.
    """
    package = next((entry for entry in plugins.packages if entry.name == name), None)
    if package is None:
        raise DistilyError(unknown("plugin", name, [entry.name for entry in plugins.packages]))
    if package.error or not package.components:
        raise RunError(f"plugin {name}: {package.error or 'it offers no component'}.")
    failures = []
    for entry in package.components:
        where = f"{KINDS[entry.kind]} {entry.name}"
        missing = [option.name for option in entry.options.values() if option.required]
        try:
            if missing:
                raise DistilyError(f"option {missing[0]!r} has no default; a test can give one to distily.testing.")
            yield f"{where}: {len(_check(entry.kind, entry.factory, {}, entry.name))} checks passed"
        except DistilyError as error:
            yield f"{where}: not checked: {error}"
        except AssertionError as error:
            failures.append(str(error))
    if failures:
        raise RunError("\n".join(failures))


def _check(kind: str, factory: Factory, given: Mapping[str, Any], name: str = "", reference: Any = None) -> list[str]:
    """Runs the checks of a kind. Raises ``DistilyError`` for wrong options and for a component that cannot work here."""
    subject = Subject(Offered(kind, name or getattr(factory, "__name__", str(factory)), factory, ""), given, reference)
    passed: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a few numbers lose by threads, on a busy machine very much
    try:
        with torch.random.fork_rng(devices=[]):
            for checks in (contract, *CHECKS[kind]):
                for label in checks(subject):
                    passed.append(label)
    except Exception as error:
        if isinstance(error, DistilyError) and passed == ["contract"]:
            raise
        reason = " ".join(str(error).split())[:300]
        seen = reason if isinstance(error, AssertionError) else f"it raised {type(error).__name__}: {reason}"
        raise AssertionError(f"{subject.where}: {passed[-1]}: {seen}") from error
    finally:
        torch.set_num_threads(threads)
    return passed


def _tiny_llama(vocabulary: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, pad_token_id=None, **sizes)).eval()


def _snapshot(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _same(before: Mapping[str, Tensor], model: Any, what: str) -> None:
    now = model.state_dict()
    require(now.keys() == before.keys(), f"{what} changed state-dict keys: {sorted(now.keys() ^ before.keys())[:3]}")
    changed = [name for name in now if not torch.equal(now[name], before[name])]
    require(not changed, f"{what} changed {changed[:3]}")


def _quantizer(subject: Subject) -> Iterator[str]:
    yield "preparation"
    student, quantizer, tokens = _tiny_llama(), subject.make(), torch.arange(8)[None]
    before, names = _snapshot(student), [name for name, each in student.named_parameters() if each.requires_grad]
    require(isinstance(quantizer, Quantizer), "it is not a Quantizer")
    student = quantizer.prepare(student)
    _same(before, student, "prepare")
    student(input_ids=tokens, labels=tokens).loss.backward()
    gradients = {name: each.grad for name, each in student.named_parameters()}
    dead = [name for name in names if gradients.get(name) is None or not gradients[name].isfinite().all()]
    require(not dead, f"parameters without a finite gradient: {dead[:3]}")
    yield "progress"
    results = []
    for steps in ((0, 5, 9, 2), (2,)):
        quantizer = subject.make()
        student = quantizer.prepare(_tiny_llama())
        for step in steps:
            quantizer.on_progress(student, step, 10)
        results.append(student(input_ids=tokens).logits)
    require(torch.equal(*results), "step 2 after other steps is another model than step 2 at once")
    yield "conversion"
    quantizer.on_progress(student, 10, 10)
    tensors, entry = quantizer.convert(student)
    require(tensors and all(isinstance(each, Tensor) for each in tensors.values()), "convert gave no mapping of tensors")
    require("quant_method" in entry, "the quantization_config that convert gave has no quant_method")
    _same(before, student, "convert")


def _evaluator(subject: Subject) -> Iterator[str]:
    yield "numbers"
    from datasets import Dataset

    from distily.data import collator_for
    from distily.heldout import HeldOut
    from distily.models import load_tokenizer

    tokenizer, evaluator = load_tokenizer("demo", "tokenizer"), subject.make()
    require(isinstance(evaluator, Evaluator), "it is not an Evaluator")
    model, teacher = _tiny_llama(len(tokenizer)), _tiny_llama(len(tokenizer))
    before = _snapshot(model)
    tokens = torch.randint(100, (4, 16)).tolist()
    texts = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    for other in (teacher, None):
        held_out = HeldOut(texts, collator_for(tokenizer), other, len(tokenizer), 2)
        with tempfile.TemporaryDirectory() as folder:
            context = EvaluationContext(tokenizer, held_out.token_means, other is not None, 2, folder)
            results = [measure({subject.entry.name: copy.deepcopy(evaluator)}, model, context) for _ in range(2)]
        require(results[0] or other is None, "it gave no number")
        require(str(results[0]) == str(results[1]), f"the same model gave {results[0]}, then {results[1]}")
        _same(before, model, "the evaluator")
        require(all(each.requires_grad for each in model.parameters()), "the evaluator froze the model")


def _logger(subject: Subject) -> Iterator[str]:
    yield "run"
    logger = subject.make()
    require(isinstance(logger, Logger), "it is not a Logger")
    if logger.report_to is not None:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        require(logger.report_to in INTEGRATION_TO_CALLBACK, f"transformers knows no sink {logger.report_to!r}")
        return
    metrics = [{"loss": 2.0, "grad_norm": 1.0}, {"eval_perplexity": float("inf")}, {"train_runtime": 1.0}, {}]
    given = copy.deepcopy(metrics)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        subject.make().finish()  # the run failed before it started
        logger.start({"objectives": [{"name": "forward_kl"}], "train": {"max_steps": 4}}, 4)
        for step, values in enumerate(given):
            logger.log(values, step)
        logger.finish()
    require(given == metrics, "it changed the metrics that it was given")


CHECKS: dict[str, tuple[Callable[[Subject], Iterator[str]], ...]] = {
    "objectives": (numbers, relations, through_the_driver),
    "layer_mappers": (layer_mappers,),
    "projectors": (projectors,),
    "normalizers": (normalizers,),
    "combiners": (combiners,),
    "quantizers": (_quantizer,),
    "evaluators": (_evaluator,),
    "loggers": (_logger,),
}
