"""A committed model for questions: plain weights, or parameters that an editor applies to the unedited model.

model = load_edited("runs/commit/model")
model.answer("seven.png", "who owns this digit?")
model.generate(**processor(images=picture, text=prompt, return_tensors="pt"), max_new_tokens=10)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from odedit import backbones
from odedit.backbones.base import Backbone, ends_of
from odedit.backbones.common.generation import generate, until_end
from odedit.data.images import ImageReader
from odedit.editors.base import Editor
from odedit.errors import InputError
from odedit.evaluation.scores import decoded
from odedit.inputs.batch import EditBatch, EditParams, Picture, Probe
from odedit.inputs.prompts import Template, find_template
from odedit.runtime.kv_cache import KVCache
from odedit.ways.common import folder as folders
from odedit.ways.common.adapters import Positions, RoutedEditor
from odedit.ways.common.files import serving_editor

_PLACEHOLDER = "x"
_UNSUPPORTED = ("assistant_model", "prefill_chunk_size", "prompt_lookup_num_tokens")
"""Settings of generation under which the first forward is not the whole prompt."""


def load_edited(folder: Path | str, device: str = "cpu", dtype: str | None = None) -> EditedModel:
    """Loads a model that `odedit commit` wrote, or any checkpoint of a supported family.

    Args:
        folder: Folder of the model. One that is no checkpoint names the unedited one, which is loaded from its place.
        device: Torch device such as `cpu` or `cuda:0`.
        dtype: `float32`, `bfloat16` or `float16`; None: the type of the run, or of the checkpoint's `config.json`.

    Raises:
        InputError: A file is missing or damaged, the family is unknown, or the unedited checkpoint has changed.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"{str(folder)!r}: no such folder; `odedit commit` writes one, OUT/model.")
    is_routed, has_info = (path / folders.ROUTER).is_file(), (path / folders.EDITS).is_file()
    is_plain = not is_routed and not (path / folders.PARAMETERS).is_file()
    info = folders.read_edits(path)[0] if has_info or not is_plain else None
    template = find_template(info.template if info else "mmedit")
    if is_plain:
        family, stored = _family(path)
        made, size = (None, None) if info is None else backbones.current(info.family, info.image_size)
        if made == GENERIC:
            family = GENERIC
        return EditedModel(_loaded(family, str(path), device, dtype or stored, size), template)
    assert info is not None
    family, size = backbones.current(info.family, info.image_size)
    if family not in backbones.names():
        # A dotted name would import a module that the file chose.
        raise InputError(f"{str(folder)!r}: unknown model family {family!r}; known: {_known()}.")
    backbone = _loaded(family, info.checkpoint, device, dtype or info.dtype, size)
    params, info = (folders.read if is_routed else folders.read_parameters)(path, str(backbone.device))
    return EditedModel(backbone, template, serving_editor(info, backbone), params)


GENERIC = "auto"
"""Family of models that no other family reads."""


def _loaded(family: str, checkpoint: str, device: str, dtype: str, image_size: int | None) -> Backbone:
    from transformers.utils import logging

    logging.disable_progress_bar()
    return backbones.load_backbone(family, checkpoint, dtype=dtype, device=device, image_size=image_size)


def _known() -> str:
    return ", ".join(backbones.names())


