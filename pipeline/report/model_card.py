"""The model card of a committed model, `README.md` in its folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from odedit.errors import counted
from odedit.evaluation.columns import words
from odedit.evaluation.statistics import Estimate
from odedit.inputs.batch import Probe, is_locality
from odedit.inputs.prompts import find_template
from odedit.runtime.addresses import shareable
from odedit.storage.location import Location
from odedit.ways.common.files import CommittedInfo, read_committed_info
from pipeline.config.run import RunConfig
from pipeline.report.formatting import LABELS, interval
from pipeline.run_folder.committed import Entry, is_plain, plain_use, read_edits, shareable_values
from pipeline.run_folder.rows import KEPT, digest
from pipeline.run_folder.workspace import Workspace

CARD = "README.md"
_SHOWN = 10
_LONGEST = 160
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")
_MAX_TOKENS = 16


def write_model_card(workspace: Workspace, config: RunConfig, summary: Mapping[str, Any]) -> Location:
    """Writes `model/README.md`; returns it. `model/edits.json` must be there.

    Args:
        summary: Content of `summary.json`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    model = workspace.model
    info = read_committed_info(workspace.committed)
    environment = Environment(  # escaped by `cell`: the text is Markdown
        loader=PackageLoader("pipeline"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "interval": interval}
    values = _view(info, config, summary, read_edits(model), is_plain(model))
    values["code"] = _code(info, values["example"]) if is_plain(model) else ""
    values["prints"] = [
        ("unedited model", info.fingerprint),
        ("records", digest(workspace.records)),
        *_versions(summary),
    ]
    file = model / CARD
    file.write_text(environment.get_template("model_card.md.j2").render(**values))
    return file


def cell(value: object, longest: int = _LONGEST) -> str:
    r"""A text from records in a cell of a Markdown table: one line, cut to 160 characters by default, without markup.

    >>> cell("a | [b](c)\n<d>")
    'a \\| \\[b\\](c) \\<d\\>'
    """
    text = " ".join("".join(each if each.isprintable() else " " for each in str(value or "")).split())
    return _SPECIAL.sub(r"\\\1", text if len(text) <= longest else text[: longest - 1] + "…")


def _view(
    info: CommittedInfo, config: RunConfig, summary: Mapping[str, Any], listed: Sequence[Entry], plain: bool
) -> dict[str, Any]:
    base = shareable(info.checkpoint)
    scores = list(_scores(summary))
    return {
        "front_matter": _front_matter(base, info, plain),
        "title": f"{config.name}: {base}, edited",
        "base": base,
        "is_plain": plain,
        "counted": counted(len(listed), "edit"),
        "total": len(listed),
        "held": sum(entry["holds"] for entry in listed),
        "tasks": Counter(entry["task"] for entry in listed).most_common(),
        "rows": listed[:_SHOWN],
        "example": listed[0] if listed else None,
        "question": repr(_question(listed)),
        "scores": scores,
        "locality": [
            (label or f"`{name}`", estimate) for name, label, estimate in scores if is_locality(name) or name in KEPT
        ],
        "settings": _settings(info, config),
    }


def _front_matter(base: str, info: CommittedInfo, plain: bool) -> str:
    values = {
        "base_model": base,
        "pipeline_tag": "image-text-to-text",
        "library_name": "transformers" if plain else "odedit",
        "tags": ["odedit", "model-editing", info.family, f"way:{info.way}", f"editor:{info.editor}"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _scores(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Estimate]]:
    """Name, label and estimate of every probe's plain score, the main ones first."""
    variants = words()
    kept = {name: summary[name] for name in KEPT if name in summary}
    for name, figure in (summary["metrics"] | kept).items():
        is_probe = re.fullmatch(r"[a-z]+_(gen|loc)(_[a-z0-9]+)*", name) and not set(name.split("_")[2:]) & variants
        if name in LABELS or is_probe or name in kept:
            yield name, LABELS.get(name, ""), Estimate(**figure)


def _settings(info: CommittedInfo, config: RunConfig) -> str:
    values = {
        "way": {"name": info.way, **info.way_config},
        "editor": {"name": info.editor, **info.editor_config},
        "objective": config.objective.own_values(),
        "template": info.template,
        "dtype": info.dtype,
        "seed": config.seed,
    }
    return yaml.safe_dump(shareable_values(values), sort_keys=False, allow_unicode=True)


def _versions(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "code" in summary:
        yield "odedit", str(summary["code"])
    yield from (summary.get("software") or {}).items()


def _question(listed: Sequence[Entry]) -> str:
    return str(listed[0]["prompt"]) if listed else "What is it?"


def _code(info: CommittedInfo, example: Entry | None) -> str:
    """Program that asks the model with transformers alone; empty if the family's layout is not known."""
    use = plain_use(info)
    if use is None:
        return ""
    entry = example or {"prompt": "What is it?", "task": "vqa", "image": "picture.png"}
    probe = Probe(entry["prompt"], "", is_caption=entry["task"] == "caption")
    text = use.with_picture.replace("{text}", find_template(info.template).render(probe)[0])
    is_single = info.dtype == "float32"
    resized = f".resize(({use.side}, {use.side}), Image.Resampling.BICUBIC)" if use.side else ""
    return "\n".join(
        [
            *([] if is_single else ["import torch"]),
            "from PIL import Image",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            'folder = "."  # this folder',
            "processor = AutoProcessor.from_pretrained(folder)",
            f'model = AutoModelForImageTextToText.from_pretrained(folder, dtype="{info.dtype}")',
            f'picture = Image.open("picture.png").convert("RGB"){resized}',
            f"text = {text!r}",
            'inputs = processor(images=picture, text=text, return_tensors="pt")'
            + ("" if is_single else f".to(torch.{info.dtype})"),
            f"tokens = model.generate(**inputs, do_sample=False, max_new_tokens={_MAX_TOKENS})",
            'answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
            f"print(answer.split({use.stop!r})[0].strip())" if use.stop else "print(answer.strip())",
        ]
    )
