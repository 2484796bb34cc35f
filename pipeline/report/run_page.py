"""`report.html` of one run: one file without network access, with a gallery of the edits, worst first.

The gallery's edits are a block of JSON, which `templates/report.js` draws as they come into view. Only that script may
run: the page's security policy names it by its hash, and texts of records are never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from odedit.data.images import ImageReader
from odedit.errors import counted
from odedit.evaluation.edited import EDITED_PROBE
from odedit.evaluation.statistics import SHOWN, SIGNIFICANT, Estimate
from odedit.inputs.batch import is_locality
from odedit.storage.location import Location
from pipeline.report import differences
from pipeline.report.cloud import HiddenStates, drawing
from pipeline.report.figures import MEASURED, NAMES, histograms, loss_curves, short, training_curves
from pipeline.report.formatting import LABELS, counts_interval, interval, number
from pipeline.report.one_model import one_model, single_edits
from pipeline.report.page import counts
from pipeline.report.templates import environment
from pipeline.report.thumbnails import Thumbnails
from pipeline.run_folder.outcomes import (
    RANKED,
    EditOutcome,
    ProbeOutcome,
    mean_score,
    picture_name,
    picture_reader,
    read_outcomes,
    worst_ids,
)  # fmt: skip
from pipeline.run_folder.reasons import Reasons, sentences
from pipeline.run_folder.rows import EDITED, KEPT, Row, parts, read_kept, read_rows
from pipeline.run_folder.workspace import Workspace, read_json

MAX_EDITS = 10_000
"""Edits in the gallery, the worst of the run."""
MAX_TEXT_BYTES, MAX_PICTURE_BYTES = 8_000_000, 9_000_000
"""Sizes of the parts of a page; what does not fit is left out of its last edits."""
MAX_CURVES = 300
"""Edits with loss curves on a page, the worst."""
_MAX_CHARACTERS, _REASONS = 300, 30
_PROBE = re.compile(r"([a-z]+)_(gen|loc)(?:_(\w+))?")
_BOTH = {"tm_gen": "text and image generality"}
_HEADLINE = (*SHOWN, "seconds")
COMPARED = ("edit_id", "fact", "status", *_HEADLINE)
"""Columns that a baseline is compared by."""


@dataclass(frozen=True)
class Baseline:
    """A run that another is compared with.

    Attributes:
        name: Name on the page.
        rows: Edited records by edit id, with the columns `COMPARED`.
        kept: Records of the pool by edit id, with the columns `KEPT`; empty: not measured.
    """

    name: str
    rows: Mapping[str, Row]
    kept: Mapping[str, Row]

    @classmethod
    def of(cls, name: str, workspace: Workspace) -> Baseline:
        return cls(name, differences.edited(read_rows(parts(workspace), COMPARED)), _kept(workspace))


def _kept(workspace: Workspace) -> dict[str, Row]:
    return {row["edit_id"]: row for row in read_kept(workspace)}


def write_run_report(
    workspace: Workspace,
    summary: Mapping[str, Any],
    reader: ImageReader | None = None,
    baseline: Baseline | None = None,
    states: HiddenStates | None = None,
) -> Location:
    """Writes `report.html` of a finished run and returns it.

    Args:
        summary: Content of `summary.json`.
        reader: Reader of the records' pictures; None: that of the run's configuration. Pictures that are not there any
            more are left out.
        baseline: Run that the scores are compared with, over the edits that both have; None: of a committed model the
            single edits that it was made from, else none.
        states: Hidden states of some edits, which are drawn.
    """
    from markupsafe import Markup

    if baseline is None and (single := single_edits(workspace)) is not None:
        # What the edits lose in one model is the difference to each of them alone.
        baseline = Baseline.of("alone", single)
    templates = environment()
    style, script = (templates.get_template(name).render() for name in ("report.css", "report.js"))
    whole, model = _Whole.of(workspace), one_model(workspace)
    gallery = _gallery(workspace, whole.worst, reader or picture_reader(workspace), baseline)
    text = templates.get_template("report.html.j2").render(
        title=_name(workspace),
        summary=summary,
        counts=counts(summary),
        headline=_headline(workspace, summary, baseline),
        baseline=None if baseline is None else baseline.name,
        reasons=sentences(whole.reasons),
        cloud=None if states is None else drawing(states, read_outcomes(workspace, states.edit_ids)),
        histograms=histograms(whole.values),
        model=model,
        training=training_curves(model.curves, model.steps) if model else [],
        resources=_resources(workspace, summary),
        config=workspace.config.read_text() if workspace.config.exists() else "",
        gallery=gallery,
        records=whole.count,
        data=Markup(_inert(gallery.data)),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    workspace.report.write_text(text)
    return workspace.report


def _name(workspace: Workspace) -> str:
    return workspace.out.name or "run"


def _inert(value: Any) -> str:
    """JSON that no browser takes for markup, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


