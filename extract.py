# SPDX-License-Identifier: MIT
"""Everything with a frozen encoder (sec. III.C): embeddings, probes, X-ARES, the authors' released weights.

    python extract.py CHECKPOINT DATA --out emb.npz            embeddings, one row a recording
    python extract.py CHECKPOINT DATA --probe knn linear       accuracies on train/LABEL/* and test/LABEL/*

A recording is cut into windows as long as a training clip (10 s), the last one filled with silence. A window
gives 16 columns of 625 ms, a column holds 8 tokens, one a frequency band. Only columns that sound reaches
into are used. B clips or windows, R rows of a window (columns, log-mel frames), K numbers in a row, L tokens.
"""

import argparse, collections, copy, datetime, itertools, json, math, os, shutil, signal, sys, tempfile

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # idle threads leave the workers their core; before torch
import numpy as np
import torch, torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from data import CANNOT_USE, AudioClips, LogMel, printable, write_atomically
from model import (
    CORES,
    RANK,
    WORLD,
    JEPAConfig,
    VisionTransformer,
    choose_amp,
    choose_device,
    frozen_encoder,
    keep_freed_memory,
    load_checkpoint,
)

OUR_NAMES = {"_orig_mod.": "", "patch_embed.proj": "patch_embed", "Wqkv": "qkv", "out_proj": "proj"}
INERT = dict(__init__=lambda self, *_: None, __setstate__=lambda self, _: None)


class AuthorsLogMel(LogMel):
    """The front end of the authors' weights: peak-normalised waveform, hop 1243, window 3108, the 255 frames
    that lie inside the clip and zeros for the 256th, the log-mel as it is."""

    def __init__(self):
        super().__init__()
        self.hop, self.window_length = 1243, 3108
        self.window = torch.hann_window(self.window_length, periodic=False)
        self.config |= dict(hop=self.hop, window_length=self.window_length, peak_normalised=True)

    def forward(self, waveform):
        waveform = waveform / waveform.abs().amax(1, keepdim=True).clamp(min=1e-6)
        frames = self.frames(F.pad(waveform, (310, 0)))[
            :, 1:256
        ]  # frame 1 then starts where the clip does
        return self.normalise(F.pad(frames, (0, 0, 0, 1)))


