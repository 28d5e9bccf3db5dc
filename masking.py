# SPDX-License-Identifier: MIT
"""Which patches are hidden (sec. IV.A), and the moving average that makes the target encoder (eq. (3)).

A mask is two index tensors, never booleans: context_idx [B, C] are the visible patches of each clip,
target_idx [B, M] the masked ones, C + M = N. Indices count the grid time-major: patch = t * mel_patches + f.
B clips, N patches of a clip.

`python masking.py` draws one mask of each kind.
"""
import math
import random

import torch


def random_mask(batch_size, grid, num_masked, generator):
    """Hide `num_masked` patches of each clip, drawn uniformly and anew for every clip: the paper's masking.

    grid = (time, mel) in patches -> (context_idx [B, N - num_masked], target_idx [B, num_masked]), int64 on
    the generator's device, each row ascending. ValueError if nothing would be hidden or nothing seen.
    """
    noise = torch.rand(batch_size, grid[0] * grid[1], generator=generator, device=generator.device)
    return split_patches(noise, num_masked)


def block_mask(batch_size, grid, num_masked, generator):
    """Hide rectangles, in the manner of I-JEPA's multi-block masks: the strategy that the paper found worse
    (sec. IV.A).

    Arguments and answer as in `random_mask`. Rectangles of 15 to 20 % of the grid, 0.75 to 1.5 times as long
    in time as in mel, are laid over each clip one after another until `num_masked` patches are covered. The
    last one is thinned at random, so that no corner of the grid is favoured. I-JEPA uses four and lets their
    union vary; an exact count keeps clips in one tensor and processes in balance. All that is not hidden is
    context.
    """
    time, mel, device = *grid, generator.device
    blocks = 4 * math.ceil(1 / 0.15)  # four times what would tile the grid; what they leave bare comes last

    def uniform(low, high):
        return low + (high - low) * torch.rand(batch_size, blocks, 1, generator=generator, device=device)

    area, aspect = uniform(0.15, 0.20) * time * mel, uniform(0.75, 1.5)  # two draws: size tells no shape
    height = (area * aspect).sqrt().round().clamp(1, time)  # [B, blocks, 1], patches in time
    width = (area / aspect).sqrt().round().clamp(1, mel)  # patches in mel
    top = (uniform(0, 1) * (time - height + 1)).floor()  # + 1: the last row and column can be covered too
    left = (uniform(0, 1) * (mel - width + 1)).floor()
    patch = torch.arange(time * mel, device=device)  # [N]
    t, f = patch // mel, patch % mel
    covers = (top <= t) & (t < top + height) & (left <= f) & (f < left + width)  # [B, blocks, N]
    first = torch.where(covers.any(1), covers.float().argmax(1), blocks)  # [B, N], the block that hid it
    noise = torch.rand(batch_size, time * mel, generator=generator, device=device)
    return split_patches(first + noise, num_masked)


def split_patches(order, num_masked):
    """The `num_masked` patches of lowest `order` [B, N] are masked, the rest seen -> (context_idx,
    target_idx)."""
    if not 0 < num_masked < order.shape[1]:
        raise ValueError(f"{num_masked} of {order.shape[1]} patches masked: some must be, and some not")
    patches = order.argsort(dim=1)
    return patches[:, num_masked:].sort(dim=1).values, patches[:, :num_masked].sort(dim=1).values


def draw_masks(strategy, seed, step, batch_size, grid, mask_ratio, device):
    """The masks of one step's global batch, a pure function of (seed, step): whoever draws them, and
    whenever, gets the same.

    One share per step from U(mask_ratio), so that every clip has equally many masked patches; `strategy` is
    one of the two above -> (context_idx [B, C], target_idx [B, M]).
    """
    rng = random.Random(f"masks of seed {seed}, step {step}")  # hashed: near seeds draw unrelated masks
    patches = grid[0] * grid[1]
    num_masked = min(max(round(rng.uniform(*mask_ratio) * patches), 1), patches - 1)
    generator = torch.Generator(device).manual_seed(rng.getrandbits(63))
    return strategy(batch_size, grid, num_masked, generator)


def ema_decay(step, steps, base=0.996):
    """tau of eq. (3) at a step: BYOL's cosine from `base` at step 0 to 1 at `steps`."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


@torch.no_grad()
def update_ema(target, context, decay):
    """Eq. (3), theta_tgt <- tau theta_tgt + (1 - tau) theta_ctx, in place, over every parameter and buffer of
    two modules.

    ValueError if their names differ. Call it once per optimiser step, right after it, on fp32 weights: at tau
    = 0.9999 a bf16 weight would never move.
    """
    theirs, ours = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (context, target))
    if theirs.keys() != ours.keys():
        raise ValueError(f"the two encoders differ in {sorted(theirs.keys() ^ ours.keys())}")
    moving = [name for name, tensor in ours.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([ours[name] for name in moving], [theirs[name] for name in moving], 1 - decay)
    for name in ours.keys() - moving:  # counters cannot be averaged
        ours[name].copy_(theirs[name])


if __name__ == "__main__":
    TIME, MEL = 16, 8
    for strategy in (random_mask, block_mask):
        _, target_idx = draw_masks(strategy, 0, 0, 1, (TIME, MEL), (0.4, 0.6), "cpu")
        masked = set(target_idx[0].tolist())
        print(f"{strategy.__name__}: {len(masked)} of {TIME * MEL} masked (#); time to the right, mel up")
        for f in reversed(range(MEL)):
            print("    " + " ".join("#" if t * MEL + f in masked else "." for t in range(TIME)))
