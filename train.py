# SPDX-License-Identifier: MIT
"""Pretrain Audio-JEPA (sec. IV.C), with one process or with as many as torchrun starts.

    python train.py                                             the paper's sizes, synthetic clips
    torchrun --nproc_per_node=4 train.py --data /audioset       the paper's run

`train_step` is the method, `train` is a run from its flags to its end.

Masks, clips and schedules are pure functions of (seed, step). So one process, several processes,
accumulated micro-batches, and a run that was stopped and started again with the same --out are all
the same run on one kind of device, up to the rounding of sums in another order. A checkpoint holds
no random state.

`args` are all flags, `settings` those that define a run, `config` the sizes of the networks.

Letters in the shape comments: B clips of a micro-batch, K masks of a clip, N patches of a clip,
C visible and M masked ones, D encoder width, T spectrogram frames, F mel bands.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import signal
import sys
import time
import timeit
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    FRAMES_PER_SECOND,
    PATCH_SECONDS,
    AudioClips,
    LogMel,
    SyntheticClips,
    clip_loader,
    clip_order,
    measure_mean_std,
    printable,
    usable_cores,
    whole_file,
)
from masking import MASKS, draw_masks, ema_decay, update_ema
from model import (
    JEPA,
    LOSSES,
    PRESETS,
    VisionTransformer,
    count_millions,
    normalise_targets,
)

CHECKPOINT_FORMAT = "audio-jepa 2"


def learning_rate(step: int, steps: int, peak: float = 3e-4, warmup: int = 1000) -> float:
    """Linear from 1e-6 to `peak` over `warmup` steps, then cosine to 0 at `steps` (sec. IV.C)."""
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def shares_of_process(batch_size: int, accum: int, rank: int, processes: int) -> list[slice]:
    """The part of a step's batch that a process takes, a slice for each of its micro-batches.

    With 16 clips in a step, accum = 2 and 2 processes, process 0 takes clips 0-3 and then 8-11,
    process 1 takes clips 4-7 and then 12-15. The same slices pick clips and their masks.
    """
    size = batch_size // (accum * processes)
    firsts = range(rank * size, batch_size, processes * size)
    return [slice(first, first + size) for first in firsts]


@dataclass
class Run:
    """Everything that a step needs."""

    args: argparse.Namespace  # the flags
    device: torch.device
    precision: torch.dtype  # of autocast; float32: autocast is off
    shares: list[slice]  # of this process, see shares_of_process
    log_mel: LogMel
    model: JEPA  # context encoder and predictor: what gradient descent trains
    ddp_model: nn.Module  # the same, inside DDP if there are several processes
    target_encoder: VisionTransformer
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # used with fp16 only


@dataclass
class StepResult:
    """What came out of a step in this process."""

    loss: float  # mean over the clips of this process
    grad_norm: float  # over all processes; NaN or Inf: the step was skipped
    targets: list[Tensor]  # [B, N, D] of each micro-batch, from the target encoder
    target_idx: list[Tensor]  # [B K, M] of each micro-batch; the K rows of a clip are consecutive


def train_step(run: Run, step: int, clips: list[Tensor]) -> StepResult:
    """One optimizer step; `clips` are the micro-batches of this process, from the loader."""
    args = run.args
    result = StepResult(loss=0.0, grad_norm=math.nan, targets=[], target_idx=[])

    # 1. Masks, K for each clip, in the order of the clips. Every process draws those of the whole
    # batch, and uses its share.
    context_idx, target_idx = draw_masks(
        MASKS[args.mask],
        args.seed,
        step,
        args.batch_size * args.masks_per_clip,
        run.model.config.grid,
        args.mask_ratio,
        run.device,
    )
    losses = []
    for micro, share in enumerate(run.shares):
        rows = slice(share.start * args.masks_per_clip, share.stop * args.masks_per_clip)
        spectrogram = run.log_mel(clips[micro].to(run.device, non_blocking=True))  # [B, 1, T, F]
        # DDP averages the gradients over the processes during `backward`. Once a step is enough, so
        # before the last micro-batch they are only added up in each process.
        gradient_sync = contextlib.nullcontext()
        if run.ddp_model is not run.model and micro < args.accum - 1:
            gradient_sync = run.ddp_model.no_sync()
        with gradient_sync:
            autocast = run.precision != torch.float32
            with torch.autocast(run.device.type, dtype=run.precision, enabled=autocast):
                # 2. Targets. The target encoder sees the whole clip. It needs no backward pass,
                # because of the stop-gradient: see JEPA.forward.
                with torch.no_grad():
                    targets = run.target_encoder(spectrogram)  # [B, N, D]
                # 3. Context, prediction and loss of each mask. The masks of a clip share targets.
                loss = run.ddp_model(
                    spectrogram.repeat_interleave(args.masks_per_clip, dim=0),
                    context_idx[rows],
                    target_idx[rows],
                    targets.repeat_interleave(args.masks_per_clip, dim=0),
                )
            run.scaler.scale(loss / args.accum).backward()
        losses.append(loss.detach())
        result.targets.append(targets)
        result.target_idx.append(target_idx[rows])
    result.loss = torch.stack(losses).mean().item()

    # Skip a step whose gradient is not finite. All processes have the same gradient by now, so all
    # of them skip it.
    run.scaler.unscale_(run.optimizer)
    gradients = [parameter.grad for parameter in run.model.parameters()]
    result.grad_norm = torch.nn.utils.get_total_norm(gradients).item()
    if not math.isfinite(result.grad_norm):
        run.scaler.update()  # lowers the scale of fp16
        run.optimizer.zero_grad()
        return result

    # 4. Optimizer.
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()

    # 5. EMA. The target encoder follows the context encoder.
    decay = ema_decay(step, args.steps, args.ema, args.ema_end)
    update_ema(run.target_encoder, run.model.context_encoder, decay)
    return result


def build_run(args, config, log_mel, processes, device, precision):
    """Networks and optimizer of a new run. Every process draws the same weights."""
    torch.manual_seed(args.seed)
    model = JEPA(config, args.loss, args.target_norm).to(device)
    target_encoder = copy.deepcopy(model.context_encoder).requires_grad_(False)
    if args.compile:
        for network in (model.context_encoder, model.predictor, target_encoder):
            network.compile()  # in place, so that the names of the weights stay
    # The target encoder stays outside DDP, because it has no gradients to average. Its copies are
    # identical all the same: they start alike, and each follows a context encoder that DDP keeps
    # identical.
    ddp_model = model
    if processes.count > 1:
        ddp_model = nn.parallel.DistributedDataParallel(
            model,
            broadcast_buffers=False,  # they are position tables, which never change
            gradient_as_bucket_view=True,  # saves a copy of all gradients
        )
    # AdamW (sec. IV.C), whose learning rate is set in train_step. Biases, norms and the mask token
    # have one dimension, and no decay.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    return Run(
        args=args,
        device=device,
        precision=precision,
        shares=shares_of_process(args.batch_size, args.accum, processes.rank, processes.count),
        log_mel=log_mel,
        model=model,
        ddp_model=ddp_model,
        target_encoder=target_encoder,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
    )


@dataclass
class Progress:
    """How far a run has come; a part of its checkpoint."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent on them
    reads: int = 0  # recordings opened
    bad: int = 0  # those that could not be used
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0


