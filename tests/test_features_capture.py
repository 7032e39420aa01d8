"""What is captured is what the models compute: attention scores against eager attention, the rest against plain hooks."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from distily.errors import DistilyError
from distily.loss.attention import AttentionScores
from distily.loss.features import FeatureCapture, width

LENGTH = 24
MODULES = {  # of the first block: output projection of the attention
    "gpt2": "transformer.h.0.attn.c_proj", "gpt_neox": "gpt_neox.layers.0.attention.dense",
    "opt": "model.decoder.layers.0.self_attn.out_proj",
}  # fmt: skip


def inputs(kind: str) -> tuple[dict[str, torch.Tensor], list[tuple[int, int, int]]]:
    """Two rows of tokens and their documents: (row, first position, end)."""
    ids = torch.randint(1, tiny.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if kind == "right padded":
        mask[0, 17:] = 0
        return {"input_ids": ids, "attention_mask": mask}, [(0, 0, 17), (1, 0, LENGTH)]
    if kind == "left padded":
        mask[0, :5] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, [(0, 5, LENGTH), (1, 0, LENGTH)]
    if kind == "packed":
        lengths = [[10, 14], [20, 4]]
        positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
        return {"input_ids": ids, "position_ids": positions}, [(0, 0, 10), (0, 10, 24), (1, 0, 20), (1, 20, 24)]
    return {"input_ids": ids}, [(0, 0, LENGTH), (1, 0, LENGTH)]


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor], **options: object) -> object:
    return model(**batch, use_cache=False, **options)


def flat(row: int, first: int, end: int) -> torch.Tensor:
    return row * LENGTH + torch.arange(first, end)


class TestAttentions:
    @pytest.mark.parametrize("kind", ["full", "right padded", "left padded", "packed"])
    @pytest.mark.parametrize("architecture", tiny.SHAPES)
    def test_their_softmax_is_what_eager_attention_returns(self, architecture: str, kind: str) -> None:
        """Grouped heads (llama …), norms of q and k (qwen3), soft cap and a window of 16 in one of two blocks (gemma2)."""
        if (architecture, kind) == ("opt", "packed"):
            pytest.skip("OPT does not separate packed documents; Distily's probe refuses it")
        model = tiny.model(architecture)
        batch, documents = inputs(kind)
        before = model.config._attn_implementation
        native = forward(model, batch).logits
        capture = FeatureCapture(model, [("attentions", 1), ("attentions", 2)])
        with capture.opened() as tensors:
            assert torch.equal(forward(model, batch).logits, native)
            scores = [capture.feature(("attentions", block), tensors) for block in (1, 2)]
        capture.remove()
        assert model.config._attn_implementation == before
        model.set_attn_implementation("eager")
        for found, expected in zip(scores, forward(model, batch, output_attentions=True).attentions, strict=True):
            for row, first, end in documents:
                weights = found.rows(flat(row, first, end)).softmax(-1)
                assert weights.shape == (end - first, model.config.num_attention_heads, LENGTH)
                own = expected[row, :, first:end, first:end].transpose(0, 1)
                torch.testing.assert_close(weights[..., : end - first], own, rtol=0, atol=1e-5)
                assert weights[..., end - first :].eq(0).all()

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
    def test_a_packed_document_has_the_scores_that_it_has_alone(self, architecture: str) -> None:
        model = tiny.model(architecture)
        batch, documents = inputs("packed")
        capture = FeatureCapture(model, [("attentions", 2)])
        with capture.opened() as tensors:
            forward(model, batch)
            packed = capture.feature(("attentions", 2), tensors)
        for row, first, end in documents:
            with capture.opened() as tensors:
                forward(model, {"input_ids": batch["input_ids"][row : row + 1, first:end]})
                alone = capture.feature(("attentions", 2), tensors)
            found, expected = packed.rows(flat(row, first, end)), alone.rows(torch.arange(end - first))
            torch.testing.assert_close(found[..., : end - first], expected, rtol=1e-5, atol=1e-5)

    def test_rows_are_taken_one_by_one_or_together(self) -> None:
        model = tiny.model("gemma2")
        batch, documents = inputs("packed")
        capture = FeatureCapture(model, [("attentions", 1)])
        with capture.opened() as tensors:
            forward(model, batch)
            scores = capture.feature(("attentions", 1), tensors)
        for document in documents:
            index = flat(*document)
            single = torch.cat([scores.rows(position) for position in index.split(1)])
            torch.testing.assert_close(scores.rows(index), single, rtol=1e-6, atol=1e-6)

    def test_values_that_nobody_looks_at_change_nothing(self) -> None:
        """NaN in the padding, in value and in gradient."""
        model = tiny.model("llama")
        batch, [document, _] = inputs("right padded")
        capture = FeatureCapture(model, [("attentions", 1)])
        with capture.opened() as tensors:
            forward(model, batch)
            leaves = {place: tensor.detach().clone().requires_grad_() for place, tensor in tensors.items()}
            poisoned = {place: leaf.detach().clone() for place, leaf in leaves.items()}
            for tensor in poisoned.values():
                tensor[0, :, document[2] :] = torch.nan
                tensor.requires_grad_()
            clean, dirty = (capture.feature(("attentions", 1), given).rows(flat(*document)) for given in (leaves, poisoned))
        assert torch.equal(clean, dirty)
        for rows in (clean, dirty):
            rows.softmax(-1).square().sum().backward()
        for place, leaf in leaves.items():
            assert torch.equal(leaf.grad, poisoned[place].grad)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_the_gradient_reaches_the_projections(self, checkpointing: bool) -> None:
        """That of eager attention's weights (whose softmax is in float32), also where activations are computed again."""
        model = tiny.model("llama", dtype=torch.float64, attn_implementation="eager").train()
        batch, [document, *_] = inputs("full")
        index = flat(*document)
        upstream = torch.randn(len(index), 4, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weights = forward(model, batch, output_attentions=True).attentions[1][0].transpose(0, 1)
        (weights * upstream).sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert any("0.self_attn.v_proj" in name for name in expected)
        model.zero_grad()
        model.set_attn_implementation("sdpa")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        capture = FeatureCapture(model, [("attentions", 2)])
        with capture.opened() as tensors:
            forward(model, batch)
            rows = capture.feature(("attentions", 2), tensors).rows(index)
            loss = (rows.softmax(-1) * upstream).sum()
        loss.backward()
        for name, gradient in expected.items():
            if gradient.norm() > 0:
                assert (model.get_parameter(name).grad - gradient).norm() < 1e-5 * gradient.norm()

    def test_half_precision_is_scored_in_float32(self) -> None:
        model = tiny.model("llama", dtype=torch.bfloat16)
        batch, [document, *_] = inputs("full")
        capture = FeatureCapture(model, [("attentions", 1)])
        with capture.opened() as tensors:
            forward(model, batch)
            scores = capture.feature(("attentions", 1), tensors)
        assert scores.query.dtype == torch.bfloat16
        rows = scores.rows(flat(*document))
        query, key = scores.query[0].double(), scores.key[0].double().repeat_interleave(2, 0)
        expected = (query @ key.mT * 8**-0.5).transpose(0, 1)
        allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[:, None]
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected.masked_fill(~allowed, -torch.inf).float(), rtol=1e-5, atol=1e-5)

    def test_the_model_keeps_sdpa(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        native = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or native(*a, **k)
        )
        model = tiny.model("llama")
        capture = FeatureCapture(model, [("attentions", 1)])
        with capture.opened():
            forward(model, inputs("full")[0])
        assert len(calls) == 2

    def test_a_copy_of_a_watched_model_watches_nothing(self) -> None:
        model = tiny.model("llama")
        capture = FeatureCapture(model, [("attentions", 1)])
        with capture.opened() as tensors:
            forward(copy.deepcopy(model), inputs("full")[0])
            assert not tensors

    def test_other_implementations_are_refused_by_name(self) -> None:
        model = tiny.model("llama")
        model.config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(DistilyError, match=r"LlamaForCausalLM.*'flash_attention_2'; allowed: sdpa, eager"):
            FeatureCapture(model, [("attentions", 1)])

    def test_a_model_without_the_interface_is_refused_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny.model("llama")
        monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
        with pytest.raises(DistilyError, match=r"LlamaForCausalLM.*AttentionInterface; allowed"):
            FeatureCapture(model, [("attentions", 1)])

    @pytest.mark.parametrize(("option", "meaning"), [("position_bias", "a position bias"), ("s_aux", "attention sinks")])
    def test_scores_with_parts_that_are_not_known_are_refused(self, option: str, meaning: str) -> None:
        model = tiny.model("llama")
        capture = FeatureCapture(model, [("attentions", 1)])
        with capture.opened(), pytest.raises(DistilyError, match=meaning):
            forward(model, inputs("full")[0], **{option: torch.zeros(1)})


