# SPDX-License-Identifier: MIT
"""What this project claims, as an executable specification: one claim a test, the method first.

    python -m pytest -q -rs

model.py    sizes, positions, initialisation, what each network sees, the loss, where gradients go
masking.py  random and block masks, their reproducibility, the EMA and its schedule
data.py     log-mel against Kaldi, every kind of input, clips, windows, filling up, packing
train.py    a step by hand; one process = several = accumulation = resume; monitors; faults
extract.py  embeddings whatever the batching, probes, X-ARES, fine-tuning, the authors' checkpoint
"""

import copy
import csv
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import data
import extract
import masking
import model
import train
from model import JEPA
from model import PRESETS
from model import JEPAConfig
from model import Predictor
from model import VisionTransformer

HERE = Path(__file__).parent
SMALL = JEPAConfig(
    time_bins=64,
    mel_bins=48,
    dim=32,
    depth=2,
    heads=2,
    predictor_dim=16,
    predictor_depth=2,
    predictor_heads=2,
)  # a grid of 4 x 3 patches
torch.set_num_threads(1)  # networks this small gain nothing from more


# ================================================================================================
# Fixtures and helpers


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def generator():
    return torch.Generator().manual_seed(0)


def a_mask():
    return masking.random_mask(2, SMALL.grid, 5, generator())


def a_spectrogram():
    return torch.randn(2, 1, 64, 48)


def tone(seconds=1.0, rate=32000, hertz=440.0):
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def noise(seconds=1.0, rate=32000, seed=0):
    samples = np.random.default_rng(seed).standard_normal(int(seconds * rate))
    return (0.1 * samples).astype(np.float32)


def corpus(folder, clips=12, seconds=2.0):
    """A folder of wav files that sound different."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(clips):
        sound = tone(seconds, hertz=200 + 70 * i) + noise(seconds, seed=i) / 4
        soundfile.write(folder / f"{i:03d}.wav", sound, 32000)
    return folder


def packed(folder, frames, places=(0,), length=None):
    """A packed folder, made by hand: recordings that begin at these places of frames [T, F]."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all.f16").write_bytes(frames.astype(np.float16).tobytes())
    entries = []
    for n, place in enumerate(places):
        entries.append(f"{n}.wav\0all.f16\0{place}\0{length or len(frames)}".encode())
    np.save(folder / "index.npy", np.array(entries))
    (folder / "pack.json").write_text('{"sample_rate": 32000}')
    return folder


def run_python(*command, env=None, timeout=240):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=timeout,
    )


# The smallest run there is: clips of 2 x 8 patches, 20 steps.
TINY = "--model tiny --clip-seconds 1.25 --batch-size 8 --steps 20 --warmup 5 --amp off".split()
TINY += "--log-every 1 --workers 0".split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def pretrain(out, *flags):
    """A run in this process -> its checkpoint and its log, a list of rows."""
    train.main([*TINY, "--out", str(out), *map(str, flags)])
    return read_run(out)


def read_run(out):
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    with open(out / "log.csv", newline="") as file:
        return checkpoint, list(csv.DictReader(file))


def column(log, name):
    return [float(row[name]) for row in log]


def without_clocks(log):
    clocks = ("seconds", "clips_per_s", "data_wait", "memory_gib")
    for row in log:
        for name in clocks:
            del row[name]
    return log


NETWORKS = ("context_encoder", "target_encoder", "predictor")


def same_weights(one, other, tolerance=0.0):
    for network in NETWORKS:
        for name, tensor in one[network].items():
            if not torch.allclose(tensor, other[network][name], rtol=0, atol=tolerance):
                return False
    return True


def error_line(capsys, *flags):
    """The one line that train.py says before it exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(list(map(str, flags)))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def wait_for_step(out, step, timeout=120):
    """Wait until a run has logged a step."""
    ends = time.monotonic() + timeout
    while time.monotonic() < ends:
        if (out / "log.csv").exists():
            last = (out / "log.csv").read_text().rstrip("\n").split("\n")[-1].split(",")[0]
            if last.isdigit() and int(last) >= step:
                return
        time.sleep(0.01)
    raise TimeoutError(f"no step {step} in {out}")


def interrupted(out, step, *flags):
    """A run in this process that gets SIGTERM when it has logged a step -> like pretrain."""

    def interrupt():
        wait_for_step(out, step)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    run = pretrain(out, *flags)
    thread.join()
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of one process on synthetic clips."""
    return pretrain(tmp_path_factory.mktemp("reference"))


# ================================================================================================
# model.py


def numbers_in(network):
    return sum(tensor.numel() for tensor in network.state_dict().values())


def test_the_defaults_have_the_papers_size():
    assert JEPAConfig().grid == (16, 8)
    with torch.device("meta"):
        assert round(numbers_in(VisionTransformer(JEPAConfig())) / 1e6, 2) == 85.35
        assert round(numbers_in(Predictor(JEPAConfig())) / 1e6, 2) == 11.29


def test_the_position_table_has_mel_in_its_first_half_and_time_in_its_second():
    table = model.sincos_positions(32, (4, 3)).view(4, 3, 32)
    assert torch.equal(table[0, :, :16], table[3, :, :16])
    assert torch.equal(table[:, 0, 16:], table[:, 2, 16:])
    assert len(table.view(12, 32).unique(dim=0)) == 12


