"""Terms on features beyond plain rows: logit lens, attention scores, stacked layers, shares of layers, calibrated constants."""

from __future__ import annotations

import pytest
import tiny
import torch

from distily.batch import row_seeds, supervise
from distily.loss.calibration import calibrate
from distily.loss.driver import Driver, local_teacher
from distily.loss.features import FeatureCapture
from distily.loss.terms import Term
from distily.mappings import LayerMapping
from distily.objectives import row_set_objective, token_objective, uniform
from distily.state import Adaptive, Calibrated


def pair(architecture="llama", **overrides):
    return tiny.model(architecture, seed=1, **overrides), tiny.model(architecture, seed=2, **overrides)


def loss_of(specs, architecture="llama", rows=None, chunk_rows=5, **overrides):
    student, teacher = pair(architecture, **overrides)
    driver = tiny.driver(student, teacher, *specs, chunk_rows=chunk_rows)
    return tiny.accumulate(driver, student, [tiny.collate(rows or tiny.documents(6))])


def custom(objective, site, pairs, **options):
    """A driver for one hand-made objective on features."""
    student, teacher = pair()
    terms = torch.nn.ModuleDict(
        {"it": Term("it", objective, objective.description, site=site, mapping=LayerMapping(pairs), **options)}
    )
    driver = Driver(terms, local_teacher(teacher, terms, tiny.VOCABULARY), tiny.VOCABULARY, chunk_rows=5)
    driver.attach(student)
    return student, teacher, driver


# --- logit lens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.SHAPES)
@pytest.mark.parametrize("spec", ["jsd", "sinkhorn:max_rows=6"])
def test_the_lens_of_the_last_block_is_the_logit_loss(architecture, spec):
    """Value and gradient of the body; the head and the final norm get none from the lens."""
    separator = "," if ":" in spec else ":"
    lens, expected = (loss_of([each], architecture) for each in (f"{spec}{separator}on=logit_lens,mapper=last_k(k=1)", spec))
    assert tiny.distance(lens[0], expected[0]) < 1e-5
    body = [name for name in lens[1] if any(part in name for part in (".0.", ".1."))]
    assert tiny.distance({n: lens[1][n] for n in body}, {n: expected[1][n] for n in body}) < 1e-5
    student = tiny.model(architecture)
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    head = [name for name in lens[1] if "lm_head" in name or "embed_out" in name]
    assert tied or not any(lens[1][name].any() for name in head)


def test_the_lens_takes_other_widths_and_chunks_change_nothing():
    spec = ["forward_kl:on=logit_lens,mapper=all,temperature=2.0"]
    student, teacher = tiny.model(seed=1), tiny.model(seed=2, hidden_size=48)
    batch = [tiny.collate(tiny.documents(6))]
    results = []
    for rows in (3, 1000):
        driver = tiny.driver(student, teacher, *spec, chunk_rows=rows)
        results.append(tiny.accumulate(driver, student, batch))
        driver.detach()
    assert tiny.distance(results[0][0], results[1][0]) < 1e-5
    assert tiny.distance(results[0][1], results[1][1]) < 1e-5


# --- attention scores ------------------------------------------------------------------------------------------------


