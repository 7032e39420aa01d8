"""The driver against dense autograd, on eight architectures and on heads of every kind."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn import functional as F

from distily.errors import DistilyError
from distily.loss.chunks import ChunkWalk, Piece, chunked_loss
from distily.loss.driver import ATTACHED, Driver, local_teacher
from distily.loss.heads import OutputHead
from distily.loss.terms import build_terms
from distily.probes import check_native_logits, check_packing
from distily.spec import parse_component
from distily.teachers import DenseLogits

ARCHITECTURES = list(tiny.SHAPES)


def dense(student, teacher, batch, temperature=1.0):
    """Forward KL by whole logits and plain autograd, divided by the supervised tokens."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    supervised = batch["shift_labels"] != -100
    student.zero_grad()
    mine = student(**inputs).logits[supervised].double() / temperature
    with torch.no_grad():
        theirs = teacher(**inputs).logits[supervised].double() / temperature
    loss = F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum") * temperature**2
    loss = loss / supervised.sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradients_are_those_of_dense_autograd(architecture, temperature):
    student, teacher = tiny.model(architecture, seed=1), tiny.model(architecture, seed=2)
    batch = tiny.collate(tiny.documents(4))
    expected = dense(copy.deepcopy(student), teacher, batch, temperature)
    driver = tiny.driver(student, teacher, f"forward_kl:temperature={temperature}")
    loss, gradients = tiny.accumulate(driver, student, [batch])
    assert tiny.distance(loss, expected[0]) < 1e-5
    assert tiny.distance(gradients, expected[1]) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_drivers_logits_are_the_models_own(architecture):
    """Soft-capping (Gemma-2), tied heads and final projections included."""
    assert check_native_logits("teacher", tiny.model(architecture), tiny.collate(tiny.documents(2))) < 1e-5


