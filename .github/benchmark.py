# SPDX-License-Identifier: MIT
"""Measure the speed and the memory of a training step, with the flags of train.py:

    python .github/benchmark.py --model base --batch-size 8
    torchrun --nproc_per_node=4 .github/benchmark.py --data /audioset

Nothing is trained and nothing is written. Clips per second are those of all processes together.
"""

import statistics
import sys
import timeit
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from data import LogMel, clip_loader, clip_order
from model import JEPA, count_millions


def gflop_per_clip(config, masks_per_clip, mask_ratio):
    """Matrix products of a training step for one clip, in units of 1e9.

    A backward pass costs twice its forward pass, and the target encoder has none.
    """
    time_patches, mel_patches = config.grid
    patches = time_patches * mel_patches
    num_masked = round(mask_ratio * patches)
    with torch.device("meta"):  # sizes only: no memory, no arithmetic
        jepa = JEPA(config)
        spectrogram = torch.empty(1, 1, config.time_bins, config.mel_bins)
        context_idx = torch.empty(1, patches - num_masked, dtype=torch.int64)
        target_idx = torch.empty(1, num_masked, dtype=torch.int64)
        targets = torch.empty(1, patches, config.dim)
        with FlopCounterMode(display=False) as target:
            jepa.context_encoder(spectrogram)
        with FlopCounterMode(display=False) as trained:
            jepa(spectrogram, context_idx, target_idx, targets)
    flop = target.get_total_flops() + 3 * masks_per_clip * trained.get_total_flops()
    return flop / 1e9


def seconds(work, device, repeat=1):
    """The median time of a call; the first three calls warm up."""

    def work_to_its_end():
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    times = timeit.repeat(work_to_its_end, number=repeat, repeat=8)
    return statistics.median(times[3:]) / repeat


def measure(run, clips):
    """Seconds that a batch takes, part by part."""
    args = run.args
    device = run.device
    steps = iter(range(10**6))

    def batches_of(workers):
        order = clip_order(len(clips), args.seed, args.batch_size, range(10**6), run.shares)
        return iter(clip_loader(clips, order, workers))

    def read():
        return [next(batches).clips.to(device) for _ in range(args.accum)]

    batches = batches_of(0)  # no workers yet, because they would slow down what is timed first
    waveforms = read()
    frames = [run.log_mel(part).squeeze(1) for part in waveforms]  # the step only normalises them

    def log_mel():
        for part in waveforms:
            run.log_mel(part)

    def step_alone():
        train.train_step(run, next(steps), frames)

    def all_together():
        train.train_step(run, next(steps), read())

    seconds(step_alone, device)  # allocates for masks of many sizes
    mean_ratio = sum(args.mask_ratio) / 2
    args.mask_ratio = [mean_ratio, mean_ratio]  # all steps are alike from here on
    workers = max(args.workers, 1)  # they deliver in turn, so whole rounds are timed
    times = {"log-mel": seconds(log_mel, device), "step alone": seconds(step_alone, device)}
    batches = batches_of(args.workers)
    times["reading"] = seconds(read, device, workers)
    times["all together"] = seconds(all_together, device, workers)
    return times


def main():
    args = train.parse_args(None)
    processes = train.launched_processes()
    device = train.choose_device()
    config = train.config_of(args)
    log_mel = LogMel(args.sample_rate, args.clip_seconds, config.time_bins, config.mel_bins)
    clips = train.open_clips(args)
    train.connect(processes, device)
    amp = train.from_all_processes(train.choose_amp(args.amp, device.type))[0]
    precision = train.PRECISIONS[amp]
    run = train.build_run(args, config, log_mel.to(device), processes, device, precision)
    times = measure(run, clips)

    size = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=precision)
    product = 2 * size**3 / seconds(lambda: matrix @ matrix, device) / 1e12
    if processes.is_first:
        print(f"{args.model}, batch {args.batch_size}, {precision}, {processes.count} processes")
        mask_ratio = args.mask_ratio[0]  # both ends are the same since `measure`
        gflop = gflop_per_clip(config, args.masks_per_clip, mask_ratio)
        print(f"{count_millions(run.model):.1f} M parameters, {gflop:.1f} GFLOP a clip and step")
        for name, time in times.items():
            print(f"{name:>14}  {args.batch_size / time:10.1f} clips/s")
        tflop = args.batch_size / processes.count * gflop / 1e3
        speed = tflop / times["step alone"]
        print(f"step alone: {speed:.2f} TFLOP/s a process, {speed / product:.0%} of the", end=" ")
        print(f"{product:.2f} TFLOP/s of a matrix product")
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    train.disconnect()


if __name__ == "__main__":
    main()
