"""The fused kernels: every form against float64 arithmetic that shares no code with it, and the driver with them against itself without.

On a GPU they run as compiled, elsewhere in triton's interpreter, which is slow and knows no bfloat16.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from tiny import plugins

from distily.forms import FORMS, Form
from distily.kernels.products import divergence_in_float8, float8_rows, label_logits, relative_logits
from distily.kernels.rows import rows_pass
from distily.loss.blocks import LEAST_BYTES, MOST_BYTES, Blocks, _available, bytes_held, cut, largest_part
from distily.loss.chunks import ChunkWalk, Piece, chunked_loss
from distily.loss.fused import FusedTerms, forms_of, fuse
from distily.loss.terms import build_terms
from distily.products import Float8Rows, Product
from distily.spec import parse_component
from distily.teachers import LocalTeacher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16

ORACLES = {
    "cross_entropy": lambda s, t, y: -s[y].log(),
    "forward_kl": lambda s, t, y: (t * (t / s).log()).sum(),
    "reverse_kl": lambda s, t, y: (s * (s / t).log()).sum(),
    "soft_cross_entropy": lambda s, t, y: -(t * s.log()).sum(),
    "jsd": lambda s, t, y, b: (b * t * (t / (b * t + (1 - b) * s)).log() + (1 - b) * s * (s / (b * t + (1 - b) * s)).log()).sum(),
    "skew_kl": lambda s, t, y, k: (t * (t / (k * t + (1 - k) * s)).log()).sum(),
    "skew_reverse_kl": lambda s, t, y, k: (s * (s / ((1 - k) * t + k * s)).log()).sum(),
    "skew_reverse_kl_detached": lambda s, t, y, k: (s * (s / ((1 - k) * t + k * s.detach())).log()).sum(),
    "total_variation": lambda s, t, y: (t - s).abs().sum() / 2,
    "alpha_beta": lambda s, t, y, a, b: -(t**a * s**b - a / (a + b) * t ** (a + b) - b / (a + b) * s ** (a + b)).sum() / (a * b),
    "renyi": lambda s, t, y, a: (t**a * s ** (1 - a)).sum().log() / (a - 1),
}  # fmt: skip
PARAMETERS = {"jsd": (0.3,), "skew_kl": (0.1,), "skew_reverse_kl": (0.2,), "skew_reverse_kl_detached": (0.2,),
              "alpha_beta": (0.2, 0.7), "renyi": (0.5,)}  # fmt: skip


def sums(logits, temperature, hard=False):
    """The parts that a product hands to the pass, here as one block."""
    mass = (logits / temperature).logsumexp(-1) * temperature
    parts = [mass, torch.ones_like(mass)]
    if hard:
        parts.append((logits.logsumexp(-1) - mass).exp())
    return torch.stack(parts, -1)[:, None].float().contiguous()


def by_kernel(forms, weights, student, teacher, labels, temperature=1.0):
    """Values ``(F, n)`` and the gradient of Σ weight · value at the student's logits."""
    count, vocabulary = student.shape
    width = math.ceil(vocabulary / 128) * 128
    padded = [torch.full((count, width), -math.inf, device=DEVICE) for _ in range(2)]
    for buffer, logits in zip(padded, (student, teacher), strict=True):
        buffer[:, :vocabulary] = logits
    gradient, values = torch.empty_like(padded[0]), torch.empty((len(forms), count), device=DEVICE)
    own = [1.0 if form.name == "cross_entropy" else temperature for form in forms]
    rows_pass(
        *padded, gradient, sums(student, temperature, "cross_entropy" in {form.name for form in forms}), sums(teacher, temperature),
        [form.name for form in forms], torch.tensor([w / t for w, t in zip(weights, own, strict=True)], device=DEVICE),
        torch.tensor([(*form.parameters, 0.0, 0.0)[:2] for form in forms], device=DEVICE), labels,
        torch.zeros(count, device=DEVICE), values, temperature=temperature,
    )  # fmt: skip
    assert not gradient[:, vocabulary:].any()
    return values, gradient[:, :vocabulary]


def by_oracle(forms, weights, student, teacher, labels, temperature=1.0):
    logits = student.double().clone().requires_grad_()
    values = torch.stack([
        torch.stack([
            ORACLES[form.name](
                (row / (1.0 if form.name == "cross_entropy" else temperature)).softmax(-1), (target / temperature).softmax(-1), label,
                *form.parameters,
            )
            for row, target, label in zip(logits, teacher.double(), labels, strict=True)
        ])
        for form in forms
    ])  # fmt: skip
    (torch.tensor(weights, dtype=torch.float64, device=DEVICE)[:, None] * values).sum().backward()
    return values.detach(), logits.grad


