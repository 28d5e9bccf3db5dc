# SPDX-License-Identifier: MIT
"""Pretrain Audio-JEPA (sec. IV.C): one process, or as many as torchrun starts.

    python train.py                                             the paper's sizes, on synthetic clips
    torchrun --nproc_per_node=4 train.py --data /audioset       the paper's run

`train_step` is the method. Masks, clips, windows and schedules are pure functions of (seed, step): on one
process or several, accumulated, or cut off and started again with the same --out, it is the same run.
"""
import argparse, contextlib, copy, dataclasses, fcntl, functools, itertools, math, multiprocessing, os
import random, signal, sys, threading, time, types
from pathlib import Path

import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CANNOT_USE, FRAME_RATE, AudioClips, LogMel, SyntheticClips, printable, write_atomically
from masking import block_mask, draw_masks, ema_decay, random_mask, update_ema
from model import (CHECKPOINT_FORMAT, CORES, JEPA, LOSSES, PRESETS, RANK, WORLD, choose_amp, choose_device,
                   gflops_per_clip, keep_freed_memory, load_checkpoint, memory_gib, monitors, save_checkpoint)

MASKS = {"random": random_mask, "block": block_mask}
FREE = ("data", "out", "accum", "compile", "workers", "save_every", "log_every", "benchmark")  # may change
PROGRESS = dict(step=0, losses=(), tried=0, bad=0, skipped=0, skipped_in_a_row=0)  # losses: not yet logged


def fail(message, code=2):
    """One line on stderr, and out. Code 2, the user's doing, is the same all over a machine: one says it."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or code != 2:
        print(f"train.py: error: {message}", file=sys.stderr)
    sys.exit(code)


def learning_rate(step, steps, peak=3e-4, warmup=1000):
    """Linear from 1e-6 to `peak` over `warmup` steps, then cosine to 0 at `steps` (sec. IV.C)."""
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    return peak * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1))) / 2


def clip_stream(num_clips, seed, size, chunks):
    """Batches of (epoch, clip). Epochs follow each other in one endless stream, each in an order of its own
    from (seed, epoch); chunk k is the k-th `size` clips of it: none is left out, and any step can be entered
    at."""
    @functools.lru_cache(maxsize=2)
    def shuffled(epoch):
        rng = random.Random(f"order of epoch {epoch}, seed {seed}")
        return torch.randperm(num_clips, generator=torch.Generator().manual_seed(rng.getrandbits(63)))
    for chunk in chunks:
        places = (divmod(place, num_clips) for place in range(chunk * size, (chunk + 1) * size))
        yield [(epoch, int(shuffled(epoch)[i])) for epoch, i in places]


def clip_order(args, num_clips, start, steps):
    """The micro-batches of this process from `start` to `steps`: the processes share the chunks of a step."""
    chunks = range(start * args.accum * WORLD + RANK, steps * args.accum * WORLD, WORLD)
    return clip_stream(num_clips, args.seed, args.batch_size // (args.accum * WORLD), chunks)


def quiet_worker(_):
    """Signals are the main process's business: it finishes its step, and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(run, order):
    return DataLoader(run.clips, batch_sampler=order, num_workers=run.args.workers, collate_fn=tuple,
                      worker_init_fn=quiet_worker, pin_memory=run.device.type == "cuda")


def statistics(run):
    """Mean and std of the raw log-mel over the first 256 clips of the training order, by one process."""
    count, total, squares = 1e-9, 0.0, 0.0
    order = clip_stream(len(run.clips), run.args.seed, 16, range(16 if RANK == 0 else 0))
    for batch in (batch for batch, _, _ in loader(run, order) if batch is not None):
        frames = (batch if run.clips.packed else run.log_mel.frames(batch.to(run.device))).cpu().double()
        count, total, squares = count + frames.numel(), total + frames.sum(), squares + frames.square().sum()
    mean = float(total / count)
    measured = torch.tensor([mean, max(float(squares / count) - mean**2, 1e-6) ** 0.5], device=run.device)
    if dist.is_initialized():
        dist.broadcast(measured, 0)
    return measured.tolist()


