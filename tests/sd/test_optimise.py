"""Each technique alone: its error against the fp32 original, the operators it saves, and that it can be undone."""

from __future__ import annotations

import pytest
import torch
from counting import Counting, needs_counting
from models import relative_error

from sd import Optimisations, StableDiffusion
from sd.attention.availability import unavailable_reason
from sd.attention.functions import DEFAULT_ATTENTION, Attention
from sd.choices import ATTENTION
from sd.errors import ConfigError, Unavailable
from sd.features import computes_slowly, has
from sd.optimise.compile import separate_biases, use_nhwc
from sd.optimise.optimisations import OWN_KERNELS, WEIGHT_DTYPES, can_compile_ahead
from sd.optimise.presets import TECHNIQUES, parse
from sd.sampling.samplers import SAMPLERS

CACHES = {"cache_context_kv": True, "cache_time_embeddings": True}
SHARED = {"shared_guidance": True}
EXACT = {
    "channels_last": {"channels_last": True},
    "fused_qkv": {"fused_qkv": True},
    "fused_kv": {"fused_kv": True},
    "cache_context_kv": {"cache_context_kv": True},
    "cache_time_embeddings": {"cache_time_embeddings": True},
    "shared_guidance": SHARED,
    "folded_projections": {"folded_projections": True},
    "original_steps": {"original_steps": True},
    "all": {"channels_last": True, "fused_qkv": True, "fused_kv": True, **CACHES, **SHARED},
}
# Fields of `fast` that contradict a technique and are reset when it is named.
RESET = {
    **{name: {"fused_qkv", "packed", "avx2_layers", "folded_projections"} for name in ("int8", "fp8")},
    "folded_projections": {"packed", "avx2_layers", "avx512_layers"},
    **{name: {"cuda_graph"} for name in ("reduce-overhead", "max-autotune", "compile_step")},
    "autocast": {"cuda_graph", "packed", *OWN_KERNELS},
    "avx2_attention": {"avx512_attention", "avx512_layers"},
    "avx2_layers": {"packed", "avx512_attention", "avx512_layers", "separate_bias", "folded_projections"},
    "packed": {"avx2_layers", "avx512_layers", "separate_bias", "folded_projections"},
    "separate_bias": {"packed", "avx2_layers", "avx512_layers"},
    "compile_blocks": {"nhwc_norms", "separate_bias", "folded_projections"},
    "freezing": {"packed", "avx2_layers", "avx512_layers"},
    "original_steps": {*CACHES, *SHARED, "cuda_graph"},
    **{
        name: {
            *("avx2_layers", "avx2_attention"),
            *({"packed"} if computes_slowly(WEIGHT_DTYPES["bf16"]) else ()),
            *(("separate_bias", "folded_projections") if name == "avx512_layers" else ()),
        }
        for name in ("bf16", "avx512_attention", "avx512_layers")
    },
    "fp16": {*OWN_KERNELS, *({"packed"} if computes_slowly(WEIGHT_DTYPES["fp16"]) else set())},
}
# Relative error of a UNet call and of a run's latents in fp32 against `original`: only the order of sums differs.
UNET_BOUND, LATENTS_BOUND = 1e-5, 1e-4


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.tiny(optimisations=Optimisations(attention="original"))


@pytest.fixture(scope="module")
def reference(model):
    """The fp32 original's UNet output and latents."""
    model.optimise(Optimisations(attention="original"))
    return _call(model), _run(model).latents


@torch.no_grad()
def _call(model, counting=None):
    """A UNet call with the inputs of the sampling loop and guidance's batch of 2."""
    chosen, generator = model.optimisations, torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, 32)))
    timesteps = torch.full((2,), 501.0)
    x = x.contiguous(memory_format=chosen.memory_format())
    if chosen.cache_context_kv:
        context = model.unet.project_context(context)
    if chosen.cache_time_embeddings:
        timesteps = model.unet.time_table(timesteps[:1])
    if counting is None:
        return model.unet(x, timesteps, context)
    with counting:
        return model.unet(x, timesteps, context)


def _run(model, **options):
    return model.txt2img(
        "a red star on a white background",
        **{"steps": 5, "sampler": "plms", "scale": 4.0, "seed": 2, **options},
    )