@dataclass
class Interval:
    """What has happened since the last line of the log. A resumed run begins a new interval."""

    seconds: float = 0.0  # spent on steps
    waited: float = 0.0  # a part of it, spent waiting for clips
    losses: list[float] = dataclasses.field(default_factory=list)  # of each step; skipped: NaN


def main(argv=None):
    args = parse_args(argv)
    try:
        train(args, StopSignals())
    except OSError as error:  # a full disk, for instance
        fail(error, 1)


def train(args, stop):
    """A run from its flags to its end."""
    out = Path(args.out)
    last = out / "last.pt"
    processes = launched_processes()
    try:
        # ---- Build: the device, the data, the networks. An error becomes one line (see `fail`).
        device = choose_device()
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.csv").touch()  # OSError if nothing can be written there
        progress = Progress()
        checkpoint = None
        initial = None
        if last.exists():
            checkpoint = load_checkpoint(last)
            if "optimizer" not in checkpoint:
                raise ValueError(f"{last} has no optimizer: use --init {last} with another --out")
            progress = Progress(**checkpoint["progress"])
        elif args.init is not None:
            initial = load_checkpoint(args.init)
        clips = open_clips(args)
        config = config_of(args)
        log_mel = LogMel(args.sample_rate, args.clip_seconds, config.time_bins, config.mel_bins)
        log_mel = log_mel.to(device)
        if checkpoint is not None:
            stored = checkpoint["config"]["log_mel"]
            log_mel.mean = stored["mean"]
            log_mel.std = stored["std"]
        else:
            if processes.is_first:
                say("measuring mean and std of the log-mel on the first 256 clips")
            log_mel.mean, log_mel.std = measure_mean_std(clips, log_mel, device, args.workers)
        connect(processes, device)
        # Up to here each process has worked alone, so that a wrong flag or path ends all of them at
        # once, and none waits for another. Now all take what the first has chosen and measured.
        amp = choose_amp(args.amp, device.type, checkpoint)
        chosen = (amp, log_mel.mean, log_mel.std)
        amp, log_mel.mean, log_mel.std = from_all_processes(chosen)[0]
        run = build_run(args, config, log_mel, processes, device, PRECISIONS[amp])

        # ---- Resume, or begin.
        settings = {name: getattr(args, name) for name in DEFINE_A_RUN}
        settings["data"] = clips.source.fingerprint  # the recordings instead of their path
        settings["amp"] = amp  # the precision that --amp auto has chosen
        # What may change when a run is resumed, but not from process to process.
        others = {"accum": args.accum, "log_every": args.log_every, "init": args.init}
        refuse_disagreement({"step": progress.step} | settings | others)
        if checkpoint is not None:
            resume(run, checkpoint, settings)
        elif initial is not None:
            start_from(run, initial)
    except (OSError, ValueError) as error:
        disconnect()  # all leave together, because gloo aborts if a peer disappears
        fail(error)
    del checkpoint, initial  # they are as large as the run itself
    if processes.is_first:
        cut_log(out / "log.csv", progress.step)
        named = [f"{name} {value}" for name, value in settings.items()]
        say("settings   " + "  ".join(named))
        say(f"log-mel    mean {log_mel.mean:.4f}, std {log_mel.std:.4f}")
        say(f"model      {count_millions(run.model):.1f} M parameters in training")
        say(f"device     {device}, {processes.count} processes")
        say(f"steps      {progress.step} of {args.steps} done")

    # ---- Loop.
    steps = range(progress.step, args.steps)
    order = clip_order(len(clips), args.seed, args.batch_size, steps, run.shares)
    batches = iter(clip_loader(clips, order, args.workers))
    interval = Interval()
    saved = time.monotonic()
    hide_bar = not (processes.is_first and sys.stderr.isatty())
    for step in tqdm(steps, initial=progress.step, total=args.steps, disable=hide_bar):
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(args.accum)]
        waited = time.perf_counter() - began
        bad = sum([batch.bad for batch in micro_batches], [])
        list_bad_files(out / "bad_files.txt", bad)
        result = train_step(run, step, [batch.clips for batch in micro_batches])

        reads = sum(batch.reads for batch in micro_batches)
        numbers = [result.loss / processes.count, waited, reads, len(bad), stop.requested]
        sums = torch.tensor(numbers, device=device)  # one exchange for all five
        if processes.count > 1:
            dist.all_reduce(sums)
        loss, waited, all_reads, all_bad, stops = sums.tolist()
        interval.waited += waited / processes.count
        seconds = time.perf_counter() - began
        interval.seconds += seconds
        progress.seconds += seconds
        progress.step = step + 1
        progress.reads += int(all_reads)
        progress.bad += int(all_bad)
        if math.isfinite(result.grad_norm):
            progress.skipped_in_a_row = 0
        else:
            progress.skipped_in_a_row += 1
            progress.skipped += 1
            loss = math.nan
        interval.losses.append(loss)
        stop_if_hopeless(progress, out)

        if progress.step % args.log_every == 0 or progress.step in (1, args.steps):
            line = log_line(run, progress, interval, result, len(clips))
            if processes.is_first:
                write_line(out / "log.csv", line)
            interval = Interval()
        # If one process is asked to stop, all of them do.
        ends_here = progress.step == args.steps or stops > 0
        keep = progress.step % args.save_every == 0
        if processes.is_first and (keep or ends_here or time.monotonic() - saved > 600):
            save(run, progress, settings, out, keep)
            saved = time.monotonic()
        if ends_here:
            break

    if processes.is_first:
        say(f"{progress.step} of {args.steps} steps done, saved in {last}")
        if progress.step == args.steps:
            say(f"embed your sounds: python extract.py {last} YOUR/FOLDER --out embeddings.npz")
            if args.data is None:
                flags = "--recipe small --data YOUR/FOLDER --out runs/mine"  # as in the README
                say(f"train on them: python train.py {flags}")
    disconnect()


