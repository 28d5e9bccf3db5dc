# SPDX-License-Identifier: MIT
"""Pretrain Audio-JEPA (sec. IV.C), with one process or with as many as torchrun starts.

    python train.py                                             the paper's sizes, synthetic clips
    torchrun --nproc_per_node=4 train.py --data /audioset       the paper's run

`train_step` is the method, `train` is a run from its flags to its end.

Masks, clips, windows and schedules are pure functions of (seed, step). So one process, several
processes, accumulated micro-batches, or a run that was cut off and started again with the same
--out are all the same run, up to the rounding of sums in another order. (One exception: with
--anti-collapse the clips of a micro-batch are compared with each other, so that it matters how a
batch is cut.) To continue, a checkpoint needs the weights, the optimizer and the number of the
step. It holds no random state, because there is none.

Letters in the shape comments: B clips of a micro-batch, N patches of a clip, C visible and M masked
ones, D encoder width, T spectrogram frames, F mel bands.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import timeit
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import FRAMES_PER_SECOND
from data import PATCH_SECONDS
from data import AudioClips
from data import Clips
from data import LogMel
from data import SyntheticClips
from data import clip_loader
from data import clip_order
from data import measure_mean_std
from data import printable
from data import usable_cores
from data import whole_file
from masking import MASKS
from masking import draw_masks
from masking import ema_decay
from masking import update_ema
from model import JEPA
from model import LOSSES
from model import PRESETS
from model import JEPAConfig
from model import VisionTransformer
from model import count_millions
from model import gather_tokens
from model import normalise_targets

CHECKPOINT_FORMAT = "audio-jepa 2"


def learning_rate(step: int, steps: int, peak: float = 3e-4, warmup: int = 1000) -> float:
    """Linear from 1e-6 to `peak` over `warmup` steps, then cosine to 0 at `steps` (sec. IV.C)."""
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def rows_of_process(batch_size: int, accum: int, rank: int, processes: int) -> list[slice]:
    """Which rows of a step's batch belong to a process, a slice for each of its micro-batches.

    With 16 clips in a step, accum = 2 and 2 processes, process 0 takes rows 0-3 and then 8-11,
    process 1 takes rows 4-7 and then 12-15. The rows hold for clips and for masks alike.
    """
    size = batch_size // (accum * processes)
    rows = []
    for micro in range(accum):
        first = (micro * processes + rank) * size
        rows.append(slice(first, first + size))
    return rows


@dataclass
class Run:
    """Everything that a step needs."""

    args: argparse.Namespace  # the flags
    device: torch.device
    precision: torch.dtype  # of autocast; float32 is no autocast
    rows: list[slice]  # of this process, see rows_of_process
    log_mel: LogMel
    model: JEPA  # context encoder and predictor: what gradient descent trains
    ddp_model: nn.Module  # the same, inside DDP if there are several processes
    target_encoder: VisionTransformer
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # for fp16 alone; else it does nothing


@dataclass
class StepResult:
    """What came out of a step in this process."""

    loss: float  # mean over the clips of this process
    grad_norm: float  # of all processes; NaN or Inf: the step was skipped
    targets: torch.Tensor  # [B * accum, N, D], as they came out of the target encoder
    target_idx: torch.Tensor  # [B * accum, M]


def train_step(run: Run, step: int, clips: list[torch.Tensor]) -> StepResult:
    """One optimizer step; `clips` are the micro-batches of this process, from the loader."""
    args = run.args

    # 1. Masks. Every process draws those of the whole batch, from (seed, step), and uses its rows.
    context_idx, target_idx = draw_masks(
        MASKS[args.mask],
        args.seed,
        step,
        args.batch_size,
        run.model.config.grid,
        args.mask_ratio,
        run.device,
    )
    losses = []
    all_targets = []
    for micro, rows in enumerate(run.rows):
        spectrogram = run.log_mel(clips[micro].to(run.device, non_blocking=True))  # [B, 1, T, F]

        # DDP averages the gradients of all processes during `backward`. Until the last micro-batch
        # they only add up in each process: one average of the sum is the same, and costs less.
        # (This is what DDP's no_sync() sets. On a model without DDP nobody reads it.)
        run.ddp_model.require_backward_grad_sync = micro == args.accum - 1

        mixed = run.precision != torch.float32
        with torch.autocast(run.device.type, dtype=run.precision, enabled=mixed):
            # 2. Targets. The target encoder sees the whole clip. It needs no backward pass, as the
            # gradient stops before the targets anyway: see the stop-gradient in JEPA.forward.
            with torch.no_grad():
                targets = run.target_encoder(spectrogram)  # [B, N, D]
            # 3. Context, prediction, loss.
            loss = run.ddp_model(spectrogram, context_idx[rows], target_idx[rows], targets)
        run.scaler.scale(loss / args.accum).backward()
        losses.append(loss.detach())
        all_targets.append(targets)

    # 4. Optimizer. The gradient is the same in all processes by now. If it is not finite, each of
    # them sees that, and all skip the step together.
    run.scaler.unscale_(run.optimizer)
    gradients = [parameter.grad for parameter in run.model.parameters()]
    grad_norm = torch.nn.utils.get_total_norm(gradients).item()
    if math.isfinite(grad_norm):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        run.scaler.step(run.optimizer)
        # 5. EMA. The target encoder follows the context encoder.
        decay = ema_decay(step, args.steps, args.ema, args.ema_end)
        update_ema(run.target_encoder, run.model.context_encoder, decay)
    run.scaler.update()
    run.optimizer.zero_grad()

    return StepResult(
        loss=torch.stack(losses).mean().item(),
        grad_norm=grad_norm,
        targets=torch.cat(all_targets),
        target_idx=torch.cat([target_idx[rows] for rows in run.rows]),
    )


@dataclass
class Progress:
    """How far a run has come; a part of its checkpoint."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent on them
    reads: int = 0  # recordings opened
    bad: int = 0  # of these, how many could not be used
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    # Since the last line of the log:
    losses: list[float] = dataclasses.field(default_factory=list)
    first_step: int = 0
    first_second: float = 0.0
    waited: float = 0.0  # seconds spent waiting for clips

    def start_interval(self):
        self.losses = []
        self.first_step = self.step
        self.first_second = self.seconds
        self.waited = 0.0


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        with StopSignals() as stop:
            train(args, stop)
    except OSError as error:  # a full disk, for instance
        fail(error, 1)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        fail(f"{error} (mostly for want of memory: fewer --workers need less)", 1)


