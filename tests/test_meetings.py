"""Where terms meet: a combiner's coefficients applied to gradients in one backward, whatever the division of the batch."""

from __future__ import annotations

import pytest
import tiny
import torch

from distily.errors import DistilyError, RunError
from distily.loss import meetings
from distily.loss.meetings import Combination
from distily.spec import Component, parse_component

LOGITS = ("forward_kl", "reverse_kl:weight=0.3", "sinkhorn:max_rows=4,weight=0.1")
MIXED = ("forward_kl", "cross_entropy:weight=0.2", "mse:mapper=last_k(k=2),weight=0.05", "cosine:on=queries,projector=linear")
FEATURE = ("forward_kl", "mse:mapper=last_k(k=1),weight=0.3")


def pair(dtype=torch.float64, **overrides):
    return tiny.model(seed=1, dtype=dtype, **overrides), tiny.model(seed=2, dtype=dtype, **overrides)


def combination(spec: str, **core) -> Combination:
    component = parse_component(spec, "combiner")
    return meetings.combination(Component(component.name, {**component.options, **core}), tiny.plugins())


def run(specs, spec=None, divisions=(8,), steps=1, dtype=torch.float64, prepare=None, **core):
    """The gradients of the last of some optimizer steps, each over the same documents divided into micro-batches."""
    student, teacher = pair(dtype)
    if prepare is not None:
        prepare(student)
    options = {} if spec is None else {"combination": combination(spec, **core)}
    driver = tiny.driver(student, teacher, *specs, **options)
    rows, batches = iter(tiny.documents(8)), []
    for size in divisions:
        batches.append(tiny.collate([next(rows) for _ in range(size)]))
    for _ in range(steps):
        loss, gradients = tiny.accumulate(driver, student, batches)
        driver.advance(0.5)
    return loss, gradients, driver


def assert_same(found, expected, tolerance):
    assert tiny.distance(found[0], expected[0]) <= tolerance
    assert tiny.distance(found[1], expected[1]) <= tolerance


@pytest.mark.parametrize("scope", ["step", "token", "micro_batch"])
@pytest.mark.parametrize("specs", [LOGITS, MIXED], ids=["logits", "logits and features"])
def test_sum_is_the_joint_backward(specs, scope):
    """Gradients of body, head and projectors, in float64 to 1e-12."""
    assert_same(run(specs, "sum", scope=scope), run(specs), 1e-12)


@pytest.mark.parametrize("scope", ["step", "token", "micro_batch"])
def test_sum_under_activation_checkpointing(scope):
    def checkpointing(student):
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.train()

    assert_same(run(MIXED, "sum", scope=scope, prepare=checkpointing), run(MIXED), 1e-12)


@pytest.mark.parametrize("spec", ["sum", "project_auxiliary", "gradient_weighted", "pcgrad", "cosine_gate"])
@pytest.mark.parametrize("scope", ["step", "token"])
def test_the_division_of_the_batch_changes_nothing(spec, scope):
    """One micro-batch of 8, two of 4, and an uneven split, after a few steps in which coefficients moved."""
    expected = run(MIXED, spec, steps=3, scope=scope)
    for divisions in ((4, 4), (1, 5, 2)):
        assert_same(run(MIXED, spec, divisions, steps=3, scope=scope), expected, 1e-9)


@pytest.mark.parametrize("spec", ["ratio", "ema_normalized", "uncertainty"])
def test_values_are_combined_over_the_whole_batch(spec):
    expected = run(MIXED, spec, steps=4)
    assert_same(run(MIXED, spec, (3, 4, 1), steps=4), expected, 1e-9)
    assert tiny.distance(expected[1], run(MIXED, steps=1)[1]) > 1e-4, "the coefficients did not move"


@pytest.mark.parametrize("scope", ["token", "micro_batch"])
@pytest.mark.parametrize("spec", ["project_auxiliary", "gradient_weighted", "cosine_gate"])
def test_an_opposing_logit_term_leaves_the_primary_gradient(spec, scope):
    """Forward KL against half of itself with the opposite sign: the body gets exactly what forward KL alone gives it."""
    specs = ("forward_kl", "forward_kl:weight=-0.5")
    _, combined, driver = run(specs, spec, scope=scope)
    _, alone, _ = run(("forward_kl",))
    _, joint, _ = run(specs)
    body = [name for name in alone if "lm_head" not in name]
    assert tiny.distance({n: combined[n] for n in body}, {n: alone[n] for n in body}) <= 1e-12
    assert tiny.distance({n: joint[n] for n in body}, {n: alone[n] for n in body}) > 0.1, "the case does not oppose"
    assert tiny.distance(combined["lm_head.weight"][None].sum(), joint["lm_head.weight"][None].sum()) <= 1e-9
    measured = driver.measurements()
    assert measured["combiner_logits_cosine_1"] == pytest.approx(-1.0)


