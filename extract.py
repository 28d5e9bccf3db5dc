# SPDX-License-Identifier: MIT
"""What a frozen encoder is used for (sec. III.C): embeddings, probes, X-ARES.

    python extract.py CHECKPOINT DATA --out emb.npz          embeddings, one per recording
    python extract.py CHECKPOINT DATA --probe knn linear     accuracies on train|test/LABEL/*

A recording is cut into excerpts as long as a training clip (10 s). An excerpt gives 16 rows, one
for each 625 ms, and a row is made of 8 tokens, one for every 16 mel bands. The last excerpt is
shorter. It is filled up with its own sound, and rows beyond its end are dropped. The embedding of a
recording is the mean of its rows. In it, the last row counts by the share of it that holds sound:
7.3 s are 12 rows, and the last of them counts .68.

Letters in the shape comments: B excerpts, N tokens of an excerpt, D encoder width, R rows of an
excerpt (of an encoder, or the frames of a log-mel) or of a recording, E numbers in a row.
"""

import argparse
import copy
import json
import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from data import UNREADABLE, AudioFiles, LogMel, whole_file
from model import JEPAConfig, VisionTransformer
from train import (
    OneLineParser,
    choose_device,
    default_workers,
    fail,
    load_checkpoint,
)


class AudioJEPAEncoder(nn.Module):
    """A pretrained encoder for waveforms of any length.

    (waveform [B, samples], float in [-1, 1], mono, at `sampling_rate` Hz) -> [B, R, output_dim],
    float32: one row per `hop_size_in_ms`, the last one perhaps partial.

    Recordings of different lengths are padded with zeros to one length. The zeros at the end of
    each are not encoded, and their rows are 0, so that a recording gets the same rows with padding
    and without. `lengths` [B] says how many samples are sound, for recordings that end in zeros.

    `checkpoint`: of train.py, or the authors' file. `bands`: "concat" puts the 8 tokens of a row
    side by side, "mean" averages them. X-ARES builds this class without arguments: then
    AUDIO_JEPA_CHECKPOINT and AUDIO_JEPA_BANDS are read.

    Its parameters are frozen; `encoder.requires_grad_(True)` is all that fine-tuning needs.
    ValueError: a missing or damaged checkpoint, unknown bands, a waveform of another shape.
    """

    def __init__(self, checkpoint=None, bands=None):
        super().__init__()
        checkpoint = checkpoint or os.environ["AUDIO_JEPA_CHECKPOINT"]
        bands = bands or os.environ.get("AUDIO_JEPA_BANDS", "concat")
        if bands not in ("concat", "mean"):
            raise ValueError(f"bands are concat or mean, not {bands}")
        stored = load_networks(checkpoint)
        config = JEPAConfig(**stored["config"]["model"])
        self.network = VisionTransformer(config)
        self.network.load_state_dict(stored["target_encoder"])
        self.network.requires_grad_(False)
        if stored["config"]["log_mel"] is None:
            self.log_mel = AuthorsLogMel()
        else:
            self.log_mel = LogMel(**stored["config"]["log_mel"])
        self.step = stored["step"]
        self.bands = bands
        self.sampling_rate = self.log_mel.sample_rate
        self.excerpt_samples = round(self.sampling_rate * self.log_mel.clip_seconds)
        self.rows_per_excerpt, self.tokens_per_row = config.grid
        self.samples_per_row = self.excerpt_samples // self.rows_per_excerpt
        self.hop_size_in_ms = 1000 * self.samples_per_row / self.sampling_rate
        self.output_dim = config.dim
        if bands == "concat":
            self.output_dim = config.dim * self.tokens_per_row

    @property
    def device(self):
        return self.log_mel.window.device

    def forward(self, waveform, lengths=None):
        if waveform.ndim != 2 or not waveform.is_floating_point():
            shape = f"{waveform.dtype}, {list(waveform.shape)}"
            raise ValueError(f"a waveform of {shape}: it must be float and [B, samples]")
        samples = waveform.shape[1]
        waveform = waveform.to(self.device, torch.float32)
        if lengths is None:
            # Count the zeros at the end. argmax gives the first maximum: 0 where all samples are
            # zeros, which is digital silence and no padding.
            trailing_zeros = (waveform != 0).int().flip(1).argmax(1)
            lengths = samples - trailing_zeros
        lengths = lengths.to(self.device)
        padded = F.pad(waveform, (0, -samples % self.excerpt_samples))
        rows = []
        for start in range(0, samples, self.excerpt_samples):
            excerpts = padded[:, start : start + self.excerpt_samples]
            rows.append(self.rows(excerpts, (lengths - start).clamp(0, self.excerpt_samples)))
        rows = torch.cat(rows, dim=1)
        return rows[:, : math.ceil(samples / self.samples_per_row)]

    def rows(self, excerpts, lengths):
        """Excerpts [B, excerpt_samples], of which the first `lengths` [B] samples are sound and the
        others padding -> their rows [B, R, output_dim]. Rows without sound are 0."""
        spectrogram = self.log_mel(mirror(excerpts, lengths))
        tokens = self.network(spectrogram)  # [B, N, D], time-major
        grid = (self.rows_per_excerpt, self.tokens_per_row)
        rows = tokens.unflatten(1, grid)  # [B, R, 8, D]
        if self.bands == "concat":
            rows = rows.flatten(2)
        else:
            rows = rows.mean(2)
        row_starts = self.samples_per_row * torch.arange(self.rows_per_excerpt, device=self.device)
        without_sound = row_starts >= lengths.unsqueeze(1)  # [B, R]
        return rows.masked_fill(without_sound.unsqueeze(2), 0)


