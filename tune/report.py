"""Report of a finished search: the best settings against the defaults on records that no trial has edited."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from odedit.errors import counted
from odedit.evaluation.score import paired_score, score
from odedit.evaluation.statistics import MAIN, SHOWN, Estimate, paired
from odedit.storage.location import Location
from pipeline.config.values import flatten
from pipeline.driver.run import Outcome
from pipeline.report.differences import Difference, corrected, means
from pipeline.report.formatting import change, number, p_value
from pipeline.report.page import Arm
from pipeline.run_folder.workspace import write_json
from pipeline.tracking import names
from tune import importance, plots, points
from tune.config import SCORE, Search
from tune.importance import Spread
from tune.points import COMPLETE, FAILED, PRUNED, Trial


@dataclass(frozen=True)
class Finished:
    """Results of a search.

    Attributes:
        best: Trial with the best validation figure.
        front: Trials that no other trial beats in every objective.
        markdown: Text of the summary.
        files: Files that were written.
        metrics: Figures of the search's parent run in MLflow.
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
        search: The search.
        out: Folder of the search.
        study: Optuna's study.
        every: All trials.
        best: Trial with the best validation figure.
        outcomes: Runs on the evaluation records: `defaults`, and `best` unless the defaults are the best.
        seconds: Time that the trials took.
    """
    several = len(search.config.objectives) > 1
    front = points.pareto(list(every), search.config.objectives)
    runs = {name: _run_means(outcome) for name, outcome in outcomes.items()}
    tests = compare(outcomes) if "best" in outcomes else None
    spread = importance.spreads(study, search.config.objectives)
    counts = {state: sum(trial.state == state for trial in every) for state in (COMPLETE, PRUNED, FAILED)}
    parts = (
        f"# {search.config.title}",
        _trials_text(search, counts, seconds),
        _best_text(search, best),
        _front_table(search, front, best) if several else "",
        _evaluation_table(outcomes, runs, tests),
        f"**{verdict(tests)}**",
        _importance_text(spread),
        *(f"Note: {note}" for note in search.notes),
    )
    markdown = "\n\n".join(part for part in parts if part)
    summary = {
        "title": search.config.title,
        "trials": counts,
        "seconds": seconds,
        "best": _trial_view(search, best),
        "front": [_trial_view(search, trial) for trial in front] if several else [],
        "evaluation": {name: _plain(of_run) for name, of_run in runs.items()},
        "difference": None if tests is None else [_test_view(name, test) for name, test in tests.items()],
        "verdict": verdict(tests),
        "importance": {name: asdict(of_one) for name, of_one in spread.items()},
    }
    (out / "summary.md").write_text(markdown + "\n")
    write_json(out / "summary.json", _finite(summary))
    (out / "trials.csv").write_text(to_csv(search, every))
    pictures = plots.draw(search, list(every), best, spread)
    for name, image in pictures.items():
        (out / name).write_bytes(image)
    files = [out / name for name in ("best.yaml", "summary.md", "summary.json", "trials.csv", "search.yaml", *pictures)]
    uri = next((outcome.tracking_uri for outcome in outcomes.values() if outcome.tracking_uri), None)
    return Finished(best, front, markdown, files, _metrics(counts, best, runs, tests), uri)


def _metrics(
    counts: Mapping[str, int],
    best: Trial,
    runs: Mapping[str, Mapping[str, Estimate]],
    tests: Mapping[str, Difference] | None,
) -> dict[str, float]:
    """Metrics of the search's parent run in MLflow: those of the best settings on the evaluation records come first.

    Intervals and p are in `summary.md`, its description.
    """
    found = runs.get("best", runs["defaults"])
    metrics = {names.METRICS + name: found[name].mean for name in SHOWN if name in found} | {SCORE: found[SCORE].mean}
    metrics |= {f"over_defaults/{name}": test.mean for name, test in (tests or {}).items()}
    metrics |= {f"trials/{state}": float(count) for state, count in counts.items()}
    metrics |= {f"validation/{name}": float((best.last or {}).get(name, 0.0)) for name in (SCORE, *MAIN)}
    return {name: value for name, value in metrics.items() if value == value}


def _finite(value: Any) -> Any:
    """The value with NaN as null, which JSON cannot write."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def compare(outcomes: Mapping[str, Outcome]) -> dict[str, Difference]:
    """Best minus default settings in the score and the five metrics, on the records that both runs edited.

    p of the metrics is corrected over the metrics; that of the score is not, for it is what the search maximises.
    """
    before, after = (_rows(outcomes[name]) for name in ("defaults", "best"))
    total = paired_score(before, after)
    return ({} if total is None else corrected({SCORE: total})) | corrected(paired(before, after, SHOWN))


def _rows(outcome: Outcome) -> dict[str, dict[str, Any]]:
    return Arm("", outcome.workspace, outcome.summary).rows()


