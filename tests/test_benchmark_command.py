"""``distily benchmark speed``: the step that it times is the training's own, its table says what was chosen, and it writes nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version

import pytest
import tiny
import torch
from transformers import TrainingArguments

from distily import benchmark, speed
from distily.bare import BareTraining, random_batches
from distily.benchmark import Row, Stopwatch, _plainer, measure
from distily.cli import main
from distily.config import resolve
from distily.data import Collator
from distily.speed import Speed
from distily.trainer import DistillationTrainer

RATE = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
ON_CPU = {**RATE, "use_cpu": True}


@pytest.fixture(autouse=True)
def traced_not_built(monkeypatch):
    """Blocks are traced and differentiated by torch.compile, but no C++ is built."""
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def bare(batches, objectives=("forward_kl", "cosine:weight=0.5"), student=None, **values):
    """A training of the tiny Llama on ``batches``, applied by nobody yet."""
    config = resolve(
        {"output_dir": "unused", "objectives": list(objectives), "train": {**ON_CPU, **values.pop("train", {})}, **values}
    )
    student = student or tiny.model(seed=1)
    return BareTraining(config, tiny.plugins(), student, tiny.model(seed=2), tiny.VOCABULARY, batches, batches, lambda line: None)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class TestStep:
    def test_three_steps_leave_the_weights_that_the_trainer_leaves(self, tmp_path):
        """Same loss, clipping and optimizer: what is left out is only what surrounds them."""
        documents = tiny.documents(8)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, max_steps=3, report_to=[], remove_unused_columns=False, use_cpu=True,
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, label_names=["labels"], logging_steps=1,
            learning_rate=1e-3, lr_scheduler_type="constant",
        )  # fmt: skip
        trained = tiny.model(seed=1)
        driver = tiny.driver(trained, tiny.model(seed=2), "forward_kl", "cosine:weight=0.5")
        trainer = DistillationTrainer(
            driver, {}, None, model=trained, args=arguments, train_dataset=documents, data_collator=Collator(0)
        )
        trainer.train()

        ours = tiny.model(seed=1)
        start = weights(ours)
        training = bare([tiny.collate(documents)], student=ours)
        losses = [float(training.step()) for _ in range(3)]
        training.close()
        driver.close()

        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert losses == pytest.approx(logged, rel=1e-4)
        moved = torch.linalg.vector_norm(weights(ours) - start)
        assert torch.linalg.vector_norm(weights(ours) - weights(trained)) < 1e-2 * moved

    def test_two_micro_batches_are_one_step_of_their_union(self):
        documents = tiny.documents(8)
        students = [tiny.model(seed=1), tiny.model(seed=1)]
        whole = bare([tiny.collate(documents)], student=students[0])
        halves = bare([tiny.collate(documents[:3]), tiny.collate(documents[3:])], student=students[1])
        assert float(whole.step()) == pytest.approx(float(halves.step()), rel=1e-5)
        assert torch.allclose(weights(students[0]), weights(students[1]), atol=2e-6)

    def test_closing_gives_the_models_back(self):
        student = tiny.model(seed=1)
        names, ids = list(student.state_dict()), torch.randint(1, tiny.VOCABULARY, (2, 9))
        training = bare([tiny.collate(tiny.documents(4))], student=student)
        with training.applied:
            training.step()
        training.close()
        assert list(student.state_dict()) == names
        assert all(parameter.grad is None for parameter in student.parameters())
        assert student(input_ids=ids).logits.shape == (2, 9, tiny.VOCABULARY)

    def test_checkpointing_is_switched_on_where_the_run_would(self):
        training = bare([tiny.collate(tiny.documents(4))], train={"gradient_checkpointing": True})
        assert training.student.is_gradient_checkpointing
        assert torch.isfinite(training.step())


@pytest.mark.parametrize("packed", [False, True])
def test_random_batches_are_full_and_supervised_but_for_each_rows_end(packed):
    first, second = random_batches(50, 3, 16, 2, Collator(0, packed), torch.device("cpu"), seed=7)
    assert first["input_ids"].shape == (3, 16)
    assert len(first["supervised"]) == 3 * 15
    assert "attention_mask" in first  # with one document a row, packed or not
    assert not torch.equal(first["input_ids"], second["input_ids"])
    again = next(random_batches(50, 3, 16, 2, Collator(0, packed), torch.device("cpu"), seed=7))
    assert torch.equal(first["input_ids"], again["input_ids"])


class TestMeasurement:
    def test_the_stopwatch_adds_up_what_happens_several_times_in_a_step(self, monkeypatch):
        readings = iter([0.0, 1.0, 1.0, 3.0, 4.0, 4.5, 5.0, 5.25])
        monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(readings))
        watch = Stopwatch(torch.device("cpu"))
        for _ in range(4):
            watch.mark("head")
            watch.mark("head, done")
        assert watch.between("head", "head, done") == [1000, 2000, 500, 250]
        assert watch.between("head", "head, done", times=2) == [3000, 750]
        assert watch.between("teacher", "teacher, done") == []

    def test_teacher_and_head_are_parts_of_the_step(self):
        row = measure("as chosen", bare([tiny.collate(tiny.documents(4))] * 2), seconds=0.01)
        assert row.steps >= benchmark.LEAST
        assert 0 < row.teacher_milliseconds + row.head_milliseconds < row.milliseconds
        assert row.head_memory is None  # seen on a GPU alone

    @pytest.mark.parametrize(("objective", "missing"), [("cross_entropy", "teacher"), ("cosine", "head")])
    def test_what_a_run_does_not_have_is_not_timed(self, objective, missing):
        row = measure("as chosen", bare([tiny.collate(tiny.documents(4))], (objective,)), seconds=0.01)
        other = {"teacher": "head", "head": "teacher"}[missing]
        assert getattr(row, f"{missing}_milliseconds") is None
        assert getattr(row, f"{other}_milliseconds") > 0

    def test_it_is_compared_with_what_was_chosen_taken_away(self):
        chosen = Speed("fp8", autocast=True, compiled=True, attention="cudnn", on_gpu=True, graphs=None)
        loss = {"kernels": False}
        everything = {**loss, "compile": False, "graphs": False, "attention": "flash", "precision": "bf16"}
        assert _plainer(chosen, kernels=True) == {"plain loss": loss, "plain": everything}
        bf16 = replace(chosen, precision="bf16", attention=None, graphs=False)
        assert _plainer(bf16, kernels=False) == {"plain": {"compile": False}}
        assert _plainer(replace(bf16, compiled=False), kernels=False) == {}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILY_CACHE", str(tmp_path / "cache"))
    return tmp_path


SHORT = ["--train", "per_device_train_batch_size=2", "--set", "data.max_length=16", "--seconds", "0.01"]


def run(runner, *words):
    return runner.invoke(main, ["benchmark", "speed", *SHORT, *words])


class TestCommand:
    def test_it_prints_machine_models_choices_and_a_table_and_writes_nothing(self, runner, place):
        result = run(runner)
        assert result.exit_code == 0, result.output
        for part in ("torch " + version("torch"), "Teacher (demo): 2,853,312 parameters", "A step: 2 rows of 16 tokens, random"):
            assert part in result.stdout
        assert ("Speed, precision: float32." in result.stdout) is not torch.cuda.is_available()
        headings, row = (line for line in result.stdout.splitlines() if "step ms" in line or line.startswith("as chosen"))
        assert re.split(r"\s{2,}", headings.strip()) == list(benchmark.HEADINGS[1:])
        cells = dict(zip(benchmark.HEADINGS, ["as chosen", *row.removeprefix("as chosen").split()], strict=True))
        assert float(cells["tokens/s"].replace(",", "")) == pytest.approx(1e3 * 2 * 16 / float(cells["step ms"]), rel=0.02)
        assert list(place.iterdir()) == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
    def test_without_a_gpu_it_says_what_cannot_be_compared(self, runner, place):
        assert "There is no GPU here: this is slow" in run(runner).stdout

    def test_output_gets_the_figures_with_the_configuration_and_the_machine(self, runner, place):
        result = run(runner, "--output", "speed.json", "--objective", "jsd", "--train", "gradient_accumulation_steps=2")
        assert result.exit_code == 0, result.output
        found = json.loads((place / "speed.json").read_text())
        assert [path.name for path in place.iterdir()] == ["speed.json"]
        assert found["tokens"] == 2 * 2 * 16
        assert found["config"]["objectives"] == [{"name": "jsd"}]
        assert found["rows"][0]["milliseconds"] > 0
        assert found["versions"]["torch"] == version("torch")
        assert found["machine"]["cores"]

    def test_compiled_blocks_are_compared_with_none(self, runner, place):
        result = run(runner, "--set", "speed.compile=true", "--train", "use_cpu=true")
        assert result.exit_code == 0, result.output
        assert "Speed, compile: decoder blocks, one by one, and the norm after them." in result.stdout
        assert "plain: with speed.compile=false." in result.stdout

    def test_what_is_calibrated_sees_more_text_than_a_step_has(self, runner, place):
        """The teacher is 192 wide, and a step here has 30 tokens to whiten by."""
        result = run(runner, "--objective", "mse:normalizer=whitening")
        assert result.exit_code == 0, result.output

    def test_a_quantised_student_and_a_file_of_settings(self, runner, place):
        (place / "own.yaml").write_text("student: {config: {num_hidden_layers: 1}}\nquantizer: ternary\n")
        result = run(runner, "own.yaml")
        assert result.exit_code == 0, result.output
        assert "Student (its shape)" in result.stdout

    @pytest.mark.parametrize(
        ("words", "fragments"),
        [
            (["--objective", "forward_kll"], ("objective 'forward_kll' is unknown", "did you mean 'forward_kl'?")),
            (["--train", "optim=adamw_torhc"], ("train.optim 'adamw_torhc' is unknown", "'adamw_torch'")),
            (["--output", "nowhere/speed.json"], ("--output: 'nowhere/speed.json'", "a file in a folder that exists")),
            (["--seconds", "0"], ("--seconds", "0.0")),
            (["--dataset", "text"], ("--dataset",)),
            (["--teacher", "./nowhere"], ("teacher.model: './nowhere' does not exist",)),
        ],
    )
    def test_wrong_words_are_one_line_and_exit_code_2(self, runner, place, words, fragments):
        result = run(runner, *words)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert all(fragment in result.stderr for fragment in fragments), result.stderr
        assert list(place.iterdir()) == []

    def test_a_misspelt_benchmark_is_guessed(self, runner):
        result = runner.invoke(main, ["benchmark", "sped"])
        assert result.exit_code == 2
        assert "did you mean 'speed'?" in result.stderr

    def test_memory_that_is_too_small_is_one_line_and_exit_code_1(self, runner, place, monkeypatch):
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(benchmark, "measure", full)
        result = run(runner)
        assert result.exit_code == 1
        assert "step: the GPU's memory does not hold it; allowed: a smaller train.per_device_train_batch_size" in result.stderr

    def test_what_it_is_compared_with_may_not_fit(self, runner, place, monkeypatch):
        def full(name, *_):
            if name == "plain":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return Row(name, 1.0, 3, 1.0, 2**30)

        monkeypatch.setattr(benchmark, "measure", full)
        result = run(runner, "--set", "speed.compile=true", "--train", "use_cpu=true")
        assert result.exit_code == 0, result.output
        assert next(line for line in result.stdout.splitlines() if line.startswith("plain")).split()[1:] == [
            "out",
            "of",
            "memory",
        ]
