"""Beginning from other weights: which elements are copied, what keeps its initial value, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import metrics, refusal, small_config, start, text, train, write_packs
from small_models import small_model

from transfusion_fast import Transfusion
from transfusion_fast.config import Config
from transfusion_fast.data.loader import BatchSplit, complete_config, open_data, training_batches
from transfusion_fast.diffusion_config import DiffusionConfig
from transfusion_fast.errors import InputError
from transfusion_fast.modalities import ModalityConfig
from transfusion_fast.model.inputs import pack_documents
from transfusion_fast.model.sequence import Vocabulary
from transfusion_fast.model.weights import write_weights
from transfusion_fast.training import initialize
from transfusion_fast.training.checkpoint_files import find_checkpoint
from transfusion_fast.training.export import export_model
from transfusion_fast.training.initial_weights import InitialWeights
from transfusion_fast.training.initialize import open_initial_weights, plan_from_model
from transfusion_fast.training.run_folder import describe_data, load_model, write_data_description

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

STACK = {"dim": 16, "depth": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "norm_eps": 1e-6}
ONE_STEP = ("train.steps=1", "optimizer={lr: 1.0e-30, min_lr: 0, warmup_steps: 1}")  # the step changes no weight


class ModelWeights:
    """The parameters of a model as `Weights`."""

    def __init__(self, model: Transfusion):
        self.tensors = {name: x.detach() for name, x in model.named_parameters()}
        self.shapes = {name: tuple(x.shape) for name, x in self.tensors.items()}

    def read(self, name: str, offset: int = 0, length: int | None = None) -> torch.Tensor:
        flat = self.tensors[name].flatten()
        return flat[offset : len(flat) if length is None else offset + length]


def initialise(model: Transfusion, initial: InitialWeights, length: int) -> None:
    """Copy into slices of `length` elements, as ranks would."""
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for offset in range(0, len(flat), length):
            initial.copy(name, offset, flat[offset : offset + length])


def planned(source: Transfusion, model: Transfusion) -> InitialWeights:
    weights, shapes = ModelWeights(source), ModelWeights(model).shapes
    return InitialWeights(
        weights, plan_from_model(source.config, weights.shapes, model.config, shapes, "RUN"), shapes, ()
    )


@pytest.mark.parametrize("length", [7, 10**6])
@pytest.mark.parametrize("tied", [False, True])
def test_a_new_modality_and_more_vocabulary_keep_their_initial_values_and_are_named(length: int, tied: bool) -> None:
    source = small_model(num_text_tokens=5, dim_latent=(4,), size_tokens=2, transformer=STACK, tie_embeddings=tied)
    blocks = STACK | {"rope_theta": 5e5, "qk_norm": True}
    model = small_model(num_text_tokens=8, dim_latent=(4, 6), size_tokens=3, transformer=blocks)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    initial = planned(source, model)
    initialise(model, initial, length)
    old, new = source.state_dict(), model.state_dict()
    kept = {"codecs.1", *(f"blocks.{i}.attention.{one}_norm" for i in (0, 1) for one in "qk")}
    rows = {f"rows {rows} of {table}.weight" for table in ("embedding", "head") for rows in ("5-7", "12-13", "16-16")}
    assert set(initial.initialised) == kept | rows
    for name, tensor in new.items():
        if name in ("embedding.weight", "head.weight"):
            was, now = Vocabulary(5, (2,), 2), Vocabulary(8, (2, 2), 3)
            moved = {**{i: i for i in range(5)}, now.bos: was.bos, now.eos: was.eos, now.boi(): was.boi()}
            moved |= {now.eoi(): was.eoi(), now.first_size: was.first_size, now.first_size + 1: was.first_size + 1}
            for row in range(now.size):
                assert torch.equal(tensor[row], old[name][moved[row]] if row in moved else before[name][row]), row
        else:
            assert torch.equal(tensor, before[name] if name.startswith(tuple(kept)) else old[name]), name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dim_latent": (6,)}, "codecs.0.timestep.mlp.2.weight (4, 256) -> (6, 256)"),
        ({"transformer": STACK | {"ffn_dim": 32}}, "blocks.0.mlp.gate_up.weight (48, 16) -> (64, 16)"),
        ({"transformer": STACK | {"depth": 1}}, "blocks.1.mlp.down.weight (16, 24) -> none"),
        ({"tie_embeddings": True}, "head.weight (9, 16) -> none"),
        ({"transformer": STACK | {"heads": 8, "kv_heads": 4}}, "model.transformer.heads must be 4, that of RUN, got 8"),
        ({"num_text_tokens": 4}, "the vocabulary must hold the 5 text ids of RUN, got 4"),
    ],
)
def test_other_changes_of_a_shape_are_refused_by_name(change: dict[str, Any], told: str) -> None:
    settings = {"num_text_tokens": 5, "dim_latent": (4,), "transformer": STACK}
    with pytest.raises(InputError) as refused:
        planned(small_model(**settings), small_model(**settings | change))
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_fewer_size_tokens_keep_those_in_common() -> None:
    source, model = (small_model(num_text_tokens=5, dim_latent=4, size_tokens=n, transformer=STACK) for n in (3, 2))
    source.embedding.weight.data += 1
    initial = planned(source, model)
    initialise(model, initial, 10**6)
    assert torch.equal(model.embedding.weight, source.embedding.weight[:-1]) and not initial.initialised


def test_separate_weights_begin_from_shared_ones_and_new_modalities_from_text() -> None:
    settings = {"num_text_tokens": 5, "dim_latent": (4,)}
    shared = small_model(transformer=STACK, **settings)
    separate = small_model(transformer=STACK | {"modality_weights": "separate"}, **settings)
    blocks = STACK | {"modality_weights": "separate", "conditioning": "adaln"}
    wider = small_model(num_text_tokens=5, dim_latent=(4, 6), transformer=blocks)
    for source, model in ((shared, separate), (separate, wider)):
        initial = planned(source, model)
        initialise(model, initial, 7)
        old = source.state_dict()
        for name, tensor in model.state_dict().items():
            origin = name if name in old else re.sub(r"modalities\.[01]\.", "", name)
            if name.startswith(("blocks.", "norm.")) and "modulation" not in name:
                assert torch.equal(tensor, old[origin]), name
    told = set(initial.initialised)
    assert {"codecs.1", "conditions.0", "conditions.1", "blocks.1.modalities.1.modulation.linear.bias"} <= told
    assert "codecs.0" not in told
    with pytest.raises(InputError, match="modality_weights must be separate, as in RUN, got shared"):
        planned(separate, shared)
    with pytest.raises(InputError, match="conditioning must be adaln, as in RUN, got added"):
        planned(wider, separate)


@pytest.mark.parametrize("blocks", [{}, {"conditioning": "adaln"}, {"modality_weights": "separate"}])
@pytest.mark.parametrize("kept", [0, 1])
def test_modalities_that_the_data_lacks_are_left_out(blocks: dict[str, str], kept: int) -> None:
    settings = {"num_text_tokens": 5, "transformer": STACK | blocks}
    source, model = (small_model(dim_latent=(4, 6)[:count], **settings) for count in (2, kept))
    initial = planned(source, model)
    initialise(model, initial, 100)
    assert initial.initialised == []
    own = {name for name in ModelWeights(source).shapes if name not in ModelWeights(model).shapes}
    assert set(initialize._dropped(ModelWeights(source).shapes, model.config)) == own
    assert {name.split(".")[0] for name in own} == {"codecs"} | (
        {"conditions"} if "conditioning" in blocks else {"blocks", "norm"} if blocks else set()
    )


def test_another_tokenizer_other_settings_and_what_is_left_out_are_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(model={"transformer": STACK}, data={"path": str(digits)}, train={"init_from": str(tmp_path)})
    data = open_data(config)
    config = complete_config(config, data)
    wider = config.model.model_copy(
        update={
            "modalities": (*config.model.modalities, ModalityConfig(dim_latent=6)),
            "diffusion": DiffusionConfig(process="flow"),
            "size_tokens": 3,
        }
    )
    write_weights(tmp_path, ModelWeights(Transfusion(wider)))
    (tmp_path / "config.json").write_text(json.dumps({"model": wider.model_dump(mode="json")}))
    write_data_description(tmp_path, describe_data(data))
    initial = open_initial_weights(config, data, list)
    assert initial is not None and "warning" not in initial.report
    assert "model.diffusion.process flow -> ddpm, model.diffusion.schedule None -> cosine" in initial.report
    assert "model.size_tokens 3 -> 0" in initial.report
    assert "left out: codecs.1." in initial.report and "codecs.0" not in initial.report
    monkeypatch.setattr(initialize, "_tokenizer", lambda data: {"name": "tokenizer.json"})
    other = open_initial_weights(config, data, list)
    assert (
        other is not None
        and "warning: text has the tokenizer tokenizer.json, its weights that of bytes" in other.report
    )


def llama(folder: Path, *, tied: bool = False, **settings: Any) -> Any:
    """Write a tiny Llama model whose weights all matter, and return it."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, tie_word_embeddings=tied, bos_token_id=256, eos_token_id=[257, 3], rms_norm_eps=1e-6,
        **settings,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2).add_(float(parameter.ndim == 1))
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def text_model(digits: Path, folder: Path, **settings: Any) -> tuple[Transfusion, InitialWeights]:
    config = Config(
        model={"transformer": STACK} | settings, data={"path": str(digits)}, train={"init_text_from": str(folder)}
    )
    data = open_data(config)
    config = complete_config(config, data)
    initial = open_initial_weights(config, data, list)
    assert initial is not None
    return Transfusion(config.model), initial


