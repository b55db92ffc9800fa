"""TensorFlow's notes on its own build are kept out of the output of the tests."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
