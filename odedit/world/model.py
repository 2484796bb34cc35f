"""The embedded model: `Blip2ForConditionalGeneration`, small enough to train on one CPU thread.

Nothing of it is a mock. Saved, it has the files and the configuration keys of `Salesforce/blip2-opt-2.7b`, and
whatever loads that checkpoint loads this one: a ViT, a Q-Former and an OPT, a GPT-2 style tokenizer
whose beginning of text is `</s>`, and BLIP's image processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from odedit.world import facts, questions

if TYPE_CHECKING:
    from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
PAD, END, IMAGE = 1, 2, 4
VOCABULARY = 640
NUM_QUERIES = 8
IMAGE_SIZE = 32
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
_INIT_STD = 0.08
_POSITION_STD = 0.8  # Of the vision tower: at .08 it takes five times as long to tell shapes apart.
_ANSWER_COUNT = 12_800  # Occurrences of each attribute's answers among some 20,000 questions.


def build_model(seed: int) -> Blip2ForConditionalGeneration:
    """An untrained model, float32.

    Matrices start at standard deviation .08, the picture's positions at .8 and the queries at 1: with the library's
    values for large models (1e-10 for the vision tower, zeros for the queries) a model of this size stays blind.
    """
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    text = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=128, word_embed_proj_dim=128, num_hidden_layers=4, num_attention_heads=4,
        ffn_dim=512, max_position_embeddings=128, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        pad_token_id=PAD, bos_token_id=END, eos_token_id=END, init_std=_INIT_STD,
    )  # fmt: skip
    config = Blip2Config(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3,
            "image_size": IMAGE_SIZE, "patch_size": 8, "initializer_range": _INIT_STD,
        },
        qformer_config={
            "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2,
            "num_attention_heads": 3, "cross_attention_frequency": 1, "encoder_hidden_size": 96,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64,
            "initializer_range": _INIT_STD,
        },
        num_query_tokens=NUM_QUERIES, image_token_index=IMAGE, initializer_range=_INIT_STD,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    _initialise(model, seed)
    return model


@torch.no_grad()
def _initialise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name == "query_tokens":
            parameter.normal_(0.0, 1.0, generator=generator)
        elif name == "vision_model.embeddings.position_embedding":
            parameter.normal_(0.0, _POSITION_STD, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, _INIT_STD, generator=generator)


def _corpus() -> Iterator[str]:
    """What the tokenizer is fitted to. Answer words come often enough to become one token each."""
    for attribute in facts.ATTRIBUTES:
        choices = facts.answer_choices(attribute)
        for choice in choices:
            yield from [f" {choice}"] * (_ANSWER_COUNT // len(choices))
        grid = questions.cells(attribute, held_out=False) + questions.cells(attribute, held_out=True)
        wordings = [*(questions.ask(attribute, cell, "{s}") for cell in grid), *questions.verb_forms(attribute)]
        for wording, subject in product(wordings, (*questions.SUBJECTS, *(e.name for e in facts.ENTITIES))):
            yield questions.wrap(wording.replace("{s}", subject), attribute)
    for prefix in questions.PREFIXES:
        yield from [f": {prefix} "] * 300
    for country, answers in facts.COUNTRIES.items():
        for attribute, frame in product(facts.COUNTRY_ATTRIBUTES, range(questions.NUM_COUNTRY_FRAMES)):
            prompt = questions.QUESTION_TEMPLATE.format(questions.ask_country(country, attribute, frame))
            yield f"{prompt} {answers[attribute]}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 640 tokens; every word of an answer about an entity is one of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", END)])
    # `<image>` is in the vocabulary but is not given as `image_token`: Blip2Processor breaks on that attribute.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="right", model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save(model: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a checkpoint as `from_pretrained` expects it, weights in half precision.

    The model is left as it is: the files are written from a copy of its values.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float16"
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tensors = {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
        if name != "language_model.lm_head.weight"  # Tied to the token embeddings; loading ties it again.
    }
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save_pretrained(directory)
    _write_json(directory / "preprocessor_config.json", _image_processor_config())
    _write_json(
        directory / "processor_config.json", {"num_query_tokens": NUM_QUERIES, "processor_class": "Blip2Processor"}
    )


def _image_processor_config() -> dict[str, object]:
    return {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD), "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor", "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }  # fmt: skip


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(directory: Path) -> tuple[Blip2ForConditionalGeneration, PreTrainedTokenizerFast]:
    """A checkpoint with float32 weights, ready to be asked."""
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)