def test_a_model_that_does_something_else_to_its_logits_is_refused_by_class():
    network = tiny.model("llama")
    plain = type(network).forward

    class Odd(type(network)):
        def forward(self, *arguments, **keywords):
            output = plain(self, *arguments, **keywords)
            output.logits = output.logits.clamp(max=0.1)
            return output

    network.__class__ = Odd
    with pytest.raises(DistilyError, match="Odd changes its logits"):
        check_native_logits("student", network, tiny.collate(tiny.documents(2)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", ["hidden_states", "queries", "keys", "values"])
def test_features_are_captured_in_every_architecture(architecture, site):
    student, teacher = tiny.model(architecture, seed=1), tiny.model(architecture, seed=1)
    driver = tiny.driver(student, teacher, f"mse:on={site},mapper=all")
    loss, _ = tiny.accumulate(driver, student, [tiny.collate(tiny.documents(3))])
    assert abs(loss) < 1e-9, "equal models have equal features"
    driver.detach()
    other = tiny.driver(student, tiny.model(architecture, seed=5), f"mse:on={site},mapper=all")
    loss, gradients = tiny.accumulate(other, student, [tiny.collate(tiny.documents(3))])
    assert loss > 1e-6
    assert any(value.any() for value in gradients.values())


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_captured_projections_are_those_that_a_hand_made_split_gives(architecture):
    """q of block 1, recomputed from the fused or separate weight by hand."""
    from distily.loss.features import FeatureCapture

    network = tiny.model(architecture)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    capture = FeatureCapture(network, [("hidden_states", 0), ("queries", 1), ("values", 1)])
    with capture.opened() as tensors, torch.no_grad():
        network(input_ids=ids)
        caught = {feature: capture.feature(feature, tensors) for feature in capture.wanted}
    hidden = caught["hidden_states", 0]
    if architecture == "llama":
        layer = network.model.layers[0]
        x = layer.input_layernorm(hidden)
        expected = layer.self_attn.q_proj(x), layer.self_attn.v_proj(x)
    elif architecture == "phi3":
        layer = network.model.layers[0]
        whole = layer.self_attn.qkv_proj(layer.input_layernorm(hidden))
        expected = whole[..., :32], whole[..., 48:]
    elif architecture == "gpt2":
        layer = network.transformer.h[0]
        whole = layer.attn.c_attn(layer.ln_1(hidden))
        expected = whole[..., :32], whole[..., 64:]
    else:
        layer = network.gpt_neox.layers[0]
        heads = layer.attention.query_key_value(layer.input_layernorm(hidden)).view(1, 5, 4, 24)
        expected = heads[..., :8].reshape(1, 5, 32), heads[..., 16:].reshape(1, 5, 32)
    assert torch.allclose(caught["queries", 1], expected[0], atol=1e-6)
    assert torch.allclose(caught["values", 1], expected[1], atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_the_body_the_same():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    batch = tiny.collate(tiny.documents(4))
    expected = dense(copy.deepcopy(student), teacher, batch)[1]
    student.lm_head.requires_grad_(False)
    _, gradients = tiny.accumulate(tiny.driver(student, teacher, "forward_kl"), student, [batch])
    assert "lm_head.weight" not in gradients
    assert tiny.distance(gradients, {name: value for name, value in expected.items() if name != "lm_head.weight"}) < 1e-5


def test_a_head_with_a_bias_trains_it():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    student.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.VOCABULARY))
    batch = tiny.collate(tiny.documents(4))
    expected = dense(copy.deepcopy(student), teacher, batch)
    loss, gradients = tiny.accumulate(tiny.driver(student, teacher, "forward_kl"), student, [batch])
    assert tiny.distance(loss, expected[0]) < 1e-5
    assert tiny.distance(gradients, expected[1]) < 1e-5


def test_lora_on_body_and_head_trains_only_the_adapters():
    """A head that is no plain linear layer is called by chunk under autograd; the outermost student is the PEFT model."""
    peft = pytest.importorskip("peft")
    teacher = tiny.model(seed=2)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    student = peft.get_peft_model(tiny.model(seed=1), config)
    batch = tiny.collate(tiny.documents(4))
    expected = dense(copy.deepcopy(student), teacher, batch)
    driver = tiny.driver(student, teacher, "forward_kl")
    assert not OutputHead(student).is_linear
    loss, gradients = tiny.accumulate(driver, student, [batch])
    assert tiny.distance(loss, expected[0]) < 1e-5
    assert tiny.distance(gradients, expected[1]) < 1e-5
    assert all("lora" in name for name in gradients)


def test_terms_parameters_live_on_the_student_while_it_trains_and_leave_with_the_driver():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2, hidden_size=48)
    before = set(student.state_dict())
    driver = tiny.driver(student, teacher, "cosine:projector=linear")
    assert {name for name, _ in student.named_parameters()} - before == {f"{ATTACHED}.terms.cosine.learned.0.weight"}
    driver.detach()
    assert set(student.state_dict()) == before


def test_a_deep_copy_of_an_attached_student_acts_as_a_plain_model_even_while_a_step_is_open():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    driver = tiny.driver(student, teacher, "forward_kl")
    batch = tiny.collate(tiny.documents(2))
    ids = batch["input_ids"]
    native = student(input_ids=ids).logits
    with driver.step(batch):
        twin = copy.deepcopy(student)
        assert torch.equal(twin(input_ids=ids).logits, native)


def test_outside_a_step_the_student_is_native_and_a_failed_step_leaves_nothing_open():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    ids = torch.tensor([[1, 2, 3]])
    native = student(input_ids=ids).logits
    driver = tiny.driver(student, teacher, "forward_kl")
    with pytest.raises(RuntimeError, match="stop"), driver.step(tiny.collate(tiny.documents(2))):
        raise RuntimeError("stop")
    output = student(input_ids=ids)
    assert torch.equal(output.logits, native)
    assert output.loss is None


