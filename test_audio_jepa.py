# SPDX-License-Identifier: MIT
"""What this project claims, as an executable specification: one claim a test, the method first.

    python -m pytest -q -rs

model.py    sizes, positions, initialisation, what each network sees, the loss, where gradients go
masking.py  random and block masks, their reproducibility, the EMA and its schedule
data.py     log-mel against Kaldi, every kind of input, clips, excerpts, filling up, packing
train.py    a step by hand; monitors; one process = several = accumulation = resume; faults
extract.py  embeddings whatever the batching, probes, X-ARES, fine-tuning, the authors' checkpoint
"""

import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

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


def packed(folder, frames, starts=(0,), length=None):
    """A packed folder, made by hand: recordings that begin at these frames of [T, F]."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all.f16").write_bytes(frames.astype(np.float16).tobytes())
    entries = []
    for n, start in enumerate(starts):
        entries.append(f"{n}.wav\0all.f16\0{start}\0{length or len(frames)}".encode())
    np.save(folder / "index.npy", np.array(entries))
    (folder / "pack.json").write_text('{"sample_rate": 32000}')
    return folder


def run_python(*command, code=0, cwd=HERE, env=None, preexec_fn=None):
    """Run a program that ends with this exit code -> what it has printed, and its errors."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=240,
        preexec_fn=preexec_fn,
    )
    assert done.returncode == code, done.stderr
    return done


def children(process):
    """The processes that this one has started, by number."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


class Program(subprocess.Popen):
    def __exit__(self, error, *rest):
        if error is not None:
            self.kill()  # or a failing test would wait for its end
        super().__exit__(error, *rest)


def start(*command, env=None):
    """Start a program that the test will interrupt."""
    return Program(
        [sys.executable, *map(str, command)],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
    )


def refusal(capsys, main, flags, code=2):
    """The one line that a program says before it exits with this code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    assert stopped.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


# The smallest run there is: clips of 2 x 8 patches, 20 steps.
TINY = "--model tiny --clip-seconds 1.25 --batch-size 8 --steps 20 --warmup 5 --amp off".split()
TINY += "--log-every 1 --workers 0".split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def pretrain(out, *flags):
    """A run in this process -> its checkpoint and its log."""
    train.main([*TINY, "--out", str(out), *map(str, flags)])
    return read_run(out)


def read_run(out):
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    with open(out / "log.csv", newline="") as file:
        return checkpoint, list(csv.DictReader(file))


def column(log, name):
    return [float(line[name]) for line in log]


NETWORKS = ("context_encoder", "target_encoder", "predictor")


def same_weights(one, other, tolerance=0.0):
    for network in NETWORKS:
        for name, tensor in one[network].items():
            if not torch.allclose(tensor, other[network][name], rtol=0, atol=tolerance):
                return False
    return True


def error_line(capsys, *flags, code=2):
    """The last line that train.py says before it exits with this code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(list(map(str, flags)))
    assert stopped.value.code == code
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
    assert run[0]["step"] < 20
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of one process on synthetic clips."""
    return pretrain(tmp_path_factory.mktemp("reference"))


# ================================================================================================
# model.py


def test_the_defaults_have_the_papers_size():
    assert JEPAConfig().grid == (16, 8)
    assert re.search(r"base +85\.35 M +11\.29 M +96\.64 M", run_python("model.py").stdout)


@pytest.mark.parametrize("name", ["time_bins", "mel_bins", "dim", "predictor_dim"])
def test_sizes_that_do_not_divide_are_refused_at_construction(name):
    with pytest.raises(ValueError, match=f"^{name} = 100"):
        JEPAConfig(heads=8, predictor_heads=8, **{name: 100})


