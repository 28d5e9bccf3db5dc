# SPDX-License-Identifier: MIT
"""What this project claims, as an executable specification: one claim a test, the method first.

    python -m pytest -q -rs

model.py    sizes, positions, initialisation, what each network sees, the loss, where gradients go
masking.py  random and block masks, their reproducibility, the EMA and its schedule
data.py     log-mel against Kaldi, every kind of input, clips, excerpts, filling up, packing
train.py    a step by hand; monitors; however it is split or interrupted, the same run; faults
extract.py  embeddings whatever the batching, probes, X-ARES, fine-tuning, the authors' checkpoint
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, Subset
from torchaudio.compliance import kaldi

import data
import extract
import masking
import model
import train
from model import JEPA, PRESETS, JEPAConfig, Predictor, VisionTransformer

HERE = Path(__file__).parent
SMALL_WEIGHTS = HERE / ".github" / "audio-jepa-tiny.pt"
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
os.environ["OMP_NUM_THREADS"] = "1"  # nor in the processes that tests start


# ================================================================================================
# Fixtures and helpers


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def a_mask():
    return masking.random_mask(2, SMALL.grid, 5, torch.Generator())


def a_spectrogram():
    return torch.randn(2, 1, 64, 48)


def tone(seconds=1.0, rate=32000, hertz=440.0):
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def noise(seconds=1.0, rate=32000, seed=0):
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal(int(seconds * rate), np.float32)


def corpus(folder, clips=12, seconds=2.0):
    """A folder of wav files that sound different."""
    folder.mkdir(parents=True)
    for i in range(clips):
        sound = tone(seconds, hertz=200 + 70 * i) + noise(seconds, seed=i) / 4
        soundfile.write(folder / f"{i:03d}.wav", sound, 32000)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """As long as a clip of the smallest run; one of them cannot be used."""
    folder = corpus(tmp_path_factory.mktemp("sounds") / "c", 20, seconds=1.25)
    (folder / "bad.wav").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def packed(sounds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "p"
    data.pack(data.AudioFiles(sounds, 32000), folder)
    return folder


def run_python(*command, code=0, cwd=HERE):
    """Run a program that ends with this exit code -> what it has printed, and its errors."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def launch():
    """Starts a program that the test will interrupt."""
    started = []

    def start(*command):
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()  # or a failing test would leave it running


def children(process):
    """The processes that this one has started, by number."""
    listed = subprocess.check_output(["pgrep", "-P", str(process.pid)])
    return [int(number) for number in listed.split()]


def wait_for_step(out, step):
    """Wait until a run has logged a step."""
    log = out / "log.csv"
    for _ in range(12000):
        if log.exists() and f"\n{step}," in log.read_text():
            return
        time.sleep(0.01)
    raise TimeoutError(f"no step {step} in {out}")


def refusal(capsys, main, flags, code=2):
    """The one line that a program says before it exits with this code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    assert stopped.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


# The smallest run there is: clips of 2 x 8 patches, 20 steps.
TINY = (
    "--model tiny --clip-seconds 1.25 --batch-size 8 --masks-per-clip 2 --steps 20 --warmup 5 "
    "--amp off --log-every 1 --workers 0"
).split()
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


def pretrain(out, *flags):
    """A run in this process -> its checkpoint and its log."""
    train.main([*TINY, "--out", str(out), *map(str, flags)])
    return read_run(out)


def read_run(out):
    log = np.genfromtxt(out / "log.csv", delimiter=",", names=True)
    return torch.load(out / "last.pt", weights_only=True), log


@pytest.fixture(scope="module")
def whole_run(sounds, tmp_path_factory):
    """The folder of a run of one process that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole")
    pretrain(out, "--data", sounds, "--save-every", 8)
    return out


def assert_same_weights(one, other, tolerance=0.0):
    for network in ("context_encoder", "target_encoder", "predictor"):
        assert_close(one[network], other[network], rtol=0, atol=tolerance)


# ================================================================================================
# model.py


def test_the_defaults_have_the_papers_size():
    assert JEPAConfig().grid == (16, 8)
    assert re.search(r"base +85\.35 M +11\.29 M +96\.64 M", run_python("model.py").stdout)


@pytest.mark.parametrize("name", ["time_bins", "mel_bins", "dim", "predictor_dim"])
def test_sizes_that_do_not_divide_are_refused_at_construction(name):
    with pytest.raises(ValueError, match=f"^{name} = 100"):
        JEPAConfig(heads=8, predictor_heads=8, **{name: 100})


def test_unknown_positions_are_refused_at_construction():
    with pytest.raises(ValueError, match="not rope"):
        JEPAConfig(positions="rope")


def test_a_block_is_the_pre_norm_layer_of_pytorch():
    block = model.Block(32, 2, mlp_ratio=4.0)
    layer = torch.nn.TransformerEncoderLayer(
        32, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True
    )
    layer.self_attn.in_proj_weight = block.attn.qkv.weight
    layer.self_attn.in_proj_bias = block.attn.qkv.bias
    layer.self_attn.out_proj = block.attn.proj
    layer.linear1 = block.mlp.fc1
    layer.linear2 = block.mlp.fc2
    x = torch.randn(2, 7, 32)
    assert_close(block(x), layer(x))


def test_weights_start_with_the_std_that_is_claimed():
    for network in (VisionTransformer(PRESETS["tiny"]), Predictor(PRESETS["base"])):
        for i, block in enumerate(network.blocks, start=1):
            for layer in (block.attn.qkv, block.mlp.fc1):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            for layer in (block.attn.proj, block.mlp.fc2):
                std = math.sqrt(2 * i) * layer.weight.std().item()
                assert std == pytest.approx(0.02, rel=0.05)
                assert not layer.bias.any()


def test_autocast_does_not_round_the_residual_stream():
    encoder = VisionTransformer(dataclasses.replace(SMALL, positions="rotary"))
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(a_spectrogram()).dtype == torch.float32


def test_a_token_is_one_patch_in_time_major_order():
    t = torch.arange(64.0).view(1, 1, 64, 1) // 8
    f = torch.arange(48.0) // 24
    encoder = VisionTransformer(dataclasses.replace(SMALL, patch_size=(8, 24)))
    patches = []
    encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: patches.append(inputs[0]))
    encoder(2 * t + f)
    assert torch.equal(patches[0], torch.arange(16.0).view(1, 16, 1).expand(1, 16, 8 * 24))


def test_the_context_encoder_sees_the_visible_patches_alone():
    encoder = VisionTransformer(SMALL)
    spectrogram = a_spectrogram().requires_grad_()
    context_idx, target_idx = a_mask()
    tokens = encoder(spectrogram, context_idx)
    (tokens * torch.randn_like(tokens)).sum().backward()
    # Patches of 16 x 16 on a grid of 4 x 3.
    seen = spectrogram.grad.view(2, 4, 16, 3, 16).any(4).any(2).flatten(1)  # [B, N]
    assert seen.gather(1, context_idx).all()
    assert not seen.gather(1, target_idx).any()


def test_the_position_table_is_the_formula():
    token = model.sincos_positions(32, (4, 3))[3 * 3 + 2]  # t = 3, f = 2
    k = 5
    frequency = 10000 ** -(k / 8)
    expected = []
    for index in (2, 3):  # mel, then time
        expected += [math.sin(index * frequency), math.cos(index * frequency)]
    assert_close(token[[k, 8 + k, 16 + k, 24 + k]], torch.tensor(expected))


def sharp(network):
    """Attention far from uniform."""
    for block in network.blocks:
        block.attn.qkv.weight.data *= 20
    return network


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_a_prediction_changes_with_the_position_it_is_asked_for(positions):
    predictor = sharp(Predictor(dataclasses.replace(SMALL, positions=positions)))
    context = torch.randn(1, 6, 32)
    context_idx = torch.arange(6).unsqueeze(0)
    at_7 = predictor(context, context_idx, torch.tensor([[7]]))
    for other in (8, 10):  # another position in mel, and in time
        elsewhere = predictor(context, context_idx, torch.tensor([[other]]))
        assert (at_7 - elsewhere).abs().max() > 1e-4


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_tokens_are_told_apart_by_their_positions_and_not_by_their_order(positions):
    predictor = sharp(Predictor(dataclasses.replace(SMALL, positions=positions)))
    context = torch.randn(2, 7, 32)
    context_idx, target_idx = a_mask()
    predictions = predictor(context, context_idx, target_idx)
    backwards = predictor(context.flip(1), context_idx.flip(1), target_idx.flip(1))
    assert_close(backwards.flip(1), predictions)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_rotary_positions_alone_depend_on_distances_only(positions):
    encoder = sharp(VisionTransformer(dataclasses.replace(SMALL, positions=positions)))
    spectrogram = a_spectrogram()
    context_idx = torch.tensor([[0, 1, 4, 6], [0, 3, 7, 4]])  # of 4 x 3 patches, none at the end
    moved = spectrogram.roll((16, 16), (2, 3))
    moved_idx = context_idx + 3 + 1
    same = torch.allclose(encoder(spectrogram, context_idx), encoder(moved, moved_idx), atol=1e-4)
    assert same == (positions == "rotary")


