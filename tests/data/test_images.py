import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import assert_refused, noise
from PIL import Image

from lightning_prompts.data.images import content_key, load_image, to_tensor

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(width=16, height=8):
    """Return an image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def png_header(path, width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


def is_close(pixel, expected, tolerance=3):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


# Reading one image


def test_image_of_matching_size_is_not_resampled(tmp_path):
    noise(32, 32).save(tmp_path / "a.png")
    for fit in ("crop", "pad"):
        image = load_image(tmp_path / "a.png", 32, fit)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert image.tobytes() == noise(32, 32).tobytes()


def test_odd_crop_of_matching_size_is_not_resampled(tmp_path):
    noise(11, 8).save(tmp_path / "a.png")
    assert load_image(str(tmp_path / "a.png"), 8).tobytes() == noise(11, 8).crop((1, 0, 9, 8)).tobytes()


@pytest.mark.parametrize("size", [10, 64])
def test_image_is_resized_with_lanczos(tmp_path, size):
    noise(32, 32).save(tmp_path / "a.png")
    expected = noise(32, 32).resize((size, size), Image.Resampling.LANCZOS)
    assert load_image(tmp_path / "a.png", size).tobytes() == expected.tobytes()


def test_fine_stripes_become_gray(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    middle = np.array(load_image(tmp_path / "a.png", 16))[4:12, 4:12]
    assert (abs(middle.astype(int) - 128) < 8).all()


@pytest.mark.parametrize("rotate", [False, True])
def test_crop_is_centered(tmp_path, rotate):
    image = Image.new("RGB", (32, 8), RED)
    image.paste(BLUE, (12, 0, 20, 8))
    (image.transpose(Image.Transpose.ROTATE_90) if rotate else image).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8).getcolors() == [(64, BLUE)]


@pytest.mark.parametrize("rotate", [False, True])
def test_pad_keeps_the_image_and_fills_with_background(tmp_path, rotate):
    image = halves(16, 8)
    (image.transpose(Image.Transpose.TRANSPOSE) if rotate else image).save(tmp_path / "a.png")
    padded = load_image(tmp_path / "a.png", 16, "pad", background=(1, 2, 3))
    expected = Image.new("RGB", (16, 16), (1, 2, 3))
    expected.paste(image, (0, 4))
    expected = expected.transpose(Image.Transpose.TRANSPOSE) if rotate else expected
    assert padded.tobytes() == expected.tobytes()


def test_long_strip_is_padded_after_resizing(tmp_path):
    Image.new("RGB", (8, 50_000), RED).save(tmp_path / "a.png")
    padded = load_image(tmp_path / "a.png", 9, "pad")  # as a square before resizing: 2.5 billion pixels
    assert {color: count for count, color in padded.getcolors()} == {RED: 9, WHITE: 72}


def test_unknown_fit_is_refused(tmp_path):
    noise().save(tmp_path / "a.png")
    assert_refused("fit must be 'crop' or 'pad', got 'stretch'", load_image, tmp_path / "a.png", 8, "stretch")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed after a quarter rotate clockwise
    path = tmp_path / f"a.{suffix}"
    halves(32, 16).save(path, exif=exif)
    image = load_image(path, 32, "pad")  # red above blue, white at both sides
    assert is_close(image.getpixel((16, 4)), RED)
    assert is_close(image.getpixel((16, 28)), BLUE)
    assert is_close(image.getpixel((2, 16)), WHITE)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage!!", b"Exif\x00\x00MM\x00*"])
def test_broken_exif_is_ignored(tmp_path, exif):
    noise().save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png", 16).tobytes() == noise().tobytes()


def icc_profile(primaries, gamma=2.19921875):
    """Return the ICC profile of a display from the XYZ of its primaries under D50 and its gamma."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79 + 8)
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249)), b"cprt": b"text\0\0\0\0none\0\0\0\0", b"desc": text}
    tags |= {f"{name}XYZ".encode(): xyz(values) for name, values in zip("rgb", primaries, strict=True)}
    tags |= {f"{name}TRC".encode(): curve for name in "rgb"}
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    illuminant = struct.pack(">3i", 63190, 65536, 54061)
    head = struct.pack(">I4sI4s4s4s12s4s28s12s48s", start + len(data), b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ",
                       bytes(12), b"acsp", bytes(28), illuminant, bytes(48))  # fmt: skip
    return head + table + data