def test_the_position_table_is_the_formula():
    token = model.sincos_positions(32, (4, 3))[3 * 3 + 2]  # t = 3, f = 2
    k = 5
    frequency = 10000 ** -(k / 8)
    wanted = [
        math.sin(2 * frequency),
        math.cos(2 * frequency),
        math.sin(3 * frequency),
        math.cos(3 * frequency),
    ]
    assert torch.allclose(token[[k, 8 + k, 16 + k, 24 + k]], torch.tensor(wanted))


def test_a_token_is_one_patch_in_time_major_order():
    t = torch.arange(64.0).view(1, 1, 64, 1) // 16
    f = torch.arange(48.0) // 16
    patches = VisionTransformer(SMALL).patchify(t * 3 + f)
    assert torch.equal(patches, torch.arange(12.0).view(1, 12, 1).expand(1, 12, 256))


def test_gather_is_the_naive_loop():
    tokens = torch.randn(3, 12, 5)
    idx = torch.stack([torch.randperm(12)[:4] for _ in range(3)])
    gathered = model.gather_tokens(tokens, idx)
    for b in range(3):
        for k in range(4):
            assert torch.equal(gathered[b, k], tokens[b, idx[b, k]])


def test_the_context_encoder_sees_only_visible_patches():
    encoder = VisionTransformer(SMALL)
    spectrogram = a_spectrogram()
    context_idx, target_idx = a_mask()
    changed = spectrogram.clone()
    for b in range(2):
        for patch in target_idx[b].tolist():
            t = patch // 3 * 16
            f = patch % 3 * 16
            changed[b, 0, t : t + 16, f : f + 16] += 1
    assert torch.equal(encoder(spectrogram, context_idx), encoder(changed, context_idx))
    assert not torch.allclose(encoder(spectrogram), encoder(changed))


def test_all_patches_in_order_are_no_mask():
    encoder = VisionTransformer(SMALL)
    spectrogram = a_spectrogram()
    all_patches = torch.arange(12).expand(2, 12)
    assert torch.allclose(encoder(spectrogram, all_patches), encoder(spectrogram), atol=1e-6)


def test_clips_of_a_batch_do_not_meet():
    encoder = VisionTransformer(SMALL)
    spectrogram = torch.randn(4, 1, 64, 48)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(encoder(spectrogram)[order], encoder(spectrogram[order]), atol=1e-6)


def test_attention_is_the_fused_one():
    attention = model.Attention(32, 2)
    x = torch.randn(2, 7, 32)
    q, k, v = attention.qkv(x).view(2, 7, 3, 2, 16).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 32)
    assert torch.allclose(attention(x), attention.proj(fused), atol=1e-5)


def test_a_prediction_changes_with_the_position_it_is_asked_for():
    predictor = Predictor(SMALL)
    context = torch.randn(1, 6, 32)
    context_idx = torch.arange(6).unsqueeze(0)
    at_7 = predictor(context, context_idx, torch.tensor([[7]]))
    at_11 = predictor(context, context_idx, torch.tensor([[11]]))
    assert (at_7 - at_11).abs().max() > 1e-4


def test_a_prediction_changes_with_where_the_context_lies():
    predictor = Predictor(SMALL)
    context = torch.randn(1, 2, 32)
    target_idx = torch.tensor([[7]])
    one = predictor(context, torch.tensor([[0, 1]]), target_idx)
    other = predictor(context, torch.tensor([[5, 9]]), target_idx)
    assert (one - other).abs().max() > 1e-4


def test_predictions_follow_the_order_of_their_indices():
    predictor = Predictor(SMALL)
    context = torch.randn(1, 6, 32)
    context_idx = torch.arange(6).unsqueeze(0)
    forth = predictor(context, context_idx, torch.tensor([[7, 9, 11]]))
    back = predictor(context, context_idx, torch.tensor([[11, 9, 7]]))
    assert torch.allclose(forth, back.flip(1), atol=1e-6)


def test_weights_start_with_the_std_that_is_claimed():
    for network in (VisionTransformer(PRESETS["tiny"]), Predictor(PRESETS["base"])):
        for i, block in enumerate(network.blocks, start=1):
            for layer in (block.attn.qkv, block.mlp.fc1):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            for layer in (block.attn.proj, block.mlp.fc2):
                assert layer.weight.std().item() == pytest.approx(0.02 / (2 * i) ** 0.5, rel=0.05)
                assert not layer.bias.any()


def test_the_loss_is_equation_2_on_normalised_targets():
    jepa = JEPA(SMALL)
    spectrogram = a_spectrogram()
    targets = torch.randn(2, 12, 32) * 7 + 3
    context_idx, target_idx = a_mask()
    context = jepa.context_encoder(spectrogram, context_idx)
    predictions = jepa.predictor(context, context_idx, target_idx)
    total = 0.0
    for b in range(2):
        for j, patch in enumerate(target_idx[b]):
            target = targets[b, patch]
            target = (target - target.mean()) / (target.var(correction=0) + 1e-5).sqrt()
            total += (predictions[b, j] - target).square().sum()
    loss = jepa(spectrogram, context_idx, target_idx, targets)
    assert torch.allclose(loss, total / (2 * 5), rtol=1e-5)