def train(args: argparse.Namespace, stop: "StopSignals") -> None:
    """A run from its flags to its end."""
    out = Path(args.out)

    # Device, data, an earlier checkpoint. Whatever is wrong with them is said in one line.
    processes = launched_processes()
    is_first = processes.rank == 0
    try:
        device = choose_device()
        config = config_of(args)
        log_mel = LogMel(args.sample_rate, args.clip_seconds, config.time_bins, config.mel_bins)
        log_mel.to(device)
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # OSError if nothing can be written there
        checkpoint = find_checkpoint(out)
        first_weights = None
        if args.init is not None and checkpoint is None:
            first_weights = load_first_weights(args.init, config)
        clips = open_clips(args)
        progress = Progress()
        if checkpoint is not None:
            progress = Progress(**checkpoint["progress"])
        else:
            if is_first:
                say("measuring mean and std of the log-mel on the first 256 clips")
            log_mel.mean, log_mel.std = measure_mean_std(clips, log_mel, device, args.workers)
    except (OSError, ValueError) as error:
        fail(error)

    # Processes
    start_processes(processes, device)
    amp = from_first_process(choose_amp(args.amp, device.type, checkpoint))
    settings = settings_of(args, clips, amp)
    refuse_disagreement(settings | {"step": progress.step})
    # All have measured the same clips, but one may have failed to read what another could.
    log_mel.mean, log_mel.std = from_first_process((log_mel.mean, log_mel.std))

    # Networks and optimizer. Resume, or begin.
    run = build_run(args, config, log_mel, processes, device, PRECISIONS[amp])
    if checkpoint is not None:
        resume(run, checkpoint, settings)
    elif first_weights is not None:
        start_from(run, first_weights)
    del checkpoint, first_weights  # they are as large as the run itself
    if is_first:
        say(describe(run, clips, processes, progress))
        cut_log(out / "log.csv", progress.step)

    # Loop
    steps = range(progress.step, args.steps)
    order = clip_order(len(clips), args.seed, args.batch_size, steps, run.rows)
    batches = iter(clip_loader(clips, order, args.workers))
    show_bar = is_first and sys.stderr.isatty()
    saved = time.monotonic()
    for step in tqdm(steps, initial=progress.step, total=args.steps, disable=not show_bar):
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(args.accum)]
        waited = time.perf_counter() - began
        note_bad_files(out / "bad_files.txt", micro_batches)
        result = train_step(run, step, [batch.audio for batch in micro_batches])

        # What all processes have to know: the mean loss, what was read, and whether any of them is
        # asked to stop. The four numbers are added up together, in one exchange a step.
        reads = sum(batch.reads for batch in micro_batches)
        bad = sum(len(batch.bad) for batch in micro_batches)
        ours = [result.loss / processes.count, reads, bad, stop.requested]
        of_all = sum_over_processes(torch.tensor(ours, device=device))
        mean_loss, all_reads, all_bad, asked_to_stop = of_all.tolist()

        progress.step = step + 1
        progress.reads += int(all_reads)
        progress.bad += int(all_bad)
        progress.seconds += time.perf_counter() - began
        progress.waited += waited
        if math.isfinite(result.grad_norm):
            progress.losses.append(mean_loss)
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        stop_if_hopeless(progress, out)

        ends_here = progress.step == args.steps or asked_to_stop > 0
        if progress.step % args.log_every == 0 or progress.step in (1, args.steps):
            row = log_row(run, progress, result, mean_loss, len(clips))
            if is_first:
                write_row(out / "log.csv", row)
            progress.start_interval()
        keep = progress.step % args.save_every == 0
        if is_first and (keep or ends_here or time.monotonic() - saved > 600):
            save(run, progress, settings, out, keep)
            saved = time.monotonic()
        if ends_here:
            break

    if is_first:
        say(f"{progress.step} of {args.steps} steps done, saved in {printable(out / 'last.pt')}")
    end_processes()


