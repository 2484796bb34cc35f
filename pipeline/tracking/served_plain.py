"""Code of a logged model whose folder is a Hugging Face checkpoint: MLflow runs this file, without odedit."""

import base64
import io
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class PlainModel(PythonModel):
    """Answers questions about pictures; see the model's README.md for the layout of its prompts."""

    def load_context(self, context: Any) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder, self.settings = context.artifacts["model"], context.model_config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, self.settings["dtype"])
        self.processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=self.dtype)
        self.model = model.eval().to(self.device)

    def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> pandas.DataFrame:
        pictures = model_input["picture"] if "picture" in model_input else [None] * len(model_input)
        answers = [self.answer(*asked) for asked in zip(pictures, model_input["question"], strict=True)]
        return model_input[["question"]].assign(answer=answers)[["answer"]]

    def answer(self, picture: object, question: str) -> str:
        """First line of the greedy answer; `picture` is an image file in base64, or empty."""
        image = picture_of(picture)
        if image is None:
            tokens = self.processor.tokenizer(self._text("without_picture", question), return_tensors="pt")
            name = self.settings["text_model"]
            return self._generated(getattr(self.model, name) if name else self.model, tokens)
        if side := self.settings["side"]:
            image = image.resize((side, side), 3)  # bicubic
        inputs = self.processor(images=image, text=self._text("with_picture", question), return_tensors="pt")
        return self._generated(self.model, inputs)

    def _text(self, layout: str, question: str) -> str:
        return str(self.settings[layout]).replace("{question}", question.strip())

    def _generated(self, model: Any, inputs: Any) -> str:
        sent = {name: value.to(self.device) for name, value in inputs.items()}
        sent = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in sent.items()}
        tokens = model.generate(**sent, do_sample=False, max_new_tokens=self.settings["max_tokens"])
        text = self.processor.tokenizer.decode(tokens[0, sent["input_ids"].shape[1] :], skip_special_tokens=True)
        if stop := self.settings["stop"]:
            text = text.split(stop)[0]
        return str(text).split("\n")[0].strip()


def picture_of(text: object) -> Any:
    """The picture of a base64 text with an image file; None for no text."""
    from PIL import Image

    if not isinstance(text, str) or not text:
        return None
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True))).convert("RGB")


set_model(PlainModel())