def test_attention_terms_are_those_of_eager_attention_maps():
    """KL between attention maps that transformers itself returns, by dense autograd."""
    student, teacher = pair()
    batch = tiny.collate(tiny.documents(4))
    loss, gradients = tiny.accumulate(tiny.driver(student, teacher, "attention_kl:mapper=last_k(k=1)"), student, [batch])
    student, teacher = pair()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    mine, theirs = (model(**inputs, output_attentions=True).attentions[1] for model in (student, teacher))
    mask = theirs > 0
    each = torch.where(mask, theirs * (theirs.clamp(min=1e-30).log() - mine.clamp(min=1e-30).log()), 0.0).sum(-1).mean(1)
    supervised = batch["shift_labels"] != -100
    expected = each[supervised].sum() / supervised.sum()
    expected.backward()
    assert tiny.distance(loss, expected.detach()) < 1e-5
    dense = {name: p.grad for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert tiny.distance({name: gradients[name] for name in dense}, dense) < 1e-4


@pytest.mark.parametrize("spec", ["attention_kl", "attention_mse", "self_relation:on=queries"])
def test_packing_and_chunks_leave_relations_between_tokens_as_they_are(spec):
    student, teacher = pair()
    rows = tiny.documents(6)
    results = []
    for packed, chunk_rows in ((False, 100), (False, 3), (True, 4)):
        driver = tiny.driver(student, teacher, spec, chunk_rows=chunk_rows)
        batch = tiny.collate([rows[:3], rows[3:]] if packed else rows, packed)
        results.append(tiny.accumulate(driver, student, [batch]))
        driver.detach()
    for other in results[1:]:
        assert tiny.distance(other[0], results[0][0]) < 1e-5
        assert tiny.distance(other[1], results[0][1]) < 1e-4


# --- how layers count ------------------------------------------------------------------------------------------------


@token_objective(on=("hidden_states",))
def squared(student, teacher):
    return (student - teacher).square().mean(-1)


@row_set_objective(on=("hidden_states",), stacked=True)
def change(student, teacher):
    """How the states change from layer to layer, ``(n, P, H)``."""
    assert student.shape[1] == 2
    return (student.diff(dim=1) - teacher.diff(dim=1)).square().mean((1, 2))


def test_a_stacked_objective_gets_all_layers_at_once():
    student, teacher, driver = custom(change, "hidden_states", [(1, 1), (2, 2)])
    batch = tiny.collate(tiny.documents(4))
    loss, _ = tiny.accumulate(driver, student, [batch])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    caught = []
    for model in (student, teacher):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, arguments, output: caught.append(output[batch["shift_labels"] != -100]))
        model(**inputs)
    mine, theirs = torch.stack(caught[:2], 1), torch.stack(caught[2:], 1)
    assert tiny.distance(loss, change(mine, theirs).mean().detach()) < 1e-5


class Second(LayerMapping, Adaptive):
    """Only the second match counts; remembers the values of a step."""

    def __init__(self, pairs):
        super().__init__(pairs)
        self.register_buffer("pending", torch.zeros(len(pairs)), persistent=False)
        self.register_buffer("seen", torch.zeros(len(pairs)))

    def shares(self, values, progress):
        if torch.is_grad_enabled():
            self.pending += values
        return values.new_tensor([0.0, 1.0])

    def advance(self, progress):
        self.seen.copy_(self.pending)


def test_a_mapping_weighs_its_matches_and_adapts_to_the_whole_batch():
    student, teacher = pair()
    rows = tiny.documents(6)
    seen, losses = [], []
    for divided in ([rows], [rows[:2], rows[2:]]):
        term = Term("it", squared, squared.description, site="hidden_states", mapping=Second([(1, 1), (2, 2)]))
        terms = torch.nn.ModuleDict({"it": term})
        driver = Driver(terms, local_teacher(teacher, terms, tiny.VOCABULARY), tiny.VOCABULARY)
        driver.attach(student)
        losses.append(tiny.accumulate(driver, student, [tiny.collate(part) for part in divided])[0])
        driver.advance(0.1)
        seen.append(term.mapping.seen.clone())
        assert not term.mapping.pending.any()
        driver.detach()
    assert torch.allclose(seen[0], seen[1], rtol=1e-5)
    assert losses[0] == pytest.approx(float(seen[0][1]), rel=1e-5)


@pytest.mark.parametrize(("sharing", "count"), [("pair", 4), ("block", 2), ("all", 1)])
def test_who_shares_a_projector(sharing, count):
    student, teacher = tiny.model(seed=1), tiny.model(seed=2, hidden_size=48)
    pairs = "mapper=index(pairs=[[1,1],[1,2],[2,1],[2,2]])"
    driver = tiny.driver(student, teacher, f"mse:{pairs},projector=linear,projector_for={sharing}")
    assert len(driver.terms[0].learned) == count
    assert len(driver.terms[0].projectors) == 4


def test_a_width_free_objective_has_no_projector_unless_asked_for():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2, hidden_size=48)
    driver = tiny.driver(student, teacher, "cka")
    assert not driver.terms[0].projectors
    driver.detach()
    driver = tiny.driver(student, teacher, "cka:projector=linear")
    assert driver.terms[0].projectors[0].weight.shape == (48, 32)


