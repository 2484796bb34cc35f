"""The contract of a way: how the records of a run become one model.

A way is one file that defines `WAY`, a class built from its frozen `Config`. Its result is a set of parameters that an
editor applies with `Editor.together`: one shared difference (joint training), or all edits side by side with what
chooses among them (routing).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from odedit.backbones.base import Backbone
from odedit.data.negatives import NegativePool
from odedit.editing.loop import Stopping
from odedit.editing.merging import export
from odedit.editors.base import Editor
from odedit.inputs.batch import EditParams, EditRequest
from odedit.inputs.prompts import Template
from odedit.objectives.base import Objective
from odedit.runtime.brief import brief
from odedit.settings import Settings
from odedit.storage.location import Location
from odedit.ways.common.activations import Moments


@dataclass(frozen=True)
class WayConfig(Settings):
    """Settings of every way.

    Attributes:
        on_conflict: Treatment of records that give one question different answers: `refuse` ends the command before
            any work, `first` and `last` keep the first or the last of them.
        remove: Ids of records that do not go into the model.
        add: Further files of records, whose pictures are files in the same folders.
        start: Folder of a run of `odedit commit` that this one changes: its edits are kept, or training starts from its
            model; null: from the unedited model.
    """

    on_conflict: Literal["refuse", "first", "last"] = "refuse"
    remove: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    start: str | None = None

    def __post_init__(self) -> None:
        for name in ("remove", "add"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()


@dataclass(frozen=True)
class Task:
    """Inputs of a way on one worker.

    Attributes:
        backbone: The unedited model.
        template: Prompt template of the run.
        editor: Editor of the run.
        objective: Objective of the run, calibrated.
        requests: Records to commit. With several workers each has its own share, see `odedit.runtime.parallel`.
        pool: Requests of the pool, with their probes; the same on every worker, possibly empty.
        seed: Seed of the run.
        edits: Finished edits, stacked, of the `requests` that are not in `start_ids`, in their order; None if there
            are none, and for a way that uses none.
        start: Parameters of the model that is changed; None: there is none.
        start_ids: Records in that model, in the order of its `CommittedInfo.edit_ids`.
        start_details: `CommittedInfo.details` of that model.
        carried: `Committed.carried` of that model.
        removed: Records of that model that the new one is to answer as the unedited model does.
        state: File of the state of unfinished work; None: none is kept.
        moments: Second moments of unedited activations at the way's `measured_sites`; None: not measured.
        stopping: When a single edit stops, for a way that makes edits.
        negatives: Hard negatives of the objective, for a way that makes edits; None: it uses none.
    """

    backbone: Backbone
    template: Template
    editor: Editor
    objective: Objective
    requests: Sequence[EditRequest]
    pool: Sequence[EditRequest] = ()
    seed: int = 0
    edits: EditParams | None = None
    start: EditParams | None = None
    start_ids: Sequence[str] = ()
    start_details: Mapping[str, Any] = field(default_factory=dict)
    carried: EditParams = field(default_factory=dict)
    removed: Sequence[EditRequest] = ()
    state: Location | None = None
    moments: Moments | None = None
    stopping: Stopping = field(default_factory=Stopping)
    negatives: NegativePool | None = None

    __repr__ = brief


@dataclass(frozen=True)
class Step:
    """Progress of a way.

    Attributes:
        number, total: Steps taken, and the largest number of steps.
        figures: Figures of the step by name: losses, the worst token's NLL.
        doing: The work that the steps are of, in words.
    """

    number: int
    total: int
    figures: Mapping[str, float] = field(default_factory=dict)
    doing: str = "training"


@dataclass(frozen=True)
class Fit:
    """How a record was learned.

    Attributes:
        steps: Steps in which the record was trained.
        stop_reason: Reason for which training ended.
        worst_nll: Largest NLL among the answer's tokens at the end; None: not measured.
    """

    steps: int
    stop_reason: str
    worst_nll: float | None = None


@dataclass(frozen=True)
class Committed:
    """Result of a way.

    Attributes:
        params: Parameters of the model, for `Way.serving(editor).together`.
        fits: How each of the worker's records was learned, by edit id.
        curves: Figures of the training by name, one value per step that reports.
        problems: Reason per record that is not in the model, by edit id.
        tables: Rows of tables that are written beside the model, by name.
        carried: Further tensors with which a model that is changed later goes on.
    """

    params: EditParams
    fits: Mapping[str, Fit] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    carried: EditParams = field(default_factory=dict)

    __repr__ = brief


@dataclass(frozen=True)
class CommittedInfo:
    """Metadata of a committed model.

    Attributes:
        way, way_config: Name and settings of the way.
        editor, editor_config: Name and settings of the editor whose parameters they are.
        family, checkpoint, fingerprint, dtype: Backbone that they belong to.
        template: Prompt template of training and scoring.
        edit_ids: Records in the model, in the order of the parameters' first axis where that is the edit.
        details: Further values of JSON that describe the model.
        image_size: Width and height to which pictures were resized first; None: not resized.
    """

    way: str
    way_config: dict[str, Any]
    editor: str
    editor_config: dict[str, Any]
    family: str
    checkpoint: str
    fingerprint: str
    dtype: str
    template: str
    edit_ids: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None


class Way(Protocol):
    """A way of committing records to one model.

    Attributes:
        Config: Frozen dataclass of settings, a `WayConfig`.
        defaults: Sections of the run's configuration (`editor`, `objective`, `stopping`) that replace their defaults.
            Settings that the user gives come before them; a section that names another plug-in has none of them.
        uses_edits: True when the way takes finished single edits. The run makes them first, unless they are given.
        makes_edits: True when the way makes single edits itself, as `odedit.editing.loop` does.
        can_remove: True when records can be taken out of a model.
        needs_pool: True when the way cannot work without records of a pool.
        is_parallel: True when several workers may share one task.
        measures: True when the way reads second moments of unedited activations at its `measured_sites`. The run
            measures them first.
    """

    Config: ClassVar[type]
    config: Any
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]]
    uses_edits: ClassVar[bool]
    makes_edits: ClassVar[bool]
    can_remove: ClassVar[bool]
    needs_pool: ClassVar[bool]
    is_parallel: ClassVar[bool]
    measures: ClassVar[bool]

    def __init__(self, config: Any) -> None: ...

    def check(self, editor: Editor, name: str) -> None:
        """Raises InputError if the way cannot use the editor of this name."""
        ...

    def serving(self, editor: Editor) -> Editor:
        """The editor that applies `Committed.params` with `together`."""
        ...

    def measured_sites(self, backbone: Backbone, editor: Editor) -> tuple[str, ...]:
        """Sites whose inputs are measured, the lowest first; empty unless `measures`."""
        ...

    def write(self, folder: Path, backbone: Backbone, editor: Editor, params: EditParams, info: CommittedInfo) -> None:
        """Writes the model that people serve to a new folder, atomically.

        A folder with `config.json` is a checkpoint that needs no odedit.

        Args:
            editor: Result of `serving`.
            info: Metadata of the parameters.
        """
        ...

    def commit(self, task: Task) -> Generator[Step, None, Committed]:
        """Makes the model: a generator that yields its progress and returns `Committed`.

        Raises:
            InputError: The records, the pool or the settings do not allow it.
        """
        ...


class PlainWay:
    """Base class with the defaults of most ways."""

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    uses_edits: ClassVar[bool] = False
    makes_edits: ClassVar[bool] = False
    can_remove: ClassVar[bool] = True
    needs_pool: ClassVar[bool] = False
    is_parallel: ClassVar[bool] = False
    measures: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, editor: Editor, name: str) -> None:
        return None

    def serving(self, editor: Editor) -> Editor:
        return editor

    def measured_sites(self, backbone: Backbone, editor: Editor) -> tuple[str, ...]:
        return ()

    def write(self, folder: Path, backbone: Backbone, editor: Editor, params: EditParams, info: CommittedInfo) -> None:
        """A checkpoint with the parameters in its weights, which needs no odedit."""
        export(backbone, editor, params, folder)
