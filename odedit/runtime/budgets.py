"""How much of something is computed at a time, by kind of device: the one table of such limits.

On a CPU most of them keep intermediate results inside a core's cache; on a GPU they keep the device busy and its
memory bounded. They change speed and memory; results differ by rounding at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Budgets:
    """Limits of one kind of device.

    Attributes:
        tower_pixels: Pixel values that pass the image tower together.
        prefix_positions: Positions that pass the layers below an edit together; one sequence always does.
        spared_positions: Padded positions that splitting off the short sequences must save: a second batch launches
            every kernel again.
        evaluated_values: Hidden values of the edits that are scored together; None: no limit.
        evaluated_logits: Logits that evaluation computes at a time. On a CPU a larger result gets new pages.
        objective_logits: Logits that an objective computes at a time where it does not keep them.
        risk_logits: Logits that the token risks work on together.
        sketched_weights: Weights that are sorted into the buckets of a sketch at a time.
        slack_values: Values that an objective may save for backward beyond those of the native loss.
        slack_head_values: The limit instead of `slack_values` for a step that is mostly products with the head, which
            on a CPU wait for its weights if rows are few.
        graph_weights: Largest edits, in weights, for which a CUDA graph may double a step's buffers.
        busy_flops: FLOPs of a step above which its fixed overhead is negligible.
    """

    tower_pixels: int
    prefix_positions: int
    spared_positions: int
    evaluated_values: int | None
    evaluated_logits: int
    objective_logits: int
    risk_logits: int
    sketched_weights: int
    slack_values: int
    slack_head_values: int
    graph_weights: int
    busy_flops: float


BUDGETS = {
    "cpu": Budgets(
        tower_pixels=2**20,
        prefix_positions=1024,
        spared_positions=0,
        evaluated_values=2**21,
        evaluated_logits=3 * 2**21,
        objective_logits=2**21,
        risk_logits=2**18,
        sketched_weights=2**18,
        slack_values=2**22,
        slack_head_values=2**23,
        graph_weights=2**22,
        busy_flops=8e9,
    ),
    "cuda": Budgets(
        tower_pixels=2**26,
        prefix_positions=2**14,
        spared_positions=2**13,
        evaluated_values=None,
        evaluated_logits=2**26,
        objective_logits=2**26,
        risk_logits=2**26,
        sketched_weights=2**24,
        slack_values=2**26,
        slack_head_values=2**26,
        graph_weights=2**28,
        busy_flops=4e12,
    ),
}


def budgets(device: torch.device) -> Budgets:
    """The limits of a device; those of CUDA for a kind that the table lacks."""
    return BUDGETS.get(device.type, BUDGETS["cuda"])
