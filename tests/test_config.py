"""Settings: YAML over the defaults, overrides over that, and one line for whatever is wrong."""

import pytest

from transfusion_fast.config import Config, ModelConfig, TransformerConfig
from transfusion_fast.config_reading import load_config, parse, sources
from transfusion_fast.errors import InputError
from transfusion_fast.modalities import ModalityConfig


def error_of(*overrides, path=None):
    """Return the message that the overrides are refused with."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_nothing_given_is_the_papers_recipe(tmp_path):
    config = load_config(None)
    assert config == Config()
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.warmup_steps) == (3e-4, 1.5e-5, 4000)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.optimizer.max_norm, config.model.diffusion_weight) == (1.0, 5.0)
    assert (config.data.caption_first, config.data.prob_uncond, config.data.noise_cap) == (0.8, 0.1, 500)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == config


def test_yaml_goes_over_the_defaults_and_overrides_over_the_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  dim_latent: 8\n  transformer: {dim: 64, depth: 3}\noptimizer:\n  lr: 0.01\n")
    overrides = ["model.transformer.depth=5", "train.seed=1", "train.seed=7", "deepspeed.comms_logger.enabled=true"]
    config = load_config(path, overrides)
    assert config.model.dim_latent == (8,)
    assert (config.model.transformer.dim, config.model.transformer.depth) == (64, 5)
    assert (config.optimizer.lr, config.train.seed) == (0.01, 7)
    assert config.optimizer.min_lr == Config().optimizer.min_lr
    assert config.deepspeed == {"comms_logger": {"enabled": True}}


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001"])
def test_a_float_may_be_written_in_any_way(tmp_path, number):
    """YAML itself reads `1e-4` as text."""
    (tmp_path / "config.yaml").write_text(f"optimizer:\n  lr: {number}\n")
    assert load_config(tmp_path / "config.yaml").optimizer.lr == 1e-4
    assert load_config(None, [f"optimizer.lr={number}"]).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("optimizer.learning_rate=1", "'optimizer.learning_rate'", "known: name, lr, min_lr"),
        ("model.transformer.dept=1", "'model.transformer.dept'", "did you mean 'depth'?"),
        ("modle.num_text_tokens=1", "'modle'", "did you mean 'model'?"),
        ("model.objective=flow", "'model.objective'", "it is 'model.diffusion.process' now, with the same values;"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_name(override, key, hint):
    message = error_of(override)
    assert f"unknown key {key}" in message and hint in message


@pytest.mark.parametrize(
    ("override", "key", "got"),
    [
        ("optimizer.lr=0", "optimizer.lr", "got 0"),
        ("optimizer.lr=.inf", "optimizer.lr", "got inf"),
        ("optimizer.lr=true", "optimizer.lr", "got True"),
        ("optimizer.beta2=1", "optimizer.beta2", "got 1"),
        ("data.prob_uncond=1.5", "data.prob_uncond", "got 1.5"),
        ("data.noise_cap=1001", "data.noise_cap", "got 1001"),
        ("model.dim_latent=[4, 0]", "model.modalities.1.dim_latent", "got 0"),
        ("model.diffusion_weight=-1", "model.diffusion_weight", "got -1"),
        ("model.diffusion.shift=0", "model.diffusion.shift", "got 0"),
        ("model.diffusion.prediction=x", "model.diffusion.prediction", "got 'x'"),
        ("model.diffusion={process: flow, schedule: linear}", "model.diffusion", "with process=flow, which has none"),
        ("train.steps=many", "train.steps", "got 'many'"),
        ("train.steps=true", "train.steps", "got True"),
        ("train.wandb=''", "train.wandb", "got ''"),
        ("train.profile=[4, 3]", "train.profile", "up to train.steps, got [4, 3]"),
        ("train.profile=[4, 250001]", "train.profile", "up to train.steps, got [4, 250001]"),
        ("model.preset=8b", "model.preset", "got '8b'"),
        ("model.transformer=big", "model.transformer", "got 'big'"),
        ("model.transformer.heads=5", "model.transformer", "even head dimensions, got dim=512, heads=5"),
        ("model.transformer={dim: 21, heads: 7}", "model.transformer", "even head dimensions, got dim=21, heads=7"),
        ("model.transformer.kv_heads=3", "model.transformer", "kv_heads must divide heads=8, got 3"),
        ("data.path={a: 0}", "data.path.weight.a", "Input should be greater than 0, got 0"),
        ("data.path={}", "data.path.weight", "at least 1 item"),
        ("data.path=3", "data.path.folder", "Input should be a valid string, got 3"),
    ],
)
def test_a_value_out_of_range_or_of_a_wrong_type_is_named_with_what_was_got(override, key, got):
    message = error_of(override)
    assert f": {key}: " in message and got in message and "Value error" not in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr"], "override must be section.key=value, got 'optimizer.lr'"),
        (["=3"], "override must be section.key=value, got '=3'"),
        (["optimizer.lr=[1"], "override 'optimizer.lr=[1': the value must be YAML; quote it"),
        (["optimizer=3", "optimizer.lr=1"], "override 'optimizer.lr=1': optimizer is a value, not a section"),
    ],
)
def test_an_override_of_wrong_syntax_is_quoted(overrides, message):
    assert error_of(*overrides) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"a:\n\tb: 1", "must be YAML, but "),
        (b"run: !!python/object/apply:os.getcwd []", "must be YAML, but "),
        (b"- model\n- data\n", "must be a mapping of sections, got list"),
        (b"false", "must be a mapping of sections, got bool"),
        (b"train: {1: 2}", "train.1: Keys should be strings"),
        (b"model:\n  preset: [0.16b]\n", "model.preset"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    got = error_of(path=path)
    assert got.startswith(f"config {path}: ") and message in got


@pytest.mark.parametrize(
    ("name", "depth", "dim", "heads", "hidden"),
    [
        ("0.16b", 16, 768, 12, 2048),
        ("0.37b", 24, 1024, 16, 2816),
        ("0.76b", 24, 1536, 24, 4096),
        ("1.4b", 24, 2048, 16, 5632),
        ("7b", 32, 4096, 32, 11008),
    ],
)
def test_a_preset_is_a_row_of_the_papers_table(name, depth, dim, heads, hidden):
    transformer = load_config(None, [f"model.preset={name}"]).model.transformer
    got = (transformer.depth, transformer.dim, transformer.num_heads, transformer.hidden_dim)
    assert got == (depth, dim, heads, hidden)
    message = error_of(f"model.preset={name}", "model.transformer.depth=2")
    assert "transformer.depth must not be given with preset, which sets it; drop one of them" in message
    combined = load_config(None, [f"model.preset={name}", "model.transformer.qk_norm=true"]).model.transformer
    assert combined == transformer.model_copy(update={"qk_norm": True})


@pytest.mark.parametrize(
    "overrides", [[], ["model.preset=0.37b"], ["model.transformer.dim=128", "data.path={data/a: 1, s3://b/c: 3e-1}"]]
)
def test_a_resolved_config_is_read_back_as_itself(overrides):
    config = load_config(None, overrides)
    assert parse(Config, config.model_dump(mode="json"), "saved") == config


def test_settings_that_are_not_given_follow_from_others():
    transformer = TransformerConfig(dim=192)
    assert (transformer.num_heads, transformer.num_kv_heads, transformer.head_dim) == (3, 3, 64)
    assert transformer.hidden_dim == 512
    assert TransformerConfig(dim=32).num_heads == 1
    given = TransformerConfig(dim=192, heads=6, kv_heads=2, ffn_dim=100)
    assert (given.num_heads, given.num_kv_heads, given.head_dim, given.hidden_dim) == (6, 2, 32, 100)
    assert ModelConfig(dim_latent=192).dim_latent == (192,) and ModelConfig(dim_latent=(8, 4)).dim_latent == (8, 4)
    assert load_config(None, ["data.path=data/a"]).data.weights == {"data/a": 1.0}
    assert load_config(None, ["data.path={a: 1, s3://b/c: 3e-1}"]).data.weights == {"a": 1.0, "s3://b/c": 0.3}


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        ModelConfig().num_text_tokens = 3


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(None, ["train.output=~/run", "data.path={~/a: 1, s3://b/~c: 2}"])
    assert config.train.output == "/home/somebody/run"
    assert config.data.weights == {"/home/somebody/a": 1.0, "s3://b/~c": 2.0}


def test_the_source_of_every_value_is_known(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{model: {preset: 0.16b, dim_latent: 8}, data: {path: {a: 1}}, train: {seed: 1, steps: 2}}")
    overrides = ["train={seed: 3}", "data.path.b=2"]
    found = {name: (value, source) for name, value, source in sources(load_config(path, overrides), path, overrides)}
    assert found["model.transformer.depth"] == (16, "preset")
    assert found["model.transformer.qk_norm"] == (False, "default")
    assert found["model.preset"] == ("0.16b", "file")
    assert found["model.modalities"] == ((ModalityConfig(dim_latent=8),), "file")
    assert found["model.num_text_tokens"] == (256, "data")
    assert found["data.path"] == ({"a": 1, "b": 2}, "override")
    assert found["train.seed"] == (3, "override")
    assert found["train.steps"] == (250_000, "default")  # the override replaced the section


def test_copies_need_a_clean_context_and_causal_images_a_noised_one():
    assert "copies must be 1 with context=noised, got 2; set context to clean" in error_of("data.copies=2")
    causal = error_of("data.context=clean", "model.image_attention=causal")
    assert "model.image_attention=causal must come with data.context=noised" in causal
    assert load_config(None, ["data.context=clean", "data.copies=2"]).data.added_copies == 2
    assert load_config(None, []).data.added_copies == 0