def spectrograms(run, batches):
    """The loader's batches as spectrograms [B, 1, T, F] on the device; counts what could not be read."""
    while True:
        began = time.perf_counter()
        batch, tried, bad = next(batches)
        run.waited += time.perf_counter() - began
        run.reads = run.reads[0] + tried, run.reads[1] + len(bad)
        if bad:
            note_bad_files(run.out / "bad_files.txt", bad)
        if batch is None:
            fail(f"ten recordings in a row cannot be used, the last is {printable(': '.join(bad[-1]))}", 1)
        yield run.front_end(batch.to(run.device, non_blocking=True))  # nothing keeps the device's waveforms


def note_bad_files(path, bad):
    """Add each (name, reason) that the file does not hold; the lock keeps processes from adding it twice."""
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = {line.split("\t")[0] for line in file}
        for name, reason in dict(bad).items():
            if printable(name) not in known:
                file.write(f"{printable(name)}\t{printable(reason)}\n")


def train_step(run, step, batches):
    """One optimiser step over the global batch -> loss and gradient norm, as floats, pooled targets, of this
    process [B / WORLD, D], masked patches of a clip, and whether any process was told to stop."""
    args, pooled, loss_sum = run.args, [], 0.0

    # 1. Masks of the whole global batch, from (seed, step): every process draws them all and takes its rows.
    strategy, grid = MASKS[args.mask], run.config.grid
    masks = draw_masks(strategy, args.seed, step, args.batch_size, grid, args.mask_ratio, run.device)
    masks = [idx.view(args.accum, WORLD, -1, idx.shape[1])[:, RANK] for idx in masks]  # [accum, B, C or M]
    for context_idx, target_idx in zip(*masks):
        spectrogram = next(batches)  # [B, 1, T, F]
        last = len(pooled) == args.accum - 1  # its backward pass averages the gradients over the processes
        with contextlib.nullcontext() if last or not dist.is_initialized() else run.trained.no_sync():
            with torch.autocast(run.device.type, run.amp, enabled=run.amp != torch.float32):
                # 2. Targets: the target encoder sees the whole clip, and gets no gradient.
                with torch.no_grad():
                    targets = run.target_encoder(spectrogram)  # [B, N, D]
                # 3. Context, prediction, loss; and backward.
                loss = run.trained(spectrogram, context_idx, target_idx, targets) / args.accum
            run.scaler.scale(loss).backward()
        loss_sum += loss.detach() / WORLD
        pooled.append(targets.mean(1))

    # 4. Optimiser. DDP has averaged the gradients: if one was not finite, all processes see it, and skip.
    counts = torch.tensor([*run.reads, run.told_to_stop.is_set()], dtype=torch.float32, device=run.device)
    report = torch.cat([loss_sum.view(1), counts])
    if dist.is_initialized():
        dist.all_reduce(report)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    norm, loss, tried, bad, stop = torch.cat([norm.view(1), report]).tolist()  # waits for the device
    run.tried, run.bad, run.reads = run.tried + int(tried), run.bad + int(bad), (0, 0)
    if math.isfinite(norm):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        run.scaler.step(run.optimizer)
        # 5. The target encoder follows the context encoder.
        update_ema(run.target_encoder, run.model.context_encoder, ema_decay(step, args.steps, args.ema))
    run.scaler.update()
    run.optimizer.zero_grad()
    return loss, norm, torch.cat(pooled), masks[1].shape[-1], stop > 0