def _run_means(outcome: Outcome) -> dict[str, Estimate]:
    """Mean and interval of the score, the metrics and the time; the score of a single run has no interval."""
    rows = list(_rows(outcome).values())
    value = score(rows)
    return {SCORE: Estimate(value, value, value, len(rows))} | means(rows, (*SHOWN, "seconds"))


def _plain(of_run: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """A run's means as JSON."""
    total = of_run[SCORE]
    return {name: asdict(value) for name, value in of_run.items()} | {SCORE: {"mean": total.mean, "n": total.n}}


def _test_view(metric: str, test: Difference) -> dict[str, Any]:
    values = asdict(test)
    p_holm = values.pop("p_holm")
    return {"metric": metric, "difference": values, "p_holm": p_holm}


def verdict(tests: Mapping[str, Difference] | None) -> str:
    """A sentence that says whether the search improved the score.

    Args:
        tests: Tests by metric; None if the defaults are the best settings.
    """
    if tests is None:
        return "The search does not help: no trial did better than the defaults on the validation records."
    total = tests.get(SCORE)
    if total is None:
        return "Nothing can be said: the runs on the evaluation records have no edit in common."
    figures = f"score {change(total)}, p {p_value(total.p)}, n = {total.n}"
    if total.is_clear:
        word = "helps" if total.mean > 0 else "does not help, it hurts"
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


def _evaluation_table(
    outcomes: Mapping[str, Outcome],
    runs: Mapping[str, Mapping[str, Estimate]],
    tests: Mapping[str, Difference] | None,
) -> str:
    counts = ", ".join(
        f"{name}: {counted(outcome.summary['n'], 'edit')}, {outcome.summary['failed']} failed"
        for name, outcome in outcomes.items()
    )
    heads = [*runs, *(["difference", "p", "n"] if tests is not None else [])]
    lines = [
        f"On the evaluation records, {counts}:",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "--:|" * len(heads),
    ]
    for metric in (name for name in (SCORE, *SHOWN) if any(name in of_run for of_run in runs.values())):
        cells = [_mean_text(metric, of_run.get(metric)) for of_run in runs.values()]
        if tests is not None:
            test = tests.get(metric)
            cells += ["", "", ""] if test is None else [change(test), p_value(test.p_holm), str(test.n)]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Mean ± half of its 95% interval, clustered by fact. `score`: harmonic mean of the five metrics, its "
        "difference tested by the jackknife over facts; the metrics by paired t-tests clustered by fact, p after "
        "Holm's correction.",
    ]
    return "\n".join(lines)


def _mean_text(metric: str, mean: Estimate | None) -> str:
    if mean is None:
        return ""
    half = f" ±{number((mean.high - mean.low) / 2)}" if metric != SCORE else ""
    return f"{number(mean.mean)}{half}"


def _importance_text(spreads: Mapping[str, Spread]) -> str:
    """What each parameter explains, as a table under a sentence for each objective."""
    parts = []
    for name, spread in spreads.items():
        if spread.low == spread.high:
            parts.append(
                f"{name} is {number(spread.low)} in each of the {counted(spread.trials, 'complete trial')}: nothing "
                "that was searched matters, or there are too few trials to tell."
            )
            continue
        head = (
            f"What {name} varied with: {number(spread.low)} to {number(spread.high)} over "
            f"{counted(spread.trials, 'complete trial')}, standard deviation {spread.deviation:.4f}."
        )
        if not spread.shares:
            parts.append(f"{head} Too few trials to tell which parameters matter.")
            continue
        lines = [f"{head} Share of the variance (fANOVA), with a 95% interval (bootstrap over the trials):", ""]
        lines += ["| parameter | share |", "|---|--:|"]
        for path, share in spread.shares.items():
            lines.append(f"| `{path}` | {number(share.value)} [{number(share.low)}, {number(share.high)}] |")
        together = max(0.0, 1.0 - sum(share.value for share in spread.shares.values()))
        lines.append(f"| several together | {number(together)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _trial_view(search: Search, trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "settings": search.space.settings(trial.point),
        "validation": trial.last,
    }


def to_csv(search: Search, every: Sequence[Trial]) -> str:
    """One CSV line per trial: number, state, parameters, figures of its last rung, and its error."""
    stream = io.StringIO()
    names = [parameter.name for parameter in search.space.parameters]
    columns = ("edits", "failed", SCORE, *search.config.objectives, *MAIN, "steps", "seconds")
    figures = list(dict.fromkeys(columns))
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", "state", *names, *figures, "error"])
    for trial in every:
        last = trial.last or {}
        values = [trial.point.get(name) for name in names]
        cells = [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]
        writer.writerow([trial.number, trial.state, *cells, *(last.get(name) for name in figures), trial.error])
    return stream.getvalue()
