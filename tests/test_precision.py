"""8-bit linear layers: the same objects, near the plain ones in value and gradient, and plain again afterwards."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from distily import precision
from distily.assembly import attached_driver
from distily.config import resolve
from distily.export import export_student
from distily.loss.features import decoder_blocks
from distily.speed import Speed

pytest.importorskip("torchao", reason="torchao is not installed")
EIGHT_BITS = ("fp8", "int8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
by_row = pytest.mark.skipif(
    DEVICE == "cpu" and torch.__version__ < "2.13", reason="older PyTorch scales fp8 products by row on a GPU alone"
)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """torchao computes fp8 products of training in wider floats where there is no unit for them."""
    import torchao.float8

    if DEVICE == "cuda":
        return

    monkeypatch.setattr(torchao.float8, "Float8LinearConfig", lambda **kw: config(**kw, emulate=True))
    config = torchao.float8.config.Float8LinearConfig


def applied(kind, student, teacher=None, said=None):
    chosen = Speed(kind, autocast=False, compiled=False, attention=None, on_gpu=False)
    return chosen.applied(student, teacher, (said if said is not None else []).append)


def step(model, length=16):
    """Loss and gradients of a step by parameter."""
    ids = torch.randint(1, tiny.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_only_plain_layers_of_the_blocks_with_dimensions_of_16_are_eligible():
    model = tiny.model(intermediate_size=40).to(DEVICE)
    names = {name for name, module in model.named_modules() if module in precision.eligible(model)}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert names == {f"model.layers.{block}.self_attn.{name}" for block in (0, 1) for name in projections}


@pytest.mark.parametrize(("kind", "largest"), [("fp8", 0.2), ("int8", 0.05)])
def test_gradients_of_a_step_are_near_the_plain_ones_and_not_the_same(kind, largest):
    model = tiny.model().train().to(DEVICE)
    plain = step(model)
    with applied(kind, model):
        loss, gradients = step(model)
    assert distance(loss, plain[0]) < 0.02
    for name, expected in plain[1].items():
        assert 0 < distance(gradients[name], expected) < largest, name


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_a_model_is_the_same_object_by_object_inside_and_plain_afterwards(kind):
    model = tiny.model().train().to(DEVICE)
    plain, modules, parameters = step(model), list(model.modules()), list(model.parameters())
    names, attributes = list(model.state_dict()), [set(vars(module)) for module in modules]
    with applied(kind, model):
        assert list(map(id, model.modules())) == list(map(id, modules))
        assert list(map(id, model.parameters())) == list(map(id, parameters))
        assert list(model.state_dict()) == names
    assert [set(vars(module)) for module in modules] == attributes
    assert {type(layer) for layer in precision.eligible(model)} == {nn.Linear}
    again = step(model)
    assert all(torch.equal(again[1][name], gradient) for name, gradient in plain[1].items())


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_hooks_stay_on_the_layers(kind):
    model, heard = tiny.model().eval().to(DEVICE), []
    layer = decoder_blocks(model)[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: heard.append(type(layer)))
    with applied(kind, model):
        step(model)
    assert len(heard) == 1
    assert heard[0] is not nn.Linear


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_under_autocast_float32_weights_get_float32_gradients(kind):
    """torchao's fp8 layer reads the GPU's autocast; here its input is in bf16 already."""
    model = tiny.model().train().to(DEVICE)
    with applied(kind, model), torch.autocast(DEVICE, torch.bfloat16):
        layer = decoder_blocks(model)[0].mlp.up_proj
        outputs = layer(torch.randn(2, 16, 32, device=DEVICE).to(torch.bfloat16))
        outputs.sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32


def test_int8_follows_autocast_on_a_wide_input():
    layer = nn.Linear(32, 48, device=DEVICE)
    undo = precision.lower([layer], "int8")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(torch.randn(4, 32, device=DEVICE)).dtype == torch.bfloat16
    undo()


@by_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teachers_fp8_layer_has_a_scale_for_each_token_and_each_row(dtype):
    """Tokens and rows of the weight of very different size: one scale for all of them would lose the small ones."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False).to(DEVICE, dtype)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 3, 32, device=DEVICE)[:, None])
    inputs = (torch.randn(2, 16, 64) * torch.logspace(-3, 3, 16)[:, None]).to(DEVICE, dtype)
    plain = layer(inputs).detach()
    undo = precision.lower([layer], "fp8", backward=False)
    found = layer(inputs)
    undo()
    assert found.dtype == dtype
    errors = (found - plain).float() / (inputs.float().norm(dim=-1, keepdim=True) * layer.weight.detach().float().norm(dim=-1))
    assert 0 < errors.abs().max() < 0.02