def rows(count, vocabulary, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(count, vocabulary, generator=generator) * spread for _ in range(2))
    return student.to(DEVICE), teacher.to(DEVICE), torch.randint(vocabulary, (count,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_of_every_form(name, temperature):
    forms = [Form(name, PARAMETERS.get(name, ()))]
    given = rows(5, 331)
    values, gradient = by_kernel(forms, [0.7], *given, temperature)
    expected, expected_gradient = by_oracle(forms, [0.7], *given, temperature)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)


@settings(max_examples=15 if DEVICE == "cpu" else 30, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(set(FORMS) - {"renyi"})), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(2, 200),
    st.integers(0, 2**31),
)
def test_any_weighted_sum_is_one_pass(names, count, vocabulary, seed):
    forms = [Form(name, PARAMETERS.get(name, ())) for name in names]
    weights = [0.5 + place for place in range(len(forms))]
    given_rows = rows(count, vocabulary, seed)
    values, gradient = by_kernel(forms, weights, *given_rows)
    expected, expected_gradient = by_oracle(forms, weights, *given_rows)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-6)


def test_a_token_without_mass_counts_for_nothing():
    """A logit of -inf on one side or on both: no NaN, and the gradient there is 0 where the student has no mass."""
    student, teacher, labels = rows(4, 64)
    labels = labels.clamp(min=8)
    student[:, :4] = -math.inf
    teacher[:, :8] = -math.inf
    for name in ("forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "soft_cross_entropy", "cross_entropy"):
        values, gradient = by_kernel([Form(name, PARAMETERS.get(name, ()))], [1.0], student, teacher, labels)
        assert values.isfinite().all(), name
        assert gradient.isfinite().all(), name
        assert not gradient[:, :4].any(), name


def test_what_a_student_rules_out_is_infinite_however_little_mass_it_has():
    student, teacher, labels = rows(3, 64)
    student[:, 5], teacher[:, 5] = -math.inf, -20.0
    for name in ("forward_kl", "soft_cross_entropy", "reverse_kl"):
        given = (student, teacher) if name != "reverse_kl" else (teacher, student)
        values, _ = by_kernel([Form(name)], [1.0], *given, labels)
        assert (values == math.inf).all(), name


@pytest.mark.parametrize("count", [1, 3])
def test_a_teacher_that_gives_its_logits_may_have_any_stride(count):
    """What stands between its rows is nobody's token."""
    student, teacher, labels = rows(count, 130)
    wide = torch.full((count, 136), 50.0, device=DEVICE)
    wide[:, :130] = teacher
    values = torch.empty((1, count), device=DEVICE)
    buffer = torch.full((count, 256), -math.inf, device=DEVICE)
    buffer[:, :130] = student
    ones, gradient = torch.ones(1, device=DEVICE), torch.empty_like(buffer)
    rows_pass(
        buffer, wide[:, :130], gradient, sums(student, 1.0), sums(teacher, 1.0), ["jsd"], ones, torch.tensor([[0.3, 0.0]], device=DEVICE),
        labels, torch.zeros(count, device=DEVICE), values, temperature=1.0,
    )  # fmt: skip
    expected, expected_gradient = by_kernel([Form("jsd", (0.3,))], [1.0], student, teacher, labels)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient[:, :130], expected_gradient)


def test_without_triton_plain_pytorch_computes_the_loss(monkeypatch):
    head, hidden = Head(torch.ones(8, 8, device=DEVICE)), torch.ones(2, 8, device=DEVICE)
    assert isinstance(fuse(of("forward_kl"), head, hidden, torch.bfloat16), FusedTerms)
    monkeypatch.setattr("torch.utils._triton.has_triton_package", lambda: False)
    assert fuse(of("forward_kl"), head, hidden, torch.bfloat16) == "Triton is not installed"


