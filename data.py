# SPDX-License-Identifier: MIT
"""Audio in, log-mel spectrograms out (sec. IV.A). How a batch travels from the disk to the loss:

    clip_order                       which clips a step is made of, for each process
    clip_loader, in its workers:
        Clips.read                   one clip: a window, filled up with further recordings
            AudioFiles.window        one window: open, decode, resample
        collate                      a batch of waveforms, in shared memory
    train_step, in train.py:
        LogMel                       waveforms [B, samples] -> spectrograms [B, 1, T, F], on the GPU
        VisionTransformer and JEPA   in model.py

A recording is a file, or a member of a tar, of any length. A clip is what training sees: 10 s.

    python data.py scan PATH        hours, rates, lengths, what is silent or cannot be read
    python data.py pack PATH OUT    log-mel frames in memory-mapped files, to train without decoding

PATH is a folder, a list of paths (.txt, .csv, .tsv) or tar shards, as for train.py --data.
Letters in the shape comments: B clips, T spectrogram frames, F mel bands.
"""

import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import random
import signal
import sys
import tarfile
import threading
import zlib
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torch.utils.data import get_worker_info
from torchaudio.compliance import kaldi
from tqdm import tqdm

FRAMES_PER_SECOND = 25.6  # 256 frames in 10 s, and as many per second in clips of another length
PATCH_SECONDS = 0.625  # a patch, 16 frames
MEL_BINS = 128
FLOOR = torch.finfo(torch.float32).eps  # Kaldi's least power: silence becomes log(FLOOR) = -15.9
UNREADABLE = (OSError, ValueError, RuntimeError)  # what reading a bad recording may raise


