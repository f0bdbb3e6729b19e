"""What libraries leave to the garbage collector, and pytest would take for a test's own."""

import pytest

LEFT_TO_THE_COLLECTOR = (
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
)