def test_attention_is_the_fused_one():
    attention = model.Attention(32, 2)
    x = torch.randn(2, 7, 32)
    q, k, v = attention.qkv(x).view(2, 7, 3, 2, 16).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert_close(attention(x), attention.proj(fused))


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
    encoder = VisionTransformer(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(a_spectrogram()).dtype == torch.float32


def test_a_token_is_one_patch_in_time_major_order():
    t = torch.arange(64.0).view(1, 1, 64, 1) // 8
    f = torch.arange(48.0) // 24
    encoder = VisionTransformer(dataclasses.replace(SMALL, patch_size=(8, 24)))
    patches = encoder.patchify(2 * t + f)
    assert torch.equal(patches, torch.arange(16.0).view(1, 16, 1).expand(1, 16, 8 * 24))


def test_the_context_encoder_sees_the_visible_patches_alone():
    encoder = VisionTransformer(SMALL)
    spectrogram = a_spectrogram().requires_grad_()
    context_idx, target_idx = a_mask()
    tokens = encoder(spectrogram, context_idx)
    (tokens * torch.randn_like(tokens)).sum().backward()
    seen = encoder.patchify(spectrogram.grad).any(2)
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
def test_rotary_positions_alone_depend_on_distances_only(positions):
    encoder = sharp(VisionTransformer(dataclasses.replace(SMALL, positions=positions)))
    spectrogram = a_spectrogram()
    context_idx = torch.tensor([[0, 1, 4, 6], [0, 3, 7, 4]])  # of 4 x 3 patches, none at the end
    moved = spectrogram.roll((16, 16), dims=(2, 3))
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
    everything = torch.cat([context_idx, target_idx], dim=1).sort(1).values
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


def test_ema_decay_is_byols_cosine():
    decays = [masking.ema_decay(step, 100) for step in (0, 50, 100, 101)]
    assert decays == pytest.approx([0.996, 0.998, 1, 1])
    assert masking.ema_decay(0, 100, base=0.9) == pytest.approx(0.9)
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
# data.py: helpers

FORMATS = [  # extension, and the names that libsndfile has for it
    ("wav", "WAV", "PCM_U8"),
    ("wav", "WAV", "FLOAT"),
    ("flac", "FLAC", "PCM_16"),
    ("ogg", "OGG", "VORBIS"),
    ("opus", "OGG", "OPUS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
    ("aiff", "AIFF", "PCM_16"),
    ("au", "AU", "PCM_16"),
]


def write_level(path, level, seconds=10.0):
    """A wav file of one number, so that a clip shows which recordings are in it."""
    soundfile.write(path, np.full(int(seconds * 32000), level), 32000, subtype="FLOAT")


def write_ramp(path, samples):
    """A file that rises from -0.9 to 0.9, so that an excerpt shows where it was taken."""
    soundfile.write(path, np.linspace(-0.9, 0.9, samples), 8000, subtype="PCM_24")


BAD = ["empty", "text", "half a tag", "no samples", "nan", "inf", "dangling link"]


def break_file(path, how="text"):
    """Something that is named like audio and cannot be used."""
    waveform = noise(3)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("this is no audio\n" * 100)
    elif how == "half a tag":
        path.write_bytes(b"ID3")  # as an MP3 begins
    elif how == "no samples":
        soundfile.write(path, waveform[:0], 32000)
    elif how == "dangling link":
        path.symlink_to(path.with_suffix(".gone"))
    else:  # "nan" or "inf"
        waveform[::1000] = float(how)
        soundfile.write(path, waveform, 32000, subtype="FLOAT")


def pack(folder, out):
    """python data.py pack folder out -> the clips of what was packed."""
    data.pack(data.AudioClips(folder).source, out)
    return data.AudioClips(out)


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


@pytest.mark.parametrize("rate, mels", [(32000, 128), (16000, 80)])
def test_the_log_mel_is_kaldis(rate, mels):
    sounds = [noise(10, rate), tone(10, rate) + 0.2, np.zeros(10 * rate, np.float32)]
    waveforms = torch.from_numpy(np.stack(sounds))
    hop = rate * 10 / 256
    options = {
        "sample_frequency": rate,
        "num_mel_bins": mels,
        "frame_shift": 1000 * hop / rate,
        "frame_length": 1000 * int(2.5 * hop) / rate,
        "window_type": "hanning",
        "snip_edges": False,
        "dither": 0.0,
    }
    expected = torch.stack([kaldi.fbank(sound.unsqueeze(0), **options) for sound in waveforms])
    log_mel = data.LogMel(rate, mel_bins=mels)(waveforms)
    assert log_mel.shape == (3, 1, 256, mels)
    assert (log_mel.squeeze(1) - expected).abs().max() < 1e-3


def test_the_measured_mean_and_std_normalise_the_set():
    clips = data.SyntheticClips(16000, clip_seconds=0.625, num_clips=256)
    log_mel = data.LogMel(16000, clip_seconds=0.625, time_bins=16)
    mean, std = data.measure_mean_std(clips, log_mel, "cpu", workers=0)
    log_mel.mean = mean
    log_mel.std = std
    normalised = log_mel(torch.stack(list(clips)))
    assert normalised.mean().item() == pytest.approx(0, abs=1e-4)
    assert normalised.std().item() == pytest.approx(1, abs=1e-4)


# ================================================================================================
# data.py: which recordings there are


@pytest.mark.parametrize("layout", ["list.txt", "list.csv", "list.tsv", "fairseq.tsv", "shards"])
def test_every_layout_gives_the_recordings_of_the_folder(tmp_path, layout):
    folder = corpus(tmp_path / "a" / "deep", 5)
    names = [f"a/deep/{i:03d}.wav" for i in range(5)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
    (tmp_path / "list.csv").write_text("path,label\n" + ",bird\n".join(names))
    (tmp_path / "list.tsv").write_text("\tbird\n".join(names))
    below = [name.removeprefix("a/") for name in names]
    (tmp_path / "fairseq.tsv").write_text(f"{tmp_path}/a\n" + "\t64000\n".join(below))
    (tmp_path / "shards").mkdir()
    for shard, numbers in enumerate([range(2), range(2, 5)]):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            for i in numbers:
                tar.add(folder / f"{i:03d}.wav", f"{i:03d}.wav")
    expected = data.AudioClips(tmp_path / "a", clip_seconds=1.25)
    clips = data.AudioClips(tmp_path / layout, clip_seconds=1.25)
    assert len(clips) == 5
    for i in range(5):
        assert clips.source.name(i).endswith(f"{i:03d}.wav")
        assert torch.equal(clips[i], expected[i])


def test_what_cannot_be_decoded_is_left_out_and_named(tmp_path, capsys):
    write_level(tmp_path / "a.wav", 0.25)
    with open(tmp_path / "a.wav", "r+b") as file:
        file.truncate(2**22)  # a hole at its end
    write_level(tmp_path / "b.wav", 0.5)
    tar = ["tar", "--sparse", "-cf", tmp_path / "x.tar", "-C", tmp_path, "a.wav", "b.wav"]
    subprocess.run(tar, check=True)
    (tmp_path / "a.wav").unlink()
    for name in ("a.m4a", "b.M4A", "c.webm", "notes.pdf"):
        (tmp_path / name).write_bytes(b"x")
    clips = data.AudioClips(tmp_path)
    assert [clips.source.name(i) for i in range(len(clips))] == ["b.wav", "x.tar/b.wav"]
    assert (clips[1] == 0.5).all()
    warning = capsys.readouterr().err
    for hint in ("a.wav is a sparse member", "'.m4a': 2", "'.webm': 1"):
        assert hint in warning
    assert "pdf" not in warning


@pytest.mark.parametrize(
    "name, content",
    [
        ("list.txt", "a"),
        ("list.csv", "a/000.wav\nb"),
        ("list.tsv", "a\n{folder}/a/000.wav"),
        ("audioset.csv", "# Segments csv created Sun\n# num_ytids=1\n--aE2O5G5WE, 0.0, 10.0\n"),
        ("wav.scp", "utt1 /data/utt1.wav\n"),
    ],
)
def test_a_list_of_another_kind_is_refused_and_told_what_to_give(tmp_path, name, content):
    corpus(tmp_path / "a", 1)
    corpus(tmp_path / "b", 1)
    (tmp_path / name).write_text(content.format(folder=tmp_path))
    with pytest.raises(ValueError, match=f"{name}.*give a folder, .* with a path a line"):
        data.AudioClips(tmp_path / name)


def test_links_are_followed_to_each_folder_once_and_hidden_files_are_not_audio(tmp_path):
    folder = corpus(tmp_path / "elsewhere", 2)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "b").symlink_to(folder)
    (tmp_path / "set" / "a").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    (folder / "._000.wav").write_bytes(b"of macOS")
    _, index = data.find_recordings(tmp_path / "set")
    assert index.dtype.kind == "S"  # one flat array, sorted
    assert index.tolist() == [b"a/000.wav", b"a/001.wav"]


def test_odd_names_are_read_and_printed_on_one_line(tmp_path):
    names = [b"with space.wav", b"new\nline.wav", b"not utf8 \xff.wav", "ümlaut.wav".encode()]
    for i, name in enumerate(names):
        write_level(tmp_path / "x.wav", (i + 1) / 8)
        os.rename(tmp_path / "x.wav", os.path.join(os.fsencode(tmp_path), name))
    clips = data.AudioClips(tmp_path)
    printed = {data.printable(clips.source.name(i)) for i in range(4)}
    assert {clip[0].item() for clip in clips} == {1 / 8, 2 / 8, 3 / 8, 4 / 8}
    assert printed == {"with space.wav", "new\\nline.wav", "not utf8 \\udcff.wav", "ümlaut.wav"}


def test_a_file_in_a_list_is_accepted_whatever_its_extension(tmp_path):
    write_level(tmp_path / "x.wav", 0.5)
    os.rename(tmp_path / "x.wav", tmp_path / "x.wave")
    (tmp_path / "list.txt").write_text("x.wave\n")
    assert (data.AudioClips(tmp_path / "list.txt")[0] == 0.5).all()


# ================================================================================================
# data.py: decoding


@pytest.mark.parametrize("extension, container, subtype", FORMATS)
def test_every_format_is_read_and_its_channels_averaged(tmp_path, extension, container, subtype):
    left = tone(2, 48000)
    stereo = np.stack([left, left / 2], axis=1)
    soundfile.write(tmp_path / f"x.{extension}", stereo, 48000, subtype, format=container)
    clip = data.AudioClips(tmp_path, 48000, clip_seconds=1.0)[0].numpy()
    assert np.abs(np.fft.rfft(clip)).argmax() == 440
    assert clip.std() == pytest.approx(0.75 * left.std(), rel=0.02)


@pytest.mark.parametrize("rate", [8000, 44100, 44099])
def test_resampling_keeps_pitch_and_length(rate):
    waveform = data.resample(tone(2, rate), rate, 32000)
    middle = slice(2000, 62000)
    assert len(waveform) == pytest.approx(64000, abs=1)
    assert np.abs(waveform[middle] - tone(2)[middle]).max() < 0.01


@pytest.mark.parametrize("extension, container, subtype", FORMATS)
def test_a_file_that_ends_early_gives_what_is_there(tmp_path, extension, container, subtype):
    path = tmp_path / f"x.{extension}"
    soundfile.write(path, noise(20, 48000), 48000, subtype, format=container)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    clips = data.AudioClips(tmp_path, 48000, clip_seconds=5.0)
    for epoch in range(8):
        clip, reads, bad = clips.read(epoch, 0)
        assert (reads, bad) == (1, [])
        assert clip[-4800:].std() > 0.05
    samples = sum(len(window) for window in clips.source.windows(0, 48000))
    assert 8 < samples / 48000 < 12


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path):
    write_ramp(tmp_path / "x.flac", 40 * 8000)
    content = bytearray((tmp_path / "x.flac").read_bytes())
    content[21] &= 0xF0  # the number of samples has 36 bits: 0 is what a stream says
    content[22:26] = bytes(4)
    (tmp_path / "x.flac").write_bytes(content)
    files = data.AudioClips(tmp_path, 8000).source
    starts = [files.excerpt(0, 40000, random.Random(seed))[0] for seed in range(40)]
    assert min(starts) < -0.75
    assert 0.6 < max(starts) < 0.68  # 5 s before the end it is 0.675
    assert sum(len(window) for window in files.windows(0, 40000)) == 40 * 8000


ID3 = b"ID3\3\0\0\0\0\0\x40" + bytes(64)  # a tag, as an MP3 begins


@pytest.mark.parametrize("before", [b"", ID3 + bytes(100), bytes(4096), None])
def test_an_mp3_is_read_as_far_as_soundfile_reads_its_path(tmp_path, before):
    path = tmp_path / "x.mp3"
    soundfile.write(path, tone(12, 44100), 44100)
    content = path.read_bytes()
    if before is None:
        path.write_bytes(content[1000:])  # begins within a frame
    else:
        path.write_bytes(before + content)
    expected, _ = soundfile.read(path, dtype="float32")
    assert len(expected) > 8 * 44100
    windows = list(data.AudioFiles(tmp_path, 44100).windows(0, 44100))
    assert np.array_equal(np.concatenate(windows), expected)


@pytest.mark.parametrize(
    "extension, container, subtype", [("wav", "WAV", "GSM610"), ("au", "AU", "G721_32")]
)
def test_a_format_without_seeking_is_read_from_anywhere(tmp_path, extension, container, subtype):
    path = tmp_path / f"x.{extension}"
    soundfile.write(path, noise(90, 8000), 8000, subtype, format=container)
    expected, _ = soundfile.read(path, dtype="float32")
    files = data.AudioFiles(tmp_path, 8000)
    assert np.array_equal(np.concatenate(list(files.windows(0, 40000))), expected)
    late = files.excerpt(0, 40000, SimpleNamespace(random=lambda: 0.99))
    start = int(0.99 * (len(expected) - 40000 + 1))
    assert np.array_equal(late, expected[start : start + 40000])


# ================================================================================================
# data.py: clips


@pytest.mark.parametrize("kind", ["files", "synthetic"])
def test_a_clip_is_a_pure_function_of_seed_epoch_and_number(tmp_path, kind):
    def read(seed, epoch, i, *before):
        clips = data.SyntheticClips(clip_seconds=1.25, seed=seed)
        if kind == "files":
            clips = data.AudioClips(tmp_path / "c", clip_seconds=1.25, seed=seed)
        for other in before:
            clips.read(*other)
        return clips.read(epoch, i)[0]

    corpus(tmp_path / "c")
    clip = read(7, 3, 2)
    assert np.array_equal(read(7, 3, 2, (4, 5)), clip)  # what was read before does not matter
    for other in [(7, 4, 2), (7, 3, 1), (8, 3, 2)]:
        assert not np.array_equal(read(*other), clip)


@pytest.mark.parametrize("workers", [0, 1])
def test_any_data_loader_takes_clips_and_subsets_of_them(tmp_path, workers):
    clips = data.AudioClips(corpus(tmp_path / "c", 5), clip_seconds=2.5)
    loader = DataLoader(Subset(clips, [3, 1]), batch_size=2, num_workers=workers)
    (batch,) = loader
    assert torch.equal(batch, torch.stack([clips[3], clips[1]]))


def test_excerpts_of_a_recording_reach_its_start_and_its_end(tmp_path):
    write_ramp(tmp_path / "x.wav", 5003)
    files = data.AudioClips(tmp_path, 8000).source
    starts = {files.excerpt(0, 5000, random.Random(seed))[0] for seed in range(50)}
    ramp, _ = soundfile.read(tmp_path / "x.wav", dtype="float32")
    assert starts == set(ramp[:4])


def test_a_long_recording_gives_another_excerpt_in_each_epoch(tmp_path):
    write_ramp(tmp_path / "x.wav", 90 * 8000)
    clips = data.AudioClips(tmp_path, 8000)
    starts = set()
    for epoch in range(20):
        clips.set_epoch(epoch)
        starts.add(clips[0][0].item())
        assert clips[0][-1] - clips[0][0] == pytest.approx(0.2, abs=1e-4)  # 10 of 90 s in one piece
    assert len(starts) == 20


def test_a_short_recording_is_filled_up_with_others(tmp_path):
    for i, level in enumerate([0.25, 0.5, 0.75]):
        write_level(tmp_path / f"{i}.wav", level, seconds=3)
    clip = data.AudioClips(tmp_path, seed=1)[1]
    assert clip.shape == (320000,)
    assert (clip[:96000] == 0.5).all()
    assert (clip > 0).all()
    assert (clip != 0.5).any()


@pytest.mark.parametrize(
    "recording, clip_seconds, silent", [(9.3, 10.0, 0.0), (9.5, 10.0, 0.5), (1.0, 0.3125, 0.0)]
)
def test_only_a_rest_shorter_than_a_patch_stays_silent(tmp_path, recording, clip_seconds, silent):
    write_level(tmp_path / "x.wav", 0.5, recording)
    clip = data.AudioClips(tmp_path, clip_seconds=clip_seconds)[0]
    assert clip.shape == (clip_seconds * 32000,)
    assert (clip == 0).sum() == silent * 32000


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("name", ["a bad.wav", "a bad.mp3"])
def test_a_bad_recording_is_replaced_and_reported(tmp_path, how, name):
    break_file(tmp_path / "a bad.wav", how)
    os.rename(tmp_path / "a bad.wav", tmp_path / name)
    write_level(tmp_path / "good.wav", 0.5)
    clip, reads, bad = data.AudioClips(tmp_path).read(0, 0)
    assert (clip == 0.5).all()
    assert reads == len(bad) + 1
    assert bad[0][0] == name
    assert bad[0][1] != ""


def test_ten_bad_recordings_in_a_row_are_no_clip(tmp_path):
    break_file(tmp_path / "x.wav", "nan")
    clips = data.AudioClips(tmp_path)
    with pytest.raises(OSError, match="ten recordings in a row .* x.wav: holds NaN"):
        clips[0]


# ================================================================================================
# data.py: the order of clips, and their loader


def test_processes_with_accumulation_read_every_clip_once_an_epoch():
    read = []
    for rank in range(2):
        shares = train.shares_of_process(batch_size=12, accum=2, rank=rank, processes=2)
        for batch in data.clip_order(30, 0, 12, range(10), shares):
            assert len(batch) == 3
            read += batch
    assert sorted(read) == [(epoch, i) for epoch in range(4) for i in range(30)]


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    folder = corpus(tmp_path / "c", 5)
    break_file(folder / "bad.wav")
    clips = data.AudioClips(folder, clip_seconds=2.5)
    order = list(data.clip_order(6, 0, 4, range(3), [slice(0, 2), slice(2, 4)]))
    without = list(data.clip_loader(clips, order, workers=0))
    with_two = list(data.clip_loader(clips, order, workers=2))
    assert len(without) == len(with_two) == 6
    for a, b in zip(without, with_two, strict=True):
        assert torch.equal(a.clips, b.clips)
        assert (a.reads, a.bad) == (b.reads, b.bad)
    assert any(batch.bad for batch in without)


# ================================================================================================
# data.py: scan and pack


def test_packing_keeps_the_log_mel_and_all_frames(tmp_path):
    folder = corpus(tmp_path / "c", 3, seconds=10)
    clips = data.AudioClips(folder)
    packed_clips = pack(folder, tmp_path / "p")
    for i in range(3):
        expected = data.LogMel()(clips[i].unsqueeze(0))[0, 0]
        assert packed_clips.source.name(i) == clips.source.name(i)
        assert (packed_clips[i] - expected).abs().max() < 0.01
    long = pack(corpus(tmp_path / "long", 1, seconds=25), tmp_path / "q")
    assert long.source.excerpt(0, 10**6, random.Random(0)).shape == (25 * 25.6, 128)


def test_a_packed_folder_of_another_rate_or_half_copied_is_refused(tmp_path):
    packed(tmp_path / "p", np.ones((256, 128)))
    with pytest.raises(ValueError, match="packed at 32000 Hz, not at 16000"):
        data.AudioClips(tmp_path / "p", 16000)
    os.truncate(tmp_path / "p" / "all.f16", 1000)
    with pytest.raises(ValueError, match="not whole"):
        data.AudioClips(tmp_path / "p")


def test_what_cannot_be_packed_is_said_in_one_line(tmp_path):
    for folder in [tmp_path / "nowhere", packed(tmp_path / "p", np.ones((256, 128)))]:
        done = run_python("data.py", "pack", folder, tmp_path / "out", code=2)
        assert done.stderr.startswith("error: ")
        assert str(folder) in done.stderr.splitlines()[0]
    assert "is packed" in done.stderr


def test_scan_counts_and_writes_nothing(tmp_path):
    folder = corpus(tmp_path / "c", 4)
    soundfile.write(folder / "silent.flac", np.zeros((44100, 2)), 44100)
    break_file(folder / "bäd.wav")
    before = sorted(tmp_path.rglob("*"))
    done = run_python("data.py", "scan", folder, env={"PYTHONIOENCODING": "ascii"})
    assert sorted(tmp_path.rglob("*")) == before
    assert done.stderr == ""  # no bar where it is no terminal
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0].startswith("b\\xe4d.wav: ")
    for line in ("6 recordings", "1 unreadable", "1 silent", "4 32000 Hz", "1 2 channels"):
        assert line in lines


