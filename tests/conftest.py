"""What every test file relies on: one thread, so that sums have one order and workers do not crowd each other."""

from pathlib import Path

import pytest
import timm
import torch
from patients import OLD_TIMM

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """The same random numbers in every run, whatever ran before, and the same width of a terminal."""
    torch.manual_seed(0)
    monkeypatch.setenv("COLUMNS", "120")


def pytest_collection_modifyitems(items):
    """Skip what is parametrised by a network that an older timm does not have yet."""
    if not OLD_TIMM:
        return
    missing = {*(Path(__file__).parent / "zoo/timm_cnns.txt").read_text().split()} - {*timm.list_models()}
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for name in sorted(missing & {str(getattr(value, "name", value)) for value in values}):
            item.add_marker(pytest.mark.skip(f"timm {timm.__version__} has no {name}"))
