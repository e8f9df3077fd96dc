"""The model, optimizer and DeepSpeed engine of a run. Every DeepSpeed setting derives from the config."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from transfusion_fast.config import Config, OptimizerConfig
from transfusion_fast.data.loader import BatchSplit
from transfusion_fast.errors import InputError
from transfusion_fast.kernels.compiled import cpp_compiler, cpp_compiler_name
from transfusion_fast.model.grouped_layers import GroupedBlock, of_text
from transfusion_fast.model.layers import Attention, Block
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.raw_settings import check_raw_settings
from transfusion_fast.training.slices import init_state

LR_SCALE = "lr_scale"
"""Key of the factor of a group's learning rate."""


def make_engine(config: Config, ranks: Ranks, split: BatchSplit) -> Any:
    """Return a DeepSpeed engine around a new model; at ZeRO stage 3 no rank ever holds all weights, not even here."""
    check_compiler(config, ranks.device)
    bf16 = uses_bf16(config.train.precision, ranks.device)
    deepspeed.utils.logger.setLevel("ERROR")  # the trainer reports skipped steps itself
    settings = deepspeed_settings(config, split, bf16=bf16, cuda=ranks.device.type == "cuda")
    torch.manual_seed(config.train.seed)
    # The settings carry the dtype: DeepSpeed 0.19 replaces a dtype argument by bf16 where fp16 is not supported.
    sharded = config.train.zero_stage == 3
    with deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False, enabled=sharded):
        model = Transfusion(config.model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.sequence_group = ranks.sequence_group
    if config.train.freeze == "text":
        freeze_text(model)
    if config.train.compile == "blocks":
        compile_blocks(model, lengths_vary=config.lengths_vary)
    optimizer = make_optimizer(model, config.optimizer)
    with contextlib.redirect_stdout(io.StringIO()):  # at stage 1 DeepSpeed prints what memory it uses
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    init_state(engine, ema=config.train.ema_decay > 0)
    if config.optimizer.name == "muon" and sharded:
        check_gradients_before_muon(engine.optimizer)
    return engine


def check_compiler(config: Config, device: torch.device) -> None:
    """Raise InputError if torch.compile is to run and lacks the C++ compiler that it needs on a CPU."""
    train, optimizer = config.train, config.optimizer
    needed = {"train.compile=off": train.compile == "blocks", "optimizer.name=adamw": optimizer.name == "muon"}
    others = " and ".join(setting for setting, is_needed in needed.items() if is_needed)
    if others and device.type == "cpu" and cpp_compiler() is None:
        name = cpp_compiler_name()
        raise InputError(f"torch.compile must have a C++ compiler, got no {name}; install one, or set {others}")


def freeze_text(model: Transfusion) -> None:
    """Give the parameters of text neither gradients nor, therefore, state of the optimizer.

    Raises:
        InputError: the model has no modality to train.
    """
    if not len(model.codecs):
        raise InputError("train.freeze=text must come with a modality, got data of text alone; set train.freeze=none")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not of_text(name))


def compile_blocks(model: Transfusion, *, lengths_vary: bool = False) -> None:
    """Compile the forward pass of each block for training; evaluation, whose shapes vary, runs it as it is.

    Args:
        lengths_vary: compile for any number of positions. PyTorch would compile eight lengths, and then no more.
    """
    # ZeRO-3 gathers the parameters of a leaf module before its forward pass, and so has no hooks in what is compiled.
    deepspeed.utils.set_z3_leaf_modules(model, [Block, GroupedBlock])
    if model.grouped:
        # PyTorch compiles sizes of 0 and 1 apart. So a modality has four kinds of batches: no image, one image of one
        # or of several patches, and several images.
        kinds = 2 * 4 ** len(model.codecs)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, kinds)
    for block in model.blocks:
        block.forward = _compiled_for_training(block, lengths_vary)


