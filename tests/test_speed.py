"""What a step is computed with: chosen, said, put on two models without changing them, and taken off again."""

from __future__ import annotations

import copy
import json
import re

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from distily import precision, speed
from distily.arguments import check_train, optimizer, training_arguments
from distily.assembly import assemble
from distily.checkpoints import SkipTrained
from distily.cli import main
from distily.config import resolve
from distily.errors import DistilyError
from distily.loss.features import FeatureCapture, decoder_blocks
from distily.record import read_metrics
from distily.run import distill, train
from distily.speed import WIDE, Speed, choose

LIKE = {"autocast": False, "attention": None}
"""What most of the choices below have in common."""


@pytest.fixture(autouse=True)
def traced_not_built(monkeypatch):
    """Blocks are traced and differentiated by torch.compile, but no C++ is built."""
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it has an H200, torchao and Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(precision, "find_spec", lambda name: name)
    return monkeypatch


def config(**values):
    return resolve({"output_dir": "unused", **values})


def gradients(model, ids):
    """Loss and all gradients of a step on random tokens, the loss first."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return torch.cat([loss[None], *(parameter.grad.flatten() for parameter in model.parameters())]).detach()


def tokens(length=16):
    return torch.randint(1, tiny.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))


class TestChoice:
    def test_a_cpu_computes_in_float32_and_compiles_nothing(self, no_gpu):
        assert choose(config()) == Speed("float32", autocast=False, compiled=False, attention=None, on_gpu=False)

    def test_a_hopper_gpu_gets_bf16_compiled_blocks_and_cudnn(self, hopper):
        assert choose(config()) == Speed("bf16", autocast=True, compiled=True, attention="cudnn", on_gpu=True, graphs=None)

    def test_another_gpu_keeps_pytorchs_order_of_attention_kernels(self, hopper):
        hopper.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        assert choose(config()).attention is None

    def test_weights_in_bf16_need_no_autocast(self, hopper):
        chosen = choose(config(student={"dtype": "bfloat16"}))
        assert (chosen.precision, chosen.autocast) == ("bf16", False)

    def test_the_keys_override_each_choice(self, hopper):
        chosen = choose(config(speed={"precision": "fp8", "compile": False, "attention": "flash", "graphs": True}))
        assert (chosen.precision, chosen.compiled, chosen.attention, chosen.graphs, chosen.notes) == (
            "fp8",
            False,
            "flash",
            True,
            (),
        )
        assert choose(config(speed={"precision": "float32"})).autocast is False

    def test_fp8_falls_back_to_int8_without_its_units_and_says_why(self, hopper):
        hopper.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        chosen = choose(config(speed={"precision": "fp8"}))
        assert chosen.precision == "int8"
        assert chosen.notes == (
            "speed.precision: fp8 cannot be had, NVIDIA H200 has compute capability 8.0, not 8.9; int8 instead.",
        )

    def test_8_bits_without_torchao_fall_back_to_bf16(self, hopper):
        hopper.setattr(precision, "find_spec", lambda name: None)
        chosen = choose(config(speed={"precision": "int8"}))
        assert chosen.precision == "bf16"
        assert "torchao is not installed" in chosen.notes[0]

    def test_a_cpu_falls_back_with_a_line_for_each(self, no_gpu):
        chosen = choose(config(speed={"precision": "fp8", "attention": "cudnn"}))
        assert (chosen.precision, chosen.attention) == ("float32", None)
        assert [re.match(r"speed\.\w+", note)[0] for note in chosen.notes] == [
            "speed.precision",
            "speed.precision",
            "speed.attention",
        ]

    def test_a_gpu_without_bf16_computes_in_float32(self, hopper):
        hopper.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
        chosen = choose(config())
        assert chosen.precision == "float32"
        assert "no bf16" in chosen.notes[0]

    def test_without_triton_nothing_is_compiled(self, hopper):
        hopper.setattr(torch.utils._triton, "has_triton", lambda: False)
        chosen = choose(config())
        assert not chosen.compiled
        assert "Triton is missing" in chosen.notes[0]

    @pytest.mark.parametrize(
        ("values", "processes", "reason"),
        [
            ({"train": {"gradient_checkpointing": True}}, "1", "activations are checkpointed"),
            ({"quantizer": "ternary"}, "1", "what a quantizer's schedule changes would be left out"),
            ({}, "2", "they are for one process"),
        ],
    )
    def test_where_a_recording_would_not_do_there_are_no_graphs(self, hopper, values, processes, reason):
        hopper.setenv("WORLD_SIZE", processes)
        chosen = choose(config(**values))
        assert chosen.graphs is False
        assert chosen.notes == (f"speed.graphs: no CUDA graphs, {reason}.",)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"speed": {"precision": "bf8"}}, "speed.precision: 'bf8' is not allowed; allowed: 'auto', 'float32', 'bf16', 'fp8', 'int8'"),
            ({"speed": {"precison": "fp8"}}, "key 'speed.precison' is unknown; did you mean 'speed.precision'?"),
            ({"speed": {"attention": "flash3"}}, "speed.attention: 'flash3' is not allowed; allowed: 'auto', 'cudnn', 'flash'"),
            ({"speed": {"precision": "bf16"}, "train": {"bf16": False}}, "train.bf16: speed.precision, which is set to 'bf16', decides it"),
            ({"speed": {"precision": "float32"}, "student": {"dtype": "bfloat16"}}, "speed.precision: 'float32' is not allowed"),
        ],
    )  # fmt: skip
    def test_wrong_values_get_one_line(self, values, message):
        with pytest.raises(DistilyError, match=re.escape(message)) as caught:
            choose(config(**values))
        assert str(caught.value).count("\n") == 0

    def test_a_batch_has_one_of_at_most_sixteen_lengths_on_a_gpu(self):
        on_gpu = Speed("bf16", compiled=True, on_gpu=True, **LIKE)
        assert on_gpu.widths(2048) == tuple(range(128, 2049, 128))
        assert on_gpu.widths(500) == (64, 128, 192, 256, 320, 384, 448, 500)
        assert on_gpu.widths(40) == (40,)
        assert Speed("float32", compiled=False, on_gpu=False, **LIKE).widths(2048) == ()

    def test_every_choice_is_said_in_a_line(self, hopper):
        lines = choose(config(speed={"precision": "fp8"})).lines("adamw_torch_fused")
        assert lines == [
            "Speed, precision: fp8 in the blocks' linear layers and in teacher's logits that kernels form, bf16 elsewhere, over float32 "
            "weights by autocast.",
            "Speed, compile: decoder blocks, one by one, and the norm after them.",
            "Speed, optimizer: adamw_torch_fused.",
            "Speed, attention: in SDPA cudnn's kernel first where it can.",
            "Speed, graphs: student and teacher as CUDA graphs, if the device is seen to wait for the host.",
            "Speed, data: pinned, copied without waiting, padded to few lengths.",
        ]


class TestApplied:
    COMPILED = Speed("float32", compiled=True, on_gpu=False, **LIKE)

    def test_compiled_blocks_give_the_same_loss_and_gradients_at_every_length(self):
        model = tiny.model().train()
        plain = [gradients(model, tokens(length)) for length in (16, 24, 32)]
        with self.COMPILED.applied(model):
            compiled = [gradients(model, tokens(length)) for length in (16, 24, 32)]
        for found, expected in zip(compiled, plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_one_graph_serves_all_blocks_and_a_second_one_all_other_lengths(self):
        from torch._dynamo.utils import counters

        counters.clear()
        model = tiny.model(num_hidden_layers=4).train()
        with self.COMPILED.applied(model):
            for length in (16, 24, 32, 40):
                gradients(model, tokens(length))
        assert counters["stats"]["unique_graphs"] == 4  # two of the blocks, two of the norm after them

    def test_the_models_are_as_they_were_afterwards(self):
        model = tiny.model()
        names, forwards = list(model.state_dict()), [block.forward.__func__ for block in decoder_blocks(model)]
        with self.COMPILED.applied(model):
            assert list(model.state_dict()) == names
        assert [block.forward.__func__ for block in decoder_blocks(model)] == forwards
        assert all("forward" not in vars(module) for module in model.modules())

    def test_features_inside_and_after_compiled_blocks_are_captured(self):
        """The second block has hooks where the first has none: one graph must not serve both."""
        model, ids = tiny.model().eval(), tokens()
        wanted = [("hidden_states", 0), ("hidden_states", 2), ("values", 2), ("queries", 2)]

        def captured(capture):
            with capture.opened() as tensors:
                model(input_ids=ids, use_cache=False)
                return {feature: capture.feature(feature, tensors).detach() for feature in wanted}

        capture = FeatureCapture(model, wanted)
        plain = captured(capture)
        with self.COMPILED.applied(model):
            for _ in range(2):
                torch.testing.assert_close(captured(capture), plain)

    def test_hooks_that_come_after_the_first_step_are_heard(self):
        model, heard = tiny.model().eval(), []
        with self.COMPILED.applied(model):
            model(input_ids=tokens(), use_cache=False)
            decoder_blocks(model)[0].mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
            model(input_ids=tokens(), use_cache=False)
        assert heard == [1]

    def test_gradient_checkpointing_goes_around_compiled_blocks(self):
        model = tiny.model().train()
        plain = gradients(model, tokens())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with self.COMPILED.applied(model):
            torch.testing.assert_close(gradients(model, tokens()), plain, rtol=1e-5, atol=1e-6)

    def test_a_deep_copy_of_a_model_with_compiled_blocks_has_weights_of_its_own(self):
        model = tiny.model().eval()
        with self.COMPILED.applied(model):
            before = model(input_ids=tokens(), use_cache=False).logits
            other = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in decoder_blocks(other).parameters():
                    parameter.mul_(0.5)
            assert not torch.allclose(other(input_ids=tokens(), use_cache=False).logits, before)
            torch.testing.assert_close(model(input_ids=tokens(), use_cache=False).logits, before)

    def test_a_block_that_cannot_be_compiled_runs_as_it_is_and_says_so(self, monkeypatch):
        def broken(graph, inputs):
            raise RuntimeError("no such luck")

        monkeypatch.setattr(speed, "BACKEND", broken)
        model, said = tiny.model().train(), []
        plain = gradients(model, tokens())
        with self.COMPILED.applied(model, say=said.append):
            assert torch.equal(gradients(model, tokens()), plain)
        assert [line.split(",")[1].split()[1] for line in said] == ["LlamaDecoderLayer", "LlamaRMSNorm"]
        assert all("is not compiled" in line and "no such luck" in line for line in said)

    def test_attention_scores_are_read_of_a_compiled_model(self):
        model, said, wanted = tiny.model().eval(), [], ("attentions", 2)
        capture = FeatureCapture(model, [wanted])
        with self.COMPILED.applied(model, say=said.append), capture.opened() as tensors:
            model(input_ids=tokens(), use_cache=False)
            assert capture.feature(wanted, tensors).query.shape == (2, 4, 16, 8)
        assert not said

    def test_a_logit_lens_reads_through_the_compiled_norm(self):
        found = []
        for compiled in (False, True):
            student, teacher = (tiny.model(seed=seed) for seed in (1, 2))
            driver = tiny.driver(student.train(), teacher, "forward_kl", "forward_kl:on=logit_lens,mapper=last_k(k=1)")
            speed = Speed("float32", compiled=compiled, on_gpu=False, **LIKE)
            with speed.applied(student, teacher):
                found.append(tiny.accumulate(driver, student, [tiny.collate(tiny.documents(3))]))
        (loss, gradients), (compiled_loss, compiled_gradients) = found
        assert float(compiled_loss) == pytest.approx(float(loss), rel=1e-5)
        assert tiny.distance(compiled_gradients, gradients) < 1e-5

    def test_inside_a_pause_the_models_are_plain(self):
        model = tiny.model()
        with self.COMPILED.applied(model) as applied:
            with applied.paused():
                assert "forward" not in vars(decoder_blocks(model)[0])
            assert "forward" in vars(decoder_blocks(model)[0])
        with applied.paused():
            pass
        assert "forward" not in vars(decoder_blocks(model)[0])

    @pytest.mark.parametrize(
        ("architecture", "overrides"),
        [
            *((name, {}) for name in tiny.SHAPES if name != "gemma2"),  # whose attention is eager
            ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ],
    )
    def test_padding_on_the_right_needs_no_mask(self, architecture, overrides):
        """Logits at the real tokens of rows with and without padding; the last model's second block has a sliding window."""
        model = tiny.model(architecture, **overrides).eval()
        ids, real = tokens(24), torch.arange(24) < torch.tensor([[24], [17]])
        inputs = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
        with torch.no_grad():
            plain = model(**inputs).logits
            with Speed("bf16", compiled=False, on_gpu=True, **LIKE).applied(model):
                assert model.config._attn_implementation == speed.RIGHT_PADDED
                found = model(**inputs).logits
        assert model.config._attn_implementation == "sdpa"
        torch.testing.assert_close(found[real], plain[real], rtol=1e-4, atol=1e-4)

    def test_without_padding_in_the_mask_the_device_is_not_asked(self, monkeypatch):
        """transformers asks whether all is real by ``fast_all``; the answer would have to come from the device."""
        asked = []
        monkeypatch.setattr("transformers.masking_utils.fast_all", lambda values: asked.append(1) or values.all())
        model, ids = tiny.model().eval(), tokens()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        model(**inputs)
        assert asked
        asked.clear()
        with Speed("bf16", compiled=False, on_gpu=True, **LIKE).applied(model):
            model(**inputs)
        assert not asked

    def test_packed_documents_still_do_not_see_each_other(self):
        model = tiny.model().eval()
        ids, positions = tokens(16), torch.cat([torch.arange(9), torch.arange(7)])[None].expand(2, -1)
        alone = model(input_ids=ids[:, 9:], use_cache=False).logits
        with Speed("bf16", compiled=False, on_gpu=True, **LIKE).applied(model):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, 9:], alone, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("on_gpu", [False, True])
    def test_a_teacher_with_float32_weights_computes_in_bf16_too(self, on_gpu):
        student, teacher, ids, said = tiny.model(), tiny.model(seed=1).eval(), tokens(), []
        plain = teacher(input_ids=ids, use_cache=False).logits
        speed = Speed("bf16", autocast=True, compiled=False, attention=None, on_gpu=on_gpu)
        with speed.applied(student, teacher, said.append):
            halved = teacher(input_ids=ids, use_cache=False).logits
        assert 1e-4 < float(((halved - plain).norm() / plain.norm()).detach()) < 5e-2
        assert torch.equal(teacher(input_ids=ids, use_cache=False).logits, plain)
        assert said == [WIDE] * on_gpu


