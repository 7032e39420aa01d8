"""Sparse forms in the fused pass: chosen and drawn tokens against float64 loops over the vocabulary, and the driver with them and without.

On a GPU the kernels run as compiled, elsewhere in triton's interpreter, which is slow and knows no bfloat16.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from test_kernels import DEVICE, HALF, ORACLES, PARAMETERS, Head, Teacher, of, product

from distily.forms import SPARSE_FORMS, Form
from distily.kernels.products import BLOCK_VOCABULARY as BLOCK
from distily.kernels.rows import rows_pass
from distily.kernels.targets import draws, supports
from distily.loss.chunks import ChunkWalk, Piece, chunked_loss
from distily.loss.fused import FusedTerms, forms_of

TOPS = sorted(set(SPARSE_FORMS) - {"sampled"})


def sums(logits, temperature, hard=False):
    """What the product hands over beside logits: of each block the highest, and the sums of exponentials counted from it."""
    blocks = [block.float() for block in logits.split(BLOCK, -1)]
    tops = [block.amax(-1, keepdim=True).clamp(min=-65504.0) for block in blocks]
    parts = [
        torch.cat([top, *(((block - top) / each).exp().sum(-1, keepdim=True) for each in (temperature, 1.0)[: 1 + hard])], -1)
        for block, top in zip(blocks, tops, strict=True)
    ]
    return torch.stack(parts, 1).contiguous()


def buffer(logits):
    """Rows as wide as a product's, which has no mass beyond the vocabulary."""
    wide = torch.full((len(logits), math.ceil(logits.shape[1] / 128) * 128), -math.inf, dtype=logits.dtype, device=DEVICE)
    wide[:, : logits.shape[1]] = logits
    return wide


def by_kernel(forms, weights, student, teacher, labels=None, numbers=None, temperature=1.0, scale=1.0, cap=None, over=False):
    """Values ``(F, n)``, and the gradient of Σ weight · value at the head's output; ``over``: in half precision over the logits."""
    count, vocabulary = student.shape
    names = [form.name for form in forms]
    mine, theirs = buffer(student), buffer(teacher)
    hard = "cross_entropy" in names and temperature != 1.0
    parts = sums(student, temperature, hard), sums(teacher, temperature)
    own = [1.0 if name == "cross_entropy" else temperature for name in names]
    coefficients = torch.tensor([w * scale / t for w, t in zip(weights, own, strict=True)], device=DEVICE)
    values = torch.full((len(forms), count), float("nan"), device=DEVICE)
    found, options = {}, {"temperature": temperature, "vocabulary": vocabulary}
    if set(names) & set(TOPS):
        found["supports"] = supports(mine, theirs, *parts, forms, coefficients, values, **options)
    if "sampled" in names:
        found["drawn"] = draws(mine, theirs, parts[1], numbers, **options)
    gradient = mine.view(HALF) if over else torch.empty_like(mine, dtype=torch.float32)
    rows_pass(
        mine, theirs, gradient, *parts, names, coefficients,
        torch.tensor([(*form.parameters, 0.0, 0.0)[:2] for form in forms], device=DEVICE),
        torch.zeros(count, dtype=torch.int64, device=DEVICE) if labels is None else labels, torch.zeros(count, device=DEVICE), values,
        temperature=temperature, cap=cap, **found,
    )  # fmt: skip
    assert not gradient[:, vocabulary:].any()
    return values, gradient[:, :vocabulary]


def likeliest(t, k, p):
    """S by a loop: tokens by falling probability, equals as they stand in the vocabulary."""
    chosen, mass = [], 0.0
    for token in sorted(range(len(t)), key=lambda token: (-t[token].item(), token))[: int(k)]:
        if p < 1.0 and mass >= p:
            break
        chosen.append(token)
        mass += t[token].item()
    return chosen


def divergence(t, s):
    """Σ t log(t/s) over pairs of numbers, one by one."""
    return sum(a * (a.log() - b.log()) for a, b in zip(t, s, strict=True) if a > 0)


