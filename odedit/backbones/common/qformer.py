"""Models of the BLIP-2 class: the picture's way through ViT, Q-Former and projection.

References:
    BLIP-2 (arXiv 2301.12597). MiniGPT-4 (arXiv 2304.10592) keeps tower and Q-Former and trains the projection alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from odedit.backbones.common.checkpoints import PretrainedProcessor
from odedit.backbones.common.model import MultimodalModel


class QFormerProcessor(PretrainedProcessor):
    """The image processor of BLIP and BLIP-2."""

    images = "transformers.models.blip.image_processing_pil_blip.BlipImageProcessorPil"


class QFormerModel(MultimodalModel):
    """A frozen `Blip2ForConditionalGeneration`; a family states its text model and where its text goes."""

    Processor = QFormerProcessor

    def connector(self) -> Mapping[str, nn.Module]:
        return {"qformer": self.model.qformer, "language_projection": self.model.language_projection}

    def tower(self, pixels: Tensor) -> Tensor:
        """`(N, patches + 1, width)` of the ViT, after its last norm."""
        features: Tensor = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return features

    def connect(self, vision: Tensor) -> Tensor:
        """`(N, query tokens, D)`: what the queries gather from the patches, projected.

        The Q-Former keeps float32 weights whatever the model's type is; its output returns to the tower's type. All
        patches are seen: with a mask that says so, the library would wait for a GPU, to look into it.
        """
        queries = self.model.query_tokens.expand(len(vision), -1, -1)
        gathered = self.model.qformer(query_embeds=queries, encoder_hidden_states=vision).last_hidden_state
        projected: Tensor = self.model.language_projection(gathered.to(vision.dtype))
        return projected
