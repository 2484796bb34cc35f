"""BLIP-2 with an OPT text model (arXiv 2301.12597), any size, as `transformers` ships it.

Input: `[query tokens of the picture | </s> | text]`, as `Blip2Processor` builds it; without a picture `[</s> | text]`.
"""

from __future__ import annotations

from odedit.backbones.common.checkpoints import Architecture
from odedit.backbones.common.decoders import Decoder, OPTDecoder
from odedit.backbones.common.qformer import QFormerBackbone
from odedit.inputs.batch import Probe
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.plain import PlainUse
from odedit.inputs.prompts import Template, tokenize


class Blip2(QFormerBackbone):
    """A frozen `Blip2ForConditionalGeneration` with an OPT text model."""

    family = "blip2"
    architecture = Architecture(
        "Blip2ForConditionalGeneration", "blip-2", ("opt",), "an OPT", "Salesforce/blip2-opt-2.7b"
    )

    def make_decoder(self) -> Decoder:
        return OPTDecoder(self.model.language_model)

    def plain_use(self) -> PlainUse:
        return PlainUse(text_model="language_model")

    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        text, first_target = tokenize(self.processor.tokenizer, template, probe)
        if probe.picture is None:
            return TokenSequence(text, first_target)
        config = self.model.config
        token = int(config.image_token_id or 0)
        return TokenSequence.around_picture([], probe.picture.key, token, config.num_query_tokens, text, first_target)


BACKBONE = Blip2
