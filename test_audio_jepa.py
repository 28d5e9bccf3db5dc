# SPDX-License-Identifier: MIT
"""What this project claims, as an executable specification: one claim a test, by the file that makes it.

    python -m pytest -q -rs
    HEAVY=1 python -m pytest -q -k heavy      20 kills, 3000 steps: tens of minutes

model.py    sizes, positions, initialisation, what each network sees, the loss, where gradients go
masking.py  random and block masks, their reproducibility, the EMA and its schedule
data.py     log-mel against Kaldi, every kind of input, clips, windows, filling up, bad files, packing
train.py    schedules, monitors; one process = several = accumulation = resume; faults; bad input
extract.py  embeddings whatever the batching, probes, X-ARES, the authors' checkpoint, hostile files
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

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
heavy = pytest.mark.skipif(
    "HEAVY" not in os.environ, reason="takes tens of minutes: HEAVY=1 runs it"
)
torch.set_num_threads(1)  # networks this small gain nothing from more
SMALL = JEPAConfig(
    time_bins=64,
    mel_bins=48,
    dim=32,
    depth=2,
    heads=2,
    predictor_dim=16,
    predictor_depth=2,
    predictor_heads=2,
)  # a grid of 4 x 3


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------- model.py


def count(module):
    return sum(tensor.numel() for tensor in module.state_dict().values())


def test_the_defaults_have_the_papers_size():
    with torch.device("meta"):
        assert round(count(VisionTransformer(JEPAConfig())) / 1e6, 2) == 85.35
        assert round(count(Predictor(JEPAConfig())) / 1e6, 2) == 11.29
    assert PRESETS["base"] == JEPAConfig() and JEPAConfig().grid == (16, 8)


def test_position_table_has_mel_in_its_first_half_and_time_in_its_second():
    table = model.sincos_positions(32, (4, 3)).view(4, 3, 32)
    assert torch.equal(table[0, :, :16], table[3, :, :16]) and torch.equal(
        table[:, 0, 16:], table[:, 2, 16:]
    )
    assert len(table.reshape(12, 32).unique(dim=0)) == 12


def test_position_table_is_the_formula():
    table, f, t, k = model.sincos_positions(32, (4, 3)), 2, 3, 5
    token = table[t * 3 + f]
    wanted = [fn(p / 10000 ** (k / 8)) for p in (f, t) for fn in (math.sin, math.cos)]
    assert torch.allclose(token[[k, 8 + k, 16 + k, 24 + k]], torch.tensor(wanted))


def test_a_token_is_one_patch_in_time_major_order():
    spectrogram = torch.arange(64.0).view(1, 1, 64, 1) // 16 * 3 + torch.arange(48.0) // 16
    patches = VisionTransformer(SMALL).patchify(spectrogram)
    assert torch.equal(patches, torch.arange(12.0).view(1, 12, 1).expand(1, 12, 256))


def test_gather_is_the_naive_loop():
    tokens, idx = torch.randn(3, 12, 5), torch.stack([torch.randperm(12)[:4] for _ in range(3)])
    naive = torch.stack([torch.stack([tokens[b, i] for i in idx[b]]) for b in range(3)])
    assert torch.equal(model.gather_tokens(tokens, idx), naive)


def test_the_context_encoder_sees_only_visible_patches():
    encoder, spectrogram = VisionTransformer(SMALL), torch.randn(2, 1, 64, 48)
    context_idx, target_idx = masking.random_mask(2, SMALL.grid, 5, generator())
    changed = spectrogram.clone()
    for b, n in ((b, n) for b in range(2) for n in target_idx[b].tolist()):
        t, f = n // 3 * 16, n % 3 * 16
        changed[b, 0, t : t + 16, f : f + 16] += 1
    assert torch.equal(encoder(spectrogram, context_idx), encoder(changed, context_idx))
    assert not torch.allclose(encoder(spectrogram), encoder(changed))


def test_all_indices_in_order_are_no_mask():
    encoder, spectrogram = VisionTransformer(SMALL), torch.randn(2, 1, 64, 48)
    assert torch.allclose(
        encoder(spectrogram, torch.arange(12).expand(2, 12)), encoder(spectrogram), atol=1e-6
    )


def test_clips_of_a_batch_do_not_meet():
    encoder, spectrogram = VisionTransformer(SMALL), torch.randn(4, 1, 64, 48)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(encoder(spectrogram)[order], encoder(spectrogram[order]), atol=1e-6)


def test_a_prediction_changes_with_the_position_it_is_asked_for():
    predictor, context = Predictor(SMALL), torch.randn(1, 6, 32)
    context_idx = torch.arange(6).unsqueeze(0)
    one, other = (predictor(context, context_idx, torch.tensor([[n]])) for n in (7, 11))
    assert (one - other).abs().max() > 1e-4


def test_predictions_follow_the_order_of_their_indices():
    predictor, context, context_idx = (
        Predictor(SMALL),
        torch.randn(1, 6, 32),
        torch.arange(6).unsqueeze(0),
    )
    forth, back = (
        predictor(context, context_idx, torch.tensor([idx])) for idx in ([7, 9, 11], [11, 9, 7])
    )
    assert torch.allclose(forth, back.flip(1), atol=1e-6)


def test_weights_start_with_the_std_that_is_claimed():
    for network in (VisionTransformer(PRESETS["tiny"]), Predictor(PRESETS["base"])):
        for i, block in enumerate(network.blocks, start=1):
            assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
            for projection in (block.attn.proj, block.mlp.fc2):
                assert projection.weight.std().item() == pytest.approx(
                    0.02 / math.sqrt(2 * i), rel=0.05
                )
                assert not projection.bias.any()


def test_the_loss_is_equation_2_on_normalised_targets():
    jepa = JEPA(SMALL)
    spectrogram, targets = torch.randn(2, 1, 64, 48), torch.randn(2, 12, 32) * 7 + 3
    context_idx, target_idx = masking.random_mask(2, SMALL.grid, 5, generator())
    predictions = jepa.predictor(
        jepa.context_encoder(spectrogram, context_idx), context_idx, target_idx
    )
    total = 0.0
    for b in range(2):
        for j, n in enumerate(target_idx[b]):
            t = targets[b, n]
            t = (t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt()
            total += (predictions[b, j] - t).square().sum() / 10
    assert torch.allclose(jepa(spectrogram, context_idx, target_idx, targets), total, rtol=1e-5)


def test_targets_may_come_whole_or_masked():
    jepa, spectrogram, targets = JEPA(SMALL), torch.randn(2, 1, 64, 48), torch.randn(2, 12, 32)
    masks = masking.random_mask(2, SMALL.grid, 5, generator())
    masked = model.gather_tokens(targets, masks[1])
    assert torch.equal(jepa(spectrogram, *masks, targets), jepa(spectrogram, *masks, masked))


def test_the_scale_of_the_targets_cannot_lower_the_loss():
    for loss in model.LOSSES:
        jepa, spectrogram, targets = (
            JEPA(SMALL, loss),
            torch.randn(2, 1, 64, 48),
            torch.randn(2, 12, 32),
        )
        masks = masking.random_mask(2, SMALL.grid, 5, generator())
        one, shrunk = jepa(spectrogram, *masks, targets), jepa(spectrogram, *masks, targets * 0.1)
        assert torch.allclose(one, shrunk, rtol=1e-2) and one.shape == ()


def test_cosine_loss_is_zero_for_equal_directions_and_four_for_opposite_ones():
    x = torch.randn(2, 5, 32)
    assert model.cosine_loss(3 * x, x).item() == pytest.approx(0, abs=1e-5)
    assert model.cosine_loss(-x, x).item() == pytest.approx(4, abs=1e-5)


def test_gradients_reach_every_trained_weight_and_no_target():
    jepa, target_encoder = JEPA(SMALL), VisionTransformer(SMALL)
    spectrogram = torch.randn(2, 1, 64, 48)
    masks = masking.random_mask(2, SMALL.grid, 5, generator())
    jepa(spectrogram, *masks, target_encoder(spectrogram)).backward()
    assert all(parameter.grad is not None for parameter in jepa.parameters())
    assert all(parameter.grad is None for parameter in target_encoder.parameters())


def test_the_loss_is_computed_in_fp32_under_autocast():
    jepa, targets = JEPA(SMALL), torch.randn(2, 12, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = jepa(
            torch.randn(2, 1, 64, 48), *masking.random_mask(2, SMALL.grid, 5, generator()), targets
        )
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    "wrong",
    [
        dict(time_bins=250),
        dict(mel_bins=100),
        dict(dim=100),
        dict(predictor_heads=7),
        dict(depth=0),
        dict(heads=-1),
        dict(dim="768"),
        dict(depth=10**9),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_construction(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        JEPAConfig(**wrong)


def test_a_spectrogram_of_another_size_is_refused():
    with pytest.raises(ValueError, match="64 x 48"):
        VisionTransformer(SMALL)(torch.randn(1, 1, 64, 64))


# ---------------------------------------- masking.py

STRATEGIES = pytest.mark.parametrize("strategy", [masking.random_mask, masking.block_mask])


@STRATEGIES
@pytest.mark.parametrize(
    "grid,num_masked", [((16, 8), 51), ((16, 8), 77), ((1, 8), 3), ((48, 5), 100), ((16, 8), 1)]
)
def test_context_and_target_are_disjoint_and_complete(strategy, grid, num_masked):
    context_idx, target_idx = strategy(7, grid, num_masked, generator())
    assert target_idx.shape == (7, num_masked) and target_idx.dtype == torch.int64
    everything = torch.cat([context_idx, target_idx], 1).sort(1).values
    assert torch.equal(everything, torch.arange(grid[0] * grid[1]).expand(7, -1))


@STRATEGIES
def test_every_clip_has_a_mask_of_its_own(strategy):
    _, target_idx = strategy(64, (16, 8), 60, generator())
    assert len(target_idx.unique(dim=0)) == 64


def test_random_masks_hide_every_patch_equally_often():
    _, target_idx = masking.random_mask(20000, (16, 8), 64, generator())
    counts = target_idx.flatten().bincount(minlength=128)
    assert ((counts - 10000).abs() < 5 * math.sqrt(20000 * 0.25)).all()  # 5 sigma


def test_random_masks_hide_neighbours_independently():
    _, target_idx = masking.random_mask(20000, (16, 8), 64, generator())
    hidden = torch.zeros(20000, 128).scatter_(1, target_idx, 1.0)
    both = (hidden[:, 60] * hidden[:, 61]).mean().item()
    assert both == pytest.approx(64 / 128 * 63 / 127, abs=0.02)


def test_block_masks_reach_the_edges_and_favour_no_corner():
    _, target_idx = masking.block_mask(20000, (16, 8), 64, generator())
    share = target_idx.flatten().bincount(minlength=128).view(16, 8) / 20000
    assert share.min() > 0.05  # a corner belongs to few rectangles, but to some
    for flipped in (share.flip(0), share.flip(1)):
        assert (share - flipped).abs().max() < 0.03


def test_block_masks_are_made_of_blocks():
    def equal_neighbours(strategy):
        _, target_idx = strategy(500, (16, 8), 64, generator())
        hidden = torch.zeros(500, 128).scatter_(1, target_idx, 1.0).view(500, 16, 8)
        return (hidden[:, 1:] == hidden[:, :-1]).float().mean().item()

    assert equal_neighbours(masking.block_mask) > 0.8 > 0.6 > equal_neighbours(masking.random_mask)


@STRATEGIES
def test_masks_are_a_pure_function_of_seed_and_step(strategy):
    def draw(seed, step):
        torch.rand(3)  # the global generator has no say
        return masking.draw_masks(strategy, seed, step, 8, (16, 8), (0.5, 0.5), "cpu")[1]

    assert torch.equal(draw(1, 5), draw(1, 5))
    assert not any(
        torch.equal(a, b)
        for a, b in itertools.combinations([draw(1, 5), draw(1, 6), draw(2, 5)], 2)
    )


def test_the_masked_share_is_drawn_once_a_step_over_its_whole_range():
    counts = {
        masking.draw_masks(masking.random_mask, 0, step, 2, (16, 8), (0.4, 0.6), "cpu")[1].shape[1]
        for step in range(1000)
    }
    assert counts == set(range(51, 78))


def test_no_mask_is_empty_and_none_is_all():
    for num_masked in (0, 128):
        with pytest.raises(ValueError, match="patches masked"):
            masking.random_mask(2, (16, 8), num_masked, generator())
    for ratio in ((0.001, 0.001), (0.999, 0.999)):
        context_idx, target_idx = masking.draw_masks(
            masking.random_mask, 0, 0, 2, (1, 4), ratio, "cpu"
        )
        assert context_idx.shape[1] >= 1 and target_idx.shape[1] >= 1


def test_ema_decay_is_byols_cosine():
    assert masking.ema_decay(0, 100) == pytest.approx(0.996, abs=1e-12)
    assert masking.ema_decay(50, 100) == pytest.approx(0.998, abs=1e-12)
    assert masking.ema_decay(100, 100) == masking.ema_decay(101, 100) == 1
    assert masking.ema_decay(0, 100, base=0.9) == pytest.approx(0.9)


def test_ema_equals_its_closed_form():
    target, context = VisionTransformer(SMALL), VisionTransformer(SMALL)
    start = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    for _ in range(10):
        masking.update_ema(target, context, 0.9)
    for name, tensor in target.state_dict().items():
        assert torch.allclose(
            tensor, 0.9**10 * start[name] + (1 - 0.9**10) * context.state_dict()[name], atol=1e-6
        )


def test_ema_covers_buffers_and_refuses_other_names():
    target, context = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    context(torch.randn(8, 3))
    masking.update_ema(target, context, 0.5)
    assert (
        torch.allclose(target.running_mean, 0.5 * context.running_mean)
        and target.num_batches_tracked == 1
    )
    with pytest.raises(ValueError, match="running_mean"):
        masking.update_ema(target, torch.nn.LayerNorm(3), 0.5)


def test_ema_at_one_moves_nothing():
    target, context = VisionTransformer(SMALL), VisionTransformer(SMALL)
    start = target.patch_embed.weight.clone()
    masking.update_ema(target, context, 1.0)
    assert torch.equal(target.patch_embed.weight, start)


# ---------------------------------------- data.py


def tone(seconds=1.0, rate=32000, hertz=440.0):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


def noise(seconds, rate=32000, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(
        np.float32
    )


def corpus(folder, clips=12, seconds=2.0):
    """A folder of short wav files that sound different."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(clips):
        soundfile.write(
            folder / f"{i:03d}.wav",
            tone(seconds, hertz=200 + 70 * i) + noise(seconds, seed=i) / 4,
            32000,
        )
    return folder


