"""What a search says in the end: the best settings beside the defaults on records that no trial has seen, and why."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from odedit.errors import counted
from odedit.evaluation.score import paired_score, score
from odedit.evaluation.statistics import MAIN, SIGNIFICANT, PairedDifference, holm, paired, summarize
from odedit.storage.location import Location
from pipeline.driver.run import Outcome
from pipeline.report.formatting import number
from pipeline.report.page import Arm, p_value
from pipeline.run_folder.workspace import write_json
from tune import plots, points
from tune.config import SCORE, Search
from tune.points import COMPLETE, FAILED, PRUNED, Trial


@dataclass(frozen=True)
class Finished:
    """What a search left behind.

    Attributes:
        best: The trial that was judged best on the validation records.
        front: The trials that no other beats in every objective.
        markdown: The summary.
        files: What was written.
        metrics: Figures for the parent's page in MLflow.
        tracking_uri: MLflow store, or None.
    """

    best: Trial
    front: Sequence[Trial]
    markdown: str
    files: Sequence[Location]
    metrics: Mapping[str, float]
    tracking_uri: str | None


def write(
    search: Search,
    out: Location,
    study: Any,
    every: Sequence[Trial],
    best: Trial,
    outcomes: Mapping[str, Outcome],
    seconds: float,
) -> Finished:
    """Writes tables and pictures.

    Args:
        study: Optuna's.
        outcomes: The runs on the evaluation records, `defaults` and, if it is another, `best`.
        seconds: That the trials took.
    """
    front = points.pareto(list(every), search.config.objectives)
    comparison = compare(outcomes) if "best" in outcomes else None
    importance = plots.importance(study, search.config.objectives)
    counts = {state: sum(trial.state == state for trial in every) for state in (COMPLETE, PRUNED, FAILED)}
    verdict_text = verdict(comparison)
    markdown = "\n\n".join(
        part
        for part in (
            f"# {search.config.title}",
            _trials_text(search, counts, seconds),
            _best_text(search, best),
            _front_table(search, front, best) if len(search.config.objectives) > 1 else "",
            _evaluation_table(outcomes, comparison),
            f"**{verdict_text}**",
            _importance_text(search, importance),
        )
        if part
    )
    arms = {name: _means(outcome) for name, outcome in outcomes.items()}
    summary = {
        "title": search.config.title,
        "trials": counts,
        "seconds": seconds,
        "best": _trial_view(search, best),
        "front": [_trial_view(search, trial) for trial in front] if len(search.config.objectives) > 1 else [],
        "evaluation": arms,
        "difference": None if comparison is None else [asdict(row) for row in comparison],
        "verdict": verdict_text,
        "importance": importance,
    }
    (out / "summary.md").write_text(markdown + "\n")
    write_json(out / "summary.json", _finite(summary))
    (out / "trials.csv").write_text(to_csv(search, every))
    pictures = plots.draw(search, list(every), best, importance)
    for name, image in pictures.items():
        (out / name).write_bytes(image)
    names = ("best.yaml", "summary.md", "summary.json", "trials.csv", "search.yaml", *pictures)
    metrics = {f"trials_{state}": float(count) for state, count in counts.items()}
    metrics |= {f"validation_{name}": float((best.last or {}).get(name, 0.0)) for name in (SCORE, *MAIN)}
    for arm, means in arms.items():
        metrics |= {f"evaluation_{arm}_{name}": value["mean"] for name, value in means.items()}
    for row in comparison or ():
        metrics |= {f"evaluation_difference_{row.metric}": row.difference.mean}
        metrics |= {f"evaluation_p_{row.metric}": row.p_holm} if row.p_holm == row.p_holm else {}
    uri = next((outcome.tracking_uri for outcome in outcomes.values() if outcome.tracking_uri), None)
    return Finished(best, front, markdown, [out / name for name in names], metrics, uri)


def _finite(value: Any) -> Any:
    """NaN, where there is no test, as null: JSON has no other word for it."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value


@dataclass(frozen=True)
class Compared:
    """A metric of the best settings against the defaults', on the edits that both have."""

    metric: str
    difference: PairedDifference
    p_holm: float


def compare(outcomes: Mapping[str, Outcome]) -> list[Compared]:
    """The score and the five metrics; p of the metrics after Holm's correction, the score is what was searched for."""
    before, after = (_rows(outcomes[name]) for name in ("defaults", "best"))
    differences = paired(before, after)
    corrected = holm({name: one.p for name, one in differences.items()})
    total = paired_score(before, after)
    first = [] if total is None else [Compared(SCORE, total, total.p)]
    return first + [Compared(name, differences[name], corrected[name]) for name in MAIN if name in differences]


def _rows(outcome: Outcome) -> dict[str, dict[str, Any]]:
    return Arm("", outcome.workspace, outcome.summary).rows()


def _means(outcome: Outcome) -> dict[str, dict[str, float]]:
    """Every metric's mean and interval; the score has none by itself."""
    rows = list(_rows(outcome).values())
    facts = [str(row.get("fact") or row["edit_id"]) for row in rows]
    found = summarize([{metric: row.get(metric) for metric in (*MAIN, "seconds")} for row in rows], facts)
    return {SCORE: {"mean": score(rows), "n": len(rows)}} | {name: asdict(value) for name, value in found.items()}


