"""What all families share: image features into a token sequence, and a decoder run in two parts.

A family is a subclass that states its architecture, its processor, where a probe's picture and text go, what the image
tower computes and what connects it to the text model.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from odedit.backbones.base import CONNECTOR, BeforeConnector, Prefix, is_connector
from odedit.backbones.common import checkpoints
from odedit.backbones.common.checkpoints import Architecture, PretrainedProcessor
from odedit.backbones.common.decoders import Decoder, Rotary
from odedit.errors import InputError, in_words
from odedit.inputs.batch import EditBatch, Picture, Probe
from odedit.inputs.encoding import TokenSequence, assemble
from odedit.inputs.prompts import Template, find_template
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KeyValues

# At most this many pictures run through the image tower at a time.
_TOWER_BATCH = 64
_PIXELS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Of the pictures that pass the image tower together: what a layer makes of more leaves a processor's cache."""
# At most this many positions, if more than one sequence, run through the layers below an edit at a time: enough to keep
# the device busy, and little beside what an edit takes.
_POSITIONS_AT_ONCE = {"cpu": 1024, "cuda": 2**14}


class MultimodalModel(ABC):
    """A frozen model: image tower, connector, text model; implements `backbones.base.Backbone`."""

    family: ClassVar[str]
    architecture: ClassVar[Architecture]
    Processor: ClassVar[type[PretrainedProcessor]]
    stop: ClassVar[str | None] = None
    """How the text begins that ends an answer, where a family has one beside its end tokens."""

    def __init__(self, model: Any, processor: Any, checkpoint: str, fingerprint: Callable[[], str]) -> None:
        """Takes the fingerprint as a function: it reads all of the weights."""
        self.checkpoint = checkpoint
        self._fingerprint = fingerprint
        self.processor = processor
        self.model = model.eval().requires_grad_(False)
        self._decoder = self.make_decoder()
        self.num_layers = self._decoder.num_layers
        self.hidden_size = self._decoder.hidden_size
        self.max_positions = self._decoder.max_positions
        self.vocabulary_size = self._decoder.vocabulary_size
        self.ends = self._ends()
        self._white: dict[int, bool] = {}
        self._connector_linears = {
            f"{CONNECTOR}{name}.{path}".rstrip("."): linear
            for name, module in self.connector().items()
            for path, linear in module.named_modules()
            if isinstance(linear, nn.Linear)
        }

    @cached_property
    def fingerprint(self) -> str:
        return self._fingerprint()

    @classmethod
    def load_processor(cls, checkpoint: str) -> PretrainedProcessor:
        return cls.Processor(cls._found(checkpoint, weights=False)[0])

    @classmethod
    def fingerprint_of(cls, checkpoint: str, *, dtype: str = "float32") -> str:
        """What `fingerprint` will be, without loading the model."""
        source, config = cls._found(checkpoint)
        return checkpoints.fingerprint(source, checkpoint, config, dtype)

    @classmethod
    def load(cls, checkpoint: str, *, dtype: str = "float32", device: str = "cpu") -> Self:
        checkpoints.check_dtype(dtype)
        empty = cls.inspect(checkpoint, dtype=dtype)
        fingerprint = empty.fingerprint  # before the model takes its memory: it shows broken values
        model = checkpoints.load_model(cls._found(checkpoint)[0], checkpoint, cls.architecture, dtype)
        return cls(model.to(device), empty.processor, checkpoint, lambda: fingerprint)

    @classmethod
    def inspect(cls, checkpoint: str, *, dtype: str = "float32") -> Self:
        """The model without its weights, on the meta device; they are read when its fingerprint is asked for.

        Raises:
            InputError: Configuration, headers of the weight files, tokenizer and image processor do not fit together.
        """
        checkpoints.check_dtype(dtype)
        source, config = cls._found(checkpoint)
        model = checkpoints.empty_model(source, checkpoint, config, cls.architecture, dtype)
        fingerprint = partial(checkpoints.fingerprint, source, checkpoint, config, dtype)
        empty = cls(model, cls.Processor(source), checkpoint, fingerprint)
        empty._check_tokenizer()
        empty.check_picture()
        return empty

    def _check_tokenizer(self) -> None:
        tokenizer = self.processor.tokenizer
        name, ids = f"backbone.checkpoint {self.checkpoint!r}", tokenizer.get_vocab()
        num_rows = len(self.model.get_input_embeddings().weight)
        largest = max(ids, key=ids.__getitem__)
        if ids[largest] >= num_rows:
            raise InputError(
                f"{name}: its tokenizer has the token {largest!r} with the number {ids[largest]}, and the model's "
                f"embeddings end at {num_rows - 1}. Take tokenizer and weights from the same checkpoint."
            )
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise InputError(f"{name}: its tokenizer has neither a padding token nor an end token.")
        unknown = [mark for mark, number in self.marks().items() if number not in tokenizer.added_tokens_decoder]
        if unknown:
            raise InputError(
                f"{name}: its tokenizer lacks the special token {', '.join(unknown)}, which a prompt of the family "
                f"{self.family!r} needs. Take the tokenizer's files from the model that config.json is of."
            )

    def check_picture(self) -> None:
        """Raises InputError unless a picture passes the processor, the tower and the connector to its positions."""
        name = f"backbone.checkpoint {self.checkpoint!r}"
        picture = self.processor.process(Picture("", np.zeros((64, 64, 3), dtype=np.uint8)))
        num_positions = len(self.sequence(Probe("What is it?", "a", picture), find_template("mmedit")).image)
        try:
            pixels = torch.empty(1, *picture.pixels.shape, device=self.device)
            shape = tuple(self.connect(self.tower(pixels.to(self.model.dtype))).shape[1:])
        except Exception as error:  # what the library raises depends on which size is wrong
            raise InputError(
                f"{name}: a picture as the image processor makes it, {picture.pixels.shape}, does not pass the image "
                f"tower: {in_words(error)}. Take preprocessor_config.json and config.json from the same model."
            ) from error
        if shape != (num_positions, self.hidden_size):
            raise InputError(
                f"{name}: a picture becomes features of shape {shape}, and the text model takes {num_positions} "
                f"positions of width {self.hidden_size}. Take config.json from the model that the weights are of."
            )

    @classmethod
    def _found(cls, checkpoint: str, *, weights: bool = True) -> tuple[str, Any]:
        source = checkpoints.resolve(checkpoint, cls.family, cls.architecture, weights=weights)
        return source, checkpoints.read_config(source, cls.family, cls.architecture)

    @abstractmethod
    def make_decoder(self) -> Decoder:
        """The text model in halves of layers."""

    @abstractmethod
    def connector(self) -> Mapping[str, nn.Module]:
        """The modules between image tower and text model, by their name in the model."""

    @abstractmethod
    def tower(self, pixels: Tensor) -> Tensor:
        """What the image tower makes of float32 `(N, 3, height, width)`: `(N, patches, width)` in the model's type."""

    @abstractmethod
    def connect(self, vision: Tensor) -> Tensor:
        """From `(N, patches, width)` to the positions of the text model, `(N, L, D)`."""

    @abstractmethod
    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        """Where a probe's picture and text go. Raises ValueError if its target has no token."""

    def marks(self) -> Mapping[str, int | None]:
        """Special tokens that `sequence` writes: what they are, and their numbers in the tokenizer."""
        return {}

    def _ends(self) -> frozenset[int]:
        tokenizer, configured = self.processor.tokenizer, self.model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
        if self.stop is not None:
            words = tokenizer.get_vocab().items()
            ends |= {number for word, number in words if word.lstrip("\u2581\u0120 ").startswith(self.stop)}
        return frozenset(ends or {tokenizer.pad_token_id or 0})

    def positions(self, tokens_RS: Tensor, image_RS: Tensor) -> Tensor | None:
        """Position ids where they are not 0, 1, 2, ..."""
        return None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Picture], before_connector: bool = False) -> Mapping[str, Tensor]:
        distinct = {picture.key: picture for picture in pictures}
        features: list[Tensor] = []
        keys = list(distinct)
        for start in range(0, len(keys), _TOWER_BATCH):
            processed = [self.processor.process(distinct[key]).pixels for key in keys[start : start + _TOWER_BATCH]]
            at_once = max(1, _PIXELS_AT_ONCE.get(self.device.type, _PIXELS_AT_ONCE["cuda"]) // processed[0].size)
            for pixels in _moved(processed, self.device).split(at_once):
                vision = self.tower(pixels)
                features += (vision if before_connector else self.connect(vision)).unbind(0)
        return dict(zip(keys, features, strict=True))

    def encode(
        self,
        edit_ids: Sequence[str],
        slots: Sequence[str],
        grid: Sequence[Sequence[Probe | None]],
        features: Mapping[str, Tensor],
        template: Template,
        before_connector: bool = False,
    ) -> EditBatch:
        tokenizer = self.processor.tokenizer
        cells = [[None if probe is None else self.sequence(probe, template) for probe in row] for row in grid]
        for edit_id, row in zip(edit_ids, cells, strict=True):
            for slot, cell in zip(slots, row, strict=True):
                if cell is not None and len(cell.tokens) > self.max_positions:
                    raise InputError(
                        f"{edit_id}, {slot}: its {len(cell.tokens):,} tokens are more than the {self.max_positions:,} "
                        "positions that the text model takes."
                    )
        pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        width = self.vision_width if before_connector else self.hidden_size
        batch = assemble(edit_ids, slots, cells, features, pad, width, self.device, self._is_white)
        return replace(batch, before_connector=before_connector)

    def _is_white(self, token: int) -> bool:
        """Whether a token is white space and nothing else."""
        if token not in self._white:
            self._white[token] = not self.processor.tokenizer.decode([token]).strip()
        return self._white[token]

    @property
    def vision_width(self) -> int:
        """Width of what `tower` returns."""
        return int(self.model.config.vision_config.hidden_size)

    def site(self, name: str) -> nn.Linear:
        if not is_connector(name):
            return self._decoder.site(name)
        if name not in self._connector_linears:
            near = difflib.get_close_matches(name, self._connector_linears, n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            there = self.connector_sites()
            raise InputError(
                f"Unknown site {name!r}.{hint} The connector has {len(there)} sites, {there[0]!r} to {there[-1]!r}."
            )
        return self._connector_linears[name]

    def connector_sites(self) -> tuple[str, ...]:
        return tuple(self._connector_linears)

    def activation(self, site: str) -> Callable[[Tensor], Tensor]:
        if is_connector(site):
            raise InputError(f"site {site!r} feeds no activation of the text model: choose an 'ffn' site.")
        return self._decoder.activation(site)

    @torch.no_grad()
    def prefix(
        self,
        batch: EditBatch,
        *sites: str,
        positionwise: bool = False,
        memory: KeyValues | None = None,
        read_EKT: Tensor | None = None,
    ) -> Prefix:
        shape, rotary = (batch.num_edits, len(batch.slots)), self._rotary(batch)
        whole_layer = self._whole_layer(sites, positionwise)
        if any(is_connector(site) for site in sites):
            if not batch.before_connector:
                raise ValueError(
                    "the batch holds what leaves the connector, and a site of the connector is to be edited: "
                    "encode it with sites=editor.sites."
                )
            embedded_RSD = self._decoder.embed_tokens(batch.tokens_EKS.flatten(0, 1))
            before = _of_pictures(batch, slice(None))
            return Prefix(0, False, embedded_RSD, shape, whole_layer, rotary, before)
        located = [self._decoder.locate(site) for site in sites]
        layer = min(layer for layer, _ in located)
        at_ffn = all(part.startswith("ffn") for at, part in located if at == layer)
        is_read = read_EKT is not None and at_ffn and whole_layer < layer == self.num_layers - 1
        whole_RSD = self._below(layer, at_ffn, batch, rotary, read_EKT if is_read else None, memory)
        return Prefix(layer, at_ffn, whole_RSD, shape, whole_layer, rotary, is_read=is_read)

    def _below(
        self,
        layer: int,
        at_ffn: bool,
        batch: EditBatch,
        rotary: Rotary | None,
        read_EKT: Tensor | None,
        memory: KeyValues | None,
    ) -> Tensor:
        """What enters the layer, or its feed-forward half, `(R, S, D)`; `(R, T, D)` at the positions that are read."""
        device, num_slots = batch.tokens_EKS.device, len(batch.slots)
        # What a layer holds for a moment is many times what is kept of it; but a memory takes all rows at a time.
        at_once = _POSITIONS_AT_ONCE.get(device.type, _POSITIONS_AT_ONCE["cuda"])
        parts = [batch] if memory is not None else batch.parts()
        whole_RSD = None
        for part in parts:
            columns_K = torch.tensor([batch.slots.index(slot) for slot in part.slots], device=device)
            place_R = (torch.arange(batch.num_edits, device=device).unsqueeze(1) * num_slots + columns_K).flatten()
            read_RT = None if read_EKT is None else read_EKT.flatten(0, 1)[place_R]
            turned = rotary if part is batch else self._rotary(part)
            num_rows, length = len(place_R), part.tokens_EKS.shape[2]
            size = num_rows if memory is not None else max(1, at_once // length)
            for start in range(0, num_rows, size):
                rows = slice(start, start + size)
                states = self._layers_below(layer, at_ffn, part, rows, turned, read_RT, memory)
                if len(states) == batch.num_edits * num_slots:
                    return states
                if whole_RSD is None:
                    behind = batch.tokens_EKS.shape[2] if read_EKT is None else states.shape[1]
                    whole_RSD = states.new_zeros(batch.num_edits * num_slots, behind, states.shape[2])
                whole_RSD[place_R[rows], : states.shape[1]] = states
        assert whole_RSD is not None, "a batch has sequences"
        return whole_RSD

    def _layers_below(
        self,
        layer: int,
        at_ffn: bool,
        batch: EditBatch,
        rows: slice,
        rotary: Rotary | None,
        read_RT: Tensor | None,
        memory: KeyValues | None,
    ) -> Tensor:
        """Of these sequences of a batch."""
        at = _of_pictures(batch, rows)
        if rotary is not None:
            rotary = _rows(rotary[0], rows), _rows(rotary[1], rows)
        features_RLD = self.connect(at.vision_RPW) if batch.before_connector else at.vision_RPW
        embedded_RSD = self._decoder.embed_tokens(batch.tokens_EKS.flatten(0, 1)[rows])
        hidden_RSD = self._decoder.embed_positions(_scatter(embedded_RSD, features_RLD, at.image_RS))
        for index in range(layer):
            hidden_RSD = self._decoder.attention_half(index, hidden_RSD, rotary, memory=memory)
            hidden_RSD = self._decoder.ffn_half(index, hidden_RSD)
        if not at_ffn:
            return hidden_RSD
        read = None if read_RT is None else read_RT[rows]
        return self._decoder.attention_half(layer, hidden_RSD, rotary, read, memory)

    def _rotary(self, batch: EditBatch) -> Rotary | None:
        """Of the batch's sequences, or of all positions alike."""
        tokens_RS, image_RS = batch.tokens_EKS.flatten(0, 1), batch.image_EKS.flatten(0, 1)
        return self._decoder.rotary(self._decoder.embed_tokens(tokens_RS[:1]), self.positions(tokens_RS, image_RS))

    def _whole_layer(self, sites: Sequence[str], positionwise: bool) -> int:
        if positionwise:
            return -1
        return max((self._decoder.locate(site)[0] for site in sites if not is_connector(site)), default=-1)

    def suffix(self, prefix: Prefix, read_EKT: Tensor | None = None, memory: KeyValues | None = None) -> Tensor:
        read_RT = None if read_EKT is None or prefix.is_read else read_EKT.flatten(0, 1)
        last = self.num_layers - 1
        # Behind the last layer's keys and values nothing looks at another position.
        early_RT = read_RT if prefix.whole_layer < last else None
        hidden = prefix.hidden_RSD
        if prefix.connector is not None:
            features_RLD = self.connect(prefix.connector.vision_RPW)
            hidden = self._decoder.embed_positions(_scatter(hidden, features_RLD, prefix.connector.image_RS))
        for index in range(prefix.layer, self.num_layers):
            read = early_RT if index == last else None
            if index > prefix.layer or not prefix.at_ffn:
                hidden = self._decoder.attention_half(index, hidden, prefix.rotary, read, memory)
            elif read is not None:
                hidden = gather_positions(hidden, read)
            hidden = self._decoder.ffn_half(index, hidden)
        if read_RT is not None and early_RT is None:
            hidden = gather_positions(hidden, read_RT)
        hidden = self._decoder.finish(hidden)
        return hidden.reshape(*prefix.shape, *hidden.shape[1:])

    def with_room(self, prefix: Prefix, batch: EditBatch) -> Prefix:
        if prefix.rotary is None or not batch.room:
            return prefix
        tokens_EKS, image_EKS = (functional.pad(part, (0, batch.room)) for part in (batch.tokens_EKS, batch.image_EKS))
        return replace(prefix, rotary=self._rotary(replace(batch, tokens_EKS=tokens_EKS, image_EKS=image_EKS)))

    @torch.no_grad()
    def behind(self, prefix: Prefix, batch: EditBatch, tokens_EKT: Tensor, memory: KeyValues, first: int = 0) -> Tensor:
        # A token stands where the one after it is predicted; the first is predicted by the prompt.
        at_RT = batch.predict_EKT[..., 1 + first : tokens_EKT.shape[-1]].flatten(0, 1)
        last_R = batch.predict_EKT[..., 0].flatten()
        rotary = None
        if prefix.rotary is not None:
            cos, sin = (gather_positions(part.expand(len(at_RT), -1, -1), at_RT) for part in prefix.rotary)
            rotary = cos, sin
        embedded_RTD = self._decoder.embed_tokens(tokens_EKT[..., first:-1].flatten(0, 1))
        hidden_RTD = self._decoder.embed_positions(embedded_RTD, at_RT)
        for layer in range(self.num_layers):
            hidden_RTD = self._decoder.attention_half_behind(layer, hidden_RTD, rotary, last_R, memory, first)
            hidden_RTD = self._decoder.ffn_half(layer, hidden_RTD)
        return self._decoder.finish(hidden_RTD).unflatten(0, prefix.shape)

    def head(self, hidden: Tensor) -> Tensor:
        return self._decoder.head(hidden)


def _moved(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Arrays of one shape as one tensor on the device. From memory that is locked a GPU fetches them by itself, while
    it computes something else.
    """
    shape = (len(arrays), *arrays[0].shape)
    stacked = torch.empty(shape, pin_memory=device.type == "cuda")
    for row, array in zip(stacked, arrays, strict=True):
        row.copy_(torch.from_numpy(array))
    return stacked.to(device, non_blocking=True)


def _rows(part_RSd: Tensor, rows: slice) -> Tensor:
    """Those of a rotary part, which may be the same for all."""
    return part_RSd if len(part_RSd) == 1 else part_RSd[rows]


def _of_pictures(batch: EditBatch, rows: slice) -> BeforeConnector:
    """The features of these sequences' pictures, and where they go."""
    picture_R, image_RS = batch.picture_EK.flatten()[rows], batch.image_EKS.flatten(0, 1)[rows]
    if len(batch.features_NLD):
        features_RLD = batch.features_NLD[picture_R.clamp(min=0)].masked_fill((picture_R < 0)[:, None, None], 0.0)
    else:
        features_RLD = batch.features_NLD.new_zeros(len(picture_R), *batch.features_NLD.shape[1:])
    return BeforeConnector(features_RLD, image_RS)


def _scatter(embedded_RSD: Tensor, features_RLD: Tensor, image_RS: Tensor) -> Tensor:
    """Puts each sequence's image features, in order, on its image positions."""
    # By their places: a GPU would have to be waited for, to learn how many a mask lets through.
    place_RS = (image_RS.cumsum(1) - 1).clamp_min(0)
    features_RSD = gather_positions(features_RLD.to(embedded_RSD.dtype), place_RS)
    return torch.where(image_RS.unsqueeze(-1), features_RSD, embedded_RSD)
