"""Layouts of published files: each is recognised by its keys, and becomes fields and further probes of a record.

References:
    VLKEB (arXiv 2403.07350): `port_new`, questions of one to four hops that follow from the edit.
    MMKE-Bench (arXiv 2502.19870): `rel_*`, `m_rel_*`, long answers; kinds entity, visual and user.
    ComprehendEdit (arXiv 2412.12821): names of its own.
    MC-MKE (arXiv 2406.13219): edits of entities (`ie_*`) or relations (`iro_*`), and a file of consistency questions.
    CCKEB (arXiv 2510.25798): VLKEB with compositional questions.
    LLaVA (arXiv 2304.08485): conversations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from odedit.evaluation.columns import PORTABILITY

Record = Mapping[str, Any]


class LayoutError(ValueError):
    """A record of a known layout that is no edit of one picture. The message is `<kind>: <what>`."""


@dataclass(frozen=True)
class Layout:
    """A layout of records.

    Attributes:
        name: Name of the benchmark or format.
        fits: Whether a record has its keys.
        read: Function to the record's fields; raises LayoutError.
        keys: Patterns of the keys that it reads beside the fields of every record.
        note: What it leaves out, for the user.
    """

    name: str
    fits: Callable[[Record], bool]
    read: Callable[[Record], dict[str, Any]]
    keys: tuple[str, ...] = ()
    note: str = ""

    def reads(self, keys: Iterable[str]) -> list[str]:
        """The keys that this layout reads."""
        return [key for key in keys if any(re.fullmatch(pattern, key) for pattern in self.keys)]


@dataclass
class _Probes:
    """Further probes in construction. Those of one name get numbers, and are averaged when they are scored."""

    entries: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, prompt: Any, target: Any, image: Any = None) -> None:
        number = 1 + sum(known.rpartition("_")[0] == name for known in self.entries)
        entry = {"prompt": prompt, "target": target} | ({} if image is None else {"image": image})
        self.entries[f"{name}_{number}"] = entry

    def within(self, record: Record) -> dict[str, Any]:
        """The record with these probes beside its own."""
        own = record.get("probes")
        if not self.entries:
            return dict(record)
        return {**record, "probes": self.entries | (own if isinstance(own, dict) else {})}


def _as_text(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _add_portability(record: Record, probes: _Probes, image: Any) -> None:
    entries = record.get("port_new")
    for entry in entries if isinstance(entries, list) else []:
        asked = entry.get("Q&A") if isinstance(entry, Mapping) else None
        if not isinstance(asked, Mapping):
            raise LayoutError("wrong type: an entry of field 'port_new' holds no object 'Q&A' of Question and Answer")
        hop = re.sub(r"[^a-z0-9]", "", str(entry.get("port_type", "")).lower()) or "hop"
        probes.add(f"{PORTABILITY}_{hop}", asked.get("Question"), _as_text(asked.get("Answer")), image)


def _with_portability(record: Record) -> dict[str, Any]:
    probes = _Probes()
    _add_portability(record, probes, record.get("image"))
    return probes.within(record)


def _mmke(record: Record) -> dict[str, Any]:
    probes = _Probes()
    image, other = record.get("image"), record.get("image_rephrase")
    for kind, picture in (("rel", None), ("m_rel", image)):
        for key in ("", "_1", "_2"):
            prompt = record.get(f"{kind}{key}")
            target = record.get(f"{kind}_ans{key}", record.get(f"{kind}{key}_ans"))
            if prompt is None:
                continue
            probes.add("trel_gen" if picture is None else "mrel_gen", prompt, target, picture)
            if picture is not None and other is not None:
                again = record.get("image_rephrase_question") or prompt
                probes.add("mrel_gen_other", again, target, f"rephrase:{other}")
    _add_portability(record, probes, record.get("one_hop_img") or image)
    return probes.within(record)


_COMPREHEND = {
    "locality_prompt": "loc",
    "locality_ground_truth": "loc_ans",
    "multimodal_locality_image": "m_loc",
    "multimodal_locality_prompt": "m_loc_q",
    "multimodal_locality_ground_truth": "m_loc_a",
}


def _comprehend(record: Record) -> dict[str, Any]:
    return {_COMPREHEND.get(key, key): value for key, value in record.items()}


def _mc_mke(record: Record) -> dict[str, Any]:
    """An edit of the entity that a picture shows (`ie`), or of a fact about it (`iro`)."""
    images = record.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(path, str) for path in images):
        raise LayoutError("no picture: field 'images' lists none; edits of text alone (sro) are not supported")
    images = [path.rsplit("/", 1)[-1] for path in images]  # paths of the authors' machine
    kind, answer, old = ("ie", "new_e_ent", "e_ent") if "ie_edit_input_idx" in record else ("iro", "new_o", "o")
    wordings = record.get(f"{kind}_question_paraphrases")
    listed = wordings.get(f"{kind}_ques_paraphrases") if isinstance(wordings, Mapping) else None
    wordings = listed if isinstance(listed, list) else []
    fields = {
        "image": images[0], "src": record.get(f"{kind}_question"), "alt": record.get(answer), "pred": record.get(old),
        "rephrase": wordings[0] if wordings else None, "image_rephrase": images[1] if len(images) > 1 else None,
        "fact": " of ".join(str(record[key]) for key in ("r", "s") if key in record) or None,
    }  # fmt: skip
    probes = _Probes()
    for other in images[2:]:
        probes.add("picture_gen", fields["src"], fields["alt"], other)
    for wording in wordings[1:]:
        probes.add("wording_gen", wording, fields["alt"], images[0])
    consistency = record.get(CONSISTENCY)
    for asked in consistency if isinstance(consistency, list) else []:
        if not isinstance(asked, Mapping):
            raise LayoutError(
                f"wrong type: an entry of field {CONSISTENCY!r} is no object of a question and its answer"
            )
        prompt = asked.get("consistency_iro_input_cloze") or asked.get("consistency_sro_cloze")
        target = asked.get("consistency_iro_output") or asked.get("new_o")
        image = images[0] if "consistency_iro_input_cloze" in asked else None
        probes.add("consistency_gen", prompt, target, image)
    return probes.within({name: value for name, value in fields.items() if value is not None})


def _conversation(record: Record) -> dict[str, Any]:
    """The one question and answer of a conversation of LLaVA's or of a chat's layout."""
    turns = record.get("conversations") or record.get("messages")
    said: list[tuple[str, Any]] = []
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, Mapping):
            raise LayoutError("wrong type: a turn of the conversation is no object")
        said.append((str(turn.get("from", turn.get("role", ""))), turn.get("value", turn.get("content"))))
    said = [(who, what) for who, what in said if who != "system"]
    asks = [who in ("human", "user") for who, _ in said]
    if asks != [True, False]:
        raise LayoutError(
            f"conversation: it has {len(said)} turns, expected one question (human) and one answer (gpt); make a "
            "record of each question"
        )
    rest = {key: value for key, value in record.items() if key not in ("conversations", "messages")}
    return {**rest, "question": said[0][1], "answer": said[1][1]}


CONSISTENCY = "consistency"
"""Key under which the reader adds the questions of MC-MKE's file of consistency questions."""
INDICES = ("ie_edit_input_idx", "iro_edit_input_idx", "sro_edit_input_idx")
"""Keys by which a record of MC-MKE and its consistency questions belong together."""
_PORT = "port_new"


