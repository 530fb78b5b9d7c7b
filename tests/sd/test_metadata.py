"""PNG metadata: the A1111 form, and txt2img --from-png."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from txt2img_runs import calls_fixture, checkpoints_fixture, clean_fixture, run  # noqa: F401

from sd import txt2img
from sd.cli import metadata
from sd.cli.metadata import a1111_parameters, files_of, read
from sd.errors import ConfigError, SDWarning

SAMPLE = "outputs/txt2img-samples/samples/00000.png"
A1111 = "a fox, (red:1.3)\nsecond line\nNegative prompt: dull, \nblue\nSteps: 20, Sampler: Euler, Schedule type: Automatic, "
A1111 += (
    'CFG scale: 7, Seed: 5, Size: 128x64, Model hash: 6ce0161689, Model: tiny, Clip skip: 2, Lora hashes: "a: 1, b: 2"'
)


def png(name: str, **text: str) -> str:
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.new("RGB", (64, 64)).save(name, pnginfo=info)
    return name


def pixels(path) -> bytes:
    return Image.open(path).tobytes()


def repeat(path, *argv) -> int:
    return txt2img.main(["--device", "cpu", "--from-png", str(path), "--outdir", "again", *argv])


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        ["--prompt", "a green square, very\nlarge", "--seed", "7", "--plms", "--steps", "4", "--scale", "3.5"],
        ["--sampler", "euler", "--negative-prompt", '-blue: "red"', "--prompt", "Steps: 3, Seed: 1", "--steps", "3"],
        ["--sampler", "dpm_solver", "--steps", "4", "--H", "128", "--seed", "-1"],
        ["--sampler", "dpm_solver", "--sigmas", "karras", "--steps", "4"],
        ["--sampler", "euler_ancestral", "--steps", "4", "--seed", "5"],
        ["--ddim_eta", "0.5", "--prompt", "star " * 89 + "star", "--prompt-chunks", "auto"],
        ["--attention", "original", "--attention-precision", "input", "--optimise", "channels_last,cache_context_kv"],
    ],
    ids=["plms", "euler", "dpm_solver", "karras", "ancestral", "ddim", "optimisations"],
)
@pytest.mark.parametrize("form", ["ours", "a1111"])
def test_an_image_is_repeated_bit_for_bit(argv, form):
    assert run("--skip_grid", *argv) == 0
    source = SAMPLE
    if form == "a1111":
        source = png("a1111.png", parameters=Image.open(SAMPLE).text["parameters"])
    execution = argv if form == "a1111" and "--optimise" in argv else []  # A1111's form has no such settings
    assert repeat(source, "--skip_grid", *execution) == 0
    assert pixels("again/samples/00000.png") == pixels(SAMPLE)
    texts = [Image.open(path).text for path in (SAMPLE, "again/samples/00000.png")]
    assert texts[0] == texts[1]


def test_timestep_spacing_is_repeated(calls):
    """A1111 has no such timesteps: its form names them, and is refused."""
    assert run("--skip_grid", "--sampler", "euler", "--timestep-spacing", "trailing", "--steps", "4") == 0
    assert repeat(SAMPLE, "--skip_grid") == 0
    assert calls[1]["timestep_spacing"] == "trailing"
    parameters = Image.open(SAMPLE).text["parameters"]
    assert "Sampler: Euler, Schedule type: trailing" in parameters
    assert repeat(png("a1111.png", parameters=parameters)) == 2


@pytest.mark.parametrize(
    "name, schedule, expected",
    [
        ("Euler a", "Automatic", ("euler_ancestral", "schedule")),
        ("DPM++ 2M Karras", None, ("dpm_solver", "karras")),  # as before A1111 1.9
        ("DPM++ 2M", "Automatic", ("dpm_solver", "karras")),
        ("DPM++ 2M", "Uniform", ("dpm_solver", "schedule")),
        ("Heun", "Karras", ("heun", "karras")),
        ("DDIM", "Automatic", ("ddim", "schedule")),
    ],
)
def test_samplers_of_a1111(calls, name, schedule, expected):
    timesteps = "" if schedule is None else f"Schedule type: {schedule}, "
    assert (
        repeat(png("a1111.png", parameters=A1111.replace("Euler, Schedule type: Automatic, ", f"{name}, {timesteps}")))
        == 0
    )
    assert (calls[0]["sampler"], calls[0]["sigmas"]) == expected


def test_options_of_the_command_replace_the_recorded(calls, capsys):
    assert run("--seed", "7", "--plms", "--steps", "4", "--skip_grid") == 0
    assert repeat(SAMPLE, "--seed", "42", "--sampler", "ddim", "--attention", "original") == 0
    assert {key: calls[1][key] for key in ("steps", "sampler", "scale")} == {
        "steps": 4,
        "sampler": "ddim",
        "scale": 4.0,
    }
    assert Image.open("again/samples/00000.png").text["seed"] == "42"
    assert calls[1]["model"].optimisations.attention == "original"


def test_syntax_of_a1111_in_prompts_is_reported(calls, capsys):
    assert run("--prompt", "a (star:1.3), <lora:style:0.8>", "--negative-prompt", "a BREAK", "--n_iter", "2") == 0
    line = "warning: prompt: (star:1.3), <lora:style:0.8>, BREAK: is used as text"
    assert capsys.readouterr().err.count(line) == 1
    assert run("--prompt", "a star (red), at 12:30 [b]") == 0
    assert "is used as text" not in capsys.readouterr().err


def test_emphasis_of_a1111_is_reported(calls, capsys):
    text = A1111.replace("a fox, (red:1.3)", r"a (fox), [cat|dog] AND a bird \(blue\)")
    assert repeat(png("a1111.png", parameters=text)) == 0
    err = capsys.readouterr().err
    assert all(f"not repeated: {part} in the prompt" in err for part in ("(fox)", "[cat|dog]", "AND"))
    assert "(blue" not in err
    assert calls[0]["prompts"] == ["a (fox), [cat|dog] AND a bird (blue)\nsecond line"]
    assert repeat(png("ours.png", parameters=f"{text}, Version: sd-perf 0.1.0")) == 0
    assert "in the prompt" not in capsys.readouterr().err


def test_brackets_and_labels_in_a_prompt_are_text(calls):
    """In A1111's form a bracket of text has a backslash, and a label begins a line."""
    prompt, negative = r"a (fox), \(o [x] Negative prompt: none", r"[dull\]"
    text = {"prompt": prompt, "negative_prompt": negative, "sampler": "ddim", "steps": 4, "scale": 7.5, "seed": 1}
    text |= {"size": "64x64", "checkpoint": "tiny (embedded)", "eta": 0.0, "rng": "per-image", "prompt_chunks": 1}
    parameters = a1111_parameters(text)
    assert parameters.startswith(
        r"a \(fox\), \\\(o \[x\] Negative prompt: none" + "\n" + r"Negative prompt: \[dull\\\]"
    )
    assert repeat(png("ours.png", parameters=parameters)) == 0
    assert (calls[0]["prompts"], calls[0]["negative_prompt"]) == ([prompt], negative)


