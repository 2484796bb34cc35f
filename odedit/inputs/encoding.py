"""Token lists as the padded tensors of an `EditBatch`; shared by all backbones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from odedit.inputs.batch import EditBatch


@dataclass(frozen=True)
class TokenSequence:
    """One tokenised probe, its target last.

    Attributes:
        tokens: Token ids, with the image token at image positions.
        first_target: Index of the target's first token, white space included; generation starts here.
        image: Positions that take image features, ascending, all before the target.
        picture: Key of the picture; None for a text-only probe.
    """

    tokens: list[int]
    first_target: int
    image: Sequence[int] = ()
    picture: str | None = None

    @classmethod
    def around_picture(
        cls, before: Sequence[int], picture: str, image_token: int, count: int, after: Sequence[int], first_target: int
    ) -> TokenSequence:
        """`[before | count image positions | after]`, with the target from `after[first_target]` on."""
        start = len(before)
        tokens = [*before, *[image_token] * count, *after]
        return cls(tokens, start + count + first_target, range(start, start + count), picture)


def assemble(
    edit_ids: Sequence[str],
    slots: Sequence[str],
    cells: Sequence[Sequence[TokenSequence | None]],
    features: Mapping[str, Tensor],
    pad_token: int,
    feature_width: int,
    device: torch.device,
    is_white: Callable[[int], bool] = lambda token: False,
) -> EditBatch:
    """Right-pads an E x K grid of sequences (None: absent), with masks of prompts, images and targets.

    Args:
        features: Image features of the distinct pictures, by key; their numbers of positions may differ.
        feature_width: Width of `features`, for a batch without pictures.
        is_white: Whether a token is only white space.
    """
    shape = (len(cells), len(slots))
    present = [cell for row in cells for cell in row if cell is not None]
    length = max((len(cell.tokens) for cell in present), default=1)
    num_targets = max((len(cell.tokens) - cell.first_target for cell in present), default=1)

    # NumPy, because each of thousands of small writes takes ten times as long into a tensor.
    tokens = np.full((*shape, length), pad_token, dtype=np.int64)
    real, prompt, image = (np.zeros((*shape, length), dtype=bool) for _ in range(3))
    predict, target = (np.zeros((*shape, num_targets), dtype=np.int64) for _ in range(2))
    target_mask = np.zeros((*shape, num_targets), dtype=bool)
    is_present = np.zeros(shape, dtype=bool)
    picture = np.full(shape, -1, dtype=np.int64)
    white = np.zeros(shape, dtype=np.int64)
    row_of = {key: index for index, key in enumerate(features)}

    for e, row in enumerate(cells):
        for k, cell in enumerate(row):
            if cell is None:
                continue
            count, first = len(cell.tokens), cell.first_target
            is_present[e, k] = True
            tokens[e, k, :count] = cell.tokens
            real[e, k, :count] = True
            prompt[e, k, :first] = True
            image[e, k, np.asarray(cell.image, dtype=np.int64)] = True
            # The position before a token predicts it.
            predict[e, k, : count - first] = np.arange(first - 1, count - 1)
            target[e, k, : count - first] = cell.tokens[first:]
            target_mask[e, k, : count - first] = True
            white[e, k] = sum(1 for _ in takewhile(is_white, cell.tokens[first:]))
            if cell.picture is not None:
                picture[e, k] = row_of[cell.picture]

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    stacked = stacked_features(list(features.values())) if features else torch.zeros(0, 1, feature_width, device=device)
    return EditBatch(
        edit_ids=tuple(edit_ids),
        slots=tuple(slots),
        tokens_EKS=on_device(tokens),
        present_EK=on_device(is_present),
        real_EKS=on_device(real),
        prompt_EKS=on_device(prompt),
        predict_EKT=on_device(predict),
        target_EKT=on_device(target),
        target_mask_EKT=on_device(target_mask),
        features_NLD=stacked,
        picture_EK=on_device(picture),
        image_EKS=on_device(image),
        white_EK=on_device(white),
        pictures=tuple(features),
        lengths=tuple(int(real[:, k].sum(-1).max(initial=1)) for k in range(len(slots))),
    )


def stacked_features(features: Sequence[Tensor]) -> Tensor:
    """Features `(N, L, D)` of pictures, those with fewer positions filled up with zeros."""
    longest = max(len(feature) for feature in features)
    if all(len(feature) == longest for feature in features):
        return torch.stack(list(features))
    return torch.stack([torch.nn.functional.pad(feature, (0, 0, 0, longest - len(feature))) for feature in features])