# ================================================================================================
# train.py: a step, by hand


def test_the_learning_rate_is_the_papers():
    rates = [train.learning_rate(step, 100000) for step in (0, 500, 1000, 50500, 100000)]
    assert rates == pytest.approx([1e-6, 1.505e-4, 3e-4, 1.5e-4, 0], abs=1e-12)


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


def make_run():
    """What `train` builds, for clips that are log-mel already: [8, 32, 128]."""
    args = train.parse_args(TINY)
    config = JEPAConfig(time_bins=32, dim=32, depth=2, heads=2, predictor_dim=16, predictor_heads=2)
    log_mel = data.LogMel(time_bins=32, clip_seconds=1.25)
    one = train.Processes()
    run = train.build_run(args, config, log_mel, one, torch.device("cpu"), torch.float32)
    torch.manual_seed(1)
    run.target_encoder = VisionTransformer(config)  # unlike the context encoder
    return run


def test_a_step_is_masks_targets_loss_adamw_and_ema():
    run = make_run()
    by_hand = copy.deepcopy(run)
    frames = torch.randn(8, 32, 128)
    result = train.train_step(run, 3, [frames])
    targets = by_hand.target_encoder(frames.unsqueeze(1))
    grid = by_hand.model.config.grid
    masks = masking.draw_masks(masking.random_mask, 0, 3, 8, grid, (0.4, 0.6), "cpu")
    loss = by_hand.model(frames.unsqueeze(1), *masks, targets)
    loss.backward()
    for group in by_hand.optimizer.param_groups:
        group["lr"] = train.learning_rate(3, 20, warmup=5)
    by_hand.optimizer.step()
    context_encoder = by_hand.model.context_encoder
    masking.update_ema(by_hand.target_encoder, context_encoder, masking.ema_decay(3, 20))
    assert torch.allclose(torch.cat(result.targets), targets, atol=1e-6)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for name in ("model", "target_encoder"):
        expected = getattr(by_hand, name).state_dict()
        for weight, tensor in getattr(run, name).state_dict().items():
            assert torch.allclose(tensor, expected[weight], atol=1e-7)


