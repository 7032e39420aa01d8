"""What only a GPU can show of the kernels: bfloat16 through the driver, odd sizes, no waiting, bounded memory, the same bits twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

pytest.importorskip("triton")
from triton import knobs

from distily.batch import moved
from distily.kernels.products import divergence_in_float8, float8_rows, label_logits, relative_logits
from distily.products import Float8Rows, Product
from distily.speed import Speed

pytestmark = pytest.mark.gpu


def on_gpu(dtype, autocast=False, kernels=True, vocabulary=997, specs=("forward_kl",), float8=False, **shape):
    """Loss and gradients of one step of a tiny pair on the GPU, and how its terms were computed."""
    shape = {"hidden_size": 64, "vocab_size": vocabulary + 27, **shape}
    student, teacher = (tiny.model("llama", seed, dtype, **shape).cuda() for seed in (1, 2))
    batch = moved(tiny.collate(tiny.documents(40)), "cuda")
    driver = tiny.driver(student, teacher, *specs, vocabulary=vocabulary, chunk_rows=None, kernels=kernels, float8=float8)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss, gradients = tiny.accumulate(driver, student, [batch])
    return loss, gradients, driver.path


@pytest.mark.parametrize("specs", [
    ("forward_kl",), ("jsd", "cross_entropy:weight=0.5"), ("reverse_kl:temperature=2",), ("total_variation", "alpha_beta"),
], ids=" + ".join)  # fmt: skip
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)], ids=["bf16", "autocast"])
def test_a_step_with_kernels_is_near_the_step_in_float32(dtype, autocast, specs):
    exact, exact_gradients, _ = on_gpu(torch.float32, kernels=False, specs=specs)
    loss, gradients, path = on_gpu(dtype, autocast, specs=specs)
    plain, plain_gradients, _ = on_gpu(dtype, autocast, kernels=False, specs=specs)
    assert path == "fused kernels"
    assert float(loss) == pytest.approx(float(exact), rel=2e-2)

    def error(found):
        return max(
            float((found[name].float() - exact_gradients[name]).norm() / exact_gradients[name].norm()) for name in exact_gradients
        )

    assert error(gradients) < max(5e-2, 1.2 * error(plain_gradients)), (error(gradients), error(plain_gradients))


def head_case(count, vocabulary, width, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = [torch.randn(count, width, device="cuda", generator=generator).bfloat16() for _ in range(2)]
    heads = [
        (torch.randn(vocabulary, width, device="cuda", generator=generator) * 2.5 * width**-0.5).bfloat16() for _ in range(2)
    ]
    labels = torch.randint(vocabulary, (count,), device="cuda", generator=generator)
    return hidden, heads, labels


def loss_of(hidden, heads, labels, *specs):
    """Loss and gradients of the fused path on given rows and heads."""
    from test_kernels import Head, Teacher, of

    from distily.loss.chunks import ChunkWalk, chunked_loss
    from distily.loss.fused import forms_of

    rows, head = hidden[0].clone().requires_grad_(), Head(heads[0].clone())
    terms = of(*(specs or ("forward_kl",)))
    inputs = {"labels": labels, "row_seeds": torch.arange(len(rows), device="cuda")}
    walk = ChunkWalk(
        head=head, source=Teacher(Product(hidden[1], heads[1], None)), pieces=[], inputs=inputs,
        weights={term.key: 1.0 for term in terms}, items=torch.tensor(max(1, len(rows)), device="cuda"), vocabulary=len(heads[0]),
        compute_dtype=torch.bfloat16, fused=forms_of(terms),
    )  # fmt: skip
    loss, _, _ = chunked_loss(walk, rows)
    loss.backward()
    return loss.detach(), rows.grad, head.module.weight.grad


@pytest.mark.parametrize(
    ("count", "vocabulary", "width"), [(1, 50257, 768), (1000, 50257, 768), (130, 513, 8), (2049, 32003, 2048)]
)
def test_gradients_of_large_and_odd_heads(count, vocabulary, width):
    """Within 5e-3 of float32, which materialised bfloat16 logits miss five times over."""
    hidden, heads, labels = head_case(count, vocabulary, width)
    _, at_rows, at_head = loss_of(hidden, heads, labels)
    rows = hidden[0].float().requires_grad_()
    head = heads[0].float().requires_grad_()
    target = (hidden[1].float() @ heads[1].float().T).log_softmax(-1)
    loss = torch.nn.functional.kl_div((rows @ head.T).log_softmax(-1), target, log_target=True, reduction="sum") / count
    loss.backward()
    assert float((at_rows.float() - rows.grad).norm() / rows.grad.norm()) < 5e-3
    assert float((at_head.float() - head.grad).norm() / head.grad.norm()) < 5e-3


class TestFloat8:
    """A teacher's logits in fp8."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("count", "width"), [(2, 16), (130, 48), (257, 1040), (64, 8192)])
    def test_rows_by_the_kernel_are_those_by_pytorch(self, dtype, count, width):
        rows = (torch.randn(count, width, device="cuda") * torch.logspace(-3, 3, count, device="cuda")[:, None]).to(dtype)
        rows[0] = 0.0
        found, expected = float8_rows(rows), Float8Rows.of(rows)
        torch.testing.assert_close(found.scale, expected.scale, rtol=0, atol=0)
        torch.testing.assert_close(found.values.float(), expected.values.float(), rtol=0, atol=0)

    @pytest.mark.parametrize(("count", "vocabulary", "width"), [(130, 1003, 1040), (300, 1280, 2048), (64, 512, 8192)])
    def test_logits_are_near_the_exact_ones(self, count, vocabulary, width):
        hidden, heads, labels = head_case(count, vocabulary, width)
        plain = Product(hidden[0], heads[0], None)
        product = replace(plain, float8=float8_rows(plain.weight))
        reference = label_logits(product, labels)
        out = torch.empty((count, -(-vocabulary // 128) * 128), dtype=torch.float16, device="cuda")
        relative_logits(product, reference, out, 1.0)
        exact = hidden[0].double() @ heads[0].double().T
        found = out[:, :vocabulary].double() + reference.double()[:, None]
        assert (found - exact).norm() < 0.05 * exact.norm()
        assert float(divergence_in_float8(plain, product.float8)) < 0.01

    def test_a_step_is_near_the_one_in_bfloat16(self):
        plain, plain_gradients, _ = on_gpu(torch.bfloat16)
        loss, gradients, path = on_gpu(torch.bfloat16, float8=True)
        assert path == "fused kernels, the teacher's logits in fp8"
        assert float(loss) == pytest.approx(float(plain), rel=2e-2)
        errors = [float((gradients[name] - each).norm() / each.norm()) for name, each in plain_gradients.items()]
        assert 0 < max(errors) < 0.1

    @pytest.mark.parametrize(
        "options", [{"dtype": torch.float32, "autocast": True}, {"dtype": torch.bfloat16, "specs": ("cross_entropy",)}]
    )
    def test_a_teacher_in_float32_and_one_that_is_not_asked_stay_as_they_are(self, options):
        assert on_gpu(**options, float8=True)[2] == "fused kernels"


def test_the_same_bits_twice():
    given = head_case(700, 32000, 512)
    first, second = loss_of(*given, "jsd"), loss_of(*given, "jsd")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


@pytest.mark.parametrize("vocabulary", [1024, 32003])
@pytest.mark.parametrize("specs", [("jsd",), ("forward_kl", "top_k:k=8", "sampled_targets")], ids=" + ".join)
def test_nothing_is_compiled_for_another_number_of_tokens(specs, vocabulary, monkeypatch):
    """Real batches have another one in each step; a kernel takes a second to compile."""
    loss_of(*head_case(300, vocabulary, 256), *specs)
    compiled = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda src, **_: compiled.append(src.name))
    for count in (1, 17, 301, 512, 4099, 16000):
        loss_of(*head_case(count, vocabulary, 256), *specs)
    assert not compiled


def test_memory_does_not_grow_with_tokens(monkeypatch):
    """Beyond hidden states and their gradient, 32,768 tokens take what 8,192 take; which is what they may take."""
    monkeypatch.setattr("distily.loss.blocks.MOST_BYTES", 600 * 2**20)
    peaks = []
    for count in (8192, 32768):
        given = head_case(count, 32000, 512)
        loss_of(*given)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(*given)
        peaks.append(torch.cuda.max_memory_allocated() - before - 3 * count * 512 * 2)
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 620 * 2**20


@pytest.mark.parametrize("specs", [("forward_kl",), ("jsd", "cross_entropy"), ("decoupled_kd",)], ids=" + ".join)
def test_nothing_waits_for_the_gpu(specs):
    student, teacher = (tiny.model("llama", seed, torch.bfloat16, hidden_size=64).cuda() for seed in (1, 2))
    batch = moved(tiny.collate(tiny.documents(8)), "cuda")
    driver = tiny.driver(student, teacher, *specs, chunk_rows=None)
    count = torch.tensor(tiny.items([batch]), device="cuda")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    # without it transformers asks for the mask
    speed = Speed("bf16", autocast=False, compiled=False, attention=None, on_gpu=True)

    def step():
        with driver.step(batch, count):
            student(**inputs, use_cache=False).loss.backward()

    with speed.applied(student, teacher):
        for _ in range(2):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
