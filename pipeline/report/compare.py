"""Runs side by side: the settings that differ, and the metrics with paired tests on the records in common."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from odedit.errors import InputError
from odedit.evaluation.score import SCORE, score
from odedit.evaluation.statistics import SHOWN, Estimate
from odedit.runtime.addresses import masked, reason
from odedit.storage.location import Location, locate
from pipeline.config.run import read_yaml
from pipeline.config.values import flatten
from pipeline.report.differences import Difference, differences, means
from pipeline.report.formatting import LABELS, change, number, p_value, plus_minus, sign
from pipeline.report.templates import environment
from pipeline.run_folder import rows as results
from pipeline.run_folder.rows import EDITED, FAILED, SKIPPED, Row
from pipeline.run_folder.workspace import CONFIG_HEADER, Workspace, read_json
from pipeline.tracking import fetch

METRICS = (*SHOWN, "steps", "seconds")
_COLUMNS = ("edit_id", "fact", "status", "prompt", "target", *METRICS)
_NOT_SHOWN = ("tracking.", "out")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_MAX_TITLE_NAMES = 4


@dataclass(frozen=True)
class Side:
    """One run.

    Attributes:
        name: Name in the tables.
        settings: Path -> value, and `code`, the version of the code that made the run.
        rows: Edited records by id, prompt and target.
        counts: Number of records by status.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Mapping[str, Row]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Comparison:
    """Several runs, each compared with the first.

    Attributes:
        sides: The runs.
        settings: Path -> value in each run, for the settings that differ between runs.
        means: Metric -> mean and interval, for each run.
        differences: Metric -> difference to the first run, for each further run; p corrected over the runs.
        common: Number of records in common with the first run, for each further run.
    """

    sides: Sequence[Side]
    settings: Mapping[str, Sequence[Any]]
    means: Sequence[Mapping[str, Estimate]]
    differences: Sequence[Mapping[str, Difference]]
    common: Sequence[int]


@contextmanager
def sides(names: Sequence[str], uri: str | None) -> Iterator[list[Side]]:
    """Loads the runs of the given names; their rows are readable inside the block.

    Args:
        names: Folders of runs, studies or searches, or ids of MLflow runs.
        uri: MLflow store of the ids.

    Raises:
        InputError: A name is none of these, or there are fewer than two runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        loaded = [side for index, name in enumerate(names) for side in _load(name, uri, Path(folder) / str(index))]
        if len(loaded) < 2:
            raise InputError(
                f"RUN: got {len(loaded)} run, expected at least two, or a study or search that holds more."
            )
        yield _numbered(loaded)


def _numbered(sides: Sequence[Side]) -> list[Side]:
    """Appends a number to names that occur more than once."""
    total, seen = Counter(side.name for side in sides), Counter[str]()
    result = []
    for side in sides:
        seen[side.name] += 1
        result.append(replace(side, name=f"{side.name} ({seen[side.name]})") if total[side.name] > 1 else side)
    return result


def _load(name: str, uri: str | None, folder: Path) -> list[Side]:
    location = locate(name, "RUN")
    if location.is_folder():
        return [_side(label, out) for label, out in runs_in(location)]
    if _RUN_ID.fullmatch(name):
        if uri is None:
            raise InputError(f"--uri: is missing; {name!r} is an MLflow run: give the address of its store.")
        return [_side(label, out) for label, out in fetch.fetch_results(uri, name, folder)]
    raise InputError(
        f"RUN: there is no folder {masked(name)!r}; expected a run's, study's or search's, or an MLflow run's id."
    )


def runs_in(folder: Location) -> list[tuple[str, Location]]:
    """Name and folder of each run in the folder of a run, study or search.

    Raises:
        InputError: There is none.
    """
    if Workspace(folder).run.exists():
        return [(_name(folder), folder)]
    if (folder / "study.json").exists():
        arms = [out for out in (folder / "arms").glob() if Workspace(out).run.exists()]
        names = [(read_yaml(Workspace(out).config).get("tracking") or {}).get("run_name") or out.name for out in arms]
        if arms:
            return list(zip(names, arms, strict=True))
    state = read_json(folder / "search.json")
    if isinstance(state, dict):
        outs = [folder / "evaluation" / name for name in state.get("evaluated", ())]
        if outs:
            return [(f"{_name(folder)}, {out.name}", out) for out in outs]
        raise InputError(f"RUN: the search in {folder} is not finished; `odedit tune --resume {folder}` goes on.")
    raise InputError(f"RUN: {folder} holds no run, study or search.")


def _name(folder: Location) -> str:
    return Path(folder).resolve().name if folder.is_local else folder.name


def _side(name: str, out: Location) -> Side:
    workspace = Workspace(out)
    parts = results.parts(workspace)
    if not parts or not workspace.config.exists():
        raise InputError(f"RUN: {name} has no results yet.")
    counts = dict.fromkeys((EDITED, FAILED, SKIPPED), 0)
    rows = {}
    for row in results.read_rows(parts, _COLUMNS):
        counts[row["status"]] += 1
        if row["status"] == EDITED:
            rows["\n".join(map(str, (row["edit_id"], row["prompt"], row["target"])))] = row
    first_line = workspace.config.read_text().partition("\n")[0]
    settings = flatten(read_yaml(workspace.config))
    return Side(name, settings | {"code": first_line.removeprefix(CONFIG_HEADER).strip()}, rows, counts)


def compare(sides: Sequence[Side]) -> Comparison:
    """Every run against the first."""
    first, *others = sides
    names = dict.fromkeys(name for side in sides for name in side.settings if not name.startswith(_NOT_SHOWN))
    settings = {name: [side.settings.get(name) for side in sides] for name in names}
    differing = {name: values for name, values in settings.items() if any(value != values[0] for value in values)}
    changes = differences({i: (first.rows, side.rows) for i, side in enumerate(others)}, METRICS, with_score=True)
    common = [len(first.rows.keys() & side.rows.keys()) for side in others]
    return Comparison(sides, differing, [_means(side) for side in sides], list(changes.values()), common)


def _means(side: Side) -> dict[str, Estimate]:
    rows = list(side.rows.values())
    value = score(rows)
    # The score of a single run has no interval.
    total = {SCORE: Estimate(value, value, value, len(rows))} if value == value else {}
    return total | means(rows, METRICS)


def tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and lines of cells of each table; the first column is text, the others are figures."""
    sides, others = comparison.sides, comparison.sides[1:]
    names = [side.name for side in sides]
    shown = [metric for metric in (SCORE, *METRICS) if any(metric in of_side for of_side in comparison.means)]
    differing = [[name, *map(_value, values)] for name, values in comparison.settings.items()]
    averages = [
        [side.name, _counts(side), *(_mean(of_side.get(metric), metric) for metric in shown)]
        for side, of_side in zip(sides, comparison.means, strict=True)
    ]
    changes = [
        [side.name, str(common), *(_change(of_side.get(metric)) for metric in shown)]
        for side, common, of_side in zip(others, comparison.common, comparison.differences, strict=True)
    ]
    return [
        ("Settings that differ", ["setting", *names], differing),
        ("Means", ["run", "edits", *shown], averages),
        (f"Differences to {names[0]}", ["run", "common records", *shown], changes),
    ]