@pytest.mark.parametrize("rate,mels", [(32000, 128), (16000, 80), (48000, 64)])
def test_log_mel_is_kaldis(rate, mels):
    from torchaudio.compliance import kaldi

    waveform = torch.from_numpy(
        np.stack([noise(10, rate), tone(10, rate) + 0.2, np.zeros(10 * rate, np.float32)])
    )
    hop = rate * 10 / 256
    wanted = torch.stack(
        [
            kaldi.fbank(
                x[None],
                sample_frequency=rate,
                num_mel_bins=mels,
                frame_shift=1000 * hop / rate,
                frame_length=1000 * int(2.5 * hop) / rate,
                snip_edges=False,
                dither=0.0,
                window_type="hanning",
                low_freq=20,
            )
            for x in waveform
        ]
    )
    ours = data.LogMel(rate, mel_bins=mels)(waveform)
    assert ours.shape == (3, 1, 256, mels)
    assert (ours[:, 0] - wanted).abs().max() < 1e-3


def test_the_log_mel_of_a_clip_depends_on_neither_company_nor_threads():
    log_mel, waveform = (
        data.LogMel(),
        torch.from_numpy(np.stack([noise(10, seed=n) for n in range(5)])),
    )
    alone = torch.cat([log_mel(row[None]) for row in waveform])
    torch.set_num_threads(2)
    try:
        both = log_mel(waveform), torch.cat([log_mel(row[None]) for row in waveform])
    finally:
        torch.set_num_threads(1)
    assert all((made - alone).abs().max() < 1e-6 for made in both)


def test_silence_has_a_finite_log_mel():
    assert torch.allclose(data.LogMel()(torch.zeros(1, 320000)), torch.tensor(math.log(data.FLOOR)))


def test_no_mel_filter_is_empty():
    for rate in (16000, 32000, 48000):
        assert (data.LogMel(rate).filters.sum(0) > 0).all()


def test_normalisation_is_mean_and_std():
    raw, waveform = data.LogMel(), torch.from_numpy(noise(10))[None]
    assert torch.allclose(
        data.LogMel(mean=-5.0, std=2.0)(waveform), (raw(waveform) + 5) / 2, atol=1e-5
    )


def test_a_patch_is_625_ms_at_every_clip_length():
    for seconds in (0.625, 1.25, 5.0, 30.0):
        frames = data.LogMel(32000, seconds, round(seconds * 25.6))(
            torch.zeros(1, round(seconds * 32000))
        )
        assert frames.shape == (1, 1, round(seconds * 25.6), 128)


def test_a_hop_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match="not whole"):
        data.LogMel(44100)


def test_every_layout_of_data_gives_the_same_recordings(tmp_path):
    folder = corpus(tmp_path / "a" / "deep", 5)
    names = [f"a/deep/{i:03d}.wav" for i in range(5)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f'"{name}",x\n' for name in names))
    (tmp_path / "list.tsv").write_text("".join(f"{folder}/{i:03d}.wav\tx\n" for i in range(5)))
    (tmp_path / "shards").mkdir()
    for k, some in enumerate((range(2), range(2, 5))):
        with tarfile.open(tmp_path / "shards" / f"{k}.tar", "w") as tar:
            for i in some:
                tar.add(folder / f"{i:03d}.wav", f"{i:03d}.wav")
    sets = [
        data.AudioClips(tmp_path / name)
        for name in ("a", "list.txt", "list.csv", "list.tsv", "shards")
    ]
    for clips in sets:
        assert len(clips) == 5 and clips.name(3).endswith("003.wav")
        assert all(torch.equal(clips[i], sets[0][i]) for i in range(5))


@pytest.mark.parametrize(
    "suffix,options",
    [
        ("wav", dict(subtype="PCM_24")),
        ("wav", dict(subtype="PCM_U8")),
        ("flac", {}),
        ("ogg", {}),
        ("opus", dict(format="OGG", subtype="OPUS")),
        ("mp3", {}),
        ("aiff", {}),
        ("wav", dict(subtype="FLOAT")),
    ],
)
def test_every_format_is_read(tmp_path, suffix, options):
    wave = tone(1, 48000)
    soundfile.write(tmp_path / f"x.{suffix}", np.stack([wave, 0.5 * wave], 1), 48000, **options)
    (window,) = data.AudioFiles(tmp_path, [f"x.{suffix}".encode()], 48000).windows(0, 10 * 48000)
    best = max(
        np.corrcoef(0.75 * wave[:40000], window[k : k + 40000])[0, 1]
        for k in range(0, 2500, 1)
        if len(window) >= k + 40000
    )
    assert abs(len(window) - 48000) < 3000 and best > 0.97
    assert window.std() == pytest.approx(0.75 * wave.std(), rel=0.1)


@pytest.mark.parametrize("rate", [5000, 8000, 22050, 44100, 48000, 44099])
def test_resampling_keeps_pitch_and_length(rate):
    made = data.resample(tone(2, rate), rate, 32000)
    assert abs(len(made) - 64000) <= 1
    spectrum = np.abs(np.fft.rfft(made * np.hanning(len(made))))
    assert spectrum.argmax() / 2 == pytest.approx(440, abs=1)
    assert np.abs(made[2000:-2000] - tone(2)[2000 : len(made) - 2000]).max() < 0.01


def test_the_resampling_kernel_is_built_once_a_rate():
    assert data.resampler(44100, 32000) is data.resampler(44100, 32000)


def test_a_clip_is_a_pure_function_of_seed_epoch_and_index(tmp_path):
    for clips in (
        data.AudioClips(corpus(tmp_path / "c"), clip_seconds=1.25),
        data.SyntheticClips(clip_seconds=1.25),
    ):
        clips.set_epoch(3)
        first = clips[2]
        clips[5], clips.set_epoch(4)
        assert not torch.equal(clips[2], first)
        clips.set_epoch(3)
        assert (
            torch.equal(clips[2], first)
            and first.dtype == torch.float32
            and first.shape == (40000,)
        )
        assert torch.equal(clips.__getitems__([(3, 2), (4, 0)])[0][0], first)


def test_any_data_loader_takes_the_clips(tmp_path):
    clips = data.AudioClips(corpus(tmp_path / "c", 5), clip_seconds=2.5)
    (batch,) = torch.utils.data.DataLoader(clips, batch_size=5, num_workers=1)
    assert torch.equal(batch, torch.stack([clips[i] for i in range(5)]))


def test_a_clip_is_the_readers_own_to_change(tmp_path):
    data.pack(corpus(tmp_path / "c", 2, seconds=10), tmp_path / "p", 32000)
    for path in (tmp_path / "c", tmp_path / "p"):
        clips = data.AudioClips(path)
        before = clips[0].clone()
        clips[0].zero_()
        assert before.any() and torch.equal(clips[0], before)