def train(run):
    """Every step from run.step on, the log and the checkpoints."""
    args, saved, began, logged = run.args, time.monotonic(), time.perf_counter(), run.step
    batches = spectrograms(run, iter(loader(run, clip_order(args, len(run.clips), run.step, args.steps))))
    steps = range(run.step, args.steps)  # below, None hides the bar where there is no terminal
    for step in tqdm(steps, initial=run.step, total=args.steps, disable=RANK > 0 or None):
        loss, norm, pooled, masked, stop = train_step(run, step, batches)
        run.step = step + 1
        if math.isfinite(norm):
            run.losses, run.skipped_in_a_row = (*run.losses, loss), 0
        else:
            run.skipped, run.skipped_in_a_row = run.skipped + 1, run.skipped_in_a_row + 1
        if run.skipped_in_a_row == 20:
            fail(f"no finite gradient in 20 steps on end, at step {run.step}; last.pt is kept as it was", 1)
        if run.bad > max(10, 0.1 * run.tried):
            fail(f"{run.bad} of {run.tried} recordings cannot be used: see {run.out / 'bad_files.txt'}", 1)
        if run.step % args.log_every == 0 or run.step in (1, args.steps):
            seconds, parts = time.perf_counter() - began, [torch.empty_like(pooled) for _ in range(WORLD)]
            if dist.is_initialized():
                dist.all_gather(parts, pooled)
                pooled = torch.cat(parts)
            row = dict(
                step=run.step, loss=sum(run.losses) / len(run.losses) if run.losses else math.nan,
                lr=learning_rate(step, args.steps, args.lr, args.warmup),
                ema_decay=ema_decay(step, args.steps, args.ema), masked=masked, grad_norm=norm,
                **monitors(pooled), clips_per_s=args.batch_size * (run.step - logged) / seconds,
                data_wait=run.waited / seconds, memory_gib=memory_gib(run.device), bad_files=run.bad,
                skipped=run.skipped)
            if RANK == 0:
                write_log(run.out / "log.csv", row)
            began, run.waited, logged, run.losses = time.perf_counter(), 0.0, run.step, ()
        keep = [f"step-{run.step:07d}.pt"] if run.step % args.save_every == 0 else []
        if RANK == 0 and (keep or stop or run.step == args.steps or time.monotonic() - saved > 600):
            save(run, [*keep, "last.pt"])
            saved = time.monotonic()
        if stop:
            break
    if RANK == 0:
        print(f"{run.step} of {args.steps} steps done, saved in {printable(run.out / 'last.pt')}")


def cut_log(path, step):
    """Drop the lines of steps that will be logged again."""
    if path.exists():
        lines = path.read_text(errors="replace").rpartition("\n")[0].splitlines()  # less half a line
        kept = [line for line in lines[1:] if (at := line.split(",")[0]).isdecimal() and int(at) <= step]
        write_atomically(path, "".join(f"{line}\n" for line in lines[:1] + kept if step).encode())


def write_log(path, row):
    cells = {name: value if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()}
    tqdm.write("  ".join(f"{name} {value}" for name, value in cells.items()))
    with open(path, "a") as file:
        if file.tell() == 0:
            file.write(",".join(cells) + "\n")
        file.write(",".join(map(str, cells.values())) + "\n")


def save(run, names):
    checkpoint = dict(
        format=CHECKPOINT_FORMAT, config=dict(model=vars(run.config), log_mel=run.log_mel.config),
        context_encoder=run.model.context_encoder.state_dict(), predictor=run.model.predictor.state_dict(),
        **{part: getattr(run, part).state_dict() for part in ("target_encoder", "optimizer", "scaler")},
        settings=run.settings, data=os.path.abspath(run.args.data or ""),
        **{name: getattr(run, name) for name in PROGRESS})
    for name in names:
        save_checkpoint(checkpoint, run.out / name)


def resume(run, checkpoint):
    """Continue where a checkpoint stands -> mean and std of the log-mel."""
    try:
        for name, value in run.settings.items():
            if (theirs := checkpoint["settings"][name]) != value:
                fail(f"--{name.replace('_', '-')} is {value}, but the run in {run.out} has "
                     f"{printable(str(theirs))}: keep to it, or start another run with another --out")
        for part in ("context_encoder", "predictor"):
            getattr(run.model, part).load_state_dict(checkpoint[part])
        for part in ("target_encoder", "optimizer", "scaler"):
            getattr(run, part).load_state_dict(checkpoint[part])
        for p, state in run.optimizer.state.items():
            if not (state["step"] >= 0 and state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape):
                raise ValueError("an optimizer state of another shape than its parameter")
        for name, start in PROGRESS.items():
            if type(checkpoint[name]) is not type(start) or not 0 <= checkpoint["step"] <= run.args.steps:
                raise ValueError(f"{name} is {checkpoint[name]!r:.40}")
            setattr(run, name, checkpoint[name])
        run.losses = tuple(map(float, run.losses))
        mean, std = (float(checkpoint["config"]["log_mel"][name]) for name in ("mean", "std"))
        LogMel(mean=mean, std=std)  # refuses what they cannot be
    except Exception as error:  # whatever an untrusted file makes us raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"{run.out / 'last.pt'}: refused, not a whole checkpoint of this run ({reason})")
    return mean, std


