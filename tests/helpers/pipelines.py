"""Diffusion pipelines small enough for tests: built from configs, with random weights."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def make_tokenizer():
    """Every letter is a token."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *SPECIAL]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def make_text_encoder(tokenizer):
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def make_unet(in_channels):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def make_autoencoder():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def save_pipelines(folder):
    """Save ``{folder}/stable_diffusion`` and ``{folder}/instruct_pix2pix``."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    parts = {
        "vae": make_autoencoder(),
        "text_encoder": make_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    StableDiffusionPipeline(unet=make_unet(4), **parts).save_pretrained(folder / "stable_diffusion")
    StableDiffusionInstructPix2PixPipeline(unet=make_unet(8), **parts).save_pretrained(
        folder / "instruct_pix2pix"
    )
    return folder
