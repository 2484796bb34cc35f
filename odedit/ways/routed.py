"""Routed: every edit as it is made alone, and a router learned from the pool that chooses one per prompt, or none.

An edit is removed by dropping its rows, and added by its keys; the others do not change. Differs from plain weights:
the model is served with `odedit.load_edited`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from odedit.backbones.base import Backbone, is_connector
from odedit.editors.base import Editor
from odedit.editors.common.fine_tuning import FineTuning
from odedit.errors import InputError
from odedit.inputs.batch import EditParams, EditRequest
from odedit.inputs.prompts import Template
from odedit.storage.atomic import folder_written_atomically
from odedit.ways.base import Committed, CommittedInfo, Fit, PlainWay, Step, Task, WayConfig
from odedit.ways.common.adapters import RoutedEditor, take
from odedit.ways.common.folder import write as write_folder
from odedit.ways.common.prompt_states import KEY_SLOTS, read_pool, states_of_edits
from odedit.ways.common.router import (
    KEYS,
    THRESHOLD,
    THRESHOLDS,
    Examples,
    RouterConfig,
    Similarities,
    left_out,
    project,
    threshold,
    train,
)

_FEWEST = 16
"""Least number of facts in a pool that a router can be learned from."""
_STEPS_PER_REPORT = 20

Learned = tuple[EditParams, dict[str, list[float]]]
"""A router's weights and threshold, and the curves of its training."""


@dataclass(frozen=True)
class RoutedConfig(WayConfig, RouterConfig):
    """Settings of routing.

    Attributes:
        key: Site whose input at the last prompt position the router reads; every edited site lies at or above it.
        negatives: Similar pictures per pool record about which its question is asked, to train the router.
        stored: Type to which the edits' tensors are rounded, and in which they are stored for serving.
    """

    key: str = "layers.25%.ffn.in"
    negatives: Annotated[int, Ge(1)] = 12
    stored: Literal["float32", "float16"] = "float16"