def build_run(args, config, log_mel, processes, device, precision) -> Run:
    """Networks and optimizer of a new run. Every process draws the same weights."""
    torch.manual_seed(args.seed)
    model = JEPA(config, args.loss, args.target_norm, args.anti_collapse).to(device)
    target_encoder = copy.deepcopy(model.context_encoder).requires_grad_(False)
    if args.compile:
        for network in (model.context_encoder, model.predictor, target_encoder):
            network.compile()  # in place, so that the names of weights stay
    # The target encoder stays outside DDP, which is there to average gradients, and it has
    # none. Its copies stay identical all the same: they start alike, and each of them follows
    # a context encoder that DDP keeps identical.
    ddp_model = model
    if processes.count > 1:
        ddp_model = DistributedDataParallel(
            model,
            broadcast_buffers=False,  # they are position tables, which never change
            gradient_as_bucket_view=True,  # saves a copy of all gradients
        )
    return Run(
        args=args,
        device=device,
        precision=precision,
        rows=rows_of_process(args.batch_size, args.accum, processes.rank, processes.count),
        log_mel=log_mel,
        model=model,
        ddp_model=ddp_model,
        target_encoder=target_encoder,
        optimizer=make_optimizer(model, args.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
    )


# ------------------------------------------------------------------------------------------------
# The method ends here. What follows are its instruments and its plumbing.


# ---- Monitors: does it learn, or does it collapse? The loss alone does not tell.


@torch.no_grad()
def monitors(targets: torch.Tensor) -> dict[str, float]:
    """Do the targets [B, N, D] of all processes collapse? Then some of the first three of these
    numbers fall, and mostly the last rises towards 1. What is normal depends on the data and on the
    batch size: compare with step 1.

    token_std: std over the tokens of a clip, mean over clips and features; 0 if the tokens of a
    clip are alike. The others look at the pooled targets, the mean token of each clip:
    target_std: std over the clips, mean over the features; 0 if all clips are alike.
    effective_rank: how many directions they use, exp of the entropy of the singular values
    (RankMe); at most min(B - 1, D).
    mean_cosine: between two different clips; 1 if all point the same way.
    """
    token_std = mean_over_processes(targets.std(1, correction=0).mean()).item()
    pooled = gather_from_processes(targets.mean(1)).cpu().double()
    clips = len(pooled)
    effective_rank = math.nan
    if pooled.isfinite().all():  # else the step was skipped, and svdvals takes no NaN
        singular = torch.linalg.svdvals(pooled - pooled.mean(0))
        singular = singular[singular > 1e-6 * pooled.norm()]  # the rest is rounding
        entropy = torch.special.entr(singular / singular.sum()).sum().item()
        effective_rank = math.exp(entropy)
    units = F.normalize(pooled)
    pairs = (units @ units.T).sum().item() - clips  # the diagonal is 1: each clip and itself
    return {
        "token_std": token_std,
        "target_std": pooled.std(0, correction=0).mean().item(),
        "effective_rank": effective_rank,
        "mean_cosine": pairs / max(clips * (clips - 1), 1),
    }


@torch.no_grad()
def explained(jepa: JEPA, loss: float, targets: torch.Tensor, target_idx: torch.Tensor) -> float:
    """1 - loss / blind loss: the share of the targets' variety that is predicted.

    Blind is a predictor that knows no sound, and answers with the mean target of each position over
    the batch (of all processes). At 0 or below, nothing about the sound is predicted, however small
    the loss is; 1 is a perfect prediction. A clip is a part of its own mean, so that this number
    is lower in a small batch. targets [B, N, D], target_idx [B, M].
    """
    targets = normalise_targets(targets, jepa.target_norm)
    mean = mean_over_processes(targets.mean(0))  # [N, D]
    blind_loss = jepa.loss_function(mean[target_idx], gather_tokens(targets, target_idx))
    blind_loss = mean_over_processes(blind_loss).item()
    if blind_loss == 0:  # one clip is its own mean
        return math.nan
    return 1 - loss / blind_loss


# ---- The log


def log_row(run, progress, result, loss, num_clips):
    """A line of the log. All processes call this together, as they compare their targets."""
    args = run.args
    step = progress.step - 1
    interval_steps = progress.step - progress.first_step
    seconds = progress.seconds - progress.first_second
    return {
        "step": progress.step,
        "epoch": progress.step * args.batch_size / num_clips,
        "seconds": progress.seconds,
        "loss": sum(progress.losses) / len(progress.losses) if progress.losses else math.nan,
        "explained": explained(run.model, loss, result.targets, result.target_idx),
        "lr": learning_rate(step, args.steps, args.lr, args.warmup),
        "ema_decay": ema_decay(step, args.steps, args.ema, args.ema_end),
        "masked": result.target_idx.shape[1],
        "grad_norm": result.grad_norm,
        **monitors(result.targets),
        "clips_per_s": interval_steps * args.batch_size / seconds,
        "data_wait": progress.waited / seconds,
        "memory_gib": memory_gib(run.device),
        "bad_files": progress.bad,
        "skipped": progress.skipped,
    }


def write_row(path, row):
    cells = {name: f"{value:.7g}" for name, value in row.items()}
    say("  ".join(f"{name} {cell}" for name, cell in cells.items()))
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, cells.keys(), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(cells)


def say(text):
    """Print at once, because a log is read while it is written. A run goes on without a reader."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cut_log(path, step):
    """Drop the lines of steps that will be logged again, and half a line at the end."""
    if step == 0 or not path.exists() or path.stat().st_size == 0:
        path.unlink(missing_ok=True)
        return
    header, *rows = path.read_text().splitlines(keepends=True)
    kept = [row for row in rows if row.endswith("\n") and float(row.split(",")[0]) <= step]
    with whole_file(path) as file:
        file.write("".join([header, *kept]).encode())


# ---- Model, optimizer and checkpoints


def config_of(args) -> JEPAConfig:
    """The preset and the flags that change it."""
    return dataclasses.replace(
        PRESETS[args.model],
        time_bins=round(args.clip_seconds * FRAMES_PER_SECOND),
        positions=args.positions,
        patch_scale=args.patch_scale,
    )


def make_optimizer(model, weight_decay):
    """AdamW (sec. IV.C). Biases, norms and the mask token, all of one dimension, do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


MAY_CHANGE = (  # when a run is continued
    "out",
    "accum",  # only rounding depends on it; with --anti-collapse, also which clips are compared
    "compile",
    "workers",
    "save_every",
    "log_every",
    "init",  # which only a new run reads
    "recipe",  # the flags that it sets are compared
)


def settings_of(args, clips, amp):
    """What makes a run the run it is, to be compared when it is continued. The recordings may lie
    elsewhere and --amp may be spelled out, so what is compared is what they stand for."""
    settings = vars(args) | {"data": clips.source.fingerprint, "amp": amp}
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE}


