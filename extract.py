# SPDX-License-Identifier: MIT
"""Everything with a frozen encoder (sec. III.C): embeddings, probes, X-ARES.

    python extract.py CHECKPOINT DATA --out emb.npz          embeddings, one row a recording
    python extract.py CHECKPOINT DATA --probe knn linear     accuracies on train|test/LABEL/*

A recording is cut into windows as long as a training clip (10 s), the last one filled with silence.
A window of 10 s gives 16 rows, one for each 625 ms; a row is made of 8 tokens, one for each band of
frequencies. Only rows that the recording reaches into are used, and in means over a recording its
last row counts by the share of it that holds sound.

Letters in the shape comments: B windows, N tokens of a window, D encoder width, R rows of a window
(of an encoder, or the frames of a log-mel) or of a recording, K numbers in a row.
"""

import copy
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset
from torch.utils.data import get_worker_info
from tqdm import tqdm

from data import UNREADABLE
from data import AudioFiles
from data import LogMel
from data import printable
from data import whole_file
from model import JEPAConfig
from model import VisionTransformer
from train import PRECISIONS
from train import AuthorsLogMel
from train import OneLineParser
from train import choose_amp
from train import choose_device
from train import default_workers
from train import fail
from train import launched_processes
from train import load_networks


class AudioJEPAEncoder(nn.Module):
    """A pretrained encoder for waveforms of any length.

    (waveform [B, T], float in [-1, 1], mono, at `sampling_rate` Hz) -> [B, R, output_dim], float32:
    a row each `hop_size_in_ms`, as many as the waveform reaches into.

    `checkpoint`: of train.py, or the authors' file. `bands`: "concat" puts the 8 tokens of a row
    side by side, "mean" averages them. `which`: "target" or "context". X-ARES builds this class
    without arguments: then AUDIO_JEPA_CHECKPOINT and AUDIO_JEPA_BANDS are read.

    Its parameters are frozen; `encoder.requires_grad_(True)` is all that fine-tuning needs.
    ValueError: no or a damaged checkpoint, other bands, a waveform of another shape.
    """

    def __init__(
        self, checkpoint: str | None = None, bands: str | None = None, which: str = "target"
    ):
        super().__init__()
        checkpoint = checkpoint or os.environ.get("AUDIO_JEPA_CHECKPOINT")
        bands = bands or os.environ.get("AUDIO_JEPA_BANDS", "concat")
        if checkpoint is None:
            raise ValueError("no checkpoint: name one, or set AUDIO_JEPA_CHECKPOINT")
        if bands not in ("concat", "mean"):
            raise ValueError(f"bands are concat or mean, not {bands}")
        stored = load_networks(checkpoint)
        config = JEPAConfig(**stored["config"]["model"])
        self.network = VisionTransformer(config)
        self.network.load_state_dict(stored[f"{which}_encoder"])
        self.network.requires_grad_(False)
        if stored["config"]["log_mel"] is None:
            self.log_mel = AuthorsLogMel()
        else:
            self.log_mel = LogMel(**stored["config"]["log_mel"])
        self.step = stored["step"]
        self.bands = bands
        self.amp = "auto"  # or bf16, fp16, off
        self.sampling_rate = self.log_mel.sample_rate
        self.window = round(self.sampling_rate * self.log_mel.clip_seconds)  # samples
        self.rows_per_window, tokens_of_row = config.grid
        self.hop_size_in_ms = 1000 * self.log_mel.clip_seconds / self.rows_per_window
        self.output_dim = config.dim
        if bands == "concat":
            self.output_dim = config.dim * tokens_of_row

    @property
    def device(self) -> torch.device:
        return self.log_mel.window.device

    def rows(self, waveform: torch.Tensor) -> torch.Tensor:
        """Windows [B, window] -> their rows [B, R, output_dim]."""
        spectrogram = self.log_mel(waveform)
        dtype = self.network.pos_embed.dtype
        precision = PRECISIONS[choose_amp(self.amp, waveform.device.type)]
        # A network that .half() and the like have cast stays as it is.
        mixed = dtype == torch.float32 and precision != torch.float32
        with torch.autocast(waveform.device.type, precision, mixed):
            tokens = self.network(spectrogram.to(dtype))  # [B, N, D], time-major
        tokens = tokens.float().unflatten(1, self.network.config.grid)  # [B, R, 8, D]
        if self.bands == "concat":
            return tokens.flatten(2)
        return tokens.mean(2)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        if waveform.ndim != 2 or waveform.shape[1] == 0 or not waveform.is_floating_point():
            shape = f"{waveform.dtype}, {list(waveform.shape)}"
            raise ValueError(f"a waveform of {shape}: it must be float and [B, T]")
        B, T = waveform.shape
        waveform = waveform.to(self.device, torch.float32)
        windows = F.pad(waveform, (0, -T % self.window)).reshape(-1, self.window)
        rows = [self.rows(part) for part in windows.split(32)]  # 10 minutes must fit into memory
        rows = torch.cat(rows).view(B, -1, self.output_dim)
        return rows[:, : math.ceil(T * self.rows_per_window / self.window)]


