from __future__ import annotations

import json
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from lightning_entropy.recipes.attention_figure import (
    attention_canvas,
    attention_figure,
    color_limits,
    compose,
    scaled_raster,
)
from lightning_entropy.recipes.attention_map import AttentionMap, write_png
from lightning_entropy.recipes.attention_raster import Canvas, bounding_rectangle, rasterize
from lightning_entropy.recipes.slide_view import SlideView

from .heatmap_cases import grid, write_pyramid


def one_hot(count: int, row: int) -> np.ndarray:
    attention = np.zeros(count, dtype=np.float32)
    attention[row] = 1.0
    return attention


def test_all_attention_on_one_tile_is_one_block_of_the_largest_value() -> None:
    coords = grid(6, 5, 100, left=300, top=200)
    one = AttentionMap(one_hot(30, 14), coords, 100)  # column 2, row 2: x 500, y 400
    canvas = attention_canvas([one], None, max_side=400)
    assert (canvas.left, canvas.top, canvas.width, canvas.height) == (200, 100, 800, 700)
    for scale in ("linear", "log"):
        raster = scaled_raster(one, scale, canvas)  # type: ignore[arg-type]
        rows, columns = np.nonzero(raster == np.nanmax(raster))
        assert (columns.min(), columns.max() + 1) == (150, 200)  # (500 - 200) / 2 to (600 - 200) / 2
        assert (rows.min(), rows.max() + 1) == (150, 200)
        assert len(rows) == 50 * 50
        assert np.isnan(raster[:50]).all()
        assert not np.isnan(raster[50:300, 50:350]).any()


def test_uniform_attention_is_0_on_the_log_scale_everywhere() -> None:
    coords = grid(7, 9, 33)
    one = AttentionMap(np.full(63, 1 / 63), coords, 33)
    canvas = attention_canvas([one], None)
    raster = scaled_raster(one, "log", canvas)
    covered = raster[~np.isnan(raster)]
    assert covered.size == 7 * 33 * 9 * 33
    np.testing.assert_allclose(covered, 0.0, atol=1e-6)
    assert color_limits([one], "log") == (-0.1, 0.1)
    image = compose(raster, (-0.1, 0.1), colormap="RdBu_r")
    white = image[~np.isnan(raster)]
    assert white.min() > 0.96  # the middle of the colour map


def test_twice_the_uniform_share_is_log_2() -> None:
    attention = np.full(10, 0.8 / 9)
    attention[3] = 0.2
    one = AttentionMap(attention, grid(10, 1, 10), 10)
    raster = scaled_raster(one, "log", attention_canvas([one], None))
    assert np.nanmax(raster) == pytest.approx(math.log(2), abs=1e-6)


def test_overlapping_tiles_are_averaged() -> None:
    coords = np.array([[0, 0], [5, 0]])
    raster = rasterize(np.array([0.25, 0.75]), coords, 10, Canvas(0, 0, 15, 10, 15, 10))
    np.testing.assert_array_equal(raster[0], [0.25] * 5 + [0.5] * 5 + [0.75] * 5)


@pytest.mark.parametrize("side", [64, 333, 1000])
def test_neighbouring_tiles_leave_no_gap_and_do_not_overlap(side: int) -> None:
    coords = grid(17, 13, 224, left=1000, top=77)
    canvas = Canvas.fitting(bounding_rectangle(coords, 224), max_side=side)
    ones = rasterize(np.ones(len(coords)), coords, 224, canvas)
    assert not np.isnan(ones).any()
    indices = rasterize(np.arange(len(coords)), coords, 224, canvas)
    np.testing.assert_array_equal(indices, np.rint(indices))  # a mean of two tiles would not be whole


def test_tiles_smaller_than_a_pixel_are_still_drawn() -> None:
    coords = np.array([[0, 0], [990, 990]])
    raster = rasterize(np.array([0.5, 0.5]), coords, 2, Canvas(0, 0, 1000, 1000, 10, 10))
    assert (~np.isnan(raster)).sum() == 2


def test_a_canvas_keeps_the_aspect_and_does_not_enlarge() -> None:
    assert Canvas.fitting((0, 0, 4000, 1000), max_side=800).columns == 800
    assert Canvas.fitting((0, 0, 4000, 1000), max_side=800).rows == 200
    assert Canvas.fitting((0, 0, 40, 10), max_side=800).downsample == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one pixel"):
        Canvas.fitting((0, 0, 0, 10))
    with pytest.raises(ValueError, match="max_side"):
        Canvas.fitting((0, 0, 10, 10), max_side=0)


