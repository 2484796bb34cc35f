"""The bulk write: the regression against dense oracles, what it reads, and models that are changed or go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode

from odedit import Objective, ObjectiveConfig, Stopping, edit, encode_requests, load_backbone, load_editor, stack_params
from odedit.editors.common.hooks import rewritten
from odedit.editors.common.vectors import VECTOR
from odedit.errors import InputError
from odedit.evaluation.scores import evaluate_together
from odedit.inputs.batch import EditRequest
from odedit.inputs.encoding import TokenSequence
from odedit.storage.location import locate
from odedit.ways.base import Committed, Task
from odedit.ways.bulk import Bulk, BulkConfig, WrittenMatrices, _of_record
from odedit.ways.common import activations, in_parts
from odedit.ways.common.activations import IMAGE, TEXT, Moments, Written, added_up, batches, keys_of, measured
from odedit.ways.common.examples import Reading, read
from odedit.ways.common.in_parts import InParts
from odedit.ways.common.normal_equations import NormalEquations, null_space
from odedit.ways.common.stacked import edits_of
from tests.support.committing import finish, requests_of
from tests.support.requests import TEMPLATE, make_request
from tests.support.workers import two_workers

QUICK = BulkConfig(copies=1, pool_copies=0, candidates=4)
SITES = ("layers.2.ffn.out", "layers.3.ffn.out")


def requests(count: int, first: int = 0) -> list[EditRequest]:
    return [make_request(number) for number in range(first, first + count)]


def task(backbone, own: Sequence[EditRequest] | None = None, **changes: Any) -> Task:
    """A task whose records have vectors that only depend on their ids."""
    own = requests(4) if own is None else own
    rows = [torch.randn(128, generator=torch.Generator().manual_seed(int(request.edit_id[5:]))) for request in own]
    return Task(
        backbone=backbone,
        template=TEMPLATE,
        editor=load_editor("residual"),
        objective=Objective(ObjectiveConfig(name="rephrase")),
        requests=own,
        pool=requests(6, first=20),
        edits={VECTOR: torch.stack(rows)},
        **changes,
    )


def commit(work: Task, config: BulkConfig = QUICK) -> Committed:
    return finish(Bulk(config), work)[0]


def assert_close(params: dict[str, Tensor], other: dict[str, Tensor], relative: float) -> None:
    assert params.keys() == other.keys()
    for name, value in params.items():
        assert float((value - other[name]).norm()) <= relative * float(other[name].norm()), name


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_solution_is_that_of_least_squares_over_stacked_rows() -> None:
    """Oracle: every term as rows of one dense system, solved by an orthogonal factorisation in NumPy."""
    keys, values, weights = drawn(40, 12), drawn(40, 5, seed=1), drawn(40, seed=2).abs()
    inputs, share = drawn(30, 12, seed=3), 0.01
    equations = NormalEquations.empty(12, 5)
    for part in torch.arange(40).split(7):
        equations.add(keys[part], values[part], weights[part])
    cost = inputs.T @ inputs
    solution = equations.solved(cost, share)
    rho = share * float((keys.T @ (weights[:, None] * keys) + cost).diagonal().mean())
    rows = np.concatenate([weights.sqrt()[:, None] * keys, inputs, np.sqrt(rho) * np.eye(12)])
    right = np.concatenate([weights.sqrt()[:, None] * values, np.zeros((30 + 12, 5))])
    oracle = np.linalg.lstsq(rows, right, rcond=None)[0].T
    assert np.linalg.norm(solution.numpy() - oracle) <= 1e-8 * np.linalg.norm(oracle)


def test_within_the_null_space_unedited_inputs_are_left_alone_and_nothing_else_is_lost() -> None:
    """Oracle: the constrained problem by its Lagrange conditions, which know of no basis."""
    inputs = drawn(30, 4) @ drawn(4, 12, seed=1)
    keys, values = drawn(40, 12, seed=2), drawn(40, 5, seed=3)
    equations = NormalEquations.empty(12, 5)
    equations.add(keys, values, torch.ones(40))
    solution = equations.solved(torch.zeros(12, 12), 1e-3, null_space(inputs.T @ inputs, 1e-10))
    assert float((inputs @ solution.T).abs().max()) < 1e-10 * float((keys @ solution.T).abs().max())
    gram = keys.T @ keys
    matrix = gram + 1e-3 * gram.diagonal().mean() * torch.eye(12)
    constraints = torch.linalg.svd(inputs).Vh[:4]
    system = torch.cat([torch.cat([matrix, constraints.T], 1), torch.cat([constraints, torch.zeros(4, 4)], 1)])
    oracle = torch.linalg.solve(system, torch.cat([keys.T @ values, torch.zeros(4, 5, dtype=torch.float64)]))[:12].T
    assert float((solution - oracle).norm()) <= 1e-8 * float(oracle.norm())
    with pytest.raises(InputError, match=r"commit.null_space: got 1e-10, and no direction"):
        null_space(gram, 1e-10)


def test_moments_of_shares_add_up_to_one_pass_and_tell_positions_apart(backbone, tmp_path: Path) -> None:
    pool = requests(7)
    *_, whole = measured(backbone, TEMPLATE, SITES, pool)
    files = []
    for share in range(3):
        *_, part = measured(backbone, TEMPLATE, SITES, pool[share::3])
        assert isinstance(part, Moments)
        files.append(locate(str(tmp_path / f"{share}.safetensors"), "out"))
        part.write(files[-1], {})
    together = added_up(files, "cpu")
    assert together is not None and isinstance(whole, Moments)
    assert_close(together.sums, whole.sums, 1e-6)
    assert whole.sums[f"count/{IMAGE}"] == together.sums[f"count/{IMAGE}"] > 0

    site, expected = SITES[0], {IMAGE: torch.zeros(512, 512).double(), TEXT: torch.zeros(512, 512).double()}
    for request in pool:  # oracle: one sequence at a time, with a plain hook
        for probe in (request.edit, *request.supervision.values(), *request.probes.values()):
            features = backbone.image_features([] if probe.picture is None else [probe.picture])
            batch = backbone.encode(["one"], ["edit"], [[probe]], features, TEMPLATE)
            seen: list[Tensor] = []
            with rewritten({backbone.site(site): lambda x, y, seen=seen: seen.append(x) or y}), torch.no_grad():
                backbone.suffix(backbone.prefix(batch, "layers.0.attention.q"))
            for kind, mask in ((IMAGE, batch.image_EKS[0, 0]), (TEXT, ~batch.image_EKS[0, 0])):
                expected[kind] += seen[0][0][mask].double().T @ seen[0][0][mask].double()
    for kind, value in expected.items():
        assert float((whole.sums[f"{site}/{kind}"] - value).norm()) < 1e-6 * float(value.norm())


def test_what_lower_matrices_add_is_the_difference_of_two_whole_forwards(backbone) -> None:
    examples = list(read(backbone, TEMPLATE, (), requests(2), requests(4, first=20), Reading(0, 4, 0)))[-1]
    params = {"layers.1.ffn.out": 0.05 * drawn(1, 128, 512).float()}
    written = Written(WrittenMatrices(), params)
    (batch,) = batches(examples.features, examples.kept[:20])
    keys, added = keys_of(backbone, batch, "layers.2.ffn.out", "layers.2.ffn.out", written)
    streams = []
    for acting in (False, True):  # layer 3 starts with the stream after layer 2
        site = backbone.site("layers.1.ffn.out")
        before = site.weight.data
        site.weight.data = before + params["layers.1.ffn.out"][0] if acting else before
        streams.append(backbone.prefix(batch, "layers.3.attention.q").hidden_RSD)
        site.weight.data = before
    at = batch.predict_EKT[0]
    difference = torch.stack([(streams[1] - streams[0])[row, at[row]] for row in range(len(at))])
    assert float(difference.norm()) > 1
    torch.testing.assert_close(added, difference, rtol=1e-3, atol=1e-3)
    _, none = keys_of(backbone, batch, "layers.2.ffn.out", "layers.2.ffn.out", Written(WrittenMatrices(), {}))
    assert not none.any() and keys.shape == (*at.shape, 512)


def asked(sequences: Sequence[TokenSequence]) -> list[tuple[Any, ...]]:
    return [(one.tokens, one.first_target, list(one.image), one.picture) for one in sequences]


def test_examples_in_parts_are_those_of_one_reading(backbone, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(in_parts, "_RECORDS_AT_ONCE", 2)
    own, pool, reading = requests(5), requests(6, first=20), Reading(1, 8, 0, 1)
    whole = list(read(backbone, TEMPLATE, (), own, pool, reading))[-1]
    parts = InParts(backbone, TEMPLATE, reading, tmp_path)
    assert list(parts.survey(own, pool))
    assert list(parts.kept) == list(whole.kept)
    pool_pictures = len(parts.features.by_key)
    for _ in range(2):  # computed, and from the files
        again = [example for part in parts.parts(own) for example in part]
        assert len(parts.features.by_key) == pool_pictures, "features of records are dropped"
        for one, other in zip(again, whole.records, strict=True):
            assert (one.edit_id, one.wordings, one.own, one.other) == (
                other.edit_id, other.wordings, other.own, other.other,
            )  # fmt: skip
            assert one.same == other.same and asked(one.negatives) == asked(other.negatives)
            assert one.nearness == pytest.approx(other.nearness, rel=1e-4)


def test_parts_and_batches_of_other_sizes_write_the_same_matrices(backbone, monkeypatch) -> None:
    whole = commit(task(backbone))
    monkeypatch.setattr(in_parts, "_RECORDS_AT_ONCE", 1)
    monkeypatch.setattr(activations, "SEQUENCES_AT_ONCE", 7)
    assert_close(commit(task(backbone)).params, whole.params, 1e-3)  # forwards are in float32


def test_what_is_kept_weighs_as_much_among_more_records(backbone) -> None:
    """Each record twice is the same regression."""
    once = task(backbone, requests(3))
    twice = [*once.requests, *(replace(each, edit_id=f"{each.edit_id}-again") for each in once.requests)]
    edits = stack_params([once.edits, once.edits])
    assert_close(
        {name: value[:3] for name, value in commit(replace(once, requests=twice, edits=edits)).params.items()},
        commit(once).params,
        1e-3,
    )


def test_a_model_without_a_record_equals_one_that_never_had_it_bit_for_bit(backbone) -> None:
    own = requests(5)
    before = commit(task(backbone, own))
    ids = [request.edit_id for request in own]
    kept = [*own[:2], *own[3:]]
    removed = commit(replace(task(backbone, kept), edits=None, start=before.params, start_ids=ids))
    never = commit(task(backbone, kept))
    assert all(torch.equal(removed.params[name], value) for name, value in never.params.items())
    added = commit(
        replace(task(backbone, own), edits=task(backbone, own[2:3]).edits, start=never.params,
                start_ids=[request.edit_id for request in kept])
    )  # fmt: skip
    assert all(torch.equal(added.params[name], value) for name, value in before.params.items())


def test_rows_of_a_model_on_a_gpu_and_new_edits_are_stacked(backbone) -> None:
    """Fake tensors refuse an operation on two devices."""
    own = requests(3)
    work = task(backbone, own, start_ids=[request.edit_id for request in own[:2]])
    with FakeTensorMode():
        start, new = torch.zeros(2, 128, device="cuda"), torch.zeros(1, 128)
        stacked = edits_of(replace(work, start={VECTOR: start}, edits={VECTOR: new}))[VECTOR]
    assert stacked.shape == (3, 128) and stacked.device.type == "cpu"


def test_an_interrupted_commit_goes_on_after_the_last_solved_matrix(backbone, tmp_path: Path) -> None:
    whole = commit(task(backbone))
    state = locate(str(tmp_path / "state.safetensors"), "out")
    steps = Bulk(QUICK).commit(task(backbone, state=state))
    next(step for step in steps if step.doing.startswith(f"keys of {SITES[1]},"))
    steps.close()
    resumed, made = finish(Bulk(QUICK), task(backbone, state=state))
    assert not any(SITES[0] in step.doing for step in made)
    assert all(torch.equal(resumed.params[name], value) for name, value in whole.params.items())


def moved(backbone, work: Task, config: BulkConfig) -> dict[str, float]:
    """Mean square of what a model of one layer adds at the pool's image and text positions."""
    params = commit(work, config).params
    *_, moments = measured(backbone, TEMPLATE, SITES[1:], work.pool)
    matrix = params[SITES[1]][0].double()
    return {kind: float((matrix @ moments.mean(SITES[1], kind) @ matrix.T).trace()) for kind in (IMAGE, TEXT)}


