"""Prompt layout of a family: order of picture, prompt and answer in a line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Text around a prompt. A space, the answer and the end-of-text token follow.

    The texts before and behind the picture are tokenized separately.

    Attributes:
        before: Text before the picture.
        behind: Text behind the picture; `{}` is the prompt.
        alone: Text of a line without picture; `{}` is the prompt.
        picture_first: True when the image tokens precede the beginning-of-text token.
    """

    before: str = ""
    behind: str = "{}"
    alone: str = "{}"
    picture_first: bool = False

    def around(self, prompt: str, has_picture: bool) -> tuple[str, str]:
        """Texts before and behind the image tokens; the first is empty without a picture.

        >>> Layout("USER: ", "{} ASSISTANT:", "USER: {} ASSISTANT:").around("who?", has_picture=True)
        ('USER: ', 'who? ASSISTANT:')
        """
        return (self.before, self.behind.format(prompt)) if has_picture else ("", self.alone.format(prompt))