def _compiled_for_training(block: nn.Module, lengths_vary: bool) -> Callable[..., Any]:
    eager, compiled = block.forward, torch.compile(block.forward, dynamic=False)

    def forward(*inputs: Any) -> Any:
        if not block.training:
            return eager(*inputs)
        if isinstance(block, GroupedBlock):  # numbers of patches and images vary from batch to batch
            groups, _, _, positions, conditions = inputs
            for x in (*groups, *positions, *(x for pair in conditions for x in pair)):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        if lengths_vary:
            x, rotary, layout = inputs[:3]
            for tensor in (x, *rotary, *vars(layout).values()):
                if isinstance(tensor, Tensor) and tensor is not layout.tile_counts:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*inputs)

    return forward


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a run computes in bf16; "auto" does if the device has native bf16, else it would be slower."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def deepspeed_settings(config: Config, split: BatchSplit, *, bf16: bool, cuda: bool) -> dict[str, Any]:
    """Return the settings derived from the config, with the config's raw `deepspeed` section merged in.

    Raises:
        InputError: a raw setting contradicts a derived one, or DeepSpeed does not know it.
    """
    train = config.train
    derived: dict[str, Any] = {
        # DeepSpeed multiplies by the number of ranks, although some of them share their packs.
        "train_batch_size": split.global_batch * split.sequence_parallel,
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation_steps,
        "gradient_clipping": config.optimizer.max_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},  # skip steps whose gradient is not finite
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": cuda,
            "contiguous_gradients": True,
            "compute_grad_norm": True,  # and in fp32, where it is the check
            "memory_efficient_linear": False,  # a linear layer in Python, which saves no memory here
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if config.optimizer.name == "muon" and train.zero_stage == 3:
        derived["zero_optimization"]["reduce_scatter"] = False  # DeepSpeed's Muon refuses it
    if train.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        # DeepSpeed's own optimizer for the CPU would have to be compiled.
        derived["zero_force_ds_cpu_optimizer"] = False
    settings = _merge(derived, config.deepspeed, "deepspeed")
    zero = settings["zero_optimization"]
    if not train.offload_optimizer and (zero.get("offload_optimizer") or zero.get("cpu_offload")):
        raise InputError(
            "config: deepspeed.zero_optimization.offload_optimizer must come with train.offload_optimizer=true, got "
            "false; set that instead"
        )
    if "sequence_parallel_size" in settings:
        got = settings["sequence_parallel_size"]
        raise InputError(
            f"config: deepspeed.sequence_parallel_size must not be given, got {got}; set train.sequence_parallel"
        )
    if config.deepspeed:
        check_raw_settings(settings)
    return settings


def _merge(derived: dict[str, Any], raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in raw.items():
        name = f"{path}.{key}"
        if isinstance(value, Mapping) and isinstance(derived.get(key, {}), dict):
            merged[key] = _merge(derived.get(key, {}), value, name)
        elif key in derived and derived[key] != value:
            raise InputError(f"config: {name} must be {derived[key]!r}, the derived value, got {value!r}; drop it")
        else:
            merged[key] = value
    return merged


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer: AdamW that decays matrices, but not vectors (norms and biases); or Muon beside it."""
    # ZeRO-3 leaves an empty parameter on each rank, and the full shape in ds_shape.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {parameter: tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained.values()}
    blocks = [p for name, p in trained.items() if name.startswith("blocks.") and config.name == "muon"]
    hidden = [parameter for parameter in blocks if len(shapes[parameter]) > 1]
    others = [parameter for parameter in shapes if parameter not in {*hidden}]
    adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    groups = [
        {"params": [p for p in others if len(shapes[p]) > 1], "weight_decay": config.weight_decay, **adamw},
        {"params": [p for p in others if len(shapes[p]) <= 1], "weight_decay": 0.0, **adamw},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    # This import takes seconds, since it imports torch's compiler.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    muon = _muon_groups(hidden, shapes, config)
    groups = [*muon, *({**group, "use_muon": False} for group in groups)]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def _muon_groups(
    matrices: list[nn.Parameter], shapes: Mapping[nn.Parameter, tuple[int, ...]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Return groups whose steps are lr * (0.2 sqrt(max(A, B)) * O + weight_decay * W) for a matrix W [A, B].

    O is the momentum, orthogonalised, and the factor gives it the root mean square of AdamW's updates, so that both
    share a learning rate (arXiv 2502.16982, equation 4). DeepSpeed scales O by sqrt(max(1, A / B)) alone. The rest of
    the factor is 0.2 sqrt(B), and belongs to the group's learning rate, by which the weight decay is multiplied too.
    """
    groups = []
    for width in sorted({shapes[matrix][1] for matrix in matrices}):
        scale = 0.2 * width**0.5
        group = {"params": [m for m in matrices if shapes[m][1] == width], "use_muon": True, LR_SCALE: scale}
        for matrix in group["params"]:
            matrix.use_muon = True
        momentum, decay = config.momentum, config.weight_decay / scale
        groups.append({**group, "lr": config.lr * scale, "momentum": momentum, "weight_decay": decay})
    return groups


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of all groups of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_SCALE, 1.0)


def drop_gradients(engine: Any) -> None:
    """Drop the gradients of a skipped step, which DeepSpeed 0.19 adds to those of later steps under offload."""
    sums = engine.optimizer.averaged_gradients if engine.zero_cpu_offload() else {}
    sums.update(dict.fromkeys(sums))


def check_gradients_before_muon(zero: Any) -> None:
    """Make a step with a gradient that is not finite leave Muon's momentum alone at ZeRO stage 3.

    DeepSpeed 0.19 finds such a gradient in fp32 and bf16 by the norm of the updates, which it computes after Muon has
    moved the momentum of every matrix with a finite gradient. It still takes that norm, and skips the step by it.
    """
    apply = zero._apply_muon_to_accumulated_grads

    def apply_to_finite() -> None:
        zero.check_overflow()
        if not zero.overflow:
            apply()

    zero._apply_muon_to_accumulated_grads = apply_to_finite
