"""A family from outside the package: LLaVA's class, prompted without a chat turn around the question."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from odedit.backbones.common import (
    Architecture,
    Backbone,
    Decoder,
    LlamaDecoder,
    PretrainedProcessor,
    Probe,
    Template,
    TokenSequence,
    tokenize,
)


class Processor(PretrainedProcessor):
    images = "transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil"


class TerseLlava(Backbone):
    family = "outside.terse_llava"
    architecture = Architecture("LlavaForConditionalGeneration", "llava", ("llama",), "a LLaMA")
    Processor = Processor

    def make_decoder(self) -> Decoder:
        return LlamaDecoder(self.model.model.language_model, self.model.lm_head)

    def connector(self) -> Mapping[str, nn.Module]:
        return {"multi_modal_projector": self.model.model.multi_modal_projector}

    def tower(self, pixels: Tensor) -> Tensor:
        states: Tensor = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        return states[:, 1:]

    def connect(self, vision: Tensor) -> Tensor:
        projected: Tensor = self.model.model.multi_modal_projector(vision)
        return projected

    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        tokens, first_target = tokenize(self.processor.tokenizer, template, probe)
        if probe.picture is None:
            return TokenSequence(tokens, first_target)
        image = self.model.config.image_token_id
        return TokenSequence.around_picture(tokens[:1], probe.picture.key, image, 16, tokens[1:], first_target - 1)


BACKBONE = TerseLlava
