"""Tiny checkpoints with random weights of models that `auto` reads, in the library's format, with a processor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny_models

VOCABULARY = 640
SPECIAL = (
    *tiny_models.SPECIAL, "<|video_pad|>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>", "<img>", "</img>", "<video>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)  # fmt: skip
IMAGE, IMAGE_PAD, VIDEO_PAD = (SPECIAL.index(token) for token in ("<image>", "<|image_pad|>", "<|video_pad|>"))
_TEXT: dict[str, Any] = {**tiny_models._TEXT, "vocab_size": VOCABULARY, "max_position_embeddings": 2048}
_VISION: dict[str, Any] = tiny_models._VISION
_SIGLIP: dict[str, Any] = {**_VISION, "vision_use_head": False, "model_type": "siglip_vision_model"}
_CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TURNS = (
    "{{ bos_token }}{% for turn in messages %}<start_of_turn>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_USER = (
    "{% for turn in messages %}USER: {% for part in turn.content %}{% if part.type == 'image' %}<image>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_IDEFICS = (
    "<|im_start|>{% for turn in messages %}User:{% for part in turn.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Parts:
    """A model and the files of its processor.

    Attributes:
        processor: Class of the processor, as processor_config.json names it, and its settings.
        chat: Chat template; None if the model has none.
        named: Special tokens that the processor reads as attributes of the tokenizer.
        begins: Whether the tokenizer adds `<s>`.
    """

    model: Any
    images: Any
    processor: str
    settings: dict[str, Any] = field(default_factory=dict)
    chat: str | None = None
    named: dict[str, str] = field(default_factory=dict)
    begins: bool = False


def _qwen(kind: str, **text: Any) -> Parts:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "initializer_range": 0.2}
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32}
    if kind == "Qwen2_5_VL":
        vision |= {"fullatt_block_indexes": [1]}
    if kind.startswith("Qwen3"):
        text |= {"head_dim": 8}
        rope["mrope_interleaved"] = True
        vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**_TEXT, "num_hidden_layers": 3, "rope_parameters": rope, **text}, vision_config=vision,
        image_token_id=IMAGE_PAD, vision_start_token_id=7, vision_end_token_id=8, video_token_id=VIDEO_PAD,
    )  # fmt: skip
    size = {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}
    merge = {"patch_size": 16, "size": size} if kind.startswith("Qwen3") else {"size": size}
    name = kind.replace("Moe", "")
    return Parts(
        getattr(transformers, f"{kind}ForConditionalGeneration")(config), Qwen2VLImageProcessorPil(**merge),
        f"{name}Processor", chat=_CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip


def _llava(text: Mapping[str, int] | None = None) -> Parts:
    model, images = tiny_models._llava(text or {})
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return Parts(model, images, "LlavaProcessor", {**settings, "image_token": "<image>"}, _USER, begins=True)


def _llava_of(kind: str, **text: Any) -> Parts:
    """A LLaVA with another text model, whose matrices of queries, keys and values, and perhaps of gate and input, are
    one."""
    import transformers
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=getattr(transformers, f"{kind}Config")(**{**_TEXT, **text}),
        vision_config=CLIPVisionConfig(**_VISION), image_token_index=IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return dataclasses.replace(_llava(), model=LlavaForConditionalGeneration(config))


def _glm4v() -> Parts:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": 32,
        "image_size": 56, "initializer_range": 0.2,
    }  # fmt: skip
    config = Glm4vConfig(
        text_config={**_TEXT, "num_hidden_layers": 3, "rope_parameters": rope}, vision_config=vision,
        image_token_id=IMAGE, video_token_id=VIDEO_PAD, image_start_token_id=7, image_end_token_id=8,
    )  # fmt: skip
    images = Glm4vImageProcessorPil(size={"shortest_edge": 112 * 112, "longest_edge": 280 * 280})
    return Parts(
        Glm4vForConditionalGeneration(config), images, "Glm4vProcessor",
        chat=_CHAT.replace("IMAGE", "<|vision_start|><image><|vision_end|>"), named={"image_token": "<image>"},
    )  # fmt: skip


def _blip2() -> Parts:
    model, images = tiny_models._blip2()
    return Parts(model, images, "Blip2Processor", {"num_query_tokens": 3}, begins=True)


def _blip2_t5() -> Parts:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    text = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=3
    )
    config = Blip2Config(
        text_config=text.to_dict(), vision_config=_VISION, qformer_config=tiny_models._QFORMER, num_query_tokens=3,
        image_token_index=IMAGE,
    )  # fmt: skip
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    return Parts(Blip2ForConditionalGeneration(config), images, "Blip2Processor", {"num_query_tokens": 3}, begins=True)


def _instructblip() -> Parts:
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    config = InstructBlipConfig(
        text_config=LlamaConfig(**_TEXT).to_dict(), vision_config=_VISION,
        qformer_config={**tiny_models._QFORMER, "vocab_size": VOCABULARY}, num_query_tokens=3, image_token_index=IMAGE,
    )  # fmt: skip
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    model = InstructBlipForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return Parts(model, images, "InstructBlipProcessor", {"num_query_tokens": 3}, begins=True)


def _llava_next() -> Parts:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    grid = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        text_config=LlamaConfig(**_TEXT), vision_config=CLIPVisionConfig(**_VISION), image_token_index=IMAGE,
        image_grid_pinpoints=grid, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grid
    )
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    model = LlavaNextForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.image_newline)
    return Parts(model, images, "LlavaNextProcessor", {**settings, "image_token": "<image>"}, _USER, begins=True)


def _llava_onevision() -> Parts:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    grid = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**_TEXT), vision_config=_SIGLIP, image_token_index=IMAGE, video_token_index=VIDEO_PAD,
        image_grid_pinpoints=grid, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grid)
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "image_token": "<image>"}
    model = LlavaOnevisionForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.image_newline)
    return Parts(model, images, "LlavaOnevisionProcessor", settings, _CHAT.replace("IMAGE", "<image>"))


def _internvl() -> Parts:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    vision = {**_VISION, "image_size": [32, 32], "patch_size": [8, 8]}
    config = InternVLConfig(
        text_config=Qwen2Config(**_TEXT), vision_config=vision, image_token_id=IMAGE, image_seq_length=4,
        downsample_ratio=0.5,
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>",
        "video_token": "<video>",
    }  # fmt: skip
    model = InternVLForConditionalGeneration(config)
    chat = _CHAT.replace("IMAGE", "<image>\n")
    return Parts(model, images, "InternVLProcessor", {"image_seq_length": 4}, chat, named)


def _gemma3() -> Parts:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    text = {
        **_TEXT, "head_dim": 8, "sliding_window": 512, "num_hidden_layers": 3, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=_SIGLIP, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=SPECIAL.index("<start_of_image>"), eoi_token_index=SPECIAL.index("<end_of_image>"),
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Parts(model, images, "Gemma3Processor", {"image_seq_length": 4}, _TURNS, named, begins=True)


def _paligemma() -> Parts:
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    text = {**_TEXT, "head_dim": 8, "vocab_size": 2048}  # the processor adds more than a thousand tokens
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**text).to_dict(), vision_config=_SIGLIP, image_token_index=IMAGE, projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    named = {"image_token": "<image>"}
    return Parts(PaliGemmaForConditionalGeneration(config), images, "PaliGemmaProcessor", {}, None, named)


def _idefics3() -> Parts:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    config = Idefics3Config(
        text_config=LlamaConfig(**_TEXT).to_dict(), vision_config=_VISION, image_token_id=IMAGE, scale_factor=2
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    chat = _IDEFICS
    model = Idefics3ForConditionalGeneration(config)
    return Parts(model, images, "Idefics3Processor", {"image_seq_len": 4}, chat)


def _smolvlm() -> Parts:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    config = SmolVLMConfig(
        text_config=LlamaConfig(**_TEXT).to_dict(), vision_config=_VISION, image_token_id=IMAGE, scale_factor=2
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    named = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    return Parts(
        SmolVLMForConditionalGeneration(config), images, "SmolVLMProcessor", {"image_seq_len": 4}, _IDEFICS, named
    )


def _mllama() -> Parts:
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    text = {
        **_TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 32, "patch_size": 8, "max_num_tiles": 2, "vision_output_dim": 48,
        "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    images = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=2)
    return Parts(
        MllamaForConditionalGeneration(config), images, "MllamaProcessor", {},
        "{{ bos_token }}" + _CHAT.replace("IMAGE", "<image>"), {"image_token": "<image>"}, begins=True,
    )  # fmt: skip


def _aya() -> Parts:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    text = Cohere2Config(**{**_TEXT, "tie_word_embeddings": True, "sliding_window": 512})
    config = AyaVisionConfig(
        text_config=text, vision_config=_SIGLIP, image_token_index=IMAGE, downsample_factor=2,
        vision_feature_select_strategy="full", adapter_layer_norm_eps=1e-6,
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    settings = {"patch_size": 16, "img_size": 32, "image_token": "<image>", "img_patch_token": "<|image_pad|>"}
    return Parts(
        AyaVisionForConditionalGeneration(config), images, "AyaVisionProcessor", settings,
        _CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip


def _vipllava() -> Parts:
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    config = VipLlavaConfig(
        text_config=LlamaConfig(**_TEXT), vision_config=CLIPVisionConfig(**_VISION), image_token_index=IMAGE,
        vision_feature_layers=[-2, 1],
    )  # fmt: skip
    _, images = tiny_models._llava()
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return Parts(
        VipLlavaForConditionalGeneration(config), images, "LlavaProcessor", {**settings, "image_token": "<image>"},
        _USER, begins=True,
    )  # fmt: skip


MODELS: dict[str, Callable[[], Parts]] = {
    "blip2": _blip2, "llava": _llava, "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL"), "qwen2_vl": lambda: _qwen("Qwen2VL"),
    "qwen3_vl": lambda: _qwen("Qwen3VL"), "llava_next": _llava_next, "llava_onevision": _llava_onevision,
    "internvl": _internvl, "gemma3": _gemma3, "paligemma": _paligemma, "idefics3": _idefics3, "smolvlm": _smolvlm,
    "instructblip": _instructblip, "blip2_t5": _blip2_t5, "mllama": _mllama, "vipllava": _vipllava, "aya": _aya,
    "glm4v": _glm4v, "llava_phi3": lambda: _llava_of("Phi3"), "llava_of_llama": lambda: _llava_of("Llama"),
    "llava_persimmon": lambda: _llava_of("Persimmon"),
    "qwen3_vl_moe": lambda: _qwen("Qwen3VLMoe", moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
}  # fmt: skip
"""Makers of models by name."""
FAMILIES = (*tiny_models.FAMILIES, "auto")
SIDES = {"auto": 112}
"""Image size of a family that has none of its own."""


def write_family(family: str, directory: Path, seed: int = 0) -> Path:
    """Writes a checkpoint of a family, for `auto` a Qwen2.5-VL, and returns its folder."""
    return write("qwen2_5_vl", directory, seed) if family == "auto" else tiny_models.write(family, directory, seed)


def write(
    name: str, directory: Path, seed: int = 0, *, text: Mapping[str, int] | None = None, shards: str = "5GB"
) -> Path:
    """Writes a checkpoint, and returns its folder.

    Args:
        text: Sizes of a LLaVA's text model, where it is to be larger.
        shards: Largest size of a weight file.
    """
    torch.manual_seed(seed)
    parts = MODELS[name]() if text is None else _llava(text)
    # The library initialises some weights to zero or very small values, which would hide a part that is left out.
    for parameter in parts.model.parameters():
        if parameter.dim() > 1 and float(parameter.detach().std()) < 0.05:
            torch.nn.init.normal_(parameter, std=0.2)
    parts.model.save_pretrained(directory, max_shard_size=shards)
    made = tiny_models.tokenizer(parts.begins, SPECIAL, VOCABULARY - 100, parts.named)
    made.save_pretrained(directory)
    parts.images.save_pretrained(directory)
    settings = {"processor_class": parts.processor, **parts.settings}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    if parts.chat is not None:
        (directory / "chat_template.jinja").write_text(parts.chat)
    return directory