def test_the_loss_is_equation_2_on_normalised_targets():
    jepa = JEPA(SMALL)
    spectrogram = a_spectrogram()
    targets = torch.randn(2, 12, 32) * 7 + 3
    context_idx, target_idx = a_mask()
    context = jepa.context_encoder(spectrogram, context_idx)
    predictions = jepa.predictor(context, context_idx, target_idx)
    normalised = F.layer_norm(targets, [32])
    total = 0.0
    for b in range(2):
        for j, patch in enumerate(target_idx[b]):
            total += (predictions[b, j] - normalised[b, patch]).square().sum()
    assert_close(jepa(spectrogram, context_idx, target_idx, targets), total / (2 * 5))


def test_targets_over_a_clip_are_normalised_over_its_tokens():
    targets = 5 * torch.randn(3, 12, 32) + torch.randn(3, 1, 32)
    expected = F.layer_norm(targets.mT, [12]).mT
    assert_close(model.normalise_targets(targets, "clip"), expected)


def test_gradients_reach_every_trained_weight_and_stop_before_the_targets():
    jepa = JEPA(SMALL)
    target_encoder = VisionTransformer(SMALL)
    spectrogram = a_spectrogram()
    jepa(spectrogram, *a_mask(), target_encoder(spectrogram)).backward()
    assert all(parameter.grad is not None for parameter in jepa.parameters())
    assert all(parameter.grad is None for parameter in target_encoder.parameters())


# ================================================================================================
# masking.py

BOTH_MASKS = pytest.mark.parametrize("mask", masking.MASKS.values(), ids=masking.MASKS)


@BOTH_MASKS
@pytest.mark.parametrize("grid, num_masked", [((16, 8), 60), ((1, 8), 7)])
def test_context_and_target_are_disjoint_and_complete(mask, grid, num_masked):
    context_idx, target_idx = mask(7, grid, num_masked, torch.Generator())
    assert target_idx.shape == (7, num_masked)
    everything = torch.cat([context_idx, target_idx], 1).sort(1).values
    assert torch.equal(everything, torch.arange(grid[0] * grid[1]).expand(7, -1))


@BOTH_MASKS
def test_every_clip_has_a_mask_of_its_own(mask):
    _, target_idx = mask(64, (16, 8), 60, torch.Generator())
    assert len(target_idx.unique(dim=0)) == 64


def hidden_maps(mask, clips):
    """1 where a patch is hidden, 0 elsewhere: [clips, 16, 8], half of them hidden."""
    _, target_idx = mask(clips, (16, 8), 64, torch.Generator())
    return torch.zeros(clips, 128).scatter_(1, target_idx, 1.0).view(clips, 16, 8)


def test_random_masks_hide_every_patch_equally_often():
    counts = hidden_maps(masking.random_mask, 20000).sum(0)
    five_sigma = 5 * math.sqrt(20000 * 0.25)
    assert ((counts - 10000).abs() < five_sigma).all()


def test_block_masks_reach_the_edges_and_favour_no_corner():
    ratio = hidden_maps(masking.block_mask, 20000).mean(0)
    assert ratio.min() > 0.05  # few rectangles reach a corner
    for axis in (0, 1):
        assert (ratio - ratio.flip(axis)).abs().max() < 0.03


def test_block_masks_are_made_of_blocks():
    hidden = hidden_maps(masking.block_mask, 500)
    equal_neighbours = hidden[:, 1:] == hidden[:, :-1]
    assert equal_neighbours.float().mean() > 0.8  # half of them in a random mask


@BOTH_MASKS
def test_masks_are_a_pure_function_of_seed_and_step(mask):
    def draw(seed, step):
        _, target_idx = masking.draw_masks(mask, seed, step, 8, (16, 8), (0.5, 0.5), "cpu")
        return target_idx

    assert torch.equal(draw(1, 5), draw(1, 5))
    for seed, step in [(1, 6), (2, 5), (5, 1)]:
        assert not torch.equal(draw(1, 5), draw(seed, step))


def test_the_masked_ratio_is_drawn_once_a_step_over_its_whole_range():
    counts = set()
    for step in range(1000):
        _, target_idx = masking.draw_masks(
            masking.random_mask,
            0,
            step,
            2,
            (16, 8),
            (0.4, 0.6),
            "cpu",
        )
        counts.add(target_idx.shape[1])
    assert counts == set(range(51, 78))


@BOTH_MASKS
@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_some_patches_are_masked_and_some_visible_even_on_a_small_grid(mask, ratio):
    context_idx, target_idx = masking.draw_masks(mask, 0, 0, 2, (1, 8), (ratio, ratio), "cpu")
    assert {context_idx.shape[1], target_idx.shape[1]} == {1, 7}


def test_ema_decay_is_byols_cosine():
    decays = [masking.ema_decay(step, 100) for step in (0, 50, 100)]
    assert decays == pytest.approx([0.996, 0.998, 1])
    assert masking.ema_decay(100, 100, end=0.999) == pytest.approx(0.999)


def test_the_ema_is_equation_3_on_every_parameter_and_buffer():
    target = torch.nn.BatchNorm1d(3)
    context = torch.nn.BatchNorm1d(3)
    context.weight.data.normal_()
    context(torch.randn(8, 3))
    before = copy.deepcopy(target.state_dict())
    masking.update_ema(target, context, 0.9)
    for name in ("weight", "bias", "running_mean", "running_var"):
        expected = 0.9 * before[name] + 0.1 * context.state_dict()[name]
        assert_close(target.state_dict()[name], expected)
    assert target.num_batches_tracked == 1  # a counter has no mean


# ================================================================================================
# data.py: the log-mel


def kaldi_fbank(waveform, rate, mels, hop, window, snip_edges):
    """The log-mel of torchaudio; `hop` and `window` are in samples."""
    return kaldi.fbank(
        waveform.unsqueeze(0),
        sample_frequency=rate,
        num_mel_bins=mels,
        frame_shift=1000 * hop / rate,
        frame_length=1000 * window / rate,
        window_type="hanning",
        snip_edges=snip_edges,
        dither=0.0,
    )


@pytest.mark.parametrize(
    "rate, mels, hop, window",
    [
        (32000, 128, 1250, 3125),
        (16000, 80, 625, 1562),
    ],
)
def test_the_log_mel_is_kaldis(rate, mels, hop, window):
    sounds = [noise(10, rate), tone(10, rate) + 0.2, np.zeros(10 * rate, np.float32)]
    waveforms = torch.from_numpy(np.stack(sounds))
    expected = [kaldi_fbank(waveform, rate, mels, hop, window, False) for waveform in waveforms]
    log_mel = data.LogMel(rate, mel_bins=mels)(waveforms)
    assert log_mel.shape == (3, 1, 256, mels)
    assert_close(log_mel.squeeze(1), torch.stack(expected), rtol=0, atol=1e-3)


def test_the_measured_mean_and_std_normalise_the_set():
    clips = data.SyntheticClips(16000, clip_seconds=0.625, num_clips=256)
    mean, std = data.measure_mean_std(clips, data.LogMel(16000, 0.625, 16), "cpu", workers=0)
    log_mel = data.LogMel(16000, 0.625, 16, mean=mean, std=std)
    normalised = log_mel(torch.stack(list(clips)))
    assert normalised.mean().item() == pytest.approx(0, abs=1e-4)
    assert normalised.std().item() == pytest.approx(1, abs=1e-4)


# ================================================================================================
# data.py: which recordings there are


