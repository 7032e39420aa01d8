"""CUDA graphs compute what the models compute, are used where they help, and step aside where they cannot be."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny
import torch
import torch.utils._pytree as pytree
from torch import nn

from distily import memory
from distily.bare import SETTLING
from distily.batch import model_inputs, moved
from distily.errors import RunError
from distily.graphs import AGAIN, Body, Graphs, _apart, _fits
from distily.loss.features import FeatureCapture, body, decoder_blocks
from distily.speed import Speed
from distily.waiting import AHEAD, PLAIN

on_gpu = pytest.mark.gpu


def speed(graphs=True, **values):
    return Speed(
        **{"precision": "bf16", "autocast": False, "compiled": False, "attention": None, "on_gpu": True, **values}, graphs=graphs
    )


def model(architecture="llama", seed=0, dtype=torch.float32, **overrides):
    return tiny.model(architecture, seed, dtype, **overrides).cuda()


def batch(seed=0, length=16):
    ids = torch.randint(1, tiny.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gradients(student, *batches):
    """Of a loss of the logits summed over batches, one backward for each; all in one vector, the losses first."""
    student.zero_grad()
    losses = []
    for each in batches:
        loss = student(**each, use_cache=False).logits.float().log_softmax(-1)[..., 3].mean()
        loss.backward()
        losses.append(loss.detach())
    return torch.cat([torch.stack(losses), *(parameter.grad.float().flatten() for parameter in student.parameters())])


def in_use(reserved, allocated):
    """What PyTorch's allocator tells of itself."""
    return {
        f"{name}_bytes": {"all": {"current": value}} for name, value in {"reserved": reserved, "allocated": allocated}.items()
    }


class Seen:
    """A watch that has found something after three micro-batches."""

    def __init__(self, took, worked):
        self.begun, self.result = [], (took, worked)

    def begins(self, size):
        self.begun.append(size)

    def found(self):
        return self.result if len(self.begun) == 3 else None


class TestChoice:
    @pytest.mark.parametrize(("worked", "chosen"), [(24.0, True), (27.5, True), (27.7, False), (30.0, False)])
    @pytest.mark.parametrize("has_teacher", [False, True])
    def test_it_depends_on_whether_the_device_waits(self, has_teacher, worked, chosen):
        said = []
        graphs = Graphs(None, said.append)
        graphs._watch = Seen(30.0, worked)
        for _ in range(3):
            assert graphs.wanted is None
            if has_teacher:
                with torch.no_grad():
                    graphs._ask(7)
            if graphs.wanted is None:
                graphs._ask(7)
        assert graphs._watch.begun == [7, 7, 7]
        assert graphs.wanted is chosen
        line = "student and teacher are replayed as CUDA graphs" if chosen else "none"
        assert said == [f"Speed, graphs: {line}, a micro-batch took 30 ms, of which the device worked {worked:.3g}."]

    def test_never_means_as_it_is(self):
        layer = nn.Linear(2, 2)
        assert torch.equal(Graphs(False, print)(layer, torch.ones(1, 2)), layer(torch.ones(1, 2)))

    def test_what_is_not_on_a_gpu_runs_as_it_is(self):
        layer, graphs = nn.Linear(2, 2), Graphs(True, print)
        for _ in range(3):
            assert torch.equal(graphs(layer, torch.ones(1, 2)), layer(torch.ones(1, 2)))

    @pytest.mark.parametrize(
        ("free", "reserved", "kept", "enough"),
        [(899, 1000, 0, False), (900, 1000, 0, True), (500, 1400, 0, True), (500, 1500, 100, True), (500, 1500, 101, False)],
    )
    def test_a_step_must_fit_beside_its_graphs(self, free, reserved, kept, enough, monkeypatch):
        """1000 bytes are allocated, a step takes 400 more, gradients 100: 900 more are needed. Graphs keep some of what is in reserve."""
        layer = nn.Linear(5, 5, bias=False)
        found = {
            "memory_allocated": 1000,
            "max_memory_allocated": 1400,
            "memory_stats_as_nested_dict": in_use(reserved, 1000),
            "mem_get_info": (free, 9000),
            "is_available": True,
        }
        for name, value in found.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(memory, "_graphs", {"kept": kept, "peak before": 0})
        assert _fits(layer) is enough
        if not enough:
            assert Body(layer).record([], None) == (None, "the memory does not suffice")

    def test_what_graphs_keep_is_counted_from_when_they_keep_it(self, monkeypatch):
        """Plain steps took 1400; recorded ones take 1100 beside the 500 that the graphs keep."""
        numbers = {"memory_allocated": 1000, "max_memory_allocated": 1400, "is_available": True, "reset_peak_memory_stats": None}
        for name in numbers:
            monkeypatch.setattr(torch.cuda, name, lambda name=name: numbers[name])
        monkeypatch.setattr(memory, "_graphs", {"kept": 0, "peak before": 0})
        memory.count_graphs(500)
        numbers["max_memory_allocated"] = 1000
        assert memory.read() == {"memory_now": 1500, "memory_peak": 1500}
        numbers["max_memory_allocated"] = 1100
        assert memory.read() == {"memory_now": 1500, "memory_peak": 1600}
        memory.count_graphs(0)
        assert memory.read() == {"memory_now": 1000, "memory_peak": 1600}
        memory.reset_peak()
        assert memory.read()["memory_peak"] == 1100

    def test_what_a_recording_that_failed_left_is_not_counted_for_ever(self, monkeypatch):
        counted, graphs, layer = [], Graphs(True, print), nn.Linear(2, 2)
        monkeypatch.setattr(memory, "count_graphs", counted.append)
        graphs.forget()
        assert counted == []  # nothing was tried
        graphs._bodies[layer] = Body(layer)
        graphs._bodies[layer].refused = "recording it failed"
        graphs.forget()
        assert counted == [0]

    def test_parameters_that_share_a_gradient_get_one_each(self):
        shared, other = torch.ones(3), torch.zeros(3)
        first, second, third, fourth = _apart([shared, None, other, shared])
        assert first is shared
        assert third is other
        assert second is None
        assert torch.equal(fourth, shared)
        assert fourth.data_ptr() != shared.data_ptr()

    def test_a_body_whose_tensors_are_replaced_in_each_step_is_given_up(self):
        body = Body(nn.Linear(2, 2))
        body.replaced = AGAIN + 1
        assert body.record([], None) == (None, "its weights or buffers are replaced again and again")

    @on_gpu
    def test_a_tiny_model_makes_the_device_wait(self):
        student, said = model().train(), []
        with speed(None).applied(student, say=said.append) as applied:
            for number in range(SETTLING):
                assert not applied.settled or number > PLAIN + AHEAD
                gradients(student, batch())
            assert applied.settled
            assert memory.read()["memory_now"] > torch.cuda.memory_allocated()
        assert len(said) == 1
        assert "student and teacher are replayed" in said[0]
        assert memory.read()["memory_now"] == torch.cuda.memory_allocated()