# ------------------------------------------------------------------------------------------------
# The method ends here. What follows are its instruments and its plumbing.


# ---- Monitors: does it learn, or does it collapse? The loss alone does not tell.


@torch.no_grad()
def monitors(targets):
    """Collapse diagnostics. `targets` [B, N, D] are the clips of this process; all processes call
    this together, and look at the clips of all.

    In a collapse token_std, target_std and effective_rank fall, and mean_cosine usually rises
    towards 1. The two stds may recover while the rank stays low, so watch the rank. What is normal
    depends on the data and the batch size: compare with step 1.

    token_std: std over the tokens of a clip, mean over clips and features; 0 if the tokens of a
    clip are alike. The others look at the mean token of each clip:
    target_std: std over the clips, mean over the features; 0 if all clips are alike.
    effective_rank: how many directions they use, exp of the entropy of the singular values
    (RankMe); at most D, and below the number of clips.
    mean_cosine: between two different clips; 1 if all point the same way.
    """
    token_std = mean_over_processes(targets.std(1, correction=0).mean()).item()
    pooled = torch.cat(from_all_processes(targets.mean(1).cpu())).double()
    num_clips = len(pooled)
    effective_rank = math.nan
    if pooled.isfinite().all():  # else the step was skipped, and svdvals takes no NaN
        singular = torch.linalg.svdvals(pooled - pooled.mean(0))
        singular = singular[singular > 1e-6 * pooled.norm()]  # the rest is rounding
        entropy = torch.special.entr(singular / singular.sum()).sum().item()
        effective_rank = math.exp(entropy)
    units = nn.functional.normalize(pooled)
    pairs = (units @ units.T).sum().item() - num_clips  # without each clip and itself, which give 1
    return {
        "token_std": token_std,
        "target_std": pooled.std(0, correction=0).mean().item(),
        "effective_rank": effective_rank,
        "mean_cosine": pairs / max(num_clips * (num_clips - 1), 1),
    }