@pytest.mark.parametrize("loss", model.LOSSES)
def test_the_scale_of_the_targets_cannot_lower_the_loss(loss):
    jepa = JEPA(SMALL, loss)
    spectrogram = a_spectrogram()
    targets = torch.randn(2, 12, 32)
    before = jepa(spectrogram, *a_mask(), targets)
    shrunk = jepa(spectrogram, *a_mask(), targets * 0.1)
    assert torch.allclose(before, shrunk, rtol=1e-2)


def test_cosine_loss_is_zero_for_equal_directions_and_four_for_opposite_ones():
    x = torch.randn(2, 5, 32)
    assert model.cosine_loss(3 * x, x).item() == pytest.approx(0, abs=1e-5)
    assert model.cosine_loss(-x, x).item() == pytest.approx(4, abs=1e-5)


def test_the_l2_loss_sums_over_the_width_and_the_others_do_not():
    x = torch.randn(2, 5, 32)
    y = torch.randn(2, 5, 32)
    wider_x = torch.cat([x, x], dim=-1)
    wider_y = torch.cat([y, y], dim=-1)
    assert torch.allclose(model.l2_loss(wider_x, wider_y), 2 * model.l2_loss(x, y))
    for loss in (model.smooth_l1_loss, model.cosine_loss):
        assert torch.allclose(loss(wider_x, wider_y), loss(x, y), atol=1e-5)


def test_gradients_reach_every_trained_weight_and_stop_before_the_targets():
    jepa = JEPA(SMALL)
    target_encoder = VisionTransformer(SMALL)
    spectrogram = a_spectrogram()
    jepa(spectrogram, *a_mask(), target_encoder(spectrogram)).backward()
    assert all(parameter.grad is not None for parameter in jepa.parameters())
    assert all(parameter.grad is None for parameter in target_encoder.parameters())


def test_the_loss_is_computed_in_fp32_under_autocast():
    jepa = JEPA(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        loss = jepa(a_spectrogram(), *a_mask(), torch.randn(2, 12, 32))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["time_bins", "mel_bins", "dim", "predictor_dim"])
def test_sizes_that_do_not_divide_are_refused_at_construction(name):
    with pytest.raises(ValueError, match=f"^{name} = 100"):
        JEPAConfig(heads=8, predictor_heads=8, **{name: 100})


def test_a_spectrogram_of_another_size_is_refused():
    with pytest.raises(ValueError, match="64 x 48"):
        VisionTransformer(SMALL)(torch.randn(1, 1, 64, 64))


# ================================================================================================
# masking.py

BOTH_MASKS = pytest.mark.parametrize("mask", masking.MASKS.values(), ids=masking.MASKS)


@BOTH_MASKS
@pytest.mark.parametrize("grid", [(16, 8), (1, 8), (48, 5)])
@pytest.mark.parametrize("num_masked", [1, 4, 7])
def test_context_and_target_are_disjoint_and_complete(mask, grid, num_masked):
    context_idx, target_idx = mask(7, grid, num_masked, generator())
    assert target_idx.shape == (7, num_masked)
    everything = torch.cat([context_idx, target_idx], dim=1).sort(1).values
    assert torch.equal(everything, torch.arange(grid[0] * grid[1]).expand(7, -1))


@BOTH_MASKS
def test_every_clip_has_a_mask_of_its_own(mask):
    _, target_idx = mask(64, (16, 8), 60, generator())
    assert len(target_idx.unique(dim=0)) == 64


def hidden_maps(mask, clips):
    """1 where a patch is hidden, 0 elsewhere: [clips, 16, 8], half of them hidden."""
    _, target_idx = mask(clips, (16, 8), 64, generator())
    return torch.zeros(clips, 128).scatter_(1, target_idx, 1.0).view(clips, 16, 8)


def test_random_masks_hide_every_patch_equally_often():
    counts = hidden_maps(masking.random_mask, 20000).sum(0)
    five_sigma = 5 * math.sqrt(20000 * 0.25)
    assert ((counts - 10000).abs() < five_sigma).all()


def test_random_masks_hide_neighbours_independently():
    hidden = hidden_maps(masking.random_mask, 20000)
    both = (hidden[:, 7, 4] * hidden[:, 7, 5]).mean().item()
    assert both == pytest.approx(64 / 128 * 63 / 127, abs=0.02)


def test_block_masks_reach_the_edges_and_favour_no_corner():
    share = hidden_maps(masking.block_mask, 20000).mean(0)
    assert share.min() > 0.05  # a corner belongs to few rectangles, but to some
    assert (share - share.flip(0)).abs().max() < 0.03
    assert (share - share.flip(1)).abs().max() < 0.03


def test_block_masks_are_made_of_blocks():
    def equal_neighbours(mask):
        hidden = hidden_maps(mask, 500)
        return (hidden[:, 1:] == hidden[:, :-1]).float().mean()

    assert equal_neighbours(masking.block_mask) > 0.8
    assert equal_neighbours(masking.random_mask) < 0.6


@BOTH_MASKS
def test_masks_are_a_pure_function_of_seed_and_step(mask):
    def draw(seed, step):
        torch.rand(3)  # the global generator has no say
        return masking.draw_masks(mask, seed, step, 8, (16, 8), (0.5, 0.5), "cpu")[1]

    assert torch.equal(draw(1, 5), draw(1, 5))
    assert not torch.equal(draw(1, 5), draw(1, 6))
    assert not torch.equal(draw(1, 5), draw(2, 5))
    assert not torch.equal(draw(1, 6), draw(2, 5))


