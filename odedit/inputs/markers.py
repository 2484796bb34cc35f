"""Control text in records: image markers, and the special tokens of a tokenizer.

Data made for one family contains its image marker in the question (`<image>\\nWhat is this?`). Here a picture is a
field of its own and the family inserts it, so a marker at the beginning of a question about a picture is removed.
Anywhere else a marker would add an image position, and another special token would end a turn or an answer: such text
is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_OPEN = r"<\|vision_start\|>|<im_start>|<Img>"
_IMAGE = (
    r"<\|?image(?:[ _]?\d+)?\|?>|<\|image_pad\|>|<ImageHere>|<Img>|\[IMG\]|<IMG_CONTEXT>|<image_soft_token>"
    r"|<start_of_image>|<image_placeholder>|<im_patch>|<\|placeholder\|>"
)
_CLOSE = r"<\|vision_end\|>|<im_end>|</Img>|<end_of_image>|\[IMG_END\]"
_MARKER = re.compile(f"{_OPEN}|{_IMAGE}|{_CLOSE}", re.IGNORECASE)
"""Image markers of current families, case-insensitive: `<image>` (LLaVA, BLIP-2, Idefics), `<|image|>` (Llama 3.2),
`<|image_1|>` (Phi-3), `<image 1>` (MMMU), `<|image_pad|>` (Qwen-VL), `<Img><ImageHere></Img>` (MiniGPT-4),
`<img>...</img>` (InternVL), `[IMG]` (Pixtral), `<start_of_image>` (Gemma 3), `<im_start><im_patch><im_end>` (LLaVA 1).
"""
_LEADING = re.compile(rf"\s*(?:{_OPEN})?\s*(?:{_IMAGE})\s*(?:{_CLOSE})?\s*", re.IGNORECASE)


def without_leading_marker(question: str) -> str:
    """The question without an image marker at its beginning.

    >>> without_leading_marker("<|vision_start|><|image_pad|><|vision_end|>What is it?")
    'What is it?'
    """
    match = _LEADING.match(question) if _may_contain_marker(question) else None
    return question if match is None else question[match.end() :]


def image_marker(text: str) -> str | None:
    """The first image marker in a text, as written there; None if there is none."""
    match = _MARKER.search(text) if _may_contain_marker(text) else None
    return None if match is None else match[0]


def _may_contain_marker(text: str) -> bool:
    return "<" in text or "[" in text  # much faster than the pattern


def control_token_finder(tokenizer: Any) -> Callable[[str], str | None]:
    """A function that returns the first special token of a tokenizer in a text; None if there is none."""
    special = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    if not special:
        return lambda text: None
    pattern = re.compile("|".join(map(re.escape, reversed(special))))

    def find(text: str) -> str | None:
        match = pattern.search(text)
        return None if match is None else match[0]

    return find
