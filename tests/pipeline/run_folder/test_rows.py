"""Result rows and their files, the summary, counted attempts, and atomic writes."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from odedit.data.records import RawRecord
from odedit.evaluation.statistics import summarize
from odedit.storage.atomic import write_atomically
from odedit.storage.location import locate
from pipeline.config.run import RunConfig, from_dict
from pipeline.run_folder import rows as results
from pipeline.run_folder.summary import summarize_results
from pipeline.run_folder.workspace import Workspace, read_schema
from pipeline.workers.attempts import Ledger


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    new = Workspace.of(str(tmp_path / "out"))
    new.create()
    return new


def row(index: int, status: str = results.EDITED, **columns: object) -> results.Row:
    record = RawRecord("f.json", index, f"edit-{index}", "vqa", {"src": "q", "alt": "a"})
    return results.base_row(record, from_dict({}), status) | columns


def test_rows_come_back_as_they_were(workspace: Workspace) -> None:
    written = row(0, rel=1.0, t_loc_near=0.5, losses={"rel": [2.0, 1.0], "gen": []}, answer_after="a")
    results.write_part(workspace.part(0), [written])
    (read,) = results.read_rows(results.parts(workspace))
    assert {name: read[name] for name in written} == written
    assert read["m_loc"] is None


def test_files_with_different_probes_become_one_table(workspace: Workspace) -> None:
    results.write_part(workspace.part(0), [row(0, rel=1.0, text_gen=0.5)])
    results.write_part(workspace.part(1), [row(1, results.SKIPPED)])
    results.write_part(workspace.part(2), [row(2, rel=0.0, answer_after="x")])
    results.unify(workspace)
    table = parquet.read_table(workspace.results)
    assert table.column("text_gen").to_pylist() == [0.5, None, None]
    assert table.column("answer_after").to_pylist() == [None, None, "x"]
    assert len({str(read_schema(path)) for path in results.parts(workspace)}) == 1


def test_the_summary_counts_every_row_and_averages_those_that_worked(workspace: Workspace) -> None:
    rows = [row(0, rel=1.0, seconds=2.0), row(1, rel=0.0, seconds=4.0), row(2, results.FAILED), row(3, results.SKIPPED)]
    results.write_part(workspace.part(0), rows)
    summary = summarize_results(workspace, from_dict({}))
    assert (summary["n"], summary["failed"], summary["skipped"]) == (2, 1, 1)
    assert summary["metrics"]["rel"]["mean"] == 0.5
    assert summary["metrics"]["seconds"]["n"] == 2
    assert "index" not in summary["metrics"]


def test_a_run_of_an_earlier_version_goes_on_with_answers(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"rel": {"before": "Köln", "after": "Bonn"}, "t_loc": {"before": "", "after": "x"}}
    with monkeypatch.context() as earlier:
        earlier.delitem(results.FIXED_COLUMNS, "answers")
        results.write_part(workspace.part(0), [row(0, rel=1.0)])
        assert "answers" not in results.read_table(workspace.part(0)).column_names
    results.write_part(workspace.part(1), [row(1, rel=0.0, answers=answers), row(2, results.SKIPPED)])
    assert [each.get("answers") for each in results.read_rows(results.parts(workspace))] == [None, answers, None]
    results.unify(workspace)
    assert [each["answers"] for each in results.read_rows(results.parts(workspace))] == [None, answers, None]
    assert summarize_results(workspace, from_dict({}))["metrics"]["rel"]["mean"] == 0.5


def finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def a_run(workspace: Workspace, groups: int) -> list[results.Row]:
    """Writes groups whose rows differ in their columns, with failures, nulls, repeated facts and infinite values."""
    rng = random.Random(groups)
    written = []
    for group in range(groups):
        rows = []
        for index in range(3 * group, 3 * group + 3):
            status = results.FAILED if index % 7 == 3 else results.EDITED
            columns: dict[str, object] = {"fact": f"fact-{index % 5}", "losses": {"rel": [1.0] * (index % 3)}}
            if status == results.EDITED:
                columns |= {"rel": rng.random(), "steps": index, "seconds": rng.expovariate(1.0)}
                columns |= {"lambda": math.nan if index % 4 else None, "stop_reason": ("a", "b", None)[index % 3]}
                columns |= {"text_gen": rng.random()} if group % 2 else {"answer_after": "yes"}
                columns |= {"worst_nll": math.inf} if index == 0 else {"worst_nll": rng.gauss(0, 3)}
            rows.append(row(index, status, **columns))
        results.write_part(workspace.part(group), rows)
        written += rows
    return written


@pytest.mark.parametrize("values_at_once", [1, 10**6])
def test_the_summary_by_columns_is_that_of_the_rows(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, values_at_once: int
) -> None:
    monkeypatch.setattr("pipeline.run_folder.summary._VALUES_AT_ONCE", values_at_once)
    edited = [row for row in a_run(workspace, 9) if row["status"] == results.EDITED]
    numbers = [{k: v for k, v in row.items() if k != "index" and finite(v)} for row in edited]
    estimates = summarize(numbers, [str(row["fact"]) for row in edited])
    expected = {name: vars(estimate) for name, estimate in estimates.items()}
    results.unify(workspace)
    summary = summarize_results(workspace, from_dict({}))
    assert summary["metrics"] == expected
    assert (summary["n"], summary["failed"]) == (len(edited), 27 - len(edited))
    assert sum(summary["stop_reasons"].values()) == len(edited) and summary["stop_reasons"]["unknown"]


def test_a_large_run_is_gathered_in_few_files_with_the_same_rows(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "GROUPS_PER_FILE", 4)
    a_run(workspace, 10)
    before = [results.to_json_row(row) for row in columns_of(workspace)]
    results.unify(workspace)
    names = workspace.results.names()
    assert names == [f"part-{first:06d}-{last:06d}.parquet" for first, last in ((0, 3), (4, 7), (8, 9))]
    assert [results.to_json_row(row) for row in columns_of(workspace)] == before
    assert results.finished_groups(workspace) == set(range(10))
    assert parquet.read_table(workspace.results).num_rows == 30
    results.unify(workspace)
    assert workspace.results.names() == names


def test_a_kill_while_files_are_gathered_repeats_no_row(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "GROUPS_PER_FILE", 4)
    a_run(workspace, 10)
    before = [results.to_json_row(row) for row in columns_of(workspace)]
    with monkeypatch.context() as patch:
        patch.setattr(results, "_drop_repeated", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            results.unify(workspace)
    assert len(workspace.results.names()) == 13
    assert [results.to_json_row(row) for row in columns_of(workspace)] == before
    # Another kill may leave single groups beside a gathered file.
    (workspace.results / "part-000004-000007.parquet").delete()
    assert results.finished_groups(workspace) == set(range(10))
    results.unify(workspace)
    assert len(workspace.results.names()) == 3
    assert [results.to_json_row(row) for row in columns_of(workspace)] == before


def columns_of(workspace: Workspace) -> list[results.Row]:
    """Every row with the columns of all rows, as readers of the unified files get them."""
    rows = list(results.read_rows(results.parts(workspace)))
    names = sorted({name for row in rows for name in row})
    return [{name: row.get(name) for name in names} for row in rows]


def test_rows_of_one_status_are_read_alone(workspace: Workspace) -> None:
    written = a_run(workspace, 4)
    failed = results.read_rows(results.parts(workspace), ("index", "status"), (results.FAILED,))
    assert [row["index"] for row in failed] == [row["index"] for row in written if row["status"] == results.FAILED]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_the_first_of_several_writers_wins(tmp_path: Path) -> None:
    location = locate(str(tmp_path / "file"), "out")
    location.write_once("first")
    location.write_once("second")
    assert (tmp_path / "file").read_text() == "first"


@settings(deadline=None)  # a busy disk is slow
@given(max_attempts=st.integers(2, 6), killers=st.sets(st.integers(0, 3)))
def test_every_edit_is_tried_at_most_so_often_and_only_killers_are_given_up(
    tmp_path_factory: pytest.TempPathFactory, max_attempts: int, killers: set[int]
) -> None:
    """A worker dies with every edit in `killers`, and is restarted until the group is done."""
    path = locate(str(tmp_path_factory.mktemp("attempts")), "out") / "group.json"
    deaths = dict.fromkeys(range(4), 0)

    def work() -> list[int] | None:
        """The edits given up, or None if the worker died."""
        ledger = Ledger(path, max_attempts)
        if ledger.begin_whole():
            for edit in killers:
                deaths[edit] += 1
            return None if killers else []
        given_up = []
        for edit in deaths:
            if not ledger.begin_single(str(edit)):
                given_up.append(edit)
            elif edit in killers:
                deaths[edit] += 1
                return None
            else:
                ledger.end_single(str(edit))
        return given_up

    for _ in range(100):
        given_up = work()
        if given_up is not None:
            break
    assert given_up == sorted(killers)
    assert all(deaths[edit] == max_attempts for edit in killers)


def test_a_cut_off_count_starts_again(tmp_path: Path) -> None:
    path = locate(str(tmp_path), "out") / "group.json"
    path.write_text('{"whole": ')
    assert Ledger(path, 3).begin_whole()


def test_supervision_is_named_in_every_row() -> None:
    config: RunConfig = from_dict({"supervision": {"locality_source": "record"}})
    assert results.supervision_name(config) == "rephrases held_out, locality record"