def _count(model, **fields) -> Counting:
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION, **fields))
    counting = Counting()
    _call(model, counting)
    return counting


@pytest.mark.slow
@pytest.mark.parametrize("attention", [name for name in ATTENTION if name not in ("mha", "xformers")])
@pytest.mark.parametrize("name", EXACT)
def test_equals_the_original_and_is_undone_bit_for_bit(model, reference, name, attention):
    reason = unavailable_reason(Attention(attention), head_dim=8)
    if reason:
        pytest.skip(reason)
    plain = Optimisations(attention=attention)
    model.optimise(plain)
    before, weights = _run(model), {key: value.clone() for key, value in model.unet.state_dict().items()}

    model.optimise(Optimisations(attention=attention, **EXACT[name]))
    assert relative_error(_call(model), reference[0]) <= UNET_BOUND
    assert relative_error(_run(model).latents, reference[1]) <= LATENTS_BOUND

    model.optimise(plain)
    after = _run(model)
    assert torch.equal(after.latents, before.latents) and torch.equal(after.images, before.images)
    state = model.unet.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


@needs_counting
@torch.no_grad()
def test_what_precedes_the_prompt_runs_once_for_both_halves(model):
    """The first convolutions and self-attention take a batch of 1; two equal halves give the same output."""
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION))
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((3, 4, 8, 8), (6, 77, 32)))
    expected = model.unet(torch.cat([x, x]), torch.full((6,), 501.0), context)
    with Counting() as counting:
        actual = model.unet(x, torch.full((1,), 501.0), context)
    assert relative_error(actual, expected) <= UNET_BOUND
    batches = [len(arguments[0]) for op, arguments, _ in counting.calls if op == "convolution"]
    alone = batches.index(6)  # conv_in and those of the first residual block
    assert batches[:alone] == [3] * alone and alone >= 3 and set(batches[alone:]) == {6}


@needs_counting
def test_folded_projections_need_one_product_less_in_each_transformer(model):
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION))
    plain = _count(model)
    folded = _count(model, folded_projections=True)
    products = [sum(counting.ops[name] for name in ("addmm", "mm", "linear")) for counting in (plain, folded)]
    assert products[0] - products[1] == len(model.unet.transformers)
    weight = model.unet.transformers[0].folded_weight
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION))
    assert weight is not None and model.unet.transformers[0].folded_weight is None


@torch.no_grad()
def test_folded_projections_follow_other_weights(model):
    """Loaded into the network itself, which is an ordinary module."""
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION))
    before = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION, folded_projections=True))
    try:
        model.unet.load_state_dict({name: 1.1 * weight for name, weight in before.items()})
        folded = _call(model)
        model.optimise(Optimisations(attention=DEFAULT_ATTENTION))
        assert relative_error(folded, _call(model)) <= UNET_BOUND
    finally:
        model.unet.load_state_dict(before)


def test_folding_keeps_the_dtype_under_autocast(model):
    """A bias in fp32 would make the residuals after it fp32."""
    dtypes = []
    for folded in (False, True):
        model.optimise(Optimisations(attention=DEFAULT_ATTENTION, precision="autocast", folded_projections=folded))
        transformer = model.unet.transformers[0]
        channels = transformer.proj_out.weight.shape[0]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            context = [model.unet._contexts(torch.zeros(1, 77, 32))[0][0]]
            dtypes.append(transformer(torch.zeros(1, channels, 8, 8, dtype=torch.bfloat16), context).dtype)
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION))
    assert dtypes == [torch.bfloat16, torch.bfloat16]


@needs_counting
def test_separate_biases_are_added_after_the_product(model, reference):
    """Those of the attentions, of the feed-forward and of the projection back to the image; False undoes them.

    That of the projection before is separate in NCHW anyway, since the tokens are a transposed view.
    """
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION))
    plain, before, after = _call(model), Counting(), Counting()
    _call(model, before)
    separate_biases(model.unet, True)  # as compiled; compiled code is not counted
    assert relative_error(_call(model, after), reference[0]) <= UNET_BOUND
    assert model.config.unet.use_linear_in_transformer
    separated = 3 * len(model.unet.transformer_blocks()) + len(model.unet.transformers)
    differences = [after.ops[name] - before.ops[name] for name in ("addmm", "mm", "add")]
    assert differences == [-separated, separated, separated]
    separate_biases(model.unet, False)
    assert torch.equal(_call(model), plain)