def _family(path: Path) -> tuple[str, str]:
    """Family of a checkpoint folder, and the type of its weights."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind, text = config["model_type"], (config.get("text_config") or {}).get("model_type")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} is neither a routed model ({folders.ROUTER}) nor a checkpoint with a readable config.json "
            f"({type(error).__name__}: {error})."
        ) from error
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    for family in backbones.names():
        architecture = backbones.find(family).architecture
        if kind == architecture.model_type and text in architecture.text_types:
            return family, stored
    return GENERIC, stored


class EditedModel:
    """A committed model.

    Attributes:
        backbone: The model; with plain weights the edited one, else the unedited one.
        template: Prompt template around the questions of `answer`.
        editor: Editor that applies `params`; None: plain weights.
        params: Parameters that the editor applies; None: plain weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        template: Template,
        editor: Editor | None = None,
        params: EditParams | None = None,
    ) -> None:
        self.backbone, self.template, self.editor, self.params = backbone, template, editor, params

    @property
    def model(self) -> Any:
        """The model of `transformers`; calls of its own methods run without edits that are routed."""
        return self.backbone.model

    @property
    def sites(self) -> Sequence[str]:
        """Sites that edits change; with plain weights one at which a forward may be divided."""
        return ("layers.0.ffn.out",) if self.editor is None else self.editor.sites

    @property
    def tokenizer(self) -> Any:
        return self.backbone.processor.tokenizer

    @torch.no_grad()
    def answer(
        self,
        picture: Path | str | Image.Image | None,
        question: str,
        max_tokens: int = 32,
        *,
        is_caption: bool = False,
    ) -> str:
        """The greedy answer to a question, without its end token; cut off after `max_tokens`.

        Args:
            picture: A file, a picture in memory, or None for a question without a picture.
            question: Bare question, or beginning of a caption; the template adds the text around it.
            is_caption: Whether `question` is a text to continue.

        Raises:
            ImageError: The picture cannot be read.
            InputError: The question holds a special token, or is longer than the model's context.
        """
        backbone, kv_cache = self.backbone, KVCache()
        read = _picture(picture)
        probe = Probe(question, _PLACEHOLDER, read, is_caption)
        features = backbone.image_features([] if read is None else [read])
        batch = backbone.encode(["question"], ["rel"], [[probe]], features, self.template)
        prefix = backbone.prefix(batch, *self.sites, kv_cache=kv_cache)
        with self.applied(batch):
            read_EKT = batch.with_room(1, 0, backbone.max_positions).predict_EKT
            first_EKT = backbone.head(backbone.suffix(prefix, read_EKT, kv_cache)).argmax(dim=-1)
            tokens_EKN = generate(backbone, batch, prefix, kv_cache, first_EKT, max_tokens)
        return decoded(backbone, until_end(tokens_EKN[0, 0, :max_tokens].tolist(), ends_of(backbone))[0])

    def generate(self, **inputs: Any) -> Tensor:
        """`generate` of the library's model, with what its processor returns and the library's settings.

        A routed model chooses the edit of every sequence at the last token of its prompt; padding, left or right, is
        where `attention_mask` is 0.

        Raises:
            InputError: A setting with which a prompt is not read at once (`assistant_model`, `prefill_chunk_size`), or
                an editor that applies its edits to odedit's own forwards alone.
        """
        if self.editor is None:
            return cast(Tensor, self.model.generate(**inputs))
        if not isinstance(self.editor, RoutedEditor):
            raise InputError(
                f"generate: edits of {type(self.editor).__name__} act in `answer` alone; ask with answer(picture, "
                "question)."
            )
        config = inputs.get("generation_config")
        for name in _UNSUPPORTED:
            if inputs.get(name, getattr(config, name, None)) is not None:
                raise InputError(
                    f"generate: a routed model reads a prompt at once, which {name} does not; leave it out."
                )
        assert self.params is not None
        with self.editor.routed(self.backbone, self.params, _at_end_of(inputs.get("attention_mask"))):
            return cast(Tensor, self.model.generate(**inputs))

    def applied(self, batch: EditBatch) -> AbstractContextManager[object]:
        """Context in which a batch is answered by the committed model."""
        if self.editor is None or self.params is None:
            return nullcontext()
        return self.editor.together(self.backbone, self.params, batch)


def _at_end_of(mask_BS: Tensor | None) -> Positions:
    """Routes the first forward at the last position that is not padding, and no later one."""
    has_run: list[bool] = []

    def positions(x_RSD: Tensor) -> Tensor | None:
        if has_run:
            return None
        has_run.append(True)
        rows, length = x_RSD.shape[:2]
        last_R1 = torch.full((rows, 1), length - 1, device=x_RSD.device)
        if mask_BS is None:
            return last_R1
        # Beams repeat each sequence. Counted from the end: the model may put image positions before the text.
        padding_B = mask_BS.flip(1).to(x_RSD.device).long().argmax(dim=1)
        return last_R1 - padding_B.repeat_interleave(rows // len(mask_BS)).unsqueeze(1)

    return positions


def _picture(picture: Path | str | Image.Image | None) -> Picture | None:
    if picture is None:
        return None
    if isinstance(picture, Image.Image):
        pixels = np.asarray(picture.convert("RGB"), dtype=np.uint8)
        return Picture(hashlib.sha256(pixels.tobytes()).hexdigest()[:32], pixels)
    path = Path(picture).expanduser().absolute()
    return ImageReader(str(path.parent)).read(path.name)
