"""Answers of checkpoints without odedit: the library's automatic classes, `generate`, and the picture.

Run as a program: reads a list of `{family, checkpoint, questions: [[text, image], ...]}` as JSON from standard input,
and writes the answers, of at most `max_tokens` tokens (default 8).
"""

from __future__ import annotations

import json
import sys
from typing import Any

MAX_TOKENS = 8


def answer(family: str, processor: Any, model: Any, text: str, path: str, max_tokens: int) -> str:
    from PIL import Image

    text = f"Question: {text} Short answer:"
    picture: Any = Image.open(path).convert("RGB")
    if family == "minigpt4":
        image = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        text = f"###Human: <Img>{image}</Img> {text}###Assistant:"
    elif family == "llava":
        text = f"USER: <image>\n{text} ASSISTANT:"
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
        processor = AutoProcessor.from_pretrained(task["checkpoint"])
        # odedit's type; by default the model is loaded in its stored type.
        model = AutoModelForImageTextToText.from_pretrained(task["checkpoint"], dtype=torch.float32).eval()
        count = task.get("max_tokens", MAX_TOKENS)
        answers.append([answer(task["family"], processor, model, *question, count) for question in task["questions"]])
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