def test_the_masked_share_is_drawn_once_a_step_over_its_whole_range():
    counts = set()
    for step in range(1000):
        _, target_idx = masking.draw_masks(
            masking.random_mask, 0, step, 2, (16, 8), (0.4, 0.6), "cpu"
        )
        counts.add(target_idx.shape[1])
    assert counts == set(range(51, 78))


def test_no_mask_is_empty_and_none_is_all():
    for num_masked in (0, 128):
        with pytest.raises(ValueError, match="patches masked"):
            masking.random_mask(2, (16, 8), num_masked, generator())
    for ratio in (0.001, 0.999):
        masks = masking.draw_masks(masking.random_mask, 0, 0, 2, (1, 4), (ratio, ratio), "cpu")
        assert min(idx.shape[1] for idx in masks) >= 1


def test_ema_decay_is_byols_cosine():
    assert masking.ema_decay(0, 100) == pytest.approx(0.996, abs=1e-12)
    assert masking.ema_decay(50, 100) == pytest.approx(0.998, abs=1e-12)
    assert masking.ema_decay(100, 100) == 1
    assert masking.ema_decay(101, 100) == 1
    assert masking.ema_decay(0, 100, base=0.9) == pytest.approx(0.9)


def test_ema_equals_its_closed_form():
    target = VisionTransformer(SMALL)
    context = VisionTransformer(SMALL)
    start = copy.deepcopy(target).state_dict()
    for _ in range(10):
        masking.update_ema(target, context, 0.9)
    for name, tensor in target.state_dict().items():
        wanted = 0.9**10 * start[name] + (1 - 0.9**10) * context.state_dict()[name]
        assert torch.allclose(tensor, wanted, atol=1e-6)


def test_ema_covers_buffers_and_refuses_other_names():
    target = torch.nn.BatchNorm1d(3)
    context = torch.nn.BatchNorm1d(3)
    context(torch.randn(8, 3))
    masking.update_ema(target, context, 0.5)
    assert torch.allclose(target.running_mean, 0.5 * context.running_mean)
    assert target.num_batches_tracked == 1
    with pytest.raises(ValueError, match="running_mean"):
        masking.update_ema(target, torch.nn.LayerNorm(3), 0.5)


# ================================================================================================
# data.py


# ================================================================================================
# train.py: a step, by hand


def test_the_learning_rate_is_the_papers():
    rates = [train.learning_rate(step, 100000) for step in (0, 500, 1000, 50500, 100000)]
    assert rates == pytest.approx([1e-6, 1.505e-4, 3e-4, 1.5e-4, 0], abs=1e-12)


def test_the_defaults_are_the_papers():
    args = vars(train.parse_args([]))
    wanted = {
        "model": "base",
        "batch_size": 256,
        "steps": 100000,
        "lr": 3e-4,
        "warmup": 1000,
        "weight_decay": 0.05,
        "ema": 0.996,
        "mask": "random",
        "mask_ratio": [0.4, 0.6],
        "loss": "l2",
        "sample_rate": 32000,
        "clip_seconds": 10.0,
    }
    assert {name: args[name] for name in wanted} == wanted


def test_a_warmup_that_would_fill_the_run_is_cut_and_said(capsys):
    args = train.parse_args(["--steps", "6"])
    assert args.warmup < 6
    assert "--warmup 1000" in capsys.readouterr().out


def make_run(*flags):
    """What main builds, for clips that are log-mel already: [8, 32, 128]."""
    args = train.parse_args([*TINY, *flags])
    config = JEPAConfig(time_bins=32, dim=32, depth=2, heads=2, predictor_dim=16, predictor_heads=2)
    jepa = JEPA(config, args.loss)
    torch.manual_seed(1)
    return train.Run(
        args=args,
        device=torch.device("cpu"),
        precision=torch.float32,
        rows=train.rows_of_process(args.batch_size, args.accum, 0, 1),
        log_mel=data.LogMel(time_bins=32, clip_seconds=1.25),
        model=jepa,
        trained=jepa,
        target_encoder=VisionTransformer(config),  # unlike the context encoder
        optimizer=train.make_optimizer(jepa, args.weight_decay),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )


def masks_of(run, step):
    return masking.draw_masks(
        masking.random_mask, 0, step, 8, run.model.config.grid, (0.4, 0.6), "cpu"
    )


def test_a_step_predicts_the_target_encoders_view_of_the_whole_clip():
    run = make_run()
    frames = torch.randn(8, 32, 128)
    targets = run.target_encoder(frames.unsqueeze(1))
    loss = run.model(frames.unsqueeze(1), *masks_of(run, 7), targets)
    result = train.train_step(run, 7, [frames])
    assert torch.allclose(result.targets, targets, atol=1e-6)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)


def test_a_step_moves_the_weights_by_adamw_at_the_rate_of_its_step():
    run = make_run()
    by_hand = copy.deepcopy(run)
    frames = torch.randn(8, 32, 128)
    train.train_step(run, 3, [frames])
    for group in by_hand.optimizer.param_groups:
        group["lr"] = train.learning_rate(3, 20, warmup=5)
    targets = by_hand.target_encoder(frames.unsqueeze(1))
    by_hand.model(frames.unsqueeze(1), *masks_of(by_hand, 3), targets).backward()
    by_hand.optimizer.step()
    for name, parameter in run.model.state_dict().items():
        assert torch.allclose(parameter, by_hand.model.state_dict()[name], atol=1e-7)


