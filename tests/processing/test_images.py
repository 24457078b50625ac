"""Images: equal to the original's pixels, and one clear line for whatever is not an image."""

import hashlib
import io
import pickle
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import FIXTURES, REFERENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4_jax import config
from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.models.minigpt import normalize_pixels
from minigpt4_jax.processing import images

pytestmark = pytest.mark.smoke

DUMPS = REFERENCE / "dumps"


def picture(height=40, width=60):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path, data):
    path.write_bytes(data)
    return path


def test_pixels_equal_the_original():
    case = np.load(FIXTURES / "pixels.npz")
    pixels = images.normalize(images.load_pixels(case["image"], 56))
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels.transpose(2, 0, 1), case["pixel_values"])


def test_every_version_of_pillow_resizes_alike():
    """The digest is that of one `resize` call of Pillow 13; versions before it differ for tall images."""
    rng, digest = np.random.default_rng(5), hashlib.sha256()
    for _ in range(200):
        width, height, size = rng.integers(2, [160, 160, 100])
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        digest.update(images.resize(Image.fromarray(noise), int(size)).tobytes())
    assert digest.hexdigest()[:16] == "b2368db47692a3b8"


@pytest.mark.parametrize("variant", "abc")
def test_pixels_equal_every_dump(variant):
    path = DUMPS / f"{variant}_pixels.npz"
    if not path.exists():
        pytest.skip("the reference dumps are not here")
    case = np.load(path)
    for n, expected in enumerate(case["pixel_values"]):
        small = images.load_pixels(case[f"image_uint8_{n}"], expected.shape[-1])
        pixels = images.normalize(small)
        np.testing.assert_array_equal(pixels.transpose(2, 0, 1), expected)


def test_the_model_normalizes_as_the_host_does():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    on_device = jax.jit(normalize_pixels)(every)
    assert on_device.dtype == np.float32
    # two units in the last place of the largest values, which are above 2
    np.testing.assert_allclose(on_device, images.normalize(every), rtol=0, atol=4.8e-7)
    assert normalize_pixels(on_device) is on_device


def test_normalize_equals_torchvision_arithmetic():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 3)
    x = np.float32(1) * every / np.float32(255)
    for c in range(3):
        expected = (x[:, c] - np.float32(config.IMAGE_MEAN[c])) / np.float32(config.IMAGE_STD[c])
        np.testing.assert_array_equal(images.normalize(every)[:, c], expected)


def test_path_pil_and_array_give_the_same(tmp_path):
    array = picture()
    path = write(tmp_path / "a.png", encoded(Image.fromarray(array)))
    for source in (path, str(path), Image.fromarray(array), array):
        opened = images.open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), array)


def test_bytes_and_a_part_of_a_file(tmp_path):
    array = picture()
    data = encoded(Image.fromarray(array))
    path = write(tmp_path / "a.tar", b"x" * 77 + data + b"y" * 9)
    part = images.FilePart(str(path), 77, len(data))
    for source in (data, part):
        np.testing.assert_array_equal(np.asarray(images.open_image(source)), array)
    for part, message in [
        (images.FilePart(str(path), 78, len(data)), r"a\.tar at byte 78: is not an image"),
        (images.FilePart(str(path), 90, len(data)), "the file is truncated"),
        (images.FilePart(str(tmp_path / "b.tar"), 0, 5), "there is no such file"),
        (b"", "the file is empty"),
        (data[:-30], "image of .* cannot be decoded"),
    ]:
        with pytest.raises(DataError, match=message) as e:
            images.open_image(part)
        assert e.value.cause
        again = pickle.loads(pickle.dumps(e.value))  # as from a worker process
        assert (str(again), again.cause) == (str(e.value), e.value.cause)