class Nothing:
    """A graph of nothing."""

    def replay(self):
        pass


class TestStale:
    """What makes a recording stale, told without a device: what is inside one runs once, and a replay does nothing."""

    @pytest.fixture(autouse=True)
    def nothing_is_recorded(self, monkeypatch):
        values = {
            "graph_pool_handle": (0, 1), "get_sync_debug_mode": 0, "set_sync_debug_mode": None, "get_rng_state": None,
            "set_rng_state": None, "current_stream": None, "mem_get_info": (2**30, 2**30), "memory_snapshot": [],
            "memory_stats_as_nested_dict": in_use(0, 0),
        }  # fmt: skip
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Nothing)
        monkeypatch.setattr(torch.cuda, "Stream", object)

    @staticmethod
    def recorded(training=True):
        whole = body(tiny.model().train(training))
        leaves, structure = pytree.tree_flatten(((), {"input_ids": torch.ones(1, 4, dtype=torch.long), "use_cache": False}))
        recording, refused = Body(whole).record(leaves, structure)
        assert refused is None
        assert recording.holds()
        return recording, whole

    @pytest.mark.parametrize("change", [
        lambda block: setattr(block.mlp.up_proj, "weight", nn.Parameter(block.mlp.up_proj.weight.detach())),
        lambda block: setattr(block.mlp.up_proj.weight, "data", block.mlp.up_proj.weight.data.clone()),
        lambda block: block.mlp.up_proj.weight.requires_grad_(False),
        lambda block: setattr(block, "mlp", nn.Identity()),
        lambda block: setattr(block.mlp.up_proj, "bias", nn.Parameter(torch.zeros(48))),
        lambda block: block.mlp.up_proj.register_forward_hook(lambda *_: None),
        lambda block: block.mlp.up_proj.register_full_backward_hook(lambda *_: None),
    ], ids=["weight", "its memory", "frozen", "module", "bias", "hook", "backward hook"])  # fmt: skip
    def test_a_change_in_the_body(self, change):
        recording, whole = self.recorded()
        change(whole.layers[0])
        assert not recording.holds()

    def test_a_tensor_that_a_module_holds_by_itself(self):
        recording, whole = self.recorded()
        assert recording.holds()
        whole.rotary_emb.inv_freq = whole.rotary_emb.inv_freq.clone()
        assert not recording.holds()

    def test_a_hook_elsewhere_changes_nothing(self):
        recording, whole = self.recorded()
        whole.register_forward_hook(lambda *_: None)
        torch.ones(1, requires_grad=True).register_hook(lambda *_: None)
        assert recording.holds()

    def test_outputs_have_the_models_form_and_lead_to_its_parameters(self):
        recording, whole = self.recorded()
        outputs = recording([torch.ones(1, 4, dtype=torch.long)])
        assert outputs.last_hidden_state.shape == (1, 4, 32)
        outputs.last_hidden_state.sum().backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in whole.parameters())
        assert recording.body.lent is recording
        recording([torch.ones(1, 4, dtype=torch.long)])
        assert recording.body.lent is None
        places = {gradient.data_ptr() for gradient in recording.gradients}
        assert not [parameter for parameter in whole.parameters() if parameter.grad.data_ptr() in places]

    def test_a_backward_behind_another_forward_is_an_error(self):
        recording, _ = self.recorded()
        first = recording([torch.ones(1, 4, dtype=torch.long)])
        recording([torch.ones(1, 4, dtype=torch.long)])
        with pytest.raises(RunError, match=r"speed\.graphs=false"):
            first.last_hidden_state.sum().backward()