def test_weights_of_image_and_text_positions_act_on_their_own(backbone) -> None:
    one = replace(QUICK, layers=1)
    plain, image, text = (
        moved(backbone, task(backbone), replace(one, **{f"{kind}_weight": 100.0}) if kind else one)
        for kind in ("", IMAGE, TEXT)
    )
    assert image[IMAGE] < 0.1 * plain[IMAGE] and text[TEXT] < 0.5 * plain[TEXT]
    assert image[IMAGE] < text[IMAGE] and text[TEXT] < image[TEXT]


def test_in_the_null_space_the_measured_activations_do_not_move(backbone) -> None:
    """One record of the pool has fewer positions than the matrix has columns."""
    work = replace(task(backbone), pool=requests(1, first=20))
    one = replace(QUICK, layers=1, image_weight=0.0, text_weight=0.0)
    free, bound = (moved(backbone, work, replace(one, null_space=threshold)) for threshold in (None, 1e-9))
    # The matrix is stored in float32.
    assert 0 <= bound[IMAGE] + bound[TEXT] < 1e-8 * (free[IMAGE] + free[TEXT])


def test_the_written_model_gives_the_new_answers_and_keeps_the_pools(backbone, worlds) -> None:
    own, pool = (requests_of(worlds[0], split, count) for split, count in (("validation", 6), ("train", 12)))
    editor = load_editor("residual")
    supervision, _ = encode_requests(backbone, own, TEMPLATE, editor.sites, joined=True)
    objective = Objective(ObjectiveConfig(name="rephrase"))
    results = edit(backbone, editor, objective, supervision, Stopping(100, worst_token_nll=0.1))
    edits = stack_params([result.params for result in results])
    way = Bulk(BulkConfig(copies=4, candidates=32))
    result = finish(way, Task(backbone, TEMPLATE, editor, objective, own, pool, edits=edits))[0]
    serving = way.serving(editor)
    _, evaluation = encode_requests(backbone, own, TEMPLATE, serving.sites)
    rows = evaluate_together(backbone, serving, result.params, evaluation)
    assert [row["rel_generated_exact"] for row in rows] == [1.0] * 6
    _, kept = encode_requests(backbone, pool, TEMPLATE, serving.sites)
    rows = evaluate_together(backbone, serving, result.params, kept.select(("rel", "t_loc")))
    assert sum(row["t_loc"] for row in rows) / len(rows) > 0.9
    assert set(result.fits) == {request.edit_id for request in own} and len(result.params[VECTOR]) == 6