class TestBlocks:
    """Sizes are decided for a head of given shape, without its numbers."""

    @staticmethod
    def head(vocabulary, width, dtype=torch.bfloat16):
        return torch.empty(vocabulary, width, dtype=dtype, device="meta")

    def test_what_fits_is_one_block(self):
        assert cut(8192, self.head(50257, 768), None, torch.bfloat16) == Blocks(8192, largest_part(50257), True)

    def test_a_large_head_leaves_its_buffers_the_least(self):
        head = self.head(151936, 8192)
        found = cut(8192, head, None, torch.float32)
        assert 2 * found.rows * 151936 > 0.8 * LEAST_BYTES
        assert not found.few

    def test_memory_is_the_same_for_any_number_of_tokens(self):
        head = self.head(128256, 2048)
        held = [
            bytes_held(torch.empty(count, 2048, dtype=torch.bfloat16, device="meta"), head, torch.bfloat16)
            for count in (16384, 10**5)
        ]
        assert max(held) <= MOST_BYTES
        assert held[1] == pytest.approx(held[0], rel=0.15)

    def test_a_frozen_head_has_room_for_larger_blocks(self):
        head = self.head(128256, 2048)
        assert cut(16384, head, None, None).rows > cut(16384, head, None, torch.bfloat16).rows

    @pytest.mark.parametrize("free", [10**12, 2**30])
    def test_buffers_take_a_quarter_of_what_is_free_at_most(self, free, monkeypatch):
        monkeypatch.setattr("distily.memory.free", lambda device: free)
        assert _available(torch.device("cuda")) == min(MOST_BYTES, free // 4)

    @pytest.mark.parametrize("count", [0, 1, 255])
    def test_few_tokens_get_no_more_rows_than_they_are(self, count):
        assert cut(count, self.head(1000, 64), None, torch.bfloat16).rows == max(1, count)


def product(count, width, vocabulary, seed=0, bias=False, scale=1.0, softcap=None):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator).to(DEVICE, HALF)
    weight = (torch.randn(vocabulary, width, generator=generator) * 2.0 * width**-0.5).to(DEVICE, HALF)
    offset = torch.randn(vocabulary, generator=generator).to(DEVICE, HALF) if bias else None
    return Product(hidden, weight, offset, scale, softcap)


def exact_logits(given_product):
    raw = given_product.hidden.double() @ given_product.weight.double().T
    raw = raw if given_product.bias is None else raw + given_product.bias.double()
    raw = raw * given_product.scale
    return raw if given_product.softcap is None else given_product.softcap * (raw / given_product.softcap).tanh()


@pytest.mark.parametrize(("count", "width", "vocabulary"), [(1, 8, 2), (3, 40, 257), (130, 64, 512), (200, 72, 700)])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"scale": 0.25, "softcap": 3.0}])
def test_logits_are_counted_from_the_label_and_summed_up(count, width, vocabulary, options):
    given_product = product(count, width, vocabulary, **options)
    labels = torch.randint(vocabulary, (count,), device=DEVICE)
    reference = label_logits(given_product, labels)
    exact = exact_logits(given_product)
    torch.testing.assert_close(reference.double(), exact.gather(1, labels[:, None])[:, 0], rtol=1e-3, atol=1e-4)
    out = torch.full((count, math.ceil(vocabulary / 128) * 128), float("nan"), dtype=torch.float16, device=DEVICE)
    parts = relative_logits(given_product, reference, out, 2.0, hard=True).double()
    apart = exact - reference.double()[:, None]
    torch.testing.assert_close(out[:, :vocabulary].double(), apart, rtol=1e-3, atol=1e-3)
    assert (out[:, vocabulary:] == -math.inf).all()
    for place, temperature in ((1, 2.0), (2, 1.0)):
        total = (parts[..., place].log() + parts[..., 0] / temperature).logsumexp(1)
        torch.testing.assert_close(total, (out.double() / temperature).logsumexp(1), rtol=1e-5, atol=1e-5)