class TestRuns:
    @staticmethod
    def losses(tiny_llama, tiny_text, folder, **values):
        """The logged losses of four steps, and what was said; evaluations come in between."""
        folder.mkdir()
        settings = {
            "teacher": {"model": str(tiny_llama)},
            "student": {"config": {"num_hidden_layers": 1}},
            "data": {"dataset": str(tiny_text), "max_length": 32},
            "objectives": ["forward_kl", "self_relation:on=values,mapper=last_k(k=1)"],
            "train": {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2},
            "output_dir": str(folder),
        }
        parts = assemble(resolve({**settings, **values}), tiny.plugins())
        student, quantizer = parts.new_student()
        said = []
        train(parts, student, quantizer, parts.config.objectives, folder, None, said.append)
        rows = read_metrics(folder / "metrics.jsonl")
        evaluated = [row["eval_perplexity"] for row in rows if "eval_perplexity" in row]
        return [row["loss"] for row in rows if "loss" in row], evaluated, said

    def test_a_compiled_run_logs_the_losses_of_a_plain_one(self, tiny_llama, tiny_text, tmp_path):
        plain = self.losses(tiny_llama, tiny_text, tmp_path / "plain")
        compiled = self.losses(tiny_llama, tiny_text, tmp_path / "compiled", speed={"compile": True})
        assert len(plain[0]) == 4
        assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
        assert compiled[1] == pytest.approx(plain[1], rel=1e-5)

    def test_a_checkpoint_of_a_compiled_student_is_an_ordinary_folder(self, tiny_llama, tiny_text, tmp_path):
        self.losses(tiny_llama, tiny_text, tmp_path / "run", speed={"compile": True})
        state = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4").state_dict()
        assert not [name for name in state if "orig_mod" in name]

    def test_the_choice_is_said_and_in_the_provenance(self, tiny_llama, tiny_text, tmp_path):
        said = []
        distill(
            {
                "teacher": {"model": str(tiny_llama)},
                "data": {"dataset": str(tiny_text), "max_length": 32, "eval_samples": 2},
                "speed": {"attention": "cudnn"},
                "train": {"max_steps": 1, "use_cpu": True},
                "output_dir": str(tmp_path / "run"),
            },
            tiny.plugins(),
            say=said.append,
        )
        written = json.loads((tmp_path / "run" / "provenance.json").read_text())["speed"]
        assert written["precision"] == "float32"
        assert written["notes"] == ["speed.attention: cudnn is a kernel for GPUs; PyTorch's own order instead."]
        assert {"Speed, precision: float32.", *written["notes"]} <= set(said)

    @pytest.mark.gpu
    @pytest.mark.parametrize("packing", [False, True])
    @pytest.mark.parametrize("graphs", [False, True])
    @pytest.mark.parametrize("kind", ["bf16", "fp8"])
    def test_no_step_waits_for_the_device(self, kind, graphs, packing, tiny_llama, tiny_text, tmp_path, monkeypatch):
        """From the fourth step on, between its beginning and its end, any synchronisation of host and device is an error."""

        class Watched(SkipTrained):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step >= 3:
                    torch.cuda.set_sync_debug_mode("error")

            def on_step_end(self, args, state, control, **kwargs):
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr("distily.run.SkipTrained", Watched)
        monkeypatch.setattr(speed, "BACKEND", "inductor")
        training = {
            "train": {"max_steps": 8, "logging_steps": 8},
            "data": {"dataset": str(tiny_text), "max_length": 32, "packing": packing},
            "speed": {"precision": kind, "graphs": graphs},
        }
        if graphs:
            training["objectives"] = ["forward_kl"]  # features are read by hooks, which keep graphs away
        losses, _, said = self.losses(tiny_llama, tiny_text, tmp_path / "run", **training)
        assert len(losses) == 1
        assert not [line for line in said if "graphs: none" in line]

    def test_the_choice_is_in_the_dry_run(self, runner, tiny_llama, tiny_text, tmp_path):
        arguments = [
            "train",
            "--teacher",
            str(tiny_llama),
            "--dataset",
            str(tiny_text),
            "--dry-run",
            "--output-dir",
            str(tmp_path / "x"),
        ]
        result = runner.invoke(main, [*arguments, "--set", "speed.precision=int8", "--set", "train.use_cpu=true"])
        assert result.exit_code == 0, result.output
        assert "Speed, precision: float32." in result.output
        assert "speed.precision: int8 cannot be had, it needs a GPU; float32 instead." in result.output