@pytest.mark.parametrize("scope", ["token", "micro_batch"])
@pytest.mark.parametrize("spec", ["project_auxiliary", "gradient_weighted", "cosine_gate"])
def test_an_opposing_feature_leaves_the_primary_gradient(spec, scope, monkeypatch):
    """A feature term whose gradient at h_k is minus a third of the one from above, made so by hand."""
    from distily.loss.meetings import Meeting

    original = Meeting.combine

    def opposed(self, gradients):
        above, own = gradients
        return original(self, [above, -above / 3])

    monkeypatch.setattr(Meeting, "combine", opposed)
    _, combined, driver = run(FEATURE, spec, scope=scope)
    monkeypatch.setattr(Meeting, "combine", original)
    _, alone, _ = run(("forward_kl",))
    assert tiny.distance({n: combined[n] for n in alone}, alone) <= 1e-12
    measured = driver.measurements()
    assert measured["combiner_hidden_states_2_cosine_1"] == pytest.approx(-1.0)
    assert measured["combiner_hidden_states_2_removed_share"] == pytest.approx(1.0)


def test_a_feature_meets_what_comes_from_above_at_its_block():
    """The Gram numbers of the log are those of gradients taken by hand at the block's output."""
    _, _, driver = run(FEATURE, "sum", scope="token")
    student, teacher = pair()
    caught = {}

    def watch(module, inputs, output):
        caught["h"] = output[0] if isinstance(output, tuple) else output

    gradients = []
    batch = tiny.collate(tiny.documents(8))
    for spec in FEATURE:
        plain = tiny.driver(student, teacher, spec)
        handle = student.model.layers[1].register_forward_hook(watch)
        with plain.step(batch, None, 0.0, 3):
            loss = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).loss
        gradients += torch.autograd.grad(loss, caught["h"])
        handle.remove()
        plain.detach()
    expected = torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0)
    measured = driver.measurements()
    assert measured["combiner_hidden_states_2_cosine_1"] == pytest.approx(float(expected), rel=1e-9)
    assert measured["combiner_hidden_states_2_norm_1"] == pytest.approx(float(gradients[1].norm()), rel=1e-9)
    assert measured["combiner_hidden_states_2_removed_share"] == 0.0


def test_the_incoming_scale_of_the_loss_is_carried_to_features_and_projectors():
    """A loss times 8 (a GradScaler, a number of ranks) gives gradients times 8, and the same coefficients."""
    results = []
    for factor in (1.0, 8.0):
        student, teacher = pair()
        driver = tiny.driver(student, teacher, *MIXED, combination=combination("project_auxiliary", scope="micro_batch"))
        batch = tiny.collate(tiny.documents(8))
        with driver.step(batch, None, 0.0, 3):
            loss = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).loss
        (loss * factor).backward()
        driver.advance(0.1)
        results.append(({n: p.grad for n, p in student.named_parameters()}, driver.measurements()))
    assert tiny.distance({n: g / 8 for n, g in results[1][0].items()}, results[0][0]) <= 1e-12
    assert results[0][1] == pytest.approx(results[1][1])


def test_hooks_live_for_one_step_only():
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *FEATURE, combination=combination("project_auxiliary", scope="token"))
    batch = [tiny.collate(tiny.documents(4))]
    first = tiny.accumulate(driver, student, batch)
    driver.advance(0.1)
    second = tiny.accumulate(driver, student, batch)
    assert_same(second, first, 1e-15)


def test_state_is_in_the_students_state_dict_and_a_resumed_run_goes_on_alike():
    straight = run(MIXED, "gradient_weighted", steps=4)
    _, _, first = run(MIXED, "gradient_weighted", steps=3)
    state = first.student.state_dict()
    assert any(key.startswith("distily_objectives.meetings.") for key in state)
    student, teacher = pair()
    resumed = tiny.driver(student, teacher, *MIXED, combination=combination("gradient_weighted"))
    student.load_state_dict(state)
    assert_same(tiny.accumulate(resumed, student, [tiny.collate(tiny.documents(8))]), straight, 1e-12)


def test_evaluation_measures_nothing():
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *MIXED, combination=combination("sum"))
    batch = tiny.collate(tiny.documents(4))
    with torch.no_grad(), driver.step(batch):
        student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert not any(meeting.pending.any() for meeting in driver.meetings.values())


