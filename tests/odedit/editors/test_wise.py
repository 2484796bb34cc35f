"""WISE against its formulas, computed per sequence with the library's own forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from odedit import Objective, ObjectiveConfig, Stopping, edit, encode_requests, evaluate, load_editor, stack_params
from odedit.editors import wise
from odedit.editors.wise import _live_ranks
from odedit.inputs.batch import LOCALITY_SLOTS
from odedit.runtime.gather import spread
from tests.support.requests import TEMPLATE, make_request
from tests.support.transformers_forward import copy_of, library_logits, library_nll

SETTINGS = {"site": "layers.2.ffn.in", "margin_in": 2.0, "margin_out": 0.01, "margin_gap": 1.0}
REQUESTS = [make_request(0), make_request(1, full=False), make_request(2)]
NATIVE = Objective(ObjectiveConfig(name="native"))


class Library:
    """The library's model with a side copy of the edited matrix, and the activation distance between the two."""

    def __init__(self, backbone, side: Tensor):
        self.backbone = backbone
        self.model = copy_of(backbone)
        self._module = self.model.language_model.model.decoder.layers[2].fc1
        self._matrix = self._module.weight.data
        self._bias = self._module.bias.data
        self.side = side.clone().requires_grad_()
        self._input = None
        self._use_side = True
        self._module.register_forward_hook(self._forward)

    def _forward(self, module, args, output):
        self._input = args[0][0] if args[0].dim() == 3 else args[0]
        matrix = self.side if self._use_side else self._matrix
        return args[0] @ matrix.T + self._bias

    def logits(self, batch, request, e, slot, *, use_side):
        self._use_side = use_side
        return library_logits(self.model, self.backbone, batch, request, e, slot)

    def nll(self, batch, request, e):
        self._use_side = True
        return library_nll(self.model, self.backbone, batch, request, e)

    def distance(self, batch, request, e, slot, largest=False):
        """Activation distance (eq. 2), position by position; or the largest of a position."""
        self.logits(batch, request, e, slot, use_side=True)
        length = int(batch.prompt_EKS[e, batch.slots.index(slot)].sum())
        norms = []
        for x in self._input[:length]:
            side, main = (torch.relu(matrix @ x + self._bias) for matrix in (self.side, self._matrix))
            norms.append((side - main).square().sum().add(1e-12).sqrt())
        return torch.stack(norms).max() if largest else torch.stack(norms).mean()

    def loss(self, batch, request, e, config):
        """Likelihood and margin loss (eq. 3)."""
        inside = self.distance(batch, request, e, "edit")
        outside = [self.distance(batch, request, e, slot) for slot in LOCALITY_SLOTS if slot in request.supervision]
        margins = [
            torch.relu(out - inside + config.margin_gap) + torch.relu(out - config.margin_out) for out in outside
        ]
        likelihood = self.nll(batch, request, e)
        return likelihood + torch.stack(margins).mean() + torch.relu(config.margin_in - inside)


@pytest.fixture(scope="module")
def encoded(backbone):
    return encode_requests(backbone, REQUESTS, TEMPLATE)


@pytest.fixture(scope="module")
def edited(backbone, encoded):
    editor = load_editor("wise", SETTINGS)
    results = edit(backbone, editor, NATIVE, encoded[0], Stopping(max_steps=6))
    return editor, stack_params([result.params for result in results])


def side_copies(backbone, editor, params):
    """W' of every edit, from the stored entries."""
    matrix = backbone.site(editor.config.site).weight
    mask = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    for live in params["side_live"]:
        side = matrix.detach().clone()
        side[mask] += live
        yield side


def test_loss_and_masked_steps_equal_the_formulas(backbone, encoded):
    supervision, _ = encoded
    editor = load_editor("wise", {**SETTINGS, "weight_decay": 0.1, "clamp": 0.02, "learning_rate": 0.5})
    matrix = backbone.site(editor.config.site).weight
    mask = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    results = edit(backbone, editor, NATIVE, supervision, Stopping(max_steps=3))
    for e, (request, result) in enumerate(zip(REQUESTS, results, strict=True)):
        side = matrix.clone()
        for step in range(3):
            library = Library(backbone, side)
            loss = library.loss(supervision, request, e, editor.config)
            shown = result.curves["rel"][step] + result.curves["own"][step]
            assert shown == pytest.approx(loss.item(), rel=1e-3)
            (gradient,) = torch.autograd.grad(loss, library.side)
            moved = side - matrix - 0.5 * (gradient + 0.1 * (side - matrix))
            side = torch.where(mask, matrix + moved.clamp(-0.02, 0.02), matrix)
        difference = (side - matrix)[mask]
        assert (difference.abs() > 0.0199).any() and (difference.abs() < 0.0199).any(), "some are clamped"
        # Only norms agree: distances start at 0, where rounding determines the direction of their gradient.
        assert (result.params["side_live"][0] - difference).norm() < 1e-2 * difference.norm()


