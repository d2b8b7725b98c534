import gc
import os

# The tests' models are small: threads cost more than they give, and the tests themselves run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Many tests start a process. Where images of containers have switched the cache of compiled modules off, each of these
# would compile torch, transformers and the others again, which takes longer than most tests.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

import pytest


# What takes long to import is imported where it is used: pytest's first process runs no test, and starts the others
# only when it has read this file.
def pytest_collection_finish():
    """Puts what has been imported by now out of the garbage collector's sight.

    Trainer collects garbage at the beginning of every run: a third of a second for all those modules' objects, which is
    far longer than most runs here.
    """
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """No network, and a cache of data sets of the file's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture
def open_files_are_left_here():
    """Closes what the test has left open, where the warnings of `LEFT_OPEN` are expected."""
    yield
    gc.collect()


@pytest.fixture
def keep(monkeypatch):
    """A rule by the name of `keep`."""
    from small_runs import Keep

    from metalr_hf.tuning.rules import RULES

    monkeypatch.setitem(RULES, "keep", Keep)


@pytest.fixture(scope="session")
def hub_and_user(tmp_path_factory):
    from stand_in_hub import HubUser, StandInHub

    hub = StandInHub(tmp_path_factory.mktemp("hub"))
    user = HubUser(hub, tmp_path_factory.mktemp("home"))
    yield hub, user
    user.close()
    hub.close()


@pytest.fixture
def hub(hub_and_user):
    """An empty stand-in for the Hub."""
    hub_and_user[0].empty()
    return hub_and_user[0]


@pytest.fixture
def user(hub_and_user, hub):
    """A process that takes it for the Hub."""
    return hub_and_user[1]
