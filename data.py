# SPDX-License-Identifier: MIT
"""Audio in, log-mel spectrograms out (sec. IV.A). How a batch travels from the disk to the loss:

    clip_order                      which clips a process reads for each step
    clip_loader                     in worker processes
        Batches                     one micro-batch
            Clips.read              one clip: an excerpt, filled up with further recordings
                AudioFiles.excerpt  open, then decode, which mixes to mono and resamples
    train_step, in train.py
        draw_masks                  random_mask and mask_lowest, in masking.py
        LogMel                      waveforms -> frames -> spectrogram [B, 1, T, F], on the GPU
        target_encoder              VisionTransformer: run_blocks, Block, Attention
        JEPA.forward                in model.py
            context_encoder         the same, for the visible patches
            predictor               Predictor, with blocks of its own
            normalise_targets       and l2_loss

A recording is a file, or a member of a tar, of any length. A clip is what training sees: 10 s,
or --clip-seconds.

    python data.py scan PATH        hours, rates, lengths, what is silent or cannot be read
    python data.py pack PATH OUT    log-mel frames in one file, to train without decoding

PATH is a folder, a list of paths (.txt) or tar shards, as for train.py --data.
Letters in the shape comments: B clips, T spectrogram frames, F mel bands.
"""

import argparse
import contextlib
import functools
import io
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
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchaudio.compliance import kaldi
from tqdm import tqdm

FRAMES_PER_SECOND = 25.6  # 256 frames in 10 s
PATCH_SECONDS = 0.625  # a patch, 16 frames
MEL_BINS = 128
FLOOR = torch.finfo(torch.float32).eps  # Kaldi's floor: the log of silence is -15.9
UNREADABLE = (OSError, ValueError, RuntimeError)  # what reading a bad recording may raise
NOTHING = "nothing in it can be decoded"


class LogMel(nn.Module):
    """Kaldi's log-mel filter bank for a whole batch, on the device of its input.

    (waveform [B, samples], in [-1, 1]) -> [B, 1, T, F], (log-mel - mean) / std.
    Packed frames [B, T, F], which are log-mel already, are only normalised.

    There is a frame every `hop` = sample_rate * clip_seconds / time_bins samples (1250, or 39 ms).
    Its window is 2.5 hops long. ValueError if the hop is not a whole number of samples.

    Another front end is a subclass with other `frames`, like AuthorsLogMel in extract.py. To use
    it, replace LogMel in `train` (train.py), AudioJEPAEncoder (extract.py) and `pack`.
    """

    def __init__(
        self,
        sample_rate=32000,
        clip_seconds=10.0,
        time_bins=256,
        mel_bins=MEL_BINS,
        mean=0.0,
        std=1.0,
    ):
        super().__init__()
        hop = sample_rate * clip_seconds / time_bins
        if hop != int(hop):
            raise ValueError(
                f"{sample_rate} Hz: a hop would be {hop} samples; it takes a multiple of 128 Hz"
            )
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
    def config(self):
        """The constructor's arguments, as checkpoints store them."""
        names = ("sample_rate", "clip_seconds", "time_bins", "mel_bins", "mean", "std")
        return {name: getattr(self, name) for name in names}

    def frames(self, waveform):
        """Raw log-mel: [B, samples], at least a window -> [B, round(samples / hop), F]."""
        # Frame t is centred on the middle of hop t. Both ends of the waveform are mirrored.
        half = self.window_length // 2
        before = waveform[:, :half].flip(1)
        after = waveform[:, -half:].flip(1)
        mirrored = torch.cat([before, waveform, after], dim=1)
        first = self.hop // 2  # in `mirrored`, half a window before the middle of hop 0
        x = mirrored[:, first:].unfold(1, self.window_length, self.hop)  # [B, T, window]
        x = x - x.mean(dim=2, keepdim=True)
        # Pre-emphasis. This drops the first sample, where the window is 0 anyway.
        x = x[..., 1:] - 0.97 * x[..., :-1]
        spectrum = torch.fft.rfft(x * self.window[1:], n=self.fft_length)
        power = spectrum.real.square() + spectrum.imag.square()  # [B, T, fft / 2 + 1]
        mel = power[..., :-1] @ self.filters  # [B, T, F]; Kaldi leaves the last bin out
        return mel.clamp(min=FLOOR).log()

    def forward(self, clips):
        # In fp32, because powers overflow fp16 and bf16 cannot tell them apart.
        with torch.autocast(clips.device.type, enabled=False):
            x = clips.float()
            if x.ndim == 2:  # waveforms; packed frames are log-mel already
                at_once = len(x)
                if x.device.type == "cpu":
                    at_once = 1  # which fits in cache
                x = torch.cat([self.frames(chunk) for chunk in x.split(at_once)])
            normalised = (x - self.mean) / self.std
            return normalised.unsqueeze(1)


