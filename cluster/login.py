"""Login to a Ray cluster, mode and token, as used by drivers, `odedit submit` and jobs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.packing import JobError

MODE = "RAY_AUTH_MODE"
DISABLED, TOKEN = "disabled", "token"
_TEXT, _PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_ADVICE = f"Set {_TEXT} to the cluster's token, or {_PATH} to a file with it."


@dataclass(frozen=True)
class Token:
    """A token and its source.

    Attributes:
        source: Environment variable that holds the token or its path, or the path of Ray's own file.
        text: Token without surrounding white space; never empty.
    """

    source: str
    text: str


def modes() -> list[str]:
    """Modes to try for a login, in order.

    `RAY_AUTH_MODE` decides if it is set; else a token in the environment does. The token in `~/.ray/auth_token` may
    belong to another cluster, so it is used only after a login without token was refused.

    Raises:
        JobError: `RAY_AUTH_MODE` has an unknown value.
    """
    mode = os.environ.get(MODE, "").strip().lower()
    if mode not in ("", DISABLED, TOKEN):
        raise JobError(f"{MODE}: got {mode!r}, expected {TOKEN} or {DISABLED}.")
    if mode:
        return [mode]
    if os.environ.get(_TEXT) or os.environ.get(_PATH):
        return [TOKEN]
    return [DISABLED, TOKEN] if _rays_file().is_file() else [DISABLED]


def token() -> Token:
    """The token from `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` or `~/.ray/auth_token`, the order of Ray.

    Raises:
        JobError: The token is missing or empty.
    """
    if text := os.environ.get(_TEXT):
        source, what = _TEXT, "the token"
    else:
        path = Path(os.environ.get(_PATH) or _rays_file())
        source, what = _PATH if os.environ.get(_PATH) else str(path), f"the token's file {path}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise JobError(f"{source}: {what} cannot be read ({why}). {_ADVICE}") from error
    if not text.strip():
        raise JobError(f"{source}: {what} is empty. {_ADVICE}")
    return Token(source, text.strip())


def refusal(mode: str) -> str:
    """End of a message about a refused login in this mode, with advice."""
    if mode == DISABLED:
        return f"asks for a token, and none is given. {_ADVICE}"
    return f"refuses the token in {token().source}. {_ADVICE}"


def read_again() -> None:
    """Makes Ray read mode and token from the environment again; it has read them when it was imported."""
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if not ray.is_initialized():
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _rays_file() -> Path:
    return Path.home() / ".ray" / "auth_token"
