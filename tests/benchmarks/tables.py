"""Output of the benchmarks: a table, a JSON file, a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], out: Path, name: str) -> None:
    """Prints the table and writes `<name>.json`: one object per row."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    Console(width=140).print(table)
    out.mkdir(parents=True, exist_ok=True)
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    (out / f"{name}.json").write_text(json.dumps(objects, indent=2) + "\n", encoding="utf-8")


def bars(title: str, labels: Sequence[str], parts: dict[str, Sequence[float]], unit: str, path: Path) -> None:
    """Writes a plot of stacked horizontal bars, one per label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.45 * len(labels)), layout="constrained")
    left = [0.0] * len(labels)
    for name, values in parts.items():
        axes.barh(labels, values, left=left, label=name)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    if len(parts) > 1:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