def _port_types(record: Record) -> set[str]:
    entries = record.get(_PORT)
    return {str(entry.get("port_type")) for entry in entries or () if isinstance(entry, Mapping)} if isinstance(
        entries, list
    ) else set()  # fmt: skip


LAYOUTS = (
    Layout(
        "MC-MKE", lambda record: any(key in record for key in INDICES), _mc_mke,
        ("images", "(ie|iro)_question", "(ie|iro)_question_paraphrases", "(ie|iro|sro)_edit_input_idx", "new_e_ent",
         "e_ent", "new_o", "o", "r", "s", CONSISTENCY),
        "other accepted answers (`*_alias`) and `locality_test` are not read",
    ),
    Layout(
        "MMKE-Bench", lambda record: "knowledge_type" in record or "m_rel" in record or "m_rel_1" in record, _mmke,
        (r"(m_)?rel(_[12])?(_ans)?(_[12])?", "image_rephrase_question", "one_hop_img", _PORT, "knowledge_type"),
    ),
    Layout(
        "CCKEB", lambda record: "textual_edit" in record or "comp" in _port_types(record), _with_portability, (_PORT,),
        "`textual_edit`, an edit without picture, is not made",
    ),
    Layout("VLKEB", lambda record: _PORT in record, _with_portability, (_PORT,)),
    Layout(
        "ComprehendEdit", lambda record: any(key in record for key in _COMPREHEND), _comprehend, tuple(_COMPREHEND),
    ),
    Layout(
        "conversations", lambda record: "conversations" in record or "messages" in record, _conversation,
        ("conversations", "messages"),
    ),
    Layout("MMEdit", lambda record: {"src", "alt", "loc", "m_loc"} <= record.keys(), dict),
)  # fmt: skip
OWN = Layout("own records", lambda record: True, dict)


def layout_of(record: Record) -> Layout:
    """The layout that a record's keys show."""
    return next(layout for layout in (*LAYOUTS, OWN) if layout.fits(record))
