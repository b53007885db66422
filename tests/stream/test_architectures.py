"""Twenty of transformers' architectures, of different kinds; all of them are in ``benchmarks/architectures.py``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from architecture_kit import check
from architecture_kit.build import build
from narrowboat.arena.device.access import AccessWatch
from narrowboat.arena.device.emulated import EmulatedDevice

# model type -> class, profile and inputs that are known to build, so that nothing has to be searched for
KINDS = {
    "albert": ("AlbertForMaskedLM", 0, 0),  # one layer's weights used by all
    "bart": ("BartForConditionalGeneration", 0, 0),  # one embedding under five names
    "bert": ("BertLMHeadModel", 0, 0),
    "clip": ("CLIPModel", 0, 0),
    "codegen": ("CodeGenForCausalLM", 0, 0),
    "convnext": ("ConvNextForImageClassification", 0, 0),
    "dac": ("DacModel", 0, 4),  # a codec with weight norm and codebooks read as data
    "deberta-v2": ("DebertaV2ForMaskedLM", 0, 0),
    "decision_transformer": ("DecisionTransformerModel", 0, 2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", 0, 0),  # latent attention, routed and shared experts
    "deformable_detr": ("DeformableDetrForObjectDetection", 1, 0),
    "flaubert": ("FlaubertWithLMHeadModel", 0, 0),  # an activation that is one object in all models
    "llama": ("LlamaForCausalLM", 0, 0),
    "llava": ("LlavaForConditionalGeneration", 0, 9),  # counts image tokens: cannot be traced without running
    "mamba": ("MambaForCausalLM", 0, 0),  # reads its convolution's weight as data
    "mixtral": ("MixtralForCausalLM", 0, 0),
    "t5": ("T5ForConditionalGeneration", 0, 0),
    "vit": ("ViTForImageClassification", 0, 0),
    "wav2vec2": ("Wav2Vec2ForCTC", 0, 3),  # weight norm in its convolutional places
    "whisper": ("WhisperForConditionalGeneration", 0, 0),
}


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("model_type", KINDS)
def test_forward_and_generate_have_plain_pytorchs_bits(
    model_type: str, device: str, tmp_path: Path, tiny_blocks: None
) -> None:
    class_name, profile, candidate = KINDS[model_type]
    built = build(model_type, {"class_name": class_name, "profile": profile, "candidate": candidate})
    reference = check.Reference.of(built.factory, built.model.state_dict(), built.inputs)
    assert any(
        torch.isfinite(t).any() for _, t in reference.first if isinstance(t, torch.Tensor) and t.is_floating_point()
    )
    if getattr(built.model, "can_generate", lambda: False)():
        reference.generated = check.run_generate(built.model, built.inputs)
    files = check.write_files(built.model, built.factory, built.inputs, tmp_path)
    variants = ("packed+example", "unpacked")
    place = EmulatedDevice(256 << 20, granularity=4096, jitter=1) if device == "emulated" else device
    watch = AccessWatch(place) if isinstance(place, EmulatedDevice) else nullcontext()
    with watch:
        outcomes = {v: check.check_variant(v, built.factory, files, built.inputs, reference, place) for v in variants}
    assert {v: o.detail or o.verdict for v, o in outcomes.items()} == dict.fromkeys(variants, "exact")