def test_the_target_encoder_follows_the_context_encoder_after_its_step():
    run = make_run()
    before = run.target_encoder.patch_embed.weight.clone()
    train.train_step(run, 10, [torch.randn(8, 32, 128)])
    decay = masking.ema_decay(10, 20)
    wanted = decay * before + (1 - decay) * run.model.context_encoder.patch_embed.weight
    assert torch.allclose(run.target_encoder.patch_embed.weight, wanted, atol=1e-8)


def test_a_step_without_a_finite_gradient_moves_nothing():
    run = make_run()
    before = copy.deepcopy(run.model).state_dict()
    target_before = copy.deepcopy(run.target_encoder).state_dict()
    frames = torch.randn(8, 32, 128)
    frames[3, 5, 7] = math.nan
    result = train.train_step(run, 10, [frames])
    assert not math.isfinite(result.grad_norm)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in run.target_encoder.state_dict().items():
        assert torch.equal(tensor, target_before[name])


def test_weight_decay_spares_biases_norms_and_the_mask_token():
    jepa = JEPA(SMALL)
    decaying, sparing = train.make_optimizer(jepa, 0.05).param_groups
    assert decaying["weight_decay"] == 0.05
    assert sparing["weight_decay"] == 0.0
    assert all(parameter.ndim == 2 for parameter in decaying["params"])
    assert any(parameter is jepa.predictor.mask_token for parameter in sparing["params"])
    assert len(decaying["params"]) + len(sparing["params"]) == len(list(jepa.parameters()))


def test_the_rows_of_all_processes_are_the_rows_of_the_batch():
    rows = []
    for rank in range(2):
        for part in train.rows_of_process(batch_size=16, accum=2, rank=rank, processes=2):
            rows += range(16)[part]
    assert rows == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]


# ---- Monitors


def explained_by(predictor, targets):
    """`explained` where predictor(targets) answers for normalised targets [B, N, D]."""
    targets = model.normalise_targets(targets)
    target_idx = torch.arange(targets.shape[1]).expand(len(targets), -1)
    loss = model.l2_loss(predictor(targets), targets).item()
    return train.explained(model.l2_loss, loss, targets, target_idx)


def perfect(targets):
    return targets


def mean_of_each_position(targets):
    return targets.mean(0, keepdim=True).expand_as(targets)


def mean_of_all(targets):
    return targets.mean((0, 1), keepdim=True).expand_as(targets)


def test_explained_is_1_for_a_perfect_predictor():
    assert explained_by(perfect, torch.randn(16, 12, 32)) == pytest.approx(1)


def test_explained_is_0_for_one_that_knows_positions_and_no_sound():
    targets = torch.randn(16, 12, 32) + 3 * torch.randn(1, 12, 32)  # most of it is the position
    assert explained_by(mean_of_each_position, targets) == pytest.approx(0, abs=1e-4)
    assert explained_by(mean_of_all, targets) < -1


def test_explained_does_not_praise_targets_that_depend_on_their_position_alone():
    targets = torch.randn(1, 12, 32) + 1e-4 * torch.randn(16, 12, 32)

    def nearly_perfect(targets):
        return targets + 1e-3 * torch.randn(targets.shape)

    assert explained_by(nearly_perfect, targets) < 0


@pytest.mark.parametrize("loss", model.LOSSES.values(), ids=model.LOSSES)
def test_explained_means_the_same_for_every_loss(loss):
    targets = torch.randn(16, 12, 32)
    target_idx = torch.arange(12).expand(16, -1)
    normalised = model.normalise_targets(targets)
    blind = loss(mean_of_each_position(normalised), normalised).item()
    assert train.explained(loss, 0.0, targets, target_idx) == pytest.approx(1)
    assert train.explained(loss, blind, targets, target_idx) == pytest.approx(0, abs=1e-4)


def test_monitors_of_healthy_targets():
    monitors = train.monitors(torch.randn(256, 4, 64))
    assert monitors["target_std"] == pytest.approx(0.5, abs=0.05)  # a mean over 4 tokens
    assert monitors["token_std"] > 0.7
    assert monitors["effective_rank"] > 50
    assert abs(monitors["mean_cosine"]) < 0.05


def test_monitors_see_clips_that_are_alike():
    monitors = train.monitors(torch.randn(1, 4, 64).expand(256, 4, 64))
    assert monitors["target_std"] == pytest.approx(0, abs=1e-6)
    assert monitors["effective_rank"] == 1
    assert monitors["mean_cosine"] == pytest.approx(1)