class TestFloat8:
    """A teacher's logits in fp8. The interpreter rounds to it in a coarser way, so what is exact is asked of a GPU alone."""

    @pytest.mark.parametrize(("count", "width", "vocabulary"), [(3, 16, 257), (130, 64, 512), (70, 80, 700)])
    @pytest.mark.parametrize("options", [{}, {"bias": True, "scale": 0.25}, {"bias": True, "softcap": 3.0}])
    def test_logits_are_the_product_of_the_rounded_rows(self, count, width, vocabulary, options):
        plain = product(count, width, vocabulary, **options)
        low = replace(plain, float8=float8_rows(plain.weight))
        rows, head = (each.values.double() * each.scale for each in (float8_rows(plain.hidden), low.float8))
        exact = exact_logits(replace(plain, hidden=rows, weight=head))
        reference = torch.randn(count, device=DEVICE)
        out = torch.full((count, math.ceil(vocabulary / 128) * 128), float("nan"), dtype=torch.float16, device=DEVICE)
        relative_logits(low, reference, out, 1.0)
        found = out[:, :vocabulary].double() + reference.double()[:, None]
        assert (found - exact).norm() < 5e-3 * exact.norm()  # units for fp8 add up in 14 bits
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=5e-2)

    @pytest.mark.parametrize("options", [{}, {"bias": True, "scale": 0.5}, {"softcap": 3.0}])
    def test_the_divergence_is_that_of_the_two_softmaxes(self, options):
        plain = product(30, 64, 300, **options)
        low = float8_rows(plain.weight)
        rows, head = (each.values.double() * each.scale for each in (float8_rows(plain.hidden), low))
        logs = [exact_logits(each).log_softmax(-1) for each in (plain, replace(plain, hidden=rows, weight=head))]
        expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
        assert float(divergence_in_float8(plain, low)) == pytest.approx(float(expected), rel=0.05)

    @pytest.mark.parametrize("specs", [["forward_kl"], ["jsd", "cross_entropy:weight=0.3"], ["reverse_kl:temperature=2"]])
    def test_the_walk_is_near_the_one_in_half_precision(self, specs):
        loss, _, *gradients = loss_and_gradients(specs, True, float8=True)
        plain, _, *plain_gradients = loss_and_gradients(specs, True)
        assert float(loss) == pytest.approx(float(plain), rel=5e-2)
        for mine, other in zip(gradients, plain_gradients, strict=True):
            assert 0 < float((mine - other).norm() / other.norm()) < 0.15

    @staticmethod
    def source(float8=True, offset=0.0, **options):
        """What a tiny teacher says of a batch; its logits are about ``offset``."""
        network = tiny.model(**{"dtype": HALF, "hidden_size": 64, "tie_word_embeddings": False, **options}).to(DEVICE)
        inputs = {"input_ids": torch.arange(1, 13, device=DEVICE)[None]}
        with torch.no_grad():
            hidden = network.model(**inputs).last_hidden_state[0].double()
            direction = torch.linalg.pinv(hidden) @ torch.ones(len(hidden), dtype=torch.float64, device=DEVICE)
            network.lm_head.weight += (offset * direction).to(network.dtype)
        return LocalTeacher(network, tiny.VOCABULARY, float8=float8).signals(inputs, torch.arange(12, device=DEVICE)).logits

    def test_a_teacher_makes_its_head_once_and_only_for_kernels(self, monkeypatch):
        monkeypatch.setattr("distily.teachers.FARTHEST", 1.0)
        plain, low = self.source(False), self.source()
        assert plain.product(slice(0, 2)).float8 is None
        assert isinstance(low.product(slice(0, 2)).float8, Float8Rows)
        assert low.product(slice(0, 2)).float8 is low.product(slice(3, 9)).float8
        assert torch.equal(plain.chunk(slice(0, 3)), low.chunk(slice(0, 3)))

    def test_logits_that_would_be_too_far_off_are_not_in_fp8(self):
        """Those with a large offset: each token's is rounded on its own."""
        terms = forms_of(of("forward_kl"))
        source = self.source(offset=200.0)
        reason = source.product(slice(0, 2)).float8
        assert re.fullmatch(r"in fp8 they would be [\d.]+ nats off", reason)
        assert terms.teacher_in_words(source) == f", the teacher's logits not in fp8: {reason}"
        assert forms_of(of("cross_entropy")).teacher_in_words(source) == ""

    def test_what_the_units_do_not_suit_is_not_in_fp8(self):
        assert self.source(hidden_size=72).product(slice(0, 4)).float8 == "rows of 72 numbers are not for fp8"
        assert self.source(dtype=torch.float32).product(slice(0, 4)).float8 is None


class Head:
    """What a walk needs of an output embedding."""

    is_linear = True
    softcap, scale = None, 1.0

    def __init__(self, weight):
        self.module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.module.weight = torch.nn.Parameter(weight)

    def product_of(self, hidden, weight, bias, vocabulary, dtype):
        return Product(hidden.detach(), weight.detach()[:vocabulary], None)

    def finish(self, raw):
        return raw


class Teacher:
    """A logit source that is a product, or gives its logits itself."""

    def __init__(self, given_product, dense=False):
        self.given_product, self.dense = given_product, dense

    def product(self, at):
        return None if self.dense else self.given_product.rows(at)

    def chunk(self, at):
        return self.given_product.hidden[at].float() @ self.given_product.weight.float().T


