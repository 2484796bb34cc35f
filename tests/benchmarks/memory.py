"""Memory by model and editor, by the formula of `odedit.editing.memory`; models are built without weights.

    python -m tests.benchmarks.memory

Sizes are those of the published configurations; sequences have a picture of 640 x 480 as the model is served it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from odedit import ObjectiveConfig, load_editor
from odedit.backbones.auto import Auto
from odedit.editing.memory import GIB, needed
from odedit.editors.base import Editor

EDITORS = ("wise", "tpatcher", "ftl", "lora")
EDITS = 8
TEXT, ANSWER = 32, 4
"""Tokens of a question in its template, and of an answer."""


@dataclass(frozen=True)
class Size:
    """A published configuration.

    Attributes:
        config: Class of the library.
        text, vision: Its parts.
        positions: Image positions of a picture of 640 x 480.
    """

    config: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    positions: int


def _text(kind: str, width: int, inner: int, layers: int, heads: int, shared: int, words: int) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": words, "head_dim": width // heads,
    }  # fmt: skip


_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
_OPT = {
    "model_type": "opt", "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 50304,
}  # fmt: skip
_QWEN3_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
SIZES = {
    "blip2-opt-2.7b": Size("Blip2Config", _OPT, {}, 32),
    "llava-1.5-7b": Size("LlavaConfig", _text("llama", 4096, 11008, 32, 32, 32, 32064), _CLIP, 576),
    "llava-1.5-13b": Size("LlavaConfig", _text("llama", 5120, 13824, 40, 40, 40, 32064), _CLIP, 576),
    "qwen2.5-vl-7b": Size(
        "Qwen2_5_VLConfig",
        _text("qwen2_5_vl_text", 3584, 18944, 28, 28, 4, 152064),
        {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": 3584},
        391,
    ),
    "qwen2.5-vl-72b": Size(
        "Qwen2_5_VLConfig",
        _text("qwen2_5_vl_text", 8192, 29568, 80, 64, 8, 152064),
        {"hidden_size": 1280, "intermediate_size": 3456, "depth": 32, "num_heads": 16, "out_hidden_size": 8192},
        391,
    ),
    "qwen3-vl-8b": Size(
        "Qwen3VLConfig",
        _text("qwen3_vl_text", 4096, 12288, 36, 32, 8, 151936),
        {**_QWEN3_VISION, "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
        300,
    ),
}  # fmt: skip


def shapes(size: Size) -> Auto:
    """A model of this size on the meta device, without processor and weights."""
    vision = {"vision_config": dict(size.vision)} if size.vision else {}
    config = getattr(transformers, size.config)(text_config=dict(size.text), tie_word_embeddings=False, **vision)
    name = Auto.architecture_of(config).model_class
    with torch.device("meta"):
        model = getattr(transformers, name)(config).to(torch.bfloat16)
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=2)
    return Auto(model, SimpleNamespace(tokenizer=tokenizer), name, lambda: "")


def fitted(name: str, model: Auto) -> Editor:
    """An editor with its defaults, fitted to a model."""
    editor = load_editor(name)
    return load_editor(name, dict(editor.fitted(model)))


def table(objective: str) -> str:
    """Markdown: GiB of the weights, and of these with `EDITS` edits of each editor."""
    lines = [
        f"| {EDITS} edits together, {objective}, bfloat16, GiB | weights | " + " | ".join(EDITORS) + " |",
        "|---|" + "--:|" * (1 + len(EDITORS)),
    ]
    for name, size in SIZES.items():
        model = shapes(size)
        cells = []
        for editor_name in EDITORS:
            need = needed(
                model, fitted(editor_name, model), ObjectiveConfig(objective), edits=EDITS,
                positions=size.positions + TEXT + ANSWER, tokens=ANSWER,
            )  # fmt: skip
            cells.append(f"{need.total / GIB:.1f}")
        lines.append(f"| `{name}` | {need.model / GIB:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table("native"))
    print()
    print(table("odedit"))
