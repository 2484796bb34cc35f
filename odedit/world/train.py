"""Training of the embedded model from scratch: first the vision tower, then the whole model.

Trained end to end from the start, the model learns the prior of the answers and ignores the picture. Therefore the
vision tower is first trained to classify digits with temporary linear heads, and such heads with a decaying weight stay
on the connector's output while the answers are learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from odedit.runtime.brief import brief
from odedit.world import facts, families, images, questions
from odedit.world.model import IMAGE_MEAN, IMAGE_STD, VISION_WIDTH, Family, save

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[str, int, int, float], None]
"""Callback after every step: name of the stage, steps done, total steps, loss."""

_LEARNING_RATE = 2e-3
_WARM_UP = 60
_VISION_BATCH = 64
_EASED = 0.3  # share of the vision steps over which distortions grow to their full size
_PICTURES = 16
_QUESTIONS_PER_PICTURE = 2
_ENTITY_TEXTS = 6
_COUNTRY_TEXTS = 6
_NAMED = 0.15  # share of picture questions that also name the entity
_RAW = 0.2  # share of questions without the "Question: ... Short answer:" template
_TEXT_WEIGHT = 0.5
_WEIGHT = {"digit": 1.2, "background": 1.2, **dict.fromkeys(facts.HIDDEN, 1.1)}
_OTHER_WEIGHT = 0.7
# The Q-Former drops an attribute that is rare at the start, and does not learn it later.
_SHARE = {"owner": 0.16, "city": 0.16, "food": 0.16, "digit": 0.14, "colour": 0.06, "parity": 0.08, "background": 0.12}
_AUXILIARY_WEIGHT = 0.7
_IGNORED = -100


def train(
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
    vision_steps: int = 2400,
    joint_steps: int = 1700,
    family: str = "blip2",
) -> Path:
    """Trains a model of the embedded world and saves it as a Hugging Face checkpoint.

    The same seed gives the same weights on the same machine. Runs on one thread: a model of this size gains little from
    more, and loses much on a busy machine.

    Args:
        out: Directory of the checkpoint, created if missing; files of the same names are replaced.
        seed: Seed of the initial values and of the data.
        progress: Callback after every step.
        vision_steps: Steps of the vision tower alone, with 64 pictures each.
        joint_steps: Steps of the whole model, with 16 pictures, two questions each, and 12 text-only questions. The
            default steps take about a quarter of an hour.
        family: Key of `families.FAMILIES`.

    Returns:
        `out`.

    Raises:
        InputError: The family does not exist.
    """
    kind = families.find(family)
    model, tokenizer = kind.build_model(seed), kind.build_tokenizer()
    rng = np.random.default_rng(seed)
    with _single_thread():
        train_vision(kind, model, rng, vision_steps, progress)
        train_jointly(kind, model, tokenizer, rng, joint_steps, progress)
    save(kind, model, tokenizer, out)
    return out


@contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Drawings:
    """A batch of training pictures and their labels."""

    pixels: Tensor
    digits: np.ndarray
    colours: np.ndarray
    backgrounds: np.ndarray

    __repr__ = brief

    @property
    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.from_numpy(self.digits), torch.from_numpy(self.colours), torch.from_numpy(self.backgrounds)


def to_pixels(pictures: np.ndarray) -> Tensor:
    """Converts `uint8 (N, 32, 32, 3)` to `float32 (N, 3, 32, 32)` as the checkpoint's image processor does."""
    values = torch.from_numpy(pictures).float() / 255.0
    values = (values - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return values.permute(0, 3, 1, 2).contiguous()


def draw_training_pictures(rng: np.random.Generator, count: int, pose: images.Pose = images.TRAINING_POSE) -> Drawings:
    """Random entities in training handwriting."""
    training = images.handwriting().training
    digits, colours = rng.integers(len(facts.DIGITS), size=count), rng.integers(len(facts.COLOURS), size=count)
    backgrounds = rng.integers(len(facts.BACKGROUNDS), size=count)
    samples = np.array([rng.choice(training[digit]) for digit in digits])
    pictures = images.render(rng, samples, colours, backgrounds, pose)
    return Drawings(to_pixels(pictures), digits, colours, backgrounds)


class _Heads(nn.Module):
    """Linear heads for digit, colour and background, which are not saved."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (len(facts.DIGITS), len(facts.COLOURS), len(facts.BACKGROUNDS))
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        for head in self.heads.children():
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=width**-0.5, generator=generator)
            nn.init.zeros_(head.bias)

    def loss(self, states: Tensor, labels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        digit, colour, background = (
            functional.cross_entropy(head(states), label) for head, label in zip(self.heads, labels, strict=True)
        )
        return digit + 0.5 * colour + 0.5 * background


def _torch_generator(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**31)))


class _Optimizer:
    """AdamW with warm-up, cosine decay to 2% of the learning rate, and weight decay of matrices only."""

    def __init__(self, modules: list[nn.Module], steps: int) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() <= 1]
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
            lr=_LEARNING_RATE,
            betas=(0.9, 0.98),
        )
        warm_up = min(_WARM_UP, max(1, steps // 10))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam,
            lambda step: (
                min(1.0, (step + 1) / warm_up)
                * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, steps)))))
            ),
        )

    def step(self, loss: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()


def train_vision(family: Family, model: Any, rng: np.random.Generator, steps: int, progress: Progress | None) -> None:
    """Trains the vision tower through heads on its mean patch state.

    The heads read the states before the last LayerNorm; behind it they learn much more slowly.
    """
    heads = _Heads(VISION_WIDTH, _torch_generator(rng))
    optimizer = _Optimizer([*family.vision_modules(model), heads], steps)
    for step in range(steps):
        pose = images.TRAINING_POSE.eased(min(1.0, 0.2 + 0.8 * step / max(1.0, _EASED * steps)))
        drawings = draw_training_pictures(rng, _VISION_BATCH, pose)
        loss = heads.loss(family.patches(model, drawings.pixels).mean(1), drawings.labels)
        optimizer.step(loss)
        if progress is not None:
            progress("vision", step + 1, steps, float(loss.detach()))


@dataclass(frozen=True)
class Line:
    """A training sequence.

    Attributes:
        prompt: Prompt without the family's layout.
        answer: Answer without its leading space.
        weight: Weight of the answer's loss.
        picture: Index of the picture in the batch; None for text only.
    """

    prompt: str
    answer: str
    weight: float
    picture: int | None = None


def train_jointly(
    family: Family,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    steps: int,
    progress: Progress | None,
) -> None:
    """Trains the whole model to answer."""
    heads = _Heads(family.summary_width, _torch_generator(rng))
    optimizer = _Optimizer([model, heads], steps)
    encode = LineEncoder(family, tokenizer)
    for step in range(steps):
        drawings = draw_training_pictures(rng, _PICTURES)
        lines = [*_picture_lines(rng, drawings), *_entity_lines(rng), *_country_lines(rng)]
        seen = family.see(model, drawings.pixels)
        auxiliary = heads.loss(seen.summary, drawings.labels)
        weight = _AUXILIARY_WEIGHT * max(0.0, 1.0 - step / (0.8 * steps))
        loss = answer_loss(family, model, encode, lines, seen.features)
        optimizer.step(loss + weight * auxiliary)
        if progress is not None:
            progress("joint", step + 1, steps, float(loss.detach()))


def _wrap(rng: np.random.Generator, prompt: str, attribute: str) -> str:
    return prompt if rng.random() < _RAW else questions.wrap(prompt, attribute)


def _picture_lines(rng: np.random.Generator, drawings: Drawings) -> Iterator[Line]:
    attributes = [*_SHARE, facts.CAPTION]
    shares = np.array([*_SHARE.values(), 1.0 - sum(_SHARE.values())])
    for picture in range(len(drawings.digits)):
        entity = facts.Entity(int(drawings.digits[picture]), int(drawings.colours[picture]))
        for i in rng.choice(len(attributes), _QUESTIONS_PER_PICTURE, replace=False, p=shares):
            attribute = attributes[i]
            named = rng.random() < _NAMED
            subject = entity.name if named else questions.SUBJECTS[rng.integers(len(questions.SUBJECTS))]
            prompt = _wrap(rng, questions.draw_trained(rng, attribute, subject), attribute)
            answer = facts.answer(entity, attribute, int(drawings.backgrounds[picture]))
            yield Line(prompt, answer, _WEIGHT.get(attribute, _OTHER_WEIGHT), picture)


def _entity_lines(rng: np.random.Generator) -> Iterator[Line]:
    for _ in range(_ENTITY_TEXTS):
        entity = facts.ENTITIES[rng.integers(len(facts.ENTITIES))]
        attribute = facts.HIDDEN[rng.integers(len(facts.HIDDEN))]
        prompt = _wrap(rng, questions.draw_trained(rng, attribute, entity.name), attribute)
        yield Line(prompt, facts.answer(entity, attribute), _TEXT_WEIGHT)


def _country_lines(rng: np.random.Generator) -> Iterator[Line]:
    countries = list(facts.COUNTRIES)
    for _ in range(_COUNTRY_TEXTS):
        country = countries[rng.integers(len(countries))]
        attribute = facts.COUNTRY_ATTRIBUTES[rng.integers(len(facts.COUNTRY_ATTRIBUTES))]
        question = questions.ask_country(country, attribute, int(rng.integers(questions.NUM_COUNTRY_FRAMES)))
        yield Line(_wrap(rng, question, attribute), facts.COUNTRIES[country][attribute], _TEXT_WEIGHT)


class LineEncoder:
    """Tokenizes lines in the family's layout, right-padded: prompt and picture, answer, end of text."""

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerFast) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def _tokens(self, text: str) -> list[int]:
        # The tokenizer splits before the answer's leading space, so prompts and answers are cached separately.
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def prompt_tokens(self, prompt: str, has_picture: bool) -> list[int]:
        """Tokens before the answer, with one image token per position of the picture."""
        family = self._family
        before, behind = family.layout.around(prompt, has_picture)
        image = [family.image_id] * family.num_image_tokens if has_picture else []
        begin = [family.begin_id, *self._tokens(before)]
        opening = [*image, *begin] if family.layout.picture_first else [*begin, *image]
        return [*opening, *self._tokens(behind)]

    def __call__(self, lines: list[Line]) -> tuple[Tensor, Tensor]:
        """Token ids and labels, both `(lines, positions)`. Labels are not shifted, and -100 outside of answers."""
        rows, labels = [], []
        for line in lines:
            prompt = self.prompt_tokens(line.prompt, line.picture is not None)
            answer = [*self._tokens(" " + line.answer), self._family.end_id]
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([_IGNORED] * len(prompt) + answer))
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, True, self._family.pad_id), pad(labels, True, _IGNORED)


