"""Tokenizer of an embedded model: byte-level BPE fitted to the texts of the world in the family's layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from odedit.world import facts, questions
from odedit.world.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 640
_ANSWER_COUNT = 12_800  # occurrences of an attribute's answers in the corpus, among about 20,000 questions


def fit_tokenizer(
    special_tokens: Sequence[str], begin: str, layout: Layout, max_length: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 640 tokens; every word of an answer about an entity is one token.

    Args:
        special_tokens: First tokens in the order of their ids; they include `<pad>`, `</s>` and `<unk>`.
        begin: Beginning-of-text token.
        layout: Prompt layout; its text is part of the corpus, so that it takes few tokens.
        max_length: Positions of the text model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special_tokens), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(layout), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, special_tokens.index(begin))]
    )
    # `<image>` is in the vocabulary but not set as `image_token`: Blip2Processor fails with that attribute.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="right", model_max_length=max_length, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _corpus(layout: Layout) -> Iterator[str]:
    """Texts that the tokenizer is fitted to. Answer words are frequent enough to become one token each."""
    for attribute in facts.ATTRIBUTES:
        choices = facts.answer_choices(attribute)
        for choice in choices:
            yield from [f" {choice}"] * (_ANSWER_COUNT // len(choices))
        grid = questions.cells(attribute, held_out=False) + questions.cells(attribute, held_out=True)
        wordings = [*(questions.ask(attribute, cell, "{s}") for cell in grid), *questions.verb_forms(attribute)]
        asked = product(wordings, (*questions.SUBJECTS, *(e.name for e in facts.ENTITIES)))
        for number, (wording, subject) in enumerate(asked):
            prompt = questions.wrap(wording.replace("{s}", subject), attribute)
            # Alternately with and without a picture, so that both layouts take few tokens.
            yield from filter(None, layout.around(prompt, has_picture=number % 2 == 0))
    for prefix in questions.PREFIXES:
        yield from [f": {prefix} "] * 300
    for country, answers in facts.COUNTRIES.items():
        for attribute, frame in product(facts.COUNTRY_ATTRIBUTES, range(questions.NUM_COUNTRY_FRAMES)):
            question = questions.QUESTION_TEMPLATE.format(questions.ask_country(country, attribute, frame))
            yield f"{layout.around(question, has_picture=False)[1]} {answers[attribute]}"
