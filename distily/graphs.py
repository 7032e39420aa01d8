"""CUDA graphs: the body of a model, its forward and its backward, as work that the host starts at once.

The kernels of a small model are shorter than the host takes to start them one by one, and the device waits. A graph is recorded for each
shape of the inputs and replayed from then on; what it computes is what the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle
from transformers.utils import import_utils

from distily import memory
from distily.errors import RunError
from distily.loss.attention import PREFIX
from distily.waiting import Watch

Say = Callable[[str], None]
WORKS = 0.92
"""Share of a micro-batch's time in which the device works: from here on the gain is not worth the memory. A device that never waits
seems to work 0.96 of it, since it is faster after a rest.
"""
MOST = 32
"""Graphs of a body; beyond them shapes run as they are."""
AGAIN = 8
"""Recordings of a body that may be replaced, since its tensors were."""
NO_ROOM = "the memory does not suffice"
CONSTANTS = (bool, int, float, str, type(None))


class Graphs:
    """Runs the bodies of models by graphs: at once (``wanted``), never (False), or from when the device is seen to wait for the host.

    Stands in as ``forward`` on an instance, as a bound method, so hooks on the body stay around it. A shape is computed plainly the first
    time. A body that cannot be recorded, since it has hooks inside or waits for the device, is computed plainly and named.
    """

    def __init__(self, wanted: bool | None, say: Say) -> None:
        self.wanted, self.say = wanted, say
        self._watch, self._teacher_ran = Watch(), False
        self._bodies: dict[nn.Module, Body] = {}

    def __call__(self, module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        leaves, structure = pytree.tree_flatten((arguments, keywords))
        recording = self._recording(module, leaves, structure)
        if recording is None:
            return type(module).forward(module, *arguments, **keywords)
        return recording([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    @property
    def settled(self) -> bool:
        """Whether each shape that was seen is recorded, or will not be."""
        if self.wanted is None:
            return False
        known = (body.recordings.values() for body in self._bodies.values() if not body.refused)
        return not self.wanted or all(recording is not None for recordings in known for recording in recordings)

    def forget(self) -> None:
        """Gives the memory of all graphs back; shapes that were seen are recorded again at once."""
        if self._bodies:
            memory.count_graphs(0)
        for body in self._bodies.values():
            body.forget()
        self._watch.interrupted()

    def _recording(self, module: nn.Module, leaves: list[Any], structure: Any) -> Recording | None:
        """What to replay; None: compute it as it is."""
        if self.wanted is False or not all(map(_can_be_kept, leaves)):
            return None
        if module not in self._bodies:
            self._bodies[module] = Body(module)
        body = self._bodies[module]
        key = (_state(module), structure, *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        if body.refused or key not in body.recordings:
            if len(body.recordings) < MOST:
                body.recordings[key] = None
            self._watch.interrupted()
            return None
        if self.wanted is None:
            self._ask(sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)))
            return None
        recording = body.recordings[key]
        if recording is not None and not recording.holds():
            body.replaced += 1
            body.forget()
            recording = None
        if recording is None:
            recording, body.refused = body.record(leaves, structure)
            body.recordings[key] = recording
            if body.refused:
                body.forget()
                self.say(f"Speed, graphs: none of {type(module).__name__}, {body.refused}.")
            memory.count_graphs(memory.kept_by_graphs())
        return recording

    def _ask(self, size: int) -> None:
        """Does the device wait? A micro-batch begins with the teacher's forward, or the student's, which trains, where there is none."""
        trains = torch.is_grad_enabled()
        if not (trains and self._teacher_ran):
            self._watch.begins(size)
        self._teacher_ran = not trains
        if (found := self._watch.found()) is not None:
            took, worked = found
            self.wanted = worked < WORKS * took
            chosen = "student and teacher are replayed as CUDA graphs" if self.wanted else "none"
            self.say(f"Speed, graphs: {chosen}, a micro-batch took {took:.3g} ms, of which the device worked {worked:.3g}.")


class Body:
    """A model's body and its recordings. They share their memory, since no two of them are needed at a time."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.refused: str | None = None
        self.recordings: dict[Any, Recording | None] = {}
        self.replaced = 0
        """Recordings that no longer held."""
        self.pool: Any = None
        self.stream: Any = None
        """Where it is recorded: what cuBLAS works in belongs to a stream, and goes with the graphs there."""
        self.turn = 0
        """Counts replays: between a forward and its backward there may be no other."""
        self.lent: Recording | None = None
        """The recording whose gradients autograd may hold, in the memory that the next replay writes to."""

    def record(self, leaves: Sequence[Any], structure: Any) -> tuple[Recording | None, str | None]:
        """The recording for some inputs, or why there is none."""
        reason = _obstacle(self.module)
        if reason is None and self.replaced > AGAIN:
            reason = "its weights or buffers are replaced again and again"
        if reason is None and not _fits(self.module):
            reason = NO_ROOM
        if reason is None:
            if self.pool is None:
                self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            try:
                return Recording(self, leaves, structure), None
            except torch.OutOfMemoryError:
                reason = NO_ROOM
            except RuntimeError as error:
                reason = f"recording it failed: {' '.join(str(error).split())[:150]}"
        return None, reason

    def forget(self) -> None:
        """All recordings at once, with their memory."""
        self.lent = self.pool = self.stream = None
        self.recordings.update(dict.fromkeys(self.recordings))

    def begin(self) -> int:
        """A replay begins: its number. Gradients of an earlier micro-batch move out of the memory that it writes to."""
        self.turn += 1
        if self.lent is not None:
            self.lent.release()
            self.lent = None
        return self.turn


