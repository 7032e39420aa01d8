"""What is compiled runs also where the compiler fails, and says why."""

from __future__ import annotations

import torch

from distily.compilation import Compiled


def cube(x, factor=1.0):
    return factor * x**3


def refusing(graph, inputs):
    raise ValueError("no such instruction")


def test_what_is_compiled_gives_what_it_gave():
    compiled = Compiled(cube, backend="aot_eager")
    x = torch.randn(5, requires_grad=True)
    torch.testing.assert_close(compiled(x, factor=2.0), cube(x, factor=2.0))
    assert compiled.refused is None


def test_where_the_compiler_fails_the_function_runs_as_it_is_and_the_reason_is_kept():
    compiled = Compiled(cube, backend=refusing)
    x = torch.randn(5, requires_grad=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, factor=2.0), cube(x, factor=2.0))
    assert "no such instruction" in compiled.refused


def test_a_backward_that_does_not_compile_is_noticed_in_the_forward():
    from torch._dynamo.backends.common import aot_autograd

    compiled = Compiled(cube, backend=aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=refusing))
    x = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(gradient, 3 * x.detach() ** 2)
    assert "no such instruction" in compiled.refused


def test_a_mistake_of_the_function_itself_is_not_hidden():
    def wrong(x):
        return x @ x

    compiled = Compiled(wrong, backend="aot_eager")
    try:
        compiled(torch.ones(2, 3))
    except RuntimeError as error:
        assert "shapes" in str(error) or "size" in str(error)  # noqa: PT017
    else:
        raise AssertionError("it went through")
