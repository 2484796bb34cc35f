"""The outputs of an edit: its result row and its file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from safetensors import SafetensorError

from odedit.data.fields import edit_text
from odedit.data.origins import Wanted, origins
from odedit.data.packed import is_embedded_reference
from odedit.data.records import RawRecord
from odedit.data.supervision import Supervision
from odedit.editing.curves import EditResult
from odedit.editing.files import EditInfo, save_edit
from odedit.inputs.batch import EditRequest
from odedit.runtime.addresses import masked
from pipeline.run_folder.rows import EDITED, FAILED, Row, base_row
from pipeline.workers.plan import Job
from pipeline.workers.preparer import located


def edit_row(job: Job, record: RawRecord, result: EditResult) -> Row:
    """The row of an edit, without its scores."""
    error = None if result.error is None else located(record, result.error)
    multipliers = result.curves.get("lambda", [])
    return base_row(record, job.config, FAILED if error else EDITED, error) | {
        "steps": result.steps,
        "stop_reason": result.stop_reason,
        "seconds": result.seconds,
        "worst_nll": result.curves["worst_nll"][-1],
        "lambda": multipliers[-1] if multipliers else None,
        "penalty_steps": sum(value > 0 for value in multipliers),
        "losses": result.curves,
    }


def origin_columns(record: RawRecord, supervision: Supervision, wanted: Wanted) -> Row:
    """Columns that say which supervision was given, by the record or by a pool of records, and which was made."""
    found = origins(record, supervision, wanted)
    return {"supervision_given": ", ".join((*found.given, *found.drawn)), "supervision_made": found.made_text()}


def save(
    job: Job, record: RawRecord, request: EditRequest, result: EditResult, score: dict[str, Any], fingerprint: str
) -> None:
    """Writes the file of an edit.

    Args:
        score: Columns of the evaluation, stored beside the weights without the answers to all probes.
        fingerprint: Fingerprint of the unedited model.

    Raises:
        OSError: The file cannot be written.
    """
    config, sources = job.config, job.sources
    picture, image = request.edit.picture, edit_text(record.fields, record.task).image
    root = sources.path if image is not None and is_embedded_reference(image.path) else sources.image_root
    info = EditInfo(
        edit_id=record.edit_id,
        editor=config.editor.name,
        editor_config=asdict(config.editor.settings),
        family=config.backbone.family,
        checkpoint=config.backbone.checkpoint,
        fingerprint=fingerprint,
        template=config.data.template,
        prompt=request.edit.prompt,
        target=request.edit.target,
        metrics={name: value for name, value in score.items() if name != "answers"},
        is_caption=request.edit.is_caption,
        picture="" if picture is None else picture.key,
        image="" if image is None else image.path,
        image_root=masked(root or ""),
        image_size=config.backbone.image_size,
    )
    try:
        save_edit(job.workspace.edit(record.edit_id), result.params, info)
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(f"edit {record.edit_id} cannot be saved: {error}") from error