def load_authors(path):
    """The authors' Lightning file as a checkpoint of ours, its log_mel None; raises anything if it is none.
    Other objects in it than tensors and plain types become inert ones, or are its end: none is executed."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(type("Inert", (), INERT), name) for name in names]):
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    networks = collections.defaultdict(dict)
    for name, tensor in theirs["state_dict"].items():
        for old, new in OUR_NAMES.items():
            name = name.replace(old, new)
        network, name = name.split(".", 1)
        tensor = (
            tensor.flatten(1) if name == "patch_embed.weight" else tensor
        )  # of their convolution
        networks[network][name] = tensor.squeeze(0) if name == "pos_embed" else tensor
    target = networks["target_encoder"]
    dim, hidden = len(target["patch_embed.weight"]), len(target["blocks.0.mlp.fc1.weight"])
    depth = len({name.split(".")[1] for name in target if name.startswith("blocks.")})
    config = vars(JEPAConfig(dim=dim, depth=depth, heads=dim // 64, mlp_ratio=hidden / dim))
    return dict(
        config=dict(model=config, log_mel=None),
        step=theirs.get("global_step", 0),
        target_encoder=target,
        context_encoder=networks["encoder"],
    )


def read_encoder(path, which):
    """Checkpoint, "target" or "context" -> (VisionTransformer, LogMel, step). ValueError if it is refused."""
    try:
        checkpoint = load_checkpoint(path)
    except ValueError as refusal:
        try:
            checkpoint = load_authors(path)
        except Exception:  # whatever an untrusted file makes the reader raise
            raise refusal from None
    try:
        config, front_end = (
            JEPAConfig(**checkpoint["config"]["model"]),
            checkpoint["config"]["log_mel"],
        )
        log_mel = AuthorsLogMel() if front_end is None else LogMel(**front_end)
        bins = [log_mel.config[name] - getattr(config, name) for name in ("time_bins", "mel_bins")]
        rate = log_mel.config["sample_rate"]
        if any(bins) or type(rate) is not int or not 1000 <= rate <= 768000:
            raise ValueError(f"a front end of {front_end}")
        return (
            frozen_encoder(config, checkpoint[f"{which}_encoder"]),
            log_mel,
            int(checkpoint["step"]),
        )
    except Exception as error:  # whatever an untrusted file makes us raise
        raise ValueError(f"{path}: refused, {' '.join(repr(error).split()):.200}") from None


class AudioJEPAEncoder(torch.nn.Module):
    """The frozen encoder: (waveform [B, T], mono, `sampling_rate` Hz, any T) -> [B, T', output_dim], float32,
    a row each `hop_size_in_ms`, as many as the waveform reaches into: T' = ceil(T / samples of a hop).

    `bands`: "concat", the 8 frequency bands side by side, or "mean". `which`: "target" or "context". X-ARES
    gives no argument: AUDIO_JEPA_CHECKPOINT and AUDIO_JEPA_BANDS do. ValueError: a checkpoint that is
    refused, other bands, a waveform of another shape."""

    def __init__(self, checkpoint=None, bands=None, which="target"):
        super().__init__()
        checkpoint = checkpoint or os.environ.get("AUDIO_JEPA_CHECKPOINT")
        self.bands = bands or os.environ.get("AUDIO_JEPA_BANDS", "concat")
        if checkpoint is None or self.bands not in ("concat", "mean"):
            raise ValueError(
                f"AUDIO_JEPA_CHECKPOINT: {checkpoint}; bands: {self.bands} (concat or mean)"
            )
        self.network, self.log_mel, self.step = read_encoder(checkpoint, which)
        self.grid, self.amp, front_end = self.network.config.grid, "auto", self.log_mel.config
        self.sampling_rate = front_end["sample_rate"]
        self.window = round(self.sampling_rate * front_end["clip_seconds"])  # samples
        self.hop_size_in_ms = 1000 * front_end["clip_seconds"] / self.grid[0]
        self.output_dim = self.network.config.dim * (self.grid[1] if self.bands == "concat" else 1)

    @torch.no_grad()
    def columns(self, spectrogram):
        """[B, 1, time_bins, mel_bins] -> [B, R, output_dim], float32."""
        amp, device = choose_amp(self.amp, spectrogram.device), spectrogram.device.type
        with torch.autocast(device, amp, enabled=amp != torch.float32):
            tokens = self.network(spectrogram).float()  # [B, N, D], time-major
        tokens = tokens.unflatten(1, self.grid)  # [B, 16, 8, D]
        return tokens.flatten(2) if self.bands == "concat" else tokens.mean(2)

    def forward(self, waveform):
        if waveform.ndim != 2 or not waveform.shape[1] or not waveform.is_floating_point():
            raise ValueError(
                f"a waveform of {waveform.dtype}, {list(waveform.shape)}: not float [B, T]"
            )
        (B, T), waveform = waveform.shape, waveform.to(self.log_mel.window)
        windows = F.pad(waveform, (0, -T % self.window)).reshape(-1, self.window)
        rows = torch.cat([self.columns(self.log_mel(part)) for part in windows.split(32)])
        return rows.view(B, -1, self.output_dim)[:, : -(-T * self.grid[0] // self.window)]


def load_encoder(path, bands="concat", which="target"):
    """A frozen encoder, on the CPU, from a checkpoint of train.py or the authors': see AudioJEPAEncoder."""
    return AudioJEPAEncoder(path, bands, which).eval()


class Windows(IterableDataset):
    """The windows of recordings, each loader worker with recordings of its own: (recording, samples of sound,
    waveform [window], what ends the recording here: "" nothing, "end", or why it cannot be used)."""

    def __init__(self, files, recordings, window):
        self.files, self.recordings, self.window = files, recordings, window

    def __iter__(self):
        worker, silence = get_worker_info(), np.zeros(self.window, np.float32)
        for i in self.recordings[worker.id :: worker.num_workers] if worker else self.recordings:
            try:
                windows = itertools.chain(self.files.windows(i, self.window), [None])
                for part, later in itertools.pairwise(windows):
                    yield (
                        i,
                        len(part),
                        np.append(part, silence[len(part) :]),
                        "end" if later is None else "",
                    )
            except CANNOT_USE as error:
                yield i, 0, silence, str(error) or type(error).__name__


def embed(args, clips, encoder, views_of, num_views, pool, folder):
    """All recordings, shared between the processes, through `views_of`: spectrogram [B, 1, T, F] -> views of
    it, rows [B, R, K] each. A file a view takes a recording's rows that hold sound, or their mean for `pool`
    "clip". -> {recording: (seconds, [np.memmap's arguments for its rows in each view])}, in order, in the
    first process; the others end here. ValueError at one that cannot be used, but with --skip-bad."""
    mine, device = range(RANK, len(clips), WORLD), encoder.log_mel.window.device
    batches = DataLoader(
        Windows(clips.source, mine, encoder.window),
        args.batch_size,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    found, pending = {}, collections.defaultdict(list)
    os.makedirs(folder, exist_ok=True)
    with tqdm(total=len(mine), unit=" recordings", disable=RANK > 0 or None) as bar:
        files = [open(f"{folder}/{view}-{RANK}", "wb") for view in range(num_views)]
        for recordings, sounds, waveform, ends in batches:
            views = [rows.cpu().numpy() for rows in views_of(encoder.log_mel(waveform.to(device)))]
            for b, (i, sound, end) in enumerate(zip(recordings.tolist(), sounds.tolist(), ends)):
                held = [-(-sound * rows.shape[1] // encoder.window) for rows in views]  # rounded up
                kept = [rows[b, :count] for rows, count in zip(views, held)]
                pending[i].append(
                    [x.sum(0, keepdims=True) if pool == "clip" else x.copy() for x in kept]
                )
                if not end:
                    continue
                bar.update()
                parts = list(zip(*pending.pop(i)))  # of each view, what its windows gave
                if end != "end":
                    line = printable(f"{clips.name(i)}: {end}")
                    if not args.skip_bad:
                        raise ValueError(f"{line} (--skip-bad leaves such out)")
                    tqdm.write(f"left out: {line}", file=sys.stderr)
                    continue
                found[i] = (
                    ((len(parts[0]) - 1) * encoder.window + sound) / encoder.sampling_rate,
                    [],
                )
                for windows, file, rows, count in zip(parts, files, views, held):
                    made = np.concatenate(windows)
                    if pool == "clip":
                        made = made.sum(0, keepdims=True) / (
                            (len(windows) - 1) * rows.shape[1] + count
                        )
                    found[i][1].append((file.name, np.float32, "r", file.tell(), made.shape))
                    made.tofile(file)
    everyone = [found] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(everyone, found)
    if RANK > 0:
        sys.exit()
    if not (found := collections.ChainMap(*everyone)):
        raise ValueError(f"{args.data}: none of {len(clips)} recordings can be used")
    return {i: found[i] for i in sorted(found)}


def save_embeddings(args, clips, encoder, folder):
    """`--out`: the .npz, written beside it, from disk to disk, and renamed."""
    found = embed(args, clips, encoder, lambda x: [encoder.columns(x)], 1, args.pool, folder)
    seconds, places = zip(*((seconds, place) for seconds, (place,) in found.values()))
    offsets = np.cumsum([0, *(shape[0] for *_, shape in places)])
    with open(f"{folder}/rows", "wb") as file:
        for place in places:
            np.memmap(*place).tofile(file)
    rows = np.memmap(file.name, np.float32, "r", shape=(int(offsets[-1]), encoder.output_dim))
    config = dict(
        model=vars(encoder.network.config),
        log_mel=encoder.log_mel.config,
        bands=args.bands,
        pool=args.pool,
        encoder=args.encoder,
    )
    with open(f"{folder}/npz", "wb") as file:
        np.savez(
            file,
            embeddings=rows,
            offsets=offsets,
            paths=[clips.name(i) for i in found],
            seconds=seconds,
            sample_rate=encoder.sampling_rate,
            hop_ms=encoder.hop_size_in_ms,
            step=encoder.step,
            config=json.dumps(config),
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{folder}/npz", args.out)
    print(
        f"{printable(args.out)}: {len(found)} of {len(clips)} recordings, embeddings {list(rows.shape)}"
    )


def knn(probe, embeddings, labels, classes, train, test):
    """Accuracy of the vote of the 10 nearest training clips by cosine, each weighing exp(similarity / 0.07).
    "knn": every dimension standardised on the training split. "xares-knn": as X-ARES 0.1.3 and so Table III,
    each feature normalised over the training clips, instead of each clip: clips of large norm win."""
    if probe == "knn":
        std, mean = torch.std_mean(embeddings[train], 0, correction=0)
        embeddings = (embeddings - mean) / torch.where(std > 1e-6, std, 1.0)
    candidates, right = F.normalize(embeddings[train], dim=1 if probe == "knn" else 0), 0
    for part in test.split(1024):
        close, nearest = (F.normalize(embeddings[part]) @ candidates.T).topk(min(10, len(train)))
        weights = (close / 0.07).softmax(1)  # exp, up to a factor that all 10 share
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[train][nearest], weights)
        right += (votes.argmax(1) == labels[part]).sum().item()
    return right / len(test)


class Probe(torch.nn.Module):
    """LayerNorm, Linear: (tokens [B, L, K], padding [B, L]) -> [B, classes]. Of the only token, the pooled
    embedding, as X-ARES has it; or, `attentive`, of what one learned query draws, in 8 heads, out of all."""

    def __init__(self, width, classes, attentive):
        super().__init__()
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, classes)
        self.query, heads = torch.nn.Parameter(0.02 * torch.randn(1, width)), math.gcd(8, width)
        self.attention = (
            torch.nn.MultiheadAttention(width, heads, batch_first=True) if attentive else None
        )

    def forward(self, tokens, padding):
        tokens = self.norm(tokens)
        if self.attention is not None:
            tokens, _ = self.attention(
                self.query.expand(len(tokens), 1, -1), tokens, tokens, padding
            )
        return self.head(tokens[:, 0])


def train_probe(tokens_of, attentive, labels, classes, train, valid, test):
    """Accuracy on `test` of a Probe on tokens_of(clip) [L, K], after the epoch that is best on `valid`, or on
    a tenth of `train`. 10 epochs, batch 32, Adam, the rate on a cosine from 1e-3 to a tenth, as X-ARES."""
    torch.manual_seed(0)
    probe = Probe(tokens_of(0).shape[1], classes, attentive).to(device := choose_device())
    optimizer, best, accuracy = torch.optim.Adam(probe.parameters()), -1.0, 0.0
    if not len(valid):
        tenth = deal(labels[train], 10) == 0
        train, valid = train[~tenth], train[tenth]

    def logits(part):
        tokens = [torch.tensor(tokens_of(clip)) for clip in part.tolist()]
        lengths = torch.tensor([len(rows) for rows in tokens])
        padding = torch.arange(max(lengths)) >= lengths.unsqueeze(1)
        return probe(pad_sequence(tokens, True).to(device), padding.to(device)).cpu()

    @torch.no_grad()
    def score(split):
        return sum((logits(x).argmax(1) == labels[x]).sum().item() for x in split.split(32)) / len(
            split
        )

    for epoch in range(10):
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.55 + 0.45 * math.cos(math.pi * epoch / 10))
        for part in train[torch.randperm(len(train))].split(32):
            F.cross_entropy(logits(part), labels[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if (now := score(valid)) >= best:  # of equals the last, which has seen most
            best, accuracy = now, score(test)
    return accuracy


def deal(labels, folds):
    """A fold for each clip, shuffled and dealt out like cards, class after class -> int64 like `labels`."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    return torch.empty_like(labels).index_copy_(0, order, torch.arange(len(labels)) % folds)


def read_task(args, names):
    """Paths SPLIT/LABEL/... or LABEL/... -> (class of each, [(train, valid, test)], these as indices).
    ValueError if the folders are neither."""
    folders, indices = [name.split("/")[:-1] for name in names], torch.arange(len(names))
    split = np.array([folder[0] if folder else "" for folder in folders])
    has_splits = {"train", "test"} <= {*split} or {*split} <= {
        "train",
        "valid",
        "val",
        "dev",
        "test",
    }
    labels = [(*folder, "", "")[has_splits] for folder in folders]
    misnamed = (
        has_splits and (args.folds or {*split} - {"valid"} != {"train", "test"}) or "" in labels
    )
    if misnamed or len({*labels}) < 2 or len(names) < (args.folds or 5) * (not has_splits):
        raise ValueError(
            f"{args.data}: not 2 LABELs in train/LABEL/*, test/LABEL/*, or LABEL/* (--folds)"
        )
    labels = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    if has_splits:
        return labels, [[indices[split == name] for name in ("train", "valid", "test")]]
    fold = deal(labels, args.folds or 5)  # without --folds, the first of five
    return labels, [
        [indices[fold != n], indices[:0], indices[fold == n]] for n in range(args.folds or 1)
    ]


def run_probes(args, clips, encoder, folder):
    """`--probe`: the accuracies of this encoder, and of the baselines that it has to beat."""
    read_task(
        args, [clips.name(i) for i in range(len(clips))]
    )  # may refuse: better now than in the end
    encoder.bands = "concat"
    torch.manual_seed(0)
    untrained, config = copy.deepcopy(encoder), encoder.network.config
    untrained.network = VisionTransformer(config).to(encoder.log_mel.window)
    widths = {
        "this encoder, concat": config.dim,
        "this encoder, mean": config.dim,  # of a token
        "untrained, concat": config.dim,
        "untrained, mean": config.dim,
        "log-mel": 2 * config.mel_bins,
    }

    def views_of(spectrogram):
        views = [
            (
                columns,
                columns.unflatten(2, (encoder.grid[1], -1)).mean(2),
            )  # [B, 16, 8 D], [B, 16, D]
            for columns in (encoder.columns(spectrogram), untrained.columns(spectrogram))
        ]
        return [
            *views[0],
            *views[1],
            torch.cat([spectrogram, spectrogram.square()], 3)[:, 0],
        ]  # and moments

    pool = "time" if "attentive" in args.probe else "clip"
    found = embed(args, clips, encoder, views_of, len(widths), pool, folder)
    labels, splits = read_task(args, [clips.name(i) for i in found])
    places, classes, table = [places for _, places in found.values()], 1 + int(labels.max()), {}
    for n, (view, width) in enumerate(widths.items()):
        pooled = np.stack([np.memmap(*place[n]).mean(0) for place in places])  # [clips, K]
        if view == "log-mel":
            mean, square = np.split(pooled, 2, 1)
            pooled = np.hstack([mean, np.sqrt(np.maximum(square - mean**2, 0))])  # mean and std
        tokens_of = dict(
            linear=lambda clip: pooled[clip : clip + 1],
            attentive=lambda clip: np.memmap(*places[clip][n]).reshape(-1, width),
        )
        table[view] = {
            probe: float(
                np.mean(
                    [
                        knn(probe, torch.from_numpy(pooled), labels, classes, train, test)
                        if probe not in tokens_of
                        else train_probe(
                            tokens_of[probe],
                            probe == "attentive",
                            labels,
                            classes,
                            train,
                            valid,
                            test,
                        )
                        for train, valid, test in splits
                    ]
                )
            )
            for probe in args.probe
        }
    sizes = dict(
        zip(("train", "valid", "test"), map(len, splits[0])), classes=classes, folds=len(splits)
    )
    about = dict(
        data=args.data, checkpoint=args.checkpoint, step=encoder.step, encoder=args.encoder, **sizes
    )
    print("  ".join(f"{name} {printable(str(value))}" for name, value in about.items()))
    print(" " * 22, *(f"{probe:>11}" for probe in args.probe))
    for view, row in table.items():
        print(f"{view:22}", *(f"{accuracy:11.3f}" for accuracy in row.values()))
    if args.json:
        write_atomically(args.json, json.dumps(dict(about, accuracy=table)).encode())


def fail(message, code=2):
    print(f"extract.py: error: {message}", file=sys.stderr)
    sys.exit(code)


def parse_args(argv):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail  # one line, without the usage
    add = parser.add_argument
    add("checkpoint", help="last.pt or step-*.pt of train.py, or the authors' file")
    add(
        "data",
        help="as train.py's --data, except a packed folder; for --probe, folders by split and label",
    )
    add("--out", metavar="FILE.npz", help="write embeddings")
    add(
        "--bands",
        choices=["concat", "mean"],
        default="concat",
        help="of --out: frequency bands of a column",
    )
    add(
        "--pool",
        choices=["clip", "time"],
        default="clip",
        help="of --out: a row a recording or each 625 ms",
    )
    add("--encoder", choices=["target", "context"], default="target", help="which of the two")
    add(
        "--probe",
        nargs="+",
        choices=["knn", "xares-knn", "linear", "attentive"],
        help="measure accuracies",
    )
    add(
        "--folds",
        type=int,
        help="cross-validate on LABEL/*; without it, a fifth of the clips is the test",
    )
    add("--json", metavar="FILE", help="write the accuracies as well")
    add("--skip-bad", action="store_true", help="leave out recordings that cannot be used")
    add("--batch-size", type=int, default=32, help="windows that pass through the encoder at once")
    add("--workers", type=int, default=max(1, min(16, CORES - 1)), help="of each process")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision")
    args = parser.parse_args(argv)
    for name, least, most in (("batch_size", 1, 10**5), ("workers", 0, 1024), ("folds", 2, 10**5)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {value} is not between {least} and {most}")
    if (
        bool(args.out) == bool(args.probe)
        or os.path.isdir(args.out or "")
        or (args.out or "").endswith("/")
    ):
        parser.error("name one thing to do: --out FILE.npz (no folder), or --probe")
    if (
        args.out
        and (args.json or args.folds)
        or not os.path.isdir(os.path.dirname(args.json or "") or ".")
    ):
        parser.error("--json FILE, in a folder that exists, and --folds go with --probe")
    return args


def main(argv=None):
    keep_freed_memory()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is in `folder` goes
    args = parse_args(argv)
    run = os.getppid() if WORLD > 1 else os.getpid()  # the same in all processes
    folder = f"{args.out}.parts" if args.out else f"{tempfile.gettempdir()}/probe-{run}"
    try:
        if WORLD > 1:
            torch.set_num_threads(CORES)
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        encoder = load_encoder(args.checkpoint, args.bands, args.encoder).to(choose_device())
        encoder.amp = args.amp
        clips = AudioClips(args.data, encoder.sampling_rate)
        if clips.packed:
            raise ValueError(f"{args.data}: is packed; embeddings are made of audio")
        (run_probes if args.probe else save_embeddings)(args, clips, encoder, folder)
    except (*CANNOT_USE, KeyError, TypeError, KeyboardInterrupt) as error:
        fail(" ".join(str(error).split()) or "stopped")
    finally:
        if RANK == 0:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
