"""Settings of a GPU, without one: TF32 emulated on the CPU, and the calls that PyTorch receives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from agreement import GPU
from models import relative_error

from sd import Optimisations, StableDiffusion
from sd.errors import ConfigError, Unavailable
from sd.features import FEATURES, has
from sd.optimise import cuda_graphs
from sd.optimise.compile import WHOLE_NORM, Compiler, choices_of_whole_norms
from sd.optimise.presets import parse

TECHNIQUES = {
    "sdpa": {},
    "channels_last": {"channels_last": True},
    "caches": {"fused_qkv": True, "cache_context_kv": True, "cache_time_embeddings": True},
}
IMAGE_CHECK_BOUND = 1e-3  # of latents in fp32 against the original, in perf.session.image_check
needs_compile = pytest.mark.skipif(not has("compile"), reason="this torch has no torch.compile")


def tf32(x):
    """x rounded to TF32's 10 bits of mantissa, as a tensor core rounds its inputs."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).reshape(x.shape)


@pytest.fixture
def emulated_tf32(monkeypatch):
    """Convolutions in TF32 wherever cuDNN would use it, also on a CPU. cuDNN may by default."""
    convolution = F.conv2d

    def conv2d(x, weight, *arguments, **options):
        if torch.backends.cudnn.allow_tf32 and x.dtype == torch.float32:
            x, weight = tf32(x), tf32(weight)
        return convolution(x, weight, *arguments, **options)

    monkeypatch.setattr(F, "conv2d", conv2d)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr("sd.optimise.apply.require_available", lambda *_: None)  # it refuses tf32 on a CPU


def _latents(model, steps=20):
    return model.txt2img("a red star", steps=steps, sampler="plms", scale=7.5, seed=4).latents