def measure_mean_std(clips, log_mel, device, workers):
    """Mean and std of the log-mel over the first 256 clips that training will see.

    They are two numbers for the whole set, as in AST and AudioMAE, instead of two for each band.
    `log_mel` must have mean 0 and std 1 so far.
    """
    order = clip_order(len(clips), clips.seed, 16, range(16), shares=[slice(0, 16)])
    batches = clip_loader(clips, order, workers)
    log_mels = [log_mel(batch.clips.to(device)).cpu() for batch in batches]
    std, mean = torch.std_mean(torch.cat(log_mels).double())
    return mean.item(), max(std.item(), 1e-3)  # digital silence has no std


# ------------------------------------------------------------------------------------------------
# Three kinds of sources


class Source:
    """A set of recordings. What each kind of source adds:

    entries     an array with a byte string for each recording: its name, and where to find it
    rate        samples, or packed frames, per second
    excerpt     (i, length, rng) -> a tensor of `length` samples, or packed frames, from a random
                position in recording i, or all of it if it is shorter; may raise UNREADABLE
    """

    silence = 0.0  # fills what stays empty

    def __len__(self):
        return len(self.entries)

    def name(self, i):
        return os.fsdecode(self.entries[i].split(b"\0")[0])

    @property
    def fingerprint(self):
        """Tells one set of recordings from another."""
        return f"{len(self)} recordings, crc {zlib.crc32(self.entries):08x}"


class AudioFiles(Source):
    """Files, or members of tars -> mono float32 samples at one rate."""

    def __init__(self, path, sample_rate):
        self.root, self.entries = find_recordings(path)
        self.rate = sample_rate

    def open(self, i):
        name, *member = self.entries[i].split(b"\0")
        # A path rather than an open file, because libsndfile needs the extension of some MP3s.
        file = os.path.join(self.root, name)
        if member:
            shard, offset, size = member
            with open(os.path.join(self.root, shard), "rb") as tar:
                tar.seek(int(offset))
                file = io.BytesIO(tar.read(int(size)))
        try:
            return Sound(file)
        except soundfile.LibsndfileError as error:
            raise ValueError(error.error_string) from None  # without the path, which is known

    def excerpt(self, i, length, rng):
        with self.open(i) as sound:
            count = math.ceil(length * sound.samplerate / self.rate)
            latest = max(sound.frames - count, 0)  # samples, by the header
            waveform = decode(sound, int(rng.uniform(0, latest + 1)), count, self.rate)
        if len(waveform) == 0:
            # The header promises more than there is, or the file is a stream of unknown length:
            # take its beginning.
            with self.open(i) as sound:
                waveform = decode(sound, 0, count, self.rate)
        return waveform[:length]

    def windows(self, i, length):
        """Recording i from start to end, in pieces of `length` samples, the last one shorter."""
        with self.open(i) as sound:
            count = math.ceil(length * sound.samplerate / self.rate)
            for waveform in pieces(sound, count, self.rate):
                yield waveform[:length]


