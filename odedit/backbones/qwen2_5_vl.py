"""Qwen2.5-VL (arXiv 2502.13923), any size: a tower for any resolution, merged patches, three-dimensional positions.

Input: the chat template of its processor, one user turn with the picture before the text. An answer begins a line
there, so no space precedes the target.

Differs from the model's own processing: every picture is resized to a square of 448 pixels, 256 positions of the text
model, instead of keeping its proportions. With one number of positions, pictures share a batch, and edits cost the
same for every picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odedit.backbones.base import Backbone
from odedit.backbones.common.checkpoints import Architecture, PretrainedProcessor
from odedit.backbones.common.decoders import Decoder, LlamaDecoder
from odedit.errors import InputError
from odedit.inputs.batch import Probe
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.plain import PlainUse
from odedit.inputs.prompts import Frame, Template, tokenize

SIDE = 448
"""Width and height of every picture, in pixels."""
_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"


class Qwen25VLProcessor(PretrainedProcessor):
    """Resizes to `SIDE` and normalises with the checkpoint's mean and standard deviation."""

    images = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil"

    def pixels(self, image: Any) -> np.ndarray:
        resized = np.asarray(image.convert("RGB").resize((SIDE, SIDE), self._images.resample), dtype=np.float32)
        mean, deviation = np.asarray(self._images.image_mean), np.asarray(self._images.image_std)
        normalised: np.ndarray = (resized * self._images.rescale_factor - mean) / deviation
        return normalised.transpose(2, 0, 1)


class Qwen25VL(Backbone):
    """A frozen `Qwen2_5_VLForConditionalGeneration`."""

    family = "qwen2_5_vl"
    architecture = Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        ("qwen2_5_vl_text",),
        "its own",
        "Qwen/Qwen2.5-VL-3B-Instruct",
    )
    Processor = Qwen25VLProcessor

    def make_decoder(self) -> Decoder:
        return LlamaDecoder(self.model.model.language_model, self.model.lm_head)

    def connector(self) -> Mapping[str, nn.Module]:
        return {"visual.merger": self.model.model.visual.merger}

    def check_picture(self) -> None:
        """Raises InputError unless a picture's features have the width of the text model.

        The tower cannot run on a model without weights, because it reads values; the picture's size is fixed.
        """
        width = self.model.config.vision_config.out_hidden_size
        if width != self.hidden_size:
            raise InputError(
                f"backbone.checkpoint {self.checkpoint!r}: a picture becomes features of width {width} "
                f"(vision_config.out_hidden_size), and the text model takes width {self.hidden_size}. Take "
                "config.json from the model that the weights belong to."
            )

    @property
    def _patches_per_side(self) -> int:
        """Number of patches along one side of a picture."""
        return int(SIDE // self.model.config.vision_config.patch_size)

    @property
    def _grid(self) -> Tensor:
        """Number of frames, rows and columns of a picture's patches, `(1, 3)`."""
        return torch.tensor([[1, self._patches_per_side, self._patches_per_side]], device=self.device)

    def tower(self, pixels: Tensor) -> Tensor:
        visual, config = self.model.model.visual, self.model.config.vision_config
        count = len(pixels)
        patches = _patches(pixels, config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
        windowed = visual(patches.flatten(0, 1), grid_thw=self._grid.expand(count, -1)).last_hidden_state
        # The tower sorts the squares of merged patches by attention window; this restores the picture's order.
        squares = windowed.reshape(count, -1, config.spatial_merge_size**2, windowed.shape[-1])
        return squares[:, torch.argsort(self._window_index())].flatten(1, 2)

    def _window_index(self) -> Tensor:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        visual = self.model.model.visual
        index: Tensor = get_vision_window_index(
            self._grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )[0]
        return index

    def connect(self, vision: Tensor) -> Tensor:
        merged: Tensor = self.model.model.visual.merger(vision)
        return merged.reshape(len(vision), -1, merged.shape[-1])

    def positions(self, tokens_RS: Tensor, image_RS: Tensor) -> Tensor | None:
        """Frame, row and column of image positions, `(3, R, S)`; consecutive numbers for text."""
        with_picture = int(image_RS.any(dim=1).sum())
        index: Tensor = self.model.model.get_rope_index(
            tokens_RS, mm_token_type_ids=image_RS.int(), image_grid_thw=self._grid.expand(with_picture, -1)
        )[0]
        return index

    def marks(self) -> Mapping[str, int | None]:
        token_id, ids = self.model.config.image_token_id, self.processor.tokenizer.get_vocab()
        written = (_VISION_START, _VISION_END, _TURN_START, _TURN_END)
        return {f"of an image (id {token_id} by config.json)": token_id, **{text: ids.get(text) for text in written}}

    def plain_use(self) -> PlainUse:
        with_picture = f"{_TURN}{self._picture_text}{{text}}{_ANSWER}"
        return PlainUse(with_picture, f"{_TURN}{{text}}{_ANSWER}", side=SIDE)

    @property
    def _picture_text(self) -> str:
        token = self.processor.tokenizer.convert_ids_to_tokens(int(self.model.config.image_token_id))
        return f"{_VISION_START}{token}{_VISION_END}"

    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        tokenizer = self.processor.tokenizer
        if probe.picture is None:
            return TokenSequence(*tokenize(tokenizer, template, probe, Frame(_TURN, _ANSWER, spaced=False)))
        token = int(self.model.config.image_token_id)
        frame = Frame(_TURN + self._picture_text, _ANSWER, spaced=False)
        tokens, first_target = tokenize(tokenizer, template, probe, frame)
        image_index = tokens.index(token)
        count = self._patches_per_side**2 // self.model.config.vision_config.spatial_merge_size**2
        return TokenSequence.around_picture(
            tokens[:image_index],
            probe.picture.key,
            token,
            count,
            tokens[image_index + 1 :],
            first_target - image_index - 1,
        )


def _patches(pixels: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Patches `(N, patches, channels x frames x patch x patch)` of pictures; patches to be merged are adjacent.

    All frames are the same picture.
    """
    count, channels, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    cut = pixels.reshape(count, channels, rows, merge, patch, columns, merge, patch)
    in_order = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    repeated = in_order.expand(*in_order.shape[:6], frames, patch, patch)
    return repeated.reshape(count, rows * columns * merge * merge, -1)


BACKBONE = Qwen25VL
