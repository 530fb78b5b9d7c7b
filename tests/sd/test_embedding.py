"""Textual-inversion embeddings: forms of the files, tokens of a prompt, vectors in the text encoder, refusals."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sd import Optimisations, StableDiffusion
from sd.checkpoint.embedding import read_embedding, require_new_token
from sd.checkpoint.file_formats import write_safetensors
from sd.errors import CheckpointError, ConfigError
from sd.models.tokenizer import END, tokenize
from sd.txt2img import main

WIDTH = 32  # of the embedded model's text encoder


def _vectors(n: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n))


def _a1111(vectors) -> dict:
    """The dict that AUTOMATIC1111 saves; the vectors are a parameter."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(vectors)},
        "name": "style",
        "step": 500,
        "sd_checkpoint": None,
    }


@pytest.mark.parametrize("n", [1, 3])
def test_forms_of_the_files(tmp_path, n):
    vectors = _vectors(n)
    files = {"<style>": {"<style>": vectors}, "a": _a1111(vectors), "b": {"emb_params": vectors}}
    for i, (token, state) in enumerate(files.items()):
        torch.save(state, tmp_path / f"{'cab'[i]}.pt")
        embedding = read_embedding(tmp_path / f"{'cab'[i]}.pt", WIDTH)
        assert embedding.token == token and torch.equal(embedding.vectors, vectors)
    for name, key, token in (("d", "emb_params", "d"), ("e", "<style>", "<style>")):
        write_safetensors(tmp_path / f"{name}.safetensors", {key: vectors.half()}, {})
        embedding = read_embedding(tmp_path / f"{name}.safetensors", WIDTH)
        assert embedding.token == token and torch.equal(embedding.vectors, vectors.half().float())
    torch.save({"<x>": vectors[0]}, tmp_path / "f.pt")  # diffusers saves a single vector without its axis
    assert read_embedding(tmp_path / "f.pt", WIDTH, "word").token == "word"
    assert torch.equal(read_embedding(tmp_path / "f.pt", WIDTH).vectors, vectors[:1])


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"<x>": torch.ones(2, 768)}, f"its vectors have width 768 of SD1, and the text encoder has {WIDTH};"),
        ({"<x>": torch.ones(1024)}, "width 1024 of SD2"),
        (_a1111(torch.ones(1, 768)), "width 768 of SD1"),
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "Stable Diffusion XL"),
        ({"<x>": torch.ones(WIDTH), "<y>": torch.ones(WIDTH)}, "has 2 tensors"),
        ({"<x>": torch.ones(1, 1, WIDTH)}, r"<x> is \(1, 1, 32\)"),
        ({"<x>": torch.ones(1, WIDTH, dtype=torch.int64)}, "floating-point"),
        ({"<x>": torch.ones(0, WIDTH)}, r"\(0, 32\)"),
        ({"<x>": torch.full((WIDTH,), float("nan"))}, "not finite"),
        ({"string_to_param": {}}, "is a textual inversion embedding in a form that cannot be read"),
        (
            {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(1, WIDTH))})},
            "is a textual inversion embedding in a form that cannot be read",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, state, reason):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{reason}"):
        read_embedding(tmp_path / "a.pt", WIDTH)


def test_an_empty_token_is_refused(tmp_path):
    torch.save({"<x>": torch.ones(1, WIDTH)}, tmp_path / "a.pt")
    assert read_embedding(tmp_path / "a.pt", WIDTH, "").token == ""
    with pytest.raises(ConfigError, match="must be a word"):
        require_new_token("", {})


@pytest.mark.parametrize("encoder", ["clip", "openclip"])
def test_tokens_of_a_prompt(encoder):
    added = {"<cat>": range(50000, 50003), "cat": range(50003, 50004), "Cat": range(50004, 50006)}

    def ids(prompt):
        return tokenize([prompt], encoder, added)[0].tolist()

    start, a, of, photo = 49406, 320, 539, 1125
    pad = END if encoder == "clip" else 0
    assert ids("a photo of <cat>") == [start, a, photo, of, 50000, 50001, 50002, END] + [pad] * 69
    assert ids("a<cat>cat, Cat")[:8] == [start, a, 50000, 50001, 50002, 50003, 267, 50004]
    for plain in ("catalogue", "a concatenation of cats", "CAT", ""):  # not inside words, not in another case
        assert ids(plain) == tokenize([plain], encoder)[0].tolist()
    long = ids("cat " * 100)
    assert len(long) == 77 and long[1:76] == [50003] * 75 and long[76] == END
    assert torch.equal(tokenize(["a cat", "a"], encoder, added)[1], tokenize(["a"], encoder)[0])


def test_vectors_replace_those_of_the_tokens(tmp_path):
    """An embedding equal to rows of the table gives the prompt with those words."""
    model = StableDiffusion.tiny()
    expected = model.encode_prompts(["a red star on a blue background", "a star"])
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    red, star, blue = tokenize(["red star blue"])[0, 1:4].tolist()
    table = model.text_encoder.token_embedding.weight
    torch.save({"<rs>": table[[red, star]].clone()}, tmp_path / "a.pt")
    torch.save({"<b>": table[blue].clone()}, tmp_path / "b.pt")
    assert model.load_embedding(tmp_path / "a.pt") == "<rs>"
    assert model.load_embedding(tmp_path / "b.pt", "azure") == "azure"
    assert torch.equal(model.encode_prompts(["a <rs> on a azure background", "a star"]), expected)
    own = model.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[name], weight) for name, weight in state.items())
    with pytest.raises(ConfigError, match="'azure': is loaded already"):
        model.load_embedding(tmp_path / "a.pt", "azure")
    for token in (" ", "a b "):
        with pytest.raises(ConfigError, match="without spaces around it"):
            model.load_embedding(tmp_path / "a.pt", token)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_other_precisions(tmp_path, precision):
    torch.save({"<x>": _vectors(2)}, tmp_path / "a.pt")
    model = StableDiffusion.tiny()
    model.load_embedding(tmp_path / "a.pt")
    expected = model.encode_prompts(["a <x> star"])
    model.optimise(Optimisations(precision=precision))
    before = StableDiffusion.tiny(optimisations=Optimisations(precision=precision))
    before.load_embedding(tmp_path / "a.pt")
    context = model.encode_prompts(["a <x> star"])
    assert torch.equal(context, before.encode_prompts(["a <x> star"]))
    assert (context - expected).norm() <= 0.03 * expected.norm()


def test_command_line(tmp_path, capsys, monkeypatch):
    torch.save({"<x>": _vectors(2)}, tmp_path / "a.pt")
    torch.save({"emb_params": _vectors(1, 768)}, tmp_path / "b.pt")
    monkeypatch.chdir(tmp_path)
    arguments = ["--steps", "2", "--seed", "1", "--device", "cpu", "--outdir", "out", "--prompt", "a red word"]
    assert main([*arguments, "--embedding", "a.pt:word"]) == 0
    assert "a.pt: write 'word' in the prompt" in capsys.readouterr().out
    with Image.open(next((tmp_path / "out" / "samples").iterdir())) as image:
        assert image.text["embeddings"] == "a.pt"
    assert main([*arguments, "--embedding", "b.pt"]) == 2
    assert "b.pt: its vectors have width 768 of SD1" in capsys.readouterr().err
    assert main([*arguments, "--embedding", "c.pt:word"]) == 2
    assert "--embedding c.pt: no such file" in capsys.readouterr().err