@pytest.mark.parametrize(("tied", "weights"), [(False, "shared"), (True, "shared"), (True, "separate")])
def test_the_text_side_of_a_llama_model_gives_its_logits(
    digits: Path, tmp_path: Path, tied: bool, weights: str
) -> None:
    theirs = llama(tmp_path, tied=tied)
    transformer = STACK | {"modality_weights": weights}
    model, initial = text_model(digits, tmp_path, tie_embeddings=tied, transformer=transformer)
    initialise(model, initial, 50)
    tables = ["embedding.weight"] if tied else ["embedding.weight", "head.weight"]
    assert set(initial.initialised) == {"codecs.0", *(f"rows 258-259 of {name}" for name in tables)}
    words = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        expected = theirs(torch.cat([torch.tensor([[256]]), words], dim=1)).logits[0]
        batch = pack_documents([[words[0]]], model.config)
        logits = model.head(model.hidden(batch, [m.latents for m in batch.modalities])[0])[:41]
    torch.testing.assert_close(logits[:, :256], expected[:, :256], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, 257], expected[:, 257], rtol=1e-5, atol=1e-5)  # <eos>


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        ({}, {"transformer": STACK | {"kv_heads": 4}}, "must be that of FOLDER, got other values (model.transformer."
         "kv_heads 4 -> 2); correct them"),
        ({}, {"tie_embeddings": True}, "model.tie_embeddings must be false for FOLDER, which has a head, got true"),
        ({"attention_bias": True}, {}, "attention_bias in FOLDER/config.json must be False, got True"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, {},
         "rope_type must be default, got linear"),
    ],
)  # fmt: skip
def test_a_llama_model_that_is_not_that_of_the_config_is_refused_by_name(
    digits: Path, tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], told: str
) -> None:
    llama(tmp_path, **theirs)
    with pytest.raises(InputError) as refused:
        text_model(digits, tmp_path, **ours)
    assert told.replace("FOLDER", str(tmp_path)) in str(refused.value) and "\n" not in str(refused.value)