def mirror(excerpts, lengths):
    """Fill up excerpts [B, samples], of which the first `lengths` [B] samples are sound, with that
    sound played backwards, forwards, and so on.

    The encoder has hardly met padding. Silence would spoil the tokens that it reaches into, and by
    attention the others.
    """
    lengths = lengths.clamp(min=1).unsqueeze(1)  # [B, 1]
    there_and_back = torch.arange(excerpts.shape[1], device=excerpts.device) % (2 * lengths)
    # For a length of 3, there_and_back is 0 1 2 3 4 5 0 1 ..., and source 0 1 2 2 1 0 0 1 ...
    source = torch.minimum(there_and_back, 2 * lengths - 1 - there_and_back)
    return excerpts.gather(1, source)


def load_encoder(path: str | os.PathLike, bands: str = "concat") -> AudioJEPAEncoder:
    """A frozen encoder, on the CPU: see AudioJEPAEncoder."""
    return AudioJEPAEncoder(path, bands).eval()


# ------------------------------------------------------------------------------------------------
# Embedding a folder


class Excerpts(IterableDataset):
    """Recordings in excerpts: (index of the recording, excerpt [excerpt_samples], how many of its
    samples are sound, error).

    Each loader worker reads recordings of its own, from start to end. An error ends a recording.
    """

    def __init__(self, files, excerpt_samples):
        self.files = files
        self.excerpt_samples = excerpt_samples

    def __iter__(self):
        recordings = range(len(self.files))
        worker = get_worker_info()
        if worker is not None:
            recordings = recordings[worker.id :: worker.num_workers]
        for i in recordings:
            try:
                for waveform in self.files.windows(i, self.excerpt_samples):
                    padding = self.excerpt_samples - len(waveform)
                    yield i, F.pad(waveform, (0, padding)), len(waveform), ""
            except UNREADABLE as error:
                yield i, torch.zeros(self.excerpt_samples), 0, str(error) or repr(error)


class Recording:
    """The rows of a recording, added up excerpt by excerpt. Only with `keep_rows` are they kept,
    because those of a large data set would fill the memory."""

    def __init__(self, name, keep_rows):
        self.name = name
        self.keep_rows = keep_rows
        self.rows = []  # [R, E] of each excerpt
        self.duration = 0.0  # in rows
        self.sum = 0.0  # of all rows, [1, E]

    def add(self, rows, duration):
        """`duration` of the rows [R, E] of an excerpt hold sound: 11.7 are 12 rows, the last of
        which counts .7."""
        rows = rows[: math.ceil(duration)]
        weights = (duration - torch.arange(len(rows))).clamp(max=1).unsqueeze(0)
        self.duration += duration
        self.sum += weights @ rows
        if self.keep_rows:
            self.rows.append(rows)


