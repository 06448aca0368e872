"""What every test file relies on: one thread, so that sums have one order and workers do not crowd each other."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run, whatever ran before."""
    torch.manual_seed(0)
