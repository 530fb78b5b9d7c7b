"""The training step: numbers against an independent implementation, backends, precision, resuming, several processes."""

from __future__ import annotations

import copy
import csv
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import SMALLEST, UNETS, seeded
from PIL import Image
from selection import slow_or_nightly

from sd import StableDiffusion, train
from sd.attention import availability, functions
from sd.attention.functions import Attention
from sd.checkpoint import diffusers_folder, layouts
from sd.checkpoint.file_formats import index
from sd.cli import training_run
from sd.config.presets import TextConfig, preset
from sd.errors import CheckpointError, ConfigError, Unavailable
from sd.features import has
from sd.models.unet import UNet
from sd.sampling.schedule import Schedule
from sd.tiny.shapes import TRAINED, draw
from sd.training import (
    Batch,
    Recipe,
    Trainer,
    denoising_loss,
    drop_captions,
    min_snr_weights,
    prepare_unet,
    sample_latents,
)

ALPHAS = Schedule().alphas_cumprod.float()
CPU = torch.device("cpu")
CONFIGS = {**UNETS, "smallest": SMALLEST.unet}


def batch_for(config, count=3, size=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = count, config.out_channels, size, size
    latents, noise = (torch.randn(shape, generator=generator).to(dtype) for _ in "ab")
    context = torch.randn(count, 5, config.context_dim, generator=generator).to(dtype)
    return Batch(latents, context, torch.randint(1000, (count,), generator=generator), noise)


def trainer_for(recipe=None, name="smallest"):
    recipe = recipe or Recipe(rate=1e-3)
    return Trainer(prepare_unet(seeded(UNet, CONFIGS[name]), recipe, CPU), recipe)


def losses_of(trainer, batches, **options):
    return [lambda batch=batch: denoising_loss(trainer.model, batch, ALPHAS, False, **options) for batch in batches]


def trace(recipe, steps=3, name="smallest"):
    """(losses, gradient norms) of some updates on one batch."""
    trainer = trainer_for(recipe, name)
    pairs = [trainer.update(losses_of(trainer, [batch_for(CONFIGS[name])])) for _ in range(steps)]
    return [torch.stack(values) for values in zip(*pairs)]


# --- numbers


@pytest.mark.peers
@pytest.mark.parametrize(
    "name, gamma, predicts_v", [("sd1", None, False), ("sd2", None, True), ("sd1", 5.0, True), ("sd2", 5.0, False)]
)
def test_loss_and_gradients_equal_those_of_diffusers(name, gamma, predicts_v):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    config = UNETS[name]
    unet = seeded(UNet, config).train().requires_grad_(True)
    kind = "openclip" if config.use_linear_in_transformer else "clip"
    whole = replace(
        preset("sd2-v" if predicts_v else "sd2"), unet=config, text=TextConfig(kind, width=config.context_dim, layers=1)
    )
    peer = diffusers.UNet2DConditionModel.from_config(diffusers_folder.unet_config(whole)).train()
    peer.load_state_dict(layouts.unet_to_diffusers(unet.state_dict()))
    scheduler = diffusers.DDPMScheduler.from_config(diffusers_folder.scheduler_config(whole))
    batch = batch_for(config)

    loss = denoising_loss(unet, batch, ALPHAS, predicts_v, gamma)
    loss.backward()

    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    wanted = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps) if predicts_v else batch.noise
    predicted = peer(noisy, batch.timesteps, batch.context, return_dict=False)[0]
    errors = ((predicted - wanted) ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:  # as in examples/text_to_image/train_text_to_image.py
        snr = compute_snr(scheduler, batch.timesteps)
        errors = errors * snr.clamp(max=gamma) / (snr + 1 if predicts_v else snr)
    errors.mean().backward()

    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    ours = layouts.unet_to_diffusers({name: weight.grad for name, weight in unet.named_parameters()})
    total = torch.stack([weight.grad.norm() for weight in peer.parameters()]).norm()
    for weight_name, weight in peer.named_parameters():
        difference = (ours[weight_name] - weight.grad).norm()
        # Relative to all of them where the gradient is 0: a bias that the norm after it takes away.
        assert difference <= 2e-4 * weight.grad.norm() + 1e-6 * total, weight_name


def test_update_is_adamw_with_clipping_and_the_average_of_the_original():
    recipe = Recipe(rate=1e-2, max_gradient_norm=0.5, decay=0.9)
    trainer, config = trainer_for(recipe), CONFIGS["smallest"]
    plain = copy.deepcopy(trainer.module)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=1e-2, foreach=False)
    average = {name: weight.detach().double().clone() for name, weight in plain.named_parameters()}
    for step in range(3):
        batch = batch_for(config, seed=step)
        loss, norm = trainer.update(losses_of(trainer, [batch]))
        expected = denoising_loss(plain, batch, ALPHAS, False)
        optimiser.zero_grad()
        expected.backward()
        squares = sum(weight.grad.double().pow(2).sum() for weight in plain.parameters())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert norm.item() == pytest.approx(float(squares.sqrt()), rel=1e-4)
        assert norm > 0.5  # so that clipping has an effect
        for weight in plain.parameters():
            weight.grad.mul_(0.5 / float(squares.sqrt()))
        optimiser.step()
        decay = min(0.9, (2 + step) / (11 + step))
        for name, weight in plain.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * weight.detach().double()
    for name, weight in plain.named_parameters():
        # Of a gradient near 0, Adam's first updates keep little more than the sign.
        torch.testing.assert_close(trainer.module.get_parameter(name), weight, rtol=1e-3, atol=2e-3)
    for name, weight in trainer.average.named_parameters():
        torch.testing.assert_close(weight.double(), average[name], rtol=1e-3, atol=2e-3)
        assert not weight.requires_grad


