# SPDX-License-Identifier: MIT
"""The networks of Audio-JEPA (arXiv 2507.02915): encoder and predictor, and the losses.

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
patches (C + M = N), D encoder width, P predictor width, H heads, L tokens of any sequence.

`python model.py` prints the parameters of every preset.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


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
    positions: str = "sincos"  # a code, added to tokens; "rotary": queries and keys are rotated
    patch_scale: float = 1.0  # multiplies the first patch embedding, see VisionTransformer

    def __post_init__(self):
        must_divide = [
            ("time_bins", self.patch_size[0], "frames of a patch"),
            ("mel_bins", self.patch_size[1], "bands of a patch"),
            # Rotary positions turn pairs of features (x 2) along two axes (x 2) in each head.
            ("dim", 4 * self.heads, "= 4 x heads"),
            ("predictor_dim", 4 * self.predictor_heads, "= 4 x heads of the predictor"),
        ]
        for name, divisor, what in must_divide:
            size = getattr(self, name)
            if size % divisor != 0:
                raise ValueError(f"{name} = {size} is not a multiple of the {divisor} {what}")
        if self.positions not in ("sincos", "rotary"):
            raise ValueError(f"positions {self.positions}: sincos or rotary is needed")

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


def gather_tokens(tokens: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """Pick tokens of each clip by their number: tokens [B, N, D], idx [B, K] -> [B, K, D]."""
    width = tokens.shape[-1]
    return tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, width))


def patch_angles(dim: int, grid: tuple[int, int], base: float) -> torch.Tensor:
    """The index of each patch in mel and in time, times dim / 4 frequencies.

    -> [N, 2, dim / 4], in radians. Rows are patches, row = t * mel_patches + f. The axis of 2 is
    mel, then time, as in the authors' code, so that their weights fit. The frequencies fall from 1
    to nearly 1 / base.
    """
    time_patches, mel_patches = grid
    t = torch.arange(time_patches).repeat_interleave(mel_patches)  # [N]: 0 0 0 ... 1 1 1 ...
    f = torch.arange(mel_patches).repeat(time_patches)  # [N]: 0 1 2 ... 0 1 2 ...
    places = torch.stack([f, t], dim=1)  # [N, 2]
    frequencies = base ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    return places.unsqueeze(2) * frequencies


def sincos_positions(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D sin-cos table -> [N, dim], to be added to tokens (sec. IV.B).

    The first half of the width holds sines, then cosines, of the mel angles, the second half those
    of the time angles.
    """
    angle = patch_angles(dim, grid, base=10000.0)  # [N, 2, dim / 4]
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1).float()


