"""Where a family puts the picture, the prompt and the answer of a line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The words around a prompt. An answer follows them after a space, and the end of text after the answer.

    The text in front of the picture and the text behind it are tokenized apart.

    Attributes:
        before: Text in front of the picture.
        behind: Text behind the picture; `{}` stands for the prompt.
        alone: Text without picture; `{}` stands for the prompt.
        picture_first: The picture's tokens stand even in front of the beginning of text.
    """

    before: str = ""
    behind: str = "{}"
    alone: str = "{}"
    picture_first: bool = False

    def around(self, prompt: str, has_picture: bool) -> tuple[str, str]:
        """Text in front of the picture's tokens and text behind them; without picture, all of it is behind.

        >>> Layout("USER: ", "{} ASSISTANT:", "USER: {} ASSISTANT:").around("who?", has_picture=True)
        ('USER: ', 'who? ASSISTANT:')
        """
        return (self.before, self.behind.format(prompt)) if has_picture else ("", self.alone.format(prompt))
