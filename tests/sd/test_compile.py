"""torch.compile by scope: one graph, no break, no recompilation, and the same images."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from contextlib import ExitStack
from itertools import product

import pytest
import torch
from counting import needs_fused_attention
from models import relative_error, smallest
from selection import slow_or_nightly
from torch import nn
from torch.nn import functional as F

from perf.launch.process import ROOT
from sd import Optimisations
from sd.attention.functions import Attention, allowed_kernels
from sd.attention.observation import ObservedCall
from sd.choices import COMPILE_SCOPES, SDPA_KERNELS
from sd.errors import Unavailable
from sd.features import has, missing
from sd.models.layers import GroupNorm
from sd.optimise.compile import (
    COLUMNS,
    CPU_OPTIONS,
    INDUCTOR_OPTIONS,
    PREPARING_THREAD,
    Compiler,
    has_setting,
    plan_table,
    prepare_cpp_compiler,
    why_no_triton,
)
from sd.sampling.noise import PerImageNoise
from sd.sampling.plan import HISTORY_LENGTH, run
from sd.sampling.samplers import SAMPLERS
from sd.sampling.schedule import Schedule

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not has("compile"), reason="torch >= 2.0")]
FAST = {
    **dict.fromkeys(("channels_last", "fused_qkv", "cache_context_kv", "cache_time_embeddings"), True),
    **dict.fromkeys(
        ("shared_guidance", "nhwc_norms", "separate_bias", "folded_projections"), True
    ),  # of `fast` on a GPU
}
DRAWING_NOISE = ("euler_ancestral", "dpm_solver_sde", "lcm")
BOUND = 2e-5  # relative error of the latents after 5 steps in fp32 against the original attention


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
    """Dynamo's counters, reset."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def _latents(model, sampler="plms", scale=4.0, prompt="a red star on a blue background", **options):
    return model.txt2img(prompt, steps=5, sampler=sampler, scale=scale, **options).latents


def _optimise(model, scope, backend, **fields):
    if scope == "blocks":  # which leaves layers between the blocks
        fields = {
            name: value
            for name, value in fields.items()
            if name not in ("nhwc_norms", "separate_bias", "folded_projections")
        }
    try:
        model.optimise(Optimisations(compile="default", compile_scope=scope, compile_backend=backend, **fields))
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("fields", [{}, FAST], ids=["plain", "fast"])
@pytest.mark.parametrize("scope", slow_or_nightly(COMPILE_SCOPES, lambda scope: scope == "step"))
def test_no_recompilation(model, references, counters, scope, fields):
    """No later step and no other prompt, seed, sampler or guidance scale compiles again."""
    _optimise(model, scope, "eager", **fields)
    assert relative_error(_latents(model), references["plms", 4.0]) <= BOUND
    graphs = counters["stats"]["unique_graphs"]
    if scope == "blocks":  # blocks of one shape share a graph
        assert 1 < graphs < len(model.unet.res_blocks) + len(model.unet.transformer_blocks())
    else:
        assert graphs == 1
    for sampler in SAMPLERS:
        if sampler not in DRAWING_NOISE:
            assert relative_error(_latents(model, sampler), references[sampler, 4.0]) <= BOUND
    _latents(model, prompt="a green ring", seed=5, scale=6.0)
    assert counters["stats"]["unique_graphs"] == graphs
    for sampler in DRAWING_NOISE:  # the noise is one more argument of the step, once for all of them
        assert relative_error(_latents(model, sampler), references[sampler, 4.0]) <= BOUND
    assert counters["stats"]["unique_graphs"] == graphs + (scope == "step")
    assert not counters["graph_break"]


@pytest.mark.skipif(not has("cache_entries"), reason=str(missing("cache_entries")))
@pytest.mark.parametrize(
    "scope, fields, evaluated", [("unet", {}, 1), ("step", {}, 1), ("unet", {"feature_caching": 2}, 2)]
)
def test_a_sampler_run_evaluates_guards_once(model, references, monkeypatch, scope, fields, evaluated):
    """Feature caching calls the UNet with and without deep features."""
    calls = []
    compiled = Compiler.__call__
    monkeypatch.setattr(
        Compiler,
        "__call__",
        lambda self, function: lambda *arguments, code=compiled(self, function): calls.append(0) or code(*arguments),
    )
    _optimise(model, scope, "eager", **fields)
    for runs in (1, 2):
        latents = _latents(model)
        assert len(calls) == runs * evaluated
    assert fields or relative_error(latents, references["plms", 4.0]) <= BOUND


