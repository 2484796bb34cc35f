"""Models of the BLIP-2 class, whose pictures pass a ViT, a Q-Former and a projection.

References:
    BLIP-2 (arXiv 2301.12597). MiniGPT-4 (arXiv 2304.10592) keeps its ViT and Q-Former and trains the projection alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from odedit.backbones.base import Backbone
from odedit.backbones.common.checkpoints import PretrainedProcessor


class QFormerProcessor(PretrainedProcessor):
    """The image processor of BLIP and BLIP-2."""

    images = "transformers.models.blip.image_processing_pil_blip.BlipImageProcessorPil"


class QFormerBackbone(Backbone):
    """A frozen `Blip2ForConditionalGeneration`; a family adds its text model and the layout of its prompts."""

    Processor = QFormerProcessor

    def connector(self) -> Mapping[str, nn.Module]:
        return {"qformer": self.model.qformer, "language_projection": self.model.language_projection}

    def tower(self, pixels: Tensor) -> Tensor:
        """Output of the ViT after its last norm, `(N, patches + 1, width)`."""
        features: Tensor = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return features

    def connect(self, vision: Tensor) -> Tensor:
        """Projected output of the Q-Former, `(N, query tokens, D)`.

        The Q-Former keeps float32 weights in every model type; its output is cast back to the tower's type. No mask of
        the patches is given, since the library would inspect it and thereby wait for the GPU.
        """
        queries = self.model.query_tokens.expand(len(vision), -1, -1)
        gathered = self.model.qformer(query_embeds=queries, encoder_hidden_states=vision).last_hidden_state
        projected: Tensor = self.model.language_projection(gathered.to(vision.dtype))
        return projected
