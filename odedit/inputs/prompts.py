"""The one rule for prompts: how a question is dressed, what the target is, where the target begins.

Every probe of a run, before and after the edit, goes through the same `Template`; its name is stored with the results.
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
    """Text around a question and around the beginning of a caption; `{prompt}` is replaced.

    >>> TEMPLATES["mmedit"].render(Probe("What sport is this?", "tennis"))
    ('Question: What sport is this? Short answer:', ' tennis')
    """

    name: str
    question: str
    caption: str

    def render(self, probe: Probe) -> tuple[str, str]:
        """Returns the dressed prompt and the target, which starts with the one space that separates them."""
        pattern = self.caption if probe.is_caption else self.question
        return pattern.replace("{prompt}", probe.prompt.strip()), " " + probe.target.strip()


TEMPLATES = {
    template.name: template
    for template in (
        # The question form that BLIP-2 and the MMEdit benchmark (arXiv 2310.08475) use.
        Template("mmedit", "Question: {prompt} Short answer:", "{prompt}"),
        Template("raw", "{prompt}", "{prompt}"),
    )
}


def find_template(name: str) -> Template:
    """Returns the preset of that name. Raises InputError for an unknown one."""
    if name not in TEMPLATES:
        raise unknown_name("prompt template", name, TEMPLATES)
    return TEMPLATES[name]


@dataclass(frozen=True)
class Frame:
    """What a chat model was trained to see around a user's turn; the template dresses the turn itself.

    Attributes:
        before: Text in front of the dressed prompt.
        after: Text behind it, in front of the target.
        begins: Whether this is the beginning of the text, where the tokenizer puts its special tokens.
        spaced: Whether the target follows after its space; not where `after` ends a line.
    """

    before: str = ""
    after: str = ""
    begins: bool = True
    spaced: bool = True


def tokenize(tokenizer: Any, template: Template, probe: Probe, frame: Frame = Frame()) -> tuple[list[int], int]:
    """Token ids of prompt and target together, and the index of the target's first token.

    Tokenised in one go, the boundary found from character offsets: two separate calls give other tokens where a merge
    crosses the boundary, and then the model is asked for tokens that it never sees in running text.

    Raises:
        InputError: Prompt or target holds an image marker or a special token of the tokenizer.
        ValueError: The target has no token.
    """
    dressed, target = template.render(probe)
    prompt = frame.before + dressed + frame.after
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
    """Raises InputError if the probe's own texts hold what a model or its tokenizer reads as control."""
    for name, text in (("prompt", probe.prompt), ("target", probe.target)):
        marker, token = image_marker(text), find(text)
        if marker is not None or token is not None:
            what = f"the image marker {marker!r}" if marker else f"the special token {token!r} of the model's tokenizer"
            raise InputError(
                f"the {name} {text!r} holds {what}: it would not be read as text. Remove it; a picture is given beside "
                "its question."
            )
