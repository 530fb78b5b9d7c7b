"""The run of the commands that generate images: iterations of batches, saving, the report, and the exit status."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import sys
import time
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd.cli.arguments import RANDOM_SEED, check_latents, prompt_batches
from sd.cli.metadata import FILES, OWN_KEYS, a1111_parameters, files_of, warn_of_syntax
from sd.cli.output import GridFile, OutputFolder
from sd.cli.setup import setup
from sd.config.presets import ScheduleConfig
from sd.errors import ConfigError, SDError, SDWarning, printable
from sd.optimise.compile_cache import open_compile_cache, save_compile_cache
from sd.pipeline import Progress, Result, StableDiffusion
from sd.sampling.noise import NoiseSource, OriginalNoise, PerImageNoise
from sd.sampling.samplers import sampler as sampler_by_name
from sd.sampling.schedule import Schedule

# (prompts, noise source, x_T or None, progress) -> Result
Generate = Callable[[list[str], NoiseSource, Tensor | None, Progress], Result]


class Command:
    """One run of a command line: the constructor validates the options and loads the model, `run` generates the images.

    Raises ConfigError, CheckpointError or Unavailable; what does not depend on the weights is checked before they are read.
    """

    def __init__(self, args: Namespace, environ: Mapping[str, str], sampling: Mapping[str, Any]):
        chosen = setup(args, environ)
        schedule = Schedule(chosen.config.schedule if chosen.config is not None else ScheduleConfig())
        arguments = {**sampling}
        sampler_by_name(arguments.pop("sampler"))(schedule, **arguments)  # rejects impossible step counts and eta
        if chosen.config is not None:
            check_latents(args, chosen.config)
        if args.seed == RANDOM_SEED:
            args.seed = secrets.randbits(32)
            print(f"--seed {RANDOM_SEED}: the random seed {args.seed}")
        self.args, self.checkpoint = args, chosen.checkpoint
        self.batches = prompt_batches(args, chosen.default_prompt)
        if getattr(args, "from_png", None) is None:  # whose prompt is reported with its other settings
            warn_of_syntax([*(prompt for batch in self.batches for prompt in batch), args.negative_prompt])
        _append_line(args.time_file, "")
        self.output = OutputFolder(args.outdir, not args.skip_save, not args.skip_grid)
        if args.compile_cache is not None:
            if not chosen.optimisations.compilers():
                raise ConfigError("--compile-cache: nothing is compiled; pass --compile, or --optimise fast")
            open_compile_cache(Path(args.compile_cache))
        start = time.perf_counter()
        self.model = chosen.load()
        self.seconds: defaultdict[str, float] = defaultdict(float, load=time.perf_counter() - start)
        check_latents(args, self.model.config)

    def run(
        self,
        generate: Generate,
        settings: Mapping[str, object],
        fixed_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Generate and save every batch of every iteration, and print the report.

        settings: text chunks of every PNG. fixed_shape: of the one x_T that all batches share, None for noise of their own.
        """
        args, model = self.args, self.model
        settings = {**settings, **self._model_settings()}
        print(", ".join(f"{key} {value}" for key, value in settings.items()))

        def noises() -> Noises:  # the warm-up draws from its own, so that images do not depend on --skip_first
            return Noises(args.rng, args.seed, model.device, fixed_shape)

        if args.skip_first:
            start = time.perf_counter()
            for _ in self._iteration(0, "warm-up", generate, noises()):
                pass
            self.seconds["warm-up"] = time.perf_counter() - start

        start, sources, count = time.perf_counter(), noises(), 0
        images = args.n_iter * sum(map(len, self.batches))
        with self.output.grid(images, args.n_rows or args.n_samples) as grid:
            for n in range(args.n_iter):
                for prompts, result in self._iteration(n, f"iteration {n + 1}/{args.n_iter}", generate, sources):
                    for stage, seconds in result.seconds.items():
                        self.seconds[stage] += seconds
                    self._save(prompts, result, args.seed + count, settings, grid)
                    count += len(prompts)
            saving = time.perf_counter()
            path = grid.save() if grid else None
        self.seconds["saving"] += time.perf_counter() - saving
        total = time.perf_counter() - start
        if path:
            print(path)
        _append_line(args.time_file, f"{total}\n")
        if args.compile_cache is not None:
            save_compile_cache(Path(args.compile_cache))
        print("seconds: " + ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in self.seconds.items()))
        print(
            f"{count} image{'s' if count > 1 else ''} in {total:.3f} s, {total / count:.3f} s each"
            + ", without warm-up" * args.skip_first
        )
        print(f"attention kernels that ran: {_kernels(model)}")
        print(f"peak memory: {_peak_memory(model.device)}")

    def _iteration(
        self, number: int, name: str, generate: Generate, noises: Noises
    ) -> Iterator[tuple[list[str], Result]]:
        first = number * sum(map(len, self.batches))
        for i, prompts in enumerate(self.batches):
            label = name + (f", prompts {i + 1}/{len(self.batches)}" if len(self.batches) > 1 else "")
            with _progress_bar(label) as progress:
                result = generate(prompts, *noises.take(first, len(prompts)), progress)
            yield prompts, result
            first += len(prompts)

    def _save(
        self,
        prompts: list[str],
        result: Result,
        first_seed: int,
        settings: Mapping[str, object],
        grid: GridFile | None,
    ) -> None:
        start = time.perf_counter()
        shared = {**settings, "kernels": _kernels(self.model)}
        prompt_settings = {
            "negative_prompt": self.args.negative_prompt,
            "prompt_chunks": result.prompt_chunks,
            **shared,
        }
        texts = [{"prompt": prompt, "seed": first_seed + i, **prompt_settings} for i, prompt in enumerate(prompts)]
        for path in self.output.add(result.images, [{"parameters": a1111_parameters(text), **text} for text in texts]):
            print(path)
        if grid is not None:
            grid.add(result.images, {"seed": self.args.seed, **shared})
        self.seconds["saving"] += time.perf_counter() - start

    def _model_settings(self) -> dict[str, object]:
        chosen = self.model.optimisations
        attention = chosen.attention_choice()
        kernels = f" with kernels {','.join(attention.kernels)}" if attention.restricted else ""
        upcast = f" in {attention.precision}" if attention.implementation == "original" else ""
        others = [f"{name}={value}" for name, value in chosen.changed().items() if name not in OWN_KEYS]
        return {
            **{FILES[flag]: names for flag, names in files_of(self.args).items()},
            "config": self.model.config.name,
            "checkpoint": self.checkpoint.name if self.checkpoint else "tiny (embedded)",
            "attention": attention.implementation + kernels + upcast,
            "precision": chosen.precision,
            "compile": chosen.compile,
            "optimisations": " ".join(others) or "none",
            "device": self.model.device.type,
            "torch": torch.__version__,
        }


