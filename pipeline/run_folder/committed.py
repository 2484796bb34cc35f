"""Edits of a committed model: `edits.json` in the model's folder, made from the rows of its run.

| in `out` | |
|---|---|
| `committed.safetensors` | parameters, see `odedit.ways.common.files` |
| `model/` | what people serve: a Hugging Face checkpoint, or adapters and router; `edits.json`, `README.md` |
| `adapter/` | PEFT adapter, of LoRA only |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from odedit.backbones import can_inspect, inspect_backbone
from odedit.data.fields import edit_text
from odedit.errors import InputError
from odedit.evaluation.columns import BEFORE, column
from odedit.evaluation.statistics import MAIN
from odedit.inputs.plain import PlainUse
from odedit.runtime.addresses import masked, shareable
from odedit.storage.location import Location
from odedit.ways.common.files import CommittedInfo, read_committed_info
from pipeline.run_folder.rows import EDITED, FIXED_COLUMNS, SKIPPED, Row, parts, read_rows
from pipeline.run_folder.workspace import Workspace, read_json, write_json

MODEL, EDITS = "model", "edits.json"
SINGLE = "single"
"""Folder in `out` of the single edits that a model is made from."""
SINGLE_RECORDS = f"{SINGLE}.jsonl"
"""File in `out` of their records, where these are not all those of `data.path`."""
FORMAT = "odedit-model-1"
_HOLDS = (column("rel", "generated_exact"), column("rel", "exact"))
_COPIED = ("edit_id", "status", "error", "fact", "file", "index", "task", "prompt", "target")
_NO_SCORES = ("peak_bytes", "rephrase_distance")
Entry = dict[str, Any]


def is_plain(model: Location) -> bool:
    """Whether a model's folder is a Hugging Face checkpoint, which needs no odedit."""
    return (model / "config.json").exists()


def plain_use(info: CommittedInfo) -> PlainUse | None:
    """How transformers alone asks the model; None if its family does not say.

    Raises:
        InputError: The unedited model's configuration or tokenizer cannot be read.
    """
    if not can_inspect(info.family):
        return None
    backbone: Any = inspect_backbone(info.family, info.checkpoint, dtype=info.dtype, image_size=info.image_size)
    use: PlainUse | None = getattr(backbone, "plain_use", lambda: None)()
    return use


def write_edits(workspace: Workspace) -> Location:
    """Writes `model/edits.json`, the model's metadata and an entry per edit in the order of the records; returns it.

    The unedited model of a plain checkpoint is named without its folder, which is that of this machine.
    """
    model = workspace.model
    info = read_committed_info(workspace.committed)
    details = {name: value for name, value in info.details.items() if name not in ("edits", "tables")}
    values = asdict(info) | {"details": details}
    if is_plain(model):
        values = shareable_values(values)
    write_json(model / EDITS, {"format": FORMAT, "info": values, "edits": list(entries(workspace))})
    return model / EDITS


def shareable_values(value: Any) -> Any:
    """A copy of nested lists and mappings with `shareable` applied to every text."""
    if isinstance(value, Mapping):
        return {key: shareable_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shareable_values(item) for item in value]
    return shareable(value) if isinstance(value, str) else value


def read_edits(model: Location) -> list[Entry]:
    """The entries in the folder of a model, or in `model/` of its run.

    Raises:
        InputError: There are none, or they are damaged.
    """
    for file in (model / EDITS, model / MODEL / EDITS):
        if file.exists():
            values = read_json(file)
            if not isinstance(values, dict) or values.get("format") != FORMAT or not _are_entries(values.get("edits")):
                raise InputError(f"{masked(file.text)} is damaged, or no list of edits.")
            return list(values["edits"])
    raise InputError(
        f"{masked(model.text)}: no {EDITS} there, nor in {MODEL}/; expected the folder of a committed model, or of the "
        "run that wrote it."
    )


def _are_entries(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(entry, dict) and {*_COPIED, "holds", "scores"} <= entry.keys() for entry in values
    )


def entries(workspace: Workspace) -> Iterator[Entry]:
    """One entry per row that is not skipped; see `entry`."""
    images = dict(_images(workspace))
    for row in read_rows(parts(workspace)):
        if row["status"] != SKIPPED:
            yield entry(row, images.get(row["edit_id"]))


def entry(row: Row, image: str | None) -> Entry:
    """Entry of an edit in `edits.json`: the record, the answers, `holds` and `scores`.

    `holds` is true if the model's greedy answer is the new one, or, in a run without generation, if all its tokens are
    first choices.

    Args:
        image: Picture of the question, as the record names it.
    """
    measured = [row[name] for name in _HOLDS if row.get(name) is not None]
    return {name: row.get(name) for name in _COPIED} | {
        "image": image,
        "answer_before": row.get("answer_before"),
        "answer_after": row.get("answer_after"),
        "holds": bool(row["status"] == EDITED and measured and measured[0] == 1.0),
        "scores": {name: value for name, value in row.items() if _is_score(name, value)},
    }


def _is_score(name: str, value: Any) -> bool:
    is_probe = name in MAIN or (name not in FIXED_COLUMNS and name not in _NO_SCORES)
    return is_probe and isinstance(value, float) and value == value and not name.endswith(f"_{BEFORE}")


def _images(workspace: Workspace) -> Iterator[tuple[str, str]]:
    """Edit id and picture of the usable records that have one."""
    for row in read_rows([workspace.records], ("edit_id", "task", "problem", "fields")):
        image = None if row["problem"] else edit_text(json.loads(row["fields"]), row["task"]).image
        if image is not None:
            yield row["edit_id"], masked(image.path)


def mean_score(listed: Entry) -> float:
    """Mean of the main scores of an entry; 0 without scores."""
    values = [listed["scores"][name] for name in MAIN if name in listed["scores"]]
    return sum(values) / len(values) if values else 0.0


def worst_first(listed: Sequence[Entry]) -> list[Entry]:
    """Edits that do not hold first, then by their mean score."""
    return sorted(listed, key=lambda each: (each["holds"], mean_score(each)))
