"""Transposed convolutions: strides, paddings, groups, dilations in one to three dimensions."""

from torch import nn

from tests.cases import Model
from tests.ops.rows import exact


def up(dim, *args, **options):
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
    return lambda: nn.Sequential(layer(*args, **options), nn.Tanh())


ROWS = {
    "1d": Model((2, 4), up(1, 2, 3, 3)),
    "1d-stride": Model((2, 4), up(1, 2, 3, 3, stride=2, padding=1, output_padding=1)),
    "1d-dilation": Model((2, 4), up(1, 2, 3, 2, dilation=3, output_padding=2)),
    "1d-crop": Model((2, 5), up(1, 2, 2, 3, padding=2, dilation=2, output_padding=1)),
    "1d-groups": Model((4, 3), up(1, 4, 6, 3, groups=2, bias=False)),
    "2d": Model((2, 3, 4), up(2, 2, 3, (2, 3))),
    "2d-stride": Model((2, 3, 2), up(2, 2, 3, 3, stride=(2, 3), padding=(1, 0))),
    "2d-output-padding": Model((2, 3, 2), up(2, 2, 2, 2, stride=(2, 3), output_padding=(1, 2))),
    "2d-groups": Model((4, 2, 2), up(2, 4, 2, 2, groups=2, stride=2)),
    "2d-depthwise": Model((3, 2, 2), up(2, 3, 6, 2, groups=3, padding=1)),
    "2d-large": Model((2, 7, 7), up(2, 2, 2, 3, padding=1)),
    "3d": Model((1, 2, 2, 2), up(3, 1, 2, 2, stride=(1, 2, 1), padding=(0, 1, 0))),
    "down-and-up": Model(
        (1, 6, 6),
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2, 2), nn.GELU(), nn.ConvTranspose2d(2, 1, 2, 2), nn.Flatten()
        ),
    ),
}

test_exact = exact(ROWS)