def test_weights_and_schedules_scale_terms():
    """weight=linear(start=1,end=0): full at the start, half in the middle, none at the end; cosine meets it in the middle."""
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    batch = [tiny.collate(tiny.documents(4))]
    driver = tiny.driver(
        student, teacher, "forward_kl:weight=linear(start=1,end=0)", "reverse_kl:weight=cosine(start=0,end=2,until=0.5)"
    )
    with torch.no_grad():
        losses = []
        for progress in (0.0, 0.25, 0.5, 1.0):
            with driver.step(batch[0], None, progress) as step:
                student(**{key: batch[0][key] for key in ("input_ids", "attention_mask")})
            assert ("forward_kl" in step.values) == (progress < 1), "a term of weight 0 is not computed"
            forward, reverse = step.values.get("forward_kl", 0.0), step.values.get("reverse_kl", 0.0)
            losses.append(step.loss)
            expected = (1 - progress) * forward + (1 - math.cos(math.pi * min(1, progress * 2))) * reverse
            assert math.isclose(step.loss, expected, rel_tol=1e-5)


def test_gradients_of_single_terms_at_the_last_hidden_states_add_up_to_the_joint_one():
    """What combiners need: one gradient a term, weighted they are the gradient that the body gets."""
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    batch = tiny.collate(tiny.documents(4))
    driver = tiny.driver(student, teacher, "forward_kl:weight=0.7", "cross_entropy:weight=0.2", term_gradients=True)
    caught = {}

    def watch(module, inputs, output):
        output.register_hook(lambda gradient: caught.update(gradient=gradient))

    handle = student.model.norm.register_forward_hook(watch)
    with driver.step(batch) as step:
        loss = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).loss
    loss.backward()
    handle.remove()
    joint = caught["gradient"].flatten(0, 1)[batch["supervised"]]
    total = 0.7 * step.gradients["forward_kl"] + 0.2 * step.gradients["cross_entropy"]
    assert torch.allclose(total, joint, atol=1e-7)


def test_without_grad_no_gradient_is_formed():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    batch = tiny.collate(tiny.documents(2))
    driver = tiny.driver(student, teacher, "forward_kl")
    with torch.no_grad(), driver.step(batch):
        loss = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).loss
    assert not loss.requires_grad


def test_the_teacher_gets_no_gradient():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    teacher.requires_grad_(True)
    tiny.accumulate(tiny.driver(student, teacher, "forward_kl", "cosine"), student, [tiny.collate(tiny.documents(2))])
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_an_objective_with_parameters_of_its_own_trains_them():
    """A learned temperature, as a module objective: its gradient equals that of dense autograd."""
    from distily.loss.terms import Term
    from distily.objectives import token_objective

    @token_objective(temperature_scale="none")
    class Learned(torch.nn.Module):
        def __init__(self, *, start: float = 2.0) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(start))

        def forward(self, student, teacher):
            mine, theirs = (student / self.scale).log_softmax(-1), (teacher / self.scale).log_softmax(-1)
            return (theirs.exp() * (theirs - mine)).sum(-1)

    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    batch = tiny.collate(tiny.documents(4))
    terms = torch.nn.ModuleDict({"learned": Term("learned", Learned(), Learned.description)})
    driver = Driver(terms, local_teacher(teacher, terms, tiny.VOCABULARY), tiny.VOCABULARY, chunk_rows=5)
    driver.attach(student)
    loss, gradients = tiny.accumulate(driver, student, [batch])
    supervised = batch["shift_labels"] != -100
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    mine, theirs = student(**inputs).logits[supervised].detach(), teacher(**inputs).logits[supervised].detach()
    own = Learned()
    expected = own(mine, theirs).sum() / supervised.sum()
    expected.backward()
    assert tiny.distance(loss, expected.detach()) < 1e-5
    assert torch.allclose(gradients[f"{ATTACHED}.terms.learned.learned.0.scale"], own.scale.grad, rtol=1e-4)


def test_bf16_autocast_is_near_fp32():
    """Half-precision products, float32 sums: a few parts in a thousand."""
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    batch = tiny.collate(tiny.documents(8))
    driver = tiny.driver(student, teacher, "forward_kl")
    exact = tiny.accumulate(driver, student, [batch])
    with torch.autocast("cpu", torch.bfloat16):
        rough = tiny.accumulate(driver, student, [batch])
    assert tiny.distance(rough[0], exact[0]) < 2e-2
    assert tiny.distance(rough[1], exact[1]) < 5e-2
    assert all(value.dtype == torch.float32 for value in rough[1].values())


