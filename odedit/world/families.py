"""Families of the embedded model, all small enough to train on one CPU thread.

| name | vision tower | connector | text model | format of the checkpoint |
|---|---|---|---|---|
| `blip2` | ViT | Q-Former, 8 queries | OPT | `Salesforce/blip2-opt-2.7b` |
| `minigpt4` | ViT | Q-Former, 8 queries | LLaMA | MiniGPT-4, as a `Blip2ForConditionalGeneration` |
| `llava` | CLIP | two layers per patch, 16 patches | LLaMA | `llava-hf/llava-1.5-7b-hf` |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odedit.errors import InputError, unknown_name
from odedit.inputs.plain import minigpt4_processor
from odedit.world.layout import Layout
from odedit.world.model import (
    HIDDEN_SIZE,
    IMAGE_MEAN,
    IMAGE_SIZE,
    IMAGE_STD,
    INIT_STD,
    PATCH_SIZE,
    VISION_WIDTH,
    EncodedPictures,
    Family,
)
from odedit.world.vocabulary import VOCABULARY

_VISION: dict[str, Any] = {
    "hidden_size": VISION_WIDTH, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3,
    "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
}  # fmt: skip
_QFORMER = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 3, "cross_attention_frequency": 1, "encoder_hidden_size": VISION_WIDTH,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64,
    "initializer_range": INIT_STD,
}  # fmt: skip
_SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
_LLAMA_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_LLAMA_POSITIONS = 256


class Blip2(Family):
    """ViT, Q-Former and OPT. Texts begin with `</s>`, as those of OPT do; the image processor is BLIP's."""

    name = "blip2"
    layout = Layout(picture_first=True)
    special_tokens = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
    begin = "</s>"
    num_image_tokens = 8
    summary_width = 96
    max_length = 128

    def _text_config(self) -> Any:
        from transformers import OPTConfig

        return OPTConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN_SIZE, word_embed_proj_dim=HIDDEN_SIZE, num_hidden_layers=4,
            num_attention_heads=4, ffn_dim=512, max_position_embeddings=self.max_length, dropout=0.0,
            attention_dropout=0.0, layerdrop=0.0, pad_token_id=self.pad_id, bos_token_id=self.begin_id,
            eos_token_id=self.end_id, init_std=INIT_STD,
        )  # fmt: skip

    def _empty_model(self) -> nn.Module:
        from transformers import Blip2Config, Blip2ForConditionalGeneration

        config = Blip2Config(
            text_config=self._text_config().to_dict(), vision_config={**_VISION, "initializer_range": INIT_STD},
            qformer_config=dict(_QFORMER), num_query_tokens=self.num_image_tokens, image_token_index=self.image_id,
            initializer_range=INIT_STD,
        )  # fmt: skip
        model: nn.Module = Blip2ForConditionalGeneration(config)
        return model

    def vision_modules(self, model: Any) -> list[nn.Module]:
        return [model.vision_model.embeddings, model.vision_model.encoder]

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        tower = model.vision_model
        states: Tensor = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
        return states[:, 1:]

    def encode_pictures(self, model: Any, pixels: Tensor) -> EncodedPictures:
        encoded = model.get_image_features(pixels)
        return EncodedPictures(encoded.pooler_output, encoded.qformer_outputs.last_hidden_state.mean(1))

    def decoder(self, model: Any) -> nn.Module:
        decoder: nn.Module = model.language_model.model
        return decoder

    def processor_files(self) -> dict[str, dict[str, object] | str]:
        return {
            "preprocessor_config.json": _image_processor(
                {"image_processor_type": "BlipImageProcessor", "processor_class": "Blip2Processor"}, _SQUARE
            ),
            "processor_config.json": {"num_query_tokens": self.num_image_tokens, "processor_class": "Blip2Processor"},
        }


class MiniGPT4(Blip2):
    """ViT, Q-Former and LLaMA, with MiniGPT-4's prompt (arXiv 2304.10592)."""

    name = "minigpt4"
    layout = Layout("###Human: <Img>", "</Img> {}###Assistant:", "###Human: {}###Assistant:")
    special_tokens = _LLAMA_TOKENS
    begin = "<s>"
    max_length = _LLAMA_POSITIONS

    def _text_config(self) -> Any:
        return _llama_config(self)

    def processor_files(self) -> dict[str, dict[str, object] | str]:
        return {
            "preprocessor_config.json": _image_processor({"image_processor_type": "BlipImageProcessor"}, _SQUARE),
            **minigpt4_processor("<image>", self.num_image_tokens, IMAGE_SIZE),
        }


