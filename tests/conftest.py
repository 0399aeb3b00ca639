"""Spreads the tests over pytest-xdist's workers: what shares a server or a large model stays in one of them."""

import pytest

GROUPS = ("newest", "floor", "unet", "sampling")


def pytest_itemcollected(item):
    parameters = item.name.partition("[")[2].rstrip("]").split("-")
    for group in GROUPS:
        if group in parameters:
            item.add_marker(pytest.mark.xdist_group({"sampling": "unet"}.get(group, group)))
