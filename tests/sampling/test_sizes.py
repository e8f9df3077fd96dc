"""Size tokens: the model chooses the size of what it draws, as it has learned to."""

from collections.abc import Sequence

import pytest
import torch
from chain_models import BOI, BOI1, BOS, EOI, EOI1, EOS, ONE_STEP, chain, produced_by
from small_models import ids, seeded, small_model

from transfusion_fast import Transfusion
from transfusion_fast.errors import InputError
from transfusion_fast.sampling.adapters import TransfusionAdapter
from transfusion_fast.sampling.cache import KeyValueCache
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.engine import Context, Engine
from transfusion_fast.sampling.settings import ImageSettings, TextSettings

ONE, TWO, SIX = 16, 17, 21  # size tokens of a model of ten ids and two modalities
LINKS = {BOS: BOI, BOI: SIX, SIX: TWO, TWO: TWO, EOI: BOI1, BOI1: TWO, EOI1: EOS}


def test_a_predicted_forced_and_default_shape_of_6_x_2_comes_back_6_x_2() -> None:
    model = chain(LINKS, size_tokens=6)
    assert produced_by(model, [[]], grids=None, max_images=2) == [[(0, (6, 2, 4)), (1, (2, 2, 6))]]
    assert produced_by(model, [[]], grids=[(1, 5), (6, 2)], max_images=2) == [[(0, (1, 5, 4)), (1, (6, 2, 6))]]
    assert produced_by(model, [[]], grids=None, begin=1) == [[(1, (2, 2, 6))]]
    assert generate_images(model, [[]], (6, 2), image=ONE_STEP).shape == (1, 6, 2, 4)


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_modalities_of_other_dimensions_have_as_many_size_tokens(dims: int) -> None:
    modality = {"dims": dims, "dim_latent": 4}
    transformer = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 48}
    model = small_model(num_text_tokens=10, modalities=[modality], size_tokens=3, transformer=transformer)
    text, settings = TextSettings(temperature=5.0), ImageSettings(1, clip=1.0)
    drawn = [sample(model, [[]], begin=0, text=text, image=settings, seed=seed)[0][0] for seed in range(8)]
    assert all(image.ndim == dims + 1 and max(image.shape[:-1], default=3) <= 3 for image in drawn)
    assert len({image.shape for image in drawn}) > 1 or dims == 0
    assert model([[ids(1), drawn[0]]], generator=seeded()).isfinite()


def test_the_size_is_learned_from_the_caption_and_each_prompt_of_a_batch_gets_its_own() -> None:
    torch.manual_seed(0)
    transformer = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 48}
    model = Transfusion(num_text_tokens=4, dim_latent=2, size_tokens=3, transformer=transformer)
    documents = [[ids(1), torch.zeros(3, 1, 2)], [ids(2), torch.zeros(1, 2, 2)]]
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=1e-2), seeded()
    for _ in range(60):
        optimizer.zero_grad()
        model(documents, generator=generator).backward()
        optimizer.step()
    prompts = [[ids(2)], [ids(1)], [ids(2)]]
    text, image = TextSettings(max_tokens=4, temperature=0.1), ImageSettings(4, clip=1.0)
    together = sample(model, prompts, text=text, image=image)
    assert [pieces[0].shape for pieces in together] == [(1, 2, 2), (3, 1, 2), (1, 2, 2)]
    for number, (prompt, pieces) in enumerate(zip(prompts, together, strict=True)):
        [alone] = sample(model, [prompt], text=text, image=image, prompt_numbers=[number])
        torch.testing.assert_close(pieces, alone, rtol=1e-4, atol=1e-4)


def test_what_is_larger_than_the_size_tokens_can_say_is_refused() -> None:
    model = chain(LINKS, size_tokens=6)
    rule = r"at most model.size_tokens=6 patches along each dimension, got one of 7; raise size_tokens"
    with pytest.raises(InputError, match=rule):
        generate_images(model, [[]], (1, 7))
    with pytest.raises(InputError, match=rule):
        sample(chain({BOS: EOS}, size_tokens=6), [[]], grids=[(7, 1), (1, 1)])
    with pytest.raises(InputError, match=rule):
        sample(model, [[torch.zeros(7, 1, 4)]])
    with pytest.raises(InputError, match=rule):
        model([[torch.zeros(7, 1, 4)]])


