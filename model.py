# SPDX-License-Identifier: MIT
"""The networks of Audio-JEPA (arXiv 2507.02915): Vision Transformer, predictor, and the loss between them.

The whole method in one picture (Fig. 1 of the paper; sizes are the defaults):

    spectrogram [B, 1, 256, 128] -- 16 x 16 patches --> N = 128 tokens, 16 in time x 8 in mel
        |                                    |
        | visible patches, context_idx       | every patch
        v                                    v
    context_encoder -> [B, C, D]         target_encoder -> [B, N, D]      (its EMA, no gradient)
        |                                    |
        v                                    | keep the masked ones, target_idx
    predictor -> [B, M, D]  -- loss --   targets [B, M, D]

Letters in the shape comments: B clips, N patches of a clip, C context (visible) patches, M masked patches (C
+ M = N), D encoder width, P predictor width, H heads, L tokens of whatever sequence is at hand.

`python model.py` prints the parameters and the arithmetic of every preset.
"""
import ctypes
import math
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


CHECKPOINT_FORMAT = "audio-jepa 1"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CORES = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of this process


@dataclass(frozen=True, kw_only=True)
class JEPAConfig:
    """Sizes of encoder and predictor; the defaults are Table I. ValueError if they do not fit together."""

    time_bins: int = 256  # spectrogram frames in a clip
    mel_bins: int = 128
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    predictor_dim: int = 384  # half the encoder's: too strong a predictor would do the encoder's work for it
    predictor_depth: int = 6
    predictor_heads: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self):
        for name, size in vars(self).items():
            kind = (int, float) if name == "mlp_ratio" else int
            if not isinstance(size, kind) or isinstance(size, bool) or not 0 < size <= 65536:
                raise ValueError(f"{name} = {size!r}: not a positive size")
        if max(self.depth, self.predictor_depth) > 1024:  # a damaged or hostile file must not build for ever
            raise ValueError(f"depth {self.depth}, predictor_depth {self.predictor_depth}: over 1024 blocks")
        parts = [("time_bins", "patch_size"), ("mel_bins", "patch_size"), ("dim", "heads"),
                 ("predictor_dim", "predictor_heads")]
        for whole, part in parts:
            if getattr(self, whole) % getattr(self, part):
                sizes = getattr(self, whole), getattr(self, part)
                raise ValueError(f"{whole} = {sizes[0]} is not a multiple of {part} = {sizes[1]}")
        if self.dim % 4 or self.predictor_dim % 4:  # for the sin and the cos of two axes
            raise ValueError(f"dim = {self.dim}, predictor_dim = {self.predictor_dim}: not multiples of 4")

    @property
    def grid(self):
        """(patches in time, patches in mel)"""
        return self.time_bins // self.patch_size, self.mel_bins // self.patch_size


PRESETS = {
    "tiny": JEPAConfig(dim=192, depth=12, heads=3, predictor_dim=96, predictor_depth=4, predictor_heads=3),
    "small": JEPAConfig(dim=384, depth=12, heads=6, predictor_dim=192, predictor_depth=6, predictor_heads=6),
    "base": JEPAConfig(),  # the paper's
    "large": JEPAConfig(dim=1024, depth=24, heads=16, predictor_dim=512, predictor_depth=8,
                        predictor_heads=16),
}


def gather_tokens(tokens, idx):
    """Pick tokens of each clip by index: tokens [B, N, D], idx [B, K] -> [B, K, D]."""
    return tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_positions(dim, grid):
    """Fixed 2-D sin-cos table -> [N, dim], token = t * mel_patches + f: the first half of the width encodes
    the mel index f, the second half the time index t (the authors' order); in each, sines come before
    cosines."""
    time, mel = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    mel, time = (axis.reshape(-1, 1) * frequencies for axis in (mel, time))  # [N, dim / 4] each
    return torch.cat([mel.sin(), mel.cos(), time.sin(), time.cos()], dim=1).float()


