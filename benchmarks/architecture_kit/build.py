"""Find, for a model type, a class, a small configuration and inputs with which plain PyTorch runs it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from architecture_kit.inputs import candidates
from architecture_kit.overrides import OVERRIDES
from architecture_kit.shrink import PROFILES, Profile, shrink
from narrowboat.profile import no_storage

MOST_PARAMETERS = 40_000_000
_FAMILIES = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "CAUSAL_LM",
    "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM",
    "ZERO_SHOT_OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "MASKED_LM",
    "CTC",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "PRETRAINING",
    "",
    "BACKBONE",
)


class CouldNotBuildError(Exception):
    """No combination tried runs in plain PyTorch."""


@dataclass
class Built:
    """A small model that runs.

    Attributes:
        model_type, class_name: which.
        profile: how it was made small.
        config: its configuration.
        model: plain, with random weights, in evaluation mode.
        inputs: keyword arguments that run.
        candidate: number of the inputs among those tried.
    """

    model_type: str
    class_name: str
    profile: Profile
    config: Any
    model: nn.Module
    inputs: dict[str, Any]
    candidate: int

    def factory(self) -> nn.Module:
        """The model anew, as a user's factory would make it."""
        torch.manual_seed(3)
        return self._class()(copy.deepcopy(self.config)).eval()

    def _class(self) -> Any:
        import transformers

        return getattr(transformers, self.class_name)

    def recipe(self) -> dict[str, Any]:
        """What to pass to ``build`` to get it again at once."""
        return {
            "class_name": self.class_name,
            "profile": PROFILES.index(self.profile),
            "candidate": self.candidate,
        }


def model_types() -> list[str]:
    """Every model type of transformers that has a model class."""
    return [name for name in _config_mapping() if any(True for _ in class_names(name))]


def class_names(model_type: str) -> Iterator[str]:
    """Classes for a model type, those that generate first."""
    from transformers.models.auto import modeling_auto

    seen: set[str] = set()
    for family in _FAMILIES:
        table = getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING_NAMES" if family else "MODEL_MAPPING_NAMES", {})
        found = table.get(model_type, ())
        for name in (found,) if isinstance(found, str) else tuple(found):
            if name not in seen:
                seen.add(name)
                yield name


def build(model_type: str, recipe: dict[str, Any] | None = None) -> Built:
    """Search for a combination that runs; ``recipe`` says which one did before.

    Raises:
        CouldNotBuildError: none does; tells the first reason for each class.
    """
    reasons: dict[str, str] = {}
    classes = [recipe["class_name"]] if recipe else list(class_names(model_type))[:4]
    for class_name in classes:
        profiles = (PROFILES[recipe["profile"]],) if recipe else PROFILES
        for profile in profiles:
            try:
                return _attempt(model_type, class_name, profile, recipe)
            except (TimeoutError, KeyboardInterrupt):
                raise
            except _TooLargeError as error:
                reasons.setdefault(class_name, str(error))
            except Exception as error:
                reasons.setdefault(class_name, f"{type(error).__name__}: {str(error).strip()[:200]}")
    raise CouldNotBuildError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no class")


class _TooLargeError(Exception):
    pass


def _attempt(model_type: str, class_name: str, profile: Profile, recipe: dict[str, Any] | None) -> Built:
    import transformers

    model_class = getattr(transformers, class_name)
    config_class = getattr(model_class, "config_class", None) or _config_mapping()[model_type]
    wanted = _config_mapping()[model_type]
    if not issubclass(wanted, config_class):
        config_class = wanted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = shrink(OVERRIDES.get(model_type, wanted)(), profile)
        if not recipe:
            _refuse_giants(model_class, config)
        torch.manual_seed(3)
        model = model_class(copy.deepcopy(config)).eval()
        _shake(model)
        last: Exception | None = None
        for number, inputs in enumerate(candidates(model, model.config)):
            if recipe and number != recipe["candidate"]:
                continue
            try:
                with torch.inference_mode():
                    out = model(**copy.deepcopy(inputs))
            except (TimeoutError, KeyboardInterrupt):
                raise
            except Exception as error:
                last = last or error
                continue
            del out
            return Built(model_type, class_name, profile, config, model, inputs, number)
    raise last if last is not None else CouldNotBuildError("no inputs to try")


def _refuse_giants(model_class: Any, config: Any) -> None:
    with no_storage():
        sketch = model_class(copy.deepcopy(config))
    count = sum(p.numel() for p in sketch.parameters())
    if count > MOST_PARAMETERS:
        raise _TooLargeError(f"{count / 1e6:.0f} million parameters")


def _shake(model: nn.Module) -> None:
    """Make every weight matter: zeros of gates and heads would hide a wrong weight behind them."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e4:
                    parameter.zero_()
                parameter.add_(torch.randn(parameter.shape, generator=random).to(parameter.dtype) * 0.02)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=random) * 0.1)


def _config_mapping() -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING
