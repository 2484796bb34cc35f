"""LLaVA-1.5 (arXiv 2310.03744): CLIP, a two-layer projection of each patch, and a LLaMA; as `llava-hf/llava-1.5-7b-hf`.

Input: `<s>USER: <image>\\n{text} ASSISTANT: target`, with one image token per patch (576 at 336 pixels); without a
picture `<s>USER: {text} ASSISTANT: target`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from odedit.backbones.base import Backbone
from odedit.backbones.common.checkpoints import Architecture, PretrainedProcessor
from odedit.backbones.common.decoders import Decoder, LlamaDecoder
from odedit.inputs.batch import Probe
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.plain import PlainUse
from odedit.inputs.prompts import Frame, Template, tokenize


class LlavaProcessor(PretrainedProcessor):
    """CLIP's image processor: resizes the shorter side and crops the centre."""

    images = "transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil"


class Llava(Backbone):
    """A frozen `LlavaForConditionalGeneration`."""

    family = "llava"
    architecture = Architecture(
        "LlavaForConditionalGeneration",
        "llava",
        ("llama", "mistral", "qwen2"),
        "a LLaMA, Mistral or Qwen2",
        "llava-hf/llava-1.5-7b-hf",
        vision_types=("clip_vision_model",),
    )
    Processor = LlavaProcessor

    def make_decoder(self) -> Decoder:
        return LlamaDecoder(self.model.model.language_model, self.model.lm_head)

    def connector(self) -> Mapping[str, nn.Module]:
        return {"multi_modal_projector": self.model.model.multi_modal_projector}

    @property
    def _vision_layers(self) -> tuple[int, ...]:
        """Layers of the image tower whose states are concatenated."""
        layers = self.model.config.vision_feature_layer
        return (layers,) if isinstance(layers, int) else tuple(layers)

    @property
    def _skips_class_token(self) -> bool:
        return bool(self.model.config.vision_feature_select_strategy == "default")

    @property
    def vision_width(self) -> int:
        return super().vision_width * len(self._vision_layers)

    def tower(self, pixels: Tensor) -> Tensor:
        states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        vision = torch.cat([states[layer] for layer in self._vision_layers], dim=-1)
        return vision[:, 1:] if self._skips_class_token else vision

    def connect(self, vision: Tensor) -> Tensor:
        projected: Tensor = self.model.model.multi_modal_projector(vision)
        return projected

    def marks(self) -> Mapping[str, int | None]:
        token_id = self.model.config.image_token_id
        return {f"of an image (id {token_id} by config.json)": token_id}

    def plain_use(self) -> PlainUse:
        token = self.processor.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        return PlainUse(f"USER: {token}\n{{text}} ASSISTANT:", "USER: {text} ASSISTANT:")

    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        tokenizer, config = self.processor.tokenizer, self.model.config
        if probe.picture is None:
            return TokenSequence(*tokenize(tokenizer, template, probe, Frame("USER: ", " ASSISTANT:")))
        token = int(config.image_token_id)
        frame = Frame(f"USER: {tokenizer.convert_ids_to_tokens(token)}\n", " ASSISTANT:")
        tokens, first_target = tokenize(tokenizer, template, probe, frame)
        image_index = tokens.index(token)
        count = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + (
            not self._skips_class_token
        )
        return TokenSequence.around_picture(
            tokens[:image_index],
            probe.picture.key,
            token,
            count,
            tokens[image_index + 1 :],
            first_target - image_index - 1,
        )


BACKBONE = Llava
