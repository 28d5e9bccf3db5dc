# SPDX-License-Identifier: MIT
"""From audio files to log-mel spectrograms (sec. IV.A): find, decode, resample, window, fill up, and the mel front end.

    python data.py scan PATH        what is there: hours, rates, lengths, unreadable and silent files; writes nothing
    python data.py pack PATH OUT    log-mel frames in memory-mapped shards: training then reads no audio at all

PATH, here and in `--data`: a folder tree of wav/flac/ogg/opus/mp3/aiff files, a .txt/.csv/.tsv list of paths, a folder
of uncompressed .tar shards, or a packed folder. A recording is a file or a member of a tar, of any length; a clip is
what training sees, 10 s. `bad` is always a list of (name, reason) of recordings that could not be used.
"""
import argparse, csv, functools, io, json, math, os, random, re, sys, tarfile, zlib
from collections import Counter
from fractions import Fraction

import numpy as np
import soundfile
import torch
import torchaudio
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

AUDIO = (b".wav", b".flac", b".ogg", b".oga", b".opus", b".mp3", b".aiff", b".aif")
CANNOT_USE = (OSError, ValueError, RuntimeError, MemoryError)  # what reading raises; soundfile's is a RuntimeError
FRAMES_PER_SECOND, PATCH_FRAMES = 25.6, 16  # 256 frames in 10 s, at every clip length: a patch is always 625 ms
FLOOR = torch.finfo(torch.float32).eps  # Kaldi's least power: digital silence becomes log(FLOOR) = -15.9