def test_norms_and_concatenations_in_nhwc(model, reference):
    """As compiled: the error, the layout of every convolution's input, and that they are undone."""
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION, channels_last=True))
    plain, convolutions = _call(model), []
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = model.decode(latents)
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: convolutions.append(inputs[0]))
        for network in (model.unet, model.autoencoder.decoder)
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    for network in (model.unet, model.autoencoder.decoder):
        use_nhwc(network, True)
    assert relative_error(_call(model), reference[0]) <= UNET_BOUND
    assert relative_error(model.decode(latents), decoded) <= UNET_BOUND
    assert len(convolutions) == len(hooks)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in convolutions)
    for hook in hooks:
        hook.remove()
    for network in (model.unet, model.autoencoder.decoder):
        use_nhwc(network, False)
    assert torch.equal(_call(model), plain) and torch.equal(model.decode(latents), decoded)


@pytest.mark.parametrize("change", [separate_biases, use_nhwc])
def test_rounding_of_what_is_written_for_compiled_code(model, reference, change):
    """In bf16, whose mantissa is the shortest, each alone adds at most a quarter to the error of a UNet call (0.14 was seen)."""
    rounded = StableDiffusion.tiny(optimisations=Optimisations(precision="bf16", channels_last=True))
    plain = relative_error(_call(rounded).float(), reference[0])
    change(rounded.unet, True)
    assert relative_error(_call(rounded).float(), reference[0]) <= 1.25 * plain


def test_fused_weights_are_shared_and_stay_out_of_checkpoints(model):
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION, fused_qkv=True, fused_kv=True))
    block = model.unet.transformer_blocks()[0]
    assert block.attn1.to_q.weight.data_ptr() == block.attn1.fused.data_ptr()
    assert block.attn2.to_k.weight.data_ptr() == block.attn2.fused.data_ptr()
    assert not [key for key in model.unet.state_dict() if "fused" in key]
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION))
    assert block.attn1.fused is None


@needs_counting
def test_channels_last_of_the_decoder_copies_no_layout(model):
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION, channels_last=True))
    latents = torch.zeros(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Counting() as counting:
        model.autoencoder.decode(latents)
    convolutions = [arguments for op, arguments, _ in counting.calls if op == "convolution"]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, *_ in convolutions)


@needs_counting
def test_autocast_casts_each_weight_once(model):
    """Autocast caches the cast of a weight only if the weight requires a gradient."""
    model.optimise(Optimisations(attention=DEFAULT_ATTENTION, precision="autocast"))
    weights = {tuple(weight.shape) for weight in model.unet.parameters() if weight.dim() > 1}
    with model.optimisations.autocast(model.device):
        _call(model)
        counting = Counting()
        _call(model, counting)
    cast = [tuple(arguments[0].shape) for op, arguments, _ in counting.calls if op == "_to_copy"]
    assert cast, "autocast casts activations"
    assert not weights.intersection(cast)


