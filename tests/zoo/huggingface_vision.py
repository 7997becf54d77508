"""Image models from Hugging Face: transformers, convolutional nets, detectors, text and image."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, dim, sequence, zoo
from tests.zoo.huggingface import ids, model_of, padding_mask

_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def images(model: Any, size: int = 32, **extra: Any) -> Built:
    """`pixel_values` of a fixed size, batch dynamic; `extra` are constant keyword arguments."""
    import torch

    return Built.of(
        model,
        lambda rows: {"pixel_values": torch.randn(rows, 3, size, size)} | extra,
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"pixel_values": {0: batch()}} | dict.fromkeys(extra),
    )


@zoo("patches by a strided convolution, a class token expanded over the batch")
def vit() -> Built:
    return images(model_of("ViTForImageClassification", "ViTConfig", num_labels=5, **_VIT))


@zoo("positions resized bicubically to another image size")
def vit_interpolated() -> Built:
    return images(model_of("ViTModel", "ViTConfig", **_VIT), 48, interpolate_pos_encoding=True)


@zoo("image height and width dynamic, positions resized to them")
def vit_dynamic_image() -> Built:
    import torch

    def make(rows: int, height: int, width: int) -> dict[str, Any]:
        pixels = torch.randn(rows, 3, 8 * height, 8 * width)
        return {"pixel_values": pixels, "interpolate_pos_encoding": True}

    return Built.of(
        model_of("ViTModel", "ViTConfig", **_VIT),
        make,
        (2, 5, 6),
        (1, 4, 4),
        (3, 6, 3),
        dynamic_shapes={
            "pixel_values": {
                0: batch(),
                2: 8 * dim("rows", 16, min=2),
                3: 8 * dim("columns", 16, min=2),
            },
            "interpolate_pos_encoding": None,
        },
    )


@zoo("two heads whose logits are averaged")
def deit() -> Built:
    return images(
        model_of("DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=5, **_VIT)
    )


@zoo("relative position bias by an index table, layer scale, no class token in the pooling")
def beit() -> Built:
    return images(model_of("BeitModel", "BeitConfig", use_relative_position_bias=True, **_VIT))


_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


@zoo("windows cut by views, shifted by roll, masks built in Python")
def swin() -> Built:
    return images(model_of("SwinForImageClassification", "SwinConfig", num_labels=5, **_SWIN))


@zoo("cosine attention with a clamped learned scale, positions from an MLP")
def swinv2() -> Built:
    return images(model_of("Swinv2Model", "Swinv2Config", **_SWIN))


_CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5}


@zoo("depthwise 7x7, layer norm over channels last, layer scale")
def convnext() -> Built:
    return images(model_of("ConvNextForImageClassification", "ConvNextConfig", **_CONVNEXT))


@zoo("global response norm: a norm over height and width inside the block")
def convnextv2() -> Built:
    return images(model_of("ConvNextV2ForImageClassification", "ConvNextV2Config", **_CONVNEXT))


_RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "bottleneck",
}


@zoo("bottleneck blocks with batch norm, an output per stage")
def resnet() -> Built:
    options = {"output_hidden_states": True, "num_labels": 5}
    return images(model_of("ResNetForImageClassification", "ResNetConfig", **_RESNET | options))


@zoo("grouped convolutions with squeeze and excitation")
def regnet() -> Built:
    config = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
    return images(
        model_of("RegNetForImageClassification", "RegNetConfig", groups_width=8, **config)
    )


@zoo("inverted residuals with TensorFlow's asymmetric padding")
def mobilenet_v2_hf() -> Built:
    config = {"depth_multiplier": 0.25, "image_size": 32, "num_labels": 5}
    return images(model_of("MobileNetV2ForImageClassification", "MobileNetV2Config", **config))


@zoo("unfold into patches, attention across them, fold back; convolutions around")
def mobilevit() -> Built:
    config = {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 12, 16, 32]}
    config |= {"num_attention_heads": 2, "image_size": 64, "num_labels": 5}
    return images(model_of("MobileViTForImageClassification", "MobileViTConfig", **config), 64)


@zoo("squeeze and excitation with SiLU, odd paddings per stage")
def efficientnet_hf() -> Built:
    config = {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
        "image_size": 32,
        "num_labels": 5,
    }
    return images(model_of("EfficientNetForImageClassification", "EfficientNetConfig", **config))


@zoo("average pooling minus the input in place of attention")
def poolformer() -> Built:
    config = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_labels": 5}
    return images(model_of("PoolFormerForImageClassification", "PoolFormerConfig", **config))


@zoo("attention with biases gathered by offset, hard-swish, batch norm after linear layers")
def levit() -> Built:
    config = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4]}
    config |= {"depths": [1, 1, 1], "key_dim": [4, 4, 4], "num_labels": 5}
    return images(model_of("LevitForImageClassification", "LevitConfig", **config), 64)


@zoo("masks units of the image by rearranging tokens, pools queries")
def hiera() -> Built:
    config = {
        "embed_dim": 8,
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "patch_stride": [4, 4],
        "patch_padding": [3, 3],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "query_stride": [2, 2],
        "masked_unit_size": [4, 4],
        "num_query_pool": 1,
    }
    return images(model_of("HieraModel", "HieraConfig", **config))


@zoo("all-MLP decoder that resizes four stages and concatenates them")
def segformer() -> Built:
    config = {
        "num_encoder_blocks": 4,
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
        "num_labels": 5,
    }
    model = model_of("SegformerForSemanticSegmentation", "SegformerConfig", **config)
    return images(model, 64)


@zoo("register tokens, layer scale, SwiGLU in a vision transformer")
def dinov2() -> Built:
    config = _VIT | {"use_swiglu_ffn": True, "num_register_tokens": 2}
    return images(model_of("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **config))


@zoo("positions resized even at the training size")
def dinov2_plain() -> Built:
    return images(model_of("Dinov2Model", "Dinov2Config", **_VIT), 48)


@zoo("reassembles transformer tokens into maps, transposed convolutions, resizing with corners")
def dpt() -> Built:
    config = _VIT | {
        "backbone_out_indices": [0, 1, 2, 3],
        "num_hidden_layers": 4,
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 8,
        "reassemble_factors": [4, 2, 1, 0.5],
        "readout_type": "project",
        "is_hybrid": False,
    }
    return images(model_of("DPTForDepthEstimation", "DPTConfig", **config))


def _resnet_backbone(*stages: str) -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(out_features=list(stages), **_RESNET)


@zoo("a detector: frozen batch norm, a mask resized to the features, sine positions, queries")
def detr() -> Built:
    config = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": _resnet_backbone("stage4"),
        "num_queries": 5,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_labels": 5,
    }
    return images(model_of("DetrForObjectDetection", "DetrConfig", **config), 64)


@zoo("multi-scale deformable attention by grid_sample, reference points refined by layer")
def deformable_detr() -> Built:
    config = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": _resnet_backbone("stage3", "stage4"),
        "num_queries": 5,
        "num_feature_levels": 2,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_labels": 5,
        "with_box_refine": True,
    }
    return images(
        model_of("DeformableDetrForObjectDetection", "DeformableDetrConfig", **config), 64
    )


@zoo("detection tokens appended to the patches, positions resized in the middle layers")
def yolos() -> Built:
    config = _VIT | {"image_size": [32, 32], "num_detection_tokens": 4, "num_labels": 5}
    return images(model_of("YolosForObjectDetection", "YolosConfig", **config))


def _clip(name: str) -> Any:
    text = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "eos_token_id": 98,
        "projection_dim": 16,
    }
    vision = _VIT | {"projection_dim": 16}
    return model_of(
        f"{name}Model",
        f"{name}Config",
        text_config=text,
        vision_config=vision,
        **({"projection_dim": 16} if name == "CLIP" else {}),
    )


def _pairs(model: Any) -> Built:
    import torch

    def make(texts: int, tokens: int, pictures: int) -> dict[str, Any]:
        return {
            "input_ids": ids(texts, tokens, vocab=98),
            "attention_mask": padding_mask(texts, tokens),
            "pixel_values": torch.randn(pictures, 3, 32, 32),
        }

    text = {0: dim("texts"), 1: sequence(32)}
    return Built.of(
        model,
        make,
        (2, 8, 3),
        (1, 12, 1),
        (3, 5, 2),
        dynamic_shapes={
            "input_ids": text,
            "attention_mask": text,
            "pixel_values": {0: dim("pictures")},
        },
    )


@zoo("two towers, normalised, a matrix of similarities; argmax finds the end token")
def clip() -> Built:
    return _pairs(_clip("CLIP"))


@zoo("attention pooling with a learned probe, last token of the text")
def siglip() -> Built:
    return _pairs(_clip("Siglip"))


@zoo("image features written over placeholder tokens by masked_scatter")
def llava() -> Built:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    text = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = model_of(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        text_config=text,
        vision_config=CLIPVisionConfig(**_VIT),
        image_token_index=98,
        vision_feature_layer=-1,
    )

    def make(rows: int, tokens: int) -> dict[str, Any]:
        prompt = ids(rows, tokens, vocab=98)
        prompt[:, 2:18] = 98
        return {
            "input_ids": prompt,
            "pixel_values": torch.randn(rows, 3, 32, 32),
            "use_cache": False,
        }

    return Built.of(
        model,
        make,
        (2, 24),
        (1, 20),
        (3, 32),
        dynamic_shapes={
            "input_ids": {0: batch(), 1: sequence(48)},
            "pixel_values": {0: batch()},
            "kwargs": {"use_cache": None},
        },
    )


@zoo("masked autoencoder: argsort of noise decides which patches are dropped and restored")
def vit_mae() -> Built:
    import torch

    config = _VIT | {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    return Built.of(
        model_of("ViTMAEForPreTraining", "ViTMAEConfig", **config),
        lambda rows: {
            "pixel_values": torch.randn(rows, 3, 32, 32),
            "noise": torch.rand(rows, 16),
        },
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"pixel_values": {0: batch()}, "noise": {0: batch()}},
    )


@zoo("windowed attention with decomposed relative positions, neck, two-way mask decoder")
def sam() -> Built:
    import torch

    vision = _VIT | {
        "image_size": 64,
        "mlp_dim": 64,
        "output_channels": 16,
        "window_size": 4,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
    }
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    mask = {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
        "attention_downsample_rate": 2,
    }
    model = model_of(
        "SamModel",
        "SamConfig",
        vision_config=vision,
        prompt_encoder_config=prompt,
        mask_decoder_config=mask,
    )
    return Built.of(
        model,
        lambda rows: {
            "pixel_values": torch.randn(rows, 3, 64, 64),
            "input_points": torch.rand(rows, 1, 2, 2) * 64,
        },
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"pixel_values": {0: batch()}, "input_points": {0: batch()}},
    )