def parts_of(run):
    """What has a state of its own, by its name in a checkpoint."""
    return {
        "context_encoder": run.model.context_encoder,
        "target_encoder": run.target_encoder,
        "predictor": run.model.predictor,
        "optimizer": run.optimizer,
        "scaler": run.scaler,
    }


def save(run, progress, settings, out, keep):
    """Write last.pt, and if `keep` is set also step-*.pt. That one is for extraction: without the
    optimizer's two numbers for each weight, no run can be continued from it."""
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "step": progress.step,
        "config": {"model": vars(run.model.config), "log_mel": run.log_mel.config},
        "progress": vars(progress),
        "settings": settings,
    }
    for name, part in parts_of(run).items():
        checkpoint[name] = part.state_dict()
    with whole_file(out / "last.pt") as file:
        torch.save(checkpoint, file)
    if keep:
        del checkpoint["optimizer"]
        with whole_file(out / f"step-{progress.step:07d}.pt") as file:
            torch.save(checkpoint, file)


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint as plain data: nothing in the file is executed.

    ValueError if it is damaged, of another format, or holds more than tensors and plain types.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name the last.pt or a step-*.pt in it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        is_ours = checkpoint["format"] == CHECKPOINT_FORMAT
    except Exception as error:  # a damaged file can make torch.load raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a checkpoint that can be read ({reason})") from None
    if not is_ours:
        raise ValueError(f"{path}: of the format {checkpoint['format']}, not {CHECKPOINT_FORMAT}")
    return checkpoint