class TestSamplingLoop:
    """No synchronisation, no copy to the device and few operators of the sampler itself, at every step of every sampler."""

    STEPS = 5

    def _loop(self, model, monkeypatch, sampler, steps=STEPS, eta=0.0, **fields):
        """Count the loop of a whole txt2img, its UNet calls included."""
        model.optimise(Optimisations(attention=DEFAULT_ATTENTION, **fields))
        calls, counting = model._calls, Counting()

        def counted(*arguments):
            with counting:
                return calls.sample(*arguments)

        monkeypatch.setattr(model, "_calls", _with_sample(calls, counted))
        _run(model, steps=steps, sampler=sampler, eta=eta)
        return counting

    @pytest.mark.slow
    @needs_counting
    @pytest.mark.parametrize("sampler, eta", [*((name, 0.0) for name in SAMPLERS), ("ddim", 1.0)])
    @pytest.mark.parametrize("fields", [{}, EXACT["all"]], ids=["plain", "fast"])
    def test_neither_synchronises_nor_copies(self, model, monkeypatch, sampler, eta, fields):
        counting = self._loop(model, monkeypatch, sampler, eta=eta, **fields)
        assert counting.host_waits == 0
        if fields:
            assert counting.made == 0
            assert counting.ops["_to_copy"] == counting.ops["copy_"] == 0

    @pytest.mark.slow
    @needs_counting
    # Guidance (cat, sub, mul, add), v to noise (3), timesteps (full) and the update.
    @pytest.mark.parametrize("sampler, most", [("ddim", 11), ("euler", 10), ("dpm_solver", 14), ("plms", 15)])
    def test_ops_per_step(self, model, monkeypatch, sampler, most):
        # `_count` calls the UNet with both halves, which shared guidance copies within the UNet.
        fields = {**EXACT["all"], **dict.fromkeys(SHARED, False)}
        with_unet = [self._loop(model, monkeypatch, sampler, steps=steps, **fields) for steps in (5, 10)]
        unet = _count(model, **fields)
        own = (with_unet[1].total - with_unet[0].total) / 5 - unet.total
        assert own <= most

    @pytest.mark.slow
    @needs_counting
    @pytest.mark.parametrize("sampler", ["ddim", "plms"])
    def test_original_steps_synchronise_three_times_a_step(self, model, monkeypatch, sampler):
        from sd.sampling import original_loop

        counting, run = Counting(), original_loop.run

        def counted(*arguments, **options):
            with counting:
                return run(*arguments, **options)

        monkeypatch.setattr(original_loop, "run", counted)
        model.optimise(Optimisations(attention="original", original_steps=True))
        _run(model, steps=self.STEPS, sampler=sampler)
        updates = self.STEPS + (sampler == "plms")  # its first step has two UNet calls
        assert counting.host_waits == 3 * updates
        assert counting.ops["arange"] == updates  # the frequencies, once for each UNet call

    @pytest.mark.parametrize("sampler", ["dpm_solver", "euler"])
    def test_original_steps_support_two_samplers(self, model, sampler):
        model.optimise(Optimisations(original_steps=True))
        with pytest.raises(ConfigError, match="ddim, plms"):
            _run(model, sampler=sampler)

    @pytest.mark.slow
    @pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.7), ("plms", 0.0)])
    def test_original_steps_equal_the_plans(self, model, sampler, eta):
        options = {"steps": self.STEPS, "sampler": sampler, "eta": eta, "rng": "original"}
        model.optimise(Optimisations())
        ours = _run(model, **options).latents
        model.optimise(Optimisations(original_steps=True))
        assert relative_error(_run(model, **options).latents, ours) <= LATENTS_BOUND


