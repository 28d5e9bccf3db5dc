# SPDX-License-Identifier: MIT
"""Pretrain Audio-JEPA (sec. IV.C): one process, or as many as torchrun starts; CUDA, MPS or CPU, whatever is there.

    python train.py                                               the paper's run, on synthetic clips
    torchrun --nproc_per_node=4 train.py --data /audioset         the paper's run

`train_step` is the method. Every schedule, mask, clip and window is a pure function of (seed, step): one process, several,
accumulation, and a run that was cut off and started again with the same --out are all the same run.
"""
import argparse, copy, csv, dataclasses, fcntl, functools, itertools, math, multiprocessing, os, random, resource, signal, sys, threading, time, zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import FRAMES_PER_SECOND, AudioClips, LogMel, SyntheticClips, printable
from masking import block_mask, draw_masks, ema_decay, random_mask, update_ema
from model import JEPA, LOSSES, PRESETS, VisionTransformer, gflops_per_clip, load_checkpoint, tune_cpu

FORMAT = "audio-jepa 1"
PROGRESS = dict(step=0, losses=[], tried=0, bad=0, skipped=0, skipped_in_a_row=0)  # losses: since the last log line
MASKS = {"random": random_mask, "block": block_mask}
SETTINGS = ("model", "steps", "batch_size", "lr", "warmup", "weight_decay", "ema", "loss", "mask", "mask_ratio", "sample_rate",
            "clip_seconds", "amp", "seed")  # change one, and it is another run
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def fail(message, code=2):
    """One line on stderr and out. Code 2 is the user's doing, the same in all processes: one of them says it."""
    if RANK == 0 or code != 2:
        print(f"train.py: error: {message}", file=sys.stderr)
    sys.exit(code)


def learning_rate(step, steps, peak=3e-4, warmup=1000):
    """Linear from 1e-6 to `peak` over `warmup` steps, then cosine to 0 at `steps` (sec. IV.C)."""
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    return peak * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1))) / 2


class ClipOrder:
    """The clips of one micro-batch after another, as lists of (epoch, clip).

    Epochs follow each other in one endless stream, each in its own order of (seed, epoch). Chunk k is the k-th `size`
    clips of it: no clip is left out, any step can be entered at, and processes share the chunks of a step.
    """

    def __init__(self, num_clips, seed, size, chunks):
        self.num_clips, self.seed, self.size, self.chunks = num_clips, seed, size, chunks
        self.order = functools.lru_cache(maxsize=2)(self.shuffled)

    def shuffled(self, epoch):
        rng = random.Random(f"order of epoch {epoch}, seed {self.seed}")
        return torch.randperm(self.num_clips, generator=torch.Generator().manual_seed(rng.getrandbits(63)))

    def __iter__(self):
        for chunk in self.chunks:
            places = (divmod(place, self.num_clips) for place in range(chunk * self.size, (chunk + 1) * self.size))
            yield [(epoch, int(self.order(epoch)[i])) for epoch, i in places]