def test_a_prompt_uses_the_side_matrix_above_the_threshold_alone(backbone, encoded, edited):
    (supervision, evaluation), (editor, params) = encoded, edited
    sides = [Library(backbone, side) for side in side_copies(backbone, editor, params)]
    routes = []
    with torch.no_grad(), editor.applied(backbone, params, evaluation):
        logits = backbone.head(backbone.suffix(backbone.prefix(evaluation, editor.config.site)))
        for e, (request, library) in enumerate(zip(REQUESTS, sides, strict=True)):
            threshold = 0.4 * library.distance(supervision, request, e, "edit")
            assert params["threshold"][e].item() == pytest.approx(threshold.item(), rel=1e-3)
            for k, slot in enumerate(evaluation.slots):
                if not evaluation.present_EK[e, k]:
                    continue
                above = bool(library.distance(evaluation, request, e, slot) >= threshold)
                expected = library.logits(evaluation, request, e, slot, use_side=above)
                torch.testing.assert_close(logits[e, k][: len(expected)], expected, rtol=1e-3, atol=1e-3)
                routes.append(above)
    assert any(routes) and not all(routes)


@pytest.mark.parametrize("is_together", [False, True])
def test_the_public_code_routes_long_prompts_by_their_largest_distance(
    backbone, encoded, edited, monkeypatch, is_together
):
    (supervision, evaluation), (editor, params) = encoded, edited
    lengths = evaluation.prompt_EKS.sum(-1)[evaluation.present_EK]
    bound = int(lengths.float().median())
    assert lengths.min() <= bound < lengths.max(), "prompts on both sides of the bound"
    monkeypatch.setattr(wise, "_LONGEST_MEAN", bound)
    public = load_editor("wise", SETTINGS | {"routing": "public_code"})
    (again,) = edit(backbone, public, NATIVE, supervision.take(torch.tensor([0])), Stopping(max_steps=6))
    torch.testing.assert_close(again.params["threshold"], params["threshold"][:1], rtol=1e-4, atol=0)
    first = {name: value[:1] for name, value in params.items()}
    library = Library(backbone, next(side_copies(backbone, editor, first)))
    one = evaluation.take(torch.tensor([0]))
    # A threshold between the means of long prompts and their largest distances: the two ways of routing differ.
    is_long_K = (one.prompt_EKS[0].sum(-1) > bound).tolist()
    long = [slot for slot, is_long in zip(one.slots, is_long_K, strict=True) if is_long]
    mean, largest = (
        max(library.distance(one, REQUESTS[0], 0, slot, is_largest).item() for slot in long)
        for is_largest in (False, True)
    )
    assert mean < largest
    first["threshold"] = torch.tensor([(mean + largest) / 2])
    applied = public.together if is_together else public.applied
    with torch.no_grad(), applied(backbone, first, one):
        logits = backbone.head(backbone.suffix(backbone.prefix(one, editor.config.site)))
    differs = []
    for k, (slot, is_long) in enumerate(zip(one.slots, is_long_K, strict=True)):
        above = bool(library.distance(one, REQUESTS[0], 0, slot, largest=is_long) >= first["threshold"][0])
        expected = library.logits(one, REQUESTS[0], 0, slot, use_side=above)
        torch.testing.assert_close(logits[0, k][: len(expected)], expected, rtol=1e-3, atol=1e-3)
        differs.append(above != bool(library.distance(one, REQUESTS[0], 0, slot) >= first["threshold"][0]))
    assert any(differs), "the paper's routing would choose otherwise"


def test_retrieval_takes_the_side_matrix_of_the_largest_distance_above_its_own_threshold(backbone, encoded, edited):
    (_, evaluation), (editor, params) = encoded, edited
    sides = [Library(backbone, side) for side in side_copies(backbone, editor, params)]
    # Thresholds that some prompts do not reach; otherwise every prompt would use a side matrix.
    params = params | {"threshold": params["threshold"] * torch.tensor([2.4, 1.0, 1.6])}
    chosen = set()
    with torch.no_grad(), editor.together(backbone, params, evaluation):
        logits = backbone.head(backbone.suffix(backbone.prefix(evaluation, editor.config.site)))
        for e, request in enumerate(REQUESTS):
            for k, slot in enumerate(evaluation.slots):
                if not evaluation.present_EK[e, k]:
                    continue
                distances = [side.distance(evaluation, request, e, slot).item() for side in sides]
                claims = [m for m, d in enumerate(distances) if d >= params["threshold"][m]]
                best = max(claims, key=lambda m: distances[m], default=None)
                side = sides[best or 0]
                expected = side.logits(evaluation, request, e, slot, use_side=best is not None)
                torch.testing.assert_close(logits[e, k][: len(expected)], expected, rtol=1e-3, atol=1e-3)
                chosen.add(best)
    assert None in chosen and len(chosen) > 2