def _with_sample(calls, sample):
    from dataclasses import replace

    return replace(calls, sample=sample)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGPU:
    @pytest.fixture(scope="class")
    def model(self):
        return StableDiffusion.tiny("cuda")

    @pytest.fixture(scope="class")
    def reference(self, model):
        model.optimise(Optimisations(attention="original"))
        return _run(model).latents

    @pytest.fixture(scope="class")
    def half(self):
        """Apart from `model`, since its weights are rounded."""
        return StableDiffusion.tiny("cuda", Optimisations(precision="fp16"))

    @pytest.mark.parametrize("sampler, eta", [*((name, 0.0) for name in SAMPLERS), ("ddim", 1.0)])
    @pytest.mark.parametrize("fields", [{}, EXACT["all"], {"cuda_graph": "unet"}], ids=["plain", "fast", "graph"])
    def test_never_synchronises(self, half, monkeypatch, sampler, eta, fields):
        """PyTorch raises at the first synchronisation of the loop."""
        half.optimise(Optimisations(precision="fp16", **fields))
        _run(half, sampler=sampler, eta=eta)
        calls = half._calls

        def checked(*arguments):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return calls.sample(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(half, "_calls", _with_sample(calls, checked))
        _run(half, sampler=sampler, eta=eta)

    @pytest.mark.parametrize("cuda_graph", ["unet", "networks", "loop"])
    @pytest.mark.parametrize("sampler, eta", [*((name, 0.0) for name in SAMPLERS), ("ddim", 1.0)])
    def test_cuda_graphs(self, model, reference, cuda_graph, sampler, eta):
        """The latents equal those without a graph, another seed replays it, and earlier results stay valid."""
        options = {"sampler": sampler, "eta": eta}
        model.optimise(Optimisations(**EXACT["all"]))
        expected = [_run(model, seed=seed, **options).latents for seed in (2, 3)]
        model.optimise(Optimisations(cuda_graph=cuda_graph, **EXACT["all"]))
        graphed = [_run(model, seed=seed, **options).latents for seed in (2, 3)]
        for ours, theirs in zip(graphed, expected):
            assert relative_error(ours, theirs) <= LATENTS_BOUND

    def test_cuda_graphs_with_feature_caching(self, model):
        """Calls with and without the deep part are separate recordings."""
        model.optimise(Optimisations(feature_caching=2))
        expected = [_run(model, seed=seed).latents for seed in (2, 3)]
        model.optimise(Optimisations(feature_caching=2, cuda_graph="unet"))
        for ours, theirs in zip([_run(model, seed=seed).latents for seed in (2, 3)], expected):
            assert relative_error(ours, theirs) <= LATENTS_BOUND

    def test_fast(self, model, reference):
        fast = Optimisations.fast("cuda")
        model = StableDiffusion.tiny("cuda", fast)  # separate weights, since these are rounded
        assert relative_error(_run(model).latents, reference) <= 0.05


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"attention": "mha", "fused_qkv": True}, "nn.MultiheadAttention"),
        ({"attention": "mha", "cache_context_kv": True}, "nn.MultiheadAttention"),
        ({"original_steps": True, "cache_time_embeddings": True}, "original_steps"),
        ({"original_steps": True, "compile": "default", "compile_scope": "step"}, "original_steps"),
        ({"original_steps": True, "cuda_graph": "unet"}, "original_steps"),
        ({"cuda_graph": "unet", "compile": "reduce-overhead"}, "by itself"),
        ({"cuda_graph": "unet", "precision": "autocast"}, "autocast"),
        ({"cuda_graph": "unet", "compile": "default", "compile_scope": "step"}, "cuda_graph loop"),
        ({"inductor": ("conv_1x1_as_mm",)}, "nothing is compiled"),
        ({"inductor": ("fast_math",), "compile": "default"}, "choose from"),
        ({"feature_caching": 2, "cuda_graph": "loop"}, "feature_caching"),
        ({"feature_caching": 0}, "at least 1"),
        ({"token_merging": 0.9}, "must be in"),
        ({"quantisation": "int8", "fused_qkv": True}, "separate projections"),
        ({"avx512_layers": True, "channels_last": True}, "computes in precision bf16, and precision is full"),
        ({"avx512_layers": True, "precision": "bf16"}, "avx512_layers: .* choose channels_last too"),
        *(
            ({"avx512_layers": True, "precision": "bf16", "channels_last": True, **fields}, message)
            for fields, message in (
                ({"separate_bias": True, "compile": "default"}, "separate_bias: with avx512_layers"),
                ({"folded_projections": True}, "folded_projections: with avx512_layers"),
            )
        ),
        ({"avx512_attention": True, "attention": "sdpa"}, "computes in precision bf16, and precision is full"),
        ({"avx512_attention": True, "precision": "bf16", "attention": "original"}, "choose attention sdpa"),
        ({"avx512_attention": True, "precision": "bf16", "sdpa_kernels": ("math",)}, "choose attention sdpa"),
        ({"compile_scope": "model"}, "choose one of unet, blocks, step"),
        ({"cuda_graph": "networks", "compile_text_encoder": "reduce-overhead"}, "compile_text_encoder reduce-overhead"),
        (
            {"compile": "default", "inductor": ("persistent_tma_matmul",)},
            "persistent_tma_matmul: changes kernels of max",
        ),
        ({"cuda_graph": "networks", "compile": "default", "compile_scope": "step"}, "cuda_graph loop"),
        ({"nhwc_norms": True, "compile": "default"}, "nhwc_norms: images are NCHW"),
        ({"nhwc_norms": True, "channels_last": True}, "nhwc_norms: nothing is compiled by torch.compile"),
        ({"separate_bias": True}, "separate_bias: nothing is compiled by torch.compile"),
        ({"separate_bias": True, "compile_autoencoder": "default"}, "separate_bias: changes the UNet"),
        ({"separate_bias": True, "compile": "default", "compile_scope": "blocks"}, "between the blocks"),
        ({"separate_bias": True, "compile": "default", "packed": True, "channels_last": True}, "with packed"),
        ({"folded_projections": True, "packed": True, "channels_last": True}, "folded_projections: with packed"),
        ({"folded_projections": True, "quantisation": "int8"}, "folded_projections: quantisation"),
        ({"folded_projections": True, "compile": "default", "compile_scope": "blocks"}, "leave one out"),
        ({"shared_guidance": True, "original_steps": True}, "shared_guidance: original_steps"),
        ({"cuda_graph": "vae"}, "choose one of none, unet, networks, loop"),
    ],
)
def test_contradictions_are_refused_by_name(fields, match):
    with pytest.raises(ConfigError, match=match):
        Optimisations(**fields)


