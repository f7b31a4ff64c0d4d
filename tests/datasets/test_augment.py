"""What is drawn for a row depends on the row and the epoch alone, and is done as it was drawn."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import pytest
from heliograph.datasets import augment
from heliograph.project import Augment

SHAPES = {"image": (8, 8), "features": (5,)}
ALL = Augment(flip="both", rotate=20, scale=0.2, translate=0.1, crop=0.8, contrast=0.3, noise=0.5, mixup=0.4)


def drawn(workers: int, lanes: int = 4, steps: int = 3, epoch: int = 1, how: Augment = ALL) -> dict[int, dict[str, bytes]]:
    """What each position gets, over all workers; partners by their position."""
    found = {}
    for rank in range(workers):
        spans = [np.arange(i * 20, (i + 1) * 20) for i in range(steps)]
        spans = [s[s % lanes % workers == rank] for s in spans]
        positions = np.concatenate(spans)
        draws = augment.draw(how, SHAPES, spans, lanes, (7, epoch))
        draws["partner"] = positions[np.arange(len(positions)) + draws["partner"]]
        for i, position in enumerate(positions.tolist()):
            found[position] = {name: values[i].tobytes() for name, values in draws.items()}
    return found


def test_a_row_is_varied_alike_on_any_number_of_workers_and_anew_each_epoch():
    alone = drawn(1)
    assert len(alone) == 60
    assert drawn(2) == alone == drawn(4)
    second = drawn(1, epoch=2)
    assert all(second[p]["geometry image"] != alone[p]["geometry image"] for p in alone)
    assert len({row["noise features"] for row in alone.values()}) == 60


def test_a_row_is_blended_with_one_of_its_shard_and_step_and_each_is_taken_once():
    for position, row in drawn(1).items():
        other = int(np.frombuffer(row["partner"], np.int64)[0])
        assert other != position
        assert other % 4 == position % 4
        assert other // 20 == position // 20
    others = [np.frombuffer(row["partner"], np.int64)[0] for row in drawn(1).values()]
    assert sorted(others) == list(range(60))


def test_draws_have_the_distributions_that_were_asked_for():
    spans = [np.arange(20_000)]
    draws = augment.draw(ALL, SHAPES, spans, 4, (0, 1))
    noise = draws["noise features"]
    assert (noise.mean(), noise.std()) == pytest.approx((0, 0.5), abs=0.01)
    assert np.abs(np.corrcoef(noise.T) - np.eye(5)).max() < 0.03
    assert (draws["contrast"].min(), draws["contrast"].max()) == pytest.approx((0.7, 1.3), abs=0.001)
    assert draws["share"].mean() == pytest.approx(0.5, abs=0.01)
    assert draws["share"].std() == pytest.approx((1 / (4 * (2 * 0.4 + 1))) ** 0.5, abs=0.01)  # of Beta(0.4, 0.4)


def varied(images: np.ndarray, **how) -> np.ndarray:
    import tensorflow as tf

    draws = augment.draw(Augment(**how), {"image": images.shape[1:]}, [np.arange(len(images))], 1, (3, 1))
    inputs, _ = augment.vary(
        {"image": tf.constant(images)}, tf.zeros(len(images)), {n: tf.constant(v) for n, v in draws.items()}, ()
    )
    return inputs["image"].numpy()


def test_each_variation_does_to_images_what_it_says():
    one = np.random.default_rng(0).random((6, 9, 3), np.float32)
    many = np.repeat(one[None], 400, 0)
    mirrored = varied(many, flip="horizontal")
    kept = [np.allclose(m, one, atol=1e-5) for m in mirrored]
    turned = [np.allclose(m, one[:, ::-1], atol=1e-5) for m in mirrored]
    assert all(k != t for k, t in zip(kept, turned, strict=True))
    assert 0.4 < np.mean(kept) < 0.6
    upside = varied(many, flip="vertical")
    assert {(np.allclose(m, one, atol=1e-5), np.allclose(m, one[::-1], atol=1e-5)) for m in upside} == {
        (True, False),
        (False, True),
    }
    both = varied(many, flip="both")
    ways = [one, one[::-1], one[:, ::-1], one[::-1, ::-1]]
    shares = np.mean([[np.allclose(m, way, atol=1e-5) for way in ways] for m in both], 0)
    assert shares.sum() == pytest.approx(1)
    assert (shares > 0.15).all()

    spot = np.zeros((50, 21, 21), np.float32)
    spot[:, 10, 15] = 1
    places = np.array([np.argwhere(m == m.max())[0] for m in varied(spot, rotate=90)])
    radius = np.hypot(*(places - 10).T)
    assert radius == pytest.approx(np.full(50, 5), abs=1)
    assert len({tuple(p) for p in places}) > 8
    moved = np.array([np.argwhere(m == m.max())[0] for m in varied(spot, translate=0.2)])
    assert np.abs(moved - [10, 15]).max() <= 5
    assert np.abs(moved - [10, 15]).max() >= 3

    flat = np.full((10, 4, 4), 3.0, np.float32)
    assert varied(flat, contrast=0.9) == pytest.approx(flat)
    lively = varied(many[:20], contrast=0.5)
    assert lively.mean((1, 2)) == pytest.approx(many[:20].mean((1, 2)), abs=1e-5)
    ratios = lively.std((1, 2)) / many[:20].std((1, 2))
    assert (ratios > 0.49).all()
    assert (ratios < 1.51).all()
    inner = varied(many[:50], crop=0.5)
    assert inner.min() >= one.min() - 1e-6
    assert inner.max() <= one.max() + 1e-6


def test_mixup_blends_rows_and_leaves_ids_alone():
    import tensorflow as tf

    rows = np.arange(12, dtype=np.float32)
    draws = augment.draw(Augment(mixup=1.0), {"features": (1,), "note": (1,)}, [np.arange(12)], 3, (1, 1))
    inputs = {name: tf.constant(rows[:, None]) for name in ("features", "note")}
    out, target = augment.vary(inputs, tf.constant(rows), {n: tf.constant(v) for n, v in draws.items()}, ("note",))
    share, other = draws["share"], rows[np.arange(12) + draws["partner"]]
    assert out["features"].numpy()[:, 0] == pytest.approx(share * rows + (1 - share) * other, abs=1e-5)
    assert (out["note"].numpy()[:, 0] == rows).all()
    assert (target.numpy() == other).all()