def load_encoder(
    path: str | os.PathLike, bands: str = "concat", which: str = "target"
) -> AudioJEPAEncoder:
    """A frozen encoder, on the CPU: see AudioJEPAEncoder."""
    return AudioJEPAEncoder(path, bands, which).eval()


def encoder_of(args, path):
    """A frozen encoder, as the flags of the command line want it."""
    encoder = load_encoder(path, args.bands, args.encoder).to(choose_device())
    encoder.amp = args.amp
    return encoder


# ------------------------------------------------------------------------------------------------
# Embedding a folder


class Windows(IterableDataset):
    """The windows of recordings: (recording, waveform [window], samples of sound in it, error).

    Each loader worker reads recordings of its own.
    """

    def __init__(self, files, window):
        self.files = files
        self.window = window

    def __iter__(self):
        recordings = range(len(self.files))
        worker = get_worker_info()
        if worker is not None:
            recordings = recordings[worker.id :: worker.num_workers]
        for i in recordings:
            try:
                for waveform in self.files.windows(i, self.window):
                    filled = np.pad(waveform, (0, self.window - len(waveform)))
                    yield i, filled, len(waveform), ""
            except UNREADABLE as error:
                yield i, np.zeros(self.window, np.float32), 0, str(error)


@dataclass
class Embedding:
    """What the windows of a recording add up to."""

    samples: int = 0  # that hold sound
    weight: float = 0.0  # of all rows: 1 for each, or the share of it that holds sound
    total: torch.Tensor | float = 0.0  # [K], their weighted sum
    squares: torch.Tensor | float = 0.0  # [K], the weighted sum of their squares
    rows: list[torch.Tensor] = field(default_factory=list)  # [R, K] of each window, if wanted

    def pooled(self, pool: str) -> torch.Tensor:
        """clip: the mean of the rows [1, K]; stats: mean and std [1, 2 K]; time: the rows [R, K]"""
        if pool == "time":
            return torch.cat(self.rows)
        mean = self.total / self.weight
        if pool == "clip":
            return mean.unsqueeze(0)
        variance = self.squares / self.weight - mean**2
        return torch.cat([mean, variance.clamp(min=0).sqrt()]).unsqueeze(0)


@torch.no_grad()
def embed(encoder, rows_of, keep_rows, files, args) -> dict[int, Embedding]:
    """Embed all recordings -> Embedding of each, in order.

    `rows_of` makes rows [B, R, K] of windows [B, window]. ValueError at a recording that cannot be
    used, unless --skip-bad is given.
    """
    files = copy.copy(files)
    files.rate = encoder.sampling_rate  # in which checkpoints may differ
    loader = DataLoader(
        Windows(files, encoder.window),
        batch_size=args.batch_size,
        num_workers=args.workers,
        pin_memory=encoder.device.type == "cuda",
    )
    found = defaultdict(Embedding)
    for recordings, waveform, samples, reasons in tqdm(loader, unit=" batches", disable=None):
        rows = rows_of(waveform.to(encoder.device)).cpu()  # [B, R, K]
        for b, i in enumerate(recordings.tolist()):
            if reasons[b] != "":
                line = printable(f"{files.name(i)}: {reasons[b]}")
                if not args.skip_bad:
                    raise ValueError(f"{line} (--skip-bad leaves such out)")
                tqdm.write(f"left out: {line}", file=sys.stderr)
                found.pop(i, None)  # what its windows before the bad one have given
                continue
            filled = samples[b].item() * rows.shape[1] / encoder.window  # rows of sound: 1.6
            with_sound = rows[b, : math.ceil(filled)]
            # In a mean each counts 1, and the last one its share of sound (0.6): in a short
            # recording it would else be half of the mean, and nearly all silence.
            weight = (filled - torch.arange(len(with_sound))).clamp(max=1).unsqueeze(1)  # [R, 1]
            embedding = found[i]
            embedding.samples += samples[b].item()
            embedding.weight += filled
            embedding.total += (weight * with_sound).sum(0)
            embedding.squares += (weight * with_sound.square()).sum(0)
            if keep_rows:
                embedding.rows.append(with_sound.clone())
    if not found:
        raise ValueError(f"{args.data}: none of {len(files)} recordings can be used")
    return dict(sorted(found.items()))


