"""Dummy inputs for a model nobody knows: guesses by the names of ``forward``'s arguments, the richest first."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

LENGTH = 12  # tokens of a prompt


def candidates(model: Any, config: Any) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try with ``model(**kwargs)``; the first that runs is the one to use."""
    guess = _Guess(model, config)
    names = guess.names
    seen: set[str] = set()
    for built in guess.all():
        if any(name not in names for name in built) and not guess.open:
            built = {k: v for k, v in built.items() if k in names}
        key = repr(sorted((k, tuple(v.shape) if isinstance(v, torch.Tensor) else str(v)) for k, v in built.items()))
        if built and key not in seen:
            seen.add(key)
            yield built


class _Guess:
    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config
        parameters = inspect.signature(model.forward).parameters
        self.open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.required = [n for n in self.names if parameters[n].default is inspect.Parameter.empty]
        self.main = getattr(model, "main_input_name", "input_ids")
        if isinstance(self.main, (list, tuple)):
            self.main = self.main[0]
        self.random = torch.Generator().manual_seed(7)

    # -- pieces ------------------------------------------------------------------------------------

    def find(self, *keys: str, default: Any = None) -> Any:
        """The first of ``keys`` that the configuration or a nested one has."""
        for key in keys:
            for config in _nested(self.config):
                value = config.__dict__.get(key)
                if value is None and key in (getattr(config, "attribute_map", None) or {}):
                    value = getattr(config, key, None)
                if value is not None:
                    return value
        return default

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random) * 0.5

    def whole(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.random)

    def side(self) -> int:
        value = self.find("image_size", default=64)
        value = value[0] if isinstance(value, (list, tuple)) else value
        if isinstance(value, dict):
            value = value.get("height", 64)
        return int(value) if isinstance(value, int) else 64

    def text(self, length: int = LENGTH) -> torch.Tensor:
        vocab = self.find("vocab_size", default=100)
        vocab = vocab if isinstance(vocab, int) else 100
        return self.whole(min(5, vocab - 1), max(min(90, vocab), 2), 1, length)

    def value(self, name: str) -> Any:
        """A guess for one argument."""
        channels = self.find("num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        side = self.side()
        size = (side, side)
        if name in ("pixel_values", "pixel_values_images", "image", "images", "pixel_values_1", "flattened_patches"):
            if name == "flattened_patches":
                width = self.find("patch_embed_hidden_size", default=768)
                rows = torch.tensor([[i // 4 + 1, i % 4 + 1] for i in range(16)], dtype=torch.float32)[None]
                return torch.cat([rows, self.normal(1, 16, width)], dim=-1)
            return self.normal(1, channels, *size)
        if name == "pixel_values_videos" or (name == "pixel_values" and self.find("num_frames")):
            return self.normal(1, self.find("num_frames", default=2), channels, *size)
        if name in ("input_features", "audio_features", "input_audio"):
            return self.features()[0]
        if name in ("input_values", "audio_values", "waveform", "speech_values"):
            return self.normal(1, 4000)
        if name in ("labels", "decoder_input_ids"):
            return self.text(5)
        if name in ("bbox",):
            boxes = self.whole(0, 50, 1, LENGTH, 4)
            boxes[..., 2:] += boxes[..., :2]
            return boxes
        if name == "image_sizes":
            return torch.tensor([list(size)])
        if name in ("image_grid_thw", "video_grid_thw", "grid_thw"):
            return torch.tensor([[1, 4, 4]])
        if name in ("spatial_shapes", "image_spatial_shapes"):
            return torch.tensor([[4, 4]])
        if name in ("pixel_attention_mask", "pixel_mask"):
            return torch.ones(1, *size, dtype=torch.long)
        if name in (
            "past_values",
            "past_observed_mask",
            "past_time_features",
            "future_values",
            "future_time_features",
        ):
            return self.series(name)
        if name in ("input_points",):
            return self.normal(1, 1, 2, 2).abs() * 10
        if name in ("attention_mask", "decoder_attention_mask"):
            return torch.ones(1, LENGTH, dtype=torch.long)
        if name in ("token_type_ids",):
            return torch.zeros(1, LENGTH, dtype=torch.long)
        if name in ("position_ids",):
            return torch.arange(LENGTH)[None]
        if name in ("hidden_states", "inputs_embeds", "encoder_hidden_states", "noisy_inputs", "latents"):
            return self.normal(1, LENGTH, self.find("hidden_size", "d_model", default=64))
        if name in ("audio_codes", "codes"):
            return self.whole(0, 20, 1, self.find("num_codebooks", "num_quantizers", "n_codebooks", default=4), 8)
        if name in ("task_inputs",):
            return self.whole(1, 90, 1, 8)
        if name in ("states", "actions", "rewards", "returns_to_go", "timesteps"):
            widths = {"states": self.find("state_dim", default=4), "actions": self.find("act_dim", default=2)}
            if name == "timesteps":
                return torch.arange(5)[None]
            return self.normal(1, 5, widths.get(name, 1))
        if name.endswith(("ids", "tokens")):
            return self.text()
        return self.normal(1, LENGTH, self.find("hidden_size", "d_model", default=64))

    def series(self, name: str) -> torch.Tensor:
        context = self.find("context_length", default=24) or 24
        lags = self.find("lags_sequence", default=[0]) or [0]
        past = context + (max(lags) if self.find("lags_sequence") else 0)
        ahead = self.find("prediction_length", default=8) or 8
        width = self.find("num_input_channels", default=None)
        length = past if name.startswith("past") else ahead
        if name.endswith("time_features"):
            return self.normal(1, length, max(self.find("num_time_features", default=1), 1))
        size = (1, length) if width is None else (1, length, width)
        return torch.ones(size) if name.endswith("mask") else self.normal(*size)

    def features(self) -> list[torch.Tensor]:
        """Spectrograms, both ways round."""
        bins = self.find("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", "num_mels", default=80)
        bins = bins if isinstance(bins, int) else 80
        frames = self.find("max_source_positions", default=None)
        length = 2 * frames if isinstance(frames, int) and frames < 4000 else 64
        long = self.find("max_length", default=None)
        shapes = [(1, bins, length), (1, 64, bins), (1, length, bins), (1, bins, 64), (1, bins, 3000)]
        if isinstance(long, int):
            shapes.insert(0, (1, long, bins))
        wide = self.find("input_channels", "feature_projection_input_dim", default=None)
        if isinstance(wide, int):
            shapes.append((1, 64, wide))
        return [self.normal(*shape) for shape in shapes]

    # -- whole calls -------------------------------------------------------------------------------

    def all(self) -> Iterator[dict[str, Any]]:
        decoder = {}
        if "decoder_input_ids" in self.names:
            decoder = {"decoder_input_ids": self.text(5)}
        yield from self.images_and_text(decoder)
        yield from self.sound_and_text(decoder)
        if self.main in ("input_features", "input_values", "audio_values", "waveform"):
            for features in [
                *self.features(),
                self.normal(1, 4000),
                self.normal(1, 1, 4000),
                self.normal(1, 1, 16000),
            ]:
                base = self.with_required({self.main: features})
                yield {**base, **decoder}
                yield base
        if self.main == "pixel_values" or "pixel_values" in self.required or "grid_thw" in self.required:
            for pixels in self.pictures():
                base = self.with_required(pixels)
                yield {**base, **decoder}
                yield base
        base = self.with_required({self.main: self.value(self.main)} if self.main in self.names else {})
        for extra in ("bbox", "pixel_values", "token_type_ids"):
            if extra in self.names and extra not in base:
                yield {**base, **decoder, extra: self.value(extra)}
        if "bbox" in self.names and "pixel_values" in self.names:
            yield {**base, "bbox": self.value("bbox"), "pixel_values": self.value("pixel_values")}
        yield {**base, **decoder}
        yield base
        everything = {
            n: self.value(n)
            for n in self.names
            if n in ("input_ids", "pixel_values", "input_features", "input_values", "states", "actions", "rewards")
            or n in ("returns_to_go", "timesteps", "past_values", "past_time_features", "past_observed_mask")
            or n in ("future_values", "future_time_features", "attention_mask", "decoder_input_ids", "audio_codes")
        }
        yield everything
        everything.pop("attention_mask", None)
        yield everything
        yield {k: v for k, v in everything.items() if k != "decoder_input_ids"}
        if self.required:
            yield self.with_required({})
        for length in (16, 32, 64, 128, 1024, 4096):
            yield {**self.with_required({"input_ids": self.text(length)}), **decoder}
        yield {"input_ids": self.whole(1, 20, 1, LENGTH, self.find("num_codebooks", "num_quantizers", default=4))}
        yield {"input_ids": self.whole(1, 20, 1, self.find("num_codebooks", "num_quantizers", default=4), LENGTH)}

    def with_required(self, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, **{n: self.value(n) for n in self.required if n not in given and n not in ("args", "kwargs")}}

    def pictures(self) -> Iterator[dict[str, Any]]:
        """Ways to hand over one picture."""
        channels = self.find("num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        side = self.side()
        patch = self.find("patch_size", default=16)
        patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
        patch = patch if isinstance(patch, int) else 16
        frames = self.find("num_frames", default=None)
        if isinstance(frames, int) and frames <= 32:
            yield {"pixel_values": self.normal(1, frames, channels, side, side)}
            yield {"pixel_values_videos": self.normal(1, frames, channels, side, side)}
        if "image_grid_thw" in self.names or "grid_thw" in self.names:
            name = "image_grid_thw" if "image_grid_thw" in self.names else "grid_thw"
            temporal = self.find("temporal_patch_size", default=1)
            grid = {name: torch.tensor([[1, 4, 4]])}
            for depth in dict.fromkeys((_int(temporal), 1)):
                yield {"pixel_values": self.normal(16, channels * depth * patch * patch), **grid}
                yield {"pixel_values": self.normal(16, channels, patch, patch), **grid}
            if "hidden_states" in self.required:  # a vision tower on its own
                yield {"hidden_states": self.normal(16, channels * patch * patch * _int(temporal)), **grid}
        if "target_sizes" in self.names:
            for shape in ((1, channels, patch, 16 * patch), (16, channels * patch * patch)):
                yield {"pixel_values": self.normal(*shape), "target_sizes": torch.tensor([[4, 4]])}
        if "spatial_shapes" in self.names:
            yield {
                "pixel_values": self.normal(1, 16, channels * patch * patch),
                "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
                "spatial_shapes": torch.tensor([[4, 4]]),
            }
        if "image_sizes" in self.names:
            for tiles in (None, 1, 2, 3, 5):
                shape = (1, channels, side, side) if tiles is None else (1, tiles, channels, side, side)
                yield {"pixel_values": self.normal(*shape), "image_sizes": torch.tensor([[side, side]])}
        if "aspect_ratio_ids" in self.names:
            yield {
                "pixel_values": self.normal(1, 1, 4, channels, side, side),
                "aspect_ratio_ids": torch.tensor([[1]]),
                "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
            }
        if "pixel_position_ids" in self.names or "image_position_ids" in self.names:
            name = "pixel_position_ids" if "pixel_position_ids" in self.names else "image_position_ids"
            grid = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).reshape(1, 36, 2)
            yield {"pixel_values": self.normal(1, 36, channels * patch * patch), name: grid}
        yield {"pixel_values": self.normal(1, channels, side, side)}
        yield {"pixel_values": self.normal(1, 1, channels, side, side)}
        yield {"pixel_values": self.normal(1, channels, 64, 64)}
        yield {"pixel_values": self.normal(1, channels, 224, 224)}
        yield {"pixel_values": self.normal(1, 2, channels, side, side)}
        yield {"pixel_values": self.normal(1, 16, channels * patch * patch)}

    def images_and_text(self, decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "pixel_values" not in self.names or "input_ids" not in self.names:
            return
        token = self.find("image_token_id", "image_token_index", "media_placeholder_token_id", default=None)
        base = self.with_required({"input_ids": self.text()})
        base.pop("pixel_values", None)
        for pixels in self.pictures():
            if not isinstance(token, int):
                yield {**base, **pixels, **decoder}
                yield {**base, **pixels}
                continue
            for count in self.image_tokens(pixels):
                ids = torch.cat([self.text(4), torch.full((1, count), token), self.text(4)], dim=1)
                built = {**base, **pixels, "input_ids": ids}
                for kind in ("mm_token_type_ids", "token_type_ids"):
                    if kind in self.names:
                        yield {**built, kind: (ids == token).long(), **decoder}
                yield {**built, **decoder}

    def image_tokens(self, pixels: dict[str, Any]) -> list[int]:
        """How many image tokens the picture stands for, asked of the model."""
        found = _feature_rows(self.model, ("get_image_features", "get_image_embeddings"), pixels)
        return [found] if found else [16, 4]

    def sound_and_text(self, decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name = next((n for n in ("input_features", "input_values") if n in self.names), None)
        token = self.find("audio_token_id", "audio_token_index", default=None)
        if name is None or "input_ids" not in self.names or not isinstance(token, int):
            return
        for features in [*self.features(), self.normal(1, 4000), self.normal(1, 1, 16000)]:
            sound: dict[str, Any] = {name: features}
            long = features.shape[-1]
            masks = [{}, {"input_features_mask": torch.ones(1, long, dtype=torch.long)}]
            masks.append({"input_features_mask": torch.ones(1, features.shape[1], dtype=torch.bool)})
            masks.append({"feature_attention_mask": torch.ones(1, long, dtype=torch.long)})
            for mask in masks:
                if any(key not in self.names for key in mask):
                    continue
                count = _feature_rows(self.model, ("get_audio_features",), {**sound, **mask})
                if count and count < 2000:
                    ids = torch.cat([self.text(4), torch.full((1, count), token), self.text(4)], dim=1)
                    yield {**sound, **mask, "input_ids": ids, **decoder}


def _feature_rows(model: Any, methods: tuple[str, ...], kwargs: dict[str, Any]) -> int | None:
    for method in methods:
        call = getattr(model, method, None) or getattr(getattr(model, "model", None), method, None)
        if call is None:
            continue
        accepted = inspect.signature(call).parameters
        given = {k: v for k, v in kwargs.items() if k in accepted}
        try:
            with torch.inference_mode():
                found = call(**given)
        except Exception:
            continue
        found = getattr(found, "pooler_output", found)
        if isinstance(found, torch.Tensor):
            found = [found]
        if isinstance(found, (list, tuple)) and found and all(isinstance(t, torch.Tensor) for t in found):
            return sum(t.numel() // t.shape[-1] for t in found)
    return None


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 1


def _nested(config: Any) -> list[Any]:
    found = [config]
    for value in list(config.__dict__.values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            found.extend(_nested(value))
    return found
