"""Sequential: lifelong editing, one record after another, each on top of the model that the earlier ones have left.

The editor says how its edits follow one another (`odedit.editors.base.Continuing`); the loop is that of single edits,
with one record at a time. The locality of an objective is measured against the unedited model throughout.

An edit costs the same wherever it stands in the sequence. Earlier records are read again only after the numbers of
edits in `retention`, when every edit so far is scored: how much of it is left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from odedit.backbones.base import Backbone
from odedit.editing.loop import Start, edit
from odedit.editing.widened import can_widen, export_widened
from odedit.editors.base import Continuing, Editor, Mergeable, Widening
from odedit.errors import InputError
from odedit.evaluation.columns import METRICS, PARTS, column
from odedit.evaluation.edited import Edited
from odedit.evaluation.readout import UneditedAnswers
from odedit.inputs.batch import EditParams, EditRequest, is_locality
from odedit.runtime.brief import brief
from odedit.storage.atomic import folder_written_atomically
from odedit.storage.location import Location
from odedit.storage.tensors import read_tensors, write_tensors
from odedit.ways.base import Committed, CommittedInfo, Fit, PlainWay, Step, Task, WayConfig
from odedit.ways.common.folder import write_parameters
from odedit.ways.common.single_edits import edited_by, scores_on, supervision_of

_CHECKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
RETENTION = "retention_"
"""Beginning of the names of the curves with the mean scores of the checks."""
TABLES = ("sequence", "retention")
"""Names of the tables beside the results."""
SCORED = (*METRICS, column("rel", "exact"), *PARTS)
"""Scores of the tables, as in the rows of results."""
_SAVE_EVERY_S = 10.0
"""Least time between two writings of the state: the parameters of some editors are gigabytes."""


@dataclass(frozen=True)
class SequentialConfig(WayConfig):
    """Settings of lifelong editing.

    Attributes:
        retention: Numbers of edits after which every edit so far is scored again; none with `[]`.
        multiplier: Network of a learned multiplier (objective `odedit`): `kept` from edit to edit, or `reset` to its
            draw before each.
    """

    retention: tuple[Annotated[int, Ge(1)], ...] = _CHECKS
    multiplier: Literal["kept", "reset"] = "kept"

    def __post_init__(self) -> None:
        object.__setattr__(self, "retention", tuple(self.retention))
        super().__post_init__()


@dataclass(frozen=True)
class _State:
    """A sequence between two edits.

    Attributes:
        model: Parameters of the model, for `Editor.together`; {} before the first edit.
        delta: Weights of the multiplier network after the last edit.
        edit_ids: Records in the model, in order.
        fits, problems: How records were learned, and reasons per record that is not in the model, by edit id.
        edits, retention: Rows of the tables of these names, see `Sequential`.
    """

    model: EditParams
    delta: EditParams = field(default_factory=dict)
    edit_ids: tuple[str, ...] = ()
    fits: Mapping[str, Fit] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    edits: tuple[Mapping[str, Any], ...] = ()
    retention: tuple[Mapping[str, Any], ...] = ()

    __repr__ = brief


class Sequential(PlainWay):
    """Edits that follow one another, in the order of the records.

    Tables beside the model:
        sequence: A row per edit, scored when it was made: `position` from 1, `edit_id`, `steps`, `stop_reason`,
            `seconds`, scores against the unedited model, and for locality `<score>_step` against the model just before.
        retention: A row per edit and check: number of `edits` in the model, `position`, `edit_id`, and scores.
    """

    Config: ClassVar[type] = SequentialConfig
    makes_edits: ClassVar[bool] = True
    can_remove: ClassVar[bool] = False
    # Chosen on the validation split of the embedded world: neurons that earlier edits keep for themselves forget least.
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "editor": {"name": "tpatcher"},
        "objective": {"name": "contrast", "own_weight": 1.0},
        "stopping": {"max_steps": 200, "worst_token_nll": 0.3},
        "supervision": {"rephrases": 4},
    }

    def check(self, editor: Editor, name: str) -> None:
        if not isinstance(editor, Continuing):
            raise InputError(
                f"editor.name: got {name!r}, whose edits cannot follow one another in one model, which commit.way "
                "'sequential' needs; use one of the package's editors, or another way."
            )

    def write(self, folder: Path, backbone: Backbone, editor: Editor, params: EditParams, info: CommittedInfo) -> None:
        """A checkpoint, if weights or a wider network can hold the edits; else parameters for `odedit.load_edited`."""
        if isinstance(editor, Mergeable):
            super().write(folder, backbone, editor, params, info)
            return
        if isinstance(editor, Widening) and can_widen(backbone):
            export_widened(backbone, editor.neurons(backbone, params), folder)
            return
        with folder_written_atomically(folder) as partial:
            write_parameters(partial, params, info)

    def commit(self, task: Task) -> Generator[Step, None, Committed]:
        sequence = _Sequence(self.config, task)
        state, saved = sequence.begin(), time.monotonic()
        total = len(task.requests)
        for number, request in enumerate(task.requests, start=1):
            if request.edit_id in state.edit_ids or request.edit_id in state.problems:
                continue
            state = sequence.edited(state, request)
            is_check = len(state.edit_ids) in self.config.retention and request.edit_id in state.edit_ids
            if is_check:
                yield Step(number, total, doing="scoring earlier edits")
                state = sequence.checked(state)
            if is_check or time.monotonic() - saved >= _SAVE_EVERY_S:
                sequence.save(state)
                saved = time.monotonic()
            fit = state.fits.get(request.edit_id)
            figures = {} if fit is None or fit.worst_nll is None else {"worst_nll": fit.worst_nll}
            yield Step(number, total, figures, doing="editing")
        if not state.edit_ids:
            first = next(iter(state.problems.values()), "there is none.")
            raise InputError(f"data.path: no record can be edited; first: {first}")
        return Committed(
            state.model,
            state.fits,
            _curves(state.retention),
            state.problems,
            tables=dict(zip(TABLES, (state.edits, state.retention), strict=True)),
            carried=state.delta,
        )


class _Sequence:
    """Edits and checks of one sequence; the state is passed from edit to edit."""

    def __init__(self, config: SequentialConfig, task: Task) -> None:
        assert isinstance(task.editor, Continuing), "refused by `Sequential.check`"
        self._config, self._task = config, task
        self._editor: Continuing = task.editor
        self._backbone = task.backbone
        self._changed, self._known = Edited(), UneditedAnswers()
        self._number = {request.edit_id: number for number, request in enumerate(task.requests)}
        task.editor.check(task.backbone)

    def begin(self) -> _State:
        """The stored state, or that of the model that is changed, or the unedited model."""
        task = self._task
        if task.state is not None and task.state.exists():
            state = _read_state(task.state, str(self._backbone.device))
        else:
            state = _State({}) if task.start is None else self._of_model(task.start)
        self._changed = edited_by(task.requests[self._number[each]] for each in state.edit_ids if each in self._number)
        return state

    def _of_model(self, model: EditParams) -> _State:
        task, details = self._task, self._task.start_details
        tables = details.get("tables", {})
        return _State(
            _aligned(model),
            _aligned(task.carried),
            tuple(task.start_ids),
            {edit_id: Fit(**fit) for edit_id, fit in details.get("fits", {}).items()},
            {},
            tuple(tables.get("sequence", ())),
            tuple(tables.get("retention", ())),
        )

    def edited(self, state: _State, request: EditRequest) -> _State:
        """The state with a further edit, or with the reason why it could not be made."""
        started = time.perf_counter()
        try:
            supervision = supervision_of(self._task, request)
        except (InputError, ValueError) as error:
            return replace(state, problems={**state.problems, request.edit_id: str(error)})
        editor = self._editor.following(state.model)
        delta = state.delta if self._config.multiplier == "kept" else {}
        (result,) = edit(
            self._backbone,
            editor,
            self._task.objective,
            supervision,
            self._task.stopping,
            self._task.seed,
            results_on=self._backbone.device,
            start=Start(editor.start(self._backbone), delta),
        )
        if result.error is not None:
            return replace(state, problems={**state.problems, request.edit_id: result.error})
        model = editor.extended(self._backbone, result.params)
        seconds = time.perf_counter() - started
        self._changed = self._changed.with_later(edited_by([request]))
        edit_ids = (*state.edit_ids, request.edit_id)
        fit = Fit(result.steps, result.stop_reason, result.curves["worst_nll"][-1])
        row = {
            "position": len(edit_ids), "edit_id": request.edit_id, "steps": fit.steps, "stop_reason": fit.stop_reason,
            "seconds": seconds, **self._scores_of_edit(state.model, model, request.edit_id),
        }  # fmt: skip
        return replace(
            state,
            model=model,
            delta=result.delta,
            edit_ids=edit_ids,
            fits={**state.fits, request.edit_id: fit},
            edits=(*state.edits, row),
        )

    def _scores_of_edit(self, before: EditParams, model: EditParams, edit_id: str) -> dict[str, float]:
        """Scores of the last edit, and its locality against the model before it."""
        (scores,) = self._scores(model, [edit_id])
        (since,) = self._scores(model, [edit_id], before) if before else (scores,)
        return scores | {f"{name}_step": value for name, value in since.items() if is_locality(name)}

    def checked(self, state: _State) -> _State:
        """The state with a check: every edit that is in the model and among the records is scored again."""
        positions = {edit_id: position for position, edit_id in enumerate(state.edit_ids, 1) if edit_id in self._number}
        scores = self._scores(state.model, list(positions))
        rows = [
            {"edits": len(state.edit_ids), "position": position, "edit_id": edit_id, **score}
            for (edit_id, position), score in zip(positions.items(), scores, strict=True)
        ]
        return replace(state, retention=(*state.retention, *rows))

    def _scores(
        self, model: EditParams, edit_ids: Sequence[str], before: EditParams | None = None
    ) -> list[dict[str, float]]:
        """Scores of some of the model's edits; `before` as of `scores_on`."""
        requests = [self._task.requests[self._number[each]] for each in edit_ids]
        rows = scores_on(self._task, model, requests, self._changed, self._known, before)
        return [{name: row[name] for name in SCORED if name in row} for row in rows]

    def save(self, state: _State) -> None:
        """Writes the state of the unfinished sequence."""
        if self._task.state is not None:
            _write_state(self._task.state, state)


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Means of each check by score, of scores that every check has, and the number of edits as `step`."""
    checks: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        checks.setdefault(row["edits"], []).append(row)
    in_every_check = [{name for row in of_one for name in row} for of_one in checks.values()]
    names = [name for name in SCORED if all(name in known for known in in_every_check)]
    curves = {RETENTION + name: [_mean(of_one, name) for of_one in checks.values()] for name in names}
    return {"step": [float(edits) for edits in checks], **curves} if checks else {}


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return float(sum(values) / len(values))


def _aligned(params: EditParams) -> EditParams:
    """Copies, whose memory has the alignment of other tensors: sums over memory of another differ in the last bit."""
    return {name: value.clone() for name, value in params.items()}


def _write_state(location: Location, state: _State) -> None:
    groups = {"model": state.model, "delta": state.delta}
    tensors = {f"{group}/{name}": value for group, params in groups.items() for name, value in params.items()}
    info = {
        "edit_ids": state.edit_ids,
        "fits": {edit_id: asdict(fit) for edit_id, fit in state.fits.items()},
        "problems": dict(state.problems),
        "edits": state.edits,
        "retention": state.retention,
    }
    # Copies: tensors that share memory cannot be stored.
    write_tensors(location, _aligned(tensors), {"info": json.dumps(info)})


def _read_state(location: Location, device: str) -> _State:
    tensors, metadata = read_tensors(location, device)
    info = json.loads(metadata["info"])
    groups: dict[str, EditParams] = {"model": {}, "delta": {}}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups[group][name] = value.clone()
    return _State(
        groups["model"],
        groups["delta"],
        tuple(info["edit_ids"]),
        {edit_id: Fit(**fit) for edit_id, fit in info["fits"].items()},
        info["problems"],
        tuple(info["edits"]),
        tuple(info["retention"]),
    )


WAY = Sequential
