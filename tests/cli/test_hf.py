"""Checkpoints of transformers, saved and loaded by the library itself, with random weights."""

import json

import pytest
import torch
from hf_case import SMALL, clip, saved
from libraries import library
from safetensors.torch import save_file

from gcfast.cli.hf import preprocessing_of
from gcfast.cli.models import ModelLoadError, load_model
from gcfast.images.preprocessing import Preprocessing

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transformers():
    found = library("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def embedding(loaded):
    with torch.no_grad():
        out = loaded.module(IMAGES)
    return out if loaded.output_key is None else out[loaded.output_key]


def test_a_pooler_that_was_saved_is_used(transformers, tmp_path):
    model = saved(transformers.ViTModel(transformers.ViTConfig(**SMALL)), tmp_path)
    torch.testing.assert_close(embedding(load_model(f"hf/{tmp_path}")), model(IMAGES).pooler_output)


def test_a_pooler_that_was_not_saved_is_never_random(transformers, tmp_path):
    config = transformers.ViTConfig(**SMALL)
    model = saved(transformers.ViTModel(config, add_pooling_layer=False), tmp_path)
    with pytest.raises(ModelLoadError, match=r"without a pooler, .*--pool class takes the class"):
        load_model(f"hf/{tmp_path}")
    tokens = model(IMAGES).last_hidden_state
    for pool, want in (("class", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        loaded = load_model(f"hf/{tmp_path}", pool=pool)
        torch.testing.assert_close(embedding(loaded), want)
        assert not any("pooler" in name for name, _ in loaded.module.named_parameters())
    file = tmp_path / "model.safetensors"
    with pytest.raises(ModelLoadError, match="without a pooler"):
        load_model(f"hf/{tmp_path}", file)
    loaded = load_model(f"hf/{tmp_path}", file, pool="class")
    torch.testing.assert_close(embedding(loaded), tokens[:, 0])


def test_other_parameters_that_are_missing(transformers, tmp_path):
    model = saved(transformers.ViTModel(transformers.ViTConfig(**SMALL)), tmp_path)
    held = {k: v for k, v in model.state_dict().items() if not k.startswith("layernorm.")}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"of ViTModel, .*layernorm.bias, layernorm.w"):
        load_model(f"hf/{tmp_path}")


@pytest.mark.parametrize("kind", ["ViT", "Swin", "Beit", "Dinov2", "ResNet"])
def test_a_classifier_gives_what_its_last_layer_sees(transformers, tmp_path, kind):
    small = {
        "Swin": {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1],
                 "num_heads": [1, 2], "window_size": 4},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    }.get(kind, SMALL)  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**small, num_labels=5)
    model = saved(getattr(transformers, f"{kind}ForImageClassification")(config), tmp_path)
    seen = []
    last = [m for m in model.classifier.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        model(IMAGES)
    torch.testing.assert_close(embedding(load_model(f"hf/{tmp_path}")), seen[0])
    file = tmp_path / "model.safetensors"
    torch.testing.assert_close(embedding(load_model(f"hf/{tmp_path}", file)), seen[0])


def test_the_backbone_of_another_task(transformers, tmp_path):
    config = transformers.ViTConfig(**SMALL, encoder_stride=8)
    model = saved(transformers.ViTForMaskedImageModeling(config), tmp_path)
    with pytest.raises(ModelLoadError, match="without a pooler"):
        load_model(f"hf/{tmp_path}")
    want = model.vit(IMAGES).last_hidden_state[:, 0]
    torch.testing.assert_close(embedding(load_model(f"hf/{tmp_path}", pool="class")), want)
    file = tmp_path / "model.safetensors"
    loaded = load_model(f"hf/{tmp_path}", file, pool="class")
    torch.testing.assert_close(embedding(loaded), want)


def test_clip_gives_the_projected_embedding(transformers, tmp_path):
    model = saved(transformers.CLIPModel(clip(transformers)), tmp_path)
    want = model.get_image_features(pixel_values=IMAGES)
    want = getattr(want, "pooler_output", want)
    loaded = load_model(f"hf/{tmp_path}")
    assert embedding(loaded).shape == (2, 16)
    torch.testing.assert_close(embedding(loaded), want)
    assert not any("text" in name for name, _ in loaded.module.named_parameters())
    file = tmp_path / "model.safetensors"
    torch.testing.assert_close(embedding(load_model(f"hf/{tmp_path}", file)), want)


def test_the_vision_half_of_clip_gives_the_projected_embedding(transformers, tmp_path):
    config = clip(transformers).vision_config
    model = saved(transformers.CLIPVisionModelWithProjection(config), tmp_path)
    torch.testing.assert_close(embedding(load_model(f"hf/{tmp_path}")), model(IMAGES).image_embeds)


def test_siglip_gives_its_image_embedding(transformers, tmp_path):
    config = transformers.SiglipConfig(
        vision_config=SMALL, text_config=dict(SMALL, vocab_size=99, projection_size=32)
    )
    model = saved(transformers.SiglipModel(config), tmp_path)
    want = model.get_image_features(pixel_values=IMAGES)
    torch.testing.assert_close(
        embedding(load_model(f"hf/{tmp_path}")), getattr(want, "pooler_output", want)
    )


def test_pool_is_for_transformers_alone():
    with pytest.raises(ValueError, match="`pool` must be left out with a model that is not hf/"):
        load_model("timm/resnet18", pool="mean")


# Image processors

CLIP = {
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 3,
    "size": {"shortest_edge": 224}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1],
}  # fmt: skip
HALF = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        (CLIP, Preprocessing(224, "crop", (0.4, 0.5, 0.6), (0.3, 0.2, 0.1), "bicubic", 1.0)),
        (
            CLIP | {"size": 256, "crop_size": 224},
            Preprocessing(224, "crop", (0.4, 0.5, 0.6), (0.3, 0.2, 0.1), "bicubic", 0.875),
        ),
        (
            HALF | {"size": {"height": 224, "width": 192}, "resample": 2},
            Preprocessing((224, 192), "stretch", (0.5,) * 3, (0.25,) * 3),
        ),
        (HALF | {"size": 224}, Preprocessing(224, "stretch", (0.5,) * 3, (0.25,) * 3)),
        (
            HALF | {"image_processor_type": "DeiTImageProcessor", "do_center_crop": True,
                    "size": 256, "crop_size": 224},
            Preprocessing(224, "stretch", (0.5,) * 3, (0.25,) * 3, crop_pct=0.875),
        ),
        (
            HALF | {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875,
                    "size": {"shortest_edge": 224}, "resample": 3},
            Preprocessing(224, "crop", (0.5,) * 3, (0.25,) * 3, "bicubic", 0.875),
        ),
        (
            HALF | {"image_processor_type": "ConvNextImageProcessor",
                    "size": {"shortest_edge": 384}},
            Preprocessing(384, "stretch", (0.5,) * 3, (0.25,) * 3),
        ),
        (
            {"do_normalize": False, "size": 8},
            Preprocessing(8, "stretch", (0,) * 3, (1,) * 3),
        ),
        (
            HALF | {"size": 8, "rescale_factor": 2 / 255, "rescale_offset": True},
            Preprocessing(8, "stretch", (0.75,) * 3, (0.125,) * 3),
        ),
        (HALF | {"size": {"shortest_edge": 224}}, None),  # pictures of many shapes
        (HALF | {"size": 224, "do_resize": False}, None),
        ({"size": 224}, None),
    ],
)  # fmt: skip
def test_image_processors(settings, want):
    assert preprocessing_of(settings) == want


