"""`gcfast explain --text` with small models of images and texts, and a tokenizer made here."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_case import fails, run
from hf_case import SMALL, clip, saved
from libraries import library

import gcfast
from gcfast.cli.models import load_model
from gcfast.images.folder import ImageLoader
from gcfast.images.preprocessing import Preprocessing

WORDS = ("[PAD]", "[UNK]", "a", "photo", "of", "red", "green", "disc", "square", "[EOS]")
VIEW = ("--size", "32", "--workers", "0")
PICTURES = [f"pictures/red/{i}.{'jpg' if i == 5 else 'png'}" for i in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a CLIP and a SigLIP with random weights, by name."""
    transformers, tokenizers = library("transformers"), pytest.importorskip("tokenizers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        "$A [EOS]", special_tokens=[("[EOS]", 9)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    siglip = transformers.SiglipConfig(
        vision_config=SMALL, text_config=dict(SMALL, vocab_size=99, projection_size=32)
    )
    made = {
        "clip": lambda: transformers.CLIPModel(clip(transformers)),
        "siglip": lambda: transformers.SiglipModel(siglip),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)),
    }
    found = {}
    for name, make in made.items():
        folder = tmp_path_factory.mktemp(name)
        model = saved(make(), folder)
        tokenizer.save_pretrained(folder)
        found[name] = (folder, model, tokenizer)
    return found


def embedded(model, tokenizer, texts, length):
    """Text embeddings by the library, each text by itself."""
    found = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", **length)
        with torch.no_grad():
            got = model.get_text_features(**tokens)
        found.append(getattr(got, "pooler_output", got))
    return F.normalize(torch.cat(found), dim=1)


LENGTHS = {"clip": {}, "siglip": {"padding": "max_length", "max_length": 64}}


@pytest.mark.parametrize("name", LENGTHS)
def test_texts_are_embedded_beside_images(models, name):
    folder, model, tokenizer = models[name]
    texts = ["a red disc", "a photo of a green square"]
    loaded = load_model(f"hf/{folder}", texts=True)
    wanted = embedded(model, tokenizer, texts, LENGTHS[name])
    torch.testing.assert_close(F.normalize(loaded.texts(texts), dim=1), wanted)
    assert load_model(f"hf/{folder}").texts is None
    # One that is too long is cut off.
    assert loaded.texts([" ".join(["red"] * 200)]).isfinite().all()
    assert load_model(f"hf/{models['vit'][0]}", texts=True).texts is None


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.usefixtures("here")
def test_explain_towards_a_text(models, name, capsys, tmp_path):
    folder, model, tokenizer = models[name]
    status, told, err = run(
        capsys, "explain", "--text", "a red disc", "--neutral", "a photo", "of a", "--model",
        f"hf/{folder}", *VIEW, "--out", tmp_path, "pictures/red", "--batch-size", "4",
    )  # fmt: skip
    assert status == 0, err
    assert told == f"{tmp_path / 'index.html'}: 6 pictures\n"
    assert "unreadable pictures, skipped: 1" in err
    vectors = embedded(model, tokenizer, ["a red disc", "a photo", "of a"], LENGTHS[name])
    loader = ImageLoader(PICTURES, PICTURES, preprocessing=Preprocessing(32))
    images = torch.cat([batch for batch, _, _ in loader])
    loaded = load_model(f"hf/{folder}")
    one = gcfast.Explainer(
        loaded.module, output_key=loaded.output_key, refine="auto", method="elementwise"
    )
    wanted = one.explain_toward(images, vectors[0] - vectors[1:].mean(0))
    np.testing.assert_allclose(np.load(tmp_path / "maps.npy"), wanted, atol=1e-4)
    assert wanted.amax() > 0.5
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [*PICTURES, "pictures/red/broken.png"]
    with torch.no_grad():
        output = model.get_image_features(pixel_values=images)
    output = F.normalize(getattr(output, "pooler_output", output), dim=1)
    cosines = [float(row["cosine"]) for row in rows[:-1]]
    np.testing.assert_allclose(cosines, output @ vectors[0], atol=1e-4)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img ") == 2 * 6
    assert "<h1>a red disc</h1>" in page
    best = PICTURES[int(np.argmax(cosines))]
    assert page.index(f"{best}</h2>") == min(page.index(f"{p}</h2>") for p in PICTURES)


@pytest.mark.usefixtures("here")
def test_texts_are_refused_in_words(models, capsys, tmp_path):
    def refused(model, *more, text="a red disc"):
        return fails(
            capsys, "explain", "--text", text, "--model", model, "--out", tmp_path / "out",
            *VIEW, "pictures/red", *more,
        )  # fmt: skip

    clip_model = f"hf/{models['clip'][0]}"
    for other in ("cli_net:build", f"hf/{models['vit'][0]}"):
        assert f"`--model` must have a text tower with --text, such as hf/openai/clip-vit-base-patch32, got {other}" in refused(other)  # fmt: skip  # noqa: E501
    assert "`--k` must be left out with --text" in refused(clip_model, "--k", "3")
    assert "`--images` must be left out with --text" in refused(clip_model, "--images", "pictures")
    assert "`--text` must say something" in refused(clip_model, text=" ")
    assert "`--center` must be 0 without --database" in refused(clip_model, "--center", "1")
