"""Conversion of MiniGPT-4's published pieces to a checkpoint in the Hugging Face layout.

MiniGPT-4 (arXiv 2304.10592) is BLIP-2 with another text model. Its authors publish only the projection that they
trained; image tower and Q-Former come from BLIP-2 with FlanT5-XXL, the text model is Vicuna.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from odedit.backbones.common.qformer import QFormerProcessor
from odedit.errors import InputError, in_words
from odedit.inputs.plain import minigpt4_processor
from odedit.storage.atomic import check_new, folder_written_atomically
from odedit.storage.location import at
from odedit.storage.tensors import write_tensors

SHARD_BYTES = 4 << 30
_FROM_BLIP2 = ("vision_model.", "qformer.", "query_tokens")
_PROJECTION = {"llama_proj.weight": "language_projection.weight", "llama_proj.bias": "language_projection.bias"}
_TEXT = "language_model."
# Tables that older versions of the library store and newer ones compute.
_COMPUTED = ("position_ids", "rotary_emb.inv_freq")


def minigpt4(blip2: Path, projection: Path, vicuna: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes MiniGPT-4 as a `Blip2ForConditionalGeneration`; tensors keep their types.

    Copies weights shard by shard, so that the whole model is never in memory.

    Args:
        blip2: Checkpoint of BLIP-2 with any text model, for image tower, Q-Former and query tokens.
        projection: Published projection, `llama_proj.weight` and `.bias`, as safetensors or as a `.pth` file, in which
            they may be under the key `model`. Only tensors are read from a `.pth` file.
        vicuna: Checkpoint of a `LlamaForCausalLM` with its tokenizer.
        out: Folder to write, which must not exist.
        shard_bytes: Largest size of a weight file.

    Returns:
        `out`.

    Raises:
        InputError: A piece is missing, unreadable, or does not fit the others; the message names the file.
    """
    check_new(out)
    for option, directory in (("--blip2", blip2), ("--vicuna", vicuna)):
        if not directory.is_dir():
            raise InputError(f"{option}: directory {directory} does not exist.")
    bridge, text = _read_config("--blip2", blip2, "blip-2"), _read_config("--vicuna", vicuna, "llama")
    tokenizer, image_processor = _read_tokenizer(vicuna), _read_image_processor(blip2)
    config = _make_config(bridge, text, int(tokenizer.unk_token_id))
    expected = _expected_shapes(config)
    with folder_written_atomically(out) as partial:
        shards = _Shards(partial, shard_bytes)
        for file, name, tensor in _pieces(blip2, projection, vicuna):
            _check_tensor(file, name, tensor, expected, shards.file_of)
            shards.add(name, tensor)
        _check_complete(expected, shards.file_of, {"--blip2": blip2, "--projection": projection, "--vicuna": vicuna})
        shards.finish()
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        image_processor.save_pretrained(partial)
        for name, text in _processor_files(config, tokenizer).items():
            (partial / name).write_text(text, encoding="utf-8")
    return out


def _read_tokenizer(vicuna: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(vicuna, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(
            f"--vicuna: the tokenizer in {vicuna} cannot be read: {in_words(error)} (a folder with tokenizer.model "
            "and no tokenizer.json needs the package sentencepiece.)"
        ) from error
    if not tokenizer.is_fast or tokenizer.unk_token_id is None:
        raise InputError(f"--vicuna: the tokenizer in {vicuna} has no fast version, or no token for unknown text.")
    return tokenizer


def _read_image_processor(blip2: Path) -> Any:
    import importlib

    module, name = QFormerProcessor.images.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), name).from_pretrained(blip2)
    except (OSError, ValueError) as error:
        raise InputError(f"--blip2: the image processor in {blip2} cannot be read: {in_words(error)}.") from error


def _make_config(bridge: Any, text: Any, image_token: int) -> Any:
    """BLIP-2's configuration with another text model.

    The image token is the token of unknown text: LLaMA's tokenizer falls back to bytes and never produces it, so the
    vocabulary and all logits stay unchanged.
    """
    from transformers import Blip2Config

    config = Blip2Config(
        vision_config=bridge.vision_config.to_dict(),
        qformer_config=bridge.qformer_config.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=bridge.num_query_tokens,
        image_token_index=image_token,
    )
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.dtype = text.dtype
    return config


def _processor_files(config: Any, tokenizer: Any) -> dict[str, str]:
    token = str(tokenizer.convert_ids_to_tokens(config.image_token_id))
    return minigpt4_processor(token, config.num_query_tokens, config.vision_config.image_size)


def _read_config(option: str, directory: Path, model_type: str) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{option}: {directory / 'config.json'} cannot be read: {in_words(error)}.") from error
    if config.model_type != model_type:
        raise InputError(f"{option}: {directory} is {config.model_type!r}, expected {model_type!r}.")
    return config


