"""A resumed run repeats the groups of damaged files, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from odedit.storage.location import Location
from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.preflight import prepare
from pipeline.driver.run import Outcome
from pipeline.run_folder import repair, rows
from tests.support.rows import assert_same

Inline = Callable[..., Outcome]
ONE_EACH = {"pipeline": {"batch_size": 1}, "objective": {"name": "native"}}


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    return list(rows.read_rows(rows.parts(outcome.workspace)))


def gathered(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunConfig, Outcome, list[dict[str, Any]]]:
    """The configuration, outcome and rows of a finished run of five groups in two result files."""
    monkeypatch.setattr(rows, "GROUPS_PER_FILE", 3)
    config = from_dict(settings | ONE_EACH)
    whole = inline(config)
    return config, whole, rows_of(whole)


def test_only_the_group_with_a_missing_edit_is_repeated(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole, expected = gathered(settings, inline, monkeypatch)
    assert [path.name for path in whole.workspace.results.glob()] == [
        "part-000000-000002.parquet",
        "part-000003-000004.parquet",
    ]
    lost = whole.workspace.edit(expected[1]["edit_id"])
    kept = whole.workspace.edit(expected[2]["edit_id"])
    lost.delete()
    before = Path(kept).stat().st_mtime_ns
    ready = prepare(config)
    assert ready.pending == [1] and ready.num_done(ready.pending) == 4
    assert ready.notes == (f"Damaged or missing: {lost.name}. 1 group of edits is done again.",)
    again = inline(config)
    assert_same(rows_of(again), expected)
    assert lost.exists() and Path(kept).stat().st_mtime_ns == before


def test_a_kill_while_groups_are_taken_apart_loses_and_repeats_no_row(
    settings: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole, expected = gathered(settings, inline, monkeypatch)
    whole.workspace.edit(expected[1]["edit_id"]).delete()
    with monkeypatch.context() as patch:
        patch.setattr(Location, "delete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    assert len(rows.parts(whole.workspace)) == 2, "the gathered file still counts"
    assert prepare(config).pending == [1]
    assert_same(rows_of(inline(config)), expected)


def test_edits_that_are_not_kept_are_not_missed(settings: dict[str, Any], inline: Inline) -> None:
    config = from_dict(settings | ONE_EACH | {"keep_edits": False})
    inline(config)
    ready = prepare(config)
    assert ready.pending == [] and ready.notes == ()


def test_a_measurement_that_was_cut_off_is_made_again(settings: dict[str, Any], inline: Inline) -> None:
    config = from_dict(settings)
    whole = inline(config)
    expected, measured = rows_of(whole), json.loads(whole.workspace.calibration.read_text())
    whole.workspace.calibration.write_text('{"sigma2_0": 1')
    whole.workspace.part(1).delete()
    assert_same(rows_of(inline(config)), expected)
    assert json.loads(whole.workspace.calibration.read_text()) == measured


def test_only_what_a_killed_writer_left_is_deleted(settings: dict[str, Any]) -> None:
    workspace = prepare(from_dict(settings)).workspace
    left = [workspace.out / ".summary.json.host.0123abcd.tmp", workspace.edits / ".a.safetensors.host.0123abcd.tmp"]
    users = [workspace.out / ".notes.tmp", workspace.out / "notes.0123abcd.tmp"]
    for path in (*left, *users):
        path.write_text("")
    repair.remove_temporaries(workspace)
    assert [path.exists() for path in left] == [False, False] and all(path.exists() for path in users)


@pytest.mark.parametrize("content", [b"", b"\0" * 200])
def test_a_configuration_that_lost_its_content_is_written_anew(
    settings: dict[str, Any], inline: Inline, content: bytes
) -> None:
    config = from_dict(settings | ONE_EACH)
    whole = inline(config)
    before = whole.workspace.config.read_text()
    whole.workspace.config.write_bytes(content)
    inline(config)
    assert whole.workspace.config.read_text() == before