class Noises:
    """Noise sources of all batches of a run, and with fixed_shape the x_T that they share."""

    def __init__(self, rng: str, seed: int, device: torch.device, fixed_shape: tuple[int, ...] | None = None):
        self.seed, self.fixed_shape, self.fixed = seed, fixed_shape, None
        self.original = OriginalNoise(seed, device) if rng == "original" else None
        if fixed_shape is not None:  # drawn before the loop, as in the original scripts
            self.fixed = (self.original or PerImageNoise(seed, fixed_shape[0])).initial(fixed_shape, device)

    def take(self, first: int, count: int) -> tuple[NoiseSource, Tensor | None]:
        """Return the noise source and x_T, or None, of images `first` to `first + count` of the run."""
        fixed = None if self.fixed is None else self.fixed[:count]
        if self.original:
            return self.original, fixed
        source = PerImageNoise(self.seed + first, count)
        if self.fixed_shape is not None:  # skips x_T, which would otherwise return as the first step's noise
            source.initial((count, *self.fixed_shape[1:]), "cpu")
        return source, fixed


@contextlib.contextmanager
def _progress_bar(label: str) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(desc=label, unit="step", file=sys.stderr) as bar:

        def show(step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        yield show


def _append_line(time_file: str | None, line: str) -> None:
    if time_file is None:
        return
    try:
        with open(time_file, "a") as file:
            file.write(line)
    except OSError as error:
        raise ConfigError(f"--time_file {time_file}: cannot be written ({error.strerror})") from None


def _kernels(model: StableDiffusion) -> str:
    return "; ".join(f"{network} {','.join(kernels) or 'not seen'}" for network, kernels in model.kernels.items())


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU memory"
    try:
        import resource
    except ImportError:  # on Windows
        return "unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of process memory"


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print each SDWarning once, in one line on stderr; other warnings as before."""
    from tqdm import tqdm

    with warnings.catch_warnings():
        warnings.simplefilter("default", SDWarning)
        show_other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *location: Any, **options: Any) -> None:
            if issubclass(category, SDWarning):
                tqdm.write(printable(f"warning: {message}"), file=sys.stderr)  # above the progress bar
            else:
                show_other(message, category, *location, **options)

        warnings.showwarning = show
        yield


def guarded(run: Callable[[], object], smaller: str | None = None) -> int:
    """Return the exit status of `run()`: 0; 2 after a one-line message about an error of the user; 130 when interrupted.

    smaller: the options of the command that reduce memory, for the advice after an out-of-memory error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths may not be encodable on the terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _warnings_in_one_line():
            run()
        return 0
    except BrokenPipeError:  # stdout was closed by the reader; the interpreter flushes it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SDError as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        device = torch.device("cuda" if "CUDA" in str(error) and torch.cuda.is_available() else "cpu")
        precision = "fp16" if device.type == "cuda" else "bf16"
        advice = f"{smaller}, or --precision {precision}" if smaller else "a smaller batch or image"
        message = f"out of memory (peak {_peak_memory(device)}): use {advice}"
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    # torch.cuda.OutOfMemoryError is newer than torch 1.12, and the CPU allocator has no exception class.
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