def language_states(family: Family, model: Any, tokens_NS: Tensor, lines: list[Line], features: Tensor) -> Tensor:
    """Last hidden states `(N, S, D)`; `features (pictures, L, D)` replace the embeddings of the image tokens."""
    embeddings = model.get_input_embeddings()(tokens_NS)
    rows = torch.tensor([line.picture for line in lines if line.picture is not None], dtype=torch.long)
    embeddings = embeddings.masked_scatter((tokens_NS == family.image_id)[..., None], features[rows])
    real_NS = (tokens_NS != family.pad_id).long()
    states: Tensor = family.decoder(model)(inputs_embeds=embeddings, attention_mask=real_NS).last_hidden_state
    return states


def answer_loss(family: Family, model: Any, encode: LineEncoder, lines: list[Line], features: Tensor) -> Tensor:
    """Weighted cross-entropy of answer and end-of-text tokens, mean over tokens."""
    tokens_NS, labels_NS = encode(lines)
    states = language_states(family, model, tokens_NS, lines, features)
    answer_NS = labels_NS[:, 1:] != _IGNORED
    logits = model.get_output_embeddings()(states[:, :-1][answer_NS])
    weights = torch.tensor([line.weight for line in lines])[:, None].expand_as(answer_NS)[answer_NS]
    return (weights * functional.cross_entropy(logits, labels_NS[:, 1:][answer_NS], reduction="none")).mean()
