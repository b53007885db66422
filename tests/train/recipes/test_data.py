"""Images, digits and text as samples."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import ModelError, UsageError
from narrowboat.train.recipes.digits import Digits
from narrowboat.train.recipes.images import ImageFolder
from narrowboat.train.recipes.text import Blocks, LabelledTexts, encoder, find_tokenizer, read_tokens

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def _image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _image(tmp_path / "sky" / "a.png", (0, 0, 255))
    _image(tmp_path / "fire" / "deep" / "b.PNG", (255, 0, 0), (7, 31))
    _image(tmp_path / "fire" / "c.jpg", (255, 0, 0))
    (tmp_path / "fire" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_classes_are_subfolders_and_images_take_the_shape_that_is_wanted(folder: Path) -> None:
    data = ImageFolder(folder, (3, 6, 8), ZERO, ONE)
    assert data.classes == ("fire", "sky")
    samples = [data[i] for i in range(len(data))]
    assert sorted(label for _, label in samples) == [0, 0, 1]
    for image, label in samples:
        assert image.shape == (3, 6, 8)
        assert image.is_contiguous()
        wanted = torch.tensor([1.0, 0.0, 0.0] if label == 0 else [0.0, 0.0, 1.0])
        assert torch.allclose(image.mean((1, 2)), wanted, atol=0.02)  # JPEG


def test_pixels_are_normalised_by_channel_and_grey_by_the_average(folder: Path) -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)
    blue = ImageFolder(folder, (3, 2, 2), mean, std)[2][0]
    assert torch.allclose(blue[:, 0, 0], torch.tensor([-1.0, -0.25, 0.5]))
    grey = ImageFolder(folder, (1, 2, 2), mean, std)[2][0]
    assert grey.shape == (1, 2, 2)
    assert grey[0, 0, 0].item() == pytest.approx((29 / 255 - 0.25) / (3.5 / 3), abs=0.01)  # ITU-R 601: 0.114 of blue


def test_a_folder_that_is_no_data_set_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, match: str, channels: int = 3) -> None:
        with pytest.raises(UsageError, match=match):
            ImageFolder(path, (channels, 4, 4), ZERO, ONE)

    refused(tmp_path / "nowhere", "is no folder")
    refused(folder / "sky", "has 0 subfolders")
    refused(folder, "5 channels", channels=5)
    (folder / "empty").mkdir()
    refused(folder, "empty holds no images")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_file_that_is_no_image_is_named_at_once(folder: Path, content: bytes) -> None:
    (folder / "sky" / "broken.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"broken\.png is no image that can be read"):
        ImageFolder(folder, (3, 4, 4), ZERO, ONE)


def test_a_torn_image_is_named(folder: Path) -> None:
    path = folder / "sky" / "a.png"
    _image(path, (1, 2, 3), (200, 200))
    path.write_bytes(path.read_bytes()[:-60])
    data = ImageFolder(folder, (3, 4, 4), ZERO, ONE)
    with pytest.raises(UsageError, match=r"a\.png is no image that can be read"):
        data[2]


def test_digits_are_as_the_package_has_them_or_larger() -> None:
    from sklearn.datasets import load_digits

    told = load_digits()
    small, large = Digits((1, 8, 8), ZERO, ONE), Digits((3, 20, 16), ZERO, ONE)
    assert len(small) == len(large) == len(told.target)
    image, label = small[5]
    assert label == told.target[5]
    assert torch.equal(image[0], torch.tensor(told.images[5], dtype=torch.float32) / 16)
    bigger, _ = large[5]
    assert bigger.shape == (3, 20, 16)
    assert torch.equal(bigger[0], bigger[2])
    assert bigger[0].mean().item() == pytest.approx(image.mean().item(), abs=0.1)


@given(st.lists(st.integers(0, 255), min_size=2, max_size=200), st.integers(1, 20))
def test_blocks_hold_every_token_in_order_each_with_the_next_one(numbers: list[int], length: int) -> None:
    tokens = numpy.array(numbers, dtype=numpy.uint8)
    if len(tokens) <= length:
        with pytest.raises(UsageError, match="fewer than one block"):
            Blocks(tokens, length)
        return
    blocks = Blocks(tokens, length)
    rows = [blocks[i] for i in range(len(blocks))]
    assert all(row.dtype == torch.int64 and len(row) == length + 1 for row in rows)
    assert torch.cat([row[:-1] for row in rows]).tolist() == numbers[: len(rows) * length]
    assert torch.cat([row[1:] for row in rows]).tolist() == numbers[1 : len(rows) * length + 1]
    assert len(tokens) - 1 - len(rows) * length < length
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_without_a_tokenizer_tokens_are_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("ä\xff".encode() + b"\xff")
    assert read_tokens(path, None).tolist() == list(path.read_bytes())
    assert encoder(None)("ä") == [0xC3, 0xA4]


def test_a_tokenizer_gives_the_tokens_of_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from narrowboat.train.recipes import text
    from pretrained_kit import tokenizer

    made = tokenizer(tmp_path)
    found = find_tokenizer(tmp_path)
    path = tmp_path / "text"
    path.write_text("the quick brown fox\njumps over\n\nthe lazy dog\n" * 3)
    assert read_tokens(path, found).tolist() == made(path.read_text(), add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(text, "_PIECE", 30)  # characters at once
    assert made.decode(read_tokens(path, found)).split() == path.read_text().split()


def test_a_folder_without_or_with_a_broken_tokenizer(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer that cannot be used"):
        find_tokenizer(tmp_path)


def test_labelled_lines_are_cut_and_filled_to_one_length(tmp_path: Path) -> None:
    path = tmp_path / "lines.tsv"
    path.write_text("good\tabcdef\nbad\tab\n\ngood\t\n")
    data = LabelledTexts(path, encoder(None), 4, filler=7)
    assert data.classes == ("bad", "good")
    told = [(tokens.tolist(), mask.tolist(), label) for tokens, mask, label in (data[i] for i in range(3))]
    assert told == [
        ([97, 98, 99, 100], [1, 1, 1, 1], 1),
        ([97, 98, 7, 7], [1, 1, 0, 0], 0),
        ([7, 7, 7, 7], [1, 0, 0, 0], 1),
    ]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"a\tx\nb y\n", "line 2: write label"),
        (b"\tx\n", "line 1"),
        (b"a\tx\na\ty\n", "1 labels"),
        (b"a\t\xff\n", "not UTF-8"),
    ],
)
def test_a_file_without_labels_is_refused_with_the_place(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "lines.tsv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=match):
        LabelledTexts(path, encoder(None), 4)


def test_no_such_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no text file"):
        read_tokens(tmp_path / "none", None)