def test_windows_of_a_long_recording_reach_every_second(tmp_path):
    soundfile.write(tmp_path / "ramp.wav", np.linspace(-0.9, 0.9, 60 * 8000), 8000, subtype="FLOAT")
    clips, starts = data.AudioClips(tmp_path, 8000), []
    for epoch in range(200):
        clips.set_epoch(epoch)
        starts.append(clips[0][0].item())
    assert min(starts) < -0.8 and 0.5 < max(starts) < 0.61  # a window starts at 50 s at the latest


def test_a_short_recording_is_filled_up_with_others(tmp_path):
    for i in range(3):
        soundfile.write(
            tmp_path / f"{i}.wav", np.full(3 * 32000, (i + 1) / 10), 32000, subtype="FLOAT"
        )
    clips = data.AudioClips(tmp_path)
    clip = clips[1]
    assert clip.shape == (320000,) and (clip[:96000] == 0.2).all() and (clip > 0.05).all()


def test_only_a_rest_of_less_than_a_patch_is_silent(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.full(int(9.5 * 32000), 0.5), 32000, subtype="FLOAT")
    clip = data.AudioClips(tmp_path)[0]
    assert (clip[: int(9.5 * 32000)] == 0.5).all() and not clip[int(9.5 * 32000) :].any()


def test_a_set_of_clicks_ends(tmp_path):
    soundfile.write(tmp_path / "click.wav", np.ones(1), 32000)
    assert data.AudioClips(tmp_path)[0].shape == (320000,)


def break_file(path, how):
    """Something that is named like audio and cannot be used."""
    wave = noise(3)
    if how == "empty":
        path.with_suffix(".wav").write_bytes(b"")
    elif how == "text":
        path.with_suffix(".wav").write_text("this is no audio\n" * 100)
    elif how == "no samples":
        soundfile.write(path.with_suffix(".wav"), wave[:0], 32000)
    elif how in ("nan", "inf"):
        wave[::1000] = float(how)
        soundfile.write(path.with_suffix(".wav"), wave, 32000, subtype="FLOAT")
    elif how == "dangling":
        path.with_suffix(".wav").symlink_to(path.with_suffix(".gone"))
    else:  # "cut" and a format
        whole = path.with_suffix("." + how.split()[1])
        options = dict(format="OGG", subtype="OPUS") if whole.suffix == ".opus" else {}
        soundfile.write(whole, noise(3, 48000), 48000, **options)
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


BROKEN = [
    "empty",
    "text",
    "no samples",
    "nan",
    "inf",
    "dangling",
    "cut wav",
    "cut flac",
    "cut ogg",
    "cut opus",
    "cut mp3",
    "cut aiff",
]


@pytest.mark.parametrize("how", BROKEN)
def test_a_bad_recording_is_replaced_and_reported(tmp_path, how):
    break_file(tmp_path / "a bad", how)
    soundfile.write(tmp_path / "good.wav", np.full(320000, 0.5), 32000, subtype="FLOAT")
    clips = data.AudioClips(tmp_path)
    batch, tried, bad = clips.__getitems__([(0, 0)])
    assert len(clips) == 2 and tried == len(bad) + 1
    assert {name for name, _ in bad} == {clips.name(0)} and bad[0][1]
    assert (batch == 0.5).all()


def promise(path, samples):
    """Raise what the last page of an Ogg file says of its length."""
    content = bytearray(path.read_bytes())
    page = content.rindex(b"OggS")
    length = int.from_bytes(content[page + 6 : page + 14], "little") + samples
    content[page + 6 : page + 14], content[page + 22 : page + 26] = (
        length.to_bytes(8, "little"),
        bytes(4),
    )
    crc = 0  # as libogg counts it
    for byte in content[page:]:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x104C11DB7 if crc & 1 << 31 else 0)
    content[page + 22 : page + 26] = crc.to_bytes(4, "little")
    path.write_bytes(content)


def test_an_ogg_that_ends_a_little_early_is_read_and_one_that_ends_far_too_early_is_not(tmp_path):
    for name, samples in (("a little.ogg", 3000), ("far.ogg", 100000)):
        soundfile.write(tmp_path / name, tone(10), 32000)
        promise(tmp_path / name, samples)
    clips = data.AudioClips(tmp_path)
    assert [clips.name(i) for i in range(2)] == ["a little.ogg", "far.ogg"]
    with clips.source.open(0) as sound:
        assert sound.frames == 323000
    assert 320000 <= sum(map(len, clips.source.windows(0, 320000))) < 323000
    with pytest.raises(ValueError, match="truncated"):
        list(clips.source.windows(1, 320000))


def test_ten_bad_recordings_in_a_row_are_no_clip(tmp_path):
    for i in range(3):
        break_file(tmp_path / str(i), "text")
    batch, tried, bad = data.AudioClips(tmp_path).__getitems__([(0, 0)])
    assert batch is None and tried == len(bad) == 10
    with pytest.raises(RuntimeError, match="10 recordings in a row"):
        data.AudioClips(tmp_path)[0]


def test_odd_names_are_read_and_printed_on_one_line(tmp_path):
    names = [b"with space.wav", b"new\nline.wav", b"not utf8 \xff.wav", "ümlaut.wav".encode()]
    for i, name in enumerate(names):
        soundfile.write(tmp_path / "x.wav", np.full(320000, (i + 1) / 10), 32000, subtype="FLOAT")
        os.rename(tmp_path / "x.wav", os.path.join(os.fsencode(tmp_path), name))
    clips = data.AudioClips(tmp_path)
    assert len({clips[i][0].item() for i in range(4)}) == 4
    printed = [data.printable(clips.name(i)) for i in range(4)]
    assert all(line.isprintable() for line in printed) and "ümlaut.wav" in printed


def test_a_tar_with_a_path_in_it_is_only_read(tmp_path):
    corpus(tmp_path / "c", 1)
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t" / "x.tar", "w") as tar:
        tar.add(tmp_path / "c" / "000.wav", "../../escaped.wav")
    before = sorted(tmp_path.rglob("*"))
    assert data.AudioClips(tmp_path / "t")[0].any() and sorted(tmp_path.rglob("*")) == before


def test_a_tar_whose_member_has_a_negative_size_comes_to_an_end(tmp_path):
    corpus(tmp_path / "c", 2)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path / "c" / "000.wav", "a.wav")
        lie = tarfile.TarInfo("b.wav")
        lie.size = -512
        tar.fileobj.write(lie.tobuf(tarfile.GNU_FORMAT))
    assert [entry.split(b"\0")[0] for entry in data.find_recordings(tmp_path / "x.tar")] == [
        b"x.tar/a.wav"
    ]


def store_pack(folder, entries, frames):
    """A packed folder without packing: its index, and the frames of each shard."""
    np.save(folder / "index.npy", entries)
    for name, content in frames.items():
        (folder / name).write_bytes(content)
    (folder / "pack.json").write_text('{"sample_rate": 32000}')
    return data.AudioClips(folder)


@pytest.mark.parametrize("wrong", ["half a frame", "count", "shard", "type", "shape"])
def test_a_packed_folder_that_lies_is_refused(tmp_path, wrong):
    shard, count = (
        "../gone" if wrong == "shard" else "s.f16",
        "9" * 400 if wrong == "count" else "300",
    )
    entries = np.array(["\0".join(["a.wav", shard, "0", count]).encode()])
    entries = dict(type=np.arange(3), shape=entries[None]).get(wrong, entries)
    frames = {"s.f16": bytes(300 * 256 - 128 * (wrong == "half a frame"))}
    if wrong in ("type", "shape"):
        with pytest.raises(ValueError, match="nothing in it"):
            store_pack(tmp_path, entries, frames)
    else:
        batch, _, bad = store_pack(tmp_path, entries, frames).__getitems__([(0, 0)])
        assert batch is None and len(bad) == 10 and all(reason for _, reason in bad)


def test_a_set_of_many_shards_holds_no_files_open(tmp_path):
    entries = np.array(
        ["\0".join([f"{n}.wav", f"{n}.f16", "0", "300"]).encode() for n in range(100)]
    )
    clips = store_pack(tmp_path, entries, {f"{n}.f16": bytes(300 * 256) for n in range(100)})
    before = len(os.listdir("/proc/self/fd"))
    assert not any(bad for _, _, bad in map(clips.__getitems__, ([(0, n)] for n in range(100))))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_the_index_is_one_flat_buffer(tmp_path):
    names = data.find_recordings(corpus(tmp_path, 3))
    assert names.dtype.kind == "S" and names.tolist() == [b"000.wav", b"001.wav", b"002.wav"]


def test_synthetic_clips_are_worth_learning_from():
    clips, log_mel = data.SyntheticClips(), data.LogMel()
    mels = log_mel.frames(torch.stack([clips[i] for i in range(16)]))
    assert mels.isfinite().all() and mels.max() > 0  # something sounds
    assert mels.std(1).mean() > 1 and mels.std(2).mean() > 1  # it changes in time and in frequency
    assert mels.mean((1, 2)).std() > 0.1  # and from clip to clip


def run_cli(*command, env=None, timeout=240):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=timeout,
    )


def test_packing_keeps_the_log_mel_and_can_be_interrupted(tmp_path, monkeypatch):
    folder = corpus(tmp_path / "c", 4, seconds=10)
    soundfile.write(folder / "long.wav", noise(25), 32000)
    break_file(folder / "bad", "text")
    data.pack(folder, tmp_path / "p", 32000)
    packed, clips = data.AudioClips(tmp_path / "p"), data.AudioClips(folder)
    assert packed.packed and len(packed) == 5 and packed[0].dtype == torch.float16
    assert packed.name(2) == "002.wav" and packed[4].shape == (256, 128)
    for i in range(4):
        wanted = data.LogMel().frames(clips[i][None])[0]
        assert (packed[i].float() - wanted).abs().max() < 0.01
    (shard,) = (tmp_path / "p").glob("*.f16")
    assert shard.stat().st_size == (4 * 256 + 640) * 128 * 2
    (tmp_path / "p" / "pack.json").unlink()  # as if it had not come to its end
    with pytest.raises(ValueError, match="no audio"):
        data.AudioClips(tmp_path / "p")
    monkeypatch.setattr(data, "in_workers", None)  # the shard that is there is not made again
    data.pack(folder, tmp_path / "p", 32000)
    assert len(data.AudioClips(tmp_path / "p")) == 5
    with pytest.raises(ValueError, match="packed at 32000 Hz"):
        data.AudioClips(tmp_path / "p", 16000)


