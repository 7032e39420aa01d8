"""``distily search-layers``: a planted mapping comes back exactly, choices are the best there are, the file is read by ``searched``."""

from __future__ import annotations

import itertools
import json

import pytest
import tiny
import torch
from distily_layer_mappers import searched
from hypothesis import given, settings
from hypothesis import strategies as st

from distily.cli import main, search_layers
from distily.config import StudentConfig
from distily.errors import DistilyError
from distily.layer_search import METHODS, assignment, fingerprint, monotone, similarity_matrix
from distily.layers import layer_pairs
from distily.loss.features import FeatureCapture, decoder_blocks
from distily.models import build_student
from distily.similarity import linear_cka

DEPTH = 6
LAST = ("o_proj.weight", "down_proj.weight", "c_proj.weight", "c_proj.bias", "dense.weight", "dense_4h_to_h.weight")
"""What a block adds to the residual stream goes through these."""


def planted(architecture: str, copied: list[int]):
    """A teacher in which the blocks that were not copied do nothing, and the student of the others."""
    name = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    teacher = tiny.model(architecture, seed=3, **{name: DEPTH})
    for number, block in enumerate(decoder_blocks(teacher), start=1):
        for key, parameter in block.named_parameters():
            if number not in copied and key.endswith(LAST):
                parameter.data.zero_()
    return build_student(StudentConfig(config={name: len(copied)}, layers=copied), teacher, seed=0).eval(), teacher


def batches(count: int = 4) -> list[dict]:
    return [tiny.collate(tiny.documents(8, seed=seed)) for seed in range(count)]