def save_embeddings(args, encoder, files):
    """--out: all embeddings in one .npz, which is renamed when it is whole."""
    found = embed(encoder, encoder.rows, args.pool == "time", files, args)
    blocks = [embedding.pooled(args.pool) for embedding in found.values()]  # [rows, K] of each
    config = {
        "model": vars(encoder.network.config),
        "log_mel": encoder.log_mel.config,
        "bands": args.bands,
        "pool": args.pool,
        "encoder": args.encoder,
        "amp": choose_amp(args.amp, encoder.device.type),
    }
    with whole_file(args.out) as file:
        np.savez(
            file,
            embeddings=torch.cat(blocks).numpy(),
            offsets=np.cumsum([0] + [len(block) for block in blocks]),
            paths=[files.name(i) for i in found],
            seconds=[embedding.samples / encoder.sampling_rate for embedding in found.values()],
            sample_rate=encoder.sampling_rate,
            hop_ms=encoder.hop_size_in_ms,
            step=encoder.step,
            config=json.dumps(config),
        )
    print(f"{printable(args.out)}: {len(found)} of {len(files)} recordings, {args.pool} embeddings")


# ------------------------------------------------------------------------------------------------
# Probes: what is a frozen embedding worth?


def knn(probe, embeddings, labels, classes, train, test):
    """Accuracy of the vote of the 10 nearest training clips by cosine, each weighing
    exp(similarity / 0.07). embeddings [clips, K]; `train` and `test` are indices.

    "knn": every dimension is standardised on the training split first. "xares-knn": as X-ARES 0.1.3
    computes it, and so Table III: each feature is normalised over the training clips, instead of
    each clip over its features, so that clips of large norm win.
    """
    if probe == "knn":
        std, mean = torch.std_mean(embeddings[train], dim=0, correction=0)
        embeddings = (embeddings - mean) / torch.where(std > 1e-6, std, 1.0)
        candidates = F.normalize(embeddings[train], dim=1)
    else:
        candidates = F.normalize(embeddings[train], dim=0)
    right = 0
    for some in test.split(1024):
        similarity = F.normalize(embeddings[some], dim=1) @ candidates.T  # [some, train]
        nearest = similarity.topk(min(10, len(train)), dim=1)
        weights = (nearest.values / 0.07).softmax(1)  # exp, up to a factor that all 10 share
        votes = torch.zeros(len(some), classes)
        votes.scatter_add_(1, labels[train][nearest.indices], weights)
        right += (votes.argmax(1) == labels[some]).sum().item()
    return right / max(len(test), 1)  # there may be no valid split


class Probe(nn.Module):
    """LayerNorm and one Linear: (rows [B, R, K], padding [B, R]) -> [B, classes].

    Without attention there is one row, the pooled embedding, as in X-ARES. Attentive: one learned
    query gathers what it needs from all rows, in 8 heads of 64 numbers.
    """

    def __init__(self, width, classes, attentive):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = None
        if attentive:
            dim = 512  # and not K: with the 6144 of `base`, attention would have 150 M weights
            self.attention = nn.MultiheadAttention(dim, 8, kdim=width, vdim=width, batch_first=True)
            self.query = nn.Parameter(0.02 * torch.randn(1, dim))
            width = dim
        self.head = nn.Linear(width, classes)

    def forward(self, rows, padding):
        rows = self.norm(rows)
        if self.attention is not None:
            query = self.query.expand(len(rows), 1, -1)
            rows, _ = self.attention(query, rows, rows, padding)
        return self.head(rows[:, 0])