def test_what_is_not_a_distribution_on_tiles_is_refused() -> None:
    coords = grid(2, 1, 10)
    for attention, places, size, message in [
        (np.array([0.5, 0.4]), coords, 10, "sums to 0.9"),
        (np.array([1.5, -0.5]), coords, 10, "row 1 is -0.5"),
        (np.array([np.nan, 1.0]), coords, 10, "row 0 is nan"),
        (np.array([0.5, 0.5]), coords[:1], 10, r"coords must be \(2, 2\)"),
        (np.array([[0.5, 0.5]]), coords, 10, r"\(N,\)"),
        (np.array([]), coords[:0], 10, "N >= 1"),
        (np.array([0.5, 0.5]), np.array([[0, 0], [np.inf, 0]]), 10, "row 1"),
        (np.array([0.5, 0.5]), coords, 0, "patch_size_level0"),
    ]:
        with pytest.raises(ValueError, match=message):
            AttentionMap(attention, places, size)


def test_the_summary_has_the_numbers_of_the_definition(tmp_path: Path) -> None:
    attention = np.array([0.5, 0.25, 0.125, 0.125])
    one = AttentionMap(attention, grid(4, 1, 10), 10, "s1", attributes={"mpp": np.float64(0.5)})
    text = one.to_json(tmp_path / "s1.json")
    found = json.loads((tmp_path / "s1.json").read_text())
    assert found == json.loads(text)
    entropy = 1.75 * math.log(2)
    assert found["entropy"] == pytest.approx(entropy)
    assert found["normalized_entropy"] == pytest.approx(entropy / math.log(4))
    assert found["effective_number"] == pytest.approx(math.exp(entropy))
    assert found["top1_mass"] == 0.5
    assert found["top10_mass"] == 1.0
    assert found["largest"] == {"row": 0, "x": 0, "y": 0, "attention": 0.5}
    assert found["attributes"] == {"mpp": 0.5}


def test_one_tile_has_no_entropy() -> None:
    one = AttentionMap(np.ones(1), np.array([[5, 5]]), 10)
    assert (one.entropy, one.normalized_entropy, one.effective_number) == (0.0, 1.0, 1.0)


def test_geojson_is_what_rfc_7946_and_qupath_expect(tmp_path: Path) -> None:
    coords = grid(3, 2, 50, left=1000, top=2000)
    attention = np.array([0.0, 0.1, 0.1, 0.1, 0.2, 0.5])
    path = AttentionMap(attention, coords, 50).to_geojson(tmp_path / "a.geojson")
    collection = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == 6
    for row, feature in enumerate(collection["features"]):
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5
        assert ring[0] == ring[-1]
        points = np.array(ring)
        assert points.min(axis=0).tolist() == coords[row].tolist()
        assert points.max(axis=0).tolist() == (coords[row] + 50).tolist()
        x, y = points[:-1].T
        twice_area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()
        assert twice_area == 2 * 50 * 50  # exterior rings are counterclockwise
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert isinstance(properties["classification"]["name"], str)
        assert len(properties["color"]) == 3
        assert all(isinstance(c, int) and 0 <= c <= 255 for c in properties["color"])
        assert properties["measurements"]["attention"] == pytest.approx(attention[row])
        if attention[row] > 0:
            assert properties["measurements"]["log(aN)"] == pytest.approx(math.log(attention[row] * 6), abs=1e-6)
    assert "> 2x" in collection["features"][5]["properties"]["classification"]["name"]
    assert "< 0.5x" in collection["features"][0]["properties"]["classification"]["name"]