def top(name, s, t, k, p):
    chosen = likeliest(t, k, p)
    rest = [token for token in range(len(t)) if token not in set(chosen)]
    value = divergence(t[chosen], s[chosen])
    if name == "top_renormalize":
        return divergence(t[chosen] / t[chosen].sum(), s[chosen] / s[chosen].sum())
    return value + divergence(t[rest].sum()[None], s[rest].sum()[None]) if name == "top_bucket" and rest else value


def drawn_tokens(t, numbers):
    """The inverse of the distribution function, in float64."""
    reached = t.cumsum(0)
    return [int((reached <= number * reached[-1]).sum()) for number in numbers]


def by_oracle(forms, weights, student, teacher, labels=None, numbers=None, temperature=1.0, scale=1.0, cap=None):
    """The same in float64, row by row; ``student``: the head's output, before ``scale`` and ``cap``."""
    raw = student.double().requires_grad_()
    logits = raw * scale if cap is None else cap * (raw * scale / cap).tanh()
    values = []
    for form in forms:
        values.append([])
        for row in range(len(raw)):
            at = 1.0 if form.name == "cross_entropy" else temperature
            s, t = (logits[row] / at).softmax(-1), (teacher[row].double() / at).softmax(-1)
            if form.name == "sampled":
                value = -s[drawn_tokens(t, numbers[row])].log().mean()
            elif form.name in SPARSE_FORMS:
                value = top(form.name, s, t, *form.parameters)
            else:
                value = ORACLES[form.name](s, t, None if labels is None else labels[row], *form.parameters)
            values[-1].append(value)
    values = torch.stack([torch.stack(row) for row in values])
    (torch.tensor(weights, dtype=torch.float64, device=DEVICE)[:, None] * values).sum().backward()
    return values.detach(), raw.grad


def close(found, expected, rtol=1e-4, atol=2e-6):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=atol)


