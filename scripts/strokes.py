"""Synthetic stroke characters: the pre-training data of the demo model.

No fonts, digits or other real data are involved. A *class* is a character of one to four random strokes (lines, arcs
and free curves). An *image* is that character, written with a random affine transform, jittered control points, pen
width, softness, contrast and noise. Most images are reduced to 8x8 grey levels and enlarged again, because the images
of the demo's target task are that coarse.

Coordinates are in a square [-1, 1] x [-1, 1] (x to the right, y down). Every stroke is a Bezier curve with
`CONTROL_POINTS` control points, so that a batch of characters is one matrix product.
"""

import math

import torch
import torch.nn.functional as F


IMAGE_SIZE = 32  # pixels
COARSE_SIZE = 8  # pixels, before enlarging to IMAGE_SIZE
MAX_STROKES = 4
CONTROL_POINTS = 6
POINTS_PER_STROKE = 32


def bezier_basis(points=POINTS_PER_STROKE, control_points=CONTROL_POINTS):
    """Return the Bernstein basis (points, control_points): `basis @ control` samples the curve at equal steps of t."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    i = torch.arange(control_points, dtype=torch.float64)[None]
    n = control_points - 1
    binomial = torch.tensor([math.comb(n, k) for k in range(control_points)], dtype=torch.float64)
    return (binomial * t**i * (1 - t) ** (n - i)).float()


def _uniform(generator, shape, low, high):
    return torch.rand(shape, generator=generator) * (high - low) + low


def _random_stroke(generator, start):
    """Draw control points (CONTROL_POINTS, 2) of a line, elliptic arc or free curve, which begins at `start` if given."""
    kind = torch.rand((), generator=generator).item()
    if kind < 0.3:  # line
        ends = _uniform(generator, (2, 2), -1, 1)
        weight = torch.linspace(0, 1, CONTROL_POINTS)[:, None]
        stroke = ends[0] * (1 - weight) + ends[1] * weight
    elif kind < 0.65:  # elliptic arc, up to a full turn: least-squares fit of its control points
        first, sweep = _uniform(generator, (2,), -math.pi, math.pi)
        sweep = torch.sign(sweep) * (math.pi / 2 + sweep.abs() * 1.5)
        angle = first + torch.linspace(0, 1, POINTS_PER_STROKE) * sweep
        radii = _uniform(generator, (2,), 0.3, 0.9)
        curve = torch.stack([angle.cos(), angle.sin()], dim=1) * radii + _uniform(generator, (2,), -0.5, 0.5)
        # Double precision and rounding: LAPACK's last bits differ from call to call, but the characters must not.
        fit = torch.linalg.lstsq(bezier_basis().double(), curve.double()).solution
        stroke = (fit * 4096).round().float() / 4096
    else:  # free curve; control points beyond the square make it bend more
        stroke = _uniform(generator, (CONTROL_POINTS, 2), -1.6, 1.6)
    return stroke if start is None else stroke - stroke[0] + start


def make_classes(num_classes, seed=0):
    """Draw the characters: control points (classes, MAX_STROKES, CONTROL_POINTS, 2) and stroke mask (classes, MAX_STROKES)."""
    generator = torch.Generator().manual_seed(seed)
    control = torch.zeros(num_classes, MAX_STROKES, CONTROL_POINTS, 2)
    mask = torch.zeros(num_classes, MAX_STROKES)
    for c in range(num_classes):
        strokes = int(torch.multinomial(torch.tensor([0.2, 0.4, 0.3, 0.1]), 1, generator=generator)) + 1
        for s in range(strokes):
            # Half of the later strokes continue where the pen stopped, as if it had not been lifted.
            joined = s > 0 and torch.rand((), generator=generator).item() < 0.5
            control[c, s] = _random_stroke(generator, control[c, s - 1, -1] if joined else None)
        mask[c, :strokes] = 1
    return control, mask


def _write(control, mask, generator, jitter):
    """Return curve points (batch, points, 2) and ink weights (batch, points) after jitter, affine map and centring."""
    batch = control.shape[0]
    noise = torch.randn(control.shape, generator=generator) * jitter
    moved = torch.randn((batch, MAX_STROKES, 1, 2), generator=generator) * jitter  # a stroke as a whole
    curve = bezier_basis() @ (control + noise + moved)  # (batch, strokes, points, 2)

    angle = torch.randn(batch, generator=generator) * 0.15  # radians
    shear = torch.randn(batch, generator=generator) * 0.2
    aspect = torch.exp(torch.randn(batch, generator=generator) * 0.15)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([cos * aspect, cos * shear - sin, sin * aspect, sin * shear + cos], dim=1).view(
        batch, 1, 2, 2
    )
    curve = curve @ affine.transpose(-1, -2)

    length = (curve[:, :, 1:] - curve[:, :, :-1]).norm(dim=-1)
    length = F.pad(length, (0, 1)) * 0.5 + F.pad(length, (1, 0)) * 0.5
    present = mask[:, :, None].expand_as(length).flatten(1)
    points, length = curve.flatten(1, 2), length.flatten(1)
    # Centre the written character and scale it to fill a portrait cell, as scanned characters usually are.
    low = points.masked_fill(present[..., None] == 0, torch.inf).amin(dim=1)
    high = points.masked_fill(present[..., None] == 0, -torch.inf).amax(dim=1)
    half = ((high - low) / 2 * torch.tensor([1.25, 1.0])).amax(dim=1).clamp_min(0.1)
    size = _uniform(generator, (batch,), 0.75, 0.95)
    scale = size / half
    shift = torch.randn((batch, 2), generator=generator) * 0.05
    points = (points - ((high + low) / 2)[:, None]) * scale[:, None, None] + shift[:, None]
    return points, length * scale[:, None] * present


def render(control, mask, generator, jitter=0.12, coarse_fraction=0.75):
    """Write each character once: control (batch, MAX_STROKES, CONTROL_POINTS, 2) to images (batch, 1, 32, 32) in [0, 1]."""
    batch = control.shape[0]
    points, ink = _write(control, mask, generator, jitter)
    sigma = _uniform(generator, (batch, 1), 0.07, 0.14)  # pen radius, in half image widths
    grid = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
    # A Gaussian pen is separable: the sum over curve points of g(x) g(y) is a product of two thin matrices.
    spread = torch.exp(-0.5 * ((points[..., None] - grid) / sigma[..., None, None]) ** 2)  # (batch, points, 2, 32)
    weight = ink / (sigma * math.sqrt(2 * math.pi))
    stroke = (spread[:, :, 1] * weight[..., None]).transpose(1, 2) @ spread[:, :, 0]  # about 1 on a line, 0 off it
    sharpness = _uniform(generator, (batch, 1, 1), 6, 14)
    images = torch.sigmoid(sharpness * (stroke - 0.5))[:, None]

    contrast = _uniform(generator, (batch, 1, 1, 1), 0.75, 1.0)
    coarse = F.avg_pool2d(images, IMAGE_SIZE // COARSE_SIZE)
    coarse = coarse + torch.randn(coarse.shape, generator=generator) * 0.03
    coarse = (coarse * contrast).clamp(0, 1)
    coarse = F.interpolate(coarse, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    fine = images + torch.randn(images.shape, generator=generator) * 0.05
    fine = (fine * contrast).clamp(0, 1)
    is_coarse = torch.rand((batch, 1, 1, 1), generator=generator) < coarse_fraction
    return torch.where(is_coarse, coarse, fine)


class StrokeBatches:
    """Endless stream of training batches: pixels (batch, 3, 32, 32) normalised to [-1, 1] and class indices (batch,).

    `class_seed` fixes the characters; `seed` fixes the order and the way they are written.
    """

    def __init__(self, num_classes, batch_size, seed=0, class_seed=0):
        self.control, self.mask = make_classes(num_classes, class_seed)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        return self

    def __next__(self):
        labels = torch.randint(len(self.mask), (self.batch_size,), generator=self.generator)
        images = render(self.control[labels], self.mask[labels], self.generator)
        return (images * 2 - 1).expand(-1, 3, -1, -1).contiguous(), labels