def build(args, clips, config, checkpoint, device):
    """Everything a run consists of, new or as the checkpoint left it, in every process alike."""
    if device.type == "cpu" and WORLD > 1:  # torchrun gives a process one thread, however many there are
        torch.set_num_threads(CORES)
    if "RANK" in os.environ:
        # torchrun's store keeps what killed processes wrote (pytorch#135712): so another prefix for each
        # restart; on several machines their counts may differ, so none there.
        restart = os.getenv("TORCHELASTIC_RESTART_COUNT", "") * (os.getenv("LOCAL_WORLD_SIZE") == str(WORLD))
        store = dist.PrefixStore(restart, next(dist.rendezvous("env://"))[0])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
    torch.manual_seed(args.seed)
    model = JEPA(config, args.loss).to(device)
    target_encoder = copy.deepcopy(model.context_encoder).requires_grad_(False).eval()
    for network in (model.context_encoder, model.predictor, target_encoder) * args.compile:
        network.compile()  # in place, so that names stay; goes dynamic when it has seen masks of two sizes
    # No decay for biases, norms and the mask token.
    groups = [dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]
    amp, front_end = choose_amp(args.amp, device), (args.sample_rate, args.clip_seconds, config.time_bins)
    run = types.SimpleNamespace(
        args=args, clips=clips, config=config, device=device, model=model, trained=model, amp=amp,
        target_encoder=target_encoder, optimizer=torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16), out=Path(args.out),
        log_mel=LogMel(*front_end).to(device), told_to_stop=threading.Event(), waited=0.0,
        reads=(0, 0), **PROGRESS, settings={k: v for k, v in vars(args).items() if k not in FREE})
    run.settings |= dict(data=clips.fingerprint, amp=str(amp))
    mean, std = resume(run, checkpoint) if checkpoint else statistics(run)
    run.log_mel = LogMel(*front_end, mean=mean, std=std).to(device)
    run.front_end = run.log_mel.normalise if clips.packed else run.log_mel
    if dist.is_initialized():
        run.trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return run


