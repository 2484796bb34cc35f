"""Checkpoints in the Hugging Face layout: found, checked, named by their weights, and their processor read."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from odedit.edits import Picture
from odedit.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLE, _SAMPLE_EVERY = 1 << 12, 1 << 18


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint's configuration must say.

    Attributes:
        model_class: Class of `transformers` that reads the checkpoint.
        model_type: `model_type` of the whole.
        text_types: Those of its text model that the backbone computes with.
        text_name: The text model in words.
        example: A hub id of this kind; None where none is published.
        vision_types: Those of its image tower; empty: any.
    """

    model_class: str
    model_type: str
    text_types: Sequence[str]
    text_name: str
    example: str | None = None
    vision_types: Sequence[str] = ()


def resolve(checkpoint: str, family: str, architecture: Architecture) -> str:
    """The directory or hub id behind a setting. Raises InputError for a directory that is not there."""
    if checkpoint == "embedded":
        from odedit import world

        return str(world.checkpoint_path(family))
    looks_local = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return str(path)
    if looks_local:
        example = f"a hub id such as {architecture.example!r}, " if architecture.example else ""
        raise InputError(
            f"backbone.checkpoint: directory {checkpoint!r} does not exist; give a checkpoint directory, "
            f"{example}or 'embedded'."
        )
    return checkpoint


def read_config(source: str, family: str, architecture: Architecture) -> dict[str, Any]:
    """The checkpoint's configuration; InputError unless it is of that architecture."""
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(source, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise InputError(f"backbone.checkpoint {source!r} cannot be read: {first_line(error)}") from error
    text_type = (config.get("text_config") or {}).get("model_type")
    if config.get("model_type") != architecture.model_type or text_type not in architecture.text_types:
        got = ", ".join(config.get("architectures") or []) or str(config.get("model_type"))
        raise InputError(
            f"backbone.checkpoint {source!r} is {got} with text model {text_type!r}; "
            f"family {family!r} takes {architecture.model_class} with {architecture.text_name} text model."
        )
    vision_type = (config.get("vision_config") or {}).get("model_type")
    if architecture.vision_types and vision_type not in architecture.vision_types:
        raise InputError(
            f"backbone.checkpoint {source!r} has the image tower {vision_type!r}; "
            f"family {family!r} takes {' or '.join(architecture.vision_types)}."
        )
    return config


def check_dtype(dtype: str) -> None:
    """Raises InputError for a type that models are not loaded in."""
    if dtype not in DTYPES:
        raise InputError(f"backbone.dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}.")


def load_model(source: str, checkpoint: str, architecture: Architecture, dtype: str) -> Any:
    """The model on the CPU. Raises InputError if its weights cannot be read."""
    import transformers

    try:
        # Without a padding mask the eager attention would not even be causal.
        return getattr(transformers, architecture.model_class).from_pretrained(
            source, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
        )
    except OSError as error:
        raise InputError(f"backbone.checkpoint {checkpoint!r}: {first_line(error)}") from error


def fingerprint(source: str, config: dict[str, Any]) -> str:
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


def first_line(error: Exception) -> str:
    """What an error says, cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class PretrainedProcessor:
    """Tokenizer and image processor of a checkpoint; needs no weights. A family names its image processor.

    Attributes:
        images: Dotted name of the PIL image processor. By name: the automatic choice wants torchvision first.
    """

    images: ClassVar[str]

    def __init__(self, checkpoint: str) -> None:
        """Raises InputError if the checkpoint lacks the files of its tokenizer or image processor."""
        from transformers import AutoTokenizer

        module, name = self.images.rsplit(".", 1)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, use_fast=True, trust_remote_code=False)
            self._images = getattr(importlib.import_module(module), name).from_pretrained(checkpoint)
        except (OSError, ValueError) as error:
            raise InputError(
                f"backbone.checkpoint {checkpoint!r}: tokenizer or image processor cannot be read: {first_line(error)}"
            ) from error

    def process(self, picture: Picture) -> Picture:
        if picture.is_processed:
            return picture
        from PIL import Image

        pixels = self.pixels(Image.fromarray(picture.pixels))
        return Picture(picture.key, np.ascontiguousarray(pixels, dtype=np.float32))

    def pixels(self, image: Any) -> np.ndarray:
        """`(3, height, width)` of a PIL image."""
        pixels: np.ndarray = self._images(image, return_tensors="np")["pixel_values"][0]
        return pixels

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes tokenizer and image processor as the checkpoint had them."""
        self.tokenizer.save_pretrained(directory)
        self._images.save_pretrained(directory)
