"""The contract of a backbone: a frozen model that runs below the edit once per batch, and above it at every step.

A family is a subclass of `Backbone` that defines its architecture and processor, the layout of its prompts, and the
path of a picture through image tower and connector.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from odedit.backbones.common import checkpoints
from odedit.backbones.common.checkpoints import Architecture, PretrainedProcessor
from odedit.backbones.common.decoders import FUSED, Decoder
from odedit.backbones.common.layer_inputs import LayerInputs
from odedit.backbones.common.placement import Placement, devices_of
from odedit.backbones.common.prefix import CONNECTOR, BeforeConnector, Prefix, is_connector
from odedit.errors import InputError, in_words
from odedit.inputs.batch import EditBatch, Picture, Probe
from odedit.inputs.encoding import TokenSequence, assemble
from odedit.inputs.plain import PlainUse
from odedit.inputs.prompts import Template, find_template
from odedit.runtime.budgets import budgets
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache

__all__ = ["CONNECTOR", "Backbone", "BeforeConnector", "Prefix", "ends_of", "holding", "is_connector"]

_PROCESSED_TOGETHER = 64
"""Pictures processed, and held as pixels, at a time."""


class Backbone(ABC):
    """A frozen multimodal model: image tower, connector, text model.

    Nothing between `encode` and `suffix` depends on an edit: `image_features` runs the image tower once per distinct
    picture, `prefix` the text model below the lowest edited site once per batch, and an optimisation step runs `suffix`
    only.

    Attributes:
        family: Name of the family, as in `backbone.family`.
        architecture: Configuration that a checkpoint must have.
        Processor: Class of the tokenizer and image processor.
        stop: Beginning of the text that ends an answer, for families that have one besides end tokens.
        checkpoint: Folder or hub id, as the user gave it.
        processor: Tokenizer and image processor.
        model: Model of `transformers`, in evaluation mode and without gradients.
        num_layers, hidden_size, max_positions, vocabulary_size: Sizes of the text model.
        ends: Tokens that end an answer: those of the tokenizer, of the generation settings and of `stop`.
    """

    family: ClassVar[str]
    architecture: ClassVar[Architecture]
    Processor: ClassVar[type[PretrainedProcessor]]
    stop: ClassVar[str | None] = None

    def __init__(self, model: Any, processor: Any, checkpoint: str, fingerprint: Callable[[], str]) -> None:
        """Takes the fingerprint as a function, because it reads all weights."""
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

    # Defined by a family.

    @abstractmethod
    def make_decoder(self) -> Decoder:
        """The text model as halves of layers."""

    @abstractmethod
    def connector(self) -> Mapping[str, nn.Module]:
        """The modules between image tower and text model, by their name in the model."""

    @abstractmethod
    def tower(self, pixels: Tensor) -> Tensor:
        """Output of the image tower for float32 `(N, 3, height, width)`: `(N, patches, width)` in the model's type."""

    @abstractmethod
    def connect(self, vision: Tensor) -> Tensor:
        """Features `(N, L, D)` of the text model's image positions, from the tower's `(N, patches, width)`."""

    @abstractmethod
    def sequence(self, probe: Probe, template: Template) -> TokenSequence:
        """A probe's tokens in the family's layout, and the positions of its picture and its target.

        Raises:
            InputError: The text contains an image marker or a special token of the tokenizer.
            ValueError: The target has no token.
        """

    def marks(self) -> Mapping[str, int | None]:
        """Ids of the special tokens that `sequence` writes, by description."""
        return {}

    def plain_use(self) -> PlainUse | None:
        """How a program without odedit asks the model; None: not known."""
        return None

    def processor_files(self) -> Mapping[str, str]:
        """Files by name that `AutoProcessor` needs and that a checkpoint of the family may lack."""
        return {}

    @property
    def vision_width(self) -> int:
        """Width of the output of `tower`."""
        return int(self.model.config.vision_config.hidden_size)

    @property
    def feature_width(self) -> int:
        """Width of the features of an image position."""
        return self.hidden_size

    # Loading.

    @classmethod
    def load(cls, checkpoint: str, *, dtype: str = "float32", device: str = "cpu", gpus: int = 1) -> Self:
        """The model with its weights.

        Args:
            gpus: Number of GPUs that hold the model, from `device` on; see `common.placement`.

        Raises:
            InputError: The checkpoint is wrong, see `inspect` and `checkpoints.fingerprint`, or there are fewer GPUs.
        """
        checkpoints.check_dtype(dtype)
        devices = devices_of(device, gpus)
        empty = cls.inspect(checkpoint, dtype=dtype)
        fingerprint = empty.fingerprint  # computed first: a checkpoint with broken values is not loaded
        source, config = cls._source_and_config(checkpoint)
        placement = Placement.of(empty.model, empty._decoder.layers, devices)
        is_split = bool(placement.layers)
        first = torch.device("cpu") if is_split else placement.home
        model = checkpoints.load_model(source, checkpoint, config, cls.architecture_of(config), dtype, first)
        if is_split:
            placement.spread(model)
        backbone = cls(model, empty.processor, checkpoint, lambda: fingerprint)
        backbone._decoder.devices = tuple(placement.layers.values())
        return backbone

    @classmethod
    def inspect(cls, checkpoint: str, *, dtype: str = "float32") -> Self:
        """The model without weights, on the meta device; only its attribute `fingerprint` reads them.

        Raises:
            InputError: Configuration, headers of the weight files, tokenizer and image processor do not fit together.
        """
        checkpoints.check_dtype(dtype)
        source, config = cls._source_and_config(checkpoint)
        model = checkpoints.empty_model(source, checkpoint, config, cls.architecture_of(config), dtype)
        fingerprint = partial(checkpoints.fingerprint, source, checkpoint, config, dtype)
        empty = cls(model, cls.Processor(source), checkpoint, fingerprint)
        empty._check_tokenizer()
        empty.check_picture()
        return empty

    @classmethod
    def load_processor(cls, checkpoint: str) -> PretrainedProcessor:
        """The tokenizer and image processor alone."""
        return cls.Processor(cls._source_and_config(checkpoint, weights=False)[0])

    @classmethod
    def fingerprint_of(cls, checkpoint: str, *, dtype: str = "float32") -> str:
        """The attribute `fingerprint` without loading the model."""
        source, config = cls._source_and_config(checkpoint)
        return checkpoints.fingerprint(source, checkpoint, config, dtype)

    @classmethod
    def architecture_of(cls, config: Any) -> Architecture:
        """Architecture of the model with this configuration."""
        return cls.architecture

    @cached_property
    def fingerprint(self) -> str:
        """Name of the weights, from the configuration and every byte of the weight files."""
        return self._fingerprint()

    @classmethod
    def _source_and_config(cls, checkpoint: str, *, weights: bool = True) -> tuple[str, Any]:
        """Folder and configuration of a checkpoint."""
        source = checkpoints.resolve(checkpoint, cls.family, cls.architecture, weights=weights)
        return source, checkpoints.read_config(source, cls.family, cls.architecture)

    def _check_tokenizer(self) -> None:
        tokenizer = self.processor.tokenizer
        name, ids = f"backbone.checkpoint {self.checkpoint!r}", tokenizer.get_vocab()
        num_rows = len(self.model.get_input_embeddings().weight)
        largest = max(ids, key=ids.__getitem__)
        if ids[largest] >= num_rows:
            raise InputError(
                f"{name}: its tokenizer has the token {largest!r} with the id {ids[largest]}, and the model's "
                f"embeddings end at {num_rows - 1}. Take tokenizer and weights from the same checkpoint."
            )
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise InputError(f"{name}: its tokenizer has neither a padding token nor an end token.")
        unknown = [mark for mark, token_id in self.marks().items() if token_id not in tokenizer.added_tokens_decoder]
        if unknown:
            raise InputError(
                f"{name}: its tokenizer lacks the special token {', '.join(unknown)}, which a prompt of the family "
                f"{self.family!r} needs. Take the tokenizer's files from the model that config.json belongs to."
            )

    def check_picture(self) -> None:
        """Raises InputError unless a processed picture passes tower and connector and fills its positions."""
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
                f"positions of width {self.hidden_size}. Take config.json from the model that the weights belong to."
            )

    def _ends(self) -> frozenset[int]:
        tokenizer, configured = self.processor.tokenizer, self.model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
        if self.stop is not None:
            words = tokenizer.get_vocab().items()
            ends |= {number for word, number in words if word.lstrip("\u2581\u0120 ").startswith(self.stop)}
        return frozenset(ends or {tokenizer.pad_token_id or 0})

    @property
    def device(self) -> torch.device:
        """Device of batches and edits, where the embeddings lie."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def is_split(self) -> bool:
        """Whether layers lie on several devices."""
        return bool(self._decoder.devices)

    # Encoding.

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Picture], before_connector: bool = False) -> Mapping[str, Tensor]:
        """Features `(L, D)` of each distinct picture, by its key; `(patches, width)` before the connector."""
        distinct = {picture.key: picture for picture in pictures}
        features: list[Tensor] = []
        keys = list(distinct)
        for start in range(0, len(keys), _PROCESSED_TOGETHER):
            group = keys[start : start + _PROCESSED_TOGETHER]
            processed = [self.processor.process(distinct[key]).pixels for key in group]
            at_once = max(1, budgets(self.device).tower_pixels // processed[0].size)
            for pixels in _on_device(processed, self.device).split(at_once):
                vision = self.tower(pixels)
                features += (vision if before_connector else self.connect(vision)).unbind(0)
        return dict(zip(keys, features, strict=True))

    def has_features_of(self, other: Backbone) -> bool:
        """Whether all weights outside the text model's layers are equal, so that pictures have the same features."""
        own, others = self._outside_layers(), other._outside_layers()
        return own.keys() == others.keys() and all(
            value.shape == others[name].shape and torch.equal(value, others[name].to(value))
            for name, value in own.items()
        )

    def _outside_layers(self) -> dict[str, Tensor]:
        inside = {id(value) for value in self._decoder.layer_values()}
        values = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: value for name, value in values if id(value) not in inside}

    def encode(
        self,
        edit_ids: Sequence[str],
        slots: Sequence[str],
        grid: Sequence[Sequence[Probe | None]],
        features: Mapping[str, Tensor],
        template: Template,
        before_connector: bool = False,
    ) -> EditBatch:
        """Tokens, masks and features of an E x K grid of probes (None: absent).

        Args:
            before_connector: Whether `features` are inputs of the connector, see `image_features`.

        Raises:
            InputError: A probe has more tokens than `max_positions`, or an image marker or special token in its text.
            ValueError: A target has no token.
        """
        cells = [[None if probe is None else self.sequence(probe, template) for probe in row] for row in grid]
        return self.assemble(edit_ids, slots, cells, features, before_connector)

    def assemble(
        self,
        edit_ids: Sequence[str],
        slots: Sequence[str],
        cells: Sequence[Sequence[TokenSequence | None]],
        features: Mapping[str, Tensor],
        before_connector: bool = False,
    ) -> EditBatch:
        """`encode` for an E x K grid of tokenised probes.

        Raises:
            InputError: A sequence has more tokens than `max_positions`.
        """
        for edit_id, row in zip(edit_ids, cells, strict=True):
            for slot, cell in zip(slots, row, strict=True):
                if cell is not None and len(cell.tokens) > self.max_positions:
                    raise InputError(
                        f"{edit_id}, {slot}: its {len(cell.tokens):,} tokens are more than the {self.max_positions:,} "
                        "positions that the text model takes."
                    )
        width = self.vision_width if before_connector else self.feature_width
        batch = assemble(edit_ids, slots, cells, features, self.padding, width, self.device, self._is_white)
        return replace(batch, before_connector=before_connector)

    @property
    def padding(self) -> int:
        """Token that fills sequences up."""
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def _is_white(self, token: int) -> bool:
        """Whether a token is only white space."""
        if token not in self._white:
            self._white[token] = not self.processor.tokenizer.decode([token]).strip()
        return self._white[token]

    # Sites.

    def site(self, name: str) -> nn.Linear:
        """The linear module of a site such as `layers.23.ffn.in`.

        Raises:
            InputError: No such site; the message says which there are.
        """
        if not is_connector(name):
            return self._decoder.site(name)
        if name not in self._connector_linears:
            if not self._connector_linears:
                raise InputError(f"Unknown site {name!r}: this model has no site between image tower and text model.")
            near = difflib.get_close_matches(name, self._connector_linears, n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            sites = self.connector_sites()
            raise InputError(
                f"Unknown site {name!r}.{hint} The connector has {len(sites)} sites, {sites[0]!r} to {sites[-1]!r}."
            )
        return self._connector_linears[name]

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a layer that are sites, such as `ffn.in`."""
        return tuple(self._decoder.MODULES)

    def layer_of(self, site: str) -> int:
        """Layer of a site of the text model, from 0. Raises InputError as `site` does."""
        return self._decoder.locate(site)[0]

    def connector_sites(self) -> tuple[str, ...]:
        """`connector.<module>` of every linear module between image tower and text model, in the model's order."""
        return tuple(self._connector_linears)

    def activation(self, site: str) -> Callable[[Tensor], Tensor]:
        """The model's own nonlinearity after a feed-forward site; the identity if none follows.

        Raises:
            InputError: The site belongs to attention or the connector.
        """
        if is_connector(site):
            raise InputError(f"site {site!r} feeds no activation of the text model: choose an 'ffn' site.")
        return self._decoder.activation(site)

    # Running.

    @torch.no_grad()
    def prefix(
        self,
        batch: EditBatch,
        *sites: str,
        positionwise: bool = False,
        kv_cache: KVCache | None = None,
        read_EKT: Tensor | None = None,
    ) -> Prefix:
        """Runs everything below the lowest of the sites, which may come in any order.

        Args:
            positionwise: Whether an edit's change at a position depends on the states at that position alone.
            kv_cache: Stores keys and values, for `target_states`.
            read_EKT: Positions that every call of `suffix` will read. Only these are stored if nothing above needs
                others.

        Raises:
            ValueError: A connector site, and a batch whose features are outputs of the connector.
        """
        shape, inputs = (batch.num_edits, len(batch.slots)), self._inputs(batch)
        whole_layer = self._whole_layer(sites, positionwise)
        if any(is_connector(site) for site in sites):
            if not batch.before_connector:
                raise ValueError(
                    "the batch holds outputs of the connector, and a site of the connector is to be edited: "
                    "encode it with sites=editor.sites."
                )
            embedded_RSD = self._decoder.embed_tokens(batch.tokens_EKS.flatten(0, 1))
            before = connector_input(batch, slice(None))
            return Prefix(0, False, embedded_RSD, shape, whole_layer, inputs, before)
        located = [self._decoder.locate(site) for site in sites]
        layer = min(layer for layer, _ in located)
        at_ffn = all(part.startswith("ffn") for at, part in located if at == layer)
        is_read = read_EKT is not None and at_ffn and whole_layer < layer == self.num_layers - 1
        hidden_RSD = self._below(layer, at_ffn, batch, inputs, read_EKT if is_read else None, kv_cache)
        if inputs is not None:
            inputs = inputs.with_added(self._added(batch, layer))
        return Prefix(layer, at_ffn, hidden_RSD, shape, whole_layer, inputs, is_read=is_read)

    def suffix(self, prefix: Prefix, read_EKT: Tensor | None = None, kv_cache: KVCache | None = None) -> Tensor:
        """Final hidden states `(E, K, S, D)`, after the last norm, computed from a prefix.

        Args:
            read_EKT: Positions to return, `(E, K, T, D)`. The last layer computes no others, unless an edit there
                needs them.
            kv_cache: Stores keys and values, for `target_states`.
        """
        read_RT = None if read_EKT is None or prefix.is_read else read_EKT.flatten(0, 1)
        last = self.num_layers - 1
        # After the last layer's keys and values no position depends on another.
        early_RT = read_RT if prefix.whole_layer < last else None
        hidden, inputs = prefix.hidden_RSD, prefix.inputs
        if prefix.connector is not None:
            features_RLD = self.connect(prefix.connector.vision_RPW)
            hidden, added = self._placed(hidden, features_RLD, prefix.connector.image_RS)
            inputs = inputs.with_added(added) if inputs is not None else None
        for index in range(prefix.layer, self.num_layers):
            read = early_RT if index == last else None
            hidden, inputs, read = self._decoder.handed_to(index, hidden, inputs, read)
            if index > prefix.layer or not prefix.at_ffn:
                hidden = self._decoder.attention_half(index, hidden, inputs, read, kv_cache)
            elif read is not None:
                hidden = gather_positions(hidden, read)
            hidden = self._decoder.ffn_half(index, hidden)
            hidden = hidden if inputs is None else inputs.after(index, hidden)
        hidden = self._decoder.handed_home(hidden)
        if read_RT is not None and early_RT is None:
            hidden = gather_positions(hidden, read_RT)
        hidden = self._decoder.finish(hidden)
        return hidden.reshape(*prefix.shape, *hidden.shape[1:])

    def with_room(self, prefix: Prefix, batch: EditBatch) -> Prefix:
        """A prefix whose rotary table also covers the positions that `EditBatch.with_room` adds."""
        if prefix.inputs is None or not batch.room:
            return prefix
        tokens_EKS, image_EKS, prompt_EKS = (
            functional.pad(part, (0, batch.room)) for part in (batch.tokens_EKS, batch.image_EKS, batch.prompt_EKS)
        )
        longer = replace(batch, tokens_EKS=tokens_EKS, image_EKS=image_EKS, prompt_EKS=prompt_EKS)
        return replace(prefix, inputs=self._inputs(longer))

    @torch.no_grad()
    def target_states(
        self, prefix: Prefix, batch: EditBatch, tokens_EKT: Tensor, kv_cache: KVCache, first: int = 0
    ) -> Tensor:
        """Final hidden states at the target's tokens but the last, `(E, K, T - 1, D)`, with `tokens_EKT` as target.

        Runs these positions alone, after `prefix` and `suffix` have filled the KV cache; for an edited model inside the
        same `applied` block.

        Args:
            tokens_EKT: Target tokens, at most as many as the batch has.
            first: Index of the first token to compute; an earlier call has cached the tokens before it.
        """
        # A token stands at the position that predicts the next one; the prompt predicts the first.
        at_RT = batch.predict_EKT[..., 1 + first : tokens_EKT.shape[-1]].flatten(0, 1)
        last_R = batch.predict_EKT[..., 0].flatten()
        inputs = None if prefix.inputs is None else prefix.inputs.at(at_RT)
        embedded_RTD = self._decoder.embed_tokens(tokens_EKT[..., first:-1].flatten(0, 1))
        hidden_RTD = self._decoder.embed_positions(embedded_RTD, at_RT)
        for layer in range(self.num_layers):
            hidden_RTD, inputs, last_R = self._decoder.handed_to(layer, hidden_RTD, inputs, last_R)
            hidden_RTD = self._decoder.attention_half_cached(layer, hidden_RTD, inputs, last_R, kv_cache, first)
            hidden_RTD = self._decoder.ffn_half(layer, hidden_RTD)
        return self._decoder.finish(self._decoder.handed_home(hidden_RTD)).unflatten(0, prefix.shape)

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits `(..., V)` of final hidden states `(..., D)`. The head has no bias."""
        return self._decoder.head(hidden)

    def _below(
        self,
        layer: int,
        at_ffn: bool,
        batch: EditBatch,
        inputs: LayerInputs | None,
        read_EKT: Tensor | None,
        kv_cache: KVCache | None,
    ) -> Tensor:
        """Input of a layer, or of its feed-forward half, `(R, S, D)`; `(R, T, D)` at the positions `read_EKT`.

        Runs in parts, because a layer's intermediate results are many times its output; a KV cache takes all rows at
        once.
        """
        device, num_slots = batch.tokens_EKS.device, len(batch.slots)
        at_once = budgets(device).prefix_positions
        parts = [batch] if kv_cache is not None else batch.parts()
        whole_RSD = None
        for part in parts:
            columns_K = torch.tensor([batch.slots.index(slot) for slot in part.slots], device=device)
            row_R = (torch.arange(batch.num_edits, device=device).unsqueeze(1) * num_slots + columns_K).flatten()
            read_RT = None if read_EKT is None else read_EKT.flatten(0, 1)[row_R]
            part_inputs = inputs if part is batch else self._inputs(part)
            num_rows, length = len(row_R), part.tokens_EKS.shape[2]
            size = num_rows if kv_cache is not None else max(1, at_once // length)
            for start in range(0, num_rows, size):
                rows = slice(start, start + size)
                states = self._layers_below(layer, at_ffn, part, rows, part_inputs, read_RT, kv_cache)
                if len(states) == batch.num_edits * num_slots:
                    return states
                if whole_RSD is None:
                    num_positions = batch.tokens_EKS.shape[2] if read_EKT is None else states.shape[1]
                    whole_RSD = states.new_zeros(batch.num_edits * num_slots, num_positions, states.shape[2])
                whole_RSD[row_R[rows], : states.shape[1]] = states
        assert whole_RSD is not None, "a batch has sequences"
        return whole_RSD

    def _layers_below(
        self,
        layer: int,
        at_ffn: bool,
        batch: EditBatch,
        rows: slice,
        inputs: LayerInputs | None,
        read_RT: Tensor | None,
        kv_cache: KVCache | None,
    ) -> Tensor:
        """`_below` for some rows of a batch's sequences."""
        before = connector_input(batch, rows)
        features_RLD = self.connect(before.vision_RPW) if batch.before_connector else before.vision_RPW
        embedded_RSD = self._decoder.embed_tokens(batch.tokens_EKS.flatten(0, 1)[rows])
        hidden_RSD, added = self._placed(embedded_RSD, features_RLD, before.image_RS)
        if inputs is not None:
            inputs = inputs.rows(rows).with_added(added)
        for index in range(layer):
            hidden_RSD, inputs, _ = self._decoder.handed_to(index, hidden_RSD, inputs)
            hidden_RSD = self._decoder.attention_half(index, hidden_RSD, inputs, kv_cache=kv_cache)
            hidden_RSD = self._decoder.ffn_half(index, hidden_RSD)
            hidden_RSD = hidden_RSD if inputs is None else inputs.after(index, hidden_RSD)
        if at_ffn:
            read = None if read_RT is None else read_RT[rows]
            hidden_RSD, inputs, read = self._decoder.handed_to(layer, hidden_RSD, inputs, read)
            hidden_RSD = self._decoder.attention_half(layer, hidden_RSD, inputs, read, kv_cache)
        return self._decoder.handed_home(hidden_RSD)

    def _placed(
        self, embedded_RSD: Tensor, features_RLD: Tensor, image_RS: Tensor
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """The residual stream that enters layer 0, and what features add to it after later layers."""
        return self._decoder.embed_positions(insert_features(embedded_RSD, features_RLD, image_RS)), {}

    def _added(self, batch: EditBatch, layer: int) -> Mapping[int, Tensor]:
        """What image features add to the residual stream after a layer and those above, `(R, S, D)`, by layer."""
        return {}

    def _inputs(self, batch: EditBatch) -> LayerInputs | None:
        """Inputs of the layers for a batch's sequences; one row if all have the same positions."""
        return self._decoder.rotary(self._decoder.embed_tokens(batch.tokens_EKS.flatten(0, 1)[:1]), None)

    def _whole_layer(self, sites: Sequence[str], positionwise: bool) -> int:
        if positionwise:
            return -1
        return max((self._decoder.locate(site)[0] for site in sites if not is_connector(site)), default=-1)


def holding(backbone: Backbone, site: str) -> str:
    """The site; where the model has one matrix for it and others (`FUSED`), the site of that matrix."""
    match = re.fullmatch(r"(layers\.[^.]+)\.(.+)", site)
    parts = getattr(backbone, "parts", ())  # a class from outside the package need not name them
    if match is None or match[2] in parts or FUSED.get(match[2]) not in parts:
        return site
    return f"{match[1]}.{FUSED[match[2]]}"


def ends_of(backbone: Backbone) -> frozenset[int]:
    """The backbone's `ends`; the tokenizer's end token for a class from outside the package that lacks it."""
    ends: frozenset[int] | None = getattr(backbone, "ends", None)
    if ends is None:
        end = backbone.processor.tokenizer.eos_token_id
        return frozenset({0 if end is None else end})
    return ends


def _on_device(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Arrays of one shape, stacked on a device; pinned memory lets a GPU copy while it computes."""
    shape = (len(arrays), *arrays[0].shape)
    stacked = torch.empty(shape, pin_memory=device.type == "cuda")
    for row, array in zip(stacked, arrays, strict=True):
        row.copy_(torch.from_numpy(array))
    return stacked.to(device, non_blocking=True)


def connector_input(batch: EditBatch, rows: slice) -> BeforeConnector:
    """Each sequence's image features, as the batch holds them, and their positions."""
    picture_R, image_RS = batch.picture_EK.flatten()[rows], batch.image_EKS.flatten(0, 1)[rows]
    if len(batch.features_NLD):
        features_RLD = batch.features_NLD[picture_R.clamp(min=0)].masked_fill((picture_R < 0)[:, None, None], 0.0)
    else:
        features_RLD = batch.features_NLD.new_zeros(len(picture_R), *batch.features_NLD.shape[1:])
    return BeforeConnector(features_RLD, image_RS)


def insert_features(embedded_RSD: Tensor, features_RLD: Tensor, image_RS: Tensor) -> Tensor:
    """Embedded tokens with each sequence's image features, in order, at its image positions."""
    # Indices instead of a boolean mask: the size of a masked result is known only after waiting for the GPU.
    feature_RS = (image_RS.cumsum(1) - 1).clamp_min(0)
    features_RSD = gather_positions(features_RLD.to(embedded_RSD.dtype), feature_RS)
    return torch.where(image_RS.unsqueeze(-1), features_RSD, embedded_RSD)