def clip_order(args, num_clips, start, steps):
    """The micro-batches of this process from one step to another."""
    per_step = args.accum * WORLD
    chunks = range(start * per_step + RANK, steps * per_step, WORLD)
    return ClipOrder(num_clips, args.seed, args.batch_size // per_step, chunks)


def quiet_worker(_):
    """Signals are the main process's business: it finishes its step, and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def as_is(batch):
    return batch


def loader(args, clips, order, device):
    return DataLoader(clips, batch_sampler=order, collate_fn=as_is, num_workers=args.workers,
                      worker_init_fn=quiet_worker, pin_memory=device.type == "cuda")


def statistics(args, clips, log_mel, device):
    """Mean and std of the raw log-mel over the first 256 clips of the training order: what `LogMel` normalises by."""
    count = total = squares = 0
    for batch, _, bad in loader(args, clips, ClipOrder(len(clips), args.seed, 16, range(16)), device):
        if batch is None:
            fail(f"ten recordings in a row cannot be used, the last is {': '.join(bad[-1])}", 1)
        frames = (batch if clips.packed else log_mel.frames(batch.to(device))).cpu().double()
        count, total, squares = count + frames.numel(), total + frames.sum(), squares + frames.square().sum()
    mean = total / count
    return mean.item(), max((squares / count - mean**2).clamp(min=0).sqrt().item(), 1e-3)  # all-silent data: std 0


def spectrograms(run, batches):
    """The loader's batches as spectrograms [B, 1, T, F] on the device; counts what could not be read."""
    while True:
        began = time.perf_counter()
        batch, tried, bad = next(batches)
        run.waited += time.perf_counter() - began
        run.reads += torch.tensor([tried, len(bad)], device=run.device)
        if bad:
            note_bad_files(run.out / "bad_files.txt", bad)
        if batch is None:
            fail(f"ten recordings in a row cannot be used, the last is {': '.join(bad[-1])}", 1)
        batch = batch.to(run.device, non_blocking=True)
        yield run.log_mel.normalise(batch) if run.clips.packed else run.log_mel(batch)


def note_bad_files(path, bad):
    """Add each (name, reason) that the file does not hold yet; the lock keeps processes from listing one twice."""
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = {line.split("\t")[0] for line in file}
        for name, reason in bad:
            if printable(name) not in known:
                known.add(printable(name))
                file.write(f"{printable(name)}\t{printable(reason)}\n")


def train_step(run, step, batches):
    """One optimiser step over the global batch -> loss and gradient norm, as floats, pooled targets [B / WORLD, D], masked
    patches of a clip, and whether any process was told to stop."""
    args, pooled, loss_sum = run.args, [], 0.0

    # 1. Masks of the whole global batch, from (seed, step): every process draws them all and takes its rows.
    masks = draw_masks(MASKS[args.mask], args.seed, step, args.batch_size, run.config.grid, args.mask_ratio, run.device)
    masks = [idx.view(args.accum, WORLD, -1, idx.shape[1])[:, RANK] for idx in masks]  # [accum, B, C], [accum, B, M]

    for context_idx, target_idx in zip(*masks):
        spectrogram = next(batches)  # [B, 1, T, F]
        last = len(pooled) == args.accum - 1  # only its backward pass averages the gradients over the processes
        with nullcontext() if last or not dist.is_initialized() else run.trained.no_sync():
            with torch.autocast(run.device.type, run.amp, enabled=run.amp != torch.float32):
                # 2. Targets: the target encoder sees the whole clip, and gets no gradient.
                with torch.no_grad():
                    targets = run.target_encoder(spectrogram)  # [B, N, D]
                # 3. Context, prediction, loss; and backward.
                loss = run.trained(spectrogram, context_idx, target_idx, targets) / args.accum
            run.scaler.scale(loss).backward()
        loss_sum += loss.detach() / WORLD
        pooled.append(targets.mean(1))

    # 4. Optimiser. All processes hold the same gradient by now: if it is not finite, all of them skip the step.
    told = torch.tensor([run.told_to_stop.is_set()], device=run.device)
    report = torch.cat([loss_sum.view(1), told, run.reads])
    if dist.is_initialized():
        dist.all_reduce(report)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    norm, loss, stop, tried, bad = torch.cat([norm.view(1), report]).tolist()  # the one wait for the device in a step
    run.tried, run.bad, run.reads = run.tried + int(tried), run.bad + int(bad), torch.zeros_like(run.reads)
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
    args, saved = run.args, time.monotonic()
    order = clip_order(args, len(run.clips), run.step, args.steps)
    batches = spectrograms(run, iter(loader(args, run.clips, order, run.device)))
    began, logged = time.perf_counter(), run.step
    for step in tqdm(range(run.step, args.steps), initial=run.step, total=args.steps,
                     disable=RANK > 0 or not sys.stderr.isatty()):
        loss, norm, pooled, masked, stop = train_step(run, step, batches)
        run.step = step + 1
        if math.isfinite(norm):
            run.losses.append(loss)
            run.skipped_in_a_row = 0
        else:
            run.skipped, run.skipped_in_a_row = run.skipped + 1, run.skipped_in_a_row + 1
            if run.skipped_in_a_row == 20:
                fail(f"no finite gradient in 20 steps on end, at step {run.step}; the last good checkpoint is kept", 1)
        if run.step % args.log_every == 0 or run.step in (1, args.steps):
            seconds = time.perf_counter() - began
            write_log(run.out / "log.csv", dict(
                step=run.step, loss=sum(run.losses) / max(len(run.losses), 1),
                lr=learning_rate(step, args.steps, args.lr, args.warmup), ema_decay=ema_decay(step, args.steps, args.ema),
                masked=masked, grad_norm=norm, **monitors(gather_rows(pooled)),
                clips_per_s=args.batch_size * (run.step - logged) / seconds, data_wait=run.waited / seconds,
                memory_gib=memory_gib(run.device), bad_files=run.bad, skipped=run.skipped))
            began, run.waited, logged, run.losses = time.perf_counter(), 0.0, run.step, []
        if run.bad > max(10, 0.1 * run.tried):
            fail(f"{run.bad} of {run.tried} recordings read cannot be used: see {run.out / 'bad_files.txt'}", 1)
        keep = run.step % args.save_every == 0
        if RANK == 0 and (keep or stop or run.step == args.steps or time.monotonic() - saved > 600):
            save_checkpoint(run, keep)
            saved = time.monotonic()
        if stop:
            break
    if RANK == 0:
        print(f"{'stopped' if run.step < args.steps else 'finished'} at step {run.step}: {run.out / 'last.pt'}")


@torch.no_grad()
def monitors(pooled):
    """Is the representation collapsing? pooled targets, one row a clip [B, D] -> three numbers; the loss tells nothing.

    target_std: over the clips, mean over the features. effective_rank: exp of the entropy of the centred singular values
    (RankMe), at most min(B - 1, D). mean_cosine: between two different clips. All clips alike: 0, 0, 1.
    """
    pooled = pooled.double().cpu()
    values = torch.linalg.svdvals(pooled - pooled.mean(0))
    values = values[values > 1e-6 * pooled.norm()]  # what is left is rounding
    share = values / values.sum()
    total, clips = torch.nn.functional.normalize(pooled).sum(0), len(pooled)
    return dict(target_std=pooled.std(0, correction=0).mean().item(),
                effective_rank=(-share * share.log()).sum().exp().item() if len(values) else 0.0,
                mean_cosine=(total.square().sum().item() - clips) / max(clips * (clips - 1), 1))


def gather_rows(rows):
    """Rows of all processes, [R, ...] -> [WORLD * R, ...]."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(WORLD)]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def memory_gib(device):
    """Peak so far: of the GPU's memory, or of the process's where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def write_log(path, row):
    """One line for the terminal, the same for the file."""
    if RANK == 0:
        cells = {name: value if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()}
        tqdm.write("  ".join(f"{name} {value}" for name, value in cells.items()))
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, cells)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(cells)