def test_a_step_without_a_finite_gradient_moves_nothing():
    run = make_run()
    frames = torch.randn(8, 32, 128)
    frames[3, 5, 7] = math.nan
    for network in (run.model, run.target_encoder):
        before = copy.deepcopy(network).state_dict()
        result = train.train_step(run, 10, [frames])
        assert not math.isfinite(result.grad_norm)
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_weight_decay_spares_biases_norms_and_the_mask_token():
    jepa = JEPA(SMALL)
    decaying, sparing = train.make_optimizer(jepa, 0.05).param_groups
    assert decaying["weight_decay"] == 0.05
    assert sparing["weight_decay"] == 0.0
    assert all(parameter.ndim == 2 for parameter in decaying["params"])
    assert any(parameter is jepa.predictor.mask_token for parameter in sparing["params"])
    assert len(decaying["params"]) + len(sparing["params"]) == len(list(jepa.parameters()))


# ---- Monitors


@pytest.mark.parametrize("loss, target_norm", [("l2", "token"), ("cosine", "clip")])
def test_explained_is_1_for_a_perfect_predictor_and_0_for_a_blind_one(loss, target_norm):
    jepa = JEPA(SMALL, loss, target_norm)
    targets = torch.randn(16, 12, 32) + torch.randn(1, 12, 32)
    target_idx = torch.arange(12).expand(16, -1)
    normalised = model.normalise_targets(targets, target_norm)
    mean_of_each_position = normalised.mean(0).expand(16, -1, -1)
    blind = jepa.loss_function(mean_of_each_position, normalised).item()
    assert train.explained(jepa, 0.0, targets, target_idx) == pytest.approx(1)
    assert train.explained(jepa, blind, targets, target_idx) == pytest.approx(0, abs=1e-4)
    assert train.explained(jepa, 2 * blind, targets, target_idx) < -0.9