def train_probe(rows, attentive, labels, classes, train, valid, test):
    """Train a Probe on frozen rows, a tensor [R, K] for each clip -> accuracies: valid, test.

    As X-ARES: 10 epochs of Adam, batch 32, the rate on a cosine from 1e-3 to a tenth. What counts
    is the epoch that is best on `valid`, or the last one if there is no `valid`.
    """
    torch.manual_seed(0)
    device = choose_device()
    probe = Probe(rows[0].shape[1], classes, attentive).to(device)
    optimizer = torch.optim.Adam(probe.parameters())

    def logits(batch):
        some = [rows[clip] for clip in batch.tolist()]
        lengths = torch.tensor([len(clip) for clip in some])
        padded = pad_sequence(some, batch_first=True)  # [B, R, K]
        padding = torch.arange(padded.shape[1]) >= lengths.unsqueeze(1)
        return probe(padded.to(device), padding.to(device)).cpu()

    @torch.no_grad()
    def accuracy(split):
        if len(split) == 0:  # there may be no valid split
            return 0.0
        right = 0
        for batch in split.split(32):
            right += (logits(batch).argmax(1) == labels[batch]).sum().item()
        return right / len(split)

    best = -1.0
    for epoch in range(10):
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.55 + 0.45 * math.cos(math.pi * epoch / 10))
        for batch in train[torch.randperm(len(train))].split(32):
            F.cross_entropy(logits(batch), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        on_valid = accuracy(valid)
        if on_valid >= best:  # of equally good epochs the last; without `valid` all are equal
            best = on_valid
            on_test = accuracy(test)
    return best, on_test


def deal(labels, folds):
    """Shuffle the clips of each class and deal them out like cards -> the fold of each, int64."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


SPLIT_OF = {  # by the name of a folder
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def read_task(args, names):
    """Paths SPLIT/LABEL/..., FOLD/LABEL/... or LABEL/... -> the class of each, and a tuple (train,
    valid, test) of indices for each fold that is tested. ValueError for other paths.
    """
    wanted = (
        f"{args.data}: wanted are train/LABEL/* and test/LABEL/* (and valid/LABEL/*), or "
        "fold1/LABEL/*, fold2/LABEL/* and so on, or LABEL/*"
    )
    folders = [name.split("/")[:-1] for name in names]
    tops = [folder[0].lower().removesuffix(".tar") if folder else "" for folder in folders]
    splits = [SPLIT_OF.get(top) for top in tops]
    has_folds = all(top.startswith("fold") for top in tops)
    has_splits = {"train", "test"} <= set(splits)
    if has_splits and None in splits:  # other folders beside train and test
        raise ValueError(wanted)
    if not has_splits and None not in splits:  # train and valid without test, for instance
        raise ValueError(wanted)
    if args.folds and (has_splits or has_folds):
        raise ValueError(f"{wanted}; --folds is for LABEL/* alone")
    if has_splits or has_folds:
        folders = [folder[1:] for folder in folders]
    classes = sorted({folder[0] for folder in folders if folder})
    if [] in folders or len(classes) < 2:
        raise ValueError(f"{wanted}; found {len(classes)} LABEL")
    labels = torch.tensor([classes.index(folder[0]) for folder in folders])

    def indices(chosen):
        return torch.as_tensor(chosen).nonzero().flatten()

    if has_splits:
        splits = np.array(splits)
        return labels, [tuple(indices(splits == name) for name in ("train", "valid", "test"))]
    if has_folds:
        fold = np.unique(tops, return_inverse=True)[1]
        tested = range(fold.max() + 1)
    else:
        fold = deal(labels, args.folds or 5)
        tested = range(args.folds or 1)  # without --folds, the first of five is the test
    answer = [(indices(fold != n), indices([]), indices(fold == n)) for n in tested]
    if any(len(train) == 0 or len(test) == 0 for train, _, test in answer):
        raise ValueError(
            f"{wanted}; found {len(names)} recordings, too few for {len(tested)} folds"
        )
    return labels, answer


@dataclass
class View:
    """Something to probe: what makes rows of numbers out of windows, and a row of the table."""

    name: str
    encoder: AudioJEPAEncoder
    rows_of: Callable[[torch.Tensor], torch.Tensor]  # [B, window] -> [B, R, K]
    pool: str  # "clip" or "stats"


def views(args, encoder):
    """Two baselines that an encoder has to beat, log-mel and this encoder before any training; then
    the encoder of each checkpoint."""
    untrained = copy.deepcopy(encoder)
    torch.manual_seed(0)
    untrained.network = VisionTransformer(encoder.network.config).to(encoder.device)

    def log_mel_rows(waveform):
        return encoder.log_mel(waveform).squeeze(1)  # [B, T, F]

    yield View("log-mel", encoder, log_mel_rows, "stats")
    pooling = args.bands
    if args.pool == "stats":
        pooling += ", mean and std"
    yield View(f"untrained, {pooling}", untrained, untrained.rows, args.pool)
    for path in args.checkpoints:
        trained = encoder_of(args, path)
        name = f"{printable(path)}, {pooling}"
        yield View(name, trained, trained.rows, args.pool)


def run_probes(args, encoder, files):
    """--probe: the accuracies of all views, as a table and as --json."""
    read_task(args, [files.name(i) for i in range(len(files))])  # may refuse: before the work
    table = {}
    for view in views(args, encoder):
        found = embed(view.encoder, view.rows_of, "attentive" in args.probe, files, args)
        labels, splits = read_task(args, [files.name(i) for i in found])
        pooled = torch.cat([embedding.pooled(view.pool) for embedding in found.values()])
        rows = []  # [R, K] of each clip, if a probe wants them
        if "attentive" in args.probe:
            rows = [embedding.pooled("time") for embedding in found.values()]
        table[view.name] = accuracies(args.probe, pooled, rows, labels, splits)

    train, valid, test = splits[0]  # the same for all views, as all have read the same recordings
    about = {
        "data": printable(args.data),
        "encoder": args.encoder,
        "classes": 1 + int(labels.max()),
        "folds": len(splits),
        "train": len(train),
        "valid": len(valid),
        "test": len(test),
        # of giving the commonest class as the answer to everything:
        "chance": round(labels[test].bincount().max().item() / len(test), 3),
    }
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    tested = sum(len(test) for _, _, test in splits)
    widest = max(len(name) for name in table)
    for name, row in table.items():
        cells = [name.ljust(widest)]
        for probe, accuracy in row.items():
            clips = len(valid) if probe.endswith("valid") else tested
            error = math.sqrt(accuracy * (1 - accuracy) / clips)  # binomial standard error
            cells.append(f"{probe} {accuracy:.3f} +- {error:.3f}")
        print("   ".join(cells))
    if args.json:
        with whole_file(args.json) as file:
            file.write(json.dumps(about | {"accuracy": table}).encode())


def accuracies(probes, pooled, rows, labels, splits):
    """Accuracy of each probe on the test split, and on the valid split if there is one, which is
    there to choose by; means over folds. pooled [clips, K], rows [R, K] of each clip."""
    classes = 1 + int(labels.max())
    of_folds = defaultdict(list)
    for probe in probes:
        for split in splits:
            train, valid, test = split
            if probe == "linear":
                one_row = pooled.unsqueeze(1)
                on_valid, on_test = train_probe(one_row, False, labels, classes, *split)
            elif probe == "attentive":
                on_valid, on_test = train_probe(rows, True, labels, classes, *split)
            else:
                on_valid = knn(probe, pooled, labels, classes, train, valid)
                on_test = knn(probe, pooled, labels, classes, train, test)
            of_folds[probe].append(on_test)
            if len(valid) > 0:
                of_folds[f"{probe} valid"].append(on_valid)
    return {name: sum(answers) / len(answers) for name, answers in of_folds.items()}


# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = OneLineParser(description="Embeddings and probes of a frozen encoder.")
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        metavar="checkpoint",
        help="last.pt or step-*.pt of train.py, or the authors' file; --probe compares several",
    )
    add("data", help="as --data of train.py, but not packed; for --probe, folders by label")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", metavar="FILE.npz", help="write embeddings")
    probes = ["knn", "xares-knn", "linear", "attentive"]
    task.add_argument("--probe", nargs="+", choices=probes, help="measure")
    add(
        "--bands",
        choices=["concat", "mean"],
        default="concat",
        help="the tokens of a row: side by side, or their mean",
    )
    add(
        "--pool",
        choices=["clip", "stats", "time"],
        default="clip",
        help="the mean over a recording; mean and std; or a row each 625 ms",
    )
    add("--encoder", choices=["target", "context"], default="target", help="which of the two")
    add("--folds", type=int, help="cross-validate on LABEL/*; without it, a fifth is the test")
    add("--json", metavar="FILE", help="write the accuracies as well")
    add("--skip-bad", action="store_true", help="leave out recordings that cannot be used")
    add("--batch-size", type=int, default=32, help="windows that pass the encoder at once")
    add("--workers", type=int, default=default_workers(), help="that read, for each process")
    add("--amp", choices=["auto", *PRECISIONS], default="auto", help="mixed precision")
    args = parser.parse_args(argv)
    if args.folds is not None and args.folds < 2:
        parser.error(f"--folds {args.folds}: at least 2 are needed")
    if args.out and len(args.checkpoints) > 1:
        parser.error("--out takes one checkpoint")
    if args.probe and args.pool == "time":
        parser.error("--pool time goes with --out: a probe has one row a recording")
    if args.out and (args.json or args.folds):
        parser.error("--json and --folds go with --probe")
    for path in (args.out, args.json):
        if path is None:
            continue
        if path == "" or os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
            parser.error(f"{path}: wanted is a file in a folder that exists")
    if launched_processes().count > 1:
        parser.error("extract.py runs in one process")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        encoder = encoder_of(args, args.checkpoints[0])
        files = AudioFiles(args.data, encoder.sampling_rate)
        if args.probe:
            run_probes(args, encoder, files)
        else:
            save_embeddings(args, encoder, files)
    except (OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()