class Llava(Family):
    """CLIP, a two-layer MLP per patch, and LLaMA: LLaVA-1.5 (arXiv 2310.03744).

    LLaVA-1.5 uses the patch states of CLIP's second to last layer (of 24); this model those of the last layer (of 4).
    """

    name = "llava"
    layout = Layout("USER: ", "\n{} ASSISTANT:", "USER: {} ASSISTANT:")
    special_tokens = _LLAMA_TOKENS
    begin = "<s>"
    num_image_tokens = (IMAGE_SIZE // PATCH_SIZE) ** 2
    summary_width = HIDDEN_SIZE
    max_length = _LLAMA_POSITIONS

    def _empty_model(self) -> nn.Module:
        from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig(
            text_config=_llama_config(self), vision_config=CLIPVisionConfig(**_VISION, projection_dim=VISION_WIDTH),
            image_token_index=self.image_id, image_seq_length=self.num_image_tokens, vision_feature_layer=-1,
            vision_feature_select_strategy="default", initializer_range=INIT_STD,
        )  # fmt: skip
        model: nn.Module = LlavaForConditionalGeneration(config)
        return model

    def vision_modules(self, model: Any) -> list[nn.Module]:
        tower = model.model.vision_tower
        return [tower.embeddings, tower.pre_layrnorm, tower.encoder]

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        states: Tensor = model.model.vision_tower(pixels).last_hidden_state
        return states[:, 1:]

    def encode_pictures(self, model: Any, pixels: Tensor) -> EncodedPictures:
        features = torch.stack(list(model.get_image_features(pixels).pooler_output))
        return EncodedPictures(features, features.mean(1))

    def decoder(self, model: Any) -> nn.Module:
        decoder: nn.Module = model.model.language_model
        return decoder

    def processor_files(self) -> dict[str, dict[str, object] | str]:
        image_processor: dict[str, object] = {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
            "do_center_crop": True, "crop_size": _SQUARE,
        }  # fmt: skip
        return {
            "preprocessor_config.json": _image_processor(image_processor, {"shortest_edge": IMAGE_SIZE}),
            "processor_config.json": {
                "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": PATCH_SIZE,
                "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default",
            },
            "chat_template.jinja": _LLAVA_CHAT,
        }  # fmt: skip


# The pictures of a turn come before its text, in whatever order the message has them.
_LLAVA_CHAT = (
    "{%- for turn in messages -%}"
    "{%- set content = turn.content -%}"
    "{{- turn.role.upper() + ': ' if turn.role != 'system' -}}"
    "{%- if content is string -%}{{- content + ' ' -}}{%- else -%}"
    "{%- for part in content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in content if part.type == 'text' -%}{{- part.text + ' ' -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- 'ASSISTANT:' if add_generation_prompt -}}\n"
)


def _llama_config(family: Family) -> Any:
    """A LLaMA about as large as the OPT of `blip2`, with an untied head like LLaMA's."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN_SIZE, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=344, max_position_embeddings=_LLAMA_POSITIONS, attention_dropout=0.0,
        pad_token_id=family.pad_id, bos_token_id=family.begin_id, eos_token_id=family.end_id,
        tie_word_embeddings=False, initializer_range=INIT_STD,
    )  # fmt: skip


def _image_processor(settings: dict[str, object], size: dict[str, int]) -> dict[str, object]:
    return {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD), **settings,
        "resample": 3, "rescale_factor": 1 / 255, "size": size,
    }  # fmt: skip


FAMILIES: dict[str, Family] = {family.name: family for family in (Blip2(), MiniGPT4(), Llava())}
_BY_TYPES = {("blip-2", "opt"): "blip2", ("blip-2", "llama"): "minigpt4", ("llava", "llama"): "llava"}


def find(name: str) -> Family:
    """The family of that name. Raises InputError if it does not exist."""
    if name not in FAMILIES:
        raise unknown_name("family of the embedded model", name, FAMILIES)
    return FAMILIES[name]


def of_checkpoint(directory: Path) -> Family:
    """The family of a checkpoint, by its configuration.

    Raises:
        InputError: The configuration cannot be read, or describes no family of the embedded model.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: config.json cannot be read: {error}") from error
    types = (config.get("model_type"), (config.get("text_config") or {}).get("model_type"))
    if types not in _BY_TYPES:
        known = ", ".join(f"{name} ({model} with {text})" for (model, text), name in _BY_TYPES.items())
        raise InputError(f"{directory}: is {types[0]!r} with text model {types[1]!r}; expected one of {known}.")
    return FAMILIES[_BY_TYPES[types]]
