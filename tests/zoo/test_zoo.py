"""Each architecture has the shape that was published."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from narrowboat import zoo
from narrowboat.errors import ModelError, UsageError, WeightsNotFoundError
from narrowboat.zoo.gpt import GPT
from narrowboat.zoo.model import ZooModel, images, on_call


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NARROWBOAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.get(name)()


# torchvision states VGG-19, the ResNets, DenseNet-121, MobileNet-v2, ViT-L/16 and FCN (54,314,346 with the auxiliary
# head of 2,365,205 that is left out here); YOLOv3's is Darknet's file less the running statistics; TinyLlama's is its
# paper's 1.1 B; BERT-small's is the published encoder and a two-class head. The decoder of 12 blocks is nobody's but
# ours: tokens, places, then 12 n^2 + 13 n in each block and a last norm.
PUBLISHED_PARAMETERS = {
    "vgg19": 143_667_240,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "densenet121": 7_978_856,
    "mobilenet_v2": 3_504_872,
    "yolov3": 61_949_149,
    "fcn": 54_314_346 - 2_365_205,
    "vit_large": 304_326_632,
    "llama_1b": 1_100_048_384,
    "minilm": 22_713_216,
    "bert_small": 28_763_648 + 2 * 512 + 2,
    "gpt12": (8192 + 512) * 512 + 12 * (12 * 512**2 + 13 * 512) + 2 * 512,
    "efficientnet_lite2": 6_092_072,
}


def test_every_zoo_model_has_a_published_count_to_compare_with() -> None:
    assert set(PUBLISHED_PARAMETERS) == set(zoo.MODELS)


@pytest.mark.parametrize(("name", "count"), PUBLISHED_PARAMETERS.items())
def test_parameter_count_is_the_published_one(name: str, count: int) -> None:
    module = _on_meta(name)
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    assert not module.training


def test_the_decoder_is_gpt_2_small_unless_told_otherwise() -> None:
    with torch.device("meta"):
        module = GPT()
    assert sum(parameter.numel() for parameter in module.parameters()) == 124_439_808


def test_the_decoder_sees_no_later_token_and_drops_only_in_training() -> None:
    torch.manual_seed(0)
    module = GPT(vocabulary=32, context=8, width=16, layers=2, heads=2, dropout=0.5).eval()
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 5] = 31
    with torch.no_grad():
        logits, others = module(ids), module(changed)
        assert torch.equal(logits[:, :5], others[:, :5])
        assert not torch.equal(logits[:, 5:], others[:, 5:])
        assert torch.equal(module(ids), logits)
        assert not torch.equal(module.train()(ids), logits)


def test_yolov3_holds_as_many_numbers_as_darknets_weights_file() -> None:
    state = _on_meta("yolov3").state_dict()
    assert sum(value.numel() for name, value in state.items() if "num_batches_tracked" not in name) == 62_001_757


def test_vit_large_and_llama_have_the_published_bytes() -> None:
    vit, llama = _on_meta("vit_large"), _on_meta("llama_1b")
    assert sum(value.nbytes for value in vit.state_dict().values()) == 1_217_306_528
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("vgg19", [(2, 1000)]),
        ("resnet50", [(2, 1000)]),
        ("resnet101", [(2, 1000)]),
        ("densenet121", [(2, 1000)]),
        ("mobilenet_v2", [(2, 1000)]),
        ("gpt12", [(2, 256, 8192)]),
        ("yolov3", [(2, 255, 13, 13), (2, 255, 26, 26), (2, 255, 52, 52)]),
        ("fcn", [(2, 21, 224, 224)]),
        ("vit_large", [(2, 1000)]),
        ("efficientnet_lite2", [(2, 1000)]),
    ],
)
def test_a_pass_over_a_batch_gives_the_published_output_shapes(name: str, shapes: list[tuple[int, ...]]) -> None:
    module = _on_meta(name)
    inputs = tuple(tensor.to("meta") for tensor in zoo.get(name).example_inputs(batch=2))
    with torch.no_grad():
        outputs = module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(output.shape) for output in outputs] == shapes


def test_example_inputs_are_the_same_every_time() -> None:
    for model in zoo.MODELS.values():
        for first, second in zip(model.example_inputs(), model.example_inputs(), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["efficientnet_lite2", "minilm"])
def test_real_weights_fit_their_architecture(name: str) -> None:
    from narrowboat.checkpoint import open_index

    index = open_index(zoo.get(name).weights())
    for key, value in _on_meta(name).state_dict().items():
        entry = index.resolve(key)
        assert entry is not None, key
        assert entry.shape == tuple(value.shape), key


def test_real_weights_in_an_old_format_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWBOAT_CACHE", str(tmp_path / "cache"))
    first = zoo.efficientnet_lite2.weights()
    assert first.is_relative_to(tmp_path)
    written = first.stat().st_mtime_ns
    assert zoo.efficientnet_lite2.weights() == first
    assert first.stat().st_mtime_ns == written


def test_efficientnet_knows_a_cup_of_coffee_and_a_cat() -> None:
    import skimage
    from safetensors.torch import load_file

    from narrowboat.zoo.imagenet import class_names
    from narrowboat.zoo.resolve import resolve_model

    module = zoo.efficientnet_lite2()
    module.load_state_dict(load_file(zoo.efficientnet_lite2.weights()))
    names = class_names()
    assert len(names) == 1000
    for photograph, expected in {"coffee": "espresso", "chelsea": "Egyptian cat"}.items():
        path = Path(skimage.__file__).parent / "data" / f"{photograph}.png"
        inputs = resolve_model("narrowboat.zoo:efficientnet_lite2").inputs(path)
        assert inputs is not None
        with torch.inference_mode():
            assert names[int(module(*inputs).argmax())] == expected


def test_an_unknown_name_is_a_usage_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="resnet101"):
        zoo.get("resnet102")


def test_weights_of_a_model_without_real_ones_say_how_to_make_random_ones() -> None:
    with pytest.raises(WeightsNotFoundError, match="zoo save vgg19"):
        zoo.vgg19.weights()


def test_a_missing_package_is_an_error_that_says_what_to_install() -> None:
    model = ZooModel(
        name="x",
        description="",
        build=on_call("narrowboat_no_such_package.model:build"),
        inputs=images(3, 8, 8),
        extra="demo",
        find_weights=on_call("narrowboat_no_such_package.model:weights"),
    )
    with pytest.raises(ModelError, match=r"narrowboat\[demo\]"):
        model()
    with pytest.raises(WeightsNotFoundError, match=r"narrowboat\[demo\]"):
        model.weights()


def test_importing_the_zoo_imports_no_torch() -> None:
    code = "import sys, narrowboat.zoo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