def _expected_shapes(config: Any) -> dict[str, torch.Size]:
    """Shapes of all tensors of the checkpoint by name, from a model on the meta device."""
    from transformers import Blip2ForConditionalGeneration

    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if config.text_config.tie_word_embeddings:
        del shapes[f"{_TEXT}lm_head.weight"]
    return shapes


def _pieces(blip2: Path, projection: Path, vicuna: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """All tensors, each with its source file and its new name."""
    for file in _weight_files("--blip2", blip2):
        for name, tensor in _read(file, "--blip2"):
            if name.startswith(_FROM_BLIP2) and not name.endswith(_COMPUTED):
                yield file, name, tensor
    for name, tensor in _read(projection, "--projection"):
        if name not in _PROJECTION:
            raise InputError(
                f"--projection: {projection} also holds {name!r}: expected {' and '.join(_PROJECTION)} alone. A model "
                "that was trained further than MiniGPT-4's projection cannot be put together from these pieces."
            )
        yield projection, _PROJECTION[name], tensor
    for file in _weight_files("--vicuna", vicuna):
        for name, tensor in _read(file, "--vicuna"):
            if not name.endswith(_COMPUTED):
                yield file, _TEXT + name, tensor


def _weight_files(option: str, directory: Path) -> list[Path]:
    """The weight files of a checkpoint; safetensors are preferred."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if index.is_file():
            try:
                return [directory / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, AttributeError) as error:
                raise InputError(f"{option}: {index} is damaged ({error}).") from error
        if (directory / name).is_file():
            return [directory / name]
    raise InputError(f"{option}: {directory} has neither model.safetensors nor pytorch_model.bin, whole or in shards.")


def _read(file: Path, option: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by name."""
    if not file.is_file():
        raise InputError(f"{option}: file {file} does not exist.")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118
                    yield name, stream.get_tensor(name)
            return
        # Newer files are zip archives, whose tensors can be mapped into memory separately.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{option}: {file} cannot be read: {in_words(error)} (Nothing but tensors is read from such a file.)"
        ) from error
    yield from _state_of(loaded, file, option).items()


def _state_of(loaded: Any, file: Path, option: str) -> Mapping[str, Tensor]:
    """The tensors of a pickled checkpoint, which may be under the key `model`."""
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{option}: {file} is no table of tensors, neither itself nor under 'model'.")
    return state


def _check_tensor(
    file: Path, name: str, tensor: Tensor, expected: Mapping[str, torch.Size], written: Mapping[str, str]
) -> None:
    if name not in expected:
        raise InputError(f"{file}: unexpected tensor {_original(name)!r}: the configuration has no such part.")
    if name in written:
        raise InputError(f"{file}: {_original(name)!r} occurs twice.")
    if tensor.shape != expected[name]:
        raise InputError(
            f"{file}: {_original(name)!r} has shape {tuple(tensor.shape)}, expected {tuple(expected[name])}: "
            "the pieces belong to models of different sizes."
        )


def _check_complete(expected: Mapping[str, Any], written: Mapping[str, str], sources: Mapping[str, Path]) -> None:
    missing = [name for name in expected if name not in written]
    if not missing:
        return
    first = missing[0]
    option = "--vicuna" if first.startswith(_TEXT) else "--blip2" if first.startswith(_FROM_BLIP2) else "--projection"
    more = f" (and {len(missing) - 1} more tensors)" if len(missing) > 1 else ""
    raise InputError(f"{option}: {sources[option]} lacks {_original(first)!r}{more}.")


def _original(name: str) -> str:
    """A tensor's name in its source file."""
    return next((old for old, new in _PROJECTION.items() if new == name), name.removeprefix(_TEXT))


class _Shards:
    """Writer of weight files of limited size, and of their index.

    Attributes:
        file_of: File of every tensor added so far, by name.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.file_of: dict[str, str] = {}
        self._directory = directory
        self._limit = limit
        self._waiting: dict[str, Tensor] = {}
        self._bytes = self._total = self._count = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > self._limit:
            self._flush()
        # A copy: tensors of a pickled file may be views, which safetensors refuses.
        self._waiting[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.file_of[name] = f"model-{self._count + 1:05d}.safetensors"
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        self._count += 1
        write_tensors(at(self._directory / f"model-{self._count:05d}.safetensors"), self._waiting, {"format": "pt"})
        self._waiting, self._bytes = {}, 0

    def finish(self) -> None:
        """Writes the last file and the index."""
        self._flush()
        index = {"metadata": {"total_size": self._total}, "weight_map": self.file_of}
        path = self._directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