# ---- To go on, and to begin with the weights of another run


def find_checkpoint(out):
    """last.pt of a run to be continued, or None for a new run. ValueError if it cannot be read."""
    path = out / "last.pt"
    if path.exists():
        checkpoint = load_checkpoint(path)
        if "optimizer" not in checkpoint:
            raise ValueError(f"{path} holds no optimizer: use --init {path} with another --out")
        return checkpoint
    if any(out.glob("step-*.pt")):
        raise ValueError(f"{out} holds a run without its last.pt: start with another --out")
    return None


def resume(run, checkpoint, settings):
    """Bring a run to where a checkpoint stands."""
    for name, before in checkpoint["settings"].items():
        value = settings.get(name)
        if before != value:
            flag = "--" + name.replace("_", "-")
            end_processes()
            fail(
                f"{flag} is {value}, but the run in {run.args.out} has {before}: "
                f"keep to it, or use --init {run.args.out}/last.pt with another --out"
            )
    for name, part in parts_of(run).items():
        part.load_state_dict(checkpoint[name])
    run.log_mel.mean = checkpoint["config"]["log_mel"]["mean"]
    run.log_mel.std = checkpoint["config"]["log_mel"]["std"]


def load_first_weights(path, config):
    """--init: a checkpoint to begin with. ValueError if its networks work in another way."""
    first_weights = load_checkpoint(path)
    theirs = JEPAConfig(**first_weights["config"]["model"])
    for name in ("positions", "patch_size"):  # of which the shapes of weights do not tell
        before = getattr(theirs, name)
        value = getattr(config, name)
        if before != value:
            raise ValueError(f"--init {path} has {name} {before}, and this run {value}")
    return first_weights


def start_from(run, first_weights):
    """--init: begin with the networks of a checkpoint, of which there may be fewer than three."""
    for name in ("context_encoder", "target_encoder", "predictor"):
        if name in first_weights:
            network = parts_of(run)[name]
            first_weights[name]["pos_embed"] = network.pos_embed  # of clips of our length
            try:
                network.load_state_dict(first_weights[name])
            except RuntimeError:
                end_processes()
                fail(f"--init {run.args.init} does not fit --model {run.args.model}")


# ---- Data of a run