def test_the_loss_falls():
    losses, _ = trace(Recipe(rate=3e-3), steps=40)
    assert losses[-1] < 0.5 * losses[0]


def test_min_snr_weights():
    t = torch.tensor([0, 500, 999])
    snr = (ALPHAS / (1 - ALPHAS))[t]
    assert snr[0] > 5 > snr[1]
    torch.testing.assert_close(min_snr_weights(t, ALPHAS, 5.0, False), torch.tensor([5 / snr[0], 1.0, 1.0]))
    torch.testing.assert_close(
        min_snr_weights(t, ALPHAS, 5.0, True),
        torch.stack([5 / (snr[0] + 1), snr[1] / (snr[1] + 1), snr[2] / (snr[2] + 1)]),
    )


def test_captions_are_dropped_and_latents_sampled():
    context, empty = torch.ones(3, 2, 4), torch.zeros(1, 2, 4)
    assert drop_captions(context, empty, torch.tensor([True, False, True])).sum(dim=(1, 2)).tolist() == [0, 8, 0]
    mean, noise = torch.tensor([1.0]), torch.tensor([2.0])
    assert sample_latents(mean, torch.tensor([0.0]), noise, 0.5).item() == 1.5


# --- options that must not change the numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpa", "sdpa-math", "sdpa-flash", "mha", "xformers"])
def test_every_attention_trains_like_the_original_or_is_refused_by_name(name):
    implementation, _, kernel = name.partition("-")
    attention = Attention(implementation, (kernel,)) if kernel else Attention(implementation)
    recipe = Recipe(rate=1e-3, attention=attention)
    if availability.unavailable_reason(attention, CPU, torch.float32, 8, training=True):
        with pytest.raises(Unavailable, match=f"attention {implementation}.*cannot run here"):
            trainer_for(recipe)
        return
    for ours, original in zip(trace(recipe), trace(Recipe(rate=1e-3, attention=Attention("original")))):
        torch.testing.assert_close(ours, original, rtol=1e-3, atol=0)


def test_attention_without_a_backward_pass_is_refused(monkeypatch):
    required = availability._missing_requirement
    monkeypatch.setitem(functions.FUNCTIONS, "xformers", lambda q, k, v: q.detach())
    monkeypatch.setattr(
        availability, "_missing_requirement", lambda a, d: None if a.implementation == "xformers" else required(a, d)
    )
    availability._trial_failure.cache_clear()
    unet = seeded(UNet, CONFIGS["smallest"])
    with pytest.raises(Unavailable, match="attention xformers cannot run here: no support for training"):
        prepare_unet(unet, Recipe(attention=Attention("xformers")), CPU)
    assert not any(weight.requires_grad for weight in unet.parameters())
    availability._trial_failure.cache_clear()


