"""Checkpoints in the Hugging Face layout: found, checked, named by their weights, and their processor read."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from odedit.backbones.common import hub, weight_files
from odedit.backbones.common.fingerprints import LENGTH, Fingerprint, earlier_fingerprint
from odedit.backbones.common.loading_report import LoadingReport, shared_prefixes
from odedit.errors import InputError, in_words
from odedit.inputs.batch import Picture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_POSITIONS = "position_ids"
_NOT_TELLING = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint's configuration must say.

    Attributes:
        model_class: Class of `transformers` that reads the checkpoint.
        model_type: `model_type` of the whole.
        text_types: `model_type` values of the text models that the backbone computes with.
        text_name: The text model in words.
        example: A hub id of this kind; None where none is published.
        vision_types: `model_type` values of its image tower; empty: any.
    """

    model_class: str
    model_type: str
    text_types: Sequence[str]
    text_name: str
    example: str | None = None
    vision_types: Sequence[str] = ()


def resolve(checkpoint: str, family: str, architecture: Architecture, *, weights: bool = True) -> str:
    """The folder behind a setting; a hub id's is in the hub's cache.

    Args:
        weights: Whether a hub id's weights are needed, besides its configuration, tokenizer and processor.

    Raises:
        InputError: A folder that is not there, or a hub id whose files cannot be had.
    """
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
    return str(hub.snapshot_with_weights(checkpoint) if weights else hub.snapshot(checkpoint))


def read_config(source: str, family: str, architecture: Architecture) -> Any:
    """The checkpoint's configuration; InputError unless it is of that architecture, and of plain weights."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what the library raises depends on which value is wrong
        raise InputError(f"backbone.checkpoint {source!r}: config.json cannot be read: {in_words(error)}.") from error
    values = config.to_dict()
    text_type = (values.get("text_config") or {}).get("model_type")
    if values.get("model_type") != architecture.model_type or text_type not in architecture.text_types:
        got = ", ".join([*(values.get("architectures") or []), f"model_type {values.get('model_type')!r}"])
        raise InputError(
            f"backbone.checkpoint {source!r} is {got} with text model {text_type!r}; "
            f"family {family!r} takes {architecture.model_class} with {architecture.text_name} text model."
        )
    vision_type = (values.get("vision_config") or {}).get("model_type")
    if architecture.vision_types and vision_type not in architecture.vision_types:
        raise InputError(
            f"backbone.checkpoint {source!r} has the image tower {vision_type!r}; "
            f"family {family!r} takes {' or '.join(architecture.vision_types)}."
        )
    _check_plain(values, source)
    return config


def _check_plain(values: dict[str, Any], source: str) -> None:
    """Raises InputError for a configuration of quantised weights."""
    if values.get("transformers_weights"):
        raise InputError(
            f"backbone.checkpoint {source!r}: config.json names a weight file of its own (transformers_weights), which "
            f"is not followed. Name the file {weight_files.WEIGHTS}, and take the setting out."
        )
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    for key in ("quantization_config", "compression_config"):
        for found in (part[key] for part in parts if part.get(key)):
            method = str(found.get("quant_method") or "an unnamed method") if isinstance(found, dict) else str(found)
            bits = {4: found.get("load_in_4bit"), 8: found.get("load_in_8bit")} if isinstance(found, dict) else {}
            number = next((bit for bit, is_set in bits.items() if is_set), None) or (
                found.get("bits") if isinstance(found, dict) else None
            )
            raise _quantised(source, f"{method}, {number} bits" if number else method)


def _quantised(source: str, how: str) -> InputError:
    return InputError(
        f"backbone.checkpoint {source!r} is quantised ({how}), and edits need the weights themselves. Give the "
        "checkpoint that it was made from; backbone.dtype=bfloat16 loads it in half of the memory that float32 takes."
    )


def check_dtype(dtype: str) -> None:
    """Raises InputError for a type that models are not loaded in."""
    if dtype not in DTYPES:
        raise InputError(f"backbone.dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}.")


def load_model(source: str, checkpoint: str, architecture: Architecture, dtype: str) -> Any:
    """The model on the CPU. Raises InputError if its weights cannot be read, or are not exactly those of the model."""
    try:
        model, report = _loaded(architecture, dtype, source, use_safetensors=True)
    except OSError as error:
        raise InputError(f"backbone.checkpoint {checkpoint!r}: {in_words(error)}.") from error
    report.check(checkpoint)
    return model


def empty_model(source: str, checkpoint: str, config: Any, architecture: Architecture, dtype: str) -> Any:
    """The model on the meta device, once the headers of the weight files fit it. Reads no weights.

    Raises:
        InputError: Weights are missing, unexpected, mis-shaped, quantised or damaged, or the configuration describes no
            model.
    """
    stored = weight_files.read_headers(weight_files.find(Path(source)))
    quantised = {name: one for name, one in stored.items() if one.dtype not in weight_files.FLOATS}
    for name, one in quantised.items():
        if not name.endswith(_POSITIONS):
            raise _quantised(source, f"{name} has the type {one.dtype}")

    def build(names: Mapping[str, str]) -> tuple[Any, LoadingReport]:
        weights = {name: torch.empty(stored[own].shape, device="meta") for name, own in names.items()}
        return _loaded(architecture, dtype, None, config=config, state_dict=weights, device_map="meta")

    try:
        model, report = build({name: name for name in stored})
        if not report.fits:
            for prefix in shared_prefixes(stored):
                if build({name.removeprefix(prefix): name for name in stored})[1].fits:
                    report = replace(report, prefix=prefix)
    except Exception as error:  # what the library raises depends on which value is wrong
        raise InputError(
            f"backbone.checkpoint {checkpoint!r}: no {architecture.model_class} can be built from config.json: "
            f"{in_words(error)}."
        ) from error
    report.check(checkpoint)
    return model


def _loaded(architecture: Architecture, dtype: str, source: str | None, **arguments: Any) -> tuple[Any, LoadingReport]:
    import transformers

    with _without_reports():
        # Without a padding mask the eager attention would not even be causal.
        model, report = getattr(transformers, architecture.model_class).from_pretrained(
            source, dtype=DTYPES[dtype], trust_remote_code=False, attn_implementation="sdpa",
            output_loading_info=True, ignore_mismatched_sizes=True, **arguments,
        )  # fmt: skip
    return model, LoadingReport.of(report, model)


@contextmanager
def _without_reports() -> Iterator[None]:
    """Inside, the library prints no report of a loading, which ends as one error here, and no bar of its progress."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def fingerprint(source: str, checkpoint: str, config: Any, dtype: str = "float32") -> Fingerprint:
    """Names the model by its configuration and every byte of its weights, however they are spread over files.

    Args:
        checkpoint: Folder or hub id as the user gave it; fingerprints of earlier versions depend on it.
        dtype: Type that the weights are loaded in; the name does not depend on it.

    Raises:
        InputError: A file is damaged, or a weight is NaN, infinite, or too large for the type.
    """
    files = weight_files.find(Path(source))
    stored, contents = weight_files.read_headers(files), weight_files.read_contents(files)
    _check_values(contents, source, dtype)
    settings = json.dumps(_telling(config.to_diff_dict()), sort_keys=True, default=str)
    lines = [f"{name} {stored[name].dtype} {stored[name].shape} {contents[name].digest}" for name in stored]
    text = hashlib.sha256("\n".join([settings, *sorted(lines)]).encode()).hexdigest()[:LENGTH]
    is_local = checkpoint == "embedded" or Path(checkpoint).expanduser().is_dir()
    hub_id = None if is_local else checkpoint
    return Fingerprint(text, lambda: earlier_fingerprint(Path(source), config.to_dict(), hub_id))