def open_clips(args) -> Clips:
    """What --data names. ValueError says what is wrong with it."""
    if args.data is None:
        return SyntheticClips(args.sample_rate, args.clip_seconds, args.seed)
    return AudioClips(args.data, args.sample_rate, args.clip_seconds, args.seed)


def note_bad_files(path, batches):
    """Name what could not be read, each recording once; stop where there is nothing else."""
    for batch in batches:
        for name, reason in batch.bad:
            line = f"{printable(name)}\t{printable(reason)}\n"
            if not path.exists() or line not in path.read_text().splitlines(keepends=True):
                with open(path, "a") as file:
                    file.write(line)
        if batch.audio is None:
            name, reason = batch.bad[-1]
            fail(f"ten recordings in a row cannot be used, at last {printable(name)}: {reason}", 1)


def stop_if_hopeless(progress, out):
    if progress.skipped_in_a_row == 20:
        fail(f"no finite gradient in 20 steps, at step {progress.step}; last.pt is as it was", 1)
    if progress.bad > max(10, 0.1 * progress.reads):
        bad_files = out / "bad_files.txt"
        fail(f"{progress.bad} of {progress.reads} reads of recordings failed: see {bad_files}", 1)


def describe(run, clips, processes, progress):
    """What is about to happen."""
    args = run.args
    device = str(run.device)
    if run.device.type == "cuda":
        device = f"{torch.cuda.get_device_name()} ({device})"
    epochs = args.steps * args.batch_size / len(clips)
    recipe_flags = [
        f"--{name.replace('_', '-')} {vars(args)[name]}" for name in RECIPES[args.recipe]
    ]
    data = clips.source.fingerprint
    if args.data is not None:
        data += f" in {printable(args.data)}"
    lines = [
        f"data       {data}",
        f"recipe     {' '.join([args.recipe, *recipe_flags])}",
        f"log-mel    mean {run.log_mel.mean:.4f}, std {run.log_mel.std:.4f}",
        f"model      {args.model}, {count_millions(run.model):.1f} M parameters in training",
        f"device     {device}, {run.precision}, {processes.count} processes",
        f"steps      {progress.step} of {args.steps} done, {args.batch_size} clips each; "
        f"{epochs:.4g} epochs in all",
        f"log        {printable(Path(args.out) / 'log.csv')}",
    ]
    return "\n".join(lines)


# ---- Device and precision


def choose_device() -> torch.device:
    """A GPU for each process of a machine, else MPS, else the CPU."""
    processes = launched_processes()
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if processes.local_count > gpus:
            raise ValueError(f"{processes.local_count} processes on a machine of {gpus} GPUs")
        torch.cuda.set_device(processes.local_rank)
        return torch.device("cuda", processes.local_rank)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def choose_amp(amp: str, device_type: str, checkpoint: dict | None = None) -> str:
    """--amp as one of PRECISIONS. `auto` stays what it was when the run of a checkpoint began.

    It is bf16 where the hardware multiplies it, and fp16 on older GPUs. On a CPU we try both: of
    two that claim to multiply bf16, one did so 4 times as fast as fp32, the other half as fast.
    """
    if amp != "auto":
        return amp
    if checkpoint is not None:
        return checkpoint["settings"]["amp"]
    if device_type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp16"
    if device_type == "cpu" and bf16_is_faster():
        return "bf16"
    return "off"


@functools.cache
def bf16_is_faster():
    """Time a matrix product on the CPU. bf16 must win clearly, as its casts cost time as well."""
    fp32 = torch.ones(1024, 1024)
    bf16 = fp32.bfloat16()
    seconds_fp32 = []
    seconds_bf16 = []
    for _ in range(12):  # in turns, so that whatever else the machine is doing slows down both
        seconds_fp32.append(timeit.timeit(lambda: fp32 @ fp32, number=1))
        seconds_bf16.append(timeit.timeit(lambda: bf16 @ bf16, number=1))
    return min(seconds_bf16) < min(seconds_fp32) / 1.5