@torch.no_grad()
def explained(jepa, loss, targets, target_idx):
    """1 - loss / blind loss: the share of the targets' variance that is predicted.

    A blind predictor hears nothing: it predicts the mean target of each position over the batch of
    all processes. At 0 or below, nothing about the sound is predicted, however small the loss is; 1
    is a perfect prediction. In a small batch the number is lower, because a clip is a part of its
    own mean. targets [B K, N, D], repeated for the K masks; target_idx [B K, M].
    """
    targets = normalise_targets(targets, jepa.target_norm)
    mean = mean_over_processes(targets.mean(0)).to(targets.device)  # [N, D]
    masked_targets = targets.take_along_dim(target_idx.unsqueeze(-1), dim=1)  # [B, M, D]
    blind_loss = jepa.loss_function(mean[target_idx], masked_targets)
    blind_loss = mean_over_processes(blind_loss).item()
    if blind_loss == 0:  # one clip is its own mean
        return math.nan
    return 1 - loss / blind_loss


# ---- The log


def log_line(run, progress, interval, result, num_clips):
    """A line of the log. All processes call this together, because it compares their targets."""
    args = run.args
    step = progress.step - 1
    targets = torch.cat(result.targets)
    targets_of_masks = targets.repeat_interleave(args.masks_per_clip, dim=0)
    target_idx = torch.cat(result.target_idx)
    losses = torch.tensor(interval.losses, dtype=torch.float64)
    return {
        "step": progress.step,
        "epoch": progress.step * args.batch_size / num_clips,
        "seconds": progress.seconds,
        "loss": losses.nanmean().item(),  # NaN if all steps were skipped
        "explained": explained(run.model, interval.losses[-1], targets_of_masks, target_idx),
        "lr": learning_rate(step, args.steps, args.lr, args.warmup),
        "ema_decay": ema_decay(step, args.steps, args.ema, args.ema_end),
        "grad_norm": result.grad_norm,
        **monitors(targets),
        "clips_per_s": len(losses) * args.batch_size / interval.seconds,
        "data_wait": interval.waited / interval.seconds,
        "bad_files": progress.bad,
        "skipped": progress.skipped,
    }