def _check_values(contents: Mapping[str, weight_files.Content], source: str, dtype: str) -> None:
    names = list(contents)
    largest = torch.tensor([content.largest for content in contents.values()], dtype=torch.float64)
    loaded = largest.to(torch.float32).to(DTYPES[dtype])
    broken = [names[at] for at in (~largest.isfinite()).nonzero().flatten()]
    large = [names[at] for at in (~loaded.isfinite()).nonzero().flatten()]
    if not broken and not large:
        return
    names = broken or large
    which = f"{len(names)} tensor{'s' * (len(names) > 1)} (first: {sorted(names)[0]})"
    raise InputError(
        f"backbone.checkpoint {source!r}: {which} "
        + (
            "with NaN or infinite values; the file is damaged, or the training that wrote it failed."
            if broken
            else f"with values beyond {dtype}, which would become infinite; choose backbone.dtype=bfloat16 or float32."
        )
    )


def _telling(values: Any) -> Any:
    """Settings without those that results do not depend on, and that saving a model again changes."""
    if not isinstance(values, dict):
        return values
    return {
        key: _telling(value) for key, value in values.items() if not key.startswith("_") and key not in _NOT_TELLING
    }


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
            what = "tokenizer cannot be read from tokenizer.json and tokenizer_config.json"
            self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, use_fast=True, trust_remote_code=False)
            what = "image processor cannot be read from preprocessor_config.json or processor_config.json"
            self._images = getattr(importlib.import_module(module), name).from_pretrained(checkpoint)
        except Exception as error:  # what the library raises depends on what is wrong with the files
            raise InputError(
                f"backbone.checkpoint {checkpoint!r}: its {what}: {in_words(error)}. Take these files from the "
                "original model."
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