def benchmark(run):
    """Print clips/s of each stage and of all together, of all processes: medians, after three to warm up."""
    args, steps, workers = run.args, itertools.count(), max(run.args.workers, 1)
    def rate(work, clips, calls=5, repeat=1):
        times = []
        for _ in range(3 + calls):
            began = time.perf_counter()
            for _ in range(repeat):
                work()
            if run.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - began)
        return clips * repeat / sorted(times[3:])[calls // 2]
    batches, rows = iter(loader(run, clip_order(args, len(run.clips), 0, 10**6))), {}
    stream = spectrograms(run, batches)
    ready, batch = itertools.repeat(next(stream)), next(batches)[0].to(run.device)
    rows["reading"] = rate(lambda: next(batches), len(batch) * WORLD, 25, workers)  # they deliver in bursts
    rows["log-mel"] = rate(lambda: run.front_end(batch), len(batch) * WORLD)
    rate(lambda: train_step(run, next(steps), ready), 1)  # meets masks of many sizes, in memory and compiled
    args.mask_ratio = [sum(args.mask_ratio) / 2] * 2  # from here on of the mean size: steps are alike
    rows["step alone"] = rate(lambda: train_step(run, next(steps), ready), args.batch_size)
    rows["all together"] = rate(lambda: train_step(run, next(steps), stream), args.batch_size, 5, workers)
    a = torch.randn([4096 if run.device.type == "cpu" else 8192] * 2, device=run.device, dtype=run.amp)
    peak = rate(lambda: a @ a, 2 * len(a) ** 3 / 1e12)
    tflops = rows["step alone"] * sum(gflops_per_clip(run.config, args.mask_ratio[0])) / 1e3 / WORLD
    if RANK == 0:
        print(f"{args.model}, batch {args.batch_size}, {run.amp}, compile {args.compile}, {WORLD} processes")
        print("\n".join(f"{name:>14}  {clips:10.1f} clips/s" for name, clips in rows.items()))
        print(f"step alone: {tflops:.2f} TFLOP/s a process, {tflops / peak:.0%} of the {peak:.2f} of a "
              f"matrix product; peak memory {memory_gib(run.device):.2f} GiB")


def number_in(kind, low, high):
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def parse_args(argv):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail  # one line, without the usage
    add, count = parser.add_argument, number_in(int, 1, 10**9)
    add("--data", metavar="PATH", help="folder, list, tar shards or packed folder; none: synthetic clips")
    add("--out", metavar="DIR", default="runs/audio-jepa", help="log, checkpoints; a run found here goes on")
    add("--model", choices=list(PRESETS), default="base", help="size of the networks")
    add("--steps", type=count, default=100000, help="optimiser steps of the whole run")
    add("--batch-size", type=number_in(int, 1, 2**16), default=256, help="clips in a step, of all processes")
    add("--accum", type=count, default=1, help="micro-batches that a step is cut into, to save memory")
    add("--lr", type=number_in(float, 1e-6, 10), default=3e-4, help="peak learning rate")
    add("--warmup", type=number_in(int, 0, 10**9), default=1000, help="steps from lr 1e-6 to the peak")
    add("--weight-decay", type=number_in(float, 0, 10), default=0.05, help="of AdamW, on matrices only")
    add("--ema", type=number_in(float, 0, 1), default=0.996, help="target encoder's decay at step 0")
    add("--loss", choices=list(LOSSES), default="l2", help="l2 is eq. (2), cosine the authors' code")
    add("--mask", choices=list(MASKS), default="random", help="strategy")
    add("--mask-ratio", type=number_in(float, 1e-6, 1 - 1e-6), nargs=2, default=[0.4, 0.6],
        metavar=("LO", "HI"), help="share of the patches that is masked, drawn once a step")
    add("--sample-rate", type=number_in(int, 1000, 768000), default=32000, help="Hz, a multiple of 128")
    add("--clip-seconds", type=number_in(float, 0.625, 600), default=10.0, help="multiple of 0.625")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the three networks")
    add("--workers", type=number_in(int, 0, 1024), default=max(1, min(16, CORES - 1)), help="of each process")
    add("--seed", type=number_in(int, 0, 2**63 - 1), default=0, help="of everything that is drawn")
    add("--save-every", type=count, default=10000, help="steps between the checkpoints that are kept")
    add("--log-every", type=count, default=50, help="steps between log lines")
    add("--benchmark", action="store_true", help="measure speed and memory, and train nothing")
    args = parser.parse_args(argv)
    if args.batch_size % (args.accum * WORLD):
        parser.error(f"--accum {args.accum} x {WORLD} processes do not divide --batch-size {args.batch_size}")
    if args.clip_seconds % 0.625:
        parser.error(f"--clip-seconds {args.clip_seconds}: not a multiple of 0.625")
    return args


def main(argv=None):
    keep_freed_memory()
    args = parse_args(argv)
    last, front_end = Path(args.out) / "last.pt", (args.sample_rate, args.clip_seconds)
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = load_checkpoint(last) if last.exists() and not args.benchmark else None
        config = dataclasses.replace(PRESETS[args.model], time_bins=round(args.clip_seconds * FRAME_RATE))
        LogMel(*front_end, config.time_bins)  # may refuse the rate: better now than after all else is built
        clips = SyntheticClips(*front_end, args.seed)
        if args.data is not None:
            index = last.with_name("index.npy")  # what the run found in this place when it began
            known = checkpoint and checkpoint.get("data") == os.path.abspath(args.data) and index.exists()
            clips = AudioClips(args.data, *front_end, args.seed, index if known else None)
        device = choose_device()
    except (*CANNOT_USE, KeyError, TypeError, EOFError) as error:
        fail(" ".join(str(error).split()) or type(error).__name__)
    run = build(args, clips, config, checkpoint, device)
    for name in (signal.SIGINT, signal.SIGTERM) * (not args.benchmark):
        signal.signal(name, lambda *_: run.told_to_stop.set())
    try:
        if RANK == 0 and not args.benchmark:
            print(f"{clips.fingerprint}; {WORLD} processes; at step {run.step}; log in {printable(args.out)}")
            cut_log(run.out / "log.csv", run.step)
            if args.data is not None and not (clips.packed or checkpoint):
                write_atomically(index, clips.source.entries)
        benchmark(run) if args.benchmark else train(run)
        if dist.is_initialized():
            dist.barrier()  # nobody hangs up while another still saves
            dist.destroy_process_group()
    except OSError as error:
        fail(error, 1)
    finally:  # loader workers are deaf to what would otherwise end them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()


if __name__ == "__main__":
    main()