ADOBE_RGB = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGB"), ("jpg", "RGB"), ("webp", "RGB"), ("tiff", "RGB"), ("png", "P"), ("tiff", "P")]
)
def test_colors_are_converted_to_srgb_by_the_profile(tmp_path, suffix, mode):
    image = Image.new("RGB", (16, 16), (60, 200, 90))
    image = image.quantize(2) if mode == "P" else image
    exact = {"quality": 100} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"a.{suffix}", icc_profile=icc_profile(ADOBE_RGB), **exact)
    result = load_image(tmp_path / f"a.{suffix}", 8).getpixel((4, 4))
    assert result == pytest.approx((0, 201, 80), abs=2)


def test_alpha_stays_where_a_profile_converts(tmp_path):
    image = Image.new("RGBA", (16, 16), (60, 200, 90, 255))
    image.paste((60, 200, 90, 0), (0, 0, 8, 16))
    image.save(tmp_path / "a.png", icc_profile=icc_profile(ADOBE_RGB))
    result = load_image(tmp_path / "a.png", 16, background=(9, 9, 9))
    assert result.getpixel((2, 2)) == (9, 9, 9)
    assert result.getpixel((12, 2)) == pytest.approx((0, 201, 80), abs=2)
    solid = Image.new("RGB", (16, 16), (60, 200, 90))
    solid.paste((1, 2, 3), (0, 0, 8, 16))
    solid.save(tmp_path / "b.png", icc_profile=icc_profile(ADOBE_RGB), transparency=(1, 2, 3))
    assert load_image(tmp_path / "b.png", 16, background=(9, 9, 9)).tobytes() == result.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "I;16", "CMYK", "1"])
@pytest.mark.parametrize("profile", [b"x" * 200, b"\0", icc_profile(ADOBE_RGB)[:200]])
def test_damaged_profile_is_ignored(tmp_path, mode, profile):
    image = Image.new(mode, (16, 16), 1 if mode == "1" else None)
    image.save(tmp_path / "a.tiff")
    image.save(tmp_path / "b.tiff", icc_profile=profile)
    assert load_image(tmp_path / "a.tiff", 16).tobytes() == load_image(tmp_path / "b.tiff", 16).tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "CMYK", "1"])
def test_profile_of_another_color_space_is_ignored(tmp_path, mode):
    image = Image.new(mode, (16, 16), 1 if mode == "1" else None)
    image.save(tmp_path / "a.tiff")
    image.save(tmp_path / "b.tiff", icc_profile=icc_profile(ADOBE_RGB))
    assert load_image(tmp_path / "a.tiff", 16).tobytes() == load_image(tmp_path / "b.tiff", 16).tobytes()


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), "png", (0, 0, 200)),
        ("RGBA", (255, 0, 0, 128), "png", (128, 0, 100)),
        ("RGBA", (255, 0, 0, 128), "webp", (128, 0, 100)),
        ("LA", (100, 0), "png", (0, 0, 200)),
        ("LA", (100, 128), "png", (50, 50, 150)),
        ("PA", (0, 0), "tiff", (0, 0, 200)),
    ],
)
def test_alpha_is_composited_over_background(tmp_path, mode, color, suffix, expected):
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (8, 8), color).save(path, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        assert image.mode == mode
    image = load_image(path, 8, background=(0, 0, 200))
    assert is_close(image.getpixel((4, 4)), expected, 1)


def test_background_is_white_unless_stated(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8).getcolors() == [(64, WHITE)]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_color_shows_the_background(tmp_path, suffix):
    image = Image.new("P", (16, 8), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (8, 0, 16, 8))
    image.save(tmp_path / f"a.{suffix}", transparency=0)
    loaded = load_image(tmp_path / f"a.{suffix}", 16, "pad", background=(0, 200, 0))
    assert loaded.getpixel((4, 8)) == (0, 200, 0)
    assert loaded.getpixel((12, 8)) == BLUE


def test_partly_transparent_palette_color_is_composited(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*RED, *BLUE])
    image.save(tmp_path / "a.png", transparency=b"\x80\xff")
    assert is_close(load_image(tmp_path / "a.png", 8).getpixel((0, 0)), (255, 127, 127), 1)


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (10, 20, 30)), ("L", 10)])
def test_transparent_color_shows_the_background(tmp_path, mode, clear):
    Image.new(mode, (8, 8), clear).save(tmp_path / "a.png", transparency=clear)
    assert load_image(tmp_path / "a.png", 8, background=(0, 200, 0)).getcolors() == [(64, (0, 200, 0))]


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tiff"])
def test_palette_is_converted_to_rgb(tmp_path, suffix):
    halves(8, 8).convert("P").save(tmp_path / f"a.{suffix}")
    assert load_image(tmp_path / f"a.{suffix}", 8).tobytes() == halves(8, 8).tobytes()


