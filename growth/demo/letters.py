"""The larger scales' letters: 47 characters in the fonts that come with matplotlib, never twice the same.

The characters are those of EMNIST's balanced set (Cohen et al., EMNIST: an extension of MNIST to handwritten
letters, 2017), which leaves out small letters that look like large ones.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from growth.training.images import Images

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
FONTS = (
    *("DejaVuSans.ttf", "DejaVuSans-*.ttf", "DejaVuSansMono*.ttf", "DejaVuSerif.ttf", "DejaVuSerif-*.ttf"),
    *("cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf", "cmti10.ttf", "STIXGeneral*.ttf"),
)
PIXELS, WIDE = 16, 48  # of an image, and of a character as it is drawn
PARTS = 4096  # images at a time


def letters(count: int, seed: int) -> Images:
    """`count` images [1, 16, 16] of characters and fonts by chance; pixels from about -1 to 1.

    Each is turned by up to 10 degrees, sheared by up to 0.15, 0.9 to 1.1 times as large, moved by up to a
    pixel, and under noise of 0.1.
    """
    drawn = sheets()
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CHARACTERS), (count,), generator=random)
    which = torch.randint(len(drawn), (count,), generator=random)
    angle, shear, size, x, y = (2 * torch.rand(5, count, generator=random) - 1).unbind()
    angle, shear = angle * math.pi / 18, 0.15 * shear
    scale = 1 + 0.1 * size
    cos, sin = angle.cos() / scale, angle.sin() / scale
    at = torch.stack([cos, shear * cos - sin, x / 8, sin, shear * sin + cos, y / 8], -1).unflatten(-1, (2, 3))
    images = []
    for part in torch.arange(count).split(PARTS):
        grid = F.affine_grid(at[part], [len(part), 1, WIDE, WIDE], align_corners=False)
        turned = F.grid_sample(drawn[which[part], labels[part]][:, None], grid, align_corners=False)
        images.append(F.avg_pool2d(turned, WIDE // PIXELS))
    pixels = torch.cat(images)
    return Images(2 * pixels - 1 + 0.1 * torch.randn(pixels.shape, generator=random), labels)


def sheets() -> Tensor:
    """Every character in each font, in the middle of its square: [fonts, characters, 48, 48], from 0 to 1."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    folder, found = Path(get_data_path()) / "fonts/ttf", []
    for path in sorted(path for name in FONTS for path in folder.glob(name)):
        font = ImageFont.truetype(path, 40)
        for character in CHARACTERS:
            sheet = Image.new("L", (WIDE, WIDE))
            ImageDraw.Draw(sheet).text((WIDE / 2, WIDE / 2), character, 255, font, anchor="mm")
            found.append(torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8))
    return torch.stack(found).view(-1, len(CHARACTERS), WIDE, WIDE) / 255