def memory_gib(device):
    """Most memory used so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---- Processes and signals


@dataclass(frozen=True)
class Processes:
    """Who we are among the processes of a run."""

    rank: int = 0  # this process, 0 to count - 1
    count: int = 1
    local_rank: int = 0  # this process on its machine; also the number of its GPU
    local_count: int = 1


def launched_processes() -> Processes:
    """Read what torchrun has set. One process, if the environment is not that of a launcher: some
    clusters and containers set WORLD_SIZE for everybody."""

    def is_set(*names):
        return all(os.environ.get(name) for name in names)

    if not is_set("RANK", "WORLD_SIZE", "MASTER_ADDR") or os.environ["WORLD_SIZE"] == "1":
        return Processes()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not is_set(*names):
        fail("RANK and WORLD_SIZE are set, but no LOCAL_RANK: start it with torchrun")
    return Processes(*[int(os.environ[name]) for name in names])


def start_processes(processes, device):
    """Connect the processes, if there are several."""
    if processes.count == 1:
        return
    if device.type == "cpu":
        # torchrun gives each process one thread, however many cores there are.
        torch.set_num_threads(max(1, usable_cores() // processes.local_count))
    store = next(dist.rendezvous("env://"))[0]
    if processes.local_count == processes.count:
        # torchrun --max-restarts: the store still knows the addresses of processes that died
        # (pytorch#135712). So each restart gets a part of it for itself. Machines may count their
        # restarts differently, so we do this on a single one only.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=processes.rank, world_size=processes.count)


def end_processes():
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()


def from_first_process(value):
    """The value that process 0 has, in all processes."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def refuse_disagreement(settings):
    """Processes that differ in their settings or their step would average unrelated gradients."""
    if not dist.is_initialized():
        return
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, settings)
    for rank, others in enumerate(of_all):
        for name, value in settings.items():
            if others[name] != value:
                end_processes()  # together: gloo aborts where a connection is lost
                fail(
                    f"{name} is {value}, but {others[name]} in process {rank}: all need the same "
                    "flags and data, and one --out that they share"
                )


def sum_over_processes(tensor):
    """The sum in all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor):
    if dist.is_initialized():
        tensor = sum_over_processes(tensor) / dist.get_world_size()
    return tensor


def gather_from_processes(tensor):
    """[B, D] in each process -> [B * processes, D] in all of them."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


class StopSignals:
    """SIGTERM and SIGINT (Ctrl-C) ask a run to finish its step, save and end.

    A second one ends it at once, for a run that hangs; but not within 5 seconds, as torchrun passes
    on signals that its processes have got already.
    """

    def __enter__(self):
        self.requested_at = math.inf
        numbers = (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            numbers = ()  # Python hands signals to the main thread only
        self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    @property
    def requested(self) -> bool:
        return self.requested_at < math.inf

    def handle(self, number, frame):
        now = time.monotonic()
        if now > self.requested_at + 5:
            # A worker may hang in a read, so that only a kill ends it. The loader would raise an
            # error as the first one dies, and the others would stay.
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + number)
        if not self.requested and launched_processes().rank == 0:
            with contextlib.suppress(OSError):  # nobody may read it
                os.write(2, b"\nstopping after this step; a signal after 5 s stops at once\n")
        self.requested_at = min(self.requested_at, now)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- Flags


def fail(message, code=2):
    """One line on stderr, and out. The error of a loader worker ends with the line that counts."""
    line = str(message).strip().rpartition("\n")[2]
    if "RANK" in os.environ:
        line = f"process {os.environ['RANK']}: {line}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def share(text):
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


RECIPES = {  # flags that belong together; one that is given on the command line wins
    "paper": {},  # the defaults
    "small": {  # for some hours of sound and an hour of a CPU core; the README tells why
        "model": "tiny",
        "clip_seconds": 2.5,
        "batch_size": 32,
        "steps": 12000,
        "lr": 2e-3,
        "warmup": 1000,
        "ema": 0.99,
        "ema_end": 0.9995,
        "target_norm": "clip",
        "anti_collapse": 0.001,
        "positions": "rotary",
        "patch_scale": 3.3,
    },
}