class Attention(nn.Module):
    """Multi-head self-attention: [B, L, D] -> [B, L, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, L, D / H]
        if x.device.type == "cpu":  # written out: the fused one makes a step 1.25 to 1.5 times as long there
            x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # the same, without the [L, L] matrix in memory
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    """Two layers with a GELU between: [B, L, D] -> [B, L, D]."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block: [B, L, D] -> [B, L, D]."""

    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_weights(network):
    """Truncated normal of std 0.02, zero biases, unit norms. The two projections that write block i = 1, 2,
    ... into the residual stream are divided by sqrt(2 i), so that the stream's variance does not grow with
    depth."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for i, block in enumerate(network.blocks, start=1):
            block.attn.proj.weight /= math.sqrt(2 * i)
            block.mlp.fc2.weight /= math.sqrt(2 * i)


class VisionTransformer(nn.Module):
    """The encoder, context and target alike (sec. IV.B).

    (spectrogram [B, 1, T, F], context_idx [B, C] or None) -> [B, C, D], or [B, N, D] of the whole clip
    without indices.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_size**2, config.dim)
        self.register_buffer("pos_embed", sincos_positions(config.dim, config.grid))  # [N, D]
        blocks = (Block(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.dim)
        init_weights(self)

    def patchify(self, spectrogram):
        """[B, 1, T, F] -> [B, N, patch_size^2], time-major: token = t * mel_patches + f."""
        B, _, time, mel = spectrogram.shape
        size, wanted = self.config.patch_size, (self.config.time_bins, self.config.mel_bins)
        if (time, mel) != wanted:
            raise ValueError(f"a spectrogram of {time} x {mel}, this encoder takes {wanted[0]} x {wanted[1]}")
        patches = spectrogram.view(B, time // size, size, mel // size, size)  # [B, t, 16, f, 16]
        return patches.transpose(2, 3).reshape(B, -1, size * size)

    def forward(self, spectrogram, context_idx=None):
        patches, positions = self.patchify(spectrogram), self.pos_embed  # [B, N, 256], [N, D]
        if context_idx is not None:  # drop the masked patches before any work is spent on them
            patches, positions = gather_tokens(patches, context_idx), positions[context_idx]  # [B, C, ...]
        x = self.patch_embed(patches) + positions  # [B, L, D], L = N or C
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def frozen_encoder(config, weights):
    """A VisionTransformer from a file that may lie about sizes. ValueError, RuntimeError: they do not fit."""
    with torch.device("meta"):  # no memory, whatever size is claimed
        network = VisionTransformer(config)
    network.load_state_dict(weights, assign=True)
    for name, tensor in network.state_dict().items():
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or not tensor.isfinite().all():
            raise ValueError(f"{name}: no plain tensor of finite fp32 numbers")
    return network.requires_grad_(False).eval()


class Predictor(nn.Module):
    """A narrower ViT that fills in the masked patches, g_pred of eq. (1).

    (context [B, C, D], context_idx [B, C], target_idx [B, M]) -> [B, M, D]. What it is asked for, it knows
    only from the positions: every masked patch enters as the same learned mask token plus the sin-cos code of
    where it is.
    """

    def __init__(self, config):
        super().__init__()
        width = config.predictor_dim
        self.embed = nn.Linear(config.dim, width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.register_buffer("pos_embed", sincos_positions(width, config.grid))  # [N, P]
        heads, depth = config.predictor_heads, config.predictor_depth
        self.blocks = nn.ModuleList(Block(width, heads, config.mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.dim)
        init_weights(self)

    def forward(self, context, context_idx, target_idx):
        visible = self.embed(context) + self.pos_embed[context_idx]  # [B, C, P]
        masked = self.mask_token + self.pos_embed[target_idx]  # [B, M, P]
        x = torch.cat([visible, masked], dim=1)  # [B, C + M, P]
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x[:, context.shape[1] :]))  # [B, M, D]


def l2_loss(predictions, targets):
    """Eq. (2): squared distance of each masked token to its target, averaged over the tokens."""
    return (predictions - targets).square().sum(-1).mean()


def cosine_loss(predictions, targets):
    """What the authors' released code minimises: 2 - 2 cos, averaged over the tokens."""
    return (2 - 2 * F.cosine_similarity(predictions, targets, dim=-1)).mean()


LOSSES = {"l2": l2_loss, "smooth_l1": F.smooth_l1_loss, "cosine": cosine_loss}


class JEPA(nn.Module):
    """Everything that gradient descent trains: context encoder and predictor, up to the loss.

    (spectrogram [B, 1, T, F], context_idx [B, C], target_idx [B, M], targets [B, N, D]) -> scalar loss.
    `targets` is the target encoder's view of the whole clip; [B, M, D], only its masked tokens, is taken as
    well.
    """

    def __init__(self, config, loss="l2"):
        super().__init__()
        self.context_encoder = VisionTransformer(config)
        self.predictor = Predictor(config)
        self.loss = LOSSES[loss]

    def forward(self, spectrogram, context_idx, target_idx, targets):
        context = self.context_encoder(spectrogram, context_idx)  # [B, C, D], c = f_ctx(x \ M)
        predictions = self.predictor(context, context_idx, target_idx)  # [B, M, D], g_pred(c)
        if targets.shape[1] != target_idx.shape[1]:  # whole clips: keep what is masked
            targets = gather_tokens(targets, target_idx)  # [B, M, D], f_tgt(x)_j for j in M
        # In fp32, and each target token normalised without learnable scale: the encoder's last LayerNorm has
        # one, and could make an un-normalised distance small by shrinking it, having learned nothing.
        with torch.autocast(predictions.device.type, enabled=False):
            targets = F.layer_norm(targets.detach().float(), targets.shape[-1:])
            return self.loss(predictions.float(), targets)


def save_checkpoint(checkpoint, path):
    """Write a checkpoint under a Path, all of it or nothing, whenever the power goes or the disk fills:
    OSError then, and what was there before is still there."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = repr(error.__context__ or error)  # torch's writer hides what the disk said
        raise OSError(f"cannot write {path}: {reason}; the one before is kept") from error


def load_checkpoint(path):
    """Read a checkpoint of train.py as plain data -> dict. Nothing in the file is executed.

    ValueError if it is not one: damaged, of another format, or holding anything but tensors and plain types.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # whatever an untrusted file makes the reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: refused, not a whole file of tensors and plain types ({reason})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: refused, not of the format {CHECKPOINT_FORMAT!r}")
    return checkpoint


@torch.no_grad()
def monitors(pooled):
    """Is the representation collapsing? pooled targets, one row a clip [B, D] -> three numbers; the loss
    tells nothing.

    target_std: over the clips, mean over the features. effective_rank: exp of the entropy of the centred
    singular values (RankMe), at most min(B - 1, D). mean_cosine: between two different clips. All clips
    alike: 0, 0, 1.
    """
    pooled = pooled.cpu().double()
    if not pooled.isfinite().all():
        return dict(target_std=math.nan, effective_rank=math.nan, mean_cosine=math.nan)
    values = torch.linalg.svdvals(pooled - pooled.mean(0))
    values = values[values > 1e-6 * pooled.norm()]  # what is left is rounding
    share = values / values.sum()
    total, clips = F.normalize(pooled).sum(0), len(pooled)
    return dict(target_std=pooled.std(0, correction=0).mean().item(),
                effective_rank=(-share * share.log()).sum().exp().item() if len(values) else 0.0,
                mean_cosine=(total.square().sum().item() - clips) / max(clips * (clips - 1), 1))


def memory_gib(device):
    """Peak so far: of the GPU's memory, or of the process's where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def choose_amp(amp, device):
    """--amp as a dtype; `auto` is bf16 where the hardware multiplies it natively, else fp16 on CUDA, else
    fp32."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto" and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        amp = "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "off"
    return dict(bf16=torch.bfloat16, fp16=torch.float16).get(amp, torch.float32)


def keep_freed_memory():
    """On a CPU with glibc: else each large tensor is fetched from the kernel anew, zeroed page by page, which
    took a fifth of a step of `tiny`."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass  # not glibc


def choose_device():
    """CUDA (the GPU that torchrun gave this process), MPS or CPU, whatever is there. ValueError if none is
    left."""
    if torch.cuda.is_available():
        if (local_rank := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU: start fewer processes")
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_tf32 = True
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def gflops_per_clip(config, masked_share=0.5):
    """Multiply-adds x 2 of one clip's training step, in GFLOP -> (target, context, predictor): matrix
    products and attention of the forward pass, times 3 with the backward pass for the two that are
    trained."""
    N = config.grid[0] * config.grid[1]
    C, M = N * (1 - masked_share), N * masked_share

    def blocks(depth, width, tokens):
        return depth * (2 * tokens * width**2 * (4 + 2 * config.mlp_ratio) + 4 * tokens**2 * width)

    def encoder(tokens):
        return 2 * tokens * config.patch_size**2 * config.dim + blocks(config.depth, config.dim, tokens)

    ends = 2 * (C + M) * config.dim * config.predictor_dim
    predictor = ends + blocks(config.predictor_depth, config.predictor_dim, C + M)
    return encoder(N) / 1e9, 3 * encoder(C) / 1e9, 3 * predictor / 1e9


if __name__ == "__main__":
    print("preset   encoder   predictor    trained   GFLOP a clip: target + context + predictor = sum")
    for preset, config in PRESETS.items():
        with torch.device("meta"):  # shapes only, no memory
            parts = [VisionTransformer(config), Predictor(config)]
        encoder, predictor = (sum(x.numel() for x in part.state_dict().values()) / 1e6 for part in parts)
        flops = gflops_per_clip(config)
        print(f"{preset:7}{encoder:8.2f} M {predictor:9.2f} M {encoder + predictor:8.2f} M", end="")
        print(f"{flops[0]:32.1f} + {flops[1]:.1f} + {flops[2]:.1f} = {sum(flops):.1f}")