def test_what_is_packed_is_not_scanned_or_packed_again(tmp_path):
    data.pack(corpus(tmp_path / "c", 2), tmp_path / "p", 32000)
    done = run_cli("data.py", "scan", tmp_path / "p")
    assert (
        done.returncode == 2
        and "packed already" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_scan_counts_and_writes_nothing(tmp_path):
    folder = corpus(tmp_path / "c", 4)
    soundfile.write(folder / "silent.flac", np.zeros((44100, 2)), 44100)
    break_file(folder / "bad", "text")
    before = sorted(tmp_path.rglob("*"))
    done = run_cli("data.py", "scan", folder)
    table = {
        label.strip(): value
        for label, value in re.findall(r"^ *(\S.*?)  (\S+)$", done.stdout, re.M)
    }
    assert done.returncode == 0 and sorted(tmp_path.rglob("*")) == before
    assert (table["recordings"], table["silent"], table["unreadable"]) == ("6", "1", "1")
    assert (table["32000 Hz"], table["44100 Hz"], table["2 channels"]) == (
        "4",
        "1",
        "1",
    ) and "bad.wav" in done.stdout


# ---------------------------------------- train.py

TINY = [
    "--model",
    "tiny",
    "--clip-seconds",
    "1.25",
    "--batch-size",
    "8",
    "--steps",
    "20",
    "--warmup",
    "5",
    "--amp",
    "off",
    "--log-every",
    "1",
    "--workers",
    "0",
]  # the smallest run there is: a grid of 2 x 8


def pretrain(out, *flags):
    """A run in this process -> its checkpoint and its log, a list of one dict a line."""
    train.main([*TINY, "--out", str(out), *map(str, flags)])
    return read_run(out)


def read_run(out):
    with open(out / "log.csv", newline="") as file:
        return torch.load(out / "last.pt", weights_only=True), list(csv.DictReader(file))


def stop_after(monkeypatch, steps):
    """Let SIGTERM arrive during the last of so many steps."""
    real = train.train_step

    def step_and_signal(run, step, batches):
        if step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, step, batches)

    monkeypatch.setattr(train, "train_step", step_and_signal)


def same(one, other, names=("context_encoder", "target_encoder", "predictor"), tolerance=0.0):
    return all(
        torch.allclose(tensor, other[part][name], rtol=0, atol=tolerance)
        for part in names
        for name, tensor in one[part].items()
    )


def steady(log):
    """The log without its clocks."""
    return [
        {k: v for k, v in row.items() if k not in ("clips_per_s", "data_wait", "memory_gib")}
        for row in log
    ]


def fails(capsys, *flags):
    """The one line that a command with these flags says before it exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        train.main(list(map(str, flags)))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run on synthetic clips."""
    return pretrain(tmp_path_factory.mktemp("reference"))


def test_the_learning_rate_is_the_papers():
    rates = [train.learning_rate(step, 100000) for step in (0, 500, 1000, 50500, 100000)]
    assert rates == pytest.approx([1e-6, 1.505e-4, 3e-4, 1.5e-4, 0], abs=1e-12)


def test_the_defaults_are_the_papers():
    args = train.parse_args([])
    assert (args.model, args.batch_size, args.steps, args.lr, args.warmup) == (
        "base",
        256,
        100000,
        3e-4,
        1000,
    )
    assert (args.weight_decay, args.ema, args.mask_ratio) == (0.05, 0.996, [0.4, 0.6])
    assert (args.mask, args.loss, args.sample_rate, args.clip_seconds) == (
        "random",
        "l2",
        32000,
        10.0,
    )


def test_monitors_expose_a_collapse():
    healthy = train.monitors(torch.randn(256, 64))
    assert healthy["target_std"] == pytest.approx(1, abs=0.05) and healthy["effective_rank"] > 50
    assert abs(healthy["mean_cosine"]) < 0.05
    constant = train.monitors(torch.randn(1, 64).expand(256, 64))
    assert constant["target_std"] == pytest.approx(0, abs=1e-6) and constant["effective_rank"] == 0
    assert constant["mean_cosine"] == pytest.approx(1)
    line = train.monitors(torch.randn(256, 1) * torch.randn(1, 64))
    assert line["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_an_epoch_reads_every_clip_once_and_processes_share_it(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    args, read = SimpleNamespace(seed=0, batch_size=12, accum=3), []
    for rank in range(2):
        monkeypatch.setattr(train, "RANK", rank)
        read += [key for batch in train.clip_order(args, 30, 0, 10) for key in batch]
    assert sorted(read) == [(epoch, i) for epoch in range(4) for i in range(30)]
    assert [i for epoch, i in read if epoch == 0] != sorted(i for epoch, i in read if epoch == 0)


def test_the_order_can_be_entered_at_any_step():
    args = SimpleNamespace(seed=0, batch_size=12, accum=2)
    whole, late = (list(train.clip_order(args, 30, start, 10)) for start in (0, 7))
    assert whole[14:] == late


def test_a_run_learns_logs_and_leaves_a_checkpoint_of_plain_data(reference):
    checkpoint, log = reference
    assert [int(row["step"]) for row in log] == list(range(1, 21)) and checkpoint["step"] == 20
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    assert all(math.isfinite(float(value)) for row in log for value in row.values())
    assert float(log[0]["lr"]) == 1e-6 and float(log[5]["lr"]) == pytest.approx(3e-4)
    assert {
        "format",
        "step",
        "config",
        "context_encoder",
        "target_encoder",
        "predictor",
        "optimizer",
        "scaler",
    } <= set(checkpoint)
    config = JEPAConfig(**checkpoint["config"]["model"])
    VisionTransformer(config).load_state_dict(checkpoint["target_encoder"])
    assert config.grid == (2, 8) and data.LogMel(**checkpoint["config"]["log_mel"]).std > 0


def test_the_target_encoder_of_a_run_is_the_average_of_its_context_encoders(tmp_path, monkeypatch):
    seen, real = [], train.update_ema

    def remember(target, context, decay):
        if not seen:
            seen.append(target.patch_embed.weight.clone())
        real(target, context, decay)
        seen.append((decay, context.patch_embed.weight.clone()))

    monkeypatch.setattr(train, "update_ema", remember)
    checkpoint, _ = pretrain(tmp_path)
    average = seen[0]
    for decay, weight in seen[1:]:
        average = decay * average + (1 - decay) * weight
    assert len(seen) == 21 and [decay for decay, _ in seen[1:]] == [
        masking.ema_decay(s, 20) for s in range(20)
    ]
    assert torch.allclose(checkpoint["target_encoder"]["patch_embed.weight"], average, atol=1e-6)


def test_weight_decay_spares_biases_norms_and_the_mask_token(reference):
    groups = reference[0]["optimizer"]["param_groups"]
    jepa = JEPA(dataclasses.replace(PRESETS["tiny"], time_bins=32))
    matrices = sum(parameter.ndim > 1 for parameter in jepa.parameters())
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [
        (matrices, 0.05),
        (len(list(jepa.parameters())) - matrices, 0.0),
    ]
    assert jepa.predictor.mask_token.ndim == 1 and tuple(groups[0]["betas"]) == (0.9, 0.95)


def test_accumulation_is_the_same_run(reference, tmp_path):
    checkpoint, log = pretrain(tmp_path, "--accum", 4)
    losses = [[float(row["loss"]) for row in rows] for rows in (log, reference[1])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and same(
        checkpoint, reference[0], tolerance=1e-4
    )


def torchrun(out, processes, *flags, script="train.py", launcher=()):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            *launcher,
            str(script),
            *TINY,
            "--out",
            str(out),
            *map(str, flags),
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_two_processes_are_the_same_run(reference, tmp_path):
    done = torchrun(tmp_path, 2, "--accum", 2)
    assert done.returncode == 0, done.stderr
    checkpoint, log = read_run(tmp_path)
    for name in ("loss", "grad_norm", "target_std", "mean_cosine"):
        values = [[float(row[name]) for row in rows] for rows in (log, reference[1])]
        assert values[0] == pytest.approx(values[1], rel=1e-3 if name == "grad_norm" else 1e-4)
    assert same(checkpoint, reference[0], tolerance=1e-4)
    assert not any(
        name.startswith(("module.", "_orig_mod.")) for name in checkpoint["context_encoder"]
    )


UNLUCKY = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import train

def unlucky(run, step, batches, real=train.train_step, dead=Path(__file__ + ".dead")):
    if train.RANK == 1 and step == 12 and not dead.exists():
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    poison = float("nan") if train.RANK == 1 and step in (3, 4) else 1.0
    hook = run.model.predictor.mask_token.register_hook(lambda grad: grad * poison)
    answer = real(run, step, batches)
    hook.remove()
    return answer

train.train_step = unlucky
train.main()
"""


@pytest.fixture(scope="module")
def unlucky(tmp_path_factory):
    """Two processes, the second with a NaN in its gradient at steps 3 and 4; killed, once, at step 12."""
    out = tmp_path_factory.mktemp("unlucky")
    (out / "unlucky.py").write_text(UNLUCKY.format(here=str(HERE)))
    launcher = ("--max-restarts", "3", "--monitor-interval", "0.2")
    done = torchrun(out, 2, "--save-every", 10, script=out / "unlucky.py", launcher=launcher)
    assert done.returncode == 0, done.stderr
    return out


def test_a_nan_in_the_gradient_of_one_process_makes_all_skip_the_step(unlucky):
    checkpoint, log = read_run(unlucky)
    assert [int(row["skipped"]) for row in log[2:6]] == [0, 1, 2, 2]
    assert checkpoint["optimizer"]["state"][0]["step"] == 18
    assert same(checkpoint, checkpoint)  # no NaN, which would not equal itself


def test_torchrun_restarts_a_run_whose_process_was_killed(unlucky):
    checkpoint, log = read_run(unlucky)
    assert (unlucky / "unlucky.py.dead").exists() and checkpoint["step"] == 20
    assert [int(row["step"]) for row in log] == list(range(1, 21))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["synthetic", "files"])
def test_a_run_that_was_stopped_ends_bit_for_bit_like_one_that_was_not(
    tmp_path, monkeypatch, workers, source
):
    flags = ["--workers", workers, "--log-every", 5, "--amp", "auto"]
    if source == "files":
        flags += ["--data", corpus(tmp_path / "c", 12, seconds=1.0)]
        break_file(tmp_path / "c" / "bad", "text")
    whole = pretrain(tmp_path / "whole", *flags)
    with monkeypatch.context() as patched:
        stop_after(patched, 12)
        assert pretrain(tmp_path / "parts", *flags)[0]["step"] == 12
    parts = pretrain(tmp_path / "parts", *flags)
    assert same(whole[0], parts[0]) and steady(whole[1]) == steady(parts[1])
    for one, other in zip(
        whole[0]["optimizer"]["state"].values(), parts[0]["optimizer"]["state"].values()
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_log_is_cut_back_to_the_checkpoint(tmp_path, monkeypatch, reference):
    stop_after(monkeypatch, 12)
    pretrain(tmp_path)
    shutil.copy(tmp_path / "last.pt", tmp_path / "kept")
    monkeypatch.undo()
    stop_after(monkeypatch, 16)
    pretrain(tmp_path)
    shutil.copy(
        tmp_path / "kept", tmp_path / "last.pt"
    )  # as if killed between a log line and a checkpoint
    monkeypatch.undo()
    assert steady(pretrain(tmp_path)[1]) == steady(reference[1])


def test_a_log_from_before_the_first_checkpoint_is_begun_anew(tmp_path, reference):
    (tmp_path / "log.csv").write_text("step,loss\n1,3\n2,")
    assert steady(pretrain(tmp_path)[1]) == steady(reference[1])


def test_checkpoints_are_kept_under_their_step(tmp_path):
    pretrain(tmp_path, "--save-every", 8)
    assert sorted(path.name for path in tmp_path.glob("*.pt*")) == [
        "last.pt",
        "step-0000008.pt",
        "step-0000016.pt",
    ]
    assert torch.load(tmp_path / "step-0000008.pt", weights_only=True)["step"] == 8


def test_a_changed_setting_is_named_and_refused(tmp_path, capsys, reference):
    pretrain(tmp_path)
    capsys.readouterr()
    for flag, value in (
        ("--lr", 1e-3),
        ("--seed", 1),
        ("--mask-ratio", "0.3 0.6"),
        ("--model", "small"),
        ("--steps", 30),
    ):
        assert flag in fails(capsys, *TINY, "--out", tmp_path, flag, *str(value).split())
    assert "--data" in fails(capsys, *TINY, "--out", tmp_path, "--data", corpus(tmp_path / "c"))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 12)
    pretrain(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.undo()

    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        pretrain(tmp_path)
    assert stopped.value.code == 1 and "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def poison(monkeypatch, steps):
    """Give these steps a NaN in one weight's gradient."""
    real = train.train_step

    def poisoned(run, step, batches):
        handle = run.model.predictor.mask_token.register_hook(
            lambda grad: grad * float("nan") if step in steps else grad
        )
        try:
            return real(run, step, batches)
        finally:
            handle.remove()

    monkeypatch.setattr(train, "train_step", poisoned)


def test_a_step_without_a_finite_gradient_is_skipped(tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4})
    checkpoint, log = pretrain(tmp_path)
    assert [int(row["skipped"]) for row in log[2:6]] == [0, 1, 2, 2]
    assert all(
        tensor.isfinite().all()
        for part in ("context_encoder", "target_encoder", "predictor")
        for tensor in checkpoint[part].values()
    )
    assert checkpoint["optimizer"]["state"][0]["step"] == 18


def test_a_step_on_a_spectrogram_that_is_not_finite_is_skipped_and_logged(tmp_path, monkeypatch):
    real = train.train_step

    def poisoned(run, step, batches):
        return real(run, step, (batch * (float("nan") if step < 2 else 1) for batch in batches))

    monkeypatch.setattr(train, "train_step", poisoned)
    checkpoint, log = pretrain(tmp_path)
    assert [row["skipped"] for row in log[:3]] == ["1", "2", "2"] and log[0]["target_std"] == "nan"
    assert all(tensor.isfinite().all() for tensor in checkpoint["target_encoder"].values())


def test_twenty_such_steps_stop_the_run(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, set(range(8, 40)))
    with pytest.raises(SystemExit) as stopped:
        pretrain(tmp_path, "--steps", 40, "--save-every", 5)
    assert stopped.value.code == 1 and "20 steps" in capsys.readouterr().err
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in last["context_encoder"].values())