@pytest.mark.parametrize("layout", ["list.txt", "shards"])
def test_every_layout_gives_the_recordings_of_the_folder(tmp_path, layout):
    corpus(tmp_path / "a", 4)
    names = [f"a/{i:03d}.wav" for i in range(4)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
    (tmp_path / "shards").mkdir()
    for i, name in enumerate(names):
        with tarfile.open(tmp_path / "shards" / f"{i // 2}.tar", "a") as tar:
            tar.add(tmp_path / name, name)
            tar.add(tmp_path / "list.txt", "a/._" + name[2:])  # of macOS
    expected = data.AudioClips(tmp_path / "a", clip_seconds=1.25)
    clips = data.AudioClips(tmp_path / layout, clip_seconds=1.25)
    assert len(clips) == 4
    for i in range(4):
        assert clips.source.name(i).endswith(f"{i:03d}.wav")
        assert torch.equal(clips[i], expected[i])


def test_links_are_followed_to_each_folder_once_and_hidden_files_are_not_audio(tmp_path):
    folder = corpus(tmp_path / "elsewhere", 2)
    (tmp_path / "set").mkdir()
    for link in (tmp_path / "set" / "a", tmp_path / "set" / "b", folder / "again"):
        link.symlink_to(folder)
    (folder / "._000.wav").write_bytes(b"of macOS")
    source = data.AudioClips(tmp_path / "set").source
    assert [source.name(i) for i in range(len(source))] == ["a/000.wav", "a/001.wav"]


def write_level(path, level, seconds=10.0):
    """A wav file of one number, so that a clip shows which recordings are in it."""
    soundfile.write(path, np.full(int(seconds * 32000), level), 32000, subtype="FLOAT")


def test_odd_names_are_read_and_printed_on_one_line(tmp_path):
    for name in (b"new\nline.wav", b"not utf8 \xff.wav"):
        write_level(tmp_path / "x.wav", 0.5)
        os.rename(tmp_path / "x.wav", os.path.join(os.fsencode(tmp_path), name))
    clips = data.AudioClips(tmp_path)
    for i, printed in enumerate(["new\\nline.wav", "not utf8 \\udcff.wav"]):
        assert data.printable(clips.source.name(i)) == printed
        _, _, bad = clips.read(0, i)
        assert bad == []


# ================================================================================================
# data.py: decoding

FORMATS = [  # extension, and the names that libsndfile has for it
    "wav WAV FLOAT",
    "flac FLAC PCM_16",
    "ogg OGG VORBIS",
    "opus OGG OPUS",
    "mp3 MP3 MPEG_LAYER_III",
    "aiff AIFF PCM_16",
    "au AU PCM_16",
    "sph NIST PCM_16",
    "caf CAF PCM_16",
]


def write_as(kind, folder, waveform, rate):
    extension, container, subtype = kind.split()
    path = folder / f"x.{extension}"
    soundfile.write(path, waveform, rate, subtype, format=container)
    return path


def write_ramp(path, samples):
    """A file that rises from -0.9 to 0.9, so that an excerpt shows where it was taken."""
    soundfile.write(path, np.linspace(-0.9, 0.9, samples), 8000, subtype="PCM_24")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_and_its_channels_averaged(tmp_path, kind):
    left = tone(2, 48000)
    write_as(kind, tmp_path, np.stack([left, left / 2], axis=1), 48000)
    clip = data.AudioClips(tmp_path, 48000, clip_seconds=1.0)[0].numpy()
    assert np.abs(np.fft.rfft(clip)).argmax() == 440
    assert clip.std() == pytest.approx(0.75 * left.std(), rel=0.02)


@pytest.mark.parametrize("rate", [44100, 44099])  # the second has no divisor in common with 32000
def test_resampling_keeps_pitch_and_length(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", tone(2, rate), rate, subtype="FLOAT")
    (waveform,) = data.AudioFiles(tmp_path, 32000).windows(0, 3 * 32000)
    waveform = waveform.numpy()
    assert len(waveform) == pytest.approx(64000, abs=1)
    middle = slice(2000, 62000)
    assert np.abs(waveform[middle] - tone(2)[middle]).max() < 0.01


# libsndfile opens no CAF that is cut. GSM cannot seek.
@pytest.mark.parametrize("kind", [*FORMATS[:-1], "wav WAV GSM610"])
def test_a_file_that_ends_early_gives_what_is_there(tmp_path, kind):
    path = write_as(kind, tmp_path, noise(80, 8000), 8000)
    os.truncate(path, path.stat().st_size // 2)
    clips = data.AudioClips(tmp_path, 8000)
    for epoch in range(8):
        clip, _, bad = clips.read(epoch, 0)
        assert bad == []
        assert clip.unfold(0, 800, 800).std(1).min() > 0.05
    samples = sum(len(window) for window in clips.source.windows(0, 8000))
    assert 32 < samples / 8000 < 48


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path):
    write_ramp(tmp_path / "x.flac", 40 * 8000)
    with open(tmp_path / "x.flac", "r+b") as file:
        file.seek(22)  # the number of samples: 0 is what a stream says
        file.write(bytes(4))
    clips = data.AudioClips(tmp_path, 8000, clip_seconds=5.0)
    clip, _, bad = clips.read(0, 0)
    assert len(clip.unique()) > 100
    assert bad == []
    assert sum(len(window) for window in clips.source.windows(0, 40000)) == 40 * 8000


@pytest.mark.parametrize("before", [b"", bytes(4096)])  # as a tag may leave it
def test_the_windows_of_an_mp3_are_all_of_it(tmp_path, before):
    path = write_as("mp3 MP3 MPEG_LAYER_III", tmp_path, noise(12, 8000), 8000)
    path.write_bytes(before + path.read_bytes())
    expected, _ = soundfile.read(path, dtype="float32")
    windows = list(data.AudioFiles(tmp_path, 8000).windows(0, 8000))
    assert_close(torch.cat(windows), torch.from_numpy(expected))


# ================================================================================================
# data.py: clips


@pytest.mark.parametrize("kind", ["files", "synthetic"])
def test_a_clip_is_a_pure_function_of_seed_epoch_and_number(sounds, kind):
    def read(seed, epoch, i, before=0):
        clips = data.SyntheticClips(clip_seconds=0.625, seed=seed)
        if kind == "files":
            clips = data.AudioClips(sounds, clip_seconds=0.625, seed=seed)
        clips.read(0, before)
        return clips.read(epoch, i)[0].tolist()

    clip = read(7, 3, 2)
    assert read(7, 3, 2, before=9) == clip
    for other in [(7, 4, 2), (7, 3, 1), (8, 3, 2)]:
        assert read(*other) != clip


def test_a_clip_may_be_shorter_than_a_patch():
    (clip,) = data.SyntheticClips(num_clips=1, clip_seconds=0.5)
    assert len(clip) == 16000


def test_any_data_loader_takes_clips_and_subsets_of_them(sounds):
    clips = data.AudioClips(sounds, clip_seconds=2.5)
    (batch,) = DataLoader(Subset(clips, [3, 1]), batch_size=2, num_workers=1)
    assert torch.equal(batch, torch.stack([clips[3], clips[1]]))


def test_excerpts_of_a_recording_reach_its_start_and_its_end(tmp_path):
    write_ramp(tmp_path / "x.wav", 5003)
    clips = data.AudioClips(tmp_path, 8000, clip_seconds=0.625)
    starts = {clips.read(epoch, 0)[0][0].item() for epoch in range(50)}
    ramp, _ = soundfile.read(tmp_path / "x.wav", dtype="float32")
    assert starts == set(ramp[:4].tolist())


def test_a_long_recording_gives_another_excerpt_in_each_epoch(tmp_path):
    write_ramp(tmp_path / "x.wav", 90 * 8000)
    clips = data.AudioClips(tmp_path, 8000)
    starts = set()
    for epoch in range(20):
        clips.epoch = epoch
        clip = clips[0]
        starts.add(clip[0].item())
        assert clip[-1] - clip[0] == pytest.approx(0.2, abs=1e-4)  # 10 of 90 s in one piece
    assert len(starts) == 20


def test_a_short_recording_is_filled_up_with_others(tmp_path):
    for i, level in enumerate([0.25, 0.5, 0.75]):
        write_level(tmp_path / f"{i}.wav", level, seconds=3)
    clip = data.AudioClips(tmp_path, seed=1)[1]
    assert (clip[:96000] == 0.5).all()
    assert (clip > 0).all()
    assert (clip != 0.5).any()


@pytest.mark.parametrize("recording, silent", [(9.3, 0.0), (9.5, 0.5)])
def test_only_a_rest_shorter_than_a_patch_stays_silent(tmp_path, recording, silent):
    write_level(tmp_path / "x.wav", 0.5, recording)
    clip = data.AudioClips(tmp_path)[0]
    assert clip.shape == (320000,)
    assert (clip == 0).sum() == silent * 32000


@pytest.mark.parametrize("content", [b"", b"no audio" * 99, b"ID3", [], [np.nan], [np.inf]])
def test_a_bad_recording_is_replaced_and_reported(tmp_path, content):
    path = tmp_path / "a bad.mp3"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        soundfile.write(path, content, 32000, "FLOAT", format="WAV")
    write_level(tmp_path / "good.wav", 0.5)
    clip, reads, bad = data.AudioClips(tmp_path).read(0, 0)
    assert (clip == 0.5).all()
    assert reads == len(bad) + 1
    assert bad[0][0] == "a bad.mp3"
    assert bad[0][1] != ""


def test_ten_bad_recordings_in_a_row_are_an_error_even_after_a_good_one(tmp_path):
    for n in range(30):
        (tmp_path / f"{n}.wav").write_text("no audio")
    write_level(tmp_path / "good.wav", 0.5, seconds=1.0)
    clips = data.AudioClips(tmp_path)  # of 10 s
    with pytest.raises(OSError, match="ten recordings in a row"):
        clips[30]


def test_every_epoch_reads_each_clip_once_in_an_order_of_its_own():
    read = []
    for batch in data.clip_order(30, 0, 12, range(10), [slice(0, 6), slice(6, 12)]):
        read += batch
    assert sorted(read) == list(itertools.product(range(4), range(30)))
    clips = [i for _, i in read]
    assert clips[:30] != clips[30:60]


# ================================================================================================
# data.py: scan and pack


def test_packing_keeps_the_log_mel_of_all_of_a_recording(tmp_path):
    files = data.AudioFiles(corpus(tmp_path / "c", 2, seconds=25), 32000)
    data.pack(files, tmp_path / "p")
    clips = data.AudioClips(tmp_path / "p", clip_seconds=25.0)
    assert clips[1].shape == (25 * 25.6, 128)
    begin = next(files.windows(1, 320000))
    expected = data.LogMel().frames(begin.unsqueeze(0))[0]
    assert (clips[1][:256] - expected).abs().max() < 0.01


DATA_REFUSES = """
scan {tmp}/nowhere       nowhere: does not exist
pack {packed} {tmp}/p    no audio found
pack {sounds} {packed}   File exists
"""


@pytest.mark.parametrize("row", DATA_REFUSES.strip().splitlines())
def test_data_py_says_in_one_line_what_is_wrong(tmp_path, sounds, packed, row):
    row = row.format(tmp=tmp_path, sounds=sounds, packed=packed)
    command, hint = re.split("   *", row)
    (line,) = run_python("data.py", *command.split(), code=2).stderr.splitlines()
    assert line.startswith("error: ")
    assert hint in line


def test_scan_names_what_is_bad_and_counts_the_rest(tmp_path):
    folder = corpus(tmp_path / "c", 4)
    soundfile.write(folder / "silent.flac", np.zeros((44100, 2)), 44100)
    (folder / "bad.wav").write_text("no audio")
    printed = run_python("data.py", "scan", folder).stdout
    assert printed.startswith("bad.wav: ")
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in ("6 recordings", "1 unreadable", "1 silent", "1 2 channels"):
        assert line in lines


# ================================================================================================
# train.py: a step, by hand


def test_the_learning_rate_is_the_papers():
    rates = [train.learning_rate(step, 100000) for step in (0, 500, 1000, 50500, 100000)]
    assert rates == pytest.approx([1e-6, 1.505e-4, 3e-4, 1.5e-4, 0])


def test_the_defaults_are_the_papers():
    args = vars(train.parse_args([]))
    papers = {
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
    assert {name: args[name] for name in papers} == papers


def test_a_step_is_masks_targets_loss_adamw_and_ema(whole_run, tmp_path):
    before, _ = read_run(whole_run)  # whose two encoders differ
    flags = ["--init", whole_run / "last.pt", "--steps", 3, "--ema", 0.5, "--weight-decay", 5.0]
    after, log = pretrain(tmp_path, *flags)
    jepa = JEPA(JEPAConfig(**after["config"]["model"]))
    target_encoder = VisionTransformer(jepa.config)
    networks = {
        "context_encoder": jepa.context_encoder,
        "target_encoder": target_encoder,
        "predictor": jepa.predictor,
    }
    for name, network in networks.items():
        network.load_state_dict(before[name])

    matrices = [weight for weight in jepa.parameters() if weight.ndim == 2]
    others = [weight for weight in jepa.parameters() if weight.ndim == 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=5.0, fused=True)
    clips = data.SyntheticClips(clip_seconds=1.25)
    order = data.clip_order(len(clips), 0, 8, range(3), [slice(0, 8)])
    for step, batch in enumerate(data.clip_loader(clips, order, workers=0)):
        spectrogram = data.LogMel(**after["config"]["log_mel"])(batch.clips)
        mask = masking.random_mask
        idx = masking.draw_masks(mask, 0, step, 16, (2, 8), (0.4, 0.6), "cpu")
        targets = target_encoder(spectrogram)
        first = jepa(spectrogram, *[tensor[0::2] for tensor in idx], targets)
        second = jepa(spectrogram, *[tensor[1::2] for tensor in idx], targets)
        loss = (first + second) / 2  # --masks-per-clip 2
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, 3, warmup=0)
        optimizer.step()
        optimizer.zero_grad()
        decay = masking.ema_decay(step, 3, 0.5)
        masking.update_ema(target_encoder, jepa.context_encoder, decay)
        assert log["loss"][step] == pytest.approx(loss.item(), rel=1e-5)
    for name, network in networks.items():
        for key, expected in network.state_dict().items():
            moved = (expected - before[name][key]).norm()
            assert (after[name][key] - expected).norm() <= 0.01 * moved


# ---- Monitors


def test_explained_is_1_for_a_perfect_predictor_and_0_for_a_blind_one():
    jepa = JEPA(SMALL)
    targets = torch.randn(16, 12, 32) + torch.randn(12, 32)
    target_idx = torch.arange(12).expand(16, -1)
    normalised = model.normalise_targets(targets)
    blind = model.l2_loss(normalised.mean(0), normalised).item()
    assert train.explained(jepa, 0.0, targets, target_idx) == pytest.approx(1)
    assert train.explained(jepa, blind, targets, target_idx) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "clips, tokens, expected",  # token_std, target_std, effective_rank, mean_cosine
    [
        (256, 4, [0.8, 0.5, 57, 0.0]),  # healthy
        (1, 4, [0.8, 0.0, 1, 1.0]),  # all clips are alike
        (256, 1, [0.0, 1.0, 57, 0.0]),  # all tokens of a clip are alike
    ],
)
def test_monitors_tell_healthy_targets_from_clips_or_tokens_that_are_alike(clips, tokens, expected):
    targets = torch.randn(clips, tokens, 64).expand(256, 4, 64)
    found = list(train.monitors(targets).values())
    assert found == pytest.approx(expected, rel=0.1, abs=0.05)


def test_a_collapse_is_visible_in_the_log(tmp_path):
    flags = ["--masks-per-clip", 1, "--lr", 0.005, "--ema", 0, "--ema-end", 0, "--steps", 30]
    _, log = pretrain(tmp_path, *flags)
    first = log[0]
    last = log[-1]
    assert last["loss"] < 0.5 * first["loss"]  # which alone looks like learning
    assert last["explained"] < 0
    assert last["token_std"] < 0.1 * first["token_std"]
    assert last["target_std"] < 0.1 * first["target_std"]
    assert last["effective_rank"] < 0.8 * first["effective_rank"]
    assert last["mean_cosine"] > 0.99


# ---- Runs


def test_a_run_learns_logs_and_leaves_a_checkpoint_of_plain_data(whole_run):
    checkpoint, log = read_run(whole_run)  # reads tensors and plain types, nothing else
    assert log["step"].tolist() == list(range(1, 21))
    assert log["loss"][-1] < 0.8 * log["loss"][0]
    for name in log.dtype.names:
        assert np.isfinite(log[name]).all()
    assert {"format", "config", "progress", "settings", "optimizer", "scaler"} <= set(checkpoint)


def interrupt(launch, number, step, out, *flags):
    """Start a run, and send it a signal when it has logged a step."""
    process = launch("train.py", *TINY, "--save-every", 5, "--out", out, *flags)
    wait_for_step(out, step)
    process.send_signal(number)
    process.wait(60)
    assert torch.load(out / "last.pt", weights_only=True)["step"] < 20
    if number == signal.SIGKILL:
        with open(out / "log.csv", "a") as file:
            file.write("1")  # as if in the middle of a line


@pytest.mark.parametrize(
    "interruption, processes, flags, tolerance",
    [
        (None, 2, "--accum 2", 1e-4),  # sums are rounded in another order
        (signal.SIGTERM, 1, "--workers 2", 0.0),
        (signal.SIGKILL, 1, "--workers 0", 0.0),
        (signal.SIGTERM, 2, "--accum 1", 1e-4),
        (signal.SIGKILL, 1, "--accum 4", 1e-4),
    ],
)
def test_it_is_the_same_run(
    whole_run, sounds, launch, tmp_path, interruption, processes, flags, tolerance
):
    """Accumulated, in two processes, stopped, killed, and continued in another way."""
    flags = ["--data", sounds, *flags.split()]
    if interruption is not None:
        interrupt(launch, interruption, 6, tmp_path, "--data", sounds)
    if processes == 1:
        pretrain(tmp_path, *flags)
    else:
        run_python(*TORCHRUN, "train.py", *TINY, "--out", tmp_path, *flags)
    checkpoint, log = read_run(tmp_path)
    expected, expected_log = read_run(whole_run)
    assert_same_weights(checkpoint, expected, tolerance)
    monitors = ("explained", "token_std", "target_std", "effective_rank", "mean_cosine")
    for name in ("step", "loss", "grad_norm", "bad_files", *monitors):
        assert log[name] == pytest.approx(expected_log[name], rel=10 * tolerance)


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_a_continued_run_keeps_its_precision_and_its_mean_and_std(whole_run, sounds, tmp_path, amp):
    stopped, _ = read_run(whole_run)
    stopped["progress"]["step"] = 18
    stopped["settings"]["amp"] = amp  # as if it had begun on another machine
    stopped["config"]["log_mel"]["mean"] = -5.0
    torch.save(stopped, tmp_path / "last.pt")
    continued, _ = pretrain(tmp_path, "--data", sounds, "--amp", "auto")
    assert continued["settings"]["amp"] == amp
    assert continued["config"]["log_mel"]["mean"] == -5


def test_torchrun_restarts_a_run_whose_process_was_killed(launch, tmp_path):
    restarts = ["--max-restarts=3", "--monitor-interval=0.2"]
    flags = [*TINY, "--save-every", 5, "--out", tmp_path]
    launcher = launch(*TORCHRUN, *restarts, "train.py", *flags)
    wait_for_step(tmp_path, 7)
    os.kill(children(launcher)[-1], signal.SIGKILL)
    assert launcher.wait(180) == 0
    _, log = read_run(tmp_path)
    assert log["step"].tolist() == list(range(1, 21))


def test_a_signal_to_all_processes_ends_a_run_within_the_step(launch, tmp_path):
    process = launch("train.py", *TINY, "--steps", 100000, "--workers", 1, "--out", tmp_path)
    wait_for_step(tmp_path, 1)
    for pid in [*children(process), process.pid]:  # as Slurm and Ctrl-C do
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "stopping after this step" in errors
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] < 1000


