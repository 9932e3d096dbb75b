"""Shared set-up of all tests."""

import os

import torch

torch.set_num_threads(1)  # the tests are small, and workers run side by side
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before Triton is first imported
