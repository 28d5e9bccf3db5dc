# SPDX-License-Identifier: MIT
"""Which patches are masked (sec. IV.A), and the moving average that makes the targets (eq. (3)).

A mask is two tensors of patch numbers, never booleans: `context_idx` [B, C] are the visible
patches of each clip, `target_idx` [B, M] the masked ones, and C + M = N. Patches are numbered
time-major, patch = t * mel_patches + f. One mask on a grid of 4 x 3 (time x mel), with the masked
patches in brackets:

    f = 2      2   [ 5]    8   [11]        context_idx = [0, 2, 3, 6, 8, 10]
    f = 1    [ 1]  [ 4]  [ 7]   10         target_idx  = [1, 4, 5, 7, 9, 11]
    f = 0      0     3     6   [ 9]
             t = 0 t = 1 t = 2 t = 3

Letters in the shape comments: B masks, one or several for each clip, N patches of a clip, C
context (visible) patches, M masked patches, R rectangles.

`python masking.py` draws one mask of each kind.
"""

import math
import random

import torch
from torch import Tensor, nn


def random_mask(
    batch_size: int, grid: tuple[int, int], num_masked: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mask `num_masked` patches of each clip, drawn uniformly and anew for every clip.

    This is the paper's masking. grid = (time, mel) in patches -> (context_idx [B, N - num_masked],
    target_idx [B, num_masked]), int64, ascending, on the generator's device. ValueError if nothing
    would be masked or nothing visible.
    """
    num_patches = grid[0] * grid[1]
    noise = torch.rand(batch_size, num_patches, generator=generator, device=generator.device)
    return mask_lowest(noise, num_masked)


def block_mask(
    batch_size: int, grid: tuple[int, int], num_masked: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mask rectangles of patches, as I-JEPA does. The paper found it worse (sec. IV.A).

    Takes and returns what `random_mask` does. Rectangles of 15 to 20 % of the grid are laid over
    each clip, one after another, until `num_masked` patches are covered. The last one covers only
    as many as are still needed, picked at random. (I-JEPA lays four and lets the number vary. With
    an exact number the clips of a batch fit into one tensor.)
    """
    time, mel = grid
    device = generator.device
    num_rectangles = 28  # 28 x 15 % covers the grid four times, so that few patches stay uncovered

    def uniform(low, high):
        noise = torch.rand(batch_size, num_rectangles, 1, generator=generator, device=device)
        return low + (high - low) * noise  # [B, R, 1]

    # Sizes. With one draw for area and aspect, large rectangles would all be long.
    area = uniform(0.15, 0.20) * time * mel
    aspect = uniform(0.75, 1.5)
    time_size = (area * aspect).sqrt().round().clamp(1, time)  # [B, R, 1], patches in time
    mel_size = (area / aspect).sqrt().round().clamp(1, mel)  # [B, R, 1], patches in mel

    # Corners. The + 1 lets a rectangle reach the far edges as well.
    t0 = (uniform(0, 1) * (time - time_size + 1)).floor()
    f0 = (uniform(0, 1) * (mel - mel_size + 1)).floor()

    # Cover. For each patch, the first rectangle that lies on it.
    patch = torch.arange(time * mel, device=device)
    t = patch // mel
    f = patch % mel
    inside_time = (t0 <= t) & (t < t0 + time_size)  # [B, R, N]
    inside_mel = (f0 <= f) & (f < f0 + mel_size)
    covers = inside_time & inside_mel
    first = covers.float().argmax(1)  # [B, N]
    first = torch.where(covers.any(1), first, num_rectangles)  # uncovered patches come last

    # Select. Patches are masked in the order of their rectangles. Noise below 1 shuffles those of
    # one rectangle, but moves none into another.
    noise = torch.rand(batch_size, time * mel, generator=generator, device=device)
    return mask_lowest(first + noise, num_masked)


MASKS = {"random": random_mask, "block": block_mask}


def mask_lowest(scores: Tensor, num_masked: int) -> tuple[Tensor, Tensor]:
    """Mask the `num_masked` patches of lowest score [B, N] -> (context_idx, target_idx)."""
    num_patches = scores.shape[1]
    if not 0 < num_masked < num_patches:
        raise ValueError(f"{num_masked} of {num_patches} patches: mask some of them, but not all")
    patches = scores.argsort(dim=1)
    target_idx = patches[:, :num_masked].sort(dim=1).values
    context_idx = patches[:, num_masked:].sort(dim=1).values
    return context_idx, target_idx


def draw_masks(
    mask_fn,
    seed: int,
    step: int,
    batch_size: int,
    grid: tuple[int, int],
    mask_ratio: tuple[float, float],
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """The masks of one step's batch -> (context_idx [B, C], target_idx [B, M]).

    `mask_fn` is one of MASKS. The masked ratio is drawn once a step from U(mask_ratio)
    (sec. IV.A), so that all clips of the batch have equally many masked patches.

    On one kind of device, the masks are a pure function of (seed, step). That is why a run that is
    resumed, or split over processes, draws the same masks, and why no random state is saved.
    """
    # random.Random hashes the string, so that steps 1 and 2 give unrelated numbers.
    rng = random.Random(f"masks of seed {seed}, step {step}")
    num_patches = grid[0] * grid[1]
    num_masked = round(rng.uniform(*mask_ratio) * num_patches)
    num_masked = min(max(num_masked, 1), num_patches - 1)  # a small grid may round to none or all
    generator = torch.Generator(device).manual_seed(rng.getrandbits(63))
    return mask_fn(batch_size, grid, num_masked, generator)


def ema_decay(step: int, steps: int, base: float = 0.996, end: float = 1.0) -> float:
    """tau of eq. (3) at a step: BYOL's cosine, from `base` at step 0 to `end` at `steps`."""
    progress = step / steps
    return end - (end - base) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def update_ema(target: nn.Module, context: nn.Module, decay: float) -> None:
    """Eq. (3), theta_tgt <- tau theta_tgt + (1 - tau) theta_ctx, in place, with tau = `decay`.

    Covers every parameter and buffer of the two modules, which have the same names. Call it right
    after every optimizer step, on fp32 weights: at tau = 0.9999 the change is smaller than bf16 can
    resolve, so a bf16 weight would never move.
    """
    context_state = context.state_dict()
    target_state = target.state_dict()  # these are the module's own tensors, not copies
    for name, tensor in target_state.items():
        if tensor.is_floating_point():
            tensor.lerp_(context_state[name], 1 - decay)
        else:
            tensor.copy_(context_state[name])  # counters cannot be averaged


if __name__ == "__main__":
    TIME = 16
    MEL = 8
    for name, mask_fn in MASKS.items():
        _, target_idx = draw_masks(mask_fn, 0, 0, 1, (TIME, MEL), (0.4, 0.6), "cpu")
        masked = set(target_idx[0].tolist())
        print(f"{name}: {len(masked)} of {TIME * MEL} masked (#); time to the right, mel up")
        for f in reversed(range(MEL)):
            line = ["#" if t * MEL + f in masked else "." for t in range(TIME)]
            print("    " + " ".join(line))
