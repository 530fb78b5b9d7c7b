"""The text towers: released sizes, tokens, and equality with two independent implementations."""

from __future__ import annotations

import pytest
import torch
from models import relative_error, seeded

from sd.checkpoint import layouts
from sd.checkpoint.networks import meta_device
from sd.config.presets import TextConfig, preset
from sd.models.text_encoder import TextEncoder
from sd.models.tokenizer import END, tokenize

START = 49406  # <|startoftext|> of the vocabulary
SMALL = {kind: TextConfig(kind, width=128, layers=3, vocab_size=49408) for kind in ("clip", "openclip")}
PROMPTS = ["", "A photo", "a  RED café, très joli &amp; 漢字", "word " * 200]


@pytest.mark.parametrize("name, parameters", [("sd1", 123_060_480), ("sd2", 340_387_840)])
def test_released_size(name, parameters):
    with meta_device():
        tower = TextEncoder(preset(name).text)
    assert sum(p.numel() for p in tower.parameters()) == parameters


@pytest.mark.parametrize("kind, padding", [("openclip", 0), ("clip", END)])
def test_tokens(kind, padding):
    empty, short, _, long = tokenize(PROMPTS, kind)
    assert empty.tolist() == [START, END] + [padding] * 75
    assert short.tolist() == [START, 320, 1125, END] + [padding] * 73  # "a", "photo"
    assert long[0] == START
    assert long[-1] == END  # truncated to 77 tokens, of which the last is the end token
    assert long[1:-1].unique().numel() == 1


def test_tokens_equal_those_of_open_clip():
    open_clip = pytest.importorskip("open_clip")  # sd loads its tokenizer module without the package
    assert torch.equal(tokenize(PROMPTS, "openclip"), open_clip.tokenize(PROMPTS))


@pytest.mark.peers
@pytest.mark.parametrize("kind", SMALL)
def test_equals_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="the extra `peers` is not installed")
    config = SMALL[kind]
    tower = seeded(TextEncoder, config)
    peer = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act="quick_gelu" if kind == "clip" else "gelu",
        )
    ).eval()
    state = layouts.openclip_text_to_hf(tower.state_dict())
    own = peer.state_dict()  # newer releases have no prefix
    if not any(name.startswith("text_model.") for name in own):
        state = layouts.with_prefix(state, "text_model.")
    peer.load_state_dict(state, strict=False)
    assert set(own) - set(state) <= {"text_model.embeddings.position_ids", "embeddings.position_ids"}
    tokens = tokenize(PROMPTS, kind)
    with torch.no_grad():
        assert relative_error(tower(tokens), peer(input_ids=tokens).last_hidden_state) < 1e-5


def test_equals_open_clip():
    """The installed open_clip_torch, through its constructor and call alone, with as many blocks as ours."""
    transformer = pytest.importorskip("open_clip.transformer")
    config = SMALL["openclip"]
    try:
        peer = transformer.TextTransformer(
            context_length=77,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=None,
            pool_type="none",
        ).eval()
    except TypeError as error:
        pytest.skip(f"this open_clip_torch cannot return all tokens: {error}")
    tower = seeded(TextEncoder, config)
    assert set(peer.state_dict()) == set(tower.state_dict())
    peer.load_state_dict(tower.state_dict())
    tokens = tokenize(PROMPTS, "openclip")
    with torch.no_grad():
        output = peer(tokens)
        assert relative_error(tower(tokens), output[0] if isinstance(output, tuple) else output) < 1e-5
