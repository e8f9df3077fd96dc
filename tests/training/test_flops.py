"""Operations of training against torch's own counter, and the peaks of devices."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from transfusion_fast import Transfusion
from transfusion_fast.config import Config
from transfusion_fast.model.inputs import Randomness, pack_documents
from transfusion_fast.training.counters import Work
from transfusion_fast.training.engine import freeze_text
from transfusion_fast.training.flops import find_gpu, gpu_peak, peak_flops, training_flops


@pytest.mark.parametrize(("frozen", "copies"), [(False, 0), (True, 0), (False, 2), (True, 2)])
def test_operations_are_those_that_torch_counts_but_for_masked_pairs_and_the_timestep_mlp(
    frozen: bool, copies: int
) -> None:
    weights = "separate" if frozen else "shared"
    transformer = {"dim": 64, "depth": 3, "heads": 4, "kv_heads": 2, "ffn_dim": 96, "modality_weights": weights}
    modalities = [{"dim_latent": 12}, {"dim_latent": 20}, {"dim_latent": 48, "codec": "unet", "patch_size": 4}]
    model = Transfusion(num_text_tokens=250, modalities=modalities, backend="reference", transformer=transformer)
    if frozen:
        freeze_text(model)
    text = torch.zeros(9, dtype=torch.long)
    document = [text, torch.zeros(6, 12), text, (1, torch.zeros(8, 20)), (2, torch.zeros(2, 2, 48))]
    batch = pack_documents([document, [text]], model.config, Randomness(prob_uncond=0, noised_copies=copies))
    with FlopCounterMode(display=False) as counter:
        model(batch).total.backward()
    counted = {str(op).partition(".")[2]: count for op, count in counter.get_flop_counts()["Global"].items()}
    trained, images = max(copies, 1), copies + 1  # of each modality
    timestep_mlps = images * sum(2 * (2 * 256 * 256 + 3 * 256 * width) for width in (12, 20, 256))
    for blocks, count in ((model.codecs[2].down, images), (model.codecs[2].up, trained)):
        timestep_mlps += sum(2 * 3 * count * block.timestep.weight.numel() for block in blocks)
    patches, decoded = ([n * count for n in (6, 8, 4)] for count in (images, trained))
    total = len(batch.tokens)

    def expected(area: int) -> float:
        counts = (model.config, total, len(batch.supervised), patches)
        return training_flops(*counts, area, decoded=decoded, frozen_text=frozen)

    noisy_input = 2 * model.codecs[2].enter.weight.numel() * 4 * 4**2 * images
    convolutions = counted["convolution"] + counted["convolution_backward"]
    # The gradient of the U-Net's noisy input is not computed.
    assert expected(0) == counted["mm"] + counted["addmm"] + convolutions + noisy_input - timestep_mlps
    assert expected(total**2) - expected(0) == counted["bmm"]  # the reference computes all pairs of positions
    if copies:
        setting = {"model": model.config, "train": {"freeze": "text" if frozen else "none"}}
        assert Work.of(batch, Config.model_validate(setting)).flops == expected(batch.layout.area)
        return
    documents = (1 + 9 + 1 + 6 + 1 + 9 + 1 + 8 + 1 + 1 + 4 + 1 + 1, 11)
    assert batch.layout.area == sum(n * (n + 1) // 2 for n in documents) + (6 * 5 + 8 * 7 + 4 * 3) // 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_gpus_are_known_by_the_names_that_cuda_gives_them(name: str, peak: float | None) -> None:
    gpu = find_gpu(name)
    assert (gpu and gpu_peak(gpu, torch.bfloat16)) == peak


def test_the_fp32_peak_is_that_of_tf32_where_torch_is_allowed_to_use_it() -> None:
    gpu = find_gpu("H100")
    assert gpu_peak(gpu, torch.float32) == gpu.fp32
    torch.set_float32_matmul_precision("high")
    try:
        assert gpu_peak(gpu, torch.float32) == gpu.tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_peak_of_a_cpu_is_measured_once_for_each_dtype() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu, torch.float32) == peak_flops(cpu, torch.float32) > 1e8
