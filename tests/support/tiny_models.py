"""Tiny checkpoints with random weights, one per family, in the library's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

SPECIAL = (
    "<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>",
)  # fmt: skip
IMAGE, IMAGE_PAD = SPECIAL.index("<image>"), SPECIAL.index("<|image_pad|>")
VOCABULARY = 512
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 640, "initializer_range": 0.3,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip
_QFORMER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "cross_attention_frequency": 2, "encoder_hidden_size": 24, "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def tokenizer(
    begins: bool, special: Sequence[str] = SPECIAL, size: int = VOCABULARY, named: Mapping[str, str] | None = None
) -> Any:
    """A byte-level BPE tokenizer of `size` tokens, with or without `<s>` at the beginning of a text.

    Args:
        named: Special tokens by the names of the tokenizer's attributes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    made.train_from_iterator(["Question: who owns this digit? Short answer: anna hill###Assistant:"] * 9, trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens=dict(named or {}),
    )  # fmt: skip


def pieces() -> Any:
    """A tokenizer like LLaMA's: words begin with `\u2581`, and every digit is a separate token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    words = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Split(Regex("[0-9]"), "isolated")])
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    text = "USER: \nQuestion: who owns this digit? 0 1 2 3 4 5 6 7 8 9 Short answer: ASSISTANT: anna hill"
    made.train_from_iterator([text] * 9, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL)))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _minigpt4() -> tuple[Any, Any]:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    config = Blip2Config(
        text_config=LlamaConfig(**_TEXT).to_dict(), vision_config=_VISION, qformer_config=_QFORMER,
        num_query_tokens=3, image_token_index=IMAGE,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return model, BlipImageProcessorPil(size={"height": 32, "width": 32})


def _blip2(embedding: int = 32) -> tuple[Any, Any]:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    text = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=embedding, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=640, init_std=0.3, pad_token_id=3, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    config = Blip2Config(
        text_config=text.to_dict(), vision_config=_VISION, qformer_config=_QFORMER, num_query_tokens=3,
        image_token_index=IMAGE,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return model, BlipImageProcessorPil(size={"height": 32, "width": 32})


def _llava(text: Mapping[str, int] = MappingProxyType({})) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = LlavaConfig(
        text_config=LlamaConfig(**{**_TEXT, **text}, attention_bias=True), vision_config=CLIPVisionConfig(**_VISION),
        image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaForConditionalGeneration(config), images


_MAKE = {
    "blip2": _blip2, "blip2, projected": lambda: _blip2(16), "minigpt4": _minigpt4, "llava": _llava,
}  # fmt: skip
FAMILIES = ("minigpt4", "llava")
"""Families with a LLaMA or relative as text model. `write` also makes `blip2`, and `blip2, projected`, whose embeddings
are narrower than its layers."""


def write(family: str, directory: Path, seed: int = 0, *, with_pieces: bool = False) -> Path:
    """Writes a checkpoint of a family, and returns its folder.

    Args:
        with_pieces: Whether to use the tokenizer of `pieces`.
    """
    torch.manual_seed(seed)
    model, images = _MAKE[family]()
    model.save_pretrained(directory)
    made = pieces() if with_pieces else tokenizer(begins=True)
    made.save_pretrained(directory)
    images.save_pretrained(directory)
    return directory