@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.booleans())
def test_normalize_of_any_layout(shape, turned):
    image = picture(*shape)
    image = image.transpose(1, 0, 2) if turned else image
    expected = np.stack([images.normalize(pixel) for pixel in image.reshape(-1, 3)])
    np.testing.assert_array_equal(images.normalize(image).reshape(-1, 3), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_converted_as_pillow_does(tmp_path, mode):
    image = Image.fromarray(picture()).convert("RGB").convert("L" if mode == "LA" else "RGB")
    image = image.convert(mode)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG", "HSV": None, "LAB": "TIFF"}.get(mode, "PNG")
    source = image
    if kind:
        source = write(tmp_path / "a", encoded(image, kind))
        image = Image.open(source)
    np.testing.assert_array_equal(
        np.asarray(images.open_image(source)), np.asarray(image.convert("RGB"))
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_the_upper_eight(tmp_path, kind):
    values = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)
    path = write(tmp_path / "a", encoded(Image.fromarray(values), kind))
    opened = np.asarray(images.open_image(path))
    np.testing.assert_array_equal(opened, np.repeat((values >> 8)[:, :, None], 3, axis=2))


def test_transparent_palette(tmp_path):
    image = Image.fromarray(picture()).convert("P")
    path = write(tmp_path / "a.gif", encoded(image, "GIF", transparency=0))
    np.testing.assert_array_equal(
        np.asarray(images.open_image(path)), np.asarray(Image.open(path).convert("RGB"))
    )


def test_exif_rotation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path / "a.jpg", encoded(Image.fromarray(picture(40, 60)), "JPEG", exif=exif))
    assert images.open_image(path).size == (60, 40)


def test_one_pixel():
    pixels = images.load_pixels(np.full((1, 1, 3), 7, np.uint8), 28)
    assert pixels.shape == (28, 28, 3)
    assert len(np.unique(pixels[..., 0])) == 1


class NotInMemory:
    """As a tensor of PyTorch with a gradient, or on a GPU."""

    def __array__(self, *_args, **_kwargs):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), 1.5, np.float32), r"float32 \[4, 4, 3\] with values 1.5 to 1.5"),
        (np.full((4, 4, 3), np.nan), r"float64 \[4, 4, 3\] with values nan"),
        (np.full((4, 4, 3), -1), r"int64 \[4, 4, 3\] with values -1 to -1"),
        (np.zeros((4,), np.uint8), r"uint8 \[4\]"),
        (np.zeros((3, 5, 5), np.uint8), r"uint8 \[3, 5, 5\].*channels come last"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (NotInMemory(), r"this NotInMemory is no array in memory \(Can't call numpy\(\)"),
    ],
)
def test_wrong_arrays(array, message):
    with pytest.raises(UserError, match=message):
        images.open_image(array)


def test_arrays_whose_meaning_is_clear():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    gray = np.broadcast_to(rgb[..., :1], rgb.shape)
    alpha = np.concatenate([rgb, np.full((5, 4, 1), 9, np.uint8)], -1)
    shares = (rgb / 255).astype(np.float32)
    for source, wanted in [
        (rgb, rgb), (rgb.astype(np.int64), rgb), (shares, rgb), (jnp.asarray(rgb), rgb),
        (jnp.asarray(shares), rgb), (rgb[..., 0], gray), (rgb[..., :1], gray), (alpha, rgb),
        (np.zeros((5, 4, 3)), np.zeros_like(rgb)), (gray[..., 0] > 99, np.where(gray > 99, 255, 0)),
        (jnp.ones((5, 4, 3), jnp.bfloat16), rgb * 0 + 255),
    ]:  # fmt: skip
        assert images.is_image(source)
        np.testing.assert_array_equal(np.asarray(images.open_image(source)), wanted)


def test_open_files_and_urls(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.new("RGB", (3, 2), (9, 8, 7)), "PNG"))
    with path.open("rb") as file:
        assert images.is_image(file) and images.open_image(file).size == (3, 2)
    content = path.read_bytes()
    for source in (io.BytesIO(content), bytearray(content), memoryview(content), np.str_(path)):
        assert images.is_image(source) and images.open_image(source).size == (3, 2)
    with path.open(errors="replace") as file, pytest.raises(UserError, match="opened as text"):
        images.open_image(file)
    file = io.BytesIO(path.read_bytes())
    file.read()
    with pytest.raises(UserError, match=r"read to its end already; call its seek\(0\)"):
        images.open_image(file)
    for url in ("https://a/b.png", "file:///a/b.png", "data:image/png;base64," + "A" * 5000):
        with pytest.raises(UserError, match=r"URLs are not read; download") as refused:
            images.open_image(url)
        assert len(str(refused.value)) < 200
    with pytest.raises(UserError, match="the path is empty"):
        images.open_image("")