def parse_args(argv):
    recipe = OneLineParser(add_help=False)  # read first, because it sets the other defaults
    recipe.add_argument(
        "--recipe", choices=list(RECIPES), default="paper", help="a set of flags, printed at start"
    )
    parser = OneLineParser(
        description="Pretrain Audio-JEPA. The defaults are the paper's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[recipe],
    )
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder, list, tar shards, packed folder; none: synthetic")
    add(
        "--out", metavar="DIR", default="runs/audio-jepa", help="log, checkpoints; goes on if there"
    )
    add("--init", metavar="CHECKPOINT", help="begin with its weights of another run")
    add("--model", choices=list(PRESETS), default="base", help="size of the networks")
    add(
        "--positions",
        choices=["sincos", "rotary"],
        default="sincos",
        help="of patches: a code that is added to them, or a rotation of queries and keys",
    )
    add("--patch-scale", type=float, default=1.0, help="multiplies the first patch embedding")
    add("--steps", type=positive, default=100000, help="optimizer steps of the whole run")
    add(
        "--batch-size",
        type=positive,
        default=256,
        help="clips in a step, of all processes together",
    )
    add("--accum", type=positive, default=1, help="micro-batches in a step, to save memory")
    add("--lr", type=float, default=3e-4, help="peak learning rate")
    add("--warmup", type=int, default=1000, help="steps from lr 1e-6 to the peak")
    add("--weight-decay", type=float, default=0.05, help="of AdamW, on matrices only")
    add("--ema", type=share, default=0.996, help="decay of the target encoder at step 0")
    add("--ema-end", type=share, default=1.0, help="decay of the target encoder at the last step")
    add(
        "--target-norm",
        choices=["token", "clip"],
        default="token",
        help="normalise targets over the features of a token, or over the tokens of a clip",
    )
    add(
        "--loss", choices=list(LOSSES), default="l2", help="l2 is eq. (2), cosine the authors' code"
    )
    add(
        "--anti-collapse",
        type=float,
        default=0.0,
        help="weight of a variance-covariance term on the context tokens",
    )
    add("--mask", choices=list(MASKS), default="random", help="which patches are masked")
    add(
        "--mask-ratio",
        type=share,
        nargs=2,
        default=[0.4, 0.6],
        metavar=("LO", "HI"),
        help="share of the patches that is masked, drawn once a step",
    )
    add("--sample-rate", type=int, default=32000, help="Hz, a multiple of 128")
    add("--clip-seconds", type=float, default=10.0, help="a multiple of a patch, 0.625")
    add("--amp", choices=["auto", *PRECISIONS], default="auto", help="mixed precision; off: fp32")
    add("--compile", action="store_true", help="torch.compile the three networks")
    add("--workers", type=int, default=default_workers(), help="that read clips, for each process")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add(
        "--save-every",
        type=positive,
        default=10000,
        help="steps between the checkpoints that are kept",
    )
    add("--log-every", type=positive, default=50, help="steps between the lines of the log")
    chosen, _ = recipe.parse_known_args(argv)
    parser.set_defaults(**RECIPES[chosen.recipe])
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser, args):
    """Refuse what does not fit together."""
    processes = launched_processes().count
    low, high = args.mask_ratio
    if args.batch_size % (args.accum * processes) != 0:
        parser.error(
            f"--batch-size {args.batch_size} is not a multiple of --accum {args.accum} x "
            f"{processes} processes"
        )
    if args.warmup >= args.steps:
        shorter = args.steps // 10
        if launched_processes().rank == 0:
            say(f"--warmup {args.warmup} is not below --steps {args.steps}: cut to {shorter}")
        args.warmup = shorter
    check_multiple(parser, "--clip-seconds", args.clip_seconds, PATCH_SECONDS)
    check_multiple(parser, "--sample-rate", args.sample_rate, 128)
    patches = math.prod(config_of(args).grid)
    if not 1 <= round(low * patches) <= round(high * patches) < patches:
        parser.error(
            f"--mask-ratio {low} {high}: of {patches} patches some must be masked, not all"
        )


def check_multiple(parser, flag, value, unit):
    if value <= 0 or value % unit != 0:
        below = max(value // unit, 1) * unit
        parser.error(
            f"{flag} {value}: a multiple of {unit} is needed, as {below} or {below + unit} "
            "(recordings of any length and rate will do)"
        )


def default_workers():
    """A worker for each core but one, and at most 16."""
    cores = usable_cores() // launched_processes().local_count
    return max(1, min(16, cores - 1))


if __name__ == "__main__":
    main()
