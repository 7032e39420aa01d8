"""The loss and its gradient do not depend on how a batch is cut, padded, packed, chunked, checkpointed or spread over ranks.

Everywhere: fp32, CPU, dropout 0, the same documents in a step; largest absolute difference over largest absolute value ≤ 1e-5.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

TOLERANCE = 1e-5
LOGITS = ("forward_kl:temperature=2", "jsd:beta=0.3,weight=0.5", "cross_entropy:weight=0.1")
ROW_SET = ("forward_kl", "sinkhorn:weight=0.5,max_rows=6,iterations=20")
BLOCKS = ("forward_kl", "cosine:on=hidden_states,mapper=last_k(k=2),weight=0.3")
PROJECTIONS = (
    "reverse_kl",
    "mse:on=queries,mapper=last_k(k=1),projector=orthogonal,normalizer=layernorm",
    "cosine:on=keys,mapper=last_k(k=1)",
    "mse:on=values,mapper=last_k(k=1),normalizer=l2",
)
ALL = {"logits": LOGITS, "row set": ROW_SET, "blocks": BLOCKS, "q/k/v": PROJECTIONS}


def pair(teacher_width: int = 48) -> tuple[torch.nn.Module, torch.nn.Module]:
    return tiny.model(seed=1), tiny.model(seed=2, hidden_size=teacher_width, num_hidden_layers=3)


def assert_same(first: tuple, second: tuple) -> None:
    assert tiny.distance(first[0], second[0]) <= TOLERANCE
    assert tiny.distance(first[1], second[1]) <= TOLERANCE


@pytest.mark.parametrize("specs", ALL.values(), ids=ALL)
def test_eight_by_one_is_two_by_four_is_one_by_eight(specs):
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *specs)
    rows = tiny.documents(8)
    results = [
        tiny.accumulate(driver, student, [tiny.collate(rows[start : start + size]) for start in range(0, 8, size)])
        for size in (8, 4, 1)
    ]
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("specs", ALL.values(), ids=ALL)
def test_packed_is_unpacked(specs):
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *specs)
    rows = tiny.documents(6)
    packed = [tiny.collate([rows[:3], rows[3:]], packed=True)]
    assert_same(tiny.accumulate(driver, student, packed), tiny.accumulate(driver, student, [tiny.collate(rows)]))


@pytest.mark.parametrize("specs", ALL.values(), ids=ALL)
def test_padding_changes_nothing(specs):
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *specs)
    rows = tiny.documents(4)
    longer = tiny.collate([*rows, {"input_ids": [1] * 30, "labels": [-100] * 30}])
    assert_same(tiny.accumulate(driver, student, [longer]), tiny.accumulate(driver, student, [tiny.collate(rows)]))


@pytest.mark.parametrize("chunk_rows", [1, 3, 64])
@pytest.mark.parametrize("specs", ALL.values(), ids=ALL)
def test_chunked_is_whole(specs, chunk_rows):
    student, teacher = pair()
    batch = [tiny.collate(tiny.documents(4))]
    other = copy.deepcopy(student)
    whole = tiny.accumulate(tiny.driver(other, teacher, *specs, chunk_rows=10_000), other, batch)
    assert_same(tiny.accumulate(tiny.driver(student, teacher, *specs, chunk_rows=chunk_rows), student, batch), whole)


@pytest.mark.parametrize("specs", ALL.values(), ids=ALL)
def test_checkpointing_on_is_off(specs):
    student, teacher = pair()
    student.train()
    batch = [tiny.collate(tiny.documents(4))]
    driver = tiny.driver(student, teacher, *specs)
    off = tiny.accumulate(driver, student, batch)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    on = tiny.accumulate(driver, student, batch)
    assert_same(on, off)


def test_vocabularies_padded_to_different_sizes_are_cut_to_the_real_one():
    """Heads of 97, 104 and 128 rows whose first 97 are equal give one loss; padding rows get no gradient."""
    rows = [tiny.collate(tiny.documents(4))]
    results = []
    for student_rows, teacher_rows in ((97, 97), (104, 128), (128, 104)):
        student, teacher = pair()
        student.resize_token_embeddings(student_rows, mean_resizing=False)
        teacher.resize_token_embeddings(teacher_rows, mean_resizing=False)
        driver = tiny.driver(student, teacher, *LOGITS)
        loss, gradients = tiny.accumulate(driver, student, rows)
        assert not gradients["lm_head.weight"][97:].any()
        results.append(
            (loss, {name: value[:97] if "lm_head" in name or "embed" in name else value for name, value in gradients.items()})
        )
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("specs", ALL.values(), ids=ALL)
def test_nan_in_a_masked_slot_changes_nothing(specs):
    """NaN in every hidden state of an unsupervised position, in both models, leaves loss and gradient as they are."""
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *specs)
    batch = tiny.collate([*tiny.documents(3), {"input_ids": [5] * 9, "labels": [-100] * 9}])
    clean = tiny.accumulate(driver, student, [batch])

    def poison(module, inputs, output):
        if torch.is_tensor(output):
            output = output.clone()
            output[-1] = torch.nan  # the last row holds no supervised token
        return output

    modules = [student.model.norm, teacher.model.norm, *student.model.layers, *teacher.model.layers]
    for network in (student, teacher):
        for layer in network.model.layers:
            modules += [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    handles = [module.register_forward_hook(poison, prepend=True) for module in modules]
    with driver.step(batch, tiny.items([batch]), 0.0, 3):
        loss = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).loss
    for handle in handles:
        handle.remove()
    (at_head,) = torch.autograd.grad(loss, [student.lm_head.weight])
    assert tiny.distance(loss.detach(), clean[0]) <= TOLERANCE
    assert tiny.distance({"head": at_head}, {"head": clean[1]["lm_head.weight"]}) <= TOLERANCE


def test_no_supervised_token_is_an_exact_zero_with_a_graph():
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *BLOCKS, "sinkhorn")
    loss, gradients = tiny.accumulate(driver, student, [tiny.collate([{"input_ids": [1, 2, 3], "labels": [-100] * 3}])])
    assert loss == 0
    assert gradients
    assert not any(value.any() for value in gradients.values())


# --- several processes -----------------------------------------------------------------------------------------------


CASES = {
    f"{name}, {kind}": (kind, specs)
    for name, specs in {"logits and blocks": (*LOGITS, *BLOCKS[1:]), "q/k/v and projectors": PROJECTIONS}.items()
    for kind in ("ddp", "fsdp2")
}


def _step(rank: int, world: int, kind: str, specs: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and whole gradients of a step whose documents are divided over the ranks."""
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *specs)
    rows = tiny.documents(8)
    count = tiny.items([tiny.collate(rows)])
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(student)
    else:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
        for layer in student.model.layers:
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        wrapped = torch.distributed.fsdp.fully_shard(student, mesh=mesh)
    batch = tiny.collate(rows[rank::world])
    with driver.step(batch, count, 0.0, 3):
        loss = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).loss
    (loss * world).backward()  # both average over ranks
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    gradients = {}
    for name, parameter in student.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return total, gradients


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return tiny.of_two_ranks(_step, CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_one_process_is_two_ranks(name, two_ranks):
    """DDP with its default flags, and ``fully_shard`` on a CPU mesh, against one process."""
    student, teacher = pair()
    single = tiny.accumulate(tiny.driver(student, teacher, *CASES[name][1]), student, [tiny.collate(tiny.documents(8))])
    assert_same(two_ranks[name], single)