class LogMel(nn.Module):
    """Kaldi's log-mel filter bank, batched, on the device of its input.

    (waveform [B, samples], in [-1, 1]) -> [B, 1, time_bins, mel_bins], (log-mel - mean) / std. One frame every hop =
    sample_rate * clip_seconds / time_bins samples (1250), seen through a window of 2.5 hops (3125): its mean removed,
    pre-emphasis 0.97, Hann, power, HTK mel from 20 Hz to Nyquist, natural log. ValueError if the hop is not whole.
    """

    def __init__(self, sample_rate=32000, clip_seconds=10.0, time_bins=256, mel_bins=128, mean=0.0, std=1.0):
        super().__init__()
        self.config = dict(sample_rate=sample_rate, clip_seconds=clip_seconds, time_bins=time_bins,
                           mel_bins=mel_bins, mean=mean, std=std)
        hop = sample_rate * clip_seconds / time_bins
        if hop < 1 or hop != int(hop):
            raise ValueError(f"{sample_rate} Hz x {clip_seconds} s / {time_bins} frames: the hop {hop} is not whole")
        self.hop, self.window_length, self.mean, self.std = int(hop), int(2.5 * hop), mean, std
        self.fft_length = 2 ** math.ceil(math.log2(self.window_length))
        window = torch.hann_window(self.window_length, periodic=False)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", self.mel_filters(sample_rate, mel_bins), persistent=False)  # [fft / 2, mel]

    def mel_filters(self, sample_rate, mel_bins):
        """Triangles on the mel scale, each from its left neighbour's peak, over its own, to its right neighbour's."""
        def mel(hertz):
            return 1127.0 * (1 + hertz / 700.0).log()

        ends = mel(torch.tensor([20.0, sample_rate / 2], dtype=torch.float64)).tolist()
        peaks = torch.linspace(*ends, mel_bins + 2, dtype=torch.float64)
        left, centre, right = peaks[:-2], peaks[1:-1], peaks[2:]
        bins = torch.arange(self.fft_length // 2, dtype=torch.float64) * sample_rate / self.fft_length
        at = mel(bins).unsqueeze(1)
        return torch.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clamp(min=0).float()

    def frames(self, waveform):
        """Raw log-mel: [B, samples] -> [B, round(samples / hop), mel_bins]."""
        waveform = waveform - waveform.mean(1, keepdim=True)  # changes nothing but the rounding
        samples = waveform.shape[1]
        count = (samples + self.hop // 2) // self.hop
        left = self.window_length // 2 - self.hop // 2  # half a window before the middle of the first hop
        right = (count - 1) * self.hop + self.window_length - left - samples
        x = torch.cat([waveform[:, :left].flip(1), waveform, waveform[:, samples - right :].flip(1)], dim=1)
        # Pre-emphasising a frame less its mean m gives the pre-emphasised signal less 0.03 m, except in the frame's
        # first sample, where Hann is 0: so the signal is filtered once, not 2.5 times, frame by frame.
        mean = nn.functional.avg_pool1d(x.unsqueeze(1), self.window_length, self.hop).transpose(1, 2)  # [B, T, 1]
        x = nn.functional.pad(x[:, 1:] - 0.97 * x[:, :-1], (1, 0)).unfold(1, self.window_length, self.hop)
        spectrum = torch.fft.rfft((x - 0.03 * mean) * self.window, n=self.fft_length)[..., :-1]  # without Nyquist
        power = spectrum.real.square() + spectrum.imag.square()  # [B, T, fft / 2]
        return (power @ self.filters).clamp(min=FLOOR).log()

    def normalise(self, frames):
        """Raw log-mel [B, T, F] -> spectrogram [B, 1, T, F], of mean 0 and std 1 over the training set."""
        return ((frames.float() - self.mean) / self.std).unsqueeze(1)

    def forward(self, waveform):
        return self.normalise(self.frames(waveform))


class FlatList:
    """A read-only list of byte strings in one flat buffer: bytes, or a file to be memory-mapped. Two million Python
    strings would be copied, page by page, into each loader worker that touches their reference counts."""

    def __init__(self, source):
        self.source = source
        flat = np.frombuffer(source, np.uint8) if isinstance(source, bytes) else np.memmap(source, np.uint8, "r")
        count = int(flat[:8].view(np.int64)[0])
        self.ends, self.text = flat[8 : 8 + 8 * count].view(np.int64), flat[8 + 8 * count :]

    @staticmethod
    def pack(strings):
        """The buffer: their number, where each ends, and their text."""
        ends = np.cumsum([len(string) for string in strings], dtype=np.int64)
        return len(ends).to_bytes(8, sys.byteorder) + ends.tobytes() + b"".join(strings)

    def __reduce__(self):  # a mapped file reaches a worker as its name
        return FlatList, (self.source,)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        return self.text[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()


def write_atomically(path, content):
    with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
        file.write(content)
    os.replace(file.name, path)


def printable(name):
    """A path as one line of text, whatever bytes it holds."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in os.fsdecode(name))


def find_recordings(path):
    """All recordings of a folder, list, tar or file, sorted: paths below its folder, or, for a member of a tar, shard,
    offset, size and name, joined by zero bytes. ValueError names what is missing."""
    path = os.fsencode(path)
    if not os.path.exists(path):
        raise ValueError(f"{printable(path)}: does not exist")
    root, name = os.path.split(path)
    found = [name]
    if os.path.isdir(path):
        root, tree = path, os.walk(path, onerror=lambda error: print(f"warning: {error}", file=sys.stderr))
        found = [os.path.relpath(os.path.join(folder, name), path) for folder, _, names in tree for name in names]
    elif name.lower().endswith((b".txt", b".csv", b".tsv")):
        found = read_list(path)
    entries = [name for name in found if name.lower().endswith(AUDIO)]
    for shard in (name for name in found if name.lower().endswith(b".tar")):
        entries += tar_members(root, shard)
    if not entries:
        raise ValueError(f"{printable(path)}: no audio found ({b' '.join(AUDIO).decode()}, or such in a .tar)")
    return sorted(entries, key=lambda entry: entry.split(b"\0", 3)[::3])  # by shard and name


def read_list(path):
    """Paths from a text file, one a line, or from the column `path`, `file` or `filename` (else the first) of a csv or
    tsv; relative ones start at the list's folder."""
    kind = path.lower()[-4:]
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = ([line.rstrip("\r\n")] for line in file)
        rows = rows if kind == b".txt" else csv.reader(file, delimiter="," if kind == b".csv" else "\t")
        rows = [row for row in rows if row and row[0].strip()]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in ("path", "file", "filename") if name in header), None)
    names = [os.fsencode(row[column or 0]) for row in rows[column is not None :]]
    missing = [name for name in names if not os.path.isfile(os.path.join(os.path.dirname(path), name))]
    if missing:
        raise ValueError(f"{printable(path)}: {len(missing)} of its {len(names)} files are missing, first "
                         f"{printable(missing[0])}")
    return names


def tar_members(root, shard):
    """The audio in an uncompressed tar: to be read in place, by offset."""
    try:
        with tarfile.open(os.path.join(root, shard), "r:") as tar:
            for member in tar:
                name = os.fsencode(member.name)
                if member.isfile() and name.lower().endswith(AUDIO):
                    yield b"\0".join([shard, b"%d" % member.offset_data, b"%d" % member.size, name])
    except (tarfile.TarError, OSError) as error:
        print(f"warning: {printable(shard)} cannot be read to its end: {error}", file=sys.stderr)


@functools.lru_cache(maxsize=64)
def resampler(rate, wanted):
    """One kernel per pair of rates. Odd rates go to the nearest ratio of small numbers (off by < 3 in a million): the
    kernel from 44 099 to 32 000 Hz would take 5 GB."""
    ratio = Fraction(wanted, rate).limit_denominator(640)
    return torchaudio.transforms.Resample(ratio.denominator, ratio.numerator)


def resample(waveform, rate, wanted):
    """float32 [samples] at one rate -> at another. torchaudio's kernel, applied as a matrix product: its
    convolution is set up anew for each new length, which in recordings of all lengths took 4 times as long."""
    if rate == wanted or not len(waveform):
        return waveform
    sinc = resampler(rate, wanted)  # its kernel: [phases, 1, taps], one phase for each sample it makes of orig_freq
    padded = nn.functional.pad(torch.from_numpy(waveform.copy()), (sinc.width, sinc.width + sinc.orig_freq))
    made = padded.unfold(0, sinc.kernel.shape[2], sinc.orig_freq) @ sinc.kernel[:, 0].T
    return made.flatten()[: math.ceil(len(waveform) * sinc.new_freq / sinc.orig_freq)].numpy()


def is_cut(sound, file):
    """Whether a file stops short of its own header. Of a wav or aiff only libsndfile's log tells (a length near 2^32 is
    that of a stream); an Ogg ends where its last page does."""
    length = re.search(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", sound.extra_info)
    if sound.format != "OGG":
        return length is not None and int(length[2]) < int(length[1]) < 2**31 - 2**16
    file.seek(max(file.seek(0, 2) - 2**16, 0))
    page = file.read().rpartition(b"OggS")[2]  # behind the mark: 22 bytes, a count of segments, their sizes, and they
    return len(page) < 23 or len(page) < 23 + page[22] + sum(page[23 : 23 + page[22]])


class AudioFiles:
    """Recordings as mono float32 at one sample rate. One that cannot be used raises something of CANNOT_USE."""

    def __init__(self, root, entries, sample_rate):
        self.root, self.entries, self.sample_rate = os.fsencode(root), entries, sample_rate

    def name(self, i):
        shard, *member = self.entries[i].split(b"\0", 3)
        return os.fsdecode(os.path.join(shard, *member[2:]))

    def open(self, i):
        path, *member = self.entries[i].split(b"\0", 3)
        path = os.path.join(self.root, path)
        if not os.path.isfile(path):
            raise ValueError("not a file")  # opening a pipe would wait for ever
        with open(path, "rb") as file:
            if member:
                file.seek(int(member[0]))
                file = io.BytesIO(file.read(int(member[1])))
            sound = soundfile.SoundFile(io.BytesIO(file.getvalue()) if member else path)
            if is_cut(sound, file):
                raise ValueError("truncated")
        if sound.frames == 0 or sound.channels > 64 or not 1000 <= sound.samplerate <= 768000:
            raise ValueError(f"{sound.frames} samples, {sound.channels} channels, {sound.samplerate} Hz")
        return sound

    def read(self, sound, count):
        """The next samples, `count` or what is left -> float32 mono at the file's own rate."""
        count = min(count, sound.frames - sound.tell())
        waveform = sound.read(count, dtype="float32", always_2d=True)
        waveform = waveform[:, 0] if sound.channels == 1 else waveform @ np.full(
            sound.channels, 1 / sound.channels, np.float32)
        if len(waveform) < count and sound.frames < 2**40:  # above: a stream that does not say its length
            raise ValueError("truncated")
        if len(waveform) and not max(waveform.max(), -waveform.min()) < 1e6:
            raise ValueError("holds NaN, Inf or numbers that are no sound")
        return waveform

    def window(self, i, length, rng):
        """`length` samples from a random place in recording i, or all of it if it is shorter -> float32."""
        with self.open(i) as sound:
            rate, frames = sound.samplerate, sound.frames
            count = math.ceil(length * rate / self.sample_rate)
            start = int(rng.random() * (frames - count + 1)) if count < frames < 2**40 else 0
            if start + count > 30 * rate:  # a seek in compressed audio is slow, and was faulty for years: avoid it
                sound.seek(start)
                start = 0
            return resample(self.read(sound, start + count)[start:], rate, self.sample_rate)[:length]

    def windows(self, i, length):
        """Recording i from start to end in windows of `length` samples, the last one shorter."""
        with self.open(i) as sound:
            rate, end = sound.samplerate, 0.0
            while True:
                end += length * rate / self.sample_rate
                waveform = self.read(sound, round(end) - sound.tell())
                if not len(waveform):
                    return
                yield resample(waveform, rate, self.sample_rate)[:length]


class PackedFrames:
    """Recordings as the fp16 log-mel frames of `pack`, read like `AudioFiles` but counted in frames."""

    def __init__(self, folder, entries):
        self.folder, self.entries = os.fsencode(folder), entries

    def name(self, i):
        return os.fsdecode(self.entries[i].split(b"\0", 3)[3])

    def window(self, i, length, rng):
        shard, first, count, _ = self.entries[i].split(b"\0", 3)
        first, count = int(first), int(count)
        start = first + int(rng.random() * max(count - length + 1, 1))
        return map_frames(os.path.join(self.folder, shard))[start : min(start + length, first + count)]


@functools.lru_cache(maxsize=None)
def map_frames(path):
    return np.asarray(np.load(os.fsdecode(path), mmap_mode="r"))


class Clips(Dataset):
    """`clips[i]` is clip i of the epoch chosen with `set_epoch`: a tensor, and a pure function of (seed, epoch, i).

    A DataLoader asks for a batch of (epoch, i) at once and gets (batch, tried, bad): the number of recordings read, and
    those that could not be used. The batch is None if ten in a row could not.
    """

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        clip, _, bad = self.fetch(self.epoch, range(len(self))[i])
        if clip is None:
            raise RuntimeError(f"{len(bad)} recordings in a row cannot be used, the last is {': '.join(bad[-1])}")
        return torch.from_numpy(clip)

    def __getitems__(self, keys):
        clips, tried, bad = zip(*(self.fetch(epoch, i) for epoch, i in keys))
        failed = any(clip is None for clip in clips)
        return None if failed else torch.from_numpy(np.stack(clips)), sum(tried), sum(bad, [])


class AudioClips(Clips):
    """Everything `--data` may be -> waveforms [samples], float32, or, if `packed`, raw log-mel frames [T, F], fp16.

    A longer recording gives a random window. A shorter one is filled up, end to end, with further recordings, lest most
    patches be the same silence; only a rest of less than a patch is silent. A bad one is replaced in the same way.
    ValueError if there is no audio. `index_file`: the list of recordings as a file, instead of another search.
    """

    def __init__(self, path, sample_rate=32000, clip_seconds=10.0, seed=0, index_file=None):
        self.seed, self.packed = seed, os.path.isfile(os.path.join(path, "pack.json"))
        if self.packed:
            with open(os.path.join(path, "pack.json")) as file:
                rate, index = json.load(file)["sample_rate"], os.path.join(path, "index")
            if rate != sample_rate or not os.path.isfile(index):
                raise ValueError(f"{path}: packed at {rate} Hz and not {sample_rate}, or not to the end")
            self.source, self.silence = PackedFrames(path, FlatList(index)), math.log(FLOOR)
            self.length, self.patch = round(clip_seconds * FRAMES_PER_SECOND), PATCH_FRAMES
        else:
            known = index_file is not None and os.path.isfile(index_file)
            entries = FlatList(os.fspath(index_file) if known else FlatList.pack(find_recordings(path)))
            root = path if os.path.isdir(path) else os.path.dirname(path)
            self.source, self.silence = AudioFiles(root, entries, sample_rate), 0.0
            self.length, self.patch = round(clip_seconds * sample_rate), round(sample_rate * 0.625)

    def __len__(self):
        return len(self.source.entries)

    @property
    def fingerprint(self):
        """Tells one set of recordings from another, wherever they lie."""
        return f"{len(self)} recordings, crc {zlib.crc32(self.source.entries.text):08x}"

    def fetch(self, epoch, i):
        rng = random.Random(f"clip {i} of epoch {epoch}, seed {self.seed}")
        parts, missing, bad = [], self.length, []
        for tried in range(1, 101):  # bounded, for a set of nothing but clicks
            try:
                parts.append(self.source.window(i, missing, rng))
                missing -= len(parts[-1])
            except CANNOT_USE as error:
                bad.append((self.source.name(i), str(error) or type(error).__name__))
            if len(bad) == 10 and not parts:
                return None, tried, bad
            if missing < self.patch:
                break
            i = rng.randrange(len(self))
        rest = np.full((missing, *parts[0].shape[1:]), self.silence, parts[0].dtype)
        return np.concatenate([*parts, rest]), tried, bad


class SyntheticClips(Clips):
    """Sound without a download: notes, chirps, noise bursts and rhythms, 3 to 8 in a clip, over a quiet noise floor.

    `num_clips` an epoch, no two epochs alike -> float32 waveforms [samples]. The single sounds are made once, so that a
    clip costs additions and not sines.
    """

    packed, fingerprint = False, "synthetic clips"

    def __init__(self, sample_rate=32000, clip_seconds=10.0, seed=0, num_clips=10000):
        self.seed, self.num_clips, self.length = seed, num_clips, round(sample_rate * clip_seconds)
        rng = np.random.default_rng(seed)
        self.sounds = [synthetic_sound(kind, sample_rate, rng) for kind in range(4) for _ in range(48)]
        self.floor = rng.standard_normal(2 * self.length, dtype=np.float32) * 1e-3

    def __len__(self):
        return self.num_clips

    def fetch(self, epoch, i):
        rng = random.Random(f"clip {i} of epoch {epoch}, seed {self.seed}")
        at = rng.randrange(self.length)
        clip = self.floor[at : at + self.length].copy()
        for _ in range(rng.randint(3, 8)):
            kind = rng.randrange(len(self.sounds))
            sound = self.sounds[kind] * np.float32(10 ** rng.uniform(-1.5, -0.3))
            at, beat = rng.randrange(self.length), rng.randrange(len(sound), 3 * len(sound))
            repeats = rng.randint(4, 16) if kind >= 144 else 1  # hits make rhythms
            for begin in range(at, min(at + repeats * beat, self.length), beat):
                clip[begin : begin + len(sound)] += sound[: self.length - begin]
        return clip, 1, []


def synthetic_sound(kind, sample_rate, rng):
    """A note (kind 0), chirp (1), noise burst (2) or hit (3) of random pitch, length and decay -> float32."""
    seconds = (rng.uniform(0.3, 2), rng.uniform(0.3, 2), rng.uniform(0.2, 1), 0.12)[kind]
    t = np.arange(int(seconds * sample_rate)) / sample_rate
    low, high = np.exp(rng.uniform(np.log(80), np.log(sample_rate / 8), 2))
    if kind == 0:
        wave = sum(np.sin(2 * np.pi * k * low * t) / k for k in (1, 2, 3))
    elif kind == 1:
        wave = np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * seconds)))
    else:
        wave = rng.standard_normal(len(t)) * np.sin(2 * np.pi * low * t)
    return (wave * np.minimum(t / 0.01, 1) * np.exp(-t / seconds * rng.uniform(1, 6))).astype(np.float32)


