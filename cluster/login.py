"""The login to a Ray cluster: its mode, and the token. Drivers, `odedit submit` and its jobs all use this one."""

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
    """A token and where it was found.

    Attributes:
        source: The variable that holds or names it, or the path of Ray's own file.
        text: The token, without white space around it; never empty.
    """

    source: str
    text: str


def modes() -> list[str]:
    """Modes in which a login is to be tried, in this order.

    `RAY_AUTH_MODE` is taken as it is set. Otherwise a token that the environment names is used. The one in
    `~/.ray/auth_token` is for a cluster that has refused a login without token: the file may be another cluster's.

    Raises:
        JobError: `RAY_AUTH_MODE` is no mode of Ray's.
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
    """The token, from where Ray takes it: `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, `~/.ray/auth_token`.

    Raises:
        JobError: There is none, or it is empty.
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
    """What a cluster that refused a login in this mode has done, as the end of a sentence, and what to do."""
    if mode == DISABLED:
        return f"asks for a token, and none is given. {_ADVICE}"
    return f"refuses the token in {token().source}. {_ADVICE}"


def read_again() -> None:
    """Makes Ray read mode and token from the environment a second time: the first time was its import."""
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if not ray.is_initialized():
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _rays_file() -> Path:
    return Path.home() / ".ray" / "auth_token"
