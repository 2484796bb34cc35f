"""Asks a model questions, as it is and with edits applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from odedit.backbones import Backbone, is_connector, load_backbone, names
from odedit.backbones.base import ends_of
from odedit.backbones.common.generation import generate, until_end
from odedit.data.images import ImageError, ImageReader
from odedit.editing.files import EditInfo
from odedit.editors.base import Editor
from odedit.errors import InputError
from odedit.evaluation.scores import in_words
from odedit.inputs.batch import EditParams, Picture, Probe
from odedit.inputs.prompts import Template, find_template
from odedit.runtime.addresses import masked
from odedit.runtime.kv_cache import KVCache

_PLACEHOLDER = "x"


class Questions:
    """Questions that are asked together, and answered greedily under whatever edits are applied then.

    Attributes:
        batch: One row for each question, in one sequence.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: Backbone,
        sites: Sequence[str],
        probes: Sequence[Probe],
        max_tokens: Sequence[int],
        template: Template,
    ) -> None:
        """
        Args:
            sites: What the edits change.
            probes: Their targets are not looked at.
            max_tokens: Longest answer to each.

        Raises:
            InputError: A question has more tokens than the model takes.
        """
        before = any(is_connector(site) for site in sites)
        pictures = [probe.picture for probe in probes if probe.picture is not None]
        features = backbone.image_features(pictures, before)
        grid = [[Probe(probe.prompt, _PLACEHOLDER, probe.picture, probe.is_caption)] for probe in probes]
        ids = [f"question-{number}" for number in range(len(grid))]
        self.batch = backbone.encode(ids, ["rel"], grid, features, template, before)
        self._backbone, self._max_tokens = backbone, tuple(max_tokens)
        self._kv_cache = KVCache()
        self._prefix = backbone.prefix(self.batch, *sites, kv_cache=self._kv_cache)

    @torch.no_grad()
    def answers(self) -> list[list[int]]:
        """The tokens that the model generates now for each question: to the answer's end and beyond, or its longest."""
        backbone, kv_cache = self._backbone, self._kv_cache.branch()
        read_EKT = self.batch.with_room(1, 0, backbone.max_positions).predict_EKT
        first_EKT = backbone.head(backbone.suffix(self._prefix, read_EKT, kv_cache)).argmax(dim=-1)
        longest = max(self._max_tokens)
        tokens_EKT = generate(backbone, self.batch, self._prefix, kv_cache, first_EKT, longest)
        rows = zip(tokens_EKT[:, 0].tolist(), self._max_tokens, strict=True)
        return [tokens[:count] for tokens, count in rows]


def before_and_after(
    backbone: Backbone, editor: Editor, params: EditParams, template: str, question: Probe, max_tokens: int
) -> tuple[str, str]:
    """The greedy answers without and with all edits."""
    questions = Questions(backbone, editor.sites, [question], [max_tokens], find_template(template))
    (before,) = questions.answers()
    with editor.together(backbone, params, questions.batch):
        (after,) = questions.answers()
    return _without_further_lines(backbone, before), _without_further_lines(backbone, after)


def _without_further_lines(backbone: Backbone, tokens: Sequence[int]) -> str:
    """The first line of an answer: a model that was trained on lines goes on with others before it ends."""
    answer, _ = until_end(tokens, ends_of(backbone))
    return in_words(backbone, answer).split("\n")[0].strip()


def read_picture(image: Path) -> Picture:
    """Raises ImageError if the picture cannot be read."""
    path = image.expanduser().resolve()
    if not path.exists():
        raise ImageError(f"there is no file {str(image)!r}.", "image not found")
    return ImageReader(str(path.parent)).read(path.name)


def load_backbone_of(
    edit: EditInfo, checkpoint: str | None = None, *, dtype: str = "float32", device: str = "cpu"
) -> Backbone:
    """The model that an edit was made for, or another checkpoint of its family.

    Raises:
        InputError: The edit names a family that is not one of the package's.
    """
    from transformers.utils import logging

    if edit.family not in names():
        # A dotted name would import whatever module the file asks for.
        raise InputError(
            f"edit {masked(edit.edit_id)!r}: unknown model family {edit.family!r}; known: {', '.join(names())}."
        )
    logging.disable_progress_bar()
    return load_backbone(edit.family, checkpoint or edit.checkpoint, dtype=dtype, device=device)
