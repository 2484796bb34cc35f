"""Number of forwards of an edit, for every editor and objective, and what reads them.

    python -m tests.benchmarks.forwards [--out DIR]

Model: the embedded BLIP-2, one edit of three steps (MEND has one), and its evaluation. A forward is that of one
sequence. Columns:

- `pictures`: passes of a picture through the image tower. The probes show four: the edit's, its rephrase's and two
  unrelated ones. The others are pictures of the supervision that the objective or the editor reads; of hard negatives,
  whose features are kept for all edits of a worker, none.
- `below`: sequences through the layers below the edit, once: those of the objective and the editor, and the probes.
- `a step`: sequences through the edited layers in one step: the edit, and what the terms of the objective and of the
  editor compare or train. The look at the end, which tells that an edit is learned, is one more.
- `unedited`: sequences through these layers without the edit, once: those whose answers are to stay.
- `probes`: those of the evaluation, before and after the edit. `answers` are the rounds of greedy generation; those
  before the edit fall away in a further run over the same records.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from odedit.backbones.base import Backbone
from odedit.editing.loop import Stopping, edit
from odedit.evaluation.scores import evaluate
from odedit.inputs.batch import stack_params
from tests.benchmarks import speed
from tests.benchmarks.tables import show

EDITORS = ("mend", "wise", "tpatcher", "unike", "ftl", "ftv", "lora")
OBJECTIVES = ("native", "native_kl", "rephrase", "odedit", "contrast")
STEPS = 3


@contextmanager
def counted(backbone: Backbone) -> Iterator[Counter[str]]:
    """Counts sequences and pictures that pass the model inside the block."""
    counts: Counter[str] = Counter()
    kind: Any = type(backbone)
    whole = {name: getattr(kind, name) for name in ("prefix", "suffix", "target_states", "tower")}

    def prefix(self: Backbone, batch: Any, *arguments: Any, **values: Any) -> Any:
        counts["below"] += int(batch.present_EK.sum())
        return whole["prefix"](self, batch, *arguments, **values)

    def suffix(self: Backbone, prefix: Any, *arguments: Any, **values: Any) -> Any:
        hidden = whole["suffix"](self, prefix, *arguments, **values)
        counts["trained" if hidden.requires_grad else "read"] += prefix.shape[0] * prefix.shape[1]
        return hidden

    def target_states(self: Backbone, *arguments: Any, **values: Any) -> Any:
        counts["rounds"] += 1
        return whole["target_states"](self, *arguments, **values)

    def tower(self: Backbone, pixels: torch.Tensor) -> Any:
        counts["pictures"] += len(pixels)
        return whole["tower"](self, pixels)

    replaced = {"prefix": prefix, "suffix": suffix, "target_states": target_states, "tower": tower}
    try:
        for name, function in replaced.items():
            setattr(kind, name, function)
        yield counts
    finally:
        for name, function in whole.items():
            setattr(kind, name, function)


def row_of(bench: speed.Bench, editor_name: str, objective_name: str) -> list[Any]:
    """The counts of one editor and objective."""
    editor, objective = bench.editor(editor_name), bench.objective(objective_name)
    steps = 0 if editor.max_steps == 0 else STEPS
    (request,) = bench.requests(1)
    read = [request] if objective.config.num_negatives else [request.reading(objective.config.reads(editor))]
    bench.encoded(editor, objective, bench.requests(1, 40))  # features of the negatives, kept for all edits
    with counted(bench.backbone) as encoded:
        supervision, evaluation = bench.encoded(editor, objective, read)
    with counted(bench.backbone) as edited:
        stopping = Stopping(max_steps=steps or None, worst_token_nll=1e-9)
        (result,) = edit(bench.backbone, editor, objective, supervision, stopping)
    with counted(bench.backbone) as scored:
        evaluate(bench.backbone, editor, stack_params([result.params]), evaluation)
    looks = steps + 1 if steps else 1
    trained = edited["trained"] // max(1, looks)
    probes = scored["below"]
    return [
        editor_name, objective_name, encoded["pictures"], f"{edited['below']} + {probes}",
        trained, edited["read"] + edited["trained"] - trained * looks, f"{scored['read']}", scored["rounds"],
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/forwards"))
    out: Path = parser.parse_args().out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    bench = speed.Bench("embedded")
    rows = [row_of(bench, editor, objective) for editor in EDITORS for objective in OBJECTIVES]
    titles = ["editor", "objective", "pictures", "below", "a step", "unedited", "probes", "answers"]
    show("Forwards of one edit", titles, rows, out, "forwards")


if __name__ == "__main__":
    main()
