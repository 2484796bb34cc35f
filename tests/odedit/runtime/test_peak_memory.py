"""Peak memory against manually added sizes."""

from __future__ import annotations

import pytest
import torch

from odedit import Objective, ObjectiveConfig, Stopping, edit, load_editor
from odedit.runtime.peak_memory import peak_memory

N = 4096  # bytes of the vectors below


def vector() -> torch.Tensor:
    return torch.zeros(N // 4)


def test_a_chain_of_allocations_and_frees():
    with peak_memory("cpu") as peak:
        a, b = torch.zeros(100, dtype=torch.uint8), torch.zeros(50, dtype=torch.uint8)
        del a
        c = torch.zeros(90, dtype=torch.uint8)
        view, row = c[3:], c.view(9, 10)[0]
        del c, view
        d = torch.zeros(20, dtype=torch.uint8)  # with 50 and the 90 that `row` keeps
        del row, b, d
        torch.zeros(110, dtype=torch.uint8)
    assert peak.bytes == 50 + 90 + 20


def test_what_was_there_before_does_not_count():
    old = vector()
    with peak_memory("cpu") as peak:
        old.add_(1.0)
        view = old[5:].view(-1)
        del view
    assert peak.bytes == 0
    with peak_memory("cpu") as peak:
        old.resize_(2 * N)
        kept = torch.tensor([1.0, 2.0])
    assert peak.bytes == 8
    assert kept.sum() == 3


def test_a_storage_that_grows():
    with peak_memory("cpu") as peak:
        torch.empty(0).resize_(7)
    assert peak.bytes == 7 * 4


@pytest.mark.parametrize("keeps_results", [False, True])
def test_a_backward_pass_with_what_autograd_has_saved(keeps_results):
    weight = vector().requires_grad_()
    with peak_memory("cpu") as forward:
        first = weight.exp()
        second = first.exp()
        loss = second.sum()
        kept = [first, second] if keeps_results else []
        del first, second
    # Only autograd holds the two results that `exp` needs for its derivative.
    assert forward.bytes == 2 * N + 4

    with peak_memory("cpu") as both:
        first = weight.exp()
        second = first.exp()
        loss = second.sum()
        kept = [first, second] if keeps_results else []
        del first, second
        loss.backward()
    # Scalars: the loss and its derivative, 4 bytes each. The derivative of `second` adds to the two saved results; then
    # `second` is freed, unless `kept` holds it, and the derivative of `first` reuses its memory.
    assert both.bytes == (4 if keeps_results else 3) * N + 8
    assert len(kept) == 2 * keeps_results


def test_a_gpu_uses_the_allocators_statistics(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
    with peak_memory("cuda:1") as peak:
        assert asked == [torch.device("cuda:1")], "peaks from before the block are forgotten"
    assert peak.bytes == 700


def test_nothing_is_counted_after_the_block():
    with peak_memory("cpu") as peak:
        inside = vector()
    outside = vector()
    del inside
    assert peak.bytes == N
    assert outside.numel() == N // 4


def test_an_edit_computes_the_same_and_needs_at_least_its_own_state(backbone, batches):
    """AdamW holds two moments of every parameter, besides the parameters and their initial values."""
    supervision, _ = batches
    editor, objective = load_editor("ftl"), Objective(ObjectiveConfig(name="native"))
    plain = edit(backbone, editor, objective, supervision, Stopping(2))
    with peak_memory("cpu") as peak:
        measured = edit(backbone, editor, objective, supervision, Stopping(2))
    for one, other in zip(plain, measured, strict=True):
        for name, value in one.params.items():
            assert torch.equal(value, other.params[name]), name
    own = sum(value.nbytes for result in plain for value in result.params.values())
    assert 4 * own < peak.bytes < 100 * own
