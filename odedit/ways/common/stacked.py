"""Finished edits side by side: those of an earlier model and new ones."""

from __future__ import annotations

import torch

from odedit.inputs.batch import EditParams, stack_params
from odedit.ways.base import Task


def edits_of(task: Task) -> EditParams:
    """The edits of a task's records on the CPU, in their order: rows of the earlier model, or finished edits."""
    row_of = {edit_id: row for row, edit_id in enumerate(task.start_ids)} if task.start is not None else {}
    # An earlier model is read onto the job's device, finished edits onto the CPU.
    parts = [{name: value.cpu() for name, value in part.items()} for part in (task.start, task.edits) if part]
    order, new = [], len(row_of)
    for request in task.requests:
        order.append(row_of.get(request.edit_id, new))
        new += request.edit_id not in row_of
    index = torch.tensor(order)
    return {name: value[index] for name, value in stack_params(parts).items()}
