"""Checkpoints in the Hugging Face layout: location, checks, fingerprint and processor."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from odedit.backbones.common import hub, weight_files
from odedit.backbones.common.fingerprints import LENGTH, Fingerprint, earlier_fingerprint
from odedit.backbones.common.loading_report import LoadingReport, shared_prefixes
from odedit.errors import InputError, in_words
from odedit.inputs.batch import Picture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_GENERATION = "generation_config.json"
_POSITIONS = "position_ids"
_IRRELEVANT = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


@dataclass(frozen=True)
class Architecture:
    """Requirements on a checkpoint's configuration.

    Attributes:
        model_class: Class of `transformers` that reads the checkpoint.
        model_type: Required `model_type` of the model; empty: any of the class.
        text_types: Allowed `model_type` values of the text model.
        text_name: Text model in words, for messages.
        example: Hub id of such a checkpoint; None if none is published.
        vision_types: Allowed `model_type` values of the image tower; empty: any.
    """

    model_class: str
    model_type: str
    text_types: Sequence[str]
    text_name: str
    example: str | None = None
    vision_types: Sequence[str] = ()


def resolve(checkpoint: str, family: str, architecture: Architecture, *, weights: bool = True) -> str:
    """The folder of a checkpoint; for a hub id, in the hub's cache.

    Args:
        weights: Whether to download a hub id's weights, besides its configuration, tokenizer and processor.

    Raises:
        InputError: The folder does not exist, or the hub id's files are unavailable.
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
    """The checkpoint's configuration. Raises InputError for another architecture and for quantised weights."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what the library raises depends on which value is wrong
        raise InputError(f"backbone.checkpoint {source!r}: config.json cannot be read: {in_words(error)}.") from error
    values = config.to_dict()
    text_type = (values.get("text_config") or {}).get("model_type")
    if not architecture.model_type:
        _check_plain(values, source)
        return config
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
    """Raises InputError for a configuration of quantised or renamed weights."""
    if values.get("transformers_weights"):
        raise InputError(
            f"backbone.checkpoint {source!r}: config.json names a weight file of its own (transformers_weights), which "
            f"is not read. Name the file {weight_files.WEIGHTS}, and take the setting out."
        )
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    for key in ("quantization_config", "compression_config"):
        for settings in (part[key] for part in parts if part.get(key)):
            if not isinstance(settings, dict):
                raise _quantised(source, str(settings))
            method = str(settings.get("quant_method") or "an unnamed method")
            loaded_bits = (bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit"))
            bits = next(loaded_bits, None) or settings.get("bits")
            raise _quantised(source, f"{method}, {bits} bits" if bits else method)


def _quantised(source: str, how: str) -> InputError:
    return InputError(
        f"backbone.checkpoint {source!r} is quantised ({how}), and edits need the weights themselves. Give the "
        "checkpoint that it was made from; backbone.dtype=bfloat16 loads it in half of the memory that float32 takes."
    )


def check_dtype(dtype: str) -> None:
    """Raises InputError unless models can be loaded in this type."""
    if dtype not in DTYPES:
        raise InputError(f"backbone.dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}.")


def load_model(
    source: str, checkpoint: str, config: Any, architecture: Architecture, dtype: str, device: torch.device
) -> Any:
    """The model on a device, without a copy in main memory: every tensor is read and converted by itself.

    Raises:
        InputError: Weights cannot be read, or do not match the model exactly.
    """
    from transformers import GenerationConfig

    files = weight_files.find(Path(source))
    stored = weight_files.read_headers(files)
    # Mapped files are shared by the processes of a machine; where tensors are converted, their pages would stay.
    types = {tensor.dtype for tensor in stored.values()} & weight_files.FLOATS
    is_as_stored = device.type == "cpu" and types == {_STORED[dtype]}
    try:
        with ExitStack() as opened:
            weights: dict[str, Any] = {}
            for file in files:
                backend = "mmap" if is_as_stored else "pread"
                tensors = opened.enter_context(safe_open(file, framework="pt", backend=backend))
                weights |= {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            model, report = _loaded(
                architecture, dtype, None, config=config, state_dict=weights, device_map={"": device}
            )
            if (Path(source) / _GENERATION).is_file():
                model.generation_config = GenerationConfig.from_pretrained(source)
    except (OSError, SafetensorError) as error:
        raise InputError(f"backbone.checkpoint {checkpoint!r}: {in_words(error)}.") from error
    report.check(checkpoint)
    return model


def empty_model(source: str, checkpoint: str, config: Any, architecture: Architecture, dtype: str) -> Any:
    """The model on the meta device, checked against the headers of the weight files. Reads no weights.

    Raises:
        InputError: Weights are missing, unexpected, mis-shaped, quantised or damaged, or the configuration does not
            describe a model.
    """
    stored = weight_files.read_headers(weight_files.find(Path(source)))
    for name, tensor in stored.items():
        if tensor.dtype not in weight_files.FLOATS and not name.endswith(_POSITIONS):
            raise _quantised(source, f"{name} has the type {tensor.dtype}")

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
        # "sdpa", because eager attention without a padding mask is not causal.
        model, report = getattr(transformers, architecture.model_class).from_pretrained(
            source, dtype=DTYPES[dtype], trust_remote_code=False, attn_implementation="sdpa",
            output_loading_info=True, ignore_mismatched_sizes=True, **arguments,
        )  # fmt: skip
    return model, LoadingReport.of(report, model)


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silences the library's loading report, which becomes one error here, and its progress bar."""
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
    """Name of a model from its configuration and every byte of its weights, independent of their split into files.

    Args:
        checkpoint: Folder or hub id as the user gave it; only fingerprints of earlier versions depend on it.
        dtype: Type that the weights are loaded in, for the check of their range.

    Raises:
        InputError: A file is damaged, or a weight is NaN, infinite, or too large for the type.
    """
    files = weight_files.find(Path(source))
    stored, contents = weight_files.read_headers(files), weight_files.read_contents(files)
    _check_values(contents, source, dtype)
    settings = json.dumps(_relevant(config.to_diff_dict()), sort_keys=True, default=str)
    lines = [f"{name} {stored[name].dtype} {stored[name].shape} {contents[name].digest}" for name in stored]
    text = hashlib.sha256("\n".join([settings, *sorted(lines)]).encode()).hexdigest()[:LENGTH]
    is_local = checkpoint == "embedded" or Path(checkpoint).expanduser().is_dir()
    hub_id = None if is_local else checkpoint
    return Fingerprint(text, lambda: earlier_fingerprint(Path(source), config.to_dict(), hub_id))


