"""Tokens of texts go to a folder of the tests, not to the user's cache."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _token_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT1_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