def test_a_learned_objective_has_one_instance_for_each_pair_of_layers():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2, hidden_size=48)
    driver = tiny.driver(student, teacher, "variational_information:mapper=all")
    assert len(driver.terms[0].objectives) == 2
    _, gradients = tiny.accumulate(driver, student, [tiny.collate(tiny.documents(4))])
    learned = [name for name in gradients if "distily_objectives" in name]
    assert len(learned) >= 4
    assert all(gradients[name].any() for name in learned)


def test_normalizing_the_teacher_alone_leaves_the_students_rows():
    both, teacher_only = (loss_of([f"mse:normalizer=layernorm,normalized={sides}"])[0] for sides in ("both", "teacher"))
    student, teacher = pair()
    batch = tiny.collate(tiny.documents(6))
    caught = []
    for model in (student, teacher):
        model.model.layers[0].register_forward_hook(
            lambda module, arguments, output: caught.append(output[batch["shift_labels"] != -100])
        )
        model(**{key: batch[key] for key in ("input_ids", "attention_mask")})
    normed = torch.nn.functional.layer_norm(caught[1], (32,))
    assert tiny.distance(teacher_only, (caught[0] - normed).square().mean().detach()) < 1e-5
    assert tiny.distance(both, teacher_only) > 0.01


# --- constants measured before training ------------------------------------------------------------------------------


@token_objective(on=("logits", "hidden_states"), temperature_scale="none")
class Scaled(Calibrated):
    """The mean square of the difference, in units of the teacher's mean square as calibrated."""

    calibration_rows = 40

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unit", torch.ones(()))
        self.rows, self.total = 0, 0.0

    def observe(self, student, teacher, **inputs):
        self.rows += len(teacher)
        self.total += float(teacher.square().mean(-1).sum())

    def conclude(self):
        if self.rows < 10:
            raise ValueError(f"only {self.rows} rows were seen")
        self.unit.fill_(self.total / self.rows)

    def forward(self, student, teacher):
        return (student - teacher).square().mean(-1) / self.unit


@pytest.mark.parametrize("site", ["logits", "hidden_states", "logit_lens"])
def test_constants_are_measured_on_training_text_until_there_is_enough(site):
    pairs = [] if site == "logits" else [(2, 2)]
    student, teacher, driver = custom(Scaled(), site, pairs)
    read = []

    def batches():
        for seed in range(20):
            read.append(tiny.collate(tiny.documents(4, seed)))
            yield read[-1]

    calibrate(driver, batches())
    supervised = sum(len(supervise(batch).lengths) and int(supervise(batch).index.numel()) for batch in read[:-1])
    assert len(read) < 8
    assert supervised >= 40 > supervised - int(supervise(read[-2]).index.numel())
    values = []
    for batch in read[:-1]:
        output = teacher(**{key: batch[key] for key in ("input_ids", "attention_mask")})
        rows = output.logits
        if site == "hidden_states":
            capture = FeatureCapture(teacher, [(site, 2)])
            with capture.opened() as tensors:
                teacher(**{key: batch[key] for key in ("input_ids", "attention_mask")})
                rows = capture.feature((site, 2), tensors)
        values.append(rows[batch["shift_labels"] != -100].square().mean(-1))
    objective = driver.terms[0].objectives[0]
    assert 40 <= objective.rows <= supervised
    assert objective.unit.item() == pytest.approx(torch.cat(values)[: objective.rows].mean().item(), rel=1e-4)


def test_too_little_text_is_one_line():
    from distily.errors import DistilyError

    _, _, driver = custom(Scaled(), "logits", [])
    with pytest.raises(DistilyError, match="objective it: Scaled: only 0 rows"):
        calibrate(driver, [])


def test_nothing_is_read_where_nothing_is_calibrated():
    student, teacher = pair()
    driver = tiny.driver(student, teacher, "forward_kl", "mse")

    def never():
        raise AssertionError("a batch was read")
        yield

    calibrate(driver, never())


# --- draws of a row --------------------------------------------------------------------------------------------------