class Recording:
    """The graph of one body at one shape of its inputs, and of its backward where there is one."""

    def __init__(self, body: Body, leaves: Sequence[Any], structure: Any) -> None:
        self.body, module = body, body.module
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad and torch.is_grad_enabled()]
        self._inputs = [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]
        kept = iter(self._inputs)
        arguments, keywords = pytree.tree_unflatten(
            [next(kept) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
        )

        def forward() -> list[Any]:
            outputs, self._structure = pytree.tree_flatten(type(module).forward(module, *arguments, **keywords))
            return outputs

        _rehearse(forward, self.parameters)
        body.begin()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _recorded(self.forward, body):
            outputs = forward()
        self.ends = [place for place, output in enumerate(outputs) if isinstance(output, Tensor) and output.requires_grad]
        ends = [outputs[place] for place in self.ends]
        self.above = [torch.zeros_like(end) for end in ends]
        self.gradients: list[Tensor | None] = []
        if ends:
            with _recorded(self.backward, body), torch.autocast("cuda", enabled=False):
                self.gradients = _apart(torch.autograd.grad(ends, self.parameters, self.above, allow_unused=True))
        self.outputs = [output.detach() if isinstance(output, Tensor) else output for output in outputs]
        self._hooks = RemovableHandle.next_id
        self._parts = [
            (table, name, value)
            for part in module.modules()
            for table in (part._modules, part._parameters, part._buffers, vars(part))
            for name, value in table.items()
            if table is not vars(part) or isinstance(value, Tensor)
        ]
        tensors = (value for _, _, value in self._parts if isinstance(value, Tensor))
        self._tensors = [(tensor, tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]

    def holds(self) -> bool:
        """Whether the body still is what was recorded: its modules and tensors in their places, no hooks inside."""
        if self._hooks != RemovableHandle.next_id:
            self._hooks = RemovableHandle.next_id
            if _obstacle(self.body.module):
                return False
        return all(table.get(name) is value for table, name, value in self._parts) and all(
            tensor.data_ptr() == place and tensor.requires_grad == trained for tensor, place, trained in self._tensors
        )

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given)
        outputs = list(self.outputs)
        if self.ends:
            found = _Replayed.apply(self, *self.parameters)
            for place, output in zip(self.ends, found, strict=True):
                outputs[place] = output
        else:
            self.body.begin()
            self.forward.replay()
        return pytree.tree_unflatten(outputs, self._structure)

    def release(self) -> None:
        """Gradients that autograd left in the graph's memory become parameters' own."""
        pairs = [
            (parameter, parameter.grad)
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True)
            if gradient is not None and parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr()
        ]
        if pairs:
            copies = torch._foreach_mul([gradient for _, gradient in pairs], 1.0)
            for (parameter, _), copy in zip(pairs, copies, strict=True):
                parameter.grad = copy


