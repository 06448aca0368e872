"""docs/paper.md: every figure of the paper is in it, and ours beside it are those that are counted today."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from se_surgery import plan_se
from se_surgery.measuring.cost import multiply_adds
from se_surgery.models.bases import create_base
from se_surgery.models.catalog import recipe_names
from se_surgery.paper.printed import NETWORKS, PLACEMENTS, TABLE_10, VARIANTS
from se_surgery.paper.tables import SAME, tables
from se_surgery.paper.text import document

DOCUMENT = Path(__file__).parent.parent / "docs" / "paper.md"


@pytest.fixture(scope="module")
def made():
    return tables()


def test_the_document_is_the_one_that_is_made_today(made):
    """`se-surgery paper > docs/paper.md` writes it."""
    assert DOCUMENT.read_text(encoding="utf-8") == document(made)


# By table: the rows, each with the paper's figures in the order in which they stand there.
ROWS = {
    "Table 10": """
        4: 35.7 22.25 6.09 / 8: 30.7 22.26 5.99 / 16: 28.1 22.28 6.03 / 32: 26.9 22.72 6.20 / base: 25.6 23.30 6.55""",
    "Tables 2 and 3: multiply-adds": """
        ResNet-50: 3.86 3.87 / ResNet-101: 7.58 7.60 / ResNet-152: 11.30 11.32 / ResNeXt-50 32x4d: 4.24 4.25 /
        ResNeXt-101 32x4d: 7.99 8.00 / VGG-16 with BN: 15.47 15.48 / BN-Inception: 2.03 2.04 /
        Inception-ResNet-v2: 11.75 11.76 / MobileNet 1.0: 0.569 0.572 / ShuffleNet 1x, g = 3: 0.140 0.142""",
    "Table 3: parameters": """
        MobileNet 1.0: 4.2 / SE-MobileNet 1.0: 4.7 / ShuffleNet 1x, g = 3: 1.8 / SE-ShuffleNet 1x, g = 3: 2.4""",
    "Tables 13 and 14": """
        standard: 28.1 22.28 / pre: 22.23 / post: 22.78 / identity: 22.20 / inner: 25.8 22.48 / base: 25.6 23.30 /
        inception: / standard, plain network: / standard, MobileNet: / standard, ShuffleNet:""",
    "Tables 11 and 12": """
        squeeze: max: 22.57 6.09 / squeeze: average: 22.28 6.03 /
        gate: ReLU: 23.47 6.98 / gate: tanh: 23.00 6.38 / gate: sigmoid: 22.28 6.03""",
    "Tables 2 and 3, and SENet-154: errors": """
        ResNet-50: 24.80 23.29 7.48 6.62 / ResNet-101: 23.17 22.38 6.52 6.07 / ResNet-152: 22.42 21.57 6.34 5.73 /
        ResNeXt-50 32x4d: 22.11 21.10 5.90 5.49 / ResNeXt-101 32x4d: 21.18 20.70 5.57 5.01 /
        VGG-16 with BN: 27.02 25.22 8.81 7.70 / BN-Inception: 25.38 24.23 7.89 7.14 /
        Inception-ResNet-v2: 20.37 19.80 5.21 4.79 / MobileNet 1.0: 29.1 25.3 10.1 7.9 /
        ShuffleNet 1x, g = 3: 32.6 31.0 12.5 11.1 / SENet-154, at 224 pixels: 18.68 4.47 /
        SENet-154, at 320: 17.28 3.79 / SENet-154, trained and tested at 320: 16.88 3.58""",
}


@pytest.mark.parametrize("title", ROWS)
def test_every_row_of_the_paper_is_in_it(made, title):
    table = next(table for table in made if table.title.startswith(title))
    rows = {row[0]: list(row[1:]) for row in table.rows}
    expected = {}
    for entry in ROWS[title].split("/"):
        name, _, figures = entry.strip().rpartition(":")
        expected[" ".join(name.split())] = figures.split()
    assert rows.keys() == expected.keys()
    for name, figures in expected.items():
        cells = iter(rows[name])
        assert all(figure in cells for figure in figures), (name, figures, rows[name])


# What is not the same, with what stands there instead.
OTHER = {
    ("Tables 2 and 3: multiply-adds", "BN-Inception"): "same, note 1",
    ("Tables 2 and 3: multiply-adds", "Inception-ResNet-v2"): "more, note 2",
    ("Tables 2 and 3: multiply-adds", "ShuffleNet 1x, g = 3"): "same, note 3",
    ("Where the base differs", "ResNeXt-101 32x4d"): "-0.01",
    ("Table 3: parameters", "ShuffleNet 1x, g = 3"): "note 1: 1.8 if cut off",
    ("Table 3: parameters", "SE-ShuffleNet 1x, g = 3"): "note 1: 2.4 if cut off",
}


def test_every_other_figure_is_the_papers(made):
    judged = {}
    for table in made:
        verdicts = [i for i, column in enumerate(table.columns) if i and column == ""]
        judged.update({(table.title, row[0]): row[i] for row in table.rows for i in verdicts})
    assert {key: verdict for key, verdict in judged.items() if verdict not in (SAME, "")} == OTHER
    unprinted = {key[1] for key, verdict in judged.items() if verdict == ""}
    assert unprinted == {variant.title for variant in PLACEMENTS if not variant.parameters}
    assert Counter(title for (title, _), verdict in judged.items() if verdict == SAME) == {
        "Table 10: reduction ratios": 5,
        "Tables 2 and 3: multiply-adds": 7,
        "Where the base differs": 4,
        "Table 3: parameters": 2,
        "Tables 13 and 14: placements": 3,
        "Other figures of the paper and of write-ups": 9,
    }


def test_its_models_are_shipped():
    named = [variant.recipe for variant in (*TABLE_10, *PLACEMENTS, *VARIANTS) if variant.recipe != "resnet50"]
    assert set(named) <= set(recipe_names())
    assert {f"se_{network.base}_paper" for network in NETWORKS} <= set(recipe_names())


@pytest.mark.sweep
def test_the_note_on_inception_resnet_v2():
    with torch.device("meta"):
        model = create_base("inception_resnet_v2")
    macs, added = multiply_adds(model, (3, 298, 298)), plan_se(model, example_input=(3, 298, 298)).macs_added
    note = next(network.note for network in NETWORKS if network.base == "inception_resnet_v2")
    assert f"{macs / 1e9:.2f} G and SE adds {added / 1e6:.1f} M" in note
