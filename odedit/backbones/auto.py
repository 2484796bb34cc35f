"""Any image-text-to-text model as `transformers` ships it: its processor's chat template, its own forward, split.

Input: a user's turn with picture and text by the checkpoint's chat template, the answer after it. Nothing is known of a
model by its name: `common/structure.py` finds the parts of its text model, `common/vision.py` those of its pictures'
way, `common/library_forward.py` what the library hands to the layers. A model that deviates from the library's own
answers, or whose parts are not found, is refused with the point at which it cannot be split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from odedit.backbones.base import Backbone, connector_input, insert_features
from odedit.backbones.common.checkpoints import Architecture
from odedit.backbones.common.decoders import Decoder
from odedit.backbones.common.layer_inputs import LayerInputs
from odedit.backbones.common.layouts import LibraryProcessor, Size
from odedit.backbones.common.library_forward import Features, handed_over, owner_of, requires_pictures, takes
from odedit.backbones.common.self_check import check_against_library
from odedit.backbones.common.structure import Unsupported, refusal
from odedit.backbones.common.traced_decoder import TracedDecoder
from odedit.backbones.common.vision import Vision
from odedit.errors import InputError
from odedit.inputs.batch import EditBatch, Picture, Probe
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.plain import PlainUse
from odedit.inputs.prompts import Template
from odedit.runtime.budgets import budgets

_SIZES: tuple[Size, ...] = ((64, 64), (60, 80), (200, 300), (300, 100))
"""Heights and widths of pictures that tell whether all pictures have as many positions."""


class Auto(Backbone):
    """A frozen model of the class that `AutoModelForImageTextToText` chooses."""

    family = "auto"
    architecture = Architecture(
        "AutoModelForImageTextToText", "", (), "any", "Qwen/Qwen2.5-VL-3B-Instruct"
    )  # fmt: skip
    Processor = LibraryProcessor
    processor: LibraryProcessor

    def __init__(self, model: Any, processor: Any, checkpoint: str, fingerprint: Callable[[], str]) -> None:
        """Raises InputError for a model that cannot be split."""
        try:
            self.owner = owner_of(model)
            self.decoder = TracedDecoder(model)
            self.vision = Vision(self.owner, self.decoder.structure.stack)
        except Unsupported as error:
            raise refusal(checkpoint, error) from error
        self._sizes: dict[str, Size] = {}
        # Found by the check against the library. `sample` is a picture that stands for all of them, if there is one.
        self.features: Features | None = None
        self.added_after: tuple[int, ...] = ()
        self.answer_types: dict[str, int] = {}
        self.follows_rule = True
        self.is_causal = True
        self.sample: tuple[Tensor, dict[str, Tensor]] | None = None
        super().__init__(model, processor, checkpoint, fingerprint)

    def make_decoder(self) -> Decoder:
        return self.decoder

    def connector(self) -> Mapping[str, nn.Module]:
        return self.vision.connector

    # Loading.

    @classmethod
    def at_size(cls, side: int) -> type[Self]:
        """The class with a processor that resizes every picture to a square first."""
        processor = type(
            "LibraryProcessor", (LibraryProcessor,), {"side": side, "__module__": LibraryProcessor.__module__}
        )
        return type(cls.__name__, (cls,), {"Processor": processor, "__module__": cls.__module__})

    @classmethod
    def architecture_of(cls, config: Any) -> Architecture:
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        try:
            found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        except KeyError:
            raise InputError(
                f"backbone.checkpoint: {config.model_type!r} is no image-text-to-text model of this transformers."
            ) from None
        return replace(cls.architecture, model_class=found.__name__)

    @classmethod
    def load(cls, checkpoint: str, *, dtype: str = "float32", device: str = "cpu", gpus: int = 1) -> Self:
        """The model with its weights, compared with the library's own answers.

        Raises:
            InputError: The checkpoint is wrong, see `inspect`, or the model deviates from the library's.
        """
        backbone = super().load(checkpoint, dtype=dtype, device=device, gpus=gpus)
        try:
            check_against_library(backbone)
        except Unsupported as error:
            raise refusal(checkpoint, error) from error
        return backbone

    def check_picture(self) -> None:
        """Raises InputError unless the processor lays out prompts with and without a picture, for any text alike."""
        self.processor.layout(None)
        try:
            self.processor.check_text_independent()
        except Unsupported as error:
            raise refusal(self.checkpoint, error) from error

    @cached_property
    def fixed_size(self) -> Size | None:
        """A size that stands for all pictures, if all are treated alike; None: their numbers of positions differ."""
        layouts = [self.processor.layout(size) for size in _SIZES[: 1 if self.processor.side else None]]
        first = layouts[0]
        alike = all(layout.runs == first.runs and _same(layout.pictures, first.pictures) for layout in layouts)
        return _SIZES[0] if alike else None

    # Pictures.

    @property
    def vision_width(self) -> int:
        return self.vision.width

    @property
    def feature_width(self) -> int:
        return self.hidden_size * (1 if self.features is None else self.features.parts)

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Picture], before_connector: bool = False) -> Mapping[str, Tensor]:
        if before_connector and pictures and self.sample is None:
            raise InputError(
                "a site of the connector is to be edited, and the model's pictures have different numbers of "
                "positions: set backbone.image_size, so that all are resized to a square of that many pixels."
            )
        distinct = {picture.key: picture for picture in pictures}
        made: dict[str, Tensor] = {}
        for group in self._alike(list(distinct.values())):
            at_once = max(1, budgets(self.device).tower_pixels // group[0].pixels.size)
            for start in range(0, len(group), at_once):
                part = group[start : start + at_once]
                made |= dict(
                    zip((picture.key for picture in part), self._features_of(part, before_connector), strict=True)
                )
        return {key: made[key] for key in distinct}

    def _features_of(self, group: Sequence[Picture], before_connector: bool) -> Sequence[Tensor]:
        """Features of processed pictures that the model treats alike."""
        pixels, inputs = self.tensors(group)
        if before_connector:
            return self.tower(pixels).unbind(0)
        flat = self.flat_features(self.vision.features(pixels, inputs))
        if flat.shape[-1] != self.feature_width:
            raise InputError(
                f"backbone.checkpoint {self.checkpoint!r}: a picture becomes features of width {flat.shape[-1]}, and "
                f"the text model takes width {self.feature_width}. Take config.json from the model that the weights "
                "belong to."
            )
        whole = flat.reshape(len(group), -1, flat.shape[-1])
        expected = self.processor.layout(group[0].size).num_positions
        if whole.shape[1] != expected:
            raise InputError(
                f"backbone.checkpoint {self.checkpoint!r}: a picture of {group[0].size} has {expected} positions in a "
                f"prompt and {whole.shape[1]} features. Take processor and weights from the same checkpoint."
            )
        return whole.unbind(0)

    def flat_features(self, output: Any) -> Tensor:
        """Features of an output of `get_image_features`, `(positions of all pictures, parts x D)`."""
        if self.features is None:
            self.features = Features.like(output)
        return self.features.flat(output)

    def tensors(self, group: Sequence[Picture]) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel values of processed pictures, and what the model reads besides."""
        pixels = torch.from_numpy(np.concatenate([picture.pixels for picture in group]))
        named = [self.processor.layout(picture.size).pictures for picture in group]
        return pixels.to(self.device, self.model.dtype), self._joined(named)

    def _joined(self, named: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        names = named[0] if named else {}
        return {name: torch.from_numpy(np.concatenate([one[name] for one in named])).to(self.device) for name in names}

    def _alike(self, pictures: Sequence[Picture]) -> list[list[Picture]]:
        """Processed pictures, grouped by their shape and by what the model reads of their size."""
        groups: dict[Any, list[Picture]] = {}
        for picture in pictures:
            processed = self.processor.process(picture)
            assert processed.size is not None
            self._sizes[picture.key] = processed.size
            named = self.processor.layout(processed.size).pictures
            key = (processed.pixels.shape, *(value.tobytes() for value in named.values()))
            groups.setdefault(key, []).append(processed)
        return list(groups.values())

    def tower(self, pixels: Tensor) -> Tensor:
        """What the connector reads, for pictures like `sample`: `(N, patches, width)`."""
        assert self.sample is not None
        count = len(pixels) // len(self.sample[0])
        return self.vision.tower(pixels, self._repeated_sample(count)[1], count)

    def connect(self, vision: Tensor) -> Tensor:
        count = len(vision)
        flat = self.flat_features(self.vision.connect(vision, *self._repeated_sample(count)))
        return flat.reshape(count, -1, flat.shape[-1])

    def _repeated_sample(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels of as many pictures like `sample`, and what the model reads besides."""
        assert self.sample is not None
        pixels, inputs = self.sample

        def repeated(value: Tensor) -> Tensor:
            return value.repeat(count, *[1] * (value.dim() - 1))

        return repeated(pixels), {name: repeated(value) for name, value in inputs.items()}

    def split_connector(self, pictures: Sequence[Picture]) -> None:
        """Finds the connector's input from two processed pictures; without one, no site of it can be edited."""
        first, second = (self.tensors([picture]) for picture in pictures)
        if self.fixed_size is None or not self.vision.find_split([first, second]):
            self._connector_linears = {} if self.fixed_size is not None else self._connector_linears
            return
        self.sample = torch.ones_like(first[0]), first[1]
        whole = self.flat_features(self.vision.features(*first))
        split = self.connect(self.vision.tower(*first, 1))[0]
        if split.shape != whole.shape or not torch.allclose(split, whole, rtol=1e-3, atol=1e-3):
            self.sample, self._connector_linears = None, {}

    # Prompts.

    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        return self.processor.sequence(probe, template, self._size_of(probe.picture))

    def _size_of(self, picture: Picture | None) -> Size | None:
        if picture is None:
            return None
        if picture.size is not None:
            return picture.size
        if picture.pixels.size:
            height, width = picture.pixels.shape[:2]
            return int(height), int(width)
        return self._sizes.get(picture.key) or self.fixed_size or _SIZES[0]

    def assemble(
        self,
        edit_ids: Sequence[str],
        slots: Sequence[str],
        cells: Sequence[Sequence[TokenSequence | None]],
        features: Mapping[str, Tensor],
        before_connector: bool = False,
    ) -> EditBatch:
        if self.fixed_size is None:
            cells = [[None if cell is None else self._refitted(cell) for cell in row] for row in cells]
        batch = super().assemble(edit_ids, slots, cells, features, before_connector)
        return replace(batch, sizes=tuple(self._sizes.get(key, _SIZES[0]) for key in features))

    def note_sizes(self, pictures: Sequence[Picture]) -> None:
        """Remembers the sizes of pictures whose features are not computed here."""
        for picture in pictures:
            size = self._size_of(picture)
            if size is not None and picture.key not in self._sizes:
                self._sizes[picture.key] = size

    def _refitted(self, cell: TokenSequence) -> TokenSequence:
        """A sequence whose picture may have been exchanged, with as many positions as its picture has."""
        if cell.picture is None or not len(cell.image):
            return cell
        head = self.processor.head(self._sizes.get(cell.picture, _SIZES[0]))
        kept = cell.tokens[cell.image[-1] + 1 :]
        if cell.tokens[: cell.image[-1] + 1] == head:
            return cell
        shift = len(head) + len(kept) - len(cell.tokens)
        image = [index for index, token in enumerate(head) if token == self.processor.image_token]
        return replace(cell, tokens=[*head, *kept], first_target=cell.first_target + shift, image=image)

    def marks(self) -> Mapping[str, int | None]:
        token = self.processor.image_token
        return {f"of an image (id {token} by config.json)": token}

    def plain_use(self) -> PlainUse:
        with_picture, without = (self._once_begun(self.processor.layout(size).written) for size in (_SIZES[0], None))
        alone = "language_model" if requires_pictures(self.model) else None
        return PlainUse(with_picture, without, side=self.processor.side, text_model=alone)

    def _once_begun(self, written: str) -> str:
        """A chat template's text without the start token that the tokenizer adds to every text (Gemma)."""
        tokenizer = self.processor.tokenizer
        start = tokenizer.bos_token
        twice = start and tokenizer(written).input_ids[:2] == [tokenizer.bos_token_id] * 2
        return written.removeprefix(start) if twice else written

    # Running.

    def forward_inputs(
        self, tokens_RS: Tensor, image_RS: Tensor, prompt_RS: Tensor, sizes: Sequence[Size]
    ) -> dict[str, Any]:
        """Arguments of the library's forward but the pixel values, for the sequences' pictures in order."""
        accepted = self.model.forward
        named: dict[str, Any] = {"input_ids": tokens_RS, "attention_mask": torch.ones_like(tokens_RS)}
        for name, (at_text, at_image) in self.processor.types.items():
            if takes(accepted, name):
                answer = self.answer_types.get(name, at_text)
                text_RS = torch.where(prompt_RS, at_text, answer)
                named[name] = torch.where(image_RS, at_image, text_RS).to(tokens_RS.dtype)
        joined = self._joined([self.processor.layout(size).pictures for size in sizes])
        return named | {name: value for name, value in joined.items() if takes(accepted, name)}

    def handed_over(
        self,
        tokens_RS: Tensor,
        image_RS: Tensor,
        prompt_RS: Tensor,
        sizes: Sequence[Size],
        features: Tensor | None = None,
    ) -> Any:
        """What the library hands to the layers; image features are zeros unless given."""
        # An image token in an answer is a token like any other; the library would miss a picture.
        is_word_RS = image_RS | (tokens_RS != self.processor.image_token)
        named = self.forward_inputs(tokens_RS.where(is_word_RS, self.padding), image_RS, prompt_RS, sizes)
        assert self.features is not None
        if features is None:
            features = torch.zeros(int(image_RS.sum()), self.feature_width, device=self.device, dtype=self.model.dtype)
        if sizes or requires_pictures(self.model):
            named["pixel_values"] = torch.ones(1, device=self.device, dtype=self.model.dtype)
        return handed_over(self.model, self.decoder.structure, named, self.features.whole(features))

    def _inputs(self, batch: EditBatch) -> LayerInputs | None:
        tokens_RS, image_RS = batch.tokens_EKS.flatten(0, 1), batch.image_EKS.flatten(0, 1)
        embedded_RSD = self.decoder.embed_tokens(tokens_RS[:1])
        if self.follows_rule and self.is_causal:
            return self.decoder.rotary(embedded_RSD, None)
        rows = batch.picture_EK.flatten().tolist()
        sizes = [batch.sizes[row] for row in rows if row >= 0]
        handed = self.handed_over(tokens_RS, image_RS, batch.prompt_EKS.flatten(0, 1), sizes)
        inputs = self.decoder.rotary(embedded_RSD, None if self.follows_rule else handed.positions)
        if inputs is None or self.is_causal:
            return inputs
        return replace(inputs, mask_RSS=handed.masks[0])

    def _placed(
        self, embedded_RSD: Tensor, features_RLD: Tensor, image_RS: Tensor
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        main, *later = features_RLD.chunk(1 + len(self.added_after), dim=-1)
        hidden_RSD = self.decoder.embed_positions(insert_features(embedded_RSD, main, image_RS))
        zeros = torch.zeros_like(hidden_RSD) if later else hidden_RSD
        added = zip(self.added_after, later, strict=True)
        return hidden_RSD, {layer: insert_features(zeros, part, image_RS) for layer, part in added}

    def _added(self, batch: EditBatch, layer: int) -> Mapping[int, Tensor]:
        if not any(after >= layer for after in self.added_after):
            return {}
        before = connector_input(batch, slice(None))
        features_RLD = self.connect(before.vision_RPW) if batch.before_connector else before.vision_RPW
        embedded_RSD = self.decoder.embed_tokens(batch.tokens_EKS.flatten(0, 1))
        added = self._placed(embedded_RSD, features_RLD, before.image_RS)[1]
        return {after: part for after, part in added.items() if after >= layer}


def _same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


BACKBONE = Auto