class _Replayed(torch.autograd.Function):
    """A recorded forward, and its backward by the recorded one."""

    @staticmethod
    def forward(context: Any, recording: Recording, *parameters: Tensor) -> tuple[Tensor, ...]:
        context.recording, context.turn = recording, recording.body.begin()
        recording.forward.replay()
        return tuple(recording.outputs[place].detach() for place in recording.ends)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        recording: Recording = context.recording
        body = recording.body
        if body.turn != context.turn:
            raise RunError(
                "a model ran again between its forward and its backward, which its CUDA graph cannot; speed.graphs=false can."
            )
        body.begin()
        for mine, given in zip(recording.above, above, strict=True):
            mine.copy_(given)
        recording.backward.replay()
        body.lent = recording
        return None, *(gradient if gradient is None else gradient.detach() for gradient in recording.gradients)


def _can_be_kept(leaf: Any) -> bool:
    return leaf.is_cuda and not leaf.requires_grad if isinstance(leaf, Tensor) else isinstance(leaf, CONSTANTS)


def _state(module: nn.Module) -> tuple[Any, ...]:
    """What else decides what a forward computes."""
    return module.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Parameters that share one tensor as their gradient get one each: what scales gradients in place would scale it twice."""
    places: set[int] = set()
    found = []
    for gradient in gradients:
        repeated = gradient is not None and gradient.data_ptr() in places
        found.append(gradient.clone() if gradient is not None and repeated else gradient)
        places |= set() if gradient is None else {gradient.data_ptr()}
    return found


def _obstacle(module: nn.Module) -> str | None:
    """Why a body cannot be recorded, as far as it can be told without running it."""
    config: Any = getattr(module, "config", None)
    if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        return "its activations are checkpointed"
    if module.training and any(getattr(config, name, 0.0) for name in ("layerdrop", "decoder_layerdrop")):
        return "the host draws which blocks it runs"
    if str(getattr(config, "_attn_implementation", "")).startswith(PREFIX):
        return "its attention scores are read"
    inside = [part for part in module.modules() if part is not module]
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks for part in inside):
        return "it has hooks inside, such as those that read features"
    return None


def _fits(module: nn.Module) -> bool:
    """Whether there is memory for what a step took at its peak twice, for the graph and for what it cannot share, and for gradients."""
    found = memory.read()
    gradients = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    return memory.free() >= 2 * (found["memory_peak"] - found["memory_now"]) + gradients


def _rehearse(forward: Callable[[], list[Any]], parameters: Sequence[Tensor]) -> None:
    """Runs forward and backward once, where waiting for the device is an error: in a recording it would be a worse one."""
    mode, random = torch.cuda.get_sync_debug_mode(), torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ends = [output for output in forward() if isinstance(output, Tensor) and output.requires_grad]
        if ends:
            with torch.autocast("cuda", enabled=False):  # as a training's backward runs
                torch.autograd.grad(ends, parameters, [torch.zeros_like(end) for end in ends], allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.set_rng_state(random)


@contextmanager
def _recorded(graph: torch.cuda.CUDAGraph, body: Body) -> Iterator[None]:
    """Records what is inside, which takes the path that it takes outside: nothing is compiled, and transformers is not told."""
    stream = torch.cuda.current_stream()
    torch.clear_autocast_cache()  # casts of weights are the graph's own
    try:
        with (
            patch.object(import_utils, "is_cuda_stream_capturing", return_value=False, create=True),
            torch.compiler.set_stance("fail_on_recompile"),
            torch.cuda.graph(graph, pool=body.pool, stream=body.stream, capture_error_mode="thread_local"),
        ):
            yield
    except RuntimeError:
        torch.cuda.set_stream(stream)
        _mend(body.pool)
        raise
    finally:
        torch.clear_autocast_cache()


def _mend(pool: Any) -> None:
    """After a recording that failed, PyTorch's allocator and its random numbers take themselves to be in it still."""
    with suppress(RuntimeError):  # they do not where it was ended in order
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda").normal_()
