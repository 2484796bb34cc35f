"""Checkpoints on the Hugging Face hub, in its local cache or downloaded to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from odedit.errors import InputError, in_words

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_ANSWER_S = 5.0
# No weights: some repositories hold them pickled, or twice.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


@lru_cache
def snapshot(hub_id: str) -> Path:
    """The local cache's folder with a hub id's configuration, tokenizer and processor, downloaded if needed.

    A process keeps its first version even if the hub gets another one meanwhile.

    Raises:
        InputError: The cache lacks the files, and the hub does not answer or refuses them.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        _request_info(hub_id)
    except HFValidationError as error:
        raise InputError(f"backbone.checkpoint {hub_id!r} is neither a folder nor a hub id: {error}") from error
    except Exception as error:  # errors of the hub and of its HTTP client, which differs between versions
        cached = _cached(hub_id)
        if cached is None:
            raise _unavailable(hub_id, error) from error
        return cached
    return _downloaded(hub_id, _SMALL_FILES)


@lru_cache
def snapshot_with_weights(hub_id: str) -> Path:
    """The folder of `snapshot`, with the weights. Raises InputError as `snapshot`."""
    folder = snapshot(hub_id)
    if not _has_weights(folder):
        try:
            _request_info(hub_id)
        except Exception as error:  # as in `snapshot`
            raise _unavailable(hub_id, error) from error
        _downloaded(hub_id, (WEIGHTS,), folder.name)
        if not (folder / WEIGHTS).exists():
            _downloaded(hub_id, shards_of(folder), folder.name)
    return folder


def _request_info(hub_id: str) -> None:
    """One request without the library's retries. Raises the hub's or the network's error if this id is unavailable."""
    from huggingface_hub import HfApi

    HfApi().model_info(hub_id, timeout=_ANSWER_S)


def _unavailable(hub_id: str, error: Exception) -> InputError:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    local = "or give a local folder with the checkpoint (backbone.checkpoint=/path)"
    if isinstance(error, GatedRepoError | RepositoryNotFoundError):
        gated = isinstance(error, GatedRepoError)
        why = "gives it only to accounts that were granted access" if gated else "has no such model, or a private one"
        return InputError(
            f"backbone.checkpoint {hub_id!r}: the Hugging Face hub {why}. Check the name, set HF_TOKEN, {local}."
        )
    offline = isinstance(error, OfflineModeIsEnabled)
    why = "is not asked (HF_HUB_OFFLINE is set)" if offline else f"does not answer ({in_words(error)})"
    return InputError(
        f"backbone.checkpoint {hub_id!r} is no folder here; the Hugging Face hub {why}, and the local cache lacks "
        f"some of the model's files. Download it where there is a network, {local}."
    )


def _cached(hub_id: str) -> Path | None:
    """Folder of the latest downloaded version; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=[*_SMALL_FILES]))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / "config.json").exists() else None


def _has_weights(folder: Path) -> bool:
    """Whether all weight files exist; an interrupted download leaves an incomplete folder."""
    names = [WEIGHTS] if (folder / WEIGHTS).exists() else shards_of(folder)
    return bool(names) and all((folder / name).exists() for name in names)


def _downloaded(hub_id: str, patterns: Sequence[str], commit: str | None = None) -> Path:
    """Downloads files of a commit; without one of the newest, which the cache then records as its main version."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=[*patterns]))
    except Exception as error:
        raise InputError(
            f"backbone.checkpoint {hub_id!r} could not be downloaded: {in_words(error)}. Try again; finished files "
            "are kept."
        ) from error


def shards_of(folder: Path) -> list[str]:
    """Sorted weight files of a checkpoint's index; empty if there is no index.

    Raises:
        InputError: The index cannot be read, or names a file that is not a safetensors file in its own folder.
    """
    path = folder / INDEX
    if not path.exists():
        return []
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        foreign = next((name for name in names if Path(name).name != name or Path(name).suffix != ".safetensors"), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"backbone.checkpoint {str(folder)!r}: {INDEX} cannot be read as an index of weight files "
            f"({type(error).__name__}: {error}). Fetch the file again."
        ) from error
    if foreign is not None:
        raise InputError(
            f"backbone.checkpoint {str(folder)!r}: {INDEX} names the weight file {foreign!r}, which is not a "
            "safetensors file in its own folder. Fetch the checkpoint again."
        )
    return names