def test_other_timesteps_of_a1111_are_reported(calls, capsys):
    for name, schedule in (("DPM++ 2M", "Uniform"), ("DPM++ 2M", "Karras"), ("Euler", "Uniform")):
        text = A1111.replace("Euler", name).replace("Automatic", schedule)
        assert repeat(png("a1111.png", parameters=text)) == 0
        reported = "timesteps of DPM++ 2M, which end at 0" in capsys.readouterr().err
        assert reported is ((name, schedule) == ("DPM++ 2M", "Uniform"))


def test_a1111_text_is_read(calls, capsys):
    assert repeat(png("a1111.png", parameters=A1111)) == 0
    expected = {"steps": 20, "sampler": "euler", "scale": 7.0, "height": 64, "width": 128, "prompt_chunks": "auto"}
    assert {key: calls[0][key] for key in expected} == expected
    assert calls[0]["prompts"] == ["a fox, (red:1.3)\nsecond line"]
    assert calls[0]["negative_prompt"] == "dull, \nblue"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "not repeated" in line]
    assert [line.partition("not repeated: ")[2] for line in warnings] == [
        "Clip skip: 2",
        "Lora hashes: a: 1, b: 2",
        "noise of the generator GPU",
        "(red:1.3) in the prompt",
    ]


def test_techniques_with_fields_that_are_recorded_by_themselves():
    """As `avx512_attention`, whose precision and attention have keys of their own."""
    techniques, notes = metadata._techniques("channels_last=True packed=True avx512_attention=True token_merging=0.3")
    assert set(techniques) == {"channels_last", "packed", "avx512_attention"} and notes == ["token_merging=0.3"]


