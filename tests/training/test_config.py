from __future__ import annotations

import pytest

from llmcore.training.config import SHIPPED, RecipeError, load_recipe, to_toml

SMALL = """
name = "small"
[model]
size = "tiny"
[data]
row_len = 32
[[data.sources]]
path = "a"
[[data.sources]]
path = "b"
weight = 2
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_recipes_are_valid_and_round_trip(path, tmp_path):
    recipe = load_recipe(path.name)  # by name
    assert recipe == load_recipe(path)
    written = tmp_path / "recipe.toml"
    written.write_text(to_toml(recipe))
    assert load_recipe(written) == recipe
    assert recipe.model_config(600).vocab_size == 600


def test_all_four_are_shipped():
    names = {p.stem for p in SHIPPED.glob("*.toml")}
    assert {"quickstart", "gpt2-tiny", "llama-tiny", "moe-tiny"} <= names


def test_overrides(small):
    recipe = load_recipe(
        small,
        [
            "train.steps=7",
            "optim.lr = 1",
            "optim.betas=[0.8, 0.9]",
            "train.dtype=bf16",  # no quotes needed: what is no TOML value is a string
            'name="x = y"',
            "model.moe={num_experts = 4, top_k = 1, ffn_dim = 8}",
            "model.preset=llama_moe",
            "data.sources.1.weight=3",
        ],
    )
    assert (recipe.train.steps, recipe.optim.lr, recipe.optim.betas) == (7, 1.0, (0.8, 0.9))
    assert (recipe.train.dtype, recipe.name, recipe.data.sources[1].weight) == ("bf16", "x = y", 3.0)
    assert recipe.model_config(512).moe.num_experts == 4


def test_strings_survive_the_round_trip(small, tmp_path):
    prompts = ['"quoted" \\ back', "line\nfeed\ttab", "é 漢字 \x7f \x00", "#=[]'''"]
    recipe = load_recipe(small)
    object.__setattr__(recipe.sample, "prompts", prompts)
    (tmp_path / "again.toml").write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.toml").sample.prompts == prompts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", "unknown key 'train.step'; did you mean 'steps'"),
        ("trian.steps=5", "unknown key 'trian'; did you mean 'train'"),
        ("steps=5", "unknown key 'steps'; did you mean 'train.steps'"),
        ("dim=5", "unknown key 'dim'; did you mean 'model.dim'"),
        ("train.lr=5", "unknown key 'train.lr'; did you mean 'optim.lr'"),
        ("train.zzz=5", "unknown key 'train.zzz'; accepted are accumulation, "),
        ("model.num_layer=5", r"\[model\] 'num_layer' is no key.*did you mean 'num_layers'"),
        ("model.num_layers='2'", r"\[model\] num_layers is '2'.*accepted: int"),
        ("model.preset=lama", "model.preset is 'lama'; did you mean 'llama'"),
        ("model.size=huge", "no size 'huge'"),
        ("model.vocab_size=9", "set tokenizer.vocab_size"),
        ("train.steps=many", r"train.steps is 'many' \(str\); accepted: int"),
        ("train.steps=1.5", r"train.steps is 1.5 \(float\); accepted: int"),
        ("train.steps=true", r"train.steps is True \(bool\); accepted: int"),
        ("train.tensorboard=1", r"train.tensorboard is 1 \(int\); accepted: bool"),
        ("optim.betas=[0.9]", r"optim.betas is \[0.9\]; accepted is a list of 2"),
        ("optim.betas=[0.9, 'x']", r"optim.betas\[1\] is 'x' \(str\); accepted: float"),
        ("sample.prompts='def'", "sample.prompts is 'def'; accepted is a list"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources.0.pth=3", r"unknown key 'data.sources\[0\].pth'; did you mean 'path'"),
        ("data.sources.2.path=3", "'2' is not the number of an item; there are 2"),
        ("data.sources=[{weight = 1}]", r"'data.sources\[0\].path' is missing"),
        ("data.sources=[{path = 'a', format = 'csv'}]", "format is 'csv'"),
        ("data.sources=[{path = ''}]", "data.sources: path is empty"),
        ("data.sources=[{path = 'a', weight = -1}]", r"weight is -1\.0; accepted is a finite number above 0"),
        ("data.sources=[{path = 'a', weight = inf}]", "weight is inf"),
        ("data.sources.1.weight=nan", "data.sources: weight is nan"),
        ("data.sources.1.weight=0", "data.sources: weight is 0.0"),
        ("sample.temperature=-1", "sample.temperature is -1.0"),
        ("sample.top_p=2", "sample.top_p is 2.0"),
        ("sample.max_tokens=0", "sample.max_tokens is 0"),
        ("data.row_len=257", "data.row_len is 257; accepted is at most model.max_positions = 256"),
        ("data.validation_fraction=1", "data.validation_fraction is 1.0"),
        ("train=3", "train is 3; accepted is a table"),
        ("name.x=3", "'name' is not a table"),
        ("train.steps", "accepted is KEY=VALUE"),
        ("=3", "accepted is KEY=VALUE"),
        ("optim.kind=sgd", "optim.kind is 'sgd'"),
        ("schedule.kind=linear", "schedule.kind is 'linear'"),
    ],
)
def test_errors_name_the_key(small, override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(small, [override])
    assert "small.toml" in str(caught.value)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(RecipeError, match=r"no such recipe; shipped are .*quickstart\.toml"):
        load_recipe("nothing.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 3")
    with pytest.raises(RecipeError, match="not TOML"):
        load_recipe(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not TOML"):
        load_recipe(bad)
    bad.write_text("[data]\nsources = [{path = 'a'}]")
    with pytest.raises(RecipeError, match="'model' is missing"):
        load_recipe(bad)
