"""B15 to B19, B24 and B25: relations, attention maps, transport between hidden states, and the sites of attention and embedding."""

from __future__ import annotations

import math
from typing import Any

import ot
import textbrewer
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, mse_loss

from oracles.case import Case, Check

HEADS = 4
CONVERGED = {"epsilon": 0.5, "iterations": 500, "tolerance": 1e-14}


def states(tokens: int = 6, student: int = 8, teacher: int = 12) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return *(torch.randn(tokens, width, generator=generator, dtype=torch.float64) for width in (student, teacher)), {}


def of_one_width() -> tuple[Tensor, Tensor, dict[str, Any]]:
    return states(student=9, teacher=9)


def causal_scores() -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Queries 0, 2, 3, 5 and 6 of a text of 8, in 3 heads."""
    generator, queries = torch.Generator().manual_seed(4), torch.tensor([0, 2, 3, 5, 6])
    later = torch.arange(8) > queries[:, None, None]
    sides = (torch.randn(5, 3, 8, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return *(side.masked_fill(later, -torch.inf) for side in sides), {}


def padded_scores() -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The 6 tokens of a text with 2 of padding, each of which sees all 6: an encoder's map, which TextBrewer is for."""
    generator = torch.Generator().manual_seed(5)
    sides = [torch.randn(6, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    for side in sides:
        side[..., 6:] = -torch.inf
    return *sides, {}


# --- B15 to B17: relations ---


def by_loops(student: Tensor, teacher: Tensor, relation_heads: int, normalize: str = "none", temperature: float = 1.0) -> Tensor:
    """Token after token, head after head."""
    values = []
    for token in range(len(student)):
        total = 0.0
        for head in range(relation_heads):
            relations = []
            for side in (student, teacher):
                size = side.shape[1] // relation_heads
                part = side[:, head * size : (head + 1) * size]
                products = [part[token] @ part[other] for other in range(len(side))]
                if normalize == "l2":
                    norms = part.norm(dim=1)
                    products = [each / (norms[token] * norms[other]) for other, each in enumerate(products)]
                scale = temperature if normalize == "l2" else temperature * math.sqrt(size)
                weights = torch.stack([(each / scale).exp() for each in products])
                relations.append(weights / weights.sum())
            total = total + (relations[1] * (relations[1].log() - relations[0].log())).sum()
        values.append(total / relation_heads)
    return torch.stack(values).mean()


def bitdistill(student: Tensor, teacher: Tensor, relation_heads: int, temperature: float) -> Tensor:
    """Algorithm 1 of the paper for one of Q, K and V: unit vectors, cosines over the temperature, ``batchmean`` over heads and rows."""
    relations = []
    for side in (student, teacher):
        split = side.reshape(len(side), relation_heads, -1).permute(1, 0, 2)
        split = split / split.norm(dim=-1, keepdim=True)
        relations.append(torch.softmax(torch.bmm(split, split.transpose(1, 2)) / temperature, -1).clamp(min=1e-8).flatten(0, 1))
    return kl_div(relations[0].log(), relations[1], reduction="batchmean")


# --- B18: attention maps ---


def attention_by_loops(student: Tensor, teacher: Tensor) -> Tensor:
    values = []
    for mine, theirs in zip(student, teacher, strict=True):
        total = 0.0
        for s, t in zip(mine, theirs, strict=True):
            seen = [key for key in range(len(t)) if t[key] > -math.inf]
            p, q = (torch.stack([side[key].exp() for key in seen]) for side in (t, s))
            p, q = p / p.sum(), q / q.sum()
            total = total + sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
        values.append(total / len(mine))
    return torch.stack(values)


def squares_by_loops(student: Tensor, teacher: Tensor, of: str = "scores") -> Tensor:
    values = []
    for mine, theirs in zip(student, teacher, strict=True):
        squares = []
        for s, t in zip(mine, theirs, strict=True):
            seen = [key for key in range(len(t)) if t[key] > -math.inf]
            s, t = s[seen], t[seen]
            if of == "probabilities":
                s, t = s.exp() / s.exp().sum(), t.exp() / t.exp().sum()
            squares.append(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(seen))
        values.append(sum(squares) / len(squares))
    return torch.stack(values)


def as_a_map(rows: Tensor) -> Tensor:
    """TextBrewer's shape, ``(1, heads, 8, 8)``, with -10000 at masked keys as BERT has it."""
    whole = torch.cat([rows, torch.zeros(2, *rows.shape[1:], dtype=rows.dtype)])
    return whole.masked_fill(~whole.isfinite(), -1e4).transpose(0, 1)[None]


MASK = torch.tensor([[1.0] * 6 + [0.0] * 2], dtype=torch.float64)


def textbrewer_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Its masked cross-entropy, less the teacher's entropy (which it gives with the teacher for a student)."""
    s, t = as_a_map(student), as_a_map(teacher)
    return textbrewer.losses.att_ce_loss(s, t, MASK) - textbrewer.losses.att_ce_loss(t, t, MASK)


def textbrewer_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return textbrewer.losses.att_mse_loss(as_a_map(student), as_a_map(teacher), MASK)


# --- B19: transport between hidden states ---


def costs_by_loops(left: Tensor, right: Tensor, cost: str, position: float) -> Tensor:
    rows = []
    for i, a in enumerate(left):
        row = [1 - cosine_similarity(a, b, dim=0) if cost == "cosine" else mse_loss(a, b) for b in right]
        rows.append(torch.stack([each + position * abs(i - j) / len(left) for j, each in enumerate(row)]))
    return torch.stack(rows)


def by_pot(
    student: Tensor, teacher: Tensor, epsilon: float, cost: str = "cosine", position: float = 0.0, value: str = "divergence"
) -> Tensor:
    """Plans by POT; the values, and by the envelope theorem the gradient, of ⟨P, C⟩ + ε KL(P | ab') with those plans held."""
    blur = epsilon * costs_by_loops(student, teacher, cost, position).detach().median()

    def transported(left: Tensor, right: Tensor) -> Tensor:
        costs, n = costs_by_loops(left, right, cost, position), len(left)
        uniform = torch.full((n,), 1 / n, dtype=costs.dtype)
        plan = ot.bregman.sinkhorn_log(uniform, uniform, costs.detach(), blur.item(), numItermax=500, stopThr=1e-15, warn=False)
        return (plan * costs).sum() + blur * torch.special.xlogy(plan, plan * n * n).sum()

    dual = transported(student, teacher)
    if value == "dual":
        return dual
    return dual - transported(student, student) / 2 - transported(teacher, teacher) / 2


def apart_from_geomloss() -> float:
    """Relative distance to the divergence of geomloss (squared costs, which it halves)."""
    import geomloss
    from distily_sinkhorn.hidden import hidden_sinkhorn

    student, teacher, _ = of_one_width()
    blur = 0.5 * torch.cdist(student, teacher).square().median() / 9
    points = [side.mul(math.sqrt(2 / 9)) for side in (student, teacher)]
    solver = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur.sqrt().item(), scaling=0.995, backend="tensorized")
    expected = solver(*points).item()
    return abs(hidden_sinkhorn(student, teacher, cost="squared", **CONVERGED).mean().item() - expected) / expected


# --- B24, B25: sites, through the driver against plain hooks ---


def squares(student: Tensor, teacher: Tensor) -> Tensor:
    return mse_loss(student, teacher, reduction="none").mean(-1)


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - cosine_similarity(student, teacher, dim=-1)


MODULES = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj", "attention_outputs": "o_proj"}


def site(spec: str, module: str, distance: Any) -> float:
    """Loss and gradients of one term of the driver against those of the outputs of a module, hooked by hand."""
    student, teacher = (tiny.model("llama", seed, torch.float64) for seed in (1, 2))
    batch = tiny.collate(tiny.documents(3))
    driver = tiny.driver(student, teacher, spec)
    loss, gradients = tiny.accumulate(driver, student, [batch])
    driver.detach()
    outputs = []
    for model in (student, teacher):
        model.zero_grad()
        handle = model.get_submodule(module).register_forward_hook(lambda module, inputs, output: outputs.append(output))
        model(batch["input_ids"], batch["attention_mask"])
        handle.remove()
    rows = batch["shift_labels"] != -100
    expected = distance(outputs[0][rows], outputs[1][rows].detach()).mean()
    expected.backward()
    error = abs(loss.item() - expected.item()) / expected.item()
    for name, parameter in student.named_parameters():
        reference = parameter.grad
        if reference is not None and reference.abs().max() > 0:
            error = max(error, ((gradients[name] - reference).abs().max() / reference.abs().max()).item())
    return error


def at_site(name: str, objective: str, distance: Any) -> Check:
    spec = f"{objective}:on={name},mapper=last_k"
    return Check(
        "B24", spec, "hooks by hand", "gradient", lambda: site(spec, f"model.layers.1.self_attn.{MODULES[name]}", distance), 1e-9
    )


def at_embedding(objective: str, distance: Any) -> Check:
    spec = f"{objective}:mapper=embeddings"
    return Check("B25", spec, "embedding table", "gradient", lambda: site(spec, "model.embed_tokens", distance), 1e-9)


NO_SCORES = "TextBrewer's masked branch; its cross-entropy less the teacher's entropy"
CASES: list[Case | Check] = [
    Case("B15", "attention_kl", {"loops": attention_by_loops}, rows=causal_scores, note="MiniLM's first term"),
    Case(
        "B15",
        "self_relation",
        {"loops": by_loops},
        {"relation_heads": HEADS},
        states,
        term={"on": "values"},
        note="MiniLM's second",
    ),
    *(
        Case("B16", "self_relation", {"loops": by_loops}, {"relation_heads": HEADS}, states, term={"on": on})
        for on in ("queries", "keys", "values")
    ),
    Case(
        "B17",
        "self_relation",
        {"loops": by_loops, "Algorithm 1": bitdistill},
        {"relation_heads": HEADS, "normalize": "l2", "temperature": 0.2},
        states,
    ),
    Case("B18", "attention_kl", {"loops": attention_by_loops, "textbrewer": textbrewer_kl}, rows=padded_scores, note=NO_SCORES),
    Case("B18", "attention_mse", {"loops": squares_by_loops, "textbrewer": textbrewer_mse}, rows=padded_scores, note=NO_SCORES),
    Case("B18", "attention_mse", {"loops": squares_by_loops}, rows=causal_scores),
    Case("B18", "attention_mse", {"loops": squares_by_loops}, {"of": "probabilities"}, causal_scores),
    Case("B19", "hidden_sinkhorn", {"POT": by_pot}, CONVERGED, of_one_width),
    Case("B19", "hidden_sinkhorn", {"POT": by_pot}, {**CONVERGED, "value": "dual"}, of_one_width, floor=by_pot),
    Case("B19", "hidden_sinkhorn", {"POT": by_pot}, {**CONVERGED, "cost": "squared", "position": 0.1}, of_one_width),
    Check(
        "B19", "hidden_sinkhorn:cost=squared", "geomloss", "value", apart_from_geomloss, 1e-4, "annealed: not to the last digit"
    ),
    *(at_site(name, "mse", squares) for name in MODULES),
    *(at_site(name, "cosine", angles) for name in MODULES),
    Case("B25", "cosine", {"torch": angles}, rows=of_one_width, term={"mapper": "embeddings"}),
    Case("B25", "mse", {"torch": squares}, rows=of_one_width, term={"mapper": "embeddings"}),
    at_embedding("cosine", angles),
    at_embedding("mse", squares),
]