def save_checkpoint(run, keep):
    """Replace last.pt, whole or not at all; `keep` leaves it under the step's own name as well."""
    checkpoint = dict(
        format=FORMAT, config=dict(model=dataclasses.asdict(run.config), log_mel=run.log_mel.config),
        context_encoder=run.model.context_encoder.state_dict(), target_encoder=run.target_encoder.state_dict(),
        predictor=run.model.predictor.state_dict(), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
        settings=run.settings, **{name: getattr(run, name) for name in PROGRESS})
    temporary, last, kept = run.out / "last.pt.tmp", run.out / "last.pt", run.out / f"step-{run.step:07d}.pt"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves the new name on an empty file
        if keep:
            kept.unlink(missing_ok=True)
            os.link(temporary, kept)
        os.replace(temporary, last)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {last}: {str(error).splitlines()[0]}; the one before is kept", 1)


def resume(run, checkpoint):
    """Continue where a checkpoint stands."""
    for name, value in run.settings.items():
        was = checkpoint["settings"].get(name)
        if was != value:
            fail(f"--{name.replace('_', '-')} is {value}, but the run in {run.out} has {was}: continue with that, "
                 f"or start another run with another --out")
    run.model.context_encoder.load_state_dict(checkpoint["context_encoder"])
    run.target_encoder.load_state_dict(checkpoint["target_encoder"])
    run.model.predictor.load_state_dict(checkpoint["predictor"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter, state in run.optimizer.state.items():
        if any(tensor.ndim and tensor.shape != parameter.shape for tensor in state.values()):
            raise ValueError("an optimizer state of another shape than its parameter")
    run.scaler.load_state_dict(checkpoint["scaler"])
    for name in PROGRESS:
        setattr(run, name, checkpoint[name])
    if RANK == 0 and (run.out / "log.csv").exists():  # drop what was logged after the checkpoint and will be again
        with open(run.out / "log.csv", newline="") as file:
            lines = [line for line in file if not line[:1].isdigit() or int(line.split(",")[0]) <= run.step]
        (run.out / "log.csv").write_text("".join(lines))


def build(args, clips, config, checkpoint):
    """Everything a run consists of, new or as the checkpoint left it, in every process alike."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if device.type == "cpu" and WORLD > 1:  # torchrun gives every process one thread, however many cores there are
        torch.set_num_threads(max(1, CORES // LOCAL_WORLD))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    model = JEPA(config, args.loss)
    target_encoder = VisionTransformer(config).requires_grad_(False).eval()
    target_encoder.load_state_dict(model.context_encoder.state_dict())
    model, target_encoder = model.to(device), target_encoder.to(device)
    if args.compile:  # in place: names in the checkpoint stay as they are. The number of masked patches varies by step.
        model.context_encoder.compile(dynamic=True)
        model.predictor.compile(dynamic=True)
        target_encoder.compile(dynamic=False)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]  # biases, norms, mask token
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=args.weight_decay),
                                   dict(params=vectors, weight_decay=0.0)], args.lr, betas=(0.9, 0.95), fused=True)
    trained = model
    if dist.is_initialized():
        trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    amp = choose_amp(args.amp, device)
    front_end = dict(sample_rate=args.sample_rate, clip_seconds=args.clip_seconds, time_bins=config.time_bins)
    if checkpoint is None:
        mean_std = torch.tensor((0.0, 1.0), device=device)
        if RANK == 0:
            mean_std = torch.tensor(statistics(args, clips, LogMel(**front_end).to(device), device), device=device)
        if dist.is_initialized():
            dist.broadcast(mean_std, 0)
        front_end.update(zip(("mean", "std"), mean_std.tolist()))
    else:
        front_end = checkpoint["config"]["log_mel"]
    settings = {name: getattr(args, name) for name in SETTINGS} | dict(data=clips.fingerprint)
    run = SimpleNamespace(
        args=args, clips=clips, config=config, device=device, model=model, trained=trained, target_encoder=target_encoder,
        optimizer=optimizer, amp=amp, scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        log_mel=LogMel(**front_end).to(device), out=Path(args.out), settings=settings, told_to_stop=threading.Event(),
        reads=torch.zeros(2, device=device), waited=0.0, **copy.deepcopy(PROGRESS))
    if checkpoint is not None:
        resume(run, checkpoint)
    return run


def choose_amp(amp, device):
    """`auto`: bf16 where the hardware multiplies it natively, else fp16 on CUDA, else fp32."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto" and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        amp = "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "off"
    return dict(bf16=torch.bfloat16, fp16=torch.float16).get(amp, torch.float32)


def benchmark(run):
    """Clips/s of each stage on its own and of all together; medians of `--steps`-independent short runs."""
    args, device = run.args, run.device

    def rate(work, clips, seconds=10.0):
        """Median clips/s of repeated calls, the first three unmeasured."""
        times = []
        while len(times) < 8 or sum(times[3:]) < seconds and len(times) < 100:
            began = time.perf_counter()
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - began)
        return clips / sorted(times[3:])[len(times[3:]) // 2]

    order = clip_order(args, len(run.clips), 0, 10**6)
    batches = iter(loader(args, run.clips, order, device))
    micro_batch, rows = order.size, {}
    rows["reading"] = rate(lambda: next(batches), micro_batch)
    batch = next(batches)[0].to(device)
    front_end = run.log_mel.normalise if run.clips.packed else run.log_mel
    rows["log-mel"] = rate(lambda: front_end(batch), micro_batch)
    spectrogram, steps = front_end(batch), itertools.count()
    rows["step alone"] = rate(lambda: train_step(run, next(steps), itertools.repeat(spectrogram)), args.batch_size)
    stream = spectrograms(run, batches)
    rows["all together"] = rate(lambda: train_step(run, next(steps), stream), args.batch_size)
    a = torch.randn(4096, 4096, device=device, dtype=run.amp)
    peak = rate(lambda: a @ a, 2 * 4096**3 / 1e12, 3.0)
    tflops = rows["step alone"] * sum(gflops_per_clip(run.config, sum(args.mask_ratio) / 2)) / 1e3 / WORLD
    print(f"{args.model}, batch {args.batch_size}, {run.amp}, compile {args.compile}, {WORLD} processes, {device}")
    print("\n".join(f"{name:>14}  {clips:10.1f} clips/s" for name, clips in rows.items()))
    print(f"the step's {tflops:.2f} TFLOP/s are {tflops / peak:.0%} of a {peak:.2f} TFLOP/s matrix product, "
          f"peak memory {memory_gib(device):.2f} GiB")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def number(kind, low, high):
    """An argparse type: a number in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def parse_args(argv):
    parser = Parser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder, list, tar shards or packed folder (see data.py); none: synthetic clips")
    add("--out", metavar="DIR", default="runs/audio-jepa", help="log and checkpoints; a run found there is continued")
    add("--model", choices=list(PRESETS), default="base", help="size of the networks")
    add("--steps", type=number(int, 1, 10**9), default=100000, help="optimiser steps of the whole run")
    add("--batch-size", type=number(int, 1, 2**20), default=256, help="clips in a step, over all processes")
    add("--accum", type=number(int, 1, 2**20), default=1, help="micro-batches a step is cut into, to save memory")
    add("--lr", type=number(float, 1e-6, 10), default=3e-4, help="peak learning rate")
    add("--warmup", type=number(int, 0, 10**9), default=1000, help="steps from learning rate 1e-6 to its peak")
    add("--weight-decay", type=number(float, 0, 10), default=0.05, help="of AdamW, on matrices only")
    add("--ema", type=number(float, 0, 1), default=0.996, help="decay of the target encoder at step 0; 1 at the end")
    add("--loss", choices=list(LOSSES), default="l2", help="l2 is eq. (2), cosine the authors' code")
    add("--mask", choices=list(MASKS), default="random", help="strategy")
    add("--mask-ratio", type=number(float, 1e-6, 1 - 1e-6), nargs=2, default=(0.4, 0.6), metavar=("LO", "HI"),
        help="share of the patches that is masked, drawn once a step")
    add("--sample-rate", type=number(int, 1000, 768000), default=32000, help="Hz, a multiple of 128")
    add("--clip-seconds", type=number(float, 0.625, 3600), default=10.0, help="a multiple of 0.625, one patch")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; auto: what is fast here")
    add("--compile", action="store_true", help="torch.compile the three networks")
    add("--workers", type=number(int, 0, 1024), default=max(1, min(16, CORES // LOCAL_WORLD - 1)),
        help="loader processes for each training process")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything that is drawn")
    add("--save-every", type=number(int, 1, 10**9), default=10000, help="steps between the checkpoints that are kept")
    add("--log-every", type=number(int, 1, 10**9), default=50, help="steps between log lines")
    add("--benchmark", action="store_true", help="measure speed and memory, train nothing")
    args = parser.parse_args(argv)
    args.mask_ratio = list(args.mask_ratio)
    if args.mask_ratio[0] > args.mask_ratio[1]:
        parser.error(f"--mask-ratio {args.mask_ratio[0]} {args.mask_ratio[1]}: the lower one comes first")
    if args.batch_size % (args.accum * WORLD):
        parser.error(f"--batch-size {args.batch_size} is not divisible by --accum {args.accum} x {WORLD} processes")
    if args.clip_seconds % 0.625:
        parser.error(f"--clip-seconds {args.clip_seconds}: not a multiple of 0.625")
    return args


def main(argv=None):
    tune_cpu()
    args = parse_args(argv)
    last = Path(args.out) / "last.pt"
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = load_checkpoint(last) if last.exists() and not args.benchmark else None
        if args.data is None:
            clips = SyntheticClips(args.sample_rate, args.clip_seconds, args.seed)
        else:
            index = last.with_name("index") if checkpoint else None
            clips = AudioClips(args.data, args.sample_rate, args.clip_seconds, args.seed, index)
        config = dataclasses.replace(PRESETS[args.model], time_bins=round(args.clip_seconds * FRAMES_PER_SECOND))
        LogMel(args.sample_rate, args.clip_seconds, config.time_bins)
        run = build(args, clips, config, checkpoint)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        fail(str(error).splitlines()[0])
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: run.told_to_stop.set())
    try:
        benchmark(run) if args.benchmark else train(run)
        if dist.is_initialized():
            dist.barrier()  # nobody hangs up while another still saves
            dist.destroy_process_group()
    finally:  # loader workers are deaf to what would otherwise end them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()


if __name__ == "__main__":
    main()
