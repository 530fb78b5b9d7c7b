"""Long prompts: the dropped part, chunks of 75 tokens with every attention, sampler and optimisation, and negative prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import SMALLEST, relative_error, smallest
from selection import slow_or_nightly

from sd import ConfigError, Optimisations, SDWarning, StableDiffusion, Unavailable
from sd.checkpoint import layouts
from sd.checkpoint.diffusers_folder import write_tokenizer
from sd.choices import SAMPLERS
from sd.config.presets import TextConfig
from sd.features import has
from sd.models.tokenizer import END, START, tokenize, tokenize_chunks
from sd.sampling.denoiser import Denoiser
from sd.sampling.noise import PerImageNoise
from sd.sampling.plan import run as run_plan
from sd.sampling.samplers import sampler as sampler_by_name

LONG = "a red star, " * 24 + "on a blue background near the very end"  # 24 * 4 + 8 tokens
NEGATIVE = "blurry"


# --- tokens


@pytest.mark.parametrize("encoder, padding", [("openclip", 0), ("clip", END)])
def test_chunks_have_their_own_start_end_and_padding(encoder, padding):
    words = [f"{'abcdefghij'[i % 10]}" for i in range(160)]  # one token each
    tokens = tokenize_chunks([" ".join(words), "a"], encoder, None)
    assert tokens.ids.shape == (2, 3, 77) and tokens.lengths == (160, 1) and tokens.dropped == ("", "")
    assert (tokens.ids[:, :, 0] == START).all()
    whole = torch.cat([tokens.ids[0, 0, 1:76], tokens.ids[0, 1, 1:76], tokens.ids[0, 2, 1:11]])
    assert whole.tolist() == [tokenize([word], encoder)[0, 1].item() for word in words]
    assert tokens.ids[0, :, 76].tolist() == [END, END, padding]
    assert tokens.ids[0, 2, 11:].tolist() == [END, *[padding] * 65]
    empty = tokenize([""], encoder)[0]
    assert torch.equal(tokens.ids[1], torch.stack([tokenize(["a"], encoder)[0], empty, empty]))


@pytest.mark.parametrize("length, chunks", [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_number_of_chunks(length, chunks):
    text = " ".join(["word"] * length)
    assert tokenize_chunks([text], chunks=None).ids.shape[1] == chunks
    truncated = tokenize_chunks([text])
    assert torch.equal(truncated.ids[:, 0], tokenize([text]))
    assert truncated.dropped == (" ".join(["word"] * (length - 75)),)


# --- dropped text


def test_vectors_of_an_embedding_that_are_cut_off_are_dropped_text():
    words = " ".join(["word"] * 70)
    tokens = tokenize_chunks(
        [f"{words} <bad> blue", f"{words} <bad>", f"{words} a"], added={"<bad>": range(50000, 50008)}
    )
    assert tokens.lengths == (79, 78, 71) and tokens.dropped == ("<bad> blue", "<bad>", "")


@pytest.mark.slow
def test_dropped_text_is_reported():
    model = smallest()
    with pytest.warns(SDWarning) as warned:
        result = model.txt2img([LONG, "a circle"], steps=1, sampler="ddim", negative_prompt=[NEGATIVE, LONG])
    end = "star, a red star, a red star, a red star, a red star, on a blue background near the very end"
    assert [part.replace(" ,", ",")[-len(end) :] for part in result.dropped] == [end, ""]
    assert result.dropped_negative == ("", result.dropped[0])
    assert result.prompt_chunks == 1
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2 and all("\n" not in message for message in messages)
    assert messages[0].startswith("prompt of 104 tokens: the last 29 are not used: ")
    assert result.dropped[0] in messages[0] and "--prompt-chunks auto" in messages[0]
    assert messages[1].startswith("negative prompt of ")


def test_short_prompts_are_not_reported(recwarn):
    result = smallest().txt2img("a red star", steps=1, sampler="ddim", negative_prompt=NEGATIVE)
    assert result.dropped == result.dropped_negative == ("",)
    assert not [warning for warning in recwarn if warning.category is SDWarning]


def test_chunks_leave_nothing_out(recwarn):
    result = smallest().txt2img(LONG, steps=1, sampler="ddim", prompt_chunks="auto")
    assert result.dropped == ("",) and result.prompt_chunks == 2
    assert not [warning for warning in recwarn if warning.category is SDWarning]


def test_negative_prompt_without_guidance_is_reported():
    with pytest.warns(SDWarning, match="negative prompt 'blurry': not used, since guidance is off at scale 1"):
        result = smallest().txt2img("a", steps=1, sampler="ddim", scale=1.0, negative_prompt=NEGATIVE)
    assert result.dropped_negative == ()


@pytest.mark.parametrize("chunks", [0, -1, "many", 1.5])
def test_invalid_number_of_chunks_is_refused(chunks):
    with pytest.raises(ConfigError, match=r"prompt_chunks .*: must be at least 1, or auto"):
        smallest().txt2img("a", steps=1, sampler="ddim", prompt_chunks=chunks)


# --- chunks against an independent computation


def chunk_by_chunk(model, prompt: str, count: int) -> torch.Tensor:
    """The context of a prompt: tokens of single words, joined by hand, each chunk encoded alone in fp32."""
    words = prompt.replace(",", " ,").split()
    ids = [token for word in words for token in tokenize([word])[0, 1:].tolist() if token not in (0, END)]
    contexts = []
    for i in range(count):
        part = ids[75 * i : 75 * (i + 1)]
        row = [START, *part, END]
        contexts.append(model.text_encoder(torch.tensor([row + [0] * (77 - len(row))])))
    return torch.cat(contexts, dim=1)


@torch.no_grad()
def expected_latents(prompt: str, negative: str, sampler: str, steps: int) -> torch.Tensor:
    """Latents of the plain loop with the original attention in fp32."""
    model = smallest(Optimisations(attention="original"))
    contexts = [chunk_by_chunk(model, text, 2) for text in (prompt, negative)]
    denoise = Denoiser(model.unet, *contexts, 4.0, model.config.parameterization)
    plan, noise = sampler_by_name(sampler)(model.schedule, steps, 0.0), PerImageNoise(3, 1)
    x = noise.initial((1, 4, 8, 8), "cpu")
    return run_plan(plan, denoise, x, plan.noises(noise, x))


def check_chunks(optimisations: dict, sampler: str = "ddim") -> None:
    try:
        model = smallest(Optimisations(**optimisations))
    except Unavailable as error:
        pytest.skip(str(error))
    options = {"steps": 4, "sampler": sampler, "scale": 4.0, "seed": 3, "negative_prompt": NEGATIVE}
    actual = model.txt2img(LONG, prompt_chunks="auto", **options).latents
    error = relative_error(actual, expected_latents(LONG, NEGATIVE, sampler, 4))
    assert error < 1e-4
    with pytest.warns(SDWarning):
        truncated = model.txt2img(LONG, **options).latents
    assert relative_error(truncated, actual) > 2 * error  # the comparison detects a prompt that is cut


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(sampler):
    check_chunks({}, sampler)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimisations",
    [
        {"attention": "original"},
        {"attention": "xformers"},
        {"attention": "mha"},
        {"attention": "mha", "sdpa_kernels": ("math",)},
        {"attention": "sdpa", "sdpa_kernels": ("math",)},
        {"attention": "sdpa", "sdpa_kernels": ("flash",)},
        {"attention": "original", "original_steps": True},
        {"cache_context_kv": True, "cache_time_embeddings": True},
        {"cache_context_kv": True, "fused_qkv": True, "fused_kv": True, "channels_last": True},
    ],
    ids=lambda optimisations: " ".join(f"{name}={value}" for name, value in optimisations.items()),
)
def test_every_attention_and_optimisation(optimisations):
    if not has("sdpa") and optimisations.get("attention") in ("sdpa", "mha") and "sdpa_kernels" in optimisations:
        pytest.skip("this torch has no SDPA")
    check_chunks(optimisations)


@pytest.mark.compile
@pytest.mark.skipif(not has("compile"), reason="torch >= 2.0")
@pytest.mark.parametrize("caches", slow_or_nightly([False, True], lambda caches: caches))
def test_compiled_step(caches):
    step = {"compile": "default", "compile_scope": "step", "compile_backend": "aot_eager"}
    check_chunks({**step, "cache_context_kv": caches, "cache_time_embeddings": caches})


@pytest.mark.parametrize(
    "optimisations", [{"precision": "bf16"}, {"token_merging": 0.5}, {"feature_caching": 2}], ids=str
)
def test_approximations_run_with_chunks(optimisations):
    model = smallest(Optimisations(**optimisations))
    latents = model.txt2img(LONG, steps=4, sampler="ddim", seed=3, prompt_chunks=3).latents
    assert latents.isfinite().all()


def test_img2img_encodes_chunks():
    model, image = smallest(), torch.zeros(3, 64, 64)
    chunked = model.img2img(LONG, image, steps=4, prompt_chunks="auto")
    assert chunked.prompt_chunks == 2 and chunked.dropped == ("",)
    with pytest.warns(SDWarning, match="prompt of"):
        assert not torch.equal(chunked.latents, model.img2img(LONG, image, steps=4).latents)


def test_inpaint_encodes_chunks():
    model, image, mask = smallest(), torch.zeros(3, 64, 64), torch.ones(64, 64)
    chunked = model.inpaint(LONG, image, mask, steps=4, prompt_chunks="auto")
    assert chunked.prompt_chunks == 2 and chunked.dropped == ("",)
    with pytest.warns(SDWarning, match="prompt of"):
        assert not torch.equal(chunked.latents, model.inpaint(LONG, image, mask, steps=4).latents)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["clip", "openclip"])
def test_context_equals_transformers(kind, tmp_path):
    """The tokenizer and the text model of transformers, chunk by chunk as compel does."""
    transformers = pytest.importorskip("transformers", reason="the extra `peers` is not installed")
    text = TextConfig(kind, width=128, layers=3, vocab_size=49408)
    config = replace(SMALLEST, text=text, unet=replace(SMALLEST.unet, context_dim=128))
    model = StableDiffusion.random(config)
    write_tokenizer(tmp_path, config)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    peer = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=model.text_encoder.transformer.resblocks[0].attn.heads,
            hidden_act="quick_gelu" if kind == "clip" else "gelu",
        )
    ).eval()
    state = layouts.openclip_text_to_hf(model.text_encoder.state_dict())
    if not any(name.startswith("text_model.") for name in peer.state_dict()):  # newer releases have no prefix
        state = layouts.with_prefix(state, "text_model.")
    peer.load_state_dict(state, strict=False)
    ids = tokenizer(LONG, truncation=False, add_special_tokens=False).input_ids
    contexts = []
    for i in range(0, len(ids), 75):
        row = [tokenizer.bos_token_id, *ids[i : i + 75], tokenizer.eos_token_id]
        row += [tokenizer.eos_token_id if kind == "clip" else 0] * (77 - len(row))
        with torch.no_grad():
            contexts.append(peer(input_ids=torch.tensor([row])).last_hidden_state)
    expected = torch.cat(contexts, dim=1)
    assert expected.shape == (1, 154, 128)
    assert relative_error(model.encode_prompts([LONG], "auto"), expected) < 1e-5
