"""Small models of transformers with random weights, saved as checkpoints."""

import torch

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def saved(model, folder):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder)
    return model


def clip(transformers, **settings):
    vision = transformers.CLIPVisionConfig(**SMALL, projection_dim=16)
    text = dict(SMALL, vocab_size=99)
    del text["image_size"], text["patch_size"]
    return transformers.CLIPConfig(
        vision_config=vision.to_dict(), text_config=text, projection_dim=16, **settings
    )
