# SPDX-License-Identifier: MIT
"""The networks of Audio-JEPA (arXiv 2507.02915): encoder, predictor and loss.

The whole method in one picture (Fig. 1 of the paper; the numbers are the defaults):

    spectrogram [B, 1, 256, 128] -- 16 x 16 patches --> N = 128 tokens, 16 in time x 8 in mel
        |                                    |
        | visible patches, context_idx       | every patch
        v                                    v
    context_encoder -> [B, C, D]         target_encoder -> [B, N, D]   (its moving average)
        |                                    |
        | + where the masked patches are     | stop-gradient; keep the masked ones, target_idx
        v                                    v
    predictor -> [B, M, D]  -- loss --   targets [B, M, D]

Letters in the shape comments: B clips, N patches of a clip, C context (visible) patches, M masked
patches (C + M = N), D encoder width, P predictor width, H heads, L tokens of any sequence, T frames
and F mel bands of a spectrogram.

`python model.py` prints the parameters of every preset.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class JEPAConfig:
    """Sizes of encoder and predictor; the defaults are Table I. ValueError if they do not fit."""

    time_bins: int = 256  # spectrogram frames in a clip
    mel_bins: int = 128
    patch_size: tuple[int, int] = (16, 16)  # frames and mel bands
    dim: int = 768
    depth: int = 12
    heads: int = 12
    predictor_dim: int = 384  # narrower, or the predictor would do the work of the encoder
    predictor_depth: int = 6
    predictor_heads: int = 12
    mlp_ratio: float = 4.0
    positions: str = "sincos"  # added to the tokens; "rotary" rotates queries and keys

    def __post_init__(self):
        must_divide = {
            "time_bins": self.patch_size[0],
            "mel_bins": self.patch_size[1],
            # Rotary positions rotate pairs of features (x 2) along two axes (x 2) in each head.
            "dim": 4 * self.heads,
            "predictor_dim": 4 * self.predictor_heads,
        }
        for name, divisor in must_divide.items():
            size = getattr(self, name)
            if size % divisor != 0:
                raise ValueError(f"{name} = {size}: a multiple of {divisor} is needed")
        if self.positions not in ("sincos", "rotary"):
            raise ValueError(f"positions are sincos or rotary, not {self.positions}")

    @property
    def grid(self) -> tuple[int, int]:
        """(patches in time, patches in mel)"""
        return self.time_bins // self.patch_size[0], self.mel_bins // self.patch_size[1]


PRESETS = {
    "tiny": JEPAConfig(
        dim=192, depth=12, heads=3, predictor_dim=96, predictor_depth=4, predictor_heads=3
    ),
    "small": JEPAConfig(
        dim=384, depth=12, heads=6, predictor_dim=192, predictor_depth=6, predictor_heads=6
    ),
    "base": JEPAConfig(),  # the paper's
    "large": JEPAConfig(
        dim=1024, depth=24, heads=16, predictor_dim=512, predictor_depth=8, predictor_heads=16
    ),
}


class Attention(nn.Module):
    """Multi-head self-attention: [B, L, D] -> [B, L, D].

    rotation [B, L, D / H] or [L, D / H]: only with rotary positions, see `rotate`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotation=None):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, L, D / H]
        if rotation is not None:
            q = rotate(q, rotation)
            k = rotate(k, rotation)
        if x.device.type == "cpu":
            # The same arithmetic in plain steps, because they are faster on a CPU.
            scale = (D // self.heads) ** -0.5
            scores = (scale * q) @ k.mT  # [B, H, L, L]
            x = scores.softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # never stores the [L, L] scores
        x = x.transpose(1, 2).reshape(B, L, D)  # heads side by side again
        return self.proj(x)


class Block(nn.Module):
    """Pre-norm Transformer block: [B, L, D] -> [B, L, D]; rotation as in Attention."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        layers = OrderedDict(  # named, because init_weights scales the second Linear
            fc1=nn.Linear(dim, hidden),
            gelu=nn.GELU(),
            fc2=nn.Linear(hidden, dim),
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x, rotation=None):
        x = x + self.attn(self.norm1(x), rotation)
        x = x + self.mlp(self.norm2(x))
        return x


@torch.no_grad()
def init_weights(network: nn.Module) -> None:
    """Normal of std 0.02, zero biases, LayerNorm scale 1.

    Each block adds to the residual stream twice. The two projections of block i = 1, 2, ... that do
    so are divided by sqrt(2 i). The variance of the stream then grows as 1 + 1/2 + 1/3 + ..., with
    the logarithm of the depth instead of the depth.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for i, block in enumerate(network.blocks, start=1):
        block.attn.proj.weight /= math.sqrt(2 * i)
        block.mlp.fc2.weight /= math.sqrt(2 * i)


def run_blocks(network: nn.Module, tokens: Tensor, pos_embed: Tensor) -> Tensor:
    """Tokens [B, L, D] through all blocks of an encoder or a predictor -> [B, L, D].

    `pos_embed` holds the row of the network's position table for each token. A sin-cos row, as wide
    as a token, is added to it once. A rotary row, as wide as a head, rotates the queries and keys
    of every block.
    """
    x = tokens.to(pos_embed.dtype)  # fp32, so that the residual stream is not rounded by autocast
    rotation = None
    if network.config.positions == "rotary":
        rotation = pos_embed
    else:
        x = x + pos_embed
    for block in network.blocks:
        x = block(x, rotation)
    return x


class VisionTransformer(nn.Module):
    """The encoder, context and target alike (sec. IV.B).

    (spectrogram [B, 1, T, F]) -> [B, N, D], the whole clip.
    (spectrogram [B, 1, T, F], context_idx [B, C]) -> [B, C, D], only these patches are encoded.
    ValueError: a spectrogram of another size than the config's.
    """

    def __init__(self, config: JEPAConfig):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(math.prod(config.patch_size), config.dim)
        self.register_buffer("pos_embed", position_table(config, config.dim, config.heads))
        blocks = [Block(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.dim)
        init_weights(self)

    def forward(self, spectrogram, context_idx=None):
        B, _, time, mel = spectrogram.shape
        expected = (self.config.time_bins, self.config.mel_bins)
        if (time, mel) != expected:
            raise ValueError(f"a spectrogram of {time} x {mel}, but the encoder takes {expected}")

        # Cut it into patches, numbered t * mel_patches + f.
        time_patches, mel_patches = self.config.grid
        patch_time, patch_mel = self.config.patch_size  # 16 x 16
        patches = spectrogram.reshape(B, time_patches, patch_time, mel_patches, patch_mel)
        patches = patches.transpose(2, 3)  # [B, time_patches, mel_patches, 16, 16]
        patches = patches.flatten(1, 2).flatten(2)  # [B, N, 256]

        pos_embed = self.pos_embed  # [N, D]
        if context_idx is not None:
            # Masked patches are dropped before any work is spent on them. Each visible patch
            # keeps its own position, whatever is dropped around it.
            patches = patches.take_along_dim(context_idx.unsqueeze(-1), dim=1)  # [B, C, 256]
            pos_embed = pos_embed[context_idx]  # [B, C, D]
        tokens = self.patch_embed(patches)  # [B, L, D], L = N or C
        tokens = run_blocks(self, tokens, pos_embed)
        return self.norm(tokens)


class Predictor(nn.Module):
    """A narrower ViT that fills in the masked patches: g_pred of eq. (1).

    (context [B, C, D], context_idx [B, C], target_idx [B, M]) -> [B, M, D].

    The predictor knows the context encoder's output and where it comes from. About a masked patch
    it knows only the position: every masked patch enters as the same learned mask token, and is
    told from the others by a sin-cos code that is added to it, or by the rotation of its queries
    and keys. (Under rotary positions even that is relative: how far it lies from other patches.)
    """

    def __init__(self, config: JEPAConfig):
        super().__init__()
        self.config = config
        width = config.predictor_dim
        heads = config.predictor_heads
        self.embed = nn.Linear(config.dim, width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.register_buffer("pos_embed", position_table(config, width, heads))
        blocks = [Block(width, heads, config.mlp_ratio) for _ in range(config.predictor_depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.dim)
        init_weights(self)

    def forward(self, context, context_idx, target_idx):
        visible = self.embed(context)  # [B, C, P]
        masked = self.mask_token.expand(*target_idx.shape, -1)  # [B, M, P]
        tokens = torch.cat([visible, masked], dim=1)  # [B, C + M, P]
        pos_embed = self.pos_embed[torch.cat([context_idx, target_idx], dim=1)]
        tokens = run_blocks(self, tokens, pos_embed)
        num_visible = context.shape[1]
        masked = tokens[:, num_visible:]  # [B, M, P]
        return self.proj(self.norm(masked))  # [B, M, D]


# Both losses take predictions and targets [B, M, D] and average over the masked tokens. Predictions
# start small and targets have variance 1, so eq. (2), a sum over the width, starts above D by 4 to
# 20 %, and the cosine near 2. The same learning rate suits both, because AdamW divides each
# gradient by its size.


def l2_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Eq. (2): the squared distance between a prediction and its target."""
    return (predictions - targets).square().sum(-1).mean()


def cosine_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """2 - 2 cos: the loss of the authors' released code."""
    return (2 - 2 * F.cosine_similarity(predictions, targets, dim=-1)).mean()


LOSSES = {"l2": l2_loss, "cosine": cosine_loss}


def normalise_targets(targets: Tensor, within: str = "token") -> Tensor:
    """Give the targets mean 0 and variance 1: [B, N, D] -> [B, N, D], fp32.

    Otherwise nothing would tie down their scale: they would follow the scale of the encoder's last
    LayerNorm wherever it drifts, and the loss would shrink or grow with it, whatever is learned.

    Within a "token": over its features (like I-JEPA). Within a "clip": each feature over the tokens
    of the clip (like data2vec). "clip" removes from a target everything that all tokens of the clip
    share. That can be read off the visible patches, so predicting it teaches little.
    """
    axis = {"token": 2, "clip": 1}[within]
    targets = targets.float()
    variance, mean = torch.var_mean(targets, axis, correction=0, keepdim=True)
    return (targets - mean) / torch.sqrt(variance + 1e-5)


class JEPA(nn.Module):
    """Eqs. (1) and (2): all that gradient descent trains, which is context encoder and predictor.

    (spectrogram [B, 1, T, F], context_idx [B, C], target_idx [B, M], targets [B, N, D]) -> scalar.
    `targets` is what the target encoder makes of the whole clip.
    """

    def __init__(self, config: JEPAConfig, loss: str = "l2", target_norm: str = "token"):
        super().__init__()
        self.config = config
        self.context_encoder = VisionTransformer(config)
        self.predictor = Predictor(config)
        self.loss_function = LOSSES[loss]
        self.target_norm = target_norm

    def forward(self, spectrogram, context_idx, target_idx, targets):
        context = self.context_encoder(spectrogram, context_idx)  # [B, C, D]
        predictions = self.predictor(context, context_idx, target_idx)  # [B, M, D]
        # Stop-gradient: the targets are constants here. If gradient descent could move them too,
        # it would take the cheapest way: map every clip to one constant, which is predicted without
        # error and says nothing (collapse). In train.py no gradient could reach them anyway,
        # because the target encoder runs under no_grad and no optimizer holds its weights. `detach`
        # makes sure of it for any other caller.
        targets = normalise_targets(targets.detach(), self.target_norm)  # [B, N, D]
        # Keep those of the masked patches: [B, M, D].
        targets = targets.take_along_dim(target_idx.unsqueeze(-1), dim=1)
        return self.loss_function(predictions.float(), targets)


# ------------------------------------------------------------------------------------------------
# The method ends here. What follows are the positions, and a table of sizes.


def position_table(config: JEPAConfig, dim: int, heads: int) -> Tensor:
    """The table of a network that is `dim` wide: a row for each patch."""
    if config.positions == "rotary":
        return rotary_positions(dim // heads, config.grid)
    return sincos_positions(dim, config.grid)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos table -> [N, dim], to be added to tokens (sec. IV.B).

    The first half of the width holds sines, then cosines, of the mel angles; the second half holds
    those of the time angles.
    """
    angle = patch_angles(dim, grid, base=10000.0)  # [N, 2, dim / 4]
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1).float()


def rotary_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D rotary table -> [N, dim], for `rotate`: dim / 2 sines, then their cosines.

    The base is 100 because an axis has tens of patches: angles that grow by less than 1 / 100 from
    patch to patch would hardly differ.
    """
    angle = patch_angles(dim, grid, base=100.0).flatten(1)  # [N, dim / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def patch_angles(dim: int, grid: tuple[int, int], base: float) -> Tensor:
    """The mel and time index of each patch, times dim / 4 frequencies -> [N, 2, dim / 4], radians.

    Patches are numbered t * mel_patches + f. The axis of 2 is mel, then time, as in the authors'
    code, so that their weights fit. The frequencies fall from 1 to nearly 1 / base.
    """
    time_patches, mel_patches = grid
    t = torch.arange(time_patches).repeat_interleave(mel_patches)  # [N]: 0 0 0 ... 1 1 1 ...
    f = torch.arange(mel_patches).repeat(time_patches)  # [N]: 0 1 2 ... 0 1 2 ...
    index = torch.stack([f, t], dim=1)  # [N, 2]
    frequencies = base ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    return index.unsqueeze(2) * frequencies


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864) along two axes (sec. VII, point 2).

    x [B, H, L, d], queries or keys of width d = D / H; rotation [B, L, d] or [L, d], their rows of
    the table -> [B, H, L, d].

    Features i and i + d / 2 of x are a point in a plane. It is rotated by an angle that grows with
    the mel index (the first d / 4 points) or with the time index (the others). The product of a
    query and a key then depends on how far apart their patches are in time and in mel, and in which
    direction, but not on where they are. The network is never told the mel band of a patch: it has
    to infer it from the sound, or from the missing neighbours at the edges.
    """
    # The same for all heads: [B, 1, L, d] or [1, L, d].
    rotation = rotation.to(x.dtype).unsqueeze(-3)
    sin, cos = rotation.chunk(2, dim=-1)  # each [..., L, d / 2]
    a, b = x.chunk(2, dim=-1)  # [B, H, L, d / 2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def count_millions(network: nn.Module) -> float:
    """Parameters and buffers, in millions, because the paper counts the position table as well."""
    return sum(tensor.numel() for tensor in network.state_dict().values()) / 1e6


if __name__ == "__main__":
    print("preset     encoder  predictor    trained")
    for preset, config in PRESETS.items():
        with torch.device("meta"):
            encoder = count_millions(VisionTransformer(config))
            predictor = count_millions(Predictor(config))
        trained = encoder + predictor
        print(f"{preset:8}{encoder:8.2f} M {predictor:8.2f} M {trained:8.2f} M")