def embed(encoder, files, args, keep_rows):
    """A Recording of each, in the order of `files`. ValueError names one that cannot be used;
    --skip-bad leaves it out."""
    dataset = Excerpts(files, encoder.excerpt_samples)
    loader = DataLoader(dataset, args.batch_size, num_workers=args.workers)
    embedded = {}
    for indices, excerpts, lengths, errors in tqdm(loader, disable=None):
        rows = encoder.rows(excerpts.to(encoder.device), lengths.to(encoder.device)).cpu()
        durations = lengths / encoder.samples_per_row
        for n, i in enumerate(indices.tolist()):
            if errors[n]:
                message = f"{files.name(i)}: {errors[n]}"
                if not args.skip_bad:
                    raise ValueError(f"{message} (--skip-bad leaves such recordings out)")
                tqdm.write(f"left out: {message}", file=sys.stderr)
                embedded.pop(i, None)  # what came before the error
            else:
                recording = embedded.setdefault(i, Recording(files.name(i), keep_rows))
                recording.add(rows[n], durations[n].item())
    if not embedded:
        raise ValueError(f"{args.data}: none of its recordings can be used")
    return [embedded[i] for i in sorted(embedded)]


def save_embeddings(args, encoder):
    files = AudioFiles(args.data, encoder.sampling_rate)
    recordings = embed(encoder, files, args, keep_rows=args.pool == "time")
    if args.pool == "time":
        blocks = [torch.cat(recording.rows) for recording in recordings]  # [R, E] of each
    else:
        blocks = [recording.sum / recording.duration for recording in recordings]  # [1, E]
    seconds_per_row = encoder.hop_size_in_ms / 1000
    config = {
        "model": vars(encoder.network.config),
        "log_mel": encoder.log_mel.config,
        "bands": args.bands,
        "pool": args.pool,
    }
    with whole_file(args.out) as file:
        np.savez(
            file,
            embeddings=torch.cat(blocks),
            offsets=np.cumsum([0] + [len(block) for block in blocks]),
            paths=[recording.name for recording in recordings],
            seconds=[recording.duration * seconds_per_row for recording in recordings],
            sample_rate=encoder.sampling_rate,
            hop_ms=encoder.hop_size_in_ms,
            step=encoder.step,
            config=json.dumps(config),
        )
    print(f"{args.out}: {len(recordings)} of {len(files)} recordings embedded")


# ------------------------------------------------------------------------------------------------
# Probes: what is a frozen embedding worth? Each is a function
#
#     (features, labels, fold) -> the class of each recording in fold.test
#
# features are embeddings [n, E], or for the attentive probe the rows [R, E] of each recording.


@dataclass
class Fold:
    """Which recordings are for what: indices, int64."""

    train: Tensor
    inner_fold: Tensor  # of each training recording, for the cross-validation
    valid: Tensor  # to choose by instead of a cross-validation; may be empty
    test: Tensor


def knn(embeddings, labels, fold):
    """The vote of the 10 nearest training recordings by cosine, each weighing
    exp(similarity / 0.07). Every dimension is standardised on the training recordings first."""
    embeddings = F.normalize(standardise(embeddings, fold.train), dim=1)
    similarity = embeddings[fold.test] @ embeddings[fold.train].T  # [test, train]
    nearest = similarity.topk(min(10, len(fold.train)), dim=1)
    weights = (nearest.values / 0.07).softmax(1)  # exp, up to a factor that all 10 share
    votes = weights.new_zeros(len(weights), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[fold.train][nearest.indices], weights)
    return votes.argmax(1)


