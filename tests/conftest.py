"""What holds for all tests: quiet TensorFlow, and none at all where its tests are not asked for."""

import os
import re

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_ignore_collect(collection_path, config):
    """Leaves files unread whose tests all need TensorFlow, when those are deselected: importing it takes seconds."""
    if "not tensorflow" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    return True if re.search(r"^pytestmark = .*pytest\.mark\.tensorflow", text, re.MULTILINE) else None
