"""Staging: groups depend on the input alone, and no record is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from odedit.errors import InputError
from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.run import Outcome
from pipeline.run_folder import pictures, sources, staging
from pipeline.run_folder import rows as results
from pipeline.run_folder.workspace import Workspace
from tests.support.mmedit_files import record, write_array, write_images


def staged(config: RunConfig) -> tuple[staging.Staged, Workspace]:
    workspace = Workspace.of(config.out)
    workspace.create()
    return staging.stage(config, sources.resolve(config.data, workspace.out), workspace), workspace


def with_records(settings: dict[str, Any], records: list[Any], **data: Any) -> RunConfig:
    write_array(Path(settings["data"]["path"]), records)
    return from_dict(settings | {"data": settings["data"] | data})


def test_groups_hold_batch_size_usable_records_and_the_bad_ones_between(settings: dict[str, Any]) -> None:
    records = [record(0), {"src": 1}, record(1, alt=""), record(2), record(3), "no record", record(4)]
    counts, workspace = staged(with_records(settings, records))
    assert counts == staging.Staged(usable=(2, 2), records=(4, 3)) and counts.problems == 3
    read = staging.GroupReader(workspace.records)
    groups = [read(group) for group in range(2)]
    assert [[r.index for r in group] for group in groups] == [[0, 1, 2, 3], [4, 5, 6]]


def test_the_limit_counts_usable_records(settings: dict[str, Any]) -> None:
    records = [record(0, alt=""), record(1), record(2, src=None), record(3), record(4)]
    counts, _ = staged(with_records(settings, records, limit=2))
    assert (counts.num_usable, counts.problems) == (2, 2)


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


@pytest.mark.parametrize(
    ("name", "objective", "reads"),
    [
        ("ftl", "native", False), ("ftv", "native", False), ("lora", "native", False), ("mend", "native", False),
        ("unike", "native", False), ("wise", "native", True), ("tpatcher", "native", True),
        ("ftl", "native_kl", True), ("ftl", "odedit", True), ("ftl", "contrast", True),
    ],
)  # fmt: skip
def test_a_pool_is_needed_where_unrelated_questions_are_read(
    settings: dict[str, Any], name: str, objective: str, reads: bool
) -> None:
    values = {"supervision": {}, "editor": {"name": name}, "objective": {"name": objective}}
    config = from_dict(settings | values)
    assert staging.reads_locality(config) == reads
    counts, workspace = staged(config)
    assert counts.num_usable == 5 and workspace.pool.exists() == reads, "a pool of the records' pictures"


def test_an_edit_that_reads_no_unrelated_question_is_the_same_without_a_pool(
    settings: dict[str, Any], inline: Callable[[RunConfig], Outcome], tmp_path: Path
) -> None:
    values = settings | {
        "supervision": {}, "editor": {"name": "ftl", "max_steps": 2}, "objective": {"name": "native"},
    }  # fmt: skip
    others = [record(number) for number in range(10, 14)]
    write_images(tmp_path, others)
    pool = str(write_array(tmp_path / "pool.json", others))
    outcomes = []
    for number, data in enumerate((settings["data"], settings["data"] | {"pool": pool})):
        outcome = inline(from_dict(values | {"data": data, "out": str(tmp_path / str(number))}))
        rows = list(results.read_rows(results.parts(outcome.workspace)))
        assert {row["status"] for row in rows} == {"edited"}
        outcomes.append([results.to_json_row(row) for row in rows])
    assert outcomes[0] == outcomes[1]


def test_a_pool_that_can_supervise_nothing_is_refused_once(settings: dict[str, Any], tmp_path: Path) -> None:
    config = from_dict(settings | {"supervision": {}})
    records = [record(number, loc="who wrote it?") for number in range(5)]
    path = str(write_array(Path(config.data.path), records))
    with pytest.raises(InputError) as caught:
        staged(replace(config, data=replace(config.data, pool=path)))
    message = str(caught.value)
    assert "none of its 5 records can supervise the records of data.path" in message
    assert "4 with the same text question (field 'loc'); 1 with the record itself" in message
    assert "supervision.locality_source to 'record'" in message and "`held_out`" in message
    assert not Workspace.of(config.out).records.exists()
    # Records with unrelated questions of their own need no pool.
    held_out = {
        "text_locality": {"prompt": "why?", "target": "so"},
        **{
            slot: {"prompt": "why?", "target": "so", "image": record(1)["m_loc"]}
            for slot in ("image_locality", "near_locality")
        },
    }
    write_array(Path(config.data.path), [values | {"held_out": held_out} for values in records])
    assert staged(replace(config, data=replace(config.data, pool=path)))[0].num_usable == 5


def test_a_pool_whose_pictures_lie_elsewhere_is_refused_once(settings: dict[str, Any], tmp_path: Path) -> None:
    config = from_dict(settings | {"supervision": {}})
    pool = [record(number) for number in range(10, 14)]
    with_pool = replace(config, data=replace(config.data, pool=str(write_array(tmp_path / "pool.json", pool))))
    with pytest.raises(InputError, match=r"none of those has images.*read from data\.image_root.*data pack"):
        staged(with_pool)
    write_images(tmp_path, pool[2:3])
    assert staged(with_pool)[0].num_usable == 5, "one usable record is enough"


def test_one_record_that_a_pool_can_supervise_is_enough(settings: dict[str, Any]) -> None:
    config = from_dict(settings | {"supervision": {}})
    records = [record(number, loc="who wrote it?") for number in range(4)] + [record(4)]
    write_array(Path(config.data.path), records)
    assert staged(replace(config, data=replace(config.data, pool=config.data.path)))[0].num_usable == 5


def test_records_and_pools_with_special_tokens_of_the_model_are_skipped(settings: dict[str, Any]) -> None:
    texts = [{"alt": "red </s> pier"}, {"src": "what does <s> mean?"}, {"rephrase": "which <image>?"}, {}, {}]
    records = [record(number) | changes for number, changes in enumerate(texts)]
    config = with_records(settings | {"supervision": {}}, records, pool=settings["data"]["path"], limit=2)
    counts, workspace = staged(config)
    assert (counts.num_usable, counts.problems) == (2, 3)
    problems = [
        other.problem for group in range(len(counts.records)) for other in staging.GroupReader(workspace.records)(group)
    ]
    assert [problem.split(",")[0] for problem in problems if problem] == [
        "control token: field 'alt' holds '</s>'",
        "control token: field 'src' holds '<s>'",
        "image marker: field 'rephrase' holds '<image>'",
    ]
    pool = staging.read_pool(workspace, sources.resolve(config.data, workspace.out))
    assert pool is not None and {other.index for other in pool.records} == {3, 4}


def test_repeated_edit_ids_become_problems(settings: dict[str, Any]) -> None:
    records = [record(number, edit_id="same") for number in range(3)]
    counts, workspace = staged(with_records(settings, records))
    assert (counts.num_usable, counts.problems) == (1, 2)
    assert "same" in staging.GroupReader(workspace.records)(0)[1].problem


def test_edit_ids_of_another_file_become_problems(settings: dict[str, Any], tmp_path: Path) -> None:
    added = write_array(tmp_path / "more.json", [record(4, edit_id="b"), record(5, edit_id="c")])
    records = [record(number, edit_id=name) for number, name in enumerate("ab")]
    config = with_records(settings | {"commit": {"way": "sum", "add": [str(added)]}}, records)
    read = staging._records(config, sources.resolve(config.data, Workspace.of(config.out).out), lambda fields: "")
    assert [(item.index, item.edit_id, item.problem) for item in read] == [
        (0, "a", ""),
        (1, "b", ""),
        (2, "b", "repeated edit id: 'b' is that of a record in another file"),
        (3, "c", ""),
    ]


def test_a_group_is_found_among_several_row_groups_in_any_order(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_ROWS_TOGETHER", 3)
    records = [record(0), {"src": 1}, *(record(number) for number in range(1, 8)), "no record"]
    counts, workspace = staged(with_records(settings, records))
    assert counts == staging.Staged(usable=(2, 2, 2, 2, 0), records=(3, 2, 2, 2, 1)) and counts.problems == 2
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
        counts, workspace = staged(with_records(settings | {"out": f"{settings['out']}-{rows}"}, records))
        read.append([staging.GroupReader(workspace.records)(group) for group in range(len(counts.usable))])
    assert read[0] == read[1]


def test_what_an_older_version_staged_is_staged_again(config: RunConfig) -> None:
    first, workspace = staged(config)
    old = parquet.read_table(workspace.records).drop_columns(["group"])
    parquet.write_table(old, workspace.records, row_group_size=2)
    assert staged(config)[0] == first
    assert len(staging.GroupReader(workspace.records)(0)) == 2


def test_wrong_folders_of_pictures_are_refused_before_a_long_file_is_read(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first records are read, and not the pool."""
    read: list[int] = []
    original = staging.read_records

    def read_records(*arguments: Any, **options: Any) -> Any:
        for item in original(*arguments, **options):
            read.append(item.index)
            yield item

    records = [record(number) for number in range(30)]
    config = from_dict(settings | {"supervision": {}})
    config = replace(config, data=replace(config.data, pool=str(write_array(tmp_path / "pool.json", records))))
    write_array(Path(config.data.path), records)
    monkeypatch.setattr(staging, "read_records", read_records)
    monkeypatch.setattr(staging.Pool, "sample", lambda *arguments, **options: pytest.fail("the pool is read"))
    monkeypatch.setattr(pictures, "_RECORDS", 10)
    wrong = tmp_path / "empty"
    wrong.mkdir()
    with pytest.raises(InputError, match=r"^data\.image_root: none of 20 pictures looked for is there"):
        staged(replace(config, data=replace(config.data, image_root=str(wrong))))
    assert read == list(range(10))
