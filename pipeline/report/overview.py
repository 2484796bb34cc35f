"""What a team sees of a run first in MLflow: a description, tables, the worst edits with pictures, and figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from odedit.data.images import ImageReader
from odedit.evaluation.score import SCORE
from odedit.evaluation.statistics import SHOWN, Estimate
from pipeline.config.run import RunConfig
from pipeline.report.formatting import LABELS, interval
from pipeline.report.model_card import cell
from pipeline.report.page import Arm, counts, draw
from pipeline.report.thumbnails import Thumbnails
from pipeline.run_folder.curves import HIGH, LOW, Curve, mean_curves
from pipeline.run_folder.outcomes import RANKED, EditOutcome, picture_reader, read_outcomes, worst_ids
from pipeline.run_folder.reasons import sentences
from pipeline.run_folder.rows import EDITED, KEPT, parts, read_rows
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking import names
from pipeline.tracking.client import Table, picture_cell
from pipeline.tracking.runs import Overview

WORST = 50
"""Edits in the table with pictures."""
MAX_PICTURE_BYTES = 1_000_000
_LONGEST = 300
_PICTURES = "table_images/worst_edits"
_TEXTS = ("picture", "question", "wanted", "new answer", "old answer", "holds")


def overview(
    workspace: Workspace, config: RunConfig, summary: Mapping[str, Any], reader: ImageReader | None = None
) -> Overview:
    """Overview of a finished run.

    Args:
        summary: Content of `summary.json`.
        reader: Reader of the records' pictures; None: that of the run's configuration.
    """
    if not summary["n"]:
        return Overview(_description(config, summary), {"scores.json": _scores(summary)}, {})
    worst, files = _worst_edits(workspace, reader or picture_reader(workspace))
    files["figures/scores.png"] = draw([Arm(config.name, workspace, summary)])
    rows = read_rows(parts(workspace), ("status", "losses"), (EDITED,))
    if curves := mean_curves(rows, config.tracking.curves, names.MOST_TERMS):
        files["figures/curves.png"] = _draw_curves(curves)
    return Overview(_description(config, summary), {"scores.json": _scores(summary), "worst_edits.json": worst}, files)


def _description(config: RunConfig, summary: Mapping[str, Any]) -> str:
    """Headline, the main scores, and the commonest reasons why records were not edited."""
    reasons = [cell(sentence, _LONGEST) for sentence in sentences(summary.get("reasons", []))]
    made = f"`{summary['editor']}` under `{summary['objective']}` on {cell(summary['backbone'])}"
    if config.commit is not None:
        made = f"one model, made by `{config.commit_way}`: {made}"
    if not summary["n"]:
        first, *others = reasons or ["no record was given."]
        lines = [f"**Nothing was edited**: {first}", *(f"- {reason}" for reason in others)]
        return "\n\n".join((lines[0], "\n".join(lines[1:]), made)).strip()
    means = summary["metrics"] | {name: summary[name] for name in KEPT if name in summary}
    table = ["| | | mean [95% interval] | n |", "|---|---|---|--:|"]
    for name in (*SHOWN, *KEPT):
        if name in means:
            estimate, label = Estimate(**means[name]), LABELS.get(name, "other answers kept")
            table.append(f"| `{name}` | {label} | {interval(estimate)} | {estimate.n} |")
    # MLflow folds what does not fit into a few lines.
    scores = ", ".join(f"`{name}` {means[name]['mean']:.3f}" for name in (*SHOWN, *KEPT) if name in means)
    score = names.of_scores(summary)[SCORE]
    blocks = [f"**{SCORE} {score:.3f}**: {scores}", f"{counts(summary)}: {made}", "\n".join(table)]
    if reasons:
        blocks.append("Not edited:\n\n" + "\n".join(f"- {reason}" for reason in reasons))
    blocks.append(
        "Artifacts of the run: `report.html` has every edit with pictures and answers, `worst_edits.json` the worst, "
        "`scores.json` every number with its interval, `figures` bars and curves."
    )
    return "\n\n".join(blocks)


def _scores(summary: Mapping[str, Any]) -> Table:
    """Every number of the summary with its interval, the main scores first."""
    means = summary["metrics"] | {name: summary[name] for name in KEPT if name in summary}
    rows = [
        [name, LABELS.get(name, ""), *(_short(means[name][key]) for key in ("mean", "low", "high")), means[name]["n"]]
        for name in sorted(means, key=lambda name: name not in (*SHOWN, *KEPT))
    ]
    return Table(("metric", "label", "mean", "low", "high", "n"), rows)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _worst_edits(workspace: Workspace, reader: ImageReader | None) -> tuple[Table, dict[str, bytes]]:
    """The worst edits with thumbnails, and the thumbnails' files by their paths."""
    ids = worst_ids(read_rows(parts(workspace), RANKED, (EDITED,)), WORST)
    outcomes = read_outcomes(workspace, ids, without=("losses",))
    images = [image for each in outcomes if each.probes and (image := each.probes[0].image) is not None]
    thumbnails = Thumbnails.read(images, reader, MAX_PICTURE_BYTES)
    known = {f"{_PICTURES}/{index}.webp": base64.b64decode(text) for index, text in enumerate(thumbnails.texts)}
    scores = {row["edit_id"]: row for row in read_rows(parts(workspace), ("edit_id", *SHOWN), edit_ids=frozenset(ids))}
    shown = [name for name in SHOWN if any(row.get(name) is not None for row in scores.values())]
    rows = []
    for each in outcomes:
        index = thumbnails.index(each.probes[0].image) if each.probes else None
        picture = picture_cell(f"{_PICTURES}/{'none' if index is None else index}.webp")
        rows.append([picture, *_texts(each), *(_short(scores[each.edit_id].get(name)) for name in shown), each.edit_id])
    columns = (*_TEXTS, *shown, "edit_id")
    if not known:
        return Table(columns[1:], [row[1:] for row in rows]), {}
    # MLflow shows a column as pictures only if its first cell is one.
    return Table(columns, rows), known | {f"{_PICTURES}/none.webp": _blank()}


def _texts(each: EditOutcome) -> list[Any]:
    own = each.probes[0] if each.probes else None
    texts = (None, None, None) if own is None else (own.prompt, own.target, own.after)
    question, wanted, answer = (None if text is None else text[:_LONGEST] for text in texts)
    return [question, wanted, answer, (each.old_answer or "")[:_LONGEST], each.holds]


def _blank() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (240, 240, 240)).save(stream, "WEBP")
    return stream.getvalue()


def _draw_curves(curves: Mapping[str, Curve]) -> bytes:
    """A PNG: each loss by step, its mean over edits with the spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    picture = Figure(figsize=(3.4 * columns, 2.5 * lines), layout="constrained")
    FigureCanvasAgg(picture)
    every: Sequence[Any] = picture.subplots(lines, columns, squeeze=False).flatten().tolist()
    for axes, (name, curve) in zip(every, curves.items(), strict=False):
        axes.fill_between(curve.steps, curve.low, curve.high, color="#0b6bcb", alpha=0.2, linewidth=0)
        axes.plot(curve.steps, curve.mean, color="#0b6bcb")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e4e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in every[len(curves) :]:
        axes.set_visible(False)
    picture.suptitle(f"Mean over edits, {LOW}th to {HIGH}th percentile", fontsize=10)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