def test_every_bad_recording_of_a_corpus_is_replaced_and_listed_once(tmp_path):
    folder = corpus(tmp_path / "c", 20 * len(BROKEN), seconds=1.25)
    for n, how in enumerate(BROKEN):
        break_file(folder / f"bad {n}", how)
    _, log = pretrain(tmp_path / "out", "--data", folder, "--steps", 60, "--batch-size", 12)
    lines = (tmp_path / "out" / "bad_files.txt").read_text().splitlines()
    names, reasons = zip(*(line.split("\t") for line in lines))
    assert sorted(Path(name).stem for name in names) == sorted(
        f"bad {n}" for n in range(len(BROKEN))
    )
    assert all(reasons) and int(log[-1]["bad_files"]) >= len(BROKEN)
    assert all(math.isfinite(float(value)) for row in log for value in row.values())


def test_a_set_that_is_mostly_broken_stops_the_run(tmp_path, capsys):
    folder = corpus(tmp_path / "c", 4)
    for i in range(2):
        break_file(folder / f"bad {i}", "text")
    with pytest.raises(SystemExit) as stopped:
        pretrain(tmp_path / "out", "--data", folder)
    assert stopped.value.code == 1 and "cannot be used" in capsys.readouterr().err.splitlines()[-1]


def test_a_set_that_is_all_broken_stops_the_run(tmp_path, capsys):
    for i in range(4):
        break_file(tmp_path / f"{i}", "text")
    with pytest.raises(SystemExit) as stopped:
        pretrain(tmp_path / "out", "--data", tmp_path)
    assert stopped.value.code == 1 and "cannot be used" in capsys.readouterr().err.splitlines()[-1]


def test_a_packed_folder_trains(tmp_path):
    data.pack(corpus(tmp_path / "c", 4, seconds=3), tmp_path / "p", 32000)
    assert pretrain(tmp_path / "out", "--data", tmp_path / "p")[0]["step"] == 20


@pytest.mark.parametrize(
    "flags",
    [
        ["--mask", "block"],
        ["--loss", "cosine"],
        ["--loss", "smooth_l1"],
        ["--amp", "bf16"],
        ["--amp", "fp16"],
        ["--sample-rate", "16000"],
    ],
)
def test_every_choice_trains(tmp_path, flags):
    checkpoint, log = pretrain(tmp_path, *flags)
    losses = [float(row["loss"]) for row in log if row["loss"] != "nan"]
    assert losses[-1] < losses[0] and checkpoint["step"] == 20
    assert int(log[-1]["skipped"]) <= (
        10 if "fp16" in flags else 0
    )  # the scaler of fp16 finds its scale by skipping


def test_compiled_networks_stop_recompiling_at_the_second_size_of_a_mask(tmp_path, monkeypatch):
    counter, compile_with = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda network: compile_with(network, backend=counter)
    )
    small = dataclasses.replace(PRESETS["tiny"], depth=1, predictor_depth=1)
    monkeypatch.setitem(PRESETS, "tiny", small)
    _, eager = pretrain(tmp_path / "eager", "--steps", 6)
    _, compiled = pretrain(tmp_path / "compiled", "--steps", 6, "--compile")
    assert (
        len({row["masked"] for row in compiled}) > 2 and counter.frame_count == 5
    )  # target: one size only
    losses = [[float(row["loss"]) for row in log] for log in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_is_wrong_with_the_data_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("gone.wav\n")
    (tmp_path / "x.bin").write_bytes(b"\0")
    assert "does not exist" in fails(capsys, *TINY, "--out", tmp_path / "out", "--data", "")
    for path in (
        tmp_path / "nowhere",
        tmp_path / "empty",
        tmp_path / "list.txt",
        tmp_path / "x.bin",
    ):
        assert str(path) in fails(capsys, *TINY, "--out", tmp_path / "out", "--data", path)
    assert "gone.wav" in fails(
        capsys, *TINY, "--out", tmp_path / "out", "--data", tmp_path / "list.txt"
    )


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--batch-size", "10", "--accum", "4"], ["10", "4", "1 processes"]),
        (["--mask-ratio", "0", "0.5"], ["mask-ratio"]),
        (["--mask-ratio", "0.5", "1"], ["mask-ratio"]),
        (["--steps", "0"], ["steps"]),
        (["--steps", "many"], ["steps"]),
        (["--lr", "-1"], ["lr"]),
        (["--lr", "nan"], ["lr"]),
        (["--sample-rate", "44100"], ["44100"]),
        (["--clip-seconds", "7"], ["clip-seconds"]),
        (["--model", "huge"], ["huge"]),
        (["--seed", "-1"], ["seed"]),
        (["--ema", "1.5"], ["ema"]),
        (["--workers", "99999999999"], ["workers"]),
        (["--batch-size", "99999999"], ["batch-size"]),
        (["--nonsense"], ["nonsense"]),
    ],
)
def test_an_absurd_flag_is_refused_in_one_line(tmp_path, capsys, flags, words):
    line = fails(capsys, "--out", tmp_path, *flags)
    assert all(word in line for word in words)


class Hostile:
    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_is_none_is_refused_and_not_executed(tmp_path, capsys):
    hostile = Hostile()
    hostile.path = tmp_path / "executed"
    whole = io.BytesIO()
    torch.save(dict(format="audio-jepa 1", step=1), whole)
    pickled = io.BytesIO()
    torch.save(hostile, pickled)
    for content in (
        pickled.getvalue(),
        pickle.dumps(hostile),
        whole.getvalue()[:-100],
        b"",
        b"text",
        whole.getvalue(),
    ):
        (tmp_path / "last.pt").write_bytes(content)
        assert "last.pt" in fails(capsys, *TINY, "--out", tmp_path)
        assert not hostile.path.exists()


def test_a_checkpoint_whose_config_or_state_lies_is_refused(tmp_path, capsys):
    checkpoint, _ = pretrain(tmp_path)
    capsys.readouterr()
    lies = [
        dict(context_encoder=checkpoint["predictor"]),
        dict(step="many"),
        dict(step=-1),
        dict(step=10**12),
        dict(optimizer=dict(state={}, param_groups=[])),
        dict(config=dict(log_mel=dict(sample_rate=10**12))),
        dict(config=None),
        dict(format="another 7"),
        dict(settings=[]),
        dict(losses="none"),
        dict(losses=(10**400,)),
        dict(config=checkpoint["config"] | dict(log_mel=dict(mean=math.nan, std=1.0))),
        dict(optimizer=checkpoint["optimizer"] | dict(state={0: dict(step=torch.tensor(1.0))})),
    ]
    lies += [
        dict(
            target_encoder=checkpoint["target_encoder"]
            | {"norm.weight": torch.zeros(1).expand(10**12)}
        )
    ]
    for lie in lies:
        torch.save(checkpoint | lie, tmp_path / "last.pt")
        assert "last.pt" in fails(capsys, *TINY, "--out", tmp_path), lie


