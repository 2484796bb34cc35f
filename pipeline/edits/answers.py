"""Questions to a model, with and without edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from odedit.backbones import Backbone, current, is_connector, load_backbone, names
from odedit.backbones.base import ends_of
from odedit.backbones.common.generation import generate, until_end
from odedit.data.images import ImageError, ImageReader
from odedit.editing.files import EditInfo
from odedit.editors.base import Editor
from odedit.errors import InputError
from odedit.evaluation.scores import decoded
from odedit.inputs.batch import EditParams, Picture, Probe
from odedit.inputs.prompts import Template, find_template
from odedit.runtime.addresses import masked
from odedit.runtime.kv_cache import KVCache

_PLACEHOLDER = "x"


class Questions:
    """A batch of questions, answered greedily by the model with the currently applied edits.

    Attributes:
        batch: One edit per question, with one sequence each.
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
            sites: Sites of the edits.
            probes: Questions; their targets are ignored.
            max_tokens: Longest answer to each question, in tokens.

        Raises:
            InputError: A question is longer than the model's context.
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
        """Generated tokens per question, `max_tokens` of them; those after the answer's end are included."""
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
    """Greedy answers to a question without edits and with all edits."""
    questions = Questions(backbone, editor.sites, [question], [max_tokens], find_template(template))
    (before,) = questions.answers()
    with editor.together(backbone, params, questions.batch):
        (after,) = questions.answers()
    return _first_line(backbone, before), _first_line(backbone, after)


def _first_line(backbone: Backbone, tokens: Sequence[int]) -> str:
    """First line of an answer. Models trained on line-separated text go on with further lines."""
    answer, _ = until_end(tokens, ends_of(backbone))
    return decoded(backbone, answer).split("\n")[0].strip()


def read_picture(image: Path) -> Picture:
    """Reads a picture. Raises ImageError if it cannot be read."""
    path = image.expanduser().resolve()
    if not path.exists():
        raise ImageError(f"there is no file {str(image)!r}.", "image not found")
    return ImageReader(str(path.parent)).read(path.name)


def load_backbone_of(
    edit: EditInfo, checkpoint: str | None = None, *, dtype: str = "float32", device: str = "cpu"
) -> Backbone:
    """Loads the model that an edit was made for, or another checkpoint of its family.

    Raises:
        InputError: The edit's family is not built in.
    """
    from transformers.utils import logging

    family, size = current(edit.family, edit.image_size)
    if family not in names():
        # A dotted name would import a module that an untrusted file chose.
        raise InputError(
            f"edit {masked(edit.edit_id)!r}: unknown model family {family!r}; known: {', '.join(names())}."
        )
    logging.disable_progress_bar()
    return load_backbone(family, checkpoint or edit.checkpoint, dtype=dtype, device=device, image_size=size)
