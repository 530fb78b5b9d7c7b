"""torch.compile by scope: one graph, no break, nothing compiled twice, and the same pictures."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from counting import needs_fused_attention
from models import relative_error, smallest
from torch.nn import functional as F

from perf.configurations.sets import SCOPES
from sd import Optimisations
from sd.choices import SDPA_KERNELS
from sd.errors import Unavailable
from sd.features import has
from sd.models.layers import GroupNorm
from sd.optimise.compile import INDUCTOR_OPTIONS, Compiler, plan_table
from sd.sampling.samplers import SAMPLERS
from sd.sampling.schedule import Schedule

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not has("compile"), reason="torch >= 2.0")]
CACHES = {"channels_last": True, "fused_qkv": True, "cache_context_kv": True, "cache_time_embeddings": True}
BOUND = 2e-5  # of latents after 5 steps, in fp32, against the original attention


@pytest.fixture(scope="module")
def model():
    return smallest(Optimisations(attention="original"))


@pytest.fixture(scope="module")
def references(model):
    """Latents of the fp32 original by sampler and guidance scale."""
    model.optimise(Optimisations(attention="original"))
    return {(name, scale): _latents(model, name, scale) for name, scale in product(SAMPLERS, (4.0, 1.0))}


@pytest.fixture
def counters():
    """Dynamo's own counts, from nothing."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def _latents(model, sampler="plms", scale=4.0, prompt="a red star on a blue background", **options):
    return model.txt2img(prompt, steps=5, sampler=sampler, scale=scale, **options).latents


def _use(model, scope, backend, **fields):
    try:
        model.optimise(Optimisations(compile="default", compile_scope=scope, compile_backend=backend, **fields))
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("fields", [{}, CACHES], ids=["plain", "fast"])
@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_is_compiled_twice(model, references, counters, scope, fields):
    """After the first step: not at any step, nor by another prompt, seed, sampler or guidance scale."""
    _use(model, scope, "eager", **fields)
    assert relative_error(_latents(model), references["plms", 4.0]) <= BOUND
    graphs = counters["stats"]["unique_graphs"]
    if scope == "blocks":  # those of one shape share a graph
        assert 1 < graphs < len(model.unet.res_blocks) + len(model.unet.transformer_blocks())
    else:
        assert graphs == 1
    for sampler in SAMPLERS:
        assert relative_error(_latents(model, sampler), references[sampler, 4.0]) <= BOUND
    _latents(model, prompt="a green ring", seed=5, scale=6.0)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("scope", SCOPES)
def test_only_another_shape_compiles_again(model, references, counters, scope):
    """Without guidance the batch is half as large: graphs of its own, and then both are there."""
    _use(model, scope, "eager", **CACHES)
    _latents(model)
    graphs = counters["stats"]["unique_graphs"]
    assert relative_error(_latents(model, scale=1.0), references["plms", 1.0]) <= BOUND
    once_more = counters["stats"]["unique_graphs"]
    assert once_more > graphs
    _latents(model)
    _latents(model, scale=1.0)
    assert counters["stats"]["unique_graphs"] == once_more
    assert not counters["graph_break"]


def test_noise_of_ddim_is_part_of_the_step(model, counters):
    model.optimise(Optimisations(attention="original"))
    expected = _latents(model, "ddim", eta=1.0)
    _use(model, "step", "eager", **CACHES)
    assert relative_error(_latents(model, "ddim", eta=1.0), expected) <= BOUND