def test_one_line_and_no_traceback_from_the_shell(tmp_path):
    done = run_cli("train.py", "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


def test_a_signal_ends_a_run_within_the_step(tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [
            sys.executable,
            "train.py",
            *TINY,
            "--steps",
            "100000",
            "--workers",
            "2",
            "--out",
            str(tmp_path),
        ]
        with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()  # the first log line
            process.send_signal(number)
            rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "of 100000 steps done" in rest
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 2


def started(pid):
    """The processes that a process started itself."""
    return [
        int(line)
        for line in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout.split()
    ]


@heavy
@pytest.mark.parametrize("victim,kills", [("process", 8), ("worker", 4), ("rank", 8)])
def test_heavy_kills_at_any_moment_leave_no_trace(tmp_path, victim, kills):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] * (
        victim == "rank"
    )
    flags = [*TINY, "--workers", "1", "--steps", "400", "--log-every", "5", "--out"]

    def start(out, *more):
        command = [sys.executable, *launcher, "train.py", *flags, str(out), *more]
        return subprocess.Popen(
            command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole").wait() == 0
    whole, killed = read_run(tmp_path / "whole"), 0
    while killed < kills:
        process = start(tmp_path / "killed", "--save-every", "7")
        time.sleep(random.uniform(4, 14))
        victims = [process.pid] if victim == "process" else started(process.pid)
        if process.poll() is None and victims:
            os.kill(random.choice(victims), signal.SIGKILL)
            killed += 1
        process.wait(120)
        if (tmp_path / "killed" / "last.pt").exists():
            assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] % 7 in (
                0,
                1,
            )
        for checkpoint in (tmp_path / "killed").glob("step-*.pt"):  # 92 MB each
            checkpoint.unlink()
    assert start(tmp_path / "killed").wait() == 0
    again = read_run(tmp_path / "killed")
    assert same(whole[0], again[0]) and steady(whole[1]) == steady(again[1])


@heavy
def test_heavy_3000_steps_neither_grow_nor_leave_anything_open(tmp_path, monkeypatch):
    real, memory, files = train.train_step, [], []

    def watched(run, step, batches):
        if step % 100 == 99:
            status = Path("/proc/self/status").read_text()
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))
            files.append(len(os.listdir("/proc/self/fd")))
        return real(run, step, batches)

    monkeypatch.setattr(train, "train_step", watched)
    before = len(os.listdir("/proc/self/fd"))
    pretrain(tmp_path, "--steps", 3000, "--workers", 2, "--save-every", 1000)
    assert len(memory) == 30 and max(memory) < 1.03 * memory[0] and max(files) - min(files) <= 4
    assert not multiprocessing.active_children() and len(os.listdir("/proc/self/fd")) <= before + 2


def test_the_benchmark_measures_and_writes_nothing(tmp_path, capsys, monkeypatch):
    train.main([*TINY, "--benchmark", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in ("reading", "log-mel", "step alone", "all together", "TFLOP/s", "GiB")
    )
    assert not list(tmp_path.iterdir())


# ---------------------------------------- extract.py


def store_encoders(path, config, log_mel):
    """A checkpoint without a run: two encoders that differ."""
    weights = {
        f"{which}_encoder": VisionTransformer(config).state_dict()
        for which in ("target", "context")
    }
    stored = dict(
        config=dict(model=vars(config), log_mel=log_mel.config),
        step=3,
        format=model.CHECKPOINT_FORMAT,
    )
    torch.save(weights | stored, path)
    return path


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    """1.25 s clips, a grid of 2 x 8."""
    config = JEPAConfig(time_bins=32, dim=32, depth=2, heads=2)
    log_mel = data.LogMel(32000, 1.25, 32, mean=-7.0, std=4.0)
    return store_encoders(tmp_path_factory.mktemp("small") / "last.pt", config, log_mel)


@pytest.fixture(scope="module")
def paper_file(tmp_path_factory):
    """The paper's grid, 16 x 8."""
    config = JEPAConfig(dim=64, depth=2, heads=1)
    return store_encoders(
        tmp_path_factory.mktemp("paper") / "last.pt", config, data.LogMel(mean=-7.0, std=4.0)
    )


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Of all lengths: shorter than a hop, exactly a window, several; mono and not, at three rates."""
    folder = tmp_path_factory.mktemp("recordings")
    for n, (seconds, rate, channels) in enumerate(
        [
            (0.03, 32000, 1),
            (1.25, 32000, 1),
            (4.0, 44100, 2),
            (0.7, 8000, 1),
            (2.5, 32000, 1),
            (3.1, 8000, 2),
        ]
    ):
        sound = np.stack([noise(seconds, rate, seed=n + c) for c in range(channels)], 1)
        soundfile.write(folder / f"{n}.wav", sound, rate)
    return folder


def embeddings(checkpoint, path, out, *flags):
    extract.main(list(map(str, [checkpoint, path, "--out", out, "--workers", 0, *flags])))
    with np.load(out) as file:
        return dict(file)


def refused(capsys, *flags):
    """The one line that extract.py says before it exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        extract.main([*map(str, flags), "--workers", "0"])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_a_run_is_read(reference, tmp_path):
    torch.save(reference[0], tmp_path / "last.pt")
    encoder = extract.load_encoder(tmp_path / "last.pt")
    assert encoder.step == 20 and encoder(torch.randn(3, 50000)).shape == (3, 3, 8 * 192)


def test_embeddings_have_one_row_a_recording_in_sorted_order(encoder_file, recordings, tmp_path):
    made = embeddings(encoder_file, recordings, tmp_path / "e.npz")
    assert made["embeddings"].shape == (6, 8 * 32) and made["embeddings"].dtype == np.float32
    assert list(made["paths"]) == [f"{n}.wav" for n in range(6)]
    assert made["seconds"] == pytest.approx([0.03, 1.25, 4.0, 0.7, 2.5, 3.1], abs=1e-4)
    assert (made["sample_rate"], made["hop_ms"], made["step"]) == (32000, 625.0, 3)
    config = json.loads(str(made["config"]))
    assert config["model"]["dim"] == 32 and config["log_mel"]["clip_seconds"] == 1.25
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz"]  # nothing else stays


@pytest.mark.parametrize(
    "flags", [["--batch-size", 1], ["--batch-size", 5, "--workers", 2], ["--workers", 3]]
)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_embeddings_depend_on_neither_batching_nor_workers(
    encoder_file, recordings, tmp_path, flags, amp
):
    one = embeddings(encoder_file, recordings, tmp_path / "a.npz", "--amp", amp)
    other = embeddings(encoder_file, recordings, tmp_path / "b.npz", "--amp", amp, *flags)
    assert np.abs(one["embeddings"] - other["embeddings"]).max() < 1e-5


def test_embeddings_do_not_depend_on_company(encoder_file, recordings, tmp_path):
    together = embeddings(encoder_file, recordings, tmp_path / "a.npz")["embeddings"]
    for n in range(6):
        alone = embeddings(encoder_file, recordings / f"{n}.wav", tmp_path / "b.npz")["embeddings"]
        assert np.abs(together[n] - alone[0]).max() < 1e-5


def test_two_processes_write_the_same_embeddings(encoder_file, recordings, tmp_path):
    flags = ["extract.py", encoder_file, recordings, "--pool", "time", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert run_cli(*flags, tmp_path / "1.npz").returncode == 0
    assert run_cli(*torchrun, *flags, tmp_path / "2.npz").returncode == 0
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert set(two) == set(one) and all(
            (two[name] == one[name]).all() for name in set(one) - {"embeddings"}
        )
        assert np.abs(two["embeddings"] - one["embeddings"]).max() < 1e-5


def test_rows_in_time_lie_between_offsets_and_their_mean_is_the_clips(
    encoder_file, recordings, tmp_path
):
    time = embeddings(encoder_file, recordings, tmp_path / "t.npz", "--pool", "time")
    clip = embeddings(encoder_file, recordings, tmp_path / "c.npz")["embeddings"]
    rows = np.diff(time["offsets"])
    assert list(rows) == [math.ceil(seconds / 0.625 - 1e-6) for seconds in time["seconds"]]
    for n, (first, last) in enumerate(zip(time["offsets"], time["offsets"][1:])):
        assert np.abs(time["embeddings"][first:last].mean(0) - clip[n]).max() < 1e-5


def test_the_mean_of_the_bands_is_the_mean_of_their_concatenation(
    encoder_file, recordings, tmp_path
):
    concat = embeddings(encoder_file, recordings, tmp_path / "c.npz")["embeddings"]
    mean = embeddings(encoder_file, recordings, tmp_path / "m.npz", "--bands", "mean")["embeddings"]
    assert mean.shape == (6, 32) and np.abs(concat.reshape(6, 8, 32).mean(1) - mean).max() < 1e-5


@pytest.mark.parametrize("which", ["target", "context"])
def test_the_encoder_that_is_asked_for_sees_padded_windows(encoder_file, tmp_path, which):
    """One recording, done by hand."""
    soundfile.write(tmp_path / "a.wav", tone(1.9), 32000, subtype="FLOAT")
    checkpoint = torch.load(encoder_file, weights_only=True)
    network = VisionTransformer(JEPAConfig(**checkpoint["config"]["model"]))
    network.load_state_dict(checkpoint[f"{which}_encoder"])
    windows = F.pad(torch.from_numpy(tone(1.9)), (0, 80000 - 60800)).view(2, 40000)
    with torch.no_grad():
        tokens = network(data.LogMel(**checkpoint["config"]["log_mel"])(windows))  # [2, 16, D]
    wanted = tokens.view(4, 8, 32).flatten(1).mean(0)  # 1.9 s reach into all four columns
    made = embeddings(
        encoder_file, tmp_path, tmp_path / "e.npz", "--encoder", which, "--amp", "off"
    )
    assert np.abs(made["embeddings"][0] - wanted.numpy()).max() < 1e-4


def test_a_bad_recording_stops_with_its_name_or_is_left_out(
    encoder_file, recordings, tmp_path, capsys
):
    folder = tmp_path / "some"
    shutil.copytree(recordings, folder)
    sound = tone(6)
    sound[-100] = np.nan  # in the last of five windows: the others must go as well
    soundfile.write(folder / "3b.wav", sound, 32000, subtype="FLOAT")
    (folder / "9\n9.wav").write_text("no sound")
    line = refused(capsys, encoder_file, folder, "--out", tmp_path / "e.npz")
    assert "3b.wav" in line and "NaN" in line and not (tmp_path / "e.npz").exists()
    assert list(tmp_path.iterdir()) == [folder]
    made = embeddings(encoder_file, folder, tmp_path / "e.npz", "--skip-bad")
    assert (
        list(made["paths"]) == [f"{n}.wav" for n in range(6)]
        and np.isfinite(made["embeddings"]).all()
    )
    assert len([line for line in capsys.readouterr().err.splitlines() if "left out" in line]) == 2
    whole = embeddings(encoder_file, recordings, tmp_path / "w.npz")
    assert np.abs(made["embeddings"] - whole["embeddings"]).max() < 1e-5


def test_every_kind_of_bad_recording_is_left_out_once(encoder_file, recordings, tmp_path, capsys):
    folder = tmp_path / "some"
    shutil.copytree(recordings, folder)
    for n, how in enumerate(BROKEN):
        break_file(folder / f"bad {n}", how)
    made = embeddings(encoder_file, folder, tmp_path / "e.npz", "--skip-bad")
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == len(BROKEN) and all(
        any(f"bad {n}." in line for line in lines) for n in range(len(BROKEN))
    )
    assert (
        list(made["paths"]) == [f"{n}.wav" for n in range(6)]
        and np.isfinite(made["embeddings"]).all()
    )


def test_names_of_any_bytes_come_back(encoder_file, tmp_path):
    for name in (b"a b.wav", b"c\nd.wav", b"\xff\xfe.wav"):
        soundfile.write(os.fsencode(tmp_path) + b"/" + name, tone(0.5), 32000, format="WAV")
    made = embeddings(encoder_file, tmp_path, tmp_path / "e.npz")
    assert {os.fsencode(str(path)) for path in made["paths"]} == {
        b"a b.wav",
        b"c\nd.wav",
        b"\xff\xfe.wav",
    }


def knn_in_numpy(x, y, train, test):
    x = (x - x[train].mean(0)) / x[train].std(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x[test] @ x[train].T
    nearest = np.argsort(-similarity, 1)[:, :10]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = [
        [w[y[train][n] == c].sum() for c in range(y.max() + 1)] for w, n in zip(weights, nearest)
    ]
    return (np.argmax(votes, 1) == y[test]).mean()


def labelled(separation, clips=200, width=16, classes=4):
    rng = np.random.default_rng(0)
    y = np.arange(clips) % classes
    x = rng.standard_normal((clips, width)) + separation * rng.standard_normal((classes, width))[y]
    split = torch.arange(clips).split([clips - 80, 40, 40])
    return torch.from_numpy(x).float(), torch.from_numpy(y), split


def test_knn_is_six_lines_of_numpy():
    x, y, (train, valid, test) = labelled(0.5)
    ours = extract.knn("knn", x, y, 4, train, test)
    assert 0.3 < ours < 0.95 and ours == knn_in_numpy(x.double().numpy(), y.numpy(), train, test)


def test_knn_does_not_care_for_the_scale_of_a_dimension_or_of_a_clip_and_xares_does():
    x, y, (train, valid, test) = labelled(2.0)
    assert extract.knn("knn", x * torch.logspace(-2, 3, 16) + 7, y, 4, train, test) == extract.knn(
        "knn", x, y, 4, train, test
    )
    loud = x.clone()
    loud[y == 2] *= 100  # class 2 wins wherever a direction is shared
    assert (
        extract.knn("xares-knn", loud, y, 4, train, test)
        < 0.6
        < extract.knn("xares-knn", x, y, 4, train, test)
    )


def test_xares_knn_is_its_formula():
    x, y, (train, valid, test) = labelled(0.5)
    close, nearest = (F.normalize(x[test], dim=1) @ F.normalize(x[train].T, dim=1)).topk(10)
    scores = (F.one_hot(y[train][nearest], 4) * (close / 0.07).softmax(1).unsqueeze(-1)).sum(1)
    assert extract.knn("xares-knn", x, y, 4, train, test) == (
        scores.argmax(1) == y[test]
    ).sum().item() / len(test)


@pytest.mark.parametrize("attentive", [False, True])
def test_a_probe_finds_what_is_there_and_nothing_that_is_not(attentive):
    x, y, split = labelled(1.0, clips=400, width=256)
    if attentive:  # the clip's vector is one of five tokens, the others are noise
        others = torch.randn(len(x), 4, x.shape[1])
        rows = torch.cat([x.unsqueeze(1), others], 1).numpy()
    else:
        rows = x.unsqueeze(1).numpy()
    shuffled = y[torch.randperm(len(y))]
    assert extract.train_probe(rows.__getitem__, attentive, y, 4, *split) >= (
        0.9 if attentive else 1.0
    )
    assert extract.train_probe(rows.__getitem__, attentive, shuffled, 4, *split) < 0.5


def test_the_attentive_probe_ignores_padding():
    probe = extract.Probe(16, 3, attentive=True)
    tokens, padding = (
        torch.randn(2, 5, 16),
        torch.tensor([[False] * 5, [False, False, True, True, True]]),
    )
    changed = torch.where(padding.unsqueeze(-1), 1e3, tokens)
    assert torch.allclose(probe(tokens, padding), probe(changed, padding), atol=1e-5)
    assert torch.allclose(
        probe(tokens, padding)[1:], probe(tokens[1:, :2], padding[1:, :2]), atol=1e-5
    )


def notes(folder, clips, splits):
    """A task: which of three pitches."""
    for split in splits:
        for label, hertz in (("low", 200), ("mid", 1500), ("high", 6000)):
            (folder / split / label).mkdir(parents=True)
            for n in range(clips):
                sound = tone(0.6, hertz=hertz * (1 + 0.01 * n)) + noise(0.6, seed=n) / 30
                soundfile.write(folder / split / label / f"{n}.wav", sound, 32000)
    return folder


PROBES = ["--probe", "knn", "xares-knn", "linear", "attentive"]


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "valid", "test")])
def test_probes_print_and_write_a_table_with_baselines(encoder_file, tmp_path, capsys, splits):
    task = notes(tmp_path / "task", 4, splits)
    flags = [encoder_file, task, *PROBES, "--json", tmp_path / "t.json", "--workers", 0]
    extract.main(list(map(str, flags)))
    printed, table = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    assert (table["classes"], table["train"], table["test"], table["step"]) == (3, 12, 12, 3)
    assert table["valid"] == (12 if "valid" in splits else 0)
    views = [
        "this encoder, concat",
        "this encoder, mean",
        "untrained, concat",
        "untrained, mean",
        "log-mel",
    ]
    assert list(table["accuracy"]) == views and all(view in printed for view in views)
    for row in table["accuracy"].values():
        assert list(row) == PROBES[1:] and all(0 <= accuracy <= 1 for accuracy in row.values())
    assert (
        table["accuracy"]["log-mel"]["knn"]
        == table["accuracy"]["this encoder, concat"]["knn"]
        == 1.0
    )