@by_row
def test_a_teachers_fp8_layer_adds_its_bias():
    layer, inputs = nn.Linear(32, 48, device=DEVICE), torch.randn(4, 32, device=DEVICE)
    with torch.no_grad():
        undo = precision.lower([layer], "fp8", backward=False)
        biased = layer(inputs)
        undo()
        layer.bias.zero_()
        undo = precision.lower([layer], "fp8", backward=False)
        assert not torch.equal(layer(inputs), biased)
        undo()


@by_row
def test_a_teachers_fp8_layer_follows_autocast():
    layer = nn.Linear(32, 48, device=DEVICE)
    undo = precision.lower([layer], "fp8", backward=False)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert layer(torch.randn(4, 32, device=DEVICE)).dtype == torch.bfloat16
    undo()


@by_row
def test_zeros_stay_zeros_in_fp8():
    layer = nn.Linear(32, 48, bias=False, device=DEVICE)
    undo = precision.lower([layer], "fp8", backward=False)
    assert torch.equal(layer(torch.zeros(4, 32, device=DEVICE)), torch.zeros(4, 48, device=DEVICE))
    undo()


def test_the_number_of_layers_of_each_model_is_said_once():
    said = []
    with applied("fp8", tiny.model(), tiny.model(num_hidden_layers=3), said) as both, both.paused():
        pass
    assert said == ["Speed, fp8: 14 linear layers of the student.", "Speed, fp8: 21 linear layers of the teacher."]


@pytest.mark.parametrize(
    ("kind", "kernels", "asked"), [("fp8", True, True), ("fp8", False, False), ("int8", True, False), ("bf16", True, False)]
)
def test_fp8_asks_for_a_teachers_logits_in_it_where_kernels_form_them(kind, kernels, asked, monkeypatch):
    seen = []
    monkeypatch.setattr("distily.assembly.local_teacher", lambda *_, float8: seen.append(float8))
    config = resolve({"output_dir": ".", "objectives": ["forward_kl"], "speed": {"kernels": kernels}})
    chosen = Speed(kind, autocast=False, compiled=False, attention=None, on_gpu=True)
    attached_driver(config, tiny.plugins(), tiny.model(), tiny.model(), tiny.VOCABULARY, [], chosen)
    assert seen == [asked]


def test_where_no_layer_is_eligible_that_is_said():
    said = []
    with applied("fp8", tiny.model("gpt2"), said=said):
        pass
    assert said == ["Speed, fp8: 0 linear layers of the student."]


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_a_frozen_layer_of_the_student_hands_its_gradient_on(kind):
    model = tiny.model().train().to(DEVICE)
    decoder_blocks(model)[1].requires_grad_(False)
    with applied(kind, model):
        ids = torch.randint(1, tiny.VOCABULARY, (2, 16), device=DEVICE)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert decoder_blocks(model)[0].mlp.up_proj.weight.grad.norm() > 0


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_a_copy_made_inside_computes_with_its_own_weights(kind):
    model = tiny.model().to(DEVICE)
    with applied(kind, model):
        loss = step(model)[0]
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in decoder_blocks(other).parameters():
                parameter.mul_(0.5)
        assert step(other)[0] != loss
        assert step(model)[0] == loss


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_a_student_that_is_saved_inside_is_an_ordinary_folder(kind, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with applied(kind, model):
        export_student(model, AutoTokenizer.from_pretrained(tiny_llama), None, tmp_path / "student", {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert "quantization_config" not in again.config.to_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