def test_a_row_draws_the_same_numbers_wherever_its_document_lies():
    rows = tiny.documents(6)
    alone = [row_seeds(supervise(tiny.collate([row])), 7) for row in rows]
    together = row_seeds(supervise(tiny.collate(rows)), 7)
    packed = row_seeds(supervise(tiny.collate([rows[:3], rows[3:]], packed=True)), 7)
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(together, packed)
    assert together.unique().numel() == together.numel()
    assert not torch.isin(row_seeds(supervise(tiny.collate(rows)), 8), together).any()


def test_draws_are_uniform_and_independent():
    """Mean, variance and correlation of 10⁶ draws within five standard errors; Kolmogorov-Smirnov by scipy."""
    from scipy import stats

    drawn = uniform(torch.arange(1000), 1000)
    assert (drawn.min() > 0) & (drawn.max() < 1)
    assert abs(drawn.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 1000
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-4
    assert abs(torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]) < 5e-3
    assert abs(torch.corrcoef(torch.stack([drawn[:, :-1].flatten(), drawn[:, 1:].flatten()]))[0, 1]) < 5e-3
    assert torch.equal(uniform(torch.arange(1000)[500:], 1000), drawn[500:])


# --- parts that are frozen, empty or switched on later --------------------------------------------------------------------


def test_a_lens_trains_no_head_of_whatever_kind():
    """A head that is no plain linear layer (LoRA, quantised) reads too, and gets no gradient."""

    class Head(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2.0

    student, teacher = pair()
    for model in (student, teacher):
        model.lm_head.__class__ = Head
    driver = tiny.driver(student, teacher, "forward_kl:on=logit_lens,mapper=last_k(k=1)")
    loss, gradients = tiny.accumulate(driver, student, [tiny.collate(tiny.documents(4))])
    assert loss > 0
    assert not gradients.get("lm_head.weight", torch.zeros(1)).any()


def test_a_batch_without_a_supervised_token_leaves_no_parameter_without_a_gradient():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2, hidden_size=48)
    driver = tiny.driver(student, teacher, "mutual_information", "attention_kl", "forward_kl:on=logit_lens", "mse")
    loss, gradients = tiny.accumulate(driver, student, [tiny.collate([{"input_ids": [1, 2, 3], "labels": [-100] * 3}])])
    learned = {name for name, parameter in student.named_parameters() if "distily_objectives" in name and parameter.requires_grad}
    assert loss == 0
    assert learned
    assert learned <= set(gradients)


def test_what_starts_later_is_calibrated_before_training():
    student, teacher = pair()
    driver = tiny.driver(student, teacher, "mse:normalizer=standardize,weight=linear(start=0,end=1)")
    calibrate(driver, [tiny.collate(tiny.documents(8, seed)) for seed in range(3)])
    assert not torch.equal(driver.terms[0].normalizers[0].mean, torch.zeros(32))


def test_a_closed_driver_leaves_both_models_as_they_were():
    student, teacher = pair()
    hooks = [sum(len(module._forward_hooks) for module in model.modules()) for model in (student, teacher)]
    driver = tiny.driver(student, teacher, "attention_kl", "mse")
    assert teacher.config._attn_implementation == "distily_sdpa"
    driver.close()
    assert [sum(len(module._forward_hooks) for module in model.modules()) for model in (student, teacher)] == hooks
    assert {model.config._attn_implementation for model in (student, teacher)} == {"sdpa"}


def test_objectives_get_float32_under_autocast():
    @token_objective(temperature_scale="none")
    def product(student, teacher):
        assert student.dtype == teacher.dtype == torch.float32
        assert (student @ student.T).dtype == torch.float32
        return (student - teacher).square().mean(-1)

    student, teacher, driver = custom(product, "logits", [])
    batch = tiny.collate(tiny.documents(4))
    with driver.step(batch), torch.autocast("cpu", torch.bfloat16):
        loss = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).loss
    loss.backward()
    assert loss.dtype == torch.float32


def test_an_unknown_layout_of_a_fused_projection_is_refused():
    from distily.errors import DistilyError

    student, teacher = pair("gpt2")
    student.config.model_type = "gpt_bigcode"
    driver = tiny.driver(student, teacher, "mse:on=queries,mapper=last_k(k=1)")
    with pytest.raises(DistilyError, match="in one projection is not known"):
        tiny.accumulate(driver, student, [tiny.collate(tiny.documents(2))])