def test_the_log_mel_baseline_is_mean_and_std_over_frames_that_hold_sound(
    encoder_file, tmp_path, monkeypatch
):
    task, seen = notes(tmp_path, 1, ("train", "test")), []
    monkeypatch.setattr(extract, "knn", lambda probe, x, *_: seen.append(x) or 0.0)
    extract.main([str(encoder_file), str(task), "--probe", "knn", "--workers", "0"])
    sound, _ = soundfile.read(task / "test" / "high" / "0.wav", dtype="float32")
    log_mel = data.LogMel(**torch.load(encoder_file, weights_only=True)["config"]["log_mel"])
    frames = log_mel(F.pad(torch.from_numpy(sound), (0, 40000 - len(sound)))[None])[
        0, 0, : math.ceil(len(sound) / 1250)
    ]
    wanted = torch.cat([frames.mean(0), frames.std(0, correction=0)])
    assert torch.allclose(seen[-1][0], wanted, atol=1e-3)


def test_folds_test_every_clip_once_with_all_classes_in_each():
    names = [f"{label}/{n}.wav" for label in "abc" for n in range(10)]
    labels, splits = extract.read_task(SimpleNamespace(data="x", folds=5), names)
    assert sorted(torch.cat([test for _, _, test in splits]).tolist()) == list(range(30))
    for train, valid, test in splits:
        assert (
            not set(train.tolist()) & set(test.tolist())
            and len(valid) == 0
            and len(train) + len(test) == 30
        )
        assert labels[test].bincount().tolist() == [2, 2, 2]
    assert len(extract.read_task(SimpleNamespace(data="x", folds=None), names)[1]) == 1


@pytest.mark.parametrize(
    "folds,folders",
    [
        (None, [""]),  # no label
        (None, ["a"]),  # one class
        (None, ["train/a", "train/b"]),
        (None, ["train/a", "train/b", "valid/a", "valid/b"]),
        (None, ["train/a", "train/b", "test/a", "test/b", "validation/a", "validation/b"]),
        (None, ["train", "test"]),
        (None, ["train/a", "test/a"]),
        (5, ["train/a", "train/b", "test/a", "test/b"]),
        (30, ["a", "b"]),  # more folds than clips
    ],
)
def test_folders_that_are_no_task_are_refused(folds, folders):
    names = [os.path.join(folder, f"{n}.wav") for folder in folders for n in range(10)]
    with pytest.raises(ValueError, match="LABEL"):
        extract.read_task(SimpleNamespace(data="x", folds=folds), names)


def test_small_classes_can_be_probed():
    names = [f"{label}/{n}.wav" for label in "abc" for n in range(3)]
    labels, splits = extract.read_task(SimpleNamespace(data="x", folds=5), names)
    assert all(len(test) and len(train) for train, _, test in splits)
    for train, valid, test in splits:
        rows = F.one_hot(labels, 3).float().repeat(1, 64).unsqueeze(1).numpy()
        assert extract.train_probe(rows.__getitem__, False, labels, 3, train, valid, test) == 1.0


def test_the_xares_contract(paper_file, monkeypatch):
    assert [name for name in dir(extract) if name.endswith("Encoder")] == ["AudioJEPAEncoder"]
    monkeypatch.setenv("AUDIO_JEPA_CHECKPOINT", str(paper_file))
    for bands, width in (("concat", 512), ("mean", 64)):
        monkeypatch.setenv("AUDIO_JEPA_BANDS", bands)
        encoder = extract.AudioJEPAEncoder()
        assert (encoder.sampling_rate, encoder.hop_size_in_ms, encoder.output_dim) == (
            32000,
            625.0,
            width,
        )
        for samples, rows in (
            (1000, 1),
            (50000, 3),
            (320000, 16),
            (320001, 17),
            (600 * 32000, 960),
        ):
            with torch.inference_mode():
                made = encoder(torch.randn(2 if samples < 10**6 else 1, samples))
            assert (
                made.shape[1:] == (rows, width)
                and made.dtype == torch.float32
                and made.isfinite().all()
            )


