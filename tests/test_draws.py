"""What draws random numbers from torch is known by torch's own tag, and answered or refused without a draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from se_surgery.reading.draws import Refusing, Undrawn

MAP = torch.linspace(0.1, 0.9, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
SHARED = torch.Generator()
DRAWING = {
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "dropout of maps": lambda x: F.dropout2d(x, 0.5, True),
    "native dropout": lambda x: torch.native_dropout(x, 0.5, True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "rrelu": lambda x: F.rrelu(-x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "fractional pooling": lambda x: F.fractional_max_pool2d(x, 2, output_size=4),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "recurrent": nn.GRU(8, 8, 2, dropout=0.5),
    "rand": lambda x: torch.rand(2),
    "randn": lambda x: torch.randn(2, 3),
    "randn into": lambda x: torch.randn(2, out=torch.empty(2)),
    "rand of a shared generator": lambda x: torch.rand(2, generator=SHARED),
    "randint": lambda x: torch.randint(5, (2,)),
    "randint between": lambda x: torch.randint(2, 5, (2,)),
    "randperm": lambda x: torch.randperm(3),
    "rand_like": lambda x: torch.rand_like(x),
    "randint_like": lambda x: torch.randint_like(x, 1, 3, dtype=torch.long),
    "normal": lambda x: torch.normal(x, x),
    "normal of numbers": lambda x: torch.normal(0.0, 1.0, (2,)),
    "bernoulli": lambda x: torch.bernoulli(x),
    "bernoulli in place": lambda x: x.new_empty(3).bernoulli_(0.5),
    "multinomial": lambda x: torch.multinomial(x.flatten(), 2),
    "poisson": lambda x: torch.poisson(x),
    "exponential": lambda x: x.exponential_(),
    "initialisation": lambda x: nn.init.kaiming_normal_(x),
}


def given(name: str) -> Tensor:
    return MAP[0].clone() if name == "recurrent" else MAP.clone()


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", DRAWING)
def test_a_draw_is_answered_with_the_same_numbers_and_none_is_taken(name):
    usual = first(DRAWING[name](given(name)))
    before = torch.get_rng_state(), SHARED.get_state()
    found = []
    for _ in range(2):
        with Undrawn().on():
            found.append(first(DRAWING[name](given(name))))
    assert (found[0].shape, found[0].dtype) == (usual.shape, usual.dtype) and torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(SHARED.get_state(), before[1])


@pytest.mark.parametrize("name", DRAWING)
def test_a_draw_is_refused_before_a_number_is_taken(name):
    before = torch.get_rng_state(), SHARED.get_state()
    with pytest.raises(KeyError, match="draws"), Refusing(lambda: KeyError("draws")).on():
        DRAWING[name](given(name))
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(SHARED.get_state(), before[1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_drops_nothing_is_no_draw(device):
    x = MAP.to(device)
    with Refusing(lambda: KeyError("draws")).on():
        F.dropout(x, 0.5, False)
        F.scaled_dot_product_attention(x, x, x)