def test_tensors_that_the_model_cannot_hold_are_refused_and_vocabulary_left_out_is_named(
    digits: Path, tmp_path: Path
) -> None:
    llama(tmp_path)
    _, initial = text_model(digits, tmp_path)
    assert "left out: rows 256-299 of its vocabulary, but for <bos> and <eos>" in initial.notes
    shutil.rmtree(tmp_path)
    model = llama(tmp_path)
    biased = {**model.state_dict(), "model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}
    model.save_pretrained(tmp_path / "biased", state_dict=biased)
    with pytest.raises(InputError, match=r"must hold tensors of Llama alone, got .*q_proj\.bias"):
        text_model(digits, tmp_path / "biased")


@pytest.mark.parametrize("content", ["{}", "{", '{"hidden_size": "16"}', None])
def test_a_folder_that_is_no_llama_model_is_refused(digits: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="give a folder in the layout of Llama") as refused:
        text_model(digits, tmp_path)
    assert "\n" not in str(refused.value)


def first_loss(data: Path, model: Transfusion, *overrides: str) -> float:
    config = small_config(data, *overrides)
    packs = config.train.global_batch
    stream = training_batches(config, open_data(config), BatchSplit(0, 1, packs, packs), 0)
    with torch.no_grad():
        return model(next(stream).batch).total.item()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_begins_from_the_average_or_the_last_weights_of_another_with_other_data_and_batch(
    digits: Path, uninterrupted: Path, tmp_path: Path, stage: int
) -> None:
    run, source = tmp_path / "run", shutil.copytree(uninterrupted, tmp_path / "source")
    raw = stage == 1
    other = ("train.global_batch=2", "train.seed=8", f"data.path={digits.parent / 'heldout'}")
    command = (*other, *ONE_STEP, f"train.zero_stage={stage}", f"train.init_from={source}", f"train.init_raw={raw}")
    printed = train(2, digits, run, *command)
    assert f"weights of {find_checkpoint(source)}\ninitialised: nothing\n" in printed
    model = load_model(find_checkpoint(source), raw=raw)
    for kind in (False, True):
        begun = load_model(find_checkpoint(run), raw=kind).state_dict()
        assert all(torch.equal(x, begun[name]) for name, x in model.state_dict().items())
    assert metrics(run)[0]["loss"] == pytest.approx(first_loss(digits, model, *other), rel=1e-5)
    shutil.rmtree(source)
    assert "trained to step 1 already" in train(2, digits, run, *command)  # a resumed run does not need the source


def test_an_exported_folder_gives_its_weights_to_a_run_in_half_precision_on_text(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    export_model(uninterrupted, find_checkpoint(uninterrupted), out)
    packs = write_packs(tmp_path / "text", [(text(100, seed),) for seed in range(9)], 128)
    command = (*ONE_STEP, f"data.path={packs}", "train.precision=bf16", f"train.init_from={out}")
    train(1, digits, run, *command)
    expected, begun = Transfusion.from_pretrained(out), load_model(find_checkpoint(run))
    assert all(torch.equal(x, begun.state_dict()[name]) for name, x in expected.state_dict().items())
    assert metrics(run)[0]["loss"] == pytest.approx(first_loss(digits, expected, f"data.path={packs}"), rel=1e-2)
    told = refusal(start(1, digits, tmp_path / "x", f"train.init_from={out}", "train.init_raw=true"))
    assert f"train.init_raw needs a run, got {out}, an exported folder; drop it" in told
    told = refusal(start(2, digits, tmp_path / "x", f"train.init_from={tmp_path}"))
    assert f"{tmp_path}: holds no finished checkpoint" in told
    assert json.loads((out / "config.json").read_text())["step"] == 6