class TestPlaces:
    @pytest.mark.parametrize("architecture", tiny.SHAPES)
    def test_attention_outputs_are_those_of_the_output_projection(self, architecture: str) -> None:
        model = tiny.model(architecture)
        batch, _ = inputs("right padded")
        kept = []
        module = model.get_submodule(MODULES.get(architecture, "model.layers.0.self_attn.o_proj"))
        handle = module.register_forward_hook(lambda module, arguments, output: kept.append(output))
        capture = FeatureCapture(model, [("attention_outputs", 1)])
        with capture.opened() as tensors:
            forward(model, batch)
            feature = capture.feature(("attention_outputs", 1), tensors)
        handle.remove()
        assert feature is kept[0]
        assert feature.shape[-1] == width(model, ("attention_outputs", 1)) == model.config.hidden_size

    @pytest.mark.parametrize("architecture", tiny.SHAPES)
    def test_queries_keys_and_values_rebuild_the_attention(self, architecture: str) -> None:
        """Where nothing comes between projection and scores (rotary embedding, norms): the values; and their widths everywhere."""
        model = tiny.model(architecture)
        wanted = [(site, 2) for site in ("queries", "keys", "values")]
        capture = FeatureCapture(model, [*wanted, ("attentions", 2), ("attention_outputs", 2)])
        batch, _ = inputs("full")
        outputs = []
        with capture.opened() as tensors:
            module = capture._projection("attention_outputs", capture._blocks[1])
            handle = module.register_forward_pre_hook(lambda module, arguments: outputs.append(arguments[0]))
            forward(model, batch)
            built = {feature: capture.feature(feature, tensors) for feature in capture.wanted}
        handle.remove()
        for feature in wanted:
            assert built[feature].shape == (2, LENGTH, width(model, feature))
        weights = torch.stack([built["attentions", 2].rows(flat(row, 0, LENGTH)).softmax(-1) for row in (0, 1)])
        values = built["values", 2].unflatten(-1, (-1, model.config.hidden_size // model.config.num_attention_heads))
        values = values.repeat_interleave(weights.shape[2] // values.shape[2], 2)
        expected = torch.einsum("bqak,bkad->bqad", weights, values).flatten(-2)
        torch.testing.assert_close(outputs[0].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi3"])
    def test_the_tensors_are_those_with_which_the_forward_goes_on(self, architecture: str) -> None:
        """So a loss reaches every one of them; and a feature can be built from leaves in their stead."""
        model = tiny.model(architecture)
        wanted = [
            (site, 2) for site in ("queries", "keys", "values", "attentions", "attention_outputs", "hidden_states", "logit_lens")
        ]
        capture = FeatureCapture(model, [*wanted, ("hidden_states", 0)])
        with capture.opened() as tensors:
            loss = forward(model, inputs("full")[0]).logits.square().sum()
            assert set(tensors) == {place for feature in capture.wanted for place in capture.places(feature)}
            assert all((gradient != 0).any() for gradient in torch.autograd.grad(loss, list(tensors.values())))
            leaves = {place: tensor.detach().requires_grad_() for place, tensor in tensors.items()}
            for feature in wanted:
                built = capture.feature(feature, leaves)
                rows = built.rows(torch.arange(3)).softmax(-1) if isinstance(built, AttentionScores) else built
                gradients = torch.autograd.grad(rows.square().sum(), [leaves[place] for place in capture.places(feature)])
                assert all((gradient != 0).any() for gradient in gradients)

    def test_the_lens_reads_hidden_states(self) -> None:
        capture = FeatureCapture(tiny.model(), [("logit_lens", 0), ("hidden_states", 0)])
        assert capture.places(("logit_lens", 0)) == (("hidden_states", 0),)

    def test_nothing_is_kept_afterwards(self) -> None:
        model = tiny.model()
        capture = FeatureCapture(model, [("hidden_states", 1), ("attentions", 2)])
        with capture.opened():
            forward(model, inputs("full")[0])
        with capture.opened() as tensors:
            assert not tensors
            with pytest.raises(DistilyError, match="no query and key of block 2 in this forward"):
                capture.feature(("attentions", 2), tensors)

    @pytest.mark.parametrize(("feature", "allowed"), [(("queries", 0), "1 to 2"), (("hidden_states", 3), "0 to 2")])
    def test_blocks_without_the_feature_are_refused(self, feature: tuple[str, int], allowed: str) -> None:
        with pytest.raises(DistilyError, match=f"{feature[0]}: block {feature[1]} has none; allowed: {allowed}"):
            FeatureCapture(tiny.model(), [feature])