@pytest.mark.parametrize("fields", [{"tf32": True}, {"cuda_graph": "unet"}])
def test_gpu_techniques_are_refused_before_any_change(model, fields):
    model.optimise(Optimisations(channels_last=True))
    with pytest.raises(Unavailable, match="NVIDIA GPU"):
        model.optimise(Optimisations(**fields))
    assert model.optimisations.channels_last
    assert model.unet.out[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_presets():
    assert Optimisations.none() == Optimisations()
    fast = Optimisations.fast("cpu", narrow=True)
    assert (fast.precision, fast.cuda_graph, fast.tf32, fast.original_steps) == ("full", "none", False, False)
    assert fast.compile == "none" or has("compile")
    assert (fast.token_merging, fast.feature_caching, fast.quantisation) == (0.0, 1, "none")


def test_fast_of_a_gpu():
    fast = Optimisations.fast("cuda")
    assert (fast.precision, fast.cuda_graph, fast.cudnn_benchmark) == ("fp16", "networks", False)
    assert fast.whole_norms is has("reduction_choices")
    assert fast.nhwc_norms is fast.separate_bias is fast.folded_projections is has("compile")
    if has("compile"):
        assert (fast.compile, fast.compile_autoencoder, fast.compile_text_encoder) == ("default",) * 3
    assert (fast.token_merging, fast.feature_caching, fast.quantisation) == (0.0, 1, "none")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_combines_with_fast(name, device):
    """The named technique is set on either device, and only contradicting fields of the preset are reset."""
    fast = Optimisations.fast(device, narrow=name == "full")  # which chooses the kernels of fp32
    chosen = parse(f"fast,{name}", device)
    assert {field: getattr(chosen, field) for field in TECHNIQUES[name]} == TECHNIQUES[name]
    rest = {field: value for field, value in fast.changed().items() if field not in TECHNIQUES[name]}
    reset = {field for field, value in rest.items() if getattr(chosen, field) != value}
    # A package has whole networks with plain weights.
    backend = set() if can_compile_ahead(vars(chosen)) else {"compile_backend"}
    assert reset == (RESET.get(name, set()) | backend) & set(rest)


def test_an_option_beside_fast_acts_like_the_technique():
    for name in ("autocast", "reduce-overhead"):
        assert parse("fast", "cuda", TECHNIQUES[name]) == parse(f"fast,{name}", "cuda")
    assert parse("fast", "cuda", {"compile_autoencoder": "max-autotune"}).cuda_graph == "unet"
    for base, device in (("none", "cuda"), ("original", "cuda"), ("fast", "cpu")):
        assert parse(base, device, {"compile_autoencoder": "reduce-overhead"}).cuda_graph == "none"
    assert not parse("fast", "cuda", {"compile": "none"}).separate_bias
    assert not parse("fast", "cuda", {"channels_last": False}).nhwc_norms
    nothing = {"compile": "none", "compile_autoencoder": "none", "compile_text_encoder": "none"}
    assert not parse("fast", "cuda", nothing).nhwc_norms
    chosen = parse("fast", "cuda", {"attention": "mha"})
    assert (chosen.attention, chosen.fused_qkv, chosen.cache_context_kv) == ("mha", False, False)
    with pytest.raises(ConfigError, match="autocast frees"):  # named, therefore not reset
        parse("cuda_graph_unet", "cuda", {"precision": "autocast"})
