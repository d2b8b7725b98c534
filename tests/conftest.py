import os

# The tests' models are small: threads cost more than they give, and the tests themselves run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