def test_text_files_are_named_before_they_are_decoded(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.new("RGB", (3, 2)), "JPEG"))
    with path.open() as file, pytest.raises(UserError, match="is opened as text; open it in bin"):
        images.open_image(file)


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    path = tmp_path / "my cat.png"
    path.write_bytes(encoded(Image.new("RGB", (3, 2)), "PNG"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (path.as_uri(), path.as_uri().replace("file", "FILE"), "~/my cat.png"):
        assert images.open_image(name).size == (3, 2)
    with pytest.raises(UserError, match="is it an encoded image") as refused:
        images.open_image("/9j/" + "A/" * 4000)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo.*save it as JPEG"),
        (b"\0\0\0\x18ftypisom" + bytes(20), "a video.*a frame"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b'<?xml version="1.0"?><svg width="1"/>', "an SVG drawing.*PNG"),
        (b"\x93NUMPY\x01\0", "a NumPy array.*numpy.load"),
    ],
)
def test_files_of_other_formats_are_named(data, message):
    with pytest.raises(UserError, match=f"is {message}"):
        images.open_image(data)


def test_exif_orientation_is_applied_on_request(tmp_path):
    picture = Image.new("RGB", (6, 4))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown by viewers turned by 90 degrees clockwise
    path = tmp_path / "phone.png"
    picture.save(path, exif=exif)
    assert images.open_image(path).size == (6, 4)  # as the original
    turned = images.open_image(path, exif=True)
    assert turned.size == (4, 6) and turned.getpixel((3, 0)) == (255, 0, 0)
    assert images.open_image(turned, exif=True).size == (4, 6)  # not turned twice


def test_wrong_type():
    with pytest.raises(UserError, match="got int"):
        images.open_image(3)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match=r"none\.png: there is no such file"):
        images.open_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a directory"):
        images.open_image(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        images.open_image("a\0b.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"just text", "not an image"),
    ],
)
def test_files_that_are_no_images(tmp_path, data, message):
    path = write(tmp_path / "a.jpg", data)
    with pytest.raises(UserError, match=rf"a\.jpg.*{message}"):
        images.open_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files(tmp_path, kind):
    data = encoded(Image.fromarray(picture()), kind)
    path = write(tmp_path / "a.img", data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.img"):
        images.open_image(path)


def test_huge_image_names_its_pixels(tmp_path):
    """A PNG header alone says 40,000 x 30,000: nothing is decoded."""
    data = bytearray(encoded(Image.new("RGB", (1, 1))))
    header = b"IHDR" + struct.pack(">IIBBBBB", 40000, 30000, 8, 2, 0, 0, 0)
    data[12:33] = header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(UserError, match=r"1200000000 pixels.*resize it first"):
        images.open_image(write(tmp_path / "a.png", bytes(data)))


def test_huge_pil_image(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(UserError, match="10 x 10 = 100 pixels"):
        images.open_image(Image.new("RGB", (10, 10)))
    with pytest.raises(UserError, match="100 pixels"):
        images.open_image(np.zeros((10, 10, 3), np.uint8))


def test_floating_point_image(tmp_path):
    path = write(tmp_path / "a.tif", encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(UserError, match="8 bits"):
        images.open_image(path)


def test_random_crop_is_drawn_from_the_generator():
    image = Image.fromarray(picture())
    first, second, same = (
        images.random_crop(image, 32, np.random.default_rng(seed)) for seed in (1, 2, 1)
    )
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, same)
    assert (first != second).any()


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_crop_box_properties(width, height, seed):
    x0, y0, x1, y1 = images._crop_box(width, height, np.random.default_rng(seed))
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    if min(width, height) > 50 and max(width, height) < 2 * min(width, height):
        w, h = x1 - x0, y1 - y0
        assert 0.47 <= w * h / (width * height) <= 1
        assert 0.72 <= w / h <= 1.39


HEADERS = [
    encoded(Image.fromarray(picture(8, 8)), kind)[:60]
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA")
]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, deadline=None)
@given(st.sampled_from([b"", *HEADERS]), st.integers(0, 60), st.binary(max_size=200))
def test_random_bytes_raise_user_errors_only(tmp_path_factory, header, kept, rest):
    path = tmp_path_factory.getbasetemp() / "random.img"
    path.write_bytes(header[:kept] + rest)
    try:
        assert images.open_image(path).mode == "RGB"
    except UserError as e:
        assert "random.img" in str(e)
        assert "\n" not in str(e)
