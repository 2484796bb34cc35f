"""Prompt templates, and the tokens of a prompt and its target.

Every probe of a run, before and after the edit, uses the same `Template`, whose name is stored with the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from odedit.errors import InputError, unknown_name
from odedit.inputs.batch import Probe
from odedit.inputs.markers import control_token_finder, image_marker


@dataclass(frozen=True)
class Template:
    """Text around a question and around the beginning of a caption, with `{prompt}` as placeholder.

    >>> TEMPLATES["mmedit"].render(Probe("What sport is this?", "tennis"))
    ('Question: What sport is this? Short answer:', ' tennis')
    """

    name: str
    question: str
    caption: str

    def render(self, probe: Probe) -> tuple[str, str]:
        """The complete prompt, and the target with the one space that separates them."""
        pattern = self.caption if probe.is_caption else self.question
        return pattern.replace("{prompt}", probe.prompt.strip()), " " + probe.target.strip()


TEMPLATES = {
    template.name: template
    for template in (
        # As in BLIP-2 and the MMEdit benchmark (arXiv 2310.08475).
        Template("mmedit", "Question: {prompt} Short answer:", "{prompt}"),
        Template("raw", "{prompt}", "{prompt}"),
    )
}


def find_template(name: str) -> Template:
    """The preset of this name. Raises InputError for an unknown name."""
    if name not in TEMPLATES:
        raise unknown_name("prompt template", name, TEMPLATES)
    return TEMPLATES[name]


@dataclass(frozen=True)
class Frame:
    """A chat model's text around a user turn; the template applies inside the turn.

    Attributes:
        before: Text before the prompt.
        after: Text between prompt and target.
        begins: Whether the text begins here, so that the tokenizer adds its special tokens.
        spaced: Whether a space precedes the target; false if `after` ends a line.
    """

    before: str = ""
    after: str = ""
    begins: bool = True
    spaced: bool = True


def tokenize(tokenizer: Any, template: Template, probe: Probe, frame: Frame = Frame()) -> tuple[list[int], int]:
    """Token ids of prompt and target together, and the index of the target's first token.

    One call, with the boundary from character offsets: two calls give other tokens if a merge crosses the boundary,
    tokens that the model never sees in running text.

    Raises:
        InputError: Prompt or target contains an image marker or a special token of the tokenizer.
        ValueError: The target has no token.
    """
    rendered, target = template.render(probe)
    prompt = frame.before + rendered + frame.after
    target = target if frame.spaced else target.lstrip()
    encoded = tokenizer(prompt + target, return_offsets_mapping=True, add_special_tokens=frame.begins)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    _check_plain(probe, _finder(tokenizer))
    # A special token has the empty span (0, 0) and belongs to the prompt.
    first = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), None)
    if first is None or not probe.target.strip():
        raise ValueError(f"target {probe.target!r} of the prompt {probe.prompt!r} has no token.")
    return list(ids), first


@lru_cache(maxsize=8)
def _finder(tokenizer: Any) -> Callable[[str], str | None]:
    return control_token_finder(tokenizer)


def _check_plain(probe: Probe, find: Callable[[str], str | None]) -> None:
    """Raises InputError if the probe's texts contain an image marker or a special token."""
    for name, text in (("prompt", probe.prompt), ("target", probe.target)):
        marker, token = image_marker(text), find(text)
        if marker is not None or token is not None:
            what = f"the image marker {marker!r}" if marker else f"the special token {token!r} of the model's tokenizer"
            raise InputError(
                f"the {name} {text!r} holds {what}: it would not be read as text. Remove it; a picture has a field of "
                "its own."
            )
