"""Staging: groups depend on the input alone, and no record is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mmedit_files import record, write_array
from pyarrow import parquet

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
    assert found == staging.Staged(usable=(2, 2), records=(4, 3)) and found.problems == 3
    read = staging.GroupReader(workspace.records)
    groups = [read(group) for group in range(2)]
    assert [[r.index for r in group] for group in groups] == [[0, 1, 2, 3], [4, 5, 6]]


def test_the_limit_counts_usable_records(settings: dict[str, Any]) -> None:
    records = [record(0, alt=""), record(1), record(2, src=None), record(3), record(4)]
    found, _ = staged(with_records(settings, records, limit=2))
    assert (found.num_usable, found.problems) == (2, 2)


def test_staging_twice_reads_what_is_there(config: RunConfig) -> None:
    first, workspace = staged(config)
    before = workspace.records.info().mtime_ns
    assert staged(config)[0] == first
    assert workspace.records.info().mtime_ns == before


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
    assert "same" in staging.GroupReader(workspace.records)(0)[1].problem


def test_a_group_is_found_among_several_row_groups_in_any_order(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_ROWS_TOGETHER", 3)
    records = [record(0), {"src": 1}, *(record(number) for number in range(1, 8)), "no record"]
    found, workspace = staged(with_records(settings, records))
    assert found == staging.Staged(usable=(2, 2, 2, 2, 0), records=(3, 2, 2, 2, 1)) and found.problems == 2
    assert parquet.read_metadata(workspace.records).num_row_groups == 3
    read = staging.GroupReader(workspace.records)
    expected = [[0, 1, 2], [3, 4], [5, 6], [7, 8], [9]]
    for group in (3, 0, 4, 2, 1, 1):
        assert [r.index for r in read(group)] == expected[group]
    usable = [r.index for r in staging.usable_records(workspace.records)]
    assert usable == [0, 2, 3, 4, 5, 6, 7, 8]


def test_the_groups_do_not_depend_on_how_many_rows_are_written_together(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record(number) for number in range(9)]
    read = []
    for rows in (1, 100):
        monkeypatch.setattr(staging, "_ROWS_TOGETHER", rows)
        found, workspace = staged(with_records(settings | {"out": f"{settings['out']}-{rows}"}, records))
        read.append([staging.GroupReader(workspace.records)(group) for group in range(len(found.usable))])
    assert read[0] == read[1]


def test_what_an_older_version_staged_is_staged_again(config: RunConfig) -> None:
    first, workspace = staged(config)
    old = parquet.read_table(workspace.records).drop_columns(["group"])
    parquet.write_table(old, workspace.records, row_group_size=2)
    assert staged(config)[0] == first
    assert len(staging.GroupReader(workspace.records)(0)) == 2