def rotary_positions(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D rotary table -> [N, dim], for `rotate`: dim / 2 sines, then their cosines.

    The base is 100 here: along an axis there are tens of patches, and angles that grow by less than
    1 / 100 from patch to patch would hardly differ.
    """
    angle = patch_angles(dim, grid, base=100.0).flatten(1)  # [N, dim / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def position_table(config: JEPAConfig, dim: int, heads: int) -> torch.Tensor:
    """The table of a network that is `dim` wide; a rotary one is as wide as a head."""
    if config.positions == "rotary":
        return rotary_positions(dim // heads, config.grid)
    return sincos_positions(dim, config.grid)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864), here of two axes (sec. VII, point 2).

    x [B, H, L, K], queries or keys; rotation [B, L, K] or [L, K], their rows of the table
    -> [B, H, L, K].

    Features i and i + K / 2 of x are a point in a plane. It is turned by an angle that grows with
    the mel index (the first K / 4 points) or with the time index (the others). The product of a
    turned query and a turned key depends on how far, and in which direction, one lies from the
    other in time and in mel, and not on where they are. The network is never told the mel band of a
    patch: it has to know it by the sound, or by the neighbours that are missing at the edges.
    """
    rotation = rotation.to(x.dtype).unsqueeze(-3)  # [B, 1, L, K] or [1, L, K]: alike in all heads
    sin, cos = rotation.chunk(2, dim=-1)  # each [..., L, K / 2]
    a, b = x.chunk(2, dim=-1)  # [B, H, L, K / 2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention: [B, L, D] -> [B, L, D].

    rotation [B, L, D / H] or [L, D / H], for rotary positions alone: see `rotate`.
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
            # The same arithmetic as below in plain steps, which are faster on a CPU.
            scale = (D // self.heads) ** -0.5
            scores = (scale * q) @ k.mT  # [B, H, L, L]
            x = scores.softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # never stores the [L, L] scores
        x = x.transpose(1, 2).reshape(B, L, D)  # heads side by side again
        return self.proj(x)


class MLP(nn.Module):
    """Two layers with a GELU between: [B, L, D] -> [B, L, D]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block: [B, L, D] -> [B, L, D]; rotation as in Attention."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x, rotation=None):
        x = x + self.attn(self.norm1(x), rotation)
        x = x + self.mlp(self.norm2(x))
        return x


@torch.no_grad()
def init_weights(network: nn.Module) -> None:
    """Truncated normal of std 0.02, zero biases, unit norms.

    Each block adds to the residual stream twice. The two projections that write block i = 1, 2, ...
    into it are divided by sqrt(2 i), so that the variance of the stream grows as 1 + 1/2 + 1/3 +
    ..., with the logarithm of the depth and not with the depth.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for i, block in enumerate(network.blocks, start=1):
        block.attn.proj.weight /= math.sqrt(2 * i)
        block.mlp.fc2.weight /= math.sqrt(2 * i)


def run_blocks(network: nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Tokens [B, L, D] through all blocks of an encoder or a predictor -> [B, L, D].

    positions: for each token its row of the network's position table, [B, L, K] or [L, K]. A
    sin-cos code (K = D) is added to the tokens, once. A rotary one (K = D / H) turns the queries
    and keys of every block.
    """
    x = tokens.to(positions.dtype)  # autocast may lower the products, but not the stream itself
    rotation = None
    if network.config.positions == "rotary":
        rotation = positions
    else:
        x = x + positions
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
        # 256 numbers of variance 1 times weights of std 0.02 give a patch an rms of 0.3, and the
        # sin-cos code that is added to it has 0.7: at first an encoder hears more of the place than
        # of the sound. A scale of 3.3 reverses that. (Rotary positions add nothing to a patch. With
        # them no benefit of the scale was measured.)
        self.patch_embed.weight.data *= config.patch_scale

    def patchify(self, spectrogram):
        """[B, 1, T, F] -> [B, N, patch], time-major: token = t * mel_patches + f."""
        B, _, time, mel = spectrogram.shape
        config = self.config
        if (time, mel) != (config.time_bins, config.mel_bins):
            wanted = f"{config.time_bins} x {config.mel_bins}"
            raise ValueError(f"a spectrogram of {time} x {mel}, this encoder takes {wanted}")
        patch_time, patch_mel = config.patch_size
        t, f = config.grid
        patches = spectrogram.reshape(B, t, patch_time, f, patch_mel)
        patches = patches.transpose(2, 3)  # [B, t, f, 16, 16]
        return patches.reshape(B, t * f, patch_time * patch_mel)

    def forward(self, spectrogram, context_idx=None):
        patches = self.patchify(spectrogram)  # [B, N, 256]
        positions = self.pos_embed  # [N, D]
        if context_idx is not None:
            # Masked patches are dropped before any work is spent on them. The kept ones take their
            # positions along, so that their order in the sequence means nothing.
            patches = gather_tokens(patches, context_idx)  # [B, C, 256]
            positions = positions[context_idx]  # [B, C, D]
        tokens = self.patch_embed(patches)  # [B, L, D], L = N or C
        return self.norm(run_blocks(self, tokens, positions))


class Predictor(nn.Module):
    """A narrower ViT that fills in the masked patches: g_pred of eq. (1).

    (context [B, C, D], context_idx [B, C], target_idx [B, M]) -> [B, M, D].

    What the predictor knows: of the visible patches, what the context encoder made of them, and
    where they are; of a masked patch, only where it is. Every masked patch enters as the same
    learned mask token. Its position alone tells it from the others: a code that is added to it, or
    the rotation of its queries and keys.
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
        positions = self.pos_embed[torch.cat([context_idx, target_idx], dim=1)]
        tokens = run_blocks(self, tokens, positions)
        num_visible = context.shape[1]
        filled_in = tokens[:, num_visible:]  # [B, M, P]
        return self.proj(self.norm(filled_in))  # [B, M, D]


# A loss takes predictions and targets [B, M, D] and averages over the masked tokens. Eq. (2) is a
# squared distance: it sums over the width D, so that it starts near D. The cosine does not sum over
# D, and is about D times smaller. AdamW divides a gradient by its own size, so that the learning
# rate need not change. But the weight of the term against collapse, below, must be about D times
# smaller with the cosine.


def l2_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. (2): the squared distance of a masked token to its target, averaged over the tokens."""
    return (predictions - targets).square().sum(-1).mean()


def cosine_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """2 - 2 cos, averaged over the tokens: what the authors' released code minimises."""
    return (2 - 2 * F.cosine_similarity(predictions, targets, dim=-1)).mean()


def variance_covariance(tokens: torch.Tensor) -> torch.Tensor:
    """A term against collapse, from VICReg (arXiv 2105.04906): tokens [B, C, D] -> scalar.

    It is 0 if each feature has a std of at least 1 over the tokens of all clips, and if no two
    features are correlated. Then the tokens cannot be alike, nor lie along a few directions.
    """
    tokens = tokens.float().flatten(0, 1)  # [B * C, D]
    with torch.autocast(tokens.device.type, enabled=False):
        covariance = torch.cov(tokens.T)  # [D, D]
    variance = covariance.diagonal()
    too_small = F.relu(1 - torch.sqrt(variance + 1e-4)).sum()  # + 1e-4: sqrt is too steep at 0
    correlated = covariance.square().sum() - variance.square().sum()
    # 25 to 1, as in VICReg, which divides both sums by D: our values are D times as large.
    return 25 * too_small + correlated


LOSSES = {"l2": l2_loss, "cosine": cosine_loss}


def normalise_targets(targets: torch.Tensor, within: str = "token") -> torch.Tensor:
    """Give the targets mean 0 and variance 1: [B, N, D] -> [B, N, D], fp32.

    Within a "token": over its features (as I-JEPA). Within a "clip": each feature over the tokens
    of the clip (as data2vec). What all tokens of a clip share is then no part of a target: the
    context gives it away, and predicting it teaches little.

    Why: the last LayerNorm of the encoder has a learned scale, which nothing holds in place. The
    targets follow it, through the moving average. As it shrinks, so do the targets and their
    distance to any prediction: the loss would fall without anything being learned.
    """
    axis = {"token": 2, "clip": 1}[within]
    variance, mean = torch.var_mean(targets.float(), axis, correction=0, keepdim=True)
    return (targets - mean) / torch.sqrt(variance + 1e-5)


class JEPA(nn.Module):
    """Everything that gradient descent trains: context encoder and predictor, up to the loss.

    (spectrogram [B, 1, T, F], context_idx [B, C], target_idx [B, M], targets [B, N, D]) -> scalar.
    `targets` is what the target encoder makes of the whole clip.
    """

    def __init__(
        self,
        config: JEPAConfig,
        loss: str = "l2",
        target_norm: str = "token",
        anti_collapse: float = 0.0,  # weight of variance_covariance
    ):
        super().__init__()
        self.config = config
        self.context_encoder = VisionTransformer(config)
        self.predictor = Predictor(config)
        self.loss_function = LOSSES[loss]
        self.target_norm = target_norm
        self.anti_collapse = anti_collapse

    def forward(self, spectrogram, context_idx, target_idx, targets):
        context = self.context_encoder(spectrogram, context_idx)  # [B, C, D], c = f_ctx(x \ M)
        predictions = self.predictor(context, context_idx, target_idx)  # [B, M, D], g_pred(c)
        # Stop-gradient: the targets are constants here. If gradient descent could move them too,
        # the two encoders would meet where it costs least: every clip mapped to one constant, which
        # is predicted without error and says nothing (collapse). In train.py no gradient could flow
        # to them anyway, as the target encoder runs under no_grad and no optimizer has its weights.
        # `detach` makes sure of it for any other caller.
        normalised = normalise_targets(targets.detach(), self.target_norm)  # [B, N, D]
        wanted = gather_tokens(normalised, target_idx)  # [B, M, D], f_tgt(x)_j for j in M
        loss = self.loss_function(predictions.float(), wanted)
        if self.anti_collapse > 0:
            # The gradient of the term counts, and its value does not, as the difference is 0. So
            # the log shows eq. (2) alone, and `explained` of train.py compares like with like.
            term = self.anti_collapse * variance_covariance(context)
            loss = loss + (term - term.detach())
        return loss


# ------------------------------------------------------------------------------------------------
# The method ends here. What follows only counts.


def count_millions(network: nn.Module) -> float:
    """Parameters and buffers, in millions: the paper counts the position table as well."""
    return sum(tensor.numel() for tensor in network.state_dict().values()) / 1e6


if __name__ == "__main__":
    print("preset     encoder  predictor    trained")
    for preset, config in PRESETS.items():
        with torch.device("meta"):
            encoder = count_millions(VisionTransformer(config))
            predictor = count_millions(Predictor(config))
        trained = encoder + predictor
        print(f"{preset:8}{encoder:8.2f} M {predictor:8.2f} M {trained:8.2f} M")