class PackedFrames(Source):
    """What `pack` has stored -> log-mel frames [T, F], fp16.

    ValueError if it was packed at another sample rate.
    """

    silence = math.log(FLOOR)
    rate = FRAMES_PER_SECOND

    def __init__(self, folder, sample_rate):
        with open(os.path.join(folder, "pack.json")) as file:
            packed_rate = json.load(file)["sample_rate"]
        if packed_rate != sample_rate:
            raise ValueError(f"{folder}: packed at {packed_rate} Hz, not at {sample_rate}")
        self.entries = np.load(os.path.join(folder, "index.npy"))
        self.folder = os.fsencode(folder)

    def excerpt(self, i, length, rng):
        _, file, first, total = self.entries[i].split(b"\0")
        count = min(length, int(total))
        latest = int(total) - count
        start = int(first) + int(rng.uniform(0, latest + 1))
        path = os.path.join(self.folder, file)
        numbers = np.fromfile(path, np.float16, count * MEL_BINS, offset=start * MEL_BINS * 2)
        return torch.from_numpy(numbers.reshape(count, MEL_BINS))


class SyntheticSounds(Source):
    """Sound without a download: each excerpt is a mix of four random tones, each of which is struck
    once a second."""

    fingerprint = "synthetic clips"

    def __init__(self, sample_rate, num_clips):
        self.entries = np.full(num_clips, b"synthetic")
        self.rate = sample_rate

    def excerpt(self, i, length, rng):
        seconds = torch.arange(length) / self.rate
        mix = torch.zeros(length)
        for _ in range(4):
            hertz = 80 * 2 ** rng.uniform(0, 6)
            since_struck = (seconds + rng.random()) % 1
            tone = torch.exp(-4 * since_struck) * torch.sin(2 * math.pi * hertz * seconds)
            mix += rng.uniform(0.03, 0.3) * tone
        return mix


# ------------------------------------------------------------------------------------------------
# Clips: what training sees


class Clips(Dataset):
    """Clips of equal length out of one of the sources above; any DataLoader takes it.

    clips[i] is clip i of epoch `clips.epoch`, a pure function of (seed, epoch, i).
    A longer recording gives a random excerpt. A shorter one is filled up with other recordings, end
    to end: if silence filled it, most targets would be the same silence, and predicting them would
    teach nothing. A remainder shorter than a patch (625 ms) is left silent.
    OSError: ten recordings in a row cannot be used.
    """

    def __init__(self, source, clip_seconds, seed):
        self.source = source
        self.seed = seed
        self.epoch = 0
        self.length = round(clip_seconds * source.rate)
        self.shortest_fill = round(PATCH_SECONDS * source.rate)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.read(self.epoch, i)[0]

    def read(self, epoch, i):
        """Clip i of an epoch -> (clip, how many recordings were opened for it, (name, reason) of
        those that could not be used)."""
        rng = random.Random(f"clip {i} of epoch {epoch}, seed {self.seed}")
        excerpts = []
        bad = []
        failures = 0  # in a row
        missing = self.length
        while not excerpts or missing >= self.shortest_fill:  # a clip may be shorter than that
            name = self.source.name(i)  # IndexError past the end, which ends `for clip in clips`
            try:
                excerpt = self.source.excerpt(i, missing, rng)
                if len(excerpt) == 0:
                    raise ValueError(NOTHING)
                excerpts.append(excerpt)
                missing -= len(excerpt)
                failures = 0
            except UNREADABLE as error:
                bad.append((name, str(error)))
                failures += 1
            if failures == 10:
                last = ": ".join(bad[-1])
                raise OSError(f"ten recordings in a row cannot be used, the last one {last}")
            i = rng.randrange(len(self))
        reads = len(excerpts) + len(bad)
        shape = (missing, *excerpts[0].shape[1:])
        excerpts.append(excerpts[0].new_full(shape, self.source.silence))
        return torch.cat(excerpts), reads, bad


class AudioClips(Clips):
    """Clips of a folder, a list, tar shards or a packed folder.

    -> waveforms [samples], float32; from a packed folder, log-mel frames [T, F], fp16.
    ValueError says what is wrong with the path.
    """

    def __init__(self, path, sample_rate=32000, clip_seconds=10.0, seed=0):
        kind = AudioFiles
        if os.path.isfile(os.path.join(path, "pack.json")):
            kind = PackedFrames
        super().__init__(kind(path, sample_rate), clip_seconds, seed)