def test_rows_must_say_the_size_of_their_images() -> None:
    model, image = chain(LINKS, size_tokens=6), torch.zeros(2, 1, 4)
    row, positions = ids(BOS, BOI, TWO, ONE, 0, 0, EOI, EOS)[None], [[(4, 2)]]
    loss, _ = model(row, [[image]], positions, generator=seeded(), prob_uncond=0.0)
    torch.testing.assert_close(loss, model([[image]], generator=seeded(), prob_uncond=0.0))
    for wrong in ((BOI, ONE, TWO), (BOI, BOI, ONE), (TWO, BOI, TWO)):
        row[0, 1:4] = ids(*wrong)
        with pytest.raises(
            ValueError, match="row 0, position 4: an image must follow the size tokens of its grid, got"
        ):
            model(row, [[image]], positions)
    with pytest.raises(ValueError, match="row 0, position 0: an image must follow the size tokens"):
        model(row, [[image]], [[(0, 2)]])


def test_guidance_compares_with_the_image_alone_in_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, prefill = [], Engine.prefill

    def told(engine: Engine, contexts: Sequence[Context], room: int = 16) -> tuple[KeyValueCache, torch.Tensor]:
        begun.append([[*context.tokens] for context in contexts])
        return prefill(engine, contexts, room)

    monkeypatch.setattr(Engine, "prefill", told)
    model, prompt = chain(LINKS, size_tokens=6), [ids(3), torch.zeros(1, 2, 4)]
    opened, image = [BOI, SIX, TWO], [BOI, ONE, TWO, 0, 0, EOI]
    sample(model, [prompt], begin=0, image=ImageSettings(1, clip=1.0))
    assert begun == [[[BOS, 3, *image]], [opened]]
    begun.clear()
    sample(model, [prompt], begin=0, image=ImageSettings(1, clip=1.0, image_guidance=2.0))
    assert begun == [[[BOS, 3, *image]], [[*image, *opened]], [[BOS, 3, *opened]]]


def test_sizes_are_no_text_and_text_is_no_size() -> None:
    links = {BOS: {SIX: 1.0, 3: 0.9}, 3: {TWO: 1.0, BOI: 0.9}, BOI: {4: 1.0, TWO: 0.9}, TWO: {EOS: 1.0, TWO: 0.9}}
    model = chain(links | {EOI: EOS}, size_tokens=6)
    assert produced_by(model, [[]], grids=None) == [[[3], (0, (2, 2, 4))]]


def test_given_noise_fixes_the_size() -> None:
    model = chain(LINKS, size_tokens=6, modalities=[{"shape": (1, 3)}, {}])
    assert produced_by(model, [[]], grids=None) == [[(0, (6, 2, 4))]]
    assert produced_by(model, [[]], grids=None, noise=[torch.zeros(1, 3, 4), None]) == [[(0, (1, 3, 4))]]


def test_a_context_without_images_lacks_the_sizes_of_each_modality_too() -> None:
    context = Context([BOS, 1, BOI, TWO, ONE])
    context.append_image(0, torch.ones(2, 1, 4))
    context.tokens += [EOI, 2, BOI1, SIX]
    context.append_image(1, torch.ones(6, 6))
    context.tokens += [EOI1, BOI, ONE, TWO]
    assert context.without_images([2, 1]).tokens == [BOS, 1, 2, BOI, ONE, TWO]


def test_sample_many_of_the_earlier_system_lets_the_model_choose_and_counts_its_patches() -> None:
    model, quick = chain(LINKS, size_tokens=6), {"text_temperature": 0.0, "modality_steps": 1, "cfg_scale": 1.0}
    shapes = {
        n: [(kind, tuple(x.shape)) for kind, x in TransfusionAdapter(model).sample(max_length=n, **quick)]
        for n in (12, 13)
    }
    assert shapes == {12: [(0, (6, 2, 4))], 13: [(0, (6, 2, 4)), (1, (2, 2, 6))]}
    with pytest.raises(InputError, match="size of what is drawn must be given for modality 0"):
        TransfusionAdapter(model).sample(init_modality_noise=torch.zeros(12, 6), **quick)
    model.decoders["1"] = torch.nn.Identity()
    with pytest.raises(InputError, match=r"fixed_modality_shape must be given .* with size tokens and decoders"):
        TransfusionAdapter(model).sample(**quick)