def rows(count, vocabulary, seed=0, spread=3.0, step=None, dtype=torch.float16):
    """Logits of both sides, the teacher's in ``dtype`` and in multiples of ``step``, labels, and numbers to draw by."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(count, vocabulary, generator=generator) * spread for _ in range(2))
    teacher = teacher if step is None else (teacher / step).round() * step
    labels = torch.randint(vocabulary, (count,), generator=generator)
    numbers = torch.rand(count, 9, generator=generator, dtype=torch.float64)
    return student.half().to(DEVICE), teacher.to(DEVICE, dtype), labels.to(DEVICE), numbers.to(DEVICE)


@pytest.mark.parametrize("name", TOPS)
@pytest.mark.parametrize(("k", "p"), [(3, 1.0), (40, 0.77)], ids=["fewer than blocks", "by mass"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["product", "dense teacher"])
def test_value_and_gradient_of_chosen_tokens(name, k, p, dtype):
    student, teacher, *_ = rows(2, 1300, dtype=dtype)
    forms = [Form(name, (k, p))]
    for temperature in (1.0, 2.5):
        case = (forms, [0.7], student, teacher)
        close(by_kernel(*case, temperature=temperature), by_oracle(*case, temperature=temperature))


@settings(max_examples=12 if DEVICE == "cpu" else 30, deadline=None)
@given(
    st.lists(st.sampled_from(["sampled", "forward_kl", "cross_entropy", "jsd"]), max_size=3, unique=True),
    st.lists(st.tuples(st.sampled_from(TOPS), st.integers(1, 300), st.sampled_from([1.0, 0.3719, 0.9137])), max_size=2),
    st.integers(1, 3),
    st.integers(2, 290),
    st.sampled_from([None, 0.5, 4.0]),
    st.sampled_from([1.0, 2.0]),
    st.integers(0, 2**31),
)
def test_any_weighted_sum_is_one_pass(others, chosen, count, vocabulary, step, temperature, seed):
    """Whatever is summed: many equally likely tokens, k beyond the vocabulary, vocabularies of two tokens and of more than a block."""
    forms = [Form(name, (9,) if name == "sampled" else PARAMETERS.get(name, ())) for name in others]
    forms += [Form(name, (k, p)) for name, k, p in chosen] or [Form("top_bucket", (3, 1.0))]
    weights = [0.5 + place for place in range(len(forms))]
    student, teacher, labels, numbers = rows(count, vocabulary, seed, step=step)
    case = (forms, weights, student, teacher, labels, numbers, temperature)
    close(by_kernel(*case), by_oracle(*case), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", TOPS)
def test_all_tokens_are_forward_kl(name):
    student, teacher, *_ = rows(2, 300)
    expected = by_oracle([Form("forward_kl")], [1.0], student, teacher)
    for k in (300, 1000):
        close(by_kernel([Form(name, (k, 1.0))], [1.0], student, teacher), expected)


def chosen_tokens(teacher, k, p=1.0):
    """S read off the gradient: of ``top_renormalize`` it is 0 outside, and with a uniform student nowhere 0 inside."""
    form = Form("top_renormalize", (k, p))
    return by_kernel([form], [1.0], torch.zeros_like(teacher), teacher)[1].bool()


def test_of_equally_likely_tokens_the_first_come_first():
    """Half precision makes equals of many tokens: k tokens are chosen all the same, and always the same, across the blocks too."""
    level = torch.zeros(1, 600, dtype=torch.float16, device=DEVICE)
    level[0, 599] = 1.0
    level[0, [40, 300, 301, 500]] = -0.0
    level[0, 100:250] = -1.0
    inside = chosen_tokens(level, 250)[0].nonzero()[:, 0].tolist()
    assert inside == [*range(100), *range(250, 399), 599]
    even = torch.zeros(1, 1400, dtype=torch.float16, device=DEVICE)
    assert chosen_tokens(even, 3)[0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_a_mass_is_reached_with_as_few_equals_as_it_takes():
    level = torch.zeros(1, 100, dtype=torch.float16, device=DEVICE)
    level[0, :30] = -8.0
    level[0, 50] = 3.0
    t = level.double().softmax(-1)[0]
    needed = math.ceil((0.5 - t[50].item()) / t[99].item())
    inside = chosen_tokens(level, 90, 0.5)[0].nonzero()[:, 0].tolist()
    assert inside == sorted([50, *[token for token in range(30, 100) if token != 50][:needed]])
    assert chosen_tokens(level, 5, 0.5)[0].sum() == 5


@pytest.mark.parametrize("name", TOPS)
def test_tokens_without_mass(name):
    """Fewer tokens with mass than k: the first of the others are chosen as well, and count for nothing."""
    student, teacher, *_ = rows(3, 300)
    teacher[:, :290] = -math.inf
    student[:, :4] = -math.inf
    for k in (4, 15):
        values, gradient = by_kernel([Form(name, (k, 1.0))], [1.0], student, teacher)
        expected, _ = by_oracle([Form(name, (k, 1.0))], [1.0], student, teacher)
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-6)
        assert gradient.isfinite().all()
        assert not gradient[:, :4].any()


def test_a_drawn_token_that_the_student_rules_out_spoils_no_gradient():
    student, teacher, *_ = rows(3, 300)
    student[:, 7], teacher[:, 7] = -math.inf, 60.0
    for name in ("reverse_kl", "jsd"):
        forms = [Form("sampled", (4,)), Form(name, (0.5,) if name == "jsd" else ())]
        values, gradient = by_kernel(forms, [1.0, 1.0], student, teacher, numbers=torch.full((3, 4), 0.5, device=DEVICE))
        assert (values[0] == math.inf).all(), name
        assert gradient.isfinite().all(), name


def test_what_the_student_rules_out_is_infinite_with_a_finite_gradient():
    student, teacher, *_ = rows(2, 300)
    outside = ~chosen_tokens(teacher, 6)
    student[outside] = -math.inf
    values, gradient = by_kernel([Form("top_bucket", (6, 1.0))], [1.0], student, teacher)
    assert (values == math.inf).all()
    assert gradient.isfinite().all()
    student[~outside], student[outside] = -math.inf, 0.0
    for name in TOPS:
        values, gradient = by_kernel([Form(name, (6, 1.0))], [1.0], student, teacher)
        assert (values == math.inf).all(), name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("gap", [18.0, 40.0, 200.0])
def test_a_small_rest_is_not_what_is_left_of_one(gap):
    """Outside of S the student has exp(−gap) or so, which 1 − s_S would round to nothing."""
    student, teacher, *_ = rows(2, 600)
    student[~chosen_tokens(teacher, 12)] -= gap
    case = ([Form("top_bucket", (12, 1.0))], [1.0], student, teacher)
    found, expected = by_kernel(*case), by_oracle(*case)
    close(found[:1], expected[:1])
    if gap < 80:  # beyond, single precision has no number for the student's probabilities
        close(found[1:], expected[1:])


@pytest.mark.parametrize("name", [*TOPS, "sampled"])
def test_the_gradient_is_at_the_output_of_the_head(name):
    """Through scale and soft-capping, and at a temperature."""
    raw, teacher, labels, numbers = rows(2, 300)
    scale, cap = 0.5, 6.0
    forms = [Form(name, (9, 1.0)), Form("cross_entropy"), Form("forward_kl")]
    finished = (cap * (raw.double() * scale / cap).tanh()).half()
    raw = (finished.double() / cap).atanh() * cap / scale  # what comes to the rounded logits
    options = {"numbers": numbers, "labels": labels, "temperature": 2.0, "scale": scale, "cap": cap}
    found = by_kernel(forms, [1.0, 0.3, 0.2], finished, teacher, **options)
    close(found, by_oracle(forms, [1.0, 0.3, 0.2], raw, teacher, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_invert_the_distribution_function(dtype, temperature):
    student, teacher, *_ = rows(3, 900, dtype=dtype)
    teacher[:, [0, 255, 256, 899]] = -math.inf
    numbers = torch.rand(3, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(DEVICE)
    tokens, logits = draws(
        buffer(student), buffer(teacher), sums(teacher, temperature), numbers, temperature=temperature, vocabulary=900
    )
    expected = [drawn_tokens(row, own) for row, own in zip((teacher.double() / temperature).softmax(-1), numbers, strict=True)]
    assert tokens.tolist() == expected
    assert torch.equal(logits, student.float().gather(1, tokens.long()))


def test_a_token_without_mass_is_never_drawn():
    """Blocks of which only the first, or only the last, token has mass; a number so near to 0 or 1 that it falls on an end."""
    teacher = torch.full((3, 1000), -math.inf, dtype=torch.float16, device=DEVICE)
    teacher[0, [256, 767]] = 0.0
    teacher[1, [3, 999]] = torch.tensor([0.0, -20.0]).half().to(DEVICE)
    teacher[2, 511] = -5.0
    numbers = torch.tensor([[2.0**-54, 0.25, 0.5, 0.75, 1 - 2.0**-53]] * 3, dtype=torch.float64, device=DEVICE)
    tokens, _ = draws(buffer(teacher), buffer(teacher), sums(teacher, 1.0), numbers, temperature=1.0, vocabulary=1000)
    assert tokens.tolist() == [[256, 256, 767, 767, 767], [3] * 4 + [999], [511] * 5]


def test_a_row_draws_the_same_wherever_it_stands():
    student, teacher, _, numbers = rows(6, 500)
    whole, _ = draws(buffer(student), buffer(teacher), sums(teacher, 1.0), numbers, temperature=1.0, vocabulary=500)
    for row in range(6):
        at = slice(row, row + 1)
        alone, _ = draws(
            buffer(student[at]), buffer(teacher[at]), sums(teacher[at], 1.0), numbers[at], temperature=1.0, vocabulary=500
        )
        assert torch.equal(whole[at], alone)


@pytest.mark.parametrize(
    "names", [["sampled"], ["sampled", "forward_kl", "cross_entropy"], ["top_bucket"], ["top_renormalize", "sampled"]]
)
def test_the_gradient_is_rounded_once(names):
    """Written over the logits in half precision, also where tokens were drawn several times, it is the one in single precision, rounded."""
    student, teacher, labels, numbers = rows(3, 300)
    teacher[:, 7] = 6.0  # drawn often
    forms = [Form(name, {"sampled": (9,), "forward_kl": (), "cross_entropy": ()}.get(name, (12, 1.0))) for name in names]
    case = (forms, [0.3] * len(forms), student, teacher, labels, numbers)
    assert torch.equal(by_kernel(*case)[1].to(HALF), by_kernel(*case, over=True)[1])


def loss_and_gradients(specs, fused, count=7, dense=False, block_rows=128, vocabulary=290, rows_of_head=310):
    """Loss, values and gradients of a walk, with the kernels or as the plain driver has them."""
    mine, theirs = product(count, 32, rows_of_head, 1), product(count, 48, vocabulary, 2)
    terms = of(*specs)
    hidden, head = mine.hidden.detach().clone().requires_grad_(), Head(mine.weight.clone())
    generator = torch.Generator().manual_seed(3)
    labels, seeds = (torch.randint(high, (count,), generator=generator).to(DEVICE) for high in (vocabulary, 2**40))
    walk = ChunkWalk(
        head=head, source=Teacher(theirs, dense), pieces=[] if fused else [Piece(slice(0, count), terms, 1.0)],
        inputs={"labels": labels, "row_seeds": seeds}, weights={term.key: term.schedule.at(0.0) for term in terms},
        items=torch.tensor(count, device=DEVICE), vocabulary=vocabulary, compute_dtype=HALF, fused=forms_of(terms) if fused else None,
        block_rows=block_rows,
    )  # fmt: skip
    assert not fused or isinstance(walk.fused, FusedTerms), walk.fused
    loss, values, _ = chunked_loss(walk, hidden)
    loss.backward()
    return {"loss": loss.detach(), **values}, [hidden.grad.double(), head.module.weight.grad.double()]


@pytest.mark.parametrize("specs", [
    ["top_k:k=12"], ["top_p:p=0.7,k=40,tail=renormalize"], ["top_k:k=30,tail=zero,temperature=2"], ["sampled_targets:samples=20"],
    ["top_k:k=12", "sampled_targets:weight=0.5", "forward_kl:weight=0.2", "cross_entropy:weight=0.3"],
], ids=" + ".join)  # fmt: skip
@pytest.mark.parametrize("dense", [False, True], ids=["product", "dense teacher"])
def test_the_walk_with_kernels_is_the_walk_without(specs, dense):
    """Within what half precision leaves. A teacher's product is rounded, too, and now and then a draw falls on a neighbour then."""
    fused, plain = (loss_and_gradients(specs, kernels, dense=dense) for kernels in (True, False))
    neighbours = not dense and any("sampled" in spec for spec in specs)
    tolerance = 0.2 if neighbours else 2e-2
    for key, value in fused[0].items():
        assert float(value) == pytest.approx(float(plain[0][key]), rel=2e-2 if neighbours else 5e-3), key
    for mine, theirs in zip(fused[1], plain[1], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < tolerance
    assert not fused[1][1][290:].any(), "the padding of the head got a gradient"


def test_blocks_of_any_size_give_the_same():
    specs = ["sampled_targets:samples=8"]
    (values, gradients), (others, other_gradients) = (
        loss_and_gradients(specs, True, count=20, block_rows=block_rows) for block_rows in (8, 32)
    )
    for key, value in values.items():
        assert float(value) == pytest.approx(float(others[key]), rel=1e-6), key
    for mine, theirs in zip(gradients, other_gradients, strict=True):
        # entry by entry up to what rounding each block's part to half precision leaves
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize(("spec", "name", "parameters"), [
    ("top_k", "top_bucket", (64, 1.0)),
    ("top_k:k=7,tail=zero", "top_zero", (7, 1.0)),
    ("top_p:p=0.9,tail=renormalize", "top_renormalize", (100, 0.9)),
    ("sampled_targets", "sampled", (50,)),
])  # fmt: skip
def test_options_come_to_forms(spec, name, parameters):
    assert forms_of(of(spec)).forms == [Form(name, parameters)]


@pytest.mark.parametrize(("specs", "reason"), [
    (["top_k:support=union"], "do not know top_k with these options"),
    (["top_p:divergence=jsd"], "do not know top_p with these options"),
    (["sampled_targets:rho=0.5"], "do not know sampled_targets with these options"),
    (["sampled_targets:samples=200"], "200 sampled targets are more than 128"),
    (["sampled_targets", "sampled_targets"], "one set of sampled targets"),
    (["top_k:temperature=2", "sampled_targets"], "several temperatures (1, 2)"),
])  # fmt: skip
def test_what_the_kernels_do_not_do_is_said(specs, reason):
    assert reason in forms_of(of(*specs))
