"""What a whole model leaves as it was: the answers to the pool's own questions, and the perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow

from odedit.data.fields import edit_text, old_answer
from odedit.data.images import ImageError
from odedit.data.pool import Pool
from odedit.errors import InputError
from odedit.evaluation.edited import Edited
from odedit.evaluation.scores import EvaluationConfig
from odedit.inputs.batch import EditRequest, Probe
from odedit.inputs.prompts import Template, find_template
from odedit.runtime.process import configure_process
from odedit.storage.location import at
from pipeline.run_folder import staging
from pipeline.run_folder.workspace import Workspace, read_json, write_json, write_table
from pipeline.workers.compared import Compared
from pipeline.workers.device_errors import unless_out_of_memory
from pipeline.workers.plan import Job, ScoredModel
from pipeline.workers.preparer import write_note

_SCHEMA = pyarrow.schema(
    [
        ("edit_id", pyarrow.string()),
        ("fact", pyarrow.string()),
        ("kept", pyarrow.bool_()),
        ("kept_text", pyarrow.bool_()),
    ]
)
_AT_ONCE = 16
_OWN, _TEXT = "own_loc", "t_loc"

Row = dict[str, Any]


def is_measured(workspace: Workspace, scored: ScoredModel) -> bool:
    """Whether nothing is left to measure."""
    has_kept = workspace.kept.exists() or not workspace.pool.exists()
    return has_kept and (scored.text is None or _measured_text(workspace) == scored.text)


def _measured_text(workspace: Workspace) -> str | None:
    measured = read_json(workspace.text)
    return measured.get("file") if isinstance(measured, dict) else None


def measure(job: Job) -> None:
    """Writes `kept.parquet`, one row per record of the pool that is asked, and `text.json`.

    Raises:
        InputError: A model cannot be loaded, or the text cannot be read.
    """
    scored, config, workspace = job.scored, job.config, job.workspace
    assert scored is not None, "the job names a model"
    configure_process(job.num_threads, job.device)
    warn = partial(write_note, job, "feature-store")
    models = Compared.load(config.backbone, scored, job.device, config.pipeline.feature_store, warn)
    pool = staging.read_pool(workspace, job.sources)
    if pool is not None and not workspace.kept.exists():
        rows = kept_rows(models, pool, scored.edited, find_template(config.data.template))
        write_table(workspace.kept, pyarrow.Table.from_pylist(rows, schema=_SCHEMA))
    if scored.text is not None and _measured_text(workspace) != scored.text:
        before, after, count = models.text_nll(read_text(scored.text))
        figures = {"nll_before": before, "nll_after": after}
        figures |= {f"perplexity_{side}": math.exp(nll) for side, nll in (("before", before), ("after", after))}
        write_json(workspace.text, {"file": scored.text, "tokens": count, **figures})


def read_text(path: str) -> str:
    """Content of a text file. Raises InputError if it cannot be read or holds nothing."""
    try:
        text = at(path, "--text").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text: {path!r} cannot be read as UTF-8 text: {error}.") from error
    if not text.strip():
        raise InputError(f"--text: {path!r} is empty. Name a file with the text whose perplexity is to be measured.")
    return text


def kept_rows(models: Compared, pool: Pool, edited: Edited, template: Template) -> list[Row]:
    """Whether the whole greedy answers to the pool's questions are unchanged.

    Returns:
        A row per record whose own question is not edited: `edit_id`, `fact`, `kept` (its own question) and `kept_text`
        (its text locality question; None if that is edited). Records whose picture cannot be read have none.
    """
    requests = list(_requests(models, pool, edited))
    config = EvaluationConfig(generate=True, mmedit=False)

    def rows(part: list[EditRequest]) -> list[Row]:
        scores = unless_out_of_memory(lambda: models.rows(part, template, config), len(part))
        if scores is None:
            middle = len(part) // 2
            return rows(part[:middle]) + rows(part[middle:])
        return [_row(request, score) for request, score in zip(part, scores, strict=True)]

    return [row for start in range(0, len(requests), _AT_ONCE) for row in rows(requests[start : start + _AT_ONCE])]


def _requests(models: Compared, pool: Pool, edited: Edited) -> Iterator[EditRequest]:
    """The pool's questions that are not edited; their targets only bound the generated answers."""
    for record in pool.records:
        text, fields = edit_text(record.fields, record.task), record.fields
        assert text.image is not None, "every record has an image"
        try:
            picture = models.unedited.processor.process(pool.reader.read(text.image.path, text.image.root))
        except ImageError:
            continue
        target = old_answer(fields) or fields["alt"]
        own = Probe(text.prompt, target, picture, text.is_caption, fields.get("fact"))
        about_text = Probe(fields["loc"], fields["loc_ans"], fact=fields.get("loc_fact"))  # every pool record has it
        if edited.answer_to(own) is None:
            probes = {_OWN: own} | ({_TEXT: about_text} if edited.answer_to(about_text) is None else {})
            yield EditRequest(record.edit_id, own, probes=probes, meta={"fact": own.fact or record.edit_id})


def _row(request: EditRequest, score: dict[str, Any]) -> Row:
    kept, kept_text = (score.get(f"{name}_generated_exact") for name in (_OWN, _TEXT))
    return {
        "edit_id": request.edit_id,
        "fact": request.meta["fact"],
        "kept": kept == 1.0,
        "kept_text": None if kept_text is None else kept_text == 1.0,
    }