def standardise(features, train):
    """[n, E] -> [n, E], float64: mean 0 and std 1 over features[train] in each dimension; constant
    ones are centred only."""
    features = features.double()
    std, mean = torch.std_mean(features[train], dim=0, correction=0)
    return (features - mean) / torch.where(std > 1e-6, std, 1.0)


def decorrelate(features, train):
    """[n, E] -> [n, J], float64: standardised, along axes on which features[train] are not
    correlated.

    J <= min(n, E): only the span of features[train] is kept, because a penalised weight never
    leaves it.
    """
    features = standardise(features, train)
    _, sizes, axes = torch.linalg.svd(features[train], full_matrices=False)
    return features @ axes[sizes > 1e-5 * sizes[0]].T


def minimise(loss_function, parameters, iterations):
    """L-BFGS, deterministic; it stops earlier where no gradient exceeds 1e-5. It changes the
    parameters in place."""
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_function()
        loss.backward()
        return loss

    optimizer.step(closure)
    for parameter in parameters:
        parameter.requires_grad_(False)


PENALTIES = [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
ITERATIONS = 1000  # of a regression; most need fewer
ATTENTIVE_ITERATIONS = 300  # twice as many change less than a standard error
HEADS = 4  # of the attentive probe
QUERY_PENALTY = 100  # times that of a weight, because attention overfits sooner


def fit(features, labels, penalty):
    """Multinomial logistic regression: features [n, J], labels [n] -> weight [J, classes], bias.

    It minimises mean cross entropy + penalty / 2 * |weight|^2 until it has converged. L-BFGS sees
    the weight divided by `scale`, which makes the curvature about the same in all directions. That
    saves iterations and does not move the minimum.
    """
    scale = curvature_scale(features, penalty)
    scaled = features * scale.T
    classes = int(labels.max()) + 1
    weight = features.new_zeros(len(scale), classes)
    bias = features.new_zeros(classes)

    def loss():
        size = (weight * scale).square().sum()
        return F.cross_entropy(scaled @ weight + bias, labels) + penalty / 2 * size

    minimise(loss, [weight, bias], ITERATIONS)
    return weight * scale, bias


def curvature_scale(features, penalty):
    """Along an axis the curvature of the loss is about var / 4 + penalty: 1 / its root [J, 1]."""
    return (features.var(0, correction=0) / 4 + penalty).rsqrt().unsqueeze(1)


def choose_penalty(features, labels, fold):
    """The penalty of the best regression: on the valid recordings, or by cross-validation on those
    for training."""
    splits = [(fold.train, fold.valid)]
    if len(fold.valid) == 0:
        splits = []
        for number in fold.inner_fold.unique():
            is_held_out = fold.inner_fold == number
            splits.append((fold.train[~is_held_out], fold.train[is_held_out]))
    features = features.float()  # good enough to choose by, and twice as fast
    right = []
    for penalty in PENALTIES:
        count = 0
        for train, held_out in splits:
            weight, bias = fit(features[train], labels[train], penalty)
            predictions = (features[held_out] @ weight + bias).argmax(1)
            count += (predictions == labels[held_out]).sum().item()
        right.append(count)
        best = right.index(max(right))
        if len(right) > best + 2:  # two weaker penalties in a row were no better
            break
    return PENALTIES[best]


def linear(embeddings, labels, fold):
    """Logistic regression on the standardised embedding."""
    features = decorrelate(embeddings, fold.train)
    penalty = choose_penalty(features, labels, fold)
    weight, bias = fit(features[fold.train], labels[fold.train], penalty)
    return (features[fold.test] @ weight + bias).argmax(1)


def attentive(rows, labels, fold):
    """Logistic regression on rows that learned queries have attended to: rows [R, E] of each
    recording.

    A head weighs the rows of a recording by the softmax of their products with its query. The means
    of all heads enter the regression side by side. (Keys and values would add nothing to a linear
    classifier.) It begins as the regression on the mean row, with the penalty of that one.
    All rows of a recording count equally, including the last.
    """
    lengths = torch.tensor([len(recording) for recording in rows])
    recording_of_row = torch.arange(len(rows)).repeat_interleave(lengths)
    is_training = torch.isin(recording_of_row, fold.train)
    features = decorrelate(torch.cat(rows), is_training).float()
    recordings = features.split(lengths.tolist())  # [R, J] of each
    means = torch.stack([recording.mean(0) for recording in recordings])
    penalty = choose_penalty(means, labels, fold)
    weight, bias = fit(means[fold.train], labels[fold.train], penalty)

    # As in `fit`, L-BFGS sees features that are multiplied by a scale, and weights divided by it.
    scale = curvature_scale(means[fold.train], penalty)  # [J, 1]
    recordings = [recording * scale.T for recording in recordings]
    generator = torch.Generator().manual_seed(0)
    query = 0.01 * torch.randn(len(scale), HEADS, generator=generator)  # [J, HEADS]
    weight = (weight / scale / HEADS).repeat(HEADS, 1)  # [HEADS x J, classes]

    def logits(stacked):
        """Of recordings with equally many rows [B, R, J]."""
        attention = (stacked @ query).softmax(1)  # [B, R, HEADS]
        attended = attention.mT @ stacked  # [B, HEADS, J]
        return attended.flatten(1) @ weight + bias

    groups = []  # recordings with equally many rows are one tensor: their labels, [B, R, J]
    for length in lengths[fold.train].unique():
        group = fold.train[lengths[fold.train] == length]
        groups.append((labels[group], torch.stack([recordings[i] for i in group])))

    def loss():
        weights = (weight * scale.repeat(HEADS, 1)).square().sum()
        queries = QUERY_PENALTY * (query * scale).square().sum()
        total = penalty / 2 * (weights + queries)
        for answers, stacked in groups:
            summed = F.cross_entropy(logits(stacked), answers, reduction="sum")
            total = total + summed / len(fold.train)
        return total

    minimise(loss, [query, weight, bias], ATTENTIVE_ITERATIONS)
    predictions = [logits(recordings[i].unsqueeze(0)).argmax(1) for i in fold.test]
    return torch.cat(predictions)


PROBES = {"knn": knn, "linear": linear, "attentive": attentive}


# ------------------------------------------------------------------------------------------------
# Tasks and tables


def five_folds(labels):
    """Shuffle the recordings of each class and spread them evenly -> the fold of each, 0 to 4."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % 5
    return fold


def numbered(names):
    """Number the different names in alphabetical order: b a b -> 1 0 1, int64."""
    return torch.from_numpy(np.unique(names, return_inverse=True)[1])


def read_task(data, names):
    """Paths SPLIT/LABEL/..., FOLD/LABEL/... or LABEL/... -> the class of each recording, int64, and
    a list of Folds, each of which is tested. ValueError for other paths.
    """
    needed = ValueError(
        f"{data}: a task is train/LABEL/* and test/LABEL/* (and valid/LABEL/*), or fold1/LABEL/*, "
        "fold2/LABEL/* and so on, or LABEL/*, with two labels or more"
    )
    paths = [name.replace(".tar/", "/").split("/") for name in names]  # or train.tar, test.tar
    groups = [path[0] for path in paths]
    splits = {"train", "valid", "test"}
    has_splits = {"train", "test"} <= set(groups) <= splits
    has_folds = all(group.startswith("fold") for group in groups)
    below_a_split = any(path[0] in splits and len(path) > 2 for path in paths)
    if below_a_split and not has_splits:  # one is missing, or others are beside them
        raise needed
    label = 0  # where it is in a path
    if has_splits or has_folds:
        label = 1
    if any(len(path) < label + 2 for path in paths):  # no folder for the label
        raise needed
    labels = numbered([path[label] for path in paths])
    if label == 0:
        groups = [f"fold{number}" for number in five_folds(labels).tolist()]
    tested = sorted(set(groups))
    if len(labels.unique()) < 2 or len(tested) < 2:
        raise needed
    if has_splits:
        tested = ["test"]
    groups = np.array(groups)

    def indices(chosen):
        return torch.from_numpy(np.flatnonzero(chosen))

    valid = groups == "valid"
    folds = []
    for group in tested:
        test = groups == group
        train = indices(~test & ~valid)
        inner_fold = numbered(groups)[train]  # the folds hold for the cross-validation as well
        if len(inner_fold.unique()) == 1:
            inner_fold = five_folds(labels[train])
        folds.append(Fold(train, inner_fold, indices(valid), indices(test)))
    return labels, folds


class LogMelBaseline:
    """The log-mel in the place of an encoder: its frames are the rows."""

    def __init__(self, encoder):
        self.log_mel = encoder.log_mel
        self.sampling_rate = encoder.sampling_rate
        self.device = encoder.device
        self.excerpt_samples = encoder.excerpt_samples
        self.samples_per_row = encoder.excerpt_samples // encoder.log_mel.time_bins

    def rows(self, excerpts, lengths):
        return self.log_mel(excerpts).squeeze(1)  # [B, T, F]


def untrained(encoder):
    """The same encoder before any training."""
    encoder = copy.deepcopy(encoder)
    torch.manual_seed(0)
    network = VisionTransformer(encoder.network.config).requires_grad_(False)
    encoder.network = network.to(encoder.device)
    return encoder


def accuracies(args, encoder):
    """Embed a task and probe it -> the accuracy of each probe over the test recordings of all
    folds, labels, folds."""
    files = AudioFiles(args.data, encoder.sampling_rate)
    # So that a wrong task is refused before the work.
    read_task(args.data, [files.name(i) for i in range(len(files))])
    is_log_mel = isinstance(encoder, LogMelBaseline)
    recordings = embed(encoder, files, args, keep_rows=is_log_mel or "attentive" in args.probe)
    labels, folds = read_task(args.data, [recording.name for recording in recordings])
    rows = [torch.cat(recording.rows) for recording in recordings if recording.rows]
    embeddings = torch.cat([recording.sum / recording.duration for recording in recordings])
    if is_log_mel:
        stds = torch.stack([frames.std(0, correction=0) for frames in rows])
        embeddings = torch.cat([embeddings, stds], dim=1)
    result = {}
    for name in args.probe:
        features = rows if name == "attentive" else embeddings
        right = [PROBES[name](features, labels, fold) == labels[fold.test] for fold in folds]
        result[name] = torch.cat(right).double().mean().item()
    return result, labels, folds


def run_probes(args, encoders):
    """--probe: the encoder of each checkpoint, and two baselines: log-mel, and the first encoder
    untrained. Prints each line of the table as soon as it is known, and writes all to --json."""
    first = encoders[args.checkpoints[0]]
    encoders = {"log-mel": LogMelBaseline(first), "untrained": untrained(first)} | encoders
    table = {}
    for name, encoder in encoders.items():
        result, labels, folds = accuracies(args, encoder)
        answers = torch.cat([labels[fold.test] for fold in folds])
        if not table:
            chance = answers.bincount().max().item() / len(answers)
            header = {
                "classes": len(labels.unique()),
                "folds": len(folds),
                "test": len(answers),
                "chance": round(chance, 3),  # of the commonest class as the only answer
            }
            print("  ".join(f"{key} {value}" for key, value in header.items()))
        table[name] = result
        line = ""
        for probe, accuracy in result.items():
            error = math.sqrt(accuracy * (1 - accuracy) / len(answers))  # binomial standard error
            line += f"{probe} {accuracy:.3f} +- {error:.3f}   "
        print(line + name, flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(header | {"accuracy": table}, file)


# ------------------------------------------------------------------------------------------------
# Checkpoints: ours, or the file that the authors have published


def load_networks(path):
    """A checkpoint of train.py, or the authors' file in that form. ValueError if it is neither."""
    try:
        # Lightning stores Python objects beside the weights. Ours are plain.
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file can raise anything; load_checkpoint says what is wrong
        foreign = []
    if not foreign:
        return load_checkpoint(path)
    with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    try:
        return from_authors(theirs)
    except (AttributeError, KeyError, TypeError):  # it holds other things
        raise ValueError(
            f"{path}: not a checkpoint that can be read, neither ours nor theirs"
        ) from None


class Inert:
    """Stands for the objects that Lightning stores beside the weights: none is executed."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def from_authors(theirs):
    """The authors' Lightning checkpoint, in the form of ours; its log_mel is None."""
    target = {}
    for name, tensor in theirs["state_dict"].items():
        network, _, name = name.replace("_orig_mod.", "").partition(".")
        name = name.replace("patch_embed.proj", "patch_embed")
        name = name.replace("Wqkv", "qkv").replace("out_proj", "proj")
        if name == "patch_embed.weight":
            tensor = tensor.flatten(1)  # of their convolution
        if name == "pos_embed":
            tensor = tensor.squeeze(0)
        if network == "target_encoder":
            target[name] = tensor
    dim = len(target["patch_embed.weight"])
    depth = len([name for name in target if name.endswith("attn.qkv.weight")])
    config = JEPAConfig(dim=dim, depth=depth, heads=dim // 64)
    return {
        "config": {"model": vars(config), "log_mel": None},
        "step": theirs["global_step"],
        "target_encoder": target,
    }


class AuthorsLogMel(LogMel):
    """The front end of the authors' weights: a hop of 1243, a window of 3108, waveforms of mean 0
    and peak 1, the 255 frames that lie inside the clip, and zeros for the 256th."""

    config = None  # nothing can be chosen

    def __init__(self):
        super().__init__()
        self.hop = 1243
        self.window_length = 3108
        self.window = torch.hann_window(self.window_length, periodic=False)

    def frames(self, waveform):
        waveform = waveform - waveform.mean(dim=1, keepdim=True)
        peak = waveform.abs().amax(dim=1, keepdim=True).clamp(min=1e-6)
        # The first window of LogMel begins 933 samples before the waveform. With 310 zeros in
        # front, the second one, a hop later, begins with it.
        shifted = F.pad(waveform / peak, (310, 0))
        inside = super().frames(shifted)[:, 1:256]
        return F.pad(inside, (0, 0, 0, 1))


# ------------------------------------------------------------------------------------------------
# Flags


def try_to_write(path):
    """OSError: `path` cannot be written. Better said before the work than after it."""
    if os.path.isdir(path):
        raise OSError(f"{path}: is a folder, but must be a file")
    temporary = f"{path}.tmp"  # of whole_file
    open(temporary, "wb").close()
    os.remove(temporary)


def parse_args(argv):
    parser = OneLineParser(
        description="Embeddings and probes of a frozen encoder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
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
    task.add_argument("--probe", nargs="+", choices=list(PROBES), help="measure")
    add(
        "--bands",
        choices=["concat", "mean"],
        default="concat",
        help="the tokens of a row: side by side, or their mean",
    )
    add(
        "--pool",
        choices=["recording", "time"],
        default="recording",
        help="one embedding a recording, the mean of its rows, or all rows",
    )
    add("--json", metavar="FILE", help="write the accuracies as well")
    add("--skip-bad", action="store_true", help="leave out recordings that cannot be used")
    add("--batch-size", type=int, default=32, help="excerpts that pass the encoder at once")
    add("--workers", type=int, default=default_workers(), help="processes that read")
    args = parser.parse_args(argv)
    if args.out is not None and len(args.checkpoints) > 1:
        parser.error("--out takes one checkpoint")
    if args.probe and args.pool == "time":
        parser.error("--pool time goes with --out: a probe has one embedding a recording")
    if args.json is not None and not args.probe:
        parser.error("--json goes with --probe")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        for path in (args.out, args.json):
            if path is not None:
                try_to_write(path)
        encoders = {}
        for path in args.checkpoints:
            encoders[path] = load_encoder(path, args.bands).to(choose_device())
        if args.probe:
            run_probes(args, encoders)
        else:
            save_embeddings(args, encoders[args.checkpoints[0]])
    except (OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()
