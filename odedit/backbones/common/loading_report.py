"""The library's report of differences between a checkpoint's weights and the model, as one error message."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

from odedit.errors import InputError

_SHOWN = 3


@dataclass(frozen=True)
class LoadingReport:
    """How a checkpoint's weights and its model differ.

    Attributes:
        model_class: Class of the model.
        num_expected: Number of tensors of the model.
        missing: Names that only the model has, without tied and computed tensors.
        unexpected: Names that only the checkpoint has.
        shapes: Tensors with different shapes, in words.
        prefix: Prefix of all names in the checkpoint without which the weights would fit; empty if there is none.
    """

    model_class: str
    num_expected: int
    missing: frozenset[str]
    unexpected: frozenset[str]
    shapes: tuple[str, ...]
    prefix: str = ""

    @classmethod
    def of(cls, report: Mapping[str, Any], model: Any) -> LoadingReport:
        """Reads the library's `output_loading_info`."""
        shapes = (
            f"{name} {_shape(got)} instead of {_shape(wanted)}" for name, got, wanted in report["mismatched_keys"]
        )
        return cls(
            type(model).__name__,
            len(model.state_dict()),
            frozenset(report["missing_keys"]),
            frozenset(report["unexpected_keys"]),
            tuple(shapes),
        )

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.shapes)

    def check(self, checkpoint: str) -> None:
        """Raises InputError unless the weights are exactly those of the model."""
        if self.fits:
            return
        parts = [
            (f"{_tensors(self.missing)} of {self.num_expected} missing", self.missing),
            (f"{_tensors(self.unexpected)} unexpected", self.unexpected),
            (f"{_tensors(self.shapes)} of another shape", self.shapes),
        ]
        problems = "; ".join(f"{text} ({_first(names)})" for text, names in parts if names)
        raise InputError(
            f"backbone.checkpoint {checkpoint!r}: the weights do not fit the {self.model_class} that config.json "
            f"describes: {problems}. {self._cause()}"
        )

    def _cause(self) -> str:
        """The probable cause and the remedy, as a sentence."""
        if any(".lora_" in name or ".base_layer." in name for name in self.unexpected):
            return (
                "An adapter was probably saved with its model: merge it first, such as with merge_and_unload of peft."
            )
        if self.prefix:
            return (
                f"Every name begins with {self.prefix!r}, which a wrapper around the model (peft, DataParallel, "
                "torch.compile) leaves: save the model inside it with save_pretrained."
            )
        if self.missing and not self.unexpected:
            return (
                "The checkpoint was probably saved or downloaded in part, or config.json is another model's: fetch all "
                "of it again."
            )
        return "config.json and the weights are probably of different models: fetch both from the same place."


def shared_prefixes(names: Collection[str]) -> list[str]:
    """Prefixes up to a dot that all names share, the shortest first.

    >>> shared_prefixes(["a.b.c", "a.b.d"])
    ['a.', 'a.b.']
    """
    # In sorted order, a prefix of the first and last name is a prefix of all.
    first, last = (end(names).split(".")[:-1] for end in (min, max))
    shared = [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    return [f"{prefix}." for prefix in accumulate(shared, lambda prefix, part: f"{prefix}.{part}")]


def _tensors(names: Sized) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def _first(names: Iterable[str]) -> str:
    """The first few names, in natural order of the numbers in them."""
    ordered = sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in _split(name)])
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")


def _split(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "a single number"