@pytest.mark.parametrize("scope", slow_or_nightly(COMPILE_SCOPES, lambda scope: scope == "step"))
def test_only_a_new_shape_compiles_again(model, references, counters, scope):
    """Without guidance the batch is half as large and has separate graphs; afterwards both are cached."""
    _optimise(model, scope, "eager", **FAST)
    _latents(model)
    graphs = counters["stats"]["unique_graphs"]
    assert relative_error(_latents(model, scale=1.0), references["plms", 1.0]) <= BOUND
    graphs_of_both = counters["stats"]["unique_graphs"]
    assert graphs_of_both > graphs
    _latents(model)
    _latents(model, scale=1.0)
    assert counters["stats"]["unique_graphs"] == graphs_of_both
    assert not counters["graph_break"]


@pytest.mark.slow
def test_noise_of_ddim_is_part_of_the_step(model, counters):
    model.optimise(Optimisations(attention="original"))
    expected = _latents(model, "ddim", eta=1.0)
    _optimise(model, "step", "eager", **FAST)
    assert relative_error(_latents(model, "ddim", eta=1.0), expected) <= BOUND


@pytest.mark.slow
def test_another_choice_undoes_the_compilation(model, counters):
    model.optimise(Optimisations())
    plain = _latents(model)
    for scope in COMPILE_SCOPES:
        _optimise(model, scope, "eager")
        model.txt2img("a red star", steps=2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 2
    model.optimise(Optimisations())
    assert torch.equal(_latents(model), plain)
    assert counters["stats"]["unique_graphs"] == graphs


@needs_fused_attention
@pytest.mark.parametrize("scope", slow_or_nightly(COMPILE_SCOPES, lambda scope: scope == "blocks"))
def test_another_choice_of_kernels_compiles_again(model, counters, scope):
    """The kernel choice is a context around compiled code, and none of PyTorch's cache keys includes it."""
    ran = []
    for kernels in (SDPA_KERNELS, ("math",), ("flash",), ("math",)):
        _optimise(model, scope, "aot_eager", sdpa_kernels=kernels, compile_autoencoder="default")
        _latents(model)
        _latents(model)  # a compiled decoder is observed at its second call
        ran.append(["flash" in kernels for kernels in model.kernels.values()])
    assert ran == [[True, True], [False, False], [True, True], [False, False]]


@needs_fused_attention
def test_cached_code_is_separate_for_each_choice_of_kernels(counters):
    """Code that inductor cached with all kernels is not reused with one forbidden; the reset simulates another process."""

    def attention(x):
        return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 64, 16)
    for kernels, flash in ((SDPA_KERNELS, True), (("math",), False), (SDPA_KERNELS, True)):
        torch._dynamo.reset()
        call = ObservedCall(Compiler("default", kernels=kernels)(attention))
        with allowed_kernels(Attention("sdpa", kernels)):
            for _ in range(call.observe_call):
                call(x)
        assert ("flash" in call.kernels) == flash, kernels
    if has("compile_cache"):
        cached = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert cached >= 1, "the third one is that of the first"


@pytest.mark.parametrize("scope", COMPILE_SCOPES)
def test_a_strength_without_steps_returns_the_image(model, scope):
    image = torch.zeros(3, 64, 64)
    model.optimise(Optimisations())
    expected = model.img2img("a red star", image, strength=0.0, steps=4).latents
    _optimise(model, scope, "eager")
    assert torch.equal(model.img2img("a red star", image, strength=0.0, steps=4).latents, expected)


def test_without_pythons_headers_compile_is_refused_and_left_out_of_fast(monkeypatch, tmp_path):
    """The C++ of inductor includes them; Debian has them in a package of their own."""
    monkeypatch.setattr("sd.choices.cpp_compiler", lambda: "g++")
    monkeypatch.setattr("sd.choices.sysconfig.get_path", lambda name: str(tmp_path))
    assert Optimisations.fast("cpu").compile == "none"
    if has("compile"):
        with pytest.raises(Unavailable, match="compile mode default: needs Python's headers on a CPU"):
            Compiler("default").require(torch.device("cpu"))


