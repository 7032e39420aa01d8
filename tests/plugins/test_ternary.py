"""The ``ternary`` quantizer: its arithmetic, its gradients, its file, and what it refuses.

Every expected value comes from a formula or a reader written here, or from transformers itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distily_ternary import Ternary, TernaryLinear, distily_quantizers, pack, weight_scale
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from distily.errors import DistilyError
from distily.schema import mistakes, options

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2-bias": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3-fused": ("Phi3Config", {}),
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers compiles its unpacking helpers; here that would only cost time."""
    with torch.compiler.set_stance("force_eager"):
        yield


def model(config: str, **sizes: Any) -> transformers.PreTrainedModel:
    """A tiny random model in fp32; biases are random too, so that they matter."""
    torch.manual_seed(0)
    shape = getattr(transformers, config)(**(SIZES | sizes))
    student = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif parameter.ndim == 2:
                parameter.mul_(5)  # a spread of the logits that an error would be seen in
    return student


def llama(**sizes: Any) -> transformers.PreTrainedModel:
    return model("LlamaConfig", **sizes)


def layer(out: int = 8, width: int = 6, bias: bool = True, **to: Any) -> TernaryLinear:
    torch.manual_seed(0)
    return TernaryLinear.of(nn.Linear(width, out, bias=bias)).to(**to)


def alone(linear: nn.Module) -> Any:
    """A student that consists of one layer."""
    student: Any = nn.Module()
    student.proj, student.all_tied_weights_keys = linear, {}
    return student


def ternaries(student: nn.Module) -> dict[str, TernaryLinear]:
    return {n: m for n, m in student.named_modules() if isinstance(m, TernaryLinear)}


