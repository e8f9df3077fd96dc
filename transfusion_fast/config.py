"""Every setting of a run, typed and documented. `config_reading.py` reads them from files and command lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from transfusion_fast.diffusion_config import DiffusionConfig
from transfusion_fast.modalities import ModalityConfig, fold_shorthands
from transfusion_fast.settings import (
    Backend,
    BeforeValidator,
    Beta,
    Context,
    Count,
    Field,
    FolderPath,
    Folders,
    HeldOut,
    NonNegativeFloat,
    Number,
    Op,
    Positive,
    PositiveFloat,
    Probability,
    Seed,
    Settings,
    Timestep,
    ValidationInfo,
    field_validator,
    model_validator,
    no_false,
)

NOISE_CAP = 500.0
"""Default for the largest timestep of the image of an image-first pair (arXiv 2408.11039, section 4.1)."""
PROB_UNCOND = 0.1
"""Default for the probability that an image is trained without what precedes it."""


class TransformerConfig(Settings):
    """A stack of blocks as in Llama: RMSNorm, rotary embedding, SwiGLU."""

    dim: Positive = 512
    """Width E."""
    depth: Positive = 8
    """Number of blocks."""
    heads: Positive | None = None
    """Query heads H; default: dim / 64, at least 1."""
    kv_heads: Positive | None = None
    """Key/value heads G, a divisor of the query heads; default: as many as query heads."""
    ffn_dim: Positive | None = None
    """Feed-forward width F; default: 8/3 of dim, rounded up to a multiple of 256."""
    qk_norm: bool = False
    """RMS norm of each query and key head before the rotation."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    modality_weights: Literal["shared", "separate"] = "shared"
    """Weights of the blocks and of the last norm: the same for text and patches; or a set for text and one for each
    modality, with attention over all positions (mixture of transformers, arXiv 2411.04996)."""
    conditioning: Literal["added", "adaln"] = "added"
    """How patches learn their image's timestep: it is added to the latents (the paper); or it shifts, scales and gates
    patches in every block (adaLN-zero, arXiv 2212.09748). Text is not modulated."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Probability that training drops a value of the output of attention or of the feed-forward layer."""

    @model_validator(mode="after")
    def _check_heads(self) -> TransformerConfig:
        if self.dim % self.num_heads or (self.head_dim % 2):
            raise ValueError(
                f"heads must divide dim into even head dimensions, got dim={self.dim}, heads={self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"kv_heads must divide heads={self.num_heads}, got {self.num_kv_heads}")
        return self

    @property
    def num_heads(self) -> int:
        return self.heads or max(1, self.dim // 64)

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        return self.ffn_dim or math.ceil(self.dim * 8 / 3 / 256) * 256


PRESETS = {
    name: TransformerConfig(depth=depth, dim=dim, heads=heads)
    for name, depth, dim, heads in (
        ("0.16b", 16, 768, 12),
        ("0.37b", 24, 1024, 16),
        ("0.76b", 24, 1536, 24),
        ("1.4b", 24, 2048, 16),
        ("7b", 32, 4096, 32),
    )
}
"""The model sizes of the paper (arXiv 2408.11039, table 2)."""
_SIZES = ("depth", "dim", "heads", "kv_heads", "ffn_dim")
FROM_DATA = ("num_text_tokens", "modalities")
"""Settings of the model that training reads from the data if they are not given."""


class ModelConfig(Settings):
    """The model: what its weights depend on, and its losses."""

    num_text_tokens: Positive = 256
    """Number of the tokenizer's ids; special tokens are added. Training reads it from the data if it is not given."""
    modalities: tuple[ModalityConfig, ...] = (ModalityConfig(),)
    """The modalities besides text, in the order of their special tokens; [] means text alone. In training, a single
    entry without `dim_latent` stands for all modalities of the data. `model.dim_latent` (a width or a list of them),
    `model.codec`, `model.positions` and `model.channel_first` set these for all entries, and make the entries if there
    are none."""
    preset: Literal["0.16b", "0.37b", "0.76b", "1.4b", "7b"] | None = None
    """A model size of the paper, in place of the sizes in `transformer`."""
    transformer: TransformerConfig = TransformerConfig()
    """The stack."""
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Attention within an image: each patch sees the whole image (the paper), or the patches before it, as in text."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Noise, prediction and loss of images."""
    diffusion_weight: NonNegativeFloat = 5.0
    """Lambda: total loss = text loss + lambda * diffusion loss."""
    size_tokens: Count = 0
    """Number of size tokens, and so the most patches that an image may have along a dimension; 0 for no size tokens.
    Between <boi> and the patches of an image stands one for each dimension of its grid. The model learns to predict
    them, so that it chooses the size of what it draws."""
    tie_embeddings: bool = False
    """Use the token embedding as the weight of the language head."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of the logits, averaged over tokens (PaLM, arXiv 2204.02311). It is part of the
    loss that is minimised, and of no loss that is reported."""
    logit_cap: PositiveFloat | None = None
    """Bound c of the language head's logits, c tanh(logits / c), in training and sampling (Gemma 2); default: none."""
    backend: Backend | dict[Op, Backend] = "auto"
    """Backend of the fused ops: a name for all of them, or a mapping by op with auto for the rest; see model/ops.py."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that a block keeps for its backward pass: all; its input and the output of attention; its input
    alone. The others are recomputed."""

    @model_validator(mode="before")
    @classmethod
    def _fold_shorthands(cls, values: Any) -> Any:
        return fold_shorthands(values) if isinstance(values, Mapping) else values

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, Mapping) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        given = values.get("transformer", {})
        if isinstance(given, TransformerConfig):
            plain = vars(TransformerConfig())
            given = {name: value for name, value in vars(given).items() if value != plain[name]}
        if not isinstance(given, Mapping):
            return values
        sizes = {name: getattr(PRESETS[preset], name) for name in _SIZES}
        for name, size in sizes.items():  # a saved config has both, and they agree
            if given.get(name, size) != size:
                raise ValueError(f"transformer.{name} must not be given with preset, which sets it; drop one of them")
        return {**values, "transformer": {**given, **sizes}}

    @property
    def dim_latent(self) -> tuple[int, ...]:
        """Values C of a patch, for each modality."""
        return tuple(modality.dim_latent for modality in self.modalities)


class DataConfig(Settings):
    """The location of the packs, and how they are laid out."""

    path: Folders = "data/digits/train"
    """A data folder that train/prepare.py made, or its URL. Or folders with weights, `{ONE: 1, OTHER: 3}`: tokens are
    drawn in proportion to weight, and each folder repeats independently. Mixed folders must share tokenizer and pack
    length, and have the same modalities or none."""
    heldout: HeldOut | None = None
    """Packs for validation: a data folder or its URL, or a share of the packs of `path`, spread evenly, which training
    then leaves out."""
    cache: str = "~/.cache/transfusion_fast"
    """Folder for shards fetched from URLs; runs may share it."""
    cache_gb: PositiveFloat = 50.0
    """Size limit of the cache, in 10^9 bytes; the least recently opened shards are removed first."""
    workers: Count = 1
    """Loader processes per rank; 0 loads in the training process."""
    prefetch: Positive = 2
    """Micro-batches that each loader process prepares ahead."""
    shuffle_window: Positive = 16
    """Shards whose packs are shuffled together."""
    caption_first: Probability = 0.8
    """Probability that a caption-image pair keeps its caption first."""
    prob_uncond: Probability = PROB_UNCOND
    """Probability that an image is trained without what precedes it in its document, for classifier-free guidance."""
    noise_cap: Timestep = NOISE_CAP
    """Largest timestep of an image-first pair's image, if its caption sees it noised; 1000 is no limit."""
    context: Context = "noised"
    """Text and images after an image see it noised, as it is trained (the paper), or clean. With clean, it is trained
    by noised copies behind the document; each takes as many positions as the image, and nothing else sees it."""
    copies: Positive = 1
    """Noised copies of each image with context=clean, each with a timestep and noise of its own."""
    quarantine: Count = 0
    """Number of unreadable packs that a run may skip; one more stops it."""

    @model_validator(mode="after")
    def _check_copies(self) -> DataConfig:
        if self.context == "noised" and self.copies != 1:
            raise ValueError(f"copies must be 1 with context=noised, got {self.copies}; set context to clean")
        return self

    @property
    def added_copies(self) -> int:
        """Noised copies of each image that are added to the sequence."""
        return self.copies if self.context == "clean" else 0

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each folder."""
        return {self.path: 1.0} if isinstance(self.path, str) else self.path


class OptimizerConfig(Settings):
    """The optimizer, and its learning rate: linear warm-up, then a schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon (arXiv 2502.16982) for the matrices of the blocks and AdamW for everything else."""
    lr: PositiveFloat = 3e-4
    """Learning rate after the warm-up."""
    min_lr: NonNegativeFloat = 1.5e-5
    """Learning rate of the last step."""
    warmup_steps: Count = 4000
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay to min_lr over all steps; stable at lr, then linear decay over the last steps,
    which lets a run be extended; or no decay."""
    decay_steps: Positive | None = None
    """Steps of the decay of wsd; default: a tenth of train.steps."""
    beta1: Beta = 0.9
    """Decay of the gradient's mean."""
    beta2: Beta = 0.95
    """Decay of the gradient's mean square."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the mean square."""
    momentum: Beta = 0.95
    """Decay of Muon's average of gradients."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of matrices and embeddings; norms and biases are not decayed."""
    clip: PositiveFloat | None = None
    """Global gradient norm above which the gradient is scaled down; default: 1. Muon does not clip: DeepSpeed would
    scale its updates, whose size does not depend on the gradient's."""

    @model_validator(mode="after")
    def _check_clip(self) -> OptimizerConfig:
        if self.name == "muon" and self.clip is not None:
            raise ValueError(f"clip must be left out with name=muon, which does not clip, got {self.clip}")
        return self

    @property
    def max_norm(self) -> float:
        """Norm to clip the gradient at; 0 does not clip."""
        return 0.0 if self.name == "muon" else self.clip or 1.0


class TrainConfig(Settings):
    """The run."""

    output: FolderPath = "runs/digits"
    """Folder for checkpoints, metrics and the resolved config; the same command with the same folder resumes."""
    init_from: FolderPath | None = None
    """A run, a checkpoint of a run, or a folder of train/export.py, whose weights a new run begins from. Parameters
    that it lacks are initialised."""
    init_raw: bool = False
    """Begin from the weights of the last step of `init_from`, not from their average."""
    init_text_from: FolderPath | None = None
    """A folder in the layout of Hugging Face's Llama, whose weights the text side of a new run begins from."""
    freeze: Literal["none", "text"] = "none"
    """"text" trains modalities alone: codecs and the weights of patches. The embedding, the language head and the text
    weights of the blocks keep their values, in the precision of the run (LMFusion, arXiv 2412.15188). It needs
    `model.transformer.modality_weights: separate`."""
    seed: Seed = 0
    """Seed of the weights, of the order of the data, of its random layout, timesteps and noise, and of dropout."""
    steps: Positive = 250_000
    """Number of optimizer steps."""
    global_batch: Positive = 1024
    """Packs per optimizer step, over all ranks and accumulation steps."""
    micro_batch: Positive = 1
    """Packs per forward pass on one rank."""
    sequence_parallel: Positive = 1
    """Ranks that share each pack and hold a part of its positions, for packs too long for one device (Ulysses)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """"auto" is bf16 where the device computes it natively, else fp32."""
    ema_decay: Beta = 0.9999
    """Decay of the average of the weights over steps, which sampling uses; it is smaller at the start. 0 keeps none."""
    zero_stage: Literal[1, 2, 3] = 3
    """ZeRO stage: ranks divide the optimizer's state among them (1), also the gradients (2), also the weights (3)."""
    compile: Annotated[Literal["off", "blocks"], BeforeValidator(no_false)] = "off"
    """"blocks" compiles each block for training with torch.compile, for which the first step takes tens of seconds."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory, and take its steps on the CPU."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints to keep."""
    log_every: Positive = 10
    """Steps between progress lines and metrics."""
    validate_every: Count = 0
    """Steps between measurements of the loss of held-out packs, with the average of the weights; 0 makes none."""
    validate_packs: Positive = 64
    """Number of held-out packs that are measured, always the same ones with the same noise and timesteps."""
    sample_every: Count = 0
    """Steps between pictures of what the model draws, with the average of the weights; 0 makes none."""
    sample_prompts: tuple[str, ...] = ()
    """Captions that are drawn, always from the same noise."""
    sample_each: Positive = 2
    """Images of each caption."""
    sample_steps: Annotated[Positive, Field(le=1000)] = 50
    """Diffusion steps of an image, at most as many as there are timesteps."""
    sample_eta: NonNegativeFloat = 1.0
    """Amount of noise added in a diffusion step: 0 is DDIM, 1 is DDPM; more corrects errors of earlier steps."""
    sample_vae: FolderPath | None = None
    """Folder of the autoencoder that made the data, to draw from a run on latents."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, to the folder tensorboard of the run; needs the extra tensorboard."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project of Weights & Biases that gets the metrics as well; needs the extra wandb, and a login or
    WANDB_MODE=offline."""
    profile: tuple[Positive, Positive] | None = None
    """First and last of the steps of which each rank writes a trace, and on CUDA a memory snapshot, to the folder
    profile of the run."""
    max_skipped_steps: Positive = 10
    """Number of consecutive steps without a finite gradient after which training stops."""
    stop_after: PositiveFloat | None = None
    """Hours after which the run saves and stops, for clusters that end jobs; default: no limit."""
    heartbeat: PositiveFloat = 45.0
    """Seconds without an answer from a rank after which the run ends and names it."""
    cpu_threads: Positive | None = None
    """Threads per rank on a CPU; default: cores divided by ranks. Results depend on it in the last bits."""

    @model_validator(mode="after")
    def _check_initial_weights(self) -> TrainConfig:
        if self.init_from is not None and self.init_text_from is not None:
            raise ValueError("init_from and init_text_from must not be given together; drop one of them")
        if self.init_raw and self.init_from is None:
            raise ValueError("init_raw must come with init_from, got none; give a run")
        return self

    @field_validator("profile")
    @classmethod
    def _check_profile(cls, profile: tuple[int, int] | None, info: ValidationInfo) -> tuple[int, int] | None:
        if profile is not None and not profile[0] <= profile[1] <= info.data.get("steps", math.inf):
            raise ValueError("must be the first and the last of steps up to train.steps")
        return profile


class Config(Settings):
    """All settings of train/pretrain.py."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: dict[str, Any] = {}  # noqa: RUF012
    """Raw DeepSpeed settings beyond those derived from this config. A key that DeepSpeed does not read is an error, and
    so is contradicting a derived setting."""

    @property
    def lengths_vary(self) -> bool:
        """Whether batches differ in length, because different numbers of copies or size tokens are added to packs."""
        return self.data.added_copies > 0 or self.model.size_tokens > 0

    @model_validator(mode="after")
    def _check_groups_together(self) -> Config:
        if self.model.image_attention == "causal" and self.data.context == "clean":
            raise ValueError("model.image_attention=causal must come with data.context=noised, got clean; set one")
        if self.train.validate_every and self.data.heldout is None:
            raise ValueError("train.validate_every needs data.heldout, got none; give a folder or a share")
        if self.train.sample_every and not self.train.sample_prompts:
            raise ValueError("train.sample_every needs train.sample_prompts, got none; give captions to draw")
        return self

    @model_validator(mode="after")
    def _check_freeze(self) -> Config:
        if self.train.freeze == "text" and self.model.transformer.modality_weights != "separate":
            got = self.model.transformer.modality_weights
            raise ValueError(
                f"train.freeze=text needs model.transformer.modality_weights=separate, got {got}, where text has no "
                "weights of its own; set that, or train.freeze=none"
            )
        return self
