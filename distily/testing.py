"""The conformance kit: what every kind of component promises, checked in seconds on a CPU, without downloads.

    def test_tvd():
        check_objective(tvd, reference=my_own_tvd, temperature=2.0)

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
from torch import Tensor, nn

from distily.conformance import Subject, close, contract, numbers, relations, require, through_the_driver
from distily.errors import DistilyError, RunError, unknown
from distily.evaluation import EvaluationContext, Evaluator, measure
from distily.hookspecs import KINDS, Factory
from distily.layers import layer_pairs
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


def _layer_mapper(subject: Subject) -> Iterator[str]:
    yield "pairs"
    worked = 0
    for depths in ((1, 1), (2, 2), (2, 6), (6, 12), (12, 12), (6, 4)):
        mapper = subject.make()
        try:
            pairs = list(mapper(*depths))
        except ValueError:  # it refuses these depths
            continue
        whole = all(len(pair) == 2 and {type(block) for block in pair} == {int} for pair in pairs)
        require(whole, f"{pairs} are not pairs of integers")
        require(pairs == list(mapper(*depths)), f"the pairs for depths {depths} are not the same twice")
        try:
            worked += len(layer_pairs(subject.entry.name, mapper, *depths))
        except DistilyError as error:  # options may name blocks that small models lack
            require(subject.options, str(error))
    require(worked, "it refused every depth")


def _projector(subject: Subject) -> Iterator[str]:
    yield "projection"
    worked = 0
    for widths in ((8, 8), (6, 8), (8, 6)):
        make = subject.make()
        try:
            module = make(*widths)
        except ValueError:  # it refuses these widths
            continue
        require(isinstance(module, nn.Module), f"it made {type(module).__name__}, not a module")
        module, features = module.double(), torch.randn(2, 3, widths[0], dtype=torch.float64, requires_grad=True)
        projected = module(features)
        require(projected.shape == (2, 3, widths[1]), f"widths {widths}: (2, 3, {widths[0]}) became {tuple(projected.shape)}")
        close(module(features[1:, 1:2]), projected[1:, 1:2], 1e-9, "a row's projection depends on other rows")
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(projected.square().sum(), [features, *trained], allow_unused=True)
        require(all(each is not None and each.isfinite().all() for each in gradients), "a gradient is missing or not finite")
        worked += 1
    require(worked, "it refused all widths")


def _normalizer(subject: Subject) -> Iterator[str]:
    yield "normalization"
    normalize = subject.make()
    for dtype in (torch.float32, torch.float64):
        features = torch.randn(2, 3, 8, dtype=dtype)
        features[0, 0] = 0.0
        kept = features.clone()
        result = normalize(features)
        require(result.shape == kept.shape, f"{tuple(kept.shape)} became {tuple(result.shape)}")
        require(result.dtype == dtype, f"{dtype} became {result.dtype}")
        require(result.isfinite().all(), "a value is not finite; one row was 0")
        require(torch.equal(features, kept), "it changed its argument in place")
        close(normalize(kept[1:, 1:2]), result[1:, 1:2], 1e-6, "a row depends on other rows")
        require(normalize(kept[1].requires_grad_()).requires_grad, "it cuts the gradient off")
    yield "no host synchronisation"
    normalize(torch.empty(2, 3, 8, device="meta"))


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
    "layer_mappers": (_layer_mapper,),
    "projectors": (_projector,),
    "normalizers": (_normalizer,),
    "quantizers": (_quantizer,),
    "evaluators": (_evaluator,),
    "loggers": (_logger,),
}