PRINTED = ("step", "loss", "explained", "token_std", "effective_rank", "clips_per_s")


def write_line(path, line):
    """Append a line to log.csv, and print some of it."""
    cells = {name: f"{value:.7g}" for name, value in line.items()}
    say("  ".join(f"{name} {cells[name]}" for name in PRINTED))
    with open(path, "a") as file:
        if file.tell() == 0:
            file.write(",".join(cells) + "\n")
        file.write(",".join(cells.values()) + "\n")


def say(text):
    """Print above the progress bar, and at once, because a log is read while it is written."""
    tqdm.write(text)
    sys.stdout.flush()


def cut_log(path, step):
    """Drop the lines of steps that will be logged again."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        first = line.split(",")[0]
        whole = line.endswith("\n")  # a full disk may cut the last line
        if whole and (first == "step" or int(first) <= step):
            kept.append(line)
    path.write_text("".join(kept))


# ---- Settings and checkpoints


def config_of(args):
    """The preset, and what the flags change in it."""
    time_bins = round(args.clip_seconds * FRAMES_PER_SECOND)
    return dataclasses.replace(PRESETS[args.model], time_bins=time_bins, positions=args.positions)


# The flags that define a run, besides --data and --amp: a run is resumed only with the same values.
DEFINE_A_RUN = (
    "model positions steps batch_size lr warmup weight_decay ema ema_end target_norm loss mask "
    "mask_ratio masks_per_clip sample_rate clip_seconds seed"
).split()


def stateful_parts(run):
    """Everything with a state_dict, by its name in a checkpoint."""
    return {
        "context_encoder": run.model.context_encoder,
        "target_encoder": run.target_encoder,
        "predictor": run.model.predictor,
        "optimizer": run.optimizer,
        "scaler": run.scaler,
    }


def save(run, progress, settings, out, keep):
    """Write last.pt, and with `keep` also step-*.pt, which is for extraction: without the
    optimizer, whose two numbers for each weight only a resumed run needs."""
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "step": progress.step,
        "config": {"model": vars(run.model.config), "log_mel": run.log_mel.config},
        "progress": vars(progress),
        "settings": settings,
    }
    for name, part in stateful_parts(run).items():
        checkpoint[name] = part.state_dict()
    with whole_file(out / "last.pt") as file:
        torch.save(checkpoint, file)
    if keep:
        del checkpoint["optimizer"]
        with whole_file(out / f"step-{progress.step:07d}.pt") as file:
            torch.save(checkpoint, file)


def load_checkpoint(path):
    """Read a checkpoint as plain data: nothing in the file is executed.

    ValueError if it is damaged, of another format, or holds more than tensors and plain types.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        file_format = checkpoint["format"]
    except Exception as error:  # torch.load can raise anything on a damaged file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a checkpoint that can be read ({reason})") from None
    if file_format != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: of the format {file_format}, not {CHECKPOINT_FORMAT}")
    return checkpoint


# ---- Resume and --init


def resume(run, checkpoint, settings):
    """Load everything that a checkpoint holds. ValueError: it is of a run with other settings."""
    last = f"{run.args.out}/last.pt"
    for name, before in checkpoint["settings"].items():
        value = settings.get(name)
        if before != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is {value}, but {before} in {last}: "
                f"keep to it, or use --init {last} with another --out"
            )
    for name, part in stateful_parts(run).items():
        part.load_state_dict(checkpoint[name])


def start_from(run, checkpoint):
    """--init: begin with the networks of a checkpoint, and nothing else of it. ValueError: they do
    not fit. (The clip length may differ, because the positions are computed anew.)"""
    args = run.args
    config = vars(run.model.config)
    stored = checkpoint["config"]["model"] | {"time_bins": config["time_bins"]}  # may differ
    if stored != config:
        raise ValueError(
            f"--init {args.init} does not fit --model {args.model} --positions {args.positions}"
        )
    # The small weights of .github/export.py are a target encoder alone.
    checkpoint.setdefault("context_encoder", checkpoint["target_encoder"])
    for name in ("context_encoder", "target_encoder", "predictor"):
        if name in checkpoint:
            network = stateful_parts(run)[name]
            network.load_state_dict(checkpoint[name] | {"pos_embed": network.pos_embed})


# ---- Data of a run