def test_another_choice_undoes_the_compilation(model, counters):
    model.optimise(Optimisations())
    plain = _latents(model)
    for scope in SCOPES:
        _use(model, scope, "eager")
        model.txt2img("a red star", steps=2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 2
    model.optimise(Optimisations())
    assert torch.equal(_latents(model), plain)
    assert counters["stats"]["unique_graphs"] == graphs


@needs_fused_attention
@pytest.mark.parametrize("scope", SCOPES)
def test_another_choice_of_kernels_compiles_again(model, counters, scope):
    """The choice is made outside of what is compiled, and no key of PyTorch's has it."""
    ran = []
    for kernels in (SDPA_KERNELS, ("math",), ("flash",), ("math",)):
        _use(model, scope, "aot_eager", sdpa_kernels=kernels, compile_autoencoder="default")
        _latents(model)
        ran.append(["flash" in found for found in model.kernels.values()])
    assert ran == [[True, True], [False, False], [True, True], [False, False]]


@needs_fused_attention
@pytest.mark.slow
def test_a_stored_choice_of_kernels_is_not_that_of_another(model, counters):
    """What inductor stored for any kernel is not found where one is forbidden; as by another process, after a reset."""
    for kernels, flash in ((SDPA_KERNELS, True), (("math",), False), (SDPA_KERNELS, True)):
        torch._dynamo.reset()
        _use(model, "unet", "inductor", sdpa_kernels=kernels)
        _latents(model)
        assert ("flash" in model.kernels["unet"]) == flash, kernels


@pytest.mark.parametrize("scope", SCOPES)
def test_a_strength_that_leaves_no_step_gives_the_picture_back(model, scope):
    image = torch.zeros(3, 64, 64)
    model.optimise(Optimisations())
    expected = model.img2img("a red star", image, strength=0.0, steps=4).latents
    _use(model, scope, "eager")
    assert torch.equal(model.img2img("a red star", image, strength=0.0, steps=4).latents, expected)


def test_no_compiler_of_cpp_is_refused_by_name_and_left_out_of_fast(model, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"compile mode default: needs a C\+\+ compiler on a CPU; install g\+\+"):
        model.optimise(Optimisations(compile="default"))
    assert Optimisations.fast("cpu").compile == "none"
    model.optimise(Optimisations(compile="default", compile_backend="eager"))


def test_decoder_and_text_encoder(model, counters):
    model.optimise(Optimisations())
    expected = model.txt2img("a red star", steps=5)
    model.optimise(
        Optimisations(compile_autoencoder="default", compile_text_encoder="default", compile_backend="aot_eager")
    )
    for _ in range(2):
        result = model.txt2img("a red star", steps=5)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert relative_error(result.latents, expected.latents) <= BOUND
    assert (result.images.int() - expected.images.int()).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_inductor(model, references, counters, scope):
    """The code that inductor makes, of each scope once; fp32 sums in its order."""
    _use(model, scope, "inductor", **CACHES)
    assert relative_error(_latents(model), references["plms", 4.0]) <= BOUND
    assert relative_error(_latents(model, "dpm_solver"), references["dpm_solver", 4.0]) <= BOUND


def test_group_norm_of_a_large_mean_in_nhwc(counters):
    """What `fast` on a CPU relies on: inductor's statistics do not cancel, as those of PyTorch's own NHWC kernel do."""
    norm = GroupNorm(32, 320, silu=True).requires_grad_(False)
    x = torch.randn(2, 320, 16, 16, generator=torch.Generator().manual_seed(0)) + 30
    expected = F.silu(F.group_norm(x.double(), 32, eps=norm.eps))
    compiled = Compiler("default")(norm)
    assert relative_error(compiled(x.contiguous(memory_format=torch.channels_last)).double(), expected) <= 1e-5
    assert relative_error(norm(x).double(), expected) <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_plan_table_reproduces_the_plan(name):
    """The update rule by rows of the table, in float64 on a linear denoiser, against the loop of Python floats."""
    from sd.optimise.compile import COLUMNS
    from sd.sampling.samplers import HISTORY_LENGTH, run

    plan = SAMPLERS[name](Schedule(), 20)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = run(plan, lambda x, t, alpha: 0.3 * x + t / 1000, x)
    table = plan_table(plan, 7.5, "cpu", torch.float64)
    assert table.shape[1] % 4 == 0  # rows begin aligned to 16 bytes in float32
    x, history = plan.init_noise_sigma * x, [torch.zeros_like(x)] * HISTORY_LENGTH
    for evaluation, row in zip(plan.evaluations, table):
        columns = dict(zip(COLUMNS, row))
        assert columns["guidance"] == 7.5
        assert float(columns["alpha"] ** 2 + columns["sigma"] ** 2) == pytest.approx(1, abs=1e-12)
        e = 0.3 * columns["c_in"] * x + columns["t"] / 1000
        output = columns["c_skip"] * x + columns["c_out"] * e
        weights = row[len(COLUMNS) : len(COLUMNS) + 1 + HISTORY_LENGTH]
        x = columns["c_x"] * x + sum(weight * past for weight, past in zip(weights, (output, *history)))
        history = [output, *history[:-1]]
        assert evaluation.sigma_up == columns["sigma_up"] == 0
    assert relative_error(x, expected) <= 1e-12


@pytest.mark.parametrize("name", INDUCTOR_OPTIONS)
def test_inductor_options_exist_here_or_are_refused_by_name(name):
    from torch._inductor import config

    compiler = Compiler("default", inductor=(name,))
    if hasattr(config, INDUCTOR_OPTIONS[name][0]):
        compiler.require(torch.device("cpu"))
    else:
        with pytest.raises(Unavailable, match=name):
            compiler.require(torch.device("cpu"))
