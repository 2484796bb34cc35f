"""Multimodal models that can be edited, one file per family."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from odedit import plugins
from odedit.backbones.base import Backbone, Prefix, is_connector
from odedit.backbones.common import checkpoints
from odedit.backbones.common.checkpoints import PretrainedProcessor
from odedit.backbones.common.same_things import of_pool, with_pool_features, with_same_things
from odedit.data.negatives import NegativePool
from odedit.errors import InputError
from odedit.inputs.batch import (
    EDIT,
    RELIABILITY,
    REPHRASE,
    SUPERVISION_SLOTS,
    EditBatch,
    EditRequest,
    Probe,
    negative_slots,
    numbered,
    rephrase_slots,
)
from odedit.inputs.prompts import Template
from odedit.runtime.stages import stage

__all__ = [
    "Backbone",
    "Prefix",
    "PretrainedProcessor",
    "can_inspect",
    "current",
    "encode_evaluation",
    "encode_requests",
    "encode_supervision",
    "family_of",
    "find",
    "fingerprint",
    "inspect_backbone",
    "is_connector",
    "load_backbone",
    "load_processor",
    "names",
]


_WITH_OWN_LAYOUT = ("minigpt4", "blip2")
"""Families whose checkpoints need no chat template: the layout of their prompts is that of their publications."""


_OF_AUTO, _SIDE_OF_AUTO = "qwen2_5_vl", 448
"""A family that `auto` has replaced, and the width and height to which it resized every picture."""


def current(family: str, image_size: int | None) -> tuple[str, int | None]:
    """Family and image size by which edits of a stored family are read.

    >>> current("qwen2_5_vl", None), current("blip2", None)
    (('auto', 448), ('blip2', None))
    """
    return ("auto", image_size or _SIDE_OF_AUTO) if family == _OF_AUTO else (family, image_size)


def names() -> tuple[str, ...]:
    """Names of the families in this folder, sorted."""
    return plugins.names(sys.modules[__name__])


def family_of(checkpoint: str) -> str:
    """Family of a checkpoint for which none is named: `blip2` or `minigpt4` where it is one, else `auto`.

    Reads its configuration only.

    Raises:
        InputError: The checkpoint is missing, or its configuration cannot be read.
    """
    if checkpoint == "embedded":
        return "blip2"
    auto = find("auto")
    source = checkpoints.resolve(checkpoint, auto.family, auto.architecture, weights=False)
    values = checkpoints.read_config(source, auto.family, auto.architecture).to_dict()
    kind, text = values.get("model_type"), (values.get("text_config") or {}).get("model_type")
    for name in _WITH_OWN_LAYOUT:
        architecture = find(name).architecture
        if kind == architecture.model_type and text in architecture.text_types:
            return name
    return str(auto.family)


def load_backbone(
    family: str,
    checkpoint: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    image_size: int | None = None,
    gpus: int = 1,
) -> Backbone:
    """Loads a frozen model of a family.

    Args:
        family: Name from `names()`, or dotted module that defines `BACKBONE`.
        checkpoint: Folder in the Hugging Face layout, hub id, or `embedded` for the small model in the package.
        dtype: `float32`, `bfloat16` or `float16`; losses are always computed in float32.
        device: Torch device such as `cpu` or `cuda:0`.
        image_size: Width and height to which every picture is resized first; None: the model's own processing alone.
        gpus: Number of GPUs that hold the model, from `device` on.

    Raises:
        InputError: The family is unknown or has an image size of its own, the checkpoint is missing or does not fit
            it, or there are fewer GPUs.
    """
    more = {} if gpus == 1 else {"gpus": gpus}  # a class from outside the package need not take it
    backbone: Backbone = _sized(family, image_size).load(checkpoint, dtype=dtype, device=device, **more)
    return backbone


def inspect_backbone(
    family: str, checkpoint: str, *, dtype: str = "float32", image_size: int | None = None
) -> Backbone:
    """The model without weights, on the meta device: its sites, shapes, tokenizer and fingerprint.

    Reads the configuration and headers of the weight files; the attribute `fingerprint` reads the weights.

    Raises:
        InputError: The family is unknown, the checkpoint is missing or does not fit it, or its files do not fit
            together.
    """
    backbone: Backbone = _sized(family, image_size).inspect(checkpoint, dtype=dtype)
    return backbone


def can_inspect(family: str) -> bool:
    """Whether `inspect_backbone` supports the family; `inspect` is optional for a family from outside the package."""
    return hasattr(find(family), "inspect")


def load_processor(family: str, checkpoint: str, *, image_size: int | None = None) -> PretrainedProcessor:
    """The tokenizer and image processor of a checkpoint, which need no weights."""
    processor: PretrainedProcessor = _sized(family, image_size).load_processor(checkpoint)
    return processor


def fingerprint(family: str, checkpoint: str, *, dtype: str = "float32") -> str:
    """Name of a checkpoint's weights, without loading the model. Raises InputError as `load_backbone`."""
    name: str = find(family).fingerprint_of(checkpoint, dtype=dtype)
    return name


