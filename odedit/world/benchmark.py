"""Benchmark of the embedded world: edits in the format of MMEdit.

A fact is a pair of entity and attribute. The three files have disjoint facts, and disjoint handwriting in the scored
pictures. Supervision (`held_out`) shares neither wordings nor pictures with the scored probes: it uses trained cells of
the question grid and training handwriting, and the probes use held-out cells and held-out handwriting. Records name
the entities that their pictures show, and none of the entities whose answers must stay is shown by their supervision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from odedit.errors import InputError
from odedit.world import facts, images, questions
from odedit.world.facts import CAPTION, HIDDEN, VISIBLE, Entity
from odedit.world.questions import Cell

FACTS_PER_ATTRIBUTE = {"train": 24, "validation": 12, "evaluation": 24}
EDITS_PER_FACT = 3
EDITED = (*HIDDEN, CAPTION)
"""Edited attributes: the hidden ones correspond to MMEdit's E-VQA, captions to E-IC."""
MAX_REPHRASES = min(len(questions.cells(attribute, held_out=False)) for attribute in EDITED) - 1
"""Largest number of rephrases that supervise an edit: the trained wordings of an attribute, without the edit's own."""
IMAGES, REPHRASE_IMAGES = "images", "images_rephrase"

Record = dict[str, Any]


def build(directory: Path, seed: int = 0, rephrases: int = 1) -> dict[str, Path]:
    """Writes `train.json`, `validation.json`, `evaluation.json` and their pictures.

    Args:
        directory: Output directory, created if missing; existing files are replaced.
        seed: Seed of new values, wordings and pictures. The facts and their split are the same for every seed, so that
            training or validation on one seed does not leak evaluation facts of another.
        rephrases: Number of text rephrases and of image rephrases that supervise an edit. All else is the same for
            every number.

    Returns:
        Paths by name: the three files, and the image roots `images` and `images_rephrase`. As in MMEdit,
        `image_rephrase` is relative to the second root, all other images to the first.

    Raises:
        InputError: `directory` is a file, or there are too few wordings.
    """
    if not 1 <= rephrases <= MAX_REPHRASES:
        raise InputError(
            f"supervision.rephrases: got {rephrases}, but the embedded benchmark has 1 to {MAX_REPHRASES} rephrases."
        )
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file, expected a directory to write the benchmark into.")
    paths = {IMAGES: directory / IMAGES, REPHRASE_IMAGES: directory / REPHRASE_IMAGES}
    rng = np.random.default_rng(0)
    parts = divide(rng)
    if seed:
        rng = np.random.default_rng(seed)
    for part, part_facts in parts.items():
        for root in (paths[IMAGES], paths[REPHRASE_IMAGES]):
            (root / part).mkdir(parents=True, exist_ok=True)
        writer = _RecordWriter(np.random.default_rng(rng.integers(2**63)), part, directory)
        records = [record for entity, attribute in part_facts for record in writer.records(entity, attribute)]
        for record in records if rephrases > 1 else ():
            own = np.random.default_rng([seed, *record["edit_id"].encode()])
            _RecordWriter(own, part, directory).add_rephrases(record, rephrases)
        # Shuffled, so that the first records (`data.limit`) have all attributes.
        records = [records[i] for i in rng.permutation(len(records))]
        paths[part] = directory / f"{part}.json"
        paths[part].write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return paths


def divide(rng: np.random.Generator) -> dict[str, list[tuple[Entity, str]]]:
    """Splits the facts over the files, the same number per attribute."""
    parts: dict[str, list[tuple[Entity, str]]] = {part: [] for part in FACTS_PER_ATTRIBUTE}
    for attribute in EDITED:
        order = iter(rng.permutation(len(facts.ENTITIES)))
        for part, count in FACTS_PER_ATTRIBUTE.items():
            parts[part] += [(facts.ENTITIES[next(order)], attribute) for _ in range(count)]
    return parts


@dataclass(frozen=True)
class _Wordings:
    """Wordings of one edit's question.

    Attributes:
        source: Prompt of the edit.
        rephrase: Held-out wording with another noun and frame.
        second_rephrase: A second such wording.
        trained: Trained wording, for supervision.
        named: Prompt of the edit with the entity's name, for use without a picture.
        cell: Grid cell of `source`.
    """

    source: str
    rephrase: str
    second_rephrase: str
    trained: str
    named: str
    cell: Cell