def test_monitors_see_clips_that_lie_on_a_line():
    monitors = train.monitors(torch.randn(256, 1, 1) * torch.randn(1, 4, 64))
    assert monitors["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_monitors_see_tokens_of_a_clip_that_are_alike():
    monitors = train.monitors(torch.randn(256, 1, 64).expand(256, 4, 64))
    assert monitors["token_std"] == pytest.approx(0, abs=1e-6)
    assert monitors["target_std"] > 0.9


# ---- Runs


def test_a_run_learns_logs_and_leaves_a_checkpoint_of_plain_data(reference):
    checkpoint, log = reference
    assert column(log, "step") == list(range(1, 21))
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    assert all(math.isfinite(float(value)) for row in log for value in row.values())
    assert column(log, "lr")[0] == 1e-6
    assert column(log, "lr")[5] == pytest.approx(3e-4)
    wanted = {"format", "step", "config", *NETWORKS, "optimizer", "scaler"}
    assert wanted <= set(checkpoint)
    config = JEPAConfig(**checkpoint["config"]["model"])
    VisionTransformer(config).load_state_dict(checkpoint["target_encoder"])


def test_the_log_tells_epochs_and_seconds(reference):
    _, log = reference
    assert float(log[9]["epoch"]) == pytest.approx(10 * 8 / 10000)
    assert column(log, "seconds") == sorted(column(log, "seconds"))


def test_a_run_normalises_by_what_it_measured_on_its_own_data(tmp_path):
    folder = corpus(tmp_path / "c")
    checkpoint, _ = pretrain(tmp_path / "out", "--data", folder, "--steps", 6)
    log_mel = data.LogMel(**checkpoint["config"]["log_mel"])
    clips = data.AudioClips(folder, clip_seconds=1.25)
    spectrograms = log_mel(torch.stack([clips[i] for i in range(12)]))
    assert spectrograms.mean().item() == pytest.approx(0, abs=0.1)
    assert spectrograms.std().item() == pytest.approx(1, abs=0.1)


def test_accumulation_is_the_same_run(reference, tmp_path):
    checkpoint, log = pretrain(tmp_path, "--accum", 4)
    for name in ("loss", "explained", "target_std", "token_std"):
        assert column(log, name) == pytest.approx(column(reference[1], name), rel=1e-3)
    assert same_weights(checkpoint, reference[0], tolerance=1e-4)


def test_two_processes_are_the_same_run(reference, tmp_path):
    done = run_python(*TORCHRUN, "train.py", *TINY, "--accum", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint, log = read_run(tmp_path)
    for name in ("loss", "grad_norm", "explained", "target_std", "token_std", "mean_cosine"):
        assert column(log, name) == pytest.approx(column(reference[1], name), rel=1e-3)
    assert same_weights(checkpoint, reference[0], tolerance=1e-4)  # under the same names


@pytest.mark.parametrize("source", ["synthetic", "files with a bad one, 2 workers, auto precision"])
def test_a_run_that_was_stopped_ends_bit_for_bit_like_one_that_was_not(tmp_path, source):
    flags = ["--log-every", 3]
    if source != "synthetic":
        folder = corpus(tmp_path / "c", seconds=1.0)
        (folder / "bad.wav").write_text("no audio")
        flags += ["--data", folder, "--workers", 2, "--amp", "auto"]
    whole, whole_log = pretrain(tmp_path / "whole", *flags)
    stopped, _ = interrupted(tmp_path / "parts", 6, *flags)
    assert stopped["step"] < 20
    parts, parts_log = pretrain(tmp_path / "parts", *flags)
    assert same_weights(whole, parts)
    assert without_clocks(whole_log) == without_clocks(parts_log)
    for one, other in zip(
        whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True
    ):
        assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])


def test_a_run_that_was_killed_ends_bit_for_bit_like_one_that_was_not(tmp_path, reference):
    command = [sys.executable, "train.py", *TINY, "--save-every", "5", "--out", str(tmp_path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in the process of the tests
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, env=one_thread) as process:
        wait_for_step(tmp_path, 12)
        process.kill()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] % 5 == 0
    checkpoint, log = pretrain(tmp_path, "--save-every", 5)
    assert same_weights(checkpoint, reference[0])
    assert column(log, "loss") == column(reference[1], "loss")


