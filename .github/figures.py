# SPDX-License-Identifier: MIT
"""Draw the figures of the README (pip install matplotlib):

    python .github/figures.py mask CHECKPOINT SOUND OUT.png         what is masked and predicted
    python .github/figures.py tokens CHECKPOINT SOUND OUT.png       what the tokens are like
    python .github/figures.py curves HEALTHY COLLAPSED OUT.svg      two runs, by their folders

`mask` needs a last.pt or step-*.pt of train.py, because it runs the predictor. `curves` also shows
the kNN accuracy, if `extract.py RUN/step-*.pt TASK --probe knn --json RUN/knn.json` was run.
"""

import csv
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import AudioClips, LogMel
from extract import load_encoder
from masking import random_mask
from model import JEPAConfig, Predictor, VisionTransformer, gather_tokens, normalise_targets
from train import load_checkpoint

matplotlib.use("agg")
from matplotlib import pyplot as plt


class Networks:
    """Everything in a checkpoint, and the log-mel of a sound [1, 1, T, F]."""

    def __init__(self, checkpoint, sound):
        stored = load_checkpoint(checkpoint)
        self.config = JEPAConfig(**stored["config"]["model"])
        self.log_mel = LogMel(**stored["config"]["log_mel"])
        self.target_norm = stored["settings"]["target_norm"]
        self.target_encoder = VisionTransformer(self.config)
        self.target_encoder.load_state_dict(stored["target_encoder"])
        self.context_encoder = VisionTransformer(self.config)
        self.context_encoder.load_state_dict(stored["context_encoder"])
        self.predictor = Predictor(self.config)
        self.predictor.load_state_dict(stored["predictor"])
        clips = AudioClips(sound, self.log_mel.sample_rate, self.log_mel.clip_seconds)
        self.spectrogram = self.log_mel(clips[0].unsqueeze(0))


def show(axes, picture, title, config, seconds, colours="viridis"):
    """A picture [time, mel], time to the right and mel upwards."""
    extent = (0, seconds, 0, config.mel_bins)
    image = axes.imshow(
        picture.T,
        origin="lower",
        aspect="auto",
        extent=extent,
        cmap=colours,
        interpolation="nearest",
    )
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel("mel band")
    return image


def per_pixel(patches, config):
    """A value for each patch [N] -> for each frame and band [T, F]."""
    grid = patches.view(config.grid)
    frames, bands = config.patch_size
    return grid.repeat_interleave(frames, 0).repeat_interleave(bands, 1)


@torch.no_grad()
def draw_mask(checkpoint, sound, out):
    nets = Networks(checkpoint, sound)
    config = nets.config
    num_patches = config.grid[0] * config.grid[1]
    generator = torch.Generator().manual_seed(0)
    context_idx, target_idx = random_mask(1, config.grid, num_patches // 2, generator)
    targets = normalise_targets(nets.target_encoder(nets.spectrogram), nets.target_norm)
    targets = gather_tokens(targets, target_idx)
    context = nets.context_encoder(nets.spectrogram, context_idx)
    predictions = nets.predictor(context, context_idx, target_idx)
    error = (predictions - targets).square().mean(-1)  # predicting 0 has an error of 1

    spectrogram = nets.spectrogram[0, 0]
    masked = torch.zeros(num_patches).scatter_(0, target_idx[0], 1.0)
    seen = spectrogram.masked_fill(per_pixel(masked, config) > 0, torch.nan)
    errors = torch.full((num_patches,), torch.nan).scatter_(0, target_idx[0], error[0])
    seconds = nets.log_mel.clip_seconds
    figure, panels = plt.subplots(3, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
    show(panels[0], spectrogram, "log-mel", config, seconds)
    show(panels[1], seen, "what the context encoder sees", config, seconds)
    title = "squared error of the prediction, mean over the features of a masked patch"
    image = show(panels[2], per_pixel(errors, config), title, config, seconds, "magma")
    image.set_clim(vmin=0)
    figure.colorbar(image, ax=panels[2], pad=0.01)
    panels[2].set_xlabel("seconds")
    figure.savefig(out, dpi=75)


@torch.no_grad()
def draw_tokens(checkpoint, sound, out):
    """The first 20 s. The mean token of each position is subtracted first, because three colours
    would show little else."""
    encoder = load_encoder(checkpoint)
    config = encoder.network.config
    files = AudioClips(sound, encoder.sampling_rate).source
    windows = list(files.windows(0, encoder.excerpt_samples))
    waveform = torch.from_numpy(np.concatenate(windows[:-1])).unsqueeze(0)  # the last is shorter
    tokens = encoder(waveform).view(-1, *config.grid, config.dim)  # [windows, 16, 8, D]
    tokens = (tokens - tokens.mean(0)).flatten(0, 1)  # [R, 8, D]
    tokens = tokens[: round(20_000 / encoder.hop_size_in_ms)]
    seconds = len(tokens) * encoder.hop_size_in_ms / 1000
    flat = tokens.flatten(0, 1)
    flat = flat - flat.mean(0)
    directions = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
    colours = flat @ directions.T  # [R * 8, 3]
    low = colours.quantile(0.02, dim=0)
    high = colours.quantile(0.98, dim=0)
    colours = ((colours - low) / (high - low)).clamp(0, 1)
    picture = colours.view(len(tokens), -1, 3).transpose(0, 1)  # [8, R, 3]

    samples = round(seconds * encoder.sampling_rate)
    spectrogram = encoder.log_mel.frames(waveform[:, :samples])[0]
    figure, panels = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True, layout="constrained")
    show(panels[0], spectrogram, "log-mel", config, seconds)
    extent = (0, seconds, 0, config.mel_bins)
    panels[1].imshow(picture, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    title = "its tokens: three principal components as red, green, blue"
    panels[1].set_title(title, fontsize=10, loc="left")
    panels[1].set_xlabel("seconds")
    panels[1].set_ylabel("mel band")
    figure.savefig(out, dpi=75)


def draw_curves(healthy, collapsed, out):
    columns = ["loss", "explained", "token_std", "effective_rank"]
    figure, panels = plt.subplots(1, 5, figsize=(13, 2.6), layout="constrained")
    for run, colour in [(healthy, "tab:green"), (collapsed, "tab:red")]:
        with open(Path(run) / "log.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        steps = [int(line["step"]) for line in lines]
        for panel, column in zip(panels, columns, strict=False):
            panel.plot(steps, [float(line[column]) for line in lines], color=colour)
            panel.set_title(column, fontsize=10)
        measured = Path(run) / "knn.json"
        if measured.exists():
            accuracy = json.loads(measured.read_text())["accuracy"]
            points = []
            for name, probes in accuracy.items():
                step = re.search(r"step-(\d+)\.pt", name)
                if step is not None:
                    points.append((int(step[1]), probes["knn"]))
            points = [(0, accuracy["untrained, concat"]["knn"]), *sorted(points)]
            panels[4].plot(*zip(*points, strict=True), "o-", color=colour)
    panels[0].set_yscale("log")
    panels[1].set_ylim(-1, 1)
    panels[4].set_title("kNN accuracy", fontsize=10)
    for panel in panels:
        panel.set_xlabel("step")
    panels[3].plot([], [], color="tab:green", label="healthy")
    panels[3].plot([], [], color="tab:red", label="collapsed")
    panels[3].legend(fontsize=8, loc="center right")
    figure.savefig(out)


DRAW = {"mask": draw_mask, "tokens": draw_tokens, "curves": draw_curves}

if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in DRAW:
        sys.exit(__doc__)
    DRAW[sys.argv[1]](*sys.argv[2:])
