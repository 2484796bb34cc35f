"""Checkpoints with one mutation: `--dry-run` reports it in one sentence, or the model computes exactly the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from odedit import InputError, load_backbone
from odedit.backbones import encode_requests, inspect_backbone
from tests.support import tiny_current, tiny_models
from tests.support.requests import TEMPLATE, make_request

FAMILIES = ("blip2", *tiny_current.FAMILIES)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
Mutation = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor, str]]:
    """Checkpoint, logits and fingerprint of a family."""
    made: dict[str, tuple[Path, torch.Tensor, str]] = {}

    def original(family: str) -> tuple[Path, torch.Tensor, str]:
        if family not in made:
            folder = tiny_current.write_family(family, tmp_path_factory.mktemp("models") / family)
            change(folder, lambda tensors: {name: exact(value) for name, value in tensors.items()})
            made[family] = folder, *outputs_of(family, folder)
        return made[family]

    return original


def exact(value: torch.Tensor) -> torch.Tensor:
    """The value rounded to one that every type of weights represents."""
    return ((value * 32).round() / 32).clamp(-3, 3)


@torch.no_grad()
def outputs_of(family: str, folder: Path) -> tuple[torch.Tensor, str]:
    model = load_backbone(family, str(folder))
    batch = encode_requests(model, [make_request(0)], TEMPLATE)[0]
    return model.head(model.suffix(model.prefix(batch, "layers.0.attention.q"), batch.predict_EKT)), model.fingerprint


def change(folder: Path, altered: Callable[[Tensors], Tensors], metadata: dict[str, str] | None = None) -> None:
    tensors = altered(load_file(folder / WEIGHTS))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, metadata)


def altered_one(alter: Callable[[torch.Tensor], torch.Tensor | None], name: str = "") -> Mutation:
    """Alters the tensor whose name ends with `name`, or a matrix that is not square; None drops it."""

    def altered(tensors: Tensors) -> Tensors:
        matrices = (key for key, value in tensors.items() if value.ndim == 2 and value.shape[0] != value.shape[1])
        chosen = next(key for key in tensors if key.endswith(name)) if name else next(matrices)
        value = alter(tensors.pop(chosen))
        return tensors if value is None else {**tensors, chosen: value}

    return lambda folder: change(folder, altered)


def renamed(rename: Callable[[str], str]) -> Mutation:
    return lambda folder: change(folder, lambda tensors: {rename(name): value for name, value in tensors.items()})


def extra(name: str, value: torch.Tensor) -> Mutation:
    return lambda folder: change(folder, lambda tensors: {**tensors, name: value})


def every(dtype: torch.dtype) -> Mutation:
    return lambda folder: change(folder, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})


def put(value: float) -> Mutation:
    def alter(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return altered_one(alter)


def edited(file: str, edit: Callable[[dict[str, Any]], object]) -> Mutation:
    def mutate(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        edit(values)
        (folder / file).write_text(json.dumps(values))

    return mutate


def config(path: str, value: Any) -> Mutation:
    """Sets a key of config.json; a function gets the old value."""

    def edit(values: dict[str, Any]) -> None:
        *sections, key = path.split(".")
        for section in sections:
            values = values[section]
        values[key] = value(values[key]) if callable(value) else value

    return edited("config.json", edit)


def in_shards(*forgotten: str) -> Mutation:
    """Three shards, and an index without the files in `forgotten`."""

    def mutate(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names, files = sorted(tensors, reverse=True), {}
        for number in range(3):
            file = f"part-{number}.safetensors"
            save_file({name: tensors[name] for name in names[number::3]}, folder / file)
            files |= dict.fromkeys(names[number::3], file)
        kept = {name: file for name, file in files.items() if file not in forgotten}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))

    return mutate


def then(*mutations: Mutation) -> Mutation:
    return lambda folder: [mutate(folder) for mutate in mutations]


def cut(file: str, keep: float) -> Mutation:
    return lambda folder: (folder / file).write_bytes(
        (content := (folder / file).read_bytes())[: int(len(content) * keep)]
    )


def without(file: str) -> Mutation:
    return lambda folder: (folder / file).unlink()


def larger(value: int) -> int:
    return 2 * value


def without_token(name: str) -> Mutation:
    def edit(values: dict[str, Any]) -> None:
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != name]

    return edited("tokenizer.json", edit)


def quantised(**settings: Any) -> Mutation:
    return config("quantization_config", settings)


FP8 = getattr(torch, "float8_e4m3fn")  # noqa: B009 - not in every type stub
REFUSED: dict[str, tuple[Mutation, str]] = {
    "a tensor dropped": (altered_one(lambda value: None), r"1 tensor of \d+ missing .* saved or downloaded in part"),
    "the head dropped": (altered_one(lambda value: None, "lm_head.weight"), "1 tensor of .*lm_head.weight"),
    "a bias dropped": (altered_one(lambda value: None, "bias"), "1 tensor of .* missing"),
    "a tensor renamed": (renamed(lambda name: name.replace("lm_head", "head")), "1 tensor of .* 1 tensor unexpected"),
    "another model's names": (renamed(lambda name: f"x{hash(name)}"), "different models"),
    "a tensor resized": (altered_one(lambda value: value[:-1]), "1 tensor of another shape .* instead of"),
    "a tensor turned": (altered_one(lambda value: value.T), "1 tensor of another shape"),
    "a tensor flat": (altered_one(torch.flatten), "1 tensor of another shape"),
    "a tensor empty": (altered_one(lambda value: value[:0]), "1 tensor of another shape"),
    "an extra tensor": (extra("other.weight", torch.ones(2)), r"1 tensor unexpected \(.*other.weight"),
    "NaN": (put(float("nan")), r"1 tensor \(first: .*\) with NaN or infinite"),
    "infinite": (put(float("inf")), "with NaN or infinite"),
    "minus infinite in half precision": (then(put(float("-inf")), every(torch.float16)), "with NaN or infinite"),
    "NaN in bfloat16": (then(put(float("nan")), every(torch.bfloat16)), "with NaN or infinite"),
    "NaN in double precision": (then(put(float("nan")), every(torch.float64)), "with NaN or infinite"),
    "an adapter's prefix": (renamed("base_model.model.{}".format), "Every name begins with 'base_model.model.'"),
    "DataParallel's prefix": (renamed("module.{}".format), "Every name begins with 'module.'"),
    "an unmerged adapter": (extra("model.layers.0.q_proj.lora_A.weight", torch.ones(2, 2)), "merge_and_unload"),
    "a tensor of int8": (altered_one(lambda value: value.to(torch.int8)), "quantised .* I8"),
    "all of float8": (every(FP8), "quantised .* F8_E4M3"),
    "packed bytes": (altered_one(lambda value: value.to(torch.uint8).flatten()[::2]), "quantised .* U8"),
    "a layer more": (config("text_config.num_hidden_layers", 4), r"\d+ tensors of \d+ missing|num_hidden_layers"),
    "a layer less": (config("text_config.num_hidden_layers", 1), r"\d+ tensors unexpected|num_hidden_layers"),
    "another vocabulary": (config("text_config.vocab_size", larger), r"2 tensors of another shape"),
    "another width of the tower": (config("vision_config.hidden_size", larger), "do not fit"),
    "another text model": (config("text_config.model_type", "gpt2"), "family .* takes|expected one of"),
    "another class": (config("model_type", "bert"), "family .* takes|no image-text-to-text model"),
    "a width in words": (config("text_config.hidden_size", "wide"), "config.json"),
    "an activation that is none": (config("vision_config.hidden_act", "nothing"), "config.json"),
    "no tokenizer": (without("tokenizer.json"), "its (tokenizer|processor) cannot be read"),
    "no image processor": (without("preprocessor_config.json"), "its (image )?processor cannot be read"),
}  # fmt: skip
OF_ANY: dict[str, tuple[Mutation, str]] = {
    "a file cut off": (cut(WEIGHTS, 0.7), "damaged or cut off"),
    "a header cut off": (cut(WEIGHTS, 0.01), "damaged or cut off"),
    "an empty file": (cut(WEIGHTS, 0), "damaged or cut off"),
    "no weights": (without(WEIGHTS), "holds neither model.safetensors nor"),
    "pickled weights alone": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "pickled ones .* save_pretrained"
    ),
    "a shard missing": (then(in_shards(), without("part-1.safetensors")), "3 weight files, and 1 of them .* part-1"),
    "a shard not in the index": (in_shards("part-2.safetensors"), r"\d+ tensors of \d+ missing"),
    "an index cut off": (then(in_shards(), cut(INDEX, 0.5)), "cannot be read as an index"),
    "an index of other content": (
        then(in_shards(), lambda folder: (folder / INDEX).write_text("[1]")), "cannot be read as an index"
    ),
    "an adapter's folder": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter"),
    "bitsandbytes": (quantised(quant_method="bitsandbytes", load_in_4bit=True), r"quantised \(bitsandbytes, 4 bits\)"),
    "AWQ": (quantised(quant_method="awq", bits=4), r"quantised \(awq, 4 bits\)"),
    "GPTQ": (quantised(quant_method="gptq", bits=8), r"quantised \(gptq, 8 bits\)"),
    "FP8": (quantised(quant_method="fp8"), r"quantised \(fp8\)"),
    "weights by another name": (config("transformers_weights", "other.safetensors"), "transformers_weights"),
    "a configuration cut off": (cut("config.json", 0.5), "config.json cannot be read"),
    "no configuration": (without("config.json"), "config.json cannot be read"),
}  # fmt: skip
"""Mutations that concern all families alike; each is tested with one family."""
OF_FAMILY: dict[str, dict[str, tuple[Mutation, str]]] = {
    "blip2": {
        "more queries": (config("num_query_tokens", larger), "query_tokens 1x3x16 instead of 1x6x16"),
        "another width of the Q-Former": (config("qformer_config.intermediate_size", larger), "of another shape"),
        "projected embeddings": (config("text_config.word_embed_proj_dim", 16), "do not fit"),
        "norms behind the halves": (config("text_config.do_layer_norm_before", False), "2 tensors unexpected"),
        "a larger processor": (
            edited("preprocessor_config.json", lambda v: v.update(size={"height": 48, "width": 48})),
            "does not pass the image tower",
        ),
    },
    "minigpt4": {
        "fewer queries": (config("num_query_tokens", 2), "query_tokens 1x3x16 instead of 1x2x16"),
        "a bias more": (config("text_config.attention_bias", True), "8 tensors of .* missing"),
        "another feed-forward half": (config("text_config.intermediate_size", larger), "6 tensors of another"),
    },
    "llava": {
        "an image token beyond the vocabulary": (config("image_token_index", 32000), "id 32000 by config.json"),
        "a word as image token": (config("image_token_index", 300), "id 300 by config.json"),
        "no image token": (without_token("<image>"), "lacks the special token of an image"),
        "a layer that the tower lacks": (config("vision_feature_layer", 9), "does not pass the image tower"),
        "a smaller picture": (
            edited("preprocessor_config.json", lambda v: v.update(crop_size={"height": 16, "width": 16})),
            "does not pass the image tower",
        ),
        "another tower": (config("vision_config.model_type", "siglip_vision_model"), "image tower"),
        "no bias": (config("text_config.attention_bias", False), "8 tensors unexpected"),
    },
    "auto": {
        "an image token beyond the vocabulary": (config("image_token_id", 32000), "id 32000 by config.json"),
        "no image token": (without_token("<|image_pad|>"), "lacks the special token of an image"),
        "fewer layers of the tower": (config("vision_config.depth", 1), "tensors unexpected"),
        "other heads": (config("text_config.num_key_value_heads", 4), "12 tensors of another shape"),
    },
}  # fmt: skip
SAME: dict[str, tuple[Mutation, bool]] = {
    "in half precision": (every(torch.float16), False),
    "in bfloat16": (every(torch.bfloat16), False),
    "in double precision": (every(torch.float64), False),
    "in shards": (in_shards(), True),
    "with a note in the file": (lambda folder: change(folder, dict, {"by": "a test"}), True),
    "saved by another version": (
        then(
            config("transformers_version", "4.57.0"), config("dtype", "bfloat16"), config("architectures", None),
            config("use_cache", False), config("_name_or_path", "elsewhere/model"),
        ),
        True,
    ),
    "with pickled weights beside it": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"no pickle"), True),
    "with another file of tensors": (lambda folder: save_file({"a": torch.ones(1)}, folder / "a.safetensors"), True),
}  # fmt: skip
"""Mutations without effect, and whether they keep the fingerprint."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_with_a_checkpoint_is_said(family, name, originals, tmp_path):
    if (family, name) == ("auto", "another text model"):
        pytest.skip("Qwen2.5-VL has one kind of text model")
    refused(family, *REFUSED[name], originals(family)[0], tmp_path)


