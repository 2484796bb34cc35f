import hashlib
import os
import pickle
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pyarrow.fs import FileSystem, LocalFileSystem

from odedit.data.images import ImageError, ImageReader
from odedit.data.pool import Pool
from odedit.data.records import read_records
from odedit.errors import InputError
from odedit.runtime.addresses import masked
from odedit.storage import location
from odedit.storage.location import locate
from tests.support.mmedit_files import encoded, picture


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "coco"
    (folder / "val2014").mkdir(parents=True)
    return folder


def read(root, data, name="val2014/x.jpg", **limits):
    (root / name).write_bytes(data)
    return ImageReader(str(root), **limits).read(name)


def test_reads_rgb_and_names_it_by_content(root):
    data = encoded(picture(1))
    result = read(root, data)
    assert result.key == hashlib.sha256(data).hexdigest()[:32]
    assert result.pixels.dtype == np.uint8 and result.pixels.shape == (18, 24, 3)
    np.testing.assert_array_equal(result.pixels, np.asarray(picture(1)))
    assert read(root, data, "val2014/y.jpg").key == result.key


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_allowed_formats(root, kind):
    pixels = read(root, encoded(Image.new("RGB", (9, 7), (200, 30, 90)), kind)).pixels
    assert pixels.shape == (7, 9, 3)
    assert np.abs(pixels.astype(int) - (200, 30, 90)).max() < 12


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "EPS"])
def test_other_formats_are_refused(root, kind):
    with pytest.raises(ImageError, match=r"not an image of a known kind. Allowed: PNG, JPEG") as caught:
        read(root, encoded(picture(), kind))
    assert caught.value.kind == "not an image"


def test_roots(tmp_path, root):
    other = tmp_path / "rephrased"
    other.mkdir()
    (other / "a.png").write_bytes(encoded(picture(2)))
    (root / "a.png").write_bytes(encoded(picture(3)))
    reader = pickle.loads(pickle.dumps(ImageReader(str(root), str(other))))
    np.testing.assert_array_equal(reader.read("a.png").pixels, np.asarray(picture(3)))
    np.testing.assert_array_equal(reader.read("a.png", "rephrase").pixels, np.asarray(picture(2)))
    np.testing.assert_array_equal(ImageReader(root.as_uri()).read("a.png", "rephrase").pixels, np.asarray(picture(3)))


def test_missing_file_and_root_one_level_too_deep(root):
    with pytest.raises(ImageError) as caught:
        ImageReader(str(root)).read("val2014/none.jpg")
    assert str(caught.value) == f"image 'val2014/none.jpg' is not under data.image_root ({str(root)!r})."
    with pytest.raises(ImageError, match="Set it to the folder that holds 'val2014'"):
        ImageReader(str(root / "val2014")).read("val2014/none.jpg")
    with pytest.raises(InputError, match=r"data\.rephrase_root: there is no folder"):
        ImageReader(str(root), str(root / "none")).check_roots()
    with pytest.raises(ImageError, match=r"data\.image_root is not set"):
        ImageReader(None).read("a.png")