def attempt(work, files, i):
    try:
        return i, work(files, i), None
    except CANNOT_USE as error:
        return i, None, str(error) or type(error).__name__


def in_workers(work, files, indices):
    """work(files, i) of many recordings, in order, over all cores -> (i, answer, None), or (i, None, why it failed)."""
    return DataLoader(indices, batch_size=None, num_workers=os.cpu_count(),
                      collate_fn=functools.partial(attempt, work, files))  # which runs in the worker


def describe(files, i):
    """A recording decoded to its end -> (seconds, sample rate, channels, peak)."""
    with files.open(i) as sound:
        peak = samples = 0
        while len(waveform := files.read(sound, 2**20)):
            peak, samples = max(peak, abs(waveform).max()), samples + len(waveform)
        return samples / sound.samplerate, sound.samplerate, sound.channels, float(peak)


def scan(path):
    """Print what `path` holds."""
    files, good, bad = AudioClips(path).source, [], []
    for i, row, reason in tqdm(in_workers(describe, files, range(len(files.entries))), unit=" recordings"):
        bad.append(f"    {printable(files.name(i))}: {reason}") if reason else good.append(row)
    seconds, rates, channels, peaks = zip(*good) if good else [()] * 4
    lengths = Counter(next(edge for edge in (0.625, 9.9, 10.1, 60, math.inf) if x < edge) for x in seconds)
    table = [("recordings", len(good) + len(bad)), ("hours", f"{sum(seconds) / 3600:.2f}"), ("silent", peaks.count(0)),
             ("unreadable", len(bad)), *((f"{rate} Hz", n) for rate, n in sorted(Counter(rates).items())),
             *((f"{count} channels", n) for count, n in sorted(Counter(channels).items())),
             *((f"under {edge:g} s", n) for edge, n in sorted(lengths.items()))]
    print("\n".join([f"{label:>18}  {value}" for label, value in table] + bad))


