"""Any runs side by side: where their settings differ, and their metrics with paired tests on the records they share."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odedit.errors import InputError
from odedit.evaluation.score import paired_score, score
from odedit.evaluation.statistics import MAIN, SIGNIFICANT, Estimate, PairedDifference, holm, paired, summarize
from odedit.runtime.addresses import masked, reason
from odedit.storage.location import Location, locate
from pipeline.config.run import read_yaml
from pipeline.config.values import flatten
from pipeline.report.formatting import number
from pipeline.report.page import LABELS, p_value
from pipeline.run_folder import rows as results
from pipeline.run_folder.rows import EDITED, FAILED, SKIPPED, Row
from pipeline.run_folder.workspace import CONFIG_HEADER, Workspace, read_json
from pipeline.tracking import fetch

SCORE = "score"
METRICS = (*MAIN, "steps", "seconds")
_COLUMNS = ("edit_id", "fact", "status", "prompt", "target", *METRICS)
_NOT_SHOWN = ("tracking.", "out")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Side:
    """One run.

    Attributes:
        name: What it is called in the tables.
        settings: Path -> value, and `code`, the version that made it.
        rows: Those that were edited, by what they are: id, prompt and target.
        counts: Records by how they ended.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Mapping[str, Row]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Difference:
    """A run's metric minus the first run's, on the records that both edited; p after Holm's correction."""

    found: PairedDifference
    p_holm: float

    @property
    def is_clear(self) -> bool:
        return self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class Comparison:
    """Runs against the first of them.

    Attributes:
        settings: Path -> value in each run, of those that are not the same everywhere.
        means: Of each run: metric -> mean and interval.
        differences: Of each run but the first: metric -> difference; empty without a common record.
        common: Of each run but the first: records that it has in common with the first.
    """

    sides: Sequence[Side]
    settings: Mapping[str, Sequence[Any]]
    means: Sequence[Mapping[str, Estimate]]
    differences: Sequence[Mapping[str, Difference]]
    common: Sequence[int]


@contextmanager
def sides(names: Sequence[str], uri: str | None) -> Iterator[list[Side]]:
    """Finds the runs that are named: a run's folder, a study's or a search's, or an MLflow run's id.

    Args:
        uri: MLflow store of the ids.

    Raises:
        InputError: A name is none of these, or there are fewer than two runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = [side for place, name in enumerate(names) for side in _named(name, uri, Path(folder) / str(place))]
        if len(found) < 2:
            raise InputError(f"RUN: got {len(found)} run, expected at least two, or a study or search that holds more.")
        yield _told_apart(found)


def _told_apart(found: Sequence[Side]) -> list[Side]:
    """Runs of the same name get a number."""
    names = [side.name for side in found]
    seen: dict[str, int] = {}
    result = []
    for side in found:
        seen[side.name] = seen.get(side.name, 0) + 1
        name = f"{side.name} ({seen[side.name]})" if names.count(side.name) > 1 else side.name
        result.append(Side(name, side.settings, side.rows, side.counts))
    return result


def _named(name: str, uri: str | None, folder: Path) -> list[Side]:
    place = locate(name, "RUN")
    if place.is_folder():
        return [_side(label, out) for label, out in _of_folder(place)]
    if _RUN_ID.fullmatch(name):
        if uri is None:
            raise InputError(f"--uri: is missing; {name!r} is an MLflow run, and nothing says in which store.")
        return [_side(label, out) for label, out in fetch.fetch_results(uri, name, folder)]
    raise InputError(
        f"RUN: there is no folder {masked(name)!r}; expected a run's, study's or search's, or an MLflow run's id."
    )


def _of_folder(place: Location) -> list[tuple[str, Location]]:
    """The runs in a folder, by name."""
    if Workspace(place).run.exists():
        return [(_name(place), place)]
    if (place / "study.json").exists():
        parts = [out for out in (place / "arms").glob() if Workspace(out).run.exists()]
        names = [(read_yaml(Workspace(out).config).get("tracking") or {}).get("run_name") or out.name for out in parts]
        if parts:
            return list(zip(names, parts, strict=True))
    state = read_json(place / "search.json")
    if isinstance(state, dict):
        parts = [place / "evaluation" / name for name in state.get("evaluated", ())]
        if parts:
            return [(f"{_name(place)}, {out.name}", out) for out in parts]
        raise InputError(f"RUN: the search in {place} is not finished; `odedit tune --resume {place}` goes on.")
    raise InputError(f"RUN: {place} holds no run, study or search.")


def _name(place: Location) -> str:
    return Path(place).resolve().name if place.is_local else place.name


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
    first = workspace.config.read_text().partition("\n")[0]
    settings = flatten(read_yaml(workspace.config))
    return Side(name, settings | {"code": first.removeprefix(CONFIG_HEADER).strip()}, rows, counts)


def compare(found: Sequence[Side]) -> Comparison:
    """Every run against the first."""
    names = dict.fromkeys(name for side in found for name in side.settings if not name.startswith(_NOT_SHOWN))
    settings = {name: [side.settings.get(name) for side in found] for name in names}
    differing = {name: values for name, values in settings.items() if any(value != values[0] for value in values)}
    means = [_means(side) for side in found]
    raw = []
    for side in found[1:]:
        changes = paired(found[0].rows, side.rows, METRICS)
        total = paired_score(found[0].rows, side.rows)
        raw.append(({} if total is None else {SCORE: total}) | changes)
    corrected = {
        metric: holm({str(place): one[metric].p for place, one in enumerate(raw) if metric in one})
        for metric in (SCORE, *METRICS)
    }
    differences = [
        {metric: Difference(change, corrected[metric][str(place)]) for metric, change in one.items()}
        for place, one in enumerate(raw)
    ]
    common = [len(found[0].rows.keys() & side.rows.keys()) for side in found[1:]]
    return Comparison(found, differing, means, differences, common)


def _means(side: Side) -> dict[str, Estimate]:
    rows = list(side.rows.values())
    facts = [str(row.get("fact") or row["edit_id"]) for row in rows]
    means = summarize([{metric: row.get(metric) for metric in METRICS} for row in rows], facts)
    value = score(rows)
    # By itself the score has no interval; its difference has.
    return ({SCORE: Estimate(value, value, value, len(rows))} if value == value else {}) | means


def tables(found: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and cells of each table; the first column is text, the others are figures."""
    names = [side.name for side in found.sides]
    shown = [metric for metric in (SCORE, *METRICS) if any(metric in means for means in found.means)]
    differing = [[f"{name}", *map(_value, values)] for name, values in found.settings.items()]
    means = [
        [side.name, _counts(side), *(_mean(of_side.get(metric), metric) for metric in shown)]
        for side, of_side in zip(found.sides, found.means, strict=True)
    ]
    changes = [
        [side.name, str(common), *(_change(of_side.get(metric)) for metric in shown)]
        for side, common, of_side in zip(found.sides[1:], found.common, found.differences, strict=True)
    ]
    return [
        ("Settings that differ", ["setting", *names], differing),
        ("Means", ["run", "edits", *shown], means),
        (f"Differences to {names[0]}", ["run", "common records", *shown], changes),
    ]