def test_monitors_tell_healthy_targets_from_clips_or_tokens_that_are_alike():
    healthy = train.monitors(torch.randn(256, 4, 64))
    assert healthy["target_std"] == pytest.approx(0.5, abs=0.05)  # a mean over 4 tokens
    assert healthy["token_std"] > 0.7
    assert healthy["effective_rank"] > 50
    assert abs(healthy["mean_cosine"]) < 0.05
    clips_alike = train.monitors(torch.randn(1, 4, 64).expand(256, 4, 64))
    assert clips_alike["target_std"] == pytest.approx(0, abs=1e-6)
    assert clips_alike["effective_rank"] == 1
    assert clips_alike["mean_cosine"] == pytest.approx(1)
    tokens_alike = train.monitors(torch.randn(256, 1, 64).expand(256, 4, 64))
    assert tokens_alike["token_std"] == pytest.approx(0, abs=1e-6)
    assert tokens_alike["target_std"] > 0.9


def test_a_run_that_collapses_is_seen_to(tmp_path):
    _, log = pretrain(tmp_path, "--lr", 0.01, "--ema", 0, "--ema-end", 0)
    first = {name: column(log, name)[0] for name in log[0]}
    last = {name: column(log, name)[-1] for name in log[0]}
    assert last["loss"] < 0.5 * first["loss"]  # which alone looks like learning
    assert last["explained"] < 0
    assert last["token_std"] < 0.1 * first["token_std"]
    assert last["target_std"] < 0.1 * first["target_std"]
    assert last["effective_rank"] < 0.8 * first["effective_rank"]
    assert last["mean_cosine"] > 0.99


# ---- Runs


def test_a_run_learns_logs_and_leaves_a_checkpoint_of_plain_data(reference):
    checkpoint, log = reference
    assert column(log, "step") == list(range(1, 21))
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    assert all(math.isfinite(float(value)) for line in log for value in line.values())
    assert column(log, "lr")[0] == 1e-6
    assert column(log, "lr")[5] == pytest.approx(3e-4)
    assert {"format", "step", "config", *NETWORKS, "optimizer", "scaler"} <= set(checkpoint)
    config = JEPAConfig(**checkpoint["config"]["model"])
    VisionTransformer(config).load_state_dict(checkpoint["target_encoder"])
    log_mel = data.LogMel(clip_seconds=1.25, time_bins=32)
    measured = data.measure_mean_std(data.SyntheticClips(clip_seconds=1.25), log_mel, "cpu", 0)
    stored = checkpoint["config"]["log_mel"]
    assert (stored["mean"], stored["std"]) == pytest.approx(measured)


SAME_RUN = ["accumulated", "two processes", "stopped", "killed", "continued by two processes"]


@pytest.mark.parametrize("way", SAME_RUN)
def test_it_is_the_same_run(reference, tmp_path, way):
    tolerance = 1e-4  # sums are rounded in another order
    two_processes = [*TORCHRUN, "train.py", *TINY, "--accum", 2, "--out", tmp_path]
    if way == "accumulated":
        pretrain(tmp_path, "--accum", 4)
    elif way == "two processes":
        run_python(*two_processes)
    elif way == "stopped":
        interrupted(tmp_path, 6)
        pretrain(tmp_path)
        tolerance = 0.0
    elif way == "killed":
        with start("train.py", *TINY, "--save-every", 5, "--out", tmp_path) as process:
            wait_for_step(tmp_path, 12)
            process.kill()
        assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] % 5 == 0
        pretrain(tmp_path, "--save-every", 5)
        tolerance = 0.0
    else:
        interrupted(tmp_path, 6, "--accum", 4)
        run_python(*two_processes)
    checkpoint, log = read_run(tmp_path)
    assert same_weights(checkpoint, reference[0], tolerance)  # under the same names
    monitors = ("token_std", "target_std", "effective_rank", "mean_cosine")
    for name in ("step", "loss", "grad_norm", "explained", *monitors):
        assert column(log, name) == pytest.approx(column(reference[1], name), rel=10 * tolerance)


def test_a_stopped_run_on_files_with_workers_ends_bit_for_bit_like_one_that_was_not(tmp_path):
    folder = corpus(tmp_path / "c", seconds=1.0)
    break_file(folder / "bad.wav")
    flags = ["--data", folder, "--workers", 2, "--amp", "auto"]
    whole, whole_log = pretrain(tmp_path / "whole", *flags)
    interrupted(tmp_path / "parts", 6, *flags)
    parts, parts_log = pretrain(tmp_path / "parts", *flags)
    assert same_weights(whole, parts)
    for name in ("loss", "bad_files"):
        assert column(whole_log, name) == column(parts_log, name)
    for i, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], parts["optimizer"]["state"][i]["exp_avg_sq"])


def test_torchrun_restarts_a_run_whose_process_was_killed(tmp_path):
    restarts = ["--max-restarts=3", "--monitor-interval=0.2"]
    flags = [*TINY, "--save-every", 5, "--out", tmp_path]
    with start(*TORCHRUN, *restarts, "train.py", *flags) as launcher:
        wait_for_step(tmp_path, 7)
        os.kill(children(launcher)[-1], signal.SIGKILL)
        assert launcher.wait(180) == 0
    checkpoint, log = read_run(tmp_path)
    assert checkpoint["step"] == 20
    assert column(log, "step") == list(range(1, 21))


def test_a_signal_to_all_processes_ends_a_run_within_the_step(tmp_path):
    flags = [*TINY, "--steps", 100000, "--workers", 1, "--out", tmp_path]
    with start("train.py", *flags, env={"PYTHONUNBUFFERED": ""}) as process:
        while not process.stdout.readline().startswith("step 1 "):
            assert process.poll() is None
        for pid in [*children(process), process.pid]:  # as Slurm and Ctrl-C do
            os.kill(pid, signal.SIGTERM)
        assert "\n" == process.stderr.readline()  # to leave the line of the bar
        assert "stopping after this step" in process.stderr.readline()
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "of 100000 steps done" in printed
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] < 1000


def test_a_signal_while_the_data_is_measured_is_heard(tmp_path):
    with start("train.py", *TINY, "--workers", 2, "--out", tmp_path) as process:
        assert "measuring" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "of 20 steps done" in printed


def test_a_second_signal_ends_a_run_that_hangs(tmp_path):
    folder = corpus(tmp_path / "c", 2)
    os.mkfifo(folder / "hangs.wav")  # reading it never returns
    flags = [*TINY, "--data", folder, "--workers", 1, "--out", tmp_path / "out"]
    with start("train.py", *flags) as process:
        assert "measuring" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(5.5)
        assert process.poll() is None
        (worker,) = children(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    time.sleep(1)
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(worker)], capture_output=True, text=True)
    assert state.stdout == "" or state.stdout.startswith("Z")  # gone, or dead and not yet buried


def test_a_killed_worker_ends_a_run_and_the_line_says_what_helps(tmp_path):
    flags = [*TINY, "--steps", 100000, "--workers", 1, "--out", tmp_path]
    with start("train.py", *flags) as process:
        wait_for_step(tmp_path, 3)
        (worker,) = children(process)
        os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert "killed" in line or "exited" in line
    assert "fewer --workers" in line


@pytest.mark.parametrize(
    "workers, code, hints",
    [(0, 1, ["cannot write", "last.pt"]), (1, 2, ["--shm-size", "--workers 0"])],
)
def test_a_full_disk_or_shared_memory_is_said_in_one_line(tmp_path, workers, code, hints):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    flags = [*TINY, "--steps", 1, "--warmup", 0, "--workers", workers, "--out", tmp_path]
    done = run_python("train.py", *flags, code=code, preexec_fn=small_files)
    (line,) = done.stderr.splitlines()
    assert all(hint in line for hint in hints)
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