def test_written_parameters():
    text = {
        "prompt": "a, b",
        "negative_prompt": "",
        "seed": 3,
        "steps": 2,
        "sampler": "dpm_solver",
        "eta": 0.0,
        "scale": 7.5,
    }
    text |= {"size": "64x128", "rng": "original", "checkpoint": "v1,5: final.ckpt", "prompt_chunks": 2, "strength": 0.5}
    first, second = a1111_parameters(text).splitlines()
    assert first == "a, b"
    assert second.startswith(
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 7.5, Seed: 3, Size: 64x128, "
        'Model: "v1,5: final", Denoising strength: 0.5, Prompt chunks: 2, Version: sd-perf '
    )


def test_checkpoint_is_required_and_compared(checkpoints, calls, capsys):
    argv = ["--ckpt", str(checkpoints / "model.ckpt")]
    assert run(*argv, "--config", "tiny") == 0
    assert repeat(SAMPLE) == 2
    assert "was generated with model.ckpt: pass it with --ckpt" in capsys.readouterr().err
    assert repeat(SAMPLE, *argv) == 0
    captured = capsys.readouterr()
    assert "was generated with" not in captured.err and "no --config" not in captured.out
    assert repeat(SAMPLE, "--ckpt", str(checkpoints / "model_native_mha.ckpt")) == 0
    assert "was generated with model.ckpt, not with model_native_mha.ckpt" in capsys.readouterr().err


def test_files_that_change_the_model_are_required_and_compared(calls, capsys):
    text = {"lora": "style.safetensors:0.8", "vae": "vae.safetensors", "embeddings": "a.pt", "text_encoder": "text"}
    assert run() == 0
    recorded = Image.open(SAMPLE).text
    for key, names in text.items():
        flag = f"--{key.replace('_', '-').replace('embeddings', 'embedding')}"
        path = png("files.png", **{**recorded, key: names})
        assert repeat(path) == 2
        assert f"was generated with {names}: pass it with {flag}" in capsys.readouterr().err
    assert a1111_parameters({**recorded, **text}).count("style.safetensors:0.8") == 1
    args = txt2img.parser().parse_args(["--lora", "style.safetensors:0.5"])
    assert files_of(args) == {"--lora": "style.safetensors:0.5"}
    path = png("files.png", **{**recorded, "lora": "style.safetensors:0.8"})
    argv = ["--from-png", path, "--lora", "style.safetensors:0.5"]
    with pytest.warns(SDWarning, match=r"with --lora style.safetensors:0.8, not with style.safetensors:0.5"):
        metadata.repeat(txt2img.parser(), txt2img.parser().parse_args(argv), argv)


@pytest.mark.parametrize(
    ("key", "tool"),
    [("workflow", "ComfyUI"), ("invokeai_metadata", "InvokeAI"), ("Dream", "InvokeAI")],
)
def test_images_of_other_tools_are_named(key, tool):
    with pytest.raises(ConfigError, match=f"is an image of {tool}"):
        read(png("other.png", **{key: "{}", "prompt": "{}"}))