def test_a_backward_that_does_not_come_by_is_an_error():
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *FEATURE, combination=combination("sum"))
    batch = tiny.collate(tiny.documents(4))
    with driver.step(batch):
        student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(RunError, match="did not come by"):
        driver.advance(0.1)


def test_without_a_primary_term_there_is_nothing_to_combine_with():
    student, teacher = pair()
    with pytest.raises(DistilyError, match="one of them on logits"):
        tiny.driver(student, teacher, "mse", "cosine", combination=combination("sum"))


# --- two ranks -------------------------------------------------------------------------------------------------------


COMBINED = [("gradient_weighted", {"scope": "step"}), ("pcgrad", {"scope": "token"}), ("ema_normalized", {})]


def _steps(rank: int, world: int, spec: str, options: dict[str, str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the third of three steps whose documents are divided over the ranks."""
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *MIXED, combination=combination(spec, **options))
    rows = tiny.documents(8)
    count = tiny.items([tiny.collate(rows)])
    wrapped = torch.nn.parallel.DistributedDataParallel(student)
    batch = tiny.collate(rows[rank::world])
    for _ in range(3):
        student.zero_grad()
        with driver.step(batch, count, 0.0, 3):
            loss = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).loss
        (loss * world).backward()
        driver.advance(0.5)
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return total, {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return tiny.of_two_ranks(_steps, {spec: (spec, options) for spec, options in COMBINED}, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("spec", "options"), COMBINED)
def test_two_ranks_are_one_process(spec, options, two_ranks):
    assert_same(two_ranks[spec], run(MIXED, spec, steps=3, **options), 1e-9)


# --- steps that went wrong, and the values beside the gradients ---------------------------------------------------------


@pytest.mark.parametrize("spec", ["gradient_weighted", "gradnorm", "ema_normalized"])
def test_a_step_with_an_infinite_loss_moves_no_state(spec):
    student, teacher = pair()
    driver = tiny.driver(student, teacher, *MIXED, combination=combination(spec))
    tiny.accumulate(driver, student, [tiny.collate(tiny.documents(8))])
    driver.advance(0.1)
    before = {name: value.clone() for name, value in driver.loss.state_dict().items()}
    for module in driver.loss.modules():
        if "pending" in dict(module.named_buffers(recurse=False)):
            module.pending.fill_(float("nan"))
    driver.advance(0.2)
    assert all(torch.equal(value, before[name]) for name, value in driver.loss.state_dict().items())


def test_a_meeting_knows_the_weighted_values_of_its_terms(monkeypatch):
    from distily.loss.meetings import Meeting

    seen = {}
    monkeypatch.setattr(Meeting, "advance", lambda self, progress: seen.update({id(self): self.pending.clone()}))
    _, _, driver = run(MIXED, "sum", (3, 5))
    _, _, plain = run(MIXED)
    student, batch = plain.student, tiny.collate(tiny.documents(8))
    with torch.no_grad(), plain.step(batch, None, 0.0, 3) as step:
        student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = [float(step.values["forward_kl"]), 0.2 * float(step.values["cross_entropy"])]
    values = {name: seen[id(meeting)][4:6].tolist() for name, meeting in driver.meetings.items()}
    assert values["logits"] == pytest.approx(logits, rel=1e-6)
    assert values["hidden_states_1"] == pytest.approx([sum(logits), 0.05 * float(step.values["mse"])], rel=1e-6)
    assert values["queries_1"] == pytest.approx([sum(logits), float(step.values["cosine"])], rel=1e-6)


def test_a_feature_of_frozen_blocks_has_nothing_to_meet():
    """No gradient arrives there; the projector trains as without a combiner."""

    def freeze(student):
        student.model.embed_tokens.requires_grad_(False)
        student.model.layers[0].requires_grad_(False)

    specs = ("forward_kl", "mse:mapper=last_k(k=2),projector=linear,weight=0.1")
    assert_same(run(specs, "sum", scope="token", prepare=freeze), run(specs, prepare=freeze), 1e-12)


def test_a_term_that_starts_later_is_known_to_a_combiner_of_values():
    """Its value is measured while its weight is 0, so that it does not start with the coefficient of a loss of nothing."""
    student, teacher = pair()
    late = "reverse_kl:weight=step(start=0,end=1,at_progress=0.5)"
    driver = tiny.driver(student, teacher, "forward_kl", late, combination=combination("uncertainty"))
    for progress in (0.0, 0.1, 0.2):
        tiny.accumulate(driver, student, [tiny.collate(tiny.documents(8))], progress)
        driver.advance(progress)
    assert driver.measurements()["combiner_run_weight_1"] < 10
