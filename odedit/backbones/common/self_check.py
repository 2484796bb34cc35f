"""Comparison of a split model with the library's own, on one prompt with and one without a picture."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from odedit.backbones.common.layouts import quiet
from odedit.backbones.common.library_forward import requires_pictures
from odedit.backbones.common.structure import Unsupported, watched
from odedit.inputs.batch import Picture, Probe
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.prompts import find_template

if TYPE_CHECKING:
    from odedit.backbones.auto import Auto

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits, as a share of the largest logit."""
_NEW_TOKENS = 4
_QUESTION = "What is on the picture?"
_SHAPE = (96, 128, 3)


@torch.no_grad()
def check_against_library(backbone: Auto) -> None:
    """Measures what the model's forward does besides its layers, and compares logits along a generated answer.

    Raises:
        Unsupported: The split model gives other logits than the library's.
    """
    pictures = [
        backbone.processor.process(Picture(f"probe {seed}", noise)) for seed, noise in enumerate(map(_noise, range(2)))
    ]
    for picture in pictures:
        backbone.image_features([picture])
    backbone.split_connector(pictures)
    with_picture = Probe(_QUESTION, "a", pictures[0])
    prompt = _prompt(backbone, with_picture)
    _measure(backbone, prompt, pictures[0])
    _find_heads(backbone, prompt)
    _compare(backbone, prompt, pictures[0])
    _compare(backbone, _prompt(backbone, Probe(_QUESTION, "a")), None)


def _noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, _SHAPE, dtype=np.uint8)


def _prompt(backbone: Auto, probe: Probe) -> TokenSequence:
    """A prompt's tokens without its answer."""
    made = backbone.sequence(probe, find_template("raw"))
    return TokenSequence(made.tokens[: made.first_target], made.first_target, made.image, made.picture)