@pytest.mark.parametrize("copied", [[1, 3, 6], [2, 3, 5], [1, 2, 3], [4, 5, 6]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_planted_mapping_comes_back_exactly(architecture, copied):
    matrix, _ = similarity_matrix(*planted(architecture, copied), batches(), rows=200)
    for method in (monotone, assignment):
        assert method(matrix) == list(enumerate(copied, start=1))


def test_a_copy_stays_recognised_where_the_blocks_that_were_left_out_do_little():
    """Not where they do much: then a copied block reads another input than in the teacher, and resembles no block most of all."""
    student, teacher = planted("gpt2", [2, 3, 5])
    for number, block in enumerate(decoder_blocks(teacher), start=1):
        if number in (1, 4, 6):
            for key, parameter in block.named_parameters():
                if key.endswith(LAST):
                    torch.nn.init.normal_(parameter, std=0.01)
    matrix, _ = similarity_matrix(student, teacher, batches(), rows=200)
    assert monotone(matrix) == [(1, 2), (2, 3), (3, 5)]
    assert matrix.max() < 1.0


def test_the_matrix_is_the_cka_of_the_supervised_tokens_but_the_first():
    student, teacher = tiny.model(seed=1, num_hidden_layers=2), tiny.model(seed=2, hidden_size=16, num_hidden_layers=3)
    documents = tiny.documents(6, prompt=0)
    matrix, rows = similarity_matrix(student, teacher, [tiny.collate(documents)], rows=1000)
    features = []
    for model, depth in ((student, 2), (teacher, 3)):
        capture = FeatureCapture(model, [("hidden_states", block) for block in range(1, depth + 1)])
        found = []
        for document in documents:
            with torch.no_grad(), capture.opened() as tensors:
                model(input_ids=torch.tensor([document["input_ids"]]))
                found.append([capture.feature(feature, tensors)[0, 1:-1].double() for feature in capture.wanted])
        features.append([torch.cat(parts) for parts in zip(*found, strict=True)])
    assert rows == len(features[0][0])
    for (i, mine), (j, theirs) in itertools.product(*(enumerate(side) for side in features)):
        assert matrix[i, j].item() == pytest.approx(linear_cka(mine, theirs).item(), abs=1e-5)


SCORES = st.lists(st.lists(st.integers(-5, 20), min_size=6, max_size=6), min_size=4, max_size=4)


@settings(max_examples=30, deadline=None)
@given(scores=SCORES)
def test_no_rising_choice_is_better_than_the_monotone_one(scores):
    matrix = torch.tensor(scores, dtype=torch.float64)
    every = itertools.combinations_with_replacement(range(6), 4)
    best = max(sum(matrix[i, j].item() for i, j in enumerate(columns)) for columns in every)
    pairs = monotone(matrix)
    blocks = [teacher for _, teacher in pairs]
    assert blocks == sorted(blocks)
    assert [student for student, _ in pairs] == [1, 2, 3, 4]
    assert sum(scores[i - 1][j - 1] for i, j in pairs) == best


@settings(max_examples=15, deadline=None)
@given(scores=SCORES)
def test_no_choice_of_different_blocks_is_better_than_the_assignment(scores):
    best = max(sum(scores[i][j] for i, j in enumerate(columns)) for columns in itertools.permutations(range(6), 4))
    pairs = assignment(torch.tensor(scores, dtype=torch.float64))
    assert len({teacher for _, teacher in pairs}) == 4
    assert sum(scores[i - 1][j - 1] for i, j in pairs) == best


def test_a_student_deeper_than_its_teacher_has_no_assignment():
    with pytest.raises(DistilyError, match="needs 3 teacher blocks or more, not 2"):
        assignment(torch.zeros(3, 2))
    assert monotone(torch.eye(3, 2)) == [(1, 1), (2, 2), (3, 2)]


def test_the_command_offers_every_method():
    option = next(each for each in search_layers.params if each.name == "method")
    assert list(option.type.choices) == list(METHODS)


@pytest.fixture(scope="module")
def found(tiny_llama, tiny_text, tmp_path_factory):
    """What the command printed and wrote."""
    from click.testing import CliRunner

    file = tmp_path_factory.mktemp("search") / "layers.json"
    words = ["--teacher", tiny_llama, "--student-config", "num_hidden_layers=1", "--dataset", tiny_text, "--rows", "300"]
    result = CliRunner().invoke(main, ["search-layers", *map(str, words), "--output", str(file)])
    assert result.exit_code == 0, result.output
    return result.output, file


def test_the_command_prints_the_choice_beside_its_controls_and_saves_where_it_comes_from(found):
    printed, file = found
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert {"searched", "uniform", "penultimate_k", "reverse", "random", "none"} <= lines.keys()
    assert float(lines["searched"][1]) >= max(float(lines[name][1]) for name in ("uniform", "reverse", "random"))
    saved = json.loads(file.read_text())
    assert saved["pairs"] in ([[1, 1]], [[1, 2]])
    assert (len(saved["matrix"]), len(saved["matrix"][0])) == (1, 2)
    assert saved["data"]["rows"] >= 300
    assert {"teacher", "student", "seed", "versions", "method", "totals"} <= saved.keys()
    assert saved["student"]["sha256"] != saved["teacher"]["sha256"]


def test_the_mapper_reads_what_the_command_wrote_for_models_of_these_depths_alone(found, tmp_path):
    file = str(found[1])
    assert layer_pairs("searched", lambda s, t: searched(s, t, file=file), 1, 2) == [
        tuple(json.loads(found[1].read_text())["pairs"][0])
    ]
    other, broken = tmp_path / "other.json", tmp_path / "broken.json"
    other.write_text("[1]")
    broken.write_text("{")
    for path, depths, message in (
        (file, (1, 3), "is for 1 and 2 blocks, not for 1 and 3"),
        (str(other), (1, 2), "was not written by distily search-layers"),
        (str(broken), (1, 2), "it is not JSON"),
        (str(tmp_path / "missing.json"), (1, 2), "No such file"),
    ):
        with pytest.raises(DistilyError, match=message):
            layer_pairs("searched", lambda s, t, path=path: searched(s, t, file=path), *depths)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "missing/layers.json"], "a file in a folder that exists"),
        (["--teacher", "./nothing"], "does not exist"),
        (["--rows", "3"], "3 is not in the range"),
        (["--method", "best"], "best"),
        (["--set", "data.colour=red"], "data.colour"),
        (["nothing.yaml"], "cannot be read"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_file(words, message, runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(main, ["search-layers", *words])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_text_without_enough_tokens_and_blocks_without_variation_are_refused():
    student = tiny.model()
    with pytest.raises(DistilyError, match="longer documents"):
        similarity_matrix(student, student, [tiny.collate(tiny.documents(1, shortest=3, longest=3, prompt=0))], rows=10)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    with pytest.raises(DistilyError, match="the same for all tokens"):
        similarity_matrix(student, student, batches(1), rows=10)


def test_a_fingerprint_changes_with_any_weight():
    model = tiny.model()
    before = fingerprint(model)
    assert fingerprint(tiny.model()) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert fingerprint(model) != before
