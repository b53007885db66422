"""Published architectures to experiment with.

Each name is a factory that takes no arguments and returns an ``nn.Module`` in eval mode, with
``.example_inputs(batch=1)`` and, where there are real weights, ``.weights()``::

    from narrowboat.zoo import resnet101
    module = resnet101()
    output = module(*resnet101.example_inputs())

On the command line it is ``narrowboat.zoo:resnet101``. Importing this package imports no torch.
"""

from __future__ import annotations

from narrowboat.errors import UsageError
from narrowboat.zoo.model import ZooModel, images, on_call, token_ids

vgg19 = ZooModel(
    name="vgg19",
    description="VGG-19, image classification, 144 M parameters of which 103 M in one layer",
    build=on_call("narrowboat.zoo.vgg:VGG19"),
    inputs=images(3, 224, 224),
)
resnet50 = ZooModel(
    name="resnet50",
    description="ResNet-50, image classification, 26 M parameters",
    build=on_call("narrowboat.zoo.resnet:resnet50"),
    inputs=images(3, 224, 224),
)
resnet101 = ZooModel(
    name="resnet101",
    description="ResNet-101, image classification, 45 M parameters",
    build=on_call("narrowboat.zoo.resnet:resnet101"),
    inputs=images(3, 224, 224),
)
densenet121 = ZooModel(
    name="densenet121",
    description="DenseNet-121, image classification, 8 M parameters",
    build=on_call("narrowboat.zoo.densenet:DenseNet"),
    inputs=images(3, 224, 224),
)
mobilenet_v2 = ZooModel(
    name="mobilenet_v2",
    description="MobileNet-v2, image classification, 3.5 M parameters",
    build=on_call("narrowboat.zoo.mobilenet:MobileNetV2"),
    inputs=images(3, 224, 224),
)
yolov3 = ZooModel(
    name="yolov3",
    description="YOLOv3 on Darknet-53, object detection, 62 M parameters",
    build=on_call("narrowboat.zoo.yolo:YOLOv3"),
    inputs=images(3, 416, 416),
)
fcn = ZooModel(
    name="fcn",
    description="FCN on ResNet-101, semantic segmentation, 52 M parameters",
    build=on_call("narrowboat.zoo.segmentation:FCN"),
    inputs=images(3, 224, 224),
)
vit_large = ZooModel(
    name="vit_large",
    description="ViT-L/16, image classification, 304 M parameters",
    build=on_call("narrowboat.zoo.vit:VisionTransformer"),
    inputs=images(3, 224, 224),
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)
efficientnet_lite2 = ZooModel(
    name="efficientnet_lite2",
    description="EfficientNet-Lite2, image classification, 6 M parameters, real weights",
    build=on_call("narrowboat.zoo.efficientnet_lite:build"),
    inputs=images(3, 260, 260),
    extra="demo",
    find_weights=on_call("narrowboat.zoo.efficientnet_lite:weights"),
    # What the Lite variants were trained with, and not ImageNet's usual pair.
    image_mean=(127 / 255, 127 / 255, 127 / 255),
    image_std=(128 / 255, 128 / 255, 128 / 255),
)
llama_1b = ZooModel(
    name="llama_1b",
    description="Llama-shaped decoder (TinyLlama), text generation, 1.1 B parameters in bfloat16",
    build=on_call("narrowboat.zoo.llama:build"),
    inputs=token_ids(32_000, 128),
    extra="hf",
)
minilm = ZooModel(
    name="minilm",
    description="all-MiniLM-L6-v2, sentence embedding, 23 M parameters, real weights",
    build=on_call("narrowboat.zoo.bert:build"),
    inputs=token_ids(30_522, 32),
    extra="demo",
    find_weights=on_call("narrowboat.zoo.bert:weights"),
)
bert_small = ZooModel(
    name="bert_small",
    description="BERT-small with a two-class head, text classification, 29 M parameters",
    build=on_call("narrowboat.zoo.bert:small"),
    inputs=token_ids(30_522, 128),
    extra="hf",
)
gpt12 = ZooModel(
    name="gpt12",
    description="Decoder of 12 blocks as in GPT-2, 512 wide, next-token logits, 42 M parameters",
    build=on_call("narrowboat.zoo.gpt:gpt12"),
    inputs=token_ids(8192, 256),
)

MODELS: dict[str, ZooModel] = {
    model.name: model
    for model in (
        vgg19,
        resnet50,
        resnet101,
        densenet121,
        mobilenet_v2,
        yolov3,
        fcn,
        vit_large,
        efficientnet_lite2,
        llama_1b,
        minilm,
        bert_small,
        gpt12,
    )
}


def get(name: str) -> ZooModel:
    """The zoo model of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in MODELS:
        raise UsageError(f"there is no zoo model {name!r}: there are {', '.join(MODELS)}")
    return MODELS[name]


__all__ = [
    "MODELS",
    "ZooModel",
    "bert_small",
    "densenet121",
    "efficientnet_lite2",
    "fcn",
    "get",
    "gpt12",
    "llama_1b",
    "minilm",
    "mobilenet_v2",
    "resnet50",
    "resnet101",
    "vgg19",
    "vit_large",
    "yolov3",
]