class SyntheticClips(Clips):
    """Clips without data -> waveforms [samples], float32, no two epochs alike."""

    def __init__(self, sample_rate=32000, clip_seconds=10.0, seed=0, num_clips=10000):
        super().__init__(SyntheticSounds(sample_rate, num_clips), clip_seconds, seed)


def clip_order(num_clips, seed, batch_size, steps, shares):
    """Yield which clips a process reads, a list of (epoch, clip) for each of its micro-batches.

    All epochs follow each other in one endless sequence, each in an order of its own, a pure
    function of (seed, epoch). Step s takes the batch_size clips from s * batch_size on: no clip is
    left out, and a run can be resumed at any step. `shares` are this process's parts of a step, a
    slice for each micro-batch (see shares_of_process in train.py).
    """

    @functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
    def shuffled(epoch):
        rng = random.Random(f"order of epoch {epoch}, seed {seed}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        return torch.randperm(num_clips, generator=generator)

    for step in steps:
        for share in shares:
            micro_batch = []
            for position in range(share.start, share.stop):
                epoch, index = divmod(step * batch_size + position, num_clips)
                micro_batch.append((epoch, int(shuffled(epoch)[index])))
            yield micro_batch


class Batch(NamedTuple):
    clips: Tensor  # waveforms [B, samples], or packed frames [B, T, F]
    reads: int  # recordings that were opened
    bad: list  # (name, reason) of those that could not be used


class Batches(Dataset):
    """batches[list of (epoch, i)] is a Batch of these clips."""

    def __init__(self, clips):
        self.clips = clips

    def __getitem__(self, micro_batch):
        done = [self.clips.read(epoch, i) for epoch, i in micro_batch]
        clips, reads, bad = zip(*done, strict=True)
        batch = torch.stack(clips)
        if get_worker_info():  # this is a worker
            # The loader would do this too, but in a thread whose errors are lost: where shared
            # memory is too small, the run would wait for ever.
            try:
                batch.share_memory_()
            except RuntimeError as error:
                raise OSError(
                    "no shared memory for a batch: docker run --shm-size=16g gives more, "
                    f"--workers 0 needs none ({error})"
                ) from None
        return Batch(batch, sum(reads), sum(bad, []))


def clip_loader(clips, order, workers):
    """Read the micro-batches of `order` in worker processes -> a Batch of each."""
    return DataLoader(
        Batches(clips),
        sampler=order,
        batch_size=None,  # `order` has made batches already
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )


# ------------------------------------------------------------------------------------------------
# The method ends here. What follows protects the workers from signals, and finds and decodes audio.


def ignore_signals(_):
    """Ctrl-C and Slurm signal all processes of a run. Workers must ignore these signals, because
    the main process needs them to finish its step. They obey a SIGTERM of the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=obey_the_main_process, daemon=True).start()


def obey_the_main_process():
    sender = None
    while sender != os.getppid():
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
    os._exit(0)


AUDIO = tuple(b".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .rf64 .sph .w64".split())
USAGE = (
    "give a folder, a .tar or a .txt (one path a line) of files that libsndfile decodes: .wav, "
    ".flac, .ogg, .mp3 and more, but not .m4a"
)


def find_recordings(path):
    """All recordings of a folder, list, tar or file -> its folder, and a sorted array of entries.

    An entry is a path relative to the folder, or, for a member of a tar, its name, the shard, the
    offset and the size, joined by zero bytes. It is one flat array, because a list of two million
    strings would be copied into every worker. ValueError says what is wrong with the path.
    """
    path = os.fsencode(path)
    if not os.path.exists(path):
        raise ValueError(f"{printable(path)}: does not exist")
    root = os.path.dirname(path)
    names = [os.path.basename(path)]
    is_list = path.lower().endswith(b".txt")
    if os.path.isdir(path):
        root = path
        names = walk(path)
    elif is_list:
        names = read_list(path)
    entries = []
    for name in names:
        if name.lower().endswith(b".tar"):
            entries += tar_members(root, name)
        elif is_list or name.lower().endswith(AUDIO):  # a listed file may have any extension
            entries.append(name)
    if not entries:
        raise ValueError(f"{printable(path)}: no audio found; {USAGE}")
    return root, np.sort(np.array(entries))


def walk(root):
    """Yield all files below a folder, relative to it. Links are followed, but each real folder is
    visited once. Hidden files and folders (.git, ._copy.wav of macOS) are left out."""
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
    """The paths in a list, one a line, absolute or relative to its folder. ValueError: a path names
    no file."""
    with open(path, "rb") as file:
        names = [name for name in file.read().splitlines() if name]
    for name in names:
        if not os.path.isfile(os.path.join(os.path.dirname(path), name)):
            raise ValueError(
                f"{printable(path)}: there is no file {printable(name)} (paths are absolute, or "
                f"relative to the list); {USAGE}"
            )
    return names


def tar_members(root, shard):
    """Yield the audio in an uncompressed tar, to be read in place."""
    try:
        with tarfile.open(os.path.join(root, shard), "r:") as tar:
            for member in tar:
                name = os.fsencode(os.path.normpath(member.name))  # not ./name
                hidden = b"/." in b"/" + name
                if member.isfile() and not hidden and name.lower().endswith(AUDIO):
                    place = (shard, member.offset_data, member.size)
                    yield b"%s/%s\0%s\0%d\0%d" % (shard, name, *place)
    except tarfile.TarError as error:
        warn(f"{printable(shard)} cannot be read to its end: {error}")


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def printable(name):
    """A path on one line, whatever bytes it holds."""
    return repr(os.fsdecode(name))[1:-1]


class Sound(soundfile.SoundFile):
    """A file whose `read` does not seek. soundfile seeks after each read of a seekable file, and in
    an MP3 that leaves 60 ms of silence."""

    def seekable(self):
        return False


RESAMPLERS = {}  # by their ratio of rates; each is built once, because that takes 4 ms


def decode(sound, skip, count, rate):
    """Skip samples of `sound`, then decode `count`, or as many as there are -> mono float32,
    resampled to `rate`.

    A damaged file gives what comes before the damage. ValueError if it holds NaN or Inf.
    """
    # Up to 30 s are skipped by decoding, which is exact in every format.
    if skip > 30 * sound.samplerate:
        try:
            sound.seek(skip, os.SEEK_CUR)
            skip = 0
        except RuntimeError:  # the file ends before, or its format cannot seek
            return torch.empty(0)
    samples = torch.full((skip + count, sound.channels), torch.nan)
    try:
        decoded = len(sound.read(out=samples.numpy()))
    except RuntimeError:  # what was decoded before the damage is in `samples`
        decoded = int(samples[:, 0].isfinite().sum())
    waveform = samples[skip:decoded].mean(dim=1)
    if not waveform.isfinite().all():
        raise ValueError("holds NaN or Inf")
    if len(waveform) == 0:
        return waveform
    # Rates without a small common divisor (44 099 Hz) would take a kernel of gigabytes, so their
    # ratio is rounded, within 0.1 %.
    ratio = Fraction(rate, sound.samplerate).limit_denominator(1000)
    if ratio not in RESAMPLERS:
        RESAMPLERS[ratio] = torchaudio.transforms.Resample(ratio.denominator, ratio.numerator)
    return RESAMPLERS[ratio](waveform)


def pieces(sound, count, rate):
    """Decode all of `sound`, `count` samples at a time, the last time fewer -> pieces, resampled to
    `rate`. ValueError if there is nothing."""
    piece = decode(sound, 0, count, rate)
    if len(piece) == 0:
        raise ValueError(NOTHING)
    while len(piece) > 0:
        yield piece
        piece = decode(sound, 0, count, rate)


@contextlib.contextmanager
def whole_file(path):
    """with whole_file(path) as file: write all of it or nothing, even if the power fails or the
    disk is full. OSError says why; what was there before is kept."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the disk's error behind its own.
        raise OSError(
            f"{path} is not written: {error.__context__ or error}; what was there before is kept"
        ) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ------------------------------------------------------------------------------------------------
# python data.py scan | pack


def each_recording(files, work):
    """Yield (name, work(files, i)) of every recording, in order, from worker processes. Print why a
    recording cannot be used."""
    loader = DataLoader(
        range(len(files)),
        batch_size=None,
        num_workers=usable_cores(),
        collate_fn=functools.partial(attempt, files, work),  # DataLoader calls it in the workers
    )
    for i, (result, reason) in enumerate(tqdm(loader, disable=None)):
        if result is None:
            tqdm.write(printable(f"{files.name(i)}: {reason}"))
        else:
            yield files.name(i), result


def attempt(files, work, i):
    """-> (work(files, i), None), or (None, why it failed)"""
    try:
        return work(files, i), None
    except UNREADABLE as error:
        return None, str(error)


def usable_cores():
    """The cores that this process may use: fewer than the machine's under Slurm."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def measure_recording(files, i):
    """Decode a recording to its end -> what it adds to the counts of `scan`."""
    samples = 0
    silent = True
    with files.open(i) as sound:
        for waveform in pieces(sound, 2**21, sound.samplerate):
            samples += len(waveform)
            silent = silent and not waveform.any()
    seconds = samples / sound.samplerate
    return {
        "hours": seconds / 3600,
        "silent": silent,
        "shorter than 10 s": seconds < 10,
        f"{sound.samplerate} Hz": 1,
        f"{sound.channels} channels": 1,
    }


def scan(files):
    """Print what a set holds."""
    counts = Counter()
    unreadable = len(files)
    for _, measured in each_recording(files, measure_recording):
        counts.update(measured)
        unreadable -= 1
    print(f"{len(files):12}  recordings")
    print(f"{unreadable:12}  unreadable")
    for name, number in counts.items():
        print(f"{number:12.6g}  {name}")


def all_frames(log_mel, files, i):
    """A whole recording -> raw log-mel frames [T, F], fp16, 10 s at a time."""
    samples = 10 * files.rate
    frames = []
    for waveform in files.windows(i, samples):
        clip = F.pad(waveform, (0, samples - len(waveform)))
        with_sound = max(1, round(len(waveform) / log_mel.hop))
        frames.append(log_mel.frames(clip.unsqueeze(0))[0, :with_sound].half())
    return torch.cat(frames).numpy()


def pack(files, out):
    """Write the log-mel frames of all recordings into one file, and an index into another: of each
    recording its name, that file, its first frame, and the number of its frames."""
    work = functools.partial(all_frames, LogMel(files.rate))
    os.makedirs(out)
    entries = []
    total = 0
    with whole_file(os.path.join(out, "frames.f16")) as file:
        for name, frames in each_recording(files, work):
            entries.append(os.fsencode(f"{name}\0frames.f16\0{total}\0{len(frames)}"))
            file.write(frames.tobytes())
            total += len(frames)
    if not entries:
        raise ValueError(f"{out}: none of the recordings can be packed")
    np.save(os.path.join(out, "index.npy"), np.array(entries))
    with open(os.path.join(out, "pack.json"), "w") as file:  # which makes it a packed folder
        json.dump({"sample_rate": files.rate}, file)
    print(f"{len(entries)} of {len(files)} recordings packed in {out}")


def main():
    parser = argparse.ArgumentParser(description="Measure a set of recordings, or pack it.")
    parser.add_argument("command", choices=["scan", "pack"])
    parser.add_argument("path", help="as --data of train.py, but not packed")
    parser.add_argument("out", nargs="?", default="packed", help="new folder that pack makes")
    parser.add_argument("--sample-rate", type=int, default=32000, help="of the pack, in Hz")
    args = parser.parse_args()
    try:
        files = AudioFiles(args.path, args.sample_rate)
        if args.command == "scan":
            scan(files)
        else:
            pack(files, args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