@dataclass
class _Whole:
    """What a page says about all records of a run, read once.

    Attributes:
        count: Number of records.
        worst: Edit ids of the gallery, worst first.
        reasons: Reasons of failed and skipped records by kind, the commonest first.
        values: Values of the edited records by column.
    """

    count: int = 0
    worst: list[str] = field(default_factory=list)
    reasons: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in MEASURED})

    @classmethod
    def of(cls, workspace: Workspace) -> _Whole:
        whole, reasons = cls(), Reasons()

        def counting(rows: Iterable[Row]) -> Iterable[Row]:
            for row in rows:
                whole.count += 1
                if row["status"] != EDITED:
                    reasons.add(row)
                for name, values in whole.values.items() if row["status"] == EDITED else ():
                    if (value := row.get(name)) is not None and np.isfinite(value):
                        values.append(value)
                yield row

        columns = tuple(dict.fromkeys((*RANKED, *MEASURED, "error", "file", "index")))
        whole.worst = worst_ids(counting(read_rows(parts(workspace), columns)), MAX_EDITS)
        whole.reasons = reasons.commonest(_REASONS)
        return whole


def _headline(workspace: Workspace, summary: Mapping[str, Any], baseline: Baseline | None) -> list[dict[str, Any]]:
    """A line per main score: mean and interval, and the difference to the baseline."""
    compared = {}
    if baseline is not None:
        own = differences.edited(read_rows(parts(workspace), COMPARED))
        entries = differences.compare(baseline.rows, own, _HEADLINE)
        entries += differences.compare(baseline.kept, _kept(workspace), KEPT)
        compared = {entry.column: entry for entry in entries}
    lines = []
    for name in (*_HEADLINE, *KEPT):
        figures = summary["metrics"].get(name) if name in _HEADLINE else summary.get(name)
        if figures is None:
            continue
        entry = compared.get(name)
        p = None if entry is None or name not in (*SHOWN, *KEPT) else entry.difference.p
        label = {"kept": "other answers kept", "kept_text": "other answers kept, without picture"}.get(name)
        is_clear = p is not None and p < SIGNIFICANT
        lines.append(
            {"name": name, "label": label or NAMES[name], "mean": Estimate(**figures), "is_share": name != "seconds",
             "entry": entry, "p": p, "is_clear": is_clear}
        )  # fmt: skip
    return lines