def test_memory_holds_a_chunk_of_logits_never_all():
    """No tensor of the step is larger than chunk · V or the head, with 40 times as many tokens as a chunk has rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if torch.is_tensor(value):
                    largest = max(largest, value.numel())
            return result

    vocabulary = 4_000
    student, teacher = (tiny.model(seed=seed, vocab_size=vocabulary) for seed in (1, 2))
    batch = tiny.collate(tiny.documents(40, shortest=12, longest=12, prompt=0))
    driver = tiny.driver(student, teacher, "forward_kl", chunk_rows=11, vocabulary=vocabulary)
    with Largest():
        tiny.accumulate(driver, student, [batch])
    tokens = batch["supervised"].numel()
    head = student.lm_head.weight.numel()
    assert largest <= max(11 * vocabulary, head)
    assert tokens * vocabulary > 10 * largest


def test_packing_is_refused_by_class_where_documents_see_each_other():
    check_packing("student", tiny.model("llama"), tiny.VOCABULARY)
    with pytest.raises(DistilyError, match="OPTForCausalLM"):
        check_packing("student", tiny.model("opt"), tiny.VOCABULARY)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "opt"])
def test_packing_is_accepted_where_documents_do_not(architecture):
    check_packing("student", tiny.model(architecture), tiny.VOCABULARY)


def test_compiled_functions_give_the_same_loss_and_gradients():
    """What a GPU does with objectives that no kernel knows; torch.compile runs on a CPU as well."""
    batch = tiny.collate(tiny.documents(4))
    results = []
    for is_compiled in (False, True):
        student, teacher = tiny.model("llama", 1), tiny.model("llama", 2)
        built = tiny.driver(student, teacher, "adaptive_kl", "decoupled_kd:weight=0.5")
        if is_compiled:
            for term in built.terms:
                term.compile_functions()
        results.append(tiny.accumulate(built, student, [batch]))
    (loss, gradients), (other, others) = results
    assert tiny.distance(other, loss) < 1e-6
    assert tiny.distance(others, gradients) < 1e-5


class Headed(torch.nn.Module):
    """A model of nothing but a head."""

    def __init__(self, width, vocabulary):
        super().__init__()
        self.lm_head = torch.nn.Linear(width, vocabulary, bias=False)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self):
        return self.lm_head


@pytest.mark.parametrize("spec", ["forward_kl", "jsd", "adaptive_kl"])
def test_the_memory_of_a_cpu_holds_a_chunk_of_logits_and_never_all(spec, tmp_path):
    """Eight times the tokens take the same, which is a few chunks of logits; all of them once would be more than that."""
    width, vocabulary, chunk = 8, 4096, 16
    terms = list(build_terms([parse_component(spec, "objectives")], tiny.plugins(), None, object()).values())
    student, teacher = Headed(width, vocabulary), Headed(width, vocabulary)

    def peak(count):
        rows, theirs = torch.randn(count, width, requires_grad=True), torch.randn(count, width)
        source = DenseLogits(OutputHead(teacher), theirs, vocabulary)
        pieces = [Piece(slice(start, start + chunk), terms, 1.0) for start in range(0, count, chunk)]
        walk = ChunkWalk(
            head=OutputHead(student), source=source, pieces=pieces, inputs={}, weights={term.key: 1.0 for term in terms},
            items=torch.tensor(count), vocabulary=vocabulary, compute_dtype=torch.float32,
        )  # fmt: skip
        return tiny.allocated(lambda: chunked_loss(walk, rows)[0].backward(), tmp_path)

    few, many, whole = peak(64), peak(512), 512 * vocabulary * 4
    assert many < 1.1 * few
    assert many < 20 * chunk * vocabulary * 4 < whole
