# SPDX-License-Identifier: MIT
"""Audio in, log-mel spectrograms out (sec. IV.A): find, decode, resample, window, fill up, mel front end.

    python data.py scan PATH        hours, rates, lengths, unreadable and silent files; writes nothing
    python data.py pack PATH OUT    log-mel frames in memory-mapped shards: training reads no more audio

PATH, as in `--data`: a folder tree, a .txt/.csv/.tsv list, or uncompressed .tar shards.
A recording is a file or a member of a tar, of any length; a clip is what training sees, 10 s."""
import argparse, csv, fractions, functools, io, itertools, json, math, os, random, re, sys, tarfile, zlib

import numpy as np, soundfile, torch, torchaudio, torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchaudio.compliance import kaldi
from tqdm import tqdm

AUDIO = (b".wav", b".flac", b".ogg", b".oga", b".opus", b".mp3", b".aiff", b".aif")
CANNOT_USE = (OSError, ValueError, RuntimeError, MemoryError, ArithmeticError, csv.Error)
FRAME_RATE = 25.6  # 256 frames in 10 s, at every clip length: a patch, 16 frames, is 625 ms
FLOOR = torch.finfo(torch.float32).eps  # Kaldi's least power: digital silence becomes log(FLOOR) = -15.9
resampler = functools.lru_cache(64)(torchaudio.transforms.Resample)  # one kernel for each pair of rates
fp16 = functools.partial(torch.from_file, shared=False, dtype=torch.float16)  # mapped, but not held open
map_frames = functools.cache(lambda p: fp16(p, size=os.path.getsize(p) // 2).numpy().reshape(-1, 128))


class LogMel(torch.nn.Module):
    """Kaldi's log-mel filter bank, batched, on the device of its input.
    (waveform [B, samples], in [-1, 1]) -> [B, 1, time_bins, mel_bins], (log-mel - mean) / std. A frame every
    hop of sample_rate * clip_seconds / time_bins samples (1250), through a window of 2.5 hops: mean removed,
    pre-emphasis 0.97, Hann, power, HTK mel from 20 Hz, natural log. ValueError: no whole hop, absurd size."""

    def __init__(self, sample_rate=32000, clip_seconds=10.0, time_bins=256, mel_bins=128, mean=0.0, std=1.0):
        super().__init__()
        self.config = dict(sample_rate=sample_rate, clip_seconds=clip_seconds, time_bins=time_bins,
                           mel_bins=mel_bins, mean=mean, std=std)
        hop = sample_rate * clip_seconds / time_bins
        if not (1 <= hop <= 2**16 and not hop % 1 and 0 < mel_bins * hop < 4e6 and abs(mean) < 99 > std > 0):
            raise ValueError(f"the hop {hop} is not whole, or a number out of range: {self.config}")
        self.hop, self.window_length, self.mean, self.std = int(hop), int(2.5 * hop), mean, std
        self.fft_length = 2 ** math.ceil(math.log2(self.window_length))
        self.register_buffer("window", torch.hann_window(self.window_length, False), persistent=False)
        low, high, no_warp = 20.0, sample_rate / 2, (100.0, -500.0, 1.0)
        filters = kaldi.get_mel_banks(mel_bins, self.fft_length, sample_rate, low, high, *no_warp)[0].T
        self.register_buffer("filters", filters, persistent=False)  # [fft / 2, mel]
        used = [part.any(1).nonzero().flatten().tolist() or [0] for part in filters.split(16, dim=1)]
        self.used = [slice(bins[0], bins[-1] + 1) for bins in used]  # bins that each 16 filters use

    def frames(self, waveform):
        """Raw log-mel: [B, samples], a hop at least -> [B, round(samples / hop), mel_bins]."""
        waveform = waveform - waveform.unfold(1, self.hop, self.hop).mean(2).mean(1, True)  # DC costs digits
        count = (waveform.shape[1] + self.hop // 2) // self.hop
        left = self.window_length // 2 - self.hop // 2  # half a window before the middle of the first hop
        right = (count - 1) * self.hop + self.window_length - left - waveform.shape[1]
        rest = waveform.new_zeros(len(waveform), self.fft_length - self.window_length)  # to an FFT's end
        x = torch.cat([waveform[:, : left + 1].flip(1), waveform, waveform[:, -right:].flip(1), rest], dim=1)
        # A frame less its mean m, pre-emphasised, is the pre-emphasised signal less 0.03 m, but for the first
        # sample, where Hann is 0: so the signal is filtered once, and not frame by frame, 2.5 times.
        mean = x[:, 1:].unfold(1, self.window_length, self.hop)[:, :count].mean(2, keepdim=True)  # [B, T, 1]
        x = torch.sub(x[:, 1:], x[:, :-1], alpha=0.97).unfold(1, self.fft_length, self.hop)
        spectrum = torch.fft.rfft((x - 0.03 * mean).mul_(F.pad(self.window, (0, rest.shape[1]))))[..., :-1]
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # [B, T, fft / 2]
        # Filters are narrow: 16 at a time, without most of their zeros, it all takes a fifth less on a CPU.
        mel = [power[..., bins] @ part[bins] for bins, part in zip(self.used, self.filters.split(16, dim=1))]
        return torch.cat(mel, 2).clamp_(min=FLOOR).log_()

    def normalise(self, frames):
        """Raw log-mel [B, T, F] -> spectrogram [B, 1, T, F], of mean 0 and std 1 over the training set."""
        return ((frames.float() - self.mean) / self.std).unsqueeze(1)

    def forward(self, waveform):
        size = 1 if waveform.device.type == "cpu" else len(waveform)  # one clip fits its caches
        return self.normalise(torch.cat([self.frames(part) for part in waveform.split(size)]))


def write_atomically(path, content):
    with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
        np.save(file, content) if isinstance(content, np.ndarray) else file.write(content)
        os.fsync(file.flush() or file.fileno())
    os.replace(file.name, path)


def printable(name):  # on one line, whatever bytes it holds
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in os.fsdecode(name))


def find_recordings(path):
    """All recordings of a folder, list, tar or file -> sorted byte strings: paths relative to the folder; for
    a member of a tar, name, shard, offset and size, joined by zero bytes. ValueError says what is missing."""
    path = os.fsencode(path)
    if not os.path.exists(path):
        raise ValueError(f"{printable(path)}: does not exist")
    root, found = os.path.dirname(path), [os.path.basename(path)]
    if os.path.isdir(path):
        root = os.path.join(path, b"")
        tree = os.walk(path, onerror=lambda error: print(f"warning: {error}", file=sys.stderr))
        found = [os.path.join(folder, name)[len(root) :] for folder, _, names in tree for name in names]
    elif path.lower().endswith((b".txt", b".csv", b".tsv")):
        found = read_list(path)
    entries = [name for name in found if name.lower().endswith(AUDIO)]
    for shard in (name for name in found if name.lower().endswith(b".tar")):
        entries += tar_members(root, shard)
    if not entries:
        raise ValueError(f"{printable(path)}: no audio found (nor a .tar of {b' '.join(AUDIO).decode()})")
    return np.sort(np.array(entries))  # no list: a worker copies the pages of two million reference counts


def read_list(path):
    """Paths, one a line; of a .csv or .tsv its first column, less a header that does not end like audio."""
    separator = {b".csv": ",", b".tsv": "\t"}.get(path.lower()[-4:])
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader(file, delimiter=separator) if separator else ([row.rstrip("\r\n")] for row in file)
        names = [os.fsencode(row[0]) for row in rows if row and row[0].strip()]
    names = names[bool(separator and names and not names[0].lower().endswith((*AUDIO, b".tar"))) :]
    missing = [name for name in names if not os.path.isfile(os.path.join(os.path.dirname(path), name))]
    if missing:
        raise ValueError(f"{printable(path)}: lists {len(missing)} missing files, as {printable(missing[0])}")
    return names


def tar_members(root, shard):
    """The audio in an uncompressed tar: to be read in place, by offset."""
    try:
        with tarfile.open(os.path.join(root, shard), "r:") as tar:
            for member in itertools.takewhile(lambda member: member.size >= 0, tar):  # else it never ends
                name = os.fsencode(member.name)
                if member.isfile() and name.lower().endswith(AUDIO):
                    yield b"%s/%s\0%s\0%d\0%d" % (shard, name, shard, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        print(f"warning: {printable(shard)} cannot be read to its end: {error}", file=sys.stderr)


def resample(waveform, rate, wanted):
    """float32 [samples] at one rate -> at another, with torchaudio's kernel. Its convolution is set up anew
    for each new length; the same as a matrix product made recordings of all lengths 4 times as fast."""
    if rate == wanted or not len(waveform):
        return waveform
    ratio = fractions.Fraction(wanted, rate).limit_denominator(1000)  # < 0.1 % off; else 5 GB from 44 099 Hz
    sinc = resampler(ratio.denominator, ratio.numerator)  # its kernel: [numerator, 1, taps]
    padded = F.pad(torch.from_numpy(waveform.copy()), (sinc.width, sinc.width + sinc.orig_freq))
    made = padded.unfold(0, sinc.kernel.shape[2], sinc.orig_freq) @ sinc.kernel[:, 0].T
    return made.flatten()[: math.ceil(len(waveform) * sinc.new_freq / sinc.orig_freq)].numpy()


def is_cut(sound, file):
    """Whether a file stops short of its header. Of a wav or aiff only libsndfile's log tells (a length near
    2^32 is that of a stream); an Ogg ends where its last page does."""
    length = re.search(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", sound.extra_info)
    if sound.format != "OGG":
        return length is not None and int(length[2]) < int(length[1]) < 2**31 - 2**16
    file.seek(max(file.seek(0, 2) - 2**16, 0))
    page = file.read().rpartition(b"OggS")[2]  # 22 bytes, a count of segments, their sizes, they themselves
    return len(page) < 23 or len(page) < 23 + page[22] + sum(page[23 : 23 + page[22]])


class AudioFiles:
    """Recordings as mono float32 at one sample rate; what cannot be used raises one of CANNOT_USE."""

    def __init__(self, root, entries, sample_rate):
        self.root, self.entries, self.sample_rate = os.fsencode(root), entries, sample_rate

    def open(self, i):
        name, *part = self.entries[i].split(b"\0")
        path = os.path.join(self.root, part[0] if part else name)
        if not os.path.isfile(path):
            raise ValueError("not a file")  # opening a pipe would wait for ever
        with open(path, "rb") as file:
            if part:
                file.seek(int(part[1]))
                file = io.BytesIO(file.read(int(part[2])))
            sound = soundfile.SoundFile(io.BytesIO(file.getvalue()) if part else path)
            if is_cut(sound, file):
                raise ValueError("truncated")
        if sound.frames == 0 or sound.channels > 64 or not 1000 <= sound.samplerate <= 768000:
            raise ValueError(f"{sound.frames} samples, {sound.channels} channels, {sound.samplerate} Hz")
        return sound

    def read(self, sound, count):
        """The next samples, `count` or what is left -> float32 mono at the file's own rate."""
        count = min(count, sound.frames - sound.tell())
        waveform = sound.read(count, dtype="float32")
        if sound.channels > 1:
            waveform = waveform @ np.full(sound.channels, 1 / sound.channels, np.float32)
        spare = sound.samplerate // 5 * (sound.format == "OGG")  # sound files can end so much too early
        if (len(waveform) < count - spare or not sound.tell()) and sound.frames < 2**40:  # above: a stream
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
            if start + count > 30 * rate:  # else no seek: slow in compressed audio, and long faulty there
                sound.seek(start)
                start = 0
            return resample(self.read(sound, start + count)[start:], rate, self.sample_rate)[:length]

    def windows(self, i, length):
        """Recording i from start to end in windows of `length` samples, the last one shorter."""
        with self.open(i) as sound:
            ends = (round(k * length * sound.samplerate / self.sample_rate) for k in itertools.count(1))
            while len(waveform := self.read(sound, next(ends) - sound.tell())):
                yield resample(waveform, sound.samplerate, self.sample_rate)[:length]


class PackedFrames(AudioFiles):
    """Recordings as the fp16 log-mel frames of `pack`, counted in frames."""

    def window(self, i, length, rng):
        _, shard, first, count = self.entries[i].split(b"\0")
        first, count = int(first), int(count)
        start = first + int(rng.random() * max(count - length + 1, 1))
        frames = map_frames(os.fsdecode(os.path.join(self.root, shard)))
        return frames[start : min(start + length, first + count)]


class AudioClips(Dataset):
    """Everything `--data` may be -> waveforms [samples], float32, or, `packed`, log-mel frames [T, F], fp16.
    `clips[i]` is clip i of the epoch chosen with `set_epoch`, a pure function of (seed, epoch, i). A longer
    recording gives a random window. A shorter one is filled up, end to end, with others, lest most patches be
    the same silence; only less than a patch of rest is silent. One that cannot be used is replaced likewise.
    Any DataLoader takes it. That of train.py asks for a batch by its (epoch, i) and gets (batch, tried, bad):
    the number of recordings read, and (name, reason) of those that could not be used; the batch is None if
    ten in a row could not. ValueError: no audio. `index_file`: a .npy of what `find_recordings` gave."""

    def __init__(self, path, sample_rate=32000, clip_seconds=10.0, seed=0, index_file=None):
        self.seed, self.epoch, self.packed = seed, 0, os.path.isfile(os.path.join(path, "pack.json"))
        if self.packed:
            with open(os.path.join(path, "pack.json")) as file:
                if (rate := json.load(file)["sample_rate"]) != sample_rate:
                    raise ValueError(f"{path}: packed at {rate} Hz, not at {sample_rate}")
            self.source = PackedFrames(path, np.load(os.path.join(path, "index.npy"), mmap_mode="r"), rate)
            self.length, self.patch, self.silence = round(clip_seconds * FRAME_RATE), 16, math.log(FLOOR)
        else:
            root = path if os.path.isdir(path) else os.path.dirname(path)
            entries = find_recordings(path) if index_file is None else np.load(index_file, mmap_mode="r")
            self.source, self.silence = AudioFiles(root, entries, sample_rate), 0.0
            self.length, self.patch = round(clip_seconds * sample_rate), round(sample_rate * 0.625)
        if (self.source.entries.dtype.kind, self.source.entries.ndim) != ("S", 1) or not len(self):
            raise ValueError(f"{path}: nothing in it")
        self.fingerprint = f"{len(self)} recordings, crc {zlib.crc32(self.source.entries):08x}"

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.source.entries)

    def name(self, i):
        return os.fsdecode(self.source.entries[i].split(b"\0")[0])

    def __getitem__(self, i):
        parts, _, bad = self.fetch(self.epoch, range(len(self))[i])
        if parts is None:
            raise RuntimeError(f"{len(bad)} recordings in a row cannot be used, at last {': '.join(bad[-1])}")
        ours = len(parts[0]) == self.length and not self.packed  # what is packed is part of a mapped file
        return torch.from_numpy(parts[0] if ours else np.concatenate(parts))

    def __getitems__(self, keys):
        if not isinstance(keys[0], tuple):  # a DataLoader that knows nothing of epochs
            return [self[i] for i in keys]
        parts, tried, bad = zip(*(self.fetch(epoch, i) for epoch, i in keys))
        batch = None if None in parts else torch.from_numpy(np.concatenate(sum(parts, [])))  # copied once
        return None if batch is None else batch.unflatten(0, (-1, self.length)), sum(tried), sum(bad, [])

    def fetch(self, epoch, i):
        rng = random.Random(f"clip {i} of epoch {epoch}, seed {self.seed}")
        parts, missing, bad = [], self.length, []
        for tried in range(1, 101):  # bounded, for a set of nothing but clicks
            try:
                parts.append(self.source.window(i, missing, rng))
                missing -= len(parts[-1])
            except CANNOT_USE as error:
                bad.append((self.name(i), str(error) or type(error).__name__))
            if len(bad) == 10 and not parts:
                return None, tried, bad
            if missing < self.patch:
                break
            i = rng.randrange(len(self))
        parts.append(np.full((missing, *parts[0].shape[1:]), self.silence, parts[0].dtype))
        return parts, tried, bad


class SyntheticClips(AudioClips):
    """Sound without a download, no two epochs alike: notes, chirps, noise bursts, rhythms, 3 to 8 each."""

    def __init__(self, sample_rate=32000, clip_seconds=10.0, seed=0, num_clips=10000):
        self.seed, self.epoch, self.packed, self.fingerprint = seed, 0, False, "synthetic clips"
        self.source, self.entries, self.silence = self, range(num_clips), 0.0
        self.length = self.patch = round(sample_rate * clip_seconds)
        rng, kinds = np.random.default_rng(seed), np.repeat(["note", "chirp", "burst", "hit"], 48)
        self.sounds = [self.sound(kind, sample_rate, rng) for kind in kinds]  # once: clips only add
        self.floor = rng.standard_normal(2 * self.length, dtype=np.float32) * 1e-3

    def sound(self, kind, sample_rate, rng):
        seconds = 0.12 if kind == "hit" else rng.uniform(0.3, 2)
        t = np.arange(int(seconds * sample_rate)) / sample_rate
        low, high = np.exp(rng.uniform(np.log(80), np.log(sample_rate / 8), 2))
        phase = 2 * np.pi * (low * t + (kind == "chirp") * (high - low) * t**2 / (2 * seconds))
        wave = sum(np.sin(k * phase) / k for k in (1, 2, 3)) if kind in ("note", "chirp") else (
            rng.standard_normal(len(t)) * np.sin(phase))
        return (wave * np.minimum(t / 0.01, 1) * np.exp(-t / seconds * rng.uniform(1, 6))).astype(np.float32)

    def window(self, i, length, rng):
        at = rng.randrange(length)
        clip = self.floor[at : at + length].copy()
        for _ in range(rng.randint(3, 8)):
            kind = rng.randrange(len(self.sounds))
            sound = self.sounds[kind] * np.float32(10 ** rng.uniform(-1.5, -0.3))
            at, beat = rng.randrange(length), rng.randrange(len(sound), 3 * len(sound))
            repeats = rng.randint(4, 16) if kind >= 144 else 1  # hits make rhythms
            for begin in range(at, min(at + repeats * beat, length), beat):
                clip[begin : begin + len(sound)] += sound[: length - begin]
        return clip


def attempt(work, files, i):
    try:
        return i, work(files, i), None
    except CANNOT_USE as error:
        return i, None, str(error) or type(error).__name__


def in_workers(work, files, indices):
    """work(files, i) of many recordings, by all cores, in order -> (i, answer, None) or (i, None, reason)."""
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
    clips, good, bad = AudioClips(path), [], []
    for i, row, reason in tqdm(in_workers(describe, clips.source, range(len(clips))), unit=" recordings"):
        bad.append(f"    {printable(clips.name(i))}: {reason}") if reason else good.append(row)
    seconds, rates, channels, peaks = zip(*good) if good else [()] * 4
    lengths = [next(edge for edge in (0.625, 9.9, 10.1, 60, math.inf) if x < edge) for x in seconds]
    table = list(zip(("recordings", "hours", "silent", "unreadable"),
                     (len(clips), f"{sum(seconds) / 3600:.2f}", peaks.count(0), len(bad))))
    for values, label in ((rates, "{} Hz"), (channels, "{} channels"), (lengths, "under {:g} s")):
        table += [(label.format(value), n) for value, n in zip(*np.unique(values, return_counts=True))]
    print("\n".join([f"{label:>18}  {value}" for label, value in table] + bad))


def all_frames(log_mel, files, i):
    """A whole recording -> raw log-mel frames [T, F], fp16, of windows of 10 s that meet without overlap."""
    frames, samples = [], 10 * files.sample_rate
    for waveform in files.windows(i, samples):
        clip = F.pad(torch.from_numpy(waveform.copy())[None], (0, samples - len(waveform)))
        frames.append(log_mel.frames(clip)[0, : max(1, round(len(waveform) / log_mel.hop))].half())
    return torch.cat(frames).numpy()  # by value: a tensor would travel as an open file


def pack(path, out, sample_rate):
    """Write all recordings as log-mel frames, a thousand to a shard. Run again, it keeps what is there."""
    clips, index = AudioClips(path, sample_rate), []
    prefix = f"{zlib.crc32(f'{clips.fingerprint}, {sample_rate} Hz'.encode()):08x}"  # other sets do not meet
    work = functools.partial(all_frames, LogMel(sample_rate))
    os.makedirs(out, exist_ok=True)
    for begin in tqdm(range(0, len(clips), 1000), unit=" shards"):
        name = f"{prefix}-{begin // 1000:06d}.f16"
        if not os.path.exists(known := os.path.join(out, f"index-{name}.npy")):  # is written last
            rows = []
            with open(os.path.join(out, name), "wb") as file:
                for i, mel, reason in in_workers(work, clips.source, range(len(clips))[begin : begin + 1000]):
                    if reason:
                        tqdm.write(f"left out: {printable(clips.name(i))}: {reason}")
                    else:
                        rows.append(os.fsencode(f"{clips.name(i)}\0{name}\0{file.tell() // 256}\0{len(mel)}"))
                        file.write(mel)  # 256 bytes a frame
                os.fsync(file.flush() or file.fileno())
            write_atomically(known, np.array(rows, "S"))
        index += np.load(known).tolist()
    write_atomically(os.path.join(out, "index.npy"), np.array(index))
    write_atomically(os.path.join(out, "pack.json"), json.dumps(dict(sample_rate=sample_rate)).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"data.py: error: {message}\n")  # one line
    parser.add_argument("command", choices=("scan", "pack"))
    parser.add_argument("path", help="what --data takes")
    parser.add_argument("out", nargs="?", default="packed", help="of pack: folder to write (default: packed)")
    parser.add_argument("--sample-rate", type=int, default=32000, help="of pack (default: 32000)")
    args = parser.parse_args()
    try:
        if os.path.isfile(os.path.join(args.path, "pack.json")):
            raise ValueError(f"{args.path}: is packed already")
        scan(args.path) if args.command == "scan" else pack(args.path, args.out, args.sample_rate)
    except CANNOT_USE as error:
        parser.error(error)
