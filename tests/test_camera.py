"""What the camera did to the whole picture is taken off; what moves by itself stays."""

import numpy as np
import pytest

from vqlora.frames.camera import block_means, shifts, unexplained


def picture(seed=0, size=(64, 64)):
    """A textured picture in floats, 40 to 180."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.uniform(40, 180, (size[0] // 8 + 1, size[1] // 8 + 1)), np.ones((8, 8)))
    return coarse[:size[0], :size[1]] + rng.uniform(-8, 8, size)


def left_over(*frames):
    """`[n, R, C]` of frames given as floats."""
    luma = np.stack(frames).round().clip(0, 255).astype(np.uint8)
    means = block_means(luma)
    return unexplained(luma, means).reshape(-1, *means.shape[1:])


@pytest.mark.parametrize("size", [(64, 64), (60, 80), (33, 57), (64, 113)])
@pytest.mark.parametrize("gain,offset", [(1.0, 25.0), (0.75, 0.0), (1.3, -20.0)])
def test_light_explains_itself(size, gain, offset):
    still = picture(size=size)
    assert left_over(still, gain * still + offset).max() < 2


@pytest.mark.parametrize("down,right", [(2, 0), (0, -3), (-4, 5)])
def test_a_moving_camera_explains_itself(down, right):
    still = picture()
    moved = np.roll(still, (down, right), (0, 1))
    luma = np.stack([still, moved]).astype(np.uint8)
    assert shifts(luma, np.array([0])).tolist() == [[down, right]]
    assert left_over(still, moved)[0].max() < 2 < left_over(still, np.roll(still, 20, 0))[0].max()


def test_something_that_moves_is_left_where_it_was_and_where_it_is():
    before, after = picture(), picture()
    before[16:24, 8:16] = 250
    after[16:24, 40:48] = 250
    for seen in (after, 0.8 * after, np.roll(after, (2, 3), (0, 1))):
        (left,) = left_over(before, seen)
        strongest = {tuple(place) for place in np.argwhere(left > 0.5 * left.max())}
        assert {column for _, column in strongest} <= {2, 3, 4, 10, 11, 12}
        assert {row for row, _ in strongest} <= {3, 4, 5, 6} and left.max() > 20


def test_blur_of_the_whole_picture_is_mostly_explained():
    still = picture()
    blurred = sum(np.roll(still, (i, j), (0, 1)) for i in (-2, 0, 2) for j in (-2, 0, 2)) / 9
    (left,) = left_over(still, blurred)
    plain = np.abs(np.diff(block_means(np.stack([still, blurred]).astype(np.uint8)).astype(float), axis=0))
    assert left.mean() < 0.6 * plain.mean()


def test_a_still_noisy_picture_and_its_first_frame():
    rng = np.random.default_rng(3)
    frames = picture() + rng.normal(0, 4, (5, 64, 64))
    assert left_over(*frames).mean() < 2
    assert left_over(frames[0], frames[0]).max() == 0


def test_block_means_leave_the_rest_out():
    means = block_means(np.arange(33 * 57, dtype=np.uint16).reshape(1, 33, 57).astype(np.uint8))
    assert means.shape == (1, 16, 14)
    assert (block_means(np.full((2, 64, 64), 77, np.uint8)) == 77).all()