def note(found: Comparison) -> str:
    """What the tables' signs mean."""
    parts = [
        "Means ± half of their 95% intervals, clustered by fact. `score`: harmonic mean of the five metrics. "
        "Differences are on the records that both runs edited (same id, prompt and target), with 95% intervals; p: "
        "paired t-test clustered by fact, of the score the jackknife over facts, after Holm's correction over runs. "
        "▲/▼: p < .05."
    ]
    apart = [side.name for side, common in zip(found.sides[1:], found.common, strict=True) if not common]
    if apart:
        parts.append(f"No record in common with {found.sides[0].name}: {', '.join(apart)}.")
    return " ".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _counts(side: Side) -> str:
    lost = ", ".join(f"{side.counts[status]} {status}" for status in (FAILED, SKIPPED) if side.counts[status])
    return str(side.counts[EDITED]) + (f" ({lost})" if lost else "")


def _mean(found: Estimate | None, metric: str) -> str:
    if found is None:
        return ""
    half = "" if metric == SCORE else f" ±{number(max(found.high - found.mean, found.mean - found.low))}"
    return number(found.mean) + half


def _change(found: Difference | None) -> str:
    if found is None:
        return ""
    change = found.found
    sign = (" ▲" if change.mean > 0 else " ▼") if found.is_clear else ""
    digits = 3 if abs(change.mean) < 10 else 1
    interval = f"[{change.low:+.{digits}f}, {change.high:+.{digits}f}]"
    return f"{change.mean:+.{digits}f} {interval}, p {p_value(found.p_holm)}{sign}"


def to_markdown(found: Comparison) -> str:
    """The tables one below the other."""
    blocks = ["# " + " against ".join(side.name for side in found.sides[:4]) + (" ..." if len(found.sides) > 4 else "")]
    for title, heads, cells in tables(found):
        blocks.append(f"## {title}")
        if not cells:
            blocks.append("None.")
            continue
        lines = ["| " + " | ".join(map(_escaped, heads)) + " |", "|---|" + "--:|" * (len(heads) - 1)]
        lines += ["| " + " | ".join(map(_escaped, line)) + " |" for line in cells]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, note(found)]) + "\n"


def _escaped(text: str) -> str:
    """A cell may hold a bar."""
    return text.replace("|", "\\|").replace("\n", " ")


def write_html(found: Comparison, place: Location) -> None:
    """The same as one page.

    Raises:
        InputError: The file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("compare.html.j2").render(
        title=" against ".join(side.name for side in found.sides[:4]),
        tables=tables(found),
        note=note(found),
        labels=LABELS,
    )
    try:
        place.parent.make_folder()
        place.write_text(text)
    except OSError as error:
        raise InputError(f"--html: {str(place)!r} cannot be written to: {reason(error)}.") from error