def test_geojson_of_the_top_tiles_from_the_corner_of_the_scan(tmp_path: Path) -> None:
    one = AttentionMap(np.array([0.1, 0.6, 0.3]), grid(3, 1, 50, left=1000, top=2000), 50)
    path = one.to_geojson(tmp_path / "a.geojson", object_type="annotation", scale="linear", top=2, origin=(900, 1500))
    features = json.loads(path.read_text())["features"]
    assert [f["geometry"]["coordinates"][0][0] for f in features] == [[150, 500], [200, 500]]
    assert features[0]["properties"]["objectType"] == "annotation"
    for arguments, message in [
        ({"object_type": "cell"}, "object_type"),
        ({"top": 0}, "top"),
        ({"scale": "rank"}, "scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            one.to_geojson(tmp_path / "b.geojson", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "b.geojson").exists()


def test_h5_round_trip_in_tridents_layout(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.ones(20)).astype(np.float32)
    known = {"name": "s1", "level0_magnification": 40, "weight": 0.1, "nothing": None}
    one = AttentionMap(attention, grid(5, 4, 512), 512, "s1", "2", known)
    path = one.to_h5(tmp_path / "s1.h5")
    with h5py.File(path, "r") as file:  # as TRIDENT reads it
        assert file["attention"].dtype == np.float32
        assert file["attention"].shape == (20,)
        assert file["coords"].shape == (20, 2)
        assert file["coords"].attrs["patch_size_level0"] == 512
        assert file["coords"].attrs["level0_magnification"] == 40
        assert dict(file["attention"].attrs) == {"is_prob": True, "branch": "2", "weight": 0.1}
    back = AttentionMap.from_h5(path)
    np.testing.assert_array_equal(back.attention, one.attention)
    np.testing.assert_array_equal(back.coords, one.coords)
    assert (back.patch_size_level0, back.slide, back.branch) == (512, "s1", "2")
    assert back.attributes == {"name": "s1", "level0_magnification": 40, "weight": 0.1}
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["coords"] = one.coords
    with pytest.raises(ValueError, match="no dataset attention"):
        AttentionMap.from_h5(tmp_path / "other.h5")
    with h5py.File(tmp_path / "other.h5", "a") as file:
        file["attention"] = attention
    with pytest.raises(ValueError, match="patch_size_level0"):
        AttentionMap.from_h5(tmp_path / "other.h5")


def test_equal_maps_are_equal_pictures_without_a_slide(tmp_path: Path) -> None:
    one = AttentionMap(one_hot(30, 14), grid(6, 5, 100), 100, "s1")
    for scale in ("linear", "log"):
        first = one.to_png(tmp_path / f"a.{scale}.png", scale=scale)  # type: ignore[arg-type]
        again = one.to_png(tmp_path / f"b.{scale}.png", scale=scale)  # type: ignore[arg-type]
        assert first.read_bytes() == again.read_bytes()
        with Image.open(first) as image:
            assert min(image.size) > 500
    with pytest.raises(ValueError, match="scale must be"):
        one.to_png(tmp_path / "c.png", scale="rank")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one map"):
        attention_figure({})


def test_labels_stay_inside_the_picture_for_any_shape_of_slide() -> None:
    for columns, rows in [(40, 4), (4, 40), (1, 1)]:
        count = columns * rows
        one = AttentionMap(one_hot(count, 0), grid(columns, rows, 100), 100, "a_slide_with_a_rather_long_name")
        figure = attention_figure({"first": one, "second": one}, scale="log", mpp=0.5)
        figure.draw_without_rendering()
        box, page = figure.get_tightbbox(), figure.bbox_inches
        assert box.x0 >= -0.02
        assert box.y0 >= -0.02
        assert box.x1 <= page.x1 + 0.02
        assert box.y1 <= page.y1 + 0.02
        first, second = (axis.title.get_window_extent() for axis in figure.axes[:2])
        assert first.x1 < second.x0


@pytest.fixture
def pyramid(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A white slide of 2048 x 2048 with one dark square tile of 256 pixels at (768, 1280)."""
    picture = np.full((2048, 2048, 3), 255, dtype=np.uint8)
    picture[1280:1536, 768:1024] = (120, 40, 90)
    write_pyramid(tmp_path / "slide.tif", picture)
    return tmp_path / "slide.tif", picture


@pytest.mark.parametrize("max_side", [2048, 512, 300, 100])
def test_the_thumbnail_is_aligned_with_the_tiles(pyramid: tuple[Path, np.ndarray], max_side: int) -> None:
    path, _ = pyramid
    coords = grid(8, 8, 256)
    row = int(np.flatnonzero((coords == (768, 1280)).all(axis=1))[0])
    one = AttentionMap(one_hot(64, row), coords, 256)
    with SlideView(path) as slide:
        assert slide.dimensions == (2048, 2048)
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)
        assert slide.mpp == pytest.approx(0.5)
        assert slide.bounds == (0, 0, 2048, 2048)
        canvas = attention_canvas([one], slide, max_side=max_side)
        thumbnail = slide.thumbnail(canvas)
    assert thumbnail.shape == (max_side, max_side, 3)
    dark = thumbnail[..., 1] < 148  # half of the way from 40 to 255
    hot = scaled_raster(one, "linear", canvas) == 1.0
    if max_side in (2048, 512):  # the tile's edges are the pixels'
        np.testing.assert_array_equal(dark, hot)
    else:
        assert np.abs(np.argwhere(dark).min(axis=0) - np.argwhere(hot).min(axis=0)).max() <= 1
        assert np.abs(np.argwhere(dark).max(axis=0) - np.argwhere(hot).max(axis=0)).max() <= 1


def test_a_part_of_the_slide_is_aligned_too(pyramid: tuple[Path, np.ndarray]) -> None:
    path, picture = pyramid
    with SlideView(path) as slide:
        canvas = Canvas(700, 1200, 400, 360, 400, 360)
        np.testing.assert_array_equal(slide.thumbnail(canvas), picture[1200:1560, 700:1100])
        one = AttentionMap(np.array([0.5, 0.5]), np.array([[768, 1280], [1024, 1280]]), 256)
        tiles = attention_canvas([one], slide, region="tiles")
        assert (tiles.left, tiles.top, tiles.width, tiles.height) == (512, 1024, 1024, 768)
        edge = AttentionMap(np.ones(1), np.array([[1900, 0]]), 256)
        cut = attention_canvas([edge], slide, region="tiles")
        assert (cut.left, cut.top, cut.width, cut.height) == (1644, 0, 404, 512)


def test_a_large_level_is_read_block_by_block(
    pyramid: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = pyramid
    with SlideView(path) as slide:
        canvas = Canvas.fitting((0, 0, 2048, 2048), max_side=512)
        whole = slide.thumbnail(canvas)
        monkeypatch.setattr("lightning_entropy.recipes.slide_view._BLOCK", 100)
        np.testing.assert_array_equal(slide.thumbnail(canvas), whole)


def test_bounds_move_the_canvas_and_the_geojson(
    pyramid: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, picture = pyramid
    with SlideView(path) as slide:
        properties = {
            f"openslide.bounds-{n}": str(v) for n, v in zip(("x", "y", "width", "height"), (512, 1024, 1024, 768))
        }
        real = slide._slide

        class Bounded:
            def __getattr__(self, name: str) -> object:
                return properties if name == "properties" else getattr(real, name)

        monkeypatch.setattr(slide, "_slide", Bounded())
        assert slide.bounds == (512, 1024, 1024, 768)
        one = AttentionMap(np.ones(1), np.array([[768, 1280]]), 256)
        canvas = attention_canvas([one], slide)
        np.testing.assert_array_equal(slide.thumbnail(canvas), picture[1024:1792, 512:1536])
        hot = scaled_raster(one, "linear", canvas) == 1.0
        np.testing.assert_array_equal(slide.thumbnail(canvas)[..., 1] == 40, hot)


def test_another_slide_is_noticed(pyramid: tuple[Path, np.ndarray]) -> None:
    path, _ = pyramid
    one = AttentionMap(np.array([0.5, 0.5]), np.array([[0, 0], [4096, 0]]), 256, "s1")
    with SlideView(path) as slide:
        with pytest.raises(ValueError, match=r"1 of 2 tiles of 's1' start outside.*\(4096, 0\)"):
            attention_canvas([one], slide)
        with pytest.raises(ValueError, match="region must be"):
            attention_canvas([one], slide, region="all")  # type: ignore[arg-type]


def test_a_file_that_is_no_slide_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"not a slide")
    one = AttentionMap(np.ones(1), np.zeros((1, 2)), 256)
    with pytest.raises(ValueError, match=r"a\.svs: OpenSlide cannot read it"):
        one.to_png(tmp_path / "a.png", slide=tmp_path / "a.svs")
    with pytest.raises(FileNotFoundError, match=r"b\.svs does not exist"):
        one.to_png(tmp_path / "a.png", slide=tmp_path / "b.svs")


def test_two_maps_share_their_colours(pyramid: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    coords = grid(8, 8, 256)
    sharp, flat = AttentionMap(one_hot(64, 3), coords, 256), AttentionMap(np.full(64, 1 / 64), coords, 256)
    assert color_limits([flat, sharp], "linear") == (0.0, 1.0)
    low, high = color_limits([flat, sharp], "log")
    assert high == pytest.approx(math.log(64))
    assert low == -high
    path = write_png({"sharp": sharp, "flat": flat}, tmp_path / "two.png", slide=pyramid[0], max_side=400)
    with Image.open(path) as image:
        assert image.size[0] > image.size[1]