class LogMel(nn.Module):
    """Kaldi's log-mel filter bank for a whole batch, on the device of its input.

    (waveform [B, samples], in [-1, 1]) -> [B, 1, T, F], (log-mel - mean) / std.
    Packed frames [B, T, F], which are log-mel already, are only normalised.

    There is a frame every `hop` = sample_rate * clip_seconds / time_bins samples (1250, or 39 ms),
    seen through a window of 2.5 hops. ValueError if the hop is not a whole number of samples.
    Another front end is a subclass with other `frames`, as AuthorsLogMel in train.py. To use it,
    put its name for LogMel in `train` (train.py), AudioJEPAEncoder (extract.py) and `pack`.
    """

    def __init__(
        self,
        sample_rate: int = 32000,
        clip_seconds: float = 10.0,
        time_bins: int = 256,
        mel_bins: int = MEL_BINS,
        mean: float = 0.0,
        std: float = 1.0,
    ):
        super().__init__()
        hop = sample_rate * clip_seconds / time_bins
        if hop != int(hop):
            raise ValueError(f"{sample_rate} Hz: the hop of {hop} samples is not a whole number")
        self.sample_rate = sample_rate
        self.clip_seconds = clip_seconds
        self.time_bins = time_bins
        self.mel_bins = mel_bins
        self.mean = mean
        self.std = std
        self.hop = int(hop)
        self.window_length = int(2.5 * hop)
        self.fft_length = 2 ** math.ceil(math.log2(self.window_length))
        no_warping = (100.0, -500.0, 1.0)  # Kaldi's vocal tract arguments; a factor of 1 is off
        filters, _ = kaldi.get_mel_banks(
            mel_bins, self.fft_length, sample_rate, 20.0, sample_rate / 2, *no_warping
        )
        window = torch.hann_window(self.window_length, periodic=False)
        self.register_buffer("filters", filters.T, persistent=False)  # [fft / 2, F]
        self.register_buffer("window", window, persistent=False)

    @property
    def config(self) -> dict:
        """The constructor's arguments, as checkpoints store them."""
        names = ("sample_rate", "clip_seconds", "time_bins", "mel_bins", "mean", "std")
        return {name: getattr(self, name) for name in names}

    def frames(self, waveform: torch.Tensor) -> torch.Tensor:
        """Raw log-mel: [B, samples], at least a window -> [B, round(samples / hop), F]."""
        x = self.cut(waveform)  # [B, T, window]
        x = x - x.mean(dim=2, keepdim=True)
        # Pre-emphasis. The difference has one sample less: the first, where the window is 0 anyway.
        x = x[..., 1:] - 0.97 * x[..., :-1]
        spectrum = torch.fft.rfft(x * self.window[1:].float(), n=self.fft_length)
        power = spectrum.real.square() + spectrum.imag.square()  # [B, T, fft / 2 + 1]
        mel = power[..., :-1] @ self.filters.float()  # [B, T, F]; Kaldi leaves the last bin out
        return mel.clamp(min=FLOOR).log()

    def cut(self, waveform):
        """Frame t is centred on the middle of hop t; both ends of the waveform are mirrored."""
        samples = waveform.shape[1]
        count = (samples + self.hop // 2) // self.hop
        left = self.window_length // 2 - self.hop // 2
        right = (count - 1) * self.hop + self.window_length - left - samples
        before = waveform[:, :left].flip(1)
        after = waveform[:, samples - right :].flip(1)
        padded = torch.cat([before, waveform, after], dim=1)
        return padded.unfold(1, self.window_length, self.hop)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        # In fp32 whatever surrounds it: powers overflow fp16, and bf16 cannot tell them apart.
        with torch.autocast(clips.device.type, enabled=False):
            if clips.ndim == 2:
                waveforms = clips.float()
                parts = [waveforms]
                if clips.device.type == "cpu":
                    parts = waveforms.split(1)  # what a clip needs fits the caches of a CPU
                clips = torch.cat([self.frames(part) for part in parts])
            normalised = (clips.float() - self.mean) / self.std
            return normalised.unsqueeze(1)


def measure_mean_std(clips, log_mel: LogMel, device, workers: int) -> tuple[float, float]:
    """Mean and std of the un-normalised log-mel over the first 256 clips that training will see.

    They are two numbers for the whole set, as in AST and AudioMAE, and not two for each band.
    `log_mel` has mean 0 and std 1 so far. ValueError if none of those clips can be read.
    """
    order = clip_order(len(clips), clips.seed, batch_size=16, steps=range(16), rows=[slice(0, 16)])
    log_mels = []
    for batch in clip_loader(clips, order, workers):
        if batch.audio is not None:
            log_mels.append(log_mel(batch.audio.to(device)).cpu())
    if not log_mels:
        raise ValueError("none of the first 256 clips can be used: python data.py scan says why")
    std, mean = torch.std_mean(torch.cat(log_mels).double())
    return mean.item(), max(std.item(), 1e-3)  # digital silence has no std


# ------------------------------------------------------------------------------------------------
# Three kinds of data, with one protocol:
#
#     len(source)                      the number of recordings
#     source.window(i, length, rng)    up to `length` samples, or packed frames, from a random place
#                                      in recording i; all of it if it is shorter; may raise
#                                      UNREADABLE
#     source.name(i)                   of recording i, where something can be wrong with it
#     source.rate                      samples, or packed frames, per second
#     source.silence                   the value that fills what stays empty
#     source.fingerprint               a line that tells one set from another


class Recordings:
    """A set of recordings, each an entry of bytes: its name, then where to find it."""

    def __init__(self, root, entries: np.ndarray):
        self.root = os.fsencode(root)
        self.entries = entries

    @property
    def fingerprint(self) -> str:
        return f"{len(self)} recordings, crc {zlib.crc32(self.entries):08x}"

    def __len__(self):
        return len(self.entries)

    def name(self, i: int) -> str:
        return os.fsdecode(self.entries[i].split(b"\0")[0])


class AudioFiles(Recordings):
    """Files, or members of tars -> windows of mono float32 at one sample rate."""

    silence = 0.0

    def __init__(self, path, sample_rate: int):
        root, entries = find_recordings(path)
        super().__init__(root, entries)
        self.rate = sample_rate

    def open(self, i: int) -> "Sound":
        name, *place = self.entries[i].split(b"\0")
        file = os.path.join(self.root, name)  # its ending helps libsndfile to find an MP3's start
        if place:
            shard, offset, size = place
            with open(os.path.join(self.root, shard), "rb") as tar:
                tar.seek(int(offset))
                file = io.BytesIO(tar.read(int(size)))
        try:
            return Sound(file)
        except soundfile.LibsndfileError as error:
            raise ValueError(error.error_string) from None  # without the path, which is known

    def window(self, i, length, rng):
        with self.open(i) as sound:
            rate = sound.samplerate
            promised = sound.frames  # by the header
            count = math.ceil(length * rate / self.rate)
            spare = max(promised - count, 0)
            place = rng.random()  # of the window: 0 is at the start, 1 as late as it fits
            start = int(place * (spare + 1))
            waveform = decode(sound, start, count)
        if len(waveform) < count < promised:
            # The header promises more than there is, or does not know (a stream). Then we decode
            # all there is, and take the window from the same place in that.
            with self.open(i) as sound:
                waveform = decode(sound, 0, promised)
            spare = max(len(waveform) - count, 0)
            start = int(place * (spare + 1))
            waveform = waveform[start : start + count]
        if len(waveform) == 0:
            raise ValueError("nothing in it can be decoded")
        return resample(waveform, rate, self.rate)[:length]

    def windows(self, i, length):
        """Recording i from start to end, in windows of `length` samples, the last one shorter."""
        with self.open(i) as sound:
            begin = 0
            for number in itertools.count(1):
                end = round(number * length * sound.samplerate / self.rate)
                waveform = decode(sound, 0, end - begin)
                if len(waveform) == 0:
                    break
                yield resample(waveform, sound.samplerate, self.rate)[:length]
                begin = end
        if begin == 0:
            raise ValueError("nothing in it can be decoded")


class PackedFrames(Recordings):
    """What `pack` has stored -> windows of log-mel frames [T, F], fp16."""

    silence = math.log(FLOOR)
    rate = FRAMES_PER_SECOND

    def __init__(self, folder, sample_rate: int):
        with open(os.path.join(folder, "pack.json")) as file:
            packed_rate = json.load(file)["sample_rate"]
        if packed_rate != sample_rate:
            raise ValueError(f"{folder}: packed at {packed_rate} Hz, not at {sample_rate}")
        super().__init__(folder, np.load(os.path.join(folder, "index.npy"), mmap_mode="r"))
        if len(self) == 0:
            raise ValueError(f"{folder}: none of its recordings could be packed")
        _, shard, first, count = self.entries[-1].split(b"\0")
        bytes_wanted = (int(first) + int(count)) * MEL_BINS * 2
        if os.path.getsize(os.path.join(self.root, shard)) < bytes_wanted:
            raise ValueError(f"{folder}: {os.fsdecode(shard)} is not whole: copy or pack it again")

    def window(self, i, length, rng):
        _, shard, first, count = self.entries[i].split(b"\0")
        spare = max(int(count) - length, 0)
        start = int(first) + int(rng.random() * (spare + 1))
        end = min(start + length, int(first) + int(count))
        return map_shard(os.path.join(self.root, shard))[start:end]


@functools.cache
def map_shard(path):
    """The frames [T, F] of a packed file: mapped, not read."""
    return np.memmap(os.fsdecode(path), np.float16, mode="r").reshape(-1, MEL_BINS)


class SyntheticSounds:
    """Sound without a download: each window adds up four places of a tape of fading tones."""

    silence = 0.0
    fingerprint = "synthetic clips"

    def __init__(self, sample_rate: int, num_clips: int):
        self.rate = sample_rate
        self.num_clips = num_clips
        hertz = 80 * 2 ** np.random.default_rng(0).uniform(0, 6, size=(120, 1))
        t = np.arange(sample_rate) / sample_rate  # a second for each tone
        tones = np.sin(2 * np.pi * hertz * t) * np.exp(-4 * t)
        self.tape = tones.astype(np.float32).flatten()

    def __len__(self):
        return self.num_clips

    def window(self, i, length, rng):
        window = np.zeros(length, np.float32)
        for _ in range(4):
            start = rng.randrange(max(len(self.tape) - length, 1))
            sound = self.tape[start : start + length]
            window[: len(sound)] += np.float32(rng.uniform(0.03, 0.3)) * sound
        return window


# ------------------------------------------------------------------------------------------------
# Clips: what training sees


class Reading(NamedTuple):
    """A clip, or a batch of them, and what reading it took."""

    audio: np.ndarray | torch.Tensor | None  # None: ten recordings in a row cannot be used
    reads: int  # recordings that were opened
    bad: list[tuple[str, str]]  # (name, reason) of those that could not be used


class Clips(Dataset):
    """Clips of equal length out of one of the sources above; any DataLoader takes it.

    clips[i] is clip i of the epoch chosen by `set_epoch`, a pure function of (seed, epoch, i).
    A longer recording gives a random window. A shorter one is filled up with other recordings, end
    to end: were it filled with silence, most targets would be the same silence, and predicting
    them would teach nothing. Only a rest shorter than 625 ms, or than half a clip, stays silent.
    RuntimeError: ten recordings in a row cannot be used.
    """

    def __init__(self, source, clip_seconds: float, seed: int):
        self.source = source
        self.seed = seed
        self.epoch = 0
        self.length = round(clip_seconds * source.rate)
        self.shortest_fill = min(round(PATCH_SECONDS * source.rate), self.length // 2)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < len(self):
            raise IndexError(i)
        audio, reads, bad = self.read(self.epoch, int(i))
        if audio is None:
            name, reason = bad[-1]
            raise RuntimeError(
                f"{reads} recordings in a row cannot be used, at last {name}: {reason}"
            )
        return torch.tensor(audio)  # a copy: frames of a packed file are not the reader's to change

    def read(self, epoch: int, i: int) -> Reading:
        """Clip i of an epoch, as a Reading: what clip_loader calls, and so training."""
        rng = random.Random(f"clip {i} of epoch {epoch}, seed {self.seed}")
        parts = []
        bad = []
        reads = 0
        missing = self.length
        while missing >= self.shortest_fill and reads < 1000:  # a set of clicks would take for ever
            reads += 1
            try:
                window = self.source.window(i, missing, rng)
                parts.append(window)
                missing -= len(window)
            except UNREADABLE as error:
                bad.append((self.source.name(i), str(error)))
                if len(bad) == 10 and not parts:
                    return Reading(None, reads, bad)
            i = rng.randrange(len(self))
        shape = (missing, *parts[0].shape[1:])
        parts.append(np.full(shape, self.source.silence, parts[0].dtype))
        return Reading(np.concatenate(parts), reads, bad)


class AudioClips(Clips):
    """Clips of a folder, a list, tar shards or a packed folder.

    -> waveforms [samples], float32, or of a packed folder log-mel frames [T, F], fp16.
    ValueError says what is wrong with the path.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        sample_rate: int = 32000,
        clip_seconds: float = 10.0,
        seed: int = 0,
    ):
        if os.path.isfile(os.path.join(path, "pack.json")):
            source = PackedFrames(path, sample_rate)
        else:
            source = AudioFiles(path, sample_rate)
        super().__init__(source, clip_seconds, seed)


class SyntheticClips(Clips):
    """Clips without data -> waveforms [samples], float32, no two epochs alike."""

    def __init__(
        self,
        sample_rate: int = 32000,
        clip_seconds: float = 10.0,
        seed: int = 0,
        num_clips: int = 10000,
    ):
        super().__init__(SyntheticSounds(sample_rate, num_clips), clip_seconds, seed)


def clip_order(num_clips: int, seed: int, batch_size: int, steps: range, rows: list[slice]):
    """Yield which clips a process reads, a list of (epoch, clip) for each of its micro-batches.

    All epochs follow each other in one endless line, each in an order of its own, a pure function
    of (seed, epoch). Step s is the batch_size places from s * batch_size on: no clip is left out,
    and a run can be continued at any step. `rows` are the places within a step that belong to this
    process, a slice for each micro-batch (see rows_of_process in train.py).
    """

    @functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
    def shuffled(epoch):
        rng = random.Random(f"order of epoch {epoch}, seed {seed}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        return torch.randperm(num_clips, generator=generator)

    for step in steps:
        for micro_batch in rows:
            batch = []
            for row in range(micro_batch.start, micro_batch.stop):
                epoch, place = divmod(step * batch_size + row, num_clips)
                batch.append((epoch, int(shuffled(epoch)[place])))
            yield batch


def clip_loader(clips: Clips, order, workers: int) -> DataLoader:
    """Read the micro-batches of `order` in worker processes -> a Reading of each: [B, samples], or
    [B, T, F] of packed frames."""
    return DataLoader(
        ReadingsOfClips(clips),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_the_main_process,
        pin_memory=torch.cuda.is_available(),
    )


class ReadingsOfClips(Dataset):
    """Clips for the loader: asked for (epoch, i), it answers with a Reading."""

    def __init__(self, clips):
        self.clips = clips

    def __getitem__(self, key):
        epoch, i = key
        return self.clips.read(epoch, i)


def collate(readings):
    """Readings of clips -> Reading of a batch."""
    reads = sum(reading.reads for reading in readings)
    bad = []
    for reading in readings:
        bad += reading.bad
    clips = [reading.audio for reading in readings]
    if any(clip is None for clip in clips):
        return Reading(None, reads, bad)
    batch = torch.from_numpy(np.stack(clips))
    if get_worker_info() is not None:
        # The loader would do this too, in a thread whose errors nobody hears of: where shared
        # memory is too small, the run would wait for ever.
        try:
            batch.share_memory_()
        except RuntimeError as error:
            hint = "docker run --shm-size=8g gives more, --workers 0 needs none"
            raise OSError(f"no shared memory for a batch: {hint} ({error})") from None
    return Reading(batch, reads, bad)


# ------------------------------------------------------------------------------------------------
# The reading ends here. What follows finds and decodes audio.

AUDIO = tuple(b".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .rf64 .sph .w64".split())
# What libsndfile cannot read:
OTHER_AUDIO = tuple(b".m4a .mp4 .aac .wma .webm .mka .amr .ape .wv .3gp .mkv .mov .ac3".split())
# Up to this far ahead we decode and throw away, which is exact in every format. We seek further.
SEEK_SECONDS = 30
WANTED = (
    f"wanted is a folder, a list or a .tar of {b' '.join(AUDIO).decode()}; a list is a .txt with a "
    "path a line, a .csv or .tsv with paths in its first column, or fairseq's .tsv"
)


def find_recordings(path: str | os.PathLike) -> tuple[bytes, np.ndarray]:
    """All recordings of a folder, list, tar or file -> its folder, and a sorted array of entries.

    An entry is a path relative to the folder, or, for a member of a tar, its name, the shard, the
    offset and the size, joined by zero bytes. It is one flat array, as a list of two million
    strings would be copied into every worker. ValueError says what is wrong with the path.
    """
    path = os.fsencode(path)
    if not os.path.exists(path):
        raise ValueError(f"{printable(path)}: does not exist")
    if os.path.exists(os.path.join(path, b"pack.json")):
        raise ValueError(f"{printable(path)}: is packed; wanted are the recordings themselves")
    root = os.path.dirname(path)
    names = [os.path.basename(path)]
    is_list = path.lower().endswith((b".txt", b".csv", b".tsv"))
    if os.path.isdir(path):
        root = path
        names = walk(path)
    elif is_list:
        names = read_list(path)
    entries = []
    left_out = Counter()
    for name in names:
        ending = os.path.splitext(name)[1].lower()
        if ending == b".tar":
            entries += tar_members(root, name)
        elif ending in AUDIO or is_list:  # who lists a file means it
            entries.append(name)
        elif ending in OTHER_AUDIO:
            left_out[ending.decode()] += 1
    if left_out:
        warn(f"{printable(path)}: left out are {dict(left_out)}, which ffmpeg can convert")
    if not entries:
        raise ValueError(f"{printable(path)}: no audio found; {WANTED}")
    return root, np.sort(np.array(entries))


def walk(root):
    """Yield all files below a folder, relative to it. Links to folders are followed, to each real
    folder once; hidden files and folders (.git, ._copy.wav of macOS) are not looked at."""
    seen = set()
    prefix = os.path.join(root, b"")
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=warn):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()  # tells os.walk not to go on here
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(b"."))
        for name in names:
            if not name.startswith(b"."):
                yield os.path.join(folder, name).removeprefix(prefix)


def read_list(path):
    """The paths in a list, relative to its folder. ValueError: some are no files."""
    is_txt = path.lower().endswith(b".txt")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        if is_txt:
            names = file.read().splitlines()
        else:
            delimiter = "," if path.lower().endswith(b".csv") else "\t"
            names = [row[0] for row in csv.reader(file, delimiter=delimiter) if row]
    names = [os.fsencode(name) for name in names if name.strip()]
    folder = os.path.dirname(path)
    if not names:
        return []
    first = os.path.join(folder, names[0])
    if len(names) > 1 and os.path.isdir(first):  # fairseq: a root, paths below it
        names = [names[0] + b"/" + name for name in names[1:]]
    elif not (is_txt or os.path.exists(first) or first.lower().endswith((*AUDIO, b".tar"))):
        names = names[1:]  # the first is a title
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        count = f"{len(missing)} of its {len(names)} lines name no file, as {printable(missing[0])}"
        hint = "for several folders, put links to them into one"
        raise ValueError(f"{printable(path)}: {count} ({hint}); {WANTED}")
    return names


def tar_members(root, shard):
    """Yield the audio in an uncompressed tar, to be read in place."""
    try:
        with tarfile.open(os.path.join(root, shard), "r:") as tar:
            for member in tar:
                name = os.fsencode(os.path.normpath(member.name))  # not ./name
                if not member.isfile() or not name.lower().endswith(AUDIO):
                    continue
                if member.issparse():  # its bytes do not lie in one piece
                    warn(f"left out: {printable(name)} is a sparse member of {printable(shard)}")
                else:
                    place = (shard, b"%d" % member.offset_data, b"%d" % member.size)
                    yield b"\0".join([shard + b"/" + name, *place])
    except (tarfile.TarError, OSError) as error:
        warn(f"{printable(shard)} cannot be read to its end: {error}")


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def printable(name: str | bytes | os.PathLike) -> str:
    """A path on one line, whatever bytes it holds."""
    return repr(os.fsdecode(name))[1:-1]


class Sound(soundfile.SoundFile):
    def seekable(self):
        """Or soundfile would seek after each read, which leaves 60 ms of silence in an MP3."""
        return False


def decode(sound, skip, count):
    """Skip samples from where `sound` stands, then `count` of them, or as many as there are
    -> mono float32, at the file's rate.

    Of a damaged file, what comes before the damage. ValueError if it holds NaN or Inf.
    """
    if skip > SEEK_SECONDS * sound.samplerate:
        try:
            sound.seek(skip, os.SEEK_CUR)
            skip = 0
        except RuntimeError:  # beyond the end of a file that was cut, or of a kind without seeking
            return np.empty(0, np.float32)
    missing = skip + count
    parts = [np.empty(0, np.float32)]
    while missing > 0:
        wanted = min(missing, 60 * sound.samplerate)
        part = np.full((wanted, sound.channels), np.nan, np.float32)
        try:
            decoded = len(sound.read(out=part))
        except RuntimeError:  # what was decoded before the damage is in `part`
            decoded = np.isfinite(part[:, 0]).sum()
        mono = part[:decoded, 0]
        if sound.channels > 1:
            mono = part[:decoded].mean(axis=1)  # of one channel this would slow decoding by a fifth
        parts.append(mono)
        missing -= decoded
        if decoded < wanted:
            break
    waveform = np.concatenate(parts)[skip:]
    if not np.isfinite(waveform).all():
        raise ValueError("holds NaN or Inf")
    return waveform


@functools.lru_cache(maxsize=64)
def resampler(rate, wanted):
    """torchaudio's resampler, which builds its kernel once. Rates like 44 099 Hz have no small
    common divisor with ours, and a kernel of gigabytes: they are taken for one within 0.1 %."""
    ratio = Fraction(wanted, rate).limit_denominator(1000)
    return torchaudio.transforms.Resample(ratio.denominator, ratio.numerator)


def resample(waveform, rate, wanted):
    """[samples] at one rate -> [samples] at another."""
    if rate == wanted:
        return waveform
    return resampler(rate, wanted)(torch.from_numpy(waveform)).numpy()


@contextlib.contextmanager
def whole_file(path: str | os.PathLike):
    """with whole_file(path) as file: write it, all of it or nothing, whenever the power goes or the
    disk is full. OSError says why, and what was there before is still there."""
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        cause = error
        if isinstance(error, RuntimeError):
            cause = error.__context__  # torch.save hides the disk's error behind its own
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"cannot write {path}: {cause}; what was there before is kept") from error


def leave_signals_to_the_main_process(_):
    """Ctrl-C and Slurm signal all processes of a run. A worker must not die of that, as the main
    process needs it to finish its step. It does die of a SIGTERM from the main process itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=die_with_the_main_process, daemon=True).start()


def die_with_the_main_process():
    sender = None
    while sender != os.getppid():
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
    os._exit(0)


# ------------------------------------------------------------------------------------------------
# python data.py scan | pack


class EachRecording(Dataset):
    """work(files, i) for every recording, in worker processes -> (i, answer, reason it failed)."""

    def __init__(self, files, work):
        self.files = files
        self.work = work

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            return i, self.work(self.files, i), None
        except UNREADABLE as error:
            return i, None, str(error)


def in_workers(work, files):
    """A loader of (i, work(files, i), reason it failed) of all recordings, in order."""
    return DataLoader(
        EachRecording(files, work),
        batch_size=None,
        num_workers=usable_cores(),
        collate_fn=tuple,  # leaves arrays what they are: the default makes tensors of them
    )


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine's under Slurm or Docker."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def look_at(files, i):
    """A recording, decoded to its end -> (seconds, sample rate, channels, peak)."""
    with files.open(i) as sound:
        waveform = decode(sound, 0, sound.frames)
        if len(waveform) == 0:
            raise ValueError("nothing in it can be decoded")
        peak = np.abs(waveform).max()
        return len(waveform) / sound.samplerate, sound.samplerate, sound.channels, peak


def scan(files):
    """Print what a set holds."""
    counts = Counter(recordings=len(files))
    for i, answer, reason in tqdm(in_workers(look_at, files), disable=None):
        if reason is not None:
            tqdm.write(f"{printable(files.name(i))}: {reason}")
            counts["unreadable"] += 1
            continue
        seconds, rate, channels, peak = answer
        counts["hours"] += seconds / 3600
        counts["silent"] += int(peak == 0)
        counts["shorter than 10 s"] += int(seconds < 10)
        counts[f"{rate} Hz"] += 1
        counts[f"{channels} channels"] += 1
    for what, number in counts.items():
        print(f"{number:12.6g}  {what}")


def all_frames(log_mel, files, i):
    """A whole recording -> raw log-mel frames [T, F], fp16, of 10 s at a time."""
    samples = 10 * files.rate
    frames = []
    for waveform in files.windows(i, samples):
        clip = torch.zeros(1, samples)
        clip[0, : len(waveform)] = torch.from_numpy(waveform)
        with_sound = max(1, round(len(waveform) / log_mel.hop))
        frames.append(log_mel.frames(clip)[0, :with_sound].half())
    return torch.cat(frames).numpy()


def pack(files, out):
    """Write the log-mel frames of all recordings into one file, and into an index where each lies:
    its name, the file, its first frame, the number of its frames."""
    os.makedirs(out, exist_ok=True)
    if os.path.exists(os.path.join(out, "index.npy")):
        raise ValueError(f"{out}: holds a packed set already")
    work = functools.partial(all_frames, LogMel(files.rate))
    entries = []
    first = 0
    with whole_file(os.path.join(out, "frames.f16")) as file:
        for i, frames, reason in tqdm(in_workers(work, files), disable=None):
            if reason is not None:
                tqdm.write(f"left out: {printable(files.name(i))}: {reason}")
                continue
            entry = f"{files.name(i)}\0frames.f16\0{first}\0{len(frames)}"
            entries.append(os.fsencode(entry))
            file.write(frames.tobytes())
            first += len(frames)
    with whole_file(os.path.join(out, "pack.json")) as file:
        file.write(json.dumps({"sample_rate": files.rate}).encode())
    with whole_file(os.path.join(out, "index.npy")) as file:
        np.save(file, np.array(entries, "S"))
    print(f"{len(entries)} of {len(files)} recordings packed in {printable(out)}")


def main():
    parser = argparse.ArgumentParser(description="Look at a set of audio, or pack it.")
    parser.add_argument("command", choices=["scan", "pack"])
    parser.add_argument("path", help="what --data of train.py takes")
    parser.add_argument("out", nargs="?", default="packed", help="folder that pack writes")
    parser.add_argument("--sample-rate", type=int, default=32000, help="of pack, in Hz")
    args = parser.parse_args()
    # A terminal may not know a name's letters, and a log is read while it is written.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        files = AudioFiles(args.path, args.sample_rate)
        if args.command == "scan":
            scan(files)
        else:
            pack(files, args.out)
    except (OSError, ValueError, RuntimeError) as error:  # the last: a worker that was killed
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