def _rows(backbone: Auto, cell: TokenSequence, answer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, image positions and prompt positions of one sequence, `(1, S)`."""
    tokens = torch.tensor([cell.tokens], device=backbone.device)
    image, prompt = torch.zeros_like(tokens, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)
    image[0, list(cell.image)] = True
    prompt[0, len(cell.tokens) - answer :] = False
    return tokens, image, prompt


def _measure(backbone: Auto, prompt: TokenSequence, picture: Picture) -> None:
    """Sets positions' rule, masks, and what features add to later layers, from the library's forward."""
    assert backbone.features is not None and picture.size is not None
    decoder = backbone.decoder
    feature = backbone.image_features([picture])[picture.key]
    tokens, image, is_prompt = _rows(backbone, prompt)
    handed = backbone.handed_over(tokens, image, is_prompt, [picture.size], feature)
    if handed.positions is not None:
        positions = handed.positions
        decoder.axes = positions.shape[0] if positions.dim() == 3 else 1
        decoder.first_position = int(positions.flatten()[0])
        counted = torch.arange(tokens.shape[1], device=tokens.device) + decoder.first_position
        backbone.follows_rule = bool((positions == counted).all())
    square = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device)
    given = [square.tril()[None] if mask is None else mask for mask in handed.masks]
    if any(not torch.equal(mask, given[0]) for mask in given):
        raise Unsupported("its layers attend to different positions of a short prompt")
    backbone.is_causal = bool(torch.equal(given[0][0], square.tril()))
    _, *later = feature.chunk(backbone.features.parts, dim=-1)
    layers = []
    for part in later:
        layers += [
            layer for layer, added in handed.added.items()
            if torch.allclose(added[image], part.to(added.dtype)) and not added[~image].any()
        ]  # fmt: skip
    if len(layers) != len(later) or len(set(layers)) != len(handed.added):
        raise Unsupported(
            f"something enters the text model after its layers {sorted(handed.added)} that its image features do not "
            "explain"
        )
    backbone.added_after = tuple(layers)
    hidden, _ = backbone._placed(decoder.embed_tokens(tokens), feature[None], image)
    _same_states(backbone, hidden, handed.hidden_RSD, "the states that enter layer 0")


def _find_heads(backbone: Auto, prompt: TokenSequence) -> None:
    """Sets how one matrix for queries, keys and values is split, and heads are rotated, by attention's own output."""
    decoder = backbone.decoder
    tokens = torch.tensor([prompt.tokens], device=backbone.device)
    hidden = decoder.embed_positions(decoder.embed_tokens(tokens))
    every = torch.arange(tokens.shape[1], device=tokens.device)[None]
    hidden, rotary, every = decoder.handed_to(0, hidden, decoder.rotary(hidden, None), every)
    if rotary is not None and not backbone.is_causal:
        rotary = replace(rotary, mask_RSS=every.unsqueeze(-1) >= every)
    # Without the residual stream, beside which half precision would lose attention's output.
    states = decoder._norm_before_attention(0)(hidden)
    expected, shares = decoder._attention(0, states, rotary, None).float(), {}
    is_fused = "attention.qkv" in backbone.parts
    for decoder.partly, decoder.grouped in product((False, True), (False, True) if is_fused else (False,)):
        try:
            found = decoder._attention_at(0, states, rotary, every, None).float()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the tables' width is not that of a head
            continue
        shares[decoder.partly, decoder.grouped] = _share(found, expected)
    best = min(shares, key=shares.__getitem__, default=None)
    if best is None or not shares[best] <= TOLERANCE[backbone.model.dtype]:  # NaN is no agreement
        layer = decoder.structure.layers[0]
        names = ", ".join(path for part, path in layer.sites.items() if part.startswith("attention"))
        raise Unsupported(f"attention of layers.0 is not what its matrices ({names}) give by any known order of heads")
    decoder.partly, decoder.grouped = best


def _compare(backbone: Auto, prompt: TokenSequence, picture: Picture | None) -> None:
    """Raises Unsupported unless logits along a greedily generated answer are the library's."""
    tokens, image, is_prompt = _rows(backbone, prompt)
    sizes = [] if picture is None else [picture.size or (0, 0)]
    named = backbone.forward_inputs(tokens, image, is_prompt, sizes)
    model = backbone.model
    if picture is not None:
        named["pixel_values"] = backbone.tensors([picture])[0]
    elif requires_pictures(model):
        model, named = model.language_model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with quiet():
        made = model.generate(
            **named, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False, num_beams=1,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    expected = torch.stack([step[0].float() for step in made.logits])
    chosen = made.sequences[0, -_NEW_TOKENS:].tolist()
    cell = TokenSequence([*prompt.tokens, *chosen], len(prompt.tokens), prompt.image, prompt.picture)
    features = {} if picture is None else backbone.image_features([picture])
    where = "with a picture" if picture is not None else "without a picture"
    found = _logits(backbone, cell, features)
    if picture is not None:
        ratio = float((found * expected).sum() / (found * found).sum())
        if abs(ratio - 1) > 1e-3 and _share(found * ratio, expected) <= TOLERANCE[backbone.model.dtype]:
            backbone.decoder.scale = ratio
            found = found * ratio
    # What type an answer's tokens have is not said by a prompt.
    for answer_type in (1, 0):
        if _share(found, expected) <= TOLERANCE[backbone.model.dtype]:
            return
        kinds = backbone.processor.types
        backbone.answer_types = dict.fromkeys(kinds, answer_type)
        found = _logits(backbone, cell, features)
    backbone.answer_types = {}
    share = _share(_logits(backbone, cell, features), expected)
    raise Unsupported(
        f"its logits {where} differ from the library's by {share:.0e} of the largest one; "
        f"{_first_difference(backbone, prompt, features, named, model)}"
    )


def _share(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _logits(backbone: Auto, cell: TokenSequence, features: Any) -> Tensor:
    """Logits of the answer's tokens, by prefix and suffix that meet in the middle."""
    batch = backbone.assemble(["probe"], ["rel"], [[cell]], features)
    site = f"layers.{backbone.num_layers // 2}.ffn.out"
    return backbone.head(backbone.suffix(backbone.prefix(batch, site), batch.predict_EKT))[0, 0]


def _same_states(backbone: Auto, found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape or _share(found.float(), expected.float()) > TOLERANCE[backbone.model.dtype]:
        raise Unsupported(f"{what} are not the embedded tokens with image features in their places")


def _first_difference(backbone: Auto, prompt: TokenSequence, features: Any, named: Any, model: Any) -> str:
    """The first layer whose states differ, in words."""
    layers = {str(index): layer for index, layer in enumerate(backbone.decoder.structure.stack.layers)}
    with watched(layers) as calls:
        model(**named)
    cell = TokenSequence([*prompt.tokens, prompt.tokens[-1]], len(prompt.tokens), prompt.image, prompt.picture)
    batch = backbone.assemble(["probe"], ["rel"], [[cell]], features)
    length = len(prompt.tokens)
    for index, call in enumerate(calls[:-1]):
        found = backbone.prefix(batch, f"layers.{index + 1}.attention.out").hidden_RSD[:, :length]
        expected = call.output + batch.features_NLD.new_zeros(())
        if index in backbone.added_after:
            continue
        if _share(found.float(), expected.float()) > TOLERANCE[backbone.model.dtype]:
            return f"layers.{index} is the first whose states differ"
    return "its layers agree for a prompt, its answer's positions, masks or its head do not"
