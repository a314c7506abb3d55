"""Undo what a test could leave behind for the next one."""

import importlib
import os
import random

import numpy as np
import pytest
import torch

# Beartype draws which item of a tuple it looks at, from the generator whose state tests compare
# unless it finds another one when it is imported.
_getrandbits, random.getrandbits = random.getrandbits, random.Random(0).getrandbits
importlib.import_module("beartype")
random.getrandbits = _getrandbits

# Many small tensors: more threads only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# LightningCLI makes calls that jsonargparse has deprecated, already on import; a user does
# not see them.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


@pytest.fixture(autouse=True)
def _clean_process():
    """Restore environment variables, random state and thread count after every test."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
