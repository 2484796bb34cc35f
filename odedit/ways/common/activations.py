"""Inputs of modules: second moments over unedited sequences, and the keys at which answers are predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import Editor
from odedit.editors.common.hooks import Rewrite, rewritten
from odedit.errors import InputError
from odedit.inputs.batch import EditBatch, EditParams, EditRequest
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.prompts import Template
from odedit.runtime.brief import brief
from odedit.runtime.gather import gather_positions
from odedit.storage.location import Location
from odedit.storage.tensors import read_tensors, write_tensors
from odedit.ways.common.sequences import Features

IMAGE, TEXT = "image", "text"
_COUNT = "count"
_REQUESTS_AT_ONCE, SEQUENCES_AT_ONCE, _POSITIONS_AT_ONCE = 16, 128, 8192


@dataclass
class Moments:
    """Sums of x x^T over the inputs x of modules, at image positions and at text positions apart; float64.

    Attributes:
        sums: By site and kind of position, `<site>/image` and `<site>/text`, `(I, I)`; number of inputs of each kind,
            `count/image` and `count/text`, `()`.
    """

    sums: dict[str, Tensor]

    __repr__ = brief

    @classmethod
    def empty(cls, backbone: Backbone, sites: Sequence[str]) -> Moments:
        """Sums over no inputs."""
        sums = {f"{_COUNT}/{kind}": torch.zeros((), dtype=torch.float64) for kind in (IMAGE, TEXT)}
        for site in sites:
            width = backbone.site(site).weight.shape[1]
            for kind in (IMAGE, TEXT):
                sums[f"{site}/{kind}"] = torch.zeros(width, width, dtype=torch.float64, device=backbone.device)
        return cls(sums)

    def add(self, other: Moments) -> None:
        """Adds the sums over other inputs."""
        for name, value in self.sums.items():
            value += other.sums[name].to(value.device)

    def mean(self, site: str, kind: str) -> Tensor:
        """Mean of x x^T at a site; zeros without any input of that kind."""
        total: Tensor = self.sums[f"{site}/{kind}"]
        return total / self.sums[f"{_COUNT}/{kind}"].to(total.device).clamp_min(1)

    def write(self, location: Location, metadata: Mapping[str, str]) -> None:
        """Writes the sums atomically."""
        write_tensors(location, self.sums, metadata)

    @classmethod
    def read(cls, location: Location, device: str = "cpu") -> Moments:
        """The sums of a file. Raises as `read_tensors`."""
        return cls(read_tensors(location, device)[0])


def added_up(files: Sequence[Location], device: str) -> Moments | None:
    """The sum of all shares, in their order; None without any."""
    total: Moments | None = None
    for file in files:
        moments = Moments.read(file, device)
        if total is None:
            total = moments
        else:
            total.add(moments)
    return total


def measured(
    backbone: Backbone, template: Template, sites: Sequence[str], requests: Sequence[EditRequest]
) -> Iterator[int | Moments]:
    """Reads all sequences of requests: yields the number of requests done, and at last their `Moments`."""
    moments = Moments.empty(backbone, sites)
    for start in range(0, len(requests), _REQUESTS_AT_ONCE):
        yield start
        part = requests[start : start + _REQUESTS_AT_ONCE]
        features, sequences = Features(backbone), []
        for request in part:
            for probe in (request.edit, *request.supervision.values(), *request.probes.values()):
                with suppress(InputError, ValueError):  # questions that the model does not take are left out
                    sequence = backbone.sequence(probe, template)
                    if len(sequence.tokens) <= backbone.max_positions:
                        features.add([] if probe.picture is None else [probe.picture])
                        sequences.append(sequence)
        for batch in batches(features, sequences):
            _add(moments, backbone, sites, batch)
    yield moments


def _add(moments: Moments, backbone: Backbone, sites: Sequence[str], batch: EditBatch) -> None:
    inputs = inputs_of(backbone, batch, sites)
    is_image_RS = batch.image_EKS.flatten(0, 1)
    kinds = {IMAGE: is_image_RS, TEXT: batch.real_EKS.flatten(0, 1) & ~is_image_RS}
    for kind, mask_RS in kinds.items():
        moments.sums[f"{_COUNT}/{kind}"] += mask_RS.sum().cpu()
        for site, input_RSI in inputs.items():
            for x_MI in input_RSI[mask_RS].split(_POSITIONS_AT_ONCE):
                x_MI = x_MI.double()
                moments.sums[f"{site}/{kind}"] += x_MI.T @ x_MI


def batches(features: Features, sequences: Sequence[TokenSequence]) -> Iterator[EditBatch]:
    """The sequences in their order as batches of one edit, of bounded size."""
    for start in range(0, len(sequences), SEQUENCES_AT_ONCE):
        yield features.row(sequences[start : start + SEQUENCES_AT_ONCE])


class _AllRead(Exception):
    """Ends a forward whose further layers are not needed."""


@torch.no_grad()
def inputs_of(backbone: Backbone, batch: EditBatch, sites: Sequence[str]) -> dict[str, Tensor]:
    """Inputs `(R, S, I)` of sites of a batch's R sequences, with whatever edits are applied.

    The layers above the highest site do not run.

    Args:
        sites: Sites, the lowest first.
    """
    return {site: x for site, (x, _) in _read(backbone, batch, sites, backbone.prefix(batch, *sites)).items()}


def _read(
    backbone: Backbone, batch: EditBatch, sites: Sequence[str], prefix: Prefix
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of sites; the prefix is that of the lowest."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def reader(site: str) -> Rewrite:
        def read(x: Tensor, y: Tensor) -> Tensor:
            found[site] = x, y
            if len(found) == len(sites):
                raise _AllRead
            return y

        return read

    with suppress(_AllRead), rewritten({backbone.site(site): reader(site) for site in sites}):
        backbone.suffix(prefix)
    return found


@dataclass(frozen=True)
class Written:
    """Matrices that are changed already.

    Attributes:
        editor: Editor that applies `params` with `together`.
        params: Differences of the matrices.
    """

    editor: Editor
    params: EditParams

    __repr__ = brief


@torch.no_grad()
def keys_of(backbone: Backbone, batch: EditBatch, site: str, target: str, written: Written) -> tuple[Tensor, Tensor]:
    """Inputs of a site where answers are predicted, and what matrices changed below add to the residual stream there.

    Args:
        batch: R sequences of one edit.
        target: Site at or above `site`, after whose output the stream is read.

    Returns:
        Keys `(R, T, I)`, and additions `(R, T, D)`, zeros without changed matrices.
    """
    at_RT = batch.predict_EKT.flatten(0, 1)
    if not written.params:
        (input_RSI,) = inputs_of(backbone, batch, (site,)).values()
        keys_RTI = gather_positions(input_RSI, at_RT)
        width = len(backbone.site(target).weight)
        return keys_RTI, keys_RTI.new_zeros(*at_RT.shape, width)
    before_RSD = _stream(backbone, batch, target)
    with written.editor.together(backbone, written.params, batch):
        (input_RSI,) = inputs_of(backbone, batch, (site,)).values()
        after_RSD = _stream(backbone, batch, target)
    return gather_positions(input_RSI, at_RT), gather_positions(after_RSD - before_RSD, at_RT)


def _stream(backbone: Backbone, batch: EditBatch, site: str) -> Tensor:
    """Residual stream after a feed-forward site, `(R, S, D)`: what enters the feed-forward half, and its output."""
    prefix = backbone.prefix(batch, site)
    ((_, output_RSD),) = _read(backbone, batch, (site,), prefix).values()
    return prefix.hidden_RSD + output_RSD
