"""Control text in what people write: image markers, and the special tokens of a tokenizer.

Data made for one family holds its image marker in the question (`<image>\\nWhat is this?`). Here a picture is an entry
of its own and the family puts it in its place, so a marker in front of a question about a picture is taken off.
Anywhere else a marker would add an image position, and another special token would end a turn or an answer: such text
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_OPEN = r"<\|vision_start\|>|<im_start>|<Img>"
_PLACE = (
    r"<\|?image(?:[ _]?\d+)?\|?>|<\|image_pad\|>|<ImageHere>|<Img>|\[IMG\]|<IMG_CONTEXT>|<image_soft_token>"
    r"|<start_of_image>|<image_placeholder>|<im_patch>|<\|placeholder\|>"
)
_CLOSE = r"<\|vision_end\|>|<im_end>|</Img>|<end_of_image>|\[IMG_END\]"
_MARKER = re.compile(f"{_OPEN}|{_PLACE}|{_CLOSE}", re.IGNORECASE)
"""Markers of an image in current families, in any case: `<image>` (LLaVA, BLIP-2, Idefics), `<|image|>` (Llama 3.2),
`<|image_1|>` (Phi-3), `<image 1>` (MMMU), `<|image_pad|>` (Qwen-VL), `<Img><ImageHere></Img>` (MiniGPT-4),
`<img>...</img>` (InternVL), `[IMG]` (Pixtral), `<start_of_image>` (Gemma 3), `<im_start><im_patch><im_end>` (LLaVA 1).
"""
_LEADING = re.compile(rf"\s*(?:{_OPEN})?\s*(?:{_PLACE})\s*(?:{_CLOSE})?\s*", re.IGNORECASE)


def without_leading_marker(question: str) -> str:
    """A question without the one image marker that it begins with, if it does.

    >>> without_leading_marker("<|vision_start|><|image_pad|><|vision_end|>What is it?")
    'What is it?'
    """
    found = _LEADING.match(question) if _may_hold_one(question) else None
    return question if found is None else question[found.end() :]


def image_marker(text: str) -> str | None:
    """The first image marker in a text, as it is written there."""
    found = _MARKER.search(text) if _may_hold_one(text) else None
    return None if found is None else found[0]


def _may_hold_one(text: str) -> bool:
    return "<" in text or "[" in text  # much faster than the pattern, and most texts hold neither


def control_token_finder(tokenizer: Any) -> Callable[[str], str | None]:
    """Finds the first special token of a tokenizer in a text: what the tokenizer would read as control, not as text."""
    special = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    if not special:
        return lambda text: None
    pattern = re.compile("|".join(map(re.escape, reversed(special))))

    def find(text: str) -> str | None:
        found = pattern.search(text)
        return None if found is None else found[0]

    return find