def verdict(comparison: Sequence[Compared] | None) -> str:
    """Whether the search helped, in a sentence."""
    if comparison is None:
        return "The search does not help: no trial did better than the defaults on the validation records."
    total = next((row for row in comparison if row.metric == SCORE), None)
    if total is None:
        return "Nothing can be said: the runs on the evaluation records have no edit in common."
    change = total.difference
    figures = f"score {change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}], p {p_value(change.p)}, n = {change.n}"
    if change.p < SIGNIFICANT:
        word = "helps" if change.mean > 0 else "does not help, it hurts"
        return f"The search {word} on records that no trial has seen: {figures}."
    return f"The search does not help beyond chance on records that no trial has seen: {figures}."


def _trials_text(search: Search, counts: Mapping[str, int], seconds: float) -> str:
    config = search.config
    edits = ", ".join(map(str, config.rungs.sizes))
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{counted(sum(counts.values()), 'trial')} in {minutes}:{rest:02d} min, {config.concurrent} at a time: "
        f"{counts[COMPLETE]} complete, {counts[PRUNED]} stopped early, {counts[FAILED]} failed. "
        f"Sampler {config.sampler}; rungs of {edits} validation edits."
    )


def _best_text(search: Search, best: Trial) -> str:
    chosen = "the best score on the front" if len(search.config.objectives) > 1 else "the best"
    lines = [
        f"Best settings (trial {best.number}, {chosen}; {search.config.judged_by} "
        f"{number((best.last or {}).get(search.config.judged_by, 0.0))} on the validation records):",
        "",
        "| setting | best | default |",
        "|---|--:|--:|",
    ]
    from pipeline.config.values import flatten

    defaults = flatten(search.defaults.to_dict())
    for path, value in search.space.settings(best.point).items():
        lines.append(f"| `{path}` | {_short(value)} | {_short(defaults.get(path))} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value))
    return "-" if value is None else str(value)


def _front_table(search: Search, front: Sequence[Trial], best: Trial) -> str:
    names = [*search.config.objectives, SCORE]
    lines = [
        "Pareto front (no other trial is better in every objective):",
        "",
        "| trial | " + " | ".join(names) + " | settings |",
        "|---|" + "--:|" * len(names) + "---|",
    ]
    for trial in sorted(front, key=lambda trial: -(trial.last or {}).get(SCORE, 0.0)):
        figures = " | ".join(number((trial.last or {}).get(name, 0.0)) for name in names)
        settings = ", ".join(f"`{name}` {_short(value)}" for name, value in trial.point.items())
        mark = " (best.yaml)" if trial is best else ""
        lines.append(f"| {trial.number}{mark} | {figures} | {settings} |")
    return "\n".join(lines)


def _evaluation_table(outcomes: Mapping[str, Outcome], comparison: Sequence[Compared] | None) -> str:
    arms = {name: _means(outcome) for name, outcome in outcomes.items()}
    names = list(arms)
    tests = ["difference", "p", "n"] if comparison is not None else []
    lines = [
        "On the evaluation records, "
        + ", ".join(f"{name}: {counted(outcomes[name].summary['n'], 'edit')}, {outcomes[name].summary['failed']} failed"
                    for name in names) + ":",
        "",
        "| | " + " | ".join([*names, *tests]) + " |",
        "|---|" + "--:|" * len([*names, *tests]),
    ]  # fmt: skip
    by_metric = {row.metric: row for row in comparison or ()}
    for metric in (SCORE, *MAIN):
        cells = [_mean_text(arms[name].get(metric)) for name in names]
        if comparison is not None:
            row = by_metric.get(metric)
            if row is None:
                cells += ["", "", ""]
            else:
                change = row.difference
                cells += [
                    f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
                    p_value(row.p_holm),
                    str(change.n),
                ]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Mean ± half of its 95% interval, clustered by fact. `score`: harmonic mean of the five metrics, its "
        "difference tested by the jackknife over facts; the metrics by paired t-tests clustered by fact, p after "
        "Holm's correction.",
    ]
    return "\n".join(lines)


def _mean_text(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    half = f" ±{number((found['high'] - found['low']) / 2)}" if "low" in found else ""
    return f"{number(found['mean'])}{half}"


def _importance_text(search: Search, importance: Mapping[str, Mapping[str, float]]) -> str:
    if not importance:
        return "Too few complete trials with different results to tell which parameters matter."
    lines = []
    for name, shares in importance.items():
        text = ", ".join(f"`{path}` {number(share)}" for path, share in list(shares.items())[:6])
        lines.append(f"What {name} varied with (fANOVA, share of the variance over the complete trials): {text}.")
    return "\n\n".join(lines)


def _trial_view(search: Search, trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "settings": search.space.settings(trial.point),
        "validation": trial.last,
    }


def to_csv(search: Search, every: Sequence[Trial]) -> str:
    """One line per trial: number, state, parameters, what it said at its last rung, and why it failed."""
    stream = io.StringIO()
    names = [one.name for one in search.space.parameters]
    figures = ["edits", "failed", SCORE, *search.config.objectives, *MAIN, "steps", "seconds"]
    figures = list(dict.fromkeys(figures))
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", "state", *names, *figures, "error"])
    for trial in every:
        last = trial.last or {}
        values = [trial.point.get(name) for name in names]
        cells = [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]
        writer.writerow([trial.number, trial.state, *cells, *(last.get(name) for name in figures), trial.error])
    return stream.getvalue()
