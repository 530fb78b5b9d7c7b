"""What txt2img and img2img do alike: the loop over iterations and batches, the report, and the exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import torch

from sd.cli.arguments import Setup, append_seconds, check_latents
from sd.cli.output import Album
from sd.errors import ConfigError, SDError, printable
from sd.optimise.compile_cache import open_compile_cache, save_compile_cache
from sd.pipeline import StableDiffusion
from sd.sampling.noise import OriginalNoise, PerImageNoise


def begin(args, setup: Setup) -> tuple[Album, StableDiffusion, float]:
    """(where pictures go, the model, seconds of loading it). What cannot be written is refused before loading."""
    if setup.config is not None:
        check_latents(args, setup.config)
    if args.time_file is not None:
        append_seconds(args.time_file, "")
    album = Album(args.outdir, not args.skip_save, not args.skip_grid)
    if args.compile_cache is not None:
        if not setup.optimisations.compilers():
            raise ConfigError("--compile-cache: nothing is compiled; say --compile, or --optimise fast")
        open_compile_cache(Path(args.compile_cache))
    start = time.perf_counter()
    model = setup.load()
    seconds = time.perf_counter() - start
    check_latents(args, model.config)
    return album, model, seconds


class Noises:
    """The noise sources of a whole command, and with fixed_shape the one x_T of all its batches."""

    def __init__(self, rng: str, seed: int, device: torch.device, fixed_shape=None):
        self.seed, self.fixed_shape, self.fixed = seed, fixed_shape, None
        self.original = OriginalNoise(seed, device) if rng == "original" else None
        if fixed_shape is not None:  # the original scripts draw it before the loop
            self.fixed = (self.original or PerImageNoise(seed, fixed_shape[0])).initial(fixed_shape, device)

    def take(self, first: int, count: int):
        """(source, x_T or None) of `count` pictures, the first of which is number `first` of the command."""
        fixed = None if self.fixed is None else self.fixed[:count]
        if self.original:
            return self.original, fixed
        source = PerImageNoise(self.seed + first, count)
        if fixed is not None:  # or the noise of the first step would be x_T again
            source.initial((count, *self.fixed_shape[1:]), "cpu")
        return source, fixed


@contextlib.contextmanager
def _bar(label: str):
    from tqdm import tqdm

    with tqdm(desc=label, unit="step", file=sys.stderr) as bar:

        def show(step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        yield show


def produce(args, model: StableDiffusion, batches, draw, settings: dict, album: Album, load_seconds, fixed_shape=None):
    """Draw and save every batch of every iteration, and report.

    draw(prompts, source, latents, progress) -> Result. settings: what goes into every PNG.
    """

    def iteration(n: int, name: str, noises: Noises):
        first = n * sum(len(prompts) for prompts in batches)
        for i, prompts in enumerate(batches):
            label = name + (f", prompts {i + 1}/{len(batches)}" if len(batches) > 1 else "")
            with _bar(label) as progress:
                result = draw(prompts, *noises.take(first, len(prompts)), progress)
            yield first, prompts, result
            first += len(prompts)

    def noises() -> Noises:
        return Noises(args.rng, args.seed, model.device, fixed_shape)

    seconds = {"load": load_seconds}
    if args.skip_first:
        start = time.perf_counter()
        for _ in iteration(0, "warm-up", noises()):  # its draws are its own: pictures do not depend on --skip_first
            pass
        seconds["warm-up"] = time.perf_counter() - start

    start, source, count = time.perf_counter(), noises(), 0
    for n in range(args.n_iter):
        for first, prompts, result in iteration(n, f"iteration {n + 1}/{args.n_iter}", source):
            for stage, took in result.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + took
            texts = [
                {"prompt": prompt, "negative_prompt": args.negative_prompt, "seed": args.seed + first + i, **settings}
                for i, prompt in enumerate(prompts)
            ]
            saving = time.perf_counter()
            for path in album.add(result.images, [{**text, "kernels": _kernels(model)} for text in texts]):
                print(path)
            seconds["saving"] = seconds.get("saving", 0.0) + time.perf_counter() - saving
            count += len(prompts)
    saving = time.perf_counter()
    grid = album.add_grid(args.n_rows or args.n_samples, {"seed": args.seed, **settings, "kernels": _kernels(model)})
    seconds["saving"] += time.perf_counter() - saving
    total = time.perf_counter() - start
    if grid:
        print(grid)
    if args.time_file is not None:
        append_seconds(args.time_file, f"{total}\n")
    if args.compile_cache is not None:
        save_compile_cache(Path(args.compile_cache))
    print("seconds: " + ", ".join(f"{stage} {took:.3f}" for stage, took in seconds.items()))
    print(
        f"{count} pictures in {total:.3f} s, {total / count:.3f} s each" + ", the warm-up not counted" * args.skip_first
    )
    print(f"attention kernels that ran: {_kernels(model)}")
    print(f"peak memory: {_peak_memory(model.device)}")


def describe(model: StableDiffusion, checkpoint: Path | None) -> dict:
    """What goes into the PNGs about the model and how it is run, in words."""
    how = model.optimisations
    attention = how.attention_choice()
    kernels = f" with kernels {','.join(attention.kernels)}" if attention.restricted else ""
    shown = ("attention", "sdpa_kernels", "attention_precision", "precision", "compile")  # by names of their own
    changed = {
        name: Path(value).name if name == "aot" else value for name, value in how.changed().items() if name not in shown
    }
    upcast = f" in {attention.precision}" if attention.implementation == "original" else ""
    return {
        "config": model.config.name,
        "checkpoint": checkpoint.name if checkpoint else "tiny (embedded)",
        "attention": attention.implementation + kernels + upcast,
        "precision": how.precision,
        "compile": how.compile,
        "optimisations": " ".join(f"{name}={value}" for name, value in changed.items()) or "none",
        "device": model.device.type,
        "torch": torch.__version__,
    }


def _kernels(model: StableDiffusion) -> str:
    return "; ".join(f"{network} {','.join(kernels) or 'not seen'}" for network, kernels in model.kernels.items())


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of the GPU's"
    try:
        import resource
    except ImportError:  # not on Windows
        return "unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of the process's"


def guarded(run) -> int:
    """Exit status of `run()`: 0, 2 with one line about what the user can change, 130 when interrupted."""
    if hasattr(sys.stdout, "reconfigure"):  # a path that the terminal's encoding lacks is no reason to lose the rest
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run()
    except BrokenPipeError:  # whoever read the output has read enough; the interpreter would write to it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SDError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        device = torch.device("cuda" if "CUDA" in str(error) and torch.cuda.is_available() else "cpu")
        peak = _peak_memory(device)
        advice = "use a smaller --n_samples, a smaller picture (--H, --W), or --precision fp16"
        message = f"out of memory (peak {peak}): {advice}"
    else:
        return 0
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    # torch.cuda.OutOfMemoryError is younger than torch 1.12, and the CPU's allocator has no class of its own.
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