def test_another_machine_is_reported(calls, capsys):
    assert run() == 0
    text = {**Image.open(SAMPLE).text, "device": "cuda", "torch": "2.9.1"}
    assert repeat(png("cuda.png", **text)) == 0
    assert "warning: generated on cuda with torch 2.9.1: rounding may differ here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_compile_backend_is_an_option():
    assert run() == 0
    chosen = "channels_last=True compile_backend=aotinductor fused_qkv=True"
    path = png("backend.png", **{**Image.open(SAMPLE).text, "compile": "default", "optimisations": chosen})
    recorded = metadata.read(path)
    assert recorded.execution["--compile-backend"] == "aotinductor" and not recorded.notes
    assert recorded.execution["--optimise"] == "channels_last,fused_qkv"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"rng": "original"}, "its noise (original) depends on the whole run"),
        ({"rng": "per-image with fixed code"}, "depends on the whole run"),
        ({"init_img": "a.png"}, "is an image of img2img, from a.png"),
        ({"init_img": "a.png", "mask": "m.png"}, "is an image of inpaint, from a.png"),
        ({"init_img": "a.png", "depth": "d.png"}, "is an image of depth2img, from a.png"),
        ({"steps": "many\x1b[31m"}, "argument --steps/--ddim_steps: invalid positive value: 'many"),
        ({"sampler": "lms"}, "argument --sampler: invalid choice: 'lms'"),
        ({"size": "65x64"}, "argument --W: size 65: must be a positive multiple of 64"),
        ({"attention": "fast one"}, "attention 'fast one' is unknown"),
        ({"eta": None}, "lacks 'eta'"),
    ],
)
def test_invalid_metadata_is_refused_by_name(calls, capsys, change, message):
    assert run() == 0
    capsys.readouterr()
    text = {**Image.open(SAMPLE).text, **change}
    assert repeat(png("changed.png", **{key: value for key, value in text.items() if value is not None})) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --from-png changed.png: ") and message in err
    assert err.count("\n") == 1 and "\x1b" not in err


@pytest.mark.parametrize(
    "parameters, message",
    [
        ("a prompt alone", "end without Steps, Sampler and Seed"),
        (A1111.replace("Euler", "DPM++ 2M SDE"), "argument --sampler: invalid choice: 'DPM++ 2M SDE"),
        (A1111.replace("Automatic", "SGM Uniform"), "argument --sampler: invalid choice: 'Euler SGM Uniform"),
        (A1111 + ", Denoising strength: 0.5", "is an image of img2img or of an upscaler"),
        (A1111.replace("tiny", "v1-5"), "was generated with v1-5: pass it with --ckpt"),
    ],
)
def test_a1111_text_that_cannot_be_repeated(calls, capsys, parameters, message):
    assert repeat(png("a1111.png", parameters=parameters)) == 2
    assert message in capsys.readouterr().err
    if "sampler" in message:
        assert repeat("a1111.png", "--sampler", "ddim") == 0


def test_other_files_are_refused(calls):
    Path("text.png").write_text("no image")
    Image.new("RGB", (64, 64)).save("photo.jpg")
    assert run() == 0
    for name, message in (
        ("missing.png", "cannot be read as an image"),
        ("text.png", "cannot be read as an image"),
        ("photo.jpg", "is not a PNG file"),
        (png("edited.png"), "has no settings of txt2img"),
        ("outputs/txt2img-samples/grid-0000.png", "is a grid"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(name)


@pytest.mark.parametrize(
    "argv, message", [(["--from-file", "x"], "--from-png and --from-file"), (["--fixed_code"], "--fixed_code")]
)
def test_contradicting_options_are_refused(capsys, argv, message):
    assert repeat("x.png", *argv) == 2
    assert message in capsys.readouterr().err