class TestArguments:
    ON_GPU = Speed("bf16", compiled=True, on_gpu=True, **LIKE)

    def arguments(self, tmp_path, **values):
        return training_arguments(config(train={"use_cpu": True, **values}), tmp_path, speed=self.ON_GPU)

    def test_the_device_is_not_waited_for(self, tmp_path):
        arguments = self.arguments(tmp_path)
        assert arguments.accelerator_config.non_blocking
        assert not arguments.logging_nan_inf_filter

    def test_adamw_is_fused_unless_another_optimizer_is_named(self, tmp_path):
        assert self.arguments(tmp_path).optim == optimizer(config()) == "adamw_torch_fused"
        assert (
            self.arguments(tmp_path, optim="adamw_8bit").optim == optimizer(config(train={"optim": "adamw_8bit"})) == "adamw_8bit"
        )

    def test_a_misspelt_8_bit_optimizer_gets_the_nearest_name(self):
        with pytest.raises(DistilyError, match=r"train\.optim 'adamw_8bt' is unknown; did you mean 'adamw_8bit'"):
            check_train({"optim": "adamw_8bt"})

    def test_compiling_is_said_in_one_place(self):
        with pytest.raises(DistilyError, match=r"train.torch_compile is not set here; it is decided by speed.compile"):
            check_train({"torch_compile": True})

    def test_ligers_layers_never_bring_ligers_loss(self, tmp_path):
        chosen = self.arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
        assert chosen.liger_kernel_config == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
        with pytest.raises(DistilyError, match="fused_linear_cross_entropy true is not supported"):
            self.arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