def all_frames(log_mel, files, i):
    """A whole recording -> raw log-mel frames [T, F], fp16, of windows of 10 s that meet without overlap."""
    frames, samples = [], round(10 * files.sample_rate)
    for waveform in files.windows(i, samples):
        clip = torch.nn.functional.pad(torch.from_numpy(waveform.copy()), (0, samples - len(waveform)))
        frames.append(log_mel.frames(clip[None])[0, : max(1, round(len(waveform) / log_mel.hop))].half())
    return torch.cat(frames)


def pack(path, out, sample_rate):
    """Write all recordings as log-mel frames, a thousand to a shard. Run again, it keeps the shards that are there."""
    files = AudioClips(path, sample_rate)
    files, made = files.source, json.dumps(dict(sample_rate=sample_rate, source=files.fingerprint))
    os.makedirs(out, exist_ok=True)
    if os.path.exists(os.path.join(out, "pack.json")):
        with open(os.path.join(out, "pack.json")) as file:
            if file.read() != made:
                raise ValueError(f"{out}: holds other recordings, or another rate; wanted {made}")
    write_atomically(os.path.join(out, "pack.json"), made.encode())
    work, index = functools.partial(all_frames, LogMel(sample_rate)), []
    for begin in tqdm(range(0, len(files.entries), 1000), unit=" shards"):
        name = f"{begin // 1000:06d}.npy"
        if not os.path.exists(os.path.join(out, name + ".index")):
            shard, rows, first = io.BytesIO(), [], 0
            frames = [torch.empty(0, 128, dtype=torch.half)]
            for i, answer, reason in in_workers(work, files, range(begin, min(begin + 1000, len(files.entries)))):
                if reason:
                    tqdm.write(f"left out: {printable(files.name(i))}: {reason}")
                    continue
                rows.append(b"%s\0%d\0%d\0%s" % (name.encode(), first, len(answer), os.fsencode(files.name(i))))
                frames, first = frames + [answer], first + len(answer)
            np.save(shard, torch.cat(frames).numpy())
            write_atomically(os.path.join(out, name), shard.getbuffer())
            write_atomically(os.path.join(out, name + ".index"), FlatList.pack(rows))
        index += FlatList(os.path.join(out, name + ".index"))
    write_atomically(os.path.join(out, "index"), FlatList.pack(index))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("scan", "pack"):
        commands.add_parser(name).add_argument("path")
    commands.choices["pack"].add_argument("out")
    commands.choices["pack"].add_argument("--sample-rate", type=int, default=32000)
    args = parser.parse_args()
    try:
        scan(args.path) if args.command == "scan" else pack(args.path, args.out, args.sample_rate)
    except CANNOT_USE as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
