"""The generic backbone beside the named families, on the embedded models: figures and time.

    python -m tests.benchmarks.auto --edits 24

Prints the largest difference of any figure of any edit, and the ratio of the times of rounds that take turns.
"""

from __future__ import annotations

import argparse
import time

import torch

from odedit import Objective, ObjectiveConfig, Stopping, edit, evaluate, load_backbone, load_editor, stack_params, world
from odedit.backbones import encode_requests
from tests.support.requests import TEMPLATE, make_request

FAMILIES = ("blip2", "minigpt4", "llava")
METHODS = {"ftl": ("native", {"learning_rate": 1e-3}), "wise": ("odedit", {"site": "layers.2.ffn.out"})}
STEPS = 10
Figures = dict[tuple[str, str], float]


def main(num_edits: int, rounds: int, families: list[str]) -> None:
    torch.set_num_threads(1)
    for family in families:
        path = str(world.checkpoint_path(family))
        models = {name: load_backbone(name, path) for name in (family, "auto")}
        for name, (objective, settings) in METHODS.items():
            seconds: dict[str, list[float]] = {kind: [] for kind in models}
            figures: dict[str, Figures] = {}
            for _ in range(rounds):
                for kind, model in models.items():
                    started = time.process_time()
                    figures[kind] = scored(model, name, settings, objective, num_edits)
                    seconds[kind].append(time.process_time() - started)
            least = {kind: min(times) for kind, times in seconds.items()}
            print(
                f"{family}, {name}, {objective}: {len(figures['auto'])} figures, largest difference "
                f"{difference(*figures.values()):.1e}; {1000 * least[family] / num_edits:.0f} ms per edit, "
                f"auto / {family} = {least['auto'] / least[family]:.2f}",
                flush=True,
            )


def scored(model: object, name: str, settings: dict[str, object], objective: str, num_edits: int) -> Figures:
    """Figures of edits by edit and column, from pictures on."""
    editor = load_editor(name, settings)
    requests = [make_request(number) for number in range(num_edits)]
    supervision, evaluation = encode_requests(model, requests, TEMPLATE, editor.sites)
    config = ObjectiveConfig(name=objective, **({} if objective == "native" else {"sigma2_0": 1.0}))
    results = edit(model, editor, Objective(config), supervision, Stopping(max_steps=STEPS))
    rows = evaluate(model, editor, stack_params([result.params for result in results]), evaluation)
    figures: Figures = {}
    for result, row in zip(results, rows, strict=True):
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        losses = {f"last {key}": values[-1] for key, values in result.curves.items()}
        figures |= {(result.edit_id, key): float(value) for key, value in (numbers | losses).items()}
    return figures


def difference(first: Figures, second: Figures) -> float:
    """Largest difference of a figure; infinity if there are others."""
    if first.keys() != second.keys():
        return float("inf")
    return max(abs(value - second[key]) for key, value in first.items() if value == value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    given = parser.parse_args()
    main(given.edits, given.rounds, given.families)
