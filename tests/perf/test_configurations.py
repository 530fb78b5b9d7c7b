"""Configurations: ids, equality, and combinations of options."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from perf.configurations.configuration import CHOICES, Configuration, UnknownChoice, from_dict, usual
from perf.configurations.sets import PUBLISHED_FIVE, SETS, SUMMARIES, cross, suiting
from perf.launch.process import Interpreter
from sd.choices import APPROXIMATE


def test_ids_of_the_published_five():
    """Named as in the article's table, between model and batch."""
    five = ["original", "original-xformers", "mha-math", "mha-mem_efficient", "mha-mem_efficient-compile"]
    assert [one.id for one in SETS["published"]] == [f"sd2-{name}-b{batch}" for batch in (1, 2, 4) for name in five]
    assert all(
        (one.steps, one.sampler, one.precision, one.seed) == (50, "plms", "autocast", 1) for one in SETS["published"]
    )
    assert {one.prompt for one in SETS["published"]} == {"A photo"}
    assert [one.id for one in SETS["published_sd1"]] == ["sd1-original-b2", "sd1-mha-b2"]


@pytest.mark.parametrize(
    "fields_given, id",
    [
        ({}, "tiny-sdpa-b1"),
        ({"attention": "xformers"}, "tiny-original-xformers-b1"),
        ({"attention": "xformers", "engine": "diffusers"}, "tiny-diffusers-xformers-b1"),
        ({"compile": "max-autotune", "compile_scope": "blocks"}, "tiny-sdpa-compile-max-autotune-blocks-b1"),
        ({"precision": "bf16", "batch": 4}, "tiny-sdpa-bf16-b4"),
        ({"model": "sd2", "precision": "autocast"}, "sd2-sdpa-b1"),
        ({"model": "sd2", "precision": "full"}, "sd2-sdpa-full-b1"),
        ({"optimise": "fast"}, "tiny-preset-fast-b1"),
        ({"optimise": "fast", "engine": "diffusers", "attention": "mha"}, "tiny-diffusers-mha-preset-fast-b1"),
        ({"optimise": "channels_last"}, "tiny-sdpa-channels_last-b1"),
        ({"steps": 20}, "tiny-sdpa-plms20-b1"),
        ({"sampler": "ddim"}, "tiny-sdpa-ddim50-b1"),
        (
            {"sampler": "euler", "steps": 4, "timestep_spacing": "trailing", "sigmas": "karras", "scale": 1.0},
            "tiny-sdpa-euler4-trailing-karras-unguided-b1",
        ),
        ({"height": 512, "width": 768}, "tiny-sdpa-512x768-b1"),
        ({"height": 512}, "tiny-sdpa-512xnative-b1"),
        ({"device": "cuda", "interpreter": "torch112"}, "tiny-sdpa-cuda-torch112-b1"),
        ({"workload": "vae"}, "tiny-vae-sdpa-b1"),
        (
            {"workload": "train", "steps": 4, "checkpointing": True, "scale": 1.0},
            "tiny-train-sdpa-checkpointing-4updates-b1",
        ),
        ({"checkpoint": "/weights/v2.ckpt", "model": "sd2", "precision": "autocast"}, "sd2-v2-sdpa-b1"),
        ({"sdpa_kernels": ("flash", "math")}, "tiny-sdpa-math-flash-b1"),
    ],
)
def test_id(fields_given, id):
    assert Configuration(**fields_given).id == id == str(Configuration(**fields_given))


def test_every_field_but_those_of_the_input_is_in_the_id():
    """Configurations that can be in one run never share an id."""
    other = {
        "model": "sd1",
        "engine": "diffusers",
        "workload": "unet",
        "attention": "mha",
        "sdpa_kernels": ("math",),
        "compile": "default",
        "precision": "bf16",
        "optimise": "channels_last",
        "lora_rank": 4,
        "batch": 2,
        "steps": 3,
        "sampler": "euler",
        "height": 64,
        "width": 64,
        "device": "cpu",
        "interpreter": "old",
        "checkpoint": "x.ckpt",
        "timestep_spacing": "trailing",
        "sigmas": "karras",
        "scale": 1.0,
    }
    # The last three are there when something is compiled, and in the workload train.
    silent = {"prompt", "seed", "config", "compile_scope", "compile_backend", "checkpointing"}
    assert {field.name for field in fields(Configuration)} == set(other) | silent
    ids = [Configuration().id, *(replace(Configuration(), **{name: value}).id for name, value in other.items())]
    assert len(set(ids)) == len(ids)
    compiled = Configuration(compile="default")
    assert replace(compiled, compile_scope="step").id != compiled.id
    assert replace(compiled, compile_backend="openvino").id == "tiny-sdpa-compile-openvino-b1"


def test_ids_differ_within_and_between_sets():
    everything = dict.fromkeys(one for configurations in SETS.values() for one in configurations)
    assert len({one.id for one in everything}) == len(everything)
    assert SUMMARIES.keys() == SETS.keys()
    assert len(SETS["published"]) == 3 * len(PUBLISHED_FIVE)


def test_equivalent_configurations_are_equal():
    kernels = CHOICES["sdpa_kernels"]
    assert Configuration(sdpa_kernels=("flash", "math")) == Configuration(sdpa_kernels=("math", "flash", "math"))
    assert Configuration(sdpa_kernels=kernels[::-1]) == Configuration()
    assert Configuration(attention="original", sdpa_kernels=("math",)) == Configuration(attention="original")
    assert Configuration(compile_scope="step", compile_backend="openvino") == Configuration()
    assert hash(Configuration(sdpa_kernels=kernels)) == hash(Configuration())
    with pytest.raises(FrozenInstanceError):
        Configuration().batch = 2