class _RecordWriter:
    """Generates the records of one file and writes their pictures."""

    def __init__(self, rng: np.random.Generator, part: str, directory: Path) -> None:
        self._rng = rng
        self._part = part
        self._directory = directory

    def records(self, entity: Entity, attribute: str) -> list[Record]:
        """The edits of one fact, with different new values, wordings and pictures."""
        values = self._new_values(entity, attribute)
        prefix = f"{self._part}-{attribute}-{facts.COLOURS[entity.colour]}-{facts.DIGITS[entity.digit]}"
        return [self._record(f"{prefix}-{i}", entity, attribute, value) for i, value in enumerate(values)]

    def _record(self, edit_id: str, entity: Entity, attribute: str, alt: str) -> Record:
        words = self._wordings(attribute, entity)
        sample, *rephrase_samples = self._rng.permutation(images.handwriting().held_out[self._part][entity.digit])[:3]
        background = int(self._rng.integers(len(facts.BACKGROUNDS)))
        near, other_near = self._near(entity)
        image = self._write(f"{edit_id}-edit", entity, int(sample), background, images.PLAIN_POSE)
        rephrase_image, second_image = (
            self._write(f"{edit_id}-{name}", entity, int(rephrase), self._other(background), images.REPHRASE_POSE, root)
            for name, rephrase, root in zip(
                ("rephrase", "both"), rephrase_samples, (REPHRASE_IMAGES, IMAGES), strict=True
            )
        )
        far = self._pick([e for e in facts.ENTITIES if e.digit != entity.digit and e.colour != entity.colour])
        far_question = self._question_about(f"{edit_id}-far", far, attribute, training=False)
        country, other_country = self._rng.choice(list(facts.COUNTRIES), 2, replace=False)
        locality = self._country_question(str(country))
        verb_form = self._pick(questions.verb_forms(attribute)).format(s=self._subject())
        record: Record = {
            "edit_id": edit_id,
            "fact": _fact(attribute, entity.name),
            "entity": entity.name,
            "task": "caption" if attribute == CAPTION else "vqa",
            "src": words.source, "pred": facts.answer(entity, attribute), "alt": alt, "rephrase": words.rephrase,
            "image": image, "image_rephrase": rephrase_image,
            "loc": locality["prompt"], "loc_ans": locality["target"],
            "loc_fact": locality["fact"], "loc_entity": locality["entity"],
            "m_loc": far_question["image"], "m_loc_q": far_question["prompt"], "m_loc_a": far_question["target"],
            "m_loc_fact": far_question["fact"], "m_loc_entity": far_question["entity"],
        }  # fmt: skip
        record["probes"] = {
            "tm_gen": {"prompt": words.second_rephrase, "target": alt, "image": second_image},
            "far_gen": {"prompt": verb_form, "target": alt, "image": image},
            "m_loc_near": self._near_question(f"{edit_id}-near", near, attribute, words.source, training=False),
            "t_loc_near": self._text_question(near, attribute, words.cell),
            # The edit's question without a picture: its answer must not change.
            "blind_loc": {"prompt": words.source, "target": facts.answer(entity, attribute)},
        }
        if attribute != CAPTION:  # a caption's prompt names no entity
            record["probes"]["text_gen"] = {"prompt": words.named, "target": alt}
        record["held_out"] = {
            "text_rephrase": {"prompt": words.trained, "target": alt, "image": image},
            "image_rephrase": {
                "prompt": words.source,
                "target": alt,
                "image": self._write_training(f"{edit_id}-train-rephrase", entity, self._other(background)),
            },
            "text_locality": _unnamed(self._country_question(str(other_country))),
            "image_locality": _unnamed(
                self._question_about(
                    f"{edit_id}-train-far",
                    self._pick([e for e in facts.ENTITIES if e not in (entity, near, far)]),
                    attribute,
                    training=True,
                )
            ),
            "near_locality": _unnamed(
                self._near_question(f"{edit_id}-train-near", other_near, attribute, words.source, training=True)
            ),
        }
        return record

    def add_rephrases(self, record: Record, count: int) -> None:
        """Adds the held-out rephrases number 2 to `count`: other trained wordings, and other training handwriting."""
        attribute, name = record["fact"].split(" of ", 1)
        entity = next(entity for entity in facts.ENTITIES if entity.name == name)
        held_out = record["held_out"]
        first = {record["src"], held_out["text_rephrase"]["prompt"]}
        cells = questions.cells(attribute, held_out=False)
        others = [c for c in cells if not first & {questions.ask(attribute, c, s) for s in questions.SUBJECTS}]
        order = self._rng.permutation(len(others))[: count - 1]
        for number, index in enumerate(order, start=2):
            prompt = questions.ask(attribute, others[index], self._subject())
            background = int(self._rng.integers(len(facts.BACKGROUNDS)))
            image = self._write_training(f"{record['edit_id']}-train-rephrase-{number}", entity, background)
            alike = {"target": record["alt"]}
            held_out[f"text_rephrase_{number}"] = {"prompt": prompt, **alike, "image": record["image"]}
            held_out[f"image_rephrase_{number}"] = {"prompt": record["src"], **alike, "image": image}

    def _new_values(self, entity: Entity, attribute: str) -> list[str]:
        """New values that share no word with the true one and are true of no near entity.

        Thus no answer token is right before the edit, and an edit that spills over to a near entity is wrong there.
        """
        truth = facts.answer(entity, attribute).split()
        near = {facts.answer(other, attribute) for other in facts.ENTITIES if other.is_near(entity)}
        choices = [
            choice
            for choice in facts.answer_choices(attribute)
            if choice not in near and all(new != old for new, old in zip(choice.split(), truth, strict=True))
        ]
        return [choices[i] for i in self._rng.permutation(len(choices))[:EDITS_PER_FACT]]

    def _wordings(self, attribute: str, entity: Entity) -> _Wordings:
        trained = questions.cells(attribute, held_out=False)
        # "a photo of" is the first cell of the caption grid, and MMEdit's only caption prompt.
        cell = trained[0] if attribute == CAPTION else self._pick(trained)
        candidates = [c for c in questions.cells(attribute, held_out=True) if c.differs(cell)]
        rephrase, second = (candidates[i] for i in self._rng.permutation(len(candidates))[:2])
        other = self._pick([c for c in trained if c != cell])
        return _Wordings(
            source=questions.ask(attribute, cell, self._subject()),
            rephrase=questions.ask(attribute, rephrase, self._subject()),
            second_rephrase=questions.ask(attribute, second, self._subject()),
            trained=questions.ask(attribute, other, self._subject()),
            named=questions.ask(attribute, cell, entity.name),
            cell=cell,
        )

    def _near(self, entity: Entity) -> tuple[Entity, Entity]:
        """Two near entities in random order: one with the same digit, one with the same colour."""
        same_digit = self._pick([e for e in facts.ENTITIES if e.is_near(entity) and e.digit == entity.digit])
        same_colour = self._pick([e for e in facts.ENTITIES if e.is_near(entity) and e.colour == entity.colour])
        return (same_digit, same_colour) if self._rng.random() < 0.5 else (same_colour, same_digit)

    def _question_about(self, name: str, entity: Entity, edited: str, training: bool) -> dict[str, str]:
        """A question about another attribute than the edited one, with a picture."""
        attribute = self._pick([a for a in (*HIDDEN, *VISIBLE) if a != edited])
        cell = self._pick(questions.cells(attribute, held_out=False))
        prompt = questions.ask(attribute, cell, self._subject())
        return self._near_question(name, entity, attribute, prompt, training)

    def _near_question(self, name: str, entity: Entity, attribute: str, prompt: str, training: bool) -> dict[str, str]:
        """The question `prompt` about `entity`, with a picture of it."""
        background = int(self._rng.integers(len(facts.BACKGROUNDS)))
        if training:
            image = self._write_training(name, entity, background)
        else:
            sample = self._pick(images.handwriting().held_out[self._part][entity.digit])
            image = self._write(name, entity, int(sample), background, images.PLAIN_POSE)
        answer = facts.answer(entity, attribute, background)
        names = {"fact": _fact(attribute, entity.name), "entity": entity.name}
        return {"prompt": prompt, "target": answer, "image": image, **names}

    def _text_question(self, entity: Entity, edited: str, cell: Cell) -> dict[str, str]:
        """A question about an entity by name, without a picture; the edit's own question where text can ask it."""
        if edited == CAPTION:
            edited = self._pick(HIDDEN)
            cell = self._pick(questions.cells(edited, held_out=False))
        return {
            "prompt": questions.ask(edited, cell, entity.name),
            "target": facts.answer(entity, edited),
            "fact": _fact(edited, entity.name),
            "entity": entity.name,
        }

    def _country_question(self, country: str) -> dict[str, str]:
        attribute = self._pick(facts.COUNTRY_ATTRIBUTES)
        frame = int(self._rng.integers(questions.NUM_COUNTRY_FRAMES))
        return {
            "prompt": questions.ask_country(country, attribute, frame),
            "target": facts.COUNTRIES[country][attribute],
            "fact": _fact(attribute, country),
            "entity": country,
        }

    def _write_training(self, name: str, entity: Entity, background: int) -> str:
        sample = self._pick(images.handwriting().training[entity.digit])
        return self._write(name, entity, int(sample), background, images.TRAINING_POSE)

    def _write(
        self, name: str, entity: Entity, sample: int, background: int, pose: images.Pose, root: str = IMAGES
    ) -> str:
        """Draws a picture, writes it under `root`, and returns its path relative to that root."""
        path = f"{self._part}/{name}.png"
        Image.fromarray(images.draw(self._rng, entity, sample, background, pose)).save(self._directory / root / path)
        return path

    def _other(self, background: int) -> int:
        return (background + int(self._rng.integers(1, len(facts.BACKGROUNDS)))) % len(facts.BACKGROUNDS)

    def _subject(self) -> str:
        return self._pick(questions.SUBJECTS)

    def _pick(self, choices: Any) -> Any:
        return choices[int(self._rng.integers(len(choices)))]


def _fact(attribute: str, name: str) -> str:
    return f"{attribute} of {name}"


def _unnamed(entry: dict[str, str]) -> dict[str, str]:
    """The question as an entry of `held_out`, which names neither fact nor entity."""
    return {key: value for key, value in entry.items() if key not in ("fact", "entity")}