def note(comparison: Comparison) -> str:
    """The meaning of the tables' signs, and the runs without a common record."""
    parts = [
        "Means ± half of their 95% intervals, clustered by fact. `score`: harmonic mean of the five metrics. "
        "Differences are on the records that both runs edited (same id, prompt and target), with 95% intervals; p: "
        "paired t-test clustered by fact, of the score the jackknife over facts, after Holm's correction over runs. "
        "▲/▼: p < .05."
    ]
    first, *others = comparison.sides
    apart = [side.name for side, common in zip(others, comparison.common, strict=True) if not common]
    if apart:
        parts.append(f"No record in common with {first.name}: {', '.join(apart)}.")
    return " ".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _counts(side: Side) -> str:
    lost = ", ".join(f"{side.counts[status]} {status}" for status in (FAILED, SKIPPED) if side.counts[status])
    return str(side.counts[EDITED]) + (f" ({lost})" if lost else "")


def _mean(mean: Estimate | None, metric: str) -> str:
    if mean is None:
        return ""
    return number(mean.mean) if metric == SCORE else plus_minus(mean)


def _change(difference: Difference | None) -> str:
    if difference is None:
        return ""
    digits = 3 if abs(difference.mean) < 10 else 1
    return f"{change(difference, digits)}, p {p_value(difference.p_holm)}{sign(difference)}"


def _title(comparison: Comparison) -> str:
    return " against ".join(side.name for side in comparison.sides[:_MAX_TITLE_NAMES])


def to_markdown(comparison: Comparison) -> str:
    """All tables as Markdown."""
    blocks = [f"# {_title(comparison)}" + (" ..." if len(comparison.sides) > _MAX_TITLE_NAMES else "")]
    for title, heads, lines in tables(comparison):
        blocks.append(f"## {title}")
        if not lines:
            blocks.append("None.")
            continue
        table = ["| " + " | ".join(map(_escaped, heads)) + " |", "|---|" + "--:|" * (len(heads) - 1)]
        table += ["| " + " | ".join(map(_escaped, line)) + " |" for line in lines]
        blocks.append("\n".join(table))
    return "\n\n".join([*blocks, note(comparison)]) + "\n"


def _escaped(text: str) -> str:
    """Text that does not end its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def write_html(comparison: Comparison, path: Location) -> None:
    """Writes all tables as one HTML page.

    Raises:
        InputError: The file cannot be written.
    """
    text = (
        environment()
        .get_template("compare.html.j2")
        .render(title=_title(comparison), tables=tables(comparison), note=note(comparison), labels=LABELS)
    )
    try:
        path.parent.make_folder()
        path.write_text(text)
    except OSError as error:
        raise InputError(f"--html: {str(path)!r} cannot be written to: {reason(error)}.") from error