def test_attention_choices_match_the_registry():
    from sd.attention.functions import FUNCTIONS
    from sd.choices import ATTENTION

    assert CHOICES["attention"] == ATTENTION == tuple(FUNCTIONS)


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_value_is_rejected_with_the_choices(name):
    value = ("nonsense",) if name == "sdpa_kernels" else "nonsense"
    with pytest.raises(UnknownChoice) as caught:
        Configuration(**{name: value})
    assert str(caught.value) == f"{name.replace('_', '-')} 'nonsense': choose from {', '.join(CHOICES[name])}"


@pytest.mark.parametrize("name", ["batch", "steps"])
def test_at_least_one(name):
    with pytest.raises(UnknownChoice, match=f"{name} 0: must be at least 1"):
        Configuration(**{name: 0})


def test_dict_and_back():
    for one in itertools.chain.from_iterable(SETS.values()):
        values = json.loads(json.dumps(one.as_dict()))
        assert from_dict(values) == one and values["id"] == one.id
    with pytest.raises(UnknownChoice, match="no field colour, taste"):
        from_dict({"taste": 1, "model": "tiny", "colour": 2})


def test_reference_has_the_same_work_without_optimisations():
    one = Configuration(
        "sd2", "diffusers", attention="sdpa", sdpa_kernels=("math",), compile="default", precision="fp16", batch=4
    )
    plain = one.reference()
    assert (plain.engine, plain.attention, plain.compile, plain.precision, plain.batch) == (
        *("sd", "original", "none", "full"),
        1,
    )
    assert (plain.model, plain.steps, plain.sampler, plain.prompt) == (one.model, one.steps, one.sampler, one.prompt)
    assert plain.reference() == plain


def test_cross():
    crossed = cross([usual("tiny")], {"attention": ["original", "mha"], "batch": [1, 2], "size": [(64, 32)]})
    assert [one.id for one in crossed] == [
        "tiny-original-64x32-b1",
        "tiny-original-64x32-b2",
        "tiny-mha-64x32-b1",
        "tiny-mha-64x32-b2",
    ]
    assert cross([usual("tiny")], {}) == [usual("tiny")]
    same = cross(SETS["published"], {"attention": ["original"], "compile": ["none"]})
    assert [one.batch for one in same] == [1, 2, 4], "what has become the same is there once"
    assert cross([usual("tiny")], {"attention": ["original", "original"]}) == [
        replace(usual("tiny"), attention="original")
    ]


def test_another_model_has_its_own_default_precision():
    assert cross([usual("sd2")], {"model": ["tiny"]}) == [usual("tiny")]
    assert cross([usual("tiny")], {"model": ["sd1"]})[0].precision == "autocast"
    assert cross([replace(usual("sd2"), precision="fp16")], {"model": ["tiny"]})[0].precision == "fp16"
    assert cross([usual("sd2")], {"model": ["tiny"], "precision": ["bf16"]})[0].precision == "bf16"


def test_cross_rejects_invalid_values():
    with pytest.raises(UnknownChoice, match="attention 'x'"):
        cross([usual("tiny")], {"attention": ["x"]})


@pytest.mark.parametrize("device, name", [("cuda", "batches"), ("cpu", "smoke")])
def test_default_set_of_a_device(device, name):
    assert suiting(device) == name
    models = {one.model for one in SETS[name]}
    assert models == ({"tiny"} if device == "cpu" else {"sd2"})


def test_smoke_has_a_compiled_configuration():
    assert [one.compile for one in SETS["smoke"]].count("default") == 1
    assert {one.attention for one in SETS["smoke"]} == {"original", "mha", "sdpa"}


@pytest.mark.parametrize(
    "module",
    [
        "configurations.configuration",
        "configurations.sets",
        "plugin.options",
        "plugin.selection",
        "session.record",
        "session.run",
        "session.runner",
        "analysis.statistics",
    ],
)
def test_needs_no_torch(module):
    code = f"import sys, perf.{module}; sys.exit(', '.join({{'torch', 'numpy'}} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=Interpreter().variables(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_plugin_is_light():
    """pytest loads it at every start where sd-perf is installed."""
    heavy = {"torch", "numpy", "rich", "perf.report.build"}
    code = f"import sys, perf.plugin.hooks; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=Interpreter().variables(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inductor_options_match_sd_and_keep_the_mode():
    from perf.worker.engines.sd import optimisations
    from sd.choices import INDUCTOR_OPTIONS
    from sd.optimise import compile

    assert tuple(compile.INDUCTOR_OPTIONS) == INDUCTOR_OPTIONS
    for one, expected in zip(
        SETS["inductor"], ((), *((name,) for name in INDUCTOR_OPTIONS if name != "persistent_tma_matmul"))
    ):
        chosen = optimisations(one, "cpu")
        assert (chosen.compile, chosen.inductor) == ("default", expected), one.id


def test_approximate_techniques_are_those_that_change_the_image():
    from sd.optimise.presets import TECHNIQUES

    approximate = {
        "token_merging",
        "feature_caching",
        "quantisation",
    }  # sd.optimise.optimisations.Optimisations says so
    assert tuple(name for name, fields in TECHNIQUES.items() if approximate & set(fields)) == APPROXIMATE
    assert [one.approximate for one in SETS["approximate"]] == [False] + [True] * len(APPROXIMATE)
    assert not Configuration(optimise="fast,channels_last").approximate