def test_a_record_that_the_model_does_not_take_is_named_and_the_others_are_written(backbone) -> None:
    long = make_request(9)
    long = replace(long, edit=replace(long.edit, prompt="why? " * 2000))
    result = commit(task(backbone, [*requests(2), long]))
    assert set(result.fits) == {"edit-0", "edit-1"} and set(result.problems) == {"edit-9"}
    assert len(result.params[VECTOR]) == 2


@pytest.mark.parametrize("has_end", [True, False])
def test_positions_with_a_vector_weigh_one_together(backbone, tmp_path: Path, has_end: bool) -> None:
    parts = InParts(backbone, TEMPLATE, Reading(1, 4, 0), tmp_path)
    assert list(parts.survey(requests(1), requests(4, first=20))) and parts.has_end
    ((example,),) = parts.parts(requests(1))
    of_record = [one for one in _of_record(example, torch.ones(128), 0.1, has_end) if one.vector_D is not None]
    lengths = [len(one.sequence.tokens) - one.sequence.first_target - has_end for one in of_record]
    assert sum(one.weight * length for one, length in zip(of_record, lengths, strict=True)) == pytest.approx(1)
    assert sum(one.end_weight or 0 for one in of_record) == pytest.approx(0.1 if has_end else 0)


def test_without_a_pool_the_records_are_written_too(backbone) -> None:
    result = commit(replace(task(backbone), pool=[]))
    assert all(bool(result.params[site].isfinite().all() and result.params[site].any()) for site in SITES)


