"""Answers of checkpoints without odedit: the library's automatic classes, `generate`, and the picture.

Run as a program: reads a list of `{family, checkpoint, questions: [[text, image], ...]}` as JSON from standard input,
and writes the answers, of at most `max_tokens` tokens (default 8).
"""

from __future__ import annotations

import json
import sys
from typing import Any

MAX_TOKENS = 8
SIDE = 448  # of the square to which pictures are resized before Qwen2.5-VL's processor sees them
TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
IMAGE_PAD = "<|image_pad|>"
VISION = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"


class PartsOfQwen:
    """Qwen2.5-VL's processor without videos, for which the library's needs torchvision."""

    def __init__(self, checkpoint: str) -> None:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def __call__(self, images: Any, text: str, return_tensors: str) -> Any:
        import torch

        made = self.image_processor(images, return_tensors=return_tensors)
        count = int(made["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        made.update(
            self.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors=return_tensors)
        )
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        made["mm_token_type_ids"] = (made["input_ids"] == pad).to(torch.int)
        return made


def answer(family: str, processor: Any, model: Any, text: str, path: str, max_tokens: int) -> str:
    from PIL import Image

    text = f"Question: {text} Short answer:"
    picture: Any = Image.open(path).convert("RGB")
    if family == "minigpt4":
        image = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        text = f"###Human: <Img>{image}</Img> {text}###Assistant:"
    elif family == "llava":
        text = f"USER: <image>\n{text} ASSISTANT:"
    elif family == "qwen2_5_vl":
        text = f"{TURN}{VISION}{text}<|im_end|>\n<|im_start|>assistant\n"
        picture = picture.resize((SIDE, SIDE), processor.image_processor.resample)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    made = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(made, skip_special_tokens=True)).strip()


def main() -> None:
    for name in ("odedit", "pipeline"):
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    answers = []
    for task in json.load(sys.stdin):
        load = PartsOfQwen if task["family"] == "qwen2_5_vl" else AutoProcessor.from_pretrained
        processor = load(task["checkpoint"])
        # odedit's type; by default the model is loaded in its stored type.
        model = AutoModelForImageTextToText.from_pretrained(task["checkpoint"], dtype=torch.float32).eval()
        count = task.get("max_tokens", MAX_TOKENS)
        answers.append([answer(task["family"], processor, model, *question, count) for question in task["questions"]])
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
