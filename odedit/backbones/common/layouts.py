"""A checkpoint's own processor: its chat template as the layout of a prompt, and its image processing."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils._pytree import tree_leaves, tree_map

from odedit.backbones.common.checkpoints import PretrainedProcessor
from odedit.backbones.common.structure import Unsupported
from odedit.errors import InputError, in_words
from odedit.inputs.batch import Picture, Probe
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.prompts import Frame, Template, tokenize
from odedit.runtime.brief import brief
from odedit.runtime.lru import LRU

_TEXT = "\ue000"
"""Stands for the text of a prompt while the layout is made; a private character, so no template contains it."""
_SAMPLE = "What is it?"
_FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja")
_LAYOUTS = 4096
_PICTURE = Ellipsis
"""Stands for the picture in a recorded call."""
PER_POSITION = ("token_type_ids", "mm_token_type_ids")
"""Inputs with a value for each position of a prompt."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """What stands around a prompt's text, for pictures of one size or for prompts without picture.

    Attributes:
        lead: Tokens before the text that the tokenizer sees.
        frame: Text around the prompt, with one image token for each run of them.
        runs: Number of image positions of each run.
        written: Text around the prompt before the processor writes out the picture, with `{text}`.
        inputs: What the model reads besides tokens and pixel values, such as the grid of patches.
        image_in_lead: Number of image positions in `lead`.
    """

    lead: tuple[int, ...]
    frame: Frame
    runs: tuple[int, ...]
    written: str
    inputs: Mapping[str, np.ndarray]
    image_in_lead: int = 0

    __repr__ = brief

    @property
    def num_positions(self) -> int:
        return self.image_in_lead + sum(self.runs)

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """The inputs that belong to pictures."""
        return {name: value for name, value in self.inputs.items() if name not in PER_POSITION}


class LibraryProcessor(PretrainedProcessor):
    """The processor that `transformers` ships for a checkpoint, with the PIL variant of its image processor.

    Attributes:
        image_token: Id of the token that stands at image positions.
        side: Width and height to which pictures are resized first; None: the processor alone resizes them.
    """

    side: ClassVar[int | None] = None

    def __init__(self, checkpoint: str) -> None:
        """Raises InputError if the checkpoint lacks files of its processor, or they do not say where a picture is."""
        from transformers import AutoConfig

        self._source = checkpoint
        self._layouts: LRU[Layout] = LRU(_LAYOUTS)
        self._calls: LRU[Any] = LRU(_LAYOUTS)
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        token = getattr(config, "image_token_id", None)
        try:
            with quiet():
                self.library = _assembled(checkpoint, config.model_type)
        except Exception as error:  # what the library raises depends on what is wrong with the files
            raise InputError(
                f"backbone.checkpoint {checkpoint!r}: its processor cannot be read from tokenizer.json, "
                f"preprocessor_config.json and processor_config.json: {in_words(error)}. Take these files from the "
                "original model."
            ) from error
        self.tokenizer, self._images = self.library.tokenizer, self.library.image_processor
        if token is None:
            raise InputError(
                f"backbone.checkpoint {checkpoint!r}: config.json names no image token (image_token_id), so pictures "
                "have no place in a prompt."
            )
        self.image_token = int(token)

    def process(self, picture: Picture) -> Picture:
        """The image tower's input, float32 of the shape that the library's processor makes, and the picture's size."""
        if picture.is_processed:
            return picture
        from PIL import Image

        image, height, width = Image.fromarray(picture.pixels).convert("RGB"), *picture.pixels.shape[:2]
        pixels = np.ascontiguousarray(self._processed(self._resized(image)), dtype=np.float32)
        return Picture(picture.key, pixels, (height, width))

    def layout(self, size: Size | None) -> Layout:
        """Layout of prompts about pictures of that height and width; None: without picture."""
        if size is not None and self.side is not None:
            size = self.side, self.side  # also the size that the library's processor sees
        layout: Layout | None = self._layouts.get(size)
        if layout is None:
            layout = self._made(size)
            self._layouts.put(size, layout, 1)
        return layout

    def head(self, size: Size) -> list[int]:
        """Tokens of a prompt up to the last one of the picture."""
        tokens = self._marker_tokens(self.layout(size))
        last = max(index for index, token in enumerate(tokens) if token == self.image_token)
        return tokens[: last + 1]

    def sequence(self, probe: Probe, template: Template, size: Size | None) -> TokenSequence:
        """A probe's tokens. Raises InputError and ValueError as `Backbone.sequence`."""
        layout = self.layout(size)
        tokens, first_target = tokenize(self.tokenizer, template, probe, layout.frame)
        before = [*layout.lead, *self._expanded(tokens[:first_target], layout.runs)]
        image = [index for index, token in enumerate(before) if token == self.image_token]
        picture = None if probe.picture is None else probe.picture.key
        return TokenSequence([*before, *tokens[first_target:]], len(before), image, picture)

    @cached_property
    def types(self) -> dict[str, tuple[int, int]]:
        """Types of text and of image positions, by the name of the input. Raises InputError for further types."""
        layout = self.layout((64, 64))
        found = {}
        for name in PER_POSITION:
            if name not in layout.inputs:
                continue
            types = layout.inputs[name].reshape(-1)
            is_image = np.asarray(self._marker_tokens(layout)) == self.image_token
            at_text, at_image = set(types[~is_image].tolist()), set(types[is_image].tolist())
            if len(at_text) != 1 or len(at_image) != 1:
                raise InputError(
                    f"backbone.checkpoint {self._source!r}: its processor gives text positions the types "
                    f"{sorted(at_text)} and image positions {sorted(at_image)} ({name}), expected one each."
                )
            found[name] = at_text.pop(), at_image.pop()
        return found

    def check_text_independent(self) -> None:
        """Raises Unsupported if what the model reads of a picture depends on the prompt's text."""
        short = self.layout((64, 64))
        longer = self._made((64, 64), _TEXT + _SAMPLE * 3)
        for name, value in short.pictures.items():
            if value.shape != longer.inputs[name].shape:
                raise Unsupported(
                    f"its pictures' features depend on the prompt's text ({name}), and are computed once per picture"
                )

    def _marker_tokens(self, layout: Layout) -> list[int]:
        text = layout.frame.before + _TEXT + layout.frame.after
        tokens = self.tokenizer(text, add_special_tokens=layout.frame.begins)["input_ids"]
        return [*layout.lead, *self._expanded(tokens, layout.runs)]

    def save_pretrained(self, directory: str | Path) -> None:
        super().save_pretrained(directory)
        for name in _FILES:
            if (Path(self._source) / name).is_file():
                shutil.copyfile(Path(self._source) / name, Path(directory) / name)

    def _resized(self, image: Any) -> Any:
        return image if self.side is None else image.resize((self.side, self.side), self._images.resample)

    def _processed(self, image: Any) -> Any:
        """Pixel values that the library's processor makes of a picture.

        The whole processor also makes a prompt. Pictures of a size that it has seen, and whose pixel values it takes
        from its image processor unchanged, go to that one alone, with the same arguments.
        """
        call = self._calls.get(image.size)
        if call is not None:
            arguments, named = tree_map(lambda leaf: image if leaf is _PICTURE else leaf, call)
            return self._images(*arguments, **named)["pixel_values"]
        recorder = _Recorder(self._images)
        self.library.image_processor = recorder
        try:
            with quiet():
                made = self.library(images=[image], text=[self._sample_prompt], return_tensors="np")
        finally:
            self.library.image_processor = self._images
        if "pixel_values" not in made:
            raise InputError(
                f"backbone.checkpoint {self._source!r}: its processor makes {', '.join(made)} of a picture, and no "
                "pixel_values."
            )
        pixels = made["pixel_values"]
        for arguments, named, own in recorder.calls if len(recorder.calls) == 1 else ():
            call = tree_map(lambda leaf: _PICTURE if leaf is image else leaf, (arguments, named))
            if sum(leaf is _PICTURE for leaf in tree_leaves(call)) == 1 and np.array_equal(own["pixel_values"], pixels):
                self._calls.put(image.size, call, 1)
        return pixels

    @cached_property
    def _sample_prompt(self) -> str:
        """Any prompt with a picture."""
        return self._prompt(True).replace(_TEXT, _SAMPLE)

    def _prompt(self, with_picture: bool) -> str:
        """The chat template with a user's turn; the text alone if the processor places the picture by itself."""
        if not self.library.chat_template:
            return _TEXT
        content: list[dict[str, str]] = [{"type": "text", "text": _TEXT}]
        if with_picture:
            content = [{"type": "image"}, *content]
        turns = [{"role": "user", "content": content}]
        written: str = self.library.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return written

    def _made(self, size: Size | None, text: str = _TEXT) -> Layout:
        from PIL import Image

        where = f"backbone.checkpoint {self._source!r}"
        try:
            prompt = self._prompt(size is not None)
            if prompt.count(_TEXT) != 1:
                raise InputError(f"{where}: its chat template holds the text of a turn {prompt.count(_TEXT)} times.")
            bos = self.tokenizer.bos_token
            settings = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
            image = None if size is None else self._resized(Image.new("RGB", size[::-1]))
            calls, made = self._recorded(image, prompt.replace(_TEXT, text), settings)
        except InputError:
            raise
        except Exception as error:  # what the library raises depends on template and processor
            if size is None:  # a processor that takes no text without a picture
                return self._without_picture()
            raise InputError(
                f"{where}: its processor makes no prompt with a picture: {in_words(error)}. Take the processor's files "
                "and the chat template from the original model."
            ) from error
        handed, added = next((call for call in calls if _TEXT in call[0]), ("", True))
        before, _, after = handed.partition(text)
        token = str(self.tokenizer.convert_ids_to_tokens(self.image_token))
        run = re.compile(f"(?:{re.escape(token)})+")
        runs = tuple(len(match) // len(token) for match in run.findall(before + after))
        before, after = run.sub(token, before), run.sub(token, after)
        spaced = not (after or before)[-1:].isspace()
        frame = Frame(before, after, added, spaced)
        # The processor's tokens of the marker itself; some put tokens before those of the text.
        whole = [int(value) for value in np.asarray(made["input_ids"]).reshape(-1)]
        own = self._expanded(self.tokenizer(before + text + after, add_special_tokens=added)["input_ids"], runs)
        lead = tuple(whole[: len(whole) - len(own)])
        if not handed or list(lead) + own != whole:
            raise InputError(
                f"{where}: its processor makes other tokens of a prompt than its tokenizer makes of the text that the "
                "processor hands on; the layout of prompts is not known."
            )
        positions = sum(runs) + lead.count(self.image_token)
        if (size is not None) != bool(positions):
            raise InputError(
                f"{where}: a prompt {'with' if size else 'without'} a picture has {positions} image tokens. "
                "A chat template (chat_template.jinja) says where the picture stands: take it from the original model."
            )
        inputs = {
            name: np.asarray(value)
            for name, value in made.items()
            if name not in ("input_ids", "attention_mask", "pixel_values", "labels")
        }
        return Layout(lead, frame, runs, prompt.replace(_TEXT, "{text}"), inputs, lead.count(self.image_token))

    def _without_picture(self) -> Layout:
        """The layout with a picture, without its image tokens."""
        with_picture = self.layout((64, 64))
        token = str(self.tokenizer.convert_ids_to_tokens(self.image_token))
        frame = with_picture.frame
        alone = Frame(frame.before.replace(token, ""), frame.after.replace(token, ""), frame.begins, frame.spaced)
        return Layout((), alone, (), f"{alone.before}{{text}}{alone.after}", {})

    def _expanded(self, tokens: Sequence[int], runs: Sequence[int]) -> list[int]:
        left = iter(runs)
        return [token for token in tokens for _ in range(next(left) if token == self.image_token else 1)]

    def _recorded(
        self, image: Any, prompt: str, settings: Mapping[str, Any]
    ) -> tuple[list[tuple[str, bool]], Mapping[str, Any]]:
        """Texts that the processor hands to its tokenizer, each with whether special tokens are added; its result."""
        recorder = _Recorder(self.tokenizer)
        self.library.tokenizer = recorder
        try:
            with quiet():
                pictures = {} if image is None else {"images": [image]}
                made = self.library(**pictures, text=[prompt], return_tensors="np", **settings)
        finally:
            self.library.tokenizer = self.tokenizer
        texts = [
            (one, bool(named.get("add_special_tokens", True)))
            for arguments, named, _ in recorder.calls
            for text in (arguments or (named["text"],))[:1]
            for one in ([text] if isinstance(text, str) else text)
        ]
        return texts, made


class _Recorder:
    """A tokenizer or image processor that keeps its calls: arguments, named arguments, result."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __len__(self) -> int:
        return len(self._part)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        made = self._part(*arguments, **named)
        self.calls.append((arguments, named, made))
        return made


def _assembled(source: str, model_type: str) -> Any:
    """The library's processor. Videos are left out, because their processors need torchvision."""
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    settings = transformers.ProcessorMixin.get_processor_dict(source)[0]
    kind = getattr(transformers, settings.get("processor_class") or PROCESSOR_MAPPING_NAMES[model_type])
    parts = kind.get_attributes()
    if not {"image_processor", "tokenizer"} <= set(parts) <= {"image_processor", "tokenizer", "video_processor"}:
        return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    loaded = {
        "image_processor": AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False),
        "tokenizer": AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False),
    }
    return _for_pictures(kind).from_args_and_dict([loaded.get(part) for part in parts], settings)


def _for_pictures(kind: Any) -> Any:
    """A processor's class that takes None for its video processor."""

    def check(self: Any, name: str, part: Any) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the library's warnings about how it was called."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
