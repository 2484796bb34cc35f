"""t-SNE of the hidden states of edits and their rephrases, before and after the edits (the paper's Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from rich.console import Console

from odedit.evaluation.columns import METRICS
from pipeline.driver.run import Outcome
from pipeline.edits.states import PROBES, hidden_states
from pipeline.report.cloud import distance
from pipeline.study import plots
from pipeline.study.spec import Arm, StudyConfig

_MARKERS = dict(zip(PROBES, cycle("os^Dvp"), strict=False))
_NAMES = {name: METRICS[name].prompt for name in PROBES}
_SEED = 0


def draw(study: StudyConfig, every: Sequence[Arm], outcomes: Sequence[Outcome], console: Console) -> bytes:
    """A PNG with a panel before the edits and one after those of each arm, all in one embedding."""
    clouds: dict[str, np.ndarray] = {}
    for arm, outcome in zip(every, outcomes, strict=True):
        console.print(f"Hidden states of {arm.name}", highlight=False)
        states = hidden_states(outcome.workspace)
        clouds.setdefault("before", states.before)
        clouds[arm.name] = states.after
    return plots.to_png(_picture(clouds))


def _picture(clouds: dict[str, np.ndarray]) -> Any:
    from sklearn.manifold import TSNE

    stacked = np.concatenate([cloud.reshape(-1, cloud.shape[-1]) for cloud in clouds.values()])
    perplexity = min(30.0, max(2.0, (len(stacked) - 1) / 4))
    flat = TSNE(perplexity=perplexity, init="pca", random_state=_SEED).fit_transform(stacked)
    picture = plots.figure(3.4 * len(clouds), 3.9)
    grid = picture.subplots(1, len(clouds), squeeze=False, sharex=True, sharey=True)
    start = 0
    for axes, (name, cloud) in zip(grid[0], clouds.items(), strict=True):
        num_probes, num_edits = cloud.shape[:2]
        points = flat[start : start + num_probes * num_edits].reshape(num_probes, num_edits, 2)
        start += num_probes * num_edits
        for edit in range(num_edits):
            for probe in range(1, num_probes):
                axes.plot(*points[[0, probe], edit].T, color="#c3cad3", linewidth=0.6, zorder=1)
        for probe, slot in enumerate(PROBES):
            # A ring stays visible around the rephrases on top of it.
            is_edit = probe == 0
            axes.scatter(
                *points[probe].T, s=70 if is_edit else 16, marker=_MARKERS[slot], label=_NAMES[slot], zorder=2,
                facecolors="none" if is_edit else plots.COLOURS[probe], edgecolors=plots.COLOURS[probe],
            )  # fmt: skip
        axes.set_title(f"{name}\nedit to rephrase: {distance(cloud):.2f} of the spread", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    picture.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return picture
