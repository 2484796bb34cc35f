"""Staging: groups depend on the input alone, and no record is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mmedit_files import record, write_array

from odedit.errors import InputError
from pipeline import sources, staging
from pipeline.config import RunConfig, from_dict
from pipeline.workspace import Workspace


def staged(config: RunConfig) -> tuple[staging.Staged, Workspace]:
    workspace = Workspace.of(config.out)
    workspace.create()
    return staging.stage(config, sources.resolve(config.data, workspace.out), workspace), workspace


def with_records(settings: dict[str, Any], records: list[Any], **data: Any) -> RunConfig:
    write_array(Path(settings["data"]["path"]), records)
    return from_dict(settings | {"data": settings["data"] | data})


def test_groups_hold_batch_size_usable_records_and_the_bad_ones_between(settings: dict[str, Any]) -> None:
    records = [record(0), {"src": 1}, record(1, alt=""), record(2), record(3), "no record", record(4)]
    found, workspace = staged(with_records(settings, records))
    assert found == staging.Staged(usable=(2, 2), problems=3)
    groups = [staging.read_group(workspace.records, group) for group in range(2)]
    assert [[r.index for r in group] for group in groups] == [[0, 1, 2, 3], [4, 5, 6]]


def test_the_limit_counts_usable_records(settings: dict[str, Any]) -> None:
    records = [record(0, alt=""), record(1), record(2, src=None), record(3), record(4)]
    found, _ = staged(with_records(settings, records, limit=2))
    assert (found.num_usable, found.problems) == (2, 2)


def test_staging_twice_reads_what_is_there(config: RunConfig) -> None:
    first, workspace = staged(config)
    before = workspace.records.stat().st_mtime_ns
    assert staged(config)[0] == first
    assert workspace.records.stat().st_mtime_ns == before


def test_a_broken_file_leaves_nothing_behind(config: RunConfig) -> None:
    path = Path(config.data.path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(InputError, match=r"vqa_eval\.json"):
        staged(config)
    assert not [file for file in Path(config.out).iterdir() if file.is_file()]


def test_held_out_locality_without_a_pool_is_refused_before_any_work(settings: dict[str, Any]) -> None:
    config = from_dict(settings | {"supervision": {}})
    with pytest.raises(InputError, match=r"data\.pool is not set"):
        staged(config)
    staged(replace(config, data=replace(config.data, pool=config.data.path)))


def test_repeated_edit_ids_become_problems(settings: dict[str, Any]) -> None:
    records = [record(number, edit_id="same") for number in range(3)]
    found, workspace = staged(with_records(settings, records))
    assert (found.num_usable, found.problems) == (1, 2)
    assert "same" in staging.read_group(workspace.records, 0)[1].problem
