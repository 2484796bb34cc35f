"""BLIP-2 with an OPT text model (arXiv 2301.12597), any size, as `transformers` ships it.

Input: `[query tokens of the image | </s> | text]`; a text-only prompt has no image part. `Blip2Processor` builds the
same.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from odedit import qformer
from odedit.decoders import Decoder, OPTDecoder
from odedit.edits import Probe
from odedit.encoding import TokenSequence
from odedit.multimodal import MultimodalModel
from odedit.pretrained import Architecture, PretrainedProcessor
from odedit.prompts import Template, tokenize


class Blip2Processor(PretrainedProcessor):
    """The image processor of BLIP and BLIP-2."""

    images = qformer.IMAGE_PROCESSOR


class Blip2(MultimodalModel):
    """A frozen `Blip2ForConditionalGeneration`."""

    family = "blip2"
    architecture = Architecture(
        "Blip2ForConditionalGeneration", "blip-2", ("opt",), "an OPT", "Salesforce/blip2-opt-2.7b"
    )
    Processor = Blip2Processor

    def make_decoder(self) -> Decoder:
        return OPTDecoder(self.model.language_model)

    def connector(self) -> Mapping[str, nn.Module]:
        return qformer.connector(self.model)

    def tower(self, pixels: Tensor) -> Tensor:
        return qformer.tower(self.model, pixels)

    def connect(self, vision: Tensor) -> Tensor:
        return qformer.connect(self.model, vision)

    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        text, first_target = tokenize(self.processor.tokenizer, template, probe)
        if probe.picture is None:
            return TokenSequence(text, first_target)
        config = self.model.config
        token = int(config.image_token_id or 0)
        return TokenSequence.around_picture([], probe.picture.key, token, config.num_query_tokens, text, first_target)


BACKBONE = Blip2
