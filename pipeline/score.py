"""`odedit score`: the records of a configuration on one whole model, against the unedited model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from odedit.backbones import Backbone, can_inspect, fingerprint, inspect_backbone
from odedit.errors import InputError
from odedit.ways.common.files import CommittedInfo, read_committed_info, serving_editor
from pipeline.commands import check_any, check_given, show_outcome, show_plan
from pipeline.config.run import BackboneConfig, RunConfig, from_dict, load
from pipeline.driver.preflight import prepare, preview
from pipeline.driver.run import announce, score_into
from pipeline.run_folder import staging
from pipeline.run_folder.contradictions import edited_by
from pipeline.run_folder.lock import alone
from pipeline.run_folder.sources import absolute
from pipeline.workers.compared import check_alike
from pipeline.workers.kept import read_text
from pipeline.workers.plan import ScoredModel

CHECKPOINT, COMMITTED, MODEL = "config.json", "committed.safetensors", "model"


@dataclass(frozen=True)
class ModelFolder:
    """A model that was found and checked.

    Attributes:
        checkpoint: Folder or hub id of a checkpoint; None: `committed` is scored.
        committed: File of the committed model; None if there is none.
        info: Metadata of `committed`.
        weights: Fingerprint of what is scored.
    """

    checkpoint: str | None
    committed: str | None
    info: CommittedInfo | None
    weights: str

    @property
    def identity(self) -> Mapping[str, str]:
        """What the scores depend on besides the configuration."""
        return {"model.weights": self.weights}

    @property
    def edit_ids(self) -> Collection[str] | None:
        """Ids of the records in the model; None if unknown."""
        return frozenset(self.info.edit_ids) if self.info is not None and self.info.edit_ids else None

    def scored(self, name: str, text: str | None) -> ScoredModel:
        """The model as workers load it, without what its records edit."""
        editor = "checkpoint" if self.info is None else self.info.editor
        columns = {"model": name, "editor": editor, "objective": "none", "supervision": "none"}
        if self.info is not None:
            columns["objective"] = f"way {self.info.way}"
        committed = self.committed if self.checkpoint is None else None
        return ScoredModel(self.checkpoint, committed, columns=columns, text=text)


def score(
    model: str, path: Path | None, overrides: Sequence[str], text: str | None, *, dry_run: bool, fresh: bool
) -> None:
    """`odedit score`."""
    check_given(path, overrides)
    given = load(path, overrides)
    config = without_method(given)
    added = [] if given.commit is None else [absolute(file) for file in given.commit.settings.add]
    if text is not None:
        text = absolute(text)
        read_text(text)
    found = find_model(model, config.backbone)
    errors = Console(stderr=True)
    if dry_run:
        show_plan(preview(config, fresh=fresh, identity=found.identity, added=added), config, edits=False)
        print(f"# model: {found.checkpoint or found.committed}")
        return
    with alone(config.out, "out"):
        ready = prepare(config, fresh=fresh, identity=found.identity, added=added)
        announce(ready, errors)
        records = staging.usable_records(ready.workspace.records)
        edited = edited_by(records, ready.sources.reader, found.edit_ids)
        outcome = score_into(ready, errors, replace(found.scored(model, text), edited=edited))
    show_outcome(outcome, f"model {model}", "results/, kept.parquet")
    check_any(outcome)


def without_method(config: RunConfig) -> RunConfig:
    """The configuration without editor, objective, way and files of edits, none of which a score depends on."""
    bare = from_dict({"editor": {"name": "ftl"}, "objective": {"name": "native"}})
    return replace(
        config, editor=bare.editor, objective=bare.objective, stopping=bare.stopping, training=bare.training,
        commit=None, keep_edits=False,
    )  # fmt: skip


def find_model(text: str, backbone: BackboneConfig) -> ModelFolder:
    """Finds a checkpoint or a committed model, and checks it against the unedited model without loading weights.

    Args:
        text: Folder of a checkpoint or of a committed model, `out` of a run of `odedit commit`, or a hub id.
        backbone: The unedited model.

    Raises:
        InputError: There is no such model, or it does not fit the unedited one.
    """
    folder = Path(text).expanduser()
    if not folder.is_dir():
        if folder.exists() or not _may_be_hub_id(text):
            raise InputError(f"model {text!r}: there is no such folder. {_EXPECTED}")
        return _checkpoint(text, None, backbone)
    folder = folder.absolute()
    files = [at / COMMITTED for at in (folder, *([folder.parent] if folder.name == MODEL else []))]
    committed = next((str(file) for file in files if file.is_file()), None)
    for checkpoint in (folder, folder / MODEL):
        if (checkpoint / CHECKPOINT).is_file():
            return _checkpoint(str(checkpoint), committed, backbone)
    if committed is None:
        raise InputError(f"model {text!r}: the folder holds neither {CHECKPOINT} nor {COMMITTED}. {_EXPECTED}")
    info = read_committed_info(committed)
    unedited = _inspected(backbone)
    if unedited is not None:
        serving_editor(info, unedited)
    with open(committed, "rb") as stream:
        return ModelFolder(None, committed, info, hashlib.file_digest(stream, "sha256").hexdigest()[:24])


_EXPECTED = "Give the folder of a checkpoint, or the folder (out) of a run of `odedit commit`."


def _may_be_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def _checkpoint(text: str, committed: str | None, backbone: BackboneConfig) -> ModelFolder:
    unedited = _inspected(backbone)
    other = replace(backbone, checkpoint=text)
    try:
        edited = _inspected(other)
        if unedited is not None and edited is not None:
            check_alike(unedited, edited)
        weights = fingerprint(other.family, other.checkpoint, dtype=other.dtype)
    except InputError as error:
        raise InputError(str(error).replace(f"backbone.checkpoint {text!r}", f"model {text!r}")) from error
    info = None if committed is None else read_committed_info(committed)
    return ModelFolder(text, committed, info, weights)


def _inspected(backbone: BackboneConfig) -> Backbone | None:
    """The model without weights; None for a family from outside the package that does not offer it."""
    if not can_inspect(backbone.family):
        return None
    return inspect_backbone(backbone.family, backbone.checkpoint, dtype=backbone.dtype)
