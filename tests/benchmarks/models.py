"""BLIP-2 with random weights in several sizes. The cost of an edit does not depend on the weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from odedit import world
from odedit.backbones import Backbone, load_backbone
from odedit.backbones.blip2 import Blip2

SIZES: dict[str, dict[str, Any]] = {
    # Image tower 12 x 384 on 224 pixels, text model 12 x 512, the vocabulary of OPT.
    "mid": {
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
        "qformer": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4},
        "text": {"hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    },
    # The shapes of Salesforce/blip2-opt-2.7b.
    "opt-2.7b": {
        "vision": {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16},
        "qformer": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "text": {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
    },
}  # fmt: skip
VOCABULARY = 50272


def load(size: str, *, dtype: str = "float32", device: str = "cpu") -> Backbone:
    """Loads `embedded`, or random weights in one of `SIZES`, reproducible on the same kind of device."""
    if size == "embedded":
        return load_backbone("blip2", "embedded", dtype=dtype, device=device)
    from transformers import Blip2ForConditionalGeneration

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = Blip2ForConditionalGeneration(config(size))
            torch.nn.init.normal_(model.query_tokens, std=0.02)
    finally:
        torch.set_default_dtype(before)
    with tempfile.TemporaryDirectory() as folder:
        _save_processor(Path(folder))
        return Blip2(model, Blip2.Processor(folder), f"random:{size}", lambda: f"random:{size}")


def write(size: str, folder: Path) -> Path:
    """Writes the model as a checkpoint; returns the folder."""
    load(size).model.save_pretrained(folder)
    _save_processor(folder)
    return folder


def config(size: str) -> Any:
    from transformers import Blip2Config

    parts = SIZES[size]
    shared = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 640}
    return Blip2Config(
        vision_config={**parts["vision"], "image_size": 224, "patch_size": 14},
        qformer_config={**parts["qformer"], **shared, "encoder_hidden_size": parts["vision"]["hidden_size"]},
        text_config={
            **parts["text"], "model_type": "opt", "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
           
            "do_layer_norm_before": True,
            "word_embed_proj_dim": parts["text"]["hidden_size"], "dropout": 0.0,
            "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
        },
        num_query_tokens=32,
        image_token_index=4,
    )  # fmt: skip


def _save_processor(folder: Path) -> None:
    """Writes the embedded model's tokenizer, whose ids the larger vocabulary contains, and an image processor."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.CHECKPOINTS / "blip2" / name, folder / name)
    BlipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
