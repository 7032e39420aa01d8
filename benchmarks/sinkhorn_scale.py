"""What does ``sinkhorn`` on logits cost at the vocabularies of real models, beside its naive versions? Forward and backward.

    PYTHONPATH=.:plugins python benchmarks/sinkhorn_scale.py [--rows 256] [--vocabulary 50257 151936] [--repeats 50] [--device cuda]

Every version computes the same divergence of the same logits with the same sweeps:

distily          the objective, in bf16, fp16 and fp32: one row of differences at a time, gradient by the sign formula
broadcasting     autograd through |s_i - t_j| for all pairs at once, in fp32
torch.cdist p=1  autograd through cdist, in fp32, and in bf16 as it comes

Time is the median of the repeats (at least 3, within a minute for each row of the table) after two more to warm up. Memory is the
highest that was allocated while it ran, less what was before; logits and their gradient are n · V each. Errors are relative to
broadcasting in float64 where that fits, else to distily in fp32. The naive versions' gradients also run through the sweeps, ours is that
of the plan that the sweeps reached: they differ by what is left to convergence (16 × 500 in float64: 6e-4 after 50 sweeps, 2e-4 after
500, 3e-5 after 5000).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from distily_sinkhorn import sinkhorn
from torch import Tensor

EPSILON, SWEEPS = 0.1, 50
SECONDS = 60.0
GIB = 2**30


def broadcast_cost(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, None] - right[None]).abs().sum(-1)


def cdist_cost(left: Tensor, right: Tensor) -> Tensor:
    return torch.cdist(left, right, p=1)


def naive(student: Tensor, teacher: Tensor, cost: Callable[[Tensor, Tensor], Tensor], widen: bool = True) -> Tensor:
    """The divergence with everything left to autograd, the sweeps too."""
    dtype = torch.promote_types(student.dtype, torch.float32) if widen else student.dtype
    s, t = student.softmax(-1, dtype=dtype), teacher.softmax(-1, dtype=dtype)

    def transported(left: Tensor, right: Tensor) -> Tensor:
        costs = cost(left, right)
        shift = torch.log(torch.tensor(float(len(costs)), device=costs.device))
        f, g = torch.zeros_like(costs[:, 0]), torch.zeros_like(costs[0])
        for _ in range(SWEEPS):
            g = EPSILON * (shift - torch.logsumexp((f[:, None] - costs) / EPSILON, 0))
            f = EPSILON * (shift - torch.logsumexp((g[None, :] - costs) / EPSILON, 1))
        return (f + g).mean()

    return transported(s, t) - transported(s, s) / 2 - transported(t, t) / 2


def distily(student: Tensor, teacher: Tensor) -> Tensor:
    return sinkhorn(student, teacher, epsilon=EPSILON, iterations=SWEEPS, tolerance=0.0).mean()


@dataclass
class Measured:
    """Of one version: seconds of each repeat, bytes at the peak, value and gradient of the last repeat."""

    seconds: list[float]
    peak: int
    value: float
    gradient: Tensor


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(version: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, repeats: int) -> Measured:
    on_gpu, seconds, start = student.device.type == "cuda", [], time.perf_counter()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    while len(seconds) < repeats + 2 and (len(seconds) < 5 or time.perf_counter() - start < SECONDS):
        leaf = student.detach().requires_grad_()
        synchronize(student.device)
        began = time.perf_counter()
        value = version(leaf, teacher)
        value.backward()
        synchronize(student.device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return Measured(seconds[2:], peak, value.item(), leaf.grad.detach().cpu())


def attempt(version: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, repeats: int) -> Measured | str:
    """What was measured, or why it could not be."""
    try:
        return measure(version, student, teacher, repeats)
    except torch.OutOfMemoryError as error:
        wanted = next((part for part in str(error).split(". ") if "Tried to allocate" in part), "")
        return f"out of memory ({wanted.lower()})" if wanted else "out of memory"
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]


def difference(found: Measured, expected: Measured) -> str:
    gradient = (found.gradient.double() - expected.gradient.double()).norm() / expected.gradient.double().norm()
    return f"{abs(found.value - expected.value) / abs(expected.value):.1e} | {gradient.item():.1e}"


def line(name: str, dtype: torch.dtype, measured: Measured | str, reference: Measured | None, on_gpu: bool) -> str:
    start = f"| {name} | {str(dtype).removeprefix('torch.')} |"
    if isinstance(measured, str):
        return f"{start} {measured} | – | – | – | – |"
    seconds, count = measured.seconds, len(measured.seconds)
    spread = f"{1e3 * min(seconds):.1f}–{1e3 * max(seconds):.1f}, {count}"
    peak = f"{measured.peak / GIB:.3f}" if on_gpu else "–"
    errors = difference(measured, reference) if reference else "– | –"
    return f"{start} {1e3 * statistics.median(seconds):.1f} | {spread} | {peak} | {errors} |"


def table(rows: int, vocabulary: int, repeats: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(rows, vocabulary, generator=generator)
    student = (teacher + torch.randn(rows, vocabulary, generator=generator)).bfloat16().float().to(device)  # the same in any type
    teacher = teacher.bfloat16().float().to(device)
    half = rows * vocabulary * 2 / GIB
    print(f"\n{rows} rows × {vocabulary:,} entries: logits of {half:.3f} GiB in bf16, n²·V {rows * half * 2:,.1f} GiB in fp32\n")
    print("| version | type | ms, median | ms, range, repeats | peak GiB | error of value | of gradient |")
    print("|---|---|---|---|---|---|---|")
    dense = partial(naive, cost=broadcast_cost)
    exact = attempt(dense, student.double(), teacher.double(), 1)
    reference = exact if isinstance(exact, Measured) else attempt(distily, student, teacher, 1)
    if isinstance(reference, str):
        raise SystemExit(reference)
    versions = [("distily", distily, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    versions += [("broadcasting", dense, torch.float32), ("torch.cdist p=1", partial(naive, cost=cdist_cost), torch.float32)]
    versions += [("torch.cdist p=1", partial(naive, cost=cdist_cost, widen=False), torch.bfloat16)]
    for name, version, dtype in versions:
        measured = attempt(version, student.to(dtype), teacher.to(dtype), repeats)
        print(line(name, dtype, measured, reference, device.type == "cuda"), flush=True)
    print("\nerrors against", "float64" if reference is exact else "distily in float32: float64 by broadcasting did not fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[50_257, 151_936])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}; divergence, ε = {EPSILON}, {SWEEPS} sweeps")
    for vocabulary in chosen.vocabulary:
        table(chosen.rows, vocabulary, chosen.repeats, device)


if __name__ == "__main__":
    main()
