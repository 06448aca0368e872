"""Prose: what docs/digits.md says around its tables.

In: nothing, or a setting. Out: Markdown. What the studies came to is in the tables and the sentences that `render`
counts together; nothing here depends on it.
"""

from __future__ import annotations

from .data import SHAPE, digits
from .setting import Setting

TITLE = """\
# SEs on handwritten digits

Made by `python -m benchmarks.digits --render` from the rows in [digits.jsonl](digits.jsonl); not to be edited by hand.

Three studies on images that come with scikit-learn, so that nothing has to be downloaded: what is lost when SEs are
taken out of a trained network, what is gained when they are put into one, and which placement, r, squeeze and gate are
best from scratch. All figures are percentages of test images that are classified right."""

LIMITS = """\
## What this can and cannot show

A figure is the mean over the seeds ± its standard error. A seed has images to train on, distortions, first weights and
batches of its own, and all arms share these; so arms are compared seed by seed, and a difference is the mean of these
differences ± its standard error, which is often smaller than that of either arm. How a difference is written says how
far it can be trusted:

- **+1.00 ± 0.20**: its 95 % confidence interval, by Student's t, leaves out zero. In a table of forty such
  comparisons two are expected to do so by chance alone.
- +1.00 ± 0.60: larger than its standard error, and no more than a hint.
- (+0.10 ± 0.20): under its standard error, and no difference.

One small network is trained on a few hundred images of 8 x 8 pixels, with one optimizer, one schedule and rates that
were chosen for the base, on other seeds. Its last maps are 2 x 2, where the pooled map that a gate sees is little less
than the map. Effects of a few tenths of a percent, such as most of the paper's between placements, are below what so
few seeds and test images resolve. So this can show that the tools do what they say on a network that has learned
something, that an effect is large, or that a choice costs nothing that can be seen here. It cannot rank placements or
ratios for ImageNet, nor show that two of them are equal: what is in parentheses was not seen, which is not the same
as not there."""


def method(setting: Setting) -> str:
    """How the studies are made."""
    total, side = len(digits()[0]), SHAPE[-1]
    rest = total - setting.train_images - setting.choice_images
    return f"""\
## How

- **Images.** {total:,} of {side} x {side} pixels: for each seed {setting.train_images} to train on, \
{setting.choice_images} to choose SEs by, {rest:,} to test on, one of which is {100 / rest:.2f} %. Unaltered they are \
too easy; each is moved by up to {setting.shift} pixel in each direction and has noise of {setting.noise} standard \
deviations added, anew in every batch, once in the other parts.
- **Network.** A ResNet of timm's bottlenecks, {" + ".join(map(str, setting.units))} in its stages, with \
{setting.width * 4}, {setting.width * 8} and {setting.width * 16} channels on maps of 8 x 8, 4 x 4 and 2 x 2. It has \
every placement but `inception`, which is that of `standard` where there are Inception modules.
- **Training.** AdamW with a weight decay of {setting.decay} and one cycle of the learning rate up to {setting.rate}, \
or {setting.tune_rate} in fine-tuning, on batches of {setting.batch}. With SGD at usual rates the gates hardly leave \
their first value in so few steps.
- **SEs.** No biases, `rd_divisor=1`; from scratch `init="paper"`."""


AGAIN = """\
## Run it again

From the root of a checkout, with the `test` extra installed; all of it takes one core half an hour, and goes on where
it was when it is interrupted. The same command makes the same rows on the same machine.

```bash
python -m benchmarks.digits --write           # what is missing
python -m benchmarks.digits --fresh --write   # all of it anew
python -m benchmarks.digits --help
```"""

GATES = """\
An SE network is trained from scratch beside its base. Then SEs are taken out of copies of it, without any training
afterwards: stripped, so that their effect goes with them; folded, so that their mean gate over the training images
stays; or what `tradeoff(model, loader, budget=0.5)` takes out so that at most half of the SEs' parameters are left,
by what it does to the accuracy on the images to choose by, or with `evaluate=` to the loss on them."""

GATES_SITES = """\
Its gates over the training images, on average over channels and seeds: mean, standard deviation over the images and
between the classes' means, and how many are within 5 % of an end."""

CHOICES = """\
What the tradeoff took out, by seed. One of the images that it chooses by is {share:.2f} % of accuracy, no less than
many SEs are worth when they are folded; so a choice by accuracy goes by chance as well as by worth, and takes out more
than the budget asks for where that seems to cost nothing. The loss is a finer measure."""

RETROFIT = """\
A base is trained first. Then it is fine-tuned on, or gets SEs and is fine-tuned, for the same number of steps with the
same batches and rates. `identity` and `paper` are the two starts of the SEs. `scratch` has the same SEs and number of
steps from random weights, at the rate for these; it is a part of the next study. Differences are to the base
fine-tuned on."""

MARGINS = """\
The same differences, averaged within each seed over all arms of a row, which makes their errors smaller:"""

REPLICATION = """\
Every placement with every r, every placement with the other squeeze, gates and start, and the base: all trained from
scratch with the same steps. They are few, and no network has converged; what is compared is how far each has come. A
row compares the networks that have a level of a factor with those that have the factor's first one and are the same in
all else; a difference is the mean over these pairs, within each seed. Beside it what the paper has in top-1 accuracy on
ImageNet with SE-ResNet-50 (tables 10 to 14)."""

RECIPE = """\
One at a time, as the paper does it: networks that differ from its recipe (`standard`, r = 16, average, sigmoid, random
weights) in one factor. Differences are to that recipe."""

PLACED = """\
By placement: differences to the base. The first column of figures is the recipe with that placement, each other one
has one more factor changed."""
