"""Asks a model a question, as it is and with edits applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from odedit.addresses import masked
from odedit.backbones import Backbone, Prefix, is_connector, load_backbone, names
from odedit.checkpoint import load_edit, load_edits
from odedit.edits import EditBatch, Probe
from odedit.errors import InputError
from odedit.images import ImageError, ImageReader
from odedit.key_values import KeyValues
from odedit.locations import Place
from odedit.metrics import generate, until_end
from odedit.prompts import find_template

_PLACEHOLDER = "x"


@torch.no_grad()
def answers(
    edits: Sequence[Place],
    prompt: str,
    image: Path | None = None,
    *,
    caption: bool = False,
    checkpoint: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    max_tokens: int = 8,
) -> tuple[str, str]:
    """The greedy answers before and after.

    Args:
        edits: Edit files; several are applied together.
        checkpoint: Instead of the one that the edits name.

    Raises:
        InputError: An edit cannot be read, or belongs to another model.
        ImageError: The picture cannot be read.
    """
    picture = None
    if image is not None:
        path = image.expanduser().resolve()
        if not path.exists():
            raise ImageError(f"there is no file {str(image)!r}.", "image not found")
        picture = ImageReader(str(path.parent)).read(path.name)
    backbone = load_backbone_of(edits[0], checkpoint, dtype=dtype, device=device)
    editor, params, infos = load_edits(edits, backbone, device)
    probe = Probe(prompt, _PLACEHOLDER, picture, caption)
    before = any(is_connector(site) for site in editor.sites)
    features = backbone.image_features([picture] if picture else [], before)
    batch = backbone.encode(["question"], ["rel"], [[probe]], features, find_template(infos[0].template), before)

    memory = KeyValues()
    prefix = backbone.prefix(batch, *editor.sites, memory=memory)
    unedited = _generate(backbone, batch, prefix, memory.branch(), max_tokens)
    with editor.together(backbone, params, batch):
        return unedited, _generate(backbone, batch, prefix, memory, max_tokens)


def load_backbone_of(
    edit: Place, checkpoint: str | None = None, *, dtype: str = "float32", device: str = "cpu"
) -> Backbone:
    """The model that an edit file was made for, or another checkpoint of its family.

    Raises:
        InputError: The file names a family that is not one of the package's.
    """
    from transformers.utils import logging

    _, info = load_edit(edit)
    if info.family not in names():
        # A dotted name would import whatever module the file asks for.
        raise InputError(
            f"edit {masked(str(edit))!r}: unknown model family {info.family!r}; known: {', '.join(names())}."
        )
    logging.disable_progress_bar()
    return load_backbone(info.family, checkpoint or info.checkpoint, dtype=dtype, device=device)


def _generate(backbone: Backbone, batch: EditBatch, prefix: Prefix, memory: KeyValues, max_tokens: int) -> str:
    """The greedy answer in place of the target; stops at its end."""
    read_EKT = batch.with_room(1, 0, backbone.max_positions).predict_EKT
    first_EKT = backbone.head(backbone.suffix(prefix, read_EKT, memory)).argmax(dim=-1)
    generated = generate(backbone, batch, prefix, memory, first_EKT, max_tokens)
    tokens, _ = until_end(generated[0, 0, :max_tokens].tolist(), backbone.ends)
    return str(backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip().split("\n")[0]