@pytest.mark.parametrize("top", ["/", "//", "file:///"])
def test_a_root_may_be_the_top_of_the_file_system(root, top):
    (root / "a.png").write_bytes(encoded(picture(3)))
    reader = ImageReader(top)
    reader.check_roots()
    np.testing.assert_array_equal(reader.read(str(root)[1:] + "/a.png").pixels, np.asarray(picture(3)))
    assert locate(top, "x").child("a/b").path == "/a/b"
    assert locate(top, "x").child("a/b").text == f"{top}a/b"
    assert locate("mock:///", "x").child("a/b").path == "a/b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:SECRET@bucket/coco", "s3://***@bucket/coco"),
        ("s3://KEY:SEC@RET@bucket/a@b", "s3://***@bucket/a@b"),
        ("s3://KEY:SEC/RET@bucket/coco", "s3://***@bucket/coco"),
        ("'s3://KEY:SECRET@a/b' and gs://SECRET@c", "'s3://***@a/b' and gs://***@c"),
        ("abfs://a/b?x=1&sas_token=SECRET%3D&y=2", "abfs://a/b?x=1&sas_token=***&y=2"),
        ("https://a/b?X-Amz-Signature=SECRET&AccessKeyId=SECRET", "https://a/b?X-Amz-Signature=***&AccessKeyId=***"),
        ("{'uri': 'gs://a?password=SECRET'}", "{'uri': 'gs://a?password=***'}"),
        ("s3://bucket:9000/a@b.png?region=x", "s3://bucket:9000/a@b.png?region=x"),
        ("/data/coco and me@example.org", "/data/coco and me@example.org"),
        ("sqlite:////data/a@b.db", "sqlite:////data/a@b.db"),
    ],
)
def test_addresses_are_shown_without_secrets(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize("piece", ["key", "://a:", "&sig", "?token=", "://", "&key=&"])
def test_masking_takes_time_in_proportion_to_the_text(root, piece):
    start = time.process_time()
    masked("?" + piece * (100_000 // len(piece)))
    with pytest.raises(ImageError) as caught:
        ImageReader(str(root)).read("?" + piece * (10_000_000 // len(piece)))
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 1000


@pytest.fixture
def remote(root, monkeypatch):
    """Image root at an address with a password, such as an S3 address may have."""
    real = FileSystem.from_uri

    def from_uri(text):
        return (LocalFileSystem(), str(root)) if text == "s3://KEY:SECRET@bucket/coco" else real(text)

    monkeypatch.setattr(location, "FileSystem", SimpleNamespace(from_uri=from_uri))
    return "s3://KEY:SECRET@bucket/coco"


def test_no_message_repeats_a_secret(root, remote, tmp_path):
    (root / "out.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "empty.json").write_text("[]")
    reader = ImageReader(remote)
    assert locate(remote, "x").text == "s3://***@bucket/coco"
    broken = ("s3://KEY:SEC/RET@bucket/coco", "no://KEY:SECRET@bucket/coco", "abfs://a@b/c?sas_token=SECRET&SEC=RET")
    attempts = [
        *[lambda text=text: locate(text, "data.image_root") for text in broken],
        lambda: reader.read("none.png"),
        lambda: reader.read("out.png"),
        lambda: reader.read("s3://KEY:SECRET@bucket/x.png"),
        lambda: ImageReader.for_records(remote),
        lambda: list(read_records(remote)),
        lambda: Pool.sample(f"file://KEY:SECRET@{root}/empty.json", reader),
    ]
    for attempt in attempts:
        with pytest.raises((InputError, ImageError)) as caught:
            attempt()
        shown = str(caught.value)
        assert "SECRET" not in shown and "SEC/RET" not in shown and "***" in shown, shown
    for text in broken:
        with pytest.raises(InputError) as caught:
            locate(text, "data.image_root")
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    root.rename(root.parent / "gone")
    with pytest.raises(InputError, match=r"no folder 's3://\*\*\*@bucket/coco'"):
        reader.check_roots()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/hostname",
        "../secret.png",
        "val2014/../../secret.png",
        "val2014/../x.png",
        "file:///etc/hostname",
        "http://example.org/x.png",
        "~/x.png",
        "C:/x.png",
        "..\\secret.png",
        "x\0.png",
    ],
)
def test_paths_that_leave_the_root(root, path):
    (root.parent / "secret.png").write_bytes(encoded(picture()))
    with pytest.raises(ImageError) as caught:
        ImageReader(str(root)).read(path)
    assert caught.value.kind == "forbidden path" and str(caught.value).startswith("image ")


def test_links(root):
    (root.parent / "secret.png").write_bytes(encoded(picture()))
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    (root / "real.png").write_bytes(encoded(picture(5)))
    (root / "in.png").symlink_to(root / "real.png")
    for path in ("out.png", "folder/secret.png"):
        with pytest.raises(ImageError, match="a link leads out of"):
            ImageReader(str(root)).read(path)
    assert ImageReader(str(root)).read("in.png").pixels.shape == (18, 24, 3)
    linked = root.parent / "linked"
    linked.symlink_to(root)
    assert ImageReader(str(linked)).read("real.png").pixels.shape == (18, 24, 3)


def test_what_is_no_regular_file(root):
    os.mkfifo(root / "pipe.png")  # opening it would block forever
    for path in ("val2014", "pipe.png", ""):
        with pytest.raises(ImageError, match="is not a file"):
            ImageReader(str(root)).read(path)
    with pytest.raises(ImageError, match="cannot be read"):
        ImageReader(str(root)).read("x" * 300 + "/" + "y" * 5000)


def test_empty_and_foreign_files(root):
    with pytest.raises(ImageError, match="the file is empty"):
        read(root, b"")
    for data in (b"<html>404</html>", b"\0" * 500, b"version https://git-lfs.github.com/spec/v1\n"):
        with pytest.raises(ImageError, match="not an image of a known kind"):
            read(root, data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files(root, kind, share):
    data = encoded(picture(7, (200, 160)), kind)
    with pytest.raises(ImageError, match=r"image 'val2014/x.jpg'"):
        read(root, data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_only_raise_image_errors(root):
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        good = np.frombuffer(encoded(picture(8), kind), np.uint8)
        for _ in range(60):
            data = good.copy()
            data[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            try:
                pixels = read(root, data.tobytes(), max_pixels=10_000).pixels
            except ImageError:
                continue
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def test_too_many_pixels_are_refused_before_decoding(root, monkeypatch):
    data = encoded(Image.new("1", (3000, 2000)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"3000 x 2000 pixels are more than the limit of 5,999,999"):
        read(root, data, max_pixels=5_999_999)


def test_decompression_bomb(root):
    data = encoded(Image.new("1", (20_000, 20_000)))
    assert len(data) < 200_000
    with pytest.raises(ImageError, match="limit of 50,000,000") as caught:
        read(root, data)
    assert caught.value.kind == "image too large"


def test_too_many_bytes(root):
    data = encoded(picture())
    with pytest.raises(ImageError, match="bytes are more than the limit of 100"):
        read(root, data, max_bytes=100)
    assert read(root, data, max_bytes=len(data)).pixels.shape == (18, 24, 3)
    for setting in ("max_bytes", "max_pixels"):
        with pytest.raises(InputError, match=setting):
            ImageReader(str(root), **{setting: 0})


def test_cmyk(root):
    pixels = read(root, encoded(Image.new("RGB", (16, 16), (200, 30, 90)).convert("CMYK"), "JPEG")).pixels
    assert np.abs(pixels.astype(int) - (200, 30, 90)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled(root, kind):
    values = np.array([[0, 257, 32768, 65535, 255, 40000]], dtype=np.uint16)
    pixels = read(root, encoded(Image.fromarray(values), kind)).pixels
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255, 1, 156]
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70_000]]), np.int32([[-5]])])
def test_unknown_ranges_are_refused(root, values):
    with pytest.raises(ImageError, match="range of brightness is unknown"):
        read(root, encoded(Image.fromarray(values), "TIFF"))


def test_transparency_is_laid_over_white(root):
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    assert read(root, encoded(rgba)).pixels.tolist() == [[[255, 0, 0], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert read(root, encoded(grey)).pixels.tolist() == [[[255, 255, 255]]]


def test_palettes(root):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert read(root, encoded(image)).pixels.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert read(root, encoded(image, transparency=0)).pixels.tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes(root, mode):
    assert read(root, encoded(picture(4, mode="RGB").convert(mode))).pixels.shape == (18, 24, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_animations_give_their_first_frame(root, kind):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    pixels = read(root, encoded(frames[0], kind, save_all=True, append_images=frames[1:])).pixels
    assert pixels.shape == (5, 6, 3) and pixels[0, 0, 0] > 200 and pixels[0, 0, 2] < 60


def test_orientation_of_the_camera_is_applied(root):
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    pixels = read(root, encoded(image, exif=exif)).pixels
    assert pixels.shape == (8, 4, 3)
    assert pixels[0, 3].tolist() == [255, 0, 0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_note_of_the_camera_is_ignored(root):
    data = encoded(picture(1), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert read(root, data).pixels.shape == (18, 24, 3)


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("image 'x': bad.", "not an image")))
    assert str(error) == "image 'x': bad." and error.kind == "not an image" and isinstance(error, ValueError)