def loss_and_gradients(specs, fused, count=20, vocabulary=290, rows_of_head=310, block_rows=16, dense=False, float8=False):
    """Loss and gradients of a walk over random rows, with the kernels or as the plain driver has them."""
    mine, theirs = product(count, 32, rows_of_head, 1), product(count, 48, vocabulary, 2)
    theirs = replace(theirs, float8=float8_rows(theirs.weight)) if float8 else theirs
    terms = list(build_terms([parse_component(spec, "objectives") for spec in specs], plugins(), None, object()).values())
    hidden = mine.hidden.detach().clone().requires_grad_()
    head = Head(mine.weight.clone())
    labels = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    walk = ChunkWalk(
        head=head, source=Teacher(theirs, dense), pieces=[] if fused else [Piece(slice(0, count), terms, 1.0)],
        inputs={"labels": labels, "input_ids": labels, "sequence_ids": labels, "progress": 0.0},
        weights={term.key: term.schedule.at(0.0) for term in terms}, items=torch.tensor(max(1, count), device=DEVICE),
        vocabulary=vocabulary, compute_dtype=HALF, fused=forms_of(terms) if fused else None, block_rows=block_rows,
    )  # fmt: skip
    if fused:
        assert isinstance(walk.fused, FusedTerms), walk.fused
    loss, values, _ = chunked_loss(walk, hidden)
    loss.backward()
    return loss, values, hidden.grad.double(), head.module.weight.grad.double()


@pytest.mark.parametrize("specs", [
    ["forward_kl"], ["jsd", "cross_entropy:weight=0.3"], ["forward_kl:temperature=2", "reverse_kl:temperature=2,weight=0.5"],
    ["confidence_kl:gamma=0.3"], ["alpha_beta", "total_variation"], ["renyi", "skew_kl", "skew_reverse_kl"], ["cross_entropy"],
], ids=" + ".join)  # fmt: skip
@pytest.mark.parametrize("dense", [False, True], ids=["product", "dense teacher"])
def test_the_walk_with_kernels_is_the_walk_without(specs, dense):
    """Within what half precision leaves: the plain walk rounds its logits to the dtype of the product, so it is the worse one."""
    loss, values, at_rows, at_head = loss_and_gradients(specs, True, dense=dense)
    plain, plain_values, plain_rows, plain_head = loss_and_gradients(specs, False)
    assert float(loss) == pytest.approx(float(plain), rel=5e-3)
    for key, value in values.items():
        assert float(value) == pytest.approx(float(plain_values[key]), rel=5e-3), key
    assert float((at_rows - plain_rows).norm() / plain_rows.norm()) < 2e-2
    assert float((at_head - plain_head).norm() / plain_head.norm()) < 2e-2
    assert not at_head[290:].any(), "the padding of the head got a gradient"


def test_blocks_of_any_size_give_the_same():
    whole = loss_and_gradients(["jsd"], True, block_rows=32)
    for block_rows in (8, None):
        parts = loss_and_gradients(["jsd"], True, block_rows=block_rows)
        assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-6)
        for mine, theirs in zip(parts[2:], whole[2:], strict=True):
            # entry by entry up to what rounding each block's part to half precision leaves
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_supervised_token(count):
    loss, _, at_rows, at_head = loss_and_gradients(["forward_kl"], True, count=count)
    assert at_rows.shape == (count, 32)
    assert torch.isfinite(loss)
    assert bool(at_head.any()) == bool(count)


def of(*specs):
    return list(build_terms([parse_component(spec, "objectives") for spec in specs], plugins(), None, object()).values())


@pytest.mark.parametrize(("specs", "reason"), [
    (["adaptive_kl"], "do not know adaptive_kl"),
    (["jsd:beta=0.01"], "do not know jsd with these options"),
    (["alpha_beta:alpha=-0.5,beta=1"], "do not know alpha_beta"),
    (["forward_kl:temperature=2", "jsd"], "several temperatures (1, 2)"),
    (["renyi", "renyi:alpha=0.3"], "one Rényi divergence"),
    (["jsd"] * 9, "9 forms, more than 8"),
])  # fmt: skip
def test_what_the_kernels_do_not_do_is_said(specs, reason):
    assert reason in forms_of(of(*specs))


@pytest.mark.parametrize(
    "spec", ["skew_kl:skew=0", "renyi:alpha=1", "alpha_beta:alpha=1,beta=0", "amari_alpha:alpha=1", "forward_kl"]
)
def test_ends_of_families_are_forward_kl(spec):
    assert [form.name for form in forms_of(of(spec)).forms] == ["forward_kl"]
