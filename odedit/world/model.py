"""Base class of the embedded models' families; initialization, saving and loading.

A saved model has the files and configuration keys of a published checkpoint of its family, and loads through the same
code.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from odedit.storage.location import at
from odedit.storage.tensors import write_tensors
from odedit.world.layout import Layout
from odedit.world.vocabulary import fit_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_SIZE = 32
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
HIDDEN_SIZE = 128
PATCH_SIZE = 8
VISION_WIDTH = 96
INIT_STD = 0.08
_POSITION_STD = 0.8  # position embeddings of the vision tower: at .08 it learns shapes five times slower


class Seen(NamedTuple):
    """Encoding of N pictures.

    Attributes:
        features: Embeddings of the image tokens, `(N, L, D)`.
        summary: Input of the auxiliary heads, `(N, W)`.
    """

    features: Tensor
    summary: Tensor


class Family(ABC):
    """Architecture of an embedded model, its tokenizer and its prompt layout.

    Attributes:
        name: Name in commands and in `checkpoint_path`.
        layout: Prompt layout.
        special_tokens: First tokens of the vocabulary.
        begin: Beginning-of-text token.
        num_image_tokens: Positions of a picture, L.
        summary_width: Width of `Seen.summary`, W.
        max_length: Positions of the text model.
    """

    name: ClassVar[str]
    layout: ClassVar[Layout]
    special_tokens: ClassVar[tuple[str, ...]]
    begin: ClassVar[str]
    num_image_tokens: ClassVar[int]
    summary_width: ClassVar[int]
    max_length: ClassVar[int]

    @property
    def begin_id(self) -> int:
        return self.special_tokens.index(self.begin)

    @property
    def end_id(self) -> int:
        return self.special_tokens.index("</s>")

    @property
    def pad_id(self) -> int:
        return self.special_tokens.index("<pad>")

    @property
    def image_id(self) -> int:
        return self.special_tokens.index("<image>")

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        return fit_tokenizer(self.special_tokens, self.begin, self.layout, self.max_length)

    def build_model(self, seed: int) -> Any:
        """An initialized, untrained model in float32."""
        model = self._empty_model()
        _initialise(model, seed)
        return model

    @abstractmethod
    def _empty_model(self) -> nn.Module:
        """The model before `_initialise` sets its values."""

    @abstractmethod
    def vision_modules(self, model: Any) -> list[nn.Module]:
        """Modules that the vision stage trains."""

    @abstractmethod
    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        """Patch states before the vision tower's last LayerNorm, `(N, patches, width)`, without the class token."""

    @abstractmethod
    def see(self, model: Any, pixels: Tensor) -> Seen:
        """Encodes pictures, `float32 (N, 3, 32, 32)`."""

    @abstractmethod
    def decoder(self, model: Any) -> nn.Module:
        """The text model without its head."""

    @abstractmethod
    def processor_files(self) -> dict[str, dict[str, object] | str]:
        """Files of the image processor and the processor: JSON object or text by file name."""


@torch.no_grad()
def _initialise(model: nn.Module, seed: int) -> None:
    """Initializes matrices with standard deviation .08, position embeddings of the vision tower .8, and queries 1.

    With the library's values for large models (1e-10 for a vision tower, zeros for queries), a model of this size never
    learns to use the picture.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if _is_norm(m) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name == "query_tokens":
            parameter.normal_(0.0, 1.0, generator=generator)
        elif name.endswith(("embeddings.position_embedding", "embeddings.position_embedding.weight")):
            parameter.normal_(0.0, _POSITION_STD, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, INIT_STD, generator=generator)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def save(family: Family, model: Any, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a checkpoint for `from_pretrained`, weights in half precision. The model itself is not changed."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float16"
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tensors = {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
        # A tied head is not stored; loading ties it again.
        if not (head is embeddings and name.endswith("lm_head.weight"))
    }
    write_tensors(at(directory / "model.safetensors"), tensors, {"format": "pt"})
    tokenizer.save_pretrained(directory)
    for name, content in family.processor_files().items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def load(directory: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """Model in float32 and evaluation mode, and tokenizer of a checkpoint."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)