def test_the_encoder_travels_to_a_spawned_process(paper_file):
    encoder, waveform = extract.load_encoder(paper_file), torch.randn(1, 50000)
    encoder.amp = "off"  # that process may choose another bf16 attention
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        made = pool.apply(encoder, (waveform,))
    assert torch.allclose(made, encoder(waveform), atol=1e-5)


def test_the_encoder_takes_waveforms_only(paper_file):
    encoder = extract.load_encoder(paper_file)
    for wrong in (
        torch.zeros(50000),
        torch.zeros(1, 0),
        torch.zeros(1, 1, 50000),
        torch.zeros(1, 5, dtype=torch.int16),
    ):
        with pytest.raises(ValueError, match="waveform"):
            encoder(wrong)


def test_the_encoder_names_what_is_missing(paper_file, monkeypatch):
    monkeypatch.delenv("AUDIO_JEPA_CHECKPOINT", raising=False)
    with pytest.raises(ValueError, match="AUDIO_JEPA_CHECKPOINT"):
        extract.AudioJEPAEncoder()
    with pytest.raises(ValueError, match="bands"):
        extract.load_encoder(paper_file, bands="all")


class Unknown:
    """What a Lightning file pickles besides tensors: objects of classes that are not here."""

    def __init__(self):
        self.state = {"lr": 1.0}


def authors_file(path, ours, extra=None):
    """A stand-in for the authors' checkpoint: our weights under their names."""
    theirs = {"predictor.mask_token": torch.zeros(1, 1, 8)}
    for prefix, which in (
        ("target_encoder.", "target_encoder"),
        ("encoder._orig_mod.", "context_encoder"),
    ):
        for name, tensor in ours[which].items():
            if name == "patch_embed.weight":
                tensor = tensor.view(-1, 1, 16, 16)
            name = name.replace("patch_embed", "patch_embed.proj")
            name = name.replace("attn.qkv", "attn.Wqkv").replace("attn.proj", "attn.out_proj")
            theirs[prefix + name] = tensor[None] if name == "pos_embed" else tensor
    torch.save({"state_dict": theirs, "global_step": 100000, "hyper_parameters": extra}, path)
    return path


@pytest.mark.parametrize("which", ["target", "context"])
def test_the_authors_checkpoint_gives_the_same_embeddings(paper_file, tmp_path, which):
    ours = torch.load(paper_file, weights_only=True)
    parts = {"optimizer": functools.partial(torch.optim.AdamW, lr=1e-3), "callback": Unknown()}
    theirs = extract.load_encoder(authors_file(tmp_path / "their.ckpt", ours, parts), which=which)
    assert theirs.step == 100000 and theirs.output_dim == 512
    own = extract.load_encoder(paper_file, which=which)
    own.log_mel = extract.AuthorsLogMel()  # the same front end: then only the weights' names differ
    waveform = torch.from_numpy(noise(3))[None]
    assert torch.equal(theirs(waveform), own(waveform))


def test_the_authors_front_end_is_kaldis_without_edges():
    from torchaudio.compliance import kaldi

    waveform = torch.from_numpy(noise(10) + tone(10))[None]
    frames = kaldi.fbank(
        waveform / waveform.abs().max(),
        sample_frequency=32000,
        num_mel_bins=128,
        frame_shift=1243 / 32,
        frame_length=3108 / 32,
        dither=0.0,
        window_type="hanning",
        low_freq=20,
    )
    ours = extract.AuthorsLogMel()(waveform)
    assert len(frames) == 255 and ours.shape == (1, 1, 256, 128)
    assert (ours[0, 0, :255] - frames).abs().max() < 1e-3 and (ours[0, 0, 255] == 0).all()
    assert extract.AuthorsLogMel()(torch.zeros(1, 320000)).isfinite().all()


def test_our_positions_are_the_authors():
    """Theirs: meshgrid(mel_index, time_index), and the first half of the width from the mel index."""
    mel, time = np.meshgrid(np.arange(8), np.arange(16))
    frequencies = 1 / 10000 ** (np.arange(192) / 192)
    halves = [axis.reshape(-1, 1) * frequencies for axis in (mel, time)]
    theirs = np.concatenate([f(half) for half in halves for f in (np.sin, np.cos)], 1)
    assert np.abs(model.sincos_positions(768, (16, 8)).numpy() - theirs).max() < 1e-6


def test_a_hostile_file_is_refused_and_not_executed(paper_file, tmp_path, capsys):
    hostile, path = Hostile(), tmp_path / "hostile.pt"
    hostile.path = tmp_path / "executed"
    ours = torch.load(paper_file, weights_only=True)
    for content in (hostile, ours | dict(step=hostile), dict(state_dict=hostile)):
        torch.save(content, path)
        assert "hostile.pt: refused" in refused(capsys, path, tmp_path, "--out", tmp_path / "e.npz")
    extract.load_encoder(authors_file(path, ours, hostile))  # inert there
    assert not hostile.path.exists()


def test_a_file_that_is_damaged_or_lies_is_refused_with_its_name(paper_file, tmp_path, capsys):
    whole, ours, path = (
        paper_file.read_bytes(),
        torch.load(paper_file, weights_only=True),
        tmp_path / "bad.pt",
    )
    for content in (whole[: len(whole) // 2], whole[:-100], b"", b"text"):
        path.write_bytes(content)
        assert "bad.pt: refused" in refused(capsys, path, tmp_path, "--out", tmp_path / "e.npz")
    config, target = ours["config"], ours["target_encoder"]
    for lie in [
        dict(step="many"),
        dict(config=None),
        dict(format="another 7"),
        dict(target_encoder={}),
        dict(config=config | dict(model=config["model"] | dict(dim=65536, heads=4096))),
        dict(config=config | dict(model=config["model"] | dict(depth=1024))),
        dict(config=config | dict(log_mel=config["log_mel"] | dict(std=0.0))),
        dict(config=config | dict(log_mel=config["log_mel"] | dict(mel_bins=64))),
        dict(config=config | dict(log_mel=config["log_mel"] | dict(time_bins=0))),
        dict(config=config | dict(log_mel=config["log_mel"] | dict(sample_rate=10**400))),
        dict(config=config | dict(log_mel=config["log_mel"] | dict(sample_rate=32000.0))),
        dict(
            config=config
            | dict(log_mel=config["log_mel"] | dict(sample_rate=32, clip_seconds=320.0))
        ),
        dict(target_encoder=target | {"norm.weight": torch.zeros(1).expand(64)}),
        dict(target_encoder=target | {"norm.weight": torch.full((64,), math.nan)}),
        dict(target_encoder=target | {"norm.weight": torch.zeros(1).expand(10**12)}),
    ]:
        torch.save(ours | lie, path)
        assert "bad.pt: refused" in refused(capsys, path, tmp_path, "--out", tmp_path / "e.npz"), (
            lie
        )
    assert "nowhere.pt: no such" in refused(
        capsys, tmp_path / "nowhere.pt", tmp_path, "--out", tmp_path / "e.npz"
    )


@pytest.mark.parametrize(
    "flags,words",
    [
        ([], "--out"),
        (["--out", "x.npz", "--probe", "knn"], "--out"),
        (["--out", "."], "--out"),
        (["--out", "new/"], "--out"),
        (["--out", "x.npz", "--json", "y.json"], "--json"),
        (["--out", "x.npz", "--folds", "3"], "--folds"),
        (["--probe", "knn", "--json", "nowhere/y.json"], "--json"),
        (["--out", "x.npz", "--batch-size", "0"], "--batch-size"),
        (["--out", "x.npz", "--batch-size", "many"], "--batch-size"),
        (["--out", "x.npz", "--bands", "all"], "--bands"),
        (["--probe", "knn", "--folds", "1"], "--folds"),
        (["--probe"], "--probe"),
        (["--probe", "svm"], "--probe"),
        (["--out", "x.npz", "--workers=-1"], "--workers"),
    ],
)
def test_an_absurd_flag_of_extract_is_refused_in_one_line(paper_file, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        extract.main([str(paper_file), ".", *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and words in line


def test_extract_says_what_is_wrong_with_the_data(paper_file, tmp_path, capsys):
    assert "nowhere" in refused(
        capsys, paper_file, tmp_path / "nowhere", "--out", tmp_path / "e.npz"
    )
    (tmp_path / "empty").mkdir()
    assert "no audio" in refused(
        capsys, paper_file, tmp_path / "empty", "--out", tmp_path / "e.npz"
    )
    run_cli("data.py", "pack", corpus(tmp_path / "audio", 2, 0.5), tmp_path / "packed")
    assert "packed" in refused(capsys, paper_file, tmp_path / "packed", "--out", tmp_path / "e.npz")


# ---------------------------------------- the project


@pytest.mark.parametrize("name", ["model.py", "masking.py", "data.py"])
def test_a_file_that_is_copied_alone_imports(tmp_path, name):
    shutil.copy(HERE / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", f"import {name[:-3]}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_nothing_decodes_with_torchaudio():
    for path in HERE.glob("*.py"):
        if path.name != "test_audio_jepa.py":
            assert not re.search(r"torchaudio\.(load|save|info)\b", path.read_text())


def test_the_demonstrations_run():
    assert "85.35 M" in run_cli("model.py").stdout
    drawn = run_cli("masking.py").stdout
    assert (
        drawn.count("#") > 2 * 51
        and len([line for line in drawn.splitlines() if line.startswith("    ")]) == 16
    )


def test_every_flag_in_the_readme_exists_and_every_flag_is_read():
    helped = "".join(
        run_cli(name, "--help").stdout for name in ("train.py", "data.py", "extract.py")
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (HERE / "README.md").read_text()))
    named -= {"--nproc", "--standalone", "--max-jobs", "--max-restarts"}  # torchrun's and X-ARES's
    assert named and all(re.search(rf"{flag}\b", helped) for flag in named), named
    for name in ("train.py", "extract.py"):
        source = (HERE / name).read_text()
        for flag in re.findall(r'add\("--([a-z-]+)"', source):
            assert re.search(rf"args\.{flag.replace('-', '_')}\b", source), f"nobody reads --{flag}"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_the_log_mel_of_a_gpu_is_that_of_a_cpu():
    log_mel, waveform = data.LogMel(), torch.from_numpy(np.stack([noise(10), tone(10)]))
    there = log_mel.to("cuda")(waveform.to("cuda")).cpu()
    assert (there - log_mel.to("cpu")(waveform)).abs().max() < 0.01  # tf32 is allowed there


@needs_gpu
@pytest.mark.parametrize("flags", [[], ["--amp", "fp16"], ["--compile"]])
def test_a_gpu_trains(tmp_path, flags):
    checkpoint, log = pretrain(tmp_path, "--amp", "auto", *flags)
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
