"""From pytorch-grad-cam, torch-cam, captum, xaitk-saliency and Hugging Face: one import changes."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network
from gcfast.demo.species import SPECIES

model = load_network().eval()  # any nn.Module: images [B, 3, h, w] -> embeddings [B, D]
loader = []
for label in range(6):
    birds = [draw_bird(label, seed=0, index=i) for i in range(6)]
    loader.append((as_batch(birds), [SPECIES[label].name] * 6))
explainer = gcfast.Explainer(model)
database = explainer.build(loader)
database.save("birds.gcfast", overwrite=True)
layer = model.get_submodule(database.manifest["layer"])

picture = draw_bird(3, seed=1, index=0).image  # uint8 [H, W, 3]
images = as_batch([draw_bird(3, seed=1, index=0)])


def pytorch_grad_cam() -> None:
    """A classifier, as before; then embeddings."""
    from pytorch_grad_cam.utils.image import show_cam_on_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from gcfast.adapters.pytorch_grad_cam import EmbeddingGradCAM, GradCAM  # from pytorch_grad_cam

    classifier = nn.Sequential(model, nn.Linear(database.dim, 6)).eval()
    with GradCAM(model=classifier, target_layers=[layer]) as cam:
        maps = cam(input_tensor=images, targets=[ClassifierOutputTarget(3)])
    with EmbeddingGradCAM(model, [layer], database="birds.gcfast") as cam:
        maps = cam(input_tensor=images, targets=None)
    shown = show_cam_on_image(np.float32(picture) / 255, maps[0], use_rgb=True)
    Image.fromarray(shown).save("pytorch-grad-cam.png")


def torchcam() -> None:
    """The hooks stay on the model: run it, then ask."""
    from torchcam.utils import overlay_mask

    from gcfast.adapters.torchcam import EmbeddingGradCAM  # from torchcam.methods import GradCAM

    with torch.inference_mode(), EmbeddingGradCAM(model, layer, database="birds.gcfast") as cam:
        embeddings = model(images)
        (maps,) = cam(scores=embeddings)
    mask = Image.fromarray(maps[0].numpy())  # in [0, 1]: torch-cam squares it
    overlay_mask(Image.fromarray(picture), mask, alpha=0.5).save("torch-cam.png")


def captum() -> None:
    """The same call, without a target."""
    from captum.attr import LayerAttribution

    from gcfast.adapters.captum import EmbeddingLayerGradCam  # from captum.attr import LayerGradCam

    extractor = EmbeddingLayerGradCam(model, layer, database="birds.gcfast")
    attributions = extractor.attribute(images, relu_attributions=True)
    large = LayerAttribution.interpolate(attributions, images.shape[2:], "bilinear")
    why = extractor.explanation
    assert why is not None
    print("captum", tuple(large.shape), why.label_names)


def xaitk() -> None:
    """The black box is a network that shows a layer."""
    from gcfast.adapters.xaitk import GradCAMSimilarity, TorchDescriptor  # xaitk's SBSMStack

    other = draw_bird(3, seed=1, index=1).image
    maps = GradCAMSimilarity()(picture, [other], TorchDescriptor(model, layer))
    print("xaitk", maps.shape, float(maps.min()), float(maps.max()))


def hugging_face() -> None:
    """A pipeline that also says why."""
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor, pipeline

    from gcfast.adapters.hf import EmbeddingGradCAM

    network = ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1]))
    own = gcfast.Explainer(network, output_key="pooler_output")
    pipe = pipeline(
        "image-feature-extraction",
        model=network,
        image_processor=ViTImageProcessor(size={"height": 128, "width": 128}),
        pipeline_class=EmbeddingGradCAM,
        database=own.build(loader),
        output_key="pooler_output",
    )
    found: Any = pipe(Image.fromarray(picture))
    print("hugging face", tuple(found["map"].shape), found["label"], found["distance"])


for front_end in (pytorch_grad_cam, torchcam, captum, xaitk, hugging_face):
    front_end()
