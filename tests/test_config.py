"""Settings: YAML over the defaults, overrides over that, and one line for whatever is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.config import PRESETS, Config, ModelConfig, TransformerConfig, load_config, parse
from transfusion_fast.errors import InputError


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def error_of(*overrides, path=None):
    """The message that the overrides are refused with."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_nothing_given_is_the_papers_recipe():
    config = load_config(None)
    assert config == Config()
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.warmup_steps) == (3e-4, 1.5e-5, 4000)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.optimizer.clip, config.model.diffusion_weight) == (1.0, 5.0)
    assert (config.data.caption_first, config.data.guidance_drop, config.data.noise_cap) == (0.8, 0.1, 500)


def test_yaml_goes_over_the_defaults_and_overrides_over_the_yaml(write):
    path = write("model:\n  dim_latent: 8\n  transformer: {dim: 64, depth: 3}\noptimizer:\n  lr: 0.01\n")
    config = load_config(path, ["model.transformer.depth=5", "train.seed=7"])
    assert config.model.dim_latent == (8,)
    assert (config.model.transformer.dim, config.model.transformer.depth) == (64, 5)
    assert (config.optimizer.lr, config.train.seed) == (0.01, 7)
    assert config.optimizer.min_lr == Config().optimizer.min_lr


def test_of_two_overrides_of_one_key_the_last_counts():
    assert load_config(None, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_empty_file_is_the_defaults(write):
    assert load_config(write("# nothing\n")) == Config()


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_a_float_may_be_written_in_any_way(write, number):
    """YAML itself reads `1e-4` as text."""
    assert load_config(write(f"optimizer:\n  lr: {number}\n")).optimizer.lr == 1e-4
    assert load_config(None, [f"optimizer.lr={number}"]).optimizer.lr == 1e-4


@given(st.floats(1e-12, 1e3))
def test_every_printed_float_is_read_back(lr):
    assert load_config(None, [f"optimizer.lr={lr!r}"]).optimizer.lr == lr


def test_lists_and_raw_deepspeed_settings_are_read():
    config = load_config(None, ["model.dim_latent=[384, 192]", "deepspeed.comms_logger.enabled=true"])
    assert config.model.dim_latent == (384, 192)
    assert config.deepspeed == {"comms_logger": {"enabled": True}}


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("optimizer.learning_rate=1", "'optimizer.learning_rate'", "known: lr, min_lr"),
        ("optimizer.weight_decy=1", "'optimizer.weight_decy'", "did you mean 'weight_decay'?"),
        ("model.transformer.dept=1", "'model.transformer.dept'", "did you mean 'depth'?"),
        ("modle.num_text_tokens=1", "'modle'", "did you mean 'model'?"),
        ("steps=1", "'steps'", "known: model, data, optimizer, train, deepspeed"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_name(override, key, hint):
    message = error_of(override)
    assert f"unknown key {key}" in message and hint in message


@pytest.mark.parametrize(
    ("override", "key", "got"),
    [
        ("optimizer.lr=0", "optimizer.lr", "got 0"),
        ("optimizer.beta2=1", "optimizer.beta2", "got 1"),
        ("data.guidance_drop=1.5", "data.guidance_drop", "got 1.5"),
        ("data.noise_cap=1001", "data.noise_cap", "got 1001"),
        ("data.noise_cap=.nan", "data.noise_cap", "got nan"),
        ("model.dim_latent=[4, 0]", "model.dim_latent.1", "got 0"),
        ("model.diffusion_weight=-1", "model.diffusion_weight", "got -1"),
        ("train.micro_batch=0", "train.micro_batch", "got 0"),
        ("train.steps=many", "train.steps", "got 'many'"),
        ("train.steps=1.5", "train.steps", "got 1.5"),
        ("train.steps=", "train.steps", "got None"),
        ("train.output=3", "train.output", "got 3"),
        ("train.precision=fp16", "train.precision", "got 'fp16'"),
        ("model.preset=8b", "model.preset", "got '8b'"),
        ("model.positions=rotary", "model.positions", "got 'rotary'"),
        ("model.transformer=big", "model.transformer", "got 'big'"),
        ("optimizer=3", "optimizer", "got 3"),
        ("deepspeed=3", "deepspeed", "got 3"),
        ("model.transformer.heads=7", "model.transformer", "dim=512, heads=7"),
        ("model.transformer.kv_heads=3", "model.transformer", "kv_heads must divide heads=8, got 3"),
        ("model.transformer={dim: 21, heads: 7}", "model.transformer", "even head dimensions, got dim=21, heads=7"),
    ],
)
def test_a_value_out_of_range_or_of_a_wrong_type_is_named_with_what_was_got(override, key, got):
    message = error_of(override)
    assert f": {key}: " in message and got in message


@pytest.mark.parametrize(
    "override", ["optimizer.lr=.inf", "model.diffusion_weight=.inf", "model.transformer.rope_theta=.inf"]
)
def test_an_infinite_number_is_out_of_range(override):
    assert "got inf" in error_of(override)


@pytest.mark.parametrize("override", ["train.steps=true", "model.dim_latent=true", "optimizer.lr=true"])
def test_a_truth_value_is_no_number(override):
    assert "got True" in error_of(override)


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
    ("text", "message"),
    [
        ("model: [", "must be YAML, but "),
        ("a:\n\tb: 1", "must be YAML, but "),
        ("run: !!python/object/apply:os.getcwd []", "must be YAML, but "),
        ("- model\n- data\n", "must be a mapping of sections, got list"),
        ("train", "must be a mapping of sections, got str"),
        ("[]", "must be a mapping of sections, got list"),
        ("false", "must be a mapping of sections, got bool"),
        ("train: {1: 2}", "train.1: Keys should be strings"),
        ("train:\n  - 1\n  - 2\n", "train: Input should be a valid dictionary"),
        ("model:\n  preset: [0.16b]\n", "model.preset"),
        ("model:\n  preset: {0.16b: 1}\n", "model.preset"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(write, text, message):
    path = write(text)
    got = error_of(path=path)
    assert got.startswith(f"config {path}: ") and message in got


def test_a_file_that_cannot_be_read_is_one_line_with_its_name(tmp_path):
    assert f"config {tmp_path / 'none.yaml'}: cannot be read" in error_of(path=tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    assert "binary.yaml: cannot be read" in error_of(path=tmp_path / "binary.yaml")


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
    assert set(PRESETS) == {"0.16b", "0.37b", "0.76b", "1.4b", "7b"}


def test_a_preset_and_a_transformer_together_are_refused():
    assert "preset and transformer must not be given together" in error_of(
        "model.preset=0.16b", "model.transformer.depth=2"
    )


@pytest.mark.parametrize("overrides", [[], ["model.preset=0.37b"], ["model.transformer.dim=128"]])
def test_a_resolved_config_is_read_back_as_itself(overrides):
    config = load_config(None, overrides)
    assert parse(Config, config.model_dump(mode="json"), "saved") == config


def test_sizes_that_are_not_given_follow_from_the_width():
    transformer = TransformerConfig(dim=192)
    assert (transformer.num_heads, transformer.num_kv_heads, transformer.head_dim) == (3, 3, 64)
    assert transformer.hidden_dim == 512
    assert TransformerConfig(dim=32).num_heads == 1
    given = TransformerConfig(dim=192, heads=6, kv_heads=2, ffn_dim=100)
    assert (given.num_heads, given.num_kv_heads, given.head_dim, given.hidden_dim) == (6, 2, 32, 100)


def test_one_latent_width_stands_for_one_modality():
    assert ModelConfig(dim_latent=192).dim_latent == (192,)
    assert ModelConfig(dim_latent=(384, 192)).dim_latent == (384, 192)


def test_data_is_one_folder_or_folders_with_weights():
    assert load_config(None, ["data.path=data/a"]).data.weights == {"data/a": 1.0}
    config = load_config(None, ["data.path={data/a: 1, s3://b/c: 3e-1}"])
    assert config.data.weights == {"data/a": 1.0, "s3://b/c": 0.3}
    assert parse(Config, config.model_dump(mode="json"), "saved") == config


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{a: 0}", "data.path.weight.a: Input should be greater than 0, got 0"),
        ("{a: -1}", "greater than 0, got -1"),
        ("{a: .inf}", "got inf"),
        ("{a: true}", "must be a number, got True"),
        ("{a: many}", "got 'many'"),
        ("{1: 2}", "got 1"),
        ("{}", "at least 1 item"),
        ("3", "data.path.folder: Input should be a valid string, got 3"),
        ("[a, b]", "valid string"),
    ],
)
def test_folders_without_a_positive_weight_each_are_refused(path, message):
    assert message in error_of(f"data.path={path}")


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        ModelConfig().num_text_tokens = 3