@pytest.fixture(scope="module")
def reference():
    model = StableDiffusion.tiny(optimisations=Optimisations(attention="original"))
    return _latents(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", TECHNIQUES)
def test_fp32_is_fp32_unless_tf32_is_chosen(emulated_tf32, reference, name):
    """With the same techniques TF32 is over the bound, and fp32, also where the process allows TF32, far below it."""
    model = StableDiffusion.tiny(optimisations=Optimisations(**TECHNIQUES[name]))
    assert relative_error(_latents(model), reference) <= IMAGE_CHECK_BOUND / 10
    assert torch.backends.cudnn.allow_tf32
    model.optimise(Optimisations(tf32=True, **TECHNIQUES[name]))
    assert relative_error(_latents(model), reference) > IMAGE_CHECK_BOUND


@pytest.mark.parametrize("enabled", [False, True])
def test_cudnn_measures_its_algorithms_only_around_the_models_calls(monkeypatch, enabled):
    monkeypatch.setattr("sd.optimise.apply.require_available", lambda *_: None)
    model = StableDiffusion.tiny(optimisations=Optimisations(cudnn_benchmark=enabled))
    before = torch.backends.cudnn.benchmark
    inside = []

    def fail():
        with model.context():
            inside.append(torch.backends.cudnn.benchmark)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [enabled]
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.skipif(not has("reduction_choices"), reason="inductor's choices cannot be overridden in this torch")
@pytest.mark.parametrize(
    "elements, whole",
    [(10240, True), (20480, True), (WHOLE_NORM, True), (WHOLE_NORM + 1, False), (40960, False), (122880, False)],
)
def test_whole_norms_split_only_large_reductions(monkeypatch, elements, whole):
    """64 groups of SD2 have 10240 elements at 16 x 16 pixels, up to 122880 at 64 x 64; inductor itself splits all."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import DeviceProperties

    h100 = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, warp_size=32)
    monkeypatch.setattr(DeviceProperties, "create", classmethod(lambda cls, device: h100))
    device = torch.device("cuda")
    assert InductorChoices().reduction_split_factor(device, elements, 64, inner_reduction=True) > 1
    split = choices_of_whole_norms().reduction_split_factor(device, elements, 64, inner_reduction=True)
    assert (split == 1) is whole


@needs_compile
def test_whole_norms_are_refused_where_they_change_nothing():
    with pytest.raises(Unavailable, match="whole_norms"):
        Compiler("default", whole_norms=True).require(torch.device("cpu"))
    with pytest.raises(ConfigError, match="whole_norms: nothing is compiled"):
        Optimisations(whole_norms=True)
    nothing = {"compile": "none", "compile_autoencoder": "none", "compile_text_encoder": "none", "cuda_graph": "none"}
    assert not parse("fast", "cuda", nothing).whole_norms


@needs_compile
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_no_mode_includes_coordinate_descent(mode):
    """PyTorch's max-autotune modes do; the other settings of each mode are its own."""
    options = Compiler(mode).options()
    assert "coordinate_descent_tuning" not in options
    assert options.get("max_autotune", False) == mode.startswith("max-autotune")
    if mode == "default" or not has("mode_options"):
        return
    of_torch = torch._inductor.list_mode_options(mode)
    assert {**options, "coordinate_descent_tuning": True}.items() >= of_torch.items()
    named = Compiler(mode, inductor=("coordinate_descent_tuning",)).options()
    assert named == {**options, "coordinate_descent_tuning": True}


@needs_compile
@pytest.mark.compile
@pytest.mark.parametrize("without_argument", [False, True])
def test_many_shapes_compile_where_torch_compile_has_no_limit_argument(monkeypatch, without_argument):
    """torch 2.11 has none. By default the ninth graph of a function, such as a block's at its ninth size, is an error."""
    import torch._dynamo

    if without_argument:
        monkeypatch.setitem(FEATURES, "recompile_limit", SimpleNamespace(available=False))
    torch._dynamo.reset()
    double = Compiler("default", "eager")(lambda x: 2 * x)
    for size in range(2, 14):
        assert double(torch.ones(size)).sum() == 2 * size
    torch._dynamo.reset()


def test_a_compiled_decoder_is_observed_at_its_second_call(monkeypatch):
    """The first call compiles, and the profiler would record every autotuned candidate."""
    monkeypatch.setattr(Compiler, "with_cloned_outputs", lambda self, function: function)
    monkeypatch.setattr(Compiler, "require", lambda self, device: None)
    model = StableDiffusion.tiny(optimisations=Optimisations(compile_autoencoder="default"))
    _latents(model, steps=2)
    assert model.kernels["autoencoder"] == ()
    _latents(model, steps=2)
    assert model.kernels["autoencoder"]


@pytest.mark.parametrize(
    "compiler, records_graphs",
    [
        (Compiler("reduce-overhead"), True),
        (Compiler("default", "cudagraphs"), True),
        (Compiler("default"), False),
        (Compiler("default", "tensorrt"), False),
    ],
)
def test_outputs_of_recorded_graphs_are_copied(monkeypatch, compiler, records_graphs):
    """The next call overwrites the memory of such an output."""
    memory = torch.zeros(2)
    monkeypatch.setattr(Compiler, "__call__", lambda self, function: lambda: memory)
    output = compiler.with_cloned_outputs(lambda: None)()
    memory.fill_(1)
    assert output.sum() == (0 if records_graphs else 2)


@pytest.mark.parametrize("available", [False, True])
def test_another_threads_cuda_calls_do_not_end_a_recording(monkeypatch, available):
    monkeypatch.setitem(FEATURES, "capture_error_mode", SimpleNamespace(available=available))
    received = []

    class Context:
        def __init__(self, *arguments, **options):
            received.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_stream(self, stream):
            pass

    monkeypatch.setattr(torch.cuda, "graph", Context)
    for name in ("Stream", "stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Context())
    received.clear()
    recording = cuda_graphs.Graphed(lambda x: x + 1)
    monkeypatch.setattr(Context, "replay", lambda self: None, raising=False)
    recording(torch.ones(2))
    (options,) = [x for x in received if "stream" in x]
    assert isinstance(options.pop("stream"), Context)  # of the arguments' device, which need not be the current one
    assert options == ({"capture_error_mode": "thread_local"} if available else {})


@needs_compile  # Traced needs a newer torch than 1.12
def test_a_recording_is_made_anew_where_the_weights_have_moved(monkeypatch):
    """It would read memory that was freed, and its images would be those of former weights, or noise."""
    monkeypatch.setattr(cuda_graphs, "_Recording", Traced)
    network = torch.nn.Linear(2, 2)
    with torch.no_grad():
        graphed = cuda_graphs.Graphed(network, network, every_call=False)
        x = torch.ones(1, 2)
        graphed.begin_run()
        graphed(x)
        recording = next(iter(graphed.recordings.values()))
        network.weight.add_(1)  # in place, as a LoRA
        graphed.begin_run()
        assert torch.equal(graphed(x), network(x)) and next(iter(graphed.recordings.values())) is recording
        network.weight = torch.nn.Parameter(2 * network.weight)
        graphed.begin_run()
        assert torch.equal(graphed(x), network(x)) and next(iter(graphed.recordings.values())) is not recording


def test_static_inputs_of_the_inference_mode_are_copied_at_every_call(monkeypatch):
    """Changes of such tensors are not counted, and reading the count is an error."""
    recording = object.__new__(cuda_graphs._Recording)
    recording.inputs, recording.copied = [torch.zeros(2)], [(None, 0)]
    recording.graph, recording.output = SimpleNamespace(replay=lambda: None), recording.inputs[0]
    with torch.inference_mode():
        x = torch.ones(2)
        assert torch.equal(recording((x,)), x)
        x.add_(1)
        assert torch.equal(recording((x,)), x)


class Traced:
    """A recording on a CPU: the operators of one call with what they took from elsewhere, in the place of a CUDA graph."""

    def __init__(self, function, arguments):
        from torch.fx.experimental.proxy_tensor import make_fx

        for _ in range(cuda_graphs.WARM_UP_CALLS):
            function(*arguments)
        self.traced = make_fx(lambda *each: function(*each))(*arguments)

    def __call__(self, arguments):
        return cuda_graphs.cloned(self.traced(*arguments))


@pytest.mark.slow
@needs_compile
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_recorded_networks_give_the_same_images(monkeypatch, tmp_path, device):
    """Also with another prompt, seed, number of steps and guidance, and after embeddings and a LoRA were loaded."""
    caches = TECHNIQUES["caches"]
    if device == "cpu":
        monkeypatch.setattr(cuda_graphs, "_Recording", Traced)
        monkeypatch.setattr("sd.optimise.apply.require_available", lambda *_: None)  # it refuses graphs on a CPU
    normal = torch.Generator().manual_seed(0)
    for name in "xy":
        torch.save({f"<{name}>": torch.randn(2, 32, generator=normal)}, tmp_path / f"{name}.pt")
    plain = StableDiffusion.tiny(device, Optimisations(**caches))
    recorded = StableDiffusion.tiny(device, Optimisations(cuda_graph="networks", **caches))
    width = "unet.middle_block.1.transformer_blocks.0.attn2.to_k"
    rows, columns = plain.state_dict()[f"{width}.weight"].shape
    lora = {"lora_A": torch.randn(2, columns, generator=normal), "lora_B": torch.randn(rows, 2, generator=normal)}
    torch.save({f"{width}.{name}.weight": factor for name, factor in lora.items()}, tmp_path / "lora.pt")

    def compare(prompt, steps=4, **options):
        ours, theirs = (model.txt2img(prompt, steps=steps, **options) for model in (recorded, plain))
        assert relative_error(ours.latents, theirs.latents) <= 1e-4
        assert (ours.images.int() - theirs.images.int()).abs().max() <= 1
        return theirs.latents

    first = compare("a red star", seed=1)
    compare("a blue ring", seed=2, steps=2)
    for name in "xy":
        for model in (plain, recorded):
            model.load_embedding(tmp_path / f"{name}.pt")
        compare(f"a <{name}> star", seed=2)
    for model in (plain, recorded):
        model.load_lora(tmp_path / "lora.pt")
    assert relative_error(compare("a red star", seed=1), first) > 1e-2
    compare("a red star", seed=1, scale=1.0)
    assert recorded.kernels == plain.kernels and all(plain.kernels.values())
    calls = recorded._calls
    recordings = {
        name: len(getattr(calls, name).recordings) for name in ("encode", "project_context", "unet", "decode")
    }
    # Those without embeddings and with one are dropped; with guidance a GPU encodes two prompts in one call.
    assert recordings == {"encode": 1 if device == "cpu" else 2, "project_context": 2, "unet": 2, "decode": 1}
    assert len(calls.time_table.recordings) == 2  # numbers of timesteps
    recorded.optimise(Optimisations(**caches))
    assert recorded._calls.encode is recorded.text_encoder


@pytest.mark.parametrize("device, expected", [("cpu", [2, 2]), pytest.param("cuda", [4], marks=GPU)])
def test_prompt_and_negative_prompt_are_encoded_in_one_call_of_a_gpu(device, expected):
    model = StableDiffusion.tiny(device)
    batches = []
    forward = model.text_encoder.forward
    model.text_encoder.forward = lambda tokens: batches.append(len(tokens)) or forward(tokens)
    model.txt2img(["a red star", "a green ring"], steps=2, negative_prompt="blue")
    assert batches == expected
    batches.clear()
    model.txt2img("a red star", steps=2, scale=1.0)
    assert batches == [1]


def test_an_overflow_of_fast_is_an_error_that_names_bf16():
    """`fast` is fp16 on a GPU; weights that overflow it must not give a black image."""
    from sd.errors import BadImage

    if not has("cpu_fp16"):
        pytest.skip("this torch has no fp16 convolution on a CPU")
    model = StableDiffusion.tiny(optimisations=Optimisations(precision="fp16"))
    with torch.no_grad():
        model.unet.input_blocks[0][0].weight.mul_(1e6)
    with pytest.raises(BadImage, match="bf16"):
        _latents(model, steps=2)