def test_checkpoints_are_kept_under_their_step_without_the_optimizer(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    pretrain(tmp_path, "--save-every", 8)
    assert signal.getsignal(signal.SIGTERM) is before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last.pt", "log.csv", "step-0000008.pt", "step-0000016.pt"]
    kept = torch.load(tmp_path / "step-0000008.pt", weights_only=True)
    assert kept["step"] == 8
    assert "optimizer" not in kept


def test_a_changed_setting_is_named_and_refused(tmp_path, capsys, reference):
    torch.save(reference[0], tmp_path / "last.pt")
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
        line = error_line(capsys, *TINY, "--out", tmp_path, *change)
        assert change[0] in line
        assert f"--init {tmp_path}/last.pt" in line  # which is the way to change it


def test_init_begins_with_weights_of_its_size(tmp_path, capsys, reference):
    torch.save(reference[0], tmp_path / "other.pt")
    flags = ["--steps", 2, "--warmup", 1, "--lr", 1e-6, "--seed", 5]
    checkpoint, _ = pretrain(tmp_path / "out", *flags, "--init", tmp_path / "other.pt")
    assert checkpoint["step"] == 2
    assert same_weights(checkpoint, reference[0], tolerance=1e-4)
    only_target = {
        n: v for n, v in reference[0].items() if n not in ("context_encoder", "predictor")
    }
    torch.save(only_target, tmp_path / "small.pt")
    flags = ["--steps", 2, "--warmup", 1, "--lr", 1e-6, "--init", tmp_path / "small.pt"]
    checkpoint, _ = pretrain(tmp_path / "small", *flags)
    for name in ("context_encoder", "target_encoder"):
        weight = checkpoint[name]["blocks.0.mlp.fc1.weight"]
        expected = reference[0]["target_encoder"]["blocks.0.mlp.fc1.weight"]
        assert torch.allclose(weight, expected, atol=1e-4)
    flags = [*TINY, "--out", tmp_path / "b", "--init", tmp_path / "other.pt"]
    assert "--model small" in error_line(capsys, *flags, "--model", "small")
    assert "positions sincos" in error_line(capsys, *flags, "--positions", "rotary")


# ---- Choices


@pytest.mark.parametrize(
    "flags",
    [
        "--mask block --loss cosine",
        "--amp bf16 --sample-rate 16000",
        "--positions rotary --target-norm clip --ema 0.99 --ema-end 0.999",
    ],
)
def test_every_choice_trains(tmp_path, flags):
    _, log = pretrain(tmp_path, *flags.split())
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    assert log[-1]["skipped"] == "0"


def test_a_recipe_sets_flags_and_the_command_line_has_the_last_word(tmp_path, capsys):
    out = ["--steps", "1", "--batch-size", "2", "--workers", "0", "--out", str(tmp_path)]
    train.main(["--recipe", "small", *out, "--lr", "1e-4"])
    settings = train.load_checkpoint(tmp_path / "last.pt")["settings"]
    assert settings["model"] == "tiny"
    assert settings["target_norm"] == "clip"
    assert settings["lr"] == 1e-4
    assert settings["warmup"] == 0  # cut, because it would fill the run
    printed = capsys.readouterr().out
    assert "--model tiny" in printed
    assert "--warmup 1000 is not below --steps 1" in printed


def test_auto_precision_is_kept_when_a_run_is_continued(tmp_path):
    stopped, _ = interrupted(tmp_path, 5, "--amp", "auto")
    chosen = stopped["settings"]["amp"]
    other = {"bf16": "off", "off": "bf16"}[chosen]
    stopped["settings"]["amp"] = other  # as if it had begun on another machine
    torch.save(stopped, tmp_path / "last.pt")
    checkpoint, _ = pretrain(tmp_path, "--amp", "auto")
    assert checkpoint["settings"]["amp"] == other


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_train_like_eager_ones(tmp_path, monkeypatch):
    sizes = {"dim": 32, "heads": 2, "depth": 1}
    sizes |= {"predictor_dim": 16, "predictor_heads": 2, "predictor_depth": 1}
    monkeypatch.setitem(PRESETS, "tiny", JEPAConfig(**sizes))
    flags = ["--steps", "3", "--batch-size", "4", "--mask-ratio", "0.5", "0.5"]
    _, eager = pretrain(tmp_path / "eager", *flags)
    checkpoint, compiled = pretrain(tmp_path / "compiled", *flags, "--compile")
    assert column(compiled, "loss") == pytest.approx(column(eager, "loss"), rel=1e-3)
    config = JEPAConfig(**checkpoint["config"]["model"])
    VisionTransformer(config).load_state_dict(checkpoint["context_encoder"])  # no _orig_mod.


# ---- Bad input and bad luck


def test_a_nan_that_one_process_reads_makes_all_skip_the_step(tmp_path):
    frames = np.random.default_rng(0).standard_normal((64, 128))
    frames[32:] = math.nan
    order = list(data.clip_order(640, 0, 32, range(20), [slice(0, 32)]))
    bad = [i for _, i in order[9][:4]]  # of the first process, after mean and std are measured
    starts = [32 if i in bad else 0 for i in range(640)]
    folder = packed(tmp_path / "p", frames, starts, length=32)
    flags = [*TINY, "--batch-size", 32, "--data", folder, "--out", tmp_path / "out"]
    run_python(*TORCHRUN, "train.py", *flags)
    _, log = read_run(tmp_path / "out")
    # A process that did not skip would have weights of NaN, and no further step would be finite.
    assert column(log, "skipped") == [0] * 9 + [1] * 11


def test_lines_are_printed_as_they_come_and_a_reader_who_goes_away_ends_nothing(tmp_path):
    flags = [*TINY, "--steps", 100000, "--log-every", 20, "--out", tmp_path]
    with start("train.py", *flags, env={"PYTHONUNBUFFERED": ""}) as process:
        while not process.stdout.readline().startswith("step 1 "):
            assert process.poll() is None
        process.stdout.close()
        wait_for_step(tmp_path, 1)
        logged = (tmp_path / "log.csv").read_text().count("\n") - 1
        wait_for_step(tmp_path, 20 * logged + 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert logged < 5
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] > 20 * logged


def test_a_bad_recording_is_listed_once(tmp_path):
    folder = corpus(tmp_path / "c", 30, seconds=1.25)
    for name in ("bad.wav", "d.wav"):
        break_file(folder / name)
    _, log = pretrain(tmp_path / "out", "--data", folder)
    lines = (tmp_path / "out" / "bad_files.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == ["bad.wav", "d.wav"]
    assert int(log[-1]["bad_files"]) >= 5  # each was met once an epoch


@pytest.mark.parametrize(
    "bad, good, hint",
    [
        ("nan frames", 0, "20 steps"),
        ("text", 4, "reads of"),
        ("text", 0, "ten recordings in a row"),
    ],
)
def test_data_that_is_mostly_bad_stops_a_run(tmp_path, capsys, bad, good, hint):
    if bad == "nan frames":
        packed(tmp_path / "c", np.full((300, 128), math.nan))
    else:
        corpus(tmp_path / "c", good)
        for i in range(2):
            break_file(tmp_path / "c" / f"bad {i}.wav")
    flags = [*TINY, "--steps", 40, "--data", tmp_path / "c", "--out", tmp_path / "out"]
    code = 2 if good == 0 and bad == "text" else 1  # at once, while mean and std are measured
    assert hint in error_line(capsys, *flags, code=code)
    assert not (tmp_path / "out" / "last.pt").exists()


@pytest.mark.parametrize(
    "flags, hint",
    [
        ("--data {tmp}/nowhere", "nowhere"),
        ("--data {tmp}/empty", "empty"),
        ("--data {tmp}/list.txt", "list.txt"),
        ("--data {tmp}/x.bin", "x.bin"),
        ("--init {tmp}/nowhere.pt", "nowhere.pt"),
        ("--batch-size 10 --accum 4", "--accum 4"),
        ("--steps many", "--steps"),
        ("--sample-rate 44100", "a multiple of 128"),
        ("--clip-seconds 4", "a multiple of 0.625"),
        ("--mask-ratio 0 0.5", "--mask-ratio"),
        ("--mask-ratio 0.01 0.03", "must mask some"),  # of 16 patches
        ("--mask-ratio 0.5 0.98", "not all"),
        ("--mask-ratio 0.6 0.4", "--mask-ratio"),
        ("--ema 1.01", "between 0 and 1"),
        ("--ema-end nan", "between 0 and 1"),
        ("--out /proc/runs", "/proc/"),
        ("--out /proc", "/proc/"),
        ("--model huge", "huge"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_what_is_wrong_with_the_flags_or_the_data_is_said_in_one_line(
    tmp_path, capsys, flags, hint
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("gone.wav\n")
    (tmp_path / "x.bin").write_bytes(b"\0")
    flags = flags.format(tmp=tmp_path).split()
    assert hint in error_line(capsys, *TINY, "--out", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    "damage, hint",
    [
        ("half", "last.pt: not a checkpoint"),
        ("empty", "last.pt: not a checkpoint"),
        ("text", "last.pt: not a checkpoint"),
        ("another format", "last.pt: of the format audio-jepa 1, not audio-jepa 2"),
        ("no optimizer", "no optimizer: use --init {tmp}/last.pt"),
        ("lost", "a run without its last.pt"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, capsys, reference, damage, hint):
    path = tmp_path / "last.pt"
    kept = dict(reference[0])
    if damage == "another format":
        kept["format"] = "audio-jepa 1"
    del kept["optimizer"]
    torch.save(kept, path)
    if damage == "half":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_bytes(b"text")
    elif damage == "lost":
        path.rename(tmp_path / "step-0000008.pt")
    assert hint.format(tmp=tmp_path) in error_line(capsys, *TINY, "--out", tmp_path)


def environment_of(rank, port):
    """What torchrun sets on the second of two machines of one process each, or on the first."""
    numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    numbers |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()}


def test_a_process_that_fails_alone_says_so(tmp_path):
    env = environment_of(1, 29500)
    flags = [*TINY, "--out", tmp_path, "--data", tmp_path / "away"]
    (line,) = run_python("train.py", *flags, code=2, env=env).stderr.splitlines()
    assert line.startswith("error: process 1: ")
    assert "away" in line
    del env["LOCAL_RANK"]
    (line,) = run_python("train.py", *flags, code=2, env=env).stderr.splitlines()
    assert "start it with torchrun" in line


@pytest.mark.parametrize("setting", ["step", "seed"])
def test_processes_that_disagree_end_together(tmp_path, reference, setting):
    flags = [["--out", tmp_path / "0"], ["--out", tmp_path / "1"]]
    if setting == "step":
        (tmp_path / "0").mkdir()
        torch.save(reference[0], tmp_path / "0" / "last.pt")
    else:
        flags[1] += ["--seed", 1]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    runs = []
    for rank in range(2):
        runs.append(start("train.py", *TINY, *flags[rank], env=environment_of(rank, port)))
    try:
        for rank in range(2):
            _, errors = runs[rank].communicate(timeout=120)
            assert runs[rank].returncode == 2
            (line,) = errors.splitlines()
            assert line.startswith(f"error: process {rank}: {setting} is ")
    finally:
        for process in runs:
            process.kill()


def test_world_size_without_a_launcher_is_one_process(tmp_path):
    run_python("train.py", *TINY, "--steps", 6, "--out", tmp_path, env={"WORLD_SIZE": "4"})
    assert read_run(tmp_path)[0]["step"] == 6


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
        "settings": {"amp": "off"},
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
    """Embeddings of the recordings, by clip and by time."""
    out = tmp_path_factory.mktemp("pooled") / "e.npz"
    by_clip = embeddings(checkpoint, recordings, out)
    return by_clip, embeddings(checkpoint, recordings, out, "--pool", "time")


# ---- The encoder as a module: only sound is encoded; X-ARES, fine-tuning


@pytest.mark.parametrize(
    "samples, rows", [(1000, 1), (50000, 3), (320000, 16), (320001, 17), (600 * 32000, 960)]
)
def test_a_waveform_gives_a_row_for_each_625_ms_that_it_reaches_into(encoder, samples, rows):
    made = encoder(torch.randn(1, samples))
    assert made.shape == (1, rows, 512)
    assert made.dtype == torch.float32
    assert made.isfinite().all()


def test_rows_come_from_the_tokens_that_hold_sound_alone(encoder):
    """By hand: 1 s reaches into two rows of 625 ms, 16 of the 128 tokens of 10 s."""
    waveform = torch.randn(1, 32000)
    spectrogram = encoder.log_mel(F.pad(waveform, (0, 9 * 32000)))
    tokens = encoder.network(spectrogram, torch.arange(16).unsqueeze(0))
    assert_close(encoder(waveform), tokens.view(1, 2, 512))


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


def test_the_encoder_works_in_other_precisions(encoder):
    waveform = torch.randn(2, 50000)
    expected = encoder(waveform)
    made = copy.deepcopy(encoder).bfloat16()(waveform)
    assert (made - expected).norm() < 0.05 * expected.norm()


def test_the_encoder_computes_in_the_precision_of_its_training(checkpoint, encoder, tmp_path):
    stored = torch.load(checkpoint, weights_only=True)
    stored["settings"] = {"amp": "bf16"}
    torch.save(stored, tmp_path / "bf16.pt")
    in_bf16 = extract.load_encoder(tmp_path / "bf16.pt")
    waveform = torch.randn(1, 50000)
    assert not torch.allclose(in_bf16(waveform), encoder(waveform), atol=1e-4)
    in_bf16.amp = "off"
    assert torch.equal(in_bf16(waveform), encoder(waveform))


# ---- Embeddings of a folder


def test_embeddings_have_a_row_a_recording_and_tell_how_they_were_made(pooled):
    by_clip, _ = pooled
    assert by_clip["embeddings"].shape == (6, 8 * 64)
    assert by_clip["offsets"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert by_clip["paths"].tolist() == [f"{n}.wav" for n in range(6)]
    assert by_clip["seconds"] == pytest.approx(SECONDS, abs=1e-4)
    numbers = [by_clip[name].item() for name in ("sample_rate", "hop_ms", "step")]
    assert numbers == [32000, 625, 3]
    config = json.loads(by_clip["config"].item())
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
    by_clip, by_time = pooled
    recordings = np.split(by_time["embeddings"], by_time["offsets"][1:-1])
    for n, rows in enumerate(recordings):
        assert len(rows) == math.ceil(SECONDS[n] / 0.625)
        weights = np.ones(len(rows))
        weights[-1] = SECONDS[n] / 0.625 - (len(rows) - 1)  # the share of the last that holds sound
        mean = np.average(rows, axis=0, weights=weights)
        assert np.abs(by_clip["embeddings"][n] - mean).max() < 1e-5


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
    assert made["paths"].tolist() == pooled[0]["paths"].tolist()
    assert_close(made["embeddings"], pooled[0]["embeddings"])
    assert capsys.readouterr().err.startswith("left out: 3b.wav: holds NaN")


# ---- Probes


def labelled(separation, clips=200, width=16):
    """Clips [clips, width] of four classes around a centre each -> them, labels, a fold."""
    labels = torch.arange(clips) % 4
    centres = separation * torch.randn(4, width)
    fold = extract.Fold(*torch.arange(clips).split([clips - 80, 40, 40]))
    return torch.randn(clips, width) + centres[labels], labels, fold


def test_knn_is_what_the_readme_says():
    embeddings, labels, fold = labelled(0.5)
    x = embeddings.double()
    x = (x - x[fold.train].mean(0)) / x[fold.train].std(0)
    x = F.normalize(x)
    expected = []
    for clip in fold.test:
        nearest = (x[fold.train] @ x[clip]).topk(10)
        weights = torch.exp(nearest.values / 0.07)
        votes = torch.bincount(labels[fold.train][nearest.indices], weights)
        expected.append(votes.argmax().item())
    assert extract.knn(embeddings, labels, fold)[0].tolist() == expected


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probe_finds_what_is_there_and_nothing_else(probe):
    features, labels, fold = labelled(1.0, clips=300, width=64)
    if probe == "attentive":  # among other rows, from which the one that counts can be told
        alone = 3 * features.unsqueeze(1)
        features = [torch.cat([torch.randn(i % 5, 64), row]) for i, row in enumerate(alone)]

    def share_right(labels):
        predictions = torch.cat(list(extract.PROBES[probe](features, labels, fold)))
        held_out = torch.cat([fold.test, fold.valid])
        return (predictions == labels[held_out]).float().mean()

    assert share_right(labels) > 0.9
    assert share_right(labels[torch.randperm(300)]) < 0.5


def test_the_linear_probe_converges_to_the_minimum_of_the_penalised_cross_entropy():
    x, labels, fold = labelled(0.5)
    x = (x + 10 * torch.randn(200, 1)).double()  # an overall level, which hides the classes
    everything = torch.ones(1, 200, dtype=torch.bool)
    weight, bias = extract.fit(x, labels, 4, 0.01, everything)
    weight.requires_grad_()
    bias.requires_grad_()
    cross_entropy = F.cross_entropy((x @ weight + bias)[0], labels)
    (cross_entropy + 0.005 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


def write_task(folder, splits):
    """Which of three pitches? Four clips a class in each split; the split "." is no folder."""
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
        ("Train test", [12, 0, 12, 1]),
        ("training validation eval", [12, 12, 12, 1]),
        ("fold1 fold2 fold3", [24, 0, 36, 3]),
        (".", [9, 0, 3, 1]),  # a fifth is tested
    ],
)
def test_the_json_tells_what_was_tested(checkpoint, tmp_path, splits, expected):
    found = probe([checkpoint], write_task(tmp_path / "task", splits), "knn")
    assert [found[name] for name in ("train", "valid", "test", "folds")] == expected


def test_folders_called_fold_are_tested_in_turn():
    labels, folds = extract.read_task("x", ["fold1/a/x", "fold1/b/x", "fold2/a/x", "fold2/b/x"])
    assert labels.tolist() == [0, 1, 0, 1]
    assert [fold.test.tolist() for fold in folds] == [[0, 1], [2, 3]]
    assert [fold.train.tolist() for fold in folds] == [[2, 3], [0, 1]]


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
    ours = extract.AuthorsLogMel()(waveform.unsqueeze(0))
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
    line = refusal(capsys, extract.main, flags)
    assert "a.pt: not a checkpoint that can be read" in line
    assert not (tmp_path / "executed").exists()


EXTRACT_REFUSES = """
last.pt .                             --out
last.pt . --out x.npz --probe knn     --out
last.pt . --out x.npz --json y.json   --json
last.pt . --out nowhere/x.npz         nowhere/x.npz
last.pt . --out /proc/x.npz           /proc/x.npz
last.pt . --out=                      a file in a folder
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
    labels = torch.arange(3).repeat(60)  # falling, steady, rising
    t = torch.arange(32000) / 32000
    phase = t + (labels.unsqueeze(1) - 1) / 2 * (t**2 - t)
    hertz = 400 * 2 ** (4 * torch.rand(180, 1))
    waveforms = 0.1 * torch.sin(2 * math.pi * hertz * phase) + 0.001 * torch.randn(180, 32000)
    fold = extract.Fold(*torch.arange(180).split([90, 0, 90]))
    trained = extract.load_encoder(SMALL_WEIGHTS)
    accuracy = []
    for encoder in (trained, extract.untrained(trained)):
        embeddings = encoder(waveforms).mean(1).detach()
        on_test, _ = extract.linear(embeddings, labels, fold)
        accuracy.append((on_test == labels[fold.test]).double().mean())
    assert accuracy[0] > 0.9
    assert accuracy[0] > accuracy[1] + 0.1


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
    for task, expected in [("esc50", [5, 2, 8, 0, 10]), ("commands", [1, 2, 4, 2, 2])]:
        found = probe([checkpoint], tmp_path / task, "knn")
        counts = [found[name] for name in ("folds", "classes", "train", "valid", "test")]
        assert counts == expected


def test_the_demonstrations_run(tmp_path):
    assert run_python("masking.py").stdout.count("#") > 2 * 51
    out = tmp_path / "out"
    printed = run_python(".github/benchmark.py", *TINY, "--out", out).stdout
    for word in ("0.5 GFLOP", "reading", "log-mel", "step alone", "all together", "%", "GiB"):
        assert word in printed
    assert not out.exists()


def test_every_flag_in_the_readme_exists():
    scripts = ("train.py", "data.py", "extract.py")
    help_texts = [run_python(script, "--help").stdout for script in scripts]
    of_others = (
        "--nproc --standalone --max-jobs --max-restarts --shm-size --nodes --ntasks-per-node "
        "--gpus-per-node --cpus-per-task --signal --requeue --nnodes --rdzv"
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - set(of_others.split())
    assert [flag for flag in named if flag not in "".join(help_texts)] == []


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_the_log_mel_of_a_gpu_is_that_of_a_cpu():
    log_mel = data.LogMel()
    waveform = torch.from_numpy(np.stack([noise(10), tone(10)]))
    on_cpu = log_mel(waveform)
    on_gpu = log_mel.to("cuda")(waveform.to("cuda")).cpu()
    assert (on_gpu - on_cpu).abs().max() < 0.01


@needs_gpu
@pytest.mark.parametrize("flags", ["--amp auto", "--amp fp16", "--compile"])
def test_a_gpu_trains(tmp_path, flags):
    _, log = pretrain(tmp_path, *flags.split())
    finite = [loss for loss in column(log, "loss") if math.isfinite(loss)]  # fp16 skips at first
    assert len(finite) > 10
    assert finite[-1] < finite[0]