@on_gpu
class TestValues:
    @pytest.mark.parametrize("architecture", [name for name in tiny.SHAPES if name != "gemma2"])  # whose attention is eager
    def test_losses_and_gradients_are_the_models_own(self, architecture):
        student, said = model(architecture).train(), []
        shapes = [(1, 16), (2, 16), (3, 24), (4, 16), (5, 24), (6, 24)]
        plain = [gradients(student, batch(*shape)) for shape in shapes]
        with speed().applied(student, say=said.append):
            found = [gradients(student, batch(*shape)) for shape in shapes]
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
        assert not said

    @pytest.mark.parametrize(("precision", "autocast"), [("bf16", True), ("bf16", False), ("fp8", True)])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_in_less_precision_and_compiled(self, precision, autocast, compiled):
        torch._dynamo.reset()
        student, said = model(dtype=torch.float32 if autocast else torch.bfloat16, hidden_size=64).train(), []
        found = []
        for graphs in (False, True):
            chosen = speed(graphs, precision=precision, compiled=compiled)
            with chosen.applied(student, say=said.append), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                found.append([gradients(student, batch(seed)) for seed in (1, 2, 3)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
        assert not [line for line in said if "none" in line]

    def test_micro_batches_add_up(self):
        student = model().train()
        batches = [batch(seed) for seed in range(4)]
        plain = gradients(student, *batches)
        with speed().applied(student):
            gradients(student, batch())
            for _ in range(2):
                torch.testing.assert_close(gradients(student, *batches), plain, rtol=1e-5, atol=1e-6)

    def test_a_whole_step_with_a_teacher_of_its_own_precision(self):
        found = []
        for graphs in (False, True):
            student, teacher = model(seed=1).train(), model(seed=2, dtype=torch.bfloat16)
            driver = tiny.driver(student, teacher, "forward_kl", "cross_entropy", chunk_rows=None)
            batches = [moved(tiny.collate(tiny.documents(4, seed, 14, 14)), "cuda") for seed in range(3)]
            optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, fused=True)
            losses = []
            with speed(graphs).applied(student, teacher):
                for _ in range(3):
                    for each in batches:
                        with driver.step(each):
                            loss = student(**model_inputs(each), use_cache=False)["loss"]
                        loss.backward()
                        losses.append(float(loss.detach()))
                    optimizer.step()
                    optimizer.zero_grad()
            found.append(losses)
        assert found[1] == pytest.approx(found[0], rel=1e-4)

    def test_dropout_draws_anew_in_each_replay(self):
        student = model("gpt2", resid_pdrop=0.5).train()
        with speed().applied(student):
            drawn = [gradients(student, batch())[0] for _ in range(4)]
            assert len({float(loss) for loss in drawn}) == 4
            torch.manual_seed(5)
            first = [gradients(student, batch())[0] for _ in range(2)]
            torch.manual_seed(5)
            assert [gradients(student, batch())[0] for _ in range(2)] == first

    def test_packed_documents_are_recorded_too(self):
        student, said = model().train(), []
        ids = batch()["input_ids"]
        packed = {"input_ids": ids, "position_ids": torch.cat([torch.arange(9), torch.arange(7)]).expand(2, -1).cuda()}
        plain = gradients(student, packed)
        with speed().applied(student, say=said.append) as applied:
            found = [gradients(student, packed) for _ in range(3)]
            assert applied.settled
        torch.testing.assert_close(found, [plain] * 3, rtol=1e-5, atol=1e-6)
        assert not said


@on_gpu
class TestStandingAside:
    def test_hooks_inside_are_heard(self):
        teacher, said, wanted = model(), [], ("hidden_states", 1)
        capture = FeatureCapture(teacher, [wanted])
        with speed().applied(teacher, say=said.append), torch.no_grad():
            for seed in range(3):
                with capture.opened() as tensors:
                    teacher(**batch(seed), use_cache=False)
                    assert capture.feature(wanted, tensors).shape == (2, 16, 32)
        assert said == ["Speed, graphs: none of LlamaModel, it has hooks inside, such as those that read features."]

    def test_hooks_that_come_after_the_recording_are_heard(self):
        teacher, heard = model(), []
        with speed().applied(teacher, say=heard.append), torch.no_grad():
            for _ in range(3):
                teacher(**batch(), use_cache=False)
            assert not heard
            decoder_blocks(teacher)[0].mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
            teacher(**batch(), use_cache=False)
        assert heard[-1] == 1

    @pytest.mark.parametrize("harm", ["waits", "fails"])
    def test_a_body_that_cannot_be_recorded_runs_as_it_is_and_is_named(self, harm, monkeypatch):
        """One waits for the device, which a rehearsal finds; the other does so where no rehearsal can tell."""
        student, said = model().train(), []
        kind = type(decoder_blocks(student)[0].mlp)
        original = kind.forward

        def forward(self, hidden):
            if harm == "waits":
                hidden = hidden * float(hidden.abs().max() > -1)
            else:
                torch.cuda.synchronize()
            return original(self, hidden)

        monkeypatch.setattr(kind, "forward", forward)
        plain = gradients(student, batch())
        with speed().applied(student, say=said.append):
            for _ in range(3):
                torch.testing.assert_close(gradients(student, batch()), plain, rtol=1e-5, atol=1e-6)
        assert len(said) == 1
        assert "none of LlamaModel, recording it failed" in said[0]
        torch.nn.functional.dropout(torch.ones(100, device="cuda"))  # random numbers and memory are whole
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert memory.read()["memory_now"] == torch.cuda.memory_allocated()  # nothing is counted for it any more
        torch.cuda.empty_cache()

    def test_activations_that_are_checkpointed(self):
        student, said = model().train(), []
        student.gradient_checkpointing_enable({"use_reentrant": False})
        with speed().applied(student, say=said.append):
            for _ in range(3):
                gradients(student, batch())
        assert said == ["Speed, graphs: none of LlamaModel, its activations are checkpointed."]

    def test_weights_that_were_replaced_are_recorded_anew(self):
        teacher = model()
        with speed().applied(teacher), torch.no_grad():
            for _ in range(3):
                teacher(**batch(), use_cache=False)
            block = decoder_blocks(teacher)[0]
            block.mlp.up_proj.weight = nn.Parameter(block.mlp.up_proj.weight * 2.0, requires_grad=False)
            block.mlp.down_proj.weight.data = block.mlp.down_proj.weight.data * 3.0
            found = teacher(**batch(), use_cache=False).logits
        with torch.no_grad():
            torch.testing.assert_close(found, teacher(**batch(), use_cache=False).logits, rtol=1e-5, atol=1e-5)

    def test_a_second_forward_before_the_backward_is_an_error_not_a_wrong_gradient(self):
        student = model().train()
        with speed().applied(student):
            gradients(student, batch())
            first = student(**batch(1), use_cache=False).logits.mean()
            student(**batch(2), use_cache=False)
            with pytest.raises(RunError, match=r"speed\.graphs=false"):
                first.backward()

    def test_after_a_pause_a_body_is_recorded_again(self):
        student, said = model().train(), []
        plain = gradients(student, batch(1))
        with speed().applied(student, say=said.append) as applied:
            for _ in range(3):
                for _ in range(3):
                    torch.testing.assert_close(gradients(student, batch(1)), plain, rtol=1e-5, atol=1e-6)
                assert applied.settled
                with applied.paused(), torch.no_grad():
                    student(**batch(2), use_cache=False)
                    torch.cuda.empty_cache()
        assert not said

    def test_a_weight_that_is_unfrozen_is_recorded_anew(self):
        student = model().train()
        block = decoder_blocks(student)[0]
        plain = gradients(student, batch())
        block.requires_grad_(False)
        with speed().applied(student):
            for _ in range(3):
                student(**batch(), use_cache=False).logits.sum().backward()
            block.requires_grad_(True)
            torch.testing.assert_close(gradients(student, batch()), plain, rtol=1e-5, atol=1e-6)

    def test_evaluation_and_inputs_with_a_gradient_are_left_alone(self):
        student = model().train()
        with speed().applied(student) as applied:
            embedded = student.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
            for _ in range(3):
                student(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
            assert embedded.grad is not None
            assert memory.read()["memory_now"] == torch.cuda.memory_allocated()  # nothing was recorded
            with applied.paused():
                assert "forward" not in vars(body(student))