def test_a_signal_while_the_data_is_measured_is_heard(launch, tmp_path):
    process = launch("train.py", *TINY, "--workers", 2, "--out", tmp_path)
    assert "measuring" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "of 20 steps done" in printed


def test_lines_come_at_once(launch, tmp_path):
    process = launch("train.py", *TINY, "--steps", 100000, "--log-every", 20, "--out", tmp_path)
    while not process.stdout.readline().startswith("step 1 "):
        assert process.poll() is None
    wait_for_step(tmp_path, 1)
    assert (tmp_path / "log.csv").read_text().count("\n") < 6
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    "workers, code, hint", [(0, 1, "last.pt is not written"), (1, 2, "--shm-size.* --workers 0")]
)
def test_a_full_disk_or_shared_memory_is_said_in_one_line(tmp_path, workers, code, hint):
    limit = "from resource import *; setrlimit(RLIMIT_FSIZE, (2**20, 2**20))"
    program = f"{limit}; import train; train.main()"
    flags = [*TINY, "--steps", 1, "--workers", workers, "--out", tmp_path]
    (line,) = run_python("-c", program, *flags, code=code).stderr.splitlines()
    assert re.search(hint, line)
    assert not (tmp_path / "last.pt").exists()


def test_whole_file_keeps_what_was_there_when_writing_fails(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("before")
    with pytest.raises(OSError, match=r"last\.pt.*disk is full"):
        with data.whole_file(path) as file:
            file.write(b"half")
            raise OSError("disk is full")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_are_kept_under_their_step_without_the_optimizer(whole_run):
    kept = sorted(path.name for path in whole_run.glob("*.pt"))
    assert kept == ["last.pt", "step-0000008.pt", "step-0000016.pt"]
    checkpoint = torch.load(whole_run / "step-0000008.pt", weights_only=True)
    assert checkpoint["step"] == 8
    assert "optimizer" not in checkpoint


def test_init_takes_the_small_weights_of_the_repository(tmp_path):
    flags = "--steps 2 --lr 1e-6 --positions rotary --init".split()
    checkpoint, _ = pretrain(tmp_path, *flags, SMALL_WEIGHTS)
    stored = torch.load(SMALL_WEIGHTS, weights_only=True)["target_encoder"]
    for network in ("context_encoder", "target_encoder"):
        weight = checkpoint[network]["blocks.0.mlp.fc1.weight"]
        assert_close(weight, stored["blocks.0.mlp.fc1.weight"].float(), rtol=0, atol=1e-4)


# ---- Choices


@pytest.mark.parametrize(
    "flags",
    [
        "--mask block --loss cosine --data {packed}",
        "--amp bf16 --batch-size 4 --sample-rate 16000",  # slow where a CPU emulates bf16
        "--positions rotary --target-norm clip --ema 0.99 --ema-end 0.999",
    ],
)
def test_every_choice_trains(tmp_path, packed, flags):
    _, log = pretrain(tmp_path, *flags.format(packed=packed).split())
    assert log["loss"][-1] < log["loss"][0]
    assert log["skipped"][-1] == 0


def test_a_recipe_sets_flags_and_the_command_line_has_the_last_word():
    args = train.parse_args("--recipe small --steps 20 --lr 1e-4".split())
    assert [args.model, args.target_norm, args.lr] == ["tiny", "clip", 1e-4]
    assert args.warmup == 2  # a warm-up of all steps is cut to a tenth of them


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_train_like_eager_ones_under_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setitem(
        PRESETS, "tiny", dataclasses.replace(SMALL, mel_bins=128, depth=1, predictor_depth=1)
    )
    flags = ["--steps", 3, "--mask-ratio", 0.5, 0.5]
    eager, eager_log = pretrain(tmp_path / "eager", *flags)
    compiled, log = pretrain(tmp_path / "compiled", *flags, "--compile")
    assert log["loss"] == pytest.approx(eager_log["loss"], rel=1e-3)
    for network in ("context_encoder", "target_encoder", "predictor"):
        assert compiled[network].keys() == eager[network].keys()  # no _orig_mod.


# ---- Bad input and bad luck


def test_a_bad_recording_is_listed_once_and_counted_each_time(whole_run):
    _, log = read_run(whole_run)
    (line,) = (whole_run / "bad_files.txt").read_text().splitlines()
    assert line.startswith("bad.wav\t")
    assert log["bad_files"][-1] >= 5


def test_a_gradient_that_one_process_makes_infinite_is_skipped_by_all(launch, tmp_path):
    folder = corpus(tmp_path / "c", 20, seconds=1.25)
    flags = ["--data", folder]
    interrupt(launch, signal.SIGTERM, 3, tmp_path / "out", *flags)
    soundfile.write(folder / "000.wav", 1e30 * noise(1.25), 32000, subtype="FLOAT")  # overflows
    run_python(*TORCHRUN, "train.py", *TINY, "--out", tmp_path / "out", *flags)
    _, log = read_run(tmp_path / "out")
    skipped = np.isnan(log["loss"])
    first = skipped.argmax()
    assert log["skipped"][-1] == skipped.sum() > 0
    # A process that did not skip would have weights of NaN, and no further step would be finite.
    assert not skipped[first:].all()


TRAIN_REFUSES = """
2  --data {wrong}/nowhere                   nowhere
2  --data {wrong}/text                      text: no audio found
2  --data {wrong}/list.txt                  list.txt: there is no file gone.wav
2  --data {wrong}/audioset.csv              audioset.csv: no audio found
2  --data {wrong}/x.bin                     x.bin
2  --data {wrong}/bad                       ten recordings in a row
1  --data {wrong}/mostly --steps 40         reads of recordings failed
1  --lr 1e38 --steps 40                     no finite gradient in 20 steps
2  --data {packed} --sample-rate 16000      packed at 32000 Hz, not at 16000
2  --data {wrong}/part                      ten recordings in a row
2  --batch-size 10 --accum 4                --accum 4
2  --steps many                             --steps
2  --log-every 0                            --log-every
2  --sample-rate 44100                      a multiple of 128
2  --clip-seconds 4                         a multiple of 0.625
2  --clip-seconds 0                         a multiple of 0.625
2  --mask-ratio 0 0.5                       --mask-ratio
2  --mask-ratio 0.6 0.4                     --mask-ratio
2  --model huge                             huge
2  --nonsense                               --nonsense
2  --out /proc/runs                         /proc/
2  --init {wrong}/nowhere.pt                nowhere.pt
2  --init {run}/last.pt --model small       --model small
2  --init {run}/last.pt --positions rotary  --positions rotary
2  --out {run} --lr 0.001                   --lr is 0.001, but 0.0003
2  --out {run} --seed 1                     --seed is 1
2  --out {run} --mask-ratio 0.3 0.6         --mask-ratio is
2  --out {run} --steps 30                   use --init {run}/last.pt
2  --out {run}                              --data is synthetic
2  --out {run} --data {sounds} --amp bf16   --amp is bf16, but off
2  --out {wrong}/half                       last.pt: not a checkpoint
2  --out {wrong}/void                       last.pt: not a checkpoint
2  --out {wrong}/text                       last.pt: not a checkpoint
2  --out {wrong}/old                        of the format audio-jepa 1, not audio-jepa 2
2  --out {wrong}/kept --data {sounds}       no optimizer: use --init {wrong}/kept/last.pt
"""


@pytest.fixture(scope="module")
def wrong(whole_run, packed, tmp_path_factory):
    """Data that cannot be used, and runs that cannot be continued."""
    folder = tmp_path_factory.mktemp("wrong")
    contents = {
        "list.txt": b"gone.wav",
        "audioset.csv": b"# Segments csv\n--aE2O5G5WE, 0.0, 10.0\n",
        "x.bin": b"\0",
        "bad/x.wav": b"no audio",
        "mostly/x.wav": b"no audio",
        "half/last.pt": (whole_run / "last.pt").read_bytes()[: 2**20],
        "void/last.pt": b"",
        "text/last.pt": b"text",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    checkpoint, _ = read_run(whole_run)
    del checkpoint["optimizer"]
    for name in ("kept", "old"):
        (folder / name).mkdir()
        torch.save(checkpoint, folder / name / "last.pt")
        checkpoint["format"] = "audio-jepa 1"
    write_level(folder / "mostly" / "y.wav", 0.5)
    shutil.copytree(packed, folder / "part")
    os.truncate(folder / "part" / "frames.f16", 1000)
    return folder


@pytest.mark.parametrize("row", TRAIN_REFUSES.strip().splitlines())
def test_train_py_says_in_one_line_what_is_wrong(
    capsys, tmp_path, sounds, packed, whole_run, wrong, row
):
    row = row.format(sounds=sounds, packed=packed, run=whole_run, wrong=wrong)
    code, flags, hint = re.split("   *", row)
    line = refusal(capsys, train.main, [*TINY, "--out", tmp_path, *flags.split()], int(code))
    assert hint in line
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    "setting, out",
    [("seed", "new --seed $RANK"), ("accum", "new --accum $((RANK + 1))"), ("step", "$RANK")],
)
def test_processes_that_disagree_end_together(whole_run, sounds, tmp_path, setting, out):
    shutil.copytree(whole_run, tmp_path / "0")
    program = [sys.executable, "train.py", *TINY, "--data", sounds, "--out", tmp_path / out]
    program = " ".join(map(str, program))
    done = run_python(*TORCHRUN, "--no-python", "bash", "-c", program, code=1)
    assert done.stderr.count(f"error: {setting} is ") == 2


def test_processes_without_torchrun_are_told_to_use_it(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "2")
    assert "start it with torchrun" in refusal(capsys, train.main, TINY)


def test_world_size_without_a_launcher_is_one_process(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, log = pretrain(tmp_path, "--steps", 1)
    assert log["step"] == 1


# ================================================================================================
# extract.py


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small network with the paper's excerpts and patches."""
    torch.manual_seed(0)
    sizes = {"dim": 64, "depth": 2, "heads": 1}
    stored = {
        "format": "audio-jepa 2",
        "step": 3,
        "config": {"model": sizes, "log_mel": {"mean": -7.0, "std": 4.0}},
        "target_encoder": VisionTransformer(JEPAConfig(**sizes)).state_dict(),
    }
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    torch.save(stored, path)
    return path


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return extract.load_encoder(checkpoint)


SECONDS = [0.03, 10.0, 25.0, 0.7, 20.0, 12.1]  # less than a row, one excerpt, several


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for n, seconds in enumerate(SECONDS):
        rate = [32000, 44100, 8000][n % 3]
        soundfile.write(folder / f"{n}.wav", noise(seconds, rate, seed=n), rate)
    return folder


def run_extract(*flags):
    extract.main(["--workers", "0", *map(str, flags)])


def embeddings(checkpoint, path, out, *flags):
    run_extract(checkpoint, path, "--out", out, *flags)
    with np.load(out) as file:
        return dict(file)


@pytest.fixture(scope="module")
def pooled(checkpoint, recordings, tmp_path_factory):
    """Embeddings, a row for each recording and one for each 625 ms."""
    out = tmp_path_factory.mktemp("pooled") / "e.npz"
    by_recording = embeddings(checkpoint, recordings, out)
    return by_recording, embeddings(checkpoint, recordings, out, "--pool", "time")


# ---- The encoder as a module: padding is not heard; X-ARES, fine-tuning


@pytest.mark.parametrize(
    "samples, rows", [(1000, 1), (50000, 3), (320000, 16), (320001, 17), (600 * 32000, 960)]
)
def test_a_waveform_gives_a_row_for_each_625_ms_that_it_reaches_into(encoder, samples, rows):
    made = encoder(torch.randn(1, samples))
    assert made.shape == (1, rows, 512)
    assert made.dtype == torch.float32
    assert made.isfinite().all()


def test_the_sound_is_mirrored_until_the_clip_is_full(encoder):
    """By hand: a clip is 10 s, and 4 s reach into 7 of its 16 rows."""
    waveform = torch.randn(1, 128000)
    clip = torch.cat([waveform, waveform.flip(1), waveform], dim=1)[:, :320000]
    tokens = encoder.network(encoder.log_mel(clip))
    assert_close(encoder(waveform), tokens.view(1, 16, 512)[:, :7])


@pytest.mark.parametrize("samples", [1000, 330000])
def test_padding_changes_no_row_and_has_rows_of_zeros(encoder, samples):
    waveform = torch.randn(1, samples)
    alone = encoder(waveform)[0]
    others = torch.randn(2, 700000)
    padded = torch.cat([others, F.pad(waveform, (0, 700000 - samples))])
    rows = encoder(padded)[2]
    assert_close(rows[: len(alone)], alone)
    assert not rows[len(alone) :].any()


def test_only_zeros_at_the_end_are_padding_unless_lengths_are_given(encoder):
    def encoded(*parts, lengths=None):
        return encoder(torch.cat(parts, 1), lengths)[0].any(1).tolist()

    sound = torch.randn(1, 40000)  # in two rows
    zeros = torch.zeros(1, 40000)
    assert encoded(sound, zeros) == [True, True, False, False]
    assert all(encoded(sound, zeros, lengths=torch.tensor([80000])))
    assert all(encoded(sound, zeros, sound))
    assert all(encoded(zeros))  # nothing but silence


def test_xares_finds_one_encoder_and_builds_it_in_a_spawned_process(
    checkpoint, encoder, monkeypatch
):
    (name,) = [name for name in dir(extract) if name.endswith("Encoder")]
    monkeypatch.setenv("AUDIO_JEPA_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("AUDIO_JEPA_BANDS", "mean")
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        made = pool.apply(getattr(extract, name))
    assert [made.sampling_rate, made.hop_size_in_ms, made.output_dim] == [32000, 625, 64]
    waveform = torch.randn(1, 50000)
    assert_close(made(waveform), encoder(waveform).unflatten(2, (8, 64)).mean(2))


def test_the_encoder_is_frozen_until_its_user_lifts_that(checkpoint):
    encoder = extract.load_encoder(checkpoint)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.requires_grad_(True).train()
    rows = encoder(torch.randn(2, 50000))
    (rows * torch.randn_like(rows)).sum().backward()
    assert all(parameter.grad.any() for parameter in encoder.parameters())


# ---- Embeddings of a folder


def test_embeddings_have_a_row_a_recording_and_tell_how_they_were_made(pooled):
    by_recording, _ = pooled
    assert by_recording["embeddings"].shape == (6, 8 * 64)
    assert by_recording["offsets"].tolist() == list(range(7))
    assert by_recording["paths"].tolist() == [f"{n}.wav" for n in range(6)]
    assert by_recording["seconds"] == pytest.approx(SECONDS, abs=1e-4)
    numbers = [by_recording[name].item() for name in ("sample_rate", "hop_ms", "step")]
    assert numbers == [32000, 625, 3]
    config = json.loads(by_recording["config"].item())
    assert config["log_mel"]["mean"] == -7
    assert config["bands"] == "concat"


@pytest.mark.parametrize("flags", ["--batch-size 1", "--batch-size 5 --workers 2"])
def test_rows_depend_on_neither_batching_nor_workers(
    checkpoint, recordings, tmp_path, pooled, flags
):
    flags = ["--pool", "time", *flags.split()]
    made = embeddings(checkpoint, recordings, tmp_path / "e.npz", *flags)
    assert_close(made["embeddings"], pooled[1]["embeddings"])


def test_the_rows_of_a_folder_are_those_of_the_encoder(encoder, recordings, pooled):
    waveform, _ = soundfile.read(recordings / "3.wav", dtype="float32")  # 0.7 s at 32 kHz
    rows = encoder(torch.from_numpy(waveform).unsqueeze(0))
    begin, end = pooled[1]["offsets"][3:5]
    assert_close(pooled[1]["embeddings"][begin:end], rows[0].numpy())


def test_rows_are_pooled_to_their_mean_by_the_sound_in_them(pooled):
    by_recording, by_time = pooled
    recordings = np.split(by_time["embeddings"], by_time["offsets"][1:-1])
    for n, rows in enumerate(recordings):
        assert len(rows) == math.ceil(SECONDS[n] / 0.625)
        weights = np.ones(len(rows))
        weights[-1] = SECONDS[n] / 0.625 - (len(rows) - 1)  # the share of the last that holds sound
        mean = np.average(rows, axis=0, weights=weights)
        assert np.abs(by_recording["embeddings"][n] - mean).max() < 1e-5


def test_a_bad_recording_is_named_and_left_out_as_a_whole_with_skip_bad(
    checkpoint, recordings, tmp_path, pooled, capsys
):
    folder = tmp_path / "all"
    shutil.copytree(recordings, folder)
    sound = noise(31)
    sound[-100] = np.nan  # in the last of four excerpts
    soundfile.write(folder / "3b.wav", sound, 32000, subtype="FLOAT")
    flags = [checkpoint, folder, "--out", tmp_path / "e.npz"]
    assert "3b.wav: holds NaN" in refusal(capsys, extract.main, flags)
    assert list(tmp_path.iterdir()) == [folder]
    made = embeddings(checkpoint, folder, tmp_path / "e.npz", "--skip-bad")
    assert list(made["paths"]) == list(pooled[0]["paths"])
    assert_close(made["embeddings"], pooled[0]["embeddings"])
    assert capsys.readouterr().err.startswith("left out: 3b.wav: holds NaN")


# ---- Probes


def labelled(separation, clips=200, width=16):
    """Clips [clips, width] of four classes around a centre each -> them, labels, a fold."""
    labels = torch.arange(clips) % 4
    centres = separation * torch.randn(4, width)
    train, valid, test = torch.arange(clips).split([clips - 80, 40, 40])
    fold = extract.Fold(train, train % 5, valid, test)
    return torch.randn(clips, width) + centres[labels], labels, fold


def test_knn_is_what_the_readme_says():
    embeddings, labels, fold = labelled(0.5)
    embeddings[fold.test] += embeddings[0]  # of which the standardising must know nothing
    x = embeddings.double()
    x = F.normalize((x - x[fold.train].mean(0)) / x[fold.train].std(0))
    expected = []
    for clip in fold.test:
        nearest = (x[fold.train] @ x[clip]).topk(10)
        weights = torch.exp(nearest.values / 0.07)
        votes = torch.bincount(labels[fold.train][nearest.indices], weights)
        expected.append(votes.argmax().item())
    assert extract.knn(embeddings, labels, fold).tolist() == expected


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probe_finds_what_is_there_and_nothing_else(probe):
    features, labels, fold = labelled(1.0, clips=300, width=64)
    if probe == "attentive":  # among other rows, from which the one that counts can be told
        alone = 3 * features.unsqueeze(1)
        features = [torch.cat([torch.randn(i % 5, 64), row]) for i, row in enumerate(alone)]

    def share_right(labels):
        right = extract.PROBES[probe](features, labels, fold) == labels[fold.test]
        return right.float().mean()

    assert share_right(labels) > 0.9
    assert share_right(labels[torch.randperm(300)]) < 0.5


def test_the_linear_probe_converges_to_the_minimum_of_the_penalised_cross_entropy():
    x, labels, _ = labelled(0.5)
    x = (x + 10 * torch.randn(200, 1)).double()  # an overall level, which hides the classes
    weight, bias = extract.fit(x, labels, 0.01)
    weight.requires_grad_()
    bias.requires_grad_()
    cross_entropy = F.cross_entropy(x @ weight + bias, labels)
    (cross_entropy + 0.005 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


def write_task(folder, splits):
    """Which of three pitches? Four clips a class in each split."""
    for split, hertz in itertools.product(splits.split(), [200, 1500, 6000]):
        label = folder / split / str(hertz)
        label.mkdir(parents=True)
        for n in range(4):
            sound = tone(0.6, hertz=hertz * (1 + 0.01 * n)) + noise(0.6, seed=n) / 30
            soundfile.write(label / f"{n}.wav", sound, 32000)
    return folder


def probe(checkpoints, task, *flags):
    """A run of probes -> the JSON that it writes."""
    path = task.with_suffix(".json")
    run_extract(*checkpoints, task, "--json", path, "--probe", *flags)
    return json.loads(path.read_text())


def test_the_table_compares_an_encoder_with_what_it_has_to_beat(checkpoint, tmp_path, capsys):
    task = write_task(tmp_path / "task", "train test")
    table = probe([checkpoint], task, "knn", "linear", "attentive")["accuracy"]
    assert list(table) == ["log-mel", "untrained", str(checkpoint)]
    printed = capsys.readouterr().out
    for result in table.values():
        assert list(result) == ["knn", "linear", "attentive"]
        error = math.sqrt(result["knn"] * (1 - result["knn"]) / 12)
        assert f"knn {result['knn']:.3f} +- {error:.3f}" in printed


def test_each_checkpoint_is_a_line_of_the_table_and_hears_at_its_own_rate(checkpoint, tmp_path):
    task = write_task(tmp_path / "task", "train test")
    stored = torch.load(checkpoint, weights_only=True)
    stored["config"]["log_mel"]["sample_rate"] = 16000
    other = tmp_path / "other.pt"
    torch.save(stored, other)
    both = probe([other, checkpoint], task, "knn")["accuracy"]
    for path in (checkpoint, other):
        assert both[str(path)] == probe([path], task, "knn")["accuracy"][str(path)]


@pytest.mark.parametrize(
    "splits, expected",
    [
        ("train test", [3, 1, 12]),
        ("train valid test", [3, 1, 12]),
        ("fold1 fold2 fold3", [3, 3, 36]),
    ],
)
def test_the_json_tells_what_was_tested(checkpoint, tmp_path, splits, expected):
    found = probe([checkpoint], write_task(tmp_path / "task", splits), "knn")
    assert [found[name] for name in ("classes", "folds", "test")] == expected


def test_chance_is_the_share_of_the_commonest_class_over_all_folds(checkpoint, tmp_path):
    for path in ("fold1/a/1", "fold1/a/2", "fold1/b/1", "fold2/b/1", "fold2/b/2", "fold2/a/1"):
        (tmp_path / "task" / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "task" / f"{path}.wav", noise(0.1), 32000)
    assert probe([checkpoint], tmp_path / "task", "knn")["chance"] == 0.5


def test_folders_called_fold_are_tested_in_turn_and_kept_apart():
    names = [f"fold{n // 2}/{n % 2}/x.wav" for n in range(6)]
    _, folds = extract.read_task("x", names)
    assert [fold.test.tolist() for fold in folds] == [[0, 1], [2, 3], [4, 5]]
    assert folds[0].train.tolist() == [2, 3, 4, 5]
    assert folds[0].inner_fold.tolist() == [1, 1, 2, 2]  # of the cross-validation


def test_tars_called_train_and_test_are_the_splits_of_a_task():
    names = ["train.tar/a/1.wav", "train.tar/b/2.wav", "test.tar/b/3.wav"]
    labels, (fold,) = extract.read_task("x", names)
    assert labels.tolist() == [0, 1, 1]
    assert fold.test.tolist() == [2]


def test_folders_by_label_are_tested_a_fifth_at_a_time():
    classes = ["boat", "plane", "train"]  # the last is no split here
    labels, folds = extract.read_task("x", [f"{classes[n % 3]}/{n}.wav" for n in range(30)])
    tested = []
    for fold in folds:
        assert labels[fold.test].bincount().tolist() == [2, 2, 2]
        tested += fold.test.tolist()
    assert sorted(tested) == list(range(30))


@pytest.mark.parametrize(
    "folders",
    [
        "a b .",  # some without a label
        "a",  # one class
        "train/a test/a",
        "train test",
        "train/a train/b",
        "train/a train/b test/a test/b others/a",
        "fold1/a fold1/b",  # one fold
    ],
)
def test_folders_that_are_no_task_are_refused(folders):
    names = [os.path.normpath(f"{folder}/x.wav") for folder in folders.split()]
    with pytest.raises(ValueError, match="LABEL"):
        extract.read_task("x", 10 * names)


# ---- Checkpoints: ours, the authors', and none


def test_the_authors_checkpoint_gives_the_same_embeddings(checkpoint, tmp_path):
    theirs = {"predictor.mask_token": torch.zeros(1, 1, 8)}
    for name, tensor in torch.load(checkpoint, weights_only=True)["target_encoder"].items():
        if name == "patch_embed.weight":
            tensor = tensor.view(-1, 1, 16, 16)  # of a convolution
        if name == "pos_embed":
            tensor = tensor.unsqueeze(0)
        name = name.replace("patch_embed", "patch_embed.proj")
        name = name.replace("attn.qkv", "attn.Wqkv").replace("attn.proj", "attn.out_proj")
        theirs[f"encoder._orig_mod.{name}"] = torch.zeros_like(tensor)
        theirs[f"target_encoder.{name}"] = tensor
    stored = {"state_dict": theirs, "global_step": 100000, "hyper_parameters": SMALL}
    torch.save(stored, tmp_path / "authors.ckpt")
    theirs = extract.load_encoder(tmp_path / "authors.ckpt")
    assert theirs.step == 100000
    ours = extract.load_encoder(checkpoint)
    ours.log_mel = extract.AuthorsLogMel()  # only the names of the weights are left to differ
    waveform = torch.randn(1, 96000)
    assert torch.equal(theirs(waveform), ours(waveform))


def test_the_authors_front_end_is_kaldis_without_edges():
    waveform = torch.from_numpy(noise(10) + tone(10))
    expected = kaldi_fbank(waveform / waveform.abs().max(), 32000, 128, 1243, 3108, True)
    # Neither level nor offset counts.
    ours = extract.AuthorsLogMel()(waveform.unsqueeze(0) / 2 + 0.5)
    assert ours.shape == (1, 1, 256, 128)
    assert (ours[0, 0, :255] - expected).abs().max() < 1e-3
    assert not ours[0, 0, 255].any()


class Hostile:
    """An object whose loading would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("place", ["step", "state_dict"])  # in a file of ours, of the authors'
def test_a_hostile_checkpoint_is_refused_and_not_executed(checkpoint, tmp_path, capsys, place):
    stored = torch.load(checkpoint, weights_only=True)
    torch.save(stored | {place: Hostile(tmp_path / "executed")}, tmp_path / "a.pt")
    flags = [tmp_path / "a.pt", tmp_path, "--out", tmp_path / "e.npz"]
    assert "a.pt: not a checkpoint" in refusal(capsys, extract.main, flags)
    assert not (tmp_path / "executed").exists()


EXTRACT_REFUSES = """
last.pt .                             --out
last.pt . --out x.npz --probe knn     --out
last.pt . --out x.npz --json y.json   --json
last.pt . --out nowhere/x.npz         nowhere/x.npz
last.pt . --out /proc/x.npz           /proc/x.npz
last.pt . --out .                     is a folder
last.pt more.pt . --out x.npz         one checkpoint
last.pt . --probe knn --pool time     --pool
last.pt . --probe knn                 last.pt: not a checkpoint
"""


@pytest.mark.parametrize("row", EXTRACT_REFUSES.strip().splitlines())
def test_extract_py_says_in_one_line_what_is_wrong(capsys, row):
    flags, hint = re.split("   *", row)
    assert hint in refusal(capsys, extract.main, flags.split())


# ================================================================================================
# The project


def test_the_weights_of_the_repository_tell_rising_from_falling_tones():
    # As long as a clip: a shorter tone is mirrored, and a mirrored tone rises and falls.
    samples = 80000
    labels = torch.arange(3).repeat(120)  # falling, steady, rising
    t = torch.arange(samples) / samples
    phase = 2.5 * (t + (labels.unsqueeze(1) - 1) / 2 * (t**2 - t))
    hertz = 400 * 2 ** (4 * torch.rand(360, 1))
    waveforms = 0.1 * torch.sin(2 * math.pi * hertz * phase) + 0.001 * torch.randn(360, samples)
    train, test = torch.arange(360).split([90, 270])
    fold = extract.Fold(train, train % 5, train[:0], test)
    trained = extract.load_encoder(SMALL_WEIGHTS)
    for probe, margin in ((extract.linear, 0.1), (extract.knn, 0.0)):
        accuracy = []
        for encoder in (trained, extract.untrained(trained)):
            embeddings = encoder(waveforms).mean(1).detach()
            right = probe(embeddings, labels, fold) == labels[fold.test]
            accuracy.append(right.double().mean())
        assert accuracy[0] > 0.9
        assert accuracy[0] > accuracy[1] + margin


@pytest.mark.parametrize("name", ["model", "masking", "data"])
def test_a_file_that_is_copied_alone_imports(tmp_path, name):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    run_python("-c", f"import {name}", cwd=tmp_path)


README = (HERE / "README.md").read_text() + (HERE / ".github" / "notes.md").read_text()


def readme_block(mark):
    """The first code block of the README or the notes below a mark."""
    below = README.split(f"<!-- {mark} -->")[1]
    return re.search(r"```\w*\n(.*?)```", below, re.S)[1]


def first_and_last_loss(*command, cwd=HERE):
    lines = run_python(*command, cwd=cwd).stdout.splitlines()
    return [float(line.split()[-1]) for line in (lines[0], lines[-1])]


def test_the_paper_in_20_lines_learns_with_two_copied_files(tmp_path):
    shutil.copy(HERE / "model.py", tmp_path)
    shutil.copy(HERE / "masking.py", tmp_path)
    first, last = first_and_last_loss("-c", readme_block("toy"), cwd=tmp_path)
    assert last < 0.5 * first


def test_the_fine_tuning_of_the_readme_learns():
    first, last = first_and_last_loss("-c", readme_block("finetune"))
    assert last < 0.5 * first


def test_the_stripes_of_the_readme_are_columns():
    names = {"torch": torch, "MASKS": {}, "mask_lowest": masking.mask_lowest}
    exec(readme_block("stripes"), names)
    masked = hidden_maps(names["MASKS"]["stripes"], 5)
    assert torch.equal(masked, masked[:, :, :1].expand(-1, -1, 8))


def test_data_sets_as_they_are_published_become_tasks(checkpoint, tmp_path):
    names = [f"ESC-50-master/audio/{n % 5 + 1}-{n}-A-{n % 2}.wav" for n in range(10)]
    for word in ("yes", "no", "_background_noise_"):
        names += [f"speech_commands_v0.02/{word}/{n}_nohash_0.wav" for n in range(4)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, noise(0.1), 16000)
    for split, n in [("validation", 1), ("testing", 2)]:
        path = tmp_path / "speech_commands_v0.02" / f"{split}_list.txt"
        path.write_text(f"yes/{n}_nohash_0.wav\nno/{n}_nohash_0.wav\n")
    subprocess.run(["bash", "-ec", readme_block("published")], cwd=tmp_path, check=True)
    for task, expected in [("esc50", [2, 5, 10]), ("commands", [2, 1, 2])]:
        found = probe([checkpoint], tmp_path / task, "knn")
        counts = [found[name] for name in ("classes", "folds", "test")]
        assert counts == expected


def test_the_demonstrations_run(tmp_path):
    assert run_python("masking.py").stdout.count("#") > 2 * 51
    out = tmp_path / "out"
    printed = run_python(".github/benchmark.py", *TINY, "--out", out).stdout
    for word in ("0.8 GFLOP", "reading", "log-mel", "step alone", "all together", "%", "GiB"):
        assert word in printed
    assert not out.exists()


def test_every_flag_in_the_readme_exists():
    scripts = ("train.py", "data.py", "extract.py")
    help_texts = [run_python(script, "--help").stdout for script in scripts]
    of_others = (
        "--more --nproc --standalone --max-jobs --max-restarts --shm-size --nodes "
        "--ntasks-per-node --gpus-per-node --cpus-per-task --signal --requeue --nnodes --rdzv"
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - set(of_others.split())
    known = set(re.findall(r"--[a-z][a-z-]+", "".join(help_texts)))
    assert sorted(named - known) == []


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_the_log_mel_of_a_gpu_is_that_of_a_cpu():
    log_mel = data.LogMel()
    waveforms = torch.from_numpy(np.stack([noise(10), tone(10)]))
    on_cpu = log_mel(waveforms)
    on_gpu = log_mel.to("cuda")(waveforms.to("cuda")).cpu()
    assert (on_gpu - on_cpu).abs().max() < 0.01


@needs_gpu
@pytest.mark.parametrize("flags", ["--amp auto", "--amp fp16", "--compile"])
def test_a_gpu_trains(tmp_path, flags):
    _, log = pretrain(tmp_path, *flags.split())
    finite = log["loss"][np.isfinite(log["loss"])]  # fp16 skips at first
    assert len(finite) > 10
    assert finite[-1] < finite[0]
