"""Recorded steps equal normal ones, with a substitute for CUDA graphs that records operators."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from odedit import Objective, ObjectiveConfig, Stopping, calibrate, edit, encode_requests
from odedit.runtime import cuda_graphs
from tests.support.requests import TEMPLATE, make_pool
from tests.support.small_editors import ready_editor

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "unique", "is_nonzero")
"""Operators that wait for the GPU or copy from it."""


class Recorder(TorchDispatchMode):
    """Records operators with their inputs and outputs, and replays them on the same memory."""

    def __init__(self):
        super().__init__()
        self._calls = []
        self._own = set()
        self._before = {}
        self._alive = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0].rstrip("_")
        masks = name in ("index", "index_put") and any(
            isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in args[1]
        )
        if name in WAITING or masks:
            raise RuntimeError(f"{func.name()} cannot be recorded")
        writes = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for value in writes:
            address = value.untyped_storage().data_ptr()
            if address not in self._own and address not in self._before:
                self._before[address] = (value, value.clone())
        out = func(*args, **kwargs)
        tensors = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        is_view = not writes and any(value.alias_info is not None for value in func._schema.returns)
        self._alive.append((args, kwargs, tensors))
        if not is_view:
            self._calls.append((func, args, kwargs, [] if writes else tensors))
            self._own |= set() if writes else {value.untyped_storage().data_ptr() for value in tensors}
        return out

    def restore(self):
        """Restores all tensors that the recorded operators have written."""
        for value, before in self._before.values():
            value.copy_(before)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results in self._calls:
            out = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, torch.Tensor)]
            for old, new in zip(results, out, strict=bool(results)) if results else ():
                old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Counts of recordings and launches, once the returned function is called."""
    counts = {"recorded": 0, "started": 0}

    def record(work, device):
        counts["recorded"] += 1
        with Recorder() as recorder:
            work()
        with torch.no_grad():
            recorder.restore()

        def start():
            counts["started"] += 1
            recorder.replay()

        return start

    def switch_on():
        monkeypatch.setattr(cuda_graphs, "are_used", lambda device: True)
        monkeypatch.setattr(cuda_graphs, "recorded", record)
        return counts

    return switch_on


@pytest.fixture(scope="module")
def sigma2_0(backbone, requests_8):
    return calibrate(backbone, requests_8, TEMPLATE)


@pytest.mark.parametrize("objective_name", ["native", "odedit", "contrast"])
@pytest.mark.parametrize("name", ["wise", "tpatcher", "ftl", "ftv", "lora", "unike"])
def test_recorded_steps_are_the_steps(backbone, requests_8, sigma2_0, recorded, tmp_path, name, objective_name):
    """Edits stop at different steps, so that the batch is rebuilt and recorded again."""
    editor = ready_editor(name, backbone, tmp_path)
    objective = Objective(ObjectiveConfig(name=objective_name), sigma2_0)
    pool = make_pool(backbone, 12, editor.sites)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE, editor.sites, pool)
    free = edit(backbone, editor, objective, supervision, Stopping(12, 1e-9))
    reached = sorted(result.curves["worst_nll"][6] for result in free)
    stopping = Stopping(12, (reached[2] + reached[3]) / 2)
    one_by_one = edit(backbone, editor, objective, supervision, stopping)
    counts = recorded()
    together = edit(backbone, editor, objective, supervision, stopping)
    assert counts["recorded"] >= 1 and counts["started"] >= 4
    for one, other in zip(one_by_one, together, strict=True):
        assert (one.steps, one.stop_reason, one.error) == (other.steps, other.stop_reason, other.error)
        assert one.curves == other.curves
        for key, value in one.params.items():
            assert torch.equal(value, other.params[key]), key
    assert len({one.steps for one in one_by_one}) > 1, "all edits stopped at once"


def test_a_step_that_cannot_be_recorded_runs_normally(backbone, requests_8, sigma2_0, monkeypatch, tmp_path):
    editor = ready_editor("ftl", backbone, tmp_path)
    objective = Objective(ObjectiveConfig(), sigma2_0)
    supervision, _ = encode_requests(backbone, requests_8, TEMPLATE)
    expected = edit(backbone, editor, objective, supervision, Stopping(8, 1e-9))
    tried = []
    monkeypatch.setattr(cuda_graphs, "are_used", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "recorded", lambda work, device: tried.append(work))
    got = edit(backbone, editor, objective, supervision, Stopping(8, 1e-9))
    assert len(tried) == 1
    for one, other in zip(expected, got, strict=True):
        assert one.curves == other.curves
        assert all(torch.equal(value, other.params[key]) for key, value in one.params.items())


def test_nothing_is_recorded_without_a_gpu_or_when_switched_off(monkeypatch):
    assert not cuda_graphs.are_used(torch.device("cpu"))
    assert cuda_graphs.are_used(torch.device("cuda"))
    monkeypatch.setenv(cuda_graphs.SWITCH, "0")
    assert not cuda_graphs.are_used(torch.device("cuda"))


def test_a_forgotten_recording_is_the_last(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_state", cuda_graphs._ThreadState())
    assert not cuda_graphs.forget() and cuda_graphs.are_used(torch.device("cuda")), "there was nothing to forget"
    cuda_graphs._state.last[torch.device("cuda")] = object()
    assert cuda_graphs.forget() and not cuda_graphs._state.last
    assert not cuda_graphs.are_used(torch.device("cuda"))
    assert not cuda_graphs.forget()