@pytest.mark.parametrize(("mode", "color", "expected"), [("L", 77, 77), ("1", 1, 255)])
def test_gray_is_converted_to_rgb(tmp_path, mode, color, expected):
    Image.new(mode, (8, 8), color).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8).getcolors() == [(64, (expected,) * 3)]


@pytest.mark.parametrize(("suffix", "order"), [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2")])
def test_16_bit_gray_is_scaled(tmp_path, suffix, order):
    values = (np.arange(64).reshape(8, 8) * 4 * 257).astype(order)
    image = Image.fromarray(values)
    assert image.mode == ("I;16" if order == "<u2" else "I;16B")
    image.save(tmp_path / f"a.{suffix}")
    loaded = np.array(load_image(tmp_path / f"a.{suffix}", 8))
    assert (loaded == np.arange(0, 256, 4).reshape(8, 8, 1)).all()


def test_16_bit_gray_keeps_black_white_and_its_transparent_value(tmp_path):
    values = np.full((8, 8), 65535, np.uint16)
    values[0] = 300
    values[1] = 0
    values[2] = 255  # 0.99 of 1/255
    Image.fromarray(values).save(tmp_path / "a.png", transparency=300)
    loaded = load_image(tmp_path / "a.png", 8, background=(0, 200, 0))
    assert [loaded.getpixel((0, y)) for y in range(4)] == [(0, 200, 0), (0, 0, 0), (1, 1, 1), WHITE]


def test_32_bit_values_up_to_65535_are_read_as_16_bit(tmp_path):
    Image.fromarray(np.full((8, 8), 65535, np.int32)).save(tmp_path / "a.tiff")
    assert load_image(tmp_path / "a.tiff", 8).getcolors() == [(64, WHITE)]


@pytest.mark.parametrize("value", [np.int32(65536), np.int32(-1), np.float32(0.5)])
def test_other_32_bit_values_are_refused(tmp_path, value):
    Image.fromarray(np.full((8, 8), value)).save(tmp_path / "a.tiff")
    assert_refused("a.tiff' has pixels of mode", load_image, tmp_path / "a.tiff", 8)


@pytest.mark.parametrize("color", [(0, 255, 255), (255, 255, 255), (20, 40, 60)])
def test_cmyk_jpeg_is_converted_to_rgb(tmp_path, color):
    Image.new("RGB", (16, 16), color).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == "CMYK"
    assert is_close(load_image(tmp_path / "a.jpg", 16).getpixel((8, 8)), color)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_first_frame_of_an_animation_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.n_frames == 2
    assert load_image(tmp_path / f"a.{suffix}", 8).getcolors() == [(64, RED)]


# Refusing an image


def test_missing_file_is_refused(tmp_path):
    assert_refused("There is no file '" + str(tmp_path / "a.png"), load_image, tmp_path / "a.png", 8)
    (tmp_path / "file").write_text("")
    assert_refused("There is no file '", load_image, tmp_path / "file" / "a.png", 8)


def test_folder_is_refused(tmp_path):
    assert_refused(f"'{tmp_path}' is a folder where one image is needed", load_image, tmp_path, 8)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    assert_refused(f"a.png' cannot be read ({os.strerror(40)})", load_image, tmp_path / "a.png", 8)

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    noise().save(tmp_path / "b.png")
    monkeypatch.setattr(Path, "open", forbidden)  # root may read everything
    assert_refused("b.png' cannot be read (Permission denied)", load_image, tmp_path / "b.png", 8)


@pytest.mark.parametrize("content", [b"These are words.", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_file_that_is_not_an_image_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert_refused("a.png' is not an image", load_image, tmp_path / "a.png", 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_truncated_file_is_refused(tmp_path, suffix, part):
    path = tmp_path / f"a.{suffix}"
    noise(64, 64).save(path)
    load_image(path, 64)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert_refused(f"a.{suffix}' is damaged or cut short", load_image, path, 64)


@pytest.mark.parametrize(
    "side", [7072, 10_000, 60_000]
)  # just too many; more than Pillow's warning; more than its limit
def test_too_many_pixels_are_not_decoded(tmp_path, side):
    limit = Image.MAX_IMAGE_PIXELS
    path = png_header(tmp_path / "a.png", side, side)  # decoding it would report damage
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="PIL")  # as commands and calls do
        assert_refused("a.png' has more than the 50,000,000 pixels allowed", load_image, path, 64)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_max_pixels_is_the_largest_allowed_number(tmp_path):
    noise(16, 10).save(tmp_path / "a.png")
    load_image(tmp_path / "a.png", 8, max_pixels=160)
    assert_refused("a.png' has more than the 159 pixels allowed", load_image, tmp_path / "a.png", 8, max_pixels=159)
    assert_refused("is damaged", load_image, png_header(tmp_path / "b.png", 7071, 7071), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="PIL")  # as commands and calls do
        assert_refused("is damaged", load_image, png_header(tmp_path / "c.png", 10_000, 10_000), 64, max_pixels=10**8)
    most = 2 * Image.MAX_IMAGE_PIXELS
    huge = png_header(tmp_path / "d.png", 60_000, 60_000)
    assert_refused(f"has more than the {most:,} pixels allowed", load_image, huge, 64, max_pixels=10**10)


def test_max_bytes_is_the_largest_allowed_size(tmp_path):
    noise().save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    load_image(tmp_path / "a.png", 8, max_bytes=size)
    assert_refused(f"a.png' has more than the {size - 1} bytes", load_image, tmp_path / "a.png", 8, max_bytes=size - 1)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 100), (100, 7)])
def test_image_smaller_than_the_patches_is_refused(tmp_path, width, height):
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    assert_refused(f"a.png' has {width} x {height} pixels", load_image, tmp_path / "a.png", 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png", 8).size == (8, 8)


def test_to_tensor_scales_to_the_range_of_the_model():
    image = Image.new("RGB", (3, 2), (255, 0, 51))
    image.putpixel((2, 0), (0, 255, 0))
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 2, 3)
    assert tensor.is_contiguous()
    assert tensor[:, 1, 0].tolist() == pytest.approx([1, -1, -0.6], abs=1e-6)
    assert tensor[:, 0, 2].tolist() == [-1, 1, -1]
    with pytest.raises(ValueError, match="got mode RGBA"):
        to_tensor(image.convert("RGBA"))


# Keys


def test_key_depends_on_pixels_and_settings_alone(tmp_path):
    settings = {"steps": 10, "rates": [0.1, 0.2], "nested": {"b": 1, "a": None}}
    noise().save(tmp_path / "a.png")
    noise().save(tmp_path / "b.bmp")
    first, second = (load_image(tmp_path / name, 16) for name in ("a.png", "b.bmp"))
    key = content_key([first], settings)
    assert len(key) == 16
    assert set(key) <= set("0123456789abcdef")
    assert content_key([second], dict(reversed(settings.items()))) == key
    assert content_key([second], settings | {"nested": {"a": None, "b": 1}}) == key
    assert content_key([second], settings | {"steps": 11}) != key
    changed = first.copy()
    changed.putpixel((3, 3), tuple(255 - value for value in first.getpixel((3, 3))))
    assert content_key([changed], settings) != key


def test_key_is_the_same_in_every_run():
    assert content_key([Image.new("RGB", (8, 8), RED)], {"a": 1}) == "22de1efee93ea9ec"


def test_key_does_not_depend_on_the_order_of_images():
    a, b = noise(seed=1), noise(seed=2)
    assert content_key([a, b], {}) == content_key([b, a], {})
    assert len({content_key(images, {}) for images in ([a], [b], [a, b], [a, a])}) == 4


def test_key_depends_on_the_size():
    assert content_key([Image.new("RGB", (8, 16))], {}) != content_key([Image.new("RGB", (16, 8))], {})


def test_key_of_unsupported_values_is_refused():
    with pytest.raises(ValueError, match="got mode P"):
        content_key([Image.new("P", (8, 8))], {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        content_key([], {"model": object()})
