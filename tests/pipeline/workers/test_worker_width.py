"""Width of the loop: set by free memory, halved when memory runs out, and without effect on the edits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows
from pipeline.workers import device_errors, width
from pipeline.workers import editor as actor
from pipeline.workers.width import WidthLimit

Inline = Callable[[RunConfig], Outcome]


def test_as_many_as_half_of_the_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(width, "free_bytes", lambda device: 1000)
    assert WidthLimit("auto", "cpu").width(64, lambda: 100) == 5
    assert WidthLimit("auto", "cpu", share=0.5).width(64, lambda: 100) == 2
    assert WidthLimit("auto", "cpu").width(3, lambda: 100) == 3
    assert WidthLimit("auto", "cpu").width(64, lambda: 10**6) == 1, "the width is at least 1"
    calls: list[int] = []
    limit = WidthLimit("auto", "cpu")
    assert limit.width(1, lambda: calls.append(1) or 100) == 1 and not calls
    assert [limit.width(64, lambda: calls.append(1) or 100) for _ in range(2)] == [5, 5] and calls == [1]
    assert WidthLimit(4, "cpu").width(64, lambda: 10**6) == 4


def test_the_memory_limit_of_a_container_counts_if_it_is_lower(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(width, "_CGROUP", tmp_path)
    of_machine = width.free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert width.free_bytes(torch.device("cpu")) > of_machine // 2
    (tmp_path / "memory.max").write_text("5000\n")
    assert width.free_bytes(torch.device("cpu")) == 4000
    (tmp_path / "memory.stat").write_text("anon 300\nactive_file 100\ninactive_file 500\n")
    assert width.free_bytes(torch.device("cpu")) == 4600, "the page cache counts as free"


def test_a_width_is_halved_until_it_is_one() -> None:
    measured = WidthLimit("auto", "cpu")
    widths = []
    while measured.halve(8):
        widths.append(measured.width(8, lambda: 1))
    assert widths == [4, 2, 1]
    measured.restore()
    assert measured.width(8, lambda: 1) == 8
    configured = WidthLimit(4, "cpu")
    assert configured.halve(8) and configured.width(8, lambda: 1) == 2
    configured.restore()
    assert configured.width(8, lambda: 1) == 4


def test_an_evaluation_that_does_not_fit_is_halved_and_no_edit_made_again(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"data": settings["data"] | {"limit": 4}, "pipeline": {"batch_size": 4, "at_once": 4}}
    plain = inline(from_dict(settings | changed))
    evaluated: list[int] = []
    edited: list[int] = []
    evaluate, edit = actor.evaluate, actor.edit

    def narrow(backbone: Any, editor: Any, params: Any, batch: Any, *rest: Any) -> Any:
        evaluated.append(batch.num_edits)
        if evaluated[-1] > 1:
            raise torch.OutOfMemoryError("not enough memory")
        return evaluate(backbone, editor, params, batch, *rest)

    def counted(*arguments: Any) -> Any:
        edited.append(arguments[6])
        return edit(*arguments)

    monkeypatch.setattr(actor, "evaluate", narrow)
    monkeypatch.setattr(actor, "edit", counted)
    other = inline(from_dict(settings | changed | {"out": f"{settings['out']}-narrow"}))
    assert edited == [4] and evaluated == [4, 2, 1, 1, 2, 1, 1]
    both = [list(rows.read_rows(rows.parts(outcome.workspace))) for outcome in (plain, other)]
    for row, expected in zip(*both, strict=True):
        assert [row[name] for name in ("edit_id", "steps", "m_gen")] == [
            expected[name] for name in ("edit_id", "steps", "m_gen")
        ]


def test_out_of_memory_reduces_the_width_and_loses_no_edit(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are those of a run with enough memory."""
    changed = {"data": settings["data"] | {"limit": 4}, "pipeline": {"batch_size": 4, "at_once": 4}}
    plain = inline(from_dict(settings | changed))
    widths: list[int] = []
    original = actor.edit

    def edit(*arguments: Any) -> Any:
        widths.append(arguments[6])
        if widths[-1] > 1:
            raise torch.OutOfMemoryError("not enough memory")
        return original(*arguments)

    monkeypatch.setattr(actor, "edit", edit)
    narrow = inline(from_dict(settings | changed | {"out": f"{settings['out']}-narrow"}))
    assert widths == [4, 2, 1]
    both = [list(rows.read_rows(rows.parts(outcome.workspace))) for outcome in (plain, narrow)]
    assert [row["status"] for row in both[1]] == ["edited"] * 4
    for row, expected in zip(*both, strict=True):
        assert (row["edit_id"], row["steps"]) == (expected["edit_id"], expected["steps"])
        for metric in ("rel", "t_gen", "m_gen", "t_loc", "m_loc"):
            assert row[metric] == expected[metric]
        assert row["worst_nll"] == pytest.approx(expected["worst_nll"], rel=1e-3)


def test_cuda_graphs_are_released_before_the_width_is_halved(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each graph holds the memory of a step."""
    changed = {"data": settings["data"] | {"limit": 4}, "pipeline": {"batch_size": 4, "at_once": 4}}
    widths: list[int] = []
    recordings = ["one"]
    original = actor.edit

    def forget() -> bool:
        return bool(recordings) and bool(recordings.pop())

    def edit(*arguments: Any) -> Any:
        widths.append(arguments[6])
        if recordings or widths[-1] > 2:
            raise torch.OutOfMemoryError("not enough memory")
        return original(*arguments)

    monkeypatch.setattr(device_errors.cuda_graphs, "forget", forget)
    monkeypatch.setattr(actor, "edit", edit)
    narrow = inline(from_dict(settings | changed))
    assert widths == [4, 4, 2]
    assert [row["status"] for row in rows.read_rows(rows.parts(narrow.workspace))] == ["edited"] * 4
