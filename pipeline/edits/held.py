"""Counts the edits of one model that hold, by asking the model each edit's own question again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

from odedit.backbones import Backbone
from odedit.backbones.common.generation import EXTRA_TOKENS
from odedit.data.images import ImageError, ImageReader, image_name
from odedit.data.packed import is_embedded_reference
from odedit.editing.files import EditInfo
from odedit.errors import InputError, StorageError
from odedit.evaluation.scores import answer_text, answers_target, decoded
from odedit.inputs.batch import EditBatch, Picture, Probe
from odedit.inputs.prompts import Template, find_template
from pipeline.edits.answers import Questions

ENOUGH = 0.95
"""Share of held edits below which the user is warned."""
_ASKED_AT_ONCE = 16
_SHOWN = 3


@dataclass(frozen=True)
class Held:
    """Edits that hold and edits that are lost.

    Attributes:
        asked: Number of edits whose question was asked.
        lost: Phrase per lost edit, with answer and target.
        unasked: Reason per edit whose question cannot be asked.
    """

    asked: int
    lost: tuple[str, ...]
    unasked: tuple[str, ...]

    @property
    def is_enough(self) -> bool:
        """Whether 95% of the asked edits hold."""
        return self.asked - len(self.lost) >= ENOUGH * self.asked

    def sentences(self) -> Iterator[str]:
        """Sentences for the user: the counts, and a warning if too few hold."""
        if self.asked:
            hold = "edit holds" if self.asked == 1 else "edits hold"
            yield f"{self.asked - len(self.lost)} of {self.asked} {hold} (whole answers, generated greedily)."
        if not self.is_enough:
            more = f"; {len(self.lost) - _SHOWN} more" if len(self.lost) > _SHOWN else ""
            yield (
                f"Warning: fewer than {ENOUGH:.0%} hold. Edits that share a model change each other's answers, and the "
                f"more there are, the fewer hold. Lost: {'; '.join(self.lost[:_SHOWN])}{more}."
            )
        if self.unasked:
            hold = "1 edit holds" if len(self.unasked) == 1 else f"{len(self.unasked)} edits hold"
            yield f"Whether {hold} is not known: the question cannot be asked. First reason: {self.unasked[0]}"


def ask(
    backbone: Backbone,
    sites: Sequence[str],
    infos: Sequence[EditInfo],
    edited: Callable[[EditBatch], AbstractContextManager[object]],
) -> Held:
    """Asks every edit's own question, with its picture and its prompt template.

    Args:
        sites: Sites of the edits.
        edited: Context manager that applies all edits to the sequences of a batch.
    """
    readers: dict[str, ImageReader] = {}
    lost: list[str] = []
    unasked: list[str] = []
    for template, group in _asked_together(infos):
        questions: list[tuple[EditInfo, Probe]] = []
        for info in group:
            try:
                questions.append((info, Probe(info.prompt, info.target, _picture(info, readers), info.is_caption)))
            except (ImageError, InputError, StorageError) as error:
                unasked.append(str(error))
        if questions:
            lost += _lost(backbone, sites, questions, find_template(template), edited)
    return Held(len(infos) - len(unasked), tuple(lost), tuple(unasked))


def _asked_together(infos: Sequence[EditInfo]) -> Iterator[tuple[str, Sequence[EditInfo]]]:
    """Batches of at most 16 edits of one prompt template."""
    for template, group in groupby(sorted(infos, key=_template_of), key=_template_of):
        edits = list(group)
        for start in range(0, len(edits), _ASKED_AT_ONCE):
            yield template, edits[start : start + _ASKED_AT_ONCE]


def _template_of(info: EditInfo) -> str:
    return info.template


def _picture(info: EditInfo, readers: dict[str, ImageReader]) -> Picture | None:
    """The picture of an edit. Raises ImageError, InputError or StorageError if it is missing or has changed."""
    if info.picture is None:
        raise ImageError(f"the file of {info.edit_id} is of an older version and names no picture.", "unknown picture")
    if not info.picture:
        return None
    if info.image_root not in readers:
        is_packed = is_embedded_reference(info.image)
        readers[info.image_root] = (
            ImageReader(None, pack_root=info.image_root) if is_packed else ImageReader(info.image_root)
        )
    picture = readers[info.image_root].read(info.image)
    if picture.key != info.picture:
        name = image_name(info.image)
        raise ImageError(f"{name} in {info.image_root!r} has changed since the edit.", "other picture")
    return picture


def _lost(
    backbone: Backbone,
    sites: Sequence[str],
    edits: Sequence[tuple[EditInfo, Probe]],
    template: Template,
    edited: Callable[[EditBatch], AbstractContextManager[object]],
) -> list[str]:
    """One phrase per edit whose answer is not its target."""
    targets = [_target(backbone, probe, template) for _, probe in edits]
    longest = [len(target) + EXTRA_TOKENS for target in targets]
    questions = Questions(backbone, sites, [probe for _, probe in edits], longest, template)
    with edited(questions.batch):
        answers = questions.answers()
    return [
        f"{info.edit_id} says {answer_text(backbone, answer)!r} instead of {decoded(backbone, target)!r}"
        for (info, _), target, answer in zip(edits, targets, answers, strict=True)
        if not answers_target(backbone, answer, target)
    ]


def _target(backbone: Backbone, probe: Probe, template: Template) -> list[int]:
    """Tokens of an edit's target."""
    sequence = backbone.sequence(probe, template)
    return list(sequence.tokens[sequence.first_target :])
