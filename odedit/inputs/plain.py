"""Use of a checkpoint without odedit: the text for the family's processor, and the processor's settings."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class PlainUse:
    """Input of a model in a program that has only transformers.

    Attributes:
        with_picture, without_picture: Text around the placeholder `{text}`, as `AutoProcessor` takes it.
        side: Width and height to which pictures are resized first; None: the processor resizes them.
        stop: Text at which an answer ends, besides end tokens; None: there is none.
        text_model: Attribute of the model that answers without a picture; None: the model itself.
    """

    with_picture: str = "{text}"
    without_picture: str = "{text}"
    side: int | None = None
    stop: str | None = None
    text_model: str | None = None


def minigpt4_processor(image_token: str, num_query_tokens: int, side: int) -> dict[str, str]:
    """Files by name with which `AutoProcessor` serves MiniGPT-4.

    The library has no processor for MiniGPT-4's prompt. LLaVA's writes out the image token inside a text, as often as
    there are patches: here one patch as large as the picture, and `num_query_tokens` - 1 further tokens.

    Args:
        image_token: Token of the picture in a text.
        side: Width and height of the image tower's input, in pixels.
    """
    settings = {
        "image_token": image_token,
        "num_additional_image_tokens": num_query_tokens - 1,
        "patch_size": side,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "full",
    }
    chat = (
        "{%- for turn in messages -%}"
        "{{- '###Human: ' if turn.role == 'user' else '###Assistant: ' if turn.role == 'assistant' -}}"
        "{%- if turn.content is string -%}{{- turn.content -}}{%- else -%}"
        "{%- for part in turn.content if part.type == 'image' -%}{{- '<Img>"
        + image_token
        + "</Img> ' -}}{%- endfor -%}"
        "{%- for part in turn.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{{- '###Assistant:' if add_generation_prompt -}}\n"
    )
    return {"processor_config.json": json.dumps(settings, indent=2) + "\n", "chat_template.jinja": chat}
