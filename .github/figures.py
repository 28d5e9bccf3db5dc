# SPDX-License-Identifier: MIT
"""Draw the pictures of the README (pip install matplotlib):

    python .github/figures.py mask CHECKPOINT OUT.png SOUND SOUND SOUND      seen, and how far off
    python .github/figures.py tokens CHECKPOINT OUT.png SOUND SOUND SOUND    tokens as colours
    python .github/figures.py curves OUT.png HEALTHY COLLAPSED    two runs, by their folders
    python .github/figures.py hours OUT.png 1,4 TASK.json ...     accuracy over hours of sound

`hours` takes what extract.py --json wrote for each task, with a checkpoint for each amount.

`mask` needs a last.pt or step-*.pt of train.py, because it runs the predictor.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import AudioClips, LogMel
from extract import load_encoder
from masking import random_mask
from model import JEPAConfig, Predictor, VisionTransformer, normalise_targets
from train import load_checkpoint

matplotlib.use("agg")
from matplotlib import pyplot as plt

plt.rcParams.update(
    {
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "white",  # also on a dark page
    }
)
DOTS_PER_INCH = 200  # twice what a README shows


def name_of(sound):
    return Path(sound).stem.replace("_", " ")


def show_spectrogram(axes, picture, seconds, colours, low=None, high=None):
    """A picture [time, mel], time to the right and mel upwards."""
    return axes.imshow(
        picture.T,
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, 128),
        cmap=colours,
        interpolation="nearest",
        vmin=low,
        vmax=high,
    )


def per_pixel(patches, config):
    """A value for each patch [N] -> for each frame and band [T, F]."""
    patch_time, patch_mel = config.patch_size
    grid = patches.view(config.grid)
    return grid.repeat_interleave(patch_time, 0).repeat_interleave(patch_mel, 1)


@torch.no_grad()
def draw_mask(checkpoint, out, *sounds):
    """For each sound: its log-mel, what the context encoder sees, and the error of the prediction.
    An error of 1 is that of predicting the mean target everywhere."""
    stored = load_checkpoint(checkpoint)
    config = JEPAConfig(**stored["config"]["model"])
    log_mel = LogMel(**stored["config"]["log_mel"])
    target_encoder = VisionTransformer(config)
    target_encoder.load_state_dict(stored["target_encoder"])
    context_encoder = VisionTransformer(config)
    context_encoder.load_state_dict(stored["context_encoder"])
    predictor = Predictor(config)
    predictor.load_state_dict(stored["predictor"])

    figure, axes = plt.subplots(
        3, len(sounds), figsize=(10, 5.6), sharex=True, sharey=True, layout="constrained"
    )
    for column, sound in enumerate(sounds):
        clips = AudioClips(sound, log_mel.sample_rate, log_mel.clip_seconds)
        spectrogram = log_mel(clips[0].unsqueeze(0))
        num_patches = config.grid[0] * config.grid[1]
        generator = torch.Generator().manual_seed(column)
        context_idx, target_idx = random_mask(1, config.grid, num_patches // 2, generator)
        targets = normalise_targets(target_encoder(spectrogram), stored["settings"]["target_norm"])
        context = context_encoder(spectrogram, context_idx)
        predictions = predictor(context, context_idx, target_idx)
        masked_targets = targets.take_along_dim(target_idx.unsqueeze(-1), dim=1)
        error = (predictions - masked_targets).square().mean(-1)

        masked = torch.zeros(num_patches).scatter_(0, target_idx[0], 1.0)
        seen = spectrogram[0, 0].masked_fill(per_pixel(masked, config) > 0, torch.nan)
        errors = torch.full((num_patches,), torch.nan).scatter_(0, target_idx[0], error[0])
        seconds = log_mel.clip_seconds
        show_spectrogram(axes[0, column], spectrogram[0, 0], seconds, "magma")
        show_spectrogram(axes[1, column], seen, seconds, "magma")
        image = show_spectrogram(
            axes[2, column], per_pixel(errors, config), seconds, "viridis_r", 0, 1
        )
        axes[0, column].set_title(name_of(sound))
        axes[2, column].set_xlabel("seconds")
    for row, label in enumerate(["log-mel", "visible", "error"]):
        axes[row, 0].set_ylabel(label)
    for panel in axes.flat:
        panel.set_yticks([])
        panel.set_facecolor("#dddddd")
    figure.colorbar(image, ax=axes[2, :], pad=0.01, label="1: no idea")
    figure.savefig(out, dpi=DOTS_PER_INCH)


@torch.no_grad()
def draw_tokens(checkpoint, out, *sounds):
    """The first 10 s of each sound: its log-mel, and three principal components of its tokens as
    red, green and blue. The mean token of each mel band is subtracted first."""
    encoder = load_encoder(checkpoint)
    config = encoder.network.config
    figure, axes = plt.subplots(
        2, len(sounds), figsize=(10, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    for column, sound in enumerate(sounds):
        files = AudioClips(sound, encoder.sampling_rate).source
        waveform = next(files.windows(0, 10 * encoder.sampling_rate)).unsqueeze(0)
        seconds = waveform.shape[1] / encoder.sampling_rate
        tokens = encoder(waveform)[0].unflatten(1, (config.grid[1], config.dim))  # [R, 8, D]
        tokens = tokens - tokens.mean(0)
        flat = tokens.flatten(0, 1)
        directions = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
        colours = flat @ directions.T  # [R * 8, 3]
        low = colours.quantile(0.02, dim=0)
        high = colours.quantile(0.98, dim=0)
        colours = ((colours - low) / (high - low)).clamp(0, 1)
        picture = colours.view(len(tokens), -1, 3).transpose(0, 1)  # [8, R, 3]
        frames = encoder.log_mel.frames(waveform)[0]
        show_spectrogram(axes[0, column], frames, seconds, "magma")
        axes[1, column].imshow(
            picture,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, 128),
            interpolation="nearest",
        )
        axes[0, column].set_title(name_of(sound))
        axes[1, column].set_xlabel("seconds")
    axes[0, 0].set_ylabel("log-mel")
    axes[1, 0].set_ylabel("tokens")
    for panel in axes.flat:
        panel.set_yticks([])
    figure.savefig(out, dpi=DOTS_PER_INCH)


def draw_curves(out, healthy, collapsed):
    columns = ["loss", "explained", "token_std", "effective_rank"]
    figure, panels = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
    for run, colour, label in [
        (healthy, "#2a7f62", "healthy"),
        (collapsed, "#c1403d", "collapsed"),
    ]:
        with open(Path(run) / "log.csv", newline="") as file:
            lines = [line for line in csv.DictReader(file) if int(line["step"]) <= 2000]
        steps = [int(line["step"]) for line in lines]
        for panel, column in zip(panels, columns, strict=True):
            panel.plot(steps, [float(line[column]) for line in lines], color=colour, label=label)
            panel.set_title(column)
            panel.set_xlabel("step")
    panels[0].set_yscale("log")
    panels[1].set_ylim(-1, 1)
    panels[3].legend(frameon=False)
    figure.savefig(out, dpi=DOTS_PER_INCH)


def draw_hours(out, hours, *tasks):
    """The mean accuracy over the tasks, beside that of both baselines."""
    hours = [float(number) for number in hours.split(",")]
    accuracies = [json.loads(Path(task).read_text())["accuracy"] for task in tasks]
    views = list(accuracies[0])  # log-mel, untrained, and the checkpoints in the order of `hours`
    probes = list(accuracies[0]["log-mel"])
    figure, panels = plt.subplots(1, len(probes), figsize=(10, 3.2), layout="constrained")
    for panel, probe in zip(panels, probes, strict=True):
        means = {}
        for view in views:
            numbers = [accuracy[view][probe] for accuracy in accuracies]
            means[view] = sum(numbers) / len(numbers)
            print(probe, view, round(means[view], 3))
        trained = [means[view] for view in views[2:]]
        panel.plot(hours, trained, color="#2a7f62", marker="o", label="trained")
        panel.axhline(means["log-mel"], color="#555555", linestyle="--", label="log-mel")
        panel.axhline(means["untrained"], color="#b08a2e", linestyle=":", label="untrained")
        panel.set_xscale("log")
        panel.set_xticks(hours, [f"{number:g} h" for number in hours])
        panel.minorticks_off()
        panel.set_title(f"{probe} accuracy, mean of {len(tasks)} tasks")
    panels[0].legend(frameon=False)
    figure.savefig(out, dpi=DOTS_PER_INCH)


DRAW = {"mask": draw_mask, "tokens": draw_tokens, "curves": draw_curves, "hours": draw_hours}

if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in DRAW:
        sys.exit(__doc__)
    DRAW[sys.argv[1]](*sys.argv[2:])