@pytest.mark.parametrize(
    "triton, capability, reason",
    [
        (False, (9, 0), "needs Triton, which is not installed"),
        (True, (6, 1), "Triton needs a GPU of sm_70 or newer, and this is sm_61"),
        (True, (7, 0), None),
    ],
)
def test_a_gpu_without_triton_is_refused_and_left_out_of_fast(monkeypatch, triton, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("sd.optimise.compile.importlib.util.find_spec", lambda name: triton or None)
    device = torch.device("cuda")
    assert why_no_triton(device) == reason
    fast = Optimisations.fast(device)
    assert (fast.compile == "none") == (reason is not None or not has("compile"))
    assert not reason or not (fast.nhwc_norms or fast.separate_bias or fast.whole_norms)
    if reason and has("compile"):
        with pytest.raises(Unavailable, match=reason):
            Compiler("default").require(device)


def test_without_a_cpp_compiler_compile_is_refused_and_left_out_of_fast(model, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"compile mode default: needs a C\+\+ compiler on a CPU; install g\+\+"):
        model.optimise(Optimisations(compile="default"))
    assert Optimisations.fast("cpu").compile == "none"
    model.optimise(Optimisations(compile="default", compile_backend="eager"))


@pytest.mark.slow
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
@pytest.mark.parametrize("scope", COMPILE_SCOPES)
def test_inductor(model, references, counters, scope):
    """Inductor's code for each scope; fp32 sums in another order."""
    _optimise(model, scope, "inductor", **FAST)
    assert relative_error(_latents(model), references["plms", 4.0]) <= BOUND
    assert relative_error(_latents(model, "dpm_solver"), references["dpm_solver", 4.0]) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("nhwc", [False, True])
def test_group_norm_of_a_large_mean_in_nhwc(counters, nhwc):
    """`fast` requires that inductor's statistics do not cancel, unlike those of PyTorch's NHWC kernel on a CPU."""
    norm = GroupNorm(32, 320, silu=True).requires_grad_(False)
    norm.nhwc = nhwc
    x = torch.randn(2, 320, 16, 16, generator=torch.Generator().manual_seed(0)) + 30
    expected = F.silu(F.group_norm(x.double(), 32, eps=norm.eps))
    compiled = Compiler("default")(norm)
    assert relative_error(compiled(x.contiguous(memory_format=torch.channels_last)).double(), expected) <= 1e-5
    assert relative_error(norm(x).double(), expected) <= 1e-5


@pytest.mark.skipif(not has("vector_instructions"), reason="torch >= 2.5")
def test_the_compiler_is_prepared_before_the_first_call(model, monkeypatch):
    """By inductor's own functions, in a thread: what they raise is left to the compilation."""
    from torch._inductor import codecache, config, cpu_vec_isa

    threads, compiled, uncaught = [], [], []

    def compile_kernel(arguments, code):
        compiled.append(code)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: threads.append(threading.current_thread().name))
    monkeypatch.setattr(codecache.CppPythonBindingsCodeCache, "load_pybinding", compile_kernel)
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    monkeypatch.setattr("sd.optimise.apply.prepare_cpp_compiler", prepare_cpp_compiler.__wrapped__)
    for backend, expected in (("eager", []), ("inductor", [PREPARING_THREAD])):
        _optimise(model, "unet", backend)
        for thread in threading.enumerate():
            if thread.name == PREPARING_THREAD:
                thread.join(60)
        assert threads == expected
    assert len(compiled) == getattr(config, "cpp_cache_precompile_headers", False) and not uncaught


