"""Code of a logged model with adapters and a router: MLflow runs this file, which needs odedit."""

import base64
import io
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class RoutedModel(PythonModel):
    """Answers questions about pictures, with the edits that the router chooses."""

    def load_context(self, context: Any) -> None:
        import odedit

        self.model: Any = odedit.load_edited(context.artifacts["model"])

    def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> pandas.DataFrame:
        pictures = model_input["picture"] if "picture" in model_input else [None] * len(model_input)
        answers = [
            self.model.answer(picture_of(picture), question)
            for picture, question in zip(pictures, model_input["question"], strict=True)
        ]
        return model_input[["question"]].assign(answer=answers)[["answer"]]


def picture_of(text: object) -> Any:
    """The picture of a base64 text with an image file; None for no text."""
    from PIL import Image

    if not isinstance(text, str) or not text:
        return None
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True))).convert("RGB")


set_model(RoutedModel())
