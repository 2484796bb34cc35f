"""t-SNE of the hidden states of edits and their rephrases, before and after the edits (the paper's Fig. 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from odedit.backbones import encode_requests, load_backbone
from odedit.editing.files import load_edits
from odedit.errors import InputError
from odedit.evaluation.columns import METRICS
from odedit.evaluation.statistics import MAIN
from odedit.inputs.batch import RELIABILITY, EditBatch
from odedit.inputs.prompts import find_template
from pipeline.config.run import from_dict, read_yaml
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows, staging
from pipeline.run_folder.sources import resolve
from pipeline.study import plots
from pipeline.study.spec import Arm, StudyConfig
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Preparer

_SHOWN = (RELIABILITY, *(name for name in MAIN if name.endswith("_gen")))
_MARKERS = dict(zip(_SHOWN, "os^Dvp", strict=False))
_NAMES = {name: METRICS[name].prompt for name in _SHOWN}
_SEED = 0


def draw(study: StudyConfig, every: Sequence[Arm], outcomes: Sequence[Outcome], console: Console) -> bytes:
    """A PNG with a panel before the edits and one after those of each arm, all in one embedding."""
    clouds: dict[str, np.ndarray] = {}
    for arm, outcome in zip(every, outcomes, strict=True):
        console.print(f"Hidden states of {arm.name}", highlight=False)
        before, after = _states(outcome)
        clouds.setdefault("before", before)
        clouds[arm.name] = after
    return plots.to_png(_picture(clouds))


def _states(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states that predict the first answer token, [probes, edits, hidden], without and with the edits.

    Raises:
        InputError: The run did not keep its edits.
    """
    config = from_dict(read_yaml(outcome.workspace.config))
    model = config.backbone
    backbone = load_backbone(model.family, model.checkpoint, dtype=model.dtype, image_size=model.image_size)
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []
    job = Job(config, resolve(config.data, config.out, config.supervision.rephrases), outcome.workspace)
    prepare = Preparer(job)
    staged = staging.read_staged(outcome.workspace.records)
    edited = {
        row["edit_id"]
        for row in rows.read_rows(rows.parts(outcome.workspace), ("edit_id", "status"))
        if row["status"] == rows.EDITED
    }
    for group in range(len(staged.usable)):
        requests = [request for request in prepare(group).requests if request.edit_id in edited]
        paths = [outcome.workspace.edit(request.edit_id) for request in requests]
        if not all(path.exists() for path in paths):
            raise InputError("settings.keep_edits: this picture is made from the edits; set it to true.")
        if not requests:
            continue
        editor, params, _ = load_edits(paths, backbone)
        _, batch = encode_requests(backbone, requests, find_template(config.data.template), editor.sites)
        batch = batch.select(_SHOWN)
        with torch.no_grad():
            before.append(_first_token(backbone, editor, batch))
            with editor.applied(backbone, params, batch):
                after.append(_first_token(backbone, editor, batch))
    return np.concatenate(before, axis=1), np.concatenate(after, axis=1)


def _first_token(backbone: Any, editor: Any, batch: EditBatch) -> np.ndarray:
    states_EKD = backbone.suffix(backbone.prefix(batch, *editor.sites), batch.predict_EKT)[:, :, 0]
    return np.asarray(states_EKD.float().transpose(0, 1).cpu())


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
        for probe, slot in enumerate(_SHOWN):
            # A ring stays visible around the rephrases on top of it.
            is_edit = probe == 0
            axes.scatter(
                *points[probe].T, s=70 if is_edit else 16, marker=_MARKERS[slot], label=_NAMES[slot], zorder=2,
                facecolors="none" if is_edit else plots.COLOURS[probe], edgecolors=plots.COLOURS[probe],
            )  # fmt: skip
        axes.set_title(f"{name}\nedit to rephrase: {_distance(cloud):.2f} of the spread", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    picture.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return picture


def _distance(cloud: np.ndarray) -> float:
    """Mean distance between an edit and its rephrases, divided by that between edits; NaN for a single edit."""
    edit, rephrases = cloud[0], cloud[1:]
    to_rephrases = np.linalg.norm(rephrases - edit, axis=-1).mean()
    pairs = np.linalg.norm(edit[:, None] - edit[None], axis=-1)
    count = len(edit)
    return float(to_rephrases / (pairs.sum() / (count * (count - 1)))) if count > 1 else math.nan