@pytest.mark.nightly
@pytest.mark.compile
@pytest.mark.skipif(not has("vector_instructions"), reason="torch >= 2.5")
def test_the_header_of_the_kernels_is_compiled_once_and_before_the_first_call():
    """In a process of its own, since inductor keeps it for the process."""
    code = """
import threading, torch
from torch._inductor import codecache
from sd.optimise.compile import PREPARING_THREAD, prepare_cpp_compiler
prepare_cpp_compiler()
[thread.join() for thread in threading.enumerate() if thread.name == PREPARING_THREAD]
before = codecache._precompile_header.cache_info().misses
torch.compile(lambda x: (x + 1).relu())(torch.ones(100))
after = codecache._precompile_header.cache_info()
print(before, after.misses, after.hits > 0)
"""
    if not getattr(torch._inductor.config, "cpp_cache_precompile_headers", False):
        pytest.skip("this torch precompiles no header")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "1", "True"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_table_equals_the_plan(name):
    """The update rule with the table's rows, in float64 on a linear denoiser, against the loop with Python floats."""

    plan = SAMPLERS[name](Schedule(), 20)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noises = plan.noises(PerImageNoise(1, 1), x)
    noises = torch.zeros(len(plan.evaluations), *x.shape) if noises is None else noises.double()
    expected = run(plan, lambda x, t, alpha: 0.3 * x + t / 1000, x, noises)
    table = plan_table(plan, 7.5, "cpu", torch.float64)
    assert table.shape[1] % 4 == 0  # rows are aligned to 16 bytes in float32
    x, history = plan.init_noise_sigma * x, [torch.zeros_like(x)] * HISTORY_LENGTH
    for evaluation, row, noise in zip(plan.evaluations, table, noises):
        columns = dict(zip(COLUMNS, row))
        assert columns["guidance"] == 7.5
        assert float(columns["alpha"] ** 2 + columns["sigma"] ** 2) == pytest.approx(1, abs=1e-12)
        e = 0.3 * columns["c_in"] * x + columns["t"] / 1000
        output = columns["c_skip"] * x + columns["c_out"] * e
        weights = row[len(COLUMNS) : len(COLUMNS) + 1 + HISTORY_LENGTH]
        x = columns["c_x"] * x + sum(weight * past for weight, past in zip(weights, (output, *history)))
        x = x + columns["sigma_up"] * noise
        history = [output, *history[:-1]]
        assert evaluation.sigma_up == columns["sigma_up"] and (plan.draws_noise or not evaluation.sigma_up)
    assert relative_error(x, expected) <= 1e-12


@pytest.mark.parametrize("name", INDUCTOR_OPTIONS)
def test_an_inductor_option_that_would_do_nothing_is_refused_by_name(name, monkeypatch):
    from torch._inductor import config

    compiler, cuda = Compiler("default", inductor=(name,)), torch.device("cuda")
    settings = INDUCTOR_OPTIONS[name]
    if not all(has_setting(config, setting) for setting in settings):
        with pytest.raises(Unavailable, match=f"{name}: torch .* does not have it"):
            compiler.require(cuda)
        return
    with config.patch(settings), pytest.raises(Unavailable, match=f"{name}: is the default of torch"):
        compiler.require(cuda)
    if name not in CPU_OPTIONS:
        refused = pytest.raises(Unavailable, match=f"{name}: changes no code for a CPU")
        with config.patch({setting: not value for setting, value in settings.items()}), refused:
            compiler.require(torch.device("cpu"))


@pytest.mark.slow
def test_an_inductor_option_changes_the_code_of_a_cpu_exactly_if_it_is_accepted_there():
    """A setting that Dynamo or inductor ignores leaves the code as it is, and must not be measured as a technique."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    network = nn.Sequential(nn.Conv2d(32, 33, 1), nn.GroupNorm(1, 33, affine=False), nn.Flatten(2), nn.Linear(64, 65))
    network.requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)

    def code(*options):
        torch._dynamo.reset()
        with torch.no_grad(), ExitStack() as stack:
            # Python code is generated each time; what the C++ compiler made of equal code is used again.
            for settings, cache in ((config, "fx_graph_cache"), (functorch_config, "enable_autograd_cache")):
                if hasattr(settings, cache):
                    stack.enter_context(settings.patch({cache: False}))
            (code,) = run_and_get_code(Compiler("default", inductor=options)(network.forward), x)[1]
        called = code[code.index("def call(") :]
        return re.sub(r"#.*", "", called[: called.index("def get_args" if "def get_args" in called else "__main__")])

    plain = code()
    assert code() == plain
    available = [name for name in INDUCTOR_OPTIONS if all(has_setting(config, s) for s in INDUCTOR_OPTIONS[name])]
    assert {name for name in available if code(name) != plain} == set(CPU_OPTIONS)