class Routed(PlainWay):
    """Single edits side by side, and the parameters of their router (`router.*`)."""

    Config: ClassVar[type] = RoutedConfig
    # Chosen on the validation split of the embedded world. The weight of locality is small: the router keeps unrelated
    # prompts from the edits.
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "editor": {
            "name": "lora",
            "rank": 1,
            "sites": ("layers.25%.ffn.in", "layers.25%.ffn.out"),
        },
        "objective": {"name": "contrast", "locality_weight": 0.3},
        "stopping": {"max_steps": 150, "worst_token_nll": 0.05},
        "supervision": {"rephrases": 4},
    }
    uses_edits: ClassVar[bool] = True
    needs_pool: ClassVar[bool] = True

    def check(self, editor: Editor, name: str) -> None:
        if not isinstance(editor, FineTuning) or any(is_connector(site) for site in editor.config.sites):
            raise InputError(
                f"commit.way: 'routed' puts edits of the text model's matrices side by side (editor.name lora or ftl), "
                f"which those of {name!r} with these settings are not; choose editor.name=lora, or another commit.way."
            )

    def serving(self, editor: Editor) -> RoutedEditor:
        self.check(editor, type(editor).__name__)
        assert isinstance(editor, FineTuning)
        return RoutedEditor(editor, self.config.key)

    def write(self, folder: Path, backbone: Backbone, editor: Editor, params: EditParams, info: CommittedInfo) -> None:
        """The edits' tensors and the router, for `odedit.load_edited`."""
        with folder_written_atomically(folder) as partial:
            write_folder(partial, params, info)

    def commit(self, task: Task) -> Generator[Step, None, Committed]:
        """With the router and the edits of `task.start`, if that has a router, instead of a new one."""
        self.serving(task.editor).check(task.backbone)
        if task.start is not None and KEYS in task.start:
            return Committed(self._changed(task, task.start), self._fits(task))
        if task.edits is None:
            raise InputError("commit.way: 'routed' needs the finished edits of the records, and got none.")
        router, curves = yield from self._learned(task)
        params = self.with_added(task.backbone, router, task.edits, task.requests, task.template)
        return Committed(params, self._fits(task), curves)

    def _fits(self, task: Task) -> dict[str, Fit]:
        return {request.edit_id: Fit(0, "routed") for request in task.requests}

    def _changed(self, task: Task, start: EditParams) -> EditParams:
        """Parameters of an earlier model without its removed edits and with the new ones, in the records' order."""
        wanted = {request.edit_id: request for request in task.requests}
        rows = [row for row, edit_id in enumerate(task.start_ids) if edit_id in wanted]
        kept = [task.start_ids[row] for row in rows]
        params = take(start, rows)
        new = [request for edit_id, request in wanted.items() if edit_id not in set(kept)]
        if new:
            assert task.edits is not None, "the run makes the new edits first"
            params = self.with_added(task.backbone, params, task.edits, new, task.template)
        row_of = {edit_id: row for row, edit_id in enumerate([*kept, *(request.edit_id for request in new)])}
        return take(params, [row_of[edit_id] for edit_id in wanted])

    def with_added(
        self,
        backbone: Backbone,
        params: EditParams,
        edits: EditParams,
        requests: Sequence[EditRequest],
        template: Template,
    ) -> EditParams:
        """A committed model with further edits; its router does not change.

        Args:
            params: The committed model, or a router alone.
            edits: Finished edits in the order of `requests`, stacked.
        """
        states_NKD = states_of_edits(backbone, self.config.key, requests, template)
        cpu = {name: value.detach().cpu() for name, value in params.items()}
        added = {name: self._rounded(value.detach().cpu()) for name, value in edits.items()}
        added[KEYS] = project(cpu, states_NKD)
        added[THRESHOLDS] = cpu[THRESHOLD].expand(len(requests)).clone()
        return cpu | {name: torch.cat([cpu[name], value]) if name in cpu else value for name, value in added.items()}

    def _rounded(self, value: Tensor) -> Tensor:
        return value.to(getattr(torch, self.config.stored)).float()

    def _learned(self, task: Task) -> Generator[Step, None, Learned]:
        """A router from the pool; yields `Step`, returns weights and threshold, and curves."""
        examples = None
        total = len(task.pool) + 3 * self.config.steps
        reading = read_pool(task.backbone, self.config.key, task.pool, task.template, self.config.negatives)
        for done in reading if task.pool else ():
            if isinstance(done, Examples):
                examples = done
            else:
                yield Step(done, total)
        num_facts = 0 if examples is None else len(examples.fact_N[examples.records()].unique())
        if examples is None or num_facts < _FEWEST:
            raise InputError(
                f"data.pool: 'routed' learns its router from other records, at least {_FEWEST} of different facts, "
                f"and got {len(task.pool)} records of {num_facts}; give a file of other records, such as the training "
                "file."
            )
        return (yield from self._trained(examples.to(task.backbone.device), task.seed, len(task.pool), total))

    def _trained(self, examples: Examples, seed: int, done: int, total: int) -> Generator[Step, None, Learned]:
        everything = torch.arange(len(examples.fact_N), device=examples.fact_N.device)
        halves = _halves(examples.fact_N[examples.records()], seed)
        curves: dict[str, list[float]] = {"loss": []}
        similarities: list[Similarities] = []
        weights: EditParams = {}
        for held_out in (*halves, None):
            records = everything if held_out is None else examples.without_facts_of(held_out)
            for step, made in enumerate(train(examples, records, self.config, seed)):
                if isinstance(made, dict):
                    weights = made
                elif step % _STEPS_PER_REPORT == 0:
                    yield Step(done + step, total, {"loss": made})
                    if held_out is None:
                        curves["loss"].append(made)
            done += self.config.steps
            if held_out is not None:
                similarities.append(left_out(examples, held_out, weights, KEY_SLOTS))
        chosen, shares = threshold(similarities, self.config.false_firing_weight)
        curves |= {name: [value] for name, value in {"threshold": chosen, **shares}.items()}
        router = {name: value.cpu() for name, value in weights.items()}
        yield Step(total, total, {"threshold": chosen, **shares})
        return router | {THRESHOLD: torch.tensor([chosen])}, curves


def _halves(fact_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two sets of records without a common fact."""
    drawn = torch.randperm(int(fact_N.max()) + 1, generator=torch.Generator().manual_seed(seed))
    is_first_N = torch.isin(fact_N, drawn[::2].to(fact_N.device))
    return is_first_N.nonzero().squeeze(1), (~is_first_N).nonzero().squeeze(1)


WAY = Routed
