"""Checkpoints on the Hugging Face hub: found in its cache, or downloaded to it."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from odedit.errors import InputError, in_words

INDEX = "model.safetensors.index.json"
_ANSWER_S = 5.0
# Neither pickled weights nor the same weights once more, as some repositories hold them.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_PATTERNS = (*_SMALL_FILES, "model.safetensors")


@lru_cache
def snapshot(hub_id: str) -> Path:
    """The folder of a hub id's files in the local cache, downloaded first if they are not there.

    One process always gets the same folder for a hub id, also if the hub gets another version meanwhile.

    Raises:
        InputError: The cache does not have the files, and the hub does not answer or refuses them.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    local = "or give a local folder with the checkpoint (backbone.checkpoint=/path)"
    try:
        commit = _commit(hub_id)
    except HFValidationError as error:
        raise InputError(f"backbone.checkpoint {hub_id!r} is neither a folder nor a hub id: {error}") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        cached = _cached(hub_id)
        if cached is not None:
            return cached
        gated = isinstance(error, GatedRepoError)
        why = "gives it only to accounts that were granted access" if gated else "has no such model, or a private one"
        raise InputError(
            f"backbone.checkpoint {hub_id!r}: the Hugging Face hub {why}. Check the name, set HF_TOKEN, {local}."
        ) from error
    except Exception as error:  # the hub's own errors, and those of its HTTP client, which is another in each version
        cached = _cached(hub_id)
        if cached is not None:
            return cached
        offline = isinstance(error, OfflineModeIsEnabled)
        why = "is not asked (HF_HUB_OFFLINE is set)" if offline else f"does not answer ({in_words(error)})"
        raise InputError(
            f"backbone.checkpoint {hub_id!r} is no folder here; the Hugging Face hub {why}, and the local cache lacks "
            f"some of the model's files. Download it where there is a network, {local}."
        ) from error
    return _downloaded(hub_id, commit)


def _commit(hub_id: str) -> str:
    """The hub's newest version, asked once and without the library's retries."""
    from huggingface_hub import HfApi

    return str(HfApi().model_info(hub_id, timeout=_ANSWER_S).sha)


def _cached(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=[*_PATTERNS]))
    except LocalEntryNotFoundError:
        return None
    # A download that was broken off, or of other files alone, leaves a folder too.
    weights = ["model.safetensors"] if (folder / "model.safetensors").exists() else shards_of(folder)
    is_whole = bool(weights) and all((folder / name).exists() for name in ("config.json", *weights))
    return folder if is_whole else None


def _downloaded(hub_id: str, commit: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, revision=commit, allow_patterns=[*_PATTERNS]))
        shards = shards_of(folder)
        if shards and not (folder / "model.safetensors").exists():
            snapshot_download(hub_id, revision=commit, allow_patterns=shards)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"backbone.checkpoint {hub_id!r} could not be downloaded: {in_words(error)}. Try again; what has arrived "
            "is kept."
        ) from error
    return folder


def shards_of(folder: Path) -> list[str]:
    """The weight files that a checkpoint's index names, sorted; none if there is no index.

    Raises:
        InputError: The index cannot be read.
    """
    path = folder / INDEX
    if not path.exists():
        return []
    try:
        return sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"backbone.checkpoint {str(folder)!r}: {INDEX} cannot be read as an index of weight files "
            f"({type(error).__name__}: {error}). Fetch the file again."
        ) from error
