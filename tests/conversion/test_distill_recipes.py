"""Recipes: strict about every key and value, and the shipped ones hold together."""

from pathlib import Path

import pytest

from unspool.errors import UserError
from unspool_conversion.distillation.recipe import LayerwiseStage, LogitsStage
from unspool_conversion.distillation.recipe_files import parse_recipe, read_recipe, shipped_recipes

HEAD = "name: x\nlength: 64\nsequences: 4\n"
STAGE = "stages: [{kind: logits, steps: 3}]\n"


def test_the_shipped_recipes_are_read() -> None:
    assert shipped_recipes() == ["8b", "bank", "cpu-10min", "cpu-30min", "gpu-30min", "liger-gla", "lolcats"]
    for name in shipped_recipes():
        recipe = read_recipe(name)
        assert recipe.name == name and recipe.description


def test_the_published_recipes_have_the_published_settings() -> None:
    liger, lolcats = read_recipe("liger-gla"), read_recipe("lolcats")
    assert liger.lora is not None and (liger.lora.rank, liger.lora.alpha) == (8, 8)
    assert liger.length == 1024 and len(liger.stages) == 1
    stage = liger.stages[0]
    assert isinstance(stage, LogitsStage) and stage.lora == ("q_proj", "k_proj", "v_proj")
    assert (stage.lora_lr, stage.cross_entropy) == (1e-3, 1.0)
    assert lolcats.lora is not None and (lolcats.lora.rank, lolcats.lora.alpha) == (8, 16)
    transfer, finetune = lolcats.stages
    assert isinstance(transfer, LayerwiseStage) and (transfer.map_lr, transfer.state_weight) == (1e-2, 0.0)
    assert isinstance(finetune, LogitsStage) and len(finetune.lora) == 4
    assert (finetune.lora_lr, finetune.cross_entropy) == (1e-4, 1.0)


def test_a_recipe_comes_back_from_its_own_account() -> None:
    import yaml

    for name in shipped_recipes():
        recipe = read_recipe(name)
        assert parse_recipe(yaml.safe_dump(recipe.to_dict()), "again") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "lenth: 3\n" + STAGE, r"r\.yaml: unknown key 'lenth'; known keys: description, held_out, length, lora"),
        (
            HEAD + "stages: [{kind: logits, steps: 3, lr: 1}]",
            r"r\.yaml: stages\[0\]: unknown key 'lr'; known keys: at_",
        ),
        (HEAD + "lora: {r: 8}\n" + STAGE, r"r\.yaml: lora: unknown key 'r'; known keys: alpha, rank, targets"),
        (HEAD + "stages: [{kind: distill}]", r"stages\[0\]: kind 'distill' is not one of bank, layerwise"),
        (HEAD + "stages: [{kind: logits}]", r"stages\[0\]: the key 'steps' is missing"),
        (HEAD + "stages: {kind: logits}", r"stages: must be a list"),
        (HEAD + "stages: []", r"stages: is empty"),
        (HEAD, r"r\.yaml: the key 'stages' is missing"),
        (HEAD + "seed: -1\n" + STAGE, r"seed: -1 is not a whole number between 0 and"),
        (HEAD + "seed: true\n" + STAGE, r"seed: True is not a whole number"),
        (HEAD + "held_out: 4\n" + STAGE, r"held_out: 4 leaves none of 4 sequences"),
        (HEAD + "teacher: mine\n" + STAGE, r"teacher: 'mine' is not one of shared, source"),
        (HEAD + "stages: [{kind: logits, steps: 3, lora_lr: .nan}]", r"lora_lr: nan is not a number between 0 and 10"),
        (HEAD + "stages: [{kind: logits, steps: 3, confidence: 1}]", r"confidence: 1 is not one of False, True"),
        (HEAD + "stages: [{kind: logits, steps: 3, lora: [q_proj]}]", r"stages\[0\]\.lora: q_proj is not among"),
        (HEAD + "lora: {targets: [up_proj]}\n" + STAGE, r"lora: targets: 'up_proj' is not one of q_proj, k_proj"),
        (HEAD + "stages: [{kind: logits, steps: 3, dropout_windows: [0]}]", r"dropout_windows: 0 is not one of 1 to"),
        (HEAD + "stages: [{kind: finetune, steps: 3}]", r"teacher: a finetune stage changes the shared weights"),
        ("a: 1\na: 2\n", r"r\.yaml is not valid YAML \(the key 'a' stands twice"),
        ("[1, 2", r"r\.yaml is not valid YAML"),
        ("- 1\n", r"r\.yaml: must be a mapping"),
        ("!!python/object:os.system {}", r"r\.yaml is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe(text, "r.yaml")


def test_exponents_are_numbers() -> None:
    stage = parse_recipe(HEAD + "stages: [{kind: logits, steps: 3, lora_lr: 1e-3}]", "r").stages[0]
    assert isinstance(stage, LogitsStage) and stage.lora_lr == 0.001


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe 'cpu-1min' is neither a file nor one of 8b, bank, cpu-10min"):
        read_recipe("cpu-1min")
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_recipe(str(path))