def reload(student: transformers.PreTrainedModel, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Write the export as the core does and load it with plain transformers."""
    tensors, entry = Ternary().convert(student)
    config = student.config.to_dict() | {"quantization_config": entry}
    config["architectures"] = [type(student).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    auto: Any = transformers.AutoModelForCausalLM
    loaded, loading = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return loaded, loading


# --- The formula -------------------------------------------------------------------------------

W = torch.tensor(
    [
        [0.9, -0.2, 0.0],
        [0.4, 0.6, -0.8],
        [-0.1, 0.3, -0.5],
        [1.2, -0.7, 0.05],
        [-0.45, 0.2, 0.55],
        [0.0, -0.35, 0.25],
        [0.7, 0.1, -0.6],
        [-0.3, 0.8, 0.15],
    ]
)  # mean|W| = 10.2 / 24 = 0.425
T = torch.tensor(
    [
        [1, 0, 0],
        [1, 1, -1],
        [0, 1, -1],
        [1, -1, 0],
        [-1, 0, 1],
        [0, -1, 1],
        [1, 0, -1],
        [-1, 1, 0],
    ]
)
X = torch.tensor([0.5, -1.0, 0.25])  # a = 127, q = [64, -127, 32]: 63.5 and 31.75 are rounded
TQ = torch.tensor([64, -95, -159, 191, -32, 159, 32, -191])


def oracle() -> TernaryLinear:
    linear = nn.Linear(3, 8, bias=False)
    linear.weight = nn.Parameter(W.clone())
    return TernaryLinear.of(linear)


def test_an_example_worked_by_hand() -> None:
    torch.testing.assert_close(oracle()(X), 0.425 / 127 * TQ)


def test_the_bytes_of_that_example() -> None:
    # Column 0 of byte row 0 holds rows 0, 2, 4, 6: u = 2, 1, 0, 2 -> 0b10_00_01_10 = 0x86.
    expected = [[0x86, 0x59, 0x21], [0x1A, 0x82, 0x64]]
    assert pack(T.float()).tolist() == expected
    tensors, _ = Ternary().convert(alone(oracle()))
    assert tensors["proj.weight"].tolist() == expected
    assert tensors["proj.weight_scale"].shape == (1,)
    assert tensors["proj.weight_scale"].dtype == torch.float32
    assert tensors["proj.weight_scale"].item() == pytest.approx(1 / 0.425)


def unpack(packed: Tensor) -> list[list[int]]:
    """A reader that shares nothing with the writer: row r is digit r // b of byte row r % b."""
    rows = packed.tolist()
    return [[byte // 4**band % 4 - 1 for byte in row] for band in range(4) for row in rows]


@given(st.integers(1, 5), st.integers(1, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_any_ternary_matrix_survives_packing(bands: int, width: int, data: st.DataObject) -> None:
    row = st.lists(st.sampled_from([-1, 0, 1]), min_size=width, max_size=width)
    zeros = st.just([0] * width)
    codes = data.draw(st.lists(row | zeros, min_size=4 * bands, max_size=4 * bands))
    packed = pack(torch.tensor(codes, dtype=torch.float32))
    assert packed.dtype == torch.uint8
    assert packed.shape == (bands, width)
    assert unpack(packed) == codes


def test_ties_round_to_even() -> None:
    linear = nn.Linear(4, 4, bias=False)
    nn.init.eye_(linear.weight)
    inputs = torch.tensor([127.0, 0.5, 1.5, -2.5])  # a = 1; s = mean|W| = 1/4
    assert TernaryLinear.of(linear)(inputs).tolist() == [127 / 4, 0, 2 / 4, -2 / 4]


def test_zeros_divide_nothing() -> None:
    zero = layer(bias=False)
    nn.init.zeros_(zero.weight)
    assert torch.equal(zero(torch.ones(2, 6)), torch.zeros(2, 8))
    assert torch.equal(layer(bias=False)(torch.zeros(2, 6)), torch.zeros(2, 8))
    assert weight_scale(zero.weight).item() == pytest.approx(1e5)


# --- Training ----------------------------------------------------------------------------------


def reference(linear: nn.Linear, x: Tensor, lam: float) -> Tensor:
    """Straight-through in its textbook form: dequantised values, gradients by ``detach``."""
    weight = linear.weight
    s = weight.abs().mean()
    dequantised = s * (weight / s).round().clamp(-1, 1)
    size = x.abs().max(dim=-1, keepdim=True).values
    tokens = (x * 127 / size).round() * size / 127
    weight = weight + lam * (dequantised - weight).detach()
    return nn.functional.linear(x + lam * (tokens - x).detach(), weight, linear.bias)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_values_and_gradients_are_those_of_the_reference(lam: float) -> None:
    linear = layer(dtype=torch.float64)
    linear.lam = lam
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 8, dtype=torch.float64)
    inputs = (x, linear.weight, linear.bias)
    outputs, expected = linear(x), reference(linear, x, lam)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((outputs * target).sum(), inputs),
        torch.autograd.grad((expected * target).sum(), inputs),
        rtol=1e-12,
        atol=1e-12,
    )


def test_lam_0_is_the_dense_layer_exactly() -> None:
    linear, x = layer(), torch.randn(5, 6)
    linear.lam = 0.0
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_transformers_finds_the_same_ternary_weight() -> None:
    """Against the weight of its own trainable layer, which has no packed form."""
    from transformers.integrations.bitnet import WeightQuant

    linear = layer(bias=False)
    scale = weight_scale(linear.weight)
    codes = torch.tensor(unpack(Ternary().convert(alone(linear))[0]["proj.weight"]))
    assert torch.equal(WeightQuant.apply(linear.weight), codes / scale)


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_bf16_and_autocast_return_the_dtype_of_a_dense_layer(lam: float) -> None:
    half, full = layer(dtype=torch.bfloat16), layer()
    half.lam = full.lam = lam
    assert half(torch.randn(5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        outputs = full(torch.randn(5, 6))
    outputs.sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert full.weight.grad is not None
    assert full.weight.grad.dtype == torch.float32


def test_a_few_steps_lower_the_loss() -> None:
    student, ids = llama(), torch.arange(3, 35).view(2, 16)
    quantizer = Ternary(warmup=0.5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)  # built before: same parameters
    quantizer.prepare(student).train()
    losses = []
    for step in range(20):
        quantizer.on_progress(student, step, 20)
        losses.append(student(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0.0, [1, 1, 1, 1, 1]),
        (0.4, [0, 0.5, 1, 1, 1]),
        (1.0, [0, 0.25, 0.5, 0.75, 1]),  # the last step is ternary, or nothing could be exported
    ],
)
def test_lam_rises_linearly_and_ends_at_1(warmup: float, expected: list[float]) -> None:
    quantizer = Ternary(warmup=warmup)
    student = quantizer.prepare(llama())
    seen = []
    for step in range(5):
        quantizer.on_progress(student, step, 5)
        (lam,) = {linear.lam for linear in ternaries(student).values()}
        seen.append(lam)
    assert seen == pytest.approx(expected)
    quantizer.on_progress(student, 0, 1)
    assert all(linear.lam == 1 for linear in ternaries(student).values())


def test_lam_survives_a_copy_and_stays_out_of_the_state_dict() -> None:
    linear = layer()
    linear.lam = 0.25
    assert copy.deepcopy(linear).lam == 0.25
    assert set(linear.state_dict()) == {"weight", "bias"}


# --- Preparing a student -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_prepare_keeps_every_parameter_and_key(name: str) -> None:
    config, sizes = MODELS[name]
    student = model(config, **sizes)
    before = dict(student.named_parameters())
    keys = list(student.state_dict())
    assert Ternary().prepare(student) is student
    after = dict(student.named_parameters())
    assert list(student.state_dict()) == keys
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    per_block = 4 if name == "phi3-fused" else 7
    assert len(ternaries(student)) == 2 * per_block
    assert type(student.get_output_embeddings()) is nn.Linear


def test_skip_keeps_layers_by_the_end_of_their_names() -> None:
    skip = ("o_proj", "layers.0.self_attn.o_proj", "layers.1.mlp.down_proj")  # may overlap
    student = Ternary(skip=skip).prepare(llama())
    ends = {name.removeprefix("model.") for name in ternaries(student)}
    assert not any(name.endswith("o_proj") for name in ends)
    assert "layers.0.mlp.down_proj" in ends
    assert "layers.1.mlp.down_proj" not in ends


def test_the_options_are_described_by_the_signature() -> None:
    factory = distily_quantizers()["ternary"]
    allowed = options(factory)
    assert {name: option.default for name, option in allowed.items()} == {"warmup": 0.1, "skip": ()}
    assert mistakes("student.quantizer", {"warmup": 0, "skip": ["o_proj"]}, allowed) == []
    assert len(mistakes("student.quantizer", {"warmup": 1.5, "skip": "o_proj"}, allowed)) == 2


# --- The exported file -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    config, sizes = MODELS[name]
    student = Ternary().prepare(model(config, **sizes))
    loaded, loading = reload(student, tmp_path)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(3, 64, (2, 16))
    with torch.no_grad():
        expected, logits = student(ids).logits, loaded(ids).logits
    assert torch.equal(logits, expected)
    assert expected.std() > 0.1
    classes = {type(module).__name__ for module in loaded.modules()}
    assert "BitLinear" in classes
    assert "TernaryLinear" not in classes


def test_skipped_layers_are_dense_in_the_file_too(tmp_path: Path) -> None:
    student = Ternary(skip=("o_proj", "layers.1.mlp.gate_proj")).prepare(llama())
    loaded, loading = reload(student, tmp_path)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(3, 64, (2, 16))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)


def test_convert_leaves_the_student_as_it_was() -> None:
    student = Ternary().prepare(llama())
    before = copy.deepcopy(student.state_dict())
    config = copy.deepcopy(student.config.to_dict())
    modules = [type(module) for module in student.modules()]
    Ternary().convert(student)
    after = student.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert student.config.to_dict() == config
    assert [type(module) for module in student.modules()] == modules


def test_the_file_holds_no_tied_head_and_no_modules_of_the_loss() -> None:
    student = Ternary().prepare(llama(tie_word_embeddings=True))
    student.distily_objectives = nn.ModuleDict({"projector": nn.Linear(32, 16)})
    tensors, entry = Ternary().convert(student)
    assert "lm_head.weight" not in tensors
    assert not any(key.startswith("distily_objectives.") for key in tensors)
    assert entry == {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }


# --- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sizes", "words"),
    [
        ("GPT2Config", {}, "GPT2LMHeadModel.*no nn.Linear"),
        ("MixtralConfig", EXPERTS, "MixtralForCausalLM.*experts"),
        ("Qwen3MoeConfig", EXPERTS, "Qwen3MoeForCausalLM.*experts"),
        ("LlamaConfig", {"intermediate_size": 50}, r"multiple of 4.*gate_proj \(50\)"),
    ],
)
def test_models_that_the_format_cannot_hold(config: str, sizes: Any, words: str) -> None:
    student = model(config, **sizes)
    with pytest.raises(DistilyError, match=words):
        Ternary().prepare(student)
    assert not ternaries(student), "a refused student is left as it was"


def test_a_misspelt_skip_is_named_with_its_neighbour() -> None:
    with pytest.raises(DistilyError, match="'o_prj' is unknown; did you mean 'o_proj'"):
        Ternary(skip=("o_prj",)).prepare(llama())
    with pytest.raises(DistilyError, match="'proj' is unknown"):  # no whole part of a name
        Ternary(skip=("proj",)).prepare(llama())


def test_skipping_everything_leaves_no_ternary_student() -> None:
    every = tuple(f"{end}_proj" for end in ("q", "k", "v", "o", "gate", "up", "down"))
    with pytest.raises(DistilyError, match="LlamaForCausalLM has no layer to make ternary"):
        Ternary(skip=every).prepare(llama())


def test_a_student_in_warm_up_is_not_exported() -> None:
    quantizer = Ternary()
    student = quantizer.prepare(llama())
    quantizer.on_progress(student, 50, 1000)
    with pytest.raises(DistilyError, match=r"warm-up.*lam 0\.5"):
        quantizer.convert(student)


def test_a_student_that_was_not_prepared_is_not_exported() -> None:
    with pytest.raises(DistilyError, match="prepare"):
        Ternary().convert(llama())


@pytest.mark.parametrize("scale", [0.3, torch.rand(8, 1) + 0.1], ids=["one scale", "by rows"])
def test_weights_that_are_ternary_already_are_not_estimated_again(scale: Any) -> None:
    linear = oracle()
    with torch.no_grad():
        linear.weight.copy_(scale * T)
    assert weight_scale(linear.weight).item() != pytest.approx(1 / 0.3)  # absmean misses the zeros
    with pytest.raises(DistilyError, match=r"proj\.weight is already ternary"):
        Ternary().convert(alone(linear))


def test_weights_that_are_not_finite_are_not_exported() -> None:
    linear = oracle()
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(DistilyError, match="not finite"):
        Ternary().convert(alone(linear))