def open_clips(args):
    """The clips of --data. ValueError says what is wrong with it."""
    if args.data is None:
        return SyntheticClips(args.sample_rate, args.clip_seconds, args.seed)
    return AudioClips(args.data, args.sample_rate, args.clip_seconds, args.seed)


def list_bad_files(path, bad):
    """Write down the (name, reason) of recordings that could not be used, each of them once."""
    for name, reason in bad:
        line = f"{printable(name)}\t{printable(reason)}\n"
        with open(path, "a+") as file:
            file.seek(0)
            if line not in file.readlines():
                file.write(line)


def stop_if_hopeless(progress, out):
    if progress.skipped_in_a_row == 20:
        fail(f"no finite gradient in 20 steps, at step {progress.step}; last.pt is as it was", 1)
    if progress.bad > max(10, 0.1 * progress.reads):
        counts = f"{progress.bad} of {progress.reads}"
        fail(f"{counts} reads of recordings failed: see {out}/bad_files.txt", 1)


# ---- Device and precision


def choose_device():
    """A GPU for each process of a machine, else MPS, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    if accelerator.type == "cuda":
        torch.cuda.set_device(launched_processes().local_rank)
    return accelerator


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def choose_amp(amp, device_type, checkpoint=None):
    """--amp as one of PRECISIONS. `auto` on a GPU is bf16, or fp16 where the GPU has no bf16; on a
    CPU it is bf16 if that is faster; else fp32. A resumed run keeps what it began with."""
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


def bf16_is_faster():
    """Time a matrix product on the CPU, because its feature flags do not predict it: of two CPUs
    with bf16 instructions, one multiplied 4 times as fast as in fp32, the other half as fast. bf16
    must win clearly, because its casts cost time as well."""

    def seconds(dtype):
        matrix = torch.ones(512, 512, dtype=dtype)  # small, because emulated bf16 takes 0.3 s
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=5))

    return seconds(torch.bfloat16) < seconds(torch.float32) / 1.5


# ---- Processes and signals


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as this one sees them."""

    rank: int = 0  # this process, 0 to count - 1
    count: int = 1
    local_rank: int = 0  # this process on its machine; also the number of its GPU
    local_count: int = 1

    @property
    def is_first(self):
        return self.rank == 0


def launched_processes() -> Processes:
    """Read what torchrun has set. Where RANK or MASTER_ADDR is missing, there is one process: some
    clusters and containers set WORLD_SIZE for everybody."""
    env = os.environ
    if "RANK" not in env or "MASTER_ADDR" not in env or env.get("WORLD_SIZE", "1") == "1":
        return Processes()
    if "LOCAL_RANK" not in env:
        fail("RANK and WORLD_SIZE are set, but no LOCAL_RANK: start it with torchrun")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Processes(*[int(env[name]) for name in names])