def test_shards_are_merged_by_ties_as_by_hand():
    """Trim to the largest entries, elect a sign by sum, average the entries that agree with it."""
    editor = load_editor("wise", {"merge_density": 0.5, "mask_ratio": 1.0, "shard_edits": 4, "memory_shards": 3})
    deltas = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    model = {"side_live": deltas, "threshold": torch.tensor([0.5, 0.2, 0.9]), "side_edits": torch.tensor([4, 4, 3])}
    assert editor._with_merged_shards(model) is model, "the last shard is not full"
    merged = editor._with_merged_shards(model | {"side_edits": torch.tensor([4, 4, 4])})
    trimmed = []
    for row in deltas.tolist():
        smallest_kept = sorted((abs(v) for v in row), reverse=True)[19]
        trimmed.append([v if abs(v) >= smallest_kept else 0.0 for v in row])
    expected = []
    for entries in zip(*trimmed, strict=True):
        total = sum(entries)
        agreeing = [v for v in entries if v * total > 0]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    assert 0 < expected.count(0.0) < len(expected)
    torch.testing.assert_close(merged["side_live"], torch.tensor([expected]))
    assert torch.equal(merged["threshold"], torch.tensor([0.2])) and merged["side_edits"].tolist() == [12]


@pytest.mark.parametrize(
    "objective", [NATIVE, Objective(ObjectiveConfig(name="odedit", penalty="fixed:0.01", sigma2_0=50.0))]
)
@pytest.mark.parametrize("mask", [{"mask": "columns", "mask_ratio": 0.3}, {"mask_ratio": 1.0}])
def test_the_factored_edit_is_the_edit_of_the_matrix(backbone, encoded, objective, mask):
    supervision, evaluation = encoded
    settings = {**SETTINGS, **mask, "weight_decay": 0.05, "learning_rate": 0.5}
    rows = {}
    for name, clamp in (("whole", 1e6), ("factored", None)):
        editor = load_editor("wise", {**settings, "clamp": clamp})
        results = edit(backbone, editor, objective, supervision, Stopping(max_steps=5, worst_token_nll=1e-9))
        params = stack_params([result.params for result in results])
        assert editor.is_factored == (name == "factored")
        rows[name] = params, results, evaluate(backbone, editor, params, evaluation)
    (whole, results, scores), (factored, others, other_scores) = rows["whole"], rows["factored"]
    sides = factored["side_rows"].transpose(1, 2) @ factored["side_inputs"]
    assert "side_inputs" in factored and "side_live" in whole
    live = sides.flatten(1)[:, editor._live(sides.shape[1:], sides.device)]
    assert (live - whole["side_live"]).norm() < 1e-3 * live.norm()
    assert live.abs().max() > 1e-3
    torch.testing.assert_close(factored["threshold"], whole["threshold"], rtol=1e-4, atol=1e-6)
    for result, other in zip(results, others, strict=True):
        assert result.curves["objective"] == pytest.approx(other.curves["objective"], rel=1e-4)
    assert scores == other_scores


def test_a_factored_edit_is_smaller_and_answers_alone_as_together(backbone, encoded):
    supervision, _ = encoded
    editor = load_editor("wise", {**SETTINGS, "mask": "columns", "mask_ratio": 1.0, "clamp": None})
    results = edit(backbone, editor, NATIVE, supervision, Stopping(max_steps=4, worst_token_nll=1e-9))
    params = results[0].params
    prefix = backbone.prefix(supervision.take(torch.tensor([0])), *editor.sites)
    with torch.no_grad():
        with editor.applied(backbone, params, supervision.take(torch.tensor([0]))):
            alone = backbone.suffix(prefix)
        with editor.together(backbone, params, supervision.take(torch.tensor([0]))):
            together = backbone.suffix(prefix)
        unedited = backbone.suffix(prefix)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    assert (alone - unedited).abs().max() > 1e-3


def test_a_factored_edit_does_not_depend_on_how_long_its_mates_are(backbone):
    """Nor does the multiplier's sketch: padding is appended after all weights."""
    editor = load_editor("wise", {**SETTINGS, "mask": "columns", "mask_ratio": 0.5, "clamp": None})
    objective = Objective(ObjectiveConfig(name="odedit", sigma2_0=50.0))
    long = "which of the many people that we know of is said to own this old digit here?"
    mate = replace(REQUESTS[0], edit_id="mate", edit=replace(REQUESTS[0].edit, prompt=long))

    def first(*requests):
        supervision, _ = encode_requests(backbone, requests, TEMPLATE)
        return edit(backbone, editor, objective, supervision, Stopping(8, 1e-9))[0]

    alone, both = first(REQUESTS[0]), first(REQUESTS[0], mate)
    assert alone.curves["lambda"][-1] > 0
    for name in ("lambda", "rel", "objective"):
        assert alone.curves[name] == pytest.approx(both.curves[name], rel=1e-5)


def test_a_gpu_looks_up_the_entries_that_a_processor_writes(backbone):
    site = "layers.2.ffn.in"
    editor = load_editor("wise", {"site": site})
    shape, device = backbone.site(site).weight.shape, torch.device("cpu")
    live_N = editor._live(shape, device)
    live_EN = torch.randn(3, len(live_N), generator=torch.Generator().manual_seed(0))
    looked_up = spread(live_EN, live_N, _live_ranks(*editor._mask(shape, device))).unflatten(1, shape)
    assert torch.equal(looked_up, editor._side(backbone, live_EN))
