"""The picture's way through a model of the BLIP-2 class: ViT, Q-Former, projection.

References:
    BLIP-2 (arXiv 2301.12597). MiniGPT-4 (arXiv 2304.10592) keeps tower and Q-Former and trains the projection alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_PROCESSOR = "transformers.models.blip.image_processing_pil_blip.BlipImageProcessorPil"


def connector(model: Any) -> Mapping[str, nn.Module]:
    """What stands between the ViT and the text model."""
    return {"qformer": model.qformer, "language_projection": model.language_projection}


def tower(model: Any, pixels: Tensor) -> Tensor:
    """`(N, patches + 1, width)` of the ViT, after its last norm."""
    features: Tensor = model.vision_model(pixel_values=pixels).last_hidden_state
    return features


def connect(model: Any, vision_NPW: Tensor) -> Tensor:
    """`(N, query tokens, D)`: what the queries gather from the patches, projected.

    The Q-Former keeps float32 weights whatever the model's type is; its output returns to the tower's type.
    """
    seen = torch.ones(vision_NPW.shape[:2], dtype=torch.long, device=vision_NPW.device)
    queries = model.query_tokens.expand(len(vision_NPW), -1, -1)
    gathered = model.qformer(
        query_embeds=queries, encoder_hidden_states=vision_NPW, encoder_attention_mask=seen
    ).last_hidden_state
    projected: Tensor = model.language_projection(gathered.to(vision_NPW.dtype))
    return projected
