"""MiniGPT-4 (arXiv 2304.10592): BLIP-2's ViT and Q-Former, one projection, Vicuna; as a BLIP-2 checkpoint.

Input: `[<s> | ###Human: <Img> | query tokens | </Img> text###Assistant: target]`; the texts before and after the
picture are tokenised separately, as in training. Without a picture `###Human: text###Assistant: target`.

`odedit convert minigpt4` makes such a checkpoint from the published pieces.
"""

from __future__ import annotations

from collections.abc import Mapping

from odedit.backbones.common.checkpoints import Architecture
from odedit.backbones.common.decoders import Decoder, LlamaDecoder
from odedit.backbones.common.qformer import QFormerBackbone
from odedit.inputs.batch import Probe
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.plain import PlainUse, minigpt4_processor
from odedit.inputs.prompts import Frame, Template, tokenize

BEFORE_PICTURE = "###Human: <Img>"
AFTER_PICTURE = Frame("</Img> ", "###Assistant:", begins=False)
WITHOUT_PICTURE = Frame("###Human: ", "###Assistant:")


class MiniGPT4(QFormerBackbone):
    """A frozen `Blip2ForConditionalGeneration` with a LLaMA text model."""

    family = "minigpt4"
    stop = "##"  # begins "###Human:", where the published code stops
    architecture = Architecture("Blip2ForConditionalGeneration", "blip-2", ("llama",), "a LLaMA")

    def make_decoder(self) -> Decoder:
        text = self.model.language_model
        return LlamaDecoder(text.model, text.lm_head)

    def plain_use(self) -> PlainUse:
        before = f"{BEFORE_PICTURE}{self._image_token}{AFTER_PICTURE.before}"
        without = f"{WITHOUT_PICTURE.before}{{text}}{WITHOUT_PICTURE.after}"
        return PlainUse(f"{before}{{text}}{AFTER_PICTURE.after}", without, stop=self.stop, text_model="language_model")

    def processor_files(self) -> Mapping[str, str]:
        config = self.model.config
        return minigpt4_processor(self._image_token, config.num_query_tokens, config.vision_config.image_size)

    @property
    def _image_token(self) -> str:
        return str(self.processor.tokenizer.convert_ids_to_tokens(int(self.model.config.image_token_id or 0)))

    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        tokenizer, config = self.processor.tokenizer, self.model.config
        if probe.picture is None:
            return TokenSequence(*tokenize(tokenizer, template, probe, WITHOUT_PICTURE))
        before = tokenizer(BEFORE_PICTURE)["input_ids"]
        after, first_target = tokenize(tokenizer, template, probe, AFTER_PICTURE)
        token = int(config.image_token_id or 0)
        return TokenSequence.around_picture(
            before, probe.picture.key, token, config.num_query_tokens, after, first_target
        )


BACKBONE = MiniGPT4
