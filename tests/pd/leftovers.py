"""What libraries leave to the garbage collector, and pytest would take for a test's own."""

import pytest

# Collected before the test is over (`collected` in conftest.py): later it would be taken for that
# of whichever test runs then.
LEFT_TO_THE_COLLECTOR = (
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("collected"),
)
