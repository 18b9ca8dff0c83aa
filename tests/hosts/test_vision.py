"""Vision-language models on rows with images: the head is fused, and the loss is the model's own."""

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from axolotl_cvloss import Objective, install

IMAGE, TOKENS = 90, 4  # the token that an image takes the place of, and how many of it
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def qwen2_vl():
    """Positions in three planes; the patches of all images stand behind each other."""
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=91)
    images = {"pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return Qwen2VLForConditionalGeneration(config), images


def gemma3():
    """Leaves out of its loss what the mask leaves out, and does not do what its text config says of a cap."""
    text = {**TEXT, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # made as zeros
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def made(make):
    """A model and a padded batch of two rows, with an image in the prompt of each."""
    torch.manual_seed(0)
    model, images = make()
    ids = torch.randint(3, 80, (2, 16), generator=torch.Generator().manual_seed(1))
    ids[:, 1], ids[:, 2 : 2 + TOKENS] = 91, IMAGE
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : 4 + TOKENS] = -100
    kinds = {"token_type_ids" if make is gemma3 else "mm_token_type_ids": (ids == IMAGE).long()}
    return model.train(), {"input_ids": ids, "attention_mask": mask, "labels": labels, **kinds, **images}


def step(make, config=None, head="fused"):
    model, batch = made(make)
    if config is not None:
        terms = [{"loss": loss, "weight": weight} for loss, weight in config.items()]
        install(model, Objective.from_config({"terms": terms, "head": head}))
    outputs = model(**batch)
    outputs.loss.backward()
    assert (outputs.logits is None) == (config is not None and head == "fused")
    return outputs.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    torch.testing.assert_close(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert any("vis" in name and grad.any() for name, grad in one[1].items())
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [qwen2_vl, gemma3])
def test_images(make):
    same(step(make, {"cross_entropy": 1.0}), step(make))
    mix = {"cross_entropy": 0.6, "lovasz": 0.4}
    same(step(make, mix), step(make, mix, "logits"))


@pytest.mark.parametrize("head", ["auto", "logits"])
def test_images_that_have_no_place_among_the_labels_are_an_error_that_says_so(head):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {name: size for name, size in TEXT.items() if name not in ("num_key_value_heads", "head_dim")}
    model = GitForCausalLM(GitConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, **text)).train()
    install(model, Objective.from_config({"terms": [{"loss": "lovasz"}], "head": head}))
    ids = torch.randint(3, 80, (2, 12))
    match = r"GitForCausalLM returns logits of the shape \(2, 17, 97\) for labels of \(2, 12\).*images that the model"
    with pytest.raises(ValueError, match=match):
        model(input_ids=ids, labels=ids, pixel_values=torch.randn(2, 3, 16, 16))