@pytest.mark.parametrize(("number", "name"), list(enumerate(OF_ANY)))
def test_what_is_wrong_with_the_files_is_said(number, name, originals, tmp_path):
    family = FAMILIES[number % len(FAMILIES)]
    refused(family, *OF_ANY[name], originals(family)[0], tmp_path)


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in OF_FAMILY for name in OF_FAMILY[family]])
def test_what_is_wrong_for_a_family_is_said(family, name, originals, tmp_path):
    refused(family, *OF_FAMILY[family][name], originals(family)[0], tmp_path)


def refused(family: str, mutate: Mutation, words: str, original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "model")
    mutate(folder)
    with pytest.raises(InputError, match=words) as refusal:
        assert inspect_backbone(family, str(folder)).fingerprint
    message = str(refusal.value)
    assert message.startswith("backbone.checkpoint") and message.endswith(".") and "\n" not in message, message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SAME)
def test_what_means_nothing_changes_nothing(family, name, originals, tmp_path):
    original, logits, fingerprint = originals(family)
    mutate, stays = SAME[name]
    folder = shutil.copytree(original, tmp_path / "model")
    mutate(folder)
    changed, own = outputs_of(family, folder)
    assert torch.equal(changed, logits)
    assert (own == fingerprint) is stays


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_is_in_the_fingerprint(family, originals, tmp_path):
    original, _, fingerprint = originals(family)
    names = sorted(load_file(original / WEIGHTS))
    fingerprints = {fingerprint}
    for name in names[:: len(names) // 4]:
        folder = shutil.copytree(original, tmp_path / name)
        change(folder, lambda tensors, name=name: {**tensors, name: tensors[name] + 0.5})
        fingerprints.add(inspect_backbone(family, str(folder)).fingerprint)
    assert len(fingerprints) == 1 + len(names[:: len(names) // 4])


def test_features_of_another_width_than_the_text_models_are_refused(originals, tmp_path):
    """When weights are loaded: the tower of Qwen2.5-VL reads values, and cannot run without."""
    folder = shutil.copytree(originals("auto")[0], tmp_path / "model")
    config("vision_config.out_hidden_size", 48)(folder)
    altered_one(lambda value: torch.ones(48, value.shape[1]), "merger.mlp.2.weight")(folder)
    altered_one(lambda value: torch.ones(48), "merger.mlp.2.bias")(folder)
    with pytest.raises(InputError, match="features of width 48, and the text model takes width 32"):
        load_backbone("auto", str(folder))


def test_values_beyond_half_precision_are_refused_for_it(originals, tmp_path):
    folder = shutil.copytree(originals("llava")[0], tmp_path / "model")
    put(1e5)(folder)
    assert inspect_backbone("llava", str(folder), dtype="bfloat16").fingerprint
    with pytest.raises(InputError, match="values beyond float16, which would become infinite"):
        assert inspect_backbone("llava", str(folder), dtype="float16").fingerprint


def test_a_buffer_that_older_libraries_saved_is_no_weight(originals, tmp_path):
    original, logits, _ = originals("llava")
    folder = shutil.copytree(original, tmp_path / "model")
    extra("vision_tower.embeddings.position_ids", torch.arange(17).unsqueeze(0))(folder)
    extra("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))(folder)
    assert torch.equal(outputs_of("llava", folder)[0], logits)


def test_weights_that_change_between_look_and_load_are_noticed(originals, tmp_path, monkeypatch):
    """The library's report at loading is checked, in addition to the headers before."""
    from odedit.backbones.common import checkpoints

    folder = shutil.copytree(originals("llava")[0], tmp_path / "model")
    altered_one(lambda value: None)(folder)
    architecture = type(inspect_backbone("llava", str(originals("llava")[0]))).architecture
    config = checkpoints.read_config(str(folder), "llava", architecture)
    with pytest.raises(InputError, match=r"1 tensor of \d+ missing"):
        checkpoints.load_model(str(folder), "model", config, architecture, "float32", torch.device("cpu"))


def test_projected_embeddings_are_refused_for_what_they_are(tmp_path):
    folder = tiny_models.write("blip2, projected", tmp_path / "model")
    assert any(name.endswith("project_in.weight") for name in load_file(folder / WEIGHTS))
    with pytest.raises(InputError, match="embeddings have the width 16, its layers 32 .* word_embed_proj_dim"):
        inspect_backbone("blip2", str(folder))