@pytest.mark.parametrize("kind", ["CLIP", "ViT", "ConvNext", "Siglip", "Bit", "DeiT"])
def test_views_are_those_of_the_image_processor(transformers, tmp_path, kind):
    import numpy as np
    from PIL import Image

    processor = getattr(transformers, f"{kind}ImageProcessor")()
    noise = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.png")
    want = processor(picture, return_tensors="pt")["pixel_values"]
    ours = preprocessing_of(json.loads(processor.to_json_string()))
    got = ours.normalize(torch.from_numpy(ours.view(tmp_path / "a.png").copy())[None])
    assert got.shape == want.shape
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
    assert cosine > 0.999


def test_a_file_beside_the_checkpoint_comes_first(transformers, tmp_path):
    saved(transformers.ViTModel(transformers.ViTConfig(**SMALL)), tmp_path)
    assert load_model(f"hf/{tmp_path}").preprocessing is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    assert load_model(f"hf/{tmp_path}").preprocessing == preprocessing_of(CLIP)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tmp_path / "model.safetensors").rename(tuned / "w.safetensors")
    (tuned / "preprocessor_config.json").write_text(json.dumps(HALF | {"size": 32}))
    loaded = load_model(f"hf/{tmp_path}", tuned / "w.safetensors")
    assert loaded.preprocessing == preprocessing_of(HALF | {"size": 32})