def _check_values(contents: Mapping[str, weight_files.Content], source: str, dtype: str) -> None:
    names = list(contents)
    largest = torch.tensor([content.largest for content in contents.values()], dtype=torch.float64)
    loaded = largest.to(torch.float32).to(DTYPES[dtype])
    broken = [names[index] for index in (~largest.isfinite()).nonzero().flatten()]
    large = [names[index] for index in (~loaded.isfinite()).nonzero().flatten()]
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


def _relevant(values: Any) -> Any:
    """Settings without those that affect no result but may change when a model is saved again."""
    if not isinstance(values, dict):
        return values
    return {
        key: _relevant(value) for key, value in values.items() if not key.startswith("_") and key not in _IRRELEVANT
    }


class PretrainedProcessor:
    """Tokenizer and image processor of a checkpoint, which need no weights; used on CPU workers.

    Attributes:
        images: Dotted name of the family's PIL image processor. The library's automatic choice needs torchvision.
        tokenizer: Tokenizer of the library.
    """

    images: ClassVar[str]

    def __init__(self, checkpoint: str) -> None:
        """Raises InputError if the checkpoint lacks the files of its tokenizer or image processor."""
        from transformers import AutoTokenizer

        module, name = self.images.rsplit(".", 1)
        try:
            problem = "tokenizer cannot be read from tokenizer.json and tokenizer_config.json"
            self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, use_fast=True, trust_remote_code=False)
            problem = "image processor cannot be read from preprocessor_config.json or processor_config.json"
            self._images = getattr(importlib.import_module(module), name).from_pretrained(checkpoint)
        except Exception as error:  # what the library raises depends on what is wrong with the files
            raise InputError(
                f"backbone.checkpoint {checkpoint!r}: its {problem}: {in_words(error)}. Take these files from the "
                "original model."
            ) from error

    def process(self, picture: Picture) -> Picture:
        """The image tower's input, `float32 (3, height, width)`; a processed picture is returned as it is."""
        if picture.is_processed:
            return picture
        from PIL import Image

        pixels = self._images(Image.fromarray(picture.pixels), return_tensors="np")["pixel_values"][0]
        return Picture(picture.key, np.ascontiguousarray(pixels, dtype=np.float32))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes tokenizer and image processor to a folder."""
        self.tokenizer.save_pretrained(directory)
        self._images.save_pretrained(directory)