def _resources(workspace: Workspace, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and figures of time, memory and versions."""
    metrics, wall, n = summary["metrics"], summary.get("wall_seconds"), summary["n"]
    lines = []
    if wall:
        lines.append(("Time of the run", f"{number(wall)} s"))
        if not workspace.committed.exists():  # making one model is no rate of edits
            lines.append(("Edits per second", number(n / wall)))
    if "seconds" in metrics:
        lines.append(("Seconds per edit (optimisation)", interval(Estimate(**metrics["seconds"]))))
    if "peak_bytes" in metrics:
        lines.append(("Peak memory per edit", f"{metrics['peak_bytes']['mean'] / 2**20:,.1f} MiB"))
    if "steps" in metrics:
        lines.append(("Steps per edit", counts_interval(Estimate(**metrics["steps"]))))
    if stops := summary.get("stop_reasons"):
        lines.append(("Stopped by", ", ".join(f"{name} {count}" for name, count in stops.items())))
    for kind, stages in ((read_json(workspace.profile) or {}).get("seconds") or {}).items():
        spent = ", ".join(f"{stage} {number(value)} s" for stage, value in stages.items())
        lines.append((f"Time by stage, {kind} workers", spent))
    lines.append(("Version", summary.get("code") or "unknown"))
    lines.append(("Libraries", ", ".join(f"{name} {value}" for name, value in (summary.get("software") or {}).items())))
    return [(name, text) for name, text in lines if text]


@dataclass(frozen=True)
class _Gallery:
    """The edits of a page.

    Attributes:
        data: What `report.js` reads: `probes` (name and label), `edits`, `pictures` and `curves`.
        notes: Sentences about what the page leaves out.
    """

    data: Mapping[str, Any]
    notes: Sequence[str]


def _gallery(
    workspace: Workspace, edit_ids: Sequence[str], reader: ImageReader | None, baseline: Baseline | None
) -> _Gallery:
    outcomes = read_outcomes(workspace, edit_ids, without=("losses",))
    images = [probe.image for outcome in outcomes for probe in outcome.probes if probe.image is not None]
    thumbnails = Thumbnails.read(images, reader, MAX_PICTURE_BYTES)
    names = list(dict.fromkeys(probe.name for outcome in outcomes for probe in outcome.probes))
    curves = _curves(workspace, edit_ids[:MAX_CURVES])
    edits = [_edit(outcome, baseline) for outcome in outcomes]
    text_bytes, bare = len(json.dumps(edits, ensure_ascii=False).encode()), 0
    for outcome, entry in zip(outcomes, edits, strict=True):
        probes = [_probe(probe, outcome.probes[0], names, thumbnails) for probe in outcome.probes]
        size = len(json.dumps(probes, ensure_ascii=False).encode())
        if text_bytes + size <= MAX_TEXT_BYTES:
            text_bytes += size
            entry["probes"] = probes
        else:
            bare += 1
    notes = []
    if images and not thumbnails.texts:
        notes.append("The pictures were not there when the page was written.")
    if thumbnails.is_full:
        notes.append("Pictures of the last edits are left out to keep the page small.")
    if bare:
        notes.append(f"Answers of the last {counted(bare, 'edit')} are left out to keep the page small.")
    if any(probe.after is None and outcome.holds is not None for outcome in outcomes for probe in outcome.probes):
        notes.append("Some answers are not in the rows: the run did not generate them, or is of an earlier version.")
    labels = [{"name": name, "label": probe_label(name), "locality": is_locality(name)} for name in names]
    data = {"probes": labels, "edits": edits, "pictures": thumbnails.texts, "curves": curves,
            "baseline": None if baseline is None else baseline.name}  # fmt: skip
    return _Gallery(data, notes)


def probe_label(name: str) -> str:
    """What a probe is, in words.

    >>> probe_label("m_loc_near"), probe_label("rel"), probe_label("far_gen")
    ('image locality, near', 'reliability', 'generality (far)')
    """
    if name.startswith(EDITED_PROBE):
        return f"what another record edits ({name.removeprefix(EDITED_PROBE)})"
    match = _PROBE.fullmatch(name)
    if match is None:
        return LABELS.get(name, name)
    if name in _BOTH:
        return _BOTH[name]
    who, kind, detail = match.groups()
    label = LABELS.get(f"{who}_{kind}") or f"{'generality' if kind == 'gen' else 'locality'} ({who})"
    return f"{label}, {detail.replace('_', ' ')}" if detail else label


def _edit(outcome: EditOutcome, baseline: Baseline | None) -> dict[str, Any]:
    row = outcome.row
    entry = {
        "id": outcome.edit_id, "index": row.get("index"), "status": row["status"], "task": row.get("task"),
        "fact": _cut(row.get("fact")), "error": _cut(row.get("error")), "old": _cut(outcome.old_answer),
        "holds": outcome.holds, "mean": short(outcome.mean_score), "steps": row.get("steps"),
        "seconds": short(row.get("seconds")), "nll": short(row.get("worst_nll")),
    }  # fmt: skip
    if baseline is not None and outcome.edit_id in baseline.rows:
        entry["base"] = short(mean_score(baseline.rows[outcome.edit_id]))
    return {name: value for name, value in entry.items() if value is not None}


def _probe(probe: ProbeOutcome, own: ProbeOutcome, names: Sequence[str], thumbnails: Thumbnails) -> list[Any]:
    """A probe in the order in which `report.js` reads it; 0 stands for the edit's own question or answer."""
    is_own = probe is own
    return [
        names.index(probe.name),
        0 if not is_own and probe.prompt == own.prompt else _cut(probe.prompt),
        0 if not is_own and probe.target == own.target else _cut(probe.target),
        thumbnails.index(probe.image),
        None if probe.image is None else picture_name(probe.image)[-60:],
        _cut(probe.before),
        _cut(probe.after),
        short(probe.score),
        probe.is_right,
        probe.was_right,
    ]


def _curves(workspace: Workspace, edit_ids: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """The curves of some edits by edit id."""
    rows = read_rows(parts(workspace), ("edit_id", "losses"), edit_ids=frozenset(edit_ids))
    drawn = {row["edit_id"]: loss_curves(row.get("losses") or {}) for row in rows}
    return {edit_id: curves for edit_id, curves in drawn.items() if curves}


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[: _MAX_CHARACTERS - 4]} ..."