def test_torchrun_restarts_a_run_whose_process_was_killed(tmp_path):
    restarts = ["--max-restarts=3", "--monitor-interval=0.2"]
    flags = [*TINY, "--save-every", "5", "--out", str(tmp_path)]
    command = [sys.executable, *TORCHRUN, *restarts, "train.py", *flags]
    with subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as launcher:
        wait_for_step(tmp_path, 7)
        found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        assert launcher.wait(180) == 0
    checkpoint, log = read_run(tmp_path)
    assert checkpoint["step"] == 20
    assert column(log, "step") == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_run_within_the_step(tmp_path, number):
    command = [sys.executable, "train.py", *TINY, "--steps", "100000", "--workers", "2"]
    command += ["--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        wait_for_step(tmp_path, 3)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "of 100000 steps done" in printed
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 3


def test_a_signal_while_the_data_is_measured_is_heard(tmp_path):
    command = [sys.executable, "train.py", *TINY, "--clip-seconds", "10", "--batch-size", "2"]
    command += ["--workers", "2", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        assert "measuring" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "of 20 steps done" in printed


def test_main_leaves_the_signal_handlers_of_its_caller(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    pretrain(tmp_path, "--steps", 6)
    assert signal.getsignal(signal.SIGTERM) is before


def test_checkpoints_are_kept_under_their_step_without_the_optimizer(tmp_path):
    pretrain(tmp_path, "--save-every", 8)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last.pt", "log.csv", "step-0000008.pt", "step-0000016.pt"]
    kept = torch.load(tmp_path / "step-0000008.pt", weights_only=True)
    assert kept["step"] == 8
    assert "optimizer" not in kept
    assert extract.load_encoder(tmp_path / "step-0000008.pt").step == 8


def test_a_log_without_its_checkpoint_is_begun_anew(tmp_path, reference):
    (tmp_path / "log.csv").write_text("step,loss\n1,3\n2,")
    _, log = pretrain(tmp_path)
    assert column(log, "loss") == column(reference[1], "loss")


def test_a_changed_setting_is_named_and_refused(tmp_path, capsys):
    pretrain(tmp_path, "--steps", 6)
    changes = [
        ["--lr", "0.001"],
        ["--seed", "1"],
        ["--mask-ratio", "0.3", "0.6"],
        ["--model", "small"],
        ["--steps", "30"],
        ["--amp", "bf16"],
        ["--data", str(corpus(tmp_path / "c"))],
    ]
    for change in changes:
        flags = [*TINY, "--steps", "6", "--out", tmp_path]
        assert change[0] in error_line(capsys, *flags, *change)


def test_a_folder_that_has_lost_its_last_checkpoint_is_not_begun_anew(tmp_path, capsys):
    pretrain(tmp_path, "--save-every", 8)
    (tmp_path / "last.pt").unlink()
    assert "last.pt" in error_line(capsys, *TINY, "--out", tmp_path)
    assert (tmp_path / "log.csv").exists()


def test_a_run_goes_on_with_the_recordings_that_it_began_with(tmp_path):
    folder = corpus(tmp_path / "c")
    interrupted(tmp_path / "out", 5, "--data", folder)
    soundfile.write(folder / "another.wav", tone(), 32000)
    checkpoint, _ = pretrain(tmp_path / "out", "--data", folder)
    assert checkpoint["step"] == 20


def test_whole_file_keeps_what_was_there_when_writing_fails(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("before")
    with pytest.raises(OSError, match=r"last\.pt.*disk is full"):
        with data.whole_file(path) as file:
            file.write(b"half")
            raise OSError("disk is full")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


# ---- Choices


@pytest.mark.parametrize(
    "flags",
    [
        ["--mask", "block"],
        ["--loss", "cosine"],
        ["--loss", "smooth_l1"],
        ["--amp", "bf16"],
        ["--sample-rate", "16000"],
    ],
    ids=" ".join,
)
def test_every_choice_trains(tmp_path, flags):
    _, log = pretrain(tmp_path, *flags)
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    assert log[-1]["skipped"] == "0"


def test_fp16_finds_its_scale_by_skipping_steps(tmp_path):
    _, log = pretrain(tmp_path, "--amp", "fp16")
    assert int(log[-1]["skipped"]) < 10
    assert log[-1]["skipped"] == log[-5]["skipped"]


def test_auto_precision_is_kept_when_a_run_is_continued(tmp_path):
    stopped, _ = interrupted(tmp_path, 5, "--amp", "auto")
    chosen = stopped["settings"]["amp"]
    other = {"bf16": "off", "off": "bf16"}[chosen]
    stopped["settings"]["amp"] = other  # as if it had begun on another machine
    torch.save(stopped, tmp_path / "last.pt")
    checkpoint, _ = pretrain(tmp_path, "--amp", "auto")
    assert checkpoint["settings"]["amp"] == other


def test_compiled_networks_train_like_eager_ones(tmp_path):
    flags = ["--steps", "6", "--batch-size", "4", "--mask-ratio", "0.5", "0.5"]
    _, eager = pretrain(tmp_path / "eager", *flags)
    checkpoint, compiled = pretrain(tmp_path / "compiled", *flags, "--compile")
    assert column(compiled, "loss") == pytest.approx(column(eager, "loss"), rel=1e-3)
    config = JEPAConfig(**checkpoint["config"]["model"])
    VisionTransformer(config).load_state_dict(checkpoint["context_encoder"])  # no _orig_mod.


def test_a_packed_folder_trains(tmp_path):
    frames = np.random.default_rng(0).standard_normal((300, 128))
    _, log = pretrain(tmp_path / "out", "--data", packed(tmp_path / "p", frames))
    assert float(log[-1]["loss"]) < float(log[0]["loss"])


def test_the_benchmark_measures_and_writes_nothing(tmp_path, capsys):
    train.main([*TINY, "--benchmark", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for word in ("reading", "log-mel", "step alone", "all together", "TFLOP/s", "GiB"):
        assert word in printed
    assert not list(tmp_path.iterdir())


# ---- Bad input and bad luck


def test_a_nan_that_one_process_reads_makes_all_skip_the_step(tmp_path):
    frames = np.random.default_rng(0).standard_normal((64, 128))
    frames[32:] = math.nan
    order = data.clip_order(640, 0, 32, range(20), [slice(0, 32)])
    bad_clips = list(order)[9][:4]  # rows of the first process, met after mean and std are measured
    bad_places = [i for _, i in bad_clips]
    places = [32 if i in bad_places else 0 for i in range(640)]
    folder = packed(tmp_path / "p", frames, places, length=32)
    flags = [*TINY, "--batch-size", 32, "--data", folder, "--out", tmp_path / "out"]
    done = run_python(*TORCHRUN, "train.py", *flags)
    assert done.returncode == 0, done.stderr
    _, log = read_run(tmp_path / "out")
    # A process that did not skip would have weights of NaN, and no further step would be finite.
    assert column(log, "skipped") == [0] * 9 + [1] * 11


def test_twenty_steps_without_a_finite_gradient_stop_a_run(tmp_path, capsys):
    frames = np.full((300, 128), math.nan)
    with pytest.raises(SystemExit) as stopped:
        pretrain(tmp_path / "out", "--steps", 40, "--data", packed(tmp_path / "p", frames))
    assert stopped.value.code == 1
    assert "20 steps" in capsys.readouterr().err
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_bad_recording_is_replaced_and_listed_once(tmp_path):
    folder = corpus(tmp_path / "c", 30, seconds=1.25)
    (folder / "bad.wav").write_text("no audio")
    _, log = pretrain(tmp_path / "out", "--data", folder)
    lines = (tmp_path / "out" / "bad_files.txt").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bad.wav\t")
    assert int(log[-1]["bad_files"]) >= 5  # it was met once an epoch


def test_a_set_that_is_mostly_bad_stops_the_run(tmp_path, capsys):
    folder = corpus(tmp_path / "c", 4)
    for i in range(2):
        (folder / f"bad {i}.wav").write_text("no audio")
    with pytest.raises(SystemExit) as stopped:
        pretrain(tmp_path / "out", "--data", folder)
    assert stopped.value.code == 1
    assert "cannot be used" in capsys.readouterr().err


def test_a_set_that_is_all_bad_stops_the_run_in_one_line(tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"{i}.wav").write_text("no audio")
    error = error_line(capsys, *TINY, "--out", tmp_path / "out", "--data", tmp_path)
    assert "can be used" in error


def test_what_is_wrong_with_the_data_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("gone.wav\n")
    (tmp_path / "x.bin").write_bytes(b"\0")
    for name in ("nowhere", "empty", "list.txt", "x.bin"):
        path = tmp_path / name
        error = error_line(capsys, *TINY, "--out", tmp_path / "out", "--data", path)
        assert str(path) in error


@pytest.mark.parametrize(
    "flags,hint",
    [
        ("--batch-size 10 --accum 4", "--accum 4"),
        ("--mask-ratio 0 0.5", "--mask-ratio"),
        ("--steps many", "--steps"),
        ("--sample-rate 44100", "44032 or 44160"),
        ("--clip-seconds 4", "3.75 or 4.375"),
        ("--model huge", "huge"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_what_is_wrong_with_the_flags_is_said_in_one_line(tmp_path, capsys, flags, hint):
    assert hint in error_line(capsys, *TINY, "--out", tmp_path, *flags.split())


@pytest.mark.parametrize("damage", ["half", "empty", "text", "another format"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, capsys, damage):
    path = tmp_path / "last.pt"
    torch.save({"format": "another 7"}, path)
    if damage != "another format":
        whole = path.read_bytes()
        content = {"half": whole[: len(whole) // 2], "empty": b"", "text": b"text"}
        path.write_bytes(content[damage])
    assert "last.pt" in error_line(capsys, *TINY, "--out", tmp_path)


class Hostile:
    """An object whose loading would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_is_not_executed(tmp_path, capsys):
    torch.save(Hostile(tmp_path / "executed"), tmp_path / "last.pt")
    assert "last.pt" in error_line(capsys, *TINY, "--out", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_world_size_without_a_launcher_is_one_process(tmp_path, reference):
    done = run_python("train.py", *TINY, "--out", tmp_path, env={"WORLD_SIZE": "4"})
    assert done.returncode == 0, done.stderr
    _, log = read_run(tmp_path)
    assert column(log, "loss") == pytest.approx(column(reference[1], "loss"), rel=1e-4)


# ================================================================================================
# extract.py


# ================================================================================================
# The project


@pytest.mark.parametrize("name", ["model", "masking", "data"])
def test_a_file_that_is_copied_alone_imports(tmp_path, name):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    command = [sys.executable, "-c", f"import {name}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def readme_block(mark):
    """The first code block of the README below a mark."""
    below = (HERE / "README.md").read_text().split(f"<!-- {mark} -->")[1]
    return re.search(r"```\w*\n(.*?)```", below, re.S)[1]


def test_the_paper_in_20_lines_runs_with_two_copied_files(tmp_path):
    shutil.copy(HERE / "model.py", tmp_path)
    shutil.copy(HERE / "masking.py", tmp_path)
    (tmp_path / "toy.py").write_text(readme_block("toy"))
    command = [sys.executable, "toy.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_the_demonstrations_run():
    assert "85.35 M" in run_python("model.py").stdout
    drawn = run_python("masking.py").stdout
    assert drawn.count("#") > 2 * 51


def test_every_flag_in_the_readme_exists():
    scripts = ("train.py", "data.py", "extract.py")
    help_texts = [run_python(script, "--help").stdout for script in scripts]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (HERE / "README.md").read_text()))
    of_others = {"--nproc", "--standalone", "--max-jobs", "--max-restarts", "--shm-size"}
    missing = [flag for flag in named - of_others if flag not in "".join(help_texts)]
    assert missing == []


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_the_log_mel_of_a_gpu_is_that_of_a_cpu():
    log_mel = data.LogMel()
    waveform = torch.from_numpy(np.stack([noise(10), tone(10)]))
    on_cpu = log_mel(waveform)
    on_gpu = log_mel.to("cuda")(waveform.to("cuda")).cpu()
    assert (on_gpu - on_cpu).abs().max() < 0.01  # tf32 is allowed there


@needs_gpu
@pytest.mark.parametrize("flags", ["--amp auto", "--amp fp16", "--compile"])
def test_a_gpu_trains(tmp_path, flags):
    _, log = pretrain(tmp_path, *flags.split())
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
