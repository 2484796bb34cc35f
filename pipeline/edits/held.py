"""Which of the edits that share a model hold there: each is asked its own question again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

from odedit.backbones import Backbone
from odedit.backbones.common.generation import LONGEST_REST
from odedit.data.images import ImageError, ImageReader, image_name
from odedit.data.packed import is_pack_reference
from odedit.editing.files import EditInfo
from odedit.errors import InputError, StorageError
from odedit.evaluation.scores import in_words, is_said, said
from odedit.inputs.batch import EditBatch, Picture, Probe
from odedit.inputs.prompts import Template, find_template
from pipeline.edits.answers import Questions

ENOUGH = 0.95
"""Share of the edits below which the user is warned."""
_ASKED_AT_ONCE = 16
_SHOWN = 3


@dataclass(frozen=True)
class Held:
    """What became of the edits.

    Attributes:
        asked: Number of edits whose question was asked.
        lost: A phrase for each of them that was answered otherwise.
        unasked: A reason for each edit whose question cannot be asked.
    """

    asked: int
    lost: tuple[str, ...]
    unasked: tuple[str, ...]

    @property
    def is_enough(self) -> bool:
        """Whether as many hold as a user may expect."""
        return self.asked - len(self.lost) >= ENOUGH * self.asked

    def sentences(self) -> Iterator[str]:
        """What the user is told."""
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
    """Asks every edit's own question, with its picture, in the prompt template that it was made with.

    Args:
        sites: What the edits change.
        edited: Inside, the model has all edits, for the sequences of a batch.
    """
    readers: dict[str, ImageReader] = {}
    lost: list[str] = []
    unasked: list[str] = []
    for template, group in _asked_together(infos):
        kept: list[tuple[EditInfo, Probe]] = []
        for info in group:
            try:
                kept.append((info, Probe(info.prompt, info.target, _picture(info, readers), info.is_caption)))
            except (ImageError, InputError, StorageError) as error:
                unasked.append(str(error))
        if kept:
            lost += _lost(backbone, sites, kept, find_template(template), edited)
    return Held(len(infos) - len(unasked), tuple(lost), tuple(unasked))


def _asked_together(infos: Sequence[EditInfo]) -> Iterator[tuple[str, Sequence[EditInfo]]]:
    """Edits of one prompt template, so many that their questions fit into a batch."""
    for template, group in groupby(sorted(infos, key=_template_of), key=_template_of):
        edits = list(group)
        for start in range(0, len(edits), _ASKED_AT_ONCE):
            yield template, edits[start : start + _ASKED_AT_ONCE]


def _template_of(info: EditInfo) -> str:
    return info.template


def _picture(info: EditInfo, readers: dict[str, ImageReader]) -> Picture | None:
    """The picture of an edit. Raises ImageError, InputError or StorageError if it is not to be had."""
    if info.picture is None:
        raise ImageError(f"the file of {info.edit_id} is of an older version and names no picture.", "unknown picture")
    if not info.picture:
        return None
    if info.image_root not in readers:
        is_packed = is_pack_reference(info.image)
        readers[info.image_root] = (
            ImageReader(None, pack_root=info.image_root) if is_packed else ImageReader(info.image_root)
        )
    picture = readers[info.image_root].read(info.image)
    if picture.key != info.picture:
        raise ImageError(f"{image_name(info.image)} in {info.image_root!r} is another one now.", "other picture")
    return picture


def _lost(
    backbone: Backbone,
    sites: Sequence[str],
    asked: Sequence[tuple[EditInfo, Probe]],
    template: Template,
    edited: Callable[[EditBatch], AbstractContextManager[object]],
) -> list[str]:
    """A phrase for each edit that is answered otherwise."""
    targets = [_target(backbone, probe, template) for _, probe in asked]
    longest = [len(target) + LONGEST_REST for target in targets]
    questions = Questions(backbone, sites, [probe for _, probe in asked], longest, template)
    with edited(questions.batch):
        answers = questions.answers()
    return [
        f"{info.edit_id} says {said(backbone, answer)!r} instead of {in_words(backbone, target)!r}"
        for (info, _), target, answer in zip(asked, targets, answers, strict=True)
        if not is_said(backbone, answer, target)
    ]


def _target(backbone: Backbone, probe: Probe, template: Template) -> list[int]:
    """The tokens of an edit's answer."""
    sequence = backbone.sequence(probe, template)
    return list(sequence.tokens[sequence.first_target :])
