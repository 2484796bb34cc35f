"""A whole model beside the unedited one: both loaded, and asked the same probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from odedit.backbones import Backbone, encode_evaluation, is_connector
from odedit.editors.base import Editor
from odedit.errors import InputError
from odedit.evaluation import perplexity
from odedit.evaluation.scores import TOP_SITE, EvaluationConfig, Row, evaluate_model, evaluate_together
from odedit.inputs.batch import EditParams, EditRequest
from odedit.inputs.encoding import stacked_features
from odedit.inputs.prompts import Template
from odedit.runtime.brief import brief
from odedit.runtime.stages import stage
from odedit.ways.common.files import load_committed, serving_editor
from pipeline.config.run import BackboneConfig
from pipeline.workers.model import Warn, load_with_feature_cache, unedited_answers, worker_backbone
from pipeline.workers.plan import ScoredModel


@dataclass(frozen=True)
class Compared:
    """The unedited model and the scored one: another checkpoint, or parameters that an editor applies.

    Attributes:
        unedited: The unedited model.
        edited: Checkpoint; None: `editor` and `params` act on the unedited model.
        editor, params: Editor that serves the parameters of a committed model.
        own_features: Whether the checkpoint sees pictures otherwise than the unedited model.
    """

    unedited: Backbone
    edited: Backbone | None = None
    editor: Editor | None = None
    params: EditParams | None = None
    own_features: bool = False

    __repr__ = brief

    @classmethod
    def load(
        cls, backbone: BackboneConfig, scored: ScoredModel, device: str, store: str | None, warn: Warn
    ) -> Compared:
        """Loads both models.

        Args:
            store: Feature store, as in `load_with_feature_cache`.

        Raises:
            InputError: A model cannot be loaded, or the two do not fit together.
        """
        unedited = worker_backbone(backbone, device, store, warn)
        if scored.checkpoint is not None:
            other = replace(backbone, checkpoint=scored.checkpoint)
            edited = load_with_feature_cache(other, device, store, warn)
            check_alike(unedited, edited)
            return cls(unedited, edited, own_features=not edited.has_features_of(unedited))
        assert scored.committed is not None, "a model is a checkpoint or a committed model"
        params, info = load_committed(scored.committed, device)
        return cls(unedited, editor=serving_editor(info, unedited, trusted=scored.trusted), params=params)

    def rows(self, requests: Sequence[EditRequest], template: Template, config: EvaluationConfig) -> list[Row]:
        """Scores of the requests' probes, as `evaluate` returns them."""
        before = self.editor is not None and any(is_connector(site) for site in self.editor.sites)
        pictures = [
            probe.picture
            for request in requests
            for probe in (request.edit, *request.probes.values())
            if probe.picture is not None
        ]
        with stage("image features"):
            features = self.unedited.image_features(pictures, before)
        with stage("encode"):
            batch = encode_evaluation(self.unedited, requests, features, template, before)
        if self.edited is None:
            assert self.editor is not None and self.params is not None
            with stage("evaluation"):
                return evaluate_together(
                    self.unedited, self.editor, self.params, batch, config, unedited_answers(self.unedited)
                )
        own = None
        if self.own_features and features:
            with stage("image features"):
                own = stacked_features(list(self.edited.image_features(pictures).values()))
        with stage("evaluation"):
            return evaluate_model(self.unedited, self.edited, batch, own, config, unedited_answers(self.unedited))

    def text_nll(self, text: str) -> tuple[float, float, int]:
        """Mean NLL per token of a text before and after, without a picture, and the number of tokens.

        Raises:
            InputError: The text has no token to predict.
        """
        sites = TOP_SITE if self.editor is None else self.editor.sites
        positionwise = self.editor is None or self.editor.positionwise
        before = after = 0.0
        count = 0
        for batch in perplexity.windows(self.unedited, text, sites):
            nll, number = perplexity.total_nll(self.unedited, batch, sites, positionwise)
            before, count = before + nll, count + number
            if self.edited is not None:
                after += perplexity.total_nll(self.edited, batch, sites, positionwise)[0]
                continue
            assert self.editor is not None and self.params is not None
            with self.editor.together(self.unedited, self.params, batch):
                after += perplexity.total_nll(self.unedited, batch, sites, positionwise)[0]
        if not count:
            raise InputError("the text has no token that another precedes.")
        return before / count, after / count, count


def check_alike(unedited: Backbone, edited: Backbone) -> None:
    """Raises InputError unless two models have the same sizes and the same tokens.

    Both may be without weights (`inspect_backbone`).
    """
    sizes = ("num_layers", "hidden_size", "vocabulary_size", "max_positions")
    name = f"model {edited.checkpoint!r}"
    for size in sizes:
        ours, theirs = getattr(unedited, size), getattr(edited, size)
        if ours != theirs:
            what = size.replace("num_", "").replace("_", " ")
            raise InputError(
                f"{name}: its {what} is {theirs:,}, that of backbone.checkpoint {unedited.checkpoint!r} is {ours:,}. "
                "Only a model with the same architecture can be scored against it."
            )
    if unedited.processor.tokenizer.get_vocab() != edited.processor.tokenizer.get_vocab():
        raise InputError(
            f"{name}: its tokenizer has another vocabulary than that of backbone.checkpoint {unedited.checkpoint!r}. "
            "Take the tokenizer's files from the model that was edited."
        )