def test_what_does_not_fit_is_refused_in_a_sentence(backbone) -> None:
    way = Bulk(BulkConfig(layers=3))
    with pytest.raises(InputError, match=r"editor.name: got 'wise', but commit.way 'bulk'"):
        way.check(load_editor("wise"), "wise")
    with pytest.raises(InputError, match=r"commit.layers: got 3, but 'layers.1.ffn.out' has 1 layers below it"):
        way.measured_sites(backbone, load_editor("residual", {"site": "layers.1.ffn.out"}))
    with pytest.raises(InputError, match=r"editor.site: got 'layers.1.ffn.in'"):
        way.measured_sites(backbone, load_editor("residual", {"site": "layers.1.ffn.in"}))


def _share(rank: int, size: int, address: str, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    result = commit(task(load_backbone("blip2", "embedded"), requests(4)[rank::size]))
    results.put((rank, {name: value.numpy() for name, value in result.params.items()}))
    distributed.destroy_process_group()


def test_two_workers_write_the_same_matrices_as_one(backbone, tmp_path: Path) -> None:
    (_, first), (_, second) = two_workers(_share, tmp_path)
    own = requests(4)
    alone = commit(task(backbone, [own[0], own[2], own[1], own[3]]))  # the order of two workers' shares
    for name, value in first.items():
        assert (value == second[name]).all(), name
        assert np.linalg.norm(value - alone.params[name].numpy()) <= 1e-3 * np.linalg.norm(value), name
