"""Decoded corpora go to a folder of the test."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("NAR_KERNELS_CACHE", str(folder))
    return folder
