"""BLIP-2 with an OPT text model (arXiv 2301.12597), any size, as `transformers` ships it.

Input: `[query tokens of the image | </s> | text]`; a text-only prompt has no image part. `Blip2Processor` builds the
same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odedit.backbones.base import Prefix
from odedit.decoders import OPTDecoder
from odedit.edits import EditBatch, Picture, Probe
from odedit.encoding import TokenSequence, assemble
from odedit.errors import InputError
from odedit.prompts import Template, tokenize

ARCHITECTURE = "Blip2ForConditionalGeneration"
_SAMPLE, _SAMPLE_EVERY = 1 << 12, 1 << 18
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Blip2Processor:
    """Tokenizer and image processor of a checkpoint; needs no weights."""

    def __init__(self, checkpoint: str) -> None:
        """Raises InputError if the checkpoint lacks the files of its tokenizer or image processor."""
        from transformers import AutoTokenizer
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, use_fast=True, trust_remote_code=False)
            # The PIL version, by name: the automatic one wants torchvision first.
            self._images = BlipImageProcessorPil.from_pretrained(checkpoint)
        except (OSError, ValueError) as error:
            raise InputError(
                f"backbone.checkpoint {checkpoint!r}: tokenizer or image processor cannot be read: {_first_line(error)}"
            ) from error

    def process(self, picture: Picture) -> Picture:
        if picture.is_processed:
            return picture
        from PIL import Image

        pixels = self._images(Image.fromarray(picture.pixels), return_tensors="np")["pixel_values"][0]
        return Picture(picture.key, np.ascontiguousarray(pixels, dtype=np.float32))

    def save_pretrained(self, directory: str | Path) -> None:
        self.tokenizer.save_pretrained(directory)
        self._images.save_pretrained(directory)


class Blip2:
    """A frozen `Blip2ForConditionalGeneration`; implements `backbones.base.Backbone`."""

    family = "blip2"

    def __init__(self, model: Any, processor: Blip2Processor, checkpoint: str, fingerprint: str) -> None:
        self.checkpoint = checkpoint
        self.fingerprint = fingerprint
        self.processor = processor
        self.model = model.eval().requires_grad_(False)
        self._decoder = OPTDecoder(model.language_model)
        self.num_layers = self._decoder.num_layers
        self.hidden_size = self._decoder.hidden_size
        self._num_query_tokens = int(model.config.num_query_tokens)
        self._image_token = int(model.config.image_token_id or 0)

    @classmethod
    def load_processor(cls, checkpoint: str) -> Blip2Processor:
        source = _resolve(checkpoint)
        _check_architecture(source)
        return Blip2Processor(source)

    @classmethod
    def fingerprint_of(cls, checkpoint: str) -> str:
        """What `fingerprint` will be, without loading the model."""
        source = _resolve(checkpoint)
        return _fingerprint(source, _check_architecture(source))

    @classmethod
    def load(cls, checkpoint: str, *, dtype: str = "float32", device: str = "cpu") -> Blip2:
        from transformers import Blip2ForConditionalGeneration

        if dtype not in DTYPES:
            raise InputError(f"backbone.dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}.")
        source = _resolve(checkpoint)
        config = _check_architecture(source)
        try:
            model = Blip2ForConditionalGeneration.from_pretrained(
                source, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False
            )
        except OSError as error:
            raise InputError(f"backbone.checkpoint {checkpoint!r}: {_first_line(error)}") from error
        return cls(model.to(device), Blip2Processor(source), checkpoint, _fingerprint(source, config))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Picture]) -> Mapping[str, Tensor]:
        distinct = {picture.key: picture for picture in pictures}
        if not distinct:
            return {}
        pixels = np.stack([self.processor.process(picture).pixels for picture in distinct.values()])
        tensor = torch.from_numpy(pixels).to(self.device, self.model.vision_model.dtype)
        features = self.model.get_image_features(tensor, return_dict=True).pooler_output
        return dict(zip(distinct, features.unbind(0), strict=True))

    def encode(
        self,
        edit_ids: Sequence[str],
        slots: Sequence[str],
        grid: Sequence[Sequence[Probe | None]],
        features: Mapping[str, Tensor],
        template: Template,
    ) -> EditBatch:
        tokenizer = self.processor.tokenizer
        cells = [[self._sequence(probe, template) for probe in row] for row in grid]
        pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        return assemble(edit_ids, slots, cells, features, pad, self.hidden_size, self.device)

    def _sequence(self, probe: Probe | None, template: Template) -> TokenSequence | None:
        if probe is None:
            return None
        text, first_target = tokenize(self.processor.tokenizer, template, probe)
        num_image = self._num_query_tokens if probe.picture is not None else 0
        return TokenSequence(
            tokens=[self._image_token] * num_image + text,
            first_target=num_image + first_target,
            num_image=num_image,
            picture=probe.picture.key if probe.picture is not None else None,
        )

    def site(self, name: str) -> nn.Linear:
        return self._decoder.site(name)

    def activation(self, site: str) -> Callable[[Tensor], Tensor]:
        return self._decoder.activation(site)

    @torch.no_grad()
    def prefix(self, batch: EditBatch, *sites: str) -> Prefix:
        located = [self._decoder.locate(site) for site in sites]
        layer = min(layer for layer, _ in located)
        at_ffn = all(part.startswith("ffn") for at, part in located if at == layer)
        num_edits, num_slots, length = batch.tokens_EKS.shape
        embedded = self._decoder.embed_tokens(batch.tokens_EKS.reshape(-1, length))
        if len(batch.features_NLD):
            with_image = (batch.picture_EK >= 0).reshape(-1)
            rows = batch.features_NLD[batch.picture_EK.reshape(-1)[with_image]]
            image_RS = batch.image_EKS.reshape(-1, length)
            embedded = embedded.masked_scatter(image_RS.unsqueeze(-1), rows.to(embedded.dtype))
        hidden = self._decoder.embed_positions(embedded)
        for index in range(layer):
            hidden = self._decoder.block(index, hidden)
        if at_ffn:
            hidden = self._decoder.attention_half(layer, hidden)
        return Prefix(layer, at_ffn, hidden, (num_edits, num_slots))

    def suffix(self, prefix: Prefix) -> Tensor:
        hidden = prefix.hidden_RSD
        if not prefix.at_ffn:
            hidden = self._decoder.attention_half(prefix.layer, hidden)
        hidden = self._decoder.ffn_half(prefix.layer, hidden)
        for index in range(prefix.layer + 1, self.num_layers):
            hidden = self._decoder.block(index, hidden)
        hidden = self._decoder.finish(hidden)
        return hidden.reshape(*prefix.shape, *hidden.shape[1:])

    def head(self, hidden: Tensor) -> Tensor:
        return self._decoder.head(hidden)


def _resolve(checkpoint: str) -> str:
    if checkpoint == "embedded":
        from odedit import world

        return str(world.checkpoint_path("blip2"))
    looks_local = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return str(path)
    if looks_local:
        raise InputError(
            f"backbone.checkpoint: directory {checkpoint!r} does not exist; give a checkpoint directory, "
            "a hub id such as 'Salesforce/blip2-opt-2.7b', or 'embedded'."
        )
    return checkpoint


def _check_architecture(source: str) -> dict[str, Any]:
    """The checkpoint's configuration; InputError unless it is a BLIP-2 with an OPT text model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise InputError(f"backbone.checkpoint {source!r} cannot be read: {_first_line(error)}") from error
    architectures = config.get("architectures") or []
    text_type = (config.get("text_config") or {}).get("model_type")
    if config.get("model_type") != "blip-2" or text_type != "opt":
        got = ", ".join(architectures) or str(config.get("model_type"))
        raise InputError(
            f"backbone.checkpoint {source!r} is {got} with text model {text_type!r}; "
            f"family 'blip2' takes {ARCHITECTURE} with an OPT text model."
        )
    return config


def _fingerprint(source: str, config: dict[str, Any]) -> str:
    """Names the weights: configuration, and a sample of every weight file, or the hub's commit."""
    settings = {key: config[key] for key in config if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    path = Path(source)
    if not path.is_dir():
        digest.update(f"{source}@{config.get('_commit_hash')}".encode())
        return digest.hexdigest()[:16]
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            # A matrix of a large model has tens of megabytes: none slips through between two samples.
            for offset in range(0, size, _SAMPLE_EVERY):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


BACKBONE = Blip2