def connect(processes, device):
    """Connect the processes, if there are several."""
    if processes.count == 1:
        return
    if device.type == "cpu":
        # torchrun gives each process a single thread.
        torch.set_num_threads(max(1, usable_cores() // processes.local_count))
    store = next(dist.rendezvous("env://"))[0]
    if processes.local_count == processes.count:
        # After torchrun --max-restarts the store still has dead addresses (pytorch#135712), so each
        # restart gets a prefix of its own. Several machines may count their restarts differently.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=processes.rank, world_size=processes.count)


def disconnect():
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()


def from_all_processes(value):
    """The values of all processes, in all of them. Tensors must be on the CPU."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_processes(tensor):
    """The mean of a tensor over all processes, on the CPU."""
    return torch.stack(from_all_processes(tensor.cpu())).mean(0)


def refuse_disagreement(settings):
    """ValueError if processes differ, because they would average unrelated gradients."""
    for rank, theirs in enumerate(from_all_processes(settings)):
        for name, value in settings.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{name} is {value}, but {theirs[name]} in process {rank}: all need the same "
                    "flags and data, and one --out that they share"
                )


class StopSignals:
    """SIGTERM and SIGINT (Ctrl-C) ask a run to finish its step, save and end."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.requested = True
        os.write(2, b"\nstopping after this step\n")


# ---- Flags


def fail(message, code=2):
    """Print one line on stderr and exit. An error of a loader's worker is a traceback, and its last
    line is the message."""
    last_line = str(message).strip().rpartition("\n")[2]
    print(f"error: {last_line}", file=sys.stderr)
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


RECIPES = {  # flags that belong together; one that is given on the command line wins
    "paper": {},  # the defaults
    "small": {  # for some hours of sound, and some hours of two CPU cores or minutes of a GPU
        "model": "tiny",
        "clip_seconds": 2.5,
        "batch_size": 64,
        "mask_ratio": [0.7, 0.8],
        "masks_per_clip": 8,
        "steps": 6000,
        "lr": 2e-3,
        "warmup": 1000,
        "ema": 0.995,
        "ema_end": 0.99975,
        "target_norm": "clip",
        "positions": "rotary",
    },
}


def parse_args(argv):
    parser = OneLineParser(
        description="Pretrain Audio-JEPA. The defaults are the paper's, or those of --recipe.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        add_help=False,
    )
    add = parser.add_argument

    def flag(name, default, text, choices=None):
        """A flag of the type of its default."""
        add(name, type=type(default), default=default, choices=choices, help=text)

    flag("--recipe", "paper", "a set of other defaults", RECIPES)
    add("--data", help="folder, list, tar shards, packed folder; none: synthetic")
    flag("--out", "runs/audio-jepa", "output folder; a run in it is resumed")
    add("--init", help="checkpoint of another run, to begin with its weights")
    flag("--model", "base", "size of the networks", PRESETS)
    flag("--positions", "sincos", "position encoding", ["sincos", "rotary"])
    flag("--steps", 100000, "optimizer steps of the whole run")
    flag("--batch-size", 256, "clips in a step, over all processes")
    flag("--accum", 1, "micro-batches in a step, to save memory")
    flag("--lr", 3e-4, "peak learning rate")
    flag("--warmup", 1000, "steps from lr 1e-6 to the peak; --steps / 10 if --steps is not larger")
    flag("--weight-decay", 0.05, "of AdamW, on matrices only")
    flag("--ema", 0.996, "decay of the target encoder at step 0")
    flag("--ema-end", 1.0, "decay at the last step")
    flag("--target-norm", "token", "see normalise_targets", ["token", "clip"])
    flag("--loss", "l2", "l2: eq. (2), cosine: the authors' code", LOSSES)
    flag("--mask", "random", "which patches are masked", MASKS)
    add("--mask-ratio", type=float, nargs=2, default=[0.4, 0.6], help="masked share, from and to")
    flag("--masks-per-clip", 1, "masks drawn for each clip; they share its targets")
    flag("--sample-rate", 32000, "Hz, a multiple of 128")
    flag("--clip-seconds", 10.0, "a multiple of a patch, 0.625")
    flag("--amp", "auto", "mixed precision; off: fp32", ["auto", *PRECISIONS])
    add("--compile", action="store_true", help="torch.compile the three networks")
    flag("--workers", default_workers(), "processes that read clips, for each GPU")
    flag("--seed", 0, "of weights, clips and masks")
    flag("--save-every", 10000, "steps between kept checkpoints")
    flag("--log-every", 50, "steps between the lines of the log")
    # Look for the recipe first, because --help shows its defaults.
    recipe = parser.parse_known_args(argv)[0].recipe
    parser.set_defaults(**RECIPES[recipe])
    add("-h", "--help", action="help", help="show these flags and the defaults of the recipe")
    args = parser.parse_args(argv)
    if args.warmup >= args.steps:
        args.warmup = args.steps // 10
    for name in ("steps", "batch_size", "accum", "masks_per_clip", "save_every", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: 1 or more is needed")
    # What does not fit together.
    unit = args.accum * launched_processes().count
    if args.batch_size % unit != 0:
        parser.error(
            f"--batch-size {args.batch_size}: a multiple of {unit} is needed, which is "
            f"--accum {args.accum} times the number of processes"
        )
    low, high = args.mask_ratio
    if not 0 < low <= high < 1:
        parser.error(f"--mask-ratio {low} {high}: 0 < from <= to < 1 is needed")
    if args.clip_seconds < PATCH_SECONDS or args.clip_seconds % PATCH_SECONDS != 0:
        parser.error(f"--clip-seconds {args.clip_seconds}: a multiple of {PATCH_SECONDS} is needed")
    return args


def default_workers():
    """A worker for each core but one, and at most 16."""
    cores = usable_cores() // launched_processes().local_count
    return max(1, min(16, cores - 1))


if __name__ == "__main__":
    main()