def test_native_attention_keeps_its_bias_at_zero_and_its_layout():
    trainer = trainer_for(Recipe(rate=1e-2, attention=Attention("mha")))
    trainer.update(losses_of(trainer, [batch_for(CONFIGS["smallest"])]))
    biases = [bias for name, bias in trainer.module.named_parameters() if name.endswith("in_proj_bias")]
    assert biases and all(bias.abs().max() == 0 for bias in biases)


def saved_bytes(trainer):
    """Bytes that the backward pass keeps."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoising_loss(trainer.model, batch_for(CONFIGS["smallest"], size=16), ALPHAS, False)
    return total


@pytest.mark.parametrize("attention", ["original", "mha"])
def test_checkpointing_gives_the_same_numbers_and_keeps_less(attention):
    plain = Recipe(rate=1e-3, attention=Attention(attention))
    less = replace(plain, checkpointing=True)
    for ours, expected in zip(trace(less), trace(plain)):
        assert torch.equal(ours, expected)
    assert saved_bytes(trainer_for(less)) < saved_bytes(trainer_for(plain)) / 3
    assert "forward" not in vars(
        trainer_for(less).average.res_blocks[0]
    )  # it would compute with the weights of the UNet


def test_accumulation_equals_the_whole_batch():
    whole = batch_for(CONFIGS["smallest"], count=4)
    halves = [
        Batch(whole.latents[rows], whole.context[rows], whole.timesteps[rows], whole.noise[rows])
        for rows in (slice(0, 2), slice(2, 4))
    ]
    one, two = trainer_for(), trainer_for()
    for _ in range(3):
        expected, parts = one.update(losses_of(one, [whole])), two.update(losses_of(two, halves))
        torch.testing.assert_close(parts[0], expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(parts[1], expected[1], rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("choice", [{"channels_last": True}, {"optimiser": "loop"}, {"optimiser": "foreach"}])
def test_implementations_of_the_step_agree(choice):
    for ours, expected in zip(trace(Recipe(rate=1e-3, **choice)), trace(Recipe(rate=1e-3))):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(precision):
    if precision == "fp16" and not has("grad_scaler"):
        with pytest.raises(Unavailable, match="fp16 on the CPU"):
            trainer_for(Recipe(precision="fp16"))
        return
    trainer = trainer_for(Recipe(rate=1e-3, precision=precision))
    if trainer.scaler is not None:
        trainer.scaler._init_scale = 1024.0  # the usual 65536 overflows at first, which skips updates
    (losses, norms), (expected, expected_norms) = (
        [
            torch.stack(values)
            for values in zip(*[t.update(losses_of(t, [batch_for(CONFIGS["smallest"])])) for _ in range(3)])
        ]
        for t in (trainer, trainer_for())
    )
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)
    torch.testing.assert_close(norms, expected_norms, rtol=5e-2, atol=0)
    assert losses.dtype == torch.float32 and not torch.equal(losses, expected)
    assert all(weight.dtype == torch.float32 for weight in trainer.weights)


@pytest.mark.skipif(not has("grad_scaler"), reason="needs a gradient scaler for the CPU")
def test_overflow_in_fp16_skips_the_update():
    trainer = trainer_for(Recipe(rate=1e-3, precision="fp16"))
    trainer.scaler._init_scale = 2.0**40
    before = trainer.weights[0].detach().clone()
    _, norm = trainer.update(losses_of(trainer, [batch_for(CONFIGS["smallest"])]))
    assert not norm.isfinite() and torch.equal(trainer.weights[0], before)
    assert trainer.scaler.get_scale() == 2.0**39


@pytest.mark.compile
@pytest.mark.skipif(not has("compile"), reason="needs torch.compile")
@pytest.mark.parametrize("checkpointing", slow_or_nightly([False, True], lambda checkpointing: not checkpointing))
def test_compiled_step_equals_the_eager_one(checkpointing):
    # The fewest kernels: to compile a graph with its gradients takes more than twice the time of the graph.
    config = replace(CONFIGS["smallest"], channel_mult=(1,), attention_resolutions=(1,))

    def of(recipe):
        trainer = Trainer(prepare_unet(seeded(UNet, config), recipe, CPU), recipe)
        return [trainer.update(losses_of(trainer, [batch_for(config)])) for _ in range(3)]

    plain = Recipe(rate=1e-3)
    for ours, expected in zip(of(replace(plain, compile="default", checkpointing=checkpointing)), of(plain)):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)


def test_half_weights_and_unusable_options_are_refused():
    with pytest.raises(ConfigError, match=r"needs fp32 weights.*bfloat16"):
        prepare_unet(seeded(UNet, CONFIGS["smallest"]).bfloat16(), Recipe(), CPU)
    with pytest.raises(ConfigError, match="optimiser 'adam': choose one of auto, fused"):
        Recipe(optimiser="adam")
    with pytest.raises(ConfigError, match="compile mode reduce-overhead: its CUDA graphs"):
        Recipe(compile="reduce-overhead")


# --- checkpoints


def test_an_update_in_fp32_uses_no_tf32(monkeypatch):
    trainer, seen = trainer_for(), []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    (loss_of,) = losses_of(trainer, [batch_for(CONFIGS["smallest"])])
    trainer.update([lambda: seen.append(torch.backends.cudnn.allow_tf32) or loss_of()])
    assert seen == [False] and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restored_training_continues_bit_for_bit(tmp_path, channels_last):
    """Also where the moments of the optimiser, read in the order of the file, must get that of the weights."""
    config, recipe = CONFIGS["smallest"], Recipe(rate=1e-3, channels_last=channels_last)
    batches = [batch_for(config, seed=step) for step in range(4)]
    whole = trainer_for(recipe)
    expected = [whole.update(losses_of(whole, [batch])) for batch in batches]
    first = trainer_for(recipe)
    for batch in batches[:2]:
        first.update(losses_of(first, [batch]))
    first.save(tmp_path / "a", {"seed": 1})
    second = Trainer(prepare_unet(seeded(UNet, config, seed=5), recipe, CPU), recipe)
    with pytest.raises(ConfigError, match="made with seed 1, not 2"):
        second.restore(tmp_path / "a", {"seed": 2})
    second.restore(tmp_path / "a", {"seed": 1})
    assert second.step == 2
    assert [second.update(losses_of(second, [batch])) for batch in batches[2:]] == expected[2:]
    for ours, theirs in zip(second.average.parameters(), whole.average.parameters()):
        assert torch.equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_files_are_no_checkpoints(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="is no checkpoint of a training"):
        trainer_for().restore(tmp_path / "a", {})
    trainer_for(name="sd1").save(tmp_path / "a", {})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        trainer_for().restore(tmp_path / "a", {})


# --- the command line


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six drawn images, four with caption files and two in metadata.jsonl."""
    folder = tmp_path_factory.mktemp("images")
    pixels = ((draw(TRAINED[:6], torch.Generator().manual_seed(0)) + 1) * 127.5).round().to(torch.uint8)
    lines = []
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        if i < 4:
            (folder / f"{i}.txt").write_text(TRAINED[i].caption())
        else:
            lines.append(f'{{"file_name": "{i}.png", "text": "{TRAINED[i].caption()}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def command(images, output, *options):
    return [
        "--data",
        str(images),
        "--output",
        str(output),
        "--rate",
        "1e-3",
        "--warm-up",
        "2",
        "--batch",
        "2",
        *options,
    ]


def rows(output):
    with open(output / "loss.csv", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a training of six steps without interruption."""
    output = tmp_path_factory.mktemp("finished")
    assert train.main(command(images, output, "--steps", "6", "--save-every", "2")) == 0
    return output


def test_command_writes_a_model_that_loads_and_a_curve(finished):
    assert [int(row[0]) for row in rows(finished)] == [1, 2, 3, 4, 5, 6]
    assert [float(row[3]) for row in rows(finished)][:3] == [5e-4, 1e-3, 1e-3]
    assert {path.name for path in finished.iterdir()} >= {"loss.csv", "model.safetensors", "training.safetensors"}
    trained, before = StableDiffusion.from_checkpoint(finished / "model.safetensors", "tiny"), StableDiffusion.tiny()
    weights = before.state_dict()
    changed = {name for name, weight in trained.state_dict().items() if not torch.equal(weight, weights[name])}
    assert changed and all(name.startswith("unet.") for name in changed)


@pytest.mark.slow
def test_resumed_command_repeats_the_uninterrupted_one(images, finished, tmp_path, capsys):
    assert train.main(command(images, tmp_path, "--steps", "3", "--save-every", "2")) == 0
    with open(tmp_path / "loss.csv", "a") as file:
        file.write("9,1,1,1\n4,0.")  # of a killed process: after its checkpoint, and cut off
    assert (
        train.main(command(images, tmp_path, "--steps", "6", "--encode", "step", "--accumulate", "2", "--batch", "1"))
        == 0
    )
    assert "step 3 of 6" in capsys.readouterr().out
    for ours, expected in zip(rows(tmp_path), rows(finished)):
        assert list(map(float, ours)) == pytest.approx(list(map(float, expected)), rel=1e-4)
    assert train.main(command(images, tmp_path, "--steps", "6", "--seed", "3")) == 2
    assert "was made with --seed 0, not 3" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(images, finished, tmp_path, capsys):
    for name in ("training.safetensors", "loss.csv"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    before = (tmp_path / "training.safetensors").read_bytes()

    def poisoned(*arguments):
        return denoising_loss(*arguments) * float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "denoising_loss", poisoned)
        assert train.main(command(images, tmp_path, "--steps", "9", "--save-every", "1")) == 2
    message = capsys.readouterr().err
    assert "step 7: loss nan" in message and "training.safetensors has step 6" in message
    assert (tmp_path / "training.safetensors").read_bytes() == before
    assert len(rows(tmp_path)) == 6


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "0.txt").unlink(), "0.png has no caption"),
        (lambda folder: (folder / "metadata.jsonl").write_text("{}"), "line 1: must be like"),
        (lambda folder: (folder / "5.png").unlink(), "names 5.png, which is no image"),
        (lambda folder: (folder / "1.png").write_bytes(b"no image"), "1.png: cannot be read as an image"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "has no image"),
    ],
)
def test_bad_data_is_refused_by_name(images, tmp_path, capsys, change, message):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    assert train.main(command(folder, tmp_path / "out", "--steps", "1")) == 2
    assert message in capsys.readouterr().err


# --- processes


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.slow
def test_two_processes_give_the_trace_of_one_with_twice_the_batch(images, finished, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sd.train"]
    options = command(images, tmp_path, "--steps", "6", "--batch", "1", "--device", "cpu")
    subprocess.run([*start, *options], env=environment(), check=True, timeout=300, capture_output=True)
    assert len(rows(tmp_path)) == 6
    for ours, expected in zip(rows(tmp_path), rows(finished)):
        assert list(map(float, ours)) == pytest.approx(list(map(float, expected)), rel=1e-4)


@pytest.mark.nightly
def test_killed_at_random_moments_nothing_is_lost_but_the_steps_since_the_checkpoint(images, tmp_path):
    """SIGKILL at 20 moments; the resumed training then gives the curve and the weights of an uninterrupted one."""
    steps, whole, killed = "60", tmp_path / "whole", tmp_path / "killed"
    generator, kills, start = random.Random(0), 0, [sys.executable, "-m", "sd.train"]
    # In a process of its own too: settings that other tests leave in this one change the last bits.
    uninterrupted = command(images, whole, "--steps", steps, "--save-every", "3")
    subprocess.run([*start, *uninterrupted], env=environment(), check=True, capture_output=True, timeout=300)
    options = command(images, killed, "--steps", steps, "--save-every", "3")
    moments = []
    while kills < 20:
        process = subprocess.Popen(
            [*start, *options], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        before = (killed / "loss.csv").stat().st_mtime_ns if (killed / "loss.csv").exists() else 0
        while time.monotonic() < deadline and process.poll() is None:  # until its loop runs
            if (killed / "loss.csv").exists() and (killed / "loss.csv").stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(generator.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        checkpoint = killed / "training.safetensors"
        if checkpoint.exists():
            assert index(checkpoint).metadata  # it is whole
            moments.append(checkpoint.stat().st_mtime_ns)
    subprocess.run([*start, *options], env=environment(), check=True, capture_output=True, timeout=300)
    assert rows(killed) == rows(whole)
    ours, expected = (
        StableDiffusion.from_checkpoint(f / "model.safetensors", "tiny").state_dict() for f in (killed, whole)
    )
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.items())
    assert len(set(moments)) > 3  # it was killed between different checkpoints