def find(family: str) -> Any:
    """Class of a family. Raises InputError for an unknown name."""
    if family == _OF_AUTO:
        raise InputError(
            f"{_OF_AUTO!r} is no family any more: set backbone.family=auto, or leave it out, and "
            f"backbone.image_size={_SIDE_OF_AUTO}, with which the same edits are made."
        )
    return plugins.find(sys.modules[__name__], "backbone", family, "BACKBONE")


def _sized(family: str, image_size: int | None) -> Any:
    """Class of a family that resizes pictures to a square first."""
    kind = find(family)
    if image_size is None:
        return kind
    if not hasattr(kind, "at_size"):
        raise InputError(
            f"backbone.image_size: got {image_size}, but the family {family!r} has an image size of its own; leave it "
            "out, or set backbone.family=auto."
        )
    return kind.at_size(image_size)


def encode_requests(
    backbone: Backbone,
    requests: Sequence[EditRequest],
    template: Template,
    sites: Sequence[str] = (),
    negatives: NegativePool | None = None,
    joined: bool = False,
) -> tuple[EditBatch, EditBatch]:
    """Encodes edits for optimisation and for evaluation; each distinct picture passes the image tower once.

    Args:
        sites: Sites that the editor changes. With a site of the connector, features are inputs of the connector.
        negatives: Pool of hard negatives, with features computed for the same sites.
        joined: Whether to join text and image rephrases; always with negatives.

    Returns:
        The supervision batch and the evaluation batch. Slots of the first: `SUPERVISION_SLOTS`, further rephrases
        (`rephrase_slots`), joined rephrases (`REPHRASE`, numbered), and `negative_slots`. Slots of the second: `rel`
        and every probe name that occurs, sorted.
    """
    before = any(is_connector(site) for site in sites)
    with stage("image features"):
        features = backbone.image_features([picture for request in requests for picture in request.pictures()], before)
    supervised: Sequence[EditRequest] = requests
    if negatives is not None:
        supervised, features = with_same_things(backbone, requests, features, template, negatives, before)
    return (
        encode_supervision(backbone, supervised, features, template, before, negatives, joined),
        encode_evaluation(backbone, requests, features, template, before),
    )


def encode_evaluation(
    backbone: Backbone,
    requests: Sequence[EditRequest],
    features: Mapping[str, Tensor],
    template: Template,
    before_connector: bool = False,
) -> EditBatch:
    """The evaluation batch that `encode_requests` returns. The arguments are those of `encode_supervision`."""
    edit_ids = [request.edit_id for request in requests]
    metrics = [RELIABILITY, *sorted({name for request in requests for name in request.probes})]
    grid: list[list[Probe | None]] = [
        [request.edit if name == RELIABILITY else request.probes.get(name) for name in metrics] for request in requests
    ]
    return backbone.encode(edit_ids, metrics, grid, features, template, before_connector)


def encode_supervision(
    backbone: Backbone,
    requests: Sequence[EditRequest],
    features: Mapping[str, Tensor],
    template: Template,
    before_connector: bool = False,
    negatives: NegativePool | None = None,
    joined: bool = False,
) -> EditBatch:
    """The supervision batch that `encode_requests` returns.

    Args:
        features: Image features by the picture's key.
        before_connector: Whether `features` are inputs of the connector.
        negatives: Pool of hard negatives.
        joined: Whether to join text and image rephrases; always with negatives.
    """
    count = max([1, *(request.num_rephrases for request in requests)])
    slots: tuple[str, ...] = (*SUPERVISION_SLOTS, *rephrase_slots(count)[2:])
    grid: list[list[Probe | None]] = [
        [request.edit if slot == EDIT else request.supervision.get(slot) for slot in slots] for request in requests
    ]
    edit_ids = [request.edit_id for request in requests]
    if joined or negatives is not None:
        numbers = range(1, count + 1)
        slots = (*slots, *(numbered(REPHRASE, number) for number in numbers))
        for row, request in zip(grid, requests, strict=True):
            row += [request.rephrase(number) for number in numbers]
    if negatives is not None:
        slots = (*slots, *negative_slots(negatives.count))
        chosen = of_pool(requests, features, negatives.probes)
        features = with_pool_features(features, chosen, negatives)
        for row, probes in zip(grid, chosen, strict=True):
            row += [*probes, *[None] * (negatives.count - len(probes))]
    return backbone.encode(edit_ids, slots, grid, features, template, before_connector)
